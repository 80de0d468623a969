"""The words of the trust claims: every value of the draft has its own, in its own tier."""

import pytest

from agent.handshake.ar4si import MEANINGS, Meaning, Tier, TrustClaim, meaning_of, tier_of


def test_every_value_of_every_claim_has_words() -> None:
    assert MEANINGS.keys() == set(TrustClaim)
    for claim, meanings in MEANINGS.items():
        for value, meaning in meanings.items():
            assert meaning_of(claim, value) is meaning
            assert tier_of(value) is not Tier.NONE
        for value in (-1, 0, 1, 99):
            assert value not in meanings
            assert meaning_of(claim, value) is not Meaning.UNDEFINED
        assert meaning_of(claim, 31) is Meaning.UNDEFINED
        assert meaning_of(claim, -97) is Meaning.UNDEFINED


def test_no_words_are_used_twice_or_never() -> None:
    used = [meaning for meanings in MEANINGS.values() for meaning in meanings.values()]
    used += [meaning_of(TrustClaim.HARDWARE, value) for value in (-1, 0, 1, 99, 5)]
    assert sorted(used, key=lambda meaning: meaning.name) == sorted(Meaning, key=lambda meaning: meaning.name)


@pytest.mark.parametrize(
    ("tier", "values"),
    [
        (Tier.NONE, (-1, 0, 1)),
        (Tier.AFFIRMING, (2, 31, -2, -32)),
        (Tier.WARNING, (32, 95, -33, -96)),
        (Tier.CONTRAINDICATED, (96, 127, -97, -128)),
    ],
)
def test_the_tiers_are_the_drafts(tier: Tier, values: tuple[int, ...]) -> None:
    assert {tier_of(value) for value in values} == {tier}


def test_the_three_that_operators_meet_are_named() -> None:
    assert "unrecognised executables" in meaning_of(TrustClaim.EXECUTABLES, 33).value
    assert "unrecognised hardware" in meaning_of(TrustClaim.HARDWARE, 97).value
    assert "configuration unavailable" in meaning_of(TrustClaim.CONFIGURATION, 36).value
