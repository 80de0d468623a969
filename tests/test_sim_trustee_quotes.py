"""The test KBS's reading of TDX evidence: quotes, event logs, claims."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography import x509

from agent.evidence import ReportData, Tee
from agent.evidence.ccel import RuntimeEvent, pack_event_log, parse_event_log, replay
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import SimulatedTdx
from agent.sim.trustee_evidence import EvidenceRefused
from agent.sim.trustee_quotes import event_log_claims, verify_tdx_evidence
from tests.shared import shared_data

DIGEST = hashlib.sha384(b"bound").digest()
EVENT = RuntimeEvent("keyturn", "release-key", "{}")
TCB = ("UpToDate", ("INTEL-SA-00837",))


def evidence(machine: SimulatedMachine, version: int = 4) -> dict[str, Any]:
    """Of a machine that has measured one event at run time."""
    runtime = machine.runtime(Tee.TDX)
    runtime.measure(EVENT)
    quote = SimulatedTdx(machine, version).collect(ReportData(DIGEST.ljust(64, b"\0"))).report
    log = runtime.event_log() + b"\xff" * 8
    return {"cc_eventlog": base64.b64encode(log).decode(), "quote": base64.b64encode(quote).decode()}


def verified(machine: SimulatedMachine, value: object, init_data: bytes | None = None) -> dict[str, Any]:
    roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.glob("*.pem")]
    return verify_tdx_evidence(value, DIGEST, init_data, roots, TCB)


@pytest.mark.parametrize("version", [4, 5])
def test_claims_have_upstreams_names(machine: SimulatedMachine, version: int) -> None:
    machine.host_data = b"\7" * 32
    claims = verified(machine, evidence(machine, version), b"\7" * 32)
    header, body = claims["quote"]["header"], claims["quote"]["body"]
    assert (header["version"], header["tee_type"]) == (f"0{version}00", "81000000")
    assert header["vendor_id"] == "939a7233f79c4ca9940a0db3957f0607"
    assert body["mr_td"] == machine.measurement.hex()
    assert claims["init_data"] == body["mr_config_id"] == "07" * 32 + "00" * 16
    assert claims["report_data"] == body["report_data"] == (DIGEST + bytes(16)).hex()
    assert ("tee_tcb_svn2" in body) == (version == 5)
    assert claims["td_attributes"]["debug"] is False
    assert (claims["tcb_status"], claims["advisory_ids"]) == ("UpToDate", ["INTEL-SA-00837"])
    assert claims["uefi_event_logs"][-1]["details"]["data"] == {
        "domain": "keyturn",
        "operation": "release-key",
        "content": {},  # JSON where it can be
    }


@pytest.mark.parametrize("log", [None, ""])
def test_without_a_log_there_is_no_replay_and_no_claim_of_one(machine: SimulatedMachine, log: str | None) -> None:
    assert "uefi_event_logs" not in verified(machine, evidence(machine) | {"cc_eventlog": log})
    value = evidence(machine)
    del value["cc_eventlog"]
    assert "uefi_event_logs" not in verified(machine, value | {"aa_eventlog": "ignored"})


@pytest.mark.parametrize("number", range(4))
def test_every_rtmr_is_replayed(machine: SimulatedMachine, number: int) -> None:
    good = evidence(machine)
    log = parse_event_log(base64.b64decode(good["cc_eventlog"]))
    without = type(log)(log.spec_id, tuple(event for event in log.events if event.mr_index != number + 1))
    value = good | {"cc_eventlog": base64.b64encode(pack_event_log(without)).decode()}
    with pytest.raises(EvidenceRefused, match="tdx: "):
        verified(machine, value)


def test_what_the_tdx_verifier_refuses(machine: SimulatedMachine) -> None:
    good = evidence(machine)
    with pytest.raises(EvidenceRefused, match="REPORT_DATA"):
        verify_tdx_evidence(
            good, bytes(48), None, [x509.load_pem_x509_certificate((machine.roots_dir / "sgx-root.pem").read_bytes())], TCB
        )
    with pytest.raises(EvidenceRefused, match="MRCONFIGID"):
        verified(machine, good, b"x")
    with pytest.raises(EvidenceRefused):
        verify_tdx_evidence(good, DIGEST, None, [], TCB)
    for bad in ({"quote": 7}, {"quote": "?"}, {"quote": "AAAA"}, {"cc_eventlog": 7}, {"cc_eventlog": "AAAA"}):
        with pytest.raises(EvidenceRefused):
            verified(machine, good | bad)
    with pytest.raises(EvidenceRefused):
        verified(machine, {"cc_eventlog": None})


LOGS = {
    "CCEL_data_ovmf": "trustee/trustee/deps/eventlog/test_data/CCEL_data_ovmf",
    "CCEL_data_grub": "trustee/trustee/deps/eventlog/test_data/CCEL_data_grub",
    "CCEL_AAEL_alibabacloud": "trustee/trustee/deps/eventlog/test_data/CCEL_AAEL_alibabacloud",
    "CCEL_data": "trustee/derived/CCEL_data.trimmed",
    "CCEL_data_grub_gke": "trustee/derived/CCEL_data_grub_gke.trimmed",
}


@pytest.mark.parametrize("name", LOGS)
def test_event_log_claims_are_upstreams_but_for_details(name: str) -> None:
    log = parse_event_log(shared_data(LOGS[name]).read_bytes())
    expected = json.loads(shared_data(f"trustee/trustee/deps/eventlog/test_data/{name}_out.json").read_bytes())[
        "uefi_event_logs"
    ]
    ours = event_log_claims(log)
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        if one["details"]:
            assert one == other  # entries of the attestation agent
        else:
            assert one | {"details": None} == other | {"details": None}


def test_the_recorded_agent_entries_replay_to_upstreams_rtmr() -> None:
    log = parse_event_log(shared_data(LOGS["CCEL_AAEL_alibabacloud"]).read_bytes())
    assert replay(log)[3].hex().startswith("5e4ecd49")
    assert sum(bool(entry["details"]) for entry in event_log_claims(log)) == 2
