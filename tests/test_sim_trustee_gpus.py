"""The test KBS's reading of device evidence: recorded Hopper reports to upstream's claims, and what it refuses."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography import x509

from agent.evidence import GpuNonce
from agent.evidence.gpu_abi import parse_report
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee_evidence import EvidenceRefused
from agent.sim.trustee_gpus import gpu_claims, verify_devices, verify_sample_device
from tests.gpus import gpu_machine, simulated_root
from tests.shared import shared_data

DIGEST = hashlib.sha384(b"bound").digest()
COCO_DIGEST = bytes.fromhex("87d8e24ab336adafe228d49e83d745f6dba4ae505372b6a5704820856b343fece279b616efefc2aae21da80cf5581250")


def evidence(machine: SimulatedMachine) -> dict[str, Any]:
    devices = [
        {
            "arch": gpu.arch,
            "uuid": gpu.uuid,
            "evidence": base64.b64encode(gpu.report).decode(),
            "certificate": base64.b64encode(gpu.certificate_chain).decode(),
        }
        for gpu in machine.gpu_system().collect(GpuNonce(DIGEST[:32]))
    ]
    return {"device_evidence_list": devices}


@pytest.fixture
def gpus_here(tmp_path: Any) -> SimulatedMachine:
    return gpu_machine(tmp_path / "machine")


def test_claims_of_the_recorded_report_are_upstreams_byte_for_byte() -> None:
    folder = shared_data("trustee/trustee/deps/verifier/test_data/nvidia")
    expected = json.loads((folder / "hopperAttestationReport-claims.txt").read_bytes())
    report = bytes.fromhex((folder / "hopperAttestationReport.txt").read_text().strip())
    assert gpu_claims(parse_report(report), expected["uuid"]) == expected


def test_a_report_that_coco_took_verifies_in_either_encoding() -> None:
    folder = shared_data("trustee/trustee/deps/verifier/test_data/nvidia")
    hexadecimal = (folder / "hopper_coco_report1.txt").read_text().strip()
    chain = base64.b64encode((folder / "hopper_coco_certs1.txt").read_bytes()).decode()
    for text in (hexadecimal, base64.b64encode(bytes.fromhex(hexadecimal)).decode()):
        device = {"arch": "Hopper", "evidence": text, "certificate": chain}
        (claims,) = verify_devices({"device_evidence_list": [device]}, COCO_DIGEST, ())
        assert claims["uuid"] == "unknown"
        with pytest.raises(EvidenceRefused):
            verify_devices({"device_evidence_list": [device]}, DIGEST, ())


def test_every_device_has_claims_in_order(gpus_here: SimulatedMachine) -> None:
    value = evidence(gpus_here)
    claims = verify_devices(value | {"keyturn": {}}, DIGEST, [simulated_root(gpus_here)])
    assert [one["uuid"] for one in claims] == [device["uuid"] for device in value["device_evidence_list"]]
    assert verify_devices({"device_evidence_list": []}, DIGEST, ()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "BLACKWELL"},
        {"arch": "LS10"},
        {"arch": "hopper"},
        {"arch": None},
        {"evidence": "?"},
        {"evidence": "AAAA"},
        {"certificate": "AAAA"},
        {"certificate": 7},
        {"uuid": 7},
    ],
)
def test_one_bad_device_refuses_all(gpus_here: SimulatedMachine, changes: dict[str, Any]) -> None:
    value = evidence(gpus_here)
    value["device_evidence_list"][1] |= changes
    with pytest.raises(EvidenceRefused):
        verify_devices(value, DIGEST, [simulated_root(gpus_here)])


def test_devices_of_another_nonce_or_root_are_refused(gpus_here: SimulatedMachine) -> None:
    root: x509.Certificate = simulated_root(gpus_here)
    for value, digest, roots in (
        (evidence(gpus_here), bytes(48), [root]),
        (evidence(gpus_here), DIGEST, []),
        ([], DIGEST, [root]),
    ):
        with pytest.raises(EvidenceRefused):
            verify_devices(value, digest, roots)


def test_a_sample_device_is_held_to_the_whole_digest() -> None:
    text = base64.b64encode(DIGEST).decode()
    assert verify_sample_device({"svn": "2", "report_data": text}, DIGEST) == {"svn": "2", "report_data": text}
    with pytest.raises(EvidenceRefused):
        verify_sample_device({"svn": "2", "report_data": base64.b64encode(DIGEST[:32]).decode()}, DIGEST)
