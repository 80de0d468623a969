"""The file of a runtime register like the kernel's, without a TEE, behind /dev/fuse (`fuse.py`).

Source: Linux 6.16, drivers/virt/coco/guest/tsm-mr.c: one write of exactly 48 bytes at the start extends, anything else is
EINVAL; a read gives the register as it is now.
"""

import contextlib
import errno
import hashlib
import pickle
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.sim.fuse import (
    FOPEN_DIRECT_IO,
    IN_HEADER,
    NO_REPLY,
    ROOT_NODE,
    Op,
    pack_attributes,
    pack_init,
    reply,
    serve,
)
from tests.fuse import served

_BYTES = 48
_TRANSFER_BYTES = 40  # fuse_read_in and fuse_write_in; both begin with handle, offset, size


@dataclass(frozen=True)
class RtmrFaults:
    """What is wrong from now on.

    Attributes:
        code: every extension fails with this errno.
        interrupted: so many extensions are interrupted by a signal before they reach the TDX module.
        lost: extensions are taken and do nothing.
        intruders: somebody else extends by these, between ours and the next read.
    """

    code: int = 0
    interrupted: int = 0
    lost: bool = False
    intruders: tuple[bytes, ...] = ()


@contextlib.contextmanager
def fake_rtmr(file: Path) -> Iterator[tuple[Path, socket.socket]]:
    """A register in place of the empty `file`: its path in this process, and where `set_faults` goes. Or a skip."""
    with served(file, _serve) as (path, control):
        yield path, control


def set_faults(control: socket.socket, faults: RtmrFaults) -> None:
    control.send(pickle.dumps(faults))


def _serve(device: int, control: socket.socket) -> None:
    server = _Server(device, control)
    serve(device, server.answer, control.fileno(), server.on_control)


@dataclass
class _Server:
    device: int
    control: socket.socket
    value: bytes = bytes(_BYTES)
    faults: RtmrFaults = field(default_factory=RtmrFaults)

    def on_control(self) -> bool:
        message = self.control.recv(1 << 16)
        if message:
            self.faults = pickle.loads(message)
        return bool(message)

    def answer(self, request: bytes) -> None:
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        if opcode in NO_REPLY:
            return
        try:
            reply(self.device, unique, self._do(opcode, request[IN_HEADER.size :]))
        except OSError as exc:
            reply(self.device, unique, b"", exc.errno or errno.EIO)

    def _do(self, opcode: int, body: bytes) -> bytes:
        match opcode:
            case Op.INIT:
                return pack_init()
            case Op.GETATTR | Op.SETATTR:
                return bytes(16) + pack_attributes(ROOT_NODE, _BYTES, stat.S_IFREG | 0o644)
            case Op.OPEN:
                return struct.pack("<QII", 0, FOPEN_DIRECT_IO, 0)
            case Op.READ:
                _, offset, size = struct.unpack_from("<QQI", body)
                return self.value[offset : offset + size]
            case Op.WRITE:
                _, offset, size = struct.unpack_from("<QQI", body)
                self._extend(offset, body[_TRANSFER_BYTES:])
                return struct.pack("<II", size, 0)
            case Op.FLUSH | Op.RELEASE:
                return b""
        raise OSError(errno.ENOSYS, "")

    def _extend(self, offset: int, digest: bytes) -> None:
        faults = self.faults
        if faults.code or offset or len(digest) != _BYTES:
            raise OSError(faults.code or errno.EINVAL, "")
        if faults.interrupted:
            self.faults = replace(faults, interrupted=faults.interrupted - 1)
            raise OSError(errno.EINTR, "")
        for each in (*(() if faults.lost else (digest,)), *faults.intruders):
            self.value = hashlib.sha384(self.value + each).digest()
