"""What a receipt rests on: CPU Evidence over its key and its statement, genuine or of this very guest, and its event log.

Two ways to believe the Evidence. Anybody: it is genuine under the vendors' roots (`verify_receipt`). A container of the same
guest: the guest's own components give other Evidence, which is of the same guest (`check_same_guest`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from agent.errors import ReceiptError, ReceiptProblem
from agent.evidence import Evidence, Tee
from agent.evidence.ccel import DOMAIN, OPERATION, EventLog, parse_event_log, parse_runtime_event
from agent.evidence.snp_abi import PARSED_VERSIONS, parse_report
from agent.evidence.tdx_abi import TdBody, parse_quote
from agent.jose import parse_object
from agent.receipt import DIGEST_BYTES, Receipt
from agent.verify.crl import RevocationList
from agent.verify.snp import SnpClaims, verify_snp
from agent.verify.tdx import TdxClaims, check_event_log, verify_tdx

_MAX_CONTENT_BYTES = 4 << 10


@dataclass(frozen=True, slots=True)
class ReceiptClaims:
    """A receipt that its guest made. Only `verify_receipt` makes one.

    Attributes:
        evidence: what the silicon said; None of sample evidence, which proves nothing.
        simulated: the silicon is, or the boot said so.
        logged: the release of this very statement stands in an event log that the quote explains.
    """

    receipt: Receipt
    evidence: SnpClaims | TdxClaims | None
    simulated: bool
    logged: bool


def verify_receipt(
    receipt: Receipt,
    roots: Sequence[x509.Certificate],
    endorsements: Sequence[x509.Certificate],
    now: datetime,
    lists: Sequence[RevocationList] | None = None,
) -> ReceiptClaims:
    """A guest on genuine silicon made it.

    Args:
        receipt: signed by its key, as `parse_receipt` gives it.
        roots: trusted beside the vendors' pinned ones.
        endorsements: certificates of an SNP chip beside those that came with the Evidence.
        now: the moment certificates must be valid at, with time zone.
        lists: AMD's revocation lists; None: revocation is not looked at.

    Raises:
        ReceiptError: BINDING, CONFIG or EVENT_LOG.
        MalformedEvidenceError, EvidenceVerificationError: as `verify_snp` and `verify_tdx`.
    """
    # 1. The Evidence is over this key and this statement.
    check_binding(receipt)

    # 2. Genuine silicon gave it; a log that came with a quote replays to its registers.
    claims: SnpClaims | TdxClaims | None = None
    match receipt.evidence.tee:
        case Tee.SNP:
            claims = verify_snp(receipt.evidence, roots, endorsements, now, lists, PARSED_VERSIONS)
        case Tee.TDX:
            claims = verify_tdx(receipt.evidence, roots, now)

    # 3. The guest was launched with the configuration that the statement names.
    launched_with = launch_digest(receipt.evidence)
    # refusal: test_a_statement_names_the_configuration_that_the_guest_was_launched_with
    if launched_with is not None and launched_with != _fit(receipt.statement.config_digest, len(launched_with)):
        raise ReceiptError(ReceiptProblem.CONFIG)

    # 4. What it says was measured stands in that log.
    measured = receipt.unmeasured is None
    logged = measured and _has_release(receipt, receipt.evidence)
    # refusal: test_a_measured_release_stands_in_the_log
    if measured and receipt.evidence.event_log and not logged:
        raise ReceiptError(ReceiptProblem.EVENT_LOG)
    simulated = receipt.statement.simulated or claims is None or claims.simulated
    return ReceiptClaims(receipt, claims, simulated, logged)


def check_binding(receipt: Receipt) -> None:
    """The receipt's Evidence covers its key and its statement.

    Raises:
        ReceiptError: BINDING.
        MalformedEvidenceError: the Evidence does not parse.
    """
    expected, evidence = receipt.report_data(), receipt.evidence
    match evidence.tee:
        case Tee.SNP:
            found = parse_report(evidence.report).report_data
        case Tee.TDX:
            found = parse_quote(evidence.report).body.report_data
        case Tee.SAMPLE:  # what was asked for, without the zeros
            found = evidence.report.ljust(len(expected), b"\0")
    # refusal: test_evidence_over_another_key_or_statement_is_refused
    if found != expected:
        raise ReceiptError(ReceiptProblem.BINDING)


def check_same_guest(receipt: Receipt, here: Evidence) -> None:
    """The receipt is of the guest that gave `here`, whose log must replay. For whoever may believe `here` without a signature.

    SNP tells guests apart by REPORT_ID. TDX does by the TD's id where the module reports one, and by the event log where the
    release was measured; without either, two guests of one image and one configuration look the same.

    Args:
        receipt: bound to its Evidence (`check_binding`).
        here: fresh Evidence of this guest.

    Raises:
        ReceiptError: GUEST.
        MalformedEvidenceError: one of the two does not parse.
        EvidenceVerificationError: the log of `here` does not replay to its registers.
    """
    there = receipt.evidence
    # refusal: test_evidence_of_another_kind_is_of_another_guest
    if there.tee is not here.tee:
        raise ReceiptError(ReceiptProblem.GUEST)
    match here.tee:
        case Tee.SNP:
            ours, theirs = parse_report(here.report), parse_report(there.report)
            same = (ours.report_id, ours.measurement, ours.host_data, ours.chip_id) == (
                theirs.report_id,
                theirs.measurement,
                theirs.host_data,
                theirs.chip_id,
            )
        case Tee.TDX:
            td = parse_quote(here.report).body
            same = _of_launch(td) == _of_launch(parse_quote(there.report).body)
            if same and here.event_log:
                check_event_log(parse_event_log(here.event_log), td)
                same = receipt.unmeasured is not None or _has_release(receipt, here)
        case Tee.SAMPLE:
            same = True
    # refusal: test_a_receipt_of_another_guest_is_refused
    if not same:
        raise ReceiptError(ReceiptProblem.GUEST)


def launch_digest(evidence: Evidence) -> bytes | None:
    """HOST_DATA or MRCONFIGID: 32 or 48 bytes; None of sample evidence. Raises MalformedEvidenceError."""
    match evidence.tee:
        case Tee.SNP:
            return parse_report(evidence.report).host_data
        case Tee.TDX:
            return parse_quote(evidence.report).body.mr_config_id
        case Tee.SAMPLE:
            return None


def _has_release(receipt: Receipt, evidence: Evidence) -> bool:
    """Does the log of `evidence`, which replays to its registers, have the release of this receipt's statement?"""
    if not evidence.event_log:
        return False
    return receipt.statement.digest() in _statements(parse_event_log(evidence.event_log))


def _fit(digest: bytes, length: int) -> bytes:
    """As `guest/initdata.py` has it."""
    return digest[:length].ljust(length, b"\0")


def _of_launch(td: TdBody) -> tuple[bytes | None, ...]:
    """What stays of a TD from its launch on; of two guests of one image and configuration only the last one differs."""
    rtmrs = (td.rtmr_0, td.rtmr_1, td.rtmr_2)
    return (td.mr_td, td.mr_config_id, td.mr_owner, td.mr_owner_config, *rtmrs, td.extension.td_id if td.extension else None)


def _statements(log: EventLog) -> set[bytes]:
    """The statements of the releases that were measured."""
    found = set()
    for event in log.events:
        said = parse_runtime_event(event)
        if said is None or (said.domain, said.operation) != (DOMAIN, OPERATION):
            continue
        try:
            digest = parse_object(said.content.encode(), _MAX_CONTENT_BYTES).get("statement_digest")
            found.add(bytes.fromhex(str(digest).removeprefix("sha384:")))
        except ValueError:  # somebody else's, by our name
            continue
    return {digest for digest in found if len(digest) == DIGEST_BYTES}
