"""The one archive that is appended to the product's initrd: a TEE driver without a TEE, a model server, and nothing of ours.

The kernel unpacks it after the initrd, whose bytes stay what they are. Nothing in it replaces a file of the product.
"""

import re
import shutil
import subprocess
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
        shutil.copy(ROOT / "tests/boot/tsm_steps.py", top / "opt/hand/tsm_steps.py")
        build.settle(top)
        build.pack_cpio(top, target, 1)


def make_systemd(target: Path, *, of_extension: bool) -> None:
    """Write an archive that makes the same guest one with systemd, whose unit the agent is; as of Debian, and no more of it.

    Args:
        of_extension: the unit's agent comes from the guest extension image, which a unit of the base mounts.
    """
    with tempfile.TemporaryDirectory(prefix="keyturn-systemd-") as name:
        debs, top = Path(name) / "debs", Path(name) / "top"
        for deb in build.fetch([*build.locked("guest.debs"), *build.locked("build.debs"), *build.locked("boot-test.debs")]):
            if deb.name.startswith(("lib", "systemd", "zlib")):
                build.run("dpkg-deb", "-x", deb, debs)
        libraries = top / "usr/lib/x86_64-linux-gnu"
        (libraries / "systemd").mkdir(parents=True)
        needed = [debs / "lib/systemd/systemd", *(debs / "usr/lib/x86_64-linux-gnu/systemd").glob("*.so")]
        for library in _needed_by(needed, debs):
            shutil.copy(library, libraries / library.name)
        for library in needed[1:]:
            shutil.copy(library, libraries / "systemd")
        programs = top / "usr/lib/systemd"
        programs.mkdir()
        for program in ("systemd", "systemd-journald", "systemd-shutdown"):
            shutil.copy(debs / "lib/systemd" / program, programs)
        (top / "usr/bin").mkdir()
        shutil.copy(debs / "bin/systemctl", top / "usr/bin")
        (top / "bin").symlink_to("usr/bin")
        (top / "usr/bin/mount").symlink_to("/opt/hand/busybox")  # what runs .mount units
        shutil.copytree(debs / "lib/systemd/system", programs / "system", symlinks=True)
        _install_units(programs / "system", of_extension=of_extension)
        (top / "etc").mkdir()
        (top / "etc/machine-id").write_text("0123456789abcdef" * 2 + "\n")  # without one, every unit is enabled at first
        build.settle(top)
        build.pack_cpio(top, target, 1)


def make_base(target: Path, product: Path) -> None:
    """Write the product's initrd without the agent, as a base image that takes it from a guest extension image."""
    with tempfile.TemporaryDirectory(prefix="keyturn-base-") as name:
        debs, kernel, top = (Path(name) / part for part in ("debs", "kernel", "top"))
        for deb in build.fetch([*build.locked("guest.debs"), *build.locked("build.debs")]):
            if deb.name.startswith(("lib", "cryptsetup")):
                build.run("dpkg-deb", "-x", deb, debs)
            elif deb.name.startswith("linux-image"):
                build.run("dpkg-deb", "-x", deb, kernel)
        top.mkdir()
        unpacked = subprocess.run(["zstd", "-dcq", product], capture_output=True, check=True).stdout
        subprocess.run(["cpio", "-idm", "--quiet"], cwd=top, input=unpacked, check=True)
        shutil.rmtree(top / "opt/keyturn")
        (top / "init").unlink()
        programs, libraries = top / "usr/sbin", top / "usr/lib/x86_64-linux-gnu"
        programs.mkdir()
        shutil.copy(debs / "sbin/veritysetup", programs)
        for library in _needed_by([programs / "veritysetup"], debs):
            shutil.copy(library, libraries / library.name)
        shutil.copytree(ROOT / "tests/boot/base", top / "opt/base")
        build.install_modules(top, kernel, top / "opt/base/modules", "60-base")
        build.settle(top)
        build.pack_cpio(top, target, 1)


def _install_units(units: Path, *, of_extension: bool) -> None:
    """As `systemctl enable` would, for an image that is not booted yet."""
    (units / "default.target").unlink()
    (units / "default.target").symlink_to("multi-user.target")
    for unit, wanted_by in (
        ("keyturn.service", "multi-user.target.wants"),
        ("boot-test.service", "keyturn.service.requires"),
        ("boot-test-shell.service", "sysinit.target.wants"),
    ):
        source = ROOT / "initrd" if unit == "keyturn.service" else ROOT / "tests/boot/systemd"
        shutil.copy(source / unit, units)
        (units / wanted_by).mkdir(exist_ok=True)
        (units / wanted_by / unit).symlink_to(f"../{unit}")
    drop_ins = units / "keyturn.service.d"
    drop_ins.mkdir()
    ours = (ROOT / "tests/boot/systemd/boot-test.conf").read_text()
    if of_extension:
        shutil.copy(ROOT / "tests/boot/systemd/kata-extension-mount@.service", units)
        shutil.copy(ROOT / "initrd/extension/extension.conf", drop_ins)
        ours = ours.replace("/opt/keyturn", "/run/kata-extensions/keyturn/opt/keyturn")
    (drop_ins / "for-boot-test.conf").write_text(ours)


def _needed_by(files: list[Path], debs: Path) -> list[Path]:
    """The shared libraries that these files load, and those load, without what the product has."""
    found: dict[str, Path | None] = {}
    while files:
        listing = subprocess.run(["objdump", "-p", *files], capture_output=True, text=True, check=True).stdout
        new = set(re.findall(r"NEEDED +(\S+)", listing)) - found.keys()
        files = []
        for name in sorted(new):
            places = (debs / folder / "x86_64-linux-gnu" / name for folder in ("usr/lib", "lib"))
            path = next((place for place in places if place.exists()), None)
            found[name] = path
            if path:
                files.append(path)
    return [path for name, path in found.items() if path and not build.LIBC.fullmatch(name)]


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
