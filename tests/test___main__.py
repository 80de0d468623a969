import json
import os
import subprocess
import sys
import time

import pytest

from agent.__main__ import _FIXED as CLEAN
from agent.__main__ import _keep


def environment_of_the_agent(environment: dict[str, str], *isolated: str) -> dict[str, str]:
    """The environment after the first act of the process, read from inside by a verb that waits on its input."""
    process = subprocess.Popen(
        [sys.executable, *isolated, "-m", "agent", "config", "check", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin
    assert process.stderr
    deadline = time.monotonic() + 10
    try:
        while True:  # the same process: it has replaced itself once its environment says so
            with open(f"/proc/{process.pid}/environ", "rb") as stream:
                found = dict(pair.split("=", 1) for pair in stream.read().decode().split("\0")[:-1])
            if "KEYTURN_CLEANED" in found:
                break
            assert process.poll() is None
            assert time.monotonic() < deadline, "it did not replace itself"
        with open(f"/proc/{process.pid}/cmdline", "rb") as stream:
            assert b"\0-I\0" in stream.read()
    finally:
        process.communicate(b"", timeout=20)
    return found


def test_nothing_of_the_callers_environment_passes_but_the_terminal() -> None:
    hostile = {
        "SSLKEYLOGFILE": "/tmp/keys",
        "PYTHONPATH": "/tmp/evil",
        "PYTHONSTARTUP": "/tmp/evil.py",
        "LD_PRELOAD": "",
        "GRPC_TRACE": "all",
        "GRPC_VERBOSITY": "DEBUG",
        "OPENSSL_CONF": "/tmp/openssl.cnf",
        "https_proxy": "http://evil:1",
        "SSL_CERT_FILE": "/tmp/ca.pem",
        "PATH": "/tmp/evil:/usr/bin:/bin",
        "TERM": "dumb",
    }
    found = environment_of_the_agent({**os.environ, **hostile})
    assert set(found) <= {"PATH", "LC_ALL", "GRPC_VERBOSITY", "TERM", "COLUMNS", "LINES", "NO_COLOR", "KEYTURN_CLEANED"}
    assert found["TERM"] == "dumb"
    assert found["GRPC_VERBOSITY"] == "NONE"
    assert "/tmp/evil" not in found["PATH"]


def test_an_isolated_interpreter_does_not_make_up_for_the_environment() -> None:
    assert "SSLKEYLOGFILE" not in environment_of_the_agent({**CLEAN, "SSLKEYLOGFILE": "/tmp/keys"}, "-I")


def test_a_clean_environment_does_not_make_up_for_an_interpreter_that_is_not_isolated() -> None:
    assert environment_of_the_agent(CLEAN) == {**CLEAN, "KEYTURN_CLEANED": "1"}


@pytest.mark.parametrize("isolated", [[], ["-I"]])
def test_however_it_is_started_the_command_line_is_reached(isolated: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *isolated, "-m", "agent", "--version", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert "interfaces" in json.loads(done.stdout)


def kept(found: dict[str, str], *, bundled: bool) -> set[bytes]:
    with open(int(_keep(found, bundled=bundled)), "rb") as file:
        file.seek(0)
        return set(file.read().split(b"\0")[:-1])


def test_what_exec_keeps_is_what_the_container_was_given() -> None:
    assert kept({"A": "1=2", "LD_LIBRARY_PATH": "/opt"}, bundled=False) == {b"A=1=2", b"LD_LIBRARY_PATH=/opt"}


def test_of_a_bundle_the_variables_of_its_loader_are_taken_back() -> None:
    loaded = {"A": "1", "_PYI_ARCHIVE_FILE": "x", "LD_LIBRARY_PATH": "/bundle:/opt", "LD_LIBRARY_PATH_ORIG": "/opt"}
    assert kept(loaded, bundled=True) == {b"A=1", b"LD_LIBRARY_PATH=/opt"}
    assert kept({"A": "1", "LD_LIBRARY_PATH": "/bundle"}, bundled=True) == {b"A=1"}
