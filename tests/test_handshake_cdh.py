"""A key that the guest's own components fetch: what the agent still holds to, and in which order."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import (
    AgentError,
    CredentialsProblem,
    GpuCountError,
    GuestApiError,
    GuestApiProblem,
    KeyNotDeliveredError,
    SimulationRefusedError,
    StoreCredentialsError,
    TokenCheck,
    TokenError,
)
from agent.evidence import CompositeEvidence, RuntimeData, Tee
from agent.evidence.gate import ExpectedReady, secure
from agent.guest.api_server import ApiServer
from agent.handshake import KeptKey, Verdict
from agent.handshake.cdh import CdhBroker
from agent.handshake.machine import Trust
from agent.keys import EphemeralKey, open_credentials, unwrap
from agent.sim.api_server_rest import Components, serve
from agent.tink_keyset import parse_keyset
from tests.fuzz.targets import keyset_seeds
from tests.test_handshake_ear import BAD, SERVICE, STRANGER, TEE, payload, signed, submod

KEY = bytes(range(60, 92))
URI = Ident("kbs:///models/tiny/1")
DIGEST = bytes(range(48))
PINNED = Trust((SERVICE.public_key(),), allow_simulation=False)
Members = dict[str, Any]


def cpu(kind: str = "snp", init_data: str | None = DIGEST[:32].hex(), **more: Any) -> Members:
    return submod(kind, {}, init_data=init_data, **more)


def token(submods: Members | None = None, key: ec.EllipticCurvePrivateKey = SERVICE, age_s: int = 5) -> str:
    made = int(time.time()) - age_s
    return signed(payload(**(submods or {"cpu0": cpu()})) | {"iat": made, "exp": made + 300}, key=key)


async def never(_: RuntimeData) -> CompositeEvidence:
    raise AssertionError("no evidence of ours is asked for")


@dataclass
class Guest:
    """One broker of a guest, and what was asked of its components."""

    components: Components
    broker: CdhBroker
    attempts: list[tuple[str, int]] = field(default_factory=list)

    def attest(self, tee: Tee = Tee.SNP) -> tuple[Verdict, EphemeralKey]:
        return asyncio.run(self.broker.attest(URI, tee, never, lambda *attempt: self.attempts.append(attempt)))

    def release(self, verdict: Verdict) -> KeptKey:
        return asyncio.run(self.broker.release_key(verdict))


@contextmanager
def guest(text: str | None, trust: Trust = PINNED, gpus: int = 0) -> Iterator[Guest]:
    components = Components(None, token=None if text is None else lambda: text, resources={"models/tiny/1": KEY})
    with serve(components) as url:
        yield Guest(components, CdhBroker(ApiServer(url), trust, DIGEST, gpus))


def test_the_key_is_asked_for_after_the_gate_and_not_before() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        kept = this.release(verdict)
        secured = secure(verdict, None, None, ExpectedReady.UNSET)
        assert this.components.asked == ["/aa/token"]
        with unwrap(kept, ephemeral, secured) as key:
            assert bytes(key.secret.view()) == KEY
            assert key.key_id == URI
    assert this.components.asked == ["/aa/token", "/cdh/resource/models/tiny/1"]
    assert this.attempts == [(verdict.request_id, 1)]


def test_a_keyset_may_be_kept_too() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        this.components.resources = {"models/tiny/1": keyset_seeds()[0]}
        with unwrap(this.release(verdict), ephemeral, secure(verdict, None, None, ExpectedReady.UNSET)) as key:
            assert bytes(key.secret.view()) == parse_keyset(keyset_seeds()[0])


def test_nothing_is_fetched_without_the_gate() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        with pytest.raises(RuntimeError):
            unwrap(this.release(verdict), ephemeral, None)  # type: ignore[arg-type]
    assert this.components.asked == ["/aa/token"]


def test_a_verdict_has_what_the_boot_needs_and_no_lease() -> None:
    with guest(token()) as this:
        claims = this.attest()[0].claims
    assert (claims.key_uri, claims.policy_version, claims.tee_pubkey) == (URI, "unversioned", TEE)
    assert (claims.lease_s, claims.min_model_version, claims.simulated) == (None, 0, False)


def test_a_key_that_does_not_come_leaves_nothing_of_it() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        kept = this.release(verdict)
        this.components.resources = {"models/tiny/1": KEY[:20]}
        with pytest.raises(KeyNotDeliveredError) as caught:
            unwrap(kept, ephemeral, secure(verdict, None, None, ExpectedReady.UNSET))
    assert caught.value.exit_status == 17
    with pytest.raises(RuntimeError):
        ephemeral.exchange(STRANGER.public_key())


def test_what_the_token_does_not_affirm_is_told_when_no_key_comes() -> None:
    told: list[str] = []
    bad = submod("snp", {}, BAD, "contraindicated", init_data=DIGEST[:32].hex())
    with serve(Components(None, token=lambda: token({"cpu0": bad}))) as url:
        broker = CdhBroker(ApiServer(url), PINNED, DIGEST, 0, told.append)
        verdict, ephemeral = asyncio.run(broker.attest(URI, Tee.SNP, never))
        assert told == []
        with pytest.raises(KeyNotDeliveredError):
            unwrap(asyncio.run(broker.release_key(verdict)), ephemeral, secure(verdict, None, None, ExpectedReady.UNSET))
    assert [finding.split(":")[:2] for finding in told] == [
        ["cpu0", name] for name in ("hardware", "configuration", "executables")
    ]


def refused(text: str, tee: Tee = Tee.SNP, trust: Trust = PINNED, gpus: int = 0) -> AgentError:
    with guest(text, trust, gpus) as this, pytest.raises(AgentError) as caught:
        this.attest(tee)
    assert this.components.asked == ["/aa/token"]
    return caught.value


def checked(error: AgentError) -> TokenCheck:
    assert isinstance(error, TokenError)
    return error.check


@pytest.mark.parametrize(
    ("text", "check"),
    [
        (lambda: "", TokenCheck.FORMAT),
        (lambda: "a.b.c", TokenCheck.FORMAT),
        (lambda: token(key=STRANGER), TokenCheck.SIGNATURE),
        (lambda: token(age_s=900), TokenCheck.EXPIRED),
        (lambda: token(age_s=-900), TokenCheck.NOT_YET_VALID),
        (lambda: token({"gpu0": submod("nvidia", {})}), TokenCheck.CLAIMS),
        (lambda: token({"cpu0": cpu("tdx")}), TokenCheck.CLAIMS),
        (lambda: token({"cpu0": cpu("sample")}), TokenCheck.CLAIMS),
        (lambda: token({"cpu0": cpu("unheard-of")}), TokenCheck.CLAIMS),
        (lambda: token({"cpu0": cpu(init_data=None)}), TokenCheck.LAUNCH),
        (lambda: token({"cpu0": cpu(init_data=bytes(32).hex())}), TokenCheck.LAUNCH),
        (lambda: token({"cpu0": cpu(init_data=DIGEST[:31].hex())}), TokenCheck.LAUNCH),
        (lambda: token({"cpu0": cpu(init_data=DIGEST.hex())}), TokenCheck.LAUNCH),
        (lambda: token({"cpu0": cpu(runtime_data_claims=None)}), TokenCheck.TEE_PUBKEY),
    ],
)
def test_a_token_about_another_guest_is_refused(text: Callable[[], str], check: TokenCheck) -> None:
    assert checked(refused(text())) is check


def test_a_td_is_held_against_the_whole_of_its_field() -> None:
    with guest(token({"cpu0": cpu("tdx", DIGEST.hex())})) as this:
        this.attest(Tee.TDX)
    assert checked(refused(token({"cpu0": cpu("tdx", DIGEST[:32].hex())}), Tee.TDX)) is TokenCheck.LAUNCH


def test_a_token_about_fewer_gpus_is_refused() -> None:
    devices = {f"gpu{number}": submod("nvidia", {}) for number in range(2)}
    with guest(token({"cpu0": cpu(), "switch0": submod("nvidia", {})} | devices), gpus=2) as this:
        this.attest()
    for count in (0, 1, 3):
        error = refused(token({"cpu0": cpu()} | devices), gpus=count)
        assert isinstance(error, GpuCountError)
        assert (error.expected, error.got) == (count, 2)


def test_a_simulation_counts_only_where_it_is_allowed() -> None:
    sample = token({"cpu0": cpu("sample", None)})
    assert isinstance(refused(sample, Tee.SAMPLE), SimulationRefusedError)
    with guest(sample, Trust(PINNED.token_keys, allow_simulation=True)) as this:
        assert this.attest(Tee.SAMPLE)[0].claims.simulated


def test_simulated_silicon_is_one_whatever_its_token_says() -> None:
    for allowed in (False, True):
        with serve(Components(None, token=token)) as url:
            trust = Trust(PINNED.token_keys, allow_simulation=allowed)
            attested = CdhBroker(ApiServer(url), trust, DIGEST, 0, simulated=True).attest(URI, Tee.SNP, never)
            if allowed:
                assert asyncio.run(attested)[0].claims.simulated
            else:
                with pytest.raises(SimulationRefusedError):
                    asyncio.run(attested)


def test_without_pinned_keys_the_token_only_makes_the_boot_stricter() -> None:
    unpinned = Trust((), allow_simulation=False)
    with guest(token(key=STRANGER), unpinned) as this:
        this.attest()
    assert checked(refused(token({"cpu0": cpu(init_data=None)}), trust=unpinned)) is TokenCheck.LAUNCH
    assert isinstance(refused(token({"cpu0": cpu("sample")}), Tee.SAMPLE, unpinned), SimulationRefusedError)


def test_no_token_is_asked_for_once() -> None:
    with guest(None) as this, pytest.raises(GuestApiError) as caught:
        this.attest()
    assert (caught.value.call, caught.value.problem, caught.value.status) == ("token", GuestApiProblem.FAILED, 500)
    assert this.components.asked == ["/aa/token"]


STORE = Ident("kbs:///models/store/1")


def test_credentials_are_fetched_when_they_are_opened_and_the_key_is_still_to_come() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        kept = asyncio.run(this.broker.release_credentials(verdict, STORE))
        assert this.components.asked == ["/aa/token"]
        this.components.resources = {"models/store/1": b'{"user": "guest", "secret": "correct horse"}'}
        assert open_credentials(kept, ephemeral).secret == "correct horse"
    assert this.components.asked == ["/aa/token", "/cdh/resource/models/store/1"]


@pytest.mark.parametrize("resource", [None, b"", b"x" * 4097, KEY])
def test_credentials_that_do_not_come_are_told_as_a_key_is(resource: bytes | None) -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        this.components.resources = {} if resource is None else {"models/store/1": resource}
        with pytest.raises(KeyNotDeliveredError):
            open_credentials(asyncio.run(this.broker.release_credentials(verdict, STORE)), ephemeral)


def test_what_comes_and_is_no_credentials_is_the_authoritys() -> None:
    with guest(token()) as this:
        verdict, ephemeral = this.attest()
        this.components.resources = {"models/store/1": KEY * 2}
        with pytest.raises(StoreCredentialsError) as caught:
            open_credentials(asyncio.run(this.broker.release_credentials(verdict, STORE)), ephemeral)
    assert (caught.value.problem, caught.value.exit_status) == (CredentialsProblem.FORM, 17)
