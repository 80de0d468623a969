"""What tells that a GPU is not to be used any more: the kernel's log and the ready state; and the watch over both.

Owns the search of the kernel log, the driver library's place, and what the watch process does. The rest of NVML is `gpu.py`'s;
that process, and what follows from what it says, are the supervisor's. Standard library only: the watch lives as long as the
server does, and must be small.
Source: NVIDIA Xid catalog; open-gpu-kernel-modules 595.45.04, conf_compute.c.
"""

import ctypes
import os
import re
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

from agent.channel import Channel
from agent.closed import Ident
from agent.errors import AgentError, DeviceError, GpuFault, GpuFaultError, NoAttesterError
from agent.events import message_to_record
from agent.guest import hardening

NVML = Ident("nvml")
# Absolute, so that neither the loader's search path nor its environment chooses the library.
NVML_LIBRARIES = (
    Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"),
    Path("/usr/lib64/libnvidia-ml.so.1"),
    Path("/usr/lib/libnvidia-ml.so.1"),
    Path("/run/kata-extensions/gpu/usr/lib/libnvidia-ml.so.1"),  # Kata 4.x: the driver is a guest extension image
)
KERNEL_LOG = Path("/dev/kmsg")
MAX_KERNEL_LOG_BYTES = 64 << 20
"""At a time: a log that grows faster than we read must end somewhere."""
WATCH_INTERVAL_S = 1.0

# XIDs after which a GPU must be reset: 48 and 140 uncorrected ECC, 79 off the bus, 94 and 95 (un)contained ECC, 119 and 120 its
# firmware does not answer or failed, 143 initialisation failed, 151 rotation of a confidential-computing key failed.
FATAL_XIDS = frozenset((48, 79, 94, 95, 119, 120, 140, 143, 151))
_XID = re.compile(rb"NVRM: Xid \([^)\n]{1,64}\): ([0-9]{1,5}),")
_CC_FATAL = b"ConfCompute: Fatal error hit!"
_LONGEST_MATCH_BYTES = 128
_MAX_KERNEL_RECORD_BYTES = 8 << 10
_SUCCESS = 0


def open_nvml(candidates: tuple[Path, ...] = NVML_LIBRARIES) -> ctypes.CDLL:
    """The driver's NVML.

    Raises:
        NoAttesterError: none of the absolute paths can be loaded.
    """
    for path in candidates:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise NoAttesterError(NVML)


class KernelLog:
    """The kernel's log, from its oldest record on."""

    def __init__(self, path: Path = KERNEL_LOG) -> None:
        """Raises GpuFaultError: it cannot be read."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise GpuFaultError(GpuFault.KERNEL_LOG_UNREADABLE) from exc
        self._tail = b""

    def close(self) -> None:
        os.close(self._descriptor)

    def check(self) -> None:
        """Search what has come since the last time.

        Raises:
            GpuFaultError: a fatal XID or confidential-computing fault is there, or the log cannot be read.
        """
        budget = MAX_KERNEL_LOG_BYTES
        while budget > 0:
            try:
                chunk = os.read(self._descriptor, 64 << 10)
            except BlockingIOError:  # how /dev/kmsg says that there is no more
                return
            except BrokenPipeError:  # records were overwritten while we read; the next read continues with the oldest left
                budget -= _MAX_KERNEL_RECORD_BYTES
                continue
            except OSError as exc:
                raise GpuFaultError(GpuFault.KERNEL_LOG_UNREADABLE) from exc
            if not chunk:
                return
            budget -= len(chunk)
            self._search(chunk)
        raise GpuFaultError(GpuFault.KERNEL_LOG_UNREADABLE)

    def _search(self, chunk: bytes) -> None:
        window = self._tail + chunk
        # refusal: test_evidence_gpu.py::test_a_confidential_computing_fault_is_a_fault
        if _CC_FATAL in window:
            raise GpuFaultError(GpuFault.CC_FATAL)
        for match in _XID.finditer(window):
            # refusal: test_evidence_gpu.py::test_a_log_that_only_blocks_has_ended
            if int(match[1]) in FATAL_XIDS:
                raise GpuFaultError(GpuFault.FATAL_XID, int(match[1]))
        self._tail = window[-_LONGEST_MATCH_BYTES:]


def watch(channel: Channel, library: Any = None, kernel_log: Path = KERNEL_LOG) -> int:
    """Watch the GPUs until there is something to tell, or SIGTERM: the whole life of the watch process.

    The log is searched from its beginning, so that nothing is missed between a boot, or a watch that was lost, and this one.

    Args:
        channel: takes one AgentError: a GpuFaultError, or a DeviceError when NVML does not answer.
        library: what has NVML's functions as attributes; None opens the driver's.
        kernel_log: what to read.

    Returns:
        The process's exit status: 0 also when something was told.
    """
    hardening.lead_standard_descriptors_nowhere()
    # From here on it comes between two calls: whoever is killed inside the driver can cost a GPU its reset.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        nvml = open_nvml() if library is None else library
        with closing(KernelLog(kernel_log)) as log:
            _call(nvml, "nvmlInitWithFlags", 0)
            while True:
                log.check()  # first: a driver that has lost a GPU may answer late
                # refusal: test_ready_that_falls_back_is_told
                if not _is_ready(nvml):
                    log.check()  # it may say why
                    raise GpuFaultError(GpuFault.READY_LOST)
                if signal.sigtimedwait({signal.SIGTERM}, WATCH_INTERVAL_S):
                    return 0
    except AgentError as error:
        channel.send(message_to_record(error))
        return 0


def _is_ready(nvml: Any) -> bool:
    ready = ctypes.c_uint()
    _call(nvml, "nvmlSystemGetConfComputeGpusReadyState", ctypes.byref(ready))
    return ready.value == 1


def _call(nvml: Any, name: str, *arguments: object) -> None:
    code = int(getattr(nvml, name)(*arguments))
    # refusal: test_a_driver_that_does_not_answer_is_told
    if code != _SUCCESS:
        raise DeviceError(NVML, Ident(name), code)
