"""What this guest measures while it runs, and the event log that explains its RTMRs.

Owns the one event of a boot, the log of such events beside the register, and the whole log as evidence: the firmware's
(ACPI table CCEL), then the events of the running system. Where CoCo's attestation agent keeps a log of its own, that one
explains the register, and nothing is measured by us.

The log of events lies in guest memory, in the form of the attestation agent's: entries one after another, without a head.
An event goes into the file `pending` first, with the value that the register will have; then into the register; then into
the log. Whoever finds `pending` can tell by the register whether the event happened.

Source: CoCo guest-components, attestation-agent `eventlog` since 0.15; UEFI 2.10, 38 (CC event log).
"""

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Protocol

import rfc8785

from agent.closed import Ident
from agent.errors import Absence, DeviceError, EvidenceFormat, MalformedEvidenceError, NoAttesterError
from agent.evidence import CompositeEvidence, RuntimeRegister, Tee, Unsupported
from agent.evidence.ccel import (
    DOMAIN,
    MAX_LOG_BYTES,
    OPERATION,
    SHA384,
    RuntimeEvent,
    join_event_log,
    pack_event,
    pack_runtime_event,
)
from agent.evidence.rtmr import DIGEST_BYTES, INTERFACE, Rtmr
from agent.guest.api_server import ApiServer, Measured
from agent.handshake import MAX_EVENT_LOG_BYTES, KeptKey, SealedKey, Verdict

FIRMWARE_LOG = Path("/sys/firmware/acpi/tables/data/CCEL")
FOREIGN_LOG = Path("/run/attestation-agent/eventlog")
FOLDER = Path("/run/keyturn")
LOG_FILE = "eventlog"
PENDING_FILE = "eventlog.pending"

_RTMR = 3
_LOG = Ident("event-log")
_ONLY_MEASURE = object()


@dataclass(frozen=True, slots=True)
class MeasuredRelease:
    """Proof that the release of a key was measured, or that this guest cannot; only `measure` makes one.

    Attributes:
        rtmr_3: the register afterwards, 48 bytes; None where nothing was measured, or by somebody who does not tell.
        unsupported: why nothing was.
    """

    rtmr_3: bytes | None
    unsupported: Unsupported | None
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        # refusal: test_nobody_else_makes_a_measured_release
        if made_by is not _ONLY_MEASURE:
            raise RuntimeError("only measure() makes a MeasuredRelease")


class Runtime(Protocol):
    """What a guest measures while it runs, and the log of it. Blocking."""

    def unsupported(self) -> Unsupported | None:
        """Why a release cannot be measured here; None: it can, as far as is known before it is tried. Raises AgentError."""

    def require(self) -> None:
        """A release must be measured here.

        Raises:
            NoAttesterError: it cannot be.
            AgentError: as `unsupported`.
        """

    def measure(self, event: RuntimeEvent) -> MeasuredRelease:
        """Extend the register by `event`, and log it. There is no way back before the next start of the guest.

        Raises:
            AgentError: it was not done, for none of the reasons of `Unsupported`.
        """

    def event_log(self) -> bytes:
        """The whole log without padding, at most 256 KiB; empty where it comes with the evidence, or there is none.

        Raises:
            AgentError: it cannot be read.
        """


def release_event(
    verdict: Verdict,
    sealed: SealedKey | KeptKey,
    evidence: CompositeEvidence | None,
    manifest_digest: str,
    server_command_digest: str,
    statement_digest: bytes,
) -> RuntimeEvent:
    """What is measured between the release of the key and its opening: which key, for what, on which evidence.

    The content is canonical JSON (RFC 8785) of identifiers and digests: nothing in it is secret. `evidence_digest` is over the
    quote or report, which covers the rest of the evidence; so no two boots measure the same. Where the guest's own components
    attested, `token_digest` is over what came of it. `statement_digest` is of the receipt's statement, 48 bytes.
    """
    if evidence is None:
        proof, digested = "token_digest", verdict.token.encode()
    else:
        proof, digested = "evidence_digest", evidence.primary.report
    content: dict[str, str | int] = {
        proof: f"sha384:{hashlib.sha384(digested).hexdigest()}",
        "key_id": sealed.key_id,
        "key_uri": verdict.claims.key_uri,
        "key_version": sealed.key_version,
        "manifest_digest": manifest_digest,
        "policy_version": verdict.claims.policy_version,
        "server_command_digest": server_command_digest,
        "statement_digest": f"sha384:{statement_digest.hex()}",
    }
    return RuntimeEvent(DOMAIN, OPERATION, rfc8785.dumps(content).decode())


class NoRegister:
    """Of an SEV-SNP guest: a `RuntimeRegister` that is not there."""

    def read(self) -> Unsupported:
        return Unsupported.NO_REGISTER

    def extend(self, digest: bytes) -> None:
        raise RuntimeError("there is no register to extend")


class RuntimeMeasurement:
    """Register and log of this guest. Blocking.

    Args:
        register: what is extended.
        firmware_log: the table as the kernel gives it.
        folder: where our part of the log lies, in guest memory; made when it is needed.
        foreign_log: the attestation agent's part, where one runs.
    """

    def __init__(
        self,
        register: RuntimeRegister,
        *,
        firmware_log: Path = FIRMWARE_LOG,
        folder: Path = FOLDER,
        foreign_log: Path = FOREIGN_LOG,
    ) -> None:
        self._register = register
        self._firmware_log = firmware_log
        self._folder = folder
        self._foreign_log = foreign_log

    @classmethod
    def of(cls, tee: Tee) -> "RuntimeMeasurement":
        """This guest's."""
        return cls(Rtmr() if tee is Tee.TDX else NoRegister())

    def unsupported(self) -> Unsupported | None:
        """Why a release cannot be measured here; None: it can. Raises DeviceError."""
        state = self._state()
        return state if isinstance(state, Unsupported) else None

    def require(self) -> None:
        """Can a release be measured here?

        Raises:
            NoAttesterError: no.
            DeviceError: the kernel refused.
        """
        # refusal: test_a_guest_that_must_measure_and_cannot_is_told_before_anything_is_asked_for
        if self.unsupported():
            raise NoAttesterError(INTERFACE, Absence.NO_RUNTIME_REGISTER)

    def measure(self, event: RuntimeEvent) -> MeasuredRelease:
        """Extend the register by `event`, and log it. There is no way back before the next start of the guest.

        Raises:
            DeviceError: the kernel refused, the register does not have the value that the event makes of it, or the log
                cannot be written.
        """
        before = self._state()
        if isinstance(before, Unsupported):
            return MeasuredRelease(None, before, made_by=_ONLY_MEASURE)
        entry = pack_runtime_event(event, _RTMR)
        digest = dict(entry.digests)[SHA384]
        expected = hashlib.sha384(before + digest).digest()
        entries = self._entries(before)
        self._write(LOG_FILE, entries)
        self._write(PENDING_FILE, expected + pack_event(entry))
        self._register.extend(digest)
        # refusal: test_an_extension_that_is_lost_is_found
        if self._register.read() != expected:
            raise DeviceError(INTERFACE, Ident("read-back"), errno.EIO)
        self._write(LOG_FILE, entries + pack_event(entry))
        with suppress(OSError):  # the log ends with it by now, which says as much
            (self._folder / PENDING_FILE).unlink()
        return MeasuredRelease(expected, None, made_by=_ONLY_MEASURE)

    def event_log(self) -> bytes:
        """The whole log without padding, at most 256 KiB; empty where the firmware left none, or not for us to read.

        Empty of an SEV-SNP guest too, whose report has no registers that a log could explain.

        Raises:
            MalformedEvidenceError: a log that is none, or longer.
            DeviceError: it cannot be read.
        """
        state = self._state()
        firmware = b"" if state is Unsupported.NO_REGISTER else self._read(self._firmware_log, MAX_LOG_BYTES)
        if not firmware:
            return b""
        entries = self._read(self._foreign_log, MAX_EVENT_LOG_BYTES) or self._entries(state)
        log = join_event_log(firmware, entries)
        # refusal: test_a_log_that_is_too_long_or_none_is_malformed
        if len(log) > MAX_EVENT_LOG_BYTES:
            raise MalformedEvidenceError(EvidenceFormat.EVENT_LOG, Ident("length"), len(log), MAX_EVENT_LOG_BYTES)
        return log

    def _state(self) -> bytes | Unsupported:
        value = self._register.read()
        if isinstance(value, bytes) and os.path.exists(self._foreign_log):
            return Unsupported.FOREIGN_LOG
        return value

    def _entries(self, value: bytes | Unsupported) -> bytes:
        """Our part of the log; with the pending event if it made the register what it is, and is not there yet."""
        entries = self._read(self._folder / LOG_FILE, MAX_EVENT_LOG_BYTES)
        pending = self._read(self._folder / PENDING_FILE, MAX_EVENT_LOG_BYTES)
        if pending and pending[:DIGEST_BYTES] == value and not entries.endswith(pending[DIGEST_BYTES:]):
            entries += pending[DIGEST_BYTES:]
        return entries

    def _read(self, path: Path, max_bytes: int) -> bytes:
        """At most one byte more than `max_bytes`, which then no parser takes; nothing where the file is not for us."""
        try:
            with path.open("rb") as file:
                return file.read(max_bytes + 1)
        except (FileNotFoundError, PermissionError):
            return b""
        except OSError as exc:
            raise DeviceError(_LOG, Ident("read"), exc.errno or 0) from exc

    def _write(self, name: str, data: bytes) -> None:
        """As one step: a reader sees the old content or the new one."""
        path = self._folder / name
        new = path.with_name(f"{name}.new")
        try:
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(new, flags, 0o600), "wb") as file:
                file.write(data)
            new.replace(path)
        except OSError as exc:
            raise DeviceError(_LOG, Ident("write"), exc.errno or 0) from exc


class ComponentsMeasurement:
    """The `Runtime` of a container in a CoCo guest: register and log are the attestation agent's, reached through its API.

    Its log comes with its evidence. Nothing is asked of it in a guest that is no TDX guest: on SEV-SNP its agent has no answer.
    """

    def __init__(self, api: ApiServer) -> None:
        """`api` is this guest's; it is asked when something is to be known."""
        self._api = api
        self._required = False

    def unsupported(self) -> Unsupported | None:
        """See `Runtime.unsupported`. Whether the log is enabled is not known before an event is written."""
        return None if self._api.info().tee == Tee.TDX.value else Unsupported.NO_REGISTER

    def require(self) -> None:
        """See `Runtime.require`; what is not known yet is an error of `measure`."""
        self._required = True
        self._check(self.unsupported())

    def measure(self, event: RuntimeEvent) -> MeasuredRelease:
        """See `Runtime.measure`."""
        unsupported = self.unsupported()
        if unsupported is None:
            match self._api.measure(event.domain, event.operation, event.content):
                case Measured.NOT_SUPPORTED:
                    unsupported = Unsupported.NO_REGISTER
                case Measured.NOT_ENABLED:
                    unsupported = Unsupported.NOT_ENABLED
        self._check(unsupported)
        return MeasuredRelease(None, unsupported, made_by=_ONLY_MEASURE)

    def event_log(self) -> bytes:
        """See `Runtime.event_log`."""
        return b""

    def _check(self, unsupported: Unsupported | None) -> None:
        # refusal: test_boot.py::test_a_container_that_must_measure_and_cannot_is_stopped
        if self._required and unsupported:
            raise NoAttesterError(INTERFACE, Absence.NO_RUNTIME_REGISTER)
