import gzip
import hashlib
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import AgentError, ConfigConflictError, InitdataError, InitdataProblem
from agent.guest.initdata import (
    ALGORITHMS,
    MAX_DOCUMENT_BYTES,
    MAX_GZIP_BYTES,
    find_device,
    fit,
    pack_device,
    pack_document,
    pack_gzip,
    parse_initdata,
    read_device,
)

SOURCE = Ident("initdata-file")
DOCUMENT = b"""version = "0.1.0"
algorithm = "sha384"

[data]
"keyturn.toml" = '''
schema = "keyturn/v1"
'''
"aa.toml" = "token = 'hunter2'"
"""


def change(old: bytes, new: bytes) -> bytes:
    assert old in DOCUMENT
    return DOCUMENT.replace(old, new)


# --- the document -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "length"), [("sha256", 32), ("sha384", 48), ("sha512", 64)])
def test_the_digest_is_over_exactly_the_documents_bytes(algorithm: str, length: int) -> None:
    document = change(b"sha384", algorithm.encode())
    digest = parse_initdata(document, SOURCE).digest
    assert digest == hashlib.new(algorithm, document).digest()
    assert len(digest) == length
    assert parse_initdata(document + b"\n", SOURCE).digest != digest


def test_entries_are_taken_as_utf_8_and_not_printed() -> None:
    initdata = parse_initdata(change(b"hunter2", "hünter2".encode()), SOURCE)
    assert initdata.entry("keyturn.toml") == b'schema = "keyturn/v1"\n'
    assert initdata.entry("aa.toml") == "token = 'hünter2'".encode()
    assert initdata.entry("cdh.toml") is None
    assert "nter2" not in repr(initdata)


def test_keys_beside_the_known_are_ignored_and_covered() -> None:
    more = b'comment = "for the operator"\n' + DOCUMENT
    assert parse_initdata(more, SOURCE).entries == parse_initdata(DOCUMENT, SOURCE).entries
    assert parse_initdata(more, SOURCE).digest != parse_initdata(DOCUMENT, SOURCE).digest


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (DOCUMENT.ljust(MAX_DOCUMENT_BYTES + 1, b"\n"), InitdataProblem.TOO_LARGE),
        (change(b"hunter2", b"\xff"), InitdataProblem.NOT_UTF8),
        (change(b"[data]", b"[data"), InitdataProblem.NOT_TOML),
        (b"\xef\xbb\xbf" + DOCUMENT, InitdataProblem.NOT_TOML),
        (b"a = " + b"1" * 5000, InitdataProblem.NOT_TOML),
        (b"a = " + b"[" * 100_000, InitdataProblem.NOT_TOML),
        (b"", InitdataProblem.VERSION),
        (change(b"0.1.0", b"0.2.0"), InitdataProblem.VERSION),
        (change(b'"0.1.0"', b"0.1"), InitdataProblem.VERSION),
        (change(b"algorithm", b"algorithms"), InitdataProblem.ALGORITHM),
        (change(b"sha384", b"sha-384"), InitdataProblem.ALGORITHM),
        (change(b"sha384", b"SHA384"), InitdataProblem.ALGORITHM),
        (change(b"sha384", b"sm3"), InitdataProblem.ALGORITHM),
        (change(b'"sha384"', b'["sha384"]'), InitdataProblem.ALGORITHM),
        (change(b"[data]", b"[date]"), InitdataProblem.DATA),
        (change(b"[data]", b"[[data]]"), InitdataProblem.DATA),
        (DOCUMENT + b"number = 1\n", InitdataProblem.DATA),
        (DOCUMENT + b"[data.table]\n", InitdataProblem.DATA),
    ],
)
def test_every_defect_of_a_document_has_its_name(document: bytes, problem: InitdataProblem) -> None:
    with pytest.raises(InitdataError) as caught:
        parse_initdata(document, SOURCE)
    assert (caught.value.source, caught.value.problem) == (SOURCE, problem)
    assert caught.value.__cause__ is None


@given(st.binary(max_size=200), st.integers(0, len(DOCUMENT)), st.integers(0, 20))
def test_any_document_is_parsed_or_an_error_of_ours(noise: bytes, at: int, length: int) -> None:
    for document in (noise, DOCUMENT[:at] + noise[:length] + DOCUMENT[at + length :]):
        try:
            parse_initdata(document, SOURCE)
        except InitdataError as error:
            assert error.source == SOURCE


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=4), st.sampled_from(ALGORITHMS))
def test_a_packed_document_has_exactly_its_entries(entries: dict[str, str], algorithm: str) -> None:
    document = pack_document(entries, algorithm)
    parsed = parse_initdata(document, SOURCE)
    assert list(parsed.entries.items()) == list(entries.items())
    assert parsed.digest == hashlib.new(algorithm, document).digest()


@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a\n", "\na", "it's", "'", "''", "'''", "a\r\nb", '"', "\\n", "\x7f", "\x00", "ü"]
)
def test_every_text_comes_back_from_its_document(text: str) -> None:
    assert parse_initdata(pack_document({"a": text}, "sha256"), SOURCE).entries == {"a": text}


def test_a_configuration_stands_in_the_document_as_it_is() -> None:
    entries = {"keyturn.toml": 'schema = "keyturn/v1"\n', "aa.toml": "token = 'hunter2'"}
    document = pack_document(entries, "sha384")
    assert b"'''\nschema = \"keyturn/v1\"\n'''" in document
    assert parse_initdata(document, SOURCE).entries == entries


# --- the field of the TEE ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digest", "length", "field"),
    [
        (b"d" * 32, 32, b"d" * 32),
        (b"d" * 31 + b"ef" * 16, 32, b"d" * 31 + b"e"),
        (b"d" * 32, 48, b"d" * 32 + bytes(16)),
        (b"d" * 48, 48, b"d" * 48),
        (b"d" * 64, 48, b"d" * 48),
        (b"", 32, bytes(32)),
    ],
)
def test_a_digest_is_cut_or_zero_padded_on_the_right(digest: bytes, length: int, field: bytes) -> None:
    assert fit(digest, length) == field


# --- the device -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test writes the disk it reads."""
    return tmp_path_factory.mktemp("dev") / "vdb"


def raw(content: bytes, length: int | None = None) -> bytes:
    """A disk as Kata's shim writes it, around any content."""
    image = b"initdata" + struct.pack("<Q", len(content) if length is None else length) + content
    return image.ljust(-(-len(image) // 512) * 512, b"\0")


def zeros_in_gzip(mebibytes: int) -> bytes:
    """A gzip stream of that many MiB of zeros, a multiple of 16, made without compressing them all."""
    chunk = bytes(16 << 20)
    stream = zlib.compressobj(9, wbits=-15)
    block = stream.compress(chunk) + stream.flush(zlib.Z_FULL_FLUSH)
    check = 0
    for _ in range(mebibytes // 16):
        check = zlib.crc32(chunk, check)
    header = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    return header + block * (mebibytes // 16) + stream.flush() + struct.pack("<II", check, (mebibytes << 20) & 0xFFFFFFFF)


GZIP = gzip.compress(DOCUMENT)


@given(st.binary(max_size=2000))
def test_a_document_comes_back_from_its_device(disk: Path, document: bytes) -> None:
    image = pack_device(document)
    assert len(image) % 512 == 0
    disk.write_bytes(image)
    assert read_device(disk) == document


def test_a_device_written_by_another_hand_is_read(disk: Path) -> None:
    disk.write_bytes(raw(GZIP) + b"rest of the disk" * 100)
    assert read_device(disk) == DOCUMENT


def test_the_largest_document_is_read(disk: Path) -> None:
    largest = DOCUMENT.ljust(MAX_DOCUMENT_BYTES, b"\n")
    disk.write_bytes(pack_device(largest))
    assert read_device(disk) == largest


def test_packing_is_deterministic_and_plain_gzip() -> None:
    assert pack_device(DOCUMENT) == raw(pack_gzip(DOCUMENT))
    assert pack_gzip(DOCUMENT)[4:8] == bytes(4)  # RFC 1952: MTIME
    assert gzip.decompress(pack_gzip(DOCUMENT)) == DOCUMENT


def test_what_no_guest_would_read_is_not_packed() -> None:
    with pytest.raises(InitdataError) as caught:
        pack_device(bytes(MAX_DOCUMENT_BYTES + 1))
    assert caught.value.problem is InitdataProblem.TOO_LARGE
    random = b"".join(hashlib.sha512(struct.pack("<I", count)).digest() for count in range((MAX_GZIP_BYTES >> 6) + 1))
    with pytest.raises(InitdataError) as caught:
        pack_device(random)
    assert caught.value.problem is InitdataProblem.LENGTH


@pytest.mark.parametrize("image", [b"", b"initdat", b"Initdata" + bytes(504), bytes(1024), b"\x1f\x8b" + GZIP])
def test_another_disk_is_none(disk: Path, image: bytes) -> None:
    disk.write_bytes(image)
    assert read_device(disk) is None


@pytest.mark.parametrize("path", ["none", "."])
def test_a_disk_that_cannot_be_read_is_none(tmp_path: Path, path: str) -> None:
    assert read_device(tmp_path / path) is None


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"initdata", InitdataProblem.LENGTH),
        (b"initdata" + bytes(7), InitdataProblem.LENGTH),
        (raw(GZIP, 4096), InitdataProblem.LENGTH),
        (raw(GZIP + bytes(MAX_GZIP_BYTES), MAX_GZIP_BYTES + 1), InitdataProblem.LENGTH),
        (raw(GZIP, 2**64 - 1), InitdataProblem.LENGTH),
        (raw(b""), InitdataProblem.GZIP),
        (raw(DOCUMENT), InitdataProblem.GZIP),
        (raw(zlib.compress(DOCUMENT)), InitdataProblem.GZIP),
        (raw(GZIP, len(GZIP) - 1), InitdataProblem.GZIP),
        (raw(GZIP, len(GZIP) + 1), InitdataProblem.GZIP),
        (raw(GZIP + GZIP), InitdataProblem.GZIP),
        (raw(GZIP[:-8] + bytes(4) + GZIP[-4:]), InitdataProblem.GZIP),
        (raw(GZIP[:-4] + bytes(4)), InitdataProblem.GZIP),
        (raw(gzip.compress(bytes(MAX_DOCUMENT_BYTES + 1))), InitdataProblem.TOO_LARGE),
    ],
    ids=[
        "no-length",
        "half-a-length",
        "length-behind-the-disk",
        "length-above-1-mib",
        "length-of-all-ones",
        "empty",
        "plain",
        "zlib-header",
        "cut",
        "trailing-byte",
        "two-members",
        "wrong-crc",
        "wrong-size",
        "document-above-4-mib",
    ],
)
def test_every_defect_of_a_device_has_its_name(disk: Path, image: bytes, problem: InitdataProblem) -> None:
    disk.write_bytes(image)
    with pytest.raises(InitdataError) as caught:
        read_device(disk)
    assert (caught.value.source, caught.value.problem) == ("initdata-device", problem)


def test_a_gzip_bomb_costs_no_more_than_the_largest_document(disk: Path) -> None:
    bomb = zeros_in_gzip(1024)
    assert len(bomb) <= MAX_GZIP_BYTES
    disk.write_bytes(raw(bomb))
    tracemalloc.start()
    try:
        with pytest.raises(InitdataError) as caught:
            read_device(disk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.problem is InitdataProblem.TOO_LARGE
    assert peak < 4 * MAX_DOCUMENT_BYTES


def test_the_bomb_is_a_real_one() -> None:
    assert gzip.decompress(zeros_in_gzip(32)) == bytes(32 << 20)


@given(st.binary(max_size=300), st.integers(0, 511), st.integers(0, 255))
def test_any_disk_is_read_none_or_an_error_of_ours(disk: Path, noise: bytes, at: int, value: int) -> None:
    device = bytearray(pack_device(DOCUMENT))
    device[at] = value
    for image in (noise, raw(noise), b"initdata" + noise, bytes(device)):
        disk.write_bytes(image)
        try:
            read_device(disk)
        except InitdataError as error:
            assert error.source == "initdata-device"


# --- which device -----------------------------------------------------------------------------------------------------


def plug(root: Path, name: str, image: bytes | None) -> None:
    """A block device of the machine at `root`; None: the kernel lists it and there is no node."""
    (root / "sys/class/block" / name).mkdir(parents=True)
    (root / "dev").mkdir(exist_ok=True)
    if image is not None:
        (root / "dev" / name).write_bytes(image)


OTHER = pack_device(DOCUMENT + b"\n")
INITDATA = pack_device(DOCUMENT)


def test_a_machine_without_block_devices_has_no_initdata(tmp_path: Path) -> None:
    assert find_device(tmp_path) is None


@pytest.mark.parametrize("name", ["vda", "vdb", "vdaa", "sda", "sdz"])
def test_the_initdata_disk_is_found_among_others(tmp_path: Path, name: str) -> None:
    plug(tmp_path, "vdc", bytes(4096))
    plug(tmp_path, "sdb", b"")
    plug(tmp_path, "sdc", None)
    assert find_device(tmp_path) is None
    plug(tmp_path, name, INITDATA)
    assert find_device(tmp_path) == DOCUMENT


@pytest.mark.parametrize("name", ["vda1", "vd", "sda2", "nvme0n1", "loop0", "sr0", "dm-0", "xvda", "VDA"])
def test_partitions_and_other_devices_are_not_looked_at(tmp_path: Path, name: str) -> None:
    plug(tmp_path, name, INITDATA)
    assert find_device(tmp_path) is None


def test_a_node_the_kernel_does_not_list_is_not_looked_at(tmp_path: Path) -> None:
    plug(tmp_path, "vda", bytes(512))
    (tmp_path / "dev/vdb").write_bytes(INITDATA)
    assert find_device(tmp_path) is None


def test_one_document_on_two_disks_is_one_document(tmp_path: Path) -> None:
    for name in ("vda", "sda"):
        plug(tmp_path, name, INITDATA)
    assert find_device(tmp_path) == DOCUMENT


@pytest.mark.parametrize("names", [("vda", "vdb"), ("sdb", "vda")])
def test_two_documents_are_a_conflict(tmp_path: Path, names: tuple[str, str]) -> None:
    plug(tmp_path, names[0], INITDATA)
    plug(tmp_path, "vdx", bytes(512))
    plug(tmp_path, names[1], OTHER)
    with pytest.raises(ConfigConflictError) as caught:
        find_device(tmp_path)
    assert caught.value.first == caught.value.second == "initdata-device"


def test_a_broken_device_is_not_passed_over_for_a_whole_one(tmp_path: Path) -> None:
    plug(tmp_path, "vda", INITDATA)
    plug(tmp_path, "vdb", raw(DOCUMENT))
    with pytest.raises(AgentError) as caught:
        find_device(tmp_path)
    assert isinstance(caught.value, InitdataError)
