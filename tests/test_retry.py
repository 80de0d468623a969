"""The one retry schedule."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import retry
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    TokenCheck,
    TokenError,
    Unreachable,
)
from agent.retry import RetrySchedule

LOST = BrokerUnreachableError(Unreachable.RESET)
SCHEDULE = RetrySchedule(deadline=1000.0)
DENIED = KeyReleaseDeniedError(DenialReason.CLAIM, Ident("snp.measurement"), None, Ident("p1"))


def test_the_docstring_example_runs() -> None:
    assert doctest.testmod(retry).failed == 0


@pytest.mark.parametrize("error", [DENIED, TokenError(TokenCheck.SIGNATURE)])
def test_a_denial_is_final(error: AgentError) -> None:
    assert SCHEDULE.delay(error, 0, now=0.0, draw=0.0) is None


def test_waits_double_up_to_the_longest() -> None:
    draw = 1.0 - 2**-53
    waits = [SCHEDULE.delay(LOST, retry, now=0.0, draw=draw) for retry in range(8)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 15, 15, 15])


def test_jitter_is_full() -> None:
    assert SCHEDULE.delay(LOST, 4, now=0.0, draw=0.0) == 0.0
    assert SCHEDULE.delay(LOST, 4, now=0.0, draw=0.25) == 2.0


def test_the_server_is_never_asked_earlier_than_it_said() -> None:
    assert SCHEDULE.delay(LOST, 0, now=0.0, draw=0.0, minimum_s=30.0) == 30.0
    assert SCHEDULE.delay(LOST, 0, now=0.0, draw=0.5, minimum_s=30.0) == 30.25
    assert SCHEDULE.delay(LOST, 0, now=0.0, draw=0.0, minimum_s=-5.0) == 0.0


def test_a_server_that_says_after_the_deadline_is_given_up_at_once() -> None:
    assert SCHEDULE.delay(LOST, 0, now=0.0, draw=0.0, minimum_s=1000.0) is None


def test_nothing_is_retried_at_the_deadline() -> None:
    assert SCHEDULE.delay(LOST, 0, now=1000.0, draw=0.0) is None
    assert SCHEDULE.delay(LOST, 0, now=999.9, draw=0.0) == 0.0


@given(
    retry=st.integers(0, 10_000),
    now=st.floats(0, 2000),
    draw=st.floats(0, 1, exclude_max=True),
    minimum=st.floats(-10, 2000),
)
def test_no_wait_ends_after_the_deadline(retry: int, now: float, draw: float, minimum: float) -> None:
    wait = SCHEDULE.delay(LOST, retry, now, draw, minimum)
    assert wait is None or (max(0.0, minimum) <= wait <= max(0.0, minimum) + 15 and now + wait < 1000)
