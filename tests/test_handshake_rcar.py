"""Trustee's messages to the letter: the vectors, what is read of an answer, and the table of refusals."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    Owner,
    ProtocolProblem,
    RemoteProtocolError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import BindingHash, CompositeEvidence, Evidence, Nonce, OpaqueNonce, RuntimeData, Tee, binding
from agent.handshake import TeePublicKey, rcar
from agent.handshake.ear import MAX_EAR_BYTES
from agent.handshake.rcar import Answer, Exchange
from agent.jose import parse_point
from agent.keys import EphemeralKey, open_jwe, parse_jwe
from tests.hostile_kbs import AUTHORITY, ERRORS, ear, signed
from tests.shared import shared_data

STATE = Ident("AWAIT_VERDICT")
KEY = TeePublicKey(b"x" * 32, b"y" * 32)
NONCE = Nonce(OpaqueNonce(b"nonce"))
SAMPLE = CompositeEvidence(Evidence(Tee.SAMPLE, bytes(48)), "")


def vectors() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_text())
    return read


# --- vectors ------------------------------------------------------------------------------------------------------------


def test_report_data_and_device_nonce_are_those_of_the_vectors() -> None:
    for row in vectors()["report_data"]:
        said = row["runtime_data"]
        point = parse_point(said["tee-pubkey"])
        for nonce in (Nonce(OpaqueNonce(said["nonce"].encode())), Nonce(bytes(range(32)))):
            data = RuntimeData(nonce, point.x, point.y)
            text = said["additional-evidence"]
            assert binding.canonical_runtime_data(data, text).decode() == row["canonical"]
            assert binding.canonical_runtime_data(data, None).decode() == row["canonical_device"]
            assert binding.report_data(data, text).hex() == row["report_data_64_hex"]
            assert binding.device_nonce(data).hex() == row["nvidia_nonce_32_hex"]


def test_the_sealed_key_of_the_vectors_opens_and_its_other_curve_does_not() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    from agent.errors import KeyUnwrapError
    from agent.jose import parse_b64url

    ours, other = vectors()["jwe"]
    secret = int.from_bytes(parse_b64url(ours["recipient_pkcs8_pem"]["d"]))
    opened = bytearray(32)
    open_jwe(
        json.dumps(ours["response"]).encode(), EphemeralKey(ec.derive_private_key(secret, ec.SECP256R1())), memoryview(opened)
    )
    assert bytes(opened).decode() == ours["plaintext"]
    with pytest.raises(KeyUnwrapError):
        parse_jwe(json.dumps(other["response"]).encode())


# --- what we send -------------------------------------------------------------------------------------------------------


def test_members_stand_in_trustees_order_and_say_nothing_more() -> None:
    assert rcar.pack_request("0.4.0", Tee.SNP) == (
        b'{"version":"0.4.0","tee":"snp","extra-params":{"supported-hash-algorithms":["sha256","sha384","sha512"]}}'
    )
    body = rcar.pack_attestation(NONCE, KEY, SAMPLE, None).decode()
    assert re.sub(r'"(x|y|report_data)":"[^"]*"', r'"\1":""', body) == (
        '{"init-data":null,"runtime-data":{"nonce":"nonce","tee-pubkey":{"kty":"EC","crv":"P-256","alg":"ECDH-ES+A256KW",'
        '"x":"","y":""}},"tee-evidence":{"primary_evidence":{"svn":"1","report_data":""},"additional_evidence":""}}'
    )


def test_initdata_is_sent_as_it_is() -> None:
    document = 'version = "0.1.0"\n# ü "quoted" \\ \t\r\n'
    sent = json.loads(rcar.pack_attestation(NONCE, KEY, SAMPLE, document))
    assert sent["init-data"] == {"format": "toml", "body": document}


def test_an_attestation_above_trustees_limit_is_not_sent() -> None:
    with pytest.raises(TrusteeRefusedError) as raised:
        rcar.pack_attestation(NONCE, KEY, SAMPLE, "x" * (2 << 20))
    assert raised.value.refusal is TrusteeRefusal.TOO_LARGE
    assert not raised.value.retryable


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("kbs:///one/key/1", "/kbs/v0/resource/one/key/1"),
        ("kbs+resource:///one/key/1", "/kbs/v0/resource/one/key/1"),
        ("kbs+external:///vault/key?version=2", "/kbs/v0/external/vault/key?version=2"),
    ],
)
def test_a_resource_uri_is_a_path(uri: str, path: str) -> None:
    assert rcar.resource_path(uri) == path


@pytest.mark.parametrize("uri", ["", "kbs://host/a/b/c", "https:///a/b/c", "kbs+:///a", "kbs:///"])
def test_what_is_no_resource_uri_is_no_path(uri: str) -> None:
    with pytest.raises(ValueError):
        rcar.resource_path(uri)


# --- what comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ('""', BindingHash.SHA384),
        ("null", BindingHash.SHA384),
        ("{}", BindingHash.SHA384),
        ('{"x":1.5}', BindingHash.SHA384),
        ('{"selected-hash-algorithm":"SHA256"}', BindingHash.SHA256),
        ('{"selected-hash-algorithm":"sha512"}', BindingHash.SHA512),
    ],
)
def test_a_challenge_selects_its_hash_or_leaves_it(extra: str, expected: BindingHash) -> None:
    offer = rcar.parse_challenge(f'{{"nonce":"AAEC","extra-params":{extra},"later":[]}}'.encode(), STATE)
    assert offer == rcar.Offer(Nonce(b"AAEC"), expected)
    assert isinstance(offer.nonce, OpaqueNonce)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"nonce":1,"extra-params":""}',
        b'{"nonce":"","extra-params":""}',
        b'{"nonce":"' + b"n" * 1025 + b'","extra-params":""}',
        b'{"nonce":"\\ud800","extra-params":""}',
        b'{"nonce":"n","nonce":"m"}',
        b'{"nonce":"n","extra-params":{"selected-hash-algorithm":"sm3"}}',
        b'{"nonce":"n","extra-params":{"selected-hash-algorithm":1}}',
        b'{"nonce":"n","extra-params":{"selected-hash-algorithm":null}}',
        b"[" * 100_000,
    ],
)
def test_a_challenge_out_of_form_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        rcar.parse_challenge(body, STATE)
    assert (raised.value.problem, raised.value.state) == (ProtocolProblem.MALFORMED, STATE)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"token":1}', b'{"token":"a.b"}', b'{"token":"a.b.c\\r\\nX: y"}', b'{"token":"a.b.\xc3\xbc"}']
)
def test_a_token_out_of_form_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        rcar.parse_token(body, STATE)
    with pytest.raises(RemoteProtocolError):
        rcar.parse_token(b'{"token":"a.b.' + b"c" * MAX_EAR_BYTES + b'"}', STATE)
    assert rcar.parse_token(b'{"token":"a.b.c"}', STATE) == "a.b.c"


def test_cookies_are_names_and_values_and_expire_by_nobodys_clock() -> None:
    merged = rcar.merge_cookies({}, ("kbs-session-id=0a1b; Expires=Thu, 01 Jan 1970 00:00:00 GMT",))
    assert merged == {"kbs-session-id": "0a1b"}
    assert rcar.has_session(merged)
    assert rcar.merge_cookies(merged, ("lb=x; Max-Age=0; Path=/elsewhere", "kbs-session-id=2c")) == {
        "kbs-session-id": "2c",
        "lb": "x",
    }
    for nonsense in ("", "=", "x", "a b=c", "a=b c", 'a="b"', "a=b\r\nX: y", "a=" + "b" * 5000, "ä=b"):
        assert rcar.merge_cookies(merged, (nonsense,)) == merged
    many = rcar.merge_cookies({}, tuple(f"c{index}=1" for index in range(100)))
    assert len(many) == 16
    assert not rcar.has_session(rcar.merge_cookies({}, ("kbs-session-id=",)))


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("Tue, 15 Nov 1994 08:12:31 GMT", 100),
        ("Tue, 15 Nov 1994 08:13:31 GMT", 40),
        (None, None),
        ("", None),
        ("now", None),
        ("Tue, 15 Nov 99999 08:12:31 GMT", None),
    ],
)
def test_a_date_says_how_far_ahead_our_clock_is(date: str | None, expected: int | None) -> None:
    assert rcar.clock_ahead_s(Answer(200, b"", date=date), 784887151 + 100) == expected


@given(st.text(max_size=80))
def test_no_date_raises(date: str) -> None:
    rcar.clock_ahead_s(Answer(200, b"", date=date), 0)


@pytest.mark.parametrize("zone", [" GMT", " -0000", " +0000", ""])
def test_a_date_is_universal_time_wherever_this_process_runs(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert rcar.clock_ahead_s(Answer(200, b"", date=f"Thu, 01 Jan 1970 00:01:40{zone}"), 130) == 30
    finally:
        monkeypatch.undo()
        time.tzset()


# --- the table of refusals ----------------------------------------------------------------------------------------------


def refused(exchange: Exchange, word: str, detail: str = "x", status: int = 401, token: str | None = None) -> AgentError:
    body = json.dumps({"type": ERRORS + word, "detail": detail}).encode()
    return rcar.failure_of(exchange, Answer(status, body), STATE, token)[0]


AUTH_FAILED = "Attestation error: RCAR handshake Auth failed: "
MISMATCH = AUTH_FAILED + "KBS Client Protocol Version Mismatch: expect ={} while the request is 0.4.0"
# Every row of kbs.md 6.4, and what else a KBS has a word for.
ROWS = [
    (
        Exchange.AUTH,
        "AttestationError",
        "Attestation error: RCAR handshake Auth failed: deserialize Request",
        401,
        TrusteeRefusal.REQUEST,
    ),
    (
        Exchange.AUTH,
        "AttestationError",
        "Attestation error: RCAR handshake Auth failed: generate challenge",
        401,
        TrusteeRefusal.CHALLENGE,
    ),
    (Exchange.ATTEST, "AttestationError", "Attestation error: RCAR handshake Attest failed", 401, TrusteeRefusal.ATTESTATION),
    (Exchange.RESOURCE, "TokenNotFound", "Attestation Token not found", 401, TrusteeRefusal.NO_SESSION),
    (Exchange.RESOURCE, "TokenVerifierError", "Token Verifier error", 401, TrusteeRefusal.VERIFICATION),
    (Exchange.RESOURCE, "PolicyEngineError", "Policy engine error: x", 401, TrusteeRefusal.POLICY_ENGINE),
    (Exchange.RESOURCE, "ParsePolicyError", "x", 401, TrusteeRefusal.POLICY_ENGINE),
    (Exchange.RESOURCE, "PluginInternalError", "Plugin internal error", 401, TrusteeRefusal.RESOURCE),
    (Exchange.RESOURCE, "JweError", "JWE failed", 401, TrusteeRefusal.KEY_TYPE),
    (Exchange.RESOURCE, "PluginNotFound", "Plugin x not found", 404, TrusteeRefusal.NO_PLUGIN),
    (Exchange.RESOURCE, "InvalidRequestPath", "x", 404, TrusteeRefusal.PATH),
    (Exchange.RESOURCE, "AdminAuthAccess", "admin access denied for endpoint X: y", 401, TrusteeRefusal.ADMIN),
    (Exchange.RESOURCE, "AdminAuthInitialization", "x", 401, TrusteeRefusal.ADMIN),
    (Exchange.RESOURCE, "AdminAuth", "x", 401, TrusteeRefusal.ADMIN),
    *(
        (Exchange.AUTH, word, "x", 401, TrusteeRefusal.INTERNAL)
        for word in (
            *("HTTPFailed", "HTTPSFailed", "PluginManagerInitialization", "RvpsError", "SerdeError"),
            *("StorageBackendInitialization", "PrometheusError"),
        )
    ),
    (Exchange.RESOURCE, "ErrorOfNextYear", "x", 401, TrusteeRefusal.UNKNOWN),
]


@pytest.mark.parametrize(("exchange", "word", "detail", "status", "expected"), ROWS)
def test_each_row_of_the_table_is_told_apart(
    exchange: Exchange, word: str, detail: str, status: int, expected: TrusteeRefusal
) -> None:
    error = refused(exchange, word, detail, status)
    assert isinstance(error, TrusteeRefusedError)
    assert error.refusal is expected
    assert error.owner is Owner.AUTHORITY
    assert expected.value in str(error)
    again = expected in (TrusteeRefusal.CHALLENGE, TrusteeRefusal.ATTESTATION, TrusteeRefusal.RESOURCE)
    assert error.retryable is again
    error.attempts = 3
    assert not error.retryable


def test_every_refusal_has_a_row_and_a_text_of_its_own() -> None:
    assert {row[-1] for row in ROWS} | {TrusteeRefusal.TOO_LARGE} == set(TrusteeRefusal)
    assert len({refusal.value for refusal in TrusteeRefusal}) == len(TrusteeRefusal)


@pytest.mark.parametrize("version", ["0.1.1", "0.5.0"])
def test_another_protocol_version_is_named(version: str) -> None:
    error = refused(Exchange.AUTH, "AttestationError", MISMATCH.format(version))
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.version) == (ProtocolProblem.VERSION, version)
    assert f"the broker speaks {version}" in str(error)
    assert not error.retryable


def test_a_version_that_a_kbs_cannot_read_is_a_version_problem() -> None:
    error = refused(
        Exchange.AUTH, "AttestationError", "Attestation error: RCAR handshake Auth failed: failed to parse KBS version"
    )
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.version) == (ProtocolProblem.VERSION, None)


def test_a_denial_without_findings_is_the_policys() -> None:
    for token in (None, "no token", signed(ear({"nonce": "n"}) | {"submods": {}}, AUTHORITY)):
        error = refused(Exchange.RESOURCE, "PolicyDeny", token=token)
        assert isinstance(error, KeyReleaseDeniedError)
        assert (error.reason, error.claim, error.policy_version) == (DenialReason.POLICY, "resource-policy", "unversioned")
        assert not error.retryable


def test_a_denial_names_the_worst_that_the_token_says() -> None:
    claims = ear({"nonce": "n"}, claims={"executables": 33, "configuration": 3})
    cpu = claims["submods"]["cpu0"]
    evidence = cpu["ear.veraison.annotated-evidence"]
    evidence["tdx"] = {"tcb_status": "OutOfDate", "advisory_ids": ["INTEL-SA-00828", "bad one"]}
    del evidence["sample"]
    claims["submods"]["gpu0"] = cpu | {
        "ear.veraison.annotated-evidence": {"nvidia": {}},
        "ear.trustworthiness-vector": {"hardware": 97},
    }
    token = signed(claims, AUTHORITY)
    error = refused(Exchange.RESOURCE, "PolicyDeny", token=token)
    assert isinstance(error, KeyReleaseDeniedError)
    assert (error.reason, error.claim) == (DenialReason.CLAIM, "cpu0:executables:executables-unrecognised:33")
    assert {str(found) for found in rcar.not_affirmed(token)} == {
        "cpu0:executables:executables-unrecognised:33",
        "cpu0:tcb-status:OutOfDate",
        "cpu0:security-advisory:INTEL-SA-00828",
        "cpu0:security-advisory:unprintable",
        "gpu0:hardware:hardware-unrecognised:97",
    }


@pytest.mark.parametrize(
    "name",
    [
        "cpu0:executables:executables-unrecognised:33",
        "gpu0:hardware:hardware-unrecognised:97",
        "cpu0:tcb-status:OutOfDate",
        "cpu0:security-advisory:INTEL-SA-00828",
        "cpu0:sample-evidence:warning",
        "cpu0:status:contraindicated",
        "cpu0:collateral:affirming",
    ],
)
def test_what_is_not_affirmed_can_be_read_again(name: str) -> None:
    finding = rcar.parse_not_affirmed(Ident(name))
    assert finding is not None
    assert rcar._named(finding) == name


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "cpu0:",
        "cpu0:what",
        "cpu0:executables",
        "cpu0:executables:x:y",
        "cpu0:status:odd",
        "cpu0:tcb-status",
        "unprintable",
    ],
)
def test_another_name_is_no_finding(name: str) -> None:
    assert rcar.parse_not_affirmed(Ident(name)) is None


STATUSES = [
    (301, ProtocolProblem.REDIRECT),
    (308, ProtocolProblem.REDIRECT),
    (204, ProtocolProblem.FOREIGN),
    (400, ProtocolProblem.FOREIGN),
    (401, ProtocolProblem.FOREIGN),
    (403, ProtocolProblem.FOREIGN),
    (404, ProtocolProblem.FOREIGN),
    (408, Unreachable.SERVER_ERROR),
    (413, TrusteeRefusal.TOO_LARGE),
    (429, Unreachable.OVERLOADED),
    (431, ProtocolProblem.FOREIGN),
    (500, Unreachable.SERVER_ERROR),
    (502, Unreachable.SERVER_ERROR),
    (503, Unreachable.OVERLOADED),
    (599, Unreachable.SERVER_ERROR),
]


@pytest.mark.parametrize(("status", "expected"), STATUSES)
@pytest.mark.parametrize("body", [b"", b"payload reached size limit", b"<html>secret</html>"])
def test_every_status_that_is_no_answer_has_its_error(status: int, expected: object, body: bytes) -> None:
    error, wait_s = rcar.failure_of(Exchange.AUTH, Answer(status, body, retry_after="7"), STATE)
    match error:
        case RemoteProtocolError():
            assert error.problem is expected
        case TrusteeRefusedError():
            assert error.refusal is expected
        case BrokerUnreachableError():
            assert error.reason is expected
            assert wait_s == 7.0
        case _:
            pytest.fail(repr(error))
    assert error.retryable is isinstance(expected, Unreachable)
    assert "secret" not in repr(error) + str(error)


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, 0), ("", 0), ("3", 3), ("-1", 0), ("1e9", 0), ("9" * 9, 3600), ("Thu, 01 Jan 1970", 0), ("٣", 0)],
)
def test_only_seconds_say_when_to_come_back(header: str | None, expected: float) -> None:
    assert rcar.failure_of(Exchange.AUTH, Answer(503, b"", retry_after=header), STATE)[1] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"type":1,"detail":"x"}',
        b'{"type":"PolicyDeny","detail":"x"}',
        b'{"type":"https://github.com/confidential-containers/kbs/errors/PolicyDeny"}',
        b'{"type":"https://other.example/errors/PolicyDeny","detail":"x"}',
    ],
)
def test_what_is_no_kbs_is_not_taken_for_one(body: bytes) -> None:
    error, _ = rcar.failure_of(Exchange.RESOURCE, Answer(401, body), STATE)
    assert isinstance(error, RemoteProtocolError)
    assert error.problem is ProtocolProblem.FOREIGN


def test_a_denial_is_one_with_the_status_of_a_later_release_and_with_no_other() -> None:
    error = refused(Exchange.RESOURCE, "PolicyDeny", status=403)
    assert isinstance(error, KeyReleaseDeniedError)
    assert not error.retryable
    assert isinstance(refused(Exchange.RESOURCE, "PolicyDeny", status=400), RemoteProtocolError)
