"""A Landlock domain for the model server: where it may write, and to which TCP ports it may connect.

Owns the three system calls and the list of writable places. Runs in the forked child, after the last privilege is gone and
before exec, and holds for everything the server starts; nothing can take it back. Reading and executing stay as they are.
Follows landlock(7) and the kernel's `userspace-api/landlock.rst`. What the kernel's ABI does not know is not restricted, and
these are outside Landlock: UDP (so DNS goes on), files that were open before, and the mode of a file.

The port rule is no wall against code that wants out: it hangs on connect(2) of plain TCP. Tried on Linux 6.18 (ABI 7) with
no port allowed: a socket of IPPROTO_MPTCP connects, and sendto(2) with MSG_FASTOPEN delivers its data. It stops what
libraries do by themselves; the guest's network has to stop an attacker.

Standard library only, because the supervisor imports it.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress

# include/uapi/asm-generic/unistd.h; the same numbers on every architecture, and no libc has names for them
_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
# include/uapi/linux/landlock.h
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2
_WRITE_FILE = 1 << 1
_REMOVE_DIR = 1 << 4
_REMOVE_FILE = 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER = 1 << 13  # ABI 2: link and rename between directories
_TRUNCATE = 1 << 14  # ABI 3
_CONNECT_TCP = 1 << 1  # ABI 4
_ABI_REFER, _ABI_TRUNCATE, ABI_NETWORK = 2, 3, 4
# Not handled: IOCTL_DEV (ABI 5), because a GPU is driven by ioctl on /dev/nvidia*.
_CHANGE_FOLDER = (
    _REMOVE_DIR | _REMOVE_FILE | _MAKE_CHAR | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _MAKE_SYM | _REFER
)
_WRITE = _WRITE_FILE | _TRUNCATE  # what a file can have
_SHARE = _WRITE | _MAKE_REG | _REMOVE_FILE  # shm_overview(7), sem_overview(7): files in one flat folder

_DEVICES = "/dev"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  # CUDA, NCCL and every pool of worker processes use it
_LOCAL_PORTS = "/proc/sys/net/ipv4/ip_local_port_range"  # of IPv6 too
_LIBC = ctypes.CDLL(None, use_errno=True)


def abi_version() -> int:
    """The newest Landlock ABI of this kernel; 0 where it has none, it was switched off, or a seccomp filter hides it."""
    return max(0, int(_LIBC.syscall(*_words(_SYS_CREATE_RULESET), None, *_words(0, _CREATE_RULESET_VERSION))))


def confine(abi: int, scratch: str, model_dir: str | None, egress: Collection[int]) -> None:
    """Restrict this process, which must have no_new_privs, and all its descendants.

    It may write below `scratch`, to devices, to shared memory and to its own `/proc/self`, and connect to the TCP ports of
    `egress`. What does not exist now gets no rule, and can never be written.

    Args:
        abi: of `abi_version`, at least 1.
        scratch: a folder of the server's own.
        model_dir: never writable. Where it lies below a place named above (a given folder in /dev/shm), that place is
            opened entry by entry around it, and no file can be added beside it.
        egress: TCP ports; Landlock knows no addresses, so the loopback is restricted too. 0 stands for every port that the
            kernel gives to who binds port 0, as in Landlock's own rule for bind(2).

    Raises:
        OSError: the kernel refused. A server is not started half-confined.
    """
    files = _WRITE | _CHANGE_FOLDER
    if abi < _ABI_TRUNCATE:
        files &= ~_TRUNCATE
    if abi < _ABI_REFER:
        files &= ~_REFER
    network = _CONNECT_TCP if abi >= ABI_NETWORK else 0
    # An older kernel takes the longer struct too, as long as what it does not know is zero.
    attributes = struct.pack("=QQ", files, network)
    ruleset = _call(_SYS_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        # Devices before shared memory: rights of nested rules add up.
        for place, rights in ((_DEVICES, _WRITE), (_SHARED_MEMORY, _SHARE), ("/proc/self", _WRITE), (scratch, files)):
            for path in _around(place, model_dir):
                _allow_below(ruleset, path, rights & files)
        for port in _numbers(egress) if network else ():
            _call(_SYS_ADD_RULE, ruleset, _RULE_NET_PORT, struct.pack("=QQ", network, port), 0)
        # refusal: test_an_older_abi_keeps_what_it_knows
        _call(_SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _numbers(ports: Collection[int]) -> Iterator[int]:
    """`ports`, with 0 replaced by what it stands for: 28,000 by default, whose rules take a tenth of a second together."""
    yield from (port for port in ports if port)
    if 0 in ports:
        with open(_LOCAL_PORTS) as file:
            first, last = map(int, file.read().split())
        yield from range(first, last + 1)


def _around(place: str, kept: str | None) -> Iterator[str]:
    """`place`, or what lies in it beside `kept` when that is inside: a rule cannot make an exception below itself."""
    place = os.path.realpath(place)
    kept = kept and os.path.realpath(kept)
    if not kept or os.path.commonpath((place, kept)) != place:
        yield place
    elif place != kept:
        try:
            names = os.listdir(place)
        except PermissionError:  # somebody else's folder: nothing of it is opened
            return
        for name in names:
            if not os.path.islink(f"{place}/{name}"):  # it would be followed out of here; what it leads to has its own rule
                yield from _around(f"{place}/{name}", kept)


def _allow_below(ruleset: int, path: str, rights: int) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(place).st_mode):
                # refusal: test_a_model_below_shared_memory_is_read_only_and_devices_stay_writable
                rights &= _WRITE  # EINVAL for anything that only a folder can have
            _call(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
        finally:
            os.close(place)


def _call(number: int, *arguments: int | bytes) -> int:
    result = int(_LIBC.syscall(*_words(number, *arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result


def _words(*arguments: int | bytes) -> list[object]:
    return [ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument) for argument in arguments]
