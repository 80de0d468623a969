"""Faults of the model server: it is missing, dies, hangs, is never ready, forks, floods; none of its words gets out."""

import ctypes
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

from agent.errors import (
    LeaseEndedError,
    ServerExitedError,
    ServerNotReadyError,
    ServerStartError,
    ServerStuckError,
    Unready,
    error_from_record,
    error_to_record,
)
from agent.guest.hardening import die_with_parent
from agent.server.process import fork, spawn
from tests.children import NOBODY, in_child, python, read_line
from tests.faults.table import SERVED, Attempts, Fault, FaultWorld
from tests.test_server_process import PLACE, running
from tests.world import Agent, Outcome, ask

ONCE = Attempts.ONCE


def _behaviour(name: str, **server: object) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.set_behaviour(name)
        world.server |= {"max_restarts": 0, "ready_timeout_s": 1} | server

    return arrange


def _command(*command: str) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.server["command"] = list(command)

    return arrange


def port_of_another_user(world: FaultWorld) -> None:
    listens = f"import socket, time; s = socket.create_server(('127.0.0.1', {world.port})); print(flush=True); time.sleep(3600)"
    foreign = subprocess.Popen([python(), "-I", "-c", listens], stdout=subprocess.PIPE, user=NOBODY)
    assert foreign.stdout
    world.undo.callback(foreign.stdout.close)
    world.undo.callback(foreign.wait)
    world.undo.callback(foreign.kill)
    assert foreign.stdout.readline()
    world.server |= {"ready_timeout_s": 1, "max_restarts": 0}
    world.set_behaviour("silent")


def crash_after_a_prompt(world: FaultWorld, agent: Agent) -> Outcome:
    """A prompt reaches the server, which writes it to its output and is then made to crash for good."""
    agent.wait_for("server_ready")
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=10)
    connection.request("POST", "/v1/embeddings", json.dumps({"input": world.canaries.prompt}))
    connection.getresponse().read()
    connection.close()
    with suppress(OSError):
        ask(world.port, "/crash")
    return agent.wait()


def crash_twice(world: FaultWorld, agent: Agent) -> Outcome:
    for _ in range(2):
        agent.wait_for("server_ready")
        with suppress(OSError):
            ask(world.port, "/crash")
    return agent.wait()


def one_restart(world: FaultWorld) -> None:
    world.server["max_restarts"] = 1


def no_more_restarts(world: FaultWorld) -> None:
    world.server["max_restarts"] = 0


def lease_of_three_seconds(world: FaultWorld) -> None:
    world.row["lease_s"] = 3


def broker_gone_while_serving(world: FaultWorld, agent: Agent) -> Outcome:
    agent.wait_for("server_ready")
    world.kill_broker()
    return agent.wait()


def survives_sigkill(_: FaultWorld) -> object:
    """What is traced stays a zombie until its tracer has seen its end; this one never looks."""

    def scenario() -> dict[str, object]:
        server = spawn(running("import signal; signal.pause()"), PLACE)
        ours, theirs = os.pipe()

        def trace(parent: int) -> None:
            die_with_parent(parent)
            seized = ctypes.CDLL(None).ptrace(0x4206, server.pid, None, None)  # PTRACE_SEIZE
            os.write(theirs, b"%d\n" % seized)
            signal.pause()

        tracer = fork(trace)
        assert read_line(ours) == b"0\n"
        try:
            server.destroy(spare={tracer}, timeout_s=0.2)
        except ServerStuckError as error:
            return error_to_record(error)
        finally:
            os.kill(tracer, signal.SIGKILL)
        raise AssertionError("it was destroyed")

    raise error_from_record(in_child(scenario))


def _exited(name: str, behaviour: str, **fields: object) -> Fault:
    return Fault(name, ServerExitedError, _behaviour(behaviour, ready_timeout_s=30), fields, SERVED, ONCE)


def _unready(name: str, behaviour: str, reason: Unready, **server: object) -> Fault:
    return Fault(name, ServerNotReadyError, _behaviour(behaviour, **server), {"reason": reason}, SERVED, ONCE)


ROWS = [
    Fault("server missing", ServerStartError, _command("/nonexistent/server"), {"code": 2}, SERVED, ONCE),
    Fault("server that may not be executed", ServerStartError, _command("/etc/passwd"), {"code": 13}, SERVED, ONCE),
    Fault("server that is a folder", ServerStartError, _command("/usr"), {"code": 13}, SERVED, ONCE),
    _exited("server that dies at once", "die", status=3, signal=0, starts=1),
    _exited("server that is killed by a signal", "segfault", status=0, signal=signal.SIGSEGV),
    _exited("server that dies on its first request", "die-on-request", status=9),
    _exited("server that floods its output", "flood", status=4),
    _exited("server that leaves a process behind", "fork", status=5),
    Fault(
        "server that crashes again and again",
        ServerExitedError,
        one_restart,
        {"starts": 2},
        SERVED,
        ONCE,
        during=crash_twice,
    ),
    Fault(
        "server that crashes after a prompt",
        ServerExitedError,
        no_more_restarts,
        {"status": 9},
        SERVED,
        ONCE,
        during=crash_after_a_prompt,
    ),
    _unready("server that is never ready", "never-ready", Unready.HEALTH),
    _unready("server that never listens", "silent", Unready.NO_ANSWER),
    _unready("server that hangs", "hang", Unready.NO_ANSWER),
    _unready("server that speaks no HTTP", "not-http", Unready.NO_ANSWER),
    _unready("server whose answer never ends", "endless-answer", Unready.NO_ANSWER),
    _unready("server with another model", "wrong-model", Unready.MODEL),
    _unready("server that is healthy and fails its first request", "fail-requests", Unready.PROBE),
    Fault(
        "port of another user",
        ServerNotReadyError,
        port_of_another_user,
        {"reason": Unready.FOREIGN_PORT},
        SERVED,
        ONCE,
        needs_root=True,
    ),
    Fault(
        "lease that ends because the broker is gone",
        LeaseEndedError,
        lease_of_three_seconds,
        {"lease_s": 3},
        SERVED,
        Attempts.AGAIN,
        during=broker_gone_while_serving,
    ),
    Fault("server that survives SIGKILL", ServerStuckError, fields={"processes": 1}, drive=survives_sigkill, needs_root=True),
]
