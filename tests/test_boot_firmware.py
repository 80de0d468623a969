"""The host's side of the fake TSM, without a guest: its frames, and its server with a test in QEMU's place."""

import contextlib
import datetime
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.cpu import certificate_chain
from agent.evidence.snp_abi import REPORT_BYTES, CertificateKind, parse_certificate_table, parse_report
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import pack_certificate_table
from agent.verify.snp import verify_snp
from tests.boot.firmware import (
    MAX_BLOB_BYTES,
    Answer,
    Firmware,
    FrameError,
    Request,
    pack_answer,
    pack_request,
    parse_answer,
    parse_request,
    request_bytes,
)

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(reversed(DATA)))
DEADLINE_S = 20.0
WORD = st.integers(0, 2**32 - 1)
ANSWER_HEAD_BYTES = 16


class Guest:
    """What QEMU passes on of a guest."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(path))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Answer:
        head = self._read(ANSWER_HEAD_BYTES)
        _, _, report_bytes, auxblob_bytes = struct.unpack("<IIII", head)
        return parse_answer(head + self._read(report_bytes + auxblob_bytes))

    def ask(self, data: ReportData = DATA, sequence: int = 1, privlevel: int = 0) -> Answer:
        self.send(pack_request(Request(sequence, privlevel, data)))
        return self.receive()

    def end(self) -> None:
        """Nothing more comes from us."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def hung_up(self) -> bool:
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:  # it left something of ours unread
            return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            assert chunk, f"the firmware hung up after {len(data)} of {size} bytes"
            data += chunk
        return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tsm"


@pytest.fixture
def firmware(machine: SimulatedMachine, path: Path) -> Iterator[Firmware]:
    with Firmware(path, machine) as firmware:
        yield firmware
    assert not path.exists()


@pytest.fixture
def connect(path: Path) -> Iterator[Callable[[], Guest]]:
    """The next guest; all of them end with the test."""
    with contextlib.ExitStack() as guests:
        yield lambda: guests.enter_context(contextlib.closing(Guest(path)))


@pytest.fixture
def guest(firmware: Firmware, connect: Callable[[], Guest]) -> Guest:
    return connect()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_a_request_lies_as_the_module_writes_it() -> None:
    frame = pack_request(Request(sequence=0x01020304, privlevel=2, report_data=DATA))
    assert frame == bytes.fromhex("48000000 04030201 02000000") + DATA


def test_an_answer_lies_as_the_module_reads_it() -> None:
    frame = pack_answer(Answer(sequence=1, errno=16, report=b"abc", auxblob=b"de"))
    assert frame == bytes.fromhex("01000000 10000000 03000000 02000000") + b"abcde"


@given(WORD, WORD, st.binary(min_size=64, max_size=64))
def test_a_request_is_parsed_to_what_was_packed(sequence: int, privlevel: int, data: bytes) -> None:
    request = Request(sequence, privlevel, ReportData(data))
    assert parse_request(pack_request(request)) == request


@given(WORD, WORD, st.binary(max_size=200), st.binary(max_size=200))
def test_an_answer_is_parsed_to_what_was_packed(sequence: int, code: int, report: bytes, auxblob: bytes) -> None:
    answer = Answer(sequence, code, report, auxblob)
    assert parse_answer(pack_answer(answer)) == answer


@given(st.binary(max_size=100))
def test_any_bytes_are_a_frame_or_a_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert pack_request(parse_request(data)) == data
    with contextlib.suppress(FrameError):
        assert pack_answer(parse_answer(data)) == data


@pytest.mark.parametrize("size", [0, 3, 4, 12, 75, 77])
def test_a_request_of_another_length_is_refused(size: int) -> None:
    frame = (pack_request(Request(1, 0, DATA)) + bytes(1))[:size]
    with pytest.raises(FrameError):
        parse_request(frame)


@pytest.mark.parametrize("length", [0, 71, 73, 2**32 - 1])
def test_a_length_no_request_has_is_refused_before_anything_is_read_of_it(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        request_bytes(struct.pack("<I", length))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(15),
        struct.pack("<IIII", 1, 0, 1, 0),  # less than it says
        struct.pack("<IIII", 1, 0, 0, 0) + b"x",  # more
        struct.pack("<IIII", 1, 0, MAX_BLOB_BYTES + 1, 0) + bytes(MAX_BLOB_BYTES + 1),
        struct.pack("<IIII", 1, 0, 0, MAX_BLOB_BYTES + 1) + bytes(MAX_BLOB_BYTES + 1),
    ],
    ids=["empty", "short", "cut", "long", "report-too-large", "auxblob-too-large"],
)
def test_an_answer_that_is_none_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameError):
        parse_answer(frame)


def test_the_certificate_table_is_one_that_our_parser_takes_leaf_first(machine: SimulatedMachine) -> None:
    evidence = machine.attester().collect(DATA)
    table = pack_certificate_table(evidence)
    kinds = [kind for kind, _ in parse_certificate_table(table)]
    assert kinds == [CertificateKind.VCEK, CertificateKind.ASK, CertificateKind.ARK]
    assert certificate_chain(table) == evidence.cert_chain


# --- the server -------------------------------------------------------------------------------------------------------


def test_the_report_verifies_under_the_simulated_root_with_the_hosts_certificates(
    guest: Guest, machine: SimulatedMachine
) -> None:
    answer = guest.ask(DATA, sequence=7)
    assert (answer.sequence, answer.errno, len(answer.report)) == (7, 0, REPORT_BYTES)
    roots = [x509.load_pem_x509_certificate((machine.roots_dir / "ark.pem").read_bytes())]
    evidence = Evidence(Tee.SNP, answer.report, certificate_chain(answer.auxblob))
    assert verify_snp(evidence, roots, [], datetime.datetime.now(datetime.UTC)).report.report_data == DATA


def test_each_request_of_a_connection_is_answered_and_counted(guest: Guest, firmware: Firmware) -> None:
    for sequence, data in ((1, DATA), (2, OTHER)):
        answer = guest.ask(data, sequence)
        assert (answer.sequence, parse_report(answer.report).report_data) == (sequence, data)
    assert firmware.requests == 2


def test_a_request_may_come_in_pieces_and_two_in_one(guest: Guest, firmware: Firmware) -> None:
    first, second = (pack_request(Request(sequence, 0, DATA)) for sequence in (1, 2))
    guest.send(first[:2])
    time.sleep(0.05)
    assert firmware.requests == 0
    guest.send(first[2:] + second)
    assert [guest.receive().sequence, guest.receive().sequence] == [1, 2]


def test_the_report_names_the_privilege_level_asked_for_and_the_machine_keeps_its_own(
    guest: Guest, machine: SimulatedMachine
) -> None:
    assert parse_report(guest.ask(privlevel=2).report).vmpl == 2
    assert machine.vmpl == 0


def test_the_machine_is_read_again_for_each_request(guest: Guest, machine: SimulatedMachine) -> None:
    machine.host_data = bytes(range(32))
    assert parse_report(guest.ask().report).host_data == bytes(range(32))


def test_an_errno_is_answered_without_a_report_until_it_is_taken_back(guest: Guest, firmware: Firmware) -> None:
    firmware.errno = errno.EBUSY
    assert guest.ask(sequence=3) == Answer(3, errno.EBUSY)
    firmware.errno = 0
    assert guest.ask().errno == 0


def test_the_machines_own_fault_is_answered_as_its_errno(guest: Guest, machine: SimulatedMachine) -> None:
    machine.errno = errno.ENOTTY
    assert guest.ask(sequence=3) == Answer(3, errno.ENOTTY)


def test_an_answer_takes_as_long_as_it_is_told_to(guest: Guest, firmware: Firmware) -> None:
    firmware.delay_s = 0.2
    begin = time.monotonic()
    guest.ask()
    assert time.monotonic() - begin >= 0.2


def test_a_test_sees_each_request_before_its_answer(guest: Guest, firmware: Firmware) -> None:
    seen: list[Request] = []

    def fail_from_now_on(request: Request) -> None:
        seen.append(request)
        firmware.errno = errno.EIO

    firmware.on_request = fail_from_now_on
    assert guest.ask(DATA, sequence=5, privlevel=1).errno == errno.EIO
    assert seen == [Request(5, 1, DATA)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a request of 542393671 bytes"),
        (bytes(76), "a request of 0 bytes"),
        (b"\xff" * 200, "a request of 4294967295 bytes"),
    ],
)
def test_who_does_not_speak_the_protocol_is_hung_up_on_and_the_next_guest_is_served(
    guest: Guest, firmware: Firmware, connect: Callable[[], Guest], data: bytes, reason: str
) -> None:
    guest.send(data)
    assert guest.hung_up()
    assert firmware.broken == [f"{reason} instead of 72"]
    assert firmware.requests == 0
    assert connect().ask().errno == 0


@pytest.mark.parametrize("size", [1, 4, 75])
def test_a_request_that_ends_early_is_none(guest: Guest, firmware: Firmware, size: int) -> None:
    guest.send(pack_request(Request(1, 0, DATA))[:size])
    guest.end()
    assert guest.hung_up()
    assert firmware.broken == [f"a request that ends after {size} bytes"]
    assert firmware.requests == 0


def test_a_guest_that_ends_between_requests_is_no_defect(
    guest: Guest, firmware: Firmware, connect: Callable[[], Guest]
) -> None:
    guest.ask()
    guest.end()
    assert guest.hung_up()
    assert connect().ask().errno == 0
    assert firmware.broken == []


def test_a_guest_that_is_gone_before_its_answer_is_noted_and_the_next_one_served(
    guest: Guest, firmware: Firmware, connect: Callable[[], Guest]
) -> None:
    firmware.delay_s = 0.1
    guest.send(pack_request(Request(1, 0, DATA)))
    guest.close()
    assert connect().ask().errno == 0
    assert [text.split(":")[0] for text in firmware.broken] == ["connection lost"]


# --- its end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [None, 0, 10, 76], ids=["no-guest", "idle", "half-a-request", "before-an-answer"])
def test_it_stops_at_once_whatever_it_waits_for(
    machine: SimulatedMachine, path: Path, connect: Callable[[], Guest], sent: int | None
) -> None:
    firmware = Firmware(path, machine)
    firmware.delay_s = 3600.0
    if sent is not None:
        guest = connect()
        guest.send(pack_request(Request(1, 0, DATA))[:sent])
        wait_until(lambda: firmware.requests == (sent == 76))
    begin = time.monotonic()
    firmware.stop()
    assert time.monotonic() - begin < 5
    assert not path.exists()
    assert "firmware" not in {thread.name for thread in threading.enumerate()}


def test_what_a_tests_own_code_raises_comes_back_from_stop(
    machine: SimulatedMachine, path: Path, connect: Callable[[], Guest]
) -> None:
    firmware = Firmware(path, machine)

    def fail(request: Request) -> None:
        raise AssertionError("not this request")

    firmware.on_request = fail
    guest = connect()
    guest.send(pack_request(Request(1, 0, DATA)))
    assert guest.hung_up()
    with pytest.raises(AssertionError, match="not this request"):
        firmware.stop()
