"""Evidence as Trustee's verifiers read it, from JSON to bytes and from verified bytes to claims: `sample` and `snp`.

Written from the facts about `sev` 7.x's serde form, kbs-types 0.18 and the verifiers of confidential-containers/trustee
78962cd, apart from the guest's writer of the same JSON. Unknown members are ignored, a wrong type refuses everything.
Signatures and chains are `agent/verify`'s business, which refuses more than upstream does: reserved bits that are set, a TD
under debug, an SNP chip id that is not the certificate's, whatever `agent/verify` says. Claims carry upstream's names.
"""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from agent.errors import EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence, Tee
from agent.evidence.snp_abi import TURIN_FAMILY, SnpReport
from agent.verify.snp import verify_snp

Claims = dict[str, Any]


class EvidenceRefused(Exception):
    """The verifier takes it for no evidence; the text is for the server's own log, as with a real one."""


class Fields:
    """Members of a JSON object, read as serde reads a struct. Every method raises EvidenceRefused."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise EvidenceRefused(f"{where}: not an object")
        self._members = value
        self._where = where

    def value(self, name: str) -> object:
        if name not in self._members:
            raise EvidenceRefused(f"{self._where}: missing field `{name}`")
        return self._members[name]

    def optional(self, name: str) -> object:
        return self._members.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._members.get(name, default)
        if not isinstance(value, str):
            raise EvidenceRefused(f"{self._where}.{name}: expected a string")
        return value

    def number(self, name: str, bits: int) -> int:
        return _number(self.value(name), bits, f"{self._where}.{name}")

    def number_or_none(self, name: str, bits: int) -> int | None:
        value = self.optional(name)
        return None if value is None else _number(value, bits, f"{self._where}.{name}")

    def octets(self, name: str, size: int | None = None) -> bytes:
        """An array of numbers 0 to 255, `size` of them."""
        value = self.value(name)
        if not isinstance(value, list) or size not in (None, len(value)):
            raise EvidenceRefused(f"{self._where}.{name}: expected an array of {size} bytes")
        return bytes(_number(item, 8, f"{self._where}.{name}") for item in value)

    def fields(self, name: str) -> "Fields":
        return Fields(self.value(name), f"{self._where}.{name}")


def _number(value: object, bits: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
        raise EvidenceRefused(f"{where}: expected u{bits}")
    return value


def decode_b64(text: str, where: str) -> bytes:
    """Standard base64 with padding. Raises EvidenceRefused."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise EvidenceRefused(f"{where}: not base64") from exc


# --- sample -----------------------------------------------------------------------------------------------------------


def verify_sample(value: object, expected: bytes, init_data: bytes | None) -> Claims:
    """The evidence that proves nothing: its report data is compared as it is, its init data is echoed."""
    evidence = Fields(value, "sample")
    svn, report_data = evidence.text("svn"), evidence.text("report_data", "")
    if decode_b64(report_data, "sample.report_data") != expected:
        raise EvidenceRefused("REPORT_DATA is different from that in Sample Quote")
    return {
        "svn": svn,
        "report_data": report_data,
        "init_data": None if init_data is None else base64.b64encode(init_data).decode(),
        "launch_digest": "abcde",
        "platform_version": {"major": 1, "minor": 4},
        "debug": False,
    }


# --- snp --------------------------------------------------------------------------------------------------------------


def snp_report_bytes(value: object) -> bytes:
    """The 1184 bytes of an `attestation_report`. Raises EvidenceRefused."""
    report = Fields(value, "attestation_report")
    version = report.number("version", 32)
    cpuid = [report.number_or_none(name, 8) for name in ("cpuid_fam_id", "cpuid_mod_id", "cpuid_step")]
    turin = cpuid[0] is not None and cpuid[0] >= TURIN_FAMILY
    data = bytearray(1184)

    def put(offset: int, field: bytes) -> None:
        data[offset : offset + len(field)] = field

    def tcb(offset: int, name: str) -> None:
        parts = report.fields(name)
        bootloader, tee, snp, microcode = (parts.number(part, 8) for part in ("bootloader", "tee", "snp", "microcode"))
        fmc = parts.number_or_none("fmc", 8)
        legacy = bytes((bootloader, tee, 0, 0, 0, 0, snp, microcode))
        put(offset, bytes((fmc or 0, bootloader, tee, snp, 0, 0, 0, microcode)) if turin else legacy)

    put(0x000, version.to_bytes(4, "little"))
    for offset, name, bits in (
        (0x004, "guest_svn", 32), (0x008, "policy", 64), (0x030, "vmpl", 32), (0x034, "sig_algo", 32),
        (0x040, "plat_info", 64), (0x048, "key_info", 32),
    ):  # fmt: skip
        put(offset, report.number(name, bits).to_bytes(bits // 8, "little"))
    for offset, name, size in (
        (0x010, "family_id", 16), (0x020, "image_id", 16), (0x050, "report_data", 64), (0x090, "measurement", 48),
        (0x0C0, "host_data", 32), (0x0E0, "id_key_digest", 48), (0x110, "author_key_digest", 48),
        (0x140, "report_id", 32), (0x160, "report_id_ma", 32), (0x1A0, "chip_id", 64),
    ):  # fmt: skip
        put(offset, report.octets(name, size))
    for offset, name in ((0x038, "current_tcb"), (0x180, "reported_tcb"), (0x1E0, "committed_tcb"), (0x1F0, "launch_tcb")):
        tcb(offset, name)
    if version >= 3:
        put(0x188, bytes(part or 0 for part in cpuid))
    for offset, name in ((0x1E8, "current"), (0x1EC, "committed")):
        firmware = report.fields(name)
        put(offset, bytes(firmware.number(part, 8) for part in ("build", "minor", "major")))
    if version >= 5:
        for offset, name in ((0x1F8, "launch_mit_vector"), (0x200, "current_mit_vector")):
            put(offset, (report.number_or_none(name, 64) or 0).to_bytes(8, "little"))
    signature = report.fields("signature")
    put(0x2A0, signature.octets("r", 72))
    put(0x2E8, signature.octets("s", 72))
    return bytes(data)


def snp_certificates(value: object) -> tuple[bytes, ...]:
    """DER of a `cert_chain`; none for null, when the verifier fetches the VCEK itself. Raises EvidenceRefused."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise EvidenceRefused("cert_chain: expected an array")
    entries = [Fields(entry, "cert_chain") for entry in value]
    kinds = []
    for entry in entries:
        kind = entry.value("cert_type")
        if kind not in ("Empty", "ARK", "ASK", "VCEK", "VLEK", "CRL") and not (isinstance(kind, dict) and [*kind] == ["OTHER"]):
            raise EvidenceRefused("cert_chain.cert_type: unknown variant")
        kinds.append(kind)
    if "VCEK" not in kinds and "VLEK" not in kinds:
        raise EvidenceRefused("cert_chain: neither a VCEK nor a VLEK")
    return tuple(
        entry.octets("data") for entry, kind in zip(entries, kinds, strict=True) if kind in ("ARK", "ASK", "VCEK", "VLEK")
    )


def verify_snp_evidence(
    value: object,
    expected: bytes,
    init_data: bytes | None,
    roots: Sequence[x509.Certificate],
    endorsements: Sequence[x509.Certificate],
) -> Claims:
    """Claims of genuine evidence of a VMPL 0 guest. Raises EvidenceRefused."""
    evidence = Fields(value, "snp")
    data = snp_report_bytes(evidence.value("attestation_report"))
    certificates = snp_certificates(evidence.optional("cert_chain"))
    try:
        report = verify_snp(Evidence(Tee.SNP, data, certificates), roots, endorsements, datetime.now(UTC)).report
    except (MalformedEvidenceError, EvidenceVerificationError) as exc:
        raise EvidenceRefused(f"snp: {exc}") from exc
    if report.vmpl != 0:
        raise EvidenceRefused(f"VMPL Check Failed: {report.vmpl}")
    if report.report_data != expected[:64].ljust(64, b"\0"):
        raise EvidenceRefused("REPORT_DATA mismatch")
    if init_data is not None and report.host_data != init_data[:32].ljust(32, b"\0"):
        raise EvidenceRefused("HOST_DATA mismatch")
    return _snp_claims(report)


def _snp_claims(report: SnpReport) -> Claims:
    return {
        "policy_abi_major": report.policy.abi_major,
        "policy_abi_minor": report.policy.abi_minor,
        "policy_smt_allowed": report.policy.smt,
        "policy_migrate_ma": report.policy.migrate_ma,
        "policy_debug_allowed": report.policy.debug,
        "policy_single_socket": report.policy.single_socket,
        "reported_tcb_bootloader": report.reported_tcb.bootloader,
        "reported_tcb_tee": report.reported_tcb.tee,
        "reported_tcb_snp": report.reported_tcb.snp,
        "reported_tcb_microcode": report.reported_tcb.microcode,
        "platform_tsme_enabled": bool(report.platform_info & 2),
        "platform_smt_enabled": bool(report.platform_info & 1),
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "init_data": report.host_data.hex(),
        "chip_id": report.chip_id.hex(),
    }
