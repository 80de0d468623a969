"""Blocking work that is never abandoned: threads beside an event loop, always joined, and signals that wait."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")

_cancelled: ContextVar[threading.Event | None] = ContextVar("cancelled", default=None)


async def in_thread(work: Callable[[], _T], on_cancel: Callable[[], None] = lambda: None) -> _T:
    """Run `work` in a thread and wait for its end, also when cancelled.

    A cancelled caller is told so only after the thread has ended: a device request that is abandoned half-way can cost the
    guest its attestation key, and memory must not be freed under a thread that writes into it.

    Args:
        work: what may block.
        on_cancel: called when the caller is cancelled; makes `work` end early, where that is allowed.
    """
    cancelled = threading.Event()

    def in_this_thread() -> _T:
        _cancelled.set(cancelled)  # in a context of the thread's own
        return work()

    running = asyncio.create_task(asyncio.to_thread(in_this_thread))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelled.set()
        on_cancel()
        while not running.done():
            with suppress(asyncio.CancelledError):  # cancelled again: the thread still has to end
                await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # retrieved, or asyncio would write it out
        raise


class Crew:
    """Threads that do one piece of work together: the first that fails stops the others."""

    def __init__(self, work: Callable[[], None], threads: int, stop: threading.Event, name: str) -> None:
        """`work` runs in each thread and ends early once `stop` is set."""
        self._work = work
        self._stop = stop
        self._threads = [threading.Thread(target=self._run, name=name) for _ in range(threads)]
        self.errors: list[BaseException] = []

    def start(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._stop.set()
            raise

    def join(self) -> None:
        """Return when every thread has ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def run(self) -> None:
        """Start, and wait for the end. Raises the first error of any thread; also when interrupted, none is left running."""
        try:
            self.start()
            self.join()
        finally:
            self._stop.set()
            self.join()
        if self.errors:
            raise self.errors[0]

    def _run(self) -> None:
        try:
            self._work()
        except CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001  told to whoever joins: a thread has nobody else to tell
            self.errors.append(error)
            self._stop.set()


def pause(seconds: float) -> bool:
    """Wait inside the work of `in_thread`, between two requests to a device.

    Returns:
        False, and at once, when its caller has been cancelled: then nothing new may begin.
    """
    cancelled = _cancelled.get()
    if cancelled is None:
        time.sleep(seconds)
        return True
    return not cancelled.wait(seconds)


@contextmanager
def signals_wait() -> Iterator[None]:
    """A device request that is abandoned half-way can cost the guest its attestation key: Ctrl-C acts when it has ended.

    For the main thread.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    # The mask is this thread's alone: what the kernel gives to another thread, a library's, would still act on this one.
    handlers = {number: signal.signal(number, lambda signum, _: came.append(signum)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum in came:
            signal.raise_signal(signum)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
