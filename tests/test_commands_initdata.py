"""`keyturn initdata`: the numbers that a guest is launched with, and a document that a guest would take."""

import base64
import gzip
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.cli import main
from agent.config import EXAMPLE
from agent.config_source import from_initdata_file
from agent.guest.initdata import MAX_DOCUMENT_BYTES, pack_document


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "keyturn.toml"
    file.write_text(EXAMPLE)
    return file


def document(tmp_path: Path, algorithm: str = "sha384", **entries: str) -> Path:
    file = tmp_path / "initdata.toml"
    file.write_bytes(pack_document({"keyturn.toml": EXAMPLE, **entries}, algorithm))
    return file


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["initdata", *map(str, words), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert isinstance(record, dict)
    return record


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_the_fields_are_the_digest_cut_or_padded(algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = document(tmp_path, algorithm)
    digest = hashlib.new(algorithm, file.read_bytes()).digest()
    got = printed(capsys, file)
    assert (got["algorithm"], got["digest"], got["entries"]) == (algorithm, digest.hex(), ["keyturn.toml"])
    assert bytes.fromhex(got["host_data"]) == base64.b64decode(got["host_data_base64"]) == digest[:32]
    assert bytes.fromhex(got["mr_config_id"]) == base64.b64decode(got["mr_config_id_base64"]) == digest[:48].ljust(48, b"\0")


def test_the_annotation_is_base64_of_gzip_of_the_document_and_always_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = document(tmp_path)
    got = printed(capsys, file)["annotation"]
    assert got["name"] == "io.katacontainers.config.hypervisor.cc_init_data"
    assert gzip.decompress(base64.b64decode(got["value"], validate=True)) == file.read_bytes()
    assert printed(capsys, file)["annotation"] == got


def test_a_document_made_from_a_configuration_is_one_that_a_guest_takes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aa, out = tmp_path / "aa", tmp_path / "out.toml"
    aa.write_text("[token_configs]\n")
    got = printed(capsys, "--config", config, "--add", f"aa.toml={aa}", "--algorithm", "sha256", "--out", out)
    found = from_initdata_file(str(out))
    assert (found.data, found.digest.hex()) == (EXAMPLE.encode(), got["digest"])
    assert got["entries"] == ["keyturn.toml", "aa.toml"]
    assert printed(capsys, out) == got
    again = tmp_path / "again.toml"
    printed(capsys, "--config", config, "--add", f"aa.toml={aa}", "--algorithm", "sha256", "--out", again)
    assert again.read_bytes() == out.read_bytes()


def test_the_usual_digest_is_sha384(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--config", config, "--out", tmp_path / "out")["algorithm"] == "sha384"


def test_people_see_both_spellings_of_both_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = document(tmp_path)
    got = printed(capsys, file)
    assert main(["initdata", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for name in ("digest", "host_data", "host_data_base64", "mr_config_id", "mr_config_id_base64"):
        assert got[name] in shown.out
    assert got["annotation"]["value"] in shown.out.splitlines()[-1]


def test_standard_input_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = document(tmp_path)
    expected = printed(capsys, file)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert printed(capsys, "-") == expected


def test_a_document_about_other_things_is_hinted_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other"
    file.write_bytes(pack_document({"aa.toml": "", "\x1b[2J": ""}, "sha256"))
    assert main(["initdata", str(file)]) == 0
    shown = capsys.readouterr()
    assert "no entry keyturn.toml" in shown.err
    assert "\x1b" not in shown.out


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["initdata", *map(str, words)]) == 10
    shown = capsys.readouterr()
    assert shown.out == ""
    error = json.loads(shown.err)
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "version is missing"),
        (b"\xff", "not UTF-8"),
        (b"[", "not valid TOML"),
        (b'version = "0.2.0"', "version is missing or not"),
        (b'version = "0.1.0"\nalgorithm = "sm3"\n[data]\n', "algorithm is missing or none"),
        (b'version = "0.1.0"\nalgorithm = "sha256"\n', "[data] is missing"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "larger than 4 MiB"),
    ],
)
def test_what_no_guest_reads_is_an_error_and_prints_nothing(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad"
    file.write_bytes(content)
    error = failed(capsys, file)
    assert (error["class"], error["fields"]["source"]) == ("InitdataError", "initdata-file")
    assert said in error["text"]


def test_a_document_too_large_for_the_disk_is_an_error_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = b"".join(hashlib.sha512(bytes([n & 255, n >> 8])).digest() for n in range(20_000)).hex()
    error = failed(capsys, document(tmp_path, noise=noise))
    assert error["fields"]["source"] == "initdata-file"


def test_a_configuration_that_no_guest_accepts_is_an_error_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config.write_text(EXAMPLE + "\n[nonsense]\n")
    assert failed(capsys, "--config", config, "--out", out)["class"] == "ConfigError"
    config.write_bytes(b"\xff")
    assert failed(capsys, "--config", config, "--out", out)["fields"]["key"] == "keyturn.toml"
    config.write_bytes(b"#" * ((1 << 20) + 1))
    assert "1 MiB" in failed(capsys, "--config", config, "--out", out)["text"]
    config.write_text("secret = 'hunter2")
    assert "hunter2" not in json.dumps(failed(capsys, "--config", config, "--out", out))
    assert not out.exists()


def test_files_that_are_missing_are_errors(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, out = tmp_path / "missing", tmp_path / "out"
    words = [(missing,), ("--config", missing, "--out", out), ("--config", config, "--out", out, "--add", f"a={missing}")]
    assert {failed(capsys, *each)["class"] for each in words} == {"ConfigError"}
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["FILE", "--config", "CONFIG", "--out", "OUT"], "not allowed with"),
        (["--config", "CONFIG"], "needs --out"),
        (["FILE", "--out", "OUT"], "belong to --config"),
        (["FILE", "--add", "a=b"], "belong to --config"),
        (["FILE", "--algorithm", "sha256"], "belong to --config"),
        (["--config", "CONFIG", "--out", "OUT", "--algorithm", "sm3"], "invalid choice"),
        (["--config", "CONFIG", "--out", "OUT", "--add", "aa.toml"], "NAME=FILE"),
        (["--config", "CONFIG", "--out", "OUT", "--add", "=CONFIG"], "NAME=FILE"),
        (["--config", "CONFIG", "--out", "OUT", "--add", "a b=CONFIG"], "NAME=FILE"),
        (["--config", "CONFIG", "--out", "OUT", "--add", "keyturn.toml=CONFIG"], "NAME=FILE"),
        (["--config", "CONFIG", "--out", "OUT", "--add", "a=CONFIG", "--add", "a=CONFIG"], "NAME=FILE"),
        (["--config", "-", "--out", "OUT", "--add", "a=-"], "standard input"),
        (["--config", "CONFIG", "--out", "CONFIG"], "File exists"),
        (["--config", "CONFIG", "--out", "OUT/NONE/FILE"], "No such file"),
    ],
)
def test_a_wrong_use_is_a_usage_error(
    words: list[str], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"FILE": document(tmp_path), "CONFIG": config, "OUT": tmp_path / "out"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    with pytest.raises(SystemExit) as caught:
        main(["initdata", *words])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in " ".join(shown.err.split())
    assert config.read_text() == EXAMPLE
