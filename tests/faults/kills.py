"""The kill matrix: SIGKILL of worker, supervisor or server at every stage boundary and at any moment.

Nobody can clean up after a SIGKILL but the kernel and the next start. With an own tmpfs or a sealed memfd nothing may be left
two seconds later; a given directory is empty once an agent has been started again.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import AgentError, ServerExitedError, VmRestartRequiredError, WorkerLostError
from tests.faults.table import WRITTEN, FaultWorld, Finding
from tests.faults.watch import Before, Watcher, descendants
from tests.range_server import Fault, RangeServer
from tests.world import Agent

_STAGES = (
    "config_found",
    "local_checks_passed",
    "requested",
    "destination_chosen",
    "verdict_accepted",
    "release_measured",
    "gate_passed",
)
BOUNDARIES = {
    "worker": _STAGES,
    "supervisor": ("boot_started", *_STAGES, "worker_ended", "server_started", "server_ready"),
    "server": ("server_started", "server_ready"),
}
LONGEST_BOOT_S = 1.2
"""A random kill comes within this time: a boot of these tests is over then, mostly, and the server serves."""
LARGE_BYTES = 96 << 20
LOAD_S = 0.8
"""A load of so many bytes from a store that takes a tenth of a second for each MiB and connection lasts longer than this."""


@dataclass(frozen=True)
class Kill:
    """One run.

    Attributes:
        at: the event after which it is killed, or seconds after the start.
        destination: of the configuration.
        loading_s: for a worker that opens a large model from a slow store: seconds after its first segment is open.
    """

    victim: str
    at: str | float
    destination: str
    loading_s: float | None = None

    def __str__(self) -> str:
        later = "" if self.loading_s is None else f" + {self.loading_s} s"
        return f"{self.victim} {'at' if isinstance(self.at, str) else 'after'} {self.at}{later}, {self.destination}"


def matrix() -> list[Kill]:
    """Every victim at every boundary."""
    return [
        Kill(victim, event, destination)
        for destination in ("tmpfs", "memfd", "directory")
        for victim, events in BOUNDARIES.items()
        for event in events
        if destination != "directory" or event in ("gate_passed", "server_started", "server_ready")
    ]


def at_random(count: int, seed: str) -> list[Kill]:
    """Any victim at any moment."""
    draw = random.Random(seed)
    return [
        Kill(draw.choice(list(BOUNDARIES)), round(draw.uniform(0, LONGEST_BOOT_S), 3), draw.choice(("tmpfs", "memfd")))
        for _ in range(count)
    ]


def in_mid_load(count: int, seed: str) -> list[Kill]:
    """A worker that has the key and opens segments, some of them open already."""
    draw = random.Random(seed)
    return [Kill("worker", "gate_passed", ("tmpfs", "memfd")[i % 2], round(draw.uniform(0, LOAD_S), 3)) for i in range(count)]


def run(kill: Kill, folder: Path, silicon: Path) -> Finding:
    """Kill, and see what is left."""
    with ExitStack() as undo:
        large = {} if kill.loading_s is None else {"model_bytes": LARGE_BYTES}
        world = FaultWorld(folder, silicon, undo, **large)
        world.artifact["destination"] = kill.destination
        world.server["max_restarts"] = 0
        given = Path("/dev/shm") / f"keyturn-kill-{os.getpid()}"
        if kill.destination == "directory":
            given.mkdir()
            undo.callback(shutil.rmtree, given, ignore_errors=True)
            world.artifact["directory"] = str(given)
        if kill.victim == "worker" and isinstance(kill.at, str):  # or it would have ended before it is killed
            fault = Fault.DRIP_BODY if kill.loading_s is None else Fault.SLOW
            world.artifact["source"] = undo.enter_context(RangeServer(world.layout, fault)).url
        config = world.prepare()
        world.start_broker()
        before = Before(world.folder)
        agent = world.start_agent(config, flags=("--health", f"127.0.0.1:{world.health_port}"))
        watcher = Watcher(agent.process.pid, agent.status_file, world.health_port, world.canaries)
        watcher.start()
        try:
            error = _kill(kill, agent)
        finally:
            watcher.stop()
        residue = before.residue(WRITTEN, in_process=False)
        if kill.destination == "directory":
            if kill.victim == "supervisor":  # nobody was left to remove it
                assert list(given.iterdir())
                again = world.start_agent(config).wait()  # a second boot in one guest ends at the gate, and removes it before
                assert again.failure["class"] == VmRestartRequiredError.__name__
            residue += [f"file {path.name} of the given directory" for path in given.rglob("*")]
        leaks = watcher.leaks | before.leaks(world.canaries)
    found = [line for line in residue if not line.startswith(_HALF_A_STATUS)]
    name, owner = (error.__name__, error.owner.value) if error else ("", "")  # the victim tells nothing
    return Finding("kills", str(kill), name, owner, 0, found, sorted(leaks))


_HALF_A_STATUS = "file status/.status.json."
"""A status that was being written. It holds what the status holds."""


def _kill(kill: Kill, agent: Agent) -> type[AgentError] | None:
    """Returns the error that the agent ended with; None where it was the victim, or its victim had ended before."""
    if isinstance(kill.at, str):
        agent.wait_for(kill.at)
        if kill.loading_s is not None:
            while not _open_bytes(agent):
                time.sleep(0.01)
            time.sleep(kill.loading_s)
            assert _open_bytes(agent) < LARGE_BYTES, "it was not loading any more"
    else:
        time.sleep(kill.at)
    if kill.victim == "supervisor":
        agent.process.kill()
        agent.process.communicate()
        return None
    if not _kill_child(agent.process.pid, of_server=kill.victim == "server"):
        assert not isinstance(kill.at, str), "its victim was not there"
        agent.stop()
        return None
    if kill.victim == "worker" and not isinstance(kill.at, str):  # or was it the one that asks whether the server is ready?
        outcome = agent.stop()
        return WorkerLostError if outcome.status else None
    outcome = agent.wait()
    expected = WorkerLostError if kill.victim == "worker" else ServerExitedError
    assert outcome.failure["class"] == expected.__name__
    assert outcome.failure["fields"]["signal"] == signal.SIGKILL
    return expected


def _open_bytes(agent: Agent) -> int:
    """Of the model's plaintext, as the status says it."""
    assert agent.process.poll() is None
    stages = json.loads(agent.status_file.read_bytes())["stages"]
    return max((stage["bytes"] or 0 for stage in stages if stage["name"] == "load"), default=0)


def _kill_child(pid: int, *, of_server: bool) -> bool:
    """Kill a process below `pid`: the server has a session of its own, the worker has not."""
    for child in descendants(pid):
        with suppress(ProcessLookupError):
            if (os.getsid(child) != os.getsid(pid)) == of_server:
                os.kill(child, signal.SIGKILL)
                return True
    return False
