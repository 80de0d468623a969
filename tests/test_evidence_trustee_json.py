"""Evidence as Trustee writes it: the recorded text byte for byte and signature and all, both ways, and what is refused."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.ccel import pack_event_log, parse_event_log, replay
from agent.evidence.snp_abi import SIGNED_BYTES, TcbVersion, pack_report, parse_report
from agent.evidence.trustee_json import MAX_EVIDENCE_BYTES, pack_evidence, parse_evidence, trimmed
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_event_log
from agent.verify.snp import load_certificate, verify_snp
from tests.shared import shared_data

REPORT_DATA = ReportData(bytes(range(64)))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedMachine:
    return SimulatedMachine.create(tmp_path_factory.mktemp("machine") / "m", gpus=0)


def snp(machine: SimulatedMachine) -> Evidence:
    return machine.attester().collect(REPORT_DATA)


# --- recorded ---------------------------------------------------------------------------------------------------------


def test_the_recorded_evidence_is_written_again_byte_for_byte_and_its_signature_verifies() -> None:
    text = shared_data("trustee/trustee/attestation-service/tests/e2e/evidence.json").read_bytes().strip()
    evidence = parse_evidence(Tee.SNP, text)
    # The recording is of before report version 5: it lacks the two members which the crate has written since.
    again = pack_evidence(evidence).replace('"launch_mit_vector":null,"current_mit_vector":null,', "")
    assert again.encode() == text.replace(b'"launch_mit_vector":null,"current_mit_vector":null,', b"")
    assert len(evidence.cert_chain) == 1

    report = parse_report(evidence.report)
    key = load_certificate(evidence.cert_chain[0]).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    signature = encode_dss_signature(report.signature_r, report.signature_s)
    key.verify(signature, evidence.report[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))


def test_recorded_reports_survive_both_ways() -> None:
    for row in json.loads(shared_data("snp/index.json").read_text()):
        parts = (shared_data(f"snp/{row[key]}").read_bytes() for key in ("report", "endorsement_cert", "intermediate", "root"))
        report, *chain = parts
        evidence = Evidence(Tee.SNP, report, tuple(chain))
        text = pack_evidence(evidence)
        assert parse_evidence(Tee.SNP, text.encode()) == evidence, row["name"]
        kinds = [entry["cert_type"] for entry in json.loads(text)["cert_chain"]]
        assert kinds == [row["endorsement_key"].upper(), "ASK", "ARK"], row["name"]


def test_recorded_quotes_survive_both_ways() -> None:
    for row in json.loads(shared_data("tdx/index.json").read_text()):
        if "quote" not in row:
            continue
        data = shared_data(f"tdx/{row['quote']}").read_bytes()
        text = json.dumps({"quote": base64.b64encode(data).decode(), "cc_eventlog": None, "aa_eventlog": "old"})
        evidence = parse_evidence(Tee.TDX, text.encode())
        assert evidence.report == data[: row["quote_end"]], row["name"]
        assert parse_evidence(Tee.TDX, pack_evidence(evidence).encode()) == evidence
        assert json.loads(pack_evidence(evidence))["cc_eventlog"] is None


def test_a_recorded_log_is_cut_at_its_last_event_and_replays_as_before() -> None:
    for relative in ("CCEL_data_ovmf", "CCEL_data_grub", "CCEL_AAEL_alibabacloud"):
        data = shared_data(f"trustee/trustee/deps/eventlog/test_data/{relative}").read_bytes()
        cut = trimmed(data)
        assert replay(parse_event_log(cut)) == replay(parse_event_log(data))
        assert trimmed(cut) == cut
        assert data.startswith(cut)
    aael = shared_data("trustee/trustee/deps/eventlog/test_data/CCEL_AAEL_alibabacloud").read_bytes()
    quote = shared_data("tdx/quotes/v4-uptodate.bin").read_bytes()
    sent = json.loads(pack_evidence(Evidence(Tee.TDX, quote, event_log=trimmed(aael))))["cc_eventlog"]
    assert base64.b64decode(sent) == aael, "CoCo's own agent ends its log as we do"
    for path in sorted(shared_data("trustee/derived").iterdir()):
        data = path.read_bytes()
        assert replay(parse_event_log(trimmed(data))) == replay(parse_event_log(data))


# --- made here --------------------------------------------------------------------------------------------------------


def test_a_simulated_report_verifies_after_the_way_there_and_back(machine: SimulatedMachine) -> None:
    evidence = snp(machine)
    again = parse_evidence(Tee.SNP, pack_evidence(evidence).encode())
    assert again == evidence
    root = load_certificate(evidence.cert_chain[2])
    verify_snp(again, [root], [], datetime.now(UTC))
    kinds = [entry["cert_type"] for entry in json.loads(pack_evidence(evidence))["cert_chain"]]
    assert kinds == ["VCEK", "ASK", "ARK"]


def test_members_stand_as_serde_writes_them(machine: SimulatedMachine) -> None:
    text = pack_evidence(snp(machine))
    assert " " not in text
    members = json.loads(text)
    assert list(members) == ["attestation_report", "cert_chain"]
    report = members["attestation_report"]
    assert report["cpuid_fam_id"] == 25
    assert report["launch_mit_vector"] is None
    assert report["report_data"] == list(REPORT_DATA)
    assert report["reported_tcb"] == {"fmc": None, "bootloader": 10, "tee": 0, "snp": 23, "microcode": 84}
    assert len(report["signature"]["r"]) == len(report["signature"]["s"]) == 72


def test_every_report_version_and_tcb_layout_survives(machine: SimulatedMachine) -> None:
    report = parse_report(snp(machine).report)
    turin = TcbVersion(1, 2, 3, 4, fmc=5)
    tcbs = dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), turin)
    for other in (
        replace(report, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None),
        replace(report, version=5, launch_mitigations=1, current_mitigations=(1 << 64) - 1),
        replace(report, cpuid_family=0x1A, cpuid_model=2, **tcbs),  # type: ignore[arg-type]
    ):
        evidence = Evidence(Tee.SNP, pack_report(other))
        assert parse_evidence(Tee.SNP, pack_evidence(evidence).encode()) == evidence


def test_a_chain_without_a_leaf_is_null_because_trustee_refuses_any_other(machine: SimulatedMachine) -> None:
    evidence = snp(machine)
    for chain in ((), evidence.cert_chain[1:]):
        assert json.loads(pack_evidence(replace(evidence, cert_chain=chain)))["cert_chain"] is None


def test_certificates_come_in_any_order_and_what_is_none_is_left_out(machine: SimulatedMachine) -> None:
    evidence = snp(machine)
    members = json.loads(pack_evidence(evidence))
    members["cert_chain"] = [
        {"cert_type": {"OTHER": "0" * 32}, "data": []},
        {"cert_type": "CRL", "data": [1]},
        *reversed(members["cert_chain"]),
        {"cert_type": "Empty", "data": []},
    ]
    members["unknown"] = {"member": [1]}
    assert parse_evidence(Tee.SNP, json.dumps(members).encode()) == evidence


def test_a_quote_goes_with_its_log_and_its_padding_does_not(machine: SimulatedMachine) -> None:
    quote = machine.attester(Tee.TDX).collect(REPORT_DATA).report
    log = pack_event_log(make_event_log(machine))
    evidence = Evidence(Tee.TDX, quote, event_log=trimmed(log + b"\xff" * 512))
    assert evidence.event_log == log
    assert parse_evidence(Tee.TDX, pack_evidence(evidence).encode()) == evidence
    padded = {"quote": base64.b64encode(quote + b"\0" * 77).decode(), "cc_eventlog": base64.b64encode(log).decode()}
    assert parse_evidence(Tee.TDX, json.dumps(padded).encode()) == evidence


def test_sample_evidence_is_the_digest_without_padding() -> None:
    evidence = Evidence(Tee.SAMPLE, bytes(range(48)))
    expected = {"svn": "1", "report_data": base64.b64encode(bytes(range(48))).decode()}
    assert pack_evidence(evidence) == json.dumps(expected, separators=(",", ":"))
    assert parse_evidence(Tee.SAMPLE, pack_evidence(evidence).encode()) == evidence


# --- refused ----------------------------------------------------------------------------------------------------------


def setting(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        for name in path[:-1]:
            members = members[name]
        members[path[-1]] = to

    return change


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        for name in path[:-1]:
            members = members[name]
        del members[path[-1]]

    return change


REPORT = "attestation_report"
BAD_REPORTS = [
    without(REPORT),
    setting(REPORT, to=[]),
    without(REPORT, "measurement"),
    setting(REPORT, "measurement", to="00" * 48),
    setting(REPORT, "measurement", to=[0] * 47),
    setting(REPORT, "measurement", to=[0] * 47 + [256]),
    setting(REPORT, "measurement", to=[0] * 47 + [-1]),
    setting(REPORT, "measurement", to=[0] * 47 + [True]),
    setting(REPORT, "version", to=6),
    setting(REPORT, "version", to=True),
    setting(REPORT, "version", to="3"),
    setting(REPORT, "vmpl", to=4),
    setting(REPORT, "policy", to=1 << 64),
    setting(REPORT, "key_info", to=8),
    setting(REPORT, "key_info", to=32),
    setting(REPORT, "sig_algo", to=2),
    setting(REPORT, "current_tcb", to=7),
    setting(REPORT, "current_tcb", "snp", to=256),
    setting(REPORT, "current_tcb", "fmc", to=1),
    setting(REPORT, "current", "build", to=-1),
    setting(REPORT, "cpuid_fam_id", to=0x1A),
    setting(REPORT, "launch_mit_vector", to=1),
    setting(REPORT, "signature", "r", to=[255] * 72),
    setting(REPORT, "signature", "s", to=[0] * 71),
]
BAD_CHAINS = [
    setting("cert_chain", to=[]),
    setting("cert_chain", to={}),
    setting("cert_chain", to=["VCEK"]),
    setting("cert_chain", to=[{"cert_type": "VCEK"}]),
    setting("cert_chain", to=[{"cert_type": "VCEK", "data": [48, 130]}]),
    setting("cert_chain", to=[{"cert_type": "VCEK", "data": [0] * 8193}]),
    setting("cert_chain", to=[{"cert_type": "CRL", "data": []}] * 9),
]


@pytest.mark.parametrize("change", BAD_REPORTS + BAD_CHAINS)
def test_a_report_or_chain_that_is_none_is_refused(machine: SimulatedMachine, change: Callable[[dict[str, Any]], None]) -> None:
    members = json.loads(pack_evidence(snp(machine)))
    change(members)
    with pytest.raises(MalformedEvidenceError) as raised:
        parse_evidence(Tee.SNP, json.dumps(members).encode())
    of_chain = change in BAD_CHAINS
    assert raised.value.format is (EvidenceFormat.SNP_CHAIN if of_chain else EvidenceFormat.SNP_REPORT)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'"x"', b"{", b'{"quote":1.5}', b'{"quote":"","quote":""}', b"\xff", b"[" * 100000]
)
@pytest.mark.parametrize("tee", Tee)
def test_what_is_no_object_is_refused(tee: Tee, text: bytes) -> None:
    with pytest.raises(MalformedEvidenceError) as raised:
        parse_evidence(tee, text)
    assert raised.value.__cause__ is None


def test_a_text_above_the_bound_is_not_parsed() -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_evidence(Tee.SAMPLE, b'{"report_data":"AA==","x":"' + b"x" * MAX_EVIDENCE_BYTES + b'"}')


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"quote": None},
        {"quote": "AA"},
        {"quote": ""},
        {"quote": "AAAA"},
        {"quote": base64.b64encode(bytes((128 << 10) + 1)).decode()},
        {"quote": "AAAA", "cc_eventlog": 1},
        {"quote": "AAAA", "cc_eventlog": "AAAA"},
    ],
)
def test_what_is_no_quote_is_refused(members: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_evidence(Tee.TDX, json.dumps(members).encode())


def test_a_log_that_is_none_is_refused_beside_a_good_quote(machine: SimulatedMachine) -> None:
    quote = base64.b64encode(machine.attester(Tee.TDX).collect(REPORT_DATA).report).decode()
    for log in (7, "AAAA", "?"):
        with pytest.raises(MalformedEvidenceError):
            parse_evidence(Tee.TDX, json.dumps({"quote": quote, "cc_eventlog": log}).encode())


@pytest.mark.parametrize("report_data", [None, "", "AA", 1, base64.b64encode(bytes(65)).decode()])
def test_what_is_no_sample_is_refused(report_data: object) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_evidence(Tee.SAMPLE, json.dumps({"svn": "1", "report_data": report_data}).encode())
