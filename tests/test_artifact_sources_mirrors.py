"""Stores that fail one after the other, and what is read nevertheless."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from agent.artifact.sources import BlobSource, open_source
from agent.artifact.sources.mirrors import BUDGET, Mirrors, open_mirrored
from agent.artifact.sources.patient import PatientSource
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, ConfigError, CredentialsProblem, StoreCredentialsError, StoreProblem
from agent.store_credentials import StoreCredentials
from tests.range_server import Fault, RangeServer
from tests.script_server import Reply, ScriptServer

BLOB = "sha256:" + "ab" * 32
DATA = bytes(range(256))


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Path]:
    blob = tmp_path / "layout" / "blobs" / BLOB.replace(":", "/")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(DATA)
    yield tmp_path / "layout"


def opener(location: object) -> Callable[[], BlobSource]:
    return lambda: open_source(str(location), None, 5)


def mirrors(*locations: object) -> closing[Mirrors]:
    return closing(Mirrors([opener(location) for location in locations]))


def read(source: BlobSource | PatientSource) -> bytes:
    out = bytearray(100)
    return bytes(out[: source.read_range(BLOB, 7, memoryview(out))])


def test_the_first_store_is_asked_while_it_delivers(layout: Path) -> None:
    with (
        RangeServer(layout) as one,
        RangeServer(layout) as other,
        mirrors(one.url, other.url) as both,
    ):
        for _ in range(5):
            assert read(both) == DATA[7:107]
        assert (len(one.requests), len(other.requests)) == (5, 0)


@pytest.mark.parametrize("fault", [Fault.NOT_FOUND, Fault.FORBIDDEN, Fault.GZIP, Fault.NO_RANGES, Fault.REDIRECT_LOOP])
def test_what_does_not_pass_moves_on_at_once_and_for_good(layout: Path, fault: Fault) -> None:
    with RangeServer(layout, fault) as one, RangeServer(layout) as other, mirrors(one.url, other.url) as both:
        for _ in range(5):
            assert read(both) == DATA[7:107]
        assert len(other.requests) == 5
        asked = len(one.requests)
        read(both)
        assert len(one.requests) == asked <= 11


def test_what_may_pass_moves_on_when_the_budget_is_used_up(layout: Path) -> None:
    with RangeServer(layout, Fault.BROKEN) as one, RangeServer(layout) as other, mirrors(one.url, other.url) as both:
        for _ in range(BUDGET + 1):
            with pytest.raises(ArtifactUnavailableError):
                read(both)
        assert read(both) == DATA[7:107]
        assert (len(one.requests), len(other.requests)) == (BUDGET + 1, 1)


def test_a_store_that_delivers_again_has_its_whole_budget_again(layout: Path) -> None:
    with (
        RangeServer(layout, Fault.CUT, faulty_answers=BUDGET) as one,
        RangeServer(layout) as other,
        mirrors(one.url, other.url) as both,
    ):
        for _ in range(BUDGET):
            with pytest.raises(ArtifactUnavailableError):
                read(both)
        for _ in range(3):
            assert read(both) == DATA[7:107]
        assert not other.requests


def test_when_no_store_has_it_the_error_is_the_first_ones(layout: Path, tmp_path: Path) -> None:
    with (
        RangeServer(layout, Fault.FORBIDDEN) as one,
        RangeServer(layout, Fault.NOT_FOUND) as other,
        mirrors(one.url, tmp_path / "absent", other.url) as all_of_them,
    ):
        with pytest.raises(ArtifactUnavailableError) as caught:
            read(all_of_them)
        assert caught.value.problem is StoreProblem.REFUSED


class Holding:
    """A store of one blob; whoever asks for another one waits until `meanwhile` is done."""

    def __init__(self, has: str, meanwhile: Callable[[str], None] = lambda _: None) -> None:
        self.has = has
        self.meanwhile = meanwhile

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        if digest == self.has:
            return digest.encode()
        self.meanwhile(digest)
        raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)

    read_manifest = read_blob

    def referrers(self, digest: str) -> tuple[str, ...]:
        return ()

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        return 0

    def close(self) -> None:
        pass


def test_every_store_is_asked_whatever_other_threads_find_meanwhile() -> None:
    """A read goes round all of them: after whichever is current it could meet the first one twice, and the last one never."""

    def another_reads(digest: str) -> None:
        if digest == "third":  # not its own
            with pytest.raises(ArtifactUnavailableError):
                all_of_them.read_blob("nobody's", 9)
            assert all_of_them.read_blob("first", 9) == b"first"

    stores = [Holding("first"), Holding("second", another_reads), Holding("third")]
    with closing(Mirrors([lambda store=store: store for store in stores])) as all_of_them:  # type: ignore[misc]
        assert all_of_them.read_blob("third", 9) == b"third"


def test_the_failure_of_a_store_that_was_left_meanwhile_is_not_the_next_ones() -> None:
    asked: list[str] = []

    def another_reads(digest: str) -> None:
        asked.append(digest)
        if digest == "second":
            assert all_of_them.read_blob("third", 9) == b"third"

    stores = [Holding("first", another_reads), Holding("second"), Holding("third")]
    with closing(Mirrors([lambda store=store: store for store in stores])) as all_of_them:  # type: ignore[misc]
        assert all_of_them.read_blob("second", 9) == b"second"
        assert all_of_them._current == 2
        assert asked == ["second", "third"]


def test_a_success_gives_the_whole_budget_back() -> None:
    class Shaky(Holding):
        failures = 0

        def read_blob(self, digest: str, max_bytes: int) -> bytes:
            if self.failures:
                self.failures -= 1
                raise ArtifactUnavailableError(StoreProblem.SERVER_ERROR)
            return super().read_blob(digest, max_bytes)

    asked: list[str] = []
    shaky, other = Shaky("blob"), Holding("nothing", asked.append)
    with closing(Mirrors([lambda: shaky, lambda: other])) as both:
        for _ in range(2):
            shaky.failures = BUDGET
            for _ in range(BUDGET):
                with pytest.raises(ArtifactUnavailableError):
                    both.read_blob("blob", 9)
            assert both.read_blob("blob", 9) == b"blob"
    assert not asked


def test_a_folder_that_is_not_there_is_passed_over(layout: Path, tmp_path: Path) -> None:
    with mirrors(tmp_path / "absent", layout) as both:
        assert read(both) == DATA[7:107]
        assert both.read_blob(BLOB, 1000) == DATA


def test_a_folder_that_comes_later_is_found(layout: Path, tmp_path: Path) -> None:
    with mirrors(tmp_path / "late") as one:
        with pytest.raises(ArtifactUnavailableError):
            read(one)
        shutil.copytree(layout, tmp_path / "late")
        assert read(one) == DATA[7:107]


def test_many_threads_move_on_together(layout: Path) -> None:
    with RangeServer(layout, Fault.BROKEN) as one, RangeServer(layout) as other, mirrors(one.url, other.url) as both:
        patient = PatientSource(both, 30, threading.Event())
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: read(patient), range(16))) == {DATA[7:107]}
    assert BUDGET < len(one.requests) <= BUDGET + 8


def test_the_configuration_names_them_and_a_location_that_is_none_is_told_at_once(layout: Path) -> None:
    def config(*mirrors: str) -> ArtifactConfig:
        return ArtifactConfig(source="/absent", mirrors=mirrors, manifest_digest=BLOB)

    with closing(open_mirrored(config(str(layout)), 5)) as store:
        assert read(store) == DATA[7:107]
    with pytest.raises(ConfigError):
        open_mirrored(config("https://user:secret@example.org/x"), 5)
    with pytest.raises(ArtifactUnavailableError):
        open_mirrored(config(), 5)


RELEASED = StoreCredentials("guest", "correct horse")
URI = "kbs:///models/store/1"


def test_credentials_go_to_the_store_and_to_no_mirror() -> None:
    with (
        ScriptServer(lambda _: Reply(401, [("WWW-Authenticate", 'Basic realm="models"')])) as store,
        ScriptServer(lambda _: Reply(401, [("WWW-Authenticate", 'Basic realm="models"')])) as mirror,
    ):
        location = f"oci+http://{mirror.host}/models/tiny"
        config = ArtifactConfig(
            source=f"oci+http://{store.host}/models/tiny",
            mirrors=(location,),
            manifest_digest=BLOB,
            credentials_uri=URI,
        )
        with closing(open_mirrored(config, 5, None, RELEASED)) as both, pytest.raises(ArtifactUnavailableError):
            read(both)
        assert any("authorization" in request.headers for request in store.seen)
        assert mirror.seen
        assert not [request for request in mirror.seen if "authorization" in request.headers]


def test_credentials_come_from_where_the_configuration_says_and_from_nowhere_else() -> None:
    registry = "oci://registry.example.org/x"
    with pytest.raises(RuntimeError):
        open_mirrored(ArtifactConfig(source=registry, manifest_digest=BLOB, credentials_uri=URI), 5)
    with pytest.raises(RuntimeError):
        open_mirrored(ArtifactConfig(source=registry, manifest_digest=BLOB), 5, None, RELEASED)


def test_a_session_token_from_the_broker_is_for_a_bucket() -> None:
    temporary = StoreCredentials("guest", "correct horse", "token")
    config = ArtifactConfig(source="oci://registry.example.org/x", manifest_digest=BLOB, credentials_uri=URI)
    with pytest.raises(StoreCredentialsError) as caught:
        open_mirrored(config, 5, None, temporary)
    assert caught.value.problem is CredentialsProblem.NOT_A_BUCKET
    config = ArtifactConfig(source="s3://models/x", manifest_digest=BLOB, credentials_uri=URI)
    open_mirrored(config, 5, None, temporary).close()
