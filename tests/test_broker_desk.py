"""The desk of an authority: a nonce for each Hello, drawn anew, which only the Attestation over it is judged by."""

import asyncio
from dataclasses import replace
from pathlib import Path

from agent.broker.desk import CHALLENGE_LIFE_S, AuthorityDesk
from agent.closed import Ident
from agent.evidence import RuntimeData, Tee
from agent.handshake import Accepted, Attestation, Denied, Hello, KeyRequest, TokenKind
from agent.keys import EphemeralKey
from agent.sim.machine import SimulatedMachine
from tests.broker_site import URI, Site

HELLO = Hello(Ident("boot-1"), URI, Tee.SNP)


def test_every_hello_gets_a_nonce_of_its_own_and_evidence_over_another_is_denied(
    tmp_path: Path, machine: SimulatedMachine
) -> None:
    site, public = Site(tmp_path / "broker", machine), EphemeralKey.generate().public

    async def scene() -> None:
        async with site.running() as authority:
            desk = AuthorityDesk(authority)
            first, second = await desk.open(HELLO), await desk.open(replace(HELLO, request_id=Ident("boot-2")))
            assert desk.tokens is TokenKind.KEYTURN
            assert (first.challenge.request_id, second.challenge.request_id) == ("boot-1", "boot-2")
            assert first.challenge.expires_in_s == CHALLENGE_LIFE_S
            assert first.challenge.nonce != second.challenge.nonce
            evidence = site.collect(RuntimeData(first.challenge.nonce, public.x, public.y))
            attestation = Attestation(Ident("boot-1"), public, evidence)
            denied, accepted = await second.attest(attestation), await first.attest(attestation)
            assert isinstance(denied, Denied) and denied.claim == "snp.report-data"
            assert isinstance(accepted, Accepted) and accepted.session == b""
            key = await desk.release(KeyRequest(Ident("boot-1"), accepted.token, URI))
            assert key.key_version == 1
            await desk.record_failure(HELLO, Ident("STREAM_TIMEOUT"))
            desk.close()

    asyncio.run(scene())
    assert [line["decision"] for line in site.audit()] == ["denied", "allowed", "allowed", "failed"]
