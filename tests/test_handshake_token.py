"""The Verdict token: accepted exactly when the authority signed it, now, for this handshake."""

import base64
import contextlib
import json
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey

from agent.closed import Ident
from agent.errors import TokenCheck, TokenError
from agent.evidence import Nonce
from agent.handshake import TeePublicKey, TokenClaims
from agent.handshake.token import parse_token_key, read_token, verify_token
from agent.jose import pack_b64, pack_b64url, pack_jwk

NOW = 1_800_000_000
NONCE = Nonce(bytes(range(32)))
TEE = TeePublicKey(b"x" * 32, b"y" * 32)
KEY_URI = Ident("kbs:///models/demo/key")
AUTHORITY = ec.derive_private_key(0xA0, ec.SECP256R1())
STRANGER = ec.derive_private_key(0xB0, ec.SECP256R1())
HEADER: dict[str, object] = {"alg": "ES256", "typ": "JWT"}
Members = dict[str, object]


def claims() -> Members:
    return {
        "iss": "keyturn-broker",
        "iat": NOW - 5,
        "exp": NOW + 300,
        "nonce": pack_b64(NONCE),
        "tee-pubkey": pack_jwk(TEE),
        "key_uri": KEY_URI,
        "policy_version": "p-7",
        "min_model_version": 4,
        "simulated": False,
    }


def signed(payload: bytes, header: bytes = json.dumps(HEADER).encode(), key: ec.EllipticCurvePrivateKey = AUTHORITY) -> str:
    text = f"{pack_b64url(header)}.{pack_b64url(payload)}"
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{pack_b64url(r.to_bytes(32) + s.to_bytes(32))}"


def token(change: Callable[[Members], object] = lambda _: None) -> str:
    members = claims()
    change(members)
    return signed(json.dumps(members).encode())


def with_header(**members: object) -> str:
    return signed(json.dumps(claims()).encode(), json.dumps(HEADER | members).encode())


def verified(text: str, now: int = NOW, **other: object) -> TokenClaims:
    asked = {"keys": (AUTHORITY.public_key(),), "nonce": NONCE, "tee_pubkey": TEE, "key_uri": KEY_URI} | other
    return verify_token(text, now=now, **asked)  # type: ignore[arg-type]


def refused(text: str, now: int = NOW, **other: object) -> TokenCheck:
    with pytest.raises(TokenError) as raised:
        verified(text, now, **other)
    assert raised.value.__cause__ is None
    return raised.value.check


def test_a_good_token_says_its_claims() -> None:
    assert verified(token()) == TokenClaims(NONCE, TEE, KEY_URI, Ident("p-7"), 4, None, False, NOW - 5, NOW + 300)


def test_a_lease_and_a_simulation_are_said() -> None:
    got = verified(token(lambda c: c.update(lease_s=3600, simulated=True, nbf=NOW)))
    assert (got.lease_s, got.simulated) == (3600, True)


def test_what_joserfc_signs_verifies() -> None:
    pem = AUTHORITY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    assert verified(jwt.encode(dict(HEADER), claims(), ECKey.import_key(pem), algorithms=["ES256"])).key_uri == KEY_URI


def test_any_one_of_the_pinned_keys_may_have_signed() -> None:
    assert verified(token(), keys=(STRANGER.public_key(), AUTHORITY.public_key()))


def test_a_stranger_signs_in_vain() -> None:
    assert refused(signed(json.dumps(claims()).encode(), key=STRANGER)) is TokenCheck.SIGNATURE


def test_no_keys_at_all_is_our_bug_and_never_an_acceptance() -> None:
    with pytest.raises(RuntimeError):
        verified(token(), keys=())


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c.d",
        token() + ".",
        token() + "=",
        token().replace(".", ". ", 1),
        "ö.ö.ö",
        "A" * 20_000,
        token() + "A" * 20_000,
        f".{token()}",
    ],
)
def test_what_is_no_compact_jws_is_a_format_error(text: str) -> None:
    assert refused(text) is TokenCheck.FORMAT


def test_a_header_member_twice_is_a_format_error() -> None:
    assert refused(signed(json.dumps(claims()).encode(), b'{"alg":"none","typ":"JWT","alg":"ES256"}')) is TokenCheck.FORMAT


def test_noncanonical_base64_is_a_format_error() -> None:
    # The last character of a 64-byte signature carries 4 spare bits: another spelling of the same bytes.
    text = token()
    spare = text[:-1] + chr(ord(text[-1]) + 1)
    assert base64.urlsafe_b64decode(spare.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(text.rpartition(".")[2] + "==")
    assert refused(spare) is TokenCheck.FORMAT


@pytest.mark.parametrize(
    "text",
    [
        with_header(alg="none"),
        with_header(alg="HS256"),
        with_header(alg="es256"),
        with_header(alg=["ES256"]),
        with_header(typ="jwt"),
        with_header(kid="1"),
        with_header(jwk={}),
        with_header(crit=["exp"]),
        signed(json.dumps(claims()).encode(), b'{"alg":"ES256"}'),
    ],
)
def test_a_header_that_is_not_exactly_ours_is_an_algorithm_error(text: str) -> None:
    assert refused(text) is TokenCheck.ALGORITHM


def test_the_signature_is_checked_before_the_claims_are_read() -> None:
    assert refused(signed(b"no JSON", key=STRANGER)) is TokenCheck.SIGNATURE
    assert refused(signed(b"no JSON")) is TokenCheck.CLAIMS


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\xff" * 64, b"s" * 63, b"s" * 65])
def test_a_nonsense_signature_is_a_signature_error(signature: bytes) -> None:
    assert refused(f"{token().rpartition('.')[0]}.{pack_b64url(signature)}") is TokenCheck.SIGNATURE


def test_a_der_signature_is_a_signature_error() -> None:
    text = token().rpartition(".")[0]
    assert refused(f"{text}.{pack_b64url(AUTHORITY.sign(text.encode(), ec.ECDSA(hashes.SHA256())))}") is TokenCheck.SIGNATURE


@pytest.mark.parametrize("name", sorted(claims()))
def test_every_claim_is_required(name: str) -> None:
    assert refused(token(lambda c: c.pop(name))) is TokenCheck.CLAIMS


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "other"},
        {"iat": "1"},
        {"iat": float(NOW)},
        {"exp": True},
        {"exp": -1},
        {"exp": 1 << 60},
        {"nbf": None},
        {"nonce": pack_b64url(NONCE)},
        {"nonce": pack_b64(NONCE[:31])},
        {"nonce": 1},
        {"tee-pubkey": "x"},
        {"tee-pubkey": {**pack_jwk(TEE), "kid": "1"}},
        {"tee-pubkey": {**pack_jwk(TEE), "alg": "ECDH-ES"}},
        {"tee-pubkey": {**pack_jwk(TEE), "crv": "P-384"}},
        {"tee-pubkey": {**pack_jwk(TEE), "x": pack_b64url(b"x" * 31)}},
        {"key_uri": "not an identifier"},
        {"policy_version": ""},
        {"min_model_version": -1},
        {"min_model_version": True},
        {"lease_s": 0},
        {"lease_s": None},
        {"lease_s": 1.5},
        {"simulated": 0},
        {"simulated": None},
        {"aud": "an unknown claim could be a restriction"},
    ],
)
def test_a_claim_that_is_not_exactly_ours_is_a_claims_error(change: Members) -> None:
    assert refused(token(lambda c: c.update(change))) is TokenCheck.CLAIMS


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"\xff", b'{"exp":NaN}', b"[" * 6000, json.dumps(claims()).encode()[:-1] + b',"exp":1}']
)
def test_claims_that_are_no_strict_json_object_are_a_claims_error(payload: bytes) -> None:
    assert refused(signed(payload)) is TokenCheck.CLAIMS


def test_expiry_has_no_leeway() -> None:
    assert verified(token(), NOW + 299)
    assert refused(token(), NOW + 300) is TokenCheck.EXPIRED


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_a_clock_ahead_of_ours_has_sixty_seconds(name: str) -> None:
    assert verified(token(lambda c: c.update({name: NOW + 60})))
    assert refused(token(lambda c: c.update({name: NOW + 61}))) is TokenCheck.NOT_YET_VALID


def test_a_token_of_another_handshake_is_refused() -> None:
    assert refused(token(), nonce=Nonce(b"n" * 32)) is TokenCheck.NONCE
    assert refused(token(), tee_pubkey=TeePublicKey(TEE.x, TEE.x)) is TokenCheck.TEE_PUBKEY
    assert refused(token(), key_uri=Ident("kbs:///models/demo/other")) is TokenCheck.KEY_URI


def test_the_broker_reads_a_token_without_knowing_the_handshake() -> None:
    assert read_token(token(), (AUTHORITY.public_key(),), NOW).nonce == NONCE


@settings(max_examples=200)
@given(st.data())
def test_a_mutilated_token_never_says_anything_else(data: st.DataObject) -> None:
    text = list(token())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.characters())
    with contextlib.suppress(TokenError):
        assert verified("".join(text)) == verified(token())


@given(st.text(max_size=100))
def test_any_text_is_refused(text: str) -> None:
    refused(text)


def test_only_p256_public_keys_can_be_pinned() -> None:
    def pem(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_bytes(serialization.Encoding.PEM, form).decode()

    assert parse_token_key(pem(AUTHORITY.public_key())) == AUTHORITY.public_key()
    others = [
        pem(ec.generate_private_key(ec.SECP384R1()).public_key()),
        pem(rsa.generate_private_key(65537, 2048).public_key()),
    ]
    for text in [*others, "", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]:
        with pytest.raises(ValueError):
            parse_token_key(text)


def test_a_pinned_key_on_another_curve_never_verifies() -> None:
    other = ec.generate_private_key(ec.SECP256K1())  # its signatures have the same size
    text = signed(json.dumps(claims()).encode(), key=other)
    assert refused(text, keys=(other.public_key(),)) is TokenCheck.SIGNATURE
