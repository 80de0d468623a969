"""SNP layouts: exact inverses, every reserved bit, every recorded report."""

import dataclasses
import json
import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence.snp_abi import (
    MAX_CERTIFICATE_TABLE_BYTES,
    REPORT_BYTES,
    SIGNED_BYTES,
    CertificateKind,
    FirmwareVersion,
    GuestPolicy,
    Product,
    SigningKey,
    SnpReport,
    TcbVersion,
    pack_report,
    parse_certificate_table,
    parse_report,
    product_of,
)
from tests.shared import shared_data

# Only the microcode level is set, so that both TCB layouts read the same and a flipped CPUID family stays acceptable.
TCB = TcbVersion(bootloader=0, tee=0, snp=0, microcode=84)
V3 = SnpReport(
    version=3,
    guest_svn=7,
    policy=GuestPolicy(0x3001F),
    family_id=bytes(range(16)),
    image_id=bytes(range(16, 32)),
    vmpl=0,
    signature_algorithm=1,
    current_tcb=TCB,
    platform_info=0x25,
    author_key_enabled=False,
    mask_chip_key=False,
    signing_key=SigningKey.VCEK,
    report_data=bytes(range(64)),
    measurement=b"\x11" * 48,
    host_data=b"\x22" * 32,
    id_key_digest=b"\x33" * 48,
    author_key_digest=b"\x44" * 48,
    report_id=b"\x55" * 32,
    report_id_ma=b"\xff" * 32,
    reported_tcb=TCB,
    cpuid_family=0x19,
    cpuid_model=0x11,
    cpuid_stepping=1,
    chip_id=b"\x66" * 64,
    committed_tcb=TCB,
    current_firmware=FirmwareVersion(1, 55, 40),
    committed_firmware=FirmwareVersion(1, 55, 39),
    launch_tcb=TCB,
    launch_mitigations=None,
    current_mitigations=None,
    signature_r=1 << 383,
    signature_s=3,
)
V2 = dataclasses.replace(V3, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None)
V4 = dataclasses.replace(V3, version=4)
V5 = dataclasses.replace(V3, version=5, launch_mitigations=1, current_mitigations=3)
EVERY_VERSION = (V2, V3, V4, V5)


def recorded() -> dict[str, tuple[dict[str, object], bytes]]:
    rows = json.loads(shared_data("snp/index.json").read_text())
    return {row["name"]: (row, shared_data(f"snp/{row['report']}").read_bytes()) for row in rows}


def reserved_bits(version: int) -> set[int]:
    """Bit numbers (byte * 8 + bit) that must be zero, written down from AMD's table and not from our parser.

    PLATFORM_INFO is not among them: its reserved bits became fields without a new version, and may again.
    """

    def every(start: int, size: int) -> set[int]:
        return set(range(start * 8, (start + size) * 8))

    bits = {0x008 * 8 + bit for bit in range(26, 64)}  # POLICY
    bits |= {0x030 * 8 + bit for bit in range(2, 32)}  # VMPL 0..3
    bits |= {0x048 * 8 + bit for bit in range(5, 32)}  # KEY_INFO
    bits |= {0x048 * 8 + bit for bit in (3, 4)}  # SIGNING_KEY 2 and 4 are reserved values
    bits |= every(0x04C, 4)
    for tcb in (0x038, 0x180, 0x1E0, 0x1F0):
        bits |= every(tcb + 2, 4)
    bits |= every(0x188, 24) if version == 2 else every(0x18B, 21)
    bits |= every(0x1EB, 1) | every(0x1EF, 1)
    bits |= every(0x208, 152) if version == 5 else every(0x1F8, 168)
    bits |= every(0x2A0 + 48, 24) | every(0x2E8 + 48, 24) | every(0x330, 368)
    return bits


@pytest.mark.parametrize("report", EVERY_VERSION, ids=lambda report: f"v{report.version}")
def test_a_flipped_bit_is_refused_exactly_where_it_is_reserved_or_has_one_legal_value(report: SnpReport) -> None:
    data = pack_report(report)
    refused = set()
    for bit in range(32, REPORT_BYTES * 8):  # the version has tests of its own
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert pack_report(parse_report(bytes(changed))) == changed
        except MalformedEvidenceError:
            refused.add(bit)
    one_legal_value = {0x008 * 8 + 17} | set(range(0x034 * 8, 0x038 * 8))  # a policy bit that is always 1; the algorithm
    assert refused == reserved_bits(report.version) | one_legal_value


@pytest.mark.parametrize("report", EVERY_VERSION, ids=lambda report: f"v{report.version}")
def test_parse_is_the_inverse_of_pack(report: SnpReport) -> None:
    data = pack_report(report)
    assert len(data) == REPORT_BYTES
    assert parse_report(data) == report


def test_every_recorded_report_round_trips_and_has_the_recorded_values() -> None:
    for name, (row, data) in recorded().items():
        report = parse_report(data)
        assert pack_report(report) == data, name
        assert report.version == row["version"], name
        assert report.guest_svn == row["guest_svn"], name
        assert report.policy == int(str(row["policy"]), 16), name
        assert report.policy.debug is row["policy_debug"], name
        assert report.vmpl == row["vmpl"], name
        assert report.platform_info == int(str(row["platform_info"]), 16), name
        assert report.signing_key is (SigningKey.VLEK if row["endorsement_key"] == "vlek" else SigningKey.VCEK), name
        for field in ("report_data", "measurement", "host_data", "chip_id"):
            assert getattr(report, field).hex() == row[field], (name, field)
        for field in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
            assert dataclasses.asdict(getattr(report, field)) == {"fmc": None} | row[field], (name, field)  # type: ignore[operator]
        assert list(dataclasses.astuple(report.current_firmware)) == row["current_fw"], name
        assert report.launch_mitigations == row["launch_mit_vector"], name
        if report.version > 2:
            assert product_of(report).value == row["product"], name


def test_both_tcb_layouts_put_the_levels_where_amd_does() -> None:
    assert TcbVersion(bootloader=1, tee=2, snp=3, microcode=4).pack() == bytes((1, 2, 0, 0, 0, 0, 3, 4))
    assert TcbVersion(fmc=9, bootloader=1, tee=2, snp=3, microcode=4).pack() == bytes((9, 1, 2, 3, 0, 0, 0, 4))


TURIN_TCB = TcbVersion(fmc=1, bootloader=2, tee=3, snp=4, microcode=5)
TURIN = dataclasses.replace(
    V3, current_tcb=TURIN_TCB, reported_tcb=TURIN_TCB, committed_tcb=TURIN_TCB, launch_tcb=TURIN_TCB,
    cpuid_family=0x1A, cpuid_model=0x02, chip_id=b"\x77" * 8 + bytes(56),
)  # fmt: skip


def test_the_cpuid_family_selects_the_turin_layout() -> None:
    assert parse_report(pack_report(TURIN)).reported_tcb == TURIN_TCB
    with pytest.raises(MalformedEvidenceError) as refused:  # the same bytes are no Genoa TCB version
        parse_report(pack_report(TURIN)[:0x188] + b"\x19" + pack_report(TURIN)[0x189:])
    assert refused.value.field == "current_tcb"


def test_a_version_2_report_shows_turin_by_its_short_chip_id() -> None:
    report = dataclasses.replace(TURIN, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None)
    assert parse_report(pack_report(report)).reported_tcb == TURIN_TCB
    masked = dataclasses.replace(V2, chip_id=bytes(64))
    assert parse_report(pack_report(masked)).reported_tcb.fmc is None


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFFFFFF])
def test_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_report(struct.pack("<I", version) + pack_report(V3)[4:])
    assert (refused.value.field, refused.value.got) == ("version", version)


@pytest.mark.parametrize("size", [0, 32, REPORT_BYTES - 1, REPORT_BYTES + 1, REPORT_BYTES + 32])
def test_a_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_report(pack_report(V3).ljust(size, b"\0")[:size])
    assert (refused.value.format, refused.value.got, refused.value.expected) == (EvidenceFormat.SNP_REPORT, size, REPORT_BYTES)


def test_a_report_the_host_asked_for_is_refused() -> None:
    data = pack_report(V3)
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_report(data[:0x30] + b"\xff" * 4 + data[0x34:])
    assert refused.value.field == "vmpl"


def test_the_policy_is_readable_by_its_bits() -> None:
    policy = GuestPolicy(0x3_0000 | 1 << 18 | 1 << 19 | 1 << 20 | 0x0137)
    assert (policy.abi_major, policy.abi_minor) == (1, 0x37)
    assert policy.smt and policy.migrate_ma and policy.debug and policy.single_socket
    closed = GuestPolicy(0x2_0000)
    assert not (closed.smt or closed.migrate_ma or closed.debug or closed.single_socket)


def test_key_info_is_readable_by_its_bits() -> None:
    report = dataclasses.replace(V3, author_key_enabled=True, mask_chip_key=True, signing_key=SigningKey.NONE)
    assert pack_report(report)[0x48:0x4C] == b"\x1f\0\0\0"
    assert parse_report(pack_report(report)) == report


@pytest.mark.parametrize(
    "changes",
    [
        {"measurement": bytes(47)},
        {"measurement": bytes(49)},
        {"cpuid_family": None},
        {"launch_mitigations": 5},
        {"guest_svn": 1 << 32},
        {"signature_r": 1 << 576},
        {"reported_tcb": TURIN_TCB},
    ],
)
def test_fields_that_do_not_fit_cannot_be_packed(changes: dict[str, object]) -> None:
    with pytest.raises((ValueError, MalformedEvidenceError)):
        pack_report(dataclasses.replace(V3, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, Product.MILAN), (0x19, 0x01, Product.MILAN), (0x19, 0x0F, Product.MILAN),
        (0x19, 0x10, Product.GENOA), (0x19, 0x1F, Product.GENOA), (0x19, 0xA0, Product.GENOA), (0x19, 0xAF, Product.GENOA),
        (0x1A, 0x00, Product.TURIN), (0x1A, 0x11, Product.TURIN),
        (0x1A, 0x50, Product.VENICE), (0x1A, 0x57, Product.VENICE), (0x1A, 0x90, Product.VENICE), (0x1A, 0xAF, Product.VENICE),
        (0x1A, 0xC0, Product.VENICE), (0x1A, 0xC7, Product.VENICE),
    ],
)  # fmt: skip
def test_the_product_follows_from_the_cpuid(family: int, model: int, product: Product) -> None:
    assert product_of(dataclasses.replace(V3, cpuid_family=family, cpuid_model=model)) is product


@pytest.mark.parametrize(
    ("family", "model"), [(0x19, 0x20), (0x19, 0x9F), (0x19, 0xB0), (0x1A, 0x12), (0x1A, 0x58), (0x1A, 0xC8), (0x17, 0x31)]
)
def test_an_unknown_processor_is_refused(family: int, model: int) -> None:
    with pytest.raises(MalformedEvidenceError):
        product_of(dataclasses.replace(V3, cpuid_family=family, cpuid_model=model))


def test_a_version_2_report_names_no_product() -> None:
    with pytest.raises(MalformedEvidenceError):
        product_of(V2)


@given(st.binary(max_size=2 * REPORT_BYTES))
def test_no_bytes_end_in_a_foreign_exception(data: bytes) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_report(data)


@settings(max_examples=300)
@given(
    st.sampled_from([*EVERY_VERSION, TURIN]),
    st.lists(st.tuples(st.integers(0, REPORT_BYTES - 1), st.integers(0, 255)), max_size=6),
)
def test_whatever_is_accepted_packs_to_the_same_bytes(report: SnpReport, changes: list[tuple[int, int]]) -> None:
    data = bytearray(pack_report(report))
    for position, value in changes:
        data[position] = value
    try:
        parsed = parse_report(bytes(data))
    except MalformedEvidenceError:
        return
    assert pack_report(parsed) == data


def test_the_signed_part_ends_where_the_signature_begins() -> None:
    assert pack_report(V3)[:SIGNED_BYTES] == pack_report(dataclasses.replace(V3, signature_r=5, signature_s=6))[:SIGNED_BYTES]
    assert pack_report(V3)[SIGNED_BYTES : SIGNED_BYTES + 48] == bytes(47) + b"\x80"  # little endian


# --- certificate table ------------------------------------------------------------------------------------------------


def table(*entries: tuple[UUID, int, int], data: bytes = b"", end: bytes = bytes(24)) -> bytes:
    return b"".join(guid.bytes + struct.pack("<II", offset, length) for guid, offset, length in entries) + end + data


VCEK, ARK = CertificateKind.VCEK.value, CertificateKind.ARK.value


def test_the_recorded_certificate_table_holds_three_pem_certificates() -> None:
    entries = parse_certificate_table(shared_data("snp/genoa-v3-vcek-configfs/auxblob.bin").read_bytes())
    assert [kind for kind, _ in entries] == [CertificateKind.ARK, CertificateKind.ASK, CertificateKind.VCEK]
    assert all(data.startswith(b"-----BEGIN CERTIFICATE-----") for _, data in entries)


def test_a_certificate_table_gives_its_entries_in_order_and_skips_what_it_does_not_know() -> None:
    data = table((VCEK, 96, 3), (UUID(int=7), 96, 1), (ARK, 99, 2), data=b"abcde")
    assert parse_certificate_table(data) == ((CertificateKind.VCEK, b"abc"), (CertificateKind.ARK, b"de"))


def test_an_entry_without_data_is_no_certificate() -> None:
    data = table((VCEK, 0, 0), (UUID(int=7), 0xFFFFFFFF, 0), (ARK, 96, 2), data=b"de")
    assert parse_certificate_table(data) == ((CertificateKind.ARK, b"de"),)


def test_no_certificate_table_is_an_empty_one() -> None:
    assert parse_certificate_table(b"") == ()
    assert parse_certificate_table(bytes(24)) == ()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(table((VCEK, 48, 4), data=b"abc"), id="reaches-beyond-the-end"),
        pytest.param(table((VCEK, 0xFFFFFFFF, 0xFFFFFFFF), data=b"abc"), id="offset-beyond-the-end"),
        pytest.param(table((VCEK, 47, 1), data=b"abc"), id="reaches-into-the-table"),
        pytest.param(table((UUID(int=7), 48, 4), data=b"abc"), id="unknown-entry-reaches-beyond-the-end"),
        pytest.param(table((VCEK, 24, 0), end=b""), id="no-end-marker"),
        pytest.param(table((VCEK, 48, 0), end=bytes(23)), id="short-end-marker"),
        pytest.param(bytes(23), id="shorter-than-one-entry"),
        pytest.param(bytes(MAX_CERTIFICATE_TABLE_BYTES + 1), id="too-long"),
    ],
)
def test_a_malformed_certificate_table_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_certificate_table(data)
    assert refused.value.format is EvidenceFormat.SNP_CHAIN


@given(
    st.lists(st.tuples(st.sampled_from([VCEK, ARK, UUID(int=7)]), st.integers(0, 200), st.integers(0, 200)), max_size=4),
    st.binary(max_size=200),
    st.integers(0, 400),
)
def test_no_certificate_table_ends_in_a_foreign_exception(entries: list[tuple[UUID, int, int]], data: bytes, cut: int) -> None:
    try:
        found = parse_certificate_table(table(*entries, data=data)[:cut])
    except MalformedEvidenceError:
        return
    assert len(found) <= len(entries)
