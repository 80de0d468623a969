"""The GPU report as bytes: recorded reports, one defect at a time, and the exact inverse."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence.gpu_abi import (
    MAX_REPORT_BYTES,
    GpuReport,
    Measurement,
    OpaqueHeader,
    firmware_digests,
    pack_report,
    parse_report,
)
from tests.gpus import GPU_NAMES, NONCE, RECORDED, SWITCH_NAMES, links, listed, recorded

REPORT = GpuReport(
    requester_nonce=NONCE,
    measurements=firmware_digests((b"\x01" * 48, b"\x02" * 48)),
    responder_nonce=b"\x03" * 32,
    opaque=(
        (6, bytes.fromhex("007400961a000000")),
        (3, b"580.95.05\0"),
        (20, b"\x04" * 48),
        (36, b"\2\0"),
        (17, b"1010\0"),
        (18, b"0205\0"),
        (15, b"882\0\0\0"),
        (21, b"\xaa"),
        (34, b"\1\0"),
        (35, b"GB100\0\0"),
        (16, b"0\0\0"),
        (19, b"\0\0"),
        (11, b"\x55"),
        (77, b"unknown"),
    ),
    signature=b"\x05" * 96,
)
PACKED = pack_report(REPORT)
RECORD_END = 45 + 2 * 55


def field_of_error(report: bytes) -> str:
    with pytest.raises(MalformedEvidenceError) as caught:
        parse_report(report)
    assert caught.value.format is EvidenceFormat.NVIDIA_REPORT
    return caught.value.field


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_reports_parse_to_the_expected_fields_and_pack_to_the_same_bytes(name: str) -> None:
    sample = recorded(name)
    report, expected = parse_report(sample.report), sample.expected
    assert pack_report(report) == sample.report
    assert report.requester_nonce == sample.nonce
    assert report.responder_nonce.hex() == expected["responder_nonce"]
    assert [kind for kind, _ in report.opaque] == expected["opaque_ids"]
    assert (report.driver_version, report.vbios_version) == (expected["driver"], expected["vbios"])
    assert (report.project, report.project_sku, report.chip_sku) == tuple(
        expected[key] for key in ("project", "project_sku", "chip_sku")
    )
    assert (report.fwid.hex() if report.fwid else None) == expected["fwid"]
    assert (report.feature_flag, report.opaque_version) == (expected["feature_flag"], expected["opaque_version"])
    assert report.protected_pcie == {"None": None, "aa": True, "55": False}[str(expected["ppcie_status"])]
    nvdec0 = report.field(11)
    assert (nvdec0.hex() if nvdec0 else None) == expected["nvdec0"]
    assert (len(report.measurements), report.trailing_bytes) == (expected["blocks"], expected["trailing_bytes"])
    assert len(report.signed_bytes) == expected["signed_len"]


def test_the_layout_is_the_documented_one() -> None:
    assert PACKED[4:36] == NONCE
    assert PACKED[41:45] == bytes((2, 110, 0, 0))
    assert PACKED[45:52] == bytes((1, 1, 51, 0, 1, 48, 0))
    assert PACKED[RECORD_END : RECORD_END + 32] == b"\x03" * 32
    assert PACKED[-96:] == b"\x05" * 96
    assert parse_report(PACKED) == REPORT


def test_typed_fields_are_decoded() -> None:
    assert REPORT.vbios_version == "96.00.74.00.1A"
    assert REPORT.driver_version == "580.95.05"
    assert (REPORT.project, REPORT.project_sku, REPORT.chip_sku) == ("1010", "0205", "882")
    assert (REPORT.fwid, REPORT.feature_flag, REPORT.opaque_version) == (b"\x04" * 48, 2, 1)
    assert (REPORT.chip_info, REPORT.protected_pcie) == ("GB100", True)
    assert (REPORT.field(77), REPORT.field(78)) == (b"unknown", None)


def test_a_gpu_names_the_switches_at_its_links_the_other_way_round() -> None:
    report = parse_report(pack_report(replace(REPORT, opaque=((22, links(SWITCH_NAMES)),))))
    assert report.switch_pdis == (*SWITCH_NAMES * 4, bytes(8), bytes(8))
    assert report.device_pdi is None


@pytest.mark.parametrize("kind", [26, 4])  # old firmware writes it where a GPU writes its GPU_INFO
def test_a_switch_names_itself_and_eight_gpus(kind: int) -> None:
    report = parse_report(pack_report(replace(REPORT, opaque=((22, SWITCH_NAMES[0]), (kind, listed(GPU_NAMES))))))
    assert (report.device_pdi, report.gpu_pdis) == (SWITCH_NAMES[0], GPU_NAMES)
    assert report.switch_pdis is None


def test_what_a_gpu_writes_into_its_gpu_info_is_no_list_of_gpus() -> None:
    assert parse_report(pack_report(replace(REPORT, opaque=((4, bytes(8)),)))).gpu_pdis is None


def test_fields_that_are_absent_are_none() -> None:
    report = parse_report(pack_report(replace(REPORT, opaque=())))
    assert (report.vbios_version, report.driver_version, report.fwid, report.feature_flag, report.project) == (None,) * 5
    assert (report.chip_info, report.protected_pcie, report.opaque_version) == (None,) * 3
    assert (report.device_pdi, report.switch_pdis, report.gpu_pdis) == (None,) * 3


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (0, "request-version"),
        (1, "request-code"),
        (2, "request-param1"),
        (3, "request-param2"),
        (36, "request-slot"),
        (37, "version"),
        (38, "code"),
        (39, "param1"),
        (40, "param2"),
        (46, "block-specification"),
        (47, "block-size"),
        (50, "block-size"),
    ],
)
def test_every_constant_of_the_layout_is_checked(offset: int, field: str) -> None:
    assert field_of_error(PACKED[:offset] + bytes((PACKED[offset] ^ 0x10,)) + PACKED[offset + 1 :]) == field


@pytest.mark.parametrize("length", [0, 3, 20, 36, 43, 60, RECORD_END + 1, RECORD_END + 33, RECORD_END + 40, len(PACKED) - 1])
def test_a_report_cut_anywhere_is_malformed(length: int) -> None:
    field_of_error(PACKED[:length])


def test_a_report_measures_something() -> None:
    assert field_of_error(pack_report(replace(REPORT, measurements=()))) == "number-of-blocks"


@pytest.mark.parametrize("index", [0, 1, 0xFF])
def test_every_block_has_an_index_of_its_own(index: int) -> None:
    other = Measurement(index, 1, bytes(48))
    assert field_of_error(pack_report(replace(REPORT, measurements=(*firmware_digests([bytes(48)]), other)))) == "block-index"


@pytest.mark.parametrize("length", [0, 32, 47, 49, 64])
def test_a_digest_is_one_of_sha384(length: int) -> None:
    assert field_of_error(pack_report(replace(REPORT, measurements=(Measurement(1, 1, bytes(length)),)))) == "block-length"


@pytest.mark.parametrize(("at", "changed"), [(41, 1), (41, 0x40), (42, 109), (42, 111), (43, 1), (44, 1)])
def test_the_record_holds_its_blocks_and_nothing_else(at: int, changed: int) -> None:
    field_of_error(PACKED[:at] + bytes((changed,)) + PACKED[at + 1 :])
    assert field_of_error(PACKED[:41] + b"\1" + PACKED[42:]) == "measurement-record-length"


def test_blocks_are_of_any_kind_and_number_and_in_any_order() -> None:
    """As a security processor measures, and as newer drivers add a manifest: raw values of any length, indices with gaps."""
    blocks = (
        Measurement(0x34, 0x81, b"\0" * 73),
        Measurement(1, 0x83, b"\0\0\0\1"),
        Measurement(2, 0x82, b""),
        Measurement(3, 0x03, b"\3" * 48),
        Measurement(0xFD, 0x8A, b"manifest" * 200),
        Measurement(0xFE, 0x00, bytes(48)),
    )
    packed = pack_report(replace(REPORT, measurements=blocks, opaque=()))
    report = parse_report(packed)
    assert (report.measurements, report.opaque, report.opaque_header) == (blocks, (), None)
    assert pack_report(report) == packed


def test_opaque_data_with_a_header_has_typed_fields() -> None:
    header = OpaqueHeader(2, 1, tuple(0x82 + number % 6 for number in range(len(REPORT.opaque))))
    packed = pack_report(replace(REPORT, opaque_header=header))
    report = parse_report(packed)
    assert (report.opaque, report.opaque_header) == (REPORT.opaque, header)
    assert (report.driver_version, report.vbios_version, report.fwid) == ("580.95.05", "96.00.74.00.1A", b"\4" * 48)
    assert pack_report(report) == packed
    assert len(packed) == len(PACKED) + 12 + 2 * len(REPORT.opaque)


@pytest.mark.parametrize(
    ("opaque", "field"),
    [
        (b"NVDAOD\0\0", "opaque-header"),
        (b"NVDAOD\0\0\2\0\1\0", "opaque-header"),
        (b"NVDAOD\0\0\2\0\0", "opaque-header"),
        (b"NVDAOD\1\0\2\0\0\0", "opaque-value"),  # of another profile: no header, and no field of such a length
        (b"NVDAOD\0\0\2\0\0\0\3\0", "opaque-value-type"),
        (b"NVDAOD\0\0\2\0\0\0\3\0\x86", "opaque-value-type"),
        (b"NVDAOD\0\0\2\0\0\0\3\0\x86\0\1", "opaque-size"),
        (b"NVDAOD\0\0\2\0\0\0\x4d\0\x86\0\2\0x", "opaque-value"),
        (b"NVDAOD\0\0\2\0\0\0" + b"\x4d\0\x86\0\1\0x" * 2, "opaque-type"),
    ],
)
def test_a_header_of_opaque_data_is_whole_and_so_are_its_fields(opaque: bytes, field: str) -> None:
    head = PACKED[: RECORD_END + 32]
    assert field_of_error(head + struct.pack("<H", len(opaque)) + opaque + bytes(96)) == field


def test_a_report_larger_than_the_driver_can_return_is_malformed() -> None:
    assert field_of_error(bytes(MAX_REPORT_BYTES + 1)) == "length"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_trailing_zero_bytes_are_kept_and_not_signed(count: int) -> None:
    report = parse_report(PACKED + bytes(count))
    assert report.trailing_bytes == count
    assert pack_report(report) == PACKED + bytes(count)
    assert report.signed_bytes == REPORT.signed_bytes


@pytest.mark.parametrize("tail", [bytes(4), b"\1", b"\0\1"])
def test_other_trailing_bytes_are_malformed(tail: bytes) -> None:
    assert field_of_error(PACKED + tail) == "trailing-bytes"


@pytest.mark.parametrize(
    ("opaque", "field"),
    [
        (((3, b"580.95.05\0"), (3, b"535.00.00\0")), "opaque-type"),
        (((255, b""),), "opaque-type"),
        (((20, bytes(47)),), "fwid"),
        (((36, b"\0"),), "feature-flag"),
        (((3, b"\0"),), "driver-version"),
        (((3, b"580\0.95"),), "driver-version"),
        (((3, b"\xb5" * 4),), "driver-version"),
        (((3, b"5" * 65),), "driver-version"),
        (((6, b"\x80" * 9),), "vbios-version"),
        (((17, b" "),), "project"),
        (((18, b"\n"),), "project-sku"),
        (((15, b""),), "chip-sku"),
        (((16, b"\n"),), "chip-sku-mod"),
        (((19, b"\x80"),), "project-sku-mod"),
        (((35, b""),), "chip-info"),
        (((4, bytes(9)),), "gpu-info"),
        (((11, b"\xab"),), "nvdec0-status"),
        (((11, b"\xaa\xaa"),), "nvdec0-status"),
        (((12, bytes(7)),), "measurement-counts"),
        (((13, bytes(3)),), "cpr-info"),
        (((14, bytes(5)),), "board-id"),
        (((21, b""),), "protected-pcie-status"),
        (((21, b"\0"),), "protected-pcie-status"),
        (((22, bytes(16)),), "pdi"),
        (((22, bytes(145)),), "pdi"),
        (((23, b"\0"),), "floorswept-ports"),
        (((24, b"\0"),), "position-id"),
        (((25, b"\0"),), "lock-status"),
        (((26, bytes(64)),), "gpu-pdis"),
        (((33, b"\0"),), "sys-enable-status"),
        (((34, b"\0"),), "opaque-data-version"),
    ],
)
def test_opaque_fields_have_the_shape_their_type_asks_for(opaque: tuple[tuple[int, bytes], ...], field: str) -> None:
    assert field_of_error(pack_report(replace(REPORT, opaque=opaque))) == field


@pytest.mark.parametrize(
    ("opaque", "field"),
    [(b"\3", "opaque-type"), (b"\3\0\1", "opaque-size"), (struct.pack("<HH", 77, 2) + b"x", "opaque-value")],
)
def test_opaque_data_must_be_consumed_to_the_last_byte(opaque: bytes, field: str) -> None:
    head = PACKED[: RECORD_END + 32]
    assert field_of_error(head + struct.pack("<H", len(opaque)) + opaque + bytes(96)) == field


@settings(deadline=None)  # the machine that runs this may be busy
@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255), st.integers(0, 5))
def test_whatever_parses_packs_to_the_same_bytes(position: int, flip: int, trailing: int) -> None:
    mutated = PACKED[:position] + bytes((PACKED[position] ^ flip,)) + PACKED[position + 1 :] + bytes(trailing)
    try:
        report = parse_report(mutated)
    except MalformedEvidenceError:
        return
    assert pack_report(report) == mutated


@settings(deadline=None)  # the machine that runs this may be busy
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_malformed_and_nothing_else(data: bytes) -> None:
    field_of_error(data)
