"""JWE of jwcrypto, which is what KServe seals with, opened in pieces; and everything that is nearly one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jwcrypto import jwe as jwcrypto_jwe
from jwcrypto import jwk as jwcrypto_jwk

from agent.artifact.compact_jwe import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    MAX_PLAINTEXT_BYTES,
    TAIL_BYTES,
    CompactJwe,
    JweOpener,
    decode,
    parse_compact,
)
from agent.errors import KeyMismatchError
from agent.jose import pack_b64url

KEY = bytes(range(32))


def sealed(plaintext: bytes, alg: str = "A256KW", key: bytes = KEY, **header: str) -> bytes:
    token = jwcrypto_jwe.JWE(plaintext, protected=json.dumps({"alg": alg, "enc": "A256GCM", **header}))
    token.add_recipient(jwcrypto_jwk.JWK(kty="oct", k=pack_b64url(key)))
    return bytes(token.serialize(compact=True).encode())


def parsed(jwe: bytes) -> CompactJwe:
    return parse_compact(jwe[:MAX_HEAD_BYTES], jwe[-TAIL_BYTES:], len(jwe))


def opened(jwe: bytes, key: bytes = KEY, chunk: int = CHUNK_BYTES) -> bytes:
    parts = parsed(jwe)
    out = bytearray(parts.plaintext_bytes)
    opener = JweOpener(parts, memoryview(key))
    text = memoryview(jwe)[parts.start : parts.start + parts.text_bytes]
    for done in range(0, parts.text_bytes, chunk):
        piece = text[done : done + chunk]
        start = done * 3 // 4
        opener.update(decode(piece), memoryview(out)[start : start + len(piece) * 3 // 4])
    opener.finish()
    return bytes(out)


@pytest.mark.parametrize("alg", ["A256KW", "dir"])
@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 40))
def test_what_jwcrypto_seals_opens_in_pieces_of_any_length(alg: str, plaintext: bytes, quads: int) -> None:
    assert opened(sealed(plaintext, alg), chunk=4 * quads) == plaintext


def test_a_line_end_and_members_that_mean_nothing_here_are_passed_over() -> None:
    assert opened(sealed(b"weights", kid="k", typ="JWE", cty="x") + b"\r\n") == b"weights"


JWE = sealed(b"weights" * 10)
HEADER, WRAPPED, IV, TEXT, TAG = JWE.split(b".")


def joined(header: bytes = HEADER, wrapped: bytes = WRAPPED, iv: bytes = IV, text: bytes = TEXT, tag: bytes = TAG) -> bytes:
    return b".".join((header, wrapped, iv, text, tag))


def with_header(**members: object) -> bytes:
    return joined(pack_b64url(json.dumps({"alg": "A256KW", "enc": "A256GCM"} | members).encode()).encode())


@pytest.mark.parametrize(
    "jwe",
    [
        b"",
        b"....",
        b"plaintext of a model",
        b'{"protected": "e30"}',
        JWE[: len(JWE) // 2],
        JWE[:-2],
        JWE + b".",
        joined(wrapped=b""),
        joined(wrapped=WRAPPED + b"AAAA"),
        joined(iv=IV[:-4]),
        joined(iv=IV + b"="),
        joined(text=TEXT[:-1]),
        joined(tag=TAG[:-4]),
        joined()[: -len(TAG) - 1] + TAG + b"\n\n\n",
        b".".join((HEADER, WRAPPED, IV, TAG)),
        joined(header=HEADER[:-1]),
        joined(header=b"\xff" + HEADER),
        with_header(alg="RSA-OAEP"),
        with_header(alg="A128KW"),
        with_header(alg="dir"),
        with_header(alg=1),
        with_header(enc="A128GCM"),
        with_header(enc="A256CBC-HS512"),
        with_header(zip="DEF"),
        with_header(crit=["exp"]),
        b"." * 5000,
    ],
)
def test_what_is_no_jwe_of_kserves_kind_is_refused(jwe: bytes) -> None:
    with pytest.raises(ValueError):
        parsed(jwe)


def test_a_jwe_of_more_than_one_nonce_may_seal_is_refused() -> None:
    head, tail = JWE[: JWE.rindex(b".")], JWE[-TAIL_BYTES:]
    before = len(JWE) - len(TEXT)
    most = (MAX_PLAINTEXT_BYTES * 4 + 2) // 3
    assert parse_compact(head, tail, before + most).plaintext_bytes == MAX_PLAINTEXT_BYTES
    with pytest.raises(ValueError):
        parse_compact(head, tail, before + most + 4)


def test_a_key_that_did_not_wrap_it_is_told_apart_from_damage() -> None:
    with pytest.raises(KeyMismatchError):
        opened(JWE, bytes(32))
    with pytest.raises(ValueError):
        opened(sealed(b"weights", "dir"), bytes(32))


@pytest.mark.parametrize(
    "text",
    [
        bytes([TEXT[0] ^ 1]) + TEXT[1:],
        TEXT[4:] + TEXT[:4],
        TEXT[:-4],
        b"+" + TEXT[1:],
        b"/" + TEXT[1:],
        b"\n" + TEXT[1:],
        b"=" + TEXT[1:],
        b"\0" + TEXT[1:],
        b"." + TEXT[1:],
    ],
    ids=["flipped", "turned", "cut", "plus", "slash", "newline", "padding", "nul", "dot"],
)
def test_damage_and_foreign_digits_do_not_authenticate(text: bytes) -> None:
    with pytest.raises(ValueError):
        opened(joined(text=text))


def test_damage_to_what_stands_around_the_ciphertext_does_not_authenticate() -> None:
    flipped_tag = bytes([TAG[0] ^ 1]) + TAG[1:]
    for jwe in (joined(tag=flipped_tag), joined(iv=b"A" * 16), with_header(kid="other")):
        with pytest.raises(ValueError):
            opened(jwe)
