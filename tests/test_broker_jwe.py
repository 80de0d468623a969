"""The sealed key: opened by an independent implementation, in Trustee's exact form, and by nobody else."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwcrypto import jwe as oracle
from jwcrypto import jwk

from agent.broker.jwe import seal
from agent.errors import RemoteProtocolError
from agent.handshake import MAX_JWE_BYTES, TeePublicKey

KEY = bytes(range(32))


def key_pair() -> tuple[ec.EllipticCurvePrivateKey, TeePublicKey]:
    private = ec.generate_private_key(ec.SECP256R1())
    numbers = private.public_key().public_numbers()
    return private, TeePublicKey(numbers.x.to_bytes(32), numbers.y.to_bytes(32))


def opened(sealed: bytes, private: ec.EllipticCurvePrivateKey) -> bytes:
    token = oracle.JWE(algs=["ECDH-ES+A256KW", "A256GCM"])
    token.deserialize(sealed.decode())
    token.decrypt(jwk.JWK.from_pyca(private))
    return bytes(token.payload)


def test_jwcrypto_opens_the_sealed_key() -> None:
    private, public = key_pair()
    assert opened(seal(KEY, public), private) == KEY


def test_another_key_does_not_open_it() -> None:
    _, public = key_pair()
    stranger, _ = key_pair()
    with pytest.raises(oracle.InvalidJWEData):
        opened(seal(KEY, public), stranger)


def test_the_form_is_the_one_trustee_clients_serialise_again() -> None:
    sealed = seal(KEY, key_pair()[1])
    members = json.loads(sealed)
    assert list(members) == ["protected", "encrypted_key", "iv", "ciphertext", "tag"]
    header = base64.urlsafe_b64decode(members["protected"] + "==").decode()
    epk = json.loads(header)["epk"]
    assert header == (
        f'{{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{{"crv":"P-256","kty":"EC","x":"{epk["x"]}","y":"{epk["y"]}"}}}}'
    )
    assert [len(base64.urlsafe_b64decode(members[name] + "==")) for name in ("encrypted_key", "iv", "ciphertext", "tag")] == [
        40, 12, 32, 16,
    ]  # fmt: skip
    assert b" " not in sealed and len(sealed) < MAX_JWE_BYTES


def test_every_sealing_has_its_own_ephemeral_key() -> None:
    _, public = key_pair()
    assert json.loads(seal(KEY, public))["protected"] != json.loads(seal(KEY, public))["protected"]


def test_a_point_off_the_curve_is_refused() -> None:
    _, public = key_pair()
    with pytest.raises(RemoteProtocolError):
        seal(KEY, TeePublicKey(public.x, public.x))
