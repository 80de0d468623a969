"""The broker on the wire: real TLS, the real client, simulated silicon. Every outcome has its type and its audit line."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent.broker.anchors import TrustAnchors
from agent.broker.desk import CHALLENGE_LIFE_S
from agent.broker.keystore import StoredKey
from agent.broker.policy import parse_policy
from agent.broker.service import MAX_HELLOS, SERVICE, Limits, peer_host
from agent.broker.token import TOKEN_LIFE_S
from agent.closed import Ident
from agent.errors import BrokerFailureError, DenialReason, InternalError, KeyReleaseDeniedError
from agent.evidence import CompositeEvidence, GpuEvidence, Nonce, RuntimeData, Tee
from agent.evidence.binding import additional_evidence, device_nonce, parse_additional_evidence, report_data
from agent.handshake import (
    MAX_MESSAGE_BYTES,
    Attestation,
    Challenge,
    CredentialsRequest,
    Denied,
    Hello,
    KeyRequest,
    TeePublicKey,
)
from agent.handshake import grpc_wire as wire
from agent.handshake.grpc_status import DETAILS_KEY, Denial, Failure, parse_failure
from agent.keys import EphemeralKey, open_credentials, open_jwe
from agent.sim.machine import SimulatedMachine
from tests.broker_site import KEY, OTHER_URI, URI, Collector, Site, in_thread, policy_for

HELLO = Hello(Ident("boot-1"), URI, Tee.SNP)
STATE = Ident("TEST")
Gpus = tuple[GpuEvidence, ...]


@pytest.fixture
def site(tmp_path: Path, machine: SimulatedMachine) -> Site:
    return Site(tmp_path / "broker", machine)


def played(site: Site, scene: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What the scene returns, played while the broker runs."""

    async def play() -> Any:
        async with site.running(), asyncio.timeout(60):  # a stream that is not ended must not hang the tests
            return await scene()

    return asyncio.run(play())


def denied(site: Site, key_uri: Ident = URI, collect: Collector | None = None) -> KeyReleaseDeniedError:
    """The denial of one attestation, which left one audit line and no key request."""
    with pytest.raises(KeyReleaseDeniedError) as caught:
        played(site, lambda: site.attest(key_uri, collect))
    (line,) = site.audit()
    assert (line["step"], line["decision"], line["policy_version"]) == ("attest", "denied", "1")
    assert (line["reason"], line["claim"]) == (caught.value.reason.value, caught.value.claim)
    assert line["reference_value_id"] == caught.value.reference_value_id
    assert line["key_id"] == key_uri
    return caught.value


# --- the good case ----------------------------------------------------------------------------------------------------


def test_a_genuine_guest_gets_its_key_and_both_decisions_are_recorded(site: Site) -> None:
    verdict, key, sealed = played(site, site.boot)
    opened = bytearray(32)
    open_jwe(sealed.jwe, key, memoryview(opened))
    assert (bytes(opened), sealed.key_id, sealed.key_version) == (KEY, URI, 1)
    assert (verdict.claims.min_model_version, verdict.claims.lease_s, verdict.claims.simulated) == (3, 3600, True)
    matched = ["image-1", "config-1", "tcb-1", "driver-1", "vbios-1", "model-1", "argv-1"]
    assert list(verdict.reference_value_ids) == matched

    attest, release = site.audit()
    nonce = verdict.claims.nonce.hex()
    both = {"request_id": verdict.request_id, "key_id": URI, "policy_version": "1", "release_channel": "test",
            "decision": "allowed", "reason": None, "claim": None, "nonce": nonce, "simulated": True}  # fmt: skip
    assert attest.items() >= (both | {"step": "attest", "tee": "snp", "key_version": None}).items()
    assert (attest["measurement"], attest["host_data"]) == (site.machine.measurement.hex(), site.machine.host_data.hex())
    assert attest["reference_value_ids"] == matched and len(str(attest["chip_id_hash"])) == 64
    assert release.items() >= (both | {"step": "release", "key_version": 1}).items()


def test_the_key_is_in_no_answer_but_the_sealed_one(site: Site) -> None:
    _, _, sealed = played(site, site.boot)
    assert KEY not in sealed.jwe and KEY.hex() not in site.audit_path.read_text()


# --- denials ----------------------------------------------------------------------------------------------------------


def test_a_wrong_measurement_is_denied(site: Site) -> None:
    site.machine.measurement = bytes(48)
    error = denied(site)
    assert (error.reason, error.claim, error.reference_value_id) == (DenialReason.CLAIM, "snp.measurement", "image-1")


def test_a_wrong_host_data_is_denied(site: Site) -> None:
    site.machine.host_data = b"\1" * 32
    error = denied(site)
    assert (error.reason, error.claim, error.reference_value_id) == (DenialReason.CLAIM, "snp.host_data", "config-1")


def test_a_debuggable_guest_is_denied(site: Site) -> None:
    site.machine.policy |= 1 << 19
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.CLAIM, "snp.policy.debug")


def test_evidence_over_a_foreign_nonce_is_denied(site: Site) -> None:
    error = denied(site, collect=lambda data: site.collect(replace(data, nonce=Nonce(bytes(32)))))
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "snp.report-data")


def test_evidence_for_another_public_key_is_denied(site: Site) -> None:
    error = denied(site, collect=lambda data: site.collect(replace(data, public_key_x=bytes(32))))
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "snp.report-data")


def test_device_evidence_that_the_report_does_not_cover_is_denied(site: Site) -> None:
    def collect(data: RuntimeData) -> CompositeEvidence:
        evidence = site.collect(data)
        return replace(evidence, additional_evidence=evidence.additional_evidence.replace("HOPPER", "BLACKWELL"))

    assert denied(site, collect=collect).claim == "snp.report-data"


def rebound(site: Site, data: RuntimeData, change: Callable[[Gpus], Gpus]) -> CompositeEvidence:
    """Evidence whose GPU part was changed before the CPU report covered it: what a hostile agent could send."""
    gpus, claims = parse_additional_evidence(site.collect(data).additional_evidence)
    assert claims is not None
    text = additional_evidence(change(gpus), claims)
    return CompositeEvidence(site.machine.attester().collect(report_data(data, text)), text)


def test_gpu_evidence_over_a_foreign_nonce_is_denied(site: Site) -> None:
    foreign = RuntimeData(Nonce(bytes(32)), bytes(32), bytes(32))
    old = site.machine.gpu_system().collect(device_nonce(foreign))
    error = denied(site, collect=lambda data: rebound(site, data, lambda _: old))
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "gpu.nonce")


def test_one_gpu_sent_twice_is_denied(site: Site) -> None:
    site.policy = policy_for(site.machine, gpu__count="2")
    error = denied(site, collect=lambda data: rebound(site, data, lambda gpus: gpus * 2))
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "gpu.duplicate")


def test_a_missing_gpu_is_denied(site: Site) -> None:
    site.policy = policy_for(site.machine, gpu__count="2")
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.CLAIM, "gpu.count")


def test_leaving_out_all_gpus_is_denied(site: Site) -> None:
    error = denied(site, collect=lambda data: CompositeEvidence(site.machine.attester().collect(report_data(data, "")), ""))
    assert (error.reason, error.claim) == (DenialReason.CLAIM, "gpu.count")


def test_device_evidence_that_does_not_parse_is_denied(site: Site) -> None:
    def collect(data: RuntimeData) -> CompositeEvidence:
        return CompositeEvidence(site.machine.attester().collect(report_data(data, "{}")), "{}")

    error = denied(site, collect=collect)
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "evidence.malformed.json")


def test_a_report_whose_signature_is_wrong_is_denied_and_its_claims_are_not_recorded(site: Site) -> None:
    site.machine.flip_signature_bit = True
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.DEVICE, "snp.report-signature")
    (line,) = site.audit()
    assert (line["measurement"], line["chip_id_hash"], line["simulated"]) == (None, None, None)


def test_a_key_uri_without_a_row_is_denied(site: Site) -> None:
    error = denied(site, Ident("kbs:///models/tiny/3"))
    assert (error.reason, error.claim) == (DenialReason.POLICY, "policy.row")


def test_a_key_uri_that_looks_like_an_option_is_denied_like_any_other(site: Site) -> None:
    assert denied(site, Ident("kbs:///-a/-b/-c")).claim == "policy.row"


def test_a_revoked_row_is_denied(site: Site) -> None:
    site.policy = policy_for(site.machine, revoked="true")
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.POLICY, "policy.revoked")


def test_an_expired_row_is_denied(site: Site) -> None:
    site.policy = policy_for(site.machine, not_after="2026-01-01T00:00:00Z")
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.POLICY, "policy.not_after")


def test_simulated_evidence_is_denied_unless_the_broker_was_started_for_it(site: Site) -> None:
    site.anchors = TrustAnchors()
    error = denied(site)
    assert (error.reason, error.claim) == (DenialReason.COLLATERAL, "snp.certificate-chain")


# --- key requests -----------------------------------------------------------------------------------------------------


async def failure_of(call: Any) -> Failure:
    """The rich error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing: Any = caught.value.trailing_metadata()
    details = dict(trailing)[DETAILS_KEY]
    failure = parse_failure(details, caught.value.code().value[0])
    assert failure is not None and caught.value.details() == failure.reason
    return failure


async def ask(site: Site, token: str, key_uri: Ident = URI) -> Failure:
    """The failure of a key request."""
    async with site.channel() as channel:
        request = wire.pack_key_request(KeyRequest(Ident("boot-2"), token, key_uri))
        return await failure_of(channel.unary_unary(wire.RELEASE_KEY_METHOD)(request))


def refused_release(site: Site, between: Callable[[], None], key_uri: Ident = URI) -> tuple[int, str]:
    """Status and reason of a key request after an accepted attestation and whatever happened between them."""

    async def scene() -> Failure:
        verdict, _ = await site.attest()
        between()
        return await ask(site, verdict.token, key_uri)

    failure = played(site, scene)
    assert failure.request_id == "boot-2"
    attest, release = site.audit()
    assert (attest["decision"], release["step"], release["request_id"]) == ("allowed", "release", "boot-2")
    assert release["decision"] in ("denied", "failed") and release["key_version"] is None
    assert str(release["claim"] or release["reason"]).upper().replace(".", "_") == failure.reason
    return failure.code, failure.reason


def test_the_token_of_one_key_does_not_open_another(site: Site) -> None:
    assert refused_release(site, lambda: None, OTHER_URI) == (7, "TOKEN_KEY_URI")


# --- credentials of the model's store ---------------------------------------------------------------------------------

STORE = Ident("kbs:///models/store/1")


@pytest.fixture
def store_site(site: Site) -> Site:
    """Whose rows name credentials."""
    path = site.made.directory / "keys" / STORE.removeprefix("kbs:///")
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text('{"user": "guest", "secret": "correct horse"}')
    site.policy = policy_for(site.machine, credentials_uri=f'"{STORE}"')
    return site


def test_a_genuine_guest_gets_the_credentials_and_then_its_key_with_one_key_pair(store_site: Site) -> None:
    async def scene() -> Any:
        async with store_site.client() as broker:
            verdict, key = await broker.attest(URI, Tee.SNP, in_thread(store_site.collect))
            return verdict, key, await broker.release_credentials(verdict, STORE), await broker.release_key(verdict)

    verdict, key, credentials, sealed = played(store_site, scene)
    assert open_credentials(credentials, key).secret == "correct horse"
    opened = bytearray(32)
    open_jwe(sealed.jwe, key, memoryview(opened))
    assert bytes(opened) == KEY
    attest, given, release = store_site.audit()
    assert [line["step"] for line in (attest, given, release)] == ["attest", "credentials", "release"]
    expected = {"decision": "allowed", "key_id": STORE, "request_id": verdict.request_id, "nonce": attest["nonce"]}
    assert given.items() >= (expected | {"release_channel": "test", "key_version": None}).items()
    assert "horse" not in store_site.audit_path.read_text() and b"horse" not in credentials.jwe


async def ask_for_credentials(site: Site, token: str, uri: Ident) -> Failure:
    async with site.channel() as channel:
        request = wire.pack_credentials_request(CredentialsRequest(Ident("boot-2"), token, uri))
        return await failure_of(channel.unary_unary(wire.RELEASE_CREDENTIALS_METHOD)(request))


def refused_credentials(site: Site, uri: Ident = STORE, between: Callable[[], None] = lambda: None) -> tuple[int, str]:
    async def scene() -> Failure:
        verdict, _ = await site.attest()
        between()
        return await ask_for_credentials(site, verdict.token, uri)

    failure = played(site, scene)
    assert failure.request_id == "boot-2"
    line = site.audit()[-1]
    assert (line["step"], line["key_id"], line["request_id"]) == ("credentials", uri, "boot-2")
    assert line["decision"] in ("denied", "failed")
    return failure.code, failure.reason


def test_only_the_credentials_of_the_keys_row_are_given(store_site: Site) -> None:
    for other in (Ident("kbs:///models/store/2"), URI, OTHER_URI):  # no key either
        assert refused_credentials(store_site, other) == (7, "POLICY_CREDENTIALS_URI")
    store_site.policy = policy_for(store_site.machine)
    assert refused_credentials(store_site) == (7, "POLICY_CREDENTIALS_URI")
    assert store_site.audit()[-1]["reason"] == "reference-value"


def test_credentials_are_held_to_the_same_token_as_a_key(store_site: Site) -> None:
    assert played(store_site, lambda: ask_for_credentials(store_site, "a.b.c", STORE)).code == 16

    async def revoked() -> Failure:
        async with store_site.running() as authority:
            verdict, _ = await store_site.attest()
            authority.policy = parse_policy(policy_for(store_site.machine, "2", credentials_uri=f'"{STORE}"', revoked="true"))
            return await ask_for_credentials(store_site, verdict.token, STORE)

    assert asyncio.run(revoked()).reason == "POLICY_REVOKED"
    assert refused_credentials(store_site, between=lambda: store_site.clock.advance(TOKEN_LIFE_S + 1)) == (16, "TOKEN_EXPIRED")


def test_credentials_that_are_none_are_the_brokers_failure(store_site: Site) -> None:
    path = store_site.made.directory / "keys" / STORE.removeprefix("kbs:///")
    path.write_text('{"user": "guest"}')
    assert refused_credentials(store_site) == (9, "CREDENTIALS_FILE")
    path.write_bytes(KEY)
    assert refused_credentials(store_site) == (9, "CREDENTIALS_FILE")
    path.unlink()
    assert refused_credentials(store_site) == (5, "CREDENTIALS_NOT_FOUND")


def test_a_request_for_credentials_that_does_not_parse_is_recorded(site: Site) -> None:
    async def scene() -> Failure:
        async with site.channel() as channel:
            return await failure_of(channel.unary_unary(wire.RELEASE_CREDENTIALS_METHOD)(b"\xff\xfftell me"))

    assert played(site, scene) == Failure(3, Ident("PROTOCOL_MALFORMED"))
    (line,) = site.audit()
    assert (line["step"], line["decision"], line["reason"]) == ("credentials", "failed", "PROTOCOL_MALFORMED")


def test_no_credentials_are_released_whose_release_cannot_be_recorded(store_site: Site) -> None:
    verdict, _ = played(store_site, store_site.attest)
    store_site.audit_path = Path("/dev/full")
    failure = played(store_site, lambda: ask_for_credentials(store_site, verdict.token, STORE))
    assert (failure.code, failure.reason) == (9, "AUDIT_LOG")


def test_a_key_request_that_does_not_parse_is_recorded(site: Site) -> None:
    async def scene() -> Failure:
        async with site.channel() as channel:
            return await failure_of(channel.unary_unary(wire.RELEASE_KEY_METHOD)(b"\xff\xfftell me"))

    assert played(site, scene) == Failure(3, Ident("PROTOCOL_MALFORMED"))
    (line,) = site.audit()
    assert (line["step"], line["decision"], line["reason"]) == ("release", "failed", "PROTOCOL_MALFORMED")
    assert (line["request_id"], line["key_id"]) == (None, None)


def test_a_certificate_that_the_library_chokes_on_is_a_denial_and_no_bug(site: Site) -> None:
    def collect(data: RuntimeData) -> CompositeEvidence:
        evidence = site.collect(data)
        leaf, *issuers = evidence.primary.cert_chain
        hostile = leaf.replace(b"\x0c\x08SEV-VCEK", b"\x03\x08\x00EV-VCEK")  # a BIT STRING for a name
        assert hostile != leaf
        return replace(evidence, primary=replace(evidence.primary, cert_chain=(hostile, *issuers)))

    error = denied(site, collect=collect)
    assert (error.reason, error.claim) == (DenialReason.COLLATERAL, "snp.malformed.certificate")
    assert site.reported == []


def test_an_expired_token_is_refused(site: Site) -> None:
    assert refused_release(site, lambda: site.clock.advance(TOKEN_LIFE_S)) == (16, "TOKEN_EXPIRED")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"revoked": "true"}, "POLICY_REVOKED"), ({"not_after": "2026-01-01T00:00:00Z"}, "POLICY_NOT_AFTER")],
)
def test_what_was_revoked_after_the_verdict_is_not_released(site: Site, change: dict[str, str], reason: str) -> None:
    async def scene() -> Failure:
        async with site.running() as authority:
            verdict, _ = await site.attest()
            authority.policy = parse_policy(policy_for(site.machine, "2", **change))
            return await ask(site, verdict.token)

    failure = asyncio.run(scene())
    assert (failure.code, failure.reason) == (7, reason)
    assert (site.audit()[1]["decision"], site.audit()[1]["policy_version"]) == ("denied", "2")


def test_a_token_of_an_earlier_policy_is_refused_and_a_new_one_counts(site: Site) -> None:
    other_measurement = policy_for(site.machine, "2").replace(site.machine.measurement.hex().encode(), b"0" * 96)

    async def scene() -> tuple[Failure, Any]:
        async with site.running() as authority:
            verdict, _ = await site.attest()
            authority.policy = parse_policy(other_measurement)
            refused = await ask(site, verdict.token)
            authority.policy = parse_policy(policy_for(site.machine, "3"))
            return refused, await site.boot()

    refused, (_, _, sealed) = asyncio.run(scene())
    why = Denial(DenialReason.POLICY, Ident("token.policy_version"), None, Ident("2"))
    assert refused == Failure(7, Ident("TOKEN_POLICY_VERSION"), Ident("boot-2"), None, why)
    assert sealed.key_id == URI
    line = site.audit()[1]
    assert (line["step"], line["decision"], line["policy_version"]) == ("release", "denied", "2")
    assert (line["reason"], line["claim"]) == ("policy", "token.policy_version")


def test_a_broker_without_simulation_roots_releases_nothing_for_a_simulated_token(site: Site) -> None:
    verdict, _ = played(site, site.attest)
    site.anchors = TrustAnchors()
    failure = played(site, lambda: ask(site, verdict.token))
    assert (failure.code, failure.reason) == (7, "TOKEN_SIMULATED")


def test_an_altered_token_is_refused(site: Site) -> None:
    async def scene() -> Failure:
        verdict, _ = await site.attest()
        header, payload, signature = verdict.token.split(".")
        return await ask(site, f"{header}.{payload}.{'A' * len(signature)}")

    failure = played(site, scene)
    assert (failure.code, failure.reason) == (16, "TOKEN_SIGNATURE")


def test_a_key_that_is_not_in_the_store_is_a_typed_failure(site: Site) -> None:
    missing = site.made.directory / "keys/models/tiny/1"
    assert refused_release(site, missing.unlink) == (5, "KEY_NOT_FOUND")


def test_a_key_may_be_asked_for_again_while_the_token_is_valid(site: Site) -> None:
    async def scene() -> list[bytes]:
        async with site.client() as broker, site.channel() as channel:
            verdict, _ = await broker.attest(URI, Tee.SNP, in_thread(site.collect))
            request = wire.pack_key_request(KeyRequest(verdict.request_id, verdict.token, URI))
            return [await channel.unary_unary(wire.RELEASE_KEY_METHOD)(request) for _ in range(2)]

    one, two = played(site, scene)
    assert wire.parse_key_response(one, STATE).jwe != wire.parse_key_response(two, STATE).jwe
    assert [line["step"] for line in site.audit()] == ["attest", "release", "release"]


# --- nonces and the order of a stream ---------------------------------------------------------------------------------


class RawStream:
    """A guest that says what it likes."""

    def __init__(self, channel: Any) -> None:
        self.call = channel.stream_stream(wire.ATTEST_METHOD)()

    async def say(self, message: Hello | Attestation | bytes) -> Any:
        await self.call.write(message if isinstance(message, bytes) else wire.pack_attest_request(message))
        return wire.parse_attest_response(await self.call.read(), STATE)

    async def challenge(self, hello: Hello = HELLO) -> Challenge:
        answer = await self.say(hello)
        assert isinstance(answer, Challenge)
        return answer


def attestation(site: Site, nonce: Nonce, request_id: Ident = HELLO.request_id) -> Attestation:
    public = EphemeralKey.generate().public
    evidence = site.collect(RuntimeData(nonce, public.x, public.y))
    return Attestation(request_id, TeePublicKey(public.x, public.y), evidence)


def test_an_attestation_replayed_on_another_stream_is_denied(site: Site) -> None:
    async def scene() -> tuple[Any, Any]:
        async with site.channel() as channel:
            first, second = RawStream(channel), RawStream(channel)
            sent = attestation(site, (await first.challenge()).nonce)
            accepted = await first.say(sent)
            await second.challenge()
            return accepted, await second.say(sent)

    accepted, replayed = played(site, scene)
    assert not isinstance(accepted, Denied)
    assert isinstance(replayed, Denied) and replayed.claim == "snp.report-data"


def test_the_broker_ends_the_stream_with_the_verdict(site: Site) -> None:
    async def scene() -> Any:
        async with site.channel() as channel:
            stream = RawStream(channel)
            await stream.say(attestation(site, (await stream.challenge()).nonce))
            return await stream.call.read(), await stream.call.code()

    after, code = played(site, scene)
    assert not isinstance(after, bytes) and code is grpc.StatusCode.OK


def test_a_second_hello_voids_the_first_nonce(site: Site) -> None:
    async def scene() -> Any:
        async with site.channel() as channel:
            stream = RawStream(channel)
            old, new = await stream.challenge(), await stream.challenge()
            assert old.nonce != new.nonce
            return await stream.say(attestation(site, old.nonce))

    assert played(site, scene).claim == "snp.report-data"


def test_the_nonce_of_the_second_hello_counts(site: Site) -> None:
    async def scene() -> Any:
        async with site.channel() as channel:
            stream = RawStream(channel)
            await stream.challenge()
            site.clock.advance(CHALLENGE_LIFE_S)
            return await stream.say(attestation(site, (await stream.challenge()).nonce))

    assert not isinstance(played(site, scene), Denied)


def broken_off(site: Site, *messages: Callable[[Challenge | None], Hello | Attestation | bytes]) -> Failure:
    """The failure of a stream after the last of these messages; each is built from the Challenge before it."""

    async def scene() -> Failure:
        async with site.channel() as channel:
            stream = RawStream(channel)
            answer = None
            for message in messages[:-1]:
                answer = await stream.say(message(answer))
            return await failure_of(stream.say(messages[-1](answer)))

    failure = played(site, scene)
    assert isinstance(failure, Failure)
    return failure


def test_an_expired_nonce_is_a_typed_failure(site: Site) -> None:
    def late(challenge: Challenge | None) -> Attestation:
        assert challenge is not None
        site.clock.advance(challenge.expires_in_s)
        return attestation(site, challenge.nonce)

    failure = broken_off(site, lambda _: HELLO, late)
    assert (failure.code, failure.reason, failure.request_id) == (9, "NONCE_EXPIRED", "boot-1")
    (line,) = site.audit()
    assert (line["decision"], line["reason"], line["request_id"]) == ("failed", "NONCE_EXPIRED", "boot-1")


def test_an_attestation_before_a_hello_is_a_protocol_failure(site: Site) -> None:
    failure = broken_off(site, lambda _: attestation(site, Nonce(bytes(32))))
    assert (failure.code, failure.reason) == (3, "PROTOCOL_UNEXPECTED_MESSAGE")


def test_another_request_id_on_the_same_stream_is_a_protocol_failure(site: Site) -> None:
    failure = broken_off(site, lambda _: HELLO, lambda _: attestation(site, Nonce(bytes(32)), Ident("boot-9")))
    assert (failure.code, failure.reason, failure.request_id) == (3, "PROTOCOL_REQUEST_ID", "boot-1")
    assert site.audit()[0]["reason"] == "PROTOCOL_REQUEST_ID"


def test_another_key_on_the_same_stream_is_a_protocol_failure(site: Site) -> None:
    failure = broken_off(site, lambda _: HELLO, lambda _: replace(HELLO, key_uri=OTHER_URI))
    assert (failure.code, failure.reason) == (3, "PROTOCOL_MALFORMED")


def test_evidence_of_another_tee_than_the_hello_named_is_a_protocol_failure(site: Site) -> None:
    failure = broken_off(site, lambda _: replace(HELLO, tee=Tee.TDX), lambda _: attestation(site, Nonce(bytes(32))))
    assert (failure.code, failure.reason) == (3, "PROTOCOL_MALFORMED")
    assert [(line["decision"], line["tee"]) for line in site.audit()] == [("failed", "tdx")]


def test_what_is_no_message_is_a_protocol_failure_that_repeats_nothing(site: Site) -> None:
    failure = broken_off(site, lambda _: b"\xff\xfftell me")
    assert failure == Failure(3, Ident("PROTOCOL_MALFORMED"))


def test_hellos_without_end_are_cut_off(site: Site) -> None:
    failure = broken_off(site, *[lambda _: HELLO] * (MAX_HELLOS + 1))
    assert (failure.code, failure.reason) == (8, "TOO_MANY_HELLOS")


def test_a_message_above_the_limit_is_refused(site: Site) -> None:
    async def scene() -> grpc.StatusCode:
        async with site.channel() as channel:
            stream = RawStream(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.say(bytes(MAX_MESSAGE_BYTES + 1))
            return caught.value.code()

    assert played(site, scene) is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- the broker's own failures ----------------------------------------------------------------------------------------


def test_no_decision_counts_that_cannot_be_recorded(site: Site) -> None:
    site.audit_path = Path("/dev/full")

    def answer(challenge: Challenge | None) -> Attestation:
        assert challenge is not None
        return attestation(site, challenge.nonce)

    failure = broken_off(site, lambda _: HELLO, answer)
    assert (failure.code, failure.reason, failure.retry_after_s) == (9, "AUDIT_LOG", None)
    assert all(isinstance(error, BrokerFailureError) for error in site.reported) and site.reported


def test_no_key_is_released_whose_release_cannot_be_recorded(site: Site) -> None:
    verdict, _ = played(site, site.attest)
    site.audit_path = Path("/dev/full")
    failure = played(site, lambda: ask(site, verdict.token))
    assert (failure.code, failure.reason) == (9, "AUDIT_LOG")


def test_a_key_store_that_cannot_be_read_asks_guests_to_come_back_under_its_own_name(site: Site) -> None:
    key = site.made.directory / "keys/models/tiny/1"

    def loop_of_links() -> None:
        key.unlink()
        key.symlink_to(key)

    async def scene() -> Failure:
        verdict, _ = await site.attest()
        loop_of_links()
        return await ask(site, verdict.token)

    failure = played(site, scene)
    assert (failure.code, failure.reason) == (14, "KEY_STORE_IO")
    assert failure.retry_after_s
    assert site.audit()[1]["reason"] == "KEY_STORE_IO"


def test_a_key_that_is_revoked_after_the_verdict_is_denied_to_the_guest_in_the_words_of_the_audit_log(site: Site) -> None:
    async def scene() -> None:
        async with site.running() as authority, site.client() as broker:
            verdict, _ = await broker.attest(URI, Tee.SNP, in_thread(site.collect))
            authority.policy = parse_policy(policy_for(site.machine, "2", revoked="true"))
            await broker.release_key(verdict)

    with pytest.raises(KeyReleaseDeniedError) as caught:
        asyncio.run(scene())
    denial = caught.value
    assert (denial.reason, denial.claim, denial.policy_version) == (DenialReason.POLICY, "policy.revoked", "2")
    line = site.audit()[1]
    assert (line["reason"], line["claim"], line["policy_version"]) == ("policy", "policy.revoked", "2")


class BuggyKeyStore:
    def fetch(self, key_uri: Ident) -> StoredKey:
        raise RuntimeError("the key is 1234")

    def fetch_credentials(self, uri: Ident) -> bytes:
        raise RuntimeError("the password is 1234")


def test_a_bug_is_told_by_its_place_and_never_by_its_text(site: Site) -> None:
    site.keys = BuggyKeyStore()

    async def scene() -> Failure:
        verdict, _ = await site.attest()
        return await ask(site, verdict.token)

    assert played(site, scene) == Failure(13, Ident("INTERNAL"), Ident("boot-2"))
    line = site.audit()[-1]
    assert (line["step"], line["decision"], line["reason"]) == ("release", "failed", "INTERNAL")
    (error,) = site.reported
    assert isinstance(error, InternalError) and error.place.startswith("test_broker_service:")


# --- limits -----------------------------------------------------------------------------------------------------------


def asks_to_come_back(failure: Failure) -> bool:
    return (failure.code, failure.reason) == (14, "OVERLOADED") and (failure.retry_after_s or 0) > 0


def test_guests_that_said_hello_and_no_more_stop_nobody(site: Site) -> None:
    async def scene() -> Any:
        async with site.channel() as channel:
            held = [RawStream(channel) for _ in range(4)]
            for stream in held:
                await stream.challenge()
            return await site.boot()

    assert played(site, scene)


@pytest.mark.parametrize("limits", [Limits(open_calls=1), Limits(open_calls_of_host=1)])
def test_one_open_call_too_many_is_turned_away_on_any_connection_until_another_ends(site: Site, limits: Limits) -> None:
    site.limits = limits

    async def scene() -> tuple[Failure, Failure, Any]:
        async with site.channel() as one, site.channel() as other:
            first = RawStream(one)
            challenge = await first.challenge()
            refused = await failure_of(RawStream(other).say(HELLO)), await ask(site, "token")
            await first.say(attestation(site, challenge.nonce))
            await first.call.code()
            return *refused, await RawStream(other).challenge()

    attest, release, challenge = played(site, scene)
    assert asks_to_come_back(attest) and asks_to_come_back(release) and isinstance(challenge, Challenge)
    assert [line["decision"] for line in site.audit()][:1] == ["allowed"]  # who was turned away left no line


def test_a_call_that_fails_is_not_open_any_more(site: Site) -> None:
    site.limits = Limits(open_calls=1)

    async def scene() -> list[str]:
        async with site.channel() as channel:
            return [(await failure_of(RawStream(channel).say(b"\xff"))).reason for _ in range(2)]

    assert played(site, scene) == ["PROTOCOL_MALFORMED"] * 2


def test_a_stream_that_says_nothing_is_not_kept(site: Site) -> None:
    site.limits = Limits(hello_timeout_s=0)

    async def scene() -> Failure:
        async with site.channel() as channel:
            return await failure_of(RawStream(channel).call.read())

    assert played(site, scene) == Failure(4, Ident("STREAM_TIMEOUT"))
    assert site.audit() == []


async def read_to_the_end(stream: RawStream) -> None:
    while isinstance(await stream.call.read(), bytes):
        pass


def test_a_challenge_is_not_waited_for_without_end(site: Site) -> None:
    site.limits = Limits(attestation_timeout_s=0.01)

    async def scene() -> Failure:
        async with site.channel() as channel:
            stream = RawStream(channel)
            await stream.call.write(wire.pack_attest_request(HELLO))
            return await failure_of(read_to_the_end(stream))

    assert played(site, scene) == Failure(4, Ident("STREAM_TIMEOUT"), Ident("boot-1"))
    assert [line["reason"] for line in site.audit()] == ["STREAM_TIMEOUT"]


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::5]:6000", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
    ],
)
def test_a_host_is_counted_over_all_its_connections(peer: str, host: str) -> None:
    assert peer_host(peer) == host


def test_the_health_service_says_serving(site: Site) -> None:
    async def scene() -> int:
        async with site.channel() as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            return int(answer.status)

    assert played(site, scene) == health_pb2.HealthCheckResponse.SERVING
