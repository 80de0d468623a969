"""The simulated NVSwitches behind a real `libnvidia-nscq.so.2`, so that device tests cross the C interface as in a guest.

`nscq.c` brings symbols, structs by value, callbacks and the loader; what it is asked, a thread here puts to `SimulatedNscq`.
"""

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

from agent.evidence.nscq import NscqSwitches, open_nscq
from agent.sim.machine import SimulatedMachine
from agent.sim.nscq import SimulatedNscq, open_switch_system

LIBRARY = "libnvidia-nscq.so.2"
_SOCKET = "nscq.sock"
_SOURCE = Path(__file__).with_name("nscq.c")
_REQUEST = struct.Struct("128s32s")


class DriverMachine(SimulatedMachine):
    """A simulated machine whose NVSwitches are reached through a library that the dynamic loader has loaded.

    Attributes:
        library: a copy of its own: the loader takes one file for one library, whatever its path.
    """

    library: Path

    def switch_system(self) -> NscqSwitches:
        return open_switch_system(self, open_nscq((self.library,)))


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
    with tempfile.TemporaryDirectory(prefix="nscq-") as name, socket.socket(socket.AF_UNIX) as listener:
        folder = Path(name)
        reached.library = Path(shutil.copy(built, folder))
        listener.bind(str(folder / _SOCKET))
        listener.listen()
        thread = threading.Thread(target=_answer, args=(listener, reached))
        thread.start()
        try:
            yield reached
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer(listener: socket.socket, machine: SimulatedMachine) -> None:
    nscq = SimulatedNscq(machine)
    with suppress(OSError):  # how `accept` ends
        while True:
            connection, _ = listener.accept()
            with connection:
                padded, given = _REQUEST.unpack(connection.recv(_REQUEST.size, socket.MSG_WAITALL))
                name = padded.rstrip(b"\0").decode()
                code, answers = nscq.observe(name, given) if name.startswith("/") else (nscq.enter(name), [])
                said = b"".join(each.device + struct.pack("b", each.code) + each.value for each in answers)
                connection.sendall(struct.pack("bB", code, len(answers)) + said)
