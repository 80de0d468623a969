"""Decisions without a wire: recorded silicon under AMD's own root, and evidence that leaves no doubt about its order."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.broker.anchors import AmdCrls, TdxCollateral, TrustAnchors, load_endorsements
from agent.broker.audit import AuditLog
from agent.broker.authority import Authority
from agent.broker.keystore import DirectoryKeyStore
from agent.broker.policy import appraise, parse_policy
from agent.broker.token import TokenKey
from agent.closed import Ident
from agent.errors import BrokerFailureError, DenialReason
from agent.evidence import CompositeEvidence, Evidence, GpuEvidence, Nonce, ReportData, RuntimeData, Tee
from agent.evidence.binding import additional_evidence, device_nonce, parse_additional_evidence, report_data
from agent.evidence.ccel import RuntimeEvent, pack_event_log, parse_event_log, parse_runtime_event
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import quote_length
from agent.handshake import Accepted, Attestation, Denied, Hello, TeePublicKey
from agent.sim.gpu_silicon import create_gpu_silicon
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import CRL_FILE, make_crl
from agent.verify.snp import verify_snp
from tests.broker_site import URI, Site, policy_for, tdx_policy_for
from tests.shared import shared_data

HELLO = Hello(Ident("boot-1"), URI, Tee.SNP)
NONCE = Nonce(bytes(range(32)))
PUBLIC = TeePublicKey(b"x" * 32, b"y" * 32)


@pytest.fixture
def site(tmp_path: Path, machine: SimulatedMachine) -> Site:
    return Site(tmp_path / "broker", machine)


def authority(site: Site, anchors: TrustAnchors | None = None, now: datetime | None = None) -> Authority:
    directory = site.made.directory
    return Authority(
        parse_policy(site.policy),
        site.anchors if anchors is None else anchors,
        TokenKey((directory / "token.key").read_bytes()),
        DirectoryKeyStore(directory / "keys"),
        AuditLog(site.audit_path),
        now=lambda: now or datetime.now(UTC),
    )


def attestation(site: Site) -> Attestation:
    return Attestation(HELLO.request_id, PUBLIC, site.collect(RuntimeData(NONCE, PUBLIC.x, PUBLIC.y)))


def recorded(tmp_path: Path, *certificates: str) -> tuple[Attestation, TrustAnchors]:
    """A recorded report whose host supplied nothing, and what a broker has of AMD's certificates."""
    folder = shared_data("snp/genoa-v3-vcek-configfs")
    (tmp_path / "endorsements").mkdir()
    for name in certificates:
        shutil.copy(shared_data(f"snp/{name}"), tmp_path / "endorsements")
    evidence = CompositeEvidence(Evidence(Tee.SNP, (folder / "report.bin").read_bytes()), "")
    anchors = TrustAnchors(endorsements=load_endorsements(tmp_path / "endorsements"))
    return Attestation(HELLO.request_id, PUBLIC, evidence), anchors


GENOA = ("genoa-v3-vcek-configfs/vcek.der", "certs/genoa-ask.der", "certs/genoa-ark.der")


def test_a_genuine_report_of_another_handshake_is_denied_as_not_fresh_and_is_not_simulated(site: Site, tmp_path: Path) -> None:
    sent, anchors = recorded(tmp_path, *GENOA)
    verdict = authority(site, anchors).attest(HELLO, sent, NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, "snp.report-data")
    (line,) = site.audit()
    assert line["simulated"] is False and line["measurement"] is not None


def test_a_genuine_report_of_version_5_is_read_by_policy_and_authority(site: Site, tmp_path: Path) -> None:
    folder = shared_data("snp/genoa-v5-vcek")
    report = (folder / "report.bin").read_bytes()
    parsed = parse_report(report)
    assert parsed.version == 5
    certificates = ((folder / "vcek.der"), *(shared_data(f"snp/certs/genoa-{name}.der") for name in ("ask", "ark")))
    evidence = Evidence(Tee.SNP, report, tuple(path.read_bytes() for path in certificates))
    now = datetime(2026, 11, 22, tzinfo=UTC)
    sent = Attestation(HELLO.request_id, PUBLIC, CompositeEvidence(evidence, ""))
    verdict = authority(site, TrustAnchors(), now).attest(HELLO, sent, NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, "snp.report-data")  # it is genuine, and of another boot

    tcb = parsed.reported_tcb
    levels = f"bootloader = {tcb.bootloader}, tee = {tcb.tee}, snp = {tcb.snp}, microcode = {tcb.microcode}"
    row = policy_for(
        site.machine,
        snp__measurements=f'[{{ id = "image-1", value = "{parsed.measurement.hex()}" }}]',
        snp__host_data=f'[{{ id = "config-1", value = "{parsed.host_data.hex()}" }}]',
        snp__minimum_tcb=f'[{{ id = "tcb-1", product = "Genoa", {levels} }}]',
        snp__vmpl=str(parsed.vmpl),
        gpu__count="0",
    )
    claims = verify_snp(evidence, (), (), now)
    appraisal = appraise(parse_policy(row), URI, cpu=claims, gpus=(), keyturn=None, now=now)
    assert appraisal.reference_value_ids == ("image-1", "config-1", "tcb-1")


def test_without_endorsements_a_genuine_report_cannot_be_verified(site: Site, tmp_path: Path) -> None:
    sent, anchors = recorded(tmp_path, *GENOA[1:])
    verdict = authority(site, anchors).attest(HELLO, sent, NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "snp.certificate-chain")


def test_certificates_that_expired_are_collateral_out_of_date(site: Site) -> None:
    verdict = authority(site, now=datetime(2150, 1, 1, tzinfo=UTC)).attest(HELLO, attestation(site), NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "snp.certificate-validity")


def test_a_report_that_does_not_parse_is_denied_by_the_name_of_its_field(site: Site) -> None:
    good = attestation(site)
    primary = replace(good.evidence.primary, report=b"\xff" * 1184)
    verdict = authority(site).attest(HELLO, replace(good, evidence=replace(good.evidence, primary=primary)), NONCE)
    assert isinstance(verdict, Denied)
    assert verdict.reason is DenialReason.DEVICE and verdict.claim.startswith("snp.malformed.")


def test_a_certificate_that_does_not_parse_is_collateral(site: Site) -> None:
    good = attestation(site)
    primary = replace(good.evidence.primary, cert_chain=(b"no certificate",))
    verdict = authority(site).attest(HELLO, replace(good, evidence=replace(good.evidence, primary=primary)), NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "snp.malformed.certificate")


@pytest.mark.parametrize("place", [32, 47, 48, 63])
def test_all_64_bytes_of_the_report_data_are_compared(site: Site, place: int) -> None:
    """Digest and padding: a guest that puts something else behind the digest signed something else."""
    good = attestation(site)
    wanted = report_data(RuntimeData(NONCE, PUBLIC.x, PUBLIC.y), good.evidence.additional_evidence)
    other = bytearray(wanted)
    other[place] ^= 1
    verdicts = []
    for data in (wanted, ReportData(bytes(other))):
        primary = site.machine.attester().collect(data)
        sent = replace(good, evidence=replace(good.evidence, primary=primary))
        verdicts.append(authority(site).attest(HELLO, sent, NONCE))
    assert isinstance(verdicts[0], Accepted)
    assert isinstance(verdicts[1], Denied) and verdicts[1].claim == "snp.report-data"


def test_a_decision_sees_one_version_of_the_policy(site: Site) -> None:
    broker = authority(site)
    first = broker.attest(HELLO, attestation(site), NONCE)
    broker.policy = parse_policy(b'schema = "keyturn-policy/v1"\nversion = "2"\n')
    second = broker.attest(HELLO, attestation(site), NONCE)
    assert isinstance(first, Accepted) and first.policy_version == "1"
    assert isinstance(second, Denied) and (second.claim, second.policy_version) == ("policy.row", "2")


# --- TDX --------------------------------------------------------------------------------------------------------------

TDX_HELLO = replace(HELLO, tee=Tee.TDX)


@pytest.fixture
def tdx_site(tmp_path: Path, machine: SimulatedMachine) -> Site:
    return Site(tmp_path / "tdx-broker", machine, Tee.TDX)


def test_a_td_gets_a_verdict_that_says_simulated_and_a_line_with_its_measurements(tdx_site: Site) -> None:
    verdict = authority(tdx_site).attest(TDX_HELLO, attestation(tdx_site), NONCE)
    assert isinstance(verdict, Accepted)
    assert verdict.reference_value_ids[:5] == ("firmware-1", "config-1", "loader-1", "kernel-1", "module-1")
    (line,) = tdx_site.audit()
    machine = tdx_site.machine
    assert (line["decision"], line["tee"], line["simulated"]) == ("allowed", "tdx", True)
    assert (line["measurement"], line["host_data"]) == (machine.measurement.hex(), machine.host_data.hex() + "00" * 16)
    assert line["chip_id_hash"] == hashlib.sha256(machine.chip_id[:16]).hexdigest()


def test_simulated_quotes_count_for_nothing_without_simulation_roots(tdx_site: Site) -> None:
    verdict = authority(tdx_site, TrustAnchors()).attest(TDX_HELLO, attestation(tdx_site), NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "tdx.certificate-chain")
    assert tdx_site.audit()[0]["simulated"] is None


@pytest.mark.parametrize("spoiled", ["nonce", "key", "devices"])
def test_a_quote_over_anything_but_this_handshake_is_denied(tdx_site: Site, spoiled: str) -> None:
    sent = attestation(tdx_site)
    if spoiled == "devices":
        text = sent.evidence.additional_evidence.replace("HOPPER", "BLACKWELL")
        sent = replace(sent, evidence=replace(sent.evidence, additional_evidence=text))
    if spoiled == "key":
        sent = replace(sent, tee_pubkey=TeePublicKey(b"z" * 32, PUBLIC.y))
    nonce = Nonce(bytes(32)) if spoiled == "nonce" else NONCE
    verdict = authority(tdx_site).attest(TDX_HELLO, sent, nonce)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, "tdx.report-data")


@pytest.mark.parametrize(
    ("fault", "claim"),
    [("debug", "tdx.td-debug"), ("signature", "tdx.report-signature"), ("mr_td", "tdx.mr_td")],
)
def test_a_td_that_is_not_what_the_row_wants_is_denied_by_the_name_of_it(tdx_site: Site, fault: str, claim: str) -> None:
    machine = tdx_site.machine
    machine.policy |= (fault == "debug") << 19
    machine.flip_signature_bit = fault == "signature"
    machine.measurement = bytes(48) if fault == "mr_td" else machine.measurement
    verdict = authority(tdx_site).attest(TDX_HELLO, attestation(tdx_site), NONCE)
    assert isinstance(verdict, Denied)
    assert verdict.claim == claim


def test_a_td_is_attested_with_the_log_of_its_boot_before_and_after_it_measured_a_release(tdx_site: Site) -> None:
    tdx_site.policy = tdx_policy_for(tdx_site.machine, tdx__event_log='"required"')
    for measured in range(3):
        sent = attestation(tdx_site)
        events = parse_event_log(sent.evidence.primary.event_log).events
        assert [parse_runtime_event(event) is not None for event in events[-measured - 1 :]] == [False] + [True] * measured
        assert isinstance(authority(tdx_site).attest(TDX_HELLO, sent, NONCE), Accepted)
        tdx_site.machine.runtime(Tee.TDX).measure(RuntimeEvent("keyturn", "release-key", "{}"))


@pytest.mark.parametrize(
    ("spoiled", "claim"),
    [("none", "tdx.event_log"), ("shorter", "event-log.rtmr"), ("cut", "event-log.malformed.event_data")],
)
def test_a_log_that_is_missing_or_is_not_that_of_the_quote_is_denied_by_its_name(
    tdx_site: Site, spoiled: str, claim: str
) -> None:
    tdx_site.policy = tdx_policy_for(tdx_site.machine, tdx__event_log='"required"')
    sent = attestation(tdx_site)
    log = parse_event_log(sent.evidence.primary.event_log)
    event_log = {
        "none": b"",
        "shorter": pack_event_log(replace(log, events=log.events[:-1])),
        "cut": sent.evidence.primary.event_log[:-1],
    }[spoiled]
    primary = replace(sent.evidence.primary, event_log=event_log)
    verdict = authority(tdx_site).attest(TDX_HELLO, replace(sent, evidence=replace(sent.evidence, primary=primary)), NONCE)
    assert isinstance(verdict, Denied)
    assert verdict.claim == claim


def test_a_row_does_not_count_for_the_other_tee(tdx_site: Site, site: Site) -> None:
    tdx_site.policy, site.policy = site.policy, tdx_site.policy
    for here, hello in ((tdx_site, TDX_HELLO), (site, HELLO)):
        verdict = authority(here).attest(hello, attestation(here), NONCE)
        assert isinstance(verdict, Denied)
        assert (verdict.reason, verdict.claim) == (DenialReason.CLAIM, "policy.tee")


def test_with_amds_lists_a_chain_must_be_on_a_current_one_of_its_root_and_not_taken_back(site: Site, tmp_path: Path) -> None:
    def decided() -> tuple[DenialReason, str] | None:
        anchors = replace(site.anchors, amd_crls=AmdCrls(tmp_path))
        verdict = authority(site, anchors).attest(HELLO, attestation(site), NONCE)
        return (verdict.reason, verdict.claim) if isinstance(verdict, Denied) else None

    assert decided() == (DenialReason.COLLATERAL, "snp.revocation-list")
    own = site.machine.silicon / CRL_FILE
    shutil.copy(own, tmp_path)
    (tmp_path / "README").write_text("not a list, and not looked at")
    assert decided() is None
    issuer, forger = x509.load_der_x509_crl(own.read_bytes()).issuer, rsa.generate_private_key(65537, 2048)
    (tmp_path / CRL_FILE).write_bytes(make_crl(issuer, forger, []))
    assert decided() == (DenialReason.COLLATERAL, "snp.revocation-list-signature")
    (tmp_path / CRL_FILE).write_bytes(b"no list")
    assert decided() == (DenialReason.COLLATERAL, "snp.malformed.revocation_list")


def test_lists_that_cannot_be_read_are_the_brokers_failure(site: Site, tmp_path: Path) -> None:
    anchors = replace(site.anchors, amd_crls=AmdCrls(tmp_path / "gone"))
    with pytest.raises(BrokerFailureError) as caught:
        authority(site, anchors).attest(HELLO, attestation(site), NONCE)
    assert (caught.value.reason, caught.value.retryable) == ("COLLATERAL_IO", True)
    assert site.audit() == []


def quoted(tmp_path: Path, name: str, collateral_of: str | None) -> tuple[Attestation, TrustAnchors, datetime]:
    """A recorded quote of another handshake, a broker with collateral for its platform, and when that was valid."""
    rows = {row["name"]: row for row in json.loads(shared_data("tdx/index.json").read_text())}
    data = shared_data(f"tdx/{rows[name]['quote']}").read_bytes()
    evidence = Evidence(Tee.TDX, data[: quote_length(data)])
    if collateral_of is not None:
        source = shared_data(f"tdx/{rows[collateral_of]['dcap_qvl']['collateral']}")
        shutil.copy(source, tmp_path / f"{rows[name]['fmspc']}.json")
    now = datetime.fromtimestamp(rows[name]["dcap_qvl"]["at_unix"], UTC)
    anchors = TrustAnchors(tdx_collateral=TdxCollateral(tmp_path))
    return Attestation(HELLO.request_id, PUBLIC, CompositeEvidence(evidence, "")), anchors, now


@pytest.mark.parametrize(
    ("collateral_of", "reason", "claim"),
    [
        ("v4-uptodate", DenialReason.DEVICE, "tdx.report-data"),
        (None, DenialReason.DEVICE, "tdx.report-data"),
        ("v5-uptodate", DenialReason.COLLATERAL, "tdx.tcb-collateral"),
    ],
)
def test_collateral_is_that_of_the_platform_and_is_held_against_it(
    tdx_site: Site, tmp_path: Path, collateral_of: str | None, reason: DenialReason, claim: str
) -> None:
    sent, anchors, now = quoted(tmp_path, "v4-uptodate", collateral_of)
    verdict = authority(tdx_site, anchors, now).attest(TDX_HELLO, sent, NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (reason, claim)


def test_collateral_that_cannot_be_read_is_the_brokers_failure(tdx_site: Site, tmp_path: Path) -> None:
    sent, anchors, now = quoted(tmp_path, "v4-uptodate", None)
    rows = json.loads(shared_data("tdx/index.json").read_text())
    (tmp_path / f"{next(row['fmspc'] for row in rows if row['name'] == 'v4-uptodate')}.json").mkdir()
    with pytest.raises(BrokerFailureError) as caught:
        authority(tdx_site, anchors, now).attest(TDX_HELLO, sent, NONCE)
    assert (caught.value.reason, caught.value.retryable) == ("COLLATERAL_IO", True)
    assert tdx_site.audit() == []


# --- protected PCIe ---------------------------------------------------------------------------------------------------

Devices = tuple[GpuEvidence, ...]
GPUS = slice(0, 8)


@pytest.fixture
def ppcie_site(tmp_path: Path, silicon: Path) -> Site:
    machine = SimulatedMachine.create(tmp_path / "switched", gpus=8, switches=4, silicon=silicon)
    return Site(tmp_path / "ppcie-broker", machine)


def protected(site: Site, change: Callable[[Devices], Devices] = lambda devices: devices, **claims: int) -> Accepted | Denied:
    """What comes of other devices, or other words of the agent, under a good CPU report."""
    data = RuntimeData(NONCE, PUBLIC.x, PUBLIC.y)
    devices, keyturn = parse_additional_evidence(site.collect(data).additional_evidence)
    assert keyturn is not None
    text = additional_evidence(change(devices), replace(keyturn, **claims))  # type: ignore[arg-type]
    primary = site.machine.attester().collect(report_data(data, text))
    return authority(site).attest(HELLO, Attestation(HELLO.request_id, PUBLIC, CompositeEvidence(primary, text)), NONCE)


def test_a_whole_set_is_accepted_by_the_names_of_its_values(ppcie_site: Site) -> None:
    verdict = authority(ppcie_site).attest(HELLO, attestation(ppcie_site), NONCE)
    assert isinstance(verdict, Accepted)
    assert {"driver-1", "vbios-1", "switch-1"} <= set(verdict.reference_value_ids)
    assert isinstance(protected(ppcie_site, lambda devices: devices[::-1]), Accepted)
    assert [line["simulated"] for line in ppcie_site.audit()] == [True, True]


def with_device(devices: Devices, place: int, **changes: object) -> Devices:
    return (*devices[:place], replace(devices[place], **changes), *devices[place + 1 :])  # type: ignore[arg-type]


def flipped(report: bytes) -> bytes:
    return report[:-1] + bytes((report[-1] ^ 1,))


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (lambda devices: devices[:-1], "ppcie.switch-count"),
        (lambda devices: devices[GPUS], "ppcie.switch-count"),
        (lambda devices: devices[1:], "ppcie.gpu-count"),
        (lambda devices: (*devices[:11], devices[10]), "ppcie.distinct-keys"),
        (lambda devices: (*devices[:7], devices[6], *devices[8:]), "ppcie.distinct-keys"),
        (lambda devices: with_device(devices, 9, report=flipped(devices[9].report)), "switch.report-signature"),
        (lambda devices: with_device(devices, 9, certificate_chain=devices[8].certificate_chain), "switch.report-signature"),
        (lambda devices: with_device(devices, 9, report=devices[9].report[:-1]), "switch.malformed.signature"),
        (lambda devices: with_device(devices, 2, report=flipped(devices[2].report)), "gpu.report-signature"),
        (lambda devices: with_device(devices, 2, arch="LS10", uuid="SWX-2")[:-1], "ppcie.gpu-count"),
        (lambda devices: with_device(devices, 9, arch="HOPPER", uuid="GPU-9"), "ppcie.gpu-count"),
    ],
)
def test_devices_that_are_no_whole_set_are_denied(ppcie_site: Site, change: Callable[[Devices], Devices], claim: str) -> None:
    verdict = protected(ppcie_site, change)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, claim)


def test_a_chain_of_a_switch_that_does_not_parse_is_collateral(ppcie_site: Site) -> None:
    verdict = protected(ppcie_site, lambda devices: with_device(devices, 8, certificate_chain=b"none"))
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "switch.malformed.certificate")


def test_protected_pcie_without_switches_is_denied(ppcie_site: Site) -> None:
    """The agent's word for the mode is enough, and whoever hides it is found out by what the GPUs sign."""
    verdict = protected(ppcie_site, lambda devices: devices[GPUS], multi_gpu_mode=0, cc_feature=1)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.CLAIM, "gpu.modes")
    ppcie_site.policy = policy_for(ppcie_site.machine, gpu__modes='["cc", "ppcie"]')
    assert isinstance(protected(ppcie_site), Accepted)
    for claims in ({"multi_gpu_mode": 0, "cc_feature": 1}, {"multi_gpu_mode": 1, "cc_feature": 0}):
        verdict = protected(ppcie_site, lambda devices: devices[GPUS], **claims)
        assert isinstance(verdict, Denied)
        assert verdict.claim == ("ppcie.switch-count" if claims["multi_gpu_mode"] else "gpu.modes")


@pytest.mark.parametrize(("knob", "claim"), [("stray_switch", "ppcie.gpu-links"), ("stray_gpu", "ppcie.common-gpus")])
def test_a_set_that_names_devices_of_another_is_denied(ppcie_site: Site, knob: str, claim: str) -> None:
    setattr(ppcie_site.machine.gpu, knob, True)
    verdict = authority(ppcie_site).attest(HELLO, attestation(ppcie_site), NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, claim)


def test_eight_gpus_in_another_mode_are_not_what_a_row_for_protected_pcie_wants(ppcie_site: Site) -> None:
    gpu = ppcie_site.machine.gpu
    gpu.switches, gpu.multi_gpu_mode, gpu.cc_feature = 0, 0, 1
    verdict = authority(ppcie_site).attest(HELLO, attestation(ppcie_site), NONCE)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.CLAIM, "gpu.modes")


def test_switches_beside_gpus_in_another_mode_are_not_passed_over(ppcie_site: Site) -> None:
    machine = ppcie_site.machine
    ppcie_site.policy = policy_for(machine, gpu__modes='["cc"]')
    machine.gpu.switches, machine.gpu.multi_gpu_mode, machine.gpu.cc_feature = 0, 0, 1
    assert isinstance(protected(ppcie_site), Accepted)

    def with_switches(devices: Devices) -> Devices:
        machine.gpu.switches = 4
        machine.save()
        return (*devices, *machine.switch_system().collect(device_nonce(RuntimeData(NONCE, PUBLIC.x, PUBLIC.y))))

    verdict = protected(ppcie_site, with_switches)
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.DEVICE, "ppcie.protected-pcie")


def test_a_simulated_switch_counts_for_nothing_without_simulation_roots(ppcie_site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    create_gpu_silicon(other, 0, switches=1)
    stranger = (other / "switch-0.pem").read_bytes()
    report = ppcie_site.collect(RuntimeData(NONCE, PUBLIC.x, PUBLIC.y))
    assert parse_additional_evidence(report.additional_evidence)[0][8].arch == "LS10"
    verdict = protected(ppcie_site, lambda devices: with_device(devices, 8, certificate_chain=stranger))
    assert isinstance(verdict, Denied)
    assert (verdict.reason, verdict.claim) == (DenialReason.COLLATERAL, "switch.certificate-chain")
