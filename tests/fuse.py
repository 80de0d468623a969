"""The protocol of /dev/fuse as far as fakes need it: include/uapi/linux/fuse.h.

A server lives in a child process with a mount namespace of its own, and is reached through `/proc/PID/root`: no mount of it is
ever seen by another process, and its end, which also a deadline brings, fails every request that still waits.
"""

import contextlib
import ctypes
import enum
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.guest.hardening import die_with_parent
from agent.guest.mounts import enter_private_mount_namespace
from tests.children import IS_ROOT, readable

LIFE_S = 60
PAGE_BYTES = 4096
MAX_WRITE_BYTES = 128 << 10
MAJOR, MINOR = 7, 31
FUSE_ATOMIC_O_TRUNC = 1 << 3
FOPEN_DIRECT_IO = 1 << 0  # sizes are 0: the page cache would read nothing
FOPEN_NONSEEKABLE = 1 << 2
ROOT_NODE = 1


class Op(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42


NO_REPLY = {Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET}
IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, thread, extension, padding
_OUT_HEADER = struct.Struct("<IiQ")

Serve = Callable[[int, socket.socket], None]
"""Answers requests of the device until the other end of the socket is closed."""


@contextlib.contextmanager
def served(mountpoint: Path, serve: Serve) -> Iterator[tuple[Path, socket.socket]]:
    """A mounted server, a folder or a file as the mountpoint is: its path in this process and its socket. Or a skip."""
    if not IS_ROOT:
        pytest.skip("mounting FUSE needs root")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this machine has no /dev/fuse")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            die_with_parent(parent)
            signal.alarm(LIFE_S)
            device = _mount(mountpoint)
            theirs.send(b"mounted")
            serve(device, theirs)
        finally:
            os._exit(1)
    theirs.close()
    try:
        assert readable(ours.fileno()) and ours.recv(16), "the fake does not start"
        yield Path(f"/proc/{pid}/root{mountpoint}"), ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()


def _mount(mountpoint: Path) -> int:
    enter_private_mount_namespace()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    kind = stat.S_IFDIR if mountpoint.is_dir() else stat.S_IFREG
    options = f"fd={device},rootmode={kind:o},user_id={os.geteuid()},group_id={os.getegid()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fake", os.fsencode(mountpoint), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return device


def reply(device: int, unique: int, body: bytes, code: int = 0) -> None:
    os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -code, unique) + body)


def pack_init() -> bytes:
    return struct.pack("<4I2H2I2H8I", MAJOR, MINOR, 0, FUSE_ATOMIC_O_TRUNC, 0, 0, MAX_WRITE_BYTES, 1, 0, 0, *[0] * 8)


def pack_attributes(node: int, size: int, mode: int) -> bytes:
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, os.geteuid(), os.getegid(), 0, PAGE_BYTES, 0)
