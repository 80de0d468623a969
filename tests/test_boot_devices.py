"""The agent with attester `snp`, unchanged and at the kernel's own paths, before a fake configfs-tsm in a mount namespace."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.evidence import ReportData
from agent.evidence.snp_abi import CertificateKind
from agent.sim.machine import SimulatedMachine
from tests.certificates import table
from tests.children import IS_ROOT
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs
from tests.world import Agent, World

# In the fake's mount namespace: its folder where the kernel's is, below a /sys/kernel of our own.
IN_ITS_NAMESPACE = """
set -e
mount -t tmpfs tmpfs /sys/kernel
mkdir -p /sys/kernel/config/tsm/report
mount --bind "$1" /sys/kernel/config/tsm/report
shift
exec "$@"
"""
ONE_REQUEST = [
    "mkdir", "provider", "generation", "privlevel_floor", "inblob 64", "outblob", "firmware", "auxblob", "generation", "rmdir",
]  # fmt: skip


class Guest:
    def __init__(self, world: World, fake: FakeConfigfs, folder: Path) -> None:
        self.world = world
        self.fake = fake
        vcek, ask, ark = world.machine.attester().collect(ReportData(bytes(64))).cert_chain
        entries = (CertificateKind.VCEK, vcek), (CertificateKind.ASK, ask), (CertificateKind.ARK, ark)
        self.faults = Faults(auxblob=table(*entries))
        self._folder = folder

    def start(self, delay_s: float = 0.0) -> Agent:
        self.fake.set(Faults(auxblob=self.faults.auxblob, delay_s=delay_s))
        pid = self.fake.root.parts[2]
        enter = ("nsenter", f"--mount=/proc/{pid}/ns/mnt", "sh", "-c", IN_ITS_NAMESPACE, "sh", str(self._folder))
        return self.world.start(wrapper=enter)


@pytest.fixture
def guest(tmp_path: Path, silicon: Path) -> Iterator[Guest]:
    if not IS_ROOT:
        pytest.skip("the agent is to enter another mount namespace, which needs root")
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0)
        world.tee = {"attester": "snp", "wait_s": 0}
        (tmp_path / "nothing").mkdir()

        def firmware(data: bytes, privlevel: int) -> bytes:
            """As the guest was launched last; the folder has no TEE device in it."""
            machine = SimulatedMachine.load(world.machine.directory, tmp_path / "nothing")
            machine.vmpl = privlevel
            return machine.attester().collect(ReportData(data)).report

        folder = tmp_path / "report"
        folder.mkdir()
        yield Guest(world, undo.enter_context(fake_configfs(folder, firmware)), folder)


def test_a_boot_on_configfs_tsm_asks_for_one_report_of_its_own_one_for_the_broker_and_one_for_the_receipt(guest: Guest) -> None:
    agent = guest.start()
    opened = agent.wait_for("attester_opened")
    assert (opened["tee"], opened["interface"]) == ("snp", "configfs-tsm")
    agent.wait_for("server_ready")
    assert agent.stop().status == 0
    probe = ["mkdir", "provider", "rmdir"]
    assert guest.fake.calls() == probe + 3 * ONE_REQUEST


def test_sigterm_in_mid_request_ends_the_boot_after_the_request_and_cuts_nothing_short(guest: Guest) -> None:
    agent = guest.start(delay_s=3.0)
    agent.wait_for("attester_opened")
    time.sleep(0.5)  # the first report is under way
    began = time.monotonic()
    outcome = agent.stop()
    assert (outcome.failure["class"], outcome.status) == ("BootInterruptedError", 21)
    stopping = next(event for event in outcome.events if event["event"] == "stopping")
    assert stopping["waiting_for"] == "worker"
    assert 2.0 < time.monotonic() - began < 30
    assert guest.fake.calls()[-len(ONE_REQUEST) :] == ONE_REQUEST
