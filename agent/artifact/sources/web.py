"""Requests to a store over HTTP: in time, bounded, along redirects by one rule, and ranges that are what was asked for.

Connections are kept and shared by all threads. urllib3 copies body bytes once on their way into the caller's buffer; the
pieces are small, so that copy stays in the processor's cache and costs nothing that could be measured. Knows no store's
interface (`http.py`, `oci.py`, `s3.py`) and no rule of its own about hosts (`http_policy.py`).
"""

import io
import re
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    NewConnectionError,
    ProtocolError,
    SSLError,
)

from agent import __version__, http_policy
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.http_limited import ProxyFailedError, limited, pool
from agent.proxy import Proxy

ANSWERS = frozenset((200, 206, 416))
"""What a read can use."""
_PIECE_BYTES = 1 << 18
_KEPT_CONNECTIONS = 32
_MAX_ORIGINS = 16
"""A store names those it redirects to: it must not make us keep ever more of them."""
_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:(\d{1,19})|\*)")


class Body(Protocol):
    """What is sent, as a file has it."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Upload:
    """A body to be sent: `open_body` gives it from its start each time it is called."""

    open_body: Callable[[], Body]
    length: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A request.

    Attributes:
        url: absolute.
        method: of HTTP.
        headers: for whoever answers, redirects included.
        private: credentials, for the origin of `url` only.
        elsewhere: a redirect may leave the origin, as `http_policy.redirect_target` says.
        body: or None.
        timeout_s: seconds from connecting to the last byte, redirects included; None: the client's.
    """

    url: str = field(repr=False)  # its query may be a credential
    method: str = "GET"
    headers: Mapping[str, str] | None = None
    private: Mapping[str, str] | None = field(default=None, repr=False)
    elsewhere: bool = False
    body: Upload | None = None
    timeout_s: float | None = None


class WebClient:
    """As many requests at a time as there are threads; 32 connections to each origin are kept.

    A request ends in time, however slowly its bytes come: 1 MiB within a minute is a rate no load could live with.
    """

    def __init__(self, ca_pem: str | None, timeout_s: float, proxy: Proxy | None = None) -> None:
        """`ca_pem`: the only CAs to trust for https; None: the system's. `timeout_s`: of one request. `proxy`: for https."""
        self._ca_pem = ca_pem
        self._timeout_s = timeout_s
        self._proxy = proxy
        self._pools: dict[http_policy.Origin, urllib3.HTTPConnectionPool] = {}
        self._lock = threading.Lock()

    def open_pool(self, url: str) -> None:
        """Have connections to the origin of a URL. Nothing is connected yet.

        Raises:
            ArtifactUnavailableError: there is no CA to trust (TLS), or no such host can be (BAD_ANSWER).
        """
        self._pool(http_policy.origin(url))

    def _pool(self, origin: http_policy.Origin) -> urllib3.HTTPConnectionPool:
        with self._lock:
            found = self._pools.get(origin)
            if found is None:
                scheme, _, host, port = origin
                if host is None:
                    raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
                context = http_policy.tls_context(self._ca_pem) if scheme == "https" else None
                with _translated():
                    found = pool(host, port, context, _KEPT_CONNECTIONS, proxy=self._proxy)
                if len(self._pools) == _MAX_ORIGINS:
                    # The second: the first one is the store's own. Requests that are under way keep their connections.
                    self._pools.pop(list(self._pools)[1]).close()
                self._pools[origin] = found
            return found

    def close(self) -> None:
        with self._lock:
            for connections in self._pools.values():
                connections.close()

    @contextmanager
    def request(self, ask: Ask, answers: Collection[int] = ANSWERS) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer after redirects, nothing of its body read yet; the block reads it in time.

        Args:
            ask: the request.
            answers: the statuses that the block can use.

        Raises:
            ArtifactUnavailableError: no answer, or another one.
        """
        url = ask.url
        home = here = http_policy.origin(url)
        timeout_s = self._timeout_s if ask.timeout_s is None else ask.timeout_s
        with _translated(), limited(time.monotonic() + timeout_s):
            for followed in range(http_policy.MAX_REDIRECTS + 1):
                private = ask.private
                # refusal: test_artifact_sources_oci.py::test_credentials_never_follow_a_redirect_to_another_origin
                if here != home:
                    private = None
                response = self._send(ask, url, here, private)
                try:
                    if response.status in _REDIRECTS and response.status not in answers:
                        location = response.headers.get("Location")
                        url = http_policy.redirect_target(url, location, followed, elsewhere=ask.elsewhere)
                        here = http_policy.origin(url)
                        continue
                    # refusal: test_artifact_sources.py::test_a_fault_of_the_server_is_one_error_and_the_next_read_works
                    if response.status not in answers:
                        raise ArtifactUnavailableError(http_policy.problem_of_status(response.status), response.status)
                    # refusal: test_artifact_sources.py::test_a_fault_of_the_server_is_one_error_and_the_next_read_works
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
                    # refusal: test_artifact_sources_oci.py::test_a_401_of_the_storage_behind_a_redirect_gets_no_credentials
                    if response.status == 401 and here != home:
                        raise ArtifactUnavailableError(StoreProblem.REFUSED, response.status)
                    yield response
                    return
                finally:
                    # A body that was read to its end has given its connection back; any other ends with it.
                    response.close()
                    response.release_conn()

    def _send(
        self, ask: Ask, url: str, origin: http_policy.Origin, private: Mapping[str, str] | None
    ) -> urllib3.BaseHTTPResponse:
        headers = {
            "User-Agent": f"keyturn/{__version__}",
            "Accept-Encoding": "identity",
            **(ask.headers or {}),
            **(private or {}),
        }
        body = None
        if ask.body is not None:
            body = ask.body.open_body()
            headers["Content-Length"] = str(ask.body.length)
        try:
            return self._pool(origin).urlopen(
                ask.method,
                urllib3.util.parse_url(url).request_uri,
                body=body,  # type: ignore[arg-type]  # it reads, and closes, and nothing else
                headers=headers,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        finally:
            if body is not None:
                body.close()


def range_header(offset: int, out: memoryview) -> dict[str, str]:
    """What asks for as many bytes as `out` holds, from `offset`."""
    return {"Range": f"bytes={offset}-{offset + len(out) - 1}"}


def read_part(response: urllib3.BaseHTTPResponse, offset: int, out: memoryview) -> int:
    """The answer to `range_header` into `out`: the bytes that are there.

    Raises:
        ArtifactUnavailableError: it is another part, or none, or it was cut off.
    """
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


def read_whole(response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    """A whole body. Raises ArtifactUnavailableError: it is a part, or longer than `max_bytes`."""
    if response.status in (206, 416):
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
    whole = io.BytesIO()  # gives its bytes away without a copy
    while whole.tell() <= max_bytes and (piece := response.read(min(max_bytes + 1 - whole.tell(), _PIECE_BYTES))):
        whole.write(piece)
    # refusal: test_artifact_sources.py::test_a_blob_above_the_bound_is_not_read
    if whole.tell() > max_bytes:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER, response.status)
    return whole.getvalue()


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
    except ProxyFailedError as error:
        raise ArtifactUnavailableError(StoreProblem.PROXY, error.status) from None
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
