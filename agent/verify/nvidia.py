"""Verify the Evidence of one NVIDIA GPU or NVSwitch: fresh, genuine, and from the firmware its key was made for.

A GPU has two processors that sign reports. The system processor (GSP), which runs the driver's firmware and confidential
computing, answers the driver: its reports are what a GPU is trusted by. The security processor (FSP), which starts the GPU,
answers a management controller, and from Blackwell on has a key of its own.

Owns signatures, chains and firmware identity of reports. Does not appraise: which driver, VBIOS, feature or number of GPUs
is acceptable is a policy's business, and so are revocation and NVIDIA's reference measurements. What devices say of each
other is held together in `ppcie.py`.
Spec: NVIDIA attestation-sdk and nvtrust (report and chain); TCG DICE Attestation Architecture 1.2 (TcbInfo), DICE Layering
Architecture 1.0 (CompositeDeviceID).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from agent.closed import Ident
from agent.errors import (
    EvidenceBindingError,
    EvidenceCheck,
    EvidenceFormat,
    EvidenceVerificationError,
    MalformedEvidenceError,
)
from agent.evidence import SWITCH_ARCH, GpuEvidence, GpuNonce
from agent.evidence.gpu_abi import DIGEST_BYTES, MAX_CHAIN_BYTES, GpuReport, Pdi, parse_report
from agent.verify.roots import NVIDIA_DEVICE_ROOT_SHA256, UNREADABLE, fingerprint

CHAIN_CERTIFICATES = 5  # attestation key, boot ROM identity, provisioner, chip identity, device root
_FIRST_DRIVER_WITH_FWID = 550
COMPOSITE_DEVICE_ID = x509.ObjectIdentifier("2.23.133.5.4.1")
DICE_TCB_INFO = x509.ObjectIdentifier("2.23.133.5.4.1.1")
_ARCH_OF_CHIP = {"GH": "HOPPER", "GB": "BLACKWELL", "GR": "RUBIN", "LS": SWITCH_ARCH}  # first letters of the hardware model
GPU_ARCHS = ("HOPPER", "BLACKWELL", "RUBIN")
_FORMATS_OF_SWITCH = {
    EvidenceFormat.NVIDIA_REPORT: EvidenceFormat.SWITCH_REPORT,
    EvidenceFormat.NVIDIA_CHAIN: EvidenceFormat.SWITCH_CHAIN,
}
_FWID_EXTENSION = {
    "HOPPER": COMPOSITE_DEVICE_ID,
    "BLACKWELL": DICE_TCB_INFO,
    "RUBIN": DICE_TCB_INFO,
    SWITCH_ARCH: COMPOSITE_DEVICE_ID,
}


@dataclass(frozen=True, slots=True)
class GpuClaims:
    """What one GPU's Evidence proves.

    Attributes:
        driver_version: `580.95.05`.
        vbios_version: `96.00.74.00.1A`.
        leaf_key_sha256: SHA-256 of the attestation key's SubjectPublicKeyInfo, hex; tells devices apart.
        ueid: serial number of the attestation key's certificate, decimal, as NVIDIA's tools print it.
        hwmodel: common name of the boot ROM identity, `GH100 A01 GSP BROM`.
        arch: one of `GPU_ARCHS`, from the certificate.
        feature_flag: 0 one GPU, 1 several, 2 protected PCIe; None from drivers before 580.
        simulated: the chain ends in a root passed in whose name says SIMULATED.
        protected_pcie: what the GPU says of protected PCIe; None where it does not say.
        switch_pdis: the NVSwitch at the other end of each link, zeros for a link that is off; empty without protected PCIe.
    """

    driver_version: str
    vbios_version: str
    leaf_key_sha256: str
    ueid: str
    hwmodel: str
    arch: str
    feature_flag: int | None
    simulated: bool
    protected_pcie: bool | None = None
    switch_pdis: tuple[Pdi, ...] = ()


@dataclass(frozen=True, slots=True)
class SwitchClaims:
    """What one NVSwitch's Evidence proves.

    Attributes:
        vbios_version: `96.10.55.00.01`.
        leaf_key_sha256, ueid, hwmodel, simulated: as of a GPU.
        pdi: its own name.
        gpu_pdis: the eight GPUs that it lists.
    """

    vbios_version: str
    leaf_key_sha256: str
    ueid: str
    hwmodel: str
    simulated: bool
    pdi: Pdi
    gpu_pdis: tuple[Pdi, ...]


@dataclass(frozen=True, slots=True)
class FspClaims:
    """What Evidence of a GPU's security processor proves: which GPU it is. It names no driver, and says nothing of the GSP.

    Attributes:
        leaf_key_sha256, ueid, hwmodel, arch, simulated: as of a GPU; the key is another one than the GSP's.
        fwid: 48 bytes, from the certificate: the report does not repeat it.
    """

    leaf_key_sha256: str
    ueid: str
    hwmodel: str
    arch: str
    simulated: bool
    fwid: bytes


@dataclass(frozen=True, slots=True)
class GpuChain:
    """Five P-384 certificates, leaf first, not yet verified."""

    certificates: tuple[x509.Certificate, ...]
    leaf_key: ec.EllipticCurvePublicKey

    @property
    def leaf_key_sha256(self) -> str:
        spki = self.leaf_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).hexdigest()


def verify_gpu(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate], now: datetime) -> GpuClaims:
    """Verify Evidence of one GPU.

    1. The Evidence is a genuine device's, fresh, and from the firmware its key was made for (`_verify_device`).
    2. The device is a GPU's system processor.
    3. Driver and VBIOS version are there, and with a driver that reports its firmware (FWID), that too.

    Args:
        evidence: report and PEM chain of one GPU.
        nonce: 32 bytes, the device nonce of this handshake.
        roots: further trusted roots: simulated silicon. Empty in production.
        now: timezone-aware time at which the certificates must be valid.
    Raises:
        MalformedEvidenceError: report or chain does not parse.
        EvidenceVerificationError: one of the checks above does not hold.
    """
    # 1.
    device = _verify_device(evidence, nonce, roots, now)
    report = device.report

    # 2.
    # refusal: test_a_genuine_switch_or_security_processor_is_no_gpu
    if evidence.arch == SWITCH_ARCH or device.of_security_processor:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

    # 3. Drivers before 550 do not report the FWID; from 550 on its absence is a failure, never a reason to skip.
    driver_version, vbios_version = report.driver_version, report.vbios_version
    # refusal: test_a_report_without_its_versions_is_malformed
    if driver_version is None:
        raise _malformed_report("driver-version")
    # refusal: test_a_report_without_its_versions_is_malformed
    if vbios_version is None:
        raise _malformed_report("vbios-version")
    # refusal: test_a_driver_that_must_report_its_firmware_and_does_not_fails
    if report.fwid is None and _major(driver_version) >= _FIRST_DRIVER_WITH_FWID:
        raise _failed(EvidenceCheck.FWID)

    return GpuClaims(
        driver_version=driver_version,
        vbios_version=vbios_version,
        leaf_key_sha256=device.chain.leaf_key_sha256,
        ueid=device.ueid,
        hwmodel=device.hwmodel,
        arch=evidence.arch,
        feature_flag=report.feature_flag,
        simulated=device.simulated,
        protected_pcie=report.protected_pcie,
        switch_pdis=report.switch_pdis or (),
    )


def verify_fsp(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate], now: datetime) -> FspClaims:
    """Verify Evidence of a GPU's security processor. No guest is given any: it is for whoever holds some.

    1. As of a GPU.
    2. The device is a GPU's security processor.

    Args:
        evidence, nonce, roots, now: as of `verify_gpu`.
    Raises:
        MalformedEvidenceError: report or chain does not parse.
        EvidenceVerificationError: one of the checks above does not hold.
    """
    # 1.
    device = _verify_device(evidence, nonce, roots, now)

    # 2.
    # refusal: test_a_security_processor_is_told_from_a_gpu_and_a_switch
    if evidence.arch == SWITCH_ARCH or not device.of_security_processor:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

    return FspClaims(
        leaf_key_sha256=device.chain.leaf_key_sha256,
        ueid=device.ueid,
        hwmodel=device.hwmodel,
        arch=evidence.arch,
        simulated=device.simulated,
        fwid=device.fwid,
    )


@contextmanager
def told_of_switch() -> Iterator[None]:
    """What fails inside is said of an NVSwitch: its report and chain have a GPU's formats, and the difference matters."""
    try:
        yield
    except (MalformedEvidenceError, EvidenceBindingError, EvidenceVerificationError) as error:
        error.format = _FORMATS_OF_SWITCH.get(error.format, error.format)
        raise


@told_of_switch()
def verify_switch(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate], now: datetime) -> SwitchClaims:
    """Verify Evidence of one NVSwitch (LS10). Its report has no driver version and no FWID.

    1. As of a GPU.
    2. The device is an NVSwitch.
    3. VBIOS version, its own PDI and those of the GPUs are there.

    Args:
        evidence, nonce, roots, now: as of `verify_gpu`.
    Raises:
        MalformedEvidenceError: report or chain does not parse.
        EvidenceVerificationError: one of the checks above does not hold.
    """
    # 1.
    device = _verify_device(evidence, nonce, roots, now)
    report = device.report

    # 2.
    # refusal: test_a_genuine_gpu_is_no_switch
    if evidence.arch != SWITCH_ARCH:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

    # 3.
    vbios_version, pdi, gpu_pdis = report.vbios_version, report.device_pdi, report.gpu_pdis
    # refusal: test_a_switch_without_its_names_is_malformed
    if vbios_version is None:
        raise _malformed_report("vbios-version")
    # refusal: test_a_switch_without_its_names_is_malformed
    if pdi is None:
        raise _malformed_report("pdi")
    # refusal: test_a_switch_without_its_names_is_malformed
    if gpu_pdis is None:
        raise _malformed_report("gpu-pdis")

    return SwitchClaims(
        vbios_version=vbios_version,
        leaf_key_sha256=device.chain.leaf_key_sha256,
        ueid=device.ueid,
        hwmodel=device.hwmodel,
        simulated=device.simulated,
        pdi=pdi,
        gpu_pdis=gpu_pdis,
    )


@dataclass(frozen=True, slots=True)
class _Device:
    """A genuine device's fresh report, and who the device is."""

    report: GpuReport
    chain: GpuChain
    hwmodel: str
    simulated: bool
    fwid: bytes

    @property
    def ueid(self) -> str:
        return str(self.chain.certificates[0].serial_number)

    @property
    def of_security_processor(self) -> bool:
        return "FSP" in self.hwmodel.split()


def _verify_device(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate], now: datetime) -> _Device:
    """What holds for GPU and NVSwitch alike.

    1. Report and chain parse.
    2. The report carries our nonce.
    3. Every certificate is valid now; the chain ends in the pinned NVIDIA device root or in one of `roots`.
    4. The leaf key signed the report.
    5. The architecture of the chip is the one the Evidence names.
    6. The leaf key was made for the firmware that the report names (FWID), if it names one.
    """
    # 1.
    report = parse_report(evidence.report)
    chain = parse_chain(evidence.certificate_chain)
    leaf, brom = chain.certificates[:2]

    # 2.
    # refusal: test_another_nonce_does_not_verify
    if report.requester_nonce != nonce:
        raise _failed(EvidenceCheck.NONCE)

    # 3.
    extra_root = _verify_chain(chain, roots, now)

    # 4.
    # refusal: test_one_flipped_bit_breaks_the_signature
    verify_report_signature(report, chain)

    # 5.
    hwmodel = _common_name(brom)
    # refusal: test_the_architecture_is_the_one_of_the_certificate
    if _ARCH_OF_CHIP.get(hwmodel[:2]) != evidence.arch:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

    # 6. Each architecture has its own place for it in the leaf, and no other place counts.
    fwid = _fwid_of_certificate(leaf, _FWID_EXTENSION[evidence.arch])
    # refusal: test_a_report_of_other_firmware_than_the_key_was_made_for_does_not_verify
    if report.fwid is not None and report.fwid != fwid:
        raise _failed(EvidenceCheck.FWID)

    simulated = extra_root and "SIMULATED" in _common_name(chain.certificates[-1])
    return _Device(report, chain, hwmodel, simulated, fwid)


def parse_chain(chain: bytes) -> GpuChain:
    """Parse a certificate chain.

    Args:
        chain: five PEM certificates, leaf first, at most 5120 bytes.
    Raises:
        MalformedEvidenceError: it is not five certificates with keys on P-384.
    """
    # refusal: test_a_chain_is_five_certificates
    if len(chain) > MAX_CHAIN_BYTES:
        raise _malformed_chain("length", len(chain), MAX_CHAIN_BYTES)
    try:
        certificates = tuple(x509.load_pem_x509_certificates(chain))
        keys = [certificate.public_key() for certificate in certificates]
    except UNREADABLE as exc:
        raise _malformed_chain("certificate") from exc
    # refusal: test_a_chain_is_five_certificates
    if len(certificates) != CHAIN_CERTIFICATES:
        raise _malformed_chain("number-of-certificates", len(certificates), CHAIN_CERTIFICATES)
    leaf_key = keys[0]
    # refusal: test_every_key_is_on_p384
    if not all(isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1) for key in keys):
        raise _malformed_chain("public-key")
    assert isinstance(leaf_key, ec.EllipticCurvePublicKey)
    return GpuChain(certificates, leaf_key)


def verify_report_signature(report: GpuReport, chain: GpuChain) -> None:
    """The leaf key of the chain signed the report; says nothing about the chain itself.

    Raises:
        EvidenceVerificationError: it did not.
    """
    r, s = (int.from_bytes(half, "big") for half in (report.signature[:48], report.signature[48:]))
    try:
        # refusal: test_one_flipped_bit_breaks_the_signature
        chain.leaf_key.verify(encode_dss_signature(r, s), report.signed_bytes, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as exc:
        raise _failed(EvidenceCheck.REPORT_SIGNATURE) from exc


def _verify_chain(chain: GpuChain, roots: Sequence[x509.Certificate], now: datetime) -> bool:
    """True when the root is one of `roots`, False when it is the pinned one."""
    certificates = chain.certificates
    root = certificates[-1]
    pinned = fingerprint(root) == NVIDIA_DEVICE_ROOT_SHA256
    # refusal: test_a_simulated_gpu_is_nothing_to_production
    if not pinned and root not in roots:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    # The library does not look at the dates of a trust anchor, and does not tell dates from other failures.
    # refusal: test_certificates_are_checked_at_the_given_time
    if not all(certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc for certificate in certificates):
        raise _failed(EvidenceCheck.CERTIFICATE_VALIDITY)
    policy = PolicyBuilder().store(Store([root])).time(now).max_chain_depth(CHAIN_CERTIFICATES)
    try:
        verified = policy.build_client_verifier().verify(certificates[0], list(certificates[1:-1]))
    except (VerificationError, *UNREADABLE) as exc:  # it reads names and extensions only on the way
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN) from exc
    # The path found must be the whole chain: no certificate is along for the ride.
    # refusal: test_certificates_out_of_order_or_repeated_are_no_chain
    if tuple(verified.chain) != certificates:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    return not pinned


@asn1.sequence
class Fwid:
    """A firmware identity: digest algorithm and digest."""

    algorithm: x509.ObjectIdentifier
    digest: bytes


@asn1.sequence
class CompositeDeviceId:
    """The key a device was made with and the firmware its certificate is for."""

    version: int
    device_key: asn1.TLV
    fwid: Fwid


@asn1.sequence
class IntegrityRegister:
    """What DICE says of a register that firmware is measured into."""

    name: Annotated[asn1.IA5String | None, asn1.Implicit(0)]
    number: Annotated[int | None, asn1.Implicit(1)]
    digests: Annotated[list[Fwid] | None, asn1.Implicit(2)]


@asn1.sequence
class DiceTcbInfo:
    """What DICE says of a firmware layer; the last two since version 1.2."""

    vendor: Annotated[str | None, asn1.Implicit(0)]
    model: Annotated[str | None, asn1.Implicit(1)]
    version: Annotated[str | None, asn1.Implicit(2)]
    svn: Annotated[int | None, asn1.Implicit(3)]
    layer: Annotated[int | None, asn1.Implicit(4)]
    index: Annotated[int | None, asn1.Implicit(5)]
    fwids: Annotated[list[Fwid] | None, asn1.Implicit(6)]
    flags: Annotated[asn1.BitString | None, asn1.Implicit(7)]
    vendor_info: Annotated[bytes | None, asn1.Implicit(8)]
    type: Annotated[bytes | None, asn1.Implicit(9)]
    flags_mask: Annotated[asn1.BitString | None, asn1.Implicit(10)] = None
    integrity_registers: Annotated[list[IntegrityRegister] | None, asn1.Implicit(11)] = None


def _fwid_of_certificate(leaf: x509.Certificate, oid: x509.ObjectIdentifier) -> bytes:
    """The 48-byte firmware identity; a Blackwell leaf lists two and the second is zero."""
    digest = b""
    try:
        value = leaf.extensions.get_extension_for_oid(oid).value
        if isinstance(value, x509.UnrecognizedExtension):
            if oid == COMPOSITE_DEVICE_ID:
                digest = asn1.decode_der(CompositeDeviceId, value.value).fwid.digest
            elif fwids := asn1.decode_der(DiceTcbInfo, value.value).fwids:
                digest = fwids[0].digest
    except (x509.ExtensionNotFound, *UNREADABLE) as exc:
        raise _malformed_chain("fwid-extension") from exc
    # refusal: test_a_leaf_without_a_readable_firmware_identity_is_malformed
    if len(digest) != DIGEST_BYTES:
        raise _malformed_chain("fwid-extension", len(digest), DIGEST_BYTES)
    return digest


def _common_name(certificate: x509.Certificate) -> str:
    try:
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except UNREADABLE as exc:
        raise _malformed_chain("subject") from exc
    # refusal: test_a_boot_rom_that_does_not_have_exactly_one_name_is_malformed
    if len(names) != 1:
        raise _malformed_chain("subject")
    return str(names[0].value)  # the library refuses bytes in a common name


def _major(driver_version: str) -> int:
    major = re.match(r"([0-9]{1,4})\.", driver_version)
    # refusal: test_a_report_without_its_versions_is_malformed
    if major is None:
        raise _malformed_report("driver-version")
    return int(major[1])


def _failed(check: EvidenceCheck) -> EvidenceVerificationError:
    of_report = check in (EvidenceCheck.NONCE, EvidenceCheck.REPORT_SIGNATURE, EvidenceCheck.FWID)
    return EvidenceVerificationError(EvidenceFormat.NVIDIA_REPORT if of_report else EvidenceFormat.NVIDIA_CHAIN, check)


def _malformed_report(field: str) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.NVIDIA_REPORT, Ident(field))


def _malformed_chain(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.NVIDIA_CHAIN, Ident(field), got, expected)
