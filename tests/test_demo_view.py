"""What people and programs are shown, from events as they come."""

import io
import json

import pytest
from rich.console import Console

from agent.closed import Ident
from agent.demo.run import Result, Told, Weights
from agent.demo.view import HumanView, JsonView
from agent.errors import SegmentAuthenticationError
from agent.events import DestinationChosen, GatePassed, Message, Progress, Stage, StageEnded, StageFailed, StageStarted

DIGEST = "5" * 64


def watch(*messages: tuple[int, Message], result: Result) -> str:
    output = io.StringIO()
    with HumanView(Console(file=output, width=120)) as view:
        with view.preparing("sealed model") as progress:
            progress(1_000_000, 2_000_000)
        for t_ms, message in messages:
            view.told(Told("", message, t_ms))
        view.ended(result)
    return output.getvalue()


def test_people_see_stages_with_durations_and_bytes_then_answers_and_a_timeline() -> None:
    shown = watch(
        (100, StageStarted(Stage.LOAD)),
        (150, Progress(Stage.LOAD, 1_000_000, 46_000_000)),
        (350, StageEnded(Stage.LOAD, 250, 46_000_000)),
        (360, DestinationChosen(Ident("tmpfs"), 46_000_000, noswap=True, swap_active=False)),
        (370, GatePassed(1, preset=False)),
        (400, StageStarted(Stage.SERVER)),
        (900, StageEnded(Stage.SERVER, 500)),
        result=Result(DIGEST, exit_status=0, similarity=(0.77, 0.15), weights=Weights("tmpfs", DIGEST)),
    )
    tables, _, timeline = shown.partition("the boot, in milliseconds")
    assert "sealed model" in tables and "1.0 MB" in tables
    assert "250 ms" in tables and "46.0 MB" in tables and "1 GPU ready" in tables
    assert "0.77" in tables and "as before sealing" in tables
    bars = {line.split()[0]: line.count("█") for line in timeline.splitlines() if "█" in line}
    assert bars["server"] > bars["load"] > 0
    assert "ok:" in timeline


def test_people_see_which_stage_failed_and_who_must_act() -> None:
    error = SegmentAuthenticationError(file=0, segment=22)
    shown = watch(
        (100, StageStarted(Stage.LOAD)),
        (350, StageFailed(Stage.LOAD, 250)),
        result=Result(DIGEST, exit_status=19, error=error),
    )
    assert "✗" in shown
    assert "status 19" in shown and "(provider)" in shown and error.next_step in shown


def test_people_see_how_many_devices_passed_the_gate() -> None:
    shown = watch((370, GatePassed(8, preset=False, switches=4)), result=Result(DIGEST))
    assert "8 GPU ready, 4 NVSwitch locked" in shown


def test_people_see_when_the_weights_are_not_what_was_sealed() -> None:
    result = Result(DIGEST, exit_status=0, similarity=(0.77, 0.15), weights=Weights("tmpfs", "6" * 64))
    shown = watch(result=result)
    assert "NOT what was sealed" in shown
    assert "not as promised" in shown


def test_programs_get_the_agents_lines_unchanged_and_ours_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonView()
    with view.preparing("sealed model") as progress:
        progress(1, 2)
    view.told(Told('{"event": "wiped"}\n', GatePassed(1, preset=False), 5))
    view.serving(Result(DIGEST), 8080)
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["prepared", "wiped", "serving"]
    assert lines[1] == '{"event": "wiped"}'
