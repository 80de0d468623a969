"""Verify TDX evidence: an Intel Quoting Enclave, on a platform that Intel (or a root passed in) vouches for, made this quote.

Does not appraise: measurements, attributes, report data and minimum TCB are claims for the broker's policy; only a TD that the
host may look into is refused here, because nothing it says can be relied on. Whether Intel still calls the platform's
TCB good is not known without collateral (`tdx_collateral.py`), and the claims say so.

Spec: Intel "TDX DCAP Quote Generation Library", appendix A; Intel 348551 "TDX Module 1.5 ABI", ATTRIBUTES and MRSIGNERSEAM.
"""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from agent.closed import Ident
from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence
from agent.evidence.ccel import EventLog, parse_event_log, replay
from agent.evidence.tdx_abi import TdBody, TdxQuote, pack_qe_report, parse_quote, signed_part
from agent.verify.pck import PckExtension, verify_pck_chain

INTEL_QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
INTEL_QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
"""MRSIGNER of Intel's Quoting Enclaves, as Intel's signed QE identity gives it."""
TD_QE_PRODUCT = 2
"""ISVPRODID of the one for TDs; the one for SGX enclaves has 1."""
TD_QE_ATTRIBUTES = 0x11
"""INIT and PROVISION_KEY; of the other flags only MODE64BIT (4) may be set, so DEBUG (2) may not."""
_MODE64BIT = 0x4


class TcbStatus(enum.Enum):
    """What Intel's TCB information says of the platform's patch levels, in Intel's words. `Revoked` is none: it is refused."""

    NOT_EVALUATED = "not_evaluated"  # ours: nobody asked, or no collateral was at hand
    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"


@dataclass(frozen=True, slots=True)
class TdxClaims:
    """What genuine silicon said. Only `verify_tdx` makes one, and `evaluate_tcb` adds to it.

    Attributes:
        td: measurements, attributes and report data, by the names of the specification.
        qe_isv_svn: security version of the Quoting Enclave.
        ppid_hash: SHA-256 of the platform's id, hex; tells platforms apart.
        revocation_checked: revocation lists were given, and the platform is on none.
        tcb_status: NOT_EVALUATED unless collateral was at hand.
        advisory_ids: Intel's advisories that apply at that TCB status.
        simulated: the root is a simulated one; always False under Intel's own.
        event_log: a log came with the quote, and it is the one that its RTMRs were made with.
    """

    quote_version: int
    td: TdBody
    qe_isv_svn: int
    platform: PckExtension
    ppid_hash: str
    revocation_checked: bool
    simulated: bool
    event_log: bool = False
    tcb_status: TcbStatus = TcbStatus.NOT_EVALUATED
    advisory_ids: tuple[Ident, ...] = ()


def verify_tdx(
    evidence: Evidence,
    roots: Sequence[x509.Certificate],
    now: datetime,
    crls: Sequence[x509.CertificateRevocationList] = (),
) -> TdxClaims:
    """The claims of `evidence`, verified.

    Args:
        evidence: the quote, which holds its own certificates; zeros may follow it. An event log with it is replayed.
        roots: root certificates trusted beside Intel's pinned one.
        now: the moment certificates must be valid at, with time zone.
        crls: Intel's revocation lists, the caller's own. Without any, revocation is not looked at.

    Raises:
        MalformedEvidenceError: quote, certificate, extension or event log does not parse.
        EvidenceVerificationError: a check failed; `check` says which.
    """
    # 1. The quote parses, with every reserved bit zero and every length right.
    quote = parse_quote(evidence.report)

    # 2. It says that an enclave of Intel's made it. Other vendors would have another chain.
    # refusal: test_another_vendors_enclave_is_refused
    if quote.qe_vendor_id != INTEL_QE_VENDOR_ID:
        raise _failed(EvidenceCheck.QE_VENDOR)

    # 3. The PCK belongs to a platform that Intel certified, now.
    pck = verify_pck_chain(quote.pck_chain, roots, now, crls)

    # 4. The PCK signed the report of the Quoting Enclave.
    qe = quote.qe_report
    # refusal: test_a_report_of_the_enclave_that_another_platform_signed_is_refused
    _check_signature(pck.key, quote.qe_report_signature, pack_qe_report(qe), EvidenceCheck.QE_REPORT_SIGNATURE)

    # 5. That is Intel's enclave for TDs, and nobody can look into it. The platform certifies any enclave that the host lets
    #    use its provisioning key, so without this check a host could make quotes with an enclave of its own.
    # refusal: test_an_enclave_that_is_not_intels_for_tds_is_refused_though_the_platform_certified_it
    if qe.mr_signer != INTEL_QE_SIGNER:
        raise _failed(EvidenceCheck.QE_IDENTITY)
    # refusal: test_an_enclave_that_is_not_intels_for_tds_is_refused_though_the_platform_certified_it
    if qe.isv_prod_id != TD_QE_PRODUCT:
        raise _failed(EvidenceCheck.QE_IDENTITY, qe.isv_prod_id, TD_QE_PRODUCT)
    flags = int.from_bytes(qe.attributes[:8], "little") & ~_MODE64BIT
    # refusal: test_an_enclave_that_is_not_intels_for_tds_is_refused_though_the_platform_certified_it
    if flags != TD_QE_ATTRIBUTES:
        raise _failed(EvidenceCheck.QE_IDENTITY, flags, TD_QE_ATTRIBUTES)

    # 6. It made the attestation key.
    # refusal: test_a_spoiled_quote_is_refused
    if qe.report_data != hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32):
        raise _failed(EvidenceCheck.ATTESTATION_KEY)

    # 7. The attestation key signed header and body.
    # refusal: test_a_flipped_signature_bit_is_refused
    _check_signature(_attestation_key(quote), quote.signature, signed_part(quote), EvidenceCheck.REPORT_SIGNATURE)

    # 8. The TDX module that measured the TD is Intel's, and no debug build.
    td = quote.body
    # refusal: test_a_td_whose_module_or_attributes_cannot_be_relied_on_is_refused
    if any(td.mr_signer_seam):
        raise _failed(EvidenceCheck.TDX_MODULE)
    # refusal: test_a_td_whose_module_or_attributes_cannot_be_relied_on_is_refused
    if td.seam_attributes:
        raise _failed(EvidenceCheck.TDX_MODULE, td.seam_attributes, 0)

    # 9. The host can neither debug nor profile the TD.
    # refusal: test_a_debug_td_is_refused_though_everything_else_is_genuine
    if td.td_attributes.under_debug:
        raise _failed(EvidenceCheck.TD_DEBUG, td.td_attributes.under_debug, 0)

    # 10. The event log, if one came, made the quote's RTMRs. Nothing else covers it.
    if evidence.event_log:
        # refusal: test_a_log_that_comes_with_a_quote_must_have_made_its_registers
        check_event_log(parse_event_log(evidence.event_log), td)

    return TdxClaims(
        quote_version=quote.version,
        td=td,
        qe_isv_svn=qe.isv_svn,
        platform=pck.extension,
        ppid_hash=hashlib.sha256(pck.extension.ppid).hexdigest(),
        revocation_checked=pck.revocation_checked,
        simulated=pck.simulated,
        event_log=bool(evidence.event_log),
    )


def check_event_log(log: EventLog, td: TdBody) -> None:
    """The log is the one the TD's RTMRs were made with: from here on its digests can be believed.

    Args:
        log: as the guest sent it.
        td: of verified claims.

    Raises:
        MalformedEvidenceError: the log cannot be replayed.
        EvidenceVerificationError: an RTMR differs; `got` is its number.
    """
    for number, (replayed, quoted) in enumerate(zip(replay(log), td.rtmrs, strict=True)):
        # refusal: test_an_event_log_with_one_event_more_or_less_is_refused
        if replayed != quoted:
            raise EvidenceVerificationError(EvidenceFormat.EVENT_LOG, EvidenceCheck.RTMR, number)


def _attestation_key(quote: TdxQuote) -> ec.EllipticCurvePublicKey:
    x, y = (int.from_bytes(half) for half in (quote.attestation_key[:32], quote.attestation_key[32:]))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as exc:
        raise MalformedEvidenceError(EvidenceFormat.TDX_QUOTE, Ident("attestation_key")) from exc


def _check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes, check: EvidenceCheck) -> None:
    r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(SHA256()))
    except InvalidSignature as exc:
        raise _failed(check) from exc


def _failed(check: EvidenceCheck, got: int | None = None, expected: int | None = None) -> EvidenceVerificationError:
    return EvidenceVerificationError(EvidenceFormat.TDX_QUOTE, check, got, expected)
