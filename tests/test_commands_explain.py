import io
import json
import sys
import textwrap
from pathlib import Path

import pytest

from agent.cli import main
from agent.closed import Ident
from agent.commands.diagnosis import MAX_INPUT_BYTES
from agent.errors import EXIT_STATUS, DenialReason, KeyReleaseDeniedError, all_errors
from agent.events import ServerReady, message_to_record
from agent.explanations import EXPLANATIONS
from tests import test_handshake_ear as ear

ALL = all_errors()


@pytest.mark.parametrize("word", ["KeyReleaseDeniedError", "keyreleasedenied", "KEYRELEASEDENIEDERROR", " KeyReleaseDenied "])
def test_a_class_is_found_by_its_name_however_it_is_written(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", word]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("KeyReleaseDeniedError\nexit status 16, step verdict\n")
    assert "authority: decides about keys" in shown
    flat = " ".join(shown.split())
    text = EXPLANATIONS[KeyReleaseDeniedError]
    assert all(part in flat for part in (text.happened, *text.check, text.withheld))


@pytest.mark.parametrize("status", sorted(EXIT_STATUS.values()))
def test_an_exit_status_shows_every_class_that_ends_with_it(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {name for name, cls in ALL.items() if EXIT_STATUS[cls.owner, cls.step] == status}
    assert expected
    assert main(["explain", "--json", str(status)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["class"] for record in records} == expected
    assert {record["exit_status"] for record in records} == {status}
    assert main(["explain", str(status)]) == 0
    assert expected <= set(capsys.readouterr().out.splitlines())


def test_list_names_every_class_once_by_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(row[1] for row in rows) == sorted(ALL)
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    assert main(["explain", "--list", "--json"]) == 0
    records = {record["class"]: record for record in map(json.loads, capsys.readouterr().out.splitlines())}
    assert records.keys() == ALL.keys()
    for name, cls in ALL.items():
        text = EXPLANATIONS[cls]
        assert records[name] == {
            "class": name,
            "owner": cls.owner.value,
            "step": cls.step.value,
            "exit_status": EXIT_STATUS[cls.owner, cls.step],
            "next_step": cls.next_step,
            "happened": text.happened,
            "check": list(text.check),
            "withheld": text.withheld,
        }


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_page_fits_a_terminal_and_breaks_no_command_that_fits_a_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", name]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "\N{NO-BREAK SPACE}" not in shown.out
    for line in shown.out.splitlines():
        assert len(line) <= 80, textwrap.shorten(line, 100)
        assert line == line.rstrip()
        assert line.count("`") % 2 == 0, line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keyrelesedenied"], "did you mean KeyReleaseDeniedError"),
        (["Token_Error"], "did you mean TokenError"),
        (["artifact"], "ArtifactUnavailableError"),
        (["qqqqqqq"], "`keyturn explain --list`"),
        (["ServerError"], "ServerExitedError"),
        (["AgentError"], "`keyturn explain --list`"),
        ([""], "`keyturn explain --list`"),
        (["99"], "there are 10, 11"),
        (["0"], "served, and stopped on request"),
        (["2"], "usage"),
        ([], "CODE"),
        (["16", "--list"], "not allowed with"),
    ],
)
def test_what_names_no_error_is_a_usage_error_that_helps(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", *words])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in " ".join(shown.err.split())


def test_the_help_with_the_exit_table_leads_here(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "`keyturn explain EXIT_STATUS`" in capsys.readouterr().out


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["explain", *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_a_token_is_explained_as_an_argument_from_a_file_and_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = ear.submod("snp", {"measurement": "ab" * 48}, ear.BAD, "contraindicated")
    token = ear.signed(ear.payload(cpu0=cpu))
    said = explained(capsys, token)
    flat = " ".join(said.split())
    assert flat.startswith("attestation token of Trustee (EAR), not verified")
    assert "cpu0 executables 33 (warning): unrecognised executables" in flat
    assert "who must act: authority: decides about keys" in flat
    assert "next step: register the launched image's measurements" in flat
    file = tmp_path / "token"
    file.write_text(token + "\n")
    assert explained(capsys, str(file)) == said
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(token.encode())))
    assert explained(capsys, "-") == said
    assert json.loads(explained(capsys, token, "--json"))["findings"][0]["claim"] == "hardware"


def test_an_event_line_leads_to_the_long_form(capsys: pytest.CaptureFixture[str]) -> None:
    error = KeyReleaseDeniedError(DenialReason.CLAIM, Ident("snp.measurement"), None, Ident("p-7"))
    said = explained(capsys, json.dumps(message_to_record(error)))
    assert "more: `keyturn explain KeyReleaseDeniedError`" in said
    assert all(len(line) <= 80 for line in said.splitlines())


def test_what_says_of_no_failure_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing that this says" in explained(capsys, json.dumps(message_to_record(ServerReady(1, 1))))
    affirmed = ear.signed(ear.payload(cpu0=ear.submod("snp", {})))
    assert "the resource policy asks for something else" in " ".join(explained(capsys, affirmed).split())


def test_a_name_of_an_error_is_never_taken_for_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "16").write_text("no token")
    monkeypatch.chdir(tmp_path)
    assert "KeyReleaseDeniedError" in explained(capsys, "16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.b.c"], "its format does not hold"),
        (['{"event":"x"}'], "no event"),
        (["{"], "no token, no event"),
    ],
)
def test_what_is_neither_is_a_usage_error(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_missing_or_too_large_is_a_configuration_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(tmp_path / "missing")]) == 10
    large = tmp_path / "large"
    large.write_bytes(b"x" * (MAX_INPUT_BYTES + 1))
    assert main(["explain", str(large)]) == 10
    assert [json.loads(line)["fields"]["key"] for line in capsys.readouterr().err.splitlines()] == ["FILE", "FILE"]
