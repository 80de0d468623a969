"""Who must act on what an EAR does not affirm, and how: for Trustee's default policies, whose conditions are known.

Fixed texts, chosen by the finding. Does not know what the attestation service of a site really asks for: a site with a
policy of its own has changed what its claims depend on, and its text begins there.
"""

from dataclasses import dataclass

from agent.errors import Owner
from agent.handshake.ar4si import Meaning, Tier, TrustClaim
from agent.handshake.ear import EvidenceKind, Finding, FindingKind


@dataclass(frozen=True, slots=True)
class Advice:
    owner: Owner
    next_step: str


_OF_KIND = {
    FindingKind.STATUS: Advice(
        Owner.AUTHORITY, "read the attestation service's policy and log: no claim in the token explains the status"
    ),
    FindingKind.TCB_STATUS: Advice(Owner.HOST, "update firmware and microcode until the vendor calls the TCB level current"),
    FindingKind.ADVISORY: Advice(Owner.HOST, "update firmware and microcode to the versions that close the advisories"),
    FindingKind.COLLATERAL: Advice(Owner.AUTHORITY, "refresh the vendor's collateral at the attestation service"),
    FindingKind.SIMULATED: Advice(
        Owner.OPERATOR,
        "boot on a real TEE; Trustee's default resource policy denies sample evidence, and only a test should allow it",
    ),
}
_OF_MEANING = {
    Meaning.CRYPTO_FAILED: Advice(
        Owner.HOST, "the evidence or its certificates do not verify: `keyturn verify` says which of them, on the same files"
    ),
    Meaning.VERIFIER_MALFUNCTION: Advice(Owner.AUTHORITY, "read the attestation service's log: it failed while it appraised"),
    Meaning.UNKNOWN_ELEMENTS: Advice(
        Owner.AUTHORITY, "update the attestation service: the evidence holds what this version cannot evaluate"
    ),
    Meaning.HARDWARE_UNSAFE: Advice(Owner.HOST, "update firmware and microcode: this version has known vulnerabilities"),
}
_OF_GPU = Advice(
    Owner.AUTHORITY,
    "Trustee's default GPU policy reads claims of NVIDIA's remote service alone: a GPU that was verified locally needs a "
    "policy `default_gpu` of yours; with the remote service, register the VBIOS and driver versions",
)
_OF_CLAIM = {
    TrustClaim.EXECUTABLES: Advice(
        Owner.AUTHORITY,
        "register the launched image's measurements as reference values, or launch the image whose measurements are registered",
    ),
    TrustClaim.HARDWARE: Advice(
        Owner.AUTHORITY,
        "register this platform's TCB levels as reference values, or have the host update to levels that are registered",
    ),
    TrustClaim.CONFIGURATION: Advice(
        Owner.AUTHORITY,
        "register the guest policy (SEV-SNP) or XFAM (TDX) as reference values; a guest with debugging or migration allowed "
        "is never affirmed and must be launched without",
    ),
}
_OF_OTHERS = Advice(
    Owner.AUTHORITY, "ask who wrote the attestation policy: Trustee's own policies say nothing about this claim"
)


def advice_for(finding: Finding, kind: EvidenceKind | None) -> Advice:
    """What to do about one finding.

    Args:
        finding: of `ear.findings`.
        kind: of the submodule that it is about.
    """
    if finding.claim is None or finding.meaning is None:
        return _OF_KIND[finding.kind]
    if finding.meaning in _OF_MEANING:
        return _OF_MEANING[finding.meaning]
    if kind is EvidenceKind.NVIDIA and finding.tier is not Tier.NONE and finding.claim in _OF_CLAIM:
        return _OF_GPU
    return _OF_CLAIM.get(finding.claim, _OF_OTHERS)
