"""Our client and the test KBS, which were written apart from the same facts: what they agree on was read twice."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerUnreachableError,
    ClockSkewError,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, RuntimeData, Tee, binding
from agent.evidence.binding import KeyturnClaims
from agent.handshake import Verdict
from agent.handshake.machine import Trust
from agent.handshake.rcar_client import RcarBroker, Site
from agent.handshake.token import parse_token_key
from agent.keys import open_jwe
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee, serve
from agent.sim.trustee_knobs import REFUSALS, CookieFault, Fault, JweFault, Knobs, TokenFault
from tests.hostile_broker import CA, LEAF, NAME
from tests.tls import key_pem, pem

KEY = bytes(range(32))
URI = Ident("kbs:///models/demo/1")
DOCUMENT = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n\n[data]\n\"policy.rego\" = '''package agent_policy'''\n"
DIGEST = hashlib.sha384(DOCUMENT.encode()).digest()
CLAIMS = KeyturnClaims(1, 2, 0, 0, False, False, "580.95.05", "sha256:" + "ab" * 32, "sha256:" + "cd" * 32)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedMachine:
    return SimulatedMachine.create(tmp_path_factory.mktemp("machine") / "m", gpus=2, host_data=DIGEST[:32])


@pytest.fixture
def kbs(machine: SimulatedMachine) -> Iterator[Trustee]:
    with serve(roots=machine.roots_dir, tls=(pem(LEAF), key_pem(LEAF))) as kbs:
        kbs.register_resource("models/demo/1", KEY)
        kbs.set_resource_policy("allow_all")
        yield kbs


class Guest:
    """A guest's handshake with the KBS."""

    def __init__(self, kbs: Trustee, machine: SimulatedMachine, tee: Tee = Tee.SAMPLE, *, gpus: bool = False) -> None:
        self.kbs, self.machine, self.tee, self.gpus = kbs, machine, tee, gpus
        self.site = Site(kbs.url, pem(CA).decode(), NAME, URI, simulated=True)
        self.trust = Trust((parse_token_key(kbs.token_key_pem),), allow_simulation=True)
        self.unaffirmed: list[Ident] = []
        self.requested = 0
        self.pause_s = 0.0

    def on_attempt(self, _: Ident, number: int) -> None:
        self.requested = number

    async def collect(self, data: RuntimeData) -> CompositeEvidence:
        text = ""
        if self.gpus:
            text = binding.additional_evidence(self.machine.gpu_system().collect(binding.device_nonce(data)), CLAIMS)
        return CompositeEvidence(self.machine.attester(self.tee).collect(binding.report_data(data, text)), text)

    async def boot(self, timeout_s: float) -> tuple[bytes, Verdict]:
        async with RcarBroker(self.site, self.trust, timeout_s, on_unaffirmed=self.unaffirmed.append) as broker:
            verdict, key = await broker.attest(URI, self.tee, self.collect, self.on_attempt)
            await asyncio.sleep(self.pause_s)
            sealed = await broker.release_key(verdict)
            opened = bytearray(32)
            open_jwe(sealed.jwe, key, memoryview(opened))
            return bytes(opened), verdict

    def key(self, timeout_s: float = 20) -> bytes:
        return asyncio.run(self.boot(timeout_s))[0]

    def failure(self, timeout_s: float = 20) -> AgentError:
        with pytest.raises(AgentError) as raised:
            self.key(timeout_s)
        return raised.value

    def asked(self, path: str) -> int:
        return sum(path in entry.path for entry in self.kbs.log)


# --- what both read alike -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", Tee)
def test_a_key_is_released_over_evidence_of_every_kind(kbs: Trustee, machine: SimulatedMachine, tee: Tee) -> None:
    guest = Guest(kbs, machine, tee)
    assert guest.key() == KEY, kbs.log
    assert [entry.status for entry in kbs.log] == [200, 200, 200]
    assert {entry.connection for entry in kbs.log} == {1}
    assert [(entry.cookie, entry.bearer) for entry in kbs.log] == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_gpus_are_covered_by_the_cpu(kbs: Trustee, machine: SimulatedMachine, tee: Tee) -> None:
    assert Guest(kbs, machine, tee, gpus=True).key() == KEY, kbs.log


def test_initdata_goes_along_and_its_digest_is_the_tees(kbs: Trustee, machine: SimulatedMachine) -> None:
    guest = Guest(kbs, machine, Tee.SNP)
    guest.site = replace(guest.site, init_data=DOCUMENT, init_data_digest=DIGEST)
    assert guest.key() == KEY, kbs.log


@pytest.mark.parametrize("selected", ["sha256", "sha384", "sha512", "SHA512"])
@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_the_hash_that_the_challenge_selects(kbs: Trustee, machine: SimulatedMachine, tee: Tee, selected: str) -> None:
    kbs.knobs = Knobs(selected_hash=selected)
    assert Guest(kbs, machine, tee, gpus=True).key() == KEY, kbs.log


@pytest.mark.parametrize("nonce", ["x", '{"a":"\\u00e4 ü"}'])
def test_a_nonce_is_text(kbs: Trustee, machine: SimulatedMachine, nonce: str) -> None:
    kbs.knobs = Knobs(nonce=nonce)
    assert Guest(kbs, machine).key() == KEY, kbs.log


def test_a_plugin_answers_a_query(kbs: Trustee, machine: SimulatedMachine) -> None:
    seen: list[object] = []

    def plugin(path: str, query: object) -> bytes:
        seen.append((path, query))
        return KEY

    kbs.plugins["external"] = plugin
    guest = Guest(kbs, machine)
    guest.site = replace(guest.site, resource_uri="kbs+external:///vault/models/demo?version=2&x=%20")
    assert guest.key() == KEY, kbs.log
    assert seen == [("vault/models/demo", {"version": "2", "x": " "})]


def test_the_policy_of_affirmed_guests(kbs: Trustee, machine: SimulatedMachine) -> None:
    kbs.set_resource_policy("affirming")
    guest = Guest(kbs, machine, Tee.SNP)
    error = guest.failure()
    assert isinstance(error, KeyReleaseDeniedError)
    assert error.claim in ("cpu0:executables:executables-unrecognised:33", "cpu0:hardware:hardware-unrecognised:97")
    assert {"cpu0:executables:executables-unrecognised:33", "cpu0:hardware:hardware-unrecognised:97"} <= set(guest.unaffirmed)
    assert guest.asked("resource") == guest.asked("attest") == 1

    kbs.set_attestation_policy("default_cpu", {"executables": 3, "hardware": 2, "configuration": 2})
    assert Guest(kbs, machine, Tee.SNP).key() == KEY, kbs.log


def test_the_default_policy_denies_sample_evidence_and_the_token_says_that_it_is(
    kbs: Trustee, machine: SimulatedMachine
) -> None:
    kbs.set_resource_policy("default")
    guest = Guest(kbs, machine)
    assert isinstance(guest.failure(), KeyReleaseDeniedError)
    assert any(finding.startswith("cpu0:sample-evidence") for finding in guest.unaffirmed)
    assert Guest(kbs, machine, Tee.SNP).key() == KEY


# --- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_s", [-250, 250])
def test_a_clock_that_differs_by_less_than_a_tokens_life_is_told_by_the_token(
    kbs: Trustee, machine: SimulatedMachine, offset_s: float
) -> None:
    kbs.knobs = Knobs(clock_offset_s=offset_s)
    guest = Guest(kbs, machine)
    if offset_s < 0:  # our clock is ahead: the cookie's end is over by it, and the token's is not quite
        assert guest.key() == KEY
    else:
        error = guest.failure()
        assert isinstance(error, ClockSkewError)
        assert -260 < error.ahead_s < -240


@pytest.mark.parametrize("offset_s", [-(10 * 365 * 86400), -1000, 1000, 10 * 365 * 86400])
def test_clocks_years_apart_are_a_clock(kbs: Trustee, machine: SimulatedMachine, offset_s: float) -> None:
    kbs.knobs = Knobs(clock_offset_s=offset_s)
    guest = Guest(kbs, machine)
    error = guest.failure()
    assert isinstance(error, ClockSkewError)
    assert abs(error.ahead_s + offset_s) < 10
    assert guest.asked("resource") == 0


def test_a_session_that_ended_while_we_collected_is_made_anew(kbs: Trustee, machine: SimulatedMachine) -> None:
    kbs.knobs = Knobs(session_life_s=-1)
    error = Guest(kbs, machine).failure()
    assert isinstance(error, TrusteeRefusedError)
    assert (error.refusal, error.attempts) == (TrusteeRefusal.ATTESTATION, 3)


def test_sessions_that_are_lost_leave_the_token(kbs: Trustee, machine: SimulatedMachine) -> None:
    async def run() -> None:
        guest = Guest(kbs, machine)
        async with RcarBroker(guest.site, guest.trust, 20) as broker:
            verdict, key = await broker.attest(URI, Tee.SAMPLE, guest.collect)
            kbs.forget_sessions()
            sealed = await broker.release_key(verdict)
            open_jwe(sealed.jwe, key, memoryview(bytearray(32)))

    asyncio.run(run())
    assert sum(entry.path.endswith("attest") for entry in kbs.log) == 1


def test_a_token_that_ended_is_attested_for_once_more(kbs: Trustee, machine: SimulatedMachine) -> None:
    kbs.knobs = Knobs(token_life_s=-59)  # of which the server's leeway leaves a second
    guest = Guest(kbs, machine)
    guest.pause_s = 2.0
    assert guest.key() == KEY, kbs.log
    assert (guest.asked("attest"), guest.requested) == (2, 2)


# --- refusals and faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.1.1", "0.5.0"])
def test_a_kbs_of_another_protocol_is_named(kbs: Trustee, machine: SimulatedMachine, version: str) -> None:
    kbs.knobs = Knobs(protocol=version)
    guest = Guest(kbs, machine)
    error = guest.failure()
    assert isinstance(error, RemoteProtocolError)
    assert (error.problem, error.version, guest.asked("auth")) == (ProtocolProblem.VERSION, version, 1)
    guest.site = replace(guest.site, protocol_version=version)
    assert guest.key() == KEY


EXPECTED = {
    "version-mismatch": ProtocolProblem.VERSION,
    "bad-version": ProtocolProblem.VERSION,
    "bad-request": TrusteeRefusal.REQUEST,
    "attest-failed": TrusteeRefusal.ATTESTATION,
    "token-not-found": TrusteeRefusal.NO_SESSION,
    "token-verifier": TrusteeRefusal.VERIFICATION,
    "policy-broken": TrusteeRefusal.POLICY_ENGINE,
    "plugin-internal": TrusteeRefusal.RESOURCE,
    "jwe": TrusteeRefusal.KEY_TYPE,
    "plugin-not-found": TrusteeRefusal.NO_PLUGIN,
    "admin-access": TrusteeRefusal.ADMIN,
    "admin-plugin": TrusteeRefusal.ADMIN,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_its_outcome(kbs: Trustee, machine: SimulatedMachine, name: str) -> None:
    stage = (
        "auth"
        if name in ("version-mismatch", "bad-version", "bad-request")
        else "attest"
        if name == "attest-failed"
        else "resource"
    )
    kbs.knobs = Knobs(refusals={stage: REFUSALS[name]})
    guest = Guest(kbs, machine)
    error = guest.failure()
    if name == "policy-deny":
        assert isinstance(error, KeyReleaseDeniedError)
    elif isinstance(error, RemoteProtocolError):
        assert error.problem is EXPECTED[name]
    else:
        assert isinstance(error, TrusteeRefusedError)
        assert error.refusal is EXPECTED[name]
    again = {"attest-failed": 3, "plugin-internal": 3, "token-not-found": 2, "token-verifier": 2}
    assert guest.asked(stage) == again.get(name, 1)


RETRIED = {
    Fault.SLOW_DRIP: Unreachable.TIMEOUT,
    Fault.SILENT: Unreachable.TIMEOUT,
    Fault.HALF_CLOSED: Unreachable.RESET,
    Fault.RESET: Unreachable.RESET,
    Fault.HTML_502: Unreachable.SERVER_ERROR,
    Fault.SERVER_ERROR: Unreachable.SERVER_ERROR,
    Fault.UNAVAILABLE: Unreachable.OVERLOADED,
    Fault.TOO_MANY_REQUESTS: Unreachable.OVERLOADED,
}


@pytest.mark.parametrize("stage", ["auth", "attest", "resource"])
@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_every_fault_is_one_error_in_bounded_time(kbs: Trustee, machine: SimulatedMachine, fault: Fault, stage: str) -> None:
    kbs.knobs = Knobs(faults={stage: fault})
    guest = Guest(kbs, machine)
    began = time.monotonic()
    error = guest.failure(timeout_s=1.2)
    assert time.monotonic() - began < 4
    if fault in RETRIED:
        assert isinstance(error, BrokerUnreachableError), error
        assert error.reason in (RETRIED[fault], Unreachable.RESET), error
    else:
        assert isinstance(error, RemoteProtocolError | KeyUnwrapError), error
        assert guest.asked(stage) == 1
        assert guest.requested == 1


@pytest.mark.parametrize("stage", ["auth", "attest", "resource"])
@pytest.mark.parametrize(
    "fault", [Fault.RESET, Fault.HALF_CLOSED, Fault.HTML_502, Fault.UNAVAILABLE], ids=lambda fault: fault.name
)
def test_what_passes_by_itself_costs_a_retry(kbs: Trustee, machine: SimulatedMachine, fault: Fault, stage: str) -> None:
    kbs.knobs = Knobs(faults={stage: fault}, fault_times=1)
    assert Guest(kbs, machine).key() == KEY, kbs.log


@pytest.mark.parametrize("fault", TokenFault, ids=lambda fault: fault.name)
def test_no_bad_token_is_believed(kbs: Trustee, machine: SimulatedMachine, fault: TokenFault) -> None:
    kbs.knobs = Knobs(token_fault=fault)
    guest = Guest(kbs, machine)
    assert isinstance(guest.failure(), TokenError | RemoteProtocolError)
    assert (guest.asked("attest"), guest.asked("resource")) == (1, 0)


@pytest.mark.parametrize("fault", JweFault, ids=lambda fault: fault.name)
def test_no_bad_sealed_key_opens(kbs: Trustee, machine: SimulatedMachine, fault: JweFault) -> None:
    kbs.knobs = Knobs(jwe_fault=fault)
    guest = Guest(kbs, machine)
    assert isinstance(guest.failure(), KeyUnwrapError)
    assert guest.asked("resource") == 1


BAD_COOKIES = [CookieFault.MISSING, CookieFault.EMPTY, CookieFault.OVERSIZED]


@pytest.mark.parametrize("fault", BAD_COOKIES, ids=lambda fault: fault.name)
def test_a_bad_cookie_is_one_error(kbs: Trustee, machine: SimulatedMachine, fault: CookieFault) -> None:
    kbs.knobs = Knobs(cookie_fault=fault)
    guest = Guest(kbs, machine)
    assert isinstance(guest.failure(), RemoteProtocolError)
    assert (guest.asked("auth"), guest.asked("attest")) == (1, 0)


def test_a_cookie_with_more_in_it_is_its_name_and_value(kbs: Trustee, machine: SimulatedMachine) -> None:
    kbs.knobs = Knobs(cookie_fault=CookieFault.INJECTING)
    assert Guest(kbs, machine).key() == KEY, kbs.log


def test_an_attestation_above_the_servers_limit_is_not_sent(kbs: Trustee, machine: SimulatedMachine, tmp_path: Path) -> None:
    guest = Guest(kbs, machine, Tee.SNP)
    guest.site = replace(guest.site, init_data="x" * (2 << 20), init_data_digest=DIGEST)
    error = guest.failure()
    assert isinstance(error, TrusteeRefusedError)
    assert error.refusal is TrusteeRefusal.TOO_LARGE
    assert guest.asked("attest") == 0
