"""TDX evidence as Trustee's verifier reads it, and its claims; see `trustee_evidence.py`.

Asks Intel nothing: the TCB status in the claims is what the test KBS is told to say (`Knobs.tcb_status`). Of the event log's
`details` only those of attestation-agent entries are made: the default policy's best value for a TD is therefore 4, not 3.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from agent.errors import EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence, Tee
from agent.evidence.ccel import EventLog, parse_event_log, parse_runtime_event
from agent.evidence.tdx_abi import TdxQuote, parse_quote
from agent.sim.trustee_evidence import Claims, EvidenceRefused, Fields, decode_b64
from agent.verify.tdx import TdxClaims, check_event_log, verify_tdx

_ALGORITHMS = {0x04: "SHA-1", 0x0B: "SHA-256", 0x0C: "SHA-384", 0x0D: "SHA-512", 0x12: "SM3-256"}
_HASHES = {0x04: "sha1", 0x0B: "sha256", 0x0C: "sha384", 0x0D: "sha512"}
_TYPE_NAMES = {
    0x1: "EV_POST_CODE",
    0x3: "EV_NO_ACTION",
    0x4: "EV_SEPARATOR",
    0x6: "EV_EVENT_TAG",
    0xA: "EV_PLATFORM_CONFIG_FLAGS",
    0xD: "EV_IPL",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}


def verify_tdx_evidence(
    value: object,
    expected: bytes,
    init_data: bytes | None,
    roots: Sequence[x509.Certificate],
    tcb: tuple[str, tuple[str, ...]],
) -> Claims:
    """Claims of a genuine quote, version 4 or 5, and of its event log if there is one.

    Args:
        value: the `primary_evidence`.
        expected: the digest that the report data must be, at most 64 bytes.
        init_data: the digest that MRCONFIGID must be; None where no init-data came.
        roots: trusted beside Intel's.
        tcb: status and advisories to claim.

    Raises:
        EvidenceRefused: it is not genuine, not fresh, or the log is not the TD's.
    """
    evidence = Fields(value, "tdx")
    data = decode_b64(evidence.text("quote"), "tdx.quote")
    log_text = evidence.optional("cc_eventlog")
    if not isinstance(log_text, str | None):
        raise EvidenceRefused("tdx.cc_eventlog: expected a string")
    log_bytes = decode_b64(log_text or "", "tdx.cc_eventlog")
    try:
        verified = verify_tdx(Evidence(Tee.TDX, data), roots, datetime.now(UTC))
        log = parse_event_log(log_bytes) if log_bytes else None
        if log is not None:
            check_event_log(log, verified.td)
    except (MalformedEvidenceError, EvidenceVerificationError) as exc:
        raise EvidenceRefused(f"tdx: {exc}") from exc
    if verified.td.report_data != expected[:64].ljust(64, b"\0"):
        raise EvidenceRefused("REPORT_DATA mismatch")
    if init_data is not None and verified.td.mr_config_id != init_data[:48].ljust(48, b"\0"):
        raise EvidenceRefused("MRCONFIGID mismatch")
    claims = _tdx_claims(parse_quote(data), verified, tcb)
    return claims if log is None else {**claims, "uefi_event_logs": event_log_claims(log)}


def event_log_claims(log: EventLog) -> list[dict[str, Any]]:
    """`uefi_event_logs`, the first (spec id) event left out."""
    return [
        {
            "details": _runtime_details(event) or {},
            "digest_matches_event": any(
                algorithm in _HASHES and hashlib.new(_HASHES[algorithm], event.data).digest() == digest
                for algorithm, digest in event.digests
            ),
            "digests": [{"alg": _ALGORITHMS[algorithm], "digest": digest.hex()} for algorithm, digest in event.digests],
            "event": base64.b64encode(event.data).decode(),
            "index": event.mr_index,
            "type_name": _TYPE_NAMES.get(event.event_type, f"{event.event_type:#x}"),
        }
        for event in log.events
    ]


def _runtime_details(event: Any) -> dict[str, object] | None:
    """What an attestation agent's entry says; its content is JSON where it can be."""
    try:
        entry = parse_runtime_event(event)
    except MalformedEvidenceError:
        return None
    if entry is None:
        return None
    try:
        content = json.loads(entry.content)
    except ValueError:
        content = entry.content
    return {
        "data": {"domain": entry.domain, "operation": entry.operation, "content": content},
        "string": f"{entry.domain} {entry.operation} {entry.content}",
        "unicode_name": "AAEL",
    }


def _tdx_claims(quote: TdxQuote, verified: TdxClaims, tcb: tuple[str, tuple[str, ...]]) -> Claims:
    td = verified.td
    body = {
        "tcb_svn": td.tee_tcb_svn.hex(),
        "mr_seam": td.mr_seam.hex(),
        "mrsigner_seam": td.mr_signer_seam.hex(),
        "seam_attributes": td.seam_attributes.to_bytes(8, "little").hex(),
        "td_attributes": td.td_attributes.to_bytes(8, "little").hex(),
        "xfam": td.xfam.to_bytes(8, "little").hex(),
        "mr_td": td.mr_td.hex(),
        "mr_config_id": td.mr_config_id.hex(),
        "mr_owner": td.mr_owner.hex(),
        "mr_owner_config": td.mr_owner_config.hex(),
        **{f"rtmr_{number}": rtmr.hex() for number, rtmr in enumerate(td.rtmrs)},
        "report_data": td.report_data.hex(),
    }
    if td.tee_tcb_svn_2 is not None and td.mr_service_td is not None:
        body |= {"tee_tcb_svn2": td.tee_tcb_svn_2.hex(), "mr_servicetd": td.mr_service_td.hex()}
    header = {
        "version": quote.version.to_bytes(2, "little").hex(),
        "att_key_type": "0200",
        "tee_type": "81000000",
        "reserved": "00000000",
        "vendor_id": quote.qe_vendor_id.hex(),
        "user_data": quote.user_data.hex(),
    }
    status, advisories = tcb
    return {
        "quote": {"header": header, "body": body},
        "td_attributes": {
            "debug": td.td_attributes.debug,
            "key_locker": td.td_attributes.key_locker,
            "perfmon": td.td_attributes.perfmon,
            "protection_keys": td.td_attributes.pks,
            "septve_disable": td.td_attributes.sept_ve_disable,
        },
        "tcb_status": status,
        "tcb_date": "2025-08-13T00:00:00Z",
        "advisory_ids": list(advisories),
        "collateral_expiration_status": "0",
        "platform_instance_id": (verified.platform.platform_instance_id or b"").hex(),
        "report_data": td.report_data.hex(),
        "init_data": td.mr_config_id.hex(),
    }
