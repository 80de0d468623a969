"""PID 1 of a stand-alone guest: what the kernel expects of its first program, and what the agent expects of a guest.

Owns the order: mounts, console, modules, interfaces, the supervisor as a child, and the end, which is always the same: one
last status line in the kernel log, then power off. A kernel that loses PID 1 panics, and a machine cannot be told from
outside whether it stopped or panicked: that line is the difference, so everything that can fail is below the `try` of
`run_guest`. `run_or_power_off` is the end alone, for a boot whose launcher does not watch it. Decides nothing about the
boot. Standard library only: it is the supervisor's parent and has its size.
"""

import ctypes
import errno
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from agent import __version__
from agent.closed import Ident
from agent.errors import AgentError, GuestInitError, GuestPart, InternalError, SupervisorLostError
from agent.guest import mounts, network
from agent.report import BootReport

MODULE_LISTS = Path("/usr/lib/keyturn/modules.d")
MAX_LINE_BYTES = 900  # of the kernel's log: a longer record is refused
_CONSOLE = "/dev/console"
_KERNEL_LOG = "/dev/kmsg"
_CRITICAL = 2  # shown on the console by a kernel that was told to be quiet
_RB_POWER_OFF = 0x4321FEDC  # include/uapi/linux/reboot.h
_SYS_FINIT_MODULE = 313  # x86-64: arch/x86/entry/syscalls/syscall_64.tbl
_LIBC = ctypes.CDLL(None, use_errno=True)

# (type, target, flags, options), in order. configfs comes after its module.
_LOCKED = mounts.NOSUID | mounts.NODEV | mounts.NOEXEC
_MOUNTS = (
    ("proc", "/proc", _LOCKED, ""),
    ("sysfs", "/sys", _LOCKED, ""),
    ("devtmpfs", "/dev", mounts.NOSUID | mounts.NOEXEC, "mode=0755"),
    ("tmpfs", "/dev/shm", _LOCKED, "mode=1777"),  # noqa: S108  # a mount point
    ("tmpfs", "/run", _LOCKED, "mode=0755"),
    ("tmpfs", "/tmp", _LOCKED, "mode=1777"),  # noqa: S108
    ("cgroup2", "/sys/fs/cgroup", _LOCKED, ""),
)
_CONFIGFS = ("configfs", "/sys/kernel/config", _LOCKED, "")


def run_guest(supervise: Callable[[dict[str, str]], BootReport], fork: Callable[[Callable[[int], None]], int]) -> NoReturn:
    """Be PID 1 until the end of the machine.

    Args:
        supervise: runs in a child, with the hints of the kernel command line; what it returns or raises makes the last line.
        fork: `server.process.fork`.
    """
    line = "end: no last word"
    try:
        for mount in _MOUNTS:
            _mount(*mount)
        _open_console()
        _load_modules()
        _mount(*_CONFIGFS)
        hints = kernel_parameters(Path("/proc/cmdline").read_text())
        network.bring_up_loopback()
        if "ip" in hints:
            _configure(network.parse_ip_parameter(hints["ip"]))
        line, _ = _watch(lambda: supervise(hints), fork)
    except AgentError as error:
        line = _last_line(error)
    except BaseException as error:  # noqa: BLE001  # nobody is above us
        line = _last_line(InternalError.of(error))
    finally:
        with suppress(OSError):  # nobody is left
            os.kill(-1, signal.SIGKILL)  # everybody but us
        _power_off(line)
        while True:  # a machine that cannot power off stays as it is
            signal.pause()


def run_or_power_off(supervise: Callable[[], BootReport], fork: Callable[[Callable[[int], None]], int]) -> int:
    """Boot for a launcher that does not look after what it started, as kata-agent: a boot that fails ends the machine.

    Args:
        supervise: runs in a child, so that its death is a failure like any other.
        fork: `server.process.fork`.

    Returns:
        The exit status: 0, or another one where the kernel does not let us power off.
    """
    try:
        line, status = _watch(supervise, fork)
    except BaseException as error:  # noqa: BLE001  # no process for the supervisor, no pipe: nothing is served either
        failure = InternalError.of(error)
        line, status = _last_line(failure), failure.exit_status
    if status:
        _power_off(line)
    return status


def is_guest_of_kata(command_line: str) -> bool:
    """Has Kata put this guest together from extension images? Its runtime says so in the kernel's command line for each.

    A laptop, and the node below, have no such word there, whoever is root on them.
    """
    return any(word.startswith("kata.extension.") for word in command_line.split())


def kernel_parameters(command_line: str) -> dict[str, str]:
    """`name=value` words of the kernel command line, the last of each name; quotes are not taken off."""
    return dict(word.split("=", 1) for word in command_line.split() if "=" in word)


def _mount(kind: str, target: str, flags: int, options: str) -> None:
    try:
        if not os.path.isdir(target):
            os.mkdir(target)
        mounts.mount(kind, target, flags, options)
    except OSError as error:
        if error.errno != errno.EBUSY:  # mounted before
            raise GuestInitError(GuestPart.MOUNT, Ident(target.lstrip("/")), error.errno or 0) from error


def _open_console() -> None:
    """Standard descriptors lead to the console. Non-blocking: its reader is the host, and may stop reading."""
    try:
        console = os.open(_CONSOLE, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # a machine without one: there is still the kernel log
        console = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(console, standard)
    if console > 2:
        os.close(console)


def _load_modules() -> None:
    """Every module of every list, lists by name, modules in their order."""
    for file in sorted(MODULE_LISTS.glob("*.list")):
        for path in file.read_text().split():
            name = Ident.of_peer(Path(path).stem)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise GuestInitError(GuestPart.MODULE, name, error.errno or 0) from error
            loaded = _LIBC.syscall(
                ctypes.c_long(_SYS_FINIT_MODULE), ctypes.c_int(descriptor), ctypes.c_char_p(b""), ctypes.c_int(0)
            )
            code = ctypes.get_errno() if loaded else 0
            os.close(descriptor)
            if code not in (0, errno.EEXIST, errno.ENODEV):  # there already; no such hardware here
                raise GuestInitError(GuestPart.MODULE, name, code)


def _configure(static: network.StaticAddress) -> None:
    if not network.configure(static):
        raise GuestInitError(GuestPart.INTERFACE, Ident("ip"), errno.ENODEV)
    if static.nameservers:
        Path("/etc/resolv.conf").write_text(network.resolv_conf(static))


def _watch(supervise: Callable[[], BootReport], fork: Callable[[Callable[[int], None]], int]) -> tuple[str, int]:
    """Run the supervisor, reap whatever becomes ours, hand on what asks for the end. Its last line and exit status."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # a supervisor that was killed wrote nothing, and its children hold the other end
    watched = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPWR}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def become_supervisor(_: int) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        os.close(reader)
        try:
            report = supervise()
        except AgentError as error:
            report = _report_of(error)
        os.write(writer, report.last_line().encode()[:MAX_LINE_BYTES])
        os._exit(report.error.exit_status if report.error else report.exit_status or 0)

    supervisor = fork(become_supervisor)
    os.close(writer)
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            os.kill(supervisor, signal.SIGTERM)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == supervisor:
                line = ""
                with suppress(BlockingIOError):
                    line = os.read(reader, MAX_LINE_BYTES).decode()
                code = os.waitstatus_to_exitcode(ended[1])
                if line:
                    return line, code
                lost = SupervisorLostError(signal=max(-code, 0), status=max(code, 0))
                return _last_line(lost), lost.exit_status


def _last_line(error: AgentError) -> str:
    return _report_of(error).last_line()


def _report_of(error: AgentError) -> BootReport:
    report = BootReport(__version__, "init")
    report.apply(error)
    return report


def _power_off(line: str) -> None:
    """The last line, and the end of the machine. Returns where the kernel refuses that."""
    text = re.sub(r"[^ -~]", "?", f"keyturn: {line}")
    for target, prefix in ((_KERNEL_LOG, f"<{_CRITICAL}>"), (_CONSOLE, "")):
        try:
            log = os.open(target, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            os.write(log, f"{prefix}{text}\n".encode())
            break
        except OSError:
            continue
    os.sync()
    _LIBC.reboot(ctypes.c_int(_RB_POWER_OFF))
