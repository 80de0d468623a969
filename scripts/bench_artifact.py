"""The figures of the artifact engine: opening, fetching, overlap and sealing, each beside what it is compared with."""

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agent.artifact.kserve import list_digest
from agent.artifact.load import CONNECTIONS, OPEN_THREADS, load, prepare
from agent.artifact.manifest import parse_manifest
from agent.artifact.memory import choose_destination, demand_of
from agent.artifact.seal import seal_model
from agent.artifact.sources import open_source
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.sources.http import HttpSource
from agent.artifact.stream import SEGMENT_BYTES, StreamLayout
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.guest.memory_info import MACHINE
from agent.jose import pack_b64url
from agent.keys import ReleasedKey, SecretBuffer

KEY = bytes(range(32))
KEY_URI = "kbs:///models/bench/1"
MODEL_BYTES = 256 << 20
RUN_BYTES = 8 * SEGMENT_BYTES
HANDSHAKE_S = 3.0
STORE_BYTES_PER_S = 100e6
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Model:
    """A sealed model and, in the same layout, its plaintext as a blob of its own."""

    layout: Path
    digest: str
    plaintext_digest: str

    @property
    def plaintext(self) -> Path:
        return self.layout / "blobs" / self.plaintext_digest.replace(":", "/")


class _Held:
    """Gives no segment before it is let go: what a load does alone, nothing having been fetched ahead."""

    held = True

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        if self.held:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        return super().read_range(digest, offset, out)


class HeldDirectory(_Held, DirectorySource):
    pass


class HeldHttp(_Held, HttpSource):
    pass


class SlowSource(DirectorySource):
    """A store that gives so many bytes a second, over all connections together."""

    def __init__(self, path: str, bytes_per_s: float) -> None:
        super().__init__(path)
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + len(out) / self._rate
            wait_s = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_s))
        return super().read_range(digest, offset, out)


def make_model(folder: Path, model_bytes: int = MODEL_BYTES) -> Model:
    data = os.urandom(model_bytes)
    (folder / "model").mkdir(parents=True)
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


def destination_kind() -> str:
    """The kind a guest has: its own tmpfs, or a memfd without privilege."""
    return "tmpfs" if os.geteuid() == 0 else "memfd"


def artifact_config(location: str, digest: str, ca_pem: str | None = None) -> ArtifactConfig:
    return ArtifactConfig(source=location, manifest_digest=digest, destination=destination_kind(), ca_pem=ca_pem)  # type: ignore[arg-type]


async def load_once(location: str, digest: str, ca_pem: str | None = None) -> float:
    """Seconds that `load` takes when nothing was fetched ahead."""
    source = HeldHttp(location, ca_pem, 30) if "://" in location else HeldDirectory(location)
    with ExitStack() as undo:
        undo.callback(source.close)
        prepared = await prepare(source, artifact_config(location, digest, ca_pem), KEY_URI, undo, allow_swap=True)
        prepared.stop_fetching()
        source.held = False
        with released_key() as key:
            began = time.perf_counter()
            await load(prepared, key, 0, lambda _, __: None)
            return time.perf_counter() - began


def in_threads(work: Callable[[int], None], pieces: range, count: int) -> float:
    """Seconds that `work` takes for all pieces, in as many threads as a load has."""
    lock, left = threading.Lock(), iter(pieces)

    def run() -> None:
        while True:
            with lock:
                piece = next(left, None)
            if piece is None:
                return
            work(piece)

    threads = [threading.Thread(target=run) for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def copy_once(model: Model) -> float:
    """Seconds that a copy of the plaintext takes, done as `load` does it."""
    source = open_source(str(model.layout), None, 30)
    destination = choose_destination(
        destination_kind(), None, demand_of({"weights": MODEL_BYTES}), None, allow_swap=True, memory=MACHINE
    )
    destination.create("weights", MODEL_BYTES)

    def copy(start: int) -> None:
        with destination.window("weights", start, RUN_BYTES) as window:
            for offset in range(start, start + RUN_BYTES, SEGMENT_BYTES):
                window.populate(offset, SEGMENT_BYTES)
                with window.view(offset, SEGMENT_BYTES) as view:
                    assert source.read_range(model.plaintext_digest, offset, view) == SEGMENT_BYTES

    seconds = in_threads(copy, range(0, MODEL_BYTES, RUN_BYTES), OPEN_THREADS)
    destination.close()
    source.close()
    return seconds


def alternating(repeat: int, **sides: Callable[[], float]) -> dict[str, float]:
    """The best seconds of each side: what else a shared machine does only ever adds. The first turn of each counts not."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + 1):
        for name, side in sides.items():
            seconds = side()
            if turn:  # the first touches memory the machine may not have yet
                times[name].append(seconds)
    return {name: min(found) for name, found in times.items()}


def compared(name: str, mine: float, theirs: float, what: str = "decrypt") -> dict[str, float]:
    return {
        f"{what}_vs_{name}": theirs / mine,
        f"{what}_beside_{name}_gb_per_s": MODEL_BYTES / mine / 1e9,
        f"{name}_gb_per_s": MODEL_BYTES / theirs / 1e9,
    }


def decrypt_vs(name: str, model: Model, repeat: int, other: Callable[[], float]) -> dict[str, float]:
    best = alternating(repeat, mine=lambda: asyncio.run(load_once(str(model.layout), model.digest)), theirs=other)
    return compared(name, best["mine"], best["theirs"])


def decrypt_vs_copy(model: Model, repeat: int) -> dict[str, float]:
    return decrypt_vs("copy", model, repeat, lambda: copy_once(model))


# --- over a network ---------------------------------------------------------------------------------------------------


@contextmanager
def nginx(root: Path, certificate: Path | None) -> Iterator[str]:
    """Debian's nginx-light on a loopback port."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise SystemExit("fetch_vs_readinto needs nginx: apt-get install nginx-light")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tls = f"ssl_certificate {certificate}; ssl_certificate_key {certificate};" if certificate else ""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(f"""
            daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
            events {{ worker_connections 256; }}
            http {{
                access_log off; sendfile on; keepalive_requests 1000000; client_body_temp_path {folder}/body;
                proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
                server {{ listen 127.0.0.1:{port} {"ssl" if certificate else ""}; {tls} root {root}; }}
            }}
        """)
        with subprocess.Popen([program, "-c", config], stderr=subprocess.DEVNULL) as server:
            try:
                deadline = time.monotonic() + 10
                while True:
                    try:
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
                    except ConnectionRefusedError:
                        assert time.monotonic() < deadline, "nginx does not listen"
                        time.sleep(0.02)
                yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
            finally:
                server.terminate()


def readinto_once(url: str, model: Model, ca_pem: str | None) -> float:
    """Seconds for the same ranges through the same client into the same buffers, and nothing else."""
    source = open_source(url, ca_pem, 30)
    manifest = parse_manifest(source.read_blob(model.digest, 1 << 20), model.digest)
    (layer,) = manifest.layers
    layout = StreamLayout(MODEL_BYTES)
    buffers = threading.local()

    def read(segment: int) -> None:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(bytearray(SEGMENT_BYTES))
        offset, length = layout.ciphertext_range(segment)
        assert source.read_range(layer.blob_digest, offset, buffers.view[:length]) == length

    seconds = in_threads(read, range(layout.segments), CONNECTIONS)
    source.close()
    return seconds


def fetch_vs(model: Model, repeat: int, *, tls: bool) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.range_server import make_certificate

    certificate, ca_pem = make_certificate(model.layout.parent) if tls else (None, None)
    with nginx(model.layout, certificate) as url:
        best = alternating(
            repeat,
            mine=lambda: asyncio.run(load_once(url, model.digest, ca_pem)),
            theirs=lambda: readinto_once(url, model, ca_pem),
        )
    return compared("readinto_tls" if tls else "readinto", best["mine"], best["theirs"], "fetch")


def fetch_vs_readinto(model: Model, repeat: int) -> dict[str, float]:
    return fetch_vs(model, repeat, tls=False)


def fetch_vs_readinto_tls(model: Model, repeat: int) -> dict[str, float]:
    return fetch_vs(model, repeat, tls=True)


async def slow_boot(config: ArtifactConfig) -> float:
    """Seconds from the first request to the open model, with a slow store and a handshake that only takes time."""
    source = SlowSource(config.source, STORE_BYTES_PER_S)
    with ExitStack() as undo:
        undo.callback(source.close)
        began = time.perf_counter()
        handshake = asyncio.create_task(asyncio.sleep(HANDSHAKE_S))
        prepared = await prepare(source, config, KEY_URI, undo, allow_swap=True)
        await handshake
        with released_key() as key:
            await load(prepared, key, 0, lambda _, __: None)
        return time.perf_counter() - began


def overlap_vs_longest(model: Model, _: int) -> dict[str, float]:
    """The whole from the first request to the last open segment."""
    took = asyncio.run(slow_boot(artifact_config(str(model.layout), model.digest)))
    longest = max(HANDSHAKE_S, StreamLayout(MODEL_BYTES).ciphertext_bytes / STORE_BYTES_PER_S)
    return {"overlap_vs_longest": took / longest}


def overlap_vs_longest_jwe(model: Model, _: int) -> dict[str, float]:
    """The same of a file as KServe keeps it."""
    folder = model.layout.parent / "jwe"
    folder.mkdir()
    try:
        protected = pack_b64url(b'{"alg":"dir","enc":"A256GCM"}')
        sealed = AESGCM(KEY).encrypt(bytes(12), model.plaintext.read_bytes(), protected.encode())
        parts = (protected, "", *map(pack_b64url, (bytes(12), sealed[:-16], sealed[-16:])))
        (folder / "weights.jwe").write_text(".".join(parts))
        del sealed, parts
        os.sync()
        jwe: dict[str, Any] = {"format": "kserve-jwe", "name": "bench", "jwe_files": ("weights.jwe",)}
        config = ArtifactConfig(source=str(folder), destination=destination_kind(), **jwe)  # type: ignore[arg-type]
        identified = msgspec.structs.replace(config, manifest_digest=list_digest(config))
        took = asyncio.run(slow_boot(identified))
        longest = max(HANDSHAKE_S, (folder / "weights.jwe").stat().st_size / STORE_BYTES_PER_S)
        return {"overlap_vs_longest_jwe": took / longest}
    finally:
        shutil.rmtree(folder)


# --- the provider's side ----------------------------------------------------------------------------------------------


def seal_vs_decrypt(model: Model, repeat: int) -> dict[str, float]:
    """A model of four files: a file's digest is one chain of SHA-256, so that one file alone keeps one processor busy."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        part = MODEL_BYTES // 4
        with model.plaintext.open("rb") as plaintext:
            for i in range(4):
                (folder / "model" / f"weights-{i}").write_bytes(plaintext.read(part))
        made = iter(range(repeat + 2))
        digests: list[str] = []

        def seal() -> float:
            out = folder / f"layout-{next(made)}"
            shutil.rmtree(folder / f"layout-{len(digests) - 1}", ignore_errors=True)
            began = time.perf_counter()
            digests.append(seal_model(folder / "model", out, KEY, KEY_URI, "bench", 1, lambda _, __: None))
            return time.perf_counter() - began

        def decrypt() -> float:
            return asyncio.run(load_once(str(folder / f"layout-{len(digests) - 1}"), digests[-1]))

        best = alternating(repeat, seal=seal, decrypt=decrypt)
    return {
        "seal_vs_decrypt": best["decrypt"] / best["seal"],
        "seal_gb_per_s": MODEL_BYTES / best["seal"] / 1e9,
        "decrypt_beside_seal_gb_per_s": MODEL_BYTES / best["decrypt"] / 1e9,
    }


async def engine(location: str, digest: str) -> None:
    """What `rss_over_model_mib` looks at: fetched ahead until everything is here, then opened."""
    source = open_source(location, None, 30)
    with ExitStack() as undo:
        undo.callback(source.close)
        prepared = await prepare(source, artifact_config(location, digest), KEY_URI, undo, allow_swap=True)
        await asyncio.sleep(0.1)
        with released_key() as key:
            await load(prepared, key, 0, lambda _, __: None)


if __name__ == "__main__":
    asyncio.run(engine(*sys.argv[1:]))
