"""An OCI image layout below an http(s) URL, by range requests.

Connections are kept and shared by all threads. urllib3 copies body bytes once on their way into the caller's buffer; the
pieces are small, so that copy stays in the processor's cache and costs nothing that could be measured.
"""

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    NewConnectionError,
    ProtocolError,
    SSLError,
)

from agent import __version__, http_policy
from agent.artifact.sources.directory import blob_path
from agent.artifact.sources.layout import NamedByIndex
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.http_limited import limited, pool

_PIECE_BYTES = 1 << 20
_KEPT_CONNECTIONS = 32
_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:(\d{1,19})|\*)")


class HttpSource(NamedByIndex):
    """As many requests at a time as there are threads; 32 connections are kept.

    A request ends in time, however slowly its bytes come: 1 MiB within a minute is a rate no load could live with.
    """

    def __init__(self, url: str, ca_pem: str | None, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._timeout_s = timeout_s
        context = http_policy.tls_context(ca_pem) if parts.scheme == "https" else None
        self._pool = pool(parts.hostname, parts.port, context, _KEPT_CONNECTIONS)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._read_all(blob_path(digest), max_bytes)

    def read_index(self, max_bytes: int) -> bytes:
        return self._read_all("index.json", max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        with self._get(blob_path(digest), {"Range": f"bytes={offset}-{offset + len(out) - 1}"}) as response:
            if response.status == 416:  # the blob ends before the offset
                return 0
            length = _length_of_part(response, offset, len(out))
            done = 0
            while done < length:
                got = response.readinto(out[done : min(done + _PIECE_BYTES, length)])
                if not got:
                    raise ArtifactUnavailableError(StoreProblem.UNREACHABLE)
                done += got
            return length

    def close(self) -> None:
        self._pool.close()

    def _read_all(self, path: str, max_bytes: int) -> bytes:
        with self._get(path, {}) as response:
            if response.status != 200:
                raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
            pieces = []
            left = max_bytes + 1
            while left and (piece := response.read(min(left, _PIECE_BYTES))):
                pieces.append(piece)
                left -= len(piece)
            # refusal: test_artifact_sources.py::test_a_blob_above_the_bound_is_not_read
            if not left:
                raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
            return b"".join(pieces)

    @contextmanager
    def _get(self, path: str, headers: dict[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer to a GET after redirects: 200, 206 or 416, nothing of the body read yet; the block reads it in time."""
        url = f"{self._url}/{path}"
        headers = {"User-Agent": f"keyturn/{__version__}", "Accept-Encoding": "identity", **headers}
        with _translated(), limited(time.monotonic() + self._timeout_s):
            for followed in range(http_policy.MAX_REDIRECTS + 1):
                response = self._pool.urlopen(
                    "GET",
                    urllib3.util.parse_url(url).request_uri,
                    headers=headers,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
                try:
                    if response.status in _REDIRECTS:
                        url = http_policy.redirect_target(url, response.headers.get("Location"), followed)
                        continue
                    if response.status not in (200, 206, 416):
                        raise ArtifactUnavailableError(http_policy.problem_of_status(response.status), response.status)
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
                    yield response
                    return
                finally:
                    # A body that was read to its end has given its connection back; any other ends with it.
                    response.close()
                    response.release_conn()


def _length_of_part(response: urllib3.BaseHTTPResponse, offset: int, wanted: int) -> int:
    """How many bytes a 206 answer carries: what was asked for, or all that is left of the blob."""
    part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206 or part is None:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
    length = int(part[2]) - int(part[1]) + 1
    expected = min(wanted, int(part[3]) - offset) if part[3] is not None else length
    # refusal: test_artifact_sources.py::test_a_fault_of_the_server_is_one_error_and_the_next_read_works
    if int(part[1]) != offset or not 0 < length <= wanted or length != expected:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
    if response.headers.get("Content-Length", str(length)) != str(length):
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
    return length


@contextmanager
def _translated() -> Iterator[None]:
    """urllib3's exceptions as ours, over the whole life of an answer; their texts quote the peer and go no further."""
    try:
        yield
    except (NewConnectionError, ProtocolError, IncompleteRead):  # NewConnectionError is a ConnectTimeoutError by descent only
        raise ArtifactUnavailableError(StoreProblem.UNREACHABLE) from None
    except urllib3.exceptions.TimeoutError:
        raise ArtifactUnavailableError(StoreProblem.TIMEOUT) from None
    except SSLError as error:
        # A connection that was cut is not a failed handshake.
        cut = error.args and isinstance(error.args[0], (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        raise ArtifactUnavailableError(StoreProblem.UNREACHABLE if cut else StoreProblem.TLS) from None
    except HTTPError:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER) from None
