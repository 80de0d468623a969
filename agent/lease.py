"""How long the key may be used, when to ask for longer, and when to stop: a pure state machine.

A lease comes with the Verdict and is counted from before the request for it. At its end everything is asked to stop, whatever
is under way, and a server that goes on is killed after its `stop_timeout_s`. From half of the lease on it is renewed: a new
attestation, which ends in a new lease, in none (the key may be used without end), or in an error. An authority that was not
reached, and a worker that was lost, may answer another attempt; any other error is an answer, and everything is asked to stop
at once. A denial is never asked again. No attempt begins within 2 s of the end of the worker before: each asks the CPU's
firmware for a report, and hosts throttle guests that ask too often.

Owns these rules. Starts nothing, reads no clock: `now` is CLOCK_BOOTTIME in seconds, which goes on while the guest sleeps.
Every event is answered by one action; `Wait` is answered by `Look` when its time is over.

>>> policy = RenewalPolicy(Lease(60, since=100.0), 105.0)
>>> policy.decide(Look(), 110.0), policy.decide(Look(), 130.0), policy.decide(Renewed(3600), 131.5)
(Wait(seconds=1.0), Renew(), Wait(seconds=1.0))
>>> policy.lease
Lease(seconds=3600, since=130.0)
"""

import enum
import math
from dataclasses import dataclass

from agent.errors import AgentError, LeaseEndedError, Step, WorkerLostError

LOOK_S = 1.0
"""No wait is longer: a timer stands still while the guest sleeps, and the lease does not."""
FIRST_BACKOFF_S = 2.0
"""Also the least distance between two workers."""
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Lease:
    """`seconds` from `since`, which is on CLOCK_BOOTTIME."""

    seconds: int
    since: float

    def __post_init__(self) -> None:
        if self.seconds < 1 or not math.isfinite(self.since):
            raise ValueError("lease")  # no moment would be at or after its end

    @property
    def ends_at(self) -> float:
        return self.since + self.seconds


@dataclass(frozen=True, slots=True)
class Look:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The authority gave so many seconds, counted from the `Renew` before; None: the key may be used without end."""

    lease_s: int | None


@dataclass(frozen=True, slots=True)
class RenewalFailed:
    """The attempt that `Renew` began ended with `error`."""

    error: AgentError


Event = Look | Renewed | RenewalFailed


@dataclass(frozen=True, slots=True)
class Renew:
    """Begin an attempt now, then ask again with Look."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until the next event, or Look after `seconds` (None: no need of one)."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class End:
    """Stop everything now and end with `error`."""

    error: AgentError


Action = Renew | Wait | End


class State(enum.Enum):
    """What is done about the lease."""

    HELD = "held"
    RENEWING = "renewing"
    LIFTED = "lifted"
    ENDED = "ended"  # sticky


class RenewalPolicy:
    """The lease of one key. See the module docstring.

    Attributes:
        lease: what is obeyed; the last one once it is lifted or over.
        next_attempt: when the next attempt begins, on the same clock; None while one is under way, and when there is no more.
    """

    def __init__(self, lease: Lease, now: float) -> None:
        """A worker that ended `now` at the latest brought the lease."""
        self.state = State.HELD
        self.next_attempt: float | None = None
        self._asked_at = 0.0
        self._end = End(LeaseEndedError(lease.seconds))
        self._hold(lease, now)

    def decide(self, event: Event, now: float) -> Action:
        """What to do about `event`.

        Raises:
            RuntimeError: an outcome without an attempt; a bug of the caller.
        """
        match self.state, event:
            case State.ENDED, _:
                return self._end
            case State.RENEWING, RenewalFailed(error) if not may_be_tried_again(error):
                return self._finish(error)
            case State.LIFTED, Look():
                return Wait(None)
            case ((State.HELD | State.RENEWING), _) if now >= self.lease.ends_at:
                return self._finish(LeaseEndedError(self.lease.seconds))
            case State.HELD, Look() if self.next_attempt is not None and now >= self.next_attempt:
                self.state, self.next_attempt = State.RENEWING, None
                self._asked_at = now
                return Renew()
            case ((State.HELD | State.RENEWING), Look()):
                return self._wait(now)
            case State.RENEWING, Renewed(None):
                self.state = State.LIFTED
                return Wait(None)
            case State.RENEWING, Renewed(int(seconds)):
                self._hold(Lease(seconds, self._asked_at), now)
                return self.decide(Look(), now)
            case State.RENEWING, RenewalFailed():
                return self._back_off(now)
        raise RuntimeError(f"{type(event).__name__} while {self.state.value}")

    def _hold(self, lease: Lease, now: float) -> None:
        self.lease = lease
        self.state = State.HELD
        self._plan(max(lease.since + lease.seconds / 2, now + FIRST_BACKOFF_S))
        self._failures = 0

    def _back_off(self, now: float) -> Wait:
        again = now + min(FIRST_BACKOFF_S * 2.0 ** min(self._failures, 32), MAX_BACKOFF_S)
        self._failures += 1
        self.state = State.HELD
        self._plan(again)
        return self._wait(now)

    def _plan(self, moment: float) -> None:
        self.next_attempt = moment if moment < self.lease.ends_at else None

    def _wait(self, now: float) -> Wait:
        next_moment = self.lease.ends_at if self.next_attempt is None else self.next_attempt
        return Wait(min(LOOK_S, next_moment - now))

    def _finish(self, error: AgentError) -> End:
        self.state, self.next_attempt = State.ENDED, None
        self._end = End(error)
        return self._end


def may_be_tried_again(error: AgentError) -> bool:
    """Did this attempt end without an answer of the authority?

    So does one that met somebody else: whoever can stand between guest and authority can cut them off as well, and a broker's
    certificate that has expired is no decision about this guest.
    """
    return error.step is Step.BROKER or isinstance(error, WorkerLostError)
