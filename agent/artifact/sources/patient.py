"""A store that is asked again while that can help, until a deadline or until nobody wants the answer any more."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TypeVar

from agent.artifact.sources import BlobSource
from agent.errors import AgentError, ArtifactUnavailableError, StoreProblem
from agent.http_limited import limited
from agent.retry import RetrySchedule

_T = TypeVar("_T")


class PatientSource:
    """Reads like the source it is given, and leaves closing it to its owner."""

    def __init__(self, source: BlobSource, timeout_s: float, stop: threading.Event) -> None:
        """Take `timeout_s` from now for everything that will be read; `stop` ends waiting and further reads at once.

        Every read raises CancelledError after `stop`, ArtifactUnavailableError after the deadline. A read over a network
        that is under way then ends within half a second.
        """
        self._source = source
        self._schedule = RetrySchedule(deadline=time.monotonic() + timeout_s)
        self._stop = stop

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        return self._retried(lambda: self._source.read_manifest(reference, max_bytes))

    def referrers(self, digest: str) -> tuple[str, ...]:
        return self._retried(lambda: self._source.referrers(digest))

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._retried(lambda: self._source.read_blob(digest, max_bytes))

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        return self._retried(lambda: self._source.read_range(digest, offset, out))

    def _retried(self, attempt: Callable[[], _T]) -> _T:
        retry = 0
        while not self._stop.is_set():
            if time.monotonic() >= self._schedule.deadline:
                raise ArtifactUnavailableError(StoreProblem.TIMEOUT)
            try:
                with limited(self._schedule.deadline, self._stop):
                    return attempt()
            except AgentError as error:
                wait = self._schedule.delay(error, retry, time.monotonic(), random.random())  # noqa: S311  jitter, no secret
                if wait is None:
                    raise
            self._stop.wait(wait)
            retry += 1
        raise CancelledError
