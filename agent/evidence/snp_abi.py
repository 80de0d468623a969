"""Byte layouts of SEV-SNP: the attestation report, the host's certificate table, and what `/dev/sev-guest` takes and answers.

Does not check signatures and does not judge: `agent/verify/snp.py` verifies, the broker appraises. Every reserved byte
and bit must be zero, so whatever `parse_report` accepts `pack_report` gives back byte for byte. Only PLATFORM_INFO may say
more than we know: firmware gives its bits a meaning without a new version, and they describe the machine, not the guest.

Spec: AMD 56860 "SEV-SNP Firmware ABI", ATTESTATION_REPORT; certificate table: AMD 56421 "GHCB", SNP Extended Guest Request;
device: Linux 6.12, include/uapi/linux/sev-guest.h.
"""

import enum
import struct
from dataclasses import dataclass
from uuid import UUID

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError

REPORT_BYTES = 1184
SIGNED_BYTES = 0x2A0
"""The signature covers the report up to the signature itself."""
PARSED_VERSIONS = range(2, 6)
SIGNATURE_ALGORITHM_ECDSA_P384_SHA384 = 1
TURIN_FAMILY = 0x1A
"""From this CPUID family on TCB versions have the FMC layout. Milan and Genoa are family 0x19."""


class Product(enum.Enum):
    """Processor generations, by the names AMD's certificates use."""

    MILAN = "Milan"
    GENOA = "Genoa"  # includes Bergamo and Siena
    TURIN = "Turin"
    VENICE = "Venice"


_PRODUCT_MODELS: tuple[tuple[int, range, Product], ...] = (
    (0x19, range(0x10), Product.MILAN),
    (0x19, range(0x10, 0x20), Product.GENOA),
    (0x19, range(0xA0, 0xB0), Product.GENOA),
    (0x1A, range(0x12), Product.TURIN),
    (0x1A, range(0x50, 0x58), Product.VENICE),
    (0x1A, range(0x90, 0xB0), Product.VENICE),
    (0x1A, range(0xC0, 0xC8), Product.VENICE),
)


class SigningKey(enum.IntEnum):
    """Which key the firmware signed with: KEY_INFO bits 4:2."""

    VCEK = 0
    VLEK = 1
    NONE = 7


class GuestPolicy(int):
    """The policy the guest was launched with, as the 64-bit integer and by its bits."""

    __slots__ = ()

    @property
    def abi_minor(self) -> int:
        return self & 0xFF

    @property
    def abi_major(self) -> int:
        return self >> 8 & 0xFF

    @property
    def smt(self) -> bool:
        """May the guest run where simultaneous multithreading is on?"""
        return bool(self >> 16 & 1)

    @property
    def migrate_ma(self) -> bool:
        """May a migration agent move the guest to another machine?"""
        return bool(self >> 18 & 1)

    @property
    def debug(self) -> bool:
        """May the host read and write the guest's memory? Such a guest keeps no secret."""
        return bool(self >> 19 & 1)

    @property
    def single_socket(self) -> bool:
        return bool(self >> 20 & 1)


@dataclass(frozen=True, slots=True)
class TcbVersion:
    """Security patch levels, 0..255 each. `fmc` is None in the layout of Milan and Genoa, which have no such part."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    def pack(self) -> bytes:
        """8 bytes as in the report."""
        if self.fmc is None:
            return bytes((self.bootloader, self.tee, 0, 0, 0, 0, self.snp, self.microcode))
        return bytes((self.fmc, self.bootloader, self.tee, self.snp, 0, 0, 0, self.microcode))


@dataclass(frozen=True, slots=True)
class FirmwareVersion:
    major: int
    minor: int
    build: int


@dataclass(frozen=True, slots=True)
class SnpReport:
    """One ATTESTATION_REPORT, version 2 to 5. Fields a version does not have are None.

    Attributes:
        platform_info: bit 0 SMT on, 1 TSME, 2 ECC memory, 3 RAPL disabled, 4 ciphertext hiding, 5 alias check done, 7 TIO;
            64 bits as they came.
        mask_chip_key: the host has switched the chip's key off: without a VLEK the signature is zero.
        reported_tcb: the one the signing key was derived from; the host may report less than `current_tcb`.
        chip_id: zero where the host masks it or the key is a VLEK; Turin uses the first 8 bytes.
        signature_r, signature_s: below 2**384.
    """

    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes  # 16
    image_id: bytes  # 16
    vmpl: int
    signature_algorithm: int
    current_tcb: TcbVersion
    platform_info: int
    author_key_enabled: bool
    mask_chip_key: bool
    signing_key: SigningKey
    report_data: bytes  # 64
    measurement: bytes  # 48
    host_data: bytes  # 32
    id_key_digest: bytes  # 48
    author_key_digest: bytes  # 48
    report_id: bytes  # 32
    report_id_ma: bytes  # 32
    reported_tcb: TcbVersion
    cpuid_family: int | None  # version 3 and later
    cpuid_model: int | None
    cpuid_stepping: int | None
    chip_id: bytes  # 64
    committed_tcb: TcbVersion
    current_firmware: FirmwareVersion
    committed_firmware: FirmwareVersion
    launch_tcb: TcbVersion
    launch_mitigations: int | None  # version 5
    current_mitigations: int | None
    signature_r: int
    signature_s: int


# Little endian. Everything unnamed in `parse_report`'s unpacking is reserved.
_REPORT = struct.Struct("<IIQ16s16sII8sQII64s48s32s48s48s32s32s8sBBB21s64s8sBBBBBBBB8sQQ152s72s72s368s")
_POLICY_BITS = (1 << 26) - 1
_POLICY_MUST_BE_ONE = 1 << 17
_KEY_INFO_BITS = 0b1_1111
_MAX_SCALAR = 1 << 384


def parse_report(data: bytes) -> SnpReport:
    """The report in `data`.

    Args:
        data: 1184 bytes, without the 32-byte message header of MSG_REPORT_RSP.

    Raises:
        MalformedEvidenceError: wrong length, a version outside 2 to 5, a reserved bit that is set, a value outside its
            range, or a report the host asked for itself (vmpl 0xffffffff), which says nothing about who runs inside.
    """
    # refusal: test_a_wrong_length_is_refused
    if len(data) != REPORT_BYTES:
        raise _malformed("length", len(data), REPORT_BYTES)
    (
        version, guest_svn, policy, family_id, image_id, vmpl, algorithm, current_tcb, platform_info, key_info, reserved_04c,
        report_data, measurement, host_data, id_key_digest, author_key_digest, report_id, report_id_ma, reported_tcb,
        cpuid_family, cpuid_model, cpuid_stepping, reserved_18b, chip_id, committed_tcb,
        current_build, current_minor, current_major, reserved_1eb,
        committed_build, committed_minor, committed_major, reserved_1ef,
        launch_tcb, launch_mitigations, current_mitigations, reserved_208, r, s, reserved_330,
    ) = _REPORT.unpack(data)  # fmt: skip

    # refusal: test_an_unknown_version_is_refused
    if version not in PARSED_VERSIONS:
        raise _malformed("version", version)
    # refusal: test_a_flipped_bit_is_refused_exactly_where_it_is_reserved_or_has_one_legal_value
    if policy & ~_POLICY_BITS or not policy & _POLICY_MUST_BE_ONE:
        raise _malformed("policy", policy)
    # refusal: test_a_report_the_host_asked_for_is_refused
    if vmpl > 3:
        raise _malformed("vmpl", vmpl)
    if algorithm != SIGNATURE_ALGORITHM_ECDSA_P384_SHA384:
        raise _malformed("signature_algorithm", algorithm, SIGNATURE_ALGORITHM_ECDSA_P384_SHA384)
    if key_info & ~_KEY_INFO_BITS or key_info >> 2 not in tuple(SigningKey):
        raise _malformed("key_info", key_info)
    _must_be_zero("reserved_04c", reserved_04c)
    _must_be_zero("reserved_18b", int.from_bytes(reserved_18b))
    _must_be_zero("reserved_1eb", reserved_1eb)
    _must_be_zero("reserved_1ef", reserved_1ef)
    _must_be_zero("reserved_208", int.from_bytes(reserved_208))
    _must_be_zero("reserved_330", int.from_bytes(reserved_330))
    if version < 3:
        _must_be_zero("cpuid", cpuid_family | cpuid_model | cpuid_stepping)
        turin = any(chip_id) and not any(chip_id[8:])
    else:
        turin = cpuid_family >= TURIN_FAMILY
    if version < 5:
        _must_be_zero("mitigations", launch_mitigations | current_mitigations)

    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        policy=GuestPolicy(policy),
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        signature_algorithm=algorithm,
        current_tcb=_parse_tcb("current_tcb", current_tcb, turin),
        platform_info=platform_info,
        author_key_enabled=bool(key_info & 1),
        mask_chip_key=bool(key_info & 2),
        signing_key=SigningKey(key_info >> 2),
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=_parse_tcb("reported_tcb", reported_tcb, turin),
        cpuid_family=cpuid_family if version >= 3 else None,
        cpuid_model=cpuid_model if version >= 3 else None,
        cpuid_stepping=cpuid_stepping if version >= 3 else None,
        chip_id=chip_id,
        committed_tcb=_parse_tcb("committed_tcb", committed_tcb, turin),
        current_firmware=FirmwareVersion(current_major, current_minor, current_build),
        committed_firmware=FirmwareVersion(committed_major, committed_minor, committed_build),
        launch_tcb=_parse_tcb("launch_tcb", launch_tcb, turin),
        launch_mitigations=launch_mitigations if version >= 5 else None,
        current_mitigations=current_mitigations if version >= 5 else None,
        signature_r=_parse_scalar("signature_r", r),
        signature_s=_parse_scalar("signature_s", s),
    )


def pack_report(report: SnpReport) -> bytes:
    """The 1184 bytes of `report`; the inverse of `parse_report`.

    Raises:
        MalformedEvidenceError: a field has a value that no report can have.
        ValueError: the fields do not fit together or into their sizes.
    """
    try:
        data = _REPORT.pack(
            report.version,
            report.guest_svn,
            report.policy,
            report.family_id,
            report.image_id,
            report.vmpl,
            report.signature_algorithm,
            report.current_tcb.pack(),
            report.platform_info,
            report.author_key_enabled | report.mask_chip_key << 1 | report.signing_key << 2,
            0,
            report.report_data,
            report.measurement,
            report.host_data,
            report.id_key_digest,
            report.author_key_digest,
            report.report_id,
            report.report_id_ma,
            report.reported_tcb.pack(),
            report.cpuid_family or 0,
            report.cpuid_model or 0,
            report.cpuid_stepping or 0,
            b"",
            report.chip_id,
            report.committed_tcb.pack(),
            report.current_firmware.build,
            report.current_firmware.minor,
            report.current_firmware.major,
            0,
            report.committed_firmware.build,
            report.committed_firmware.minor,
            report.committed_firmware.major,
            0,
            report.launch_tcb.pack(),
            report.launch_mitigations or 0,
            report.current_mitigations or 0,
            b"",
            report.signature_r.to_bytes(72, "little"),
            report.signature_s.to_bytes(72, "little"),
            b"",
        )
    except (struct.error, OverflowError) as exc:
        raise ValueError("a field does not fit") from exc
    if parse_report(data) != report:  # struct cuts and pads byte strings silently
        raise ValueError("the fields do not fit together")
    return data


def product_of(report: SnpReport) -> Product:
    """The processor generation that made the report.

    Raises:
        MalformedEvidenceError: a version 2 report, which does not say, or a processor we do not know.
    """
    for family, models, product in _PRODUCT_MODELS:
        if report.cpuid_family == family and report.cpuid_model in models:
            return product
    raise _malformed("cpuid", report.cpuid_model)


def _malformed(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.SNP_REPORT, Ident(field), got, expected)


def _must_be_zero(field: str, value: int) -> None:
    # refusal: test_a_flipped_bit_is_refused_exactly_where_it_is_reserved_or_has_one_legal_value
    if value:
        raise _malformed(field)


def _parse_tcb(field: str, data: bytes, turin: bool) -> TcbVersion:
    if turin:
        tcb = TcbVersion(fmc=data[0], bootloader=data[1], tee=data[2], snp=data[3], microcode=data[7])
    else:
        tcb = TcbVersion(bootloader=data[0], tee=data[1], snp=data[6], microcode=data[7])
    # refusal: test_the_cpuid_family_selects_the_turin_layout
    if tcb.pack() != data:  # the bytes between are reserved
        raise _malformed(field)
    return tcb


def _parse_scalar(field: str, data: bytes) -> int:
    value = int.from_bytes(data, "little")
    if value >= _MAX_SCALAR:
        raise _malformed(field)
    return value


# --- certificate table ------------------------------------------------------------------------------------------------

MAX_CERTIFICATE_TABLE_BYTES = 16 << 10
"""The kernel's limit for the host's certificates."""


class CertificateKind(enum.Enum):
    """What a certificate table entry holds, by its GUID."""

    VCEK = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
    VLEK = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
    ASK = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")  # the ASVK too
    ARK = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
    CRL = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")


_ENTRY = struct.Struct("<16sII")  # GUID in text order, offset from the start of the blob, length


def parse_certificate_table(data: bytes) -> tuple[tuple[CertificateKind, bytes], ...]:
    """The entries of a host's certificate table (configfs `auxblob`), in its order.

    The host wrote it and the kernel does not check it: every offset is. Contents are DER or PEM, as the host chose, and
    are not looked at. Entries with other GUIDs are left out: the table is open to vendors and none of them is a certificate.

    Args:
        data: at most 16 KiB; empty when the host supplies nothing, as most do.

    Raises:
        MalformedEvidenceError: too long, no end marker, or an entry that reaches into the table or beyond the data.
    """
    if not data:
        return ()
    if len(data) > MAX_CERTIFICATE_TABLE_BYTES:
        raise _malformed_table("length", len(data), MAX_CERTIFICATE_TABLE_BYTES)
    entries: list[tuple[bytes, int, int]] = []
    for start in range(0, len(data) - _ENTRY.size + 1, _ENTRY.size):
        if not any(data[start : start + _ENTRY.size]):
            break
        entries.append(_ENTRY.unpack_from(data, start))
    else:
        raise _malformed_table("table_end")
    table_bytes = (len(entries) + 1) * _ENTRY.size
    found: list[tuple[CertificateKind, bytes]] = []
    for guid, offset, length in entries:
        if not length:  # the place of a certificate that the host does not have
            continue
        # refusal: test_a_malformed_certificate_table_is_refused
        if offset < table_bytes or offset + length > len(data):
            raise _malformed_table("table_entry", offset + length, len(data))
        try:
            kind = CertificateKind(UUID(bytes=guid))
        except ValueError:
            continue
        found.append((kind, data[offset : offset + length]))
    return tuple(found)


def _malformed_table(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident(field), got, expected)


# --- /dev/sev-guest ---------------------------------------------------------------------------------------------------

SNP_GET_REPORT = 0xC020_5300
SNP_GET_EXT_REPORT = 0xC020_5302
REPORT_RESPONSE_BYTES = 4000
CERTIFICATE_PAGE_BYTES = 4096
"""The kernel takes certificate buffers in whole pages."""
GHCB_INVALID_LENGTH = 1
"""The hypervisor's answer to a certificate buffer that is too small."""

_GUEST_REQUEST = struct.Struct("<B7xQQII")  # snp_guest_request_ioctl; exitinfo2 is firmware error, VMM error
_REPORT_REQUEST = struct.Struct("<64sI28x")  # snp_report_req
_EXT_REPORT_REQUEST = struct.Struct("<64sI28xQI4x")  # snp_ext_report_req
_REPORT_RESPONSE = struct.Struct("<II24s")  # MSG_REPORT_RSP: status, size, reserved
_MESSAGE_VERSION = 1


def pack_guest_request(request_address: int, response_address: int) -> bytearray:
    """The argument of both ioctls. `exitinfo2` is zero: the kernel writes it only where something went wrong."""
    return bytearray(_GUEST_REQUEST.pack(_MESSAGE_VERSION, request_address, response_address, 0, 0))


def parse_exit_info(guest_request: bytes | bytearray) -> tuple[int, int]:
    """What firmware and hypervisor said, in this order. Means something only after EIO, on some kernels after ENOSPC."""
    *_, firmware_error, vmm_error = _GUEST_REQUEST.unpack(guest_request)
    return firmware_error, vmm_error


def pack_report_request(report_data: bytes, vmpl: int) -> bytes:
    return _REPORT_REQUEST.pack(report_data, vmpl)


def pack_ext_report_request(report_data: bytes, vmpl: int, certificates_address: int, certificates_bytes: int) -> bytes:
    """With address and length 0: tell how long the certificates are."""
    return _EXT_REPORT_REQUEST.pack(report_data, vmpl, certificates_address, certificates_bytes)


def parse_certificates_bytes(ext_report_request: bytes) -> int:
    """How long the kernel says the host's certificates are.

    Raises:
        MalformedEvidenceError: not some whole pages, or more than the kernel itself takes.
    """
    *_, length = _EXT_REPORT_REQUEST.unpack(ext_report_request)
    if length % CERTIFICATE_PAGE_BYTES or not 0 < length <= MAX_CERTIFICATE_TABLE_BYTES:
        raise _malformed_table("certificates_length", length, MAX_CERTIFICATE_TABLE_BYTES)
    return int(length)


def parse_report_response(data: bytes) -> tuple[int, bytes]:
    """Firmware status and report; without a report when the status is not 0.

    Args:
        data: the 4000 bytes of a response, of which what follows the report is left out.

    Raises:
        MalformedEvidenceError: wrong length, another size than a report's, or a reserved byte that is set.
    """
    if len(data) != REPORT_RESPONSE_BYTES:
        raise _malformed("response_length", len(data), REPORT_RESPONSE_BYTES)
    status, size, reserved = _REPORT_RESPONSE.unpack_from(data)
    if status:
        return status, b""
    if size != REPORT_BYTES:
        raise _malformed("response_size", size, REPORT_BYTES)
    _must_be_zero("response_reserved", any(reserved))
    return 0, data[_REPORT_RESPONSE.size : _REPORT_RESPONSE.size + size]
