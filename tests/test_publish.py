import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.artifact import DestinationKind
from agent.config import EXAMPLE, parse
from agent.errors import DestinationError, LeaseEndedError
from agent.publish import HandedModel, publish, take_over
from agent.server import ServerPlan
from agent.worker import plan_server

PLAN: ServerPlan = plan_server(parse(EXAMPLE.encode()).config.server)


def handed(destination: DestinationKind, descriptors: tuple[int, ...] = (), directory: str | None = None) -> HandedModel:
    return HandedModel(PLAN, destination, directory, "weights/model.gguf", descriptors, LeaseEndedError(60), 123.5)


def test_what_the_worker_hands_over_survives_the_channel() -> None:
    model = handed(DestinationKind.DIRECTORY, (), "/model")
    again = HandedModel.of(json.loads(json.dumps(model.record())), ())
    assert again.plan == model.plan
    assert again.record() == model.record()


@pytest.mark.parametrize("record", [None, [], {}, {"plan": {}}])
def test_anything_else_is_refused(record: object) -> None:
    with pytest.raises((ValueError, KeyError)):
        HandedModel.of(record, ())


def test_a_memfd_is_named_by_its_number_and_scratch_goes_with_the_boot() -> None:
    memfd = os.memfd_create("model")
    with ExitStack() as undo:
        model = handed(DestinationKind.MEMFD, (memfd,))
        take_over(model, undo)
        place = publish(model, False, undo)
        assert (place.model, place.descriptors) == (f"/proc/self/fd/{memfd}", (memfd,))
        assert Path(place.scratch).stat().st_mode & 0o777 == 0o700
        Path(place.scratch, "cache").write_text("x")
    assert not Path(place.scratch).exists()
    with pytest.raises(OSError):
        os.fstat(memfd)


def test_a_given_directory_is_used_as_it_is_and_emptied_at_the_end(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "weights").mkdir(parents=True)
    with ExitStack() as undo:
        given = handed(DestinationKind.DIRECTORY, (), str(model))
        take_over(given, undo)
        place = publish(given, False, undo)
        assert place.model == f"{model}/weights/model.gguf"
        assert place.model_dir == str(model)
        assert model.exists()
    assert not model.exists(), "weights do not outlive the boot"
    assert tmp_path.exists()


def test_what_is_no_mount_cannot_be_attached_and_nothing_stays() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    model = handed(DestinationKind.TMPFS, (reader,))
    with ExitStack() as undo, pytest.raises(DestinationError):
        take_over(model, undo)
        publish(model, False, undo)
    with pytest.raises(OSError):
        os.fstat(reader)
