"""SEV-SNP Evidence through the kernel's configfs-tsm: one request is one directory of attribute files.

Owns every access below `/sys/kernel/config/tsm/report`. Loads no kernel module, mounts no configfs, waits for no driver: the
image does. Verifies no signature; checks only what must hold before a report leaves: it parses and carries our data.

A read of the report blocks for at most 62 seconds, most of it where the kernel itself repeats a throttled request. It takes no
deadline and is never abandoned: a process that is killed in it can cost this guest its attestation key until the next start.
For the same reason no answer of the firmware leads to another request. A throttle of our own, as clients of `/dev/sev-guest`
have for kernels before 6.3, needs no code: configfs-tsm came with 6.7.
Source: Linux 6.12, Documentation/ABI/testing/configfs-tsm, drivers/virt/coco/tsm.c, drivers/virt/coco/sev-guest.
"""

import base64
import binascii
import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.closed import Ident
from agent.errors import DeviceError, EvidenceBindingError, EvidenceFormat, MalformedEvidenceError, NoAttesterError
from agent.evidence import REPORT_DATA_BYTES, Evidence, ReportData, Tee
from agent.evidence.snp_abi import CertificateKind, parse_certificate_table, parse_report
from agent.verify.snp import load_certificate

REPORT_ROOT = Path("/sys/kernel/config/tsm/report")
MAX_TRIES = 3
MAX_BLOB_BYTES = 32 << 10
"""The kernel's own limit up to 2026. A report has 1184 bytes, a certificate table at most 16 KiB."""
MAX_TEXT_BYTES = 4096

_CONFIGFS_TSM = Ident("configfs-tsm")
_PROVIDER = b"sev_guest\n"
# Somebody got in our way in the kernel; no firmware was asked, or its answer was for somebody else. Once more, from the start.
# EBUSY comes from the kernel's generation counter: a firmware that is busy reads as ETIMEDOUT, and that is final.
_START_OVER = frozenset((errno.EBUSY, errno.EWOULDBLOCK, errno.ENOENT, errno.EEXIST))
_CHAIN_ORDER = (CertificateKind.VCEK, CertificateKind.VLEK, CertificateKind.ASK, CertificateKind.ARK)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*")


class TsmSnp:
    """The `Attester` of an SEV-SNP guest. Needs root."""

    tee = Tee.SNP

    def __init__(self, root: Path = REPORT_ROOT) -> None:
        """Prove, without a request to the firmware, that the interface is there and that its provider is SNP.

        Args:
            root: the folder in which requests are made.

        Raises:
            NoAttesterError: no configfs-tsm, no provider, or another TEE's.
            DeviceError: the kernel refused for another reason, usually because we are not root.
        """
        self._root = root
        with _entry(root):
            pass

    def collect(self, report_data: ReportData) -> Evidence:
        """Fresh Evidence over `report_data` (64 bytes), with the certificates the host supplied, often none.

        Asks again, in a new directory and at most three times, only where somebody interfered with the request.

        Raises:
            NoAttesterError: the provider has gone since this object was made.
            DeviceError: the kernel or the firmware refused; final.
            MalformedEvidenceError: report or certificate table does not parse, or there is no report.
            EvidenceBindingError: the report carries other data than `report_data`.
        """
        assert len(report_data) == REPORT_DATA_BYTES
        for _ in range(MAX_TRIES - 1):
            try:
                return self._collect(report_data)
            except DeviceError as error:
                if error.code not in _START_OVER:
                    raise
        return self._collect(report_data)

    def _collect(self, report_data: ReportData) -> Evidence:
        with _entry(self._root) as entry:
            # 1. Where the generation stands. Every accepted write adds 1.
            generation = _read_number(entry, "generation")

            # 2. The privilege level, where 0 is below what this guest may ask for (it runs under an SVSM).
            floor = _read_number(entry, "privlevel_floor")
            if floor:
                _write(entry, "privlevel", b"%d" % floor)

            # 3. What the report must carry. The kernel takes it over at the close and loses the error if it does not: the
            #    report then fails with EINVAL.
            _write(entry, "inblob", report_data)

            # 4. The report, which the firmware makes now, and what the host supplied with it.
            report = _read(entry, "outblob", MAX_BLOB_BYTES)
            table = _read(entry, "auxblob", MAX_BLOB_BYTES)

            # 5. Both belong to our writes and to nobody else's. The code is the kernel's own for an answer that is stale.
            # refusal: test_a_report_after_somebody_elses_write_is_not_taken
            if _read_number(entry, "generation") != generation + (2 if floor else 1):
                raise DeviceError(_CONFIGFS_TSM, Ident("generation"), errno.EWOULDBLOCK)

        # 6. It is a report, and it carries our data. Drivers have answered a failure with an empty one.
        # refusal: test_a_blob_of_any_size_is_read_to_a_bound
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
    chain = tuple(der for kind in _CHAIN_ORDER for found, data in entries if found is kind for der in _certificates(data))
    for der in chain:
        load_certificate(der)
    return chain


def _certificates(data: bytes) -> Iterator[bytes]:
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


@contextmanager
def _entry(root: Path) -> Iterator[Path]:
    """A directory of our own for one request, whose provider is SNP."""
    entry = root / f"keyturn-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        entry.mkdir()
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENXIO):  # no configfs-tsm; nobody behind it
            raise NoAttesterError(Ident(Tee.SNP.value)) from exc
        raise _refused("mkdir", exc) from exc
    try:
        # refusal: test_starting_over_ends
        if _read(entry, "provider", MAX_TEXT_BYTES) != _PROVIDER:
            raise NoAttesterError(Ident(Tee.SNP.value))
        yield entry
    finally:
        # The attributes go with it and cannot be unlinked. What stays, should it stay, is a report: nothing secret.
        with suppress(OSError):
            entry.rmdir()


def _read(entry: Path, name: str, max_bytes: int) -> bytes:
    """The attribute to its end, but at most one byte more than `max_bytes`, which then no parser takes."""
    data = b""
    with _opened(entry, name, os.O_RDONLY) as descriptor:
        while len(data) <= max_bytes and (chunk := os.read(descriptor, max_bytes + 1 - len(data))):
            data += chunk
    return data


def _read_number(entry: Path, name: str) -> int:
    text = _read(entry, name, MAX_TEXT_BYTES)
    if not re.fullmatch(rb"[0-9]{1,20}\n", text):
        raise MalformedEvidenceError(EvidenceFormat.SNP_REPORT, Ident(name))
    return int(text)


def _write(entry: Path, name: str, value: bytes) -> None:
    """One open, one write, one close: what the kernel takes as one value."""
    with _opened(entry, name, os.O_WRONLY) as descriptor:
        os.write(descriptor, value)


@contextmanager
def _opened(entry: Path, name: str, flags: int) -> Iterator[int]:
    # A descriptor and no file object: that one answers EWOULDBLOCK with None.
    try:
        descriptor = os.open(entry / name, flags | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise _refused(name, exc) from exc


def _refused(call: str, exc: OSError) -> DeviceError:
    return DeviceError(_CONFIGFS_TSM, Ident(call), exc.errno or 0)
