"""What of the supervisor shows only from outside, beside the boots of `test_boot.py`."""

import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.guest import landlock
from tests.world import World, free_port


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo)


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_the_health_port_answers_through_the_whole_boot(world: World) -> None:
    port = free_port()
    world.broker_config["timeout_s"] = 60
    agent = world.start(flags=("--health", f"127.0.0.1:{port}"))
    agent.wait_for("requested")
    assert get(port, "/livez") == (200, "ok\n")
    agent.wait_for("server_ready")
    assert get(port, "/readyz") == (200, "ready\n")
    status = json.loads(get(port, "/status")[1])
    assert (status["phase"], status["server"]["starts"]) == ("serving", 1)
    assert agent.stop().status == 0


def test_the_supervisor_is_not_dumpable_and_holds_no_library(world: World) -> None:
    agent = world.start()
    assert agent.wait_for("server_started")["landlock"] == landlock.abi_version()
    agent.wait_for("server_ready")
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text() if os.geteuid() == 0 else ""
    limits = Path(f"/proc/{agent.process.pid}/limits").read_text() if os.geteuid() == 0 else "Max core file size  1  1"
    owner = Path(f"/proc/{agent.process.pid}/environ").stat().st_uid
    agent.stop()
    assert not any(name in maps for name in ("cygrpc", "_rust.abi3", "_ssl", "msgspec"))
    assert owner == 0, "a process that is not dumpable belongs to root in /proc"
    (core,) = [line.split() for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core[4] in ("0", "1")
    assert core[5] in ("0", "1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a /run to make a folder in")
def test_with_its_defaults_the_agent_serves_under_another_user_on_a_fresh_run(world: World) -> None:
    """The status file is the first thing below /run/keyturn; the server's user must be able to walk there all the same."""
    wrapper = ("unshare", "-m", "sh", "-c", 'mount --make-rprivate / && mount -t tmpfs none /run && exec "$0" "$@"')
    agent = world.start(wrapper=wrapper, status_file=None)
    agent.wait_for("server_ready")
    assert agent.stop().status == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_without_a_writable_run_nothing_is_asked_for(world: World) -> None:
    wrapper = ("unshare", "-m", "sh", "-c", 'mount --make-rprivate / && mount -t tmpfs -o ro none /run && exec "$0" "$@"')
    outcome = world.start(wrapper=wrapper).wait()
    assert (outcome.failure["class"], outcome.status) == ("DestinationError", 20)
    assert world.audit() == []


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_an_agent_without_standard_descriptors_boots_all_the_same(world: World, closed: str) -> None:
    agent = world.start(wrapper=("sh", "-c", f'exec "$0" "$@" {closed}'), flags=("--config", "/nonexistent"))
    assert agent.process.wait(30) == 10
    assert "ConfigError" in agent.termination_log.read_text()


def test_a_health_address_in_use_is_told_before_anything_is_asked_for(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = world.start(flags=("--health", f"127.0.0.1:{taken.getsockname()[1]}")).wait()
    assert (outcome.failure["class"], outcome.status) == ("ConfigError", 10)
    assert outcome.failure["fields"]["problem"] == "address cannot be listened on"
    assert world.audit() == []


def test_the_wait_socket_appears_after_the_local_checks_answers_and_goes_with_the_agent(world: World) -> None:
    path = world.folder / "ready.sock"
    world.broker_config["timeout_s"] = 60
    agent = world.start(flags=("--wait-socket", str(path)))
    agent.wait_for("boot_started")
    agent.wait_for("local_checks_passed")
    early = [event["event"] for event in agent.events]
    agent.wait_for("requested")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        caller.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert caller.recv(4096).endswith(b"ok\n")
    assert early.index("local_checks_passed") == len(early) - 1
    assert agent.stop().status == 21
    assert not list(world.folder.glob("ready.sock*"))


def test_there_is_no_wait_socket_when_the_local_checks_have_not_passed(world: World) -> None:
    path = world.folder / "ready.sock"
    outcome = world.start(flags=("--wait-socket", str(path), "--config", "/nonexistent")).wait()
    assert (outcome.failure["class"], path.exists()) == ("ConfigError", False)
    assert not list(world.folder.glob("ready.sock*"))


def test_a_wait_socket_whose_place_was_taken_meanwhile_ends_the_boot(world: World) -> None:
    path, later = world.folder / "ready.sock", world.folder / "later"
    os.mkfifo(later)
    config = world.prepare()
    agent = world.start_agent(config, flags=("--wait-socket", str(path), "--config", str(later)))
    with later.open("wb") as pipe:  # the worker has it open, so the supervisor has its socket
        path.write_text("theirs")
        pipe.write(config.read_bytes())
    outcome = agent.wait()
    assert (outcome.failure["fields"]["key"], outcome.status) == ("wait-socket", 10)
    assert (path.read_text(), list(world.folder.glob("ready.sock*"))) == ("theirs", [path])


def test_a_wait_socket_in_somebody_s_place_is_told_before_anything_is_asked_for(world: World) -> None:
    (world.folder / "taken").touch()
    outcome = world.start(flags=("--wait-socket", str(world.folder / "taken"))).wait()
    assert (outcome.failure["fields"]["key"], outcome.status) == ("wait-socket", 10)
    assert world.audit() == []
