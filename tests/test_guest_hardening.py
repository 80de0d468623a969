"""What the kernel says of a process after `hardening` has dealt with it. Every case runs in a forked child."""

import ctypes
import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.guest import hardening
from tests.children import IS_ROOT, NOBODY, in_child, readable

_PR_GET_DUMPABLE = 3
_CAP_NET_RAW = 13
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
_LIBC = ctypes.CDLL(None, use_errno=True)


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_agent_is_not_dumpable_has_no_core_no_new_privileges_and_a_narrow_umask() -> None:
    def scenario() -> tuple[int, tuple[int, int], str, int]:
        os.umask(0o022)
        hardening.harden_agent()
        return (
            _LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0),
            resource.getrlimit(resource.RLIMIT_CORE),
            status()["NoNewPrivs"],
            os.umask(0),
        )

    assert in_child(scenario) == (0, (1, 1), "1", 0o077)


def test_core_limit_that_cannot_be_raised_to_one_is_an_error_only_where_cores_go_to_a_pipe(tmp_path: Path) -> None:
    pattern = tmp_path / "core_pattern"

    def scenario() -> int | None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if IS_ROOT:
            drop_everything()
        try:
            hardening.forbid_core(pattern)
        except OSError as error:
            return error.errno
        return None

    os.chmod(tmp_path, 0o755)
    pattern.write_text("core\n")
    assert in_child(scenario) is None
    pattern.write_text("|/usr/lib/systemd/systemd-coredump %P\n")
    assert in_child(scenario) == errno.EPERM


def how_it_aborted(harden: Callable[[], None], folder: Path) -> int:
    """The si_code of a child that aborts in a folder where its core could lie: CLD_KILLED, or CLD_DUMPED with a core."""

    def scenario() -> int:
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            harden()
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            os.abort()
        ended = os.waitid(os.P_PID, pid, os.WEXITED)
        assert ended is not None and ended.si_status == signal.SIGABRT
        return ended.si_code

    return in_child(scenario)


def test_core_limit_of_one_leaves_no_core_whatever_this_machine_does_with_cores(tmp_path: Path) -> None:
    """The kernel's own word: it says CLD_DUMPED also when a pipe took the core. Still dumpable, as the server is after exec."""

    def as_dumpable() -> None:
        hardening.forbid_core()
        assert _LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1

    assert how_it_aborted(as_dumpable, tmp_path) == os.CLD_KILLED
    assert list(tmp_path.iterdir()) == []


def test_hardened_agent_leaves_no_core_although_its_limit_is_one(tmp_path: Path) -> None:
    assert how_it_aborted(hardening.harden_agent, tmp_path) == os.CLD_KILLED
    assert list(tmp_path.iterdir()) == []


def test_child_that_is_not_hardened_does_leave_a_core_here(tmp_path: Path) -> None:
    """Or the two tests above would prove nothing."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY or not CORE_PATTERN.read_text().strip():
        pytest.skip("this machine lets nobody leave a core")
    if CORE_PATTERN.read_text().startswith(("|", "/", "@")):
        pytest.skip("cores of this machine go elsewhere: this test leaves none there")

    def allow_core() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)

    assert how_it_aborted(allow_core, tmp_path) == os.CLD_DUMPED
    assert len(list(tmp_path.iterdir())) == 1


def drop_everything() -> None:
    """Root without capabilities: may still read files of root, may raise no limit."""
    hardening.confine_child(None, None, os.getppid(), {int(number) for number in os.listdir("/proc/self/fd")})


def test_orphans_of_a_subreaper_become_its_children() -> None:
    def scenario() -> bool:
        hardening.become_subreaper()
        ours, theirs = os.pipe()
        middle = os.fork()
        if middle == 0:
            orphan = os.fork()
            if orphan == 0:
                signal.pause()
            os.write(theirs, orphan.to_bytes(4, "little"))
            os._exit(0)
        orphan = int.from_bytes(os.read(ours, 4), "little")
        os.waitpid(middle, 0)
        os.kill(orphan, signal.SIGKILL)
        return os.waitpid(orphan, 0)[0] == orphan

    assert in_child(scenario)


def test_child_of_a_parent_that_died_before_the_call_kills_itself() -> None:
    def scenario() -> int:
        pid = os.fork()
        if pid == 0:
            hardening.die_with_parent(os.getppid() + 1)
            os._exit(0)
        return os.WTERMSIG(os.waitpid(pid, 0)[1])

    assert in_child(scenario) == signal.SIGKILL


def test_confined_child_dies_with_its_parent_although_it_changed_its_user() -> None:
    def scenario() -> bool:
        ours, theirs = os.pipe()
        middle = os.fork()
        if middle == 0:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                user = NOBODY if IS_ROOT else None
                hardening.confine_child(user, user, parent, {theirs})
                os.write(theirs, os.getpid().to_bytes(4, "little"))
                signal.pause()
            signal.pause()
        child = os.pidfd_open(int.from_bytes(os.read(ours, 4), "little"))
        assert not readable(child, 0)
        os.kill(middle, signal.SIGKILL)
        try:
            return readable(child, 5)
        finally:
            signal.pidfd_send_signal(child, signal.SIGKILL)

    assert in_child(scenario)


def confined(uid: int | None, gid: int | None) -> dict[str, str]:
    """Status of a confined child; before it, the inheritable and ambient sets were not empty where we could fill them."""

    def scenario() -> dict[str, str]:
        if IS_ROOT:
            os.setgroups([NOBODY, 7])
            permitted = int(status()["CapPrm"], 16)
            low, high = permitted & 0xFFFFFFFF, permitted >> 32
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, ourselves
            assert _LIBC.capset(header, (ctypes.c_uint32 * 6)(low, low, 1 << _CAP_NET_RAW, high, high, 0)) == 0
            assert _LIBC.prctl(47, 2, _CAP_NET_RAW, 0, 0) == 0  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE
        hardening.confine_child(uid, gid, os.getppid(), {int(number) for number in os.listdir("/proc/self/fd")})
        return status() | {"umask": oct(os.umask(0)), "core": str(resource.getrlimit(resource.RLIMIT_CORE))}

    return in_child(scenario)


CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


@pytest.mark.skipif(not IS_ROOT, reason="only root can change its user")
def test_confined_child_is_another_user_without_groups_and_has_no_capability_in_any_set() -> None:
    after = confined(NOBODY, NOBODY)
    assert (after["Uid"].split(), after["Gid"].split(), after["Groups"]) == ([str(NOBODY)] * 4, [str(NOBODY)] * 4, "")
    assert {int(after[name], 16) for name in (*CAPABILITY_SETS, "CapBnd")} == {0}
    assert (after["NoNewPrivs"], after["umask"], after["core"]) == ("1", "0o77", "(1, 1)")


def test_confined_child_that_keeps_its_user_has_no_capabilities_either() -> None:
    after = confined(None, None)
    assert {int(after[name], 16) for name in CAPABILITY_SETS} == {0}
    assert after["NoNewPrivs"] == "1"


def test_confined_child_holds_exactly_the_kept_descriptors() -> None:
    def scenario() -> bytes:
        ours, theirs = os.pipe()
        for number in (300, 500, 900):
            os.dup2(ours, number)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            hardening.confine_child(None, None, parent, {0, theirs, 500})
            os.write(theirs, json.dumps([number for number in range(1024) if is_open(number)]).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert json.loads(os.read(ours, 4096)) == [0, theirs, 500]
        return b"seen"

    assert in_child(scenario) == b"seen"


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
