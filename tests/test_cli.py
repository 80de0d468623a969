import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent import __version__
from agent.cli import INTERFACES, VERBS, main
from agent.config import EXAMPLE
from agent.errors import EXIT_STATUS


def test_every_verb_has_its_module_and_a_help_that_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, summary in VERBS.items():
        assert importlib.util.find_spec(f"agent.commands.{verb}")
        with pytest.raises(SystemExit) as caught:
            main([verb, "--help"])
        assert caught.value.code == 0
        assert summary.lower() in " ".join(capsys.readouterr().out.lower().split())


def test_without_a_verb_the_help_shows_and_the_status_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert all(str(status) in shown for status in EXIT_STATUS.values()), "the exit table is in --help"


def test_versions_of_every_interface(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"keyturn {__version__}\n"
    assert main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__, "interfaces": INTERFACES}


@pytest.mark.parametrize("argv", [["fly"], ["run"], ["config"], ["run", "--confi", "x"]])
def test_wrong_words_are_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_an_error_becomes_its_exit_status_and_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text(EXAMPLE.replace("port = 8080", "prot = 8080"))
    assert main(["config", "check", str(tmp_path / "bad.toml")]) == 10
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert json.loads(line)["fields"] == {"problem": "key is not part of the schema", "key": "server.prot", "line": None}


def test_the_supervisors_verb_pays_for_no_library() -> None:
    """The supervisor stays small: what `keyturn run` imports before it forks is the standard library and our own."""
    program = "import sys, agent.cli, agent.commands.run; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    imported, interpreter = set(done.stdout.split()), {"__main__", "_distutils_hack", "sitecustomize"}
    assert imported - set(sys.stdlib_module_names) - interpreter == {"agent"}
    assert imported & {"asyncio", "ssl", "http", "logging", "tomllib", "email", "multiprocessing", "_hashlib"} == set()
