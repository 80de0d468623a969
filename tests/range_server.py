"""A small real HTTP server over a folder, with range requests, and with one fault if asked for.

with RangeServer(layout) as server:
    open_source(server.url, None, 5)
"""

import contextlib
import datetime
import enum
import http.server
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Fault(enum.Enum):
    NONE = enum.auto()
    NO_RANGES = enum.auto()  # 200 and the whole file
    WRONG_START = enum.auto()  # Content-Range and bytes one further on
    WRONG_LENGTH = enum.auto()  # Content-Range shorter than asked, in the middle of the file
    LONGER_RANGE = enum.auto()  # Content-Range and body one byte longer than asked, the size of the file left open
    LONGER_BODY = enum.auto()  # Content-Length beyond Content-Range
    NO_CONTENT_RANGE = enum.auto()
    OTHER_OBJECT = enum.auto()  # the bytes of another object of the same size
    MULTIPART = enum.auto()  # the range as multipart/byteranges
    GZIP = enum.auto()  # says Content-Encoding: gzip
    CUT = enum.auto()  # closes in the middle of the body
    CUT_CHUNKED = enum.auto()  # a chunked body that ends early and cleanly
    CHUNKED = enum.auto()  # a chunked body that is complete: no fault
    SLOW = enum.auto()  # a tenth of a second for each range: no fault
    SILENT = enum.auto()  # takes the request and never answers
    DRIP_HEAD = enum.auto()  # one byte of a header now and then
    DRIP_BODY = enum.auto()  # one byte of a range now and then
    DRIP_CHUNKS = enum.auto()  # the same, each a chunk
    CONTINUE = enum.auto()  # 100, and again, and again
    GARBAGE = enum.auto()  # not HTTP
    NOT_FOUND = enum.auto()
    FORBIDDEN = enum.auto()
    BROKEN = enum.auto()  # 500
    TEAPOT = enum.auto()  # 418
    REDIRECT_HERE = enum.auto()  # one redirect on the same origin: no fault
    REDIRECT_LOOP = enum.auto()
    REDIRECT_AWAY = enum.auto()  # to another port
    REDIRECT_NOWHERE = enum.auto()  # without Location


DRIP_S = 3.0
"""A store that drips then cuts the connection, so that who waits for it fails and does not hang."""
_STATUS = {Fault.NOT_FOUND: 404, Fault.FORBIDDEN: 403, Fault.BROKEN: 500, Fault.TEAPOT: 418}


class RangeServer:
    """Serves `root` on 127.0.0.1 until the `with` block ends.

    Args:
        root: folder.
        fault: how `faulty_answers` answers are wrong; all others are right.
        faulty_answers: how many.
        good_answers: how many come before them.
        certificate: PEM file with certificate and key; the server then speaks TLS.
    """

    def __init__(
        self,
        root: Path,
        fault: Fault = Fault.NONE,
        faulty_answers: int = 1 << 30,
        certificate: Path | None = None,
        good_answers: int = 0,
    ) -> None:
        self.requests: list[tuple[str, str | None]] = []  # path and Range header of every request, in order
        self.connections = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with outer._lock:
                    outer.connections += 1

            def do_GET(self) -> None:
                with outer._lock:
                    outer.requests.append((self.path, self.headers["Range"]))
                    number = len(outer.requests) - good_answers
                    now = fault if 0 < number <= faulty_answers else Fault.NONE
                _answer(self, root, now, outer._done)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
            scheme = "https"
        self.port = self._server.server_address[1]
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._server.shutdown()
        self._thread.join()
        for connection in self._server.accepted:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self._server.server_close()  # joins the threads of the connections


def make_certificate(folder: Path) -> tuple[Path, str]:
    """A certificate for 127.0.0.1 that is its own CA: PEM file with its key for the server, PEM text for clients."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "range server of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(certificate + private)
    return path, certificate.decode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def server_activate(self) -> None:
        self.accepted: list[socket.socket] = []
        super().server_activate()

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.accepted.append(connection)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients of these tests go away on purpose


def _answer(handler: http.server.BaseHTTPRequestHandler, root: Path, fault: Fault, done: threading.Event) -> None:
    if fault in _STATUS:
        return _head(handler, _STATUS[fault], {"Content-Length": "0"})
    if fault is Fault.SLOW and handler.headers["Range"]:
        done.wait(0.1)
    if fault is Fault.SILENT:
        done.wait(30)
        handler.close_connection = True
        return None
    if fault is Fault.GARBAGE:
        handler.wfile.write(b"\x00garbage\r\n\r\n")
        handler.close_connection = True
        return None
    if fault is Fault.DRIP_HEAD:
        return _drip(handler, (bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000), done)
    if fault is Fault.CONTINUE:
        return _drip(handler, [b"HTTP/1.1 100 Continue\r\n\r\n"] * 10_000, done)
    port = handler.connection.getsockname()[1]
    here = handler.path.startswith("/moved")
    if fault is Fault.REDIRECT_LOOP or (fault is Fault.REDIRECT_HERE and not here):
        return _head(handler, 307, {"Location": f"/moved{handler.path}", "Content-Length": "0"})
    if fault is Fault.REDIRECT_AWAY:
        return _head(handler, 307, {"Location": f"http://127.0.0.1:{port + 1}{handler.path}", "Content-Length": "0"})
    if fault is Fault.REDIRECT_NOWHERE:
        return _head(handler, 307, {"Content-Length": "0"})
    _send_file(handler, root / handler.path.partition("?")[0].removeprefix("/moved").lstrip("/"), fault, done)


def _drip(handler: http.server.BaseHTTPRequestHandler, pieces: Iterable[bytes], done: threading.Event) -> None:
    handler.close_connection = True
    end = time.monotonic() + DRIP_S
    for piece in pieces:
        handler.wfile.write(piece)
        if done.wait(0.02) or time.monotonic() >= end:
            return


def _send_file(handler: http.server.BaseHTTPRequestHandler, path: Path, fault: Fault, done: threading.Event) -> None:
    try:
        stream = path.open("rb")
    except OSError:
        return _head(handler, 404, {"Content-Length": "0"})
    with stream:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"] or "")
        headers = {}
        start, length = 0, size
        if asked and fault is not Fault.NO_RANGES:
            start = int(asked[1])
            if start >= size:
                return _head(handler, 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            length = min(int(asked[2]) + 1, size) - start
            if fault is Fault.WRONG_LENGTH:
                length //= 2
            start += fault is Fault.WRONG_START
            length += fault is Fault.LONGER_RANGE
            if fault is Fault.MULTIPART:
                headers["Content-Type"] = "multipart/byteranges; boundary=x"
            elif fault is not Fault.NO_CONTENT_RANGE:
                headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{'*' if fault is Fault.LONGER_RANGE else size}"
        if fault is Fault.GZIP:
            headers["Content-Encoding"] = "gzip"
        chunked = fault in (Fault.CHUNKED, Fault.CUT_CHUNKED, Fault.DRIP_CHUNKS)
        headers |= {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(length)}
        if fault is Fault.LONGER_BODY:
            length += 1
            headers["Content-Length"] = str(length)
        _head(handler, 206 if asked and fault is not Fault.NO_RANGES else 200, headers)
        if fault in (Fault.CUT, Fault.CUT_CHUNKED):
            length //= 2
            handler.close_connection = fault is Fault.CUT
        if asked and fault in (Fault.DRIP_BODY, Fault.DRIP_CHUNKS):
            stream.seek(start)
            form = b"1\r\n%b\r\n" if chunked else b"%b"
            _drip(handler, (form % bytes([byte]) for byte in stream.read(length)), done)
        elif asked and fault in (Fault.OTHER_OBJECT, Fault.MULTIPART):
            stream.seek(start)
            data = stream.read(length)
            handler.wfile.write(data if fault is Fault.MULTIPART else bytes(byte ^ 1 for byte in data))
        elif chunked:
            stream.seek(start)
            handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (length, stream.read(length)))
        else:
            handler.wfile.flush()
            handler.connection.sendfile(stream, start, length)


def _head(handler: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
