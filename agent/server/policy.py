"""When to start the model server, when to wait, and when to give up: a pure state machine.

Owns readiness deadline, back-off and restart limit. Starts nothing, reads no clock: `now` is any clock in seconds that
never goes back. Every event is answered by one action; `Wait` is answered by `Tick` when its time is over.

A server that ends before it was ever ready is a wrong command or a wrong model: starting it again would hide that. One
that was ready has crashed: it is started again, later each time, at most `max_restarts` times in a window.

>>> policy = RestartPolicy(ready_timeout_s=60, max_restarts=2, restart_window_s=600)
>>> policy.decide(Begin(), 0.0), policy.decide(Tick(), 0.0), policy.decide(Ready(), 7.5)
(Start(), Wait(seconds=60.0), Wait(seconds=None))
>>> policy.decide(Exited(status=0, signal=11), 100.0), policy.decide(Tick(), 101.0)
(Wait(seconds=1.0), Start())
"""

import enum
from dataclasses import dataclass

from agent.errors import AgentError, ServerExitedError, ServerNotReadyError, Unready

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Begin:
    """The model is in place."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class NotReady:
    """The probe's latest reason."""

    reason: Unready


@dataclass(frozen=True, slots=True)
class Ready:
    """The probe got every answer."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The server ended by itself; one of the numbers is 0."""

    status: int
    signal: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody entitled asked for the end."""


Event = Begin | Tick | NotReady | Ready | Exited | StopRequested


@dataclass(frozen=True, slots=True)
class Start:
    """Start the server and its probe now, then ask again with Tick."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until the next event, or Tick after `seconds` (None: no need of one)."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the server, and that was it."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop the server and end with `error`."""

    error: AgentError


Action = Start | Wait | Stop | GiveUp


class State(enum.Enum):
    """Where the server is, as far as we know."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing-off"
    ENDED = "ended"  # stopped or given up: sticky


class RestartPolicy:
    """The life of one model server. See the module docstring."""

    def __init__(self, *, ready_timeout_s: float, max_restarts: int, restart_window_s: float) -> None:
        self.state = State.IDLE
        self.starts = 0
        self._ready_timeout_s = ready_timeout_s
        self._max_restarts = max_restarts
        self._restart_window_s = restart_window_s
        self._ever_ready = False
        self._reason = Unready.NO_ANSWER
        self._started_at = 0.0
        self._start_again_at = 0.0
        self._restarts: list[float] = []  # when each restart of the current window was decided
        self._end: Stop | GiveUp = Stop()

    @property
    def served(self) -> bool:
        """Has the server ever been ready?"""
        return self._ever_ready

    def decide(self, event: Event, now: float) -> Action:
        """What to do about `event`.

        Raises:
            RuntimeError: the event cannot happen in this state; a bug of the caller.
        """
        match self.state, event:
            case State.ENDED, _:
                return self._end
            case _, StopRequested():
                return self._finish(Stop())
            case State.IDLE, Begin():
                return self._start(now)
            case State.STARTING, Tick() if now - self._started_at >= self._ready_timeout_s:
                return self._finish(GiveUp(ServerNotReadyError(self._reason, int(now - self._started_at))))
            case State.STARTING, Tick():
                return self._wait_until(self._started_at + self._ready_timeout_s, now)
            case State.STARTING, NotReady(reason):
                self._reason = reason
                return self._wait_until(self._started_at + self._ready_timeout_s, now)
            case State.STARTING, Ready():
                self.state, self._ever_ready = State.READY, True
                return Wait(None)
            case State.READY, Tick():
                return Wait(None)
            case ((State.STARTING | State.READY), Exited(status, signal)):
                return self._after_exit(ServerExitedError(status, signal, self.starts), now)
            case State.BACKING_OFF, Tick() if now >= self._start_again_at:
                return self._start(now)
            case State.BACKING_OFF, Tick():
                return self._wait_until(self._start_again_at, now)
        raise RuntimeError(f"{type(event).__name__} while {self.state.value}")

    def _start(self, now: float) -> Start:
        self.state = State.STARTING
        self.starts += 1
        self._started_at = now
        self._reason = Unready.NO_ANSWER
        return Start()

    def _after_exit(self, error: ServerExitedError, now: float) -> Action:
        self._restarts = [at for at in self._restarts if now - at < self._restart_window_s]
        if not self._ever_ready or len(self._restarts) >= self._max_restarts:
            return self._finish(GiveUp(error))
        delay = min(FIRST_BACKOFF_S * 2 ** len(self._restarts), MAX_BACKOFF_S)
        self._restarts.append(now)
        self.state = State.BACKING_OFF
        self._start_again_at = now + delay
        return Wait(delay)

    def _finish(self, end: Stop | GiveUp) -> Action:
        self.state, self._end = State.ENDED, end
        return end

    @staticmethod
    def _wait_until(then: float, now: float) -> Wait:
        return Wait(max(0.0, then - now))
