import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.guest import mounts

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making mounts needs CAP_SYS_ADMIN")


@pytest.fixture
def tmpfs() -> Iterator[mounts.DetachedMount]:
    mount = mounts.detached_tmpfs(1 << 20, gid=1234)
    yield mount
    os.close(mount.fd)


def in_child(body: Callable[[], None]) -> int:
    """Exit status of a forked process in a mount namespace of its own: 0, or 1 after any exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mounts.enter_private_mount_namespace()
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def options_of(target: Path) -> tuple[set[str], set[str]]:
    """Options of the mount and of its file system, as mountinfo shows them."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        if fields.split()[4] == str(target):
            return set(fields.split()[5].split(",")), set(source.split()[2].split(","))
    raise LookupError(target)


def is_mounted(target: Path) -> bool:
    return f" {target} " in Path("/proc/self/mountinfo").read_text()


def write_file(directory: int, name: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=directory)
    os.write(fd, b"weights")
    os.close(fd)


@needs_root
def test_a_detached_tmpfs_is_attached_nowhere_and_belongs_to_the_group(tmpfs: mounts.DetachedMount) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    write_file(tmpfs.fd, "file")
    status = os.fstat(tmpfs.fd)
    assert mounts.is_tmpfs(tmpfs.fd)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o750, 0, 1234)
    assert Path("/proc/self/mountinfo").read_text() == before


@needs_root
def test_an_attached_tmpfs_has_no_devices_no_set_id_bits_and_no_programs(tmpfs: mounts.DetachedMount, tmp_path: Path) -> None:
    def body() -> None:
        mounts.attach(tmpfs.fd, str(tmp_path))
        mount, file_system = options_of(tmp_path)
        assert {"rw", "nosuid", "nodev", "noexec"} <= mount
        assert {"size=1024k", "mode=750", "gid=1234"} <= file_system
        assert ("noswap" in file_system) == tmpfs.noswap

    assert in_child(body) == 0


@needs_root
def test_programs_may_lie_in_an_executable_one(tmp_path: Path) -> None:
    mount = mounts.detached_tmpfs(1 << 20, gid=0, executable=True)

    def body() -> None:
        mounts.attach(mount.fd, str(tmp_path))
        options, _ = options_of(tmp_path)
        assert "noexec" not in options
        assert {"nosuid", "nodev"} <= options

    assert in_child(body) == 0
    os.close(mount.fd)


@needs_root
def test_a_tmpfs_holds_no_more_than_its_size(tmpfs: mounts.DetachedMount) -> None:
    fd = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=tmpfs.fd)
    with pytest.raises(OSError, match="No space left"):
        os.posix_fallocate(fd, 0, (1 << 20) + 1)
    os.close(fd)


@needs_root
def test_a_read_only_mount_can_be_read_and_not_written(tmpfs: mounts.DetachedMount, tmp_path: Path) -> None:
    write_file(tmpfs.fd, "file")
    mounts.set_read_only(tmpfs.fd)

    def body() -> None:
        mounts.attach(tmpfs.fd, str(tmp_path))
        assert (tmp_path / "file").read_bytes() == b"weights"
        assert "ro" in options_of(tmp_path)[0]
        for attempt in ((tmp_path / "new").touch, lambda: (tmp_path / "file").write_bytes(b"x")):
            with pytest.raises(OSError, match="Read-only") as caught:
                attempt()
            assert caught.value.errno == errno.EROFS

    assert in_child(body) == 0


@needs_root
def test_a_mount_does_not_become_read_only_while_somebody_can_write(tmpfs: mounts.DetachedMount) -> None:
    writer = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=tmpfs.fd)
    with pytest.raises(OSError, match="busy") as caught:
        mounts.set_read_only(tmpfs.fd)
    assert caught.value.errno == errno.EBUSY
    os.close(writer)
    mounts.set_read_only(tmpfs.fd)


@needs_root
def test_a_mount_in_a_private_namespace_is_seen_by_nobody_else_even_where_mounts_are_shared(
    tmpfs: mounts.DetachedMount, tmp_path: Path
) -> None:
    def inner() -> None:
        mounts.attach(tmpfs.fd, str(tmp_path))
        assert is_mounted(tmp_path)
        outer_view = Path(f"/proc/{os.getppid()}/mountinfo").read_text()
        assert f" {tmp_path} " not in outer_view

    def outer() -> None:
        subprocess.run(["mount", "--make-rshared", "/"], check=True)
        assert in_child(inner) == 0

    assert in_child(outer) == 0


@needs_root
def test_a_detached_path_has_its_old_contents_again(tmpfs: mounts.DetachedMount, tmp_path: Path) -> None:
    def body() -> None:
        mounts.attach(tmpfs.fd, str(tmp_path))
        assert is_mounted(tmp_path)
        mounts.detach(str(tmp_path))
        assert not is_mounted(tmp_path)
        with pytest.raises(OSError, match="Invalid argument"):
            mounts.detach(str(tmp_path))

    assert in_child(body) == 0


@needs_root
def test_without_privilege_the_kernel_says_eperm(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            for attempt in (lambda: mounts.detached_tmpfs(4096, gid=0), mounts.enter_private_mount_namespace):
                with pytest.raises(PermissionError):
                    attempt()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_root
def test_a_disk_is_mounted_for_reading_alone_without_devices_set_id_bits_and_programs() -> None:
    mount = mounts.detached_read_only("tmpfs", "none")  # as good as any for the attributes
    flags = os.statvfs(mount).f_flag
    os.close(mount)
    for flag in (os.ST_RDONLY, os.ST_NODEV, os.ST_NOSUID, os.ST_NOEXEC):
        assert flags & flag


def test_a_disk_is_no_tmpfs() -> None:
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert not mounts.is_tmpfs(fd)
    finally:
        os.close(fd)


def test_a_memfd_is_tmpfs() -> None:
    fd = os.memfd_create("test")
    try:
        assert mounts.is_tmpfs(fd)
    finally:
        os.close(fd)


def test_errors_carry_the_number_of_the_kernel_and_a_clean_text(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        mounts.is_tmpfs(fd)
    assert caught.value.errno == errno.EBADF
