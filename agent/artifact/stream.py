"""One sealed file: where its segments lie, and sealing and opening one segment between two buffers of the caller.

The wire format is Tink's Streaming AEAD, key type AES256-GCM-HKDF-1MB; `FORMAT.md` gives every byte. Segments open
independently of each other and in any order. Does not know files, threads, sources or the manifest, and draws no
randomness: salt and nonce prefix come in with the header.

>>> layout = StreamLayout(plaintext_bytes=3 << 20)
>>> layout.segments, layout.ciphertext_bytes, layout.ciphertext_range(0), layout.plaintext_range(1)
(4, 3145832, (40, 1048536), (1048520, 1048560))
"""

from dataclasses import dataclass

import cbor2
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.errors import MalformedHeaderError, SegmentAuthenticationError

SEGMENT_BYTES = 1 << 20
"""One ciphertext segment with its tag. Segment 0 is shorter by the header, the last one may be shorter."""
TAG_BYTES = 16
HEADER_BYTES = 40
KEY_BYTES = 32
SALT_BYTES = 32
NONCE_PREFIX_BYTES = 7
MAX_SEGMENTS = 1 << 32
MAX_PLAINTEXT_BYTES = MAX_SEGMENTS * (SEGMENT_BYTES - TAG_BYTES) - HEADER_BYTES

_FILE_SCHEMA = "keyturn/v1/file"
_COMMITMENT_INFO = b"keyturn/v1/key-commitment\x00"


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What makes one sealing of one file unlike every other: 32 bytes of salt, 7 bytes of nonce prefix."""

    salt: bytes
    nonce_prefix: bytes

    def __post_init__(self) -> None:
        if len(self.salt) != SALT_BYTES or len(self.nonce_prefix) != NONCE_PREFIX_BYTES:
            raise RuntimeError("salt is 32 bytes, nonce prefix is 7 bytes")


def parse_header(data: bytes, file: int) -> StreamHeader:
    """The first 40 bytes of a blob: 0x28, salt (32), nonce prefix (7).

    Args:
        data: exactly 40 bytes.
        file: index in the file table, for the error.

    Raises:
        MalformedHeaderError: the length is not 40, or the first byte does not say 40.
    """
    # refusal: test_a_header_of_another_length_is_malformed test_the_length_byte_of_the_header_is_checked
    if len(data) != HEADER_BYTES or data[0] != HEADER_BYTES:
        raise MalformedHeaderError(file=file)
    return StreamHeader(salt=data[1:33], nonce_prefix=data[33:])


def pack_header(header: StreamHeader) -> bytes:
    """The inverse of `parse_header`: 40 bytes."""
    return bytes([HEADER_BYTES]) + header.salt + header.nonce_prefix


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """Where the segments of a file of `plaintext_bytes` lie, in its blob and in itself.

    An empty file has one segment, the tag alone. A file that fills its last segment has no empty one after it.
    """

    plaintext_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.plaintext_bytes <= MAX_PLAINTEXT_BYTES:
            raise RuntimeError("plaintext size is out of range")

    @property
    def segments(self) -> int:
        """1 to 2^32."""
        return -(-(self.plaintext_bytes + HEADER_BYTES) // (SEGMENT_BYTES - TAG_BYTES))

    @property
    def ciphertext_bytes(self) -> int:
        """Size of the blob: header, plaintext and one tag a segment."""
        return HEADER_BYTES + self.plaintext_bytes + self.segments * TAG_BYTES

    def ciphertext_range(self, segment: int) -> tuple[int, int]:
        """Offset in the blob and length, tag included, of one segment; segment 0 starts behind the header."""
        self._check(segment)
        start = max(segment * SEGMENT_BYTES, HEADER_BYTES)
        return start, min((segment + 1) * SEGMENT_BYTES, self.ciphertext_bytes) - start

    def plaintext_range(self, segment: int) -> tuple[int, int]:
        """Offset in the file and length of one segment."""
        self._check(segment)
        start = max(segment * (SEGMENT_BYTES - TAG_BYTES) - HEADER_BYTES, 0)
        return start, self.ciphertext_range(segment)[1] - TAG_BYTES

    def _check(self, segment: int) -> None:
        if not 0 <= segment < self.segments:
            raise RuntimeError("no such segment")


def associated_data(model_name: str, path: str, size: int, key_uri: str, sealed_version: int) -> bytes:
    """What a sealed file is bound to: a canonical CBOR array (RFC 8949 §4.2) of the schema and the arguments.

    Args:
        model_name: name of the model.
        path: path of the file within the model.
        size: plaintext size in bytes.
        key_uri: `kbs:///repo/type/tag`.
        sealed_version: the model version in which this file was last sealed.
    """
    return cbor2.dumps([_FILE_SCHEMA, model_name, path, size, key_uri, sealed_version], canonical=True)


def key_commitment(key: bytes | bytearray | memoryview, key_uri: str) -> bytes:
    """32 bytes that tell whether this is the key the model was sealed with, and nothing else about it."""
    _check_key(key)
    return HKDF(SHA256(), 32, salt=b"", info=_COMMITMENT_INFO + key_uri.encode()).derive(key)


class _Segments:
    """What sealing and opening share: the segment key, the nonces, the sizes."""

    def __init__(
        self,
        key: bytes | bytearray | memoryview,
        header: StreamHeader,
        associated_data: bytes,
        layout: StreamLayout,
        file: int,
    ) -> None:
        _check_key(key)
        # The associated data of the stream is the `info` of the key derivation; single segments carry none (Tink).
        self._aead = AESGCM(HKDF(SHA256(), KEY_BYTES, salt=header.salt, info=associated_data).derive(key))
        self._nonce_prefix = header.nonce_prefix
        self._layout = layout
        self._file = file

    def _nonce(self, segment: int) -> bytes:
        last = segment == self._layout.segments - 1
        return self._nonce_prefix + segment.to_bytes(4, "big") + bytes([last])

    def _check_sizes(self, segment: int, plaintext: memoryview, ciphertext: memoryview) -> None:
        length = self._layout.ciphertext_range(segment)[1]
        if ciphertext.nbytes != length or plaintext.nbytes != length - TAG_BYTES:
            raise RuntimeError("buffers do not have the size of this segment")


class SegmentOpener(_Segments):
    """Opens segments of one file, in any order and from any number of threads."""

    def open(self, segment: int, ciphertext: memoryview, out: memoryview) -> None:
        """Decrypt one segment straight into `out`.

        Args:
            segment: index; the layout gives both lengths.
            ciphertext: the segment with its tag.
            out: where the plaintext goes; after an error it holds zeros.

        Raises:
            SegmentAuthenticationError: the segment is not the one that was sealed here. Which check failed is not told.
        """
        self._check_sizes(segment, out, ciphertext)
        try:
            # refusal: test_we_open_what_tink_seals
            self._aead.decrypt_into(self._nonce(segment), ciphertext, None, out)
        except InvalidTag:
            # refusal: test_no_unauthentic_plaintext_is_left_in_the_buffer
            out[:] = bytes(len(out))  # GCM decrypts before it knows: what it left in `out` is not authentic
            raise SegmentAuthenticationError(file=self._file, segment=segment) from None


class SegmentSealer(_Segments):
    """Seals the segments of one file, each once: a nonce cannot come back with other data."""

    def __init__(self, key: bytes, header: StreamHeader, associated_data: bytes, layout: StreamLayout, file: int) -> None:
        """`claimed`: how many segments were, from the first on."""
        super().__init__(key, header, associated_data, layout, file)
        self.claimed = 0
        self._unsealed: set[int] = set()

    def claim(self) -> int:
        """The next segment, for whoever asks to seal. For one thread at a time; RuntimeError behind the last one."""
        self._layout.ciphertext_range(self.claimed)
        segment, self.claimed = self.claimed, self.claimed + 1
        self._unsealed.add(segment)
        return segment

    def seal(self, segment: int, plaintext: memoryview, out: memoryview) -> None:
        """Encrypt a claimed segment into `out`, 16 bytes longer than `plaintext`. From any number of threads."""
        self._check_sizes(segment, plaintext, out)
        try:
            # refusal: test_a_segment_is_sealed_once
            self._unsealed.remove(segment)
        except KeyError:
            raise RuntimeError("a segment is claimed, and sealed once") from None
        self._aead.encrypt_into(self._nonce(segment), plaintext, None, out)


def _check_key(key: bytes | bytearray | memoryview) -> None:
    if len(key) != KEY_BYTES:
        raise RuntimeError("key is 32 bytes")
