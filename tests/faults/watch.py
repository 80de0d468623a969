"""What a boot shows while it runs and leaves when it has ended: processes, mounts, files, descriptors, and canaries anywhere.

Looks from outside, as root of the guest would: at `/proc` of every process of the boot, at the health port, at the status
file as it changes, at every file that changed.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from agent.guest.hardening import become_subreaper
from tests.faults.canaries import Canaries

SAMPLE_S = 0.05
RESIDUE_S = 2.0
"""How long the kernel may take for what it cleans up."""
_NAMES = frozenset({"file name"})  # a mapping shows the name of its file; names are no secret of this design
_SERVERS = frozenset({"configuration secret", "server output", "file name"})  # the server is told these, and nobody else
_SILICON = "machine/"  # the simulated silicon keeps its state in files; the real one keeps it in the chip
_SHARED_FOLDERS = {Path("/run"): 9, Path("/dev/shm"): 9, Path("/var/tmp"): 9, Path("/tmp"): 1}
"""Where every process can write, and how deep it is searched: the tests themselves work below /tmp."""


class Watcher:
    """Looks at one agent again and again, from `start` to `stop`."""

    def __init__(self, pid: int, status_file: Path, health_port: int, canaries: Canaries) -> None:
        self._pid = pid
        self._status_file = status_file
        self._health_port = health_port
        self._canaries = canaries
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.leaks: set[str] = set()
        self.samples = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples += 1
            for pid in (self._pid, *descendants(self._pid)):
                self._look_at_process(pid)
            self._note("status file", self._canaries.found_in_file(self._status_file))
            with (
                contextlib.suppress(OSError, URLError),
                urlopen(f"http://127.0.0.1:{self._health_port}/status", None, 1) as answer,
            ):
                self._note("health port", self._canaries.found_in(answer.read()))
            if self._done.wait(SAMPLE_S):
                return

    def _look_at_process(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            of_server = os.getsid(pid) != os.getsid(self._pid)  # the server alone has a session of its own
            for part, known in (("cmdline", frozenset[str]()), ("environ", frozenset[str]()), ("maps", _NAMES)):
                data = Path(f"/proc/{pid}/{part}").read_bytes()
                self._note(f"/proc/PID/{part}", self._canaries.found_in(data, _SERVERS if of_server else known))

    def _note(self, where: str, kinds: set[str]) -> None:
        self.leaks |= {f"{kind} in {where}" for kind in kinds}


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, as of now."""
    found: list[int] = []
    todo = [pid]
    while todo:
        with contextlib.suppress(OSError):
            parent = todo.pop()
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                todo += children
    return found


class Before:
    """The state of things before a boot, to compare with. This process becomes a child subreaper."""

    def __init__(self, folder: Path) -> None:
        become_subreaper()  # what outlives the agent becomes our child
        self._folder = folder
        self._since = time.time()
        self._files = dict(_files_of(folder))
        self._children = set(descendants(os.getpid()))
        self._mounts = _own_mounts(folder)
        self._descriptors = _descriptors()
        self._threads = threading.active_count()

    def residue(self, may_stay: frozenset[str], *, in_process: bool) -> list[str]:
        """What is there and was not, after the kernel had its time.

        Args:
            may_stay: files, relative to the folder, that are meant to stay.
            in_process: the fault ran in this process: its descriptors and threads count too.
        """
        deadline = time.monotonic() + RESIDUE_S
        while (found := self._found(may_stay, in_process)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _found(self, may_stay: frozenset[str], in_process: bool) -> list[str]:
        found = []
        for child in set(descendants(os.getpid())) - self._children:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG)[0] == child:
                    continue  # an orphan that had ended
            found.append("process")
        found += ["mount"] * len(_own_mounts(self._folder) - self._mounts)
        if in_process:
            found += ["descriptor"] * max(0, _descriptors() - self._descriptors)
            found += ["thread"] * max(0, threading.active_count() - self._threads)
        return found + [
            f"file {name}" for name in self.changed_files() if name not in may_stay and not name.startswith(_SILICON)
        ]

    def changed_files(self) -> list[str]:
        """Files of the folder that are new or were written to, relative to it."""
        return sorted(name for name, seen in _files_of(self._folder) if self._files.get(name) != seen)

    def leaks(self, canaries: Canaries) -> set[str]:
        """Canaries in any file that changed: in the folder, and where every process can write."""
        found = {
            f"{kind} in file {name}" for name in self.changed_files() for kind in canaries.found_in_file(self._folder / name)
        }
        for root, depth in _SHARED_FOLDERS.items():
            for path in _changed_since(root, depth, self._since):
                found |= {f"{kind} in file {path}" for kind in canaries.found_in_file(path)}
        return found


def _files_of(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if not path.is_dir():
                state = path.lstat()
                yield str(path.relative_to(folder)), (state.st_mtime_ns, state.st_size)


def _changed_since(root: Path, depth: int, since: float) -> Iterator[Path]:
    for folder, below, names in os.walk(root, onerror=None):
        if len(Path(folder).relative_to(root).parts) >= depth:
            below.clear()
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime >= since and path.is_file():
                    yield path


def _own_mounts(folder: Path) -> set[str]:
    return {
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/run/keyturn" in line or str(folder) in line
    }


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
