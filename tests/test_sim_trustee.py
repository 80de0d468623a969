"""The test KBS against the facts: messages, sessions, refusals, tokens, administration."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.evidence import GpuNonce, ReportData, Tee
from agent.evidence.ccel import pack_event_log
from agent.evidence.tdx_abi import parse_quote
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_event_log
from agent.sim.trustee import Trustee, serve
from agent.sim.trustee_knobs import REFUSALS, CookieFault, Fault, Knobs, Refusal, TokenFault
from tests.raw_kbs import SAMPLE_VALUES, Answer, RawGuest, b64url, canonical, decoded, simulated_snp
from tests.tls import certificate, key_pem, pem

KEY = bytes(range(32))
ATTEST_FAILED = (401, "AttestationError", "Attestation error: RCAR handshake Attest failed")
AUTH_FAILED = "Attestation error: RCAR handshake Auth failed: "


@pytest.fixture
def kbs() -> Iterator[Trustee]:
    with serve() as running:
        running.register_resource("demo/model/1", KEY)
        running.set_resource_policy("allow_all")
        yield running


@pytest.fixture
def guest(kbs: Trustee) -> Iterator[RawGuest]:
    raw = RawGuest(kbs)
    yield raw
    raw.close()


# --- happy paths ------------------------------------------------------------------------------------------------------


def test_sample_evidence_gets_the_resource_over_one_connection(kbs: Trustee, guest: RawGuest) -> None:
    kbs.register_reference_values(SAMPLE_VALUES)
    kbs.set_resource_policy("affirming")
    assert guest.handshake().status == 200
    assert guest.opened(guest.get()) == KEY
    assert guest.claims["submods"]["cpu0"]["ear.status"] == "affirming"
    assert [(entry.method, entry.path, entry.status, entry.connection) for entry in kbs.log] == [
        ("POST", "/kbs/v0/auth", 200, 1),
        ("POST", "/kbs/v0/attest", 200, 1),
        ("GET", "/kbs/v0/resource/demo/model/1", 200, 1),
    ]
    assert kbs.log[1].members == ("init-data", "runtime-data", "tee-evidence")


def test_snp_evidence_gets_the_resource_over_tls(machine: SimulatedMachine) -> None:
    body = 'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"aa.toml" = "[token_configs]\\n"\n"keyturn.toml" = "schema = 1"\n'
    machine.host_data = hashlib.sha256(body.encode()).digest()
    server = certificate("localhost")
    with serve(tls=(pem(server), key_pem(server)), roots=machine.roots_dir) as kbs:
        kbs.register_resource("demo/model/1", KEY)
        guest = RawGuest(kbs)
        guest.connection.host = "localhost"
        assert guest.auth(tee="snp").status == 200
        assert guest.attest(guest.message(simulated_snp(machine, guest.digest()), init_data=body)).status == 200
        assert guest.opened(guest.get()) == KEY  # by default real evidence is let through, whatever its status
        guest.close()
    cpu = guest.claims["submods"]["cpu0"]
    assert (cpu["ear.status"], cpu["ear.trustworthiness-vector"]["configuration"]) == ("contraindicated", 3)
    evidence = cpu["ear.veraison.annotated-evidence"]
    assert evidence["report_data"] == (guest.digest() + bytes(16)).hex()
    assert evidence["init_data"] == machine.host_data.hex()
    assert evidence["init_data_claims"] == {"aa.toml": {"token_configs": {}}, "keyturn.toml": "schema = 1"}
    assert evidence["snp"]["measurement"] == machine.measurement.hex()


def test_snp_is_affirming_once_its_reference_values_are_there(machine: SimulatedMachine) -> None:
    tcb = {"snp_bootloader": [10], "snp_microcode": [84], "snp_snp_svn": [23], "snp_tee_svn": [0]}
    with serve(roots=machine.roots_dir) as kbs:
        kbs.register_reference_values({"snp_launch_measurement": [machine.measurement.hex()], **tcb})
        guest = RawGuest(kbs)
        guest.auth(tee="snp")
        assert guest.attest(guest.message(simulated_snp(machine, guest.digest()))).status == 200
        guest.close()
    cpu = guest.claims["submods"]["cpu0"]
    assert cpu["ear.status"] == "affirming"
    vector = cpu["ear.trustworthiness-vector"]
    assert (vector["executables"], vector["hardware"], vector["configuration"]) == (3, 2, 3)


def test_tdx_evidence_with_its_event_log_and_gpus_is_let_through_by_the_affirming_policy(machine: SimulatedMachine) -> None:
    with serve(roots=machine.roots_dir) as kbs:
        kbs.register_resource("demo/model/1", KEY)
        kbs.set_resource_policy("affirming")
        kbs.set_attestation_policy("default_gpu", {"hardware": 2, "executables": 3, "configuration": 2})
        guest = RawGuest(kbs)
        guest.auth(tee="tdx")
        text = additional_evidence(machine, guest.device_digest())
        quote = machine.attester(Tee.TDX).collect(ReportData(guest.digest(text).ljust(64, b"\0"))).report
        log = base64.b64encode(pack_event_log(make_event_log(machine))).decode()
        message = guest.message({"cc_eventlog": log, "quote": base64.b64encode(quote).decode()}, text)
        body = parse_quote(quote).body
        xfam = body.xfam.to_bytes(8, "little").hex()
        values = {"mr_td": [body.mr_td.hex()], "rtmr_1": [body.rtmr_1.hex()], "rtmr_2": [body.rtmr_2.hex()], "xfam": [xfam]}
        kbs.register_reference_values(values)
        assert guest.attest(message).status == 200
        assert guest.opened(guest.get()) == KEY
        guest.close()
    assert [submod["ear.status"] for submod in guest.claims["submods"].values()] == ["affirming", "affirming"]


def additional_evidence(machine: SimulatedMachine, digest: bytes) -> str:
    devices = [
        {
            "arch": gpu.arch,
            "uuid": gpu.uuid,
            "evidence": base64.b64encode(gpu.report).decode(),
            "certificate": base64.b64encode(gpu.certificate_chain).decode(),
        }
        for gpu in machine.gpu_system().collect(GpuNonce(digest[:32]))
    ]
    return json.dumps({"nvidia": {"device_evidence_list": devices, "keyturn": {"ignored": True}}})


def test_gpus_are_submods_that_the_default_policy_does_not_know(
    kbs: Trustee, guest: RawGuest, machine: SimulatedMachine
) -> None:
    with serve(roots=machine.roots_dir) as trusting:
        guest = RawGuest(trusting)
        guest.auth()
        text = additional_evidence(machine, guest.device_digest())
        assert guest.attest(guest.message(guest.sample(text), text)).status == 200
        gpu = guest.claims["submods"]["gpu0"]
        assert gpu["ear.status"] == "contraindicated"
        assert gpu["ear.veraison.annotated-evidence"]["nvidia"]["arch"] == "Hopper"
        assert (
            guest.claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]["additional-evidence"]
            == text
        )
        trusting.set_attestation_policy("default_gpu", {"hardware": 2, "executables": 3, "configuration": 2})
        trusting.knobs = Knobs(verbose_token=False)
        guest.auth()
        text = additional_evidence(machine, guest.device_digest())
        assert guest.attest(guest.message(guest.sample(text), text)).status == 200
        assert guest.claims["submods"]["gpu0"]["ear.status"] == "affirming"
        runtime = guest.claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]
        assert runtime.keys() == {"nonce", "tee-pubkey"}
        # The text is bound: another one under the same report data is refused, and so are devices of another nonce.
        guest.auth()
        stale = guest.message(guest.sample(text), text)
        assert guest.attest(stale).error == ATTEST_FAILED
        assert guest.attest(guest.message(guest.sample(text), text + " ")).error == ATTEST_FAILED
        guest.close()


# --- the handshake ----------------------------------------------------------------------------------------------------


def test_a_challenge_has_a_nonce_an_empty_string_and_a_cookie_without_path(kbs: Trustee, guest: RawGuest) -> None:
    answer = guest.auth()
    assert re.fullmatch(rb'\{"nonce":"[A-Za-z0-9+/]{43}=","extra-params":""\}', answer.body)
    assert answer.headers["content-type"] == "application/json"
    cookie = re.fullmatch(
        r"kbs-session-id=[0-9a-f]{32}; Expires=(\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT)", answer.headers["set-cookie"]
    )
    assert cookie
    assert abs(parsedate_to_datetime(cookie[1]).timestamp() - time.time() - 300) < 5
    assert guest.attest().headers["set-cookie"] == answer.headers["set-cookie"]  # not extended
    assert "set-cookie" not in guest.get().headers


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"version": "0.1.1"}, "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is 0.1.1"),
        ({"version": "0.4.1"}, "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is 0.4.1"),
        ({"version": "0.4.0-rc1"}, "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is 0.4.0-rc1"),
        ({"version": "four"}, "failed to parse KBS version"),
        ({"version": 4}, "deserialize Request"),
        ({"tee": "sev"}, "deserialize Request"),
    ],
)
def test_a_request_that_is_refused_hears_why(guest: RawGuest, changes: dict[str, object], detail: str) -> None:
    assert guest.auth(**changes).error == (401, "AttestationError", AUTH_FAILED + detail)


def test_all_members_of_a_request_are_required_and_others_ignored(guest: RawGuest) -> None:
    assert guest.auth(more=1).status == 200
    answer = guest.call("POST", "/auth", b'{"version":"0.4.0","tee":"snp"}')
    assert answer.error == (401, "AttestationError", AUTH_FAILED + "deserialize Request")


def test_an_error_has_no_content_type(guest: RawGuest) -> None:
    assert "content-type" not in guest.auth(version="0.1.1").headers


@pytest.mark.parametrize("protocol", ["0.1.1", "0.5.0"])
def test_a_server_of_another_time_names_its_version(kbs: Trustee, guest: RawGuest, protocol: str) -> None:
    kbs.knobs = Knobs(protocol=protocol)
    mismatch = f"KBS Client Protocol Version Mismatch: expect ={protocol} while the request is 0.4.0"
    assert guest.auth().error == (401, "AttestationError", AUTH_FAILED + mismatch)


def change(path: str, value: object) -> Callable[[dict[str, object]], None]:
    def apply(message: dict[str, object]) -> None:
        *steps, last = path.split("/")
        for step in steps:
            message = message[step]  # type: ignore[assignment] # a message of our own
        message[last] = value

    return apply


BAD_MESSAGES = {
    "another nonce": change("runtime-data/nonce", "AAAA"),
    "a number for a nonce": change("runtime-data/nonce", 7),
    "no key": change("runtime-data/tee-pubkey", None),
    "an unknown kind of key": change("runtime-data/tee-pubkey/kty", "OKP"),
    "a key without its alg": change("runtime-data/tee-pubkey/alg", None),
    "another key": change("runtime-data/tee-pubkey/x", "AAAA"),
    "a list for evidence": change("tee-evidence/primary_evidence", []),
    "null for additional evidence": change("tee-evidence/additional_evidence", None),
    "additional evidence that is not JSON": change("tee-evidence/additional_evidence", "x"),
    "additional evidence of an unknown TEE": change("tee-evidence/additional_evidence", '{"quantum":1}'),
    "report data of somebody else": change("tee-evidence/primary_evidence/report_data", "AAAA"),
    "padded report data": change("tee-evidence/primary_evidence/report_data", base64.b64encode(bytes(64)).decode()),
    "no svn": change("tee-evidence/primary_evidence/svn", None),
    "initdata in JSON": change("init-data", {"format": "json", "body": "{}"}),
    "initdata that is not TOML": change("init-data", {"format": "toml", "body": "="}),
    "half a surrogate pair": change("tee-evidence/additional_evidence", "\ud800"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_whatever_is_wrong_at_attest_hears_the_same_and_may_try_again(kbs: Trustee, guest: RawGuest, name: str) -> None:
    guest.auth()
    message = guest.message(guest.sample())
    BAD_MESSAGES[name](message)
    assert guest.attest(message).error == ATTEST_FAILED
    assert kbs.log[-1].reason  # only the server's own log knows
    assert guest.attest().status == 200


def test_attest_needs_a_session_that_lives(kbs: Trustee, guest: RawGuest) -> None:
    guest.auth()
    guest.cookie = ""
    assert guest.attest().error == ATTEST_FAILED
    guest.cookie = "kbs-session-id=" + "0" * 32
    assert guest.attest().error == ATTEST_FAILED
    kbs.knobs = Knobs(session_life_s=-1)
    guest.auth()
    assert guest.attest().error == ATTEST_FAILED


def test_a_cookie_is_found_among_others(guest: RawGuest) -> None:
    guest.auth()
    guest.cookie = f"other=1; {guest.cookie}"
    assert guest.attest().status == 200


def test_a_second_attest_gets_the_old_token_whatever_its_evidence(guest: RawGuest) -> None:
    guest.handshake()
    token = guest.token
    assert guest.attest(guest.message({"nonsense": True})).json == {"token": token}


def test_unknown_members_of_the_key_are_dropped_before_it_is_hashed(guest: RawGuest) -> None:
    guest.auth()
    message = guest.message(guest.sample())
    message["runtime-data"]["tee-pubkey"] |= {"kid": "1", "use": "enc"}
    assert guest.attest(message).status == 200  # bound to the exact members
    assert (
        guest.claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]["tee-pubkey"]
        == guest.tee_pubkey
    )


def test_a_named_hash_is_what_evidence_is_held_to(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(selected_hash="sha512", nonce="not base64 at all")
    answer = guest.auth()
    assert answer.json == {"nonce": "not base64 at all", "extra-params": {"selected-hash-algorithm": "sha512"}}
    assert guest.attest().error == ATTEST_FAILED
    bound = {"additional-evidence": "", "nonce": guest.nonce, "tee-pubkey": guest.tee_pubkey}
    digest = hashlib.sha512(canonical(bound)).digest()
    assert guest.attest(guest.message({"svn": "1", "report_data": base64.b64encode(digest).decode()})).status == 200
    kbs.knobs = Knobs(selected_hash="md0")
    guest.auth()
    assert guest.attest().error == ATTEST_FAILED


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_has_the_shape_of_an_ear(kbs: Trustee, guest: RawGuest) -> None:
    kbs.register_reference_values(SAMPLE_VALUES)
    guest.handshake()
    header, claims = decoded(guest.token)
    assert header.keys() == {"alg", "typ", "jwk"}
    assert header["jwk"].keys() == {"kty", "crv", "alg", "x", "y"}
    submods = claims.pop("submods")
    assert claims.pop("exp") - claims.pop("iat") == 300
    assert claims == {
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iss": "CoCo-Attestation-Service",
        "ear.verifier-id": {
            "developer": "https://confidentialcontainers.org",
            "build": "attestation-service 0.1.0",
        },
    }
    report_data = base64.b64encode(guest.digest()).decode()
    assert submods == {
        "cpu0": {
            "ear.status": "affirming",
            "ear.trustworthiness-vector": {
                "instance-identity": 0,
                "configuration": 2,
                "executables": 3,
                "file-system": 0,
                "hardware": 2,
                "runtime-opaque": 0,
                "storage-opaque": 0,
                "sourced-data": 0,
            },
            "ear.appraisal-policy-id": "default",
            "ear.veraison.annotated-evidence": {
                "sample": {
                    "svn": "1",
                    "launch_digest": "abcde",
                    "platform_version": {"major": 1, "minor": 4},
                    "debug": False,
                },
                "report_data": report_data,
                "init_data": None,
                "init_data_claims": None,
                "runtime_data_claims": {
                    "nonce": guest.nonce,
                    "tee-pubkey": guest.tee_pubkey,
                    "additional-evidence": "",
                },
            },
        }
    }


def test_a_bearer_token_will_do_where_the_session_is_gone(kbs: Trustee, guest: RawGuest) -> None:
    guest.handshake()
    kbs.forget_sessions()
    assert guest.get().error == (401, "TokenNotFound", "Attestation Token not found")
    assert guest.opened(guest.get(authorization=f"Bearer {guest.token}")) == KEY
    assert guest.get(authorization=f"Basic {guest.token}").error[1] == "TokenNotFound"
    assert guest.get(authorization="Bearer nonsense").error == (401, "TokenVerifierError", "Token Verifier error")


def test_a_session_comes_before_a_bearer_token(guest: RawGuest) -> None:
    guest.handshake()
    assert guest.opened(guest.get(authorization="Bearer nonsense")) == KEY


def test_an_authed_session_has_no_token(guest: RawGuest) -> None:
    guest.auth()
    assert guest.get().error[1] == "TokenNotFound"


def test_a_token_is_taken_a_minute_longer_than_it_says_and_not_a_session_longer(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(token_life_s=-50)
    guest.handshake()
    assert guest.get().status == 200
    kbs.knobs = Knobs(token_life_s=-62)
    guest.handshake()
    assert guest.get().error == (401, "TokenVerifierError", "Token Verifier error")


GOOD_SIGNATURES = {TokenFault.OTHER_NONCE, TokenFault.OTHER_TEE_PUBKEY, TokenFault.HEADER_ZIP}


@pytest.mark.parametrize("fault", TokenFault)
def test_every_token_fault_differs_from_a_token(kbs: Trustee, guest: RawGuest, fault: TokenFault) -> None:
    kbs.knobs = Knobs(token_fault=fault)
    assert guest.handshake().status == 200
    answer = guest.get()
    if fault in GOOD_SIGNATURES:
        assert answer.status == 200
    else:
        assert answer.error == (401, "TokenVerifierError", "Token Verifier error")


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_is_off_shows_everywhere_and_agrees_with_itself(kbs: Trustee, guest: RawGuest, years: int) -> None:
    offset = years * 365 * 86400
    kbs.knobs = Knobs(clock_offset_s=offset)
    expires = parsedate_to_datetime(guest.auth().headers["set-cookie"].partition("Expires=")[2]).timestamp()
    guest.attest()
    assert guest.opened(guest.get()) == KEY
    for there, here in ((expires - 300, offset), (guest.claims["iat"], offset), (guest.claims["exp"] - 300, offset)):
        assert abs(there - time.time() - here) < 10


# --- what is let out --------------------------------------------------------------------------------------------------


def test_sample_evidence_is_denied_by_default(kbs: Trustee, guest: RawGuest) -> None:
    kbs.set_resource_policy("default")
    guest.handshake()
    assert guest.get().error == (401, "PolicyDeny", "Access denied by policy")
    assert guest.get("/resource/no/such/thing").error[1] == "PolicyDeny"  # policy comes before existence


def test_the_order_of_refusals_of_a_resource(kbs: Trustee, guest: RawGuest) -> None:
    assert guest.get("/resource/no/such/thing").error[1] == "TokenNotFound"
    guest.handshake()
    assert guest.get("/resource/no/such/thing").error == (401, "PluginInternalError", "Plugin internal error")
    assert guest.get("/resource/one/two").error[1] == "PluginInternalError"
    assert guest.get("/resource/.hidden/two/three").error[1] == "PluginInternalError"
    kbs.set_resource_policy("broken")
    assert guest.get().error[:2] == (401, "PolicyEngineError")
    kbs.set_resource_policy("deny_all")
    assert guest.get().error[1] == "PolicyDeny"


def test_a_key_that_nothing_can_be_encrypted_to(kbs: Trustee) -> None:
    guest = RawGuest(kbs, ec.SECP384R1())
    guest.handshake()
    assert guest.get().error == (401, "JweError", "JWE failed")
    guest.close()
    guest = RawGuest(kbs, ec.SECP521R1())
    guest.handshake()
    assert guest.opened(guest.get()) == KEY
    guest.close()


def test_a_token_without_a_key_comes_after_the_object(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(token_fault=TokenFault.WITHOUT_RUNTIME_DATA)
    guest.handshake()
    assert guest.get("/resource/no/such/thing").error[1] == "PluginInternalError"
    assert guest.get().error == (401, "TokenVerifierError", "Token Verifier error")


def test_a_plugin_that_is_not_there(kbs: Trustee, guest: RawGuest) -> None:
    assert guest.get("/pkcs11/a").error == (404, "PluginNotFound", "Plugin pkcs11 not found")
    assert guest.get("/auth").error == (404, "PluginNotFound", "Plugin auth not found")
    kbs.resource_plugin = False
    assert guest.get().error == (404, "PluginNotFound", "Plugin resource not found")


def test_a_plugin_gets_path_and_query(kbs: Trustee, guest: RawGuest) -> None:
    kbs.plugins["echo"] = lambda path, query: json.dumps([path, query]).encode()
    guest.handshake()
    assert json.loads(guest.opened(guest.get("/echo/a/b?x=%2F&y="))) == ["a/b", {"x": "/", "y": ""}]
    assert kbs.log[-1].query == "x=%2F&y="


@pytest.mark.parametrize("query", ["x=%zz", "x=%ff"])
def test_a_malformed_query_gets_text(guest: RawGuest, query: str) -> None:
    answer = guest.get(f"/resource/demo/model/1?{query}")
    assert (answer.status, answer.headers["content-type"]) == (400, "text/plain; charset=utf-8")


def test_what_lies_outside(guest: RawGuest) -> None:
    for path in ("/", "/kbs", "/kbs/v0", "/kbs/v1/auth"):
        answer = guest.call("GET", path, prefix="")
        assert (answer.status, answer.body) == (404, b"")
    assert (guest.call("GET", "/healthz", prefix="").status, guest.call("POST", "/healthz", prefix="").status) == (200, 405)
    guest.handshake()
    metrics = guest.call("GET", "/metrics", prefix="").body.decode()
    assert 'kbs_requests_total{path="auth",status="200"} 1\n' in metrics


# --- administration ---------------------------------------------------------------------------------------------------


def test_resources_come_and_go(kbs: Trustee, guest: RawGuest) -> None:
    guest.handshake()
    posted = guest.call("POST", "/resource/demo/model/2", b"two")
    assert (posted.status, posted.headers["content-type"], posted.body) == (200, "text/xml", b"")
    assert guest.opened(guest.get("/resource/demo/model/2")) == b"two"
    assert guest.call("DELETE", "/resource/demo/model/2").status == 200
    assert guest.get("/resource/demo/model/2").error[1] == "PluginInternalError"


def test_policies_and_reference_values_are_posted(kbs: Trustee, guest: RawGuest) -> None:
    def post(path: str, **members: str) -> tuple[int, bytes]:
        answer = guest.call("POST", path, json.dumps(members).encode())
        return answer.status, answer.body

    payload = base64.b64encode(json.dumps(SAMPLE_VALUES).encode()).decode()
    assert post("/reference-value", version="0.1.0", type="sample", payload=payload) == (200, b"")
    assert guest.call("GET", "/reference-value/launch_digest").json == ["abcde"]
    assert guest.call("GET", "/reference-value/other").json is None
    assert post("/resource-policy", policy=b64url(b"package policy\ndefault allow = false")) == (200, b"")
    guest.handshake()
    assert guest.claims["submods"]["cpu0"]["ear.status"] == "affirming"
    assert guest.get().error[1] == "PolicyDeny"
    assert post("/resource-policy", policy=b64url(b"package policy\nallow if { input.mood == 1 }")) == (200, b"")
    assert guest.get().error[1] == "PolicyEngineError"
    assert guest.call("GET", "/resource-policy").json == ["default"]
    constants = (
        b'package policy\nimport rego.v1\ndefault hardware := 2\ntrust_claims := {"hardware": hardware, "executables": 3}'
    )
    assert post("/attestation-policy", policy_id="default_cpu", policy=b64url(constants), type="rego") == (200, b"")
    guest.handshake()
    assert guest.claims["submods"]["cpu0"]["ear.trustworthiness-vector"]["configuration"] == 0
    for broken in (b"package policy\nx := input.y", b'package policy\ntrust_claims := {"beauty": 2}'):
        assert post("/attestation-policy", policy_id="default_cpu", policy=b64url(broken))[0] == 200
        guest.auth()
        assert guest.attest().error == ATTEST_FAILED
    assert guest.call("POST", "/attestation-policy", b"{}").error[1] == "AttestationError"
    assert guest.call("POST", "/resource-policy", b'{"policy":"?"}').error[1] == "ParsePolicyError"
    assert guest.call("POST", "/reference-value", b"{}").error[1] == "RvpsError"


def test_administration_may_be_closed(kbs: Trustee, guest: RawGuest) -> None:
    kbs.admin_allowed = False
    for path in ("resource-policy", "attestation-policy", "reference-value"):
        status, variant, detail = guest.call("POST", f"/{path}", b"{}").error
        assert (status, variant) == (401, "AdminAuthAccess")
        assert detail.startswith(f"admin access denied for endpoint {path}: ")
    status, variant, detail = guest.call("POST", "/resource/a/b/c", b"x").error
    assert (status, variant) == (401, "AdminAuthInitialization")
    assert detail.startswith("failed to initialize [admin] configuration: Admin access denied: ")


# --- knobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("stage", ["auth", "attest", "resource"])
def test_a_knob_makes_any_refusal_anywhere(kbs: Trustee, guest: RawGuest, name: str, stage: str) -> None:
    kbs.knobs = Knobs(refusals={stage: REFUSALS[name]})
    calls: dict[str, Callable[[], Answer]] = {"auth": guest.auth, "attest": guest.attest, "resource": guest.get}
    answer = calls[stage]()
    refusal = REFUSALS[name]
    assert answer.error == (refusal.status, refusal.variant, refusal.detail)
    assert (kbs.log[-1].status, kbs.log[-1].variant) == (refusal.status, refusal.variant)


def test_a_refusal_may_have_a_status_of_other_releases(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(refusals={"resource": replace(REFUSALS["policy-deny"], status=403)})
    assert guest.get().error == (403, "PolicyDeny", "Access denied by policy")
    kbs.knobs = Knobs(refusals={"resource": Refusal("Novelty", "what nobody has seen")})
    assert guest.get().error[1] == "Novelty"


def test_a_fault_may_pass(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(faults={"auth": Fault.UNAVAILABLE, "resource": Fault.TOO_MANY_REQUESTS}, fault_times=2, retry_after="7")
    assert [guest.auth().status for _ in range(3)] == [503, 503, 200]
    guest.attest()
    answers = [guest.get() for _ in range(3)]
    assert [(answer.status, answer.headers.get("retry-after")) for answer in answers] == [(429, "7"), (429, "7"), (200, None)]
    kbs.knobs = replace(kbs.knobs, retry_after=None)
    assert "retry-after" not in guest.auth().headers


def test_an_answer_may_take_its_time(kbs: Trustee, guest: RawGuest) -> None:
    kbs.knobs = Knobs(delays_s={"attest": 0.2})
    guest.auth()
    start = time.monotonic()
    assert guest.attest().status == 200
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize("fault", CookieFault)
def test_a_cookie_that_is_wrong(kbs: Trustee, guest: RawGuest, fault: CookieFault) -> None:
    kbs.knobs = Knobs(cookie_fault=fault)
    answer = guest.call("POST", "/auth", b'{"version":"0.4.0","tee":"sample","extra-params":""}')
    header = answer.headers.get("set-cookie")
    assert (header is None) == (fault is CookieFault.MISSING)
    assert header is None or not re.fullmatch(r"kbs-session-id=[0-9a-f]{32}; Expires=[^;]*", header)


def test_many_guests_at_once_get_their_own(kbs: Trustee) -> None:
    failed: list[BaseException] = []

    def one() -> None:
        guest = RawGuest(kbs)
        try:
            for _ in range(3):
                guest.handshake()
                assert guest.opened(guest.get()) == KEY
                assert (
                    guest.claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]["nonce"]
                    == guest.nonce
                )
        except BaseException as exc:
            failed.append(exc)
        finally:
            guest.close()

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({entry.connection for entry in kbs.log}) == 16


def test_a_restart_forgets_and_says_the_same_as_never_having_known(kbs: Trustee, guest: RawGuest) -> None:
    guest.auth()
    kbs.forget_sessions()
    assert guest.attest().error == ATTEST_FAILED


def mutated(value: Any, random: Random) -> Any:
    """The value with one thing in it changed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        return {**value, name: mutated(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        place = random.randrange(len(value))
        return [*value[:place], mutated(value[place], random), *value[place + 1 :]]
    return random.choice((None, 7, -1, 1 << 70, 0.5, True, "", "x", "\ud800", [], {}, [[]], {"x": 1}, "AAAA", {"kty": "EC"}))


def test_no_message_is_too_odd_for_a_refusal(machine: SimulatedMachine) -> None:
    random = Random(6)
    answers = set()
    with serve(roots=machine.roots_dir) as kbs:  # a crash in it would be raised at the end
        guest = RawGuest(kbs)
        for tee in ("snp", "sample"):
            guest.auth(tee=tee)
            text = additional_evidence(machine, guest.device_digest())
            primary = simulated_snp(machine, guest.digest(text)) if tee == "snp" else guest.sample(text)
            message = guest.message(primary, text, 'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n')
            for _ in range(150):
                answers.add(guest.attest(mutated(message, random)).status)
                odd = json.dumps(mutated(json.loads(text), random))
                answers.add(guest.attest(guest.message(primary, odd)).status)
                if guest.token:
                    guest.auth(tee=tee)
        guest.close()
    assert 401 in answers


def test_names_that_mean_nothing_are_our_own_mistake(kbs: Trustee) -> None:
    with pytest.raises(ValueError, match="policy"):
        kbs.set_resource_policy("affirm")
    with pytest.raises(ValueError, match="path"):
        kbs.register_resource("demo/model", KEY)
