"""A model on an encrypted disk: dm-crypt, dm-verity over it, EROFS on top, and the kernel opens page by page what is read.

For models that are larger than memory should hold twice, or that take too long to open: nothing is read ahead and nothing is
copied. Pages live in the kernel's page cache, from where they are dropped, never written. `FORMAT.md`, "Encrypted volume".

`prepare` needs no key: the manifest is authenticated, the disk with its UUID is found, its LUKS2 header is copied once and must
say what the manifest says. `load` checks the key's commitment and makes the two devices. Their tables come from the manifest
alone, so that what the host writes over the header afterwards reaches nobody. A block that the provider did not seal is an I/O
error for whoever reads it: the first of them, the file system's own, here.
"""

import hmac
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from agent.artifact import DescribedModel, DestinationKind, LoadedArtifact, LoadedFile
from agent.artifact import volume_config as v
from agent.artifact.luks2 import BINARY_BYTES, KEY_BYTES, look, parse_luks2
from agent.artifact.memory import swap_is_active
from agent.artifact.stream import key_commitment
from agent.config import ArtifactConfig
from agent.errors import (
    KeyMismatchError,
    RollbackError,
    SwapActiveError,
    VolumeAuthenticationError,
    VolumeProblem,
    VolumeUnavailableError,
)
from agent.guest import device_mapper, mounts
from agent.guest.memory_info import MemoryInfo
from agent.keys import ReleasedKey, SecretBuffer

DISK_WAIT_S = 10.0
"""For the disk to appear, as for the one with the initdata."""
LOOK_S = 0.25

_T = TypeVar("_T")
_DISK = re.compile(r"(vd|sd|xvd)[a-z]+[0-9]*|nvme[0-9]+n[0-9]+(p[0-9]+)?")


class Volume:
    """As a destination: what the boot says of where plaintext lies."""

    kind = DestinationKind.VOLUME
    folder_digest: bytes | None = None
    noswap = True  # clean pages of a file system: dropped and read again, never swapped


class PreparedVolume:
    """A volume with an authenticated manifest, and the disk of it. Only `prepare` makes one, and its undo stack closes it."""

    def __init__(
        self, manifest_digest: str, volume: v.VolumeConfig, disk: int, timeout_s: float, *, swap_active: bool, allow_swap: bool
    ) -> None:
        self.manifest_digest = manifest_digest
        self.timeout_s = timeout_s
        self.volume = volume
        self.disk = disk
        self.swap_active = swap_active
        self.allow_swap = allow_swap
        self.destination = Volume()
        self.total_plaintext_bytes = volume.data_bytes
        self.mount: int | None = None
        self._closed = False

    @property
    def described(self) -> DescribedModel:
        """As `load.Prepared.described`; which files are in it is not known before it is open."""
        return DescribedModel(self.volume.model_name, self.volume.version, self.manifest_digest, ())

    def check(self) -> None:
        """As `load.Prepared.check`. Nothing is fetched ahead, so there is nothing to tell."""

    def close(self) -> None:
        """Let go of disk and mount; the kernel takes the devices with them. May be called again."""
        if not self._closed:
            self._closed = True
            os.close(self.disk)
            if self.mount is not None:
                os.close(self.mount)


def prepare(
    volume: v.VolumeConfig,
    config: ArtifactConfig,
    undo: ExitStack,
    stop: threading.Event,
    *,
    allow_swap: bool,
    memory: MemoryInfo,
    wait_s: float = DISK_WAIT_S,
    root: Path = Path("/"),
) -> PreparedVolume:
    """What needs no key, once `volume` is authenticated: the disk, and what stands in its header. Blocking; `stop` ends it.

    Raises:
        VolumeUnavailableError: no disk, or several, with the manifest's UUID, or one that is too small, or does not answer
            within `config.timeout_s`.
        VolumeHeaderError: its header is not allowed, or not the manifest's.
        DestinationError: the kernel does not tell whether there is swap.
    """
    swap_active = swap_is_active(memory)
    device = Path(config.device) if config.device else None

    def find() -> int:
        disk = _wait_for_disk(volume.uuid, device, stop, wait_s, root)
        with _closed_on_error(disk):
            check_disk(disk, volume)
        return disk

    disk = _within(wait_s + config.timeout_s, stop, find)
    prepared = PreparedVolume(config.digest, volume, disk, config.timeout_s, swap_active=swap_active, allow_swap=allow_swap)
    undo.callback(prepared.close)
    return prepared


def look_for_volume(volume: v.VolumeConfig, config: ArtifactConfig) -> None:
    """Raise what a boot would, before it has a key: for whoever only wants to know. Raises as `prepare`."""
    with _kernel():
        os.close(os.open(device_mapper.CONTROL, os.O_RDWR | os.O_CLOEXEC))
    device = Path(config.device) if config.device else None

    def find() -> None:
        disk = find_disk(volume.uuid, device)
        if disk is None:
            raise VolumeUnavailableError(VolumeProblem.NOT_FOUND)
        with _closed_on_error(disk):
            check_disk(disk, volume)
        os.close(disk)

    _within(DISK_WAIT_S, threading.Event(), find)


def load(prepared: PreparedVolume, key: ReleasedKey, floor: int, stop: threading.Event) -> LoadedArtifact:
    """As `load.load`, blocking, without reading the model; `stop` ends it.

    Raises:
        KeyMismatchError, RollbackError, SwapActiveError: as `load.load`.
        VolumeAuthenticationError: the file system's own blocks are not the ones that were sealed.
        VolumeUnavailableError: the kernel refused, or the disk does not answer within `artifact.timeout_s`.
    """
    volume = prepared.volume
    # 1. The right key: with a wrong one, every block would look damaged.
    with key.secret.view() as secret:
        # refusal: test_a_wrong_key_opens_no_volume
        if not hmac.compare_digest(key_commitment(secret, volume.key_uri), volume.key_commitment):
            raise KeyMismatchError()
    # 2. Not older than the authority allows.
    # refusal: test_a_volume_below_the_floor_is_not_opened
    if volume.version < floor:
        raise RollbackError(volume.version, floor)
    # 3. Two devices and a mount, each held by the next.
    prepared.mount, files = _within(prepared.timeout_s, stop, lambda: _open(prepared, key))
    return LoadedArtifact(
        model_name=volume.model_name,
        manifest_digest=prepared.manifest_digest,
        version=volume.version,
        files=files,
        destination=DestinationKind.VOLUME,
        descriptors=(prepared.mount,),
        directory=None,
        noswap=True,
    )


# --- the disk ---------------------------------------------------------------------------------------------------------


def check_disk(disk: int, volume: v.VolumeConfig) -> None:
    """Copy the header of a disk, and check the copy. Nobody reads it again.

    Raises:
        VolumeHeaderError: it is not allowed, or not the manifest's.
        VolumeUnavailableError: the disk is too small, or cannot be read.
    """
    with _kernel():
        binary = os.pread(disk, BINARY_BYTES, 0)
        found = look(binary)
        copy = binary + (os.pread(disk, found[1] - BINARY_BYTES, BINARY_BYTES) if found else b"")
        size = os.lseek(disk, 0, os.SEEK_END)
    v.check_header(parse_luks2(copy), volume)
    # refusal: test_a_disk_that_ends_before_its_volume_is_refused
    if size < volume.data_offset + volume.segment_bytes:
        raise VolumeUnavailableError(VolumeProblem.TOO_SMALL)


def _wait_for_disk(uuid: str, device: Path | None, stop: threading.Event, wait_s: float, root: Path) -> int:
    deadline = time.monotonic() + wait_s
    while not stop.is_set():
        found = find_disk(uuid, device, root)
        if found is not None:
            return found
        if time.monotonic() >= deadline:
            raise VolumeUnavailableError(VolumeProblem.NOT_FOUND)
        stop.wait(LOOK_S)
    raise CancelledError


def find_disk(uuid: str, device: Path | None, root: Path = Path("/")) -> int | None:
    """The one disk or partition with this UUID in a LUKS2 header, open for reading; None without one.

    The UUID proves nothing: it is how a disk is found among those that the host has attached.

    Args:
        uuid: of the manifest.
        device: the only one to look at; None: every disk of virtio, SCSI, Xen and NVMe, and its partitions.
        root: the file system with `sys/class/block` and `dev`.

    Raises:
        VolumeUnavailableError: several have it.
    """
    if device is None:
        try:
            names = sorted(path.name for path in (root / "sys/class/block").iterdir())
        except OSError:  # no sysfs, or a kernel without block devices
            return None
        paths = [root / "dev" / name for name in names if _DISK.fullmatch(name)]
    else:
        paths = [device]
    found = [disk for path in paths if (disk := _open_if(path, uuid)) is not None]
    # refusal: test_two_disks_with_one_uuid_are_refused
    if len(found) > 1:
        for disk in found:
            os.close(disk)
        raise VolumeUnavailableError(VolumeProblem.SEVERAL)
    return found[0] if found else None


def _open_if(path: Path, uuid: str) -> int | None:
    try:
        disk = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if stat.S_ISBLK(os.fstat(disk).st_mode) or stat.S_ISREG(os.fstat(disk).st_mode):
            found = look(os.pread(disk, BINARY_BYTES, 0))
            if found is not None and found[0] == uuid:
                return disk
    except OSError:  # no medium, a disk that fails: not ours
        pass
    os.close(disk)
    return None


# --- devices and mount ------------------------------------------------------------------------------------------------


def _open(prepared: PreparedVolume, key: ReleasedKey) -> tuple[int, tuple[LoadedFile, ...]]:
    """The file system, detached and read-only, and its files. It holds dm-verity, that holds dm-crypt, that holds the disk."""
    volume = prepared.volume
    buffer, volume_key = SecretBuffer(device_mapper.BUFFER_BYTES), SecretBuffer(KEY_BYTES)
    name = f"keyturn-{os.urandom(8).hex()}"
    with ExitStack() as undo:
        undo.callback(buffer.wipe)
        undo.callback(volume_key.wipe)
        # The server's memory may be swapped where the configuration allows it, a key's never.
        # refusal: test_with_swap_the_key_of_a_volume_needs_a_lock
        locked = all(secret.locked for secret in (key.secret, buffer, volume_key))
        if prepared.swap_active and not prepared.allow_swap and not locked:
            raise SwapActiveError()
        table = undo.enter_context(buffer.view())
        with _kernel(), key.secret.view() as secret, volume_key.view() as derived:
            v.derive_key(secret, volume.key_uri, volume.uuid, derived)
            sectors, parameters = v.crypt_table(volume, device_mapper.number_of(prepared.disk))
            segment = device_mapper.map_device(f"{name}-crypt", "crypt", sectors, parameters, table, derived)
        undo.callback(os.close, segment)
        volume_key.wipe()  # the kernel has it; what follows waits for the disk
        with _kernel():
            sectors, parameters = v.verity_table(volume, device_mapper.number_of(segment))
            verified = device_mapper.map_device(f"{name}-verity", "verity", sectors, parameters, table)
        undo.callback(os.close, verified)
        try:
            mount = mounts.detached_read_only("erofs", device_mapper.path_of(verified))
            with _closed_on_error(mount):
                return mount, tuple(list_files(mount))
        except OSError as error:
            with _kernel():
                status = device_mapper.status_of(f"{name}-verity", table)
            if status == device_mapper.CORRUPTED:
                raise VolumeAuthenticationError() from None
            raise VolumeUnavailableError(VolumeProblem.KERNEL, error.errno or 0) from error


def list_files(mount: int) -> Iterator[LoadedFile]:
    """Every regular file of a mounted file system, in the order of its folders. Raises OSError."""
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    try:
        for folder, folders, names, descriptor in os.fwalk(".", dir_fd=root, onerror=_stop_walking):
            folders.sort()
            for name in sorted(names):
                entry = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISREG(entry.st_mode):
                    yield LoadedFile(os.path.normpath(os.path.join(folder, name)), entry.st_size)
    finally:
        os.close(root)


def _stop_walking(error: OSError) -> None:
    raise error


@contextmanager
def _kernel() -> Iterator[None]:
    """The kernel's refusal as ours."""
    try:
        yield
    except OSError as error:
        raise VolumeUnavailableError(VolumeProblem.KERNEL, error.errno or 0) from error


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _within(seconds: float, stop: threading.Event, work: Callable[[], _T]) -> _T:
    """What waits for the disk, which the host has: it may not answer for ever, and the kernel sets no deadline for that.

    So it is done by a thread that is left behind then. It has everything that it opened for itself, and ends with the worker,
    which a failed boot always does: these waits of the kernel end with SIGKILL.
    """
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  told to whoever waits
            outcome.set_exception(error)

    deadline = time.monotonic() + seconds
    threading.Thread(target=run, name="volume", daemon=True).start()
    while not wait([outcome], LOOK_S).done:
        if stop.is_set():
            raise CancelledError
        # refusal: test_a_disk_that_does_not_answer_is_not_waited_for_without_end
        if time.monotonic() >= deadline:
            raise VolumeUnavailableError(VolumeProblem.STALLED)
    return outcome.result()
