"""The gRPC client against a real grpc.aio server with TLS made here: how every failure is named, and what is retried."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerIdentityError,
    BrokerUnreachableError,
    DenialReason,
    DeviceError,
    IdentityProblem,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, Evidence, Nonce, RuntimeData, Tee
from agent.handshake import Accepted, Attestation, Challenge, Denied, Hello, KeyResponse, SealedKey, Verdict
from agent.handshake import grpc_status as status
from agent.handshake import grpc_wire as wire
from agent.handshake.broker import Collect
from agent.handshake.grpc_client import GrpcBroker
from agent.handshake.machine import MAX_CHALLENGES, Trust
from agent.keys import EphemeralKey, open_jwe
from tests.hostile_broker import (
    AUTHORITY,
    CA,
    LEAF,
    NAME,
    SERVER,
    URI,
    Broker,
    Reads,
    Stream,
    challenge,
    fails,
    refuses_key,
    says,
    served,
)
from tests.tls import Signer, certificate, pem

TRUST = Trust((AUTHORITY.public_key(),), allow_simulation=False)
EVIDENCE = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184), "")
OTHER_CA = certificate("other CA")


async def collect(data: RuntimeData) -> CompositeEvidence:
    return EVIDENCE


async def boot(
    *endpoints: str, timeout_s: float = 20, ca: Signer = CA, name: str = NAME, collect: Collect = collect
) -> tuple[Verdict, SealedKey, EphemeralKey]:
    async with GrpcBroker(endpoints, pem(ca).decode(), name, TRUST, timeout_s) as broker:
        verdict, key = await broker.attest(URI, Tee.SNP, collect)
        return verdict, await broker.release_key(verdict), key


def failure_of(broker: Broker, leaf: Signer = LEAF, timeout_s: float = 20, ca: Signer = CA, name: str = NAME) -> AgentError:
    async def run() -> AgentError:
        async with served(broker, leaf) as endpoint:
            with pytest.raises(AgentError) as raised:
                await boot(endpoint, timeout_s=timeout_s, ca=ca, name=name)
            assert raised.value.__cause__ is None
            assert not isinstance(raised.value.__context__, grpc.RpcError)  # no text of gRPC or the peer travels along
            return raised.value

    return asyncio.run(run())


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# --- the good case ------------------------------------------------------------------------------------------------------


def test_a_key_is_released_over_evidence_for_this_nonce_and_key() -> None:
    broker = Broker()
    asked: list[RuntimeData] = []

    async def collecting(data: RuntimeData) -> CompositeEvidence:
        asked.append(data)
        return EVIDENCE

    async def run() -> tuple[Verdict, SealedKey, EphemeralKey]:
        async with served(broker) as endpoint:
            return await boot(endpoint, collect=collecting)

    verdict, sealed, key = asyncio.run(run())
    opened = bytearray(32)
    open_jwe(sealed.jwe, key, memoryview(opened))
    assert (bytes(opened), sealed.key_id, sealed.key_version) == (broker.key, "id-1", 7)
    assert verdict.claims.tee_pubkey == key.public
    assert asked == [RuntimeData(verdict.claims.nonce, key.public.x, key.public.y)]
    assert broker.seen == [
        Hello(verdict.request_id, URI, Tee.SNP),
        Attestation(verdict.request_id, key.public, EVIDENCE),
    ]


def test_the_address_is_only_a_hint_and_dead_ones_are_passed_over_at_once() -> None:
    async def run() -> float:
        async with served(Broker()) as endpoint:
            started = time.monotonic()
            await boot(closed_port(), closed_port(), endpoint)
            return time.monotonic() - started

    assert asyncio.run(run()) < 5


# --- who answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (IdentityProblem.CHAIN, {"ca": OTHER_CA}),
        (IdentityProblem.NAME, {"name": "other.test"}),
        (IdentityProblem.EXPIRED, {"leaf": certificate(NAME, (-3, -2), CA)}),
        (IdentityProblem.NOT_YET_VALID, {"leaf": certificate(NAME, (2, 3), CA)}),
        (IdentityProblem.CHAIN, {"leaf": certificate(NAME)}),
    ],
)
def test_somebody_else_answering_is_an_identity_error_and_final(problem: IdentityProblem, options: dict[str, object]) -> None:
    broker = Broker()
    error = failure_of(broker, **options)  # type: ignore[arg-type]
    assert isinstance(error, BrokerIdentityError)
    assert error.problem is problem
    assert broker.seen == []


def test_a_server_without_tls_is_an_identity_error() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(http, "127.0.0.1", 0) as server:
            await boot("{}:{}".format(*server.sockets[0].getsockname()))

    with pytest.raises(BrokerIdentityError) as raised:
        asyncio.run(run())
    assert raised.value.problem is IdentityProblem.TLS


# --- nobody answers -----------------------------------------------------------------------------------------------------


def unreachable(endpoint: str, timeout_s: float = 0.3) -> BrokerUnreachableError:
    with pytest.raises(BrokerUnreachableError) as raised:
        asyncio.run(boot(endpoint, timeout_s=timeout_s))
    return raised.value


def test_refused_connections_are_retried_until_the_deadline() -> None:
    error = unreachable(closed_port(), timeout_s=1.5)
    assert error.reason is Unreachable.REFUSED
    assert error.attempts > 1


def test_a_name_that_does_not_resolve_is_named() -> None:
    assert unreachable("nowhere.invalid:443").reason is Unreachable.NAME


def test_a_peer_that_hangs_up_is_named() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            await boot("{}:{}".format(*server.sockets[0].getsockname()), timeout_s=0.3)

    with pytest.raises(BrokerUnreachableError) as raised:
        asyncio.run(run())
    assert raised.value.reason is Unreachable.RESET


def test_at_the_deadline_the_reason_of_the_earlier_attempt_is_told() -> None:
    connections = 0

    async def hang_up_twice_then_be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            if connections > 2:  # the call, and the second look at why it failed
                await asyncio.Event().wait()
        finally:
            writer.close()

    async def run() -> None:
        async with await asyncio.start_server(hang_up_twice_then_be_silent, "127.0.0.1", 0) as server:
            await boot("{}:{}".format(*server.sockets[0].getsockname()), timeout_s=1.5)

    with pytest.raises(BrokerUnreachableError) as raised:
        asyncio.run(run())
    assert (raised.value.reason, raised.value.attempts) == (Unreachable.RESET, 2)


def test_a_peer_that_never_speaks_is_a_timeout_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = unreachable("{}:{}".format(*silent.getsockname()))
    assert (error.reason, error.attempts) == (Unreachable.TIMEOUT, 1)


# --- the broker fails ---------------------------------------------------------------------------------------------------


def test_a_failure_of_the_broker_is_final_and_carries_its_closed_reason() -> None:
    broker = Broker([fails(grpc.StatusCode.NOT_FOUND, status.Failure(5, Ident("NO_ROW"), None))])
    error = failure_of(broker)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (5, "NO_ROW")
    assert "peer" not in str(error)


def test_a_failure_without_details_is_unspecified() -> None:
    error = failure_of(Broker([fails(grpc.StatusCode.INTERNAL)]))
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (13, "unspecified")


def test_a_service_that_is_no_key_broker_is_a_version_problem() -> None:
    error = failure_of(Broker([fails(grpc.StatusCode.UNIMPLEMENTED)]))
    assert isinstance(error, RemoteProtocolError)
    assert error.problem is ProtocolProblem.VERSION


def test_an_overloaded_broker_is_asked_again_when_it_said_with_a_whole_new_handshake() -> None:
    busy = status.Failure(14, Ident("OVERLOADED"), None, 0.2)
    broker = Broker(
        [fails(grpc.StatusCode.UNAVAILABLE, busy), says(challenge)], [refuses_key(grpc.StatusCode.UNAVAILABLE, busy)]
    )
    broker.attests[1] = Broker().good

    async def run() -> tuple[float, Verdict]:
        async with served(broker) as endpoint:
            started = time.monotonic()
            verdict, _, _ = await boot(endpoint)
            return time.monotonic() - started, verdict

    waited, _ = asyncio.run(run())
    assert waited >= 0.4  # once for the Verdict, once for the key
    assert broker.keys_asked == 2


def test_an_overloaded_broker_whose_delay_ends_after_the_deadline_is_given_up_at_once() -> None:
    broker = Broker([fails(grpc.StatusCode.UNAVAILABLE, status.Failure(14, Ident("OVERLOADED"), None, 3600.0))])
    error = failure_of(broker)
    assert isinstance(error, BrokerUnreachableError)
    assert (error.reason, error.attempts) == (Unreachable.OVERLOADED, 1)


def test_every_attempt_has_its_own_request_id_nonce_and_key() -> None:
    first, asked = Broker(), list[RuntimeData]()

    async def lost(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        async for answer in first.good(requests, context):
            yield answer
            if first.seen:
                await context.abort(grpc.StatusCode.UNAVAILABLE)

    async def collecting(data: RuntimeData) -> CompositeEvidence:
        asked.append(data)
        return EVIDENCE

    broker = Broker([lost])

    async def run() -> None:
        async with served(broker) as endpoint:
            await boot(endpoint, collect=collecting)

    asyncio.run(run())
    assert first.seen[0].request_id != broker.seen[0].request_id
    assert len({data.public_key_x for data in asked}) == len(asked) == 2


def test_a_broker_that_goes_away_while_evidence_is_collected_or_sent_is_tried_again() -> None:
    async def going(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        yield challenge(wire.parse_attest_request(await anext(requests), SERVER))
        await context.abort(grpc.StatusCode.UNAVAILABLE)

    def collecting_for(turns: int) -> Collect:
        async def collecting(data: RuntimeData) -> CompositeEvidence:
            for _ in range(turns):  # of the loop that also carries the stream: from "not yet heard of" to "long over"
                await asyncio.sleep(0)
            return EVIDENCE

        return collecting

    async def run() -> None:
        for turns in (0, 1, 3, 10, 30, 100, 1000):
            broker = Broker([going])
            async with served(broker) as endpoint:
                await boot(endpoint, collect=collecting_for(turns))
            assert len(broker.seen) == 2

    asyncio.run(run())


def test_a_challenge_that_aged_while_evidence_was_collected_is_replaced_on_the_same_stream() -> None:
    class Clock(asyncio.SelectorEventLoop):
        ahead_s = 0.0

        def time(self) -> float:
            return super().time() + self.ahead_s

    broker, clock = Broker(), Clock()
    asked: list[Nonce] = []

    async def collecting(data: RuntimeData) -> CompositeEvidence:
        asked.append(data.nonce)
        clock.ahead_s += 180.0 if len(asked) == 1 else 170.0
        return EVIDENCE

    async def run() -> Verdict:
        async with served(broker) as endpoint:
            return (await boot(endpoint, timeout_s=1000, collect=collecting))[0]

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        verdict = runner.run(run())
    assert [type(message) for message in broker.seen] == [Hello, Hello, Attestation]
    assert {message.request_id for message in broker.seen} == {verdict.request_id}
    assert asked[0] != asked[1] == verdict.claims.nonce


def test_a_broker_that_never_comes_to_a_verdict_is_asked_for_so_many_challenges_in_all_attempts() -> None:
    """On one stream, because the devices were too slow, and in an attempt each, because the broker went away."""

    class Clock(asyncio.SelectorEventLoop):
        ahead_s = 0.0

        def time(self) -> float:
            return super().time() + self.ahead_s

    async def going(requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        yield challenge(wire.parse_attest_request(await anext(requests), SERVER))
        await anext(requests)
        await context.abort(grpc.StatusCode.UNAVAILABLE)

    broker, clock, asked = Broker(), Clock(), 0
    broker.attests = [broker.good, *[going] * MAX_CHALLENGES]
    on_the_stream = MAX_CHALLENGES - 2

    async def collecting(_: RuntimeData) -> CompositeEvidence:
        nonlocal asked
        asked += 1
        if asked < on_the_stream:
            clock.ahead_s += 180.0
        elif asked == on_the_stream:
            raise BrokerUnreachableError(Unreachable.RESET)  # the stream of the first attempt ends
        return EVIDENCE

    async def run() -> None:
        async with served(broker) as endpoint:
            await boot(endpoint, timeout_s=100_000, collect=collecting)

    with asyncio.Runner(loop_factory=lambda: clock) as runner, pytest.raises(RemoteProtocolError) as raised:
        runner.run(run())
    assert raised.value.problem is ProtocolProblem.TOO_MANY_CHALLENGES
    assert asked == MAX_CHALLENGES


def test_a_denial_is_final() -> None:
    denied = Denied(Ident("r"), DenialReason.CLAIM, Ident("snp.measurement"), Ident("rv"), Ident("p1"))

    def deny(request: Hello | Attestation) -> bytes:
        fields = (denied.reason, denied.claim, denied.reference_value_id, denied.policy_version)
        return wire.pack_attest_response(Denied(request.request_id, *fields))

    broker = Broker([says(challenge, deny)])
    error = failure_of(broker)
    assert isinstance(error, KeyReleaseDeniedError)
    assert (error.reason, error.claim) == (DenialReason.CLAIM, "snp.measurement")
    assert broker.seen == []  # no second attempt


# --- the broker misbehaves ----------------------------------------------------------------------------------------------


def other_request(request: Hello | Attestation) -> bytes:
    return wire.pack_attest_response(Challenge(Ident("other"), Nonce(b"n" * 32), 180))


def early_verdict(request: Hello | Attestation) -> bytes:
    return wire.pack_attest_response(Accepted(request.request_id, "a.b.c", Ident("p1"), ()))


def key_instead(request: Hello | Attestation) -> bytes:
    return wire.pack_key_response(KeyResponse(request.request_id, b"{}", Ident("id"), 1))


def oversized(request: Hello | Attestation) -> bytes:
    return challenge(request) + b"\x9a\x06\x80\x80\x80\x01" + bytes(2 << 20)


def test_an_unknown_field_changes_nothing() -> None:
    broker = Broker([says(lambda request: challenge(request) + b"\x9a\x06\x03new")])
    error = failure_of(broker)
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.state) == (ProtocolProblem.CLOSED, "AWAIT_VERDICT")  # it went on, to this broker's end


@pytest.mark.parametrize(
    ("problem", "state", "answers"),
    [
        (ProtocolProblem.CLOSED, "AWAIT_CHALLENGE", ()),
        (ProtocolProblem.CLOSED, "AWAIT_VERDICT", (challenge,)),
        (ProtocolProblem.REQUEST_ID, "AWAIT_CHALLENGE", (other_request,)),
        (ProtocolProblem.UNEXPECTED_MESSAGE, "AWAIT_CHALLENGE", (early_verdict,)),
        (ProtocolProblem.UNEXPECTED_MESSAGE, "AWAIT_VERDICT", (challenge, challenge)),
        (ProtocolProblem.MALFORMED, "AWAIT_CHALLENGE", (lambda _: b"\xff",)),
        (ProtocolProblem.MALFORMED, "AWAIT_CHALLENGE", (key_instead,)),
        (ProtocolProblem.OVERSIZED, "AWAIT_CHALLENGE", (oversized,)),
    ],
)
def test_a_broker_out_of_order_is_a_protocol_error_and_final(
    problem: ProtocolProblem, state: str, answers: tuple[Callable[[Hello | Attestation], bytes], ...]
) -> None:
    broker = Broker([says(*answers)])
    error = failure_of(broker)
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.state) == (problem, state)
    assert broker.seen == []  # no second attempt


def test_a_verdict_without_the_authoritys_signature_is_a_token_error() -> None:
    assert isinstance(failure_of(Broker([says(challenge, early_verdict)])), TokenError)


# --- the key ------------------------------------------------------------------------------------------------------------


def test_a_denied_key_is_the_denial_that_a_verdict_would_have_been() -> None:
    denial = status.Denial(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("p2"))
    failure = status.Failure(7, Ident("POLICY_REVOKED"), None, 0.0, denial)
    broker = Broker(releases=[refuses_key(grpc.StatusCode.PERMISSION_DENIED, failure)])
    error = failure_of(broker)
    assert isinstance(error, KeyReleaseDeniedError)
    assert (error.reason, error.claim, error.policy_version) == (DenialReason.POLICY, "policy.revoked", "p2")
    assert broker.keys_asked == 1


def test_a_key_store_that_is_down_is_asked_again_until_it_is_there_or_the_deadline_tells_its_name() -> None:
    down = refuses_key(grpc.StatusCode.UNAVAILABLE, status.Failure(14, Ident("KEY_STORE_IO"), None, 0.1))
    broker = Broker(releases=[down, down])

    async def run() -> None:
        async with served(broker) as endpoint:
            await boot(endpoint)

    asyncio.run(run())
    assert (broker.keys_asked, len(broker.seen)) == (3, 2)  # one attestation

    error = failure_of(Broker(releases=[down] * 99), timeout_s=1.0)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (14, "KEY_STORE_IO")


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION]
)
def test_a_refused_key_is_final(code: grpc.StatusCode) -> None:
    number: int = code.value[0]
    broker = Broker(releases=[refuses_key(code, status.Failure(number, Ident("TOKEN"), None, 0.0))])
    error = failure_of(broker)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (number, "TOKEN")
    assert broker.keys_asked == 1


def test_a_key_for_another_request_is_a_protocol_error() -> None:
    async def other(data: bytes, context: Stream) -> bytes:
        return wire.pack_key_response(KeyResponse(Ident("other"), b"{}", Ident("id"), 1))

    error = failure_of(Broker(releases=[other]))
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.state) == (ProtocolProblem.REQUEST_ID, "AWAIT_KEY")


def test_a_lost_key_request_is_repeated_with_the_same_token() -> None:
    broker = Broker(releases=[refuses_key(grpc.StatusCode.UNAVAILABLE)])

    async def run() -> SealedKey:
        async with served(broker) as endpoint:
            return (await boot(endpoint))[1]

    assert asyncio.run(run()).key_version == 7
    assert broker.keys_asked == 2
    assert len(broker.seen) == 2  # one Hello, one Attestation


def test_a_key_is_asked_for_only_after_its_attestation() -> None:
    async def run() -> None:
        async with served(Broker()) as endpoint:
            verdict, _, _ = await boot(endpoint)
            async with GrpcBroker([endpoint], pem(CA).decode(), NAME, TRUST, 20) as stranger:
                await stranger.release_key(verdict)

    with pytest.raises(RuntimeError):
        asyncio.run(run())


# --- the devices --------------------------------------------------------------------------------------------------------


def test_an_error_of_the_devices_is_theirs_and_is_not_retried() -> None:
    calls = 0

    async def broken(data: RuntimeData) -> CompositeEvidence:
        nonlocal calls
        calls += 1
        raise DeviceError(Ident("sev-guest"), Ident("SNP_GET_REPORT"), 5)

    async def run() -> None:
        async with served(Broker()) as endpoint:
            await boot(endpoint, collect=broken)

    with pytest.raises(DeviceError):
        asyncio.run(run())
    assert calls == 1


def test_a_cancelled_boot_waits_for_the_device_however_often_it_is_cancelled() -> None:
    async def run() -> list[str]:
        story, begun, may_end = list[str](), asyncio.Event(), asyncio.Event()

        async def slow(data: RuntimeData) -> CompositeEvidence:
            begun.set()
            await may_end.wait()
            story.append("device done")
            return EVIDENCE

        async with served(Broker()) as endpoint:
            task = asyncio.create_task(boot(endpoint, collect=slow))
            await begun.wait()
            for _ in range(3):
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
            assert not task.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            story.append("boot done")
        return story

    assert asyncio.run(run()) == ["device done", "boot done"]


def test_the_deadline_does_not_abandon_the_device_either() -> None:
    async def run() -> bool:
        finished = False

        async def slow(data: RuntimeData) -> CompositeEvidence:
            nonlocal finished
            while not task.cancelling():  # until the deadline has passed
                await asyncio.sleep(0)
            finished = True
            return EVIDENCE

        async with served(Broker()) as endpoint:
            task = asyncio.create_task(boot(endpoint, timeout_s=0.5, collect=slow))
            with pytest.raises(BrokerUnreachableError):
                await task
        return finished

    assert asyncio.run(run())
