"""Blocking work beside the worker's event loop: threads that are always joined."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run `work` in a thread and wait for its end, also when cancelled.

    A cancelled caller is told so only after the thread has ended: a device request that is abandoned half-way can cost the
    guest its attestation key, and memory must not be freed under a thread that writes into it.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            await _until_done(running)
        if not running.cancelled():
            running.exception()  # taken note of: what the thread raised no longer matters
        raise


async def _until_done(running: "asyncio.Future[_T]") -> None:
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        return  # cancelled again: the thread still has to end
