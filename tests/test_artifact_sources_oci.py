"""Registries: a real one over TLS with passwords and tokens, and ones that misbehave."""

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent import http_policy
from agent.artifact import manifest as m
from agent.artifact import push, signature
from agent.artifact.identify import find_manifest
from agent.artifact.load import read_model
from agent.artifact.seal import seal_model
from agent.artifact.sources import BlobSource, LayoutSource, open_source
from agent.artifact.sources.access import ANONYMOUS, Access
from agent.artifact.sources.oci import Repository
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, ConfigError, ManifestSignatureError, StoreProblem
from tests.range_server import make_certificate
from tests.registry import LOGIN, SECRET, USER, DockerRegistry, TokenServer
from tests.script_server import Reply, ScriptServer, Seen

TIMEOUT_S = 10.0
KEY, KEY_URI, NAME = bytes(range(32)), "kbs:///models/tiny/1", "tiny"
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
BLOB = "sha256:" + "ab" * 32
NOWHERE = "127.0.0.1:1"


@dataclass(frozen=True)
class Sealed:
    layout: Path
    digest: str

    def pinned(self) -> ArtifactConfig:
        return ArtifactConfig(source="/", manifest_digest=self.digest, name=NAME)

    def signed(self, tag: str = f"{NAME}-v3") -> ArtifactConfig:
        return ArtifactConfig(source="/", provider_keys=(signature.public_pem(SIGNER),), tag=tag, name=NAME)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(os.urandom(3 << 20))
    (folder / "model" / "config.json").write_bytes(b"{}")
    digest = seal_model(folder / "model", folder / "layout", KEY, KEY_URI, NAME, 3, lambda *_: None, [SIGNER])
    return Sealed(folder / "layout", digest)


def push_to(registry: DockerRegistry, sealed: Sealed, access: Access) -> tuple[push.Pushed, ...]:
    repository = Repository.parse(f"oci://{registry.host}/models/tiny")
    return push.push_layout(sealed.layout, repository, registry.ca_pem, access, TIMEOUT_S, lambda *_: None)


def open_oci(registry: DockerRegistry, access: Access = ANONYMOUS) -> LayoutSource:
    return open_source(f"oci://{registry.host}/models/tiny", registry.ca_pem, TIMEOUT_S, access)


def check_all(source: BlobSource, sealed: Sealed) -> None:
    """By digest, by signature, and every byte, as the layout has them."""
    model = read_model(source, sealed.pinned(), KEY_URI)
    assert isinstance(model, m.ModelConfig)
    assert find_manifest(source, sealed.signed(), threading.Event()).digest == sealed.digest
    for file in model.files:
        expected = (sealed.layout / "blobs" / file.blob_digest.replace(":", "/")).read_bytes()
        out = memoryview(bytearray(1 << 20))
        got = b""
        while length := source.read_range(file.blob_digest, len(got), out):
            got += out[:length]
        assert got == expected


# --- a real registry --------------------------------------------------------------------------------------------------


def test_a_registry_with_passwords_gives_back_what_was_pushed(sealed: Sealed, tmp_path: Path) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        (pushed,) = push_to(registry, sealed, LOGIN)
        assert (pushed.manifest_digest, pushed.tag) == (sealed.digest, f"{NAME}-v3")
        assert pushed.sent_bytes > 3 << 20
        with closing(open_oci(registry, LOGIN)) as source:
            check_all(source, sealed)
            (entry,) = m.parse_index(source.read_index(m.MAX_INDEX_BYTES))
            assert entry == m.IndexEntry(sealed.digest, f"{NAME}-v3")
        for access in (ANONYMOUS, Access(USER, "wrong")):
            with closing(open_oci(registry, access)) as source, pytest.raises(ArtifactUnavailableError) as caught:
                source.read_manifest(sealed.digest, 1 << 20)
            assert (caught.value.problem, caught.value.status) == (StoreProblem.REFUSED, 401)


def test_a_second_push_sends_nothing_and_adds_no_second_signature(sealed: Sealed, tmp_path: Path) -> None:
    with DockerRegistry(tmp_path) as registry:
        (first,) = push_to(registry, sealed, ANONYMOUS)
        (second,) = push_to(registry, sealed, ANONYMOUS)
        assert first.sent_bytes > second.sent_bytes == 0
        with closing(open_oci(registry)) as source:
            assert len(source.referrers(sealed.digest)) == 1
            check_all(source, sealed)


def test_a_push_that_broke_off_goes_on_where_it_was_and_has_no_name_before(sealed: Sealed, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sealed.layout, broken)
    largest = max((broken / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.rename(tmp_path / "away")
    with DockerRegistry(tmp_path) as registry:
        with pytest.raises(ArtifactUnavailableError) as missing:
            push_to(registry, Sealed(broken, sealed.digest), ANONYMOUS)
        assert missing.value.problem is StoreProblem.NOT_FOUND
        with closing(open_oci(registry)) as source, pytest.raises(ArtifactUnavailableError) as caught:
            source.read_manifest(f"{NAME}-v3", 1 << 20)
        assert caught.value.problem is StoreProblem.NOT_FOUND
        (tmp_path / "away").rename(largest)
        (pushed,) = push_to(registry, Sealed(broken, sealed.digest), ANONYMOUS)
        assert pushed.sent_bytes == largest.stat().st_size


@pytest.mark.parametrize("anonymous", [False, True])
def test_a_token_is_asked_for_once_and_used_until_it_ends(sealed: Sealed, tmp_path: Path, *, anonymous: bool) -> None:
    access = ANONYMOUS if anonymous else LOGIN
    with TokenServer(tmp_path, anonymous=anonymous) as tokens, DockerRegistry(tmp_path, token_server=tokens) as registry:
        push_to(registry, sealed, access)
        (asked,) = tokens.asked
        assert asked[0] == {"scope": ["repository:models/tiny:pull,push"], "service": ["tests"]}
        basic = "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
        assert asked[1] == (None if anonymous else basic)
        tokens.asked.clear()
        with closing(open_oci(registry, access)) as source:
            check_all(source, sealed)
            assert [query["scope"] for query, _ in tokens.asked] == [["repository:models/tiny:pull"]]
        tokens.asked.clear()
        tokens.life_s = 0  # it is used once, for the request that asked for it
        with closing(open_oci(registry, access)) as source:
            check_all(source, sealed)
            assert len(tokens.asked) > 5


def test_a_wrong_password_at_the_token_server_is_refused(sealed: Sealed, tmp_path: Path) -> None:
    with TokenServer(tmp_path) as tokens, DockerRegistry(tmp_path, token_server=tokens) as registry:
        with closing(open_oci(registry, Access(USER, "wrong"))) as source, pytest.raises(ArtifactUnavailableError) as caught:
            source.read_manifest(sealed.digest, 1 << 20)
        assert caught.value.problem is StoreProblem.REFUSED


def skopeo(*arguments: str) -> None:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed")
    ended = subprocess.run([program, "--insecure-policy", *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_skopeo_carries_it_from_layout_to_registry_to_registry(sealed: Sealed, tmp_path: Path) -> None:
    """The signature too: under the tag that stands for what lies beside a manifest, it is one image more."""
    tag = f"{NAME}-v3"
    with DockerRegistry(tmp_path, users=True) as first, DockerRegistry(tmp_path) as second:
        into, out_of = f"--dest-cert-dir={first.cert_dir}", f"--src-cert-dir={first.cert_dir}"
        login = f"{USER}:{SECRET}"
        skopeo("copy", into, f"--dest-creds={login}", f"oci:{sealed.layout}:{tag}", f"docker://{first.host}/models/tiny:{tag}")
        with closing(open_oci(first, LOGIN)) as source:
            assert read_model(source, sealed.pinned(), KEY_URI).version == 3
            with pytest.raises(ManifestSignatureError):  # skopeo takes what a name stands for, and nothing beside it
                find_manifest(source, sealed.signed(), threading.Event())
        push_to(first, sealed, LOGIN)
        beside = sealed.digest.replace(":", "-")
        for name in (tag, beside):
            where = f"docker://{second.host}/models/tiny:{name}"
            creds = (out_of, f"--src-creds={login}", f"--dest-cert-dir={second.cert_dir}")
            skopeo("copy", "--all", *creds, f"docker://{first.host}/models/tiny:{name}", where)
        with closing(open_oci(second)) as source:
            check_all(source, sealed)


# --- registries that misbehave ----------------------------------------------------------------------------------------

BASIC = (("WWW-Authenticate", 'Basic realm="x"'),)
MANIFEST = ("Content-Type", m.MANIFEST_TYPE)
INDEX = ("Content-Type", m.INDEX_TYPE)
DATA = bytes(range(256)) * 16
Answer = Callable[[Seen], Reply]


def part(request: Seen, data: bytes = DATA) -> Reply:
    start, end = (int(number) for number in request.headers["range"].removeprefix("bytes=").split("-"))
    body = data[start : end + 1]
    return Reply(206, (("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}"),), body)


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[[Answer, Access], tuple[LayoutSource, ScriptServer]]]:
    """A source before a registry that answers as told, over TLS."""
    pem, ca = make_certificate(tmp_path)
    opened: list[tuple[LayoutSource, ScriptServer]] = []

    def start(answer: Answer, access: Access = LOGIN) -> tuple[LayoutSource, ScriptServer]:
        server = ScriptServer(answer, pem).__enter__()
        opened.append((open_source(f"oci://{server.host}/a", ca, TIMEOUT_S, access), server))
        return opened[-1]

    yield start
    for source, server in opened:
        source.close()
        server.__exit__(None, None, None)


Ask = Callable[..., tuple[LayoutSource, ScriptServer]]


def read(source: BlobSource, offset: int = 10, length: int = 20) -> bytes:
    out = bytearray(length)
    return bytes(out[: source.read_range(BLOB, offset, memoryview(out))])


def fails(source: BlobSource, call: Callable[[BlobSource], object] = read) -> tuple[StoreProblem, int]:
    with pytest.raises(ArtifactUnavailableError) as caught:
        call(source)
    assert SECRET not in str(caught.value)
    return caught.value.problem, caught.value.status


def test_a_registry_that_goes_on_asking_is_asked_twice(ask: Ask) -> None:
    source, server = ask(lambda _: Reply(401, BASIC))
    assert fails(source) == (StoreProblem.REFUSED, 401)
    assert ["authorization" in request.headers for request in server.seen] == [False, True]


def test_credentials_are_sent_to_whom_asked_and_then_at_once(ask: Ask) -> None:
    source, server = ask(lambda seen: part(seen) if "authorization" in seen.headers else Reply(401, BASIC))
    for _ in range(3):
        assert read(source) == DATA[10:30]
    assert ["authorization" in request.headers for request in server.seen] == [False, True, True, True]


@pytest.mark.parametrize("value", ["", "Negotiate", "Digest realm=x", 'basic realm="', 'Bearer realm="https://x"y', "x" * 9000])
def test_a_challenge_that_nothing_answers_ends_the_request(ask: Ask, value: str) -> None:
    source, server = ask(lambda _: Reply(401, (("WWW-Authenticate", value),)))
    problem, status = fails(source)
    assert problem in (StoreProblem.REFUSED, StoreProblem.BAD_ANSWER)
    assert status == 401
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "realm",
    [
        "http://127.0.0.1:9/t",
        "ftp://x/t",
        "/t",
        "",
        "https://u:p@127.0.0.1:9/t",
        "https:///t",
        "https://127.0.0.1:9/\xe9",
        "https://127.0.0.1:9/\tt",
        "https://[",
        "https://a#b",
        "https://127.0.0.1:9/t?scope=repository:other:pull,push",
        "https://127.0.0.1:9/t?x=y&%73cope=",
    ],
)
def test_a_realm_that_no_credentials_may_go_to_is_refused(ask: Ask, realm: str) -> None:
    source, server = ask(lambda _: Reply(401, (("WWW-Authenticate", f'Bearer realm="{realm}"'),)))
    assert fails(source) == (StoreProblem.BAD_ANSWER, 401)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token": 1}',
        b'{"token": ""}',
        b'{"token": "a\\r\\nX: y"}',
        b'{"token": "a b"}',
        b'{"token":"' + b"x" * 70_000 + b'"}',
    ],
)
def test_a_token_that_is_none_is_refused(ask: Ask, body: bytes) -> None:
    def answer(request: Seen) -> Reply:
        if request.path.startswith("/token"):
            return Reply(200, body=body)
        return Reply(401, (("WWW-Authenticate", f'Bearer realm="https://{request.headers["host"]}/token"'),))

    source, _ = ask(answer)
    assert fails(source)[0] is StoreProblem.BAD_ANSWER


def test_a_token_that_is_refused_midway_is_asked_for_again_once(ask: Ask) -> None:
    tokens = iter(f"token-{number}" for number in range(9))
    good = ["token-0"]

    def answer(request: Seen) -> Reply:
        if request.path.startswith("/token"):
            return Reply(200, body=json.dumps({"access_token": next(tokens), "expires_in": 300}).encode())
        if request.headers.get("authorization") == f"Bearer {good[0]}":
            return part(request)
        return Reply(401, (("WWW-Authenticate", f'Bearer realm="https://{request.headers["host"]}/token",service="s"'),))

    source, server = ask(answer)
    assert read(source) == read(source) == DATA[10:30]
    good[0] = "token-1"
    assert read(source) == DATA[10:30]
    good[0] = "none"
    assert fails(source) == (StoreProblem.REFUSED, 401)
    assert [request.path.partition("?")[0] for request in server.seen].count("/token") == 3


def test_a_token_is_not_sent_after_its_life(ask: Ask) -> None:
    def answer(request: Seen) -> Reply:
        if request.path.startswith("/token"):
            return Reply(200, body=b'{"token": "t", "expires_in": 1}')
        if "authorization" in request.headers:
            return part(request)
        return Reply(401, (("WWW-Authenticate", f'Bearer realm="https://{request.headers["host"]}/token"'),))

    source, server = ask(answer)
    assert read(source) == DATA[10:30]
    time.sleep(1)
    assert read(source) == DATA[10:30]
    sent = [request.headers.get("authorization") for request in server.seen if not request.path.startswith("/token")]
    assert sent == [None, "Bearer t", None, "Bearer t"]


def test_who_has_no_password_sends_none(ask: Ask) -> None:
    source, server = ask(lambda _: Reply(401, BASIC), ANONYMOUS)
    assert fails(source) == (StoreProblem.REFUSED, 401)
    assert ["authorization" in request.headers for request in server.seen] == [False]


def test_of_password_and_token_the_registry_gets_the_token(ask: Ask) -> None:
    def answer(request: Seen) -> Reply:
        if request.path.startswith("/token"):
            return Reply(200, body=b'{"token": "t"}')
        if "authorization" in request.headers:
            return part(request)
        return Reply(401, (*BASIC, ("WWW-Authenticate", f'Bearer realm="https://{request.headers["host"]}/token"')))

    source, server = ask(answer)
    assert read(source) == DATA[10:30]
    assert server.seen[-1].headers["authorization"] == "Bearer t"


def test_many_threads_ask_for_one_token(ask: Ask) -> None:
    def answer(request: Seen) -> Reply:
        if request.path.startswith("/token"):
            return Reply(200, body=b'{"token": "t"}')
        if "authorization" in request.headers:
            return part(request)
        return Reply(401, (("WWW-Authenticate", f'Bearer realm="https://{request.headers["host"]}/token"'),))

    source, server = ask(answer)
    threads = [threading.Thread(target=read, args=(source,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([1 for request in server.seen if request.path.startswith("/token")]) == 1


def test_credentials_never_follow_a_redirect_to_another_origin(ask: Ask, tmp_path: Path) -> None:
    storage_source, storage = ask(part)

    def answer(request: Seen) -> Reply:
        if "authorization" not in request.headers:
            return Reply(401, BASIC)
        return Reply(307, (("Location", f"{storage.url}/bucket/object?signature=x"),))

    source, _ = ask(answer)
    assert read(source) == DATA[10:30]
    (seen,) = storage.seen
    assert seen.path == "/bucket/object?signature=x"
    assert seen.headers["range"] == "bytes=10-29"
    assert "authorization" not in seen.headers
    storage_source.close()


def test_a_401_of_the_storage_behind_a_redirect_gets_no_credentials(ask: Ask) -> None:
    _, storage = ask(lambda _: Reply(401, BASIC))
    source, _ = ask(lambda _: Reply(307, (("Location", f"{storage.url}/x"),)))
    assert fails(source) == (StoreProblem.REFUSED, 401)
    assert [request.headers.get("authorization") for request in storage.seen] == [None]


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:9/x", "https://u:p@127.0.0.1:9/x", "file:///etc/passwd", "https://", "//"]
)
def test_a_redirect_of_a_registry_that_leaves_https_is_refused(ask: Ask, location: str) -> None:
    source, _ = ask(lambda _: Reply(307, (("Location", location),)))
    assert fails(source)[0] is StoreProblem.BAD_ANSWER


def test_a_redirect_loop_over_two_hosts_ends(ask: Ask) -> None:
    hosts: list[str] = []

    def answer(request: Seen) -> Reply:
        return Reply(307, (("Location", next(f"https://{host}/x" for host in hosts if host != request.headers["host"])),))

    (source, first), (_, second) = ask(answer), ask(answer)
    hosts += [first.host, second.host]
    assert fails(source)[0] is StoreProblem.BAD_ANSWER
    assert len(first.seen) + len(second.seen) == 4


def test_manifests_are_not_read_from_elsewhere(ask: Ask) -> None:
    _, other = ask(lambda _: Reply(200, (MANIFEST,), b"{}"))
    source, _ = ask(lambda _: Reply(307, (("Location", f"{other.url}/x"),)))
    assert fails(source, lambda source: source.read_manifest("latest", 100))[0] is StoreProblem.BAD_ANSWER
    assert other.seen == []


def test_ever_more_storage_hosts_are_not_kept(ask: Ask) -> None:
    """A store that redirects each read to another host costs it no more than connecting."""
    storages = [ask(part)[1] for _ in range(20)]
    order = iter(storages)
    source, server = ask(lambda _: Reply(307, (("Location", f"{next(order).url}/x"),)))
    kept = source._registry._web._pools  # type: ignore[attr-defined]
    own = kept[http_policy.origin(server.url)]
    for _ in storages:
        assert read(source) == DATA[10:30]
    assert len(kept) <= 16
    assert kept[http_policy.origin(server.url)] is own, "the registry's connections stay"


BAD_PARTS: dict[str, Answer] = {
    "200": lambda _: Reply(200, body=DATA),
    "204": lambda _: Reply(204),
    "gzip": lambda seen: Reply(206, (*part(seen).headers, ("Content-Encoding", "gzip")), part(seen).body),
    "other part": lambda seen: Reply(206, (("Content-Range", f"bytes 0-19/{len(DATA)}"),), DATA[:20]),
    "no content range": lambda seen: Reply(206, (), part(seen).body),
    "too many headers": lambda seen: Reply(206, [(f"X-{number}", "x") for number in range(200)], part(seen).body),
    "huge header": lambda seen: Reply(206, (("X", "x" * 100_000),), part(seen).body),
}


@pytest.mark.parametrize("kind", BAD_PARTS)
def test_a_part_that_is_none_is_refused(ask: Ask, kind: str) -> None:
    source, _ = ask(BAD_PARTS[kind])
    expected = StoreProblem.UNREACHABLE if "header" in kind else StoreProblem.BAD_ANSWER
    assert fails(source)[0] is expected


@pytest.mark.parametrize("status", [206, 416])
def test_a_part_is_not_taken_for_the_whole(ask: Ask, status: int) -> None:
    source, _ = ask(lambda _: Reply(status, (("Content-Range", "bytes 0-19/4096"),), DATA[:20]))
    assert fails(source, lambda source: source.read_blob(BLOB, 4096)) == (StoreProblem.BAD_ANSWER, status)


def test_a_digest_that_the_registry_claims_is_not_believed(ask: Ask, sealed: Sealed) -> None:
    bad = b'{"schemaVersion": 2}'
    source, _ = ask(lambda _: Reply(200, (MANIFEST, ("Docker-Content-Digest", sealed.digest)), bad))
    assert source.read_manifest(sealed.digest, 1 << 20) == bad  # `parse_manifest` compares what it is given
    with pytest.raises(ManifestSignatureError):
        find_manifest(_Answering(source), sealed.signed(), threading.Event())


class _Answering:
    """The same manifest for everything, and nothing beside it."""

    def __init__(self, source: BlobSource) -> None:
        self.read_manifest = source.read_manifest
        self.read_blob = source.read_blob
        self.read_range = source.read_range
        self.close = source.close

    def referrers(self, digest: str) -> tuple[str, ...]:
        return ()


# --- indexes and referrers --------------------------------------------------------------------------------------------


def descriptor(digit: str, **more: object) -> dict[str, object]:
    return {"mediaType": m.MANIFEST_TYPE, "digest": "sha256:" + digit * 64, "size": 2, **more}


def index(*manifests: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": m.INDEX_TYPE, "manifests": manifests}).encode()


OURS, OTHER = {"artifactType": m.ARTIFACT_TYPE}, {"artifactType": "a/b"}
LINUX = {"platform": {"os": "linux", "architecture": "amd64"}}


@pytest.mark.parametrize(
    ("manifests", "chosen"),
    [
        ([descriptor("1")], "1"),
        ([descriptor("1", **LINUX), descriptor("2")], "2"),
        ([descriptor("1"), descriptor("2", **OURS)], "2"),
        ([descriptor("1", **OTHER), descriptor("2", **OURS, **LINUX)], "2"),
        ([descriptor("1", **OURS), descriptor("1", **OURS)], "1"),
        ([descriptor("1", **OURS), descriptor("2", **OURS)], None),
        ([descriptor("1"), descriptor("2")], None),
        ([descriptor("1", **LINUX)], None),
        ([descriptor("1", **OTHER)], None),
        ([], None),
    ],
)
def test_an_index_under_a_tag_stands_for_its_one_model(ask: Ask, manifests: list[object], chosen: str | None) -> None:
    def answer(request: Seen) -> Reply:
        if request.path == "/v2/a/manifests/latest":
            return Reply(200, (INDEX,), index(*manifests))
        return Reply(200, (MANIFEST,), request.path.encode())

    source, server = ask(answer)
    if chosen is None:
        assert fails(source, lambda source: source.read_manifest("latest", 1 << 20))[0] is StoreProblem.BAD_ANSWER
        assert len(server.seen) == 1
    else:
        assert source.read_manifest("latest", 1 << 20).decode() == f"/v2/a/manifests/sha256:{chosen * 64}"
    assert server.seen[0].headers["accept"] == f"{m.MANIFEST_TYPE}, {m.INDEX_TYPE}"


def test_an_index_under_a_pinned_digest_is_what_was_pinned(ask: Ask) -> None:
    source, server = ask(lambda _: Reply(200, (INDEX,), index(descriptor("1"))))
    assert source.read_manifest(BLOB, 1 << 20) == index(descriptor("1"))
    assert len(server.seen) == 1


@pytest.mark.parametrize("filtered", [True, False])
def test_referrers_are_filtered_whether_the_registry_does_it_or_not(ask: Ask, *, filtered: bool) -> None:
    ours = {"artifactType": m.SIGNATURE_TYPE}
    found = [descriptor("1", **ours), *([] if filtered else [descriptor("2", **OTHER)]), descriptor("3", **ours)]
    headers = [INDEX, *([("OCI-Filters-Applied", "artifactType")] if filtered else [])]
    source, server = ask(lambda _: Reply(200, headers, index(*found)))
    assert source.referrers(BLOB) == ("sha256:" + "1" * 64, "sha256:" + "3" * 64)
    assert [request.path for request in server.seen] == [f"/v2/a/referrers/{BLOB}?artifactType={m.SIGNATURE_TYPE}"]


def test_without_the_interface_referrers_stand_under_a_tag_or_there_are_none(ask: Ask) -> None:
    tag = f"/v2/a/manifests/sha256-{'ab' * 32}"
    source, _ = ask(lambda seen: Reply(200, (INDEX,), index(descriptor("1"))) if seen.path == tag else Reply(404))
    assert source.referrers(BLOB) == ("sha256:" + "1" * 64,)
    source, server = ask(lambda _: Reply(404))
    assert source.referrers(BLOB) == ()
    assert server.seen[1].path == tag
    source, _ = ask(lambda seen: Reply(404) if "referrers" in seen.path else Reply(500))
    assert fails(source, lambda source: source.referrers(BLOB)) == (StoreProblem.SERVER_ERROR, 500)


def test_a_million_referrers_are_not_read(ask: Ask) -> None:
    many = b'{"schemaVersion":2,"manifests":[' + b",".join([json.dumps(descriptor("1")).encode()] * 1_000_000) + b"]}"
    source, _ = ask(lambda _: Reply(200, (INDEX,), many))
    assert fails(source, lambda source: source.referrers(BLOB)) == (StoreProblem.BAD_ANSWER, 200)


def test_as_many_referrers_as_fit_give_the_newest_64(ask: Ask) -> None:
    many = [{**descriptor("1", artifactType=m.SIGNATURE_TYPE), "digest": f"sha256:{number:064x}"} for number in range(9_000)]
    source, _ = ask(lambda _: Reply(200, (INDEX,), index(*many)))
    assert source.referrers(BLOB) == tuple(f"sha256:{number:064x}" for number in range(9_000 - 64, 9_000))


@pytest.mark.parametrize("body", [b"", b"[]", b'{"tags": [1]}', b'{"tags": {}}', b"\xff", b"[" * 100_000])
def test_a_tag_list_that_is_none_is_refused(ask: Ask, body: bytes) -> None:
    source, _ = ask(lambda _: Reply(200, body=body))
    assert fails(source, lambda _: source.read_index(100))[0] is StoreProblem.BAD_ANSWER


def test_tags_that_no_registry_could_have_are_passed_over(ask: Ask) -> None:
    tags = ["../../x", "a b", "", "x" * 129, "sha256-" + "0" * 64, "good"]

    def answer(request: Seen) -> Reply:
        if "tags" in request.path:
            return Reply(200, body=json.dumps({"name": "a", "tags": tags}).encode())
        return Reply(200, (MANIFEST,), json.dumps({"artifactType": m.ARTIFACT_TYPE}).encode())

    source, server = ask(answer)
    (entry,) = m.parse_index(source.read_index(1 << 20))
    assert entry.ref_name == "good"
    assert [request.path for request in server.seen] == ["/v2/a/tags/list?n=128", "/v2/a/manifests/good"]


def test_manifests_of_other_kinds_under_the_tags_take_no_memory(ask: Ask) -> None:
    """Each says of itself what it is, in as many bytes as it likes."""
    tags = [f"t{number}" for number in range(16)]

    def answer(request: Seen) -> Reply:
        if "tags" in request.path:
            return Reply(200, body=json.dumps({"tags": [*tags, "good"]}).encode())
        kind = m.ARTIFACT_TYPE if request.path.endswith("good") else "x" * 4_000_000
        return Reply(200, (MANIFEST,), json.dumps({"artifactType": kind}).encode())

    source, _ = ask(answer)
    found = source.read_index(m.MAX_INDEX_BYTES)
    assert len(found) < 1000
    assert [entry.ref_name for entry in m.parse_index(found)] == ["good"]


# --- pushes -------------------------------------------------------------------------------------------------------------


def test_a_registry_with_the_referrers_interface_needs_no_tag_for_them(tmp_path: Path, sealed: Sealed) -> None:
    pem, ca = make_certificate(tmp_path)
    stored: dict[str, bytes] = {}

    def answer(request: Seen) -> Reply:
        match request.method:
            case "HEAD":
                return Reply(307, (("Location", f"https://{NOWHERE}/there"),)) if stored else Reply(404)
            case "POST":
                return Reply(202, (("Location", "/v2/a/blobs/uploads/1?state=x"),))
        stored[request.path] = request.body
        subject = [("OCI-Subject", "sha256:x")] if b'"subject"' in request.body else []
        return Reply(201, subject)

    with ScriptServer(answer, pem) as server:
        push.push_layout(sealed.layout, Repository.parse(f"oci://{server.host}/a"), ca, LOGIN, TIMEOUT_S, lambda *_: None)
    paths = list(stored)
    assert paths[0].startswith("/v2/a/blobs/uploads/1?state=x&digest=sha256%3A")  # the rest was behind a redirect already
    assert paths[1] == f"/v2/a/manifests/{sealed.digest}"
    assert len(paths) == 4
    assert paths[-1] == f"/v2/a/manifests/{NAME}-v3"


# --- locations and credentials ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "oci://",
        "oci://host",
        "oci://host/",
        "oci://host/UPPER",
        "oci://host/a/../b",
        "oci://host/a:tag",
        "oci://host/a@sha256:" + "0" * 64,
        "oci://user:secret@host/a",
        "oci://host/a?x",
        "oci://host:port/a",
        "oci://host:99999/a",
        "oci://host:0/a",
        "oci+https://host/a",
        "oci://host/" + "a" * 256,
        "oci://hôst/a",
    ],
)
def test_a_repository_that_is_none_is_a_configuration_error(location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(location, None, TIMEOUT_S)
    assert caught.value.key == Ident("artifact.source")


def test_credentials_in_the_open_are_a_configuration_error() -> None:
    for host in ("registry.example", "127.0.0.1.example", "127.0.0.1:80@registry.example"):
        with pytest.raises(ConfigError):
            open_source(f"oci+http://{host}/a", None, TIMEOUT_S, LOGIN)
    with pytest.raises(ConfigError) as caught:
        open_source("oci+http://registry.example/a", None, TIMEOUT_S, LOGIN)
    assert caught.value.key == "artifact.secret"
    for location in ("oci+http://127.0.0.1:9/a", "oci+http://localhost:9/a", "oci+http://[::1]:9/a"):
        open_source(location, None, TIMEOUT_S, LOGIN).close()
    open_source("oci+http://registry.example/a", None, TIMEOUT_S).close()


def test_without_tls_it_is_asked_for_by_name() -> None:
    with ScriptServer(lambda seen: part(seen) if "authorization" in seen.headers else Reply(401, BASIC)) as server:
        with closing(open_source(f"oci+http://{server.host}/a", None, TIMEOUT_S, LOGIN)) as source:
            assert read(source) == DATA[10:30]
        with closing(open_source(f"oci://{server.host}/a", None, TIMEOUT_S, LOGIN)) as source:
            assert fails(source)[0] is StoreProblem.TLS


def test_credentials_stand_in_no_repr() -> None:
    config = ArtifactConfig(source="oci://host/a", user=USER, secret=SECRET, session_token="session")
    for text in (repr(LOGIN), repr(config), str(config)):
        assert SECRET not in text
        assert "session" not in text.replace("session_token", "")
