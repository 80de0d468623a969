"""A relay on the loopback before a test KBS, simulated guests, and the real client."""

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.broker import bootstrap
from agent.broker.audit import AuditLog
from agent.broker.relay import Relay, Upstream
from agent.broker.service import BrokerServer, Tls
from agent.closed import Ident
from agent.errors import AgentError
from agent.evidence import CompositeEvidence, RuntimeData, Tee
from agent.handshake import SealedKey, TokenKind, Verdict
from agent.handshake.broker import Collect
from agent.handshake.grpc_client import GrpcBroker, InitData
from agent.handshake.machine import Trust
from agent.handshake.token import parse_token_key
from agent.keys import EphemeralKey
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee, serve
from tests.broker_site import Collector, channel_to, collect_of, in_thread
from tests.tls import certificate, key_pem, pem

KEY = bytes(range(32))
URI = Ident("kbs:///models/tiny/1")
CA = certificate("upstream CA")
UPSTREAM_NAME = "kbs.upstream.test"
LEAF = certificate(UPSTREAM_NAME, signer=CA)


@contextmanager
def upstream(machine: SimulatedMachine, uri: str = URI, key: bytes = KEY) -> Iterator[Trustee]:
    """A KBS over TLS that has the key, with Trustee's default policies."""
    with serve(tls=(pem(LEAF), key_pem(LEAF)), roots=machine.roots_dir) as kbs:
        kbs.register_resource(uri.removeprefix("kbs:///"), key)
        yield kbs


class RelaySite:
    """One relay and one guest's machine. Change a part before `running`."""

    def __init__(self, directory: Path, machine: SimulatedMachine, kbs: Trustee, tee: Tee = Tee.SNP) -> None:
        self.machine, self.kbs, self.tee = machine, kbs, tee
        self.made = bootstrap.create(directory / "broker", "localhost", datetime.now(UTC))
        self.upstream = Upstream(kbs.url, pem(CA).decode(), UPSTREAM_NAME)
        self.audit_path = directory / "audit.jsonl"
        self.reported: list[AgentError] = []
        self.retries: list[tuple[str, float]] = []
        self.unaffirmed: list[Ident] = []
        self.init_data: InitData | None = None
        self.timeout_s = 30.0
        self.trust = Trust((parse_token_key(kbs.token_key_pem),), True)
        self.collect: Collector = self._collect
        self.port = 0
        self.server: BrokerServer
        self.relay: Relay

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        directory = self.made.directory
        audit = AuditLog(self.audit_path)
        self.relay = Relay(self.upstream, audit, now=lambda: datetime.now(UTC), report=self.reported.append)
        self.server = BrokerServer(self.relay, self.reported.append, time.monotonic)
        tls = Tls((directory / "tls.pem").read_bytes(), (directory / "tls.key").read_bytes())
        self.port = await self.server.start("127.0.0.1:0", tls)
        try:
            yield
        finally:
            await self.server.drain(0.0)
            audit.close()

    def channel(self) -> Any:
        return channel_to(self.port, self.made.ca_pem)

    def _collect(self, data: RuntimeData) -> CompositeEvidence:
        return collect_of(self.machine, self.tee, data)

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_path.read_bytes().splitlines()]

    def client(self) -> GrpcBroker:
        def on_retry(error: AgentError, _: int, wait_s: float) -> None:
            self.retries.append((str(error), wait_s))

        return GrpcBroker(
            [f"127.0.0.1:{self.port}"],
            self.made.ca_pem,
            self.made.server_name,
            self.trust,
            self.timeout_s,
            on_retry,
            TokenKind.TRUSTEE,
            self.unaffirmed.append,
            self.init_data,
            simulated=True,
        )

    async def attest(self) -> tuple[Verdict, EphemeralKey]:
        async with self.client() as broker:
            return await broker.attest(URI, self.tee, self.guest())

    async def boot(self, between: Callable[[], None] = lambda: None) -> tuple[Verdict, EphemeralKey, SealedKey]:
        """Attestation and key release by the real client."""
        async with self.client() as broker:
            verdict, key = await broker.attest(URI, self.tee, self.guest())
            between()
            return verdict, key, await broker.release_key(verdict)

    def guest(self) -> Collect:
        return in_thread(self.collect)
