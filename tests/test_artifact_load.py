import asyncio
import mmap
import os
import random
import resource
import shutil
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.artifact import DestinationKind, LoadedArtifact
from agent.artifact.load import Prepared, _Ahead, load, prepare
from agent.artifact.manifest import (
    MAX_FILES,
    ModelConfig,
    SealedFile,
    digest_of,
    pack_config,
    pack_manifest,
    parse_config,
    parse_manifest,
)
from agent.artifact.memory import DetachedTmpfs, demand_of
from agent.artifact.seal import seal_model
from agent.artifact.sources import BlobSource, open_source
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.stream import MAX_PLAINTEXT_BYTES, MAX_SEGMENTS, SEGMENT_BYTES, StreamLayout, key_commitment
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
    ArtifactUnavailableError,
    ConfigError,
    DestinationError,
    DestinationProblem,
    InsufficientMemoryError,
    KeyMismatchError,
    ManifestDigestError,
    MemoryLimit,
    RollbackError,
    SegmentAuthenticationError,
    StoreProblem,
    SwapActiveError,
    TruncatedArtifactError,
)
from agent.guest import mounts
from agent.guest.memory_info import MACHINE, MemoryInfo
from agent.keys import ReleasedKey, SecretBuffer
from tests.appearances import appearing
from tests.range_server import Fault, RangeServer
from tests.sealed_vectors import Case

KEY = bytes(range(32))
KEY_URI = "kbs:///models/tiny/1"
VERSION = 3
DRAW = random.Random(1)
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "weights/big.bin": DRAW.randbytes((10 << 20) + 12345),  # two runs of segments and a short last one
    "weights/exact.bin": DRAW.randbytes(SEGMENT_BYTES - 16 - 40),  # fills its only segment
}
SEGMENTS = 14
ONE_FILE = {"model.gguf": FILES["weights/big.bin"]}

KINDS = ["tmpfs", "directory"] if os.geteuid() == 0 else ["directory"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making mounts and changing users needs root")


@dataclass(frozen=True)
class Sealed:
    """A sealed model in a layout that a test may damage."""

    layout: Path
    digest: str

    def blob(self, path: str) -> Path:
        return self.layout / "blobs" / self._file(path).replace(":", "/")

    def _file(self, path: str) -> str:
        return next(file.blob_digest for file in self.model.files if file.path == path)

    @property
    def model(self) -> ModelConfig:
        source = DirectorySource(str(self.layout))
        manifest = parse_manifest(source.read_blob(self.digest, 1 << 20), self.digest)
        model = parse_config(source.read_blob(manifest.config_digest, manifest.config_bytes), manifest)
        source.close()
        return model


def seal(folder: Path, files: dict[str, bytes]) -> Sealed:
    for path, data in files.items():
        target = folder / "model" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    digest = seal_model(folder / "model", folder / "layout", KEY, KEY_URI, "tiny", VERSION, lambda _, __: None)
    return Sealed(folder / "layout", digest)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Sealed]:
    """The model of many files and the one of one file, by their number of files."""
    return {len(files): seal(tmp_path_factory.mktemp("sealed"), files) for files in (FILES, ONE_FILE)}


@pytest.fixture
def sealed(pristine: dict[int, Sealed], tmp_path: Path) -> Sealed:
    original = pristine[len(FILES)]
    return Sealed(shutil.copytree(original.layout, tmp_path / "layout"), original.digest)


@pytest.fixture
def given() -> Iterator[Path]:
    """An empty folder on tmpfs."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    fd = os.open(path, os.O_RDONLY)
    on_tmpfs = mounts.is_tmpfs(fd)
    os.close(fd)
    if not on_tmpfs:
        pytest.skip("/dev/shm is not a tmpfs here")
    yield path
    path.rmdir()  # fails unless it is empty


@pytest.fixture(autouse=True)
def nothing_is_left(given: Path) -> Iterator[None]:
    """No descriptor, mount, thread or file outlives a test, however it ended."""
    before = traces()
    yield
    give_up = time.monotonic() + 5
    while traces() != before and time.monotonic() < give_up:  # a thread of a test's server may still be closing its connection
        time.sleep(0.01)
    assert traces() == before
    assert os.listdir(given) == []


def traces() -> tuple[list[str], str, set[threading.Thread]]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that listed the others
            continue
    return sorted(found), Path("/proc/self/mountinfo").read_text(), set(threading.enumerate())


class Store:
    """A directory whose answers a test can hold up, refuse and count."""

    def __init__(self, sealed: Sealed) -> None:
        self._source = DirectorySource(str(sealed.layout))
        self._lock = threading.Lock()
        self.errors: list[ArtifactUnavailableError] = []  # one for each read to come
        self.refuses: ArtifactUnavailableError | None = None  # for every read
        self.reads = 0
        self.all_read = threading.Event()
        self.entered = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        return self.read_blob(reference, max_bytes)

    def referrers(self, digest: str) -> tuple[str, ...]:
        return self._source.referrers(digest)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        self._fail()
        return self._source.read_blob(digest, max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        self.entered.set()
        self.may_answer.wait(30)
        self._fail()
        got = self._source.read_range(digest, offset, out)
        with self._lock:
            self.reads += 1
            if self.reads == SEGMENTS:
                self.all_read.set()
        return got

    def close(self) -> None:
        self._source.close()

    def _fail(self) -> None:
        with self._lock:
            error = self.refuses or (self.errors.pop() if self.errors else None)
        if error is not None:
            raise error


def released(key: bytes = KEY) -> ReleasedKey:
    secret = SecretBuffer(len(key))
    with secret.view() as view:
        view[:] = key
    return ReleasedKey(secret, Ident("key-1"), 1)


def config(sealed: Sealed, kind: str, given: Path, **changes: Any) -> ArtifactConfig:
    directory = str(given) if kind == "directory" else None
    fields = {"source": str(sealed.layout), "manifest_digest": sealed.digest, "destination": kind, "directory": directory}
    return ArtifactConfig(**fields | changes)


def boot(
    artifact: ArtifactConfig,
    check: Callable[[LoadedArtifact], None] = lambda _: None,
    *,
    source: BlobSource | None = None,
    key_uri: str = KEY_URI,
    key: bytes = KEY,
    key_locked: bool | None = None,
    floor: int = 0,
    gid: int | None = None,
    memory: MemoryInfo = MACHINE,
    before_load: Callable[[Prepared], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Prepare and load; `check` sees the result before everything is undone."""

    async def story() -> None:
        with ExitStack() as undo:
            store = source or open_source(artifact.source, None, 30)
            undo.callback(store.close)
            prepared = await prepare(store, artifact, key_uri, undo, gid=gid, allow_swap=False, memory=memory)
            assert isinstance(prepared, Prepared)
            before_load(prepared)
            with released(key) as release:
                if key_locked is not None:
                    release.secret.locked = key_locked
                loaded = await load(prepared, release, floor, progress)
            check(loaded)

    asyncio.run(story())


def contents(loaded: LoadedArtifact) -> dict[str, bytes]:
    """Every file of a loaded artifact, through what the supervisor gets."""
    if loaded.destination is DestinationKind.MEMFD:
        return {loaded.files[0].path: Path(f"/proc/self/fd/{loaded.descriptors[0]}").read_bytes()}
    root = loaded.directory or f"/proc/self/fd/{loaded.descriptors[0]}"
    return {file.path: Path(root, file.path).read_bytes() for file in loaded.files}


def holds(files: dict[str, bytes], kind: str) -> Callable[[LoadedArtifact], None]:
    def check(loaded: LoadedArtifact) -> None:
        assert loaded.destination.value == kind
        assert (loaded.model_name, loaded.version) == ("tiny", VERSION)
        assert {file.path: file.size for file in loaded.files} == {path: len(data) for path, data in files.items()}
        assert loaded.total_bytes == sum(map(len, files.values()))
        assert contents(loaded) == files

    return check


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_sealed_is_what_lies_in_memory(sealed: Sealed, given: Path, kind: str) -> None:
    boot(config(sealed, kind, given), holds(FILES, kind))


def test_one_file_lies_in_a_sealed_memfd(pristine: dict[int, Sealed], given: Path) -> None:
    boot(config(pristine[1], "memfd", given), holds(ONE_FILE, "memfd"))


@needs_root
def test_a_model_in_a_tmpfs_can_be_mounted_and_read_but_not_written(sealed: Sealed, given: Path) -> None:
    def check(loaded: LoadedArtifact) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                mounts.enter_private_mount_namespace()
                mounts.attach(loaded.descriptors[0], str(given))
                assert (given / "weights/big.bin").read_bytes() == FILES["weights/big.bin"]
                for attempt in ((given / "config.json").unlink, (given / "new").touch):
                    with pytest.raises(OSError, match="Read-only"):
                        attempt()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    boot(config(sealed, "tmpfs", given), check)


@needs_root
def test_without_privilege_a_single_file_goes_into_a_memfd(pristine: dict[int, Sealed], given: Path) -> None:
    public = Path(tempfile.mkdtemp())  # pytest keeps its own folders private
    public.chmod(0o755)
    layout = shutil.copytree(pristine[1].layout, public / "layout")
    layout.chmod(0o755)
    artifact = config(Sealed(layout, pristine[1].digest), "auto", given)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            boot(artifact, holds(ONE_FILE, "memfd"))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    shutil.rmtree(public)


def test_a_model_that_shall_be_released_does_not_go_into_a_memfd(pristine: dict[int, Sealed], given: Path) -> None:
    with pytest.raises(DestinationError) as caught:
        boot(config(pristine[1], "memfd", given, after_ready="release"))
    assert caught.value.problem is DestinationProblem.HELD


def test_ciphertext_that_came_before_the_key_is_not_fetched_again(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)

    def wait_for_all(_: Prepared) -> None:
        assert store.all_read.wait(30)

    boot(config(sealed, "directory", given), holds(FILES, "directory"), source=store, before_load=wait_for_all)
    assert store.reads == SEGMENTS


def test_a_store_that_delivers_only_after_the_key_came_is_no_failure(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)
    store.may_answer.clear()

    def refuse_until_now(prepared: Prepared) -> None:
        store.refuses = ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        store.may_answer.set()
        prepared.stop_fetching()
        assert store.reads == 0
        store.refuses = None

    boot(config(sealed, "directory", given), holds(FILES, "directory"), source=store, before_load=refuse_until_now)
    assert store.reads == SEGMENTS


def test_what_the_store_lacks_can_be_known_before_the_gate(sealed: Sealed, given: Path) -> None:
    sealed.blob("weights/exact.bin").unlink()

    def gate(prepared: Prepared) -> None:
        for thread in threading.enumerate():
            if thread.name == "segments":
                thread.join()
        prepared.check()
        pytest.fail("passed the gate")

    with pytest.raises(ArtifactUnavailableError) as caught:
        boot(config(sealed, "directory", given), before_load=gate)
    assert caught.value.problem is StoreProblem.NOT_FOUND


def test_progress_counts_plaintext_up_to_its_end(sealed: Sealed, given: Path) -> None:
    seen: list[tuple[int, int]] = []
    boot(config(sealed, "directory", given), progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, FILES.values()))
    assert len(seen) == SEGMENTS
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_the_group_may_read(sealed: Sealed, given: Path) -> None:
    def check(loaded: LoadedArtifact) -> None:
        status = (given / "model/weights/big.bin").stat()
        assert (status.st_mode & 0o777, status.st_gid) == (0o440, os.getegid())

    boot(config(sealed, "directory", given), check, gid=os.getegid())


# --- sizes ------------------------------------------------------------------------------------------------------------


def planned(sizes: dict[str, int], given: Path, memory: MemoryInfo, *, traced: bool = True) -> int:
    """Prepare a model of which there are only documents; returns the most bytes that Python held meanwhile, if traced."""
    files = tuple(
        SealedFile(path, size, digest_of(path.encode()), 1, b"\x28" + bytes(39)) for path, size in sorted(sizes.items())
    )
    model = ModelConfig(Ident("planned"), 1, Ident(KEY_URI), key_commitment(KEY, KEY_URI), files)
    documents = {digest_of(data): data for data in (pack_manifest(model), pack_config(model))}
    digest = next(iter(documents))
    artifact = ArtifactConfig(
        source="/planned", manifest_digest=digest, destination="directory", directory=str(given), headroom_mib=0
    )
    if traced:
        tracemalloc.start()
    try:
        boot(artifact, source=Case(documents, b"", {}), memory=memory)
    except ArtifactUnavailableError:  # the blobs
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pytest.fail("loaded")


def test_a_file_of_200_gib_is_planned_by_its_size_and_takes_nothing_yet(given: Path, tmp_path: Path) -> None:
    size = 200 << 30
    assert (StreamLayout(size).segments, StreamLayout(size).ciphertext_bytes) == (204_804, size + 40 + 16 * 204_804)
    needed = demand_of({"weights": size}).memory_bytes
    with pytest.raises(InsufficientMemoryError) as caught:
        planned({"weights": size}, given, machine_with(tmp_path / "small", needed - 1024))
    assert caught.value.needed_bytes == needed
    assert caught.value.limit is MemoryLimit.AVAILABLE
    room = os.statvfs(given)
    if room.f_bavail * room.f_frsize < size:
        with pytest.raises(InsufficientMemoryError) as caught:
            planned({"weights": size}, given, machine_with(tmp_path, needed + 1023))
        assert caught.value.limit is MemoryLimit.DESTINATION


def test_a_file_of_the_most_segments_is_planned_and_does_not_fit(given: Path, tmp_path: Path) -> None:
    assert StreamLayout(MAX_PLAINTEXT_BYTES).segments == MAX_SEGMENTS == 1 << 32
    with pytest.raises(InsufficientMemoryError) as caught:
        planned({"weights": MAX_PLAINTEXT_BYTES}, given, machine_with(tmp_path, 1 << 40))
    assert caught.value.needed_bytes > MAX_PLAINTEXT_BYTES
    with pytest.raises(RuntimeError):
        StreamLayout(MAX_PLAINTEXT_BYTES + 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a tmpfs of any size")
def test_what_is_kept_beside_a_file_of_200_gib_is_17_bytes_a_mib() -> None:
    layout = StreamLayout(200 << 30)
    tracemalloc.start()
    with ExitStack() as undo:
        destination = DetachedTmpfs(demand_of({"weights": layout.plaintext_bytes}), None)
        undo.callback(destination.close)
        destination.create("weights", layout.plaintext_bytes)
        with destination.window("weights", *layout.plaintext_range(layout.segments - 1)) as window:
            window.populate(*layout.plaintext_range(layout.segments - 1))
        ahead = _Ahead(layout.segments)
        assert len(ahead.fetched) == layout.segments
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 17 * layout.segments + (1 << 20)


def many_sizes(count: int) -> dict[str, int]:
    return {f"part-{i % 100:02}/shard-{i:06}-of-the-model.bin": i % 3 for i in range(count)}


def test_a_hundred_thousand_files_are_planned_by_pages_and_inodes(given: Path, tmp_path: Path) -> None:
    sizes = many_sizes(MAX_FILES)
    demand = demand_of(sizes)
    assert (demand.files, demand.folders, demand.file_bytes) == (100_000, 100, 66_666 * mmap.PAGESIZE)
    with pytest.raises(InsufficientMemoryError) as caught:
        planned(sizes, given, machine_with(tmp_path, demand.memory_bytes - 1024), traced=False)
    assert caught.value.needed_bytes == demand.memory_bytes


def test_a_file_takes_little_in_the_worker_beside_its_place(given: Path, tmp_path: Path) -> None:
    """Found without its share of the documents, some 530 bytes, which the test holds."""
    assert planned(many_sizes(10_000), given, machine_with(tmp_path, 1 << 30)) < 1200 * 10_000


def test_a_model_of_empty_files_only_takes_inodes_and_no_page(given: Path, tmp_path: Path) -> None:
    files = {f"{i % 7}/{i}": b"" for i in range(50)}
    demand = demand_of(dict.fromkeys(files, 0))
    assert (demand.file_bytes, demand.inodes) == (0, 58)
    sealed = seal(tmp_path, files)
    for kind in KINDS:
        boot(config(sealed, kind, given), holds(files, kind))


@pytest.mark.parametrize(
    "count",
    [
        2_000,
        pytest.param(
            MAX_FILES, marks=pytest.mark.skipif("KEYTURN_BUILD" not in os.environ, reason="takes minutes: set KEYTURN_BUILD=1")
        ),
    ],
)
def test_many_small_files_take_no_more_descriptors_and_mappings_than_few(tmp_path: Path, given: Path, count: int) -> None:
    files = {f"{i % 100}/{i}": b"x" * (i % 40) for i in range(count)}
    sealed = seal(tmp_path, files)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = mappings()
    seen = [0]

    def look(done: int, total: int) -> None:
        if not done % 101:
            seen.append(mappings() - before)

    with ExitStack() as undo:
        url = undo.enter_context(RangeServer(sealed.layout)).url
        undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, hard))
        for source in (str(sealed.layout), url):
            boot(config(sealed, KINDS[0], given, source=source), holds(files, KINDS[0]), progress=look)
    assert len(seen) > 10
    assert max(seen) < 100


def mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def test_holes_and_empty_files_are_loaded_as_what_they_read_as(tmp_path: Path, given: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "nothing").touch()
    with (folder / "holes").open("wb") as stream:
        stream.seek(3 << 20)
        stream.write(b"x")
        stream.truncate(5 << 20)
    sealed = Sealed(tmp_path / "out", seal_model(folder, tmp_path / "out", KEY, KEY_URI, "tiny", VERSION, lambda _, __: None))
    files = {"nothing": b"", "holes": bytes(3 << 20) + b"x" + bytes((2 << 20) - 1)}
    boot(config(sealed, "directory", given), holds(files, "directory"))


# --- the artifact is not the promised one -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("segment", "offset"), [(0, 41), (3, 3 * SEGMENT_BYTES), (10, 10 * SEGMENT_BYTES + 1000)])
def test_a_flipped_bit_names_file_and_segment_and_leaves_nothing(
    sealed: Sealed, given: Path, kind: str, segment: int, offset: int
) -> None:
    flip(sealed.blob("weights/big.bin"), offset)
    with pytest.raises(SegmentAuthenticationError) as caught:
        boot(config(sealed, kind, given))
    assert (caught.value.file, caught.value.segment) == (2, segment)


def test_a_memfd_with_a_flipped_bit_leaves_nothing(pristine: dict[int, Sealed], given: Path, tmp_path: Path) -> None:
    damaged = Sealed(shutil.copytree(pristine[1].layout, tmp_path / "layout"), pristine[1].digest)
    flip(damaged.blob("model.gguf"), 100)
    with pytest.raises(SegmentAuthenticationError):
        boot(config(damaged, "memfd", given))


@pytest.mark.parametrize("left", [0, 41, SEGMENT_BYTES, 10 * SEGMENT_BYTES + 5])
def test_a_truncated_blob_is_told_with_its_length(sealed: Sealed, given: Path, left: int) -> None:
    blob = sealed.blob("weights/big.bin")
    expected = blob.stat().st_size
    os.truncate(blob, left)
    with pytest.raises(TruncatedArtifactError) as caught:
        boot(config(sealed, "directory", given))
    assert (caught.value.file, caught.value.expected_bytes) == (2, expected)
    assert left <= caught.value.got_bytes < expected


def test_two_blobs_that_changed_places_do_not_open(sealed: Sealed, given: Path) -> None:
    one, other = sealed.blob("config.json"), sealed.blob("weights/exact.bin")
    shutil.copy(other, one)
    with pytest.raises(SegmentAuthenticationError):
        boot(config(sealed, "directory", given))


def test_another_manifest_is_refused(sealed: Sealed, given: Path) -> None:
    with pytest.raises(ManifestDigestError):
        path = sealed.layout / "blobs" / sealed.digest.replace(":", "/")
        flip(path, 5)
        boot(config(sealed, "directory", given))


def test_the_key_asked_for_must_be_the_one_the_manifest_names(sealed: Sealed, given: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        boot(config(sealed, "directory", given), key_uri="kbs:///models/tiny/2")
    assert caught.value.key == "broker.key_uri"


def test_the_name_in_the_configuration_must_be_the_models(sealed: Sealed, given: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        boot(config(sealed, "directory", given, name="another"))
    assert caught.value.key == "artifact.name"


# --- key and version --------------------------------------------------------------------------------------------------


def nothing_opens(_: int, __: int) -> None:
    raise AssertionError("a segment was opened")


def test_a_wrong_key_is_told_apart_from_damage_and_opens_nothing(sealed: Sealed, given: Path) -> None:
    flip(sealed.blob("weights/big.bin"), 100)
    with pytest.raises(KeyMismatchError):
        boot(config(sealed, "directory", given), key=bytes(32), floor=VERSION + 1, progress=nothing_opens)


def test_a_model_below_the_floor_of_the_verdict_is_refused(sealed: Sealed, given: Path) -> None:
    boot(config(sealed, "directory", given), floor=VERSION)
    with pytest.raises(RollbackError) as caught:
        boot(config(sealed, "directory", given), floor=VERSION + 1, progress=nothing_opens)
    assert (caught.value.version, caught.value.floor) == (VERSION, VERSION + 1)


def test_a_model_below_the_configured_floor_is_refused_before_any_memory_is_taken(sealed: Sealed, given: Path) -> None:
    boot(config(sealed, "directory", given, min_version=VERSION))
    with pytest.raises(RollbackError):
        boot(config(sealed, "directory", given, min_version=VERSION + 1), before_load=lambda _: pytest.fail("prepared"))


# --- memory -----------------------------------------------------------------------------------------------------------


def machine_with(tmp_path: Path, available_bytes: int, swap: str = "") -> MemoryInfo:
    info = MemoryInfo(tmp_path / "proc", tmp_path / "sys")
    (info.proc / "self").mkdir(parents=True)
    (info.proc / "self/cgroup").write_text("0::/\n")
    (info.proc / "meminfo").write_text(f"MemAvailable: {available_bytes >> 10} kB\n")
    (info.proc / "swaps").write_text(f"Filename\tType\tSize\tUsed\tPriority\n{swap}")
    return info


def test_a_model_that_does_not_fit_is_refused_before_a_byte_of_it_is_fetched(
    sealed: Sealed, given: Path, tmp_path: Path
) -> None:
    store = Store(sealed)
    with pytest.raises(InsufficientMemoryError):
        boot(config(sealed, "directory", given, headroom_mib=10), source=store, memory=machine_with(tmp_path, 20 << 20))
    assert store.reads == 0


@pytest.mark.parametrize("kind", ["memfd", "directory"])
def test_active_swap_is_refused_before_a_byte_is_fetched(
    pristine: dict[int, Sealed], given: Path, tmp_path: Path, kind: str
) -> None:
    store = Store(pristine[1])
    swapping = machine_with(tmp_path, 1 << 30, "/dev/vda2 partition 1 0 -2\n")
    with pytest.raises(SwapActiveError):
        boot(config(pristine[1], kind, given), source=store, memory=swapping)
    assert store.reads == 0


@needs_root
def test_with_swap_the_weights_need_noswap_and_the_key_a_lock(sealed: Sealed, given: Path, tmp_path: Path) -> None:
    swapping = machine_with(tmp_path, 1 << 30, "/dev/vda2 partition 1 0 -2\n")

    def check(loaded: LoadedArtifact) -> None:
        assert loaded.noswap

    mount = mounts.detached_tmpfs(4096, gid=0)
    os.close(mount.fd)
    if not mount.noswap:
        pytest.skip("this kernel's tmpfs has no noswap")
    boot(config(sealed, "tmpfs", given), check, memory=swapping, key_locked=True)
    with pytest.raises(SwapActiveError):
        boot(config(sealed, "tmpfs", given), memory=swapping, key_locked=False, progress=nothing_opens)


def test_many_files_do_not_go_into_a_memfd(sealed: Sealed, given: Path) -> None:
    with pytest.raises(DestinationError):
        boot(config(sealed, "memfd", given))


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_store_that_comes_back_is_asked_again(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)
    store.errors = [ArtifactUnavailableError(StoreProblem.SERVER_ERROR, 503)]
    boot(config(sealed, "directory", given), holds(FILES, "directory"), source=store)


def test_a_store_that_stays_away_ends_the_boot_at_the_deadline(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)
    store.refuses = ArtifactUnavailableError(StoreProblem.UNREACHABLE)
    with pytest.raises(ArtifactUnavailableError) as caught:
        boot(config(sealed, "directory", given, timeout_s=0.1), source=store)
    assert caught.value.problem is StoreProblem.UNREACHABLE


def test_a_store_that_is_merely_slow_ends_the_boot_at_the_deadline(sealed: Sealed, given: Path) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        boot(config(sealed, "directory", given, timeout_s=0))
    assert caught.value.problem is StoreProblem.TIMEOUT


def test_what_cannot_get_better_is_not_asked_again(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)
    store.errors = [ArtifactUnavailableError(StoreProblem.NOT_FOUND)]
    with pytest.raises(ArtifactUnavailableError) as caught:
        boot(config(sealed, "directory", given), source=store)
    assert caught.value.problem is StoreProblem.NOT_FOUND
    assert store.errors == []


def test_a_blob_that_is_missing_ends_the_load(sealed: Sealed, given: Path) -> None:
    sealed.blob("weights/exact.bin").unlink()
    with pytest.raises(ArtifactUnavailableError) as caught:
        boot(config(sealed, "directory", given))
    assert caught.value.problem is StoreProblem.NOT_FOUND


@pytest.mark.parametrize("how_often", [1, SEGMENTS])
def test_a_bug_in_a_thread_is_not_lost(sealed: Sealed, given: Path, how_often: int) -> None:
    class Broken(Store):
        bugs = how_often

        def read_range(self, digest: str, offset: int, out: memoryview) -> int:
            if self.bugs:
                self.bugs -= 1
                raise RuntimeError("bug")
            return super().read_range(digest, offset, out)

    with pytest.raises(RuntimeError, match="bug"):
        boot(config(sealed, "directory", given), source=Broken(sealed))


def test_the_first_error_ends_the_other_threads(sealed: Sealed, given: Path) -> None:
    lacking = next(file.blob_digest for file in sealed.model.files if file.path == "config.json")

    class Lacking(Store):
        failed_in: threading.Thread | None = None

        def read_range(self, digest: str, offset: int, out: memoryview) -> int:
            if digest != lacking:
                return super().read_range(digest, offset, out)
            self.failed_in = threading.current_thread()
            self.failing.set()
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)

        def __init__(self, sealed: Sealed) -> None:
            super().__init__(sealed)
            self.failing = threading.Event()

    store = Lacking(sealed)
    store.may_answer.clear()

    def fail_and_let_go(prepared: Prepared) -> None:
        assert store.failing.wait(30)
        assert store.failed_in is not None
        store.failed_in.join()
        store.may_answer.set()
        for thread in threading.enumerate():
            if thread.name == "segments":
                thread.join()
        assert store.reads <= 4  # one for each run of segments that was under way
        prepared.check()

    with pytest.raises(ArtifactUnavailableError):
        boot(config(sealed, "directory", given), source=store, before_load=fail_and_let_go)


# --- cancellation -----------------------------------------------------------------------------------------------------


def test_a_boot_that_ends_while_ciphertext_arrives_leaves_nothing(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)
    store.may_answer.clear()

    async def story() -> None:
        with ExitStack() as undo:
            undo.callback(store.close)
            await prepare(store, config(sealed, "directory", given), KEY_URI, undo)
            assert store.entered.wait(30)
            undo.callback(store.may_answer.set)
            raise KeyError  # attestation failed

    with pytest.raises(KeyError):
        asyncio.run(story())
    assert store.reads < SEGMENTS


def test_a_cancelled_prepare_returns_when_its_thread_has_ended(sealed: Sealed, given: Path) -> None:
    class Slow(Store):
        def read_blob(self, digest: str, max_bytes: int) -> bytes:
            self.entered.set()
            self.may_answer.wait(30)
            return super().read_blob(digest, max_bytes)

    store = Slow(sealed)
    store.may_answer.clear()

    async def story() -> None:
        with ExitStack() as undo:
            undo.callback(store.close)
            task = asyncio.create_task(prepare(store, config(sealed, "directory", given), KEY_URI, undo))
            await asyncio.to_thread(store.entered.wait, 30)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=0.01)
            assert not done
            task.cancel()  # impatience changes nothing
            store.may_answer.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(story())
    assert store.reads == 0


def test_a_cancelled_load_returns_when_every_thread_has_ended(sealed: Sealed, given: Path) -> None:
    store = Store(sealed)

    async def story() -> None:
        with ExitStack() as undo:
            undo.callback(store.close)
            prepared = await prepare(store, config(sealed, "directory", given), KEY_URI, undo)
            loop = asyncio.get_running_loop()
            first = asyncio.Event()
            opened = 0
            may_go_on = threading.Event()

            def progress(_: int, __: int) -> None:
                nonlocal opened
                opened += 1
                loop.call_soon_threadsafe(first.set)
                may_go_on.wait(30)

            with released() as key:
                task = asyncio.create_task(load(prepared, key, 0, progress))
                await first.wait()
                task.cancel()
                done, _ = await asyncio.wait({task}, timeout=0.01)
                assert not done
                may_go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
            names = {thread.name for thread in threading.enumerate()}
            assert "segments" not in names
            assert opened < SEGMENTS
            assert os.listdir(given) == [".keyturn"]

    asyncio.run(story())


@pytest.mark.parametrize("cancelled", ["attestation", "load"])
def test_a_boot_that_ends_while_the_store_drips_ends_at_once(pristine: dict[int, Sealed], given: Path, cancelled: str) -> None:
    sealed = pristine[1]
    with RangeServer(sealed.layout, Fault.DRIP_BODY) as server:
        fetched_ahead = 2 + 2  # manifest, config, and one segment of each run

        async def story() -> float:
            with ExitStack() as undo:
                store = open_source(server.url, None, 30)
                undo.callback(store.close)
                prepared = await prepare(store, config(sealed, "directory", given), KEY_URI, undo)
                while len(server.requests) < fetched_ahead:
                    await asyncio.sleep(0.01)
                ended = time.monotonic()
                if cancelled == "attestation":
                    return ended
                with released() as key:
                    task = asyncio.create_task(load(prepared, key, 0, nothing_opens))
                    while len(server.requests) == fetched_ahead and not task.done():
                        await asyncio.sleep(0.01)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            return ended

        assert time.monotonic() - asyncio.run(story()) < 1.5
        assert "segments" not in {thread.name for thread in threading.enumerate()}


HOSTILE = {
    SegmentAuthenticationError: [
        Fault.OTHER_OBJECT
    ],  # no ETag is compared: copies of one file have as many as there are servers
    StoreProblem.BAD_ANSWER: [
        Fault.NO_RANGES,
        Fault.WRONG_START,
        Fault.WRONG_LENGTH,
        Fault.LONGER_RANGE,
        Fault.LONGER_BODY,
        Fault.NO_CONTENT_RANGE,
        Fault.MULTIPART,
        Fault.GZIP,
        Fault.TEAPOT,
        Fault.REDIRECT_LOOP,
        Fault.REDIRECT_AWAY,
        Fault.REDIRECT_NOWHERE,
    ],
    StoreProblem.NOT_FOUND: [Fault.NOT_FOUND],
    StoreProblem.REFUSED: [Fault.FORBIDDEN],
    StoreProblem.SERVER_ERROR: [Fault.BROKEN],
    StoreProblem.UNREACHABLE: [Fault.CUT, Fault.CUT_CHUNKED, Fault.GARBAGE],
    StoreProblem.TIMEOUT: [Fault.SILENT, Fault.DRIP_HEAD, Fault.DRIP_CHUNKS, Fault.CONTINUE],
}


@pytest.mark.parametrize("good_answers", [2, 9], ids=["from the first segment on", "midway"])
@pytest.mark.parametrize(("fault", "expected"), [(fault, name) for name, faults in HOSTILE.items() for fault in faults])
def test_a_store_that_turns_bad_gives_no_file_a_name(
    sealed: Sealed, given: Path, fault: Fault, expected: type[Exception] | StoreProblem, good_answers: int
) -> None:
    with RangeServer(sealed.layout, fault, good_answers=good_answers) as server, appearing(given) as names:
        with pytest.raises((ArtifactUnavailableError, SegmentAuthenticationError)) as caught:
            boot(config(sealed, "directory", given, source=server.url, timeout_s=1))
        assert len(server.requests) > good_answers
    assert names == {".keyturn"}
    said = getattr(caught.value, "problem", type(caught.value))
    retried = isinstance(caught.value, ArtifactUnavailableError) and caught.value.retryable
    assert said is expected or (retried and said is StoreProblem.TIMEOUT)


def test_a_store_that_drips_ends_the_boot_at_the_deadline(sealed: Sealed, given: Path) -> None:
    with RangeServer(sealed.layout, Fault.DRIP_BODY) as server:
        started = time.monotonic()
        with pytest.raises(ArtifactUnavailableError) as caught:
            boot(config(sealed, "directory", given, source=server.url, timeout_s=0.3))
        assert time.monotonic() - started < 2
    assert caught.value.problem is StoreProblem.TIMEOUT
