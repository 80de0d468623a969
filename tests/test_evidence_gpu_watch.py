"""What the watch sees, and that it is small; the search of the kernel log is `test_evidence_gpu.py`."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from agent.channel import Channel
from agent.errors import AgentError, DeviceError, GpuFault, GpuFaultError, NoAttesterError
from agent.events import message_from_record
from agent.evidence.gpu_watch import FATAL_XIDS, NVML_LIBRARIES, KernelLog, watch
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import SimulatedNvml, nvml_calls
from tests.children import in_child, readable
from tests.gpus import gpu_machine
from tests.nvml_emulation import DriverMachine, answered

READY_CALL = "nvmlSystemGetConfComputeGpusReadyState"
DEADLINE_S = 10
MAX_RESIDENT_KIB = 24 << 10


@pytest.fixture
def serving(gpus: SimulatedMachine) -> SimulatedMachine:
    """A machine that has passed the gate."""
    gpus.gpu_system().set_ready()
    return gpus


def told_by(machine: SimulatedMachine, happens: Callable[[], object]) -> AgentError | None:
    """What a watch in a process of its own tells after the event; None when SIGTERM ended it."""
    library = ctypes.CDLL(str(machine.library)) if isinstance(machine, DriverMachine) else SimulatedNvml(machine)
    ours, theirs = Channel.pair()
    asked = nvml_calls(machine).count(READY_CALL)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(watch(theirs, library, machine.directory / "kmsg"))
        finally:
            os._exit(1)
    theirs.close()
    began = time.monotonic()
    while nvml_calls(machine).count(READY_CALL) <= asked and not readable(ours.fileno(), 0.01):
        if time.monotonic() - began > DEADLINE_S:
            break
    happens()
    if not readable(ours.fileno(), DEADLINE_S):  # neither a word nor the end
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    packet = ours.receive()
    ours.close()
    message = message_from_record(packet.record) if packet else None
    assert message is None or isinstance(message, AgentError)
    return message


def fault_of(error: object) -> tuple[GpuFault, int]:
    assert isinstance(error, GpuFaultError)
    return error.fault, error.code


def append(machine: SimulatedMachine, line: str) -> Callable[[], None]:
    def happens() -> None:
        with (machine.directory / "kmsg").open("a") as log:
            log.write(line)

    return happens


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_a_fatal_xid_is_told(serving: SimulatedMachine, xid: int) -> None:
    line = f"4,9,9,-;NVRM: Xid (PCI:0000:06:00): {xid}, pid='<unknown>', name=<unknown>, a description\n"
    assert fault_of(told_by(serving, append(serving, line))) == (GpuFault.FATAL_XID, xid)


def test_a_confidential_computing_fault_is_told(serving: SimulatedMachine) -> None:
    line = "3,9,9,-;NVRM: ConfCompute: Fatal error hit!\n"
    assert fault_of(told_by(serving, append(serving, line))) == (GpuFault.CC_FATAL, 0)


def test_ready_that_falls_back_is_told(serving: SimulatedMachine) -> None:
    def happens() -> None:
        serving.reread()
        serving.gpu.ready = 0
        serving.save()

    assert fault_of(told_by(serving, happens)) == (GpuFault.READY_LOST, 0)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN, 12345])
def test_a_driver_that_does_not_answer_is_told(serving: SimulatedMachine, code: int) -> None:
    def happens() -> None:
        serving.reread()
        serving.gpu.fail_calls = {READY_CALL: code}
        serving.save()

    error = told_by(serving, happens)
    assert isinstance(error, DeviceError)
    assert (error.interface, error.call, error.code) == ("nvml", READY_CALL, code)


def test_what_was_logged_before_the_watch_is_told_too(serving: SimulatedMachine) -> None:
    append(serving, "4,9,9,-;NVRM: Xid (PCI:0000:06:00): 79, GPU has fallen off the bus.\n")()
    assert fault_of(told_by(serving, lambda: None)) == (GpuFault.FATAL_XID, 79)


def test_harmless_lines_and_sigterm_are_told_to_nobody(serving: SimulatedMachine) -> None:
    def happens() -> None:
        append(serving, "4,9,9,-;NVRM: Xid (PCI:0000:06:00): 31, pid=1, name=x, MMU fault\n")()
        (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)

    assert told_by(serving, happens) is None


def test_sigterm_waits_for_a_call_that_is_under_way(serving: SimulatedMachine) -> None:
    def happens() -> None:
        serving.reread()
        serving.gpu.delay_calls = {READY_CALL: 1.0}
        serving.save()
        time.sleep(1.3)  # it looks once a second, and then it waits for the driver
        (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)

    began = time.monotonic()
    assert told_by(serving, happens) is None
    assert time.monotonic() - began > 1.9


def test_a_watch_without_kernel_log_or_library_says_so(serving: SimulatedMachine) -> None:
    def alone(**given: Any) -> dict[str, object]:
        ours, theirs = Channel.pair()
        assert watch(theirs, **given) == 0
        packet = ours.receive()
        assert packet
        return packet.record

    missing = serving.directory / "missing"
    unreadable = in_child(lambda: alone(library=SimulatedNvml(serving), kernel_log=missing))
    assert fault_of(message_from_record(unreadable)) == (GpuFault.KERNEL_LOG_UNREADABLE, 0)
    if not any(path.exists() for path in NVML_LIBRARIES):
        assert isinstance(message_from_record(in_child(alone)), NoAttesterError)


_SMALL = """
import ctypes, json, os, sys, time
from pathlib import Path
import agent.commands.run  # what the supervisor is
from agent.channel import Channel
from agent.evidence.gpu_watch import open_nvml, watch
ours, theirs = Channel.pair()
pid = os.fork()
if pid == 0:
    os._exit(watch(theirs, open_nvml((Path(sys.argv[1]),)), Path(sys.argv[2])))
time.sleep(2.5)
fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
print(json.dumps({name: int(fields[name].split()[0]) for name in ("Rss", "Pss", "Private_Dirty")}))
print(json.dumps(sorted(set(sys.modules) & {"pynvml", "cryptography", "msgspec", "asyncio", "logging"})))
os.kill(pid, 15)
"""


def test_it_is_small(nvml_library: Path, tmp_path: Path) -> None:
    with answered(gpu_machine(tmp_path / "machine"), nvml_library) as machine:
        machine.gpu_system().set_ready()
        program = (sys.executable, "-c", _SMALL, machine.library, machine.directory / "kmsg")
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        assert nvml_calls(machine).count(READY_CALL) >= 3
    memory, imported = (json.loads(line) for line in done.stdout.splitlines())
    assert memory["Rss"] < MAX_RESIDENT_KIB, memory
    assert imported == []


def test_a_kernel_log_that_loses_records_for_ever_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of ours does what /dev/kmsg does when a flood of messages overtakes its reader: EPIPE at every read."""
    (tmp_path / "kmsg").touch()
    log = KernelLog(tmp_path / "kmsg")
    reads = 0

    def overtaken(descriptor: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 100_000:
            raise AssertionError("it reads for ever")
        raise BrokenPipeError

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", overtaken)
        with pytest.raises(GpuFaultError) as told:
            log.check()
    log.close()
    assert told.value.fault is GpuFault.KERNEL_LOG_UNREADABLE
