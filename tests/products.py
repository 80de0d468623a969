"""What `initrd/build.py` makes, for tests of several modules; one quick build for all of them is `conftest.products`."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TOOLS = ("apt-get", "cpio", "dpkg-deb", "fsck.erofs", "tar", "unshare", "zstd")


def build(out: Path) -> Path:
    """Into this folder, in half a minute."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, "KEYTURN_BUILD is set, so its tools must be there"
    subprocess.run([sys.executable, ROOT / "initrd" / "build.py", "--fast", "--out", out], check=True, timeout=600)
    return out


@dataclass(frozen=True)
class Layout:
    """An OCI image layout: a folder."""

    folder: Path

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        return (self.folder / "blobs" / "sha256" / str(descriptor["digest"]).removeprefix("sha256:")).read_bytes()

    def json(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.blob(descriptor))
        return found

    @property
    def index(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "index.json").read_text())
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        return self.json(self.index["manifests"][0])

    def unpack(self, target: Path, *layers: int) -> Path:
        """The layers of these numbers into a folder, one over the other, as whoever runs the image does."""
        target.mkdir(parents=True, exist_ok=True)
        for number in layers:
            layer = self.blob(self.manifest["layers"][number])
            subprocess.run(["tar", "-C", target, "-xzpf", "-"], input=layer, check=True)
        return target
