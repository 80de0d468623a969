"""The handshake's order: what is accepted in which state, and that a failed handshake stays failed."""

import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    SimulationRefusedError,
    TokenCheck,
    TokenError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, Evidence, Nonce, RuntimeData, Tee
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
)
from agent.handshake.machine import (
    MAX_CHALLENGES,
    Closed,
    Collected,
    Done,
    Event,
    Expired,
    Handshake,
    HaveCredentials,
    NeedEvidence,
    SendAttestation,
    SendHello,
    SendKeyRequest,
    State,
    Trust,
)
from agent.jose import pack_b64, pack_b64url, pack_jwk

NOW = 1_800_000_000
ID = Ident("request-1")
URI = Ident("kbs:///models/demo/key")
NONCE = Nonce(b"n" * 32)
PUBLIC = TeePublicKey(b"x" * 32, b"y" * 32)
AUTHORITY = ec.derive_private_key(0xA0, ec.SECP256R1())
HELLO = Hello(ID, URI, Tee.SNP)
EVIDENCE = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184), "")
CHALLENGE = Challenge(ID, NONCE, 180)
DENIED = Denied(ID, DenialReason.CLAIM, Ident("snp.measurement"), None, Ident("p1"))
CREDENTIALS = CredentialsResponse(ID, b"{}")
KEY = KeyResponse(ID, b"{}", Ident("id"), 2)


def accepted(nonce: Nonce = NONCE, request_id: Ident = ID, simulated: bool = False) -> Accepted:
    members = {
        "iss": "keyturn-broker",
        "iat": NOW,
        "exp": NOW + 300,
        "nonce": pack_b64(nonce),
        "tee-pubkey": pack_jwk(PUBLIC),
        "key_uri": URI,
        "policy_version": "p1",
        "min_model_version": 0,
        "simulated": simulated,
    }
    text = ".".join(pack_b64url(json.dumps(part).encode()) for part in ({"alg": "ES256", "typ": "JWT"}, members))
    r, s = decode_dss_signature(AUTHORITY.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    token = f"{text}.{pack_b64url(r.to_bytes(32) + s.to_bytes(32))}"
    return Accepted(request_id, token, Ident("p1"), (Ident("rv-1"),))


ACCEPTED = accepted()
PATH: list[tuple[State, Event]] = [
    (State.AWAIT_CHALLENGE, CHALLENGE),
    (State.AWAIT_EVIDENCE, Collected(EVIDENCE)),
    (State.AWAIT_VERDICT, ACCEPTED),
    (State.AWAIT_KEY, KEY),
]
PEER_EVENTS: list[Event] = [CHALLENGE, ACCEPTED, DENIED, CREDENTIALS, KEY, Closed()]
OWN_EVENTS: list[Event] = [Collected(EVIDENCE), Expired()]


def machine(state: State, allow_simulation: bool = False) -> Handshake:
    made = Handshake(ID, URI, Tee.SNP, PUBLIC, Trust((AUTHORITY.public_key(),), allow_simulation))
    if state is State.START:
        return made
    made.start()
    for at, event in PATH:
        if at is state:
            break
        made.receive(event, NOW)
    if state is State.FAILED:
        made = machine(State.AWAIT_VERDICT)
        with pytest.raises(KeyReleaseDeniedError):
            made.receive(DENIED, NOW)
    assert made.state is state
    return made


def test_the_whole_handshake() -> None:
    made = machine(State.START)
    assert made.start() == SendHello(HELLO)
    assert made.receive(CHALLENGE, NOW) == NeedEvidence(RuntimeData(NONCE, PUBLIC.x, PUBLIC.y), 180)
    assert made.receive(Collected(EVIDENCE), NOW) == SendAttestation(Attestation(ID, PUBLIC, EVIDENCE))
    key_request = made.receive(ACCEPTED, NOW)
    assert isinstance(key_request, SendKeyRequest)
    assert key_request.request == KeyRequest(ID, ACCEPTED.token, URI)
    assert key_request.verdict.claims.nonce == NONCE
    assert key_request.verdict.reference_value_ids == ("rv-1",)
    assert made.receive(KEY, NOW) == Done(SealedKey(b"{}", Ident("id"), 2))
    assert made.state is State.DONE


def test_credentials_come_between_verdict_and_key() -> None:
    made = machine(State.AWAIT_KEY)
    for _ in range(2):
        assert made.receive(CREDENTIALS, NOW) == HaveCredentials(SealedCredentials(b"{}"))
        assert made.state is State.AWAIT_KEY
    assert made.receive(KEY, NOW) == Done(SealedKey(b"{}", Ident("id"), 2))


ALLOWED = {
    *((state, type(event)) for state, event in PATH),
    (State.AWAIT_VERDICT, Denied),
    (State.AWAIT_KEY, CredentialsResponse),
    *((state, Expired) for state in (State.AWAIT_CHALLENGE, State.AWAIT_EVIDENCE, State.AWAIT_VERDICT, State.AWAIT_KEY)),
    *((state, Closed) for state in (State.AWAIT_CHALLENGE, State.AWAIT_VERDICT)),
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", PEER_EVENTS, ids=lambda event: type(event).__name__)
def test_a_message_out_of_order_is_a_protocol_error_and_sticks(state: State, event: Event) -> None:
    if (state, type(event)) in ALLOWED:
        return
    made = machine(state)
    with pytest.raises(RemoteProtocolError) as raised:
        made.receive(event, NOW)
    assert (raised.value.problem, raised.value.state) == (ProtocolProblem.UNEXPECTED_MESSAGE, state.value)
    assert made.state is State.FAILED


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", OWN_EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_of_our_own_out_of_order_is_our_bug(state: State, event: Event) -> None:
    if (state, type(event)) in ALLOWED:
        return
    with pytest.raises(RuntimeError):
        machine(state).receive(event, NOW)


def test_key_before_evidence_is_a_protocol_error_and_sticks() -> None:
    made = machine(State.AWAIT_EVIDENCE)
    with pytest.raises(RemoteProtocolError):
        made.receive(KEY, NOW)
    for event in (*PEER_EVENTS, *OWN_EVENTS):
        with pytest.raises((RemoteProtocolError, RuntimeError)):
            made.receive(event, NOW)
        assert made.state is State.FAILED


def test_it_starts_once() -> None:
    with pytest.raises(RuntimeError):
        machine(State.AWAIT_CHALLENGE).start()
    with pytest.raises(RuntimeError):
        machine(State.FAILED).start()


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (State.AWAIT_CHALLENGE, Challenge(Ident("other"), NONCE, 180)),
        (State.AWAIT_VERDICT, accepted(request_id=Ident("other"))),
        (State.AWAIT_VERDICT, Denied(Ident("other"), DenialReason.POLICY, Ident("c"), None, Ident("p"))),
        (State.AWAIT_KEY, KeyResponse(Ident("other"), b"{}", Ident("id"), 1)),
    ],
)
def test_an_answer_to_another_request_is_a_protocol_error_and_sticks(state: State, event: Event) -> None:
    made = machine(state)
    with pytest.raises(RemoteProtocolError) as raised:
        made.receive(event, NOW)
    assert raised.value.problem is ProtocolProblem.REQUEST_ID
    assert made.state is State.FAILED


def test_a_denial_carries_the_closed_reason_and_sticks() -> None:
    made = machine(State.AWAIT_VERDICT)
    with pytest.raises(KeyReleaseDeniedError) as raised:
        made.receive(DENIED, NOW)
    assert (raised.value.reason, raised.value.claim, raised.value.policy_version) == (
        DenialReason.CLAIM,
        "snp.measurement",
        "p1",
    )
    assert not raised.value.retryable
    assert made.state is State.FAILED


def test_a_verdict_over_another_nonce_is_refused_and_sticks() -> None:
    made = machine(State.AWAIT_VERDICT)
    with pytest.raises(TokenError) as raised:
        made.receive(accepted(Nonce(b"o" * 32)), NOW)
    assert raised.value.check is TokenCheck.NONCE
    assert made.state is State.FAILED


def test_an_expired_verdict_is_refused() -> None:
    with pytest.raises(TokenError):
        machine(State.AWAIT_VERDICT).receive(ACCEPTED, NOW + 300)


def test_a_simulated_verdict_counts_only_where_it_is_allowed() -> None:
    with pytest.raises(SimulationRefusedError):
        machine(State.AWAIT_VERDICT).receive(accepted(simulated=True), NOW)
    assert machine(State.AWAIT_VERDICT, allow_simulation=True).receive(accepted(simulated=True), NOW)


def test_a_stale_challenge_leads_to_a_fresh_hello_and_voids_the_old_nonce() -> None:
    made = machine(State.AWAIT_EVIDENCE)
    assert made.receive(Expired(), NOW) == SendHello(HELLO)
    assert made.state is State.AWAIT_CHALLENGE
    fresh = Nonce(b"f" * 32)
    assert made.receive(Challenge(ID, fresh, 180), NOW) == NeedEvidence(RuntimeData(fresh, PUBLIC.x, PUBLIC.y), 180)
    made.receive(Collected(EVIDENCE), NOW)
    with pytest.raises(TokenError):
        made.receive(ACCEPTED, NOW)


def test_a_boot_answers_so_many_challenges_and_no_more() -> None:
    """Whether one stream brings them, or each handshake of the boot one."""
    made = machine(State.AWAIT_CHALLENGE)
    for _ in range(MAX_CHALLENGES):
        assert isinstance(made.receive(CHALLENGE, NOW), NeedEvidence)
        made.receive(Expired(), NOW)
    later = Handshake(ID, URI, Tee.SNP, PUBLIC, Trust((AUTHORITY.public_key(),), False), made.challenges)
    later.start()
    for refusing in (made, later):
        with pytest.raises(RemoteProtocolError) as raised:
            refusing.receive(CHALLENGE, NOW)
        assert (raised.value.problem, raised.value.state) == (ProtocolProblem.TOO_MANY_CHALLENGES, "AWAIT_CHALLENGE")
        assert not raised.value.retryable
        assert refusing.state is State.FAILED


@pytest.mark.parametrize("state", [State.AWAIT_CHALLENGE, State.AWAIT_VERDICT, State.AWAIT_KEY])
def test_an_answer_that_does_not_come_is_retryable_and_sticks(state: State) -> None:
    made = machine(state)
    with pytest.raises(BrokerUnreachableError) as raised:
        made.receive(Expired(), NOW)
    assert raised.value.reason is Unreachable.TIMEOUT
    assert raised.value.retryable
    assert made.state is State.FAILED


@pytest.mark.parametrize("state", [State.AWAIT_CHALLENGE, State.AWAIT_VERDICT])
def test_a_stream_that_ends_too_early_is_a_protocol_error(state: State) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        machine(state).receive(Closed(), NOW)
    assert raised.value.problem is ProtocolProblem.CLOSED


@given(st.lists(st.sampled_from([*PEER_EVENTS, *OWN_EVENTS, accepted(Nonce(b"o" * 32))]), max_size=8))
def test_no_order_of_events_reaches_a_key_without_challenge_evidence_and_verdict(events: list[Event]) -> None:
    made = machine(State.START)
    made.start()
    seen: list[type[Event]] = []
    for event in events:
        try:
            action = made.receive(event, NOW)
        except (AgentError, RuntimeError):
            assert made.state is State.FAILED
            return
        seen.append(type(event))
        if isinstance(action, Done):
            assert seen[-4:] == [Challenge, Collected, Accepted, KeyResponse]
