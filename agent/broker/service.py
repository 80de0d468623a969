"""The broker's gRPC service: streams, nonces, deadlines, limits. What is decided, and why, is the desk's (`desk.py`).

A nonce is drawn for a Challenge, lives in the coroutine of its stream and nowhere else, and is gone with the first
Attestation, the next Hello or the end of the stream: so it is used once, only here, and any number of brokers can share an
address. Anybody may open a stream and say Hello, so a guest that is waited for holds nothing scarce: open calls are counted,
together and for each host. Whoever has come with Evidence is judged and not sent away, as collecting it again costs the guest
more than the wait. Bytes become messages in `agent/handshake/grpc_wire.py`; gRPC's own (de)serialisers are not used.
"""

import asyncio
import contextlib
import ipaddress
import time
import traceback
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from agent.broker.audit import AUDIT_LOG, AuditStep
from agent.broker.authority import Asked, failure_reason
from agent.broker.desk import CHALLENGE_LIFE_S, Desk, UpstreamFailedError
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    ConfigError,
    ConfigProblem,
    InternalError,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenError,
)
from agent.handshake import (
    MAX_MESSAGE_BYTES,
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    Denied,
    Hello,
    KeyRequest,
    TokenKind,
    grpc_wire,
)
from agent.handshake.grpc_status import DETAILS_KEY, OVERLOADED, Denial, Failure, pack_failure

SERVICE, _ATTEST = grpc_wire.ATTEST_METHOD.strip("/").split("/")
_RELEASE_KEY = grpc_wire.RELEASE_KEY_METHOD.rsplit("/", 1)[1]
_RELEASE_CREDENTIALS = grpc_wire.RELEASE_CREDENTIALS_METHOD.rsplit("/", 1)[1]

MAX_HELLOS = 8  # of one stream
MAX_CALLS_PER_CONNECTION = 64
RETRY_AFTER_S = 5.0
DRAIN_S = 25.0  # below Kubernetes' 30 s; a guest whose stream is cut starts a new handshake with another replica

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    ("grpc.so_reuseport", 0),  # a second broker on the same address is an error, not a lottery
    ("grpc.keepalive_time_ms", 30_000),  # finds guests that vanished in the middle of a stream
    ("grpc.keepalive_timeout_ms", 10_000),
]
_Context = grpc.aio.ServicerContext[bytes, bytes]
_Failed = AgentError | UpstreamFailedError
_Request = TypeVar("_Request", KeyRequest, CredentialsRequest)


@dataclass(frozen=True, slots=True)
class Limits:
    """What guests may cost together. Over a number, they are asked to come back later.

    Attributes:
        open_calls: calls that are open at one time, most of them waiting for their guest, or for the guests before it: two
            cores judge so many guests of eight GPUs within half of `verdict_timeout_s` (32 ms each, `scripts/load`). The
            memory they can take is gRPC's, 1 MiB each, whether or not they are judged at one time.
        open_calls_of_host: of those, from one IPv4 address or IPv6 /64; guests behind one address share it.
        hello_timeout_s: a stream that says nothing is not kept.
        attestation_timeout_s: from a Hello on; longer than the Challenge lives, so that a slow guest can ask for another.
        verdict_timeout_s: from the Attestation on.
    """

    open_calls: int = 1024
    open_calls_of_host: int = 128
    hello_timeout_s: float = 10
    attestation_timeout_s: float = CHALLENGE_LIFE_S + 60
    verdict_timeout_s: float = 60


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM: certificate chain, leaf first, and its private key."""

    certificate_chain: bytes
    private_key: bytes


class BrokerServer:
    """One listening broker.

    Args:
        report: told of failures that the operator must act on; called on the event loop.
        monotonic: seconds; the clock of nonces.
    """

    def __init__(
        self,
        desk: Desk,
        report: Callable[[AgentError], None],
        monotonic: Callable[[], float] = time.monotonic,
        limits: Limits = Limits(),
    ) -> None:
        self._desk = desk
        self._report = report
        self._monotonic = monotonic
        self._limits = limits
        self._open_calls: Counter[str] = Counter()  # by host
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs do not know it
        self._server = grpc.aio.server(options=_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        handlers = {
            _ATTEST: grpc.stream_stream_rpc_method_handler(self._serve_attest),
            _RELEASE_KEY: grpc.unary_unary_rpc_method_handler(self._serve_release_key),
            _RELEASE_CREDENTIALS: grpc.unary_unary_rpc_method_handler(self._serve_release_credentials),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self, listen: str, tls: Tls) -> int:
        """Listen on `host:port` (port 0: any free one); the value is the port.

        Raises:
            ConfigError: the address cannot be had, or certificate and key do not fit together.
        """
        credentials = grpc.ssl_server_credentials([(tls.private_key, tls.certificate_chain)])
        try:
            port: int = self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident("listen")) from error
        if port == 0:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident("tls"))
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What the health service says, from now on."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self, grace_s: float = DRAIN_S) -> None:
        """Take no new work, let what runs come to its end for at most `grace_s` seconds, and close."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self._desk.close()

    # --- attestation --------------------------------------------------------------------------------------------------

    async def _serve_attest(self, _: object, context: _Context) -> None:
        async with self._admitted(context):
            stream = _AttestStream(context)
            try:
                async with asyncio.timeout(self._limits.hello_timeout_s) as patience:
                    await self._attest(stream, patience)
            except TimeoutError:
                await self._fail(stream, _broker_failure(grpc.StatusCode.DEADLINE_EXCEEDED, "STREAM_TIMEOUT"))
            except (AgentError, UpstreamFailedError) as error:
                await self._fail(stream, error)
            except grpc.aio.BaseError:
                pass  # the guest is gone in the middle of a message: nobody is left to tell
            except Exception as error:  # noqa: BLE001  # the server loop: a bug ends its own stream; gRPC would send its text
                await self._fail(stream, _internal(error))

    async def _attest(self, stream: "_AttestStream", patience: asyncio.Timeout) -> None:
        message = await stream.read()
        for _ in range(MAX_HELLOS):
            assert isinstance(message, Hello), "the stream lets no Attestation pass before a Hello"
            hello = message
            patience.reschedule(asyncio.get_running_loop().time() + self._limits.attestation_timeout_s)
            # 1. A fresh nonce, whatever there was before.
            asked_at = self._monotonic()
            opened = await self._desk.open(hello)
            expires_at = asked_at + opened.challenge.expires_in_s
            await stream.write(opened.challenge)
            message = await stream.read()
            if isinstance(message, Attestation):
                # 2. The Attestation, in time, is judged with the nonce of this stream's last Challenge.
                # refusal: test_an_expired_nonce_is_a_typed_failure
                if self._monotonic() >= expires_at:
                    raise _broker_failure(grpc.StatusCode.FAILED_PRECONDITION, "NONCE_EXPIRED")
                patience.reschedule(asyncio.get_running_loop().time() + self._limits.verdict_timeout_s)
                return await stream.write(await opened.attest(message))
        raise _broker_failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_HELLOS")

    async def _fail(self, stream: "_AttestStream", error: _Failed) -> None:
        if stream.hello is not None:  # who said nothing leaves no line: a port scan is no attestation
            error = await self._recorded(error, AuditStep.ATTEST, stream.hello)
        self._report_own(error)
        await _abort(stream.context, error, stream.hello.request_id if stream.hello else None)

    # --- release ------------------------------------------------------------------------------------------------------

    async def _serve_release_key(self, data: bytes, context: _Context) -> bytes:
        async def release(request: KeyRequest) -> bytes:
            return grpc_wire.pack_key_response(await self._desk.release(request))

        return await self._serve_release(AuditStep.RELEASE, data, context, grpc_wire.parse_key_request, release)

    async def _serve_release_credentials(self, data: bytes, context: _Context) -> bytes:
        async def release(request: CredentialsRequest) -> bytes:
            return grpc_wire.pack_credentials_response(await self._desk.release_credentials(request))

        return await self._serve_release(AuditStep.CREDENTIALS, data, context, grpc_wire.parse_credentials_request, release)

    async def _serve_release(
        self,
        step: AuditStep,
        data: bytes,
        context: _Context,
        parse: Callable[[bytes, Ident, TokenKind], _Request],
        release: Callable[[_Request], Awaitable[bytes]],
    ) -> bytes:
        async with self._admitted(context):
            request: _Request | None = None
            recorded = False
            try:
                request = parse(data, Ident("AWAIT_KEY_REQUEST"), self._desk.tokens)
                recorded = True  # what the desk refuses, it records
                return await release(request)
            except (AgentError, UpstreamFailedError) as error:
                failure: _Failed = error
            except Exception as error:  # noqa: BLE001  # as above
                failure, recorded = _internal(error), False
            if not recorded:
                failure = await self._recorded(failure, step, request)
            self._report_own(failure)
            await _abort(context, failure, request.request_id if request else None)

    # --- both ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _admitted(self, context: _Context) -> AsyncIterator[None]:
        """Counts an open call. One too many is turned away unread and leaves no audit line: a flood must not fill the disk."""
        host, limits = peer_host(context.peer()), self._limits
        # refusal: test_one_open_call_too_many_is_turned_away_on_any_connection_until_another_ends
        if self._open_calls.total() >= limits.open_calls or self._open_calls[host] >= limits.open_calls_of_host:
            await _abort(context, _overloaded(), None)
        self._open_calls[host] += 1
        try:
            yield
        finally:
            self._open_calls[host] -= 1
            self._open_calls += Counter()  # forgets hosts at zero

    async def _recorded(self, error: _Failed, step: AuditStep, asked: Asked | None) -> _Failed:
        """The failure that the guest is told: this one, or that it could not be recorded."""
        try:
            await self._desk.record_failure(step, asked, _failure(error, None).reason)
        except BrokerFailureError as unrecorded:
            return unrecorded
        return error

    def _report_own(self, error: _Failed) -> None:
        """What the audit log cannot say: bugs, and that it cannot be written."""
        if isinstance(error, InternalError) or (isinstance(error, BrokerFailureError) and error.reason == AUDIT_LOG):
            self._report(error)


class _AttestStream:
    """Messages of one attestation stream; what one handshake must have in common is checked here."""

    def __init__(self, context: _Context) -> None:
        self.context = context
        self.hello: Hello | None = None

    @property
    def state(self) -> Ident:
        return Ident("AWAIT_ATTESTATION" if self.hello else "AWAIT_HELLO")

    async def read(self) -> Hello | Attestation:
        data = await self.context.read()
        if not isinstance(data, bytes):  # grpc.aio.EOF
            raise RemoteProtocolError(ProtocolProblem.CLOSED, self.state)
        message = grpc_wire.parse_attest_request(data, self.state)
        # refusal: test_another_request_id_on_the_same_stream_is_a_protocol_failure
        if self.hello is not None and message.request_id != self.hello.request_id:
            raise RemoteProtocolError(ProtocolProblem.REQUEST_ID, self.state)
        if isinstance(message, Hello):
            # refusal: test_another_key_on_the_same_stream_is_a_protocol_failure
            if self.hello is not None and message != self.hello:  # another key or TEE is another handshake
                raise RemoteProtocolError(ProtocolProblem.MALFORMED, self.state)
            self.hello = message
        elif self.hello is None:
            raise RemoteProtocolError(ProtocolProblem.UNEXPECTED_MESSAGE, self.state)
        # refusal: test_evidence_of_another_tee_than_the_hello_named_is_a_protocol_failure
        elif message.evidence.primary.tee is not self.hello.tee:
            raise RemoteProtocolError(ProtocolProblem.MALFORMED, self.state)
        return message

    async def write(self, message: Challenge | Accepted | Denied) -> None:
        await self.context.write(grpc_wire.pack_attest_response(message))


def peer_host(peer: str) -> str:
    """Who gRPC says is calling, without the port: `ipv4:192.0.2.1:5000` is `192.0.2.1`, IPv6 a /64, which one host may own."""
    kind, _, rest = peer.partition(":")
    host = urllib.parse.unquote(rest.rpartition(":")[0]).strip("[]").partition("%")[0]
    return str(ipaddress.ip_network((host, 64), strict=False)) if kind == "ipv6" else host


def _failure(error: _Failed, request_id: Ident | None) -> Failure:
    """How a failure looks on the wire. A denial says what a denied Verdict would; its word is the claim in capitals."""
    match error:
        case UpstreamFailedError():
            return replace(error.failure, request_id=request_id)
        case KeyReleaseDeniedError():
            word = Ident(error.claim.upper().replace(".", "_"))
            denial = Denial(error.reason, error.claim, error.reference_value_id, error.policy_version)
            return Failure(_code(grpc.StatusCode.PERMISSION_DENIED), word, request_id, denial=denial)
        case TokenError():
            return Failure(_code(grpc.StatusCode.UNAUTHENTICATED), failure_reason(error), request_id)
        case RemoteProtocolError():
            return Failure(_code(grpc.StatusCode.INVALID_ARGUMENT), failure_reason(error), request_id)
        case BrokerFailureError():
            retry_after_s = RETRY_AFTER_S if error.status == _code(grpc.StatusCode.UNAVAILABLE) else None
            return Failure(error.status, error.reason, request_id, retry_after_s)
        case _:
            return Failure(_code(grpc.StatusCode.INTERNAL), Ident("INTERNAL"), request_id)


async def _abort(context: _Context, error: _Failed, request_id: Ident | None) -> NoReturn:
    failure = _failure(error, request_id)
    code = next(code for code in grpc.StatusCode if _code(code) == failure.code)
    await context.abort(code, str(failure.reason), ((DETAILS_KEY, pack_failure(failure)),))


def _code(status: grpc.StatusCode) -> int:
    code: int = status.value[0]
    return code


def _broker_failure(status: grpc.StatusCode, reason: str) -> BrokerFailureError:
    return BrokerFailureError(_code(status), Ident(reason))


def _overloaded() -> BrokerFailureError:
    return _broker_failure(grpc.StatusCode.UNAVAILABLE, OVERLOADED)


def _internal(error: Exception) -> InternalError:
    """A bug. Only its place is told, never its text."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return InternalError(Ident.of_peer(f"{Path(frame.filename).stem}:{frame.lineno}"))
