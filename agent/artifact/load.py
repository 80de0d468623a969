"""From a sealed model in a store to plaintext in guest memory.

`prepare` does what needs no key: the manifest is authenticated, memory is checked and taken, ciphertext is fetched ahead
while attestation waits. `load` does the rest: key commitment, rollback floor, every segment opened by parallel threads,
straight into the destination. Does not know formats (`stream.py`, `manifest.py`), stores (`sources/`) or kinds of
memory (`memory.py`).

Ciphertext fetched ahead lies in the destination itself, at the place of the plaintext it becomes: what is fetched ahead
takes no further memory, and its pages are present when the key comes. A store's bytes always pass through a buffer of
ours before they are opened: GCM reads them twice, and a page the host can still write could change in between.

Descriptors, mappings and threads are as many for 100,000 files as for a few. Beside the model the worker holds their table,
1.1 KiB a file while it is parsed and half of that later.
"""

import hmac
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from agent.artifact import DescribedModel, DestinationKind, LoadedArtifact, LoadedFile, kserve, openssf, volume, volume_config
from agent.artifact.digests import FileDigests
from agent.artifact.manifest import CONFIG_TYPE, MAX_MANIFEST_BYTES, VOLUME_CONFIG_TYPE, ModelConfig, SealedFile, parse_manifest
from agent.artifact.memory import Destination, check_memory, choose_destination, demand_of, swap_is_active
from agent.artifact.sources import BlobSource
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.sources.patient import PatientSource
from agent.artifact.stream import (
    SEGMENT_BYTES,
    TAG_BYTES,
    SegmentOpener,
    associated_data,
    key_commitment,
    parse_header,
)
from agent.artifact.window import Window
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
    AgentError,
    ConfigError,
    ConfigProblem,
    DestinationError,
    DestinationProblem,
    KeyMismatchError,
    RollbackError,
    SwapActiveError,
    TruncatedArtifactError,
)
from agent.guest.memory_info import MACHINE, MemoryInfo
from agent.keys import ReleasedKey
from agent.threads import Crew, in_thread

OPEN_THREADS = max(2, len(os.sched_getaffinity(0)))
"""They keep a processor busy each; more than there are would take each other's cache (measured: 20 to 40 % more work)."""
CONNECTIONS = max(4, min(2 * OPEN_THREADS, 16))
"""To a store over a network: as many on their way as are opened. Each has a buffer of 1 MiB; more of them than this cost a fast
network a quarter of its rate where processors are few (measured: 8 beside 4, on two)."""
_RUN_SEGMENTS = 8
"""Segments a thread takes at a time: it opens and maps a file once for all of them."""
_SMALL_BYTES = 32 << 10
"""Up to here no window is mapped for ciphertext: `pwrite` makes the pages as well. 100,000 small files take half the time so.
Plaintext is never written so: the buffer it would come from is memory that can be swapped out."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, from any thread, one at a time."""

_T = TypeVar("_T")


class _Ahead:
    """Which segments of a model were fetched ahead, all files one after the other."""

    def __init__(self, segments: int) -> None:
        self.fetched = bytearray(segments)  # 1: ciphertext lies in the destination, its tag in `tags`
        self.tags = bytearray(segments * TAG_BYTES)


class _File:
    """One file on its way. Made anew for every piece of work: a model may have very many."""

    def __init__(self, index: int, sealed: SealedFile, first: int, ahead: _Ahead) -> None:
        """`first`: the number of its first segment among those of the model."""
        self.index = index
        self.sealed = sealed
        self.layout = sealed.layout
        self._first = first
        self._ahead = ahead

    def fetch(self, segment: int, source: PatientSource, out: memoryview) -> memoryview:
        """Fill the front of `out` with one segment and its tag, from the store."""
        offset, length = self.layout.ciphertext_range(segment)
        ciphertext = out[:length]
        got = source.read_range(self.sealed.blob_digest, offset, ciphertext)
        # refusal: test_a_truncated_blob_is_told_with_its_length
        if got != length:
            raise TruncatedArtifactError(self.index, offset + got, self.layout.ciphertext_bytes)
        return ciphertext

    def is_ahead(self, segment: int) -> bool:
        return self._ahead.fetched[self._first + segment] == 1

    def put_ahead(self, segment: int, ciphertext: memoryview, window: Window) -> None:
        """Keep the ciphertext of a segment where its plaintext will be."""
        offset, length = self.layout.plaintext_range(segment)
        if length > _SMALL_BYTES:
            window.populate(offset, length)
        window.copy_in(offset, ciphertext[:length])
        self._ahead.tags[self._tag(segment)] = ciphertext[length:]
        self._ahead.fetched[self._first + segment] = 1

    def take_ahead(self, segment: int, window: Window, out: memoryview) -> memoryview:
        """Fill the front of `out` with what `put_ahead` kept."""
        offset, length = self.layout.plaintext_range(segment)
        window.copy_out(offset, out[:length])
        out[length : length + TAG_BYTES] = self._ahead.tags[self._tag(segment)]
        return out[: length + TAG_BYTES]

    def _tag(self, segment: int) -> slice:
        return slice((self._first + segment) * TAG_BYTES, (self._first + segment + 1) * TAG_BYTES)


@dataclass(frozen=True, slots=True)
class _Run:
    """Successive segments of one file, the piece of work of one thread."""

    file: _File
    segments: range

    def window(self, destination: Destination) -> Window:
        """Their place in the destination."""
        start, _ = self.file.layout.plaintext_range(self.segments[0])
        offset, length = self.file.layout.plaintext_range(self.segments[-1])
        return destination.window(self.file.sealed.path, start, offset + length - start)


class _Work:
    """Threads that work on the runs of a model until all are done, one fails, or `stop` is set."""

    def __init__(
        self, files: Iterator[_File], do: Callable[[_Run, memoryview], None], stop: threading.Event, threads: int
    ) -> None:
        """`do` gets a run and a buffer of one segment; it looks at `stop` after each segment."""
        self._runs = (
            _Run(file, range(first, min(first + _RUN_SEGMENTS, file.layout.segments)))
            for file in files
            for first in range(0, file.layout.segments, _RUN_SEGMENTS)
        )
        self._do = do
        self._stop = stop
        self._lock = threading.Lock()
        self._crew = Crew(self._work, threads, stop, "segments")
        self.errors = self._crew.errors
        self.start, self.join = self._crew.start, self._crew.join

    def _work(self) -> None:
        buffer = memoryview(bytearray(SEGMENT_BYTES))
        while not self._stop.is_set():
            with self._lock:
                run = next(self._runs, None)
            if run is None:
                return
            self._do(run, buffer)


class Prepared:
    """A model whose manifest is authenticated and whose memory is taken; ciphertext goes on arriving until `load`.

    Only `prepare` makes one, and its undo stack closes it.
    """

    def __init__(
        self,
        source: BlobSource,
        manifest_digest: str,
        model: ModelConfig,
        destination: Destination,
        timeout_s: int,
        swap_active: bool,
        allow_swap: bool,
    ) -> None:
        self.source = source
        self.manifest_digest = manifest_digest
        self.model = model
        self.destination = destination
        self.timeout_s = timeout_s
        self.swap_active = swap_active
        self.allow_swap = allow_swap
        self.segments = sum(file.layout.segments for file in model.files)
        self._fetched = _Ahead(self.segments)
        self._stop = threading.Event()
        self._patient = PatientSource(source, timeout_s, self._stop)
        self.signed: openssf.Signed | None = None
        self.threads = _threads(source, self.segments)
        self._ahead = _Work(self.files(), self._fetch_run, self._stop, self.threads)

    @property
    def total_plaintext_bytes(self) -> int:
        return self.model.total_plaintext_bytes

    @property
    def described(self) -> DescribedModel:
        """What will be open when all is well."""
        files = tuple(LoadedFile(file.path, file.size) for file in self.model.files)
        return DescribedModel(self.model.model_name, self.model.version, self.manifest_digest, files)

    def files(self) -> Iterator[_File]:
        first = 0
        for index, sealed in enumerate(self.model.files):
            yield _File(index, sealed, first, self._fetched)
            first += sealed.layout.segments

    def start(self) -> None:
        """Begin to fetch ahead."""
        self._ahead.start()

    def check(self) -> None:
        """Raise what fetching ahead has met so far, as `load` would. To be asked before the gate: a VM passes it once."""
        if self._ahead.errors:
            raise self._ahead.errors[0]

    def stop_fetching(self) -> None:
        """Stop fetching ahead; returns when no thread is left."""
        self._stop.set()
        self._ahead.join()
        for error in self._ahead.errors:
            # The store may be better by now: `load` asks for the same segment again, and tells what it meets.
            if not isinstance(error, AgentError):
                raise error

    def close(self) -> None:
        """Free threads and memory, plaintext included. May be called again."""
        self._stop.set()
        self._ahead.join()
        self.destination.close()

    def _fetch_run(self, run: _Run, buffer: memoryview) -> None:
        with run.window(self.destination) as window:
            for segment in run.segments:
                run.file.put_ahead(segment, run.file.fetch(segment, self._patient, buffer), window)


AnyPrepared = Prepared | kserve.PreparedJwe | volume.PreparedVolume


async def prepare(
    source: BlobSource,
    config: ArtifactConfig,
    key_uri: str,
    undo: ExitStack,
    *,
    gid: int | None = None,
    allow_swap: bool = False,
    memory: MemoryInfo = MACHINE,
) -> AnyPrepared:
    """Do everything that needs no key. Returns once memory is taken; fetching ahead goes on in threads.

    Args:
        source: where the blobs lie.
        config: the measured configuration of the artifact, identified.
        key_uri: the key the broker is asked for.
        undo: gets the compensation, which frees threads and memory.
        gid: group that may read the plaintext, or None: our own.
        allow_swap: go on with active swap. Only for a demonstration, which says so.
        memory: where to ask for memory and swap.

    Raises:
        ArtifactUnavailableError: the store does not deliver, within `config.timeout_s`.
        ManifestDigestError, MalformedManifestError, MalformedHeaderError: not the promised artifact.
        ConfigError: the configuration names another key or another model than the manifest.
        RollbackError: older than the configured minimum.
        InsufficientMemoryError, DestinationError, SwapActiveError: no memory for it here.
    """
    return await _in_thread(
        lambda stop: _prepare(source, config, key_uri, undo, stop, gid=gid, allow_swap=allow_swap, memory=memory)
    )


async def load(prepared: AnyPrepared, key: ReleasedKey, floor: int, progress: Progress) -> LoadedArtifact:
    """Open every segment and make the result read-only. On any error nothing is handed over, and every thread has ended.

    Args:
        prepared: from `prepare`; used once.
        key: the model key; used during the call only.
        floor: the lowest model version the verdict allows.
        progress: told after every segment.

    Raises:
        KeyMismatchError: not the key this model was sealed with.
        RollbackError: the model is older than the floor.
        SwapActiveError: there is swap, and the key's memory could not be locked.
        ArtifactUnavailableError: the store does not deliver, within `artifact.timeout_s` from here.
        TruncatedArtifactError, SegmentAuthenticationError: not what the provider sealed.
        ModelSignatureError: not what was signed before it was sealed.
        DestinationError: the kernel refused.
    """
    return await _in_thread(lambda stop: _load(prepared, key, floor, progress, stop))


def read_model(source: BlobSource | PatientSource, config: ArtifactConfig, key_uri: str) -> volume_config.AnyModel:
    """What the store holds under the promised digest, authenticated. Needs no key.

    Args:
        source: where the blobs lie.
        config: the measured configuration of the artifact, identified.
        key_uri: the key the broker is asked for.

    Raises:
        ArtifactUnavailableError: the store does not deliver.
        ManifestDigestError, MalformedManifestError, MalformedHeaderError: not the promised artifact.
        ConfigError: the configuration names another key or another model than the manifest.
        RollbackError: older than the configured minimum.
    """
    kind = VOLUME_CONFIG_TYPE if config.format == "volume" else CONFIG_TYPE  # never by what the store has
    manifest = parse_manifest(source.read_manifest(config.digest, MAX_MANIFEST_BYTES), config.digest, (kind,))
    model = volume_config.parse_model(source.read_blob(manifest.config_digest, manifest.config_bytes), manifest)
    # refusal: test_the_key_asked_for_must_be_the_one_the_manifest_names
    if model.key_uri != key_uri:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("broker.key_uri"))
    # refusal: test_the_name_in_the_configuration_must_be_the_models
    if config.name is not None and model.model_name != config.name:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.name"))
    # refusal: test_a_model_below_the_configured_floor_is_refused_before_any_memory_is_taken
    _check_floor(model, config.min_version)  # the verdict's floor comes with the key
    return model


def _prepare(
    source: BlobSource,
    config: ArtifactConfig,
    key_uri: str,
    undo: ExitStack,
    stop: threading.Event,
    *,
    gid: int | None,
    allow_swap: bool,
    memory: MemoryInfo,
) -> AnyPrepared:
    if config.format == "kserve-jwe":
        return kserve.prepare(source, config, undo, stop, gid=gid, allow_swap=allow_swap, memory=memory)
    # 1. The promised manifest, and the file table it promises.
    model = read_model(PatientSource(source, config.timeout_s, stop), config, key_uri)
    if isinstance(model, volume_config.VolumeConfig):
        return volume.prepare(model, config, undo, stop, allow_swap=allow_swap, memory=memory)
    signed = openssf.what_is_signed(config, model)
    # 2. It fits, into memory that stays memory.
    demand = demand_of({file.path: file.size for file in model.files})
    # refusal: test_a_model_that_does_not_fit_is_refused_before_a_byte_of_it_is_fetched
    check_memory(demand, config.headroom_mib << 20, memory)
    destination = choose_destination(
        config.destination,
        config.directory,
        demand,
        gid,
        allow_swap=allow_swap,
        memory=memory,
        spread=config.uri is not None,
    )
    prepared = Prepared(source, config.digest, model, destination, config.timeout_s, swap_is_active(memory), allow_swap)
    undo.callback(prepared.close)
    prepared.signed = signed
    # refusal: test_a_model_that_shall_be_released_does_not_go_into_a_memfd
    if config.after_ready == "release" and destination.kind is DestinationKind.MEMFD:
        raise DestinationError(DestinationProblem.HELD)
    for file in model.files:
        destination.create(file.path, file.size)
    # 3. From here the store works while attestation waits.
    prepared.start()
    return prepared


def _load(prepared: AnyPrepared, key: ReleasedKey, floor: int, progress: Progress, stop: threading.Event) -> LoadedArtifact:
    if isinstance(prepared, kserve.PreparedJwe):
        return kserve.load(prepared, key, floor, progress, stop)
    if isinstance(prepared, volume.PreparedVolume):
        return volume.load(prepared, key, floor, stop)
    model = prepared.model
    # 1. The right key: a wrong one is the authority's affair and must not look like a damaged file.
    with key.secret.view() as secret:
        # refusal: test_a_wrong_key_is_told_apart_from_damage_and_opens_nothing
        if not hmac.compare_digest(key_commitment(secret, model.key_uri), model.key_commitment):
            raise KeyMismatchError()
    # 2. Not older than the authority allows.
    # refusal: test_a_model_below_the_floor_of_the_verdict_is_refused
    _check_floor(model, floor)
    # 3. Swap reaches neither weights (`prepare`) nor key.
    # refusal: test_with_swap_the_weights_need_noswap_and_the_key_a_lock
    if prepared.swap_active and not prepared.allow_swap and not key.secret.locked:
        raise SwapActiveError()
    # 4. Every segment of every file.
    prepared.stop_fetching()
    with key.secret.view() as secret:
        opening = _Opening(prepared, secret, progress, stop)
        opening.run()
    # 5. They are the files that were signed, where that is asked for.
    if prepared.signed and opening.digests:
        _check_signed(prepared, prepared.signed, opening.digests.finish())
    # 6. Nobody writes any more.
    prepared.destination.seal_read_only()
    described = prepared.described
    return LoadedArtifact(
        model_name=described.name,
        manifest_digest=described.manifest_digest,
        version=described.version,
        files=described.files,
        destination=prepared.destination.kind,
        descriptors=prepared.destination.hand_over(),
        directory=prepared.destination.directory,
        noswap=prepared.destination.noswap,
    )


def _check_signed(prepared: Prepared, signed: openssf.Signed, digests: dict[str, bytes]) -> None:
    file = prepared.model.files[signed.bundle]
    bundle = bytearray(file.size)
    with prepared.destination.window(file.path, 0, file.size) as window:
        window.copy_out(0, memoryview(bundle))
    del digests[file.path]
    openssf.check_files(bytes(bundle), signed.keys, digests)


def _check_floor(model: volume_config.AnyModel, floor: int) -> None:
    if model.version < floor:
        raise RollbackError(model.version, floor)


def _opener(model: ModelConfig, index: int, secret: memoryview) -> SegmentOpener:
    file = model.files[index]
    bound_to = associated_data(model.model_name, file.path, file.size, model.key_uri, file.sealed_version)
    return SegmentOpener(secret, parse_header(file.header, index), bound_to, file.layout, index)


def _threads(source: BlobSource, segments: int) -> int:
    """As many as can work at a time: on a folder as there are processors, on a network as there are connections."""
    useful = OPEN_THREADS if isinstance(source, DirectorySource) else max(CONNECTIONS, OPEN_THREADS)
    return min(useful, segments)


class _Opening:
    """Opens every segment of a prepared model, each straight into its place."""

    def __init__(self, prepared: Prepared, secret: memoryview, progress: Progress, stop: threading.Event) -> None:
        self._destination = prepared.destination
        # Not one for each file from the start: it takes 2 KiB, and deriving it takes as long as opening 50 KiB.
        self._opener = lru_cache(2 * prepared.threads)(lambda index: _opener(prepared.model, index, secret))
        self._progress = progress
        self._stop = stop
        self._source = PatientSource(prepared.source, prepared.timeout_s, stop)
        self._total_bytes = prepared.total_plaintext_bytes
        self._lock = threading.Lock()
        self._done_bytes = 0
        self.digests = FileDigests(prepared.model.files, prepared.destination) if prepared.signed else None
        self._left = prepared.segments
        self._processors = threading.Semaphore(OPEN_THREADS)
        self._work = _Work(prepared.files(), self._open_run, stop, prepared.threads)

    def run(self) -> None:
        """Return when every segment is open, or raise with every thread ended."""
        try:
            self._work.start()
        finally:
            self._work.join()
        if self._work.errors:
            raise self._work.errors[0]
        # refusal: test_a_cancelled_load_returns_when_every_thread_has_ended
        if self._left:  # cancelled: nobody hears of this
            raise RuntimeError("a segment was left out")

    def _open_run(self, run: _Run, buffer: memoryview) -> None:
        with run.window(self._destination) as window:
            for segment in run.segments:
                if self._stop.is_set():
                    return
                self._open(run.file, segment, window, buffer)

    def _open(self, file: _File, segment: int, window: Window, buffer: memoryview) -> None:
        offset, length = file.layout.plaintext_range(segment)
        ahead = file.is_ahead(segment)
        if not ahead:
            window.populate(offset, length)  # before the ciphertext comes, which then is still in the cache when it is opened
            ciphertext = file.fetch(segment, self._source, buffer)
        with self._processors, window.view(offset, length) as out:
            if ahead:
                ciphertext = file.take_ahead(segment, window, buffer)
            self._opener(file.index).open(segment, ciphertext, out)
        if self.digests:
            with self._processors:
                self.digests.opened(file.index, segment)
        with self._lock:
            self._left -= 1
            self._done_bytes += length
            self._progress(self._done_bytes, self._total_bytes)


async def _in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """In a thread that is told by the event when the caller is cancelled."""
    stop = threading.Event()
    return await in_thread(lambda: work(stop), on_cancel=stop.set)
