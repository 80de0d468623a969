"""The folder that an agent left, looked at piece by piece. With a real boot and a mount: `test_commands_exec.py`."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.artifact import LoadedFile, left
from agent.artifact.given import MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME
from agent.artifact.manifest import MAX_FILES, MAX_PATH_BYTES
from agent.errors import DestinationError, DestinationProblem, ReceiptError, ReceiptProblem
from agent.report import MAX_RECEIPT_BYTES


@pytest.fixture
def out() -> Iterator[Path]:
    """As `keyturn load` leaves it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        out = Path(path)
        (out / MARK_NAME).mkdir(mode=0o700)
        (out / PUBLISHED_NAME / "sub").mkdir(parents=True)
        for name, size in (("a", 3), ("sub/b", 0)):
            (out / PUBLISHED_NAME / name).write_bytes(bytes(size))
            (out / PUBLISHED_NAME / name).chmod(0o440)
        for folder in (out / PUBLISHED_NAME / "sub", out / PUBLISHED_NAME):
            folder.chmod(0o750)
        (out / RECEIPT_NAME).write_bytes(b"receipt")
        yield out


@contextmanager
def folder_of(out: Path) -> Iterator[int]:
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield folder
    finally:
        os.close(folder)


def problem_of(look: Callable[[int], object], out: Path) -> ReceiptProblem:
    with folder_of(out) as folder, pytest.raises(ReceiptError) as caught:
        look(folder)
    return caught.value.problem


def test_what_lies_there_is_listed(out: Path) -> None:
    with folder_of(out) as folder:
        assert sorted(left.list_files(folder), key=lambda file: file.path) == [LoadedFile("a", 3), LoadedFile("sub/b", 0)]
        assert left.read_receipt(folder) == b"receipt"


def test_a_folder_that_can_be_written_is_refused(out: Path) -> None:
    with pytest.raises(ReceiptError) as caught, left.opened(str(out)):
        pass
    assert caught.value.problem is ReceiptProblem.MOUNT


def test_a_folder_that_is_no_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationError) as caught, left.opened(str(tmp_path)):
        pass
    assert caught.value.problem is DestinationProblem.NOT_MEMORY


def test_a_folder_that_is_none_is_the_kernels_word(tmp_path: Path) -> None:
    with pytest.raises(DestinationError) as caught, left.opened(str(tmp_path / "absent")):
        pass
    assert caught.value.problem is DestinationProblem.KERNEL


def test_without_a_receipt_that_is_said(out: Path) -> None:
    (out / RECEIPT_NAME).unlink()
    assert problem_of(left.read_receipt, out) is ReceiptProblem.MISSING


def test_a_receipt_that_is_no_file_is_malformed(out: Path) -> None:
    (out / RECEIPT_NAME).unlink()
    os.mkfifo(out / RECEIPT_NAME)
    assert problem_of(left.read_receipt, out) is ReceiptProblem.MALFORMED


def test_a_receipt_is_not_read_through_a_link(out: Path) -> None:
    (out / RECEIPT_NAME).rename(out / MARK_NAME / "elsewhere")
    (out / RECEIPT_NAME).symlink_to(out / MARK_NAME / "elsewhere")
    with folder_of(out) as folder, pytest.raises(DestinationError):
        left.read_receipt(folder)


def test_of_a_receipt_that_is_too_long_one_byte_more_is_read(out: Path) -> None:
    (out / RECEIPT_NAME).write_bytes(bytes(MAX_RECEIPT_BYTES + 5))
    with folder_of(out) as folder:
        assert len(left.read_receipt(folder)) == MAX_RECEIPT_BYTES + 1


@pytest.mark.parametrize("name", ["sitecustomize.py", ".hidden"])
def test_nothing_may_lie_beside_the_model(out: Path, name: str) -> None:
    (out / name).write_bytes(b"")
    assert problem_of(left.list_files, out) is ReceiptProblem.FILES


def _link(model: Path) -> None:
    (model / "a").rename(model.parent / MARK_NAME / "a")
    (model / "a").symlink_to(model.parent / MARK_NAME / "a")


def _long_path(model: Path) -> None:
    for _ in range(3):
        model /= "x" * 200
        model.mkdir(mode=0o750)
    assert len(str(model)) > MAX_PATH_BYTES
    (model / "file").touch(0o440)


def _linked_model(model: Path) -> None:
    model.rename(model.parent / MARK_NAME / "model")
    model.symlink_to(model.parent / MARK_NAME / "model")


CHANGES: dict[str, Callable[[Path], object]] = {
    "link": _link,
    "second name": lambda model: os.link(model / "a", model.parent / MARK_NAME / "name"),
    "pipe": lambda model: os.mkfifo(model / "pipe"),
    "empty folder": lambda model: (model / "empty").mkdir(mode=0o750),
    "long path": _long_path,
    "no model": lambda model: model.rename(model.parent / MARK_NAME / "model"),
    "linked model": _linked_model,
    "a file in its place": lambda model: (
        model.rename(model.parent / MARK_NAME / "model"),
        (model.parent / "model").write_bytes(b""),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_model_has_is_refused(out: Path, change: str) -> None:
    CHANGES[change](out / PUBLISHED_NAME)
    assert problem_of(left.list_files, out) is ReceiptProblem.FILES


def test_there_are_not_more_files_than_a_model_may_have(out: Path) -> None:
    for number in range(MAX_FILES - 1):
        (out / PUBLISHED_NAME / str(number)).touch(0o440)
    assert problem_of(left.list_files, out) is ReceiptProblem.FILES


@pytest.mark.parametrize("path", ["", "a", "sub", "sub/b"])
@pytest.mark.parametrize("bit", [stat.S_IWOTH, stat.S_IWGRP])
def test_a_model_that_may_be_written_is_refused(out: Path, path: str, bit: int) -> None:
    target = out / PUBLISHED_NAME / path
    target.chmod(stat.S_IMODE(target.stat().st_mode) | bit)
    assert problem_of(left.list_files, out) is ReceiptProblem.FILE_MODE
