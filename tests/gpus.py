"""Simulated GPUs and recorded NVIDIA evidence for tests."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent.evidence import GpuEvidence, GpuNonce
from agent.evidence.gpu_abi import GpuReport
from agent.sim.machine import GpuKnobs, SimulatedMachine
from agent.sim.nvml import create_gpu_silicon
from tests.shared import shared_data

NONCE = GpuNonce(bytes(range(32)))


def gpu_machine(directory: Path, count: int = 2) -> SimulatedMachine:
    """A machine with GPUs and no CPU TEE, whose silicon takes milliseconds to make."""
    silicon = directory / "silicon"
    silicon.mkdir(parents=True)
    create_gpu_silicon(silicon, count)
    machine = SimulatedMachine(directory=directory, silicon=silicon, chip_id=bytes(64), gpu=GpuKnobs(count=count))
    machine.save()
    return machine


def simulated_root(machine: SimulatedMachine) -> x509.Certificate:
    return x509.load_pem_x509_certificate((machine.silicon / "nvidia-root.pem").read_bytes())


def signed_by(silicon: Path, index: int, report: GpuReport) -> bytes:
    """The report with a good signature of GPU `index`, whatever it says."""
    key = load_pem_private_key((silicon / f"gpu-{index}.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(report.signed_bytes, ec.ECDSA(SHA384())))
    return report.signed_bytes + r.to_bytes(48, "big") + s.to_bytes(48, "big")


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
        arch = "BLACKWELL" if self.name.startswith("blackwell") else "HOPPER"
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
