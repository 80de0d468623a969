"""An evil host environment: variables that steer interpreters, libraries, proxies and caches have no effect on a boot.

What acts before our first line (`LD_PRELOAD`, and `PYTHON*` on an interpreter without `-I`) rests on whoever starts the agent;
here it is seen that none of it reaches the processes that see secrets.
"""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.faults.table import FaultWorld
from tests.faults.watch import descendants
from tests.range_server import RangeServer, make_certificate
from tests.world import ask

FILE, FOLDER, PROXY = "{file}", "{folder}", "http://127.0.0.1:{proxy}"
HOSTILE = {
    "python": {
        "PYTHONPATH": FOLDER,
        "PYTHONSTARTUP": FILE,
        "PYTHONPYCACHEPREFIX": FOLDER,
        "PYTHONWARNINGS": "error",
        "PYTHONBREAKPOINT": "os.abort",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONTRACEMALLOC": "9",
        "PYTHONASYNCIODEBUG": "1",
    },
    "tls": {
        "SSLKEYLOGFILE": FILE,
        "SSL_CERT_FILE": FILE,
        "SSL_CERT_DIR": FOLDER,
        "REQUESTS_CA_BUNDLE": FILE,
        "CURL_CA_BUNDLE": FILE,
        "OPENSSL_CONF_INCLUDE": FOLDER,
        "OPENSSL_MODULES": FOLDER,
        "OPENSSL_ENGINES": FOLDER,
        "CRYPTOGRAPHY_OPENSSL_NO_LEGACY": "",
    },
    "grpc": {
        "GRPC_TRACE": "all",
        "GRPC_VERBOSITY": "DEBUG",
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": FILE,
        "GRPC_SSL_CIPHER_SUITES": "NONE",
        "GRPC_DNS_RESOLVER": "none",
        "GRPC_ENABLE_FORK_SUPPORT": "1",
        "GRPC_GOOGLE_CLOUD_ENABLE_DNS_OVER_TLS": "1",
        "grpc_proxy": PROXY,
    },
    "proxies": {
        name: PROXY for lower in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy") for name in (lower, lower.upper())
    },
    "places": {
        "TMPDIR": FOLDER,
        "HOME": FOLDER,
        "XDG_CACHE_HOME": FOLDER,
        "XDG_CONFIG_HOME": FOLDER,
        "HOSTALIASES": FILE,
        "RES_OPTIONS": "timeout:60",
        "LOCALDOMAIN": "evil.test",
        "GLIBC_TUNABLES": "glibc.malloc.check=3",
        "MALLOC_TRACE": FILE,
        "CUDA_VISIBLE_DEVICES": "9",
    },
}


class Proxy:
    """Counts who comes."""

    def __init__(self) -> None:
        self.calls = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                self._listener.accept()[0].close()
                self.calls += 1

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[FaultWorld]:
    with ExitStack() as undo:
        yield FaultWorld(tmp_path, silicon, undo)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_variables_have_no_effect(kind: str, world: FaultWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, ca_pem = make_certificate(world.folder / "machine")
    store = world.undo.enter_context(RangeServer(world.layout, certificate=certificate))
    world.artifact |= {"source": store.url, "ca_pem": ca_pem}
    proxy = Proxy()
    world.undo.callback(proxy.close)
    file, folder = world.folder / "hostile-file", world.folder / "hostile-folder"
    folder.mkdir()
    config = world.prepare()
    world.start_broker()
    for name, value in HOSTILE[kind].items():
        monkeypatch.setenv(name, value.format(file=file, folder=folder, proxy=proxy.port))

    agent = world.start_agent(config)
    agent.wait_for("server_ready")
    assert "PATH" in _environment(agent.process.pid), "environments can be read here"
    seen = {
        name
        for pid in (agent.process.pid, *descendants(agent.process.pid))
        for name in _environment(pid)
        if name in HOSTILE[kind]
    }
    (weights,) = world.model.values()
    assert ask(world.port, "/about")["sha256"] == hashlib.sha256(weights).hexdigest()
    outcome = agent.stop()

    assert outcome.status == 0
    assert seen <= {"GRPC_VERBOSITY", "HOME", "TMPDIR", "XDG_CACHE_HOME"}, "the first is ours, the others are the server's own"
    assert not file.exists()
    assert [path for path in folder.rglob("*") if "hostile" not in path.name] == []
    assert proxy.calls == 0
    assert world.canaries.found_in(json.dumps(outcome.events).encode()) == set()


def _environment(pid: int) -> set[str]:
    with suppress(OSError):
        return {line.split("=")[0] for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line}
    return set()


def test_an_environment_that_says_it_is_clean_is_not_believed(world: FaultWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTURN_CLEANED", "1")
    monkeypatch.setenv("SSLKEYLOGFILE", str(world.folder / "keys"))
    config = world.prepare()
    agent = world.start_agent(config)
    stderr = agent.process.communicate(timeout=30)[1]
    assert agent.process.returncode == 1
    assert b"the environment cannot be cleaned" in stderr
    assert not (world.folder / "keys").exists()
