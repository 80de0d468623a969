"""What failed, who must act and what to do, read from a token, an event or a status document: `keyturn explain` prints it.

Nothing here was verified, and no byte of the input is repeated as it came: what is said are closed values, read by the
parsers that read them in a boot. A nonce or a key in the input is not said at all. Opens nothing and knows no clock.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby

from agent.closed import to_record
from agent.errors import AgentError, Owner, TokenCheck, TokenError, error_from_record, error_to_record
from agent.events import Message, NotAffirmed, Stage, StageFailed, message_from_record, message_to_record
from agent.handshake import TokenClaims
from agent.handshake.advice import advice_for
from agent.handshake.ear import MAX_EAR_BYTES, Ear, EvidenceKind, Submod, decode_unverified_ear, findings
from agent.handshake.rcar import parse_not_affirmed
from agent.handshake.token import decode_unverified_token
from agent.report import STATUS_SCHEMA, Phase, console_line

MAX_INPUT_BYTES = 1 << 20
"""A log of a whole boot. A token is at most 768 KiB."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_UNVERIFIED = "not verified: whoever sent it may have written it"
_AFFIRMED = (
    "nothing: every device is affirmed. Where the key is denied all the same, the resource policy asks for something else: "
    "another init_data, another path or another number of devices"
)
_ADDED = {"at", "t_ms"}  # to a message by who writes it on a line (`telling.py`)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that failed, or several that one act mends."""

    said: tuple[str, ...]
    owner: Owner
    next_step: str
    error: type[AgentError] | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an input says.

    Attributes:
        headline: what it is, and that nobody verified it.
        facts: names and values, for people.
        problems: empty when it says of no failure.
        record: all of it, as JSON scalars, lists and objects.
        without_problems: what that means.
    """

    headline: str
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]
    record: dict[str, object]
    without_problems: str = "nothing that this says"


def diagnose(text: str, now: int) -> Diagnosis:
    """Read a token, the answer of an attestation that holds one, an event, the lines of a log, or a status document.

    Args:
        text: at most `MAX_INPUT_BYTES`.
        now: Unix seconds, to say which times are over.

    Raises:
        TokenError: it has the form of a token, and is none.
        ValueError: it is nothing of that; the text of the exception is fixed.
    """
    text = text.strip()
    if _TOKEN.fullmatch(text):
        return _of_token(text, now)
    members = _json_object(text)
    if members is None:
        return _of_log(text)
    if isinstance(token := members.get("token"), str):  # of /attest, or of the attestation-agent: then with a private key
        return _of_token(token.strip(), now)
    if members.get("schema") == STATUS_SCHEMA:
        return _of_status(members)
    return _of_message(_message(members))


# --- tokens -----------------------------------------------------------------------------------------------------------


def _of_token(token: str, now: int) -> Diagnosis:
    try:
        return _of_ear(decode_unverified_ear(token), now)
    except TokenError as error:
        if error.check is not TokenCheck.CLAIMS or len(token) > MAX_EAR_BYTES:
            raise
    return _of_verdict(decode_unverified_token(token), now)


def _of_ear(ear: Ear, now: int) -> Diagnosis:
    facts = [("issuer", str(ear.issuer or "not said")), *_times(ear.issued_at, ear.expires_at, now)]
    for submod in ear.submods:
        kind = f"{submod.kind.value} evidence" if submod.kind else "evidence of an unknown kind"
        facts.append((submod.name, f"{submod.status.value}, {kind}"))
        facts += [(f"  {name}", str(value)) for name, value in _shown(submod).items() if value]
    kinds = {submod.name: submod.kind for submod in ear.submods}
    found = [(finding, advice_for(finding, kinds[finding.submod])) for finding in findings(ear)]
    problems = tuple(
        Problem(tuple(str(finding) for finding, _ in group), advice.owner, advice.next_step)
        for advice, group in groupby(found, lambda pair: pair[1])
    )
    record = {
        "kind": "ear",
        "verified": False,
        "issuer": ear.issuer,
        "issued_at": ear.issued_at,
        "expires_at": ear.expires_at,
        "expired": now >= ear.expires_at,
        "simulated": ear.simulated,
        "submods": [
            {
                "name": submod.name,
                "status": submod.status.value,
                "kind": submod.kind.value if submod.kind else None,
                "vector": {claim.value: value for claim, value in submod.vector.items()},
                **_shown(submod),
            }
            for submod in ear.submods
        ],
        "findings": [
            {**to_record(finding), "text": str(finding), "owner": advice.owner.value, "next_step": advice.next_step}
            for finding, advice in found
        ],
    }
    return Diagnosis(f"attestation token of Trustee (EAR), {_UNVERIFIED}", tuple(facts), problems, record, _AFFIRMED)


def _shown(submod: Submod) -> dict[str, object]:
    return {
        "measurement": submod.measurement,
        "init_data": submod.init_data.hex() if submod.init_data is not None else None,
        "tcb_status": submod.tcb_status,
    }


def _of_verdict(claims: TokenClaims, now: int) -> Diagnosis:
    shown: dict[str, object] = {
        "key_uri": claims.key_uri,
        "policy_version": claims.policy_version,
        "min_model_version": claims.min_model_version,
        "lease_s": claims.lease_s,
        "simulated": claims.simulated,
    }
    record = {
        "kind": "verdict-token",
        "verified": False,
        "issued_at": claims.issued_at,
        "expires_at": claims.expires_at,
        "expired": now >= claims.expires_at,
        **shown,
    }
    facts = [(name, "none" if value is None else str(value)) for name, value in shown.items()]
    headline = f"verdict token of a keyturn broker: an acceptance, {_UNVERIFIED}"
    return Diagnosis(headline, (*_times(claims.issued_at, claims.expires_at, now), *facts), (), record)


def _times(issued_at: int, expires_at: int, now: int) -> list[tuple[str, str]]:
    over = ", which is over: a token is for the minutes after it was issued" if now >= expires_at else ""
    ahead = ", which is ahead of this clock" if issued_at > now else ""
    return [("issued", _utc(issued_at) + ahead), ("expires", _utc(expires_at) + over)]


def _utc(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):  # after the year 9999
        return str(seconds)


# --- events -----------------------------------------------------------------------------------------------------------


def _of_log(text: str) -> Diagnosis:
    """The last failure among lines of which some may be another program's; without one, the last event."""
    messages = list(_messages(text))
    if not messages:
        raise ValueError("no token, no event, no status document and no log with events")
    failures = [message for message in messages if isinstance(message, AgentError)]
    diagnosis = _of_message(failures[-1] if failures else messages[-1])
    found = tuple(problem for message in messages for problem in _not_affirmed(message)) if failures else ()
    return replace(diagnosis, problems=diagnosis.problems + found)


def _messages(text: str) -> Iterator[Message]:
    for line in text.splitlines():
        members = _json_object(line)
        if members is not None:
            with suppress(ValueError):
                yield _message(members)


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _message(members: dict[str, object]) -> Message:
    record = {name: value for name, value in members.items() if name not in _ADDED}
    try:
        return message_from_record(record)
    except (ValueError, TypeError):
        raise ValueError("no event and no status document that this version knows") from None


def _of_message(message: Message) -> Diagnosis:
    record = {"kind": "event", **message_to_record(message)}
    if isinstance(message, AgentError):
        return Diagnosis("event of a boot: it failed", (), (_problem(message),), record)
    if problems := _not_affirmed(message):
        return Diagnosis("event of a boot: after a denial", (), problems, record)
    line = console_line(message) or str(record["event"]).replace("_", " ")
    more = "; the event `failed` that follows says why" if isinstance(message, StageFailed) else ""
    return Diagnosis(f"event of a boot: {line}{more}", (), (), record)


def _not_affirmed(message: Message) -> tuple[Problem, ...]:
    """What the token of a denied guest did not affirm, as the agent told it."""
    finding = parse_not_affirmed(message.finding) if isinstance(message, NotAffirmed) else None
    if finding is None:
        return ()
    advice = advice_for(finding, EvidenceKind.NVIDIA if finding.submod.startswith("gpu") else None)
    return (Problem((str(finding),), advice.owner, advice.next_step),)


def _problem(error: AgentError) -> Problem:
    said = f"{type(error).__name__}: {error.what()} (exit status {error.exit_status}, step {error.step.value})"
    return Problem((said,), error.owner, error.next_step, type(error))


# --- status -----------------------------------------------------------------------------------------------------------


def _of_status(members: dict[str, object]) -> Diagnosis:
    """Of the document only what is closed: phase, stages, and the error, which is read as in a boot."""
    try:
        phase = Phase(members.get("phase"))
        stages = members["stages"]
        if not isinstance(stages, list):
            raise ValueError
        states = {Stage(stage["name"]): _STATES[stage["state"]] for stage in stages}
        error = members["error"]
        failed = error_from_record(error) if isinstance(error, dict) else None
    except (ValueError, TypeError, KeyError):
        raise ValueError("a status document that this version does not know") from None
    facts = [("phase", phase.value), *((f"  {stage.value}", state) for stage, state in states.items())]
    record: dict[str, object] = {
        "kind": "status",
        "phase": phase.value,
        "stages": {stage.value: state for stage, state in states.items()},
        "error": error_to_record(failed) if failed else None,
    }
    return Diagnosis("status of a boot", tuple(facts), (_problem(failed),) if failed else (), record)


_STATES = {state: state for state in ("running", "done", "failed")}
