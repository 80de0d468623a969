"""Models as KServe keeps them: from a folder or a URL to plaintext in memory, and every way not to be the listed ones."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.artifact import LoadedArtifact
from agent.artifact.identify import identify
from agent.artifact.kserve import PreparedJwe
from agent.artifact.load import load, prepare
from agent.artifact.sources import open_configured, open_source
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
    between: Callable[[], object] = lambda: None,
    locked: bool = True,
    memory: MemoryInfo = MACHINE,
) -> None:
    async def run() -> None:
        identified = await identify(source, cfg)
        prepared = await prepare(source, identified, "kbs:///a/b/c", undo, allow_swap=memory is MACHINE, memory=memory)
        assert isinstance(prepared, PreparedJwe)
        prepared.check()
        between()
        secret = SecretBuffer(32)
        secret.view()[:] = key
        secret.locked = locked
        with ReleasedKey(secret, Ident("k"), 1) as released:
            look(await load(prepared, released, floor, lambda *_: None))

    source = open_configured(cfg, 10)
    try:
        with ExitStack() as undo:
            asyncio.run(run())
    finally:
        source.close()


def found(loaded: LoadedArtifact) -> dict[str, bytes]:
    assert loaded.directory is not None
    root = Path(loaded.directory)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check(loaded: LoadedArtifact) -> None:
    assert found(loaded) == {"weights/a.bin": WEIGHTS, "b.bin": b"", "config.json": CONFIG}
    assert (loaded.model_name, loaded.version, loaded.total_bytes) == ("tiny", 0, len(WEIGHTS) + len(CONFIG))
    assert loaded.manifest_digest.startswith("sha256:")


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
        boot(config(str(store), given), between=lambda: os.truncate(path, 1 << 20))
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
