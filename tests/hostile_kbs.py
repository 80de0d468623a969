"""A KBS that does what a test tells it: HTTP by hand, so that nothing is too wrong to be said.

By itself it is a good KBS with one sample verifier and no policy. It is no simulator of Trustee (`agent/sim` has one): it
says exactly what a test wants to hear.
"""

import asyncio
import hashlib
import json
import ssl
import tempfile
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from agent.broker.jwe import seal
from agent.evidence import CompositeEvidence, Evidence, RuntimeData, Tee, binding
from agent.jose import parse_point
from tests.hostile_broker import AUTHORITY, CA, LEAF, NAME, signed
from tests.tls import Signer, key_pem, pem

ERRORS = "https://github.com/confidential-containers/kbs/errors/"
RESOURCE = "kbs:///models/demo/key"
SESSION = "0123456789abcdef0123456789abcdef"
EXPIRED = "Thu, 01 Jan 1970 00:05:00 GMT"
KEY = bytes(range(32))
MAX_HEAD_BYTES = 128 << 10
"""Of a request, as Trustee's HTTP server has it."""
NONCE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

__all__ = ["AUTHORITY", "CA", "LEAF", "NAME", "signed"]


@dataclass(frozen=True)
class Asked:
    """A request as it came, header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def what(self) -> str:
        return self.target.removeprefix("/kbs/v0/").partition("/")[0]

    def json(self) -> Any:
        return json.loads(self.body)


Say = Callable[[Asked, StreamWriter], Awaitable[None]]
"""Answers one request; the connection ends when the answer says `Connection: close`, or raises."""


def answer(status: int = 200, body: bytes | dict[str, Any] = b"", *headers: str) -> bytes:
    """A whole answer, with a length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def says(status: int = 200, body: bytes | dict[str, Any] = b"", *headers: str) -> Say:
    return raw(answer(status, body, *headers))


def raw(data: bytes) -> Say:
    async def say(_: Asked, writer: StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return say


def refuses(word: str, detail: str = "", status: int = 401) -> Say:
    return says(status, {"type": ERRORS + word, "detail": detail})


async def hangs_up(_: Asked, writer: StreamWriter) -> None:
    raise ConnectionResetError


async def is_silent(_: Asked, writer: StreamWriter) -> None:
    await asyncio.Event().wait()


def ear(runtime_data: dict[str, Any], *, claims: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What an attestation service says of sample evidence that it affirms."""
    now = int(time.time())
    vector = {"configuration": 2, "executables": 3, "hardware": 2, **(claims or {})}
    worst = max(vector.values())
    cpu = {
        "ear.status": "contraindicated" if worst > 95 else "warning" if worst > 31 else "affirming",
        "ear.trustworthiness-vector": vector,
        "ear.appraisal-policy-id": "default",
        "ear.veraison.annotated-evidence": {"sample": {"svn": "1"}, "runtime_data_claims": runtime_data},
    }
    return {"iss": "CoCo-Attestation-Service", "iat": now, "exp": now + 300, "submods": {"cpu0": cpu}} | changes


@dataclass
class Kbs:
    """What a test makes it say; each request takes the next of the behaviours of its kind (`auth`, `attest`, `resource` …).

    Attributes:
        asked: every request.
        connections: how many were made.
        tokens: of successful attestations.
    """

    behaviours: dict[str, list[Say]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    nonce: str = NONCE
    extra_params: object = ""
    cookies: tuple[str, ...] = (f"kbs-session-id={SESSION}; Expires={EXPIRED}",)
    authority: ec.EllipticCurvePrivateKey = AUTHORITY
    claims: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    key: bytes = KEY
    tokens: list[str] = field(default_factory=list)
    runtime_data: dict[str, Any] = field(default_factory=dict)

    def on(self, what: str, *behaviours: Say) -> "Kbs":
        self.behaviours.setdefault(what, []).extend(behaviours)
        return self

    def times(self, what: str) -> int:
        return sum(asked.what == what for asked in self.asked)

    async def say(self, asked: Asked, writer: StreamWriter) -> None:
        self.asked.append(asked)
        if waiting := self.behaviours.get(asked.what):
            return await waiting.pop(0)(asked, writer)
        return await self.good(asked, writer)

    async def good(self, asked: Asked, writer: StreamWriter) -> None:
        cookies = [f"Set-Cookie: {cookie}" for cookie in self.cookies]
        date = f"Date: {formatdate(usegmt=True)}"
        match asked.what:
            case "auth":
                body: dict[str, Any] = {"nonce": self.nonce, "extra-params": self.extra_params}
                writer.write(answer(200, body, date, *cookies))
            case "attest":
                self.runtime_data = asked.json()["runtime-data"]
                claims = ear(self.runtime_data, claims=self.claims, **self.changes)
                self.tokens.append(signed(claims, self.authority))
                writer.write(answer(200, {"token": self.tokens[-1]}, date, *cookies))
            case _:
                point = parse_point(self.runtime_data["tee-pubkey"])
                writer.write(answer(200, seal(self.key, point), date, "Content-Type: application/json"))
        await writer.drain()


@asynccontextmanager
async def served(kbs: Kbs, leaf: Signer | None = LEAF) -> AsyncIterator[str]:
    """Yields the URL. Without a leaf it is plain http."""

    writers: list[StreamWriter] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        kbs.connections += 1
        writers.append(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await kbs.say(Asked(method, target, headers, body), writer)
        writer.transport.abort()

    context = None
    if leaf is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            chain = Path(folder) / "leaf.pem"
            chain.write_bytes(key_pem(leaf) + pem(leaf))
            context.load_cert_chain(chain)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, limit=MAX_HEAD_BYTES)
    try:
        host, port = server.sockets[0].getsockname()
        yield f"{'https' if leaf else 'http'}://{host}:{port}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def sample(data: RuntimeData) -> CompositeEvidence:
    """Sample evidence of a guest without GPUs."""
    digest = binding.report_data(data, "")[: hashlib.new(data.hash.value).digest_size]
    return CompositeEvidence(Evidence(Tee.SAMPLE, digest), "")
