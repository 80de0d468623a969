"""Verify SEV-SNP evidence: a chip that AMD (or a root passed in) vouches for signed exactly this report.

Does not appraise: measurement, policy bits, minimum TCB, report data and VMPL are claims for the broker's policy. Revocation is
checked where the caller brings AMD's lists.

Spec: AMD 56860 "SEV-SNP Firmware ABI", ATTESTATION_REPORT; AMD 57230 "VCEK Certificate and KDS Interface", 3 (extensions).
"""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID

from agent.closed import Ident
from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence
from agent.evidence.snp_abi import (
    SIGNED_BYTES,
    Product,
    SigningKey,
    SnpReport,
    TcbVersion,
    parse_report,
    product_of,
)
from agent.verify.crl import RevocationList, check_not_revoked
from agent.verify.roots import AMD_ARK_SHA256, SIMULATED_MARK, UNREADABLE, fingerprint

ACCEPTED_VERSIONS = range(3, 6)
"""What evidence may have. Version 2 does not name the processor; Trustee refuses it too."""
AMD_EXTENSIONS = "1.3.6.1.4.1.3704.1."
"""The arc of the VCEK and VLEK extensions."""
HWID_EXTENSION = "4"
SPL_EXTENSIONS = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}

_T = TypeVar("_T")
_LEAF_NAMES = {SigningKey.VCEK: "SEV-VCEK", SigningKey.VLEK: "SEV-VLEK"}
_PSS = padding.PSS(padding.MGF1(SHA384()), salt_length=48)
_UNDERSTOOD_CRITICAL = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}


@dataclass(frozen=True, slots=True)
class SnpClaims:
    """What genuine silicon said. Only `verify_snp` makes one.

    Attributes:
        chip_id_hash: SHA-256 of the chip id, hex; of 64 zeros where a VLEK signed.
        simulated: the root is a simulated one; always False under AMD's own roots.
        revocation_checked: there were lists, and they leave this chain alone.
    """

    report: SnpReport
    product: Product
    chip_id_hash: str
    simulated: bool
    revocation_checked: bool


def verify_snp(
    evidence: Evidence,
    roots: Sequence[x509.Certificate],
    endorsements: Sequence[x509.Certificate],
    now: datetime,
    revocation_lists: Sequence[RevocationList] | None = None,
    versions: range = ACCEPTED_VERSIONS,
) -> SnpClaims:
    """The claims of `evidence`, verified.

    Args:
        evidence: report and whatever certificates the host supplied, in any order.
        roots: root certificates trusted beside AMD's pinned ones.
        endorsements: certificates the Verifier has itself, of any chip (`load_certificate`). They come before the host's.
        now: the moment certificates and lists must be valid at, with time zone.
        revocation_lists: AMD's, of any processor generation; a current one of this root must be among them. None: revocation
            is not checked.
        versions: of reports. A version 2 report is of the processor generation whose root vouches for it.

    Raises:
        MalformedEvidenceError: report, certificate or extension does not parse, or the processor is unknown.
        EvidenceVerificationError: a check failed; `check` says which.
    """
    # 1. The report parses, with every reserved bit zero.
    report = parse_report(evidence.report)

    # 2. Its version is one that the caller takes, and names the processor from 3 on.
    # refusal: test_a_simulated_version_2_report_is_refused_and_versions_4_and_5_are_not
    if report.version not in versions:
        raise _failed(EvidenceCheck.REPORT_VERSION, EvidenceFormat.SNP_REPORT)
    named = None if report.cpuid_family is None else product_of(report)

    # 3. It is signed at all: with the chip's own key masked, or no key chosen, the firmware leaves the signature zero. A VLEK
    #    is no key of the chip, and signs all the same.
    masked = report.mask_chip_key and report.signing_key is SigningKey.VCEK
    # refusal: test_an_unsigned_report_is_refused_before_its_signature_is_looked_at
    if masked or report.signing_key not in _LEAF_NAMES:
        raise _failed(EvidenceCheck.SIGNING_KEY, EvidenceFormat.SNP_REPORT)

    # 4. Leaf, intermediate and root are chosen by name. Nothing is believed yet, except that the root is one of ours.
    known = [_read(certificate) for certificate in (*endorsements, *map(load_certificate, evidence.cert_chain))]
    leaf = _choose_leaf(report, known)
    intermediate = _first(c for c in known if c.subject == leaf.issuer)
    trusted = AMD_ARK_SHA256 | {fingerprint(root) for root in roots}
    root = _first(c for c in (*map(_read, roots), *known) if c.subject == intermediate.issuer and c.fingerprint in trusted)

    # 5. The root is that of this processor generation: AMD has one per generation.
    product = _first(product for product in Product if root.common_name.endswith(f"-{product.value}"))
    # refusal: test_a_spoiled_chain_is_refused
    if named not in (None, product):
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)

    # 6. Root and intermediate may issue certificates; no certificate says something critical that we do not understand.
    # refusal: test_a_spoiled_chain_is_refused
    if not (root.may_issue and intermediate.may_issue):
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    # refusal: test_a_spoiled_chain_is_refused
    if not root.critical | intermediate.critical | leaf.critical <= _UNDERSTOOD_CRITICAL:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)

    # 7. Each is signed by the next, RSASSA-PSS with SHA-384 whatever it declares. The root's signature of itself would
    #    prove nothing: it is trusted by its fingerprint.
    # refusal: test_a_root_of_the_same_name_with_another_key_is_not_trusted
    _check_issued(intermediate, by=root)
    # refusal: test_a_spoiled_chain_is_refused
    _check_issued(leaf, by=intermediate)

    # 8. All three are valid now.
    # refusal: test_intermediate_and_root_must_be_valid_too
    if not all(c.not_before <= now <= c.not_after for c in (leaf, intermediate, root)):
        raise _failed(EvidenceCheck.CERTIFICATE_VALIDITY)

    # 9. The root has not taken the intermediate back, nor itself.
    if revocation_lists is not None:
        assert isinstance(root.key, rsa.RSAPublicKey), "step 7"
        serials = [c.certificate.serial_number for c in (intermediate, root)]
        check_not_revoked(serials, root.subject, root.key, revocation_lists, now)

    # 10. The leaf is for the TCB the report claims: the chip derives its key from it, so an older TCB has another key.
    # refusal: test_a_turin_chip_needs_a_certificate_for_its_fmc_level
    if leaf.tcb() != report.reported_tcb:
        raise _failed(EvidenceCheck.CERTIFICATE_TCB)

    # 11. A VCEK is for this very chip. A VLEK belongs to a cloud provider's fleet and names none.
    # refusal: test_a_report_of_another_chip_than_the_certificate_is_refused
    if report.signing_key is SigningKey.VCEK and leaf.chip_id() != report.chip_id:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

    # 12. The leaf's key signed the report.
    # refusal: test_a_spoiled_chain_is_refused
    if not isinstance(leaf.key, ec.EllipticCurvePublicKey) or not isinstance(leaf.key.curve, ec.SECP384R1):
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    signature = encode_dss_signature(report.signature_r, report.signature_s)
    try:
        # refusal: test_a_flipped_signature_bit_is_refused
        leaf.key.verify(signature, evidence.report[:SIGNED_BYTES], ec.ECDSA(SHA384()))
    except InvalidSignature as exc:
        raise _failed(EvidenceCheck.REPORT_SIGNATURE, EvidenceFormat.SNP_REPORT) from exc

    return SnpClaims(
        report=report,
        product=product,
        chip_id_hash=hashlib.sha256(report.chip_id).hexdigest(),
        simulated=root.fingerprint not in AMD_ARK_SHA256 and SIMULATED_MARK in root.common_name,
        revocation_checked=revocation_lists is not None,
    )


def load_certificate(der: bytes) -> x509.Certificate:
    """One certificate, also with the serial number 0 that AMD gives every VCEK and VLEK.

    Raises:
        MalformedEvidenceError: not a certificate.
    """
    # cryptography warns about serial 0 and means to refuse it one day; every test with an SNP chain will then fail. The
    # filter names that one warning, because filters are shared by all threads: a race can only keep this one silent.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Parsed a serial number which wasn't positive", CryptographyDeprecationWarning)
        try:
            return x509.load_der_x509_certificate(der)
        except UNREADABLE as exc:
            raise _malformed("certificate") from exc


@dataclass(frozen=True, slots=True)
class _Certificate:
    """What we use of a certificate, read at once: `cryptography` parses lazily and would raise in the middle of a check."""

    certificate: x509.Certificate
    fingerprint: bytes
    subject: x509.Name
    issuer: x509.Name
    common_name: str
    not_before: datetime
    not_after: datetime
    key: object
    may_issue: bool
    critical: set[x509.ObjectIdentifier]
    amd_extensions: dict[str, bytes]

    def tcb(self) -> TcbVersion:
        """The TCB version this leaf is for. Raises MalformedEvidenceError."""
        return TcbVersion(
            bootloader=self._spl("bootloader"),
            tee=self._spl("tee"),
            snp=self._spl("snp"),
            microcode=self._spl("microcode"),
            fmc=self._spl("fmc") if SPL_EXTENSIONS["fmc"] in self.amd_extensions else None,
        )

    def chip_id(self) -> bytes:
        """The chip id this leaf is for, 64 bytes: 8 zero-padded on Turin. Raises MalformedEvidenceError."""
        value = self.amd_extensions.get(HWID_EXTENSION, b"")
        if value[:2] in (b"\x04\x40", b"\x04\x08") and len(value) == 2 + value[1]:  # newer ones are a DER OCTET STRING
            value = value[2:]
        # refusal: test_a_malformed_leaf_extension_is_named
        if len(value) not in (8, 64):
            raise _malformed("hwid_extension", len(value))
        return value.ljust(64, b"\0")

    def _spl(self, part: str) -> int:
        match tuple(self.amd_extensions.get(SPL_EXTENSIONS[part], b"")):  # a DER INTEGER 0..255
            case (2, 1, value) if value < 0x80:
                return value
            case (2, 2, 0, value) if value >= 0x80:
                return value
        # refusal: test_a_malformed_leaf_extension_is_named
        raise _malformed("tcb_extension")


def _read(certificate: x509.Certificate) -> _Certificate:
    try:
        extensions = certificate.extensions
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return _Certificate(
            certificate=certificate,
            fingerprint=fingerprint(certificate),
            subject=certificate.subject,
            issuer=certificate.issuer,
            common_name=str(names[0].value) if names else "",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            key=certificate.public_key(),
            may_issue=_may_issue(extensions),
            critical={extension.oid for extension in extensions if extension.critical},
            amd_extensions={
                extension.oid.dotted_string.removeprefix(AMD_EXTENSIONS): extension.value.value
                for extension in extensions
                if isinstance(extension.value, x509.UnrecognizedExtension)
            },
        )
    except UNREADABLE as exc:
        raise _malformed("certificate") from exc


def _may_issue(extensions: x509.Extensions) -> bool:
    """AMD's roots and intermediates all carry both extensions, so both are required."""
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    # refusal: test_a_spoiled_chain_is_refused
    return constraints.ca and usage.key_cert_sign


def _choose_leaf(report: SnpReport, known: Sequence[_Certificate]) -> _Certificate:
    """The certificate that fits chip and TCB, else any of the right kind, so that the check that fails is named."""
    candidates = [c for c in known if c.common_name == _LEAF_NAMES[report.signing_key]]
    for candidate in candidates:
        right_chip = report.signing_key is SigningKey.VLEK or candidate.chip_id() == report.chip_id
        if right_chip and candidate.tcb() == report.reported_tcb:
            return candidate
    return _first(candidates)


def _first(candidates: Iterable[_T]) -> _T:
    for candidate in candidates:
        return candidate
    # refusal: test_the_certificate_must_be_of_the_kind_the_report_names
    raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)


def _check_issued(certificate: _Certificate, by: _Certificate) -> None:
    # refusal: test_a_spoiled_chain_is_refused
    if not isinstance(by.key, rsa.RSAPublicKey):
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    signed = certificate.certificate
    try:
        # refusal: test_a_root_of_the_same_name_with_another_key_is_not_trusted
        by.key.verify(signed.signature, signed.tbs_certificate_bytes, _PSS, SHA384())
    except InvalidSignature as exc:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN) from exc


def _failed(check: EvidenceCheck, where: EvidenceFormat = EvidenceFormat.SNP_CHAIN) -> EvidenceVerificationError:
    return EvidenceVerificationError(where, check)


def _malformed(field: str, got: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident(field), got)
