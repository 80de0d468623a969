"""The process that watches the GPUs while the server serves, and what follows from its end.

Owns one watch after the other: the first that tells something ends the boot. A watch that is lost, usually killed for memory,
is told and replaced, because the next one sees what it would have seen; but a guest in which it is lost again and again serves
unwatched for too long, and stops. What a watch looks at is `evidence/gpu_watch.py`'s. Standard library only, because the
supervisor imports it.
"""

import time
from collections.abc import Callable

from agent.channel import Channel, Packet
from agent.errors import AgentError, WorkerLostError
from agent.events import GpuWatchLost, Message, message_from_record
from agent.loop import Loop
from agent.worker_process import WorkerProcess

MAX_REPLACED = 3
WINDOW_S = 600
"""So many watches may be lost within this time; one more ends the boot."""
REPLACED_AFTER_S = 1

WatchMain = Callable[[Channel, str | None], int]
"""Runs in the forked watch and returns its exit status; gets the folder of the simulated machine, None for real GPUs."""


class GpuWatch:
    """Nothing is watched before `begin`.

    Attributes:
        worker: the watch that runs, if there is one.
    """

    def __init__(
        self, loop: Loop, inside: WatchMain, tell: Callable[[Message], None], on_end: Callable[[AgentError], None]
    ) -> None:
        """Args: loop: calls us; inside: one watch; tell: takes every event; on_end: the GPUs may not be used, and why."""
        self.worker: WorkerProcess | None = None
        self._loop = loop
        self._inside = inside
        self._tell = tell
        self._on_end = on_end
        self._machine: str | None = None
        self._watching = False
        self._lost_at: list[float] = []

    def begin(self, simulated_machine: str | None) -> None:
        """From now on."""
        self._machine, self._watching = simulated_machine, True
        self._start()

    def stop(self) -> None:
        """Everything ends: what runs is asked to end, and nothing takes its place. May be called again."""
        self._watching = False
        self._loop.wake("gpu-watch", None, self._start)
        if self.worker:
            self.worker.ask_to_stop()

    def destroy(self) -> None:
        """Outside the loop: wait for the end of what runs."""
        if self.worker:
            self.worker.destroy()

    def _start(self) -> None:
        try:
            self.worker = WorkerProcess(self._loop, self._watch, self._on_packet, self._on_worker_end)
        except OSError:  # no memory for another process at the moment: as good as lost
            self._on_worker_end(WorkerLostError(signal=0, status=0), 0)

    def _watch(self, channel: Channel) -> int:
        return self._inside(channel, self._machine)

    def _on_packet(self, packet: Packet) -> None:
        message = message_from_record(packet.record)
        if self._watching and isinstance(message, AgentError):
            self.stop()
            self._on_end(message)

    def _on_worker_end(self, lost: WorkerLostError, _: int) -> None:
        self.worker = None
        if not self._watching:
            return
        now = time.monotonic()
        self._lost_at = [at for at in self._lost_at if now - at < WINDOW_S] + [now]
        # refusal: test_a_watch_that_is_lost_again_and_again_ends_the_boot
        if len(self._lost_at) > MAX_REPLACED:
            self.stop()
            self._on_end(lost)
        else:
            self._tell(GpuWatchLost(lost.status, lost.signal))
            self._loop.wake("gpu-watch", REPLACED_AFTER_S, self._start)
