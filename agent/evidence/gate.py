"""The GPU gate: what must hold of the GPUs before attestation, and the one step from ready 0 to ready 1 after the Verdict.

Pure rules over what a `GpuSystem` says, and `secure`, the only maker of the `SecuredDevices` without which no key is unwrapped.
The step has no compensation: the ready state is never set back, and one VM gets one gate. The ready state keeps user-mode
work off the GPUs; it is no boundary against root in the guest. What is proven about the GPUs is proven by their Evidence.
"""

import enum
from dataclasses import InitVar, dataclass

from agent.errors import (
    CountedDevice,
    GpuCountError,
    GpuFault,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    VmRestartRequiredError,
)
from agent.evidence import GpuInventory, GpuSystem
from agent.handshake import Verdict

_CC_ON = 1
_PRODUCTION = 2
_SINGLE_GPU = 0
_PROTECTED_PCIE = 1
_MULTI_GPU_MODES = (_PROTECTED_PCIE, 2)  # the other is NVLE
_SWITCH_LOCKED = 3
_ONLY_SECURE = object()


class ExpectedReady(enum.Enum):
    """What the ready state has to be when the GPUs are looked at, and whose work that is."""

    UNSET = "unset"  # 0: this boot's gate is still to come
    PRESET = "preset"  # 1: by the image's init, as the measured configuration says
    OURS = "ours"  # 1: this boot has passed the gate, and renews its lease


class ReadyState(enum.Enum):
    """Who set the ready state that this boot relies on."""

    NO_GPU = "no-gpu"
    SET_BY_AGENT = "set-by-agent"
    PRESET = "preset"  # by the image's init, before any attestation, as the measured configuration says


@dataclass(frozen=True, slots=True)
class SecuredDevices:
    """Proof that the gate was passed; only `secure` makes one.

    Attributes:
        ready_state: who set it.
        inventory: the GPUs and NVSwitches as re-read at the gate; None without GPUs.
    """

    ready_state: ReadyState
    inventory: GpuInventory | None
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        # refusal: test_nobody_else_makes_secured_devices
        if made_by is not _ONLY_SECURE:
            raise RuntimeError("only secure() makes SecuredDevices")


def check_inventory(
    inventory: GpuInventory, count: int, expected: ExpectedReady, architecture: str | None = None, *, switches: int = 0
) -> None:
    """Check what must hold before attestation, and again before the gate.

    Args:
        inventory: as just read.
        count: configured number of GPUs, 1 or more.
        expected: the ready state, one for all GPUs; NVSwitches have none.
        architecture: configured one of every GPU, in Trustee's words; None for any that can attest.
        switches: configured number of NVSwitches.

    Raises:
        GpuModeError, GpuCountError: as `check_gpus` and `check_switches`.
        VmRestartRequiredError, GpuFaultError: as `check_ready`.
    """
    check_gpus(inventory, count, architecture)
    check_switches(inventory, switches)
    check_ready(inventory, expected)


def check_gpus(inventory: GpuInventory, count: int, architecture: str | None) -> None:
    """The GPUs' part of `check_inventory`.

    Raises:
        GpuModeError: a mode in which the GPUs protect nothing, one we do not know, or one that this boot would not outlive.
        GpuCountError: a GPU is missing, extra, listed twice, or of another architecture.
    """
    # Devtools first: it also changes the environment and sets ready by itself.
    modes = inventory.modes
    # refusal: test_modes_that_protect_nothing_are_refused
    if modes.devtools != 0:
        raise GpuModeError(GpuMode.DEVTOOLS, modes.devtools, 0)
    # refusal: test_modes_that_protect_nothing_are_refused
    if modes.environment != _PRODUCTION:
        raise GpuModeError(GpuMode.ENVIRONMENT, modes.environment, _PRODUCTION)
    # refusal: test_modes_that_protect_nothing_are_refused
    if modes.multi_gpu_mode not in (_SINGLE_GPU, *_MULTI_GPU_MODES):
        raise GpuModeError(GpuMode.MULTI_GPU, modes.multi_gpu_mode, _SINGLE_GPU)
    # The driver shows the feature as off in protected PCIe mode.
    # refusal: test_modes_that_protect_nothing_are_refused
    if modes.cc_feature != _CC_ON and modes.multi_gpu_mode not in _MULTI_GPU_MODES:
        raise GpuModeError(GpuMode.CC_FEATURE, modes.cc_feature, _CC_ON)

    # A GPU in confidential-computing mode initialises once per reset. Without persistence mode the worker, whose end closes it,
    # would be its last user, and the server would find none.
    # refusal: test_modes_that_protect_nothing_are_refused
    if not inventory.persistent:
        raise GpuModeError(GpuMode.PERSISTENCE, got=0, expected=1)

    distinct = len({gpu.uuid for gpu in inventory.gpus})
    # refusal: test_a_missing_extra_or_repeated_gpu_is_refused
    if len(inventory.gpus) != count:
        raise GpuCountError(count, len(inventory.gpus))
    # refusal: test_a_missing_extra_or_repeated_gpu_is_refused
    if distinct != count:
        raise GpuCountError(count, distinct)
    others = sum(architecture not in (None, gpu.arch) for gpu in inventory.gpus)
    # refusal: test_a_gpu_of_another_architecture_is_refused
    if others:
        raise GpuCountError(count, count - others)


def check_switches(inventory: GpuInventory, count: int) -> None:
    """The NVSwitches' part of `check_inventory`.

    Raises:
        GpuModeError: the GPUs are in protected-PCIe mode and no NVSwitch is configured, or the other way round, or an
            NVSwitch does not stand for that mode.
        GpuCountError: an NVSwitch is missing, extra or listed twice.
    """
    # What GPUs in this mode say to each other crosses the NVSwitches in the clear: without their evidence it protects nothing.
    protected = inventory.modes.multi_gpu_mode == _PROTECTED_PCIE
    # refusal: test_protected_pcie_goes_with_switches_and_nothing_else_does
    if protected != bool(count):
        expected = _PROTECTED_PCIE if count else _SINGLE_GPU
        raise GpuModeError(GpuMode.MULTI_GPU, inventory.modes.multi_gpu_mode, expected)

    for got in (len(inventory.switches), len({switch.uuid for switch in inventory.switches})):
        # refusal: test_a_missing_extra_or_repeated_switch_is_refused
        if got != count:
            raise GpuCountError(count, got, CountedDevice.NVSWITCH)
    for switch in inventory.switches:
        # Locked, so that nobody turns it off again behind the evidence.
        # refusal: test_a_switch_that_is_not_locked_is_refused
        if switch.mode != _SWITCH_LOCKED:
            raise GpuModeError(GpuMode.SWITCH, switch.mode, _SWITCH_LOCKED)


def check_ready(inventory: GpuInventory, expected: ExpectedReady) -> None:
    """The ready state's part of `check_inventory`.

    Raises:
        VmRestartRequiredError: ready is 1 and should not be.
        GpuFaultError: ready is 0 and should not be.
    """
    # refusal: test_a_ready_state_somebody_else_set_needs_a_new_vm
    if inventory.ready and expected is ExpectedReady.UNSET:
        raise VmRestartRequiredError
    # refusal: test_a_ready_state_that_was_set_must_be_set
    if not inventory.ready and expected is not ExpectedReady.UNSET:
        raise GpuFaultError(GpuFault.READY_NOT_SET)


def check_unchanged(before: GpuInventory, after: GpuInventory) -> None:
    """Nothing moved while the Verdict was on its way: neither GPUs nor NVSwitches, versions, modes or ready state.

    Raises:
        GpuFaultError: something did.
    """
    # refusal: test_any_change_since_attestation_is_a_fault
    if before != after:
        raise GpuFaultError(GpuFault.INVENTORY_CHANGED)


def secure(verdict: Verdict, system: GpuSystem | None, before: GpuInventory | None, expected: ExpectedReady) -> SecuredDevices:
    """Pass the gate. A boot does so once: with `ExpectedReady.OURS` it is a RuntimeError.

    Args:
        verdict: accepted, over Evidence collected after `before` was read; asked for so that nobody comes here without one.
        system: the GPUs; None when the configuration has none.
        before: their inventory as attested; None when the configuration has none.
        expected: the ready state as attested.

    Raises:
        DeviceError: the driver refused.
        GpuModeError, GpuCountError, VmRestartRequiredError: as `check_inventory`.
        GpuFaultError: a fault since boot, a change since attestation, or ready does not read back as 1.
    """
    # refusal: test_a_boot_that_has_passed_the_gate_does_not_pass_it_again
    if expected is ExpectedReady.OURS:
        raise RuntimeError("the gate is passed once")
    if system is None or before is None:
        assert system is None and before is None, "a GPU system and its inventory come together"
        return SecuredDevices(ReadyState.NO_GPU, None, made_by=_ONLY_SECURE)

    # 1. The same GPUs, in the same modes, in the same ready state as attested, and these are still acceptable.
    now = system.inspect()
    # refusal: test_a_machine_that_changed_since_attestation_does_not_pass
    check_unchanged(before, now)
    # refusal: test_an_agent_that_starts_again_after_the_gate_needs_a_new_vm
    check_inventory(now, len(before.gpus), expected, switches=len(before.switches))

    # 2. No fault so far.
    # refusal: test_a_fault_since_attestation_does_not_pass
    system.check_faults()

    # 3. The one step, last: what fails after it costs the VM.
    if expected is ExpectedReady.PRESET:
        return SecuredDevices(ReadyState.PRESET, now, made_by=_ONLY_SECURE)
    system.set_ready()
    return SecuredDevices(ReadyState.SET_BY_AGENT, now, made_by=_ONLY_SECURE)
