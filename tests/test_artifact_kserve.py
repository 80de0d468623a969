"""Models as KServe keeps them: from a folder or a URL to plaintext in memory, and every way not to be the listed ones."""

import asyncio
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.artifact import LoadedArtifact
from agent.artifact.compact_jwe import CHUNK_BYTES, MAX_HEAD_BYTES
from agent.artifact.identify import identify
from agent.artifact.kserve import PreparedJwe
from agent.artifact.load import load, prepare
from agent.artifact.sources import BlobSource, open_source
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.sources.mirrors import open_mirrored
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
    ArtifactUnavailableError,
    DestinationError,
    DestinationProblem,
    InsufficientMemoryError,
    KeyMismatchError,
    MalformedHeaderError,
    ManifestDigestError,
    RollbackError,
    SegmentAuthenticationError,
    StoreProblem,
    SwapActiveError,
    TruncatedArtifactError,
)
from agent.guest.memory_info import MACHINE, MemoryInfo
from agent.keys import ReleasedKey, SecretBuffer
from tests import bucket
from tests.range_server import RangeServer
from tests.test_artifact_compact_jwe import KEY, sealed
from tests.test_artifact_load import given as given  # noqa: PLC0414  a fixture
from tests.test_artifact_load import machine_with, needs_root
from tests.test_artifact_load import nothing_is_left as nothing_is_left  # noqa: PLC0414  a fixture

WEIGHTS = os.urandom((2 << 20) + 12345)
CONFIG = b'{"hidden_size": 256}'


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights/a.bin.jwe").write_bytes(sealed(WEIGHTS))
    (folder / "b.bin.jwe").write_bytes(sealed(b"", "dir"))
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "backdoor.py").write_bytes(b"import os")
    return folder


def config(source: str, given: Path, **more: Any) -> ArtifactConfig:
    members = {
        "source": source,
        "format": "kserve-jwe",
        "name": "tiny",
        "jwe_files": ["weights/a.bin.jwe", "b.bin.jwe"],
        "plain_files": {"config.json": f"sha256:{hashlib.sha256(CONFIG).hexdigest()}"},
        "destination": "directory",
        "directory": str(given),
        "headroom_mib": 0,
        "timeout_s": 10,
    }
    return msgspec.convert(members | more, ArtifactConfig)


def boot(
    cfg: ArtifactConfig,
    look: Callable[[LoadedArtifact], object] = lambda _: None,
    *,
    floor: int = 0,
    key: bytes = KEY,
    between: Callable[[PreparedJwe], object] = lambda _: None,
    locked: bool = True,
    memory: MemoryInfo = MACHINE,
    source: BlobSource | None = None,
) -> None:
    store = source or open_mirrored(cfg, 10)

    async def run() -> None:
        identified = await identify(store, cfg)
        prepared = await prepare(store, identified, "kbs:///a/b/c", undo, allow_swap=memory is MACHINE, memory=memory)
        assert isinstance(prepared, PreparedJwe)
        between(prepared)
        secret = SecretBuffer(32)
        secret.view()[:] = key
        secret.locked = locked
        with ReleasedKey(secret, Ident("k"), 1) as released:
            look(await load(prepared, released, floor, lambda *_: None))

    try:
        with ExitStack() as undo:
            asyncio.run(run())
    finally:
        store.close()


def found(loaded: LoadedArtifact) -> dict[str, bytes]:
    assert loaded.directory is not None
    root = Path(loaded.directory)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check(loaded: LoadedArtifact) -> None:
    assert found(loaded) == {"weights/a.bin": WEIGHTS, "b.bin": b"", "config.json": CONFIG}
    assert (loaded.model_name, loaded.version, loaded.total_bytes) == ("tiny", 0, len(WEIGHTS) + len(CONFIG))
    assert loaded.manifest_digest.startswith("sha256:")


class Held(DirectorySource):
    """Gives what is small. What is ciphertext fails in each way of `errors`, then comes, once `before` was called."""

    def __init__(self, folder: Path, before: Callable[[], object] = lambda: None) -> None:
        super().__init__(str(folder))
        self._before = before
        self._lock = threading.Lock()
        self.errors: list[Exception] = []
        self.refuses: Exception | None = None
        self.reads = 0
        self.entered = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        if len(out) > MAX_HEAD_BYTES:
            self.entered.set()
            self.may_answer.wait(30)
            with self._lock:
                self._before()
                if error := self.refuses or (self.errors.pop() if self.errors else None):
                    raise error
                self.reads += 1
        return super().read_range(digest, offset, out)


CHUNKS = len(sealed(WEIGHTS)) // CHUNK_BYTES + 1
NOT_FOUND = ArtifactUnavailableError(StoreProblem.NOT_FOUND)
AWAY = ArtifactUnavailableError(StoreProblem.UNREACHABLE)


def fetched(prepared: PreparedJwe) -> None:
    """Wait for the end of what is fetched ahead, however it ends."""
    for thread in threading.enumerate():
        if thread.name == "ciphertext":
            thread.join()


def test_ciphertext_that_came_before_the_key_is_not_fetched_again(store: Path, given: Path) -> None:
    source = Held(store)

    def then_the_store_is_gone(prepared: PreparedJwe) -> None:
        fetched(prepared)
        prepared.check()
        source.refuses = NOT_FOUND

    boot(config(str(store), given), check, source=source, between=then_the_store_is_gone)
    assert source.reads == CHUNKS


def test_a_store_that_delivers_only_after_the_key_came_is_no_failure(store: Path, given: Path) -> None:
    source = Held(store)
    source.refuses = NOT_FOUND

    def now(prepared: PreparedJwe) -> None:
        fetched(prepared)
        with pytest.raises(ArtifactUnavailableError):
            prepared.check()  # what a boot asks before the gate
        source.refuses = None

    boot(config(str(store), given), check, source=source, between=now)
    assert source.reads == CHUNKS


def test_ciphertext_that_arrives_while_files_are_opened_is_opened(store: Path, given: Path) -> None:
    source = Held(store)
    source.may_answer.clear()

    def stop(prepared: PreparedJwe) -> None:
        source.refuses = AWAY
        source.may_answer.set()
        prepared.stop_fetching()
        assert source.reads == 0
        source.refuses = None
        source.may_answer.clear()
        threading.Timer(0.5, source.may_answer.set).start()

    boot(config(str(store), given), check, source=source, between=stop)


def test_a_store_that_comes_back_is_asked_again(store: Path, given: Path) -> None:
    source = Held(store)
    source.errors = [AWAY, AWAY]
    boot(config(str(store), given), check, source=source)


def test_a_store_that_stays_away_ends_the_boot_at_the_deadline(store: Path, given: Path) -> None:
    source = Held(store)
    source.refuses = AWAY
    with pytest.raises(ArtifactUnavailableError):
        boot(config(str(store), given, timeout_s=1), source=source)


def test_what_one_store_lacks_comes_from_its_mirror(store: Path, given: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "first")
    (tmp_path / "first" / "weights/a.bin.jwe").unlink()
    boot(config(str(tmp_path / "first"), given, mirrors=[str(store)]), check)


def test_what_is_no_base64_is_known_before_the_gate(store: Path, given: Path) -> None:
    path = store / "weights/a.bin.jwe"
    content = bytearray(path.read_bytes())
    content[1 << 20] = ord("+")  # a digit of the other alphabet
    path.write_bytes(content)

    def gate(prepared: PreparedJwe) -> None:
        fetched(prepared)
        prepared.check()
        pytest.fail("passed the gate")

    with pytest.raises(SegmentAuthenticationError) as caught:
        boot(config(str(store), given), between=gate)
    assert caught.value.file == 0
    with pytest.raises(SegmentAuthenticationError):
        boot(config(str(store), given))


def test_a_bug_in_a_thread_is_not_lost(store: Path, given: Path) -> None:
    for how_often in (1, 99):
        source = Held(store)
        source.errors = [RuntimeError("bug")] * how_often
        with pytest.raises(RuntimeError, match="bug"):
            boot(config(str(store), given), source=source)


def test_a_boot_that_ends_while_ciphertext_arrives_leaves_nothing(store: Path, given: Path) -> None:
    source = Held(store)
    source.may_answer.clear()

    def fail(prepared: PreparedJwe) -> None:
        assert source.entered.wait(30)
        threading.Timer(0.1, source.may_answer.set).start()
        raise KeyError  # attestation failed

    with pytest.raises(KeyError):
        boot(config(str(store), given), source=source, between=fail)
    assert source.reads < CHUNKS + 1


def test_a_cancelled_load_returns_when_every_thread_has_ended(store: Path, given: Path) -> None:
    source = Held(store)
    source.may_answer.clear()

    async def story() -> None:
        with ExitStack() as undo:
            undo.callback(source.close)
            cfg = await identify(source, config(str(store), given))
            prepared = await prepare(source, cfg, "kbs:///a/b/c", undo, allow_swap=True)
            source.refuses = AWAY
            source.may_answer.set()
            assert isinstance(prepared, PreparedJwe)
            await asyncio.to_thread(prepared.stop_fetching)
            source.refuses = None
            source.may_answer.clear()
            source.entered.clear()
            secret = SecretBuffer(32)
            secret.view()[:] = KEY
            with ReleasedKey(secret, Ident("k"), 1) as released:
                task = asyncio.create_task(load(prepared, released, 0, lambda *_: None))
                await asyncio.to_thread(source.entered.wait, 30)
                task.cancel()
                done, _ = await asyncio.wait({task}, timeout=0.01)
                assert not done
                source.may_answer.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not {"ciphertext", "files"} & {thread.name for thread in threading.enumerate()}

    asyncio.run(story())


def test_many_files_are_found_and_opened(tmp_path: Path, given: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    files = {f"{i:02}.bin": os.urandom(i * 1000) for i in range(20)}
    for name, content in files.items():
        (folder / f"{name}.jwe").write_bytes(sealed(content, "dir" if content else "A256KW"))
    cfg = config(str(folder), given, jwe_files=[f"{name}.jwe" for name in files], plain_files={})
    looked: list[dict[str, bytes]] = []
    boot(cfg, lambda loaded: looked.append(found(loaded)))
    assert looked == [files]


def test_the_listed_files_are_loaded_and_no_others(store: Path, given: Path) -> None:
    looked: list[LoadedArtifact] = []

    def look(loaded: LoadedArtifact) -> None:
        check(loaded)
        looked.append(loaded)

    boot(config(str(store), given), look)
    assert looked


def test_from_a_url_too(store: Path, given: Path) -> None:
    with RangeServer(store) as server:
        boot(config(server.url, given), check)


def test_from_a_bucket_too(store: Path, given: Path) -> None:
    with bucket.Bucket(store) as server:
        login = {"user": bucket.KEY_ID, "secret": bucket.SECRET, "session_token": bucket.TOKEN}
        boot(config(f"s3://models/{bucket.PREFIX}", given, endpoint=server.url, region=bucket.REGION, **login), check)


def test_the_digest_in_evidence_is_of_the_whole_list(store: Path, given: Path) -> None:
    digests = set()
    lists: tuple[dict[str, Any], ...] = (
        {},
        {"name": "other"},
        {"jwe_files": ["b.bin.jwe"]},
        {"plain_files": {}},
        {"plain_files": {"x": "sha256:" + "0" * 64}},
    )
    for more in lists:
        with open_source_of(store) as source:
            digests.add(asyncio.run(identify(source, config(str(store), given, **more))).digest)
    assert len(digests) == 5


def open_source_of(store: Path) -> Any:
    from contextlib import closing

    return closing(open_source(str(store), None, 1))


def test_a_plain_file_that_is_not_the_listed_one_is_refused(store: Path, given: Path) -> None:
    (store / "config.json").write_bytes(CONFIG.replace(b"256", b"255"))
    with pytest.raises(ManifestDigestError):
        boot(config(str(store), given))


def test_plaintext_in_place_of_a_sealed_file_is_refused(store: Path, given: Path) -> None:
    (store / "weights/a.bin.jwe").write_bytes(WEIGHTS)
    with pytest.raises(MalformedHeaderError) as caught:
        boot(config(str(store), given))
    assert caught.value.file == 0


@pytest.mark.parametrize("name", ["weights/a.bin.jwe", "b.bin.jwe", "config.json"])
def test_a_listed_file_that_is_not_there_is_told(store: Path, given: Path, name: str) -> None:
    (store / name).unlink()
    with pytest.raises(ArtifactUnavailableError):
        boot(config(str(store), given, timeout_s=1))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] = ord("A") if content[at] != ord("A") else ord("B")
    path.write_bytes(content)


@pytest.mark.parametrize("at", [200, 1 << 20, -30, -20])
def test_damage_is_found_before_anybody_can_see_it(store: Path, given: Path, at: int) -> None:
    def nothing_is_seen(loaded: LoadedArtifact) -> None:
        raise AssertionError

    with pytest.raises(SegmentAuthenticationError) as caught:
        flip(store / "weights/a.bin.jwe", at)
        boot(config(str(store), given), nothing_is_seen)
    assert (caught.value.file, caught.value.segment) == (0, 0)
    assert not (given / "model").exists()


def test_a_wrong_key_is_the_authoritys_affair(store: Path, given: Path) -> None:
    with pytest.raises(KeyMismatchError):
        boot(config(str(store), given), key=bytes(32))


def test_a_file_that_shrinks_is_truncated(store: Path, given: Path) -> None:
    path = store / "weights/a.bin.jwe"
    with pytest.raises(TruncatedArtifactError) as caught:
        boot(config(str(store), given), source=Held(store, lambda: os.truncate(path, 1 << 20)))
    assert caught.value.file == 0


def test_a_verdict_with_a_floor_is_not_met_by_a_model_without_a_version(store: Path, given: Path) -> None:
    with pytest.raises(RollbackError):
        boot(config(str(store), given), floor=1)


def test_a_model_that_does_not_fit_is_refused_before_it_is_fetched(store: Path, given: Path, tmp_path: Path) -> None:
    with pytest.raises(InsufficientMemoryError):
        boot(config(str(store), given), memory=machine_with(tmp_path, 1 << 20))


def test_a_model_that_shall_be_released_does_not_go_into_a_memfd(store: Path, given: Path) -> None:
    one: dict[str, Any] = {"jwe_files": ["b.bin.jwe"], "plain_files": {}, "destination": "memfd", "directory": None}
    boot(config(str(store), given, **one))
    with pytest.raises(DestinationError) as caught:
        boot(config(str(store), given, after_ready="release", **one))
    assert caught.value.problem is DestinationProblem.HELD


@needs_root
def test_with_swap_the_key_needs_a_lock(store: Path, given: Path, tmp_path: Path) -> None:
    cfg = config(str(store), given, destination="tmpfs", directory=None)
    with pytest.raises(SwapActiveError):
        boot(cfg, locked=False, memory=machine_with(tmp_path, 1 << 30, "/dev/vda2 partition 1 0 -2\n"))
