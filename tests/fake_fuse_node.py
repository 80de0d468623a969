"""A device node with a real system call before the fakes of `fake_nodes.py`: a file of a FUSE server that answers ioctl(2).

FUSE copies an argument of the size that the number tells, in both directions and also with an errno, as drivers do. What the
argument points to the server reads and writes in the caller's memory.
"""

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.sim.fuse import FOPEN_DIRECT_IO, IN_HEADER, NO_REPLY, Op, pack_attributes, pack_init, reply, serve
from tests.children import IS_ROOT
from tests.fake_nodes import FakeSevGuest, FakeTdxGuest
from tests.fuse import served

_IOCTL_IN = struct.Struct("<QIIQII")  # handle, flags, number, address, bytes in, bytes out
_IOCTL_OUT = struct.Struct("<iIII")  # result, flags, and what only unrestricted ioctls use


@contextlib.contextmanager
def fuse_node(mountpoint: Path, fake: FakeSevGuest | FakeTdxGuest) -> Iterator[Path]:
    """The node at a path of this process, or a skip. The fake works in the server's process: what it notes stays there.

    Args:
        mountpoint: a file.
        fake: as it is now.
    """
    if not IS_ROOT:
        pytest.skip("the server reads and writes the caller's memory, which needs root")

    def in_the_child(device: int, control: socket.socket) -> None:
        serve(device, _Server(fake, device).answer, control.fileno(), lambda: False)

    with served(mountpoint, in_the_child) as (node, _):
        yield node


@dataclass
class _Server:
    fake: FakeSevGuest | FakeTdxGuest
    device: int

    def answer(self, request: bytes) -> None:
        _, opcode, unique, _, _, _, thread, _, _ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        match opcode:
            case _ if opcode in NO_REPLY:
                pass
            case Op.INIT:
                reply(self.device, unique, pack_init())
            case Op.GETATTR:
                reply(self.device, unique, bytes(16) + pack_attributes(1, 0, stat.S_IFREG | 0o600))
            case Op.OPEN:
                reply(self.device, unique, struct.pack("<QII", 0, FOPEN_DIRECT_IO, 0))
            case Op.IOCTL:
                reply(self.device, unique, self._ioctl(thread, body))
            case Op.FLUSH | Op.RELEASE:
                reply(self.device, unique, b"")
            case _:
                reply(self.device, unique, b"", errno.ENOSYS)

    def _ioctl(self, thread: int, body: bytes) -> bytes:
        _, _, number, _, _, out_bytes = _IOCTL_IN.unpack_from(body)
        argument = bytearray(body[_IOCTL_IN.size :])
        memory = os.open(f"/proc/{thread}/mem", os.O_RDWR)
        try:
            if isinstance(self.fake, FakeSevGuest):
                self.fake.read = lambda address, size: os.pread(memory, size, address)
                self.fake.write = lambda address, data: os.pwrite(memory, data, address)
            result = self.fake.ioctl(self.device, number, argument)
        except OSError as exc:
            result = -(exc.errno or errno.EIO)
        finally:
            os.close(memory)
        return _IOCTL_OUT.pack(result, 0, 0, 0) + argument[:out_bytes]
