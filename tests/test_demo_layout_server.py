"""The demo's artifact store: the HTTP a real store speaks, over a real socket."""

import http.client
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from agent.demo.layout_server import select_range, serve

BLOB = bytes(range(256)) * 16
NAME = "/blobs/sha256/" + "5" * 64


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[http.client.HTTPConnection]:
    blob = tmp_path / NAME[1:]
    blob.parent.mkdir(parents=True)
    blob.write_bytes(BLOB)
    (tmp_path / "index.json").write_bytes(b"{}")
    (tmp_path / "secret").write_bytes(b"not in the layout")
    with serve(tmp_path) as url:
        client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        yield client
        client.close()


def ask(
    connection: http.client.HTTPConnection, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (200, 0, 100)),
        ("bytes=0-9", (206, 0, 10)),
        ("bytes=90-", (206, 90, 10)),
        ("bytes=90-1000", (206, 90, 10)),
        ("bytes=99-99", (206, 99, 1)),
        ("bytes=-10", (206, 90, 10)),
        ("bytes=-1000", (206, 0, 100)),
        ("bytes=100-", (416, 0, 0)),
        ("bytes=100-200", (416, 0, 0)),
        ("bytes=-0", (416, 0, 0)),
        ("bytes=9-0", (200, 0, 100)),
        ("bytes=-", (200, 0, 100)),
        ("bytes=0-1,5-6", (200, 0, 100)),
        ("lines=0-9", (200, 0, 100)),
        ("bytes=" + "9" * 30 + "-", (200, 0, 100)),
    ],
)
def test_a_range_selects_what_the_rfc_says(header: str | None, expected: tuple[int, int, int]) -> None:
    assert select_range(header, 100) == expected


def test_nothing_of_an_empty_file_can_be_selected() -> None:
    assert select_range("bytes=0-", 0)[0] == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    assert select_range(None, 0) == (HTTPStatus.OK, 0, 0)


def test_a_blob_comes_whole_and_in_parts_over_one_connection(connection: http.client.HTTPConnection) -> None:
    whole, body = ask(connection, NAME)
    assert (whole.status, body) == (200, BLOB)
    assert whole.headers["Accept-Ranges"] == "bytes"
    opened = connection.sock
    part, body = ask(connection, NAME, Range="bytes=250-259")
    assert (part.status, body) == (206, BLOB[250:260])
    assert part.headers["Content-Range"] == f"bytes 250-259/{len(BLOB)}"
    assert connection.sock is opened


def test_an_unsatisfiable_range_is_416_with_the_size(connection: http.client.HTTPConnection) -> None:
    response, body = ask(connection, NAME, Range=f"bytes={len(BLOB)}-")
    assert (response.status, body) == (416, b"")
    assert response.headers["Content-Range"] == f"bytes */{len(BLOB)}"


def test_head_has_the_size_and_no_body(connection: http.client.HTTPConnection) -> None:
    response, body = ask(connection, NAME, "HEAD")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", str(len(BLOB)))


def test_a_range_of_another_version_is_answered_with_the_whole_file(connection: http.client.HTTPConnection) -> None:
    etag = ask(connection, NAME, "HEAD")[0].headers["ETag"]
    assert ask(connection, NAME, Range="bytes=0-0", If_Range=etag)[0].status == 206
    assert ask(connection, NAME, Range="bytes=0-0", If_Range='"other"')[0].status == 200


@pytest.mark.parametrize(
    "path", ["/", "/secret", "/blobs", "/blobs/sha256/../../secret", "/blobs/sha256/" + "0" * 64, NAME + "/"]
)
def test_what_is_not_in_the_layout_is_404(connection: http.client.HTTPConnection, path: str) -> None:
    response, body = ask(connection, path)
    assert (response.status, body) == (404, b"")
    assert ask(connection, "/index.json")[1] == b"{}"  # and the connection still serves


def test_a_client_that_stops_in_mid_transfer_is_no_ones_business(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blob = tmp_path / NAME[1:]
    blob.parent.mkdir(parents=True)
    with open(blob, "wb") as file:
        file.truncate(64 << 20)
    with serve(tmp_path) as url:
        client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        client.request("GET", NAME)
        client.getresponse().read(1)
        client.close()
        for thread in threading.enumerate():
            if "process_request_thread" in thread.name:
                thread.join(5)
    assert capfd.readouterr().err == ""
