"""Simulated GPUs behind NVML: the real pynvml drives them, the real verifier judges their Evidence.

`SimulatedNvml` stands where pynvml expects the loaded library: an object whose attributes are C functions over C structs. What
those do follows the driver: the ready state latches, and a failed certificate or report call ends confidential computing until
the machine ends. Reports are built from the layout, with the nonce asked for, and signed by the GPU's own key under a chain of
five certificates that says SIMULATED in every one.

    silicon/                          keys and chains: `gpu_silicon.py`
    kmsg, cmdline, nvidia-params      the machine's kernel log, kernel command line and driver parameters
    nvml.log                          every NVML and NSCQ function called, one a line

Source: NVIDIA open-gpu-kernel-modules 595.45.04, conf_compute_api.c (latch), nvml.h (structs and return codes).
"""

import ctypes
import hashlib
import secrets
import time
import traceback
import uuid
from collections.abc import Callable

import pynvml

from agent.evidence import GpuNonce
from agent.evidence.gpu import NvmlGpuSystem
from agent.evidence.gpu_abi import (
    LINKS,
    OPAQUE_CHIP_SKU,
    OPAQUE_DRIVER_VERSION,
    OPAQUE_FEATURE_FLAG,
    OPAQUE_FWID,
    OPAQUE_PDI,
    OPAQUE_PROJECT,
    OPAQUE_PROJECT_SKU,
    OPAQUE_PROTECTED_PCIE,
    OPAQUE_VBIOS_VERSION,
    PDI_BYTES,
    SIGNATURE_BYTES,
    GpuReport,
    firmware_digests,
)
from agent.sim.gpu_silicon import FWID, hand_out, read_chain, read_pdi
from agent.sim.machine import SimulatedMachine

BLOCKS = 64
PROTECTED_PCIE = 1
MULTI_GPU_MODES = (PROTECTED_PCIE, 2)
STRAY_PDI = bytes.fromhex("5742415920504449")  # of a device that is in another machine
FEATURE_FLAG_OF_MULTI_GPU_MODE = {0: 0, 1: 2, 2: 1}
CALL_LOG = "nvml.log"
KERNEL_LOG = "kmsg"

_U32 = ctypes.c_uint32
_ADDRESS = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "nvmlInitWithFlags": (_U32,),
    "nvmlSystemGetDriverVersion": (_ADDRESS, _U32),
    "nvmlSystemGetConfComputeSettings": (_ADDRESS,),
    "nvmlSystemGetConfComputeGpusReadyState": (_ADDRESS,),
    "nvmlSystemSetConfComputeGpusReadyState": (_U32,),
    "nvmlDeviceGetCount_v2": (_ADDRESS,),
    "nvmlDeviceGetHandleByIndex_v2": (_U32, _ADDRESS),
    "nvmlDeviceGetUUID": (_ADDRESS, _ADDRESS, _U32),
    "nvmlDeviceGetArchitecture": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetVbiosVersion": (_ADDRESS, _ADDRESS, _U32),
    "nvmlDeviceGetPersistenceMode": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetConfComputeGpuCertificate": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetConfComputeGpuAttestationReport": (_ADDRESS, _ADDRESS),
}
_LATCHING = ("nvmlDeviceGetConfComputeGpuCertificate", "nvmlDeviceGetConfComputeGpuAttestationReport")


def open_gpu_system(machine: SimulatedMachine, library: object = None) -> NvmlGpuSystem:
    """The machine's GPUs, with the machine's own kernel log, command line and driver parameters.

    Args:
        machine: whose GPUs.
        library: what has NVML's functions as attributes; None for `SimulatedNvml`.

    Raises:
        DeviceError: NVML is told to fail at its initialisation.
    """
    files = {
        KERNEL_LOG: "6,1,0,-;nvidia: loading NVIDIA UNIX Open Kernel Module (simulated)\n",
        "cmdline": "console=ttyS0\n",
        "nvidia-params": 'RegistryDwords: ""\nRegistryDwordsPerDevice: ""\n',
    }
    for name, text in files.items():
        path = machine.directory / name
        if not path.exists():
            path.write_text(text)
    return NvmlGpuSystem(
        SimulatedNvml(machine) if library is None else library,
        kernel_log=machine.directory / KERNEL_LOG,
        kernel_command_line=machine.directory / "cmdline",
        driver_parameters=machine.directory / "nvidia-params",
    )


def nvml_calls(machine: SimulatedMachine) -> list[str]:
    """Every NVML function called on this machine so far, by any process, in order."""
    path = machine.directory / CALL_LOG
    return path.read_text().split() if path.exists() else []


class SimulatedNvml:
    """What pynvml takes for the loaded library. Its C functions are attributes named as in `nvml.h`."""

    def __init__(self, machine: SimulatedMachine) -> None:
        """The machine's state is read at every call and saved at every change."""
        self._machine = machine
        self._initialised = False
        for name, arguments in _SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(_U32, *arguments)(self._entry(name, getattr(self, f"_{name}"))))

    def _entry(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def entry(*arguments: int) -> int:
            try:
                with (self._machine.directory / CALL_LOG).open("a") as log:
                    log.write(f"{name}\n")
                return self._answer(name, function, arguments)
            except Exception:  # noqa: BLE001  # ctypes would swallow it and return 0, which is NVML's success
                traceback.print_exc()
                return int(pynvml.NVML_ERROR_UNKNOWN)

        return entry

    def _answer(self, name: str, function: Callable[..., int], arguments: tuple[int, ...]) -> int:
        self._machine.reread()
        gpu = self._machine.gpu
        time.sleep(gpu.delay_calls.get(name, 0))
        if name in gpu.fail_calls:
            code = gpu.fail_calls[name]
        elif not self._initialised and name != "nvmlInitWithFlags":
            code = pynvml.NVML_ERROR_UNINITIALIZED
        elif name in _LATCHING and gpu.cc_feature == 0 and gpu.multi_gpu_mode not in MULTI_GPU_MODES:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)  # and nothing to latch
        elif name in _LATCHING and gpu.fatal_latched:
            code = pynvml.NVML_ERROR_NOT_READY
        else:
            code = function(*arguments)
        if code != pynvml.NVML_SUCCESS and name in _LATCHING:
            self._latch()
        return int(code)

    def _latch(self) -> None:
        gpu = self._machine.gpu
        if not gpu.fatal_latched:
            gpu.fatal_latched, gpu.ready = True, 0
            self._machine.save()
            with (self._machine.directory / KERNEL_LOG).open("a") as log:
                log.write("3,2,0,-;NVRM: ConfCompute: Fatal error hit!\n")

    # One method per C function; integers are addresses unless the name says otherwise.

    def _nvmlInitWithFlags(self, _flags: int) -> int:
        self._initialised = True
        return 0

    def _nvmlSystemGetDriverVersion(self, version: int, size: int) -> int:
        return _write_text(version, size, self._machine.gpu.driver_version)

    def _nvmlSystemGetConfComputeSettings(self, settings: int) -> int:
        struct = pynvml.c_nvmlSystemConfComputeSettings_v1_t.from_address(settings)
        if struct.version != pynvml.nvmlSystemConfComputeSettings_v1:
            return int(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        gpu = self._machine.gpu
        struct.environment, struct.ccFeature = gpu.environment, gpu.cc_feature
        struct.devToolsMode, struct.multiGpuMode = gpu.devtools, gpu.multi_gpu_mode
        return 0

    def _nvmlSystemGetConfComputeGpusReadyState(self, ready: int) -> int:
        gpu = self._machine.gpu
        if gpu.ready and gpu.ready_falls_back_after is not None:
            if gpu.ready_falls_back_after == 0:
                self._latch()
            else:
                gpu.ready_falls_back_after -= 1
                self._machine.save()
        _U32.from_address(ready).value = gpu.ready
        return 0

    def _nvmlSystemSetConfComputeGpusReadyState(self, ready: int) -> int:
        gpu = self._machine.gpu
        if gpu.fatal_latched:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if gpu.ready and not ready:
            self._latch()
        elif gpu.ready != ready:
            gpu.ready = ready
            self._machine.save()
        return 0

    def _nvmlDeviceGetCount_v2(self, count: int) -> int:
        _U32.from_address(count).value = self._machine.gpu.count
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: int) -> int:
        if index >= self._machine.gpu.count:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        _ADDRESS.from_address(handle).value = index + 1
        return 0

    def _nvmlDeviceGetUUID(self, handle: int, text: int, size: int) -> int:
        chain = read_chain(self._machine.silicon, f"gpu-{handle - 1}")
        return _write_text(text, size, f"GPU-{uuid.UUID(bytes=hashlib.sha256(chain).digest()[:16])}")

    def _nvmlDeviceGetArchitecture(self, _handle: int, architecture: int) -> int:
        _U32.from_address(architecture).value = self._machine.gpu.architecture
        return 0

    def _nvmlDeviceGetPersistenceMode(self, _handle: int, mode: int) -> int:
        _U32.from_address(mode).value = self._machine.gpu.persistent
        return 0

    def _nvmlDeviceGetVbiosVersion(self, _handle: int, text: int, size: int) -> int:
        return _write_text(text, size, self._machine.gpu.vbios_version)

    def _nvmlDeviceGetConfComputeGpuCertificate(self, handle: int, certificate: int) -> int:
        struct = pynvml.c_nvmlConfComputeGpuCertificate_t.from_address(certificate)
        chain = read_chain(self._machine.silicon, f"gpu-{self._signer(handle)}")
        struct.certChainSize = pynvml.NVML_GPU_CERT_CHAIN_SIZE  # Hopper leaves that chain empty and its size as it is
        struct.attestationCertChainSize = len(chain)
        struct.attestationCertChain[: len(chain)] = chain
        return 0

    def _nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, answer: int) -> int:
        struct = pynvml.c_nvmlConfComputeGpuAttestationReport_t.from_address(answer)
        gpu = self._machine.gpu
        nonce = secrets.token_bytes(32) if gpu.wrong_nonce else bytes(struct.nonce)
        report = hand_out(
            self._machine.silicon,
            f"gpu-{self._signer(handle)}",
            lambda: self._report(handle - 1, GpuNonce(nonce)),
            flip=gpu.flip_signature_bit,
            trailing=gpu.trailing_byte,
        )
        struct.isCecAttestationReportPresent = pynvml.NVML_CC_CEC_ATTESTATION_REPORT_NOT_PRESENT
        struct.attestationReportSize = len(report)
        struct.attestationReport[: len(report)] = report
        return 0

    def _signer(self, handle: int) -> int:
        return 0 if self._machine.gpu.repeat_first_gpu else handle - 1

    def _report(self, index: int, nonce: GpuNonce) -> GpuReport:
        gpu = self._machine.gpu
        vbios = bytes.fromhex(gpu.vbios_version.replace(".", ""))
        protected = ((OPAQUE_PROTECTED_PCIE, b"\xaa"), (OPAQUE_PDI, self._links(index)))
        return GpuReport(
            requester_nonce=nonce,
            measurements=firmware_digests(
                hashlib.sha384(b"keyturn simulated block %d" % block).digest() for block in range(BLOCKS)
            ),
            responder_nonce=secrets.token_bytes(32),
            opaque=(
                (OPAQUE_VBIOS_VERSION, vbios[3::-1] + vbios[4:] + bytes(3)),
                (OPAQUE_CHIP_SKU, b"882\0"),
                (OPAQUE_PROJECT, b"1010\0"),
                (OPAQUE_PROJECT_SKU, b"0200\0"),
                (OPAQUE_DRIVER_VERSION, gpu.driver_version.encode() + b"\0"),
                (OPAQUE_FWID, FWID),
                *(protected if gpu.multi_gpu_mode == PROTECTED_PCIE else ()),
                (OPAQUE_FEATURE_FLAG, FEATURE_FLAG_OF_MULTI_GPU_MODE[gpu.multi_gpu_mode].to_bytes(2, "little")),
            ),
            signature=bytes(SIGNATURE_BYTES),
        )

    def _links(self, index: int) -> bytes:
        """The NVSwitch at the other end of each link, written the other way round; two links are off."""
        gpu = self._machine.gpu
        names: list[bytes] = [read_pdi(self._machine.silicon, f"switch-{number}") for number in range(gpu.switches)]
        if names and gpu.stray_switch and index == gpu.count - 1:
            names[-1] = STRAY_PDI
        ends = [names[link % len(names)] for link in range(LINKS - 2)] if names else []
        return b"".join(end[::-1] for end in ends).ljust(LINKS * PDI_BYTES, b"\0")


def _write_text(address: int, size: int, text: str) -> int:
    if len(text) >= size:
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    ctypes.memmove(address, text.encode() + b"\0", len(text) + 1)
    return 0
