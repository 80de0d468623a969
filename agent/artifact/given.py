"""Whose a given directory is: the mark in it, its lock, and how what a dead agent left is removed.

A given directory is somebody else's tmpfs: the kernel frees nothing there when an agent is killed. So an agent makes the folder
`.keyturn` first and holds a lock on it for as long as it or its supervisor lives. A mark that nobody has locked is a dead
agent's, and so are the plaintext in it and the `model` beside it.

A model may also be spread: its files lie in the folder itself, and in the end without a mark, because a server that looks there
may take any folder for a model. Then the file `.keyturn-spread` says that all of them are an agent's: the folder was empty when
it came. Standard library only, because the supervisor imports it.
"""

import errno
import fcntl
import os
import shutil
import stat
import time
from contextlib import suppress

MARK_NAME = ".keyturn"
"""In it lies the model until it is complete. Mode 0700."""
PUBLISHED_NAME = "model"
RECEIPT_NAME = "receipt.cbor"
"""Of an agent that leaves the model to others; appears after it, as the last."""
SPREAD_NAME = ".keyturn-spread"

BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""Drawn by the guest's kernel when it started, and the same in every container."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 20
_PAUSE_S = 0.05  # whoever only looks, or wipes, is done by then


def acquire(folder: int) -> int:
    """Make the mark ours, and remove what a dead agent left.

    Args:
        folder: descriptor of the given directory.

    Returns:
        The mark. Whoever holds this descriptor, or a copy of it, holds the lock.

    Raises:
        BlockingIOError: a living agent's.
        OSError: the kernel refused.
    """
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            os.mkdir(MARK_NAME, 0o700, dir_fd=folder)
        mark = _locked(folder)
        if mark is not None:
            try:
                _empty(folder, mark)
            except BaseException:
                os.close(mark)
                raise
            return mark
        time.sleep(_PAUSE_S)
    raise BlockingIOError(errno.EAGAIN, MARK_NAME)


def release(folder: int, mark: int) -> None:
    """Remove the model, then the mark; without it nobody would know whose the model is. The descriptors stay open.

    Raises:
        OSError: something cannot be removed; then the mark stays.
    """
    _empty(folder, mark)
    with suppress(FileNotFoundError):  # a spread model has none
        os.rmdir(MARK_NAME, dir_fd=folder)


def folder_digest(folder: int, boot_id_file: str = BOOT_ID) -> bytes:
    """Which folder this is, of which start of which guest: SHA-256 over the kernel's boot id, device and inode, 32 bytes.

    The same in every container that has the folder mounted; another one of a copy, and of any folder after a restart.

    Raises:
        OSError: the kernel refused.
    """
    with open(boot_id_file, "rb") as file:
        boot_id = file.read(64).strip()
    status = os.fstat(folder)
    import hashlib  # not for the supervisor, which would hold OpenSSL for nothing: 3 MiB

    return hashlib.sha256(boot_id + status.st_dev.to_bytes(8) + status.st_ino.to_bytes(8)).digest()


def leave_receipt(folder: int, mark: int, receipt: bytes) -> None:
    """Let the receipt appear beside the model, whole and for reading only.

    Args:
        folder: descriptor of the given directory.
        mark: ours.
        receipt: of the model that is there.

    Raises:
        OSError: the kernel refused.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(RECEIPT_NAME, flags, 0o600, dir_fd=mark), "wb") as file:
        file.write(receipt)
        os.fchmod(file.fileno(), 0o444)
    os.rename(RECEIPT_NAME, RECEIPT_NAME, src_dir_fd=mark, dst_dir_fd=folder)


def wipe(path: str) -> None:
    """Remove what a dead agent left in the directory at `path`, if one did. A living agent's is left alone.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        folder = os.open(path, _FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        mark = _locked(folder)
        if mark is None and {MARK_NAME, SPREAD_NAME} & set(os.listdir(folder)) == {SPREAD_NAME}:
            mark = acquire(folder)
        if mark is not None:
            try:
                release(folder, mark)
            finally:
                os.close(mark)
    finally:
        os.close(folder)


def spread(folder: int, mark: int) -> None:
    """Publish the complete model file by file, in the folder itself, where its readers look once they may.

    Raises:
        OSError: the kernel refused; what was moved is the agent's all the same.
    """
    os.close(os.open(SPREAD_NAME, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400, dir_fd=folder))
    model = os.open(PUBLISHED_NAME, _FOLDER, dir_fd=mark)
    try:
        for name in os.listdir(model):
            os.rename(name, name, src_dir_fd=model, dst_dir_fd=folder)
    finally:
        os.close(model)
    os.rmdir(PUBLISHED_NAME, dir_fd=mark)
    os.rmdir(MARK_NAME, dir_fd=folder)


def strangers(folder: int) -> set[str]:
    """What lies in the folder and is no agent's."""
    names = set(os.listdir(folder))
    if SPREAD_NAME in names:
        return set()
    return names - {MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME} if MARK_NAME in names else names


def is_held(folder: int) -> bool:
    """Is the mark in this directory a living agent's?"""
    mark = _locked(folder)
    if mark is not None:
        os.close(mark)
    return mark is None and MARK_NAME in os.listdir(folder)


def _locked(folder: int) -> int | None:
    """The mark with its lock; None: there is no mark, or somebody else has the lock."""
    try:
        mark = os.open(MARK_NAME, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock its owner may have removed it.
        if os.path.samestat(os.fstat(mark), os.stat(MARK_NAME, dir_fd=folder, follow_symlinks=False)):
            return mark
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(mark)
        raise
    os.close(mark)
    return None


def _empty(folder: int, mark: int) -> None:
    names = set(os.listdir(folder))
    if SPREAD_NAME in names:
        for name in names - {MARK_NAME, SPREAD_NAME}:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        os.unlink(SPREAD_NAME, dir_fd=folder)  # last: until then everything is an agent's
    for parent in (folder, mark):
        with suppress(FileNotFoundError):
            os.unlink(RECEIPT_NAME, dir_fd=parent)
        with suppress(FileNotFoundError):
            shutil.rmtree(PUBLISHED_NAME, dir_fd=parent)
