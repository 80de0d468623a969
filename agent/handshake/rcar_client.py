"""The guest's side of Trustee's wire: drives the machine over HTTPS, waits, retries, and says more than a KBS does.

An `RcarBroker` is one boot's conversation with one KBS identity (measured CA and server name) at one URL. Each attempt at
attestation is a whole new handshake: new session, request id (ours alone: this wire carries none) and key pair. Only when a
KBS has forgotten the session or does not take the token any more, `release_key` attests once more, with the key pair that the
boot holds. Does not decide the order (`machine.py`), the form (`rcar.py`) or when to try again (`broker.py`), and collects
nothing: the caller passes `collect`.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar, assert_never

from agent import keys
from agent.closed import Ident
from agent.errors import (
    AgentError,
    ClockSkewError,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    TrusteeRefusal,
    TrusteeRefusedError,
)
from agent.evidence import CompositeEvidence, RuntimeData, Tee, binding
from agent.evidence.precheck import check_before_sending
from agent.handshake import (
    Accepted,
    Challenge,
    CredentialsResponse,
    KeyResponse,
    SealedCredentials,
    SealedKey,
    TeePublicKey,
    Verdict,
    rcar,
)
from agent.handshake.broker import Collect, OnAttempt, OnRetry, OnUnaffirmed, collected, retried
from agent.handshake.kbs_http import KbsHttp, Question
from agent.handshake.machine import (
    Action,
    Done,
    Event,
    Handshake,
    HaveCredentials,
    NeedEvidence,
    SendAttestation,
    SendHello,
    SendKeyRequest,
    State,
    Trust,
)
from agent.handshake.rcar import Exchange
from agent.handshake.rcar_token import EarVerifier
from agent.keys import EphemeralKey
from agent.proxy import Proxy
from agent.retry import RetrySchedule

REQUEST_TIMEOUT_S = 60
"""As Trustee's own client: the KBS may ask a Verifier, and that one a vendor."""
MAX_CLOCK_SKEW_S = 300
"""Beyond this the token, which lives five minutes, would be over or yet to come; then no evidence needs to be sent."""
SESSION_MARGIN_S = 15

_FORGOTTEN = (TrusteeRefusal.NO_SESSION, TrusteeRefusal.VERIFICATION)

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Site:
    """Which KBS, and how this guest speaks to it.

    Attributes:
        url: `https://host[:port]`, a hint but for its scheme.
        ca_pem: the measured CA, PEM; the only roots there are. None: no TLS, which the configuration allows simulations.
        server_name: the measured name that the certificate must carry.
        resource_uri: where the key is: `kbs:///repository/type/tag` or `kbs+plugin:///path?query`.
        protocol_version: that the KBS takes.
        init_data: the initdata document that this guest was launched with, None without one at hand; and its digest.
        simulated: the evidence is a simulator's.
        proxy: on the way, a hint.
    """

    url: str
    ca_pem: str | None = field(repr=False)
    server_name: str | None
    resource_uri: str
    protocol_version: str = rcar.PROTOCOL_VERSION
    init_data: str | None = field(default=None, repr=False)
    init_data_digest: bytes | None = None
    simulated: bool = False
    proxy: Proxy | None = None


class _ForgottenError(Exception):
    """The KBS lost the session or does not take its token any more: another attestation may help, once."""

    def __init__(self, error: AgentError) -> None:
        super().__init__()
        self.error = error


class _ComeBackLaterError(Exception):
    """A failure, and the seconds that we were asked to wait at least."""

    def __init__(self, error: AgentError, minimum_s: float) -> None:
        super().__init__()
        self.error = error
        self.minimum_s = minimum_s


class RcarBroker:
    """One KBS identity. Use as `async with`; not for two handshakes at a time."""

    def __init__(
        self,
        site: Site,
        trust: Trust,
        timeout_s: float,
        on_retry: OnRetry = lambda *_: None,
        on_unaffirmed: OnUnaffirmed = lambda _: None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            site: as above.
            trust: the attestation service's keys, and whether simulated evidence may count.
            timeout_s: for attestation and key release together, with every retry.
            on_retry: as `broker.OnRetry`.
            on_unaffirmed: after a denial, told each thing in the token that is not affirmed (`rcar.not_affirmed`).
        """
        self._site = site
        self._path = rcar.resource_path(site.resource_uri)
        self._trust = trust
        self._timeout_s = timeout_s
        self._on_retry = on_retry
        self._on_unaffirmed = on_unaffirmed
        self._http = KbsHttp(site.url, site.ca_pem, site.server_name, site.proxy)
        self._schedule: RetrySchedule | None = None
        self._cookies: dict[str, str] = {}
        self._machine: Handshake | None = None
        self._again: Callable[[], Awaitable[Verdict]] | None = None
        self._token: str | None = None
        self._request_id: Ident | None = None
        self._attempts = 0
        self._refused = 0
        self._forgotten = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        await self._disconnect()

    def connect(self) -> None:
        """As `Broker.connect`. There is nothing to begin: a connection without a request would be idle, and closed as such."""

    async def attest(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt = lambda *_: None
    ) -> tuple[Verdict, EphemeralKey]:
        """As `Broker.attest`."""
        self._refused, self._forgotten = 0, False
        self._schedule = RetrySchedule(asyncio.get_running_loop().time() + self._timeout_s)

        async def once() -> tuple[Verdict, EphemeralKey]:
            key = EphemeralKey.generate()
            self._again = lambda: self._attest_once(key_uri, tee, key, collect, on_attempt)
            verdict = await self._again()
            self._request_id = verdict.request_id
            return verdict, key

        return await self._retry(self._schedule, once)

    async def release_credentials(self, verdict: Verdict, uri: Ident) -> SealedCredentials:
        """As `Broker.release_credentials`."""
        return await self._release(verdict, lambda: self._get_credentials(rcar.resource_path(uri)))

    async def release_key(self, verdict: Verdict) -> SealedKey:
        """As `Broker.release_key`."""
        return await self._release(verdict, self._get_key)

    async def _release(self, verdict: Verdict, get: Callable[[], Awaitable[_Result]]) -> _Result:
        schedule = self._schedule
        if schedule is None or verdict.request_id != self._request_id:
            raise RuntimeError("a key is asked for after its attestation")
        self._refused = 0
        return await self._retry(schedule, lambda: self._release_once(get))

    async def _retry(self, schedule: RetrySchedule, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        async def counted() -> _Result:
            try:
                return await attempt()
            except TrusteeRefusedError as error:
                self._refused += 1
                error.attempts = self._refused
                raise

        async def translate(later: _ComeBackLaterError) -> tuple[AgentError, float]:
            return later.error, later.minimum_s

        return await retried(schedule, counted, _ComeBackLaterError, translate, self._disconnect, self._on_retry)

    async def _disconnect(self) -> None:
        self._http.close()

    async def _attest_once(
        self, key_uri: Ident, tee: Tee, key: EphemeralKey, collect: Collect, on_attempt: OnAttempt
    ) -> Verdict:
        request_id = Ident(secrets.token_hex(16))
        self._attempts += 1
        on_attempt(request_id, self._attempts)
        self._cookies, self._token = {}, None
        verify = EarVerifier(tee, self._site.simulated)
        challenges = self._machine.challenges if self._machine else 0
        self._machine = machine = Handshake(request_id, key_uri, tee, key.public, self._trust, challenges, verify)
        asked: RuntimeData | None = None
        action: Action = machine.start()
        while True:
            event: Event
            match action:
                case SendHello():
                    event = await self._auth(machine, request_id, tee)
                case NeedEvidence():
                    asked = action.runtime_data
                    event = await collected(collect, action)
                case SendAttestation():
                    assert asked is not None, "evidence was asked for"
                    event = await self._attest(machine, request_id, asked, action.attestation.evidence)
                case SendKeyRequest():
                    return action.verdict
                case HaveCredentials() | Done():
                    raise RuntimeError("no key comes before it is asked for")
                case _:
                    assert_never(action)
            action = machine.receive(event, int(time.time()))

    async def _auth(self, machine: Handshake, request_id: Ident, tee: Tee) -> Challenge:
        body = rcar.pack_request(self._site.protocol_version, tee)
        self._cookies = {}
        answer = await self._ask(Exchange.AUTH, machine, f"{rcar.PREFIX}/auth", body)
        state = Ident(machine.state.value)
        offer = rcar.parse_challenge(answer.body, state)
        # refusal: test_a_challenge_without_a_session_is_refused
        if not rcar.has_session(self._cookies):
            raise RemoteProtocolError(ProtocolProblem.MALFORMED, state)
        ahead_s = rcar.clock_ahead_s(answer, int(time.time()))
        # refusal: test_no_evidence_is_made_by_a_clock_that_spoils_the_token
        if ahead_s is not None and abs(ahead_s) > MAX_CLOCK_SKEW_S:
            raise ClockSkewError(ahead_s)
        return Challenge(request_id, offer.nonce, rcar.SESSION_LIFE_S - SESSION_MARGIN_S, offer.hash)

    async def _attest(self, machine: Handshake, request_id: Ident, asked: RuntimeData, evidence: CompositeEvidence) -> Accepted:
        site = self._site
        digest = site.init_data_digest if site.init_data is not None else None
        report_data = binding.report_data(asked, evidence.additional_evidence)
        primary = check_before_sending(evidence.primary, report_data, digest)
        pubkey = TeePublicKey(asked.public_key_x, asked.public_key_y)
        body = rcar.pack_attestation(asked.nonce, pubkey, replace(evidence, primary=primary), site.init_data)
        answer = await self._ask(Exchange.ATTEST, machine, f"{rcar.PREFIX}/attest", body)
        self._token = rcar.parse_token(answer.body, Ident(machine.state.value))
        return Accepted(request_id, self._token, rcar.UNVERSIONED, ())

    async def _release_once(self, get: Callable[[], Awaitable[_Result]]) -> _Result:
        assert self._machine is not None and self._again is not None, "attested"
        if self._machine.state is not State.AWAIT_KEY:
            await self._again()  # begun by the attempt before, and cut off
        try:
            return await get()
        except _ForgottenError as forgotten:
            error = forgotten.error
        # refusal: test_a_session_that_is_forgotten_again_is_not_made_a_third_time
        if self._forgotten:
            raise error
        self._forgotten = True
        await self._again()
        try:
            return await get()
        except _ForgottenError as forgotten:
            error = forgotten.error
        raise error

    async def _get_credentials(self, path: str) -> SealedCredentials:
        machine = self._machine
        assert machine is not None, "attested"
        answer = await self._ask(Exchange.RESOURCE, machine, path, None)
        action = machine.receive(CredentialsResponse(machine.request_id, answer.body), int(time.time()))
        assert isinstance(action, HaveCredentials), "the table knows one action for credentials"
        return action.sealed

    async def _get_key(self) -> SealedKey:
        machine = self._machine
        assert machine is not None, "attested"
        answer = await self._ask(Exchange.RESOURCE, machine, self._path, None)
        keys.parse_jwe(answer.body)  # before the gate: what could never be opened must not cost the machine
        # A resource has a name and no version. The query is no part of an identity.
        key_id = Ident.of_peer(self._site.resource_uri.partition("?")[0])
        response = KeyResponse(machine.request_id, answer.body, key_id, 0)
        action = machine.receive(response, int(time.time()))
        assert isinstance(action, Done), "the table knows one action for a key"
        return action.sealed_key

    async def _ask(self, exchange: Exchange, machine: Handshake, path: str, body: bytes | None) -> rcar.Answer:
        state = Ident(machine.state.value)
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self._cookies.items())} if self._cookies else {}
        if body is None and self._token is not None and len(self._token) <= rcar.MAX_BEARER_BYTES:
            headers["Authorization"] = f"Bearer {self._token}"  # for a KBS that has lost the session, or never had it
        answer = await self._http.ask(Question(path, headers, body), REQUEST_TIMEOUT_S, state)
        self._cookies = rcar.merge_cookies(self._cookies, answer.set_cookies)
        if answer.status == 200:
            return answer
        error, minimum_s = rcar.failure_of(exchange, answer, state, self._token)
        if isinstance(error, KeyReleaseDeniedError):
            for finding in rcar.not_affirmed(self._token):
                self._on_unaffirmed(finding)
        if isinstance(error, TrusteeRefusedError) and error.refusal in _FORGOTTEN and exchange is Exchange.RESOURCE:
            raise _ForgottenError(error)
        if minimum_s:
            raise _ComeBackLaterError(error, minimum_s)
        raise error
