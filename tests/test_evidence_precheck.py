"""What a Trustee verifier would refuse without a word, told before it is sent."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from agent.errors import (
    ConfigNotMeasuredError,
    EvidenceBindingError,
    EvidencePrecheckError,
    MalformedEvidenceError,
    Owner,
    Precheck,
)
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.ccel import pack_event_log, parse_event_log
from agent.evidence.precheck import check_before_sending
from agent.evidence.snp_abi import SnpReport, pack_report, parse_report
from agent.evidence.tdx_abi import TdAttributes, pack_quote, parse_quote
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_event_log

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(64))
HOST_DATA = bytes(range(32))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedMachine:
    return SimulatedMachine.create(tmp_path_factory.mktemp("machine") / "m", gpus=0, host_data=HOST_DATA)


def snp(machine: SimulatedMachine, change: Callable[[SnpReport], SnpReport]) -> Evidence:
    evidence = machine.attester().collect(DATA)
    return replace(evidence, report=pack_report(change(parse_report(evidence.report))))


def tdx(machine: SimulatedMachine, **changes: object) -> Evidence:
    evidence = machine.attester(Tee.TDX).collect(DATA)
    quote = parse_quote(evidence.report)
    return replace(evidence, report=pack_quote(replace(quote, body=replace(quote.body, **changes))))  # type: ignore[arg-type]


@pytest.mark.parametrize("digest", [None, HOST_DATA, HOST_DATA + bytes(16)])
def test_good_evidence_passes_as_it_is(machine: SimulatedMachine, digest: bytes | None) -> None:
    for evidence in (machine.attester().collect(DATA), machine.attester(Tee.TDX).collect(DATA)):
        assert check_before_sending(evidence, DATA, digest) == evidence
    sample = machine.attester(Tee.SAMPLE).collect(DATA)
    unpadded = ReportData(bytes(DATA[:48]).ljust(64, b"\0"))
    assert check_before_sending(sample, unpadded, digest) == sample


@pytest.mark.parametrize("version", [3, 4, 5])
def test_report_versions_3_to_5_pass(machine: SimulatedMachine, version: int) -> None:
    none = 0 if version == 5 else None
    evidence = snp(machine, lambda r: replace(r, version=version, launch_mitigations=none, current_mitigations=none))
    assert check_before_sending(evidence, DATA, HOST_DATA) == evidence


def test_what_trustee_would_refuse_is_not_sent(machine: SimulatedMachine) -> None:
    old = snp(machine, lambda r: replace(r, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None))
    rows = [
        (old, Precheck.REPORT_VERSION, 2),
        (snp(machine, lambda r: replace(r, vmpl=1)), Precheck.VMPL, 1),
        (snp(machine, lambda r: replace(r, policy=type(r.policy)(r.policy | 1 << 19))), Precheck.DEBUG, 1),
        (tdx(machine, td_attributes=TdAttributes(1)), Precheck.DEBUG, 1),
    ]
    for evidence, check, got in rows:
        with pytest.raises(EvidencePrecheckError) as raised:
            check_before_sending(evidence, DATA, None)
        assert (raised.value.check, raised.value.got, raised.value.owner) == (check, got, Owner.HOST)
        assert check.value in str(raised.value)


def test_report_data_of_another_handshake_is_not_sent(machine: SimulatedMachine) -> None:
    for tee in Tee:
        evidence = machine.attester(tee).collect(DATA)
        with pytest.raises(EvidenceBindingError):
            check_before_sending(evidence, OTHER, None)
    for nothing, data in ((b"", DATA), (bytes(48), DATA), (b"", OTHER)):
        with pytest.raises(EvidenceBindingError):
            check_before_sending(Evidence(Tee.SAMPLE, nothing), data, None)


def test_initdata_that_the_tee_does_not_know_is_not_sent(machine: SimulatedMachine) -> None:
    for tee in (Tee.SNP, Tee.TDX):
        with pytest.raises(ConfigNotMeasuredError):
            check_before_sending(machine.attester(tee).collect(DATA), DATA, bytes(32))
    with pytest.raises(ConfigNotMeasuredError):  # the whole of the field counts
        check_before_sending(machine.attester(Tee.TDX).collect(DATA), DATA, HOST_DATA + bytes(15) + b"\1")
    with pytest.raises(ConfigNotMeasuredError):
        check_before_sending(machine.attester().collect(DATA), DATA, b"")


def test_an_event_log_goes_along_where_it_explains_the_quote(machine: SimulatedMachine) -> None:
    log = make_event_log(machine)
    good = replace(machine.attester(Tee.TDX).collect(DATA), event_log=pack_event_log(log))
    assert check_before_sending(good, DATA, None) == good
    shorter = pack_event_log(replace(log, events=log.events[:-1]))
    assert parse_event_log(shorter)
    for other in (shorter, b"\0", pack_event_log(log)[:-1]):
        assert check_before_sending(replace(good, event_log=other), DATA, None) == replace(good, event_log=b"")


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_what_does_not_parse_is_not_sent(tee: Tee) -> None:
    with pytest.raises(MalformedEvidenceError):
        check_before_sending(Evidence(tee, b"no report"), DATA, None)
