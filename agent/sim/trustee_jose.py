"""JOSE as Trustee writes it: encrypted answers (JWE, flattened JSON) and EAR tokens (JWS, compact), right and wrong.

Written from RFC 7515, 7516, 7518 with primitives alone, apart from the broker's and the guest's code: what this makes and they
read has two authors. Key types of an answer: RSA (RSA-OAEP-256, RSA1_5), EC on P-256 and P-521 (ECDH-ES+A256KW). Not P-384,
as upstream; not the post-quantum AKP, which upstream has behind a feature.
"""

import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.sim.trustee_knobs import JweFault, TokenFault

LEEWAY_S = 60
"""How much longer than it says a token is taken."""
_CURVES: Mapping[str, tuple[ec.EllipticCurve, int]] = {"P-256": (ec.SECP256R1(), 32), "P-521": (ec.SECP521R1(), 66)}
_ECDH = "ECDH-ES+A256KW"
_HEADER_FAULTS: Mapping[JweFault, Mapping[str, object]] = {
    JweFault.HEADER_ZIP: {"zip": "DEF"},
    JweFault.HEADER_CRIT: {"crit": ["exp"], "exp": 0},
    JweFault.UNKNOWN_ALG: {"alg": "ECDH-ES+A1024KW"},
    JweFault.UNKNOWN_ENC: {"enc": "A1024GCM"},
}
_BIT_FAULTS = {
    JweFault.ENCRYPTED_KEY: "encrypted_key",
    JweFault.IV: "iv",
    JweFault.CIPHERTEXT: "ciphertext",
    JweFault.TAG: "tag",
}


class UnsupportedKeyError(Exception):
    """Nobody can be encrypted to with this tee-pubkey."""


class BadTokenError(Exception):
    """Not one of ours, or no longer good."""


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64url(text: str) -> bytes:
    """Raises ValueError for anything but unpadded base64url."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def jwk_of(key: ec.EllipticCurvePublicKey, alg: str) -> dict[str, str]:
    """The JWK of a key on P-256."""
    point = key.public_numbers()
    return {"kty": "EC", "crv": "P-256", "alg": alg, "x": b64url(point.x.to_bytes(32)), "y": b64url(point.y.to_bytes(32))}


# --- encrypted answers ------------------------------------------------------------------------------------------------


def encrypt(
    plaintext: bytes,
    tee_pubkey: Mapping[str, str],
    fault: JweFault | None = None,
    ephemeral: ec.EllipticCurvePrivateKey | None = None,
    random: bytes | None = None,
) -> bytes:
    """The answer's body.

    Args:
        plaintext: a resource.
        tee_pubkey: a JWK with exactly the members of its kind.
        fault: what to do wrong.
        ephemeral: for test vectors, as `random`: 32 bytes content key, 12 bytes nonce.
        random: drawn if None.

    Raises:
        UnsupportedKeyError: the key's type, curve, algorithm or coordinates.
    """
    random = os.urandom(44) if random is None else random
    content_key, iv = random[:32], random[32:]
    if fault is JweFault.OTHER_RECIPIENT:
        tee_pubkey = jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key(), _ECDH)
    if fault is JweFault.EMPTY_PLAINTEXT:
        plaintext = b""
    match tee_pubkey.get("kty"), tee_pubkey.get("alg"):
        case "EC", "ECDH-ES+A256KW":
            header, encrypted_key = _agree(tee_pubkey, content_key, ephemeral)
        case "RSA", ("RSA-OAEP-256" | "RSA1_5") as alg:
            header, encrypted_key = {"alg": alg, "enc": "A256GCM"}, _rsa_wrap(tee_pubkey, alg, content_key)
        case _:
            raise UnsupportedKeyError
    match fault:
        case JweFault.EPK_OFF_CURVE:
            header["epk"]["y"] = _flipped(header["epk"]["y"])
        case JweFault.EPK_OTHER_CURVE:
            point = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
            header["epk"] = {"crv": "P-384", "kty": "EC", "x": b64url(point.x.to_bytes(48)), "y": b64url(point.y.to_bytes(48))}
        case JweFault.EPK_MISSING:
            del header["epk"]
    header |= _HEADER_FAULTS.get(fault, {}) if fault else {}
    # `alg`, `enc`, then the others sorted, because upstream's client serialises the header again for its associated data.
    names = ["alg", "enc", *sorted(header.keys() - {"alg", "enc"})]
    protected = b64url(_compact({name: header[name] for name in names}))
    sealed = AESGCM(content_key).encrypt(iv, plaintext, protected.encode())
    members = {
        "protected": protected,
        "encrypted_key": b64url(encrypted_key),
        "iv": b64url(iv),
        "ciphertext": b64url(sealed[:-16]),
        "tag": b64url(sealed[-12:] if fault is JweFault.SHORT_TAG else sealed[-16:]),
    }
    if fault is JweFault.HEADER:
        members["protected"] = b64url(_compact({**header, "kid": "1"}))
    if fault in _BIT_FAULTS:
        members[_BIT_FAULTS[fault]] = _flipped(members[_BIT_FAULTS[fault]])
    if fault is JweFault.COMPACT:
        return ".".join(members.values()).encode()
    return _compact(members)


def _agree(
    tee_pubkey: Mapping[str, str], content_key: bytes, ephemeral: ec.EllipticCurvePrivateKey | None
) -> tuple[dict[str, Any], bytes]:
    """Header and wrapped key: ECDH, Concat KDF without party information, AES-256 key wrap."""
    if tee_pubkey["crv"] not in _CURVES:
        raise UnsupportedKeyError
    curve, size = _CURVES[tee_pubkey["crv"]]
    try:
        x, y = unb64url(tee_pubkey["x"]), unb64url(tee_pubkey["y"])
        if len(x) != size or len(y) != size:
            raise UnsupportedKeyError
        recipient = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curve).public_key()
    except ValueError as exc:
        raise UnsupportedKeyError from exc
    ephemeral = ec.generate_private_key(curve) if ephemeral is None else ephemeral
    shared = ephemeral.exchange(ec.ECDH(), recipient)
    other_info = len(_ECDH).to_bytes(4) + _ECDH.encode() + bytes(8) + (256).to_bytes(4)
    wrapping_key = ConcatKDFHash(SHA256(), 32, other_info).derive(shared)
    point = ephemeral.public_key().public_numbers()
    epk = {"crv": tee_pubkey["crv"], "kty": "EC", "x": b64url(point.x.to_bytes(size)), "y": b64url(point.y.to_bytes(size))}
    return {"alg": _ECDH, "enc": "A256GCM", "epk": epk}, keywrap.aes_key_wrap(wrapping_key, content_key)


def _rsa_wrap(tee_pubkey: Mapping[str, str], alg: str, content_key: bytes) -> bytes:
    scheme = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None) if alg == "RSA-OAEP-256" else padding.PKCS1v15()
    try:
        n, e = (int.from_bytes(unb64url(tee_pubkey[name])) for name in ("n", "e"))
        return rsa.RSAPublicNumbers(e, n).public_key().encrypt(content_key, scheme)
    except ValueError as exc:
        raise UnsupportedKeyError from exc


def _flipped(text: str) -> str:
    data = bytearray(unb64url(text)) or bytearray(1)
    data[0] ^= 1
    return b64url(bytes(data))


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str).encode()  # str: dates of TOML


# --- tokens -----------------------------------------------------------------------------------------------------------


class TokenSigner:
    """An attestation service's P-256 key.

    Args:
        key: who signs.
        certificates: DER, leaf first, for the header's `x5c`; none by default, as with an ephemeral key.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificates: tuple[bytes, ...] = ()) -> None:
        self._key = key
        self._certificates = certificates
        self.public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def sign(self, claims: Mapping[str, object], fault: TokenFault | None = None) -> str:
        """The token, or what `fault` makes of it."""
        if fault is TokenFault.NOT_A_JWT:
            return "no-token"
        key = ec.generate_private_key(ec.SECP256R1()) if fault is TokenFault.OTHER_KEY else self._key
        jwk: dict[str, object] = {**jwk_of(key.public_key(), "ES256")}
        for name in ("x", "y"):  # without leading zeros, as every release up to v0.21 writes them
            jwk[name] = b64url(unb64url(str(jwk[name])).lstrip(b"\0"))
        if self._certificates:
            jwk["x5c"] = [base64.b64encode(der).decode() for der in self._certificates]
        header: dict[str, object] = {"typ": "JWT", "alg": "ES256", "jwk": jwk}
        match fault:
            case TokenFault.ALG_NONE:
                header = {"typ": "JWT", "alg": "none"}
            case TokenFault.UNKNOWN_ALG:
                header["alg"] = "ES1024"
            case TokenFault.HS256:
                header["alg"] = "HS256"
            case TokenFault.HEADER_ZIP:
                header["zip"] = "DEF"
        signed = f"{b64url(_compact(header))}.{b64url(_compact(claims))}"
        if fault is TokenFault.ALG_NONE:
            return signed + "."
        if fault is TokenFault.HS256:
            return f"{signed}.{b64url(hmac.digest(self.public_pem.encode(), signed.encode(), hashlib.sha256))}"
        r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(SHA256())))
        signature = b64url(r.to_bytes(32) + s.to_bytes(32))
        return f"{signed}.{_flipped(signature) if fault is TokenFault.BAD_SIGNATURE else signature}"

    def verify(self, token: str, now: float) -> dict[str, Any]:
        """The claims of a token of ours. Raises BadTokenError."""
        try:
            head, body, signature = token.split(".")
            header, claims, raw = json.loads(unb64url(head)), json.loads(unb64url(body)), unb64url(signature)
            if header["alg"] != "ES256" or len(raw) != 64:
                raise BadTokenError
            pair = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
            self._key.public_key().verify(pair, f"{head}.{body}".encode(), ec.ECDSA(SHA256()))
            if claims["exp"] + LEEWAY_S < now:
                raise BadTokenError
        except (ValueError, KeyError, TypeError, InvalidSignature) as exc:
            raise BadTokenError from exc
        assert isinstance(claims, dict)
        return claims
