"""What a failed gRPC call was: the status, the broker's own words about it, and TLS where gRPC only says UNAVAILABLE.

gRPC tells a refused connection, a foreign CA, a wrong name and an expired certificate apart in prose only (grpcio 1.85:
all are UNAVAILABLE, measured). So an unavailable endpoint is asked once more with a plain TLS handshake under the same
CA and name: deterministic answers where the cause is still there, and a retryable one where it is gone.
`doctor` asks the same way. Imported only when a call failed.
"""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    Unreachable,
)
from agent.handshake import grpc_status
from agent.handshake.broker import tls_error

_UNSPECIFIED = Ident("unspecified")


@dataclass(frozen=True, slots=True)
class Peer:
    """An address (`host:port`, a hint) and the identity that must answer there (measured)."""

    endpoint: str
    ca_pem: str
    server_name: str


async def translate(exc: grpc.aio.AioRpcError, peer: Peer, state: Ident, timeout_s: float) -> tuple[AgentError, float]:
    """Our error for a failed call, and the seconds the broker asked us to wait at least.

    Args:
        exc: what gRPC raised; its text is dropped, because a peer can write it.
        peer: whom we called.
        state: the handshake's state, for the error.
        timeout_s: for looking at the endpoint again.
    """
    code = exc.code()
    status: int = code.value[0]
    trailing: Any = exc.trailing_metadata() or ()  # pairs; the stubs say otherwise
    details = next((value for key, value in trailing if key == grpc_status.DETAILS_KEY), None)
    failure = grpc_status.parse_failure(details, status) if isinstance(details, bytes) else None
    wait_s = 0.0

    error: AgentError
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED if failure is not None and failure.retry_after_s is not None:
            error, wait_s = BrokerUnreachableError(Unreachable.OVERLOADED), failure.retry_after_s
        case grpc.StatusCode.UNAVAILABLE if failure is not None:
            # Somebody behind the measured name says what is wrong: too many guests, or a part of the broker that is down.
            overloaded = failure.reason == grpc_status.OVERLOADED
            error = BrokerUnreachableError(Unreachable.OVERLOADED) if overloaded else BrokerFailureError(status, failure.reason)
            wait_s = failure.retry_after_s or 0.0
        case grpc.StatusCode.PERMISSION_DENIED:
            error = _denied(failure)
        case grpc.StatusCode.UNAVAILABLE:
            error = await _look_again(peer, timeout_s)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            error = BrokerUnreachableError(Unreachable.TIMEOUT)
        case grpc.StatusCode.CANCELLED:  # reset by the peer or a proxy; when we cancel, it is a CancelledError
            error = BrokerUnreachableError(Unreachable.RESET)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if failure is None:  # gRPC's own message limit, on either side
            error = RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
        case grpc.StatusCode.UNIMPLEMENTED if failure is None:  # a gRPC server, but no key broker of this version
            error = RemoteProtocolError(ProtocolProblem.VERSION, state)
        case _:
            error = BrokerFailureError(status, failure.reason if failure else _UNSPECIFIED)
    return error, wait_s


def _denied(failure: grpc_status.Failure | None) -> KeyReleaseDeniedError:
    """Final in whatever words: a gateway that stands in for the broker, or a broker of another make, has its own."""
    if failure is not None and (denial := failure.denial) is not None:
        return KeyReleaseDeniedError(denial.reason, denial.claim, denial.reference_value_id, denial.policy_version)
    word = failure.reason if failure is not None else _UNSPECIFIED
    return KeyReleaseDeniedError(DenialReason.UNSPECIFIED, word, None, _UNSPECIFIED)


async def _look_again(peer: Peer, timeout_s: float) -> AgentError:
    try:
        await check_peer(peer, timeout_s)
    except AgentError as error:
        return error
    return BrokerUnreachableError(Unreachable.RESET)  # it answers now: the cause is gone


async def check_peer(peer: Peer, timeout_s: float) -> None:
    """Connect, and let whoever answers prove the measured identity; nothing else is said.

    Raises:
        BrokerUnreachableError: nobody answers within `timeout_s`.
        BrokerIdentityError: somebody else does.
    """
    host, _, port = peer.endpoint.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: the measured CA need not be self-signed
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=peer.ca_pem)
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), port, ssl=context, server_hostname=peer.server_name)
        writer.transport.abort()
    except ssl.SSLError as exc:
        raise tls_error(exc) from None
    except ConnectionResetError:
        raise BrokerUnreachableError(Unreachable.RESET) from None
    except ConnectionRefusedError:
        raise BrokerUnreachableError(Unreachable.REFUSED) from None
    except socket.gaierror:
        raise BrokerUnreachableError(Unreachable.NAME) from None
    except OSError:  # TimeoutError, no route
        raise BrokerUnreachableError(Unreachable.TIMEOUT) from None
