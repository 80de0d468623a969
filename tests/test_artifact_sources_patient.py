import threading
from concurrent.futures import CancelledError

import pytest

from agent.artifact.sources.patient import PatientSource
from agent.errors import ArtifactUnavailableError, StoreProblem

UNREACHABLE = ArtifactUnavailableError(StoreProblem.UNREACHABLE)


class Store:
    """Fails as told, then answers; sets `stop` on the way when it has one."""

    def __init__(self, *errors: ArtifactUnavailableError, stop: threading.Event | None = None) -> None:
        self.errors = list(errors)
        self.stop = stop
        self.asked = 0

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        return self.read_blob(reference, max_bytes)

    def referrers(self, digest: str) -> tuple[str, ...]:
        return (self.read_blob(digest, 100).decode(),)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        self.asked += 1
        if self.stop is not None:
            self.stop.set()
        if self.errors:
            raise self.errors.pop(0)
        return digest.encode()[:max_bytes]

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        out[:1] = self.read_blob(digest, 100)[offset : offset + 1]
        return 1

    def close(self) -> None:
        pass


def patient(store: Store, timeout_s: float = 30) -> PatientSource:
    return PatientSource(store, timeout_s, store.stop or threading.Event())


def test_what_can_get_better_is_asked_again() -> None:
    store = Store(UNREACHABLE)
    assert patient(store).read_blob("digest", 3) == b"dig"
    assert store.asked == 2
    out = bytearray(1)
    assert patient(Store(UNREACHABLE)).read_range("digest", 2, memoryview(out)) == 1
    assert out == b"g"


def test_what_cannot_get_better_is_not_asked_again() -> None:
    store = Store(ArtifactUnavailableError(StoreProblem.NOT_FOUND))
    with pytest.raises(ArtifactUnavailableError) as caught:
        patient(store).read_blob("digest", 3)
    assert caught.value.problem is StoreProblem.NOT_FOUND
    assert store.asked == 1


def test_the_last_error_is_told_when_the_next_attempt_would_miss_the_deadline() -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        patient(Store(*[UNREACHABLE] * 100), timeout_s=1).read_blob("digest", 3)
    assert caught.value is UNREACHABLE


def test_nothing_is_read_after_the_deadline() -> None:
    store = Store()
    with pytest.raises(ArtifactUnavailableError) as caught:
        patient(store, timeout_s=0).read_blob("digest", 3)
    assert caught.value.problem is StoreProblem.TIMEOUT
    assert store.asked == 0


def test_a_stop_ends_waiting_for_the_next_attempt_and_every_read_after_it() -> None:
    store = Store(*[UNREACHABLE] * 100, stop=threading.Event())
    source = patient(store)
    for _ in range(2):
        with pytest.raises(CancelledError):
            source.read_blob("digest", 3)
    assert store.asked == 1
