"""The simulated configfs-tsm against the kernel: by the table of steps, which a kernel's record and the boot test hold too."""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import AttestationKeyLostError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import quote_report_data
from agent.sim.configfs import machine_firmware
from agent.sim.machine import SimulatedMachine
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs
from tests.shared import shared_data
from tests.tsm_steps import ATTRIBUTES, RECORDED, Bench, Provider, outcomes

DATA = ReportData(bytes(range(64)))
NO_PROVIDER = Faults(provider=None)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeConfigfs]:
    """Before the provider of the steps."""
    provider = Provider()

    def firmware(inblob: bytes, privlevel: int) -> bytes:
        told = provider.answer(inblob)
        time.sleep(told.seconds)
        if told.code:
            raise OSError(told.code, "")
        return told.report

    (tmp_path / "report").mkdir()
    with fake_configfs(tmp_path / "report", firmware) as fake:
        fake.set(NO_PROVIDER)
        yield fake
        assert os.listdir(fake.root) == []


def test_every_step_ends_as_in_the_kernel(fake: FakeConfigfs) -> None:
    bench = Bench(fake.root, lambda: fake.set(Faults(svsm=True)), lambda: fake.set(NO_PROVIDER))
    for outcome in outcomes(bench, fuse=True):
        assert outcome.as_expected, outcome


def test_the_steps_are_those_of_a_recorded_kernel_and_so_is_what_they_end_with() -> None:
    lines = shared_data("configfs-tsm-linux6.12-behaviour.txt").read_text().splitlines()[1:]
    for step, line in zip(RECORDED, lines, strict=True):
        failed = isinstance(step.expected, str)
        outcome = re.escape(f"errno {step.expected}" if failed else str(step.expected))
        text = outcome if step.recorded is None else step.recorded
        assert re.fullmatch(rf"{re.escape(step.name)} *{text}(  \(\d.\d\ds\))?", line), (step.name, line)


@pytest.mark.parametrize(
    ("faults", "hidden"),
    [
        (Faults(), ("manifestblob", "service_")),
        (Faults(provider="tdx_guest"), ("manifestblob", "service_", "auxblob", "privlevel")),
    ],
)
def test_without_an_svsm_and_in_a_td_entries_show_less(
    fake: FakeConfigfs, faults: Faults, hidden: tuple[str, ...]
) -> None:
    fake.set(faults)
    bench = Bench(fake.root, lambda: None, lambda: None)
    bench.entry.mkdir()
    assert bench.attributes() == [attribute for attribute in ATTRIBUTES if not attribute[0].startswith(hidden)]
    fake.set(NO_PROVIDER)
    assert len(bench.attributes()) == len(ATTRIBUTES) - sum(name.startswith(hidden) for name, _, _ in ATTRIBUTES)
    bench.entry.rmdir()
