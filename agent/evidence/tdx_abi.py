"""Byte layouts of TDX: the TDREPORT a TD gets from its module, and the quote a Quoting Enclave makes of it.

Does not check signatures and does not judge: `agent/verify/tdx.py` verifies, the broker appraises. Every reserved byte and
every length is checked, so whatever a parser accepts its `pack_*` gives back byte for byte. Little endian, but for
signatures and keys.

Spec: Intel 348551 "TDX Module 1.5 ABI", TDREPORT_STRUCT; Intel "TDX DCAP Quote Generation Library", appendix A (quotes 4, 5);
Intel DCAP, quote verification library (body of TDX 1.5 with extensions).
"""

import hashlib
import struct
from dataclasses import astuple, dataclass
from typing import Any

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError

TDREPORT_BYTES = 1024
MAX_QUOTE_BYTES = 128 << 10
"""What the kernel's quote buffer holds. A quote is about 5 KiB, padded to 8 KiB on some clouds."""
QUOTE_VERSIONS = (4, 5)
TEE_TYPE_TDX = 0x81
ATTESTATION_KEY_ECDSA_P256 = 2
BODY_TD_1_0 = 2
BODY_TD_1_5 = 3
BODY_TD_1_5_EXTENDED = 4
CERTIFICATION_QE_REPORT = 6
CERTIFICATION_PCK_CHAIN = 5

_TUD_BITS = 0xFF
_TUD_RESERVED_BITS = 0b1000_1110
# ICSSD 16, SERVTD_EXT 17, LASS 27, SEPT_VE_DISABLE 28, MIGRATABLE 29, PKS 30, KL 31, TPA 62, PERFMON 63
_ATTRIBUTE_BITS = (_TUD_BITS ^ _TUD_RESERVED_BITS) | sum(1 << bit for bit in (16, 17, 27, 28, 29, 30, 31, 62, 63))


class TdAttributes(int):
    """ATTRIBUTES of a TD, as the 64-bit integer and by its bits."""

    __slots__ = ()

    @property
    def debug(self) -> bool:
        """May the host read and write the TD's memory? Such a TD keeps no secret."""
        return bool(self & 1)

    @property
    def under_debug(self) -> int:
        """The whole TUD group: debugging and profiling by the host. The TD is to be trusted only when it is zero."""
        return self & _TUD_BITS

    @property
    def service_td_extensions(self) -> bool:
        """May service TDs be bound to it after its creation?"""
        return bool(self >> 17 & 1)

    @property
    def sept_ve_disable(self) -> bool:
        """Does a page that the host took away stop the TD instead of asking it?"""
        return bool(self >> 28 & 1)

    @property
    def migratable(self) -> bool:
        """May a migration TD move it to another machine?"""
        return bool(self >> 29 & 1)

    @property
    def pks(self) -> bool:
        """May it use protection keys for supervisor pages?"""
        return bool(self >> 30 & 1)

    @property
    def key_locker(self) -> bool:
        return bool(self >> 31 & 1)

    @property
    def perfmon(self) -> bool:
        """May it use performance counters?"""
        return bool(self >> 63 & 1)


@dataclass(frozen=True, slots=True)
class TdExtension:
    """What newer modules of TDX 1.5 add to a quote's body. Hashes and attributes of service TDs are zero without such TDs.

    Attributes:
        vm_id: 0 for the TD itself, 1 to 3 for a virtual machine inside it.
        td_id: of this launch; stays with the TD when the module is updated or the TD moves.
        device_info: hash of what is known of attached devices.
        init_service_td_hash, init_service_td_attributes: of the service TDs bound at creation.
        init_cpu_svn, init_tee_tcb_svn, init_tee_fmspc: the platform at creation.
        service_td_hash, service_td_attributes: of the service TDs bound now.
    """

    vm_id: int
    td_id: bytes  # 32
    device_info: bytes  # 48
    init_service_td_hash: bytes  # 48
    init_service_td_attributes: int
    init_cpu_svn: bytes  # 16
    init_tee_tcb_svn: bytes  # 16
    init_tee_fmspc: bytes  # 12
    service_td_hash: bytes  # 48
    service_td_attributes: int


@dataclass(frozen=True, slots=True)
class TdBody:
    """What TDREPORT and quote both say of a TD. The last three are None in a body of TDX 1.0, the last one in most others.

    Attributes:
        mr_signer_seam: who signed the TDX module; zero for Intel.
        seam_attributes: zero for a production module.
        xfam: the extended features it may use, as XCR0 and IA32_XSS have them.
        mr_td: measurement of the initial contents.
        mr_config_id: set by the host at launch; Kata's initdata digest (SHA-384, or a shorter one padded with zeros).
        rtmr_0: extended by the firmware, like rtmr_1 (boot loader), rtmr_2 (kernel) and rtmr_3 (at run time) by others.
        report_data: the guest's 64 bytes.
        tee_tcb_svn_2: the module as it is now; `tee_tcb_svn` is the one the TD was launched under.
        mr_service_td: of the bound service TDs; zero without.
    """

    tee_tcb_svn: bytes  # 16
    mr_seam: bytes  # 48
    mr_signer_seam: bytes  # 48
    seam_attributes: int
    td_attributes: TdAttributes
    xfam: int
    mr_td: bytes  # 48
    mr_config_id: bytes  # 48
    mr_owner: bytes  # 48
    mr_owner_config: bytes  # 48
    rtmr_0: bytes  # 48
    rtmr_1: bytes  # 48
    rtmr_2: bytes  # 48
    rtmr_3: bytes  # 48
    report_data: bytes  # 64
    tee_tcb_svn_2: bytes | None = None  # 16
    mr_service_td: bytes | None = None  # 48
    extension: TdExtension | None = None

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        return self.rtmr_0, self.rtmr_1, self.rtmr_2, self.rtmr_3


def _malformed(
    field: str, got: int | None = None, expected: int | None = None, where: EvidenceFormat = EvidenceFormat.TDX_QUOTE
) -> MalformedEvidenceError:
    return MalformedEvidenceError(where, Ident(field), got, expected)


def _must_be_zero(field: str, data: bytes, where: EvidenceFormat = EvidenceFormat.TDX_QUOTE) -> None:
    if any(data):
        raise _malformed(field, where=where)


def _parse_attributes(value: int, where: EvidenceFormat) -> TdAttributes:
    if value & ~_ATTRIBUTE_BITS:
        raise _malformed("td_attributes", value, where=where)
    return TdAttributes(value)


# --- TDREPORT ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TdReport:
    """One TDREPORT. Its MAC is made with a key that never leaves the processor: nobody else can check it.

    Attributes:
        version: 0, or 1 where service TDs are bound.
        valid: which 8-byte words of TEE_TCB_INFO hold something, one bit each.
        body: of the 1.5 form: a module of TDX 1.0 leaves `tee_tcb_svn_2` zero.
    """

    version: int
    cpu_svn: bytes  # 16
    mac: bytes  # 32
    valid: int
    body: TdBody


_MAC_STRUCT = struct.Struct("<BBBB12s16s48s48s64s32s32s")  # REPORTMACSTRUCT
_TCB_INFO = struct.Struct("<Q16s48s48sQ16s95s")
_TCB_INFO_START = _MAC_STRUCT.size
_TD_INFO_START = 512
_TD_INFO = struct.Struct("<QQ48s48s48s48s48s48s48s48s48s64s")
_VALID_BITS = (1 << 18) - 1  # up to TEE_TCB_SVN2


def parse_tdreport(data: bytes) -> TdReport:
    """The TDREPORT in `data`.

    Args:
        data: 1024 bytes.

    Raises:
        MalformedEvidenceError: wrong length, type or version, a reserved bit that is set, or a part that does not have
            the digest which the MAC covers.
    """
    where = EvidenceFormat.TDX_REPORT
    if len(data) != TDREPORT_BYTES:
        raise _malformed("length", len(data), TDREPORT_BYTES, where)
    (
        tee_type, subtype, version, reserved_003, reserved_004, cpu_svn, tcb_info_hash, td_info_hash, report_data,
        reserved_0c0, mac,
    ) = _MAC_STRUCT.unpack_from(data)  # fmt: skip
    valid, tcb_svn, mr_seam, mr_signer_seam, seam_attributes, tcb_svn_2, reserved_190 = _TCB_INFO.unpack_from(
        data, _TCB_INFO_START
    )
    reserved_1ef = data[_TCB_INFO_START + _TCB_INFO.size : _TD_INFO_START]
    (
        attributes, xfam, mr_td, mr_config_id, mr_owner, mr_owner_config, rtmr_0, rtmr_1, rtmr_2, rtmr_3, service_td,
        reserved_3c0,
    ) = _TD_INFO.unpack_from(data, _TD_INFO_START)  # fmt: skip

    if tee_type != TEE_TYPE_TDX:
        raise _malformed("type", tee_type, TEE_TYPE_TDX, where)
    if subtype:
        raise _malformed("subtype", subtype, 0, where)
    if version > 1:
        raise _malformed("version", version, where=where)
    _must_be_zero("reserved_003", bytes((reserved_003,)), where)
    _must_be_zero("reserved_004", reserved_004, where)
    _must_be_zero("reserved_0c0", reserved_0c0, where)
    if valid & ~_VALID_BITS:
        raise _malformed("valid", valid, where=where)
    _must_be_zero("reserved_190", reserved_190, where)
    _must_be_zero("reserved_1ef", reserved_1ef, where)
    _must_be_zero("reserved_3c0", reserved_3c0, where)
    if version < 1:
        _must_be_zero("service_td", service_td, where)
    if hashlib.sha384(data[_TCB_INFO_START : _TCB_INFO_START + _TCB_INFO.size]).digest() != tcb_info_hash:
        raise _malformed("tee_tcb_info_hash", where=where)
    if hashlib.sha384(data[_TD_INFO_START:]).digest() != td_info_hash:
        raise _malformed("tee_info_hash", where=where)

    body = TdBody(
        tcb_svn, mr_seam, mr_signer_seam, seam_attributes, _parse_attributes(attributes, where), xfam, mr_td, mr_config_id,
        mr_owner, mr_owner_config, rtmr_0, rtmr_1, rtmr_2, rtmr_3, report_data, tcb_svn_2, service_td,
    )  # fmt: skip
    return TdReport(version, cpu_svn, mac, valid, body)


def pack_tdreport(report: TdReport) -> bytes:
    """The 1024 bytes of `report`, with both digests; the inverse of `parse_tdreport`.

    Raises:
        MalformedEvidenceError: a field has a value that no report can have.
        ValueError: the fields do not fit together or into their sizes.
    """
    body = report.body
    try:
        tcb_info = _TCB_INFO.pack(
            report.valid, body.tee_tcb_svn, body.mr_seam, body.mr_signer_seam, body.seam_attributes,
            body.tee_tcb_svn_2 or b"", b"",
        )  # fmt: skip
        td_info = _TD_INFO.pack(
            body.td_attributes, body.xfam, body.mr_td, body.mr_config_id, body.mr_owner, body.mr_owner_config, *body.rtmrs,
            body.mr_service_td or b"", b"",
        )  # fmt: skip
        mac_struct = _MAC_STRUCT.pack(
            TEE_TYPE_TDX, 0, report.version, 0, b"", report.cpu_svn, hashlib.sha384(tcb_info).digest(),
            hashlib.sha384(td_info).digest(), body.report_data, b"", report.mac,
        )  # fmt: skip
    except struct.error as exc:
        raise ValueError("a field does not fit") from exc
    data = (mac_struct + tcb_info).ljust(_TD_INFO_START, b"\0") + td_info
    if parse_tdreport(data) != report:  # struct cuts and pads byte strings silently
        raise ValueError("the fields do not fit together")
    return data


# --- quote ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QeReport:
    """The SGX report of the Quoting Enclave, which certifies the attestation key.

    Attributes:
        attributes: 8 bytes of flags and 8 of XFRM.
        report_data: SHA-256 over attestation key and authentication data, then 32 zeros.
    """

    cpu_svn: bytes  # 16
    misc_select: int
    attributes: bytes  # 16
    mr_enclave: bytes  # 32
    mr_signer: bytes  # 32
    isv_prod_id: int
    isv_svn: int
    report_data: bytes  # 64


@dataclass(frozen=True, slots=True)
class TdxQuote:
    """One quote with ECDSA P-256 attestation key and PCK certificate chain: all that Intel's Quoting Enclave makes.

    Attributes:
        qe_svn: like `pce_svn` only in some revisions of the document, reserved in others; zero in practice.
        qe_vendor_id: 16 bytes.
        user_data: 20 bytes, the first 16 of which identify the Quoting Enclave's platform.
        body: of TDX 1.0 in version 4, of any in version 5.
        signature: r and s, 32 bytes each, by the attestation key over `signed_part`.
        attestation_key: x and y, 32 bytes each.
        qe_report_signature: r and s, 32 bytes each, by the PCK over the packed `qe_report`.
        qe_auth_data: at most 65535 bytes.
        pck_chain: PEM: PCK certificate, its issuer, root; often with a zero byte at its end.
    """

    version: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes
    body: TdBody
    signature: bytes
    attestation_key: bytes
    qe_report: QeReport
    qe_report_signature: bytes
    qe_auth_data: bytes
    pck_chain: bytes


_HEADER = struct.Struct("<HHIHH16s20s")
_BODY_DESCRIPTOR = struct.Struct("<HI")  # version 5: type, size
_BODY_1_0 = struct.Struct("<16s48s48sQQQ48s48s48s48s48s48s48s48s64s")
_BODY_1_5 = struct.Struct("<16s48s")  # what TDX 1.5 appends
_BODY_EXTENSION = struct.Struct("<B32s48s48sQ16s16s12s48sQ")  # what newer modules of TDX 1.5 append to that
_LENGTH = struct.Struct("<I")
_SIGNATURE = struct.Struct("<64s64s")
_CERTIFICATION = struct.Struct("<HI")  # type, size
_QE_REPORT = struct.Struct("<16sI28s16s32s32s32s96sHH60s64s")
_AUTH_LENGTH = struct.Struct("<H")
_BODY_BYTES = {
    BODY_TD_1_0: _BODY_1_0.size,
    BODY_TD_1_5: _BODY_1_0.size + _BODY_1_5.size,
    BODY_TD_1_5_EXTENDED: _BODY_1_0.size + _BODY_1_5.size + _BODY_EXTENSION.size,
}


def quote_length(data: bytes) -> int:
    """How many bytes of `data` are the quote, by the lengths inside.

    What follows is the padding of a cloud or, from kernels before March 2026, whatever lay in the host's buffer: it is cut
    off before a quote is sent anywhere.

    Raises:
        MalformedEvidenceError: no TDX quote of version 4 or 5 begins here, or it is cut short.
    """
    body_start, body_type = _parse_descriptor(data)
    end = _Reader(data, body_start + _BODY_BYTES[body_type])
    (length,) = end.unpack("signature_data_length", _LENGTH)
    end.take("signature_data", length)
    return end.position


def quote_report_data(data: bytes) -> bytes:
    """The report data of the quote that `quote_length` has found: 64 bytes at one place in every body."""
    end_of_1_0 = _parse_descriptor(data)[0] + _BODY_1_0.size
    return data[end_of_1_0 - 64 : end_of_1_0]


def parse_quote(data: bytes, *, ignore_trailing: bool = False) -> TdxQuote:
    """The quote in `data`.

    Args:
        data: at most 128 KiB, as the device gave it. Zeros may follow the quote: configfs returns the host's whole buffer.
        ignore_trailing: anything may follow.

    Raises:
        MalformedEvidenceError: too long, too short, a version, type or length that does not fit, or a reserved bit that is
            set; `field` names it.
    """
    if len(data) > MAX_QUOTE_BYTES:
        raise _malformed("length", len(data), MAX_QUOTE_BYTES)
    length = quote_length(data)
    if not ignore_trailing:
        _must_be_zero("trailing", data[length:])
    version, _, _, qe_svn, pce_svn, vendor, user_data = _HEADER.unpack_from(data)
    body_start, body_type = _parse_descriptor(data)
    body = _parse_body(data, body_start, body_type)

    signature_start = body_start + _BODY_BYTES[body_type] + _LENGTH.size
    reader = _Reader(data[:length], signature_start)
    signature, attestation_key = reader.unpack("signature_data", _SIGNATURE)
    reader.certification("certification", CERTIFICATION_QE_REPORT)
    qe_report = _parse_qe_report(reader.take("qe_report", _QE_REPORT.size))
    qe_report_signature = reader.take("qe_report_signature", 64)
    (auth_length,) = reader.unpack("qe_auth_data_length", _AUTH_LENGTH)
    qe_auth_data = reader.take("qe_auth_data", auth_length)
    reader.certification("qe_certification", CERTIFICATION_PCK_CHAIN)
    pck_chain = reader.take("pck_chain", length - reader.position)

    return TdxQuote(
        version, qe_svn, pce_svn, vendor, user_data, body, signature, attestation_key, qe_report, qe_report_signature,
        qe_auth_data, pck_chain,
    )  # fmt: skip


def pack_quote(quote: TdxQuote) -> bytes:
    """The bytes of `quote` without padding; the inverse of `parse_quote`.

    Raises:
        MalformedEvidenceError: a field has a value that no quote can have.
        ValueError: the fields do not fit together or into their sizes.
    """
    try:
        inner = (
            pack_qe_report(quote.qe_report)
            + quote.qe_report_signature
            + _AUTH_LENGTH.pack(len(quote.qe_auth_data))
            + quote.qe_auth_data
            + _CERTIFICATION.pack(CERTIFICATION_PCK_CHAIN, len(quote.pck_chain))
            + quote.pck_chain
        )
        signature_data = (
            quote.signature + quote.attestation_key + _CERTIFICATION.pack(CERTIFICATION_QE_REPORT, len(inner)) + inner
        )
        data = signed_part(quote) + _LENGTH.pack(len(signature_data)) + signature_data
    except struct.error as exc:
        raise ValueError("a field does not fit") from exc
    if parse_quote(data) != quote:
        raise ValueError("the fields do not fit together")
    return data


def signed_part(quote: TdxQuote) -> bytes:
    """Header and body of `quote`: what the attestation key signs. Exactly the bytes that were parsed."""
    body = quote.body
    body_type = BODY_TD_1_0
    packed = _BODY_1_0.pack(
        body.tee_tcb_svn, body.mr_seam, body.mr_signer_seam, body.seam_attributes, body.td_attributes, body.xfam,
        body.mr_td, body.mr_config_id, body.mr_owner, body.mr_owner_config, *body.rtmrs, body.report_data,
    )  # fmt: skip
    if body.tee_tcb_svn_2 is not None and body.mr_service_td is not None:
        body_type = BODY_TD_1_5
        packed += _BODY_1_5.pack(body.tee_tcb_svn_2, body.mr_service_td)
    if body.extension is not None:
        body_type = BODY_TD_1_5_EXTENDED
        packed += _BODY_EXTENSION.pack(*astuple(body.extension))
    if quote.version >= 5:
        packed = _BODY_DESCRIPTOR.pack(body_type, len(packed)) + packed
    return (
        _HEADER.pack(
            quote.version, ATTESTATION_KEY_ECDSA_P256, TEE_TYPE_TDX, quote.qe_svn, quote.pce_svn, quote.qe_vendor_id,
            quote.user_data,
        )
        + packed
    )  # fmt: skip


def pack_qe_report(report: QeReport) -> bytes:
    """The 384 bytes of `report`: what the PCK signs. Exactly the bytes that were parsed."""
    return _QE_REPORT.pack(
        report.cpu_svn, report.misc_select, b"", report.attributes, report.mr_enclave, b"", report.mr_signer, b"",
        report.isv_prod_id, report.isv_svn, b"", report.report_data,
    )  # fmt: skip


class _Reader:
    """A position in bytes that never passes their end."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.position = position

    def take(self, field: str, size: int) -> bytes:
        left = max(len(self._data) - self.position, 0)
        if size > left:
            raise _malformed(field, left, size)
        self.position += size
        return self._data[self.position - size : self.position]

    def unpack(self, field: str, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(field, layout.size))

    def certification(self, field: str, expected: int) -> None:
        """Type and size of certification data, which fills all that is left."""
        kind, size = self.unpack(f"{field}_header", _CERTIFICATION)
        if kind != expected:
            raise _malformed(f"{field}_type", kind, expected)
        if size != len(self._data) - self.position:
            raise _malformed(f"{field}_size", size, len(self._data) - self.position)


def _parse_descriptor(data: bytes) -> tuple[int, int]:
    """Where the body starts, and its type. The header is that of a TDX quote."""
    reader = _Reader(data, 0)
    version, key_type, tee_type, *_ = reader.unpack("header", _HEADER)
    if version not in QUOTE_VERSIONS:
        raise _malformed("version", version)
    if key_type != ATTESTATION_KEY_ECDSA_P256:
        raise _malformed("attestation_key_type", key_type, ATTESTATION_KEY_ECDSA_P256)
    if tee_type != TEE_TYPE_TDX:
        raise _malformed("tee_type", tee_type, TEE_TYPE_TDX)
    if version == 4:
        return reader.position, BODY_TD_1_0
    body_type, size = reader.unpack("body_descriptor", _BODY_DESCRIPTOR)
    if body_type not in _BODY_BYTES:
        raise _malformed("body_type", body_type)
    if size != _BODY_BYTES[body_type]:
        raise _malformed("body_size", size, _BODY_BYTES[body_type])
    return reader.position, body_type


def _parse_body(data: bytes, start: int, body_type: int) -> TdBody:
    tcb_svn, mr_seam, mr_signer_seam, seam_attributes, attributes, xfam, *rest = _BODY_1_0.unpack_from(data, start)
    more: tuple[Any, ...] = ()
    if body_type != BODY_TD_1_0:
        more = _BODY_1_5.unpack_from(data, start + _BODY_1_0.size)
    if body_type == BODY_TD_1_5_EXTENDED:
        more += (TdExtension(*_BODY_EXTENSION.unpack_from(data, start + _BODY_BYTES[BODY_TD_1_5])),)
    td_attributes = _parse_attributes(attributes, EvidenceFormat.TDX_QUOTE)
    return TdBody(tcb_svn, mr_seam, mr_signer_seam, seam_attributes, td_attributes, xfam, *rest, *more)


def _parse_qe_report(data: bytes) -> QeReport:
    (
        cpu_svn, misc_select, reserved_014, attributes, mr_enclave, reserved_060, mr_signer, reserved_0a0, prod_id, svn,
        reserved_104, report_data,
    ) = _QE_REPORT.unpack(data)  # fmt: skip
    _must_be_zero("qe_report_reserved_014", reserved_014)
    _must_be_zero("qe_report_reserved_060", reserved_060)
    _must_be_zero("qe_report_reserved_0a0", reserved_0a0)
    _must_be_zero("qe_report_reserved_104", reserved_104)
    return QeReport(cpu_svn, misc_select, attributes, mr_enclave, mr_signer, prod_id, svn, report_data)
