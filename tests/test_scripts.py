"""The project's own plumbing: locks, scripts and metadata hold together."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import agent

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PARTS = "bench_*.py"  # of bench.py, and no scripts of their own
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.match(PARTS))


def pins(lock: str) -> dict[str, Version]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    return {canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def requirements(*extras: str) -> list[Requirement]:
    """The project's requirements with these extras, and with the extras that those name."""
    listed = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for extra in extras:
        for text in PROJECT["project"]["optional-dependencies"][extra]:
            requirement = Requirement(text)
            listed += requirements(*requirement.extras) if requirement.name == "keyturn" else [requirement]
    return listed


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_is_pins_and_hashes_and_nothing_else(lock: Path) -> None:
    entry = r"[a-z0-9.-]+==[A-Za-z0-9.!+-]+(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(f"(?:{entry})+", lock.read_text())


@pytest.mark.parametrize(("lock", "extras"), [("guest", ()), ("demo", ("demo",)), ("dev", ("dev",))])
def test_every_requirement_is_in_its_lock_in_a_version_it_allows(lock: str, extras: tuple[str, ...]) -> None:
    locked = pins(lock)
    for requirement in requirements(*extras):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_locks_agree_with_each_other() -> None:
    assert pins("guest").items() <= pins("demo").items() <= pins("dev").items()


def test_the_guest_carries_nothing_of_demo_broker_or_tests() -> None:
    extras = {canonicalize_name(item.name) for item in requirements("dev")} - {
        canonicalize_name(item.name) for item in requirements()
    }
    assert not extras & pins("guest").keys()


def test_the_build_backend_is_in_the_locks_so_that_an_install_asks_no_index() -> None:
    (backend,) = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    assert [str(backend)] == [str(Requirement(text)) for text in PROJECT["dependency-groups"]["build"]]
    for lock in ("demo", "dev"):
        assert backend.specifier.contains(pins(lock)[canonicalize_name(backend.name)])


def test_the_version_has_one_source_and_the_changelog_knows_it() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"## {agent.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_a_shell_script_parses_and_can_be_executed(script: Path) -> None:
    shell = script.read_text().split("\n", 1)[0]
    if script.suffix != ".sh":
        assert script.stat().st_mode & 0o111
    if "python" not in shell:
        subprocess.run(["bash" if "bash" in shell else "sh", "-n", str(script)], check=True)


def test_guests_that_come_at_the_same_time_all_get_their_own_keys() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "load.py"), "--guests", "12", "--json"]
    done = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    assert (done["guests"], done["lost"], done["wrong"]) == (12, 0, 0)
    assert done["rate_per_s"] > 0 and done["p99_ms"] >= done["p50_ms"] > 0


def test_no_machine_or_registry_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    found = [
        name
        for name in tracked
        if name and (ROOT / name).is_file() and name != "tests/test_scripts.py"
        for text in [(ROOT / name).read_bytes()]
        if re.search(rb"pypi\.org|pythonhosted|--index-url|--find-links|[\"' (=]/(work|root)/", text)
    ]
    assert not found
