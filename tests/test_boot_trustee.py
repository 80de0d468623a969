"""Whole boots before a Trustee KBS (the test KBS): a working configuration with another broker section, and what ends it."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent.cli import main
from agent.commands.init import _supervise
from agent.errors import ConfigError, ConfigProblem
from agent.evidence import Tee
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee, serve
from agent.sim.trustee_knobs import REFUSALS, Fault, JweFault, Knobs
from tests import bucket
from tests.connect_proxy import ConnectProxy
from tests.range_server import RangeServer
from tests.tls import certificate, key_pem, pem
from tests.world import CREDENTIALS_URI, KEY_URI, World, ask


@dataclass
class Site:
    """A world whose key is a KBS's."""

    world: World
    kbs: Trustee

    def paths(self) -> list[str]:
        return [entry.path.removeprefix("/kbs/v0/") for entry in self.kbs.log]


def site_of(folder: Path, silicon: Path, undo: ExitStack, tee: Tee) -> Site:
    world = World(folder, silicon, undo, tee=tee)
    made = world.broker.directory
    tls = ((made / "tls.pem").read_bytes(), (made / "tls.key").read_bytes())
    kbs = undo.enter_context(serve(tls=tls, roots=world.machine.roots_dir))
    kbs.register_resource(KEY_URI.removeprefix("kbs:///"), world.key_file.read_bytes())
    # All that changes of a configuration that worked with our own broker.
    del world.broker_config["endpoints"]
    world.broker_config |= {"url": kbs.url, "token_keys": [kbs.token_key_pem]}
    return Site(world, kbs)


@pytest.fixture
def site(tmp_path: Path, silicon: Path) -> Iterator[Site]:
    with ExitStack() as undo:
        yield site_of(tmp_path, silicon, undo, Tee.SNP)


@pytest.mark.parametrize("initdata", [None, "sha384"])
@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_configuration_that_worked_with_our_broker_needs_another_broker_section(
    tmp_path: Path, silicon: Path, tee: Tee, initdata: str | None
) -> None:
    with ExitStack() as undo:
        at = site_of(tmp_path, silicon, undo, tee)
        agent = at.world.start(broker=False, initdata=initdata)
        agent.wait_for("server_ready")
        assert ask(at.world.port, "/about")["sha256"] == hashlib.sha256(at.world.model["model.gguf"]).hexdigest()
        outcome = agent.stop()
    assert outcome.status == 0
    assert at.paths() == ["auth", "attest", f"resource/{KEY_URI.removeprefix('kbs:///')}"]
    accepted = next(event for event in outcome.events if event["event"] == "verdict_accepted")
    assert (accepted["policy_version"], accepted["simulated"], accepted["lease_s"]) == ("unversioned", True, None)


@pytest.mark.parametrize("initdata", [None, "sha384"])
@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_boot_through_a_relay_needs_one_word_and_the_attestation_services_key(
    tmp_path: Path, silicon: Path, tee: Tee, initdata: str | None
) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, tee=tee)
        before = dict(world.broker_config)
        kbs = world.behind_a_relay()
        assert {key for key, value in world.broker_config.items() if before.get(key) != value} == {"tokens", "token_keys"}
        agent = world.start(initdata=initdata)
        agent.wait_for("server_ready")
        assert ask(world.port, "/about")["sha256"] == hashlib.sha256(world.model["model.gguf"]).hexdigest()
        outcome = agent.stop()
        (request,) = [event["request_id"] for event in outcome.events if event["event"] == "requested"]
        assert [entry.request_id for entry in kbs.log if entry.path != "/healthz"] == [request] * 3
        assert world.audit() == [("attest", "relayed", None), ("release", "allowed", None)]
    assert outcome.status == 0


def test_a_denial_behind_a_relay_says_which_claims_failed_of_which_device(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo)
        kbs = world.behind_a_relay()
        kbs.set_resource_policy("affirming")
        failed = failure(Site(world, kbs), 16, broker=True)
    assert (failed["class"], failed["owner"]) == ("KeyReleaseDeniedError", "authority")
    assert failed["fields"]["claim"] == failed["findings"][0]
    assert "gpu0:hardware:hardware-unrecognised:97" in failed["findings"]


def test_the_key_may_lie_elsewhere_and_stays_the_models(site: Site) -> None:
    site.kbs.plugins["vault"] = lambda path, _: {"models/tiny": site.world.key_file.read_bytes()}[path]
    site.kbs.set_resource_policy("allow_all")
    site.world.broker_config["resource_uri"] = "kbs+vault:///models/tiny?version=3"
    agent = site.world.start(broker=False)
    agent.wait_for("server_ready")
    assert agent.stop().status == 0
    assert site.paths()[-1] == "vault/models/tiny"


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
@pytest.mark.parametrize("relay", [False, True])
def test_a_store_is_opened_with_another_resource_of_the_same_session(
    tmp_path: Path, silicon: Path, tee: Tee, relay: bool
) -> None:
    with ExitStack() as undo:
        if relay:
            world = World(tmp_path, silicon, undo, tee=tee)
            kbs = world.behind_a_relay()
        else:
            at = site_of(tmp_path, silicon, undo, tee)
            world, kbs = at.world, at.kbs
        kbs.register_resource(CREDENTIALS_URI.removeprefix("kbs:///"), world.keep_credentials())
        agent = world.start(broker=relay)
        agent.wait_for("server_ready")
        assert ask(world.port, "/about")["sha256"] == hashlib.sha256(world.model["model.gguf"]).hexdigest()
        outcome = agent.stop()
        assert outcome.status == 0
        asked = [path for path in Site(world, kbs).paths() if path != "/healthz"]
        assert asked == ["auth", "attest", "resource/models/store/1", "resource/models/tiny/1"]
        assert bucket.SECRET not in json.dumps(outcome.events)
        if relay:
            assert world.audit() == [
                ("attest", "relayed", None),
                ("credentials", "allowed", None),
                ("release", "allowed", None),
            ]


def failure(site: Site, status: int, *, broker: bool = False) -> dict[str, Any]:
    """How a boot ends, before the gate."""
    outcome = site.world.start(broker=broker).wait()
    assert outcome.status == status, outcome.events
    assert "gate_passed" not in outcome.names()
    machine = SimulatedMachine.load(site.world.machine.directory)
    assert machine.gpu.ready == 0, "this machine can boot again"
    failed: dict[str, Any] = outcome.failure
    assert failed["text"] in outcome.termination
    assert failed["next_step"] in outcome.termination
    return failed | {"findings": [event["finding"] for event in outcome.events if event["event"] == "not_affirmed"]}


def test_a_denial_says_which_claims_failed_of_which_device(site: Site) -> None:
    site.kbs.set_resource_policy("affirming")
    failed = failure(site, 16)
    assert (failed["class"], failed["owner"]) == ("KeyReleaseDeniedError", "authority")
    assert failed["fields"]["claim"] == failed["findings"][0]
    assert {
        "cpu0:executables:executables-unrecognised:33",
        "cpu0:hardware:hardware-unrecognised:97",
        "gpu0:hardware:hardware-unrecognised:97",
    } <= set(failed["findings"])
    assert site.paths().count("attest") == 1


@pytest.mark.parametrize(
    ("knobs", "status", "name", "says"),
    [
        (Knobs(protocol="0.5.0"), 15, "RemoteProtocolError", "the broker speaks 0.5.0"),
        (Knobs(refusals={"resource": REFUSALS["jwe"]}), 15, "TrusteeRefusedError", "P-256"),
        (Knobs(clock_offset_s=-1000), 14, "ClockSkewError", "differ by"),
        (Knobs(faults={"auth": Fault.REDIRECT}), 15, "RemoteProtocolError", "redirect"),
        (Knobs(jwe_fault=JweFault.EPK_OFF_CURVE), 17, "KeyUnwrapError", "ephemeral key"),
    ],
)
def test_what_ends_a_boot_is_told_before_the_gate(site: Site, knobs: Knobs, status: int, name: str, says: str) -> None:
    site.kbs.knobs = knobs
    failed = failure(site, status)
    assert failed["class"] == name
    assert says in failed["text"]


@pytest.mark.parametrize(
    ("resource", "status", "name", "says"),
    [
        (None, 15, "TrusteeRefusedError", ""),
        (b'{"user": "guest"}', 17, "StoreCredentialsError", "not one JSON object"),
        (b'{"user": "guest", "secret": "%s"}' % (b"s" * 4096), 17, "StoreCredentialsError", "longer than 4 KiB"),
        (bytes(32), 17, "StoreCredentialsError", "as long as a model key"),
        (bytes(33), 17, "StoreCredentialsError", "not one JSON object"),
        (b"", 17, "StoreCredentialsError", "empty"),
        (b'{"user": "AKIDEXAMPLE", "secret": "another"}', 18, "ArtifactUnavailableError", "access refused"),
    ],
)
def test_credentials_that_are_none_or_do_not_open_the_store_end_a_boot_before_the_gate(
    site: Site, resource: bytes | None, status: int, name: str, says: str
) -> None:
    site.world.keep_credentials()
    if resource is not None:
        site.kbs.register_resource(CREDENTIALS_URI.removeprefix("kbs:///"), resource)
    failed = failure(site, status)
    assert failed["class"] == name
    assert says in failed["text"]


def test_credentials_that_a_policy_denies_say_which_claims_failed(site: Site) -> None:
    site.world.keep_credentials()
    site.kbs.set_resource_policy("affirming")
    failed = failure(site, 16)
    assert failed["fields"]["claim"] == failed["findings"][0]
    assert site.paths()[-1] == "resource/models/store/1"


def test_an_outage_is_waited_out(site: Site) -> None:
    site.kbs.knobs = replace(Knobs(), faults={"attest": Fault.UNAVAILABLE}, fault_times=1, retry_after="1")
    agent = site.world.start(broker=False)
    assert agent.wait_for("retrying")["error"] == "BrokerUnreachableError"
    agent.wait_for("server_ready")
    assert agent.stop().status == 0
    assert json.loads(agent.status_file.read_text())["phase"] == "stopped"


def test_a_boot_behind_a_proxy_reaches_its_kbs_and_its_store_through_it(site: Site, tmp_path: Path) -> None:
    world, kbs = site.world, int(site.kbs.url.rpartition(":")[2])
    leaf = certificate("store.invalid")
    (tmp_path / "store.pem").write_bytes(pem(leaf) + key_pem(leaf))
    with RangeServer(world.layout, certificate=tmp_path / "store.pem") as store:
        ports = {f"kbs.invalid:{kbs}": kbs, f"store.invalid:{store.port}": store.port}
        with ConnectProxy(ports) as proxy:
            world.broker_config["url"] = f"https://kbs.invalid:{kbs}"
            world.artifact |= {"source": f"https://store.invalid:{store.port}", "ca_pem": pem(leaf).decode()}
            agent = world.start(broker=False, flags=("--proxy", proxy.url))
            agent.wait_for("server_ready")
            assert agent.stop().status == 0
            assert set(proxy.asked) == set(ports)
            command = [sys.executable, "-m", "agent", "doctor", "--config", str(world.folder / "keyturn.toml")]
            done = subprocess.run([*command, "--proxy", proxy.url], capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.split()[1].rstrip(":") in ("route", "broker", "store")]
    assert [line.split()[0] for line in lines] == ["ok"] * 3, done.stdout
    assert lines[0].endswith("route: broker through-the-proxy, store through-the-proxy")


def test_with_a_proxy_a_route_is_waited_for_all_the_same(site: Site) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes a network namespace, where there is no route")
    site.world.broker_config |= {"url": "https://kbs.invalid", "route_timeout_s": 1}
    flags = ("--proxy", "http://127.0.0.1:1")
    outcome = site.world.start(broker=False, flags=flags, wrapper=("unshare", "--net")).wait()
    assert outcome.failure["class"] == "NoRouteError"


@pytest.mark.parametrize("verb", ["run", "load", "doctor"])
def test_a_proxy_that_is_none_is_a_usage_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--config", "/dev/null", *(["--out", "/x"] if verb == "load" else []), "--proxy", "http://u:secret@h:1"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "takes http://HOST:PORT" in error
    assert "secret" not in error


def test_a_proxy_of_the_kernel_command_line_that_is_none_is_told() -> None:
    with pytest.raises(ConfigError) as raised:
        _supervise({"keyturn.proxy": "proxy:3128"})
    assert (raised.value.problem, raised.value.key) == (ConfigProblem.BAD_VALUE, "keyturn.proxy")
