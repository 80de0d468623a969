"""The launcher, with the real server in it: it must behave as a supervised server behaves."""

import http.client
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.demo import minilm
from tests.world import free_port

LAUNCHER = [sys.executable, "-I", "-m", "agent.demo.llama_server"]


def wait_until_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    pytest.fail(f"not healthy, exit status {server.poll()}")


def test_it_serves_from_a_descriptor_without_an_environment_and_ends_with_status_0_on_sigterm(tmp_path: Path) -> None:
    minilm.convert(minilm.packaged_checkpoint(), tmp_path / "model.gguf")
    port = free_port()
    with open(tmp_path / "model.gguf", "rb") as model:
        (tmp_path / "model.gguf").unlink()
        path = f"/proc/self/fd/{model.fileno()}"
        command = [*LAUNCHER, "--model", path, "--port", str(port), "--alias", "minilm", "--embedding"]
        server = subprocess.Popen(command, env={}, cwd="/", pass_fds=[model.fileno()], stderr=subprocess.DEVNULL)
    try:
        wait_until_healthy(port, server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


def test_a_file_that_is_no_model_ends_it_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(1000))
    command = [*LAUNCHER, "--model", str(tmp_path / "model.gguf"), "--port", str(free_port()), "--alias", "minilm"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == 1
