"""Real servers, each a few lines of Python, started and ended the way the supervisor does it."""

import dataclasses
import errno
import json
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ServerStartError
from agent.guest.hardening import die_with_parent
from agent.server import Output, Placement, ServerPlan
from agent.server.policy import Exited
from agent.server.probe import start_probe
from agent.server.process import RING_BYTES, OutputRing, ServerProcess, _may_cover, fork, reap_orphans, spawn
from tests.children import DEADLINE_S, IS_ROOT, NOBODY, gone, in_child, python, read_line, readable

PLACE = Placement(model="/model/weights.gguf", model_dir="/model", scratch="/scratch")
PLAN = ServerPlan(
    argv=("set by each test",),
    environment=(),
    host="127.0.0.1",
    port=8080,
    uid=NOBODY if IS_ROOT else None,
    gid=NOBODY if IS_ROOT else None,
    health_path="/health",
    health_codes=frozenset({200}),
    models_path=None,
    model_id=None,
    probe=None,
    authorization=None,
    ready_timeout_s=60,
    stop_timeout_s=30,
    max_restarts=3,
    restart_window_s=600,
    output=Output.COUNT,
    scratch_max_bytes=1 << 20,
    egress=(),
)


def running(program: str, **changes: object) -> ServerPlan:
    """A plan whose server is a Python program."""
    return dataclasses.replace(PLAN, argv=(python(), "-I", "-S", "-c", program), **changes)  # type: ignore[arg-type]


def drain_until(server: ServerProcess, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not done():
        assert server.output_fd is not None, "the output ended early"
        assert readable(server.output_fd, deadline - time.monotonic())
        server.drain()


def output_of(program: str, place: Placement = PLACE, **changes: object) -> bytes:
    """Everything a program printed until it ended by itself with status 0."""
    server = spawn(running(program, **changes), place)
    while server.output_fd is not None and readable(server.output_fd):
        server.drain()
    assert readable(server.pidfd)
    assert server.destroy() == Exited(0, 0), server.output.tail()
    return server.output.tail()


# --- what the server is given, and nothing else -----------------------------------------------------------------------


def test_environment_is_exactly_the_plans_with_placeholders_filled_in() -> None:
    program = "import sys; sys.stdout.buffer.write(open('/proc/self/environ', 'rb').read())"
    environment = (("HOME", "{scratch}"), ("MODEL", "{model_dir}"), ("JSON", '{"port": "{port}"}'))
    os.environ["KEYTURN_TEST_CANARY"] = "inherited"
    try:
        seen = in_child(lambda: output_of(program, environment=environment))
    finally:
        del os.environ["KEYTURN_TEST_CANARY"]
    assert seen == b'HOME=/scratch\0MODEL=/model\0JSON={"port": "8080"}\0'


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_each_start_has_a_shared_memory_of_its_own_and_its_scratch_folder_as_tmp() -> None:
    program = """
import os
for folder in (os.sep + 'tmp', os.sep + 'dev/shm'):  # by their names they would stay as they are
    print(sorted(os.listdir(folder)), end=' ')
    open(folder + '/prompt', 'w').close()
"""
    with tempfile.TemporaryDirectory(dir="/run") as scratch, tempfile.NamedTemporaryFile(dir="/dev/shm"):
        os.chmod(os.path.dirname(scratch), 0o755)
        os.chown(scratch, NOBODY, NOBODY)
        place = Placement("/model/file", "/model", scratch, private_mounts=True)
        outside = set(os.listdir("/tmp")), set(os.listdir("/dev/shm"))
        assert in_child(lambda: output_of(program, place) + output_of(program, place)) == b"[] [] ['prompt'] [] "
        assert os.listdir(scratch) == ["prompt"]
        assert outside == (set(os.listdir("/tmp")), set(os.listdir("/dev/shm")))


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_a_place_that_the_server_is_told_a_path_in_stays_as_it_is(folder: str) -> None:
    with tempfile.NamedTemporaryFile(dir=folder) as file, tempfile.TemporaryDirectory(dir="/run") as scratch:
        program = f"import os; print(os.path.exists({file.name!r}))"
        place = Placement("/model/file", "/model", scratch, private_mounts=True)
        assert in_child(lambda: output_of(program, place)) == b"True\n"


def test_descriptors_are_stdio_and_exactly_the_named_ones() -> None:
    program = """
import json, os
def what(number):
    try: return os.readlink(f'/proc/self/fd/{number}').split(':')[0]
    except OSError: return None
print(json.dumps({number: what(number) for number in range(1024) if what(number)}))
print(os.read(77, 100).decode())
"""

    def scenario() -> list[str]:
        secret = os.memfd_create("weights")
        os.write(secret, b"weights")
        os.lseek(secret, 0, os.SEEK_SET)
        os.dup2(secret, 77, inheritable=False)
        for number in (78, 500):  # inheritable by accident: must not get through
            os.dup2(secret, number, inheritable=True)
        os.dup2(secret, 0)  # the agent's stdin is none of the server's business
        return output_of(program, dataclasses.replace(PLACE, descriptors=(77,))).decode().splitlines()

    table, content = in_child(scenario)
    assert json.loads(table) == {"0": "/dev/null", "1": "pipe", "2": "pipe", "77": "/memfd"}
    assert content == "weights"


def test_named_descriptor_in_the_place_of_stdio_is_a_bug() -> None:
    with pytest.raises(RuntimeError):
        dataclasses.replace(PLACE, descriptors=(2,))


STATUS = """
import json, os, resource
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps({
    **{name: status[name].strip() for name in
       ('Uid', 'Gid', 'Groups', 'CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'SigBlk', 'SigIgn')},
    'core': resource.getrlimit(resource.RLIMIT_CORE), 'umask': os.umask(0), 'cwd': os.getcwd(),
    'leads': (os.getsid(0), os.getpgid(0)) == (os.getpid(), os.getpid()),
}))
"""


def status_of_server(uid: int | None = PLAN.uid) -> dict[str, object]:
    def scenario() -> bytes:
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        if IS_ROOT:
            os.setgroups([7, 8])
        return output_of(STATUS, uid=uid, gid=uid)

    found = json.loads(in_child(scenario))
    assert isinstance(found, dict)
    return found


@pytest.mark.skipif(not IS_ROOT, reason="only root can change its user")
def test_server_of_a_root_agent_is_its_own_user_without_groups_and_capabilities() -> None:
    found = status_of_server()
    assert (found["Uid"], found["Gid"], found["Groups"]) == ("\t".join([str(NOBODY)] * 4), "\t".join([str(NOBODY)] * 4), "")
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}


@pytest.mark.skipif(not IS_ROOT, reason="only root can stay root")
def test_server_that_is_root_on_purpose_has_no_capabilities_and_no_groups() -> None:
    found = status_of_server(uid=0)
    assert (found["Uid"], found["Groups"]) == ("0\t0\t0\t0", "")
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}


@pytest.mark.skipif(not IS_ROOT, reason="only root can be root by omission")
def test_server_that_would_be_root_by_omission_is_a_bug() -> None:
    with pytest.raises(RuntimeError):
        spawn(dataclasses.replace(PLAN, uid=None, gid=None), PLACE)


def test_server_cannot_gain_privileges_or_leave_cores_and_has_clean_signals_umask_session_and_directory() -> None:
    found = status_of_server()
    assert found["NoNewPrivs"] == "1"
    assert (found["core"], found["umask"], found["cwd"], found["leads"]) == ([1, 1], 0o077, "/", True)
    python_ignores = (1 << signal.SIGPIPE - 1) | (1 << signal.SIGXFSZ - 1)  # the test program's own interpreter does
    assert (int(str(found["SigBlk"]), 16), int(str(found["SigIgn"]), 16) & ~python_ignores) == (0, 0)


def test_server_that_is_no_python_has_the_default_action_of_every_signal() -> None:
    def scenario() -> bytes:
        server = spawn(dataclasses.replace(PLAN, argv=("/bin/cat", "/proc/self/status")), PLACE)
        assert readable(server.pidfd)
        server.destroy()
        return server.output.tail()

    ignored = next(line for line in in_child(scenario).splitlines() if line.startswith(b"SigIgn"))
    assert int(ignored.split()[1], 16) == 0


def test_server_that_aborts_leaves_no_core_in_its_scratch_folder() -> None:
    """Its limit is 1: for a file that is below a page, and a piped handler is not started (core(5))."""

    def scenario() -> tuple[int, int, list[str]]:
        with tempfile.TemporaryDirectory(prefix="keyturn-core-") as scratch:
            os.chmod(scratch, 0o777)
            program = f"import os; os.chdir({scratch!r}); os.abort()"
            server = spawn(running(program), dataclasses.replace(PLACE, scratch=scratch))
            ended = os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            return server.destroy().signal, ended.si_code, os.listdir(scratch)

    assert in_child(scenario) == (signal.SIGABRT, os.CLD_KILLED, [])


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [(("/nowhere/llama-server",), errno.ENOENT), (("not-on-the-path",), errno.ENOENT), (("/etc/passwd",), errno.EACCES)],
)
def test_command_that_cannot_be_executed_is_a_start_error_with_errno_and_leaves_nothing(
    command: tuple[str, ...], code: int
) -> None:
    def scenario() -> tuple[int, list[str], bool]:
        before = os.listdir("/proc/self/fd")
        try:
            spawn(dataclasses.replace(PLAN, argv=command, environment=(("PATH", "/usr/bin:/bin"),)), PLACE)
        except ServerStartError as error:
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return error.code, [fd for fd in os.listdir("/proc/self/fd") if fd not in before], True
        return -1, [], False

    assert in_child(scenario) == (code, [], True)


def test_agent_out_of_descriptors_gets_a_start_error() -> None:
    plan = running("pass")

    def scenario() -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.open(os.devnull, os.O_RDONLY) + 1,) * 2)
        codes = []
        for start in (lambda: spawn(plan, PLACE), lambda: start_probe(plan)):
            try:
                start()
            except ServerStartError as error:
                codes.append(error.code)
        return codes

    assert in_child(scenario) == [errno.EMFILE, errno.EMFILE]


def test_agent_that_may_not_change_its_user_gets_a_start_error() -> None:
    plan = running("pass", uid=4711, gid=4711)

    def scenario() -> int:
        if IS_ROOT:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            spawn(plan, PLACE)
        except ServerStartError as error:
            return error.code
        return -1

    assert in_child(scenario) == errno.EPERM


def test_command_without_a_slash_is_searched_in_the_plans_path() -> None:
    def scenario() -> bytes:
        folder, name = os.path.split(python())
        plan = dataclasses.replace(PLAN, argv=(name, "-I", "-S", "-c", "print('here')"), environment=(("PATH", folder),))
        server = spawn(plan, PLACE)
        assert readable(server.pidfd)
        server.destroy()
        return server.output.tail()

    assert in_child(scenario) == b"here\n"


def test_inherited_output_goes_where_the_agents_goes() -> None:
    def scenario() -> tuple[bytes, bool]:
        ours, theirs = os.pipe()
        os.dup2(theirs, 1)
        server = spawn(running("print('to whom it may concern')", output=Output.INHERIT), PLACE)
        line = read_line(ours)
        assert readable(server.pidfd)
        silent = server.output_fd is None and not server.drain()
        server.destroy()
        return line, silent

    assert in_child(scenario) == (b"to whom it may concern\n", True)


# --- output -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, RING_BYTES), max_size=8))
def test_ring_holds_the_last_bytes_and_counts_all(sizes: list[int]) -> None:
    ring, everything = OutputRing(), b""
    for index, size in enumerate(sizes):
        chunk = bytes([index + 1]) * size
        ring.write(chunk)
        everything += chunk
    assert ring.tail() == everything[-RING_BYTES:]
    assert ring.total_bytes == len(everything)
    assert repr(ring) == f"<output, {len(everything)} bytes>"


def test_server_that_floods_its_output_is_not_blocked_and_the_ring_stays_bounded() -> None:
    size = 32 << 20
    program = f"import os\nfor _ in range({size >> 16}): os.write(1 + _ % 2, b'x' * 65536)\nos.write(1, b'the end')"

    def scenario() -> tuple[int, int, bytes]:
        server = spawn(running(program), PLACE)
        while server.output_fd is not None and readable(server.output_fd):
            before = server.output.total_bytes
            server.drain()
            assert server.output.total_bytes - before <= 1 << 20, "one turn of the loop is bounded"
        assert readable(server.pidfd)
        assert server.destroy() == Exited(0, 0)
        return server.output.total_bytes, len(server.output.tail()), server.output.tail()[-7:]

    assert in_child(scenario) == (size + 7, RING_BYTES, b"the end")


def test_silent_server_does_not_block_the_loop() -> None:
    def scenario() -> bool:
        server = spawn(running("import signal; signal.pause()"), PLACE)
        still_open = server.drain()
        server.destroy()
        return still_open

    assert in_child(scenario)


def test_destroyed_server_leaves_no_descriptor_behind() -> None:
    def scenario() -> bool:
        before = os.listdir("/proc/self/fd")
        spawn(running("import signal; signal.pause()"), PLACE).destroy()
        return os.listdir("/proc/self/fd") == before

    assert in_child(scenario)


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("raise SystemExit(3)", Exited(3, 0)),
        ("import os; os.kill(os.getpid(), 11)", Exited(0, 11)),
        ("import os; os.kill(os.getpid(), 9)", Exited(0, 9)),
    ],
)
def test_server_that_ends_by_itself_is_told_as_it_ended(program: str, how: Exited) -> None:
    def scenario() -> Exited:
        server = spawn(running(program), PLACE)
        assert readable(server.pidfd)
        assert not server.is_alive()
        return server.destroy()

    assert in_child(scenario) == how


def test_server_that_obeys_sigterm_ends_in_its_own_way() -> None:
    program = "import signal, sys; signal.signal(15, lambda *_: sys.exit(5)); print('up', flush=True); signal.pause()"

    def scenario() -> Exited:
        server = spawn(running(program), PLACE)
        drain_until(server, lambda: server.output.tail() == b"up\n")
        assert server.is_alive()
        server.ask_to_stop()
        assert readable(server.pidfd)
        return server.destroy()

    assert in_child(scenario) == Exited(5, 0)


def test_server_that_ignores_sigterm_is_killed() -> None:
    program = """
import os, signal
signal.signal(15, lambda *_: os.write(1, b'no\\n'))
os.write(1, b'up\\n')
while True: signal.pause()
"""

    def scenario() -> tuple[bool, Exited, bool]:
        server = spawn(running(program), PLACE)
        drain_until(server, lambda: server.output.tail() == b"up\n")
        server.ask_to_stop()
        drain_until(server, lambda: server.output.tail() == b"up\nno\n")
        refused = server.is_alive()
        return refused, server.destroy(), gone([server.pid])

    assert in_child(scenario) == (True, Exited(0, 9), True)


DESCENT = """
import os, signal
signal.signal(15, signal.SIG_IGN)
def child(*steps):
    if os.fork() == 0:
        for step in steps: step()
        os.write(1, b'%d\\n' % os.getpid())
        while True: signal.pause()
def fork_again():
    if os.fork() != 0: os._exit(0)
child()
child(lambda: os.setpgid(0, 0))
child(os.setsid)
child(os.setsid, fork_again)                    # a daemon, already an orphan
child(os.setsid, fork_again, lambda: child(os.setsid))  # and a daemon with a child of its own
"""


@pytest.mark.parametrize("ending", ["while True: signal.pause()", "os._exit(1)"])
def test_whole_descent_of_a_server_is_gone_after_destroy_and_other_children_are_spared(ending: str) -> None:
    def scenario() -> tuple[int, bool, bool]:
        worker = fork(idle)
        server = spawn(running(DESCENT + ending), PLACE)
        drain_until(server, lambda: server.output.tail().count(b"\n") == 6)
        descent = [int(pid) for pid in server.output.tail().split()]
        server.destroy(spare={worker})
        spared = os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG) is None
        return len({*descent, server.pid}), gone([*descent, server.pid]), spared

    assert in_child(scenario) == (7, True, True)


def idle(parent: int) -> None:
    die_with_parent(parent)
    signal.pause()


def test_orphans_are_reaped_but_never_a_child_that_has_an_owner() -> None:
    program = """
import os
for _ in range(3):
    if os.fork() == 0:
        if os.fork() == 0: os.read(77, 1)      # ends when the test closes the pipe
        os._exit(0)
    os.wait()
os.write(1, b'up\\n')
os.read(77, 1)
"""

    def scenario() -> tuple[bool, Exited]:
        ours, theirs = os.pipe()
        os.dup2(ours, 77)
        server = spawn(running(program), dataclasses.replace(PLACE, descriptors=(77,)))
        drain_until(server, lambda: server.output.tail() == b"up\n")
        orphans = [pid for pid in children_of_this_process() if pid != server.pid]
        assert len(orphans) == 3
        watched = [os.pidfd_open(pid) for pid in orphans]
        os.close(theirs)
        assert all(readable(pidfd) for pidfd in (*watched, server.pidfd))
        reap_orphans(spare={server.pid, *orphans[:1]})
        kept = not gone([server.pid]) and not gone(orphans[:1])
        how = server.destroy(spare=orphans)
        reap_orphans(spare=())
        assert gone(orphans)
        reap_orphans(spare=())  # no child at all is no error
        return kept, how

    assert in_child(scenario) == (True, Exited(0, 0))


def children_of_this_process() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_server_dies_with_its_agent() -> None:
    def scenario() -> bool:
        ours, theirs = os.pipe()
        agent = os.fork()
        if agent == 0:
            server = spawn(running("import signal; print('up', flush=True); signal.pause()"), PLACE)
            drain_until(server, lambda: server.output.tail() == b"up\n")
            os.write(theirs, b"%d\n" % server.pid)
            signal.pause()
        pidfd = os.pidfd_open(int(read_line(ours)))
        assert not readable(pidfd, 0)
        os.kill(agent, signal.SIGKILL)
        return readable(pidfd)

    assert in_child(scenario)


def test_forked_child_runs_no_handler_of_ours_and_has_our_signal_mask() -> None:
    def scenario() -> tuple[int, bytes, bool]:
        ours, theirs = os.pipe()
        signal.signal(signal.SIGTERM, lambda *_: os.write(theirs, b"handler of the parent"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

        def child(parent: int) -> None:
            os.write(theirs, repr(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))).encode())
            os.kill(os.getpid(), signal.SIGTERM)

        _, status = os.waitpid(fork(child), 0)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return os.waitstatus_to_exitcode(status), os.read(ours, 1000), mask == {signal.SIGUSR2}

    assert in_child(scenario) == (-signal.SIGTERM, repr([signal.SIGUSR2]).encode(), True)


def test_forked_child_outlives_a_peer_that_hangs_up() -> None:
    def scenario() -> int:
        def child(parent: int) -> None:
            ours, theirs = socket.socketpair()
            theirs.close()
            try:
                ours.send(b"hello")
            except BrokenPipeError:
                os._exit(0)

        _, status = os.waitpid(fork(child), 0)
        return os.waitstatus_to_exitcode(status)

    assert in_child(scenario) == 0


def test_forked_child_tells_nobody_of_its_failure() -> None:
    def scenario() -> tuple[int, bytes]:
        ours, theirs = os.pipe()
        os.dup2(theirs, 2)

        def fail(parent: int) -> None:
            raise ValueError("secret")

        _, status = os.waitpid(fork(fail), 0)
        os.write(theirs, b".")
        return os.waitstatus_to_exitcode(status), os.read(ours, 1000)

    assert in_child(scenario) == (127, b".")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("/tmp", True),
        ("--dir=/tmp", True),
        ("/tmp:/x", True),
        ("/tmp/model.gguf", True),
        ("/var/tmp/x", False),
        ("https://store/tmp/x", False),
        ("/tmpfs", False),
        ("/home/tmp", False),
    ],
)
def test_a_place_that_a_text_names_is_not_covered(text: str, named: bool) -> None:
    assert _may_cover("/tmp", ["a", text]) is not named
