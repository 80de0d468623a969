"""The whole of Keyturn in one command: real weights, real server, real processes; only the silicon is simulated."""

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from agent.demo import site
from agent.demo.run import Result, Weights, look_at_weights

DEMO = [sys.executable, "-I", "-m", "agent", "demo", "--json"]
TIMEOUT_S = 120
DIGEST = "5" * 64


def demo(*arguments: str, user: int | None = None) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit status, the object on the last line of stdout, the events on stderr."""
    ended = subprocess.run([*DEMO, *arguments], capture_output=True, timeout=TIMEOUT_S, user=user, group=user, cwd="/")
    events = [json.loads(line) for line in ended.stderr.splitlines()]
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), events


def check_good(status: int, result: dict[str, Any]) -> None:
    assert (status, result["ok"], result["error"], result["left_behind"]) == (0, True, None, [])
    assert result["answer"]["cat_kitten"] > result["answer"]["cat_tax"] + 0.2
    assert result["weights"] == {"filesystem": "tmpfs", "sha256": result["sealed"]["sha256"]}
    names = [stage["name"] for stage in result["stages"]]
    assert names.index("attest") < names.index("secure") < names.index("unwrap") < names.index("load") < names.index("server")


def test_a_boot_gives_the_server_the_bytes_that_were_sealed_and_leaves_nothing() -> None:
    status, result, events = demo("--once")
    check_good(status, result)
    assert {"verdict_accepted", "gate_passed", "server_ready", "wiped"} <= {event["event"] for event in events}


def test_a_td_boots_as_well() -> None:
    status, result, events = demo("--once", "--tee", "tdx")
    check_good(status, result)
    opened = next(event for event in events if event["event"] == "attester_opened")
    assert (opened["tee"], opened["interface"]) == ("tdx", "simulated-tdx")


@pytest.mark.parametrize(("tee", "more"), [("snp", ()), ("tdx", ("--gpus", "8", "--ppcie")), ("snp", ("--broker", "rcar"))])
def test_a_container_in_a_coco_guest_boots_as_well(tee: str, more: tuple[str, ...]) -> None:
    status, result, events = demo("--once", "--attester", "coco", "--tee", tee, *more)
    check_good(status, result)
    opened = next(event for event in events if event["event"] == "attester_opened")
    assert (opened["tee"], opened["interface"]) == (tee, "api-server-rest")


@pytest.mark.parametrize("tee", ["snp", "tdx", "sample"])
def test_a_guest_boots_against_a_trustee_kbs(tee: str) -> None:
    status, result, events = demo("--once", "--broker", "rcar", "--tee", tee)
    check_good(status, result)
    accepted = next(event for event in events if event["event"] == "verdict_accepted")
    assert (accepted["policy_version"], accepted["simulated"], accepted["lease_s"]) == ("unversioned", True, None)
    assert sum(event["event"] == "kbs_called" for event in events) == (3 if tee == "sample" else 2)


def check_configfs(status: int, result: dict[str, Any], events: list[dict[str, Any]], tee: str) -> None:
    if result["error"] and result["error"]["class"] == "SimulationRefusedError":
        pytest.skip(result["error"]["text"])
    check_good(status, result)
    opened = next(event for event in events if event["event"] == "attester_opened")
    assert (opened["tee"], opened["interface"]) == (tee, "configfs-tsm")
    assert next(event for event in events if event["event"] == "verdict_accepted")["simulated"] is True


@pytest.mark.parametrize("tee", ["snp", "tdx"])
def test_a_boot_through_configfs_tsm_uses_the_agents_own_code_for_it_and_leaves_no_mount(tee: str) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    check_configfs(*demo("--once", "--tee", tee, "--via", "configfs"), tee)
    assert Path("/proc/self/mountinfo").read_text() == before


def test_an_ordinary_user_has_a_configfs_tsm_too_where_he_may_make_user_namespaces() -> None:
    user = site.choose_server_user()
    if user is None or user.uid == 0:
        pytest.skip("there is no other user who can execute the interpreter")
    check_configfs(*demo("--once", "--via", "configfs", user=user.uid), "snp")


def test_without_fuse_the_demo_says_what_it_takes_and_leaves_nothing() -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/fuse needs root")
    hidden = ("unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/fuse; exec "$@"', "sh")
    ended = subprocess.run([*hidden, *DEMO, "--once", "--via", "configfs"], capture_output=True, timeout=TIMEOUT_S)
    result = json.loads(ended.stdout)
    assert (ended.returncode, result["error"]["class"]) == (11, "SimulationRefusedError")
    assert "modprobe fuse" in result["error"]["text"]


@pytest.mark.parametrize("tee", ["snp", "tdx"])
def test_eight_gpus_boot_with_the_four_switches_between_them(tee: str) -> None:
    status, result, events = demo("--once", "--gpus", "8", "--ppcie", "--tee", tee)
    check_good(status, result)
    passed = next(event for event in events if event["event"] == "gate_passed")
    assert (passed["gpus"], passed["switches"], passed["preset"]) == (8, 4, False)


def test_several_gpus_boot_without_switches() -> None:
    status, result, events = demo("--once", "--gpus", "3")
    check_good(status, result)
    passed = next(event for event in events if event["event"] == "gate_passed")
    assert (passed["gpus"], passed["switches"]) == (3, 0)


def test_one_flipped_byte_of_ciphertext_ends_with_the_artifact_status_and_no_server() -> None:
    status, result, events = demo("--once", "--flip-byte")
    assert (status, result["ok"], result["exit_status"]) == (19, False, 19)
    assert result["error"]["class"] == "SegmentAuthenticationError"
    assert result["left_behind"] == []
    assert "server_started" not in {event["event"] for event in events}


def test_an_ordinary_user_gets_the_same_from_a_sealed_memfd() -> None:
    user = site.choose_server_user()
    if user is None:
        pytest.skip("this is an ordinary user: the other tests show it")
    if user.uid == 0:
        pytest.skip("no ordinary user can execute the interpreter from where this clone is")
    status, result, events = demo("--once", user=user.uid)
    check_good(status, result)
    assert [event["kind"] for event in events if event["event"] == "destination_chosen"] == ["memfd"]


def start_serving(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A demo without --once, once it serves, and its server's process id."""
    serving = subprocess.Popen([*DEMO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert serving.stderr
    pid = 0
    for line in serving.stderr:
        event = json.loads(line)
        pid = event["pid"] if event["event"] == "server_started" else pid
        if event["event"] == "serving":
            return serving, pid
    pytest.fail("the demo ended before it served")


def test_it_serves_until_ctrl_c_and_then_ends_well() -> None:
    serving, pid = start_serving()
    with serving:
        assert Path(f"/proc/{pid}").exists()
        serving.send_signal(signal.SIGINT)
        output, _ = serving.communicate(timeout=TIMEOUT_S)
    check_good(serving.returncode, json.loads(output.splitlines()[-1]))


def test_a_killed_demo_takes_agent_server_and_broker_with_it() -> None:
    via = ("--via", "configfs") if os.geteuid() == 0 and os.access("/dev/fuse", os.W_OK) else ()
    serving, pid = start_serving(*via)
    with serving:
        children = Path(f"/proc/{serving.pid}/task/{serving.pid}/children").read_text().split()
        commands = [Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children]
        started = sorted(
            command[command.index("-m") + 1 :][: 1 if "agent.sim.configfs" in command else 2] for command in commands
        )
        assert started == [["agent", "broker"], ["agent", "run"], *([["agent.sim.configfs"]] if via else [])]
        folder = next(Path(command[command.index("--config") + 1]).parent for command in commands if "--config" in command)
        serving.kill()
    shutil.rmtree(folder)  # ciphertext and keys of simulated silicon: nobody was left to delete them
    deadline = time.monotonic() + 30
    while running := [process for process in (*children, str(pid)) if is_running(process)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def good() -> Result:
    return Result(DIGEST, exit_status=0, similarity=(0.7, 0.1), weights=Weights("tmpfs", DIGEST))


def test_a_result_is_ok_only_when_every_promise_held() -> None:
    assert good().ok
    assert good().status == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("similarity", None),
        ("similarity", (0.3, 0.15)),
        ("weights", None),
        ("weights", Weights("other", DIGEST)),
        ("weights", Weights("tmpfs", "6" * 64)),
        ("left_behind", ["mount"]),
    ],
)
def test_a_broken_promise_is_a_bug_although_the_agent_was_content(name: str, value: object) -> None:
    result = good()
    setattr(result, name, value)
    assert not result.ok
    assert result.status == 29


def test_the_agents_status_is_ours() -> None:
    result = good()
    result.exit_status = 16
    assert (result.ok, result.status) == (False, 16)


def test_the_mapped_file_is_hashed_not_the_one_that_has_its_name() -> None:
    content = b"weights" * 1000
    memfd = os.memfd_create("model")
    os.write(memfd, content)
    with mmap.mmap(memfd, len(content), prot=mmap.PROT_READ):
        assert look_at_weights(os.getpid(), "unused") == Weights("tmpfs", sha256(content).hexdigest())
    os.close(memfd)
    with pytest.raises(RuntimeError):
        look_at_weights(os.getpid(), "unused")
