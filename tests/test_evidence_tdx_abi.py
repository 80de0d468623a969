"""TDX layouts: exact inverses, every reserved bit, every length, every recorded quote and report."""

import dataclasses
import json
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence.tdx_abi import (
    MAX_QUOTE_BYTES,
    TDREPORT_BYTES,
    QeReport,
    TdAttributes,
    TdBody,
    TdExtension,
    TdReport,
    TdxQuote,
    pack_quote,
    pack_tdreport,
    parse_quote,
    parse_tdreport,
    quote_length,
    signed_part,
)
from tests.shared import shared_data

BODY_1_5 = TdBody(
    tee_tcb_svn=b"\x01" * 16,
    mr_seam=b"\x02" * 48,
    mr_signer_seam=b"\x03" * 48,
    seam_attributes=4,
    td_attributes=TdAttributes(1 << 28),
    xfam=0x602E7,
    mr_td=b"\x05" * 48,
    mr_config_id=b"\x06" * 48,
    mr_owner=b"\x07" * 48,
    mr_owner_config=b"\x08" * 48,
    rtmr_0=b"\x10" * 48,
    rtmr_1=b"\x11" * 48,
    rtmr_2=b"\x12" * 48,
    rtmr_3=b"\x13" * 48,
    report_data=bytes(range(64)),
    tee_tcb_svn_2=b"\x14" * 16,
    mr_service_td=b"\x15" * 48,
)
BODY_EXTENDED = dataclasses.replace(
    BODY_1_5,
    extension=TdExtension(
        vm_id=1,
        td_id=b"\x51" * 32,
        device_info=b"\x52" * 48,
        init_service_td_hash=b"\x53" * 48,
        init_service_td_attributes=1 << 63 | 0x54,
        init_cpu_svn=b"\x55" * 16,
        init_tee_tcb_svn=b"\x56" * 16,
        init_tee_fmspc=b"\x57" * 12,
        service_td_hash=b"\x58" * 48,
        service_td_attributes=0x59,
    ),
)
BODY_1_0 = dataclasses.replace(BODY_1_5, tee_tcb_svn_2=None, mr_service_td=None)
QE = QeReport(b"\x21" * 16, 0x22, b"\x23" * 16, b"\x24" * 32, b"\x25" * 32, 0x26, 0x27, b"\x28" * 64)
V4 = TdxQuote(
    version=4,
    qe_svn=0,
    pce_svn=0,
    qe_vendor_id=b"\x31" * 16,
    user_data=b"\x32" * 20,
    body=BODY_1_0,
    signature=b"\x33" * 64,
    attestation_key=b"\x34" * 64,
    qe_report=QE,
    qe_report_signature=b"\x35" * 64,
    qe_auth_data=b"\x36" * 32,
    pck_chain=b"-----BEGIN\0",
)
V5 = dataclasses.replace(V4, version=5, body=BODY_1_5)
V5_OF_1_0 = dataclasses.replace(V4, version=5)
V5_EXTENDED = dataclasses.replace(V4, version=5, body=BODY_EXTENDED)
QUOTES = {"v4": V4, "v5": V5, "v5-of-1.0": V5_OF_1_0, "v5-extended": V5_EXTENDED}
BODY_BYTES = {"v4": 584, "v5": 648, "v5-of-1.0": 584, "v5-extended": 885}
REPORTS = {"v0": dataclasses.replace(BODY_1_5, mr_service_td=bytes(48)), "v1": BODY_1_5}


def tdreport(name: str) -> TdReport:
    return TdReport(int(name[1]), b"\x41" * 16, b"\x42" * 32, 0x301FF, REPORTS[name])


def recorded(kind: str) -> dict[str, tuple[dict[str, object], bytes]]:
    rows = json.loads(shared_data("tdx/index.json").read_text())
    return {row["name"]: (row, shared_data(f"tdx/{row[kind]}").read_bytes()) for row in rows if kind in row}


def refused_bits(data: bytes, parse: Callable[[bytes], object], pack: Callable[..., bytes]) -> set[int]:
    """Numbers (byte * 8 + bit) of the bits that cannot be flipped. What is accepted must survive the round trip."""
    refused = set()
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert pack(parse(bytes(changed))) == changed
        except MalformedEvidenceError:
            refused.add(bit)
    return refused


def every(start: int, size: int) -> set[int]:
    return set(range(start * 8, (start + size) * 8))


def reserved_attributes(start: int) -> set[int]:
    """Written down from Intel's table and not from our parser."""
    used = {0, 4, 5, 6, 16, 17, 27, 28, 29, 30, 31, 62, 63}
    return {start * 8 + bit for bit in range(64) if bit not in used}


# --- quote ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUOTES)
def test_a_flipped_bit_of_a_quote_is_refused_exactly_where_it_is_reserved_or_a_type_or_a_length(name: str) -> None:
    quote = QUOTES[name]
    data = pack_quote(quote)
    body = 48 if name == "v4" else 54
    end = body + BODY_BYTES[name]
    qe_report = end + 4 + 128 + 6
    fixed = every(0, 8)  # version, key type, TEE type
    fixed |= every(48, body - 48)  # body type and size
    fixed |= reserved_attributes(body + 120)
    fixed |= every(end, 4) | every(end + 132, 6)  # lengths and certification data type
    fixed |= every(qe_report + 20, 28) | every(qe_report + 96, 32) | every(qe_report + 160, 96) | every(qe_report + 260, 60)
    fixed |= every(qe_report + 448, 2) | every(qe_report + 450 + 32, 6)
    assert refused_bits(data, parse_quote, pack_quote) == fixed


@pytest.mark.parametrize("name", QUOTES)
def test_a_quote_is_what_was_packed(name: str) -> None:
    data = pack_quote(QUOTES[name])
    assert parse_quote(data) == QUOTES[name]
    assert quote_length(data) == len(data)
    assert data.startswith(signed_part(QUOTES[name]))


def test_every_recorded_quote_round_trips_and_has_the_recorded_values() -> None:
    names: dict[str, str] = {"tdattr": "td_attributes", "seamattr": "seam_attributes", "reportdata": "report_data"}
    names |= {"mrseam": "mr_seam", "mrsignerseam": "mr_signer_seam", "mrtd": "mr_td", "mrconfigid": "mr_config_id"}
    names |= {"mrowner": "mr_owner", "mrownerconfig": "mr_owner_config"} | {f"rtmr{n}": f"rtmr_{n}" for n in range(4)}
    for name, (row, data) in recorded("quote").items():
        quote = parse_quote(data, ignore_trailing=True)
        assert quote_length(data) == row["quote_end"], name
        assert pack_quote(quote) == data[: quote_length(data)], name
        assert quote.version == row["version"], name
        assert quote.body.td_attributes.debug is row["debug"], name
        assert (quote.body.tee_tcb_svn_2 is not None) is (row["body_type"] == 3), name
        fields = row["fields"]
        assert isinstance(fields, dict)
        for recorded_name, text in fields.items():
            value = getattr(quote.body, names.get(str(recorded_name), str(recorded_name)))
            assert (value.to_bytes(8, "little") if isinstance(value, int) else value).hex() == text, (name, recorded_name)


def test_recorded_padding_is_zeros_and_what_else_follows_is_refused_unless_asked_for() -> None:
    for name, (row, data) in recorded("quote").items():
        if row["trailing_all_zero"]:
            assert parse_quote(data) == parse_quote(data[: quote_length(data)]), name
        else:
            with pytest.raises(MalformedEvidenceError) as refused:
                parse_quote(data)
            assert refused.value.field == "trailing", name


@pytest.mark.parametrize("name", QUOTES)
def test_zeros_may_follow_a_quote_and_anything_else_only_when_the_caller_says_so(name: str) -> None:
    data = pack_quote(QUOTES[name])
    assert parse_quote(data + bytes(3000)) == QUOTES[name]
    assert quote_length(data + b"guest memory") == len(data)
    assert parse_quote(data + b"guest memory", ignore_trailing=True) == QUOTES[name]
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_quote(data + bytes(100) + b"\1")
    assert refused.value.field == "trailing"


@pytest.mark.parametrize("name", QUOTES)
def test_a_quote_cut_short_anywhere_is_refused(name: str) -> None:
    data = pack_quote(QUOTES[name])
    for size in range(len(data)):
        with pytest.raises(MalformedEvidenceError):
            parse_quote(data[:size])


def test_a_quote_larger_than_the_kernels_buffer_is_refused() -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_quote(pack_quote(V4).ljust(MAX_QUOTE_BYTES + 1, b"\0"))
    assert (refused.value.got, refused.value.expected) == (MAX_QUOTE_BYTES + 1, MAX_QUOTE_BYTES)


@pytest.mark.parametrize(
    ("quote", "offset", "value", "field"),
    [
        (V4, 0, struct.pack("<H", 3), "version"),
        (V4, 0, struct.pack("<H", 6), "version"),
        (V4, 2, struct.pack("<H", 3), "attestation_key_type"),
        (V4, 4, struct.pack("<I", 0), "tee_type"),
        (V5, 48, struct.pack("<H", 1), "body_type"),
        (V5, 48, struct.pack("<H", 5), "body_type"),
        (V5, 48, struct.pack("<H", 4), "body_size"),
        (V5_EXTENDED, 48, struct.pack("<H", 3), "body_size"),
        (V5, 48, struct.pack("<H", 2), "body_size"),
        (V5, 50, struct.pack("<I", 584), "body_size"),
        (V4, 632, struct.pack("<I", 0xFFFFFFFF), "signature_data"),
        (V4, 632, struct.pack("<I", 0), "trailing"),
        (V4, 764, struct.pack("<H", 5), "certification_type"),
        (V4, 766, struct.pack("<I", 0xFFFFFFFF), "certification_size"),
        (V4, 1218, struct.pack("<H", 0xFFFF), "qe_auth_data"),
        (V4, 1252, struct.pack("<H", 3), "qe_certification_type"),
        (V4, 1254, struct.pack("<I", 0), "qe_certification_size"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_quote_is_named(quote: TdxQuote, offset: int, value: bytes, field: str) -> None:
    data = bytearray(pack_quote(quote))
    data[offset : offset + len(value)] = value
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_quote(bytes(data))
    assert (refused.value.format, refused.value.field) == (EvidenceFormat.TDX_QUOTE, field)


@pytest.mark.parametrize("size", [0, 1, 31, 65535])
def test_authentication_data_may_have_any_length(size: int) -> None:
    quote = dataclasses.replace(V4, qe_auth_data=bytes(size))
    assert parse_quote(pack_quote(quote)) == quote


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"version": 4, "body": BODY_1_5},
        {"body": dataclasses.replace(BODY_1_0, mr_service_td=bytes(48))},
        {"body": dataclasses.replace(BODY_1_0, extension=BODY_EXTENDED.extension)},
        {"body": BODY_EXTENDED},
        {"body": dataclasses.replace(BODY_1_0, mr_td=bytes(47))},
        {"body": dataclasses.replace(BODY_1_0, td_attributes=TdAttributes(1 << 8))},
        {"signature": bytes(63)},
        {"attestation_key": bytes(65)},
        {"qe_auth_data": bytes(65536)},
        {"qe_svn": 1 << 16},
    ],
)
def test_fields_that_do_not_fit_cannot_be_packed(changes: dict[str, object]) -> None:
    with pytest.raises((ValueError, MalformedEvidenceError)):
        pack_quote(dataclasses.replace(V4, **changes))  # type: ignore[arg-type]


def test_attributes_are_readable_by_their_bits() -> None:
    attributes = TdAttributes(1 << 63 | 0xF << 28 | 1 << 17 | 1)
    assert (
        attributes.service_td_extensions
        and attributes.debug
        and attributes.sept_ve_disable
        and attributes.migratable
        and attributes.pks
    )
    assert attributes.key_locker and attributes.perfmon
    closed = TdAttributes(0)
    assert not closed.service_td_extensions
    assert not (closed.debug or closed.sept_ve_disable or closed.migratable or closed.pks)
    assert not (closed.key_locker or closed.perfmon or closed.under_debug)
    assert TdAttributes(1 << 5).under_debug and not TdAttributes(1 << 5).debug


@given(st.binary(max_size=2000))
def test_no_bytes_end_in_a_foreign_exception(data: bytes) -> None:
    for parse in (parse_quote, quote_length, parse_tdreport):
        with pytest.raises(MalformedEvidenceError):
            parse(data)


@settings(max_examples=300)
@given(st.sampled_from([*QUOTES.values()]), st.lists(st.tuples(st.integers(0, 1264), st.integers(0, 255)), max_size=6))
def test_whatever_is_accepted_packs_to_the_same_bytes(quote: TdxQuote, changes: list[tuple[int, int]]) -> None:
    data = bytearray(pack_quote(quote))
    for position, value in changes:
        data[position] = value
    try:
        parsed = parse_quote(bytes(data))
    except MalformedEvidenceError:
        return
    assert pack_quote(parsed) == data[: quote_length(bytes(data))]


# --- TDREPORT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPORTS)
def test_a_tdreport_is_what_was_packed(name: str) -> None:
    data = pack_tdreport(tdreport(name))
    assert len(data) == TDREPORT_BYTES
    assert parse_tdreport(data) == tdreport(name)


@pytest.mark.parametrize("name", REPORTS)
def test_a_flipped_bit_of_a_tdreport_is_refused_wherever_it_is_covered_by_a_digest_or_reserved(name: str) -> None:
    refused = refused_bits(pack_tdreport(tdreport(name)), parse_tdreport, pack_tdreport)
    free = every(16, 16) | every(128, 64) | every(224, 32)  # CPUSVN, report data, MAC: what no digest covers
    if name == "v0":
        free |= {2 * 8}  # version 1 may have no service TD either
    assert set(range(TDREPORT_BYTES * 8)) - refused == free


def test_every_recorded_tdreport_round_trips_and_is_that_of_its_quote() -> None:
    reports = {name: data for name, (_, data) in recorded("tdreport").items()}
    reports["azure"] = shared_data("tdx/azure/hcl-report-tdx.bin").read_bytes()[32 : 32 + TDREPORT_BYTES]
    for name, data in reports.items():
        assert pack_tdreport(parse_tdreport(data)) == data, name
    azure, quote = parse_tdreport(reports["azure"]).body, parse_quote(shared_data("tdx/quotes/v4-azure.bin").read_bytes()).body
    assert (azure.mr_td, azure.mr_seam, azure.rtmrs) == (quote.mr_td, quote.mr_seam, quote.rtmrs)


@pytest.mark.parametrize("size", [0, 584, TDREPORT_BYTES - 1, TDREPORT_BYTES + 1])
def test_a_tdreport_of_a_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_tdreport(pack_tdreport(tdreport("v1")).ljust(size, b"\0")[:size])
    assert (refused.value.format, refused.value.got, refused.value.expected) == (EvidenceFormat.TDX_REPORT, size, 1024)


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (0, "type"), (1, "subtype"), (3, "reserved_003"), (4, "reserved_004"), (192, "reserved_0c0"), (259, "valid"),
        (400, "reserved_190"), (495, "reserved_1ef"), (1023, "reserved_3c0"), (264, "tee_tcb_info_hash"),
        (528, "tee_info_hash"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_tdreport_is_named(offset: int, field: str) -> None:
    data = bytearray(pack_tdreport(tdreport("v1")))
    data[offset] ^= 1
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_tdreport(bytes(data))
    assert refused.value.field == field


def test_a_report_without_service_tds_has_no_digest_of_one() -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        pack_tdreport(dataclasses.replace(tdreport("v1"), version=0))
    assert refused.value.field == "service_td"
    with pytest.raises(MalformedEvidenceError):
        pack_tdreport(dataclasses.replace(tdreport("v1"), version=2))
    with pytest.raises(ValueError):
        pack_tdreport(dataclasses.replace(tdreport("v1"), body=BODY_1_0))
    with pytest.raises(ValueError):
        pack_tdreport(dataclasses.replace(tdreport("v1"), valid=1 << 64))
