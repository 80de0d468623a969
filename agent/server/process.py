"""One model server as processes: spawn, output, stop, and the certainty that nothing of it is left.

Owns fork, exec and the end of the server's whole descent. Decides nothing: `policy.py` says when, and the supervisor's loop
does the waiting; here nothing waits longer than `EXEC_TIMEOUT_S` or `DESTROY_TIMEOUT_S`.
Standard library only. The caller is single-threaded (so fork is safe), holds descriptors 0, 1 and 2, and is a child
subreaper (`hardening.become_subreaper`), so that every orphan of the server becomes its child.
"""

import errno
import os
import re
import select
import signal
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack

from agent.errors import ServerStartError, ServerStuckError
from agent.guest import hardening, landlock, mounts
from agent.server import Output, Placement, ServerPlan
from agent.server.policy import Exited

EXEC_TIMEOUT_S = 10
DESTROY_TIMEOUT_S = 10
RING_BYTES = 64 << 10
_DRAIN_BYTES = 1 << 20
_RESCAN_S = 0.1
_FAILED_IN_CHILD = 127
_TEMPORARY = "/tmp"  # noqa: S108  # where the server's own folder is shown
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where the server's own is mounted
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class OutputRing:
    """The last 64 KiB of what the server wrote, in guest memory only, and how much it was in all.

    The content is the server's and can hold prompts: nothing that leaves the guest may be made from it.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._ring = bytearray(RING_BYTES)

    def write(self, chunk: bytes) -> None:
        """Append at most `RING_BYTES`, over the oldest bytes."""
        at = self.total_bytes % RING_BYTES
        head = min(len(chunk), RING_BYTES - at)
        self._ring[at : at + head] = chunk[:head]
        self._ring[: len(chunk) - head] = chunk[head:]
        self.total_bytes += len(chunk)

    def tail(self) -> bytes:
        """What the ring holds, oldest byte first."""
        if self.total_bytes <= RING_BYTES:
            return bytes(self._ring[: self.total_bytes])
        at = self.total_bytes % RING_BYTES
        return bytes(self._ring[at:] + self._ring[:at])

    def __repr__(self) -> str:
        return f"<output, {self.total_bytes} bytes>"


class ServerProcess:
    """A started server. When `pidfd` is readable it has ended: `destroy`. When `output_fd` is readable: `drain`.

    Attributes:
        output_fd: the non-blocking pipe of stdout and stderr; None when they are inherited, and after their end.
        started_at: `time.monotonic()` before the fork.
        landlock: the kernel's ABI version of the domain it is in; 0: the kernel has no Landlock, and it is in none.
    """

    def __init__(self, pid: int, pidfd: int, output_fd: int | None, started_at: float, abi: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.output_fd = output_fd
        self.output = OutputRing()
        self.started_at = started_at
        self.landlock = abi

    def is_alive(self) -> bool:
        """Has the server itself not ended yet?"""
        return not _readable(self.pidfd, 0)

    def drain(self) -> bool:
        """Take up to 1 MiB of output. False: that was the end of it, and `output_fd` is closed and None."""
        if self.output_fd is None:
            return False
        for _ in range(_DRAIN_BYTES // RING_BYTES):  # bounded: a server that floods must not keep us from our loop
            try:
                chunk = os.read(self.output_fd, RING_BYTES)
            except BlockingIOError:
                return True
            if not chunk:
                self._close_output()
                return False
            self.output.write(chunk)
        return True

    def ask_to_stop(self) -> None:
        """SIGTERM to the server's process group. Go on draining; `destroy` when it has ended or its time is over."""
        os.killpg(self.pid, signal.SIGTERM)

    def destroy(self, spare: Collection[int] = (), timeout_s: float = DESTROY_TIMEOUT_S) -> Exited:
        """Kill and reap the server and its whole descent; close both descriptors.

        Every child of this process that is not in `spare` counts as an orphan of the server. Only our own children are
        signalled: until we reap them, nobody else can have their process ids. What they leave behind are our children in
        the next turn, whatever group or session they are in.

        Args:
            spare: process ids of our other children: worker, probe.
            timeout_s: for SIGKILL to have its effect; a process inside a driver call can make it wait.

        Returns:
            How the server itself ended: by itself if it had, else by our signal.

        Raises:
            ServerStuckError: something survived SIGKILL for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        exited: Exited | None = None
        while doomed := [child for child in _children() if child not in spare]:
            if time.monotonic() >= deadline:
                raise ServerStuckError(len(doomed))
            for child in doomed:
                os.kill(child, signal.SIGKILL)
            _wait_for_end(doomed[0], _RESCAN_S)
            for child in doomed:
                ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG)
                if ended is not None and child == self.pid:
                    by_itself = ended.si_code == os.CLD_EXITED
                    exited = Exited(ended.si_status, 0) if by_itself else Exited(0, ended.si_status)
        self.drain()
        self._close_output()
        os.close(self.pidfd)
        if exited is None:
            raise RuntimeError("somebody else reaped the server")
        return exited

    def _close_output(self) -> None:
        if self.output_fd is not None:
            os.close(self.output_fd)
            self.output_fd = None


def spawn(plan: ServerPlan, place: Placement) -> ServerProcess:
    """Start the server.

    It runs in a session of its own with everything `hardening.confine_child` takes away, in `/`, with default signals, the
    plan's environment and nothing else, the named descriptors and nothing else, in a domain of `landlock.confine` where the
    kernel has Landlock, with a /tmp and a /dev/shm of its own where we may mount. The kernel kills it when this process dies.

    Raises:
        ServerStartError: with the errno of the first step that failed, from pipe(2) to execve(2); nothing is left of it.
    """
    # refusal: test_server_that_would_be_root_by_omission_is_a_bug
    if os.geteuid() == 0 and plan.uid is None:
        raise RuntimeError("a server must not be root by omission")
    try:
        return _spawn(plan, place)
    except OSError as error:
        raise ServerStartError(error.errno or 0) from error


def _spawn(plan: ServerPlan, place: Placement) -> ServerProcess:
    argv, environment = plan.command(place), plan.variables(place)
    abi = landlock.abi_version()
    started_at = time.monotonic()
    with ExitStack() as undo, ExitStack() as brief:
        with ExitStack() as ours_until_fork:
            report, report_end = os.pipe()
            brief.callback(os.close, report)
            ours_until_fork.callback(os.close, report_end)
            output = output_end = None
            if plan.output is Output.COUNT:
                output, output_end = os.pipe()
                os.set_blocking(output, False)
                undo.callback(os.close, output)
                ours_until_fork.callback(os.close, output_end)

            def become_server(parent: int) -> None:
                code = 0  # of a bug
                try:
                    os.setsid()
                    os.chdir("/")
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    if output_end is not None:
                        os.dup2(output_end, 1)
                        os.dup2(output_end, 2)
                    for descriptor in place.descriptors:
                        os.set_inheritable(descriptor, True)
                    if place.private_mounts:
                        _own_places(place, (*argv, *environment.values(), place.model_dir or ""))
                    # refusal: test_descriptors_are_stdio_and_exactly_the_named_ones
                    hardening.confine_child(plan.uid, plan.gid, parent, {0, 1, 2, report_end, *place.descriptors})
                    if abi:
                        # refusal: test_guest_landlock.py::test_a_server_writes_in_its_scratch_folder_and_nowhere_else
                        landlock.confine(abi, place.scratch, place.model_dir, plan.egress)
                    signal.pthread_sigmask(signal.SIG_SETMASK, ())
                    for number in _IGNORED_BY_PYTHON:  # other programs expect the default, and an ignored signal stays so
                        signal.signal(number, signal.SIG_DFL)
                    os.execvpe(argv[0], argv, environment)
                except OSError as error:
                    code = error.errno or 0
                finally:  # execve closes `report_end` instead: the end without a word is the good news
                    os.write(report_end, code.to_bytes(4, "little"))

            pid = fork(become_server)
        undo.callback(_kill_and_reap, pid)
        pidfd = os.pidfd_open(pid)
        undo.callback(os.close, pidfd)
        if not _readable(report, EXEC_TIMEOUT_S):
            raise OSError(errno.ETIMEDOUT, "exec")
        if told := os.read(report, 4):
            code = int.from_bytes(told, "little")
            if code == 0:
                raise RuntimeError("a bug between fork and exec")
            raise OSError(code, "exec")
        undo.pop_all()
    return ServerProcess(pid, pidfd, output, started_at, abi)


def _own_places(place: Placement, texts: Collection[str]) -> None:
    """Let /tmp be the scratch folder and /dev/shm a new, empty one, for this process and what it starts.

    The scratch folder is one for all starts; the new /dev/shm ends with the last process that sees it. Some servers use no
    other places, whatever TMPDIR says. What they leave there can hold prompts, and others could read it.
    A place stays as it is when an argument, a variable or the model names it or a path in it.
    """
    mounts.enter_private_mount_namespace()
    if _may_cover(_TEMPORARY, texts):
        mounts.bind(place.scratch, _TEMPORARY)
    if _may_cover(_SHARED_MEMORY, texts):
        size = os.statvfs(_SHARED_MEMORY)
        made = mounts.detached_tmpfs(size.f_blocks * size.f_frsize, 0, 0o1777, huge_pages=False)
        mounts.attach(made.fd, _SHARED_MEMORY)
        os.close(made.fd)


def _may_cover(target: str, texts: Collection[str]) -> bool:
    """Is it there, and does no text name it or a path in it? `/var/tmp` and `https://host/tmp` do not."""
    named = re.compile(rf"(?<![\w./-]){re.escape(target)}(?![\w.-])")
    return os.path.isdir(target) and not any(named.search(text) for text in texts)


def fork(inside: Callable[[int], None]) -> int:
    """Fork a child that runs `inside(our process id)` and then ends, whatever happens, with status 127.

    In the child all signals have their default action from the first moment, but for the two that Python ignores: no handler
    of ours runs there, and a peer that hangs up is an OSError and not the end of the child. Its signal mask is ours.

    Returns:
        The child's process id.
    """
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *_IGNORED_BY_PYTHON}:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                inside(parent)
            finally:
                os._exit(_FAILED_IN_CHILD)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def reap_orphans(spare: Collection[int]) -> None:
    """Reap what ended among the orphans we adopted; for the end of every turn of the loop.

    Args:
        spare: children with an owner: server, probe, worker. One of them that has ended stops the search until it is reaped.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in spare:
            return
        os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)


def _children() -> list[int]:
    """Our children, those that ended and are not reaped included."""
    us = os.getpid()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    stat = file.read()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # proc(5): pid (comm) state ppid …, and comm may hold anything, parentheses too
            if int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1]) == us:
                found.append(int(entry))
    return found


def _kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _wait_for_end(pid, DESTROY_TIMEOUT_S)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)


def _wait_for_end(child: int, timeout_s: float) -> None:
    pidfd = os.pidfd_open(child)
    try:
        _readable(pidfd, timeout_s)
    finally:
        os.close(pidfd)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
