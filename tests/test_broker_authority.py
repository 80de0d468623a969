"""Decisions without a wire: recorded silicon under AMD's own root, and evidence that leaves no doubt about its order."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.broker.anchors import TrustAnchors, load_endorsements
from agent.broker.audit import AuditLog
from agent.broker.authority import Authority
from agent.broker.keystore import DirectoryKeyStore
from agent.broker.policy import parse_policy
from agent.broker.token import TokenKey
from agent.closed import Ident
from agent.errors import DenialReason
from agent.evidence import CompositeEvidence, Evidence, Nonce, RuntimeData, Tee
from agent.handshake import Accepted, Attestation, Denied, Hello, TeePublicKey
from agent.sim.machine import SimulatedMachine
from tests.broker_site import URI, Site
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


def test_a_decision_sees_one_version_of_the_policy(site: Site) -> None:
    broker = authority(site)
    first = broker.attest(HELLO, attestation(site), NONCE)
    broker.policy = parse_policy(b'schema = "keyturn-policy/v1"\nversion = "2"\n')
    second = broker.attest(HELLO, attestation(site), NONCE)
    assert isinstance(first, Accepted) and first.policy_version == "1"
    assert isinstance(second, Denied) and (second.claim, second.policy_version) == ("policy.row", "2")
