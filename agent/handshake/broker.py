"""A key broker as the boot sees it, whatever wire it speaks, and what the shells of all wires share.

Owns the loop of attempts (which ends at the deadline, waits as `retry.py` says and tells every retry), the collection that is
never abandoned (a device request that is cut off in mid-flight can cost the guest its attestation key), and the names of what
TLS found wrong with a peer. Does not connect, send or know an order: the wires' clients and `machine.py` do.
"""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from agent.closed import Ident
from agent.errors import AgentError, BrokerIdentityError, BrokerUnreachableError, IdentityProblem, Unreachable
from agent.evidence import CompositeEvidence, RuntimeData, Tee
from agent.handshake import KeptCredentials, KeptKey, SealedCredentials, SealedKey, Verdict
from agent.handshake.machine import Collected, Expired, NeedEvidence
from agent.keys import EphemeralKey
from agent.retry import RetrySchedule

Collect = Callable[[RuntimeData], Awaitable[CompositeEvidence]]
"""Evidence over the runtime data; called once per attempt, awaited to its end even when cancelled."""
OnAttempt = Callable[[Ident, int], None]
"""Told the request id and the number of each attempt, from 1, before anything is sent."""
OnRetry = Callable[[AgentError, int, float], None]
"""Told why an attempt failed, how many have, and how many seconds the next one waits."""
OnUnaffirmed = Callable[[Ident], None]
"""Told one thing in a Trustee token that is not affirmed (`rcar.not_affirmed`)."""

_Result = TypeVar("_Result")
_Foreign = TypeVar("_Foreign", bound=Exception)


# OpenSSL x509_vfy.h, X509_V_ERR_…
_PROBLEMS = {
    9: IdentityProblem.NOT_YET_VALID,  # CERT_NOT_YET_VALID
    10: IdentityProblem.EXPIRED,  # CERT_HAS_EXPIRED
    62: IdentityProblem.NAME,  # HOSTNAME_MISMATCH
    64: IdentityProblem.NAME,  # IP_ADDRESS_MISMATCH
}


class Broker(Protocol):
    """One boot's conversation with one broker identity. Use as `async with`; not for two handshakes at a time."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None: ...

    def connect(self) -> None:
        """Begin to connect, so that `attest` finds a connection. Needs a running loop; failures show in `attest`."""

    async def attest(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt = lambda *_: None
    ) -> tuple[Verdict, EphemeralKey]:
        """Prove what this guest is.

        Args:
            key_uri: the key that will be asked for.
            tee: what `collect` collects.
            collect: as above.
            on_attempt: as above.

        Returns:
            The Verdict, and the key pair that its key will be sealed to.

        Raises:
            BrokerUnreachableError: no answer within the deadline, after every retry.
            BrokerIdentityError: somebody answered who is not the measured broker.
            RemoteProtocolError, BrokerFailureError: the broker misbehaved or failed.
            KeyReleaseDeniedError, TokenError, SimulationRefusedError: as `Handshake.receive`.
            AgentError: whatever `collect` raised.
        """

    async def release_credentials(self, verdict: Verdict, uri: Ident) -> SealedCredentials | KeptCredentials:
        """Ask for the credentials of the model's store, after the last `attest`, whose Verdict it is, and before the key.

        Args:
            verdict: what lets this guest have them.
            uri: `kbs:///repository/type/tag`, which is no key's.

        Raises:
            AgentError: as `attest`.
        """

    async def release_key(self, verdict: Verdict) -> SealedKey | KeptKey:
        """Ask for the key that `verdict` (of the last `attest`) names. Its lease runs from before this call.

        Raises:
            AgentError: as `attest`.
        """


async def retried(
    schedule: RetrySchedule,
    attempt: Callable[[], Awaitable[_Result]],
    foreign: type[_Foreign],
    translate: Callable[[_Foreign], Awaitable[tuple[AgentError, float]]],
    disconnect: Callable[[], Awaitable[None]],
    on_retry: OnRetry,
    addresses: int = 1,
) -> _Result:
    """Attempt until it succeeds, fails for good, or the schedule's time is over.

    Args:
        schedule: with its deadline on the running loop's clock.
        attempt: once.
        foreign: what an attempt raises beside AgentError and TimeoutError.
        translate: our error for it, and the seconds the broker asked us to wait at least.
        disconnect: called after each failed attempt; the next one goes to the next address.
        on_retry: as above.
        addresses: of this one broker. The others are tried at once; only when all of them failed it is time to wait.

    Raises:
        AgentError: how the last attempt ended.
    """
    clock = asyncio.get_running_loop().time
    error: AgentError | None = None
    retry = 0
    while True:
        minimum_s = 0.0
        try:
            async with asyncio.timeout_at(schedule.deadline):
                return await attempt()
        except foreign as exc:
            error, minimum_s = await translate(exc)
        except TimeoutError:
            # The deadline cut this attempt short; why an earlier one failed says more.
            error = error or BrokerUnreachableError(Unreachable.TIMEOUT)
        except AgentError as exc:
            error = exc
        if isinstance(error, BrokerUnreachableError):
            error.attempts = retry + 1
        await disconnect()
        rounds, rest = divmod(retry + 1, addresses)
        draw = 0.0 if rest else random.random()  # noqa: S311  # spreads load, guards nothing
        delay = schedule.delay(error, rounds - 1 if not rest else 0, clock(), draw, minimum_s)
        if delay is None:
            raise error  # outside the except block: a foreign exception and its text do not travel with it
        on_retry(error, retry + 1, delay)
        await asyncio.sleep(delay)
        retry += 1


async def collected(collect: Collect, need: NeedEvidence) -> Collected | Expired:
    """Evidence, or that it took longer than the Challenge lives.

    A caller that is cancelled is told so after the collection has ended.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    task = asyncio.ensure_future(collect(need.runtime_data))
    try:
        evidence = await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # cancelled once or many times: devices are never abandoned in mid-request
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not log it
        raise
    return Collected(evidence) if clock() - started < need.expires_in_s else Expired()


def tls_error(exc: ssl.SSLError) -> AgentError:
    """Who answered instead, or that the line was cut."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return BrokerIdentityError(_PROBLEMS.get(exc.verify_code, IdentityProblem.CHAIN))
    if isinstance(exc, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return BrokerUnreachableError(Unreachable.RESET)
    return BrokerIdentityError(IdentityProblem.TLS)
