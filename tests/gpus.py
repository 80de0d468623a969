"""Simulated GPUs and recorded NVIDIA evidence for tests."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent.errors import EvidenceCheck
from agent.evidence import GpuEvidence, GpuNonce, GpuSystem
from agent.evidence.gpu_abi import GpuReport, Measurement, OpaqueHeader, firmware_digests
from agent.evidence.nscq import GpusAndSwitches
from agent.sim.gpu_silicon import (
    BLACKWELL,
    FWID,
    HOPPER,
    LS10,
    Chip,
    create_gpu_silicon,
    issue,
    issue_authority,
    issue_device,
    sign_report,
)
from agent.sim.machine import GpuKnobs, SimulatedMachine
from tests.shared import shared_data

NONCE = GpuNonce(bytes(range(32)))


def gpu_machine(directory: Path, count: int = 2, switches: int = 0) -> SimulatedMachine:
    """A machine with GPUs and no CPU TEE, whose silicon takes milliseconds to make; protected PCIe with NVSwitches."""
    silicon = directory / "silicon"
    silicon.mkdir(parents=True)
    create_gpu_silicon(silicon, count, switches)
    knobs = GpuKnobs(count=count)
    if switches:
        knobs = GpuKnobs(count=count, switches=switches, multi_gpu_mode=1, cc_feature=0)
    machine = SimulatedMachine(directory=directory, silicon=silicon, chip_id=bytes(64), gpu=knobs)
    machine.save()
    return machine


def gpu_system_of(machine: SimulatedMachine) -> GpuSystem:
    """Its GPUs, with its NVSwitches if it has any."""
    gpus = machine.gpu_system()
    return GpusAndSwitches(gpus, machine.switch_system()) if machine.gpu.switches else gpus


def simulated_root(machine: SimulatedMachine) -> x509.Certificate:
    return x509.load_pem_x509_certificate((machine.silicon / "nvidia-root.pem").read_bytes())


def signed_by(silicon: Path, index: int, report: GpuReport) -> bytes:
    """The report with a good signature of GPU `index`, whatever it says."""
    key = load_pem_private_key((silicon / f"gpu-{index}.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return sign_report(key, report)


Opaque = tuple[tuple[int, bytes], ...]
SWITCH_NAMES = tuple(bytes((0xA0 + number, 1, 2, 3, 4, 5, 6, 7)) for number in range(4))
GPU_NAMES = tuple(bytes((0xB0 + number, 1, 2, 3, 4, 5, 6, 7)) for number in range(8))


@dataclass(frozen=True)
class Device:
    """A simulated device, and what it reports unless told otherwise."""

    arch: str
    key: ec.EllipticCurvePrivateKey
    chain: bytes
    opaque: Opaque

    @property
    def evidence(self) -> GpuEvidence:
        return self.saying({})

    @property
    def with_opaque_header(self) -> GpuEvidence:
        """Evidence in the form that drivers of 2026 write: typed fields after a header, and a manifest as the last block."""
        report = self._report(dict(self.opaque))
        manifest = Measurement(0xFD, 0x8A, b"\xd9\x02\x3a" * 400)
        header = OpaqueHeader(2, 0, tuple(0x82 + kind % 6 for kind, _ in report.opaque))
        return self._signed(replace(report, measurements=(*report.measurements, manifest), opaque_header=header))

    @property
    def fsp_evidence(self) -> GpuEvidence:
        """Evidence as a security processor writes it: digests and raw values, and no opaque data at all."""
        blocks = (
            Measurement(1, 0x83, b"\0\0\0\1"),
            Measurement(2, 0x82, b"\xff"),
            Measurement(3, 0x02, bytes(48)),
            Measurement(52, 0x81, b"\0" * 73),
        )
        return self._signed(replace(self._report({}), measurements=blocks))

    def saying(self, changes: dict[int, bytes | None]) -> GpuEvidence:
        """Evidence with other values of some opaque fields, None for none, and a good signature."""
        return self._signed(self._report({**dict(self.opaque), **changes}))

    def _report(self, opaque: dict[int, bytes | None] | dict[int, bytes]) -> GpuReport:
        return GpuReport(
            requester_nonce=NONCE,
            measurements=firmware_digests([bytes(48)]),
            responder_nonce=bytes(32),
            opaque=tuple((kind, value) for kind, value in opaque.items() if value is not None),
            signature=bytes(96),
        )

    def _signed(self, report: GpuReport) -> GpuEvidence:
        return GpuEvidence(self.arch, "GPU-simulated", sign_report(self.key, report), self.chain)


def links(names: Sequence[bytes]) -> bytes:
    """A GPU's list of the switches at its 18 links; two links are off."""
    ends = [*(names[link % len(names)] for link in range(16)), bytes(8), bytes(8)]
    return b"".join(end[::-1] for end in ends)


def listed(names: Sequence[bytes]) -> bytes:
    """A switch's list of eight GPUs, and its 64 ports."""
    return b"".join(names) + bytes(range(8)) * 2 + b"\xff" * 48


HOPPER_SAYS: Opaque = ((6, bytes.fromhex("00a5009601000000")), (3, b"590.12\0"), (20, FWID))
PPCIE_SAYS: Opaque = (*HOPPER_SAYS, (21, b"\xaa"), (22, links(SWITCH_NAMES)), (34, b"\1\0"), (36, b"\2\0"))
BLACKWELL_SAYS: Opaque = ((6, bytes.fromhex("008800970f000000")), (3, b"575.32\0"), (20, FWID), (33, b"\7\7"), (34, b"\0\0"))
SWITCH_SAYS: Opaque = ((6, b"96.10.55.00.01"), (12, bytes(104)), (26, listed(GPU_NAMES)), (23, b"\xec\0"), (25, b"\1\0"))


class SimulatedSet:
    """Eight GPUs and four switches in protected-PCIe mode, GPUs of the next generations, a security processor; their root."""

    def __init__(self) -> None:
        root = issue("SIMULATED Device Identity CA", None)
        self.root = root[1]

        def devices(chip: Chip, opaque: Sequence[Opaque]) -> list[Device]:
            authority = issue_authority(chip, root)
            return [Device(chip.arch, *issue_device(chip, authority), each) for each in opaque]

        self.gpus = devices(HOPPER, [PPCIE_SAYS] * 8)
        self.switches = devices(LS10, [(*SWITCH_SAYS, (22, name)) for name in SWITCH_NAMES])
        (self.blackwell,) = devices(BLACKWELL, [BLACKWELL_SAYS])
        (self.rubin,) = devices(replace(BLACKWELL, arch="RUBIN", name="GR100"), [BLACKWELL_SAYS])
        (self.fsp,) = devices(replace(BLACKWELL, unit="FSP"), [BLACKWELL_SAYS])


@dataclass(frozen=True)
class Recorded:
    name: str
    report: bytes
    chain: bytes
    expected: dict[str, object]

    @property
    def nonce(self) -> GpuNonce:
        return GpuNonce(bytes.fromhex(str(self.expected["nonce"])))

    @property
    def evidence(self) -> GpuEvidence:
        arch = {"blackwell": "BLACKWELL", "ls10": "LS10"}.get(self.name.partition("_")[0], "HOPPER")
        return GpuEvidence(arch, "GPU-recorded", self.report, self.chain)


GENUINE_GPUS = (
    "hopper_535.86.09",
    "hopper_550.90.07",
    "hopper_570.86.10_cert_hold_0",
    "hopper_580.95.05_coco_trailing_byte",
    "hopper_590.12_ppcie_0",
    "multi_gpu_hopper_0",
    "multi_gpu_hopper_1",
    "multi_gpu_hopper_2",
    "multi_gpu_hopper_3",
    "blackwell_575.32",
)
INVALID_SIGNATURES = ("hopper_invalid_signature", "ls10_invalid_signature")
RECORDED = (*GENUINE_GPUS, *INVALID_SIGNATURES, "ls10_96.10.55")


def recorded(name: str) -> Recorded:
    """A recorded report with its chain, or a skip."""
    folder = shared_data("nvidia/extracted")
    expected = next(entry for entry in json.loads((folder / "expected.json").read_bytes()) if entry["name"] == name)
    if (folder / f"{name}.report.bin").exists():
        report, chain = ((folder / f"{name}.{end}").read_bytes() for end in ("report.bin", "chain.pem"))
    else:
        path, _, index = expected["source"].partition("[")
        entry = json.loads(shared_data(f"nvidia/{path}").read_bytes())[int(index.rstrip("]"))]
        report, chain = (base64.b64decode(entry[key]) for key in ("evidence", "certificate"))
    return Recorded(name, report, chain, expected)


_SDK = "attestation-sdk/testdata/sample_attestation_data"
_TRUSTEE = "trustee/hopperAttestationReport.txt"
_HOPPER, _HOPPER_CHAIN = f"{_SDK}/gpu/hopperAttestationReport.txt", f"{_SDK}/gpu/hopperCertChain.txt"
_SWITCH_CHAIN = f"{_SDK}/switch/switchCertChain.txt"
_HOPPER_NONCE = "27a328247bf7935c993341cf587be6f05986ccce4fe7ba2c54100bd616a58f66"
_COMMON_NONCE = "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb"
_SWITCH_NONCE = "ea038ed507a451e005bae91186bc9403150a3cb8971fdebd05ffed65eeb6a997"
_COCO_NONCE = "87d8e24ab336adafe228d49e83d745f6dba4ae505372b6a5704820856b343fec"
_FORGED = EvidenceCheck.REPORT_SIGNATURE
_PARTIAL = "number-of-certificates"

Verdict = EvidenceCheck | str | None
TEXT_RECORDS: list[tuple[str, str, str, str, Verdict]] = [
    (_HOPPER, _HOPPER_CHAIN, "HOPPER", _HOPPER_NONCE, None),
    # The chain of another device. What has expired about it only NVIDIA's revocation service knows: its dates are good.
    (_HOPPER, f"{_SDK}/gpu/hopperCertChainExpired.txt", "HOPPER", _HOPPER_NONCE, _FORGED),
    (f"{_SDK}/gpu/hopperAttestationReportInvalidSignature.txt", _HOPPER_CHAIN, "HOPPER", _COMMON_NONCE, _FORGED),
    (f"{_SDK}/gpu/blackwellAttestationReport.txt", f"{_SDK}/gpu/blackwellCertChain.txt", "BLACKWELL", _COMMON_NONCE, None),
    (f"{_SDK}/switch/switchAttestationReport.txt", _SWITCH_CHAIN, "LS10", _COMMON_NONCE, None),
    (f"{_SDK}/switch/switchAttestationReportInvalidSignature.txt", _SWITCH_CHAIN, "LS10", _SWITCH_NONCE, _FORGED),
    ("attestation-sdk/testdata/switchAttestationReport.txt", _SWITCH_CHAIN, "LS10", _COMMON_NONCE, None),
    ("nvtrust/samples/hopperAttestationReport.txt", "nvtrust/samples/hopperCertChain.txt", "HOPPER", _COMMON_NONCE, None),
    (_TRUSTEE, "trustee/hopper_cert_chain_case1.txt", "HOPPER", _COMMON_NONCE, None),
    (_TRUSTEE, "trustee/hopper_cert_chain_case2.txt", "HOPPER", _COMMON_NONCE, _PARTIAL),
    (_TRUSTEE, "trustee/hopper_cert_chain_case3.txt", "HOPPER", _COMMON_NONCE, _PARTIAL),
    (_TRUSTEE, "trustee/hopper_cert_chain_case4.txt", "HOPPER", _COMMON_NONCE, _PARTIAL),
    ("trustee/hopper_coco_report1.txt", "trustee/hopper_coco_certs1.txt", "HOPPER", _COCO_NONCE, None),
]
"""Report, chain, architecture, nonce, and what must come of them: the check or field that fails, None for a genuine device."""
JSON_RECORDS = {
    "attestation-sdk/serialized_test_evidence/hopper_evidence.json": 1,
    "attestation-sdk/serialized_test_evidence/hopper_evidence_cert_hold.json": 1,
    "attestation-sdk/serialized_test_evidence/multi_gpu_hopper.json": 4,
    "attestation-sdk/serialized_test_evidence/multi_switch_ls10.json": 4,
    "attestation-sdk/serialized_test_evidence/switch_evidence_ls10.json": 1,
    "attestation-sdk/testdata/evidence_hopper_590_12.json": 1,
}
"""Lists of devices as NVIDIA's tools write them, and how many: all of them genuine."""
