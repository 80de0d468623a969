"""SEV-SNP Evidence through `/dev/sev-guest`: for guests whose kernel has no configfs-tsm, 5.19 to 6.6.

Owns the two ioctls that give a report. The firmware is asked sparingly and never again after an error: with any error but a
certificate buffer that is too small the kernel gives up the key to the firmware (VMPCK), for as long as the guest runs. A busy
hypervisor is no exception. Kernels from 6.3 on ask it again themselves, every 2 s for up to 62 s; older ones give up at once,
which is why requests keep a distance here. An ioctl is never cut short: see `tsm.py`.
Source: Linux 6.12, Documentation/virt/coco/sev-guest.rst, drivers/virt/coco/sev-guest/sev-guest.c.
"""

import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.closed import Ident
from agent.errors import AttestationKeyLostError, DeviceError, EvidenceFormat, MalformedEvidenceError, NoAttesterError
from agent.evidence import NO_REPORT_DATA, REPORT_DATA_BYTES, Evidence, ReportData, Tee
from agent.evidence.cpu import Distance, snp_evidence
from agent.evidence.snp_abi import (
    GHCB_INVALID_LENGTH,
    REPORT_RESPONSE_BYTES,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    pack_ext_report_request,
    pack_guest_request,
    pack_report_request,
    parse_certificates_bytes,
    parse_exit_info,
    parse_report,
    parse_report_response,
)
from agent.threads import pause

DEVICE = Path("/dev/sev-guest")
VMPL_FILE = Path("/sys/devices/system/cpu/sev/vmpl")
"""From Linux 6.11 on; without it the guest runs at VMPL 0."""
MAX_TEXT_BYTES = 16
MAX_REQUESTS = 32
"""Of one boot. It needs three, and two more for each further attempt at the broker."""

Ioctl = Callable[[int, int, bytearray], int]
"""As `fcntl.ioctl`: OSError for what the kernel refuses, and the argument is changed in either case."""

_INTERFACE = Ident("sev-guest")
_FIRMWARE = Ident("sev-firmware")
_GHCB = Ident("ghcb")
_NAMES = {SNP_GET_REPORT: Ident("SNP_GET_REPORT"), SNP_GET_EXT_REPORT: Ident("SNP_GET_EXT_REPORT")}
_NO_FIRMWARE_ERROR = frozenset((0, 0xFF, 0xFFFF_FFFF))  # none; the driver's own; the firmware was not asked
_KEY_LOST = frozenset((errno.EIO, errno.ENOTTY, errno.EBADMSG, errno.ETIMEDOUT))


class _TooShortError(Exception):
    """The certificate buffer is."""


class SevGuest:
    """The `Attester` of an SEV-SNP guest without configfs-tsm. Needs root."""

    tee = Tee.SNP
    interface = _INTERFACE

    def __init__(
        self,
        device: Path = DEVICE,
        vmpl_file: Path = VMPL_FILE,
        ioctl: Ioctl = fcntl.ioctl,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] = pause,
    ) -> None:
        """Prove, without a request to the firmware, that the device can be opened.

        Args:
            device: the node.
            vmpl_file: where the kernel tells the privilege level of this guest.
            ioctl: how the device is asked.
            now: the clock of the distance between requests.
            wait: its wait; False when nobody wants the answer any more.

        Raises:
            NoAttesterError: no node, or no driver behind it.
            DeviceError: the kernel refused for another reason, usually because we are not root.
        """
        self._device = device
        self._vmpl_file = vmpl_file
        self._ioctl = ioctl
        self._distance = Distance(now, wait)
        self._requests = 0
        self._certificates_bytes: int | None = None  # not known yet
        with self._opened():
            pass

    def collect(self, report_data: ReportData) -> Evidence:
        """Fresh Evidence over `report_data` (64 bytes), with the certificates the host supplied, often none.

        The first time this is two requests where the host has certificates.

        Raises:
            NoAttesterError: the device has gone since this object was made.
            AttestationKeyLostError: firmware or hypervisor failed, or had failed before.
            DeviceError: the kernel or the firmware refused; final. `interface` says whose word the code is: `sev-guest`, an
                errno; `sev-firmware`, a firmware status; `ghcb`, the hypervisor's.
            MalformedEvidenceError: response, report or certificate table does not parse.
            EvidenceBindingError: the report carries other data than `report_data`.
        """
        assert len(report_data) == REPORT_DATA_BYTES
        vmpl = self._vmpl()
        with self._opened() as descriptor:
            if self._certificates_bytes == 0:
                request = _buffer(pack_report_request(report_data, vmpl))
                report, table = self._request(descriptor, SNP_GET_REPORT, request), b""
            else:
                report, table = self._with_certificates(descriptor, report_data, vmpl)
        return snp_evidence(report, table, report_data)

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`: of a report, which firmware and guest keep from the host on its way."""
        return parse_report(self.collect(NO_REPORT_DATA).report).host_data

    def _with_certificates(self, descriptor: int, report_data: ReportData, vmpl: int) -> tuple[bytes, bytes]:
        # 1. The length, unless it is known. A host without certificates answers with a report at once.
        if self._certificates_bytes is None:
            request = _buffer(pack_ext_report_request(report_data, vmpl, 0, 0))
            try:
                report = self._request(descriptor, SNP_GET_EXT_REPORT, request)
            except _TooShortError:
                self._certificates_bytes = parse_certificates_bytes(request.raw)
            else:
                self._certificates_bytes = 0
                return report, b""

        # 2. Report and certificates. A table that has grown in between is not asked for a third time.
        certificates = ctypes.create_string_buffer(self._certificates_bytes)
        request = _buffer(pack_ext_report_request(report_data, vmpl, ctypes.addressof(certificates), self._certificates_bytes))
        try:
            return self._request(descriptor, SNP_GET_EXT_REPORT, request), certificates.raw
        except _TooShortError:
            raise DeviceError(_GHCB, _NAMES[SNP_GET_EXT_REPORT], GHCB_INVALID_LENGTH) from None

    def _request(self, descriptor: int, number: int, request: "ctypes.Array[ctypes.c_char]") -> bytes:
        """One request to the firmware; the report it made. Raises _TooShortError."""
        name = _NAMES[number]
        self._keep_distance(name)
        response = ctypes.create_string_buffer(REPORT_RESPONSE_BYTES)
        argument = pack_guest_request(ctypes.addressof(request), ctypes.addressof(response))
        try:
            self._ioctl(descriptor, number, argument)
        except OSError as exc:
            code = exc.errno or 0
            firmware_error, vmm_error = parse_exit_info(argument) if code in (errno.EIO, errno.ENOSPC) else (0, 0)
            if vmm_error == GHCB_INVALID_LENGTH:  # ENOSPC: Linux 5.19
                raise _TooShortError from exc
            if vmm_error:
                raise AttestationKeyLostError(_GHCB, name, vmm_error) from exc
            if firmware_error not in _NO_FIRMWARE_ERROR:
                raise AttestationKeyLostError(_FIRMWARE, name, firmware_error) from exc
            raise (AttestationKeyLostError if code in _KEY_LOST else DeviceError)(_INTERFACE, name, code) from exc
        finally:
            self._distance.begin()
        status, report = parse_report_response(response.raw)
        # refusal: test_what_a_failure_means_and_that_it_is_never_asked_again
        if status:
            raise DeviceError(_FIRMWARE, name, status)
        return report

    def _keep_distance(self, name: Ident) -> None:
        # refusal: test_the_requests_of_a_boot_are_bounded
        if self._requests >= MAX_REQUESTS:
            raise DeviceError(_INTERFACE, Ident("request-limit"), MAX_REQUESTS)
        self._requests += 1
        if not self._distance.wait():
            raise DeviceError(_INTERFACE, name, errno.ECANCELED)

    def _vmpl(self) -> int:
        """The level of this guest: the firmware signs for no lower one."""
        try:
            with self._vmpl_file.open("rb") as file:
                text = file.read(MAX_TEXT_BYTES)
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise DeviceError(_INTERFACE, Ident("vmpl"), exc.errno or 0) from exc
        if text.strip() not in (b"0", b"1", b"2", b"3"):
            raise MalformedEvidenceError(EvidenceFormat.SNP_REPORT, Ident("vmpl"))
        return int(text)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise NoAttesterError(Ident(self.tee.value)) from exc
            raise DeviceError(_INTERFACE, Ident("open"), exc.errno or 0) from exc
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _buffer(data: bytes) -> "ctypes.Array[ctypes.c_char]":
    """Memory with an address; without the zero that ctypes would append."""
    return ctypes.create_string_buffer(data, len(data))
