"""`keyturn verify` over every recorded report, quote and log, and over simulated silicon for a plain clone."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from agent.broker.anchors import load_simulation_roots
from agent.cli import main
from agent.commands.verify import kds_urls, lacking
from agent.evidence import GpuEvidence, GpuNonce, ReportData, Tee
from agent.evidence.ccel import pack_event_log
from agent.evidence.snp_abi import CertificateKind, TcbVersion, parse_report
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES, pack_tdreport, parse_quote, quote_length
from agent.receipt import sign_receipt
from agent.sim.gpu_silicon import FWID
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import CRL_FILE, make_crl
from agent.sim.tdx import SimulatedTdx, make_event_log, make_td_report
from agent.verify.receipt import verify_receipt
from agent.verify.snp import load_certificate
from tests.certificates import pem, table
from tests.gpus import GENUINE_GPUS, INVALID_SIGNATURES, RECORDED, SimulatedSet, recorded
from tests.shared import shared_data
from tests.test_verify_receipt import KEY as RECEIPT_KEY
from tests.test_verify_receipt import make as make_receipt

REPORT_DATA = ReportData(bytes(range(64)))
NONCE = GpuNonce(bytes(range(32)))
DAY_S = 86_400
GPU_DAY = "1780272000"  # 2026-06-01: every recorded GPU chain is valid


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str

    @property
    def claims(self) -> dict[str, Any]:
        claims: dict[str, Any] = json.loads(self.out)
        return claims

    @property
    def refusal(self) -> tuple[str, str]:
        """Class, and the check or field of the one line on stderr."""
        assert self.out == "", "nothing is said of what is not genuine"
        (line,) = self.err.splitlines()
        error = json.loads(line)
        return error["class"], error["fields"].get("check") or error["fields"].get("field") or error["fields"].get("key")


Verify = Callable[..., Said]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    def run(*words: object) -> Said:
        status = main(["verify", *map(str, words)])
        shown = capsys.readouterr()
        return Said(status, shown.out, shown.err)

    return run


def refused(said: Said, cls: str, what: str) -> None:
    assert (said.status, said.refusal) == (12, (cls, what))


# --- AMD's silicon ----------------------------------------------------------------------------------------------------

SNP = (  # every one is genuine; of version 2 a broker takes none
    "milan-v2-vcek-debug-policy",
    "milan-v2-vcek",
    "milan-v2-vcek-reported-older",
    "milan-v2-vcek-azure",
    "milan-v3-vlek-aws",
    "milan-v3-vcek",
    "milan-v3-vcek-oak-release",
    "milan-v3-vcek-azure",
    "genoa-v3-vcek-configfs",
    "genoa-v3-vcek-azure",
    "genoa-v5-vcek",
)


def snp_row(name: str) -> tuple[dict[str, Any], Path, list[object]]:
    """Row of the index, report, and the flags that name its chain and a day on which that is valid."""
    row = next(row for row in json.loads(shared_data("snp/index.json").read_text()) if row["name"] == name)
    chain = [shared_data(f"snp/{row[key]}") for key in ("endorsement_cert", "intermediate", "root")]
    valid_from = load_certificate(chain[0].read_bytes()).not_valid_before_utc.timestamp()
    flags = [word for path in chain for word in ("--endorsement", path)]
    return row, shared_data(f"snp/{row['report']}"), [*flags, "--at", int(valid_from) + DAY_S]


def test_every_recorded_snp_report_has_a_verdict_here() -> None:
    assert {row["name"] for row in json.loads(shared_data("snp/index.json").read_text())} == set(SNP)


@pytest.mark.parametrize("name", SNP)
def test_a_recorded_snp_report(name: str, verify: Verify) -> None:
    row, report, flags = snp_row(name)
    said = verify("snp", report, *flags, "--json")
    assert (said.status, said.err) == (0, "")
    claims = said.claims
    same = ("version", "product", "guest_svn", "vmpl", "platform_info", "report_data", "measurement", "host_data", "chip_id")
    assert {key: claims[key] for key in same} == {key: row[key] for key in same}
    assert (claims["policy"]["value"], claims["policy"]["debug"]) == (row["policy"], row["policy_debug"])
    assert claims["signing_key"] == row["endorsement_key"].upper()
    for tcb in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        levels = {"bootloader" if part == "boot_loader" else part: level for part, level in claims[tcb].items()}
        assert levels == row[tcb]
    assert [claims[f"current_{part}"] for part in ("major", "minor", "build")] == row["current_fw"]
    vectors = [claims["launch_mit_vector"], claims["current_mit_vector"]]
    assert vectors == [None if row[key] is None else hex(row[key]) for key in ("launch_mit_vector", "current_mit_vector")]
    assert claims["simulated"] is False


@pytest.mark.parametrize("name", SNP)
def test_a_recorded_snp_report_that_was_touched_is_refused(name: str, verify: Verify, tmp_path: Path) -> None:
    _, report, flags = snp_row(name)
    data = bytearray(report.read_bytes())
    data[0x050] ^= 1
    (tmp_path / "report").write_bytes(data)
    refused(verify("snp", tmp_path / "report", *flags), "EvidenceVerificationError", "report-signature")


def test_the_table_of_a_host_and_the_files_of_amds_service_are_endorsements(verify: Verify) -> None:
    _, report, flags = snp_row("genoa-v3-vcek-configfs")
    folder, at = shared_data("snp/genoa-v3-vcek-configfs"), flags[-2:]
    assert verify("snp", report, *at, "--endorsement", folder / "auxblob.bin").status == 0
    of_amd = ("--endorsement", folder / "vcek.der", "--endorsement", shared_data("snp/certs/genoa-cert_chain-vcek.pem"))
    assert verify("snp", report, *at, *of_amd).status == 0
    refused(verify("snp", report, *at, *of_amd[:2]), "EvidenceVerificationError", "certificate-chain")
    refused(verify("snp", report, *at), "EvidenceVerificationError", "certificate-chain")


@pytest.mark.parametrize("name", SNP)
def test_who_has_no_certificate_is_told_where_amd_has_it(name: str) -> None:
    row, report, _ = snp_row(name)
    urls = kds_urls(parse_report(report.read_bytes()))
    named = row["kds_url"] and row["version"] > 2  # version 2 does not say of which processor it is
    assert urls[:1] == ((row["kds_url"],) if named else ())
    assert urls[1:] == ((f"https://kdsintf.amd.com/vcek/v1/{row['product']}/cert_chain",) if named else ())


@pytest.mark.parametrize("name", ["vcek-invalid-legacy", "vcek-invalid-new", "vcek-turin-preprod-unmatched"])
def test_a_certificate_that_amd_did_not_issue_for_the_chip_is_no_endorsement(name: str, verify: Verify) -> None:
    _, report, flags = snp_row("genoa-v3-vcek-configfs")
    said = verify("snp", report, "--endorsement", shared_data(f"snp/certs/{name}.der"), *flags[2:])
    assert (said.status, said.out) == (12, "")


# --- Intel's silicon --------------------------------------------------------------------------------------------------

TDX = {
    "v4-uptodate": None,
    "v5-uptodate": None,
    "v4-debug-td": ("EvidenceVerificationError", "td-debug"),
    "v4-mrconfigid": None,
    "v5-tcb-unknown": None,
    "v4-spr-e4": ("MalformedEvidenceError", "trailing"),  # text follows the quote
    "v4-gcp-8000": None,
    "v4-live-with-ccel": None,
    "v4-azure": None,
    "v4-preproduction-root": ("EvidenceVerificationError", "certificate-chain"),
}
TDX_WITH_COLLATERAL = {
    "v4-uptodate": None,
    "v5-uptodate": None,
    "v4-debug-td": ("EvidenceVerificationError", "td-debug"),
    "v5-tcb-unknown": ("EvidenceVerificationError", "tcb-collateral"),
    "v4-spr-e4": ("MalformedEvidenceError", "trailing"),
}
LOGS = {  # the recorded quote or TDREPORT that a log belongs to
    "live": "tdreport/live.bin",
    "live2": "quotes/v4-live-with-ccel.bin",
    "gcp-cos113": "quotes/v4-gcp-8000.bin",
    "alibaba-aael": None,
    "grub-gke": None,
    "ovmf": None,
    "dstack": None,
}


def tdx_rows(key: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(shared_data("tdx/index.json").read_text())
    return {row["name"]: row for row in rows if key in row}


def valid_day(quote: bytes) -> int:
    pck = x509.load_pem_x509_certificates(parse_quote(quote[: quote_length(quote)]).pck_chain.removesuffix(b"\0"))[0]
    return int(pck.not_valid_before_utc.timestamp()) + DAY_S


def test_every_recorded_quote_and_log_has_a_verdict_here() -> None:
    assert tdx_rows("quote").keys() == TDX.keys()
    assert tdx_rows("dcap_qvl").keys() == TDX_WITH_COLLATERAL.keys()
    assert tdx_rows("ccel").keys() == {f"ccel-{name}" for name in LOGS}


@pytest.mark.parametrize("name", TDX)
def test_a_recorded_quote_is_verified_without_its_tcb_only_when_that_is_said(name: str, verify: Verify) -> None:
    row = tdx_rows("quote")[name]
    quote = shared_data(f"tdx/{row['quote']}")
    words = ("tdx", quote, "--at", valid_day(quote.read_bytes()), "--json")
    if (refusal := TDX[name]) is not None:
        refused(verify(*words), *refusal)
        refused(verify(*words, "--no-collateral"), *refusal)
        return
    silent, said = verify(*words), verify(*words, "--no-collateral")
    assert (silent.status, said.status, said.err) == (1, 0, "")
    assert silent.err.startswith("keyturn: not verified: TCB ")
    assert silent.claims == said.claims
    claims, fields = said.claims, row["fields"]
    assert (claims["tcb"], claims["simulated"], claims["fmspc"]) == ("not_evaluated", False, row["fmspc"])
    assert (claims["version"], claims["mr_td"], claims["report_data"]) == (row["version"], fields["mrtd"], fields["reportdata"])
    assert [claims[f"rtmr_{number}"] for number in range(4)] == [fields[f"rtmr{number}"] for number in range(4)]


def test_text_follows_a_recorded_quote_that_is_genuine(verify: Verify) -> None:
    row = tdx_rows("quote")["v4-spr-e4"]
    quote = shared_data(f"tdx/{row['quote']}")
    day = valid_day(quote.read_bytes())
    said = verify("tdx", quote, "--at", day, "--no-collateral", "--ignore-trailing", "--json")
    assert (said.status, said.claims["mr_td"]) == (0, row["fields"]["mrtd"])


@pytest.mark.parametrize("name", TDX_WITH_COLLATERAL)
def test_a_recorded_quote_with_collateral(name: str, verify: Verify) -> None:
    row = tdx_rows("quote")[name]
    quote, recorded_then = shared_data(f"tdx/{row['quote']}"), row["dcap_qvl"]
    words = ["tdx", quote, "--collateral", shared_data(f"tdx/{recorded_then['collateral']}"), "--json", "--at"]
    said = verify(*words, recorded_then["at_unix"])
    if (refusal := TDX_WITH_COLLATERAL[name]) is not None:
        refused(said, *refusal)
        return
    assert (said.status, said.err, said.claims["tcb"]) == (0, "", "UpToDate")
    late = recorded_then["at_unix"] + 60 * DAY_S  # the quote is still good, the collateral is not
    refused(verify(*words, late), "EvidenceVerificationError", "tcb-collateral")


@pytest.mark.parametrize("name", LOGS)
def test_a_recorded_event_log_belongs_to_its_quote_or_tdreport_and_to_no_other(name: str, verify: Verify) -> None:
    row, log = tdx_rows("ccel")[f"ccel-{name}"], shared_data(f"tdx/ccel/{name}.bin")
    alone = verify("event-log", log, "--json")
    assert (alone.status, alone.claims["against"]) == (1, None)
    assert alone.err.startswith("keyturn: not verified: ")
    assert [alone.claims[f"rtmr_{number}"] for number in range(4)] == row["replayed_rtmr"]
    assert len(alone.claims["events"]) == row["events"]
    for other in (*filter(None, LOGS.values()), "tdreport/rtmr-test.bin"):
        against = shared_data(f"tdx/{other}")
        day = valid_day(against.read_bytes()) if other.startswith("quotes") else 0
        said = verify("event-log", log, "--against", against, "--at", day, "--json")
        if other == LOGS[name]:
            assert (said.status, said.claims["against"]) == (0, "quote" if other.startswith("quotes") else "tdreport")
        else:
            refused(said, "EvidenceVerificationError", "rtmr")


def test_an_event_log_is_not_compared_with_a_quote_that_is_not_genuine(verify: Verify) -> None:
    words = ("event-log", shared_data("tdx/ccel/live2.bin"), "--against", shared_data("tdx/quotes/v4-preproduction-root.bin"))
    refused(verify(*words), "EvidenceVerificationError", "certificate-chain")


# --- NVIDIA's silicon -------------------------------------------------------------------------------------------------


ANOTHER_CHAIN = "attestation-sdk/testdata/sample_attestation_data/gpu/hopperCertChainExpired.txt"


def gpu_files(name: str, folder: Path) -> tuple[dict[str, object], list[object]]:
    sample = recorded(name)
    (folder / "report").write_bytes(sample.report)
    (folder / "chain").write_bytes(sample.chain)
    return sample.expected, ["nvidia", folder / "report", "--chain", folder / "chain", "--at", GPU_DAY]


def test_every_recorded_gpu_report_has_a_verdict_here() -> None:
    rows = json.loads(shared_data("nvidia/extracted/expected.json").read_bytes())
    assert {row["name"] for row in rows} == {*RECORDED} == {*GENUINE_GPUS, *INVALID_SIGNATURES, "ls10_96.10.55"}


@pytest.mark.parametrize("name", GENUINE_GPUS)
def test_a_recorded_gpu_report(name: str, verify: Verify, tmp_path: Path) -> None:
    expected, words = gpu_files(name, tmp_path)
    said = verify(*words, "--json", "--nonce", expected["nonce"])
    assert (said.status, said.err) == (0, "")
    claims = said.claims
    same = ("nonce", "fwid", "feature_flag", "ueid", "hwmodel", "project", "project_sku", "chip_sku")
    assert {key: claims[key] for key in same} == {key: expected[key] for key in same}
    assert (claims["driver_version"], claims["vbios_version"]) == (expected["driver"], expected["vbios"])
    assert claims["arch"] == ("BLACKWELL" if name.startswith("blackwell") else "HOPPER")
    assert (claims["nonce_compared"], claims["simulated"]) == (True, False)
    assert len(claims["measurements"]) == expected["blocks"]
    without = verify(*words, "--json")
    assert (without.status, without.claims) == (0, claims | {"nonce_compared": False})
    refused(verify(*words, "--nonce", "00" * 32), "EvidenceVerificationError", "nonce")
    refused(verify(*words[:-1], 0), "EvidenceVerificationError", "certificate-validity")


@pytest.mark.parametrize("name", INVALID_SIGNATURES)
def test_a_recorded_gpu_report_with_an_invalid_signature_is_refused(name: str, verify: Verify, tmp_path: Path) -> None:
    _, words = gpu_files(name, tmp_path)
    refused(verify(*words), "EvidenceVerificationError", "report-signature")


@pytest.mark.parametrize(("case", "certificates"), [(2, 1), (3, 4), (4, 4)])
def test_a_recorded_chain_that_is_not_whole_is_refused(case: int, certificates: int, verify: Verify, tmp_path: Path) -> None:
    _, words = gpu_files("hopper_550.90.07", tmp_path)
    words[3] = shared_data(f"nvidia/trustee/hopper_cert_chain_case{case}.txt")
    said = verify(*words)
    refused(said, "MalformedEvidenceError", "number-of-certificates")
    assert json.loads(said.err)["fields"]["got"] == certificates


def test_a_recorded_report_with_the_chain_of_another_gpu_is_refused(verify: Verify, tmp_path: Path) -> None:
    _, words = gpu_files("hopper_550.90.07", tmp_path)
    words[3] = shared_data(f"nvidia/{ANOTHER_CHAIN}")
    refused(verify(*words), "EvidenceVerificationError", "report-signature")


def test_a_recorded_switch_says_that_it_is_one(verify: Verify, tmp_path: Path) -> None:
    expected, words = gpu_files("ls10_96.10.55", tmp_path)
    said = verify(*words, "--json", "--nonce", expected["nonce"])
    assert (said.status, said.err) == (0, "")
    claims = said.claims
    same = ("nonce", "ueid", "hwmodel", "project", "project_sku", "chip_sku")
    assert {key: claims[key] for key in same} == {key: expected[key] for key in same}
    assert (claims["arch"], claims["vbios_version"], claims["simulated"]) == ("LS10", expected["vbios"], False)
    assert (claims["pdi"], len(claims["gpu_pdis"]), len(claims["measurements"])) == ("203eb31ad9ed0008", 8, 31)
    assert verify(*words).out.startswith("verified: report of a genuine LS10 NVSwitch, of unknown age\n")
    refused(verify(*words, "--nonce", "00" * 32), "EvidenceVerificationError", "nonce")


# --- simulated silicon ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Evidence of a simulated machine in files, and the flags that trust it."""

    machine: SimulatedMachine
    folder: Path

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    @property
    def trust(self) -> tuple[str, str]:
        return "--unsafe-simulation-roots", str(self.machine.roots_dir)

    def snp(self) -> tuple[Path, tuple[bytes, ...]]:
        evidence = self.machine.attester().collect(REPORT_DATA)
        return self.write("report", evidence.report), evidence.cert_chain

    def quote(self, version: int = 4) -> Path:
        return self.write("quote", SimulatedTdx(self.machine, version).collect(REPORT_DATA).report)

    def gpu(self) -> list[object]:
        (gpu,) = self.machine.gpu_system().collect(NONCE)
        chain = self.write("gpu-chain", gpu.certificate_chain)
        return ["nvidia", self.write("gpu-report", gpu.report), "--chain", chain]

    def switch(self) -> list[object]:
        self.machine.gpu.switches = 1
        (switch,) = self.machine.switch_system().collect(NONCE)
        chain = self.write("switch-chain", switch.certificate_chain)
        return ["nvidia", self.write("switch-report", switch.report), "--chain", chain]

    def log(self) -> Path:
        return self.write("log", pack_event_log(make_event_log(self.machine)) + b"\xff" * 64)


@pytest.fixture
def files(machine: SimulatedMachine, tmp_path: Path) -> Files:
    return Files(machine, tmp_path)


def test_simulated_evidence_verifies_under_its_roots_says_so_and_is_nothing_without_them(files: Files, verify: Verify) -> None:
    report, chain = files.snp()
    snp = ["snp", report, "--endorsement", files.write("chain.pem", pem(*chain))]
    tdx = ["tdx", files.quote(), "--no-collateral"]
    log = ["event-log", files.log(), "--against", tdx[1]]
    for words in (snp, tdx, files.gpu(), files.switch(), log):
        said = verify(*words, *files.trust, "--json")
        assert (said.status, said.err, said.claims["simulated"]) == (0, "", True)
        for_people = verify(*words, *files.trust)
        assert "SIMULATED" in for_people.out.splitlines()[0]
        refused(verify(*words), "EvidenceVerificationError", "certificate-chain")
        assert verify(*words, *files.trust, "--at", 0).refusal == ("EvidenceVerificationError", "certificate-validity")


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_receipt_is_verified_for_people_too(files: Files, verify: Verify, tee: Tee) -> None:
    path = files.write("receipt.cbor", sign_receipt(make_receipt(files.machine, tee), RECEIPT_KEY))
    said = verify("receipt", path, *files.trust, "--no-collateral")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("verified: model tiny version 3 was opened in a ")
    assert "SIMULATED" in said.out.splitlines()[0]
    assert "under policy version 7" in said.out.splitlines()[0]
    refused(verify("receipt", path, "--no-collateral"), "EvidenceVerificationError", "certificate-chain")
    spoiled = files.write("spoiled.cbor", path.read_bytes()[:-1] + b"x")
    refusal = verify("receipt", spoiled, *files.trust)
    assert (refusal.status, refusal.out, json.loads(refusal.err)["class"]) == (24, "", "ReceiptError")


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_people_see_by_which_guest_a_receipt_was_made(files: Files, verify: Verify, tee: Tee) -> None:
    path = files.write("receipt.cbor", sign_receipt(make_receipt(files.machine, tee), RECEIPT_KEY))
    claims = verify("receipt", path, *files.trust, "--no-collateral", "--json").claims["evidence"]
    shown = dict(
        line.split(maxsplit=1) for line in verify("receipt", path, *files.trust, "--no-collateral").out.splitlines()[1:]
    )
    names = ["measurement", "vmpl"] if tee is Tee.SNP else ["mr_td", "rtmr_0", "rtmr_1", "rtmr_2", "tcb"]
    assert {name: shown[name] for name in names} == {name: str(claims[name]) for name in names}
    assert {"gpu_ready", "unmeasured", "policy" if tee is Tee.SNP else "td_attributes"} <= shown.keys()


def test_revocation_lists_count_for_a_receipt_too(files: Files, verify: Verify) -> None:
    path = files.write("receipt.cbor", sign_receipt(make_receipt(files.machine, Tee.SNP), RECEIPT_KEY))
    words = ("receipt", path, *files.trust, "--json")
    assert verify(*words).claims["evidence"]["revocation_checked"] is False
    own = files.machine.silicon / CRL_FILE
    assert verify(*words, "--crl", own).claims["evidence"]["revocation_checked"] is True


def test_a_receipt_of_a_guest_that_its_host_may_debug_is_not_verified(files: Files, verify: Verify) -> None:
    files.machine.policy |= 1 << 19
    files.machine.save()
    path = files.write("receipt.cbor", sign_receipt(make_receipt(files.machine, Tee.SNP), RECEIPT_KEY))
    said = verify("receipt", path, *files.trust)
    assert (said.status, "its host may read and write" in said.err) == (1, True)
    assert said.out.startswith("not all verified: ")


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_genuine_evidence_does_not_make_up_for_simulated_devices(machine: SimulatedMachine, tee: Tee) -> None:
    claims = verify_receipt(make_receipt(machine, tee), load_simulation_roots(machine.roots_dir), (), datetime.now(UTC))
    assert "not all of its silicon" in str(lacking(claims, simulation_trusted=False))
    assert lacking(claims, simulation_trusted=True) is None
    assert lacking(replace(claims, simulated=False), simulation_trusted=False) is None


def test_what_a_receipt_lacks_is_said(files: Files, verify: Verify) -> None:
    tdx = files.write("tdx.cbor", sign_receipt(make_receipt(files.machine, Tee.TDX), RECEIPT_KEY))
    said = verify("receipt", tdx, *files.trust)
    assert (said.status, "--collateral" in said.err) == (1, True)
    sample = files.write("sample.cbor", sign_receipt(make_receipt(files.machine, Tee.SAMPLE), RECEIPT_KEY))
    said = verify("receipt", sample, "--json")
    assert (said.status, said.claims["simulated"], "proves nothing" in said.err) == (1, True, True)


def test_what_follows_a_quote_is_ignored_when_that_is_said(files: Files, verify: Verify) -> None:
    quote = files.quote()
    claims = verify("tdx", quote, "--no-collateral", *files.trust, "--json").claims
    followed = files.write("followed", quote.read_bytes() + b"whatever lay in the host's buffer")
    words = ("tdx", followed, "--no-collateral", *files.trust, "--json")
    refused(verify(*words), "MalformedEvidenceError", "trailing")
    said = verify(*words, "--ignore-trailing")
    assert (said.status, said.claims) == (0, claims)
    refused(verify("tdx", files.write("short", b"x"), "--ignore-trailing"), "MalformedEvidenceError", "header")


def test_a_security_processor_is_not_said_to_be_a_gpu(verify: Verify, tmp_path: Path) -> None:
    devices = SimulatedSet()
    (tmp_path / "nvidia-root.pem").write_bytes(devices.root.public_bytes(Encoding.PEM))
    trust = ("--unsafe-simulation-roots", tmp_path)

    def words(evidence: GpuEvidence) -> list[object]:
        (tmp_path / "report").write_bytes(evidence.report)
        (tmp_path / "chain").write_bytes(evidence.certificate_chain)
        return ["nvidia", tmp_path / "report", "--chain", tmp_path / "chain", *trust]

    said = verify(*words(devices.fsp.fsp_evidence), "--json")
    assert (said.status, said.err) == (0, "")
    assert {key: said.claims[key] for key in ("arch", "hwmodel", "fwid", "vbios_version", "project")} == {
        "arch": "BLACKWELL",
        "hwmodel": "GB100 SIMULATED FSP BROM",
        "fwid": FWID.hex(),
        "vbios_version": None,
        "project": None,
    }
    assert "driver_version" not in said.claims
    assert (said.claims["measurement_indices"], said.claims["measurement_types"]) == ([1, 2, 3, 52], [0x83, 0x82, 0x02, 0x81])
    assert "security processor" in verify(*words(devices.fsp.fsp_evidence)).out.splitlines()[0]

    newest = verify(*words(devices.rubin.with_opaque_header), "--json").claims
    assert (newest["arch"], newest["driver_version"]) == ("RUBIN", "575.32")
    assert newest["measurement_indices"] == [1, 0xFD]


def test_a_report_is_held_against_a_revocation_list(files: Files, verify: Verify, tmp_path: Path) -> None:
    report, chain = files.snp()
    words = ["snp", report, "--endorsement", files.write("chain.pem", pem(*chain)), *files.trust, "--json"]
    assert verify(*words).claims["revocation_checked"] is False
    own = files.machine.silicon / CRL_FILE
    assert verify(*words, "--crl", own).claims["revocation_checked"] is True
    other = make_crl(load_certificate(chain[0]).subject, rsa.generate_private_key(65537, 2048), [])
    foreign = files.write("foreign.crl", other)
    assert verify(*words, "--crl", foreign, "--crl", own).status == 0
    refused(verify(*words, "--crl", foreign), "EvidenceVerificationError", "revocation-list")
    forged = make_crl(load_certificate(chain[2]).subject, rsa.generate_private_key(65537, 2048), [])
    refused(
        verify(*words, "--crl", files.write("forged.crl", forged)), "EvidenceVerificationError", "revocation-list-signature"
    )
    until = int(x509.load_der_x509_crl(own.read_bytes()).next_update_utc.timestamp())  # type: ignore[union-attr]
    said = verify(*words, "--crl", own, "--at", until + 1)
    refused(said, "EvidenceVerificationError", "certificate-validity")  # the chip's certificate ends first
    refused(verify(*words, "--crl", report), "MalformedEvidenceError", "revocation_list")
    assert verify(*words, "--crl", tmp_path / "none").refusal == ("ConfigError", "crl")


def test_the_claims_are_those_of_the_evidence(files: Files, verify: Verify) -> None:
    report, chain = files.snp()
    claims = verify("snp", report, "--endorsement", files.write("pem", pem(*chain)), *files.trust, "--json").claims
    assert (claims["report_data"], claims["chip_id"]) == (REPORT_DATA.hex(), files.machine.chip_id.hex())
    assert claims["measurement"] == files.machine.measurement.hex()
    assert claims["policy"] == {
        "value": "0x30000",
        "abi_minor": 0,
        "abi_major": 0,
        "smt": True,
        "migrate_ma": False,
        "debug": False,
        "single_socket": False,
    }
    claims = verify("tdx", files.quote(5), "--no-collateral", *files.trust, "--json").claims
    assert (claims["version"], claims["report_data"], claims["tcb"]) == (5, REPORT_DATA.hex(), "not_evaluated")
    assert claims["mr_td"] == files.machine.measurement.hex()
    assert (claims["xfam"], claims["td_attributes"]["sept_ve_disable"], claims["td_attributes"]["debug"]) == (
        "0x602e7",
        True,
        False,
    )


def test_people_are_shown_the_main_claims_by_the_same_names(files: Files, verify: Verify) -> None:
    report, chain = files.snp()
    said = verify("snp", report, "--endorsement", files.write("pem", pem(*chain)), *files.trust)
    headline, *lines = said.out.splitlines()
    assert headline == "verified: SEV-SNP report of a SIMULATED Genoa chip, signed by its VCEK"
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["measurement"] == files.machine.measurement.hex()
    assert shown["policy"] == "value 0x30000, abi_minor 0, abi_major 0, smt"
    assert shown["reported_tcb"] == "boot_loader 10, tee 0, snp 23, microcode 84"
    assert max(map(len, said.out.splitlines())) < 150


def test_amd_names_a_turin_chip_by_eight_bytes_and_its_fmc_level(files: Files) -> None:
    report = parse_report(files.snp()[0].read_bytes())
    turin = replace(report, cpuid_family=0x1A, cpuid_model=2, reported_tcb=TcbVersion(1, 2, 3, 4, fmc=5))
    chip_id = files.machine.chip_id[:8].hex()
    levels = "fmcSPL=05&blSPL=01&teeSPL=02&snpSPL=03&ucodeSPL=04"
    assert kds_urls(turin)[0] == f"https://kdsintf.amd.com/vcek/v1/Turin/{chip_id}?{levels}"
    assert kds_urls(replace(report, version=2)) == ()


def test_a_guest_that_its_host_may_debug_is_genuine_and_people_are_told(files: Files, verify: Verify) -> None:
    files.machine.policy |= 1 << 19
    report, chain = files.snp()
    words = ("snp", report, "--endorsement", files.write("pem", pem(*chain)), *files.trust)
    assert verify(*words, "--json").claims["policy"]["debug"] is True
    assert "its host may read and write the guest" in verify(*words).out.splitlines()[0]


def test_endorsements_come_in_every_form_and_in_several_files(files: Files, verify: Verify) -> None:
    report, chain = files.snp()
    vcek, ask, ark = chain
    kinds = (CertificateKind.VCEK, CertificateKind.ASK, CertificateKind.ARK)
    host_table = files.write("auxblob", table(*zip(kinds, chain, strict=True)))
    one_each = [word for n, der in enumerate(chain) for word in ("--endorsement", files.write(f"{n}.der", der))]
    mixed = ["--endorsement", files.write("leaf.der", vcek), "--endorsement", files.write("chain.pem", pem(ask, ark))]
    for flags in (["--endorsement", host_table], one_each, mixed, mixed[2:] + mixed[:2]):
        assert verify("snp", report, *flags, *files.trust).status == 0
    empty = files.write("empty", b"")  # what most hosts supply
    refused(verify("snp", report, "--endorsement", empty, *files.trust), "EvidenceVerificationError", "certificate-chain")


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"0" * 100, "table_end"),
        (b"\x30\x82 no certificate", "certificate"),
        (b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "pem"),
        (b"-----BEGIN PRIVATE KEY-----\n", "pem"),
        (b"\x30\x82" + bytes(16 << 10), "length"),
    ],
)
def test_an_endorsement_that_is_none_is_malformed(data: bytes, field: str, files: Files, verify: Verify) -> None:
    report, _ = files.snp()
    refused(verify("snp", report, "--endorsement", files.write("x", data), *files.trust), "MalformedEvidenceError", field)


def test_a_td_report_of_its_own_explains_an_event_log(files: Files, verify: Verify) -> None:
    log, tdreport = files.log(), files.write("tdreport", pack_tdreport(make_td_report(files.machine, REPORT_DATA)))
    said = verify("event-log", log, "--against", tdreport, "--json")
    assert (said.status, said.claims["against"]) == (0, "tdreport")
    files.write("tdreport", tdreport.read_bytes()[:-1] + b"\1")
    assert verify("event-log", log, "--against", tdreport).refusal == ("MalformedEvidenceError", "reserved_3c0")


def test_an_event_log_without_its_last_event_is_not_the_tds(files: Files, verify: Verify) -> None:
    log = make_event_log(files.machine)
    shorter = files.write("log", pack_event_log(replace(log, events=log.events[:-1])))
    refused(verify("event-log", shorter, "--against", files.quote(), *files.trust), "EvidenceVerificationError", "rtmr")


def test_collateral_without_the_extra_evaluates_nothing(files: Files, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)  # what Python itself does with a module that is not there
    said = verify("tdx", files.quote(), "--collateral", files.write("c", b"{}"), *files.trust, "--json")
    assert (said.status, said.claims["tcb"]) == (1, "not_evaluated")
    assert "dcap-qvl" in said.err
    monkeypatch.undo()
    said = verify("tdx", files.quote(), "--collateral", files.write("c", b"{}"), *files.trust)
    refused(said, "MalformedEvidenceError", "collateral")


def test_a_file_may_be_standard_input_and_is_read_to_its_bound(
    files: Files, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    quote = files.quote().read_bytes()
    for data, status in ((quote, 0), (quote + bytes(9), 0), (quote + b"x", 12), (quote.ljust(MAX_QUOTE_BYTES + 9, b"\0"), 12)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert verify("tdx", "-", "--no-collateral", *files.trust).status == status
        assert len(sys.stdin.buffer.read()) == max(0, len(data) - MAX_QUOTE_BYTES - 1)


def test_whatever_is_damaged_ends_in_a_verdict_and_never_in_a_bug(files: Files, verify: Verify) -> None:
    report, chain = files.snp()
    kinds: list[list[object]] = [
        ["snp", report, "--endorsement", files.write("chain.pem", pem(*chain))],
        ["snp", report, "--endorsement", files.write("chain.der", chain[0]), "--endorsement", files.write("table", table())],
        ["tdx", files.quote(), "--collateral", files.write("collateral", b"{}")],
        files.gpu(),
        ["event-log", files.log(), "--against", files.quote(5)],
    ]
    draw = random.Random(1)
    for words in kinds:
        for path in (word for word in words if isinstance(word, Path)):
            whole = path.read_bytes()
            for _ in range(30):
                data = bytearray(whole)
                position = draw.randrange(min(len(data), draw.choice((48, 4096))))
                data[position : position + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
                path.write_bytes(data)
                assert verify(*words, *files.trust).status in (0, 12)
            path.write_bytes(whole)


@pytest.mark.parametrize("words", [["snp"], ["tdx"], ["nvidia", "--chain", "/absent"], ["event-log"]])
def test_a_file_that_is_not_there_is_our_error_and_an_empty_one_is_malformed(words: list[str], verify: Verify) -> None:
    said = verify(words[0], "/absent/file", *words[1:])
    assert (said.status, said.refusal[0]) == (10, "ConfigError")
    flags = [] if words[0] != "nvidia" else ["--chain", "/dev/null"]
    assert verify(words[0], "/dev/null", *flags).status == 12


def test_roots_that_do_not_say_simulated_are_not_taken(files: Files, verify: Verify, tmp_path: Path) -> None:
    said = verify("tdx", files.quote(), "--unsafe-simulation-roots", tmp_path / "absent")
    assert (said.status, said.refusal) == (10, ("ConfigError", "unsafe-simulation-roots"))


def test_an_installation_without_simulators_trusts_none(files: Files, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agent.broker.anchors", None)  # as in a guest's bundle
    said = verify("tdx", files.quote(), "--no-collateral", *files.trust)
    assert (said.status, said.refusal[0]) == (11, "SimulationRefusedError")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sgx", "x"],
        ["snp"],
        ["nvidia", "x"],
        ["snp", "-", "--endorsement", "-"],
        ["nvidia", "-", "--chain", "-"],
        ["nvidia", "x", "--chain", "x", "--nonce", "00" * 31],
        ["nvidia", "x", "--chain", "x", "--nonce", "00 " * 32],
        ["tdx", "x", "--collateral", "c", "--no-collateral"],
        ["tdx", "x", "--at", "tomorrow"],
        ["tdx", "x", "--at", "-1"],
        ["tdx", "x", "--at", "9" * 20],
        ["tdx", "x", "--roots", "DIR"],
    ],
)
def test_wrong_words_are_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", *words])
    assert caught.value.code == 2


@pytest.mark.parametrize("kind", ["", "snp", "tdx", "nvidia", "event-log"])
def test_the_help_has_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", *kind.split(), "--help"])
    assert f"Example: keyturn verify {kind}".strip() in " ".join(capsys.readouterr().out.split())


def test_nothing_but_the_result_is_written_even_about_odd_certificates(files: Files) -> None:
    report, chain = files.snp()  # serial number 0, of which the library warns
    command = [sys.executable, "-m", "agent", "verify", "snp", str(report), "--endorsement", str(files.write("p", pem(*chain)))]
    done = subprocess.run([*command, *files.trust], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
