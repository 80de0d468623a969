"""What stands around the guest of a demo: a simulated machine, a sealed model in a store, a key broker.

Each is the real thing, made by the code that makes it elsewhere; only the silicon is simulated. Owns their files, all below
one folder, and the two texts that tie them together: the guest's configuration and the broker's policy row. Boots nothing.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from agent.artifact.seal import seal_model
from agent.artifact.stream import KEY_BYTES
from agent.broker import bootstrap
from agent.demo import minilm
from agent.errors import SimulationRefusal, SimulationRefusedError
from agent.evidence import NO_REPORT_DATA, Tee
from agent.guest import hardening
from agent.server.presets import command_digest
from agent.sim import configfs
from agent.sim.machine import SimulatedMachine

MODEL_ID = "all-MiniLM-L6-v2"
MODEL_FILE = "model.gguf"
MODEL_VERSION = 1
KEY_URI = "kbs:///demo/all-minilm-l6-v2/1"
CREDENTIALS_URI = "kbs:///demo/store/1"
SERVER_UID = 65532
BROKER_START_S = 30
CONFIGFS_START_S = 30
SERVER_COMMAND = (
    *(sys.executable, "-I", "-m", "agent.demo.llama_server"),
    *("--model", "{model}", "--port", "{port}", "--alias", "{model_id}", "--embedding"),
)


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A layout that holds the model as ciphertext, its key, and what we remember of the plaintext, which is gone."""

    layout: Path
    manifest_digest: str
    key: bytes = field(repr=False)
    plaintext_sha256: str
    plaintext_bytes: int


@dataclass(frozen=True, slots=True)
class ServerUser:
    """Who runs the model server when the agent is root. `uid` 0 only if no other user can execute our interpreter."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Reached:
    """Through what the agent reaches the devices: a configfs-tsm here, an api-server-rest there, or, both None, nothing."""

    report_root: Path | None = None
    api_server: str | None = None


def seal_minilm(folder: Path, progress: Callable[[int, int], None]) -> SealedModel:
    """Seal the packaged model into `folder`/layout. When this returns, the plaintext is deleted."""
    plain, layout, key = folder / "plain", folder / "layout", os.urandom(KEY_BYTES)
    plain.mkdir()
    try:
        minilm.convert(minilm.packaged_checkpoint(), plain / MODEL_FILE)
        with (plain / MODEL_FILE).open("rb") as file:
            sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
        digest = seal_model(plain, layout, key, KEY_URI, MODEL_ID, MODEL_VERSION, progress)
    finally:
        shutil.rmtree(plain)
    return SealedModel(layout, digest, key, sha256, size)


def flip_byte(layout: Path) -> None:
    """Damage the sealed model: one bit of one byte in the middle of its largest blob."""
    blob = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def choose_server_user() -> ServerUser | None:
    """The first user that can execute the model server from where it is installed; None: we are not root, so it is us.

    Tried instead of computed from modes: what counts is whether the interpreter starts and finds its modules.
    """
    if os.geteuid() != 0:
        return None
    owner = os.stat(sys.prefix)
    probe = [sys.executable, "-I", "-c", "import agent.demo.llama_server"]
    for user in (ServerUser(SERVER_UID, SERVER_UID), ServerUser(owner.st_uid, owner.st_gid)):
        try:
            subprocess.run(
                probe, user=user.uid, group=user.gid, extra_groups=[], env={}, cwd="/", check=True, stderr=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return user
    return ServerUser(0, 0)


class Broker:
    """A running `keyturn broker` that trusts one simulated machine's silicon. Only `run_broker` makes one."""

    def __init__(self, files: bootstrap.Broker, process: subprocess.Popen[str], port: int) -> None:
        self.files = files
        self.port = port
        self._process = process

    @property
    def section(self) -> str:
        """The guest's `[broker]` section, but for what every broker's has."""
        files = self.files
        return (
            f'endpoints = ["127.0.0.1:{self.port}"]\nserver_name = "{files.server_name}"\n'
            f"ca_pem = {json.dumps(files.ca_pem)}\ntoken_keys = [{json.dumps(files.token_key_pem)}]\n"
        )

    def approve(self, machine: SimulatedMachine, tee: Tee, model: SealedModel, credentials: bytes | None = None) -> None:
        """Let this machine, as it is launched, have the key; and the credentials of its store, if there are any."""
        if credentials is not None:
            _store(self.files.directory, CREDENTIALS_URI, credentials)
        self.load_policy(policy_text(machine, tee, model, CREDENTIALS_URI if credentials else None))

    def load_policy(self, text: str) -> None:
        """Replace the policy; when this returns, the broker decides by it."""
        (self.files.directory / "policy.toml").write_text(text)
        self._process.send_signal(signal.SIGHUP)
        await_event(self._process, "policy_loaded")


@contextmanager
def run_broker(folder: Path, machine: SimulatedMachine, key: bytes) -> Iterator[Broker]:
    """A broker of its own process, with the model key in its store and a policy that denies everything."""
    files = bootstrap.create(folder / "broker", "localhost", datetime.now(UTC))
    home = files.directory
    _store(home, KEY_URI, key)
    arguments = {
        "listen": "127.0.0.1:0",
        "tls-cert": home / "tls.pem",
        "tls-key": home / "tls.key",
        "policy": home / "policy.toml",
        "keys": home / "keys",
        "token-key": home / "token.key",
        "audit": home / "audit.jsonl",
        "unsafe-simulation-roots": machine.roots_dir,
    }
    command = [argument for name, value in arguments.items() for argument in (f"--{name}", str(value))]
    with start_keyturn("broker", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        address = str(await_event(process, "listening")["address"])
        await_event(process, "policy_loaded")
        yield Broker(files, process, int(address.rpartition(":")[2]))


def _store(home: Path, uri: str, secret: bytes) -> None:
    """Put a key or credentials where the broker finds them."""
    stored = home / "keys" / uri.removeprefix("kbs:///")
    stored.parent.mkdir(mode=0o700, parents=True)
    with open(os.open(stored, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)


def await_event(process: subprocess.Popen[str], name: str) -> dict[str, object]:
    """The next event of that name."""
    assert process.stdout
    with killed_after(BROKER_START_S, process):
        for line in process.stdout:
            record: dict[str, object] = json.loads(line)
            if record.get("event") == name:
                return record
    raise RuntimeError(f"the broker ended before it said {name}")


@contextmanager
def killed_after(seconds: float, process: subprocess.Popen[str]) -> Iterator[threading.Timer]:
    """Kill the process when the block takes longer, which ends its output and so every wait for it. May be cancelled."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


@contextmanager
def mount_configfs(folder: Path, machine: SimulatedMachine, tee: Tee) -> Iterator[Path]:
    """A configfs-tsm of a process of its own, before the machine's TEE: its root, as a path of every process of ours.

    It is mounted where no other process sees it, and gone with its process.

    Raises:
        SimulationRefusedError: this machine has no FUSE.
    """
    mountpoint = folder / "report"
    mountpoint.mkdir()
    command = ("agent.sim.configfs", str(machine.directory), tee.value, str(mountpoint))
    with _start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None) as process:
        assert process.stdout
        with killed_after(CONFIGFS_START_S, process):
            said = process.stdout.readline()
        if said == configfs.REFUSED:
            raise SimulationRefusedError(SimulationRefusal.NO_FUSE)
        if said != configfs.MOUNTED:
            raise RuntimeError("the configfs-tsm ended before it was mounted")
        yield Path(f"/proc/{process.pid}/root{mountpoint}")


@contextmanager
def start_keyturn(*arguments: str, stdout: int, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """Run a keyturn command as a process of its own; at the end of the block it is asked to stop, and waited for."""
    with _start("agent", *arguments, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr) as process:
        yield process


@contextmanager
def _start(module: str, *arguments: str, stdin: int, stdout: int, stderr: int | None) -> Iterator[subprocess.Popen[str]]:
    """In a process group of its own: Ctrl-C in a terminal is ours to hand on, in the right order. It dies with us."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", module, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        encoding="utf-8",
        env={},
        process_group=0,
        preexec_fn=partial(hardening.die_with_parent, os.getpid()),  # noqa: PLW1509  # one prctl: takes no lock
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def policy_text(machine: SimulatedMachine, tee: Tee, model: SealedModel, credentials_uri: str | None = None) -> str:
    """The broker's policy: one row, for exactly this machine, configuration, model and server command."""
    credentials = f'credentials_uri = "{credentials_uri}"\n' if credentials_uri else ""
    return f"""\
schema = "keyturn-policy/v1"
version = "demo"

[[row]]
key_uri = "{KEY_URI}"
release_channel = "demo"
revoked = false
not_after = {(datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")}
min_model_version = {MODEL_VERSION}
{credentials}manifest_digests = [{{ id = "model", value = "{model.manifest_digest}" }}]
server_command_digests = [{{ id = "server-command", value = "{command_digest(SERVER_COMMAND)}" }}]

{_tdx_section(machine) if tee is Tee.TDX else _snp_section(machine)}
[row.gpu]
count = {machine.gpu.count}
driver_versions = [{{ id = "driver", value = "{machine.gpu.driver_version}" }}]
vbios_versions = [{{ id = "vbios", value = "{machine.gpu.vbios_version}" }}]
{_switches_of_row(machine) if machine.gpu.switches else 'modes = ["cc"]'}
ready = false
"""


def _switches_of_row(machine: SimulatedMachine) -> str:
    return f"""\
switch_vbios_versions = [{{ id = "switch-vbios", value = "{machine.gpu.switch_vbios_version}" }}]
modes = ["ppcie"]"""


def _snp_section(machine: SimulatedMachine) -> str:
    tcb = machine.tcb
    return f"""\
[row.snp]
measurements = [{{ id = "guest-image", value = "{machine.measurement.hex()}" }}]
host_data = [{{ id = "configuration", value = "{machine.host_data.hex()}" }}]
minimum_tcb = [{{ id = "firmware", product = "Genoa", bootloader = {tcb.bootloader}, tee = {tcb.tee}, snp = {tcb.snp}, \
microcode = {tcb.microcode} }}]
debug = false
vmpl = 0
"""


def _tdx_section(machine: SimulatedMachine) -> str:
    from agent.sim.tdx import make_td_report

    td = make_td_report(machine, NO_REPORT_DATA).body
    return f"""\
[row.tdx]
mr_td = [{{ id = "guest-firmware", value = "{td.mr_td.hex()}" }}]
mr_config_id = [{{ id = "configuration", value = "{td.mr_config_id.hex()}" }}]
rtmr_1 = [{{ id = "guest-loader", value = "{td.rtmr_1.hex()}" }}]
rtmr_2 = [{{ id = "guest-kernel", value = "{td.rtmr_2.hex()}" }}]
minimum_tee_tcb_svn = {{ id = "module", value = "{td.tee_tcb_svn.hex()}" }}
tcb = ["not_evaluated"]
"""


def configuration_text(
    machine: SimulatedMachine,
    tee: Tee,
    model: SealedModel,
    broker_section: str,
    store: Mapping[str, str],
    server_port: int,
    user: ServerUser | None,
    reached: Reached = Reached(),
) -> str:
    """The guest's configuration: all the agent gets. `store`: what `stores.serve` gave."""
    via = "" if reached.report_root is None else f"report_root = {json.dumps(str(reached.report_root))}\n"
    attester = 'attester = "sample"' if tee is Tee.SAMPLE else f'attester = "simulated-{tee.value}"'
    if reached.api_server is not None:
        attester = f'attester = "simulated-coco"\ncoco_url = "{reached.api_server}"'
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in store.items())
    if user is None:
        server_user = ""
    elif user.uid == 0:
        server_user = "unsafe_run_as_root = true\n"
    else:
        server_user = f"uid = {user.uid}\ngid = {user.gid}\n"
    return f"""\
schema = "keyturn/v1"

[tee]
{attester}

[simulation]
machine = {json.dumps(str(machine.directory))}
{via}
[gpu]
count = {machine.gpu.count}
switches = {machine.gpu.switches}
ready_state = "own"

[broker]
{broker_section}key_uri = "{KEY_URI}"
allow_simulated = true

[artifact]
{settings}
manifest_digest = "{model.manifest_digest}"
min_version = {MODEL_VERSION}
destination = "auto"
unsafe_allow_swap = true

[server]
preset = "llama-cpp"
command = {json.dumps(SERVER_COMMAND)}
port = {server_port}
model_id = "{MODEL_ID}"
probe = "embedding"
ready_timeout_s = 60
{server_user}"""
