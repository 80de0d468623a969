import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import GpuCountError
from agent.events import BootStarted, Stage, StageStarted
from agent.guest.systemd import ServiceManager
from agent.report import BootReport
from agent.telling import MAX_UNREAD_BYTES, Teller


def teller(status: str | None = None, termination: str | None = None) -> Teller:
    return Teller(BootReport("0.1.0", "run"), status, termination, ServiceManager(None))


def test_every_message_is_one_json_line_and_a_new_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = teller(str(tmp_path / "new" / "status.json"))
    told.tell(BootStarted(Ident("0.1.0"), Ident("run")))
    told.tell(StageStarted(Stage.CONFIG))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["boot_started", "stage_started"]
    assert list(lines[0])[:3] == ["event", "at", "t_ms"]
    status = json.loads((tmp_path / "new" / "status.json").read_text())
    assert status["stages"][0]["state"] == "running"
    assert os.listdir(tmp_path / "new") == ["status.json"], "nothing half-written stays"


def test_a_status_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = teller(str(tmp_path / "file" / "status.json"))
    told.tell(StageStarted(Stage.CONFIG))
    told.tell(StageStarted(Stage.DEVICES))
    events = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
    assert events == ["stage_started", "status_unwritable", "stage_started"]
    (tmp_path / "file").unlink()
    told.tell(StageStarted(Stage.PREPARE))
    assert (tmp_path / "file" / "status.json").exists(), "it is tried again with every message"


def test_the_last_word_goes_where_kubernetes_reads_it(tmp_path: Path) -> None:
    told = teller(None, str(tmp_path / "termination"))
    told.tell(GpuCountError(2, 1))
    told.last_word()
    assert "expected 2 distinct GPUs, got 1" in (tmp_path / "termination").read_text()


def test_the_last_word_neither_waits_for_a_reader_nor_follows_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    teller(None, str(tmp_path / "fifo")).last_word()  # blocks for ever where this is wrong
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    teller(None, str(tmp_path / "link")).last_word()
    assert (tmp_path / "victim").read_text() == "precious"


@contextmanager
def stderr_pipe() -> Iterator[int]:
    """Replace descriptor 2 by a pipe; the value is its reading end."""
    saved = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_a_reader_that_is_gone_does_not_stop_a_boot() -> None:
    told = teller()
    with stderr_pipe() as reader:
        os.close(reader)
        told.tell(StageStarted(Stage.CONFIG))
        told.last_word()


def test_a_reader_that_does_not_read_never_makes_us_wait_and_gets_what_fits_later() -> None:
    told = teller()
    with stderr_pipe() as reader:
        size = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        os.set_blocking(2, False)
        filled = sum(iter(lambda: _fill(2), 0))
        os.set_blocking(2, True)
        began = time.monotonic()
        for _ in range(1000):
            told.tell(StageStarted(Stage.CONFIG))  # blocks for ever where this is wrong
        assert time.monotonic() - began < 10
        os.read(reader, filled)
        told.last_word()
        os.set_blocking(reader, False)
        rest = os.read(reader, size)
        assert len(rest) <= MAX_UNREAD_BYTES + 4096
        assert json.loads(rest.split(b"\n")[0])["event"] == "stage_started"
        told.tell(StageStarted(Stage.DEVICES))
        assert json.loads(os.read(reader, size).splitlines()[-1])["event"] == "lines_lost"
        os.close(reader)


def _fill(descriptor: int) -> int:
    try:
        return os.write(descriptor, b"x" * 4096)
    except BlockingIOError:
        return 0


def test_a_status_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "status.json").symlink_to(victim)
    teller(str(tmp_path / "status.json")).tell(StageStarted(Stage.CONFIG))
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "booting"


@pytest.mark.parametrize("path", ["/", "/proc/status.json", "/dev/null/x", "/dev/null"])
def test_a_path_that_is_no_file_of_ours_is_told_and_left_alone(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = os.stat("/dev/null")
    teller(path).tell(StageStarted(Stage.CONFIG))
    assert "status_unwritable" in capfd.readouterr().err
    assert os.stat("/dev/null").st_ino == before.st_ino


def test_a_terminal_that_nobody_reads_stops_nothing() -> None:
    """In a child, because a terminal behind stderr is a matter of the whole process."""
    program = """
from agent.errors import GpuCountError
from agent.guest.systemd import ServiceManager
from agent.report import BootReport
from agent.telling import Teller
told = Teller(BootReport("0.1.0", "run"), None, None, ServiceManager(None))
for _ in range(2000):
    told.tell(GpuCountError(2, 1))
"""
    master, slave = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=slave, timeout=60, check=True)
        assert os.get_blocking(slave), "the terminal is as it was for everybody else"
    finally:
        os.close(master)
        os.close(slave)
