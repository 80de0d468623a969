"""An OCI image layout in a folder: a volume, a virtiofs share, a provider's disk."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from agent.artifact.sources.layout import NamedByIndex
from agent.errors import ArtifactUnavailableError, StoreProblem

_PROBLEMS = {
    errno.ENOENT: StoreProblem.NOT_FOUND,
    errno.ENOTDIR: StoreProblem.NOT_FOUND,
    errno.EACCES: StoreProblem.REFUSED,
    errno.EPERM: StoreProblem.REFUSED,
    errno.ELOOP: StoreProblem.BAD_ANSWER,  # a link
    errno.ENXIO: StoreProblem.BAD_ANSWER,  # a socket
    errno.ETIMEDOUT: StoreProblem.TIMEOUT,
}


class DirectorySource(NamedByIndex):
    """Opens a blob for each read: a few microseconds beside a MiB, and nothing to keep or to run out of.

    No deadline and no cancellation ends a read that the kernel has begun: where the folder is a network file system whose
    server hangs, only its mount options (such as NFS `soft`) do.
    """

    def __init__(self, path: str) -> None:
        try:
            self._root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise _unavailable(error) from error

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._read_all(blob_path(digest), max_bytes)

    def read_index(self, max_bytes: int) -> bytes:
        return self._read_all("index.json", max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        with self._opened(blob_path(digest)) as fd:
            done = 0
            while done < len(out) and (got := os.preadv(fd, [out[done:]], offset + done)):
                done += got
            return done

    def close(self) -> None:
        os.close(self._root)

    def _read_all(self, path: str, max_bytes: int) -> bytes:
        with self._opened(path) as fd, open(fd, "rb", closefd=False) as stream:
            data = stream.read(max_bytes + 1)
        # refusal: test_artifact_sources.py::test_a_blob_above_the_bound_is_not_read
        if len(data) > max_bytes:
            raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
        return data

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        try:
            # The folder may be the host's: a blob is no link, and nobody waits for a FIFO's other end. A folder on the way may
            # be a link: it leads to a file at most, of a name that the host does not choose, and that does not authenticate.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=self._root)
            try:
                # refusal: test_artifact_sources.py::test_a_blob_that_is_no_file_is_refused_and_never_waited_for
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise _unavailable(error) from error


def blob_path(name: str) -> str:
    """Where it lies below the root: a blob `sha256:…` as in every layout, `file:…` at that clean path (`kserve.py`)."""
    algorithm, _, value = name.partition(":")
    return value if algorithm == "file" else f"blobs/{algorithm}/{value}"


def _unavailable(error: OSError | ValueError) -> ArtifactUnavailableError:
    code = error.errno or 0 if isinstance(error, OSError) else errno.EINVAL
    return ArtifactUnavailableError(_PROBLEMS.get(code, StoreProblem.SERVER_ERROR), code)
