"""The device mapper's ioctls as bytes; that the kernel takes them is `scripts/boot-test --volume`'s to show."""

import os
import struct

import pytest

from agent.guest import device_mapper as dm


def there_is_one() -> bool:
    """A device mapper, and not only its node, which cryptsetup makes where there is none."""
    try:
        os.close(os.open(dm.CONTROL, os.O_RDWR))
    except OSError:
        return False
    return True


def test_a_table_is_laid_out_as_dm_ioctl_h_says() -> None:
    buffer = memoryview(bytearray(dm.BUFFER_BYTES))
    dm.put_target(buffer, "crypt", 800, "aes-xts-plain64 {key} 0 254:16 2048", memoryview(bytes(range(64))))
    start, length, status, following = struct.unpack_from("=QQiI", buffer, 312)
    assert (start, length, status) == (0, 800, 0)
    assert bytes(buffer[312 + 24 : 312 + 40]) == b"crypt".ljust(16, b"\0")
    parameters = bytes(buffer[352:]).partition(b"\0")[0]
    assert parameters.decode() == f"aes-xts-plain64 {bytes(range(64)).hex()} 0 254:16 2048"
    assert following == 40 + len(parameters) + 1
    dm.put_target(buffer, "verity", 8, "1 2 3", None)
    assert bytes(buffer[352:360]) == b"1 2 3\0" + parameters[6:8], "what is behind the end is not read"


def test_a_head_is_laid_out_as_dm_ioctl_h_says_and_has_the_kernel_wipe_its_copy() -> None:
    buffer = memoryview(bytearray(b"\xff" * dm.BUFFER_BYTES))
    dm.put_head(buffer, "keyturn-1-crypt", 1 << 17, 1)
    version, words, device = buffer[:12], struct.unpack_from("=IIIiIII", buffer, 12), struct.unpack_from("=Q", buffer, 40)
    assert (struct.unpack("=3I", version), device) == ((4, 0, 0), (0,))
    size, start, targets, opened, flags, event, padding = words
    assert (size, start, targets, opened, event, padding) == (dm.BUFFER_BYTES, 312, 1, 0, 0, 0)
    assert flags == 1 << 17 | 1 << 15, "DM_DEFERRED_REMOVE, DM_SECURE_DATA_FLAG"
    assert bytes(buffer[48:312]) == b"keyturn-1-crypt".ljust(128 + 129 + 7, b"\0")
    assert bytes(buffer[312:]) == b"\xff" * (dm.BUFFER_BYTES - 312)


def test_a_table_that_does_not_fit_is_our_mistake() -> None:
    buffer = memoryview(bytearray(dm.BUFFER_BYTES))
    room = dm.BUFFER_BYTES - 352 - 1
    dm.put_target(buffer, "verity", 8, "x" * room, None)
    for parameters, key in (("x" * (room + 1), None), ("{key}", None), ("no key", memoryview(bytes(64)))):
        with pytest.raises(RuntimeError):
            dm.put_target(buffer, "crypt", 8, parameters, key)


def test_a_key_stays_in_no_buffer_when_the_kernel_refuses() -> None:
    if there_is_one():
        pytest.skip("this kernel has a device mapper")
    buffer = memoryview(bytearray(dm.BUFFER_BYTES))
    with pytest.raises(OSError):
        dm.map_device("keyturn-test", "crypt", 8, "aes-xts-plain64 {key} 0 254:16 0", buffer, memoryview(bytes(range(64))))
    assert not any(buffer)


def test_a_device_is_named_by_its_number() -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        assert dm.number_of(null) == "1:3"
        assert dm.path_of(null) == "/dev/dm-3"
    finally:
        os.close(null)
