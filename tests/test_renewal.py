"""Leases that are renewed, denied, lost and over: first with workers that say what a test wants, then as whole boots."""

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from agent.channel import Channel
from agent.closed import Ident
from agent.errors import AgentError, BrokerUnreachableError, DenialReason, KeyReleaseDeniedError, Unreachable
from agent.events import Message, Requested, VerdictAccepted, message_to_record
from agent.evidence import Tee
from agent.lease import Lease
from agent.loop import Loop
from agent.renewal import Renewal
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import nvml_calls
from tests.children import gone, in_child
from tests.world import Agent, World, ask

DENIED = KeyReleaseDeniedError(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("7"))
UNREACHABLE = BrokerUnreachableError(Unreachable.REFUSED)


def accepted(lease_s: int | None) -> VerdictAccepted:
    return VerdictAccepted(Ident("r2"), Ident("kbs:///a/b/c"), Ident("7"), True, lease_s)


def saying(*messages: Message) -> Callable[[Channel], int]:
    """A worker that says this and ends."""

    def inside(channel: Channel) -> int:
        for message in messages:
            channel.send(message_to_record(message))
        return 0

    return inside


def told_by(
    inside: Callable[[Channel], int], last: str, passed_s: float = 60, begin: Callable[[], object] = lambda: None
) -> list[str]:
    """What is told of a lease of 100 s of which so much has passed, up to the event `last`; at last why it ended, if it did."""

    def scenario() -> list[str]:
        loop, told = Loop(), list[str]()

        def tell(message: Message) -> None:
            record = message_to_record(message)
            told.append(str(record["event"]))
            loop.ended |= told[-1] == last

        def end(error: AgentError) -> None:
            told.append(type(error).__name__)
            loop.ended = True

        renewal = Renewal(loop, inside, tell, end)
        begin()
        renewal.obey(Lease(100, time.clock_gettime(time.CLOCK_BOOTTIME) - passed_s))
        loop.run(lambda: None)
        renewal.stop()
        if renewal.worker:
            renewal.worker.destroy()
        return told

    return in_child(scenario)


def test_a_verdict_is_a_new_lease() -> None:
    events = ["lease_started", "lease_renewal_started", "requested", "verdict_accepted", "lease_renewed"]
    assert told_by(saying(Requested(Ident("r2"), 1), accepted(100)), "lease_renewed") == events


def test_nothing_is_asked_before_half_of_it() -> None:
    assert told_by(saying(accepted(100)), "lease_renewal_started", passed_s=48.5) == ["lease_started", "lease_renewal_started"]


def test_a_lease_that_is_over_asks_nobody() -> None:
    assert told_by(saying(accepted(100)), "lease_renewed", passed_s=100) == ["lease_started", "LeaseEndedError"]


def test_a_lease_that_ends_during_an_attempt_waits_for_nobody() -> None:
    def hang(_: Channel) -> int:
        time.sleep(60)
        return 0

    began = time.monotonic()
    assert told_by(hang, "", passed_s=97) == ["lease_started", "lease_renewal_started", "LeaseEndedError"]
    assert time.monotonic() - began < 30


def test_a_denial_is_told_once_by_whoever_ends_everything() -> None:
    assert told_by(saying(DENIED), "") == ["lease_started", "lease_renewal_started", "KeyReleaseDeniedError"]


@pytest.mark.parametrize("first", [(), (UNREACHABLE,)], ids=["lost", "unreachable"])
def test_silence_is_asked_again(first: tuple[Message, ...], tmp_path: Path) -> None:
    def inside(channel: Channel) -> int:
        try:
            (tmp_path / "asked").touch(exist_ok=False)
        except FileExistsError:
            return saying(accepted(100))(channel)
        return saying(*first)(channel)

    attempts = ["lease_renewal_started", "lease_renewal_failed", "lease_renewal_started"]
    assert told_by(inside, "lease_renewed") == ["lease_started", *attempts, "verdict_accepted", "lease_renewed"]


def test_a_worker_that_cannot_be_forked_is_as_good_as_lost() -> None:
    def no_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))  # those that are open stay so

    told = told_by(saying(accepted(100)), "lease_renewal_failed", begin=no_descriptors)
    assert told == ["lease_started", "lease_renewal_failed"]


# --- whole boots ------------------------------------------------------------------------------------------------------

ATTESTED = ("attest", "allowed", None)
RELEASED = ("release", "allowed", None)
REVOKED = ("attest", "denied", "policy.revoked")


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo)


def status_of(agent: Agent) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(agent.status_file.read_text())
    return status


def worker_of(agent: Agent) -> int:
    """The child that is not the server nor, because it came first, the watch over the GPUs; while there is no probe."""
    server = status_of(agent)["server"]["pid"]
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    _, worker = sorted({int(child) for child in children} - {server})
    return worker


def test_a_lease_is_renewed_while_the_server_serves_without_another_key(world: World) -> None:
    world.row["lease_s"] = 10
    agent = world.start()
    agent.wait_for("server_ready")
    before = status_of(agent)
    for _ in range(2):
        agent.wait_for("lease_renewed")
    after = status_of(agent)
    assert ask(world.port, "/about")["model"]
    outcome = agent.stop()

    assert outcome.status == 0
    audit = world.audit()
    assert audit.count(RELEASED) == 1
    assert audit[:2] == [ATTESTED, RELEASED] and set(audit[2:]) == {ATTESTED} and len(audit) >= 4
    assert (after["phase"], after["stages"]) == ("serving", before["stages"])
    assert after["memory"]["worker_peak_kib"] == before["memory"]["worker_peak_kib"]
    assert (before["lease"]["s"], after["lease"]["s"], after["lease"]["renewals"] - before["lease"]["renewals"]) == (10, 10, 2)
    assert after["lease"]["ends_at"] > before["lease"]["ends_at"]
    assert after["request_id"] != before["request_id"]
    assert outcome.names().count("server_started") == 1
    assert outcome.names().count("worker_ended") == 1
    assert nvml_calls(world.machine).count("nvmlSystemSetConfComputeGpusReadyState") == 1
    assert SimulatedMachine.load(world.machine.directory).gpu.ready == 1


def test_a_guest_whose_image_sets_the_ready_state_renews_all_the_same(world: World) -> None:
    world.row["lease_s"] = 10
    world.machine.gpu.ready, world.gpu["ready_state"], world.row_gpu["ready"] = 1, "preset", True
    agent = world.start()
    agent.wait_for("lease_renewed")
    assert agent.stop().status in (0, 21)  # 21: it was renewed before the server was ready


def test_a_guest_in_protected_pcie_renews_with_its_switches_and_a_lost_one_stops_it(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=8, switches=4)
        world.row["lease_s"] = 10
        agent = world.start()
        agent.wait_for("server_ready")
        agent.wait_for("lease_renewed")
        world.machine.reread()
        world.machine.gpu.switches = 3
        world.machine.save()
        outcome = agent.wait()
        assert (outcome.status, outcome.failure["class"]) == (13, "GpuCountError")
        assert outcome.failure["fields"] == {"expected": 4, "got": 3, "device": "NVSwitch"}


def test_a_guest_without_gpus_renews_on_cpu_evidence_alone(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0)
        del world.row["manifest_digests"]
        world.row["lease_s"] = 10
        agent = world.start()
        agent.wait_for("lease_renewed")
        assert agent.stop().status in (0, 21)


def test_a_td_whose_register_was_extended_renews_with_the_log_that_explains_it(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0, tee=Tee.TDX)
        del world.row["manifest_digests"]
        world.row["lease_s"], world.row_tdx["event_log"] = 10, "required"
        agent = world.start()
        assert agent.wait_for("release_measured")["rtmr_3"]
        agent.wait_for("lease_renewed")
        assert agent.stop().status in (0, 21)
        names = [event["event"] for event in agent.events]
        assert names.count("release_measured") == 1, "a renewal releases nothing"


def test_a_row_that_lists_the_register_as_it_was_before_the_release_renews_nothing(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0, tee=Tee.TDX)
        del world.row["manifest_digests"]
        world.row["lease_s"], world.row_tdx["rtmr_3"] = 10, [{"id": "nothing-yet", "value": "00" * 48}]
        outcome = world.boot()
        assert (outcome.failure["class"], outcome.failure["fields"]["claim"]) == ("KeyReleaseDeniedError", "tdx.rtmr_3")
        assert world.audit()[:2] == [ATTESTED, RELEASED]


def test_a_verdict_without_a_lease_lifts_it(world: World) -> None:
    world.row["lease_s"] = 10
    agent = world.start()
    agent.wait_for("lease_started")
    del world.row["lease_s"]
    world.reload_policy()
    while agent.wait_for("lease_renewed")["lease_s"] is not None:
        pass  # this one was under way when the policy changed
    assert status_of(agent)["lease"] is None
    assert agent.stop().status == 0


def test_a_denial_stops_everything_though_half_of_the_lease_is_left(world: World) -> None:
    world.row["lease_s"] = 16
    agent = world.start()
    lease = agent.wait_for("lease_started")
    agent.wait_for("server_ready")
    world.row["revoked"] = True
    world.reload_policy()
    outcome = agent.wait()

    assert (outcome.failure["class"], outcome.status) == ("KeyReleaseDeniedError", 16)
    assert outcome.failure["at"] < lease["ends_at"]
    assert outcome.names()[-3:] == ["server_ended", "wiped", "stopped"]
    assert (world.audit()[-1], world.audit().count(REVOKED)) == (REVOKED, 1), "a denial is not asked again"
    request_id = [event["request_id"] for event in outcome.events if event["event"] == "requested"][-1]
    for part in ("KeyReleaseDeniedError", "step: verdict", "authority", f"request id: {request_id}", "policy.revoked"):
        assert part in outcome.termination


def test_a_floor_that_was_raised_above_the_served_version_stops_it(world: World) -> None:
    world.row["lease_s"] = 12
    agent = world.start()
    agent.wait_for("server_ready")
    world.row["min_model_version"] = 4  # served is 3
    world.reload_policy()
    outcome = agent.wait()
    assert (outcome.failure["class"], outcome.status) == ("RollbackError", 19)
    assert outcome.failure["fields"] == {"version": 3, "floor": 4}


def test_a_gpu_that_is_not_ready_any_more_stops_it(world: World) -> None:
    world.row["lease_s"] = 12
    agent = world.start()
    agent.wait_for("server_ready")
    machine = SimulatedMachine.load(world.machine.directory)
    machine.gpu.ready = 0
    machine.save()
    outcome = agent.wait()
    assert (outcome.failure["class"], outcome.status) == ("GpuFaultError", 13)


def test_a_broker_that_cannot_be_reached_is_asked_until_the_lease_ends(world: World) -> None:
    world.row["lease_s"] = 10
    agent = world.start()
    started = agent.wait_for("lease_started")
    world.kill_broker()
    agent.wait_for("retrying")
    outcome = agent.wait()
    assert (outcome.failure["class"], outcome.status) == ("LeaseEndedError", 22)
    assert "server_ended" in outcome.names()
    assert outcome.failure["at"][:19] >= started["ends_at"][:19], "not before the lease ended"
    assert outcome.names().count("lease_renewed") == 0


def test_a_renewal_whose_worker_is_killed_is_tried_again(world: World) -> None:
    world.row["lease_s"] = 12
    agent = world.start()
    agent.wait_for("server_ready")
    world.broker_process.send_signal(signal.SIGSTOP)  # so that the worker waits for it
    agent.wait_for("lease_renewal_started")
    os.kill(worker_of(agent), signal.SIGKILL)
    world.broker_process.send_signal(signal.SIGCONT)
    failed = agent.wait_for("lease_renewal_failed")
    assert (failed["error"], failed["retry_in_ms"]) == ("WorkerLostError", 2000)
    agent.wait_for("lease_renewed")
    assert agent.stop().status == 0


def test_stopping_during_a_renewal_is_no_failure_and_leaves_nobody(world: World) -> None:
    world.row["lease_s"] = 16
    agent = world.start()
    agent.wait_for("server_ready")
    server = status_of(agent)["server"]["pid"]
    world.kill_broker()
    agent.wait_for("retrying")
    worker = worker_of(agent)
    outcome = agent.stop()
    assert outcome.status == 0
    assert outcome.names()[-2:] == ["wiped", "stopped"]
    assert gone([worker, server])


def test_a_lease_is_renewed_while_the_server_is_starting(world: World) -> None:
    world.row["lease_s"] = 10
    world.set_behaviour("never-ready")
    agent = world.start()
    agent.wait_for("server_started")
    agent.wait_for("lease_renewed")
    outcome = agent.stop()
    assert (outcome.failure["class"], outcome.status) == ("BootInterruptedError", 21)


def test_the_end_of_a_lease_waits_for_no_worker_but_the_end_of_the_agent_does(world: World) -> None:
    world.row["lease_s"] = 10
    agent = world.start()
    agent.wait_for("server_ready")
    world.kill_broker()
    agent.wait_for("retrying")
    worker = worker_of(agent)
    os.kill(worker, signal.SIGSTOP)  # as if it were inside a device request
    assert agent.wait_for("failed")["class"] == "LeaseEndedError"
    agent.wait_for("server_ended")
    stopping = agent.wait_for("stopping")
    assert (stopping["signal"], stopping["waiting_for"]) == (0, "worker")
    os.kill(worker, signal.SIGCONT)
    outcome = agent.wait()
    assert outcome.status == 22
    assert outcome.names()[-2:] == ["wiped", "stopped"]
    assert gone([worker])


def test_the_death_of_the_supervisor_ends_a_renewal(world: World) -> None:
    world.row["lease_s"] = 12
    agent = world.start()
    agent.wait_for("server_ready")
    world.kill_broker()
    agent.wait_for("retrying")
    worker = os.pidfd_open(worker_of(agent))
    try:
        agent.process.kill()
        assert select.select([worker], [], [], 5)[0]
    finally:
        os.close(worker)


def test_a_lease_is_renewed_for_what_is_served_wherever_the_tag_points_by_then(tmp_path: Path, silicon: Path) -> None:
    """The row knows the served version alone: evidence about a newer release would be denied."""
    with ExitStack() as undo:
        key = ed25519.Ed25519PrivateKey.generate()
        world = World(tmp_path, silicon, undo, signing_key=key)
        world.row["lease_s"] = 10
        agent = world.start()
        agent.wait_for("server_ready")
        world.seal(4, key)
        index = world.layout / "index.json"
        index.write_text(index.read_text().replace('"tiny-v3"', '"tiny-v2"').replace('"tiny-v4"', '"tiny-v3"'))
        agent.wait_for("lease_renewed")
        agent.wait_for("lease_renewed")
        assert agent.stop().status == 0
