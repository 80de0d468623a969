"""The HTTP side of the test KBS: manners, limits, TLS."""

import contextlib
import re
import socket
import ssl
import urllib.parse
from collections.abc import Iterator

import pytest

from agent.sim.trustee import Trustee, serve
from agent.sim.trustee_http import MAX_BODY_BYTES, MAX_HEAD_BYTES, parse_query
from tests.raw_kbs import RawGuest
from tests.tls import certificate, key_pem, pem

AUTH = b'{"version":"0.4.0","tee":"sample","extra-params":""}'


@pytest.fixture
def kbs() -> Iterator[Trustee]:
    with serve() as running:
        yield running


@contextlib.contextmanager
def connected(kbs: Trustee) -> Iterator[socket.socket]:
    url = urllib.parse.urlsplit(kbs.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as connection:
        yield connection


def exchange(kbs: Trustee, sent: bytes) -> bytes:
    """Everything that comes back until the server hangs up."""
    with connected(kbs) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
    return received


def post(body: bytes = AUTH, *headers: bytes) -> bytes:
    lines = [b"POST /kbs/v0/auth HTTP/1.1", b"Host: kbs", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_requests_share_a_connection_until_one_says_close(kbs: Trustee) -> None:
    received = exchange(kbs, post() + post() + post(AUTH, b"Connection: close") + post())
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert {entry.connection for entry in kbs.log} == {1}


def test_header_names_are_in_lower_case_and_there_is_no_server(kbs: Trustee) -> None:
    head = exchange(kbs, post(AUTH, b"Connection: close")).partition(b"\r\n\r\n")[0]
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert names == [b"content-length", b"content-type", b"set-cookie", b"date", b"connection"]


def test_http_1_0_ends_with_its_answer(kbs: Trustee) -> None:
    assert exchange(kbs, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")


def test_head_has_no_body(kbs: Trustee) -> None:
    received = exchange(kbs, b"HEAD /kbs/v0/auth HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 405 ")
    assert received.endswith(b"\r\n\r\n")


def test_a_body_may_wait_for_permission(kbs: Trustee) -> None:
    received = exchange(kbs, post(AUTH, b"Expect: 100-continue", b"Connection: close"))
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_body_of_two_mebibytes_is_read_and_one_more_byte_is_not(kbs: Trustee) -> None:
    guest = RawGuest(kbs)
    assert guest.call("POST", "/auth", AUTH.ljust(MAX_BODY_BYTES)).status == 200
    answer = guest.call("POST", "/auth", AUTH.ljust(MAX_BODY_BYTES + 1))
    assert (answer.status, answer.body) == (413, b"payload reached size limit")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    guest.close()


def test_a_head_of_128_kibibytes_is_read_and_a_longer_one_is_not(kbs: Trustee) -> None:
    short = post(AUTH, b"Connection: close", b"Authorization: Bearer ")
    room = MAX_HEAD_BYTES - len(short.partition(b"\r\n\r\n")[0])
    fitting = post(AUTH, b"Connection: close", b"Authorization: Bearer " + b"x" * room)
    assert exchange(kbs, fitting).startswith(b"HTTP/1.1 200 ")
    for more in (1, 1 << 20):
        received = exchange(kbs, post(AUTH, b"Authorization: Bearer " + b"x" * (MAX_HEAD_BYTES + more)))
        assert re.match(rb"HTTP/1\.1 431 [^{]*\r\n\r\n$", received, re.DOTALL)


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"BREW /kbs/v0/auth HTTP/1.1\r\n\r\n",
        b"GET /kbs/v0/auth HTTP/2.0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n folded: line\r\n\r\n",
        b"POST /kbs/v0/auth HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /kbs/v0/auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_cannot_be_read_gets_no_json(kbs: Trustee, sent: bytes) -> None:
    received = exchange(kbs, sent)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"{" not in received
    assert not kbs.log


def test_a_body_that_ends_early_gets_no_answer_from_the_kbs(kbs: Trustee) -> None:
    with connected(kbs) as connection:
        connection.sendall(post()[:-5])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_idle_and_unfinished_connections_do_not_keep_a_server_from_stopping() -> None:
    with contextlib.ExitStack() as opened, serve() as kbs:
        for sent in (b"", b"GET /", post()):
            opened.enter_context(connected(kbs)).sendall(sent)
        guest = RawGuest(kbs)
        guest.auth()
    guest.close()


def test_tls_is_that_of_the_certificate_given() -> None:
    server = certificate("kbs.example")
    with serve(tls=(pem(server), key_pem(server))) as kbs:
        assert kbs.url.startswith("https://127.0.0.1:")
        assert kbs.ca_pem == pem(server)
        context = ssl.create_default_context(cadata=kbs.ca_pem.decode())
        with connected(kbs) as raw, context.wrap_socket(raw, server_hostname="kbs.example") as secured:
            secured.sendall(post(AUTH, b"Connection: close"))
            assert secured.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        for wrong in (context, ssl.create_default_context()):
            with connected(kbs) as raw, pytest.raises(ssl.SSLCertVerificationError):
                wrong.wrap_socket(raw, server_hostname="other.example")
        with connected(kbs) as raw:
            raw.sendall(post())  # plain HTTP to a TLS port
            with contextlib.suppress(ConnectionResetError):
                assert not raw.recv(1 << 16).startswith(b"HTTP")
        unfinished = socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(kbs.url).port or 0))
    unfinished.close()
    assert len(kbs.log) == 1


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with serve("::1") as kbs:
            assert kbs.url.startswith("http://[::1]:")
            assert exchange(kbs, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")
    except OSError:
        pytest.skip("no IPv6 loopback here")


def test_queries() -> None:
    assert parse_query("") == {}
    assert parse_query("a=1&a=2&b=%20+&c=") == {"a": "2", "b": "  ", "c": ""}
    assert [parse_query(text) for text in ("a=%", "a=%4", "a=%gg", "a=%c3")] == [None] * 4


def test_a_bug_in_an_answer_is_told_when_the_server_stops() -> None:
    with pytest.raises(RuntimeError, match="bug"), serve() as kbs:

        def broken(path: str, query: object) -> bytes:
            raise RuntimeError("bug")

        kbs.plugins["broken"] = broken
        kbs.set_resource_policy("allow_all")
        guest = RawGuest(kbs)
        guest.handshake()
        with pytest.raises(ConnectionError):
            guest.get("/broken/x")
