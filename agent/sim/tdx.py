"""Simulated TDX: quotes of version 4, or 5 with the body of TDX 1.5, certified under a chain in Intel's format.

Root, Platform CA and PCK are P-256 with the extensions of Intel's profile, and the quoting enclave gives Intel's numbers, so
the production verifier runs on them unchanged. The root's name says SIMULATED, and its key is thrown away once it has
signed the Platform CA. A TD's state is that of the simulated machine: the measurement is its MRTD, the configuration
digest its MRCONFIGID, and a guest policy that allows debugging makes it a debug TD. What its firmware measured is a log of
the real format, and its RTMR 3 is really extended.
"""

import datetime
import errno
import hashlib
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from agent.closed import Ident
from agent.errors import DeviceError, EvidenceBindingError, EvidenceFormat
from agent.evidence import NO_REPORT_DATA, REPORT_DATA_BYTES, Evidence, ReportData, Tee, Unsupported
from agent.evidence.ccel import SHA384, Event, EventLog, SpecId, pack_event_log, replay
from agent.evidence.rtmr import INTERFACE, REGISTER
from agent.evidence.snp_abi import GuestPolicy
from agent.evidence.tdx_abi import (
    QeReport,
    TdAttributes,
    TdBody,
    TdReport,
    TdxQuote,
    pack_qe_report,
    pack_quote,
    pack_tdreport,
    parse_tdreport,
    signed_part,
)
from agent.evidence.tdx_guest import TDX_CMD_GET_REPORT0
from agent.sim.machine import SimulatedMachine, write_file
from agent.verify.pck import SGX_EXTENSION, PckConfiguration, PckExtension, pack_pck_extension
from agent.verify.tdx import INTEL_QE_SIGNER, INTEL_QE_VENDOR_ID, TD_QE_ATTRIBUTES, TD_QE_PRODUCT

ROOT_FILE = "sgx-root.pem"
CCEL_FILE = "CCEL"
FOREIGN_LOG_FILE = "foreign-eventlog"
_CCEL_BYTES = 64 << 10
_CA_FILE = "pck-ca.pem"
_CA_KEY_FILE = "pck-ca.key"
_PCK_FILE = "pck.pem"
_PCK_KEY_FILE = "pck.key"
_SEPT_VE_DISABLE = 1 << 28
_XFAM = 0x602E7  # what real TDs of 2025 report
_TEE_TCB_SVN = bytes((6, 1, 3)).ljust(16, b"\0")
_CPU_SVN = bytes((3, 3, 25, 27, 4, 255, 0, 6)).ljust(16, b"\0")
_TCB = (3, 3, 2, 2, 4, 1, 0, 5, *[0] * 8)
_VALID_TCB_INFO = 0x301FF


class SimulatedTdx:
    """The TDX `Attester` of a simulated machine; its faults are the machine's fields.

    Args:
        machine: whose TD it is.
        version: of the quotes, 4 or 5.
        padding: zero bytes after each quote, as clouds leave them.
    """

    tee = Tee.TDX
    interface = Ident("simulated-tdx")

    def __init__(self, machine: SimulatedMachine, version: int = 4, padding: int = 0) -> None:
        self._machine = machine
        self._version = version
        self._padding = padding

    def collect(self, report_data: ReportData) -> Evidence:
        """See `Attester.collect`. The quote holds the whole chain: PCK, Platform CA, root."""
        machine = self._machine
        if machine.errno is not None:
            raise DeviceError(self.interface, Ident("collect"), machine.errno)
        device_data = report_data
        if machine.wrong_report_data:
            device_data = ReportData(bytes((report_data[0] ^ 1,)) + report_data[1:])
        try:
            pck_key = _load_key(machine.directory / _PCK_KEY_FILE)
            chain = b"".join(
                path.read_bytes()
                for path in (machine.directory / _PCK_FILE, machine.silicon / _CA_FILE, machine.silicon / ROOT_FILE)
            )
        except OSError as exc:
            raise DeviceError(self.interface, Ident("open"), exc.errno or 0) from exc
        body = make_td_report(machine, device_data).body
        if self._version == 4:
            body = replace(body, tee_tcb_svn_2=None, mr_service_td=None)
        quote = sign_quote(make_quote(self._version, body, chain + b"\0"), ec.generate_private_key(ec.SECP256R1()), pck_key)
        if machine.flip_signature_bit:
            quote = replace(quote, signature=bytes((quote.signature[0] ^ 1,)) + quote.signature[1:])
        if quote.body.report_data != report_data:
            raise EvidenceBindingError(EvidenceFormat.TDX_QUOTE)
        return Evidence(Tee.TDX, pack_quote(quote) + bytes(self._padding))

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`: of a TDREPORT."""
        if self._machine.errno is not None:
            raise DeviceError(self.interface, Ident("report"), self._machine.errno)
        return parse_tdreport(pack_tdreport(make_td_report(self._machine, NO_REPORT_DATA))).body.mr_config_id


class SimulatedNode:
    """What ioctl(2) does at the machine's `/dev/tdx_guest`."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def ioctl(self, descriptor: int, number: int, argument: bytearray) -> int:
        """A TDREPORT behind the report data that begins `argument`; raises OSError as the driver does."""
        if number != TDX_CMD_GET_REPORT0:
            raise OSError(errno.ENOTTY, "")
        if self._machine.errno is not None:
            raise OSError(self._machine.errno, "")
        report_data = ReportData(bytes(argument[:REPORT_DATA_BYTES]))
        argument[REPORT_DATA_BYTES:] = pack_tdreport(make_td_report(self._machine, report_data))
        return 0


class SimulatedRegister:
    """The `RuntimeRegister` of a simulated TD: RTMR 3. It lives as long as the machine, and every process sees it."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def read(self) -> bytes | Unsupported:
        """See `RuntimeRegister.read`."""
        return Unsupported.NO_DRIVER if self._machine.register_errno == errno.ENOENT else read_rtmr_3(self._machine)

    def extend(self, digest: bytes) -> None:
        """See `RuntimeRegister.extend`."""
        machine = self._machine
        if machine.register_errno is not None:
            raise DeviceError(INTERFACE, Ident("extend"), machine.register_errno)
        if not machine.lose_extension:
            value = hashlib.sha384(read_rtmr_3(machine) + digest).digest()
            write_file(machine.directory / REGISTER, value, mode=0o644)


def read_rtmr_3(machine: SimulatedMachine) -> bytes:
    """48 bytes, zero in a machine that measured nothing so far."""
    path = machine.directory / REGISTER
    return path.read_bytes() if path.exists() else bytes(48)


def write_ccel(machine: SimulatedMachine) -> None:
    """The machine's table CCEL, padded as firmware does it; once, as at the machine's start."""
    path = machine.directory / CCEL_FILE
    if not path.exists():
        write_file(path, pack_event_log(make_event_log(machine)).ljust(_CCEL_BYTES, b"\xff"), mode=0o644)


def make_event_log(machine: SimulatedMachine) -> EventLog:
    """What firmware, boot loader and kernel of the machine measured."""

    def event(mr_index: int, event_type: int, data: bytes) -> Event:
        return Event(mr_index, event_type, ((SHA384, hashlib.sha384(data).digest()),), data)

    events = (
        event(1, 0x8000000B, b"SIMULATED firmware tables"),
        event(1, 0x4, bytes(4)),  # EV_SEPARATOR
        event(2, 0x80000003, b"SIMULATED boot loader"),
        event(3, 0x6, machine.measurement),
    )
    return EventLog(SpecId(1, 0, (0, 2, 0), 2, ((SHA384, 48),), b""), events)


def make_td_report(machine: SimulatedMachine, report_data: ReportData) -> TdReport:
    """What the machine's TDX module would say; its MAC is a made-up one."""
    debug = int(GuestPolicy(machine.policy).debug)
    rtmr_0, rtmr_1, rtmr_2, _ = replay(make_event_log(machine))
    body = TdBody(
        tee_tcb_svn=_TEE_TCB_SVN,
        mr_seam=hashlib.sha384(b"SIMULATED TDX module").digest(),
        mr_signer_seam=bytes(48),
        seam_attributes=0,
        td_attributes=TdAttributes(_SEPT_VE_DISABLE | debug),
        xfam=_XFAM,
        mr_td=machine.measurement,
        mr_config_id=machine.host_data.ljust(48, b"\0"),
        mr_owner=bytes(48),
        mr_owner_config=bytes(48),
        rtmr_0=rtmr_0,
        rtmr_1=rtmr_1,
        rtmr_2=rtmr_2,
        rtmr_3=read_rtmr_3(machine),
        report_data=report_data,
        tee_tcb_svn_2=_TEE_TCB_SVN,
        mr_service_td=bytes(48),
    )
    return TdReport(version=0, cpu_svn=_CPU_SVN, mac=hashlib.sha256(b"SIMULATED").digest(), valid=_VALID_TCB_INFO, body=body)


def make_quote(version: int, body: TdBody, pck_chain: bytes) -> TdxQuote:
    """What the machine's quoting enclave would say, unsigned."""
    qe_report = QeReport(
        cpu_svn=_CPU_SVN,
        misc_select=0,
        attributes=(TD_QE_ATTRIBUTES | 4).to_bytes(8, "little") + 0xE7.to_bytes(8, "little"),
        mr_enclave=hashlib.sha256(b"SIMULATED quoting enclave").digest(),
        mr_signer=INTEL_QE_SIGNER,
        isv_prod_id=TD_QE_PRODUCT,
        isv_svn=7,
        report_data=bytes(64),
    )
    return TdxQuote(
        version=version,
        qe_svn=0,
        pce_svn=0,
        qe_vendor_id=INTEL_QE_VENDOR_ID,
        user_data=b"SIMULATED".ljust(20, b"\0"),
        body=body,
        signature=bytes(64),
        attestation_key=bytes(64),
        qe_report=qe_report,
        qe_report_signature=bytes(64),
        qe_auth_data=bytes(range(32)),
        pck_chain=pck_chain,
    )


def sign_quote(quote: TdxQuote, attestation_key: ec.EllipticCurvePrivateKey, pck_key: ec.EllipticCurvePrivateKey) -> TdxQuote:
    """`quote` with the attestation key, bound in the enclave's report, and both signatures."""
    point = attestation_key.public_key().public_numbers()
    public_key = point.x.to_bytes(32) + point.y.to_bytes(32)
    binding = hashlib.sha256(public_key + quote.qe_auth_data).digest() + bytes(32)
    qe_report = replace(quote.qe_report, report_data=binding)
    return replace(
        quote,
        attestation_key=public_key,
        signature=raw_signature(attestation_key, signed_part(quote)),
        qe_report=qe_report,
        qe_report_signature=raw_signature(pck_key, pack_qe_report(qe_report)),
    )


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-256 as quotes have it: r and s, 32 bytes each."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def create_tdx_silicon(directory: Path) -> None:
    """Intel's part: `sgx-root.pem`, and a Platform CA that can certify platforms."""
    root_key, ca_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, ca_name = _name("SIMULATED SGX Root CA"), _name("SIMULATED SGX PCK Platform CA")
    root = _builder(root_name, root_name, root_key.public_key(), years=25, path_length=1).sign(root_key, SHA256())
    ca = _builder(ca_name, root_name, ca_key.public_key(), years=15, path_length=0).sign(root_key, SHA256())
    write_file(directory / ROOT_FILE, root.public_bytes(Encoding.PEM), mode=0o644)
    write_file(directory / _CA_FILE, ca.public_bytes(Encoding.PEM), mode=0o644)
    _save_key(directory / _CA_KEY_FILE, ca_key)


def create_platform_key(machine: SimulatedMachine) -> None:
    """The platform's part: a PCK for the machine's chip id, certified by its silicon."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = issue_pck(machine.silicon, key.public_key(), make_pck_extension(machine.chip_id))
    _save_key(machine.directory / _PCK_KEY_FILE, key)
    write_file(machine.directory / _PCK_FILE, certificate.public_bytes(Encoding.PEM), mode=0o644)


def make_pck_extension(chip_id: bytes) -> PckExtension:
    """Of the platform with this chip id."""
    return PckExtension(
        ppid=chip_id[:16],
        tcb=_TCB,
        pce_svn=11,
        cpu_svn=_CPU_SVN,
        pce_id=bytes(2),
        fmspc=bytes.fromhex("5117ed000000"),  # no FMSPC that Intel gave out
        sgx_type=1,
        platform_instance_id=chip_id[16:32],
        configuration=PckConfiguration(dynamic_platform=True, cached_keys=False, smt_enabled=True),
    )


def issue_pck(silicon: Path, key: ec.EllipticCurvePublicKey, extension: PckExtension) -> x509.Certificate:
    """A certificate in the form of Intel's provisioning service."""
    ca = x509.load_pem_x509_certificate((silicon / _CA_FILE).read_bytes())
    builder = _builder(_name("SIMULATED SGX PCK Certificate"), ca.subject, key, years=7, path_length=None)
    sgx = x509.UnrecognizedExtension(SGX_EXTENSION, pack_pck_extension(extension))
    return builder.add_extension(sgx, critical=False).sign(_load_key(silicon / _CA_KEY_FILE), SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Keyturn simulator, not Intel"),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, years: int, path_length: int | None
) -> x509.CertificateBuilder:
    """A certificate of Intel's profile: a CA's with a path length, a PCK's without."""
    issues = path_length is not None
    usage = x509.KeyUsage(
        digital_signature=not issues,
        content_commitment=not issues,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issues,
        crl_sign=issues,
        encipher_only=False,
        decipher_only=False,
    )
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 365 * years * day)
        .add_extension(usage, critical=True)
        .add_extension(x509.BasicConstraints(ca=issues, path_length=path_length), critical=True)
    )


def _save_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key
