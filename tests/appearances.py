"""Every name that ever appears in a folder, however briefly. Follows inotify(7)."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CREATE, _MOVED_TO, _OVERFLOW = 0x100, 0x80, 0x4000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name


@contextmanager
def appearing(folder: Path) -> Iterator[set[str]]:
    """The set is filled when the block has ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    names: set[str] = set()
    try:
        if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(folder), _CREATE | _MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        try:
            yield names
        finally:
            _read(fd, names)
    finally:
        os.close(fd)


def _read(fd: int, names: set[str]) -> None:
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            assert not mask & _OVERFLOW
            names.add(data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode())
            data = data[_EVENT.size + length :]
