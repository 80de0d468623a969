import hashlib
import json
from pathlib import Path

import pytest

from agent.cli import main
from agent.config import EXAMPLE, EXPLAIN
from agent.config_source import MAX_CONFIG_BYTES


def test_the_example_checks_and_the_digest_is_the_guests_host_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "example"]) == 0
    example = capsys.readouterr().out
    assert example == EXAMPLE
    (tmp_path / "keyturn.toml").write_text(example)
    digest = hashlib.sha256(example.encode()).hexdigest()
    assert main(["config", "check", str(tmp_path / "keyturn.toml")]) == 0
    assert digest in capsys.readouterr().out
    assert main(["config", "check", "--json", str(tmp_path / "keyturn.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["host_data"] == digest


def test_for_a_td_the_digest_is_as_long_as_mrconfigid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = EXAMPLE.replace('attester = "snp"', 'attester = "tdx"')
    (tmp_path / "keyturn.toml").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest() + "00" * 16
    assert main(["config", "check", str(tmp_path / "keyturn.toml")]) == 0
    assert f"MRCONFIGID (SHA-256 of the file, zero-padded): {digest}" in capsys.readouterr().out
    assert main(["config", "check", "--json", str(tmp_path / "keyturn.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["mr_config_id"] == digest


def test_explain_one_key_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "gpu.ready_state"]) == 0
    assert capsys.readouterr().out == EXPLAIN["gpu.ready_state"] + "\n"
    assert main(["config", "explain"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in EXPLAIN)
    assert main(["config", "explain", "no.such.key"]) == 10


def test_a_file_that_is_not_there_or_too_large_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(tmp_path / "none.toml")]) == 10
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    assert main(["config", "check", str(tmp_path / "large.toml")]) == 10
    problems = [json.loads(line)["fields"]["problem"] for line in capsys.readouterr().err.splitlines()]
    assert problems == ["file not found or not readable", "file is larger than 1 MiB"]
