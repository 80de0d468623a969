"""The minted token is the one that the guest verifies."""

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from agent.broker.token import TokenKey
from agent.closed import Ident
from agent.errors import ConfigError, TokenError
from agent.evidence import Nonce
from agent.handshake import TeePublicKey, TokenClaims
from agent.handshake.token import parse_token_key, verify_token

CLAIMS = TokenClaims(
    nonce=Nonce(b"\xfb" * 32),
    tee_pubkey=TeePublicKey(b"x" * 32, b"y" * 32),
    key_uri=Ident("kbs:///models/tiny/1"),
    policy_version=Ident("2026-11-22"),
    min_model_version=3,
    lease_s=3600,
    simulated=False,
    issued_at=1000,
    expires_at=1300,
)


def pem_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def private_pem(curve: ec.EllipticCurve) -> bytes:
    return pem_of(ec.generate_private_key(curve))


@pytest.mark.parametrize("claims", [CLAIMS, replace(CLAIMS, lease_s=None, simulated=True, min_model_version=0)])
def test_the_guest_verifies_what_the_broker_mints(claims: TokenClaims) -> None:
    key = TokenKey(private_pem(ec.SECP256R1()))
    verified = verify_token(
        key.mint(claims),
        keys=(parse_token_key(key.public_pem),),
        nonce=claims.nonce,
        tee_pubkey=claims.tee_pubkey,
        key_uri=claims.key_uri,
        now=1299,
    )
    assert verified == claims


def test_another_authority_is_not_believed() -> None:
    key, other = TokenKey(private_pem(ec.SECP256R1())), TokenKey(private_pem(ec.SECP256R1()))
    with pytest.raises(TokenError):
        other.read(key.mint(CLAIMS), now=1000)
    assert key.read(key.mint(CLAIMS), now=1000) == CLAIMS


def test_a_lease_that_is_not_given_is_not_mentioned() -> None:
    token = TokenKey(private_pem(ec.SECP256R1())).mint(replace(CLAIMS, lease_s=None))
    payload = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert "lease_s" not in payload


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"no key",
        private_pem(ec.SECP384R1()),
        pem_of(rsa.generate_private_key(65537, 2048)),
        pem_of(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["empty", "no PEM", "P-384", "RSA", "Ed25519"],
)
def test_what_is_no_p256_private_key_is_refused(pem: bytes) -> None:
    with pytest.raises(ConfigError):
        TokenKey(pem)


def test_a_public_key_cannot_sign() -> None:
    with pytest.raises(ConfigError):
        TokenKey(TokenKey(private_pem(ec.SECP256R1())).public_pem.encode())
