"""The desk of an authority: a nonce for each Hello, drawn anew, which only the Attestation over it is judged by."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.broker.audit import AuditStep
from agent.broker.desk import CHALLENGE_LIFE_S, VERIFIER_THREADS, AuthorityDesk
from agent.closed import Ident
from agent.evidence import RuntimeData, Tee
from agent.handshake import Accepted, Attestation, Denied, Hello, KeyRequest, TokenKind
from agent.keys import EphemeralKey
from agent.sim.machine import SimulatedMachine
from tests.broker_site import URI, Clock, Site

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
            await desk.record_failure(AuditStep.ATTEST, HELLO, Ident("STREAM_TIMEOUT"))
            desk.close()

    asyncio.run(scene())
    assert [line["decision"] for line in site.audit()] == ["denied", "allowed", "allowed", "failed"]


class BusyVerifiers(Clock):
    """Whatever a verifier does takes until `let_go`."""

    let_go = threading.Event()

    def __getattribute__(self, name: str) -> Any:
        if name == "now" and threading.current_thread().name.startswith("verifier"):
            assert self.let_go.wait(30)
        return super().__getattribute__(name)


def test_who_has_a_verdict_gets_its_key_while_others_wait_for_theirs(tmp_path: Path, machine: SimulatedMachine) -> None:
    site, public = Site(tmp_path / "broker", machine), EphemeralKey.generate().public

    async def scene() -> None:
        async with site.running() as authority:
            desk = AuthorityDesk(authority)
            opened = await desk.open(HELLO)
            evidence = site.collect(RuntimeData(opened.challenge.nonce, public.x, public.y))
            attestation = Attestation(HELLO.request_id, public, evidence)
            accepted = await opened.attest(attestation)
            assert isinstance(accepted, Accepted)
            site.clock = busy = BusyVerifiers()
            waiting = [asyncio.ensure_future(opened.attest(attestation)) for _ in range(VERIFIER_THREADS + 1)]
            try:
                async with asyncio.timeout(20):
                    key = await desk.release(KeyRequest(HELLO.request_id, accepted.token, URI))
                    await desk.record_failure(AuditStep.ATTEST, HELLO, Ident("STREAM_TIMEOUT"))
                assert key.key_version == 1 and not any(each.done() for each in waiting)
            finally:
                busy.let_go.set()
            await asyncio.gather(*waiting)
            desk.close()

    asyncio.run(scene())
    assert [line["step"] for line in site.audit()][:3] == ["attest", "release", "attest"]
