"""CPU Evidence as the JSON that Trustee's verifiers and CoCo's attestation agent exchange, and back.

`pack_evidence` gives the bytes serde would write (members in the order of the structs, no spaces); `parse_evidence` takes
whatever serde would read, so an unknown member is passed over and an optional one may be missing. Both go through the binary
layouts, so what is parsed is a report or quote that our own parsers accept, byte for byte what the device signed.
Does not check signatures, and knows nothing of device Evidence, whose text is `binding.py`'s.
Follows confidential-containers/trustee 78962cd, `deps/verifier` (snp, tdx, sample), and the `sev` crate's serde form (6.3, 7).
"""

import json
from collections.abc import Callable
from functools import partial
from typing import TypeVar, assert_never

from cryptography.x509.oid import NameOID

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence import Evidence, Tee, ccel
from agent.evidence.snp_abi import (
    FirmwareVersion,
    GuestPolicy,
    SigningKey,
    SnpReport,
    TcbVersion,
    pack_report,
    parse_report,
)
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES, quote_length
from agent.handshake import MAX_CERTIFICATE_BYTES, MAX_CERTIFICATES
from agent.jose import integer, pack_b64, parse_b64, parse_object, string
from agent.verify.snp import load_certificate

MAX_EVIDENCE_BYTES = 3 << 19
"""1.5 MiB: an event log of firmware's largest reserve still fits, and the message around it into Trustee's 2 MiB."""
SAMPLE_SVN = "1"
_MAX_SAMPLE_BYTES = 64
_LOG_END = b"\xff" * 8
"""As CoCo's agent ends its log; the parser on the other side stops here."""
_FORMATS = {Tee.SNP: EvidenceFormat.SNP_REPORT, Tee.TDX: EvidenceFormat.TDX_QUOTE, Tee.SAMPLE: EvidenceFormat.SAMPLE}
_LEAVES = {"SEV-VCEK": "VCEK", "SEV-VLEK": "VLEK"}
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1

_T = TypeVar("_T")


def pack_evidence(evidence: Evidence) -> str:
    """The JSON text of `evidence`.

    Raises:
        MalformedEvidenceError: a report or certificate that does not parse.
    """
    return json.dumps(to_json(evidence), separators=(",", ":"))


def to_json(evidence: Evidence) -> dict[str, object]:
    """The JSON value of `evidence`, for a message that holds it.

    Raises:
        MalformedEvidenceError: as `pack_evidence`.
    """
    match evidence.tee:
        case Tee.SNP:
            report = _report_to_json(parse_report(evidence.report))
            return {"attestation_report": report, "cert_chain": _chain_to_json(evidence.cert_chain)}
        case Tee.TDX:
            log = pack_b64(evidence.event_log + _LOG_END) if evidence.event_log else None
            return {"cc_eventlog": log, "quote": pack_b64(evidence.report)}
        case Tee.SAMPLE:
            return {"svn": SAMPLE_SVN, "report_data": pack_b64(evidence.report)}
        case _:
            assert_never(evidence.tee)


def parse_evidence(tee: Tee, text: bytes) -> Evidence:
    """The Evidence in a JSON text of at most 1.5 MiB; the inverse of `pack_evidence`.

    Args:
        tee: what the text is evidence of; the text does not say.
        text: UTF-8. Certificates may stand in any order; revocation lists and vendors' entries are left out.

    Raises:
        MalformedEvidenceError: not JSON, a member that is missing or of another type, or a report, quote, certificate or event
            log that does not parse. `field` names the member.
    """
    where = _FORMATS[tee]
    members = _named("json", where, lambda: parse_object(text, MAX_EVIDENCE_BYTES))
    match tee:
        case Tee.SNP:
            report = _named("attestation_report", where, lambda: _parse_report_json(_object(members, "attestation_report")))
            return Evidence(tee, pack_report(report), _parse_chain(members.get("cert_chain")))
        case Tee.TDX:
            quote = _named("quote", where, lambda: parse_b64(string(members, "quote")))
            if len(quote) > MAX_QUOTE_BYTES:
                raise MalformedEvidenceError(where, Ident("length"), len(quote), MAX_QUOTE_BYTES)
            log = members.get("cc_eventlog")
            data = b"" if log is None else _named("cc_eventlog", where, lambda: parse_b64(string(members, "cc_eventlog")))
            return Evidence(tee, quote[: quote_length(quote)], event_log=trimmed(data) if data else b"")
        case Tee.SAMPLE:
            report_data = _named("report_data", where, lambda: parse_b64(string(members, "report_data")))
            if not 0 < len(report_data) <= _MAX_SAMPLE_BYTES:
                raise MalformedEvidenceError(where, Ident("report_data"), len(report_data), _MAX_SAMPLE_BYTES)
            return Evidence(tee, report_data)
        case _:
            assert_never(tee)


def trimmed(log: bytes) -> bytes:
    """An event log without the reserve that firmware leaves behind it, and without the end that CoCo's agent writes.

    A TDX guest's table is up to 1 MiB, of which a few KiB are events; padded it does not fit into Trustee's 2 MiB.

    Args:
        log: the ACPI table's bytes (CCEL), at most 4 MiB.

    Raises:
        MalformedEvidenceError: not an event log.
    """
    return ccel.pack_event_log(ccel.parse_event_log(log))


# --- SNP --------------------------------------------------------------------------------------------------------------


def _report_to_json(report: SnpReport) -> dict[str, object]:
    """Members and their order are the `sev` crate's."""
    return {
        "version": report.version,
        "guest_svn": report.guest_svn,
        "policy": int(report.policy),
        "family_id": list(report.family_id),
        "image_id": list(report.image_id),
        "vmpl": report.vmpl,
        "sig_algo": report.signature_algorithm,
        "current_tcb": _tcb_to_json(report.current_tcb),
        "plat_info": report.platform_info,
        "key_info": report.author_key_enabled | report.mask_chip_key << 1 | report.signing_key << 2,
        "report_data": list(report.report_data),
        "measurement": list(report.measurement),
        "host_data": list(report.host_data),
        "id_key_digest": list(report.id_key_digest),
        "author_key_digest": list(report.author_key_digest),
        "report_id": list(report.report_id),
        "report_id_ma": list(report.report_id_ma),
        "reported_tcb": _tcb_to_json(report.reported_tcb),
        "cpuid_fam_id": report.cpuid_family,
        "cpuid_mod_id": report.cpuid_model,
        "cpuid_step": report.cpuid_stepping,
        "chip_id": list(report.chip_id),
        "committed_tcb": _tcb_to_json(report.committed_tcb),
        "current": _firmware_to_json(report.current_firmware),
        "committed": _firmware_to_json(report.committed_firmware),
        "launch_tcb": _tcb_to_json(report.launch_tcb),
        "launch_mit_vector": report.launch_mitigations,
        "current_mit_vector": report.current_mitigations,
        "signature": {
            "r": list(report.signature_r.to_bytes(72, "little")),
            "s": list(report.signature_s.to_bytes(72, "little")),
        },
    }


def _parse_report_json(members: dict[str, object]) -> SnpReport:
    key_info = integer(members, "key_info", 0, _U32)
    signature = _object(members, "signature")
    report = SnpReport(
        version=integer(members, "version", 0, _U32),
        guest_svn=integer(members, "guest_svn", 0, _U32),
        policy=GuestPolicy(integer(members, "policy", 0, _U64)),
        family_id=_bytes(members, "family_id", 16),
        image_id=_bytes(members, "image_id", 16),
        vmpl=integer(members, "vmpl", 0, _U32),
        signature_algorithm=integer(members, "sig_algo", 0, _U32),
        current_tcb=_parse_tcb(members, "current_tcb"),
        platform_info=integer(members, "plat_info", 0, _U64),
        author_key_enabled=bool(key_info & 1),
        mask_chip_key=bool(key_info & 2),
        signing_key=SigningKey(key_info >> 2),
        report_data=_bytes(members, "report_data", 64),
        measurement=_bytes(members, "measurement", 48),
        host_data=_bytes(members, "host_data", 32),
        id_key_digest=_bytes(members, "id_key_digest", 48),
        author_key_digest=_bytes(members, "author_key_digest", 48),
        report_id=_bytes(members, "report_id", 32),
        report_id_ma=_bytes(members, "report_id_ma", 32),
        reported_tcb=_parse_tcb(members, "reported_tcb"),
        cpuid_family=_optional(members, "cpuid_fam_id", 0xFF),
        cpuid_model=_optional(members, "cpuid_mod_id", 0xFF),
        cpuid_stepping=_optional(members, "cpuid_step", 0xFF),
        chip_id=_bytes(members, "chip_id", 64),
        committed_tcb=_parse_tcb(members, "committed_tcb"),
        current_firmware=_parse_firmware(members, "current"),
        committed_firmware=_parse_firmware(members, "committed"),
        launch_tcb=_parse_tcb(members, "launch_tcb"),
        launch_mitigations=_optional(members, "launch_mit_vector", _U64),
        current_mitigations=_optional(members, "current_mit_vector", _U64),
        signature_r=int.from_bytes(_bytes(signature, "r", 72), "little"),
        signature_s=int.from_bytes(_bytes(signature, "s", 72), "little"),
    )
    pack_report(report)  # the fields must be those of one report: its version has these members, its processor this TCB layout
    return report


def _chain_to_json(chain: tuple[bytes, ...]) -> list[dict[str, object]] | None:
    """Null unless there is a leaf: Trustee then asks AMD's key service, and refuses a list without one, an empty one too."""
    entries: list[dict[str, object]] = [{"cert_type": _certificate_type(der), "data": list(der)} for der in chain]
    return entries if any(entry["cert_type"] in _LEAVES.values() for entry in entries) else None


def _certificate_type(der: bytes) -> str:
    certificate = load_certificate(der)
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if names and (leaf := _LEAVES.get(str(names[0].value))):
            return leaf
        return "ARK" if certificate.subject == certificate.issuer else "ASK"
    except ValueError as exc:  # names are parsed only now
        raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("subject")) from exc


def _parse_chain(value: object) -> tuple[bytes, ...]:
    where = EvidenceFormat.SNP_CHAIN
    if value is None:
        return ()
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CERTIFICATES:
        raise MalformedEvidenceError(where, Ident("cert_chain"))
    found: dict[str, list[bytes]] = {"VCEK": [], "VLEK": [], "ASK": [], "ARK": []}
    for entry in value:
        if not isinstance(entry, dict):
            raise MalformedEvidenceError(where, Ident("cert_chain"))
        kind = entry.get("cert_type")
        if isinstance(kind, str) and kind in found:
            der = _named("data", where, partial(_bytes, entry, "data", None))
            load_certificate(der)
            found[kind].append(der)
    return tuple(der for certificates in found.values() for der in certificates)


def _tcb_to_json(tcb: TcbVersion) -> dict[str, object]:
    return {"fmc": tcb.fmc, "bootloader": tcb.bootloader, "tee": tcb.tee, "snp": tcb.snp, "microcode": tcb.microcode}


def _parse_tcb(members: dict[str, object], name: str) -> TcbVersion:
    tcb = _object(members, name)
    parts = {part: integer(tcb, part, 0, 0xFF) for part in ("bootloader", "tee", "snp", "microcode")}
    return TcbVersion(**parts, fmc=_optional(tcb, "fmc", 0xFF))


def _firmware_to_json(version: FirmwareVersion) -> dict[str, object]:
    return {"major": version.major, "minor": version.minor, "build": version.build}


def _parse_firmware(members: dict[str, object], name: str) -> FirmwareVersion:
    version = _object(members, name)
    return FirmwareVersion(*(integer(version, part, 0, 0xFF) for part in ("major", "minor", "build")))


# --- members ----------------------------------------------------------------------------------------------------------


def _named(field: str, where: EvidenceFormat, parse: Callable[[], _T]) -> _T:
    try:
        return parse()
    except ValueError:
        raise MalformedEvidenceError(where, Ident(field)) from None  # the text is somebody else's


def _object(members: dict[str, object], name: str) -> dict[str, object]:
    value = members.get(name)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _bytes(members: dict[str, object], name: str, length: int | None) -> bytes:
    """An array of numbers, which is how serde writes bytes. `length` None: a certificate's."""
    value = members.get(name)
    if not isinstance(value, list) or len(value) > MAX_CERTIFICATE_BYTES or length not in (None, len(value)):
        raise ValueError("not an array of that length")
    if not all(type(item) is int for item in value):  # True would be 1
        raise ValueError("not an array of numbers")
    return bytes(value)


def _optional(members: dict[str, object], name: str, maximum: int) -> int | None:
    return None if members.get(name) is None else integer(members, name, 0, maximum)
