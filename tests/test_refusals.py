"""The audit of security checks: what its markers mean, and that it says so when a check survives without its test failing."""

import ast
from pathlib import Path

import pytest

from tests.refusals.__main__ import main
from tests.refusals.marks import COMPLETE, MarkerError, removals, removals_in

ROOT = Path(__file__).resolve().parents[1]

SOURCE = '''\
"""A module."""


def check(size: int, name: str, kind: object) -> bool:
    # refusal: test_size
    # Why it is so.
    if size < 0 or not (size < 9 and name):
        raise ValueError
    # refusal: test_other.py::test_kind test_size
    elif kind is None:
        raise ValueError
    # refusal: test_size
    _require(name != "é" and size != 7, "name")
    _require(
        size != 8, "size"
    )
    print(name)
    # refusal: test_size
    return name != "x"
'''

# Each time the line, the text that goes, and the line as it reads without.
REMOVED = [
    (7, "size < 0", "    if False or not (size < 9 and name):"),
    (7, "size < 9", "    if size < 0 or not (True and name):"),
    (7, "name", "    if size < 0 or not (size < 9 and True):"),
    (10, "kind is None", "    elif False:"),
    (13, 'name != "é"', '    _require(True and size != 7, "name")'),
    (13, "size != 7", '    _require(name != "é" and True, "name")'),
    (14, '_require(\n        size != 8, "size"\n    )', "    pass"),
    (19, 'name != "x"', "    return True"),
]


def test_every_part_of_a_marked_check_is_removed_alone() -> None:
    found = removals_in("agent/example/module.py", SOURCE.encode())
    assert [(r.line, r.removed, r.source.decode().splitlines()[r.line - 1]) for r in found] == REMOVED
    for removal in found:
        ast.parse(removal.source)
        assert len(removal.source) < len(SOURCE.encode()) + 8
    assert found[0].tests == ("tests/test_example_module.py::test_size",)
    assert found[3].tests == ("tests/test_other.py::test_kind", "tests/test_example_module.py::test_size")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""\n# refusal: test_x\n"""\n', 2),
        ("# refusal: test_x\n\nx = 1\n", 1),
        ("# refusal: test_x\n", 1),
        ("# refusal: test_x\nfor x in ():\n    pass\n", 1),
        ("def x() -> None:\n    # refusal: test_x\n\n    raise ValueError\n", 2),
        ("x = 1  # refusal: test_x\n", 1),
        ("# refusal:\nx = 1\n", 1),
        ("# refusal: a  b\nx = 1\n", 1),
        ("x = (\n    # refusal: test_x\n    1,\n)\n", 2),
    ],
)
def test_a_marker_that_marks_nothing_is_an_error(source: str, line: int) -> None:
    with pytest.raises(MarkerError, match=f"^agent/example.py:{line}:"):
        removals_in("agent/example.py", source.encode())


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def x(y: int) -> None:\n    if y:\n        raise ValueError\n", 3),
        ("def x(y: int) -> None:\n    _require(y > 0)\n", 2),
        (
            "def x(y: int) -> None:\n    # refusal: t\n    if y:\n        raise OSError\n    else:\n        raise KeyError\n",
            6,
        ),
        ("def x(y: int) -> None:\n    # refusal: test_x\n    _require(y > 0)\n    print()\n    _require(y > 1)\n", 5),
    ],
)
def test_no_refusal_of_a_complete_module_is_without_a_marker(source: str, line: int) -> None:
    assert removals_in("agent/other.py", source.encode()) is not None
    with pytest.raises(MarkerError, match=f"^{COMPLETE[0]}:{line}:"):
        removals_in(COMPLETE[0], source.encode())


def test_translations_and_bugs_need_no_marker() -> None:
    source = """\
def x(y: str) -> None:
    if not y:
        raise RuntimeError("our bug")
    try:
        int(y)
    except ValueError:
        raise KeyError from None
"""
    assert removals_in(COMPLETE[0], source.encode()) == []


def test_every_marker_of_the_agent_is_in_order_and_names_tests_that_are_there() -> None:
    found = removals(ROOT)
    assert len(found) >= 200
    assert {removal.path for removal in found} >= set(COMPLETE)


TESTS = """\
import pytest

from agent.gate import check


def test_it_refuses() -> None:
    for size in ({sizes}):
        with pytest.raises(ValueError):
            check(size)


@pytest.mark.skip(reason="not here")
def test_elsewhere() -> None:
    raise AssertionError


def test_in_a_process_of_its_own() -> None:
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-I", "-m", "agent.gate"], check=False).returncode == 1
"""

GATE = """\
def check(size: int) -> None:
    # refusal: {test}
    if size < 0 or size > 9:
        raise ValueError("size")


if __name__ == "__main__":
    check(-1)
    check(10)
"""


def project(folder: Path, test: str, sizes: str = "-1, 10") -> Path:
    for name, text in {
        "agent/__init__.py": "",
        "agent/gate.py": GATE.format(test=test),
        "tests/__init__.py": "",
        "tests/test_gate.py": TESTS.format(sizes=sizes),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_checks_whose_test_turns_red_are_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str) -> None:
    assert main(["-j", jobs], project(tmp_path, "test_it_refuses")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["red        agent/gate.py:3: size < 0", "red        agent/gate.py:3: size > 9"]
    assert printed[2].startswith("2 checks, 0 skipped, 0 failed")


def test_a_check_that_goes_unnoticed_fails_and_is_named_with_its_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([], project(tmp_path, "test_it_refuses", "-1, -2")) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("SURVIVES: agent/gate.py:3: size > 9\n    tests/test_gate.py::test_it_refuses\n")


def test_a_test_that_is_red_anyway_proves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], project(tmp_path, "test_it_refuses", "-1, 5, 10")) == 1
    assert capsys.readouterr().out.count("RED BEFORE: ") == 2


def test_a_test_that_is_skipped_here_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], project(tmp_path, "test_elsewhere")) == 0
    assert "2 checks, 2 skipped, 0 failed" in capsys.readouterr().out


def test_a_process_that_a_test_starts_is_without_the_check_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # With one of the two gone the other still refuses.
    assert main([], project(tmp_path, "test_in_a_process_of_its_own")) == 1
    gate = tmp_path / "agent" / "gate.py"
    gate.write_text(gate.read_text().replace(" or size > 9", ""))
    capsys.readouterr()
    assert main([], tmp_path) == 0
    assert capsys.readouterr().out.startswith("red        agent/gate.py:3: size < 0\n")


def test_a_test_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], project(tmp_path, "test_it_refuse")) == 1
    assert capsys.readouterr().out == "agent/gate.py:3: there is no tests/test_gate.py::test_it_refuse\n"


def test_words_choose_and_a_choice_of_nothing_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = project(tmp_path, "test_it_refuses")
    assert main(["size > 9", "--list"], root) == 0
    assert capsys.readouterr().out == "agent/gate.py:3: size > 9\n    tests/test_gate.py::test_it_refuses\n1 checks\n"
    assert main(["nothing"], root) == 1
