"""`with stage(Stage.LOAD):` — outcome and duration of a declared stage become events.

Owns timing and the bytes counter; who listens is the caller's affair. No stage is nested in itself.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent.events import Event, Progress, Stage, StageEnded, StageFailed, StageStarted

Notify = Callable[[Event], None]

PROGRESS_INTERVAL_S = 0.25


@dataclass(slots=True)
class StageRun:
    """A running stage. `count(done, total)` may be called from any thread."""

    name: Stage
    notify: Notify
    bytes: int | None = None
    _next_progress: float = 0.0

    def count(self, done_bytes: int, total_bytes: int) -> None:
        """Note progress; an event goes out at most four times a second."""
        self.bytes = done_bytes
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_INTERVAL_S
            self.notify(Progress(self.name, done_bytes, total_bytes))


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


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
