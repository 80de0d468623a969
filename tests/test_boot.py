"""The whole boot on simulated silicon: what must work, and the end of its processes. How it fails: `tests/faults`.

Every test runs the real broker and the real agent as processes of their own.
"""

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from agent.artifact.given import RECEIPT_NAME
from agent.artifact.push import push_layout
from agent.artifact.signature import public_pem
from agent.artifact.sources.oci import Repository
from agent.cli import main
from agent.evidence import NO_REPORT_DATA, Tee
from agent.evidence.ccel import parse_event_log, parse_runtime_event, replay
from agent.publish import RUN_DIRECTORY
from agent.server.presets import command_digest
from agent.sim.api_server_rest import serve
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_td_report
from tests import bucket
from tests.faults.artifact import kserve_model, weights
from tests.range_server import Fault, RangeServer
from tests.registry import LOGIN, SECRET, USER, DockerRegistry
from tests.world import CREDENTIALS_URI, KEY_URI, Agent, Outcome, World, ask, ask_until, free_port


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo)


Audit = tuple[str, str, str | None]
ATTESTED: Audit = ("attest", "allowed", None)
RELEASED: Audit = ("release", "allowed", None)


def served_bytes(world: World) -> str:
    return str(ask(world.port, "/about")["sha256"])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Dead, or dead and not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


# --- what must work ---------------------------------------------------------------------------------------------------


def test_a_boot_serves_exactly_the_sealed_weights_and_leaves_nothing(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    status = json.loads(agent.status_file.read_text())
    served = served_bytes(world)
    server = status["server"]["pid"]
    outcome = agent.stop()

    assert served == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert (status["phase"], status["simulated"]) == ("serving", True)
    assert all(stage["state"] == "done" for stage in status["stages"])
    assert outcome.status == 0
    assert outcome.names()[-3:] == ["server_ended", "wiped", "stopped"]
    opened = next(event for event in outcome.events if event["event"] == "attester_opened")
    assert (opened["tee"], opened["interface"]) == ("snp", "simulated-snp")
    assert world.audit() == [ATTESTED, RELEASED]
    assert gone(server)
    assert str(world.folder) not in Path("/proc/self/mountinfo").read_text()


def test_a_container_boots_through_the_guests_own_components(world: World) -> None:
    components = world.through_coco()
    agent = world.start()
    agent.wait_for("server_ready")
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    outcome = agent.stop()
    assert outcome.status == 0
    opened = next(event for event in outcome.events if event["event"] == "attester_opened")
    assert (opened["tee"], opened["interface"]) == ("snp", "api-server-rest")
    assert components.asked == ["/info", "/aa/evidence", "/aa/additional-evidence", "/aa/evidence", "/info", "/aa/evidence"]
    assert world.audit() == [ATTESTED, RELEASED]


def test_a_container_has_its_key_from_the_confidential_data_hub_after_the_gate(world: World) -> None:
    components = world.key_from_cdh()
    agent = world.start(broker=False)
    agent.wait_for("gate_passed")
    agent.wait_for("server_ready")
    assert json.loads(agent.status_file.read_text())["simulated"] is True
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    outcome = agent.stop()
    assert outcome.status == 0
    assert components.asked == ["/info", "/aa/evidence", "/aa/token", "/info", "/cdh/resource/models/tiny/1", "/aa/evidence"]
    assert world.audit() == []


# --- credentials from the broker --------------------------------------------------------------------------------------

GIVEN: Audit = ("credentials", "allowed", None)


def stages_of(events: list[dict[str, Any]]) -> list[str]:
    return [f"{event['stage']} {event['event'].removeprefix('stage_')}" for event in events if "stage" in event]


def holds_no(secret: str, outcome: Outcome, world: World) -> None:
    """Nowhere in what a boot says and leaves, but where the broker keeps it."""
    texts = [json.dumps(outcome.events), outcome.termination, (world.folder / "keyturn.toml").read_text()]
    texts += [(world.folder / name).read_text() for name in ("audit.jsonl", "status/status.json")]
    assert not [text for text in texts if secret in text]


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_store_is_opened_with_what_the_broker_gives_after_the_verdict(tmp_path: Path, silicon: Path, tee: Tee) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=tee)
        world.keep_credentials()
        agent = world.start()
        agent.wait_for("server_ready")
        assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
        outcome = agent.stop()
        assert outcome.status == 0
        order = ["attest ended", "release-credentials started", "release-credentials ended", "prepare started", "prepare ended"]
        seen = stages_of(outcome.events)
        assert [stage for stage in seen if stage in order] == order
        assert seen.index("prepare ended") < seen.index("measure started")
        assert world.audit() == [ATTESTED, GIVEN, RELEASED]
        attested, given, _ = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert (given["key_id"], given["nonce"], given["request_id"]) == (
            CREDENTIALS_URI,
            attested["nonce"],
            attested["request_id"],
        )
        holds_no(bucket.SECRET, outcome, world)
        holds_no(bucket.TOKEN, outcome, world)


def test_a_registry_is_opened_with_what_the_broker_gives(world: World, tmp_path: Path) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        location = f"oci://{registry.host}/models/tiny"
        push_layout(world.layout, Repository.parse(location), registry.ca_pem, LOGIN, 60, lambda *_: None)
        world.artifact |= {"source": location, "ca_pem": registry.ca_pem}
        world.broker_has({"user": USER, "secret": SECRET})
        agent = world.start()
        agent.wait_for("server_ready")
        assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
        outcome = agent.stop()
        assert outcome.status == 0
        assert world.audit() == [ATTESTED, GIVEN, RELEASED]
        holds_no(SECRET, outcome, world)


def test_a_container_has_the_stores_credentials_from_the_confidential_data_hub_before_the_gate(world: World) -> None:
    components = world.key_from_cdh()
    components.resources = {**components.resources, CREDENTIALS_URI.removeprefix("kbs:///"): world.keep_credentials()}
    agent = world.start(broker=False)
    agent.wait_for("server_ready")
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    outcome = agent.stop()
    assert outcome.status == 0
    fetched = [path for path in components.asked if path.startswith("/cdh/")]
    assert fetched == ["/cdh/resource/models/store/1", "/cdh/resource/models/tiny/1"]


def no_row(world: World) -> None:
    del world.row["credentials_uri"]


def another_uri(world: World) -> None:
    world.artifact["credentials_uri"] = "kbs:///models/store/2"


def absent(world: World) -> None:
    world.credentials_file.unlink()


def malformed(world: World) -> None:
    world.broker_has({"user": "guest", "secret": "s", "realm": "r"})


def too_large(world: World) -> None:
    world.broker_has({"user": "guest", "secret": "s" * 4096})


def a_key(world: World) -> None:
    world.broker_has(world.key_file.read_bytes())


def refused_by_the_store(world: World) -> None:
    world.keep_credentials("another secret")


def for_a_bucket_only(world: World) -> None:
    world.artifact["source"] = "oci://127.0.0.1:1/models/tiny"
    del world.artifact["endpoint"], world.artifact["region"]


@pytest.mark.parametrize(
    ("arrange", "status", "name", "fields", "given"),
    [
        (no_row, 16, "KeyReleaseDeniedError", {"reason": "reference-value", "claim": "policy.credentials_uri"}, "denied"),
        (another_uri, 16, "KeyReleaseDeniedError", {"reason": "claim", "claim": "policy.credentials_uri"}, "denied"),
        (absent, 15, "BrokerFailureError", {"reason": "CREDENTIALS_NOT_FOUND"}, "failed"),
        (malformed, 15, "BrokerFailureError", {"reason": "CREDENTIALS_FILE"}, "failed"),
        (too_large, 15, "BrokerFailureError", {"reason": "CREDENTIALS_FILE"}, "failed"),
        (a_key, 15, "BrokerFailureError", {"reason": "CREDENTIALS_FILE"}, "failed"),
        (for_a_bucket_only, 17, "StoreCredentialsError", {}, "allowed"),
        (refused_by_the_store, 18, "ArtifactUnavailableError", {"problem": "access refused", "status": 403}, "allowed"),
    ],
)
def test_what_is_wrong_with_credentials_ends_the_boot_before_the_gate(
    world: World,
    arrange: Callable[[World], None],
    status: int,
    name: str,
    fields: dict[str, object],
    given: str,
) -> None:
    world.keep_credentials()
    arrange(world)
    outcome = world.boot()
    assert (outcome.status, outcome.failure["class"]) == (status, name), outcome.events
    assert fields.items() <= outcome.failure["fields"].items()
    assert "gate_passed" not in outcome.names()
    assert SimulatedMachine.load(world.machine.directory).gpu.ready == 0, "this machine can boot again"
    assert [step[:2] for step in world.audit()][:2] == [("attest", "allowed"), ("credentials", given)]
    holds_no(bucket.SECRET, outcome, world)
    holds_no("another secret", outcome, world)


def test_a_container_waits_for_an_api_server_that_starts_late(world: World) -> None:
    components, port = world.through_coco(), free_port()
    world.tee |= {"coco_url": f"http://127.0.0.1:{port}", "wait_s": 30}
    agent = world.start()
    assert agent.wait_for("waiting_for")["what"] == "tee"
    with serve(components, port):
        agent.wait_for("server_ready")
        assert agent.stop().status == 0


def test_a_td_boots_as_an_snp_guest_does(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=Tee.TDX)
        agent = world.start(initdata="sha384")
        agent.wait_for("server_ready")
        assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
        assert json.loads(agent.status_file.read_text())["simulated"] is True
        outcome = agent.stop()
        assert outcome.status == 0
        opened = next(event for event in outcome.events if event["event"] == "attester_opened")
        assert (opened["tee"], opened["interface"]) == ("tdx", "simulated-tdx")
        attested, released = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert (attested["decision"], attested["tee"], attested["simulated"]) == ("allowed", "tdx", True)
        assert attested["host_data"] == hashlib.sha384((tmp_path / "initdata.toml").read_bytes()).hexdigest()
        assert attested["reference_value_ids"][:5] == ["firmware-1", "config-1", "loader-1", "kernel-1", "module-1"]
        assert released["decision"] == "allowed"


def test_a_td_measures_the_release_into_its_register_and_a_log_that_explains_it(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=Tee.TDX)
        world.tee["runtime_measurement"], world.row_tdx["event_log"] = "required", "required"
        agent = world.start()
        measured = agent.wait_for("release_measured")
        agent.wait_for("server_ready")
        assert agent.stop().status == 0

        machine = SimulatedMachine.load(world.machine.directory)
        assert measured["unsupported"] is None
        assert measured["rtmr_3"] == make_td_report(machine, NO_REPORT_DATA).body.rtmr_3.hex()
        log = parse_event_log(machine.runtime(Tee.TDX).event_log())
        assert replay(log)[3].hex() == measured["rtmr_3"]
        event = parse_runtime_event(log.events[-1])
        assert event is not None
        assert (event.domain, event.operation) == ("keyturn", "release-key")
        content = json.loads(event.content)
        assert (content["key_uri"], content["policy_version"]) == (KEY_URI, "7")
        assert content["manifest_digest"] == world.manifest_digest
        assert content["server_command_digest"] == command_digest(tuple(world.server["command"]))
        released = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[1])
        assert (content["key_id"], content["key_version"]) == (released["key_id"], released["key_version"])


# --- the receipt ------------------------------------------------------------------------------------------------------


def verified(world: World, path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `keyturn verify receipt` says of it."""
    roots = ["--unsafe-simulation-roots", str(world.machine.roots_dir)]
    assert main(["verify", "receipt", str(path), "--no-collateral", "--json", *roots]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_the_receipt_says_what_was_opened_where_and_under_which_policy(
    tmp_path: Path, silicon: Path, tee: Tee, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=tee, files=2)
        port = free_port()
        agent = world.start(flags=("--health", f"127.0.0.1:{port}"))
        told = agent.wait_for("receipt_signed")
        agent.wait_for("server_ready")
        path = agent.status_file.with_name(RECEIPT_NAME)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/receipt") as answer:
            assert answer.headers["content-type"] == 'application/cose; cose-type="cose-sign1"'
            assert answer.read() == path.read_bytes()
        outcome = agent.stop()
        assert outcome.status == 0
        assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]

        said = verified(world, path, capsys)
        attested, released = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert (said["key_id"], said["key_version"]) == (released["key_id"], released["key_version"])
        assert said["request_id"] == attested["request_id"]
        assert said["policy_version"] == "7"
        assert (said["model_name"], said["model_version"], said["manifest_digest"]) == ("tiny", 3, world.manifest_digest)
        assert (said["files"], said["total_bytes"]) == (2, sum(map(len, world.model.values())))
        assert said["server_command_digest"] == command_digest(tuple(world.server["command"]))
        assert said["config_digest"] == hashlib.sha256((tmp_path / "keyturn.toml").read_bytes()).hexdigest()
        assert (said["mode"], said["simulated"]) == ("entrypoint", True)
        assert set(said["not_held"]) <= {"scratch", "server-root"}  # as this machine lets us mount, and other users run Python
        assert (said["gpus"], said["gpu_ready"], said["lease_s"]) == (1, "own", None)
        assert (said["logged"], said["unmeasured"]) == ((True, None) if tee is Tee.TDX else (False, "no-register"))
        assert list(said["stages_ms"])[-1] == "load"
        assert said["evidence"]["simulated"] is True


def test_in_a_coco_guest_the_receipt_says_who_attested(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.key_from_cdh()
    agent = world.start(broker=False)
    agent.wait_for("server_ready")
    assert agent.stop().status == 0
    said = verified(world, agent.status_file.with_name(RECEIPT_NAME), capsys)
    assert said["evidence_digest"] is None
    assert {"guest-attested", "pod-evidence"} <= set(said["not_held"])


def test_without_gpus_there_is_a_receipt_too(tmp_path: Path, silicon: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0)
        agent = world.start()
        agent.wait_for("server_ready")
        assert agent.stop().status == 0
        said = verified(world, agent.status_file.with_name(RECEIPT_NAME), capsys)
        assert (said["gpus"], said["gpu_ready"]) == (0, None)


def test_a_receipt_of_an_earlier_boot_does_not_stand_for_this_one(world: World) -> None:
    """It lies where that of this boot will; a boot that comes to no receipt leaves none."""
    path = world.folder / "status" / RECEIPT_NAME
    path.parent.mkdir()
    path.write_bytes(b"old")
    world.row["revoked"] = True
    assert world.boot().status == 16
    assert not path.exists()


def test_a_container_in_a_td_has_the_attestation_agent_measure_and_sends_its_log(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=Tee.TDX)
        components = world.through_coco()
        world.tee["runtime_measurement"], world.row_tdx["event_log"] = "required", "required"
        agent = world.start()
        measured = agent.wait_for("release_measured")
        assert (measured["rtmr_3"], measured["unsupported"]) == (None, None)
        agent.wait_for("server_ready")
        assert agent.stop().status == 0
        ((domain, operation, content),) = components.entries
        assert (domain, operation, json.loads(content)["key_uri"]) == ("keyturn", "release-key", KEY_URI)
        log = parse_event_log(world.machine.runtime(Tee.TDX).event_log())
        machine = SimulatedMachine.load(world.machine.directory)
        assert replay(log)[3] == make_td_report(machine, NO_REPORT_DATA).body.rtmr_3


@pytest.mark.parametrize(("required", "status"), [("required", 11), ("optional", 0)])
def test_a_container_that_must_measure_and_cannot_is_stopped(tmp_path: Path, silicon: Path, required: str, status: int) -> None:
    """What the attestation-agent does not say before it is asked is found before the gate."""
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=Tee.TDX)
        world.through_coco().enables_log = False
        if required == "required":
            world.tee["runtime_measurement"] = required
        agent = world.start()
        if status:
            outcome = agent.wait()
            assert "gate_passed" not in outcome.names()
        else:
            assert agent.wait_for("release_measured")["unsupported"] == "not-enabled"
            agent.wait_for("server_ready")
            outcome = agent.stop()
        assert outcome.status == status


@pytest.mark.parametrize(("tee", "why"), [(Tee.SNP, "no-register"), (Tee.TDX, "no-driver")])
def test_a_guest_that_cannot_measure_says_why_and_boots(tmp_path: Path, silicon: Path, tee: Tee, why: str) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=tee)
        world.machine.register_errno = errno.ENOENT
        agent = world.start()
        measured = agent.wait_for("release_measured")
        assert (measured["rtmr_3"], measured["unsupported"]) == (None, why)
        agent.wait_for("server_ready")
        assert agent.stop().status == 0


@pytest.mark.parametrize("ready_state", ["own", "preset"])
def test_eight_gpus_boot_with_the_switches_between_them(tmp_path: Path, silicon: Path, ready_state: str) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=8, switches=4)
        preset = ready_state == "preset"
        world.gpu["ready_state"], world.row_gpu["ready"], world.machine.gpu.ready = ready_state, preset, int(preset)
        agent = world.start()
        agent.wait_for("server_ready")
        outcome = agent.stop()
        assert outcome.status == 0
        passed = next(event for event in outcome.events if event["event"] == "gate_passed")
        assert (passed["gpus"], passed["switches"], passed["preset"]) == (8, 4, preset)
        attested, _ = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert "switch-1" in attested["reference_value_ids"]


def test_a_signed_model_boots_and_the_evidence_is_about_it(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        key = ed25519.Ed25519PrivateKey.generate()
        world = World(tmp_path, silicon, undo, signing_key=key)
        agent = world.start()
        agent.wait_for("server_ready")
        outcome = agent.stop()
        assert outcome.status == 0
        stages = [event["stage"] for event in outcome.events if event["event"] == "stage_ended"]
        assert stages.index("identify") < min(stages.index("attest"), stages.index("prepare"))
        # The row pins this manifest: the broker would have denied evidence about another.
        attested, _ = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert "tiny-v3" in attested["reference_value_ids"]


def test_a_model_of_kserve_boots_and_the_evidence_is_about_its_list(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        key = os.urandom(32)
        world = World(tmp_path, silicon, undo, files=2, key=key)
        if os.geteuid() != 0:
            pytest.skip("a memfd holds one file: several need mounts of our own, and so root")
        kserve_model(world, key)
        agent = world.start()
        agent.wait_for("server_ready")
        assert served_bytes(world) == hashlib.sha256(world.model["model-1.gguf"]).hexdigest()
        assert agent.stop().status == 0
        # The row pins the digest of the list: the broker would have denied evidence about another.
        attested, _ = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert "kserve" in attested["reference_value_ids"]


def test_what_nobody_signed_ends_the_boot_before_the_broker_hears_of_it(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, signing_key=ed25519.Ed25519PrivateKey.generate())
        world.artifact["provider_keys"] = [public_pem(ed25519.Ed25519PrivateKey.generate())]
        outcome = world.boot()
        assert outcome.failure["class"] == "ManifestSignatureError"
        assert world.audit() == []


def test_the_key_comes_after_the_gate_and_the_gate_after_the_verdict(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    outcome = agent.stop()
    stages = [event["stage"] for event in outcome.events if event["event"] == "stage_ended"]
    order = ["attest", "release-key", "measure", "secure", "unwrap", "load", "publish", "server"]
    assert [stage for stage in stages if stage in order] == order


def test_a_model_of_several_files_is_served_from_one_folder(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, files=2)
        if os.geteuid() != 0:
            pytest.skip("a memfd holds one file: several need mounts of our own, and so root")
        agent = world.start()
        agent.wait_for("server_ready")
        assert served_bytes(world) == hashlib.sha256(world.model["model-1.gguf"]).hexdigest()
        assert agent.stop().status == 0


def test_a_sealed_memfd_serves_as_well(world: World) -> None:
    world.artifact["destination"] = "memfd"
    agent = world.start()
    assert agent.wait_for("destination_chosen")["kind"] == "memfd"
    agent.wait_for("server_ready")
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert agent.stop().status == 0


@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
def test_the_configuration_may_be_an_entry_of_the_initdata_the_guest_was_launched_with(world: World, algorithm: str) -> None:
    agent = world.start(initdata=algorithm)
    assert agent.wait_for("config_found")["source"] == "initdata-file"
    agent.wait_for("local_checks_passed")
    agent.wait_for("server_ready")
    status = json.loads(agent.status_file.read_text())
    assert status["memory"]["worker_peak_kib"] > status["memory"]["supervisor_kib"] > 5_000
    assert agent.stop().status == 0


def test_another_initdata_than_the_one_it_was_launched_with_stops_before_anything_is_asked_for(world: World) -> None:
    world.host_data = bytes(32)
    outcome = world.start(initdata="sha384").wait()
    assert (outcome.failure["class"], outcome.status) == ("ConfigNotMeasuredError", 10)
    assert "local_checks_passed" not in outcome.names()
    assert world.audit() == []


def test_without_a_route_the_boot_waits_says_so_and_ends_at_its_measured_deadline(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes a network namespace, where there is no route")
    world.broker_config |= {"endpoints": ["192.0.2.1:8443"], "route_timeout_s": 1}
    outcome = world.start(broker=False, wrapper=("unshare", "--net")).wait()
    waited = next(event for event in outcome.events if event["event"] == "waiting_for")
    assert (waited["what"], waited["at_most_s"]) == ("route", 1)
    assert (outcome.failure["class"], outcome.status) == ("NoRouteError", 14)
    assert outcome.names().index("local_checks_passed") < outcome.names().index("waiting_for")


def test_a_guest_without_gpus_boots_on_cpu_evidence_alone(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0)
        del world.row["manifest_digests"]
        agent = world.start()
        agent.wait_for("server_ready")
        assert agent.stop().status == 0


def test_the_server_sees_its_planned_environment_and_nothing_of_ours(world: World) -> None:
    world.server["environment"] = {"PLANNED": "1"}
    agent = world.start()
    agent.wait_for("server_ready")
    about = ask(world.port, "/about")
    agent.stop()
    assert "PLANNED" in about["environment"]
    assert not {"KEYTURN_SHARED_DATA", "PYTEST_CURRENT_TEST", "GRPC_VERBOSITY"} & set(about["environment"])
    if os.geteuid() == 0 and not world.server.get("unsafe_run_as_root"):
        assert about["uid"] == 65532


def test_a_crashed_server_is_started_again_without_a_new_key(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    with pytest.raises(OSError):
        ask(world.port, "/crash")
    agent.wait_for("server_restarting")
    assert agent.wait_for("server_ready")["start"] == 2
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert agent.stop().status == 0
    assert world.audit() == [ATTESTED, RELEASED]


def test_what_the_store_lacks_ends_the_boot_before_the_gate(world: World) -> None:
    weights(world).unlink()
    outcome = world.boot()
    assert (outcome.failure["class"], outcome.status) == ("ArtifactUnavailableError", 18)
    assert "gate_passed" not in outcome.names()


# --- the end of processes ---------------------------------------------------------------------------------------------


def test_a_mirror_serves_when_the_source_does_not(world: World) -> None:
    world.artifact |= {"source": str(world.folder / "absent"), "mirrors": [str(world.layout)]}
    agent = world.start()
    agent.wait_for("server_ready")
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert agent.stop().status == 0


def test_a_signal_during_the_boot_ends_it_without_a_key(world: World) -> None:
    world.broker_config["timeout_s"] = 3600  # longer than this test waits
    agent = world.start(broker=False)  # nobody answers: the worker waits
    assert agent.wait_for("retrying")["error"] == "BrokerUnreachableError"
    outcome = agent.stop()
    assert (outcome.failure["class"], outcome.status) == ("BootInterruptedError", 21)


def test_a_killed_worker_is_told_from_a_failed_one(world: World) -> None:
    world.broker_config["timeout_s"] = 60
    agent = world.start(broker=False)
    agent.wait_for("requested")
    (worker,) = children_of(agent.process.pid)
    os.kill(worker, signal.SIGKILL)
    outcome = agent.wait()
    assert (outcome.failure["class"], outcome.status) == ("WorkerLostError", 21)
    assert outcome.failure["fields"] == {"signal": signal.SIGKILL, "status": 0}


def test_the_death_of_the_supervisor_ends_the_server(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    server = json.loads(agent.status_file.read_text())["server"]["pid"]
    assert ends_with(server, agent)


def test_the_death_of_the_supervisor_ends_the_worker(world: World) -> None:
    world.broker_config["timeout_s"] = 3600
    agent = world.start(broker=False)
    agent.wait_for("retrying")
    (worker,) = children_of(agent.process.pid)
    os.kill(worker, signal.SIGSTOP)  # it can do nothing about it: the kernel has to
    assert ends_with(worker, agent)


def ends_with(pid: int, agent: Agent) -> bool:
    """Does the death of the agent end this process, without another start of anything?"""
    pidfd = os.pidfd_open(pid)
    try:
        agent.process.kill()
        return bool(select.select([pidfd], [], [], 5)[0])
    finally:
        os.close(pidfd)


@pytest.fixture
def dripping(world: World) -> World:
    """A world whose store sends a byte now and then."""
    world.artifact["source"] = world.undo.enter_context(RangeServer(world.layout, Fault.DRIP_BODY)).url
    return world


def test_a_lease_that_ends_during_the_boot_ends_the_boot(dripping: World) -> None:
    dripping.row["lease_s"] = 1
    outcome = dripping.boot()
    assert (outcome.failure["class"], outcome.status) == ("LeaseEndedError", 22)
    assert "server_started" not in outcome.names()


def test_a_store_that_drips_keeps_no_signal_waiting(dripping: World) -> None:
    agent = dripping.start()
    agent.wait_for("gate_passed")
    began = time.monotonic()
    outcome = agent.stop()
    assert (outcome.failure["class"], outcome.status) == ("BootInterruptedError", 21)
    assert time.monotonic() - began < 10


def test_a_given_directory_serves_and_is_empty_afterwards(world: World) -> None:
    given = Path("/dev/shm") / f"keyturn-test-{os.getpid()}"
    given.mkdir(mode=0o755)
    world.undo.callback(shutil.rmtree, given, ignore_errors=True)
    world.artifact |= {"destination": "directory", "directory": str(given)}
    agent = world.start()
    agent.wait_for("server_ready")
    assert served_bytes(world) == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert agent.stop().status == 0
    assert list(given.iterdir()) == []


@pytest.mark.parametrize("destination", ["tmpfs", "directory"] if os.geteuid() == 0 else ["directory"])
def test_a_model_that_is_released_is_gone_once_the_server_is_ready_and_a_crash_is_the_end(
    world: World, destination: str
) -> None:
    given = Path("/dev/shm") / f"keyturn-test-{os.getpid()}"
    given.mkdir(mode=0o755)
    world.undo.callback(shutil.rmtree, given, ignore_errors=True)
    world.artifact |= {"destination": destination, "after_ready": "release"}
    if destination == "directory":
        world.artifact["directory"] = str(given)
    agent = world.start()
    pid = agent.wait_for("server_started")["pid"]
    assert agent.wait_for("model_released")["files"] == 1
    root = given if destination == "directory" else Path(f"/proc/{pid}/root{RUN_DIRECTORY}")
    assert (root / "model").is_dir()
    assert list((root / "model").iterdir()) == []
    with pytest.raises(OSError):
        ask(world.port, "/crash")
    outcome = agent.wait()
    assert outcome.failure["class"] == "ServerExitedError"
    assert "server_restarting" not in outcome.names()
    assert list(given.iterdir()) == []


def test_a_model_of_many_files_that_is_released_leaves_no_file(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, files=3)
        world.artifact["after_ready"] = "release"
        agent = world.start()
        assert agent.wait_for("model_released")["files"] == 3
        assert agent.stop().status == 0


def test_a_server_that_is_starting_is_asked_to_stop_once_and_is_never_ready_again(world: World) -> None:
    world.set_behaviour("deaf-to-one-signal")
    world.server |= {"probe": "none", "stop_timeout_s": 3, "ready_timeout_s": 60}
    agent = world.start()
    agent.wait_for("server_started")
    ask_until(world.port, "/about")  # its handler stands once it listens
    outcome = agent.stop()
    assert (outcome.failure["class"], outcome.status) == ("BootInterruptedError", 21)
    ended = next(event for event in outcome.events if event["event"] == "server_ended")
    assert ended["signal"] == signal.SIGKILL, "a second SIGTERM would have ended it with status 7"
    assert "server_ready" not in outcome.names()
    assert "stage_failed" in outcome.names()


def test_stopping_a_server_that_had_served_is_no_failure_even_while_it_is_down(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    with pytest.raises(OSError):
        ask(world.port, "/crash")
    agent.wait_for("server_restarting")
    assert agent.stop().status == 0
