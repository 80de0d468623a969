"""What a Verdict token says, believed only under the authority keys pinned in the measured configuration.

The token is the one signed thing the broker tells us: a relay, a load balancer or whoever ends TLS in between can pass it
on or lose it, and nothing else. Claims and their rules stand in `protos/HANDSHAKE.md`, "Token".
Does not decide what follows from the claims (lease, rollback floor, simulation), and does not make tokens: that is the
broker's. RFC 7515 (compact JWS), RFC 7519 (claims), RFC 8725 (why one algorithm and no header key).
"""

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent.closed import Ident
from agent.errors import TokenCheck, TokenError
from agent.evidence import NONCE_BYTES, Nonce
from agent.handshake import MAX_TOKEN_BYTES, TeePublicKey, TokenClaims
from agent.jose import boolean, integer, pack_jwk, parse_b64, parse_b64url, parse_object, parse_point, string

ISSUER = "keyturn-broker"
CLOCK_SKEW_S = 60
"""How far the broker's clock may be ahead of ours. Nothing is added to `exp`: an old verdict stays old."""

_MAX_TIME = 1 << 40
_MAX_SECONDS = (1 << 31) - 1
_REQUIRED = {
    "iss", "iat", "exp", "nonce", "tee-pubkey", "key_uri", "policy_version", "min_model_version", "simulated",
}  # fmt: skip
_OPTIONAL = {"nbf", "lease_s"}
_ES256_BYTES = 64


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
        # refusal: test_what_is_no_compact_jws_is_a_format_error
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError
        signed, _, signature_part = token.rpartition(".")
        header_part, _, claims_part = signed.partition(".")
        header = parse_object(parse_b64url(header_part), MAX_TOKEN_BYTES)
        payload, signature = parse_b64url(claims_part), parse_b64url(signature_part)
    except ValueError:
        raise TokenError(TokenCheck.FORMAT) from None

    # 2. One algorithm, and no member that could bring a key or change the meaning of the rest.
    # refusal: test_a_header_that_is_not_exactly_ours_is_an_algorithm_error
    if header != {"alg": "ES256", "typ": "JWT"}:
        raise TokenError(TokenCheck.ALGORITHM)

    # 3. Signed by an authority key. Nothing in the payload is read before this.
    if not keys:
        raise RuntimeError("no authority keys: the configuration must not get this far")
    # refusal: test_a_stranger_signs_in_vain
    if not any(_signed_by(key, signed.encode("ascii"), signature) for key in keys):
        raise TokenError(TokenCheck.SIGNATURE)

    # 4. Exactly the claims of this protocol version: an unknown one might be a restriction that we would not obey.
    claims, not_before = _parse_claims(payload)

    # 5. Of now.
    # refusal: test_expiry_has_no_leeway
    if now >= claims.expires_at:
        raise TokenError(TokenCheck.EXPIRED)
    # refusal: test_a_clock_ahead_of_ours_has_sixty_seconds
    if max(claims.issued_at, not_before) > now + CLOCK_SKEW_S:
        raise TokenError(TokenCheck.NOT_YET_VALID)
    return claims


def _signed_by(key: ec.EllipticCurvePublicKey, signed: bytes, signature: bytes) -> bool:
    if not isinstance(key.curve, ec.SECP256R1) or len(signature) != _ES256_BYTES:
        return False
    half = _ES256_BYTES // 2
    der = encode_dss_signature(int.from_bytes(signature[:half]), int.from_bytes(signature[half:]))
    try:
        key.verify(der, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


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
