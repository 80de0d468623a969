"""The confidential-computing event log (ACPI table CCEL): what was measured into a TD's RTMRs, and their replay.

Owns the layout, the entries that CoCo's attestation agent appends at run time, and the replay. Does not say what an event
means: its digest is believed only when the replayed RTMRs equal those of a verified quote, and its data never, unless the
digest is known to be the data's.

Spec: TCG "PC Client Platform Firmware Profile" 1.05, 10 (crypto-agile log); UEFI 2.10, 38 (CC event log: the index is 0 for
MRTD, 1 to 4 for RTMR 0 to 3); CoCo guest-components, "AA event log" since 0.15.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError

MAX_LOG_BYTES = 4 << 20
"""Firmware reserves 64 KiB to 1 MiB."""
RTMR_COUNT = 4
SHA384 = 0x0C
EV_NO_ACTION = 3
"""Says something and is not measured."""
EV_EVENT_TAG = 6
AA_TAG = 0x4141454C
"""Tag of an entry by CoCo's attestation agent."""
DOMAIN = "keyturn"
OPERATION = "release-key"
"""The two name the event of ours: `runtime.release_event`."""
_DIGEST_BYTES = {0x04: 20, 0x0B: 32, SHA384: 48, 0x0D: 64, 0x12: 32}  # SHA-1, SHA-256, SHA-384, SHA-512, SM3
_MAX_DIGESTS = len(_DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class SpecId:
    """The first event: how the log is written. Its `mr_index` means nothing; writers put 0 or 1.

    Attributes:
        spec_version: minor, major, errata.
        uintn_size: 1 for 32-bit and 2 for 64-bit firmware.
        algorithms: TCG number and size in bytes of each digest.
        vendor_info: at most 255 bytes.
    """

    mr_index: int
    platform_class: int
    spec_version: tuple[int, int, int]
    uintn_size: int
    algorithms: tuple[tuple[int, int], ...]
    vendor_info: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One entry.

    Attributes:
        mr_index: 0 for MRTD, 1 to 4 for RTMR 0 to 3.
        digests: TCG number of the algorithm and digest, in the log's order.
    """

    mr_index: int
    event_type: int
    digests: tuple[tuple[int, bytes], ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class EventLog:
    spec_id: SpecId
    events: tuple[Event, ...]


_FIRST = struct.Struct("<II20sI")  # the SHA-1 form of an event: index, type, digest, size of the data
_SPEC_ID = struct.Struct("<16sIBBBBI")
_SIGNATURE = b"Spec ID Event03\0"
_ALGORITHM = struct.Struct("<HH")
_EVENT = struct.Struct("<III")  # index, type, number of digests
_NUMBER = struct.Struct("<H")
_SIZE = struct.Struct("<I")
_TAG = struct.Struct("<II")  # tag, size of the data


def parse_event_log(data: bytes) -> EventLog:
    """The log in `data`.

    Args:
        data: at most 4 MiB, as the kernel gives it. It may end in padding of 0xFF and zeros: the firmware reserves more than
            it writes, and the attestation agent ends its log with eight bytes of 0xFF, wherever in the padding that is.

    Raises:
        MalformedEvidenceError: too long, or an entry that is not one; `field` names the part.
    """
    if len(data) > MAX_LOG_BYTES:
        raise _malformed("length", len(data), MAX_LOG_BYTES)
    padding_start = len(data.rstrip(b"\0\xff"))  # inside the last event, perhaps; no event is of these two alone
    reader = _Reader(data)
    spec_id = _parse_spec_id(reader)
    sizes = dict(spec_id.algorithms)
    events: list[Event] = []
    while reader.position < len(data) and reader.position < padding_start:
        events.append(_parse_event(reader, sizes))
    return EventLog(spec_id, tuple(events))


def pack_event_log(log: EventLog) -> bytes:
    """The bytes of `log` without padding; the inverse of `parse_event_log`.

    Raises:
        MalformedEvidenceError: a field has a value that no log can have.
        ValueError: the fields do not fit together or into their sizes.
    """
    spec = log.spec_id
    try:
        event = _SPEC_ID.pack(_SIGNATURE, spec.platform_class, *spec.spec_version, spec.uintn_size, len(spec.algorithms))
        event += b"".join(_ALGORITHM.pack(*algorithm) for algorithm in spec.algorithms)
        event += bytes((len(spec.vendor_info),)) + spec.vendor_info
        data = _FIRST.pack(spec.mr_index, EV_NO_ACTION, b"", len(event)) + event + b"".join(map(pack_event, log.events))
    except struct.error as exc:
        raise ValueError("a field does not fit") from exc
    if parse_event_log(data) != log:
        raise ValueError("the fields do not fit together")
    return data


def pack_event(event: Event) -> bytes:
    """One entry, as it stands in a log."""
    digests = b"".join(_NUMBER.pack(number) + digest for number, digest in event.digests)
    head = _EVENT.pack(event.mr_index, event.event_type, len(event.digests))
    return head + digests + _SIZE.pack(len(event.data)) + event.data


def join_event_log(firmware: bytes, entries: bytes) -> bytes:
    """A log without its padding, and `entries` after it, in the algorithms of its head.

    Args:
        firmware: as `parse_event_log` takes it.
        entries: of the running system, one after another, without a head; may be empty.

    Raises:
        MalformedEvidenceError: as `parse_event_log`, of either.
    """
    # Trimmed first: what follows padding is nothing.
    return pack_event_log(parse_event_log(pack_event_log(parse_event_log(firmware)) + entries))


def replay(log: EventLog) -> tuple[bytes, ...]:
    """RTMR 0 to 3 as the events make them, 48 bytes each.

    Raises:
        MalformedEvidenceError: an event is measured and has no SHA-384 digest.
    """
    rtmrs = [bytes(48)] * RTMR_COUNT
    for event in log.events:
        if event.event_type == EV_NO_ACTION or not event.mr_index:  # nothing extends MRTD after the launch
            continue
        digest = dict(event.digests).get(SHA384)
        if digest is None:
            raise _malformed("digest_sha384")
        rtmrs[event.mr_index - 1] = hashlib.sha384(rtmrs[event.mr_index - 1] + digest).digest()
    return tuple(rtmrs)


# --- events of the attestation agent ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuntimeEvent:
    """What CoCo's attestation agent measures at run time: `DOMAIN OPERATION CONTENT`.

    Attributes:
        domain: without a space.
        operation: without a space.
        content: without a line end.
    """

    domain: str
    operation: str
    content: str


def parse_runtime_event(event: Event) -> RuntimeEvent | None:
    """The text of an attestation agent's entry, None for any other entry.

    Raises:
        MalformedEvidenceError: the entry carries the agent's tag and not its form, or its digest is not that of its data.
    """
    if event.event_type != EV_EVENT_TAG or len(event.data) < _TAG.size:
        return None
    tag, size = _TAG.unpack_from(event.data)
    if tag != AA_TAG:
        return None
    text = event.data[_TAG.size :]
    if size != len(text):
        raise _malformed("tag_size", size, len(text))
    if dict(event.digests).get(SHA384) != hashlib.sha384(event.data).digest():
        raise _malformed("digest_sha384")
    try:
        domain, operation, content = text.decode().split(" ", 2)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise _malformed("runtime_event") from exc
    if not (domain and operation) or "\n" in domain + operation + content:
        raise _malformed("runtime_event")
    return RuntimeEvent(domain, operation, content)


def pack_runtime_event(entry: RuntimeEvent, rtmr: int) -> Event:
    """The entry for the log; its SHA-384 digest, over tag, size and text, is what extends the RTMR.

    Args:
        entry: the text.
        rtmr: 0 to 3. CoCo's default is 3.

    Raises:
        ValueError: the text does not have the form.
    """
    text = f"{entry.domain} {entry.operation} {entry.content}".encode()
    data = _TAG.pack(AA_TAG, len(text)) + text
    event = Event(rtmr + 1, EV_EVENT_TAG, ((SHA384, hashlib.sha384(data).digest()),), data)
    try:
        if parse_runtime_event(event) == entry:
            return event
    except MalformedEvidenceError as exc:
        raise ValueError("not a runtime event") from exc
    raise ValueError("not a runtime event")


# --- reading and writing ----------------------------------------------------------------------------------------------


class _Reader:
    """A position in bytes that never passes their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, field: str, size: int) -> bytes:
        left = len(self._data) - self.position
        if size > left:
            raise _malformed(field, left, size)
        self.position += size
        return self._data[self.position - size : self.position]

    def unpack(self, field: str, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(field, layout.size))


def _parse_spec_id(log: _Reader) -> SpecId:
    mr_index, event_type, digest, size = log.unpack("spec_id_event", _FIRST)
    if event_type != EV_NO_ACTION:
        raise _malformed("spec_id_type", event_type, EV_NO_ACTION)
    if any(digest):
        raise _malformed("spec_id_digest")
    if mr_index > RTMR_COUNT:
        raise _malformed("mr_index", mr_index)
    reader = _Reader(log.take("spec_id", size))
    signature, platform_class, minor, major, errata, uintn_size, count = reader.unpack("spec_id", _SPEC_ID)
    if signature != _SIGNATURE:
        raise _malformed("spec_id_signature")
    if (minor, major) != (0, 2):
        raise _malformed("spec_version", major << 8 | minor, 2 << 8)
    if uintn_size not in (1, 2):
        raise _malformed("uintn_size", uintn_size)
    if not 1 <= count <= _MAX_DIGESTS:
        raise _malformed("algorithm_count", count)
    algorithms = tuple(reader.unpack("algorithms", _ALGORITHM) for _ in range(count))
    if len(dict(algorithms)) != count or any(_DIGEST_BYTES.get(number) != length for number, length in algorithms):
        raise _malformed("algorithms")
    vendor_info = reader.take("vendor_info", reader.take("vendor_info_size", 1)[0])
    if reader.position != size:
        raise _malformed("spec_id_size", size, reader.position)
    return SpecId(mr_index, platform_class, (minor, major, errata), uintn_size, algorithms, vendor_info)


def _parse_event(log: _Reader, sizes: dict[int, int]) -> Event:
    mr_index, event_type, count = log.unpack("event", _EVENT)
    if mr_index > RTMR_COUNT:
        raise _malformed("mr_index", mr_index)
    if not 1 <= count <= len(sizes):
        raise _malformed("digest_count", count)
    digests: list[tuple[int, bytes]] = []
    for _ in range(count):
        (number,) = log.unpack("digest_algorithm", _NUMBER)
        if number not in sizes or number in dict(digests):
            raise _malformed("digest_algorithm", number)
        digests.append((number, log.take("digest", sizes[number])))
    (size,) = log.unpack("event_size", _SIZE)
    return Event(mr_index, event_type, tuple(digests), log.take("event_data", size))


def _malformed(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.EVENT_LOG, Ident(field), got, expected)
