"""Mints the Verdict token: a compact ES256 JWT with exactly the header and claims of `protos/HANDSHAKE.md`, "Token".

How a token is read is `agent/handshake/token.py`'s business, for the guest and for the broker alike.
"""

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem
from agent.handshake import TokenClaims
from agent.handshake.token import ISSUER, parse_token_key, read_token
from agent.jose import pack_b64, pack_jwk

TOKEN_LIFE_S = 300
"""From the Verdict to the last ReleaseKey."""


class TokenKey:
    """The authority's P-256 signing key.

    Attributes:
        public_pem: the half that a guest's measured configuration pins as `broker.token_keys`.
    """

    def __init__(self, pem: bytes) -> None:
        """Raises ConfigError when `pem` is not an unencrypted private key on P-256."""
        try:
            key = ECKey.import_key(pem)
            # refusal: test_a_public_key_cannot_sign
            if not key.is_private:
                raise ValueError
            self.public_pem = key.as_pem(private=False).decode()
            self._public = parse_token_key(self.public_pem)
        except (ValueError, TypeError, JoseError):
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident("token-key")) from None  # the text could quote the key
        self._key = key

    def mint(self, claims: TokenClaims) -> str:
        """The token that says `claims`."""
        payload: dict[str, object] = {
            "iss": ISSUER,
            "iat": claims.issued_at,
            "exp": claims.expires_at,
            "nonce": pack_b64(claims.nonce),
            "tee-pubkey": pack_jwk(claims.tee_pubkey),
            "key_uri": claims.key_uri,
            "policy_version": claims.policy_version,
            "min_model_version": claims.min_model_version,
            "simulated": claims.simulated,
        }
        if claims.lease_s is not None:
            payload["lease_s"] = claims.lease_s
        return jwt.encode({"alg": "ES256", "typ": "JWT"}, payload, self._key, algorithms=["ES256"])

    def read(self, token: str, now: int) -> TokenClaims:
        """The claims of a token that this key signed and that has not expired at `now`, Unix seconds.

        Raises:
            TokenError: it is not one of ours, or no longer.
        """
        return read_token(token, keys=(self._public,), now=now)
