"""A whole world for one boot: silicon, broker process, sealed model, configuration, and the agent as its own process.

Nothing of the product is replaced: the broker is `keyturn broker`, the agent is `keyturn run`, evidence is in the real
formats and only its silicon is simulated. The model server is `tests/tiny_server.py`.
"""

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from agent.artifact.seal import seal_model
from agent.artifact.signature import public_pem
from agent.broker import bootstrap
from agent.cose import PrivateKey
from agent.evidence import NO_REPORT_DATA, Tee
from agent.guest.initdata import fit
from agent.server.presets import command_digest
from agent.sim.api_server_rest import Components, serve
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_td_report
from agent.sim.trustee import Trustee
from tests import bucket
from tests.test_handshake_ear import SERVICE, payload, signed, submod
from tests.tls import pem

KEY_URI = "kbs:///models/tiny/1"
CREDENTIALS_URI = "kbs:///models/store/1"
KEY = bytes(range(100, 132))
MODEL_BYTES = 3 * (1 << 20) + 12345
DEADLINE_S = 60
_TINY_SERVER = Path(__file__).with_name("tiny_server.py")


_MAX_CLAIMS = 64
"""More than one test asks for."""
_claims: deque[socket.socket] = deque()


def free_port() -> int:
    """A port of 127.0.0.1 that stays free until somebody listens there who was told its number.

    Not one that the kernel picks: it would give that to the next connection, or the next server on port 0, of any test beside
    this one. And the number is claimed on 127.0.0.2, so that no other test process chooses it.
    """
    first_picked = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(first_picked, 20_000))
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.2", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        if len(_claims) > _MAX_CLAIMS:
            _claims.popleft().close()
        return port


def others_can_execute(path: str) -> bool:
    """May a user who is nobody special run this program?"""
    real = Path(path).resolve()
    steps = [*Path(path).absolute().parents, *real.parents]
    return all(step.stat().st_mode & stat.S_IXOTH for step in steps) and bool(real.stat().st_mode & stat.S_IXOTH)


@dataclass
class Outcome:
    """What an agent process left behind."""

    status: int
    events: list[dict[str, Any]]
    termination: str

    @property
    def failure(self) -> dict[str, Any]:
        return next(event for event in self.events if event["event"] == "failed")

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


class World:
    """Change the public fields before `boot`."""

    def __init__(
        self,
        folder: Path,
        silicon: Path,
        undo: ExitStack,
        gpus: int = 1,
        switches: int = 0,
        files: int = 1,
        model_bytes: int = MODEL_BYTES,
        given: bytes | dict[str, bytes] | None = None,
        key: bytes = KEY,
        stem: str = "model",
        tee: Tee = Tee.SNP,
        signing_key: PrivateKey | None = None,
    ) -> None:
        self.folder = folder
        self.undo = undo
        self.machine = SimulatedMachine.create(folder / "machine", gpus=gpus, switches=switches, silicon=silicon)
        self.silicon = silicon
        self.port, self.broker_port = free_port(), free_port()
        self.behaviour = "serve"
        names = [f"{stem}-{i}.gguf" if files > 1 else f"{stem}.gguf" for i in range(files)]
        self.model = given if isinstance(given, dict) else {name: given or os.urandom(model_bytes) for name in names}
        source = folder / "source"
        for name, data in self.model.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        self.layout = folder / "layout"
        self.manifest_digest = self.seal(3, signing_key, key)
        self.broker = bootstrap.create(folder / "broker", "kbs.test", datetime.now(UTC))
        key_file = folder / "broker" / "keys" / KEY_URI.removeprefix("kbs:///")
        key_file.parent.mkdir(parents=True, exist_ok=True)
        key_file.write_bytes(key)
        key_file.chmod(0o600)
        self.key_file = key_file
        self.tee: dict[str, Any] = {"attester": f"simulated-{tee.value}"}
        self.gpu: dict[str, Any] = {"count": gpus, "switches": switches}
        self.broker_config: dict[str, Any] = {
            "endpoints": [f"127.0.0.1:{self.broker_port}"],
            "server_name": "kbs.test",
            "ca_pem": self.broker.ca_pem,
            "token_keys": [self.broker.token_key_pem],
            "key_uri": KEY_URI,
            "timeout_s": 20,
            "allow_simulated": True,
        }
        self.artifact: dict[str, Any] = {"source": str(self.layout), "manifest_digest": self.manifest_digest, "min_version": 1}
        if signing_key:
            del self.artifact["manifest_digest"]
            self.artifact |= {"provider_keys": [public_pem(signing_key)], "tag": "tiny-v3", "name": "tiny"}
        model = "{model}" if files == 1 else f"{{model_dir}}/{stem}-1.gguf"
        self.server: dict[str, Any] = {
            "preset": "custom",
            "command": [sys.executable, "-I", str(_TINY_SERVER), model, str(self.port), self.behaviour],
            "port": self.port,
            "health_path": "/health",
            "model_id": "tiny",
            "probe": "embedding",
            "ready_timeout_s": 30,
            "stop_timeout_s": 5,
        }
        if os.geteuid() == 0 and not (others_can_execute(sys.executable) and others_can_execute(str(_TINY_SERVER.parent))):
            self.server["unsafe_run_as_root"] = True
        self.row: dict[str, Any] = {
            "key_uri": KEY_URI,
            "release_channel": "test",
            "revoked": False,
            "not_after": datetime(2100, 1, 1, tzinfo=UTC),
            "min_model_version": 1,
            "manifest_digests": [{"id": "tiny-v3", "value": self.manifest_digest}],
        }
        self.row_snp: dict[str, Any] = {
            "measurements": [{"id": "image-1", "value": self.machine.measurement.hex()}],
            "minimum_tcb": [{"id": "tcb-1", "product": "Genoa", "bootloader": 0, "tee": 0, "snp": 0, "microcode": 0}],
            "debug": False,
            "vmpl": 0,
        }
        td = make_td_report(self.machine, NO_REPORT_DATA).body
        self.row_tdx: dict[str, Any] = {
            "mr_td": [{"id": "firmware-1", "value": td.mr_td.hex()}],
            "rtmr_1": [{"id": "loader-1", "value": td.rtmr_1.hex()}],
            "rtmr_2": [{"id": "kernel-1", "value": td.rtmr_2.hex()}],
            "minimum_tee_tcb_svn": {"id": "module-1", "value": td.tee_tcb_svn.hex()},
            "tcb": ["not_evaluated"],
        }
        self.row_tee = tee
        """Whose section the row has."""
        self.row_gpu: dict[str, Any] = {"count": gpus}
        if gpus:
            self.row_gpu |= {
                "driver_versions": [{"id": "driver-1", "value": self.machine.gpu.driver_version}],
                "vbios_versions": [{"id": "vbios-1", "value": self.machine.gpu.vbios_version}],
                "modes": ["cc"],
                "ready": False,
            }
        self.upstream_flags: list[str] = []
        if switches:
            vbios = self.machine.gpu.switch_vbios_version
            self.row_gpu |= {"modes": ["ppcie"], "switch_vbios_versions": [{"id": "switch-1", "value": vbios}]}
        self.broker_flags = ["--unsafe-simulation-roots", str(silicon)]
        self.cwd: Path | None = None
        """Where the agent is started; None: where we are."""
        self.host_data: bytes | None = None
        """What the guest is launched with; None: the digest of its configuration."""

    def seal(self, version: int, signing_key: PrivateKey | None = None, key: bytes = KEY) -> str:
        """Another version into the layout. Returns the digest of its manifest."""
        keys = [signing_key] if signing_key else []
        return seal_model(self.folder / "source", self.layout, key, KEY_URI, "tiny", version, lambda *_: None, keys)

    # --- credentials from the broker ----------------------------------------------------------------------------------

    def keep_credentials(self, secret: str = bucket.SECRET, **more: object) -> bytes:
        """The model lies in a bucket that checks signatures, and the broker has what opens it; gives that resource."""
        store = self.undo.enter_context(bucket.Bucket(self.layout))
        self.artifact |= {"source": f"s3://models/{bucket.PREFIX}", "endpoint": store.url, "region": bucket.REGION}
        return self.broker_has({"user": bucket.KEY_ID, "secret": secret, "session_token": bucket.TOKEN} | more)

    def broker_has(self, credentials: dict[str, object] | bytes) -> bytes:
        """What lies at `artifact.credentials_uri`, which the row of the key names."""
        resource = credentials if isinstance(credentials, bytes) else json.dumps(credentials).encode()
        self.credentials_file = self.key_file.parents[2] / CREDENTIALS_URI.removeprefix("kbs:///")
        self.credentials_file.parent.mkdir(parents=True, exist_ok=True)
        self.credentials_file.write_bytes(resource)
        self.credentials_file.chmod(0o600)
        self.artifact["credentials_uri"] = self.row["credentials_uri"] = CREDENTIALS_URI
        return resource

    # --- CoCo ---------------------------------------------------------------------------------------------------------

    def through_coco(self) -> Components:
        """Evidence and nothing else comes from an api-server-rest; gives what is behind it."""
        components = Components.of(self.machine, self.row_tee)
        url = self.undo.enter_context(serve(components))
        self.tee = {"attester": "simulated-coco", "coco_url": url}
        return components

    def key_from_cdh(self) -> Components:
        """The key comes from there too, and a token under a pinned key; no broker of ours is asked."""
        components = self.through_coco()
        components.token = self.coco_token
        components.resources = {KEY_URI.removeprefix("kbs:///"): self.key_file.read_bytes()}
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        service = SERVICE.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
        self.broker_config = {"cdh": True, "token_keys": [service], "key_uri": KEY_URI, "allow_simulated": True}
        return components

    def coco_token(self) -> str:
        """What Trustee's attestation service says of this machine."""
        now = int(time.time())
        gpus = {f"gpu{number}": submod("nvidia", {}) for number in range(self.machine.gpu.count)}
        submods = {"cpu0": submod(self.row_tee.value, {}, init_data=self.machine.host_data.hex())} | gpus
        return signed(payload(**submods) | {"iat": now, "exp": now + 300})

    # --- Trustee ------------------------------------------------------------------------------------------------------

    def behind_a_relay(self) -> Trustee:
        """Our broker is a relay before a test KBS that has the key; gives that KBS."""
        from tests.relay_site import CA, UPSTREAM_NAME, upstream

        kbs = self.undo.enter_context(upstream(self.machine, KEY_URI, self.key_file.read_bytes()))
        (self.folder / "upstream.pem").write_bytes(pem(CA))
        self.upstream_flags = ["--upstream", kbs.url, "--upstream-ca", str(self.folder / "upstream.pem")]
        self.upstream_flags += ["--upstream-server-name", UPSTREAM_NAME]
        self.broker_config |= {"tokens": "trustee", "token_keys": [kbs.token_key_pem]}
        return kbs

    # --- files --------------------------------------------------------------------------------------------------------

    def set_behaviour(self, behaviour: str) -> None:
        self.server["command"][-1] = behaviour

    def write_config(self) -> Path:
        sections = {
            "tee": self.tee,
            **(
                {"simulation": {"machine": str(self.machine.directory)}}
                if self.tee["attester"].startswith("simulated-")
                else {}
            ),
            "gpu": self.gpu,
            "broker": self.broker_config,
            "artifact": self.artifact,
            **({"server": self.server} if self.server else {}),
        }
        path = self.folder / "keyturn.toml"
        path.write_text('schema = "keyturn/v1"\n' + "".join(f"[{name}]\n{_toml(body)}" for name, body in sections.items()))
        return path

    def write_policy(self) -> Path:
        text = 'schema = "keyturn-policy/v1"\nversion = "7"\n'
        if self.row:
            section = self.row_tdx if self.row_tee is Tee.TDX else self.row_snp
            text += f"[[row]]\n{_toml(self.row)}[row.{self.row_tee.value}]\n{_toml(section)}[row.gpu]\n{_toml(self.row_gpu)}"
        path = self.folder / "policy.toml"
        path.write_text(text)
        return path

    # --- processes ----------------------------------------------------------------------------------------------------

    def start_broker(self) -> None:
        made = self.folder / "broker"
        command = [sys.executable, "-m", "agent", "broker", "--listen", f"127.0.0.1:{self.broker_port}"]
        command += ["--tls-cert", str(made / "tls.pem"), "--tls-key", str(made / "tls.key")]
        command += ["--audit", str(self.folder / "audit.jsonl")]
        if self.upstream_flags:
            command += self.upstream_flags
        else:
            command += ["--policy", str(self.write_policy()), "--keys", str(made / "keys")]
            command += ["--token-key", str(made / "token.key"), *self.broker_flags]
        self.broker_process = process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout and process.stderr
        self.undo.callback(process.stderr.close)
        self.undo.callback(process.stdout.close)
        self.undo.callback(process.wait, DEADLINE_S)
        self.undo.callback(process.terminate)
        assert json.loads(process.stdout.readline())["event"] == "listening"
        assert json.loads(process.stderr.readline())["event"] == ("upstream" if self.upstream_flags else "policy_loaded")

    def reload_policy(self) -> None:
        """What the row says now is what the running broker goes by."""
        self.write_policy()
        self.broker_process.send_signal(signal.SIGHUP)
        assert self.broker_process.stderr
        assert json.loads(self.broker_process.stderr.readline())["event"] == "policy_loaded"

    def kill_broker(self) -> None:
        self.broker_process.kill()
        self.broker_process.wait(DEADLINE_S)

    def audit(self) -> list[tuple[str, str, str | None]]:
        """(step, decision, claim or reason) of every audit line."""
        path = self.folder / "audit.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(line["step"], line["decision"], line["claim"] or line["reason"]) for line in lines]

    def start(
        self,
        *,
        broker: bool = True,
        flags: tuple[str, ...] = (),
        wrapper: tuple[str, ...] = (),
        status_file: str | None = "",
        initdata: str | None = None,
    ) -> "Agent":
        """The agent as its own process, on a guest launched with the digest of its configuration.

        Args:
            broker: whether there is one.
            flags: more of `keyturn run`.
            wrapper: a command that runs the agent.
            status_file: None: the agent's default; "": one in our folder; else its path.
            initdata: the algorithm of an initdata document that carries the configuration; None: the plain file.
        """
        config = self.prepare(initdata)
        if broker:
            self.start_broker()
        return self.start_agent(config, flags=flags, wrapper=wrapper, status_file=status_file, initdata=initdata)

    def prepare(self, initdata: str | None = None) -> Path:
        """Write the configuration, and launch the guest with its digest. Arguments and their meaning: see `start`."""
        config = self.write_config()
        if initdata:
            config = self.write_initdata(config, initdata)
        is_td = self.tee["attester"] == "simulated-tdx" or (self.tee["attester"].endswith("coco") and self.row_tee is Tee.TDX)
        length = 48 if is_td else 32
        self.launch(fit(hashlib.new(initdata or "sha256", config.read_bytes()).digest(), length))
        return config

    def start_agent(
        self,
        config: Path,
        *,
        flags: tuple[str, ...] = (),
        wrapper: tuple[str, ...] = (),
        status_file: str | None = "",
        initdata: str | None = None,
    ) -> "Agent":
        """The agent on what `prepare` wrote; see `start`."""
        if status_file is not None:
            flags = ("--status-file", status_file or str(self.folder / "status" / "status.json"), *flags)
        source = "--initdata" if initdata else "--config"
        command = [*wrapper, sys.executable, "-m", "agent", "run", "--termination-log", str(self.folder / "termination")]
        return Agent(self.folder, self.undo, [*command, source, str(config), *flags], self.cwd)

    def write_initdata(self, config: Path, algorithm: str) -> Path:
        """An initdata document with the configuration in it."""
        path = self.folder / "initdata.toml"
        entry = f"'keyturn.toml' = {json.dumps(config.read_text())}\n"
        path.write_text(f"version = '0.1.0'\nalgorithm = '{algorithm}'\n[data]\n{entry}")
        return path

    def launch(self, digest: bytes) -> None:
        """The guest as it is launched with this digest, as long as the field of its TEE, and a policy that expects it."""
        if self.row and self.gpu["count"]:
            argv = command_digest(tuple(self.server.get("command", ())))
            self.row.setdefault("server_command_digests", [{"id": "argv-1", "value": argv}])
        self.row_snp.setdefault("host_data", [{"id": "config-1", "value": fit(digest, 32).hex()}])
        self.row_tdx.setdefault("mr_config_id", [{"id": "config-1", "value": fit(digest, 48).hex()}])
        self.machine.host_data = self.host_data or digest
        self.machine.save()

    def boot(self, *, broker: bool = True) -> "Outcome":
        """A boot that is expected to end by itself."""
        return self.start(broker=broker).wait()


class Agent:
    """A running `keyturn run`."""

    def __init__(self, folder: Path, undo: ExitStack, command: list[str], cwd: Path | None = None) -> None:
        self.termination_log = folder / "termination"
        self.status_file = folder / "status" / "status.json"
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd)
        self.events: list[dict[str, Any]] = []
        undo.callback(self._kill)

    def wait_for(self, name: str) -> dict[str, Any]:
        """The next event of this name. The agent's end is an error."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name} in {self.events}")

    def stop(self, number: int = signal.SIGTERM) -> "Outcome":
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> "Outcome":
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        assert stdout == b"", "the agent says nothing on stdout"
        self.events += [json.loads(line) for line in stderr.splitlines()]
        termination = self.termination_log.read_text() if self.termination_log.exists() else ""
        return Outcome(self.process.returncode, self.events, termination)

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def ask(port: int, path: str) -> dict[str, Any]:
    """GET a JSON answer of the model server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()


def ask_until(port: int, path: str) -> dict[str, Any]:
    """The same, from the first moment that somebody answers."""
    while True:
        try:
            return ask(port, path)
        except ConnectionRefusedError:
            continue


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return value.isoformat() if isinstance(value, datetime) else json.dumps(value)
