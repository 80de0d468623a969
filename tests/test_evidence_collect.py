"""Collection over a whole simulated machine; the rules of the gate are `test_evidence_gate.py`."""

from dataclasses import replace

import pytest

from agent.errors import ConfigNotMeasuredError, GpuCountError, VmRestartRequiredError
from agent.evidence import GpuEvidence, GpuInventory, GpuNonce, GpuSystem, Nonce, RuntimeData
from agent.evidence.binding import device_nonce, parse_additional_evidence, report_data
from agent.evidence.collect import Devices, open_devices
from agent.evidence.gpu_abi import parse_report as parse_gpu_report
from agent.evidence.snp_abi import parse_report
from agent.sim.machine import SimulatedMachine

DATA = RuntimeData(Nonce(bytes(range(32))), b"x" * 32, b"y" * 32)
DIGEST = bytes(32)


def devices_of(machine: SimulatedMachine, gpus: GpuSystem | None = None) -> Devices:
    return open_devices(
        machine.attester(),
        gpus or machine.gpu_system(),
        gpu_count=machine.gpu.count,
        ready_preset=False,
        config_digest=DIGEST,
        manifest_digest="sha256:" + "0" * 64,
        server_command_digest="sha256:" + "1" * 64,
    )


def test_one_cpu_report_covers_nonce_key_and_every_gpu(machine: SimulatedMachine) -> None:
    evidence = devices_of(machine).collect(DATA)
    gpus, claims = parse_additional_evidence(evidence.additional_evidence)
    assert parse_gpu_report(gpus[0].report).requester_nonce == device_nonce(DATA)
    assert parse_report(evidence.primary.report).report_data == report_data(DATA, evidence.additional_evidence)
    assert claims is not None
    assert claims.manifest_digest == "sha256:" + "0" * 64
    assert claims.ready is False


def test_a_guest_launched_with_another_configuration_sends_nothing(machine: SimulatedMachine) -> None:
    with pytest.raises(ConfigNotMeasuredError):
        replace(devices_of(machine), config_digest=b"\1" * 32).collect(DATA)


def test_ready_before_the_boot_is_found_when_devices_are_opened(machine: SimulatedMachine) -> None:
    machine.gpu.ready = 1
    machine.save()
    with pytest.raises(VmRestartRequiredError):
        devices_of(machine)


class Forgetful(GpuSystem):
    """A GPU system that gives evidence of one GPU less than it lists."""

    def __init__(self, real: GpuSystem) -> None:
        self._real = real

    def inspect(self) -> GpuInventory:
        return self._real.inspect()

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        return self._real.collect(nonce)[:-1]

    def check_faults(self) -> None:
        self._real.check_faults()

    def set_ready(self) -> None:
        self._real.set_ready()


def test_a_missing_gpu_is_never_a_shorter_list(machine: SimulatedMachine) -> None:
    with pytest.raises(GpuCountError) as caught:
        devices_of(machine, Forgetful(machine.gpu_system())).collect(DATA)
    assert (caught.value.expected, caught.value.got) == (1, 0)
