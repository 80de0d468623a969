"""A container in a CoCo guest before the test KBS: over Trustee's wire itself, and by its guest's own components."""

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import AgentError
from agent.evidence import CompositeEvidence, RuntimeData, Tee, binding
from agent.handshake import SealedKey, Verdict
from agent.handshake.machine import Trust
from agent.handshake.rcar_client import RcarBroker, Site
from agent.handshake.token import parse_token_key
from agent.keys import EphemeralKey, open_jwe
from agent.sim.trustee import Trustee, serve
from tests.hostile_broker import CA, LEAF, NAME
from tests.test_rcar_with_trustee import CLAIMS
from tests.tls import key_pem, pem
from tests.world import KEY, KEY_URI, World, ask

URI = Ident(KEY_URI)
PATH = KEY_URI.removeprefix("kbs:///")


class GuestComponents(Mapping[str, bytes]):
    """The attestation-agent and the confidential-data-hub of a guest, made of our own client of Trustee."""

    def __init__(self, world: World, kbs: Trustee) -> None:
        self.machine, self.tee = world.machine, world.row_tee
        self.site = Site(kbs.url, pem(CA).decode(), NAME, KEY_URI, simulated=True)
        self.trust = Trust((parse_token_key(kbs.token_key_pem),), allow_simulation=True)

    async def collect(self, data: RuntimeData) -> CompositeEvidence:
        text = binding.additional_evidence(self.machine.gpu_system().collect(binding.device_nonce(data)), CLAIMS)
        return CompositeEvidence(self.machine.attester(self.tee).collect(binding.report_data(data, text)), text)

    async def ask(self, *, for_key: bool) -> tuple[Verdict, EphemeralKey, SealedKey | None]:
        async with RcarBroker(self.site, self.trust, 20) as broker:
            verdict, key = await broker.attest(URI, self.tee, self.collect)
            return verdict, key, await broker.release_key(verdict) if for_key else None

    def token(self) -> str:
        return asyncio.run(self.ask(for_key=False))[0].token

    def __getitem__(self, path: str) -> bytes:
        try:
            _, key, sealed = asyncio.run(self.ask(for_key=True))
        except AgentError:
            raise KeyError(path) from None
        assert sealed is not None
        opened = bytearray(32)
        open_jwe(sealed.jwe, key, memoryview(opened))
        return bytes(opened)

    def __iter__(self) -> Iterator[str]:
        return iter((PATH,))

    def __len__(self) -> int:
        return 1


@pytest.fixture(params=[Tee.SNP, Tee.TDX])
def world(tmp_path: Path, silicon: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo, tee=request.param)


@pytest.fixture
def kbs(world: World) -> Iterator[Trustee]:
    with serve(roots=world.machine.roots_dir, tls=(pem(LEAF), key_pem(LEAF))) as kbs:
        kbs.register_resource(PATH, KEY)
        kbs.set_resource_policy("allow_all")
        yield kbs


def check_served(world: World, *, status: int = 0) -> None:
    agent = world.start(broker=False)
    agent.wait_for("server_ready")
    assert ask(world.port, "/about")["sha256"] == hashlib.sha256(world.model["model.gguf"]).hexdigest()
    assert agent.stop().status == status


def test_evidence_of_the_attestation_agent_goes_over_our_own_wire_to_trustee(world: World, kbs: Trustee) -> None:
    world.through_coco()
    world.broker_config = {
        "url": kbs.url,
        "server_name": NAME,
        "ca_pem": pem(CA).decode(),
        "token_keys": [kbs.token_key_pem],
        "key_uri": KEY_URI,
        "allow_simulated": True,
    }
    check_served(world)
    assert [entry.status for entry in kbs.log] == [200, 200, 200]


def through_components(world: World, kbs: Trustee) -> None:
    components, guest = world.key_from_cdh(), GuestComponents(world, kbs)
    components.token, components.resources = guest.token, guest
    world.broker_config["token_keys"] = [kbs.token_key_pem]


def test_the_guests_components_attest_and_fetch_the_key(world: World, kbs: Trustee) -> None:
    through_components(world, kbs)
    check_served(world)
    assert [entry.path.split("/")[3] for entry in kbs.log] == ["auth", "attest", "auth", "attest", "resource"]


def test_a_denial_by_policy_shows_as_no_key_and_as_what_the_token_does_not_affirm(world: World, kbs: Trustee) -> None:
    through_components(world, kbs)
    kbs.set_resource_policy("affirming")
    outcome = world.start(broker=False).wait()
    assert outcome.status == 17
    assert outcome.failure["class"] == "KeyNotDeliveredError"
    findings = [event["finding"] for event in outcome.events if event["event"] == "not_affirmed"]
    assert any(finding.startswith("cpu0:executables") for finding in findings), findings


def test_a_refused_attestation_shows_as_no_token(world: World, kbs: Trustee) -> None:
    through_components(world, kbs)
    world.machine.flip_signature_bit = True
    outcome = world.start(broker=False).wait()
    assert (outcome.status, outcome.failure["fields"]["call"]) == (11, "token")
    assert "gate_passed" not in outcome.names()
