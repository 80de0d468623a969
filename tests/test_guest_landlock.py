"""What a server can still do inside its Landlock domain: real servers, on folders that only Landlock keeps from them."""

import ctypes
import json
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.guest import hardening, landlock
from agent.server import Placement
from agent.server.process import spawn
from tests.children import in_child, readable
from tests.test_server_process import output_of, running

ABI = landlock.abi_version()
needs_landlock = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock, or a filter hides it")
needs_network = pytest.mark.skipif(ABI < 4, reason="this kernel's Landlock knows no TCP ports (before ABI 4)")

TRY = """
import errno, json, os, socket, sys
def tried(step):
    try:
        step()
    except OSError as error:
        return errno.errorcode[error.errno]
    return 'ok'
def write(path):
    with open(path, 'a') as file:
        file.write('x')
def connect(port, host='127.0.0.1'):
    with socket.create_connection((host, port), 5): pass
"""


@pytest.fixture
def folders() -> Iterator[Path]:
    """A scratch folder, a model's and one of somebody's; every user may write everywhere. pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="keyturn-landlock-") as name:
        yield open_to_all(Path(name))


def open_to_all(root: Path) -> Path:
    root.chmod(0o755)
    for folder in ("scratch", "model", "outside"):
        (root / folder).mkdir()
        (root / folder).chmod(0o777)
        (root / folder / "file").write_text("before")
        (root / folder / "file").chmod(0o666)
    return root


def place_in(root: Path) -> Placement:
    return Placement(f"{root}/model/file", f"{root}/model", f"{root}/scratch")


def answer_of(root: Path, steps: dict[str, str], egress: tuple[int, ...] = ()) -> dict[str, str]:
    """What a server found when it tried these Python statements."""
    table = ", ".join(f"{name!r}: tried(lambda: {step})" for name, step in steps.items())
    program = f"{TRY}\nroot = {str(root)!r}\nprint(json.dumps({{{table}}}))"
    found: dict[str, str] = json.loads(in_child(lambda: output_of(program, place_in(root), egress=egress)))
    return found


@needs_landlock
def test_a_server_writes_in_its_scratch_folder_and_nowhere_else(folders: Path) -> None:
    denied = {
        "append outside": "write(root + '/outside/file')",
        "create outside": "write(root + '/outside/new')",
        "create in /tmp": "write('/tmp/keyturn-landlock-test')",
        "remove outside": "os.unlink(root + '/outside/file')",
        "folder outside": "os.mkdir(root + '/outside/folder')",
        "link outside": "os.symlink('/', root + '/outside/link')",
        "append to the model": "write(root + '/model/file')",
        "add to the model": "write(root + '/model/new')",
        "remove the model": "os.unlink(root + '/model/file')",
        "write through a link": "(os.symlink(root + '/model/file', root + '/scratch/l'), write(root + '/scratch/l'))",
    }
    assert answer_of(folders, denied) == dict.fromkeys(denied, "EACCES")
    assert {path.read_text() for path in folders.glob("*/file")} == {"before"}
    assert {path.name for path in (*(folders / "outside").iterdir(), *(folders / "model").iterdir())} == {"file"}

    allowed = {
        "read the model": "open(root + '/model/file').read()",
        "read outside": "open(root + '/outside/file').read()",
        "list outside": "os.listdir(root + '/outside')",
        "append": "write(root + '/scratch/file')",
        "make folders": "os.makedirs(root + '/scratch/a/b')",
        "make": "write(root + '/scratch/a/new')",
        "truncate": "os.truncate(root + '/scratch/a/new', 0)",
        "rename": "os.rename(root + '/scratch/a/new', root + '/scratch/a/b/new')",
        "link": "os.link(root + '/scratch/a/b/new', root + '/scratch/linked')",
        "pipe": "os.mkfifo(root + '/scratch/pipe')",
        "socket": "socket.socket(socket.AF_UNIX).bind(root + '/scratch/socket')",
        "remove": "(os.unlink(root + '/scratch/a/b/new'), os.rmdir(root + '/scratch/a/b'))",
    }
    if ABI < 2:
        del allowed["rename"], allowed["link"], allowed["remove"]  # before ABI 2 nothing moves between folders
    assert answer_of(folders, allowed) == dict.fromkeys(allowed, "ok")


@needs_landlock
def test_a_server_has_devices_shared_memory_and_its_own_proc(folders: Path) -> None:
    allowed = {
        "null": "open('/dev/null', 'w').write('x')",
        "zero": "open('/dev/zero', 'r+b', 0).write(b'x')",
        "ioctl on a terminal": "os.openpty()",
        "shared memory": "(write(f'/dev/shm/kt-{os.getpid()}'), os.unlink(f'/dev/shm/kt-{os.getpid()}'))",
        "own name": "open('/proc/self/comm', 'wb', 0).write(b'x')",
    }
    assert answer_of(folders, allowed) == dict.fromkeys(allowed, "ok")


@needs_landlock
def test_what_a_server_starts_is_in_the_same_domain(folders: Path) -> None:
    inner = f"{TRY}\nprint(tried(lambda: write({str(folders / 'outside/new')!r})), end='')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {inner!r}])"
    assert in_child(lambda: output_of(program, place_in(folders))) == b"EACCES"


@needs_landlock
def test_a_model_below_shared_memory_is_read_only_and_devices_stay_writable() -> None:
    """Where `artifact.directory` lies in /dev/shm: the rule for /dev would cover it."""
    with (
        tempfile.NamedTemporaryFile(prefix="keyturn-beside-", dir="/dev/shm"),  # a rule of its own, and one for a file
        tempfile.TemporaryDirectory(prefix="keyturn-landlock-", dir="/dev/shm") as name,
    ):
        root = open_to_all(Path(name))
        steps = {
            "model": "write(root + '/model/file')",
            "add to the model": "write(root + '/model/new')",
            "beside the model": "write(root + '/new')",
            "scratch": "write(root + '/scratch/new')",
            "null": "open('/dev/null', 'w').write('x')",
            "ioctl on a terminal": "os.openpty()",
        }
        expected = dict.fromkeys(steps, "EACCES") | dict.fromkeys(("scratch", "null", "ioctl on a terminal"), "ok")
        assert answer_of(root, steps) == expected


@needs_network
def test_a_server_connects_to_the_ports_of_its_egress_and_listens_where_it_likes(folders: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as named, socket.create_server(("127.0.0.1", 0)) as other:
        steps = {
            "named": f"connect({named.getsockname()[1]})",
            "other": f"connect({other.getsockname()[1]})",
            "away": "connect(443, '192.0.2.1')",
            "listen": "socket.create_server(('127.0.0.1', 0))",
        }
        none = answer_of(folders, steps)
        one = answer_of(folders, steps, egress=(named.getsockname()[1],))
    assert none == {"named": "EACCES", "other": "EACCES", "away": "EACCES", "listen": "ok"}
    assert one == none | {"named": "ok"}


@needs_network
def test_egress_0_is_every_port_that_the_kernel_gives_out_and_no_other(folders: Path) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.create_server(("127.0.0.1", 0)) as given:
        steps = {"given": f"connect({given.getsockname()[1]})", "first": f"connect({first})", "below": f"connect({first - 1})"}
        found = answer_of(folders, steps, egress=(0,))
    assert (found["given"], found["below"]) == ("ok", "EACCES")
    assert found["first"] in {"ok", "ECONNREFUSED"}


@needs_landlock
@pytest.mark.parametrize("abi", range(1, ABI + 1))
def test_an_older_abi_keeps_what_it_knows(folders: Path, abi: int) -> None:
    def scenario() -> list[str]:
        hardening.confine_child(None, None, os.getppid(), {int(number) for number in os.listdir("/proc/self/fd")})
        landlock.confine(abi, f"{folders}/scratch", f"{folders}/model", ())
        found = []
        for path in ("outside/new", "model/file", "scratch/new"):
            try:
                (folders / path).write_text("x")
                found.append("ok")
            except PermissionError:
                found.append("denied")
        try:
            socket.create_connection(listening.getsockname(), 5)
            found.append("ok")
        except PermissionError:
            found.append("denied")
        return found

    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert in_child(scenario) == ["denied", "denied", "ok", "denied" if abi >= 4 else "ok"]


@needs_landlock
def test_a_started_server_says_which_abi_confines_it() -> None:
    def scenario() -> int:
        server = spawn(running("pass"), Placement("/model/file", "/model", "/scratch"))
        assert readable(server.pidfd)
        server.destroy()
        return server.landlock

    assert in_child(scenario) == ABI


def test_a_kernel_without_landlock_starts_the_server_all_the_same_and_says_so(folders: Path) -> None:
    """A seccomp filter that answers ENOSYS is what a kernel without it looks like."""

    def scenario() -> tuple[int, bytes]:
        hide_landlock()
        program = f"open({str(folders / 'outside/new')!r}, 'w'); print('started', flush=True)"
        server = spawn(running(program), place_in(folders))
        assert readable(server.pidfd)
        server.destroy()
        return server.landlock, server.output.tail()

    assert in_child(scenario) == (0, b"started\n")


def hide_landlock() -> None:
    load, is_equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allow, enosys = 0x7FFF0000, 0x00050000 | 38
    steps = [(load, 0, 0, 0), (is_equal, 0, 1, 444), (give, 0, 0, enosys), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, ctypes.c_ulong(2), program) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    assert landlock.abi_version() == 0
