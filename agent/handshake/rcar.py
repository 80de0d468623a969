"""The second wire: Trustee's KBS protocol 0.4.0 (RCAR) as bytes, and every answer that is not the one we want as an error.

Messages, sizes and versions are checked here and nowhere else. A KBS answers 401 to nearly everything and says little more, so
what there is to tell apart is a table here (`failure_of`), with an owner for each row. Nothing a KBS writes is repeated: of
its text only the protocol version is read. Does not send (`kbs_http.py`), order (`machine.py`) or verify (`rcar_token.py`).
Follows confidential-containers/trustee 78962cd: `kbs/src/error.rs`, `kbs/src/attestation`, kbs-types 0.18.
"""

import enum
import json
import re
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import BindingHash, CompositeEvidence, Nonce, OpaqueNonce, Tee, trustee_json
from agent.handshake import TeePublicKey
from agent.handshake.ar4si import Tier, TrustClaim, meaning_of, tier_of
from agent.handshake.ear import MAX_EAR_BYTES, Finding, FindingKind, decode_unverified_ear, findings
from agent.jose import nonce_text, pack_jwk, parse_object, string

PROTOCOL_VERSION = "0.4.0"
"""Of every release since v0.14.0 (July 2025). A KBS takes exactly its own."""
PREFIX = "/kbs/v0"
SESSION_LIFE_S = 300
"""A KBS's default, from its challenge on. Its cookie says so too, by a clock that is not ours."""
MAX_REQUEST_BYTES = 2 << 20
"""A KBS's default limit."""
MAX_ANSWER_BYTES = 2 * MAX_EAR_BYTES
MAX_BEARER_BYTES = 96 << 10
"""What fits into its 128 KiB for a request's head. With a longer token only the session's cookie opens the door."""
UNVERSIONED = Ident("unversioned")
"""Stands where our broker would name the version of its policy: Trustee's have none."""

_MAX_NONCE_CHARS = 1024
_MAX_COOKIES = 16
_MAX_COOKIE_CHARS = 1024  # all of them, beside the longest bearer, still fit into a head
_SESSION = "kbs-session-id"
_COOKIE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256})=([!#-+\--:<-\[\]-~]*)")  # RFC 6265, 4.1.1
_COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_RESOURCE_URI = re.compile(r"kbs(?:\+([a-z0-9-]+))?:///([^?]+)(\?.+)?")
_ERRORS = "https://github.com/confidential-containers/kbs/errors/"
_WANTED_VERSION = re.compile(r"Protocol Version Mismatch: expect =(\d{1,4}\.\d{1,4}\.\d{1,4})\b")


# --- what we send -------------------------------------------------------------------------------------------------------


def pack_request(version: str, tee: Tee) -> bytes:
    """The body for `/auth`."""
    hashes = {"supported-hash-algorithms": [each.value for each in BindingHash]}
    return _pack({"version": version, "tee": tee.value, "extra-params": hashes})


def pack_attestation(nonce: Nonce, tee_pubkey: TeePublicKey, evidence: CompositeEvidence, init_data: str | None) -> bytes:
    """The body for `/attest`, at most 2 MiB.

    Args:
        nonce: of the Challenge.
        tee_pubkey: our ephemeral key.
        evidence: over both.
        init_data: the whole initdata document; None: none is at hand, and no claim is made from it.

    Raises:
        MalformedEvidenceError: the report does not parse.
        TrusteeRefusedError: TOO_LARGE; a KBS would refuse it without reading it.
    """
    body = _pack(
        {
            "init-data": None if init_data is None else {"format": "toml", "body": init_data},
            "runtime-data": {"nonce": nonce_text(nonce), "tee-pubkey": pack_jwk(tee_pubkey)},
            "tee-evidence": {
                "primary_evidence": trustee_json.to_json(evidence.primary),
                "additional_evidence": evidence.additional_evidence,
            },
        }
    )
    # refusal: test_an_attestation_above_trustees_limit_is_not_sent
    if len(body) > MAX_REQUEST_BYTES:
        raise TrusteeRefusedError(TrusteeRefusal.TOO_LARGE)
    return body


def _pack(message: dict[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()


def resource_path(uri: str) -> str:
    """Where the key of `kbs:///repository/type/tag` or `kbs+plugin:///path?query` is asked for: path and query of a URL.

    Raises:
        ValueError: it is no such URI.
    """
    match = _RESOURCE_URI.fullmatch(uri)
    if match is None:
        raise ValueError("not a resource URI")
    plugin, path, query = match.groups()
    return f"{PREFIX}/{plugin or 'resource'}/{path}{query or ''}"


# --- what comes back ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, as far as anybody reads it.

    Attributes:
        body: at most `MAX_ANSWER_BYTES`.
        set_cookies: the headers of that name, each as it came.
        date, retry_after: the headers of that name.
    """

    status: int
    body: bytes = field(repr=False)
    set_cookies: tuple[str, ...] = field(default=(), repr=False)
    date: str | None = None
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What `/auth` gives: the Challenge's nonce, and the hash that binds it."""

    nonce: Nonce = field(repr=False)
    hash: BindingHash


def parse_challenge(body: bytes, state: Ident) -> Offer:
    """The Challenge. Its nonce is a text of 1 to 1024 characters, whatever it says.

    Raises:
        RemoteProtocolError: MALFORMED, also for a hash that we do not have.
    """
    try:
        members = parse_object(body, MAX_ANSWER_BYTES, fractions_become_none=True)
        nonce = string(members, "nonce")
        parameters = members.get("extra-params")
        selected: object = BindingHash.SHA384.value
        if isinstance(parameters, dict):  # else the empty text, or something that a later Trustee means for others
            selected = parameters.get("selected-hash-algorithm", selected)
        # refusal: test_a_challenge_out_of_form_is_refused
        if not 0 < len(nonce) <= _MAX_NONCE_CHARS or not isinstance(selected, str):
            raise ValueError
        return Offer(Nonce(OpaqueNonce(nonce.encode())), BindingHash(selected.lower()))
    except ValueError:
        raise RemoteProtocolError(ProtocolProblem.MALFORMED, state) from None


def parse_token(body: bytes, state: Ident) -> str:
    """The attestation token of `/attest`, unverified: a compact JWS of at most 768 KiB.

    Raises:
        RemoteProtocolError: MALFORMED.
    """
    try:
        token = string(parse_object(body, MAX_ANSWER_BYTES, fractions_become_none=True), "token")
    except ValueError:
        raise RemoteProtocolError(ProtocolProblem.MALFORMED, state) from None
    # refusal: test_a_token_out_of_form_is_refused
    if len(token) > MAX_EAR_BYTES or not _COMPACT_JWS.fullmatch(token):  # it goes into a header
        raise RemoteProtocolError(ProtocolProblem.MALFORMED, state)
    return token


def merge_cookies(cookies: dict[str, str], headers: tuple[str, ...]) -> dict[str, str]:
    """The cookies to send from now on: names and values as they came, and nothing else of them.

    Attributes are not looked at: `Expires` is a time on the KBS's clock, and a guest whose own clock is ahead would drop the
    session it was just given. All of them go to the one KBS there is, those of a load balancer before it too. What is not a
    cookie, or too many or too long, is left out.
    """
    merged = dict(cookies)
    for header in headers:
        match = _COOKIE.fullmatch(header.partition(";")[0].strip())
        if match and len(match[0]) <= _MAX_COOKIE_CHARS and (match[1] in merged or len(merged) < _MAX_COOKIES):
            merged[match[1]] = match[2]
    return merged


def has_session(cookies: dict[str, str]) -> bool:
    return bool(cookies.get(_SESSION))


def clock_ahead_s(answer: Answer, now: int) -> int | None:
    """How many seconds our clock is ahead of the one that dated `answer`; None where it has no date that can be read."""
    if answer.date is None or len(answer.date) > 64:
        return None
    try:
        date = parsedate_to_datetime(answer.date)  # without a zone of its own it is of this process, and HTTP has but one
        return now - int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return None


# --- what comes instead -------------------------------------------------------------------------------------------------


class Exchange(enum.Enum):
    AUTH = "auth"
    ATTEST = "attest"
    RESOURCE = "resource"


_REFUSALS = {  # by the last part of ErrorInformation's `type`
    "TokenNotFound": TrusteeRefusal.NO_SESSION,
    "TokenVerifierError": TrusteeRefusal.VERIFICATION,
    "PolicyEngineError": TrusteeRefusal.POLICY_ENGINE,
    "ParsePolicyError": TrusteeRefusal.POLICY_ENGINE,
    "PluginInternalError": TrusteeRefusal.RESOURCE,
    "JweError": TrusteeRefusal.KEY_TYPE,
    "PluginNotFound": TrusteeRefusal.NO_PLUGIN,
    "InvalidRequestPath": TrusteeRefusal.PATH,
    "AdminAuth": TrusteeRefusal.ADMIN,  # of releases before 78962cd, which has the next two
    "AdminAuthAccess": TrusteeRefusal.ADMIN,
    "AdminAuthInitialization": TrusteeRefusal.ADMIN,
    "HTTPFailed": TrusteeRefusal.INTERNAL,
    "HTTPSFailed": TrusteeRefusal.INTERNAL,
    "PluginManagerInitialization": TrusteeRefusal.INTERNAL,
    "PrometheusError": TrusteeRefusal.INTERNAL,
    "RvpsError": TrusteeRefusal.INTERNAL,
    "SerdeError": TrusteeRefusal.INTERNAL,
    "StorageBackendInitialization": TrusteeRefusal.INTERNAL,
}
_STATUSES = (401, 403, 404)
"""The second for a policy's denial, by later releases than 78962cd."""
_MAX_RETRY_AFTER_S = 3600


def failure_of(exchange: Exchange, answer: Answer, state: Ident, token: str | None = None) -> tuple[AgentError, float]:
    """Our error for an answer other than 200, and the seconds we were asked to wait at least.

    Args:
        exchange: what was asked.
        answer: what came.
        state: the handshake's state, for the error.
        token: of `/attest`, once there is one: it says what a denial does not.
    """
    # 1. From HTTP: a proxy's, a load balancer's, or the KBS's before it reads anything.
    status = answer.status
    # refusal: test_every_status_that_is_no_answer_has_its_error
    if 300 <= status < 400:
        return RemoteProtocolError(ProtocolProblem.REDIRECT, state), 0.0
    if status in (429, 503):
        return BrokerUnreachableError(Unreachable.OVERLOADED), _retry_after_s(answer)
    if status >= 500 or status == 408:  # a proxy's clock: it ended a connection that was kept while the evidence was made
        return BrokerUnreachableError(Unreachable.SERVER_ERROR), _retry_after_s(answer)
    if status == 413:
        return TrusteeRefusedError(TrusteeRefusal.TOO_LARGE), 0.0

    # 2. From the KBS: a word and a text.
    try:
        members = parse_object(answer.body, MAX_ANSWER_BYTES, fractions_become_none=True)
        kind, detail = string(members, "type"), string(members, "detail")
        if status not in _STATUSES or not kind.startswith(_ERRORS):
            raise ValueError
    except ValueError:
        return RemoteProtocolError(ProtocolProblem.FOREIGN, state), 0.0
    match kind.removeprefix(_ERRORS):
        case "PolicyDeny":
            return denial(token), 0.0
        case "AttestationError":
            return _attestation_error(exchange, detail, state), 0.0
        case word:
            return TrusteeRefusedError(_REFUSALS.get(word, TrusteeRefusal.UNKNOWN)), 0.0


def _attestation_error(exchange: Exchange, detail: str, state: Ident) -> AgentError:
    """The one type that stands for many things; at `/attest` its text is always the same."""
    if exchange is not Exchange.AUTH:
        return TrusteeRefusedError(TrusteeRefusal.ATTESTATION)
    if version := _WANTED_VERSION.search(detail):
        return RemoteProtocolError(ProtocolProblem.VERSION, state, Ident(version[1]))
    if "KBS version" in detail:  # ours was not one it could read
        return RemoteProtocolError(ProtocolProblem.VERSION, state)
    asked_wrongly = detail.endswith("deserialize Request")
    return TrusteeRefusedError(TrusteeRefusal.REQUEST if asked_wrongly else TrusteeRefusal.CHALLENGE)


def _retry_after_s(answer: Answer) -> float:
    """Seconds only: a date is one on another clock, and the schedule has its own waits."""
    text = answer.retry_after or ""
    return float(min(int(text), _MAX_RETRY_AFTER_S)) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0


def denial(token: str | None) -> KeyReleaseDeniedError:
    """The policy's no, with the worst that the token says of us: a KBS tells nobody which part of it failed."""
    found = not_affirmed(token)
    if not found:
        return KeyReleaseDeniedError(DenialReason.POLICY, Ident("resource-policy"), None, UNVERSIONED)
    return KeyReleaseDeniedError(DenialReason.CLAIM, found[0], None, UNVERSIONED)


def not_affirmed(token: str | None) -> tuple[Ident, ...]:
    """What keeps each device from being affirmed, as `device:what:value`; without a token, or for a good one, nothing."""
    if token is None:
        return ()
    try:
        ear = decode_unverified_ear(token)  # verified when it came, and only told here
    except TokenError:
        return ()
    return tuple(map(_named, findings(ear)))


def _named(finding: Finding) -> Ident:
    parts: list[object] = [finding.submod]
    if finding.kind is FindingKind.CLAIM and finding.meaning and finding.claim:
        parts += [finding.claim.value, finding.meaning.name.lower().replace("_", "-"), finding.value]
    else:
        parts += [finding.kind.value.replace(" ", "-").lower(), finding.detail or finding.tier.value]
    return Ident.of_peer(":".join(map(str, parts)))


def parse_not_affirmed(name: Ident) -> Finding | None:
    """The finding that `not_affirmed` names so; None: it is no such name. The tier of a TCB status is not in it."""
    submod, what, detail, *value = [*name.split(":", 3), "", ""][:4]
    try:
        device = Ident(submod)
        if what in {claim.value for claim in TrustClaim}:
            claim, number = TrustClaim(what), int(value[0])
            return Finding(device, FindingKind.CLAIM, tier_of(number), claim, number, meaning_of(claim, number))
        kind = next(kind for kind in FindingKind if kind.value.replace(" ", "-").lower() == what)
        if kind in (FindingKind.TCB_STATUS, FindingKind.ADVISORY):
            return Finding(device, kind, Tier.WARNING, detail=Ident(detail))
        return Finding(device, kind, Tier(detail))
    except (ValueError, StopIteration):
        return None
