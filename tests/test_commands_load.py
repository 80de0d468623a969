"""`keyturn load` as an init container runs it: nothing but the guest's own API, a folder of guest memory, and an end."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.artifact.given import MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME
from agent.closed import Ident
from agent.errors import DeviceError
from agent.evidence import Attester, Evidence, ReportData
from tests.world import DEADLINE_S, KEY_URI, World


@pytest.fixture
def out() -> Iterator[Path]:
    """What a memory emptyDir is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def world(tmp_path: Path, silicon: Path, out: Path) -> Iterator[World]:
    """The key comes from the confidential-data-hub, the evidence is the attestation-agent's."""
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, files=2)
        world.key_from_cdh()
        loads(world, out)
        yield world


def loads(world: World, out: Path) -> None:
    """As in a stock Kata guest, whose init sets the ready state."""
    world.server = {}
    world.gpu["ready_state"] = "preset"
    world.machine.gpu.ready = 1
    world.row_gpu["ready"] = True
    world.artifact |= {"destination": "directory", "directory": str(out), "unsafe_allow_swap": True}


def load(world: World, out: Path) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, events, termination message."""
    config = world.prepare()
    command = [sys.executable, "-m", "agent", "load", "--out", str(out), "--config", str(config), "--status-file", ""]
    command += ["--termination-log", str(world.folder / "termination")]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S)
    assert done.stdout == b""
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()], (world.folder / "termination").read_text()


def check_loaded(world: World, out: Path) -> None:
    found = {path.name: path.read_bytes() for path in (out / PUBLISHED_NAME).iterdir()}
    assert found == world.model
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out / PUBLISHED_NAME).iterdir()} == {0o440}


def test_the_model_is_left_open_in_the_folder_and_nothing_else_is(world: World, out: Path) -> None:
    status, events, termination = load(world, out)
    names = [event["event"] for event in events]
    assert status == 0
    assert names[-2:] == ["model_left", "stopped"]
    assert not {"wiped", "failed", "server_started"} & set(names)
    assert events[-2]["version"] == 3
    assert events[0]["mode"] == "load"
    assert sorted(os.listdir(out)) == [MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME]
    assert os.listdir(out / MARK_NAME) == []
    assert termination.startswith("keyturn: stopped")
    check_loaded(world, out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to another group")
def test_the_group_of_a_pod_can_read_the_model(world: World, out: Path) -> None:
    """What fsGroup makes of an emptyDir."""
    os.chown(out, -1, 12345)
    os.chmod(out, 0o2770)
    assert load(world, out)[0] == 0
    model = out / PUBLISHED_NAME
    assert {path.stat().st_gid for path in (model, *model.iterdir())} == {12345}
    assert stat.S_IMODE(model.stat().st_mode) & 0o070 == 0o050
    check_loaded(world, out)


def test_a_second_load_replaces_what_the_first_left(world: World, out: Path) -> None:
    assert load(world, out)[0] == 0
    os.chmod(out / PUBLISHED_NAME, 0o750)
    (out / PUBLISHED_NAME / "stale").write_bytes(b"of another version")
    assert load(world, out)[0] == 0
    check_loaded(world, out)


def test_a_failure_leaves_nothing_there(world: World, out: Path) -> None:
    blob = max((world.layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    status, events, _ = load(world, out)
    assert (status, events[-1]["event"]) == (19, "stopped")
    assert "wiped" in [event["event"] for event in events]
    assert os.listdir(out) == []


class Failing:
    """A CPU TEE that fails once `when` says so."""

    def __init__(self, attester: Attester, when: Callable[[], bool]) -> None:
        self.tee, self.interface = attester.tee, attester.interface
        self.launch_digest = attester.launch_digest
        self._attester, self._when = attester, when

    def collect(self, report_data: ReportData) -> Evidence:
        if self._when():
            raise DeviceError(self.interface, Ident("report"), 5)
        return self._attester.collect(report_data)


def test_a_model_for_which_nobody_vouches_is_not_left_there(world: World, out: Path) -> None:
    """The TEE fails after the key was released, while the model is opened: there would be no receipt."""
    components = world.key_from_cdh()
    assert components.attester
    resource = f"/cdh/resource/{KEY_URI.removeprefix('kbs:///')}"
    components.attester = Failing(components.attester, lambda: resource in components.asked)
    status, events, _ = load(world, out)
    assert status == 12
    assert [event["class"] for event in events if event["event"] == "failed"] == ["DeviceError"]
    assert resource in components.asked
    assert os.listdir(out) == []


def test_a_key_with_a_lease_is_not_left_to_nobody(tmp_path: Path, silicon: Path, out: Path) -> None:
    """And is not even asked for. Leases are our broker's."""
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo)
        world.through_coco()
        loads(world, out)
        world.row["lease_s"] = 3600
        world.prepare()
        world.start_broker()
        status, events, _ = load(world, out)
        assert status == 22
        (failed,) = [event for event in events if event["event"] == "failed"]
        assert (failed["class"], failed["fields"]) == ("LeaseUnsupervisedError", {"lease_s": 3600})
        assert [step for step, _, _ in world.audit()] == ["attest"]
        assert os.listdir(out) == []


def test_a_signal_before_the_end_leaves_nothing_there(world: World, out: Path) -> None:
    config = world.prepare()
    command = [sys.executable, "-m", "agent", "load", "--out", str(out), "--config", str(config), "--status-file", ""]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr
        for line in process.stderr:
            if json.loads(line)["event"] == "local_checks_passed":
                process.send_signal(signal.SIGTERM)
                break
        rest = [json.loads(line) for line in process.stderr]
        assert process.wait(DEADLINE_S) == 21, rest
    assert os.listdir(out) == []


@pytest.mark.parametrize("flags", [["--config", "/x"], ["--out", "/x"], ["--out", "/x", "--config", "/x", "--guest"]])
def test_it_wants_a_folder_and_a_configuration(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "agent", "load", *flags], capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 2
