"""Signals and kills in every stage, and faces that cannot be written."""

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from agent.errors import BootInterruptedError, ConfigError, ConfigProblem, ServerExitedError, WorkerLostError
from tests.faults.table import SERVED, Attempts, Fault, FaultWorld
from tests.range_server import Fault as Store
from tests.range_server import RangeServer
from tests.world import Agent, Outcome

NEVER, ONCE, EITHER = Attempts.NEVER, Attempts.ONCE, Attempts.EITHER


def worker_of(agent: Agent) -> int:
    pid = agent.process.pid
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(worker)


def _at(event: str, number: int = signal.SIGTERM) -> Callable[[FaultWorld, Agent], Outcome]:
    """A signal to the supervisor as soon as this event is told."""

    def during(_: FaultWorld, agent: Agent) -> Outcome:
        agent.wait_for(event)
        return agent.stop(number)

    return during


def _kill_worker_at(event: str, number: int) -> Callable[[FaultWorld, Agent], Outcome]:
    def during(_: FaultWorld, agent: Agent) -> Outcome:
        agent.wait_for(event)
        os.kill(worker_of(agent), number)
        return agent.wait()

    return during


def silent_broker(world: FaultWorld) -> None:
    """Takes connections and never says a word."""
    listener = world.undo.enter_context(socket.create_server(("127.0.0.1", 0)))
    world.broker_config |= {"endpoints": [f"127.0.0.1:{listener.getsockname()[1]}"], "timeout_s": 3600}


def dripping_store(world: FaultWorld) -> None:
    world.artifact["source"] = world.undo.enter_context(RangeServer(world.layout, Store.DRIP_BODY)).url


def silent_store(world: FaultWorld) -> None:
    world.artifact["source"] = world.undo.enter_context(RangeServer(world.layout, Store.SILENT)).url


def server_that_is_never_ready(world: FaultWorld) -> None:
    world.set_behaviour("never-ready")
    world.server["ready_timeout_s"] = 600


def nowhere(world: FaultWorld) -> None:
    world.tee["wait_s"] = 600
    world.tee["attester"] = "snp"


def _interrupted(
    name: str,
    arrange: Callable[[FaultWorld], object],
    event: str,
    number: int = signal.SIGTERM,
    *,
    served: bool = False,
    attempts: Attempts = EITHER,
    broker: bool = True,
    wrapper: tuple[str, ...] = (),
) -> Fault:
    return Fault(
        name,
        BootInterruptedError,
        arrange,
        {"signal": number},
        SERVED if served else None,
        attempts,
        _at(event, number),
        broker,
        wrapper=wrapper,
    )


def _lost(
    name: str,
    arrange: Callable[[FaultWorld], object],
    event: str,
    number: int,
    *,
    attempts: Attempts = EITHER,
    broker: bool = True,
) -> Fault:
    fields = {"signal": number, "status": 0}
    return Fault(name, WorkerLostError, arrange, fields, None, attempts, _kill_worker_at(event, number), broker)


def health_address_in_use(world: FaultWorld) -> None:
    world.undo.enter_context(socket.create_server(("127.0.0.1", world.health_port)))


def status_on_a_full_disk(world: FaultWorld) -> None:
    """It is told on the other faces, and stops nothing: here the boot ends by its server."""
    folder = world.folder / "status"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "keyturn-full", folder], check=True)
    world.undo.callback(lambda: subprocess.run(["umount", folder], check=True))
    (folder / "full").write_bytes(bytes(4096))
    world.set_behaviour("die")
    world.server["max_restarts"] = 0


def status_untold(_: FaultWorld, agent: Agent) -> Outcome:
    assert agent.wait_for("status_unwritable")["code"] == errno.ENOSPC
    return agent.wait()


ROWS = [
    _interrupted("SIGTERM while the TEE is waited for", nowhere, "waiting_for", attempts=NEVER),
    _interrupted("SIGTERM while the broker is silent", silent_broker, "requested", attempts=EITHER, broker=False),
    _interrupted("SIGINT while the broker is silent", silent_broker, "requested", signal.SIGINT, broker=False),
    _interrupted("SIGHUP while the broker is silent", silent_broker, "requested", signal.SIGHUP, broker=False),
    _interrupted("SIGTERM after the verdict", silent_store, "verdict_accepted"),
    _interrupted("SIGTERM while the store is silent", silent_store, "requested"),
    _interrupted("SIGTERM after the gate", dripping_store, "gate_passed", served=True, attempts=ONCE),
    _interrupted("SIGTERM while the server starts", server_that_is_never_ready, "server_started", served=True, attempts=ONCE),
    _interrupted("SIGINT while the server starts", server_that_is_never_ready, "server_started", signal.SIGINT, served=True),
    _lost("worker killed while the broker is silent", silent_broker, "requested", signal.SIGKILL, broker=False),
    _lost("worker killed after the verdict", silent_store, "verdict_accepted", signal.SIGKILL),
    _lost("worker killed while it opens the model", dripping_store, "gate_passed", signal.SIGKILL, attempts=ONCE),
    _lost("worker that dies of SIGSEGV", silent_broker, "requested", signal.SIGSEGV, broker=False),
    _lost("worker that dies of SIGABRT while it opens the model", dripping_store, "gate_passed", signal.SIGABRT, attempts=ONCE),
    Fault(
        "status file on a full disk",
        ServerExitedError,
        status_on_a_full_disk,
        {"status": 3},
        SERVED,
        ONCE,
        status_untold,
        needs_root=True,
    ),
    Fault("health address in use", ConfigError, health_address_in_use, {"problem": ConfigProblem.ADDRESS}, [], NEVER),
]
