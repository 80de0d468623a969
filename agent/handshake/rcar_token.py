"""Trustee's attestation token as the Verdict of a handshake: what `token.verify_token` is for our own broker's.

The token (EAR, `ear.py`) is verified under the keys pinned in the measured configuration and held against this handshake: our
nonce, our key, our kind of TEE. Whether what it says is good enough is the resource policy's business, which decides when the
key is asked for. It knows no key, lease or rollback floor, so the claims made of it say what they are without: the key we will
ask for, no lease, floor 0. And it is bound to our nonce, so it was made a moment ago: a time on it that says otherwise is
not age but two clocks that differ.
"""

from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import ClockSkewError, TokenCheck, TokenError
from agent.evidence import Nonce, Tee
from agent.handshake import TeePublicKey, TokenClaims
from agent.handshake.ear import LEEWAY_S, Ear, check_binding, decode_unverified_ear, verify_ear
from agent.handshake.rcar import UNVERSIONED


class EarVerifier:
    """A `machine.VerifyToken`.

    Args:
        tee: whose evidence the token must be about.
        simulated: whether we know that evidence to be a simulator's; the token says so of sample evidence only.
    """

    def __init__(self, tee: Tee, simulated: bool) -> None:
        self._tee = tee
        self._simulated = simulated

    def __call__(
        self,
        token: str,
        *,
        keys: tuple[ec.EllipticCurvePublicKey, ...],
        nonce: Nonce,
        tee_pubkey: TeePublicKey,
        key_uri: Ident,
        now: int,
    ) -> TokenClaims:
        """The claims of a token that the authority's attestation service signed for this handshake.

        Raises:
            TokenError: names the check that does not hold.
            ClockSkewError: it is of this handshake, and dated at another time.
        """
        # 1. Signed, well formed, and of now.
        try:
            ear = verify_ear(token, keys, now)
        except TokenError as error:
            raise _expiry_or_clock(error, token, keys, nonce, tee_pubkey, now) from None

        # 2. Of this handshake.
        check_binding(ear, nonce.decode(), tee_pubkey)

        # 3. About this kind of guest: a service that takes our evidence for something else has not appraised it.
        assert ear.cpu is not None, "what is bound has one"
        # refusal: test_a_token_about_another_kind_of_tee_is_refused
        if ear.cpu.kind is None or ear.cpu.kind.value != self._tee.value:
            raise TokenError(TokenCheck.CLAIMS)
        return TokenClaims(
            nonce=nonce,
            tee_pubkey=tee_pubkey,
            key_uri=key_uri,
            policy_version=UNVERSIONED,
            min_model_version=0,
            lease_s=None,
            simulated=self._simulated or ear.simulated,
            issued_at=ear.issued_at,
            expires_at=ear.expires_at,
        )


def _expiry_or_clock(
    error: TokenError,
    token: str,
    keys: tuple[ec.EllipticCurvePublicKey, ...],
    nonce: Nonce,
    tee_pubkey: TeePublicKey,
    now: int,
) -> TokenError | ClockSkewError:
    """The clock, where nothing but the time is wrong: the token is of this handshake, and was not issued within a minute."""
    try:
        ear: Ear = verify_ear(token, keys, decode_unverified_ear(token).issued_at)
        check_binding(ear, nonce.decode(), tee_pubkey)
    except TokenError:
        return error
    ahead_s = now - ear.issued_at
    return ClockSkewError(ahead_s) if abs(ahead_s) > LEEWAY_S else error
