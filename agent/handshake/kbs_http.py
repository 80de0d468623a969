"""HTTP to one key broker: one request at a time over one connection that is kept, bounded in time and in bytes.

TLS ends at the measured name under the measured CA; the URL's host is only where to go. Nothing is followed (no redirects),
nothing is taken from the environment, nothing is decompressed. Requests run in threads that always end before
their caller goes on: the deadline and a cancelled caller cut every wait (`http_limited.py`). Knows no message: `rcar.py` does.
"""

import http.client
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import urllib3
import urllib3.exceptions as failed

from agent import __version__, http_policy
from agent.closed import Ident
from agent.errors import (
    AgentError,
    ArtifactUnavailableError,
    BrokerIdentityError,
    BrokerUnreachableError,
    IdentityProblem,
    ProtocolProblem,
    RemoteProtocolError,
    Unreachable,
)
from agent.handshake import rcar
from agent.handshake.broker import tls_error
from agent.handshake.rcar import Answer
from agent.http_limited import ProxyFailedError, limited, pool
from agent.proxy import Proxy
from agent.threads import in_thread

_PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Question:
    """One request.

    Attributes:
        path: from the root, with the query.
        headers: beside those of every request.
        body: JSON, sent by POST; None: a GET.
    """

    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)


class KbsHttp:
    """Not for two requests at a time."""

    def __init__(self, url: str, ca_pem: str | None, server_name: str | None, proxy: Proxy | None = None) -> None:
        """Nothing is connected yet.

        Args:
            url: `https://host[:port]`; `http://…` only where a simulation may.
            ca_pem: the measured CA, PEM; the only roots there are. None with http only.
            server_name: the measured name that the certificate must carry, whatever the URL's host. None with http only.
            proxy: a hint; for https only.
        """
        self._url = urlsplit(url)
        self._ca_pem = ca_pem
        self._server_name = server_name
        self._proxy = proxy
        self._pool: urllib3.HTTPConnectionPool | None = None

    async def ask(self, question: Question, limit_s: float, state: Ident) -> Answer:
        """One request and its answer, whatever its status.

        Args:
            question: as above.
            limit_s: seconds for all of it.
            state: the handshake's, for the error.

        Raises:
            BrokerUnreachableError: no whole answer in time.
            BrokerIdentityError: somebody answered who is not the measured broker.
            RemoteProtocolError: OVERSIZED; MALFORMED where it is not HTTP.
        """
        stop = threading.Event()
        deadline = time.monotonic() + limit_s

        def work() -> Answer | AgentError:
            with limited(deadline, stop):
                return self._ask(question, state)

        answer = await in_thread(work, stop.set)
        if isinstance(answer, AgentError):
            raise answer  # here, where no foreign exception and its text travel with it
        return answer

    def close(self) -> None:
        """Let go of the connection; the next request makes another one."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _ask(self, question: Question, state: Ident) -> Answer | AgentError:
        # A kept connection may have ended while we collected evidence: servers close idle ones within seconds. Every request
        # here may be sent twice: a nonce stays good until it has succeeded, and then the same token comes again.
        kept = self._pool.num_connections if self._pool else 0
        error: AgentError = BrokerUnreachableError(Unreachable.RESET)
        for _ in range(2):
            try:
                return self._exchange(self._connections(), question, state)
            except failed.HTTPError as exc:
                error = _translate(exc, state)
            except AgentError as exc:
                error = exc
            lost = isinstance(error, BrokerUnreachableError) and error.reason is Unreachable.RESET
            if not (lost and self._pool and self._pool.num_connections == kept):
                break
        return error

    def _exchange(self, connections: urllib3.HTTPConnectionPool, question: Question, state: Ident) -> Answer:
        headers = {"User-Agent": f"keyturn/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"}
        if question.body is not None:
            headers["Content-Type"] = "application/json"
        response = connections.urlopen(
            "GET" if question.body is None else "POST",
            question.path,
            body=question.body,
            headers={**headers, **question.headers},
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            return Answer(
                status=response.status,
                body=_bounded(response, state),
                set_cookies=tuple(response.headers.getlist("Set-Cookie")),
                date=response.headers.get("Date"),
                retry_after=response.headers.get("Retry-After"),
            )
        finally:
            # A body that was read to its end has given its connection back; any other ends with it.
            response.close()
            response.release_conn()

    def _connections(self) -> urllib3.HTTPConnectionPool:
        if self._pool is None:
            context = self._tls_context() if self._url.scheme == "https" else None
            assert self._url.hostname is not None, "the configuration checks it"
            self._pool = pool(self._url.hostname, self._url.port, context, 1, self._server_name, self._proxy)
        return self._pool

    def _tls_context(self) -> ssl.SSLContext:
        # refusal: test_tls_without_a_measured_identity_is_a_bug
        if self._ca_pem is None or self._server_name is None:
            raise RuntimeError("https without CA and name: the configuration must not get this far")
        try:
            context = http_policy.tls_context(self._ca_pem)
        except ArtifactUnavailableError:
            raise BrokerIdentityError(IdentityProblem.CHAIN) from None
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: the measured CA need not be self-signed
        return context


def _bounded(response: urllib3.BaseHTTPResponse, state: Ident) -> bytes:
    pieces = []
    left = rcar.MAX_ANSWER_BYTES + 1
    while left and (piece := response.read(min(left, _PIECE_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    # refusal: test_an_answer_above_the_bound_is_not_read
    if not left:
        raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
    return b"".join(pieces)


def _translate(exc: failed.HTTPError, state: Ident) -> AgentError:
    """What urllib3 says as what happened; its texts quote the peer and go no further."""
    inner = exc.args[-1] if exc.args else None
    match exc:
        case failed.SSLError():
            return tls_error(inner) if isinstance(inner, ssl.SSLError) else BrokerIdentityError(IdentityProblem.TLS)
        case ProxyFailedError():
            return BrokerUnreachableError(Unreachable.PROXY, status=exc.status)
        case failed.NameResolutionError() | failed.LocationParseError():
            return BrokerUnreachableError(Unreachable.NAME)
        case failed.NewConnectionError():  # a timeout by descent
            cause = exc.__cause__
            if isinstance(cause, ConnectionRefusedError):
                return BrokerUnreachableError(Unreachable.REFUSED)
            return BrokerUnreachableError(Unreachable.RESET if isinstance(cause, ConnectionResetError) else Unreachable.TIMEOUT)
        case failed.TimeoutError():
            return BrokerUnreachableError(Unreachable.TIMEOUT)
        case failed.ProtocolError():
            # RemoteDisconnected is a ConnectionResetError and an HTTPException; the other HTTPExceptions are no HTTP.
            cut = isinstance(inner, (OSError, http.client.IncompleteRead)) or isinstance(exc, failed.IncompleteRead)
            if cut or not isinstance(inner, http.client.HTTPException):
                return BrokerUnreachableError(Unreachable.RESET)
    return RemoteProtocolError(ProtocolProblem.MALFORMED, state)
