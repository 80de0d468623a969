"""One part of a plaintext file, mapped for writing: where segments are opened.

Windows are short-lived: a model may have more files than a process may have descriptors, and whoever fills a window of
its own needs no lock. Does not know which files there are or where they lie (`memory.py`). Follows madvise(2).
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from agent.errors import DestinationError, DestinationProblem

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it


_HUGE_BYTES = 2 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def translated() -> Iterator[None]:
    """The kernel's refusal as ours."""
    try:
        yield
    except OSError as error:
        raise DestinationError(DestinationProblem.KERNEL, error.errno or 0) from error


class Window:
    """One part of a file, mapped for writing; offsets are the file's. Leave the `with` block before sealing.

    It is kept out of core files. Writing a page that `populate` did not make may end the process (SIGBUS).
    """

    def __init__(self, fd: int, offset: int, length: int) -> None:
        """Of `length` bytes from `offset`, perhaps none, mapped when that is asked for. The descriptor is the window's now."""
        self._fd = fd
        # Of huge pages that lie in the mapping only in part each small page would be mapped by a fault of its own.
        self._start = offset - offset % _HUGE_BYTES
        self._end = -(-(offset + length) // _HUGE_BYTES) * _HUGE_BYTES if length else self._start
        self._map: mmap.mmap | None = None

    def _mapped(self) -> mmap.mmap | bytearray:
        if self._map is None and self._end > self._start:
            with translated():
                size = min(self._end, os.fstat(self._fd).st_size) - self._start
                self._map = mmap.mmap(self._fd, size, offset=self._start)
                self._map.madvise(mmap.MADV_DONTDUMP)
                if size >= _HUGE_BYTES:
                    with suppress(OSError):  # for a tmpfs mounted huge=advise; EINVAL: this kernel has no huge pages
                        self._map.madvise(mmap.MADV_HUGEPAGE)
        return self._map or bytearray()

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves. Release the view before the window is closed. Raises DestinationError."""
        with memoryview(self._mapped()) as whole:
            return whole[offset - self._start : offset - self._start + length]

    def populate(self, offset: int, length: int) -> None:
        """Make the pages of a part present and writable; cheap for those that are.

        Raises:
            DestinationError: the kernel has no memory for them; here it can still say so.
        """
        if self._mapped():
            start = (offset - self._start) // mmap.PAGESIZE * mmap.PAGESIZE
            size = offset - self._start + length - start
            # Not `mmap.madvise`, which keeps every other thread waiting: to zero pages takes as long as to open segments.
            with translated(), memoryview(self._mapped()) as whole:
                address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
                if _LIBC.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(size), ctypes.c_int(_MADV_POPULATE_WRITE)):
                    raise OSError(ctypes.get_errno(), "madvise")

    def copy_in(self, offset: int, data: memoryview) -> None:
        """Write `data`. Raises DestinationError. Other threads run meanwhile, as they would not with a slice assignment."""
        with translated():
            if os.pwrite(self._fd, data, offset) != len(data):
                raise OSError(errno.ENOSPC, "short write")

    def copy_out(self, offset: int, out: memoryview) -> None:
        """Fill `out`. Raises DestinationError."""
        with translated():
            if os.preadv(self._fd, [out], offset) != len(out):
                raise OSError(errno.EIO, "short read")

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()
