import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.errors import AgentError, GuestApiError, GuestApiProblem, KeyNotDeliveredError, Owner
from agent.evidence import Tee
from agent.guest.api_server import (
    MAX_HEAD_BYTES,
    MAX_INFO_BYTES,
    MAX_MEASUREMENT_ANSWER_BYTES,
    ApiServer,
    Info,
    Measured,
)
from agent.keys import SecretBuffer
from agent.sim.api_server_rest import Components, serve
from agent.sim.machine import SimulatedMachine
from tests.raw_http import answers
from tests.world import free_port

KEY = bytes(range(50, 82))
NAME = "models/tiny/1"
URI = f"kbs:///{NAME}"
CANARY = b"canary-peer-text"


def ok(body: bytes, *more: bytes) -> bytes:
    """A good answer as hyper writes it, with more header lines."""
    lines = [b"HTTP/1.1 200 OK", b"content-type: application/json", b"content-length: %d" % len(body), *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(line: bytes) -> bytes:
    return b"HTTP/1.1 " + line + b"\r\ncontent-length: %d\r\n\r\n" % len(CANARY) + CANARY


def resource(api: ApiServer) -> bytes:
    secret = SecretBuffer(32)
    with secret.view() as view:
        api.resource(URI, view, (32).__eq__)
        return bytes(view)


# --- what the real one says -------------------------------------------------------------------------------------------


def test_info_says_which_tee_and_what_is_served(machine: SimulatedMachine) -> None:
    components = Components(machine.attester())
    with serve(components) as url:
        api = ApiServer(url)
        assert api.info() == Info("snp", "all")
        components.feature = "resource"
        assert api.info() == Info(None, "resource")


@pytest.mark.parametrize(
    ("feature", "lacks"),
    [("all", set()), ("resource", {"attestation"}), ("attestation", {"resource"}), (None, set())],
)
def test_only_what_a_server_says_it_lacks_is_lacking(feature: str | None, lacks: set[str]) -> None:
    assert {name for name in ("attestation", "resource") if Info("snp", feature).lacks(name)} == lacks


def test_a_key_is_fetched_by_the_path_of_its_uri_into_the_callers_memory() -> None:
    components = Components(None, resources={"models/tiny/1": KEY})
    with serve(components) as url:
        assert resource(ApiServer(url)) == KEY
    assert components.asked == ["/cdh/resource/models/tiny/1"]


FETCHING = """
import sys
from agent.guest.api_server import ApiServer
from agent.keys import SecretBuffer
secret = SecretBuffer(32)
ApiServer(sys.argv[1]).resource(sys.argv[2], secret.view(), (32).__eq__)
print("fetched", flush=True)
sys.stdin.readline()
secret.wipe()
print("wiped", flush=True)
sys.stdin.readline()
"""


def test_a_key_lies_in_the_callers_memory_and_nowhere_else_in_the_process() -> None:
    key = os.urandom(32)
    with serve(Components(None, resources={NAME: key})) as url:
        command = [sys.executable, "-c", FETCHING, url, URI]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            assert process.stdout.readline() == "fetched\n"
            assert copies(process.pid, key) == 1
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "wiped\n"
            assert copies(process.pid, key) == 0


def copies(pid: int, secret: bytes) -> int:
    """How often it lies in the writable memory of a process."""
    found = 0
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                place, mode, *_ = line.split()
                start, end = (int(number, 16) for number in place.split("-"))
                if "rw" in mode:
                    memory.seek(start)
                    found += memory.read(end - start).count(secret)
    except PermissionError:
        pytest.skip("this kernel lets nobody look into a process")
    return found


def test_the_token_is_taken_and_the_private_key_beside_it_is_not() -> None:
    with serve(Components(None, token=lambda: "a.b.c")) as url:
        assert ApiServer(url).token() == "a.b.c"


@pytest.mark.parametrize("outcome", Measured)
def test_a_measurement_is_taken_not_supported_or_not_enabled(outcome: Measured, machine: SimulatedMachine) -> None:
    components = Components(None, enables_log=outcome is not Measured.NOT_ENABLED)
    if outcome is Measured.EXTENDED:
        components.runtime = machine.runtime(Tee.TDX)
    with serve(components) as url:
        assert ApiServer(url).measure("keyturn", "LoadModel", '{"digest":"sha256:00"}') is outcome
    entries = [("keyturn", "LoadModel", '{"digest":"sha256:00"}')]
    assert components.entries == (entries if outcome is Measured.EXTENDED else [])


def test_no_devices_are_no_evidence() -> None:
    with serve(Components(None)) as url:
        assert ApiServer(url).additional_evidence(bytes(32)) is None


# --- what it refuses --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    name: str
    components: Components
    ask: Callable[[ApiServer], object]
    problem: GuestApiProblem
    code: int = 0
    error: type[GuestApiError] = GuestApiError


def refused_key(name: str, resources: dict[str, bytes], problem: GuestApiProblem, code: int = 0) -> Refusal:
    return Refusal(name, Components(None, resources=resources), resource, problem, code, KeyNotDeliveredError)


REFUSALS = [
    Refusal(
        "no attestation",
        Components(None, feature="resource"),
        lambda api: api.evidence(bytes(48)),
        GuestApiProblem.NOT_SERVED,
        404,
    ),
    Refusal("no resources", Components(None, feature="attestation"), resource, GuestApiProblem.NOT_SERVED, 404),
    Refusal("no token", Components(None), lambda api: api.token(), GuestApiProblem.FAILED, 500),
    Refusal("agent that does not answer", Components(None, dead=True), lambda api: api.info(), GuestApiProblem.LOST),
    refused_key("no such resource", {}, GuestApiProblem.FAILED, 500),
    refused_key("short key", {NAME: KEY[:-1]}, GuestApiProblem.MALFORMED),
    refused_key("long key", {NAME: KEY + b"\n"}, GuestApiProblem.TOO_LARGE),
    refused_key("empty key", {NAME: b""}, GuestApiProblem.MALFORMED),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_a_resource_of_another_length_is_no_key(refusal: Refusal) -> None:
    """And every other refusal of the real server, each asked for once."""
    refusal.components.asked.clear()
    with serve(refusal.components) as url, pytest.raises(GuestApiError) as caught:
        refusal.ask(ApiServer(url))
    assert (type(caught.value), caught.value.problem, caught.value.status) == (refusal.error, refusal.problem, refusal.code)
    assert caught.value.owner is (Owner.AUTHORITY if refusal.error is KeyNotDeliveredError else Owner.OPERATOR)
    assert not caught.value.retryable
    assert len(refusal.components.asked) == 1


# --- bad answers ------------------------------------------------------------------------------------------------------

_MALFORMED, _LOST, _TIMEOUT = GuestApiProblem.MALFORMED, GuestApiProblem.LOST, GuestApiProblem.TIMEOUT
INFO = b'{"version":"v0","tee":"snp","feature":"all"}'

BAD_ANSWERS: list[tuple[str, bytes, GuestApiProblem]] = [
    ("nothing", b"", _LOST),
    ("not HTTP", b"SSH-2.0-" + CANARY + b"\r\n\r\n", _MALFORMED),
    ("HTTP/2", b"HTTP/2 200\r\ncontent-length: 2\r\n\r\n{}", _MALFORMED),
    ("no status", b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\n{}", _MALFORMED),
    ("bare line feeds", ok(INFO).replace(b"\r\n", b"\n"), _LOST),
    ("endless head", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * MAX_HEAD_BYTES, _MALFORMED),
    ("head without end", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", _LOST),
    ("header without a colon", b"HTTP/1.1 200 OK\r\n" + CANARY + b"\r\n\r\n", _MALFORMED),
    ("folded header", ok(INFO, b" folded: x"), _MALFORMED),
    ("space before the colon", ok(INFO, b"a : x"), _MALFORMED),
    ("no length", b"HTTP/1.1 200 OK\r\n\r\n" + INFO, _MALFORMED),
    ("length twice", ok(INFO, b"Content-Length: %d" % len(INFO)), _MALFORMED),
    ("negative length", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", _MALFORMED),
    ("huge length", b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", _MALFORMED),
    ("too large", ok(b" " * MAX_INFO_BYTES + b"{}"), GuestApiProblem.TOO_LARGE),
    ("chunked", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", _MALFORMED),
    ("chunked with a length", ok(INFO, b"transfer-encoding: chunked"), _MALFORMED),
    ("short body", ok(INFO)[:-1], _LOST),
    ("empty body", ok(b""), _MALFORMED),
    ("not JSON", ok(CANARY), _MALFORMED),
    ("not an object", ok(b"[]"), _MALFORMED),
    ("member twice", ok(b'{"tee":"snp","tee":"tdx"}'), _MALFORMED),
    ("TEE of another type", ok(b'{"tee":1,"feature":"all"}'), _MALFORMED),
    ("not UTF-8", ok(b'{"tee":"\xff"}'), _MALFORMED),
    ("deep nesting", ok(b'{"a":' + b"[" * 2000), _MALFORMED),
    ("redirect", status(b"302 Found"), GuestApiProblem.STATUS),
    ("continue", status(b"100 Continue"), GuestApiProblem.STATUS),
    ("no content", status(b"204 No Content"), GuestApiProblem.STATUS),
    ("bad request", status(b"400 Bad Request"), GuestApiProblem.STATUS),
    ("forbidden", status(b"403 Forbidden"), GuestApiProblem.FORBIDDEN),
    ("not found", status(b"404 Not Found"), GuestApiProblem.NOT_SERVED),
    ("another method", status(b"405 Method Not Allowed"), GuestApiProblem.NOT_SERVED),
    ("failure", status(b"500 Internal Server Error"), GuestApiProblem.FAILED),
    ("proxy", status(b"502 Bad Gateway"), GuestApiProblem.STATUS),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "problem"), [row[1:] for row in BAD_ANSWERS], ids=[row[0] for row in BAD_ANSWERS])
def test_a_bad_answer_is_one_typed_error(answer: bytes, problem: GuestApiProblem) -> None:
    with answers(answer) as url, pytest.raises(GuestApiError) as caught:
        ApiServer(url, timeout_s=5).info()
    assert caught.value.problem is problem
    assert caught.value.call == "info"
    assert CANARY.decode() not in repr(caught.value) + str(caught.value)
    assert caught.value.__cause__ is None


def test_a_good_answer_in_the_same_bytes_is_taken() -> None:
    """The table above looks at something."""
    with answers(ok(INFO)) as url:
        assert ApiServer(url).info() == Info("snp", "all")


@pytest.mark.parametrize("answer", [b"", ok(INFO)[:-1], ok(INFO)[:20]], ids=["silence", "body without end", "head without end"])
def test_a_peer_that_says_no_more_ends_in_a_timeout(answer: bytes) -> None:
    with answers(answer, stays=True) as url, pytest.raises(GuestApiError) as caught:
        ApiServer(url, timeout_s=0.3).info()
    assert caught.value.problem is _TIMEOUT


def test_a_peer_that_drips_ends_in_a_timeout() -> None:
    began = time.monotonic()
    with answers(ok(INFO), drip_s=0.05) as url, pytest.raises(GuestApiError) as caught:
        ApiServer(url, timeout_s=0.4).info()
    assert caught.value.problem is _TIMEOUT
    assert time.monotonic() - began < 5


def test_no_time_is_no_request() -> None:
    with answers(ok(INFO)) as url, pytest.raises(GuestApiError) as caught:
        ApiServer(url, timeout_s=0).info()
    assert caught.value.problem is _TIMEOUT


def test_nobody_there_is_told_apart() -> None:
    with pytest.raises(GuestApiError) as caught:
        ApiServer(f"http://127.0.0.1:{free_port()}").info()
    assert caught.value.problem is GuestApiProblem.REFUSED


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"success": True},
        {"success": "true", "message": "but"},
        {"success": "false"},
        {"success": "false", "message": CANARY.decode()},
        {"success": "false", "message": 1},
        {"success": "true", "message": None, "pad": "x" * MAX_MEASUREMENT_ANSWER_BYTES},
    ],
)
def test_an_outcome_of_a_measurement_that_is_none_of_three_is_an_error(answer: dict[str, object]) -> None:
    with answers(ok(json.dumps(answer).encode())) as url, pytest.raises(GuestApiError):
        ApiServer(url).measure("keyturn", "LoadModel", "x")


@pytest.mark.parametrize("answer", [b"{}", b'{"token":1}', b'{"token":null,"tee_keypair":"canary"}', b"canary"])
def test_an_answer_without_a_token_is_malformed(answer: bytes) -> None:
    with answers(ok(answer)) as url, pytest.raises(GuestApiError) as caught:
        ApiServer(url).token()
    assert caught.value.problem is _MALFORMED


def test_what_a_key_answer_brings_behind_the_key_is_not_read() -> None:
    with answers(b"HTTP/1.1 200 OK\r\ncontent-length: 32\r\n\r\n" + KEY + CANARY) as url:
        assert resource(ApiServer(url)) == KEY


@pytest.mark.parametrize("url", ["http://127.0.0.1:8006", "http://[::1]:8006", "http://127.9.9.9:1"])
def test_loopback_addresses_of_both_kinds_can_be_asked(url: str) -> None:
    with pytest.raises(AgentError):
        ApiServer(url, timeout_s=1).info()
