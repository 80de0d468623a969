"""Through a real proxy to a KBS and to an https store, and proxies that would rather not."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from agent.artifact.sources import open_source
from agent.closed import Ident
from agent.config import EXAMPLE, parse
from agent.errors import (
    ArtifactUnavailableError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ConfigError,
    IdentityProblem,
    StoreProblem,
    Unreachable,
)
from agent.handshake.kbs_http import KbsHttp, Question
from agent.http_limited import limited
from agent.proxy import MAX_ANSWER_BYTES, Proxy, pack_connect, parse_connect_answer, parse_proxy
from tests.connect_proxy import Behaviour, ConnectProxy, answers, drips, silence
from tests.hostile_kbs import CA, LEAF, NAME, Kbs, says, served
from tests.range_server import RangeServer
from tests.tls import Signer, certificate, key_pem, pem

BLOB = "sha256:" + "ab" * 32
DATA = bytes(range(256)) * 40
KBS = "kbs.invalid"
STORE = "store.invalid"
STORE_CA = certificate("ca.invalid")
OK = b"HTTP/1.1 200 OK\r\n"


# --- the pure part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://proxy.test:3128", Proxy("proxy.test", 3128)),
        ("http://10.0.0.1:1/", Proxy("10.0.0.1", 1)),
        ("http://[fd00::1]:65535", Proxy("fd00::1", 65535)),
    ],
)
def test_a_proxy_is_read_as_it_is_written(url: str, proxy: Proxy) -> None:
    assert parse_proxy(url) == proxy


@pytest.mark.parametrize(
    "url",
    [
        "",
        "proxy:3128",
        "https://proxy:3128",
        "socks5://proxy:1",
        "http://proxy",
        "http://proxy:0",
        "http://proxy:65536",
        "http://proxy:3128/path",
        "http://proxy:3128?x",
        "http://user@proxy:3128",
        "http://user:secret@proxy:3128",
        "http://pro xy:3128",
        "http://proxy:3128\n",
        "http://proxy:\u0663",
        "http://[proxy]:1",
    ],
)
def test_a_proxy_is_http_host_and_port_and_nothing_else(url: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_proxy(url)


def test_a_request_names_host_and_port() -> None:
    assert pack_connect("kbs.test", 443) == b"CONNECT kbs.test:443 HTTP/1.1\r\nHost: kbs.test:443\r\n\r\n"
    assert pack_connect("fd00::1", 8080).startswith(b"CONNECT [fd00::1]:8080 ")


@pytest.mark.parametrize("host", ["", "a b", "a\r\nX: y", "user@host", "host/x", "h\xf6st", "a:80\n"])
def test_a_host_that_would_be_more_than_a_host_is_not_asked_for(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        pack_connect(host, 443)


def test_an_answer_is_its_status() -> None:
    whole = OK + b"Via: x\r\n\r\n"
    assert parse_connect_answer(whole) == 200
    assert all(parse_connect_answer(whole[:length]) is None for length in range(len(whole)))
    assert parse_connect_answer(b"HTTP/1.0 407 Who?\r\n\r\n<html>") == 407
    assert parse_connect_answer(b"HTTP/1.1 502\r\n\r\n") == 502


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        OK + b"\r\nmore",
        OK + b"X: " + b"y" * MAX_ANSWER_BYTES,
    ],
)
def test_an_answer_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"HTTP|long|more"):
        parse_connect_answer(data)


def test_only_https_that_leaves_the_guest_goes_through_it() -> None:
    proxy = Proxy("proxy", 1)
    assert proxy.for_server("https", "127.example")
    for scheme, host in (("http", "kbs.test"), ("https", "localhost"), ("https", "127.0.0.9"), ("https", "::1")):
        assert not proxy.for_server(scheme, host)


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("https://s.test/m", True),
        ("oci://s.test/m", True),
        ("s3://bucket/m", True),
        ("http://s.test/m", False),
        ("oci+http://s.test/m", False),
        ("/models", False),
        ("https://127.0.0.1/m", False),
        ("https://[", False),
    ],
)
def test_a_proxy_that_nothing_goes_through_is_refused(source: str, uses: bool) -> None:
    config = parse(EXAMPLE.encode()).config
    config = msgspec.structs.replace(config, artifact=msgspec.structs.replace(config.artifact, source=source, mirrors=()))
    assert config.broker.endpoints, "gRPC, which never goes through it"
    if uses:
        assert Proxy("proxy", 1).check_use(config) == (False, True)
        return
    with pytest.raises(ConfigError) as raised:
        Proxy("proxy", 1).check_use(config)
    assert raised.value.key == "proxy"


# --- to a KBS ---------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """Behind the first record's header, so that it is still TLS."""
    return data[:40] + bytes(byte ^ 1 for byte in data[40:])


def ask(
    behaviour: Behaviour | None = None,
    *,
    proxy: Proxy | None = None,
    limit_s: float = 5,
    leaf: Signer = LEAF,
    change: Callable[[bytes], bytes] = bytes,
) -> list[str]:
    """Two requests; the targets the proxy was asked for."""

    async def run() -> list[str]:
        async with served(Kbs().on("auth", says(200), says(200)), leaf) as url:
            port = int(url.rpartition(":")[2])
            with ConnectProxy({f"{KBS}:{port}": port}, behaviour, change) as there:
                http = KbsHttp(f"https://{KBS}:{port}", pem(CA).decode(), NAME, proxy or there.proxy)
                try:
                    for _ in range(2):
                        answer = await http.ask(Question("/kbs/v0/auth", {}, b"{}"), limit_s, Ident("START"))
                        assert answer.status == 200
                finally:
                    http.close()
                return [each.replace(str(port), "PORT") for each in there.asked]

    return asyncio.run(run())


def test_a_kbs_is_reached_through_a_proxy_by_one_connection() -> None:
    assert ask() == [f"{KBS}:PORT"]


GARBAGE = [b"\0" * 100 + b"\r\n\r\n", b"SSH-2.0-x\r\n\r\n", OK + b"\r\n\x16\x03\x03", OK + b"X: y\r\n" * 4000, b"", OK]


@pytest.mark.parametrize("status", [302, 403, 407, 502])
def test_a_proxy_that_does_not_connect_is_told_with_its_status(status: int) -> None:
    with pytest.raises(BrokerUnreachableError) as raised:
        ask(answers(f"HTTP/1.1 {status} No\r\nContent-Length: 1\r\n\r\nx".encode()))
    assert (raised.value.reason, raised.value.status) == (Unreachable.PROXY, status)
    assert raised.value.retryable == (status not in (403, 407))
    assert str(status) in raised.value.what()


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_a_proxy_that_answers_garbage_is_no_connection(data: bytes) -> None:
    with pytest.raises(BrokerUnreachableError) as raised:
        ask(answers(data))
    assert (raised.value.reason, raised.value.status, raised.value.retryable) == (Unreachable.PROXY, 0, True)


@pytest.mark.parametrize("behaviour", [drips(OK + b"X: y\r\n" * 4000), silence])
def test_a_proxy_that_drips_costs_no_more_than_the_time_there_is(behaviour: Behaviour) -> None:
    began = time.monotonic()
    with pytest.raises(BrokerUnreachableError) as raised:
        ask(behaviour, limit_s=0.5)
    assert raised.value.reason is Unreachable.PROXY
    assert time.monotonic() - began < 2


def test_a_proxy_that_is_not_there_is_told_as_such() -> None:
    with ConnectProxy({}) as gone:
        pass
    with pytest.raises(BrokerUnreachableError) as raised:
        ask(proxy=gone.proxy)
    assert raised.value.reason is Unreachable.PROXY


def test_a_proxy_that_tampers_is_no_broker() -> None:
    with pytest.raises(BrokerIdentityError) as raised:
        ask(change=flipped)
    assert raised.value.problem is IdentityProblem.TLS


def test_a_proxy_that_leads_elsewhere_is_no_broker() -> None:
    with pytest.raises(BrokerIdentityError) as raised:
        ask(leaf=certificate(NAME))
    assert raised.value.problem is IdentityProblem.CHAIN


# --- to a store -------------------------------------------------------------------------------------------------------


@contextmanager
def store(folder: Path) -> Iterator[RangeServer]:
    (folder / "blobs/sha256").mkdir(parents=True)
    (folder / "blobs/sha256" / ("ab" * 32)).write_bytes(DATA)
    leaf = certificate(STORE, signer=STORE_CA)
    (folder / "server.pem").write_bytes(pem(leaf) + key_pem(leaf))
    with RangeServer(folder, certificate=folder / "server.pem") as server:
        yield server


def read(url: str, proxy: Proxy, size: int = len(DATA), limit_s: float = 5) -> bytes:
    source = open_source(url, pem(STORE_CA).decode(), limit_s, proxy=proxy)
    try:
        out = memoryview(bytearray(size))
        assert source.read_range(BLOB, 0, out) == size
        return bytes(out)
    finally:
        source.close()


def test_a_store_is_reached_through_a_proxy(tmp_path: Path) -> None:
    with store(tmp_path) as server, ConnectProxy({f"{STORE}:{server.port}": server.port}) as there:
        assert read(f"https://{STORE}:{server.port}", there.proxy) == DATA
        assert there.asked == [f"{STORE}:{server.port}"]
        assert not any(b"Authorization" in request for request in there.requests)


def test_what_is_plain_or_inside_goes_without_the_proxy(tmp_path: Path) -> None:
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    (tmp_path / "blobs/sha256" / ("ab" * 32)).write_bytes(DATA)
    with RangeServer(tmp_path) as server, ConnectProxy({}) as there:
        assert read(server.url, there.proxy) == DATA
        assert there.asked == []
        with pytest.raises(ArtifactUnavailableError):
            read("http://store.invalid", there.proxy)
        assert there.asked == []


@pytest.mark.parametrize(
    ("behaviour", "status", "retryable"),
    [
        (None, 403, False),
        (answers(b"HTTP/1.1 407 Who?\r\n\r\n"), 407, False),
        (answers(b"HTTP/1.1 502 Gone\r\n\r\n"), 502, True),
        (answers(b"garbage"), 0, True),
        (drips(OK * 100), 0, True),
    ],
)
def test_a_store_behind_a_proxy_that_refuses(behaviour: Behaviour | None, status: int, retryable: bool) -> None:
    with ConnectProxy({}, behaviour) as there, pytest.raises(ArtifactUnavailableError) as raised:
        read(f"https://{STORE}", there.proxy, limit_s=0.5)
    error = raised.value
    assert (error.problem, error.status, error.retryable) == (StoreProblem.PROXY, status, retryable)


def test_a_proxy_that_tampers_is_no_store(tmp_path: Path) -> None:
    with store(tmp_path) as server, ConnectProxy({f"{STORE}:{server.port}": server.port}, change=flipped) as there:
        with pytest.raises(ArtifactUnavailableError) as raised:
            read(f"https://{STORE}:{server.port}", there.proxy)
        assert raised.value.problem is StoreProblem.TLS


def test_a_thread_that_is_to_stop_does_not_wait_for_a_proxy() -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with ConnectProxy({}, silence) as there, limited(began + 60, stop), pytest.raises(ArtifactUnavailableError):
        read(f"https://{STORE}", there.proxy, limit_s=60)
    assert time.monotonic() - began < 3
