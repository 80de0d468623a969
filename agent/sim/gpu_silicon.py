"""NVIDIA's part of simulated silicon: roots that say SIMULATED, and devices with keys and chains in the real shapes.

    nvidia-root.pem                the root a broker must be given to believe any of this
    gpu-N.key, gpu-N.pem           attestation key and chain of GPU N
    switch-N.key, switch-N.pem     the same of NVSwitch N
    gpu-N.report, switch-N.report  instead of a key: what the device answers whatever it is asked, for recorded evidence

A device is named by the stem of its files. Source: NVIDIA attestation-sdk (chains); TCG DICE (firmware identities).
"""

import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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

from agent.evidence.gpu_abi import PDI_BYTES, GpuReport, Pdi, pack_report
from agent.sim.machine import write_file
from agent.verify.nvidia import COMPOSITE_DEVICE_ID, DICE_TCB_INFO, CompositeDeviceId, DiceTcbInfo, Fwid

FWID = hashlib.sha384(b"keyturn simulated GPU firmware").digest()

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


def create_gpu_silicon(directory: Path, count: int, switches: int = 0) -> None:
    """NVIDIA's part: a root, and Hopper GPUs and LS10 NVSwitches with their keys and chains."""
    root = issue("SIMULATED Device Identity CA", None)
    write_file(directory / "nvidia-root.pem", _pem(root[1]), mode=0o644)
    for chip, stem, number in ((HOPPER, "gpu", count), (LS10, "switch", switches)):
        authority = issue_authority(chip, root)
        for index in range(number):
            key, chain = issue_device(chip, authority)
            write_file(directory / f"{stem}-{index}.pem", chain, mode=0o644)
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            write_file(directory / f"{stem}-{index}.key", private, mode=0o600)


def read_chain(silicon: Path, device: str) -> bytes:
    """The chain of `gpu-0`, `switch-3` …, PEM, leaf first."""
    return (silicon / f"{device}.pem").read_bytes()


def read_pdi(silicon: Path, device: str) -> Pdi:
    """What the device is called among its peers, as an NVSwitch writes it."""
    return Pdi(hashlib.sha256(read_chain(silicon, device)).digest()[-PDI_BYTES:])


def hand_out(silicon: Path, device: str, report: Callable[[], GpuReport], *, flip: bool, trailing: bool) -> bytes:
    """What the device hands out: the recorded report it has, else `report()` under its signature, spoilt as told."""
    recorded = silicon / f"{device}.report"
    if recorded.exists():
        return recorded.read_bytes()
    signed = bytearray(sign_report(_read_key(silicon, device), report()))
    signed[-1] ^= flip
    return bytes(signed) + bytes(trailing)


def _read_key(silicon: Path, device: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key((silicon / f"{device}.key").read_bytes(), None)
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
