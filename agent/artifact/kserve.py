"""A model as KServe's confidential serving keeps it: files sealed as JWE, each on its own, and perhaps plain ones beside them.

For models that exist in this form; a sealed model (`FORMAT.md`) is better in every respect. Here nothing says which files
belong together, in which version, or which of two is which: a store may give an older file of the same key, or one under the
name of another. So the measured configuration lists every file, those in clear with their digest, and what is not listed is
not read; nothing is ever taken for plaintext or for ciphertext by its looks. There is no version: a verdict that sets a floor
is not met. There is no key commitment.

GCM has one tag for a whole file, so plaintext goes into the destination before anything proves it genuine. That is safe here:
the destination has no name, or one that nobody may open, until `load` has returned, and that is after the last tag; on any
error it is freed as a whole.

Fetching needs no key, and neither does base64: ciphertext is fetched and decoded while attestation waits, by many threads, each
chunk to the place of the plaintext it becomes; a file is then opened from its start to its end by one. Text passes through one
buffer of 1 MiB a thread: memory beside the model is constant, where KServe's own reader takes several times the file.
"""

import hashlib
import hmac
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import rfc8785

from agent.artifact import DescribedModel, DestinationKind, LoadedArtifact, LoadedFile
from agent.artifact.compact_jwe import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    MAX_PLAINTEXT_BYTES,
    TAIL_BYTES,
    CompactJwe,
    JweOpener,
    decode,
    parse_compact,
)
from agent.artifact.memory import Destination, check_memory, choose_destination, demand_of, swap_is_active
from agent.artifact.sources import BlobSource
from agent.artifact.sources.patient import PatientSource
from agent.artifact.window import Window
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
    AgentError,
    DestinationError,
    DestinationProblem,
    MalformedHeaderError,
    ManifestDigestError,
    RollbackError,
    SegmentAuthenticationError,
    SwapActiveError,
    TruncatedArtifactError,
)
from agent.guest.memory_info import MemoryInfo
from agent.keys import ReleasedKey
from agent.threads import Crew

SUFFIX = ".jwe"
MAX_PLAIN_BYTES = 64 << 20
"""Of one file in clear: tokenizers and configurations, not weights."""
FETCH_THREADS = 8
"""As many requests are on their way."""
OPEN_THREADS = 4
"""Files that are opened at a time."""

_RUN_CHUNKS = 8
"""Chunks a thread fetches at a time: it opens and maps a file once for all of them."""
_LOOK_S = 0.2
"""Whoever waits for ciphertext looks this often whether anybody still wants it."""
_MAX_JWE_BYTES = MAX_PLAINTEXT_BYTES * 4 // 3 + MAX_HEAD_BYTES


def list_digest(config: ArtifactConfig) -> str:
    """What stands in evidence where a sealed model has its manifest digest: SHA-256 over the configured list."""
    listed = {"name": config.name, "jwe_files": list(config.jwe_files), "plain_files": dict(config.plain_files)}
    return f"sha256:{hashlib.sha256(rfc8785.dumps({'schema': 'keyturn/v1/kserve', **listed})).hexdigest()}"


class JweFile:
    """One sealed file on its way: which of its chunks lie in the destination, as ciphertext. Only `find` makes one."""

    def __init__(self, index: int, name: str, jwe: CompactJwe) -> None:
        self.index = index
        self.name = name  # in the store
        self.path = name.removesuffix(SUFFIX)  # of the plaintext
        self.jwe = jwe
        self.chunks = -(-jwe.text_bytes // CHUNK_BYTES)
        self.fetched = bytearray(self.chunks)

    def text_range(self, chunk: int) -> tuple[int, int]:
        """Offset from the start of the ciphertext, and length."""
        done = chunk * CHUNK_BYTES
        return done, min(CHUNK_BYTES, self.jwe.text_bytes - done)

    def plaintext_range(self, chunks: range) -> tuple[int, int]:
        """Offset and length of what successive chunks become."""
        start, (done, length) = chunks[0] * CHUNK_BYTES, self.text_range(chunks[-1])
        return start * 3 // 4, (done + length - start) * 3 // 4

    def read(self, chunk: int, source: BlobSource | PatientSource, buffer: memoryview) -> memoryview:
        """Fill the front of `buffer` with the text of one chunk, from the store. Raises TruncatedArtifactError."""
        done, length = self.text_range(chunk)
        text = buffer[:length]
        got = source.read_range(_named(self.name), self.jwe.start + done, text)
        # refusal: test_a_file_that_shrinks_is_truncated
        if got != length:
            raise TruncatedArtifactError(self.index, done + got, self.jwe.text_bytes)
        return text


class _Fetching:
    """Threads that bring what has not come yet; each chunk once, and all of them in the order in which they are opened."""

    def __init__(self, prepared: "PreparedJwe", stop: threading.Event) -> None:
        """`artifact.timeout_s` counts from now."""
        self._destination = prepared.destination
        self._source = PatientSource(prepared.source, prepared.config.timeout_s, stop)
        self._stop = stop
        self._runs = (
            (file, range(first, min(first + _RUN_CHUNKS, file.chunks)))
            for file in prepared.files
            for first in range(0, file.chunks, _RUN_CHUNKS)
        )
        self._lock = threading.Lock()
        self._decoding = threading.Lock()  # Python does one at a time; the others must not stand before whoever attests
        self.arrived = threading.Condition()
        self._crew = Crew(self._work, min(FETCH_THREADS, sum(file.chunks for file in prepared.files)), stop, "ciphertext")
        self.errors, self.start, self.join = self._crew.errors, self._crew.start, self._crew.join

    def _work(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while not self._stop.is_set():
            with self._lock:
                file, chunks = next(self._runs, (None, range(0)))
            if file is None:
                return
            with self._destination.window(file.path, *file.plaintext_range(chunks)) as window:
                for chunk in chunks:
                    if not file.fetched[chunk]:
                        self._fetch(file, chunk, window, buffer)

    def _fetch(self, file: JweFile, chunk: int, window: Window, buffer: memoryview) -> None:
        text = file.read(chunk, self._source, buffer)
        try:
            with self._decoding:
                ciphertext = decode(text)
        except ValueError:
            raise SegmentAuthenticationError(file.index, 0) from None
        offset, size = file.plaintext_range(range(chunk, chunk + 1))
        window.populate(offset, size)
        window.copy_in(offset, memoryview(ciphertext))
        with self.arrived:
            file.fetched[chunk] = 1
            self.arrived.notify_all()


class PreparedJwe:
    """Files that were found and have memory; none is open. Ciphertext goes on arriving until `load`.

    Only `prepare` makes one, and its undo stack closes it.
    """

    def __init__(
        self,
        source: BlobSource,
        config: ArtifactConfig,
        files: list[JweFile],
        plain: dict[str, bytes],
        destination: Destination,
    ) -> None:
        self.source = source
        self.config = config
        self.files = files
        self.plain = plain
        self.destination = destination
        self.swap_active = False
        self.allow_swap = False
        self.total_plaintext_bytes = sum(file.jwe.plaintext_bytes for file in files) + sum(map(len, plain.values()))
        self._stop = threading.Event()
        self._ahead = _Fetching(self, self._stop)

    def start(self) -> None:
        """Begin to fetch ahead."""
        self._ahead.start()

    @property
    def described(self) -> DescribedModel:
        """As `load.Prepared.described`."""
        files = [LoadedFile(file.path, file.jwe.plaintext_bytes) for file in self.files]
        files += [LoadedFile(path, len(content)) for path, content in self.plain.items()]
        return DescribedModel(Ident(self.config.name or ""), 0, self.config.digest, tuple(files))

    def check(self) -> None:
        """As `load.Prepared.check`."""
        # refusal: test_what_is_no_base64_is_known_before_the_gate
        if self._ahead.errors:
            raise self._ahead.errors[0]

    def stop_fetching(self) -> None:
        """As `load.Prepared.stop_fetching`."""
        self._stop.set()
        self._ahead.join()
        for error in self._ahead.errors:
            # refusal: test_a_bug_in_a_thread_is_not_lost
            if not isinstance(error, AgentError):
                raise error

    def close(self) -> None:
        """Free threads and memory, plaintext included. May be called again."""
        self._stop.set()
        self._ahead.join()
        self.destination.close()


def prepare(
    source: BlobSource,
    config: ArtifactConfig,
    undo: ExitStack,
    stop: threading.Event,
    *,
    gid: int | None,
    allow_swap: bool,
    memory: MemoryInfo,
) -> PreparedJwe:
    """As `load.prepare`, blocking; `stop` ends it.

    Raises:
        ManifestDigestError: a plain file is not the listed one.
        MalformedHeaderError: a file is no JWE of KServe's kind; its number is that in `artifact.jwe_files`.
        AgentError: as `load.prepare`.
    """
    # 1. What is in clear is small and complete before anything else.
    patient = PatientSource(source, config.timeout_s, stop)
    plain = read_plain(patient, config)
    files = find(patient, config.jwe_files, stop)
    # 2. It fits, into memory that stays memory.
    sizes = {file.path: file.jwe.plaintext_bytes for file in files} | {path: len(content) for path, content in plain.items()}
    demand = demand_of(sizes)
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
    prepared = PreparedJwe(source, config, files, plain, destination)
    undo.callback(prepared.close)
    # refusal: test_a_model_that_shall_be_released_does_not_go_into_a_memfd
    if config.after_ready == "release" and destination.kind is DestinationKind.MEMFD:
        raise DestinationError(DestinationProblem.HELD)
    prepared.swap_active, prepared.allow_swap = swap_is_active(memory), allow_swap
    for path, size in sizes.items():
        destination.create(path, size)
    # 3. From here the store works while attestation waits.
    prepared.start()
    return prepared


def load(
    prepared: PreparedJwe, key: ReleasedKey, floor: int, progress: Callable[[int, int], None], stop: threading.Event
) -> LoadedArtifact:
    """As `load.load`, blocking; `stop` ends it.

    Raises:
        KeyMismatchError, SegmentAuthenticationError: the key did not seal a file, or the file is damaged; with `dir` these two
            look the same.
        AgentError: as `load.load`.
    """
    # refusal: test_a_verdict_with_a_floor_is_not_met_by_a_model_without_a_version
    if floor:
        raise RollbackError(0, floor)
    # refusal: test_with_swap_the_key_needs_a_lock
    if prepared.swap_active and not prepared.allow_swap and not key.secret.locked:
        raise SwapActiveError()
    with key.secret.view() as secret:  # a wrong key shows before anything else, where anything shows it
        openers = [JweOpener(file.jwe, secret) for file in prepared.files]
    prepared.stop_fetching()
    _Opening(prepared, openers, progress, stop).run()
    destination = prepared.destination
    for path, content in prepared.plain.items():
        with destination.window(path, 0, len(content)) as window:
            window.populate(0, len(content))
            window.copy_in(0, memoryview(content))
    destination.seal_read_only()
    described = prepared.described
    return LoadedArtifact(
        model_name=described.name,
        manifest_digest=described.manifest_digest,
        version=described.version,
        files=described.files,
        destination=destination.kind,
        descriptors=destination.hand_over(),
        directory=destination.directory,
        noswap=destination.noswap,
    )


class _Opening:
    """Opens every file, each from its start to its end by one thread, behind those that bring what has not come yet."""

    def __init__(
        self,
        prepared: PreparedJwe,
        openers: list[JweOpener],
        progress: Callable[[int, int], None],
        stop: threading.Event,
    ) -> None:
        self._destination = prepared.destination
        self._fetching = _Fetching(prepared, stop)
        self._openers = openers
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._files = iter(prepared.files)
        self._total_bytes = sum(file.jwe.plaintext_bytes for file in prepared.files)
        self._done_bytes = 0
        self._left = len(prepared.files)
        self._threads = min(OPEN_THREADS, len(prepared.files))

    def run(self) -> None:
        """Return when every tag was checked, or raise with every thread ended."""
        try:
            self._fetching.start()
            Crew(self._work, self._threads, self._stop, "files").run()
        finally:
            self._stop.set()
            self._fetching.join()
        # refusal: test_a_file_that_shrinks_is_truncated
        if self._fetching.errors:
            raise self._fetching.errors[0]
        if self._left:  # cancelled: nobody hears of this
            raise RuntimeError("a file was left out")

    def _work(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while not self._stop.is_set():
            with self._lock:
                file = next(self._files, None)
            if file is None:
                return
            if not all(self._open(file, chunk, buffer) for chunk in range(file.chunks)):
                return
            try:
                self._openers[file.index].finish()
            except ValueError:
                raise SegmentAuthenticationError(file.index, 0) from None
            with self._lock:
                self._left -= 1

    def _open(self, file: JweFile, chunk: int, buffer: memoryview) -> bool:
        """False: nobody wants it any more, or it will not come."""
        with self._fetching.arrived:
            while not file.fetched[chunk]:
                if self._stop.is_set():
                    return False
                self._fetching.arrived.wait(_LOOK_S)
        offset, length = file.plaintext_range(range(chunk, chunk + 1))
        with self._destination.window(file.path, offset, length) as window, window.view(offset, length) as out:
            window.copy_out(offset, buffer[:length])
            self._openers[file.index].update(buffer[:length], out)
        with self._lock:
            self._done_bytes += length
            self._progress(self._done_bytes, self._total_bytes)
        return True


def read_plain(source: BlobSource | PatientSource, config: ArtifactConfig) -> dict[str, bytes]:
    """The files in clear, by their paths.

    Raises:
        ManifestDigestError: one is not the listed one.
        ArtifactUnavailableError: the store does not deliver.
    """
    return {path: _read_plain(source, path, digest) for path, digest in config.plain_files.items()}


def find(source: BlobSource | PatientSource, names: Sequence[str], stop: threading.Event) -> list[JweFile]:
    """What of sealed files can be seen without a key, of several at a time. `stop` ends it, and is set at its end.

    Raises:
        MalformedHeaderError: one is no JWE of KServe's kind; its number is that among `names`.
        ArtifactUnavailableError, TruncatedArtifactError: the store does not deliver.
    """
    found: dict[int, JweFile] = {}
    left = iter(enumerate(names))
    lock = threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                index, name = next(left, (0, None))
            if name is None:
                return
            found[index] = _find(source, index, name)

    Crew(work, min(FETCH_THREADS, len(names)), stop, "headers").run()
    if len(found) < len(names):  # cancelled: nobody hears of this
        raise RuntimeError("a file was left out")
    return [found[index] for index in range(len(names))]


def _read_plain(source: BlobSource | PatientSource, path: str, digest: str) -> bytes:
    content = source.read_blob(_named(path), MAX_PLAIN_BYTES)
    # refusal: test_a_plain_file_that_is_not_the_listed_one_is_refused
    if not hmac.compare_digest(f"sha256:{hashlib.sha256(content).hexdigest()}", digest):
        raise ManifestDigestError()
    return content


def _find(source: BlobSource | PatientSource, index: int, name: str) -> JweFile:
    size = _size(source, name)
    head, tail = bytearray(min(MAX_HEAD_BYTES, size)), bytearray(min(TAIL_BYTES, size))
    for offset, part in ((0, head), (size - len(tail), tail)):
        # refusal: test_a_file_that_shrinks_is_truncated
        if part and source.read_range(_named(name), offset, memoryview(part)) != len(part):
            raise TruncatedArtifactError(index, 0, size)
    try:
        return JweFile(index, name, parse_compact(bytes(head), bytes(tail), size))
    except ValueError:
        raise MalformedHeaderError(index) from None


def _size(source: BlobSource | PatientSource, name: str) -> int:
    """By bisection, since a source answers for ranges only: some 40 requests of one byte, and whatever a store says, an end."""
    low, high = 0, _MAX_JWE_BYTES + 1
    probe = memoryview(bytearray(1))
    while low < high:
        middle = (low + high) // 2
        if source.read_range(_named(name), middle, probe):
            low = middle + 1
        else:
            high = middle
    return low


def _named(path: str) -> str:
    """The source's word for a file that has a path and no digest."""
    return f"file:{path}"
