"""A broker on the loopback with everything it needs, simulated guests, and the real client."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from agent.broker import bootstrap
from agent.broker.anchors import TrustAnchors, load_simulation_roots
from agent.broker.audit import AuditLog
from agent.broker.authority import Authority
from agent.broker.keystore import DirectoryKeyStore, KeyStore
from agent.broker.policy import parse_policy
from agent.broker.service import BrokerServer, Limits, Tls
from agent.broker.token import TokenKey
from agent.closed import Ident
from agent.errors import AgentError
from agent.evidence import NO_REPORT_DATA, CompositeEvidence, RuntimeData, Tee
from agent.evidence.collect import check_measured, open_devices
from agent.evidence.gate import ExpectedReady
from agent.handshake import SealedKey, Verdict
from agent.handshake.broker import Collect
from agent.handshake.grpc_client import GrpcBroker
from agent.handshake.machine import Trust
from agent.handshake.token import parse_token_key
from agent.keys import EphemeralKey
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_td_report
from tests.gpus import gpu_system_of

URI, OTHER_URI = Ident("kbs:///models/tiny/1"), Ident("kbs:///models/tiny/2")
KEY, OTHER_KEY = b"\x11" * 32, b"\x22" * 32
Collector = Callable[[RuntimeData], CompositeEvidence]
MANIFEST, COMMAND = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def tdx_policy_for(machine: SimulatedMachine, **changes: str) -> bytes:
    """The same for the machine as a TDX guest."""
    td = make_td_report(machine, NO_REPORT_DATA).body
    section = {
        "tdx__mr_td": f'[{{ id = "firmware-1", value = "{td.mr_td.hex()}" }}]',
        "tdx__mr_config_id": f'[{{ id = "config-1", value = "{td.mr_config_id.hex()}" }}]',
        "tdx__rtmr_1": f'[{{ id = "loader-1", value = "{td.rtmr_1.hex()}" }}]',
        "tdx__rtmr_2": f'[{{ id = "kernel-1", value = "{td.rtmr_2.hex()}" }}]',
        "tdx__minimum_tee_tcb_svn": f'{{ id = "module-1", value = "{td.tee_tcb_svn.hex()}" }}',
        "tdx__tcb": '["not_evaluated"]',
    }
    lines = policy_for(machine, **(section | changes)).decode().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("snp.")).encode()


def policy_for(machine: SimulatedMachine, version: str = "1", **changes: str) -> bytes:
    """A policy with a row for each of the two keys that allows this machine; `changes` are TOML, `__` stands for a dot."""
    tcb = machine.tcb
    fields = {
        "release_channel": '"test"',
        "min_model_version": "3",
        "lease_s": "3600",
        "revoked": "false",
        "not_after": "2099-01-01T00:00:00Z",
        "manifest_digests": f'[{{ id = "model-1", value = "{MANIFEST}" }}]',
        "server_command_digests": f'[{{ id = "argv-1", value = "{COMMAND}" }}]',
        "snp.measurements": f'[{{ id = "image-1", value = "{machine.measurement.hex()}" }}]',
        "snp.host_data": f'[{{ id = "config-1", value = "{machine.host_data.hex()}" }}]',
        "snp.minimum_tcb": f'[{{ id = "tcb-1", product = "Genoa", bootloader = {tcb.bootloader}, tee = {tcb.tee}, '
        f"snp = {tcb.snp}, microcode = {tcb.microcode} }}]",
        "snp.debug": "false",
        "snp.vmpl": "0",
        "gpu.count": str(machine.gpu.count),
        "gpu.driver_versions": f'[{{ id = "driver-1", value = "{machine.gpu.driver_version}" }}]',
        "gpu.vbios_versions": f'[{{ id = "vbios-1", value = "{machine.gpu.vbios_version}" }}]',
        "gpu.switch_vbios_versions": f'[{{ id = "switch-1", value = "{machine.gpu.switch_vbios_version}" }}]',
        "gpu.modes": '["ppcie"]' if machine.gpu.switches else '["cc"]',
        "gpu.ready": "false",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    row = "\n".join(f"{name} = {value}" for name, value in fields.items())
    rows = "\n".join(f'[[row]]\nkey_uri = "{uri}"\n{row}' for uri in (URI, OTHER_URI))
    return f'schema = "keyturn-policy/v1"\nversion = "{version}"\n{rows}\n'.encode()


@dataclass
class Clock:
    """The broker's two clocks; `advance` moves both."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    monotonic: float = 0.0

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.monotonic += seconds


class Site:
    """One broker's files and parts. Change a part before `running`."""

    def __init__(self, directory: Path, machine: SimulatedMachine, tee: Tee = Tee.SNP) -> None:
        self.machine = machine
        self.tee = tee
        self.clock = Clock()
        self.made = bootstrap.create(directory, "localhost", datetime.now(UTC))
        for uri, key in ((URI, KEY), (OTHER_URI, OTHER_KEY)):
            path = directory / "keys" / uri.removeprefix("kbs:///")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(key)
        self.anchors = TrustAnchors(load_simulation_roots(machine.roots_dir))
        self.keys: KeyStore = DirectoryKeyStore(directory / "keys")
        self.audit_path = directory / "audit.jsonl"
        self.policy = policy_for(machine) if tee is Tee.SNP else tdx_policy_for(machine)
        self.limits = Limits()
        self.reported: list[AgentError] = []
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Authority]:
        """The broker, listening; yields its authority."""
        directory = self.made.directory
        authority = Authority(
            parse_policy(self.policy),
            self.anchors,
            TokenKey((directory / "token.key").read_bytes()),
            self.keys,
            AuditLog(self.audit_path),
            now=lambda: self.clock.now,
        )
        server = BrokerServer(authority, self.reported.append, lambda: self.clock.monotonic, self.limits)
        tls = Tls((directory / "tls.pem").read_bytes(), (directory / "tls.key").read_bytes())
        self.port = await server.start("127.0.0.1:0", tls)
        try:
            yield authority
        finally:
            await server.drain(0.0)

    def audit(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.audit_path.read_bytes().splitlines()]

    def client(self) -> GrpcBroker:
        trust = Trust((parse_token_key(self.made.token_key_pem),), True)
        return GrpcBroker([f"127.0.0.1:{self.port}"], self.made.ca_pem, self.made.server_name, trust, timeout_s=30)

    def channel(self) -> Any:  # the stubs want serialisers, which a wire of bytes has not
        credentials = grpc.ssl_channel_credentials(self.made.ca_pem.encode())
        options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]  # its own connection
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options)

    def collect(self, data: RuntimeData) -> CompositeEvidence:
        """What the agent of this site's machine would send."""
        machine = self.machine
        devices = open_devices(
            check_measured(machine.attester(self.tee), machine.host_data),
            gpu_system_of(machine) if machine.gpu.count else None,
            machine.runtime(self.tee),
            gpu_count=machine.gpu.count,
            switch_count=machine.gpu.switches,
            expected_ready=ExpectedReady.UNSET,
            manifest_digest=MANIFEST,
            server_command_digest=COMMAND,
        )
        return devices.collect(data)

    async def attest(self, key_uri: Ident = URI, collect: Collector | None = None) -> tuple[Verdict, EphemeralKey]:
        """One attestation by the real client."""
        async with self.client() as broker:
            return await broker.attest(key_uri, self.tee, in_thread(collect or self.collect))

    async def boot(self) -> tuple[Verdict, EphemeralKey, SealedKey]:
        """Attestation and key release by the real client."""
        async with self.client() as broker:
            verdict, key = await broker.attest(URI, self.tee, in_thread(self.collect))
            return verdict, key, await broker.release_key(verdict)


def in_thread(collect: Collector) -> Collect:
    return lambda data: asyncio.to_thread(collect, data)
