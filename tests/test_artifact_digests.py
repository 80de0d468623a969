"""Digests of files whose segments come in any order, from many threads."""

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from agent.artifact.digests import FileDigests
from agent.artifact.manifest import SealedFile
from agent.artifact.memory import SealedMemfd
from agent.artifact.stream import HEADER_BYTES, SEGMENT_BYTES, TAG_BYTES

BIG = os.urandom((40 << 20) + 123)
EXACT = os.urandom(SEGMENT_BYTES - TAG_BYTES - HEADER_BYTES)


def written(content: bytes) -> tuple[SealedFile, SealedMemfd]:
    file = SealedFile("w", len(content), "sha256:" + "0" * 64, 1, bytes(HEADER_BYTES))
    destination = SealedMemfd(None)
    destination.create("w", len(content))
    with destination.window("w", 0, len(content)) as window:
        window.copy_in(0, memoryview(content))
    return file, destination


@pytest.mark.parametrize("content", [b"", b"x", EXACT, EXACT + b"x", BIG], ids=["empty", "x", "exact", "more", "big"])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_a_digest_is_that_of_the_file_whatever_the_order(content: bytes, order: str) -> None:
    file, destination = written(content)
    segments = list(range(file.layout.segments))
    if order == "backward":
        segments.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(segments)
    digests = FileDigests([file], destination)
    for segment in segments:
        digests.opened(0, segment)
    assert digests.finish() == {"w": hashlib.sha256(content).digest()}
    destination.close()


def test_many_threads_come_to_the_same_digest() -> None:
    file, destination = written(BIG)
    for _ in range(5):
        digests = FileDigests([file], destination)
        left = iter(random.sample(range(file.layout.segments), file.layout.segments))
        lock = threading.Lock()

        def work(digests: FileDigests = digests, lock: threading.Lock = lock, left: "object" = left) -> None:
            while True:
                with lock:
                    segment = next(left, None)  # type: ignore[call-overload]
                if segment is None:
                    return
                digests.opened(0, segment)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert digests.finish() == {"w": hashlib.sha256(BIG).digest()}
    destination.close()


def test_a_segment_that_was_left_out_is_our_own_mistake(tmp_path: Path) -> None:
    file, destination = written(BIG)
    digests = FileDigests([file], destination)
    digests.opened(0, 1)
    with pytest.raises(RuntimeError):
        digests.finish()
    destination.close()
