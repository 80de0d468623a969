import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.errors import DeviceError, Owner
from agent.evidence import Unsupported
from agent.evidence.rtmr import MEASUREMENTS, REGISTER, Rtmr
from tests.children import IS_ROOT

DIGEST = bytes(range(48))


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
