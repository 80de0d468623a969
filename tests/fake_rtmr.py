"""The file of a runtime register like the kernel's, without a TEE, behind /dev/fuse (`fuse.py`).

Source: Linux 6.16, drivers/virt/coco/guest/tsm-mr.c: one write of exactly 48 bytes at the start extends, anything else is
EINVAL; a read gives the register as it is now.
"""

import contextlib
import errno
import hashlib
import os
import pickle
import select
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fuse import (
    FOPEN_DIRECT_IO,
    IN_HEADER,
    MAX_WRITE_BYTES,
    NO_REPLY,
    PAGE_BYTES,
    ROOT_NODE,
    Op,
    pack_attributes,
    pack_init,
    reply,
    served,
)

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
    value, faults = bytes(_BYTES), RtmrFaults()
    poll = select.poll()
    poll.register(device, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        if control.fileno() in [descriptor for descriptor, _ in poll.poll()]:
            message = control.recv(1 << 16)
            if not message:
                return
            faults = pickle.loads(message)
            continue
        request = os.read(device, MAX_WRITE_BYTES + PAGE_BYTES)
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        if opcode in NO_REPLY:
            continue
        if opcode in (Op.READ, Op.WRITE):
            _, offset, size = struct.unpack_from("<QQI", body)
        match opcode:
            case Op.INIT:
                reply(device, unique, pack_init())
            case Op.GETATTR | Op.SETATTR:
                reply(device, unique, bytes(16) + pack_attributes(ROOT_NODE, _BYTES, stat.S_IFREG | 0o644))
            case Op.OPEN:
                reply(device, unique, struct.pack("<QII", 0, FOPEN_DIRECT_IO, 0))
            case Op.READ:
                reply(device, unique, value[offset : offset + size])
            case Op.WRITE if faults.code or offset or size != _BYTES:
                reply(device, unique, b"", faults.code or errno.EINVAL)
            case Op.WRITE if faults.interrupted:
                faults = replace(faults, interrupted=faults.interrupted - 1)
                reply(device, unique, b"", errno.EINTR)
            case Op.WRITE:
                for digest in (*(() if faults.lost else (body[_TRANSFER_BYTES:],)), *faults.intruders):
                    value = hashlib.sha384(value + digest).digest()
                reply(device, unique, struct.pack("<II", size, 0))
            case Op.FLUSH | Op.RELEASE:
                reply(device, unique, b"")
            case _:
                reply(device, unique, b"", errno.ENOSYS)
