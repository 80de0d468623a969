"""HTTP to a KBS: bounds on bytes and time, and nothing but the measured peer. What it carries is `rcar_client`'s test."""

import asyncio
import time

import pytest

from agent.closed import Ident
from agent.errors import AgentError, BrokerUnreachableError, ProtocolProblem, RemoteProtocolError, Unreachable
from agent.handshake.kbs_http import KbsHttp, Question
from agent.handshake.rcar import MAX_ANSWER_BYTES, Answer
from tests.hostile_kbs import CA, LEAF, NAME, Kbs, Say, answer, raw, says, served
from tests.tls import Signer, pem

STATE = Ident("START")
GET = Question("/kbs/v0/auth", {"X-Extra": "1"}, None)
POST = Question("/kbs/v0/auth", {}, b"{}")


def ask(
    *behaviours: Say, question: Question = POST, limit_s: float = 5, times: int = 1, leaf: Signer | None = LEAF
) -> list[Answer]:
    async def run() -> list[Answer]:
        kbs = Kbs().on("auth", *behaviours)
        async with served(kbs, leaf) as url:
            http = KbsHttp(url, pem(CA).decode() if leaf else None, NAME if leaf else None)
            try:
                answers = [await http.ask(POST, limit_s, STATE) for _ in range(times)]
            finally:
                http.close()
        assert kbs.connections == 1
        return answers

    return asyncio.run(run())


def failure(*behaviours: Say, limit_s: float = 5) -> AgentError:
    with pytest.raises(AgentError) as raised:
        ask(*behaviours, limit_s=limit_s)
    assert raised.value.__context__ is None
    return raised.value


@pytest.mark.parametrize("leaf", [LEAF, None])
def test_an_answer_is_what_anybody_reads_of_it(leaf: Signer | None) -> None:
    headers = ("Set-Cookie: a=1", "set-cookie: b=2; Expires=x", "Date: d", "Retry-After: 3", "Content-Encoding: gzip")
    assert ask(says(418, b"body", *headers), leaf=leaf) == [Answer(418, b"body", ("a=1", "b=2; Expires=x"), "d", "3")]


def test_requests_share_a_connection_whatever_their_answers() -> None:
    assert [each.status for each in ask(says(401, b"x"), says(200), says(404, b"y"), times=3)] == [401, 200, 404]


def test_a_get_has_no_body_and_a_post_says_that_it_is_json() -> None:
    async def run() -> None:
        kbs = Kbs().on("auth", says(), says())
        async with served(kbs) as url:
            http = KbsHttp(url, pem(CA).decode(), NAME)
            await http.ask(GET, 5, STATE)
            await http.ask(POST, 5, STATE)
            http.close()
        get, post = kbs.asked
        assert (get.method, get.headers["x-extra"], get.headers.get("content-type")) == ("GET", "1", None)
        assert (post.method, post.headers["content-type"], post.body) == ("POST", "application/json", b"{}")
        assert all(each.headers["accept-encoding"] == "identity" for each in kbs.asked)
        assert all(each.headers["user-agent"].startswith("keyturn/") for each in kbs.asked)

    asyncio.run(run())


def test_the_largest_answer_is_read_and_one_byte_more_is_not() -> None:
    assert len(ask(says(200, b"x" * MAX_ANSWER_BYTES))[0].body) == MAX_ANSWER_BYTES


def test_an_answer_above_the_bound_is_not_read() -> None:
    chunk = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 3
    for too_much in (says(200, b"x" * (MAX_ANSWER_BYTES + 1)), raw(endless)):
        error = failure(too_much)
        assert isinstance(error, RemoteProtocolError)
        assert error.problem is ProtocolProblem.OVERSIZED


NO_HTTP = [
    b"SSH-2.0-x\r\n\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * (65 << 10) + b"\r\n\r\n",
    b"\0" * 100 + b"\r\n\r\n",
]


@pytest.mark.parametrize("data", NO_HTTP, ids=range(len(NO_HTTP)))
def test_what_is_no_http_is_malformed_and_final(data: bytes) -> None:
    error = failure(raw(data))
    assert isinstance(error, RemoteProtocolError)
    assert error.problem is ProtocolProblem.MALFORMED


async def _cut(_: object, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(200, b"x" * 100)[:-50])
    await writer.drain()
    raise ConnectionResetError


def test_an_answer_cut_short_is_a_lost_connection() -> None:
    error = failure(_cut, _cut)
    assert isinstance(error, BrokerUnreachableError)
    assert error.reason is Unreachable.RESET


def dripping(data: bytes) -> Say:
    async def say(_: object, writer: asyncio.StreamWriter) -> None:
        for byte in data:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.02)

    return say


@pytest.mark.parametrize(
    "say", [dripping(answer(200, b"x" * 1000)), dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)], ids=["body", "continue"]
)
def test_an_answer_that_drips_ends_at_the_limit(say: Say) -> None:
    began = time.monotonic()
    error = failure(say, limit_s=0.5)
    assert isinstance(error, BrokerUnreachableError)
    assert error.reason is Unreachable.TIMEOUT
    assert time.monotonic() - began < 2


def test_a_peer_that_does_not_read_ends_at_the_limit() -> None:
    """The request waits for the other side's window, not its answer."""

    async def run() -> float:
        began = time.monotonic()

        async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await asyncio.sleep(3)
            finally:
                writer.transport.abort()

        server = await asyncio.start_server(never_read, "127.0.0.1", 0, limit=1)
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        http = KbsHttp(url, None, None)
        with pytest.raises(BrokerUnreachableError) as raised:
            await http.ask(Question("/", {}, b"x" * (64 << 20)), 0.5, STATE)
        assert raised.value.reason is Unreachable.TIMEOUT
        http.close()
        took = time.monotonic() - began
        server.close()
        return took

    assert asyncio.run(run()) < 2


@pytest.mark.parametrize(("ca_pem", "name"), [(None, None), (None, NAME), (pem(CA).decode(), None)])
def test_tls_without_a_measured_identity_is_a_bug(ca_pem: str | None, name: str | None) -> None:
    http = KbsHttp("https://127.0.0.1:1", ca_pem, name)
    with pytest.raises(RuntimeError):
        asyncio.run(http.ask(POST, 1, STATE))
