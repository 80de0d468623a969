"""Every row of the fault table, and that the table is whole."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from agent.errors import all_errors
from tests.children import IS_ROOT
from tests.faults import (
    artifact,
    broker,
    coco,
    configuration,
    devices,
    evil_relay,
    memory,
    rcar,
    server,
    signals,
    tdx,
    transport,
)
from tests.faults.table import Fault, run

TABLE = [
    (module.__name__.rpartition(".")[2], row)
    for module in (configuration, devices, tdx, coco, transport, broker, rcar, evil_relay, artifact, memory, server, signals)
    for row in module.ROWS
]


@pytest.mark.parametrize(("group", "row"), TABLE, ids=lambda part: part.name if isinstance(part, Fault) else None)
def test_fault(group: str, row: Fault, tmp_path: Path, silicon: Path, record_property: Callable[[str, object], None]) -> None:
    if row.needs_root and not IS_ROOT:
        pytest.skip("only root can arrange this")
    finding = run(row, group, tmp_path, silicon)
    record_property("fault", asdict(finding))
    assert finding.residue == []
    assert finding.leaks == []


def test_names_are_unique() -> None:
    names = [row.name for _, row in TABLE]
    assert len(set(names)) == len(names)


def test_every_error_class_is_reached_by_a_row() -> None:
    ours = {name for name, cls in all_errors().items() if cls.__module__ == "agent.errors"}
    assert {row.error.__name__ for _, row in TABLE} == ours


def test_the_table_is_as_long_as_it_says() -> None:
    assert len(TABLE) >= 300
