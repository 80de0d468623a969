"""A compact JWS taken apart, and whether one of our pinned keys signed it: ES256 and nothing else.

Tokens of our broker (`token.py`) and of Trustee (`ear.py`) share these rules. Which header members may stand beside `alg`,
and what the payload means, is theirs. RFC 7515 (compact serialisation), RFC 7518 §3.4 (ES256), RFC 8725 (why one algorithm).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent.jose import parse_b64url, parse_object

_ES256_BYTES = 64


@dataclass(frozen=True, slots=True)
class Jws:
    """The parts of a token. Nothing of `payload` may be read before `signed_by` holds.

    Attributes:
        header: the protected header's members.
        payload: decoded, not parsed.
        signed: what the signature is over, ASCII.
        signature: r and s, 32 bytes each, where it is one of ES256.
    """

    header: dict[str, object]
    payload: bytes
    signed: bytes
    signature: bytes


def parse_jws(token: str, max_bytes: int) -> Jws:
    """Three canonical base64url parts, the first a JSON object.

    Raises:
        ValueError: it is something else, or longer than `max_bytes`.
    """
    # refusal: test_handshake_token.py::test_what_is_no_compact_jws_is_a_format_error
    if len(token) > max_bytes:
        raise ValueError("too large")
    signed, _, signature = token.rpartition(".")
    header, _, payload = signed.partition(".")
    members = parse_object(parse_b64url(header), max_bytes)
    return Jws(members, parse_b64url(payload), signed.encode("ascii"), parse_b64url(signature))


def signed_by(keys: Sequence[ec.EllipticCurvePublicKey], jws: Jws) -> bool:
    """Whether one of the pinned keys made the signature; a key that the header brings is no pinned key."""
    if not keys:
        raise RuntimeError("no authority keys: the configuration must not get this far")
    return any(_signed_by(key, jws) for key in keys)


def _signed_by(key: ec.EllipticCurvePublicKey, jws: Jws) -> bool:
    if not isinstance(key.curve, ec.SECP256R1) or len(jws.signature) != _ES256_BYTES:
        return False
    half = _ES256_BYTES // 2
    der = encode_dss_signature(int.from_bytes(jws.signature[:half]), int.from_bytes(jws.signature[half:]))
    try:
        key.verify(der, jws.signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
