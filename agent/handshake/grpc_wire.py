"""The gRPC wire: protobuf bytes to messages and back, for the guest and for the broker.

Sizes, the protocol version and closed enums are checked here and nowhere else. Works on bytes, so gRPC's own
(de)serialisers, which log what they cannot read, never see a message: both sides register the methods without them.
Does not know the order of messages (`machine.py`) nor what a token or JWE says.

Unknown fields are ignored, as protobuf intends: they can add nothing, because only the token's signed claims decide. An
unknown member of a oneof or an unknown enum value is a malformed message. See `protos/HANDSHAKE.md`.
"""

import re
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from agent.closed import MAX_IDENT_CHARS, Ident
from agent.errors import DenialReason, EvidenceFormat, MalformedEvidenceError, ProtocolProblem, RemoteProtocolError
from agent.evidence import NONCE_BYTES, CompositeEvidence, Evidence, Nonce, Tee
from agent.handshake import (
    MAX_ADDITIONAL_EVIDENCE_BYTES,
    MAX_CERTIFICATE_BYTES,
    MAX_CERTIFICATES,
    MAX_EVENT_LOG_BYTES,
    MAX_INIT_DATA_BYTES,
    MAX_JWE_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_QUOTE_BYTES,
    MAX_SESSION_BYTES,
    MAX_TOKEN_BYTES,
    MAX_TRUSTEE_TOKEN_BYTES,
    MIN_CHALLENGE_LIFE_S,
    PROTOCOL_VERSION,
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TeePublicKey,
    TokenKind,
)
from agent.handshake.pb import kbs_pb2 as pb
from agent.jose import COORDINATE_BYTES

ATTEST_METHOD = "/keyturn.kbs.v1.KeyBroker/Attest"
RELEASE_KEY_METHOD = "/keyturn.kbs.v1.KeyBroker/ReleaseKey"
RELEASE_CREDENTIALS_METHOD = "/keyturn.kbs.v1.KeyBroker/ReleaseCredentials"

SNP_REPORT_BYTES = 1184
MAX_CHALLENGE_LIFE_S = 86_400
MAX_REFERENCE_VALUE_IDS = 64
MAX_KEY_VERSION = (1 << 31) - 1

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY_URI = re.compile(r"kbs:///[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*){2}")
_REASONS = {
    pb.DENIAL_REASON_CLAIM: DenialReason.CLAIM,
    pb.DENIAL_REASON_DEVICE: DenialReason.DEVICE,
    pb.DENIAL_REASON_COLLATERAL: DenialReason.COLLATERAL,
    pb.DENIAL_REASON_REFERENCE_VALUE: DenialReason.REFERENCE_VALUE,
    pb.DENIAL_REASON_POLICY: DenialReason.POLICY,
}
_REASON_VALUES = {reason: value for value, reason in _REASONS.items()}
_TOKEN_BYTES = {TokenKind.KEYTURN: MAX_TOKEN_BYTES, TokenKind.TRUSTEE: MAX_TRUSTEE_TOKEN_BYTES}
_FIRST_VERSION = {TokenKind.KEYTURN: 1, TokenKind.TRUSTEE: 0}  # Trustee's keys have none, for which a relay says 0
_Wire = TypeVar("_Wire", bound=Message)


def pack_attest_request(message: Hello | Attestation) -> bytes:
    """The guest's message on the attestation stream.

    Raises:
        MalformedEvidenceError: the host's certificates do not fit into an Attestation.
    """
    wire = pb.AttestRequest(request_id=message.request_id)
    match message:
        case Hello():
            wire.hello.protocol_version = PROTOCOL_VERSION
            wire.hello.key_uri = message.key_uri
            wire.hello.tee = message.tee.value
        case Attestation():
            primary = message.evidence.primary
            match primary.tee:
                case Tee.SNP:
                    if not _fit(primary.cert_chain):
                        raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("cert_chain"))
                    wire.attestation.snp.report = primary.report
                    wire.attestation.snp.cert_chain.extend(primary.cert_chain)
                case Tee.TDX:
                    wire.attestation.tdx.quote = primary.report
                    wire.attestation.tdx.event_log = primary.event_log
                case Tee.SAMPLE:
                    raise RuntimeError("sample evidence is for Trustee: the configuration must not get this far")
            wire.attestation.tee_pubkey.x = message.tee_pubkey.x
            wire.attestation.tee_pubkey.y = message.tee_pubkey.y
            wire.attestation.additional_evidence = message.evidence.additional_evidence.encode()
            wire.attestation.init_data = message.init_data.encode()
    return wire.SerializeToString()


def parse_attest_request(data: bytes, state: Ident) -> Hello | Attestation:
    """What a guest sent. `state` names where the reader was, for the error.

    Raises:
        RemoteProtocolError: OVERSIZED, VERSION or MALFORMED.
    """
    wire = _decode(pb.AttestRequest(), data, state)
    request_id = _request_id(wire.request_id, state)
    match wire.WhichOneof("message"):
        case "hello":
            if wire.hello.protocol_version != PROTOCOL_VERSION:
                raise RemoteProtocolError(ProtocolProblem.VERSION, state)
            try:
                tee = Tee(wire.hello.tee)
            except ValueError:
                raise _malformed(state) from None
            # refusal: test_a_request_out_of_form_is_refused
            if tee is Tee.SAMPLE:
                raise _malformed(state)
            return Hello(request_id, parse_key_uri(wire.hello.key_uri, state), tee)
        case "attestation":
            sent = wire.attestation
            if (len(sent.tee_pubkey.x), len(sent.tee_pubkey.y)) != (COORDINATE_BYTES, COORDINATE_BYTES):
                raise _malformed(state)
            primary = _parse_primary(sent, state)
            if len(sent.additional_evidence) > MAX_ADDITIONAL_EVIDENCE_BYTES or len(sent.init_data) > MAX_INIT_DATA_BYTES:
                raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
            try:
                additional, init_data = sent.additional_evidence.decode(), sent.init_data.decode()
            except UnicodeDecodeError:
                raise _malformed(state) from None
            key = TeePublicKey(sent.tee_pubkey.x, sent.tee_pubkey.y)
            return Attestation(request_id, key, CompositeEvidence(primary, additional), init_data)
        case _:
            raise _malformed(state)


def _parse_primary(sent: pb.Attestation, state: Ident) -> Evidence:
    match sent.WhichOneof("primary_evidence"):
        case "snp":
            certificates = tuple(sent.snp.cert_chain)
            if len(sent.snp.report) != SNP_REPORT_BYTES or not _fit(certificates):
                raise _malformed(state)
            return Evidence(Tee.SNP, sent.snp.report, certificates)
        case "tdx":
            if not 0 < len(sent.tdx.quote) <= MAX_QUOTE_BYTES:
                raise _malformed(state)
            if len(sent.tdx.event_log) > MAX_EVENT_LOG_BYTES:
                raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
            return Evidence(Tee.TDX, sent.tdx.quote, event_log=sent.tdx.event_log)
        case _:
            raise _malformed(state)


def pack_attest_response(message: Challenge | Accepted | Denied) -> bytes:
    """The broker's message on the attestation stream."""
    wire = pb.AttestResponse(request_id=message.request_id)
    match message:
        case Challenge():
            wire.challenge.nonce = message.nonce
            wire.challenge.expires_in_s = message.expires_in_s
        case Accepted():
            wire.verdict.accepted.token = message.token
            wire.verdict.accepted.policy_version = message.policy_version
            wire.verdict.accepted.reference_value_ids.extend(message.reference_value_ids)
            wire.verdict.accepted.session = message.session
        case Denied():
            wire.verdict.denied.reason = _REASON_VALUES[message.reason]
            wire.verdict.denied.claim = message.claim
            wire.verdict.denied.reference_value_id = message.reference_value_id or ""
            wire.verdict.denied.policy_version = message.policy_version
    return wire.SerializeToString()


def parse_attest_response(data: bytes, state: Ident, tokens: TokenKind = TokenKind.KEYTURN) -> Challenge | Accepted | Denied:
    """What a broker of that kind sent. Texts for display that are no identifiers become `unprintable`: they never decide.

    Raises:
        RemoteProtocolError: OVERSIZED or MALFORMED.
    """
    wire = _decode(pb.AttestResponse(), data, state)
    request_id = _request_id(wire.request_id, state)
    if wire.WhichOneof("message") == "challenge":
        nonce, life_s = wire.challenge.nonce, wire.challenge.expires_in_s
        if len(nonce) != NONCE_BYTES or not MIN_CHALLENGE_LIFE_S <= life_s <= MAX_CHALLENGE_LIFE_S:
            raise _malformed(state)
        return Challenge(request_id, Nonce(nonce), life_s)
    match wire.verdict.WhichOneof("decision"):
        case "accepted":
            accepted = wire.verdict.accepted
            if len(accepted.reference_value_ids) > MAX_REFERENCE_VALUE_IDS:
                raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
            values = tuple(Ident.of_peer(text) for text in accepted.reference_value_ids)
            return Accepted(
                request_id,
                _token(accepted.token, state, tokens),
                Ident.of_peer(accepted.policy_version),
                values,
                _session(accepted.session, state),
            )
        case "denied":
            denied = wire.verdict.denied
            reason = _REASONS.get(denied.reason)
            if reason is None:
                raise _malformed(state)
            value = Ident.of_peer(denied.reference_value_id) if denied.reference_value_id else None
            return Denied(request_id, reason, Ident.of_peer(denied.claim), value, Ident.of_peer(denied.policy_version))
        case _:
            raise _malformed(state)


def pack_key_request(message: KeyRequest) -> bytes:
    """The guest's key request."""
    wire = pb.ReleaseKeyRequest(
        request_id=message.request_id, token=message.token, key_uri=message.key_uri, session=message.session
    )
    return wire.SerializeToString()


def parse_key_request(data: bytes, state: Ident, tokens: TokenKind = TokenKind.KEYTURN) -> KeyRequest:
    """What a guest sent. Raises RemoteProtocolError: OVERSIZED or MALFORMED."""
    wire = _decode(pb.ReleaseKeyRequest(), data, state)
    return KeyRequest(
        _request_id(wire.request_id, state),
        _token(wire.token, state, tokens),
        parse_key_uri(wire.key_uri, state),
        _session(wire.session, state),
    )


def pack_key_response(message: KeyResponse) -> bytes:
    """The broker's answer to a key request."""
    wire = pb.ReleaseKeyResponse(
        request_id=message.request_id, jwe=message.jwe, key_id=message.key_id, key_version=message.key_version
    )
    return wire.SerializeToString()


def parse_key_response(data: bytes, state: Ident, tokens: TokenKind = TokenKind.KEYTURN) -> KeyResponse:
    """What a broker of that kind sent. Raises RemoteProtocolError: OVERSIZED or MALFORMED."""
    wire = _decode(pb.ReleaseKeyResponse(), data, state)
    request_id, jwe = _request_id(wire.request_id, state), _jwe(wire.jwe, state)
    if not _FIRST_VERSION[tokens] <= wire.key_version <= MAX_KEY_VERSION:
        raise _malformed(state)
    return KeyResponse(request_id, jwe, _ident(wire.key_id, state), wire.key_version)


def pack_credentials_request(message: CredentialsRequest) -> bytes:
    """The guest's request for the credentials of its store."""
    wire = pb.ReleaseCredentialsRequest(
        request_id=message.request_id,
        token=message.token,
        credentials_uri=message.credentials_uri,
        session=message.session,
    )
    return wire.SerializeToString()


def parse_credentials_request(data: bytes, state: Ident, tokens: TokenKind = TokenKind.KEYTURN) -> CredentialsRequest:
    """What a guest sent. Raises RemoteProtocolError: OVERSIZED or MALFORMED."""
    wire = _decode(pb.ReleaseCredentialsRequest(), data, state)
    return CredentialsRequest(
        _request_id(wire.request_id, state),
        _token(wire.token, state, tokens),
        parse_key_uri(wire.credentials_uri, state),
        _session(wire.session, state),
    )


def pack_credentials_response(message: CredentialsResponse) -> bytes:
    """The broker's answer to a request for credentials."""
    return pb.ReleaseCredentialsResponse(request_id=message.request_id, jwe=message.jwe).SerializeToString()


def parse_credentials_response(data: bytes, state: Ident) -> CredentialsResponse:
    """What a broker sent. Raises RemoteProtocolError: OVERSIZED or MALFORMED."""
    wire = _decode(pb.ReleaseCredentialsResponse(), data, state)
    return CredentialsResponse(_request_id(wire.request_id, state), _jwe(wire.jwe, state))


def parse_key_uri(text: str, state: Ident) -> Ident:
    """`kbs:///<repository>/<type>/<tag>`, at most 128 characters. Raises RemoteProtocolError: MALFORMED."""
    if len(text) > MAX_IDENT_CHARS or not _KEY_URI.fullmatch(text):
        raise _malformed(state)
    return Ident(text)


def _decode(wire: _Wire, data: bytes, state: Ident) -> _Wire:
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
    try:
        wire.ParseFromString(data)
    except DecodeError:
        raise _malformed(state) from None  # protobuf's text can quote the peer's bytes
    return wire


def _fit(certificates: tuple[bytes, ...]) -> bool:
    return len(certificates) <= MAX_CERTIFICATES and all(0 < len(item) <= MAX_CERTIFICATE_BYTES for item in certificates)


def _request_id(text: str, state: Ident) -> Ident:
    if not _REQUEST_ID.fullmatch(text):
        raise _malformed(state)
    return Ident(text)


def _ident(text: str, state: Ident) -> Ident:
    try:
        return Ident(text)
    except ValueError:
        raise _malformed(state) from None


def _session(data: bytes, state: Ident) -> bytes:
    if len(data) > MAX_SESSION_BYTES:
        raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
    return data


def _jwe(data: bytes, state: Ident) -> bytes:
    if len(data) > MAX_JWE_BYTES:
        raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
    if not data:
        raise _malformed(state)
    return data


def _token(text: str, state: Ident, tokens: TokenKind) -> str:
    if len(text) > _TOKEN_BYTES[tokens]:
        raise RemoteProtocolError(ProtocolProblem.OVERSIZED, state)
    if not text or not text.isascii():
        raise _malformed(state)
    return text


def _malformed(state: Ident) -> RemoteProtocolError:
    return RemoteProtocolError(ProtocolProblem.MALFORMED, state)
