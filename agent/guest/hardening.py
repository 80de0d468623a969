"""What we ask of the kernel for our own processes, and for a child just before it becomes something else.

Owns prctl, capabilities, core limits and inherited descriptors. Does not fork, exec or mount.
Follows prctl(2), capabilities(7), core(5) and credentials(7). Standard library only, because the supervisor imports it.
"""

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Collection
from pathlib import Path

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
# include/uapi/linux/capability.h: version 3 takes two records of three 32-bit masks
_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_BITS = 64
# include/uapi/asm-generic/unistd.h; the same number on every architecture, and in no glibc before 2.34
_SYS_CLOSE_RANGE = 436
_UINT_MAX = (1 << 32) - 1

_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
_LIBC = ctypes.CDLL(None, use_errno=True)


def harden_agent() -> None:
    """Make this process, and what it forks, unreadable to others of its user, without cores and without new privileges.

    Not dumpable: no core, no ptrace, and `/proc/self/mem` belongs to root. The rest survives fork and exec.

    Raises:
        OSError: the kernel refused.
    """
    # refusal: test_agent_is_not_dumpable_has_no_core_no_new_privileges_and_a_narrow_umask
    _prctl(_PR_SET_DUMPABLE, 0)
    forbid_core()
    _forbid_new_privileges()
    os.umask(0o077)


def harden_successor() -> None:
    """Before this process becomes a program that is not ours to confine: no cores, no new privileges, no descriptor but 0 to 2.

    Raises:
        OSError: the kernel refused.
    """
    # refusal: test_commands_exec.py::test_the_server_has_no_cores_no_new_privileges_and_no_descriptors_of_ours
    forbid_core()
    # refusal: test_commands_exec.py::test_the_server_has_no_cores_no_new_privileges_and_no_descriptors_of_ours
    _forbid_new_privileges()
    # refusal: test_commands_exec.py::test_the_server_has_no_cores_no_new_privileges_and_no_descriptors_of_ours
    close_descriptors_except((0, 1, 2))


def become_subreaper() -> None:
    """Let orphans among our descendants become our children, so that none can outlive us unseen. Not inherited by fork."""
    # refusal: test_orphans_of_a_subreaper_become_its_children
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_core(core_pattern: Path = _CORE_PATTERN) -> None:
    """Set the soft and hard core limit to 1 byte.

    0 stops core files only: a piped core handler ignores the limit, except for the value 1 (core(5), "Piping core dumps
    to a program"), and no file is written below one page.

    Raises:
        OSError: EPERM, the hard limit is already 0, we may not raise it, and cores go to a pipe.
    """
    try:
        # refusal: test_core_limit_that_cannot_be_raised_to_one_is_an_error_only_where_cores_go_to_a_pipe
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:  # how Python reports EPERM here; only a hard limit of 0 is below 1
        if core_pattern.read_bytes().startswith(b"|"):
            raise PermissionError(errno.EPERM, "core limit") from None


def die_with_parent(parent: int) -> None:
    """Be killed by the kernel when the parent dies. Call it last: a change of user takes it back.

    Args:
        parent: process id of the parent, taken before the fork.
    """
    # refusal: test_confined_child_dies_with_its_parent_although_it_changed_its_user
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # refusal: test_child_of_a_parent_that_died_before_the_call_kills_itself
    if os.getppid() != parent:  # it died before the call above, so no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


def confine_child(uid: int | None, gid: int | None, parent: int, kept: Collection[int]) -> None:
    """Take from a freshly forked child what it must not have; all of it survives exec.

    It is left with no capabilities and no way to gain any, core limit 1, umask 077, and the kernel's promise to kill it
    when its parent dies.

    Args:
        uid: user to become; None = stay who it is, with the groups it has.
        gid: group to become, without supplementary groups; None as above.
        parent: process id of the parent, taken before the fork.
        kept: the descriptors that stay open.

    Raises:
        OSError: the kernel refused a step.
    """
    os.umask(0o077)
    # refusal: test_confined_child_holds_exactly_the_kept_descriptors
    close_descriptors_except(kept)
    forbid_core()
    _drop_privileges(uid, gid)
    # refusal: test_confined_child_dies_with_its_parent_although_it_changed_its_user
    die_with_parent(parent)


def _drop_privileges(uid: int | None, gid: int | None) -> None:
    for capability in range(_CAPABILITY_BITS):
        try:
            # refusal: test_confined_child_is_another_user_without_groups_and_has_no_capability_in_any_set
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            # EINVAL: the kernel's last capability was the one before. EPERM: we lack CAP_SETPCAP and the bounding set stays;
            # it limits only what an exec may gain, and with no_new_privs below an exec gains nothing.
            break
    if gid is not None:
        # refusal: test_confined_child_is_another_user_without_groups_and_has_no_capability_in_any_set
        os.setgroups([])
        # refusal: test_confined_child_is_another_user_without_groups_and_has_no_capability_in_any_set
        os.setresgid(gid, gid, gid)
    if uid is not None:
        # refusal: test_confined_child_is_another_user_without_groups_and_has_no_capability_in_any_set
        os.setresuid(uid, uid, uid)
    # Needed when the user stays the same. An empty inheritable set empties the ambient set too: capabilities(7), "Ambient".
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # refusal: test_confined_child_that_keeps_its_user_has_no_capabilities_either
    if _LIBC.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    _forbid_new_privileges()


def _forbid_new_privileges() -> None:
    """Set-id bits and file capabilities have no effect below this process any more."""
    # refusal: test_confined_child_that_keeps_its_user_has_no_capabilities_either
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def lead_standard_descriptors_nowhere() -> None:
    """So that no library can say anything: descriptors 0, 1 and 2 become the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)


def close_descriptors_except(kept: Collection[int]) -> None:
    """Close every descriptor of this process but these."""
    first = 0
    for descriptor in sorted(kept):
        _close_range(first, descriptor - 1)
        first = descriptor + 1
    _close_range(first, _UINT_MAX)


def _close_range(first: int, last: int) -> None:
    if first > last:
        return
    arguments = (ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))
    if _LIBC.syscall(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "close_range")


def _prctl(option: int, value: int) -> None:
    # Five full words: the kernel refuses some options when the unused arguments are not zero.
    if _LIBC.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
