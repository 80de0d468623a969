import errno
import fcntl
import mmap
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agent.artifact import DestinationKind
from agent.artifact.given import MARK_NAME, wipe
from agent.artifact.memory import (
    Demand,
    Destination,
    DetachedTmpfs,
    GivenDirectory,
    SealedMemfd,
    check_destination,
    check_memory,
    choose_destination,
    demand_of,
)
from agent.errors import (
    DestinationError,
    DestinationProblem,
    InsufficientMemoryError,
    MemoryLimit,
    SwapActiveError,
)
from agent.guest import mounts
from agent.guest.memory_info import MACHINE, MemoryInfo
from tests.children import in_child

PAGE = mmap.PAGESIZE
MIB = 1 << 20
GID = 1234

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making mounts and changing users needs root")


@pytest.fixture
def given() -> Iterator[Path]:
    """An empty folder on tmpfs."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    fd = os.open(path, os.O_RDONLY)
    on_tmpfs = mounts.is_tmpfs(fd)
    os.close(fd)
    if not on_tmpfs:
        pytest.skip("/dev/shm is not a tmpfs here")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def guest(tmp_path: Path) -> MemoryInfo:
    """A machine with 100 MiB available, a cgroup that leaves 50 MiB, and no swap."""
    info = MemoryInfo(tmp_path / "proc", tmp_path / "sys")
    group = info.sys / "fs/cgroup"
    for path, text in {
        info.proc / "meminfo": f"MemAvailable: {100 << 10} kB\n",
        info.proc / "swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        info.proc / "self/cgroup": "0::/\n",
        group / "memory.max": str(50 * MIB),
        group / "memory.current": "0",
        group / "memory.stat": "inactive_file 0\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return info


@pytest.fixture
def swapping(guest: MemoryInfo) -> MemoryInfo:
    with (guest.proc / "swaps").open("a") as swaps:
        swaps.write("/dev/vda2\tpartition\t1048572\t0\t-2\n")
    return guest


def model_of(*sizes: int) -> Demand:
    """Of files side by side."""
    return demand_of({f"file-{i}": size for i, size in enumerate(sizes)})


PAGE_OF_FILES = Demand(files=3, folders=2, file_bytes=PAGE)


def descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that listed the others
            continue
    return sorted(found)


def fill(destination: Destination, path: str, data: bytes) -> None:
    destination.create(path, len(data))
    with destination.window(path, 0, len(data)) as window:
        window.populate(0, len(data))
        with window.view(0, len(data)) as view:
            view[:] = data


def as_nobody(body: Callable[[], None]) -> int:
    """Exit status of a forked process without privilege: 0, or 1 after any exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- detached tmpfs ---------------------------------------------------------------------------------------------------


@needs_root
def test_a_sealed_tmpfs_holds_every_file_readable_for_the_group_and_writable_for_nobody() -> None:
    destination = DetachedTmpfs(Demand(3, 2, 8 * PAGE), GID)
    files = {"a/b/c": b"1" * PAGE, "a/d": b"22", "e": b""}
    for path, data in files.items():
        fill(destination, path, data)
    destination.seal_read_only()
    (mount,) = destination.hand_over()
    for path, data in files.items():
        fd = os.open(path, os.O_RDONLY, dir_fd=mount)
        status = os.fstat(fd)
        assert os.read(fd, PAGE + 1) == data
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o440, GID)
        os.close(fd)
        with pytest.raises(OSError, match="Read-only") as caught:
            os.open(path, os.O_WRONLY, dir_fd=mount)
        assert caught.value.errno == errno.EROFS
    for folder in ("a", "a/b", "."):
        status = os.stat(folder, dir_fd=mount)
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o750, GID)
    with pytest.raises(OSError, match="Read-only"):
        os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=mount)
    destination.close()


@needs_root
def test_a_tmpfs_is_not_sealed_under_an_open_window() -> None:
    destination = DetachedTmpfs(PAGE_OF_FILES, None)
    destination.create("w", PAGE)
    with destination.window("w", 0, PAGE) as window:
        window.populate(0, PAGE)
        with pytest.raises(DestinationError) as caught:
            destination.seal_read_only()
    assert caught.value.code == errno.EBUSY
    destination.close()


@needs_root
def test_a_tmpfs_for_empty_files_has_a_limit() -> None:
    """Of size 0 it would have none."""
    destination = DetachedTmpfs(model_of(0), None)
    assert os.fstatvfs(destination.hand_over()[0]).f_blocks == 1
    destination.close()


@needs_root
@pytest.mark.parametrize("sizes", [[0], [1], [PAGE + 1, 1, 0], [3 * MIB + 5, 2 * MIB, PAGE - 1], [MIB - 16] * 3])
def test_files_fit_exactly_into_their_pages(sizes: Sequence[int]) -> None:
    destination = DetachedTmpfs(model_of(*sizes), None)
    for i, size in enumerate(sizes):
        fill(destination, str(i), b"x" * size)
    destination.close()


# --- sealed memfd -----------------------------------------------------------------------------------------------------


def test_a_sealed_memfd_can_be_read_through_proc_and_changed_by_nobody() -> None:
    destination = SealedMemfd(None)
    fill(destination, "model.gguf", b"weights")
    destination.seal_read_only()
    (fd,) = destination.hand_over()
    assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"weights"
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o440
    for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: mmap.mmap(fd, 7)):
        with pytest.raises(PermissionError):
            attempt()
    destination.close()


def test_a_memfd_is_not_sealed_under_an_open_window() -> None:
    destination = SealedMemfd(None)
    destination.create("w", PAGE)
    with destination.window("w", 0, PAGE) as window:
        window.populate(0, PAGE)
        with pytest.raises(DestinationError) as caught:
            destination.seal_read_only()
    assert caught.value.code == errno.EBUSY
    destination.close()


def test_a_memfd_holds_one_file() -> None:
    destination = SealedMemfd(None)
    destination.create("a", 1)
    with pytest.raises(DestinationError) as caught:
        destination.create("b", 1)
    destination.close()
    assert caught.value.problem is DestinationProblem.MANY_FILES


@needs_root
def test_another_user_of_the_group_can_open_a_sealed_memfd() -> None:
    destination = SealedMemfd(65534)
    fill(destination, "w", b"weights")
    destination.seal_read_only()
    (fd,) = destination.hand_over()

    def body() -> None:
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"weights"

    assert as_nobody(body) == 0
    destination.close()


# --- given directory --------------------------------------------------------------------------------------------------


def test_a_given_directory_shows_nothing_before_all_of_it_is_there(given: Path) -> None:
    destination = GivenDirectory(str(given), PAGE_OF_FILES, os.getegid())
    fill(destination, "a/b", b"weights")
    assert os.listdir(given) == [MARK_NAME]
    assert stat.S_IMODE((given / MARK_NAME).stat().st_mode) == 0o700
    destination.seal_read_only()
    assert sorted(os.listdir(given)) == [MARK_NAME, "model"]
    assert os.listdir(given / MARK_NAME) == []
    assert destination.directory == str(given / "model")
    assert (given / "model/a/b").read_bytes() == b"weights"
    modes = [stat.S_IMODE((given / path).stat().st_mode) for path in ("model", "model/a", "model/a/b")]
    assert modes == [0o750, 0o750, 0o440]
    destination.close()
    assert os.listdir(given) == []


def test_closing_an_unfinished_given_directory_leaves_nothing(given: Path) -> None:
    before = descriptors()
    destination = GivenDirectory(str(given), PAGE_OF_FILES, None)
    fill(destination, "a/b", b"weights")
    destination.close()
    destination.close()
    assert os.listdir(given) == []
    assert descriptors() == before


@pytest.mark.parametrize("published", [False, True])
def test_what_a_killed_predecessor_left_is_wiped(given: Path, published: bool) -> None:
    """The lock of a dead agent is open; without one it is a living agent's."""

    def predecessor() -> None:
        destination = GivenDirectory(str(given), PAGE_OF_FILES, None)
        fill(destination, "a/b", b"plaintext")
        if published:
            destination.seal_read_only()

    in_child(predecessor)
    assert [path for path in given.rglob("b") if path.read_bytes() == b"plaintext"]
    wipe(str(given))
    assert os.listdir(given) == []


@pytest.mark.parametrize("published", [False, True])
def test_a_living_agents_directory_is_left_alone(given: Path, published: bool) -> None:
    """Whoever holds the descriptor that is handed over holds the lock, even when its maker has closed its own."""
    living = GivenDirectory(str(given), PAGE_OF_FILES, None)
    fill(living, "a/b", b"plaintext")
    if published:
        living.seal_read_only()
    held = os.dup(living.hand_over()[0])
    with pytest.raises(DestinationError) as looked:
        check_destination("directory", str(given), model_of(PAGE), None, allow_swap=True, memory=MACHINE)
    assert looked.value.problem is DestinationProblem.IN_USE
    before = descriptors()
    wipe(str(given))
    with pytest.raises(DestinationError) as caught:
        GivenDirectory(str(given), PAGE_OF_FILES, None)
    assert caught.value.problem is DestinationProblem.IN_USE
    assert descriptors() == before
    assert [path for path in given.rglob("b") if path.read_bytes() == b"plaintext"]
    os.close(held)
    living.close()
    assert os.listdir(given) == []


def test_a_given_directory_must_be_empty(given: Path) -> None:
    before = descriptors()
    (given / "model").mkdir()
    with pytest.raises(DestinationError) as caught:
        GivenDirectory(str(given), PAGE_OF_FILES, None)
    assert caught.value.problem is DestinationProblem.NOT_EMPTY
    assert descriptors() == before
    assert os.listdir(given) == ["model"]


def test_a_given_directory_is_checked_without_wiping_what_an_agent_may_still_be_writing(given: Path, guest: MemoryInfo) -> None:
    def check(size: int) -> None:
        check_destination("directory", str(given), model_of(size), None, allow_swap=False, memory=guest)

    before = descriptors()
    (given / MARK_NAME).mkdir()
    (given / MARK_NAME / "weights").write_bytes(b"plaintext")
    check(PAGE)
    with pytest.raises(InsufficientMemoryError):
        check(1 << 60)
    (given / "somebody's").mkdir()
    with pytest.raises(DestinationError) as caught:
        check(PAGE)
    assert caught.value.problem is DestinationProblem.NOT_EMPTY
    assert (given / MARK_NAME / "weights").read_bytes() == b"plaintext"
    assert descriptors() == before


def test_a_given_directory_must_be_memory() -> None:
    before = descriptors()
    with pytest.raises(DestinationError) as caught:
        GivenDirectory("/proc", PAGE_OF_FILES, None)
    assert caught.value.problem is DestinationProblem.NOT_MEMORY
    assert descriptors() == before


def test_a_link_to_a_directory_is_none(given: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(given)
    with pytest.raises(DestinationError) as caught:
        GivenDirectory(str(tmp_path / "link"), PAGE_OF_FILES, None)
    assert caught.value.code == errno.ENOTDIR


def test_a_given_directory_must_have_room(given: Path) -> None:
    needed = 1 << 50
    with pytest.raises(InsufficientMemoryError) as caught:
        GivenDirectory(str(given), model_of(needed), None)
    assert (caught.value.limit, caught.value.needed_bytes) == (MemoryLimit.DESTINATION, needed)
    assert 0 < caught.value.available_bytes < needed
    assert os.listdir(given) == []


@needs_root
@pytest.mark.parametrize(("inodes", "fits"), [(8, True), (7, False)])
def test_a_given_directory_must_have_inodes(tmp_path: Path, inodes: int, fits: bool) -> None:
    """Its root, the mark, and what the model has: its own root, two folders, three files."""

    def body() -> None:
        mounts.enter_private_mount_namespace()
        mounts.mount("tmpfs", str(tmp_path), 0, f"nr_inodes={inodes}")
        problem = None
        try:
            destination = GivenDirectory(str(tmp_path), PAGE_OF_FILES, None)
            for path in ("a/b/c", "a/b/d", "e"):
                destination.create(path, 1)
            destination.close()
        except DestinationError as error:
            problem = error.problem
        assert problem is (None if fits else DestinationProblem.INODES)
        assert os.listdir(tmp_path) == []

    in_child(body)


@needs_root
def test_a_tmpfs_of_ours_has_the_inodes_of_its_model() -> None:
    """By default it has one for two pages of the machine's memory: a guest of 512 MiB has 65,536."""
    destination = DetachedTmpfs(PAGE_OF_FILES, None)
    for path in ("a/b/c", "a/b/d", "e"):
        destination.create(path, 0)
    with pytest.raises(DestinationError) as caught:
        destination.create("one more", 0)
    assert caught.value.code == errno.ENOSPC
    destination.close()


# --- the choice -------------------------------------------------------------------------------------------------------


def choose(kind: str, guest: MemoryInfo, sizes: Sequence[int] = (1,), directory: str | None = None) -> Destination:
    return choose_destination(kind, directory, model_of(*sizes), None, allow_swap=False, memory=guest)


@needs_root
def test_auto_is_a_tmpfs_where_the_kernel_lets_us(guest: MemoryInfo) -> None:
    destination = choose("auto", guest, [1, 2])
    assert destination.kind is DestinationKind.TMPFS
    destination.close()


@needs_root
def test_without_privilege_auto_is_a_memfd_and_a_tmpfs_is_refused(guest: MemoryInfo) -> None:
    readable = MemoryInfo(Path(tempfile.mkdtemp()))  # pytest keeps its own folders private
    readable.proc.chmod(0o755)
    shutil.copy(guest.proc / "swaps", readable.proc)

    def body() -> None:
        destination = choose("auto", readable)
        assert destination.kind is DestinationKind.MEMFD
        fill(destination, "w", b"weights")
        destination.seal_read_only()
        with pytest.raises(DestinationError) as caught:
            choose("tmpfs", readable)
        assert caught.value.code == errno.EPERM
        with pytest.raises(DestinationError) as caught:
            choose("auto", readable, [1, 2])
        assert caught.value.problem is DestinationProblem.MANY_FILES

    assert as_nobody(body) == 0
    shutil.rmtree(readable.proc)


@needs_root
def test_auto_does_not_hide_other_errors_of_the_kernel_behind_a_memfd(guest: MemoryInfo) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard[1]))
    try:
        with pytest.raises(DestinationError) as caught:
            choose("auto", guest, [1, 2])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)
    assert caught.value.code == errno.EMFILE


def test_what_was_asked_for_by_name_is_what_comes(guest: MemoryInfo, given: Path) -> None:
    memfd = choose("memfd", guest)
    directory = choose("directory", guest, directory=str(given))
    assert (memfd.kind, directory.kind) == (DestinationKind.MEMFD, DestinationKind.DIRECTORY)
    memfd.close()
    directory.close()


def test_swap_refuses_memory_that_could_be_swapped_and_leaves_nothing(swapping: MemoryInfo, given: Path) -> None:
    before = descriptors()
    for kind, directory in (("memfd", None), ("directory", str(given))):
        with pytest.raises(SwapActiveError):
            choose(kind, swapping, directory=directory)
    assert descriptors() == before
    assert os.listdir(given) == []


def test_swap_goes_on_only_when_allowed_by_name(swapping: MemoryInfo) -> None:
    choose_destination("memfd", None, model_of(1), None, allow_swap=True, memory=swapping).close()


@pytest.mark.parametrize("kind", ["memfd", "directory"])
def test_what_only_checks_a_destination_refuses_swap_as_well(swapping: MemoryInfo, given: Path, kind: str) -> None:
    before = descriptors()
    directory = str(given) if kind == "directory" else None
    with pytest.raises(SwapActiveError):
        check_destination(kind, directory, model_of(PAGE), None, allow_swap=False, memory=swapping)
    check_destination(kind, directory, model_of(PAGE), None, allow_swap=True, memory=swapping)
    assert descriptors() == before


@needs_root
def test_swap_does_not_reach_a_tmpfs_without_swap(swapping: MemoryInfo) -> None:
    destination = DetachedTmpfs(PAGE_OF_FILES, None)
    noswap = destination.noswap
    destination.close()
    if not noswap:
        pytest.skip("this kernel's tmpfs has no noswap")
    choose("auto", swapping).close()


# --- how much ---------------------------------------------------------------------------------------------------------


def test_a_model_takes_whole_pages_and_an_inode_for_each_file_and_folder() -> None:
    demand = demand_of({"a/b/c": 0, "a/b/d": 1, "a/e": PAGE, "f": PAGE + 1})
    assert demand == Demand(files=4, folders=2, file_bytes=4 * PAGE)
    assert demand.inodes == 7
    assert demand.memory_bytes == 4 * PAGE + 4 * 10 + 7 * 1280


def test_what_the_kernel_keeps_beside_large_and_small_files() -> None:
    """Of a large file it is little, of many small ones it is more than their contents."""
    large = model_of(200 << 30)
    assert (large.file_bytes, large.inodes) == (200 << 30, 2)
    assert large.memory_bytes == (200 << 30) + (500 << 20) + 2 * 1280
    empty = demand_of({f"{i % 100}/{i}": 0 for i in range(100_000)})
    assert (empty.file_bytes, empty.memory_bytes) == (0, 100_101 * 1280)
    small = demand_of({f"{i % 100}/{i}": 1 for i in range(100_000)})
    assert (small.file_bytes, small.memory_bytes) == (100_000 * PAGE, 100_000 * (PAGE + 10) + 100_101 * 1280)


def test_the_tighter_limit_bites_and_headroom_counts(guest: MemoryInfo) -> None:
    fits = Demand(1, 0, 48 * MIB)
    headroom = 50 * MIB - fits.memory_bytes
    check_memory(fits, headroom, guest)
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(fits, headroom + 1, guest)
    assert (caught.value.limit, caught.value.available_bytes) == (MemoryLimit.CGROUP, 50 * MIB)
    assert caught.value.needed_bytes == 50 * MIB + 1


def test_memory_of_the_machine_bites_without_a_cgroup_limit(guest: MemoryInfo) -> None:
    (guest.sys / "fs/cgroup/memory.max").write_text("max")
    check_memory(model_of(99 * MIB), 0, guest)
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(model_of(100 * MIB), 0, guest)
    assert caught.value.limit is MemoryLimit.AVAILABLE


@pytest.mark.parametrize("text", ["", "MemAvailable: much kB\n"])
def test_figures_that_are_none_are_an_error_not_a_guess(guest: MemoryInfo, text: str) -> None:
    (guest.proc / "meminfo").write_text(text)
    with pytest.raises(DestinationError):
        check_memory(model_of(1), 0, guest)


def test_figures_that_cannot_be_read_are_an_error_not_a_guess(guest: MemoryInfo) -> None:
    (guest.proc / "meminfo").unlink()
    with pytest.raises(DestinationError) as caught:
        check_memory(model_of(1), 0, guest)
    assert caught.value.code == errno.ENOENT
