"""From the files of a model folder to blobs, on all processors, and the question whether a blob still holds a file.

A file's segments are sealed at the same time and digested one after the other, because SHA-256 is a chain: one file keeps
one processor busy with it, several files keep all. Takes constant memory, two buffers a thread. Does not know the layout
that the blobs lie in (`seal.py`).
"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agent.artifact.manifest import ModelConfig, SealedFile
from agent.artifact.stream import (
    HEADER_BYTES,
    NONCE_PREFIX_BYTES,
    SALT_BYTES,
    SEGMENT_BYTES,
    SegmentOpener,
    SegmentSealer,
    StreamHeader,
    StreamLayout,
    associated_data,
    pack_header,
    parse_header,
)
from agent.closed import Ident
from agent.errors import SealError, SealProblem, SegmentAuthenticationError
from agent.threads import Crew

TEMPORARY = ".sealing-"
THREADS = len(os.sched_getaffinity(0)) + 1
"""One more than there are processors: one of them may wait for its turn to digest."""
_IN_FLIGHT = 3
"""Segments of one file at a time: one is digested, the others are read, sealed and written meanwhile."""

Advance = Callable[[int], None]
"""Called with the plaintext bytes that are done with, from any thread, one at a time."""


class UnsafeFixedSalt:
    """Salts and nonce prefixes that anybody can compute, for test vectors.

    Two different files sealed with one of them, one path and one key give the key stream away. No command reaches this.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    def header(self, path: str) -> StreamHeader:
        """The first bytes of SHAKE128(seed ‖ 0x00 ‖ path)."""
        drawn = hashlib.shake_128(self._seed + b"\0" + path.encode()).digest(SALT_BYTES + NONCE_PREFIX_BYTES)
        return StreamHeader(drawn[:SALT_BYTES], drawn[SALT_BYTES:])


@dataclass(frozen=True, slots=True)
class Sealing:
    """What all files of one seal have in common.

    Attributes:
        model: the resolved folder.
        blobs: the folder of the blobs.
        unsafe_salt: None: salts come from the operating system.
    """

    model: Path
    blobs: Path
    key: bytes
    key_uri: str
    name: str
    version: int
    unsafe_salt: UnsafeFixedSalt | None = None

    def header(self, path: str) -> StreamHeader:
        if self.unsafe_salt:
            return self.unsafe_salt.header(path)
        return StreamHeader(salt=os.urandom(SALT_BYTES), nonce_prefix=os.urandom(NONCE_PREFIX_BYTES))


def seal_files(sealing: Sealing, sizes: dict[str, int], undo: ExitStack, advance: Advance) -> list[SealedFile]:
    """Seal files into blobs that are on disk when this returns, in the order of `sizes`.

    Args:
        sealing: as above.
        sizes: path -> size in bytes.
        undo: removes them again.
        advance: told after every segment.

    Raises:
        SealError: a file changed meanwhile.
        OSError: input or output failed.
    """
    return _Sealer(sealing, sizes, undo, advance).run()


def unchanged_files(sealing: Sealing, sizes: dict[str, int], previous: ModelConfig) -> dict[str, SealedFile]:
    """The rows of an earlier version whose blobs still hold what lies in the folder: every one was opened and compared.

    Args:
        sealing: as above; its key is the previous version's.
        sizes: path -> size in bytes.
        previous: of the same name and key URI.

    Raises:
        OSError: a file of the model cannot be read.
    """
    same = [(i, file) for i, file in enumerate(previous.files) if sizes.get(file.path) == file.size]
    return _Comparison(sealing, same).run()


# --- sealing ----------------------------------------------------------------------------------------------------------


class _Blob:
    """One file becoming a blob. Fields change under the lock of the sealer, `digest` in the turn of a segment."""

    def __init__(self, sealing: Sealing, path: str, size: int, index: int) -> None:
        self.path = path
        self.size = size
        self.index = index
        self.layout = StreamLayout(size)
        header = sealing.header(path)
        self.header = pack_header(header)
        bound = associated_data(sealing.name, path, size, sealing.key_uri, sealing.version)
        self.sealer = SegmentSealer(sealing.key, header, bound, self.layout, index)
        self.digested = 0
        self.digest = hashlib.sha256(self.header)
        self._version = sealing.version
        self._blobs = sealing.blobs
        self._temporary = sealing.blobs / f"{TEMPORARY}{os.urandom(8).hex()}"
        with ExitStack() as opened:
            self._source = open_inside(sealing.model, path)
            opened.callback(os.close, self._source)
            self._target = self._temporary.open("xb", buffering=0)
            opened.callback(self._target.close)
            self._modified = os.fstat(self._source).st_mtime_ns
            _write_at(self._target.fileno(), memoryview(self.header), 0)
            self._opened = opened.pop_all()

    def seal(self, segment: int, plaintext: memoryview, ciphertext: memoryview) -> memoryview:
        """Read one segment, seal it and write it; returns it, in the front of `ciphertext`."""
        start, length = self.layout.plaintext_range(segment)
        # refusal: test_artifact_seal.py::test_a_file_that_ends_early_is_found_where_it_ends
        if read_at(self._source, plaintext[:length], start) < length:
            raise _changed(self.path)
        offset, sealed = self.layout.ciphertext_range(segment)
        out = ciphertext[:sealed]
        self.sealer.seal(segment, plaintext[:length], out)
        _write_at(self._target.fileno(), out, offset)
        return out

    def finish(self, made: list[str]) -> SealedFile:
        """Give it the name of its digest, once it is on disk; `made` gets the digest of a blob that was not there."""
        after = os.fstat(self._source)
        # refusal: test_artifact_seal.py::test_a_file_that_changes_while_it_is_read_is_refused
        if (after.st_size, after.st_mtime_ns) != (self.size, self._modified):
            raise _changed(self.path)
        os.fsync(self._target.fileno())
        digest = f"sha256:{self.digest.hexdigest()}"
        final = self._blobs / self.digest.hexdigest()
        if not final.exists():
            made.append(digest)
        self._temporary.rename(final)
        self.close()
        return SealedFile(self.path, self.size, digest, self._version, self.header)

    def close(self) -> None:
        self._opened.close()


class _Sealer:
    """Threads that seal until every file is a blob or one of them fails."""

    def __init__(self, sealing: Sealing, sizes: dict[str, int], undo: ExitStack, advance: Advance) -> None:
        self._sealing = sealing
        # One callback for all: one for each of very many files would take more memory than everything else.
        self._made: list[str] = []
        undo.callback(_remove, sealing.blobs, self._made)
        self._advance = advance
        self._waiting = iter(enumerate(sizes.items()))
        self._open: list[_Blob] = []
        self._sealed: dict[int, SealedFile] = {}
        self._stop = threading.Event()
        self._turn = threading.Condition()
        segments = sum(StreamLayout(size).segments for size in sizes.values())
        self._crew = Crew(self._work, min(THREADS, segments), self._stop, "sealing")

    def run(self) -> list[SealedFile]:
        try:
            self._crew.run()
        finally:
            for blob in self._open:
                blob.close()
        return [file for _, file in sorted(self._sealed.items())]

    def _work(self) -> None:
        plaintext, ciphertext = memoryview(bytearray(SEGMENT_BYTES)), memoryview(bytearray(SEGMENT_BYTES))
        try:
            while taken := self._take():
                self._seal(*taken, plaintext, ciphertext)
        except BaseException:
            self._stop.set()
            raise
        finally:
            with self._turn:
                self._turn.notify_all()

    def _take(self) -> tuple[_Blob, int] | None:
        """The next segment to seal: of a file that no thread is at, else of a new one, else beside another thread."""
        with self._turn:
            while not self._stop.is_set():
                blob = self._choose()
                if blob:
                    return blob, blob.sealer.claim()
                if not self._open:
                    return None
                self._turn.wait()
        return None

    def _choose(self) -> _Blob | None:
        left = [blob for blob in self._open if blob.sealer.claimed < blob.layout.segments]
        blob = min(left, key=lambda blob: blob.sealer.claimed - blob.digested, default=None)
        if (blob is None or blob.sealer.claimed > blob.digested) and len(self._open) < THREADS:
            index, (path, size) = next(self._waiting, (0, ("", None)))
            if size is not None:
                self._open.append(_Blob(self._sealing, path, size, index))
                return self._open[-1]
        return blob if blob and blob.sealer.claimed - blob.digested < _IN_FLIGHT else None

    def _seal(self, blob: _Blob, segment: int, plaintext: memoryview, ciphertext: memoryview) -> None:
        out = blob.seal(segment, plaintext, ciphertext)
        with self._turn:
            while blob.digested < segment:
                if self._stop.is_set():
                    return
                self._turn.wait()
        blob.digest.update(out)
        last = segment == blob.layout.segments - 1
        if last:
            self._sealed[blob.index] = blob.finish(self._made)
        with self._turn:
            blob.digested += 1
            if last:
                self._open.remove(blob)
            self._advance(blob.layout.plaintext_range(segment)[1])
            self._turn.notify_all()


def _remove(blobs: Path, made: list[str]) -> None:
    for digest in made:
        (blobs / digest.removeprefix("sha256:")).unlink(missing_ok=True)
    for leftover in blobs.glob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


# --- comparing --------------------------------------------------------------------------------------------------------


class _Comparison:
    """Threads that open the blobs of an earlier version beside the files of today."""

    def __init__(self, sealing: Sealing, files: list[tuple[int, SealedFile]]) -> None:
        self._sealing = sealing
        self._files = files
        self._differs = [False] * len(files)
        self._lock = threading.Lock()
        self._pieces = ((at, segment) for at, (_, file) in enumerate(files) for segment in range(file.layout.segments))
        self._stop = threading.Event()

    def run(self) -> dict[str, SealedFile]:
        before = self._modified()
        Crew(self._work, THREADS - 1, self._stop, "comparing").run()
        after = self._modified()
        found = zip(self._files, self._differs, before, after, strict=True)
        return {file.path: file for (_, file), differs, was, is_now in found if not differs and was == is_now}

    def _modified(self) -> list[int]:
        return [(self._sealing.model / file.path).stat().st_mtime_ns for _, file in self._files]

    def _work(self) -> None:
        buffers = [bytearray(SEGMENT_BYTES) for _ in range(3)]
        while not self._stop.is_set():
            with self._lock:  # a generator runs in one thread at a time
                at, segment = next(self._pieces, (0, None))
            if segment is None:
                return
            if not self._differs[at] and not self._is_same(*self._files[at], segment, *buffers):
                self._differs[at] = True

    def _is_same(
        self, index: int, file: SealedFile, segment: int, ciphertext: bytearray, opened: bytearray, plaintext: bytearray
    ) -> bool:
        at = self._sealing
        start, length = file.layout.plaintext_range(segment)
        offset, sealed = file.layout.ciphertext_range(segment)
        bound = associated_data(at.name, file.path, file.size, at.key_uri, file.sealed_version)
        opener = SegmentOpener(at.key, parse_header(file.header, index), bound, file.layout, index)
        try:
            with (at.blobs / file.blob_digest.removeprefix("sha256:")).open("rb", buffering=0) as blob:
                fd = blob.fileno()
                whole = os.fstat(fd).st_size == file.layout.ciphertext_bytes and os.pread(fd, HEADER_BYTES, 0) == file.header
                if not whole or read_at(fd, memoryview(ciphertext)[:sealed], offset) < sealed:
                    return False
            opener.open(segment, memoryview(ciphertext)[:sealed], memoryview(opened)[:length])
        except (FileNotFoundError, SegmentAuthenticationError):  # a damaged copy is sealed anew
            return False
        source = open_inside(at.model, file.path)
        try:
            if read_at(source, memoryview(plaintext)[:length], start) < length:
                return False
        finally:
            os.close(source)
        return opened.startswith(memoryview(plaintext)[:length])


# --- reading and writing ----------------------------------------------------------------------------------------------


def open_inside(model: Path, path: str) -> int:
    """A file of the model, which may be a link to another one of it. Raises OSError, and SealError: it is none any more."""
    fd = os.open(model / path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    # It was looked at before; whoever may write to the folder must not have us read what they could not, or wait for a FIFO.
    # refusal: test_artifact_seal.py::test_a_file_that_leads_out_of_the_folder_when_its_turn_comes_is_refused
    if not (stat.S_ISREG(os.fstat(fd).st_mode) and Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(model)):
        os.close(fd)
        raise _changed(path)
    return fd


def _changed(path: str) -> SealError:
    return SealError(SealProblem.CHANGED, Ident.of_peer(path))


def read_at(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` from `offset` of a file; the bytes read, fewer than its length only at the file's end."""
    done = 0
    while done < len(out) and (got := os.preadv(fd, [out[done:]], offset + done)):
        done += got
    return done


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
