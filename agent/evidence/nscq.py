"""The NVSwitches of this guest, through NSCQ: what they are, their mode, and their Evidence.

Owns the calls to libnvidia-nscq, whose version must be the driver's, and the `GpuSystem` of a machine with NVSwitches. Decides
nothing about modes or counts: that is `gate.py`. NSCQ answers by calling back: a session is asked for a path, and calls back
once for every device that the path fits, with the device's UUID, a return code of its own and a value, structs by value. Return
codes are signed: below zero an error, above it a warning, and neither is good enough to go on. No call is ever made twice.

    /drv/nvswitch/{device}/uuid       `{device}` is meant literally: every NVSwitch calls back with its UUID
    /LABEL/id/arch                    i8: 2 for LS10, the only one that can attest
    /LABEL/config/pcie_mode           i8: trusted NVLink (TNVL), `Switch.mode`
    /LABEL/config/certificate         PEM chain in 0x1400 bytes, and its length
    /LABEL/config/attestation_report  length, and a report in 0x2000 bytes, over the session's input: 32 bytes

Source: NVIDIA nvtrust 459cb8a, nscq_attestation.h and nscq_attestation_path.h (API 2.0.0); attestation-sdk, nscq_client.cpp
(order of the calls); open-gpu-kernel-modules, ioctl_nvswitch.h (labels).
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from agent.closed import Ident
from agent.errors import DeviceError, NoAttesterError
from agent.evidence import SWITCH_ARCH, GpuEvidence, GpuInventory, GpuNonce, GpuSystem, Switch, SwitchSystem
from agent.evidence.gpu import check_report
from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, MAX_REPORT_BYTES
from agent.verify.nvidia import told_of_switch

NSCQ = Ident("nscq")
# Absolute, so that neither the loader's search path nor its environment chooses the library.
NSCQ_LIBRARIES = (
    Path("/usr/lib/x86_64-linux-gnu/libnvidia-nscq.so.2"),
    Path("/usr/lib64/libnvidia-nscq.so.2"),
    Path("/usr/lib/libnvidia-nscq.so.2"),
    Path("/run/kata-extensions/gpu/usr/lib/libnvidia-nscq.so.2"),  # Kata 4.x: the driver is a guest extension image
)
UUID_BYTES = 16
NOT_IMPLEMENTED = -1
UNEXPECTED_VALUE = -5
MOUNT_DEVICES = 1
_MAX_ANSWERS = 64
_LS10 = 2
_LABEL = re.compile(r"SWX-[0-9A-Fa-f-]{36}")

_Value = TypeVar("_Value")


class Uuid(ctypes.Structure):
    """nscq_uuid_t."""

    _fields_ = (("bytes", ctypes.c_uint8 * UUID_BYTES),)


class Label(ctypes.Structure):
    """nscq_label_t: text with a NUL."""

    _fields_ = (("data", ctypes.c_char * 64),)


class Report(ctypes.Structure):
    """nscq_attestation_report_t."""

    _fields_ = (("report_size", ctypes.c_uint32), ("report", ctypes.c_uint8 * MAX_REPORT_BYTES))


class Certificate(ctypes.Structure):
    """nscq_attestation_certificate_t."""

    _fields_ = (("cert_chain", ctypes.c_uint8 * MAX_CHAIN_BYTES), ("cert_chain_size", ctypes.c_uint32))


class SessionResult(ctypes.Structure):
    """nscq_session_result_t."""

    _fields_ = (("rc", ctypes.c_int8), ("session", ctypes.c_void_p))


_U32, _RC, _POINTER = ctypes.c_uint32, ctypes.c_int8, ctypes.c_void_p
_UUID_POINTER = ctypes.POINTER(Uuid)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # result, arguments
    "nscq_session_create": (SessionResult, (_U32,)),
    "nscq_session_set_input": (_RC, (_POINTER, _U32, _POINTER, _U32)),
    "nscq_session_path_observe": (_RC, (_POINTER, ctypes.c_char_p, _POINTER, _POINTER, _U32)),
    "nscq_uuid_to_label": (_RC, (_UUID_POINTER, ctypes.POINTER(Label), _U32)),
}


@dataclass(frozen=True, slots=True)
class _Kind(Generic[_Value]):
    """What a path calls back with, and how its value is copied: a pointer's target does not outlive the call."""

    function: Any
    copy: Callable[[Any], _Value]


def _calls_back_with(value: Any) -> Any:
    return ctypes.CFUNCTYPE(None, _UUID_POINTER, _RC, value, _POINTER)


def _target(pointer: Any) -> bytes:
    return bytes(pointer.contents) if pointer else b""


def _cut(buffer: Any, size: int) -> bytes:
    """What it says it holds; nothing, which does not parse, where that is more than it can hold."""
    return bytes(buffer)[:size] if size <= len(buffer) else b""


_UUID: _Kind[bytes] = _Kind(_calls_back_with(_UUID_POINTER), _target)
_NUMBER: _Kind[int] = _Kind(_calls_back_with(ctypes.c_int8), int)
_CERTIFICATE: _Kind[bytes] = _Kind(_calls_back_with(Certificate), lambda value: _cut(value.cert_chain, value.cert_chain_size))
_REPORT: _Kind[bytes] = _Kind(_calls_back_with(Report), lambda value: _cut(value.report, value.report_size))


def open_nscq(candidates: tuple[Path, ...] = NSCQ_LIBRARIES) -> ctypes.CDLL:
    """The library, with its functions' types set.

    Raises:
        NoAttesterError: none of the absolute paths can be loaded.
        DeviceError: it lacks a function.
    """
    for path in candidates:
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError as exc:
                raise DeviceError(NSCQ, Ident(name), NOT_IMPLEMENTED) from exc
            function.restype, function.argtypes = result, arguments
        return library
    # refusal: test_the_library_is_opened_by_absolute_paths_only
    raise NoAttesterError(NSCQ)


class NscqSwitches:
    """The `SwitchSystem` of this guest. Its session ends with the process."""

    def __init__(self, library: Any = None) -> None:
        """Open a session with every NVSwitch that the driver has.

        Args:
            library: what has NSCQ's functions as attributes; None opens the driver's.

        Raises:
            NoAttesterError: no NSCQ library.
            DeviceError: NSCQ refused; the code is 1 where the library and the driver are of different versions.
        """
        self._library = open_nscq() if library is None else library
        result = self._library.nscq_session_create(MOUNT_DEVICES)
        # refusal: test_a_session_with_a_warning_is_none
        _check("nscq_session_create", result.rc)
        self._session = result.session

    def inspect(self) -> tuple[Switch, ...]:
        """Every NVSwitch as it is now.

        Raises:
            DeviceError: an NSCQ call failed, or answered for another device than it was asked for.
            NoAttesterError: an NVSwitch is of an architecture that has no attestation.
        """
        return tuple(self._inspect(device, label) for device, label in self._devices())

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence of every NVSwitch over `nonce` (32 bytes), in the order of `inspect`.

        Raises:
            DeviceError, NoAttesterError: as `inspect`.
            MalformedEvidenceError, EvidenceBindingError, EvidenceVerificationError: as `gpu.check_report`.
        """
        return tuple(self._collect(device, label, nonce) for device, label in self._devices())

    def _devices(self) -> list[tuple[bytes, str]]:
        return [(uuid, self._label(uuid)) for _, uuid in self._observe("/drv/nvswitch/{device}/uuid", "uuid", _UUID)]

    def _label(self, uuid: bytes) -> str:
        label = Label()
        # refusal: test_a_uuid_that_is_none_is_a_device_error
        if len(uuid) != UUID_BYTES:
            raise DeviceError(NSCQ, Ident("uuid"), UNEXPECTED_VALUE)
        pointer = ctypes.pointer(Uuid.from_buffer_copy(uuid))
        _check("nscq_uuid_to_label", self._library.nscq_uuid_to_label(pointer, ctypes.pointer(label), 0))
        text: str = label.data.decode("latin-1")
        # It becomes a part of the paths that follow.
        # refusal: test_a_label_that_is_none_is_a_device_error
        if not _LABEL.fullmatch(text):
            raise DeviceError(NSCQ, Ident("nscq_uuid_to_label"), UNEXPECTED_VALUE)
        return text

    def _inspect(self, device: bytes, label: str) -> Switch:
        return Switch(label, self._architecture(device, label), self._ask(device, label, "config/pcie_mode", _NUMBER))

    def _architecture(self, device: bytes, label: str) -> str:
        number = self._ask(device, label, "id/arch", _NUMBER)
        # refusal: test_a_switch_without_attestation_is_no_attester
        if number != _LS10:
            raise NoAttesterError(Ident(f"nscq-architecture-{number}"))
        return SWITCH_ARCH

    def _collect(self, device: bytes, label: str, nonce: GpuNonce) -> GpuEvidence:
        chain = self._ask(device, label, "config/certificate", _CERTIFICATE)
        given = (ctypes.c_uint8 * len(nonce)).from_buffer_copy(nonce)
        code = self._library.nscq_session_set_input(self._session, 0, given, len(nonce))
        _check("nscq_session_set_input", code)
        report = self._ask(device, label, "config/attestation_report", _REPORT)
        with told_of_switch():
            # refusal: test_a_switch_that_signs_another_nonce_is_not_believed
            check_report(report, chain, nonce)
        return GpuEvidence(self._architecture(device, label), label, report, chain)

    def _ask(self, device: bytes, label: str, part: str, kind: _Kind[_Value]) -> _Value:
        """The one answer of one NVSwitch."""
        answers = self._observe(f"/{label}/{part}", part, kind)
        # refusal: test_an_answer_of_another_device_is_a_device_error
        if [answering for answering, _ in answers] != [device]:
            raise DeviceError(NSCQ, Ident(part), UNEXPECTED_VALUE)
        return answers[0][1]

    def _observe(self, path: str, part: str, kind: _Kind[_Value]) -> list[tuple[bytes, _Value]]:
        """Every device that answers, and what."""
        answers: list[tuple[int, bytes, _Value]] = []

        def take(device: Any, code: int, value: Any, _: object) -> None:
            # It must not raise: nobody above it would hear of that.
            if len(answers) < _MAX_ANSWERS:
                answers.append((code, _target(device), kind.copy(value)))

        _check(part, self._library.nscq_session_path_observe(self._session, path.encode(), kind.function(take), None, 0))
        for code, _, _ in answers:
            # refusal: test_a_device_that_answers_with_an_error_is_a_device_error
            _check(part, code)
        return [(device, value) for _, device, value in answers]


class GpusAndSwitches:
    """The `GpuSystem` of a machine with NVSwitches: what they say comes after what the GPUs say."""

    def __init__(self, gpus: GpuSystem, switches: SwitchSystem) -> None:
        self._gpus = gpus
        self._switches = switches

    def inspect(self) -> GpuInventory:
        """As of the GPUs, with the NVSwitches. Raises what either raises."""
        return replace(self._gpus.inspect(), switches=self._switches.inspect())

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence over `nonce` (32 bytes): GPUs, then NVSwitches. Raises what either raises."""
        return (*self._gpus.collect(nonce), *self._switches.collect(nonce))

    def check_faults(self) -> None:
        """As of the GPUs."""
        self._gpus.check_faults()

    def set_ready(self) -> None:
        """As of the GPUs: the NVSwitches have no ready state."""
        self._gpus.set_ready()


def _check(call: str, code: int) -> None:
    # refusal: test_any_failing_call_is_a_device_error
    if code != 0:
        raise DeviceError(NSCQ, Ident(call), code)
