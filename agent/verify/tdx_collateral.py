"""Intel's word on a platform's patch levels: TCB information and QE identity, over a verified quote.

The evaluation is dcap-qvl's (optional extra `tdx`), which checks Intel's signatures on the collateral, its dates, revocation
and the Quoting Enclave's own level. It also judges attributes that `verify_tdx` leaves to the policy: it refuses a TD without
SEPT_VE_DISABLE, or one that may be migrated. Fetches nothing: collateral is the caller's to bring, in dcap-qvl's JSON form.

Spec: Intel "Provisioning Certification Service API" 4, TCB info and QE identity.
"""

from dataclasses import replace
from datetime import datetime

from agent.closed import Ident
from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence
from agent.evidence.tdx_abi import pack_quote, parse_quote
from agent.verify.tdx import TcbStatus, TdxClaims

MAX_COLLATERAL_BYTES = 1 << 20


def evaluate_tcb(claims: TdxClaims, evidence: Evidence, collateral: bytes | None, now: datetime) -> TdxClaims:
    """`claims` with what Intel says of the platform's TCB.

    Without collateral, or where the extra is not installed, the status stays NOT_EVALUATED: whether that is enough is the
    policy's to say, and no status is ever made up.

    Args:
        claims: of `verify_tdx` for `evidence`.
        evidence: the quote.
        collateral: JSON of a QuoteCollateralV3 for the platform, at most 1 MiB.
        now: the moment it must be valid at, with time zone.

    Raises:
        MalformedEvidenceError: the collateral does not parse.
        EvidenceVerificationError: it is not Intel's, not valid now, not for this platform, or it knows no such TCB level.
    """
    if collateral is None:
        return claims
    try:
        import dcap_qvl  # a megabyte of Rust that most installations never need
    except ImportError:
        return claims
    if len(collateral) > MAX_COLLATERAL_BYTES:
        raise _malformed(len(collateral), MAX_COLLATERAL_BYTES)
    try:
        parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())
    except ValueError as exc:  # UnicodeDecodeError is one
        raise _malformed() from exc
    try:
        result = dcap_qvl.verify(pack_quote(parse_quote(evidence.report)), parsed, int(now.timestamp()))
        status = TcbStatus(result.status)
    except ValueError as exc:  # its reasons are texts
        raise EvidenceVerificationError(EvidenceFormat.TDX_CHAIN, EvidenceCheck.TCB_COLLATERAL) from exc
    return replace(claims, tcb_status=status, advisory_ids=tuple(map(Ident.of_peer, result.advisory_ids)))


def _malformed(got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.TDX_CHAIN, Ident("collateral"), got, expected)
