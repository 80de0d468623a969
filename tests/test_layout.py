"""`tests/` mirrors `agent/`: a module without its test file is noticed, and so is a test file without its module."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Modules without a test file of their own, and where they are tested instead.
ELSEWHERE: dict[str, str] = {}
# Test files that are about more than one module.
WHOLE = {"test_layout", "test_scripts"}


def modules() -> set[str]:
    """Dotted names below `agent`, without packages: their `__init__` is tested by those who use its types."""
    found = (path.relative_to(ROOT / "agent").with_suffix("") for path in (ROOT / "agent").rglob("*.py"))
    return {".".join(path.parts) for path in found if path.name != "__init__" and "pb" not in path.parts}


def expected_test(module: str) -> str:
    return "test_" + module.replace(".", "_")


def test_every_module_has_its_test_file_or_says_where_it_is_tested() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    missing = {module for module in modules() if expected_test(module) not in tests and module not in ELSEWHERE}
    assert not missing
    assert set(ELSEWHERE.values()) <= tests


def test_every_test_file_has_its_module() -> None:
    expected = {expected_test(module) for module in modules() - ELSEWHERE.keys()}
    assert {path.stem for path in (ROOT / "tests").glob("test_*.py")} - expected == WHOLE


def test_no_exception_outlives_its_module() -> None:
    assert ELSEWHERE.keys() <= modules()
