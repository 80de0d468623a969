"""`keyturn broker` as a process: what it prints, what signals do, and what it refuses to start with."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent import config
from agent.broker.service import SERVICE
from agent.commands import broker
from agent.errors import EXIT_STATUS, EXIT_USAGE, KeyReleaseDeniedError, Owner, Step
from agent.evidence import CompositeEvidence, RuntimeData
from agent.sim.machine import SimulatedMachine
from tests.broker_site import KEY, URI, Site, policy_for
from tests.children import read_line
from tests.relay_site import CA as UPSTREAM_CA
from tests.relay_site import UPSTREAM_NAME, RelaySite, upstream
from tests.tls import pem

COMMAND = [sys.executable, "-m", "agent", "broker"]
EXIT_CONFIG = EXIT_STATUS[Owner.OPERATOR, Step.CONFIG]


@pytest.fixture
def site(tmp_path: Path, machine: SimulatedMachine) -> Site:
    site = Site(tmp_path / "broker", machine)
    (site.made.directory / "policy.toml").write_bytes(site.policy)
    return site


def arguments(site: Site, **changes: str) -> list[str]:
    directory = site.made.directory
    flags = {
        "listen": "127.0.0.1:0",
        "tls-cert": str(directory / "tls.pem"),
        "tls-key": str(directory / "tls.key"),
        "policy": str(directory / "policy.toml"),
        "keys": str(directory / "keys"),
        "token-key": str(directory / "token.key"),
        "audit": str(site.audit_path),
        "unsafe-simulation-roots": str(site.machine.roots_dir),
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [*COMMAND, *(part for name, value in flags.items() for part in (f"--{name}", value))]


class Running:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        self.listening = json.loads(read_line(process.stdout.fileno()))

    def says(self) -> Any:
        assert self.process.stderr is not None
        return json.loads(read_line(self.process.stderr.fileno()))


@contextmanager
def running(site: Site, **changes: str) -> Iterator[Running]:
    process = subprocess.Popen(arguments(site, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        broker = Running(process)
        site.port = int(broker.listening["address"].rpartition(":")[2])
        yield broker
    finally:
        process.kill()
        process.communicate()


def refused(command: list[str]) -> Any:
    """The error of a broker that does not start."""
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert done.returncode == EXIT_CONFIG, done
    error = json.loads(done.stderr)
    assert (error["event"], error["class"], done.stdout) == ("failed", "ConfigError", b"")
    return error["fields"]["key"], error["fields"]["problem"]


def test_a_guest_gets_its_key_and_sigterm_ends_the_broker(site: Site) -> None:
    with running(site) as broker:
        assert broker.listening == {"event": "listening", "address": f"127.0.0.1:{site.port}", "simulation": True}
        assert broker.says() == {"event": "policy_loaded", "policy_version": "1", "rows": 2}
        _, _, sealed = asyncio.run(site.boot())
        assert sealed.key_id == URI
        broker.process.send_signal(signal.SIGTERM)
        stdout, stderr = broker.process.communicate(timeout=60)
        assert (broker.process.returncode, stdout, stderr) == (0, b"", b"")
    assert [line["step"] for line in site.audit()] == ["attest", "release"]


def test_sighup_loads_a_new_policy_and_keeps_the_old_one_when_it_is_broken(site: Site) -> None:
    policy = site.made.directory / "policy.toml"
    with running(site) as broker:
        assert broker.says()["event"] == "policy_loaded"
        policy.write_bytes(policy_for(site.machine, "2"))
        broker.process.send_signal(signal.SIGHUP)
        assert broker.says() == {"event": "policy_loaded", "policy_version": "2", "rows": 2}

        policy.write_bytes(policy_for(site.machine, "3", revoked='"yes"'))
        broker.process.send_signal(signal.SIGHUP)
        assert broker.says()["fields"] == {"problem": "value has the wrong type", "key": "row[0].revoked", "line": None}
        assert broker.says() == {"event": "policy_kept", "policy_version": "2", "rows": 2}
        verdict, _ = asyncio.run(site.attest())
        assert verdict.claims.policy_version == "2"


def test_sighup_reopens_the_audit_log(site: Site) -> None:
    rotated = site.audit_path.with_suffix(".1")
    with running(site) as broker:
        broker.says()
        asyncio.run(site.attest())
        site.audit_path.rename(rotated)
        broker.process.send_signal(signal.SIGHUP)
        broker.says()
        asyncio.run(site.attest())
    assert len(rotated.read_bytes().splitlines()) == len(site.audit()) == 1


def test_sighup_reopens_the_audit_log_whatever_is_wrong_with_the_policy(site: Site) -> None:
    rotated = site.audit_path.with_suffix(".1")
    with running(site) as broker:
        broker.says()
        site.audit_path.rename(rotated)
        (site.made.directory / "policy.toml").write_bytes(b"version = " + b"1" * 5000)
        broker.process.send_signal(signal.SIGHUP)
        assert (broker.says()["class"], broker.says()["event"]) == ("ConfigError", "policy_kept")
        asyncio.run(site.attest())
    assert (rotated.read_bytes(), len(site.audit())) == (b"", 1)


def test_a_broker_says_when_it_accepts_no_simulation(site: Site) -> None:
    command = arguments(site)
    index = command.index("--unsafe-simulation-roots")
    with subprocess.Popen(command[:index], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert Running(process).listening["simulation"] is False
        process.send_signal(signal.SIGTERM)


BAD_VALUE, NOT_FOUND = "value is out of range or malformed", "file not found or not readable"


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("listen", "nowhere", ("listen", BAD_VALUE)),
        ("listen", "192.0.2.1:8443", ("listen", BAD_VALUE)),
        ("tls_cert", "/nonexistent", ("tls-cert", NOT_FOUND)),
        ("tls_key", "/nonexistent", ("tls-key", NOT_FOUND)),
        ("tls_cert", "{}/ca.pem", ("tls-cert", BAD_VALUE)),
        ("policy", "/nonexistent", ("policy", NOT_FOUND)),
        ("policy", "{}/token.pub", (None, "file is not valid TOML")),
        ("keys", "/nonexistent", ("keys", NOT_FOUND)),
        ("token_key", "/nonexistent", ("token-key", NOT_FOUND)),
        ("token_key", "{}/token.pub", ("token-key", BAD_VALUE)),
        ("audit", "/nonexistent/audit", ("audit", NOT_FOUND)),
        ("endorsements", "/nonexistent", ("endorsements", NOT_FOUND)),
        ("tdx_collateral", "/nonexistent", ("tdx-collateral", NOT_FOUND)),
        ("amd_crls", "/nonexistent", ("amd-crls", NOT_FOUND)),
        ("unsafe_simulation_roots", "{}", ("unsafe-simulation-roots", NOT_FOUND)),
    ],
)
def test_a_broker_does_not_start_with_a_part_it_cannot_use(
    site: Site, flag: str, value: str, expected: tuple[str | None, str]
) -> None:
    assert refused(arguments(site, **{flag: value.format(site.made.directory)})) == expected


@pytest.mark.parametrize("name", ["token", "tls"])
def test_a_private_key_that_others_can_read_is_refused(site: Site, name: str) -> None:
    (site.made.directory / f"{name}.key").chmod(0o640)
    assert refused(arguments(site)) == (f"{name}-key", BAD_VALUE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["token", "tls"])
def test_a_private_key_of_another_user_is_refused(site: Site, name: str) -> None:
    os.chown(site.made.directory / f"{name}.key", 1234, 1234)
    assert refused(arguments(site)) == (f"{name}-key", BAD_VALUE)


def test_guests_cannot_write_to_the_brokers_stderr(site: Site) -> None:
    def collect(data: RuntimeData) -> CompositeEvidence:
        evidence = site.collect(data)
        leaf, *issuers = evidence.primary.cert_chain
        country = leaf.replace(b"\x55\x04\x03\x0c\x08SEV", b"\x55\x04\x06\x0c\x08SEV")  # of two letters; `cryptography` warns
        assert country != leaf
        return replace(evidence, primary=replace(evidence.primary, cert_chain=(country, *issuers)))

    with running(site) as broker:
        broker.says()
        with pytest.raises(KeyReleaseDeniedError):
            asyncio.run(site.attest(collect=collect))
        broker.process.send_signal(signal.SIGTERM)
        assert broker.process.communicate(timeout=60) == (b"", b"")


def test_missing_arguments_are_a_usage_error() -> None:
    done = subprocess.run([*COMMAND, "--listen", "127.0.0.1:0"], capture_output=True, timeout=60, check=False)
    assert done.returncode == EXIT_USAGE and b"--policy" in done.stderr and b"--listen," not in done.stderr


# --- a relay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def relay(tmp_path: Path, machine: SimulatedMachine) -> Iterator[RelaySite]:
    with upstream(machine) as kbs:
        (tmp_path / "upstream.pem").write_bytes(pem(UPSTREAM_CA))
        yield RelaySite(tmp_path, machine, kbs)


def relay_arguments(relay: RelaySite, **changes: str) -> list[str]:
    directory = relay.made.directory
    flags = {
        "listen": "127.0.0.1:0",
        "tls-cert": str(directory / "tls.pem"),
        "tls-key": str(directory / "tls.key"),
        "audit": str(relay.audit_path),
        "upstream": relay.kbs.url,
        "upstream-ca": str(directory.parent / "upstream.pem"),
        "upstream-server-name": UPSTREAM_NAME,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [*COMMAND, *(part for name, value in flags.items() for part in (f"--{name}", value))]


@contextmanager
def relaying(relay: RelaySite, **changes: str) -> Iterator[Running]:
    process = subprocess.Popen(relay_arguments(relay, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        broker = Running(process)
        relay.port = int(broker.listening["address"].rpartition(":")[2])
        yield broker
    finally:
        process.kill()
        process.communicate()


async def health(relay: RelaySite) -> int:
    async with relay.channel() as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        return int(answer.status)


def test_a_relay_hands_out_the_keys_of_the_kbs_and_sigterm_ends_it(relay: RelaySite) -> None:
    with relaying(relay) as broker:
        assert broker.listening == {
            "event": "listening",
            "address": f"127.0.0.1:{relay.port}",
            "upstream": relay.kbs.url,
        }
        assert broker.says() == {"event": "upstream", "reachable": True}
        assert asyncio.run(health(relay)) == health_pb2.HealthCheckResponse.SERVING
        _, _, sealed = asyncio.run(relay.boot())
        assert sealed.key_id == URI
        rotated = relay.audit_path.with_suffix(".1")
        relay.audit_path.rename(rotated)
        broker.process.send_signal(signal.SIGHUP)
        broker.process.send_signal(signal.SIGTERM)
        stdout, stderr = broker.process.communicate(timeout=60)
        assert (broker.process.returncode, stdout, stderr) == (0, b"", b"")
    assert (len(rotated.read_bytes().splitlines()), relay.audit()) == (2, [])


def test_the_health_of_a_relay_is_that_of_its_kbs(relay: RelaySite) -> None:
    with relaying(relay, upstream="https://127.0.0.1:1") as broker:
        assert broker.says() == {"event": "upstream", "reachable": False}
        assert asyncio.run(health(relay)) == health_pb2.HealthCheckResponse.NOT_SERVING


def usage(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stdout) == (EXIT_USAGE, ""), done
    return done.stderr


@pytest.mark.parametrize(
    "option", ["policy", "keys", "token-key", "endorsements", "tdx-collateral", "amd-crls", "unsafe-simulation-roots"]
)
def test_a_relay_takes_nothing_that_only_an_authority_has(relay: RelaySite, option: str) -> None:
    text = usage([*relay_arguments(relay), f"--{option}", "x"])
    assert f"not with --upstream, where a Trustee KBS decides and has the keys: --{option}\n" in text


def test_every_option_is_an_authoritys_a_relays_or_both() -> None:
    text = subprocess.run([*COMMAND, "--help"], capture_output=True, timeout=60, check=True, text=True).stdout
    groups = (broker._REQUIRED, broker._OF_AN_AUTHORITY, broker._OPTIONS_OF_AN_AUTHORITY)
    known = {name.replace("_", "-") for group in (*groups, broker._OF_A_RELAY, broker._OPTIONS_OF_A_RELAY) for name in group}
    assert set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) == known


def test_half_a_relay_is_a_usage_error(site: Site) -> None:
    assert "required: --upstream-ca" in usage([*COMMAND, "--upstream", "https://kbs", *_LISTENING])
    assert "required: --upstream\n" in usage([*COMMAND, "--upstream-ca", "ca.pem", *_LISTENING])
    assert "only with --upstream: --upstream-server-name" in usage([*arguments(site), "--upstream-server-name", "kbs"])


_LISTENING = ["--listen", "127.0.0.1:0", "--tls-cert", "x", "--tls-key", "x", "--audit", "x"]


@pytest.mark.parametrize(
    "url",
    [
        "http://kbs",
        "https://kbs/kbs/v0",
        "https://kbs:65536",
        "kbs:8080",
        "https://",
        "https://user@kbs",
        "https://kbs?x",
        "https://[::::]",
    ],
)
def test_an_upstream_without_tls_or_with_a_path_is_refused(relay: RelaySite, url: str) -> None:
    assert refused(relay_arguments(relay, upstream=url)) == ("upstream", "value is out of range or malformed")


def test_an_upstream_ca_that_is_none_is_refused(relay: RelaySite, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (tmp_path / "empty.pem").write_text("")
    for name in ("no.pem", "empty.pem"):
        assert refused(relay_arguments(relay, upstream_ca=str(tmp_path / name)))[0] == "upstream-ca"
    assert refused(relay_arguments(relay, upstream_ca=str(tmp_path / "absent.pem")))[0] == "upstream-ca"


# --- init -------------------------------------------------------------------------------------------------------------


def test_init_prints_what_starts_the_broker_and_what_the_guest_must_pin(tmp_path: Path) -> None:
    command = [*COMMAND, "init", str(tmp_path / "broker"), "--server-name", "kbs.example.com"]
    text = subprocess.run(command, capture_output=True, timeout=60, check=True, text=True).stdout
    flags = re.search(r"keyturn broker (--listen .*)", text)
    assert flags is not None and all(Path(path).exists() for path in re.findall(r"/\S+", flags[1]) if "audit" not in path)
    # The printed section replaces the one of the example configuration.
    example = re.sub(r"(?s)(server_name|ca_pem|token_keys) = .*?(?=\n\w+ =|\n\n\[)", "", config.EXAMPLE)
    printed = text[text.index("[broker]") :].removeprefix("[broker]\n")
    broker = config.parse(example.replace("[broker]\n", f"[broker]\n{printed}").encode()).config.broker
    assert broker.server_name == "kbs.example.com"
    assert broker.token_keys
    assert broker.token_keys[0].strip() == (tmp_path / "broker/token.pub").read_text().strip()


def test_no_secret_is_printed(site: Site) -> None:
    with running(site) as broker:
        asyncio.run(site.boot())
        broker.process.send_signal(signal.SIGTERM)
        stdout, stderr = broker.process.communicate(timeout=60)
    assert KEY not in stdout + stderr and KEY.hex().encode() not in stdout + stderr
