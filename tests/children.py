"""Run a scenario in a process of its own, and programs that a user without rights can run."""

import functools
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar, cast

from agent.guest.hardening import become_subreaper, die_with_parent

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
DEADLINE_S = 60.0

_Result = TypeVar("_Result")


def in_child(scenario: Callable[[], _Result]) -> _Result:
    """What `scenario` returns in a forked child, which adopts orphans like the supervisor. A raise there is one here."""
    parent = os.getpid()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent)
            become_subreaper()
            os.close(ours)
            answer: tuple[_Result | None, str]
            try:
                answer = scenario(), ""
            except BaseException:
                answer = None, traceback.format_exc()
            with open(theirs, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        try:
            data = b""
            while readable(pipe.fileno()) and (chunk := os.read(pipe.fileno(), 1 << 16)):
                data += chunk
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert data, "the scenario's process ended without an answer, or is too slow"
    answer = pickle.loads(data)
    assert answer[1] == "", answer[1]
    return cast(_Result, answer[0])


def own_machine() -> tuple[str, ...]:
    """Starts a command in a PID namespace of its own: what it powers off there is that namespace, killed by SIGINT."""
    return ("unshare", "--pid", "--fork", *(() if IS_ROOT else ("--map-root-user",)))


def readable(descriptor: int, timeout_s: float = DEADLINE_S) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def read_line(descriptor: int) -> bytes:
    """One line from a pipe, byte by byte, so that the next line stays in it; what there was when it ends early."""
    line = b""
    while not line.endswith(b"\n") and readable(descriptor) and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def gone(pids: Iterable[int]) -> bool:
    """Is none of them a process any more, not even a zombie?"""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@functools.cache
def python() -> str:
    """An interpreter that every user may execute: a virtual environment's can lie in somebody's home."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(candidate).resolve()
        if path.exists() and all(part.stat().st_mode & 0o001 for part in (path, *path.parents)):
            return str(path)
    raise AssertionError("no interpreter that every user may execute")
