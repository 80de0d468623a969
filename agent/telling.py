"""Writes the faces of a boot: stderr, status file and receipt, termination message, systemd's status. Not the health port,
which is `health.py`.

Owns the writing and nothing else: what is written is made by `report.py` and `events.py`. A face that cannot be written is
told once on the others and never stops a boot. Standard library only, because the supervisor imports it.
"""

import errno
import json
import os
import resource
import select
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from agent.artifact.given import RECEIPT_NAME
from agent.events import LinesLost, Message, StatusUnwritable, message_to_record
from agent.guest.systemd import ServiceManager
from agent.report import BootReport, console_line

STDERR = 2
MAX_UNREAD_BYTES = 64 << 10
LAST_WORD_S = 1.0


class Teller:
    """The only writer of this process."""

    def __init__(
        self, report: BootReport, status_file: str | None, termination_log: str | None, service_manager: ServiceManager
    ) -> None:
        self.report = report
        self._service_manager = service_manager
        self._status_file = Path(status_file) if status_file else None
        self._termination_log = termination_log
        self._for_people = sys.stderr.isatty()
        self._stderr = _never_waiting() if self._for_people else STDERR
        self._status_told = False
        self._unread = b""
        self._lost = 0
        self._began = time.monotonic()

    def tell(self, message: Message) -> None:
        """One message to everybody."""
        self.report.apply(message)
        self.report.supervisor_kib = resident_kib()
        problem = None
        if self._status_file:  # first: whoever reads the line may look at the status next
            try:
                _write(self._status_file, (json.dumps(self.report.status()) + "\n").encode())
                self._status_told = False
            except (OSError, ValueError) as error:  # ValueError: a path that names no file
                if not self._status_told:
                    problem = StatusUnwritable((isinstance(error, OSError) and error.errno) or 0)
                self._status_told = True
                with suppress(OSError, ValueError):  # none is better than one that is no longer true
                    _regular(self._status_file).unlink(missing_ok=True)
        self._write_line(message)
        self._service_manager.tell(
            ready=self.report.locally_good, stopping=self.report.ending(), status=console_line(self.report.error or message)
        )
        if problem:
            self.tell(problem)

    def keep_receipt(self, receipt: bytes | None) -> None:
        """The receipt of this boot on the health port and beside the status file; None: there is none yet."""
        self.report.receipt = receipt
        if self._status_file is None:
            return
        try:
            path = self._status_file.with_name(RECEIPT_NAME)
            if receipt is None:
                _regular(path).unlink(missing_ok=True)
            else:
                _write(path, receipt)
        except (OSError, ValueError) as error:
            if receipt is not None:  # at the start the status has the same trouble, and tells it
                self.tell(StatusUnwritable((isinstance(error, OSError) and error.errno) or 0))

    def last_word(self) -> None:
        """The termination message, where Kubernetes or the operator has made a place for it; and what was not read yet."""
        self._flush(LAST_WORD_S)
        if self._termination_log:
            # A path of the host's: it may be a pipe that nobody reads, or somebody's link. stderr had the same words.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with suppress(OSError), open(os.open(self._termination_log, flags, 0o644), "w") as stream:
                stream.write(self.report.termination_message())

    def _write_line(self, message: Message) -> None:
        if self._for_people:
            line = console_line(message)
            text = f"keyturn: {line}\n" if line else ""
        else:
            now = time.time()
            at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
            record = message_to_record(message)
            record = {"event": record.pop("event"), "at": at, "t_ms": round((time.monotonic() - self._began) * 1000)} | record
            text = json.dumps(record) + "\n"
        if len(self._unread) < MAX_UNREAD_BYTES:
            self._unread += text.encode()
        else:
            self._lost += 1
        self._flush(0)
        if self._lost and not self._unread:
            lost, self._lost = self._lost, 0
            self._write_line(LinesLost(lost))

    def _flush(self, wait_s: float) -> None:
        """Write what its reader takes, waiting at most `wait_s` in all.

        The reader belongs to the host, and this is the only thread: a reader that stops reading must not keep a lease, a
        signal or a dead server from being acted upon. Up to PIPE_BUF bytes are written without waiting once poll says so.
        """
        deadline = time.monotonic() + wait_s
        try:
            while self._unread and select.select([], [self._stderr], [], max(0.0, deadline - time.monotonic()))[1]:
                self._unread = self._unread[os.write(self._stderr, self._unread[: select.PIPE_BUF]) :]
        except BlockingIOError:  # a terminal that says it takes bytes and takes none
            return
        except OSError:  # whoever read us is gone; the boot goes on
            self._unread = b""


def _never_waiting() -> int:
    """The terminal behind stderr, opened for ourselves alone: poll says that it takes something, not that it takes all."""
    try:
        return os.open(f"/proc/self/fd/{STDERR}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # somebody else's terminal
        return STDERR


def _write(path: Path, data: bytes) -> None:
    """Atomic: a reader sees what was there before or after, never half of it."""
    _regular(path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    new = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    # Never through somebody's link, never into somebody's file: the folder may be shared.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _regular(path: Path) -> Path:
    """The path, unless something stands there that is no file of ours to replace. Raises OSError."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise FileExistsError(errno.EEXIST, "status file")
    return path


def resident_kib() -> int | None:
    """How much memory this process has resident."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    except (OSError, IndexError, ValueError):
        return None


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did: with its id, its name. None: there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None
