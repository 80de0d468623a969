"""What every interface to a CPU TEE shares: how often a device is asked, and what must hold of its answer before it leaves.

Opens nothing: the interfaces are `tsm.py`, `sev_guest.py` and `tdx_guest.py`. Verifies no signature; checks only that the
answer has the layout and carries our data, and that nothing else goes out with it.
"""

import base64
import binascii
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from agent.closed import Ident
from agent.errors import DeviceUnavailableError, EvidenceBindingError, EvidenceFormat, MalformedEvidenceError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.snp_abi import CertificateKind, parse_certificate_table, parse_report
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES, quote_length, quote_report_data
from agent.threads import pause
from agent.verify.snp import load_certificate

_T = TypeVar("_T")


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a device is asked for the same thing. A request under way is never cut short, whatever the time.

    Attributes:
        pauses_s: before each further request; so many there are at most.
        within_s: no request is begun so long after the first.
        now, pause: clock and wait; the wait says False when nobody wants the answer any more.
    """

    pauses_s: tuple[float, ...]
    within_s: float
    now: Callable[[], float] = time.monotonic
    pause: Callable[[float], bool] = pause

    def ask(self, request: Callable[[], _T]) -> _T:
        """The first answer that is not DeviceUnavailableError; the last of these when patience is over."""
        end = self.now() + self.within_s
        for wait_s in self.pauses_s:
            try:
                return request()
            except DeviceUnavailableError:
                if self.now() + wait_s > end or not self.pause(wait_s):
                    raise
        return request()


SNP_PATIENCE = Patience((2.0, 2.0), within_s=65.0)
"""Where no firmware was asked. Reports stay 2 s apart, as clients of throttled hosts keep them."""
TDX_PATIENCE = Patience((2.0, 5.0, 10.0), within_s=105.0)
"""Three requests that time out after 30 s, or a quote service that comes back within seconds."""


REQUEST_DISTANCE_S = 2.0
"""From the end of a request to SNP's firmware to the beginning of the next one. Linux before 6.3 gives up the guest's key when
the host says that it is busy, and later kernels make the guest wait 10 s for the tenth of requests in a row."""


class Distance:
    """Keeps the requests to SNP's firmware of one process apart. Between processes it is kept by `lease.py`."""

    def __init__(self, now: Callable[[], float] = time.monotonic, pause: Callable[[float], bool] = pause) -> None:
        """Clock and wait; the wait says False when nobody wants the answer any more."""
        self._now = now
        self._pause = pause
        self._last_ended: float | None = None

    def wait(self) -> bool:
        """Wait until a request may begin. False: none may, because nobody wants its answer."""
        if self._last_ended is None:
            return True
        wait_s = self._last_ended + REQUEST_DISTANCE_S - self._now()
        return wait_s <= 0 or self._pause(wait_s)

    def begin(self) -> None:
        """A request has ended, whatever came of it."""
        self._last_ended = self._now()


# --- SNP --------------------------------------------------------------------------------------------------------------

_CHAIN_ORDER = (CertificateKind.VCEK, CertificateKind.VLEK, CertificateKind.ASK, CertificateKind.ARK)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*")


def snp_evidence(report: bytes, table: bytes, report_data: ReportData) -> Evidence:
    """A report and the host's certificate table, as Evidence over `report_data`.

    Raises:
        MalformedEvidenceError: the report, the table or a certificate in it does not parse. Drivers have answered a failure
            with an empty report.
        EvidenceBindingError: the report carries other data.
    """
    # refusal: test_a_report_over_other_data_is_refused
    if parse_report(report).report_data != report_data:
        raise EvidenceBindingError(EvidenceFormat.SNP_REPORT)
    return Evidence(Tee.SNP, report, certificate_chain(table))


def certificate_chain(table: bytes) -> tuple[bytes, ...]:
    """The certificates in a host's certificate table (configfs `auxblob`), DER, leaf first.

    A table that does not parse is an error, although a Verifier with Endorsements of its own could do without. The same
    Verifier refuses a chain with a foreign part in it; so to send it is no help, and to leave it out would hide from the host,
    who alone can mend it, that it is broken. A host that wants to stop a boot can do so without this.

    Args:
        table: at most 16 KiB; empty when the host supplies nothing. Contents are DER or PEM, as the host chose.

    Raises:
        MalformedEvidenceError: the table or a certificate in it does not parse.
    """
    entries = parse_certificate_table(table)
    chain = tuple(der for kind in _CHAIN_ORDER for found, data in entries if found is kind for der in der_certificates(data))
    for der in chain:
        load_certificate(der)
    return chain


def der_certificates(data: bytes) -> Iterator[bytes]:
    """DER of each certificate in `data`, which is one in DER, or PEM and nothing else. Looks into none of them.

    Raises:
        MalformedEvidenceError: not PEM, although it begins so.
    """
    if not data.startswith(b"-----"):
        yield data
        return
    position = 0
    while position < len(data):
        match = _PEM.match(data, position)
        if not match:
            raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("pem"))
        try:
            yield base64.b64decode(b"".join(match[1].split()))
        except binascii.Error as exc:
            raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("pem")) from exc
        position = match.end()


# --- TDX --------------------------------------------------------------------------------------------------------------


def tdx_evidence(blob: bytes, report_data: ReportData) -> Evidence:
    """The quote at the start of `blob`, as Evidence over `report_data`.

    What follows it is cut off: the padding of a cloud or, from kernels before March 2026, whatever lay in the quote buffer.

    Raises:
        MalformedEvidenceError: no quote of version 4 or 5, too long, or cut short.
        EvidenceBindingError: it carries other data.
    """
    # refusal: test_a_blob_of_a_length_no_quote_has_is_refused
    if len(blob) > MAX_QUOTE_BYTES:
        raise MalformedEvidenceError(EvidenceFormat.TDX_QUOTE, Ident("length"), len(blob), MAX_QUOTE_BYTES)
    end = quote_length(blob)
    # refusal: test_a_quote_over_other_data_is_refused
    if quote_report_data(blob) != report_data:
        raise EvidenceBindingError(EvidenceFormat.TDX_QUOTE)
    return Evidence(Tee.TDX, blob[:end])
