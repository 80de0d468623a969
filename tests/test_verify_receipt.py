"""What a receipt rests on, on simulated silicon: its evidence, its binding, its log."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent import cose
from agent.broker.anchors import load_simulation_roots
from agent.errors import EvidenceVerificationError, ReceiptError, ReceiptProblem
from agent.evidence import NO_REPORT_DATA, Evidence, ReportData, Tee, Unsupported
from agent.evidence.ccel import RuntimeEvent
from agent.receipt import Receipt, parse_receipt, sign_receipt
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import CCEL_FILE
from agent.verify.receipt import check_binding, check_same_guest, launch_digest, verify_receipt
from tests.test_receipt import RECEIPT, STATEMENT

KEY = ec.generate_private_key(ec.SECP256R1())
SILICON = [Tee.SNP, Tee.TDX]


def now() -> datetime:
    return datetime.now(UTC)


def make(machine: SimulatedMachine, tee: Tee, *, measure: bool = True, content: str | None = None) -> Receipt:
    """As a notary does: state, measure, vouch, sign."""
    statement = dataclasses.replace(STATEMENT, tee=tee, simulated=True, config_digest=machine.host_data)
    receipt = dataclasses.replace(
        RECEIPT,
        statement=statement,
        key=cose.spki(KEY.public_key()),
        unmeasured=Unsupported.NO_REGISTER if tee is not Tee.TDX else None if measure else Unsupported.NO_DRIVER,
    )
    if tee is Tee.TDX and measure:
        said = content if content is not None else f'{{"statement_digest":"sha384:{statement.digest().hex()}"}}'
        machine.runtime(tee).measure(RuntimeEvent("keyturn", "release-key", said))
    return parse_receipt(sign_receipt(dataclasses.replace(receipt, evidence=fresh(machine, tee, receipt.report_data())), KEY))


def fresh(machine: SimulatedMachine, tee: Tee, data: ReportData = NO_REPORT_DATA) -> Evidence:
    log = machine.runtime(tee).event_log() if tee is Tee.TDX else b""
    return dataclasses.replace(machine.attester(tee).collect(data), event_log=log)


def roots(machine: SimulatedMachine) -> Sequence[x509.Certificate]:
    return load_simulation_roots(machine.roots_dir)


def refusal(check: Callable[[], object]) -> ReceiptProblem:
    with pytest.raises(ReceiptError) as caught:
        check()
    return caught.value.problem


@pytest.mark.parametrize("tee", SILICON)
def test_a_receipt_of_genuine_silicon_verifies(machine: SimulatedMachine, tee: Tee) -> None:
    claims = verify_receipt(make(machine, tee), roots(machine), (), now())
    assert claims.simulated
    assert claims.logged is (tee is Tee.TDX)


@pytest.mark.parametrize("tee", SILICON)
def test_without_its_roots_it_is_not_genuine(machine: SimulatedMachine, tee: Tee) -> None:
    with pytest.raises(EvidenceVerificationError):
        verify_receipt(make(machine, tee), (), (), now())


@pytest.mark.parametrize("tee", [*SILICON, Tee.SAMPLE])
def test_evidence_over_another_key_or_statement_is_refused(machine: SimulatedMachine, tee: Tee) -> None:
    receipt = make(machine, tee)
    check_binding(receipt)
    other_key = cose.spki(ec.generate_private_key(ec.SECP256R1()).public_key())
    other_statement = dataclasses.replace(receipt.statement, model_version=4)
    changed = [dataclasses.replace(receipt, key=other_key), dataclasses.replace(receipt, statement=other_statement)]
    for other in changed:
        assert refusal(partial(check_binding, other)) is ReceiptProblem.BINDING
        assert refusal(partial(verify_receipt, other, roots(machine), (), now())) is ReceiptProblem.BINDING


def test_sample_evidence_proves_nothing_and_says_so(machine: SimulatedMachine) -> None:
    claims = verify_receipt(make(machine, Tee.SAMPLE), (), (), now())
    assert (claims.evidence, claims.simulated) == (None, True)


@pytest.mark.parametrize("tee", SILICON)
def test_a_statement_names_the_configuration_that_the_guest_was_launched_with(machine: SimulatedMachine, tee: Tee) -> None:
    receipt = make(machine, tee, measure=False)
    machine.host_data = b"o" * 32
    machine.save()
    other = dataclasses.replace(receipt, evidence=fresh(machine, tee, receipt.report_data()))
    assert refusal(lambda: verify_receipt(other, roots(machine), (), now())) is ReceiptProblem.CONFIG


@pytest.mark.parametrize("content", ["{}", '{"statement_digest":"sha384:00"}', "no JSON", '{"statement_digest":7}'])
def test_a_measured_release_stands_in_the_log(machine: SimulatedMachine, content: str) -> None:
    receipt = make(machine, Tee.TDX, content=content)
    assert refusal(lambda: verify_receipt(receipt, roots(machine), (), now())) is ReceiptProblem.EVENT_LOG


def test_an_event_of_somebody_else_is_none_of_ours(machine: SimulatedMachine) -> None:
    """The same text under another name: anybody may write it."""
    receipt = make(machine, Tee.TDX, measure=False)
    text = f'{{"statement_digest":"sha384:{receipt.statement.digest().hex()}"}}'
    machine.runtime(Tee.TDX).measure(RuntimeEvent("other", "release-key", text))
    again = dataclasses.replace(receipt, unmeasured=None, evidence=fresh(machine, Tee.TDX, receipt.report_data()))
    assert refusal(lambda: verify_receipt(again, roots(machine), (), now())) is ReceiptProblem.EVENT_LOG


def test_what_was_not_measured_needs_no_log(machine: SimulatedMachine) -> None:
    claims = verify_receipt(make(machine, Tee.TDX, measure=False), roots(machine), (), now())
    assert not claims.logged


def test_a_log_that_does_not_replay_is_refused(machine: SimulatedMachine) -> None:
    receipt = make(machine, Tee.TDX)
    machine.runtime(Tee.TDX).measure(RuntimeEvent("keyturn", "more", "{}"))
    longer = dataclasses.replace(receipt.evidence, event_log=machine.runtime(Tee.TDX).event_log())
    with pytest.raises(EvidenceVerificationError):
        verify_receipt(dataclasses.replace(receipt, evidence=longer), roots(machine), (), now())


# --- the same guest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", [*SILICON, Tee.SAMPLE])
def test_the_guest_that_made_it_is_the_same_guest(machine: SimulatedMachine, tee: Tee) -> None:
    receipt = make(machine, tee)
    check_same_guest(receipt, fresh(machine, tee))
    if tee is not Tee.SAMPLE:
        field = launch_digest(receipt.evidence)
        assert field is not None and field.startswith(machine.host_data)
    else:
        assert launch_digest(receipt.evidence) is None


def _other(machine: SimulatedMachine, folder: Path) -> SimulatedMachine:
    """Another guest of one image and one configuration, on another chip."""
    return SimulatedMachine.create(folder, gpus=0, silicon=machine.silicon, host_data=machine.host_data)


@pytest.mark.parametrize("tee", SILICON)
def test_a_receipt_of_another_guest_is_refused(machine: SimulatedMachine, tmp_path: Path, tee: Tee) -> None:
    receipt = make(machine, tee)
    other = _other(machine, tmp_path / "other")
    if tee is Tee.TDX:
        shutil.copy(machine.directory / CCEL_FILE, other.directory / CCEL_FILE)  # it started in the same way
    assert refusal(lambda: check_same_guest(receipt, fresh(other, tee))) is ReceiptProblem.GUEST


def test_evidence_of_another_kind_is_of_another_guest(machine: SimulatedMachine) -> None:
    receipt = make(machine, Tee.SNP)
    assert refusal(lambda: check_same_guest(receipt, fresh(machine, Tee.TDX))) is ReceiptProblem.GUEST


@pytest.mark.parametrize("tee", SILICON)
@pytest.mark.parametrize("changes", [{"host_data": b"h" * 32}, {"measurement": b"m" * 48}], ids=["config", "image"])
def test_a_guest_launched_otherwise_is_another(machine: SimulatedMachine, tee: Tee, changes: dict[str, bytes]) -> None:
    receipt = make(machine, tee, measure=False)
    for name, value in changes.items():
        setattr(machine, name, value)
    machine.save()
    assert refusal(lambda: check_same_guest(receipt, fresh(machine, tee))) is ReceiptProblem.GUEST


def test_fresh_evidence_with_a_log_that_does_not_replay_is_refused(machine: SimulatedMachine) -> None:
    receipt = make(machine, Tee.TDX)
    here = fresh(machine, Tee.TDX)
    machine.runtime(Tee.TDX).measure(RuntimeEvent("keyturn", "more", "{}"))
    with pytest.raises(EvidenceVerificationError):
        check_same_guest(receipt, dataclasses.replace(here, event_log=machine.runtime(Tee.TDX).event_log()))
