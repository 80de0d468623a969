"""Compact JWS: one form, one algorithm, pinned keys only. Hostile tokens: test_handshake_token.py, test_handshake_ear.py."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.handshake.jws import parse_jws, signed_by
from tests.test_handshake_token import AUTHORITY, STRANGER, signed


def test_the_parts_come_back_and_only_the_signer_has_signed() -> None:
    jws = parse_jws(signed(b"payload", b'{"alg":"ES256"}'), 1000)
    assert (jws.header, jws.payload, len(jws.signature)) == ({"alg": "ES256"}, b"payload", 64)
    assert signed_by([STRANGER.public_key(), AUTHORITY.public_key()], jws)
    assert not signed_by([STRANGER.public_key()], jws)
    assert not signed_by([ec.generate_private_key(ec.SECP384R1()).public_key()], jws)


def test_the_bound_is_of_the_whole_token() -> None:
    token = signed(b"payload")
    assert parse_jws(token, len(token))
    with pytest.raises(ValueError, match="too large"):
        parse_jws(token, len(token) - 1)
