"""The test KBS's reading of `sample` and `snp` evidence, and of report data and initdata; vectors and recorded reports."""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from agent.evidence import ReportData
from agent.evidence.snp_abi import parse_report
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import SimulatedSnp
from agent.sim.trustee_as import parse_init_data, runtime_digest
from agent.sim.trustee_evidence import (
    EvidenceRefused,
    Fields,
    snp_certificates,
    snp_report_bytes,
    verify_sample,
    verify_snp_evidence,
)
from agent.verify.snp import load_certificate
from tests.raw_kbs import simulated_snp, snp_json
from tests.shared import shared_data

DIGEST = hashlib.sha384(b"bound").digest()


def roots(machine: SimulatedMachine) -> list[x509.Certificate]:
    return [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.glob("*.pem")]


def test_report_data_is_that_of_the_vectors() -> None:
    for case in json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_bytes())["report_data"]:
        bound = case["runtime_data"]
        assert runtime_digest(bound).hex() == case["sha384"]
        del bound["additional-evidence"]
        assert runtime_digest(bound).hex() == case["sha384_device"]
        assert runtime_digest(bound)[:32].hex() == case["nvidia_nonce_32_hex"]


def test_canonical_text_is_upstreams() -> None:
    digest = runtime_digest({"b": 1, "a": "test", "c": {"d": "e"}})
    assert digest.hex().startswith("e71ce8e70d814ba6639c3612ebee0ff1")


def test_sample_evidence_is_held_to_its_report_data_alone() -> None:
    text = base64.b64encode(DIGEST).decode()
    claims = verify_sample({"svn": "7", "report_data": text, "more": 1}, DIGEST, b"initdata")
    assert (claims["svn"], claims["report_data"], claims["init_data"]) == ("7", text, base64.b64encode(b"initdata").decode())
    bad: object
    for bad in ({"svn": 7}, {"report_data": text}, {"svn": "1"}, {"svn": "1", "report_data": "?"}, []):
        with pytest.raises(EvidenceRefused):
            verify_sample(bad, DIGEST, None)


# --- the JSON of a report ---------------------------------------------------------------------------------------------


def recorded_reports() -> list[Path]:
    return [path for path in sorted(shared_data("snp").rglob("*report*.bin")) if path.stat().st_size == 1184]


def test_recorded_reports_survive_the_way_through_json() -> None:
    seen = set()
    for path in recorded_reports():
        data = path.read_bytes()
        report = parse_report(data)
        seen.add(report.version)
        assert snp_report_bytes(json.loads(json.dumps(snp_json(data, None)["attestation_report"]))) == data, path
    assert seen >= {2, 3, 5}


def test_a_turin_report_has_its_own_order_of_levels(machine: SimulatedMachine) -> None:
    data = bytearray(simulated_report(machine))
    data[0:4] = (5).to_bytes(4, "little")
    data[0x188] = 0x1A
    for offset in (0x38, 0x180, 0x1E0, 0x1F0):
        data[offset : offset + 8] = bytes((1, 2, 3, 4, 0, 0, 0, 5))
    data[0x1F8:0x208] = bytes(range(16))
    report = snp_json(bytes(data), None)["attestation_report"]
    assert report["reported_tcb"] == {"fmc": 1, "bootloader": 2, "tee": 3, "snp": 4, "microcode": 5}
    assert snp_report_bytes(report) == data


def simulated_report(machine: SimulatedMachine) -> bytes:
    return SimulatedSnp(machine).collect(ReportData(DIGEST.ljust(64, b"\0"))).report


def test_upstreams_own_evidence_verifies_from_its_json() -> None:
    folder = shared_data("trustee/trustee")
    evidence = json.loads((folder / "attestation-service/tests/e2e/evidence.json").read_bytes())
    data = snp_report_bytes(evidence["attestation_report"])
    assert snp_json(data, None)["attestation_report"].items() >= evidence["attestation_report"].items()
    issuers = [load_certificate(shared_data(f"snp/certs/genoa-{name}.der").read_bytes()) for name in ("ask", "ark")]
    expected = bytes(evidence["attestation_report"]["report_data"])
    claims = verify_snp_evidence(evidence, expected, bytes(32), [], issuers)
    assert claims["report_data"] == expected.hex()
    assert (claims["policy_smt_allowed"], claims["policy_debug_allowed"]) == (True, False)
    assert claims["reported_tcb_snp"] == 23
    with pytest.raises(EvidenceRefused, match="REPORT_DATA"):
        verify_snp_evidence(evidence, DIGEST, None, [], issuers)
    with pytest.raises(EvidenceRefused, match="HOST_DATA"):
        verify_snp_evidence(evidence, expected, bytes(31) + b"\1", [], issuers)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("version", "3"),
        ("version", -1),
        ("version", 1 << 32),
        ("vmpl", True),
        ("report_data", [0] * 63),
        ("report_data", [256] + [0] * 63),
        ("report_data", "AAAA"),
        ("current_tcb", None),
        ("current_tcb", {"fmc": None, "bootloader": 256, "tee": 0, "snp": 0, "microcode": 0}),
        ("cpuid_fam_id", "25"),
        ("signature", {"r": [0] * 72}),
        ("measurement", None),
    ],
)
def test_a_wrong_type_in_a_report_refuses_it(machine: SimulatedMachine, member: str, value: object) -> None:
    report = snp_json(simulated_report(machine), None)["attestation_report"]
    snp_report_bytes(report)
    with pytest.raises(EvidenceRefused):
        snp_report_bytes(report | {member: value})


def test_the_certificate_chain_is_null_or_has_a_leaf() -> None:
    assert snp_certificates(None) == ()
    leaf: dict[str, Any] = {"cert_type": "VLEK", "data": [1, 2]}
    other: dict[str, Any] = {"cert_type": {"OTHER": "00000000-0000-0000-0000-000000000000"}, "data": [3]}
    assert snp_certificates([leaf, other, {"cert_type": "ASK", "data": [4]}]) == (b"\1\2", b"\4")
    bad: object
    for bad in ([], [other], [leaf | {"cert_type": "vcek"}], [leaf | {"data": "AQI="}], {}, "", [leaf, 7]):
        with pytest.raises(EvidenceRefused):
            snp_certificates(bad)


def test_null_means_that_the_verifier_has_the_certificates_itself(machine: SimulatedMachine) -> None:
    evidence = simulated_snp(machine, DIGEST)
    chain = [load_certificate(bytes(entry["data"])) for entry in evidence["cert_chain"]]
    alone = evidence | {"cert_chain": None}
    assert verify_snp_evidence(alone, DIGEST, None, roots(machine), chain)["policy_debug_allowed"] is False
    with pytest.raises(EvidenceRefused):
        verify_snp_evidence(alone, DIGEST, None, roots(machine), chain[1:])
    with pytest.raises(EvidenceRefused):
        verify_snp_evidence(evidence | {"cert_chain": []}, DIGEST, None, roots(machine), chain)
    leaf_alone = evidence | {"cert_chain": evidence["cert_chain"][:1]}
    assert verify_snp_evidence(leaf_alone, DIGEST, None, roots(machine), chain[1:])["chip_id"] == machine.chip_id.hex()


def test_what_the_snp_verifier_refuses(machine: SimulatedMachine) -> None:
    def refused(because: str, init_data: bytes | None = None) -> None:
        with pytest.raises(EvidenceRefused, match=because):
            verify_snp_evidence(simulated_snp(machine, DIGEST), DIGEST, init_data, roots(machine), [])

    refused("HOST_DATA", b"x")
    machine.vmpl = 1
    refused("VMPL")
    machine.vmpl = 0
    machine.flip_signature_bit = True
    refused("snp: ")
    machine.flip_signature_bit = False
    machine.tcb = replace(machine.tcb, snp=1)
    refused("snp: ")
    with pytest.raises(EvidenceRefused):
        verify_snp_evidence(simulated_snp(machine, DIGEST), DIGEST, None, [], [])


def test_debugging_is_a_claim_and_no_refusal(machine: SimulatedMachine) -> None:
    machine.policy |= 1 << 19
    claims = verify_snp_evidence(simulated_snp(machine, DIGEST), DIGEST, None, roots(machine), [])
    assert claims["policy_debug_allowed"] is True


# --- initdata ---------------------------------------------------------------------------------------------------------

POLICY = (
    'package agent_policy\npolicy_data := {"containers": [{"OCI": {"Process": {"User": {"UID": 65532}}}}]}\ndefault x := 1\n'
)


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_the_digest_of_initdata_is_over_its_bytes(algorithm: str) -> None:
    body = (
        f"version = \"0.1.0\"\nalgorithm = \"{algorithm}\"\n[data]\n\"policy.rego\" = '''{POLICY}'''\n\"cdh.toml\" = 'a = 1'\n"
    )
    parsed = parse_init_data(body)
    assert parsed.digest == hashlib.new(algorithm, body.encode()).digest()
    assert parsed.claims["cdh.toml"] == {"a": 1}
    assert parsed.claims["agent_policy_claims"]["containers"][0]["OCI"]["Process"]["User"]["UID"] == 65532


def test_a_longer_digest_is_cut_for_snp_and_a_shorter_one_padded_for_tdx(machine: SimulatedMachine) -> None:
    machine.host_data = DIGEST[:32]
    verify_snp_evidence(simulated_snp(machine, DIGEST), DIGEST, DIGEST, roots(machine), [])


@pytest.mark.parametrize(
    "body",
    [
        "",
        "=",
        'version = "0.2.0"\nalgorithm = "sha256"\n[data]\n',
        'version = "0.1.0"\nalgorithm = "sha-256"\n[data]\n',
        'version = "0.1.0"\nalgorithm = "sha256"\n',
        'version = "0.1.0"\nalgorithm = "sha256"\n[data]\na = 1\n',
        'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"aa.toml" = "="\n',
        'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"policy.rego" = "policy_data := {"\n',
    ],
)
def test_initdata_that_is_none(body: str) -> None:
    with pytest.raises(EvidenceRefused):
        parse_init_data(body)


def test_fields_name_what_is_missing() -> None:
    with pytest.raises(EvidenceRefused, match="here: missing field `x`"):
        Fields({}, "here").value("x")
    with pytest.raises(EvidenceRefused, match="here: not an object"):
        Fields([], "here")
