"""The header of a LUKS2 disk, as a copy in guest memory: what may stand in it, and nothing else.

Whoever has the disk can write every byte of a header, its checksum too, so nothing here is believed: it is read once, each
value must be one of a list, and the caller compares the rest with the authenticated manifest. No byte of it reaches the kernel.
The key comes from elsewhere: keyslots, their passphrases and tokens are never opened, and must all the same be of the kind that
cryptsetup makes for AES-XTS.

Follows "LUKS2 On-Disk Format Specification", version 1.1.1 (2022-04-05): 2.1 binary header, 3 JSON; and Trail of Bits,
"Vulnerabilities in LUKS2 disk encryption for confidential VMs" (2025-10-30; CVE-2025-59054, CVE-2025-58356) on what a host
has put there: a null cipher in segment or keyslot, a reencryption that never ends, another header after the check.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from agent.closed import Ident
from agent.errors import VolumeHeaderError

BINARY_BYTES = 4096
"""The binary header; JSON fills the rest of a copy."""
HEADER_SIZES = tuple(1 << n for n in range(14, 23))
"""16 KiB to 4 MiB, of one of the two copies."""
MAGIC = b"LUKS\xba\xbe"
VERSION = 2
CIPHER = "aes-xts-plain64"
KEY_BYTES = 64
"""Of AES-256-XTS: two keys."""
# magic, version, hdr_size, seqid, label, checksum_alg, salt, uuid, subsystem, hdr_offset, padding, csum; big endian
BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
CHECKSUM_AT, CHECKSUM_BYTES = 448, 64

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_Number = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,18})\Z")]
_Hash = Literal["sha256", "sha384", "sha512"]


@dataclass(frozen=True, slots=True)
class Luks2Header:
    """What one header says of its disk.

    Attributes:
        uuid: in lower case.
        offset: of the data segment, bytes from the start of the disk.
        size: of it in bytes; None: to the end of the disk.
        sector_size: of one encryption, 512 or 4096 bytes.
    """

    uuid: str
    offset: int
    size: int | None
    sector_size: int


# --- the JSON as it lies on the disk ----------------------------------------------------------------------------------


class _Object(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown members are errors everywhere."""


class _Kdf(_Object, frozen=True):
    type: Literal["pbkdf2", "argon2i", "argon2id"]
    salt: str
    hash: _Hash | None = None
    iterations: int | None = None
    time: int | None = None
    memory: int | None = None
    cpus: int | None = None


class _AntiForensic(_Object, frozen=True):
    type: Literal["luks1"]
    stripes: Literal[4000]
    hash: _Hash


class _Area(_Object, frozen=True):
    type: Literal["raw"]
    offset: _Number
    size: _Number
    encryption: Literal["aes-xts-plain64"]
    key_size: Literal[32, 64]


class _Keyslot(_Object, frozen=True):
    type: Literal["luks2"]
    key_size: Literal[64]
    af: _AntiForensic
    area: _Area
    kdf: _Kdf
    priority: Literal[0, 1, 2] | None = None


class _Segment(_Object, frozen=True):
    type: Literal["crypt"]
    offset: _Number
    size: Annotated[str, msgspec.Meta(pattern=r"^(dynamic|[1-9][0-9]{0,18})\Z")]
    iv_tweak: Literal["0"]
    encryption: Literal["aes-xts-plain64"]
    sector_size: Literal[512, 4096]


class _Digest(_Object, frozen=True):
    type: Literal["pbkdf2"]
    keyslots: tuple[str, ...]
    segments: tuple[Literal["0"]]
    hash: _Hash
    iterations: int
    salt: str
    digest: str


class _Config(_Object, frozen=True):
    json_size: _Number
    keyslots_size: _Number
    flags: tuple[()] = ()


class _Metadata(_Object, frozen=True):
    keyslots: Annotated[dict[str, _Keyslot], msgspec.Meta(max_length=32)]
    tokens: Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=0)]
    segments: Annotated[dict[Literal["0"], _Segment], msgspec.Meta(min_length=1)]
    digests: Annotated[dict[str, _Digest], msgspec.Meta(min_length=1, max_length=1)]
    config: _Config


# --- reading ----------------------------------------------------------------------------------------------------------


def look(binary: bytes) -> tuple[str, int] | None:
    """UUID and length of a copy, as the first 4096 bytes of a disk say; None: they are no LUKS2 header. Checks nothing more."""
    if len(binary) != BINARY_BYTES:
        return None
    magic, version, size, *_, uuid, _, _, _, _ = BINARY.unpack_from(binary)
    text = _text(uuid)
    if (magic, version) != (MAGIC, VERSION) or size not in HEADER_SIZES or not UUID.fullmatch(text):
        return None
    return text, size


def parse_luks2(header: bytes) -> Luks2Header:
    """Check the first copy of a header.

    Args:
        header: all of it, as `look` says how long; read once, and never again.

    Raises:
        VolumeHeaderError: something in it is not on the list; `field` says what.
    """
    # 1. A whole header, and the one that its checksum is over: what is damaged is told apart from what is not allowed.
    found = look(header[:BINARY_BYTES])
    # refusal: test_a_binary_header_with_one_defect_is_refused
    _require(found is not None, "magic")
    assert found is not None
    uuid, size = found
    _, _, _, _, _, algorithm, _, _, _, offset, padding, checksum = BINARY.unpack_from(header)
    # refusal: test_a_binary_header_with_one_defect_is_refused
    _require(len(header) == size, "hdr_size")
    _require(offset == 0, "hdr_offset")
    _require(_text(algorithm) == "sha256", "checksum_alg")
    _require(not any(padding) and not any(header[BINARY.size : BINARY_BYTES]), "padding")
    _require(checksum == checksum_of(header), "csum")
    # 2. Its JSON: known members with known values only.
    text, _, rest = header[BINARY_BYTES:].partition(b"\0")
    # refusal: test_a_binary_header_with_one_defect_is_refused
    _require(not any(rest), "json")
    try:
        metadata = msgspec.json.decode(text, type=_Metadata)
    except msgspec.ValidationError as error:
        raise VolumeHeaderError(_field(str(error))) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise VolumeHeaderError(Ident("json")) from None  # msgspec quotes what it read
    # 3. What no type can say.
    segment = metadata.segments["0"]
    # refusal: test_a_header_with_one_defect_is_refused_at_that_field
    _require(int(metadata.config.json_size) == size - BINARY_BYTES, "config.json_size")
    _require(int(segment.offset) >= 2 * size + int(metadata.config.keyslots_size), "segments[].offset")
    return Luks2Header(
        uuid=uuid,
        offset=int(segment.offset),
        size=None if segment.size == "dynamic" else int(segment.size),
        sector_size=segment.sector_size,
    )


def checksum_of(header: bytes) -> bytes:
    """SHA-256 over one copy whose own checksum is zero, as the 64 bytes that stand there."""
    zeroed = header[:CHECKSUM_AT] + bytes(CHECKSUM_BYTES) + header[CHECKSUM_AT + CHECKSUM_BYTES :]
    return hashlib.sha256(zeroed).digest().ljust(CHECKSUM_BYTES, b"\0")


def with_checksum(header: bytes) -> bytes:
    """One copy with the checksum that it should have."""
    return header[:CHECKSUM_AT] + checksum_of(header) + header[CHECKSUM_AT + CHECKSUM_BYTES :]


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def _field(text: str) -> Ident:
    """Where msgspec found it; never what."""
    where = re.search(r"at (?:`key` in )?`\$\.?([^`]*)`$", text)
    path = where[1] if where else ""
    member = re.search(r"(?:unknown field|required field) `([^`]*)`", text)
    if member:
        path = f"{path}.{member[1]}" if path else member[1]
    return Ident.of_peer(path.replace("[...]", "[]") or "json")


def _require(holds: bool, field: str) -> None:
    # refusal: test_a_header_with_one_defect_is_refused_at_that_field
    if not holds:
        raise VolumeHeaderError(Ident(field))
