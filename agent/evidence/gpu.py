"""The NVIDIA GPUs of this guest, through NVML: what they are, their Evidence, their faults, and the one ready state.

Owns the NVML calls of a boot, and what the kernel says of the driver's parameters; its log is `gpu_watch.py`'s. Decides nothing
about modes, counts or order: that is `gate.py`. Checks of a report only what must hold before it leaves: it parses, carries our
nonce, and its leaf key signed it.

A failed report or certificate call latches a fatal state in the driver that only a VM restart clears, so no call is ever made
twice. NVML is never shut down either: the end of the process does it, and an adapter whose last client leaves needs a reset.
Source: NVIDIA open-gpu-kernel-modules 595.45.04, conf_compute_api.c, conf_compute.c; nvidia-ml-py 13.
"""

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pynvml

from agent.closed import Ident
from agent.errors import (
    DeviceError,
    EvidenceBindingError,
    EvidenceFormat,
    GpuFault,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    NoAttesterError,
)
from agent.evidence import Gpu, GpuEvidence, GpuInventory, GpuModes, GpuNonce
from agent.evidence.gpu_abi import parse_report
from agent.evidence.gpu_watch import KERNEL_LOG, NVML, KernelLog, open_nvml
from agent.verify.nvidia import parse_chain, verify_report_signature

KERNEL_COMMAND_LINE = Path("/proc/cmdline")
DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")
MAX_PARAMETER_BYTES = 64 << 10

_ARCHITECTURES = {pynvml.NVML_DEVICE_ARCH_HOPPER: "HOPPER", pynvml.NVML_DEVICE_ARCH_BLACKWELL: "BLACKWELL"}

# The first can turn the ready check off and devtools on, the second the encrypted session.
_WEAKENING_KEYS = re.compile(rb"RmConfidentialCompute|RmConfComputeSpdmPolicy", re.IGNORECASE)

_GPU_NODE = re.compile(r"/dev/nvidia[0-9]+")

# pynvml keeps its library, and the function pointers of it, in module globals.
_pynvml_lock = threading.Lock()


def is_held(proc: Path = Path("/proc")) -> bool:
    """Does another process hold a GPU open, as nvidia-persistenced does?

    A GPU in confidential-computing mode initialises once per reset, so whoever opens it and is the last to close it makes it
    unusable. What cannot be seen (another PID namespace, another user) counts as not held.
    """
    for folder in proc.glob("[0-9]*/fd"):
        if folder.parent.name == str(os.getpid()):
            continue
        try:
            links = [os.readlink(link) for link in folder.iterdir()]
        except OSError:  # it ended, or is not ours to look at
            continue
        if any(_GPU_NODE.fullmatch(link) for link in links):
            return True
    return False


def check_registry_keys(files: Iterable[Path] = (KERNEL_COMMAND_LINE, DRIVER_PARAMETERS)) -> None:
    """Search the kernel command line and the driver's parameters for what weakens confidential computing.

    Raises:
        DeviceError: a file cannot be read.
        GpuModeError: registry keys are set that do.
    """
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(MAX_PARAMETER_BYTES + 1)
        except OSError as exc:
            raise DeviceError(Ident("kernel-parameters"), Ident("read"), exc.errno or 0) from exc
        # refusal: test_parameters_without_end_are_a_device_error
        if len(text) > MAX_PARAMETER_BYTES:
            raise DeviceError(Ident("kernel-parameters"), Ident("read"), errno.EFBIG)
        # The driver takes white space out before it reads a key (rm_remove_spaces), also out of the middle of its name.
        found = len(_WEAKENING_KEYS.findall(b"".join(text.split())))
        # refusal: test_registry_keys_that_weaken_confidential_computing_are_refused
        if found:
            raise GpuModeError(GpuMode.REGISTRY_KEYS, got=found, expected=0)


class NvmlGpuSystem:
    """The `GpuSystem` of this guest. Blocking and serial; a call is never abandoned and never repeated."""

    def __init__(
        self,
        library: Any = None,
        *,
        kernel_log: Path = KERNEL_LOG,
        kernel_command_line: Path = KERNEL_COMMAND_LINE,
        driver_parameters: Path = DRIVER_PARAMETERS,
    ) -> None:
        """Initialise NVML.

        Args:
            library: what has NVML's functions as attributes; None opens the driver's.
            kernel_log: read to its present end at `check_faults`.
            kernel_command_line: searched for registry keys at `inspect`.
            driver_parameters: likewise; what the loaded driver really has.

        Raises:
            NoAttesterError: no NVML library.
            DeviceError: NVML refused, usually because the driver is not loaded or refused the GPU.
        """
        self._library = open_nvml() if library is None else library
        self._kernel_log = kernel_log
        self._parameter_files = (kernel_command_line, driver_parameters)
        with self._nvml():
            _call("nvmlInit")

    def inspect(self) -> GpuInventory:
        """Inventory, modes and ready state as they are now.

        Raises:
            DeviceError: an NVML call or the read of a kernel file failed.
            GpuModeError: registry keys are set that weaken confidential computing.
            NoAttesterError: a GPU is of an architecture that has no attestation.
        """
        # refusal: test_parameters_that_cannot_be_read_are_a_device_error
        check_registry_keys(self._parameter_files)
        with self._nvml():
            return GpuInventory(
                driver_version=_call("nvmlSystemGetDriverVersion"),
                gpus=tuple(_inspect_gpu(handle) for handle in _handles()),
                modes=_modes(),
                ready=_ready(),
                persistent=all(_is_persistent(handle) for handle in _handles()),
            )

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence of every GPU over `nonce` (32 bytes), in NVML order.

        Raises:
            DeviceError: an NVML call failed; the driver is then in its fatal state.
            MalformedEvidenceError: report or chain does not parse.
            EvidenceBindingError: a report carries another nonce.
            EvidenceVerificationError: a report is not signed by the key whose certificate came with it.
        """
        with self._nvml():
            return tuple(_collect_gpu(handle, nonce) for handle in _handles())

    def check_faults(self) -> None:
        """Search the kernel log since boot.

        Raises:
            GpuFaultError: a fatal XID or confidential-computing fault is there, or the log cannot be read.
        """
        with closing(KernelLog(self._kernel_log)) as log:
            log.check()

    def set_ready(self) -> None:
        """Set the ready state to 1, for all GPUs at once, and read it back. Nothing sets it back.

        Raises:
            DeviceError: NVML refused.
            GpuFaultError: it does not read back as 1.
        """
        with self._nvml():
            _call("nvmlSystemSetConfComputeGpusReadyState", pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE)
            # refusal: test_ready_is_set_once_and_read_back
            if not _ready():
                raise GpuFaultError(GpuFault.READY_NOT_SET)

    @contextmanager
    def _nvml(self) -> Iterator[None]:
        with _pynvml_lock:
            before = pynvml.nvmlLib
            pynvml.nvmlLib = self._library
            pynvml._nvmlGetFunctionPointer_cache.clear()
            try:
                yield
            finally:
                pynvml.nvmlLib = before
                pynvml._nvmlGetFunctionPointer_cache.clear()


def _call(name: str, *arguments: object) -> Any:
    try:
        return getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError as exc:
        raise DeviceError(NVML, Ident(name), exc.value) from exc
    except UnicodeDecodeError:  # a driver that returns text which is none
        raise DeviceError(NVML, Ident(name), pynvml.NVML_ERROR_UNKNOWN) from None


def _handles() -> Iterator[Any]:
    for index in range(_call("nvmlDeviceGetCount")):
        yield _call("nvmlDeviceGetHandleByIndex", index)


def _architecture(handle: Any) -> str:
    number = _call("nvmlDeviceGetArchitecture", handle)
    # refusal: test_an_architecture_without_attestation_is_no_attester
    if number not in _ARCHITECTURES:
        raise NoAttesterError(Ident(f"nvml-architecture-{number}"))
    return _ARCHITECTURES[number]


def _inspect_gpu(handle: Any) -> Gpu:
    return Gpu(
        uuid=_call("nvmlDeviceGetUUID", handle),
        arch=_architecture(handle),
        vbios_version=_call("nvmlDeviceGetVbiosVersion", handle),
    )


def _is_persistent(handle: Any) -> bool:
    return bool(_call("nvmlDeviceGetPersistenceMode", handle) == pynvml.NVML_FEATURE_ENABLED)


def _modes() -> GpuModes:
    settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
    # Unlike its siblings this function returns the code and never raises it.
    code = _call("nvmlSystemGetConfComputeSettings", ctypes.byref(settings))
    if code != pynvml.NVML_SUCCESS:
        raise DeviceError(NVML, Ident("nvmlSystemGetConfComputeSettings"), code)
    return GpuModes(
        cc_feature=settings.ccFeature,
        environment=settings.environment,
        devtools=settings.devToolsMode,
        multi_gpu_mode=settings.multiGpuMode,
    )


def _ready() -> bool:
    return bool(_call("nvmlSystemGetConfComputeGpusReadyState") == pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE)


def _collect_gpu(handle: Any, nonce: GpuNonce) -> GpuEvidence:
    # A size beyond its buffer is cut to the buffer by ctypes, and what is left does not parse.
    certificate = _call("nvmlDeviceGetConfComputeGpuCertificate", handle)
    chain = bytes(certificate.attestationCertChain[: certificate.attestationCertChainSize])
    answer = _call("nvmlDeviceGetConfComputeGpuAttestationReport", handle, nonce)
    report = bytes(answer.attestationReport[: answer.attestationReportSize])

    check_report(report, chain, nonce)
    return GpuEvidence(_architecture(handle), _call("nvmlDeviceGetUUID", handle), report, chain)


def check_report(report: bytes, chain: bytes, nonce: GpuNonce) -> None:
    """What must hold of a GPU's or NVSwitch's report before it leaves: it parses, is over `nonce`, and its leaf key signed it.

    Raises:
        MalformedEvidenceError: report or chain does not parse.
        EvidenceBindingError: the report carries another nonce.
        EvidenceVerificationError: it is not signed by the key whose certificate came with it.
    """
    parsed = parse_report(report)
    # refusal: test_a_gpu_that_signs_another_nonce_is_not_believed
    if parsed.requester_nonce != nonce:
        raise EvidenceBindingError(EvidenceFormat.NVIDIA_REPORT)
    # refusal: test_a_size_outside_the_buffer_is_malformed
    verify_report_signature(parsed, parse_chain(chain))
