"""What a Trustee verifier will refuse without saying why, found in the Evidence before it is sent.

At `/attest` a KBS has one answer for everything that is wrong. The report is in our hands, so what can be seen in it is told
here, with an owner. Does not verify signatures: who signed is the verifier's business.
Follows confidential-containers/trustee 78962cd, `deps/verifier` (snp, tdx, sample).
"""

from dataclasses import replace
from typing import assert_never

from agent.errors import (
    ConfigNotMeasuredError,
    EvidenceBindingError,
    EvidenceFormat,
    EvidencePrecheckError,
    MalformedEvidenceError,
    Precheck,
)
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.ccel import parse_event_log, replay
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import TdBody, parse_quote
from agent.guest.initdata import fit

SNP_VERSIONS = range(3, 6)


def check_before_sending(evidence: Evidence, report_data: ReportData, launched_with: bytes | None) -> Evidence:
    """Check that a Trustee verifier can accept this.

    Args:
        evidence: fresh.
        report_data: what it was asked to carry.
        launched_with: digest of the initdata that is sent beside it, to be compared with HOST_DATA or MRCONFIGID; None when
            none is sent.

    Returns:
        The Evidence to send: without its event log when that does not explain the quote. Such a log is refused; a quote
        without one is accepted, and appraised by its registers alone.

    Raises:
        EvidencePrecheckError: how the guest was launched.
        EvidenceBindingError: it carries other report data.
        ConfigNotMeasuredError: the TEE's field is not the digest of the initdata.
        MalformedEvidenceError: it does not parse.
    """
    match evidence.tee:
        case Tee.SNP:
            report = parse_report(evidence.report)
            # refusal: test_what_trustee_would_refuse_is_not_sent
            if report.version not in SNP_VERSIONS:
                raise EvidencePrecheckError(Precheck.REPORT_VERSION, report.version)
            # refusal: test_what_trustee_would_refuse_is_not_sent
            if report.vmpl != 0:
                raise EvidencePrecheckError(Precheck.VMPL, report.vmpl)
            # refusal: test_what_trustee_would_refuse_is_not_sent
            if report.policy.debug:
                raise EvidencePrecheckError(Precheck.DEBUG, 1)
            _check_fields(report.report_data, report.host_data, report_data, launched_with, EvidenceFormat.SNP_REPORT)
            return evidence
        case Tee.TDX:
            body = parse_quote(evidence.report, ignore_trailing=True).body
            # refusal: test_what_trustee_would_refuse_is_not_sent
            if body.td_attributes.under_debug:
                raise EvidencePrecheckError(Precheck.DEBUG, body.td_attributes.under_debug)
            _check_fields(body.report_data, body.mr_config_id, report_data, launched_with, EvidenceFormat.TDX_QUOTE)
            return evidence if _explains(evidence.event_log, body) else replace(evidence, event_log=b"")
        case Tee.SAMPLE:
            # refusal: test_report_data_of_another_handshake_is_not_sent
            if not evidence.report or evidence.report.ljust(len(report_data), b"\0") != report_data:
                raise EvidenceBindingError(EvidenceFormat.SAMPLE)
            return evidence
        case _:
            assert_never(evidence.tee)


def _check_fields(
    carried: bytes, field: bytes, report_data: ReportData, launched_with: bytes | None, where: EvidenceFormat
) -> None:
    # refusal: test_report_data_of_another_handshake_is_not_sent
    if carried != report_data:
        raise EvidenceBindingError(where)
    # refusal: test_initdata_that_the_tee_does_not_know_is_not_sent
    if launched_with is not None and field != fit(launched_with, len(field)):
        raise ConfigNotMeasuredError


def _explains(log: bytes, body: TdBody) -> bool:
    try:
        return bool(log) and replay(parse_event_log(log)) == body.rtmrs
    except MalformedEvidenceError:
        return False
