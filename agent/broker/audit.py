"""The broker's record of decisions: an append-only file, one JSON object a line, closed values only.

A decision counts once its line is written: the service answers after `AuditLog.append` has returned.
"""

import dataclasses
import enum
import json
import os
import stat
import threading
from datetime import datetime
from pathlib import Path

from agent.closed import Ident
from agent.errors import BrokerFailureError

AUDIT_LOG = Ident("AUDIT_LOG")
"""The reason of the failure when a decision cannot be recorded."""
_FAILED_PRECONDITION = 9
"""gRPC status. Not UNAVAILABLE: a full disk does not empty itself, and every attempt costs the guest another collection of
Evidence."""


class AuditStep(enum.Enum):
    ATTEST = "attest"
    CREDENTIALS = "credentials"  # of the model's store
    RELEASE = "release"


class Decision(enum.Enum):
    ALLOWED = "allowed"
    RELAYED = "relayed"  # a Trustee behind us appraised, and its policy decides when the key is asked for
    DENIED = "denied"
    FAILED = "failed"  # the broker or the request failed before there was a decision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One decision. What was not verified when it was taken is None.

    Attributes:
        time: UTC, `2026-11-21T12:00:00.123Z` (`timestamp`).
        request_id, key_id: as the guest gave them; None for a request that could not be read. With step `credentials` it is
            their URI; the key that they go with stands in the line of the attestation.
        measurement, host_data: hexadecimal, out of a report whose signature was verified; of a TD its MRTD and MRCONFIGID. A
            relay has them from the token of the Trustee behind it.
        chip_id_hash: SHA-256 of the chip id or of a TDX platform's PPID, hexadecimal: tells machines apart without naming them.
        reason: the denial reason, or the reason of the failure.
        nonce: of the attestation, hexadecimal, spent when this is written. The token carries it, so it joins a release,
            which any replica may serve, to the attestation it rests on.
        claim, reference_value_id: the first failing claim and the value it was held against.
        simulated: the evidence was signed by simulated silicon.
    """

    time: Ident
    step: AuditStep
    decision: Decision
    request_id: Ident | None
    key_id: Ident | None
    policy_version: Ident
    release_channel: Ident | None = None
    tee: Ident | None = None
    measurement: Ident | None = None
    host_data: Ident | None = None
    chip_id_hash: Ident | None = None
    reference_value_ids: tuple[Ident, ...] = ()
    reason: Ident | None = None
    claim: Ident | None = None
    reference_value_id: Ident | None = None
    key_version: int | None = None
    nonce: Ident | None = None
    simulated: bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None and not isinstance(item, (bool, int, enum.Enum, Ident)):
                    raise TypeError(f"AuditRecord.{field.name} is not a closed value")

    def line(self) -> bytes:
        """The record as one line of JSON, ASCII, with its line feed."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(record, separators=(",", ":"), default=_enum_value).encode("ascii") + b"\n"


class AuditLog:
    """The file. Created with mode 0600 and only ever appended to; one write per line, so that writers do not mix."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be opened for appending."""
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = self._open()
        self._torn = False

    def append(self, record: AuditRecord) -> None:
        """Write one line and wait until it is on disk.

        Raises:
            BrokerFailureError: the line is not there (AUDIT_LOG); the caller must not act on the decision.
        """
        with self._lock:
            # After a short write the broken line is ended first, so that it cannot swallow this one.
            line = b"\n" * self._torn + record.line()
            try:
                written = os.write(self._descriptor, line)
                self._torn = written != len(line)
                if stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # a pipe to a collector has no disk
                    os.fdatasync(self._descriptor)
            except OSError as error:
                raise BrokerFailureError(_FAILED_PRECONDITION, AUDIT_LOG) from error
            if self._torn:
                raise BrokerFailureError(_FAILED_PRECONDITION, AUDIT_LOG)

    def reopen(self) -> None:
        """Open the path again, after it was rotated away. Raises OSError; the old file then stays in use."""
        with self._lock:
            old, self._descriptor = self._descriptor, self._open()
            os.close(old)

    def close(self) -> None:
        """Close the file; appending afterwards is an error."""
        os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def timestamp(now: datetime) -> Ident:
    """An aware time as RFC 3339 in UTC with milliseconds."""
    return Ident(now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z")


def _enum_value(item: object) -> object:
    assert isinstance(item, enum.Enum)
    return item.value
