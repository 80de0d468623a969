"""What the guest says of itself: the types every other step knows, and the device Protocols.

Terms follow RFC 9334: the CPU side is the lead Attester, GPUs are sub-Attesters, what they produce is Evidence.
Does not parse, sign or verify anything: layouts live in the `_abi` modules, signatures in `agent/verify`.
"""

import enum
from dataclasses import dataclass
from typing import NewType, Protocol

from agent.closed import Ident

Nonce = NewType("Nonce", bytes)
"""The broker's nonce: 32 bytes, single use."""
ReportData = NewType("ReportData", bytes)
"""64 bytes the CPU report carries: a hash over the runtime data, zero-padded on the right."""
GpuNonce = NewType("GpuNonce", bytes)
"""The SPDM requester nonce: 32 bytes, the first of the device digest."""

NONCE_BYTES = 32
REPORT_DATA_BYTES = 64
NO_REPORT_DATA = ReportData(bytes(REPORT_DATA_BYTES))
"""For a report that only tells us something and proves nothing to anybody."""
GPU_NONCE_BYTES = 32

SWITCH_ARCH = "LS10"
"""The architecture of an NVSwitch that can attest, in Trustee's words."""


class OpaqueNonce(bytes):
    """Trustee's nonce: a text, here its UTF-8, that is bound and sent back as it came, whatever it says. A `Nonce` holds it."""


class BindingHash(enum.Enum):
    """What binds the runtime data, by Trustee's names. A Challenge may select another than SHA-384; our broker's never does."""

    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"


class Tee(enum.Enum):
    """Kinds of TEE, by their Trustee wire names."""

    SNP = "snp"
    TDX = "tdx"
    SAMPLE = "sample"
    """Nothing: Trustee's evidence for trying things out. A simulator's, and of no use to our own broker."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence of the CPU TEE.

    Attributes:
        report: the binary report (SNP: 1184 bytes) or quote (TDX), as the device returned it; of `sample` the digest alone.
        cert_chain: DER certificates the host supplied, leaf first; may be empty, then the Verifier brings its own. A TDX
            quote holds its own, so there it is empty.
        event_log: TDX: what was measured into the RTMRs, without padding (`ccel.py`); empty where there is none. The report
            data does not cover it: it is believed when it replays to the quote's RTMRs.
    """

    tee: Tee
    report: bytes
    cert_chain: tuple[bytes, ...] = ()
    event_log: bytes = b""


class Attester(Protocol):
    """One TEE device interface. Blocking; a request is never abandoned half-way.

    Attributes:
        interface: what stands between us and the TEE: `configfs-tsm`, `sev-guest` …
    """

    tee: Tee
    interface: Ident

    def collect(self, report_data: ReportData) -> Evidence:
        """Fresh Evidence over `report_data` (64 bytes).

        Raises:
            DeviceError: the device refused, after as many requests as its interface allows; never retried by who is told.
            MalformedEvidenceError: what came back does not parse.
            EvidenceBindingError: what came back carries other report data.
        """

    def launch_digest(self) -> bytes:
        """What the host set at launch to stand for the configuration, by the word of the TEE itself and nobody else's.

        Returns:
            HOST_DATA (SNP, 32 bytes) or MRCONFIGID (TDX, 48 bytes).

        Raises:
            AgentError: as `collect`.
        """


class Unsupported(enum.Enum):
    """Why nothing is measured at run time. No error: such a guest is what it is, and its verifier sees it."""

    NO_REGISTER = "no-register"  # SEV-SNP: what a guest does after its launch is covered by report data alone
    NO_DRIVER = "no-driver"  # the kernel has no file for it: Linux 6.16 brought it
    READ_ONLY = "read-only"  # this process may not write it: a container's sysfs, or not root
    NOT_ENABLED = "not-enabled"  # CoCo's attestation agent has its log switched off, as it is by default
    FOREIGN_LOG = "foreign-log"  # CoCo's attestation agent keeps the log: an event that is not in it would spoil its replay


class RuntimeRegister(Protocol):
    """The register that a running guest extends: RTMR 3 of a TDX guest. Blocking, and quick."""

    def read(self) -> bytes | Unsupported:
        """Its value, 48 bytes, where it can be extended. Raises DeviceError."""

    def extend(self, digest: bytes) -> None:
        """Make it SHA-384(value ‖ digest), with a digest of 48 bytes; only after `read` gave a value.

        It cannot be taken back before the next start of the guest.

        Raises:
            DeviceError: the kernel refused.
        """


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """Evidence of one GPU, or of one NVSwitch, which has the same shape.

    Attributes:
        arch: `HOPPER`, `BLACKWELL`, or `LS10` for an NVSwitch (Trustee's words).
        uuid: NVML's UUID, `GPU-…`; of an NVSwitch NSCQ's label, `SWX-…`.
        report: SPDM GET_MEASUREMENTS request and response, binary (about 4 KiB).
        certificate_chain: PEM, leaf first, five certificates.
    """

    arch: str
    uuid: str
    report: bytes
    certificate_chain: bytes


@dataclass(frozen=True, slots=True)
class GpuModes:
    """NVML's confidential-compute state and settings, as the integers NVML defines."""

    cc_feature: int  # 1 = on; protected PCIe shows as 0 with multi_gpu_mode 1
    environment: int  # 0 unavailable, 1 simulation, 2 production
    devtools: int  # 0 = off
    multi_gpu_mode: int  # 0 none, 1 protected PCIe, 2 NVLE


@dataclass(frozen=True, slots=True)
class Gpu:
    uuid: str
    arch: str
    vbios_version: str


@dataclass(frozen=True, slots=True)
class Switch:
    uuid: str
    arch: str
    mode: int  # trusted NVLink: -1 unknown, 0 off, 1 on, 2 failed, 3 on and locked


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """Everything the gate compares: read before attestation and again before the ready state is set."""

    driver_version: str
    gpus: tuple[Gpu, ...]
    modes: GpuModes
    ready: bool
    persistent: bool  # every GPU stays initialised when nobody has it open
    switches: tuple[Switch, ...] = ()  # where the configuration names any


class GpuSystem(Protocol):
    """All GPUs of this guest; ready state and modes are system-wide. Blocking, serial, never abandoned half-way."""

    def inspect(self) -> GpuInventory:
        """Inventory, modes and ready state as they are now. Raises DeviceError."""

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence of every GPU over `nonce` (32 bytes), in NVML order, then of every NVSwitch.

        Raises DeviceError; never retried.
        """

    def check_faults(self) -> None:
        """Raises GpuFaultError when the kernel log shows a fatal XID or CC fault, or cannot be read."""

    def set_ready(self) -> None:
        """Set the ready state 0→1 and read it back. Once per VM, without compensation. Raises DeviceError, GpuFaultError."""


class SwitchSystem(Protocol):
    """All NVSwitches of this guest. Blocking, serial, never abandoned half-way."""

    def inspect(self) -> tuple[Switch, ...]:
        """Every NVSwitch and its mode as they are now. Raises DeviceError."""

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence of every NVSwitch over `nonce` (32 bytes), in the order of `inspect`. Raises DeviceError."""


@dataclass(frozen=True, slots=True)
class RuntimeData:
    """What the Evidence must cover: the nonce as the broker sent it, and our ephemeral public key (EC P-256)."""

    nonce: Nonce
    public_key_x: bytes  # 32 bytes, big endian
    public_key_y: bytes  # 32 bytes, big endian
    hash: BindingHash = BindingHash.SHA384


@dataclass(frozen=True, slots=True)
class CompositeEvidence:
    """CPU Evidence and the exact text of the device Evidence that it covers.

    Attributes:
        additional_evidence: Trustee's JSON text `{"nvidia":{"device_evidence_list":[…]}}`, `""` when there are no devices.
    """

    primary: Evidence
    additional_evidence: str
