"""What the Evidence covers: nonce, our public key, GPUs and NVSwitches, modes and digests. Trustee's binding, exactly.

Devices come first: each GPU signs the *device nonce*, a hash of the broker's nonce and our ephemeral public key. Then the
CPU report signs the *report data*, a hash of the same two and of the whole text of the device Evidence. So one CPU
signature covers everything, and none of it can be moved to another handshake. A worked example is in `protos/HANDSHAKE.md`.

Does not sign or verify anything, and does not compare two GPUs with each other: that is appraisal.
Follows Trustee's KBS protocol 0.4.0 (confidential-containers/trustee 78962cd), "Runtime data"; RFC 8785 (canonical JSON).

>>> from agent.evidence import Nonce
>>> data = RuntimeData(Nonce(bytes(range(32))), b"x" * 32, b"y" * 32)
>>> canonical_runtime_data(data, None).decode()[:64]
'{"nonce":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","tee-pub'
>>> len(device_nonce(data)), len(report_data(data, ""))
(32, 64)
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import rfc8785

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence import (
    GPU_NONCE_BYTES,
    REPORT_DATA_BYTES,
    SWITCH_ARCH,
    GpuEvidence,
    GpuNonce,
    OpaqueNonce,
    ReportData,
    RuntimeData,
)
from agent.handshake import MAX_ADDITIONAL_EVIDENCE_BYTES, TeePublicKey
from agent.jose import boolean, integer, pack_b64, pack_jwk, parse_b64, parse_object, string

MAX_GPUS = 16
MAX_SWITCHES = 4
MAX_MODE = 255

# Each architecture, and what a device of it is called.
_UUIDS = {
    "HOPPER": re.compile(r"GPU-[A-Za-z0-9-]{1,60}"),
    "BLACKWELL": re.compile(r"GPU-[A-Za-z0-9-]{1,60}"),
    SWITCH_ARCH: re.compile(r"SWX-[A-Za-z0-9-]{1,60}"),
}
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class KeyturnClaims:
    """What we say beside the device list; Trustee ignores it, our broker appraises it, the CPU report covers it.

    Attributes:
        cc_feature, environment, devtools, multi_gpu_mode: NVML's integers (`GpuModes`).
        ready: the GPU ready state when the evidence was collected.
        renewal: this agent has passed the gate in this boot before, and asks for a new lease; then `ready` is its own work.
        manifest_digest, server_command_digest: `sha256:` and 64 lower-case hex digits.
    """

    cc_feature: int
    environment: int
    devtools: int
    multi_gpu_mode: int
    ready: bool
    renewal: bool
    driver_version: str
    manifest_digest: str
    server_command_digest: str


def canonical_runtime_data(data: RuntimeData, additional_evidence: str | None) -> bytes:
    """RFC 8785 text of {nonce, tee-pubkey} and, unless None, additional-evidence (hyphen here, underscore on the wire)."""
    members: dict[str, str | dict[str, str]] = {
        "nonce": data.nonce.decode() if isinstance(data.nonce, OpaqueNonce) else pack_b64(data.nonce),
        "tee-pubkey": pack_jwk(TeePublicKey(data.public_key_x, data.public_key_y)),
    }
    if additional_evidence is not None:
        members["additional-evidence"] = additional_evidence
    return rfc8785.dumps(members)


def device_nonce(data: RuntimeData) -> GpuNonce:
    """What every GPU and NVSwitch signs: the first 32 bytes of the hash over the runtime data without device Evidence."""
    return GpuNonce(_hash(data, canonical_runtime_data(data, None))[:GPU_NONCE_BYTES])


def report_data(data: RuntimeData, additional_evidence: str) -> ReportData:
    """What the CPU report carries: the hash over the runtime data with the device Evidence, zero-padded to 64 bytes.

    Args:
        data: nonce, public key and hash of this handshake.
        additional_evidence: exactly the text that is sent, `""` without devices.
    """
    digest = _hash(data, canonical_runtime_data(data, additional_evidence))
    return ReportData(digest.ljust(REPORT_DATA_BYTES, b"\0"))


def _hash(data: RuntimeData, text: bytes) -> bytes:
    return hashlib.new(data.hash.value, text).digest()


def additional_evidence(devices: tuple[GpuEvidence, ...], claims: KeyturnClaims) -> str:
    """The device Evidence text, at most 512 KiB; `""` when there are no GPUs, as Trustee wants it.

    Args:
        devices: up to 16 GPUs and 4 NVSwitches, in the order in which they are listed.
        claims: what we say beside them.

    Raises:
        MalformedEvidenceError: what the devices or the driver said does not fit into the text.
    """
    if not devices:
        return ""
    entries = [
        {
            "arch": device.arch,
            "uuid": device.uuid,
            "evidence": pack_b64(device.report),
            "certificate": pack_b64(device.certificate_chain),
        }
        for device in devices
    ]
    nvidia: dict[str, list[dict[str, str]] | dict[str, Any]] = {"device_evidence_list": entries, "keyturn": asdict(claims)}
    text = rfc8785.dumps({"nvidia": nvidia}).decode()
    # Reading it back finds, before the slow CPU report, whatever the broker's parser would refuse.
    parse_additional_evidence(text)
    return text


def parse_additional_evidence(text: str) -> tuple[tuple[GpuEvidence, ...], KeyturnClaims | None]:
    """The inverse of `additional_evidence`; claims are None when the text has no `keyturn` member (another agent).

    Raises:
        MalformedEvidenceError: too long, not strict JSON, an unknown, missing or malformed member, no GPU, or too many devices.
    """
    if not text:
        return (), None
    part = "size"
    try:
        if len(encoded := text.encode()) > MAX_ADDITIONAL_EVIDENCE_BYTES:
            raise ValueError
        part = "json"
        nvidia = _object(parse_object(encoded, MAX_ADDITIONAL_EVIDENCE_BYTES), {"nvidia"})["nvidia"]
        part = "nvidia"
        members = _object(nvidia, {"device_evidence_list"}, optional={"keyturn"})
        part = "device_evidence_list"
        entries = members["device_evidence_list"]
        if not isinstance(entries, list) or len(entries) > MAX_GPUS + MAX_SWITCHES:
            raise ValueError
        devices = tuple(_parse_device(entry) for entry in entries)
        switches = sum(device.arch == SWITCH_ARCH for device in devices)
        if switches > MAX_SWITCHES or not 1 <= len(devices) - switches <= MAX_GPUS:
            raise ValueError
        part = "keyturn"
        claims = _parse_claims(members["keyturn"]) if "keyturn" in members else None
    except ValueError:
        raise MalformedEvidenceError(EvidenceFormat.ADDITIONAL, Ident(part)) from None  # the text is a peer's
    return devices, claims


def split(evidence: Sequence[GpuEvidence]) -> tuple[tuple[GpuEvidence, ...], tuple[GpuEvidence, ...]]:
    """The GPUs and the NVSwitches, each in their order."""
    return (
        tuple(device for device in evidence if device.arch != SWITCH_ARCH),
        tuple(device for device in evidence if device.arch == SWITCH_ARCH),
    )


def _parse_device(value: object) -> GpuEvidence:
    members = _object(value, {"arch", "uuid", "evidence", "certificate"})
    arch, uuid = string(members, "arch"), string(members, "uuid")
    report, chain = parse_b64(string(members, "evidence")), parse_b64(string(members, "certificate"))
    if arch not in _UUIDS or not _UUIDS[arch].fullmatch(uuid) or not report or not chain:
        raise ValueError
    return GpuEvidence(arch, uuid, report, chain)


def _parse_claims(value: object) -> KeyturnClaims:
    members = _object(value, {field.name for field in fields(KeyturnClaims)})
    return KeyturnClaims(
        cc_feature=integer(members, "cc_feature", 0, MAX_MODE),
        environment=integer(members, "environment", 0, MAX_MODE),
        devtools=integer(members, "devtools", 0, MAX_MODE),
        multi_gpu_mode=integer(members, "multi_gpu_mode", 0, MAX_MODE),
        ready=boolean(members, "ready"),
        renewal=boolean(members, "renewal"),
        driver_version=_matching(_VERSION, string(members, "driver_version")),
        manifest_digest=_matching(_DIGEST, string(members, "manifest_digest")),
        server_command_digest=_matching(_DIGEST, string(members, "server_command_digest")),
    )


def _object(value: object, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict[str, object]:
    # refusal: test_text_that_is_not_exactly_ours_is_malformed
    if not isinstance(value, dict) or not required <= value.keys() <= required | optional:
        raise ValueError
    return value


def _matching(pattern: re.Pattern[str], text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError
    return text
