"""The HTTP side of the test KBS, with the manners and limits of Trustee's web server (actix-web 4).

HTTP/1.1, keep-alive, a thread for each connection, TLS where a certificate is given. Header names go out in lower case, there
is no `server` header, a request head has 128 KiB, a body 2 MiB; what exceeds them or cannot be read gets no JSON. How answers
are broken on the wire is `trustee_faults.py`'s business. Knows nothing of KBS messages; refuses chunked requests, which no
client of this protocol sends.
"""

import re
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any

from agent.sim.trustee_knobs import Fault

MAX_HEAD_BYTES = 128 << 10
MAX_BODY_BYTES = 2 << 20
"""Trustee's `payload_request_size`, by default."""
IDLE_S = 60.0
_DRAIN_S = 2.0
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request, read.

    Attributes:
        headers: names in lower case; of a repeated one the last.
        connection: the number of its connection, from 1.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        fault: how it is broken on the wire; None: not at all.
    """

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    fault: Fault | None = None

    def head(self, *more: str, length: int | None = None) -> bytes:
        """Status line and headers; `length` where the body is not what it says."""
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines.append(f"content-length: {len(self.body) if length is None else length}")
        if self.content_type is not None:
            lines.append(f"content-type: {self.content_type}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, f"date: {formatdate(usegmt=True)}", *more, "", ""]).encode("latin-1")


class Unreadable(Exception):
    """What came is no request that this server takes; `status` is what it says before it hangs up."""

    def __init__(self, status: int, text: bytes = b"") -> None:
        super().__init__(status)
        self.response = Response(status, text, "text/plain; charset=utf-8" if text else None)


class HttpServer(socketserver.ThreadingTCPServer):
    """Listens from construction on, serves between `start` and `stop`.

    Args:
        address: host and port; port 0 for any.
        tls: certificate chain and key, PEM.
        answer: makes an answer; called by many threads.
        break_answer: sends a response that carries a fault; afterwards the connection ends.
    """

    allow_reuse_address = True
    daemon_threads = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        tls: tuple[bytes, bytes] | None,
        answer: Callable[[Request], Response],
        break_answer: Callable[[socket.socket, Response, threading.Event], None],
    ) -> None:
        self.answer, self.break_answer = answer, break_answer
        self.stopping = threading.Event()
        self._crash: BaseException | None = None
        self._tls = None if tls is None else _server_context(*tls)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._accepted = 0
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Connection)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="test-kbs")

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"{'http' if self._tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every connection, wait for their threads; raise what one of them died of."""
        self.stopping.set()
        self.shutdown()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not SSLSocket's, which would wait for the peer
        self.server_close()
        self._thread.join()
        if self._crash is not None:
            raise self._crash

    def take(self, raw: socket.socket) -> tuple[socket.socket, int]:
        """The socket to talk over, known to `stop`, and its number; the handshake is still to be made."""
        wrapped = raw if self._tls is None else self._tls.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._connections.add(wrapped)
            self._accepted += 1
            if self.stopping.is_set():  # too late for `stop` to find it among the others
                wrapped.close()
            return wrapped, self._accepted

    def release(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def shutdown_request(self, request: Any) -> None:
        """Nothing: the connection's thread has closed what it made of the socket."""

    def handle_error(self, request: object, client_address: object) -> None:
        self._crash = sys.exception()


class _Connection(socketserver.BaseRequestHandler):
    server: HttpServer

    def handle(self) -> None:
        raw: socket.socket = self.request
        with raw, suppress(OSError):  # a peer that goes away, or does not like our certificate, is its own business
            raw.settimeout(IDLE_S)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection, number = self.server.take(raw)
            try:
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                self._serve(connection, _Reader(connection, number))
            finally:
                self.server.release(connection)

    def _serve(self, connection: socket.socket, reader: "_Reader") -> None:
        while not self.server.stopping.is_set():
            try:
                request = reader.request()
            except Unreadable as exc:
                connection.sendall(exc.response.head("connection: close") + exc.response.body)
                _drain(connection)
                return
            if request is None:
                return
            response = self.server.answer(request)
            if response.fault is not None:
                self.server.break_answer(connection, response, self.server.stopping)
                return
            close = request.headers.get("connection", "").lower() == "close"
            head = response.head(*(("connection: close",) if close else ()))
            connection.sendall(head + (b"" if request.method == "HEAD" else response.body))
            if close:
                return


class _Reader:
    """Requests, one after another, from a connection."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self._connection = connection
        self._number = number
        self._buffer = b""

    def request(self) -> Request | None:
        """The next one; None at the end of the stream. Raises Unreadable, OSError."""
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise Unreadable(431)
            chunk = self._connection.recv(1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise Unreadable(431)
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or words[0] not in _METHODS or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
            raise Unreadable(400)
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise Unreadable(400)
            headers[name.lower()] = value.strip()
        if words[2] == "HTTP/1.0":
            headers["connection"] = "close"
        path, _, query = words[1].partition("?")
        return Request(words[0], path, query, headers, self._body(headers), self._number)

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if "transfer-encoding" in headers:
            raise Unreadable(400)
        text = headers.get("content-length", "0")
        if not text.isascii() or not text.isdigit():
            raise Unreadable(400)
        length = int(text)
        if length > MAX_BODY_BYTES:
            raise Unreadable(413, b"payload reached size limit")
        if headers.get("expect", "").lower() == "100-continue":
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts, missing = [self._buffer[:length]], length - len(self._buffer[:length])
        self._buffer = self._buffer[length:]
        while missing:
            chunk = self._connection.recv(min(missing, 1 << 16))
            if not chunk:
                raise Unreadable(400)
            parts.append(chunk)
            missing -= len(chunk)
        return b"".join(parts)


def _drain(connection: socket.socket) -> None:
    """Take what the peer still sends, for a while: a reset would cost it the answer."""
    connection.settimeout(_DRAIN_S)
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)
        while socket.socket.recv(connection, 1 << 16):
            pass


def _server_context(certificate_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.TemporaryDirectory(prefix="test-kbs-") as folder:  # the ssl module reads keys from files only
        path = Path(folder, "tls.pem")
        path.write_bytes(certificate_pem + b"\n" + key_pem)
        context.load_cert_chain(path)
    return context


def parse_query(text: str) -> dict[str, str] | None:
    """The last value of each name; None: a percent sign or the bytes it stands for are not right."""
    try:
        if _PERCENT.search(text):
            return None
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError:
        return None
