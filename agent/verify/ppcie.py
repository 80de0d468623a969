"""Verify a protected-PCIe set: eight GPUs and four NVSwitches, each genuine and fresh, that name each other.

In this mode data between GPUs crosses the NVSwitches unencrypted, so a switch that is not attested could read it. Every
device is verified as in `nvidia.py`; here is what they must say together. A GPU does not report its own PDI: that the eight
GPUs that the switches list are these eight follows from their number, from their distinct keys, and from each of them being
linked to these switches alone.
Spec: NVIDIA nvtrust, ppcie-verifier (topology).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError
from agent.evidence import GpuEvidence, GpuNonce
from agent.evidence.gpu_abi import PDI_BYTES, Pdi
from agent.verify.nvidia import GpuClaims, SwitchClaims, verify_gpu, verify_switch

GPUS = 8
SWITCHES = 4
_FLAG_PROTECTED_PCIE = 2  # FEATURE_FLAG
_NO_DEVICE = Pdi(bytes(PDI_BYTES))  # at the end of a link that is off


@dataclass(frozen=True, slots=True)
class PpcieClaims:
    """What the Evidence of a whole set proves, in the order in which it came."""

    gpus: tuple[GpuClaims, ...]
    switches: tuple[SwitchClaims, ...]


def verify_ppcie(
    gpus: Sequence[GpuEvidence],
    switches: Sequence[GpuEvidence],
    nonce: GpuNonce,
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> PpcieClaims:
    """Verify Evidence of a protected-PCIe set.

    1. There are exactly eight GPUs and four NVSwitches, before any signature is looked at.
    2. Each is genuine and carries our nonce.
    3. They are the set that they say they are (`check_topology`).

    Args:
        gpus, switches: in any order.
        nonce, roots, now: as of `verify_gpu`.
    Raises:
        MalformedEvidenceError: a report or chain does not parse.
        EvidenceVerificationError: one of the checks above does not hold.
    """
    # 1.
    # refusal: test_a_set_has_eight_gpus
    if len(gpus) != GPUS:
        raise _failed(EvidenceCheck.GPU_COUNT)
    # refusal: test_a_set_has_four_switches
    if len(switches) != SWITCHES:
        raise _failed(EvidenceCheck.SWITCH_COUNT)

    # 2.
    claims = PpcieClaims(
        tuple(verify_gpu(gpu, nonce, roots, now) for gpu in gpus),
        tuple(verify_switch(switch, nonce, roots, now) for switch in switches),
    )

    # 3.
    check_topology(claims)
    return claims


def check_topology(claims: PpcieClaims) -> None:
    """The devices are different ones, in protected-PCIe mode, and name each other.

    1. No two devices sign with the same key.
    2. Every GPU says that protected PCIe is on.
    3. The switches have different PDIs.
    4. Every GPU is linked to these four switches, and to no other.
    5. Every switch lists eight different GPUs.
    6. All switches list the same eight.

    Raises:
        EvidenceVerificationError: with the first of these that does not hold.
    """
    gpus, switches = claims.gpus, claims.switches

    # 1.
    keys = [gpu.leaf_key_sha256 for gpu in gpus] + [switch.leaf_key_sha256 for switch in switches]
    # refusal: test_two_devices_with_one_key_are_no_set
    if len(set(keys)) != len(keys):
        raise _failed(EvidenceCheck.DISTINCT_KEYS)

    # 2. Drivers before 580 have no feature flag; the status is older than the mode.
    for gpu in gpus:
        # refusal: test_every_gpu_is_in_protected_pcie_mode
        if not gpu.protected_pcie or gpu.feature_flag not in (None, _FLAG_PROTECTED_PCIE):
            raise _failed(EvidenceCheck.PROTECTED_PCIE)

    # 3.
    own = {switch.pdi for switch in switches} - {_NO_DEVICE}
    # refusal: test_every_switch_has_a_name_of_its_own
    if len(own) != len(switches):
        raise _failed(EvidenceCheck.DISTINCT_PDIS)

    # 4.
    for gpu in gpus:
        # refusal: test_a_gpu_is_linked_to_these_switches_and_no_other
        if set(gpu.switch_pdis) - {_NO_DEVICE} != own:
            raise _failed(EvidenceCheck.GPU_LINKS)

    # 5.
    listed = [set(switch.gpu_pdis) - {_NO_DEVICE} for switch in switches]
    # refusal: test_a_switch_lists_eight_different_gpus
    if any(len(names) != GPUS for names in listed):
        raise _failed(EvidenceCheck.SWITCH_LINKS)

    # 6.
    # refusal: test_all_switches_list_the_same_gpus
    if any(names != listed[0] for names in listed):
        raise _failed(EvidenceCheck.COMMON_GPUS)


def _failed(check: EvidenceCheck) -> EvidenceVerificationError:
    return EvidenceVerificationError(EvidenceFormat.NVIDIA_TOPOLOGY, check)
