"""The event log: exact inverse, every recorded log, replay to the RTMRs of the quote beside it."""

import dataclasses
import hashlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence.ccel import (
    AA_TAG,
    EV_NO_ACTION,
    MAX_LOG_BYTES,
    SHA384,
    Event,
    EventLog,
    RuntimeEvent,
    SpecId,
    pack_event,
    pack_event_log,
    pack_runtime_event,
    parse_event_log,
    parse_runtime_event,
    replay,
)
from agent.evidence.tdx_abi import parse_quote, parse_tdreport
from tests.shared import shared_data

SPEC_ID = SpecId(1, 0, (0, 2, 0), 2, ((SHA384, 48),), b"vendor")
EVENT = Event(1, 0x80000001, ((SHA384, b"\x11" * 48),), b"data")
LOG = EventLog(SPEC_ID, (EVENT, Event(4, 6, ((SHA384, b"\x22" * 48),), b"")))
FIRST_EVENT = 32 + 28 + 4 + 1 + 6
"""Where the first event begins in the packed LOG."""


def recorded() -> dict[str, tuple[dict[str, object], bytes]]:
    rows = json.loads(shared_data("tdx/index.json").read_text())
    return {row["name"]: (row, shared_data(f"tdx/{row['ccel']}").read_bytes()) for row in rows if "ccel" in row}


def test_a_log_is_what_was_packed() -> None:
    both = EventLog(
        dataclasses.replace(SPEC_ID, algorithms=((0x0B, 32), (SHA384, 48))),
        (Event(0, EV_NO_ACTION, ((SHA384, bytes(48)), (0x0B, bytes(32))), b"\xff\0"),),
    )
    for log in (LOG, both, EventLog(SPEC_ID, ())):
        assert parse_event_log(pack_event_log(log)) == log


def test_every_recorded_log_round_trips_and_replays() -> None:
    for name, (row, data) in recorded().items():
        log = parse_event_log(data)
        assert len(log.events) == row["events"], name
        packed = pack_event_log(log)
        assert len(packed) == row["log_bytes"], name
        assert data.startswith(packed), name
        assert [rtmr.hex() for rtmr in replay(log)] == row["replayed_rtmr"], name
        against = row["verified"]["against"] if isinstance(row.get("verified"), dict) else None  # type: ignore[index]
        if against is not None:
            report = shared_data(f"tdx/{against}").read_bytes()
            td = parse_tdreport(report).body if against.startswith("tdreport") else parse_quote(report).body
            assert replay(log) == td.rtmrs, name


def test_trustees_recorded_logs_parse_too() -> None:
    folder = shared_data("trustee/trustee/deps/eventlog/test_data")
    for name in ("CCEL_data_grub", "CCEL_data_ovmf", "CCEL_AAEL_alibabacloud"):
        data = (folder / name).read_bytes()
        assert data.startswith(pack_event_log(parse_event_log(data)))


@pytest.mark.parametrize(
    "padding",
    [b"\xff" * 8, b"\xff" * 5000, bytes(8), bytes(5000), b"\xff", b"\0", b"\xff" * 8 + bytes(5000), bytes(3) + b"\xff" * 8],
)
def test_padding_ends_a_log(padding: bytes) -> None:
    assert parse_event_log(pack_event_log(LOG) + padding) == LOG


@pytest.mark.parametrize("padding", [bytes(20) + b"\1", b"\xff" * 4 + b"text", b"\1"])
def test_padding_of_another_kind_is_no_event(padding: bytes) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_event_log(pack_event_log(LOG) + padding)


def test_data_that_looks_like_padding_belongs_to_its_event() -> None:
    log = EventLog(SPEC_ID, (dataclasses.replace(EVENT, data=b"\xff" * 100), dataclasses.replace(EVENT, data=bytes(100))))
    for padding in (b"", b"\xff" * 8, bytes(8)):
        assert parse_event_log(pack_event_log(log) + padding) == log


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (0, struct.pack("<I", 5), "mr_index"),
        (4, struct.pack("<I", 4), "spec_id_type"),
        (8, b"\1", "spec_id_digest"),
        (28, struct.pack("<I", 0xFFFFFFFF), "spec_id"),
        (28, struct.pack("<I", 38), "vendor_info"),
        (28, struct.pack("<I", 40), "spec_id_size"),
        (32, b"X", "spec_id_signature"),
        (53, b"\1", "spec_version"),
        (55, b"\3", "uintn_size"),
        (56, struct.pack("<I", 0), "algorithm_count"),
        (56, struct.pack("<I", 0xFFFFFFFF), "algorithm_count"),
        (60, struct.pack("<H", 0x99), "algorithms"),
        (62, struct.pack("<H", 47), "algorithms"),
        (FIRST_EVENT, struct.pack("<I", 5), "mr_index"),
        (FIRST_EVENT + 8, struct.pack("<I", 0), "digest_count"),
        (FIRST_EVENT + 8, struct.pack("<I", 0xFFFFFFFF), "digest_count"),
        (FIRST_EVENT + 12, struct.pack("<H", 0x0B), "digest_algorithm"),
        (FIRST_EVENT + 62, struct.pack("<I", 0xFFFFFFFF), "event_data"),
    ],
)
def test_what_is_wrong_in_a_log_is_named(offset: int, value: bytes, field: str) -> None:
    data = bytearray(pack_event_log(LOG))
    data[offset : offset + len(value)] = value
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_event_log(bytes(data))
    assert (refused.value.format, refused.value.field) == (EvidenceFormat.EVENT_LOG, field)


def test_a_log_cut_short_is_refused_but_at_the_end_of_an_event() -> None:
    data = pack_event_log(LOG)
    ends = {FIRST_EVENT, FIRST_EVENT + 12 + 50 + 4 + 4}
    for size in range(len(data)):
        if size in ends:
            assert len(parse_event_log(data[:size]).events) < 2
        else:
            with pytest.raises(MalformedEvidenceError):
                parse_event_log(data[:size])


def test_a_log_that_is_too_long_is_refused() -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_event_log(pack_event_log(LOG).ljust(MAX_LOG_BYTES + 1, b"\xff"))
    assert refused.value.field == "length"


@pytest.mark.parametrize(
    "log",
    [
        EventLog(dataclasses.replace(SPEC_ID, platform_class=1 << 32), ()),
        EventLog(dataclasses.replace(SPEC_ID, algorithms=((SHA384, 32),)), ()),
        EventLog(SPEC_ID, (dataclasses.replace(EVENT, mr_index=5),)),
        EventLog(SPEC_ID, (dataclasses.replace(EVENT, event_type=1 << 32),)),
        EventLog(SPEC_ID, (dataclasses.replace(EVENT, digests=((SHA384, bytes(47)),)),)),
        EventLog(SPEC_ID, (dataclasses.replace(EVENT, digests=((SHA384, bytes(48) + bytes(4)),), data=b""),)),
    ],
)
def test_fields_that_do_not_fit_cannot_be_packed(log: EventLog) -> None:
    with pytest.raises((ValueError, MalformedEvidenceError)):
        pack_event_log(log)


def test_events_that_are_not_measured_do_not_change_the_replay() -> None:
    log = EventLog(SPEC_ID, (dataclasses.replace(EVENT, event_type=EV_NO_ACTION), dataclasses.replace(EVENT, mr_index=0)))
    assert replay(log) == (bytes(48),) * 4


def test_an_event_with_two_digests_of_one_algorithm_is_refused() -> None:
    """One of them would be replayed, and another reader could believe the other."""
    spec_id = dataclasses.replace(SPEC_ID, algorithms=((0x0B, 32), (SHA384, 48)))
    event = Event(2, 4, ((SHA384, bytes(48)), (SHA384, b"\1" * 48)), b"")
    data = pack_event_log(EventLog(spec_id, ())) + pack_event(event)
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_event_log(data)
    assert refused.value.field == "digest_algorithm"


def test_a_measured_event_without_the_registers_algorithm_cannot_be_replayed() -> None:
    spec_id = dataclasses.replace(SPEC_ID, algorithms=((0x0B, 32), (SHA384, 48)))
    log = EventLog(spec_id, (Event(2, 4, ((0x0B, bytes(32)),), b""),))
    with pytest.raises(MalformedEvidenceError):
        replay(parse_event_log(pack_event_log(log)))


# --- events of the attestation agent ----------------------------------------------------------------------------------

ENTRY = RuntimeEvent("domain", "operation", "content")


def test_a_runtime_event_has_the_digest_that_coco_gives_it() -> None:
    event = pack_runtime_event(ENTRY, rtmr=3)
    assert (event.mr_index, event.event_type) == (4, 6)
    assert event.data.startswith(b"LEAA")
    assert event.digests[0][1].hex() == (
        "dad5f0e226318ffa9839b75a472c6aa7fdb5834949d0a0a22990cf04d5692440fb00f3aa0609db7e49cd8d793f670d02"
    )


def test_runtime_events_are_read_back_and_others_are_none() -> None:
    for entry in (ENTRY, RuntimeEvent("coco.com", "PullImage", '{"image": "a b"}'), RuntimeEvent("d", "o", "")):
        assert parse_runtime_event(pack_runtime_event(entry, 3)) == entry
    assert parse_runtime_event(EVENT) is None
    assert parse_runtime_event(dataclasses.replace(EVENT, event_type=6, data=b"LEAB" + bytes(4))) is None


def test_the_recorded_runtime_events_are_found() -> None:
    _, data = recorded()["ccel-alibaba-aael"]
    found = [entry for event in parse_event_log(data).events if (entry := parse_runtime_event(event))]
    assert found[0] == RuntimeEvent("coco.com", "some-operation", "some-content")
    assert len(found) == 2


@pytest.mark.parametrize(
    "entry", [RuntimeEvent("a b", "o", "c"), RuntimeEvent("", "o", "c"), RuntimeEvent("d", "o", "line\nline")]
)
def test_a_text_without_the_form_is_no_runtime_event(entry: RuntimeEvent) -> None:
    with pytest.raises(ValueError):
        pack_runtime_event(entry, 3)


@pytest.mark.parametrize("change", [b"\xff", b"\1"])
def test_a_runtime_event_that_is_not_what_was_measured_is_refused(change: bytes) -> None:
    event = pack_runtime_event(ENTRY, 3)
    for at in (4, 10):  # size, text
        with pytest.raises(MalformedEvidenceError):
            parse_runtime_event(dataclasses.replace(event, data=event.data[:at] + change + event.data[at + 1 :]))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<II", AA_TAG, 4) + b"d o c",
        struct.pack("<II", AA_TAG, 6) + b"d o c",
        struct.pack("<II", AA_TAG, 5) + b"d o \xff",
        struct.pack("<II", AA_TAG, 3) + b"d o",
        struct.pack("<II", AA_TAG, 4) + b" o c",
    ],
)
def test_a_runtime_event_without_the_form_is_refused_though_it_was_measured(data: bytes) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_runtime_event(Event(4, 6, ((SHA384, hashlib.sha384(data).digest()),), data))


# --- anything at all --------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=6), st.binary(max_size=20))
def test_whatever_is_accepted_packs_to_the_same_bytes(changes: list[tuple[int, int]], more: bytes) -> None:
    data = bytearray(pack_event_log(LOG)) + more
    for position, value in changes:
        data[min(position, len(data) - 1)] = value
    try:
        packed = pack_event_log(parse_event_log(bytes(data)))
    except MalformedEvidenceError:
        return
    assert data.startswith(packed)
    assert set(data[len(packed) :]) <= {0, 0xFF}
