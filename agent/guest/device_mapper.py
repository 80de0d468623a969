"""Devices of the kernel's device mapper that end with whoever uses them: made by ioctl, without any program of anybody's.

Owns the ioctls. Does not know what a table means, and makes no policy. Every device is removed at once, deferred: the kernel
keeps it while a descriptor, a mount or another device holds it, and then takes it away with its keys. So nothing is left to
undo, and a process that is killed leaves nothing behind. Only between loading a table and opening the device, which is two
system calls, would the kernel keep one that nobody holds, until the guest ends.

Follows include/uapi/linux/dm-ioctl.h (Linux 6.12). Needs CAP_SYS_ADMIN, and devtmpfs at /dev. Standard library only.
"""

import fcntl
import os
import struct
from contextlib import ExitStack
from pathlib import Path

CONTROL = Path("/dev/mapper/control")
BUFFER_BYTES = 4096
"""Above 1024: fcntl.ioctl copies a shorter buffer to its own stack, where nobody wipes a key."""
CORRUPTED = "C"
"""What dm-verity says of itself once a block did not authenticate; before that, `V`."""
KEY = b"{key}"
"""Stands in a table's parameters where the key's hexadecimal digits go."""

# struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid, data
_HEAD = struct.Struct("=3I2IIiIIIQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")  # struct dm_target_spec: sector_start, length, status, next, target_type
_VERSION = (4, 0, 0)
_DEV_AT, _STATUS_AT = 40, _HEAD.size + _TARGET.size
_DEV_CREATE, _DEV_REMOVE, _DEV_SUSPEND, _TABLE_LOAD, _TABLE_STATUS = 3, 4, 6, 9, 12
_READ_ONLY = 1 << 0
_SECURE_DATA = 1 << 15  # the kernel wipes its copy, and ours: in every request, since a refused table is still in the buffer
_DEFERRED_REMOVE = 1 << 17
_HEX = [b"%02x" % value for value in range(256)]


def number_of(descriptor: int) -> str:
    """The block device behind a descriptor, `major:minor`, as tables name it. Raises OSError."""
    device = os.fstat(descriptor).st_rdev
    return f"{os.major(device)}:{os.minor(device)}"


def path_of(descriptor: int) -> str:
    """Where devtmpfs has the device behind this descriptor of `map_device`. Raises OSError."""
    return f"/dev/dm-{os.minor(os.fstat(descriptor).st_rdev)}"


def map_device(name: str, kind: str, sectors: int, parameters: str, buffer: memoryview, key: memoryview | None = None) -> int:
    """Make a read-only device of one target.

    Args:
        name: nobody else's; at most 127 ASCII characters.
        kind: the target, `crypt` or `verity`.
        sectors: its length, in 512 bytes.
        parameters: its table, with `{key}` where the key goes.
        buffer: at least 4096 bytes that may hold a key; zeroed before return.
        key: raw bytes.

    Returns:
        The open device. It lives as long as somebody uses it: this descriptor, a mount, another device.

    Raises:
        OSError: the kernel refused; nothing is left. ENOENT without a device mapper, EINVAL for a table it does not take.
    """
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        with ExitStack() as undo:
            _request(control, _DEV_CREATE, name, buffer)
            undo.callback(_request, control, _DEV_REMOVE, name, buffer)
            (device,) = struct.unpack_from("=Q", buffer, _DEV_AT)
            put_target(buffer, kind, sectors, parameters, key)
            _request(control, _TABLE_LOAD, name, buffer, _READ_ONLY, targets=1)
            descriptor = os.open(f"/dev/dm-{os.minor(device)}", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, descriptor)
            _request(control, _DEV_REMOVE, name, buffer, _DEFERRED_REMOVE)  # that it is busy is no error with this flag
            undo.pop_all()
            undo.callback(os.close, descriptor)  # from here on that is enough
            _request(control, _DEV_SUSPEND, name, buffer)  # without the flag of that name: resume
            undo.pop_all()
    finally:
        buffer[:] = bytes(len(buffer))
        os.close(control)
    return descriptor


def status_of(name: str, buffer: memoryview) -> str:
    """What the one target of a device says of itself. Raises OSError."""
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        _request(control, _TABLE_STATUS, name, buffer)
        return bytes(buffer[_STATUS_AT:]).partition(b"\0")[0].decode("ascii", "replace")
    finally:
        buffer[:] = bytes(len(buffer))
        os.close(control)


def _request(control: int, command: int, name: str, buffer: memoryview, flags: int = 0, targets: int = 0) -> None:
    """One ioctl; what stands behind the head of `buffer` goes along."""
    put_head(buffer, name, flags, targets)
    fcntl.ioctl(control, 0xC000FD00 | _HEAD.size << 16 | command, buffer, True)


def put_head(buffer: memoryview, name: str, flags: int, targets: int) -> None:
    """The head of a request that may hold a key."""
    _HEAD.pack_into(
        buffer, 0, *_VERSION, len(buffer), _HEAD.size, targets, 0, flags | _SECURE_DATA, 0, 0, 0, name.encode("ascii"), b""
    )


def put_target(buffer: memoryview, kind: str, sectors: int, parameters: str, key: memoryview | None) -> None:
    """One target behind the head of `buffer`, without making another copy of the key. RuntimeError: it does not fit."""
    before, marked, after = parameters.encode("ascii").partition(KEY)
    digits = 2 * len(key) if key is not None and marked else 0
    at = _HEAD.size + _TARGET.size
    end = at + len(before) + digits + len(after) + 1
    if end > len(buffer) or bool(marked) != (key is not None):
        raise RuntimeError("a table that does not fit its buffer, or a key that does not fit its table")
    _TARGET.pack_into(buffer, _HEAD.size, 0, sectors, 0, end - _HEAD.size, kind.encode("ascii"))
    buffer[at : at + len(before)] = before
    at += len(before)
    if key is not None:
        for byte in key:
            buffer[at : at + 2] = _HEX[byte]
            at += 2
    buffer[at : end - 1] = after
    buffer[end - 1] = 0
