"""The header of a LUKS2 disk: what cryptsetup makes passes, and nothing that a host could make of it."""

import base64
import gzip
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.artifact import luks2
from agent.errors import VolumeHeaderError

UUID = "11111111-2222-4333-8444-555555555555"
# The first copy of what cryptsetup 2.6.1 wrote:
#   luksFormat --type luks2 --uuid UUID --key-size 512 --sector-size 4096 --label model --pbkdf argon2id
RECORDED = gzip.decompress(
    base64.b64decode(
        "H4sIAAAAAAACA+3Yy2sTQRgA8NAKVnooPi7iwTJXE7s72eymwYqmxlrSVNu0sa1KGbOzyXazj+5sNt3WggiCF6GXKogeBP8Brz2IFU96KHoQFDz4QBAEoQcF"
        "vTgbtxpbRM/6/Q4h+83MzvcglwyN54sr92JtsaYjsUi7aau0Fvt7rEpwSv79+h6/e2lo/d3lD4nXxTxZO3rn1rMLh4Mn21dedsqpx/NfBlbR/lPtN3a2ffI7"
        "7i99vLj6tuvF09Ly3s674r5dmWVxQwJzCSmZTCbSkiQlUi1i/6FHPl7f/f7m7bGOV9Wr3dcOWlcOfe56eP3B2ptLZ3ds+/o8BgAAAAAAAAAAcAvIoAGr2R5D"
        "mQUkhB9e4FCUQbW6wTCKh+vTTJ/nIVmKI6Jt2iLyLcxzdYfyN0iCIMRRlbAqX/3+lwBa5IdcSlqOuaTBD9maxqjHH5NYkdPhW5qXIJxKC1L4TK2yGziebls8"
        "SihLzHks4dSIbsnSprz4HYbamhlxK7aFdZXv83STR3jqJjVtN0CZ5n1xVHbqPGOR30tqYRrDDVqfyU70M2NCP4ENr6ArgV/ygmx1nuCRUaVHt3u13GiO9g/2"
        "ocVFfqVnG9QK+8a/M1oxqbW1i80SWqsVZUVRsCj/LFgNLGLqZR7Q/WmvQYnBg8KfG8Bo2bPdqAeS0CuHOal6hbKtaTjneX+iaUbTPsM3nGtNPAr8Oj2elEdd"
        "EiYRdqs536hhQ1atMntcm5Sn7AGzMlnIjc31lA6QnqJTz06VcH5CakyqeaINF9J9aCMzfm72pGBjTenPTTXGfZzLDhYG1Fwxn22Yp9lc0in7DfGYmRxxg0o5"
        "bDSflG1peiWsZobZVlQwEjFOp1sq+hGXFYlL86Pw8wYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPxDvgFXUI9hAEAAAA=="
    )
)
METADATA = json.loads(RECORDED[luks2.BINARY_BYTES :].rstrip(b"\0"))


def with_json(text: bytes) -> bytes:
    """The header with other JSON, and the checksum of that: what a host would do."""
    return luks2.with_checksum(RECORDED[: luks2.BINARY_BYTES] + text.ljust(len(RECORDED) - luks2.BINARY_BYTES, b"\0"))


def with_metadata(metadata: object) -> bytes:
    return with_json(json.dumps(metadata).encode())


def with_bytes(at: int, data: bytes) -> bytes:
    return luks2.with_checksum(RECORDED[:at] + data + RECORDED[at + len(data) :])


def refused(header: bytes) -> str:
    with pytest.raises(VolumeHeaderError) as caught:
        luks2.parse_luks2(header)
    return caught.value.field


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_header_of_cryptsetup_passes() -> None:
    assert luks2.look(RECORDED[: luks2.BINARY_BYTES]) == (UUID, len(RECORDED))
    assert luks2.parse_luks2(RECORDED) == luks2.Luks2Header(UUID, 16 << 20, None, 4096)
    assert luks2.parse_luks2(with_metadata(METADATA)) == luks2.parse_luks2(RECORDED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sector-size", "512"], luks2.Luks2Header(UUID, 16 << 20, None, 512)),
        (["--sector-size", "512", "--pbkdf", "pbkdf2", "--hash", "sha512"], luks2.Luks2Header(UUID, 16 << 20, None, 512)),
        (
            ["--sector-size", "512", "--offset", "65536", "--luks2-metadata-size", "64k"],
            luks2.Luks2Header(UUID, 32 << 20, None, 512),
        ),
    ],
)
def test_what_cryptsetup_makes_today_passes(tmp_path: Path, options: list[str], expected: luks2.Luks2Header) -> None:
    if shutil.which("cryptsetup") is None:
        pytest.skip("no cryptsetup here")
    disk = tmp_path / "disk"
    disk.touch()
    with disk.open("r+b") as stream:
        stream.truncate(48 << 20)
    (tmp_path / "p").write_bytes(b"p")
    fast = ["--pbkdf-force-iterations", "1000"] if "pbkdf2" in options else ["--pbkdf-memory", "32", "--iter-time", "1"]
    command = ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", UUID, "--key-size", "512"]
    subprocess.run([*command, *fast, "--key-file", tmp_path / "p", *options, disk], check=True)
    data = disk.read_bytes()
    found = luks2.look(data[: luks2.BINARY_BYTES])
    assert found is not None
    assert luks2.parse_luks2(data[: found[1]]) == expected


def test_a_header_without_keyslots_passes() -> None:
    metadata = METADATA | {"keyslots": {}}
    metadata["digests"]["0"]["keyslots"] = []
    assert luks2.parse_luks2(with_metadata(metadata)).uuid == UUID


def test_a_segment_may_have_a_size() -> None:
    metadata = json.loads(json.dumps(METADATA))
    metadata["segments"]["0"]["size"] = "8388608"
    assert luks2.parse_luks2(with_metadata(metadata)).size == 8 << 20


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(path: str, value: object) -> bytes:
    """One member changed, or added."""
    metadata = json.loads(json.dumps(METADATA))
    *above, name = path.split("/")
    inner = metadata
    for part in above:
        inner = inner[part]
    inner[name] = value
    return with_metadata(metadata)


ATTACKS: list[tuple[str, str, Any]] = [
    # A null cipher in the segment: CVE-2025-59054.
    ("segments[].encryption", "segments/0/encryption", "cipher_null-ecb"),
    ("segments[].encryption", "segments/0/encryption", "null"),
    ("segments[].encryption", "segments/0/encryption", "aes-ecb"),
    ("segments[].encryption", "segments/0/encryption", "aes-cbc-plain64"),
    ("segments[].encryption", "segments/0/encryption", "capi:xts(aes)-plain64"),
    ("segments[].encryption", "segments/0/encryption", "aes-xts-plain"),
    # In the keyslot, whose key would then be the host's: CVE-2025-58356.
    ("keyslots[].area.encryption", "keyslots/0/area/encryption", "cipher_null-ecb"),
    ("keyslots[].key_size", "keyslots/0/key_size", 32),
    ("keyslots[].type", "keyslots/0/type", "reencrypt"),
    ("keyslots[].mode", "keyslots/0/mode", "reencrypt"),
    ("keyslots[].area.type", "keyslots/0/area/type", "none"),
    ("keyslots[].kdf.type", "keyslots/0/kdf/type", "none"),
    # A segment that is not encrypted, a second one, one that moves.
    ("segments[].type", "segments/0/type", "linear"),
    ("segments[].integrity", "segments/0/integrity", {"type": "hmac(sha256)"}),
    ("segments[].flags", "segments/0/flags", ["backup-previous"]),
    ("segments[].iv_tweak", "segments/0/iv_tweak", "8"),
    ("segments[].sector_size", "segments/0/sector_size", 1024),
    ("segments[].size", "segments/0/size", "0"),
    ("segments[].size", "segments/0/size", "-1"),
    ("segments[].size", "segments/0/size", "dynamic\n"),
    ("segments[].offset", "segments/0/offset", "4096"),
    ("segments[].offset", "segments/0/offset", "016777216"),
    ("segments[].offset", "segments/0/offset", 16777216),
    ("segments", "segments", {}),
    ("segments", "segments/1", METADATA["segments"]["0"]),
    # A reencryption under way, a flag, a token.
    ("config.requirements", "config/requirements", {"mandatory": ["online-reencrypt-v2"]}),
    ("config.flags", "config/flags", ["allow-discards"]),
    ("config.json_size", "config/json_size", "16384"),
    ("tokens", "tokens", {"0": {"type": "systemd-tpm2", "keyslots": ["0"]}}),
    ("digests[].type", "digests/0/type", "none"),
    ("digests[].segments", "digests/0/segments", []),
    ("digests", "digests", {}),
    ("digests", "digests/1", METADATA["digests"]["0"]),
    ("unknown", "unknown", 1),
]


@pytest.mark.parametrize(("field", "path", "value"), ATTACKS)
def test_a_header_with_one_defect_is_refused_at_that_field(field: str, path: str, value: object) -> None:
    assert refused(changed(path, value)) == field


BINARY_DEFECTS: list[tuple[str, Callable[[], bytes]]] = [
    ("magic", lambda: with_bytes(0, b"SKUL")),
    ("magic", lambda: with_bytes(6, b"\0\1")),
    ("magic", lambda: with_bytes(8, (1 << 13).to_bytes(8, "big"))),
    ("magic", lambda: with_bytes(8, (1 << 23).to_bytes(8, "big"))),
    ("magic", lambda: with_bytes(168, b"X")),
    ("magic", lambda: RECORDED[:100]),
    ("magic", lambda: b""),
    ("hdr_size", lambda: with_bytes(8, (1 << 15).to_bytes(8, "big"))),
    ("hdr_size", lambda: RECORDED + b"\0"),
    ("hdr_size", lambda: RECORDED[:-1]),
    ("hdr_offset", lambda: with_bytes(256, b"\0" * 7 + b"\1")),
    ("checksum_alg", lambda: with_bytes(72, b"sha1\0\0")),
    ("padding", lambda: with_bytes(300, b"\1")),
    ("padding", lambda: with_bytes(4095, b"\1")),
    ("csum", lambda: RECORDED[:5000] + b" " + RECORDED[5001:]),
    ("csum", lambda: RECORDED[:448] + b"\0" + RECORDED[449:]),
    ("csum", lambda: RECORDED[:511] + b"\1" + RECORDED[512:]),
    ("json", lambda: with_json(json.dumps(METADATA).encode() + b"\0 {}")),
    ("json", lambda: with_json(b"")),
    ("json", lambda: with_json(b"[]")),
    ("json", lambda: with_json(b"\xff")),
    ("json", lambda: with_json(b"[" * 12000)),
]


@pytest.mark.parametrize(("field", "make"), BINARY_DEFECTS)
def test_a_binary_header_with_one_defect_is_refused(field: str, make: Callable[[], bytes]) -> None:
    assert refused(make()) == field


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}/{name}".lstrip("/"))
    else:
        yield path, value


def objects(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        yield path
        for name, inner in value.items():
            yield from objects(inner, f"{path}/{name}".lstrip("/"))


# What decides nothing: how a passphrase would be stretched, where keyslots lie, whose key the digest is of.
FREE = {
    "keyslots/0/kdf/salt",
    "keyslots/0/kdf/time",
    "keyslots/0/kdf/memory",
    "keyslots/0/kdf/cpus",
    "keyslots/0/area/offset",
    "keyslots/0/area/size",
    "digests/0/iterations",
    "digests/0/salt",
    "digests/0/digest",
    "digests/0/keyslots",
    "segments/0/size",  # the caller compares it
    "segments/0/offset",
    "config/keyslots_size",
}


def test_every_value_is_the_only_one_or_decides_nothing() -> None:
    others: list[Any] = [[], ["x"], "x", "1", "33554432", 7, 8.5, True, None, {}]
    passed = set()
    for path, value in leaves(METADATA):
        for other in others:
            if other == value:
                continue
            try:
                luks2.parse_luks2(changed(path, other))
                passed.add(path)
            except VolumeHeaderError:
                pass
    assert passed <= FREE


def test_no_object_takes_another_member() -> None:
    named = {"keyslots", "tokens", "segments", "digests"}  # objects by number
    for path in objects(METADATA):
        if path not in named:
            assert refused(changed(f"{path}/x".lstrip("/"), 1)), path


def test_every_bit_of_the_binary_header_is_covered_or_free() -> None:
    """Without a new checksum nothing passes; with one, label, seqid, salt and subsystem may be others."""
    free = set(range(16, 72)) | set(range(104, 168)) | set(range(208, 256)) | set(range(168, 204)) | set(range(448, 512))
    for at in range(512):
        flipped = bytes([RECORDED[at] ^ 1])
        assert refused(RECORDED[:at] + flipped + RECORDED[at + 1 :])
        if at not in free:
            assert refused(with_bytes(at, flipped)), at
