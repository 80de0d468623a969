"""What a boot looks like from outside: one object, four faces.

`BootReport.apply` takes messages in; `status()` is the status file and `/status`, `termination_message()` what Kubernetes
shows of a dead container (at most 4 KiB), `console_line()` one line for people, `health()` the answers of the health port.
All four are made from closed values. Pure: writing them anywhere is the supervisor's business. Standard library only.
"""

import enum
import json
from dataclasses import dataclass, field

from agent.closed import Ident
from agent.errors import AgentError, error_to_record
from agent.events import (
    BootStarted,
    GatePassed,
    LeaseRenewed,
    LeaseStarted,
    LocalChecksPassed,
    Message,
    Progress,
    Requested,
    ServerEnded,
    ServerReady,
    ServerStarted,
    Stage,
    StageEnded,
    StageFailed,
    StageStarted,
    Stopped,
    Stopping,
    VerdictAccepted,
    WaitingFor,
    WorkerEnded,
    message_to_record,
)

MAX_TERMINATION_BYTES = 4096
MAX_RECEIPT_BYTES = 512 << 10
"""One of an SNP guest has some 8 KiB, of a TD 8 to 70: its event log is in it."""
STATUS_SCHEMA = "keyturn.status/v1"


class Phase(enum.Enum):
    BOOTING = "booting"
    SERVING = "serving"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True)
class StageStatus:
    state: str
    ms: int | None = None
    bytes: int | None = None
    total_bytes: int | None = None


@dataclass(slots=True)
class BootReport:
    """The current truth about one boot."""

    version: str
    mode: str
    pid: int = 0
    started: int = 0  # with `pid` it names this process: field 22 of /proc/PID/stat
    phase: Phase = Phase.BOOTING
    locally_good: bool = False
    """Everything that can be looked at without a network was, and was as it should be."""
    stages: dict[Stage, StageStatus] = field(default_factory=dict)
    request_id: Ident | None = None
    policy_version: Ident | None = None
    simulated: bool | None = None
    lease_s: int | None = None
    lease_ends_at: Ident | None = None  # None as long as nothing is served under it
    lease_renewals: int = 0
    gate_preset: bool | None = None
    supervisor_kib: int | None = None
    worker_peak_kib: int | None = None
    server_pid: int | None = None
    server_starts: int = 0
    waiting_for: Ident | None = None
    error: AgentError | None = None
    failed_stage: Stage | None = None
    exit_status: int | None = None
    receipt: bytes | None = field(default=None, repr=False)

    def apply(self, message: Message) -> None:
        """Take one message in."""
        match message:
            case AgentError():
                self.error, self.phase = message, Phase.FAILED
            case BootStarted():
                self.phase = Phase.BOOTING
            case StageStarted(stage):
                self.stages[stage] = StageStatus("running")
            case LocalChecksPassed():
                self.locally_good = True
            case WaitingFor(what, _):
                self.waiting_for = what
            case WorkerEnded(peak_kib):
                self.worker_peak_kib = peak_kib
            case StageEnded(stage, ms, count):
                self.waiting_for = None
                self.stages[stage] = StageStatus("done", ms, count)
            case StageFailed(stage, ms):
                self.stages[stage] = StageStatus("failed", ms)
                self.failed_stage = self.failed_stage or stage
            case Progress(stage, done, total):
                self.stages[stage] = StageStatus("running", None, done, total)
            case Requested(request_id, _):
                self.request_id = request_id
            case VerdictAccepted(request_id, _, policy_version, simulated, lease_s):
                self.request_id, self.policy_version = request_id, policy_version
                self.simulated, self.lease_s = simulated, lease_s
            case LeaseStarted(lease_s, ends_at) | LeaseRenewed(lease_s, ends_at):
                self.lease_s, self.lease_ends_at = lease_s, ends_at
                self.lease_renewals += isinstance(message, LeaseRenewed)
            case GatePassed(preset=preset):
                self.gate_preset = preset
            case ServerStarted(pid, start):
                self.server_pid, self.server_starts = pid, start
            case ServerReady() if self.phase in (Phase.BOOTING, Phase.RESTARTING):
                self.phase = Phase.SERVING
            case ServerEnded():
                self.server_pid = None
                if self.phase is Phase.SERVING:
                    self.phase = Phase.RESTARTING
            case Stopping(_, waiting_for):
                self.waiting_for = waiting_for
                if self.phase is not Phase.FAILED:
                    self.phase = Phase.STOPPING
            case Stopped(exit_status):
                self.exit_status = exit_status
                if self.phase is not Phase.FAILED:
                    self.phase = Phase.STOPPED
            case _:
                pass

    def running(self) -> list[Stage]:
        """The stages that have begun and not ended."""
        return [stage for stage, seen in self.stages.items() if seen.state == "running"]

    def ending(self) -> bool:
        """Is this boot on its way out, or over?"""
        return self.phase in (Phase.STOPPING, Phase.STOPPED, Phase.FAILED)

    def status(self) -> dict[str, object]:
        """The status document: schema `keyturn.status/v1`."""
        return {
            "schema": STATUS_SCHEMA,
            "version": self.version,
            "mode": self.mode,
            "agent": {"pid": self.pid, "started": self.started},
            "phase": self.phase.value,
            "request_id": self.request_id,
            "policy_version": self.policy_version,
            "simulated": self.simulated,
            "lease": self.lease_s and {"s": self.lease_s, "ends_at": self.lease_ends_at, "renewals": self.lease_renewals},
            "gpu_ready_preset": self.gate_preset,
            "memory": {"supervisor_kib": self.supervisor_kib, "worker_peak_kib": self.worker_peak_kib},
            "server": {"pid": self.server_pid, "starts": self.server_starts},
            "waiting_for": self.waiting_for,
            "stages": [
                {"name": stage.value, "state": seen.state, "ms": seen.ms, "bytes": seen.bytes, "total_bytes": seen.total_bytes}
                for stage in Stage
                if (seen := self.stages.get(stage))
            ],
            "error": error_to_record(self.error) if self.error else None,
            "exit_status": self.exit_status,
        }

    def termination_message(self) -> str:
        """The last word, for people, at most 4 KiB: step, class, owner, request id, next step."""
        lines = []
        if self.error:
            where = f" in stage {self.failed_stage.value}" if self.failed_stage else ""
            lines += [
                f"keyturn: {type(self.error).__name__}{where}",
                self.error.what(),
                f"step: {self.error.step.value}",
                f"who must act: {self.error.owner.value}",
                f"next step: {self.error.next_step}",
                f"request id: {self.request_id or 'none'}",
                f"exit status: {self.error.exit_status}",
            ]
        else:
            lines += [f"keyturn: {self.phase.value}", f"request id: {self.request_id or 'none'}"]
        seen = [(stage, self.stages[stage]) for stage in Stage if stage in self.stages]
        done = [f"{stage.value} {status.state} {status.ms} ms" for stage, status in seen if status.ms is not None]
        lines.append("stages: " + (", ".join(done) or "none"))
        return "\n".join(lines)[: MAX_TERMINATION_BYTES - 1] + "\n"

    def last_line(self) -> str:
        """The end of a boot on one line, for a console: exit status, and of a failure class, step, owner and next step."""
        error = self.error
        if error is None:
            return f"end: exit status {self.exit_status or 0}, request id {self.request_id or 'none'}"
        return (
            f"end: exit status {error.exit_status}, {type(error).__name__}, step {error.step.value}, "
            f"who must act: {error.owner.value}, request id {self.request_id or 'none'}, next step: {error.next_step}"
        )

    def health(self, path: str) -> tuple[int, str | bytes]:
        """HTTP status and body for `/livez`, `/readyz`, `/status` and `/receipt`, which is bytes; anything else is 404."""
        if path == "/livez":
            return 200, "ok\n"
        if path == "/readyz":
            return (200, "ready\n") if self.phase is Phase.SERVING else (503, f"{self.phase.value}\n")
        if path == "/status":
            return 200, json.dumps(self.status()) + "\n"
        if path == "/receipt" and self.receipt is not None:
            return 200, self.receipt
        return 404, "not found\n"


def console_line(message: Message) -> str | None:
    """One line for people, without the `keyturn: ` in front; None for what people need not see."""
    match message:
        case AgentError():
            return f"error: {message}\nkeyturn: hint: {message.next_step}"
        case StageStarted() | Progress():
            return None
        case StageEnded(stage, ms, count):
            return f"{stage.value}: done in {ms} ms" + (f", {count / 1e6:.1f} MB" if count else "")
        case StageFailed(stage, ms):
            return f"{stage.value}: failed after {ms} ms"
        case ServerStarted(pid, start):
            return f"model server started (pid {pid}, start {start})"
        case ServerReady(ms, _):
            return f"model server ready after {ms} ms"
        case ServerEnded(status, signal, _):
            return f"model server ended (status {status}, signal {signal})"
        case LeaseRenewed(lease_s, ends_at):
            return "lease lifted" if lease_s is None else f"lease renewed: {lease_s} s, until {ends_at}"
        case WaitingFor(what, at_most_s):
            return f"waiting for {what}, at most {at_most_s} s"
        case _:
            record = message_to_record(message)
            fields = ", ".join(f"{key} {value}" for key, value in record.items() if key != "event")
            return str(record["event"]).replace("_", " ") + (f": {fields}" if fields else "")
