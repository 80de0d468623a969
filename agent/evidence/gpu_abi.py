"""The NVIDIA GPU attestation report: an SPDM 1.1 GET_MEASUREMENTS request and its MEASUREMENTS response, as bytes.

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
devices that append zero bytes after the signature.
Spec: DMTF DSP0274 1.1.0, tables GET_MEASUREMENTS request and MEASUREMENTS response; NVIDIA attestation-sdk, opaque field ids.
"""

import re
import struct
from dataclasses import dataclass

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
OPAQUE_VBIOS_VERSION = 6
OPAQUE_CHIP_SKU = 15
OPAQUE_PROJECT = 17
OPAQUE_PROJECT_SKU = 18
OPAQUE_FWID = 20
OPAQUE_FEATURE_FLAG = 36
_OPAQUE_INVALID = 255
_GPU_VBIOS_BYTES = 8
_TEXT = re.compile(r"[!-~]{1,64}")


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

    @property
    def driver_version(self) -> str | None:
        """For example `580.95.05`; an NVSwitch has none."""
        return self._text(OPAQUE_DRIVER_VERSION, "driver-version")

    @property
    def vbios_version(self) -> str | None:
        """For example `96.00.74.00.1A`: a GPU packs it into eight bytes, an NVSwitch writes text."""
        value = self._value(OPAQUE_VBIOS_VERSION)
        if value is None or len(value) != _GPU_VBIOS_BYTES:
            return self._text(OPAQUE_VBIOS_VERSION, "vbios-version")
        return ".".join(f"{byte:02X}" for byte in (*value[3::-1], value[4]))

    @property
    def project(self) -> str | None:
        return self._text(OPAQUE_PROJECT, "project")

    @property
    def project_sku(self) -> str | None:
        return self._text(OPAQUE_PROJECT_SKU, "project-sku")

    @property
    def chip_sku(self) -> str | None:
        return self._text(OPAQUE_CHIP_SKU, "chip-sku")

    @property
    def fwid(self) -> bytes | None:
        """48 bytes: the digest of the firmware that holds the signing key. Drivers before 550 do not report it."""
        return self._sized(OPAQUE_FWID, DIGEST_BYTES, "fwid")

    @property
    def feature_flag(self) -> int | None:
        """0 one GPU, 1 several GPUs, 2 protected PCIe. Drivers before 580 do not report it."""
        value = self._sized(OPAQUE_FEATURE_FLAG, 2, "feature-flag")
        return None if value is None else int.from_bytes(value, "little")

    def _value(self, kind: int) -> bytes | None:
        return next((value for found, value in self.opaque if found == kind), None)

    def _sized(self, kind: int, size: int, field: str) -> bytes | None:
        value = self._value(kind)
        if value is not None and len(value) != size:
            raise _malformed(field, len(value), size)
        return value

    def _text(self, kind: int, field: str) -> str | None:
        value = self._value(kind)
        if value is None:
            return None
        text = value.rstrip(b"\0").decode("latin-1")
        if not _TEXT.fullmatch(text):
            raise _malformed(field)
        return text


def parse_report(report: bytes) -> GpuReport:
    """Parse one report.

    Args:
        report: about 4 KiB, as the driver returned it.
    Raises:
        MalformedEvidenceError: names the first field that is not as the layout wants it.
    """
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
    if len(trailing) > MAX_TRAILING_BYTES or any(trailing):
        raise _malformed("trailing-bytes", len(trailing), 0)

    parsed = GpuReport(requester_nonce, tuple(measurements), responder_nonce, opaque, signature, len(trailing))
    # Reading a field checks its shape: whoever holds a GpuReport can read it without an error.
    _ = (parsed.driver_version, parsed.vbios_version, parsed.fwid, parsed.feature_flag)
    _ = (parsed.project, parsed.project_sku, parsed.chip_sku)
    return parsed


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
        if kind == _OPAQUE_INVALID or kind in fields:
            raise _malformed("opaque-type", kind)
        fields[kind] = reader.take("opaque-value", size)
    return tuple(fields.items())


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, field: str, size: int) -> bytes:
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
        if got != expected:
            raise _malformed(field, got, expected)


def _malformed(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.NVIDIA_REPORT, Ident(field), got, expected)
