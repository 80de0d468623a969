"""HTTP connections on which a thread waits no longer than it has time, whatever the other side does.

urllib3's timeouts start anew with every byte, so that a peer which sends one now and then would hold a thread for years, past
every deadline and past SIGTERM. Here every wait for the network (connect, TLS handshake, request, headers, body) is cut into
slices, and before each of them the thread's deadline and its event to stop are looked at. Without a bound of ours is only the
C library's resolver, which gives up by its own rules (resolv.conf(5), `timeout` and `attempts`). Sends no requests, but to
a proxy the one for a connection.
"""

import http.client
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from errno import EINPROGRESS
from threading import Event
from typing import Any, NamedTuple, TypeVar

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, LocationParseError, NameResolutionError, NewConnectionError
from urllib3.util import wait_for_write

from agent.proxy import MAX_ANSWER_BYTES, Proxy, pack_connect, parse_connect_answer

STALL_S = 20.0
"""How long a connection may say nothing at all: then the request fails, and whoever asks again gets another connection."""
SLICE_S = 0.25
"""How late a wait may end. The timeout of every socket here, set once: each setting is a system call."""

_T = TypeVar("_T")


class _Limit(NamedTuple):
    deadline: float
    stop: Event
    stall_slices: int


# A variable of the context, no argument: between a request and its sockets lie urllib3, http.client and ssl.
_NO_LIMIT = _Limit(math.inf, Event(), round(STALL_S / SLICE_S))
_limit: ContextVar[_Limit] = ContextVar("limit", default=_NO_LIMIT)


@contextmanager
def limited(deadline: float, stop: Event | None = None, stall_s: float | None = None) -> Iterator[None]:
    """Within the block, every wait of this thread's connections is a timeout after `deadline` and after `stop`.

    Args:
        deadline: on the monotonic clock, in seconds; that of a block around this one counts too.
        stop: or None: that of the block around this one.
        stall_s: how long a connection may be silent; None: that of the block around this one, at last `STALL_S`.
    """
    outer = _limit.get()
    stall_slices = outer.stall_slices if stall_s is None else max(1, round(stall_s / SLICE_S))
    token = _limit.set(_Limit(min(deadline, outer.deadline), stop or outer.stop, stall_slices))
    try:
        yield
    finally:
        _limit.reset(token)


def pool(
    host: str,
    port: int | None,
    context: ssl.SSLContext | None,
    kept: int,
    server_name: str | None = None,
    proxy: Proxy | None = None,
) -> urllib3.HTTPConnectionPool:
    """A pool of such connections, safe for any number of threads; urllib3's timeouts mean nothing to it.

    Args:
        host: name or address, IPv6 without brackets.
        port: or None: the scheme's.
        context: for https, changed for this use; None: http.
        kept: connections that are kept for later.
        server_name: that the certificate must carry, whatever `host` is; None: `host`.
        proxy: through which https goes, if that is its affair.
    """
    timeout = urllib3.Timeout(connect=SLICE_S, read=SLICE_S)
    if context is None:
        return _Pool(host, port, timeout, kept)
    context.sslsocket_class = _TlsSocket
    through = proxy if proxy and proxy.for_server("https", host.strip("[]")) else None
    return _TlsPool(host, port, timeout, kept, ssl_context=context, server_hostname=server_name, through=through)


def _time_left() -> float:
    """Seconds, more than 0, or TimeoutError. Called for every 16 KiB of a TLS stream, so that each call in it counts."""
    deadline, stop, _ = _limit.get()
    left_s = deadline - time.monotonic()
    if left_s <= 0 or stop.is_set():
        raise TimeoutError
    return left_s


def _in_slices(wait: Callable[..., _T], *arguments: Any) -> _T:
    for _ in range(_limit.get().stall_slices):
        _time_left()
        try:
            return wait(*arguments)
        except TimeoutError:  # the slice is over; a connection that is over says something else next time
            continue
    raise TimeoutError  # stalled: a new connection may do better


def _sent(send: Callable[..., int], *arguments: Any) -> int:
    try:
        return _in_slices(send, *arguments)
    except TimeoutError as error:  # urllib3 knows none while it sends, and would call it a lost connection
        raise urllib3.exceptions.TimeoutError from error


class _Socket(socket.socket):
    def recv_into(self, *arguments: Any) -> int:
        return _in_slices(super().recv_into, *arguments)

    def sendall(self, data: Any, flags: int = 0) -> None:  # socket's own counts all of it against one slice
        rest = memoryview(data)
        while rest:
            rest = rest[_sent(super().send, rest, flags) :]


class _TlsSocket(ssl.SSLSocket):
    """OpenSSL goes on where a slice ended, in the middle of a record or of the handshake."""

    def do_handshake(self, block: bool = False) -> None:
        _in_slices(super().do_handshake, block)

    def recv_into(self, *arguments: Any) -> int:
        return _in_slices(super().recv_into, *arguments)

    def send(self, *arguments: Any) -> int:  # what ssl's sendall calls
        return _sent(super().send, *arguments)


def _connect(connection: HTTPConnection) -> _Socket:
    """A connected socket, or the exceptions of urllib3's method of which this takes the place."""
    return _connect_to_host(connection, connection._dns_host, connection.port)


def _connect_to_host(connection: HTTPConnection, host: str, port: int) -> _Socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NameResolutionError(host, connection, error) from error
    except UnicodeError as error:
        raise LocationParseError(host) from error
    problem: OSError | None = None
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        try:
            # Each gets its part of the time: an address that leads nowhere leaves some for the next.
            timeout_s = _time_left() / (len(addresses) - tried)
            return _connect_to(_Socket(family, kind, protocol), address, timeout_s)
        except OSError as error:
            problem = error
    if isinstance(problem, TimeoutError):
        raise ConnectTimeoutError(connection, str(problem)) from problem
    raise NewConnectionError(connection, str(problem)) from problem


def _connect_to(connection: _Socket, address: Any, timeout_s: float) -> _Socket:
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        deadline = time.monotonic() + timeout_s
        code = connection.connect_ex(address)
        if code == EINPROGRESS:
            while not wait_for_write(connection, SLICE_S):
                _time_left()
                if time.monotonic() >= deadline:
                    raise TimeoutError
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        connection.settimeout(SLICE_S)
        return connection
    except BaseException:
        connection.close()
        raise


class _Answer(http.client.HTTPResponse):
    """Where Python takes "-1" for the size of a chunk, it reads whatever comes, without a bound."""

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        # refusal: test_artifact_sources.py::test_a_chunk_of_less_than_nothing_does_not_read_without_end
        if size < 0:
            raise ValueError("less than nothing")  # as http.client does for what is no number
        return size


class _Connection(HTTPConnection):
    response_class = _Answer
    _new_conn = _connect


class ProxyFailedError(NewConnectionError):
    """The proxy is not there, or does not connect us. `status`: its answer's; 0: it gave none that is one."""

    def __init__(self, connection: HTTPConnection, status: int) -> None:
        super().__init__(connection, "proxy")
        self.status = status


class _TlsConnection(HTTPSConnection):
    response_class = _Answer

    def __init__(self, *arguments: Any, through: Proxy | None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._through = through

    def _new_conn(self) -> socket.socket:
        # Before urllib3 sees the socket: to it, and to TLS, the peer is the server and nobody else.
        return _connect(self) if self._through is None else _connect_through(self, self._through)


def _connect_through(connection: HTTPConnection, proxy: Proxy) -> socket.socket:
    """A socket at whose other end the proxy has put the server, it says. Raises urllib3's exceptions."""
    try:
        request = pack_connect(connection._dns_host.rstrip("."), connection.port)
    except ValueError as error:
        raise LocationParseError(connection._dns_host) from error
    try:
        made = _connect_to_host(connection, proxy.host, proxy.port)
    except urllib3.exceptions.HTTPError as error:
        raise ProxyFailedError(connection, 0) from error
    try:
        made.sendall(request)
        status = _answer_of_proxy(made)
    except (OSError, ValueError, urllib3.exceptions.TimeoutError) as error:
        made.close()
        raise ProxyFailedError(connection, 0) from error
    except BaseException:
        made.close()
        raise
    # refusal: test_proxy.py::test_a_proxy_that_does_not_connect_is_told_with_its_status
    if status >= 300:
        made.close()
        raise ProxyFailedError(connection, status)
    return made


def _answer_of_proxy(made: _Socket) -> int:
    """Raises OSError, TimeoutError included, and ValueError."""
    data, piece = bytearray(), bytearray(MAX_ANSWER_BYTES)
    while (status := parse_connect_answer(bytes(data))) is None:
        size = made.recv_into(piece)
        if not size:
            raise ConnectionResetError
        data += piece[:size]
    return status


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
