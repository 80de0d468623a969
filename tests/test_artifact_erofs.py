"""The file system image: what other readers make of it."""

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.artifact import erofs
from agent.artifact.volume import list_files
from agent.guest import mounts

UUID = bytes(range(16))
FILES = {
    "a/b/c.json": b"{}",
    "a/empty": b"",
    "model.gguf": bytes(range(256)) * 100,
    "one-block": b"x" * 4096,
    "é.txt": b"y" * 4097,
}
SIZES = {path: len(data) for path, data in FILES.items()}


def filled(files: Mapping[str, bytes]) -> bytes:
    """The whole image."""
    image = erofs.plan({path: len(data) for path, data in files.items()}, UUID)
    whole = bytearray(image.blocks * erofs.BLOCK_BYTES)
    whole[: len(image.head)] = image.head
    for path, data in files.items():
        at = image.starts[path] * erofs.BLOCK_BYTES
        assert not any(whole[at : at + len(data)]), "nothing else lies there"
        whole[at : at + len(data)] = data
    return bytes(whole)


def found_by_fsck(image: bytes, folder: Path) -> dict[str, bytes]:
    if shutil.which("fsck.erofs") is None:
        pytest.skip("no erofs-utils here")
    (folder / "image").write_bytes(image)
    target = folder / "files"
    subprocess.run(["fsck.erofs", f"--extract={target}", folder / "image"], check=True, capture_output=True)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_erofs_utils_find_every_file(tmp_path: Path) -> None:
    assert found_by_fsck(filled(FILES), tmp_path) == FILES


def test_a_folder_may_have_many_blocks_and_a_folder_only_folders(tmp_path: Path) -> None:
    names = sorted(f"many/{'n' * (1 + i % 200)}{i:04}" for i in range(700))
    files = {"deep/er/than/most": b"z"} | {name: str(i).encode() for i, name in enumerate(names)}
    assert found_by_fsck(filled(files), tmp_path) == files


@contextmanager
def mounted(folder: Path) -> Iterator[int]:
    """The image, as the kernel has it: a detached mount of ours over a loop device."""
    (folder / "image").write_bytes(filled(FILES))
    if os.geteuid() != 0 or "erofs" not in Path("/proc/filesystems").read_text():
        pytest.skip("no root, or no EROFS in this kernel")
    loop = subprocess.run(["losetup", "--find", "--show", "--read-only", folder / "image"], capture_output=True, text=True)
    if loop.returncode:
        pytest.skip("no loop device here")
    try:
        mount = mounts.detached_read_only("erofs", loop.stdout.strip())
        yield mount
        os.close(mount)
    finally:
        subprocess.run(["losetup", "--detach", loop.stdout.strip()], check=True)


def test_the_kernel_finds_every_file_and_everybody_may_only_read_it(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        assert [(file.path, file.size) for file in list_files(mount)] == [
            ("model.gguf", 25600),
            ("one-block", 4096),
            ("é.txt", 4097),
            ("a/empty", 0),
            ("a/b/c.json", 2),
        ]
        for path, data in FILES.items():
            file = os.open(path, os.O_RDONLY, dir_fd=mount)
            assert os.read(file, len(data) + 1) == data
            assert (stat.S_IMODE(os.fstat(file).st_mode), os.fstat(file).st_uid, os.fstat(file).st_mtime) == (0o444, 0, 0)
            os.close(file)
            with pytest.raises(OSError):
                os.open(path, os.O_RDWR, dir_fd=mount)
        assert stat.S_IMODE(os.stat("a", dir_fd=mount).st_mode) == 0o555
        flags = os.statvfs(mount).f_flag
        assert flags & os.ST_RDONLY
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert flags & os.ST_NOEXEC


def test_what_is_no_such_file_system_is_not_mounted(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    before = len(os.listdir("/proc/self/fd"))
    for kind, device in (("erofs", "/dev/null"), ("erofs", str(tmp_path / "none")), ("no-such-type", "/dev/null")):
        with pytest.raises(OSError):
            mounts.detached_read_only(kind, device)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_files_give_the_same_image() -> None:
    assert erofs.plan(SIZES, UUID) == erofs.plan(dict(SIZES), UUID)
    assert hashlib.sha256(erofs.plan(SIZES, UUID).head).hexdigest() == (
        "3fcb184bb35ec5253f9de7a7b11dcc1ba15ddb19eb87044a1555c4a6d1a4d7f6"
    )


def test_files_lie_behind_each_other_in_their_order() -> None:
    image = erofs.plan(SIZES, UUID)
    next_block = len(image.head) // erofs.BLOCK_BYTES
    for path, size in SIZES.items():
        assert image.starts[path] == next_block
        next_block += -(-size // erofs.BLOCK_BYTES)
    assert image.blocks == next_block


def test_more_than_block_numbers_can_say_is_refused() -> None:
    erofs.plan({"a": (1 << 44) - (4 << 12)}, UUID)
    with pytest.raises(ValueError, match="16 TiB"):
        erofs.plan({"a": 1 << 44}, UUID)
