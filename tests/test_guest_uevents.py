"""Real uevents: a network interface that is made makes the kernel say so."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.guest.uevents import appears

NAME = f"ktu{os.getpid() % 100000}"


def is_there() -> str | None:
    return NAME if Path("/sys/class/net", NAME).exists() else None


def wait(look: Callable[[], str | None], timeout_s: float) -> tuple[str | None, int]:
    told: list[None] = []
    found = asyncio.run(appears(look, timeout_s, lambda: told.append(None)))
    return found, len(told)


def test_what_is_there_is_found_at_once_and_no_wait_is_told() -> None:
    assert wait(lambda: "here", 60) == ("here", 0)


def test_without_time_it_looks_once() -> None:
    assert wait(lambda: None, 0) == (None, 0)


def test_what_never_comes_ends_at_the_deadline() -> None:
    assert wait(lambda: None, 0.05) == (None, 1)


def test_an_error_of_the_look_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        wait(lambda: str(1 // 0), 60)


def test_what_no_uevent_tells_of_is_looked_for_at_intervals() -> None:
    looked: list[None] = []

    def look() -> str | None:
        looked.append(None)
        return "here" if len(looked) == 3 else None

    assert asyncio.run(appears(look, 30, lambda: None, every_s=0.01)) == "here"
    assert asyncio.run(appears(lambda: None, 0.05, lambda: None, every_s=0.01)) is None


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="only root makes interfaces, with iproute2's ip")
def test_what_appears_later_is_found_when_the_kernel_says_so() -> None:
    looked: list[None] = []

    def look() -> str | None:
        looked.append(None)
        if len(looked) == 2:  # the monitor listens
            subprocess.run(["ip", "link", "add", NAME, "type", "veth"], check=True)
            return None
        return is_there()

    try:
        made = subprocess.run(["ip", "link", "add", NAME, "type", "veth"], capture_output=True)
        if made.returncode:
            pytest.skip("this kernel makes no veth pair")
        subprocess.run(["ip", "link", "del", NAME], check=True)
        assert wait(look, 30) == (NAME, 1)
    finally:
        subprocess.run(["ip", "link", "del", NAME], capture_output=True)
