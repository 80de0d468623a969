import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.events import ServerReady
from agent.health import MAX_CALLERS, MAX_REQUEST_BYTES, HealthPort, WaitSocket, listen
from agent.report import BootReport


@contextmanager
def port_of(report: BootReport) -> Iterator[tuple[selectors.DefaultSelector, tuple[str, int]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    selector = selectors.DefaultSelector()
    HealthPort(listen(address), selector, report)
    try:
        yield selector, address
    finally:
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        selector.close()


def turn(selector: selectors.BaseSelector, times: int = 1) -> None:
    for _ in range(times):
        for key, _ in selector.select(1):
            key.data()


def ask(report: BootReport, *chunks: bytes) -> bytes:
    with port_of(report) as (selector, address), socket.create_connection(address, 5) as caller:
        turn(selector)
        for chunk in chunks:
            caller.sendall(chunk)
            turn(selector, 1 + len(chunk) // MAX_REQUEST_BYTES)
        return caller.recv(65536)


REPORT = BootReport("0.1.0", "run")
MAX_EXPECTED_BYTES = 128 << 10
"""A receipt with the longest event log that was ever seen, twice over."""


@pytest.mark.parametrize(
    ("path", "status"), [(b"/livez", b"200 OK"), (b"/readyz", b"503 Service"), (b"/status", b"200 OK"), (b"/x", b"404 Not")]
)
def test_the_three_paths_answer(path: bytes, status: bytes) -> None:
    answer = ask(REPORT, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    head, body = answer.split(b"\r\n\r\n", 1)
    assert f"Content-Length: {len(body)}".encode() in head


def test_ready_once_the_server_is() -> None:
    report = BootReport("0.1.0", "run")
    report.apply(ServerReady(1, 1))
    assert b"200 OK" in ask(report, b"GET /readyz HTTP/1.0\r\n\r\n")


def test_a_request_may_come_in_pieces() -> None:
    assert b"200 OK" in ask(REPORT, b"GET /li", b"vez HTTP/1.1\r\n", b"\r\n")


def test_a_head_request_gets_no_body() -> None:
    assert ask(REPORT, b"HEAD /livez HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize("request_", [b"POST /livez HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"x" * (MAX_REQUEST_BYTES + 1)])
def test_anything_else_is_a_bad_request(request_: bytes) -> None:
    assert ask(REPORT, request_).startswith(b"HTTP/1.1 400")


def test_idle_callers_keep_nobody_out_and_those_who_leave_are_forgotten() -> None:
    with port_of(REPORT) as (selector, address):
        callers = [socket.create_connection(address, 5) for _ in range(MAX_CALLERS + 1)]
        turn(selector, MAX_CALLERS + 1)
        assert callers[0].recv(1) == b"", "the oldest had to go"
        callers[-1].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        turn(selector)
        assert callers[-1].recv(100).startswith(b"HTTP/1.1 200")
        callers.append(socket.create_connection(address, 5))
        turn(selector)
        assert len(selector.get_map()) == 1 + MAX_CALLERS
        for caller in callers:
            caller.close()
        turn(selector)
        assert len(selector.get_map()) == 1


def test_a_receipt_is_given_whole_once_there_is_one() -> None:
    report = BootReport("0.1.0", "run")
    assert ask(report, b"GET /receipt HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404")
    report.receipt = bytes(range(256)) * (MAX_EXPECTED_BYTES // 256)
    with port_of(report) as (selector, address), socket.create_connection(address, 5) as caller:
        turn(selector)
        caller.sendall(b"GET /receipt HTTP/1.1\r\n\r\n")
        turn(selector)
        answer = b"".join(iter(lambda: caller.recv(65536), b""))
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b'Content-Type: application/cose; cose-type="cose-sign1"' in head
    assert body == report.receipt


def test_a_wait_socket_is_not_at_its_path_before_it_is_shown_and_answers_then(tmp_path: Path) -> None:
    path = tmp_path / "ready.sock"
    shown, selector = WaitSocket(str(path)), selectors.DefaultSelector()
    HealthPort(shown.listener, selector, REPORT)
    assert not path.exists()
    shown.show()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        turn(selector)
        caller.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        turn(selector)
        assert caller.recv(4096).startswith(b"HTTP/1.1 200 OK")
    shown.remove()
    shown.remove()
    assert list(tmp_path.iterdir()) == []
    shown.listener.close()


@pytest.mark.parametrize("name", ["taken", "no-folder/ready.sock", "x" * 120])
def test_a_wait_socket_takes_nobody_s_place(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OSError):
        WaitSocket(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_path_that_somebody_took_meanwhile_stays_theirs(tmp_path: Path) -> None:
    path = tmp_path / "ready.sock"
    shown = WaitSocket(str(path))
    path.write_text("theirs")
    with pytest.raises(FileExistsError):
        shown.show()
    shown.remove()
    assert path.read_text() == "theirs"
    shown.listener.close()
