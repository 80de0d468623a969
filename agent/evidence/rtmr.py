"""The runtime measurement register of this guest: RTMR 3 of a TDX guest, through the kernel's sysfs (Linux 6.16 and newer).

Owns the write that extends it. What is measured, and the event log that explains it, are the caller's. SEV-SNP has no such
register: there, what a guest does after its launch is covered by report data alone.
Source: Linux 6.16, Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest.
"""

import enum
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from agent.closed import Ident
from agent.errors import DeviceError
from agent.evidence import Tee

MEASUREMENTS = Path("/sys/class/misc/tdx_guest/measurements")
DIGEST_BYTES = 48
REGISTER = "rtmr3:sha384"
"""The one that firmware, boot loader and kernel leave to the running system."""

_INTERFACE = Ident("rtmr")


class Unsupported(enum.Enum):
    """Why nothing was measured. No error: such a guest is what it is, and its verifier sees it."""

    NO_REGISTER = "this kind of TEE has no runtime register"
    NO_DRIVER = "the kernel has no file for it (Linux 6.16 brought it)"


@dataclass(frozen=True, slots=True)
class Extended:
    """The register's value afterwards, 48 bytes."""

    value: bytes


def extend(tee: Tee, digest: bytes, measurements: Path = MEASUREMENTS) -> Extended | Unsupported:
    """Extend the register by a SHA-384 digest. It cannot be taken back before the next start of the guest.

    Raises:
        DeviceError: the kernel refused.
    """
    assert len(digest) == DIGEST_BYTES
    if tee is not Tee.TDX:
        return Unsupported.NO_REGISTER
    call = "open"
    try:
        descriptor = os.open(measurements / REGISTER, os.O_RDWR | os.O_CLOEXEC)
        try:
            call = "extend"
            os.pwrite(descriptor, digest, 0)  # all 48 at once, or EINVAL
            call = "read"
            value = os.pread(descriptor, DIGEST_BYTES, 0)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return Unsupported.NO_DRIVER
    except OSError as exc:
        raise DeviceError(_INTERFACE, Ident(call), exc.errno or 0) from exc
    if len(value) != DIGEST_BYTES:
        raise DeviceError(_INTERFACE, Ident("read"), errno.EIO)
    return Extended(value)
