"""The real pynvml over simulated GPUs: every answer, every fault, every one of them once."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from agent.errors import (
    AgentError,
    DeviceError,
    EvidenceBindingError,
    EvidenceCheck,
    EvidenceVerificationError,
    GpuFault,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    MalformedEvidenceError,
    NoAttesterError,
    Owner,
)
from agent.evidence import GpuModes
from agent.evidence.gpu import MAX_PARAMETER_BYTES, NvmlGpuSystem, is_held
from agent.evidence.gpu_abi import parse_report
from agent.evidence.gpu_watch import FATAL_XIDS, MAX_KERNEL_LOG_BYTES, NVML_LIBRARIES, open_nvml
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import SimulatedNvml, nvml_calls, open_gpu_system
from tests.gpus import GENUINE_GPUS, NONCE, Recorded, gpu_machine, recorded
from tests.nvml_emulation import LIBRARY, answered

REPORT_CALL = "nvmlDeviceGetConfComputeGpuAttestationReport"
CERTIFICATE_CALL = "nvmlDeviceGetConfComputeGpuCertificate"
SETTINGS_CALL = "nvmlSystemGetConfComputeSettings"
SET_CALL = "nvmlSystemSetConfComputeGpusReadyState"


@pytest.fixture
def gpus(gpus: SimulatedMachine) -> Iterator[SimulatedMachine]:
    yield gpus
    assert pynvml.nvmlLib is None, "no library is left behind in pynvml"
    assert pynvml._nvmlGetFunctionPointer_cache == {}


class Library:
    """A library that answers as the simulated one, but for one function."""

    def __init__(self, machine: SimulatedMachine, name: str, function: object) -> None:
        self._genuine = SimulatedNvml(machine)
        setattr(self, name, function)

    def __getattr__(self, name: str) -> object:
        return getattr(self._genuine, name)


def system_over(machine: SimulatedMachine, library: object) -> NvmlGpuSystem:
    return open_gpu_system(machine, library)


def test_inventory_modes_and_ready_state_are_read(gpus: SimulatedMachine) -> None:
    inventory = gpus.gpu_system().inspect()
    assert inventory.driver_version == "580.95.05"
    assert [(gpu.arch, gpu.vbios_version) for gpu in inventory.gpus] == [("HOPPER", "96.00.74.00.1A")] * 2
    assert len({gpu.uuid for gpu in inventory.gpus}) == len(inventory.gpus)
    assert inventory.modes == GpuModes(cc_feature=1, environment=2, devtools=0, multi_gpu_mode=0)
    assert (inventory.ready, inventory.persistent) == (False, True)


def test_persistence_mode_and_architecture_are_the_drivers_word(gpus: SimulatedMachine) -> None:
    gpus.gpu.persistent, gpus.gpu.architecture = False, pynvml.NVML_DEVICE_ARCH_BLACKWELL
    inventory = gpus.gpu_system().inspect()
    assert (inventory.persistent, {gpu.arch for gpu in inventory.gpus}) == (False, {"BLACKWELL"})


def test_every_mode_lands_in_its_own_field(gpus: SimulatedMachine) -> None:
    gpus.gpu.cc_feature, gpus.gpu.environment, gpus.gpu.devtools, gpus.gpu.multi_gpu_mode = 5, 6, 7, 8
    assert gpus.gpu_system().inspect().modes == GpuModes(cc_feature=5, environment=6, devtools=7, multi_gpu_mode=8)


def test_evidence_is_collected_of_every_gpu_in_order(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    evidence = system.collect(NONCE)
    assert [gpu.uuid for gpu in evidence] == [gpu.uuid for gpu in system.inspect().gpus]
    for gpu in evidence:
        assert gpu.arch == "HOPPER"
        assert parse_report(gpu.report).requester_nonce == NONCE
        assert gpu.certificate_chain.endswith(b"-----END CERTIFICATE-----\n")
    assert nvml_calls(gpus).count(REPORT_CALL) == len(evidence)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("nvmlSystemGetDriverVersion", "nvmlSystemGetDriverVersion"),
        ("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount"),
        ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex"),
        ("nvmlDeviceGetUUID", "nvmlDeviceGetUUID"),
        ("nvmlDeviceGetArchitecture", "nvmlDeviceGetArchitecture"),
        ("nvmlDeviceGetVbiosVersion", "nvmlDeviceGetVbiosVersion"),
        (SETTINGS_CALL, SETTINGS_CALL),
        ("nvmlSystemGetConfComputeGpusReadyState", "nvmlSystemGetConfComputeGpusReadyState"),
        ("nvmlDeviceGetPersistenceMode", "nvmlDeviceGetPersistenceMode"),
    ],
)
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN, 12345])
def test_any_failing_call_ends_the_inspection(gpus: SimulatedMachine, function: str, call: str, code: int) -> None:
    system = gpus.gpu_system()
    gpus.gpu.fail_calls = {function: code}
    with pytest.raises(DeviceError) as caught:
        system.inspect()
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("nvml", call, code)
    assert nvml_calls(gpus).count(function) == 1


def test_a_failing_initialisation_is_a_device_error(gpus: SimulatedMachine) -> None:
    gpus.gpu.fail_calls = {"nvmlInitWithFlags": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
    with pytest.raises(DeviceError) as caught:
        gpus.gpu_system()
    assert (caught.value.call, caught.value.code) == ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


NVML_CODES = (1, 2, 3, 4, 9, 10, 15, 16, 18, 19, 20, 25, 27, 28, 29, 999)
"""What NVML may say of any call; 12 and 13, no library and no such function, have tests of their own."""


@pytest.mark.parametrize("code", NVML_CODES)
@pytest.mark.parametrize("function", ["nvmlInitWithFlags", CERTIFICATE_CALL, REPORT_CALL, SET_CALL])
def test_whatever_nvml_says_is_told_to_the_host_and_final(gpus: SimulatedMachine, function: str, code: int) -> None:
    gpus.gpu.fail_calls = {function: code}
    with pytest.raises(DeviceError) as caught:
        system = gpus.gpu_system()
        system.collect(NONCE)
        system.set_ready()
    error = caught.value
    assert (error.interface, error.call, error.code) == ("nvml", function.replace("WithFlags", ""), code)
    assert (error.owner, error.exit_status, error.retryable) == (Owner.HOST, 12, False)
    assert nvml_calls(gpus).count(function) == 1


@pytest.mark.parametrize("function", [CERTIFICATE_CALL, REPORT_CALL])
def test_a_failed_evidence_call_is_final_and_never_made_again(gpus: SimulatedMachine, function: str) -> None:
    system = gpus.gpu_system()
    gpus.gpu.fail_calls = {function: pynvml.NVML_ERROR_TIMEOUT}
    with pytest.raises(DeviceError) as caught:
        system.collect(NONCE)
    assert (caught.value.call, caught.value.code, caught.value.retryable) == (function, pynvml.NVML_ERROR_TIMEOUT, False)
    assert nvml_calls(gpus).count(function) == 1

    gpus.gpu.fail_calls = {}
    with pytest.raises(DeviceError) as caught:
        system.collect(NONCE)
    assert caught.value.code == pynvml.NVML_ERROR_NOT_READY
    with pytest.raises(GpuFaultError) as fault:
        system.check_faults()
    assert fault.value.fault is GpuFault.CC_FATAL
    with pytest.raises(DeviceError):
        system.set_ready()


def test_the_second_gpu_failing_is_no_shorter_list(gpus: SimulatedMachine) -> None:
    (gpus.silicon / "gpu-1.key").unlink()
    with pytest.raises(DeviceError):
        gpus.gpu_system().collect(NONCE)


def test_a_gpu_that_signs_another_nonce_is_not_believed(gpus: SimulatedMachine) -> None:
    gpus.gpu.wrong_nonce = True
    with pytest.raises(EvidenceBindingError):
        gpus.gpu_system().collect(NONCE)


def test_a_flipped_signature_bit_does_not_leave_the_guest(gpus: SimulatedMachine) -> None:
    gpus.gpu.flip_signature_bit = True
    with pytest.raises(EvidenceVerificationError) as caught:
        gpus.gpu_system().collect(NONCE)
    assert caught.value.check is EvidenceCheck.REPORT_SIGNATURE


def test_the_certificate_of_another_gpu_does_not_leave_the_guest(gpus: SimulatedMachine) -> None:
    shutil.copy(gpus.silicon / "gpu-1.pem", gpus.silicon / "gpu-0.pem")
    with pytest.raises(EvidenceVerificationError) as caught:
        gpus.gpu_system().collect(NONCE)
    assert caught.value.check is EvidenceCheck.REPORT_SIGNATURE


def test_a_trailing_byte_is_kept(gpus: SimulatedMachine) -> None:
    gpus.gpu.trailing_byte = True
    assert all(gpu.report.endswith(b"\0") for gpu in gpus.gpu_system().collect(NONCE))


@pytest.mark.parametrize(
    ("name", "struct", "field", "size"),
    [
        (CERTIFICATE_CALL, pynvml.c_nvmlConfComputeGpuCertificate_t, "attestationCertChainSize", 0x1401),
        (CERTIFICATE_CALL, pynvml.c_nvmlConfComputeGpuCertificate_t, "attestationCertChainSize", 0),
        (REPORT_CALL, pynvml.c_nvmlConfComputeGpuAttestationReport_t, "attestationReportSize", 0x2001),
        (REPORT_CALL, pynvml.c_nvmlConfComputeGpuAttestationReport_t, "attestationReportSize", 0),
    ],
)
def test_a_size_outside_the_buffer_is_malformed(
    gpus: SimulatedMachine, name: str, struct: type[ctypes.Structure], field: str, size: int
) -> None:
    def answer(_handle: int, address: int) -> int:
        setattr(struct.from_address(address), field, size)
        return 0

    function = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(answer)
    with pytest.raises(MalformedEvidenceError):
        system_over(gpus, Library(gpus, name, function)).collect(NONCE)


def replay(machine: SimulatedMachine, name: str) -> Recorded:
    """The machine's one GPU answers as a recorded one did."""
    was = recorded(name)
    (machine.silicon / "gpu-0.report").write_bytes(was.report)
    (machine.silicon / "gpu-0.pem").write_bytes(was.chain)
    machine.gpu.count = 1
    if was.evidence.arch == "BLACKWELL":
        machine.gpu.architecture = pynvml.NVML_DEVICE_ARCH_BLACKWELL
    return was


@pytest.mark.parametrize("name", GENUINE_GPUS)
def test_recorded_evidence_comes_out_as_it_was(gpus: SimulatedMachine, name: str) -> None:
    was = replay(gpus, name)
    (evidence,) = gpus.gpu_system().collect(was.nonce)
    assert (evidence.arch, evidence.report, evidence.certificate_chain) == (was.evidence.arch, was.report, was.chain)


def test_recorded_evidence_answers_no_other_nonce(gpus: SimulatedMachine) -> None:
    replay(gpus, "hopper_590.12_ppcie_0")
    with pytest.raises(EvidenceBindingError):
        gpus.gpu_system().collect(NONCE)


def test_recorded_evidence_with_a_wrong_signature_does_not_leave_the_guest(gpus: SimulatedMachine) -> None:
    was = replay(gpus, "hopper_invalid_signature")
    with pytest.raises(EvidenceVerificationError) as caught:
        gpus.gpu_system().collect(was.nonce)
    assert caught.value.check is EvidenceCheck.REPORT_SIGNATURE


def test_pynvml_finds_the_library_that_stands_for_the_drivers_as_it_finds_that(nvml_library: Path, tmp_path: Path) -> None:
    program = (
        "import pynvml as n; n.nvmlInit(); print(n.nvmlSystemGetDriverVersion(), n.nvmlDeviceGetCount()); n.nvmlShutdown()"
    )
    with answered(gpu_machine(tmp_path / "machine"), nvml_library) as machine:
        assert machine.library.name == LIBRARY
        environment = {"LD_LIBRARY_PATH": str(machine.library.parent)}
        done = subprocess.run((sys.executable, "-c", program), env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("580.95.05 2\n", "")


def test_the_library_says_what_the_drivers_says_of_a_wrong_call(nvml_library: Path, tmp_path: Path) -> None:
    with answered(gpu_machine(tmp_path / "machine"), nvml_library) as machine:
        nvml, count, text = ctypes.CDLL(str(machine.library)), ctypes.c_uint(), ctypes.create_string_buffer(9)
        assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == pynvml.NVML_ERROR_UNINITIALIZED
        assert nvml.nvmlInitWithFlags(0) == pynvml.NVML_SUCCESS
        assert nvml.nvmlDeviceGetCount_v2(None) == pynvml.NVML_ERROR_INVALID_ARGUMENT
        assert nvml.nvmlSystemGetDriverVersion(text, 9) == pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
        settings.version = 1
        code = nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))
        assert code == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        assert nvml.nvmlShutdown() == pynvml.NVML_SUCCESS
        assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == pynvml.NVML_ERROR_UNINITIALIZED
        (machine.library.parent / "nvml.sock").unlink()
        assert nvml.nvmlInitWithFlags(0) == pynvml.NVML_ERROR_DRIVER_NOT_LOADED


def test_a_slow_gpu_is_waited_for_and_the_next_one_is_not_asked_meanwhile(gpus: SimulatedMachine) -> None:
    gpus.gpu.delay_calls = {REPORT_CALL: 0.3}
    began = time.monotonic()
    assert len(gpus.gpu_system().collect(NONCE)) == 2
    assert time.monotonic() - began >= 0.6


def test_an_architecture_without_attestation_is_no_attester(gpus: SimulatedMachine) -> None:
    def answer(_handle: int, address: int) -> int:
        ctypes.c_uint.from_address(address).value = pynvml.NVML_DEVICE_ARCH_AMPERE
        return 0

    function = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(answer)
    with pytest.raises(NoAttesterError) as caught:
        system_over(gpus, Library(gpus, "nvmlDeviceGetArchitecture", function)).inspect()
    assert caught.value.attester == "nvml-architecture-7"


def test_text_that_is_none_is_a_device_error(gpus: SimulatedMachine) -> None:
    def answer(address: int, _size: int) -> int:
        ctypes.memmove(address, b"\xff\0", 2)
        return 0

    function = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)(answer)
    with pytest.raises(DeviceError):
        system_over(gpus, Library(gpus, "nvmlSystemGetDriverVersion", function)).inspect()


def test_a_library_without_a_function_is_a_device_error(gpus: SimulatedMachine) -> None:
    with pytest.raises(DeviceError) as caught:
        system_over(gpus, ctypes.CDLL(None))
    assert caught.value.code == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND


def test_two_systems_in_one_process_keep_their_libraries_apart(gpus: SimulatedMachine, tmp_path: Path) -> None:
    other = gpu_machine(tmp_path / "other", count=1)
    systems = gpus.gpu_system(), other.gpu_system()
    assert [len(system.inspect().gpus) for system in (*systems, *systems)] == [2, 1, 2, 1]


def test_nvml_is_looked_for_at_absolute_paths_only(tmp_path: Path) -> None:
    assert NVML_LIBRARIES
    assert all(path.is_absolute() for path in NVML_LIBRARIES)
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"no library")
    with pytest.raises(NoAttesterError) as caught:
        open_nvml((tmp_path / "missing.so", tmp_path / "libnvidia-ml.so.1"))
    assert caught.value.attester == "nvml"


@pytest.mark.parametrize(
    ("process", "target", "held"),
    [
        ("7", "/dev/nvidia0", True),
        ("7", "/dev/nvidia12", True),
        ("7", "/dev/nvidiactl", False),
        ("7", "/dev/nvidia-uvm", False),
        ("ours", "/dev/nvidia0", False),
        ("self", "/dev/nvidia0", False),
    ],
)
def test_a_gpu_is_held_when_another_process_has_its_node_open(tmp_path: Path, process: str, target: str, held: bool) -> None:
    descriptors = tmp_path / (str(os.getpid()) if process == "ours" else process) / "fd"
    descriptors.mkdir(parents=True)
    (descriptors / "0").symlink_to("/dev/null")
    (descriptors / "3").symlink_to(target)
    (tmp_path / "8").mkdir()  # ended while we looked
    assert is_held(tmp_path) is held


def test_ready_is_set_once_and_read_back(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    system.set_ready()
    assert nvml_calls(gpus)[-2:] == [SET_CALL, "nvmlSystemGetConfComputeGpusReadyState"]
    assert nvml_calls(gpus).count(SET_CALL) == 1
    assert system.inspect().ready is True


def test_a_ready_state_that_does_not_stay_is_a_fault(gpus: SimulatedMachine) -> None:
    gpus.gpu.ready_falls_back_after = 0
    with pytest.raises(GpuFaultError) as caught:
        gpus.gpu_system().set_ready()
    assert caught.value.fault is GpuFault.READY_NOT_SET


def test_a_refused_ready_state_is_a_device_error(gpus: SimulatedMachine) -> None:
    gpus.gpu.fail_calls = {SET_CALL: pynvml.NVML_ERROR_NO_PERMISSION}
    with pytest.raises(DeviceError) as caught:
        gpus.gpu_system().set_ready()
    assert (caught.value.call, caught.value.code) == (SET_CALL, pynvml.NVML_ERROR_NO_PERMISSION)
    assert nvml_calls(gpus)[-1] == SET_CALL


# --- kernel log -------------------------------------------------------------------------------------------------------


def log(machine: SimulatedMachine, text: bytes) -> NvmlGpuSystem:
    system = machine.gpu_system()
    with (machine.directory / "kmsg").open("ab") as file:
        file.write(text)
    assert isinstance(system, NvmlGpuSystem)
    return system


def fault_of(system: NvmlGpuSystem) -> tuple[GpuFault, int]:
    with pytest.raises(GpuFaultError) as caught:
        system.check_faults()
    return caught.value.fault, caught.value.code


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_a_fatal_xid_is_a_fault_with_its_number(gpus: SimulatedMachine, xid: int) -> None:
    text = f"4,812,5123456,-;NVRM: Xid (PCI:0000:06:00): {xid}, pid='<unknown>', name=<unknown>, a description\n"
    assert fault_of(log(gpus, text.encode())) == (GpuFault.FATAL_XID, xid)


def test_the_fatal_xid_is_found_behind_a_harmless_one_and_across_reads(gpus: SimulatedMachine) -> None:
    line = b"4,1,1,-;NVRM: Xid (PCI:0000:06:00): 31, pid=1, name=x, MMU fault\n4,1,1,-;NVRM: Xid (PCI:0000:06:00): 79, GPU\n"
    for shift in range(30):
        filling = b"x" * (65536 - 100 + shift)
        system = log(gpus, b"")
        (gpus.directory / "kmsg").write_bytes(filling + line)
        assert fault_of(system) == (GpuFault.FATAL_XID, 79)


@pytest.mark.parametrize(
    "text",
    [
        b"4,1,1,-;NVRM: Xid (PCI:0000:06:00): 31, pid=1, name=x, MMU fault\n",
        b"4,1,1,-;NVRM: Xid (PCI:0000:06:00): 790, nothing known\n",
        b"4,1,1,-;NVRM: Xid 79\n",
        b"4,1,1,-;\xff\xfe\0 binary\n",
    ],
)
def test_other_lines_are_no_fault(gpus: SimulatedMachine, text: bytes) -> None:
    log(gpus, text).check_faults()


def test_a_confidential_computing_fault_is_a_fault(gpus: SimulatedMachine) -> None:
    line = b"3,9,9,-;NVRM: ConfCompute: Fatal error hit!\n"
    system = log(gpus, line)
    assert fault_of(system) == (GpuFault.CC_FATAL, 0)
    for before_the_read_ends in range(0, len(line), 5):
        (gpus.directory / "kmsg").write_bytes(b"x" * ((64 << 10) - before_the_read_ends) + line)
        assert fault_of(system) == (GpuFault.CC_FATAL, 0)


def test_a_log_that_only_blocks_has_ended(gpus: SimulatedMachine) -> None:
    system = log(gpus, b"")
    path = gpus.directory / "kmsg"
    path.unlink()
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    try:
        system.check_faults()
        os.write(writer, b"4,1,1,-;NVRM: Xid (PCI:0000:06:00): 48, DBE\n")
        assert fault_of(system) == (GpuFault.FATAL_XID, 48)
    finally:
        os.close(writer)


def test_a_log_that_cannot_be_read_is_a_fault(gpus: SimulatedMachine) -> None:
    system = log(gpus, b"")
    path = gpus.directory / "kmsg"
    path.unlink()
    assert fault_of(system) == (GpuFault.KERNEL_LOG_UNREADABLE, 0)
    path.mkdir()
    assert fault_of(system) == (GpuFault.KERNEL_LOG_UNREADABLE, 0)


def test_a_log_without_end_is_a_fault(gpus: SimulatedMachine) -> None:
    system = log(gpus, b"")
    os.truncate(gpus.directory / "kmsg", MAX_KERNEL_LOG_BYTES + 1)
    assert fault_of(system) == (GpuFault.KERNEL_LOG_UNREADABLE, 0)


# --- registry keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["cmdline", "nvidia-params"])
@pytest.mark.parametrize(
    "key",
    [
        "RmConfidentialCompute=0x1",
        "RmConfComputeSpdmPolicy=0",
        "rmconfidentialcompute=3",
        "Rm Confidential\tCompute=1",  # as the driver reads it
    ],
)
def test_registry_keys_that_weaken_confidential_computing_are_refused(gpus: SimulatedMachine, file: str, key: str) -> None:
    system = gpus.gpu_system()
    (gpus.directory / file).write_text(f'console=ttyS0 nvidia.NVreg_RegistryDwords="RMOther=1;{key}"\n')
    with pytest.raises(GpuModeError) as caught:
        system.inspect()
    assert (caught.value.mode, caught.value.got, caught.value.expected) == (GpuMode.REGISTRY_KEYS, 1, 0)


def test_other_registry_keys_are_nothing_to_us(gpus: SimulatedMachine) -> None:
    system = gpus.gpu_system()
    (gpus.directory / "nvidia-params").write_text('RegistryDwords: "RMOther=1"\n')
    system.inspect()


@pytest.mark.parametrize("file", ["cmdline", "nvidia-params"])
def test_parameters_that_cannot_be_read_are_a_device_error(gpus: SimulatedMachine, file: str) -> None:
    system = gpus.gpu_system()
    (gpus.directory / file).unlink()
    with pytest.raises(DeviceError) as caught:
        system.inspect()
    assert (caught.value.interface, caught.value.code) == ("kernel-parameters", 2)


@pytest.mark.parametrize("file", ["cmdline", "nvidia-params"])
def test_parameters_without_end_are_a_device_error(gpus: SimulatedMachine, file: str) -> None:
    system = gpus.gpu_system()
    (gpus.directory / file).write_bytes(b"a" * MAX_PARAMETER_BYTES)
    system.inspect()
    (gpus.directory / file).write_bytes(b"a" * (MAX_PARAMETER_BYTES + 1))
    with pytest.raises(DeviceError) as caught:
        system.inspect()
    assert (caught.value.interface, caught.value.code) == ("kernel-parameters", errno.EFBIG)


def test_function_pointers_of_another_library_are_not_used(gpus: SimulatedMachine, tmp_path: Path) -> None:
    system = gpus.gpu_system()
    try:
        pynvml.nvmlLib = SimulatedNvml(gpu_machine(tmp_path / "other", count=1))
        pynvml.nvmlInit()
        assert pynvml.nvmlDeviceGetCount() == 1
        assert len(system.inspect().gpus) == len(gpus.gpu_system().inspect().gpus) == gpus.gpu.count
        assert pynvml.nvmlDeviceGetCount() == 1
    finally:
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.mark.parametrize("knob", ["wrong_nonce", "flip_signature_bit"])
def test_pynvml_is_restored_after_a_failure_too(gpus: SimulatedMachine, knob: str) -> None:
    setattr(gpus.gpu, knob, True)
    with pytest.raises(AgentError):
        gpus.gpu_system().collect(NONCE)
    assert pynvml.nvmlLib is None
