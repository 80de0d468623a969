"""What a push does with a layout or a registry that is not as it should be. Real registries: test_artifact_sources_oci.py."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.artifact import manifest as m
from agent.artifact.push import check_repository, push_layout
from agent.artifact.seal import seal_model
from agent.artifact.seal_volume import seal_volume
from agent.artifact.sources.access import Access
from agent.artifact.sources.oci import Repository
from agent.closed import Ident
from agent.errors import (
    ArtifactUnavailableError,
    MalformedManifestError,
    ManifestDigestError,
    ManifestTooLargeError,
    StoreProblem,
)
from agent.http_limited import limited
from tests.range_server import make_certificate
from tests.script_server import Reply, ScriptServer, Seen

TIMEOUT_S = 10.0
LOGIN = Access("guest", "secret")


class Stored:
    """A registry that keeps what it gets, in the order in which it gets it; nothing is asked of anybody."""

    def __init__(self, answer: Callable[[Seen], Reply | None] = lambda _: None) -> None:
        self.put: dict[str, bytes] = {}
        self._answer = answer

    def __call__(self, request: Seen) -> Reply:
        reply = self._answer(request)
        if reply is not None:
            return reply
        match request.method:
            case "HEAD":
                return Reply(200 if request.path.rpartition("/")[2] in self.blobs else 404)
            case "POST":
                return Reply(202, (("Location", "/v2/a/blobs/uploads/1?state=x"),))
            case "GET":
                return Reply(404)
        if len(request.body) != int(request.headers["content-length"]):
            return Reply(400)
        self.put[request.path] = request.body
        return Reply(201)

    @property
    def blobs(self) -> set[str]:
        return {m.digest_of(body) for path, body in self.put.items() if "/blobs/" in path}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(os.urandom(3_000_000))
    seal_model(tmp_path / "model", tmp_path / "layout", bytes(32), "kbs:///a/b/1", "tiny", 1, lambda *_: None)
    return tmp_path / "layout"


def push(layout: Path, stored: Callable[[Seen], Reply], folder: Path, told: list[tuple[int, int]] | None = None) -> list[Seen]:
    """Push it, and give what the registry saw."""
    pem, ca = make_certificate(folder)
    with ScriptServer(stored, pem) as server:
        progress = (lambda done, total: told.append((done, total))) if told is not None else lambda *_: None
        push_layout(layout, Repository.parse(f"oci://{server.host}/a"), ca, LOGIN, TIMEOUT_S, progress)
        return server.seen


def refused(layout: Path, stored: Callable[[Seen], Reply], folder: Path) -> StoreProblem:
    with pytest.raises(ArtifactUnavailableError) as caught:
        push(layout, stored, folder)
    return caught.value.problem


def test_every_blob_comes_before_the_manifest_and_the_name_comes_last(layout: Path, tmp_path: Path) -> None:
    stored, told = Stored(), list[tuple[int, int]]()
    push(layout, stored, tmp_path, told)
    (entry,) = m.parse_index((layout / "index.json").read_bytes())
    kinds = [path.split("/")[3] for path in stored.put]
    assert kinds == ["blobs", "blobs", "manifests", "manifests"]
    assert list(stored.put)[2:] == [f"/v2/a/manifests/{entry.digest}", "/v2/a/manifests/tiny-v1"]
    blobs = {f"sha256:{path.name}" for path in (layout / "blobs" / "sha256").iterdir()}
    assert stored.blobs | {entry.digest} == blobs
    assert told[-1] == (told[-1][1],) * 2
    assert told == sorted(told)


def test_a_manifest_that_no_registry_takes_is_refused_before_anything_is_sent(layout: Path, tmp_path: Path) -> None:
    """A layout of which there are only documents."""
    files = tuple(m.SealedFile(f"{i:050}", 1, m.digest_of(b""), 2, b"\x28" + bytes(39)) for i in range(16_000))
    model = m.ModelConfig(Ident("tiny"), 2, Ident("kbs:///a/b/1"), bytes(32), files)
    manifest = m.pack_manifest(model)
    for data in (manifest, m.pack_config(model)):
        (layout / "blobs" / m.digest_of(data).replace(":", "/")).write_bytes(data)
    index = layout / "index.json"
    index.write_bytes(m.add_to_index(index.read_bytes(), manifest, "tiny-v2"))
    stored = Stored()
    with pytest.raises(ManifestTooLargeError) as caught:
        push(layout, stored, tmp_path)
    assert (caught.value.files, caught.value.manifest_bytes) == (16_000, len(manifest))
    assert stored.put == {}


def test_of_a_volume_its_manifest_is_pushed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    image, layout = tmp_path / "model.img", tmp_path / "layout"
    digest = seal_volume(tmp_path / "model", image, layout, bytes(32), "kbs:///a/b/1", "tiny", 1, lambda *_: None)
    stored = Stored()
    push(layout, stored, tmp_path)
    manifest = m.parse_manifest(stored.put["/v2/a/manifests/tiny-v1"], digest, (m.VOLUME_CONFIG_TYPE,))
    assert stored.blobs == {m.digest_of(b"{}"), manifest.config_digest}


def test_what_is_there_is_not_sent(layout: Path, tmp_path: Path) -> None:
    stored, told = Stored(), list[tuple[int, int]]()
    push(layout, stored, tmp_path)
    seen = push(layout, stored, tmp_path, told)
    assert "POST" not in {request.method for request in seen}
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("location", [None, "https://127.0.0.1:1/v2/x", "http://127.0.0.1/v2/x", "https://[", "//x/"])
def test_an_upload_that_leads_elsewhere_is_refused(layout: Path, tmp_path: Path, location: str | None) -> None:
    """Credentials and ciphertext go to the registry that was named."""

    def answer(request: Seen) -> Reply | None:
        return Reply(202, () if location is None else (("Location", location),)) if request.method == "POST" else None

    stored = Stored(answer)
    assert refused(layout, stored, tmp_path) is StoreProblem.BAD_ANSWER
    assert stored.put == {}


@pytest.mark.parametrize(
    ("method", "status", "problem"),
    [
        ("HEAD", 500, StoreProblem.SERVER_ERROR),
        ("POST", 403, StoreProblem.REFUSED),
        ("POST", 200, StoreProblem.BAD_ANSWER),
        ("PUT", 400, StoreProblem.BAD_ANSWER),
        ("PUT", 413, StoreProblem.BAD_ANSWER),
        ("PUT", 307, StoreProblem.BAD_ANSWER),
    ],
)
def test_an_answer_that_is_no_success_ends_it(
    layout: Path, tmp_path: Path, method: str, status: int, problem: StoreProblem
) -> None:
    stored = Stored(lambda request: Reply(status) if request.method == method else None)
    assert refused(layout, stored, tmp_path) is problem
    assert stored.put == {}


def test_a_blob_that_is_too_short_is_not_waited_for(layout: Path, tmp_path: Path) -> None:
    largest = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    stored = Stored()
    assert refused(layout, stored, tmp_path) is StoreProblem.BAD_ANSWER
    assert stored.put == {}


def test_a_registry_that_takes_no_more_bytes_is_not_waited_for(layout: Path) -> None:
    """Behind small buffers a body finds no room; the limits of a read hold for what is sent as well."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                for reply in (b"404 Not Found\r\nContent-Length: 0", b"202 OK\r\nLocation: /x\r\nContent-Length: 0"):
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 %b\r\n\r\n" % reply)
                done.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        repository = Repository.parse(f"oci+http://127.0.0.1:{listener.getsockname()[1]}/a")
        started = time.monotonic()
        with pytest.raises(ArtifactUnavailableError) as caught, limited(started + 1.0):
            push_layout(layout, repository, None, LOGIN, TIMEOUT_S, lambda *_: None)
        done.set()
        thread.join()
    assert caught.value.problem is StoreProblem.TIMEOUT
    assert time.monotonic() - started < 5


def test_a_layout_that_is_none_is_refused(layout: Path, tmp_path: Path) -> None:
    (entry,) = m.parse_index((layout / "index.json").read_bytes())
    manifest = layout / "blobs" / entry.digest.replace(":", "/")
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(ManifestDigestError):
        push(layout, Stored(), tmp_path)
    (layout / "index.json").write_bytes(b"{}")
    with pytest.raises(MalformedManifestError):
        push(layout, Stored(), tmp_path)
    (layout / "index.json").write_bytes(b'{"schemaVersion": 2, "manifests": []}')
    assert refused(layout, Stored(), tmp_path) is StoreProblem.NOT_FOUND
    assert refused(tmp_path / "absent", Stored(), tmp_path) is StoreProblem.NOT_FOUND


@pytest.mark.parametrize(
    "name", ["../../other/manifests/latest", "latest?x", "a#b", "a/b", "", "a\r\nb", "\x1b[31m", "x" * 129]
)
def test_a_name_that_is_no_tag_goes_into_no_url(layout: Path, tmp_path: Path, name: str) -> None:
    """Who made the layout would choose the repository that our credentials are used for."""
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0]["annotations"][m.REF_NAME] = name
    (layout / "index.json").write_text(json.dumps(index))
    stored = Stored()
    with pytest.raises(MalformedManifestError) as caught:
        push(layout, stored, tmp_path)
    assert caught.value.field == "index.annotations"
    assert stored.put == {}


def test_a_name_that_stands_for_two_models_stands_for_none(layout: Path, tmp_path: Path) -> None:
    seal_model(tmp_path / "model", layout, bytes(32), "kbs:///a/b/1", "tiny", 2, lambda *_: None)
    index = (layout / "index.json").read_bytes()
    (layout / "index.json").write_bytes(index.replace(b"tiny-v2", b"tiny-v1"))
    stored = Stored()
    with pytest.raises(MalformedManifestError):
        push(layout, stored, tmp_path)
    assert stored.put == {}


def test_a_repository_is_asked_before_it_is_sealed_for(tmp_path: Path) -> None:
    pem, ca = make_certificate(tmp_path)
    with ScriptServer(lambda _: Reply(401, (("WWW-Authenticate", "Basic"),)), pem) as server:
        with pytest.raises(ArtifactUnavailableError) as caught:
            check_repository(Repository.parse(f"oci://{server.host}/a"), ca, LOGIN, TIMEOUT_S)
        assert caught.value.problem is StoreProblem.REFUSED
    with ScriptServer(Stored(), pem) as server:
        check_repository(Repository.parse(f"oci://{server.host}/a"), ca, LOGIN, TIMEOUT_S)
