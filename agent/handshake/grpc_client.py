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
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar, assert_never

import grpc
import grpc.aio

from agent import keys
from agent.closed import Ident
from agent.errors import AgentError, BrokerUnreachableError, KeyReleaseDeniedError, TrusteeRefusedError, Unreachable
from agent.evidence import RuntimeData, Tee
from agent.handshake import (
    MAX_INIT_DATA_BYTES,
    MAX_MESSAGE_BYTES,
    Attestation,
    CredentialsRequest,
    KeyRequest,
    SealedCredentials,
    SealedKey,
    TokenKind,
    Verdict,
    grpc_wire,
)
from agent.handshake.broker import Collect, OnAttempt, OnRetry, OnUnaffirmed, collected, retried
from agent.handshake.machine import (
    Action,
    Closed,
    Done,
    Event,
    Expired,
    Handshake,
    HaveCredentials,
    NeedEvidence,
    SendAttestation,
    SendHello,
    SendKeyRequest,
    Trust,
    VerifyToken,
)
from agent.handshake.token import verify_token
from agent.keys import EphemeralKey
from agent.retry import RetrySchedule

CONNECT_TIMEOUT_S = 5
CHALLENGE_TIMEOUT_S = 15
VERDICT_TIMEOUT_S = 60  # the broker may fetch endorsements, or ask a Verifier behind it
KEY_TIMEOUT_S = 30

_Result = TypeVar("_Result")
_Stream = grpc.aio.StreamStreamCall[bytes, bytes]


@dataclass(frozen=True, slots=True)
class InitData:
    """The initdata document that this guest was launched with, UTF-8, and its digest. One above 256 KiB is not sent."""

    document: bytes = field(repr=False)
    digest: bytes


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
        tokens: TokenKind = TokenKind.KEYTURN,
        on_unaffirmed: OnUnaffirmed = lambda _: None,
        init_data: InitData | None = None,
        simulated: bool = False,
    ) -> None:
        """Nothing is connected yet.

        Args:
            endpoints: `host:port` hints, tried in turn; at least one.
            ca_pem: the measured CA, PEM; the only roots there are.
            server_name: the measured name that the certificate must carry, whatever the address.
            trust: token keys, and whether simulated evidence may count.
            timeout_s: for attestation and key release together, with every retry.
            on_retry: told why an attempt failed, how many have, and how many seconds the next one waits.
            tokens: whose tokens count: our broker's, or those of a Trustee attestation service behind a relay.
            on_unaffirmed: after a denial, told each thing in a Trustee token that is not affirmed.
            init_data: of this guest, sent to a Trustee behind a relay; None: none is at hand, and no claim is made from it.
            simulated: the evidence is a simulator's, which a Trustee token does not say.
        """
        if not endpoints:
            raise RuntimeError("no endpoints: the configuration must not get this far")
        self._endpoints = tuple(endpoints)
        self._ca_pem = ca_pem
        self._server_name = server_name
        self._trust = trust
        self._timeout_s = timeout_s
        self._on_retry = on_retry
        self._tokens = tokens
        self._on_unaffirmed = on_unaffirmed
        self._init_data = init_data
        self._simulated = simulated
        self._schedule: RetrySchedule | None = None
        self._channel: grpc.aio.Channel | None = None
        self._endpoint = 0
        self._machine: Handshake | None = None
        self._key_request: KeyRequest | None = None
        self._attempts = 0
        self._refused = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        await self._disconnect()

    async def attest(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt = lambda *_: None
    ) -> tuple[Verdict, EphemeralKey]:
        """As `Broker.attest`."""
        self._schedule = RetrySchedule(asyncio.get_running_loop().time() + self._timeout_s)
        self._refused = 0
        return await self._retry(self._schedule, lambda: self._attest_once(key_uri, tee, collect, on_attempt))

    async def release_credentials(self, verdict: Verdict, uri: Ident) -> SealedCredentials:
        """As `Broker.release_credentials`."""
        return await self._release(verdict, lambda machine, request: self._credentials_once(machine, request, uri))

    async def release_key(self, verdict: Verdict) -> SealedKey:
        """As `Broker.release_key`."""
        return await self._release(verdict, self._key_once)

    async def _release(self, verdict: Verdict, once: Callable[[Handshake, KeyRequest], Awaitable[_Result]]) -> _Result:
        machine, schedule, request = self._machine, self._schedule, self._key_request
        if machine is None or schedule is None or request is None or verdict.request_id != request.request_id:
            raise RuntimeError("a key is asked for after its attestation")
        self._refused = 0
        try:
            return await self._retry(schedule, lambda: once(machine, request))
        except KeyReleaseDeniedError as error:
            denied = self._explained(error, verdict)
        raise denied

    def _explained(self, error: KeyReleaseDeniedError, verdict: Verdict) -> KeyReleaseDeniedError:
        """The denial in the words of the token, which is signed: a relay knows no more, and may say less."""
        if self._tokens is TokenKind.KEYTURN:
            return error
        from agent.handshake import rcar  # only a denial pays for its import

        for finding in rcar.not_affirmed(verdict.token):
            self._on_unaffirmed(finding)
        return rcar.denial(verdict.token)

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
        request_id = Ident(secrets.token_hex(16))
        self._attempts += 1
        on_attempt(request_id, self._attempts)
        key = EphemeralKey.generate()
        challenges = self._machine.challenges if self._machine else 0
        self._machine = machine = Handshake(request_id, key_uri, tee, key.public, self._trust, challenges, self._verify(tee))
        self._key_request = None
        asked: RuntimeData | None = None
        stream: _Stream = self._connect().stream_stream(grpc_wire.ATTEST_METHOD, bytes, bytes)(None)
        try:
            action: Action = machine.start()
            while True:
                event: Event
                match action:
                    case SendHello():
                        data = grpc_wire.pack_attest_request(action.hello)
                        event = await _exchange(stream, data, machine, CHALLENGE_TIMEOUT_S, self._tokens)
                    case NeedEvidence():
                        asked = action.runtime_data
                        event = await collected(collect, action)
                    case SendAttestation():
                        assert asked is not None, "evidence was asked for"
                        data = grpc_wire.pack_attest_request(self._checked(asked, action.attestation))
                        event = await _exchange(stream, data, machine, VERDICT_TIMEOUT_S, self._tokens)
                    case SendKeyRequest():
                        self._key_request = action.request
                        return action.verdict, key
                    case HaveCredentials() | Done():
                        raise RuntimeError("no key comes over the attestation stream")
                    case _:
                        assert_never(action)
                action = machine.receive(event, int(time.time()))
        finally:
            stream.cancel()

    def _verify(self, tee: Tee) -> VerifyToken:
        if self._tokens is TokenKind.KEYTURN:
            return verify_token
        from agent.handshake.rcar_token import EarVerifier  # only guests of a relay pay for its import

        return EarVerifier(tee, self._simulated)

    def _checked(self, asked: RuntimeData, attestation: Attestation) -> Attestation:
        """With what Trustee needs beside it; what it would refuse without a word is found here."""
        if self._tokens is TokenKind.KEYTURN:
            return attestation
        from agent.evidence import binding, precheck

        evidence = attestation.evidence
        wanted = binding.report_data(asked, evidence.additional_evidence)
        init_data = self._init_data
        primary = precheck.check_before_sending(evidence.primary, wanted, init_data.digest if init_data else None)
        text = init_data.document if init_data and len(init_data.document) <= MAX_INIT_DATA_BYTES else b""
        return replace(attestation, evidence=replace(evidence, primary=primary), init_data=text.decode())

    async def _credentials_once(self, machine: Handshake, request: KeyRequest, uri: Ident) -> SealedCredentials:
        method = self._connect().unary_unary(grpc_wire.RELEASE_CREDENTIALS_METHOD, bytes, bytes)
        asked = CredentialsRequest(request.request_id, request.token, uri, request.session)
        answer = await method(grpc_wire.pack_credentials_request(asked), timeout=KEY_TIMEOUT_S)
        response = grpc_wire.parse_credentials_response(answer, Ident(machine.state.value))
        action = machine.receive(response, int(time.time()))
        assert isinstance(action, HaveCredentials), "the table knows one action for credentials"
        return action.sealed

    async def _key_once(self, machine: Handshake, request: KeyRequest) -> SealedKey:
        method = self._connect().unary_unary(grpc_wire.RELEASE_KEY_METHOD, bytes, bytes)
        answer = await method(grpc_wire.pack_key_request(request), timeout=KEY_TIMEOUT_S)
        response = grpc_wire.parse_key_response(answer, Ident(machine.state.value), self._tokens)
        action = machine.receive(response, int(time.time()))
        assert isinstance(action, Done), "the table knows one action for a key"
        keys.parse_jwe(action.sealed_key.jwe)  # before the gate: what could never be opened must not cost the machine
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
        error, wait_s = await grpc_failure.translate(exc, peer, state, CONNECT_TIMEOUT_S)
        if isinstance(error, TrusteeRefusedError):
            self._refused += 1
            error.attempts = self._refused
        return error, wait_s


async def _exchange(stream: _Stream, data: bytes, machine: Handshake, limit_s: int, tokens: TokenKind) -> Event:
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
    return grpc_wire.parse_attest_response(answer, Ident(machine.state.value), tokens)


async def _write(stream: _Stream, data: bytes) -> None:
    try:
        await stream.write(data)
    except grpc.aio.AioRpcError as exc:
        # When the peer ends the stream during a write, grpc.aio loses its status and makes up INTERNAL (grpcio 1.85,
        # aio/_call.py `_write`). A broker that restarts must not look like one that failed.
        if exc.code() is grpc.StatusCode.INTERNAL:
            raise BrokerUnreachableError(Unreachable.RESET) from None
        raise
