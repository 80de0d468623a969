"""A preset ships after it ran against the real server: whole boots that end in a real vLLM and a real Triton, on the CPU.

`scripts/heavy` installs the servers, sets KEYTURN_HEAVY to their folder and runs this; every boot that holds writes its
transcript into `tests/transcripts/`.
"""

import http.client
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from agent.errors import Unready
from agent.server.presets import PRESETS
from tests.heavy_models import successor_llama, successor_repository
from tests.world import World, others_can_execute

TRANSCRIPTS = Path(__file__).with_name("transcripts")
SERVERS = Path(os.environ.get("KEYTURN_HEAVY", ""))
SHARED_MEMORY = Path("/dev/shm")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.xdist_group("heavy"),
    pytest.mark.skipif("KEYTURN_HEAVY" not in os.environ, reason="needs real model servers: scripts/heavy installs them"),
]


def descent_of(pid: int) -> list[int]:
    """A process and everything it started."""
    children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(each for child in children for each in descent_of(int(child)))]


def in_status(pid: int, field: str) -> int:
    """The first number of this field of /proc/PID/status."""
    return int(re.findall(rf"^{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


class RealServer:
    """One boot to a real server: what was asked of it, and the transcript."""

    def __init__(self, preset: str, model: dict[str, bytes], folder: Path, silicon: Path, undo: ExitStack) -> None:
        self.world = World(folder, silicon, undo, given=model)
        self.world.server = {
            "preset": preset,
            "port": self.world.port,
            "model_id": "tiny",
            "ready_timeout_s": 300,
            "stop_timeout_s": 40,
        }
        (self.packages,) = (SERVERS / preset).glob("lib/python3.*/site-packages")
        self.asked: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.peak_mib = 0

    def configure(self, program: Path, *arguments: str, **environment: str) -> None:
        """The preset's command with the program where it is here, and what this machine needs beside it."""
        assert os.geteuid() != 0 or others_can_execute(str(program)), "the server's user cannot execute it"
        command = PRESETS[self.world.server["preset"]].command
        self.world.server |= {"command": [str(program), *command[1:], *arguments], "environment": environment}

    @contextmanager
    def serving(self) -> Iterator[None]:
        """From boot to stop; afterwards nothing is left."""
        shared_memory = set(SHARED_MEMORY.iterdir())
        agent = self.world.start()
        pid = agent.wait_for("server_started")["pid"]
        agent.wait_for("server_ready")
        yield
        processes = descent_of(pid)
        assert {in_status(each, "Uid") for each in processes} == {65532 if os.geteuid() == 0 else os.geteuid()}
        self.peak_mib = sum(in_status(each, "VmHWM") for each in processes) >> 10
        outcome = agent.stop()
        self.events = outcome.events
        assert outcome.status == 0
        assert outcome.names()[-3:] == ["server_ended", "wiped", "stopped"]
        assert not [each for each in processes if Path(f"/proc/{each}").exists()]
        assert set(SHARED_MEMORY.iterdir()) == shared_memory

    def ask(self, path: str, body: dict[str, Any] | None = None, *, status: int = 200, key: str | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.world.port, timeout=60)
        method, sent = ("GET", None) if body is None else ("POST", json.dumps(body))
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, sent, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        self.asked += [
            "",
            f"{method} {path}{' with the API key' if key else ''} {sent or ''}".rstrip(),
            f"{answer.status} {text}".rstrip(),
        ]
        assert answer.status == status, text
        return json.loads(text) if text else None

    def write_transcript(self, name: str, *packages: str) -> None:
        versions = {each.metadata["Name"]: each.version for each in distributions(path=[str(self.packages)])}
        lines = [
            f"preset {self.world.server['preset']}: one boot to the real server, {datetime.now(UTC):%Y-%m-%d} (scripts/heavy)",
            "",
            *(f"{package}=={versions[package]}" for package in packages),
            f"Linux {'.'.join(os.uname().release.split('.')[:2])}, {os.cpu_count()} CPUs, no accelerator",
            f"peak resident memory, summed over the processes of the server: {self.peak_mib} MiB",
            "",
            "[server]",
            *(f"{key} = {json.dumps(value)}" for key, value in self.world.server.items()),
            "",
            *(json.dumps(event) for event in self.events),
            *self.asked,
        ]
        text = "\n".join(lines) + "\n"
        for folder, instead in ((self.world.folder, "WORLD"), (SERVERS, "SERVERS")):
            text = text.replace(str(folder), instead)
        (TRANSCRIPTS / name).write_text(text)


COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0}


def vllm(folder: Path, silicon: Path, undo: ExitStack, *arguments: str) -> RealServer:
    server = RealServer("vllm", successor_llama(), folder, silicon, undo)
    server.configure(
        SERVERS / "vllm" / "bin" / "vllm",
        *("--max-model-len", "256", *arguments),
        VLLM_API_KEY="key-of-this-test",
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS="2",
    )
    return server


QUICK = "--enforce-eager"  # nothing is compiled


def test_vllm_serves_exactly_the_sealed_model_and_leaves_nothing(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        server = vllm(tmp_path, silicon, undo)
        with server.serving():
            server.ask("/version")
            server.ask("/v1/completions", COMPLETION, status=401)
            answer = server.ask("/v1/completions", COMPLETION, key="key-of-this-test")
            assert answer["choices"][0]["text"] == "defgh"
        server.write_transcript("vllm-cpu.txt", "vllm-cpu", "torch", "transformers")


def test_vllm_embeds(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        server = vllm(tmp_path, silicon, undo, QUICK, *PRESETS["vllm"].embedding_arguments)
        server.world.server["probe"] = "embedding"
        with server.serving():
            answer = server.ask("/v1/embeddings", {"model": "tiny", "input": "abc"}, key="key-of-this-test")
            assert len(answer["data"][0]["embedding"]) == 256


def test_vllm_with_tensor_parallelism_needs_the_ports_of_egress_0(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        server = vllm(tmp_path, silicon, undo, QUICK, "--tensor-parallel-size", "2")
        server.world.server["environment"] |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        server.world.server["egress"] = [0]
        with server.serving():
            answer = server.ask("/v1/completions", COMPLETION, key="key-of-this-test")
            assert answer["choices"][0]["text"] == "defgh"


def triton(model: dict[str, bytes], folder: Path, silicon: Path, undo: ExitStack) -> RealServer:
    server = RealServer("triton", model, folder, silicon, undo)
    triton = server.packages / "pytriton" / "tritonserver"
    server.configure(
        triton / "bin" / "tritonserver",
        *("--backend-directory", f"{triton}/backends"),
        LD_LIBRARY_PATH=f"{server.packages}/nvidia_pytriton.libs",
    )
    return server


def test_triton_serves_exactly_the_sealed_model_and_leaves_nothing(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        server = triton(successor_repository("tiny"), tmp_path, silicon, undo)
        with server.serving():
            server.ask("/v2")
            server.ask("/v2/models/tiny/ready")
            answer = server.ask("/v2/models/tiny/generate", {"text_input": "abc", "max_tokens": 1})
            assert answer["text_output"] == "bcd"
            tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["sealed"]}
            answer = server.ask("/v2/models/tiny/infer", {"inputs": [tensor]})
            assert answer["outputs"][0]["data"] == ["tfbmfe"]
        server.write_transcript("triton.txt", "nvidia-pytriton", "numpy")


def test_a_triton_model_that_is_ready_and_dies_on_its_first_request_never_counts_as_ready(
    tmp_path: Path, silicon: Path
) -> None:
    with ExitStack() as undo:
        server = triton(successor_repository("tiny", "os._exit(1)"), tmp_path, silicon, undo)
        server.world.server |= {"ready_timeout_s": 10, "stop_timeout_s": 1, "max_restarts": 0}
        outcome = server.world.boot()
        assert (outcome.failure["class"], outcome.status) == ("ServerNotReadyError", 30)
        assert outcome.failure["fields"]["reason"] == Unready.PROBE.value
