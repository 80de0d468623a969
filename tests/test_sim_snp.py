"""The simulated SNP device: what it says, how it fails, and how close its certificates are to AMD's."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.errors import DeviceError, EvidenceBindingError, EvidenceFormat
from agent.evidence import Attester, ReportData, Tee
from agent.evidence.snp_abi import SIGNED_BYTES, GuestPolicy, TcbVersion, parse_report
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import SimulatedSnp, issue_leaf
from agent.verify.snp import AMD_EXTENSIONS, load_certificate
from tests.shared import shared_data

REPORT_DATA = ReportData(bytes(range(64)))


def amd_extensions(certificate: x509.Certificate) -> dict[str, bytes]:
    return {
        extension.oid.dotted_string: extension.value.value
        for extension in certificate.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }


def test_a_report_says_what_the_machine_is(machine: SimulatedMachine) -> None:
    machine.measurement = b"\1" * 48
    machine.host_data = b"\2" * 32
    machine.policy = 0xB0000
    machine.vmpl = 2
    machine.guest_svn = 9
    attester: Attester = SimulatedSnp(machine)
    evidence = attester.collect(REPORT_DATA)
    report = parse_report(evidence.report)
    assert evidence.tee is attester.tee is Tee.SNP
    assert report.version == 3
    assert (report.report_data, report.measurement, report.host_data) == (REPORT_DATA, b"\1" * 48, b"\2" * 32)
    assert (report.policy, report.vmpl, report.guest_svn) == (GuestPolicy(0xB0000), 2, 9)
    assert (report.chip_id, report.reported_tcb) == (machine.chip_id, machine.tcb)


def test_reports_are_fresh_and_of_the_same_guest(machine: SimulatedMachine) -> None:
    one, two = (parse_report(machine.attester().collect(REPORT_DATA).report) for _ in range(2))
    assert one.signature_r != two.signature_r
    assert one.report_id == two.report_id


def test_a_device_that_fails_gives_its_errno(machine: SimulatedMachine) -> None:
    machine.errno = 25
    with pytest.raises(DeviceError) as failed:
        machine.attester().collect(REPORT_DATA)
    assert (failed.value.interface, failed.value.code, failed.value.retryable) == ("simulated-snp", 25, False)


def test_a_machine_whose_keys_are_gone_is_a_device_that_fails(machine: SimulatedMachine) -> None:
    (machine.directory / "vcek.key").unlink()
    with pytest.raises(DeviceError) as failed:
        machine.attester().collect(REPORT_DATA)
    assert failed.value.code == 2


def test_a_device_that_signs_other_data_is_a_binding_error(machine: SimulatedMachine) -> None:
    machine.wrong_report_data = True
    with pytest.raises(EvidenceBindingError) as failed:
        machine.attester().collect(REPORT_DATA)
    assert failed.value.format is EvidenceFormat.SNP_REPORT


def test_a_flipped_signature_bit_leaves_the_signed_part_alone(machine: SimulatedMachine) -> None:
    honest = machine.attester().collect(REPORT_DATA).report
    machine.flip_signature_bit = True
    assert machine.attester().collect(REPORT_DATA).report[:SIGNED_BYTES] == honest[:SIGNED_BYTES]


def test_the_chain_is_complete_and_its_names_cannot_be_mistaken(machine: SimulatedMachine) -> None:
    vcek, ask, ark = (load_certificate(der) for der in machine.attester().collect(REPORT_DATA).cert_chain)
    assert (vcek.issuer, ask.issuer) == (ask.subject, ark.subject)
    assert ark.issuer == ark.subject
    for certificate in (vcek, ask, ark):
        assert "SIMULATED" in certificate.subject.rfc4514_string()
        assert "not AMD" in certificate.subject.rfc4514_string()
    for certificate in (ask, ark):
        key = certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 4096


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_the_leaf_has_the_form_of_amds(machine: SimulatedMachine) -> None:
    ours = load_certificate(machine.attester().collect(REPORT_DATA).cert_chain[0])
    amds = load_certificate(shared_data("snp/genoa-v3-vcek-configfs/vcek.der").read_bytes())
    assert ours.serial_number == amds.serial_number == 0
    assert ours.signature_algorithm_oid == amds.signature_algorithm_oid
    hwid = AMD_EXTENSIONS + "4"
    ours_extensions, amds_extensions = amd_extensions(ours), amd_extensions(amds)
    assert len(ours_extensions.pop(hwid)) == len(amds_extensions.pop(hwid)) == 64
    assert ours_extensions == amds_extensions  # the simulated TCB version is the one of this recorded machine


def test_a_fleet_certificate_names_no_chip(machine: SimulatedMachine) -> None:
    key = load_certificate(machine.attester().collect(REPORT_DATA).cert_chain[0]).public_key()
    leaf = load_certificate(issue_leaf(machine.silicon, key, "SEV-VLEK", TcbVersion(1, 2, 3, 200), None))  # type: ignore[arg-type]
    extensions = amd_extensions(leaf)
    assert AMD_EXTENSIONS + "4" not in extensions
    assert extensions[AMD_EXTENSIONS + "3.8"] == b"\2\2\0\xc8"
