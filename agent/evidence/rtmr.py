"""The runtime measurement register of this guest: RTMR 3 of a TDX guest, through the kernel's sysfs (Linux 6.16 and newer).

Owns the read and the write that extends it. What is measured, and the event log that explains it, are `runtime.py`'s.
Source: Linux 6.16, Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest.
"""

import errno
import os
from pathlib import Path

from agent.closed import Ident
from agent.errors import DeviceError
from agent.evidence import Unsupported

MEASUREMENTS = Path("/sys/class/misc/tdx_guest/measurements")
DIGEST_BYTES = 48
REGISTER = "rtmr3:sha384"
"""The one that firmware, boot loader and kernel leave to the running system."""

INTERFACE = Ident("rtmr")


class Rtmr:
    """RTMR 3, a `RuntimeRegister`."""

    def __init__(self, measurements: Path = MEASUREMENTS) -> None:
        self._path = measurements / REGISTER

    def read(self) -> bytes | Unsupported:
        """See `RuntimeRegister.read`. Opened for writing too, which a container's sysfs, or not being root, may not allow."""
        call = "open"
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                call = "read"
                value = os.pread(descriptor, DIGEST_BYTES, 0)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return Unsupported.NO_DRIVER
        except OSError as exc:
            if call == "open" and exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return Unsupported.READ_ONLY
            raise DeviceError(INTERFACE, Ident(call), exc.errno or 0) from exc
        if len(value) != DIGEST_BYTES:
            raise DeviceError(INTERFACE, Ident("read"), errno.EIO)
        return value

    def extend(self, digest: bytes) -> None:
        """See `RuntimeRegister.extend`."""
        assert len(digest) == DIGEST_BYTES
        call = "open"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                call = "extend"
                os.pwrite(descriptor, digest, 0)  # all 48 at once, or EINVAL
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise DeviceError(INTERFACE, Ident(call), exc.errno or 0) from exc
