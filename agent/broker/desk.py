"""Who stands behind the gRPC service: the authority in this process (`AuthorityDesk`), or a Trustee KBS (`relay.py`).

A desk gives each Hello its Challenge, judges the one Attestation over it, and answers key requests. It knows no wire and no
limits, those are `service.py`'s, and records what it decides before it answers.
"""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from agent.broker.audit import AuditStep
from agent.broker.authority import Asked, Authority
from agent.closed import Ident
from agent.evidence import NONCE_BYTES, Nonce
from agent.handshake import (
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TokenKind,
)
from agent.handshake.grpc_status import Failure

CHALLENGE_LIFE_S = 300
VERIFIER_THREADS = 4
RELEASE_THREADS = 2
"""Beside those: who has a verdict waits 30 s for its key, and not behind a thousand guests that want a verdict."""

_Result = TypeVar("_Result")


class UpstreamFailedError(Exception):
    """Instead of an answer: what the guest is told, but for its request id. For what stands behind a relay."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Open(Protocol):
    """One Challenge that waits for its Attestation. It lives in its stream and nowhere else."""

    @property
    def challenge(self) -> Challenge: ...

    async def attest(self, attestation: Attestation) -> Accepted | Denied:
        """Judge the Attestation over this Challenge, once.

        Raises:
            AgentError, UpstreamFailedError: there is no verdict. The service has it recorded.
        """


class Desk(Protocol):
    @property
    def tokens(self) -> TokenKind:
        """Whose tokens it gives and takes."""

    async def open(self, hello: Hello) -> Open:
        """A fresh Challenge. Raises as `Open.attest`."""

    async def release(self, request: KeyRequest) -> KeyResponse:
        """The key, sealed to the guest; recorded here, whatever comes of it.

        Raises:
            AgentError, UpstreamFailedError: no key.
        """

    async def release_credentials(self, request: CredentialsRequest) -> CredentialsResponse:
        """The credentials of the model's store, as `release`."""

    async def record_failure(self, step: AuditStep, asked: Asked | None, reason: Ident) -> None:
        """As `Authority.record_failure`."""

    def close(self) -> None:
        """Let go of threads and connections, when no call is left."""


class AuthorityDesk:
    """The authority in this process. Signatures take milliseconds of CPU and the audit log waits for the disk: neither may stop
    the other streams, so both happen in threads.
    """  # fmt: skip

    tokens = TokenKind.KEYTURN

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._verifiers = ThreadPoolExecutor(VERIFIER_THREADS, "verifier")
        self._releases = ThreadPoolExecutor(RELEASE_THREADS, "release")

    async def open(self, hello: Hello) -> "_OwnNonce":
        return _OwnNonce(self, hello)

    async def attest(self, hello: Hello, attestation: Attestation, nonce: Nonce) -> Accepted | Denied:
        return await _in_thread(self._verifiers, self._authority.attest, hello, attestation, nonce)

    async def release(self, request: KeyRequest) -> KeyResponse:
        return await _in_thread(self._releases, self._authority.release, request)

    async def release_credentials(self, request: CredentialsRequest) -> CredentialsResponse:
        return await _in_thread(self._releases, self._authority.release_credentials, request)

    async def record_failure(self, step: AuditStep, asked: Asked | None, reason: Ident) -> None:
        await _in_thread(self._releases, self._authority.record_failure, step, asked, reason)

    def close(self) -> None:
        self._verifiers.shutdown()
        self._releases.shutdown()


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[..., _Result], *args: object) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *args)


class _OwnNonce:
    def __init__(self, desk: AuthorityDesk, hello: Hello) -> None:
        self._desk, self._hello = desk, hello
        self.challenge = Challenge(hello.request_id, Nonce(secrets.token_bytes(NONCE_BYTES)), CHALLENGE_LIFE_S)

    async def attest(self, attestation: Attestation) -> Accepted | Denied:
        return await self._desk.attest(self._hello, attestation, self.challenge.nonce)
