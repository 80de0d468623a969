"""A row of the fault table, and what running it means.

A row says what is wrong, and what must come of it. Most rows drive the real broker and the real agent as processes of their
own (`tests/world.py`); a row with `drive` runs the pure core, or one client of ours against a real hostile peer, in this
process. Nothing of the product is replaced.
"""

import enum
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from agent.closed import to_record
from agent.errors import EXIT_STATUS, AgentError, Step
from tests.faults.canaries import CONFIG_SECRET, Canaries
from tests.faults.watch import Before, Watcher
from tests.world import MODEL_BYTES, Agent, Outcome, World, free_port

Audit = tuple[str, str, str | None]
ATTESTED: Audit = ("attest", "allowed", None)
GIVEN: Audit = ("credentials", "allowed", None)
RELEASED: Audit = ("release", "allowed", None)
SERVED = [ATTESTED, RELEASED]

WRITTEN = frozenset({"status/status.json", "status/receipt.cbor", "termination", "audit.jsonl"})
"""What a boot is meant to leave in the world's folder."""


class Attempts(enum.Enum):
    """How often the broker was asked for a verdict."""

    NEVER = "never"
    ONCE = "once"
    AGAIN = "twice or more"
    EITHER = "at most once"  # the fault lies beside a handshake that may or may not have begun


class FaultWorld(World):
    """A world full of canaries."""

    def __init__(
        self,
        folder: Path,
        silicon: Path,
        undo: ExitStack,
        *,
        gpus: int = 1,
        switches: int = 0,
        files: int = 1,
        model_bytes: int = MODEL_BYTES,
    ) -> None:
        self.canaries = Canaries()
        super().__init__(
            folder,
            silicon,
            undo,
            gpus=gpus,
            switches=switches,
            files=files,
            given=self.canaries.model(model_bytes),
            key=self.canaries.key,
            stem=self.canaries.file_name,
        )
        self.server["environment"] = {CONFIG_SECRET: self.canaries.config_secret, "CANARY_OUTPUT": self.canaries.server_output}
        self.cwd = folder / "cwd"  # where a core file would be
        self.cwd.mkdir()
        self.health_port = free_port()


def wait(_: FaultWorld, agent: Agent) -> Outcome:
    """Most faults end the boot by themselves."""
    return agent.wait()


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        arrange: breaks the world before the boot.
        error: what the boot must end with; its owner and exit status are facts of the class, frozen by a test.
        fields: what the error must say besides: field names to values.
        audit: every audit line of the broker; None where the guest fails beside a handshake under way.
        attempts: how often the broker was asked.
        during: what happens while the agent runs; returns its outcome.
        broker: whether there is one.
        flags: more of `keyturn run`.
        gpus, switches: configured GPUs and NVSwitches.
        files: of the model.
        needs_root: only root can arrange it.
        may_stay: files that this fault is meant to leave, beside `WRITTEN`.
        while_serving: it comes when the model is served.
        drive: instead of a boot: what must raise `error` in this process, or return the last line that tells it.
    """

    name: str
    error: type[AgentError]
    arrange: Callable[[FaultWorld], object] = lambda _: None
    fields: Mapping[str, object] = field(default_factory=dict)
    audit: list[Audit] | None = None
    attempts: Attempts = Attempts.EITHER
    during: Callable[[FaultWorld, Agent], Outcome] = wait
    broker: bool = True
    flags: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()
    initdata: str | None = None
    gpus: int = 1
    switches: int = 0
    files: int = 1
    may_stay: frozenset[str] = frozenset()
    needs_root: bool = False
    while_serving: bool = False
    drive: Callable[[FaultWorld], object] | None = None


@dataclass(frozen=True)
class Finding:
    """What a row came to, for the report."""

    group: str
    name: str
    error: str
    owner: str
    exit_status: int
    residue: list[str]
    leaks: list[str]


def run(fault: Fault, group: str, folder: Path, silicon: Path) -> Finding:
    """Run one row and assert all that it says but `residue` and `leaks`, which the caller does: both belong in the report."""
    with ExitStack() as undo:
        world = FaultWorld(folder, silicon, undo, gpus=fault.gpus, switches=fault.switches, files=fault.files)
        residue, leaks = _drive(fault, world) if fault.drive else _boot(fault, world)
    cls = fault.error
    return Finding(group, fault.name, cls.__name__, cls.owner.value, EXIT_STATUS[cls.owner, cls.step], residue, sorted(leaks))


def _drive(fault: Fault, world: FaultWorld) -> tuple[list[str], set[str]]:
    assert fault.drive
    fault.arrange(world)
    before = Before(world.folder)
    try:
        text = fault.drive(world)
    except AgentError as error:
        _check_record(fault, {"class": type(error).__name__, "fields": to_record(error)})
        text = f"{error!r} {error} {error.args}"
    else:
        assert isinstance(text, str), "nothing was raised and nothing was told"
        cls = fault.error
        for part in (cls.__name__, f"step {cls.step.value}", f"who must act: {cls.owner.value}", f"next step: {cls.next_step}"):
            assert part in text, text
    leaks = {f"{kind} in the error's text" for kind in world.canaries.found_in(text.encode())}
    residue = before.residue(fault.may_stay, in_process=True)
    return residue, leaks | before.leaks(world.canaries)


def _boot(fault: Fault, world: FaultWorld) -> tuple[list[str], set[str]]:
    fault.arrange(world)
    config = world.prepare(fault.initdata)
    if fault.broker:
        world.start_broker()
    before = Before(world.folder)
    flags = ("--health", f"127.0.0.1:{world.health_port}", *fault.flags)
    agent = world.start_agent(config, flags=flags, wrapper=fault.wrapper, initdata=fault.initdata)
    watcher = Watcher(agent.process.pid, agent.status_file, world.health_port, world.canaries)
    watcher.start()
    try:
        outcome = fault.during(world, agent)
    finally:
        watcher.stop()

    assert watcher.samples > 0
    _check_record(fault, outcome.failure)
    assert outcome.status == EXIT_STATUS[fault.error.owner, fault.error.step], outcome.failure
    _check_end(fault, outcome)
    _check_attempts(fault, outcome)
    _check_audit(fault, world, outcome)

    residue = before.residue(WRITTEN | fault.may_stay, in_process=False)
    leaks = watcher.leaks | before.leaks(world.canaries)
    for where, text in (("stderr", json.dumps(outcome.events)), ("termination message", outcome.termination)):
        leaks |= {f"{kind} in {where}" for kind in world.canaries.found_in(text.encode())}
    return residue, leaks


def _check_record(fault: Fault, record: Mapping[str, object]) -> None:
    assert record["class"] == fault.error.__name__, record
    fields = record["fields"]
    assert isinstance(fields, dict)
    expected = {name: value.value if isinstance(value, enum.Enum) else value for name, value in fault.fields.items()}
    assert {name: fields[name] for name in expected} == expected, record


def _check_end(fault: Fault, outcome: Outcome) -> None:
    """One failure, one last word, and a reader who sees only the termination message knows who must act."""
    names = outcome.names()
    assert names.count("failed") == 1
    assert names[-1] == "stopped", names
    assert "wiped" in names[-3:], names  # a boot that is asked to stop while its server starts fails when that has ended
    if fault.while_serving:
        assert "server_ready" in names
        assert "server_ended" in names
    elif fault.error.step not in (Step.SERVER, Step.LEASE, Step.AGENT):
        assert "server_started" not in names, "a model that no one may open was served"
    failure = outcome.failure
    assert (failure["owner"], failure["step"]) == (fault.error.owner.value, fault.error.step.value)
    request_id = next((event["request_id"] for event in reversed(outcome.events) if event["event"] == "requested"), "none")
    for line in (
        f"keyturn: {fault.error.__name__}",
        f"step: {failure['step']}",
        f"who must act: {failure['owner']}",
        f"next step: {failure['next_step']}",
        f"request id: {request_id}",
        f"exit status: {outcome.status}",
    ):
        assert line in outcome.termination, outcome.termination


def _check_attempts(fault: Fault, outcome: Outcome) -> None:
    asked = outcome.names().count("requested")
    expected = {
        Attempts.NEVER: asked == 0,
        Attempts.ONCE: asked == 1,
        Attempts.AGAIN: asked >= 2,
        Attempts.EITHER: asked <= 1,
    }
    assert expected[fault.attempts], f"the broker was asked {asked} times"


def _check_audit(fault: Fault, world: FaultWorld, outcome: Outcome) -> None:
    audit = world.audit()
    if fault.audit is not None:
        assert audit == fault.audit
    else:
        assert RELEASED not in audit or "server_started" not in outcome.names()
