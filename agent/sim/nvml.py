"""Simulated GPUs behind NVML: the real pynvml drives them, the real verifier judges their Evidence.

`SimulatedNvml` stands where pynvml expects the loaded library: an object whose attributes are C functions over C structs. What
those do follows the driver: the ready state latches, and a failed certificate or report call ends confidential computing until
the machine ends. Reports are built from the layout, with the nonce asked for, and signed by the GPU's own key under a chain of
five certificates that says SIMULATED in every one.

    silicon/nvidia-root.pem           the root a broker must be given to believe any of this
    silicon/gpu-N.key, gpu-N.pem      attestation key and chain of GPU N
    silicon/gpu-N.report              instead of a key: what GPU N answers whatever it is asked, for recorded evidence
    kmsg, cmdline, nvidia-params      the machine's kernel log, kernel command line and driver parameters
    nvml.log                          every NVML function called, one a line

Source: NVIDIA open-gpu-kernel-modules 595.45.04, conf_compute_api.c (latch), nvml.h (structs and return codes).
"""

import ctypes
import datetime
import hashlib
import secrets
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pynvml
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from agent.evidence import GpuNonce
from agent.evidence.gpu import NvmlGpuSystem
from agent.evidence.gpu_abi import (
    OPAQUE_CHIP_SKU,
    OPAQUE_DRIVER_VERSION,
    OPAQUE_FEATURE_FLAG,
    OPAQUE_FWID,
    OPAQUE_PROJECT,
    OPAQUE_PROJECT_SKU,
    OPAQUE_VBIOS_VERSION,
    SIGNATURE_BYTES,
    GpuReport,
    pack_report,
)
from agent.sim.machine import SimulatedMachine, write_file
from agent.verify.nvidia import COMPOSITE_DEVICE_ID, DICE_TCB_INFO, CompositeDeviceId, DiceTcbInfo, Fwid

FWID = hashlib.sha384(b"keyturn simulated GPU firmware").digest()
BLOCKS = 64
MULTI_GPU_MODES = (1, 2)
FEATURE_FLAG_OF_MULTI_GPU_MODE = {0: 0, 1: 2, 2: 1}
CALL_LOG = "nvml.log"
KERNEL_LOG = "kmsg"

_U32 = ctypes.c_uint32
_ADDRESS = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "nvmlInitWithFlags": (_U32,),
    "nvmlSystemGetDriverVersion": (_ADDRESS, _U32),
    "nvmlSystemGetConfComputeSettings": (_ADDRESS,),
    "nvmlSystemGetConfComputeGpusReadyState": (_ADDRESS,),
    "nvmlSystemSetConfComputeGpusReadyState": (_U32,),
    "nvmlDeviceGetCount_v2": (_ADDRESS,),
    "nvmlDeviceGetHandleByIndex_v2": (_U32, _ADDRESS),
    "nvmlDeviceGetUUID": (_ADDRESS, _ADDRESS, _U32),
    "nvmlDeviceGetArchitecture": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetVbiosVersion": (_ADDRESS, _ADDRESS, _U32),
    "nvmlDeviceGetPersistenceMode": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetConfComputeGpuCertificate": (_ADDRESS, _ADDRESS),
    "nvmlDeviceGetConfComputeGpuAttestationReport": (_ADDRESS, _ADDRESS),
}
_LATCHING = ("nvmlDeviceGetConfComputeGpuCertificate", "nvmlDeviceGetConfComputeGpuAttestationReport")

Issued = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def issue(name: str, issuer: Issued | None, leaf: Sequence[x509.ExtensionType] | None = None) -> Issued:
    """A P-384 key and its certificate, shaped like NVIDIA's.

    Args:
        name: the common name.
        issuer: None for a self-signed root.
        leaf: further extensions of a leaf; None for a certificate authority.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name((x509.NameAttribute(x509.NameOID.COMMON_NAME, name),))
    issuer_key, issuer_name = (issuer[0], issuer[1].subject) if issuer else (key, subject)
    usage = x509.KeyUsage(
        digital_signature=leaf is not None,
        key_cert_sign=leaf is None,
        crl_sign=leaf is None,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))  # as NVIDIA's
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if leaf is None:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    else:
        alias = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1"), b"\x0c\x14SIMULATED:GH100:0000")
        for extension in (x509.SubjectAlternativeName((alias,)), *leaf):
            builder = builder.add_extension(extension, critical=False)
    return key, builder.sign(issuer_key, hashes.SHA384())


@dataclass(frozen=True, slots=True)
class Chip:
    """What a kind of device is called in its certificates, and where its leaf keeps the firmware identity."""

    arch: str
    name: str
    unit: str
    extension: Callable[[ec.EllipticCurvePrivateKey], x509.UnrecognizedExtension]


def issue_authority(chip: Chip, root: Issued) -> tuple[Issued, Issued, Issued]:
    """NVIDIA's part of the chains of one kind of device: root, identity, provisioner."""
    identity = issue(f"SIMULATED {chip.name} Identity", root)
    return root, identity, issue(f"SIMULATED {chip.name} Provisioner ICA 1", identity)


def issue_device(chip: Chip, authority: tuple[Issued, Issued, Issued]) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """The attestation key of one device, and its chain as the device hands it out: PEM, leaf first."""
    brom = issue(f"{chip.name} SIMULATED {chip.unit} BROM", authority[-1])
    key, leaf = issue(f"{chip.name} SIMULATED {chip.unit} FMC LF", brom, (chip.extension(brom[0]),))
    return key, b"".join(_pem(each) for each in (leaf, brom[1], *(issued[1] for issued in reversed(authority))))


def sign_report(key: ec.EllipticCurvePrivateKey, report: GpuReport) -> bytes:
    """The report as a device hands it out: its fields, whatever they say, under a good signature of `key`."""
    r, s = decode_dss_signature(key.sign(report.signed_bytes, ec.ECDSA(hashes.SHA384())))
    return pack_report(replace(report, signature=r.to_bytes(48, "big") + s.to_bytes(48, "big")))


def create_gpu_silicon(directory: Path, count: int) -> None:
    """NVIDIA's part: a root, and `count` Hopper GPUs with their keys and chains."""
    root = issue("SIMULATED Device Identity CA", None)
    write_file(directory / "nvidia-root.pem", _pem(root[1]), mode=0o644)
    authority = issue_authority(HOPPER, root)
    for index in range(count):
        key, chain = issue_device(HOPPER, authority)
        write_file(directory / f"gpu-{index}.pem", chain, mode=0o644)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(directory / f"gpu-{index}.key", private, mode=0o600)


def open_gpu_system(machine: SimulatedMachine, library: object = None) -> NvmlGpuSystem:
    """The machine's GPUs, with the machine's own kernel log, command line and driver parameters.

    Args:
        machine: whose GPUs.
        library: what has NVML's functions as attributes; None for `SimulatedNvml`.

    Raises:
        DeviceError: NVML is told to fail at its initialisation.
    """
    files = {
        KERNEL_LOG: "6,1,0,-;nvidia: loading NVIDIA UNIX Open Kernel Module (simulated)\n",
        "cmdline": "console=ttyS0\n",
        "nvidia-params": 'RegistryDwords: ""\nRegistryDwordsPerDevice: ""\n',
    }
    for name, text in files.items():
        path = machine.directory / name
        if not path.exists():
            path.write_text(text)
    return NvmlGpuSystem(
        SimulatedNvml(machine) if library is None else library,
        kernel_log=machine.directory / KERNEL_LOG,
        kernel_command_line=machine.directory / "cmdline",
        driver_parameters=machine.directory / "nvidia-params",
    )


def nvml_calls(machine: SimulatedMachine) -> list[str]:
    """Every NVML function called on this machine so far, by any process, in order."""
    path = machine.directory / CALL_LOG
    return path.read_text().split() if path.exists() else []


class SimulatedNvml:
    """What pynvml takes for the loaded library. Its C functions are attributes named as in `nvml.h`."""

    def __init__(self, machine: SimulatedMachine) -> None:
        """The machine's state is read at every call and saved at every change."""
        self._machine = machine
        self._initialised = False
        for name, arguments in _SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(_U32, *arguments)(self._entry(name, getattr(self, f"_{name}"))))

    def _entry(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def entry(*arguments: int) -> int:
            try:
                with (self._machine.directory / CALL_LOG).open("a") as log:
                    log.write(f"{name}\n")
                return self._answer(name, function, arguments)
            except Exception:  # noqa: BLE001  # ctypes would swallow it and return 0, which is NVML's success
                traceback.print_exc()
                return int(pynvml.NVML_ERROR_UNKNOWN)

        return entry

    def _answer(self, name: str, function: Callable[..., int], arguments: tuple[int, ...]) -> int:
        self._machine.reread()
        gpu = self._machine.gpu
        time.sleep(gpu.delay_calls.get(name, 0))
        if name in gpu.fail_calls:
            code = gpu.fail_calls[name]
        elif not self._initialised and name != "nvmlInitWithFlags":
            code = pynvml.NVML_ERROR_UNINITIALIZED
        elif name in _LATCHING and gpu.cc_feature == 0 and gpu.multi_gpu_mode not in MULTI_GPU_MODES:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)  # and nothing to latch
        elif name in _LATCHING and gpu.fatal_latched:
            code = pynvml.NVML_ERROR_NOT_READY
        else:
            code = function(*arguments)
        if code != pynvml.NVML_SUCCESS and name in _LATCHING:
            self._latch()
        return int(code)

    def _latch(self) -> None:
        gpu = self._machine.gpu
        if not gpu.fatal_latched:
            gpu.fatal_latched, gpu.ready = True, 0
            self._machine.save()
            with (self._machine.directory / KERNEL_LOG).open("a") as log:
                log.write("3,2,0,-;NVRM: ConfCompute: Fatal error hit!\n")

    # One method per C function; integers are addresses unless the name says otherwise.

    def _nvmlInitWithFlags(self, _flags: int) -> int:
        self._initialised = True
        return 0

    def _nvmlSystemGetDriverVersion(self, version: int, size: int) -> int:
        return _write_text(version, size, self._machine.gpu.driver_version)

    def _nvmlSystemGetConfComputeSettings(self, settings: int) -> int:
        struct = pynvml.c_nvmlSystemConfComputeSettings_v1_t.from_address(settings)
        if struct.version != pynvml.nvmlSystemConfComputeSettings_v1:
            return int(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        gpu = self._machine.gpu
        struct.environment, struct.ccFeature = gpu.environment, gpu.cc_feature
        struct.devToolsMode, struct.multiGpuMode = gpu.devtools, gpu.multi_gpu_mode
        return 0

    def _nvmlSystemGetConfComputeGpusReadyState(self, ready: int) -> int:
        gpu = self._machine.gpu
        if gpu.ready and gpu.ready_falls_back_after is not None:
            if gpu.ready_falls_back_after == 0:
                self._latch()
            else:
                gpu.ready_falls_back_after -= 1
                self._machine.save()
        _U32.from_address(ready).value = gpu.ready
        return 0

    def _nvmlSystemSetConfComputeGpusReadyState(self, ready: int) -> int:
        gpu = self._machine.gpu
        if gpu.fatal_latched:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if gpu.ready and not ready:
            self._latch()
        elif gpu.ready != ready:
            gpu.ready = ready
            self._machine.save()
        return 0

    def _nvmlDeviceGetCount_v2(self, count: int) -> int:
        _U32.from_address(count).value = self._machine.gpu.count
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: int) -> int:
        if index >= self._machine.gpu.count:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        _ADDRESS.from_address(handle).value = index + 1
        return 0

    def _nvmlDeviceGetUUID(self, handle: int, text: int, size: int) -> int:
        chain = _read_chain(self._machine.silicon, handle - 1)
        return _write_text(text, size, f"GPU-{uuid.UUID(bytes=hashlib.sha256(chain).digest()[:16])}")

    def _nvmlDeviceGetArchitecture(self, _handle: int, architecture: int) -> int:
        _U32.from_address(architecture).value = self._machine.gpu.architecture
        return 0

    def _nvmlDeviceGetPersistenceMode(self, _handle: int, mode: int) -> int:
        _U32.from_address(mode).value = self._machine.gpu.persistent
        return 0

    def _nvmlDeviceGetVbiosVersion(self, _handle: int, text: int, size: int) -> int:
        return _write_text(text, size, self._machine.gpu.vbios_version)

    def _nvmlDeviceGetConfComputeGpuCertificate(self, handle: int, certificate: int) -> int:
        struct = pynvml.c_nvmlConfComputeGpuCertificate_t.from_address(certificate)
        chain = _read_chain(self._machine.silicon, self._signer(handle))
        struct.certChainSize = pynvml.NVML_GPU_CERT_CHAIN_SIZE  # Hopper leaves that chain empty and its size as it is
        struct.attestationCertChainSize = len(chain)
        struct.attestationCertChain[: len(chain)] = chain
        return 0

    def _nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, answer: int) -> int:
        struct = pynvml.c_nvmlConfComputeGpuAttestationReport_t.from_address(answer)
        gpu = self._machine.gpu
        nonce = secrets.token_bytes(32) if gpu.wrong_nonce else bytes(struct.nonce)
        signer = self._signer(handle)
        recorded = self._machine.silicon / f"gpu-{signer}.report"
        report = recorded.read_bytes() if recorded.exists() else self._report(signer, GpuNonce(nonce))
        struct.isCecAttestationReportPresent = pynvml.NVML_CC_CEC_ATTESTATION_REPORT_NOT_PRESENT
        struct.attestationReportSize = len(report)
        struct.attestationReport[: len(report)] = report
        return 0

    def _signer(self, handle: int) -> int:
        return 0 if self._machine.gpu.repeat_first_gpu else handle - 1

    def _report(self, index: int, nonce: GpuNonce) -> bytes:
        gpu = self._machine.gpu
        vbios = bytes.fromhex(gpu.vbios_version.replace(".", ""))
        report = GpuReport(
            requester_nonce=nonce,
            measurements=tuple(hashlib.sha384(b"keyturn simulated block %d" % block).digest() for block in range(BLOCKS)),
            responder_nonce=secrets.token_bytes(32),
            opaque=(
                (OPAQUE_VBIOS_VERSION, vbios[3::-1] + vbios[4:] + bytes(3)),
                (OPAQUE_CHIP_SKU, b"882\0"),
                (OPAQUE_PROJECT, b"1010\0"),
                (OPAQUE_PROJECT_SKU, b"0200\0"),
                (OPAQUE_DRIVER_VERSION, gpu.driver_version.encode() + b"\0"),
                (OPAQUE_FWID, FWID),
                (OPAQUE_FEATURE_FLAG, FEATURE_FLAG_OF_MULTI_GPU_MODE[gpu.multi_gpu_mode].to_bytes(2, "little")),
            ),
            signature=bytes(SIGNATURE_BYTES),
        )
        signed = bytearray(sign_report(_read_key(self._machine.silicon, index), report))
        signed[-1] ^= gpu.flip_signature_bit
        return bytes(signed) + bytes(gpu.trailing_byte)


def _write_text(address: int, size: int, text: str) -> int:
    if len(text) >= size:
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    ctypes.memmove(address, text.encode() + b"\0", len(text) + 1)
    return 0


def _read_chain(silicon: Path, index: int) -> bytes:
    return (silicon / f"gpu-{index}.pem").read_bytes()


def _read_key(silicon: Path, index: int) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key((silicon / f"gpu-{index}.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _composite_device_id(device_key: ec.EllipticCurvePrivateKey) -> x509.UnrecognizedExtension:
    spki = device_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    identity = CompositeDeviceId(version=1, device_key=asn1.decode_der(asn1.TLV, spki), fwid=_fwid(FWID))
    return x509.UnrecognizedExtension(COMPOSITE_DEVICE_ID, asn1.encode_der(identity))


def _fwid(digest: bytes) -> Fwid:
    return Fwid(algorithm=x509.ObjectIdentifier("2.16.840.1.101.3.4.2.2"), digest=digest)


def _dice_tcb_info(_device_key: ec.EllipticCurvePrivateKey) -> x509.UnrecognizedExtension:
    info = DiceTcbInfo(
        vendor="SIMULATED",
        model="GB100",
        version=None,
        svn=None,
        layer=None,
        index=None,
        fwids=[_fwid(FWID), _fwid(bytes(48))],
        flags=None,
        vendor_info=None,
        type=None,
    )
    return x509.UnrecognizedExtension(DICE_TCB_INFO, asn1.encode_der(info))


HOPPER = Chip("HOPPER", "GH100", "GSP", _composite_device_id)
BLACKWELL = Chip("BLACKWELL", "GB100", "GSP", _dice_tcb_info)
LS10 = Chip("LS10", "LS_10", "FSP", _composite_device_id)
