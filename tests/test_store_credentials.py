"""What lies at `artifact.credentials_uri`: one strict JSON object, which stands in no text of ours."""

import json

import pytest

from agent.store_credentials import MAX_CREDENTIALS_BYTES, StoreCredentials, is_credentials_length, parse_credentials

USER, SECRET, TOKEN = "guest-of-the-store", 'correct "horse"', "token-of-the-store"


def parse(text: str | bytes) -> StoreCredentials:
    return parse_credentials(memoryview(text if isinstance(text, bytes) else text.encode()))


def packed(**members: object) -> bytes:
    return json.dumps({"user": USER, "secret": SECRET} | members).encode()


def test_credentials_are_what_they_say() -> None:
    assert parse(packed()) == StoreCredentials(USER, SECRET)
    assert parse(packed(session_token=TOKEN)) == StoreCredentials(USER, SECRET, TOKEN)
    assert parse(packed(secret="pässwörd")).secret == "pässwörd"
    assert parse(packed().ljust(MAX_CREDENTIALS_BYTES)) == StoreCredentials(USER, SECRET)


def test_credentials_stand_in_no_repr() -> None:
    text = repr(parse(packed(session_token=TOKEN)))
    assert not any(secret in text for secret in (USER, "horse", TOKEN))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        bytes(32),
        b'{"user": "u"}',
        b'{"secret": "s"}',
        b'{"user": "u", "secret": "s", "secret": "t"}',
        b'{"user": "u", "secret": "s"} {}',
        packed(endpoint="https://elsewhere"),
        packed(session_token=None),
        packed(user=7),
        packed(secret=["s"]),
        packed(user=""),
        packed(secret=""),
        packed(session_token=""),
        packed(user="u\r\nHost: elsewhere"),
        packed(secret="s\0"),
        packed(secret="\x7f"),
        packed(user="gästin"),  # no header can hold all such texts
        packed(session_token="€"),
        packed(secret="\ud800"),  # half a character, which no header can hold
        packed().ljust(MAX_CREDENTIALS_BYTES + 1),
        b'{"user": "u", "secret": "s"}    ',  # of 32 bytes
        b"[" * MAX_CREDENTIALS_BYTES,
    ],
)
def test_what_is_not_exactly_credentials_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError) as caught:  # the texts are what is looked at
        parse(data)
    assert not any(secret in f"{caught.value!r} {caught.value.__cause__!r}" for secret in (USER, "horse", "elsewhere"))


def test_a_resource_of_no_bytes_too_many_or_a_keys_is_none() -> None:
    lengths = (0, 1, 31, 32, 33, MAX_CREDENTIALS_BYTES, MAX_CREDENTIALS_BYTES + 1)
    assert [length for length in lengths if is_credentials_length(length)] == [1, 31, 33, MAX_CREDENTIALS_BYTES]
