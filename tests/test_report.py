import json

import pytest

from agent.closed import Ident
from agent.errors import DenialReason, KeyReleaseDeniedError, all_errors
from agent.events import (
    BootStarted,
    LeaseRenewalFailed,
    LeaseRenewalStarted,
    LeaseRenewed,
    LeaseStarted,
    Message,
    Progress,
    Requested,
    ServerEnded,
    ServerReady,
    ServerStarted,
    Stage,
    StageEnded,
    StageFailed,
    StageStarted,
    Stopped,
    Stopping,
    VerdictAccepted,
)
from agent.report import MAX_TERMINATION_BYTES, BootReport, Phase, console_line
from tests.test_errors import sample

DENIED = KeyReleaseDeniedError(DenialReason.CLAIM, Ident("snp.measurement"), Ident("image-1"), Ident("7"))


def report_of(*messages: Message) -> BootReport:
    report = BootReport("0.1.0", "run")
    for message in messages:
        report.apply(message)
    return report


def test_a_denial_shows_everything_the_operator_has_to_quote() -> None:
    report = report_of(
        BootStarted(Ident("0.1.0"), Ident("run")),
        StageStarted(Stage.ATTEST),
        Requested(Ident("request-1"), 1),
        StageFailed(Stage.ATTEST, 12),
        DENIED,
    )
    assert report.phase is Phase.FAILED
    message = report.termination_message()
    for part in ("KeyReleaseDeniedError", "in stage attest", "snp.measurement", "image-1", "step: verdict", "authority"):
        assert part in message
    for part in ("request id: request-1", "next step: ask the key-release authority", "exit status: 16", "attest failed 12 ms"):
        assert part in message


@pytest.mark.parametrize("cls", all_errors().values(), ids=lambda cls: cls.__name__)
def test_a_termination_message_fits_whatever_failed(cls: type) -> None:
    stages = [StageEnded(stage, 10**9, 10**15) for stage in Stage]
    message = report_of(Requested(Ident("r" * 128), 1), *stages, sample(cls)).termination_message()
    assert len(message.encode()) <= MAX_TERMINATION_BYTES
    assert message.endswith("\n")


@pytest.mark.parametrize(
    ("messages", "phase"),
    [
        ((ServerStarted(1, 1, True, 4),), Phase.BOOTING),
        ((ServerStarted(1, 1, True, 4), ServerReady(5, 1)), Phase.SERVING),
        ((ServerReady(5, 1), ServerEnded(0, 9, 0)), Phase.RESTARTING),
        ((ServerReady(5, 1), Stopping(15, Ident("server")), ServerEnded(0, 15, 0)), Phase.STOPPING),
        ((ServerReady(5, 1), Stopping(15, None), Stopped(0)), Phase.STOPPED),
        ((DENIED, Stopping(15, None), Stopped(16)), Phase.FAILED),
        ((Stopping(15, None), ServerReady(5, 1)), Phase.STOPPING),
        ((DENIED, ServerReady(5, 1)), Phase.FAILED),
    ],
)
def test_phase_follows_the_messages(messages: tuple[Message, ...], phase: Phase) -> None:
    report = report_of(*messages)
    assert report.phase is phase
    assert report.health("/readyz")[0] == (200 if phase is Phase.SERVING else 503)
    assert report.health("/livez")[0] == 200


def test_the_status_is_json_and_shows_running_stages() -> None:
    report = report_of(
        StageStarted(Stage.LOAD),
        Progress(Stage.LOAD, 5, 10),
        VerdictAccepted(Ident("r1"), Ident("kbs:///a/b/c"), Ident("7"), True, 60),
    )
    status = json.loads(json.dumps(report.status()))
    assert status["stages"] == [{"name": "load", "state": "running", "ms": None, "bytes": 5, "total_bytes": 10}]
    assert (status["request_id"], status["simulated"]) == ("r1", True)
    assert report.health("/status") == (200, json.dumps(report.status()) + "\n")
    assert report.health("/etc/passwd")[0] == 404


def test_a_lease_is_shown_from_the_verdict_to_its_renewals_and_not_once_it_is_lifted() -> None:
    accepted = VerdictAccepted(Ident("r1"), Ident("kbs:///a/b/c"), Ident("7"), True, 60)
    report = report_of(accepted)
    assert report.status()["lease"] == {"s": 60, "ends_at": None, "renewals": 0}
    report.apply(LeaseStarted(60, Ident("2026-11-26T12:01:00Z")))
    assert report.status()["lease"] == {"s": 60, "ends_at": "2026-11-26T12:01:00Z", "renewals": 0}
    report.apply(LeaseRenewed(90, Ident("2026-11-26T12:02:00Z")))
    assert report.status()["lease"] == {"s": 90, "ends_at": "2026-11-26T12:02:00Z", "renewals": 1}
    report.apply(LeaseRenewed(None, None))
    assert report.status()["lease"] is None
    assert report_of(VerdictAccepted(Ident("r1"), Ident("kbs:///a/b/c"), Ident("7"), True, None)).status()["lease"] is None


def test_a_renewal_changes_neither_phase_nor_stages() -> None:
    served = (StageEnded(Stage.ATTEST, 5), StageEnded(Stage.SERVER, 5), ServerReady(5, 1))
    report = report_of(
        *served, LeaseRenewalStarted(), Requested(Ident("r2"), 1), LeaseRenewalFailed(Ident("WorkerLostError"), 5)
    )
    assert (report.phase, report.waiting_for, report.request_id) == (Phase.SERVING, None, "r2")
    assert report.status()["stages"] == report_of(*served).status()["stages"]


def test_people_see_the_end_of_a_renewed_lease() -> None:
    assert console_line(LeaseRenewed(60, Ident("2026-11-26T12:01:00Z"))) == "lease renewed: 60 s, until 2026-11-26T12:01:00Z"
    assert console_line(LeaseRenewed(None, None)) == "lease lifted"
    failed = console_line(LeaseRenewalFailed(Ident("BrokerUnreachableError"), 4000))
    assert failed == "lease renewal failed: error BrokerUnreachableError, retry_in_ms 4000"


def test_people_see_the_hint_apart_from_the_error() -> None:
    line = console_line(DENIED)
    assert line is not None
    error, hint = line.split("\n")
    assert error.startswith("error: key release denied")
    assert hint.startswith("keyturn: hint: ask the key-release authority")
    assert console_line(Progress(Stage.LOAD, 1, 2)) is None
    assert console_line(StageEnded(Stage.LOAD, 1500, 2_000_000)) == "load: done in 1500 ms, 2.0 MB"
