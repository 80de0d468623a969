"""Each fault of the test KBS, seen from the other end of the connection."""

import gzip
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace

import pytest

from agent.sim import trustee_faults
from agent.sim.trustee import Trustee, serve
from agent.sim.trustee_knobs import Fault, Knobs
from tests.raw_kbs import Answer, RawGuest

BODY = b'{"version":"0.4.0","tee":"sample","extra-params":""}'
POST = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: kbs\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.fixture
def kbs() -> Iterator[Trustee]:
    with serve() as running:
        yield running


def dial(kbs: Trustee, fault: Fault) -> socket.socket:
    """A connection on which /auth was asked for."""
    kbs.knobs = Knobs(faults={"auth": fault})
    url = urllib.parse.urlsplit(kbs.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=10)
    connection.sendall(POST)
    return connection


def received(connection: socket.socket, at_most: int = 80 << 20) -> bytes:
    data = bytearray()
    with connection:
        while len(data) < at_most and (chunk := connection.recv(1 << 20)):
            data += chunk
    return bytes(data)


def auth(kbs: Trustee, fault: Fault) -> Answer:
    kbs.knobs = Knobs(faults={"auth": fault})
    guest = RawGuest(kbs)
    try:
        return guest.call("POST", "/auth", BODY)
    finally:
        guest.close()


def test_an_oversized_body(kbs: Trustee) -> None:
    head, _, body = received(dial(kbs, Fault.OVERSIZED_BODY)).partition(b"\r\n\r\n")
    assert b"content-length: 67108864" in head
    assert len(body) == trustee_faults.HUGE_BYTES


def test_an_endless_body_ends_when_the_caller_goes(kbs: Trustee) -> None:
    data = received(dial(kbs, Fault.ENDLESS_BODY), at_most=8 << 20)
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"content-length" not in head
    assert body.startswith(b"10000\r\nxxx")


def test_heads_that_are_too_much(kbs: Trustee) -> None:
    assert len(received(dial(kbs, Fault.OVERSIZED_HEAD), 1 << 20)) >= 1 << 20
    assert received(dial(kbs, Fault.MANY_HEADERS), 1 << 17).count(b"\r\nx-") > 9000


def test_a_slow_drip_is_the_right_answer_in_time(kbs: Trustee) -> None:
    connection = dial(kbs, Fault.SLOW_DRIP)
    start = time.monotonic()
    with connection:
        data = b"".join(connection.recv(1) for _ in range(5))
    assert data == b"HTTP/"
    assert time.monotonic() - start >= 3 * trustee_faults.DRIP_S


def test_silence(kbs: Trustee) -> None:
    with dial(kbs, Fault.SILENT) as connection:
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_half_of_an_answer(kbs: Trustee) -> None:
    with dial(kbs, Fault.HALF_CLOSED) as connection:
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert 0 < len(body) < length


def test_a_reset(kbs: Trustee) -> None:
    with pytest.raises(ConnectionResetError):
        received(dial(kbs, Fault.RESET))


def test_what_is_not_http(kbs: Trustee) -> None:
    assert received(dial(kbs, Fault.NOT_HTTP)).startswith(b"220 ")


def test_two_lengths(kbs: Trustee) -> None:
    head = received(dial(kbs, Fault.TWO_LENGTHS)).partition(b"\r\n\r\n")[0]
    assert head.count(b"content-length: ") == 2


def test_a_body_that_unpacks_to_much_more(kbs: Trustee) -> None:
    head, _, body = received(dial(kbs, Fault.GZIP_BODY)).partition(b"\r\n\r\n")
    assert b"content-encoding: gzip" in head
    assert len(body) < 1 << 20
    assert len(gzip.decompress(body)) == trustee_faults.HUGE_BYTES


def test_a_redirect_goes_where_it_is_told(kbs: Trustee) -> None:
    answer = auth(kbs, Fault.REDIRECT)
    assert (answer.status, answer.headers["location"]) == (307, "https://redirected.invalid/kbs/v0/auth")
    with serve() as other:
        kbs.knobs = replace(kbs.knobs, redirect_to=other.url)
        guest = RawGuest(kbs)
        assert guest.call("POST", "/auth", BODY).headers["location"] == other.url + "/kbs/v0/auth"
        guest.close()
        assert not other.log


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault.HTML_502, 502, "text/html"),
        (Fault.SERVER_ERROR, 500, "text/plain; charset=utf-8"),
        (Fault.UNAVAILABLE, 503, "text/plain; charset=utf-8"),
        (Fault.TOO_MANY_REQUESTS, 429, "text/plain; charset=utf-8"),
        (Fault.EMPTY, 200, "application/json"),
        (Fault.NOT_JSON, 200, "application/json"),
        (Fault.JSON_ARRAY, 200, "application/json"),
        (Fault.WRONG_TYPES, 200, "application/json"),
        (Fault.DUPLICATE_MEMBERS, 200, "application/json"),
        (Fault.DEEP_JSON, 200, "application/json"),
    ],
)
def test_answers_that_are_complete_and_wrong(kbs: Trustee, fault: Fault, status: int, kind: str) -> None:
    answer = auth(kbs, fault)
    assert (answer.status, answer.headers["content-type"]) == (status, kind)
    assert kbs.log[-1].status == status
    match fault:
        case Fault.WRONG_TYPES:
            assert answer.json == {"nonce": 7, "extra-params": 7}
        case Fault.JSON_ARRAY:
            assert answer.json[0].keys() == {"nonce", "extra-params"}
        case Fault.DUPLICATE_MEMBERS:
            assert answer.body.count(b'"nonce"') == 2
            assert answer.json["nonce"] != "AAAA"
        case Fault.DEEP_JSON:
            with pytest.raises((RecursionError, json.JSONDecodeError)):
                json.loads(answer.body)


@pytest.mark.parametrize("fault", Fault)
def test_a_broken_answer_does_not_keep_the_server_from_the_next(kbs: Trustee, fault: Fault) -> None:
    with dial(kbs, fault) as connection:
        connection.settimeout(5)
        if fault not in (Fault.SILENT, Fault.RESET):
            connection.recv(1)
    kbs.knobs = Knobs()
    guest = RawGuest(kbs)
    assert guest.handshake().status == 200
    guest.close()
