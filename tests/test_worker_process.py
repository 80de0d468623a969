"""A worker as a process of its own, forked from a child of the test: what is open in it, and how it goes."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from agent.channel import Channel, Packet
from agent.errors import WorkerLostError
from agent.loop import Loop
from agent.worker_process import WorkerProcess
from tests.children import gone, in_child


def story_of(
    inside: Callable[[Channel], int], at_first_word: Callable[[WorkerProcess], object] = lambda _: None
) -> list[object]:
    """What a worker said, and at last how it ended."""

    def scenario() -> list[object]:
        loop, heard = Loop(), list[object]()

        def on_packet(packet: Packet) -> None:
            if not heard:
                at_first_word(worker)
            heard.append(packet.record)

        def on_end(lost: WorkerLostError, peak_kib: int) -> None:
            assert peak_kib > 1000
            heard.append((lost.signal, lost.status))
            loop.ended = True

        worker = WorkerProcess(loop, inside, on_packet, on_end)
        loop.run(lambda: None)
        assert gone([worker.pid])
        return heard

    return in_child(scenario)


def test_everything_it_said_is_heard_before_its_end() -> None:
    def talk(channel: Channel) -> int:
        for number in range(100):
            channel.send({"n": number})
        return 7

    assert story_of(talk) == [*({"n": number} for number in range(100)), (0, 7)]


def test_nothing_is_open_in_it_but_its_channel_and_the_standard_descriptors() -> None:
    def list_open(channel: Channel) -> int:
        opened = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        channel.send({"open": len([number for number in opened if number > 2 and number != channel.fileno()])})
        return 0

    held = os.memfd_create("model")
    try:
        assert story_of(list_open)[0] == {"open": 1}  # the folder that it reads
    finally:
        os.close(held)


def test_a_worker_that_is_killed_is_told_from_one_that_failed() -> None:
    def die(_: Channel) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert story_of(die) == [(signal.SIGKILL, 0)]
    assert story_of(lambda _: 1 // 0) == [(0, 1)]


def test_only_sigterm_asks_it_to_stop() -> None:
    def wait(channel: Channel) -> int:
        channel.send({})
        time.sleep(60)
        return 0

    def ask(worker: WorkerProcess) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # what a terminal sends to all of its group
            os.kill(worker.pid, number)
        time.sleep(0.2)
        assert worker.is_alive()
        worker.ask_to_stop()

    assert story_of(wait, ask)[-1] == (signal.SIGTERM, 0)


@pytest.mark.parametrize(("late_s", "timeout_s", "takes_s"), [(0.0, 90, 0.0), (0.5, 90, 0.5), (60, 0.5, 0.5)])
def test_who_destroys_it_waits_for_it_as_long_as_a_device_request_may_take(
    late_s: float, timeout_s: float, takes_s: float
) -> None:
    def inside(channel: Channel) -> int:
        def finish(*_: object) -> None:
            time.sleep(late_s)
            os._exit(0)

        signal.signal(signal.SIGTERM, finish)
        channel.send({})
        time.sleep(60)
        return 0

    def scenario() -> tuple[float, bool]:
        loop = Loop()

        def on_packet(_: object) -> None:
            loop.ended = True

        worker = WorkerProcess(loop, inside, on_packet, lambda *_: None)
        loop.run(lambda: None)
        began = time.monotonic()
        worker.destroy(timeout_s)
        return time.monotonic() - began, gone([worker.pid])

    took_s, is_gone = in_child(scenario)
    assert is_gone
    assert takes_s <= took_s < takes_s + 30
