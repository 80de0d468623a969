"""Which of our errors a failed call is; the client's tests see the same through real calls."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
    IdentityProblem,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.handshake.grpc_failure import Peer, check_peer, translate
from agent.handshake.grpc_status import DETAILS_KEY, Denial, Failure, pack_failure, reason_of
from tests.tls import Signer, certificate, key_pem, pem

STATE = Ident("AWAIT_X")
CA = certificate("test CA")
NOBODY = Peer("127.0.0.1:1", pem(CA).decode(), "broker.test")
Code = grpc.StatusCode


def failed(code: grpc.StatusCode, failure: Failure | None = None) -> grpc.aio.AioRpcError:
    details = ((DETAILS_KEY, pack_failure(failure)),) if failure else ()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), "a peer's text", None)


def translated(exc: grpc.aio.AioRpcError, peer: Peer = NOBODY) -> tuple[AgentError, float]:
    return asyncio.run(translate(exc, peer, STATE, 5.0))


@pytest.mark.parametrize(
    ("code", "error", "field"),
    [
        (Code.DEADLINE_EXCEEDED, BrokerUnreachableError, Unreachable.TIMEOUT),
        (Code.CANCELLED, BrokerUnreachableError, Unreachable.RESET),
        (Code.UNAVAILABLE, BrokerUnreachableError, Unreachable.REFUSED),  # nobody listens when asked again
        (Code.RESOURCE_EXHAUSTED, RemoteProtocolError, ProtocolProblem.OVERSIZED),
        (Code.UNIMPLEMENTED, RemoteProtocolError, ProtocolProblem.VERSION),
        (Code.PERMISSION_DENIED, KeyReleaseDeniedError, DenialReason.UNSPECIFIED),
        (Code.UNAUTHENTICATED, BrokerFailureError, 16),
        (Code.INTERNAL, BrokerFailureError, 13),
        (Code.UNKNOWN, BrokerFailureError, 2),
    ],
)
def test_a_bare_status_has_one_meaning(code: grpc.StatusCode, error: type[AgentError], field: object) -> None:
    got, wait_s = translated(failed(code))
    assert type(got) is error
    assert field in vars(got).values()
    assert wait_s == 0.0
    assert "peer" not in str(got)


@pytest.mark.parametrize(("code", "word"), [(Code.UNAVAILABLE, "OVERLOADED"), (Code.RESOURCE_EXHAUSTED, "BUSY")])
def test_a_broker_with_too_many_guests_is_overloaded(code: grpc.StatusCode, word: str) -> None:
    number: int = code.value[0]
    got, wait_s = translated(failed(code, Failure(number, Ident(word), None, 2.5)))
    assert isinstance(got, BrokerUnreachableError)
    assert (got.reason, wait_s) == (Unreachable.OVERLOADED, 2.5)


@pytest.mark.parametrize("refusal", TrusteeRefusal)
@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.FAILED_PRECONDITION, Code.UNAUTHENTICATED, Code.RESOURCE_EXHAUSTED])
def test_what_a_trustee_behind_a_relay_refused_is_told_as_over_its_own_wire(
    refusal: TrusteeRefusal, code: grpc.StatusCode
) -> None:
    got, wait_s = translated(failed(code, Failure(code.value[0], reason_of(refusal), None, 3.0)))
    assert isinstance(got, TrusteeRefusedError)
    assert (got.refusal, wait_s) == (refusal, 3.0)


def test_a_denial_stays_one_whatever_its_reason_and_a_refusal_that_nobody_knows_is_a_failure() -> None:
    got, _ = translated(failed(Code.PERMISSION_DENIED, Failure(7, reason_of(TrusteeRefusal.ATTESTATION), None, 3.0)))
    assert isinstance(got, KeyReleaseDeniedError)
    got, _ = translated(failed(Code.FAILED_PRECONDITION, Failure(9, Ident("TRUSTEE_OF_TOMORROW"))))
    assert isinstance(got, BrokerFailureError) and not got.retryable


def test_a_part_of_the_broker_that_is_down_is_no_overload_and_keeps_its_name() -> None:
    got, wait_s = translated(failed(Code.UNAVAILABLE, Failure(14, Ident("KEY_STORE_IO"), None, 2.5)))
    assert isinstance(got, BrokerFailureError)
    assert (got.status, got.reason, got.retryable, wait_s) == (14, "KEY_STORE_IO", True, 2.5)


@pytest.mark.parametrize(
    ("denial", "fields"),
    [
        (
            Denial(DenialReason.CLAIM, Ident("snp.tcb"), Ident("tcb-1"), Ident("7")),
            (DenialReason.CLAIM, "snp.tcb", "tcb-1", "7"),
        ),
        (None, (DenialReason.UNSPECIFIED, "SNP_TCB", None, "unspecified")),
    ],
)
def test_a_denied_key_is_a_denial_and_final(denial: Denial | None, fields: tuple[object, ...]) -> None:
    got, wait_s = translated(failed(Code.PERMISSION_DENIED, Failure(7, Ident("SNP_TCB"), None, 0.0, denial)))
    assert isinstance(got, KeyReleaseDeniedError)
    assert (got.reason, got.claim, got.reference_value_id, got.policy_version) == fields
    assert (got.exit_status, got.retryable, wait_s) == (16, False, 0.0)


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.INTERNAL, Code.FAILED_PRECONDITION])
def test_a_refusal_stays_final_even_when_it_names_a_delay(code: grpc.StatusCode) -> None:
    number: int = code.value[0]
    got, wait_s = translated(failed(code, Failure(number, Ident("REFUSED"), None, 0.0)))
    assert isinstance(got, BrokerFailureError)
    assert (got.status, got.reason, wait_s) == (number, "REFUSED", 0.0)
    assert not got.retryable


@asynccontextmanager
async def listening(directory: Path, leaf: Signer) -> AsyncIterator[str]:
    (directory / "pair.pem").write_bytes(key_pem(leaf) + pem(leaf))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "pair.pem")

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        yield "{}:{}".format(*server.sockets[0].getsockname())


@pytest.mark.parametrize(
    ("problem", "leaf"),
    [
        (IdentityProblem.CHAIN, certificate("broker.test")),
        (IdentityProblem.CHAIN, certificate("broker.test", signer=certificate("test CA"))),  # the name of our CA, another key
        (IdentityProblem.NAME, certificate("other.test", signer=CA)),
        (IdentityProblem.EXPIRED, certificate("broker.test", (-3, -2), CA)),
        (IdentityProblem.NOT_YET_VALID, certificate("broker.test", (2, 3), CA)),
    ],
)
def test_an_unavailable_endpoint_is_asked_who_it_is(tmp_path: Path, problem: IdentityProblem, leaf: Signer) -> None:
    async def run() -> AgentError:
        async with listening(tmp_path, leaf) as endpoint:
            peer = Peer(endpoint, pem(CA).decode(), "broker.test")
            return (await translate(failed(Code.UNAVAILABLE), peer, STATE, 5.0))[0]

    got = asyncio.run(run())
    assert isinstance(got, BrokerIdentityError)
    assert got.problem is problem


def test_the_measured_broker_that_answers_again_is_worth_another_attempt(tmp_path: Path) -> None:
    async def run() -> AgentError:
        async with listening(tmp_path, certificate("broker.test", signer=CA)) as endpoint:
            peer = Peer(endpoint, pem(CA).decode(), "broker.test")
            return (await translate(failed(Code.UNAVAILABLE), peer, STATE, 5.0))[0]

    got = asyncio.run(run())
    assert isinstance(got, BrokerUnreachableError)
    assert got.reason is Unreachable.RESET


def test_the_measured_broker_proves_its_identity_and_is_asked_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path, certificate("broker.test", signer=CA)) as endpoint:
            await check_peer(Peer(endpoint, pem(CA).decode(), "broker.test"), 5.0)

    asyncio.run(run())
