"""What systemd hears, at a socket of ours in its place; and the unit, read by systemd itself."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import GpuCountError
from agent.events import LocalChecksPassed, Stage, StageEnded, Stopped, Stopping, WaitingFor
from agent.guest.systemd import MAX_STATUS_BYTES, ServiceManager, from_environment
from agent.report import BootReport
from agent.telling import Teller

UNIT = Path(__file__).resolve().parents[1] / "initrd" / "keyturn.service"


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@keyturn-test-{os.urandom(8).hex()}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as end:
        end.bind(name.replace("@", "\0", 1) if name[0] == "@" else name)
        end.settimeout(5)
        yield end, name


def test_ready_is_after_the_local_checks_and_the_end_is_announced(manager: tuple[socket.socket, str]) -> None:
    end, name = manager
    told = Teller(BootReport("0.1.0", "run"), None, None, ServiceManager(name))
    for message in (
        StageEnded(Stage.CONFIG, 5, None),
        LocalChecksPassed(),
        WaitingFor(Ident("route"), 60),
        Stopping(15, None),
        Stopped(0),
    ):
        told.tell(message)
    heard = [end.recv(4096).decode().split("\n") for _ in range(5)]
    assert heard[0] == ["STATUS=config: done in 5 ms"]
    assert heard[1] == ["READY=1", "STATUS=local checks passed"]
    assert heard[2] == ["READY=1", "STATUS=waiting for route, at most 60 s"]
    assert [line[:2] for line in heard[3:]] == [["READY=1", "STOPPING=1"]] * 2


def test_a_failure_stays_the_status_and_no_line_of_it_is_one_of_ours(manager: tuple[socket.socket, str]) -> None:
    end, name = manager
    told = Teller(BootReport("0.1.0", "run"), None, None, ServiceManager(name))
    told.tell(GpuCountError(2, 1))
    told.tell(Stopped(13))
    first, last = (end.recv(4096).decode().split("\n") for _ in range(2))
    assert first == last == ["STOPPING=1", "STATUS=error: expected 2 distinct GPUs, got 1 (host)"]
    ServiceManager(name).tell(ready=False, stopping=False, status="x" * 4096)
    assert len(end.recv(8192)) <= len("STATUS=") + MAX_STATUS_BYTES


def test_a_manager_that_does_not_read_or_is_gone_costs_nothing(tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    quiet = ServiceManager(name)
    quiet.tell(ready=True, stopping=False, status="nobody listens")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as end:
        end.bind(name)
        for _ in range(2000):  # more than its queue holds
            quiet.tell(ready=True, stopping=False, status="nobody reads")
        assert end.recv(4096) == b"READY=1\nSTATUS=nobody reads"


def test_the_variable_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")  # nothing we speak: told to nobody
    from_environment().tell(ready=True, stopping=False, status=None)
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    agent = tmp_path / "keyturn"
    agent.write_text("#!/bin/sh\n")
    agent.chmod(0o755)
    unit = tmp_path / "keyturn.service"
    unit.write_text(UNIT.read_text().replace("/opt/keyturn/keyturn", str(agent)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = UNIT.read_text().splitlines()
    for line in ("Type=notify", "Restart=no", "FailureAction=poweroff-force", "OnFailure=poweroff.target", "TimeoutStopSec=90"):
        assert line in lines
