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


def test_check_says_what_a_boot_of_it_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The start modes and what each of them gives up: in words here, as words of a list in receipts."""
    text = EXAMPLE.partition("[server]")[0].replace('destination = "auto"', 'destination = "directory"\ndirectory = "/run/m"')
    coco = text.replace('attester = "snp"', 'attester = "coco"').replace('ready_state = "own"', 'ready_state = "preset"')
    held: dict[str, list[str]] = {
        EXAMPLE: [],
        EXAMPLE.replace("port = 8080", 'port = 8080\noutput = "inherit"'): ["server-output"],
        EXAMPLE.replace("port = 8080", "port = 8080\nunsafe_run_as_root = true"): ["server-root"],
        text: ["unsupervised", "modes-only", "outlives-agent"],
        coco: ["unsupervised", "modes-only", "outlives-agent", "ready-preset", "pod-evidence"],
    }
    for number, (content, expected) in enumerate(held.items()):
        path = tmp_path / f"{number}.toml"
        path.write_text(content)
        assert main(["config", "check", "--json", str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["not_held"] == expected
        assert main(["config", "check", str(path)]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not held: ")]
        assert [line.split(": ")[1] for line in lines] == expected


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
