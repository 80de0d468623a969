"""The simulated configfs-tsm against the kernel: by the table of steps, which a kernel's record and the boot test hold too."""

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import DeviceUnavailableError
from agent.evidence import ReportData, Tee
from agent.evidence.cpu import Patience, certificate_chain
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import quote_report_data
from agent.evidence.tdx_guest import mr_config_id
from agent.sim.configfs import machine_firmware
from agent.sim.machine import MACHINE_FILE, SimulatedMachine
from agent.sim.tdx import SimulatedNode
from tests.boot.tsm_steps import ATTRIBUTES, RECORDED, Bench, Provider, outcomes
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs, machine_configfs
from tests.shared import shared_data

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


# --- before a machine -------------------------------------------------------------------------------------------------


def test_a_machines_report_has_the_level_asked_for_and_comes_with_its_certificates(machine: SimulatedMachine) -> None:
    report, table = machine_firmware(machine.directory, Tee.SNP)(DATA, 2)
    assert (parse_report(report).report_data, parse_report(report).vmpl) == (DATA, 2)
    assert certificate_chain(table) == machine.attester().collect(DATA).cert_chain


def test_a_machines_quote_comes_alone(machine: SimulatedMachine) -> None:
    quote, table = machine_firmware(machine.directory, Tee.TDX)(DATA, 0)
    assert (quote_report_data(quote), table) == (DATA, b"")


def test_a_machines_fault_is_its_errno_and_no_machine_is_eio(machine: SimulatedMachine, tmp_path: Path) -> None:
    machine.errno = errno.ENOTTY
    machine.save()
    for directory, code in ((machine.directory, errno.ENOTTY), (tmp_path / "none", errno.EIO)):
        with pytest.raises(OSError) as caught:
            machine_firmware(directory, Tee.SNP)(DATA, 0)
        assert caught.value.errno == code


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_the_agents_own_code_reads_the_machine_through_a_mount_that_ends_with_its_process(
    machine: SimulatedMachine, tmp_path: Path, tee: Tee
) -> None:
    machine.host_data = bytes(range(32))
    machine.save()
    with machine_configfs(tmp_path, machine, tee) as root:
        attester = machine.tsm(tee, str(root))
        evidence = attester.collect(DATA)
        digest = attester.launch_digest()
        assert os.listdir(root) == []
    assert (attester.interface, evidence.tee) == ("configfs-tsm", tee)
    assert len(evidence.cert_chain) == (3 if tee is Tee.SNP else 0)
    assert digest == machine.host_data.ljust(32 if tee is Tee.SNP else 48, b"\0")
    assert not root.exists()


def test_the_machines_node_is_asked_for_tdreports_alone_and_fails_as_it_does(machine: SimulatedMachine) -> None:
    node = SimulatedNode(machine)
    with pytest.raises(OSError) as caught:
        node.ioctl(0, 0, bytearray(64 + 1024))
    assert caught.value.errno == errno.ENOTTY
    machine.errno = errno.EBUSY
    with pytest.raises(DeviceUnavailableError):
        mr_config_id(machine.directory / MACHINE_FILE, node.ioctl, Patience((), 0))


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "hidden"),
    [
        (Faults(), ("manifestblob", "service_")),
        (Faults(provider="tdx_guest"), ("manifestblob", "service_", "auxblob", "privlevel")),
    ],
)
def test_without_an_svsm_and_in_a_td_entries_show_less(fake: FakeConfigfs, faults: Faults, hidden: tuple[str, ...]) -> None:
    fake.set(faults)
    bench = Bench(fake.root, lambda: None, lambda: None)
    bench.entry.mkdir()
    assert bench.attributes() == [attribute for attribute in ATTRIBUTES if not attribute[0].startswith(hidden)]
    fake.set(NO_PROVIDER)
    assert len(bench.attributes()) == len(ATTRIBUTES) - sum(name.startswith(hidden) for name, _, _ in ATTRIBUTES)
    bench.entry.rmdir()
