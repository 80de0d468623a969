"""From what the worker hands over to paths the model server can open: the model, and scratch space beside it.

Owns the mount points in the supervisor's private mount namespace, and what the worker's last record says. Every step leaves
its compensation on the caller's stack. Standard library only, because the supervisor imports it.
"""

import errno
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass

from agent.artifact import DestinationKind, ServedModel, given
from agent.errors import DestinationError, DestinationProblem
from agent.guest import device_mapper, mounts
from agent.lease import Lease
from agent.server import Placement, ServerPlan

RUN_DIRECTORY = "/run/keyturn"
_MODEL, _SCRATCH = "model", "scratch"
GONE_S = 5.0
"""For the devices of a volume to end after its last user."""
_LOOK_S = 0.01
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # a private folder is made in it


@dataclass(frozen=True, slots=True)
class HandedModel:
    """An open model on its way from worker to supervisor.

    Attributes:
        directory: DIRECTORY destinations only: where the files lie.
        single_file: its path below the model's root, when there is only one.
        descriptors: as `LoadedArtifact.descriptors`; ours now.
        served: which model it is.
        lease: of its key; None: it may be used without end.
        watch_gpus: it is served with GPUs.
        simulated_machine: the folder of the simulated machine they belong to.
        release: its files are unlinked once the server is ready.
    """

    plan: ServerPlan
    destination: DestinationKind
    directory: str | None
    single_file: str | None
    descriptors: tuple[int, ...]
    served: ServedModel
    lease: Lease | None
    watch_gpus: bool
    simulated_machine: str | None
    release: bool = False

    def record(self) -> dict[str, object]:
        """For the channel; the descriptors travel beside it."""
        return {
            "plan": self.plan.to_json(),
            "destination": self.destination.value,
            "directory": self.directory,
            "single_file": self.single_file,
            "manifest_digest": self.served.manifest_digest,
            "version": self.served.version,
            "lease_s": self.lease.seconds if self.lease else None,
            "lease_since": self.lease.since if self.lease else None,
            "watch_gpus": self.watch_gpus,
            "simulated_machine": self.simulated_machine,
            "release": self.release,
        }

    @classmethod
    def of(cls, record: object, descriptors: tuple[int, ...]) -> "HandedModel":
        """The inverse of `record`. Raises ValueError, KeyError, TypeError or OverflowError: not what our worker sends."""
        if not isinstance(record, dict):
            raise ValueError("record")
        return cls(
            plan=ServerPlan.from_json(record["plan"]),
            destination=DestinationKind(record["destination"]),
            directory=record["directory"],
            single_file=record["single_file"],
            descriptors=descriptors,
            served=ServedModel(str(record["manifest_digest"]), int(record["version"])),
            lease=None if record["lease_s"] is None else Lease(int(record["lease_s"]), float(record["lease_since"])),
            watch_gpus=bool(record["watch_gpus"]),
            simulated_machine=record["simulated_machine"],
            release=bool(record["release"]),
        )


def make_mount_points() -> None:
    """Make the folders that model and scratch space are attached to; others may walk through them, nobody may write.

    Raises:
        OSError: there is no writable /run.
    """
    for path in (RUN_DIRECTORY, *(f"{RUN_DIRECTORY}/{name}" for name in (_MODEL, _SCRATCH))):
        os.makedirs(path, exist_ok=True)
        # Whatever our umask is: the server's user walks here, and what is mounted has a mode of its own.
        os.chmod(path, 0o755)  # noqa: S103


def take_over(model: HandedModel, undo: ExitStack) -> None:
    """From now on it is ours to free: its descriptors, or its folder. To be called as soon as it arrives."""
    if model.destination is DestinationKind.VOLUME:
        undo.callback(wait_until_gone, _devices_below(model.descriptors[0]))
    for descriptor in model.descriptors:
        undo.callback(os.close, descriptor)
    if model.directory is not None:
        (mark,) = model.descriptors
        folder = os.open(os.path.dirname(model.directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, folder)
        undo.callback(given.release, folder, mark)


def _devices_below(mount: int) -> list[str]:
    """The devices of a volume in sysfs: that of its file system, and what it is made of."""
    device = os.fstat(mount).st_dev
    verified = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    return [verified, *(f"/sys/class/block/{name}" for name in os.listdir(f"{verified}/slaves"))]


def wait_until_gone(devices: list[str], within_s: float = GONE_S) -> None:
    """The kernel removes them by itself, in a moment, with key and pages. Raises OSError: EBUSY, somebody holds the volume."""
    for _ in range(max(1, round(within_s / _LOOK_S))):
        if not any(map(os.path.exists, devices)):
            return
        time.sleep(_LOOK_S)
    # refusal: test_a_volume_that_somebody_holds_is_not_wiped
    raise OSError(errno.EBUSY, "volume")


def publish(model: HandedModel, private_mounts: bool, undo: ExitStack) -> Placement:
    """Give model and scratch space their paths.

    Args:
        model: taken over before.
        private_mounts: this process has a mount namespace of its own.
        undo: gets every compensation.

    Raises:
        DestinationError: the kernel refused.
    """
    try:
        scratch = _make_scratch(model.plan, private_mounts, undo)
        if model.destination is DestinationKind.MEMFD:
            (memfd,) = model.descriptors
            return Placement(f"/proc/self/fd/{memfd}", None, scratch, (memfd,), private_mounts)
        if model.destination in (DestinationKind.TMPFS, DestinationKind.VOLUME):
            if not private_mounts:
                raise PermissionError(errno.EPERM, "mount namespace")
            root = _attach(model.descriptors[0], _MODEL, undo)
        else:
            assert model.directory is not None
            root = model.directory
    except OSError as error:
        raise DestinationError(DestinationProblem.KERNEL, error.errno or 0) from error
    file = f"{root}/{model.single_file}" if model.single_file else root
    return Placement(file, root, scratch, private_mounts=private_mounts)


def is_damaged(model: HandedModel) -> bool:
    """Has the kernel met a block of a volume that does not authenticate? To its reader it was an error. Raises OSError."""
    if model.destination is not DestinationKind.VOLUME:
        return False
    device = os.fstat(model.descriptors[0]).st_dev
    with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm/name") as name:
        status = device_mapper.status_of(name.read().strip(), memoryview(bytearray(device_mapper.BUFFER_BYTES)))
    return status == device_mapper.CORRUPTED


def release(model: HandedModel) -> int:
    """Unlink the files of a published model; what the server has open or mapped stays until it lets go. Returns how many.

    Raises:
        DestinationError: the kernel refused, or they lie in a memfd, which its server holds.
    """
    files = 0
    try:
        if model.destination is DestinationKind.TMPFS:
            mounts.set_writable(model.descriptors[0])  # for us: the server sees it through a mount of its own, or as nobody
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=model.descriptors[0])
        elif model.directory is not None:
            root = os.open(model.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            raise DestinationError(DestinationProblem.HELD)
        try:
            for _, _, names, folder in os.fwalk(".", dir_fd=root, onerror=_stop_walking):
                for name in names:
                    os.unlink(name, dir_fd=folder)
                    files += 1
        finally:
            os.close(root)
            if model.destination is DestinationKind.TMPFS:
                mounts.set_read_only(model.descriptors[0])
    except OSError as error:
        raise DestinationError(DestinationProblem.KERNEL, error.errno or 0) from error
    return files


def _stop_walking(error: OSError) -> None:
    raise error


def _make_scratch(plan: ServerPlan, private_mounts: bool, undo: ExitStack) -> str:
    """A writable, executable place for the server's caches: a mount of our own where we may, else in shared memory."""
    if private_mounts:
        uid, gid = _owner(plan)
        made = mounts.detached_tmpfs(plan.scratch_max_bytes, gid, 0o700, uid=uid, executable=True, huge_pages=False)
        try:
            return _attach(made.fd, _SCRATCH, undo)
        finally:
            os.close(made.fd)
    path = f"{SHARED_MEMORY}/keyturn-{os.urandom(8).hex()}"
    os.mkdir(path, 0o700)
    uid, gid = _owner(plan)
    undo.callback(_remove_scratch, path, uid)
    os.chown(path, uid, gid)
    return path


def _remove_scratch(path: str, uid: int) -> None:
    """As the server's user: root without CAP_DAC_OVERRIDE, as in a container, does not get into the server's folders."""
    us = os.geteuid()
    # refusal: test_scratch_goes_with_the_boot_when_root_may_not_look_into_it
    os.seteuid(uid)
    try:
        shutil.rmtree(path)
    finally:
        os.seteuid(us)


def _owner(plan: ServerPlan) -> tuple[int, int]:
    """User and group of the server."""
    return (os.geteuid() if plan.uid is None else plan.uid, os.getegid() if plan.gid is None else plan.gid)


def _attach(mount: int, name: str, undo: ExitStack) -> str:
    target = f"{RUN_DIRECTORY}/{name}"
    mounts.attach(mount, target)
    undo.callback(mounts.detach, target)
    return target
