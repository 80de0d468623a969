"""What an input says: in words, from closed values, and never a byte of it as it came."""

import json
from dataclasses import replace

import pytest

from agent.closed import Ident
from agent.commands.diagnosis import Diagnosis, diagnose
from agent.errors import AgentError, DenialReason, KeyReleaseDeniedError, Owner, TokenCheck, TokenError, error_to_record
from agent.events import Message, ServerReady, Stage, StageEnded, StageFailed, message_to_record
from agent.handshake import TokenClaims
from agent.report import BootReport
from tests import test_handshake_ear as ear
from tests import test_handshake_token as verdict
from tests.shared import shared_data

NOW = 1_800_000_000
DENIED = KeyReleaseDeniedError(DenialReason.CLAIM, Ident("snp.measurement"), Ident("image-7"), Ident("p-7"))


def line(message: Message) -> str:
    record = message_to_record(message)
    return json.dumps({"event": record.pop("event"), "at": "2026-11-26T12:00:00Z", "t_ms": 12} | record)


def everything(diagnosis: Diagnosis) -> str:
    return repr(diagnosis) + json.dumps(diagnosis.record)


def test_an_ear_says_which_claims_of_which_device_are_not_affirmed() -> None:
    cpu = ear.submod("snp", {"measurement": "ab" * 48}, init_data="cd" * 32)
    token = ear.signed(ear.payload(cpu0=cpu, gpu0=ear.submod("nvidia", {}, ear.BAD, "contraindicated")))
    got = diagnose(f"  {token}\n", NOW)
    assert "not verified" in got.headline
    assert got.record["verified"] is False
    (problem,) = got.problems
    assert [said.split(" (")[0] for said in problem.said] == [
        "gpu0 hardware 97", "gpu0 configuration 36", "gpu0 executables 33",
    ]  # fmt: skip
    assert problem.owner is Owner.AUTHORITY
    assert ("  measurement", "ab" * 48) in got.facts
    assert ("  init_data", "cd" * 32) in got.facts
    assert ("expires", "2027-01-15T08:04:55Z") in got.facts


def test_the_recorded_token_names_hardware_status_and_advisories() -> None:
    body = shared_data("trustee/trustee/attestation-service/docs/example.token.json").read_bytes()
    got = diagnose(ear.signed(body, key=ear.STRANGER), NOW)  # nobody verifies it
    assert [problem.owner for problem in got.problems] == [Owner.AUTHORITY] * 3 + [Owner.HOST] * 2
    assert len(got.problems[-1].said) == 10  # advisories, with one thing to do
    assert got.record["expired"] is True
    assert "is over" in dict(got.facts)["expires"]


def test_neither_nonce_nor_key_nor_token_is_repeated() -> None:
    token = ear.signed(ear.payload())
    answer = json.dumps({"token": token, "tee_keypair": "-----BEGIN PRIVATE KEY-----hunter2"})
    for text in (token, answer, verdict.token()):
        said = everything(diagnose(text, NOW))
        for secret in (token, ear.NONCE, "hunter2", "PRIVATE", "tee-pubkey", "nonce"):
            assert secret not in said
    assert diagnose(answer, NOW) == diagnose(token, NOW)


def test_a_verdict_token_is_an_acceptance_that_nobody_verified() -> None:
    got = diagnose(verdict.signed(json.dumps(verdict.claims()).encode(), key=verdict.STRANGER), NOW)
    assert "acceptance, not verified" in got.headline
    assert got.problems == ()
    assert got.record == {
        "kind": "verdict-token", "verified": False, "issued_at": NOW - 5, "expires_at": NOW + 300, "expired": False,
        "key_uri": verdict.KEY_URI, "policy_version": "p-7", "min_model_version": 4, "lease_s": None, "simulated": False,
    }  # fmt: skip
    assert "ahead of this clock" in dict(diagnose(verdict.token(), NOW - 1000).facts)["issued"]
    assert isinstance(verdict.verified(verdict.token()), TokenClaims)


@pytest.mark.parametrize("text", ["a.b.c", verdict.token()[1:], ear.signed(b"{}"), "AAAA.AAAA."])
def test_what_only_looks_like_a_token_is_none(text: str) -> None:
    with pytest.raises(TokenError) as raised:
        diagnose(text, NOW)
    assert raised.value.check in (TokenCheck.FORMAT, TokenCheck.CLAIMS)


def test_a_failed_event_says_who_must_act() -> None:
    for text in (line(DENIED), json.dumps(message_to_record(DENIED))):
        (problem,) = diagnose(text, NOW).problems
        assert problem.said[0].startswith("KeyReleaseDeniedError: key release denied: ")
        assert (problem.owner, problem.next_step, problem.error) == (Owner.AUTHORITY, DENIED.next_step, KeyReleaseDeniedError)


def test_the_last_failure_in_a_log_is_told_whoever_else_writes_there() -> None:
    first = TokenError(TokenCheck.EXPIRED)
    log = "\n".join(
        ["INFO: model server", line(first), line(DENIED), '{"level":"info"}', "{", line(StageFailed(Stage.ATTEST, 5))]
    )
    assert diagnose(log, NOW).problems[0].error is KeyReleaseDeniedError
    assert diagnose(log.replace(line(DENIED), ""), NOW).problems[0].error is TokenError


def test_an_event_that_is_no_failure_says_so() -> None:
    assert diagnose(line(ServerReady(12, 1)), NOW).problems == ()
    assert "ready after 12 ms" in diagnose(line(ServerReady(12, 1)), NOW).headline
    assert "`failed`" in diagnose(line(StageFailed(Stage.ATTEST, 5)), NOW).headline
    assert diagnose(line(ServerReady(12, 1)) + "\n" + line(StageEnded(Stage.LOAD, 1)), NOW).headline.startswith("event")


def status(error: AgentError | None) -> str:
    report = BootReport("1.2.3", "run", request_id=Ident("r-1"))
    messages: list[Message] = [StageEnded(Stage.CONFIG, 3), StageFailed(Stage.ATTEST, 5)]
    for message in messages + ([error] if error else []):
        report.apply(message)
    return json.dumps(report.status())


def test_a_status_document_says_phase_stages_and_error() -> None:
    got = diagnose(status(DENIED), NOW)
    assert got.facts == (("phase", "failed"), ("  config", "done"), ("  attest", "failed"))
    assert got.problems[0].error is KeyReleaseDeniedError
    assert got.record["error"] == error_to_record(DENIED)
    assert diagnose(status(None), NOW).problems == ()


def test_the_text_of_a_status_is_not_repeated_but_made_again() -> None:
    document = json.loads(status(DENIED))
    document["error"] |= {"text": "<b>call this number</b>", "next_step": "run this", "owner": "you"}
    document["version"] = "<b>"
    got = diagnose(json.dumps(document), NOW)
    assert got == diagnose(status(DENIED), NOW)
    for word in ("<b>", "run this"):
        assert word not in everything(got)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "{}",
        "[]",
        '{"event":"nothing"}',
        '{"event":"failed"}',
        '{"event":"failed","class":"ConfigError","fields":{}}',
        '{"event":"server_ready","ms":"1","start":1}',
        '{"schema":"keyturn.status/v1"}',
        '{"schema":"keyturn.status/v2","phase":"failed"}',
        '{"schema":"keyturn.status/v1","phase":"failed","stages":[1],"error":null}',
        '{"schema":"keyturn.status/v1","phase":"x","stages":[],"error":null}',
        '{"schema":"keyturn.status/v1","phase":"failed","stages":[{"name":"config","state":"<b>"}],"error":null}',
        '{"schema":"keyturn.status/v1","phase":"failed","stages":[{"name":[],"state":"done"}],"error":null}',
        '{"a":' * 50_000,
        '{"a":' + "9" * 10_000 + "}",
    ],
)
def test_everything_else_is_refused_without_a_word_of_it(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        diagnose(text, NOW)
    assert "no event" in str(raised.value) or "does not know" in str(raised.value)


def test_times_beyond_the_calendar_are_numbers() -> None:
    body = ear.payload() | {"exp": 1 << 39}
    assert dict(diagnose(ear.signed(body), NOW).facts)["expires"] == str(1 << 39)
    assert replace(diagnose(ear.signed(body), NOW), facts=()).problems


def test_what_a_denied_guests_token_did_not_affirm_is_in_words_with_its_owner() -> None:
    line = '{"event": "not_affirmed", "at": "x", "t_ms": 1, "finding": "cpu0:executables:executables-unrecognised:33"}'
    (problem,) = diagnose(line, 0).problems
    assert "unrecognised executables" in problem.said[0]
    denied = KeyReleaseDeniedError(DenialReason.CLAIM, Ident("cpu0:executables"), None, Ident("unversioned"))
    log = f"{line}\n{json.dumps(message_to_record(denied))}"
    said = [each.said[0] for each in diagnose(log, 0).problems]
    assert len(said) == 2
    assert "KeyReleaseDeniedError" in said[0]
    assert said[1] == problem.said[0]
    assert diagnose(line.replace("33", "x"), 0).problems == ()
