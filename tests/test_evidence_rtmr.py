import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import DeviceError, Owner
from agent.evidence import Tee, Unsupported
from agent.evidence.ccel import RuntimeEvent, parse_event_log, replay
from agent.evidence.rtmr import MEASUREMENTS, REGISTER, Rtmr
from agent.evidence.runtime import RuntimeMeasurement
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import CCEL_FILE
from tests.children import IS_ROOT
from tests.fake_rtmr import RtmrFaults, fake_rtmr, set_faults

DIGEST = bytes(range(48))
EVENT = RuntimeEvent("keyturn", "release-key", "{}")


@pytest.fixture
def register(tmp_path: Path) -> Path:
    """A file in the register's place. What is written stays: the extending is the TDX module's."""
    path = tmp_path / "rtmr3:sha384"
    path.write_bytes(bytes(48))
    return path


def test_a_digest_is_written_whole_at_the_start_of_the_register(register: Path) -> None:
    rtmr = Rtmr(register.parent)
    assert rtmr.read() == bytes(48)
    rtmr.extend(DIGEST)
    assert register.read_bytes() == rtmr.read() == DIGEST


def test_a_kernel_without_the_file_is_no_error(tmp_path: Path) -> None:
    assert Rtmr(tmp_path).read() is Unsupported.NO_DRIVER


def test_a_sysfs_that_cannot_be_written_is_no_error(register: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root mounts a folder read-only")
    said = "from pathlib import Path; from agent.evidence.rtmr import Rtmr; print(Rtmr(Path.cwd()).read().value)"
    mounted = 'mount --bind . . && cd "$PWD" && mount -o remount,bind,ro . && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, said]
    done = subprocess.run(command, cwd=register.parent, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("read-only\n", "")


def test_a_file_that_this_user_may_not_write_is_no_error(register: Path) -> None:
    register.unlink()
    register.symlink_to("/sys/kernel/notes")  # nobody may, and of sysfs root too is told so
    assert Rtmr(register.parent).read() is Unsupported.READ_ONLY


def test_a_kernel_that_refuses_is_a_device_error(register: Path) -> None:
    register.unlink()
    register.mkdir()
    with pytest.raises(DeviceError) as caught:
        Rtmr(register.parent).read()
    error = caught.value
    assert (error.interface, error.call, error.code, error.owner) == ("rtmr", "open", errno.EISDIR, Owner.HOST)


def test_a_write_that_fails_is_named(register: Path) -> None:
    register.unlink()
    register.symlink_to("/dev/full")
    with pytest.raises(DeviceError) as caught:
        Rtmr(register.parent).extend(DIGEST)
    assert (caught.value.call, caught.value.code) == ("extend", errno.ENOSPC)


def test_a_register_that_is_gone_when_it_is_extended_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        Rtmr(tmp_path).extend(DIGEST)
    assert (caught.value.call, caught.value.code) == ("open", errno.ENOENT)


def test_a_register_that_reads_short_is_a_device_error(register: Path) -> None:
    register.unlink()
    register.symlink_to("/dev/null")
    with pytest.raises(DeviceError) as caught:
        Rtmr(register.parent).read()
    assert (caught.value.call, caught.value.code) == ("read", errno.EIO)


def test_no_descriptor_is_left(register: Path) -> None:
    before = os.listdir("/proc/self/fd")
    rtmr = Rtmr(register.parent)
    rtmr.read()
    rtmr.extend(DIGEST)
    assert os.listdir("/proc/self/fd") == before


def test_the_register_is_where_the_kernel_has_it() -> None:
    assert Path("/sys/class/misc/tdx_guest/measurements/rtmr3:sha384") == MEASUREMENTS / REGISTER


# --- a file that extends ----------------------------------------------------------------------------------------------


class Guest:
    """A register as the kernel has it, and the machine's firmware log."""

    def __init__(self, machine: SimulatedMachine, path: Path, control: socket.socket, folder: Path) -> None:
        self.rtmr = Rtmr(path.parent)
        self.path = path
        self._control = control
        machine.runtime(Tee.TDX)  # leaves the table
        self.measurement = RuntimeMeasurement(
            self.rtmr, firmware_log=machine.directory / CCEL_FILE, folder=folder / "run", foreign_log=folder / "none"
        )

    def fail(self, faults: RtmrFaults) -> None:
        set_faults(self._control, faults)

    def replayed(self) -> bytes:
        return replay(parse_event_log(self.measurement.event_log()))[3]


@pytest.fixture
def guest(tmp_path: Path, machine: SimulatedMachine) -> Iterator[Guest]:
    file = tmp_path / "measurements" / REGISTER
    file.parent.mkdir()
    file.touch()
    with fake_rtmr(file) as (path, control):
        yield Guest(machine, path, control, tmp_path)


def test_a_release_is_measured_through_the_kernels_file(guest: Guest) -> None:
    guest.measurement.require()
    for _ in range(2):
        measured = guest.measurement.measure(EVENT)
        assert measured.rtmr_3 == guest.rtmr.read() == guest.replayed()
    assert len(parse_event_log(guest.measurement.event_log()).events) == 6


@pytest.mark.parametrize("data", [bytes(47), bytes(49), b""])
def test_the_fake_takes_48_bytes_and_nothing_else_as_the_kernel_does(guest: Guest, data: bytes) -> None:
    with guest.path.open("r+b", buffering=0) as file:
        if data:
            with pytest.raises(OSError) as caught:
                file.write(data)
            assert caught.value.errno == errno.EINVAL
        else:
            file.seek(1)
            with pytest.raises(OSError):
                file.write(DIGEST)
    assert guest.rtmr.read() == bytes(48)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EBUSY, errno.ENXIO, errno.EPERM])
def test_every_errno_of_an_extension_is_told_once_and_leaves_a_log_that_replays(guest: Guest, code: int) -> None:
    guest.fail(RtmrFaults(code=code))
    with pytest.raises(DeviceError) as caught:
        guest.measurement.measure(EVENT)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("rtmr", "extend", code)
    assert guest.replayed() == guest.rtmr.read() == bytes(48)


def test_an_extension_that_a_signal_interrupts_happens_once(guest: Guest) -> None:
    guest.fail(RtmrFaults(interrupted=2))
    assert guest.measurement.measure(EVENT).rtmr_3 == guest.replayed()


@pytest.mark.parametrize("faults", [RtmrFaults(lost=True), RtmrFaults(intruders=(DIGEST,))])
def test_a_register_that_is_not_what_the_event_makes_of_it_is_found(guest: Guest, faults: RtmrFaults) -> None:
    guest.fail(faults)
    with pytest.raises(DeviceError) as caught:
        guest.measurement.measure(EVENT)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("rtmr", "read-back", errno.EIO)
