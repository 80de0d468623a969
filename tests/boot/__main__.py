"""Boots the product's initrd in QEMU: evidence through the kernel's own configfs-tsm, a real broker, a real model server.

`scripts/boot-test` runs it. Everything outside the guest is on this machine's loopback, which the guest reaches as 10.0.2.2.
"""

import argparse
import hashlib
import http.client
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from agent.demo import layout_server
from agent.guest.initdata import fit, pack_device
from agent.sim.machine import create_silicon
from tests.boot import overlay, tiny_gguf, volume
from tests.boot.configfs import configfs_tsm
from tests.boot.firmware import Firmware
from tests.boot.guest import Guest, Image
from tests.world import World, free_port

ROOT = Path(__file__).resolve().parents[2]
HOST = "10.0.2.2"  # QEMU's name for the machine around it
ADDRESS = f"ip=10.0.2.15::{HOST}:255.255.255.0::eth0:off"
SERVER_PORT, HEALTH_PORT = 8080, 8081
BOOT_S, END_S = 80, 90
DEFAULT = 6
"""So many scenarios run when none is named."""
MAX_WORKER_KIB, MAX_SUPERVISOR_KIB = 110 << 10, 22 << 10
TIMELINE = (
    ("kernel", r"Linux version"),
    ("first Python line", r"keyturn: boot started"),
    ("local checks", r"keyturn: local checks passed"),
    ("network", r"keyturn: network: done"),
    ("verdict", r"keyturn: attest: done"),
    ("open", r"keyturn: load: done"),
    ("ready", r"keyturn: model server ready"),
)


@dataclass
class Site:
    """What stands around one guest."""

    world: World
    firmware: Firmware
    guest: Guest
    server_port: int
    health_port: int
    canary: str


def main() -> int:
    """Build what is missing, boot, tell. The value is the exit status."""
    parser = argparse.ArgumentParser(prog="boot-test", description=__doc__.split("\n\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--build", type=Path, default=ROOT / "build", metavar="DIR", help="results of scripts/build-initrd")
    parser.add_argument("--all", action="store_true", help="every scenario: also the ways in which a boot can end")
    parser.add_argument("--volume", action="store_true", help="every scenario of an encrypted disk")
    titles = [title for title, _ in SCENARIOS]
    what = f"any of: {', '.join(titles)} (default: {', '.join(titles[:DEFAULT])})"
    parser.add_argument("scenarios", nargs="*", choices=[[], *titles], metavar="SCENARIO", help=what)
    parser.add_argument("--extension", action="store_true", help="every scenario of the guest extension image")
    args = parser.parse_args()
    families = tuple(family for family in ("extension", "volume") if getattr(args, family))
    named = [*args.scenarios, *(title for title in titles if families and title.startswith(families))]
    chosen = titles if args.all else named or titles[:DEFAULT]
    began = time.monotonic()
    image = prepare(args.build)
    failed = []
    with tempfile.TemporaryDirectory(prefix="keyturn-boot-") as name:
        silicon = Path(name) / "silicon"
        create_silicon(silicon, 0)
        for title, scenario in SCENARIOS:
            if title not in chosen:
                continue
            folder = Path(name) / title.replace(" ", "-")
            folder.mkdir()
            started = time.monotonic()
            try:
                scenario(folder, silicon, image)
                print(f"{title}: passed in {time.monotonic() - started:.1f} s", flush=True)
            except Exception as error:  # the others shall run all the same
                failed.append(title)
                print(f"{title}: FAILED\n{type(error).__name__}: {error}", flush=True)
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed  # {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def prepare(build: Path) -> Image:
    """The product's files as they were built, and one archive appended to its initrd."""
    lines = (line.split("  ") for line in (build / "SHA256SUMS").read_text().splitlines())
    sums = {name: digest for digest, name in lines}
    (kernel,) = build.glob("*-vmlinuz-*")
    (product,) = build.glob("keyturn-*-initrd.zst")
    (command_line,) = build.glob("*-cmdline")
    digest = hashlib.sha256(product.read_bytes()).hexdigest()
    if digest != sums[product.name]:
        raise RuntimeError("the initrd is not the one that was built")
    print(f"initrd {product.name} sha256 {digest}, as built", flush=True)
    version = kernel.name.split("-vmlinuz-")[1]
    extra, whole = build / "boot-test-overlay.zst", build / "boot-test-initrd.zst"
    overlay.make(extra, version)
    append(whole, product, extra)
    return Image(kernel, whole, command_line.read_text().strip())


def append(target: Path, *archives: Path) -> None:
    """One initrd of several archives."""
    with target.open("wb") as whole:
        for archive in archives:
            with archive.open("rb") as source:
                shutil.copyfileobj(source, whole)
            whole.write(bytes(-whole.tell() % 4))  # the kernel looks for the next archive at a multiple of 4


def site(folder: Path, silicon: Path, image: Image, undo: ExitStack, change: Callable[[World], None] = lambda _: None) -> Site:
    """A guest that is about to boot, and everything it needs."""
    canary = f"keyturn-canary-{os.urandom(12).hex()}"
    tiny_gguf.write(folder / "plain.gguf", canary)
    model = (folder / "plain.gguf").read_bytes()
    (folder / "plain.gguf").unlink()
    world = World(folder / "world", silicon, undo, gpus=0, given=model, key=os.urandom(32))
    store = undo.enter_context(layout_server.serve(world.layout))
    world.tee = {"attester": "snp"}
    world.broker_config |= {"endpoints": [f"{HOST}:{world.broker_port}"], "timeout_s": 30, "route_timeout_s": 60}
    world.artifact["source"] = store.replace("127.0.0.1", HOST)
    command = ["/usr/bin/python3.11", "-I", "/opt/server/llama_server.py", "--host", "{host}", "--port", "{port}"]
    world.server = {
        "preset": "llama-cpp",
        "command": [*command, "--model", "{model}", "--alias", "{model_id}"],
        "host": "0.0.0.0",  # the host asks through a forwarded port
        "port": SERVER_PORT,
        "model_id": "tiny",
        "probe": "completion",
        "ready_timeout_s": 60,
        "scratch_mib": 16,
    }
    del world.row["manifest_digests"]
    change(world)
    document = world.write_initdata(world.write_config(), "sha384").read_bytes()
    world.launch(fit(hashlib.sha384(document).digest(), 32))
    (folder / "initdata.img").write_bytes(pack_device(document))
    firmware = undo.enter_context(Firmware(folder / "tsm", world.machine))
    server_port, health_port = free_port(), free_port()
    guest = Guest(
        image,
        folder,
        folder / "tsm",
        folder / "initdata.img",
        {server_port: SERVER_PORT, health_port: HEALTH_PORT},
        parameters=f"{ADDRESS} keyturn.health=0.0.0.0:{HEALTH_PORT}",
    )
    return Site(world, firmware, guest, server_port, health_port, canary)


def same(what: str, found: object, expected: object) -> None:
    assert found == expected, f"{what}: {found!r}, expected {expected!r}"


def ask(port: int, method: str, path: str, body: object = None) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()


# --- scenarios --------------------------------------------------------------------------------------------------------


def start(here: Site, undo: ExitStack) -> Guest:
    here.world.start_broker()
    return undo.enter_context(here.guest)


def serve(here: Site) -> dict[str, Any]:
    """Until the model is served and has answered; the value is the agent's status."""
    guest = here.guest
    guest.wait_for("keyturn: model server ready", BOOT_S)
    answer = ask(here.server_port, "POST", "/v1/completions", {"model": "tiny", "prompt": "sealed", "max_tokens": 8})
    status = ask(here.health_port, "GET", "/status")
    print("  " + ", ".join(f"{what} {guest.seconds(pattern) or -1:.1f} s" for what, pattern in TIMELINE))
    print(f"  answer {json.dumps(answer['choices'])[:160]}")
    peak_kib, supervisor_kib = (int(str(status["memory"][name])) for name in ("worker_peak_kib", "supervisor_kib"))
    print(f"  worker at most {peak_kib / 1024:.1f} MiB, supervisor {supervisor_kib / 1024:.1f} MiB")
    assert peak_kib <= MAX_WORKER_KIB and supervisor_kib <= MAX_SUPERVISOR_KIB, "the agent needs more memory than it should"
    same("status", (status["phase"], status["simulated"]), ("serving", True))
    same("audit", here.world.audit(), [("attest", "allowed", None), ("release", "allowed", None)])
    same("reports asked of the firmware", here.firmware.requests, 3)
    return status


def success(folder: Path, silicon: Path, image: Image) -> None:
    """The product's own /init is the kernel's first program."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        start(here, undo)
        serve(here)
        no_canary(here)


def in_512_mib(folder: Path, silicon: Path, image: Image) -> None:
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        here.guest.memory_mib = 512
        start(here, undo)
        serve(here)


def late_route(folder: Path, silicon: Path, image: Image) -> None:
    """As in a Kata guest: somebody else makes the network, when the local checks are over and the agent waits."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        here.guest.parameters = f"rdinit=/opt/hand/init keyturn.health=0.0.0.0:{HEALTH_PORT}"
        guest = start(here, undo)
        guest.wait_for("keyturn: local checks passed", BOOT_S)
        guest.wait_for("keyturn: waiting for route", 10)
        same("audit before there is a route", here.world.audit(), [])
        guest.hand(f"ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via {HOST}")
        guest.wait_for("keyturn: network: done", 20)
        guest.wait_for("keyturn: model server ready", BOOT_S)
        guest.hand("kill -TERM 1")
        same("end", guest.wait_for_end(END_S), (0, None))
        no_canary(here)


def worker_killed(folder: Path, silicon: Path, image: Image) -> None:
    """In the middle of a request to the firmware."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        here.guest.parameters += " rdinit=/opt/hand/init"
        asked = threading.Event()
        here.firmware.on_request = lambda _: asked.set()
        here.firmware.delay_s = END_S
        guest = undo.enter_context(here.guest)
        assert asked.wait(BOOT_S), "the firmware was never asked"
        supervisor = json.loads(guest.hand("cat /run/keyturn/status.json"))["agent"]["pid"]
        guest.hand(f"kill -9 $(cat /proc/{supervisor}/task/{supervisor}/children)")
        same("end", guest.wait_for_end(END_S), (21, "WorkerLostError"))
        no_canary(here)


def supervisor_killed(folder: Path, silicon: Path, image: Image) -> None:
    """While it serves."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        here.guest.parameters += " rdinit=/opt/hand/init"
        start(here, undo)
        status = serve(here)
        here.guest.hand(f"kill -9 {status['agent']['pid']}")
        same("end", here.guest.wait_for_end(END_S), (21, "SupervisorLostError"))
        no_canary(here)


def wiped(folder: Path, silicon: Path, image: Image) -> None:
    """The agent is a service here, so that the guest goes on after its end and its whole memory can be looked through."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        here.guest.parameters = "rdinit=/opt/hand/service"
        here.guest.memory_mib = 512
        start(here, undo)
        status = serve(here)
        secrets = {"canary": here.canary.encode(), "key": here.world.key_file.read_bytes()}
        before = found_in_memory(here.guest, secrets)
        assert "canary" in before, "a scan that does not find the weights while they are served finds nothing"
        supervisor = status["agent"]["pid"]
        here.guest.hand(f"kill -TERM {supervisor}")
        here.guest.wait_for("hand: agent ended with status 0", END_S)
        after = found_in_memory(here.guest, secrets)
        print(f"  in memory while serving: {sorted(before)}; after the wipe: {sorted(after)}")
        same("in memory after the wipe", after, set())
        no_canary(here)


def under_systemd(folder: Path, image: Image, *, of_extension: bool = False) -> Image:
    """The same guest with systemd as its first program, and the product's unit enabled."""
    extra, whole = folder / "systemd.zst", folder / "initrd.zst"
    overlay.make_systemd(extra, of_extension=of_extension)
    append(whole, image.initrd, extra)
    return replace(image, initrd=whole)


def unit(folder: Path, silicon: Path, image: Image) -> None:
    """READY after the local checks and before there is a route; the stop is asked for by systemd, and the guest goes on."""
    with ExitStack() as undo:
        here = site(folder, silicon, under_systemd(folder, image), undo)
        here.guest.parameters = "rdinit=/usr/lib/systemd/systemd"
        as_unit(here, undo)


def as_unit(here: Site, undo: ExitStack) -> None:
    guest = start(here, undo)
    guest.wait_for("keyturn: waiting for route", BOOT_S)
    same("unit without a route", unit_state(guest), ("active", "waiting for route, at most 60 s"))
    guest.hand(f"ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via {HOST}")
    serve(here)
    same("unit", unit_state(guest)[0], "active")
    guest.hand("/usr/bin/systemctl stop keyturn")
    same("unit after its stop", unit_state(guest)[0], "inactive")
    guest.wait_for("keyturn: stopped: exit_status 0", 5)
    no_canary(here)


def unit_state(guest: Guest) -> tuple[str, ...]:
    lines = guest.hand("/usr/bin/systemctl show keyturn --property ActiveState,StatusText").splitlines()
    values = dict(line.split("=", 1) for line in lines)
    return values["ActiveState"], values["StatusText"]


def unit_denied(folder: Path, silicon: Path, image: Image) -> None:
    """The agent fails: so does the machine."""
    with ExitStack() as undo:
        here = site(folder, silicon, under_systemd(folder, image), undo, _deny)
        here.guest.parameters = "rdinit=/usr/lib/systemd/systemd"
        guest = start(here, undo)
        guest.wait_for("keyturn: waiting for route", BOOT_S)
        guest.hand(f"ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via {HOST}")
        guest.wait_for("keyturn: error: key release denied", BOOT_S)
        guest.process.wait(END_S)
        guest.wait_for("keyturn: stopped: exit_status 16", 0)
        no_canary(here)


def unit_without_its_needs(folder: Path, silicon: Path, image: Image) -> None:
    """What the unit requires fails, so that the agent is never started: the machine is off all the same."""
    with ExitStack() as undo:
        here = site(folder, silicon, under_systemd(folder, image), undo)
        here.guest.parameters = "rdinit=/usr/lib/systemd/systemd boot-test.broken"
        guest = undo.enter_context(here.guest)
        guest.process.wait(END_S)
        assert guest.seconds("keyturn: ") is None, "the agent ran"
        assert guest.seconds("Linux version") is not None, "nothing ran"


@dataclass(frozen=True)
class Extension:
    """The guest extension image, as it was built, and a guest that takes its agent from it."""

    base: Image
    disk: Path
    verity_params: str


@cache
def extension_of(image: Image) -> Extension:
    build = image.kernel.parent
    (disk,) = build.glob("keyturn-*-extension.img")
    (params,) = build.glob("keyturn-*-extension.verity_params")
    (product,) = build.glob("keyturn-*-initrd.zst")
    base, whole = build / "boot-test-base.zst", build / "boot-test-base-initrd.zst"
    overlay.make_base(base, product)
    append(whole, base, build / "boot-test-overlay.zst")
    return Extension(replace(image, initrd=whole), disk, params.read_text().strip())


def plug(here: Site, image: Image) -> str:
    """What Kata's runtime gives a guest with an extension. The value is the parameter it gives to the kernel."""
    extension = extension_of(image)
    here.guest.image, here.guest.extension = extension.base, extension.disk
    parameter = f"kata.extension.keyturn.verity_params={extension.verity_params}"
    here.guest.parameters = f"rdinit=/opt/base/init {parameter}"
    return parameter


def extension(folder: Path, silicon: Path, image: Image) -> None:
    """As in a Kata guest: verified and mounted by the base, launched by its manifest, and the network once it is ready."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        plug(here, image)
        guest = start(here, undo)
        guest.wait_for("base: keyturn is ready for the network", BOOT_S)
        same("audit before there is a network", here.world.audit(), [])
        status = serve(here)
        program = guest.hand(f"readlink /proc/{status['agent']['pid']}/exe").strip()
        same("program", program, "/run/kata-extensions/keyturn/opt/keyturn/keyturn")
        no_canary(here)


def extension_denied(folder: Path, silicon: Path, image: Image) -> None:
    """Nobody looks at the agent any more when it fails: it ends the machine by itself."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo, _deny)
        plug(here, image)
        guest = start(here, undo)
        same("end", guest.wait_for_end(END_S), (16, "KeyReleaseDeniedError"))
        assert guest.seconds("base: the network is up") is not None
        no_canary(here)


def extension_tampered(folder: Path, silicon: Path, image: Image) -> None:
    """One bit of the agent's program is another one."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        plug(here, image)
        assert here.guest.extension
        here.guest.extension = flip_in(here.guest.extension, "/opt/keyturn/keyturn", folder / "tampered.img")
        refused(here, undo, "device-mapper: verity: .* data block [0-9]+ is corrupted")


def flip_in(disk: Path, file: str, target: Path) -> Path:
    """A copy of the image with one bit flipped in the first block of a file's content."""
    data = bytearray(disk.read_bytes())
    with (target.parent / "data").open("wb") as partition:
        partition.write(data[1 << 20 :])
    listing = ["dump.erofs", f"--path={file}", "-e", partition.name]
    said = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    found = re.search(r"0: +0\.\. *[0-9]+ \| +[0-9]+ : +([0-9]+)\.\.", said)
    assert found, said
    data[(1 << 20) + int(found[1]) + 100] ^= 1
    target.write_bytes(data)
    return target


def extension_of_another_root_hash(folder: Path, silicon: Path, image: Image) -> None:
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        right = plug(here, image)
        digit = right.index("root_hash=") + len("root_hash=")
        wrong = right[:digit] + ("1" if right[digit] == "0" else "0") + right[digit + 1 :]
        here.guest.parameters = here.guest.parameters.replace(right, wrong)
        refused(here, undo, "device-mapper: verity: .* metadata block [0-9]+ is corrupted")


def extension_unit(folder: Path, silicon: Path, image: Image) -> None:
    """A base with systemd, and the unit that the extension brings for it."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        plug_under_systemd(here, image)
        as_unit(here, undo)


def extension_unit_without_its_disk(folder: Path, silicon: Path, image: Image) -> None:
    """What the unit requires fails, so that the agent is never started: the machine is off all the same."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        plug_under_systemd(here, image)
        here.guest.extension = None
        guest = start(here, undo)
        guest.process.wait(END_S)
        guest.wait_for("base: there is no disk extension-keyturn", 5)
        assert guest.seconds("keyturn: ") is None, "the agent ran"


def plug_under_systemd(here: Site, image: Image) -> None:
    parameter = plug(here, image)
    here.guest.image = under_systemd(here.guest.folder, here.guest.image, of_extension=True)
    here.guest.parameters = f"rdinit=/usr/lib/systemd/systemd {parameter}"


def extension_without_its_disk(folder: Path, silicon: Path, image: Image) -> None:
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo)
        plug(here, image)
        here.guest.extension = None
        refused(here, undo, "base: there is no disk extension-keyturn")


def refused(here: Site, undo: ExitStack, why: str) -> None:
    """The machine ends without an agent that has said a word."""
    guest = start(here, undo)
    guest.process.wait(END_S)
    guest.wait_for(why, 5)
    guest.wait_for("base: refused with status", 5)
    assert guest.seconds("keyturn: ") is None, "the agent ran"
    same("audit", here.world.audit(), [])


def found_in_memory(guest: Guest, secrets: dict[str, bytes]) -> set[str]:
    """Which of these byte strings the guest's memory holds."""
    dump = guest.folder / "memory"
    guest.qmp("stop")
    guest.qmp("pmemsave", val=0, size=guest.memory_mib << 20, filename=str(dump))
    guest.qmp("cont")
    with dump.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        found = {name for name, value in secrets.items() if memory.find(value) >= 0}
    dump.unlink()
    return found


def no_canary(here: Site) -> None:
    """Neither console nor disk has it."""
    for path in (here.guest.console_log, here.guest.folder / "initdata.img"):
        data = path.read_bytes()
        assert here.canary.encode() not in data and here.world.key_file.read_bytes() not in data, f"a secret in {path.name}"


def from_volume(folder: Path, silicon: Path, image: Image) -> None:
    """Served from the disk, whose header is another from the check on; and gone with the agent, keys and devices too."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo, volume.attach)
        guest = here.guest
        guest.parameters, guest.memory_mib, guest.volume = "rdinit=/opt/hand/service", 512, volume.disk_of(here.world)
        secrets = {"canary": here.canary.encode(), "key": here.world.key_file.read_bytes()}
        secrets["volume key"] = volume.volume_key(here.world)

        def swap(_: object) -> None:
            """Before the second report, which is the one with the broker's nonce: no key was asked for yet."""
            if here.firmware.requests == 2:
                guest.wait_for("keyturn: prepare: done", BOOT_S)
                volume.null_cipher(here.world)

        here.firmware.on_request = swap
        start(here, undo)
        status = serve(here)
        guest.wait_for("keyturn: destination chosen: kind volume", 0)
        header = guest.hand("echo 1 >/proc/sys/vm/drop_caches; head -c 8192 /dev/vdb | grep -c cipher_null-ecb")
        same("headers with a null cipher on the guest's disk", header.strip(), "1")
        same("devices", sorted(guest.hand("cat /sys/block/dm-*/ro").split()), ["1", "1"])
        before = found_in_memory(guest, secrets)
        same("in memory while serving", before - {"key"}, {"canary", "volume key"})
        guest.hand(f"kill -TERM {status['agent']['pid']}")
        guest.wait_for("hand: agent ended with status 0", END_S)
        same("devices after the wipe", guest.hand("ls /sys/block | grep dm"), "")
        same("in memory after the wipe", found_in_memory(guest, secrets), set())
        no_canary(here)


def volume_damaged(folder: Path, silicon: Path, image: Image) -> None:
    """While it is served: whoever reads the block gets an error, and the boot ends for the right reason."""
    with ExitStack() as undo:
        here = site(folder, silicon, image, undo, volume.attach)
        here.guest.parameters += " rdinit=/opt/hand/init"
        here.guest.volume = volume.disk_of(here.world)
        start(here, undo)
        serve(here)
        volume.damage(here.world)
        server = here.guest.wait_for("keyturn: model server started", 0).split("(pid ")[1].split(",")[0]
        here.guest.hand(f"kill -9 {server}; sleep 0.2; echo 3 >/proc/sys/vm/drop_caches")
        same("end", here.guest.wait_for_end(END_S), (19, "VolumeAuthenticationError"))
        no_canary(here)


def _no_disk(_: World) -> None:
    return None


def ends_with(
    expected: tuple[int, str],
    change: Callable[[World], None],
    broker: bool = True,
    disk: Callable[[World], Path | None] = _no_disk,
) -> Callable[[Path, Path, Image], None]:
    """A boot that must end by itself, with this exit status and error class on its last line."""

    def scenario(folder: Path, silicon: Path, image: Image) -> None:
        with ExitStack() as undo:
            here = site(folder, silicon, image, undo, change)
            here.guest.volume = disk(here.world)
            if broker:
                here.world.start_broker()
            guest = undo.enter_context(here.guest)
            same("end", guest.wait_for_end(END_S), expected)
            no_canary(here)

    return scenario


def _deny(world: World) -> None:
    world.row_snp["measurements"] = [{"id": "image-1", "value": "00" * 48}]


def _tamper(world: World) -> None:
    blob = max((world.layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)


def _no_broker(world: World) -> None:
    world.broker_config["timeout_s"] = 5


def _no_memory(world: World) -> None:
    world.artifact["headroom_mib"] = 4096


def _null_cipher(world: World) -> None:
    volume.attach(world)
    volume.null_cipher(world)


def _other_root(world: World) -> None:
    volume.attach(world)
    volume.other_root(world)


def _damaged_folders(world: World) -> None:
    volume.attach(world)
    volume.damage_folders(world)


SCENARIOS: list[tuple[str, Callable[[Path, Path, Image], None]]] = [
    ("success", success),
    ("configfs-tsm", configfs_tsm),
    ("extension", extension),
    ("extension tampered", extension_tampered),
    ("volume", from_volume),
    ("volume of another root hash", ends_with((19, "VolumeAuthenticationError"), _other_root, disk=volume.disk_of)),
    ("extension denial", extension_denied),
    ("extension of another root hash", extension_of_another_root_hash),
    ("extension without its disk", extension_without_its_disk),
    ("extension systemd", extension_unit),
    ("extension systemd without its disk", extension_unit_without_its_disk),
    ("512 MiB", in_512_mib),
    ("route after local checks", late_route),
    ("broker down", ends_with((14, "BrokerUnreachableError"), _no_broker, broker=False)),
    ("denial", ends_with((16, "KeyReleaseDeniedError"), _deny)),
    ("tampered artifact", ends_with((19, "SegmentAuthenticationError"), _tamper)),
    ("too little memory", ends_with((20, "InsufficientMemoryError"), _no_memory)),
    ("worker killed", worker_killed),
    ("supervisor killed", supervisor_killed),
    ("wiped", wiped),
    ("systemd", unit),
    ("systemd denial", unit_denied),
    ("systemd dependency fails", unit_without_its_needs),
    ("volume with a null cipher", ends_with((19, "VolumeHeaderError"), _null_cipher, disk=volume.disk_of)),
    ("volume damaged while it is served", volume_damaged),
    ("volume with damaged folders", ends_with((19, "VolumeAuthenticationError"), _damaged_folders, disk=volume.disk_of)),
]


if __name__ == "__main__":
    sys.exit(main())
