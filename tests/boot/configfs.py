"""The kernel's own configfs-tsm in a guest, step by step as `tests/boot/tsm_steps.py` says; no agent takes part."""

import time
from contextlib import ExitStack
from pathlib import Path

from agent.evidence.tsm import REPORT_ROOT
from agent.sim.machine import SimulatedMachine
from tests.boot.firmware import Answer, Firmware, Request
from tests.boot.guest import Guest, Image
from tests.boot.tsm_steps import FURTHER, RECORDED, Provider

BOOT_S = 80
LOAD = "/opt/hand/insmod /opt/driver/fake_tsm.ko svsm=1"
UNLOAD = "/opt/hand/rmmod fake_tsm"


def configfs_tsm(folder: Path, silicon: Path, image: Image) -> None:
    """Done by the guest's Python; the driver asks the steps' provider, which is on this side."""
    provider = Provider()

    def chip(request: Request) -> Answer:
        told = provider.answer(request.report_data)
        time.sleep(told.seconds)
        return Answer(request.sequence, told.code, b"" if told.code else told.report)

    with ExitStack() as undo:
        machine = SimulatedMachine.create(folder / "machine", gpus=0, silicon=silicon)
        firmware = undo.enter_context(Firmware(folder / "tsm", machine))
        firmware.chip = chip
        guest = undo.enter_context(Guest(image, folder, folder / "tsm", None, {}, parameters="rdinit=/opt/hand/bare"))
        guest.wait_for("hand: ready", BOOT_S)
        guest.hand(UNLOAD)
        said = guest.hand(f"/usr/bin/python3.11 /opt/hand/tsm_steps.py {REPORT_ROOT} '{LOAD}' '{UNLOAD}'").splitlines()
    print("  " + "\n  ".join(said))
    total = len(RECORDED) + len(FURTHER)
    assert said[-1:] == [f"{total} of {total} steps as expected"], "the kernel does not do what the table says"
