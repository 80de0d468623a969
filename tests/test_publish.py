import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.artifact import DestinationKind, ServedModel, given
from agent.config import EXAMPLE, parse
from agent.errors import DestinationError, DestinationProblem
from agent.guest import mounts
from agent.lease import Lease
from agent.publish import (
    RUN_DIRECTORY,
    HandedModel,
    is_damaged,
    make_mount_points,
    publish,
    release,
    take_over,
    wait_until_gone,
)
from agent.server import ServerPlan
from agent.worker import plan_server
from tests.children import in_child

SERVER = parse(EXAMPLE.encode()).config.server
assert SERVER is not None
PLAN: ServerPlan = plan_server(SERVER)
SERVED = ServedModel("sha256:" + "5a" * 32, 3)


def handed(destination: DestinationKind, descriptors: tuple[int, ...] = (), directory: str | None = None) -> HandedModel:
    return HandedModel(PLAN, destination, directory, "weights/model.gguf", descriptors, SERVED, Lease(60, 123.5), True, None)


def test_what_the_worker_hands_over_survives_the_channel() -> None:
    model = handed(DestinationKind.DIRECTORY, (), "/model")
    again = HandedModel.of(json.loads(json.dumps(model.record())), ())
    assert again == model


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have few capabilities")
def test_scratch_goes_with_the_boot_when_root_may_not_look_into_it() -> None:
    """With the capabilities of deploy/base/entrypoint but SYS_ADMIN."""
    script = """
import os, pathlib
from contextlib import ExitStack
from agent.artifact import DestinationKind
from agent.publish import publish
from tests.test_publish import handed
with ExitStack() as undo:
    scratch = publish(handed(DestinationKind.MEMFD, (os.memfd_create("model"),)), False, undo).scratch
    os.seteuid(65532)
    os.makedirs(f"{scratch}/prompts", 0o700)
    pathlib.Path(scratch, "prompts", "one").write_text("x")
    os.seteuid(0)
assert not os.path.exists(scratch)
"""
    few = ["setpriv", "--bounding-set=-all,+setuid,+setgid,+setpcap,+chown,+kill,+ipc_lock", "--inh-caps=-all"]
    done = subprocess.run(
        [*few, sys.executable, "-B", "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_given_directory_is_used_as_it_is_and_emptied_at_the_end(tmp_path: Path) -> None:
    model = tmp_path / "model"
    folder = os.open(tmp_path, os.O_RDONLY)
    mark = given.acquire(folder)
    os.close(folder)
    (model / "weights").mkdir(parents=True)
    with ExitStack() as undo:
        handed_over = handed(DestinationKind.DIRECTORY, (mark,), str(model))
        take_over(handed_over, undo)
        place = publish(handed_over, False, undo)
        assert place.model == f"{model}/weights/model.gguf"
        assert place.model_dir == str(model)
        assert model.exists()
    assert list(tmp_path.iterdir()) == [], "weights do not outlive the boot"


def test_what_is_no_mount_cannot_be_attached_and_nothing_stays() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    model = handed(DestinationKind.TMPFS, (reader,))
    with ExitStack() as undo, pytest.raises(DestinationError):
        take_over(model, undo)
        publish(model, False, undo)
    with pytest.raises(OSError):
        os.fstat(reader)


def test_a_volume_that_somebody_holds_is_not_wiped(tmp_path: Path) -> None:
    """What shows that it is held is the device, which the kernel would have removed."""
    wait_until_gone([str(tmp_path / "gone")], 0)
    with pytest.raises(OSError):
        wait_until_gone([str(tmp_path / "gone"), str(tmp_path)], 0.05)


def test_what_is_no_volume_is_not_damaged() -> None:
    assert not is_damaged(handed(DestinationKind.TMPFS, (0,)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_model_and_scratch_are_mounted_for_the_server_and_gone_before_we_say_so() -> None:
    def scenario() -> tuple[int, int]:
        mounts.enter_private_mount_namespace()
        make_mount_points()
        made = mounts.detached_tmpfs(1 << 20, os.getegid())
        model = handed(DestinationKind.TMPFS, (made.fd,))
        with ExitStack() as undo:
            take_over(model, undo)
            place = publish(model, True, undo)
            assert place.model == f"{RUN_DIRECTORY}/model/weights/model.gguf"
            assert os.stat(place.scratch).st_uid == PLAN.uid
            during = Path("/proc/self/mountinfo").read_text().count(f" {RUN_DIRECTORY}/")
        return during, Path("/proc/self/mountinfo").read_text().count(f" {RUN_DIRECTORY}/")

    assert in_child(scenario) == (2, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_releasing_unlinks_every_file_and_leaves_the_mount_read_only() -> None:
    def scenario() -> tuple[int, list[str]]:
        mounts.enter_private_mount_namespace()
        make_mount_points()
        made = mounts.detached_tmpfs(1 << 20, os.getegid())
        os.mkdir("d", dir_fd=made.fd)
        for name in ("a", "d/b"):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o440, dir_fd=made.fd))
        mounts.set_read_only(made.fd)
        model = handed(DestinationKind.TMPFS, (made.fd,))
        with ExitStack() as undo:
            take_over(model, undo)
            publish(model, True, undo)
            files = release(model)
            left = sorted(path.name for path in Path(RUN_DIRECTORY, "model").rglob("*"))
            with pytest.raises(OSError, match="Read-only"):
                Path(RUN_DIRECTORY, "model", "new").touch()
        return files, left

    assert in_child(scenario) == (2, ["d"])


def test_a_memfd_cannot_be_released() -> None:
    memfd = os.memfd_create("model")
    with ExitStack() as undo, pytest.raises(DestinationError) as caught:
        model = handed(DestinationKind.MEMFD, (memfd,))
        take_over(model, undo)
        release(model)
    assert caught.value.problem is DestinationProblem.HELD
