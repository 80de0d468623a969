import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import (
    Absence,
    AgentError,
    DeviceError,
    DeviceUnavailableError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
    Owner,
)
from agent.evidence import NO_REPORT_DATA, Evidence, ReportData, Tee
from agent.evidence.cpu import TDX_PATIENCE
from agent.evidence.tdx_abi import pack_tdreport
from agent.evidence.tdx_guest import (
    ATTEST_CONF,
    DEVICE,
    QUOTE_DEADLINE_S,
    TDX_CMD_GET_REPORT0,
    TdxGuest,
    connect_to_host,
    read_port,
)
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_td_report
from tests.fake_fuse_node import fuse_node
from tests.fake_nodes import FakeQgs, FakeTdxGuest, answer, quote_answer
from tests.quotes import quote, tdreport
from tests.shared import shared_data

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(reversed(DATA)))
REQUESTS = len(TDX_PATIENCE.pauses_s) + 1
PORT = 4050


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with the node and the configuration of an image."""
    (tmp_path / "tdx_guest").touch()
    (tmp_path / "conf").write_text(f"# quote service\nport = {PORT}\n")
    return tmp_path


@pytest.fixture
def module() -> FakeTdxGuest:
    return FakeTdxGuest()


@pytest.fixture
def qgs() -> Iterator[FakeQgs]:
    service = FakeQgs()
    yield service
    service.close()


def opened(places: Path, module: FakeTdxGuest, qgs: FakeQgs, deadline_s: float = QUOTE_DEADLINE_S) -> TdxGuest:
    patience = replace(TDX_PATIENCE, pause=lambda _: True)
    return TdxGuest(places / "tdx_guest", places / "conf", module.ioctl, qgs.connect, patience, deadline_s)


@pytest.fixture
def device(places: Path, module: FakeTdxGuest, qgs: FakeQgs) -> TdxGuest:
    return opened(places, module, qgs)


def refused(kind: type[AgentError], device: TdxGuest) -> AgentError:
    with pytest.raises(kind) as caught:
        device.collect(DATA)
    assert type(caught.value) is kind
    assert not caught.value.retryable
    assert (caught.value.owner, caught.value.exit_status) == (Owner.HOST, 12)
    return caught.value


def device_error(kind: type[DeviceError], device: TdxGuest) -> tuple[str, str, int]:
    error = refused(kind, device)
    assert isinstance(error, DeviceError)
    return error.interface, error.call, error.code


# --- the report -------------------------------------------------------------------------------------------------------


def test_evidence_is_the_services_quote_over_the_modules_report(device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    assert device.collect(DATA) == Evidence(Tee.TDX, quote(DATA))
    assert (module.asked, qgs.ports) == (1, [PORT])


def test_the_report_itself_can_be_had(device: TdxGuest, qgs: FakeQgs) -> None:
    assert device.report(DATA) == tdreport(DATA)
    assert qgs.ports == []


def test_a_recorded_report_is_one(device: TdxGuest, module: FakeTdxGuest) -> None:
    module.report = shared_data("tdx/tdreport/live.bin").read_bytes()
    data = ReportData(module.report[128:192])
    assert device.report(data) == module.report
    with pytest.raises(EvidenceBindingError):
        device.report(DATA)


def test_mrconfigid_is_the_modules_word_and_no_service_is_asked(
    device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs, machine: SimulatedMachine
) -> None:
    machine.host_data = bytes(range(48))
    module.report = pack_tdreport(make_td_report(machine, NO_REPORT_DATA))
    module.errors = [errno.EBUSY]
    assert device.launch_digest() == bytes(range(48))
    assert (module.asked, qgs.ports) == (2, [])


def test_a_report_that_is_none_says_no_mrconfigid(device: TdxGuest, module: FakeTdxGuest, machine: SimulatedMachine) -> None:
    report = bytearray(pack_tdreport(make_td_report(machine, NO_REPORT_DATA)))
    report[576] ^= 1  # within MRCONFIGID: the digest that the MAC covers no longer fits
    module.report = bytes(report)
    with pytest.raises(MalformedEvidenceError):
        device.launch_digest()


def test_the_number_of_the_ioctl_is_that_of_a_report() -> None:
    assert 3 << 30 | (64 + 1024) << 16 | ord("T") << 8 | 1 == TDX_CMD_GET_REPORT0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT, errno.ENOTTY, errno.EPERM])
def test_a_device_that_refuses_is_final(device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs, code: int) -> None:
    module.errors = [code] * 9
    assert device_error(DeviceError, device) == ("tdx-guest", "TDX_CMD_GET_REPORT0", code)
    assert (module.asked, qgs.ports) == (1, [])


@pytest.mark.parametrize("code", [errno.EINTR, errno.EBUSY, errno.EIO, errno.ENOMEM])
def test_a_device_that_cannot_answer_now_is_asked_again(device: TdxGuest, module: FakeTdxGuest, code: int) -> None:
    module.errors = [code] * (REQUESTS - 1)
    assert device.collect(DATA).report == quote(DATA)
    module.errors = [code] * 9
    module.asked = 0
    assert device_error(DeviceUnavailableError, device) == ("tdx-guest", "TDX_CMD_GET_REPORT0", code)
    assert module.asked == REQUESTS


def test_a_report_over_other_data_is_refused(device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    module.report = tdreport(OTHER)
    error = refused(EvidenceBindingError, device)
    assert isinstance(error, EvidenceBindingError)
    assert (error.format, qgs.ports) == (EvidenceFormat.TDX_REPORT, [])


def test_a_report_of_another_type_is_refused(device: TdxGuest, module: FakeTdxGuest) -> None:
    module.report = bytes(1024)
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.field) == (EvidenceFormat.TDX_REPORT, "type")


def test_a_report_comes_through_the_real_ioctl(places: Path, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    """1088 bytes: more than the interpreter copies by itself."""
    with fuse_node(places / "tdx_guest", module) as path:
        device = TdxGuest(path, places / "conf", connect=qgs.connect)
        assert device.report(DATA) == tdreport(DATA)
        assert device.collect(DATA).report == quote(DATA)


# --- the service ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1, 5, 4096])
def test_an_answer_may_come_in_pieces(places: Path, module: FakeTdxGuest, piece_bytes: int) -> None:
    qgs = FakeQgs(piece_bytes=piece_bytes)
    try:
        assert opened(places, module, qgs).collect(DATA).report == quote(DATA)
    finally:
        qgs.close()


UNAVAILABLE: dict[str, tuple[bytes | OSError, str, int]] = {
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, ""), "exchange", errno.ECONNREFUSED),
    "no-transport": (OSError(errno.ENODEV, ""), "exchange", errno.ENODEV),
    "no-host": (OSError(errno.ETIMEDOUT, ""), "exchange", errno.ETIMEDOUT),
    "slow-connect": (TimeoutError("timed out"), "exchange", errno.ETIMEDOUT),
    "hung-up": (b"", "exchange", errno.ECONNRESET),
    "hung-up-in-the-length": (b"\0\0", "exchange", errno.ECONNRESET),
    "hung-up-in-the-answer": (quote_answer(quote(DATA))[:-1], "exchange", errno.ECONNRESET),
    "empty-quote": (quote_answer(b""), "GET_QUOTE", errno.ENODATA),
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_service_that_cannot_answer_now_is_asked_again_with_a_new_report(
    device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs, name: str
) -> None:
    given, call, code = UNAVAILABLE[name]
    qgs.answers = [given] * (REQUESTS - 1)
    assert device.collect(DATA).report == quote(DATA)
    qgs.answers = [given] * 9
    module.asked = 0
    assert device_error(DeviceUnavailableError, device) == ("qgs", call, code)
    assert module.asked == REQUESTS


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EACCES, errno.EPERM])
def test_a_service_that_cannot_be_reached_at_all_is_final(device: TdxGuest, qgs: FakeQgs, code: int) -> None:
    qgs.answers = [OSError(code, "")] * 9
    assert device_error(DeviceError, device) == ("qgs", "exchange", code)
    assert len(qgs.ports) == 1


@pytest.mark.parametrize("status", range(0x12001, 0x12008))
def test_an_error_of_the_service_is_told_and_final(device: TdxGuest, qgs: FakeQgs, status: int) -> None:
    qgs.answers = [answer(bytes(8), status)] * 9
    assert device_error(DeviceError, device) == ("qgs", "GET_QUOTE", status)
    assert len(qgs.ports) == 1


@pytest.mark.parametrize("silent", [None, b"\0"])
def test_a_service_that_says_nothing_is_waited_for_until_the_deadline(
    places: Path, module: FakeTdxGuest, qgs: FakeQgs, silent: bytes | None
) -> None:
    device = opened(places, module, qgs, deadline_s=0.1)
    qgs.answers = [silent] * 9
    began = time.monotonic()
    code = device_error(DeviceUnavailableError, device)[2]
    assert code == (errno.ETIMEDOUT if silent is None else errno.ECONNRESET)
    assert time.monotonic() - began < 10


def test_a_service_that_drips_does_not_stretch_the_deadline(places: Path, module: FakeTdxGuest) -> None:
    """Every byte would start a time-out of a single read anew."""
    heard_enough = threading.Event()

    def drip(stream: socket.socket) -> None:
        with stream, suppress(OSError):
            stream.sendall(struct.pack(">I", 5000))
            while not heard_enough.wait(0.02):
                stream.sendall(b"x")

    def connect(_port: int, _timeout_s: float) -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=drip, args=(theirs,)).start()
        return ours

    device = TdxGuest(places / "tdx_guest", places / "conf", module.ioctl, connect, replace(TDX_PATIENCE, pauses_s=()), 0.2)
    began = time.monotonic()
    try:
        assert device_error(DeviceUnavailableError, device) == ("qgs", "exchange", errno.ETIMEDOUT)
    finally:
        heard_enough.set()
    assert time.monotonic() - began < 5


MALFORMED: dict[str, tuple[bytes, str]] = {
    "length-0": (struct.pack(">I", 0), "qgs_length"),
    "length-of-less-than-a-header": (struct.pack(">I", 15), "qgs_length"),
    "length-without-bound": (struct.pack(">I", 0xFFFF_FFFF), "qgs_length"),
    "length-little-endian": (struct.pack("<I", 5000), "qgs_length"),
    "type": (answer(bytes(8), kind=3), "qgs_type"),
    "request": (answer(bytes(8), kind=0), "qgs_type"),
    "major": (answer(bytes(8), major=2), "qgs_version"),
    "minor": (answer(bytes(8), minor=2), "qgs_version"),
    "header-alone": (answer(b""), "qgs_sizes"),
    "size-of-another": (answer(bytes(8))[:12] + struct.pack("<I", 23) + answer(bytes(8))[16:], "qgs_size"),
    "quote-too-long": (answer(struct.pack("<II", 0, 5) + b"1234"), "qgs_sizes"),
    "quote-too-short": (answer(struct.pack("<II", 0, 3) + b"1234"), "qgs_sizes"),
    "sizes-that-overflow": (answer(struct.pack("<II", 0xFFFF_FFFF, 5) + b"1234"), "qgs_sizes"),
    "id-too-long": (answer(struct.pack("<II", 300, 0) + bytes(300)), "qgs_sizes"),
    "not-a-quote": (quote_answer(b"quote" * 1000), "version"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_is_none_is_refused_at_once(device: TdxGuest, qgs: FakeQgs, name: str) -> None:
    given, where = MALFORMED[name]
    qgs.answers = [given] * 9
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.field) == (EvidenceFormat.TDX_QUOTE, where)
    assert len(qgs.ports) == 1


def test_a_quote_over_other_data_is_refused_at_once(device: TdxGuest, qgs: FakeQgs) -> None:
    qgs.answers = [quote_answer(quote(OTHER))]
    refused(EvidenceBindingError, device)
    assert len(qgs.ports) == 1


def test_padding_of_the_service_is_cut_off(device: TdxGuest, qgs: FakeQgs) -> None:
    qgs.answers = [quote_answer(quote(DATA) + bytes(3000))]
    assert device.collect(DATA).report == quote(DATA)


# --- the places -------------------------------------------------------------------------------------------------------


def test_the_places_are_the_kernels_and_intels() -> None:
    assert (Path("/dev/tdx_guest"), Path("/etc/tdx-attest.conf")) == (DEVICE, ATTEST_CONF)


@pytest.mark.parametrize(
    ("text", "port"),
    [("port=4050", 4050), ("# x\n\n port = 65535 # host\nother = 1\n", 65535), ("port = 0\n", 0), ("#port = 1\nport\t=\t2", 2)],
)
def test_the_port_is_read(tmp_path: Path, text: str, port: int) -> None:
    (tmp_path / "conf").write_text(text)
    assert read_port(tmp_path / "conf") == port


@pytest.mark.parametrize(
    "text",
    ["", "# port = 4050\n", "port = 65536\n", "port = -1\n", "port = 40 50\n", "port = 1\nport = 2\n", "ports = 1\n", "\xff"],
)
def test_a_file_without_one_port_names_no_service(places: Path, module: FakeTdxGuest, qgs: FakeQgs, text: str) -> None:
    (places / "conf").write_text(text, encoding="latin-1")
    with pytest.raises(NoAttesterError) as caught:
        opened(places, module, qgs)
    assert (caught.value.attester, caught.value.reason) == ("tdx", Absence.NO_QUOTE_SERVICE)


def test_an_image_without_the_file_names_no_service(places: Path, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    (places / "conf").unlink()
    with pytest.raises(NoAttesterError) as caught:
        opened(places, module, qgs)
    assert caught.value.reason is Absence.NO_QUOTE_SERVICE


def test_a_guest_without_the_node_has_no_attester(places: Path, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    device = opened(places, module, qgs)
    (places / "tdx_guest").unlink()
    with pytest.raises(NoAttesterError) as caught:
        opened(places, module, qgs)
    assert caught.value.reason is Absence.NO_INTERFACE
    with pytest.raises(NoAttesterError):
        device.collect(DATA)


def test_no_descriptor_is_left(device: TdxGuest, module: FakeTdxGuest, qgs: FakeQgs) -> None:
    before = os.listdir("/proc/self/fd")
    device.collect(DATA)
    module.errors, qgs.answers = [errno.EINVAL], [b"", answer(b"")]
    refused(DeviceError, device)
    refused(MalformedEvidenceError, device)
    qgs.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_host_is_reached_over_vsock_or_the_errno_says_why_not() -> None:
    """A machine that is no guest has no host; its kernel may not even have the address family."""
    try:
        connect_to_host(1, 1.0).close()
    except OSError as exc:
        assert exc.errno or isinstance(exc, TimeoutError)
