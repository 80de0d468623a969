#!/usr/bin/env python3
"""Figures we watch. `scripts/bench` runs all of them; `--only NAME` some; `--json` ends with one JSON object on one line.

    decrypt_vs_copy        load from the page cache into a fresh destination : a copy of the plaintext, same threads, same
                           source code, same destination, pages made in both. Aim >= 0.9
    decrypt_vs_tink        the same load : Tink for Python on the same file, into memory of the same kind. Aim >= 10
    decrypt_vs_kserve      the same : a whole JWE opened by jwcrypto, as KServe does. Aim >= 40
    decrypt_vs_age         the same : age of Debian. Aim >= 5
    fetch_vs_readinto      fetch and open from nginx on the loopback : the same client, sockets and buffers without opening.
                           Aim >= 0.8
    fetch_vs_readinto_tls  the same over TLS. Aim >= 0.9
    handshake_grpc_ms      processor time of the guest for one handshake, devices taken out. Aim < 10; the broker's beside it
    handshake_rcar_ms      the same over Trustee's wire. Aim < 15
    rss_over_model_mib     what a process that fetches and opens a model holds beside it, for 16 and 256 MiB. Aim <= 64, equal
    overlap_vs_longest     a 3 s handshake beside a store of 100 MB/s : the longer of the two. Aim <= 1.1
    overlap_vs_longest_jwe the same of a file of KServe's. Aim <= 1.1
    seal_vs_decrypt        rate of sealing : rate of opening. Aim >= 0.7
    worker_rss_mib         anonymous and file pages of the worker in a whole boot over HTTP, at their peak. Aim <= 96
    supervisor_rss_mib     resident memory of the supervisor while it serves. Aim <= 20
    cold_start_ms          process start to first byte at the broker. Aim <= 400
    collect_snp_gpu_ms     evidence of one SNP report and one GPU through the emulated kernel and driver, emulation included;
                           without the 2 s between two reports. Aim < 30
    verify_snp_ms          processor time of one report and its chain, as the broker verifies it. Aim < 10; likewise
    verify_tdx_ms, verify_gpu_ms
    collect_ppcie_ms       evidence of eight GPUs and four NVSwitches through emulated drivers, emulation included;
    verify_ppcie_ms        processor time of the whole set, as the broker verifies it

A shared machine is noisy: whatever is compared alternates within one run, and of each side the best time counts.
"""

import argparse
import hashlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_artifact as artifact
import bench_evidence as evidence
import bench_peers as peers
from bench_artifact import MODEL_BYTES, SAMPLE_S, Model, make_model
from bench_handshake import handshake_grpc_ms, handshake_rcar_ms

if TYPE_CHECKING:
    from tests.world import World


def rss_over_model_mib(model: Model, __: int) -> dict[str, float]:
    """Of a process that does nothing else: a fresh interpreter that fetches over HTTP and opens. Its model is not counted."""
    from agent.demo.layout_server import serve

    peaks = {}
    for mib in (16, 256):
        with tempfile.TemporaryDirectory() as folder:
            small = model if mib << 20 == MODEL_BYTES else make_model(Path(folder), mib << 20)
            with serve(small.layout) as url:
                command = [sys.executable, str(Path(artifact.__file__)), url.rstrip("/"), small.digest]
                with subprocess.Popen(command) as process:
                    peaks[mib] = peak_kib(process.pid) / 1024
                assert process.returncode == 0
    return {"rss_over_model_mib": max(peaks.values())} | {f"rss_over_{mib}_mib_model": peak for mib, peak in peaks.items()}


def peak_kib(pid: int) -> int:
    """The most anonymous and file pages a process had. Sampled: the kernel's own high-water mark counts the destination too."""
    status, peak = Path(f"/proc/{pid}/status"), 0
    with suppress(FileNotFoundError, KeyError):  # it has gone, or is a zombie
        while True:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak = max(peak, sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")))
            time.sleep(SAMPLE_S)
    return peak


def worker_rss_mib(_: Model, __: int) -> dict[str, float]:
    """Of the worker in a whole boot, gRPC and simulated devices included."""
    from agent.demo.layout_server import serve

    with world(MODEL_BYTES) as here, serve(here.layout) as url:
        here.artifact["source"] = url
        agent = here.start()
        agent.wait_for("boot_started")
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        while not (worker := children.read_text().split()):
            time.sleep(SAMPLE_S)
        peak = peak_kib(int(worker[0]))
        agent.wait_for("server_ready")
        agent.stop()
    return {"worker_rss_mib": peak / 1024}


@contextmanager
def world(model_bytes: int = 1 << 20) -> Iterator["World"]:
    """Silicon, broker and a sealed model for boots of the real agent."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from agent.sim.machine import create_silicon
    from tests.world import World

    with tempfile.TemporaryDirectory() as folder, ExitStack() as undo:
        create_silicon(Path(folder, "silicon"), gpus=1)
        Path(folder, "world").mkdir()
        yield World(Path(folder, "world"), Path(folder, "silicon"), undo, model_bytes=model_bytes)


def supervisor_rss_mib(_: Model, __: int) -> dict[str, float]:
    """Of a supervisor that serves, worker and probe gone."""
    with world() as here:
        agent = here.start()
        agent.wait_for("server_ready")
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        agent.stop()
    return {"supervisor_rss_mib": int(dict(line.split(":", 1) for line in status.splitlines())["VmRSS"].split()[0]) / 1024}


def cold_start_ms(__: Model, repeat: int) -> dict[str, float]:
    """From the start of the process to the first byte that reaches the broker's port; configuration and machine are there."""
    times = []
    with world() as here, socket.create_server(("127.0.0.1", 0)) as broker:
        broker.settimeout(30)
        here.broker_config["endpoints"] = [f"127.0.0.1:{broker.getsockname()[1]}"]
        config = here.write_config()
        here.machine.host_data = hashlib.sha256(config.read_bytes()).digest()
        here.machine.save()
        command = [sys.executable, "-m", "agent", "run", "--config", str(config), "--status-file", ""]
        for _ in range(repeat + 1):
            began = time.perf_counter()
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as agent:
                try:
                    guest, _ = broker.accept()
                    guest.recv(1)
                    times.append((time.perf_counter() - began) * 1000)
                finally:
                    agent.kill()
            # The killed agent's retries may still stand in the queue.
            guest.close()
            broker.settimeout(0.2)
            with suppress(TimeoutError):
                while True:
                    broker.accept()[0].close()
            broker.settimeout(30)
    return {"cold_start_ms": statistics.median(times[1:])}


FIGURES: dict[str, Callable[[Model, int], dict[str, float]]] = {
    figure.__name__: figure
    for figure in (
        artifact.decrypt_vs_copy,
        peers.decrypt_vs_tink,
        peers.decrypt_vs_kserve,
        peers.decrypt_vs_age,
        artifact.fetch_vs_readinto,
        artifact.fetch_vs_readinto_tls,
        rss_over_model_mib,
        artifact.overlap_vs_longest,
        artifact.overlap_vs_longest_jwe,
        artifact.seal_vs_decrypt,
        worker_rss_mib,
        supervisor_rss_mib,
        cold_start_ms,
        handshake_grpc_ms,
        handshake_rcar_ms,
        evidence.collect_snp_gpu_ms,
        evidence.verify_ms,
        evidence.ppcie_ms,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="measure the figures we watch")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on one line")
    parser.add_argument("--only", action="append", choices=[*FIGURES], help="one figure; may be repeated")
    parser.add_argument("--repeat", type=int, default=9, help="pairs to take the median of (default 9)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for name in arguments.only or FIGURES:
            found = FIGURES[name](model, arguments.repeat)
            for figure, value in found.items():
                print(f"{figure:30} {value:10.2f}", flush=True)
            results |= {figure: round(value, 3) for figure, value in found.items()}
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
