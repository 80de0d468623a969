"""`with stage(Stage.LOAD):` — outcome and duration of a declared stage become events.

Owns timing and the bytes counter; who listens is the caller's affair. No stage is nested in itself.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agent.events import Event, Progress, Stage, StageEnded, StageFailed, StageStarted

Notify = Callable[[Event], None]

PROGRESS_INTERVAL_S = 0.25
RATE_S = 10.0
"""Over so many seconds a rate is taken: long enough to be steady, short enough to show that a store has become slow."""


@dataclass(slots=True)
class StageRun:
    """A running stage. `count(done, total)` may be called from any thread."""

    name: Stage
    notify: Notify
    bytes: int | None = None
    clock: Callable[[], float] = time.monotonic
    _next_progress: float = 0.0
    _told: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, done_bytes: int, total_bytes: int) -> None:
        """Note progress; an event goes out at most four times a second."""
        self.bytes = done_bytes
        now = self.clock()
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_INTERVAL_S
            self.notify(Progress(self.name, done_bytes, total_bytes, *self._rate(now, done_bytes, total_bytes)))

    def _rate(self, now: float, done_bytes: int, total_bytes: int) -> tuple[int | None, int | None]:
        """Bytes a second, and the seconds that are left at this rate."""
        while self._told and self._told[0][0] < now - RATE_S:
            self._told.popleft()
        self._told.append((now, done_bytes))
        began, before = self._told[0]
        if now == began:
            return None, None
        rate = (done_bytes - before) / (now - began)
        return round(rate), math.ceil((total_bytes - done_bytes) / rate) if rate else None


@contextmanager
def stage(name: Stage, notify: Notify) -> Iterator[StageRun]:
    """Run the body as stage `name`: StageStarted, then StageEnded or, on any exception, StageFailed."""
    run = StageRun(name, notify)
    began = time.monotonic()
    notify(StageStarted(name))
    try:
        yield run
    except BaseException:
        notify(StageFailed(name, _ms_since(began)))
        raise
    notify(StageEnded(name, _ms_since(began), run.bytes))


class Durations:
    """A `Notify` that keeps how long each stage took that has ended, and tells another one everything."""

    def __init__(self, notify: Notify) -> None:
        self.ms: dict[Stage, int] = {}
        self._notify = notify

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageEnded):
            self.ms[event.stage] = event.ms
        self._notify(event)


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
