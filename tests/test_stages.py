import pytest

from agent.events import Event, Progress, Stage, StageEnded, StageFailed, StageStarted
from agent.stages import StageRun, stage


def test_a_stage_begins_and_ends_with_its_bytes() -> None:
    told: list[Event] = []
    with stage(Stage.LOAD, told.append) as run:
        run.count(1, 10)
        run.count(2, 10)
        run.count(10, 10)
    assert told[0] == StageStarted(Stage.LOAD)
    assert told[1] == Progress(Stage.LOAD, 1, 10)
    assert isinstance(told[-1], StageEnded)
    assert told[-1].bytes == 10
    assert len(told) == 3, "progress is told a few times a second, not for every segment"


def test_a_stage_that_raises_has_failed_and_the_error_goes_on() -> None:
    told: list[Event] = []
    with pytest.raises(KeyError), stage(Stage.CONFIG, told.append):
        raise KeyError
    assert isinstance(told[-1], StageFailed)


def test_progress_tells_the_rate_of_the_last_ten_seconds_and_how_long_it_will_take() -> None:
    told: list[Event] = []
    now = 100.0
    run = StageRun(Stage.LOAD, told.append, clock=lambda: now)
    for seconds, done in ((0, 0), (0.1, 5), (5, 500), (9, 900), (30, 900), (35, 910), (39, 910), (46, 910)):
        now = 100.0 + seconds
        run.count(done, 1000)
    assert [(each.bytes_per_s, each.eta_s) for each in told if isinstance(each, Progress)] == [
        (None, None),
        (100, 5),
        (100, 1),
        (None, None),  # nothing for so long that the rate begins anew
        (2, 45),
        (1, 81),
        (0, None),
    ]
