"""JOSE of the test KBS: the facts' vectors to the byte, and two libraries of others."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jwe as joserfc_jwe
from joserfc import jwt
from joserfc.jwk import ECKey
from jwcrypto import jwe, jwk
from jwcrypto.common import JWException

from agent.sim.trustee_jose import BadTokenError, TokenSigner, UnsupportedKeyError, encrypt, jwk_of, unb64url
from agent.sim.trustee_knobs import JweFault, TokenFault
from tests.raw_kbs import b64url, decoded
from tests.shared import shared_data

ALG = "ECDH-ES+A256KW"


def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_bytes())
    return found


def opened(body: bytes, key: jwk.JWK) -> bytes:
    sealed = jwe.JWE(algs=[ALG, "A256GCM", "RSA-OAEP-256", "RSA1_5"])
    sealed.deserialize(body.decode(), key)
    plaintext: bytes = sealed.payload
    return plaintext


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()], ids=["P-256", "P-521"])
def test_an_answer_opens_with_jwcrypto_and_joserfc(curve: ec.EllipticCurve) -> None:
    key = jwk.JWK.generate(kty="EC", crv={"secp256r1": "P-256", "secp521r1": "P-521"}[curve.name])
    body = encrypt(b"resource", {**key.export_public(as_dict=True), "alg": ALG})
    assert opened(body, key) == b"resource"
    members = json.loads(body)
    compact = ".".join(members[name] for name in ("protected", "encrypted_key", "iv", "ciphertext", "tag"))
    recipient = ECKey.import_key(key.export_private(as_dict=True))
    assert joserfc_jwe.decrypt_compact(compact, recipient, algorithms=[ALG, "A256GCM"]).plaintext == b"resource"


def test_the_header_comes_as_upstream_would_write_it() -> None:
    key = jwk.JWK.generate(kty="EC", crv="P-256")
    members = json.loads(encrypt(b"resource", {**key.export_public(as_dict=True), "alg": ALG}))
    assert [*members] == ["protected", "encrypted_key", "iv", "ciphertext", "tag"]
    text = unb64url(members["protected"]).decode()
    epk = json.loads(text)["epk"]
    assert text == f'{{"alg":"{ALG}","enc":"A256GCM","epk":{{"crv":"P-256","kty":"EC","x":"{epk["x"]}","y":"{epk["y"]}"}}}}'


def test_the_vectors_open_and_their_ephemeral_key_makes_the_same_header() -> None:
    for case in vectors()["jwe"]:
        key = jwk.JWK(**case["recipient_pkcs8_pem"])
        assert opened(json.dumps(case["response"]).encode(), key) == case["plaintext"].encode()
        assert unb64url(case["response"]["protected"]).decode() == case["protected_json"]


@pytest.mark.parametrize("place", [0, 1], ids=["P-256", "P-521"])
def test_the_vectors_are_reproduced_from_the_key_agreement_on(place: int) -> None:
    """The vectors hold Z, not the ephemeral key: an object with its point stands for it."""
    case = vectors()["jwe"][place]
    epk = json.loads(case["protected_json"])["epk"]
    curve: ec.EllipticCurve = (ec.SECP256R1(), ec.SECP521R1())[place]
    x, y = (int.from_bytes(unb64url(epk[name])) for name in ("x", "y"))

    class Ephemeral:
        def exchange(self, *_: object) -> bytes:
            return bytes.fromhex(case["z_hex"])

        def public_key(self) -> ec.EllipticCurvePublicKey:
            return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()

    random = bytes.fromhex(case["cek_hex"]) + unb64url(case["response"]["iv"])
    ephemeral: Any = Ephemeral()
    body = encrypt(case["plaintext"].encode(), case["recipient_jwk"], ephemeral=ephemeral, random=random)
    assert json.loads(body) == case["response"]


@pytest.mark.parametrize("alg", ["RSA-OAEP-256", "RSA1_5"])
def test_rsa_is_served_too(alg: str) -> None:
    private = rsa.generate_private_key(65537, 2048)
    key = jwk.JWK.from_pyca(private)
    numbers = private.public_key().public_numbers()
    body = encrypt(b"resource", {"kty": "RSA", "alg": alg, "n": b64url(numbers.n.to_bytes(256)), "e": "AQAB"})
    assert json.loads(unb64url(json.loads(body)["protected"])) == {"alg": alg, "enc": "A256GCM"}
    assert opened(body, key) == b"resource"


def good() -> dict[str, str]:
    return jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key(), ALG)


@pytest.mark.parametrize(
    "changes",
    [
        {"crv": "P-384"},
        {"alg": "ECDH-ES"},
        {"x": "AAAA"},
        {"x": b64url(bytes(32))},
        {"x": "%"},
        {"kty": "AKP", "alg": "ML-KEM-768+A192KW"},
        {"kty": "RSA", "alg": "RSA-OAEP"},
        {"kty": "RSA", "alg": "RSA-OAEP-256", "n": "AQAB", "e": "AQAB"},
    ],
)
def test_a_key_that_cannot_be_used(changes: dict[str, str]) -> None:
    with pytest.raises(UnsupportedKeyError):
        encrypt(b"resource", good() | changes)


def test_a_point_with_leading_zeros_must_be_whole() -> None:
    while True:
        key = good()
        if unb64url(key["x"])[0] == 0:
            break
    encrypt(b"resource", key)
    with pytest.raises(UnsupportedKeyError):
        encrypt(b"resource", key | {"x": b64url(unb64url(key["x"])[1:])})


@pytest.mark.parametrize("fault", JweFault)
def test_every_fault_breaks_the_answer_where_it_says(fault: JweFault) -> None:
    key = jwk.JWK.generate(kty="EC", crv="P-256")
    recipient = {**key.export_public(as_dict=True), "alg": ALG}
    body = encrypt(b"resource", recipient, fault)
    if fault is JweFault.EMPTY_PLAINTEXT:
        assert json.loads(body)["ciphertext"] == ""  # jwcrypto takes nothing for a failure
        return
    if fault is JweFault.COMPACT:
        assert body.count(b".") == 4
        return
    with pytest.raises((JWException, TypeError, ValueError)):
        opened(body, key)
    members = json.loads(body)
    header = json.loads(unb64url(members["protected"]))
    match fault:
        case JweFault.HEADER_ZIP:
            assert header["zip"] == "DEF"
        case JweFault.EPK_OTHER_CURVE:
            assert header["epk"]["crv"] == "P-384"
        case JweFault.EPK_OFF_CURVE:
            x, y = (int.from_bytes(unb64url(header["epk"][name])) for name in ("x", "y"))
            with pytest.raises(ValueError, match="curve"):
                ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        case JweFault.SHORT_TAG:
            assert len(unb64url(members["tag"])) == 12
        case JweFault.UNKNOWN_ALG | JweFault.UNKNOWN_ENC:
            assert (header["alg"], header["enc"]) != (ALG, "A256GCM")


def test_base64url_has_one_spelling() -> None:
    assert unb64url("-_8") == b"\xfb\xff"
    for text in ("+/8", "-_8=", "-_8 ", "A", "ä"):
        with pytest.raises(ValueError, match=r"."):
            unb64url(text)


def signer() -> TokenSigner:
    return TokenSigner(ec.generate_private_key(ec.SECP256R1()))


def test_a_token_is_one_for_joserfc() -> None:
    ours = signer()
    token = ours.sign({"exp": 4_000_000_000, "iat": 1})
    assert jwt.decode(token, ECKey.import_key(ours.public_pem), algorithms=["ES256"]).claims["iat"] == 1
    assert jwt.decode(token, ECKey.import_key(decoded(token)[0]["jwk"]), algorithms=["ES256"]).claims["iat"] == 1
    assert ours.verify(token, 4_000_000_060) == {"exp": 4_000_000_000, "iat": 1}
    with pytest.raises(BadTokenError):
        ours.verify(token, 4_000_000_061)


def test_certificates_go_into_the_header() -> None:
    token = TokenSigner(ec.generate_private_key(ec.SECP256R1()), (b"leaf", b"root")).sign({})
    assert [base64.b64decode(text) for text in decoded(token)[0]["jwk"]["x5c"]] == [b"leaf", b"root"]


@pytest.mark.parametrize(
    "fault", [fault for fault in TokenFault if "good" not in fault.value and fault is not TokenFault.HEADER_ZIP]
)
def test_the_signer_takes_no_token_of_its_faults(fault: TokenFault) -> None:
    ours = signer()
    with pytest.raises(BadTokenError):
        ours.verify(ours.sign({"exp": 4_000_000_000}, fault), 0)


@pytest.mark.parametrize("token", ["", "a.b", "a.b.c", "..", "e30.e30.AAAA", "W10.W10." + "A" * 86, "e30.e30." + "A" * 86])
def test_what_is_no_token(token: str) -> None:
    with pytest.raises(BadTokenError):
        signer().verify(token, 0)
