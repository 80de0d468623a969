import json
import re
from pathlib import Path

import pytest

from agent.cli import main
from agent.config import EXAMPLE, parse
from agent.modes import Mode, Unheld, unheld

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
GIVEN = (Unheld.PLACE, Unheld.SEAL, Unheld.KILL)
OF_LOAD = (*GIVEN, Unheld.WIPE, Unheld.SERVER, Unheld.LEASE)


def config(base: str, old: str = "", new: str = "") -> str:
    return (DEPLOY / "base" / base / "keyturn.toml").read_text().replace(old, new)


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (Mode.GUEST, EXAMPLE, ()),
        (Mode.GUEST, config("entrypoint", '"tmpfs"', '"auto"'), ()),
        (Mode.ENTRYPOINT, config("entrypoint"), ()),
        (Mode.ENTRYPOINT, config("entrypoint-gpu"), (Unheld.GATE,)),
        (Mode.ENTRYPOINT, config("entrypoint", '"tmpfs"', '"memfd"'), (Unheld.SCRATCH,)),
        (
            Mode.ENTRYPOINT,
            config("entrypoint", '"tmpfs"', '"directory"\ndirectory = "/run/model"'),
            (*GIVEN, Unheld.SCRATCH),
        ),
        (Mode.LOAD, config("load"), OF_LOAD),
        (Mode.LOAD, config("load-gpu"), (Unheld.GATE, *OF_LOAD)),
    ],
)
def test_what_is_not_held_follows_from_mode_and_configuration(mode: Mode, text: str, expected: tuple[Unheld, ...]) -> None:
    assert unheld(mode, parse(text.encode()).config) == expected


def test_the_guide_says_what_the_program_says() -> None:
    table = re.findall(r"^\| `([a-z]+)` \| [^|]+ \| (.+) \|$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert table == [(promise.label, promise.text) for promise in Unheld]


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    load = str(DEPLOY / "base" / "load" / "keyturn.toml")
    assert main(["config", "check", load, "--mode", "load"]) == 0
    said = capsys.readouterr().out.splitlines()[2:]
    assert said == [f"load does not hold {promise.label}: {promise.text}" for promise in OF_LOAD]
    assert main(["config", "check", load, "--mode", "load", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["mode"], answer["not_held"]) == ("load", [promise.label for promise in OF_LOAD])
    assert main(["config", "check", str(DEPLOY / "base" / "entrypoint" / "keyturn.toml"), "--mode", "entrypoint"]) == 0
    assert capsys.readouterr().out.endswith("entrypoint: every promise is held\n")


@pytest.mark.parametrize(("base", "mode"), [("load", "entrypoint"), ("load", "guest"), ("entrypoint", "load")])
def test_a_configuration_for_another_mode_is_an_error(base: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(DEPLOY / "base" / base / "keyturn.toml"), "--mode", mode]) == 10
    assert json.loads(capsys.readouterr().err)["class"] == "ConfigError"
