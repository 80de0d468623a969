"""Initdata: the document a confidential guest is launched with, its digest, and the disk that carries it.

Owns both formats and the way a digest fits the TEE's field. Does not choose between documents (`config_source.py`) and does
not compare with the TEE's field (`evidence/collect.py`): until that is done, every byte here is the host's word.
Follows Trustee's `kbs/docs/initdata.md` (confidential-containers/trustee 78962cd) and kata-agent's `initdata.rs`
(kata-containers 181511a); stricter where two readers could differ. Standard library only: the supervisor imports it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.closed import Ident
from agent.errors import ConfigConflictError, InitdataError, InitdataProblem

MAX_DOCUMENT_BYTES = 4 << 20
MAX_GZIP_BYTES = 1 << 20
DEVICE = Ident("initdata-device")
ALGORITHMS = ("sha256", "sha384", "sha512")  # Trustee's text writes sha-384 and names sm3; kata-agent takes these three

_MAGIC = b"initdata"
_LENGTH_BYTES = 8  # little endian, of the gzip stream
_BLOCK_BYTES = 512
_GZIP = 16 + 15  # zlib's wbits: a gzip header and trailer, the largest window
_WHOLE_DISK = re.compile(r"(vd|sd)[a-z]+")  # virtio-blk and virtio-scsi, the two that Kata's shims plug
_VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Initdata:
    """A parsed document.

    Attributes:
        digest: over exactly the document's bytes, by its own algorithm: 32, 48 or 64 bytes. `fit` it to the TEE's field.
        entries: the `[data]` table. Not printed: it may hold secrets.
    """

    digest: bytes
    entries: Mapping[str, str] = field(repr=False)

    def entry(self, name: str) -> bytes | None:
        """The UTF-8 text of one entry."""
        text = self.entries.get(name)
        return None if text is None else text.encode()


def parse_initdata(document: bytes, source: Ident) -> Initdata:
    """Parse an initdata document of at most 4 MiB.

    Top-level keys beside version, algorithm and data are ignored, as Kata does; the digest covers them all the same.

    Args:
        document: UTF-8 TOML, the bytes the digest is taken over.
        source: where it came from, for the error.

    Raises:
        InitdataError: it cannot be used; never with a value of it.
    """
    # refusal: test_every_defect_of_a_document_has_its_name
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InitdataError(source, InitdataProblem.TOO_LARGE)
    import hashlib  # only where there is a document
    import tomllib

    try:
        tree = tomllib.loads(document.decode("utf-8"))
    except UnicodeDecodeError:
        raise InitdataError(source, InitdataProblem.NOT_UTF8) from None  # the exception holds the document
    except (RecursionError, ValueError):  # ValueError: TOMLDecodeError, or an integer of thousands of digits
        raise InitdataError(source, InitdataProblem.NOT_TOML) from None
    # refusal: test_every_defect_of_a_document_has_its_name
    if tree.get("version") != _VERSION:
        raise InitdataError(source, InitdataProblem.VERSION)
    algorithm = tree.get("algorithm")
    # refusal: test_every_defect_of_a_document_has_its_name
    if algorithm not in ALGORITHMS:
        raise InitdataError(source, InitdataProblem.ALGORITHM)
    entries = tree.get("data")
    # refusal: test_every_defect_of_a_document_has_its_name
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise InitdataError(source, InitdataProblem.DATA)
    return Initdata(hashlib.new(algorithm, document).digest(), entries)


def pack_document(entries: Mapping[str, str], algorithm: str) -> bytes:
    """A document with these entries, in their order; the same entries give the same bytes.

    A text stands there as it is wherever TOML allows it, so that a person can compare it with the file that it came from.

    Args:
        entries: by their names; texts that can be encoded in UTF-8.
        algorithm: one of `ALGORITHMS`.
    """
    lines = [f'version = "{_VERSION}"', f'algorithm = "{algorithm}"', "", "[data]"]
    lines += [f"{_basic(name)} = {_literal(text)}" for name, text in entries.items()]
    return "\n".join([*lines, ""]).encode()


def _literal(text: str) -> str:
    """As a multi-line literal string where that says exactly this, else on one line with escapes."""
    if "'''" in text or text.endswith("'") or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        return _basic(text)
    return f"'''\n{text}'''"


def _basic(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's; it lets one pass


def fit(digest: bytes, length: int) -> bytes:
    """A digest as the TEE's field holds it: cut, or zero-padded on the right.

    Args:
        digest: 32, 48 or 64 bytes; empty for a guest without initdata, whose field is zero.
        length: of the field in bytes: 32 for HOST_DATA (SEV-SNP), 48 for MRCONFIGID (TDX).

    Spec: `kbs/docs/initdata.md`; kata-types `initdata.rs`, adjust_digest.
    """
    return digest[:length].ljust(length, b"\0")


def find_device(root: Path = Path("/")) -> bytes | None:
    """The document on the one whole disk that is an initdata device, None without one.

    kata-agent takes the first disk it meets, in no order; here two documents are an error.

    Args:
        root: the file system with `sys/class/block` and `dev`.

    Raises:
        InitdataError: a device has the magic and no document.
        ConfigConflictError: two devices hold two documents.
    """
    try:
        names = sorted(path.name for path in (root / "sys/class/block").iterdir())
    except OSError:  # no sysfs, or a kernel without block devices
        return None
    found = None
    for name in filter(_WHOLE_DISK.fullmatch, names):
        document = read_device(root / "dev" / name)
        # refusal: test_two_documents_are_a_conflict
        if found is not None and document is not None and document != found:
            raise ConfigConflictError(DEVICE, DEVICE)
        found = document if found is None else found
    return found


def read_device(path: Path) -> bytes | None:
    """The document on a raw initdata disk: `initdata`, the length as u64 little endian, gzip, zeros up to 512 bytes.

    Args:
        path: a block device; a file in tests.

    Returns:
        At most 4 MiB. None when the disk is something else or cannot be read: what a guest misses for it shows when the
        TEE's field is compared.

    Raises:
        InitdataError: the disk has the magic and no document.
    """
    try:
        with path.open("rb") as disk:
            header = disk.read(len(_MAGIC) + _LENGTH_BYTES)
            if not header.startswith(_MAGIC):
                return None
            length = int.from_bytes(header[len(_MAGIC) :], "little")
            if len(header) < len(_MAGIC) + _LENGTH_BYTES or length > MAX_GZIP_BYTES:
                raise InitdataError(DEVICE, InitdataProblem.LENGTH)
            compressed = disk.read(length)
    except OSError:
        return None
    if len(compressed) < length:
        raise InitdataError(DEVICE, InitdataProblem.LENGTH)
    return unpack_gzip(compressed)


def pack_device(document: bytes) -> bytes:
    """The disk that `read_device` reads; the same document gives the same bytes.

    Raises:
        InitdataError: no guest would read it: above 4 MiB, or above 1 MiB compressed.
    """
    compressed = pack_gzip(document)
    disk = _MAGIC + len(compressed).to_bytes(_LENGTH_BYTES, "little") + compressed
    return disk + bytes(-len(disk) % _BLOCK_BYTES)


def pack_gzip(document: bytes) -> bytes:
    """One gzip member without name or time; Kata's annotation is the base64 of it.

    Raises:
        InitdataError: as `pack_device`.
    """
    import zlib

    if len(document) > MAX_DOCUMENT_BYTES:
        raise InitdataError(DEVICE, InitdataProblem.TOO_LARGE)
    compressed = zlib.compress(document, level=9, wbits=_GZIP)
    if len(compressed) > MAX_GZIP_BYTES:
        raise InitdataError(DEVICE, InitdataProblem.LENGTH)
    return compressed


def unpack_gzip(compressed: bytes) -> bytes:
    """The document of one whole gzip member: at most 4 MiB.

    Raises:
        InitdataError: there is none.
    """
    import zlib

    if len(compressed) > MAX_GZIP_BYTES:
        raise InitdataError(DEVICE, InitdataProblem.LENGTH)

    stream = zlib.decompressobj(wbits=_GZIP)
    try:
        document = stream.decompress(compressed, MAX_DOCUMENT_BYTES + 1)  # 1 MiB of gzip can stand for 1 GiB
    except zlib.error:
        raise InitdataError(DEVICE, InitdataProblem.GZIP) from None
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InitdataError(DEVICE, InitdataProblem.TOO_LARGE)
    # Go's reader goes on with a second member and Rust's GzDecoder does not: there must be none.
    # refusal: test_every_defect_of_a_device_has_its_name
    if not stream.eof or stream.unused_data:
        raise InitdataError(DEVICE, InitdataProblem.GZIP)
    return document
