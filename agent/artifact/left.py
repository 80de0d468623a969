"""What an agent left in a given directory for another container, looked at before it is served.

Owns the rules for the folder: memory, mounted for reading only, the receipt and exactly the files, none of which may be
written. Reads no file but the receipt: what a file holds was authenticated when it was opened, and memory of this guest is
what the guest protects. Whether the receipt is to be believed is `agent/verify`'s.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from agent.artifact import LoadedFile
from agent.artifact.given import MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME
from agent.artifact.manifest import MAX_FILES, MAX_PATH_BYTES
from agent.artifact.window import translated
from agent.errors import DestinationError, DestinationProblem, ReceiptError, ReceiptProblem
from agent.guest import mounts
from agent.report import MAX_RECEIPT_BYTES

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE_WRITABLE = 0o222
_FOLDER_WRITABLE = 0o022  # its owner may: the container that made it, which has ended


@contextmanager
def opened(path: str) -> Iterator[int]:
    """The folder, once it is memory that this container cannot write to.

    Raises:
        DestinationError: not a folder, or not memory.
        ReceiptError: MOUNT.
    """
    with translated():
        folder = os.open(path, _FOLDER)
    try:
        with translated():
            # refusal: test_a_folder_that_is_no_memory_is_refused
            if not mounts.is_tmpfs(folder):
                raise DestinationError(DestinationProblem.NOT_MEMORY)
            # refusal: test_a_folder_that_can_be_written_is_refused
            if not os.fstatvfs(folder).f_flag & os.ST_RDONLY:
                raise ReceiptError(ReceiptProblem.MOUNT)
        yield folder
    finally:
        os.close(folder)


def read_receipt(folder: int) -> bytes:
    """The bytes of the receipt, at most one more than a receipt may have.

    Raises:
        ReceiptError: MISSING, or MALFORMED: no file.
        DestinationError: the kernel refused.
    """
    with translated():
        try:
            descriptor = os.open(RECEIPT_NAME, _FILE, dir_fd=folder)
        except FileNotFoundError:
            raise ReceiptError(ReceiptProblem.MISSING) from None
        with open(descriptor, "rb") as file:
            # refusal: test_a_receipt_that_is_no_file_is_malformed
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ReceiptError(ReceiptProblem.MALFORMED)
            return file.read(MAX_RECEIPT_BYTES + 1)


def list_files(folder: int) -> tuple[LoadedFile, ...]:
    """Every file of the model that lies in the folder, in any order.

    Raises:
        ReceiptError: FILES: something else lies there too, or what cannot be a model's; FILE_MODE: it may be written.
        DestinationError: the kernel refused.
    """
    with translated():
        # refusal: test_nothing_may_lie_beside_the_model
        if not set(os.listdir(folder)) <= {MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME}:
            raise ReceiptError(ReceiptProblem.FILES)
        found: list[LoadedFile] = []
        device = os.fstat(folder).st_dev
        _enter(folder, PUBLISHED_NAME, "", device, found)
        return tuple(found)


def _enter(parent: int, name: str, path: str, device: int, found: list[LoadedFile]) -> None:
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        raise ReceiptError(ReceiptProblem.FILES) from None
    try:
        _check(os.fstat(folder), device, _FOLDER_WRITABLE)
        names = os.listdir(folder)
        # refusal: test_what_no_model_has_is_refused
        if not names:
            raise ReceiptError(ReceiptProblem.FILES)
        for entry in names:
            below = f"{path}{entry}"
            # refusal: test_what_no_model_has_is_refused test_there_are_not_more_files_than_a_model_may_have
            if len(os.fsencode(below)) > MAX_PATH_BYTES or len(found) >= MAX_FILES:
                raise ReceiptError(ReceiptProblem.FILES)
            status = os.stat(entry, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                _enter(folder, entry, f"{below}/", device, found)
                continue
            # A link leads elsewhere, a device is somebody's, and with a second name a file can be changed from there.
            # refusal: test_what_no_model_has_is_refused
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise ReceiptError(ReceiptProblem.FILES)
            _check(status, device, _FILE_WRITABLE)
            found.append(LoadedFile(below, status.st_size))
    finally:
        os.close(folder)


def _check(status: os.stat_result, device: int, writable: int) -> None:
    # refusal: test_commands_exec.py::test_a_mount_inside_the_model_is_refused
    if status.st_dev != device:  # mounted over it
        raise ReceiptError(ReceiptProblem.FILES)
    # refusal: test_a_model_that_may_be_written_is_refused
    if status.st_mode & writable:
        raise ReceiptError(ReceiptProblem.FILE_MODE)
