"""A FUSE server in a child process, for as long as a test."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.errors import SimulationRefusedError
from agent.guest.hardening import die_with_parent
from agent.sim.fuse import mount
from tests.children import readable

LIFE_S = 60
"""A server ends then, which fails every request that still waits."""

Serve = Callable[[int, socket.socket], None]
"""Answers requests of the device until the other end of the socket is closed."""


@contextlib.contextmanager
def served(mountpoint: Path, serve: Serve) -> Iterator[tuple[Path, socket.socket]]:
    """A mounted server, a folder or a file as the mountpoint is: its path in this process and its socket. Or a skip."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            die_with_parent(parent)
            signal.alarm(LIFE_S)
            try:
                device = mount(mountpoint)
            except SimulationRefusedError as error:
                theirs.send(str(error).encode())
            else:
                theirs.send(b"mounted")
                serve(device, theirs)
        finally:
            os._exit(1)
    theirs.close()
    try:
        assert readable(ours.fileno()), "the fake does not start"
        said = ours.recv(1 << 10).decode()
        assert said, "the fake does not start"
        if said != "mounted":
            pytest.skip(said)
        yield Path(f"/proc/{pid}/root{mountpoint}"), ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
