"""A KBS around the demo's guest: set up by its admin endpoints, ours and one that runs already."""

import json
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.broker import bootstrap
from agent.config import parse
from agent.demo import kbs, site
from agent.evidence import Tee
from agent.handshake.token import parse_token_key
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee, serve
from tests.raw_http import answers
from tests.test_demo_run import check_good, demo

MODEL = site.SealedModel(Path("layout"), "sha256:" + "ab" * 32, bytes(32), "cd" * 32, 1)


@pytest.fixture(params=["http", "https"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trustee]:
    """A KBS that runs already, by Trustee's defaults."""
    files = bootstrap.create(tmp_path / "files", "127.0.0.1", datetime.now(UTC))
    tls = ((files.directory / "tls.pem").read_bytes(), (files.directory / "tls.key").read_bytes())
    with serve(tls=tls if request.param == "https" else None) as running:
        yield running


class Calls:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    def __call__(self, method: str, path: str, status: int) -> None:
        self.seen.append((method, path, status))


def test_a_test_kbs_is_set_up_by_its_admin_endpoints_and_every_call_is_told(tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=0)
    called = Calls()
    with kbs.run_test_kbs(tmp_path, machine, called) as running:
        text = site.configuration_text(
            machine, Tee.SAMPLE, MODEL, running.section, {"source": "http://127.0.0.1:1/"}, 8080, None
        )
        broker = parse(text.encode()).config.broker
        assert (broker.url, broker.endpoints, broker.server_name) == (running.url, None, "localhost")
        running.approve(machine, Tee.SAMPLE, MODEL)
    assert called.seen == [
        ("POST", "/kbs/v0/resource/demo/all-minilm-l6-v2/1", 200),
        ("POST", "/kbs/v0/reference-value", 200),
        ("POST", "/kbs/v0/resource-policy", 200),
    ]


def test_the_guest_of_a_relay_knows_the_relay_and_the_attestation_service_and_no_kbs(tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=0)
    with kbs.run_relay(tmp_path, machine, Calls()) as running:
        text = site.configuration_text(machine, Tee.SNP, MODEL, running.section, {"source": "http://127.0.0.1:1/"}, 8080, None)
        broker = parse(text.encode()).config.broker
        assert (broker.url, broker.tokens, broker.server_name) == (None, "trustee", "localhost")
        assert broker.token_keys is not None
        assert broker.token_keys[0] == (tmp_path / "kbs" / "token.pub").read_text()
        assert broker.ca_pem == (tmp_path / "relay" / "ca.pem").read_text()
        assert running.url not in text


def test_a_foreign_kbs_says_itself_who_signs_its_tokens(foreign: Trustee) -> None:
    with kbs.use_kbs(foreign.url + "/", Calls()) as running:
        assert running.url == foreign.url
        ours = parse_token_key(foreign.token_key_pem).public_numbers()
        text = site.configuration_text(
            SimulatedMachine(Path("/m"), Path("/s"), b""),
            Tee.SAMPLE,
            MODEL,
            running.section,
            {"source": "http://127.0.0.1:1/"},
            8080,
            None,
        )
        broker = parse(text.encode()).config.broker
    assert broker.token_keys is not None
    assert parse_token_key(broker.token_keys[0]).public_numbers() == ours
    assert (broker.ca_pem is None) == foreign.url.startswith("http:")


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_coordinate_without_its_leading_zeros_is_one(name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    while getattr(key.public_key().public_numbers(), name) >> 248:  # one in 256
        key = ec.generate_private_key(ec.SECP256R1())
    with serve(token_key_pem=key_pem_of(key)) as foreign, kbs.use_kbs(foreign.url, Calls()) as running:
        broker = tomllib.loads(running.section)
    assert parse_token_key(broker["token_keys"][0]).public_numbers() == key.public_key().public_numbers()


def key_pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"nonce": 1}'])
def test_somebody_elses_server_is_no_kbs(body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    with answers(head + body) as url, pytest.raises(kbs.KbsRefusedError, match="/auth"), kbs.use_kbs(url, Calls()):
        pass


@pytest.mark.parametrize("token", [None, 7, "", "x.y.z", "e30.e30.e30", "eyJqd2siOnt9fQ.x.y", "eyJqd2siOjd9.x.y"])
def test_a_token_without_a_key_is_told(token: object) -> None:
    auth, attest = json.dumps({"nonce": "n"}).encode(), json.dumps({"token": token}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    said = [head % len(body) + body for body in (auth, attest)]
    with answers(*said) as url, pytest.raises(kbs.KbsRefusedError, match="no token"), kbs.use_kbs(url, Calls()):
        pass


def test_a_url_of_https_with_nobody_or_no_tls_behind_it_is_told() -> None:
    with pytest.raises(kbs.KbsRefusedError), kbs.use_kbs("https://127.0.0.1:1", Calls()):
        pass
    with answers(b"no TLS") as url, pytest.raises(kbs.KbsRefusedError), kbs.use_kbs(url.replace("http", "https"), Calls()):
        pass


def test_a_kbs_with_closed_administration_is_told_by_its_call(foreign: Trustee, tmp_path: Path) -> None:
    foreign.admin_allowed = False
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=0)
    with kbs.use_kbs(foreign.url, Calls()) as running, pytest.raises(kbs.KbsRefusedError, match="open admin API"):
        running.approve(machine, Tee.SAMPLE, MODEL)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::::]", "https://127.0.0.1:99999", "http://..."])
def test_nobody_at_the_url_is_told(url: str) -> None:
    with pytest.raises(kbs.KbsRefusedError), kbs.use_kbs(url, Calls()):
        pass


def test_a_guest_boots_against_a_kbs_that_runs_already(foreign: Trustee) -> None:
    status, result, events = demo("--once", "--broker", foreign.url)
    check_good(status, result)
    calls = [event for event in events if event["event"] == "kbs_called"]
    assert [(call["method"], call["path"], call["status"]) for call in calls] == [
        ("POST", "/kbs/v0/auth", 200),
        ("POST", "/kbs/v0/attest", 200),
        ("POST", "/kbs/v0/resource/demo/all-minilm-l6-v2/1", 200),
        ("POST", "/kbs/v0/reference-value", 200),
        ("POST", "/kbs/v0/resource-policy", 200),
    ]
    opened = next(event for event in events if event["event"] == "attester_opened")
    assert opened["tee"] == "sample"
