"""The one retry schedule: which errors, how long to wait, when to stop.

Only errors that call themselves `retryable` are retried; a denial never is. Waits grow exponentially with full jitter, so
that a fleet that lost its broker does not return in step (AWS Architecture Blog, "Exponential Backoff And Jitter").
Does not sleep, read a clock or draw randomness: time and draw are arguments.

>>> from agent.errors import BrokerUnreachableError, Unreachable
>>> schedule = RetrySchedule(deadline=100.0)
>>> error = BrokerUnreachableError(Unreachable.REFUSED)
>>> schedule.delay(error, 3, now=10.0, draw=0.5), schedule.delay(error, 3, now=99.0, draw=0.5)
(2.0, None)
"""

from dataclasses import dataclass

from agent.errors import AgentError


@dataclass(frozen=True, slots=True)
class RetrySchedule:
    """Attributes:
    deadline: when everything must have ended, on the caller's monotonic clock, in seconds.
    first_delay_s: the longest wait before the first retry; doubles with every further one.
    max_delay_s: the longest wait ever.
    """

    deadline: float
    first_delay_s: float = 0.5
    max_delay_s: float = 15.0

    def delay(self, error: AgentError, retry: int, now: float, draw: float, minimum_s: float = 0.0) -> float | None:
        """Seconds to wait before the next attempt, or None: give up with `error`.

        Args:
            error: how the last attempt ended.
            retry: 0 before the first retry, 1 before the second …
            now: the caller's monotonic clock, in seconds.
            draw: uniform in [0, 1), drawn by the caller.
            minimum_s: what the server asked for (RetryInfo); jitter comes on top. Beyond the deadline it means give up.
        """
        if not error.retryable:
            return None
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(retry, 32))
        wait = max(0.0, minimum_s) + draw * longest
        return wait if now + wait < self.deadline else None
