"""A small real HTTP proxy that knows CONNECT, and proxies that do not do what they should.

with ConnectProxy({"kbs.test:8080": port}) as proxy:
    ... proxy.asked  # the targets, in order
"""

import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from agent.proxy import Proxy

Behaviour = Callable[[socket.socket, threading.Event], None]
"""What it does with a connection after the request, in place of a tunnel."""
END_S = 5.0


def answers(data: bytes) -> Behaviour:
    """Says this, and closes."""
    return lambda client, _: client.sendall(data)


def drips(data: bytes) -> Behaviour:
    """A byte now and then, for at most five seconds."""

    def drip(client: socket.socket, done: threading.Event) -> None:
        for byte in data:
            client.sendall(bytes([byte]))
            if done.wait(0.02):
                return

    return drip


def silence(_: socket.socket, done: threading.Event) -> None:
    done.wait(END_S)


class ConnectProxy:
    """On 127.0.0.1 until the `with` block ends.

    Args:
        ports: where each `host:port` really is, on 127.0.0.1; anything else is refused with 403.
        behaviour: in place of that.
        change: what becomes of each piece from the server.
    """

    def __init__(
        self, ports: Mapping[str, int], behaviour: Behaviour | None = None, change: Callable[[bytes], bytes] = bytes
    ) -> None:
        self.requests: list[bytes] = []
        self._ports = ports
        self._behaviour = behaviour
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.proxy = Proxy("127.0.0.1", self._listener.getsockname()[1])
        self._done = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        return f"http://{self.proxy.host}:{self.proxy.port}"

    @property
    def asked(self) -> list[str]:
        return [request.split(b" ")[1].decode() for request in self.requests]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._start(self._serve, client)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, client: socket.socket) -> None:
        self._open.append(client)
        with client, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += (piece := client.recv(4096))
                if not piece:
                    return
            self.requests.append(request)
            if self._behaviour is not None:
                self._behaviour(client, self._done)
                return
            port = self._ports.get(request.split(b" ")[1].decode())
            if port is None:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
                return
            with socket.create_connection(("127.0.0.1", port)) as server:
                self._open.append(server)
                client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
                up = threading.Thread(target=_copy, args=(client, server, bytes), daemon=True)
                up.start()
                _copy(server, client, self._change)
                up.join()


def _copy(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(change(data))
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
