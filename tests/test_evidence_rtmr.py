import errno
import os
from pathlib import Path

import pytest

from agent.errors import DeviceError, Owner
from agent.evidence import Tee
from agent.evidence.rtmr import MEASUREMENTS, REGISTER, Extended, Unsupported, extend

DIGEST = bytes(range(48))


@pytest.fixture
def register(tmp_path: Path) -> Path:
    """A file in the register's place. What is written stays: the extending is the TDX module's."""
    path = tmp_path / "rtmr3:sha384"
    path.write_bytes(bytes(48))
    return path


def test_a_digest_is_written_whole_at_the_start_of_the_register(register: Path) -> None:
    assert extend(Tee.TDX, DIGEST, register.parent) == Extended(DIGEST)
    assert register.read_bytes() == DIGEST


def test_snp_has_no_register_and_that_is_no_error(register: Path) -> None:
    assert extend(Tee.SNP, DIGEST, register.parent) is Unsupported.NO_REGISTER
    assert register.read_bytes() == bytes(48)


def test_a_kernel_without_the_file_is_no_error(tmp_path: Path) -> None:
    assert extend(Tee.TDX, DIGEST, tmp_path) is Unsupported.NO_DRIVER


def test_a_kernel_that_refuses_is_a_device_error(register: Path) -> None:
    register.unlink()
    register.mkdir()
    with pytest.raises(DeviceError) as caught:
        extend(Tee.TDX, DIGEST, register.parent)
    error = caught.value
    assert (error.interface, error.call, error.code, error.owner) == ("rtmr", "open", errno.EISDIR, Owner.HOST)


def test_a_write_that_fails_is_named(register: Path) -> None:
    register.unlink()
    register.symlink_to("/dev/full")
    with pytest.raises(DeviceError) as caught:
        extend(Tee.TDX, DIGEST, register.parent)
    assert (caught.value.call, caught.value.code) == ("extend", errno.ENOSPC)


def test_a_register_that_reads_short_is_a_device_error(register: Path) -> None:
    register.unlink()
    register.symlink_to("/dev/null")
    with pytest.raises(DeviceError) as caught:
        extend(Tee.TDX, DIGEST, register.parent)
    assert (caught.value.call, caught.value.code) == ("read", errno.EIO)


def test_no_descriptor_is_left(register: Path) -> None:
    before = os.listdir("/proc/self/fd")
    extend(Tee.TDX, DIGEST, register.parent)
    assert os.listdir("/proc/self/fd") == before


def test_the_register_is_where_the_kernel_has_it() -> None:
    assert Path("/sys/class/misc/tdx_guest/measurements/rtmr3:sha384") == MEASUREMENTS / REGISTER
