"""The restart policy as tables: each line is a moment, an event and the action it must get."""

import doctest

import pytest

from agent.errors import ServerExitedError, ServerNotReadyError, Unready
from agent.server import policy
from agent.server.policy import (
    Action,
    Begin,
    Event,
    Exited,
    GiveUp,
    NotReady,
    Ready,
    RestartPolicy,
    Start,
    Stop,
    StopRequested,
    Tick,
    Wait,
)

CRASH = Exited(status=0, signal=11)

STORIES: dict[str, list[tuple[float, Event, object]]] = {
    "server that becomes ready is left alone": [
        (0, Begin(), Start()),
        (0, Tick(), Wait(60)),
        (10, NotReady(Unready.HEALTH), Wait(50)),
        (20, Ready(), Wait(None)),
        (100_000, Tick(), Wait(None)),
    ],
    "server that ends before it was ready is not started again": [
        (0, Begin(), Start()),
        (1, Exited(status=1, signal=0), "ServerExitedError status=1 signal=0 starts=1"),
    ],
    "server that ends with status 0 before it was ready has failed too": [
        (0, Begin(), Start()),
        (1, Exited(status=0, signal=0), "ServerExitedError status=0 signal=0 starts=1"),
    ],
    "server that is not ready in time is given up with the last reason": [
        (5, Begin(), Start()),
        (6, NotReady(Unready.HEALTH), Wait(59)),
        (7, NotReady(Unready.MODEL), Wait(58)),
        (64, Tick(), Wait(1)),
        (65, Tick(), "ServerNotReadyError reason=model waited=60"),
    ],
    "server that never answered is given up because it never answered": [
        (0, Begin(), Start()),
        (61, Tick(), "ServerNotReadyError reason=no_answer waited=61"),
    ],
    "reason that comes after the deadline is heard and the next tick gives up": [
        (0, Begin(), Start()),
        (70, NotReady(Unready.PROBE), Wait(0)),
        (70, Tick(), "ServerNotReadyError reason=probe waited=70"),
    ],
    "crashed server is started again, later each time, until it crashed too often": [
        (0, Begin(), Start()),
        (1, Ready(), Wait(None)),
        (10, CRASH, Wait(1)),
        (10.5, Tick(), Wait(0.5)),
        (11, Tick(), Start()),
        (11, Tick(), Wait(60)),
        (12, Ready(), Wait(None)),
        (20, CRASH, Wait(2)),
        (22, Tick(), Start()),
        (23, Ready(), Wait(None)),
        (30, CRASH, Wait(4)),
        (34, Tick(), Start()),
        (35, Ready(), Wait(None)),
        (40, CRASH, "ServerExitedError status=0 signal=11 starts=4"),
    ],
    "crash while starting again counts as a crash": [
        (0, Begin(), Start()),
        (1, Ready(), Wait(None)),
        (2, CRASH, Wait(1)),
        (3, Tick(), Start()),
        (4, CRASH, Wait(2)),
        (6, Tick(), Start()),
        (7, CRASH, Wait(4)),
        (11, Tick(), Start()),
        (12, CRASH, "ServerExitedError status=0 signal=11 starts=4"),
    ],
    "restarts older than the window are forgiven": [
        (0, Begin(), Start()),
        (1, Ready(), Wait(None)),
        (10, CRASH, Wait(1)),
        (11, Tick(), Start()),
        (20, CRASH, Wait(2)),
        (22, Tick(), Start()),
        (30, CRASH, Wait(4)),
        (34, Tick(), Start()),
        (35, Ready(), Wait(None)),
        (609, Tick(), Wait(None)),
        (610, CRASH, Wait(4)),  # the restart of second 10 is 600 s ago: two are left in the window
        (614, Tick(), Start()),
        (615, CRASH, "ServerExitedError status=0 signal=11 starts=5"),
    ],
    "deadline and reason of a second start are its own": [
        (0, Begin(), Start()),
        (1, NotReady(Unready.PROBE), Wait(59)),
        (2, Ready(), Wait(None)),
        (100, CRASH, Wait(1)),
        (101, Tick(), Start()),
        (160, Tick(), Wait(1)),
        (161, Tick(), "ServerNotReadyError reason=no_answer waited=60"),
    ],
    "stop is obeyed before the start": [(0, StopRequested(), Stop()), (1, Begin(), Stop())],
    "stop is obeyed while starting": [(0, Begin(), Start()), (1, StopRequested(), Stop()), (2, CRASH, Stop())],
    "stop is obeyed while ready, and an exit after it is no crash": [
        (0, Begin(), Start()),
        (1, Ready(), Wait(None)),
        (2, StopRequested(), Stop()),
        (3, Exited(0, 15), Stop()),
    ],
    "stop is obeyed while backing off": [
        (0, Begin(), Start()),
        (1, Ready(), Wait(None)),
        (2, CRASH, Wait(1)),
        (2.5, StopRequested(), Stop()),
        (3, Tick(), Stop()),
    ],
    "giving up is final": [
        (0, Begin(), Start()),
        (1, CRASH, "ServerExitedError status=0 signal=11 starts=1"),
        (2, Ready(), "ServerExitedError status=0 signal=11 starts=1"),
        (3, StopRequested(), "ServerExitedError status=0 signal=11 starts=1"),
    ],
}


@pytest.mark.parametrize("name", STORIES)
def test_policy_tells_the_story(name: str) -> None:
    machine = RestartPolicy(ready_timeout_s=60, max_restarts=3, restart_window_s=600)
    for now, event, expected in STORIES[name]:
        assert told(machine.decide(event, now)) == expected, (now, event)


def told(action: Action) -> object:
    match action:
        case GiveUp(ServerExitedError() as error):
            return f"ServerExitedError status={error.status} signal={error.signal} starts={error.starts}"
        case GiveUp(ServerNotReadyError() as error):
            return f"ServerNotReadyError reason={error.reason.name.lower()} waited={error.waited_s}"
    return action


def test_no_restart_at_all_can_be_configured() -> None:
    machine = RestartPolicy(ready_timeout_s=60, max_restarts=0, restart_window_s=600)
    machine.decide(Begin(), 0)
    machine.decide(Ready(), 1)
    assert told(machine.decide(CRASH, 2)) == "ServerExitedError status=0 signal=11 starts=1"


def test_back_off_doubles_up_to_its_limit() -> None:
    machine, now, waits = RestartPolicy(ready_timeout_s=60, max_restarts=9, restart_window_s=3600), 1.0, []
    machine.decide(Begin(), 0)
    machine.decide(Ready(), now)
    for _ in range(9):
        action = machine.decide(CRASH, now)
        assert isinstance(action, Wait) and action.seconds is not None
        waits.append(action.seconds)
        now += action.seconds
        assert machine.decide(Tick(), now) == Start()
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], Tick()),
        ([], Ready()),
        ([], CRASH),
        ([Begin()], Begin()),
        ([Begin(), Ready()], Ready()),
        ([Begin(), Ready()], NotReady(Unready.HEALTH)),
        ([Begin(), Ready(), CRASH], CRASH),
        ([Begin(), Ready(), CRASH], Ready()),
    ],
)
def test_event_that_cannot_happen_is_a_bug(before: list[Event], event: Event) -> None:
    machine = RestartPolicy(ready_timeout_s=60, max_restarts=3, restart_window_s=600)
    for earlier in before:
        machine.decide(earlier, 0)
    with pytest.raises(RuntimeError):
        machine.decide(event, 0)


def test_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(policy).failed == 0
