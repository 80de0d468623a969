"""`/dev/sev-guest` and `/dev/tdx_guest` as the kernel has them, below the system call; and a host's quote service.

A fake takes what `fcntl.ioctl` takes: a descriptor, a number, an argument that it changes, in which addresses of this process
stand. It follows Linux 6.12 with its own layouts and none of ours. `fake_fuse_node.py` puts the same fakes behind a real node.
"""

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.quotes import quote, tdreport

PAGE_BYTES = 4096
MAX_CERTIFICATES_BYTES = 0x4000
RESPONSE_BYTES = 4000
MAX_VMPL = 3
INVALID_PARAM = 0x16
INVALID_LEN = 1

_ARGUMENT = struct.Struct("<B7xQQQ")  # msg_version, req_data, resp_data, exitinfo2
_REQUEST = struct.Struct("<64sI28s")
_EXT_REQUEST = struct.Struct("<64sI28sQII")
_NO_ANSWER_YET = 0xFF  # exitinfo2 before anybody was asked
_KEY_SURVIVES = (errno.EINVAL, errno.ENOMEM, errno.EFAULT)  # nobody was asked

ReadMemory = Callable[[int, int], bytes]
WriteMemory = Callable[[int, bytes], object]


def _write_own(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


@dataclass(frozen=True)
class Fault:
    """How the next request ends: an errno, and what firmware and hypervisor said; with errno 0 a status of the firmware."""

    code: int = 0
    firmware: int = 0
    vmm: int = 0
    status: int = 0


@dataclass
class FakeSevGuest:
    """The driver of `/dev/sev-guest`, a hypervisor and a firmware.

    Attributes:
        make: the firmware's report over 64 bytes at a privilege level.
        certificates: what the host supplies, empty for nothing.
        vmpl: the level of the guest.
        faults: used up from the front, one for each request to the firmware; None is none.
        response: given out instead of the firmware's.
        asked: numbers and certificate lengths of what reached the hypervisor.
        key_lost: the kernel has given up the key.
    """

    make: Callable[[bytes, int], bytes]
    certificates: bytes = b""
    vmpl: int = 0
    faults: list[Fault | None] = field(default_factory=list)
    response: bytes | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)
    key_lost: bool = False
    read: ReadMemory = ctypes.string_at
    write: WriteMemory = _write_own

    def ioctl(self, descriptor: int, number: int, argument: bytearray) -> int:
        os.fstat(descriptor)  # EBADF
        assert len(argument) == _ARGUMENT.size, "the kernel would read and write beyond it"
        version, request, response, given = _ARGUMENT.unpack(argument)
        assert given == 0, "what stays in it after a success is the caller's own"
        if version != 1:
            raise OSError(errno.EINVAL, "")
        exit_info = _NO_ANSWER_YET
        try:
            if self.key_lost or number not in (0xC0205300, 0xC0205302):
                raise OSError(errno.ENOTTY, "")
            if not request or not response:
                raise OSError(errno.EINVAL, "")
            exit_info = self._report(number, request, response)
        except _GuestError as exc:
            exit_info = exc.firmware | exc.vmm << 32
            raise
        finally:
            if exit_info:
                argument[24:] = struct.pack("<Q", exit_info)
        return 0

    def _report(self, number: int, request: int, response: int) -> int:
        address = length = 0
        if number == 0xC0205302:
            data, vmpl, zero, address, length, _ = _EXT_REQUEST.unpack(self.read(request, _EXT_REQUEST.size))
        else:
            data, vmpl, zero = _REQUEST.unpack(self.read(request, _REQUEST.size))
        assert not any(zero)
        pages = 0
        if address and length:
            if length > MAX_CERTIFICATES_BYTES or length % PAGE_BYTES:
                raise OSError(errno.EINVAL, "")
            pages = length // PAGE_BYTES
        self.asked.append((number, length))

        fault = self.faults.pop(0) if self.faults else None
        if fault and fault.code:
            if fault.vmm != INVALID_LEN and fault.code not in _KEY_SURVIVES:
                self.key_lost = True
            raise _GuestError(fault.code, fault.firmware, fault.vmm)
        needed = -(-len(self.certificates) // PAGE_BYTES)
        if number == 0xC0205302 and needed > pages:
            self.write(request + 104, struct.pack("<I", needed * PAGE_BYTES))
            raise _GuestError(errno.EIO, 0, INVALID_LEN)
        if pages:
            self.write(address, self.certificates.ljust(length, b"\0"))
        status = fault.status if fault else INVALID_PARAM if not self.vmpl <= vmpl <= MAX_VMPL else 0
        report = b"" if status else self.make(data, vmpl)
        answer = struct.pack("<II24x", status, len(report)) + report
        self.write(response, (answer if self.response is None else self.response).ljust(RESPONSE_BYTES, b"\0"))
        return 0


class _GuestError(OSError):
    """What a request ends with that reached the hypervisor."""

    def __init__(self, code: int, firmware: int, vmm: int) -> None:
        super().__init__(code, "")
        self.firmware = firmware
        self.vmm = vmm


@dataclass
class FakeTdxGuest:
    """The driver of `/dev/tdx_guest` and a TDX module.

    Attributes:
        errors: used up from the front, one for each request.
        report: given out instead of the module's.
        asked: how many requests there were.
    """

    errors: list[int] = field(default_factory=list)
    report: bytes | None = None
    asked: int = 0

    def ioctl(self, descriptor: int, number: int, argument: bytearray) -> int:
        os.fstat(descriptor)
        if number != 0xC4405401:
            raise OSError(errno.ENOTTY, "")
        assert len(argument) == 64 + 1024
        self.asked += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "")
        argument[64:] = tdreport(bytes(argument[:64])) if self.report is None else self.report
        return 0


# --- the host's quote service -----------------------------------------------------------------------------------------

_MESSAGE = struct.Struct("<HHIII")  # major, minor, type, size, error
_ERROR_INVALID_SIZE = 0x12006


def answer(body: bytes, error: int = 0, kind: int = 1, major: int = 1, minor: int = 0) -> bytes:
    """A frame of a quote service."""
    message = _MESSAGE.pack(major, minor, kind, _MESSAGE.size + len(body), error) + body
    return struct.pack(">I", len(message)) + message


def quote_answer(made: bytes, selected_id: bytes = b"", minor: int = 0) -> bytes:
    return answer(struct.pack("<II", len(selected_id), len(made)) + selected_id + made, minor=minor)


class FakeQgs:
    """A quote service behind `connect`, one thread for each connection.

    Attributes:
        answers: what the next connections end with, used up from the front: bytes are sent as they are and then the connection
            ends, an OSError is raised by `connect`, None is silence. When there are none, the answer is a quote.
        ports: which were connected to.
    """

    def __init__(self, answers: list[bytes | OSError | None] | None = None, piece_bytes: int = 1 << 20) -> None:
        self.answers = answers or []
        self.ports: list[int] = []
        self._piece_bytes = piece_bytes
        self._silence = threading.Event()
        self._threads: list[threading.Thread] = []

    def connect(self, port: int, timeout_s: float) -> socket.socket:
        assert timeout_s > 0
        self.ports.append(port)
        given: list[bytes | OSError | None] = [self.answers.pop(0)] if self.answers else []
        if given and isinstance(given[0], OSError):
            raise given[0]
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(theirs, given))
        thread.start()
        self._threads.append(thread)
        return ours

    def close(self) -> None:
        self._silence.set()
        for thread in self._threads:
            thread.join(10)

    def _serve(self, stream: socket.socket, given: list[bytes | OSError | None]) -> None:
        with stream, stream.makefile("rb") as lines:
            frame = lines.read(struct.unpack(">I", lines.read(4))[0])
            send = self._quote(frame)
            if given and given[0] is None:
                self._silence.wait(10)
                return
            if given and isinstance(given[0], bytes):
                send = given[0]
            for start in range(0, len(send), self._piece_bytes):
                try:
                    stream.sendall(send[start : start + self._piece_bytes])
                except OSError:  # the guest has heard enough
                    return

    def _quote(self, message: bytes) -> bytes:
        major, minor, kind, size, error = _MESSAGE.unpack_from(message)
        report_bytes, list_bytes = struct.unpack_from("<II", message, _MESSAGE.size)
        fits = (major, kind, size, error, report_bytes, list_bytes) == (1, 0, len(message), 0, 1024, 0)
        if not fits or len(message) != _MESSAGE.size + 8 + 1024:
            return answer(bytes(8), _ERROR_INVALID_SIZE)
        report = message[-1024:]
        return quote_answer(quote(report[128:192]), bytes(16), minor)
