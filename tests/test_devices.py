"""What holds of a guest's devices on emulation and on silicon alike: every interface of SNP, TDX, RTMR, NVML and NSCQ.

    .venv/bin/python -m pytest --device=hardware tests/test_devices.py     # as root, in a guest

Then the fixtures give what this guest's kernel has, and a test skips with the reason where it has none; the signatures must be
the vendors'. The guest's runtime register is extended once; the GPUs' ready state is left alone. Every other test of the
project skips: it turns a knob that silicon has not.
Unproven: nobody has run it in a confidential guest yet.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509

from agent.broker.anchors import load_simulation_roots
from agent.errors import NoAttesterError
from agent.evidence import Attester, GpuNonce, GpuSystem, ReportData, SwitchSystem, Tee
from agent.evidence.ccel import RuntimeEvent, pack_runtime_event, parse_event_log, parse_runtime_event, replay
from agent.evidence.cpu import Distance
from agent.evidence.gpu import NvmlGpuSystem, is_held
from agent.evidence.nscq import NscqSwitches
from agent.evidence.rtmr import REGISTER, Rtmr
from agent.evidence.runtime import RuntimeMeasurement
from agent.evidence.sev_guest import SevGuest
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import quote_report_data
from agent.evidence.tdx_guest import TdxGuest
from agent.evidence.tsm import REPORT_ROOT, TsmSnp, TsmTdx
from agent.sim.configfs import machine_firmware
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import CCEL_FILE
from agent.verify.nvidia import verify_gpu, verify_switch
from agent.verify.ppcie import verify_ppcie
from agent.verify.snp import verify_snp
from agent.verify.tdx import verify_tdx
from tests import nscq_emulation, nvml_emulation
from tests.fake_configfs import machine_configfs
from tests.fake_fuse_node import fuse_node
from tests.fake_nodes import FakeQgs, FakeSevGuest, FakeTdxGuest
from tests.fake_rtmr import fake_rtmr
from tests.gpus import gpu_machine, simulated_root

pytestmark = pytest.mark.hardware

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(reversed(DATA)))
NONCE = GpuNonce(bytes(range(32)))
EVENT = RuntimeEvent("keyturn", "device-test", "{}")

_Device = TypeVar("_Device")


def opened(make: Callable[[], _Device]) -> _Device:
    """The real one, or a skip where this guest has none. What is there and refuses is a failure."""
    try:
        return make()
    except NoAttesterError as error:
        pytest.skip(error.what())


def holds_none_of_ours(report_root: Path) -> bool:
    return not any(name.startswith("keyturn-") for name in os.listdir(report_root))


# --- the devices ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["configfs-tsm", "sev-guest"])
def snp(request: pytest.FixtureRequest, hardware: bool, tmp_path: Path) -> Iterator[Attester]:
    match request.param, hardware:
        case "configfs-tsm", True:
            yield opened(TsmSnp)
            assert holds_none_of_ours(REPORT_ROOT)
        case "configfs-tsm", False:
            with machine_configfs(tmp_path, request.getfixturevalue("machine"), Tee.SNP) as root:
                yield TsmSnp(root, distance=Distance(pause=lambda _: True))  # a simulated host throttles nobody
                assert holds_none_of_ours(root)
        case _, True:
            yield opened(SevGuest)
        case _, False:
            firmware = machine_firmware(request.getfixturevalue("machine").directory, Tee.SNP)
            driver = FakeSevGuest(lambda data, vmpl: firmware(data, vmpl)[0], certificates=firmware(DATA, 0)[1])
            (tmp_path / "node").touch()
            with fuse_node(tmp_path / "node", driver) as node:
                yield SevGuest(node, tmp_path / "vmpl", wait=lambda _: True)


@pytest.fixture(params=["configfs-tsm", "tdx-guest"])
def tdx(request: pytest.FixtureRequest, hardware: bool, tmp_path: Path) -> Iterator[Attester]:
    match request.param, hardware:
        case "configfs-tsm", True:
            yield opened(TsmTdx)
            assert holds_none_of_ours(REPORT_ROOT)
        case "configfs-tsm", False:
            machine: SimulatedMachine = request.getfixturevalue("machine")
            with machine_configfs(tmp_path, machine, Tee.TDX) as root:
                yield machine.tsm(Tee.TDX, str(root))
                assert holds_none_of_ours(root)
        case _, True:
            yield opened(TdxGuest)
        case _, False:
            (tmp_path / "node").touch()
            (tmp_path / "conf").write_text("port = 4050\n")
            with fuse_node(tmp_path / "node", FakeTdxGuest()) as node, closing(FakeQgs()) as qgs:
                yield TdxGuest(node, tmp_path / "conf", connect=qgs.connect)


@pytest.fixture
def register(hardware: bool, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Rtmr, RuntimeMeasurement]]:
    """The runtime register and the log beside it."""
    if hardware:
        runtime = RuntimeMeasurement.of(Tee.TDX)
        if unsupported := runtime.unsupported():
            pytest.skip(f"nothing is measured in this guest: {unsupported.value}")
        yield Rtmr(), runtime
        return
    machine: SimulatedMachine = request.getfixturevalue("machine")
    machine.runtime(Tee.TDX)  # leaves the firmware's table
    (tmp_path / REGISTER).touch()
    with fake_rtmr(tmp_path / REGISTER) as (path, _):
        rtmr = Rtmr(path.parent)
        yield (
            rtmr,
            RuntimeMeasurement(
                rtmr, firmware_log=machine.directory / CCEL_FILE, folder=tmp_path / "run", foreign_log=tmp_path / "none"
            ),
        )


@pytest.fixture
def emulated_gpus(request: pytest.FixtureRequest, hardware: bool, tmp_path: Path) -> Iterator[SimulatedMachine | None]:
    """Behind a library that stands for the driver's; None on hardware."""
    if hardware:
        yield None
    else:
        with nvml_emulation.answered(gpu_machine(tmp_path / "machine"), request.getfixturevalue("nvml_library")) as machine:
            yield machine


@pytest.fixture
def gpu_system(emulated_gpus: SimulatedMachine | None) -> GpuSystem:
    if emulated_gpus:
        return emulated_gpus.gpu_system()
    if not is_held():
        pytest.skip("no other process holds a GPU open: start nvidia-persistenced first")
    return opened(NvmlGpuSystem)


@pytest.fixture
def emulated_switches(request: pytest.FixtureRequest, hardware: bool, tmp_path: Path) -> Iterator[SimulatedMachine | None]:
    if hardware:
        yield None
    else:
        machine = gpu_machine(tmp_path / "machine", 8, switches=4)
        with nscq_emulation.answered(machine, request.getfixturevalue("nscq_library")) as reached:
            yield reached


@pytest.fixture
def switch_system(emulated_switches: SimulatedMachine | None) -> SwitchSystem:
    return emulated_switches.switch_system() if emulated_switches else opened(NscqSwitches)


@pytest.fixture
def roots(request: pytest.FixtureRequest, hardware: bool) -> tuple[x509.Certificate, ...]:
    """What is trusted beside the vendors' own."""
    return () if hardware else load_simulation_roots(request.getfixturevalue("silicon") / "roots")


# --- CPU TEE ----------------------------------------------------------------------------------------------------------


def test_an_snp_report_carries_the_data_it_was_asked_for_each_time(snp: Attester) -> None:
    for data in (DATA, OTHER):
        evidence = snp.collect(data)
        assert (evidence.tee, parse_report(evidence.report).report_data) == (Tee.SNP, data)


def test_host_data_is_that_of_every_report(snp: Attester) -> None:
    assert parse_report(snp.collect(DATA).report).host_data == snp.launch_digest()


def test_an_snp_report_verifies_with_the_hosts_certificates(
    snp: Attester, roots: tuple[x509.Certificate, ...], hardware: bool
) -> None:
    evidence = snp.collect(DATA)
    if not evidence.cert_chain:
        pytest.skip("this host supplies no certificates")
    assert verify_snp(evidence, roots, [], datetime.now(UTC)).simulated is not hardware


def test_a_tdx_quote_carries_the_data_it_was_asked_for_each_time(tdx: Attester) -> None:
    for data in (DATA, OTHER):
        evidence = tdx.collect(data)
        assert (evidence.tee, quote_report_data(evidence.report)) == (Tee.TDX, data)


def test_a_tdx_quote_verifies_and_says_the_modules_mrconfigid(
    tdx: Attester, roots: tuple[x509.Certificate, ...], hardware: bool
) -> None:
    if not hardware and tdx.interface == "tdx-guest":
        pytest.skip("the emulated quote service signs nothing")
    claims = verify_tdx(tdx.collect(DATA), roots, datetime.now(UTC))
    assert claims.simulated is not hardware
    assert claims.td.mr_config_id == tdx.launch_digest()


# --- runtime register -------------------------------------------------------------------------------------------------


def test_the_runtime_register_is_extended_by_an_event_which_its_log_explains(
    register: tuple[Rtmr, RuntimeMeasurement], hardware: bool
) -> None:
    rtmr, runtime = register
    before = rtmr.read()
    assert isinstance(before, bytes)
    measured = runtime.measure(EVENT)
    digest = pack_runtime_event(EVENT, 3).digests[0][1]
    assert measured.rtmr_3 == rtmr.read() == hashlib.sha384(before + digest).digest()
    if not (data := runtime.event_log()):
        assert hardware
        pytest.skip("the firmware left no log, so that the register alone was looked at")
    log = parse_event_log(data)
    assert parse_runtime_event(log.events[-1]) == EVENT
    assert replay(log)[3] == measured.rtmr_3


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_inventory_names_gpus_that_can_attest_and_the_log_no_fault(gpu_system: GpuSystem) -> None:
    inventory = gpu_system.inspect()
    assert inventory.persistent
    assert {gpu.arch for gpu in inventory.gpus} <= {"HOPPER", "BLACKWELL"}
    assert len({gpu.uuid for gpu in inventory.gpus}) == len(inventory.gpus) >= 1
    gpu_system.check_faults()


def test_every_gpu_answers_with_a_report_over_our_nonce_that_verifies(
    gpu_system: GpuSystem, emulated_gpus: SimulatedMachine | None
) -> None:
    evidence = gpu_system.collect(NONCE)
    assert [gpu.uuid for gpu in evidence] == [gpu.uuid for gpu in gpu_system.inspect().gpus]
    trusted = [simulated_root(emulated_gpus)] if emulated_gpus else []
    for gpu in evidence:
        assert verify_gpu(gpu, NONCE, trusted, datetime.now(UTC)).simulated is (emulated_gpus is not None)


# --- NVSwitches -------------------------------------------------------------------------------------------------------


def test_every_switch_can_attest_and_is_locked(switch_system: SwitchSystem) -> None:
    switches = switch_system.inspect()
    assert len({switch.uuid for switch in switches}) == len(switches) >= 1
    assert {(switch.arch, switch.mode) for switch in switches} == {("LS10", 3)}


def test_every_switch_answers_with_a_report_over_our_nonce_that_verifies(
    switch_system: SwitchSystem, emulated_switches: SimulatedMachine | None
) -> None:
    evidence = switch_system.collect(NONCE)
    assert [switch.uuid for switch in evidence] == [switch.uuid for switch in switch_system.inspect()]
    trusted = [simulated_root(emulated_switches)] if emulated_switches else []
    for switch in evidence:
        assert verify_switch(switch, NONCE, trusted, datetime.now(UTC)).simulated is (emulated_switches is not None)


def test_gpus_and_switches_are_one_set(switch_system: SwitchSystem, emulated_switches: SimulatedMachine | None) -> None:
    if emulated_switches is None and not is_held():
        pytest.skip("no other process holds a GPU open: start nvidia-persistenced first")
    gpus = emulated_switches.gpu_system() if emulated_switches else opened(NvmlGpuSystem)
    trusted = [simulated_root(emulated_switches)] if emulated_switches else []
    claims = verify_ppcie(gpus.collect(NONCE), switch_system.collect(NONCE), NONCE, trusted, datetime.now(UTC))
    assert (len(claims.gpus), len(claims.switches)) == (8, 4)
