"""Every finding has an owner and a next step, and what is named in backquotes can be typed."""

import re

import pytest

from agent.cli import VERBS
from agent.closed import Ident
from agent.errors import Owner
from agent.handshake.advice import advice_for
from agent.handshake.ar4si import MEANINGS, Tier, TrustClaim, meaning_of, tier_of
from agent.handshake.ear import EvidenceKind, Finding, FindingKind

GPU = Ident("gpu0")


def finding(claim: TrustClaim, value: int) -> Finding:
    return Finding(GPU, FindingKind.CLAIM, tier_of(value), claim, value, meaning_of(claim, value))


@pytest.mark.parametrize("kind", [*EvidenceKind, None])
def test_every_finding_has_one_sentence_for_somebody(kind: EvidenceKind | None) -> None:
    found = [finding(claim, value) for claim, values in MEANINGS.items() for value in (*values, -1, 1, 99, -100)]
    found += [Finding(GPU, other, Tier.WARNING) for other in FindingKind if other is not FindingKind.CLAIM]
    for each in found:
        advice = advice_for(each, kind)
        assert advice.owner in (Owner.AUTHORITY, Owner.HOST, Owner.OPERATOR)
        assert advice.next_step[-1] not in ". "
        for words in re.findall(r"`keyturn ([a-z]+)", advice.next_step):
            assert words in VERBS


def test_a_gpu_is_told_of_the_default_policy_and_a_cpu_of_its_measurements() -> None:
    for claim, value in ((TrustClaim.EXECUTABLES, 33), (TrustClaim.HARDWARE, 97), (TrustClaim.CONFIGURATION, 36)):
        assert "`default_gpu`" in advice_for(finding(claim, value), EvidenceKind.NVIDIA).next_step
        assert "`default_gpu`" not in advice_for(finding(claim, value), EvidenceKind.SNP).next_step
    assert "measurements" in advice_for(finding(TrustClaim.EXECUTABLES, 33), EvidenceKind.TDX).next_step
    assert advice_for(finding(TrustClaim.HARDWARE, 32), EvidenceKind.SNP).owner is Owner.HOST
