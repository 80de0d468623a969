"""`keyturn demo` as a command line; what it does is in test_demo_run.py."""

import subprocess
import sys

import pytest

KEYTURN = [sys.executable, "-I", "-m", "agent"]


def test_help_names_every_option() -> None:
    shown = subprocess.run([*KEYTURN, "demo", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    options = ["--once", "--json", "--flip-byte", "--tee", "--via", "--attester", "--broker", "--gpus", "--ppcie"]
    options += ["--source", "--credentials"]
    assert all(option in shown.stdout for option in options)


def test_an_unknown_option_is_a_usage_error() -> None:
    assert subprocess.run([*KEYTURN, "demo", "--skip-gate"], stderr=subprocess.DEVNULL).returncode == 2


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--gpus", "9"], ["--gpus", "x"], ["--ppcie"], ["--gpus", "4", "--ppcie"]])
def test_a_set_is_eight_gpus_and_a_machine_has_one_to_eight(words: list[str]) -> None:
    assert subprocess.run([*KEYTURN, "demo", *words], stderr=subprocess.DEVNULL).returncode == 2


def test_an_installation_without_the_demos_packages_names_the_missing_one() -> None:
    code = """
import sys
sys.path = [path for path in sys.path if "-packages" not in path]
from agent.commands import demo
try:
    demo.add_parser(None, "")
except ModuleNotFoundError as error:
    print(error.name)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout == "gguf\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--broker", "relay.example"],
        ["--broker", "ftp://kbs"],
        ["--broker", "http://kbs/path"],
        ["--tee", "sample"],
        ["--broker", "http://kbs", "--tee", "snp"],
        ["--broker", "relay", "--tee", "sample"],
        ["--broker", "rcar", "--tee", "sample", "--attester", "coco"],
        ["--broker", "rcar", "--tee", "sample", "--via", "configfs"],
        ["--broker", "http://127.0.0.1:1"],
        ["--credentials", "kbs"],
        ["--credentials", "kbs", "--source", "https"],
    ],
)
def test_what_goes_together_with_no_kbs_is_a_usage_error(words: list[str]) -> None:
    ended = subprocess.run([*KEYTURN, "demo", "--once", "--json", *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "error:" in ended.stderr
