"""The last resort for exceptions that nobody caught: each becomes one closed event, and no traceback is ever written.

Owns the interpreter's four hooks. A traceback shows lines of code and the exception's text, which can hold what nobody may
see; the event has its class and the place. Does not end anything: whoever depends on what raised has a deadline of its own.
Standard library only, because the supervisor imports it; it therefore does not import asyncio or logging either.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent.errors import InternalError
from agent.events import ExceptionUnhandled, Hook

if TYPE_CHECKING:
    import asyncio

Tell = Callable[[ExceptionUnhandled], object]


def install(tell: Tell) -> None:
    """Take over what the interpreter would write to stderr.

    Args:
        tell: called in the thread that raised, between any two instructions when a finalizer did; what it raises is lost.
    """

    def in_main(kind: type[BaseException], error: BaseException, _: object) -> None:
        _told(tell, Hook.MAIN, kind, error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:  # how a thread may end: the interpreter is silent here too
            _told(tell, Hook.THREAD, args.exc_type, args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        _told(tell, Hook.UNRAISABLE, args.exc_type, args.exc_value)

    sys.excepthook = in_main
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def watch_loop(loop: "asyncio.AbstractEventLoop", tell: Tell) -> None:
    """The same for callbacks, and for tasks whose outcome nobody asks for."""

    def in_loop(_: object, context: dict[str, Any]) -> None:
        error = context.get("exception")  # without one it is a complaint of the loop's: free text, and so not told
        _told(tell, Hook.LOOP, type(error) if error else None, error)

    loop.set_exception_handler(in_loop)


def silence_libraries() -> None:
    """No record of any logger goes anywhere. For the worker: the supervisor does not import logging."""
    import logging

    logging.disable(sys.maxsize)  # above every level a library could invent
    logging.raiseExceptions = False  # a handler that fails would print a traceback by itself
    logging.lastResort = None


def _told(tell: Tell, hook: Hook, kind: type[BaseException] | None, error: BaseException | None) -> None:
    with suppress(Exception):  # a hook that raises is written to stderr with a traceback
        tell(ExceptionUnhandled(hook, InternalError.place_of(kind, error)))
