"""The strict JOSE forms: one spelling of everything, and ValueError without the text for everything else."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.handshake import TeePublicKey
from agent.jose import (
    boolean,
    integer,
    pack_b64,
    pack_b64url,
    pack_jwk,
    parse_b64,
    parse_b64url,
    parse_object,
    parse_point,
    string,
)


@given(st.binary(max_size=100))
def test_base64_comes_back(data: bytes) -> None:
    assert parse_b64(pack_b64(data)) == data
    assert parse_b64url(pack_b64url(data)) == data


@given(st.text(max_size=20))
def test_there_is_one_spelling_of_every_value(text: str) -> None:
    for parse, pack in ((parse_b64, pack_b64), (parse_b64url, pack_b64url)):
        with contextlib.suppress(ValueError):
            assert pack(parse(text)) == text


@pytest.mark.parametrize("text", ["A", "AB", "AA=", "AA==", "A A", "+/+/", "AAA\n", "ä"])
def test_other_spellings_of_base64url_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_b64url(text)


@pytest.mark.parametrize("text", ["AA", "AA=", "AB==", "-_-_", "AAAA\n", "AA==AA=="])
def test_other_spellings_of_base64_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_b64(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"1",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b"\xef\xbb\xbf{}",
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"1" * 5000 + b"}",
        b"{}" + b" " * 10_000_000,
    ],
)
def test_only_a_strict_bounded_object_is_parsed(text: bytes) -> None:
    with pytest.raises(ValueError) as raised:
        parse_object(text, 1_000_000)
    assert raised.value.__cause__ is None


def test_a_good_object_is_what_it_says() -> None:
    members = parse_object(b'{"s":"x","i":7,"b":true,"o":{"n":null}}', 100)
    assert (string(members, "s"), integer(members, "i", 7, 7), boolean(members, "b")) == ("x", 7, True)
    assert members["o"] == {"n": None}


def test_members_of_another_type_are_refused() -> None:
    members = parse_object(b'{"s":"x","i":7,"b":true}', 100)
    for read in (
        lambda: string(members, "i"),
        lambda: string(members, "missing"),
        lambda: integer(members, "b", 0, 9),
        lambda: integer(members, "s", 0, 9),
        lambda: integer(members, "i", 8, 9),
        lambda: integer(members, "i", 0, 6),
        lambda: boolean(members, "i"),
        lambda: boolean(members, "missing"),
    ):
        with pytest.raises(ValueError):
            read()


def test_the_jwk_is_trustees_and_its_point_comes_back() -> None:
    key = TeePublicKey(b"x" * 32, b"y" * 32)
    assert json.dumps(pack_jwk(key), sort_keys=True).count('"') == 20  # five members, all strings
    assert parse_point({**pack_jwk(key)}) == key


@pytest.mark.parametrize(
    "change",
    [{"kty": "RSA"}, {"crv": "P-384"}, {"x": pack_b64url(b"x" * 31)}, {"y": pack_b64url(b"")}, {"x": 1}, {"y": "="}],
)
def test_another_jwk_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        parse_point(pack_jwk(TeePublicKey(b"x" * 32, b"y" * 32)) | change)


def test_fractions_of_others_are_none_and_nothing_else_is_let_through() -> None:
    assert parse_object(b'{"a":1.5,"b":1e9,"c":[0.1,2]}', 100, fractions_become_none=True) == {
        "a": None,
        "b": None,
        "c": [None, 2],
    }
    for text in (b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1.5,"a":1}', b"1.5"):
        with pytest.raises(ValueError):
            parse_object(text, 100, fractions_become_none=True)
