"""Evidence through the kernel's configfs-tsm, of SEV-SNP or TDX: one request is one directory of attribute files.

Owns every access below `/sys/kernel/config/tsm/report`. Loads no kernel module, mounts no configfs, waits for no driver: the
image does.

A read of the report blocks where the kernel itself repeats a request: at most 62 seconds with SNP, 30 with TDX. It takes no
deadline and is never abandoned: a process that is killed in it can cost an SNP guest its attestation key until the next start,
and leaves a TDX guest's quote buffer to the host. No answer of the SNP firmware leads to another request. A throttle of our
own, as `sev_guest.py` has, needs no code: configfs-tsm came with 6.7, which throttles itself.
Source: Linux 6.12, Documentation/ABI/testing/configfs-tsm, drivers/virt/coco/tsm.c, sev-guest/, tdx-guest/.
"""

import errno
import fcntl
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from agent.closed import Ident
from agent.errors import (
    Absence,
    AttestationKeyLostError,
    DeviceError,
    DeviceUnavailableError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import NO_REPORT_DATA, REPORT_DATA_BYTES, Evidence, ReportData, Tee
from agent.evidence.cpu import SNP_PATIENCE, TDX_PATIENCE, Distance, Patience, snp_evidence, tdx_evidence
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES
from agent.evidence.tdx_guest import DEVICE as TDX_GUEST
from agent.evidence.tdx_guest import Ioctl, mr_config_id

REPORT_ROOT = Path("/sys/kernel/config/tsm/report")
MAX_SNP_BLOB_BYTES = 32 << 10
"""The kernel's own limit up to 2026. A report has 1184 bytes, a certificate table at most 16 KiB."""
MAX_TEXT_BYTES = 4096
PROVIDERS = {Tee.SNP: b"sev_guest\n", Tee.TDX: b"tdx_guest\n"}

_CONFIGFS_TSM = Ident("configfs-tsm")
# Somebody got in our way in the kernel, or there was no memory; no firmware was asked, or its answer was for somebody else.
# EBUSY comes from SNP's generation counter: a firmware that is busy reads as ETIMEDOUT, and that is final.
_INTERFERENCE = frozenset((errno.EBUSY, errno.EWOULDBLOCK, errno.ENOENT, errno.EEXIST, errno.ENOMEM))


class _Tsm(ABC):
    """What SNP and TDX share.

    Attributes:
        again: errnos after which the request is made again, from the start.
        patience: how often it is.
        key_lost: errnos with which the kernel gives up the key to the firmware, or says that it has.
    """

    tee: Tee
    again: ClassVar[frozenset[int]]
    patience: ClassVar[Patience]
    key_lost: ClassVar[frozenset[int]] = frozenset()
    interface = _CONFIGFS_TSM

    def __init__(self, root: Path = REPORT_ROOT, patience: Patience | None = None) -> None:
        """Prove, without a request to the firmware, that the interface is there and that its provider is this TEE's.

        Args:
            root: the folder in which requests are made.
            patience: another than the TEE's own.

        Raises:
            NoAttesterError: no configfs-tsm, no provider, or another TEE's.
            DeviceError: the kernel refused for another reason, usually because we are not root.
        """
        self._patience = patience or self.patience
        self._root = root
        with self._entry():
            pass

    def collect(self, report_data: ReportData) -> Evidence:
        """Fresh Evidence over `report_data` (64 bytes), each request in a new directory.

        Raises:
            NoAttesterError: the provider has gone since this object was made.
            DeviceUnavailableError: asked as often as allowed, and there was always an errno of `again`.
            AttestationKeyLostError: an errno of `key_lost`.
            DeviceError: the kernel or the firmware refused; final.
            MalformedEvidenceError: what came back does not parse.
            EvidenceBindingError: it carries other data than `report_data`.
        """
        assert len(report_data) == REPORT_DATA_BYTES
        return self._patience.ask(lambda: self._collect(report_data))

    @abstractmethod
    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""

    @abstractmethod
    def _collect(self, report_data: ReportData) -> Evidence:
        """One request."""

    @contextmanager
    def _entry(self) -> Iterator[Path]:
        """A directory of our own for one request, whose provider is this TEE's."""
        entry = self._root / f"keyturn-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            entry.mkdir()
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENXIO):  # no configfs-tsm; nobody behind it
                raise NoAttesterError(Ident(self.tee.value)) from exc
            raise self._refused("mkdir", exc) from exc
        try:
            provider = self._read(entry, "provider", MAX_TEXT_BYTES)
            # refusal: test_another_provider_or_none_is_no_attester test_another_provider_or_none_is_no_tdx_attester
            if provider != PROVIDERS[self.tee]:
                other = provider in PROVIDERS.values()
                raise NoAttesterError(Ident(self.tee.value), Absence.OTHER_TEE if other else Absence.NO_INTERFACE)
            yield entry
        finally:
            # The attributes go with it and cannot be unlinked. What stays, should it stay, is a report: nothing secret.
            with suppress(OSError):
                entry.rmdir()

    def _check_generation(self, entry: Path, expected: int) -> None:
        """The blobs belong to our writes and to nobody else's. The code is the kernel's own for an answer that is stale."""
        # refusal: test_a_report_after_somebody_elses_write_is_not_taken
        if self._read_number(entry, "generation") != expected:
            raise DeviceUnavailableError(_CONFIGFS_TSM, Ident("generation"), errno.EWOULDBLOCK)

    def _read(self, entry: Path, name: str, max_bytes: int) -> bytes:
        """The attribute to its end, but at most one byte more than `max_bytes`, which then no parser takes."""
        data = b""
        with self._opened(entry, name, os.O_RDONLY) as descriptor:
            while len(data) <= max_bytes and (chunk := os.read(descriptor, max_bytes + 1 - len(data))):
                data += chunk
        return data

    def _read_number(self, entry: Path, name: str) -> int:
        text = self._read(entry, name, MAX_TEXT_BYTES)
        if not re.fullmatch(rb"[0-9]{1,20}\n", text):
            form = EvidenceFormat.SNP_REPORT if self.tee is Tee.SNP else EvidenceFormat.TDX_QUOTE
            raise MalformedEvidenceError(form, Ident(name))
        return int(text)

    def _write(self, entry: Path, name: str, value: bytes) -> None:
        """One open, one write, one close: what the kernel takes as one value."""
        with self._opened(entry, name, os.O_WRONLY) as descriptor:
            os.write(descriptor, value)

    @contextmanager
    def _opened(self, entry: Path, name: str, flags: int) -> Iterator[int]:
        # A descriptor and no file object: that one answers EWOULDBLOCK with None.
        try:
            descriptor = os.open(entry / name, flags | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise self._refused(name, exc) from exc

    def _refused(self, call: str, exc: OSError) -> DeviceError:
        code = exc.errno or 0
        kind = DeviceError
        if code in self.again:
            kind = DeviceUnavailableError
        elif code in self.key_lost and call in ("outblob", "auxblob"):  # nothing else asks the firmware
            kind = AttestationKeyLostError
        return kind(_CONFIGFS_TSM, Ident(call), code)


class TsmSnp(_Tsm):
    """The `Attester` of an SEV-SNP guest. Needs root."""

    tee = Tee.SNP
    again = _INTERFERENCE
    patience = SNP_PATIENCE
    key_lost = frozenset((errno.ENOTTY, errno.EBADMSG, errno.ETIMEDOUT, errno.EIO))

    def __init__(self, root: Path = REPORT_ROOT, patience: Patience | None = None, distance: Distance | None = None) -> None:
        """See `_Tsm`. `distance` keeps requests apart, by default on this machine's clock."""
        super().__init__(root, patience)
        self._distance = distance or Distance()

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`: of a report, which firmware and guest keep from the host on its way."""
        return parse_report(self.collect(NO_REPORT_DATA).report).host_data

    def _collect(self, report_data: ReportData) -> Evidence:
        if not self._distance.wait():
            raise DeviceError(_CONFIGFS_TSM, Ident("outblob"), errno.ECANCELED)
        try:
            return self._ask(report_data)
        finally:
            self._distance.begin()

    def _ask(self, report_data: ReportData) -> Evidence:
        with self._entry() as entry:
            # 1. Where the generation stands. Every accepted write adds 1.
            generation = self._read_number(entry, "generation")

            # 2. The privilege level, where 0 is below what this guest may ask for (it runs under an SVSM).
            floor = self._read_number(entry, "privlevel_floor")
            if floor:
                self._write(entry, "privlevel", b"%d" % floor)

            # 3. What the report must carry. The kernel takes it over at the close and loses the error if it does not: the
            #    report then fails with EINVAL.
            self._write(entry, "inblob", report_data)

            # 4. The report, which the firmware makes now, and what the host supplied with it.
            report = self._read(entry, "outblob", MAX_SNP_BLOB_BYTES)
            table = self._read(entry, "auxblob", MAX_SNP_BLOB_BYTES)
            self._check_generation(entry, generation + (2 if floor else 1))

        # 5. It is a report, and it carries our data.
        return snp_evidence(report, table, report_data)


class TsmTdx(_Tsm):
    """The `Attester` of a TDX guest. Needs root.

    Unlike SNP's firmware a quote service may be asked again: no answer of it costs the guest anything. EINTR needs no code:
    only a signal to this very thread brings it, Python repeats the read, and the quote still under way reads as EBUSY.
    """

    tee = Tee.TDX
    again = _INTERFERENCE | {errno.EIO, errno.ETIMEDOUT}
    patience = TDX_PATIENCE

    def __init__(
        self,
        root: Path = REPORT_ROOT,
        patience: Patience | None = None,
        device: Path = TDX_GUEST,
        ioctl: Ioctl = fcntl.ioctl,
    ) -> None:
        """See `_Tsm`. The device node, which the same driver makes, is asked for `launch_digest` alone."""
        super().__init__(root, patience)
        self._device = device
        self._ioctl = ioctl

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""
        return mr_config_id(self._device, self._ioctl, self._patience)

    def _collect(self, report_data: ReportData) -> Evidence:
        with self._entry() as entry:
            generation = self._read_number(entry, "generation")
            self._write(entry, "inblob", report_data)
            quote = self._read(entry, "outblob", MAX_QUOTE_BYTES)
            # Kernels before January 2026 answer a failure of the host, and a timeout, with an empty quote and no error.
            # refusal: test_an_empty_quote_is_a_failure_of_the_host
            if not quote:
                raise DeviceUnavailableError(_CONFIGFS_TSM, Ident("outblob"), errno.ENODATA)
            self._check_generation(entry, generation + 1)
        return tdx_evidence(quote, report_data)
