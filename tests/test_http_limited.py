"""Stores that are slow on purpose, at every stage of a request, and what may end a read of them."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path

import pytest
import urllib3

from agent.artifact.sources import BlobSource, open_source
from agent.artifact.sources.patient import PatientSource
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.http_limited import limited, pool
from tests.range_server import Fault, RangeServer, make_certificate

DATA = bytes(range(256)) * 40
BLOB = "sha256:" + "ab" * 32
DRIPPING = [Fault.DRIP_HEAD, Fault.DRIP_BODY, Fault.DRIP_CHUNKS, Fault.CONTINUE, Fault.SILENT]
TOO_LATE_S = 1.5

Opener = Callable[[float], BlobSource]
"""Opens the store with so many seconds for each request."""


def _unanswered(undo: ExitStack) -> int:
    """A port that answers no connect: Linux drops what does not fit into a listener's queue, as a firewall would."""
    listener = undo.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    undo.enter_context(socket.create_connection(listener.getsockname()))
    port: int = listener.getsockname()[1]
    return port


def _handshake(undo: ExitStack, *, drip: bool) -> int:
    """A port where every TLS handshake stays unfinished."""
    listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            end = time.monotonic() + 3
            # A handshake record of 0x4000 bytes, of which the first message says that it is as long.
            for byte in b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03" + bytes(10_000):
                if drip:
                    connection.sendall(bytes([byte]))
                if done.wait(0.02) or time.monotonic() > end:
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    undo.callback(thread.join)
    undo.callback(done.set)
    port: int = listener.getsockname()[1]
    return port


STAGES = ["connect", "silent handshake", "dripping handshake", *DRIPPING, (Fault.DRIP_BODY, "https")]


@pytest.fixture(params=STAGES, ids=str)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    with ExitStack() as undo:
        ca = None
        match request.param:
            case "connect":
                url = f"http://127.0.0.1:{_unanswered(undo)}"
            case "silent handshake":
                url = f"https://127.0.0.1:{_handshake(undo, drip=False)}"
            case "dripping handshake":
                url = f"https://127.0.0.1:{_handshake(undo, drip=True)}"
            case fault:
                (tmp_path / "blobs/sha256").mkdir(parents=True)
                (tmp_path / "blobs/sha256" / ("ab" * 32)).write_bytes(DATA)
                pem = None
                if isinstance(fault, tuple):
                    fault, _ = fault
                    pem, ca = make_certificate(tmp_path)
                url = undo.enter_context(RangeServer(tmp_path, fault, certificate=pem)).url

        def open_it(timeout_s: float) -> BlobSource:
            source = open_source(url, ca, timeout_s)
            undo.callback(source.close)
            return source

        yield open_it


def read(source: BlobSource | PatientSource) -> int:
    return source.read_range(BLOB, 0, memoryview(bytearray(len(DATA))))


def test_a_request_ends_in_its_time(opener: Opener) -> None:
    started = time.monotonic()
    with pytest.raises(ArtifactUnavailableError) as caught:
        read(opener(0.1))
    assert time.monotonic() - started < TOO_LATE_S
    assert (caught.value.problem, caught.value.retryable) == (StoreProblem.TIMEOUT, True)


def test_a_request_ends_at_the_deadline_for_all_of_them(opener: Opener) -> None:
    started = time.monotonic()
    with pytest.raises(ArtifactUnavailableError) as caught:
        read(PatientSource(opener(30), 0.1, threading.Event()))
    assert time.monotonic() - started < TOO_LATE_S
    assert caught.value.problem is StoreProblem.TIMEOUT


def test_a_stop_ends_a_request_that_is_under_way(opener: Opener) -> None:
    stop = threading.Event()
    started = time.monotonic()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    with pytest.raises(CancelledError):
        read(PatientSource(opener(30), 30, stop))
    timer.join()
    assert time.monotonic() - started < TOO_LATE_S


def test_redirects_have_the_time_of_one_request_together() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = b"HTTP/1.1 307 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while connection.recv(4096):
                    time.sleep(0.3)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        source = open_source(f"http://127.0.0.1:{listener.getsockname()[1]}", None, 0.5)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source)
        source.close()
        thread.join()
    assert caught.value.problem is StoreProblem.TIMEOUT


def test_after_a_slow_answer_the_store_is_asked_again_on_a_new_connection(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(DATA)
    with RangeServer(tmp_path, Fault.DRIP_HEAD, faulty_answers=1) as server:
        source = open_source(server.url, None, 0.3)
        with pytest.raises(ArtifactUnavailableError):
            source.read_index(len(DATA))
        assert source.read_index(len(DATA)) == DATA
        assert server.connections == 2
        source.close()


def test_an_answer_that_pauses_longer_than_a_slice_is_read(tmp_path: Path) -> None:
    """Over TLS too, where the pause falls into the middle of a record's bytes or of the handshake."""
    pem, ca = make_certificate(tmp_path)
    (tmp_path / "index.json").write_bytes(DATA)
    with RangeServer(tmp_path, certificate=pem) as server, socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            """Between client and server, with a pause in the handshake and one in the answer."""
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:
                sent, pauses = 0, [100, 5000]
                while True:
                    for reader in select.select([client, upstream], [], [])[0]:
                        data = reader.recv(100)
                        if not data:
                            return
                        if reader is client:
                            upstream.sendall(data)
                            continue
                        if pauses and sent >= pauses[0]:
                            time.sleep(0.4)
                            paused.append(pauses.pop(0))
                        client.sendall(data)
                        sent += len(data)

        paused: list[int] = []

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        source = open_source(f"https://127.0.0.1:{listener.getsockname()[1]}", ca, 10)
        assert source.read_index(len(DATA)) == DATA
        assert paused == [100, 5000]
        source.close()
        thread.join()


def test_limits_within_each_other_all_count(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    now = time.monotonic()
    stop = threading.Event()
    with RangeServer(tmp_path) as server:
        connections = pool("127.0.0.1", server.port, None, 1)

        def ask() -> int:
            return connections.urlopen("GET", "/x", retries=False).status

        with limited(now + 60, stop), limited(now + 30):
            assert ask() == 200
            with limited(now - 1), limited(now + 60), pytest.raises(urllib3.exceptions.TimeoutError):
                ask()
            stop.set()
            with pytest.raises(urllib3.exceptions.TimeoutError):
                ask()
        assert ask() == 200
        connections.close()


def test_a_connection_that_says_nothing_is_given_up_before_the_request_is_late(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / BLOB.replace(":", "/")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(DATA)
    with RangeServer(tmp_path, Fault.SILENT, faulty_answers=1) as server:
        source = open_source(server.url, None, 30)
        began = time.monotonic()
        with limited(began + 60, stall_s=0.5):
            with pytest.raises(ArtifactUnavailableError) as caught:
                source.read_blob(BLOB, 1 << 20)
            assert time.monotonic() - began < TOO_LATE_S
            assert caught.value.problem is StoreProblem.TIMEOUT
            assert caught.value.retryable
            assert source.read_blob(BLOB, 1 << 20) == DATA
        assert server.connections == 2
        source.close()
