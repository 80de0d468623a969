import pytest

from agent.events import Event, Progress, Stage, StageEnded, StageFailed, StageStarted
from agent.stages import stage


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
