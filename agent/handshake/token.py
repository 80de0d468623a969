"""What a Verdict token says, believed only under the authority keys pinned in the measured configuration.

The token is the one signed thing the broker tells us: a relay, a load balancer or whoever ends TLS in between can pass it
on or lose it, and nothing else. Claims and their rules stand in `protos/HANDSHAKE.md`, "Token".
Does not decide what follows from the claims (lease, rollback floor, simulation), and does not make tokens: that is the
broker's. RFC 7515 (compact JWS), RFC 7519 (claims), RFC 8725 (why one algorithm and no header key).
"""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import TokenCheck, TokenError
from agent.evidence import NONCE_BYTES, Nonce
from agent.handshake import MAX_TOKEN_BYTES, TeePublicKey, TokenClaims
from agent.handshake.jws import parse_jws, signed_by
from agent.jose import boolean, integer, pack_jwk, parse_b64, parse_object, parse_point, string

ISSUER = "keyturn-broker"
CLOCK_SKEW_S = 60
"""How far the broker's clock may be ahead of ours. Nothing is added to `exp`: an old verdict stays old."""

_MAX_TIME = 1 << 40
_MAX_SECONDS = (1 << 31) - 1
_REQUIRED = {
    "iss", "iat", "exp", "nonce", "tee-pubkey", "key_uri", "policy_version", "min_model_version", "simulated",
}  # fmt: skip
_OPTIONAL = {"nbf", "lease_s"}


def parse_token_key(pem: str) -> ec.EllipticCurvePublicKey:
    """One authority key: PEM SubjectPublicKeyInfo of EC P-256. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ValueError("not a PEM public key") from exc
    # refusal: test_only_p256_public_keys_can_be_pinned
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 key")
    return key


def verify_token(
    token: str,
    *,
    keys: tuple[ec.EllipticCurvePublicKey, ...],
    nonce: Nonce,
    tee_pubkey: TeePublicKey,
    key_uri: Ident,
    now: int,
) -> TokenClaims:
    """The claims of a token that the authority signed for this handshake: `read_token`, and then held against it.

    Args:
        token: as in `read_token`.
        keys: as in `read_token`.
        now: as in `read_token`.
        nonce: of the Challenge this guest answered last.
        tee_pubkey: our ephemeral key.
        key_uri: the key we asked for.

    Raises:
        TokenError: names the check that does not hold.
    """
    claims = read_token(token, keys, now)
    # refusal: test_a_token_of_another_handshake_is_refused
    if claims.nonce != nonce:
        raise TokenError(TokenCheck.NONCE)
    # refusal: test_a_token_of_another_handshake_is_refused
    if claims.tee_pubkey != tee_pubkey:
        raise TokenError(TokenCheck.TEE_PUBKEY)
    # refusal: test_a_token_of_another_handshake_is_refused
    if claims.key_uri != key_uri:
        raise TokenError(TokenCheck.KEY_URI)
    return claims


def read_token(token: str, keys: tuple[ec.EllipticCurvePublicKey, ...], now: int) -> TokenClaims:
    """The claims of a token that the authority signed and that is valid now. A guest calls `verify_token`.

    Args:
        token: compact JWS, at most 16 KiB.
        keys: the authority keys, P-256; one of them must have signed.
        now: Unix seconds.

    Raises:
        TokenError: names the check that does not hold.
    """
    # 1. Three canonical base64url parts of bounded size.
    try:
        jws = parse_jws(token, MAX_TOKEN_BYTES)
    except ValueError:
        raise TokenError(TokenCheck.FORMAT) from None

    # 2. One algorithm, and no member that could bring a key or change the meaning of the rest.
    # refusal: test_a_header_that_is_not_exactly_ours_is_an_algorithm_error
    if jws.header != {"alg": "ES256", "typ": "JWT"}:
        raise TokenError(TokenCheck.ALGORITHM)

    # 3. Signed by an authority key. Nothing in the payload is read before this.
    # refusal: test_a_stranger_signs_in_vain
    if not signed_by(keys, jws):
        raise TokenError(TokenCheck.SIGNATURE)

    # 4. Exactly the claims of this protocol version: an unknown one might be a restriction that we would not obey.
    claims, not_before = _parse_claims(jws.payload)

    # 5. Of now.
    # refusal: test_expiry_has_no_leeway
    if now >= claims.expires_at:
        raise TokenError(TokenCheck.EXPIRED)
    # refusal: test_a_clock_ahead_of_ours_has_sixty_seconds
    if max(claims.issued_at, not_before) > now + CLOCK_SKEW_S:
        raise TokenError(TokenCheck.NOT_YET_VALID)
    return claims


def decode_unverified_token(token: str) -> TokenClaims:
    """What a token says, whoever wrote it: for a diagnosis that says so, and for nothing else.

    Raises:
        TokenError: FORMAT or CLAIMS.
    """
    try:
        payload = parse_jws(token, MAX_TOKEN_BYTES).payload
    except ValueError:
        raise TokenError(TokenCheck.FORMAT) from None
    return _parse_claims(payload)[0]


def _parse_claims(payload: bytes) -> tuple[TokenClaims, int]:
    try:
        members = parse_object(payload, MAX_TOKEN_BYTES)
        jwk = members.get("tee-pubkey")
        # refusal: test_a_claim_that_is_not_exactly_ours_is_a_claims_error
        if not _REQUIRED <= members.keys() <= _REQUIRED | _OPTIONAL or not isinstance(jwk, dict):
            raise ValueError
        tee_pubkey, nonce = parse_point(jwk), parse_b64(string(members, "nonce"))
        # refusal: test_a_claim_that_is_not_exactly_ours_is_a_claims_error
        if members["iss"] != ISSUER or jwk != pack_jwk(tee_pubkey) or len(nonce) != NONCE_BYTES:
            raise ValueError
        claims = TokenClaims(
            nonce=Nonce(nonce),
            tee_pubkey=tee_pubkey,
            key_uri=Ident(string(members, "key_uri")),
            policy_version=Ident(string(members, "policy_version")),
            min_model_version=integer(members, "min_model_version", 0, _MAX_SECONDS),
            lease_s=integer(members, "lease_s", 1, _MAX_SECONDS) if "lease_s" in members else None,
            simulated=boolean(members, "simulated"),
            issued_at=integer(members, "iat", 0, _MAX_TIME),
            expires_at=integer(members, "exp", 0, _MAX_TIME),
        )
        return claims, integer(members, "nbf", 0, _MAX_TIME) if "nbf" in members else 0
    except ValueError:
        raise TokenError(TokenCheck.CLAIMS) from None
