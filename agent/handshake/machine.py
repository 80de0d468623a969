"""The handshake as a table: events in, actions out. One machine for every wire.

    broker = Handshake(request_id, key_uri, Tee.SNP, public_key, trust)
    action = broker.start()                  # SendHello
    action = broker.receive(challenge, now)  # NeedEvidence: an answer, not a call; the shell collects and feeds it back
    …                                        # SendAttestation, SendKeyRequest, Done

The order of a handshake is this table and nothing else; a missing row is the error, and FAILED is sticky. The Verdict's
token is verified here, so a `Verdict` exists only for an answer that the authority signed for this handshake.
Does not send, sleep, read a clock or collect: deadlines are events (`Expired`), `now` is an argument.
"""

import enum
from dataclasses import dataclass
from typing import NoReturn, Protocol, assert_never

from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import (
    BrokerUnreachableError,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    SimulationRefusal,
    SimulationRefusedError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, Nonce, RuntimeData, Tee
from agent.handshake import (
    Accepted,
    Attestation,
    Challenge,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    SealedCredentials,
    SealedKey,
    TeePublicKey,
    TokenClaims,
    Verdict,
)
from agent.handshake.token import verify_token

MAX_CHALLENGES = 10
"""That one boot, or one renewal, answers with Evidence, over all its attempts: every one costs a request to each device, and
the host of an SNP guest may throttle them. A broker that fails so often after the Evidence fails for half a minute already."""


class State(enum.Enum):
    START = "START"
    AWAIT_CHALLENGE = "AWAIT_CHALLENGE"
    AWAIT_EVIDENCE = "AWAIT_EVIDENCE"
    AWAIT_VERDICT = "AWAIT_VERDICT"
    AWAIT_KEY = "AWAIT_KEY"
    DONE = "DONE"
    FAILED = "FAILED"


# --- events: the messages of the broker, and three of our own -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Collected:
    """The shell has the Evidence it was asked for."""

    evidence: CompositeEvidence


@dataclass(frozen=True, slots=True)
class Expired:
    """What this state waits for did not come in its time. In AWAIT_EVIDENCE: the Challenge's life is over."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer ended the stream in good order, without a further message."""


Message = Challenge | Accepted | Denied | CredentialsResponse | KeyResponse
Event = Message | Collected | Expired | Closed


# --- actions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendHello:
    hello: Hello


@dataclass(frozen=True, slots=True)
class NeedEvidence:
    """Collect Evidence over `runtime_data`; after `expires_in_s` seconds the answer is `Expired`, not `Collected`."""

    runtime_data: RuntimeData
    expires_in_s: int


@dataclass(frozen=True, slots=True)
class SendAttestation:
    attestation: Attestation


@dataclass(frozen=True, slots=True)
class SendKeyRequest:
    """The stream is over; `verdict` is what the authority signed."""

    verdict: Verdict
    request: KeyRequest


@dataclass(frozen=True, slots=True)
class HaveCredentials:
    """The key is still to be asked for."""

    sealed: SealedCredentials


@dataclass(frozen=True, slots=True)
class Done:
    sealed_key: SealedKey


Action = SendHello | NeedEvidence | SendAttestation | SendKeyRequest | HaveCredentials | Done

_NEXT: dict[tuple[State, type[Event]], State] = {
    (State.AWAIT_CHALLENGE, Challenge): State.AWAIT_EVIDENCE,
    (State.AWAIT_EVIDENCE, Collected): State.AWAIT_VERDICT,
    (State.AWAIT_EVIDENCE, Expired): State.AWAIT_CHALLENGE,  # a fresh Hello on the same stream
    (State.AWAIT_VERDICT, Accepted): State.AWAIT_KEY,
    (State.AWAIT_VERDICT, Denied): State.FAILED,
    (State.AWAIT_KEY, CredentialsResponse): State.AWAIT_KEY,  # of the model's store, where the configuration asks for them
    (State.AWAIT_KEY, KeyResponse): State.DONE,
    (State.AWAIT_CHALLENGE, Expired): State.FAILED,
    (State.AWAIT_VERDICT, Expired): State.FAILED,
    (State.AWAIT_KEY, Expired): State.FAILED,
    (State.AWAIT_CHALLENGE, Closed): State.FAILED,
    (State.AWAIT_VERDICT, Closed): State.FAILED,
}


@dataclass(frozen=True, slots=True)
class Trust:
    """What the measured configuration lets this guest believe.

    Attributes:
        token_keys: `broker.token_keys`, P-256, at least one.
        allow_simulation: whether a verdict over simulated evidence may count.
    """

    token_keys: tuple[ec.EllipticCurvePublicKey, ...]
    allow_simulation: bool


class VerifyToken(Protocol):
    """`token.verify_token` for our broker's tokens; what takes its place for another authority's raises the same."""

    def __call__(
        self,
        token: str,
        *,
        keys: tuple[ec.EllipticCurvePublicKey, ...],
        nonce: Nonce,
        tee_pubkey: TeePublicKey,
        key_uri: Ident,
        now: int,
    ) -> TokenClaims: ...


class Handshake:
    """One handshake with one request id and one key pair; a retry is another one.

    Attributes:
        challenges: answered so far, with those of the handshakes before.
    """

    def __init__(
        self,
        request_id: Ident,
        key_uri: Ident,
        tee: Tee,
        public_key: TeePublicKey,
        trust: Trust,
        challenges: int = 0,
        verify: VerifyToken = verify_token,
    ) -> None:
        self.challenges = challenges
        self._hello = Hello(request_id, key_uri, tee)
        self._public_key = public_key
        self._trust = trust
        self._verify = verify
        self._nonce: Nonce | None = None
        self._state = State.START

    @property
    def request_id(self) -> Ident:
        return self._hello.request_id

    @property
    def state(self) -> State:
        return self._state

    def start(self) -> SendHello:
        """The first action. RuntimeError when called twice."""
        if self._state is not State.START:
            raise RuntimeError("handshake already started")
        self._state = State.AWAIT_CHALLENGE
        return SendHello(self._hello)

    def receive(self, event: Event, now: int) -> Action:
        """The action that follows from `event`.

        Args:
            event: what happened; messages come checked for size and form by the wire.
            now: Unix seconds, for the token.

        Raises:
            RemoteProtocolError: out of order, another request id, one Challenge too many, or the stream ended too early.
            KeyReleaseDeniedError: the broker denied.
            TokenError: the Verdict is not one the authority signed for this handshake.
            SimulationRefusedError: the Verdict is over simulated evidence and that is not allowed.
            BrokerUnreachableError: what we waited for expired.
            RuntimeError: we fed an event of our own that this state does not ask for.
        """
        state = self._state
        self._state = State.FAILED  # whatever raises below leaves it there
        # refusal: test_a_message_out_of_order_is_a_protocol_error_and_sticks
        if (state, type(event)) not in _NEXT:
            self._out_of_order(state, event)
        # refusal: test_an_answer_to_another_request_is_a_protocol_error_and_sticks
        if isinstance(event, Message) and event.request_id != self._hello.request_id:
            raise RemoteProtocolError(ProtocolProblem.REQUEST_ID, Ident(state.value))
        action = self._accept(state, event, now)
        self._state = _NEXT[state, type(event)]
        return action

    def _out_of_order(self, state: State, event: Event) -> NoReturn:
        # refusal: test_a_message_out_of_order_is_a_protocol_error_and_sticks
        if isinstance(event, Message | Closed):
            raise RemoteProtocolError(ProtocolProblem.UNEXPECTED_MESSAGE, Ident(state.value))
        raise RuntimeError(f"{type(event).__name__} fed in state {state.value}")

    def _accept(self, state: State, event: Event, now: int) -> Action:
        match event:
            case Challenge():
                # refusal: test_a_boot_answers_so_many_challenges_and_no_more
                if self.challenges >= MAX_CHALLENGES:
                    raise RemoteProtocolError(ProtocolProblem.TOO_MANY_CHALLENGES, Ident(state.value))
                self.challenges += 1
                self._nonce = event.nonce
                runtime_data = RuntimeData(event.nonce, self._public_key.x, self._public_key.y, event.hash)
                return NeedEvidence(runtime_data, event.expires_in_s)
            case Collected():
                return SendAttestation(Attestation(self._hello.request_id, self._public_key, event.evidence))
            case Accepted():
                return self._verified(event, now)
            case Denied():
                # refusal: test_a_denial_carries_the_closed_reason_and_sticks
                raise KeyReleaseDeniedError(event.reason, event.claim, event.reference_value_id, event.policy_version)
            case CredentialsResponse():
                return HaveCredentials(SealedCredentials(event.jwe))
            case KeyResponse():
                return Done(SealedKey(event.jwe, event.key_id, event.key_version))
            case Expired():
                if state is State.AWAIT_EVIDENCE:
                    self._nonce = None
                    return SendHello(self._hello)
                # refusal: test_an_answer_that_does_not_come_is_retryable_and_sticks
                raise BrokerUnreachableError(Unreachable.TIMEOUT)
            case Closed():
                # refusal: test_a_stream_that_ends_too_early_is_a_protocol_error
                raise RemoteProtocolError(ProtocolProblem.CLOSED, Ident(state.value))
            case _:
                assert_never(event)

    def _verified(self, accepted: Accepted, now: int) -> SendKeyRequest:
        assert self._nonce is not None, "AWAIT_VERDICT is reached through a Challenge only"
        claims = self._verify(
            accepted.token,
            keys=self._trust.token_keys,
            nonce=self._nonce,
            tee_pubkey=self._public_key,
            key_uri=self._hello.key_uri,
            now=now,
        )
        # refusal: test_a_simulated_verdict_counts_only_where_it_is_allowed
        if claims.simulated and not self._trust.allow_simulation:
            raise SimulationRefusedError(SimulationRefusal.NOT_ALLOWED)
        verdict = Verdict(self._hello.request_id, accepted.token, claims, accepted.reference_value_ids)
        return SendKeyRequest(verdict, self._key_request(accepted))

    def _key_request(self, accepted: Accepted) -> KeyRequest:
        return KeyRequest(self._hello.request_id, accepted.token, self._hello.key_uri, accepted.session)
