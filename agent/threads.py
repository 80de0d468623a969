"""Blocking work beside the worker's event loop: threads that are always joined."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T], on_cancel: Callable[[], None] = lambda: None) -> _T:
    """Run `work` in a thread and wait for its end, also when cancelled.

    A cancelled caller is told so only after the thread has ended: a device request that is abandoned half-way can cost the
    guest its attestation key, and memory must not be freed under a thread that writes into it.

    Args:
        work: what may block.
        on_cancel: called when the caller is cancelled; makes `work` end early, where that is allowed.
    """
    running = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        on_cancel()
        while not running.done():
            with suppress(asyncio.CancelledError):  # cancelled again: the thread still has to end
                await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # retrieved, or asyncio would write it out
        raise
