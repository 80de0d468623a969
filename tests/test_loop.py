import os
import signal
from collections.abc import Callable

from agent.loop import Loop
from tests.children import in_child


def nothing() -> None:
    pass


def ending(loop: Loop) -> Callable[[], None]:
    def end() -> None:
        loop.ended = True

    return end


def test_timers_descriptors_and_signals_are_handled_one_after_the_other() -> None:
    def scenario() -> list[str]:
        loop, seen = Loop(), list[str]()
        reader, writer = os.pipe()

        def on_timer() -> None:
            seen.append("timer")
            os.write(writer, b"x")

        def on_readable() -> None:
            seen.append("readable")
            loop.unwatch(reader)
            os.kill(os.getpid(), signal.SIGUSR1)

        def on_signal(number: int) -> None:
            seen.append(signal.Signals(number).name)
            os.kill(os.getpid(), signal.SIGCHLD)  # ends the wait, and is nobody's business
            loop.wake("end", 0.01, ending(loop))

        loop.watch_signals((signal.SIGUSR1,), on_signal)
        loop.watch(reader, on_readable)
        loop.wake("timer", 0.0, on_timer)
        loop.run(nothing)
        return seen

    assert in_child(scenario) == ["timer", "readable", "SIGUSR1"]


def test_a_timer_that_was_taken_back_or_set_again_does_not_fire() -> None:
    loop, seen = Loop(), list[str]()
    loop.wake("back", 0.0, lambda: seen.append("back"))
    loop.wake("back", None, nothing)
    loop.wake("again", 0.0, lambda: seen.append("first"))
    loop.wake("again", 0.0, lambda: seen.append("second"))
    loop.wake("end", 0.01, ending(loop))
    loop.run(nothing)
    assert seen == ["second"]
    loop.selector.close()


def test_what_was_taken_back_in_the_same_turn_is_not_called_and_nothing_runs_after_the_end() -> None:
    loop, called = Loop(), list[int]()
    pipes = [os.pipe() for _ in range(2)]

    def watcher(mine: int) -> Callable[[], None]:
        def on_readable() -> None:
            called.append(mine)
            for reader, _ in pipes:
                loop.unwatch(reader)
            loop.wake("end", 0.0, ending(loop))
            loop.wake("late", 0.0, lambda: called.append(-1))

        return on_readable

    for reader, writer in pipes:
        os.write(writer, b"x")
        loop.watch(reader, watcher(reader))
    loop.run(nothing)
    assert len(called) == 1
    assert called[0] > 0
    for pair in pipes:
        for descriptor in pair:
            os.close(descriptor)
    loop.selector.close()
