"""A file system of our own behind /dev/fuse, as far as simulated devices need one.

Owns the mount and the protocol's frames; what a file system holds and answers is its server's. Our own and no library's,
because it is this short, needs no package of the system, and says what libraries hide: which open file cannot seek, when a file
was released, who was interrupted.

A mount is in a namespace of its server's own: no other process sees it, only `/proc/PID/root` leads there, and it is gone with
the server, however that ends. An ordinary user may have one where the kernel lets him make user namespaces.
Source: Linux, include/uapi/linux/fuse.h, protocol 7.31.
"""

import ctypes
import enum
import os
import select
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from agent.errors import SimulationRefusal, SimulationRefusedError
from agent.guest.mounts import enter_private_mount_namespace

PAGE_BYTES = 4096
MAX_WRITE_BYTES = 128 << 10
MAJOR, MINOR = 7, 31
FUSE_ATOMIC_O_TRUNC = 1 << 3
FOPEN_DIRECT_IO = 1 << 0  # sizes are 0: the page cache would read nothing
FOPEN_NONSEEKABLE = 1 << 2
ROOT_NODE = 1
_CLONE_NEWUSER = 0x10000000  # include/uapi/linux/sched.h


class Op(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKNOD = 8
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
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42


NO_REPLY = {Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET}
IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, thread, extension, padding
_OUT_HEADER = struct.Struct("<IiQ")


def mount(mountpoint: Path) -> int:
    """Leave the mounts that everybody sees, and mount over `mountpoint` there.

    Args:
        mountpoint: a folder, or a file for a file system that is one file.

    Returns:
        The device, from which requests are read.

    Raises:
        SimulationRefusedError: this machine or user has no FUSE.
    """
    try:
        if os.geteuid() != 0:
            _become_root_of_a_namespace()
        enter_private_mount_namespace()
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)  # in the namespace in which it is mounted
        kind = stat.S_IFDIR if mountpoint.is_dir() else stat.S_IFREG
        options = f"fd={device},rootmode={kind:o},user_id={os.geteuid()},group_id={os.getegid()}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"keyturn", os.fsencode(mountpoint), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
    except OSError as exc:
        raise SimulationRefusedError(SimulationRefusal.NO_FUSE) from exc
    return device


def _become_root_of_a_namespace() -> None:
    """A user namespace in which we may mount, and are still ourselves outside."""
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(ctypes.c_int(_CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path("/proc/self", name).write_text(text)


def serve(device: int, answer: Callable[[bytes], None], control: int, on_control: Callable[[], bool]) -> None:
    """Answer one request after the other.

    Args:
        device: of `mount`.
        answer: called with each request, header first.
        control: a descriptor that is looked at before each request, so that what it brings counts for what is asked next.
        on_control: called when there is something to read at it, or its other end is closed; False ends the service.
    """
    poll = select.poll()
    poll.register(device, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if control not in ready:
            answer(os.read(device, MAX_WRITE_BYTES + PAGE_BYTES))
        elif not on_control():
            return


def reply(device: int, unique: int, body: bytes, code: int = 0) -> None:
    """Answer a request: with `body`, or with the errno `code`."""
    os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -code, unique) + body)


def pack_init() -> bytes:
    return struct.pack("<4I2H2I2H8I", MAJOR, MINOR, 0, FUSE_ATOMIC_O_TRUNC, 0, 0, MAX_WRITE_BYTES, 1, 0, 0, *[0] * 8)


def pack_attributes(node: int, size: int, mode: int) -> bytes:
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, os.geteuid(), os.getegid(), 0, PAGE_BYTES, 0)
