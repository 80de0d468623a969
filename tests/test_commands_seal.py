"""`keyturn seal` as people run it."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from agent.artifact import manifest as m
from agent.artifact.stream import SEGMENT_BYTES, key_commitment
from agent.cli import main
from agent.commands.seal import read_key_file, size_text
from agent.errors import ConfigError, SealProblem
from tests.script_server import Reply, ScriptServer
from tests.test_artifact_push import Stored

URI = "kbs:///default/model/llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(os.urandom(100_000))
    return folder


def command(model: Path, out: Path, *more: str, version: int = 1, name: str = "llama") -> list[str]:
    return ["seal", str(model), "--to", str(out), "--key-uri", URI, "--name", name, "--version", str(version), *more]


def error_of(captured: str) -> dict[str, object]:
    record = json.loads(captured)
    assert isinstance(record, dict)
    return record


def test_a_new_key_lies_beside_the_layout_and_is_its_owners_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path / "out" / "layout")) == 0
    key_file = tmp_path / "out" / "llama-v1.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert len(key_file.read_bytes()) == 32
    assert capsys.readouterr().err == ""


def test_the_key_opens_the_model_it_was_made_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(model, tmp_path / "layout", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["key_uri"] == URI
    assert result["layout"] == str(tmp_path / "layout")
    blobs = tmp_path / "layout" / "blobs" / "sha256"
    manifest = m.parse_manifest(
        (blobs / result["manifest_digest"].removeprefix("sha256:")).read_bytes(), result["manifest_digest"]
    )
    config = m.parse_config((blobs / manifest.config_digest.removeprefix("sha256:")).read_bytes(), manifest)
    assert config.key_commitment == key_commitment(Path(result["key_file"]).read_bytes(), URI)


def test_the_output_names_the_broker_step_and_the_guest_configuration(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path / "layout", version=7)) == 0
    text = capsys.readouterr().out
    assert f"install -D -m 0600 {tmp_path / 'llama-v7.key'} STORE/default/model/llama" in text
    configuration = tomllib.loads(text[text.index("[broker]") :])
    (entry,) = m.parse_index((tmp_path / "layout" / "index.json").read_bytes())
    assert configuration == {
        "broker": {"key_uri": URI},
        "artifact": {"source": str(tmp_path / "layout"), "manifest_digest": entry.digest, "min_version": 7},
    }


def test_a_given_key_is_used_and_no_other_is_made(model: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "k"
    key_file.write_bytes(bytes(32))
    key_file.chmod(0o600)
    assert main(command(model, tmp_path / "layout", "--key-file", str(key_file))) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "layout", "model"]


def test_an_existing_key_is_never_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama-v1.key").write_bytes(b"precious")
    assert main(command(model, tmp_path / "layout")) == 19
    assert (tmp_path / "llama-v1.key").read_bytes() == b"precious"
    assert not (tmp_path / "layout").exists()
    assert error_of(capsys.readouterr().err)["class"] == "SealError"


def test_the_key_goes_with_the_model_when_sealing_fails(model: Path, tmp_path: Path) -> None:
    os.mkfifo(model / "fifo")
    assert main(command(model, tmp_path / "layout")) == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_given_key_stays_when_sealing_fails(model: Path, tmp_path: Path) -> None:
    os.mkfifo(model / "fifo")
    key_file = tmp_path / "k"
    key_file.write_bytes(bytes(32))
    assert main(command(model, tmp_path / "layout", "--key-file", str(key_file))) == 19
    assert key_file.exists()


@pytest.mark.parametrize("where", ["model/k", "layout/k"])
def test_a_key_inside_what_is_sealed_or_uploaded_is_refused(
    model: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path / "layout")) == 0
    (tmp_path / where).write_bytes(bytes(32))
    assert main(command(model, tmp_path / "layout", "--key-file", str(tmp_path / where), version=2)) == 19
    assert error_of(capsys.readouterr().err)["fields"] == {"problem": SealProblem.INSIDE.value, "where": None, "code": 0}


def test_a_layout_that_was_there_before_a_push_is_not_removed_with_ours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(model, tmp_path / "llama-v2.layout")) == 0
    capsys.readouterr()
    with ScriptServer(Stored()) as server:
        to = ["seal", str(model), "--to", f"oci+http://{server.host}/a", "--key-uri", URI, "--name", "llama", "--version", "2"]
        assert main(to) == 19
        assert {request.method for request in server.seen} == {"HEAD"}
    assert error_of(capsys.readouterr().err)["fields"] == {"problem": SealProblem.SEALED_BEFORE.value, "where": None, "code": 0}
    assert (tmp_path / "llama-v2.layout" / "index.json").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_more_files_than_a_registry_takes_are_told_before_anything_is_sealed_or_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    folder = tmp_path / "model" / ("f" * 250)
    folder.mkdir(parents=True)
    for i in range(6_000):
        (folder / f"{i:0250}").touch()
    monkeypatch.chdir(tmp_path)
    with ScriptServer(lambda _: Reply(404)) as server:
        to = f"oci+http://{server.host}/a"
        status = main(["seal", "model", "--to", to, "--key-uri", URI, "--name", "llama", "--version", "1", *more])
    assert status == 19
    told = error_of(capsys.readouterr().err)
    assert told["class"] == "ManifestTooLargeError"
    assert "seal --to DIR" in str(told["next_step"])
    assert {request.method for request in server.seen} == {"HEAD"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("name", ["../evil", "a/b", ""])
def test_a_bad_name_never_becomes_a_file_name(model: Path, tmp_path: Path, name: str) -> None:
    assert main(command(model, tmp_path / "x" / "layout", name=name)) == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), bytes(32).hex().encode()])
def test_a_key_file_that_is_not_32_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(ConfigError):
        read_key_file(tmp_path / "k")


def test_a_missing_key_file_is_not_made(model: Path, tmp_path: Path) -> None:
    assert main(command(model, tmp_path / "layout", "--key-file", str(tmp_path / "absent"))) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_no_option_can_fix_salt_or_nonce(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["seal", "--help"])
    text = capsys.readouterr().out.lower()
    assert not any(word in text for word in ("salt", "nonce", "seed", "deterministic", "reproducible"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_takes_back_layout_and_key(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    # A FIFO that nobody reads would not do: the seal must be in the middle of a file. 1 GiB of holes takes long enough.
    with (model / "big").open("wb") as stream:
        stream.truncate(1 << 30)
    arguments = command(model, tmp_path / "layout")
    code = f"import sys; from agent.cli import main; sys.exit(main({arguments!r}))"
    reader, writer = pty.openpty()  # a terminal gets progress, and progress tells that sealing has begun
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=writer, stdout=writer)
    os.close(writer)
    seen = b""
    while b"1 %" not in seen:
        seen += os.read(reader, 4096)
    process.send_signal(number)
    drain = threading.Thread(target=_drain, args=(reader,))
    drain.start()
    assert process.wait(60) == 130
    drain.join()
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def _drain(reader: int) -> None:
    try:
        while os.read(reader, 4096):
            pass
    except OSError:  # the other end is gone
        pass


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * SEGMENT_BYTES // 2, "1.5 MiB"), (1 << 50, "1024.0 TiB")],
)
def test_sizes_are_told_in_binary_units(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_dry_run_says_what_would_be_new_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_bytes(b"{}")
    out = tmp_path / "out" / "layout"
    assert main(command(model, out, "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {
        "files": 2,
        "unchanged": [],
        "new_blobs": 2,
        "plaintext_bytes": 100_002,
        "new_blob_bytes": 100_002 + 2 * 56,
    }
    assert not out.parent.exists()
    assert main(command(model, out)) == 0
    (model / "config.json").write_bytes(b"{ }")
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    assert main(command(model, out, "--dry-run", "--key-file", str(tmp_path / "out" / "llama-v1.key"), version=2)) == 0
    assert "1 new blobs, 59 B; 1 files are unchanged" in capsys.readouterr().out
    assert sorted(out.rglob("*")) == before
    assert main(command(model, out, "--dry-run", "--key-file", str(tmp_path / "out" / "llama-v1.key"))) != 0
