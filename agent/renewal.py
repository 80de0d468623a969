"""The lease of the key under which a model is served: its clock, and one worker after the other to renew it.

Owns the watch over the clock, the attempt that is under way and what is told of both. When to try, again or no more, is
`lease.py`'s; what a worker does is `worker.py`'s; stopping the server is the supervisor's. Standard library only, because the
supervisor imports it.
"""

import time
from collections.abc import Callable

from agent.channel import Channel, Packet
from agent.closed import Ident
from agent.errors import AgentError, WorkerLostError
from agent.events import (
    LeaseRenewalFailed,
    LeaseRenewalStarted,
    LeaseRenewed,
    LeaseStarted,
    Message,
    VerdictAccepted,
    message_from_record,
)
from agent.lease import Action, End, Lease, Look, Renew, RenewalFailed, RenewalPolicy, Renewed, Wait
from agent.loop import Loop
from agent.worker_process import WorkerProcess


class Renewal:
    """One lease and what comes after it.

    Attributes:
        worker: the attempt under way, if there is one.
    """

    def __init__(
        self,
        loop: Loop,
        inside_worker: Callable[[Channel], int],
        tell: Callable[[Message], None],
        on_end: Callable[[AgentError], None],
    ) -> None:
        """Nothing is obeyed before `obey`.

        Args:
            loop: calls us.
            inside_worker: one attempt; as of `WorkerProcess`.
            tell: takes every event.
            on_end: the key may not be used any more, and why.
        """
        self.worker: WorkerProcess | None = None
        self._loop = loop
        self._inside_worker = inside_worker
        self._tell = tell
        self._on_end = on_end
        self._policy: RenewalPolicy | None = None
        self._outcome: VerdictAccepted | AgentError | None = None

    def obey(self, lease: Lease) -> None:
        """From now on. Calls `on_end` before it returns when the lease is over."""
        self._policy = RenewalPolicy(lease, _now())
        self._tell(LeaseStarted(lease.seconds, _utc_of(lease.ends_at)))
        self._look()

    def stop(self) -> None:
        """Everything ends: no other attempt, and one that is under way is asked to end. May be called again."""
        self._policy = None
        self._loop.wake("lease", None, self._look)
        if self.worker:
            self.worker.ask_to_stop()

    def _look(self) -> None:
        assert self._policy
        self._do(self._policy.decide(Look(), _now()))

    def _do(self, action: Action) -> None:
        match action:
            case Wait(seconds):
                self._loop.wake("lease", seconds, self._look)
            case Renew():
                self._begin()
            case End(error):
                self._on_end(error)

    def _begin(self) -> None:
        self._outcome = None
        try:
            self.worker = WorkerProcess(self._loop, self._inside_worker, self._on_packet, self._on_worker_end)
        except OSError:  # no memory for another process at the moment: as good as lost
            self._on_worker_end(WorkerLostError(signal=0, status=0), 0)
        else:
            self._tell(LeaseRenewalStarted())
            self._look()

    def _on_packet(self, packet: Packet) -> None:
        message = message_from_record(packet.record)
        if isinstance(message, VerdictAccepted | AgentError):
            self._outcome = message
        else:
            self._tell(message)

    def _on_worker_end(self, lost: WorkerLostError, _: int) -> None:
        self.worker = None
        policy, now = self._policy, _now()
        if policy is None:
            return
        match self._outcome or lost:
            case VerdictAccepted(lease_s=seconds) as accepted:
                action = policy.decide(Renewed(seconds), now)
                if not isinstance(action, End):
                    self._tell(accepted)
                    self._tell(LeaseRenewed(seconds, _utc_of(policy.lease.ends_at) if seconds else None))
            case error:
                action = policy.decide(RenewalFailed(error), now)
                if not isinstance(action, End):
                    again = policy.next_attempt
                    retry_in_ms = None if again is None else round((again - now) * 1000)
                    self._tell(LeaseRenewalFailed(Ident(type(error).__name__), retry_in_ms))
        self._do(action)


def _now() -> float:
    """On the clock of leases: it goes on while the guest sleeps, and nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _utc_of(moment: float) -> Ident:
    """A moment of that clock as UTC, by the guest's clock of the day."""
    return Ident(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + moment - _now())))
