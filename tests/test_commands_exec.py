"""`keyturn exec` in the container of a server, after a real `keyturn load`: what is served is what the receipt says.

The folder is mounted read-only in a mount namespace of the test's, as a pod's second container has it.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent import cose
from agent.artifact.given import BOOT_ID, MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME, folder_digest
from agent.closed import Ident
from agent.commands.exec import MAX_ENVIRONMENT_BYTES, NOT_HANDED_ON, check_statement, environment_of_server
from agent.config import parse as parse_config
from agent.errors import ReceiptError, ServerStartError
from agent.evidence import Tee
from agent.modes import Mode
from agent.receipt import NotHeld, ReadyState, parse_receipt, sign_receipt
from agent.sim.api_server_rest import Components
from agent.sim.machine import SimulatedMachine
from tests.test_commands_load import load, loads
from tests.test_receipt import RECEIPT, STATEMENT
from tests.world import DEADLINE_S, World

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="only root mounts a folder read-only",
)

SERVER = """
import json, os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "environment": dict(os.environ), "no_new_privs": status["NoNewPrivs"], "pid": os.getpid(),
    "limits": [line for line in open("/proc/self/limits") if "core" in line][0].split()[4:6],
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)),
}))
"""


CONFIG = b"""schema = "keyturn/v1"
[tee]
attester = "coco"
[gpu]
count = 1
ready_state = "preset"
[broker]
cdh = true
key_uri = "kbs:///models/tiny/1"
[artifact]
source = "/models"
manifest_digest = "sha256:5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
name = "tiny"
min_version = 3
destination = "directory"
directory = "/run/model"
"""


@dataclass
class Left:
    """What `keyturn load` left, and the guest it did so in."""

    world: World
    out: Path
    components: Components | None
    tee: Tee = Tee.SNP

    @property
    def model(self) -> Path:
        return self.out / PUBLISHED_NAME


@dataclass
class Said:
    status: int
    out: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def problem(self) -> tuple[str, Any]:
        (failed,) = [event for event in self.events if event["event"] == "failed"]
        return failed["class"], failed["fields"].get("problem")


@pytest.fixture
def out() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture(params=[Tee.SNP, Tee.TDX], ids=["snp", "tdx"])
def left(request: pytest.FixtureRequest, tmp_path: Path, silicon: Path, out: Path) -> Iterator[Left]:
    """In a CoCo guest: evidence, key and log are the guest's own components'."""
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, files=2, tee=request.param)
        components = world.key_from_cdh()
        loads(world, out)
        assert load(world, out)[0] == 0
        yield Left(world, out, components, request.param)


@pytest.fixture
def snp(tmp_path: Path, silicon: Path, out: Path) -> Iterator[Left]:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, files=2)
        components = world.key_from_cdh()
        loads(world, out)
        assert load(world, out)[0] == 0
        yield Left(world, out, components)


def become(left: Left, *command: str, mount: str = "ro", config: Path | None = None, env: dict[str, str] | None = None) -> Said:
    """`keyturn exec` where the folder is mounted another time."""
    place = left.world.folder / "mounted"
    place.mkdir(exist_ok=True)
    script = 'mount --bind "$1" "$2" && mount -o "remount,bind,$3" "$2" && shift 3 && exec "$@"'
    agent = [sys.executable, "-m", "agent", "exec", "--config", str(config or left.world.folder / "keyturn.toml")]
    agent += ["--dir", str(place), "--", *(command or (sys.executable, "-I", "-c", SERVER))]
    arguments = ["unshare", "-m", "sh", "-c", script, "sh", str(left.out), str(place), mount, *agent]
    done = subprocess.run(arguments, capture_output=True, timeout=DEADLINE_S, env={**os.environ, **(env or {})})
    out = json.loads(done.stdout) if done.stdout else {}
    return Said(done.returncode, out, [json.loads(line) for line in done.stderr.splitlines()])


# --- what must work ---------------------------------------------------------------------------------------------------


def test_what_load_left_is_served(left: Left) -> None:
    said = become(left)
    assert said.status == 0, said
    (checked,) = said.events
    receipt = parse_receipt((left.out / RECEIPT_NAME).read_bytes())
    assert checked == {
        "event": "receipt_checked",
        "sha256": checked["sha256"],
        "version": 3,
        "files": 2,
        "same_guest": True,
        "simulated": True,
    }
    assert receipt.statement.manifest_digest == left.world.manifest_digest
    assert {NotHeld.POD_EVIDENCE, NotHeld.GUEST_ATTESTED, NotHeld.SERVER} <= set(receipt.statement.not_held)
    assert (receipt.statement.gpus, receipt.statement.gpu_ready) == (1, ReadyState.PRESET)
    assert (receipt.unmeasured is None) == (left.tee is Tee.TDX)


def test_the_receipt_lies_beside_the_model_for_everybody_to_read_and_nobody_to_write(snp: Left) -> None:
    assert sorted(os.listdir(snp.out)) == sorted([MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME])
    assert stat.S_IMODE((snp.out / RECEIPT_NAME).stat().st_mode) == 0o444


def test_without_the_guests_components_the_evidence_is_genuine(tmp_path: Path, silicon: Path, out: Path) -> None:
    """Devices in the init container: what comes with the receipt is all that the server's container has."""
    own = shutil.copytree(silicon, tmp_path / "silicon")  # a root of it is exchanged below
    with ExitStack() as undo:
        world = World(tmp_path, own, undo)
        loads(world, out)
        world.prepare()
        world.start_broker()
        assert load(world, out)[0] == 0
        left = Left(world, out, None)
        said = become(left)
        assert said.status == 0, said
        assert said.events[0]["same_guest"] is False
        shutil.copy(world.machine.roots_dir / "sgx-root.pem", world.machine.roots_dir / "ark.pem")
        assert become(left).problem[0] == "EvidenceVerificationError"


def test_the_server_has_no_cores_no_new_privileges_and_no_descriptors_of_ours(snp: Left) -> None:
    said = become(snp)
    assert said.out["no_new_privs"] == "1"
    assert said.out["limits"] == ["1", "1"]
    assert said.out["descriptors"] == [0, 1, 2]


def test_the_server_keeps_the_containers_environment_but_for_what_looks_into_it(snp: Left) -> None:
    given = {
        "CUDA_HOME": "/usr/local/cuda",
        "LD_LIBRARY_PATH": "/opt/lib",
        "HF_HUB_OFFLINE": "0",
        "PATH": "/opt/bin:/usr/bin:/bin",
    }
    said = become(snp, env={**given, "SSLKEYLOGFILE": "/tmp/keys", "LD_DEBUG_OUTPUT": "/tmp/debug"})
    environment = said.out["environment"]
    assert {name: environment.get(name) for name in given} == given
    assert not {*NOT_HANDED_ON, "KEYTURN_GIVEN", "KEYTURN_CLEANED"} & environment.keys()
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_the_server_ignores_no_signal(snp: Left) -> None:
    """Python ignores SIGPIPE, and what is ignored stays so: a pipe of the server's would never end."""
    said = become(snp, "/bin/sh", "-c", """printf '{"ignored": "%s"}' $(sed -n 's/SigIgn:.//p' /proc/self/status)""")
    status = Path("/proc/self/status").read_text()
    inherited = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # this process's own; the rest is of whoever started the tests
        inherited &= ~(1 << (number - 1))
    assert int(said.out["ignored"], 16) & ~inherited == 0


def test_variables_that_look_into_a_process_are_not_handed_on() -> None:
    given = dict.fromkeys(NOT_HANDED_ON, "x") | {"A": "b=c"}
    made = environment_of_server(given)
    assert made["A"] == "b=c"
    assert not set(NOT_HANDED_ON) & made.keys()


def test_an_environment_that_is_too_long_is_refused_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, error in ((MAX_ENVIRONMENT_BYTES, None), (MAX_ENVIRONMENT_BYTES + 1, errno.E2BIG)):
        descriptor = os.memfd_create("environment")
        os.write(descriptor, b"A=".ljust(length - 1, b"x") + b"\0")
        monkeypatch.setenv("KEYTURN_GIVEN", str(descriptor))
        if error is None:
            assert len(environment_of_server()["A"]) == length - 3
            continue
        with pytest.raises(ServerStartError) as caught:
            environment_of_server()
        assert caught.value.code == error


def test_a_server_that_is_not_there_is_the_developers(snp: Left) -> None:
    said = become(snp, "/no/such/server")
    assert (said.status, said.problem[0]) == (30, "ServerStartError")


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(said: Said, problem: str) -> None:
    assert (said.status, said.problem[0], said.out) == (24, "ReceiptError", {}), said
    assert said.problem[1].startswith(problem), said.problem


def test_a_folder_that_can_be_written_is_refused(snp: Left) -> None:
    refused(become(snp, mount="rw"), "the folder is mounted so")


def test_without_a_receipt_nothing_is_served(snp: Left) -> None:
    (snp.out / RECEIPT_NAME).unlink()
    refused(become(snp), "none lies beside")


def test_a_file_more_or_less_or_of_another_size_is_refused(snp: Left) -> None:
    file = min(snp.model.iterdir())
    content = file.read_bytes()
    more = snp.model / "more"
    file.unlink()
    refused(become(snp), "the folder does not hold")
    file.write_bytes(content[:-1])
    file.chmod(0o440)
    refused(become(snp), "the folder does not hold")
    file.write_bytes(content)
    more.write_bytes(b"x")
    more.chmod(0o440)
    refused(become(snp), "the folder does not hold")
    more.unlink()
    assert become(snp).status == 0


def test_a_copy_of_the_folder_is_refused(left: Left) -> None:
    """Whoever has receipt and sizes may bring such a folder: a file's bytes are not looked at."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        copy = Path(place)
        shutil.copytree(left.out, copy, dirs_exist_ok=True)
        file = min((copy / PUBLISHED_NAME).iterdir())
        file.write_bytes(bytes(file.stat().st_size))
        refused(become(dataclasses.replace(left, out=copy)), "it is of another folder")


def test_a_folder_is_known_by_kernel_device_and_inode(out: Path, tmp_path: Path) -> None:
    def digest(path: Path, boot_id_file: str = BOOT_ID) -> bytes:
        folder = os.open(path, os.O_RDONLY)
        try:
            return folder_digest(folder, boot_id_file)
        finally:
            os.close(folder)

    (out / "below").mkdir()
    (tmp_path / "boot_id").write_text("00000000-0000-4000-8000-000000000000\n")
    first = digest(out)
    assert first == digest(out)
    assert digest(out / "below") != first
    status = out.stat()
    numbers = status.st_dev.to_bytes(8) + status.st_ino.to_bytes(8)
    other = digest(out, str(tmp_path / "boot_id"))
    assert other == hashlib.sha256(b"00000000-0000-4000-8000-000000000000" + numbers).digest() != first


def forge(left: Left, *, vouched: bool, **changes: Any) -> None:
    """Another receipt beside the model, of its own key; `vouched`: with evidence over it, as any container gets it."""
    path = left.out / RECEIPT_NAME
    receipt = parse_receipt(path.read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    statement = dataclasses.replace(receipt.statement, **changes)
    receipt = dataclasses.replace(receipt, statement=statement, key=cose.spki(key.public_key()))
    if vouched:
        receipt = dataclasses.replace(receipt, evidence=left.world.machine.attester(left.tee).collect(receipt.report_data()))
    path.unlink()
    path.write_bytes(sign_receipt(receipt, key))


def test_evidence_that_does_not_cover_the_receipt_is_refused(left: Left) -> None:
    forge(left, vouched=False)
    refused(become(left), "its evidence covers another key")


def test_a_receipt_of_this_guest_about_something_else_is_refused(snp: Left) -> None:
    forge(snp, vouched=True)
    assert become(snp).status == 0, "the forger's is as good as ours: not_held says pod-evidence"
    forge(snp, vouched=True, mode=Mode.GUEST)
    refused(become(snp), "it is not of a boot")


def test_a_mount_inside_the_model_is_refused(snp: Left) -> None:
    """Over one file, of the same size, in the server's container alone."""
    file = min(snp.model.iterdir())
    other = snp.world.folder / "other"
    shutil.copy(file, other)
    other.chmod(0o440)
    script = 'mount --bind "$1" "$1" && mount --bind "$2" "$3" && mount -o remount,bind,ro "$1" && shift 3 && exec "$@"'
    agent = [sys.executable, "-m", "agent", "exec", "--config", str(snp.world.folder / "keyturn.toml"), "--", "/bin/true"]
    arguments = ["unshare", "-m", "sh", "-c", script, "sh", str(snp.out), str(other), str(file), *agent]
    done = subprocess.run(arguments, capture_output=True, timeout=DEADLINE_S)
    refused(Said(done.returncode, {}, [json.loads(line) for line in done.stderr.splitlines()]), "the folder does not hold")


STATEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "simulated": ({"simulated": True}, "it is of simulated silicon"),
    "mode": ({"mode": Mode.GUEST}, "it is not of a boot"),
    "config": ({"config_digest": bytes(32)}, "it is of a guest with another configuration"),
    "no config": ({"config_digest": b""}, "it is of a guest with another configuration"),
    "manifest": ({"manifest_digest": "sha256:" + "00" * 32}, "it is of another model"),
    "name": ({"model_name": Ident("other")}, "it is of another model"),
    "key": ({"key_uri": Ident("kbs:///models/other/1")}, "it is of another model"),
    "version": ({"model_version": 2}, "its model is older"),
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_statement_about_something_else_is_refused(what: str) -> None:
    changes, problem = STATEMENTS[what]
    measured = parse_config(CONFIG)
    statement = dataclasses.replace(STATEMENT, config_digest=measured.digest)
    check_statement(dataclasses.replace(RECEIPT, statement=statement), measured)
    changed = dataclasses.replace(RECEIPT, statement=dataclasses.replace(statement, **changes))
    with pytest.raises(ReceiptError) as caught:
        check_statement(changed, measured)
    assert caught.value.problem.value.startswith(problem)


def test_a_simulated_receipt_needs_a_configuration_that_allows_it() -> None:
    measured = parse_config(CONFIG.replace(b"cdh = true", b"cdh = true\nallow_simulated = true"))
    statement = dataclasses.replace(STATEMENT, config_digest=measured.digest, simulated=True)
    check_statement(dataclasses.replace(RECEIPT, statement=statement), measured)


def test_a_receipt_of_another_guest_is_refused(left: Left, silicon: Path, tmp_path: Path) -> None:
    """It has the same image and the same configuration, and another chip or another log."""
    assert left.components
    other = SimulatedMachine.create(tmp_path / "other", gpus=1, silicon=silicon, host_data=left.world.machine.host_data)
    left.components.__dict__.update(Components.of(other, left.tee).__dict__)
    refused(become(left), "it is of another guest")


def test_a_guest_that_was_launched_with_another_configuration_is_refused(tmp_path: Path, silicon: Path, out: Path) -> None:
    """Another configuration than the receipt's is found by the statement; here the two agree, and the TEE does not."""
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo)
        world.key_from_cdh()
        loads(world, out)
        assert load(world, out)[0] == 0
        (world.folder / "keyturn.toml").write_text((world.folder / "keyturn.toml").read_text() + "\n# another\n")
        said = become(Left(world, out, None))
        assert (said.status, said.problem[0]) == (10, "ConfigNotMeasuredError")


def test_a_configuration_that_leaves_nothing_to_others_is_refused(snp: Left, tmp_path: Path) -> None:
    text = (snp.world.folder / "keyturn.toml").read_text()
    with_server = tmp_path / "server.toml"
    with_server.write_text(text + '[server]\npreset = "custom"\ncommand = ["x"]\nport = 1\n')
    elsewhere = tmp_path / "elsewhere.toml"
    lines = [line for line in text.splitlines() if not line.startswith(("directory", "destination"))]
    elsewhere.write_text("\n".join(lines))
    for config in (with_server, elsewhere):
        said = become(snp, config=config)
        assert (said.status, said.problem[0], said.out) == (10, "ConfigError", {})


def test_a_signal_ends_the_server_itself(snp: Left) -> None:
    """Nothing of ours stands between them."""
    said = become(snp, sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert said.status == -signal.SIGTERM


@pytest.mark.parametrize("flags", [["--config", "/x"], ["--", "server"]])
def test_it_wants_a_configuration_and_a_server(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "agent", "exec", *flags], capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 2
