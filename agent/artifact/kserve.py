"""A model as KServe's confidential serving keeps it: files sealed as JWE, each on its own, and perhaps plain ones beside them.

For models that exist in this form; a sealed model (`FORMAT.md`) is better in every respect. Here nothing says which files
belong together, in which version, or which of two is which: a store may give an older file of the same key, or one under the
name of another. So the measured configuration lists every file, those in clear with their digest, and what is not listed is
not read; nothing is ever taken for plaintext or for ciphertext by its looks. There is no version: a verdict that sets a floor
is not met. There is no key commitment.

GCM has one tag for a whole file, so plaintext goes into the destination before anything proves it genuine. That is safe here:
the destination has no name, or one that nobody may open, until `load` has returned, and that is after the last tag; on any
error it is freed as a whole. Ciphertext passes through one buffer of 1 MiB a thread, as text, then as bytes: memory beside the
model is constant, where KServe's own reader takes several times the file.
"""

import hashlib
import hmac
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import rfc8785

from agent.artifact import DestinationKind, LoadedArtifact, LoadedFile
from agent.artifact.compact_jwe import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    MAX_PLAINTEXT_BYTES,
    TAIL_BYTES,
    CompactJwe,
    JweOpener,
    parse_compact,
)
from agent.artifact.memory import Destination, check_memory, choose_destination, swap_is_active
from agent.artifact.sources import BlobSource
from agent.artifact.sources.patient import PatientSource
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
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
THREADS = 4
"""Base64 is decoded by one thread at a time in Python, so more only wait."""

_MAX_JWE_BYTES = MAX_PLAINTEXT_BYTES * 4 // 3 + MAX_HEAD_BYTES


def list_digest(config: ArtifactConfig) -> str:
    """What stands in evidence where a sealed model has its manifest digest: SHA-256 over the configured list."""
    listed = {"name": config.name, "jwe_files": list(config.jwe_files), "plain_files": dict(config.plain_files)}
    return f"sha256:{hashlib.sha256(rfc8785.dumps({'schema': 'keyturn/v1/kserve', **listed})).hexdigest()}"


@dataclass(frozen=True, slots=True)
class _JweFile:
    index: int
    name: str  # in the store
    path: str  # of the plaintext
    jwe: CompactJwe


class PreparedJwe:
    """Files that were found and have memory; none is open. Only `prepare` makes one, and its undo stack closes it."""

    def __init__(
        self,
        source: BlobSource,
        config: ArtifactConfig,
        files: list[_JweFile],
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

    def check(self) -> None:
        """As `load.Prepared.check`. Nothing is fetched ahead, so there is nothing to tell."""

    def close(self) -> None:
        """Free memory, plaintext included. May be called again."""
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
    patient = PatientSource(source, config.timeout_s, stop)
    # 1. What is in clear is small and complete before anything else.
    plain = {path: _read_plain(patient, path, digest) for path, digest in config.plain_files.items()}
    files = [_find(patient, index, name) for index, name in enumerate(config.jwe_files)]
    # 2. It fits, into memory that stays memory.
    sizes = [file.jwe.plaintext_bytes for file in files] + [len(content) for content in plain.values()]
    check_memory(sizes, config.headroom_mib << 20, memory)
    destination = choose_destination(
        config.destination,
        config.directory,
        sizes,
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
    for path, size in zip([*(file.path for file in files), *plain], sizes, strict=True):
        destination.create(path, size)
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
    _Opening(prepared, key, progress, stop).run()
    destination = prepared.destination
    for path, content in prepared.plain.items():
        with destination.window(path, 0, len(content)) as window:
            window.populate(0, len(content))
            window.copy_in(0, memoryview(content))
    destination.seal_read_only()
    sizes = [(file.path, file.jwe.plaintext_bytes) for file in prepared.files]
    sizes += [(path, len(content)) for path, content in prepared.plain.items()]
    return LoadedArtifact(
        model_name=Ident(prepared.config.name or ""),
        manifest_digest=prepared.config.digest,
        version=0,
        files=tuple(LoadedFile(path, size) for path, size in sizes),
        destination=destination.kind,
        descriptors=destination.hand_over(),
        directory=destination.directory,
        noswap=destination.noswap,
    )


class _Opening:
    """Opens every file, each from its start to its end by one thread."""

    def __init__(
        self, prepared: PreparedJwe, key: ReleasedKey, progress: Callable[[int, int], None], stop: threading.Event
    ) -> None:
        self._destination = prepared.destination
        self._source = PatientSource(prepared.source, prepared.config.timeout_s, stop)
        with key.secret.view() as secret:  # a wrong key shows before a byte of a model is fetched, where anything shows it
            self._openers = [JweOpener(file.jwe, secret) for file in prepared.files]
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._files = iter(prepared.files)
        self._total_bytes = sum(file.jwe.plaintext_bytes for file in prepared.files)
        self._done_bytes = 0
        self._left = len(prepared.files)
        self._threads = min(THREADS, len(prepared.files))

    def run(self) -> None:
        """Return when every tag was checked, or raise with every thread ended."""
        Crew(self._work, self._threads, self._stop, "files").run()
        if self._left:  # cancelled: nobody hears of this
            raise RuntimeError("a file was left out")

    def _work(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while not self._stop.is_set():
            with self._lock:
                file = next(self._files, None)
            if file is None:
                return
            self._open(file, buffer)
            with self._lock:
                self._left -= 1

    def _open(self, file: _JweFile, buffer: memoryview) -> None:
        opener = self._openers[file.index]
        try:
            for done in range(0, file.jwe.text_bytes, CHUNK_BYTES):
                text = buffer[: min(CHUNK_BYTES, file.jwe.text_bytes - done)]
                got = self._source.read_range(_named(file.name), file.jwe.start + done, text)
                # refusal: test_a_file_that_shrinks_is_truncated
                if got != len(text):
                    raise TruncatedArtifactError(file.index, done + got, file.jwe.text_bytes)
                offset, length = done * 3 // 4, len(text) * 3 // 4
                with self._destination.window(file.path, offset, length) as window:
                    window.populate(offset, length)
                    with window.view(offset, length) as out:
                        opener.update(text, out)
                with self._lock:
                    self._done_bytes += length
                    self._progress(self._done_bytes, self._total_bytes)
            opener.finish()
        except ValueError:
            raise SegmentAuthenticationError(file.index, 0) from None


def _read_plain(source: PatientSource, path: str, digest: str) -> bytes:
    content = source.read_blob(_named(path), MAX_PLAIN_BYTES)
    # refusal: test_a_plain_file_that_is_not_the_listed_one_is_refused
    if not hmac.compare_digest(f"sha256:{hashlib.sha256(content).hexdigest()}", digest):
        raise ManifestDigestError()
    return content


def _find(source: PatientSource, index: int, name: str) -> _JweFile:
    size = _size(source, name)
    head, tail = bytearray(min(MAX_HEAD_BYTES, size)), bytearray(min(TAIL_BYTES, size))
    for offset, part in ((0, head), (size - len(tail), tail)):
        # refusal: test_a_file_that_shrinks_is_truncated
        if part and source.read_range(_named(name), offset, memoryview(part)) != len(part):
            raise TruncatedArtifactError(index, 0, size)
    try:
        return _JweFile(index, name, name.removesuffix(SUFFIX), parse_compact(bytes(head), bytes(tail), size))
    except ValueError:
        raise MalformedHeaderError(index) from None


def _size(source: PatientSource, name: str) -> int:
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
