"""Buckets, in both styles, signed and not, and objects that change under the reader."""

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from agent.artifact.sources import LayoutSource, open_source
from agent.artifact.sources import s3 as module
from agent.artifact.sources.access import ANONYMOUS, Access, parse_access
from agent.closed import Ident
from agent.errors import ArtifactUnavailableError, ConfigError, ConfigProblem, StoreProblem
from tests.bucket import KEY_ID, PREFIX, SECRET, Bucket, access
from tests.script_server import Reply, ScriptServer

TIMEOUT_S = 10.0
BLOB, ABSENT = "sha256:" + "ab" * 32, "sha256:" + "00" * 32
DATA = os.urandom(100_000)
LOCATION = f"s3://models/{PREFIX}"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    (tmp_path / "blobs" / "sha256").mkdir(parents=True)
    (tmp_path / "blobs" / "sha256" / ("ab" * 32)).write_bytes(DATA)
    (tmp_path / "index.json").write_bytes(b"index")
    return tmp_path


def read(source: LayoutSource, offset: int = 10, length: int = 20, digest: str = BLOB) -> bytes:
    out = bytearray(length)
    return bytes(out[: source.read_range(digest, offset, memoryview(out))])


def fails(source: LayoutSource, digest: str = BLOB) -> tuple[StoreProblem, int]:
    with pytest.raises(ArtifactUnavailableError) as caught:
        read(source, digest=digest)
    assert SECRET not in str(caught.value)
    return caught.value.problem, caught.value.status


def check(source: LayoutSource) -> None:
    with closing(source):
        assert source.read_index(5) == b"index"
        assert source.read_blob(BLOB, len(DATA)) == DATA
        assert read(source) == DATA[10:30]
        assert read(source, len(DATA) - 5, 10) == DATA[-5:]
        assert read(source, len(DATA)) == b""
        assert fails(source, ABSENT) == (StoreProblem.NOT_FOUND, 404)


@pytest.mark.parametrize("token", [None, "session/token+x=="])
def test_a_bucket_is_read_with_signed_requests(layout: Path, token: str | None) -> None:
    with Bucket(layout) as bucket:
        check(open_source(LOCATION, None, TIMEOUT_S, access(bucket.url, token=token)))
        assert all(request.path.startswith("/models/" + quote(PREFIX)) for request in bucket.server.seen[:1])


def test_a_bucket_may_be_in_the_name_of_its_service(layout: Path) -> None:
    """A bucket may be called like an address: then its name resolves without a resolver."""
    with Bucket(layout, virtual=True) as bucket:
        endpoint = bucket.url.replace("127.0.0.1", "{bucket}")
        check(open_source(LOCATION.replace("models", "127.0.0.1", 1), None, TIMEOUT_S, access(endpoint)))


def test_a_public_bucket_needs_no_signature(layout: Path) -> None:
    with Bucket(layout, signed=False) as bucket:
        check(open_source(LOCATION, None, TIMEOUT_S, Access(endpoint=bucket.url)))
        assert all("authorization" not in request.headers for request in bucket.server.seen)


@pytest.mark.parametrize("wrong", [{"secret": "x"}, {"token": "x"}, {"region": "eu-test-2"}])
def test_bad_credentials_are_refused(layout: Path, wrong: dict[str, str]) -> None:
    with Bucket(layout) as bucket, closing(open_source(LOCATION, None, TIMEOUT_S, access(bucket.url, **wrong))) as source:
        assert fails(source) == (StoreProblem.REFUSED, 403)


@pytest.mark.parametrize("obeys", [True, False])
def test_an_object_that_changes_between_two_reads_is_refused(layout: Path, *, obeys: bool) -> None:
    with (
        Bucket(layout, obeys_if_match=obeys) as bucket,
        closing(open_source(LOCATION, None, TIMEOUT_S, access(bucket.url))) as source,
    ):
        assert read(source) == DATA[10:30]
        assert read(source) == DATA[10:30]
        bucket.changed = True
        assert fails(source) == (StoreProblem.CHANGED, 412 if obeys else 0)
        assert "if-match" in bucket.server.seen[-1].headers["authorization"]


def test_a_weak_etag_says_nothing(layout: Path) -> None:
    with Bucket(layout, weak=True) as bucket, closing(open_source(LOCATION, None, TIMEOUT_S, access(bucket.url))) as source:
        assert read(source) == DATA[10:30]
        bucket.changed = True
        assert read(source) == DATA[10:30]


def test_a_redirect_leads_nowhere(layout: Path) -> None:
    """AWS answers so for a bucket of another region: what it is to be asked for is up to the configuration."""
    with ScriptServer(lambda _: Reply(307, (("Location", "https://models.s3.eu-test-2.amazonaws.com/x"),))) as server:
        with closing(open_source(LOCATION, None, TIMEOUT_S, access(server.url))) as source:
            assert fails(source) == (StoreProblem.BAD_ANSWER, 0)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("location", "endpoint", "url", "path"),
    [
        ("s3://models", None, "https://models.s3.eu-1.amazonaws.com", ""),
        ("s3://models/a/b/", None, "https://models.s3.eu-1.amazonaws.com", "/a/b"),
        ("s3://models/a", "https://s3.example.com:9000/", "https://s3.example.com:9000", "/models/a"),
        ("s3://mo.dels/a+b", "http://[::1]:9000", "http://[::1]:9000", "/mo.dels/a%2Bb"),
        ("s3://models/a", "https://{bucket}.s3.example.com", "https://models.s3.example.com", "/a"),
    ],
)
def test_where_a_bucket_is(location: str, endpoint: str | None, url: str, path: str) -> None:
    assert module.Bucket.parse(location, Access(endpoint=endpoint, region="eu-1")) == module.Bucket(url, path)


@pytest.mark.parametrize(
    "location",
    [
        "s3://",
        "s3://x",
        "s3://UP",
        "s3://models//a",
        "s3://models/../a",
        "s3://models/./a",
        "s3://models/a?b",
        "s3://a@models/x",
    ],
)
def test_a_bucket_that_is_none_is_a_configuration_error(location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(location, None, TIMEOUT_S)
    assert caught.value.key == "artifact.source"


@pytest.mark.parametrize(
    "endpoint", ["", "s3.example.com", "ftp://x", "https://a@b", "https://x/path", "https://{x}", "https://x:0"]
)
def test_an_endpoint_that_is_none_is_a_configuration_error(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        open_source("s3://models", None, TIMEOUT_S, Access(endpoint=endpoint))


def test_credentials_in_the_open_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError) as caught:
        open_source("s3://models", None, TIMEOUT_S, access("http://s3.example.com"))
    assert caught.value.key == "artifact.secret"
    open_source("s3://models", None, TIMEOUT_S, Access(endpoint="http://s3.example.com")).close()


@pytest.mark.parametrize("text", ["a\nX: y", "a\r", "t€k", "tök", "a\x00"])
@pytest.mark.parametrize("key", ["user", "session_token"])
def test_what_fits_into_no_header_is_a_configuration_error(text: str, key: str) -> None:
    """Python would quote it in the text of its own exception."""
    given = replace(access("https://s3.example.com"), **{key: text})
    with pytest.raises(ConfigError) as caught:
        open_source("s3://models", None, TIMEOUT_S, given)
    assert str(caught.value) == str(ConfigError(ConfigProblem.BAD_VALUE, Ident(f"artifact.{key}")))


def test_a_file_of_credentials_has_the_keys_of_the_configuration() -> None:
    assert parse_access(b"") == ANONYMOUS
    text = f'user = "{KEY_ID}"\nsecret = "{SECRET}"\nsession_token = "t"\nendpoint = "https://x"\nregion = "eu-1"\n'
    assert parse_access(text.encode()) == Access(KEY_ID, SECRET, "t", "https://x", "eu-1")
    for bad in (
        b"user = 1",
        b'user = "x"',
        b'secret = "x"',
        b'password = "x"',
        b"\xff",
        b"x",
        b"x = " + b"[" * 10_000,
        b'user = "a\\nb"\nsecret = "x"',
    ):
        with pytest.raises(ValueError, match="not credentials"):
            parse_access(bad)
