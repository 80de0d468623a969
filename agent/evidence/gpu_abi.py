"""The NVIDIA attestation report of a GPU or NVSwitch: SPDM 1.1 GET_MEASUREMENTS request and MEASUREMENTS response, as bytes.

Owns the layout and its strictness: `parse_report` accepts nothing that `pack_report` would not give back byte for byte.
Verifies nothing: signature, chain and firmware identity are `agent/verify/nvidia.py`'s business.

    0        SPDM version 0x11, code 0xE0, param1 1 (signature requested), param2 0xFF (all blocks)
    4        requester nonce, 32: ours
    36       slot id 0
    37       SPDM version 0x11, code 0x60, param1 0, param2 0
    41       number of blocks n, u8;  length M of all blocks, u24
    45       n blocks: index u8, spec u8 1 (DMTF), size u16 L+3, type u8, length u16 L, value
    45+M     responder nonce, 32: random, not ours
    77+M     length P of the opaque data, u16
    79+M     opaque data: none, or type u16, size u16, value, repeated; or with a header: `NVDAOD`, profile u16 0, version
             major u8 and minor u8, two zeros, then type u16, value type u16, size u16, value, repeated
    79+M+P   ECDSA P-384 signature r ‖ s, 48 each, big endian, over everything before it

Integers are little endian unless said otherwise. Positions come from lengths and never from the end of the bytes: there are
devices that append zero bytes after the signature. How many blocks there are, and of what, is the device's: 64 digests of a
GPU's system processor (GSP), 31 of an NVSwitch, digests and raw values of a GPU's security processor (FSP), and a manifest in
a block of its own from drivers of 2026. Those bring the header of the opaque data too. Which opaque fields there are depends
on driver and firmware, and so does their order: a known one must have its documented shape, an unknown one is kept as it is.
GPU and NVSwitch mean different things by types 22 and, with old firmware, 4: there the length tells.

SPDM 1.2 has the same layout and is refused: its signature covers messages (VCA) that no report of NVIDIA's carries.
Spec: DMTF DSP0274 1.1.0, tables GET_MEASUREMENTS request, MEASUREMENTS response and DMTF measurement; NVIDIA attestation-sdk,
opaque field ids and header.
"""

import re
import struct
from collections.abc import Iterable
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
_BLOCK_HEAD_BYTES = 3  # type and length, which the size of a block counts too
_INDICES = range(0x01, 0xFF)  # the others stand for their number and for all of them
_RAW = 0x80
_TLV = struct.Struct("<HH")
_TYPED_TLV = struct.Struct("<HHH")  # after a header
_OPAQUE_MAGIC = b"NVDAOD\0\0"  # with profile 0

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
class Measurement:
    """One block in DMTF's form.

    Attributes:
        index: 1 to 254; NVIDIA's RIM index is one less.
        kind: what was measured, bits 6:0 (0 immutable ROM, 1 mutable firmware, 2 hardware configuration …); bit 7: a raw value.
        value: a SHA-384 digest, 48 bytes, or any raw value.
    """

    index: int
    kind: int
    value: bytes

    @property
    def packed(self) -> bytes:
        """The block as it stands in a report."""
        size = len(self.value)
        return _BLOCK.pack(self.index, 1, _BLOCK_HEAD_BYTES + size, self.kind, size) + self.value


def firmware_digests(digests: Iterable[bytes]) -> tuple[Measurement, ...]:
    """Blocks of mutable firmware from index 1 on: all that a GSP and an NVSwitch measure."""
    return tuple(Measurement(index, 1, digest) for index, digest in enumerate(digests, 1))


@dataclass(frozen=True, slots=True)
class OpaqueHeader:
    """What stands before opaque data of drivers of 2026.

    Attributes:
        major, minor: version of the format, a byte each.
        value_types: of each field in the order of the report, two bytes each.
    """

    major: int
    minor: int
    value_types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One report, of a GPU or (same format) of an NVSwitch.

    Attributes:
        requester_nonce: 32 bytes, what the caller of the device asked for.
        measurements: in the order of the report; no index occurs twice.
        responder_nonce: 32 bytes, the device's own.
        opaque: (type, value) in the order of the report; no type occurs twice, unknown types are kept.
        signature: r ‖ s, 96 bytes, big endian.
        trailing_bytes: number of zero bytes after the signature, not signed; at most 3.
        opaque_header: None from drivers that write none.
    """

    requester_nonce: GpuNonce
    measurements: tuple[Measurement, ...]
    responder_nonce: bytes
    opaque: tuple[tuple[int, bytes], ...]
    signature: bytes
    trailing_bytes: int = 0
    opaque_header: OpaqueHeader | None = None

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers: request and response without it."""
        record = b"".join(block.packed for block in self.measurements)
        opaque = _pack_opaque(self.opaque, self.opaque_header)
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
    record = reader.take("measurement-record", reader.number("measurement-record-length", 3))
    measurements = _parse_measurements(record, blocks)
    responder_nonce = reader.take("responder-nonce", RESPONDER_NONCE_BYTES)
    opaque, header = _parse_opaque(reader.take("opaque-data", reader.number("opaque-length", 2)))
    signature = reader.take("signature", SIGNATURE_BYTES)
    trailing = reader.rest()
    # refusal: test_other_trailing_bytes_are_malformed
    if len(trailing) > MAX_TRAILING_BYTES or any(trailing):
        raise _malformed("trailing-bytes", len(trailing), 0)

    return GpuReport(requester_nonce, measurements, responder_nonce, opaque, signature, len(trailing), header)


def pack_report(report: GpuReport) -> bytes:
    """The exact inverse of `parse_report`."""
    return report.signed_bytes + report.signature + bytes(report.trailing_bytes)


def _parse_measurements(record: bytes, blocks: int) -> tuple[Measurement, ...]:
    measurements: dict[int, Measurement] = {}
    reader = _Reader(record)
    for _ in range(blocks):
        index = reader.number("block-index", 1)
        # With an index given twice, two readers could believe two different values under one signature.
        # refusal: test_every_block_has_an_index_of_its_own
        if index not in _INDICES or index in measurements:
            raise _malformed("block-index", index)
        reader.constant("block-specification", 1, 1)
        size, kind, length = reader.number("block-size", 2), reader.number("block-type", 1), reader.number("block-length", 2)
        # refusal: test_every_constant_of_the_layout_is_checked
        if size != _BLOCK_HEAD_BYTES + length:
            raise _malformed("block-size", size, _BLOCK_HEAD_BYTES + length)
        # refusal: test_a_digest_is_one_of_sha384
        if not kind & _RAW and length != DIGEST_BYTES:
            raise _malformed("block-length", length, DIGEST_BYTES)
        measurements[index] = Measurement(index, kind, reader.take("block-value", length))
    # refusal: test_the_record_holds_its_blocks_and_nothing_else
    if reader.left():
        raise _malformed("measurement-record-length", len(record), len(record) - reader.left())
    return tuple(measurements.values())


def _pack_opaque(fields: tuple[tuple[int, bytes], ...], header: OpaqueHeader | None) -> bytes:
    if header is None:
        return b"".join(_TLV.pack(kind, len(value)) + value for kind, value in fields)
    packed = (
        _TYPED_TLV.pack(kind, of_value, len(value)) + value
        for (kind, value), of_value in zip(fields, header.value_types, strict=True)
    )
    return _OPAQUE_MAGIC + bytes((header.major, header.minor, 0, 0)) + b"".join(packed)


def _parse_opaque(data: bytes) -> tuple[tuple[tuple[int, bytes], ...], OpaqueHeader | None]:
    fields: dict[int, bytes] = {}
    reader = _Reader(data)
    has_header = data.startswith(_OPAQUE_MAGIC)
    major = minor = 0
    if has_header:
        reader.take("opaque-header", len(_OPAQUE_MAGIC))
        major, minor = reader.number("opaque-header", 1), reader.number("opaque-header", 1)
        reader.constant("opaque-header", 2, 0)
    value_types: list[int] = []
    while reader.left():
        kind = reader.number("opaque-type", 2)
        if has_header:
            value_types.append(reader.number("opaque-value-type", 2))
        size = reader.number("opaque-size", 2)
        # With a type given twice, two readers could believe two different values under one signature.
        # refusal: test_opaque_fields_have_the_shape_their_type_asks_for
        if kind == _OPAQUE_INVALID or kind in fields:
            raise _malformed("opaque-type", kind)
        fields[kind] = reader.take("opaque-value", size)
    for kind, value in fields.items():
        _check_shape(kind, value)
    return tuple(fields.items()), OpaqueHeader(major, minor, tuple(value_types)) if has_header else None


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
