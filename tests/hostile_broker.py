"""A key broker that does what a test tells it, and a relay that reads and writes what passes between guest and broker.

Both are real gRPC servers. `Broker` answers by itself: right by default, and wrong where a behaviour is given. `Relay` ends TLS
with the broker's own certificate, as a load balancer may, and passes messages on, edited where a hook is given.
"""

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.jwk import ECKey

from agent.broker.jwe import seal
from agent.closed import Ident
from agent.errors import TokenError
from agent.evidence import Nonce
from agent.handshake import Accepted, Attestation, Challenge, Hello, KeyResponse, TeePublicKey
from agent.handshake import grpc_status as status
from agent.handshake import grpc_wire as wire
from agent.handshake.pb import kbs_pb2 as pb
from agent.handshake.token import read_token
from agent.jose import pack_b64, pack_b64url, pack_jwk, parse_b64url
from tests.faults.canaries import PEER_TEXT
from tests.tls import Signer, certificate, key_pem, pem

NAME = "broker.test"
URI = Ident("kbs:///models/demo/key")
AUTHORITY = ec.derive_private_key(0xA0, ec.SECP256R1())
CA = certificate("test CA")
LEAF = certificate(NAME, signer=CA)
SERVER = Ident("SERVER")

Stream: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"  # generic in the stubs only
Reads = AsyncIterator[bytes]
Answer = Callable[[Hello | Attestation], bytes]
Attest = Callable[[Reads, Stream], AsyncIterator[bytes]]
Release = Callable[[bytes, Stream], Awaitable[bytes]]
_T = TypeVar("_T")


def signed(claims: dict[str, Any], authority: ec.EllipticCurvePrivateKey, header: dict[str, Any] | None = None) -> str:
    """A token that says `claims`, signed by `authority`."""
    private = authority.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return jwt.encode(header or {"alg": "ES256", "typ": "JWT"}, claims, ECKey.import_key(private), algorithms=["ES256"])


def claims_of(token: str) -> dict[str, Any]:
    """What a token says, whoever signed it."""
    claims: dict[str, Any] = json.loads(parse_b64url(token.split(".")[1]))
    return claims


def edited(token: str, **changes: object) -> str:
    """The token with other claims and the signature that it had."""
    header, _, signature = token.split(".")
    return f"{header}.{pack_b64url(json.dumps(claims_of(token) | changes).encode())}.{signature}"


@dataclass
class Broker:
    """What a test makes the server do; the defaults are a good broker. Each call takes the next of the behaviours.

    Attributes:
        seen: messages of attestations that were answered as a good broker does.
    """

    attests: list[Attest] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    authority: ec.EllipticCurvePrivateKey = AUTHORITY
    key_uri: Ident = URI
    key: bytes = bytes(range(32))
    simulated: bool = False
    seen: list[Hello | Attestation] = field(default_factory=list)
    keys_asked: int = 0

    async def attest(self, requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        behaviour = self.attests.pop(0) if self.attests else self.good
        async for answer in behaviour(requests, context):
            yield answer

    async def good(self, requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        nonce = Nonce(b"")
        async for data in requests:
            request = wire.parse_attest_request(data, SERVER)
            self.seen.append(request)
            if isinstance(request, Hello):
                nonce = Nonce(len(self.seen).to_bytes(32))
                yield wire.pack_attest_response(Challenge(request.request_id, nonce, 180))
            else:
                token = self.token(nonce, request.tee_pubkey)
                yield wire.pack_attest_response(Accepted(request.request_id, token, Ident("p1"), ()))
                return

    async def release(self, data: bytes, context: Stream) -> bytes:
        self.keys_asked += 1
        if self.releases:
            return await self.releases.pop(0)(data, context)
        request = wire.parse_key_request(data, SERVER)
        try:
            claims = read_token(request.token, (self.authority.public_key(),), int(time.time()))
        except TokenError as error:
            return await refuses_key(grpc.StatusCode.UNAUTHENTICATED, status.Failure(16, Ident(f"TOKEN_{error.check.name}")))(
                data, context
            )
        jwe = seal(self.key, claims.tee_pubkey)
        return wire.pack_key_response(KeyResponse(request.request_id, jwe, Ident("id-1"), 7))

    def token(self, nonce: Nonce, key: TeePublicKey, changes: Mapping[str, object] | None = None) -> str:
        """A Verdict token; `changes` are other claims."""
        now = int(time.time())
        claims = {
            "iss": "keyturn-broker",
            "iat": now,
            "exp": now + 300,
            "nonce": pack_b64(nonce),
            "tee-pubkey": pack_jwk(key),
            "key_uri": self.key_uri,
            "policy_version": "p1",
            "min_model_version": 0,
            "simulated": self.simulated,
        }
        return signed(claims | dict(changes or {}), self.authority)


# --- behaviours ---------------------------------------------------------------------------------------------------------


def challenge(request: Hello | Attestation) -> bytes:
    return wire.pack_attest_response(Challenge(request.request_id, Nonce(b"n" * 32), 180))


async def _given(requests: Reads, answers: tuple[Answer, ...]) -> AsyncIterator[bytes]:
    for answer in answers:
        yield answer(wire.parse_attest_request(await anext(requests), SERVER))


def says(*answers: Answer) -> Attest:
    """Answer the n-th request with the n-th answer, take one more and end the stream in good order."""

    async def behaviour(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        async for answer in _given(requests, answers):
            yield answer
        await anext(requests, None)

    return behaviour


def fails(code: grpc.StatusCode, failure: status.Failure | bytes | None = None, *before: Answer) -> Attest:
    """The same, but the last request is answered with a failure."""

    async def behaviour(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        async for answer in _given(requests, before):
            yield answer
        await anext(requests)
        await context.abort(code, PEER_TEXT, _trailing(failure))

    return behaviour


def falls_silent(*before: Answer) -> Attest:
    """The same, but the last request is never answered."""

    async def behaviour(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        async for answer in _given(requests, before):
            yield answer
        await asyncio.Event().wait()

    return behaviour


def refuses_key(code: grpc.StatusCode, failure: status.Failure | bytes | None = None) -> Release:
    async def behaviour(data: bytes, context: Stream) -> bytes:
        await context.abort(code, PEER_TEXT, _trailing(failure))
        return b""

    return behaviour


def answers_key(answer: Callable[[bytes], bytes]) -> Release:
    async def behaviour(data: bytes, context: Stream) -> bytes:
        return answer(data)

    return behaviour


async def keeps_key(data: bytes, context: Stream) -> bytes:
    """Never answer a key request."""
    await asyncio.Event().wait()
    return b""


def _trailing(failure: status.Failure | bytes | None) -> tuple[tuple[str, str | bytes], ...]:
    details = status.pack_failure(failure) if isinstance(failure, status.Failure) else failure
    return (("x-note", PEER_TEXT), *([(status.DETAILS_KEY, details)] if details is not None else []))


# --- the relay ----------------------------------------------------------------------------------------------------------

Hook = Callable[[_T], Awaitable[None] | None]


def _as_it_is(_: object) -> None:
    pass


@dataclass
class Relay:
    """Passes on what guest and broker say, after its hooks, which may change a message, hold it, or raise `Cut`.

    Attributes:
        endpoint, ca_pem, server_name: the broker behind it.
        releases: who answers key requests instead of that broker.
        requests, answers, keys: what came, as it came.
    """

    endpoint: str
    ca_pem: str
    server_name: str
    on_request: Hook[pb.AttestRequest] = _as_it_is
    on_answer: Hook[pb.AttestResponse] = _as_it_is
    on_key_request: Hook[pb.ReleaseKeyRequest] = _as_it_is
    on_key: Hook[pb.ReleaseKeyResponse] = _as_it_is
    on_credentials: Hook[pb.ReleaseCredentialsResponse] = _as_it_is
    releases: Release | None = None
    requests: list[pb.AttestRequest] = field(default_factory=list)
    answers: list[pb.AttestResponse] = field(default_factory=list)
    keys: list[pb.ReleaseKeyResponse] = field(default_factory=list)

    def guest_key(self) -> TeePublicKey:
        """The ephemeral key of the last guest that attested."""
        sent = next(request.attestation for request in reversed(self.requests) if request.HasField("attestation"))
        return TeePublicKey(sent.tee_pubkey.x, sent.tee_pubkey.y)

    async def attest(self, requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        async with self.channel() as channel:
            call = channel.stream_stream(wire.ATTEST_METHOD)()
            try:
                async for data in requests:
                    self.requests.append(pb.AttestRequest.FromString(data))
                    await call.write(await _through(self.on_request, pb.AttestRequest.FromString(data)))
                    answer = await call.read()
                    if not isinstance(answer, bytes):
                        return
                    self.answers.append(pb.AttestResponse.FromString(answer))
                    yield await _through(self.on_answer, pb.AttestResponse.FromString(answer))
            except grpc.aio.AioRpcError as error:
                await _pass_on(error, context)
            except Cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, PEER_TEXT)

    async def release(self, data: bytes, context: Stream) -> bytes:
        request = await _through(self.on_key_request, pb.ReleaseKeyRequest.FromString(data))
        if self.releases:
            return await self.releases(request, context)
        async with self.channel() as channel:
            try:
                answer = await channel.unary_unary(wire.RELEASE_KEY_METHOD)(request)
            except grpc.aio.AioRpcError as error:
                await _pass_on(error, context)
        self.keys.append(pb.ReleaseKeyResponse.FromString(answer))
        return await _through(self.on_key, pb.ReleaseKeyResponse.FromString(answer))

    async def release_credentials(self, data: bytes, context: Stream) -> bytes:
        async with self.channel() as channel:
            try:
                answer = await channel.unary_unary(wire.RELEASE_CREDENTIALS_METHOD)(data)
            except grpc.aio.AioRpcError as error:
                await _pass_on(error, context)
        return await _through(self.on_credentials, pb.ReleaseCredentialsResponse.FromString(answer))

    def channel(self) -> Any:  # the stubs want serialisers, which a wire of bytes has not
        credentials = grpc.ssl_channel_credentials(self.ca_pem.encode())
        return grpc.aio.secure_channel(self.endpoint, credentials, [("grpc.ssl_target_name_override", self.server_name)])


class Cut(Exception):
    """Raised by a hook: the connection is lost here."""


async def _through(hook: Hook[Any], message: Any) -> bytes:
    held = hook(message)
    if held is not None:
        await held
    data: bytes = message.SerializeToString()
    return data


async def _pass_on(error: grpc.aio.AioRpcError, context: Stream) -> None:
    trailing: Any = error.trailing_metadata() or ()
    await context.abort(error.code(), error.details() or "", tuple((key, value) for key, value in trailing))


# --- serving ------------------------------------------------------------------------------------------------------------


class _Service(Protocol):
    def attest(self, requests: Reads, context: Stream, /) -> AsyncIterator[bytes]: ...
    async def release(self, data: bytes, context: Stream, /) -> bytes: ...


@asynccontextmanager
async def served(service: _Service, leaf: Signer | tuple[bytes, bytes] = LEAF) -> AsyncIterator[str]:
    """Serve under this identity: a certificate of ours, or key and chain as PEM. Yields `host:port`."""
    pair = leaf if isinstance(leaf[0], bytes) else (key_pem(leaf), pem(leaf))
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    methods = {
        "Attest": grpc.stream_stream_rpc_method_handler(service.attest),
        "ReleaseKey": grpc.unary_unary_rpc_method_handler(service.release),
    }
    if isinstance(service, Relay):
        methods["ReleaseCredentials"] = grpc.unary_unary_rpc_method_handler(service.release_credentials)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("keyturn.kbs.v1.KeyBroker", methods),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextmanager
def in_thread(server: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
    """Run a server on a loop of its own beside this thread."""
    started: concurrent.futures.Future[tuple[_T, asyncio.AbstractEventLoop, asyncio.Event]] = concurrent.futures.Future()

    async def serve() -> None:
        try:
            async with server as value:
                end = asyncio.Event()
                started.set_result((value, asyncio.get_running_loop(), end))
                await end.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        value, loop, end = started.result()
        try:
            yield value
        finally:
            loop.call_soon_threadsafe(end.set)
    finally:
        thread.join()
