"""Broken answers of the test KBS: each `Fault`, done to a right answer on its way out."""

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from agent.sim.trustee_http import Request, Response
from agent.sim.trustee_knobs import Fault, Knobs

HUGE_BYTES = 64 << 20
DRIP_S = 0.05
_CHUNK = b"x" * (1 << 16)
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_TEXT = "text/plain; charset=utf-8"


def replaced(fault: Fault, right: Response, request: Request, knobs: Knobs) -> Response | None:
    """The complete answer that stands for the right one; None: this fault breaks bytes (`send_broken`), not meaning."""
    retry = () if knobs.retry_after is None else (("retry-after", knobs.retry_after),)
    match fault:
        case Fault.REDIRECT:
            return Response(307, headers=(("location", knobs.redirect_to + request.path),))
        case Fault.HTML_502:
            return Response(502, _HTML, "text/html")
        case Fault.SERVER_ERROR:
            return Response(500, b"internal error", _TEXT)
        case Fault.UNAVAILABLE:
            return Response(503, b"try again", _TEXT, retry)
        case Fault.TOO_MANY_REQUESTS:
            return Response(429, b"slow down", _TEXT, retry)
        case Fault.EMPTY:
            return replace(right, body=b"")
        case Fault.NOT_JSON:
            return replace(right, body=b"this is not JSON")
        case Fault.JSON_ARRAY:
            return replace(right, body=b"[" + right.body + b"]")
        case Fault.WRONG_TYPES:
            return replace(right, body=json.dumps(_wrong(_parsed(right))).encode())
        case Fault.DUPLICATE_MEMBERS:
            members = ",".join(
                f'{json.dumps(name)}:"AAAA",{json.dumps(name)}:{json.dumps(value)}' for name, value in _parsed(right).items()
            )
            return replace(right, body=b"{" + members.encode() + b"}")
        case Fault.DEEP_JSON:
            return replace(right, body=b"[" * 100_000)
        case _:
            return None


def send_broken(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    """Send `response` as its fault has it; where that is silence, until the peer has gone or the server stops."""
    assert response.fault is not None
    with suppress(OSError):  # a peer that has enough hangs up
        _SENDERS[response.fault](connection, response, stopping)


def _parsed(response: Response) -> dict[str, Any]:
    try:
        members = json.loads(response.body)
    except ValueError:
        return {"value": "AAAA"}
    return members if isinstance(members, dict) else {"value": members}


def _wrong(value: object) -> object:
    if isinstance(value, dict):
        return {name: _wrong(member) for name, member in value.items()}
    return 7 if isinstance(value, str) else "7"


def _oversized_body(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(response.head(length=HUGE_BYTES))
    for _ in range(HUGE_BYTES // len(_CHUNK)):
        connection.sendall(_CHUNK)


def _endless_body(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    lines = response.head("transfer-encoding: chunked").split(b"\r\n")
    connection.sendall(b"\r\n".join(line for line in lines if not line.startswith(b"content-length")))
    while not stopping.is_set():
        connection.sendall(b"10000\r\n" + _CHUNK + b"\r\n")


def _oversized_head(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(response.head("x-filler: " + "x" * (1 << 20)) + response.body)


def _many_headers(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(response.head(*(f"x-{number}: {number}" for number in range(10_000))) + response.body)


def _slow_drip(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    for byte in response.head() + response.body:
        connection.sendall(bytes((byte,)))
        if stopping.wait(DRIP_S):
            return


def _silent(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.settimeout(0.1)
    while not stopping.is_set():
        try:
            if not connection.recv(1 << 16):
                return
        except TimeoutError:
            continue


def _half_closed(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(response.head() + response.body[: len(response.body) // 2])
    socket.socket.shutdown(connection, socket.SHUT_WR)
    _silent(connection, response, stopping)


def _reset(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _not_http(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(b"220 mail.invalid ESMTP\r\n" * 4)


def _two_lengths(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    connection.sendall(response.head(f"content-length: {len(response.body) + 7}") + response.body)


def _gzip_body(connection: socket.socket, response: Response, stopping: threading.Event) -> None:
    body = gzip.compress(bytes(HUGE_BYTES), compresslevel=1)
    connection.sendall(replace(response, body=body).head("content-encoding: gzip") + body)


_SENDERS: Mapping[Fault, Callable[[socket.socket, Response, threading.Event], None]] = {
    Fault.OVERSIZED_BODY: _oversized_body,
    Fault.ENDLESS_BODY: _endless_body,
    Fault.OVERSIZED_HEAD: _oversized_head,
    Fault.MANY_HEADERS: _many_headers,
    Fault.SLOW_DRIP: _slow_drip,
    Fault.SILENT: _silent,
    Fault.HALF_CLOSED: _half_closed,
    Fault.RESET: _reset,
    Fault.NOT_HTTP: _not_http,
    Fault.TWO_LENGTHS: _two_lengths,
    Fault.GZIP_BODY: _gzip_body,
}
