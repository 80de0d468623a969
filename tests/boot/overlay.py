"""The one archive that is appended to the product's initrd: a TEE driver without a TEE, a model server, and nothing of ours.

The kernel unpacks it after the initrd, whose bytes stay what they are. Nothing in it replaces a file of the product.
"""

import shutil
import tempfile
from pathlib import Path

from initrd import build  # packages by lock, and cpio

ROOT = Path(__file__).resolve().parents[2]

# Of Debian's Python: what a server of one import does not need.
_UNUSED = ("lib2to3", "idlelib", "test", "unittest", "pydoc_data", "distutils", "ensurepip", "tkinter", "sqlite3", "curses")
_LIBRARIES = (
    "libexpat.so.1",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libgomp.so.1",
    "libbz2.so.1.0",
    "liblzma.so.5",
    "libffi.so.8",
)


def make(target: Path, kernel_version: str) -> None:
    """Write the archive for a kernel of this version."""
    with tempfile.TemporaryDirectory(prefix="keyturn-overlay-") as name:
        debs, top = Path(name) / "debs", Path(name) / "top"
        for deb in build.fetch([*build.locked("guest.debs"), *build.locked("build.debs"), *build.locked("boot-test.debs")]):
            if deb.name.startswith(("lib", "python3.11", "busybox")):
                build.run("dpkg-deb", "-x", deb, debs)
        _install_python(debs, top)
        _install_server(top)
        _install_driver(top, kernel_version)
        shutil.copytree(ROOT / "tests/boot/hand", top / "opt/hand")
        shutil.copy(debs / "bin/busybox", top / "opt/hand/busybox")
        build.settle(top)
        build.pack_cpio(top, target, 1)


def _install_python(debs: Path, top: Path) -> None:
    shutil.copytree(
        debs / "usr/lib/python3.11",
        top / "usr/lib/python3.11",
        symlinks=True,
        ignore=shutil.ignore_patterns(*_UNUSED, "config-*"),
    )
    (top / "usr/bin").mkdir()
    shutil.copy(debs / "usr/bin/python3.11", top / "usr/bin/python3.11")
    libraries = top / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for name in _LIBRARIES:
        (found, *_) = [path for folder in ("usr/lib", "lib") if (path := debs / folder / "x86_64-linux-gnu" / name).exists()]
        shutil.copy(found, libraries / name)


def _install_server(top: Path) -> None:
    import xllamacpp

    package = Path(xllamacpp.__file__).parent
    target = top / "usr/lib/python3.11/xllamacpp"
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    for library in target.glob("*.so"):
        build.run("strip", "--strip-unneeded", library)  # a quarter of its size
    (top / "opt/server").mkdir(parents=True)
    shutil.copy(ROOT / "agent/demo/llama_server.py", top / "opt/server/llama_server.py")


def _install_driver(top: Path, kernel_version: str) -> None:
    (top / "opt/driver").mkdir(parents=True)
    driver = top / "opt/driver/fake_tsm.ko"
    build.run(ROOT / "tests/boot/fake_tsm/build.sh", driver, f"/usr/src/linux-headers-{kernel_version}")
    lists = top / "usr/lib/keyturn/modules.d"
    lists.mkdir(parents=True)
    (lists / "90-boot-test.list").write_text("/opt/driver/fake_tsm.ko\n")
