"""The few JOSE forms we read, read strictly: one JSON object, base64url, the Trustee JWK of our ephemeral key.

The parsers of tokens, sealed keys and device evidence share these rules, so that no two of them differ in what they
accept: bounded size, UTF-8, no duplicate member, no NaN, canonical base64. Every function here raises ValueError without
the offending text; the caller translates it into its own error.
Does not know what any member means, and holds no key. RFC 7515 §2 (base64url), RFC 7518 §6.2 (EC keys).
"""

import base64
import json
from collections.abc import Callable
from typing import NoReturn

from agent.handshake import TeePublicKey

COORDINATE_BYTES = 32


def parse_object(text: bytes, max_bytes: int, *, fractions_become_none: bool = False) -> dict[str, object]:
    """One JSON object of at most `max_bytes` bytes of UTF-8.

    Args:
        text: the object.
        max_bytes: its bound.
        fractions_become_none: for an object that carries other people's values beside the members we read: a fraction among
            them is nobody's error, and no member of ours.

    Raises:
        ValueError: too large, not UTF-8, not JSON, not an object, a member twice, or nested too deeply.
    """
    # refusal: test_only_a_strict_bounded_object_is_parsed
    if len(text) > max_bytes:
        raise ValueError("too large")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_forget if fractions_become_none else _refuse,
        )
    except (ValueError, RecursionError):
        raise ValueError("not a strict JSON object") from None  # the parser's text quotes the input
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    # refusal: test_only_a_strict_bounded_object_is_parsed
    if len(members) != len(pairs):
        # Parsers differ in which of two equal members wins; what is signed must mean one thing only.
        raise ValueError("member twice")
    return members


def _refuse(_: str) -> NoReturn:
    raise ValueError("not an integer")  # nothing we read has fractions, NaN or Infinity


def _forget(_: str) -> None:
    return None


def string(members: dict[str, object], name: str) -> str:
    """The member as a string. Raises ValueError when it is missing or something else."""
    value = members.get(name)
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


def integer(members: dict[str, object], name: str, minimum: int, maximum: int) -> int:
    """The member as an integer in `minimum..maximum`. Raises ValueError; a JSON boolean is not an integer."""
    value = members.get(name)
    # refusal: test_members_of_another_type_are_refused
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ValueError("not an integer in range")
    return value


def boolean(members: dict[str, object], name: str) -> bool:
    """The member as a boolean. Raises ValueError."""
    value = members.get(name)
    if not isinstance(value, bool):
        raise ValueError("not a boolean")
    return value


def pack_b64url(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def parse_b64url(text: str) -> bytes:
    """The inverse of `pack_b64url`, accepting nothing else. Raises ValueError."""
    return _inverse_of(pack_b64url, text, base64.urlsafe_b64decode, text + "=" * (-len(text) % 4))


def pack_b64(data: bytes) -> str:
    """Standard base64 with padding."""
    return base64.standard_b64encode(data).decode("ascii")


def parse_b64(text: str) -> bytes:
    """The inverse of `pack_b64`, accepting nothing else. Raises ValueError."""
    return _inverse_of(pack_b64, text, base64.standard_b64decode, text)


def _inverse_of(pack: Callable[[bytes], str], text: str, decode: Callable[[str], bytes], padded: str) -> bytes:
    # The decoders skip foreign characters and ignore spare bits; packing again and comparing refuses both.
    try:
        data = decode(padded)
    except ValueError:
        raise ValueError("not base64") from None
    # refusal: test_other_spellings_of_base64_are_refused
    if pack(data) != text:
        raise ValueError("not canonical base64")
    return data


def pack_jwk(key: TeePublicKey) -> dict[str, str]:
    """The JWK of our ephemeral key with exactly the members Trustee keeps; any other would change the report data."""
    return {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": pack_b64url(key.x), "y": pack_b64url(key.y)}


def parse_point(jwk: dict[str, object]) -> TeePublicKey:
    """The coordinates of an EC P-256 JWK; that they are on the curve is checked where the key is used. Raises ValueError."""
    x, y = parse_b64url(string(jwk, "x")), parse_b64url(string(jwk, "y"))
    # refusal: test_another_jwk_is_refused
    if jwk.get("kty") != "EC" or jwk.get("crv") != "P-256" or len(x) != COORDINATE_BYTES or len(y) != COORDINATE_BYTES:
        raise ValueError("not a P-256 key")
    return TeePublicKey(x, y)
