"""The desk of a relay (`keyturn broker --upstream`): guests speak gRPC to us, and an unmodified Trustee KBS decides.

Each stream has a session of its own at the KBS, whose nonce its Challenge carries. Evidence goes on in Trustee's form, and
attestation token and sealed key come back as they are. So nothing is decided here, nothing is opened, and nobody has to
trust us: the guest verifies the token under its pinned keys, and the key by the manifest's commitment. We keep no state: the
session's cookie goes to the guest beside the token and comes back with the key request, to whichever replica serves it, because
a token of eight GPUs is larger than the header it would have to stand in.

What the KBS refuses becomes a failure with its reason (`failure_of`); a policy's denial stays one. The guest's request id
goes to the KBS as `X-Request-Id` and into our audit log.
Follows confidential-containers/trustee 78962cd through `handshake/rcar.py`, which has its messages and refusals.
"""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

import grpc

from agent.broker.audit import AuditLog, AuditRecord, AuditStep, Decision, timestamp
from agent.broker.authority import Asked, uri_of
from agent.broker.desk import UpstreamFailedError
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerIdentityError,
    BrokerUnreachableError,
    KeyReleaseDeniedError,
    MalformedEvidenceError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import NONCE_BYTES, BindingHash, Nonce
from agent.handshake import (
    MAX_JWE_BYTES,
    MAX_SESSION_BYTES,
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    CredentialsResponse,
    Hello,
    KeyRequest,
    KeyResponse,
    TokenKind,
    rcar,
)
from agent.handshake.ear import decode_unverified_ear
from agent.handshake.grpc_status import OVERLOADED, Failure, reason_of
from agent.handshake.kbs_http import KbsHttp, Question
from agent.handshake.rcar import Exchange
from agent.jose import parse_b64

CHALLENGE_LIFE_S = rcar.SESSION_LIFE_S - 15
"""A KBS counts from its own answer on, and the guest from ours."""
AUTH_TIMEOUT_S = 12
"""Below what a guest waits for its Challenge, so that it hears from us what it is that takes so long."""
ATTEST_TIMEOUT_S = 50
RESOURCE_TIMEOUT_S = 25
LOOK_TIMEOUT_S = 5
UPSTREAM_REQUESTS = 64
"""To the KBS at one time; more wait, within their time."""
OWN_THREADS = 8
"""Beside those of the requests, for what must not wait behind a slow KBS: the audit log, and the look whether it answers."""
RETRY_AFTER_S = 5.0
REQUEST_ID = "X-Request-Id"

_COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_AUTH, _ATTEST, _RESOURCE = Ident("UPSTREAM_AUTH"), Ident("UPSTREAM_ATTEST"), Ident("UPSTREAM_RESOURCE")


@dataclass(frozen=True, slots=True)
class Upstream:
    """The one KBS behind a relay.

    Attributes:
        url: `https://host[:port]`.
        ca_pem: the only roots there are.
        server_name: that its certificate must carry.
    """

    url: str
    ca_pem: str = field(repr=False)
    server_name: str

    def connection(self) -> KbsHttp:
        return KbsHttp(self.url, self.ca_pem, self.server_name)


class Relay:
    """The desk. Needs a running loop, of which it takes the default executor.

    Args:
        upstream: as above.
        audit: gets a line for everything that is answered.
        now: the time of day, with a time zone.
        report: told of what its operator must mend: the KBS is not the one it should be, or does not speak its protocol.
    """

    tokens = TokenKind.TRUSTEE

    def __init__(
        self, upstream: Upstream, audit: AuditLog, *, now: Callable[[], datetime], report: Callable[[AgentError], None]
    ) -> None:
        self._upstream = upstream
        self._audit = audit
        self._now = now
        self._report = report
        self._free = asyncio.Semaphore(UPSTREAM_REQUESTS)
        self._threads = ThreadPoolExecutor(UPSTREAM_REQUESTS + OWN_THREADS, "relay")
        asyncio.get_running_loop().set_default_executor(self._threads)

    async def open(self, hello: Hello) -> "_Session":
        """A Challenge of the KBS's.

        Raises:
            UpstreamFailedError: there is none, or it is none that our protocol can carry.
        """
        cookies: dict[str, str] = {}
        pack = partial(rcar.pack_request, rcar.PROTOCOL_VERSION, hello.tee)
        try:
            answer = await self._ask(Exchange.AUTH, f"{rcar.PREFIX}/auth", pack, hello.request_id, cookies)
            offer = rcar.parse_challenge(answer, _AUTH)
            # refusal: test_a_challenge_without_a_session_is_the_upstreams_failure
            if not rcar.has_session(cookies):
                raise RemoteProtocolError(ProtocolProblem.MALFORMED, _AUTH)
        except AgentError as error:
            raise self._failed(error) from None
        # The nonce travels as bytes, and what the guest binds is their base64: it must be the text that the KBS binds.
        try:
            nonce = parse_b64(offer.nonce.decode())
        except ValueError:
            nonce = b""
        # refusal: test_a_nonce_that_is_not_the_base64_of_32_bytes_is_refused
        if len(nonce) != NONCE_BYTES:
            raise _unfit("UPSTREAM_NONCE")
        # refusal: test_a_hash_that_our_protocol_does_not_have_is_refused
        if offer.hash is not BindingHash.SHA384:
            raise _unfit("UPSTREAM_HASH")
        return _Session(self, hello, Challenge(hello.request_id, Nonce(nonce), CHALLENGE_LIFE_S), cookies)

    async def attest(self, hello: Hello, challenge: Challenge, cookies: dict[str, str], sent: Attestation) -> Accepted:
        """The KBS's token over the Evidence, and its session."""
        try:
            packed = challenge.nonce, sent.tee_pubkey, sent.evidence, sent.init_data or None
            pack = partial(rcar.pack_attestation, *packed)
            answer = await self._ask(Exchange.ATTEST, f"{rcar.PREFIX}/attest", pack, hello.request_id, cookies)
            token = rcar.parse_token(answer, _ATTEST)
        except AgentError as error:
            raise self._failed(error) from None
        record = replace(
            self._record(AuditStep.ATTEST, Decision.RELAYED, hello),
            nonce=Ident(challenge.nonce.hex()),
            tee=Ident(hello.tee.value),
        )
        await self._append(_with_claims(record, token))
        return Accepted(hello.request_id, token, rcar.UNVERSIONED, (), pack_session(cookies))

    async def release(self, request: KeyRequest) -> KeyResponse:
        """The resource by the name of the key, as the KBS sealed it.

        Raises:
            KeyReleaseDeniedError: its policy denied.
            UpstreamFailedError: there is no key.
        """
        jwe = await self._released(AuditStep.RELEASE, request)
        return KeyResponse(request.request_id, jwe, request.key_uri, 0)

    async def release_credentials(self, request: CredentialsRequest) -> CredentialsResponse:
        """Another resource, as `release`: which ones this guest may have is for the KBS's policy to say."""
        return CredentialsResponse(request.request_id, await self._released(AuditStep.CREDENTIALS, request))

    async def _released(self, step: AuditStep, request: KeyRequest | CredentialsRequest) -> bytes:
        record = self._record(step, Decision.ALLOWED, request)
        try:
            jwe = await self._resource(request)
        except KeyReleaseDeniedError as error:
            denied = replace(record, decision=Decision.DENIED, reason=Ident(error.reason.value), claim=error.claim)
            await self._append(denied)
            raise
        except UpstreamFailedError as error:
            await self._append(replace(record, decision=Decision.FAILED, reason=error.failure.reason))
            raise
        await self._append(record)
        return jwe

    async def record_failure(self, step: AuditStep, asked: Asked | None, reason: Ident) -> None:
        """As `Authority.record_failure`."""
        tee = Ident(asked.tee.value) if isinstance(asked, Hello) else None
        await self._append(replace(self._record(step, Decision.FAILED, asked), reason=reason, tee=tee))

    async def reachable(self) -> bool:
        """Does the KBS answer, whatever it says? One that is too old to know the question does."""
        connection = self._upstream.connection()
        try:
            return (await connection.ask(Question("/healthz", {}, None), LOOK_TIMEOUT_S, _AUTH)).status < 500
        except AgentError:
            return False
        finally:
            connection.close()

    def close(self) -> None:
        self._threads.shutdown()

    async def _resource(self, request: KeyRequest | CredentialsRequest) -> bytes:
        cookies = parse_session(request.session)
        headers = {}
        # refusal: test_what_is_no_token_does_not_get_into_a_header
        if not _COMPACT_JWS.fullmatch(request.token):
            raise UpstreamFailedError(Failure(_code(grpc.StatusCode.INVALID_ARGUMENT), Ident("PROTOCOL_MALFORMED")))
        if len(request.token) <= rcar.MAX_BEARER_BYTES:  # else the session alone must do
            headers["Authorization"] = f"Bearer {request.token}"
        path = rcar.resource_path(uri_of(request))
        try:
            jwe = await self._ask(Exchange.RESOURCE, path, None, request.request_id, cookies, headers)
            # refusal: test_a_sealed_key_above_the_bound_or_of_no_bytes_is_the_upstreams_failure
            if not 0 < len(jwe) <= MAX_JWE_BYTES:
                raise RemoteProtocolError(ProtocolProblem.OVERSIZED if jwe else ProtocolProblem.MALFORMED, _RESOURCE)
        except KeyReleaseDeniedError:
            raise
        except AgentError as error:
            raise self._failed(error) from None
        return jwe

    async def _ask(
        self,
        exchange: Exchange,
        path: str,
        pack: Callable[[], bytes] | None,
        request_id: Ident,
        cookies: dict[str, str],
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """The body of a good answer; the cookies are sent, and those that came are added.

        `pack` makes the body when it is this request's turn: up to 2 MiB each are not made for those that wait. Every request
        has a connection of its own: most of a stream's time the guest collects, and a KBS closes what is idle.
        """
        state, limit_s = _EXCHANGES[exchange]
        sent = {REQUEST_ID: str(request_id), **(headers or {})}
        if cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        connection = self._upstream.connection()
        try:
            async with asyncio.timeout(limit_s), self._free:  # the wait for others counts
                body = await asyncio.to_thread(pack) if pack else None
                answer = await connection.ask(Question(path, sent, body), limit_s, state)
        except TimeoutError:
            raise BrokerUnreachableError(Unreachable.TIMEOUT) from None
        finally:
            connection.close()
        cookies.update(rcar.merge_cookies(cookies, answer.set_cookies))
        if answer.status != 200:
            error, wait_s = rcar.failure_of(exchange, answer, state)
            if isinstance(error, KeyReleaseDeniedError):
                raise error  # final where a policy is asked, and foreign to where none is: `failure_of`
            raise self._failed(error, wait_s)
        return answer.body

    def _failed(self, error: AgentError, wait_s: float = 0.0) -> UpstreamFailedError:
        if isinstance(error, BrokerIdentityError | RemoteProtocolError):
            self._report(error)
        return UpstreamFailedError(failure_of(error, wait_s))

    def _record(self, step: AuditStep, decision: Decision, asked: Asked | None) -> AuditRecord:
        request_id, uri = (asked.request_id, uri_of(asked)) if asked else (None, None)
        return AuditRecord(
            time=timestamp(self._now()),
            step=step,
            decision=decision,
            request_id=request_id,
            key_id=uri,
            policy_version=rcar.UNVERSIONED,
        )

    async def _append(self, record: AuditRecord) -> None:
        await asyncio.to_thread(self._audit.append, record)


class _Session:
    """One stream's session at the KBS."""

    def __init__(self, relay: Relay, hello: Hello, challenge: Challenge, cookies: dict[str, str]) -> None:
        self._relay, self._hello, self._cookies = relay, hello, cookies
        self.challenge = challenge

    async def attest(self, attestation: Attestation) -> Accepted:
        return await self._relay.attest(self._hello, self.challenge, self._cookies, attestation)


_EXCHANGES = {
    Exchange.AUTH: (_AUTH, AUTH_TIMEOUT_S),
    Exchange.ATTEST: (_ATTEST, ATTEST_TIMEOUT_S),
    Exchange.RESOURCE: (_RESOURCE, RESOURCE_TIMEOUT_S),
}


# --- sessions -----------------------------------------------------------------------------------------------------------


def pack_session(cookies: dict[str, str]) -> bytes:
    """The cookies as the guest keeps them; nothing where they are longer than 4 KiB, and then the token must do."""
    text = "; ".join(f"{name}={value}" for name, value in cookies.items()).encode("ascii")
    return text if len(text) <= MAX_SESSION_BYTES else b""


def parse_session(session: bytes) -> dict[str, str]:
    """The inverse. A guest may send anything: what is no cookie is left out, as it goes into a header."""
    return rcar.merge_cookies({}, tuple(session.decode("ascii", "replace").split("; ")))


# --- failures -----------------------------------------------------------------------------------------------------------

_CODES = {
    TrusteeRefusal.NO_SESSION: grpc.StatusCode.UNAUTHENTICATED,
    TrusteeRefusal.VERIFICATION: grpc.StatusCode.UNAUTHENTICATED,
}


def failure_of(error: AgentError, wait_s: float = 0.0) -> Failure:
    """What a guest is told of an upstream that does not answer as it should; closed words, whatever the upstream said.

    Args:
        error: why there is no answer.
        wait_s: how long we were asked to wait, for the guest to obey; 0: not at all.
    """
    unavailable = _code(grpc.StatusCode.UNAVAILABLE)
    match error:
        case BrokerUnreachableError(reason=Unreachable.OVERLOADED):
            return Failure(unavailable, OVERLOADED, retry_after_s=wait_s or RETRY_AFTER_S)
        case BrokerUnreachableError():
            return Failure(unavailable, Ident(f"UPSTREAM_{error.reason.name}"), retry_after_s=wait_s or RETRY_AFTER_S)
        case TrusteeRefusedError():
            if error.retryable:
                return Failure(unavailable, reason_of(error.refusal), retry_after_s=wait_s or RETRY_AFTER_S)
            return Failure(_code(_CODES.get(error.refusal, grpc.StatusCode.FAILED_PRECONDITION)), reason_of(error.refusal))
        case BrokerIdentityError():
            return Failure(_code(grpc.StatusCode.FAILED_PRECONDITION), Ident(f"UPSTREAM_IDENTITY_{error.problem.name}"))
        case RemoteProtocolError():
            return Failure(_code(grpc.StatusCode.FAILED_PRECONDITION), Ident(f"UPSTREAM_{error.problem.name}"))
        case MalformedEvidenceError():
            return Failure(_code(grpc.StatusCode.INVALID_ARGUMENT), Ident(f"EVIDENCE_{error.format.name}"))
        case KeyReleaseDeniedError():  # at /auth or /attest, where no policy is asked
            return Failure(_code(grpc.StatusCode.FAILED_PRECONDITION), Ident("UPSTREAM_FOREIGN"))
        case _:
            return Failure(_code(grpc.StatusCode.INTERNAL), Ident("INTERNAL"))


def _unfit(reason: str) -> UpstreamFailedError:
    return UpstreamFailedError(Failure(_code(grpc.StatusCode.FAILED_PRECONDITION), Ident(reason)))


def _code(status: grpc.StatusCode) -> int:
    code: int = status.value[0]
    return code


def _with_claims(record: AuditRecord, token: str) -> AuditRecord:
    """What the KBS says was attested, over a connection that ends at its certificate; nothing by a token we cannot read."""
    try:
        ear = decode_unverified_ear(token)
    except TokenError:
        return record
    cpu = ear.cpu
    return replace(
        record,
        measurement=cpu.measurement if cpu else None,
        host_data=Ident(cpu.init_data.hex()) if cpu and cpu.init_data else None,
        simulated=True if ear.simulated else None,
    )
