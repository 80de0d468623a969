"""The simulated configfs-tsm (`agent/sim/configfs.py`) in a child of a test, with the test's hand on it."""

import contextlib
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.demo.site import mount_configfs
from agent.errors import SimulationRefusedError
from agent.evidence import Tee
from agent.sim.configfs import ConfigfsServer
from agent.sim.fuse import serve
from agent.sim.machine import SimulatedMachine
from agent.sim.tsm import Faults, Tsm
from tests.children import readable
from tests.fuse import served

__all__ = ["FakeConfigfs", "Faults", "fake_configfs", "machine_configfs"]

MakeReport = Callable[[bytes, int], bytes]
"""What the firmware answers to 64 bytes and a privilege level."""


class FakeConfigfs:
    """The parent's hand on the server."""

    def __init__(self, root: Path, control: socket.socket) -> None:
        self.root = root
        self._control = control

    def set(self, faults: Faults) -> None:
        self._control.send(pickle.dumps(faults))

    def calls(self) -> list[str]:
        """What was asked since the last time, `firmware` for each request to the firmware, `inblob N` for each value taken
        over, `interrupt` for each signal that met somebody who waits."""
        self._control.send(pickle.dumps(None))
        assert readable(self._control.fileno())
        calls: list[str] = pickle.loads(self._control.recv(1 << 20))
        return calls

    def requests(self) -> int:
        """How many times the firmware was asked since the last call."""
        return self.calls().count("firmware")


@contextlib.contextmanager
def fake_configfs(mountpoint: Path, make: MakeReport) -> Iterator[FakeConfigfs]:
    """A mounted fake at a path of this process, or a skip."""

    def in_the_child(device: int, control: socket.socket) -> None:
        tsm = Tsm(lambda data, privlevel: (make(data, privlevel), b""))

        def obey() -> bool:
            message = control.recv(1 << 20)
            if not message:
                return False
            faults = pickle.loads(message)
            if faults is None:
                control.send(pickle.dumps(tsm.calls))
                tsm.calls = []
            else:
                tsm.faults = faults
            return True

        serve(device, ConfigfsServer(tsm, device).answer, control.fileno(), obey)

    with served(mountpoint, in_the_child) as (root, control):
        yield FakeConfigfs(root, control)


@contextlib.contextmanager
def machine_configfs(folder: Path, machine: SimulatedMachine, tee: Tee) -> Iterator[Path]:
    """The root of one before a machine, as the demo has it, or a skip."""
    with contextlib.ExitStack() as undo:
        try:
            root = undo.enter_context(mount_configfs(folder, machine, tee))
        except SimulationRefusedError as error:
            pytest.skip(str(error))
        yield root
