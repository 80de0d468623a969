"""The simulated GPUs behind a real `libnvidia-ml.so.1`, so that device tests cross the C interface as they do in a guest.

`nvml.c` brings symbols, structs and the loader; what it is asked, a thread here puts to `SimulatedNvml`. So both ways of a
device test meet one simulator with one set of knobs.
"""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest

from agent.evidence.gpu import NvmlGpuSystem
from agent.evidence.gpu_watch import open_nvml
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import SimulatedNvml, open_gpu_system

LIBRARY = "libnvidia-ml.so.1"
SOCKET = "nvml.sock"
_SOURCE = Path(__file__).with_name("nvml.c")
_REQUEST = struct.Struct("=64sII")
_CODE = struct.Struct("=I")
_BUFFER_BYTES = 16 << 10
_ARGUMENTS = {  # of each function, in order
    "nvmlInitWithFlags": ("value",),
    "nvmlSystemGetDriverVersion": ("buffer", "size"),
    "nvmlSystemGetConfComputeSettings": ("buffer",),
    "nvmlSystemGetConfComputeGpusReadyState": ("buffer",),
    "nvmlSystemSetConfComputeGpusReadyState": ("value",),
    "nvmlDeviceGetCount_v2": ("buffer",),
    "nvmlDeviceGetHandleByIndex_v2": ("value", "buffer"),
    "nvmlDeviceGetUUID": ("value", "buffer", "size"),
    "nvmlDeviceGetArchitecture": ("value", "buffer"),
    "nvmlDeviceGetVbiosVersion": ("value", "buffer", "size"),
    "nvmlDeviceGetPersistenceMode": ("value", "buffer"),
    "nvmlDeviceGetConfComputeGpuCertificate": ("value", "buffer"),
    "nvmlDeviceGetConfComputeGpuAttestationReport": ("value", "buffer"),
}


class DriverMachine(SimulatedMachine):
    """A simulated machine whose GPUs are reached through a library that the dynamic loader has loaded.

    Attributes:
        library: a copy of its own: the loader takes one file for one library, whatever its path.
    """

    library: Path

    def gpu_system(self) -> NvmlGpuSystem:
        return open_gpu_system(self, open_nvml((self.library,)))


def build(folder: Path) -> Path:
    """Compile the library, or skip; never in CI."""
    if shutil.which("gcc") is None:
        assert "KEYTURN_BUILD" not in os.environ, "KEYTURN_BUILD is set, so gcc must be there"
        pytest.skip("gcc is not here, which makes the library that stands for the driver's")
    library = folder / LIBRARY
    flags = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{LIBRARY}")
    subprocess.run(("gcc", *flags, "-o", library, _SOURCE), check=True)
    return library


@contextmanager
def answered(machine: SimulatedMachine, built: Path) -> Iterator[DriverMachine]:
    """The machine behind a copy of the library, as long as the block runs."""
    reached = DriverMachine(**{field.name: getattr(machine, field.name) for field in fields(machine) if field.init})
    reached._on_disk = machine._on_disk
    # A folder of its own with a short name: the address of a socket has 108 bytes.
    with tempfile.TemporaryDirectory(prefix="nvml-") as name, socket.socket(socket.AF_UNIX) as listener:
        folder = Path(name)
        reached.library = Path(shutil.copy(built, folder))
        listener.bind(str(folder / SOCKET))
        listener.listen()
        thread = threading.Thread(target=_answer, args=(listener, reached))
        thread.start()
        try:
            yield reached
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer(listener: socket.socket, machine: SimulatedMachine) -> None:
    nvml = SimulatedNvml(machine)
    with suppress(OSError):  # how `accept` ends
        while True:
            connection, _ = listener.accept()
            with connection:
                name, value, size = _REQUEST.unpack(connection.recv(_REQUEST.size, socket.MSG_WAITALL))
                given = connection.recv(size, socket.MSG_WAITALL) if size else b""
                code, filled = _call(nvml, name.rstrip(b"\0").decode(), value, given)
                connection.sendall(_CODE.pack(code) + filled)


def _call(nvml: SimulatedNvml, name: str, value: int, given: bytes) -> tuple[int, bytes]:
    """Args: value: the handle, index or number among the arguments; given: what the caller's buffer holds."""
    buffer = ctypes.create_string_buffer(given, _BUFFER_BYTES)
    arguments = {"value": value, "buffer": ctypes.addressof(buffer), "size": len(given)}
    code = int(getattr(nvml, name)(*(arguments[kind] for kind in _ARGUMENTS[name])))
    return code, buffer.raw[: len(given)]
