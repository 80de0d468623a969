"""TCB levels over recorded collateral, and that no status is ever made up."""

import dataclasses
import datetime
import json
import sys

import dcap_qvl
import pytest

from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.tdx_abi import parse_quote, quote_length
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import SimulatedTdx
from agent.verify.tdx import TcbStatus, TdxClaims, verify_tdx
from agent.verify.tdx_collateral import MAX_COLLATERAL_BYTES, evaluate_tcb
from tests.shared import shared_data
from tests.test_verify_tdx import first_day, roots_of

NOW = datetime.datetime.now(datetime.UTC)


def recorded(name: str) -> tuple[Evidence, TdxClaims, bytes, datetime.datetime, str]:
    """A quote, its claims, collateral, the moment that was valid, and what dcap-qvl said when it was recorded."""
    row = next(row for row in json.loads(shared_data("tdx/index.json").read_text()) if row["name"] == name)
    data = shared_data(f"tdx/{row['quote']}").read_bytes()
    evidence = Evidence(Tee.TDX, data[: quote_length(data)])
    claims = verify_tdx(evidence, [], first_day(parse_quote(evidence.report)))
    said = row["dcap_qvl"]
    collateral = shared_data(f"tdx/{said['collateral']}").read_bytes()
    return evidence, claims, collateral, datetime.datetime.fromtimestamp(said["at_unix"], datetime.UTC), said["result"]


@pytest.mark.parametrize("name", ["v4-uptodate", "v5-uptodate"])
def test_recorded_platforms_that_were_up_to_date_are(name: str) -> None:
    evidence, claims, collateral, at, said = recorded(name)
    evaluated = evaluate_tcb(claims, evidence, collateral, at)
    assert evaluated.tcb_status is TcbStatus.UP_TO_DATE
    assert said == "UpToDate"
    assert evaluated == dataclasses.replace(claims, tcb_status=TcbStatus.UP_TO_DATE)


@pytest.mark.parametrize("name", ["v5-tcb-unknown", "v4-spr-e4"])
def test_a_platform_at_a_level_that_intel_does_not_list_is_refused(name: str) -> None:
    evidence, claims, collateral, at, said = recorded(name)
    assert "No matching TCB level" in said
    refuse(claims, evidence, collateral, at)


@dataclasses.dataclass(frozen=True)
class Said:
    """What dcap-qvl returns. No recorded platform was anything but up to date, so its word is put into its mouth here."""

    status: str
    advisory_ids: tuple[str, ...] = ("INTEL-SA-00001",)


@pytest.mark.parametrize("status", [status for status in TcbStatus if status is not TcbStatus.NOT_EVALUATED])
def test_a_level_is_told_as_intel_tells_it(status: TcbStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, claims, collateral, at, _ = recorded("v4-uptodate")
    monkeypatch.setattr(dcap_qvl, "verify", lambda *_: Said(status.value))
    evaluated = evaluate_tcb(claims, evidence, collateral, at)
    assert (evaluated.tcb_status, evaluated.advisory_ids) == (status, ("INTEL-SA-00001",))


@pytest.mark.parametrize("status", ["Revoked", "", "uptodate", "SomethingNew"])
def test_a_platform_that_is_revoked_or_whose_level_is_no_word_of_ours_is_refused(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, claims, collateral, at, _ = recorded("v4-uptodate")
    monkeypatch.setattr(dcap_qvl, "verify", lambda *_: Said(status))
    refuse(claims, evidence, collateral, at)


def test_collateral_is_refused_when_it_has_expired_or_is_of_another_platform() -> None:
    evidence, claims, collateral, at, _ = recorded("v4-uptodate")
    refuse(claims, evidence, collateral, at + datetime.timedelta(days=400))
    _, _, of_another, later, _ = recorded("v5-uptodate")
    refuse(claims, evidence, of_another, later)
    tampered = collateral.replace(b"UpToDate", b"uptodate")
    refuse(claims, evidence, tampered, at)


def refuse(claims: TdxClaims, evidence: Evidence, collateral: bytes, at: datetime.datetime) -> None:
    with pytest.raises(EvidenceVerificationError) as refused:
        evaluate_tcb(claims, evidence, collateral, at)
    assert (refused.value.format, refused.value.check) == (EvidenceFormat.TDX_CHAIN, EvidenceCheck.TCB_COLLATERAL)


def simulated(machine: SimulatedMachine) -> tuple[Evidence, TdxClaims]:
    evidence = SimulatedTdx(machine).collect(ReportData(bytes(64)))
    return evidence, verify_tdx(evidence, roots_of(machine), NOW)


def test_without_collateral_nothing_is_evaluated(machine: SimulatedMachine) -> None:
    evidence, claims = simulated(machine)
    assert evaluate_tcb(claims, evidence, None, NOW).tcb_status is TcbStatus.NOT_EVALUATED


def test_without_the_extra_nothing_is_evaluated(machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, claims = simulated(machine)
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)  # what Python itself does with a module that is not there
    assert evaluate_tcb(claims, evidence, b"{}", NOW).tcb_status is TcbStatus.NOT_EVALUATED


@pytest.mark.parametrize("collateral", [b"", b"{}", b"[]", b"\xff", b" " * (MAX_COLLATERAL_BYTES + 1)])
def test_collateral_that_is_none_is_malformed(machine: SimulatedMachine, collateral: bytes) -> None:
    evidence, claims = simulated(machine)
    with pytest.raises(MalformedEvidenceError) as refused:
        evaluate_tcb(claims, evidence, collateral, NOW)
    assert refused.value.field == "collateral"
