"""The firmware of a machine whose guest is QEMU's: a simulated SEV-SNP chip behind a virtio-serial port.

Owns the host's end of the port; in the guest `fake_tsm/fake_tsm.c` makes the kernel's configfs-tsm ask it, and says what a
request and an answer look like. The chip's keys stay here, as a real chip's do: no program in the guest can sign a report.

    -device virtio-serial-pci -chardev socket,path=PATH,server=off,id=tsm
    -device virtserialport,nr=1,chardev=tsm,name=keyturn.fake-tsm
"""

import dataclasses
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.errors import DeviceError
from agent.evidence import REPORT_DATA_BYTES, ReportData
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import pack_certificate_table

MAX_BLOB_BYTES = 64 << 10
SEND_DEADLINE_S = 10.0
STOP_DEADLINE_S = 10.0

_REQUEST = struct.Struct(f"<III{REPORT_DATA_BYTES}s")  # bytes that follow, sequence, privlevel, inblob
_LENGTH = struct.Struct("<I")
_BODY_BYTES = _REQUEST.size - _LENGTH.size
_ANSWER = struct.Struct("<IIII")  # sequence, errno, bytes of the report, bytes of the auxblob


class FrameError(Exception):
    """The other end does not speak this protocol. Where its next frame begins nobody knows."""


@dataclass(frozen=True, slots=True)
class Request:
    """One report, please.

    Attributes:
        sequence: comes back in the answer.
        privlevel: the VMPL the report is to name.
        report_data: what it is to carry, 64 bytes.
    """

    sequence: int
    privlevel: int
    report_data: ReportData


@dataclass(frozen=True, slots=True)
class Answer:
    """What the read of `outblob` fails with, or 0 and both blobs."""

    sequence: int
    errno: int = 0
    report: bytes = b""
    auxblob: bytes = b""


def pack_request(request: Request) -> bytes:
    return _REQUEST.pack(_BODY_BYTES, request.sequence, request.privlevel, request.report_data)


def request_bytes(data: bytes) -> int:
    """How long the frame is that `data` begins, as soon as `data` says so; what must be there for that before.

    Raises:
        FrameError: no request has this length.
    """
    if len(data) >= _LENGTH.size and _LENGTH.unpack_from(data)[0] != _BODY_BYTES:
        raise FrameError(f"a request of {_LENGTH.unpack_from(data)[0]} bytes instead of {_BODY_BYTES}")
    return _REQUEST.size if len(data) >= _LENGTH.size else _LENGTH.size


def parse_request(frame: bytes) -> Request:
    """The inverse of `pack_request`.

    Raises:
        FrameError: not exactly one request.
    """
    if request_bytes(frame) != len(frame):
        raise FrameError(f"a frame of {len(frame)} bytes")
    _, sequence, privlevel, report_data = _REQUEST.unpack(frame)
    return Request(sequence, privlevel, ReportData(report_data))


def pack_answer(answer: Answer) -> bytes:
    assert max(len(answer.report), len(answer.auxblob)) <= MAX_BLOB_BYTES
    head = _ANSWER.pack(answer.sequence, answer.errno, len(answer.report), len(answer.auxblob))
    return head + answer.report + answer.auxblob


def parse_answer(frame: bytes) -> Answer:
    """The inverse of `pack_answer`: what the module does in C.

    Raises:
        FrameError: not exactly one answer.
    """
    if len(frame) < _ANSWER.size:
        raise FrameError(f"a frame of {len(frame)} bytes")
    sequence, errno, report_bytes, auxblob_bytes = _ANSWER.unpack_from(frame)
    if max(report_bytes, auxblob_bytes) > MAX_BLOB_BYTES or len(frame) != _ANSWER.size + report_bytes + auxblob_bytes:
        raise FrameError(f"blobs of {report_bytes} and {auxblob_bytes} bytes in a frame of {len(frame)} bytes")
    split = _ANSWER.size + report_bytes
    return Answer(sequence, errno, frame[_ANSWER.size : split], frame[split:])


class Firmware:
    """Answers one guest after the other, in a thread of its own, until `stop` or the end of its `with`.

    Attributes:
        requests: how many have come.
        broken: why connections ended otherwise than between two requests.
        delay_s: how long each answer takes from now on.
        errno: what each request fails with from now on, 0 for nothing. The machine's own faults count as well.
        chip: what answers a request, unless `errno` does; the machine at first.
        on_request: called in the thread before each answer; what it raises ends the thread, and `stop` raises it again.
    """

    def __init__(self, path: Path, machine: SimulatedMachine) -> None:
        """Listen and answer from now on.

        Args:
            path: where the Unix socket appears, at most 107 bytes long.
            machine: read again for each request.
        """
        self.requests = 0
        self.broken: list[str] = []
        self.delay_s = 0.0
        self.errno = 0
        self.chip: Callable[[Request], Answer] = self._machine_answer
        self.on_request: Callable[[Request], None] | None = None
        self._machine = machine
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._stopping, self._stop = socket.socketpair()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="firmware", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, also in the middle of an answer, and take the socket away.

        Raises:
            BaseException: what ended the thread before.
        """
        self._stop.close()
        self._thread.join(STOP_DEADLINE_S + SEND_DEADLINE_S)
        assert not self._thread.is_alive()
        for end in (self._listener, self._stopping):
            end.close()
        self._path.unlink(missing_ok=True)
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def answer(self, request: Request) -> Answer:
        """What is said to `request`."""
        return Answer(request.sequence, self.errno) if self.errno else self.chip(request)

    def _machine_answer(self, request: Request) -> Answer:
        """A report's VMPL is the one that was asked for."""
        try:
            evidence = dataclasses.replace(self._machine, vmpl=request.privlevel).attester().collect(request.report_data)
        except DeviceError as error:
            return Answer(request.sequence, error.code)
        return Answer(request.sequence, 0, evidence.report, pack_certificate_table(evidence))

    def _run(self) -> None:
        try:
            while self._readable(self._listener):
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(SEND_DEADLINE_S)
                    self._serve(connection)
        except BaseException as error:
            self._failure = error

    def _serve(self, connection: socket.socket) -> None:
        """Answer until the guest's QEMU ends, or says what is no request."""
        try:
            while frame := self._receive(connection):
                request = parse_request(frame)
                self.requests += 1
                if self.on_request:
                    self.on_request(request)
                if self._wait(self.delay_s):
                    return
                frame = pack_answer(self.answer(request))
                with _connection_errors():
                    connection.sendall(frame)
        except FrameError as error:
            self.broken.append(str(error))

    def _receive(self, connection: socket.socket) -> bytes:
        """The next frame; none when the connection ends before one, or we do."""
        frame = b""
        while missing := request_bytes(frame) - len(frame):
            if not self._readable(connection):
                return b""
            with _connection_errors():
                chunk = connection.recv(missing)
            if not chunk:
                if frame:
                    raise FrameError(f"a request that ends after {len(frame)} bytes")
                return b""
            frame += chunk
        return frame

    def _readable(self, end: socket.socket) -> bool:
        """Wait until `end` has something; False when we are to stop."""
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(self._stopping, select.POLLIN)
        return self._stopping.fileno() not in dict(poll.poll())

    def _wait(self, seconds: float) -> bool:
        """Are we to stop before they have passed?"""
        return bool(select.select([self._stopping], [], [], seconds)[0])


@contextmanager
def _connection_errors() -> Iterator[None]:
    """QEMU ended while we spoke, or its guest does not read: no failure of ours."""
    try:
        yield
    except OSError as error:
        raise FrameError(f"connection lost: {error}") from error
