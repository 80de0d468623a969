"""The gate: what is refused before it, and that the ready state is set once, last, and only then."""

import copy
import dataclasses

import pytest

from agent.closed import Ident
from agent.errors import (
    CountedDevice,
    DeviceError,
    GpuCountError,
    GpuFault,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    VmRestartRequiredError,
)
from agent.evidence import Gpu, GpuInventory, GpuModes, Nonce, Switch
from agent.evidence.gate import ExpectedReady, ReadyState, SecuredDevices, check_inventory, check_unchanged, secure
from agent.handshake import TeePublicKey, TokenClaims, Verdict
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import nvml_calls
from tests.gpus import gpu_system_of

SET_CALL = "nvmlSystemSetConfComputeGpusReadyState"
ON = GpuModes(cc_feature=1, environment=2, devtools=0, multi_gpu_mode=0)
INVENTORY = GpuInventory(
    "580.95.05", (Gpu("GPU-1", "HOPPER", "96"), Gpu("GPU-2", "HOPPER", "96")), ON, ready=False, persistent=True
)
VERDICT = Verdict(
    Ident("request-1"),
    "token",
    TokenClaims(Nonce(bytes(32)), TeePublicKey(bytes(32), bytes(32)), Ident("kbs:///a/b/c"), Ident("1"), 1, None, True, 0, 1),
    (),
)


def with_modes(**modes: int) -> GpuInventory:
    return dataclasses.replace(INVENTORY, modes=dataclasses.replace(ON, **modes))


def with_gpus(*uuids: str) -> GpuInventory:
    return dataclasses.replace(INVENTORY, gpus=tuple(Gpu(uuid, "HOPPER", "96") for uuid in uuids))


@pytest.mark.parametrize(
    "inventory",
    [
        INVENTORY,
        with_modes(multi_gpu_mode=2),
        with_modes(multi_gpu_mode=2, cc_feature=0),
    ],
)
def test_protected_gpus_pass(inventory: GpuInventory) -> None:
    check_inventory(inventory, 2, ExpectedReady.UNSET)


@pytest.mark.parametrize(
    ("inventory", "mode", "got", "expected"),
    [
        (with_modes(devtools=1), GpuMode.DEVTOOLS, 1, 0),
        (with_modes(devtools=2), GpuMode.DEVTOOLS, 2, 0),
        (with_modes(devtools=1, environment=1), GpuMode.DEVTOOLS, 1, 0),
        (with_modes(environment=0), GpuMode.ENVIRONMENT, 0, 2),
        (with_modes(environment=1), GpuMode.ENVIRONMENT, 1, 2),
        (with_modes(environment=3), GpuMode.ENVIRONMENT, 3, 2),
        (with_modes(cc_feature=0), GpuMode.CC_FEATURE, 0, 1),
        (with_modes(cc_feature=2), GpuMode.CC_FEATURE, 2, 1),
        (with_modes(multi_gpu_mode=3), GpuMode.MULTI_GPU, 3, 0),
        (with_modes(multi_gpu_mode=3, cc_feature=0), GpuMode.MULTI_GPU, 3, 0),
        (dataclasses.replace(INVENTORY, persistent=False), GpuMode.PERSISTENCE, 0, 1),
    ],
)
def test_modes_that_protect_nothing_are_refused(inventory: GpuInventory, mode: GpuMode, got: int, expected: int) -> None:
    with pytest.raises(GpuModeError) as caught:
        check_inventory(inventory, 2, ExpectedReady.UNSET)
    assert (caught.value.mode, caught.value.got, caught.value.expected) == (mode, got, expected)


@pytest.mark.parametrize(
    ("inventory", "got"),
    [
        (with_gpus(), 0),
        (with_gpus("GPU-1"), 1),
        (with_gpus("GPU-1", "GPU-2", "GPU-3"), 3),
        (with_gpus("GPU-1", "GPU-1"), 1),
        (with_gpus("GPU-1", "GPU-2", "GPU-2"), 3),
    ],
)
def test_a_missing_extra_or_repeated_gpu_is_refused(inventory: GpuInventory, got: int) -> None:
    with pytest.raises(GpuCountError) as caught:
        check_inventory(inventory, 2, ExpectedReady.UNSET)
    assert (caught.value.expected, caught.value.got) == (2, got)


def test_a_gpu_of_another_architecture_is_refused() -> None:
    check_inventory(INVENTORY, 2, ExpectedReady.UNSET, "HOPPER")
    mixed = dataclasses.replace(INVENTORY, gpus=(INVENTORY.gpus[0], Gpu("GPU-2", "BLACKWELL", "97")))
    for inventory, got in ((INVENTORY, 0), (mixed, 1)):
        with pytest.raises(GpuCountError) as caught:
            check_inventory(inventory, 2, ExpectedReady.UNSET, "BLACKWELL")
        assert (caught.value.expected, caught.value.got) == (2, got)


def with_switches(*uuids: str, mode: int = 3, multi_gpu_mode: int = 1) -> GpuInventory:
    switches = tuple(Switch(uuid, "LS10", mode) for uuid in uuids)
    return dataclasses.replace(with_modes(multi_gpu_mode=multi_gpu_mode, cc_feature=0), switches=switches)


FOUR = ("SWX-1", "SWX-2", "SWX-3", "SWX-4")


def test_gpus_in_protected_pcie_mode_pass_with_their_switches() -> None:
    check_inventory(with_switches(*FOUR), 2, ExpectedReady.UNSET, switches=4)
    check_inventory(dataclasses.replace(with_switches(*FOUR), ready=True), 2, ExpectedReady.OURS, switches=4)


@pytest.mark.parametrize(
    ("inventory", "switches", "got", "expected"),
    [
        (with_modes(multi_gpu_mode=1, cc_feature=0), 0, 1, 0),  # nobody would attest what lies between the GPUs
        (with_switches(*FOUR), 0, 1, 0),
        (INVENTORY, 4, 0, 1),
        (with_switches(*FOUR, multi_gpu_mode=2), 4, 2, 1),
    ],
)
def test_protected_pcie_goes_with_switches_and_nothing_else_does(
    inventory: GpuInventory, switches: int, got: int, expected: int
) -> None:
    with pytest.raises(GpuModeError) as caught:
        check_inventory(inventory, 2, ExpectedReady.UNSET, switches=switches)
    assert (caught.value.mode, caught.value.got, caught.value.expected) == (GpuMode.MULTI_GPU, got, expected)


@pytest.mark.parametrize(
    ("uuids", "got"), [((), 0), (FOUR[:3], 3), ((*FOUR, "SWX-5"), 5), ((*FOUR[:3], "SWX-1"), 3), ((*FOUR, "SWX-1"), 5)]
)
def test_a_missing_extra_or_repeated_switch_is_refused(uuids: tuple[str, ...], got: int) -> None:
    with pytest.raises(GpuCountError) as caught:
        check_inventory(with_switches(*uuids), 2, ExpectedReady.UNSET, switches=4)
    error = caught.value
    assert (error.expected, error.got, error.device) == (4, got, CountedDevice.NVSWITCH)
    assert str(error) == f"expected 4 distinct NVSwitches, got {got} (host)"


@pytest.mark.parametrize("mode", [-1, 0, 1, 2, 4])
def test_a_switch_that_is_not_locked_is_refused(mode: int) -> None:
    locked = with_switches(*FOUR)
    last = dataclasses.replace(locked.switches[3], mode=mode)
    with pytest.raises(GpuModeError) as caught:
        check_inventory(dataclasses.replace(locked, switches=(*locked.switches[:3], last)), 2, ExpectedReady.UNSET, switches=4)
    assert (caught.value.mode, caught.value.got, caught.value.expected) == (GpuMode.SWITCH, mode, 3)


@pytest.mark.parametrize(("knob", "value"), [("switch_mode", 1), ("switches", 3)])
def test_a_switch_that_changed_since_attestation_does_not_pass(switched: SimulatedMachine, knob: str, value: int) -> None:
    system = gpu_system_of(switched)
    before = system.inspect()
    setattr(switched.gpu, knob, value)
    with pytest.raises(GpuFaultError) as caught:
        secure(VERDICT, system, before, ExpectedReady.UNSET)
    assert caught.value.fault is GpuFault.INVENTORY_CHANGED
    assert SET_CALL not in nvml_calls(switched)


def test_gpus_and_switches_pass_the_gate_together(switched: SimulatedMachine) -> None:
    system = gpu_system_of(switched)
    secured = secure(VERDICT, system, system.inspect(), ExpectedReady.UNSET)
    assert secured.inventory is not None
    assert (len(secured.inventory.gpus), len(secured.inventory.switches)) == (8, 4)
    assert nvml_calls(switched)[-2:] == [SET_CALL, "nvmlSystemGetConfComputeGpusReadyState"]


def test_a_ready_state_somebody_else_set_needs_a_new_vm() -> None:
    with pytest.raises(VmRestartRequiredError):
        check_inventory(dataclasses.replace(INVENTORY, ready=True), 2, ExpectedReady.UNSET)


@pytest.mark.parametrize("expected", [ExpectedReady.PRESET, ExpectedReady.OURS])
def test_a_ready_state_that_was_set_must_be_set(expected: ExpectedReady) -> None:
    check_inventory(dataclasses.replace(INVENTORY, ready=True), 2, expected)
    with pytest.raises(GpuFaultError) as caught:
        check_inventory(INVENTORY, 2, expected)
    assert caught.value.fault is GpuFault.READY_NOT_SET


@pytest.mark.parametrize(
    "after",
    [
        with_gpus("GPU-2", "GPU-1"),
        with_gpus("GPU-1"),
        with_modes(multi_gpu_mode=2),
        dataclasses.replace(INVENTORY, driver_version="580.95.06"),
        dataclasses.replace(INVENTORY, ready=True),
        dataclasses.replace(INVENTORY, gpus=(INVENTORY.gpus[0], Gpu("GPU-2", "HOPPER", "97"))),
    ],
)
def test_any_change_since_attestation_is_a_fault(after: GpuInventory) -> None:
    check_unchanged(INVENTORY, INVENTORY)
    with pytest.raises(GpuFaultError) as caught:
        check_unchanged(INVENTORY, after)
    assert caught.value.fault is GpuFault.INVENTORY_CHANGED


# --- the gate itself --------------------------------------------------------------------------------------------------


def test_the_gate_sets_ready_once_and_as_its_last_act(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    before = system.inspect()
    secured = secure(VERDICT, system, before, ExpectedReady.UNSET)
    assert (secured.ready_state, secured.inventory) == (ReadyState.SET_BY_AGENT, before)
    calls = nvml_calls(gpus)
    assert calls.count(SET_CALL) == 1
    assert calls[-2:] == [SET_CALL, "nvmlSystemGetConfComputeGpusReadyState"]
    assert SimulatedMachine.load(gpus.directory, root=gpus.directory).gpu.ready == 1


def test_an_agent_that_starts_again_after_the_gate_needs_a_new_vm(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    secure(VERDICT, system, system.inspect(), ExpectedReady.UNSET)
    again = SimulatedMachine.load(gpus.directory, root=gpus.directory).gpu_system()
    with pytest.raises(VmRestartRequiredError):
        check_inventory(again.inspect(), 2, ExpectedReady.UNSET)
    with pytest.raises(VmRestartRequiredError):
        secure(VERDICT, again, again.inspect(), ExpectedReady.UNSET)
    assert nvml_calls(gpus).count(SET_CALL) == 1


def test_a_preset_ready_state_is_used_and_not_set_again(gpus: SimulatedMachine) -> None:
    gpus.gpu.ready = 1
    system = gpus.gpu_system()
    secured = secure(VERDICT, system, system.inspect(), ExpectedReady.PRESET)
    assert secured.ready_state is ReadyState.PRESET
    assert SET_CALL not in nvml_calls(gpus)


def test_a_boot_that_has_passed_the_gate_does_not_pass_it_again(gpus: SimulatedMachine) -> None:
    gpus.gpu.ready = 1
    system = gpus.gpu_system()
    with pytest.raises(RuntimeError):
        secure(VERDICT, system, system.inspect(), ExpectedReady.OURS)
    assert SET_CALL not in nvml_calls(gpus)


def test_without_gpus_there_is_nothing_to_secure() -> None:
    secured = secure(VERDICT, None, None, ExpectedReady.UNSET)
    assert (secured.ready_state, secured.inventory) == (ReadyState.NO_GPU, None)


def test_a_gpu_system_without_its_attested_inventory_is_a_bug(gpus: SimulatedMachine) -> None:
    with pytest.raises(AssertionError):
        secure(VERDICT, gpus.gpu_system(), None, ExpectedReady.UNSET)
    with pytest.raises(AssertionError):
        secure(VERDICT, None, INVENTORY, ExpectedReady.UNSET)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("count", 1),
        ("driver_version", "580.95.06"),
        ("vbios_version", "96.00.74.00.1B"),
        ("devtools", 1),
        ("environment", 1),
        ("cc_feature", 0),
        ("multi_gpu_mode", 1),
        ("ready", 1),
        ("architecture", 10),
        ("persistent", False),
    ],
)
def test_a_machine_that_changed_since_attestation_does_not_pass(gpus: SimulatedMachine, knob: str, value: object) -> None:
    system = gpus.gpu_system()
    before = system.inspect()
    setattr(gpus.gpu, knob, value)
    with pytest.raises(GpuFaultError) as caught:
        secure(VERDICT, system, before, ExpectedReady.UNSET)
    assert caught.value.fault is GpuFault.INVENTORY_CHANGED
    assert SET_CALL not in nvml_calls(gpus)


@pytest.mark.parametrize(("knob", "value"), [("devtools", 1), ("environment", 1), ("cc_feature", 0)])
def test_an_unprotected_machine_does_not_pass_though_it_did_not_change(gpus: SimulatedMachine, knob: str, value: int) -> None:
    setattr(gpus.gpu, knob, value)
    system = gpus.gpu_system()
    with pytest.raises(GpuModeError):
        secure(VERDICT, system, system.inspect(), ExpectedReady.UNSET)
    assert SET_CALL not in nvml_calls(gpus)


@pytest.mark.parametrize("expected", [ExpectedReady.UNSET, ExpectedReady.PRESET])
def test_a_fault_since_attestation_does_not_pass(gpus: SimulatedMachine, expected: ExpectedReady) -> None:
    gpus.gpu.ready = int(expected is ExpectedReady.PRESET)
    system = gpus.gpu_system()
    before = system.inspect()
    with (gpus.directory / "kmsg").open("a") as file:
        file.write("4,1,1,-;NVRM: Xid (PCI:0000:06:00): 79, GPU has fallen off the bus.\n")
    with pytest.raises(GpuFaultError) as caught:
        secure(VERDICT, system, before, expected)
    assert (caught.value.fault, caught.value.code) == (GpuFault.FATAL_XID, 79)
    assert SET_CALL not in nvml_calls(gpus)


def test_registry_keys_that_appear_after_attestation_do_not_pass(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    before = system.inspect()
    (gpus.directory / "nvidia-params").write_text('RegistryDwords: "RmConfidentialCompute=1"\n')
    with pytest.raises(GpuModeError):
        secure(VERDICT, system, before, ExpectedReady.UNSET)
    assert SET_CALL not in nvml_calls(gpus)


def test_a_latched_driver_refuses_and_the_gate_does_not_insist(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    before = system.inspect()
    gpus.gpu.fatal_latched = True
    with pytest.raises(DeviceError) as caught:
        secure(VERDICT, system, before, ExpectedReady.UNSET)
    assert (caught.value.call, caught.value.code) == (SET_CALL, 2)
    assert nvml_calls(gpus).count(SET_CALL) == 1


def test_a_ready_state_that_falls_back_at_once_does_not_pass(gpus: SimulatedMachine) -> None:
    gpus.gpu.ready_falls_back_after = 0
    system = gpus.gpu_system()
    with pytest.raises(GpuFaultError) as caught:
        secure(VERDICT, system, system.inspect(), ExpectedReady.UNSET)
    assert caught.value.fault is GpuFault.READY_NOT_SET


def test_nobody_else_makes_secured_devices() -> None:
    with pytest.raises(RuntimeError):
        SecuredDevices(ReadyState.NO_GPU, None, made_by=object())
    with pytest.raises(TypeError):
        SecuredDevices(ReadyState.NO_GPU, None)  # type: ignore[call-arg]
    secured = secure(VERDICT, None, None, ExpectedReady.UNSET)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        dataclasses.replace(secured, ready_state=ReadyState.PRESET)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        secured.inventory = INVENTORY  # type: ignore[misc]
    assert copy.copy(secured) == secured
