#!/usr/bin/env python3
"""Many simulated guests at one broker process at the same time: none may be lost, none may get anything else than its key.

`scripts/load --guests 1000` starts a broker, and processes with guests, which all begin at once. Each guest is the real client
over a TLS connection of its own: attestation with fresh evidence (SNP report, one GPU), key release, and the key opened and
compared; the guests ask for two different keys by turns. Ends with status 1 when one was lost or wrong.

    lost            handshakes that did not end with a key
    wrong           keys that are not the guest's
    rate_per_s      guests : seconds from the start to the last key
    p50_ms, p99_ms  of one handshake, its retries included, without the time that its devices took
    retries         attempts that the broker sent away for later, which is how it says that it has enough to do
    broker_cpu_ms   processor time of the broker for each handshake

Guests and broker share the machine's cores, so the rate is what this machine does with both. All guests come from one
address, for which the broker's limit of open calls is lifted; every other limit is the broker's own.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.errors import AgentError
from agent.evidence import CompositeEvidence, RuntimeData, Tee
from agent.handshake.grpc_client import GrpcBroker
from agent.handshake.machine import Trust
from agent.handshake.token import parse_token_key
from agent.keys import open_jwe
from agent.sim.machine import SimulatedMachine
from tests.broker_site import KEY, OTHER_KEY, OTHER_URI, URI, Site, collect_of

TIMEOUT_S = 300
KEYS = {URI: KEY, OTHER_URI: OTHER_KEY}


@dataclass(frozen=True)
class Guest:
    """What became of one: milliseconds of its handshake, or the class of its error."""

    ms: float
    retries: int
    lost: str | None
    wrong: bool


async def one_guest(number: int, broker: GrpcBroker, machine: SimulatedMachine, retries: list[None]) -> Guest:
    uri = (URI, OTHER_URI)[number % 2]
    device_s = 0.0

    async def collect(data: RuntimeData) -> CompositeEvidence:
        nonlocal device_s
        began = time.perf_counter()
        evidence = collect_of(machine, Tee.SNP, data)  # on the loop: this process has a core of its own and nothing else to do
        device_s += time.perf_counter() - began
        return evidence

    began = time.perf_counter()
    wrong, lost = False, None
    try:
        async with broker:
            verdict, key = await broker.attest(uri, Tee.SNP, collect)
            sealed = await broker.release_key(verdict)
        opened = bytearray(32)
        open_jwe(sealed.jwe, key, memoryview(opened))
        wrong = bytes(opened) != KEYS[uri] or verdict.claims.key_uri != uri or sealed.key_id != uri
    except AgentError as error:
        lost = type(error).__name__
    return Guest((time.perf_counter() - began - device_s) * 1000, len(retries), lost, wrong)


async def guests(site: dict[str, str], numbers: range) -> list[Guest]:
    machine = SimulatedMachine.load(Path(site["machine"]))
    trust = Trust((parse_token_key(site["token_key"]),), True)
    clients = []
    for number in numbers:
        retries: list[None] = []
        client = GrpcBroker(
            [site["address"]], site["ca"], "localhost", trust, TIMEOUT_S, lambda *_, told=retries: told.append(None)
        )
        clients.append(one_guest(number, client, machine, retries))
    await asyncio.sleep(max(0.0, float(site["start_at"]) - time.time()))
    return await asyncio.gather(*clients)


async def serve(folder: Path) -> None:
    """The broker, until it is asked to stop."""
    site = Site(folder / "broker", SimulatedMachine.load(folder / "machine"))
    site.limits = replace(site.limits, open_calls_of_host=site.limits.open_calls)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with site.running():
        about = {"port": site.port, "ca": site.made.ca_pem, "token_key": site.made.token_key_pem}
        print(json.dumps(about), flush=True)
        await stop.wait()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(count: int, processes: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = SimulatedMachine.create(folder / "machine", gpus=1)
        command = [sys.executable, __file__]
        environment = os.environ | {"GRPC_VERBOSITY": "NONE"}
        with subprocess.Popen([*command, "--serve", name], stdout=subprocess.PIPE, text=True, env=environment) as broker:
            try:
                assert broker.stdout
                about = json.loads(broker.stdout.readline())
                site = {
                    "address": f"127.0.0.1:{about['port']}",
                    "ca": about["ca"],
                    "token_key": about["token_key"],
                    "machine": str(machine.directory),
                    "start_at": str(start_at := time.time() + 3),
                }
                before = cpu_s(broker.pid)
                share = [range(index, count, processes) for index in range(processes)]
                arguments = [json.dumps({"site": site, "numbers": [part.start, part.stop, part.step]}) for part in share]
                running = [
                    subprocess.Popen([*command, "--guest-process", text], stdout=subprocess.PIPE, text=True, env=environment)
                    for text in arguments
                ]
                outputs = [process.communicate()[0] for process in running]
                seconds = time.time() - start_at
                broker_s = cpu_s(broker.pid) - before
            finally:
                broker.terminate()
        done = [Guest(**guest) for output in outputs for guest in json.loads(output)]
        audit = [json.loads(line) for line in (folder / "broker" / "audit.jsonl").read_text().splitlines()]
    assert len(done) == count
    released = {line["request_id"] for line in audit if (line["step"], line["decision"]) == ("release", "allowed")}
    took = sorted(guest.ms for guest in done)
    return {
        "guests": count,
        "lost": sum(guest.lost is not None for guest in done),
        "lost_as": sorted({guest.lost for guest in done if guest.lost}),
        "wrong": sum(guest.wrong for guest in done) + abs(count - len(released)),
        "seconds": round(seconds, 2),
        "rate_per_s": round(count / seconds, 1),
        "p50_ms": round(statistics.median(took)),
        "p99_ms": round(took[min(len(took) - 1, len(took) * 99 // 100)]),
        "retries": sum(guest.retries for guest in done),
        "broker_cpu_ms": round(broker_s * 1000 / count, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/load", description=__doc__.partition("\n")[0])
    parser.add_argument("--guests", type=int, default=1000, help="default 1000")
    parser.add_argument("--processes", type=int, default=2, help="that the guests are spread over; default 2")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line, and nothing else")
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--guest-process", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(Path(arguments.serve)))
        return 0
    if arguments.guest_process:
        asked = json.loads(arguments.guest_process)
        done = asyncio.run(guests(asked["site"], range(*asked["numbers"])))
        print(json.dumps([{"ms": each.ms, "retries": each.retries, "lost": each.lost, "wrong": each.wrong} for each in done]))
        return 0
    result = load(arguments.guests, arguments.processes)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:14} {value}")
    return 1 if result["lost"] or result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
