"""What of PID 1 needs no machine of its own; that it boots one is `scripts/build-initrd` and QEMU's affair."""

import signal
import subprocess
import sys

import pytest

from agent.errors import SupervisorLostError
from agent.events import Stopped
from agent.guest.pid1 import MAX_LINE_BYTES, _last_line, is_guest_of_kata, kernel_parameters
from agent.report import BootReport
from tests.children import own_machine
from tests.test_errors import ALL, sample


def test_the_last_of_each_kernel_parameter_counts_and_words_without_a_value_do_not() -> None:
    assert kernel_parameters("quiet a=1 b=x=y a=2\n") == {"a": "2", "b": "x=y"}


@pytest.mark.parametrize(
    ("command_line", "is_one"),
    [
        ("quiet kata.extension.coco.verity_params=root_hash=00 panic=1\n", True),
        ("quiet kata.extension.coco.verity_params\n", True),
        ("BOOT_IMAGE=/vmlinuz root=/dev/vda1 agent=kata.extension.coco quiet\n", False),
        ("", False),
    ],
)
def test_a_guest_of_kata_is_known_by_its_command_line(command_line: str, is_one: bool) -> None:
    assert is_guest_of_kata(command_line) is is_one


def test_the_last_line_names_class_owner_and_exit_status_and_fits_the_kernel_log() -> None:
    line = _last_line(SupervisorLostError(signal=9, status=0))
    for part in ("exit status 21", "SupervisorLostError", "who must act: operator"):
        assert part in line
    assert all(len(_last_line(sample(cls)).encode()) <= MAX_LINE_BYTES for cls in ALL)


def test_a_boot_that_served_ends_with_status_0() -> None:
    report = BootReport("0.1.0", "init")
    report.apply(Stopped(0))
    assert report.last_line().startswith("end: exit status 0")


# Three processes: the first of the namespace, the launcher's child, and the supervisor below it.
LAUNCHED = """
import os, sys
from agent.errors import BootInterruptedError
from agent.events import Stopped
from agent.guest.pid1 import run_or_power_off
from agent.report import BootReport
from agent.server.process import fork

def supervise():
    report = BootReport("0.1.0", "run")
    {what}
    return report

if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os._exit(run_or_power_off(supervise, fork))
"""


@pytest.mark.parametrize(
    ("what", "powered_off"),
    [
        ("report.apply(Stopped(0))", False),
        ("report.apply(BootInterruptedError(15))", True),
        ("raise BootInterruptedError(15)", True),
        ("os.kill(os.getpid(), 9)", True),
        ("sys.exit(0)", True),
        # Killed, and a child of it lives on, for as long as a device keeps it.
        ("os.fork() or __import__('time').sleep(600); os.kill(os.getpid(), 9)", True),
    ],
)
def test_a_launched_boot_that_fails_or_is_killed_ends_the_machine(what: str, powered_off: bool) -> None:
    command = [*own_machine(), sys.executable, "-c", LAUNCHED.format(what=what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT if powered_off else 0, "")


def test_a_boot_that_cannot_even_be_started_ends_the_machine() -> None:
    program = LAUNCHED.format(what="pass").replace("supervise, fork))", "supervise, no_fork))")
    program = program.replace("if os.fork():", "def no_fork(inside):\n    raise BlockingIOError(11, '')\n\nif os.fork():")
    done = subprocess.run([*own_machine(), sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
