"""The probe against real servers: each speaks raw HTTP in its own bad way, as a child process of its own."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from agent.errors import Unready
from agent.server import Placement, ProbeRequest, RunningServer, ServerPlan
from agent.server.probe import MAX_BODY_BYTES, QUESTION_TIMEOUT_S, Probe, _ask, _listeners, start_probe
from agent.server.process import ServerProcess, spawn
from tests.children import DEADLINE_S, IS_ROOT, NOBODY, gone, in_child, python, readable
from tests.test_server_process import PLAN, drain_until

# `answer(line, body, send)` is called for each request and sends what it likes. The request lines are printed.
SERVER = """
import os, socket, sys
listening = socket.socket(fileno=77)
requests = 0
MODELS = b'{"data": [{"id": "other"}, {"id": "tiny"}]}'
def reply(status, body=b'{}', *headers):
    head = [b'HTTP/1.1 ' + status, b'Content-Length: %d' % len(body), *headers]
    return b'\\r\\n'.join(head) + b'\\r\\n\\r\\n' + body
def good(line):
    return reply(b'200 OK', MODELS if b' /v1/models ' in line else b'{"status": "ok"}')
"""
LOOP = """
while True:
    connection, _ = listening.accept()
    with connection, connection.makefile('rb') as request:
        line = request.readline()
        length = 0
        while (header := request.readline().lower()) not in (b'\\r\\n', b''):
            if header.startswith(b'content-length:'): length = int(header.split(b':')[1])
            if header.startswith(b'authorization:'): print(header.decode().strip(), flush=True)
        body = request.read(length)
        requests += 1
        print(line.decode().split(' HTTP')[0], body.decode() or '-', flush=True)
        try: answer(line, connection.sendall)
        except OSError: pass
"""
GOOD = "def answer(line, send): send(good(line))\n"
ASKED_IN_FULL = 'GET /health -\nGET /v1/models -\nPOST /completion {"n_predict": 1}\n'


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the supervisor saw: reasons in order, the running server if it came to that, and what the server was asked."""

    reasons: list[Unready]
    running: bool
    asked: str
    waited_s: float


def asked(
    answer: str,
    *,
    until: Unready | None = None,
    listen: bool = True,
    family: socket.AddressFamily = socket.AF_INET,
    **changes: object,
) -> Seen:
    """Start a server that answers like `answer` and a probe; wait for reason `until`, or for the probe's end."""

    def scenario() -> Seen:
        bound = socket.socket(family)
        bound.bind(("127.0.0.1" if family is socket.AF_INET else "::1", 0))
        if listen:  # else nobody does, and nobody else can
            bound.listen()
        port = bound.getsockname()[1]
        os.dup2(bound.detach(), 77)
        plan = plan_for(port, SERVER + answer + LOOP, **changes)
        began = time.monotonic()
        server = spawn(plan, Placement("", "", "", descriptors=(77,)))
        os.close(77)
        probe = start_probe(plan)
        reasons, running = watch(probe, server, until)
        waited_s = time.monotonic() - began
        server.drain()
        seen = Seen(reasons, running is not None, server.output.tail().decode(), waited_s)
        if running is not None:
            assert running.pid == server.pid
            assert 0 < running.ready_after_ms <= waited_s * 1000 + 1
        server.destroy()
        assert gone([probe.pid, server.pid])
        return seen

    return in_child(scenario)


def plan_for(port: int, program: str, **changes: object) -> ServerPlan:
    standard: dict[str, object] = {
        "models_path": "/v1/models",
        "model_id": "tiny",
        "probe": ProbeRequest("/completion", '{"n_predict": 1}', frozenset({200})),
    }
    return dataclasses.replace(
        PLAN,
        argv=(python(), "-I", "-S", "-c", program),
        port=port,
        **standard | changes,  # type: ignore[arg-type]
    )


def watch(probe: Probe, server: ServerProcess, until: Unready | None) -> tuple[list[Unready], RunningServer | None]:
    """The supervisor's part, for one probe: read reasons while it runs, finish it when it has ended."""
    reasons: list[Unready] = []
    while readable(probe.fd):
        if not probe.read():
            return reasons, probe.finish(server)
        reasons.append(probe.last_reason)
        if probe.last_reason is until:
            probe.stop()
            return reasons, None
    raise AssertionError(f"nothing happened in {DEADLINE_S} s after {reasons}")


def test_server_that_answers_everything_is_ready_and_was_asked_everything_once() -> None:
    seen = asked(GOOD)
    assert seen.running
    assert seen.asked == ASKED_IN_FULL


def test_only_what_the_plan_asks_is_asked() -> None:
    seen = asked(GOOD, models_path=None, model_id=None, probe=None)
    assert seen.running
    assert seen.asked == "GET /health -\n"


def test_port_that_nobody_listens_on_is_no_answer() -> None:
    assert asked(GOOD, until=Unready.NO_ANSWER, listen=False).reasons == [Unready.NO_ANSWER]


def test_server_that_is_loading_becomes_ready_later() -> None:
    seen = asked("def answer(line, send): send(reply(b'503 Loading') if requests < 4 else good(line))\n")
    assert (seen.reasons, seen.running) == ([Unready.HEALTH], True)
    assert seen.asked == "GET /health -\n" * 3 + ASKED_IN_FULL


def test_health_codes_are_the_plans() -> None:
    answer = "def answer(line, send): send(good(line).replace(b'200 OK', b'203 Fine'))\n"
    assert asked(answer, until=Unready.HEALTH).reasons == [Unready.HEALTH]
    assert asked(answer, health_codes=frozenset({203}), probe=None).running


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_server_on_every_address_is_asked_on_the_loopback(host: str) -> None:
    assert asked(GOOD, host=host).running


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_server_on_ipv6_is_asked_on_the_loopback(host: str) -> None:
    assert asked(GOOD, family=socket.AF_INET6, host=host).running


def test_redirect_is_not_followed() -> None:
    redirect = "reply(b'302 Found', b'', b'Location: /elsewhere')"
    answer = f"def answer(line, send): send(good(line) if b'elsewhere' in line else {redirect})\n"
    seen = asked(answer, until=Unready.HEALTH)
    assert (seen.reasons, seen.running) == ([Unready.HEALTH], False)
    assert "elsewhere" not in seen.asked


def test_healthy_server_that_dies_on_its_first_request_is_not_ready() -> None:
    answer = "def answer(line, send): send(good(line)) if line.startswith(b'GET') else os._exit(1)\n"

    def scenario() -> tuple[Unready, bool]:
        bound = socket.create_server(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        os.dup2(bound.detach(), 77)
        plan = plan_for(port, SERVER + answer + LOOP)
        server = spawn(plan, Placement("", "", "", descriptors=(77,)))
        os.close(77)
        probe = start_probe(plan)
        assert readable(server.pidfd)
        while probe.last_reason is Unready.NO_ANSWER and readable(probe.fd):
            assert probe.read()
        reason = probe.last_reason
        probe.stop()
        return reason, server.destroy().status == 1

    assert in_child(scenario) == (Unready.PROBE, True)


@pytest.mark.parametrize("status", [b"500 Internal", b"401 Unauthorized", b"307 Temporary\\r\\nLocation: /completion"])
def test_request_that_is_answered_with_another_status_is_not_ready(status: bytes) -> None:
    answer = f"def answer(line, send): send(reply(b'{status.decode()}') if line.startswith(b'POST') else good(line))\n"
    seen = asked(answer, until=Unready.PROBE)
    assert (seen.reasons, seen.running) == ([Unready.PROBE], False)


@pytest.mark.parametrize(
    "listing",
    [
        '{"data": [{"id": "another"}]}',
        '{"data": []}',
        '{"data": {"id": "tiny"}}',
        '{"models": [{"id": "tiny"}]}',
        '["tiny"]',
        '"tiny"',
        '{"name": "other"}',
        '{"name": ["tiny"]}',
        '{"data": [], "name": "tiny"}',
        '{"data": [["tiny"], "tiny", null]}',
        "tiny",
        "[" * 20000,
        "\\xff",
    ],
)
def test_model_list_without_the_expected_id_is_not_ready(listing: str) -> None:
    answer = f"def answer(line, send): send(reply(b'200 OK', b'{listing}') if b' /v1/models ' in line else good(line))\n"
    seen = asked(answer, until=Unready.MODEL)
    assert (seen.reasons, seen.running) == ([Unready.MODEL], False)
    assert "POST" not in seen.asked


def test_a_v2_model_is_known_by_its_own_name() -> None:
    model = b'{"name": "tiny"}'
    answer = f"def answer(line, send): send(reply(b'200 OK', {model!r}) if b' /v2/models/tiny ' in line else good(line))\n"
    assert asked(answer, models_path="/v2/models/tiny").running


def test_model_list_that_is_missing_is_not_ready_even_without_an_expected_id() -> None:
    answer = "def answer(line, send): send(reply(b'404 Not Found') if b' /v1/models ' in line else good(line))\n"
    assert asked(answer, until=Unready.MODEL, model_id=None).reasons == [Unready.MODEL]


@pytest.mark.parametrize(
    "start_of_answer",
    [
        "b'HTTP/1.1 200 OK\\r\\n\\r\\n'",  # a body without end
        "b'HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n' + b'10000\\r\\n'",  # chunks without end
        "b'HTTP/1.1 200 OK\\r\\nX: '",  # a header without end
        "b''",  # nothing like HTTP
    ],
)
def test_answer_without_end_is_no_answer(start_of_answer: str) -> None:
    answer = f"""
def answer(line, send):
    send({start_of_answer})
    while True: send(b'x' * 65536)
"""
    assert asked(answer, until=Unready.NO_ANSWER).reasons == [Unready.NO_ANSWER]


def test_longest_answer_is_heard_and_one_byte_more_is_not() -> None:
    answer = "def answer(line, send): send(reply(b'200 OK', b'x' * %d))\n"
    longest = asked(answer % MAX_BODY_BYTES, models_path=None, model_id=None, probe=None)
    assert longest.running
    longer = asked(answer % (MAX_BODY_BYTES + 1), until=Unready.NO_ANSWER, models_path=None, model_id=None, probe=None)
    assert longer.reasons == [Unready.NO_ANSWER]


def test_answer_that_breaks_off_is_no_answer() -> None:
    answer = "def answer(line, send): send(b'HTTP/1.1 200 OK\\r\\nContent-Length: 9\\r\\n\\r\\n{}')\n"
    assert asked(answer, until=Unready.NO_ANSWER).reasons == [Unready.NO_ANSWER]


@pytest.mark.parametrize("drop", ["b'H'", "b'HTTP/1.1 100 Continue\\r\\n\\r\\n'"])
def test_slow_drip_is_cut_off_at_the_deadline_of_the_whole_answer(drop: str) -> None:
    answer = f"""
def answer(line, send):
    import time
    while True:
        send({drop})
        time.sleep(0.1)
"""
    seen = asked(answer, until=Unready.NO_ANSWER)
    assert seen.reasons == [Unready.NO_ANSWER]
    assert seen.waited_s >= QUESTION_TIMEOUT_S


def test_probe_shows_the_api_key() -> None:
    seen = asked(GOOD, authorization="Bearer key", models_path=None, model_id=None)
    health, key, request = seen.asked.splitlines()
    assert health == "GET /health -", "a health check is open, and is told nothing"
    assert key == "authorization: bearer key"
    assert request.startswith("POST ")


def test_probe_that_was_killed_has_not_found_the_server_ready() -> None:
    def scenario() -> RunningServer | None:
        plan = plan_for(1, "import signal; signal.pause()")
        server = spawn(plan, Placement("", "", ""))
        probe = start_probe(plan)
        os.kill(probe.pid, 9)
        while probe.read() if readable(probe.fd) else False:
            pass
        running = probe.finish(server)
        server.destroy()
        return running

    assert in_child(scenario) is None


def test_answers_of_somebody_else_do_not_make_a_dead_server_ready() -> None:
    def scenario() -> RunningServer | None:
        bound = socket.create_server(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        os.dup2(bound.detach(), 77)
        plan = plan_for(port, SERVER + GOOD + LOOP)
        somebody = spawn(plan, Placement("", "", "", descriptors=(77,)))
        server = spawn(plan_for(port, "raise SystemExit(1)"), Placement("", "", ""))
        assert readable(server.pidfd)
        reasons, running = watch(start_probe(plan), server, None)
        assert reasons == []
        server.destroy(spare={somebody.pid})
        somebody.destroy()
        return running

    assert in_child(scenario) is None


@pytest.mark.skipif(not IS_ROOT, reason="only root can change its user")
def test_probe_has_no_more_rights_than_the_server_and_no_descriptor_of_the_agent() -> None:
    def scenario() -> tuple[str, str, str, list[str]]:
        secret = os.memfd_create("weights")
        assert os.dup2(secret, 99) == 99
        plan = plan_for(1, "import signal; print('up', flush=True); signal.pause()")
        server = spawn(plan, Placement("", "", ""))
        drain_until(server, lambda: server.output.tail() == b"up\n")
        probe = start_probe(plan)
        assert readable(probe.fd) and probe.read()
        with open(f"/proc/{probe.pid}/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        targets = {os.readlink(f"/proc/{probe.pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{probe.pid}/fd")}
        probe.stop()
        server.destroy()
        return status["Uid"].split()[0], status["CapEff"], status["NoNewPrivs"], sorted(targets)

    assert in_child(scenario) == (str(NOBODY), "0" * 16, "1", ["/dev/null", "pipe"])


def table_of(*rows: tuple[str, int, int, str]) -> str:
    """Rows of (address, port, uid, state) as in /proc/net/tcp."""
    lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
    lines += [f"   0: {at}:{port:04X} 00000000:0000 {st} 0:0 00:0 0 {uid:5} 0 1" for at, port, uid, st in rows]
    return "\n".join(lines) + "\n"


def test_who_listens_on_a_port_is_read_from_the_kernels_table(tmp_path: Path) -> None:
    rows = [("0100007F", 8080, 65532, "0A"), ("00000000", 8080, 0, "0A"), ("0100007F", 8080, 7, "01"), ("0", 8081, 8, "0A")]
    (tmp_path / "tcp").write_text(table_of(*rows))
    tables = (str(tmp_path / "tcp"), str(tmp_path / "none"))
    assert _listeners(8080, tables) == {65532, 0}
    assert _listeners(9, tables) == set()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert _listeners(listener.getsockname()[1]) == {os.geteuid()}


@pytest.mark.skipif(not IS_ROOT, reason="only root can listen as somebody else")
def test_somebody_else_on_the_port_is_asked_nothing() -> None:
    def scenario() -> Unready:
        os.seteuid(NOBODY + 1)
        impostor = socket.create_server(("127.0.0.1", 0))
        os.seteuid(0)
        plan = plan_for(impostor.getsockname()[1], "import time; time.sleep(60)")
        server = spawn(plan, Placement("/model", None, "/"))
        probe = start_probe(plan)
        try:
            assert readable(probe.fd) and probe.read()
            return probe.last_reason
        finally:
            probe.stop()
            server.destroy()

    assert in_child(scenario) is Unready.FOREIGN_PORT


def test_a_chunk_of_negative_size_is_no_answer_and_is_not_read_to_its_end() -> None:
    taken: list[int] = []

    def serve(listening: socket.socket) -> None:
        for size in (b"-1", b"-5", b"-99999999999999999999"):
            with listening.accept()[0] as connection:
                connection.recv(64 << 10)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n")
                sent = 0
                with contextlib.suppress(OSError):  # the probe has hung up
                    while sent < 64:
                        connection.sendall(bytes(1 << 20))
                        sent += 1
                taken.append(sent)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve, args=(listening,))
        server.start()
        plan = dataclasses.replace(PLAN, port=listening.getsockname()[1])
        answers = [_ask(plan, "/health", None, QUESTION_TIMEOUT_S) for _ in range(3)]
        server.join(DEADLINE_S)
    assert answers == [None] * 3
    assert len(taken) == 3
    assert max(taken) < 64
