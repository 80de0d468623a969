"""The simulated NVSwitches: what a session says to a path, and reports that name their peers."""

from pathlib import Path

import pytest

from agent.evidence.gpu_abi import parse_report
from agent.sim.gpu_silicon import read_pdi
from agent.sim.machine import SimulatedMachine
from agent.sim.nscq import SimulatedNscq, label_of
from agent.sim.nvml import nvml_calls
from tests.gpus import NONCE, gpu_machine


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedMachine:
    return gpu_machine(tmp_path / "machine", 8, switches=4)


def labels(machine: SimulatedMachine) -> list[str]:
    code, answers = SimulatedNscq(machine).observe("/drv/nvswitch/{device}/uuid", b"")
    assert code == 0
    return [label_of(answer.value) for answer in answers]


def test_a_label_is_written_as_the_driver_writes_it() -> None:
    assert label_of(bytes(range(0xA0, 0xB0))) == "SWX-A0A1A2A3-A4A5-A6A7-A8A9-AAABACADAEAF"


def test_every_switch_of_the_machine_and_no_other_answers(machine: SimulatedMachine) -> None:
    nscq = SimulatedNscq(machine)
    assert len(set(labels(machine))) == 4
    for label in labels(machine):
        code, (answer,) = nscq.observe(f"/{label}/id/arch", b"")
        assert (code, answer.code, answer.value) == (0, 0, b"\2")
    assert nscq.observe(f"/{label_of(bytes(16))}/id/arch", b"") == (-2, [])
    assert nscq.observe(f"/{labels(machine)[0]}/config/none", b"") == (-5, [])


def test_switches_and_gpus_name_each_other(machine: SimulatedMachine) -> None:
    of_switches = {read_pdi(machine.silicon, f"switch-{number}") for number in range(4)}
    of_gpus = tuple(read_pdi(machine.silicon, f"gpu-{number}") for number in range(8))
    switches = [parse_report(device.report) for device in machine.switch_system().collect(NONCE)]
    gpus = [parse_report(device.report) for device in machine.gpu_system().collect(NONCE)]
    assert {switch.device_pdi for switch in switches} == of_switches
    assert {switch.gpu_pdis for switch in switches} == {of_gpus}
    assert all(set(gpu.switch_pdis or ()) == of_switches | {bytes(8)} for gpu in gpus)
    assert {(gpu.protected_pcie, gpu.feature_flag) for gpu in gpus} == {(True, 2)}


@pytest.mark.parametrize(("knob", "gpus", "switches"), [("stray_switch", 1, 0), ("stray_gpu", 0, 1)])
def test_a_stray_device_is_named_by_one_of_the_others(machine: SimulatedMachine, knob: str, gpus: int, switches: int) -> None:
    setattr(machine.gpu, knob, True)
    links = {parse_report(device.report).switch_pdis for device in machine.gpu_system().collect(NONCE)}
    lists = {parse_report(device.report).gpu_pdis for device in machine.switch_system().collect(NONCE)}
    assert (len(links), len(lists)) == (1 + gpus, 1 + switches)


def test_calls_are_recorded_by_the_end_of_their_path(machine: SimulatedMachine) -> None:
    machine.gpu.switches = 1
    machine.switch_system().inspect()
    create, *rest = nvml_calls(machine)
    assert (create, rest) == ("nscq_session_create", ["uuid", "nscq_uuid_to_label", "id/arch", "config/pcie_mode"])
