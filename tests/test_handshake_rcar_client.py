"""The RCAR client against an HTTPS server that answers by hand: what is sent, what is kept, and what is tried again."""

import asyncio
import hashlib
import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ClockSkewError,
    ConfigNotMeasuredError,
    DenialReason,
    DeviceError,
    EvidenceBindingError,
    IdentityProblem,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    ProtocolProblem,
    RemoteProtocolError,
    SimulationRefusedError,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, Evidence, RuntimeData, Tee, binding
from agent.handshake import SealedKey, Verdict
from agent.handshake.broker import Collect
from agent.handshake.machine import Trust
from agent.handshake.rcar_client import SESSION_MARGIN_S, RcarBroker, Site
from agent.jose import pack_b64
from agent.keys import EphemeralKey, open_jwe
from agent.sim.machine import SimulatedMachine
from tests.hostile_kbs import (
    AUTHORITY,
    CA,
    KEY,
    NAME,
    RESOURCE,
    SESSION,
    Kbs,
    answer,
    ear,
    hangs_up,
    is_silent,
    raw,
    refuses,
    sample,
    says,
    served,
    signed,
)
from tests.tls import Signer, certificate, pem

URI = Ident(RESOURCE)
TRUST = Trust((AUTHORITY.public_key(),), allow_simulation=True)
SITE = Site("https://unset.test", pem(CA).decode(), NAME, RESOURCE, simulated=True)


class Boot:
    """One handshake up to the key, and what was told of it."""

    def __init__(
        self, kbs: Kbs, site: Site = SITE, trust: Trust = TRUST, timeout_s: float = 20, leaf: Signer | None = None
    ) -> None:
        self.kbs, self.site, self.trust, self.timeout_s = kbs, site, trust, timeout_s
        self.leaf = leaf
        self.collect: Collect = sample
        self.tee = Tee.SAMPLE
        self.requested: list[Ident] = []
        self.retries: list[tuple[str, float]] = []
        self.unaffirmed: list[Ident] = []
        self.verdict: Verdict | None = None

    def on_retry(self, error: AgentError, _: int, wait_s: float) -> None:
        self.retries.append((type(error).__name__, wait_s))

    def on_attempt(self, request_id: Ident, _: int) -> None:
        self.requested.append(request_id)

    async def at(self, url: str) -> tuple[SealedKey, EphemeralKey]:
        site = replace(self.site, url=url)
        async with RcarBroker(site, self.trust, self.timeout_s, self.on_retry, self.unaffirmed.append) as broker:
            broker.connect()
            self.verdict, key = await broker.attest(URI, self.tee, self.collect, self.on_attempt)
            return await broker.release_key(self.verdict), key

    def run(self) -> bytes:
        """The key."""

        async def run() -> bytes:
            async with served(self.kbs, *(() if self.leaf is None else (self.leaf,))) as url:
                sealed, key = await self.at(url)
            opened = bytearray(32)
            open_jwe(sealed.jwe, key, memoryview(opened))
            return bytes(opened)

        return asyncio.run(run())

    def failure(self) -> AgentError:
        with pytest.raises(AgentError) as raised:
            self.run()
        assert raised.value.__cause__ is None
        return raised.value


# --- the good case ------------------------------------------------------------------------------------------------------


def test_a_key_is_released_and_every_message_is_trustees() -> None:
    boot = Boot(Kbs())
    assert boot.run() == KEY
    auth, attest, resource = boot.kbs.asked
    assert [(each.method, each.target) for each in boot.kbs.asked] == [
        ("POST", "/kbs/v0/auth"),
        ("POST", "/kbs/v0/attest"),
        ("GET", "/kbs/v0/resource/models/demo/key"),
    ]
    assert auth.json() == {
        "version": "0.4.0",
        "tee": "sample",
        "extra-params": {"supported-hash-algorithms": ["sha256", "sha384", "sha512"]},
    }
    assert auth.headers["content-type"] == attest.headers["content-type"] == "application/json"
    assert "cookie" not in auth.headers
    assert "authorization" not in auth.headers | attest.headers

    sent = attest.json()
    runtime_data = sent["runtime-data"]
    assert sent["init-data"] is None
    assert list(runtime_data) == ["nonce", "tee-pubkey"]
    assert runtime_data["nonce"] == boot.kbs.nonce
    assert runtime_data["tee-pubkey"].keys() == {"kty", "crv", "alg", "x", "y"}
    digest = hashlib.sha384(rfc8785.dumps({**runtime_data, "additional-evidence": ""})).digest()
    assert sent["tee-evidence"] == {
        "primary_evidence": {"svn": "1", "report_data": pack_b64(digest)},
        "additional_evidence": "",
    }

    assert attest.headers["cookie"] == resource.headers["cookie"] == f"kbs-session-id={SESSION}"
    assert resource.headers["authorization"] == f"Bearer {boot.kbs.tokens[0]}"
    assert boot.kbs.connections == 1
    assert boot.retries == []
    assert len(boot.requested) == 1


def test_what_the_verdict_says_is_what_trustee_knows() -> None:
    boot = Boot(Kbs())
    boot.run()
    assert boot.verdict is not None
    claims = boot.verdict.claims
    assert (claims.key_uri, claims.policy_version, claims.min_model_version, claims.lease_s) == (URI, "unversioned", 0, None)
    assert claims.simulated
    assert boot.verdict.request_id == boot.requested[0]
    assert boot.verdict.token == boot.kbs.tokens[0]


@pytest.mark.parametrize("nonce", ["x", 'not base64 at all: ü\n"\\', '{"host_key":1}', "A" * 1024])
def test_a_nonce_is_text_and_comes_back_as_it_came(nonce: str) -> None:
    boot = Boot(Kbs(nonce=nonce))
    assert boot.run() == KEY
    assert boot.kbs.asked[1].json()["runtime-data"]["nonce"] == nonce


@pytest.mark.parametrize("selected", ["sha256", "SHA384", "Sha512"])
def test_the_hash_that_the_challenge_selects_binds_cpu_and_devices(selected: str) -> None:
    boot = Boot(Kbs(extra_params={"selected-hash-algorithm": selected}))
    asked: list[RuntimeData] = []

    async def collect(data: RuntimeData) -> CompositeEvidence:
        asked.append(data)
        return await sample(data)

    boot.collect = collect
    assert boot.run() == KEY
    (data,) = asked
    members = boot.kbs.asked[1].json()["runtime-data"]
    digest = hashlib.new(selected.lower(), rfc8785.dumps({**members, "additional-evidence": ""})).digest()
    assert binding.report_data(data, "") == digest.ljust(64, b"\0")
    assert binding.device_nonce(data) == hashlib.new(selected.lower(), rfc8785.dumps(members)).digest()[:32]


def test_a_load_balancers_cookie_stays_with_the_session() -> None:
    boot = Boot(Kbs(cookies=("AWSALB=a+b/c=; Path=/", f"kbs-session-id={SESSION}")))
    assert boot.run() == KEY
    assert boot.kbs.asked[2].headers["cookie"] == f"AWSALB=a+b/c=; kbs-session-id={SESSION}"


def test_the_longest_head_fits_into_trustees_limit() -> None:
    cookies = tuple(f"c{index:02}={'x' * 1020}" for index in range(15))
    boot = Boot(Kbs(cookies=(f"kbs-session-id={SESSION}", *cookies), changes={"x": "y" * (70 << 10)}))
    assert boot.run() == KEY
    head = boot.kbs.asked[2].headers
    assert len(head["authorization"]) > 90 << 10
    assert head["cookie"].count(";") == 15


def test_a_plugin_and_a_query_go_into_the_path() -> None:
    boot = Boot(Kbs(), replace(SITE, resource_uri="kbs+external:///vault/models/key?version=2&x=%20"))
    assert boot.run() == KEY
    assert boot.kbs.asked[2].target == "/kbs/v0/external/vault/models/key?version=2&x=%20"


def test_a_token_that_does_not_fit_into_a_head_stays_out_of_it() -> None:
    boot = Boot(Kbs(changes={"x": "y" * (96 << 10)}))
    assert boot.run() == KEY
    assert "authorization" not in boot.kbs.asked[2].headers


# --- evidence -----------------------------------------------------------------------------------------------------------

DOCUMENT = 'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"keyturn.toml" = "ü"\n'


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedMachine:
    digest = hashlib.sha384(DOCUMENT.encode()).digest()
    return SimulatedMachine.create(tmp_path_factory.mktemp("machine") / "m", gpus=0, host_data=digest[:32])


def of_snp(kbs: Kbs, machine: SimulatedMachine, site: Site = SITE) -> Boot:
    boot = Boot(kbs, site)
    boot.tee = Tee.SNP

    async def collect(data: RuntimeData) -> CompositeEvidence:
        return CompositeEvidence(machine.attester().collect(binding.report_data(data, "")), "")

    boot.collect = collect
    return boot


def as_snp(kbs: Kbs) -> Kbs:
    """Its attestation service takes the evidence for SNP's."""

    async def attest(asked: Any, writer: Any) -> None:
        kbs.runtime_data = asked.json()["runtime-data"]
        claims = ear(kbs.runtime_data)
        evidence = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
        evidence["snp"] = evidence.pop("sample")
        kbs.tokens.append(signed(claims, kbs.authority))
        writer.write(answer(200, {"token": kbs.tokens[-1]}))
        await writer.drain()

    return kbs.on("attest", attest)


def test_snp_evidence_goes_with_its_initdata(machine: SimulatedMachine) -> None:
    site = replace(SITE, init_data=DOCUMENT, init_data_digest=hashlib.sha384(DOCUMENT.encode()).digest())
    boot = of_snp(as_snp(Kbs()), machine, site)
    assert boot.run() == KEY
    sent = boot.kbs.asked[1].json()
    assert sent["init-data"] == {"format": "toml", "body": DOCUMENT}
    assert sent["tee-evidence"]["primary_evidence"]["attestation_report"]["vmpl"] == 0
    assert [entry["cert_type"] for entry in sent["tee-evidence"]["primary_evidence"]["cert_chain"]] == ["VCEK", "ASK", "ARK"]
    assert boot.verdict is not None
    assert boot.verdict.claims.simulated, "the service does not know our simulator; we do"


def test_initdata_that_the_tee_does_not_know_is_not_sent(machine: SimulatedMachine) -> None:
    site = replace(SITE, init_data="other", init_data_digest=hashlib.sha256(b"other").digest())
    boot = of_snp(Kbs(), machine, site)
    assert isinstance(boot.failure(), ConfigNotMeasuredError)
    assert boot.kbs.times("attest") == 0


def test_a_token_about_another_kind_of_tee_is_refused(machine: SimulatedMachine) -> None:
    error = of_snp(Kbs(), machine).failure()
    assert isinstance(error, TokenError)
    assert error.check.value == "claims"


def test_evidence_over_other_data_is_not_sent() -> None:
    boot = Boot(Kbs())

    async def collect(_: RuntimeData) -> CompositeEvidence:
        return CompositeEvidence(Evidence(Tee.SAMPLE, bytes(48)), "")

    boot.collect = collect
    assert isinstance(boot.failure(), EvidenceBindingError)
    assert boot.kbs.times("attest") == 0


def test_what_the_devices_raise_ends_the_handshake() -> None:
    boot = Boot(Kbs())

    async def collect(_: RuntimeData) -> CompositeEvidence:
        raise DeviceError(Ident("sev-guest"), Ident("collect"), 5)

    boot.collect = collect
    assert isinstance(boot.failure(), DeviceError)
    assert boot.kbs.times("auth") == 1


# --- what is believed ---------------------------------------------------------------------------------------------------


def test_a_token_of_another_authority_is_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    boot = Boot(Kbs(authority=ec.derive_private_key(7, ec.SECP256R1())))
    error = boot.failure()
    assert isinstance(error, TokenError)
    assert error.check.value == "signature"
    assert boot.kbs.times("attest") == 1
    assert boot.kbs.times("resource") == 0


def test_simulated_evidence_counts_only_where_it_is_allowed() -> None:
    boot = Boot(Kbs(), replace(SITE, simulated=False), replace(TRUST, allow_simulation=False))
    assert isinstance(boot.failure(), SimulationRefusedError)
    assert boot.kbs.times("resource") == 0


@pytest.mark.parametrize("ahead_s", [-10 * 365 * 86400, -400, 400, 10 * 365 * 86400])
def test_a_token_of_another_time_is_a_clock_and_not_its_age(ahead_s: int) -> None:
    issued = int(time.time()) - ahead_s
    error = Boot(Kbs(changes={"iat": issued, "exp": issued + 300})).failure()
    assert isinstance(error, ClockSkewError)
    assert abs(error.ahead_s - ahead_s) < 5


def test_a_token_that_is_over_when_it_is_issued_is_expired() -> None:
    now = int(time.time())
    error = Boot(Kbs(changes={"iat": now, "exp": now - 61})).failure()
    assert isinstance(error, TokenError)
    assert error.check.value == "expiry"


@pytest.mark.parametrize("date", ["Thu, 01 Jan 1970 00:05:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_no_evidence_is_made_by_a_clock_that_spoils_the_token(date: str) -> None:
    challenge = says(200, {"nonce": "x", "extra-params": ""}, f"Date: {date}", "Set-Cookie: kbs-session-id=1")
    boot = Boot(Kbs().on("auth", challenge))
    assert isinstance(boot.failure(), ClockSkewError)
    assert boot.kbs.times("attest") == 0


@pytest.mark.parametrize("date", ["yesterday", "Thu, 99 Jan 99999 00:05:00 GMT", "x" * 1000, ""])
def test_a_date_that_is_none_says_nothing(date: str) -> None:
    challenge = says(200, {"nonce": "x", "extra-params": ""}, f"Date: {date}", "Set-Cookie: kbs-session-id=1")
    assert Boot(Kbs().on("auth", challenge)).run() == KEY


def test_a_challenge_without_a_session_is_refused() -> None:
    error = Boot(Kbs(cookies=("other=1",))).failure()
    assert isinstance(error, RemoteProtocolError)
    assert error.problem is ProtocolProblem.MALFORMED


# --- what is tried again ------------------------------------------------------------------------------------------------


def test_a_busy_kbs_is_asked_again_when_it_said() -> None:
    boot = Boot(Kbs().on("auth", says(503, b"<html>", "Retry-After: 1")).on("resource", says(429, b"", "Retry-After: 1")))
    assert boot.run() == KEY
    assert [name for name, _ in boot.retries] == ["BrokerUnreachableError"] * 2
    assert all(1 <= wait_s < 2 for _, wait_s in boot.retries)


def test_a_wait_beyond_the_deadline_is_given_up_at_once() -> None:
    boot = Boot(Kbs().on("auth", *[says(503, b"", "Retry-After: 3600")] * 3), timeout_s=5)
    error = boot.failure()
    assert isinstance(error, BrokerUnreachableError)
    assert error.reason is Unreachable.OVERLOADED
    assert boot.kbs.times("auth") == 1


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_proxys_error_is_tried_again_with_a_new_handshake(status: int) -> None:
    boot = Boot(Kbs().on("attest", says(status, b"<html>")))
    assert boot.run() == KEY
    assert boot.kbs.times("auth") == 2
    assert len(set(boot.requested)) == 2
    keys = {json.dumps(each.json()["runtime-data"]["tee-pubkey"]) for each in boot.kbs.asked if each.what == "attest"}
    assert len(keys) == 2, "another handshake has another key pair"


def test_a_kept_connection_that_has_ended_costs_no_handshake() -> None:
    closing = answer(200, {"nonce": "n", "extra-params": ""}, f"Set-Cookie: kbs-session-id={SESSION}")

    async def says_and_hangs_up(_: Any, writer: Any) -> None:
        writer.write(closing)
        await writer.drain()
        raise ConnectionResetError

    boot = Boot(Kbs().on("auth", says_and_hangs_up).on("attest", hangs_up))
    boot.kbs.nonce = "n"
    assert boot.run() == KEY
    assert boot.kbs.times("auth") <= 2


def test_a_connection_lost_while_it_is_asked_is_asked_once_more_on_a_new_one() -> None:
    boot = Boot(Kbs().on("attest", hangs_up))
    assert boot.run() == KEY
    assert boot.retries == []
    assert (boot.kbs.times("auth"), boot.kbs.times("attest"), boot.kbs.connections) == (1, 2, 2)


def test_a_new_connection_that_is_lost_waits_as_every_failure_does() -> None:
    boot = Boot(Kbs().on("auth", hangs_up))
    assert boot.run() == KEY
    assert [name for name, _ in boot.retries] == ["BrokerUnreachableError"]
    boot = Boot(Kbs().on("attest", hangs_up, hangs_up))
    assert boot.run() == KEY
    assert ([name for name, _ in boot.retries], boot.kbs.times("attest")) == (["BrokerUnreachableError"], 3)


def test_an_attestation_that_is_refused_may_be_an_outage_and_is_tried_three_times() -> None:
    boot = Boot(Kbs().on("attest", *[refuses("AttestationError", "Attestation error: RCAR handshake Attest failed")] * 5))
    error = boot.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts) == (TrusteeRefusal.ATTESTATION, 3)
    assert boot.kbs.times("attest") == 3
    again = Boot(Kbs().on("attest", refuses("AttestationError", "x")))
    assert again.run() == KEY


def test_a_key_that_is_not_there_is_asked_for_three_times_under_one_attestation() -> None:
    boot = Boot(Kbs().on("resource", *[refuses("PluginInternalError", "Plugin internal error")] * 5))
    error = boot.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts) == (TrusteeRefusal.RESOURCE, 3)
    assert (boot.kbs.times("attest"), boot.kbs.times("resource")) == (1, 3)


@pytest.mark.parametrize("word", ["TokenNotFound", "TokenVerifierError"])
def test_a_forgotten_session_is_made_anew_once(word: str) -> None:
    boot = Boot(Kbs().on("resource", refuses(word)))
    assert boot.run() == KEY
    assert boot.retries == []
    assert (boot.kbs.times("attest"), boot.kbs.times("resource"), len(boot.requested)) == (2, 2, 2)
    first, second = (each.json()["runtime-data"]["tee-pubkey"] for each in boot.kbs.asked if each.what == "attest")
    assert first == second, "the key pair that the boot holds opens what comes"

    boot = Boot(Kbs().on("resource", *[refuses(word)] * 3))
    error = boot.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert error.refusal in (TrusteeRefusal.NO_SESSION, TrusteeRefusal.VERIFICATION)
    assert (boot.kbs.times("attest"), boot.kbs.times("resource")) == (2, 2)


def test_the_next_attestation_may_be_forgotten_once_again() -> None:
    kbs = Kbs().on("resource", refuses("TokenNotFound"))

    async def run() -> None:
        async with served(kbs) as url, RcarBroker(replace(SITE, url=url), TRUST, 20) as broker:
            for _ in range(2):
                verdict, _key = await broker.attest(URI, Tee.SAMPLE, sample)
                await broker.release_key(verdict)
                kbs.on("resource", refuses("TokenVerifierError"))

    asyncio.run(run())
    assert (kbs.times("attest"), kbs.times("resource")) == (4, 4)


def test_a_denial_before_a_new_token_is_not_explained_by_the_old_one() -> None:
    boot = Boot(Kbs(claims={"executables": 33}).on("resource", refuses("TokenNotFound")))
    boot.kbs.on("auth", boot.kbs.good, refuses("PolicyDeny"))
    error = boot.failure()
    assert isinstance(error, KeyReleaseDeniedError)
    assert (error.reason, boot.unaffirmed) == (DenialReason.POLICY, [])


def test_a_second_challenge_of_a_handshake_needs_a_session_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.handshake.rcar.SESSION_LIFE_S", SESSION_MARGIN_S)  # every Challenge is over at once
    boot = Boot(Kbs())
    boot.kbs.on("auth", boot.kbs.good, says(200, {"nonce": "x", "extra-params": ""}))
    error = boot.failure()
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, boot.kbs.times("auth"), boot.kbs.times("attest")) == (ProtocolProblem.MALFORMED, 2, 0)


@pytest.mark.parametrize("word", ["TokenNotFound", "TokenVerifierError"])
@pytest.mark.parametrize("what", ["auth", "attest"])
def test_who_has_no_session_yet_is_not_told_to_begin_again(what: str, word: str) -> None:
    boot = Boot(Kbs().on(what, refuses(word)))
    error = boot.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert error.refusal in (TrusteeRefusal.NO_SESSION, TrusteeRefusal.VERIFICATION)
    assert (boot.kbs.times(what), boot.kbs.times("resource")) == (1, 0)


def test_a_session_that_is_forgotten_again_is_not_made_a_third_time() -> None:
    boot = Boot(Kbs().on("resource", refuses("TokenNotFound"), says(502), refuses("TokenNotFound")))
    error = boot.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert error.refusal is TrusteeRefusal.NO_SESSION
    assert (boot.kbs.times("attest"), boot.kbs.times("resource")) == (2, 3)


def test_a_second_attestation_that_is_cut_off_is_made_by_the_next_attempt() -> None:
    boot = Boot(Kbs().on("resource", refuses("TokenNotFound")))
    boot.kbs.on("attest", boot.kbs.good, says(502))
    assert boot.run() == KEY
    assert (boot.kbs.times("attest"), boot.kbs.times("resource")) == (3, 2)


def test_a_denial_is_final_and_the_token_says_why() -> None:
    boot = Boot(Kbs(claims={"executables": 33, "hardware": 97, "configuration": 36}).on("resource", refuses("PolicyDeny")))
    error = boot.failure()
    assert isinstance(error, KeyReleaseDeniedError)
    assert error.reason is DenialReason.CLAIM
    assert error.claim == boot.unaffirmed[0]
    assert {str(each) for each in boot.unaffirmed} == {
        "cpu0:executables:executables-unrecognised:33",
        "cpu0:hardware:hardware-unrecognised:97",
        "cpu0:configuration:configuration-unavailable:36",
        "cpu0:sample-evidence:contraindicated",
    }
    assert (boot.kbs.times("attest"), boot.kbs.times("resource")) == (1, 1)


def test_a_sealed_key_that_nobody_could_open_is_refused_before_the_gate() -> None:
    boot = Boot(Kbs().on("resource", says(200, b"\x00" * 32)))

    async def ask() -> None:
        async with served(boot.kbs) as url:
            await boot.at(url)  # and nobody opens anything

    with pytest.raises(KeyUnwrapError):
        asyncio.run(ask())
    assert boot.kbs.times("resource") == 1


# --- who answers, and when ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "leaf", "name"),
    [
        (IdentityProblem.CHAIN, certificate(NAME), NAME),
        (IdentityProblem.NAME, None, "other.test"),
        (IdentityProblem.EXPIRED, certificate(NAME, (-3, -2), CA), NAME),
        (IdentityProblem.NOT_YET_VALID, certificate(NAME, (2, 3), CA), NAME),
    ],
)
def test_somebody_else_answering_is_an_identity_error_and_final(
    problem: IdentityProblem, leaf: Signer | None, name: str
) -> None:
    boot = Boot(Kbs(), replace(SITE, server_name=name), leaf=leaf)
    error = boot.failure()
    assert isinstance(error, BrokerIdentityError)
    assert error.problem is problem
    assert boot.kbs.asked == []
    assert boot.retries == []


def test_a_server_without_tls_is_an_identity_error() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(400))
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(http, "127.0.0.1", 0) as server:
            await Boot(Kbs()).at("https://{}:{}".format(*server.sockets[0].getsockname()))

    with pytest.raises(BrokerIdentityError) as raised:
        asyncio.run(run())
    assert raised.value.problem is IdentityProblem.TLS


def test_an_intermediate_ca_can_be_the_measured_one() -> None:
    root = certificate("root")
    middle = certificate("middle", signer=root)
    boot = Boot(Kbs(), replace(SITE, ca_pem=pem(middle).decode()), leaf=certificate(NAME, signer=middle))
    assert isinstance(boot.failure(), BrokerIdentityError), "this one may not sign"
    boot = Boot(Kbs(), replace(SITE, ca_pem=pem(root).decode()), leaf=certificate(NAME, signer=root))
    assert boot.run() == KEY


def test_a_ca_that_is_none_is_an_identity_error() -> None:
    site = replace(SITE, ca_pem="-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    assert isinstance(Boot(Kbs(), site).failure(), BrokerIdentityError)


def test_nobody_there_is_named() -> None:
    for url, reason in (
        ("https://nowhere.invalid", Unreachable.NAME),
        (f"https://127.0.0.1:{_closed_port()}", Unreachable.REFUSED),
    ):
        with pytest.raises(BrokerUnreachableError) as raised:
            asyncio.run(Boot(Kbs(), timeout_s=0.4).at(url))
        assert raised.value.reason is reason


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_silent_kbs_is_a_timeout_at_the_deadline() -> None:
    began = time.monotonic()
    error = Boot(Kbs().on("attest", *[is_silent] * 9), timeout_s=0.6).failure()
    assert isinstance(error, BrokerUnreachableError)
    assert error.reason is Unreachable.TIMEOUT
    assert time.monotonic() - began < 2


def test_a_cancelled_boot_ends_its_request_first_and_soon() -> None:
    async def run() -> float:
        kbs = Kbs().on("auth", is_silent)
        async with served(kbs) as url:
            task = asyncio.create_task(Boot(kbs).at(url))
            while not kbs.asked:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return time.monotonic() - began

    assert asyncio.run(run()) < 1


def test_the_environment_names_no_proxy_and_no_ca(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{_closed_port()}")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert Boot(Kbs()).run() == KEY
    assert not (tmp_path / "keys").exists()


def test_a_large_attestation_arrives_whole() -> None:
    boot = Boot(Kbs())
    text = json.dumps({"nvidia": {"device_evidence_list": [], "x": "y" * (400 << 10)}})

    async def collect(data: RuntimeData) -> CompositeEvidence:
        return CompositeEvidence(Evidence(Tee.SAMPLE, binding.report_data(data, text)[:48]), text)

    boot.collect = collect
    assert boot.run() == KEY
    assert boot.kbs.asked[1].json()["tee-evidence"]["additional_evidence"] == text


def test_an_answer_may_be_chunked() -> None:
    body = json.dumps({"nonce": "n", "extra-params": ""}).encode()
    head = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nSet-Cookie: kbs-session-id={SESSION}\r\n\r\n{len(body):x}\r\n"
    boot = Boot(Kbs().on("auth", raw(head.encode() + body + b"\r\n0\r\n\r\n")))
    assert boot.run() == KEY
    assert boot.kbs.connections == 1


STORE = Ident("kbs:///models/store/1")


async def with_credentials(kbs: Kbs) -> tuple[bytes, bytes, EphemeralKey]:
    """What was sealed for the guest: credentials, then the key."""
    async with served(kbs) as url, RcarBroker(replace(SITE, url=url), TRUST, 20) as broker:
        verdict, pair = await broker.attest(URI, Tee.SAMPLE, sample)
        credentials = await broker.release_credentials(verdict, STORE)
        return credentials.jwe, (await broker.release_key(verdict)).jwe, pair


def test_credentials_are_another_resource_of_the_same_session() -> None:
    kbs = Kbs()
    credentials, sealed, pair = asyncio.run(with_credentials(kbs))
    assert [each.target.removeprefix("/kbs/v0/") for each in kbs.asked] == [
        *("auth", "attest"),
        *("resource/models/store/1", "resource/models/demo/key"),
    ]
    assert len({each.headers["cookie"] for each in kbs.asked[2:]}) == 1
    for jwe in (credentials, sealed):  # one key pair for both
        opened = bytearray(32)
        open_jwe(jwe, pair, memoryview(opened))
        assert bytes(opened) == KEY


def test_a_session_that_is_forgotten_before_the_credentials_is_made_anew_and_still_good_for_the_key() -> None:
    kbs = Kbs().on("resource", refuses("TokenNotFound"))
    _, sealed, pair = asyncio.run(with_credentials(kbs))
    opened = bytearray(32)
    open_jwe(sealed, pair, memoryview(opened))
    assert bytes(opened) == KEY
    assert (kbs.times("attest"), kbs.times("resource")) == (2, 3)


def test_denied_credentials_end_it_before_the_key_is_asked_for() -> None:
    kbs = Kbs().on("resource", refuses("PolicyDeny"))
    with pytest.raises(KeyReleaseDeniedError):
        asyncio.run(with_credentials(kbs))
    assert kbs.times("resource") == 1
