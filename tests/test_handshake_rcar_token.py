"""A Trustee token as the Verdict of a handshake."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import ClockSkewError, Owner, TokenCheck, TokenError
from agent.evidence import Nonce, OpaqueNonce, Tee
from agent.handshake import TeePublicKey, TokenClaims
from agent.handshake.rcar_token import EarVerifier
from agent.jose import pack_jwk
from tests.hostile_kbs import AUTHORITY, RESOURCE, ear, signed

NOW = 1_800_000_000
GUEST = ec.derive_private_key(0x55, ec.SECP256R1()).public_key().public_numbers()
PUBKEY = TeePublicKey(GUEST.x.to_bytes(32), GUEST.y.to_bytes(32))
URI = Ident(RESOURCE)


def token(nonce: str = "nonce", authority: ec.EllipticCurvePrivateKey = AUTHORITY, age_s: int = 1, **changes: Any) -> str:
    issued = NOW - age_s
    claims = ear({"nonce": nonce, "tee-pubkey": pack_jwk(PUBKEY)}) | {"iat": issued, "exp": issued + 300} | changes
    return signed(claims, authority)


def verified(text: str, *, tee: Tee = Tee.SAMPLE, simulated: bool = False) -> TokenClaims:
    return EarVerifier(tee, simulated)(
        text,
        keys=(AUTHORITY.public_key(),),
        nonce=Nonce(OpaqueNonce(b"nonce")),
        tee_pubkey=PUBKEY,
        key_uri=URI,
        now=NOW,
    )


def test_the_claims_say_what_trustee_knows_and_nothing_it_does_not() -> None:
    assert verified(token()) == TokenClaims(
        nonce=Nonce(b"nonce"),
        tee_pubkey=PUBKEY,
        key_uri=URI,
        policy_version=Ident("unversioned"),
        min_model_version=0,
        lease_s=None,
        simulated=True,
        issued_at=NOW - 1,
        expires_at=NOW + 299,
    )


def as_snp(text_of: dict[str, Any]) -> dict[str, Any]:
    evidence = text_of["cpu0"]["ear.veraison.annotated-evidence"]
    evidence["snp"] = evidence.pop("sample")
    return text_of


@pytest.mark.parametrize("simulated", [False, True])
def test_our_own_simulator_is_known_by_us_and_sample_evidence_by_the_token(simulated: bool) -> None:
    submods = as_snp(ear({"nonce": "nonce", "tee-pubkey": pack_jwk(PUBKEY)})["submods"])
    assert verified(token(submods=submods), tee=Tee.SNP, simulated=simulated).simulated is simulated
    assert verified(token(), simulated=simulated).simulated


def check_of(text: str, tee: Tee = Tee.SAMPLE) -> TokenCheck:
    with pytest.raises(TokenError) as raised:
        verified(text, tee=tee)
    return raised.value.check


def test_a_token_of_another_handshake_is_refused() -> None:
    assert check_of(token("other")) is TokenCheck.NONCE
    other = pack_jwk(TeePublicKey(PUBKEY.y, PUBKEY.x))
    submods = ear({"nonce": "nonce", "tee-pubkey": other})["submods"]
    assert check_of(token(submods=submods)) is TokenCheck.TEE_PUBKEY


def test_a_token_about_another_kind_of_tee_is_refused() -> None:
    assert check_of(token(), Tee.SNP) is TokenCheck.CLAIMS
    submods = ear({"nonce": "nonce", "tee-pubkey": pack_jwk(PUBKEY)})["submods"]
    del submods["cpu0"]["ear.veraison.annotated-evidence"]["sample"]
    assert check_of(token(submods=submods)) is TokenCheck.CLAIMS


@pytest.mark.parametrize("ahead_s", [-(10**8), -3600, -62, 400, 3600, 10**8])
def test_a_clock_that_is_wrong_is_told_apart_from_a_token_that_is_old(ahead_s: int) -> None:
    with pytest.raises(ClockSkewError) as raised:
        verified(token(age_s=ahead_s))
    assert (raised.value.ahead_s, raised.value.owner) == (ahead_s, Owner.OPERATOR)

    # The same age on a token that is not of this handshake is what it says.
    stale = check_of(token("other", age_s=ahead_s))
    assert stale is (TokenCheck.EXPIRED if ahead_s > 0 else TokenCheck.NOT_YET_VALID)
    stranger = ec.derive_private_key(9, ec.SECP256R1())
    assert check_of(token(authority=stranger, age_s=ahead_s)) is TokenCheck.SIGNATURE


@pytest.mark.parametrize("age_s", [-60, -1, 0, 59, 359])
def test_a_minutes_difference_is_none(age_s: int) -> None:
    assert verified(token(age_s=age_s)).issued_at == NOW - age_s


def test_a_token_that_lives_no_second_is_expired() -> None:
    assert check_of(token(age_s=0, exp=NOW - 60)) is TokenCheck.EXPIRED
    assert check_of(token(age_s=40, exp=NOW - 70)) is TokenCheck.EXPIRED  # made 40 seconds ago: no clock is wrong
