"""`keyturn doctor` as a process of its own: a guest in which all is well, and one row for each check that finds it is not."""

import errno
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.artifact.seal_volume import seal_volume
from agent.doctor import CHECKS
from agent.examination import Skip
from agent.sim.machine import MACHINE_FILE
from agent.sim.nvml import CALL_LOG, KERNEL_LOG
from tests.range_server import RangeServer
from tests.test_artifact_compact_jwe import sealed as jwe_of
from tests.tls import certificate, pem
from tests.world import DEADLINE_S, KEY_URI, World

# As the kernel is, what silicon alone has, and what most worlds have not.
MAY_BE_SKIPPED = {"landlock", "tdx", "gpu-driver", "gpu-parameters", "gpu-switches"}


@dataclass(frozen=True)
class Diagnosis:
    status: int
    checks: list[dict[str, Any]]

    def outcome(self, check: str) -> str:
        found: str = next(entry["outcome"] for entry in self.checks if entry["check"] == check)
        return found

    def reason(self, check: str) -> str:
        found: str = next(entry["reason"] for entry in self.checks if entry["check"] == check)
        return found

    def failures(self) -> dict[str, str]:
        """Class by check."""
        return {entry["check"]: entry["error"]["class"] for entry in self.checks if entry["outcome"] == "failed"}

    def skipped(self) -> set[str]:
        return {entry["check"] for entry in self.checks if entry["outcome"] == "skipped"} - MAY_BE_SKIPPED


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo)


def doctor(*flags: str, wrapper: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    command = [*wrapper, sys.executable, "-m", "agent", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


def diagnosed(*flags: str, wrapper: tuple[str, ...] = ()) -> Diagnosis:
    done = doctor("--json", *flags, wrapper=wrapper)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert set(found) == {"exit_status", "checks"}
    assert found["exit_status"] == done.returncode
    assert [entry["check"] for entry in found["checks"]] == list(CHECKS)
    return Diagnosis(done.returncode, found["checks"])


def guest(world: World, *, broker: bool = False) -> list[str]:
    """The flags that name the configuration of a guest which is launched with it."""
    config = world.write_config()
    world.launch(hashlib.sha256(config.read_bytes()).digest())
    if broker:
        world.start_broker()
    return ["--config", str(config)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != CALL_LOG}


# --- a guest in which all is well -------------------------------------------------------------------------------------


def test_where_a_boot_would_go_well_every_check_is_ok_and_nothing_is_changed(world: World) -> None:
    flags = guest(world, broker=True)
    before = contents(world.machine.directory) | contents(world.layout)
    found = diagnosed(*flags)
    assert (found.status, found.failures(), found.skipped()) == (0, {}, set())
    after = contents(world.machine.directory) | contents(world.layout)  # with the files that simulated silicon opens
    assert after.items() >= before.items()
    assert json.loads((world.machine.directory / MACHINE_FILE).read_bytes())["gpu"]["ready"] == 0
    calls = (world.machine.directory / CALL_LOG).read_text()
    assert "nvmlDeviceGetCount" in calls
    assert not re.findall("nvmlSystemSet.*|.*Certificate|.*Report", calls)
    assert world.audit() == []

    agent = world.start(broker=False)  # and so it does
    agent.wait_for("server_ready")
    assert agent.stop().status == 0


def test_a_container_whose_guest_fetches_the_key_has_no_broker_to_look_at_and_asks_for_no_token(world: World) -> None:
    components = world.key_from_cdh()
    found = diagnosed(*guest(world))
    assert (found.status, found.failures(), found.skipped()) == (0, {}, {"broker"})
    assert found.reason("broker") == Skip.OWN_COMPONENTS.value
    assert set(components.asked) == {"/info", "/aa/evidence"}


def test_where_another_container_serves_there_is_no_server_to_look_at(world: World) -> None:
    world.key_from_cdh()
    world.server = {}
    found = diagnosed(*guest(world))
    assert (found.status, found.failures(), found.skipped()) == (0, {}, {"broker", "server-program", "server-address"})
    assert found.reason("server-address") == Skip.NO_SERVER.value


def test_a_line_is_a_check_and_says_what_it_found(world: World) -> None:
    world.server["command"][0] = "/no/such/server"
    done = doctor("--offline", *guest(world))
    lines = done.stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == list(CHECKS)
    assert "ok       host-data" in lines
    assert "skipped  broker: it needs the network, and --offline was given" in lines
    (failed,) = [line for line in lines if line.startswith("FAILED")]
    assert failed.startswith("FAILED   server-program: ServerStartError: model server cannot be started: errno 2 (developer); ")
    assert "; next step: run the server command " in failed
    assert (done.returncode, done.stderr) == (30, "")


def test_offline_nothing_is_sent_and_a_store_on_a_volume_is_read(world: World) -> None:
    found = diagnosed("--offline", *guest(world))  # there is no broker
    assert (found.status, found.skipped()) == (0, {"route", "broker"})
    world.artifact["source"] = "https://store.test/model"
    found = diagnosed("--offline", *guest(world))
    assert (found.status, found.skipped()) == (0, {"route", "broker", "store", "memory"})
    assert found.reason("memory") == Skip.NO_MANIFEST.value
    assert found.outcome("destination") == "ok"


def test_a_store_by_url_is_asked_for_the_manifest(world: World) -> None:
    world.artifact["source"] = world.undo.enter_context(RangeServer(world.layout)).url
    found = diagnosed(*guest(world, broker=True))
    assert (found.status, found.skipped()) == (0, set())


def test_the_configuration_may_stand_in_initdata(world: World) -> None:
    initdata = world.write_initdata(world.write_config(), "sha256")
    world.launch(hashlib.sha256(initdata.read_bytes()).digest())
    assert diagnosed("--offline", "--initdata", str(initdata)).status == 0


def test_a_guest_without_gpus_has_none_to_look_at(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        found = diagnosed("--offline", *guest(World(tmp_path, silicon, undo, gpus=0)))
    assert (found.status, found.skipped()) == (0, {"gpu", "gpu-inventory", "gpu-faults", "route", "broker"})
    assert found.reason("gpu-faults") == Skip.NO_GPU.value


# --- what it finds ----------------------------------------------------------------------------------------------------


def unknown_token_key(world: World) -> None:
    world.broker_config["token_keys"] = ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]


def clock_behind(world: World) -> None:
    world.broker_config["ca_pem"] = pem(certificate("from tomorrow", (1, 2))).decode()


def clock_ahead(world: World) -> None:
    world.broker_config["ca_pem"] = pem(certificate("from yesterday", (-2, -1))).decode()


def ca_that_is_none(world: World) -> None:
    world.broker_config["ca_pem"] = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def simulation_not_allowed(world: World) -> None:
    world.broker_config["allow_simulated"] = False


def launched_with_other_configuration(world: World) -> None:
    world.host_data = bytes(32)


def device_that_fails(world: World) -> None:
    world.machine.errno = errno.ETIMEDOUT


def driver_that_fails(world: World) -> None:
    world.machine.gpu.fail_calls["nvmlInitWithFlags"] = 9


def missing_gpu(world: World) -> None:
    world.gpu["count"] = 2


def devtools(world: World) -> None:
    world.machine.gpu.devtools = 1


def ready_already(world: World) -> None:
    world.machine.gpu.ready = 1


def fatal_xid(world: World) -> None:
    with (world.machine.directory / KERNEL_LOG).open("a") as log:
        log.write("3,1,0,-;NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n")


def wrong_server_name(world: World) -> None:
    world.broker_config["server_name"] = "other.test"


def wrong_ca(world: World) -> None:
    world.broker_config["ca_pem"] = pem(certificate("another CA")).decode()


def no_store(world: World) -> None:
    world.artifact["source"] = str(world.folder / "nowhere")


def other_manifest(world: World) -> None:
    blob = world.layout / "blobs" / world.manifest_digest.replace(":", "/")
    blob.write_bytes(blob.read_bytes() + b" ")


def other_key_uri(world: World) -> None:
    world.broker_config["key_uri"] = "kbs:///models/other/1"


def old_model(world: World) -> None:
    world.artifact["min_version"] = 4


def too_little_memory(world: World) -> None:
    world.artifact["headroom_mib"] = 1 << 20


def directory_on_disk(world: World) -> None:
    folder = Path("/proc")  # a file system, and no tmpfs
    world.artifact |= {"destination": "directory", "directory": str(folder)}


def volume_not_attached(world: World) -> None:
    disk, key = world.folder / "model.img", world.key_file.read_bytes()
    digest = seal_volume(world.folder / "source", disk, world.layout, key, KEY_URI, "tiny", 4, lambda *_: None)
    world.artifact |= {"format": "volume", "manifest_digest": digest}
    world.row["manifest_digests"][0]["value"] = digest


def server_not_executable(world: World) -> None:
    program = world.folder / "server"
    program.write_text("#!/bin/sh\n")
    world.server["command"][0] = str(program)


def server_not_on_path(world: World) -> None:
    world.server["command"][0] = "no-such-server"


def port_taken(world: World) -> None:
    taken = world.undo.enter_context(socket.socket())
    taken.bind(("127.0.0.1", world.port))
    taken.listen()


@dataclass(frozen=True)
class Row:
    """One fault, and everything that fails because of it. What is skipped because of it has no other way to be looked at."""

    name: str
    break_it: Callable[[World], object]
    failures: dict[str, str]
    status: int
    skipped: tuple[str, ...] = ()
    broker: bool | None = None  # whether there is one; None: offline


ROWS = (
    Row("token key that is none", unknown_token_key, {"configuration": "ConfigError"}, 10),
    Row("clock before the CA", clock_behind, {"clock": "BrokerIdentityError"}, 14),
    Row("clock after the CA", clock_ahead, {"clock": "BrokerIdentityError"}, 14),
    Row("CA that is none", ca_that_is_none, {"clock": "ConfigError"}, 10),
    Row("simulation not allowed", simulation_not_allowed, {"simulation": "SimulationRefusedError"}, 11),
    Row("launched with another configuration", launched_with_other_configuration, {"host-data": "ConfigNotMeasuredError"}, 10),
    Row("CPU that fails", device_that_fails, {"host-data": "DeviceError"}, 12),
    Row("driver that fails", driver_that_fails, {"gpu": "DeviceError"}, 12, ("gpu-inventory", "gpu-faults")),
    Row("missing GPU", missing_gpu, {"gpu-inventory": "GpuCountError"}, 13),
    Row("devtools mode", devtools, {"gpu-inventory": "GpuModeError"}, 13),
    Row("ready already 1", ready_already, {"gpu-inventory": "VmRestartRequiredError"}, 31),
    Row("fatal XID", fatal_xid, {"gpu-faults": "GpuFaultError"}, 13),
    Row("broker down", lambda _: None, {"broker": "BrokerUnreachableError"}, 14, broker=False),
    Row("wrong server name", wrong_server_name, {"broker": "BrokerIdentityError"}, 14, broker=True),
    Row("wrong CA", wrong_ca, {"broker": "BrokerIdentityError"}, 14, broker=True),
    Row("no store", no_store, {"store": "ArtifactUnavailableError"}, 18, ("memory",)),
    Row("other manifest", other_manifest, {"store": "ManifestDigestError"}, 19, ("memory",)),
    Row("other key URI", other_key_uri, {"store": "ConfigError"}, 10, ("memory",)),
    Row("old model", old_model, {"store": "RollbackError"}, 19, ("memory",)),
    Row("too little memory", too_little_memory, {"memory": "InsufficientMemoryError"}, 20),
    Row("volume not attached", volume_not_attached, {"destination": "VolumeUnavailableError"}, 18),
    Row("given folder on no tmpfs", directory_on_disk, {"destination": "DestinationError"}, 20),
    Row("server not executable", server_not_executable, {"server-program": "ServerStartError"}, 30),
    Row("server not on the path", server_not_on_path, {"server-program": "ServerStartError"}, 30),
    Row("port taken", port_taken, {"server-address": "ConfigError"}, 10),
)


def kept_by_kserve(world: World) -> Path:
    """The model as KServe's files, one of them in clear."""
    folder = world.folder / "kserve"
    folder.mkdir()
    (folder / "a.gguf.jwe").write_bytes(jwe_of(b"weights"))
    (folder / "config.json").write_bytes(b"{}")
    world.artifact = {"source": str(folder), "format": "kserve-jwe", "name": "tiny", "jwe_files": ["a.gguf.jwe"]}
    world.artifact["plain_files"] = {"config.json": f"sha256:{hashlib.sha256(b'{}').hexdigest()}"}
    return folder


def test_kserves_files_are_looked_at_as_far_as_that_needs_no_key(world: World) -> None:
    folder = kept_by_kserve(world)
    found = diagnosed("--offline", *guest(world))
    assert (found.failures(), found.status) == ({}, 0)
    assert next(entry for entry in found.checks if entry["check"] == "store")["seen"] == {"jwe": "1-files", "plain": "1-files"}
    assert found.outcome("memory") == "ok"
    (folder / "config.json").write_bytes(b"[]")
    assert diagnosed("--offline", *guest(world)).failures() == {"store": "ManifestDigestError"}
    (folder / "config.json").write_bytes(b"{}")
    (folder / "a.gguf.jwe").write_bytes(b"plaintext")
    assert diagnosed("--offline", *guest(world)).failures() == {"store": "MalformedHeaderError"}


def test_of_several_allowed_models_one_is_looked_at(world: World) -> None:
    selection = {key: world.artifact.pop(key) for key in ("source", "manifest_digest")}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world.artifact |= {"destination": "directory", "directory": folder}
        world.artifact["allowed"] = [{"uri": "x://a", **selection}, {"uri": "x://b", **selection, "min_version": 9}]
        world.server = {}
        assert diagnosed("--offline", *guest(world)).failures()["configuration"] == "ConfigError"
        other = diagnosed("--offline", "--uri=x://c", *guest(world))
        assert other.failures()["configuration"] == "ConfigNotMeasuredError"
        assert diagnosed("--offline", "--uri=x://b", *guest(world)).failures() == {"store": "RollbackError"}
        assert diagnosed("--offline", "--uri=x://a", *guest(world)).failures() == {}


def test_the_switches_are_a_line_of_their_own(world: World) -> None:
    assert diagnosed("--offline", *guest(world)).reason("gpu-switches") == Skip.NO_SWITCH.value
    world.machine.gpu.multi_gpu_mode, world.machine.gpu.cc_feature = 1, 0
    found = diagnosed("--offline", *guest(world))
    assert (found.failures(), found.status) == ({"gpu-switches": "GpuModeError"}, 13)


@pytest.mark.parametrize(
    ("knob", "value", "failures", "status"),
    [
        ("switches", 4, {}, 0),
        ("switches", 3, {"gpu-switches": "GpuCountError"}, 13),
        ("switch_mode", 1, {"gpu-switches": "GpuModeError"}, 13),
        ("multi_gpu_mode", 2, {"gpu-switches": "GpuModeError"}, 13),
        ("fail_calls", {"nscq_session_create": 1}, {"gpu": "DeviceError"}, 12),
        ("fail_calls", {"config/pcie_mode": -7}, {"gpu-inventory": "DeviceError"}, 12),
    ],
)
def test_a_machine_with_switches(
    tmp_path: Path, silicon: Path, knob: str, value: object, failures: dict[str, str], status: int
) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=8, switches=4)
        setattr(world.machine.gpu, knob, value)
        found = diagnosed("--offline", *guest(world))
    assert (found.failures(), found.status) == (failures, status)
    assert found.outcome("gpu-switches") == ("skipped" if status == 12 else "failed" if failures else "ok")
    if not failures:
        seen = next(entry["seen"] for entry in found.checks if entry["check"] == "gpu-switches")
        assert seen == {"count": "4", "architecture": "LS10", "mode": "locked"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_fault_is_one_finding_and_the_exit_status(world: World, row: Row) -> None:
    row.break_it(world)
    flags = guest(world, broker=bool(row.broker))
    offline = [] if row.broker is not None else ["--offline"]
    found = diagnosed(*flags, *offline)
    assert (found.failures(), found.status) == (row.failures, row.status)
    assert found.skipped() == {*row.skipped, *(("route", "broker") if offline else ())}
    assert world.audit() == []


def test_a_machine_that_is_not_there_is_no_device(world: World) -> None:
    flags = guest(world)
    (world.machine.directory / MACHINE_FILE).unlink()
    found = diagnosed("--offline", *flags)
    assert found.failures() == {"tee": "NoAttesterError", "gpu": "NoAttesterError"}
    assert (found.status, found.reason("host-data")) == (11, Skip.NO_TEE.value)


def test_without_a_route_the_broker_is_asked_all_the_same(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes a network namespace, where there is no route")
    world.broker_config["endpoints"] = ["192.0.2.1:8443"]
    found = diagnosed(*guest(world), wrapper=("unshare", "--net"))
    assert found.failures() == {"route": "NoRouteError", "broker": "BrokerUnreachableError"}
    assert found.status == 14


def test_every_fault_is_found_at_once_and_the_first_in_boot_order_gives_the_status(world: World) -> None:
    for break_it in (too_little_memory, devtools, fatal_xid, port_taken, server_not_on_path):
        break_it(world)
    found = diagnosed(*guest(world))
    assert list(found.failures()) == ["gpu-inventory", "gpu-faults", "broker", "memory", "server-program", "server-address"]
    assert found.status == 13
    error = next(entry["error"] for entry in found.checks if entry["check"] == "gpu-inventory")
    assert set(error) == {"class", "owner", "step", "exit_status", "text", "next_step", "fields"}
    assert (error["owner"], error["fields"]["mode"]) == ("host", "devtools mode")


def test_real_devices_are_meant_where_no_simulator_is_named(world: World) -> None:
    world.tee["attester"] = "snp"
    found = diagnosed("--offline", *guest(world))
    assert (found.failures()["tee"], found.status) == ("NoAttesterError", 11)
    assert found.outcome("gpu") == "failed" or found.reason("gpu") == Skip.GPU_NOT_HELD.value  # by whether there is a driver
    assert found.reason("gpu-inventory") == Skip.GPU_NOT_OPEN.value


@pytest.mark.parametrize("broken", [None, 'schema = "other"\n'])
def test_without_a_configuration_it_says_so_and_looks_at_what_needs_none(tmp_path: Path, broken: str | None) -> None:
    flags = []
    if broken is not None:
        (tmp_path / "keyturn.toml").write_text(broken)
        flags = ["--config", str(tmp_path / "keyturn.toml")]
    found = diagnosed(*flags)
    assert found.status == 10
    assert found.failures() == {"configuration": "ConfigError", "tee": "NoAttesterError"}
    assert (found.outcome("hardening"), found.outcome("destination")) == ("ok", "ok")
    assert found.reason("broker") == Skip.NO_CONFIGURATION.value


def test_beside_an_agent_that_serves_what_it_holds_is_found_taken_and_left_alone(world: World) -> None:
    agent = world.start()
    agent.wait_for("server_ready")
    found = diagnosed("--config", str(world.folder / "keyturn.toml"))
    assert found.failures() == {"gpu-inventory": "VmRestartRequiredError", "server-address": "ConfigError"}
    assert agent.stop().status == 0
