"""The container image as it is shipped: its layout, and containers of it as the manifests of deploy/ start them.

Nothing of a TEE is in these containers: no configfs, no device, no GPU. CoCo's API is the stand-in of `agent/sim`, on the
loopback of the pod. What a mode does not hold (`agent/modes.py`) is shown here as a fact. Builds, so it runs where
KEYTURN_BUILD is set.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from agent.artifact.given import MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME
from agent.evidence import Tee
from agent.guest.memory_info import MACHINE
from agent.modes import Unheld
from tests import nvml_emulation, pod
from tests.children import python
from tests.pod import Pod, Running
from tests.products import Layout
from tests.range_server import RangeServer
from tests.registry import DockerRegistry
from tests.world import DEADLINE_S, World, ask, free_port

pytestmark = pytest.mark.skipif("KEYTURN_BUILD" not in os.environ, reason="builds for half a minute: set KEYTURN_BUILD=1")
in_containers = pytest.mark.skipif(pod.missing() is not None, reason=str(pod.missing()))
KEYTURN = "/opt/keyturn/keyturn"
TINY_SERVER = Path(__file__).with_name("tiny_server.py")
FS_GROUP = 65532


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(products: Path) -> Layout:
    (folder,) = products.glob("*-image")
    return Layout(folder)


@pytest.fixture(scope="module")
def layers(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is below /etc, and /opt/keyturn."""
    top = tmp_path_factory.mktemp("layers")
    return layout.unpack(top / "base", 0), layout.unpack(top / "own", 1)


def skopeo(*arguments: str) -> str:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True, timeout=DEADLINE_S).stdout


def test_every_descriptor_is_of_its_blob_and_every_blob_has_one(layout: Layout) -> None:
    descriptors = [*layout.index["manifests"]]
    for manifest in [*descriptors]:
        inside = layout.json(manifest)
        descriptors += [inside["config"], *inside["layers"]]
    for descriptor in descriptors:
        data = layout.blob(descriptor)
        assert descriptor["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert descriptor["size"] == len(data)
    named = {descriptor["digest"].removeprefix("sha256:") for descriptor in descriptors}
    assert {path.name for path in (layout.folder / "blobs" / "sha256").iterdir()} == named
    sizes = [layer["size"] for layer in layout.manifest["layers"]]
    assert len(sizes) == 2
    assert sum(sizes) <= 90 * 10**6


def test_the_config_says_how_it_is_started_and_nothing_of_where_it_was_made(layout: Layout) -> None:
    config = layout.json(layout.manifest["config"])
    assert config["config"]["Entrypoint"] == [KEYTURN]
    assert (config["config"]["User"], config["config"]["Env"]) == ("0:0", pod.ENVIRONMENT)
    assert {config["created"], *(entry["created"] for entry in config["history"])} == {"2000-01-01T00:00:00Z"}
    labels = config["config"]["Labels"]
    assert {name.removeprefix("org.opencontainers.image.") for name in labels} == {
        "title",
        "version",
        "description",
        "licenses",
    }


def test_the_sbom_refers_to_the_image_and_names_what_is_in_it(layout: Layout) -> None:
    image, sbom = layout.index["manifests"]
    about = layout.json(sbom)
    assert about["artifactType"] == sbom["artifactType"] == about["layers"][0]["mediaType"] == "application/vnd.cyclonedx+json"
    assert about["subject"] == {name: image[name] for name in ("mediaType", "digest", "size")}
    names = {component["name"] for component in layout.json(about["layers"][0])["components"]}
    assert {"libc6", "ca-certificates", "libpython3.11", "grpcio", "cryptography"} <= names
    assert not [name for name in names if name.startswith("linux-image")]


def test_other_hands_read_it_and_a_registry_has_it_under_the_same_digest(layout: Layout, tmp_path: Path) -> None:
    digest, version = layout.index["manifests"][0]["digest"], layout.json(layout.manifest["config"])["config"]["Labels"]
    source = f"oci:{layout.folder}:{version['org.opencontainers.image.version']}"
    seen = json.loads(skopeo("inspect", source))
    assert (seen["Digest"], seen["Architecture"], seen["Os"]) == (digest, "amd64", "linux")
    skopeo("copy", "--quiet", source, f"dir:{tmp_path}/dir")
    with DockerRegistry(tmp_path) as registry:
        into = f"docker://{registry.host}/keyturn"
        skopeo("copy", "--quiet", f"--dest-cert-dir={registry.cert_dir}", source, f"{into}:latest")
        by_digest = json.loads(skopeo("inspect", f"--cert-dir={registry.cert_dir}", f"{into}@{digest}"))
        assert by_digest["Digest"] == digest


def test_it_has_no_shell_and_no_program_but_the_agent_and_its_loader(layers: tuple[Path, Path]) -> None:
    programs = []
    for layer in layers:
        for path in layer.rglob("*"):
            assert path.lstat().st_mtime == 946684800, path
            if path.is_file() and path.stat().st_mode & 0o111:
                programs.append(f"/{path.relative_to(layer)}")
            assert not path.lstat().st_mode & 0o6000
            assert not path.lstat().st_mode & 0o002 or path.name == "tmp"
    assert sorted(name for name in programs if ".so" not in name) == [KEYTURN]
    assert {path.name for path in layers[1].iterdir()} == {"opt"}
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=layers[1] / "opt" / "keyturn", check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its root")
@pytest.mark.parametrize("hostile", [{}, {"LD_LIBRARY_PATH": "/foreign"}])
def test_it_runs_where_there_is_no_glibc_and_where_there_is_another(
    layers: tuple[Path, Path], tmp_path: Path, hostile: dict[str, str]
) -> None:
    """As after COPY --from into an image whose glibc is older, or that has none."""
    subprocess.run(["cp", "-a", f"{layers[1]}/opt", tmp_path], check=True)
    for place in ("foreign", "lib/x86_64-linux-gnu", "lib64"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("libc.so.6", "libz.so.1", "libm.so.6", "ld-linux-x86-64.so.2"):
            (tmp_path / place / name).write_bytes(b"\x7fELF, but not of this world")
    chroot = shutil.which("chroot")
    assert chroot
    done = subprocess.run([chroot, tmp_path, KEYTURN, "doctor", "--json"], env=hostile, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (10, b"")
    failed = {check["check"] for check in json.loads(done.stdout)["checks"] if "error" in check}
    assert failed == {"configuration", "tee"}


# --- pods -------------------------------------------------------------------------------------------------------------


class Site:
    """A pod, its image, and the world around them: CoCo's API, a broker, a store by http."""

    def __init__(self, world: World, pod: Pod, layers: tuple[Path, Path], foreign: Path, model: Path, undo: ExitStack) -> None:
        self.world, self.pod, self.model = world, pod, model
        self.image = layers
        self.server_image = (foreign, layers[1])
        """Somebody's image that took /opt/keyturn."""
        world.through_coco()
        world.tee["attester"] = "coco"
        world.artifact["source"] = undo.enter_context(RangeServer(world.layout)).url
        world.server["command"] = [python(), "-I", "/srv/tiny_server.py", "{model}", str(world.port), "serve"]
        world.server.pop("unsafe_run_as_root", None)
        pod.volumes["model"] = model
        self.health = free_port()

    def loads(self) -> None:
        """As the manifest of `load` has it."""
        self.world.server = {}
        self.gives_a_folder()

    def gives_a_folder(self) -> None:
        self.world.artifact |= {"destination": "directory", "directory": "/run/model"}

    def prepare(self, *, broker: bool = True) -> None:
        document = self.world.prepare("sha384")
        folder = self.world.folder / "configmap"
        folder.mkdir(exist_ok=True)
        shutil.copy(document, folder / "initdata.toml")
        self.pod.volumes["initdata"] = folder
        if broker:
            self.world.start_broker()

    def entrypoint(
        self,
        *,
        mounts_model: bool = False,
        more_mounts: Sequence[Mapping[str, str]] = (),
        read_only_root: bool = False,
        **more: Any,
    ) -> Running:
        """`keyturn run` in the server's image."""
        container = self.pod.container("model-server")
        container["command"] = [re.sub(r"0\.0\.0\.0:8081", f"127.0.0.1:{self.health}", word) for word in container["command"]]
        if mounts_model:
            more_mounts = [*more_mounts, {"name": "model", "mountPath": "/run/model"}]
        container["volumeMounts"] = [*container["volumeMounts"], *more_mounts]
        container["securityContext"] = container["securityContext"] | {"readOnlyRootFilesystem": read_only_root}
        return self.pod.start(container, self.server_image, shown=["/usr"], **more)

    def load(self, more: Mapping[str, str] = MappingProxyType({})) -> Running:
        """`keyturn load` in our own image; `more` volumes stand for what the device interface of the GPUs brings."""
        container = self.pod.container("load")
        mounts = [{"name": name, "mountPath": path} for name, path in more.items()]
        container["volumeMounts"] = [*container["volumeMounts"], *mounts]
        return self.pod.start(container, self.image)

    def consumer(
        self,
        *command: str,
        read_only: bool = True,
        root: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, bytes]:
        """Another program than the server, in the server's container of `load`."""
        container = self.pod.container("model-server")
        container["command"] = list(command)
        container["env"] = [*container["env"], *({"name": name, "value": value} for name, value in environment.items())]
        container["volumeMounts"] = [
            mount | {"readOnly": read_only} if mount["name"] == "model" else mount for mount in container["volumeMounts"]
        ]
        if root:
            container["securityContext"] = {"runAsUser": 0, "capabilities": {"drop": ["ALL"]}}
        return self.pod.run(container, self.server_image, shown=["/usr"])

    def blob(self) -> Path:
        return max((self.world.layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)

    def found(self) -> dict[str, bytes]:
        """What lies in the pod's folder, without the receipt."""
        return {
            str(path.relative_to(self.model)): path.read_bytes()
            for path in sorted(self.model.rglob("*"))
            if path.is_file() and path.name != RECEIPT_NAME
        }


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.fixture
def site(tmp_path: Path, silicon: Path, layers: tuple[Path, Path], undo: ExitStack) -> "Make":
    """Makes the site of a manifest, by its name."""
    if MACHINE.swap_is_active():
        pytest.skip("there is swap, which no real attester may allow")
    foreign = tmp_path / "foreign"
    for name in ("etc", "run", "srv", "tmp", "usr"):
        (foreign / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (foreign / name).symlink_to(f"usr/{name}")
    shutil.copy("/etc/ld.so.cache", foreign / "etc")
    shutil.copy(TINY_SERVER, foreign / "srv")
    # A memory emptyDir, with the group of the pod and its bit, as the kubelet makes it.
    model = Path(undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    os.chown(model, 0, FS_GROUP)
    model.chmod(0o2777)

    def make(manifest: str) -> Site:
        tee = Tee(manifest.rpartition("-")[2])
        world = World(tmp_path / "world", silicon, undo, gpus=int("gpu" in manifest), tee=tee)
        return Site(world, Pod(tmp_path, undo, manifest), layers, foreign, model, undo)

    return make


Make = Callable[[str], Site]


def digest_of(world: World) -> str:
    (data,) = world.model.values()
    return hashlib.sha256(data).hexdigest()


# --- the entrypoint ---------------------------------------------------------------------------------------------------


@in_containers
@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_the_entrypoint_serves_from_a_mount_of_its_own_and_leaves_nothing(site: Make, tee: Tee) -> None:
    it = site(f"entrypoint-{tee.value}")
    it.world.artifact["destination"] = "tmpfs"
    it.prepare()
    running = it.entrypoint()
    running.wait_for("server_ready")
    about = ask(it.world.port, "/about")
    assert (about["sha256"], about["uid"]) == (digest_of(it.world), 65532)
    assert about["model"] == "/run/keyturn/model/model.gguf"
    assert not [name for name in about["environment"] if name.startswith(("LD_", "PYTHON"))]
    assert ask(it.health, "/status")["mode"] == "run"

    seen = Path(f"/proc/{running.pid}/root/run/keyturn/model/model.gguf")  # sealed by its mount, for root as well
    with pytest.raises(OSError, match="Read-only file system"):
        seen.open("r+b")
    assert not list(Path(f"/proc/{running.pid}/root/dev/shm").iterdir())

    outcome = running.stop()
    assert (outcome.status, outcome.names()[-2:]) == (0, ["wiped", "stopped"])
    assert outcome.termination.startswith("keyturn: stopped")
    assert running.files_left() == ["run/keyturn/receipt.cbor", "run/keyturn/status.json"]
    assert it.found() == {}
    assert [step for step, _, _ in it.world.audit()] == ["attest", "release"]


@in_containers
def test_without_the_right_to_mount_the_model_is_a_sealed_memfd_and_scratch_lies_in_the_pods_shared_memory(site: Make) -> None:
    it = site("entrypoint-snp")
    it.prepare()
    running = it.entrypoint(without=["SYS_ADMIN"])
    running.wait_for("server_ready")
    about = ask(it.world.port, "/about")
    number = re.fullmatch(r"/proc/self/fd/([0-9]+)", about["model"])
    assert (about["sha256"], bool(number)) == (digest_of(it.world), True)
    assert number
    (server,) = [pid for pid in running.children() if b"tiny_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    with pytest.raises(PermissionError), Path(f"/proc/{server}/fd/{number[1]}").open("r+b") as memfd:  # for root as well
        memfd.write(b"x")
        memfd.flush()
    shared = Path(f"/proc/{running.pid}/root/dev/shm")
    (scratch,) = shared.iterdir()
    assert (scratch.name.startswith("keyturn-"), stat.S_IMODE(scratch.stat().st_mode)) == (True, 0o700)
    assert os.path.samefile(f"/proc/{server}/root/tmp", f"/proc/{running.pid}/root/tmp")
    with ExitStack() as undo:
        folder = os.open(shared, os.O_RDONLY | os.O_DIRECTORY)
        undo.callback(os.close, folder)
        assert running.stop().status == 0
        assert os.listdir(folder) == []
    assert running.files_left() == ["run/keyturn/receipt.cbor", "run/keyturn/status.json"]


@in_containers
def test_a_mount_of_its_own_without_the_right_to_mount_is_an_error(site: Make) -> None:
    it = site("entrypoint-snp")
    it.world.artifact["destination"] = "tmpfs"
    it.prepare()
    outcome = it.entrypoint(without=["SYS_ADMIN"]).wait()
    assert (outcome.status, outcome.failure["class"]) == (20, "DestinationError")


@in_containers
@pytest.mark.parametrize("run", [False, True])
def test_a_root_for_reading_only_takes_no_mount_of_the_agents_but_another_run_does(
    site: Make, tmp_path: Path, run: bool
) -> None:
    it = site("entrypoint-snp")
    it.world.artifact["destination"] = "tmpfs"
    it.prepare()
    (tmp_path / "run").mkdir()
    it.pod.volumes["run"] = tmp_path / "run"
    running = it.entrypoint(read_only_root=True, more_mounts=[{"name": "run", "mountPath": "/run"}] if run else [])
    if run:
        running.wait_for("server_ready")
        assert running.stop().status == 0
    else:
        outcome = running.wait()
        assert (outcome.status, outcome.failure["class"]) == (20, "DestinationError")


@in_containers
def test_what_a_killed_entrypoint_has_in_a_given_folder_stays_until_the_next_one(site: Make) -> None:
    it = site("entrypoint-snp")
    it.gives_a_folder()
    it.prepare()
    running = it.entrypoint(mounts_model=True)
    running.wait_for("server_ready")
    assert ask(it.world.port, "/about")["model"] == "/run/model/model/model.gguf"
    os.kill(running.pid, signal.SIGKILL)
    running.process.wait(DEADLINE_S)
    assert it.found() == {f"{PUBLISHED_NAME}/model.gguf": it.world.model["model.gguf"]}
    with pytest.raises(ConnectionRefusedError):  # the server went with it
        ask(it.world.port, "/about")

    again = it.entrypoint(mounts_model=True)
    again.wait_for("server_ready")
    assert again.stop().status == 0
    assert os.listdir(it.model) == []


@in_containers
def test_the_bare_image_has_no_server_to_start(site: Make) -> None:
    it = site("entrypoint-snp")
    it.prepare()
    it.server_image = it.image
    outcome = it.entrypoint().wait()
    assert (outcome.status, outcome.failure["class"]) == (30, "ServerStartError")
    assert "wiped" in outcome.names()


@in_containers
@pytest.mark.parametrize(
    ("manifest", "gpus"), [("entrypoint-snp", 0), ("entrypoint-nvidia-gpu-snp", 1)], ids=["no API", "no GPU"]
)
def test_a_container_without_what_is_asked_for_asks_for_no_key(site: Make, manifest: str, gpus: int) -> None:
    it = site(manifest)
    it.pod.volumes["kmsg"] = Path("/dev/null")
    it.world.gpu |= {"count": gpus, "ready_state": "preset"}
    it.world.tee["wait_s"] = 1
    if not gpus:
        it.world.tee["coco_url"] = f"http://127.0.0.1:{free_port()}"
    it.prepare()
    outcome = it.entrypoint().wait()
    assert (outcome.status, outcome.failure["class"]) == (11, "NoAttesterError")
    assert it.world.audit() == []


@in_containers
def test_a_document_that_the_host_has_changed_decides_nothing(site: Make) -> None:
    it = site("entrypoint-snp")
    it.prepare()
    document = it.pod.volumes["initdata"] / "initdata.toml"
    document.write_text(document.read_text() + "# and one byte more\n")
    outcome = it.entrypoint().wait()
    assert outcome.status == 10
    assert it.world.audit() == []


# --- the init container -----------------------------------------------------------------------------------------------


@in_containers
@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_the_init_container_leaves_the_model_and_ends(site: Make, tee: Tee) -> None:
    it = site(f"load-{tee.value}")
    it.loads()
    it.prepare()
    running = it.load()
    outcome = running.wait()
    assert (outcome.status, outcome.names()[-2:]) == (0, ["model_left", "stopped"])
    assert outcome.events[0]["mode"] == "load"
    assert outcome.termination.startswith("keyturn: stopped")
    # It stays, although nobody of ours is there any more, and no server was started, watched or asked.
    assert not Path(f"/proc/{running.pid}").exists()
    assert it.found() == {f"{PUBLISHED_NAME}/model.gguf": it.world.model["model.gguf"]}
    assert not [name for name in outcome.names() if name.startswith("server")]
    assert sorted(os.listdir(it.model)) == [MARK_NAME, PUBLISHED_NAME, RECEIPT_NAME]
    folder = it.model / PUBLISHED_NAME
    assert (stat.S_IMODE(folder.stat().st_mode) & 0o777, folder.stat().st_gid) == (0o750, FS_GROUP)
    assert stat.S_IMODE((folder / "model.gguf").stat().st_mode) == 0o440
    assert running.files_left() == ["run/keyturn/receipt.cbor", "run/keyturn/status.json"]


@in_containers
def test_who_mounts_it_reads_it_and_only_the_mount_keeps_root_from_writing(site: Make) -> None:
    it = site("load-snp")
    it.loads()
    it.prepare()
    assert it.load().wait().status == 0
    file = f"/run/model/{PUBLISHED_NAME}/model.gguf"
    status, said = it.consumer("/usr/bin/sha256sum", file)
    assert (status, said.split()[0].decode()) == (0, digest_of(it.world))
    write = [python(), "-I", "-c", f"import os; os.write(os.open({file!r}, os.O_WRONLY), b'other')"]
    replace = [
        python(),
        "-I",
        "-c",
        f"import os; os.chmod({file!r}, 0o600); os.write(os.open({file!r}, os.O_WRONLY), b'other')",
    ]
    assert it.consumer(*write)[0] == 1
    assert it.consumer(*write, read_only=False)[0] == 1  # by its mode
    assert it.consumer(*replace, root=True)[0] == 1  # by the mount
    assert it.found()[f"{PUBLISHED_NAME}/model.gguf"] == it.world.model["model.gguf"]
    assert it.consumer(*replace, read_only=False, root=True)[0] == 0  # by nothing
    assert it.found()[f"{PUBLISHED_NAME}/model.gguf"].startswith(b"other")


@in_containers
def test_a_key_with_a_lease_is_not_left_to_nobody(site: Make) -> None:
    it = site("load-snp")
    it.loads()
    it.world.row["lease_s"] = 3600
    it.prepare()
    outcome = it.load().wait()
    assert (outcome.status, outcome.failure["class"]) == (22, "LeaseUnsupervisedError")
    assert [step for step, _, _ in it.world.audit()] == ["attest"]
    assert os.listdir(it.model) == []


@in_containers
def test_a_failed_load_leaves_nothing(site: Make) -> None:
    it = site("load-snp")
    it.loads()
    it.blob().write_bytes(it.blob().read_bytes()[:-1] + b"x")
    it.prepare()
    running = it.load()
    outcome = running.wait()
    assert (outcome.status, os.listdir(it.model)) == (19, [])
    assert str(outcome.failure["class"]) in outcome.termination
    assert running.files_left() == ["run/keyturn/status.json"]


@in_containers
def test_a_folder_on_a_disk_is_refused_before_a_key_is_asked_for(site: Make, tmp_path: Path) -> None:
    it = site("load-snp")
    it.loads()
    it.prepare()
    (tmp_path / "disk").mkdir(mode=0o777)
    it.pod.volumes["model"] = tmp_path / "disk"
    outcome = it.load().wait()
    assert (outcome.status, outcome.failure["class"]) == (20, "DestinationError")
    assert [step for step, _, _ in it.world.audit() if step == "release"] == []
    assert os.listdir(tmp_path / "disk") == []


@in_containers
def test_gpus_of_an_init_container_attest_through_the_drivers_library(site: Make, nvml_library: Path, undo: ExitStack) -> None:
    """And they were ready before anybody attested them, as on stock Kata."""
    it = site("load-nvidia-gpu-snp")
    it.loads()
    machine = undo.enter_context(nvml_emulation.answered(it.world.machine, nvml_library))
    machine.gpu.ready = 1
    it.world.gpu |= {"ready_state": "preset"}
    it.world.row_gpu["ready"] = True
    it.prepare()
    parameters = it.world.folder / "driver" / "nvidia"
    parameters.mkdir(parents=True)
    shutil.copy(machine.directory / "nvidia-params", parameters / "params")
    it.pod.volumes |= {"kmsg": Path("/dev/kmsg"), "library": machine.library.parent, "parameters": parameters.parent}
    outcome = it.load({"library": "/usr/lib64", "parameters": "/proc/driver"}).wait()
    assert outcome.status == 0, json.dumps(outcome.failure, indent=1)
    (passed,) = [event for event in outcome.events if event["event"] == "gate_passed"]
    assert (passed["gpus"], passed["preset"]) == (1, True)
    assert it.found() == {f"{PUBLISHED_NAME}/model.gguf": it.world.model["model.gguf"]}


# --- the server after the init container ------------------------------------------------------------------------------

# Where the libraries of CUDA lie in images that have it, and whatever else an image may say of interpreters and loaders.
OF_THE_IMAGE = {
    "LD_LIBRARY_PATH": "/foreign",
    "PYTHONPATH": "/foreign",
    "PYTHONHOME": "/foreign",
    "LC_ALL": "xx_YY",
    "A": "b=c",
}


@in_containers
def test_the_server_behind_exec_has_the_environment_of_its_image(site: Make) -> None:
    it = site("load-snp")
    it.loads()
    it.prepare()
    assert it.load().wait().status == 0
    manifest = it.pod.container("model-server")
    before = manifest["command"][: manifest["command"].index("--") + 1]
    show = "import json, os; print(json.dumps([dict(os.environ), os.getpid(), os.getuid()]))"
    status, said = it.consumer(*before, python(), "-S", "-c", show, environment={"LD_LIBRARY_PATH": "/foreign", "A": "b=c"})
    environment, pid, uid = json.loads(said)
    assert (status, pid, uid) == (0, 1, FS_GROUP)
    assert environment.items() >= {"LD_LIBRARY_PATH": "/foreign", "A": "b=c", "HOME": "/tmp"}.items()
    assert not [name for name in environment if name.startswith(("_PYI", "KEYTURN", "LD_LIBRARY_PATH_"))]
    env = ["/usr/bin/env", "-0"]  # an interpreter would not start with these
    status, said = it.consumer(*before, *env, environment=OF_THE_IMAGE)
    seen = dict(item.split("=", 1) for item in said.decode().split("\0")[:-1])
    assert (status, {name: seen.get(name) for name in OF_THE_IMAGE}) == (0, OF_THE_IMAGE)


@in_containers
def test_exec_starts_no_server_beside_a_model_that_has_changed(site: Make) -> None:
    it = site("load-snp")
    it.loads()
    it.prepare()
    command = it.pod.container("model-server")["command"]
    before = command[: command.index("--") + 1]
    assert it.consumer(*before, "/usr/bin/env")[0] == 24  # nobody loaded it
    assert it.load().wait().status == 0
    assert it.consumer(*before, "/usr/bin/env", read_only=False)[0] == 24
    (it.model / PUBLISHED_NAME / "more").touch()
    assert it.consumer(*before, "/usr/bin/env") == (24, b"")


# --- what a mode does not hold ----------------------------------------------------------------------------------------

FACTS = {
    Unheld.GATE: "test_gpus_of_an_init_container_attest_through_the_drivers_library",
    Unheld.PLACE: "test_who_mounts_it_reads_it_and_only_the_mount_keeps_root_from_writing",
    Unheld.SEAL: "test_who_mounts_it_reads_it_and_only_the_mount_keeps_root_from_writing",
    Unheld.KILL: "test_what_a_killed_entrypoint_has_in_a_given_folder_stays_until_the_next_one",
    Unheld.WIPE: "test_the_init_container_leaves_the_model_and_ends",
    Unheld.SERVER: "test_the_init_container_leaves_the_model_and_ends",
    Unheld.LEASE: "test_a_key_with_a_lease_is_not_left_to_nobody",
    Unheld.SCRATCH: "test_without_the_right_to_mount_the_model_is_a_sealed_memfd_and_scratch_lies_in_the_pods_shared_memory",
}
"""The test that shows each."""


def test_a_test_shows_each_promise_that_a_mode_does_not_hold() -> None:
    assert FACTS.keys() == set(Unheld)
    for where in FACTS.values():
        file, _, name = where.rpartition("::")
        source = Path(__file__).with_name(file or Path(__file__).name).read_text()
        assert f"\ndef {name}(" in source
