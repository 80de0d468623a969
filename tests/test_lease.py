"""The lease as stories: each line is a moment, an event and the action it must get. No story waits for a clock."""

import doctest

import pytest

from agent import lease
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ConfigNotMeasuredError,
    DenialReason,
    GpuFault,
    GpuFaultError,
    IdentityProblem,
    InternalError,
    KeyReleaseDeniedError,
    LeaseEndedError,
    NoRouteError,
    ProtocolProblem,
    RemoteProtocolError,
    RollbackError,
    TokenCheck,
    TokenError,
    Unreachable,
    WorkerLostError,
)
from agent.evidence.cpu import REQUEST_DISTANCE_S
from agent.lease import Action, End, Event, Lease, Look, Renew, RenewalFailed, RenewalPolicy, Renewed, Wait

UNREACHABLE = RenewalFailed(BrokerUnreachableError(Unreachable.REFUSED))
LOST = RenewalFailed(WorkerLostError(signal=9, status=0))
DENIED = KeyReleaseDeniedError(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("7"))
OVER = "LeaseEndedError"

# Each begins with a lease of 100 s from 1000.
STORIES: dict[str, list[tuple[float, Event, object]]] = {
    "nothing is asked before half of the lease": [
        (1000, Look(), Wait(1)),
        (1049, Look(), Wait(1)),
        (1049.5, Look(), Wait(0.5)),
        (1050, Look(), Renew()),
    ],
    "boot that took all of it is over": [(1100, Look(), OVER)],
    "lease ends to the second and stays ended": [
        (1050, Look(), Renew()),
        (1099.75, Look(), Wait(0.25)),
        (1100, Look(), OVER),
        (1100, Renewed(100), OVER),
        (1200, Look(), OVER),
    ],
    "guest that slept past the end finds it ended": [(1010, Look(), Wait(1)), (90_000, Look(), OVER)],
    "new lease counts from when it was asked for": [
        (1050, Look(), Renew()),
        (1060, Renewed(100), Wait(1)),
        (1099, Look(), Wait(1)),
        (1100, Look(), Renew()),
        (1149, Look(), Wait(1)),
        (1150, Look(), OVER),
    ],
    "new lease may be shorter than the rest of the old one": [
        (1050, Look(), Renew()),
        (1051, Renewed(10), Wait(1)),
        (1055, Look(), Renew()),
        (1060, Look(), OVER),
    ],
    "new lease that was over before it came": [(1050, Look(), Renew()), (1060, Renewed(5), OVER)],
    "new lease that comes after the end of the old one comes too late": [(1050, Look(), Renew()), (1100, Renewed(100), OVER)],
    "verdict without a lease lifts it": [
        (1050, Look(), Renew()),
        (1051, Renewed(None), Wait(None)),
        (1_000_000, Look(), Wait(None)),
    ],
    "verdict without a lease that comes after the end comes too late": [(1050, Look(), Renew()), (1101, Renewed(None), OVER)],
    "attempts without an answer are made again, later each time, and not after the end": [
        (1050, Look(), Renew()),
        (1060, UNREACHABLE, Wait(1)),
        (1061, Look(), Wait(1)),
        (1062, Look(), Renew()),
        (1062, LOST, Wait(1)),
        (1065, Look(), Wait(1)),
        (1066, Look(), Renew()),
        (1096, UNREACHABLE, Wait(1)),
        (1099.5, Look(), Wait(0.5)),
        (1100, Look(), OVER),
    ],
    "answer begins the count of failures anew": [
        (1050, Look(), Renew()),
        (1051, LOST, Wait(1)),
        (1053, Look(), Renew()),
        (1054, Renewed(100), Wait(1)),
        (1103, Look(), Renew()),
        (1104, LOST, Wait(1)),
        (1106, Look(), Renew()),
    ],
    "denial stops at once and for good": [
        (1050, Look(), Renew()),
        (1051, RenewalFailed(DENIED), "KeyReleaseDeniedError"),
        (1052, Look(), "KeyReleaseDeniedError"),
        (2000, Look(), "KeyReleaseDeniedError"),
    ],
    "denial that comes after the end is told as the denial it is": [
        (1050, Look(), Renew()),
        (1100, RenewalFailed(DENIED), "KeyReleaseDeniedError"),
    ],
}


def told(action: Action) -> object:
    return type(action.error).__name__ if isinstance(action, End) else action


@pytest.mark.parametrize("name", STORIES)
def test_story(name: str) -> None:
    policy = RenewalPolicy(Lease(100, 1000.0), 1000.0)
    for now, event, expected in STORIES[name]:
        assert told(policy.decide(event, now)) == expected, (now, event)


@pytest.mark.parametrize(
    "error",
    [
        DENIED,
        TokenError(TokenCheck.NONCE),
        RollbackError(3, 4),
        ConfigNotMeasuredError(),
        GpuFaultError(GpuFault.FATAL_XID, 79),
        LeaseEndedError(5),
        InternalError(Ident("place")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_answer_but_silence_is_final(error: AgentError) -> None:
    policy = RenewalPolicy(Lease(100, 1000.0), 1000.0)
    policy.decide(Look(), 1050)
    assert policy.decide(RenewalFailed(error), 1051) == End(error)


@pytest.mark.parametrize(
    "error",
    [
        BrokerUnreachableError(Unreachable.REFUSED),
        NoRouteError(0, 0),
        BrokerIdentityError(IdentityProblem.CHAIN),
        RemoteProtocolError(ProtocolProblem.CLOSED, Ident("AWAIT_VERDICT")),
        BrokerFailureError(13, Ident("INTERNAL")),
        WorkerLostError(signal=9, status=0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_authority_that_was_not_reached_is_asked_again(error: AgentError) -> None:
    policy = RenewalPolicy(Lease(100, 1000.0), 1000.0)
    policy.decide(Look(), 1050)
    assert isinstance(policy.decide(RenewalFailed(error), 1051), Wait)
    assert policy.next_attempt == 1053


def test_the_wait_between_attempts_is_bounded_and_told() -> None:
    policy = RenewalPolicy(Lease(10**6, 0.0), 0.0)
    now = 500_000.0
    waits: list[float] = []
    for _ in range(50):
        assert policy.decide(Look(), now) == Renew()
        assert policy.next_attempt is None
        policy.decide(LOST, now)
        assert policy.next_attempt is not None
        waits.append(policy.next_attempt - now)
        now = policy.next_attempt
    assert waits[:6] == [2, 4, 8, 16, 32, 60]
    assert set(waits[6:]) == {lease.MAX_BACKOFF_S}


def test_two_workers_keep_their_distance() -> None:
    """Each asks the firmware, and does so first of all: after a boot that used up half of the lease, and after an attempt."""
    policy = RenewalPolicy(Lease(100, 1000.0), 1080.0)
    assert policy.next_attempt == 1080 + REQUEST_DISTANCE_S
    assert policy.decide(Look(), 1082) == Renew()
    policy.decide(UNREACHABLE, 1083)
    assert policy.next_attempt == 1083 + REQUEST_DISTANCE_S
    assert policy.decide(Look(), 1085) == Renew()
    policy.decide(Renewed(4), 1086)  # of which half is nearly over
    assert policy.next_attempt == 1086 + REQUEST_DISTANCE_S
    assert RenewalPolicy(Lease(100, 1000.0), 1098.0).next_attempt is None


def test_no_attempt_is_announced_beyond_the_end() -> None:
    policy = RenewalPolicy(Lease(100, 1000.0), 1000.0)
    assert policy.decide(Look(), 1099.5) == Renew()
    assert policy.decide(UNREACHABLE, 1099.75) == Wait(0.25)
    assert policy.next_attempt is None


@pytest.mark.parametrize("event", [Renewed(5), LOST])
def test_an_outcome_without_an_attempt_is_a_bug(event: Event) -> None:
    with pytest.raises(RuntimeError):
        RenewalPolicy(Lease(100, 1000.0), 1000.0).decide(event, 1010)


@pytest.mark.parametrize(("seconds", "since"), [(0, 0.0), (-1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_what_never_ends_is_no_lease(seconds: int, since: float) -> None:
    with pytest.raises(ValueError):
        Lease(seconds, since)


def test_the_docstring_example_runs() -> None:
    assert doctest.testmod(lease).failed == 0
