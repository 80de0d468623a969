"""A model key as a Tink JSON keyset, for providers who keep their keys with Tink: its 32 bytes, and nothing negotiated.

A keyset with one key, enabled, primary and RAW, of the one type and parameters that the sealed model has
(`artifact/FORMAT.md`). The secret part is decoded number by number from locked memory into locked memory: no Python string or
bytes object ever holds it. Spec: tink.proto and aes_gcm_hkdf_streaming.proto of Tink, in proto3's JSON form.
"""

import re
from collections.abc import Iterator
from typing import Any

from agent.jose import parse_object

MAX_KEYSET_BYTES = 2 << 10

_KEY_BYTES = 32
TYPE = "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey"
_VALUE = re.compile(rb'"value"\s*:\s*"([A-Za-z0-9+/]*)="')
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_DIGITS = {character: number for number, character in enumerate(_ALPHABET)}
# AesGcmHkdfStreamingKey without its key: version 0 is not written; params: segments of 1 MiB, 32-byte keys, SHA256.
_PARAMETERS = bytes.fromhex("12080880804010201803")
_KEY_VALUE = bytes.fromhex("1a20")


def parse_keyset(keyset: bytes) -> bytes:
    """The 32 bytes of a keyset, for those who hold keys anyway. Raises ValueError as `copy_key`."""
    out = bytearray(_KEY_BYTES)
    copy_key(memoryview(keyset), memoryview(out))
    return bytes(out)


def copy_key(keyset: memoryview, out: memoryview) -> None:
    """Write the key of a keyset into `out`.

    Args:
        keyset: UTF-8 JSON, at most 2 KiB.
        out: 32 bytes; after an error it holds nothing to be used.

    Raises:
        ValueError: not exactly such a keyset. Says nothing about it.
    """
    # 1. Where the secret stands, so that everything else can be parsed without it.
    found = list(_VALUE.finditer(keyset))
    # refusal: test_a_keyset_that_is_not_exactly_ours_is_refused
    if len(found) != 1:
        raise ValueError("not one key")
    start, end = found[0].span(1)
    rest = bytes(keyset[:start]) + bytes(keyset[found[0].end() - 1 :])
    # 2. One key, and it is the one that counts.
    document: Any = parse_object(rest, MAX_KEYSET_BYTES)
    try:
        (key,) = document["key"]
        about = {name: value for name, value in key.items() if name != "keyData"}
        expected = {"status": "ENABLED", "keyId": document["primaryKeyId"], "outputPrefixType": "RAW"}
        data = {"typeUrl": TYPE, "value": "", "keyMaterialType": "SYMMETRIC"}
        # refusal: test_a_keyset_that_is_not_exactly_ours_is_refused
        if set(document) != {"primaryKeyId", "key"} or about != expected or key["keyData"] != data:
            raise ValueError("not the key of a sealed model")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not a keyset") from None
    # 3. The message behind it: parameters and key, each in the one way that Tink writes them.
    message = _PARAMETERS + _KEY_VALUE
    decoded = _decode(keyset[start:end])
    # refusal: test_a_keyset_that_is_not_exactly_ours_is_refused
    if (end - start) * 6 // 8 != len(message) + _KEY_BYTES or any(next(decoded) != byte for byte in message):
        raise ValueError("not the parameters of a sealed model")
    for i, byte in enumerate(decoded):
        out[i] = byte


def _decode(text: memoryview) -> Iterator[int]:
    """The bytes of base64 without its padding; bits that fill no byte are zero, or there were two ways to write it."""
    held = bits = 0
    for character in text:
        held, bits = held << 6 | _DIGITS[character], bits + 6
        if bits >= 8:
            bits -= 8
            yield held >> bits
            held &= (1 << bits) - 1
    # refusal: test_a_keyset_that_is_not_exactly_ours_is_refused
    if held:
        raise ValueError("not base64")
