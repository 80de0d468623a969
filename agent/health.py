"""The health port: `/livez`, `/readyz`, `/status`, `/receipt` over plain HTTP, in the supervisor's loop; or at a path.

Owns sockets and bounds; the answers are `BootReport.health`. One short request, one short answer, then the end; no
keep-alive, at most 16 callers at a time. Standard library only, because the supervisor imports it.
"""

import errno
import os
import selectors
import socket
import time
from contextlib import suppress

from agent.report import BootReport

MAX_CALLERS = 16
MAX_REQUEST_BYTES = 2048
CALLER_TIMEOUT_S = 5.0
SMALL_ANSWER_BYTES = 8 << 10
"""Any socket buffer takes this at once. A receipt asks for room."""
RECEIPT_TYPE = 'application/cose; cose-type="cose-sign1"'
_REASONS = {200: "OK", 404: "Not Found", 503: "Service Unavailable", 400: "Bad Request"}


def listen(address: tuple[str, int]) -> socket.socket:
    """Raises OSError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=both)


class WaitSocket:
    """A unix socket whose path appears when it is shown, already listening: for whoever started us and waits for it."""

    def __init__(self, path: str) -> None:
        """Listens, where nobody looks. Raises OSError: no such folder, too long, or something is there already."""
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "wait socket")
        self._path, self._hidden = path, f"{path}.{os.urandom(4).hex()}"
        self._ours = [self._hidden]
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            self.listener.bind(self._hidden)
            self.listener.listen()
        except OSError:
            self.listener.close()
            raise

    def show(self) -> None:
        """Once. Raises OSError: somebody has taken the path meanwhile."""
        os.link(self._hidden, self._path)  # a rename would take it from them
        self._ours.append(self._path)
        os.unlink(self._hidden)

    def remove(self) -> None:
        """For the end: nobody listens there any more."""
        for path in self._ours:
            with suppress(FileNotFoundError):
                os.unlink(path)


class HealthPort:
    """Answers whoever calls at a listening socket, from construction on."""

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector, report: BootReport) -> None:
        self._selector = selector
        self._report = report
        self._callers: dict[socket.socket, tuple[float, bytearray]] = {}
        self._listener = listener
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._on_call)

    def _on_call(self) -> None:
        now = time.monotonic()
        for caller, (since, _) in list(self._callers.items()):
            if now - since > CALLER_TIMEOUT_S:
                self._hang_up(caller)
        with suppress(OSError):
            caller, _ = self._listener.accept()
            if len(self._callers) >= MAX_CALLERS:
                self._hang_up(next(iter(self._callers)))  # the oldest: idle callers must not keep others out
            caller.setblocking(False)
            self._callers[caller] = (now, bytearray())
            self._selector.register(caller, selectors.EVENT_READ, lambda: self._on_request(caller))

    def _on_request(self, caller: socket.socket) -> None:
        _, request = self._callers[caller]
        try:
            chunk = caller.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        request += chunk
        if chunk and b"\r\n\r\n" not in request and len(request) <= MAX_REQUEST_BYTES:
            return
        words = bytes(request.split(b"\r\n", 1)[0]).split(b" ")
        if b"\r\n\r\n" in request and len(words) == 3 and words[0] in (b"GET", b"HEAD"):
            status, body = self._report.health(words[1].decode("latin-1"))
        else:
            status, body = 400, "bad request\n"
        if isinstance(body, str):
            kind = "application/json" if body.startswith("{") else "text/plain"
            body = body.encode()
        else:
            kind = RECEIPT_TYPE
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n"
        answer = head.encode() + (b"" if words[0] == b"HEAD" else body)
        with suppress(OSError):  # a caller that does not read gets what its socket buffer takes
            if len(answer) > SMALL_ANSWER_BYTES:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(answer))
            caller.send(answer)
        self._hang_up(caller)

    def _hang_up(self, caller: socket.socket) -> None:
        del self._callers[caller]
        self._selector.unregister(caller)
        caller.close()
