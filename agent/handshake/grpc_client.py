"""The guest's side of the gRPC wire: connects, drives the machine, waits, retries, and names every failure.

A `GrpcBroker` is one boot's conversation with one broker identity (measured CA and server name) at one or more
addresses, which are hints. Each attempt at attestation is a whole new handshake: new stream, request id and key pair.
Does not decide the order (`machine.py`), the sizes (`grpc_wire.py`) or when to try again (`broker.py`), and collects
nothing: the caller passes `collect`.

gRPC's core writes what peers send to stderr: run the process with GRPC_VERBOSITY=NONE.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, assert_never

import grpc
import grpc.aio

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    Unreachable,
)
from agent.evidence import Tee
from agent.handshake import MAX_MESSAGE_BYTES, KeyRequest, SealedKey, Verdict, grpc_wire
from agent.handshake.broker import Collect, OnAttempt, OnRetry, collected, retried
from agent.handshake.machine import (
    Action,
    Closed,
    Done,
    Event,
    Expired,
    Handshake,
    NeedEvidence,
    SendAttestation,
    SendHello,
    SendKeyRequest,
    Trust,
)
from agent.keys import EphemeralKey
from agent.retry import RetrySchedule

CONNECT_TIMEOUT_S = 5
CHALLENGE_TIMEOUT_S = 15
VERDICT_TIMEOUT_S = 60  # the broker may fetch endorsements, or ask a Verifier behind it
KEY_TIMEOUT_S = 30

_Result = TypeVar("_Result")
_Stream = grpc.aio.StreamStreamCall[bytes, bytes]


class GrpcBroker:
    """One broker identity at one or more addresses. Use as `async with`; not for two handshakes at a time."""

    def __init__(
        self,
        endpoints: Sequence[str],
        ca_pem: str,
        server_name: str,
        trust: Trust,
        timeout_s: float,
        on_retry: OnRetry = lambda *_: None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            endpoints: `host:port` hints, tried in turn; at least one.
            ca_pem: the measured CA, PEM; the only roots there are.
            server_name: the measured name that the certificate must carry, whatever the address.
            trust: token keys, and whether simulated evidence may count.
            timeout_s: for attestation and key release together, with every retry.
            on_retry: told why an attempt failed, how many have, and how many seconds the next one waits.
        """
        if not endpoints:
            raise RuntimeError("no endpoints: the configuration must not get this far")
        self._endpoints = tuple(endpoints)
        self._ca_pem = ca_pem
        self._server_name = server_name
        self._trust = trust
        self._timeout_s = timeout_s
        self._on_retry = on_retry
        self._schedule: RetrySchedule | None = None
        self._channel: grpc.aio.Channel | None = None
        self._endpoint = 0
        self._machine: Handshake | None = None
        self._request_id: Ident | None = None
        self._attempts = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        await self._disconnect()

    async def attest(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt = lambda *_: None
    ) -> tuple[Verdict, EphemeralKey]:
        """As `Broker.attest`."""
        self._schedule = RetrySchedule(asyncio.get_running_loop().time() + self._timeout_s)
        return await self._retry(self._schedule, lambda: self._attest_once(key_uri, tee, collect, on_attempt))

    async def release_key(self, verdict: Verdict) -> SealedKey:
        """As `Broker.release_key`."""
        machine, schedule = self._machine, self._schedule
        if machine is None or schedule is None or verdict.request_id != self._request_id:
            raise RuntimeError("a key is asked for after its attestation")
        request = KeyRequest(verdict.request_id, verdict.token, verdict.claims.key_uri)
        return await self._retry(schedule, lambda: self._release_once(machine, request))

    async def _retry(self, schedule: RetrySchedule, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        async def next_address() -> None:
            await self._disconnect()
            self._endpoint = (self._endpoint + 1) % len(self._endpoints)

        return await retried(
            schedule, attempt, grpc.aio.AioRpcError, self._translate, next_address, self._on_retry, len(self._endpoints)
        )

    async def _attest_once(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt
    ) -> tuple[Verdict, EphemeralKey]:
        self._request_id = request_id = Ident(secrets.token_hex(16))
        self._attempts += 1
        on_attempt(request_id, self._attempts)
        key = EphemeralKey.generate()
        challenges = self._machine.challenges if self._machine else 0
        self._machine = machine = Handshake(request_id, key_uri, tee, key.public, self._trust, challenges)
        stream: _Stream = self._connect().stream_stream(grpc_wire.ATTEST_METHOD, bytes, bytes)(None)
        try:
            action: Action = machine.start()
            while True:
                event: Event
                match action:
                    case SendHello():
                        data = grpc_wire.pack_attest_request(action.hello)
                        event = await _exchange(stream, data, machine, CHALLENGE_TIMEOUT_S)
                    case NeedEvidence():
                        event = await collected(collect, action)
                    case SendAttestation():
                        data = grpc_wire.pack_attest_request(action.attestation)
                        event = await _exchange(stream, data, machine, VERDICT_TIMEOUT_S)
                    case SendKeyRequest():
                        return action.verdict, key
                    case Done():
                        raise RuntimeError("no key comes over the attestation stream")
                    case _:
                        assert_never(action)
                action = machine.receive(event, int(time.time()))
        finally:
            stream.cancel()

    async def _release_once(self, machine: Handshake, request: KeyRequest) -> SealedKey:
        method = self._connect().unary_unary(grpc_wire.RELEASE_KEY_METHOD, bytes, bytes)
        answer = await method(grpc_wire.pack_key_request(request), timeout=KEY_TIMEOUT_S)
        response = grpc_wire.parse_key_response(answer, Ident(machine.state.value))
        action = machine.receive(response, int(time.time()))
        assert isinstance(action, Done), "the table knows one action for a key"
        return action.sealed_key

    def connect(self) -> None:
        """As `Broker.connect`."""
        self._connect().get_state(try_to_connect=True)

    def _connect(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.secure_channel(
                f"dns:///{self._endpoints[self._endpoint]}",  # the scheme keeps a hint from naming another resolver
                grpc.ssl_channel_credentials(root_certificates=self._ca_pem.encode()),
                options=[
                    ("grpc.ssl_target_name_override", self._server_name),  # SNI and the name the certificate must carry
                    ("grpc.enable_http_proxy", 0),
                    ("grpc.service_config_disable_resolution", 1),  # no configuration out of DNS TXT records
                    ("grpc.enable_retries", 0),  # retry.py is the one schedule
                    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_S * 1000),  # gRPC's name for the connect timeout
                    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ],
            )
        return self._channel

    async def _disconnect(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close(None)

    async def _translate(self, exc: grpc.aio.AioRpcError) -> tuple[AgentError, float]:
        from agent.handshake import grpc_failure  # only failures pay for its import

        peer = grpc_failure.Peer(self._endpoints[self._endpoint], self._ca_pem, self._server_name)
        state = Ident(self._machine.state.value if self._machine else "START")
        return await grpc_failure.translate(exc, peer, state, CONNECT_TIMEOUT_S)


async def _exchange(stream: _Stream, data: bytes, machine: Handshake, limit_s: int) -> Event:
    """Send one message and wait for the next; the end of the stream and the end of patience are events."""
    try:
        async with asyncio.timeout(limit_s):
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream ended while we collected: read() says how
                await _write(stream, data)
            answer = await stream.read()
    except TimeoutError:
        return Expired()
    if not isinstance(answer, bytes):  # grpc.aio.EOF
        return Closed()
    return grpc_wire.parse_attest_response(answer, Ident(machine.state.value))


async def _write(stream: _Stream, data: bytes) -> None:
    try:
        await stream.write(data)
    except grpc.aio.AioRpcError as exc:
        # When the peer ends the stream during a write, grpc.aio loses its status and makes up INTERNAL (grpcio 1.85,
        # aio/_call.py `_write`). A broker that restarts must not look like one that failed.
        if exc.code() is grpc.StatusCode.INTERNAL:
            raise BrokerUnreachableError(Unreachable.RESET) from None
        raise
