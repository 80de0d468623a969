"""Is the model server ready? A child process asks, so that the supervisor's loop never waits for a server.

Owns the questions: health, model list, one request. Plain HTTP to the loopback and nowhere else; follows no redirect, knows
no proxy. An answer is complete within `MAX_BODY_BYTES` and its time, or it is none. Does not decide what a late answer
means (`policy.py`).
Standard library only; `http.client` is imported in the child, whose memory goes when the server is ready.
"""

import errno
import json
import os
import signal
import socket
import time
from typing import Any

from agent.errors import ServerStartError, Unready
from agent.guest import hardening
from agent.server import LOOPBACK_OF, RunningServer, ServerPlan
from agent.server.process import ServerProcess, fork

MAX_BODY_BYTES = 64 << 10
MAX_ANSWER_BYTES = 1 << 20  # with its headers and the sizes of its chunks
QUESTION_TIMEOUT_S = 5.0  # health and model list
REQUEST_TIMEOUT_S = 120.0  # the one request: a first request compiles kernels on some servers
FIRST_PAUSE_S = 0.02
MAX_PAUSE_S = 1.0
_REASONS = tuple(Unready)
_LISTENING = "0A"


class Probe:
    """A running probe. When `fd` is readable: `read`; when that says it has ended: `finish`."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.last_reason = Unready.NO_ANSWER

    def read(self) -> bool:
        """Take what the child learned into `last_reason`. False: the child has ended, `finish` it."""
        told = os.read(self.fd, 4096)
        if told:
            self.last_reason = _REASONS[told[-1]]
        return bool(told)

    def finish(self, server: ServerProcess) -> RunningServer | None:
        """Reap the child and close `fd`. None: the server has ended, or somebody killed the child; then start another."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED)
        os.close(self.fd)
        answered = ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
        if not answered or not server.is_alive():
            return None
        return RunningServer(server.pid, round((time.monotonic() - server.started_at) * 1000))

    def stop(self) -> None:
        """Kill and reap the child, close `fd`."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED)
        os.close(self.fd)


def start_probe(plan: ServerPlan) -> Probe:
    """Start asking, as the server's user and with no more rights than the server has.

    Raises:
        ServerStartError: with the errno; no descriptor or no process could be had.
    """
    try:
        fd, report = os.pipe()
    except OSError as error:
        raise ServerStartError(error.errno or 0) from error

    def ask_until_ready(parent: int) -> None:
        import http.client  # noqa: F401  # while every module can still be read

        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        # refusal: test_probe_has_no_more_rights_than_the_server_and_no_descriptor_of_the_agent
        hardening.confine_child(plan.uid, plan.gid, parent, {0, 1, 2, report})
        told, pause_s = None, FIRST_PAUSE_S
        while (reason := _why_not_ready(plan)) is not None:
            if reason is not told:
                os.write(report, bytes([_REASONS.index(reason)]))
                told = reason
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, MAX_PAUSE_S)
        os._exit(0)

    try:
        return Probe(fork(ask_until_ready), fd)
    except OSError as error:
        os.close(fd)
        raise ServerStartError(error.errno or 0) from error
    finally:
        os.close(report)


def _why_not_ready(plan: ServerPlan) -> Unready | None:
    # 1. Our server holds the port: whoever else does would be told the API key, and asked in its place.
    owners = _listeners(plan.port)
    if not owners:
        return Unready.NO_ANSWER
    # refusal: test_somebody_else_on_the_port_is_asked_nothing
    if not owners <= {os.geteuid(), 0}:
        return Unready.FOREIGN_PORT
    # 2. It speaks HTTP, and says that it is healthy.
    answer = _ask(plan, plan.health_path, None, QUESTION_TIMEOUT_S)
    if answer is None:
        return Unready.NO_ANSWER
    if answer[0] not in plan.health_codes:
        return Unready.HEALTH
    # 3. It serves the model that it was started for.
    if plan.models_path is not None:
        answer = _ask(plan, plan.models_path, None, QUESTION_TIMEOUT_S)
        if answer is None or answer[0] not in plan.health_codes:
            return Unready.MODEL
        if plan.model_id is not None and plan.model_id not in _named_models(answer[1]):
            return Unready.MODEL
    # 4. It survives and answers a request: a server can be healthy until its first one.
    if plan.probe is not None:
        answer = _ask(plan, plan.probe.path, plan.probe.body, REQUEST_TIMEOUT_S)
        if answer is None or answer[0] not in plan.probe.codes:
            return Unready.PROBE
    return None


def _listeners(port: int, tables: tuple[str, ...] = ("/proc/net/tcp", "/proc/net/tcp6")) -> set[int]:
    """The users who listen on `port`, on whatever address. See proc_net_tcp.rst of the kernel."""
    owners: set[int] = set()
    for table in tables:
        try:
            with open(table) as lines:
                rows = [line.split() for line in lines][1:]
        except OSError:  # a kernel without IPv6
            continue
        owners |= {int(row[7]) for row in rows if row[3] == _LISTENING and int(row[1].rsplit(":", 1)[1], 16) == port}
    return owners


def _named_models(body: bytes) -> list[object]:
    """`data[].id` of an OpenAI model list, or `name` of a KServe V2 model; nothing when it is neither."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(answer, dict):
        return []
    data = answer.get("data")
    return [item.get("id") for item in data if isinstance(item, dict)] if isinstance(data, list) else [answer.get("name")]


def _ask(plan: ServerPlan, path: str, body: str | None, timeout_s: float) -> tuple[int, bytes] | None:
    """Status and body of the whole answer to POST `body` or GET; None when there was none."""
    import http.client

    host = LOOPBACK_OF[plan.host]
    headers = {"Accept": "application/json", "Connection": "close"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if plan.authorization is not None and path != plan.health_path:
        headers["Authorization"] = plan.authorization
    with _DeadlineSocket(socket.AF_INET6 if ":" in host else socket.AF_INET) as connection:
        connection.deadline = time.monotonic() + timeout_s
        connection.settimeout(timeout_s)
        client = http.client.HTTPConnection(host, plan.port)
        client.sock = connection
        try:
            connection.connect((host, plan.port))
            client.request("GET" if body is None else "POST", path, None if body is None else body.encode(), headers)
            response = client.getresponse()
            content = response.read(MAX_BODY_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError, OverflowError):
            # The last two: http.client of CPython 3.11 hands the negative size of a chunk to read().
            return None
    if len(content) > MAX_BODY_BYTES or response.length:  # too long, or it broke off
        return None
    return response.status, content


class _DeadlineSocket(socket.socket):
    """A socket whose timeout is for all reads together: a peer that sends a byte now and then gains nothing by it.

    So is its bound: for a chunk of size -1 `http.client` reads to the end of the stream, however far that is.
    """

    deadline = 0.0
    left_bytes = MAX_ANSWER_BYTES

    def recv_into(self, *arguments: Any) -> int:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.settimeout(left_s)
        got = super().recv_into(*arguments)
        self.left_bytes -= got
        if self.left_bytes < 0:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return got
