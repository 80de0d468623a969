"""Faults of guest memory and of where plaintext goes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from agent.artifact.memory import choose_destination, demand_of
from agent.errors import (
    DestinationError,
    DestinationProblem,
    InsufficientMemoryError,
    LeaseEndedError,
    MemoryLimit,
    SwapActiveError,
)
from agent.guest.memory_info import MemoryInfo
from tests.faults.table import SERVED, Attempts, Fault, FaultWorld
from tests.range_server import Fault as Store
from tests.range_server import RangeServer


def too_little_memory(world: FaultWorld) -> None:
    world.artifact["headroom_mib"] = 1 << 20


def _given(make: Callable[[FaultWorld], Path]) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.artifact |= {"destination": "directory", "directory": str(make(world))}

    return arrange


def on_a_disk(world: FaultWorld) -> Path:
    folder = world.folder / "given"
    folder.mkdir()
    return folder


def absent(world: FaultWorld) -> Path:
    return world.folder / "absent"


def in_use(world: FaultWorld) -> Path:
    folder = Path("/dev/shm") / f"keyturn-fault-{os.getpid()}"
    folder.mkdir()
    world.undo.callback(shutil.rmtree, folder, ignore_errors=True)
    (folder / "somebody's").write_text("file")
    return folder


def memfd(world: FaultWorld) -> None:
    world.artifact["destination"] = "memfd"


def with_swap(world: FaultWorld) -> object:
    """A guest with a swap partition, and a destination that the kernel may swap."""
    proc = world.folder / "proc"
    proc.mkdir()
    (proc / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/vdb\tpartition\t1048572\t0\t-2\n")
    return choose_destination(
        "memfd", None, demand_of({"model": 4096}), None, allow_swap=False, memory=MemoryInfo(proc, world.folder / "sys")
    )


def lease_shorter_than_the_boot(world: FaultWorld) -> None:
    world.artifact["source"] = world.undo.enter_context(RangeServer(world.layout, Store.DRIP_BODY)).url
    world.row["lease_s"] = 1


ROWS = [
    Fault("too little memory", InsufficientMemoryError, too_little_memory, {"limit": MemoryLimit.AVAILABLE}),
    Fault("given directory on a disk", DestinationError, _given(on_a_disk), {"problem": DestinationProblem.NOT_MEMORY}),
    Fault("given directory that is not there", DestinationError, _given(absent), {"code": errno.ENOENT}),
    Fault("given directory that is in use", DestinationError, _given(in_use), {"problem": DestinationProblem.NOT_EMPTY}),
    Fault("memfd for several files", DestinationError, memfd, {"problem": DestinationProblem.MANY_FILES}, files=2),
    Fault("active swap", SwapActiveError, drive=with_swap, may_stay=frozenset({"proc/swaps"})),
    Fault(
        "lease that ends during the boot", LeaseEndedError, lease_shorter_than_the_boot, {"lease_s": 1}, SERVED, Attempts.ONCE
    ),
]
