"""The simulated driver: structs as in nvml.h, the latch as in the driver, names that nobody can mistake."""

import ctypes
from pathlib import Path

import pynvml
import pytest

from agent.evidence.gpu_abi import parse_report
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import SimulatedNvml, nvml_calls
from tests.gpus import NONCE, gpu_machine

READY = "nvmlSystemGetConfComputeGpusReadyState"


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedMachine:
    return gpu_machine(tmp_path / "machine")


class Driver:
    """The C functions, called as C would."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self.nvml = SimulatedNvml(machine)
        assert self.call("nvmlInitWithFlags", 0) == 0

    def call(self, name: str, *arguments: object) -> int:
        return int(getattr(self.nvml, name)(*arguments))

    @property
    def ready(self) -> int:
        value = ctypes.c_uint(77)
        assert self.call(READY, ctypes.byref(value)) == 0
        return value.value

    def set_ready(self, value: int) -> int:
        return self.call("nvmlSystemSetConfComputeGpusReadyState", value)

    def report(self, index: int = 0) -> tuple[int, bytes]:
        struct = pynvml.c_nvmlConfComputeGpuAttestationReport_t()
        struct.nonce[:] = NONCE
        code = self.call("nvmlDeviceGetConfComputeGpuAttestationReport", self.handle(index), ctypes.byref(struct))
        return code, bytes(struct.attestationReport[: struct.attestationReportSize])

    def handle(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        assert self.call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle)) == 0
        return handle


@pytest.mark.parametrize(
    ("struct", "size", "offsets"),
    [
        (
            pynvml.c_nvmlSystemConfComputeSettings_v1_t,
            20,
            {"version": 0, "environment": 4, "ccFeature": 8, "devToolsMode": 12, "multiGpuMode": 16},
        ),
        (
            pynvml.c_nvmlConfComputeGpuCertificate_t,
            9224,
            {"certChainSize": 0, "attestationCertChainSize": 4, "certChain": 8, "attestationCertChain": 4104},
        ),
        (
            pynvml.c_nvmlConfComputeGpuAttestationReport_t,
            12332,
            {
                "isCecAttestationReportPresent": 0,
                "attestationReportSize": 4,
                "cecAttestationReportSize": 8,
                "nonce": 12,
                "attestationReport": 44,
                "cecAttestationReport": 8236,
            },
        ),
    ],
)
def test_structs_have_the_size_and_offsets_of_the_driver(
    struct: type[ctypes.Structure], size: int, offsets: dict[str, int]
) -> None:
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in offsets} == offsets


def test_nothing_answers_before_initialisation(gpus: SimulatedMachine) -> None:
    count = ctypes.c_uint()
    assert SimulatedNvml(gpus).nvmlDeviceGetCount_v2(ctypes.byref(count)) == pynvml.NVML_ERROR_UNINITIALIZED  # type: ignore[attr-defined]


def test_a_struct_of_another_version_is_refused(gpus: SimulatedMachine) -> None:
    settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
    settings.version = 0x2000018
    code = Driver(gpus).call("nvmlSystemGetConfComputeSettings", ctypes.byref(settings))
    assert code == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH


def test_a_gpu_that_does_not_exist_has_no_handle(gpus: SimulatedMachine) -> None:
    handle = ctypes.c_void_p()
    code = Driver(gpus).call("nvmlDeviceGetHandleByIndex_v2", 2, ctypes.byref(handle))
    assert code == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_text_that_does_not_fit_is_refused(gpus: SimulatedMachine) -> None:
    code = Driver(gpus).call("nvmlSystemGetDriverVersion", ctypes.create_string_buffer(9), 9)
    assert code == pynvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_ready_goes_to_one_and_stays_for_other_processes(gpus: SimulatedMachine) -> None:
    driver = Driver(gpus)
    assert driver.ready == 0
    assert driver.set_ready(0) == 0
    assert driver.set_ready(1) == 0
    assert driver.set_ready(1) == 0
    assert driver.ready == 1
    assert Driver(SimulatedMachine.load(gpus.directory, root=gpus.directory)).ready == 1


def test_setting_ready_back_latches_for_good(gpus: SimulatedMachine) -> None:
    driver = Driver(gpus)
    driver.set_ready(1)
    driver.set_ready(0)
    assert driver.ready == 0
    assert driver.set_ready(1) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    again = Driver(SimulatedMachine.load(gpus.directory, root=gpus.directory))
    assert again.set_ready(1) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert again.report()[0] == pynvml.NVML_ERROR_NOT_READY


def test_a_failed_report_latches_and_the_kernel_log_says_so(gpus: SimulatedMachine) -> None:
    driver = Driver(gpus)
    driver.set_ready(1)
    gpus.gpu.fail_calls = {"nvmlDeviceGetConfComputeGpuAttestationReport": pynvml.NVML_ERROR_GPU_IS_LOST}
    assert driver.report()[0] == pynvml.NVML_ERROR_GPU_IS_LOST
    assert driver.ready == 0
    assert "ConfCompute: Fatal error hit!" in (gpus.directory / "kmsg").read_text()


def test_with_confidential_computing_off_there_is_no_report_and_no_latch(gpus: SimulatedMachine) -> None:
    gpus.gpu.cc_feature = 0
    assert Driver(gpus).report()[0] == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert not gpus.gpu.fatal_latched
    gpus.gpu.multi_gpu_mode = 1
    code, report = Driver(gpus).report()
    assert code == 0
    assert parse_report(report).feature_flag == 2


def test_ready_falls_back_after_the_given_number_of_reads(gpus: SimulatedMachine) -> None:
    gpus.gpu.ready_falls_back_after = 2
    driver = Driver(gpus)
    driver.set_ready(1)
    assert [driver.ready for _ in range(4)] == [1, 1, 0, 0]


def test_reports_are_fresh_and_say_what_the_machine_says(gpus: SimulatedMachine) -> None:
    gpus.gpu.driver_version, gpus.gpu.vbios_version = "590.12", "97.00.88.00.0F"
    driver = Driver(gpus)
    first, second = (parse_report(driver.report()[1]) for _ in range(2))
    assert first.requester_nonce == NONCE
    assert first.responder_nonce != second.responder_nonce
    assert (first.driver_version, first.vbios_version, first.feature_flag) == ("590.12", "97.00.88.00.0F", 0)
    assert len(first.measurements) == 64


def test_a_bug_of_the_simulator_is_never_a_success(gpus: SimulatedMachine, capfd: pytest.CaptureFixture[str]) -> None:
    (gpus.silicon / "gpu-0.key").write_bytes(b"no key")
    assert Driver(gpus).report()[0] == pynvml.NVML_ERROR_UNKNOWN
    assert "Traceback" in capfd.readouterr().err


def test_calls_are_recorded_in_order_across_processes(gpus: SimulatedMachine) -> None:
    assert nvml_calls(gpus) == []
    assert Driver(gpus).ready == 0
    Driver(SimulatedMachine.load(gpus.directory, root=gpus.directory))
    assert nvml_calls(gpus) == ["nvmlInitWithFlags", READY, "nvmlInitWithFlags"]
