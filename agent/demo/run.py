"""The demo as a program: prepare a site, boot the agent in it, ask the model, look at the weights, stop, count what is left.

Owns the order of these steps and the result. The agent is `keyturn run`, a process that gets a configuration file and
nothing else; what it does is learned from its events, as anybody would. Prints nothing: `view.py` does.
"""

import hashlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.demo import kbs, site, stores
from agent.demo.stores import StoreKind
from agent.errors import EXIT_STATUS, AgentError, Owner, Step, error_to_record
from agent.events import Message, ServerReady, ServerStarted, StageEnded, message_from_record
from agent.evidence import Tee
from agent.guest import mounts
from agent.publish import RUN_DIRECTORY, SHARED_MEMORY
from agent.sim import api_server_rest
from agent.sim.machine import SimulatedMachine
from agent.verify.ppcie import SWITCHES

TEXTS = ("a cat", "a kitten", "an annual tax report")
BOOT_TIMEOUT_S = 180
ASK_TIMEOUT_S = 30
_NOT_OK = EXIT_STATUS[Owner.KEYTURN, Step.AGENT]


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for.

    Attributes:
        once: stop when the questions are answered.
        flip_byte: damage one byte of ciphertext before the boot.
        configfs: the agent reaches the TEE through a configfs-tsm like the kernel's.
        coco: it reaches TEE and GPU evidence only through an api-server-rest, as a container in a Kata guest does.
        broker: `grpc`, our own; `rcar`, a test KBS; `relay`, our own before one; or the URL of a KBS with an open admin API.
        gpus: how many the machine has.
        ppcie: with eight GPUs, and the four NVSwitches between them.
        source: the store that the model is read from.
        credentials_at_broker: not the configuration has its password, but the key broker, for this guest alone.
    """

    once: bool
    flip_byte: bool
    tee: Tee = Tee.SNP
    configfs: bool = False
    coco: bool = False
    broker: str = "grpc"
    gpus: int = 1
    ppcie: bool = False
    source: StoreKind = StoreKind.HTTP
    credentials_at_broker: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """One event of the agent: the line as it came, its meaning, and milliseconds since the agent started."""

    line: str
    message: Message
    t_ms: int


@dataclass(frozen=True, slots=True)
class Weights:
    """The file that the model server has mapped, seen from outside through the kernel."""

    filesystem: str
    sha256: str


@dataclass(slots=True)
class Result:
    """What came of it. `ok` is the whole promise of the demo, not only an exit status of 0."""

    sealed_sha256: str
    exit_status: int = _NOT_OK
    stages: list[StageEnded] = field(default_factory=list)
    similarity: tuple[float, float] | None = None  # cat and kitten, cat and tax report
    weights: Weights | None = None
    left_behind: list[str] = field(default_factory=list)
    error: AgentError | None = None

    @property
    def ok(self) -> bool:
        return (
            self.exit_status == 0
            and self.similarity is not None
            and self.similarity[0] > self.similarity[1] + 0.2
            and self.weights == Weights("tmpfs", self.sealed_sha256)
            and not self.left_behind
        )

    @property
    def status(self) -> int:
        """For our own exit: the agent's, or that of a bug when the agent was content and we are not."""
        return self.exit_status if self.exit_status or self.ok else _NOT_OK

    def to_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "exit_status": self.status,
            "simulated": True,
            "stages": [{"name": end.stage.value, "ms": end.ms, "bytes": end.bytes} for end in self.stages],
            "answer": self.similarity and {"cat_kitten": self.similarity[0], "cat_tax": self.similarity[1]},
            "weights": self.weights and {"filesystem": self.weights.filesystem, "sha256": self.weights.sha256},
            "sealed": {"sha256": self.sealed_sha256},
            "left_behind": self.left_behind,
            "error": self.error and error_to_record(self.error),
        }


class View(Protocol):
    """Whoever watches."""

    def preparing(self, step: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A step of ours runs inside the block; the function takes the bytes done and the bytes in all."""

    def told(self, told: Told) -> None: ...

    def called(self, method: str, path: str, status: int) -> None:
        """A call to the admin API of a KBS was answered."""

    def serving(self, result: Result, port: int) -> None:
        """The questions are answered and the server stays until somebody stops it."""


def run(options: Options, view: View) -> Result:
    """One demo, from nothing to nothing.

    Raises:
        SimulationRefusedError: this is a machine with a real TEE, or without FUSE where that is asked for.
    """
    with tempfile.TemporaryDirectory(prefix="keyturn-demo-") as name:
        folder = Path(name)
        with view.preparing("simulated machine"):
            switches = SWITCHES if options.ppcie else 0
            # A foreign KBS knows NVIDIA's roots and not our simulator's.
            gpus = 0 if "://" in options.broker else options.gpus
            machine = SimulatedMachine.create(folder / "machine", gpus=gpus, switches=switches)
            user = site.choose_server_user()
        with view.preparing("sealed model") as progress:
            model = site.seal_minilm(folder, progress)
            if options.flip_byte:
                site.flip_byte(model.layout)
        with ExitStack() as running:
            with view.preparing("model store and key broker"):
                store = running.enter_context(stores.serve(options.source, model.layout, folder))
                credentials = None
                if options.credentials_at_broker:
                    store, credentials = stores.at_broker(store, site.CREDENTIALS_URI)
                broker = running.enter_context(_broker(options, folder, machine, model, view))
                api_server = None
                if options.coco:
                    components = api_server_rest.Components.of(machine, options.tee)
                    api_server = running.enter_context(api_server_rest.serve(components))
            report_root = None
            if options.configfs:
                with view.preparing("configfs-tsm"):
                    report_root = running.enter_context(site.mount_configfs(folder, machine, options.tee))
            with view.preparing("configuration, measured at launch"):
                port = stores.free_port()
                reached = site.Reached(report_root, api_server)
                text = site.configuration_text(machine, options.tee, model, broker.section, store, port, user, reached).encode()
                (folder / "keyturn.toml").write_bytes(text)
                machine.host_data = hashlib.sha256(text).digest()
                machine.save()
                broker.approve(machine, options.tee, model, credentials)
            result = _boot(folder, model, port, options, view)
            if report_root and os.listdir(report_root):
                result.left_behind.append("configfs-tsm entry")
        if report_root and report_root.exists():
            result.left_behind.append("configfs-tsm")
        return result


def _broker(
    options: Options, folder: Path, machine: SimulatedMachine, model: site.SealedModel, view: View
) -> AbstractContextManager[site.Broker | kbs.Kbs]:
    match options.broker:
        case "grpc":
            return site.run_broker(folder, machine, model.key)
        case "rcar":
            return kbs.run_test_kbs(folder, machine, view.called)
        case "relay":
            return kbs.run_relay(folder, machine, view.called)
        case url:
            return kbs.use_kbs(url, view.called)


def _boot(folder: Path, model: site.SealedModel, port: int, options: Options, view: View) -> Result:
    result = Result(model.plaintext_sha256)
    server_pid = scratch = None
    arguments = ("run", "--config", str(folder / "keyturn.toml"), "--status-file", str(folder / "status.json"))
    with (
        site.start_keyturn(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as agent,
        site.killed_after(BOOT_TIMEOUT_S, agent) as deadline,
        _stop_on_signal(agent),
    ):
        for told in _events(agent):
            view.told(told)
            match told.message:
                case StageEnded() as ended:
                    result.stages.append(ended)
                case ServerStarted(pid):
                    server_pid = pid
                case ServerReady() if result.similarity is None:
                    assert server_pid is not None
                    result.similarity = _ask(port)
                    result.weights = look_at_weights(server_pid, site.MODEL_FILE)
                    scratch = _scratch_of(server_pid)
                    if options.once:
                        agent.terminate()
                    else:
                        deadline.cancel()
                        view.serving(result, port)
                case AgentError() as error:
                    result.error = error
        result.exit_status = agent.wait()
    result.left_behind = _left_behind(server_pid, port, scratch)
    return result


def _events(agent: subprocess.Popen[str]) -> Iterator[Told]:
    assert agent.stderr
    for line in agent.stderr:
        try:
            record = json.loads(line)
        except ValueError:
            raise RuntimeError(f"the agent said what is no event:\n{line}{agent.stderr.read()}") from None
        t_ms = record.pop("t_ms")
        del record["at"]
        yield Told(line, message_from_record(record), t_ms)


@contextmanager
def _stop_on_signal(agent: subprocess.Popen[str]) -> Iterator[None]:
    """SIGINT and SIGTERM to us ask the agent to stop; its events then end, and we with them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: agent.terminate()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# --- the model --------------------------------------------------------------------------------------------------------


def _ask(port: int) -> tuple[float, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_TIMEOUT_S)
    body = json.dumps({"model": site.MODEL_ID, "input": TEXTS})
    try:
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    cat, kitten, tax = (entry["embedding"] for entry in sorted(answer["data"], key=lambda entry: entry["index"]))
    return round(_cosine(cat, kitten), 4), round(_cosine(cat, tax), 4)


def _cosine(a: list[float], b: list[float]) -> float:
    return _dot(a, b) / math.sqrt(_dot(a, a) * _dot(b, b))


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def look_at_weights(pid: int, name: str) -> Weights:
    """Hash the file a process has mapped under this name, or as a memfd, and name its file system.

    Raises:
        RuntimeError: it has mapped none, or the one it has mapped cannot be reached.
    """
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, _, _, device, inode, *path = line.split(maxsplit=5)
        if path and (path[0].startswith("/memfd:") or path[0].removesuffix(" (deleted)").endswith(f"/{name}")):
            major, minor = (int(number, 16) for number in device.split(":"))
            with open(_reach(pid, place, os.makedev(major, minor), int(inode)), "rb") as file:
                filesystem = "tmpfs" if mounts.is_tmpfs(file.fileno()) else "other"
                return Weights(filesystem, hashlib.file_digest(file, "sha256").hexdigest())
    raise RuntimeError("the server has no model mapped")


def _reach(pid: int, place: str, device: int, inode: int) -> int:
    """Open the mapped file itself: by a descriptor the process still has (any user), else by the mapping (root)."""
    ways = [*Path(f"/proc/{pid}/fd").iterdir(), Path(f"/proc/{pid}/map_files/{place}")]
    for way in ways:
        try:
            descriptor = os.open(way, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # a socket, or gone
            continue
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) == (device, inode):
            return descriptor
        os.close(descriptor)
    raise RuntimeError("the mapped file cannot be reached")


# --- the end ----------------------------------------------------------------------------------------------------------


def _scratch_of(pid: int) -> Path:
    variables = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return Path(variables["TMPDIR"])


def _left_behind(server_pid: int | None, port: int, scratch: Path | None) -> list[str]:
    """What a boot must not leave: its server, its port, a mount, a folder."""
    left = []
    if server_pid is not None and Path(f"/proc/{server_pid}").exists():
        left.append("server process")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            left.append("server port")
    if re.search(rf" {RUN_DIRECTORY}/", Path("/proc/self/mountinfo").read_text()):
        left.append("mount")
    # As root it is a mount that nobody else ever saw, on an empty folder that stays.
    if scratch and scratch.is_relative_to(SHARED_MEMORY) and scratch.exists():
        left.append("scratch folder")
    return left
