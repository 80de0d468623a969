"""What `initrd/build.py` makes: twice the same bytes, and nothing in it that has no business in a guest.

Builds twice, so it runs where KEYTURN_BUILD is set, as in CI.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.products import ROOT, build

EXCLUDED = [line for line in (ROOT / "initrd" / "exclude").read_text().splitlines() if line and not line.startswith("#")]

pytestmark = pytest.mark.skipif("KEYTURN_BUILD" not in os.environ, reason="builds for two minutes: set KEYTURN_BUILD=1")


@dataclass(frozen=True)
class Built:
    out: Path
    sums: str
    bundle: Path
    root: Path
    """The initrd's content."""


@pytest.fixture(scope="module")
def built(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    top, out = tmp_path_factory.mktemp("initrd"), products
    (top / "root").mkdir()
    subprocess.run(["tar", "-C", top, "-xf", next(out.glob("*.tar.zst"))], check=True)
    image = subprocess.run(["zstd", "-dcq", next(out.glob("*-initrd.zst"))], capture_output=True, check=True).stdout
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=top / "root", input=image, check=True)
    return Built(out, (out / "SHA256SUMS").read_text(), next(top.glob("keyturn-*")), top / "root")


def modules(bundle: Path) -> set[str]:
    """The Python modules inside the bundle's program."""
    from PyInstaller.archive.readers import CArchiveReader

    archive = CArchiveReader(str(bundle / "keyturn"))
    found = set(archive.open_embedded_archive("PYZ.pyz").toc) | set(archive.toc)
    return {name for name in found if isinstance(name, str)}


def names(top: Path) -> list[str]:
    return [str(path.relative_to(top)) for path in top.rglob("*")]


def test_a_second_build_in_another_folder_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    assert (build(tmp_path / "elsewhere" / "second") / "SHA256SUMS").read_text() == built.sums
    assert {line.split("  ")[1].split("/")[0] for line in built.sums.splitlines()} == {
        path.name for path in built.out.iterdir() if path.name != "SHA256SUMS"
    }


def test_the_bundle_has_the_boot_and_nothing_that_is_excluded(built: Built) -> None:
    found = modules(built.bundle)
    assert {"agent.boot", "agent.worker", "agent.evidence.tsm", "grpc", "pyudev"} <= found
    excluded = ["agent." + name.removesuffix(".py").replace("/", ".") for name in EXCLUDED]
    foreign = ("pip", "setuptools", "pytest", "unittest", "PyInstaller", "hypothesis", "joserfc", "xllamacpp", "tests")
    assert not [name for name in found if name.startswith((*excluded, *foreign))]


def test_there_is_no_shell_compiler_pip_or_test_in_the_initrd(built: Built) -> None:
    found = names(built.root)
    assert not [name for name in found if re.search(r"(^|/)(sh|bash|dash|busybox|gcc|cc|ld|as|python3?|pip|tests?)$", name)]
    assert not [name for name in found if re.search(r"\.(h|c|cc|a|pyi)$|(^|/)test_", name)]
    assert os.readlink(built.root / "init") == "opt/keyturn/keyturn"


def test_every_listed_module_is_there_after_what_it_depends_on(built: Built) -> None:
    listed = (built.root / "usr/lib/keyturn/modules.d/50-keyturn.list").read_text().splitlines()
    assert all((built.root / name[1:]).is_file() for name in listed)
    order = [Path(name).stem for name in listed]
    for before, after in (("configfs", "tsm"), ("tsm", "sev_guest"), ("net_failover", "virtio_net"), ("scsi_mod", "sd_mod")):
        assert order.index(before) < order.index(after)


def test_the_bundle_lists_its_files_and_says_which_glibc_it_needs(built: Built) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=built.bundle, check=True)
    major, minor = (built.bundle / "GLIBC_FLOOR").read_text().strip().split(".")
    assert (int(major), int(minor)) <= (2, 36)


def partitions(disk: bytes) -> list[bytes]:
    assert disk[510:512] == b"\x55\xaa"
    found = [struct.unpack_from("<4xB3xII", disk, 446 + 16 * number) for number in range(4)]
    return [disk[start * 512 :][: size * 512] for kind, start, size in found if kind]


def test_the_extension_is_what_its_root_hash_says_and_kata_is_told_the_same(built: Built) -> None:
    (image,), (value,), (drop_in,) = (list(built.out.glob(f"*-extension.{kind}")) for kind in ("img", "verity_params", "toml"))
    parameters = dict(pair.split("=") for pair in value.read_text().strip().split(","))
    assert list(parameters) == ["root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size"]
    data, hashes = partitions(image.read_bytes())
    assert len(data) == int(parameters["data_blocks"]) * 4096
    assert len(data) + len(hashes) + (1 << 20) == image.stat().st_size

    # dm-verity, hash type 1: the tree, its top block first.
    salt, level, tree = bytes.fromhex(parameters["salt"]), data, b""
    while len(level) > 4096:
        blocks = (level[at : at + 4096] for at in range(0, len(level), 4096))
        level = b"".join(hashlib.sha256(salt + block).digest() for block in blocks)
        level = level.ljust(-(-len(level) // 4096) * 4096, b"\0")
        tree = level + tree
    assert hashlib.sha256(salt + level).hexdigest() == parameters["root_hash"]
    assert hashes == tree.ljust(len(hashes), b"\0")

    (told,) = tomllib.loads(drop_in.read_text())["hypervisor"]["qemu"]["guest_extension_images"]
    assert told == {
        "name": "keyturn",
        "path": f"/opt/kata/share/kata-containers/{image.name}",
        "verity_params": value.read_text().strip(),
    }
    assert len("extension-" + told["name"]) <= 20, "a virtio-blk serial has 20 bytes"


def test_the_extension_holds_the_bundle_its_unit_and_a_manifest_that_leads_to_it(built: Built, tmp_path: Path) -> None:
    (image,) = built.out.glob("*-extension.img")
    data = tmp_path / "data"
    data.write_bytes(partitions(image.read_bytes())[0])
    top = tmp_path / "top"
    subprocess.run(["fsck.erofs", f"--extract={top}", data], check=True, capture_output=True)
    subprocess.run(["diff", "-r", built.bundle, top / "opt/keyturn"], check=True)
    (process,) = tomllib.loads((top / "etc/kata-extensions/components.toml").read_text())["process"]
    assert os.access(top / process["path"], os.X_OK)
    drop_in = (top / "usr/lib/systemd/system/keyturn.service.d/extension.conf").read_text()
    assert f"ExecStart=/run/kata-extensions/keyturn/{process['path']} run --guest\n" in drop_in
    assert (top / "usr/lib/systemd/system/keyturn.service").read_bytes() == (top / "opt/keyturn/keyturn.service").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its root")
@pytest.mark.parametrize("hostile", [{}, {"LD_LIBRARY_PATH": "/evil", "PYTHONPATH": "/evil", "_PYI_SPLASH_IPC": "1"}])
def test_the_agent_runs_in_a_root_that_has_only_glibc_and_zlib(built: Built, hostile: dict[str, str]) -> None:
    command = ["/opt/keyturn/keyturn", "--version"]
    chroot = shutil.which("chroot")
    assert chroot
    done = subprocess.run([chroot, built.root, *command], env=hostile, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "keyturn", "")
    shown = subprocess.run([chroot, built.root, command[0]], env=hostile, capture_output=True, text=True, timeout=60).stdout
    verbs = re.findall(r"^    ([a-z]+) ", shown, re.MULTILINE)
    assert {"run", "init", "explain", "doctor", "evidence", "verify"} <= set(verbs)
    for verb in verbs:  # what it says it can do it can
        subprocess.run(
            [chroot, built.root, command[0], verb, "--help"], env=hostile, check=True, timeout=60, capture_output=True
        )
    done = subprocess.run(
        [chroot, built.root, command[0], "doctor", "--json"], env=hostile, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (10, "")  # there is no configuration, and everything else is looked at
    classes = {check["check"]: check["error"]["class"] for check in json.loads(done.stdout)["checks"] if "error" in check}
    assert classes == {"configuration": "ConfigError", "tee": "NoAttesterError"}
    done = subprocess.run([chroot, built.root, command[0], "broker"], env=hostile, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "not part of this installation" in done.stderr) == (2, True)
