"""What every wire shares: attempts within one deadline, and a collection that nobody abandons."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agent.closed import Ident
from agent.errors import AgentError, BrokerUnreachableError, DenialReason, KeyReleaseDeniedError, Unreachable
from agent.evidence import CompositeEvidence, Evidence, Nonce, RuntimeData, Tee
from agent.handshake.broker import collected, retried
from agent.handshake.machine import Collected, Expired, NeedEvidence
from agent.retry import RetrySchedule

EVIDENCE = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184), "")
NEED = NeedEvidence(RuntimeData(Nonce(bytes(32)), bytes(32), bytes(32)), 1)
DENIED = KeyReleaseDeniedError(DenialReason.POLICY, Ident("key-uri"), None, Ident("1"))


class Line:
    """A wire that fails as it is told and says what became of it."""

    def __init__(self, *outcomes: AgentError | type[Exception]) -> None:
        self.outcomes = list(outcomes)
        self.attempts = 0
        self.disconnected = 0
        self.waits: list[float] = []

    async def attempt(self) -> str:
        self.attempts += 1
        if not self.outcomes:
            return "done"
        raise self.outcomes.pop(0)

    async def translate(self, _: ConnectionError) -> tuple[AgentError, float]:
        return BrokerUnreachableError(Unreachable.RESET), 0.125

    async def disconnect(self) -> None:
        self.disconnected += 1

    def on_retry(self, _: AgentError, __: int, wait_s: float) -> None:
        self.waits.append(wait_s)

    def run(self, timeout_s: float = 5, addresses: int = 1, attempt: Callable[[], Awaitable[str]] | None = None) -> str:
        async def run() -> str:
            schedule = RetrySchedule(asyncio.get_running_loop().time() + timeout_s, first_delay_s=0.01)
            act = attempt or self.attempt
            return await retried(schedule, act, ConnectionError, self.translate, self.disconnect, self.on_retry, addresses)

        return asyncio.run(run())


def test_a_retryable_failure_is_tried_again_and_a_denial_is_not() -> None:
    line = Line(BrokerUnreachableError(Unreachable.REFUSED), DENIED)
    with pytest.raises(KeyReleaseDeniedError):
        line.run()
    assert (line.attempts, line.disconnected, len(line.waits)) == (2, 2, 1)


def test_what_the_broker_asked_to_wait_is_waited_and_foreign_exceptions_do_not_travel() -> None:
    line = Line(ConnectionError)
    assert line.run() == "done"
    assert 0.125 <= line.waits[0] < 0.14
    line = Line(ConnectionError)
    with pytest.raises(BrokerUnreachableError) as raised:
        line.run(timeout_s=0.1)
    assert raised.value.__context__ is None
    assert raised.value.__cause__ is None


def test_other_addresses_are_tried_at_once() -> None:
    line = Line(*(BrokerUnreachableError(Unreachable.REFUSED) for _ in range(5)))
    assert line.run(addresses=3) == "done"
    assert [wait == 0 for wait in line.waits] == [True, True, False, True, True]


def test_the_deadline_cuts_an_attempt_short_and_an_earlier_reason_says_more() -> None:
    async def silent() -> str:
        await asyncio.Event().wait()
        return "never"

    with pytest.raises(BrokerUnreachableError) as raised:
        Line().run(timeout_s=0.05, attempt=silent)
    assert (raised.value.reason, raised.value.attempts) == (Unreachable.TIMEOUT, 1)

    attempts = 0

    async def refused_then_silent() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise BrokerUnreachableError(Unreachable.REFUSED)
        return await silent()

    with pytest.raises(BrokerUnreachableError) as raised:
        Line().run(timeout_s=0.1, attempt=refused_then_silent)
    assert (raised.value.reason, raised.value.attempts) == (Unreachable.REFUSED, 2)


def test_a_cancelled_collection_ends_before_its_caller_hears_of_it() -> None:
    ended = False

    async def slow(_: RuntimeData) -> CompositeEvidence:
        nonlocal ended
        await asyncio.sleep(0.05)
        ended = True
        return EVIDENCE

    async def run() -> None:
        task = asyncio.create_task(collected(slow, NEED))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert ended


def test_evidence_that_took_longer_than_the_challenge_lives_is_not_sent() -> None:
    async def at_once(_: RuntimeData) -> CompositeEvidence:
        return EVIDENCE

    async def late(_: RuntimeData) -> CompositeEvidence:
        await asyncio.sleep(1.01)
        return EVIDENCE

    assert asyncio.run(collected(at_once, NEED)) == Collected(EVIDENCE)
    assert asyncio.run(collected(late, NEED)) == Expired()
