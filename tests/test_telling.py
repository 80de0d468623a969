import io
import json
import os
import sys
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import GpuCountError
from agent.events import BootStarted, Stage, StageStarted
from agent.report import BootReport
from agent.telling import Teller


def teller(status: str | None = None, termination: str | None = None) -> Teller:
    return Teller(BootReport("0.1.0", "run"), status, termination)


def test_every_message_is_one_json_line_and_a_new_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = teller(str(tmp_path / "new" / "status.json"))
    told.tell(BootStarted(Ident("0.1.0"), Ident("run")))
    told.tell(StageStarted(Stage.CONFIG))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["boot_started", "stage_started"]
    assert list(lines[0])[:3] == ["event", "at", "t_ms"]
    status = json.loads((tmp_path / "new" / "status.json").read_text())
    assert status["stages"][0]["state"] == "running"
    assert os.listdir(tmp_path / "new") == ["status.json"], "nothing half-written stays"


def test_a_status_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = teller(str(tmp_path / "file" / "status.json"))
    told.tell(StageStarted(Stage.CONFIG))
    told.tell(StageStarted(Stage.DEVICES))
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["stage_started", "status_unwritable", "stage_started"]


def test_the_last_word_goes_where_kubernetes_reads_it(tmp_path: Path) -> None:
    told = teller(None, str(tmp_path / "termination"))
    told.tell(GpuCountError(2, 1))
    told.last_word()
    assert "expected 2 distinct GPUs, got 1" in (tmp_path / "termination").read_text()


def test_a_reader_that_is_gone_does_not_stop_a_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        teller().tell(StageStarted(Stage.CONFIG))
