import datetime
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from agent.errors import (
    AgentError,
    AttestationKeyLostError,
    DeviceError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
    Owner,
)
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.cpu import REQUEST_DISTANCE_S
from agent.evidence.sev_guest import DEVICE, MAX_REQUESTS, SevGuest
from agent.evidence.snp_abi import (
    REPORT_RESPONSE_BYTES,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    CertificateKind,
    pack_ext_report_request,
    pack_guest_request,
    pack_report_request,
    parse_certificates_bytes,
    parse_exit_info,
    parse_report,
    parse_report_response,
)
from agent.sim.machine import SimulatedMachine
from agent.verify.snp import verify_snp
from tests.certificates import table
from tests.fake_fuse_node import fuse_node
from tests.fake_nodes import INVALID_LEN, INVALID_PARAM, FakeSevGuest, Fault
from tests.shared import shared_data

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(reversed(DATA)))
BUSY = 2


class Clock:
    """Seconds that pass only in pauses."""

    def __init__(self) -> None:
        self.time = 50.0
        self.pauses: list[float] = []
        self.wanted = True

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.time += seconds
        return self.wanted


@pytest.fixture
def fake(machine: SimulatedMachine) -> FakeSevGuest:
    """A driver whose firmware is the simulated machine's."""

    def firmware(data: bytes, vmpl: int) -> bytes:
        machine.vmpl = vmpl
        return machine.attester().collect(ReportData(data)).report

    return FakeSevGuest(firmware)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(tmp_path: Path) -> Path:
    node = tmp_path / "sev-guest"
    node.touch()
    return node


@pytest.fixture
def device(fake: FakeSevGuest, clock: Clock, node: Path) -> SevGuest:
    return SevGuest(node, node.with_name("vmpl"), fake.ioctl, clock.now, clock.wait)


def chain_table(machine: SimulatedMachine) -> bytes:
    vcek, ask, ark = machine.attester().collect(DATA).cert_chain
    return table((CertificateKind.ARK, ark), (CertificateKind.ASK, ask), (CertificateKind.VCEK, vcek))


def refused(kind: type[AgentError], device: SevGuest) -> AgentError:
    with pytest.raises(kind) as caught:
        device.collect(DATA)
    assert type(caught.value) is kind
    assert not caught.value.retryable
    assert (caught.value.owner, caught.value.exit_status) == (Owner.HOST, 12)
    return caught.value


def device_error(kind: type[DeviceError], device: SevGuest) -> tuple[str, str, int]:
    error = refused(kind, device)
    assert isinstance(error, DeviceError)
    return error.interface, error.call, error.code


# --- requests ---------------------------------------------------------------------------------------------------------


def test_evidence_of_a_host_without_certificates_is_one_request(
    device: SevGuest, fake: FakeSevGuest, machine: SimulatedMachine
) -> None:
    evidence = device.collect(DATA)
    assert evidence.cert_chain == ()
    assert fake.asked == [(SNP_GET_EXT_REPORT, 0)]
    roots = [x509.load_pem_x509_certificate((machine.roots_dir / "ark.pem").read_bytes())]
    chain = machine.attester().collect(DATA).cert_chain
    claims = verify_snp(Evidence(Tee.SNP, evidence.report, chain), roots, [], datetime.datetime.now(datetime.UTC))
    assert claims.report.report_data == DATA


def test_host_data_is_a_reports(device: SevGuest, fake: FakeSevGuest, machine: SimulatedMachine) -> None:
    machine.host_data = bytes(range(32))
    assert device.launch_digest() == machine.host_data
    assert len(fake.asked) == 1


def test_what_the_host_has_is_asked_for_once(device: SevGuest, fake: FakeSevGuest) -> None:
    device.collect(DATA)
    assert parse_report(device.collect(OTHER).report).report_data == OTHER
    assert fake.asked == [(SNP_GET_EXT_REPORT, 0), (SNP_GET_REPORT, 0)]


def test_certificates_take_two_requests_once_and_one_from_then_on(
    device: SevGuest, fake: FakeSevGuest, machine: SimulatedMachine
) -> None:
    fake.certificates = chain_table(machine)
    pages = -(-len(fake.certificates) // 4096) * 4096
    assert device.collect(DATA).cert_chain == machine.attester().collect(DATA).cert_chain
    assert fake.asked == [(SNP_GET_EXT_REPORT, 0), (SNP_GET_EXT_REPORT, pages)]
    device.collect(OTHER)
    assert fake.asked[2:] == [(SNP_GET_EXT_REPORT, pages)]


def test_a_recorded_certificate_table_is_taken_over(device: SevGuest, fake: FakeSevGuest) -> None:
    fake.certificates = shared_data("snp/genoa-v3-vcek-configfs/auxblob.bin").read_bytes()
    vcek = shared_data("snp/genoa-v3-vcek-configfs/vcek.der").read_bytes()
    assert device.collect(DATA).cert_chain[0] == vcek


def test_a_table_that_grows_between_two_requests_is_not_followed(device: SevGuest, fake: FakeSevGuest) -> None:
    fake.certificates = table((CertificateKind.CRL, b"c"))
    fake.faults = [None, Fault(errno.EIO, vmm=INVALID_LEN)]
    assert device_error(DeviceError, device) == ("ghcb", "SNP_GET_EXT_REPORT", INVALID_LEN)
    assert len(fake.asked) == 2
    assert not fake.key_lost


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_length_the_kernel_itself_refuses_is_not_asked_for(node: Path, clock: Clock, fake: FakeSevGuest, code: int) -> None:
    """The hypervisor chooses the number; Linux 5.19 tells it with ENOSPC."""

    def ioctl(descriptor: int, number: int, argument: bytearray) -> int:
        try:
            return fake.ioctl(descriptor, number, argument)
        except OSError as exc:
            raise OSError(code, "") from exc

    fake.certificates = bytes(0x4001)
    error = refused(MalformedEvidenceError, SevGuest(node, node.with_name("vmpl"), ioctl, clock.now, clock.wait))
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.got, error.expected) == (EvidenceFormat.SNP_CHAIN, 0x5000, 0x4000)
    assert len(fake.asked) == 1


def test_a_broken_table_stops(device: SevGuest, fake: FakeSevGuest) -> None:
    fake.certificates = b"x" * 4096
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert error.format is EvidenceFormat.SNP_CHAIN


@pytest.mark.parametrize("vmpl", [0, 1, 2, 3])
def test_a_guest_asks_for_its_own_privilege_level(device: SevGuest, fake: FakeSevGuest, node: Path, vmpl: int) -> None:
    fake.vmpl = vmpl
    node.with_name("vmpl").write_text(f"{vmpl}\n")
    assert parse_report(device.collect(DATA).report).vmpl == vmpl


def test_a_privilege_level_below_the_guests_is_a_firmware_status(device: SevGuest, fake: FakeSevGuest) -> None:
    """Where the kernel does not tell the level, before 6.11."""
    fake.vmpl = 1
    assert device_error(DeviceError, device) == ("sev-firmware", "SNP_GET_EXT_REPORT", INVALID_PARAM)
    assert not fake.key_lost


@pytest.mark.parametrize("text", [b"", b"4\n", b"-1\n", b"0x1\n", b"1" * 20])
def test_a_privilege_level_that_is_none_is_refused(device: SevGuest, fake: FakeSevGuest, node: Path, text: bytes) -> None:
    node.with_name("vmpl").write_bytes(text)
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert error.field == "vmpl"
    assert fake.asked == []


# --- what goes wrong --------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Fault, type[DeviceError], tuple[str, int]]] = {
    "bad-request": (Fault(errno.EINVAL, 0xFF), DeviceError, ("sev-guest", errno.EINVAL)),
    "bad-address": (Fault(errno.EFAULT, 0xFF), DeviceError, ("sev-guest", errno.EFAULT)),
    "no-memory": (Fault(errno.ENOMEM, 0xFF), DeviceError, ("sev-guest", errno.ENOMEM)),
    "not-root": (Fault(errno.EPERM, 0xFF), DeviceError, ("sev-guest", errno.EPERM)),
    "firmware-not-called": (Fault(errno.EIO, 0xFFFF_FFFF), AttestationKeyLostError, ("sev-guest", errno.EIO)),
    "driver-default": (Fault(errno.EIO, 0xFF), AttestationKeyLostError, ("sev-guest", errno.EIO)),
    "firmware-invalid-key": (Fault(errno.EIO, 0x27), AttestationKeyLostError, ("sev-firmware", 0x27)),
    "firmware-aead-oflow": (Fault(errno.EIO, 0x1D), AttestationKeyLostError, ("sev-firmware", 0x1D)),
    "vmm-busy": (Fault(errno.EIO, 0, BUSY), AttestationKeyLostError, ("ghcb", BUSY)),
    "vmm-generic": (Fault(errno.EIO, 0, 1 << 31), AttestationKeyLostError, ("ghcb", 1 << 31)),
    "throttled-for-a-minute": (Fault(errno.ETIMEDOUT, 0, BUSY), AttestationKeyLostError, ("sev-guest", errno.ETIMEDOUT)),
    "does-not-decrypt": (Fault(errno.EBADMSG), AttestationKeyLostError, ("sev-guest", errno.EBADMSG)),
    "key-lost-before": (Fault(errno.ENOTTY, 0xFF), AttestationKeyLostError, ("sev-guest", errno.ENOTTY)),
    "status-invalid-param": (Fault(status=INVALID_PARAM), DeviceError, ("sev-firmware", INVALID_PARAM)),
    "status-unsupported": (Fault(status=0x15), DeviceError, ("sev-firmware", 0x15)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("certificates", [False, True])
def test_what_a_failure_means_and_that_it_is_never_asked_again(
    device: SevGuest, fake: FakeSevGuest, name: str, certificates: bool
) -> None:
    """In the first request of a guest, and in the one that brings the certificates."""
    fault, kind, (interface, code) = FAULTS[name]
    fake.faults = [fault]
    if certificates:
        fake.certificates = table((CertificateKind.CRL, b"c"))
        fake.faults.insert(0, None)
    assert device_error(kind, device) == (interface, "SNP_GET_EXT_REPORT", code)
    assert len(fake.asked) == 1 + certificates


def test_a_key_that_was_lost_stays_lost_and_costs_the_firmware_nothing(device: SevGuest, fake: FakeSevGuest) -> None:
    fake.faults = [Fault(errno.EIO, 0, BUSY)]
    refused(AttestationKeyLostError, device)
    assert device_error(AttestationKeyLostError, device) == ("sev-guest", "SNP_GET_EXT_REPORT", errno.ENOTTY)
    assert len(fake.asked) == 1


def test_what_the_kernel_left_in_the_argument_counts_only_after_eio(device: SevGuest, fake: FakeSevGuest) -> None:
    fake.faults = [Fault(errno.EINVAL, 0x27, BUSY)]
    assert device_error(DeviceError, device) == ("sev-guest", "SNP_GET_EXT_REPORT", errno.EINVAL)


def test_a_report_over_other_data_is_refused(device: SevGuest, fake: FakeSevGuest) -> None:
    made = fake.make(OTHER, 0)
    fake.make = lambda _data, _vmpl: made
    refused(EvidenceBindingError, device)


RESPONSES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "size-0": (lambda r: struct.pack("<II24x", 0, 0) + r, "response_size"),
    "size-too-large": (lambda r: struct.pack("<II24x", 0, 4000) + r, "response_size"),
    "reserved": (lambda r: struct.pack("<II24s", 0, 1184, b"x") + r, "response_reserved"),
    "nothing": (lambda _: b"", "response_size"),
    "no-report": (lambda _: struct.pack("<II24x", 0, 1184), "version"),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_that_is_none_is_refused(device: SevGuest, fake: FakeSevGuest, name: str) -> None:
    change, where = RESPONSES[name]
    fake.response = change(fake.make(DATA, 0))
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.field) == (EvidenceFormat.SNP_REPORT, where)


# --- distance and bound -----------------------------------------------------------------------------------------------


def test_requests_keep_their_distance(device: SevGuest, clock: Clock, fake: FakeSevGuest) -> None:
    fake.certificates = table((CertificateKind.CRL, b"c"))
    device.collect(DATA)
    assert clock.pauses == [REQUEST_DISTANCE_S]
    clock.time += 0.5
    device.collect(DATA)
    assert clock.pauses[1:] == [REQUEST_DISTANCE_S - 0.5]
    clock.time += REQUEST_DISTANCE_S
    device.collect(DATA)
    assert len(clock.pauses) == 2


def test_a_request_that_failed_keeps_the_next_one_at_a_distance(device: SevGuest, clock: Clock, fake: FakeSevGuest) -> None:
    fake.faults = [Fault(errno.EINVAL)]
    refused(DeviceError, device)
    device.collect(DATA)
    assert clock.pauses == [REQUEST_DISTANCE_S]


def test_nothing_more_is_asked_when_nobody_wants_the_answer(device: SevGuest, clock: Clock, fake: FakeSevGuest) -> None:
    fake.certificates = table((CertificateKind.CRL, b"c"))
    clock.wanted = False
    assert device_error(DeviceError, device) == ("sev-guest", "SNP_GET_EXT_REPORT", errno.ECANCELED)
    assert len(fake.asked) == 1


def test_the_requests_of_a_boot_are_bounded(device: SevGuest, fake: FakeSevGuest) -> None:
    for _ in range(MAX_REQUESTS):
        device.collect(DATA)
    assert device_error(DeviceError, device) == ("sev-guest", "request-limit", MAX_REQUESTS)
    assert len(fake.asked) == MAX_REQUESTS


# --- the node ---------------------------------------------------------------------------------------------------------


def test_the_node_is_where_the_kernel_has_it() -> None:
    assert Path("/dev/sev-guest") == DEVICE


def test_a_guest_without_the_node_has_no_attester(tmp_path: Path, fake: FakeSevGuest) -> None:
    with pytest.raises(NoAttesterError) as caught:
        SevGuest(tmp_path / "none", ioctl=fake.ioctl)
    assert caught.value.attester == "snp"


def test_a_node_that_goes_away_later_is_no_attester(device: SevGuest, node: Path) -> None:
    node.unlink()
    with pytest.raises(NoAttesterError):
        device.collect(DATA)


def test_a_node_that_cannot_be_opened_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        SevGuest(tmp_path)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("sev-guest", "open", errno.EISDIR)


def test_opening_asks_nothing_and_leaves_no_descriptor(device: SevGuest, fake: FakeSevGuest) -> None:
    before = os.listdir("/proc/self/fd")
    assert fake.asked == []
    device.collect(DATA)
    fake.faults = [Fault(errno.EINVAL)]
    refused(DeviceError, device)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_is_no_device_answers_the_real_system_call_with_enotty(node: Path) -> None:
    assert device_error(AttestationKeyLostError, SevGuest(node, node.with_name("vmpl")))[2] == errno.ENOTTY


# --- through the system call ------------------------------------------------------------------------------------------


def test_evidence_and_certificates_come_through_the_real_ioctl(
    fake: FakeSevGuest, clock: Clock, node: Path, machine: SimulatedMachine
) -> None:
    """An errno does not keep the length of the certificates back, which the kernel writes behind a pointer."""
    fake.certificates = chain_table(machine)
    with fuse_node(node, fake) as path:
        device = SevGuest(path, node.with_name("vmpl"), now=clock.now, wait=clock.wait)
        evidence = device.collect(DATA)
    assert parse_report(evidence.report).report_data == DATA
    assert evidence.cert_chain == machine.attester().collect(DATA).cert_chain


def test_a_busy_hypervisor_is_told_through_the_real_ioctl(fake: FakeSevGuest, clock: Clock, node: Path) -> None:
    """Nor what the kernel writes into the argument itself."""
    fake.faults = [Fault(errno.EIO, 0, BUSY)]
    with fuse_node(node, fake) as path:
        device = SevGuest(path, node.with_name("vmpl"), now=clock.now, wait=clock.wait)
        assert device_error(AttestationKeyLostError, device) == ("ghcb", "SNP_GET_EXT_REPORT", BUSY)
        assert device_error(AttestationKeyLostError, device)[2] == errno.ENOTTY


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_requests_lie_as_the_kernels_header_has_them() -> None:
    """include/uapi/linux/sev-guest.h, compiled for x86-64: 32, 96 and 112 bytes."""
    argument = pack_guest_request(0x1122334455667788, 0x99AABBCCDDEEFF00)
    assert bytes(argument) == bytes.fromhex("01" + "00" * 7 + "8877665544332211" + "00ffeeddccbbaa99" + "00" * 8)
    assert pack_report_request(DATA, 3) == DATA + b"\3" + bytes(31)
    extended = pack_ext_report_request(DATA, 1, 0x10, 0x2000)
    assert extended == DATA + b"\1" + bytes(31) + b"\x10" + bytes(7) + b"\0\x20\0\0" + bytes(4)
    assert parse_certificates_bytes(extended) == 0x2000
    assert (len(argument), len(argument)) == (SNP_GET_REPORT >> 16 & 0x3FFF, SNP_GET_EXT_REPORT >> 16 & 0x3FFF)


def test_exit_info_is_two_words() -> None:
    argument = pack_guest_request(1, 2)
    argument[24:] = struct.pack("<Q", 0x0000_0001_0000_0016)
    assert parse_exit_info(argument) == (0x16, 1)


@pytest.mark.parametrize("length", [0, REPORT_RESPONSE_BYTES - 1, REPORT_RESPONSE_BYTES + 1])
def test_a_response_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(MalformedEvidenceError) as caught:
        parse_report_response(bytes(length))
    assert (caught.value.got, caught.value.expected) == (length, REPORT_RESPONSE_BYTES)


@pytest.mark.parametrize("length", [0, 1, 4095, 0x4001, 0x5000, 0xFFFF_F000])
def test_a_certificate_length_that_no_kernel_takes_is_refused(length: int) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_certificates_bytes(pack_ext_report_request(DATA, 0, 0, length))
