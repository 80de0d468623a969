"""One worker as a process: fork, the channel to it, and its end.

Owns what a worker starts with, and the way it goes: it is asked, and killed only when it does not end by itself, because a
device request that is cut off can cost the guest its attestation key. What it says, and what follows from its end, is the
supervisor's affair. Standard library only, because the supervisor imports it.
"""

import os
import select
import signal
from collections.abc import Callable

from agent.channel import Channel, Packet
from agent.errors import WorkerLostError
from agent.guest import hardening
from agent.loop import Loop
from agent.server.process import fork

END_TIMEOUT_S = 90
"""For a worker that was asked to end: the longest device request, a throttled SNP report, takes 65 s."""


class WorkerProcess:
    """A forked worker, watched by a loop.

    Attributes:
        pid: our child until `on_end` is called or `destroy` returns.
    """

    def __init__(
        self,
        loop: Loop,
        inside: Callable[[Channel], int],
        on_packet: Callable[[Packet], None],
        on_end: Callable[[WorkerLostError, int], None],
    ) -> None:
        """Fork it.

        Args:
            loop: calls the handlers.
            inside: runs in the child and returns its exit status. Open there: its channel and descriptors 0, 1 and 2.
            on_packet: takes each thing it says, and what comes with it.
            on_end: it is gone, and so is all that it said. Gets the error of a worker that left no outcome, and the most
                memory it had resident, in KiB.
        """
        ours, theirs = Channel.pair()

        def become_worker(parent: int) -> None:
            status = 1
            try:
                # A terminal sends these to the whole group: only the supervisor decides, or a device request would be cut off.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                ours.close()
                # The model's memory is freed when the supervisor lets go of it, whoever else is still there.
                hardening.close_descriptors_except({0, 1, 2, theirs.fileno()})
                hardening.die_with_parent(parent)
                status = inside(theirs)
            finally:
                os._exit(status)

        self.pid = fork(become_worker)
        theirs.close()
        self._loop = loop
        self._on_packet = on_packet
        self._on_end = on_end
        self._channel: Channel | None = ours
        self._pidfd = os.pidfd_open(self.pid)
        loop.watch(ours.fileno(), self._receive)
        loop.watch(self._pidfd, self._end)

    def is_alive(self) -> bool:
        return not self._ends_within(0)

    def ask_to_stop(self) -> None:
        """It ends everything but a device request at once."""
        os.kill(self.pid, signal.SIGTERM)

    def destroy(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """Outside the loop: ask it to stop, wait so long for its end, then kill it. What it says meanwhile is not heard."""
        self.ask_to_stop()
        if not self._ends_within(timeout_s):
            os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def _receive(self) -> None:
        """Take everything it has said so far."""
        while self._channel:
            try:
                packet = self._channel.receive()
            except BlockingIOError:
                return
            if packet is None:
                self._close_channel()
            else:
                self._on_packet(packet)

    def _end(self) -> None:
        self._receive()  # a last word may still be in the pipe
        self._on_end(*self._reap())

    def _reap(self) -> tuple[WorkerLostError, int]:
        self._close_channel()
        self._loop.unwatch(self._pidfd)
        _, ended, used = os.wait4(self.pid, 0)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(ended)
        return WorkerLostError(signal=max(-code, 0), status=max(code, 0)), used.ru_maxrss

    def _close_channel(self) -> None:
        if self._channel:
            self._loop.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _ends_within(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
