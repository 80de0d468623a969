"""One thread that waits: for descriptors, for signals, for moments.

Owns the selector, the timers and the way from a signal to a handler that runs like any other. What is waited for and why is
the supervisor's affair. Standard library only, because the supervisor imports it.
"""

import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

Handler = Callable[[], None]


class Loop:
    """Handlers run one after the other and may end the loop, or each other's watches and timers.

    Attributes:
        ended: set it from a handler: no other handler runs any more.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.ended = False
        self._timers: dict[str, tuple[float, Handler]] = {}
        self._signal_ends: tuple[socket.socket, socket.socket] | None = None  # kept open

    def run(self, after_each_turn: Handler) -> None:
        """Turn until the loop is ended."""
        while not self.ended:
            self._turn()
            after_each_turn()

    def end(self) -> None:
        """As a handler."""
        self.ended = True

    def watch(self, descriptor: int, handler: Handler) -> None:
        """Call `handler` whenever `descriptor` is readable."""
        self.selector.register(descriptor, selectors.EVENT_READ, handler)

    def unwatch(self, descriptor: int) -> None:
        """Before the descriptor is closed; once more does not matter."""
        with suppress(KeyError):
            self.selector.unregister(descriptor)

    def wake(self, name: str, after_s: float | None, handler: Handler) -> None:
        """Call `handler` once, `after_s` seconds from now (CLOCK_MONOTONIC). One timer a name; None takes it back."""
        self._timers.pop(name, None)
        if after_s is not None:
            self._timers[name] = (time.monotonic() + after_s, handler)

    def watch_signals(self, numbers: Iterable[int], handler: Callable[[int], None]) -> None:
        """From now on these signals do nothing but call `handler` in its turn; SIGCHLD only ends the wait."""
        reader, writer = self._signal_ends = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (*numbers, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

        def on_signals() -> None:
            for number in reader.recv(64):
                if number != signal.SIGCHLD:
                    handler(number)

        self.watch(reader.fileno(), on_signals)

    def _turn(self) -> None:
        first = min((at for at, _ in self._timers.values()), default=None)
        for key, _ in self.selector.select(None if first is None else max(0.0, first - time.monotonic())):
            if self.selector.get_map().get(key.fd) is key:  # an earlier handler of this turn may have taken it back
                key.data()
            if self.ended:
                return
        now = time.monotonic()
        for name, timer in sorted(self._timers.items(), key=lambda item: item[1][0]):
            if timer[0] <= now and self._timers.get(name) is timer:
                del self._timers[name]
                timer[1]()
            if self.ended:
                return
