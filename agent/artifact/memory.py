"""Guest memory for plaintext: a detached tmpfs, a sealed memfd, a given tmpfs. Nothing is visible before it is complete.

Owns the kinds of destination, the rule that their pages never reach a disk, and the check that the model fits. Does not
know ciphertext or keys, or how files are written (`window.py`). Follows memfd_create(2) and fcntl(2), "File Sealing".
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from agent.artifact import DestinationKind, given
from agent.artifact.given import PUBLISHED_NAME
from agent.artifact.window import Window, translated
from agent.errors import (
    DestinationError,
    DestinationProblem,
    InsufficientMemoryError,
    MemoryLimit,
    SwapActiveError,
)
from agent.guest import mounts
from agent.guest.memory_info import MemoryInfo

_FILE_MODE = 0o440
_FOLDER_MODE = 0o750
_MFD_NOEXEC_SEAL = 8  # Linux 6.3
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


_PAGE_NODE_BYTES = 10
"""For each page the kernel keeps a 64th of an xarray node of 584 bytes, and nodes above it; fewer where pages are huge."""
_INODE_BYTES = 1280
"""For each file and folder an inode of 752 bytes, a name of 192, of 448 where it is long, and what the parent and a security
module keep of it (measured with names of 40 characters on Linux 6.18: 860 bytes)."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model takes in memory.

    Attributes:
        files: how many.
        folders: above them, the root not counted.
        file_bytes: of all files, each in whole pages: what a file system counts.
    """

    files: int
    folders: int
    file_bytes: int

    @property
    def inodes(self) -> int:
        return self.files + self.folders + 1

    @property
    def memory_bytes(self) -> int:
        """With what the kernel keeps beside the pages."""
        return self.file_bytes + self.file_bytes // mmap.PAGESIZE * _PAGE_NODE_BYTES + self.inodes * _INODE_BYTES


def demand_of(files: Mapping[str, int]) -> Demand:
    """What files take, by their clean path and size in bytes."""
    folders: set[str] = set()
    pages = 0
    for path, size in files.items():
        pages += -(-size // mmap.PAGESIZE)
        folder = path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return Demand(len(files), len(folders), pages * mmap.PAGESIZE)


class Destination(Protocol):
    """Memory for the files of one model. `window` may be called from any thread.

    Attributes:
        noswap: the kernel never swaps it.
        directory: path of the published folder; None where a descriptor is handed over.
        folder_digest: of a given directory, as `given.folder_digest`; else None.
    """

    kind: DestinationKind
    noswap: bool
    directory: str | None
    folder_digest: bytes | None

    def create(self, path: str, size: int) -> None:
        """Make one file of `size` zero bytes; no memory is taken yet. Raises DestinationError."""

    def window(self, path: str, offset: int, length: int) -> Window:
        """A part of a created file. Raises DestinationError."""

    def seal_read_only(self) -> None:
        """Nobody writes any more, we neither: all windows are closed. Raises DestinationError."""

    def hand_over(self) -> tuple[int, ...]:
        """The descriptors by which the supervisor publishes a sealed destination; they stay ours until `close`."""

    def close(self) -> None:
        """Free everything, published or not. May be called again."""


class DetachedTmpfs:
    """A tmpfs no path leads to: when its last descriptor goes, so does the plaintext."""

    kind = DestinationKind.TMPFS
    folder_digest: bytes | None = None
    directory: str | None = None

    def __init__(self, demand: Demand, gid: int | None) -> None:
        """Make the mount.

        Args:
            demand: what it must hold.
            gid: group that may read, or None: our own.

        Raises:
            DestinationError: the kernel refused; code EPERM without CAP_SYS_ADMIN.
        """
        with translated():
            # A tmpfs of size 0 would be one without a limit. By default a small guest has no inodes for many small files.
            size_bytes, group = max(demand.file_bytes, mmap.PAGESIZE), os.getegid() if gid is None else gid
            self._mount = mounts.detached_tmpfs(size_bytes, group, uid=os.geteuid(), inodes=demand.inodes)
        self.noswap = self._mount.noswap
        self._tree = _Tree(self._mount.fd, gid)
        self._closed = False

    def create(self, path: str, size: int) -> None:
        self._tree.create(path, size)

    def window(self, path: str, offset: int, length: int) -> Window:
        return self._tree.window(path, offset, length)

    def seal_read_only(self) -> None:
        self._tree.seal()
        with translated():
            # refusal: test_a_tmpfs_is_not_sealed_under_an_open_window
            mounts.set_read_only(self._mount.fd)

    def hand_over(self) -> tuple[int, ...]:
        return (self._mount.fd,)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._mount.fd)


class SealedMemfd:
    """One file without a name, sealed against writing; needs no privilege."""

    kind = DestinationKind.MEMFD
    folder_digest: bytes | None = None
    noswap = False
    directory: str | None = None

    def __init__(self, gid: int | None) -> None:
        """Make the file; `gid` is the group that may open it through /proc, None: our own."""
        self._gid = gid
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        with translated():
            try:
                self._fd = os.memfd_create("keyturn", flags | _MFD_NOEXEC_SEAL)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._fd = os.memfd_create("keyturn", flags)
        self._created = False
        self._closed = False

    def create(self, path: str, size: int) -> None:
        # refusal: test_a_memfd_holds_one_file
        if self._created:
            raise DestinationError(DestinationProblem.MANY_FILES)
        self._created = True
        with translated():
            os.ftruncate(self._fd, size)

    def window(self, path: str, offset: int, length: int) -> Window:
        with translated():
            fd = os.dup(self._fd)
        return Window(fd, offset, length)

    def seal_read_only(self) -> None:
        with translated():
            if self._gid is not None:
                os.fchown(self._fd, -1, self._gid)
            os.fchmod(self._fd, _FILE_MODE)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            # refusal: test_a_memfd_is_not_sealed_under_an_open_window
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)

    def hand_over(self) -> tuple[int, ...]:
        return (self._fd,)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._fd)


class GivenDirectory:
    """A folder on somebody else's tmpfs. Whole or nothing: the model appears by one rename, as `model` below it; or, `spread`,
    its files appear in the folder itself, one after the other.

    After a SIGKILL nobody cleans up here before an agent starts again, and others may write: the kernel keeps neither promise
    for a given directory. A `.keyturn` that nobody has locked is a dead agent's, and so is the `model` beside it.
    """

    kind = DestinationKind.DIRECTORY
    noswap = False  # its owner may have mounted it so, but a mount option is no answer about whoever mounts it next

    def __init__(self, path: str, demand: Demand, gid: int | None, *, spread: bool = False) -> None:
        """Check the folder, and wipe what a killed predecessor left.

        Args:
            path: an existing, empty directory on tmpfs.
            demand: what it must hold.
            gid: group that may read, or None: our own.
            spread: as above.

        Raises:
            DestinationError: not a directory, not tmpfs, not empty, a living agent's, or without inodes for every file.
            InsufficientMemoryError: the file system is too small.
        """
        self.directory: str | None = path if spread else os.path.join(path, PUBLISHED_NAME)
        self._spread = spread
        self._gid = gid
        self._closed = False
        self._parent = _open_given(path)
        with ExitStack() as undo:
            undo.callback(os.close, self._parent)
            with translated():
                self.folder_digest: bytes | None = given.folder_digest(self._parent)
                try:
                    self._mark = given.acquire(self._parent)
                except BlockingIOError:
                    raise DestinationError(DestinationProblem.IN_USE) from None
                undo.callback(os.close, self._mark)
                undo.callback(given.release, self._parent, self._mark)
                _check_space(self._parent, demand)
                os.mkdir(PUBLISHED_NAME, 0o700, dir_fd=self._mark)
                folder = os.open(PUBLISHED_NAME, _FOLDER, dir_fd=self._mark)
            undo.pop_all()
        self._tree = _Tree(folder, gid)

    def create(self, path: str, size: int) -> None:
        self._tree.create(path, size)

    def window(self, path: str, offset: int, length: int) -> Window:
        return self._tree.window(path, offset, length)

    def seal_read_only(self) -> None:
        self._tree.seal()
        with translated():
            if self._spread:
                given.spread(self._parent, self._mark)
                return
            if self._gid is not None:
                os.fchown(self._tree.root, -1, self._gid)
            os.fchmod(self._tree.root, _FOLDER_MODE)
            os.rename(PUBLISHED_NAME, PUBLISHED_NAME, src_dir_fd=self._mark, dst_dir_fd=self._parent)

    def hand_over(self) -> tuple[int, ...]:
        return (self._mark,)  # whoever holds it holds the lock

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._tree.root)
            try:
                with translated():
                    given.release(self._parent, self._mark)
            finally:
                os.close(self._mark)
                os.close(self._parent)


class _Tree:
    """Files and folders below a directory descriptor."""

    def __init__(self, root: int, gid: int | None) -> None:
        self.root = root
        self._gid = gid
        self._files: list[str] = []
        self._folders: set[str] = set()

    def create(self, path: str, size: int) -> None:
        with translated():
            self._make_folder(path.rpartition("/")[0])
            fd = os.open(path, _CREATE, 0o600, dir_fd=self.root)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        self._files.append(path)

    def _make_folder(self, path: str) -> None:
        if path and path not in self._folders:
            self._make_folder(path.rpartition("/")[0])
            os.mkdir(path, 0o700, dir_fd=self.root)
            self._folders.add(path)

    def window(self, path: str, offset: int, length: int) -> Window:
        with translated():
            fd = os.open(path, _OPEN, dir_fd=self.root)
        return Window(fd, offset, length)

    def seal(self) -> None:
        with translated():
            for names, mode in ((self._files, _FILE_MODE), (self._folders, _FOLDER_MODE)):
                for name in names:
                    if self._gid is not None:
                        os.chown(name, -1, self._gid, dir_fd=self.root, follow_symlinks=False)
                    os.chmod(name, mode, dir_fd=self.root)


def choose_destination(
    kind: str,
    directory: str | None,
    demand: Demand,
    gid: int | None,
    *,
    allow_swap: bool,
    memory: MemoryInfo,
    spread: bool = False,
) -> Destination:
    """Make the destination a configuration asks for.

    Args:
        kind: `tmpfs`, `memfd`, `directory`, or `auto`: a tmpfs where the kernel lets us, else a memfd.
        directory: for `directory`: an empty folder on tmpfs.
        demand: what it must hold.
        gid: group that may read the files, or None: our own.
        allow_swap: go on although swap could carry plaintext out of memory. Only for a demonstration, which says so.
        memory: where to ask for swap.
        spread: for `directory`: the files go into the folder itself.

    Raises:
        DestinationError: not possible here.
        InsufficientMemoryError: a given file system is too small.
        SwapActiveError: there is swap, and the destination is not exempt from it.
    """
    destination: Destination
    if kind == "directory":
        assert directory is not None  # the schema asks for it
        destination = GivenDirectory(directory, demand, gid, spread=spread)
    elif kind == "memfd":
        destination = _memfd(demand, gid)
    else:
        try:
            destination = DetachedTmpfs(demand, gid)
        except DestinationError as error:
            if kind == "tmpfs" or error.code not in (errno.EPERM, errno.ENOSYS):
                raise
            destination = _memfd(demand, gid)
    try:
        _check_swap(destination.noswap, allow_swap, memory)
    except BaseException:
        destination.close()
        raise
    return destination


def check_destination(
    kind: str, directory: str | None, demand: Demand, gid: int | None, *, allow_swap: bool, memory: MemoryInfo
) -> None:
    """Raise what `choose_destination` would, and leave everything as it is: a given folder may hold somebody's model."""
    if kind != "directory":
        choose_destination(kind, directory, demand, gid, allow_swap=allow_swap, memory=memory).close()
        return
    assert directory is not None  # the schema asks for it
    folder = _open_given(directory)
    try:
        with translated():
            if given.is_held(folder):
                raise DestinationError(DestinationProblem.IN_USE)
            _check_space(folder, demand)
    finally:
        os.close(folder)
    _check_swap(GivenDirectory.noswap, allow_swap, memory)


def check_memory(demand: Demand, headroom_bytes: int, memory: MemoryInfo) -> None:
    """Check, before a byte is fetched, that the model fits.

    Args:
        demand: of the model.
        headroom_bytes: what must stay free beside them.
        memory: where to ask.

    Raises:
        InsufficientMemoryError: with the limit that bites.
        DestinationError: the kernel does not tell.
    """
    needed = demand.memory_bytes + headroom_bytes
    with _figures():
        limits = {MemoryLimit.AVAILABLE: memory.available_bytes(), MemoryLimit.CGROUP: memory.cgroup_available_bytes()}
    for limit, available in limits.items():
        # refusal: test_the_tighter_limit_bites_and_headroom_counts
        if available is not None and available < needed:
            raise InsufficientMemoryError(limit, needed, available)


def swap_is_active(memory: MemoryInfo) -> bool:
    """Could a page of ours be written to a device? Raises DestinationError: the kernel does not tell."""
    with _figures():
        return memory.swap_is_active()


def _memfd(demand: Demand, gid: int | None) -> SealedMemfd:
    if demand.files != 1:
        raise DestinationError(DestinationProblem.MANY_FILES)
    return SealedMemfd(gid)


def _open_given(path: str) -> int:
    """The folder, once it is known to be one that a model may go to: empty, or an agent's; `given` knows whether that lives."""
    with translated():
        folder = os.open(path, _FOLDER)
        try:
            # refusal: test_a_given_directory_must_be_memory
            if not mounts.is_tmpfs(folder):
                raise DestinationError(DestinationProblem.NOT_MEMORY)
            # refusal: test_a_given_directory_must_be_empty
            if given.strangers(folder):
                raise DestinationError(DestinationProblem.NOT_EMPTY)
        except BaseException:
            os.close(folder)
            raise
    return folder


def _check_swap(noswap: bool, allow_swap: bool, memory: MemoryInfo) -> None:
    # refusal: test_swap_refuses_memory_that_could_be_swapped_and_leaves_nothing
    if not allow_swap and not noswap and swap_is_active(memory):
        raise SwapActiveError()


def _check_space(fd: int, demand: Demand) -> None:
    figures = os.fstatvfs(fd)
    available = figures.f_bavail * figures.f_frsize
    # A tmpfs mounted with size=0 or nr_inodes=0 has no limit, and says so with none at all.
    # refusal: test_a_given_directory_must_have_room
    if figures.f_blocks and available < demand.file_bytes:
        raise InsufficientMemoryError(MemoryLimit.DESTINATION, demand.file_bytes, available)
    # refusal: test_a_given_directory_must_have_inodes
    if figures.f_files and figures.f_favail < demand.inodes:
        raise DestinationError(DestinationProblem.INODES)


@contextmanager
def _figures() -> Iterator[None]:
    try:
        with translated():
            yield
    except ValueError as error:  # the kernel's answer is not the one its documents describe
        raise DestinationError(DestinationProblem.KERNEL) from error
