"""Simulated SEV-SNP: version 3 reports of a Genoa chip, signed under a chain in AMD's format.

ARK and ASK are RSA-4096, the VCEK is P-384 with AMD's extensions and AMD's serial number 0, so the production verifier
runs on them unchanged. The names say SIMULATED. The ARK's key is thrown away once it has signed the ASK and a list.
"""

import datetime
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from agent.closed import Ident
from agent.errors import DeviceError, EvidenceBindingError, EvidenceFormat
from agent.evidence import NO_REPORT_DATA, Evidence, ReportData, Tee
from agent.evidence.snp_abi import (
    SIGNATURE_ALGORITHM_ECDSA_P384_SHA384,
    SIGNED_BYTES,
    CertificateKind,
    FirmwareVersion,
    GuestPolicy,
    Product,
    SigningKey,
    SnpReport,
    TcbVersion,
    pack_report,
    parse_report,
)
from agent.sim.machine import SimulatedMachine, write_file
from agent.verify.snp import AMD_EXTENSIONS, HWID_EXTENSION, SPL_EXTENSIONS

ROOT_FILE = "ark.pem"
CRL_FILE = "ark.crl"
_ASK_FILE = "ask.der"
_ASK_KEY_FILE = "ask.key"
_CHIP_KEY_FILE = "vcek.key"
_CHIP_CERTIFICATE_FILE = "vcek.der"
_PRODUCT = Product.GENOA
_CPUID = (0x19, 0x11, 1)
_FIRMWARE = FirmwareVersion(1, 55, 40)
_PSS = padding.PSS(padding.MGF1(SHA384()), salt_length=48)
_RSA_BITS = 4096
_TABLE_ENTRY = struct.Struct("<16sII")  # GUID in text order, offset from the start of the table, length
_TABLE_ORDER = (CertificateKind.VCEK, CertificateKind.ASK, CertificateKind.ARK)


class SimulatedSnp:
    """The `Attester` of a simulated machine; its faults are the machine's fields."""

    tee = Tee.SNP
    interface = Ident("simulated-snp")

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def collect(self, report_data: ReportData) -> Evidence:
        """See `Attester.collect`. The chain is complete: VCEK, ASK, ARK."""
        machine = self._machine
        if machine.errno is not None:
            raise DeviceError(self.interface, Ident("collect"), machine.errno)
        device_data = report_data
        if machine.wrong_report_data:
            device_data = ReportData(bytes((report_data[0] ^ 1,)) + report_data[1:])
        try:
            key = _load_key(machine.directory / _CHIP_KEY_FILE)
            vcek = (machine.directory / _CHIP_CERTIFICATE_FILE).read_bytes()
            ask = (machine.silicon / _ASK_FILE).read_bytes()
            ark = x509.load_pem_x509_certificate((machine.silicon / ROOT_FILE).read_bytes()).public_bytes(Encoding.DER)
        except OSError as exc:
            raise DeviceError(self.interface, Ident("open"), exc.errno or 0) from exc
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        report = bytearray(sign_report(make_report(machine, device_data), key))
        if machine.flip_signature_bit:
            report[SIGNED_BYTES] ^= 1
        if parse_report(bytes(report)).report_data != report_data:
            raise EvidenceBindingError(EvidenceFormat.SNP_REPORT)
        return Evidence(Tee.SNP, bytes(report), (vcek, ask, ark))

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""
        return parse_report(self.collect(NO_REPORT_DATA).report).host_data


def make_report(machine: SimulatedMachine, report_data: ReportData) -> SnpReport:
    """What the machine's firmware would say, unsigned."""
    family, model, stepping = _CPUID
    return SnpReport(
        version=3,
        guest_svn=machine.guest_svn,
        policy=GuestPolicy(machine.policy),
        family_id=bytes(16),
        image_id=bytes(16),
        vmpl=machine.vmpl,
        signature_algorithm=SIGNATURE_ALGORITHM_ECDSA_P384_SHA384,
        current_tcb=machine.tcb,
        platform_info=0b10_0101,  # SMT, ECC memory, alias check done: what real Genoa machines report
        author_key_enabled=False,
        mask_chip_key=False,
        signing_key=SigningKey.VCEK,
        report_data=report_data,
        measurement=machine.measurement,
        host_data=machine.host_data,
        id_key_digest=bytes(48),
        author_key_digest=bytes(48),
        report_id=hashlib.sha256(machine.chip_id).digest(),
        report_id_ma=b"\xff" * 32,
        reported_tcb=machine.tcb,
        cpuid_family=family,
        cpuid_model=model,
        cpuid_stepping=stepping,
        chip_id=machine.chip_id,
        committed_tcb=machine.tcb,
        current_firmware=_FIRMWARE,
        committed_firmware=_FIRMWARE,
        launch_tcb=machine.tcb,
        launch_mitigations=None,
        current_mitigations=None,
        signature_r=0,
        signature_s=0,
    )


def sign_report(report: SnpReport, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The 1184 bytes of `report` with the signature of `key`."""
    r, s = decode_dss_signature(key.sign(pack_report(report)[:SIGNED_BYTES], ec.ECDSA(SHA384())))
    return pack_report(replace(report, signature_r=r, signature_s=s))


def pack_certificate_table(evidence: Evidence) -> bytes:
    """The host's certificates as the kernel hands them out in `auxblob`: AMD 56421 (GHCB), "SNP Extended Guest Request".

    Args:
        evidence: a simulated machine's, whose chain is VCEK, ASK, ARK.
    """
    offset = _TABLE_ENTRY.size * (len(_TABLE_ORDER) + 1)
    entries = b""
    for kind, der in zip(_TABLE_ORDER, evidence.cert_chain, strict=True):
        entries += _TABLE_ENTRY.pack(kind.value.bytes, offset, len(der))
        offset += len(der)
    return entries + bytes(_TABLE_ENTRY.size) + b"".join(evidence.cert_chain)


def create_snp_silicon(directory: Path) -> None:
    """AMD's part: `ark.pem`, an ASK that can issue chip certificates, and `ark.crl`, on which it is not."""
    ark_key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    ask_key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    ark_name, ask_name = _name(f"ARK-SIMULATED-{_PRODUCT.value}"), _name(f"SEV-SIMULATED-{_PRODUCT.value}")
    ark = _issuer(ark_name, ark_name, ark_key.public_key(), path_length=None).sign(ark_key, SHA384(), rsa_padding=_PSS)
    ask = _issuer(ask_name, ark_name, ask_key.public_key(), path_length=0).sign(ark_key, SHA384(), rsa_padding=_PSS)
    write_file(directory / ROOT_FILE, ark.public_bytes(Encoding.PEM), mode=0o644)
    write_file(directory / _ASK_FILE, ask.public_bytes(Encoding.DER), mode=0o644)
    write_file(directory / CRL_FILE, make_crl(ark_name, ark_key, revoked=()), mode=0o644)
    _save_key(directory / _ASK_KEY_FILE, ask_key)


def make_crl(issuer: x509.Name, key: rsa.RSAPrivateKey, revoked: Iterable[int], days: tuple[int, int] = (-1, 9000)) -> bytes:
    """A revocation list in the form of AMD's, DER, that counts from the first of `days` from now to the second."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    since, until = (now + number * day for number in days)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer).last_update(since).next_update(until)
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, SHA384(), rsa_padding=_PSS).public_bytes(Encoding.DER)


def create_chip_key(machine: SimulatedMachine) -> None:
    """The chip's part: a VCEK for the machine's chip id and TCB version, certified by its silicon."""
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = issue_leaf(machine.silicon, key.public_key(), "SEV-VCEK", machine.tcb, machine.chip_id)
    _save_key(machine.directory / _CHIP_KEY_FILE, key)
    write_file(machine.directory / _CHIP_CERTIFICATE_FILE, certificate, mode=0o644)


def issue_leaf(
    silicon: Path, key: ec.EllipticCurvePublicKey, common_name: str, tcb: TcbVersion, chip_id: bytes | None
) -> bytes:
    """A certificate in the form of AMD's key distribution service, DER.

    Args:
        silicon: folder of `create_snp_silicon`.
        key: the key to certify.
        common_name: `SEV-VCEK` or `SEV-VLEK`.
        tcb: the TCB version the key belongs to.
        chip_id: the chip the key belongs to, None for a VLEK.
    """
    ask = x509.load_der_x509_certificate((silicon / _ASK_FILE).read_bytes())
    ask_key = _load_key(silicon / _ASK_KEY_FILE)
    assert isinstance(ask_key, rsa.RSAPrivateKey)
    builder = _builder(_name(common_name), ask.subject, key, years=7)
    values = {part: getattr(tcb, part) for part in SPL_EXTENSIONS if getattr(tcb, part) is not None}
    extensions = {SPL_EXTENSIONS[part]: _der_integer(value) for part, value in values.items()}
    extensions |= dict.fromkeys(("1", "3.4", "3.5", "3.6", "3.7"), _der_integer(0))  # structure version; reserved levels
    extensions["2"] = b"\x16" + bytes((len(_PRODUCT.value),)) + _PRODUCT.value.encode()  # IA5String
    if chip_id is not None:
        extensions[HWID_EXTENSION] = chip_id
    for suffix, value in extensions.items():
        oid = x509.ObjectIdentifier(AMD_EXTENSIONS + suffix)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    signed = builder.serial_number(1).sign(ask_key, SHA384(), rsa_padding=_PSS)
    # AMD's serial number is 0, which the builder refuses: set it in the signed part (after the version) and sign again.
    old = signed.tbs_certificate_bytes
    new = old.replace(b"\xa0\x03\x02\x01\x02\x02\x01\x01", b"\xa0\x03\x02\x01\x02\x02\x01\x00", 1)
    signature = ask_key.sign(new, _PSS, SHA384())
    return signed.public_bytes(Encoding.DER).replace(old, new).replace(signed.signature, signature)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "SIMULATED silicon"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Keyturn simulator, not AMD"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, years: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    day = datetime.timedelta(days=1)
    return builder.not_valid_before(now - day).not_valid_after(now + 365 * years * day)


def _issuer(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey, path_length: int | None) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, issuer, key, years=25)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
    )


def _der_integer(value: int) -> bytes:
    """A DER INTEGER 0..255."""
    return bytes((2, 1, value)) if value < 0x80 else bytes((2, 2, 0, value))


def _save_key(path: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_file(path, pem, mode=0o600)


def _load_key(path: Path) -> PrivateKeyTypes:
    return load_pem_private_key(path.read_bytes(), password=None, unsafe_skip_rsa_key_validation=True)
