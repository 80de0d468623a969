"""Device evidence as Trustee's verifiers read it, and its claims: `nvidia` with the local verifier, `sampledevice`.

The local verifier is upstream's default: Hopper only, no reference measurements, no driver or VBIOS policy. NVIDIA's remote
service, NVSwitches and protected PCIe are not here, and are refused.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509

from agent.errors import EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import GpuEvidence, GpuNonce
from agent.evidence.gpu_abi import (
    OPAQUE_CHIP_SKU,
    OPAQUE_DRIVER_VERSION,
    OPAQUE_FWID,
    OPAQUE_GPU_INFO,
    OPAQUE_MEASUREMENT_COUNTS,
    OPAQUE_PROJECT,
    OPAQUE_PROJECT_SKU,
    OPAQUE_PROTECTED_PCIE,
    OPAQUE_VBIOS_VERSION,
    GpuReport,
    parse_report,
)
from agent.sim.trustee_evidence import Claims, EvidenceRefused, Fields, decode_b64
from agent.verify.nvidia import verify_gpu

NONCE_BYTES = 32
_TEXTS = {
    OPAQUE_CHIP_SKU: "chip_sku",
    16: "chip_sku_mod",
    OPAQUE_DRIVER_VERSION: "driver_version",
    OPAQUE_PROJECT: "project",
    OPAQUE_PROJECT_SKU: "project_sku",
    11: "nvdec0_status",
    OPAQUE_PROTECTED_PCIE: "protected_pcie_status",
}
_HEX = {13: "cpr_info", 14: "board_id", 19: "project_sku_mod", OPAQUE_FWID: "fwid", OPAQUE_GPU_INFO: "gpu_info"}


def verify_devices(value: object, expected: bytes, roots: Sequence[x509.Certificate]) -> list[Claims]:
    """Claims of every device of an `nvidia` object, in its order; all are class gpu.

    Args:
        value: the object; members beside `device_evidence_list` are ignored.
        expected: the device digest; its first 32 bytes are the nonce.
        roots: trusted beside NVIDIA's.

    Raises:
        EvidenceRefused: one of them is not genuine, not fresh, or no Hopper GPU.
    """
    devices = Fields(value, "nvidia").value("device_evidence_list")
    if not isinstance(devices, list):
        raise EvidenceRefused("nvidia.device_evidence_list: expected an array")
    nonce = GpuNonce(expected[:NONCE_BYTES].ljust(NONCE_BYTES, b"\0"))
    return [_verify_device(Fields(device, "nvidia device"), nonce, roots) for device in devices]


def _verify_device(device: Fields, nonce: GpuNonce, roots: Sequence[x509.Certificate]) -> Claims:
    arch, uuid, text = device.text("arch"), device.text("uuid", "unknown"), device.text("evidence")
    if arch not in ("HOPPER", "Hopper", "BLACKWELL", "Blackwell", "LS10"):
        raise EvidenceRefused("nvidia.arch: unknown variant")
    if arch.upper() != "HOPPER":
        raise EvidenceRefused("Device architecture not supported")
    try:
        report = bytes.fromhex(text)  # as older guests write it
    except ValueError:
        report = decode_b64(text, "nvidia.evidence")
    chain = decode_b64(device.text("certificate"), "nvidia.certificate")
    try:
        verify_gpu(GpuEvidence("HOPPER", uuid, report, chain), nonce, roots, datetime.now(UTC))
        return gpu_claims(parse_report(report), uuid)
    except (MalformedEvidenceError, EvidenceVerificationError) as exc:
        raise EvidenceRefused(f"nvidia: {exc}") from exc


def gpu_claims(report: GpuReport, uuid: str) -> Claims:
    """What the local verifier says of a Hopper GPU."""
    config: dict[str, object] = {}
    for kind, value in report.opaque:
        if kind in _TEXTS:
            config[_TEXTS[kind]] = value.rstrip(b"\0").decode("ascii", "replace")
        elif kind in _HEX:
            config[_HEX[kind]] = value.hex()
        elif kind == OPAQUE_VBIOS_VERSION:
            config["vbios_version"] = ".".join(f"{value[place]:02x}" for place in (3, 2, 1, 0, 4))
        elif kind == OPAQUE_MEASUREMENT_COUNTS:
            counts = (int.from_bytes(value[at : at + 4], "little") for at in range(0, len(value), 4))
            config["measurement_count"] = {str(index): count for index, count in enumerate(counts, 1)}
    measurements = {str(block.index): block.value.hex() for block in report.measurements}
    return {"arch": "Hopper", "uuid": uuid, "config": config, "measurements": measurements}


def verify_sample_device(value: object, expected: bytes) -> Claims:
    """The device evidence that proves nothing; the whole device digest, compared as it is. Raises EvidenceRefused."""
    evidence = Fields(value, "sampledevice")
    svn, report_data = evidence.text("svn"), evidence.text("report_data", "")
    if decode_b64(report_data, "sampledevice.report_data") != expected:
        raise EvidenceRefused("REPORT_DATA is different from that in Sample Device Quote")
    return {"svn": svn, "report_data": report_data}
