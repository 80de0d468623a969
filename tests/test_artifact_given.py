import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.artifact import given
from tests.children import in_child


@pytest.fixture
def folder() -> Iterator[int]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        yield descriptor
        os.close(descriptor)


def path_of(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}"))


def serve(folder: int) -> int:
    """What a living agent has there: its mark and an open model."""
    mark = given.acquire(folder)
    (path_of(folder) / given.PUBLISHED_NAME).mkdir()
    (path_of(folder) / given.PUBLISHED_NAME / "weights").write_bytes(b"plaintext")
    return mark


def test_what_is_released_is_gone(folder: int) -> None:
    mark = serve(folder)
    given.release(folder, mark)
    os.close(mark)
    assert os.listdir(folder) == []


def test_a_dead_agents_model_is_removed_by_whoever_comes_next(folder: int) -> None:
    in_child(lambda: serve(folder) and None)
    assert sorted(os.listdir(folder)) == [given.MARK_NAME, given.PUBLISHED_NAME]
    mark = given.acquire(folder)
    assert os.listdir(folder) == [given.MARK_NAME]
    os.close(mark)
    given.wipe(str(path_of(folder)))
    assert os.listdir(folder) == []


def spread(folder: int) -> int:
    """As KServe's servers look for a model."""
    mark = given.acquire(folder)
    model = path_of(folder) / given.MARK_NAME / given.PUBLISHED_NAME
    (model / "tokenizer").mkdir(parents=True)
    (model / "weights").write_bytes(b"plaintext")
    (model / "tokenizer" / "vocab").write_bytes(b"plaintext")
    (model / "link").symlink_to("/")
    given.spread(folder, mark)
    return mark


def test_a_spread_model_lies_in_the_folder_and_goes_with_everything_that_came_to_it(folder: int) -> None:
    mark = spread(folder)
    assert sorted(os.listdir(folder)) == [given.SPREAD_NAME, "link", "tokenizer", "weights"]
    assert (path_of(folder) / "tokenizer" / "vocab").read_bytes() == b"plaintext"
    assert given.strangers(folder) == set()
    (path_of(folder) / "cache").mkdir()
    given.release(folder, mark)
    os.close(mark)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("by", ["acquire", "wipe"])
def test_a_dead_agents_spread_model_is_removed_also_where_it_died_half_way(folder: int, half_way: bool, by: str) -> None:
    in_child(lambda: spread(folder) and None)
    path = path_of(folder)
    if half_way:
        model = path / given.MARK_NAME / given.PUBLISHED_NAME
        model.mkdir(parents=True)
        (path / "weights").rename(model / "weights")
    if by == "wipe":
        given.wipe(str(path))
        assert os.listdir(folder) == []
        return
    mark = given.acquire(folder)
    assert (os.listdir(folder), os.listdir(mark)) == ([given.MARK_NAME], [])
    os.close(mark)


def test_what_is_no_agents_is_told(folder: int) -> None:
    (path_of(folder) / "somebody").mkdir()
    assert given.strangers(folder) == {"somebody"}
    mark = serve(folder)
    assert given.strangers(folder) == {"somebody"}
    os.close(mark)


def test_a_living_agents_model_is_left_alone(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "_PAUSE_S", 0.0)
    mark = serve(folder)
    assert given.is_held(folder)
    given.wipe(str(path_of(folder)))
    with pytest.raises(BlockingIOError):
        given.acquire(folder)
    assert sorted(os.listdir(folder)) == [given.MARK_NAME, given.PUBLISHED_NAME]
    os.close(mark)
    assert not given.is_held(folder)


def test_what_has_no_mark_is_nobodys_of_ours(folder: int) -> None:
    (path_of(folder) / given.PUBLISHED_NAME).mkdir()
    given.wipe(str(path_of(folder)))
    assert os.listdir(folder) == [given.PUBLISHED_NAME]
    given.wipe(str(path_of(folder) / "absent"))


def test_of_many_that_start_at_once_one_serves_and_loses_nothing(folder: int) -> None:
    """The lock is held from the look to the end of the removal, or one would remove what another has just opened."""
    for _ in range(20):
        in_child(lambda: serve(folder) and None)
        winners: list[int] = []
        gate = threading.Barrier(8)

        def start(gate: threading.Barrier = gate, winners: list[int] = winners) -> None:
            gate.wait()
            try:
                mark = given.acquire(folder)
            except BlockingIOError:
                return
            winners.append(mark)
            (path_of(folder) / given.PUBLISHED_NAME).mkdir()

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert sorted(os.listdir(folder)) == [given.MARK_NAME, given.PUBLISHED_NAME]
        given.release(folder, winners[0])
        os.close(winners[0])
        assert os.listdir(folder) == []


def test_what_cannot_be_removed_is_an_error_and_keeps_its_mark(folder: int) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing keeps root from removing a file of its own")
    mark = serve(folder)
    model = path_of(folder) / given.PUBLISHED_NAME
    model.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            given.release(folder, mark)
        assert given.MARK_NAME in os.listdir(folder)
    finally:
        model.chmod(0o700)
        given.release(folder, mark)
        os.close(mark)
