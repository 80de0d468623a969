"""A simulated machine is a directory that several processes share."""

import dataclasses
import os
from pathlib import Path

import pytest
from cryptography import x509

from agent.errors import NoAttesterError, SimulationRefusal, SimulationRefusedError
from agent.evidence import ReportData, Tee
from agent.evidence.snp_abi import TcbVersion
from agent.sim.machine import REAL_TEE_PATHS, SimulatedMachine, create_silicon, refuse_on_real_tee


def test_a_loaded_machine_is_the_saved_one(machine: SimulatedMachine) -> None:
    machine.measurement = b"\1" * 48
    machine.host_data = b"\2" * 32
    machine.policy |= 1 << 19
    machine.vmpl = 1
    machine.guest_svn = 4
    machine.tcb = TcbVersion(bootloader=1, tee=2, snp=3, microcode=4)
    machine.wrong_report_data = True
    machine.flip_signature_bit = True
    machine.errno = 25
    machine.gpu.ready = 1
    machine.gpu.fail_calls["nvmlSystemGetConfComputeState"] = 999
    machine.gpu.ready_falls_back_after = 2
    machine.save()
    assert SimulatedMachine.load(machine.directory) == machine


def test_a_machine_is_created_with_what_is_fixed_at_launch(silicon: Path, tmp_path: Path) -> None:
    fields = {"measurement": b"\1" * 48, "host_data": b"\2" * 32, "policy": 0xB0000, "tcb": TcbVersion(1, 0, 2, 3)}
    SimulatedMachine.create(tmp_path / "machine", gpus=2, silicon=silicon, **fields)  # type: ignore[arg-type]
    machine = SimulatedMachine.load(tmp_path / "machine")
    assert {name: getattr(machine, name) for name in fields} == fields
    assert machine.gpu.count == 2


def test_every_machine_is_another_chip(silicon: Path, tmp_path: Path) -> None:
    one, two = (SimulatedMachine.create(tmp_path / name, silicon=silicon) for name in ("one", "two"))
    assert one.chip_id != two.chip_id
    assert (
        one.attester().collect(ReportData(bytes(64))).cert_chain[0]
        != two.attester().collect(ReportData(bytes(64))).cert_chain[0]
    )


def test_a_change_made_by_another_process_is_never_overwritten(machine: SimulatedMachine) -> None:
    other = SimulatedMachine.load(machine.directory)
    other.gpu.ready = 1
    other.save()
    machine.vmpl = 1
    with pytest.raises(RuntimeError):
        machine.save()
    assert SimulatedMachine.load(machine.directory).gpu.ready == 1
    other.vmpl = 1
    other.save()


def test_a_machine_with_its_own_silicon_can_be_moved(tmp_path: Path) -> None:
    SimulatedMachine.create(tmp_path / "before", gpus=1)
    machine = SimulatedMachine.load((tmp_path / "before").rename(tmp_path / "after"))
    assert machine.silicon == tmp_path / "after" / "silicon"
    assert machine.attester().collect(ReportData(bytes(64))).tee is Tee.SNP


def test_the_roots_folder_holds_the_two_roots_and_nothing_else(machine: SimulatedMachine) -> None:
    assert {path.name for path in machine.roots_dir.iterdir()} == {"ark.pem", "sgx-root.pem", "nvidia-root.pem"}
    for path in machine.roots_dir.iterdir():
        root = x509.load_pem_x509_certificate(path.read_bytes())
        assert root.subject == root.issuer
        assert "SIMULATED" in root.subject.rfc4514_string()


def test_private_keys_are_their_owners_alone_and_the_rest_is_readable_by_all(machine: SimulatedMachine) -> None:
    for folder in (machine.directory, machine.silicon, machine.roots_dir):
        for path in folder.iterdir():
            if path.is_file():
                assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644), path.name
                assert (b"PRIVATE KEY" in path.read_bytes()) == (path.suffix == ".key"), path.name


def test_the_state_stays_readable_whatever_the_umask(machine: SimulatedMachine) -> None:
    before = os.umask(0o077)
    try:
        machine.save()
    finally:
        os.umask(before)
    assert (machine.directory / "machine.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in machine.directory.glob(".*")] == []


@pytest.mark.parametrize("device", REAL_TEE_PATHS)
def test_simulation_is_refused_where_a_real_tee_exists(machine: SimulatedMachine, tmp_path: Path, device: str) -> None:
    root = tmp_path / "root"
    (root / device).parent.mkdir(parents=True)
    refuse_on_real_tee(root)
    (root / device).touch()
    for use in (
        lambda: SimulatedMachine.load(machine.directory, root),
        lambda: SimulatedMachine.create(tmp_path / "new", silicon=machine.silicon, root=root),
        lambda: refuse_on_real_tee(root),
    ):
        with pytest.raises(SimulationRefusedError) as refused:
            use()
        assert refused.value.reason is SimulationRefusal.REAL_TEE_PRESENT
    assert not (tmp_path / "new").exists()


def test_the_real_tee_paths_are_the_kernels() -> None:
    assert set(REAL_TEE_PATHS) == {"dev/sev-guest", "dev/tdx_guest", "sys/kernel/config/tsm/report"}


def test_a_folder_without_a_machine_is_no_attester(tmp_path: Path) -> None:
    with pytest.raises(NoAttesterError):
        SimulatedMachine.load(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"silicon": 1}', "\0"])
def test_a_damaged_machine_is_no_attester(machine: SimulatedMachine, text: str) -> None:
    (machine.directory / "machine.json").write_text(text)
    with pytest.raises(NoAttesterError):
        SimulatedMachine.load(machine.directory)


def test_an_unknown_field_is_refused(machine: SimulatedMachine) -> None:
    path = machine.directory / "machine.json"
    path.write_text(path.read_text().replace('"vmpl"', '"vmlp"'))
    with pytest.raises(NoAttesterError):
        SimulatedMachine.load(machine.directory)


def test_silicon_without_gpus_has_no_nvidia_root(tmp_path: Path) -> None:
    create_silicon(tmp_path / "silicon", gpus=0)
    assert {path.name for path in (tmp_path / "silicon" / "roots").iterdir()} == {"ark.pem", "sgx-root.pem"}


def test_the_gpu_count_is_the_one_asked_for(silicon: Path, tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=3, silicon=silicon)
    assert len(machine.gpu_system().inspect().gpus) == 3
    assert dataclasses.asdict(machine.gpu)["count"] == 3
