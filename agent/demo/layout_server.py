"""An OCI image layout over HTTP/1.1: the demo's artifact store, as little as an object store must be.

Serves `oci-layout`, `index.json` and blobs, whole or by one byte range, to many connections that stay open. Does not
list, redirect or authenticate, and encrypts only when asked: what is in the layout is ciphertext, and the guest trusts none of
it.

Spec: OCI image-spec 1.1, "Image Layout"; RFC 9110, section 14 (ranges) and 13.1.5 (If-Range).
"""

import http.server
import os
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

_NAMES = re.compile(r"/(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@contextmanager
def serve(layout: Path, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Serve the layout on a free loopback port; gives its URL, and stops at the end.

    Args:
        layout: folder.
        tls: PEM files of certificate and key; None: plain HTTP.
    """

    class Handler(_Handler):
        root = layout

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            # The handshake is the connection's own thread's affair.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def select_range(header: str | None, size: int) -> tuple[HTTPStatus, int, int]:
    """The part of a file that a Range header selects.

    Args:
        header: the value of Range, or None.
        size: bytes in the file.
    Returns:
        206, offset and length of the part; 200 and the whole file when there is no header, or one that is malformed, in
        another unit or with several ranges, as RFC 9110 allows; 416 when nothing of the file is selected.
    """
    whole = (HTTPStatus.OK, 0, size)
    match = _RANGE.fullmatch(header) if header else None
    if match is None:
        return whole
    first, last = match[1], match[2]
    if not first:
        if not last:
            return whole
        offset, end = max(size - int(last), 0), size
    else:
        offset, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < offset:
            return whole
    if offset >= end:
        return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, 0
    return HTTPStatus.PARTIAL_CONTENT, offset, end - offset


class _Handler(http.server.BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"
    server_version = "keyturn-demo"
    sys_version = ""
    timeout = 60
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):  # a guest that stopped in mid-transfer
            super().handle()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not _NAMES.fullmatch(self.path):
            self._not_found()
            return
        try:
            with open(self.root / self.path[1:], "rb") as file:
                self._send(file, with_body)
        except FileNotFoundError:
            self._not_found()

    def _send(self, file: BinaryIO, with_body: bool) -> None:
        size = os.fstat(file.fileno()).st_size
        etag = f'"{self.path}"'  # blobs are named by their digest; the two other files do not change while we serve
        wanted = self.headers["Range"] if self.headers.get("If-Range", etag) == etag else None
        status, offset, length = select_range(wanted, size)
        part = f"{offset}-{offset + length - 1}" if length else "*"
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        if status != HTTPStatus.OK:
            self.send_header("Content-Range", f"bytes {part}/{size}")
        self.end_headers()
        if with_body and length:
            self.connection.sendfile(file, offset, length)

    def _not_found(self) -> None:
        self.send_response(HTTPStatus.NOT_FOUND)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the demo's stderr belongs to the agent's events."""
