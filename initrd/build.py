"""Builds what is shipped: the bundle (agent and interpreter in one folder), and made from it the stand-alone initrd, the
container image and the guest extension image for Kata Containers.

The same commit gives the same bytes, whatever machine, user and folder: Debian packages and wheels are locked by hash
(`locks/guest.debs`, `locks/build.debs`, `locks/image.txt`), the bundler runs in a root made of them, every time is one
constant and every list is sorted. Needs apt-get with Debian 12 in its sources, cpio, zstd and util-linux; and root, or a
user who may make user namespaces.
"""

import argparse
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from agent import __version__  # noqa: E402  # of this clone, whatever is installed
from initrd import image, sbom  # noqa: E402

EPOCH = 946684800  # 2000-01-01, the time of every file; zip, which the bundler writes, begins in 1980
NAME = f"keyturn-{__version__}"
BUNDLE = f"{NAME}-linux-x86_64"
IMAGE = f"{NAME}-image"
MAX_BUNDLE_BYTES = 60 * 10**6
MAX_INITRD_BYTES = 34 * 10**6
MAX_IMAGE_BYTES = 30 * 10**6
MAX_EXTENSION_BYTES = 32 * 10**6
RELEASE_LEVEL = 19
# What a program of the bundle loads from libc6. Not iconv's character sets, which are more than half of the package.
LIBC = re.compile(
    r"(ld-linux-x86-64|libc|libm|libmvec|libdl|libpthread|librt|libutil|libresolv|libnss_(dns|files))\.so\.[0-9]+"
)
# Parts of the standard library that nothing of ours asks for, and build tools that a hook could drag in.
LEFT_OUT = (
    *("curses", "doctest", "ftplib", "pkg_resources", "pydoc", "readline", "setuptools", "sqlite3", "tkinter", "unittest"),
    *("xml", "xmlrpc", "_multibytecodec", *(f"_codecs_{language}" for language in ("cn", "hk", "iso2022", "jp", "kr", "tw"))),
)
# What hooks collect beside the code and no program reads. The CAs of gRPC neither: a broker's CA is the configuration's.
LITTER = re.compile(r"\.(cc|h|pyi)$|/(RECORD|INSTALLER|REQUESTED|direct_url\.json|_credentials/roots\.pem)$")
# An extension image as Kata and CoCo build theirs (guest-components, tools/coco-extension/build-erofs-image.sh): two MBR
# partitions, EROFS and dm-verity's hashes without a superblock, because all parameters come with the kernel's command line.
EXTENSION = "keyturn"  # its disk has the serial extension-keyturn, and is mounted at /run/kata-extensions/keyturn
EXTENSION_UUID = "4b7b6a3e-0f5c-5a7e-9d55-6b657974726e"
# Clusters of 64 KiB: an eighth smaller than with 4 KiB, and no slower to boot from.
EROFS = ("-zlz4hc", "-C65536", "-Enoinline_data", f"-T{EPOCH}", f"-U{EXTENSION_UUID}", "-x-1", "--all-root", "--quiet")
VERITY_SALT = "00" * 32  # the same image for the same commit; whoever forges blocks has to forge SHA-256 with any salt
ROOT_HASH = "extension.root_hash"
SECTOR, MEBIBYTE = 512, 1 << 20
DEVICES = ("null", "random", "urandom")  # what the programs of the build root open
BUNDLER_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": "/opt/site",
    "PYTHONHASHSEED": "0",
    "SOURCE_DATE_EPOCH": str(EPOCH),
    "LC_ALL": "C.UTF-8",
    "HOME": "/tmp",  # noqa: S108  # of the build root
}


def main() -> None:
    """Build everything into one folder and print digests and sizes."""
    parser = argparse.ArgumentParser(
        prog="build-initrd", description="Build bundle, initrd, extension image, container image and SBOMs.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build", metavar="DIR", help="where results go; default build/")
    parser.add_argument("--fast", action="store_true", help="compress badly and quickly, for a look; not what is shipped")
    args = parser.parse_args()
    level = 1 if args.fast else RELEASE_LEVEL
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="keyturn-build-") as name:
        work = Path(name)
        say("packages")
        root, kernel = work / "root", work / "kernel"
        for deb in fetch(locked("guest.debs") + locked("build.debs")):
            run("dpkg-deb", "-x", deb, kernel if deb.name.startswith("linux-image-") else root)
        say("bundle")
        bundle = make_bundle(root, work / BUNDLE)
        floor = (bundle / "GLIBC_FLOOR").read_text().strip()
        unpacked = sum(path.lstat().st_size for path in bundle.rglob("*") if not path.is_dir())
        say("initrd")
        initrd = make_initrd(work / "initrd", bundle, root, kernel)
        say(f"packing, zstd -{level}")
        results = [args.out / f"{BUNDLE}.tar.zst", args.out / f"{NAME}-initrd.zst"]
        pack_tar(bundle, results[0], level)
        pack_cpio(initrd, results[1], level)
        say("container image")
        written = make_image(args.out / IMAGE, work / "image", bundle, root, fast=args.fast)
        (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
        say("extension")
        results += make_extension(root, bundle, args.out)
        results += [Path(shutil.copyfile(source, args.out / f"{NAME}-{source.name}")) for source in (vmlinuz, HERE / "cmdline")]
        results.append(args.out / f"{NAME}.cdx.json")
        results[-1].write_text(sbom.document(__version__, EPOCH, locked("guest.debs"), ROOT / "locks" / "guest.txt"))
    sums = {path: sha256(path) for path in results}
    of_image = sorted(path for path in (args.out / IMAGE).rglob("*") if path.is_file())
    (args.out / "SHA256SUMS").write_text(
        "".join(f"{digest}  {path.name}\n" for path, digest in sums.items())
        + "".join(f"{sha256(path)}  {path.relative_to(args.out)}\n" for path in of_image)
    )
    for path, digest in sums.items():
        print(f"{digest}  {path.stat().st_size / 1e6:5.1f} MB  {path.name}")
    print(f"{written.digest.removeprefix('sha256:')}  {written.layer_bytes / 1e6:5.1f} MB  {IMAGE}, its manifest and layers")
    print(f"bundle: {unpacked / 1e6:.1f} MB unpacked, needs glibc {floor} or newer; in the image it has its own")
    check_size("the unpacked bundle", unpacked, MAX_BUNDLE_BYTES)
    if level == RELEASE_LEVEL:
        check_size("the initrd", results[1].stat().st_size, MAX_INITRD_BYTES)
        check_size("the image", written.layer_bytes, MAX_IMAGE_BYTES)
    check_size("the extension image", results[2].stat().st_size, MAX_EXTENSION_BYTES)


# --- packages ---------------------------------------------------------------------------------------------------------


def locked(lock: str) -> list[tuple[str, str, str, str]]:
    """(name, version, architecture, SHA-256) of each line of a lock."""
    lines = (ROOT / "locks" / lock).read_text().splitlines()
    fields = [re.split("[= ]", line) for line in lines if not line.startswith("#")]
    return [(name, version, architecture, digest) for name, version, architecture, digest in fields]


def fetch(packages: list[tuple[str, str, str, str]]) -> list[Path]:
    """The packages' files, from the cache or by apt-get, each with the digest of its lock."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keyturn" / "debs"
    cache.mkdir(parents=True, exist_ok=True)
    files = {name: cache / f"{name}_{digest}.deb" for name, _, _, digest in packages}
    missing = [package for package in packages if not files[package[0]].exists()]
    if missing:
        # A folder of its own: apt names files after versions, and half a file must not be taken for a whole one.
        with tempfile.TemporaryDirectory(dir=cache) as name:
            wanted = [f"{package}={version}" for package, version, _, _ in missing]
            if subprocess.run(
                ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *wanted], cwd=name, check=False
            ).returncode:
                fail(
                    "a package of locks/*.debs is not to be had in its locked version: run `apt-get update`, add a snapshot "
                    "of Debian to apt's sources, or renew the lock with initrd/lock-debs"
                )
            for package, _, _, digest in missing:
                (deb,) = Path(name).glob(f"{package}_*.deb")
                if sha256(deb) != digest:
                    fail(f"{package} is not the file that the lock names")
                deb.rename(files[package])
    return list(files.values())


# --- the bundle -------------------------------------------------------------------------------------------------------


def make_bundle(root: Path, bundle: Path) -> Path:
    """Agent, interpreter and libraries as one folder that needs glibc, and zlib for its loader."""
    site = root / "opt" / "site"
    install_wheels(site)
    install_agent(site / "agent")
    for name in ("entry.py", "rthook.py"):
        shutil.copyfile(HERE / name, root / "opt" / name)
    settle(root / "opt")
    for name in ("proc", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    for name in DEVICES:
        (root / "dev" / name).touch()
    run("ldconfig", "-r", root)
    command = [
        *("/usr/bin/python3.11", "-m", "PyInstaller", "--onedir", "--strip", "--noconfirm", "--log-level", "ERROR"),
        *("--name", "keyturn", "--distpath", "/opt/dist", "--workpath", "/opt/work", "--specpath", "/opt/work"),
        *("--runtime-hook", "/opt/rthook.py", "--collect-submodules", "agent", "--add-binary", f"{libudev(root)}:."),
        *(word for module in LEFT_OUT for word in ("--exclude-module", module)),
        "/opt/entry.py",
    ]
    run(*inside_root(root), *command, env=BUNDLER_ENVIRONMENT)
    (root / "opt" / "dist" / "keyturn").rename(bundle)
    for path in [*bundle.rglob("*")]:
        if LITTER.search(str(path)):
            path.unlink()
    shutil.copy(HERE / "keyturn.service", bundle)
    (bundle / "GLIBC_FLOOR").write_text(glibc_floor(bundle) + "\n")
    list_files(bundle)
    settle(bundle)
    return bundle


def list_files(bundle: Path) -> None:
    """Write its SHA256SUMS."""
    (bundle / "SHA256SUMS").unlink(missing_ok=True)
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and not path.is_symlink())
    (bundle / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.relative_to(bundle)}\n" for path in files))


def inside_root(root: Path) -> tuple[object, ...]:
    """The start of a command line that runs in the build root: nobody's user and folder show there, nothing stays mounted."""
    own = () if os.geteuid() == 0 else ("--map-root-user",)
    devices = " && ".join(f'mount --bind /dev/{name} "$0/dev/{name}"' for name in DEVICES)
    enter = f'mount -t proc proc "$0/proc" && {devices} && exec chroot "$0" "$@"'
    return ("unshare", "--mount", "--pid", "--fork", *own, "sh", "-c", enter, root)


def install_wheels(site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install", "--no-deps"]
    for_debian = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none"]
    platforms = [f"--platform={tag}_x86_64" for tag in ("manylinux_2_28", "manylinux2014", "manylinux_2_17")]
    wheels = ["--only-binary", ":all:", "--require-hashes", "--no-compile", "--root-user-action", "ignore"]
    run(*pip, *wheels, *for_debian, *platforms, "--target", site, "-r", ROOT / "locks" / "image.txt")


def install_agent(target: Path) -> None:
    """Our own code without what `exclude` names: what is not there cannot be bundled."""
    excluded = [line for line in (HERE / "exclude").read_text().splitlines() if line and not line.startswith("#")]
    for source in sorted((ROOT / "agent").rglob("*.py")):
        path = source.relative_to(ROOT / "agent")
        if not any(path.is_relative_to(name) for name in excluded):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / path)


def libudev(root: Path) -> str:
    """Where it lies in the build root. No import leads there, so the bundler must be told."""
    (found,) = (root / "usr/lib/x86_64-linux-gnu").glob("libudev.so.1")
    return f"/{found.relative_to(root)}"


def libc(root: Path) -> list[Path]:
    """The files of glibc that a program of the bundle loads."""
    return sorted(path for path in (root / "lib/x86_64-linux-gnu").iterdir() if LIBC.fullmatch(path.name))


def glibc_floor(bundle: Path) -> str:
    """The newest version of glibc's interface that a file of the bundle asks for."""
    asked: set[tuple[int, ...]] = set()
    for path in bundle.rglob("*"):
        if path.is_file() and (data := path.read_bytes()).startswith(b"\x7fELF"):
            asked |= {tuple(int(part) for part in match.split(b".")) for match in re.findall(rb"\0GLIBC_(2\.[0-9]+)", data)}
    return ".".join(map(str, max(asked)))


# --- the initrd -------------------------------------------------------------------------------------------------------


def make_initrd(top: Path, bundle: Path, root: Path, kernel: Path) -> Path:
    """The root file system of a guest whose PID 1 is the agent. There is no shell in it, and no other program."""
    for name in ("dev", "etc/keyturn", "etc/ssl/certs", "opt", "proc", "root", "run", "sys", "tmp", "usr/lib64", "var"):
        (top / name).mkdir(parents=True)
    for name in ("lib", "lib64"):
        (top / name).symlink_to(f"usr/{name}")
    shutil.copytree(bundle, top / "opt" / "keyturn", symlinks=True)
    (top / "init").symlink_to("opt/keyturn/keyturn")

    libraries = top / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for path in libc(root):
        shutil.copy(path, libraries / path.name)
    # The bundle's loader is linked with zlib, and needs it before it knows its own folder.
    shutil.copy(root / "lib/x86_64-linux-gnu/libz.so.1", libraries / "libz.so.1")
    (top / "usr/lib64/ld-linux-x86-64.so.2").symlink_to("../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")

    install_etc(top, root)
    install_modules(top, kernel, HERE / "modules", "50-keyturn")
    settle(top)
    return top


def install_etc(top: Path, root: Path) -> None:
    """Who is who, where names come from, and whom TLS trusts. Kata's agent and container runtimes mount their own over some."""
    (top / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
    (top / "etc/passwd").write_text("root:x:0:0::/root:/\nserver:x:65532:65532::/:/\n")
    (top / "etc/group").write_text("root:x:0:\nserver:x:65532:\n")
    (top / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (top / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (top / "etc/resolv.conf").touch()
    certificates = sorted((root / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    (top / "etc/ssl/certs/ca-certificates.crt").write_text("".join(path.read_text() for path in certificates))


def install_modules(top: Path, kernel: Path, wanted: Path, list_name: str) -> None:
    """The modules that `wanted` lists and what they depend on, not compressed, and the list of them in loading order."""
    (tree,) = (kernel / "lib/modules").iterdir()
    packed = {module_name(path): path for path in tree.rglob("*.ko*")}
    builtin = {module_name(Path(line)) for line in (tree / "modules.builtin").read_text().splitlines()}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in packed:
            fail(f"this kernel has no module {name}")
        data = packed[name].read_bytes()
        if packed[name].suffix == ".xz":
            data = lzma.decompress(data)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for dependency in found[1].decode().split(",") if found and found[1] else ():
            add(dependency.replace("-", "_"))
        path = Path("usr/lib/modules") / tree.name / packed[name].relative_to(tree).with_name(f"{name}.ko")
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(data)
        ordered[name] = path

    for line in wanted.read_text().splitlines():
        if line and not line.startswith("#"):
            add(line.replace("-", "_"))
    lists = top / "usr/lib/keyturn/modules.d"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{list_name}.list").write_text("".join(f"/{path}\n" for path in ordered.values()))


def module_name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


# --- the container image ----------------------------------------------------------------------------------------------


def make_image(out: Path, work: Path, bundle: Path, root: Path, *, fast: bool) -> image.Image:
    """The OCI image: a layer of what glibc and TLS read below /etc, and /opt/keyturn in a layer of its own for COPY --from.

    There the bundle has its own glibc, and so it runs in every image: vLLM's have 2.35, others 2.34 or musl.
    """
    base, own = work / "base", work / "own"
    for name in ("dev", "etc/keyturn", "proc", "run", "sys", "tmp"):
        (base / name).mkdir(parents=True)
    install_etc(base, root)
    settle(base)
    (base / "tmp").chmod(0o1777)

    folder = own / "opt" / "keyturn"
    shutil.copytree(bundle, folder, symlinks=True)
    for name in ("GLIBC_FLOOR", "keyturn.service"):  # it has its own, and no systemd
        (folder / name).unlink()
    (folder / "lib").mkdir()
    for path in libc(root):
        shutil.copy(path, folder / "lib" / path.name)
    # An absolute loader is found in one place only, which is where the image has it. DT_RPATH, not RUNPATH: it holds for what
    # libraries ask for too, and comes before the LD_LIBRARY_PATH of images with CUDA.
    program = root / "opt" / "program"
    shutil.copy(folder / "keyturn", program)
    loader, libraries = "/opt/keyturn/lib/ld-linux-x86-64.so.2", "/opt/keyturn/lib:/opt/keyturn/_internal"
    patch = ("/usr/bin/patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries, "/opt/program")
    run(*inside_root(root), *patch)
    shutil.copy(program, folder / "keyturn")
    list_files(folder)
    settle(own)

    def gzip(data: bytes) -> bytes:
        # By the locked zlib: another one gives other bytes.
        level = f"import sys, zlib; packer = zlib.compressobj({1 if fast else 9}, wbits=31)"
        program = f"{level}; out = sys.stdout.buffer; out.write(packer.compress(sys.stdin.buffer.read()) + packer.flush())"
        command = [str(word) for word in (*inside_root(root), "/usr/bin/python3.11", "-I", "-c", program)]
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    shutil.rmtree(out, ignore_errors=True)
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    debs = [deb for deb in locked("guest.debs") if not deb[0].startswith("linux-image-")]
    return image.write_layout(
        out,
        [("files below /etc, from Debian packages", base), ("/opt/keyturn: the agent, its interpreter and libraries", own)],
        entrypoint=["/opt/keyturn/keyturn"],
        path=BUNDLER_ENVIRONMENT["PATH"],
        labels={
            "title": "keyturn",
            "version": __version__,
            "description": about["description"],
            "licenses": about["license"],
        },
        sbom=sbom.document(__version__, EPOCH, debs, ROOT / "locks" / "guest.txt").encode(),
        epoch=EPOCH,
        compress=gzip,
    )


# --- the extension image ----------------------------------------------------------------------------------------------


def make_extension(root: Path, bundle: Path, out: Path) -> list[Path]:
    """The image, the parameters that Kata hands to the guest's kernel, and the runtime's drop-in with both."""
    top, data, hashes = (root / "opt" / name for name in ("extension", "extension.erofs", "extension.verity"))
    shutil.copytree(bundle, top / "opt" / "keyturn", symlinks=True)
    for name, target in (
        ("extension/components.toml", "etc/kata-extensions"),
        ("keyturn.service", "usr/lib/systemd/system"),
        ("extension/extension.conf", "usr/lib/systemd/system/keyturn.service.d"),
    ):
        (top / target).mkdir(parents=True)
        shutil.copy(HERE / name, top / target)
    settle(top)
    in_root: dict[str, object] = {"env": BUNDLER_ENVIRONMENT, "stdout": subprocess.DEVNULL}
    run(*inside_root(root), "/usr/bin/mkfs.erofs", *EROFS, f"/opt/{data.name}", f"/opt/{top.name}", **in_root)
    pad(data)
    verity = ("/sbin/veritysetup", "format", "--no-superblock", "--hash=sha256", f"--salt={VERITY_SALT}")
    files = (f"/opt/{data.name}", f"/opt/{hashes.name}", f"--root-hash-file=/opt/{ROOT_HASH}")
    hashes.touch()
    run(*inside_root(root), *verity, *files, **in_root)
    pad(hashes)

    image, parameters, drop_in = (out / f"{NAME}-extension.{kind}" for kind in ("img", "verity_params", "toml"))
    sizes = [data.stat().st_size, hashes.stat().st_size]
    with image.open("wb") as disk:
        disk.write(partition_table(sizes).ljust(MEBIBYTE, b"\0"))
        for path in (data, hashes):
            disk.write(path.read_bytes())
    root_hash = (root / "opt" / ROOT_HASH).read_text().strip()
    value = f"root_hash={root_hash},salt={VERITY_SALT},data_blocks={sizes[0] // 4096},data_block_size=4096,hash_block_size=4096"
    parameters.write_text(f"{value}\n")
    drop_in.write_text(
        f"# For config.d/ beside the configuration of a QEMU runtime class of Kata Containers 4.x (runtime-rs).\n"
        f"[[hypervisor.qemu.guest_extension_images]]\n"
        f'name = "{EXTENSION}"\n'
        f'path = "/opt/kata/share/kata-containers/{image.name}"\n'
        f'verity_params = "{value}"\n'
    )
    return [image, parameters, drop_in]


def pad(path: Path) -> None:
    os.truncate(path, -(-path.stat().st_size // MEBIBYTE) * MEBIBYTE)


def partition_table(sizes: list[int]) -> bytes:
    """A master boot record with partitions of these sizes one after the other from the first MiB on; multiples of a sector."""
    entries, start = b"", MEBIBYTE
    for size in sizes:
        # Status, CHS of both ends (none: there is no such geometry), type Linux; then where and how long, in sectors.
        entries += struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start // SECTOR, size // SECTOR)
        start += size
    return bytes(440) + b"KYTN" + bytes(2) + entries.ljust(64, b"\0") + b"\x55\xaa"


# --- packing ----------------------------------------------------------------------------------------------------------


def settle(top: Path) -> None:
    """Modes and times that depend on nothing: 0755 for folders and programs, 0644 for the rest."""
    for path in [top, *top.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def pack_tar(folder: Path, target: Path, level: int) -> None:
    owner = ("--owner=0", "--group=0", "--numeric-owner")
    tar = subprocess.Popen(
        ["tar", "--format=gnu", "--sort=name", *owner, "-C", str(folder.parent), "-c", folder.name], stdout=subprocess.PIPE
    )
    compress(tar, target, level)


def pack_cpio(folder: Path, target: Path, level: int) -> None:
    names = sorted(os.fsencode(path.relative_to(folder)) for path in folder.rglob("*"))
    cpio = subprocess.Popen(
        ["cpio", "--null", "--create", "--format=newc", "--quiet", "--reproducible", "--owner=0:0"],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert cpio.stdin
    cpio.stdin.write(b"".join(name + b"\0" for name in names))  # far below what a pipe holds before cpio must write
    cpio.stdin.close()
    compress(cpio, target, level)


def compress(source: "subprocess.Popen[bytes]", target: Path, level: int) -> None:
    # Two threads: their number decides where zstd cuts, and so the bytes.
    run("zstd", f"-{level}", "-T2", "--quiet", "--force", "-o", target, stdin=source.stdout)
    if source.wait():
        fail(f"{source.args!r} failed")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(what: str, got: int, limit: int) -> None:
    if got > limit:
        fail(f"{what} has {got} bytes, above its {limit}: see what came in, or raise the limit deliberately")


def run(*command: object, **options: object) -> None:
    done = subprocess.run([str(word) for word in command], check=False, **options)  # type: ignore[call-overload]  # options of run
    if done.returncode:
        fail(f"{command[0]} failed with status {done.returncode}")


def say(step: str) -> None:
    print(f"build-initrd: {step}", file=sys.stderr)


def fail(reason: str) -> None:
    sys.exit(f"build-initrd: {reason}")


if __name__ == "__main__":
    main()
