"""The simulated TDX device: what it says, how it fails, and how close its certificates are to Intel's."""

import dcap_qvl
import pytest
from cryptography import x509

from agent.errors import DeviceError, EvidenceBindingError, EvidenceFormat
from agent.evidence import Attester, ReportData, Tee
from agent.evidence.ccel import replay
from agent.evidence.tdx_abi import pack_tdreport, parse_quote, parse_tdreport, quote_length
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import SimulatedTdx, make_event_log, make_pck_extension, make_td_report
from tests.shared import shared_data

REPORT_DATA = ReportData(bytes(range(64)))


def test_a_quote_says_what_the_machine_is(machine: SimulatedMachine) -> None:
    machine.measurement = b"\1" * 48
    machine.host_data = b"\2" * 32
    attester: Attester = machine.attester(Tee.TDX)
    evidence = attester.collect(REPORT_DATA)
    assert evidence.tee is attester.tee is Tee.TDX
    assert evidence.cert_chain == ()
    td = parse_quote(evidence.report).body
    assert (td.report_data, td.mr_td, td.mr_config_id) == (REPORT_DATA, b"\1" * 48, b"\2" * 32 + bytes(16))
    assert td.td_attributes.sept_ve_disable
    assert not td.td_attributes.under_debug
    assert td.rtmrs == replay(make_event_log(machine))


def test_the_machine_is_an_snp_guest_unless_asked_otherwise(machine: SimulatedMachine) -> None:
    assert machine.attester().tee is Tee.SNP


def test_a_guest_policy_that_allows_debugging_makes_a_debug_td(machine: SimulatedMachine) -> None:
    machine.policy |= 1 << 19
    assert parse_quote(SimulatedTdx(machine).collect(REPORT_DATA).report).body.td_attributes.debug


def test_quotes_are_fresh_and_of_the_same_platform(machine: SimulatedMachine) -> None:
    one, two = (parse_quote(SimulatedTdx(machine).collect(REPORT_DATA).report) for _ in range(2))
    assert one.signature != two.signature
    assert one.pck_chain == two.pck_chain


def test_a_quote_may_be_of_version_5_and_padded(machine: SimulatedMachine) -> None:
    report = SimulatedTdx(machine, version=5, padding=3000).collect(REPORT_DATA).report
    assert len(report) - quote_length(report) == 3000
    assert parse_quote(report).body.mr_service_td == bytes(48)


def test_the_tdreport_is_one(machine: SimulatedMachine) -> None:
    report = make_td_report(machine, REPORT_DATA)
    assert parse_tdreport(pack_tdreport(report)) == report


def test_a_device_that_fails_gives_its_errno(machine: SimulatedMachine) -> None:
    machine.errno = 16
    with pytest.raises(DeviceError) as failed:
        SimulatedTdx(machine).collect(REPORT_DATA)
    assert (failed.value.interface, failed.value.code) == ("simulated-tdx", 16)


def test_a_machine_whose_keys_are_gone_is_a_device_that_fails(machine: SimulatedMachine) -> None:
    (machine.directory / "pck.key").unlink()
    with pytest.raises(DeviceError) as failed:
        SimulatedTdx(machine).collect(REPORT_DATA)
    assert failed.value.code == 2


def test_a_device_that_signs_other_data_is_a_binding_error(machine: SimulatedMachine) -> None:
    machine.wrong_report_data = True
    with pytest.raises(EvidenceBindingError) as failed:
        SimulatedTdx(machine).collect(REPORT_DATA)
    assert failed.value.format is EvidenceFormat.TDX_QUOTE


def test_a_flipped_signature_bit_leaves_the_signed_part_alone(machine: SimulatedMachine) -> None:
    machine.flip_signature_bit = True
    assert parse_quote(SimulatedTdx(machine).collect(REPORT_DATA).report).body.report_data == REPORT_DATA


def chain(quote: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(parse_quote(quote).pck_chain.removesuffix(b"\0"))


def test_the_names_say_that_it_is_simulated(machine: SimulatedMachine) -> None:
    for certificate in chain(SimulatedTdx(machine).collect(REPORT_DATA).report):
        assert "SIMULATED" in certificate.subject.rfc4514_string()
        assert "not Intel" in certificate.subject.rfc4514_string()


def test_certificates_have_the_profile_of_intels(machine: SimulatedMachine) -> None:
    simulated = chain(SimulatedTdx(machine).collect(REPORT_DATA).report)
    recorded = chain(shared_data("tdx/quotes/v4-uptodate.bin").read_bytes())
    for ours, intels in zip(simulated, recorded, strict=True):
        assert ours.signature_algorithm_oid == intels.signature_algorithm_oid
        for kind in (x509.KeyUsage, x509.BasicConstraints):
            one, two = (certificate.extensions.get_extension_for_class(kind) for certificate in (ours, intels))
            assert (one.value, one.critical) == (two.value, two.critical)
        extensions = {extension.oid for extension in ours.extensions}
        assert extensions <= {extension.oid for extension in intels.extensions}


@pytest.mark.parametrize("version", [4, 5])
def test_another_parser_reads_the_same_in_a_simulated_quote(machine: SimulatedMachine, version: int) -> None:
    data = SimulatedTdx(machine, version).collect(REPORT_DATA).report
    ours, theirs = parse_quote(data), dcap_qvl.parse_quote(data)
    for name in ("tee_tcb_svn", "mr_seam", "mr_td", "mr_config_id", "mr_owner", "mr_owner_config", "report_data"):
        assert getattr(theirs.report, name) == getattr(ours.body, name), name
    assert (theirs.report.rt_mr0, theirs.report.rt_mr1, theirs.report.rt_mr2, theirs.report.rt_mr3) == ours.body.rtmrs
    assert theirs.header.version == version
    extension = theirs.pck_extension()
    ours_extension = make_pck_extension(machine.chip_id)
    for name in ("ppid", "cpu_svn", "pce_svn", "pce_id", "fmspc", "sgx_type"):
        assert getattr(extension, name) == getattr(ours_extension, name), name
