"""The stand-in says what api-server-rest says, byte for byte where a client could care."""

import http.client
import json
from collections.abc import Iterator

import pytest

from agent.evidence import Tee
from agent.evidence.ccel import RuntimeEvent, parse_event_log, parse_runtime_event
from agent.evidence.trustee_json import parse_evidence
from agent.jose import pack_b64url
from agent.sim.api_server_rest import VERSION, Components, serve
from agent.sim.machine import SimulatedMachine

AAEL = b'{"domain":"d","operation":"o","content":"c"}'


@pytest.fixture
def components(machine: SimulatedMachine) -> Components:
    return Components(machine.attester(), machine.gpu_system(), token=lambda: "a.b.c", resources={"r/t/g": b"resource"})


@pytest.fixture
def url(components: Components) -> Iterator[str]:
    with serve(components) as served:
        yield served


def ask(url: str, target: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str | None, bytes]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, target, body)
        answer = connection.getresponse()
        assert answer.headers["Content-Length"] is not None
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def over(data: bytes) -> str:
    return f"runtime_data={pack_b64url(data)}&encoding=base64"


def test_info_leaves_out_what_there_is_not(components: Components, url: str) -> None:
    whole = {"version": VERSION, "tee": "snp", "additional_tees": ["nvidia"], "feature": "all"}
    assert json.loads(ask(url, "/info")[2]) == whole
    components.gpus = None
    assert json.loads(ask(url, "/info")[2]) == {name: whole[name] for name in ("version", "tee", "feature")}
    components.feature = "resource"
    assert json.loads(ask(url, "/info")[2]) == {"version": VERSION, "feature": "resource"}


@pytest.mark.parametrize(
    ("method", "target", "feature", "answer"),
    [
        ("GET", "/", "all", (404, "URL NOT FOUND")),
        ("GET", "/aa/other", "all", (404, "URL NOT FOUND")),
        ("GET", "/cdh/other/x", "all", (404, "URL NOT FOUND")),
        ("POST", "/aa/evidence", "all", (404, "URL NOT FOUND")),
        ("POST", "/info", "all", (405, "Method Not Allowed")),
        ("GET", "/aa/token?token_type=kbs", "resource", (404, "Attestation Feature Not Enabled")),
        ("GET", "/cdh/resource/r/t/g", "attestation", (404, "Resource Feature Not Enabled")),
        ("GET", "/aa/token", "all", (400, "BAD REQUEST")),
        ("GET", "/aa/evidence", "all", (400, "BAD REQUEST")),
        ("GET", "/aa/evidence?runtime_data=AA&encoding=hex", "all", (400, "BAD REQUEST")),
        ("GET", "/aa/evidence?runtime_data=A&encoding=base64", "all", (400, "BAD REQUEST")),
        ("GET", f"/aa/evidence?{over(bytes(65))}", "all", (500, "[ERROR:attestation-agent] AA getting evidence failed")),
        ("GET", "/cdh/resource/r/t/other", "all", (500, "[CDH] [ERROR]: Get Resource failed")),
        ("POST", "/aa/aael", "all", (500, "Illegal AAEL eventry format")),
    ],
)
def test_what_it_refuses_it_refuses_in_the_real_words(
    components: Components, url: str, method: str, target: str, feature: str, answer: tuple[int, str]
) -> None:
    components.feature = feature
    status, kind, body = ask(url, target, method, b"{}" if method == "POST" else None)
    assert (status, kind, body.decode()) == (answer[0], None, answer[1])


def test_token_resource_and_evidence_are_octets(components: Components, url: str) -> None:
    assert ask(url, "/cdh/resource/r/t/g") == (200, "application/octet-stream", b"resource")
    status, kind, token = ask(url, "/aa/token?token_type=kbs")
    assert (status, kind, json.loads(token)["token"]) == (200, "application/octet-stream", "a.b.c")
    status, kind, evidence = ask(url, f"/aa/evidence?{over(b'short')}")
    assert (status, kind) == (200, "application/octet-stream")
    assert parse_evidence(Tee.SNP, evidence).report[0x50:0x90] == b"short".ljust(64, b"\0")


def test_without_the_encoding_the_text_itself_is_the_data(components: Components, url: str) -> None:
    for target in ("/aa/evidence?runtime_data=xxxx", "/aa/evidence?runtime_data=xxxx&encoding=base64"):
        components.knows_base64 = "encoding" not in target
        assert parse_evidence(Tee.SNP, ask(url, target)[2]).report[0x50:0x90] == b"xxxx".ljust(64, b"\0")


def test_sample_evidence_is_not_padded() -> None:
    with serve(Components(None)) as url:
        assert ask(url, "/aa/evidence?runtime_data=xxxx")[2] == b'{"svn":"1","report_data":"eHh4eA=="}'


def test_a_measurement_is_answered_in_text(machine: SimulatedMachine, components: Components, url: str) -> None:
    unsupported = b'{"success":"false","message": "The platform does not support runtime measurement"}'
    assert ask(url, "/aa/aael", "POST", AAEL) == (200, "application/json", unsupported)
    components.attester, components.runtime = machine.attester(Tee.TDX), machine.runtime(Tee.TDX)
    assert ask(url, "/aa/aael", "POST", AAEL) == (200, "application/json", b'{"success":"true"}')
    components.enables_log = False
    not_enabled = b'{"success":"false","message": "Attestation Agent does not enable eventlog recording"}'
    assert ask(url, "/aa/aael", "POST", AAEL) == (200, "application/json", not_enabled)
    assert components.entries == [("d", "o", "c")]


def test_the_evidence_of_a_td_has_its_log(machine: SimulatedMachine, components: Components, url: str) -> None:
    components.attester, components.runtime = machine.attester(Tee.TDX), machine.runtime(Tee.TDX)
    ask(url, "/aa/aael", "POST", AAEL)
    evidence = parse_evidence(Tee.TDX, ask(url, f"/aa/evidence?{over(b'short')}")[2])
    assert parse_runtime_event(parse_event_log(evidence.event_log).events[-1]) == RuntimeEvent("d", "o", "c")


def test_when_its_agent_is_dead_info_ends_without_an_answer(components: Components, url: str) -> None:
    components.dead = True
    with pytest.raises(http.client.RemoteDisconnected):
        ask(url, "/info")
