"""A relay before a test KBS, both over TLS, and the real client: what goes on as it came, and what a refusal becomes."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent.broker.relay import (
    AUTH_TIMEOUT_S,
    CHALLENGE_LIFE_S,
    UPSTREAM_REQUESTS,
    Upstream,
    failure_of,
    pack_session,
    parse_session,
)
from agent.broker.service import SERVICE
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ConfigNotMeasuredError,
    DenialReason,
    EvidencePrecheckError,
    IdentityProblem,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    Owner,
    RemoteProtocolError,
    TokenCheck,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, RuntimeData, Tee
from agent.evidence.binding import report_data
from agent.handshake import (
    MAX_INIT_DATA_BYTES,
    MAX_TRUSTEE_TOKEN_BYTES,
    MIN_CHALLENGE_LIFE_S,
    Accepted,
    Attestation,
    Challenge,
    Hello,
    KeyRequest,
    SealedCredentials,
    SealedKey,
    ear,
    rcar,
)
from agent.handshake import grpc_wire as wire
from agent.handshake.grpc_client import InitData
from agent.handshake.grpc_status import OVERLOADED, Failure, reason_of, refusal_of
from agent.handshake.machine import Trust
from agent.jose import pack_b64
from agent.keys import EphemeralKey, open_credentials, open_jwe
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee
from agent.sim.trustee_knobs import REFUSALS, CookieFault, Fault, JweFault, Knobs, TokenFault
from tests import hostile_kbs
from tests.hostile_broker import claims_of
from tests.hostile_kbs import says
from tests.relay_site import CA, KEY, UPSTREAM_NAME, URI, RelaySite, upstream
from tests.test_broker_service import failure_of as wire_failure
from tests.test_handshake_ear import SERVICE as STRANGER
from tests.tls import pem

STATE = Ident("TEST")


@pytest.fixture
def kbs(machine: SimulatedMachine) -> Iterator[Trustee]:
    with upstream(machine) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, machine: SimulatedMachine, kbs: Trustee) -> RelaySite:
    return RelaySite(tmp_path, machine, kbs)


def played(site: RelaySite, scene: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def play() -> Any:
        async with site.running(), asyncio.timeout(90):
            return await scene()

    return asyncio.run(play())


def failure(site: RelaySite, between: Callable[[], None] = lambda: None) -> AgentError:
    with pytest.raises(AgentError) as caught:
        played(site, lambda: site.boot(between))
    assert caught.value.__cause__ is None
    return caught.value


def decisions(site: RelaySite) -> list[tuple[str, str, str | None]]:
    return [(line["step"], line["decision"], line["claim"] or line["reason"]) for line in site.audit()]


# --- the good case ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_guest_gets_its_key_through_a_relay_and_everything_is_as_the_kbs_made_it(
    tmp_path: Path, machine: SimulatedMachine, kbs: Trustee, tee: Tee
) -> None:
    site = RelaySite(tmp_path, machine, kbs, tee)
    asked: list[RuntimeData] = []
    collect = site.collect

    def collecting(data: RuntimeData) -> CompositeEvidence:
        asked.append(data)
        return collect(data)

    site.collect = collecting
    verdict, key, sealed = played(site, site.boot)
    opened = bytearray(32)
    open_jwe(sealed.jwe, key, memoryview(opened))
    assert (bytes(opened), sealed.key_id, sealed.key_version) == (KEY, URI, 0)

    claims = claims_of(verdict.token)["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]
    assert claims["nonce"] == pack_b64(asked[0].nonce)
    assert (verdict.claims.nonce, verdict.claims.lease_s, verdict.claims.simulated) == (asked[0].nonce, None, True)
    assert [(entry.path.split("/")[3], entry.status) for entry in kbs.log] == [
        ("auth", 200),
        ("attest", 200),
        ("resource", 200),
    ]
    assert [entry.cookie for entry in kbs.log] == [False, True, True]
    assert kbs.log[2].bearer


INITDATA = b'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"aa.toml" = "[token_configs]\\n"\n'


def test_initdata_goes_along_and_the_token_says_what_it_is(site: RelaySite) -> None:
    site.init_data = InitData(INITDATA, hashlib.sha256(INITDATA).digest())
    site.machine.host_data = site.init_data.digest
    verdict, _, _ = played(site, site.boot)
    evidence = claims_of(verdict.token)["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert evidence["init_data"] == site.machine.host_data.hex()
    assert evidence["init_data_claims"] == {"aa.toml": {"token_configs": {}}}


def test_initdata_that_the_tee_does_not_know_is_not_sent(site: RelaySite) -> None:
    site.init_data = InitData(INITDATA, hashlib.sha256(INITDATA).digest())
    assert isinstance(failure(site), ConfigNotMeasuredError)
    assert [entry.path.split("/")[3] for entry in site.kbs.log] == ["auth"]


def test_initdata_above_the_bound_stays_here_and_no_claim_is_made_of_it(site: RelaySite) -> None:
    document = INITDATA + b"#" * MAX_INIT_DATA_BYTES
    site.init_data = InitData(document, hashlib.sha256(document).digest())
    site.machine.host_data = site.init_data.digest
    verdict, _, _ = played(site, site.boot)
    evidence = claims_of(verdict.token)["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert (evidence["init_data"], evidence["init_data_claims"]) == (site.machine.host_data.hex(), None)


def test_the_request_id_stands_in_both_logs(site: RelaySite) -> None:
    verdict, _, _ = played(site, site.boot)
    assert {entry.request_id for entry in site.kbs.log} == {verdict.request_id}
    attest, release = site.audit()
    both = {"request_id": verdict.request_id, "key_id": URI, "policy_version": "unversioned", "reason": None, "claim": None}
    assert attest.items() >= (both | {"step": "attest", "decision": "relayed", "tee": "snp"}).items()
    assert (attest["measurement"], attest["host_data"]) == (site.machine.measurement.hex(), site.machine.host_data.hex())
    assert attest["nonce"] == verdict.claims.nonce.hex()
    assert release.items() >= (both | {"step": "release", "decision": "allowed", "nonce": None}).items()


def test_neither_key_nor_token_stand_in_the_audit_log(site: RelaySite) -> None:
    verdict, _, _ = played(site, site.boot)
    text = site.audit_path.read_text()
    assert KEY.hex() not in text and verdict.token not in text and verdict.token.split(".")[2] not in text


def test_a_token_of_eight_gpus_is_too_large_for_a_header_and_the_session_comes_back_with_the_key_request(
    tmp_path: Path, silicon: Path
) -> None:
    machine = SimulatedMachine.create(tmp_path / "eight", gpus=8, silicon=silicon)
    with upstream(machine) as kbs:
        site = RelaySite(tmp_path, machine, kbs)
        verdict, key, sealed = played(site, site.boot)
        opened = bytearray(32)
        open_jwe(sealed.jwe, key, memoryview(opened))
        assert bytes(opened) == KEY
        assert rcar.MAX_BEARER_BYTES < len(verdict.token) < MAX_TRUSTEE_TOKEN_BYTES
        assert (kbs.log[2].cookie, kbs.log[2].bearer) == (True, False)


def test_a_replica_that_saw_nothing_of_the_attestation_serves_the_key_request(tmp_path: Path, site: RelaySite) -> None:
    (tmp_path / "other").mkdir()
    replica = RelaySite(tmp_path / "other", site.machine, site.kbs)

    async def scene() -> bytes:
        async with replica.running():
            accepted, _ = await raw_attest(site)
            request = KeyRequest(accepted.request_id, accepted.token, URI, accepted.session)
            async with replica.channel() as channel:
                answer = await channel.unary_unary(wire.RELEASE_KEY_METHOD)(wire.pack_key_request(request))
        return wire.parse_key_response(answer, STATE, replica.relay.tokens).jwe

    assert played(site, scene).startswith(b'{"')
    assert [line["step"] for line in replica.audit()] == ["release"]


async def raw_attest(site: RelaySite) -> tuple[Accepted, Challenge]:
    """An attestation message by message; the key pair is nobody's."""
    from agent.keys import EphemeralKey

    public = EphemeralKey.generate().public
    async with site.channel() as channel:
        stream = channel.stream_stream(wire.ATTEST_METHOD)()
        await stream.write(wire.pack_attest_request(Hello(Ident("raw-1"), URI, Tee.SNP)))
        challenge = wire.parse_attest_response(await stream.read(), STATE)
        assert isinstance(challenge, Challenge)
        evidence = await asyncio.to_thread(site.collect, RuntimeData(challenge.nonce, public.x, public.y))
        await stream.write(wire.pack_attest_request(Attestation(Ident("raw-1"), public, evidence)))
        accepted = wire.parse_attest_response(await stream.read(), STATE, site.relay.tokens)
        assert isinstance(accepted, Accepted)
        return accepted, challenge


def test_cookies_that_come_with_the_token_take_the_place_of_those_before(site: RelaySite) -> None:
    """A load balancer before the KBS may choose another one for the session at any time."""
    said = says(200, {"token": "a.b.c"}, "Set-Cookie: kbs-session-id=2; Path=/", "Set-Cookie: lb=b")
    kbs = hostile_kbs.Kbs(cookies=("kbs-session-id=1", "first=f", "lb=a")).on("attest", said)

    async def scene() -> bytes:
        async with hostile_kbs.served(kbs) as url:
            site.upstream = Upstream(url, pem(hostile_kbs.CA).decode(), hostile_kbs.NAME)
            async with site.running():
                accepted, _ = await raw_attest(site)
                return accepted.session

    assert asyncio.run(scene()) == b"kbs-session-id=2; first=f; lb=b"
    assert [asked.headers.get("cookie") for asked in kbs.asked] == [None, "kbs-session-id=1; first=f; lb=a"]


def test_what_the_kbs_took_sample_evidence_for_is_recorded_as_simulated(site: RelaySite) -> None:
    """Our wire carries none of a CPU; a KBS may have been given some of a device, or appraise what it should not."""

    async def scene() -> None:
        async with hostile_kbs.served(hostile_kbs.Kbs()) as url:
            site.upstream = Upstream(url, pem(hostile_kbs.CA).decode(), hostile_kbs.NAME)
            async with site.running():
                await raw_attest(site)

    asyncio.run(scene())
    assert [line["simulated"] for line in site.audit()] == [True]


def test_a_second_hello_opens_another_session(site: RelaySite) -> None:
    async def scene() -> list[Challenge]:
        async with site.channel() as channel:
            stream = channel.stream_stream(wire.ATTEST_METHOD)()
            found = []
            for _ in range(2):
                await stream.write(wire.pack_attest_request(Hello(Ident("raw-1"), URI, Tee.SNP)))
                found.append(wire.parse_attest_response(await stream.read(), STATE))
            return found  # type: ignore[return-value]

    first, second = played(site, scene)
    assert first.nonce != second.nonce
    assert first.expires_in_s == CHALLENGE_LIFE_S
    assert [entry.cookie for entry in site.kbs.log] == [False, False]


def test_a_token_that_fits_into_a_header_outlives_the_session(site: RelaySite) -> None:
    _, key, sealed = played(site, lambda: site.boot(site.kbs.forget_sessions))
    open_jwe(sealed.jwe, key, memoryview(bytearray(32)))


def test_a_lost_session_of_eight_gpus_is_told_and_not_tried_again(tmp_path: Path, silicon: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "eight", gpus=8, silicon=silicon)
    with upstream(machine) as kbs:
        site = RelaySite(tmp_path, machine, kbs)
        error = failure(site, kbs.forget_sessions)
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts, site.retries) == (TrusteeRefusal.NO_SESSION, 1, [])


def test_guests_at_the_same_time_get_their_own_sessions_and_keys(site: RelaySite) -> None:
    async def scene() -> list[bytes]:
        found = []
        for _, key, sealed in await asyncio.gather(*(site.boot() for _ in range(16))):
            opened = bytearray(32)
            open_jwe(sealed.jwe, key, memoryview(opened))
            found.append(bytes(opened))
        return found

    assert played(site, scene) == [KEY] * 16
    attests = [line for line in site.audit() if line["step"] == "attest"]
    assert len({line["nonce"] for line in attests}) == len({line["request_id"] for line in attests}) == 16


def test_what_cannot_be_recorded_is_not_passed_on(site: RelaySite) -> None:
    site.audit_path = Path("/dev/full")
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (9, "AUDIT_LOG")


def test_credentials_are_another_resource_behind_a_relay_with_a_line_of_their_own(site: RelaySite) -> None:
    site.kbs.register_resource("models/store/1", b'{"user": "guest", "secret": "correct horse"}')

    async def scene() -> tuple[EphemeralKey, SealedCredentials, SealedKey]:
        async with site.client() as broker:
            verdict, key = await broker.attest(URI, site.tee, site.guest())
            credentials = await broker.release_credentials(verdict, Ident("kbs:///models/store/1"))
            return key, credentials, await broker.release_key(verdict)

    key, credentials, sealed = played(site, scene)
    assert open_credentials(credentials, key).secret == "correct horse"
    opened = bytearray(32)
    open_jwe(sealed.jwe, key, memoryview(opened))
    assert bytes(opened) == KEY
    lines = site.audit()
    assert [(line["step"], line["decision"], line["key_id"]) for line in lines] == [
        ("attest", "relayed", URI),
        ("credentials", "allowed", "kbs:///models/store/1"),
        ("release", "allowed", URI),
    ]
    assert "horse" not in site.audit_path.read_text()


def test_credentials_that_the_kbs_denies_are_denied_in_the_words_of_the_token(site: RelaySite) -> None:
    site.kbs.set_resource_policy("deny_all")

    async def scene() -> None:
        async with site.client() as broker:
            verdict, _ = await broker.attest(URI, site.tee, site.guest())
            await broker.release_credentials(verdict, Ident("kbs:///models/store/1"))

    with pytest.raises(KeyReleaseDeniedError):
        played(site, scene)
    assert [line["step"] for line in site.audit()] == ["attest", "credentials"]
    assert site.audit()[1]["decision"] == "denied"


# --- what the guest believes --------------------------------------------------------------------------------------------


def test_a_guest_that_does_not_pin_the_attestation_service_refuses_its_token(site: RelaySite) -> None:
    site.trust = Trust((STRANGER.public_key(),), True)
    error = failure(site)
    assert isinstance(error, TokenError) and error.check is TokenCheck.SIGNATURE
    assert decisions(site) == [("attest", "relayed", None)]


def test_a_guest_of_our_broker_takes_no_trustee_token(site: RelaySite) -> None:
    """What the configuration does not say is not believed, whoever pinned the key."""

    async def scene() -> None:
        from agent.handshake.grpc_client import GrpcBroker

        at = [f"127.0.0.1:{site.port}"]
        async with GrpcBroker(at, site.made.ca_pem, site.made.server_name, site.trust, 20) as broker:
            await broker.attest(URI, Tee.SNP, site.guest())

    with pytest.raises(AgentError) as caught:
        played(site, scene)
    assert isinstance(caught.value, (TokenError, RemoteProtocolError))


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (TokenFault.UNKNOWN_ALG, TokenCheck.ALGORITHM),
        (TokenFault.OTHER_KEY, TokenCheck.SIGNATURE),
        (TokenFault.OTHER_NONCE, TokenCheck.NONCE),
        (TokenFault.OTHER_TEE_PUBKEY, TokenCheck.TEE_PUBKEY),
        (TokenFault.WITHOUT_SUBMODS, TokenCheck.CLAIMS),
    ],
)
def test_a_token_that_is_wrong_is_passed_on_and_the_guest_refuses_it(
    site: RelaySite, fault: TokenFault, check: TokenCheck
) -> None:
    site.kbs.knobs = Knobs(token_fault=fault)
    error = failure(site)
    assert isinstance(error, TokenError) and error.check is check


def test_a_sealed_key_that_nobody_could_open_is_found_before_the_gate(site: RelaySite) -> None:
    site.kbs.knobs = Knobs(jwe_fault=JweFault.UNKNOWN_ALG)
    assert isinstance(failure(site), KeyUnwrapError)


def test_evidence_that_trustee_would_refuse_is_found_by_the_guest_before_it_is_sent(site: RelaySite) -> None:
    site.machine.policy |= 1 << 19  # debug
    assert isinstance(failure(site), EvidencePrecheckError)
    assert [entry.path.split("/")[3] for entry in site.kbs.log] == ["auth"]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_policys_denial_is_final_and_told_in_the_words_of_the_token(site: RelaySite) -> None:
    site.kbs.set_resource_policy("deny_all")
    error = failure(site)
    assert isinstance(error, KeyReleaseDeniedError)
    assert error.reason is DenialReason.CLAIM and error.claim.startswith("cpu0:")
    assert site.unaffirmed and site.unaffirmed[0] == error.claim
    assert decisions(site) == [("attest", "relayed", None), ("release", "denied", "resource-policy")]
    assert site.retries == []


PERMANENT = [
    ("resource", "token-not-found", TrusteeRefusal.NO_SESSION),
    ("resource", "token-verifier", TrusteeRefusal.VERIFICATION),
    ("resource", "policy-broken", TrusteeRefusal.POLICY_ENGINE),
    ("resource", "jwe", TrusteeRefusal.KEY_TYPE),
    ("resource", "plugin-not-found", TrusteeRefusal.NO_PLUGIN),
    ("resource", "admin-plugin", TrusteeRefusal.ADMIN),
    ("auth", "bad-request", TrusteeRefusal.REQUEST),
]


@pytest.mark.parametrize(("stage", "name", "refusal"), PERMANENT)
def test_a_refusal_of_the_upstream_is_the_guests_own_error_and_one_attempt(
    site: RelaySite, stage: str, name: str, refusal: TrusteeRefusal
) -> None:
    site.kbs.knobs = Knobs(refusals={stage: REFUSALS[name]})
    error = failure(site)
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts, error.owner) == (refusal, 1, Owner.AUTHORITY)
    assert site.retries == []
    step = "attest" if stage == "auth" else "release"
    assert decisions(site)[-1] == (step, "failed", reason_of(refusal))
    assert sum(entry.path.split("/")[3] == stage for entry in site.kbs.log) == 1


def test_a_refusal_that_may_pass_is_tried_three_times_and_then_told(site: RelaySite) -> None:
    site.kbs.knobs = Knobs(refusals={"attest": REFUSALS["attest-failed"]})
    error = failure(site)
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts) == (TrusteeRefusal.ATTESTATION, 3)
    assert decisions(site) == [("attest", "failed", "TRUSTEE_ATTESTATION")] * 3
    assert all(wait_s >= 5 for _, wait_s in site.retries)


@pytest.mark.parametrize("stage", ["auth", "attest"])
def test_a_denial_where_no_policy_is_asked_is_foreign_and_no_denial(site: RelaySite, stage: str) -> None:
    site.kbs.knobs = Knobs(refusals={stage: REFUSALS["policy-deny"]})
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (9, "UPSTREAM_FOREIGN")
    assert decisions(site) == [("attest", "failed", "UPSTREAM_FOREIGN")]


def test_a_key_that_is_not_there_is_told_as_such(site: RelaySite) -> None:
    site.timeout_s = 4
    site.kbs.knobs = Knobs(refusals={"resource": REFUSALS["plugin-internal"]})
    error = failure(site)
    assert isinstance(error, TrusteeRefusedError) and error.refusal is TrusteeRefusal.RESOURCE


def test_a_kbs_of_another_protocol_is_the_relays_affair_and_reported_there(site: RelaySite) -> None:
    site.kbs.knobs = Knobs(protocol="0.5.0")
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason, error.retryable) == (9, "UPSTREAM_VERSION", False)
    (reported,) = site.reported
    assert isinstance(reported, RemoteProtocolError) and reported.version == "0.5.0"


@pytest.mark.parametrize(
    "nonce",
    [
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",  # no padding
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9=",  # spare bits
        "__ECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",  # the other alphabet
        " AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg==",  # 31 bytes
        '{"host_key":1}',
        "ü",
    ],
)
def test_a_nonce_that_is_not_the_base64_of_32_bytes_is_refused(site: RelaySite, nonce: str) -> None:
    site.kbs.knobs = Knobs(nonce=nonce)
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (9, "UPSTREAM_NONCE")
    assert decisions(site) == [("attest", "failed", "UPSTREAM_NONCE")]


def test_a_hash_that_our_protocol_does_not_have_is_refused(site: RelaySite) -> None:
    site.kbs.knobs = Knobs(selected_hash="sha512")
    error = failure(site)
    assert isinstance(error, BrokerFailureError) and error.reason == "UPSTREAM_HASH"


def test_a_challenge_without_a_session_is_the_upstreams_failure(site: RelaySite) -> None:
    site.kbs.knobs = Knobs(cookie_fault=CookieFault.MISSING)
    error = failure(site)
    assert isinstance(error, BrokerFailureError) and error.reason == "UPSTREAM_MALFORMED"


def test_a_sealed_key_above_the_bound_or_of_no_bytes_is_the_upstreams_failure(site: RelaySite) -> None:
    site.kbs.register_resource(URI.removeprefix("kbs:///"), bytes(8 << 10))
    error = failure(site)
    assert isinstance(error, BrokerFailureError) and error.reason == "UPSTREAM_OVERSIZED"
    site.kbs.knobs = Knobs(faults={"resource": Fault.EMPTY})
    error = failure(site)
    assert isinstance(error, BrokerFailureError) and error.reason == "UPSTREAM_MALFORMED"


# --- outages ------------------------------------------------------------------------------------------------------------


def test_an_upstream_that_is_not_there_is_unavailable_and_says_when_to_come_back(site: RelaySite) -> None:
    site.upstream = Upstream("https://127.0.0.1:1", pem(CA).decode(), UPSTREAM_NAME)

    async def scene() -> Failure:
        async with site.channel() as channel:
            stream = channel.stream_stream(wire.ATTEST_METHOD)()
            await stream.write(wire.pack_attest_request(Hello(Ident("raw-1"), URI, Tee.SNP)))
            return await wire_failure(stream.read())

    told = played(site, scene)
    assert (told.code, told.reason, told.retry_after_s, told.request_id) == (14, "UPSTREAM_REFUSED", 5.0, "raw-1")
    assert decisions(site) == [("attest", "failed", "UPSTREAM_REFUSED")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.UNAVAILABLE, OVERLOADED),
        (Fault.TOO_MANY_REQUESTS, OVERLOADED),
        (Fault.SERVER_ERROR, "UPSTREAM_SERVER_ERROR"),
        (Fault.HTML_502, "UPSTREAM_SERVER_ERROR"),
        (Fault.RESET, "UPSTREAM_RESET"),
    ],
)
def test_an_outage_passes_and_the_guest_comes_back_no_sooner_than_the_kbs_asked(
    site: RelaySite, fault: Fault, reason: str
) -> None:
    site.kbs.knobs = Knobs(faults={"auth": fault}, fault_times=1, retry_after="2")
    site.timeout_s = 60
    played(site, site.boot)
    ((text, wait_s),) = site.retries
    retry_after_s = 2 if reason == OVERLOADED else 5
    assert retry_after_s <= wait_s < retry_after_s + 1, text
    assert decisions(site)[0] == ("attest", "failed", reason)
    assert decisions(site)[1:] == [("attest", "relayed", None), ("release", "allowed", None)]


BROKEN = [
    (Fault.REDIRECT, "UPSTREAM_REDIRECT"),
    (Fault.NOT_HTTP, "UPSTREAM_MALFORMED"),
    (Fault.NOT_JSON, "UPSTREAM_MALFORMED"),
    (Fault.WRONG_TYPES, "UPSTREAM_MALFORMED"),
    (Fault.DUPLICATE_MEMBERS, "UPSTREAM_MALFORMED"),
    (Fault.DEEP_JSON, "UPSTREAM_MALFORMED"),
    (Fault.OVERSIZED_BODY, "UPSTREAM_OVERSIZED"),
    (Fault.ENDLESS_BODY, "UPSTREAM_OVERSIZED"),
]


@pytest.mark.parametrize(("fault", "reason"), BROKEN)
@pytest.mark.parametrize("stage", ["auth", "attest"])
def test_an_upstream_that_breaks_the_protocol_is_a_failure_with_a_closed_word(
    site: RelaySite, stage: str, fault: Fault, reason: str
) -> None:
    site.kbs.knobs = Knobs(faults={stage: fault})
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (9, reason)
    assert decisions(site) == [("attest", "failed", reason)]


def test_somebody_else_in_the_upstreams_place_gets_nothing(site: RelaySite) -> None:
    site.upstream = Upstream(site.kbs.url, pem(CA).decode(), "another.test")
    error = failure(site)
    assert isinstance(error, BrokerFailureError)
    assert (error.status, error.reason) == (9, "UPSTREAM_IDENTITY_NAME")
    (reported,) = site.reported
    assert isinstance(reported, BrokerIdentityError) and reported.problem is IdentityProblem.NAME
    assert site.kbs.log == ()


def test_the_health_service_says_whether_the_upstream_answers(site: RelaySite) -> None:
    async def scene() -> list[int]:
        found = []
        for reachable in (await site.relay.reachable(), False):
            await site.server.set_serving(reachable)
            async with site.channel() as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
                found.append(answer.status)
        return found

    status = health_pb2.HealthCheckResponse
    assert played(site, scene) == [status.SERVING, status.NOT_SERVING]


def test_a_kbs_that_is_down_or_somebody_else_is_not_reachable_and_one_that_is_too_old_for_the_question_is(
    site: RelaySite,
) -> None:
    async def scene() -> bool:
        return await site.relay.reachable()

    site.kbs.knobs = Knobs(faults={"": Fault.NOT_JSON})
    assert played(site, scene)
    site.kbs.knobs = Knobs(faults={"": Fault.SERVER_ERROR})
    assert not played(site, scene)
    site.upstream = Upstream("https://127.0.0.1:1", pem(CA).decode(), UPSTREAM_NAME)
    assert not played(site, scene)
    site.upstream = Upstream(site.kbs.url, pem(CA).decode(), "another.test")
    assert not played(site, scene)


def test_a_slow_kbs_holds_up_its_requests_and_nothing_else(site: RelaySite) -> None:
    """As many guests as are let through wait for it. One more is told in time, it is recorded, and the KBS still answers."""
    site.kbs.knobs = Knobs(delays_s={"resource": 20})

    async def scene() -> tuple[Failure, float, bool]:
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(site.channel()) for _ in range(2)]
            request = wire.pack_key_request(KeyRequest(Ident("raw-1"), "a.b.c", URI))
            release = [channel.unary_unary(wire.RELEASE_KEY_METHOD) for channel in channels]
            waiting = [asyncio.ensure_future(release[number % 2](request)) for number in range(UPSTREAM_REQUESTS)]
            stack.callback(lambda: [each.cancel() for each in waiting])
            while sum(each.name.startswith("relay_") for each in threading.enumerate()) < UPSTREAM_REQUESTS:
                await asyncio.sleep(0.05)
            began = asyncio.get_running_loop().time()
            reachable = await site.relay.reachable()
            stream = channels[0].stream_stream(wire.ATTEST_METHOD)()
            await stream.write(wire.pack_attest_request(Hello(Ident("raw-2"), URI, Tee.SNP)))
            told = await wire_failure(stream.read())
            return told, asyncio.get_running_loop().time() - began, reachable

    told, seconds, reachable = played(site, scene)
    assert reachable
    assert (told.code, told.reason) == (14, "UPSTREAM_TIMEOUT")
    assert seconds < AUTH_TIMEOUT_S + 5
    assert decisions(site)[0] == ("attest", "failed", "UPSTREAM_TIMEOUT")


# --- what a guest can send ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["a.b.c\r\nX-Evil: 1", "a b.c.d", "a.b", "a.b.c.d", "a.b.c\n"])
def test_what_is_no_token_does_not_get_into_a_header(site: RelaySite, token: str) -> None:
    async def scene() -> Failure:
        async with site.channel() as channel:
            request = KeyRequest(Ident("raw-1"), token, URI)
            return await wire_failure(channel.unary_unary(wire.RELEASE_KEY_METHOD)(wire.pack_key_request(request)))

    told = played(site, scene)
    assert (told.code, told.reason) == (3, "PROTOCOL_MALFORMED")
    assert site.kbs.log == ()
    assert decisions(site) == [("release", "failed", "PROTOCOL_MALFORMED")]


def test_a_token_of_another_guest_opens_nothing_for_this_one(site: RelaySite) -> None:
    """Whoever steals token and session gets a key that is sealed to somebody else."""

    async def scene() -> bytes:
        accepted, _ = await raw_attest(site)
        async with site.channel() as channel:
            request = KeyRequest(Ident("thief-1"), accepted.token, URI, accepted.session)
            answer = await channel.unary_unary(wire.RELEASE_KEY_METHOD)(wire.pack_key_request(request))
        return wire.parse_key_response(answer, STATE, site.relay.tokens).jwe

    from agent.keys import EphemeralKey

    jwe = played(site, scene)
    with pytest.raises(KeyUnwrapError):
        open_jwe(jwe, EphemeralKey.generate(), memoryview(bytearray(32)))


@pytest.mark.parametrize(
    "session",
    [b"", b"x", b"\xff\xfe", b"a=b\r\nX-Evil: 1", b"kbs-session-id=1; evil=a b", b"=", b"a=\x00", b"; ; ;", b"a=b;c=d"],
)
def test_a_session_is_cookies_or_nothing(session: bytes) -> None:
    for name, value in parse_session(session).items():
        assert name.isascii() and value.isascii() and not set(name + value) & set("\r\n\0; ,")


def test_sessions_come_back_as_they_were_and_long_ones_are_left_out() -> None:
    cookies = {"AWSALB": "a+b/c=", "kbs-session-id": hashlib.md5(b"").hexdigest()}
    assert parse_session(pack_session(cookies)) == cookies
    assert pack_session({"kbs-session-id": "x" * 5000}) == b""
    assert parse_session(b"; ".join(b"c%d=1" % number for number in range(100))).keys() == {f"c{n}" for n in range(16)}


def test_evidence_that_does_not_parse_is_the_guests_mistake(site: RelaySite) -> None:
    async def scene() -> Failure:
        from agent.keys import EphemeralKey

        public = EphemeralKey.generate().public
        async with site.channel() as channel:
            stream = channel.stream_stream(wire.ATTEST_METHOD)()
            await stream.write(wire.pack_attest_request(Hello(Ident("raw-1"), URI, Tee.SNP)))
            challenge = wire.parse_attest_response(await stream.read(), STATE)
            assert isinstance(challenge, Challenge)
            data = RuntimeData(challenge.nonce, public.x, public.y)
            primary = replace(site.machine.attester().collect(report_data(data, "")), report=b"\xff" * 1184)
            await stream.write(wire.pack_attest_request(Attestation(Ident("raw-1"), public, CompositeEvidence(primary, ""))))
            return await wire_failure(stream.read())

    told = played(site, scene)
    assert (told.code, told.reason) == (3, "EVIDENCE_SNP_REPORT")
    assert [entry.path.split("/")[3] for entry in site.kbs.log] == ["auth"]


# --- words --------------------------------------------------------------------------------------------------------------


def test_every_refusal_has_a_reason_that_the_guest_reads_back() -> None:
    for refusal in TrusteeRefusal:
        told = failure_of(TrusteeRefusedError(refusal))
        assert refusal_of(told.reason) is refusal
        assert (told.retry_after_s is not None) == (told.code == 14) == TrusteeRefusedError(refusal).retryable
        unauthenticated = refusal in (TrusteeRefusal.NO_SESSION, TrusteeRefusal.VERIFICATION)
        assert told.code in ((16,) if unauthenticated else (9, 14))
    assert refusal_of(Ident("KEY_STORE_IO")) is refusal_of(Ident("TRUSTEE_")) is refusal_of(Ident("TRUSTEE_x")) is None


def test_no_challenge_outlives_the_session_that_it_is_of() -> None:
    assert MIN_CHALLENGE_LIFE_S <= CHALLENGE_LIFE_S < rcar.SESSION_LIFE_S


def test_every_way_not_to_reach_the_upstream_asks_to_come_back() -> None:
    for reason in Unreachable:
        told = failure_of(BrokerUnreachableError(reason), 7.0)
        assert (told.code, told.retry_after_s) == (14, 7.0)


def test_the_wire_lets_every_token_through_that_the_guest_reads() -> None:
    assert MAX_TRUSTEE_TOKEN_BYTES == ear.MAX_EAR_BYTES
