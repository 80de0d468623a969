"""Simulated NVSwitches behind NSCQ: the real binding drives them, the real verifier judges their Evidence.

`SimulatedNscq` stands where the binding expects the loaded library. State and faults are the machine's `GpuKnobs`, keys and
chains its silicon's; calls go into the same log as NVML's, a path by its end (`config/certificate`).
Source: NVIDIA nvtrust, nscq_attestation.h (structs, return codes, callbacks).
"""

import ctypes
import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Any

from agent.evidence import GpuNonce
from agent.evidence.gpu_abi import (
    LISTED_GPUS,
    OPAQUE_GPU_PDIS,
    OPAQUE_PDI,
    OPAQUE_VBIOS_VERSION,
    PDI_BYTES,
    SIGNATURE_BYTES,
    GpuReport,
    firmware_digests,
)
from agent.evidence.nscq import MOUNT_DEVICES, UNEXPECTED_VALUE, Certificate, NscqSwitches, Report, SessionResult, Uuid
from agent.sim.gpu_silicon import hand_out, read_chain, read_pdi
from agent.sim.machine import SimulatedMachine
from agent.sim.nvml import CALL_LOG, STRAY_PDI

ARCHITECTURE = 2
BLOCKS = 31
PORTS = 64
INVALID_UUID = -2
SESSION = 0x5E5510  # a pointer that nobody follows


@dataclass(frozen=True, slots=True)
class Answer:
    """One callback: the device, its return code, and the value as C has it in memory."""

    device: bytes
    code: int
    value: bytes


def open_switch_system(machine: SimulatedMachine, library: object = None) -> NscqSwitches:
    """The machine's NVSwitches.

    Args:
        machine: whose NVSwitches.
        library: what has NSCQ's functions as attributes; None for `SimulatedNscq`.

    Raises:
        DeviceError: NSCQ is told to fail at its session.
    """
    return NscqSwitches(SimulatedNscq(machine) if library is None else library)


class SimulatedNscq:
    """What the binding takes for the loaded library. Its functions take and give what ctypes does for the real one."""

    def __init__(self, machine: SimulatedMachine) -> None:
        """The machine's state is read at every call."""
        self._machine = machine
        self._input = b""

    def nscq_session_create(self, flags: int) -> SessionResult:
        return SessionResult(self.enter("nscq_session_create"), SESSION if flags == MOUNT_DEVICES else None)

    def nscq_session_set_input(self, _session: int, _flags: int, data: Any, size: int) -> int:
        self._input = bytes(data)[:size]
        return self.enter("nscq_session_set_input")

    def nscq_uuid_to_label(self, device: Any, label: Any, _flags: int) -> int:
        label.contents.data = label_of(bytes(device.contents)).encode()
        return self.enter("nscq_uuid_to_label")

    def nscq_session_path_observe(self, _session: int, path: bytes, callback: Any, user: object, _flags: int) -> int:
        code, answers = self.observe(path.decode(), self._input)
        for each in answers:
            device = ctypes.pointer(Uuid.from_buffer_copy(each.device))
            value: Any = each.value
            if path.endswith(b"uuid"):
                value = ctypes.pointer(Uuid.from_buffer_copy(value))
            elif path.endswith(b"certificate"):
                value = Certificate.from_buffer_copy(value)
            elif path.endswith(b"report"):
                value = Report.from_buffer_copy(value)
            else:
                value = int.from_bytes(value, "little", signed=True)
            callback(device, each.code, value, user)
        return code

    def observe(self, path: str, given: bytes) -> tuple[int, list[Answer]]:
        """What a session with this input says to a path: its return code, and every callback."""
        part = "uuid" if path.startswith("/drv/") else path.partition("/")[2].partition("/")[2]
        if code := self.enter(part):
            return code, []
        gpu = self._machine.gpu
        uuids = [self._uuid(index) for index in range(gpu.switches)]
        if part == "uuid":
            return 0, [Answer(each, 0, each) for each in uuids]
        label = path.split("/")[1]
        found = [index for index, each in enumerate(uuids) if label_of(each) == label]
        if not found:
            return INVALID_UUID, []
        (index,) = found
        match part:
            case "id/arch":
                value = bytes((ARCHITECTURE,))
            case "config/pcie_mode":
                value = gpu.switch_mode.to_bytes(1, "little", signed=True)
            case "config/certificate":
                chain = read_chain(self._machine.silicon, self._signer(index))
                value = bytes(Certificate(cert_chain_size=len(chain)))
                value = chain + value[len(chain) :]
            case "config/attestation_report":
                report = hand_out(
                    self._machine.silicon,
                    self._signer(index),
                    lambda: self._report(index, given),
                    flip=gpu.flip_switch_signature_bit,
                    trailing=False,
                )
                value = len(report).to_bytes(4, "little") + report
                value = value.ljust(ctypes.sizeof(Report), b"\0")
            case _:
                return UNEXPECTED_VALUE, []
        return 0, [Answer(uuids[index], 0, value)]

    def enter(self, call: str) -> int:
        """Log a call; the return code that it is told to fail with, 0 for none."""
        self._machine.reread()
        with (self._machine.directory / CALL_LOG).open("a") as log:
            log.write(f"{call}\n")
        gpu = self._machine.gpu
        time.sleep(gpu.delay_calls.get(call, 0))
        return gpu.fail_calls.get(call, 0)

    def _uuid(self, index: int) -> bytes:
        return hashlib.sha256(read_chain(self._machine.silicon, f"switch-{index}")).digest()[:16]

    def _signer(self, index: int) -> str:
        return f"switch-{0 if self._machine.gpu.repeat_first_switch else index}"

    def _report(self, index: int, nonce: bytes) -> GpuReport:
        gpu = self._machine.gpu
        gpus: list[bytes] = [read_pdi(self._machine.silicon, f"gpu-{number}") for number in range(min(gpu.count, LISTED_GPUS))]
        if gpus and gpu.stray_gpu and index == gpu.switches - 1:
            gpus[-1] = STRAY_PDI
        listed = b"".join(gpus).ljust(LISTED_GPUS * PDI_BYTES, b"\0")
        return GpuReport(
            requester_nonce=GpuNonce(secrets.token_bytes(32) if gpu.wrong_switch_nonce else nonce),
            measurements=firmware_digests(
                hashlib.sha384(b"keyturn simulated block %d" % block).digest() for block in range(BLOCKS)
            ),
            responder_nonce=secrets.token_bytes(32),
            opaque=(
                (OPAQUE_VBIOS_VERSION, gpu.switch_vbios_version.encode()),
                (OPAQUE_PDI, read_pdi(self._machine.silicon, f"switch-{index}")),
                (OPAQUE_GPU_PDIS, listed + bytes(range(LISTED_GPUS)) * 2 + b"\xff" * (PORTS - 2 * LISTED_GPUS)),
            ),
            signature=bytes(SIGNATURE_BYTES),
        )


def label_of(device: bytes) -> str:
    """As the driver writes the 16 bytes of an NVSwitch's UUID."""
    return f"SWX-{str(uuid.UUID(bytes=device)).upper()}"
