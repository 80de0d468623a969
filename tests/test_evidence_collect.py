"""Collection over a whole simulated machine; the rules of the gate are `test_evidence_gate.py`."""

import hashlib
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import (
    ConfigNotMeasuredError,
    CountedDevice,
    GpuCountError,
    GpuFaultError,
    MalformedEvidenceError,
    VmRestartRequiredError,
)
from agent.evidence import GpuEvidence, GpuInventory, GpuNonce, GpuSystem, Nonce, RuntimeData, Tee
from agent.evidence.binding import device_nonce, parse_additional_evidence, report_data, split
from agent.evidence.collect import Devices, check_distinct, check_measured, open_devices
from agent.evidence.gate import ExpectedReady
from agent.evidence.gpu_abi import parse_report as parse_gpu_report
from agent.evidence.snp_abi import parse_report
from agent.handshake import TeePublicKey, TokenClaims, Verdict
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import nvml_calls
from tests.gpus import NONCE, gpu_machine, gpu_system_of, recorded

CLAIMS = TokenClaims(
    Nonce(bytes(32)), TeePublicKey(bytes(32), bytes(32)), Ident("kbs:///a/b/c"), Ident("1"), 1, None, True, 0, 1
)
VERDICT = Verdict(Ident("request-1"), "token", CLAIMS, ())
DATA = RuntimeData(Nonce(bytes(range(32))), b"x" * 32, b"y" * 32)
DIGEST = bytes(32)


def devices_of(
    machine: SimulatedMachine,
    gpus: GpuSystem | None = None,
    digest: bytes = DIGEST,
    expected_ready: ExpectedReady = ExpectedReady.UNSET,
) -> Devices:
    return open_devices(
        check_measured(machine.attester(), digest),
        gpus or gpu_system_of(machine),
        machine.runtime(),
        gpu_count=machine.gpu.count,
        switch_count=machine.gpu.switches,
        expected_ready=expected_ready,
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
    assert (claims.ready, claims.renewal) == (False, False)


def test_the_gate_comes_after_the_measurement(machine: SimulatedMachine) -> None:
    with pytest.raises(RuntimeError):
        devices_of(machine).secure(VERDICT, None)  # type: ignore[arg-type]
    assert "nvmlSystemSetConfComputeGpusReadyState" not in nvml_calls(machine)


def test_a_configuration_the_guest_was_not_launched_with_decides_nothing(machine: SimulatedMachine) -> None:
    machine.host_data = b"\1" * 32
    machine.gpu.devtools = 1  # would be the next error
    with pytest.raises(ConfigNotMeasuredError):
        devices_of(machine)


@pytest.mark.parametrize(("tee", "length"), [(Tee.SNP, 32), (Tee.TDX, 48)])
@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_a_longer_digest_is_compared_as_the_field_of_the_tee_holds_it(
    machine: SimulatedMachine, algorithm: str, tee: Tee, length: int
) -> None:
    digest = hashlib.new(algorithm, b"initdata").digest()
    field = digest[:length].ljust(length, b"\0")
    machine.host_data = field
    check_measured(machine.attester(tee), digest)
    for position in (0, length - 1):
        machine.host_data = field[:position] + bytes([field[position] ^ 1]) + field[position + 1 :]
        with pytest.raises(ConfigNotMeasuredError):
            check_measured(machine.attester(tee), digest)


@pytest.mark.parametrize("tee", Tee)
def test_a_configuration_of_the_image_decides_only_where_nobody_passed_initdata(machine: SimulatedMachine, tee: Tee) -> None:
    machine.host_data = bytes(32)
    check_measured(machine.attester(tee), b"")
    machine.host_data = bytes(31) + b"\1"
    with pytest.raises(ConfigNotMeasuredError):
        check_measured(machine.attester(tee), b"")


def test_ready_before_the_boot_is_found_when_devices_are_opened(machine: SimulatedMachine) -> None:
    machine.gpu.ready = 1
    machine.save()
    with pytest.raises(VmRestartRequiredError):
        devices_of(machine)


def test_who_renews_says_so_and_sets_no_ready_state(machine: SimulatedMachine) -> None:
    machine.gpu.ready = 1
    devices = devices_of(machine, expected_ready=ExpectedReady.OURS)
    _, claims = parse_additional_evidence(devices.collect(DATA).additional_evidence)
    assert claims is not None
    assert (claims.ready, claims.renewal) == (True, True)
    assert "nvmlSystemSetConfComputeGpusReadyState" not in nvml_calls(machine)


def test_a_preset_ready_state_is_no_renewal(machine: SimulatedMachine) -> None:
    machine.gpu.ready = 1
    evidence = devices_of(machine, expected_ready=ExpectedReady.PRESET).collect(DATA)
    _, claims = parse_additional_evidence(evidence.additional_evidence)
    assert claims is not None
    assert (claims.ready, claims.renewal) == (True, False)


def test_a_fault_before_the_boot_is_found_when_devices_are_opened(machine: SimulatedMachine) -> None:
    gpus = machine.gpu_system()
    with (machine.directory / "kmsg").open("a") as file:
        file.write("4,1,1,-;NVRM: Xid (PCI:0000:06:00): 79, GPU has fallen off the bus.\n")
    with pytest.raises(GpuFaultError):
        devices_of(machine, gpus)


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


def test_recorded_gpus_are_distinct_until_one_is_listed_twice() -> None:
    evidence = [recorded(f"multi_gpu_hopper_{index}").evidence for index in range(4)]
    check_distinct(evidence)
    with pytest.raises(GpuCountError) as caught:
        check_distinct([*evidence, evidence[2]])
    assert (caught.value.expected, caught.value.got) == (5, 4)


def test_one_gpu_answering_for_two_is_refused(tmp_path: Path) -> None:
    two_gpus = gpu_machine(tmp_path / "machine")
    check_distinct(two_gpus.gpu_system().collect(NONCE))
    two_gpus.gpu.repeat_first_gpu = True
    evidence = two_gpus.gpu_system().collect(NONCE)
    assert evidence[0].report != evidence[1].report
    assert evidence[0].uuid != evidence[1].uuid
    with pytest.raises(GpuCountError) as caught:
        check_distinct(evidence)
    assert (caught.value.expected, caught.value.got) == (2, 1)


def test_no_evidence_is_made_of_one_gpu_that_answers_for_two(silicon: Path, tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=2, silicon=silicon)
    machine.gpu.repeat_first_gpu = True
    with pytest.raises(GpuCountError) as caught:
        devices_of(machine).collect(DATA)
    assert (caught.value.expected, caught.value.got) == (2, 1)


@pytest.fixture
def protected(silicon: Path, tmp_path: Path) -> SimulatedMachine:
    """Eight GPUs and four NVSwitches in a confidential machine."""
    return SimulatedMachine.create(tmp_path / "machine", gpus=8, switches=4, silicon=silicon)


def test_one_cpu_report_covers_every_switch(protected: SimulatedMachine) -> None:
    evidence = devices_of(protected).collect(DATA)
    gpus, switches = split(parse_additional_evidence(evidence.additional_evidence)[0])
    assert (len(gpus), len(switches)) == (8, 4)
    assert {parse_gpu_report(device.report).requester_nonce for device in (*gpus, *switches)} == {device_nonce(DATA)}
    assert parse_report(evidence.primary.report).report_data == report_data(DATA, evidence.additional_evidence)


def test_a_missing_switch_is_never_a_shorter_list(protected: SimulatedMachine) -> None:
    with pytest.raises(GpuCountError) as caught:
        devices_of(protected, Forgetful(gpu_system_of(protected))).collect(DATA)
    assert (caught.value.expected, caught.value.got, caught.value.device) == (4, 3, CountedDevice.NVSWITCH)


def test_no_evidence_is_made_of_one_switch_that_answers_for_two(protected: SimulatedMachine) -> None:
    protected.gpu.repeat_first_switch = True
    with pytest.raises(GpuCountError) as caught:
        devices_of(protected).collect(DATA)
    assert (caught.value.expected, caught.value.got, caught.value.device) == (4, 1, CountedDevice.NVSWITCH)


def test_a_chain_that_does_not_parse_is_no_distinct_gpu() -> None:
    with pytest.raises(MalformedEvidenceError):
        check_distinct([GpuEvidence("HOPPER", "GPU-1", b"", b"")])
