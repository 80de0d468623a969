"""Waiting for something to appear in this guest: a disk, a TEE's driver. The kernel says when to look again.

Owns the wait; what is looked for is the caller's. Listens to the kernel's own uevents: a guest image has no udevd, and a
monitor of udev's events would stay silent for ever.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from agent.threads import in_thread

_T = TypeVar("_T")


async def appears(
    look: Callable[[], _T | None], timeout_s: float, tell_waiting: Callable[[], None], every_s: float | None = None
) -> _T | None:
    """The first answer of `look` that is not None; None when there was none in time.

    Args:
        look: asked at once, and again after every uevent; in a thread, one call at a time.
        timeout_s: 0 looks once.
        tell_waiting: called once, when it is not there at once and the wait begins.
        every_s: for a process or a port, of which no uevent tells: look so often instead.
    """
    found = await in_thread(look)
    if found is not None or timeout_s <= 0:
        return found
    tell_waiting()
    if every_s is not None:
        return await _polled(look, timeout_s, every_s)
    import pyudev  # only who waits needs it

    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    monitor.start()  # before the next look, so that nothing is missed between them
    stirred = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_uevents() -> None:
        while monitor.poll(timeout=0) is not None:  # what they say does not matter
            pass
        stirred.set()

    loop.add_reader(monitor.fileno(), on_uevents)
    try:
        async with asyncio.timeout(timeout_s):
            while (found := await in_thread(look)) is None:
                await stirred.wait()
                stirred.clear()
    except TimeoutError:
        return None
    finally:
        loop.remove_reader(monitor.fileno())
    return found


async def _polled(look: Callable[[], _T | None], timeout_s: float, every_s: float) -> _T | None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while True:
                await asyncio.sleep(every_s)
                if (found := await in_thread(look)) is not None:
                    return found
    return None
