"""A network that does what a test tells it: everything below gRPC that can lie between guest and broker.

Every server listens on a port of its own, on the loopback, and yields `host:port`; `hostile_broker.in_thread` runs one beside
a test.
"""

import asyncio
import contextlib
import enum
import socket
import ssl
import struct
import tempfile
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

DRIP_S = 0.05
_CHUNK = 1 << 14

Answer = Callable[[StreamReader, StreamWriter], Awaitable[None]]


class Wire(enum.Enum):
    """What becomes of the bytes that a broker behind it sends to the guest."""

    RESET = enum.auto()  # the connection is reset after them
    CLOSE = enum.auto()  # it is closed after them
    FREEZE = enum.auto()  # it stays open and nothing more comes
    DRIP = enum.auto()  # from there on they come one by one
    FLIP = enum.auto()  # the next one is altered


class Stranger(enum.Enum):
    """Who answers instead, whatever is said."""

    SILENCE = b""
    HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\ncanary-peer-text"
    SSH = b"SSH-2.0-canary-peer-text\r\n"
    ZEROS = bytes(1 << 16)
    TLS_ALERT = b"\x15\x03\x03\x00\x02\x02\x28"  # handshake_failure
    TLS_ENDLESS_RECORD = b"\x16\x03\x03\x40\x00\x02\xff\xff\xff"  # a ServerHello of 16 MiB, never sent to its end


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "{}:{}".format(*probe.getsockname())


@contextmanager
def never_accepted() -> Iterator[str]:
    """A port whose queue is full: a SYN gets no answer, as behind a firewall that drops."""
    with socket.socket() as listener, contextlib.ExitStack() as undo:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            client = undo.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname())


def stranger(kind: Stranger) -> contextlib.AbstractAsyncContextManager[str]:
    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(kind.value)
        while await reader.read(_CHUNK):
            pass

    return _listening(answer)


def reset_at_once() -> contextlib.AbstractAsyncContextManager[str]:
    async def answer(_: StreamReader, writer: StreamWriter) -> None:
        _reset(writer)

    return _listening(answer)


def proxy(upstream: str, wire: Wire, after: int) -> contextlib.AbstractAsyncContextManager[str]:
    """Passes everything on to `upstream`, and the answers for `after` bytes; what then happens says `wire`."""

    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        host, _, port = upstream.rpartition(":")
        broker_reader, broker_writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as work:
                work.create_task(_pass_on(reader, broker_writer))
                work.create_task(_spoil(broker_reader, writer, wire, after))
        finally:
            broker_writer.transport.abort()

    return _listening(answer)


def tls_server(pair: tuple[bytes, bytes], answer: Answer, *protocols: str) -> contextlib.AbstractAsyncContextManager[str]:
    """A TLS server that is no gRPC server; `protocols` are what it offers by ALPN."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(pair))
        file.flush()
        context.load_cert_chain(file.name)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return _listening(answer, context)


async def _pass_on(reader: StreamReader, writer: StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()


async def _spoil(reader: StreamReader, writer: StreamWriter, wire: Wire, after: int) -> None:
    while data := await reader.read(_CHUNK):
        whole, rest, after = data[:after], data[after:], after - len(data[:after])
        writer.write(whole)
        await writer.drain()
        if not rest and after:
            continue
        match wire:
            case Wire.RESET:
                return _reset(writer)
            case Wire.CLOSE:
                return writer.close()
            case Wire.FREEZE:
                await asyncio.Event().wait()
            case Wire.DRIP:
                for byte in rest:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(DRIP_S)
            case Wire.FLIP:
                if rest:
                    writer.write(bytes([rest[0] ^ 1]) + rest[1:])
                    after = 1 << 62


def _reset(writer: StreamWriter) -> None:
    """Close with RST."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def _listening(answer: Answer, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        tasks.add(task := asyncio.current_task())
        try:
            await answer(reader, writer)
        except* (OSError, EOFError):
            pass  # the guest hung up first
        finally:
            writer.transport.abort()
            tasks.discard(task)

    tasks: set[asyncio.Task[None] | None] = set()
    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for task in tasks:
            assert task
            task.cancel()
        await asyncio.gather(*[task for task in tasks if task], return_exceptions=True)
