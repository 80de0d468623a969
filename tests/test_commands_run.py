import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from agent.cli import main
from agent.commands.run import open_hardware
from agent.config import EXAMPLE, parse
from agent.errors import NoAttesterError
from agent.guest.pid1 import is_guest_of_kata
from agent.sim.machine import SimulatedMachine
from tests.children import own_machine


@pytest.mark.parametrize("address", ["8080", "host:port", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_a_health_address_without_a_port_is_a_usage_error(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--config", "/dev/null", "--health", address])
    assert caught.value.code == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_a_wait_socket_at_a_relative_path_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--config", "/dev/null", "--wait-socket", ""])
    assert (caught.value.code, "absolute path" in capsys.readouterr().err) == (2, True)


def test_what_the_manifest_of_the_extension_starts_is_a_run_that_kata_agent_can_wait_for() -> None:
    """The rules of kata-agent 4.x: src/agent/src/guest_extension_image.rs, and `launch_process` beside it."""
    manifest = tomllib.loads((Path(__file__).parents[1] / "initrd/extension/components.toml").read_text())
    (process,) = manifest["process"]
    assert (manifest["schema_version"], process["level"] in (1, 2, 3)) == (1, True)
    assert not Path(process["path"]).is_absolute() and ".." not in Path(process["path"]).parts
    assert process["args"][process["args"].index("--wait-socket") + 1] == process["wait_socket"]
    assert int(process["timeout_secs"]) > 0, "it would not be waited for"
    command = [sys.executable, "-m", "agent", *process["args"], "--health", "last"]
    done = subprocess.run([*own_machine(), *command], capture_output=True, text=True, timeout=30)
    assert (done.returncode, "--health takes HOST:PORT" in done.stderr) == (2, True), "every word before is understood"


def test_only_an_agent_of_the_guest_image_powers_its_machine_off() -> None:
    agent = [sys.executable, "-m", "agent", "run", "--config", "/nonexistent", "--power-off-on-failure"]
    done = subprocess.run([*own_machine(), *agent], capture_output=True, text=True, timeout=30)
    assert (done.returncode, "--guest alone" in done.stderr) == (2, True)


def test_a_machine_that_is_no_guest_of_kata_is_not_powered_off() -> None:
    """A laptop, or a node whose processes a container sees: root, both flags, and still on."""
    if is_guest_of_kata(Path("/proc/cmdline").read_text()):
        pytest.skip("these tests run in a guest of Kata")
    agent = [sys.executable, "-m", "agent", "run", "--guest", "--power-off-on-failure", "--status-file", ""]
    done = subprocess.run([*own_machine(), *agent], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "for a guest of Kata" in done.stderr) == (2, True)


def test_a_configuration_that_is_not_there_is_told_on_every_face(tmp_path: Path) -> None:
    termination = tmp_path / "termination"
    command = [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "none.toml"), "--status-file", ""]
    done = subprocess.run([*command, "--termination-log", str(termination)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 10
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events == ["boot_started", "stage_started", "stage_failed", "failed", "worker_ended", "wiped", "stopped"]
    assert "ConfigError" in termination.read_text()


def test_a_pod_that_asks_for_another_server_is_refused_before_a_device_is_opened(tmp_path: Path) -> None:
    config = tmp_path / "keyturn.toml"
    config.write_text(EXAMPLE)
    command = [sys.executable, "-m", "agent", "run", "--config", str(config), "--status-file", "", "--", "/bin/sh", "-c", "id"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    (failed,) = [event for line in done.stderr.splitlines() if (event := json.loads(line))["event"] == "failed"]
    assert (done.returncode, failed["class"], failed["fields"]) == (10, "ConfigNotMeasuredError", {"asked": "server command"})


def test_a_simulator_is_opened_only_when_asked_for_by_name(machine: SimulatedMachine) -> None:
    simulated = EXAMPLE.replace('"snp"', '"simulated-snp"') + f'[simulation]\nmachine = "{machine.directory}"\n'
    attester, gpus, _ = open_hardware(parse(simulated.encode()).config)
    assert type(attester).__name__ == "SimulatedSnp"
    assert gpus is not None
    attester, _, _ = open_hardware(parse(simulated.replace("ed-snp", "ed-tdx").encode()).config)
    assert type(attester).__name__ == "SimulatedTdx"
    with pytest.raises(NoAttesterError):  # no other way is taken where nothing is mounted
        open_hardware(parse(f'{simulated}report_root = "{machine.directory}/report"\n'.encode()).config)
    for tee in ("snp", "tdx"):
        with pytest.raises(NoAttesterError) as caught:
            open_hardware(parse(EXAMPLE.replace('attester = "snp"', f'attester = "{tee}"').encode()).config)
        assert (caught.value.attester, caught.value.exit_status) == (tee, 11)
