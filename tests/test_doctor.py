"""What the checks ask of devices and kernel; what each check finds in a guest is `test_commands_doctor.py`."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.commands.run import open_gpus, open_tee
from agent.config import EXAMPLE, MeasuredConfig
from agent.config_source import FoundConfig
from agent.doctor import CHECKS
from agent.errors import (
    Absence,
    AgentError,
    DeviceError,
    EvidenceFormat,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    GuestUnfitError,
    MalformedEvidenceError,
    NoAttesterError,
    Unfit,
    VmRestartRequiredError,
)
from agent.evidence import Attester, Evidence, GpuSystem, ReportData, Tee
from agent.evidence.ccel import pack_event_log
from agent.evidence.gpu_watch import open_nvml
from agent.evidence.rtmr import REGISTER
from agent.examination import Finding, Guest, Skip, examine
from agent.fitness import Places
from agent.handshake import MAX_EVENT_LOG_BYTES
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_event_log
from tests.children import in_child
from tests.gpus import gpu_machine


class Counting(Attester):
    """The real one, and how often it was asked."""

    def __init__(self, real: Attester) -> None:
        self._real = real
        self.tee, self.interface = real.tee, real.interface
        self.asked = 0

    def collect(self, report_data: ReportData) -> Evidence:
        self.asked += 1
        return self._real.collect(report_data)

    def launch_digest(self) -> bytes:
        self.asked += 1
        return self._real.launch_digest()


def configured(machine: SimulatedMachine) -> FoundConfig:
    text = EXAMPLE.replace('"snp"', '"simulated-snp"') + f'[simulation]\nmachine = "{machine.directory}"\n'
    return FoundConfig(text.encode(), bytes(32), Ident("file"))


def test_the_cpu_is_asked_for_one_report(machine: SimulatedMachine) -> None:
    opened: list[Counting] = []

    def open_counting(cfg: MeasuredConfig) -> Attester:
        opened.append(Counting(open_tee(cfg)))
        return opened[-1]

    def asked() -> int:
        findings = list(examine(Guest(lambda: configured(machine), open_counting, open_gpus, offline=True), CHECKS))
        assert next(finding for finding in findings if finding.check == "host-data") == Finding("host-data")
        return sum(attester.asked for attester in opened)

    assert in_child(asked) == 1


# --- where the kernel has it ------------------------------------------------------------------------------------------


def finding(check: str, guest: Guest) -> Finding:
    """Of one check, after the configuration was read and, for simulated machines, the TEE opened."""
    wanted = ("configuration", "tee", check) if guest.measured is None else (check,)
    return list(examine(guest, {name: CHECKS[name] for name in dict.fromkeys(wanted)}))[-1]


def guest_with(text: str, **places: object) -> Guest:
    """A guest with this configuration, whose kernel has these places."""
    found = FoundConfig(text.encode(), bytes(32), Ident("file"))
    return Guest(lambda: found, open_tee, open_gpus, offline=True, places=replace(Places(), **places))  # type: ignore[arg-type]


def failed(finding: Finding) -> AgentError:
    assert finding.error is not None
    return finding.error


def test_the_kernel_is_held_against_the_tee_that_is_configured() -> None:
    error = failed(finding("kernel", guest_with(EXAMPLE.replace('"snp"', '"tdx"'), release=lambda: "6.1.99")))
    assert isinstance(error, GuestUnfitError)
    assert (error.problem, error.expected) == (Unfit.KERNEL, "6.2")
    assert finding("kernel", guest_with(EXAMPLE, release=lambda: "6.1.99")).seen["release"] == "6.1.99"


def test_a_simulated_machine_runs_on_any_kernel_and_has_no_gpu_driver(machine: SimulatedMachine) -> None:
    text = configured(machine).data.decode()
    assert finding("kernel", guest_with(text, release=lambda: "4.0.0")).error is None
    for check in ("gpu-driver", "gpu-parameters"):
        assert finding(check, guest_with(text)).skipped is Skip.SIMULATED


def test_the_gpu_driver_is_looked_at_where_gpus_are_configured(tmp_path: Path) -> None:
    error = failed(finding("gpu-driver", guest_with(EXAMPLE, gpu_driver=tmp_path / "none")))
    assert isinstance(error, GuestUnfitError)
    assert error.problem is Unfit.GPU_DRIVER_ABSENT
    without = EXAMPLE.replace("count = 1", "count = 0")
    assert without != EXAMPLE
    assert finding("gpu-driver", guest_with(without)).skipped is Skip.NO_GPU
    assert finding("gpu-parameters", guest_with(without)).skipped is Skip.NO_GPU


def test_keys_that_weaken_the_gpus_are_found_without_opening_any(tmp_path: Path) -> None:
    """On the kernel command line, though no driver is loaded that could have parameters."""
    files = (tmp_path / "cmdline", tmp_path / "params")
    files[0].write_text("console=ttyS0 nvidia.NVreg_RegistryDwords=RmConfidentialCompute=1\n")
    error = failed(finding("gpu-parameters", guest_with(EXAMPLE, gpu_parameters=files)))
    assert isinstance(error, GpuModeError)
    assert (error.mode, error.got) == (GpuMode.REGISTRY_KEYS, 1)
    files[0].write_text("console=ttyS0\n")
    assert finding("gpu-parameters", guest_with(EXAMPLE, gpu_parameters=files)) == Finding("gpu-parameters")


def test_gpus_that_no_other_process_holds_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a confidential GPU and is the last to close it loses it. Here is a library, and nobody who holds one."""

    def opened(_: MeasuredConfig) -> GpuSystem:
        raise AssertionError("the GPUs were opened")

    monkeypatch.setattr(open_nvml, "__defaults__", ((Path("libc.so.6"),),))  # any library that loads
    guest = guest_with(EXAMPLE)
    guest.open_gpus = opened
    assert finding("gpu", guest) == Finding("gpu", skipped=Skip.GPU_NOT_HELD)
    assert finding("gpu-inventory", guest) == Finding("gpu-inventory", skipped=Skip.GPU_NOT_OPEN)


def test_a_store_whose_credentials_come_with_a_verdict_is_not_asked() -> None:
    """Without them it would refuse, and that would say nothing."""
    text = EXAMPLE.replace("https://models.example.com/my-model", "oci://127.0.0.1:1/x")
    guest = guest_with(text.replace("manifest_digest =", 'credentials_uri = "kbs:///models/store/1"\nmanifest_digest ='))
    assert finding("store", guest) == Finding("store", skipped=Skip.NO_CREDENTIALS)
    assert finding("memory", guest) == Finding("memory", skipped=Skip.NO_MANIFEST)


def tdx_guest(machine: SimulatedMachine, tmp_path: Path) -> Guest:
    text = configured(machine).data.decode().replace("simulated-snp", "simulated-tdx")
    names = ("measurements", "event_log", "attest_conf")
    return guest_with(text, **{name: tmp_path / name for name in names})


def test_a_tdx_guest_tells_what_else_it_has(machine: SimulatedMachine, tmp_path: Path) -> None:
    at = tdx_guest(machine, tmp_path).places
    nothing = finding("tdx", tdx_guest(machine, tmp_path)).seen
    assert nothing == {"quote-service": "none-named", "event-log": "errno-2", "rtmr3": "absent"}
    log = make_event_log(machine)
    at.event_log.write_bytes(pack_event_log(log) + b"\xff" * 64)
    at.attest_conf.write_text("port = 4050\n")
    at.measurements.mkdir()
    (at.measurements / REGISTER).touch()
    everything = finding("tdx", tdx_guest(machine, tmp_path)).seen
    assert everything == {"quote-service": "vsock:4050", "event-log": f"{len(log.events)}-events", "rtmr3": "present"}


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_guest_that_must_measure_and_has_no_register_is_a_failure(
    machine: SimulatedMachine, tmp_path: Path, tee: Tee
) -> None:
    text = EXAMPLE.replace('attester = "snp"', f'attester = "{tee.value}"\nruntime_measurement = "required"')
    guest = replace(tdx_guest(machine, tmp_path), open_tee=lambda _: machine.attester(tee))
    guest.find_config = lambda: FoundConfig(text.encode(), bytes(32), Ident("file"))
    error = failed(finding("tdx", guest))
    assert isinstance(error, NoAttesterError)
    assert error.reason is Absence.NO_RUNTIME_REGISTER
    if tee is Tee.TDX:
        guest.places.measurements.mkdir()
        (guest.places.measurements / REGISTER).touch()
        assert finding("tdx", guest).error is None


def test_an_event_log_that_is_none_is_a_failure_and_another_tee_has_none(machine: SimulatedMachine, tmp_path: Path) -> None:
    guest = tdx_guest(machine, tmp_path)
    guest.places.event_log.write_bytes(b"junk")
    error = failed(finding("tdx", guest))
    assert isinstance(error, MalformedEvidenceError)
    assert error.format is EvidenceFormat.EVENT_LOG
    assert finding("tdx", guest_with(configured(machine).data.decode())).skipped is Skip.NO_TDX


def test_an_event_log_that_no_boot_could_send_is_a_failure(machine: SimulatedMachine, tmp_path: Path) -> None:
    guest, log = tdx_guest(machine, tmp_path), make_event_log(machine)
    for events, too_long in ((log.events * 300, False), (log.events * 6000, True)):
        guest.places.event_log.write_bytes(pack_event_log(replace(log, events=events)).ljust(1 << 20, b"\xff"))
        found = finding("tdx", guest)
        assert (found.error is not None) is too_long
        if too_long:
            error = failed(found)
            assert isinstance(error, MalformedEvidenceError)
            assert (error.field, error.expected) == ("length", MAX_EVENT_LOG_BYTES)


@pytest.mark.parametrize(("state", "ready", "expected"), [("own", 1, VmRestartRequiredError), ("preset", 0, GpuFaultError)])
def test_a_ready_state_that_a_boot_could_not_use_is_a_failure(
    tmp_path: Path, state: str, ready: int, expected: type[AgentError]
) -> None:
    machine = gpu_machine(tmp_path / "machine", count=1)
    text = configured(machine).data.decode().replace('ready_state = "own"', f'ready_state = "{state}"')

    def found() -> type[AgentError] | None:
        checks = ("configuration", "gpu", "gpu-inventory")
        *_, last = examine(guest_with(text), {name: CHECKS[name] for name in checks})
        assert last.skipped is None
        return None if last.error is None else type(last.error)

    for now, wanted in ((ready, expected), (1 - ready, None)):
        machine.gpu.ready = now
        machine.save()
        assert in_child(found) is wanted


def test_an_event_log_that_cannot_be_read_is_a_failure_as_it_is_in_a_boot(machine: SimulatedMachine, tmp_path: Path) -> None:
    guest = tdx_guest(machine, tmp_path)
    guest.places.event_log.mkdir()
    error = failed(finding("tdx", guest))
    assert isinstance(error, DeviceError)
    assert (error.interface, error.code) == ("event-log", errno.EISDIR)
