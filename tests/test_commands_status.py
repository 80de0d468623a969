import json
import os
from pathlib import Path

import pytest

from agent.cli import main
from agent.closed import Ident
from agent.errors import GpuCountError
from agent.events import LeaseRenewed, ServerReady, Stage, StageEnded, VerdictAccepted
from agent.report import BootReport
from agent.telling import start_of


def written(path: Path, report: BootReport) -> list[str]:
    path.write_text(json.dumps(report.status()))
    return ["status", "--status-file", str(path)]


def test_serving_is_zero_and_anything_else_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = BootReport("0.1.0", "run", os.getpid(), start_of(os.getpid()) or 0)
    report.apply(StageEnded(Stage.LOAD, 5, 10))
    assert main(written(tmp_path / "status.json", report)) == 1
    report.apply(ServerReady(5, 1))
    assert main([*written(tmp_path / "status.json", report), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["phase"] == "serving"


def test_a_lease_shows_its_end_and_its_renewals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = BootReport("0.1.0", "run", os.getpid(), start_of(os.getpid()) or 0)
    report.apply(VerdictAccepted(Ident("r1"), Ident("kbs:///a/b/c"), Ident("7"), False, 60))
    main(written(tmp_path / "status.json", report))
    assert "lease: 60 s, renewals: 0" in capsys.readouterr().out
    report.apply(LeaseRenewed(90, Ident("2026-11-26T12:02:00Z")))
    main(written(tmp_path / "status.json", report))
    assert "lease: 90 s, until 2026-11-26T12:02:00Z, renewals: 1" in capsys.readouterr().out


def test_a_failure_shows_who_must_act(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = BootReport("0.1.0", "run", os.getpid(), start_of(os.getpid()) or 0)
    report.apply(GpuCountError(2, 1))
    assert main(written(tmp_path / "status.json", report)) == 1
    shown = capsys.readouterr().out
    assert "GpuCountError: expected 2 distinct GPUs, got 1" in shown
    assert "who must act: host" in shown


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"schema": "other"}'])
def test_no_status_is_told_as_such(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert main(["status", "--status-file", str(tmp_path / "status.json")]) == 2
    assert "no status of an agent" in capsys.readouterr().err


def test_a_status_outlived_by_nobody_is_not_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = BootReport("0.1.0", "run", os.getpid(), (start_of(os.getpid()) or 0) + 1)  # the id was given to somebody else
    report.apply(ServerReady(5, 1))
    assert main(written(tmp_path / "status.json", report)) == 1
    assert "is gone" in capsys.readouterr().err
