"""TDX Evidence through `/dev/tdx_guest` and the host's Quote Generation Service: where configfs-tsm has no provider.

The device makes a TDREPORT, which only its own processor can check. The service makes a quote of it, which anybody can: it is
reached over vsock, at the port the image names in `/etc/tdx-attest.conf`. The host could answer as it likes; that the quote
carries our data is checked here, that it is genuine by whoever verifies it. So what the TD was launched with is read out of a
TDREPORT, also where configfs-tsm makes the quotes. A service may be asked again and need not be waited for; the ioctl takes
microseconds.
Source: Linux 6.12, Documentation/virt/coco/tdx-guest.rst; Intel DCAP, QuoteGeneration/quote_wrapper/tdx_attest.
"""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from agent.closed import Ident
from agent.errors import (
    Absence,
    DeviceError,
    DeviceUnavailableError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import NO_REPORT_DATA, REPORT_DATA_BYTES, Evidence, ReportData, Tee
from agent.evidence.cpu import TDX_PATIENCE, Patience, tdx_evidence
from agent.evidence.qgs_abi import (
    LENGTH_BYTES,
    TDREPORT_BYTES,
    pack_quote_request,
    parse_frame_length,
    parse_quote_response,
)
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES, parse_tdreport

DEVICE = Path("/dev/tdx_guest")
ATTEST_CONF = Path("/etc/tdx-attest.conf")
MAX_CONF_BYTES = 4096
TDX_CMD_GET_REPORT0 = 0xC440_5401
QUOTE_DEADLINE_S = 35.0
"""For one quote, from the connection on."""

Ioctl = Callable[[int, int, bytearray], int]
"""As `fcntl.ioctl`: OSError for what the kernel refuses."""
Connect = Callable[[int, float], socket.socket]
"""A stream to the host's port, within so many seconds. Raises OSError."""

_INTERFACE = Ident("tdx-guest")
_QGS = Ident("qgs")
_REPORT0 = Ident("TDX_CMD_GET_REPORT0")
_TDREPORT_TYPE = 0x81
_REPORT_DATA = slice(128, 128 + REPORT_DATA_BYTES)  # of a TDREPORT
_PORT = re.compile(r"\s*port\s*=\s*([0-9]{1,5})\s*(#.*)?")
_DEVICE_AGAIN = frozenset((errno.EINTR, errno.EBUSY, errno.EIO, errno.ENOMEM))


def connect_to_host(port: int, timeout_s: float) -> socket.socket:
    """A stream to a port of the host over vsock. Raises OSError."""
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout_s)
        stream.connect((socket.VMADDR_CID_HOST, port))
    except BaseException:
        stream.close()
        raise
    return stream


class TdxGuest:
    """The `Attester` of a TDX guest whose kernel makes no quotes. Needs root."""

    tee = Tee.TDX
    interface = _INTERFACE

    def __init__(
        self,
        device: Path = DEVICE,
        conf: Path = ATTEST_CONF,
        ioctl: Ioctl = fcntl.ioctl,
        connect: Connect = connect_to_host,
        patience: Patience = TDX_PATIENCE,
        deadline_s: float = QUOTE_DEADLINE_S,
    ) -> None:
        """Prove, without a request, that the device can be opened and that the image names a quote service.

        Args:
            device: the node.
            conf: the file that names the port.
            ioctl: how the device is asked.
            connect: how the service is reached.
            patience: how often both are asked.
            deadline_s: for one quote.

        Raises:
            NoAttesterError: no node, no driver behind it, or no port.
            DeviceError: the kernel refused for another reason, usually because we are not root.
        """
        self._device = device
        self._ioctl = ioctl
        self._connect = connect
        self._patience = patience
        self._deadline_s = deadline_s
        os.close(_open(device))
        self._port = read_port(conf)

    def collect(self, report_data: ReportData) -> Evidence:
        """Fresh Evidence over `report_data` (64 bytes): the quote, without certificates beside it.

        Raises:
            NoAttesterError: the device has gone since this object was made.
            DeviceUnavailableError: device or service could not answer, as often as they were asked.
            DeviceError: the kernel or the service refused; final. The code is an errno, of interface `qgs` an errno or a
                status of the service.
            MalformedEvidenceError: TDREPORT, answer or quote does not parse.
            EvidenceBindingError: TDREPORT or quote carries other data than `report_data`.
        """
        return self._patience.ask(lambda: tdx_evidence(self._quote(self.report(report_data)), report_data))

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""
        return mr_config_id(self._device, self._ioctl, self._patience)

    def report(self, report_data: ReportData) -> bytes:
        """The TDREPORT over `report_data`: 1024 bytes. Raises as `collect`."""
        return _tdreport(self._device, self._ioctl, report_data)

    def _quote(self, report: bytes) -> bytes:
        """What the service makes of a TDREPORT."""
        end = time.monotonic() + self._deadline_s
        try:
            with closing(self._connect(self._port, self._deadline_s)) as stream:
                stream.settimeout(max(end - time.monotonic(), 0.001))
                stream.sendall(pack_quote_request(report))
                length = parse_frame_length(_receive(stream, LENGTH_BYTES, end), MAX_QUOTE_BYTES)
                response = parse_quote_response(_receive(stream, length, end))
        except OSError as exc:
            code = errno.ETIMEDOUT if isinstance(exc, TimeoutError) else exc.errno or 0
            kind = DeviceError if code in (errno.EAFNOSUPPORT, errno.EACCES, errno.EPERM) else DeviceUnavailableError
            raise kind(_QGS, Ident("exchange"), code) from exc
        # refusal: test_an_error_of_the_service_is_told_and_final
        if response.error:
            raise DeviceError(_QGS, Ident("GET_QUOTE"), response.error)
        if not response.quote:
            raise DeviceUnavailableError(_QGS, Ident("GET_QUOTE"), errno.ENODATA)
        return response.quote


def mr_config_id(device: Path, ioctl: Ioctl, patience: Patience) -> bytes:
    """MRCONFIGID (48 bytes), out of a TDREPORT.

    Not out of a quote: that comes from the host, who could put any MRCONFIGID into one that nobody has verified yet. A TDREPORT
    is written into this guest's memory by the TDX module.

    Raises:
        NoAttesterError, DeviceError, MalformedEvidenceError, EvidenceBindingError: as `TdxGuest.collect`.
    """
    return parse_tdreport(patience.ask(lambda: _tdreport(device, ioctl, NO_REPORT_DATA))).body.mr_config_id


def _tdreport(device: Path, ioctl: Ioctl, report_data: ReportData) -> bytes:
    assert len(report_data) == REPORT_DATA_BYTES
    argument = bytearray(report_data) + bytearray(TDREPORT_BYTES)
    descriptor = _open(device)
    try:
        ioctl(descriptor, TDX_CMD_GET_REPORT0, argument)
    except OSError as exc:
        kind = DeviceUnavailableError if exc.errno in _DEVICE_AGAIN else DeviceError
        raise kind(_INTERFACE, _REPORT0, exc.errno or 0) from exc
    finally:
        os.close(descriptor)
    report = bytes(argument[REPORT_DATA_BYTES:])
    if report[0] != _TDREPORT_TYPE:
        raise MalformedEvidenceError(EvidenceFormat.TDX_REPORT, Ident("type"), report[0], _TDREPORT_TYPE)
    # refusal: test_a_report_over_other_data_is_refused
    if report[_REPORT_DATA] != report_data:
        raise EvidenceBindingError(EvidenceFormat.TDX_REPORT)
    return report


def _open(device: Path) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise NoAttesterError(Ident(Tee.TDX.value)) from exc
        raise DeviceError(_INTERFACE, Ident("open"), exc.errno or 0) from exc


def read_port(conf: Path) -> int:
    """The one port that `/etc/tdx-attest.conf` names: a line `port = 4050`; `#` begins a comment.

    Raises:
        NoAttesterError: no file, no port in it, more than one, or none that can be.
    """
    try:
        with conf.open("rb") as file:
            text = file.read(MAX_CONF_BYTES).decode("ascii", "replace")
    except OSError as exc:
        raise NoAttesterError(Ident(Tee.TDX.value), Absence.NO_QUOTE_SERVICE) from exc
    ports = [int(match[1]) for line in text.splitlines() if (match := _PORT.fullmatch(line))]
    if len(ports) != 1 or ports[0] > 0xFFFF:
        raise NoAttesterError(Ident(Tee.TDX.value), Absence.NO_QUOTE_SERVICE)
    return ports[0]


def _receive(stream: socket.socket, size: int, end: float) -> bytes:
    """Exactly `size` bytes until `end`. Raises OSError, also when the service ends before."""
    data = b""
    while len(data) < size:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        stream.settimeout(left)
        chunk = stream.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "")
        data += chunk
    return data
