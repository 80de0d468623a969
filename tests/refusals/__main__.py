"""`scripts/check-refusals`: remove each security check in turn, and see its test turn red."""

import argparse
import enum
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from agent.guest.hardening import become_subreaper
from tests.refusals.marks import MarkerError, Removal, removals

ROOT = Path(__file__).resolve().parents[2]
RUN_LIMIT_S = 120
ALL_LIMIT_S = 900
_COPIED = ("agent", "protos", "tests", "pyproject.toml")
_SHOWN_CHARACTERS = 140
_TESTS_FAILED = 1  # pytest's exit status
_T = TypeVar("_T")

_HELP = """\
A check is marked beside itself: `# refusal: TEST…` on the line above the statement that refuses; tests/refusals/marks.py has
the rules, and the list of modules in which no refusal may be without a marker. One that survives is removed in a copy of the
project, and the tests it names pass all the same: write the test that fails, or delete a check that cannot be reached.
"""


class Outcome(enum.Enum):
    RED = "red"  # as it must be
    SURVIVES = "SURVIVES"
    HANGS = "HANGS"  # no verdict: slow and green looks the same
    NO_PROGRAM = "NO PROGRAM"  # pytest came to no verdict: the source without the check cannot even be imported
    RED_BEFORE = "RED BEFORE"
    SKIPPED = "skipped"  # cannot be judged on this machine


FAILURES = (Outcome.SURVIVES, Outcome.HANGS, Outcome.NO_PROGRAM, Outcome.RED_BEFORE)


class Copy:
    """A copy of the project, with an interpreter of its own that knows the copy and not the original.

    So processes that a test starts import it too: `-I`, with which the agent replaces itself, drops the working directory and
    the environment, but not what the interpreter's own site-packages say.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self._serial = itertools.count(1)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in _COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=ignore)
            elif (root / name).exists():
                shutil.copy(root / name, folder / name)
        environment = folder / ".venv"
        venv.create(environment, symlinks=True)
        self._python = environment / "bin/python"
        paths = sysconfig.get_paths("venv", {"base": str(environment), "platbase": str(environment)})
        packages = {sysconfig.get_path(name): None for name in ("purelib", "platlib")}
        Path(paths["purelib"], "copy.pth").write_text("\n".join([str(folder), *packages]))

    @contextmanager
    def without(self, removal: Removal) -> Iterator[None]:
        """The copy without one check."""
        path = self._folder / removal.path
        whole = path.read_bytes()
        self._write(path, removal.source)
        try:
            yield
        finally:
            self._write(path, whole)

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        # Python takes compiled code for current by size and whole seconds: no two states of a file may share both.
        serial = next(self._serial)
        os.utime(path, (serial, serial))

    def test(self, names: Sequence[str], *arguments: str, limit_s: float = RUN_LIMIT_S) -> int | None:
        """pytest's exit status; None: it took too long and was killed, with what it had started."""
        command = [str(self._python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *names]
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            command,
            cwd=self._folder,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # no test needs one, and importing them takes longest
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def test_whole(self, names: Sequence[str]) -> dict[str, Outcome]:
        """What each test says while no check is removed; a test without a verdict has no entry."""
        if not names:
            return {}
        report = self._folder / "report.xml"
        self.test(names, f"--junit-xml={report}", limit_s=ALL_LIMIT_S)
        outcomes: dict[str, Outcome] = {}
        for case in ET.parse(report).iter("testcase") if report.exists() else ():
            file = case.attrib["classname"].replace(".", "/") + ".py"
            name = f"{file}::{case.attrib['name'].partition('[')[0]}"
            if case.find("failure") is not None or case.find("error") is not None:
                outcomes[name] = Outcome.RED_BEFORE
            elif case.find("skipped") is not None:
                outcomes.setdefault(name, Outcome.SKIPPED)
            elif outcomes.get(name) is not Outcome.RED_BEFORE:
                outcomes[name] = Outcome.RED  # will be, without the check
        return outcomes


def audit(root: Path, chosen: Sequence[Removal], jobs: int) -> Iterator[tuple[Removal, Outcome]]:
    """What becomes of each removal, in order."""
    names = sorted({test for removal in chosen for test in removal.tests})
    with tempfile.TemporaryDirectory(prefix="refusals-") as folder, ThreadPoolExecutor(jobs) as pool:
        os.chmod(folder, 0o755)  # a server under another user must reach the interpreter
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for job in range(jobs):
            (Path(folder) / str(job)).mkdir()
            copies.put(Copy(root, Path(folder) / str(job)))

        def with_copy(work: Callable[[Copy], _T]) -> _T:
            copy = copies.get()
            try:
                return work(copy)
            finally:
                copies.put(copy)

        before: dict[str, Outcome] = {}
        for part in pool.map(lambda job: with_copy(lambda copy: copy.test_whole(names[job::jobs])), range(jobs)):
            before |= part

        def judge(removal: Removal) -> tuple[Removal, Outcome]:
            return removal, with_copy(lambda copy: _judge(copy, removal, before))

        yield from pool.map(judge, chosen)


def _judge(copy: Copy, removal: Removal, before: dict[str, Outcome]) -> Outcome:
    found = [before.get(test, Outcome.RED_BEFORE) for test in removal.tests]
    for bad in (Outcome.RED_BEFORE, Outcome.SKIPPED):
        if bad in found:
            return bad
    with copy.without(removal):
        status = copy.test(removal.tests, "-x")
    if status is None:
        return Outcome.HANGS
    return {_TESTS_FAILED: Outcome.RED, 0: Outcome.SURVIVES}.get(status, Outcome.NO_PROGRAM)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/check-refusals", epilog=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only checks whose line or tests contain one of these")
    parser.add_argument("--list", action="store_true", help="the checks and their tests")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many at a time; default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        checks = removals(root)
    except MarkerError as error:
        print(error)
        return 1
    chosen = [c for c in checks if not given.words or any(w in text for w in given.words for text in (str(c), *c.tests))]
    if given.list:
        for check in chosen:
            print(_short(check), *check.tests, sep="\n    ")
        print(f"{len(chosen)} checks")
        return 0
    started = time.monotonic()
    outcomes = []
    for check, outcome in audit(root, chosen, given.jobs):
        outcomes.append((check, outcome))
        print(f"{outcome.value:10} {_short(check)}", flush=True)
    failed = [(check, outcome) for check, outcome in outcomes if outcome in FAILURES]
    skipped = sum(outcome is Outcome.SKIPPED for _, outcome in outcomes)
    print(f"{len(outcomes)} checks, {skipped} skipped, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    for check, outcome in failed:
        print(f"{outcome.value}: {_short(check)}", *check.tests, sep="\n    ")
    return int(bool(failed) or not chosen)


def _short(check: Removal) -> str:
    text = str(check)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _kill_orphans() -> None:
    """End what tests left behind: the check that was missing may have been the one that ends it."""
    while pids := [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    become_subreaper()
    try:
        status = main()
    finally:
        _kill_orphans()
    sys.exit(status)
