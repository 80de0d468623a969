"""The kill matrix, and as many random kills as `--kills` asks for."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.children import IS_ROOT
from tests.faults import kills


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        options = metafunc.config
        seed = options.getoption("kill_seed")
        rows = [*kills.matrix(), *kills.in_mid_load(20, seed), *kills.at_random(options.getoption("kills"), seed)]
        metafunc.parametrize("kill", rows, ids=[f"{number} {row}" for number, row in enumerate(rows)])


@pytest.mark.skipif(not IS_ROOT, reason="only root has a tmpfs of its own")
def test_kill(kill: kills.Kill, tmp_path: Path, silicon: Path, record_property: Callable[[str, object], None]) -> None:
    finding = kills.run(kill, tmp_path, silicon)
    record_property("fault", asdict(finding))
    assert finding.residue == []
    assert finding.leaks == []
