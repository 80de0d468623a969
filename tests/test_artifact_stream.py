"""The stream against Tink for Python, in both directions, and against every way to tamper with it."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import tink
from hypothesis import given
from hypothesis import strategies as st
from tink import secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from agent.artifact.stream import (
    HEADER_BYTES,
    MAX_PLAINTEXT_BYTES,
    MAX_SEGMENTS,
    SEGMENT_BYTES,
    TAG_BYTES,
    SegmentOpener,
    SegmentSealer,
    StreamHeader,
    StreamLayout,
    associated_data,
    key_commitment,
    pack_header,
    parse_header,
)
from agent.errors import AgentError, MalformedHeaderError, SegmentAuthenticationError

FIRST = SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES  # plaintext bytes of a full first segment
OTHER = SEGMENT_BYTES - TAG_BYTES
SIZES = [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + OTHER - 1, FIRST + OTHER, FIRST + OTHER + 1]
KEY = bytes(range(32))
BOUND = associated_data("model", "a/b.gguf", 7, "kbs:///default/model/key", 3)


def seal(plaintext: bytes, key: bytes = KEY, bound: bytes = BOUND) -> bytes:
    layout = StreamLayout(len(plaintext))
    header = StreamHeader(os.urandom(32), os.urandom(7))
    sealer = SegmentSealer(key, header, bound, layout, 0)
    blob = bytearray(layout.ciphertext_bytes)
    blob[:HEADER_BYTES] = pack_header(header)
    for i in range(layout.segments):
        start, length = layout.plaintext_range(i)
        at, sealed = layout.ciphertext_range(i)
        sealer.seal(sealer.claim(), memoryview(plaintext)[start : start + length], memoryview(blob)[at : at + sealed])
    return bytes(blob)


def unseal(blob: bytes, size: int, key: bytes = KEY, bound: bytes = BOUND, only: int | None = None) -> bytes:
    layout = StreamLayout(size)
    opener = SegmentOpener(key, parse_header(blob[:HEADER_BYTES], 0), bound, layout, 0)
    plaintext = bytearray(size)
    for i in range(layout.segments) if only is None else [only]:
        start, length = layout.plaintext_range(i)
        at, sealed = layout.ciphertext_range(i)
        opener.open(i, memoryview(blob)[at : at + sealed], memoryview(plaintext)[start : start + length])
    return bytes(plaintext)


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> streaming_aead.StreamingAead:
    """Tink's own AES256_GCM_HKDF_1MB under KEY."""
    streaming_aead.register()
    parameters = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=1 << 20, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(version=0, key_value=KEY, params=parameters)
    data = tink_pb2.KeyData(
        type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
        value=key.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    entry = tink_pb2.Keyset.Key(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry])
    handle = tink.proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def test_these_are_the_parameters_of_the_template_tink_publishes() -> None:
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    key_format = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKeyFormat.FromString(template.value)
    assert (key_format.key_size, key_format.params.ciphertext_segment_size, key_format.params.derived_key_size) == (
        32,
        1 << 20,
        32,
    )
    assert key_format.params.hkdf_hash_type == common_pb2.SHA256


@pytest.mark.parametrize("size", SIZES)
def test_tink_opens_what_we_seal(oracle: streaming_aead.StreamingAead, size: int) -> None:
    plaintext = os.urandom(size)
    with oracle.new_decrypting_stream(io.BytesIO(seal(plaintext)), BOUND) as stream:
        assert stream.read() == plaintext


@pytest.mark.parametrize("size", SIZES)
def test_we_open_what_tink_seals(oracle: streaming_aead.StreamingAead, size: int) -> None:
    plaintext = os.urandom(size)

    class Kept(io.BytesIO):
        def close(self) -> None:  # Tink closes what it writes to
            pass

    kept = Kept()
    with oracle.new_encrypting_stream(kept, BOUND) as stream:
        stream.write(plaintext)
    blob = kept.getvalue()
    assert len(blob) == StreamLayout(size).ciphertext_bytes
    assert unseal(blob, size) == plaintext


def test_tink_refuses_our_blob_under_other_associated_data(oracle: streaming_aead.StreamingAead) -> None:
    with pytest.raises(tink.TinkError), oracle.new_decrypting_stream(io.BytesIO(seal(b"x")), BOUND + b"x") as stream:
        stream.read()


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "segments", "blob"),
    [
        (0, 1, 56),
        (1, 1, 57),
        (FIRST, 1, SEGMENT_BYTES),
        (FIRST + 1, 2, SEGMENT_BYTES + 17),
        (FIRST + OTHER, 2, 2 * SEGMENT_BYTES),
        (MAX_PLAINTEXT_BYTES, MAX_SEGMENTS, MAX_SEGMENTS * SEGMENT_BYTES),
    ],
)
def test_the_layout_has_the_sizes_of_the_format(size: int, segments: int, blob: int) -> None:
    assert (StreamLayout(size).segments, StreamLayout(size).ciphertext_bytes) == (segments, blob)


@given(st.integers(0, 5 * SEGMENT_BYTES))
def test_segments_tile_plaintext_and_blob_without_gap_or_overlap(size: int) -> None:
    layout = StreamLayout(size)
    plain, sealed = 0, HEADER_BYTES
    for i in range(layout.segments):
        assert layout.plaintext_range(i)[0] == plain
        assert layout.ciphertext_range(i)[0] == sealed
        assert i == 0 or sealed == i * SEGMENT_BYTES
        plain += layout.plaintext_range(i)[1]
        sealed += layout.ciphertext_range(i)[1]
    assert (plain, sealed) == (size, layout.ciphertext_bytes)
    assert size == 0 or layout.plaintext_range(layout.segments - 1)[1] > 0


@pytest.mark.parametrize("size", [-1, MAX_PLAINTEXT_BYTES + 1])
def test_a_size_beyond_the_format_is_our_bug(size: int) -> None:
    with pytest.raises(RuntimeError):
        StreamLayout(size)


@pytest.mark.parametrize("segment", [-1, 1])
def test_a_segment_beyond_the_layout_is_our_bug(segment: int) -> None:
    with pytest.raises(RuntimeError):
        StreamLayout(0).ciphertext_range(segment)
    with pytest.raises(RuntimeError):
        StreamLayout(0).plaintext_range(segment)


# --- header -----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=64) | st.binary(min_size=39, max_size=39).map(lambda rest: b"\x28" + rest))
def test_a_header_parses_and_packs_back_or_is_malformed(data: bytes) -> None:
    try:
        header = parse_header(data, 5)
    except MalformedHeaderError as error:
        assert error.file == 5
        assert len(data) != 40 or data[0] != 40
    else:
        assert pack_header(header) == data


def test_a_header_of_other_lengths_is_our_bug() -> None:
    with pytest.raises(RuntimeError):
        StreamHeader(bytes(31), bytes(7))
    with pytest.raises(RuntimeError):
        StreamHeader(bytes(32), bytes(8))


# --- tampering --------------------------------------------------------------------------------------------------------

PLAINTEXT = bytes(FIRST + OTHER + 100)
BLOB = seal(PLAINTEXT)


def flipped(blob: bytes, offset: int) -> bytes:
    return blob[:offset] + bytes([blob[offset] ^ 1]) + blob[offset + 1 :]


@pytest.mark.parametrize(
    ("offset", "segment"),
    [
        (1, 0),  # salt
        (32, 2),
        (33, 0),  # nonce prefix
        (39, 1),
        (40, 0),  # first byte of the first segment
        (SEGMENT_BYTES - TAG_BYTES - 1, 0),
        (SEGMENT_BYTES - TAG_BYTES, 0),  # its tag
        (SEGMENT_BYTES - 1, 0),
        (SEGMENT_BYTES, 1),
        (2 * SEGMENT_BYTES - 1, 1),
        (2 * SEGMENT_BYTES, 2),
        (len(BLOB) - 1, 2),
    ],
)
def test_a_flipped_bit_anywhere_is_found_in_its_segment(offset: int, segment: int) -> None:
    with pytest.raises(SegmentAuthenticationError) as caught:
        unseal(flipped(BLOB, offset), len(PLAINTEXT), only=segment)
    assert (caught.value.file, caught.value.segment) == (0, segment)


@pytest.mark.parametrize("data", [b"", BLOB[:39], BLOB[:41]], ids=len)
def test_a_header_of_another_length_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedHeaderError):
        parse_header(data, 0)


def test_the_length_byte_of_the_header_is_checked() -> None:
    with pytest.raises(MalformedHeaderError):
        unseal(flipped(BLOB, 0), len(PLAINTEXT))


def test_a_segment_opens_in_its_own_place_only() -> None:
    plaintext = bytes(FIRST + 2 * OTHER + 1)
    blob = seal(plaintext)
    swapped = blob[:SEGMENT_BYTES] + blob[2 * SEGMENT_BYTES : 3 * SEGMENT_BYTES] + blob[SEGMENT_BYTES : 2 * SEGMENT_BYTES]
    swapped += blob[3 * SEGMENT_BYTES :]
    for segment in (1, 2):
        with pytest.raises(SegmentAuthenticationError):
            unseal(swapped, len(plaintext), only=segment)
    assert unseal(swapped, len(plaintext), only=3)[-1:] == b"\x00"


def test_a_segment_of_another_file_does_not_open() -> None:
    other = seal(PLAINTEXT)
    mixed = BLOB[:SEGMENT_BYTES] + other[SEGMENT_BYTES : 2 * SEGMENT_BYTES] + BLOB[2 * SEGMENT_BYTES :]
    with pytest.raises(SegmentAuthenticationError):
        unseal(mixed, len(PLAINTEXT), only=1)


def test_a_file_cut_at_a_segment_boundary_is_found_by_its_last_segment() -> None:
    with pytest.raises(SegmentAuthenticationError) as caught:
        unseal(BLOB[: 2 * SEGMENT_BYTES], FIRST + OTHER)
    assert caught.value.segment == 1


def test_a_file_extended_by_a_segment_is_found_by_the_one_that_was_last() -> None:
    blob = seal(bytes(FIRST))
    with pytest.raises(SegmentAuthenticationError) as caught:
        unseal(blob + bytes(17), FIRST + 1)
    assert caught.value.segment == 0


@pytest.mark.parametrize(
    "bound",
    [
        associated_data("other", "a/b.gguf", 7, "kbs:///default/model/key", 3),
        associated_data("model", "a/c.gguf", 7, "kbs:///default/model/key", 3),
        associated_data("model", "a/b.gguf", 8, "kbs:///default/model/key", 3),
        associated_data("model", "a/b.gguf", 7, "kbs:///default/model/other", 3),
        associated_data("model", "a/b.gguf", 7, "kbs:///default/model/key", 4),
        b"",
    ],
)
def test_every_part_of_the_associated_data_counts(bound: bytes) -> None:
    with pytest.raises(SegmentAuthenticationError):
        unseal(seal(b"weights"), 7, bound=bound)


def test_another_key_opens_nothing() -> None:
    with pytest.raises(SegmentAuthenticationError):
        unseal(seal(b"weights"), 7, key=bytes(32))


def test_no_unauthentic_plaintext_is_left_in_the_buffer() -> None:
    blob = flipped(seal(b"\xff" * 4096), 56 + 4095)
    out = bytearray(b"\xaa" * 4096)
    opener = SegmentOpener(KEY, parse_header(blob[:40], 0), BOUND, StreamLayout(4096), 0)
    with pytest.raises(SegmentAuthenticationError):
        opener.open(0, memoryview(blob)[40:], memoryview(out))
    assert out == bytes(4096)


@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_any_change_to_a_small_blob_is_one_of_our_errors(plaintext: bytes, offset: int, change: int) -> None:
    blob = bytearray(seal(plaintext))
    blob[offset % len(blob)] ^= change
    with pytest.raises(AgentError):
        unseal(bytes(blob), len(plaintext))


# --- use --------------------------------------------------------------------------------------------------------------


def test_segments_open_from_many_threads_at_once() -> None:
    plaintext = os.urandom(4 * SEGMENT_BYTES)
    blob, layout = seal(plaintext), StreamLayout(4 * SEGMENT_BYTES)
    opener = SegmentOpener(KEY, parse_header(blob[:40], 0), BOUND, layout, 0)

    def matches(i: int) -> bool:
        (at, sealed), (start, length) = layout.ciphertext_range(i), layout.plaintext_range(i)
        out = bytearray(length)
        opener.open(i, memoryview(blob)[at : at + sealed], memoryview(out))
        return out == plaintext[start : start + length]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(matches, [i % layout.segments for i in range(40)]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_segment_is_sealed_once(order: tuple[int, ...]) -> None:
    layout = StreamLayout(2 * SEGMENT_BYTES)
    sealer = SegmentSealer(KEY, StreamHeader(bytes(32), bytes(7)), BOUND, layout, 0)
    buffers = [
        (memoryview(bytes(length)), memoryview(bytearray(length + TAG_BYTES)))
        for _, length in (layout.plaintext_range(segment) for segment in range(3))
    ]
    with pytest.raises(RuntimeError):
        sealer.seal(0, *buffers[0])
    assert [sealer.claim() for _ in order] == [0, 1, 2]
    with pytest.raises(RuntimeError):
        sealer.claim()
    for segment in order:
        sealer.seal(segment, *buffers[segment])
        with pytest.raises(RuntimeError):
            sealer.seal(segment, *buffers[segment])
    for segment in order:
        with pytest.raises(RuntimeError):
            sealer.seal(segment, *buffers[segment])


@pytest.mark.parametrize(("plain", "sealed"), [(8, 23), (7, 24), (7, 22), (6, 23)])
def test_buffers_of_the_wrong_size_are_our_bug(plain: int, sealed: int) -> None:
    header = StreamHeader(bytes(32), bytes(7))
    with pytest.raises(RuntimeError):
        SegmentOpener(KEY, header, BOUND, StreamLayout(7), 0).open(0, memoryview(bytes(sealed)), memoryview(bytearray(plain)))
    with pytest.raises(RuntimeError):
        SegmentSealer(KEY, header, BOUND, StreamLayout(7), 0).seal(0, memoryview(bytes(plain)), memoryview(bytearray(sealed)))


def test_a_key_that_is_not_32_bytes_is_our_bug() -> None:
    with pytest.raises(RuntimeError):
        SegmentOpener(KEY[:16], StreamHeader(bytes(32), bytes(7)), BOUND, StreamLayout(0), 0)
    with pytest.raises(RuntimeError):
        key_commitment(KEY + b"x", "kbs:///a/b/c")


def test_a_key_may_lie_in_any_buffer() -> None:
    assert unseal(seal(b"weights"), 7, key=memoryview(bytearray(KEY))) == b"weights"  # type: ignore[arg-type]


# --- frozen bytes -----------------------------------------------------------------------------------------------------


def test_the_associated_data_is_the_cbor_of_the_format() -> None:
    expected = "86" + "6f" + b"keyturn/v1/file".hex() + "65" + b"model".hex() + "68" + b"a/b.gguf".hex() + "07"
    expected += "7818" + b"kbs:///default/model/key".hex() + "03"
    assert BOUND.hex() == expected


def test_the_key_commitment_is_rfc5869_by_hand_and_tells_key_and_uri_apart() -> None:
    import hashlib
    import hmac

    prk = hmac.digest(bytes(32), KEY, hashlib.sha256)
    info = b"keyturn/v1/key-commitment\x00kbs:///a/b/c"
    assert key_commitment(KEY, "kbs:///a/b/c") == hmac.digest(prk, info + b"\x01", hashlib.sha256)
    assert len({key_commitment(k, u) for k in (KEY, bytes(32)) for u in ("kbs:///a/b/c", "kbs:///a/b/d")}) == 4


def test_a_sealed_file_has_the_bytes_it_always_had() -> None:
    sealer = SegmentSealer(KEY, StreamHeader(bytes(32), bytes(7)), BOUND, StreamLayout(7), 0)
    out = bytearray(23)
    sealer.seal(sealer.claim(), memoryview(b"weights"), memoryview(out))
    assert out.hex() == "cbb4f6fef1e70258ca2347b79ff5e5f84b3a1381d17ec0"
