"""Several stores that hold the same blobs, asked in order: the next one when one does not deliver.

What comes from any of them is authenticated like everything else, so that a mirror can only be late or lacking. Credentials,
configured or from the broker, are the first store's alone: mirrors are asked without. Waiting between attempts and the deadline
of all are `patient.py`'s.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from agent.artifact.sources import BlobSource, open_configured, open_source
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError
from agent.proxy import Proxy
from agent.store_credentials import StoreCredentials

BUDGET = 4
"""Failures of one store in a row, of all threads together, that may pass: what does not pass at all moves on at once."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LockedStore:
    """A store whose credentials the broker has. It becomes a `BlobSource` by them and not otherwise.

    Attributes:
        credentials_uri: where they are.
        unlock: opens it, as `open_mirrored` does.
    """

    credentials_uri: Ident
    unlock: Callable[[StoreCredentials], BlobSource]


def open_mirrored(
    config: ArtifactConfig, timeout_s: float, proxy: Proxy | None = None, released: StoreCredentials | None = None
) -> BlobSource:
    """The store of the measured configuration, and the mirrors behind it. Arguments and errors as of `open_configured`."""

    def mirror(location: str) -> Callable[[], BlobSource]:
        return lambda: open_source(location, config.ca_pem, timeout_s, proxy=proxy)

    def first() -> BlobSource:
        return open_configured(config, timeout_s, proxy, released)

    return Mirrors([first, *map(mirror, config.mirrors)]) if config.mirrors else first()


class Mirrors:
    """Reads like the stores it is given, opens them, and closes all.

    A store that has failed is left for good, unless every one has: then the first is asked again, for as long as there is
    time. An error that no store can make good is the first store's.
    """

    def __init__(self, openers: Sequence[Callable[[], BlobSource]]) -> None:
        """At least one. One that raises ArtifactUnavailableError is opened when it is asked; other errors go on."""
        self._openers = openers
        self._opened: list[BlobSource | None] = [None] * len(openers)
        self._lock = threading.Lock()
        self._current = 0
        self._failures = 0
        for at in range(len(openers)):
            with suppress(ArtifactUnavailableError):
                self._source(at)

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        return self._asked(lambda source: source.read_manifest(reference, max_bytes))

    def referrers(self, digest: str) -> tuple[str, ...]:
        return self._asked(lambda source: source.referrers(digest))

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._asked(lambda source: source.read_blob(digest, max_bytes))

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        return self._asked(lambda source: source.read_range(digest, offset, out))

    def close(self) -> None:
        for source in self._opened:
            if source is not None:
                source.close()

    def _asked(self, read: Callable[[BlobSource], _T]) -> _T:
        first: ArtifactUnavailableError | None = None
        begin = self._current
        for step in range(len(self._openers)):
            # Round all of them from there: which one is current changes with what other threads meet.
            at = (begin + step) % len(self._openers)
            try:
                answer = read(self._source(at))
                if self._failures:
                    with self._lock:
                        self._failures = 0
                return answer
            except ArtifactUnavailableError as error:
                self._leave(at, for_good=not error.retryable)
                if error.retryable:
                    raise
                first = first or error
        assert first is not None
        raise first

    def _source(self, at: int) -> BlobSource:
        with self._lock:
            source = self._opened[at]
            if source is None:
                source = self._opened[at] = self._openers[at]()
            return source

    def _leave(self, at: int, *, for_good: bool) -> None:
        with self._lock:
            if at != self._current:  # another thread has left it meanwhile
                return
            self._failures += 1
            if for_good or self._failures > BUDGET:
                self._current = (at + 1) % len(self._openers)
                self._failures = 0
