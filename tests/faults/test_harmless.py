"""What a relay or a second replica may do and a boot serves all the same."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.errors import KeyUnwrapError
from agent.handshake import grpc_wire as wire
from agent.handshake.pb import kbs_pb2 as pb
from agent.keys import open_jwe
from tests.faults.broker import good_broker
from tests.faults.canaries import PEER_TEXT
from tests.faults.evil_relay import RELAY_PAIR, Change, relayed
from tests.faults.table import ATTESTED, RELEASED, SERVED, FaultWorld
from tests.hostile_broker import Relay
from tests.world import Outcome, ask

UNKNOWN_FIELD = b"\x9a\x06\x03new"


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[FaultWorld]:
    with ExitStack() as undo:
        yield FaultWorld(tmp_path, silicon, undo)


def served(world: FaultWorld, change: Change) -> tuple[Relay, Outcome]:
    """A boot behind this relay, which serves the weights that were sealed, and stops on request."""
    relay = relayed(world, change)
    agent = world.start()
    agent.wait_for("server_ready")
    (weights,) = world.model.values()
    assert ask(world.port, "/about")["sha256"] == hashlib.sha256(weights).hexdigest()
    outcome = agent.stop()
    assert outcome.status == 0
    return relay, outcome


def test_a_relay_that_changes_nothing_is_not_noticed(world: FaultWorld) -> None:
    served(world, lambda *_: None)
    assert world.audit() == SERVED


def test_whatever_is_not_signed_changes_nothing_and_is_not_repeated(world: FaultWorld) -> None:
    def change(_: FaultWorld, relay: Relay) -> None:
        def on_answer(answer: pb.AttestResponse) -> None:
            if answer.HasField("challenge"):
                answer.challenge.expires_in_s = 180
            else:
                answer.verdict.accepted.policy_version = f"{PEER_TEXT} !"
                answer.verdict.accepted.reference_value_ids[:] = [f"{PEER_TEXT} !"] * 64
            answer.MergeFromString(UNKNOWN_FIELD)

        def on_key(key: pb.ReleaseKeyResponse) -> None:
            key.key_id, key.key_version = "kbs:///models/other/9", 99
            key.MergeFromString(UNKNOWN_FIELD)

        relay.on_answer, relay.on_key = on_answer, on_key

    _, outcome = served(world, change)
    accepted = next(event for event in outcome.events if event["event"] == "verdict_accepted")
    assert accepted["policy_version"] == "7"
    assert world.canaries.found_in(json.dumps(outcome.events).encode()) == set()


def test_a_relay_that_asks_for_the_key_with_the_guests_token_gets_what_it_cannot_open(world: FaultWorld) -> None:
    stolen: list[bytes] = []

    def change(_: FaultWorld, relay: Relay) -> None:
        async def on_key_request(request: pb.ReleaseKeyRequest) -> None:
            async with relay.channel() as channel:
                answer = await channel.unary_unary(wire.RELEASE_KEY_METHOD)(request.SerializeToString())
            stolen.append(pb.ReleaseKeyResponse.FromString(answer).jwe)

        relay.on_key_request = on_key_request

    served(world, change)
    assert world.audit() == [ATTESTED, RELEASED, RELEASED]
    with pytest.raises(KeyUnwrapError):
        open_jwe(stolen[0], RELAY_PAIR, memoryview(bytearray(32)))


def test_a_replica_with_the_same_token_key_may_answer_the_second_half(world: FaultWorld) -> None:
    def change(world: FaultWorld, relay: Relay) -> None:
        relay.releases = good_broker(world).release

    served(world, change)
    assert world.audit() == [ATTESTED]
