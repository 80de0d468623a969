"""The watch process and what follows from its end; then whole boots whose GPU fails while they serve."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.channel import Channel
from agent.errors import AgentError, GpuFault, GpuFaultError
from agent.events import Message, message_to_record
from agent.gpu_watch import MAX_REPLACED, GpuWatch
from agent.loop import Loop
from tests.children import gone, in_child
from tests.world import World

FAULT = GpuFaultError(GpuFault.FATAL_XID, 79)


def told_by(
    inside: Callable[[Channel, str | None], int],
    events: int,
    begin: Callable[[], object] = lambda: None,
    at_event: Callable[[GpuWatch], object] = lambda _: None,
) -> list[str]:
    """What is told of the GPUs up to so many events; at last why the boot ended, if it did."""

    def scenario() -> list[str]:
        loop, told = Loop(), list[str]()

        def tell(message: Message) -> None:
            told.append(str(message_to_record(message)["event"]))
            loop.ended |= len(told) == events
            at_event(watch)

        def end(error: AgentError) -> None:
            told.append(type(error).__name__)
            loop.ended = True

        watch = GpuWatch(loop, inside, tell, end)
        begin()
        watch.begin("/machine")
        loop.run(lambda: None)
        watch.stop()
        if watch.worker:
            watch.worker.destroy()
            assert gone([watch.worker.pid])
        return told

    return in_child(scenario)


def test_what_it_tells_ends_the_boot() -> None:
    def inside(channel: Channel, machine: str | None) -> int:
        assert machine == "/machine"
        channel.send(message_to_record(FAULT))
        return 0

    assert told_by(inside, 1) == ["GpuFaultError"]


def test_a_watch_that_is_lost_is_told_and_replaced(tmp_path: Path) -> None:
    def inside(channel: Channel, _: str | None) -> int:
        try:
            (tmp_path / "began").touch(exist_ok=False)
        except FileExistsError:
            channel.send(message_to_record(FAULT))
            return 0
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert told_by(inside, 2) == ["gpu_watch_lost", "GpuFaultError"]


@pytest.mark.parametrize("end", [lambda: 0, lambda: 1 // 0], ids=["without a word", "by a bug"])
def test_a_watch_that_is_lost_again_and_again_ends_the_boot(end: Callable[[], int]) -> None:
    assert told_by(lambda *_: end(), 10) == [*["gpu_watch_lost"] * MAX_REPLACED, "WorkerLostError"]


def test_a_watch_that_cannot_be_forked_is_as_good_as_lost() -> None:
    def no_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))

    assert told_by(lambda *_: 0, 1, begin=no_descriptors) == ["gpu_watch_lost"]


def test_nothing_takes_the_place_of_a_watch_that_was_stopped() -> None:
    def stop(watch: GpuWatch) -> None:
        watch.stop()
        watch._loop.ended = False
        watch._loop.wake("later", 2, watch._loop.end)

    assert told_by(lambda *_: 0, 10, at_event=stop) == ["gpu_watch_lost"]


# --- whole boots ------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo)


def watches(pid: int) -> list[int]:
    """The children of the agent that are not the server, which has a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if os.getsid(int(child)) == os.getsid(pid)]


def test_the_watch_runs_as_long_as_the_server_and_no_longer(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    (watch,) = watches(agent.process.pid)
    began = time.monotonic()
    assert agent.stop().status == 0
    assert gone([watch])
    assert time.monotonic() - began < 10


def test_a_guest_without_gpus_has_no_watch(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        agent = World(tmp_path, silicon, undo, gpus=0).start()
        agent.wait_for("server_ready")
        assert watches(agent.process.pid) == []
        assert agent.stop().status == 0


def test_the_watch_dies_with_the_supervisor(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    (watch,) = watches(agent.process.pid)
    agent.process.kill()
    agent.process.wait()
    ended = time.monotonic() + 10
    while (state := state_of(watch)) not in ("Z", None) and time.monotonic() < ended:
        time.sleep(0.01)
    assert state in ("Z", None), "who adopted it may reap it later"


def state_of(pid: int) -> str | None:
    """Its letter in /proc/PID/stat; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
