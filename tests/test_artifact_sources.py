"""Both sources against real folders and real servers, well-behaved and not."""

import os
import socket
import stat
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.artifact.sources import LayoutSource, open_source
from agent.config import ArtifactConfig
from agent.errors import AgentError, ArtifactUnavailableError, ConfigError, ConfigProblem, StoreProblem
from tests.range_server import Fault, RangeServer, make_certificate
from tests.raw_http import answers

DATA = os.urandom(3 << 20)
BLOB = "sha256:" + "ab" * 32
ABSENT = "sha256:" + "00" * 32
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layout")
    (root / "blobs" / "sha256").mkdir(parents=True)
    (root / "blobs" / "sha256" / ("ab" * 32)).write_bytes(DATA)
    (root / "index.json").write_bytes(b"index")
    return root


@pytest.fixture(params=["folder", "http", "https"])
def source(request: pytest.FixtureRequest, layout: Path, tmp_path: Path) -> LayoutSource:
    if request.param == "folder":
        opened = open_source(str(layout), None, TIMEOUT_S)
    else:
        pem, ca = make_certificate(tmp_path) if request.param == "https" else (None, None)
        server = RangeServer(layout, certificate=pem).__enter__()
        request.addfinalizer(lambda: server.__exit__(None, None, None))
        opened = open_source(server.url, ca, TIMEOUT_S)
    request.addfinalizer(opened.close)
    return opened


def read(source: LayoutSource, offset: int, length: int) -> bytes:
    out = bytearray(length)
    got = source.read_range(BLOB, offset, memoryview(out))
    return bytes(out[:got])


# --- what every source does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (0, len(DATA)),
        (40, (1 << 20) - 40),
        (1 << 20, 1 << 20),
        (len(DATA) - 1, 1),
        (len(DATA) - 5, 10),
        (0, len(DATA) + 1),
    ],
)
def test_a_range_is_filled_and_short_only_at_the_end(source: LayoutSource, offset: int, length: int) -> None:
    assert read(source, offset, length) == DATA[offset : offset + length]


def test_nothing_is_written_beyond_what_was_read(source: LayoutSource) -> None:
    out = bytearray(b"\xaa" * 10)
    assert source.read_range(BLOB, len(DATA) - 4, memoryview(out)) == 4
    assert out[4:] == b"\xaa" * 6


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 1, 1 << 50])
def test_a_range_beyond_the_end_is_empty(source: LayoutSource, offset: int) -> None:
    assert read(source, offset, 7) == b""


def test_a_small_blob_and_the_index_are_read_as_a_whole(source: LayoutSource) -> None:
    assert source.read_blob(BLOB, len(DATA)) == DATA
    assert source.read_index(5) == b"index"


def test_a_blob_above_the_bound_is_not_read(source: LayoutSource) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        source.read_blob(BLOB, len(DATA) - 1)
    assert caught.value.problem is StoreProblem.BAD_ANSWER


def test_an_absent_blob_is_not_found_and_not_retryable(source: LayoutSource) -> None:
    for attempt in (lambda: source.read_blob(ABSENT, 9), lambda: source.read_range(ABSENT, 0, memoryview(bytearray(1)))):
        with pytest.raises(ArtifactUnavailableError) as caught:
            attempt()
        assert caught.value.problem is StoreProblem.NOT_FOUND
        assert not caught.value.retryable


def test_many_threads_read_at_once(source: LayoutSource) -> None:
    with ThreadPoolExecutor(8) as pool:
        offsets = [i * 65_536 for i in range(48)]
        assert list(pool.map(lambda at: read(source, at, 65_536), offsets)) == [DATA[at : at + 65_536] for at in offsets]


# --- locations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "dir://{}", "file://{}", "{}/"])
def test_a_folder_is_named_by_path_or_url(layout: Path, form: str) -> None:
    source = open_source(form.format(layout), None, TIMEOUT_S)
    assert source.read_index(5) == b"index"
    source.close()


@pytest.mark.parametrize(
    "location",
    [
        "ftp://host/x",
        "dir://host/x",
        "file://x",
        "http://",
        "http:///x",
        "http://user:password@host/x",
        "http://host/x?y",
        "http://host/x?y#z",
        "https://host/x?",
        "https://host/x?y#z",
        "https://host/x?y z",
        "https://host/x?é",
        "http://host/x#y",
        "http://host:x/",
        "http://host:0/",
        "http://[/",
        "http://hôst/",
    ],
)
def test_a_location_that_is_none_is_a_configuration_error(location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(location, None, TIMEOUT_S)
    assert caught.value.key == "artifact.source"


@given(st.text(max_size=40) | st.text(max_size=40).map(lambda rest: "http://" + rest))
def test_any_location_opens_or_is_our_error(location: str) -> None:
    try:
        open_source(location, None, TIMEOUT_S).close()
    except AgentError as error:
        str(error)


def test_a_url_may_have_a_path(layout: Path) -> None:
    with RangeServer(layout.parent) as server:
        source = open_source(f"{server.url}/{layout.name}/", None, TIMEOUT_S)
        assert source.read_index(5) == b"index"
        source.close()


def test_the_query_of_a_url_goes_with_every_request(layout: Path) -> None:
    query = "sv=2026-11-01&sig=a%2Bb%3D&se=2026-12-01T00%3A00%3A00Z"
    with RangeServer(layout.parent) as server:
        source = open_source(f"{server.url}/{layout.name}?{query}", None, TIMEOUT_S)
        assert source.read_index(5) == b"index"
        assert read(source, 0, 16) == DATA[:16]
        source.close()
    assert [path.partition("?")[2] for path, _ in server.requests] == [query, query]


def test_a_signed_query_goes_over_tls_only() -> None:
    open_source("https://host.example/x?sig=1", None, TIMEOUT_S).close()
    with pytest.raises(ConfigError) as caught:
        open_source("http://host.example/x?sig=1", None, TIMEOUT_S)
    assert (caught.value.key, caught.value.problem) == ("artifact.source", ConfigProblem.NEEDS_OTHER_KEY)


def test_a_signed_query_stands_in_no_text() -> None:
    text = repr(ArtifactConfig(source="https://host.example/x?sig=hidden", manifest_digest="sha256:" + "0" * 64))
    assert "host.example" in text
    assert "hidden" not in text


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        open_source(str(tmp_path / "absent"), None, TIMEOUT_S)
    assert caught.value.problem is StoreProblem.NOT_FOUND


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "socket"])
def test_a_blob_that_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    blob = tmp_path / "blobs" / "sha256" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    match kind:
        case "link":
            (tmp_path / "target").write_bytes(b"x")
            blob.symlink_to(tmp_path / "target")
        case "folder":
            blob.mkdir()
        case "fifo":
            os.mkfifo(blob)
        case _:
            os.mknod(blob, stat.S_IFSOCK | 0o600)
    source = open_source(str(tmp_path), None, TIMEOUT_S)
    with pytest.raises(ArtifactUnavailableError) as caught:
        read(source, 0, 1)
    assert caught.value.problem is StoreProblem.BAD_ANSWER
    source.close()


def test_reading_does_not_use_up_descriptors(layout: Path) -> None:
    source = open_source(str(layout), None, TIMEOUT_S)
    read(source, 0, 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(source, 0, 1)
        with pytest.raises(ArtifactUnavailableError):
            source.read_blob(ABSENT, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


# --- servers that misbehave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "problem", "status", "retryable"),
    [
        (Fault.NO_RANGES, StoreProblem.BAD_ANSWER, 200, False),
        (Fault.WRONG_START, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.WRONG_LENGTH, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.LONGER_RANGE, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.NO_CONTENT_RANGE, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.LONGER_BODY, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.MULTIPART, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.GZIP, StoreProblem.BAD_ANSWER, 206, False),
        (Fault.CUT, StoreProblem.UNREACHABLE, 0, True),
        (Fault.CUT_CHUNKED, StoreProblem.UNREACHABLE, 0, True),
        (Fault.GARBAGE, StoreProblem.UNREACHABLE, 0, True),
        (Fault.NOT_FOUND, StoreProblem.NOT_FOUND, 404, False),
        (Fault.FORBIDDEN, StoreProblem.REFUSED, 403, False),
        (Fault.BROKEN, StoreProblem.SERVER_ERROR, 500, True),
        (Fault.TEAPOT, StoreProblem.BAD_ANSWER, 418, False),
        (Fault.REDIRECT_LOOP, StoreProblem.BAD_ANSWER, 0, False),
        (Fault.REDIRECT_AWAY, StoreProblem.BAD_ANSWER, 0, False),
        (Fault.REDIRECT_NOWHERE, StoreProblem.BAD_ANSWER, 0, False),
    ],
)
@pytest.mark.parametrize("tls", [False, True])
def test_a_fault_of_the_server_is_one_error_and_the_next_read_works(
    layout: Path, tmp_path: Path, *, fault: Fault, problem: StoreProblem, status: int, retryable: bool, tls: bool
) -> None:
    pem, ca = make_certificate(tmp_path) if tls else (None, None)
    answers = 4 if fault is Fault.REDIRECT_LOOP else 1
    with RangeServer(layout, fault, faulty_answers=answers, certificate=pem) as server:
        source = open_source(server.url, ca, TIMEOUT_S)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source, 1000, 2000)
        assert (caught.value.problem, caught.value.status, caught.value.retryable) == (problem, status, retryable)
        assert len(server.requests) == answers
        assert read(source, 1000, 2000) == DATA[1000:3000]
        source.close()


@pytest.mark.parametrize("fault", [Fault.CHUNKED, Fault.REDIRECT_HERE])
def test_what_is_unusual_but_right_is_read(layout: Path, fault: Fault) -> None:
    with RangeServer(layout, fault) as server:
        source = open_source(server.url, None, TIMEOUT_S)
        assert read(source, 1000, 2000) == DATA[1000:3000]
        assert read(source, len(DATA) - 3, 2000) == DATA[-3:]
        source.close()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault.CUT, StoreProblem.UNREACHABLE),
        (Fault.CUT_CHUNKED, None),
        (Fault.GZIP, StoreProblem.BAD_ANSWER),
        (Fault.BROKEN, StoreProblem.SERVER_ERROR),
        (Fault.GARBAGE, StoreProblem.UNREACHABLE),
    ],
)
def test_a_small_blob_is_whole_or_an_error(layout: Path, fault: Fault, problem: StoreProblem | None) -> None:
    with RangeServer(layout, fault) as server:
        source = open_source(server.url, None, TIMEOUT_S)
        if problem is None:  # a clean end is the server's word for the length; the digest tells
            assert source.read_blob(BLOB, len(DATA)) == DATA[: len(DATA) // 2]
        else:
            with pytest.raises(ArtifactUnavailableError) as caught:
                source.read_blob(BLOB, len(DATA))
            assert caught.value.problem is problem
        source.close()


@pytest.mark.parametrize("size", [b"-1", b"-5", b"-0x1"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_chunk_of_less_than_nothing_does_not_read_without_end(size: bytes, *, whole: bool) -> None:
    """http.client takes it for a number, and -1 for everything that comes."""
    status = b"200 OK" if whole else b"206 Part\r\nContent-Range: bytes 0-99/100"
    head = b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n" % (status, size)
    with answers(head + bytes(16 << 20)) as url:
        source = open_source(url, None, TIMEOUT_S)
        tracemalloc.start()
        try:
            with pytest.raises(ArtifactUnavailableError) as caught:
                if whole:
                    source.read_blob(BLOB, 100)
                else:
                    read(source, 0, 100)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert (caught.value.problem, caught.value.retryable) == (StoreProblem.UNREACHABLE, True)
        source.close()


def test_a_server_that_never_answers_times_out(layout: Path) -> None:
    with RangeServer(layout, Fault.SILENT) as server:
        source = open_source(server.url, None, 0.2)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source, 0, 1)
        assert caught.value.problem is StoreProblem.TIMEOUT
        assert caught.value.retryable
        source.close()


def test_a_port_without_a_server_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    source = open_source(f"http://127.0.0.1:{port}", None, TIMEOUT_S)
    with pytest.raises(ArtifactUnavailableError) as caught:
        read(source, 0, 1)
    assert caught.value.problem is StoreProblem.UNREACHABLE


def test_a_server_under_another_ca_is_refused_before_anything_is_asked(layout: Path, tmp_path: Path) -> None:
    pem, _ = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, other_ca = make_certificate(tmp_path / "other")
    with RangeServer(layout, certificate=pem) as server:
        for ca in (other_ca, None):
            source = open_source(server.url, ca, TIMEOUT_S)
            with pytest.raises(ArtifactUnavailableError) as caught:
                read(source, 0, 1)
            assert caught.value.problem is StoreProblem.TLS
            source.close()
        assert server.requests == []


def test_a_server_under_another_name_is_refused(layout: Path, tmp_path: Path) -> None:
    pem, ca = make_certificate(tmp_path)
    with RangeServer(layout, certificate=pem) as server:
        source = open_source(server.url.replace("127.0.0.1", "localhost"), ca, TIMEOUT_S)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source, 0, 1)
        assert caught.value.problem is StoreProblem.TLS
        assert server.requests == []


def test_a_connection_cut_in_the_tls_handshake_may_be_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)  # all of the ClientHello, so that closing sends no reset

        thread = threading.Thread(target=hang_up)
        thread.start()
        source = open_source(f"https://127.0.0.1:{listener.getsockname()[1]}", None, TIMEOUT_S)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source, 0, 1)
        thread.join()
        source.close()
    assert caught.value.problem is StoreProblem.UNREACHABLE


def test_connections_of_refused_answers_come_back(layout: Path) -> None:
    with RangeServer(layout, Fault.NO_RANGES, faulty_answers=40) as server:
        source = open_source(server.url, None, TIMEOUT_S)
        for _ in range(40):
            with pytest.raises(ArtifactUnavailableError):
                read(source, 0, 1)
        assert read(source, 0, 1) == DATA[:1]
        source.close()


def test_https_to_a_server_without_tls_is_refused(layout: Path) -> None:
    with RangeServer(layout) as server:
        source = open_source(server.url.replace("http:", "https:"), None, TIMEOUT_S)
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(source, 0, 1)
        assert caught.value.problem is StoreProblem.TLS


def test_proxies_of_the_environment_are_not_used(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with RangeServer(layout) as server:
        source = open_source(server.url, None, TIMEOUT_S)
        assert read(source, 0, 3) == DATA[:3]
        source.close()


def test_one_thread_keeps_one_connection(layout: Path) -> None:
    with RangeServer(layout) as server:
        source = open_source(server.url, None, TIMEOUT_S)
        for i in range(10):
            read(source, i, 1000)
        source.read_index(100)
        assert server.connections == 1
        assert server.requests[0] == (f"/blobs/sha256/{'ab' * 32}", "bytes=0-999")
        source.close()


def test_urllib3_prints_nothing_of_its_own(layout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for fault in (Fault.GARBAGE, Fault.CUT, Fault.REDIRECT_AWAY):
        with RangeServer(layout, fault) as server:
            source = open_source(server.url, None, TIMEOUT_S)
            with pytest.raises(ArtifactUnavailableError):
                read(source, 0, 100)
            source.close()
    assert capfd.readouterr() == ("", "")
