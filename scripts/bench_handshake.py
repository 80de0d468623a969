#!/usr/bin/env python3
"""What a handshake costs the guest itself, over either wire: processor time from the first message to the sealed key.

Waiting for the network costs none, and the time of the devices is taken out, so what is left is ours: TLS, messages, the
binding, the token's signature. The other side is a process of its own: our broker, or the test KBS. `bench.py` prints it.
"""

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from agent.handshake.broker import Broker
    from agent.sim.machine import SimulatedMachine

RUNS = 50


def handshake_grpc_ms(_: object, __: int) -> dict[str, float]:
    """The broker's own processor time for each handshake stands beside it."""
    from agent.handshake.grpc_client import GrpcBroker
    from agent.handshake.machine import Trust
    from agent.handshake.token import parse_token_key

    script = Path(__file__).with_name("load.py")
    with machine_in() as (folder, machine), served([str(script), "--serve", str(folder)]) as (about, pid):
        trust = Trust((parse_token_key(about["token_key"]),), True)

        def client() -> GrpcBroker:
            return GrpcBroker([f"127.0.0.1:{about['port']}"], about["ca"], "localhost", trust, 60)

        before = processor_s(pid)
        mine = asyncio.run(measured(client, machine))
        return {"handshake_grpc_ms": mine, "handshake_broker_ms": (processor_s(pid) - before) * 1000 / (RUNS + 1)}


def handshake_rcar_ms(_: object, __: int) -> dict[str, float]:
    from agent.handshake.machine import Trust
    from agent.handshake.rcar_client import RcarBroker, Site
    from agent.handshake.token import parse_token_key
    from tests.broker_site import URI

    with machine_in() as (folder, machine), served([__file__, str(folder)]) as (about, _pid):
        trust = Trust((parse_token_key(about["token_key"]),), True)
        site = Site(about["url"], about["ca"], about["name"], URI, simulated=True)
        return {"handshake_rcar_ms": asyncio.run(measured(lambda: RcarBroker(site, trust, 60), machine))}


async def measured(client: "Callable[[], Broker]", machine: "SimulatedMachine") -> float:
    """Median milliseconds of one handshake; each has its own connection, and the first, which imports, does not count."""
    from agent.evidence import CompositeEvidence, RuntimeData, Tee
    from tests.broker_site import URI, collect_of

    device_s = 0.0

    async def collect(data: RuntimeData) -> CompositeEvidence:
        nonlocal device_s
        began = time.process_time()
        evidence = collect_of(machine, Tee.SNP, data)
        device_s += time.process_time() - began
        return evidence

    async def once() -> float:
        nonlocal device_s
        device_s, began = 0.0, time.process_time()
        async with client() as broker:
            verdict, _ = await broker.attest(URI, Tee.SNP, collect)
            await broker.release_key(verdict)
        return (time.process_time() - began - device_s) * 1000

    await once()
    return statistics.median([await once() for _ in range(RUNS)])


@contextmanager
def machine_in() -> "Iterator[tuple[Path, SimulatedMachine]]":
    from agent.sim.machine import SimulatedMachine

    with tempfile.TemporaryDirectory() as name:
        yield Path(name), SimulatedMachine.create(Path(name, "machine"), gpus=1)


@contextmanager
def served(command: list[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """A server in a process of its own, and what it says of itself."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield json.loads(process.stdout.readline()), process.pid
        finally:
            process.terminate()


def processor_s(pid: int) -> float:
    """Of all its threads, those that have ended left out (a broker's do not end)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def main() -> None:
    """The test KBS, until it is asked to stop."""
    from agent.sim.machine import SimulatedMachine
    from tests.relay_site import CA, UPSTREAM_NAME, upstream
    from tests.tls import pem

    with upstream(SimulatedMachine.load(Path(sys.argv[1], "machine"))) as kbs:
        about = {"url": kbs.url, "ca": pem(CA).decode(), "name": UPSTREAM_NAME, "token_key": kbs.token_key_pem}
        print(json.dumps(about), flush=True)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
