"""A protected-PCIe set: twelve devices that name each other, and every way in which they can fail to be one."""

import base64
import datetime
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import GpuEvidence, GpuNonce
from agent.verify.nvidia import verify_gpu, verify_switch
from agent.verify.ppcie import verify_ppcie
from tests.gpus import GPU_NAMES, NONCE, SWITCH_NAMES, SimulatedSet, links, listed
from tests.shared import shared_data

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
OTHER = bytes.fromhex("c0ffee00c0ffee00")


@pytest.fixture(scope="module")
def devices() -> SimulatedSet:
    return SimulatedSet()


@pytest.fixture
def gpus(devices: SimulatedSet) -> list[GpuEvidence]:
    return [gpu.evidence for gpu in devices.gpus]


@pytest.fixture
def switches(devices: SimulatedSet) -> list[GpuEvidence]:
    return [switch.evidence for switch in devices.switches]


def refusal(
    devices: SimulatedSet, gpus: Sequence[GpuEvidence], switches: Sequence[GpuEvidence], nonce: GpuNonce = NONCE
) -> tuple[EvidenceFormat, EvidenceCheck]:
    with pytest.raises(EvidenceVerificationError) as caught:
        verify_ppcie(gpus, switches, nonce, [devices.root], NOW)
    return caught.value.format, caught.value.check


def deviation(devices: SimulatedSet, gpus: Sequence[GpuEvidence], switches: Sequence[GpuEvidence]) -> EvidenceCheck:
    """The check of the topology that fails."""
    where, check = refusal(devices, gpus, switches)
    assert where is EvidenceFormat.NVIDIA_TOPOLOGY
    return check


def test_a_whole_set_verifies_in_any_order(devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]) -> None:
    claims = verify_ppcie(gpus[::-1], switches[::-1], NONCE, [devices.root], NOW)
    assert [switch.pdi for switch in claims.switches] == list(SWITCH_NAMES[::-1])
    assert {len({*gpu.switch_pdis}) for gpu in claims.gpus} == {5}  # four switches, and zeros for the links that are off
    assert all(gpu.simulated for gpu in claims.gpus)
    assert all(switch.simulated for switch in claims.switches)


def test_a_set_of_old_drivers_has_no_feature_flag(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]
) -> None:
    gpus[0] = devices.gpus[0].saying({34: None, 36: None})
    verify_ppcie(gpus, switches, NONCE, [devices.root], NOW)


def test_old_firmware_of_a_switch_lists_its_gpus_elsewhere(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]
) -> None:
    switches[0] = devices.switches[0].saying({26: None, 4: listed(GPU_NAMES)})
    verify_ppcie(gpus, switches, NONCE, [devices.root], NOW)


@pytest.mark.parametrize("count", [0, 1, 7, 9])
def test_a_set_has_eight_gpus(devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], count: int) -> None:
    assert deviation(devices, (gpus * 2)[:count], switches) is EvidenceCheck.GPU_COUNT


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_set_has_four_switches(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], count: int
) -> None:
    assert deviation(devices, gpus, (switches * 2)[:count]) is EvidenceCheck.SWITCH_COUNT


def test_every_device_of_a_set_is_verified(devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]) -> None:
    for place in range(12):
        where = EvidenceFormat.NVIDIA_REPORT if place < 8 else EvidenceFormat.SWITCH_REPORT
        evidence = (*gpus, *switches)
        broken = replace(evidence[place], report=evidence[place].report[:-1] + b"\0")
        evidence = (*evidence[:place], broken, *evidence[place + 1 :])
        assert refusal(devices, evidence[:8], evidence[8:]) == (where, EvidenceCheck.REPORT_SIGNATURE)
    assert refusal(devices, gpus, switches, GpuNonce(bytes(32))) == (EvidenceFormat.NVIDIA_REPORT, EvidenceCheck.NONCE)


def test_a_switch_in_the_place_of_a_gpu_is_none(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]
) -> None:
    chip = EvidenceCheck.CERTIFICATE_CHIP_ID
    assert refusal(devices, [*gpus[:7], switches[0]], switches) == (EvidenceFormat.NVIDIA_CHAIN, chip)
    assert refusal(devices, gpus, [*switches[:3], gpus[0]]) == (EvidenceFormat.SWITCH_CHAIN, chip)


@pytest.mark.parametrize("role", ["gpus", "switches"])
def test_two_devices_with_one_key_are_no_set(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], role: str
) -> None:
    if role == "gpus":
        gpus[7] = gpus[0]
    else:
        switches[3] = devices.switches[0].saying({22: SWITCH_NAMES[3]})
    assert deviation(devices, gpus, switches) is EvidenceCheck.DISTINCT_KEYS


@pytest.mark.parametrize("changes", [{21: b"\x55"}, {21: None}, {36: b"\0\0"}, {36: b"\1\0"}])
@pytest.mark.parametrize("place", [0, 7])
def test_every_gpu_is_in_protected_pcie_mode(
    devices: SimulatedSet,
    gpus: list[GpuEvidence],
    switches: list[GpuEvidence],
    place: int,
    changes: dict[int, bytes | None],
) -> None:
    gpus[place] = devices.gpus[place].saying(changes)
    assert deviation(devices, gpus, switches) is EvidenceCheck.PROTECTED_PCIE


def test_a_blackwell_gpu_is_in_no_protected_pcie_set(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]
) -> None:
    gpus[3] = devices.blackwell.evidence
    assert deviation(devices, gpus, switches) is EvidenceCheck.PROTECTED_PCIE


@pytest.mark.parametrize("name", [SWITCH_NAMES[0], bytes(8)])
def test_every_switch_has_a_name_of_its_own(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], name: bytes
) -> None:
    switches[3] = devices.switches[3].saying({22: name})
    assert deviation(devices, gpus, switches) is EvidenceCheck.DISTINCT_PDIS


@pytest.mark.parametrize(
    "names",
    [SWITCH_NAMES[:3], (*SWITCH_NAMES, OTHER), (*SWITCH_NAMES[:3], OTHER), (bytes(8),), [name[::-1] for name in SWITCH_NAMES]],
    ids=["one missing", "one more", "another", "none", "not reversed"],
)
@pytest.mark.parametrize("place", [0, 7])
def test_a_gpu_is_linked_to_these_switches_and_no_other(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], place: int, names: Sequence[bytes]
) -> None:
    gpus[place] = devices.gpus[place].saying({22: links(names)})
    assert deviation(devices, gpus, switches) is EvidenceCheck.GPU_LINKS


def test_a_gpu_that_does_not_name_its_switches_is_linked_to_none(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence]
) -> None:
    gpus[5] = devices.gpus[5].saying({22: None})
    assert deviation(devices, gpus, switches) is EvidenceCheck.GPU_LINKS


@pytest.mark.parametrize("replacement", [GPU_NAMES[0], bytes(8)], ids=["one twice", "one none"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_switch_lists_eight_different_gpus(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], place: int, replacement: bytes
) -> None:
    switches[place] = devices.switches[place].saying({26: listed((*GPU_NAMES[:7], replacement))})
    assert deviation(devices, gpus, switches) is EvidenceCheck.SWITCH_LINKS


@pytest.mark.parametrize("place", [0, 3])
def test_all_switches_list_the_same_gpus(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], place: int
) -> None:
    switches[place] = devices.switches[place].saying({26: listed((*GPU_NAMES[:7], OTHER))})
    assert deviation(devices, gpus, switches) is EvidenceCheck.COMMON_GPUS


@pytest.mark.parametrize(("kind", "field"), [(22, "pdi"), (26, "gpu-pdis")])
def test_a_switch_that_does_not_name_itself_or_its_gpus_is_malformed(
    devices: SimulatedSet, gpus: list[GpuEvidence], switches: list[GpuEvidence], kind: int, field: str
) -> None:
    switches[1] = devices.switches[1].saying({kind: None})
    with pytest.raises(MalformedEvidenceError) as caught:
        verify_ppcie(gpus, switches, NONCE, [devices.root], NOW)
    assert caught.value.field == field


def recorded_set(file: str) -> tuple[list[GpuEvidence], GpuNonce]:
    """Every device of a recorded list."""
    entries = json.loads(shared_data(f"nvidia/attestation-sdk/serialized_test_evidence/{file}").read_bytes())
    (nonce,) = {bytes.fromhex(entry["nonce"]) for entry in entries}
    return [
        GpuEvidence(entry["arch"], f"GPU-{index}", base64.b64decode(entry["evidence"]), base64.b64decode(entry["certificate"]))
        for index, entry in enumerate(entries)
    ], GpuNonce(nonce)


def test_recorded_gpus_of_one_machine_name_the_same_four_switches() -> None:
    evidence, nonce = recorded_set("multi_gpu_hopper.json")
    claims = [verify_gpu(gpu, nonce, (), NOW) for gpu in evidence]
    (switches,) = {frozenset(gpu.switch_pdis) for gpu in claims}
    assert switches == {
        bytes.fromhex(name) for name in ("3a53b743d811e977", "9ae3beba9e673275", "03dba23b3c11bd8a", "666e93e19dec7d2d")
    }
    assert all(gpu.protected_pcie and gpu.feature_flag == 2 for gpu in claims)


def test_a_recorded_switch_names_itself_and_seven_gpus() -> None:
    """One of them stands in its list twice: such a set would be refused, whatever the GPUs say."""
    (evidence,), nonce = recorded_set("switch_evidence_ls10.json")
    claims = verify_switch(evidence, nonce, (), NOW)
    assert claims.pdi.hex() == "203eb31ad9ed0008"
    assert len(claims.gpu_pdis) == 8
    assert len(set(claims.gpu_pdis)) == 7


def test_recorded_devices_are_no_whole_set() -> None:
    gpus, nonce = recorded_set("multi_gpu_hopper.json")
    switches, _ = recorded_set("multi_switch_ls10.json")
    with pytest.raises(EvidenceVerificationError) as caught:
        verify_ppcie(gpus, switches, nonce, (), NOW)
    assert caught.value.check is EvidenceCheck.GPU_COUNT


def test_a_recorded_switch_four_times_is_one_key() -> None:
    """The recording holds the same device four times."""
    evidence, nonce = recorded_set("multi_switch_ls10.json")
    assert len({verify_switch(switch, nonce, (), NOW).leaf_key_sha256 for switch in evidence}) == 1
