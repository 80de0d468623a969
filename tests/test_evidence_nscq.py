"""The NSCQ binding over simulated NVSwitches, in this process and through C: every answer, every fault, each call once."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.errors import (
    DeviceError,
    EvidenceBindingError,
    EvidenceCheck,
    EvidenceFormat,
    EvidenceVerificationError,
    GpuFaultError,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import GpuNonce, SwitchSystem
from agent.evidence.gpu_abi import parse_report
from agent.evidence.nscq import (
    NSCQ_LIBRARIES,
    Certificate,
    GpusAndSwitches,
    Label,
    NscqSwitches,
    Report,
    SessionResult,
    Uuid,
    open_nscq,
)
from agent.sim.machine import SimulatedMachine
from agent.sim.nscq import Answer, SimulatedNscq
from agent.sim.nvml import nvml_calls
from tests.gpus import NONCE, gpu_machine, recorded
from tests.nscq_emulation import LIBRARY, answered

REPORT, CERTIFICATE = "config/attestation_report", "config/certificate"
UNEXPECTED = -5


def failure(switches: SwitchSystem, *, collecting: bool = True) -> tuple[str, int]:
    with pytest.raises(DeviceError) as caught:
        switches.collect(NONCE) if collecting else switches.inspect()
    assert (caught.value.interface, caught.value.retryable) == ("nscq", False)
    return caught.value.call, caught.value.code


def test_the_structs_are_as_long_as_in_the_header() -> None:
    structs = (Uuid, Label, Report, Certificate, SessionResult)
    assert [ctypes.sizeof(struct) for struct in structs] == [16, 64, 0x2004, 0x1404, 16]
    assert (Report.report.offset, Certificate.cert_chain_size.offset, SessionResult.session.offset) == (4, 0x1400, 8)


def test_switches_and_their_mode_are_read(switched: SimulatedMachine) -> None:
    switches = switched.switch_system().inspect()
    assert len({switch.uuid for switch in switches}) == 4
    assert all(re.fullmatch(r"SWX(-[0-9A-F]{4,12}){5}", switch.uuid) for switch in switches)
    assert {(switch.arch, switch.mode) for switch in switches} == {("LS10", 3)}
    for mode in (-1, 0, 1, 2, 127):
        switched.gpu.switch_mode = mode
        assert {switch.mode for switch in switched.switch_system().inspect()} == {mode}


def test_evidence_is_collected_of_every_switch_in_order(switched: SimulatedMachine) -> None:
    switches = switched.switch_system()
    evidence = switches.collect(NONCE)
    assert [switch.uuid for switch in evidence] == [switch.uuid for switch in switches.inspect()]
    for switch in evidence:
        report = parse_report(switch.report)
        assert (switch.arch, report.requester_nonce, len(report.measurements)) == ("LS10", NONCE, 31)
        assert switch.certificate_chain.endswith(b"-----END CERTIFICATE-----\n")
    assert nvml_calls(switched).count(REPORT) == nvml_calls(switched).count(CERTIFICATE) == 4


def test_every_report_has_the_nonce_of_its_own_collection(switched: SimulatedMachine) -> None:
    switches, other = switched.switch_system(), GpuNonce(bytes(32))
    assert {parse_report(switch.report).requester_nonce for switch in switches.collect(NONCE)} == {NONCE}
    assert {parse_report(switch.report).requester_nonce for switch in switches.collect(other)} == {other}


@pytest.mark.parametrize("code", [1, 127])
def test_a_session_with_a_warning_is_none(switched: SimulatedMachine, code: int) -> None:
    switched.gpu.fail_calls = {"nscq_session_create": code}
    with pytest.raises(DeviceError) as caught:
        switched.switch_system()
    assert (caught.value.call, caught.value.code) == ("nscq_session_create", code)


@pytest.mark.parametrize("code", [-128, -7, 1])
@pytest.mark.parametrize("call", ["uuid", "nscq_uuid_to_label", "nscq_session_set_input", "id/arch", CERTIFICATE, REPORT])
def test_any_failing_call_is_a_device_error(switched: SimulatedMachine, call: str, code: int) -> None:
    switches = switched.switch_system()
    switched.gpu.fail_calls = {call: code}
    assert failure(switches) == (call, code)
    assert nvml_calls(switched).count(call) == 1


def test_a_mode_that_cannot_be_read_is_a_device_error(switched: SimulatedMachine) -> None:
    switched.gpu.fail_calls = {"config/pcie_mode": -8}
    assert failure(switched.switch_system(), collecting=False) == ("config/pcie_mode", -8)


def test_a_switch_that_signs_another_nonce_is_not_believed(switched: SimulatedMachine) -> None:
    switched.gpu.wrong_switch_nonce = True
    with pytest.raises(EvidenceBindingError) as caught:
        switched.switch_system().collect(NONCE)
    assert caught.value.format is EvidenceFormat.SWITCH_REPORT


def test_a_wrong_signature_does_not_leave_the_guest(switched: SimulatedMachine) -> None:
    switched.gpu.flip_switch_signature_bit = True
    with pytest.raises(EvidenceVerificationError) as caught:
        switched.switch_system().collect(NONCE)
    assert (caught.value.format, caught.value.check) == (EvidenceFormat.SWITCH_REPORT, EvidenceCheck.REPORT_SIGNATURE)


def test_recorded_evidence_comes_out_as_it_was(switched: SimulatedMachine) -> None:
    was = recorded("ls10_96.10.55")
    (switched.silicon / "switch-0.report").write_bytes(was.report)
    (switched.silicon / "switch-0.pem").write_bytes(was.chain)
    switched.gpu.switches = 1
    (evidence,) = switched.switch_system().collect(was.nonce)
    assert (evidence.arch, evidence.report, evidence.certificate_chain) == ("LS10", was.report, was.chain)


# --- a library that answers as no NVSwitch does ------------------------------------------------------------------------


class Hostile(SimulatedNscq):
    """Other answers to the paths that end like this."""

    def __init__(self, machine: SimulatedMachine, end: str, change: Callable[[list[Answer]], list[Answer]]) -> None:
        super().__init__(machine)
        self._end, self._change = end, change

    def observe(self, path: str, given: bytes) -> tuple[int, list[Answer]]:
        code, answers = super().observe(path, given)
        return code, self._change(answers) if path.endswith(self._end) else answers


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedMachine:
    return gpu_machine(tmp_path / "machine", 8, switches=4)


def hostile(machine: SimulatedMachine, end: str, change: Callable[[Answer], list[Answer]]) -> NscqSwitches:
    return NscqSwitches(Hostile(machine, end, lambda answers: [new for each in answers for new in change(each)]))


@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda each: [each, each],
        lambda each: [replace(each, device=bytes(16))],
        lambda each: [each, replace(each, device=bytes(16))],
    ],
)
@pytest.mark.parametrize("part", ["id/arch", CERTIFICATE, REPORT])
def test_an_answer_of_another_device_is_a_device_error(
    machine: SimulatedMachine, part: str, change: Callable[[Answer], list[Answer]]
) -> None:
    assert failure(hostile(machine, part, change)) == (part, UNEXPECTED)


@pytest.mark.parametrize("part", ["uuid", "id/arch", CERTIFICATE, REPORT])
def test_a_device_that_answers_with_an_error_is_a_device_error(machine: SimulatedMachine, part: str) -> None:
    assert failure(hostile(machine, part, lambda each: [replace(each, code=-7)])) == (part, -7)


def test_a_switch_without_attestation_is_no_attester(machine: SimulatedMachine) -> None:
    for number in (0, 1, 3):
        switches = hostile(machine, "id/arch", lambda each, number=number: [replace(each, value=bytes((number,)))])  # type: ignore[misc]
        for look in (switches.inspect, lambda switches=switches: switches.collect(NONCE)):
            with pytest.raises(NoAttesterError) as caught:
                look()
            assert caught.value.attester == f"nscq-architecture-{number}"


@pytest.mark.parametrize("size", [0, 1, 0x1401, 2**32 - 1])
def test_a_size_of_a_chain_that_is_not_its_own_is_malformed(machine: SimulatedMachine, size: int) -> None:
    switches = hostile(machine, CERTIFICATE, lambda each: [replace(each, value=each.value[:-4] + size.to_bytes(4, "little"))])
    with pytest.raises(MalformedEvidenceError) as caught:
        switches.collect(NONCE)
    assert caught.value.format is EvidenceFormat.SWITCH_CHAIN


@pytest.mark.parametrize("size", [0, 1, 0x2001, 2**32 - 1])
def test_a_size_of_a_report_that_is_not_its_own_is_malformed(machine: SimulatedMachine, size: int) -> None:
    switches = hostile(machine, REPORT, lambda each: [replace(each, value=size.to_bytes(4, "little") + each.value[4:])])
    with pytest.raises(MalformedEvidenceError) as caught:
        switches.collect(NONCE)
    assert caught.value.format is EvidenceFormat.SWITCH_REPORT


def test_callbacks_without_end_take_no_memory(machine: SimulatedMachine) -> None:
    switches = hostile(machine, "uuid", lambda each: [each] * 1000)
    assert len(switches.inspect()) == 64


class Nameless(SimulatedNscq):
    """A library whose pointers lead nowhere, or whose labels are none."""

    label = b""

    def nscq_session_path_observe(self, session: int, path: bytes, callback: Any, user: object, flags: int) -> int:
        if self.label or not path.endswith(b"uuid"):
            return super().nscq_session_path_observe(session, path, callback, user, flags)
        callback(None, 0, None, user)
        return 0

    def nscq_uuid_to_label(self, device: Any, label: Any, flags: int) -> int:
        label.contents.data = self.label
        return 0


def test_a_uuid_that_is_none_is_a_device_error(machine: SimulatedMachine) -> None:
    assert failure(NscqSwitches(Nameless(machine))) == ("uuid", UNEXPECTED)


@pytest.mark.parametrize("label", [b"{nvswitch}", b"SWX-../../drv", b"GPU-" + b"0" * 36, b"\xff" * 64, b"SWX-" + b"0" * 60])
def test_a_label_that_is_none_is_a_device_error(machine: SimulatedMachine, label: bytes) -> None:
    nscq = Nameless(machine)
    nscq.label = label
    assert failure(NscqSwitches(nscq)) == ("nscq_uuid_to_label", UNEXPECTED)


# --- the library itself -----------------------------------------------------------------------------------------------


def test_the_library_is_opened_by_absolute_paths_only(nscq_library: Path, tmp_path: Path) -> None:
    assert all(path.is_absolute() and path.name == LIBRARY for path in NSCQ_LIBRARIES)
    assert open_nscq((tmp_path / LIBRARY, nscq_library))._name == str(nscq_library)
    with pytest.raises(NoAttesterError) as caught:
        open_nscq((tmp_path / LIBRARY,))
    assert caught.value.attester == "nscq"


def test_a_library_without_a_function_is_a_device_error(nvml_library: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        open_nscq((nvml_library,))
    assert (caught.value.call, caught.value.code) == ("nscq_session_create", -1)


def test_a_driver_that_is_not_there_is_a_device_error(nscq_library: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        NscqSwitches(open_nscq((nscq_library,)))
    assert (caught.value.call, caught.value.code) == ("nscq_session_create", -6)


# --- GPUs and switches as one system ----------------------------------------------------------------------------------


def test_the_whole_machine_is_its_gpus_and_then_its_switches(switched: SimulatedMachine) -> None:
    gpus, switches = switched.gpu_system(), switched.switch_system()
    system = GpusAndSwitches(gpus, switches)
    inventory = system.inspect()
    assert inventory == replace(gpus.inspect(), switches=switches.inspect())
    assert [device.arch for device in system.collect(NONCE)] == ["HOPPER"] * 8 + ["LS10"] * 4
    system.check_faults()
    system.set_ready()
    assert system.inspect() == replace(inventory, ready=True)
    with (switched.directory / "kmsg").open("a") as log:
        log.write("3,9,9,-;NVRM: ConfCompute: Fatal error hit!\n")
    with pytest.raises(GpuFaultError):
        system.check_faults()


def test_a_library_can_be_answered_for_two_machines_at_once(switched: SimulatedMachine, nscq_library: Path) -> None:
    with answered(switched, nscq_library) as one, answered(switched, nscq_library) as two:
        assert one.switch_system().inspect() == two.switch_system().inspect()
