"""Sealing: what comes out opens again, and what goes wrong leaves nothing behind."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.artifact import manifest as m
from agent.artifact.blobs import THREADS, UnsafeFixedSalt
from agent.artifact.seal import _in_order, plan_seal, seal_model
from agent.artifact.sources import open_source
from agent.artifact.stream import SEGMENT_BYTES, SegmentOpener, associated_data, key_commitment, parse_header
from agent.errors import SealError, SealProblem

KEY = bytes(range(32))
URI = "kbs:///default/model/llama"


def ignore(done: int, total: int) -> None:
    pass


def seal(model: Path, out: Path, version: int = 1, progress: Callable[[int, int], None] = ignore, **changes: str) -> str:
    return seal_model(model, out, KEY, changes.get("uri", URI), changes.get("name", "llama"), version, progress)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> contents, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def open_model(out: Path, digest: str) -> tuple[m.ModelConfig, dict[str, bytes]]:
    source = open_source(str(out), None, 1)
    manifest = m.parse_manifest(source.read_blob(digest, m.MAX_MANIFEST_BYTES), digest)
    config = m.parse_config(source.read_blob(manifest.config_digest, m.MAX_CONFIG_BYTES), manifest)
    contents = {}
    for i, file in enumerate(config.files):
        blob = source.read_blob(file.blob_digest, file.layout.ciphertext_bytes)
        assert (len(blob), blob[:40]) == (file.layout.ciphertext_bytes, file.header)
        assert m.digest_of(blob) == file.blob_digest
        bound = associated_data(config.model_name, file.path, file.size, config.key_uri, file.sealed_version)
        opener = SegmentOpener(KEY, parse_header(file.header, i), bound, file.layout, i)
        plaintext = bytearray(file.size)
        for segment in range(file.layout.segments):
            (at, sealed), (start, length) = file.layout.ciphertext_range(segment), file.layout.plaintext_range(segment)
            opener.open(segment, memoryview(blob)[at : at + sealed], memoryview(plaintext)[start : start + length])
        contents[file.path] = bytes(plaintext)
    source.close()
    return config, contents


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "weights").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "empty").write_bytes(b"")
    (folder / "weights" / "a.bin").write_bytes(os.urandom(2 * SEGMENT_BYTES + 17))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "sealed"


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_sealed_model_opens_to_the_files_it_was_made_of(model: Path, out: Path) -> None:
    config, contents = open_model(out, seal(model, out, version=4))
    assert contents == {path: data for path, data in tree(model).items() if data is not None}
    assert (config.model_name, config.version, config.key_uri) == ("llama", 4, URI)
    assert config.key_commitment == key_commitment(KEY, URI)
    assert {file.sealed_version for file in config.files} == {4}


def test_the_result_is_an_oci_image_layout_whose_blobs_have_their_digests_as_names(model: Path, out: Path) -> None:
    digest = seal(model, out)
    assert json.loads((out / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((out / "index.json").read_bytes())["manifests"]
    assert entry["digest"] == digest
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "llama-v1"}
    blobs = list((out / "blobs" / "sha256").iterdir())
    assert len(blobs) == 5
    assert all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in blobs)
    assert sorted(path.name for path in out.iterdir()) == ["blobs", "index.json", "oci-layout"]


def test_two_sealings_of_one_model_have_no_blob_and_no_header_in_common(model: Path, tmp_path: Path) -> None:
    first, _ = open_model(tmp_path / "a", seal(model, tmp_path / "a"))
    second, _ = open_model(tmp_path / "b", seal(model, tmp_path / "b"))
    headers = {file.header for file in (*first.files, *second.files)}
    assert len(headers) == 6
    assert {file.blob_digest for file in first.files}.isdisjoint(file.blob_digest for file in second.files)


def test_no_plaintext_is_in_the_layout(model: Path, out: Path) -> None:
    (model / "marker").write_bytes(b"a very particular plaintext")
    seal(model, out)
    assert not any(b"particular" in (data or b"") for data in tree(out).values())


def test_a_second_version_is_added_and_the_first_stays(model: Path, out: Path) -> None:
    first = seal(model, out, version=1)
    before = tree(out)
    (model / "config.json").write_bytes(b"{ }")
    second = seal(model, out, version=2)
    assert [entry.ref_name for entry in m.parse_index((out / "index.json").read_bytes())] == ["llama-v1", "llama-v2"]
    assert open_model(out, first)[1]["config.json"] == b"{}"
    assert open_model(out, second)[1]["config.json"] == b"{ }"
    assert all(tree(out)[path] == data for path, data in before.items() if path != "index.json")


def test_progress_counts_every_byte_once(model: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    seal(model, out, progress=lambda done, total: seen.append((done, total)))
    total = 2 * SEGMENT_BYTES + 19
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) == 5


def test_memory_does_not_grow_with_the_file(model: Path, out: Path) -> None:
    with (model / "weights" / "a.bin").open("wb") as stream:
        stream.truncate(64 * SEGMENT_BYTES)
    tracemalloc.start()
    seal(model, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (2 * THREADS + 2) * SEGMENT_BYTES


# --- the model folder -------------------------------------------------------------------------------------------------


def problem_of(model: Path, out: Path, **changes: str) -> tuple[SealProblem, str | None]:
    with pytest.raises(SealError) as caught:
        seal(model, out, **changes)  # type: ignore[arg-type]
    assert not out.exists()
    assert not caught.value.retryable
    return caught.value.problem, caught.value.where


def test_a_link_to_a_file_inside_is_sealed_as_that_file(model: Path, out: Path) -> None:
    (model / "link").symlink_to("weights/a.bin")
    _, contents = open_model(out, seal(model, out))
    assert contents["link"] == contents["weights/a.bin"]


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "nowhere", "weights", ".", "loop"])
def test_a_link_that_leaves_or_names_no_file_is_refused(model: Path, out: Path, target: str) -> None:
    (model.parent / "secret").write_bytes(b"x")
    (model / "loop").symlink_to(target)
    assert problem_of(model, out) == (SealProblem.NOT_A_FILE, "loop")


def test_a_link_that_leaves_through_a_folder_below_is_refused(model: Path, out: Path) -> None:
    (model.parent / "secret").write_bytes(b"x")
    (model / "weights" / "link").symlink_to("../../secret")
    assert problem_of(model, out) == (SealProblem.NOT_A_FILE, "weights/link")


def test_a_fifo_is_refused_and_not_waited_for(model: Path, out: Path) -> None:
    os.mkfifo(model / "fifo")
    assert problem_of(model, out) == (SealProblem.NOT_A_FILE, "fifo")


def test_a_missing_model_folder_is_refused(tmp_path: Path, out: Path) -> None:
    assert problem_of(tmp_path / "absent", out) == (SealProblem.MODEL_MISSING, None)


def test_a_file_in_place_of_the_model_folder_is_refused(model: Path, out: Path) -> None:
    assert problem_of(model / "config.json", out) == (SealProblem.MODEL_MISSING, None)


def test_a_folder_without_files_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    assert problem_of(tmp_path / "hollow", out) == (SealProblem.EMPTY, None)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "e\u0301", b"\xff".decode(errors="surrogateescape"), "CONFIG.json"])
def test_a_name_that_not_every_file_system_can_hold_is_refused(model: Path, out: Path, name: str) -> None:
    (model / name).write_bytes(b"")
    problem, where = problem_of(model, out)
    assert problem is SealProblem.BAD_PATH
    assert where in ("unprintable", "config.json")


@pytest.mark.parametrize(
    ("paths", "where"),
    [
        ([f"{i}" for i in range(m.MAX_FILES + 1)], "files"),
        ([f"{i}{'/b' * 249}/f" for i in range(m.MAX_FOLDERS // 250 + 1)], "folders"),
    ],
    ids=["files", "folders"],
)
def test_more_files_or_folders_than_the_format_holds_are_refused_at_once(paths: list[str], where: str) -> None:
    assert len(_in_order(dict.fromkeys(paths[:-1], 1))) == len(paths) - 1
    with pytest.raises(SealError) as caught:
        _in_order(dict.fromkeys(paths, 1))
    assert (caught.value.problem, caught.value.where) == (SealProblem.BAD_VALUE, where)


@pytest.mark.parametrize(
    ("where", "changes"), [("model_name", {"name": "../x"}), ("key_uri", {"uri": "kbs:///a/b"}), ("model_name", {"name": ""})]
)
def test_a_name_or_uri_beyond_the_format_is_refused(model: Path, out: Path, where: str, changes: dict[str, str]) -> None:
    assert problem_of(model, out, **changes) == (SealProblem.BAD_VALUE, where)


def test_version_zero_is_refused(model: Path, out: Path) -> None:
    with pytest.raises(SealError):
        seal(model, out, version=0)


def change_during(model: Path, change: Callable[[Path], None]) -> Callable[[int, int], None]:
    """Progress that changes the big file once, after its first segment."""
    path = model / "weights" / "a.bin"

    def progress(done: int, total: int) -> None:
        if done > 2 and not (model / "changed").exists():
            (model / "changed").touch()
            change(path)

    return progress


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, SEGMENT_BYTES),
        lambda path: os.truncate(path, 4 * SEGMENT_BYTES),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: os.utime(path, ns=(1, 1)),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(model: Path, out: Path, change: Callable[[Path], None]) -> None:
    with pytest.raises(SealError) as caught:
        seal(model, out, progress=change_during(model, change))
    assert (caught.value.problem, caught.value.where) == (SealProblem.CHANGED, "weights/a.bin")
    assert not out.exists()


def test_a_file_that_ends_early_is_found_where_it_ends(model: Path, out: Path) -> None:
    path = model / "weights" / "a.bin"
    os.truncate(path, 20 * SEGMENT_BYTES)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        if not seen:
            os.truncate(path, 8 * SEGMENT_BYTES)
        seen.append(done)

    with pytest.raises(SealError) as caught:
        seal(model, out, progress=progress)
    assert (caught.value.problem, caught.value.where) == (SealProblem.CHANGED, "weights/a.bin")
    assert len(seen) <= 2 + 8


def test_a_file_that_grows_before_its_turn_is_refused(model: Path, out: Path) -> None:
    grown: list[int] = []

    def progress(done: int, total: int) -> None:
        if not grown:
            grown.append(done)
            with (model / "weights" / "a.bin").open("ab") as stream:
                stream.write(b"x")

    with pytest.raises(SealError) as caught:
        seal(model, out, progress=progress)
    assert caught.value.problem is SealProblem.CHANGED


@pytest.mark.parametrize("becomes", ["link", "folder that is a link", "fifo"])
def test_a_file_that_leads_out_of_the_folder_when_its_turn_comes_is_refused(model: Path, out: Path, becomes: str) -> None:
    """Whoever can write there is not to choose a file that only we can read."""
    outside, folder = model.parent / "outside", model / "z"
    for place in (outside, folder):
        place.mkdir()
        for number in range(THREADS + 9):  # more than are open at a time
            (place / f"{number:04}").write_bytes(place.name[:1].encode())
    last = folder / f"{THREADS + 8:04}"

    def turn(done: int, total: int) -> None:
        if last.is_symlink() or folder.is_symlink() or last.is_fifo():
            return
        if becomes == "folder that is a link":
            folder.rename(model.parent / "away")
            folder.symlink_to(outside)
            return
        last.unlink()
        if becomes == "link":
            last.symlink_to(outside / last.name)
        else:
            os.mkfifo(last)

    with pytest.raises(SealError) as caught:
        seal(model, out, progress=turn)
    assert caught.value.problem is SealProblem.CHANGED
    assert (caught.value.where or "").startswith("z/")
    assert not out.exists()


# --- a second version -------------------------------------------------------------------------------------------------


def blobs(out: Path) -> set[str]:
    return {path.name for path in (out / "blobs" / "sha256").iterdir()}


def test_a_file_that_did_not_change_keeps_its_blob_and_the_version_it_was_sealed_in(model: Path, out: Path) -> None:
    first, _ = open_model(out, seal(model, out, 1))
    (model / "config.json").write_bytes(b"{ }")
    (model / "new").write_bytes(b"x")
    os.utime(model / "weights" / "a.bin", ns=(1, 1))  # contents count, not times
    before = blobs(out)
    second, contents = open_model(out, seal(model, out, 2))
    assert contents == {path: data for path, data in tree(model).items() if data is not None}
    assert {file.path: file.sealed_version for file in second.files} == {
        "config.json": 2,
        "empty": 1,
        "new": 2,
        "weights/a.bin": 1,
    }
    assert second.files[1] == first.files[1]
    assert second.files[3] == first.files[2]
    assert len(blobs(out) - before) == 4  # two files, config and manifest
    (model / "empty").unlink()
    third, _ = open_model(out, seal(model, out, 3))
    assert [file.sealed_version for file in third.files] == [2, 2, 1]


@pytest.mark.parametrize("at", [0, SEGMENT_BYTES, 2 * SEGMENT_BYTES + 16])
def test_a_file_that_differs_in_one_byte_is_sealed_anew(model: Path, out: Path, at: int) -> None:
    seal(model, out, 1)
    data = bytearray((model / "weights" / "a.bin").read_bytes())
    data[at] ^= 1
    (model / "weights" / "a.bin").write_bytes(data)
    config, contents = open_model(out, seal(model, out, 2))
    assert contents["weights/a.bin"] == data
    assert [file.sealed_version for file in config.files] == [1, 1, 2]


def damaged(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.__setitem__(39, data[39] ^ 1),
        lambda data: data.__setitem__(-1, data[-1] ^ 1),
        lambda data: data.append(0),
        lambda data: data.pop(),
    ],
)
def test_a_blob_that_is_not_what_was_sealed_is_not_kept(model: Path, out: Path, change: Callable[[bytearray], object]) -> None:
    first, _ = open_model(out, seal(model, out, 1))
    damaged(out / "blobs" / first.files[2].blob_digest.replace("sha256:", "sha256/"), change)
    second, contents = open_model(out, seal(model, out, 2))
    assert contents["weights/a.bin"] == (model / "weights" / "a.bin").read_bytes()
    assert [file.sealed_version for file in second.files] == [1, 1, 2]


def test_nothing_is_kept_of_another_key_name_or_key_uri(model: Path, out: Path) -> None:
    seal(model, out, 1)
    for digest in (
        seal_model(model, out, bytes(32), URI, "llama", 2, ignore),
        seal(model, out, 3, name="other"),
        seal(model, out, 4, uri="kbs:///default/model/other"),
    ):
        manifest = m.parse_manifest((out / "blobs" / digest.replace(":", "/")).read_bytes(), digest)
        config = m.parse_config((out / "blobs" / manifest.config_digest.replace(":", "/")).read_bytes(), manifest)
        assert {file.sealed_version for file in config.files} == {config.version}


def test_nothing_is_kept_of_a_later_version_that_the_index_calls_an_earlier_one(model: Path, out: Path) -> None:
    seal(model, out, 5)
    (out / "index.json").write_text((out / "index.json").read_text().replace("llama-v5", "llama-v1"))
    config, _ = open_model(out, seal(model, out, 2))
    assert {file.sealed_version for file in config.files} == {2}


def test_progress_counts_what_is_kept(model: Path, out: Path) -> None:
    seal(model, out, 1)
    seen: list[tuple[int, int]] = []
    seal(model, out, 2, progress=lambda done, total: seen.append((done, total)))
    total = 2 * SEGMENT_BYTES + 19
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_plan_says_what_would_be_sealed_and_writes_nothing(model: Path, out: Path) -> None:
    plan = plan_seal(model, out, None, URI, "llama", 1, ignore)
    assert plan.sizes == plan.changed == {"config.json": 2, "empty": 0, "weights/a.bin": 2 * SEGMENT_BYTES + 17}
    assert not out.exists()
    seal(model, out, 1)
    (model / "config.json").write_bytes(b"{ }")
    before = tree(out)
    plan = plan_seal(model, out, KEY, URI, "llama", 2, ignore)
    assert plan.changed == {"config.json": 3}
    with pytest.raises(SealError) as caught:
        plan_seal(model, out, KEY, URI, "llama", 1, ignore)
    assert caught.value.problem is SealProblem.SEALED_BEFORE
    assert tree(out) == before


def test_salts_that_are_fixed_make_the_same_bytes_and_open(model: Path, tmp_path: Path) -> None:
    digests = {
        seal_model(model, tmp_path / name, KEY, URI, "llama", 1, ignore, unsafe_salt=UnsafeFixedSalt(b"vectors"))
        for name in ("one", "two")
    }
    (digest,) = digests
    _, contents = open_model(tmp_path / "one", digest)
    assert contents == {path: data for path, data in tree(model).items() if data is not None}
    other = seal_model(model, tmp_path / "other", KEY, URI, "llama", 1, ignore, unsafe_salt=UnsafeFixedSalt(b"others"))
    assert other != digest


# --- the output folder ------------------------------------------------------------------------------------------------


def refused_untouched(model: Path, out: Path, version: int = 1) -> SealProblem:
    before = tree(out)
    with pytest.raises(SealError) as caught:
        seal(model, out, version)
    assert tree(out) == before
    return caught.value.problem


def test_a_folder_with_other_things_is_refused(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()
    assert refused_untouched(model, out) is SealProblem.NOT_A_LAYOUT


@pytest.mark.parametrize("mark", [b"", b"{}", b"[]", b'{"imageLayoutVersion":"2.0.0"}', b"\xff", b"[" * 100_000])
def test_a_layout_that_is_none_is_refused(model: Path, out: Path, mark: bytes) -> None:
    out.mkdir()
    (out / "oci-layout").write_bytes(mark)
    assert refused_untouched(model, out) is SealProblem.NOT_A_LAYOUT


def test_a_layout_with_an_unreadable_index_is_refused(model: Path, out: Path) -> None:
    seal(model, out)
    (out / "index.json").write_bytes(b"{")
    assert refused_untouched(model, out, 2) is SealProblem.NOT_A_LAYOUT


def test_a_version_that_is_there_already_is_refused(model: Path, out: Path) -> None:
    seal(model, out)
    assert refused_untouched(model, out) is SealProblem.SEALED_BEFORE


def test_an_empty_folder_is_used_and_stays_when_sealing_fails(model: Path, out: Path) -> None:
    out.mkdir()
    (model / "fifo").touch()
    with pytest.raises(KeyboardInterrupt):
        seal(model, out, progress=interrupt_at(3))
    assert out.exists()
    assert tree(out) == {}
    seal(model, out)


@pytest.mark.parametrize(("model_at", "out_at"), [("m", "m/out"), ("out/m", "out"), ("m", "m")])
def test_folders_that_lie_inside_one_another_are_refused(tmp_path: Path, model_at: str, out_at: str) -> None:
    (tmp_path / model_at).mkdir(parents=True)
    (tmp_path / model_at / "a").touch()
    before = tree(tmp_path)
    with pytest.raises(SealError) as caught:
        seal(tmp_path / model_at, tmp_path / out_at)
    assert caught.value.problem is SealProblem.INSIDE
    assert tree(tmp_path) == before


def test_a_layout_that_another_seal_is_writing_to_is_refused(model: Path, out: Path) -> None:
    seal(model, out)
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert refused_untouched(model, out, 2) is SealProblem.BUSY
    os.close(descriptor)
    seal(model, out, 2)


# --- nothing half-made ------------------------------------------------------------------------------------------------


def interrupt_at(call: int) -> Callable[[int, int], None]:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return progress


class Interrupter:
    """Raises KeyboardInterrupt once, just before the n-th time that Python opens, renames, makes or removes something."""

    EVENTS = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "fcntl.flock"})

    def __init__(self) -> None:
        self.left = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.left and event in self.EVENTS:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupter() -> Interrupter:
    return Interrupter()  # an audit hook stays until the process ends


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_anywhere_leaves_everything_as_it_was_or_sealed(
    model: Path, out: Path, interrupter: Interrupter, existing: bool
) -> None:
    if existing:
        seal(model, out, 1)
        damaged(model / "config.json", lambda data: data.append(1))
    before = tree(out.parent)
    for call in range(1, 1000):
        interrupter.left = call
        try:
            digest = seal(model, out, 2)
        except KeyboardInterrupt:
            assert tree(out.parent) == before
        else:
            break
    assert interrupter.left > 0
    interrupter.left = 0
    assert call > 25
    assert len(open_model(out, digest)[1]) == 3


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_interrupt_leaves_nothing_of_a_new_layout(model: Path, tmp_path: Path, call: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        seal(model, tmp_path / "new" / "sealed", progress=interrupt_at(call))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_interrupt_leaves_an_existing_layout_as_it_was(model: Path, out: Path, call: int) -> None:
    seal(model, out)
    for path in ("config.json", "empty", "weights/a.bin"):
        damaged(model / path, lambda data: data.append(1))
    before = tree(out)
    with pytest.raises(KeyboardInterrupt):
        seal(model, out, 2, progress=interrupt_at(call))
    assert tree(out) == before
    seal(model, out, 2)


def test_a_disk_that_refuses_to_write_leaves_nothing(model: Path, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES + 5, hard))
    try:
        with pytest.raises(SealError) as caught:
            seal(model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.problem, caught.value.code) == (SealProblem.IO, errno.EFBIG)
    assert not out.exists()


def test_what_a_killed_seal_left_is_no_model_and_the_next_seal_removes_it(model: Path, out: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from agent.artifact.seal import seal_model
seal_model(Path({str(model)!r}), Path({str(out)!r}), bytes(32), {URI!r}, "llama", 1,
           lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > 2 else None)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    assert any(path.name.startswith(".sealing-") for path in (out / "blobs" / "sha256").iterdir())
    digest = seal(model, out)
    assert len(open_model(out, digest)[1]) == 3
    assert not any(path.name.startswith(".") for path in out.rglob("*"))
