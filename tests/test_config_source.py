import io
import sys
from pathlib import Path

import pytest

from agent.config_source import MAX_CONFIG_BYTES, read_bounded
from agent.errors import ConfigError, ConfigProblem


def test_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyturn.toml").write_bytes(b"x" * MAX_CONFIG_BYTES)
    assert len(read_bounded(str(tmp_path / "keyturn.toml"))) == MAX_CONFIG_BYTES
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"schema")))
    assert read_bounded("-") == b"schema"


@pytest.mark.parametrize(("name", "problem"), [("none", ConfigProblem.NOT_FOUND), (".", ConfigProblem.NOT_FOUND)])
def test_what_cannot_be_read_is_not_there(tmp_path: Path, name: str, problem: ConfigProblem) -> None:
    with pytest.raises(ConfigError) as caught:
        read_bounded(str(tmp_path / name))
    assert caught.value.problem is problem


def test_an_endless_file_is_read_no_further_than_the_bound() -> None:
    with pytest.raises(ConfigError) as caught:
        read_bounded("/dev/zero")
    assert caught.value.problem is ConfigProblem.TOO_LARGE
