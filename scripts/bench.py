#!/usr/bin/env python3
"""Figures we watch. `scripts/bench` runs all of them; `--only NAME` some; `--json` ends with one JSON object on one line.

    decrypt_vs_copy      load from the page cache into a fresh destination : a copy of the plaintext, same threads, same
                         source code, same destination, pages made in both. Aim >= 0.75
    decrypt_vs_tink      the same load : Tink for Python on the same file, into memory of the same kind. Aim >= 5
    rss_over_model_mib   anonymous and file pages of the worker in a whole boot over HTTP, at their peak. Aim <= 96
    supervisor_rss_mib   resident memory of the supervisor while it serves. Aim <= 20
    cold_start_ms        process start to first byte at the broker. Aim <= 400
    collect_snp_gpu_ms   evidence of one SNP report and one GPU through the emulated kernel and driver, emulation included;
                         without the 2 s between two reports. Aim < 30
    verify_snp_ms        processor time of one report and its chain, as the broker verifies it. Aim < 10; likewise
    verify_tdx_ms, verify_gpu_ms
    collect_ppcie_ms     evidence of eight GPUs and four NVSwitches through emulated drivers, emulation included;
    verify_ppcie_ms      processor time of the whole set, as the broker verifies it

A shared machine is noisy: whatever is compared alternates within one run, and a ratio is the median of pairs.
"""

import argparse
import asyncio
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.artifact.load import OPEN_THREADS, load, prepare
from agent.artifact.manifest import parse_config, parse_manifest
from agent.artifact.memory import choose_destination
from agent.artifact.sources import BlobSource, open_source
from agent.artifact.stream import SEGMENT_BYTES, associated_data
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.guest.memory_info import MACHINE
from agent.keys import ReleasedKey, SecretBuffer

if TYPE_CHECKING:
    from agent.sim.machine import SimulatedMachine
    from tests.world import World

KEY = bytes(range(32))
KEY_URI = "kbs:///models/bench/1"
MODEL_BYTES = 256 << 20
COPY_RUN_BYTES = 8 * SEGMENT_BYTES
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Model:
    """A sealed model and, in the same layout, its plaintext as a blob of its own."""

    layout: Path
    digest: str
    plaintext_digest: str


class HeldSource:
    """A store that gives no segment before it is let go: what a load does alone, nothing having been fetched ahead."""

    def __init__(self, source: BlobSource) -> None:
        self._source = source
        self.held = True

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        return self._source.read_manifest(reference, max_bytes)

    def referrers(self, digest: str) -> tuple[str, ...]:
        return self._source.referrers(digest)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._source.read_blob(digest, max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        if self.held:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        return self._source.read_range(digest, offset, out)

    def close(self) -> None:
        self._source.close()


def make_model(folder: Path) -> Model:
    from agent.artifact.seal import seal_model

    data = os.urandom(MODEL_BYTES)
    (folder / "model").mkdir()
    (folder / "model/weights").write_bytes(data)
    digest = seal_model(folder / "model", folder / "layout", KEY, KEY_URI, "bench", 1, lambda _, __: None)
    plaintext_digest = "sha256:" + hashlib.sha256(data).hexdigest()
    os.rename(folder / "model/weights", folder / "layout/blobs" / plaintext_digest.replace(":", "/"))
    os.sync()  # no write-back beside what is measured
    return Model(folder / "layout", digest, plaintext_digest)


def released_key() -> ReleasedKey:
    secret = SecretBuffer(len(KEY))
    with secret.view() as view:
        view[:] = KEY
    return ReleasedKey(secret, Ident("bench"), 1)


async def load_once(location: str, digest: str, kind: str) -> float:
    """Seconds that `load` takes when nothing was fetched ahead."""
    source = HeldSource(open_source(location, None, 30))
    config = ArtifactConfig(source=location, manifest_digest=digest, destination=kind)  # type: ignore[arg-type]
    with ExitStack() as undo:
        undo.callback(source.close)
        prepared = await prepare(source, config, KEY_URI, undo)
        prepared.stop_fetching()
        source.held = False
        with released_key() as key:
            began = time.perf_counter()
            await load(prepared, key, 0, lambda _, __: None)
            return time.perf_counter() - began


def copy_once(model: Model, kind: str) -> float:
    """Seconds that a copy of the plaintext takes, done as `load` does it."""
    source = open_source(str(model.layout), None, 30)
    destination = choose_destination(kind, None, [MODEL_BYTES], None, allow_swap=True, memory=MACHINE)
    destination.create("weights", MODEL_BYTES)
    lock = threading.Lock()
    runs = iter(range(0, MODEL_BYTES, COPY_RUN_BYTES))

    def copy() -> None:
        while True:
            with lock:
                start = next(runs, None)
            if start is None:
                return
            end = min(start + COPY_RUN_BYTES, MODEL_BYTES)
            with destination.window("weights", start, end - start) as window:
                for offset in range(start, end, SEGMENT_BYTES):
                    window.populate(offset, SEGMENT_BYTES)
                    with window.view(offset, SEGMENT_BYTES) as view:
                        assert source.read_range(model.plaintext_digest, offset, view) == SEGMENT_BYTES

    threads = [threading.Thread(target=copy) for _ in range(OPEN_THREADS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    destination.seal_read_only()
    seconds = time.perf_counter() - began
    destination.close()
    source.close()
    return seconds


def tink_once(model: Model, kind: str) -> float:
    """Seconds that Tink takes for the same blob, read straight into fresh memory of the same kind."""
    import tink
    from tink import secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

    streaming_aead.register()
    parameters = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=SEGMENT_BYTES, derived_key_size=len(KEY), hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(params=parameters, key_value=KEY)
    data = tink_pb2.KeyData(
        type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
        value=key.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    entry = tink_pb2.Keyset.Key(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry])
    primitive = tink.proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN).primitive(
        streaming_aead.StreamingAead
    )
    store = open_source(str(model.layout), None, 30)
    manifest = parse_manifest(store.read_blob(model.digest, 1 << 20), model.digest)
    (file,) = parse_config(store.read_blob(manifest.config_digest, manifest.config_bytes), manifest).files
    store.close()
    bound_to = associated_data("bench", file.path, file.size, KEY_URI, file.sealed_version)
    destination = choose_destination(kind, None, [MODEL_BYTES], None, allow_swap=True, memory=MACHINE)
    destination.create("weights", MODEL_BYTES)
    began = time.perf_counter()
    with destination.window("weights", 0, MODEL_BYTES) as window, window.view(0, MODEL_BYTES) as view:
        with open(model.layout / "blobs" / file.blob_digest.replace(":", "/"), "rb") as blob:
            stream = primitive.new_decrypting_stream(blob, bound_to)
            done = 0
            while got := stream.readinto(view[done : done + SEGMENT_BYTES]):
                done += got
        assert done == MODEL_BYTES
    seconds = time.perf_counter() - began
    destination.close()
    return seconds


def destination_kind() -> str:
    """The kind a guest has: its own tmpfs, or a memfd without privilege."""
    return "tmpfs" if os.geteuid() == 0 else "memfd"


def compare(model: Model, repeat: int, name: str, other: Callable[[], float]) -> dict[str, float]:
    """Medians over alternating pairs of a load and `other`."""
    pairs = []
    for _ in range(repeat + 1):
        mine = asyncio.run(load_once(str(model.layout), model.digest, destination_kind()))
        pairs.append((mine, other()))
    pairs = pairs[1:]  # the first touches memory the machine may not have yet
    speed = MODEL_BYTES / 1e9
    return {
        f"decrypt_vs_{name}": statistics.median(theirs / mine for mine, theirs in pairs),
        f"decrypt_beside_{name}_gb_per_s": speed / statistics.median(mine for mine, _ in pairs),
        f"{name}_gb_per_s": speed / statistics.median(theirs for _, theirs in pairs),
    }


def decrypt_vs_copy(model: Model, repeat: int) -> dict[str, float]:
    return compare(model, repeat, "copy", lambda: copy_once(model, destination_kind()))


def decrypt_vs_tink(model: Model, repeat: int) -> dict[str, float]:
    return compare(model, repeat, "tink", lambda: tink_once(model, destination_kind()))


def rss_over_model_mib(_: Model, __: int) -> dict[str, float]:
    """Of the worker in a whole boot. Sampled, because the kernel's own high-water mark counts the destination too."""
    from agent.demo.layout_server import serve

    peak_kib = 0
    with world(MODEL_BYTES) as here, serve(here.layout) as url:
        here.artifact["source"] = url
        agent = here.start()
        agent.wait_for("boot_started")
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        while not (worker := children.read_text().split()):
            time.sleep(SAMPLE_S)
        status = Path(f"/proc/{worker[0]}/status")
        with suppress(FileNotFoundError, KeyError):  # it has gone, or is a zombie
            while True:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                peak_kib = max(peak_kib, sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")))
                time.sleep(SAMPLE_S)
        agent.wait_for("server_ready")
        agent.stop()
    return {"rss_over_model_mib": peak_kib / 1024}


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


def cold_start_ms(_: Model, repeat: int) -> dict[str, float]:
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


EVIDENCE_RUNS = 50


def collect_snp_gpu_ms(_: Model, __: int) -> dict[str, float]:
    """Of what a boot does between Challenge and Attestation; the emulation's own signatures are in it."""
    import pytest

    from agent.evidence import Nonce, ReportData, RuntimeData
    from agent.evidence.collect import check_measured, open_devices
    from agent.evidence.cpu import Distance
    from agent.evidence.gate import ExpectedReady
    from agent.evidence.tsm import TsmSnp

    with silicon_machine() as machine, tempfile.TemporaryDirectory() as folder, ExitStack() as undo:
        from tests import nvml_emulation
        from tests.fake_configfs import fake_configfs

        firmware = machine.attester()
        try:
            fake = undo.enter_context(fake_configfs(Path(folder), lambda data, _: firmware.collect(ReportData(data)).report))
            driver = undo.enter_context(nvml_emulation.answered(machine, nvml_emulation.build(machine.directory)))
        except pytest.skip.Exception as reason:
            print(f"skipped: {reason}")
            return {}
        attester = TsmSnp(fake.root, distance=Distance(pause=lambda _: True))
        devices = open_devices(
            check_measured(attester, machine.host_data),
            driver.gpu_system(),
            gpu_count=1,
            expected_ready=ExpectedReady.UNSET,
            manifest_digest="sha256:" + "0" * 64,
            server_command_digest="sha256:" + "0" * 64,
        )
        data = RuntimeData(Nonce(bytes(32)), bytes(32), bytes(32))
        return {"collect_snp_gpu_ms": median_ms(lambda: devices.collect(data))}


def verify_ms(_: Model, __: int) -> dict[str, float]:
    from cryptography import x509

    from agent.evidence import GpuNonce, ReportData, Tee
    from agent.verify.nvidia import verify_gpu
    from agent.verify.snp import verify_snp
    from agent.verify.tdx import verify_tdx

    now, nonce = datetime.now(UTC), GpuNonce(bytes(32))
    with silicon_machine() as machine:
        roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.iterdir()]
        snp, tdx = (machine.attester(tee).collect(ReportData(bytes(64))) for tee in (Tee.SNP, Tee.TDX))
        (gpu,) = machine.gpu_system().collect(nonce)
        return {
            "verify_snp_ms": median_ms(lambda: verify_snp(snp, roots, [], now), time.thread_time),
            "verify_tdx_ms": median_ms(lambda: verify_tdx(tdx, roots, now), time.thread_time),
            "verify_gpu_ms": median_ms(lambda: verify_gpu(gpu, nonce, roots, now), time.thread_time),
        }


def ppcie_ms(_: Model, __: int) -> dict[str, float]:
    import pytest
    from cryptography import x509

    from agent.evidence import GpuNonce
    from agent.evidence.binding import split
    from agent.evidence.nscq import GpusAndSwitches
    from agent.verify.ppcie import verify_ppcie

    now, nonce = datetime.now(UTC), GpuNonce(bytes(32))
    with silicon_machine(gpus=8, switches=4) as machine, ExitStack() as undo:
        from tests import nscq_emulation, nvml_emulation

        try:
            nvml = undo.enter_context(nvml_emulation.answered(machine, nvml_emulation.build(machine.directory)))
            nscq = undo.enter_context(nscq_emulation.answered(machine, nscq_emulation.build(machine.directory)))
        except pytest.skip.Exception as reason:
            print(f"skipped: {reason}")
            return {}
        system = GpusAndSwitches(nvml.gpu_system(), nscq.switch_system())
        roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.iterdir()]
        gpus, switches = split(system.collect(nonce))
        return {
            "collect_ppcie_ms": median_ms(lambda: system.collect(nonce)),
            "verify_ppcie_ms": median_ms(lambda: verify_ppcie(gpus, switches, nonce, roots, now), time.thread_time),
        }


@contextmanager
def silicon_machine(gpus: int = 1, switches: int = 0) -> Iterator["SimulatedMachine"]:
    from agent.sim.machine import SimulatedMachine

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        yield SimulatedMachine.create(Path(folder, "machine"), gpus=gpus, switches=switches)


def median_ms(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    times = []
    for _ in range(EVIDENCE_RUNS):
        began = clock()
        work()
        times.append((clock() - began) * 1000)
    return statistics.median(times)


FIGURES: dict[str, Callable[[Model, int], dict[str, float]]] = {
    "decrypt_vs_copy": decrypt_vs_copy,
    "decrypt_vs_tink": decrypt_vs_tink,
    "rss_over_model_mib": rss_over_model_mib,
    "supervisor_rss_mib": supervisor_rss_mib,
    "cold_start_ms": cold_start_ms,
    "collect_snp_gpu_ms": collect_snp_gpu_ms,
    "verify_ms": verify_ms,
    "ppcie_ms": ppcie_ms,
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
