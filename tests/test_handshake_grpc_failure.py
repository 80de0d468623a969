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
    IdentityProblem,
    ProtocolProblem,
    RemoteProtocolError,
    Unreachable,
)
from agent.handshake.grpc_failure import Peer, check_peer, translate
from agent.handshake.grpc_status import DETAILS_KEY, Failure, pack_failure
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
        (Code.PERMISSION_DENIED, BrokerFailureError, 7),
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


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
def test_a_broker_that_says_when_to_come_back_is_overloaded(code: grpc.StatusCode) -> None:
    number: int = code.value[0]
    got, wait_s = translated(failed(code, Failure(number, Ident("BUSY"), None, 2.5)))
    assert isinstance(got, BrokerUnreachableError)
    assert (got.reason, wait_s) == (Unreachable.OVERLOADED, 2.5)


@pytest.mark.parametrize("code", [Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.INTERNAL, Code.FAILED_PRECONDITION])
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
        (IdentityProblem.VALIDITY, certificate("broker.test", (-3, -2), CA)),
        (IdentityProblem.VALIDITY, certificate("broker.test", (2, 3), CA)),
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
