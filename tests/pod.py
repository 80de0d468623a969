"""A pod of `deploy/rendered` as processes: crun runs its containers as the manifest says, from the layers of an image.

User, capabilities, command and mounts are the manifest's; the root is an overlay over the layers, as container runtimes make
it, so what a container leaves behind is what the overlay's upper folder holds. Containers share the machine's network, as those
of a pod share the guest's: CoCo's API is on its loopback. Needs root, crun and overlayfs.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tests.world import DEADLINE_S, Agent

RENDERED = Path(__file__).resolve().parents[1] / "deploy" / "rendered"
ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
# A runtime that finds the groups of version 1 beside version 2 wants neither: it gets a hierarchy of its own to look at.
_RUNTIME = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount -t overlay -o "$0" overlay "$1" && shift && exec "$@"'


def missing() -> str | None:
    """Why there can be no pod here; None: there can."""
    if os.geteuid() != 0:
        return "containers without a daemon need root"
    if shutil.which("crun") is None:
        return "there is no crun"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "this kernel has no overlayfs"
    return None


class Pod:
    """Change `volumes` before a container starts."""

    def __init__(self, folder: Path, undo: ExitStack, manifest: str) -> None:
        documents = yaml.safe_load_all((RENDERED / f"{manifest}.yaml").read_text())
        (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
        self.spec = deployment["spec"]["template"]["spec"]
        self.folder, self.undo = folder, undo
        self.volumes: dict[str, Path] = {}
        """The folder of each volume."""
        self.started = 0

    def container(self, name: str) -> dict[str, Any]:
        """What the manifest says of it."""
        all_of_them = [*self.spec.get("initContainers", ()), *self.spec["containers"]]
        (found,) = [container for container in all_of_them if container["name"] == name]
        return dict(found)

    def start(
        self,
        container: dict[str, Any],
        layers: Sequence[Path],
        *,
        without: Collection[str] = (),
        shown: Collection[str] = (),
    ) -> "Running":
        """A container of this pod.

        Args:
            container: what the manifest says of it, or a test makes of that.
            layers: of its image, the lowest first.
            without: capabilities that it does not get.
            shown: folders of this machine that it has at the same place, for reading: the rest of a server's image.
        """
        self.started += 1
        bundle = self.folder / f"container-{self.started}"
        upper, work, root = (bundle / name for name in ("upper", "work", "rootfs"))
        for folder in (upper, work, root):
            folder.mkdir(parents=True)
        security = container["securityContext"]
        added = security["capabilities"].get("add", ())
        kept = [f"CAP_{name}" for name in added if name not in without] if security.get("runAsUser") == 0 else []
        termination = bundle / "termination"
        termination.touch()
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]},
            _bind(termination, "/dev/termination-log"),
            *(_bind(Path(path), path, read_only=True) for path in shown),
        ]
        mounts += [
            _bind(self.volumes[mount["name"]], mount["mountPath"], read_only=mount.get("readOnly", False))
            for mount in container.get("volumeMounts", ())
        ]
        config = {
            "ociVersion": "1.0.2",
            "root": {"path": str(root), "readonly": security.get("readOnlyRootFilesystem", False)},
            "process": {
                "args": container["command"],
                "env": [*ENVIRONMENT, *(f"{item['name']}={item['value']}" for item in container.get("env", ()))],
                "cwd": "/",
                "user": {
                    "uid": security.get("runAsUser", 0),
                    "gid": security.get("runAsGroup", 0),
                    "additionalGids": [self.spec.get("securityContext", {}).get("fsGroup", 0)],
                },
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), kept),
                "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
            },
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }
        (bundle / "config.json").write_text(json.dumps(config))
        overlay = f"lowerdir={':'.join(map(str, reversed(layers)))},upperdir={upper},workdir={work}"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _RUNTIME, overlay, str(root)]
        name = f"{self.folder.name}-{self.started}"
        command += ["crun", "--root", str(bundle / "state"), "--cgroup-manager=disabled", "run"]
        return Running(bundle, self.undo, [*command, "--pid-file", str(bundle / "pid"), "--bundle", str(bundle), name])

    def run(self, container: dict[str, Any], layers: Sequence[Path], **more: Any) -> "tuple[int, bytes]":
        """Status and standard output of one that ends by itself."""
        running = self.start(container, layers, **more)
        stdout, _ = running.process.communicate(timeout=DEADLINE_S)
        return running.process.returncode, stdout


class Running(Agent):
    """A container; of an agent's, its events too."""

    def __init__(self, bundle: Path, undo: ExitStack, command: list[str]) -> None:
        super().__init__(bundle, undo, command)
        self.bundle = bundle
        self.left_behind = bundle / "upper"

    @property
    def pid(self) -> int:
        """Of its first process, for the machine."""
        file = self.bundle / "pid"
        deadline = time.monotonic() + DEADLINE_S
        while not file.exists() or not file.read_text():
            assert time.monotonic() < deadline, "no container"
            time.sleep(0.01)
        return int(file.read_text())

    def children(self) -> list[int]:
        """Of its first process."""
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def files_left(self) -> list[str]:
        """What its image has not, and what it changed."""
        return sorted(str(path.relative_to(self.left_behind)) for path in self.left_behind.rglob("*") if not path.is_dir())


def _bind(source: Path, target: str, *, read_only: bool = False) -> dict[str, object]:
    options = ["rbind", "rprivate", "ro" if read_only else "rw"]
    return {"destination": target, "type": "bind", "source": str(source), "options": options}
