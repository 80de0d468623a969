"""The NVIDIA attestation report of a GPU or NVSwitch: SPDM 1.1 GET_MEASUREMENTS request and MEASUREMENTS response, as bytes.

Owns the layout and its strictness: `parse_report` accepts nothing that `pack_report` would not give back byte for byte.
Verifies nothing: signature, chain and firmware identity are `agent/verify/nvidia.py`'s business.

    0        SPDM version 0x11, code 0xE0, param1 1 (signature requested), param2 0xFF (all blocks)
    4        requester nonce, 32: ours
    36       slot id 0
    37       SPDM version 0x11, code 0x60, param1 0, param2 0
    41       number of blocks n, u8;  length M of all blocks, u24
    45       n blocks of 55: index u8 from 1, spec u8 1 (DMTF), size u16 51, type u8 1, length u16 48, SHA-384
    45+M     responder nonce, 32: random, not ours
    77+M     length P of the opaque data, u16
    79+M     opaque data: type u16, size u16, value, repeated
    79+M+P   ECDSA P-384 signature r ‖ s, 48 each, big endian, over everything before it

Integers are little endian unless said otherwise. Positions come from lengths and never from the end of the bytes: there are
devices that append zero bytes after the signature. Which opaque fields there are depends on driver and firmware, and so does
their order: a known one must have its documented shape, an unknown one is kept as it is. GPU and NVSwitch mean different
things by types 22 and, with old firmware, 4: there the length tells.
Spec: DMTF DSP0274 1.1.0, tables GET_MEASUREMENTS request and MEASUREMENTS response; NVIDIA attestation-sdk, opaque field ids.
"""

import re
import struct
from dataclasses import dataclass
from typing import NewType

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence import GPU_NONCE_BYTES, GpuNonce

MAX_REPORT_BYTES = 0x2000  # NVML's buffer
MAX_CHAIN_BYTES = 0x1400  # NVML's buffer
MAX_TRAILING_BYTES = 3
DIGEST_BYTES = 48
SIGNATURE_BYTES = 96
RESPONDER_NONCE_BYTES = 32

_REQUEST = {"request-version": 0x11, "request-code": 0xE0, "request-param1": 0x01, "request-param2": 0xFF}  # a byte each
_RESPONSE = {"version": 0x11, "code": 0x60, "param1": 0x00, "param2": 0x00}  # a byte each
_BLOCK = struct.Struct("<BBHBH")
_BLOCK_BYTES = _BLOCK.size + DIGEST_BYTES
_TLV = struct.Struct("<HH")

OPAQUE_DRIVER_VERSION = 3
OPAQUE_GPU_INFO = 4
OPAQUE_VBIOS_VERSION = 6
OPAQUE_MEASUREMENT_COUNTS = 12
OPAQUE_CHIP_SKU = 15
OPAQUE_PROJECT = 17
OPAQUE_PROJECT_SKU = 18
OPAQUE_FWID = 20
OPAQUE_PROTECTED_PCIE = 21
OPAQUE_PDI = 22
OPAQUE_GPU_PDIS = 26
OPAQUE_OPAQUE_VERSION = 34
OPAQUE_CHIP_INFO = 35
OPAQUE_FEATURE_FLAG = 36
_OPAQUE_INVALID = 255

PDI_BYTES = 8
LINKS = 18  # NVLinks of a GPU
LISTED_GPUS = 8  # GPUs that a switch lists, before its 64 ports
_GPU_VBIOS_BYTES = 8
_GPU_INFO_BYTES = 8
_GPU_PDIS_BYTES = LISTED_GPUS * PDI_BYTES + 64  # a byte for each port: the place of its GPU in the list, 0xFF for none
_ON, _OFF = b"\xaa", b"\x55"

# Name of each known field, and the lengths its value can have in bytes.
_SIZED: dict[int, tuple[str, tuple[int, ...]]] = {
    OPAQUE_GPU_INFO: ("gpu-info", (_GPU_INFO_BYTES, _GPU_PDIS_BYTES)),
    11: ("nvdec0-status", (1,)),
    13: ("cpr-info", (4,)),
    14: ("board-id", (4,)),
    OPAQUE_FWID: ("fwid", (DIGEST_BYTES,)),
    OPAQUE_PROTECTED_PCIE: ("protected-pcie-status", (1,)),
    OPAQUE_PDI: ("pdi", (PDI_BYTES, LINKS * PDI_BYTES)),
    23: ("floorswept-ports", (2,)),
    24: ("position-id", (2,)),
    25: ("lock-status", (2,)),
    OPAQUE_GPU_PDIS: ("gpu-pdis", (_GPU_PDIS_BYTES,)),
    33: ("sys-enable-status", (2,)),
    OPAQUE_OPAQUE_VERSION: ("opaque-data-version", (2,)),
    OPAQUE_FEATURE_FLAG: ("feature-flag", (2,)),
}
_SWITCHED = {11, OPAQUE_PROTECTED_PCIE}  # 0xAA or 0x55
_TEXTS = {
    OPAQUE_DRIVER_VERSION: "driver-version",
    OPAQUE_VBIOS_VERSION: "vbios-version",
    OPAQUE_CHIP_SKU: "chip-sku",
    16: "chip-sku-mod",
    OPAQUE_PROJECT: "project",
    OPAQUE_PROJECT_SKU: "project-sku",
    19: "project-sku-mod",
    OPAQUE_CHIP_INFO: "chip-info",
}
_MAY_BE_EMPTY = {16, 19}
_TEXT = re.compile(r"[!-~]{1,64}")

Pdi = NewType("Pdi", bytes)
"""8 bytes that name one GPU or NVSwitch, in the order in which an NVSwitch writes its own."""


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One report, of a GPU or (same format) of an NVSwitch.

    Attributes:
        requester_nonce: 32 bytes, what the caller of the device asked for.
        measurements: SHA-384 digests, 48 bytes each; the first is block index 1. NVIDIA's RIM index is one less.
        responder_nonce: 32 bytes, the device's own.
        opaque: (type, value) in the order of the report; no type occurs twice, unknown types are kept.
        signature: r ‖ s, 96 bytes, big endian.
        trailing_bytes: number of zero bytes after the signature, not signed; at most 3.
    """

    requester_nonce: GpuNonce
    measurements: tuple[bytes, ...]
    responder_nonce: bytes
    opaque: tuple[tuple[int, bytes], ...]
    signature: bytes
    trailing_bytes: int = 0

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers: request and response without it."""
        blocks = enumerate(self.measurements, 1)
        record = b"".join(_BLOCK.pack(index, 1, 3 + DIGEST_BYTES, 1, DIGEST_BYTES) + digest for index, digest in blocks)
        opaque = b"".join(_TLV.pack(kind, len(value)) + value for kind, value in self.opaque)
        return b"".join((
            bytes(_REQUEST.values()), self.requester_nonce, b"\0",
            bytes(_RESPONSE.values()), bytes((len(self.measurements),)), len(record).to_bytes(3, "little"), record,
            self.responder_nonce, len(opaque).to_bytes(2, "little"), opaque,
        ))  # fmt: skip

    def field(self, kind: int) -> bytes | None:
        """The value of one opaque field as it came; None: the device does not report it."""
        return next((value for found, value in self.opaque if found == kind), None)

    @property
    def driver_version(self) -> str | None:
        """For example `580.95.05`; an NVSwitch has none."""
        return self._text(OPAQUE_DRIVER_VERSION)

    @property
    def vbios_version(self) -> str | None:
        """For example `96.00.74.00.1A`: a GPU packs it into eight bytes, an NVSwitch writes text."""
        value = self.field(OPAQUE_VBIOS_VERSION)
        if value is None or len(value) != _GPU_VBIOS_BYTES:
            return self._text(OPAQUE_VBIOS_VERSION)
        return ".".join(f"{byte:02X}" for byte in (*value[3::-1], value[4]))

    @property
    def project(self) -> str | None:
        return self._text(OPAQUE_PROJECT)

    @property
    def project_sku(self) -> str | None:
        return self._text(OPAQUE_PROJECT_SKU)

    @property
    def chip_sku(self) -> str | None:
        return self._text(OPAQUE_CHIP_SKU)

    @property
    def chip_info(self) -> str | None:
        """For example `GB100`; newer drivers of Blackwell report it."""
        return self._text(OPAQUE_CHIP_INFO)

    @property
    def fwid(self) -> bytes | None:
        """48 bytes: digest of the firmware that holds the signing key. Drivers before 550 and NVSwitches do not report it."""
        return self.field(OPAQUE_FWID)

    @property
    def protected_pcie(self) -> bool | None:
        """Protected PCIe is on. Drivers before 550, NVSwitches and Blackwell do not report it."""
        value = self.field(OPAQUE_PROTECTED_PCIE)
        return None if value is None else value == _ON

    @property
    def opaque_version(self) -> int | None:
        """Version of the opaque data. Older drivers do not report it."""
        return self._number(OPAQUE_OPAQUE_VERSION)

    @property
    def feature_flag(self) -> int | None:
        """0 one GPU, 1 several GPUs, 2 protected PCIe. Drivers before 580 do not report it."""
        return self._number(OPAQUE_FEATURE_FLAG)

    @property
    def device_pdi(self) -> Pdi | None:
        """An NVSwitch's own PDI. A GPU does not report its own."""
        value = self.field(OPAQUE_PDI)
        return Pdi(value) if value is not None and len(value) == PDI_BYTES else None

    @property
    def switch_pdis(self) -> tuple[Pdi, ...] | None:
        """The NVSwitch at the other end of each of a GPU's links; zeros for a link that is off. None: not reported."""
        value = self.field(OPAQUE_PDI)
        if value is None or len(value) != LINKS * PDI_BYTES:
            return None
        return tuple(Pdi(pdi[::-1]) for pdi in _pdis(value))  # a GPU writes them the other way round

    @property
    def gpu_pdis(self) -> tuple[Pdi, ...] | None:
        """The eight GPUs that an NVSwitch knows of, as it lists them. None: not reported."""
        value = self.field(OPAQUE_GPU_PDIS)
        if value is None:
            info = self.field(OPAQUE_GPU_INFO)  # where old firmware of NVSwitches puts it
            value = info if info is not None and len(info) == _GPU_PDIS_BYTES else None
        return None if value is None else tuple(Pdi(pdi) for pdi in _pdis(value[: LISTED_GPUS * PDI_BYTES]))

    def _number(self, kind: int) -> int | None:
        value = self.field(kind)
        return None if value is None else int.from_bytes(value, "little")

    def _text(self, kind: int) -> str | None:
        value = self.field(kind)
        return None if value is None else value.rstrip(b"\0").decode("latin-1")


def parse_report(report: bytes) -> GpuReport:
    """Parse one report.

    Args:
        report: about 4 KiB, as the driver returned it.
    Raises:
        MalformedEvidenceError: names the first field that is not as the layout wants it.
    """
    # refusal: test_a_report_larger_than_the_driver_can_return_is_malformed
    if len(report) > MAX_REPORT_BYTES:
        raise _malformed("length", len(report), MAX_REPORT_BYTES)
    reader = _Reader(report)
    for field, expected in _REQUEST.items():
        reader.constant(field, 1, expected)
    requester_nonce = GpuNonce(reader.take("requester-nonce", GPU_NONCE_BYTES))
    reader.constant("request-slot", 1, 0)
    for field, expected in _RESPONSE.items():
        reader.constant(field, 1, expected)

    blocks = reader.number("number-of-blocks", 1)
    # refusal: test_a_report_measures_something
    if blocks == 0:
        raise _malformed("number-of-blocks", blocks)
    reader.constant("measurement-record-length", 3, blocks * _BLOCK_BYTES)
    measurements = []
    for index in range(1, blocks + 1):
        reader.constant("block-index", 1, index)
        reader.constant("block-specification", 1, 1)
        reader.constant("block-size", 2, 3 + DIGEST_BYTES)
        reader.constant("block-type", 1, 1)
        reader.constant("block-length", 2, DIGEST_BYTES)
        measurements.append(reader.take("block-digest", DIGEST_BYTES))

    responder_nonce = reader.take("responder-nonce", RESPONDER_NONCE_BYTES)
    opaque = _parse_opaque(reader.take("opaque-data", reader.number("opaque-length", 2)))
    signature = reader.take("signature", SIGNATURE_BYTES)
    trailing = reader.rest()
    # refusal: test_other_trailing_bytes_are_malformed
    if len(trailing) > MAX_TRAILING_BYTES or any(trailing):
        raise _malformed("trailing-bytes", len(trailing), 0)

    return GpuReport(requester_nonce, tuple(measurements), responder_nonce, opaque, signature, len(trailing))


def pack_report(report: GpuReport) -> bytes:
    """The exact inverse of `parse_report`."""
    return report.signed_bytes + report.signature + bytes(report.trailing_bytes)


def _parse_opaque(data: bytes) -> tuple[tuple[int, bytes], ...]:
    fields: dict[int, bytes] = {}
    reader = _Reader(data)
    while reader.left():
        kind = reader.number("opaque-type", 2)
        size = reader.number("opaque-size", 2)
        # With a type given twice, two readers could believe two different values under one signature.
        # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
        if kind == _OPAQUE_INVALID or kind in fields:
            raise _malformed("opaque-type", kind)
        fields[kind] = reader.take("opaque-value", size)
    for kind, value in fields.items():
        _check_shape(kind, value)
    return tuple(fields.items())


def _check_shape(kind: int, value: bytes) -> None:
    """So that whoever holds a GpuReport can read its fields without an error."""
    if kind in _SIZED:
        field, sizes = _SIZED[kind]
        # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
        if len(value) not in sizes:
            raise _malformed(field, len(value), sizes[0])
        # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
        if kind in _SWITCHED and value not in (_ON, _OFF):
            raise _malformed(field, value[0], _ON[0])
    # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
    if kind == OPAQUE_MEASUREMENT_COUNTS and len(value) % 4:
        raise _malformed("measurement-counts", len(value))
    if kind in _TEXTS and not (kind == OPAQUE_VBIOS_VERSION and len(value) == _GPU_VBIOS_BYTES):
        text = value.rstrip(b"\0").decode("latin-1")
        # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
        if not _TEXT.fullmatch(text) and (text or kind not in _MAY_BE_EMPTY):
            raise _malformed(_TEXTS[kind])


def _pdis(value: bytes) -> list[bytes]:
    return [value[at : at + PDI_BYTES] for at in range(0, len(value), PDI_BYTES)]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, field: str, size: int) -> bytes:
        # refusal: test_a_report_cut_anywhere_is_malformed
        if self.left() < size:
            raise _malformed(field, self.left(), size)
        self._at += size
        return self._data[self._at - size : self._at]

    def rest(self) -> bytes:
        return self.take("rest", self.left())

    def number(self, field: str, size: int) -> int:
        return int.from_bytes(self.take(field, size), "little")

    def constant(self, field: str, size: int, expected: int) -> None:
        got = self.number(field, size)
        # refusal: test_every_constant_of_the_layout_is_checked
        if got != expected:
            raise _malformed(field, got, expected)


def _malformed(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.NVIDIA_REPORT, Ident(field), got, expected)
