"""Every parser of outside bytes as a target, and the inputs it starts from. Run by `engine.py`.

A target lets through what its parser documents (an AgentError, mostly) and asserts what must hold for an accepted input: the
round trip where there is an inverse. Seeds come from our own generators. What they draw at random (keys, so certificates and
signatures) lies in the corpus, with its roots in `silicon/`; `scripts/fuzz --renew` makes both again. Nothing recorded from
real devices is here.
"""

import base64
import ctypes
import io
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, ClassVar

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from cryptography.hazmat.primitives.serialization import Encoding

from agent import config as measured
from agent import cose, http_policy, jose, keys, store_credentials, tink_keyset
from agent.artifact import DestinationKind, ServedModel, compact_jwe, luks2, openssf, signature, volume_config
from agent.artifact import manifest as m
from agent.artifact.seal_volume import HEADER_BYTES, pack_luks2
from agent.artifact.sources import LayoutSource, http, open_source, registry_auth
from agent.artifact.sources.access import Access
from agent.artifact.stream import StreamLayout, pack_header, parse_header
from agent.broker import bootstrap, jwe
from agent.broker.policy import parse_policy
from agent.broker.relay import pack_session, parse_session
from agent.channel import MAX_RECORD_BYTES, Channel
from agent.closed import Ident
from agent.commands.diagnosis import diagnose
from agent.commands.lint_rules import lint_pod
from agent.commands.manifests import MalformedYamlError, parse_documents, pods
from agent.commands.policy import broker_policy
from agent.commands.policy_values import Approved, SwitchVersions, parse_gpu, parse_image
from agent.commands.trustee_policy import resource_policy
from agent.errors import (
    AgentError,
    ConfigError,
    ConfigProblem,
    DenialReason,
    EvidenceFormat,
    EvidenceVerificationError,
    GuestApiError,
    MalformedEvidenceError,
    ManifestSignatureError,
    ModelSignatureError,
    ReceiptError,
    VolumeHeaderError,
)
from agent.events import BootStarted, LeaseRenewed, Stage, StageEnded, VerdictAccepted, message_from_record, message_to_record
from agent.evidence import (
    CompositeEvidence,
    Evidence,
    GpuEvidence,
    GpuNonce,
    Nonce,
    ReportData,
    RuntimeData,
    Tee,
    binding,
    ccel,
    coco,
    cpu,
    gpu_abi,
    nscq,
    qgs_abi,
    snp_abi,
    tdx_abi,
    trustee_json,
)
from agent.evidence.cpu import certificate_chain
from agent.evidence.sev_guest import SevGuest
from agent.evidence.tdx_guest import read_port
from agent.fitness import parse_gpu_driver
from agent.guest.api_server import ApiServer
from agent.guest.initdata import pack_device, pack_document, parse_initdata, read_device
from agent.guest.network import parse_ip_parameter, parse_routes, resolv_conf
from agent.handshake import (
    MAX_SESSION_BYTES,
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TeePublicKey,
    grpc_status,
    grpc_wire,
    rcar,
)
from agent.handshake.ear import decode_unverified_ear, findings, verify_ear
from agent.handshake.token import read_token
from agent.lease import Lease
from agent.proxy import MAX_ANSWER_BYTES, pack_connect, parse_connect_answer, parse_proxy
from agent.publish import HandedModel
from agent.receipt import parse_receipt
from agent.report import BootReport
from agent.server import Output, ProbeRequest, ServerPlan, probe
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import CRL_FILE
from agent.sim.tdx import SimulatedTdx, make_event_log, make_pck_extension, make_td_report
from agent.verify import crl, nvidia, pck, ppcie, snp, tdx
from agent.verify.receipt import check_binding
from tests.fake_nodes import FakeSevGuest, Fault
from tests.fuzz.engine import Target
from tests.gpus import BLACKWELL_SAYS, GPU_NAMES, PPCIE_SAYS, SWITCH_NAMES, SWITCH_SAYS, SimulatedSet
from tests.quotes import quote
from tests.test_receipt import RECEIPT

HERE = Path(__file__).parent
RENDERED = HERE.parents[1] / "deploy" / "rendered"
CORPUS = HERE / "corpus"
SILICON = HERE / "silicon"

NOW = 1_800_000_000
NONCE = Nonce(bytes(range(32)))
GPU_NONCE = GpuNonce(bytes(range(32)))
REPORT_DATA = ReportData(bytes(range(64)))
STATE = Ident("fuzz")
KEY_URI = Ident("kbs:///models/tiny/1")
DIGEST = "sha256:" + "ab" * 32
AUTHORITY = ec.derive_private_key(0xA0, ec.SECP256R1())
GUEST = ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1())


# --- evidence ---------------------------------------------------------------------------------------------------------


@cache
def _silicon(name: str) -> bytes:
    return (SILICON / name).read_bytes()


@cache
def _snp() -> tuple[Evidence, x509.Certificate, datetime]:
    """Evidence of a simulated chip, its root, and a moment at which it verifies."""
    chain = tuple(_silicon(f"snp-{index}.der") for index in range(3))
    root = x509.load_pem_x509_certificate(_silicon("ark.pem"))
    return Evidence(Tee.SNP, _silicon("snp-report.bin"), chain), root, root.not_valid_before_utc + timedelta(days=2)


@cache
def _gpu() -> tuple[GpuEvidence, x509.Certificate, datetime]:
    evidence = GpuEvidence("HOPPER", "GPU-0", _silicon("gpu-report.bin"), _silicon("gpu-chain.pem"))
    return evidence, x509.load_pem_x509_certificate(_silicon("nvidia-root.pem")), datetime(2026, 6, 1, tzinfo=UTC)


def _pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def _table(chain: Sequence[bytes]) -> bytes:
    """A host's certificate table: VCEK, ASK, ARK."""
    kinds = (snp_abi.CertificateKind.VCEK, snp_abi.CertificateKind.ASK, snp_abi.CertificateKind.ARK)
    entries, blobs = b"", b""
    start = 24 * (len(chain) + 1)
    for kind, data in zip(kinds, chain, strict=True):
        entries += kind.value.bytes + struct.pack("<II", start + len(blobs), len(data))
        blobs += data
    return entries + bytes(24) + blobs


def snp_report(data: bytes) -> None:
    report = snp_abi.parse_report(data)
    assert snp_abi.pack_report(report) == data
    snp_abi.product_of(report)


def snp_report_seeds() -> list[bytes]:
    """Versions 2 and 5, and the TCB layout of Turin."""
    report = snp_abi.parse_report(_silicon("snp-report.bin"))
    turin = snp_abi.TcbVersion(1, 2, 3, 4, fmc=5)
    newest = replace(report, version=5, launch_mitigations=1, current_mitigations=2)
    older = replace(report, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None)
    of_turin = replace(
        report, cpuid_family=0x1A, cpuid_model=2, current_tcb=turin, reported_tcb=turin, committed_tcb=turin, launch_tcb=turin
    )
    return [snp_abi.pack_report(each) for each in (newest, older, of_turin)]


def snp_evidence(data: bytes) -> None:
    evidence, root, now = _snp()
    snp.verify_snp(replace(evidence, report=data), [root], [], now)
    assert data == evidence.report, "another report verifies"


def snp_certificate(data: bytes) -> None:
    evidence, root, now = _snp()
    snp.verify_snp(replace(evidence, cert_chain=(data, *evidence.cert_chain)), [root], [], now)


def amd_crl(data: bytes) -> None:
    read = crl.parse_crl(data)
    evidence, root, now = _snp()
    with suppress(EvidenceVerificationError):
        snp.verify_snp(evidence, [root], [], now, [read])
        assert data == _silicon(CRL_FILE), "another list than the root's counts"


def certificate_table(data: bytes) -> None:
    for der in certificate_chain(data):
        assert snp.load_certificate(der)


@cache
def _tdx() -> tuple[Evidence, x509.Certificate, datetime]:
    root = x509.load_pem_x509_certificate(_silicon("sgx-root.pem"))
    return Evidence(Tee.TDX, _silicon("tdx-quote.bin")), root, root.not_valid_before_utc + timedelta(days=2)


def trustee_evidence(data: bytes) -> None:
    """The TEE stands in front, as nothing in the text says it."""
    name, _, text = data.partition(b" ")
    evidence = trustee_json.parse_evidence(Tee(name.decode()), text)
    again = trustee_json.parse_evidence(evidence.tee, trustee_json.pack_evidence(evidence).encode())
    assert replace(again, cert_chain=()) == replace(evidence, cert_chain=())
    # What a certificate is says its name, not the text; without a leaf none is sent.
    assert sorted(again.cert_chain) in ([], sorted(evidence.cert_chain))


def trustee_evidence_seeds() -> list[bytes]:
    log = trustee_json.trimmed((CORPUS / "ccel" / "made-0").read_bytes())
    quote, _, _ = _tdx()
    made = (_snp()[0], replace(_snp()[0], cert_chain=()), quote, replace(quote, event_log=log), Evidence(Tee.SAMPLE, bytes(48)))
    return [f"{each.tee.value} {trustee_json.pack_evidence(each)}".encode() for each in made]


def tdx_quote(data: bytes) -> None:
    quote = tdx_abi.parse_quote(data)
    assert tdx_abi.pack_quote(quote) == data[: tdx_abi.quote_length(data)]


def tdx_quote_seeds() -> list[bytes]:
    """Version 5 with every body, and a padded version 4."""
    quote = tdx_abi.parse_quote(_silicon("tdx-quote.bin"))
    newer = replace(quote.body, tee_tcb_svn_2=bytes(16), mr_service_td=bytes(48))
    hashed = bytes(48)
    extension = tdx_abi.TdExtension(0, bytes(32), hashed, hashed, 0, bytes(16), bytes(16), bytes(12), hashed, 0)
    bodies = (newer, replace(newer, extension=extension), quote.body)
    packed = [tdx_abi.pack_quote(replace(quote, version=5, body=body)) for body in bodies]
    return [*packed, _silicon("tdx-quote.bin") + bytes(64)]


def tdx_evidence(data: bytes) -> None:
    evidence, root, now = _tdx()
    claims = tdx.verify_tdx(replace(evidence, report=data), [root], now)
    assert claims.td == tdx_abi.parse_quote(evidence.report).body, "another quote verifies"


def tdx_tdreport(data: bytes) -> None:
    assert tdx_abi.pack_tdreport(tdx_abi.parse_tdreport(data)) == data


def event_log(data: bytes) -> None:
    log = ccel.parse_event_log(data)
    packed = ccel.pack_event_log(log)
    assert data.startswith(packed)
    assert set(data[len(packed) :]) <= {0, 0xFF}
    for event in log.events:
        with suppress(AgentError):
            if (entry := ccel.parse_runtime_event(event)) is not None:
                assert ccel.pack_runtime_event(entry, 3).data == event.data
    ccel.replay(log)


def event_log_joined(data: bytes) -> None:
    """The firmware's log with an event of ours after it: what a TD sends."""
    event = ccel.pack_runtime_event(ccel.RuntimeEvent("keyturn", "release-key", "{}"), 3)
    log = ccel.join_event_log(data, ccel.pack_event(event))
    assert ccel.parse_event_log(log).events == (*ccel.parse_event_log(data).events, event)
    assert data.startswith(log.removesuffix(ccel.pack_event(event)))


def event_log_seeds() -> list[bytes]:
    separator = ccel.Event(1, 4, ((ccel.SHA384, bytes(48)),), bytes(4))
    log = ccel.pack_event_log(ccel.EventLog(ccel.SpecId(1, 0, (0, 2, 0), 2, ((ccel.SHA384, 48),), b""), (separator,)))
    return [log, log + b"\xff" * 64]


def pck_chain(data: bytes) -> None:
    _, root, now = _tdx()
    pck.verify_pck_chain(data, [root], now)


def pck_extension(data: bytes) -> None:
    assert pck.pack_pck_extension(pck.parse_pck_extension(data)) == data


def pck_extension_seeds() -> list[bytes]:
    """As the Platform CA and as the Processor CA give it."""
    extension = make_pck_extension(bytes(range(64)))
    processor = replace(extension, platform_instance_id=None, configuration=None, pce_svn=300)
    return [pck.pack_pck_extension(each) for each in (extension, processor)]


_SEV_ANSWER = struct.Struct("<IIIIH")  # errno, firmware, hypervisor, certificate length, bytes of the response


def sev_guest_answers(data: bytes) -> None:
    """What `/dev/sev-guest` may write: errno, exitinfo2, a certificate length, a response, certificates."""
    code, firmware, vmm, needed, response_bytes = _SEV_ANSWER.unpack_from(data.ljust(_SEV_ANSWER.size, b"\0"))
    response = data[_SEV_ANSWER.size :][:response_bytes]
    certificates = data[_SEV_ANSWER.size + response_bytes :]
    fake = FakeSevGuest(lambda *_: b"", certificates[:0x4000], faults=[None, Fault(code % 200, firmware, vmm)])
    fake.response = response[:4000]

    def ioctl(descriptor: int, number: int, argument: bytearray) -> int:
        try:
            return fake.ioctl(descriptor, number, argument)
        finally:
            if needed and number == snp_abi.SNP_GET_EXT_REPORT:
                (request,) = struct.unpack_from("<Q", argument, 8)
                fake.write(request + 104, struct.pack("<I", needed))

    evidence = SevGuest(Path(os.devnull), Path("/nonexistent"), ioctl, lambda: 0.0, lambda _: True).collect(REPORT_DATA)
    assert snp_abi.parse_report(evidence.report).report_data == REPORT_DATA


def sev_guest_answers_seeds() -> list[bytes]:
    """A host without certificates, one with an empty table, and one that is busy."""
    report = _silicon("snp-report.bin")
    response = struct.pack("<II24x", 0, len(report)) + report
    head = _SEV_ANSWER.pack(0, 0, 0, 0, len(response))
    busy = _SEV_ANSWER.pack(5, 0, 2, 0, len(response))
    return [head + response, head + response + bytes(4096), busy + response + bytes(24)]


def tdx_blob(data: bytes) -> None:
    """What a device or the quote service hands over: a quote, and anything behind it."""
    evidence = cpu.tdx_evidence(data, REPORT_DATA)
    assert data.startswith(evidence.report)
    assert cpu.tdx_evidence(evidence.report, REPORT_DATA) == evidence


def tdx_blob_seeds() -> list[bytes]:
    return [quote(REPORT_DATA, version, b"signature") + tail for version in (4, 5) for tail in (b"", bytes(100))]


def qgs_answer(data: bytes) -> None:
    """Length and message as they come from the host."""
    length = qgs_abi.parse_frame_length(data[:4].ljust(4, b"\0"), tdx_abi.MAX_QUOTE_BYTES)
    response = qgs_abi.parse_quote_response(data[4 : 4 + length])
    assert qgs_abi.pack_quote_response(response)[4:] == data[4 : 4 + length]
    cpu.tdx_evidence(response.quote, REPORT_DATA)


def qgs_answer_seeds() -> list[bytes]:
    responses = (
        qgs_abi.QuoteResponse(0, quote(REPORT_DATA, signature=b"signature")),
        qgs_abi.QuoteResponse(0, quote(REPORT_DATA, 5, b"signature"), bytes(16), 1),
        qgs_abi.QuoteResponse(0x12001),
    )
    return [qgs_abi.pack_quote_response(response) for response in responses]


def tdx_attest_conf(data: bytes) -> None:
    with NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert 0 <= read_port(Path(file.name)) <= 0xFFFF


def tdx_attest_conf_seeds() -> list[bytes]:
    return [b"# vsock\nport = 4050 # host\n"]


def gpu_driver(data: bytes) -> None:
    assert parse_gpu_driver(data).encode() in data


def gpu_driver_seeds() -> list[bytes]:
    line = b"NVRM version: NVIDIA UNIX %s  590.12  Release Build  (builder)  Tue\n"
    return [line % b"Open Kernel Module for x86_64", line % b"x86_64 Kernel Module"]


def gpu_report(data: bytes) -> None:
    assert gpu_abi.pack_report(gpu_abi.parse_report(data)) == data


def gpu_report_seeds() -> list[bytes]:
    """With blocks as a security processor has them."""
    blocks = (gpu_abi.Measurement(1, 0x83, b"\0\0\0\1"), gpu_abi.Measurement(0xFD, 0x8A, b"manifest"))
    return [gpu_abi.pack_report(replace(gpu_abi.parse_report(_silicon("gpu-report.bin")), measurements=blocks, opaque=()))]


def gpu_opaque(data: bytes) -> None:
    """The opaque data of a report; whatever is accepted can be read."""
    head = _silicon("gpu-report.bin")[: 45 + 64 * 55 + 32]
    report = gpu_abi.parse_report(head + struct.pack("<H", len(data) & 0xFFFF) + data + bytes(gpu_abi.SIGNATURE_BYTES))
    for name, member in vars(gpu_abi.GpuReport).items():
        if isinstance(member, property):
            getattr(report, name)
    assert len(report.gpu_pdis or ()) in (0, 8)
    assert len(report.switch_pdis or ()) in (0, 18)


def gpu_opaque_seeds() -> list[bytes]:
    """Of a GPU in protected-PCIe mode, of Blackwell, of an NVSwitch with new and with old firmware, and with a header."""
    switch = (*SWITCH_SAYS, (22, SWITCH_NAMES[0]))
    old = tuple((4 if kind == 26 else kind, value) for kind, value in switch)
    sets = (PPCIE_SAYS, BLACKWELL_SAYS, switch, old)
    typed = b"".join(struct.pack("<HHH", kind, 0x82, len(value)) + value for kind, value in BLACKWELL_SAYS)
    plain = [b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in fields) for fields in sets]
    return [*plain, b"NVDAOD\0\0\2\0\0\0" + typed]


def gpu_topology(data: bytes) -> None:
    """What eight GPUs say of their links, and four switches of themselves and of the GPUs: 8 × 144 and 4 × (8 + 64) bytes."""
    pdis = [gpu_abi.Pdi(data[at : at + 8].ljust(8, b"\0")) for at in range(0, 180 * 8, 8)]
    says = nvidia.GpuClaims("590.12", "96.00.A5.00.01", "", "1", "GH100", "HOPPER", 2, True, True)
    of_gpus = tuple(
        replace(says, leaf_key_sha256=f"gpu-{number}", switch_pdis=tuple(pdis[number * 18 : number * 18 + 18]))
        for number in range(8)
    )
    of_switches = tuple(
        nvidia.SwitchClaims("96.10.55.00.01", f"switch-{at}", "1", "LS_10", True, pdis[at], tuple(pdis[at + 1 : at + 9]))
        for at in range(144, 180, 9)
    )
    ppcie.check_topology(ppcie.PpcieClaims(of_gpus, of_switches))
    names = {switch.pdi for switch in of_switches}
    assert len(names) == 4
    assert all(set(gpu.switch_pdis) - {bytes(8)} == names for gpu in of_gpus)
    assert len({pdi for switch in of_switches for pdi in switch.gpu_pdis}) == 8
    assert bytes(8) not in of_switches[0].gpu_pdis


def gpu_topology_seeds() -> list[bytes]:
    linked = b"".join(SWITCH_NAMES) * 4 + bytes(16)
    return [linked * 8 + b"".join(name + b"".join(GPU_NAMES) for name in SWITCH_NAMES)]


def gpu_evidence(data: bytes) -> None:
    evidence, root, now = _gpu()
    nvidia.verify_gpu(replace(evidence, report=data), GPU_NONCE, [root], now)
    assert data.rstrip(b"\0") == evidence.report.rstrip(b"\0"), "another report verifies"


def gpu_chain(data: bytes) -> None:
    evidence, root, now = _gpu()
    nvidia.verify_gpu(replace(evidence, certificate_chain=data), GPU_NONCE, [root], now)


def gpu_certificate(data: bytes) -> None:
    """As leaf and as boot ROM identity; what is read of them once the chain holds is read of any."""
    evidence, root, now = _gpu()
    certificates = [
        _pem(each.public_bytes(Encoding.DER)) for each in x509.load_pem_x509_certificates(evidence.certificate_chain)
    ]
    leaf = nvidia.parse_chain(b"".join((_pem(data), *certificates[1:]))).certificates[0]
    with suppress(AgentError):
        nvidia._common_name(leaf)
    for oid in (nvidia.COMPOSITE_DEVICE_ID, nvidia.DICE_TCB_INFO):
        with suppress(AgentError):
            nvidia._fwid_of_certificate(leaf, oid)
    for place in (0, 1):
        changed = b"".join((*certificates[:place], _pem(data), *certificates[place + 1 :]))
        with suppress(AgentError):
            nvidia.verify_gpu(replace(evidence, certificate_chain=changed), GPU_NONCE, [root], now)


class _AnyNscq:
    """An NSCQ that answers from fuzzed bytes: a byte each says whether an answer is the good one, then what it is instead."""

    UUID = bytes(range(16))
    GOOD: ClassVar = {"uuid": UUID, "arch": 2, "pcie_mode": 3}

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def nscq_session_create(self, _flags: int) -> nscq.SessionResult:
        return nscq.SessionResult(self._code(), 1)

    def nscq_session_set_input(self, *_: object) -> int:
        return self._code()

    def nscq_uuid_to_label(self, _uuid: Any, label: Any, _flags: int) -> int:
        label.contents.data = self._stream.read(64) if self._spoils() else b"SWX-00010203-0405-0607-0809-0A0B0C0D0E0F"
        return self._code()

    def nscq_session_path_observe(self, _session: int, path: bytes, callback: Any, user: object, _flags: int) -> int:
        for _ in range(self._byte() % 4 if self._spoils() else 1):
            device = self._stream.read(16).ljust(16, b"\0") if self._spoils() else self.UUID
            pointer = ctypes.pointer(nscq.Uuid.from_buffer_copy(device)) if device.strip(b"\xff") else None
            callback(pointer, self._code(), self._value(path.decode().rpartition("/")[2]), user)
        return self._code()

    def _value(self, part: str) -> Any:
        other = self._stream.read(self._byte() * 32 if self._spoils() else 0)
        if part == "uuid":
            return ctypes.pointer(nscq.Uuid.from_buffer_copy((other or self.UUID).ljust(16, b"\0")))
        if part == "certificate":
            chain = other or _silicon("gpu-chain.pem")
            length = int.from_bytes(other[:4], "little") if other else len(chain)
            return nscq.Certificate((ctypes.c_uint8 * 0x1400)(*chain[:0x1400]), length)
        if part == "attestation_report":
            report = other or _silicon("gpu-report.bin")
            length = int.from_bytes(other[:4], "little") if other else len(report)
            return nscq.Report(length, (ctypes.c_uint8 * 0x2000)(*report[:0x2000]))
        return int.from_bytes(other[:1], "little", signed=True) if other else self.GOOD[part]

    def _code(self) -> int:
        return int.from_bytes(self._stream.read(1), "little", signed=True) if self._spoils() else 0

    def _byte(self) -> int:
        return int.from_bytes(self._stream.read(1), "little")

    def _spoils(self) -> bool:
        return self._byte() > 0xF0


def nscq_answers(data: bytes) -> None:
    switches = nscq.NscqSwitches(_AnyNscq(data))
    assert all(switch.uuid.startswith("SWX-") and switch.arch == "LS10" for switch in switches.inspect())
    for evidence in switches.collect(GPU_NONCE):
        assert gpu_abi.parse_report(evidence.report).requester_nonce == GPU_NONCE


def nscq_answers_seeds() -> list[bytes]:
    return [b"", bytes(64), bytes(3) + b"\xff\x02" + bytes(200), bytes(9) + b"\xff\x05" + bytes(255)]


CLAIMS = binding.KeyturnClaims(1, 2, 0, 0, False, False, "580.65.06", DIGEST, DIGEST)


def additional_evidence(data: bytes) -> None:
    gpus, claims = binding.parse_additional_evidence(data.decode("utf-8", "surrogatepass"))
    if claims is not None:
        assert binding.parse_additional_evidence(binding.additional_evidence(gpus, claims)) == (gpus, claims)


def additional_evidence_seeds() -> list[bytes]:
    gpus = (
        GpuEvidence("HOPPER", "GPU-a", b"r", b"c"),
        GpuEvidence("BLACKWELL", "GPU-b", b"rr", b"cc"),
        GpuEvidence("LS10", "SWX-c", b"r", b"c"),
    )
    text = binding.additional_evidence(gpus, CLAIMS)
    members = json.loads(text)
    del members["nvidia"]["keyturn"]
    return [text.encode(), json.dumps(members).encode()]


# --- handshake --------------------------------------------------------------------------------------------------------

ID = Ident("request-1")
POINT = TeePublicKey(b"x" * 32, b"y" * 32)


def attest_request(data: bytes) -> None:
    message = grpc_wire.parse_attest_request(data, STATE)
    assert grpc_wire.parse_attest_request(grpc_wire.pack_attest_request(message), STATE) == message


def attest_request_seeds() -> list[bytes]:
    evidence = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184, (b"leaf", b"ask")), '{"nvidia":"ü"}')
    quoted = CompositeEvidence(Evidence(Tee.TDX, quote(REPORT_DATA), event_log=b"l" * 69), "")
    attestations = [grpc_wire.pack_attest_request(Attestation(ID, POINT, each)) for each in (evidence, quoted)]
    return [grpc_wire.pack_attest_request(Hello(ID, KEY_URI, Tee.SNP)), *attestations]


def attest_response(data: bytes) -> None:
    message = grpc_wire.parse_attest_response(data, STATE)
    assert grpc_wire.parse_attest_response(grpc_wire.pack_attest_response(message), STATE) == message


def attest_response_seeds() -> list[bytes]:
    messages = (
        Challenge(ID, NONCE, 180),
        Accepted(ID, "a.b.c", Ident("p1"), (Ident("rv-1"), Ident("rv-2"))),
        Accepted(ID, "a.b.c", Ident("p1"), (), b"kbs-session-id=0"),
        Denied(ID, DenialReason.CLAIM, Ident("snp.measurement"), Ident("rv-1"), Ident("p1")),
    )
    return [grpc_wire.pack_attest_response(each) for each in messages]


def key_request(data: bytes) -> None:
    message = grpc_wire.parse_key_request(data, STATE)
    assert grpc_wire.parse_key_request(grpc_wire.pack_key_request(message), STATE) == message


def key_request_seeds() -> list[bytes]:
    return [grpc_wire.pack_key_request(KeyRequest(ID, "a.b.c", KEY_URI, b"kbs-session-id=0"))]


def key_response(data: bytes) -> None:
    message = grpc_wire.parse_key_response(data, STATE)
    assert grpc_wire.parse_key_response(grpc_wire.pack_key_response(message), STATE) == message


def key_response_seeds() -> list[bytes]:
    return [grpc_wire.pack_key_response(KeyResponse(ID, b"{}", Ident("id-1"), 1))]


def credentials_request(data: bytes) -> None:
    message = grpc_wire.parse_credentials_request(data, STATE)
    assert grpc_wire.parse_credentials_request(grpc_wire.pack_credentials_request(message), STATE) == message


def credentials_request_seeds() -> list[bytes]:
    return [grpc_wire.pack_credentials_request(CredentialsRequest(ID, "a.b.c", KEY_URI, b"kbs-session-id=0"))]


def credentials_response(data: bytes) -> None:
    message = grpc_wire.parse_credentials_response(data, STATE)
    assert grpc_wire.parse_credentials_response(grpc_wire.pack_credentials_response(message), STATE) == message


def credentials_response_seeds() -> list[bytes]:
    return [grpc_wire.pack_credentials_response(CredentialsResponse(ID, b"{}"))]


def grpc_failure(data: bytes) -> None:
    failure = grpc_status.parse_failure(data, 14)
    if failure is not None:
        # Whole milliseconds go over the wire.
        packed = grpc_status.parse_failure(grpc_status.pack_failure(failure), 14)
        assert packed is not None
        assert replace(packed, retry_after_s=None) == replace(failure, retry_after_s=None)
        assert abs((packed.retry_after_s or 0) - (failure.retry_after_s or 0)) <= 0.001


def grpc_failure_seeds() -> list[bytes]:
    denial = grpc_status.Denial(DenialReason.CLAIM, Ident("snp.tcb"), Ident("tcb-1"), Ident("7"))
    return [
        grpc_status.pack_failure(grpc_status.Failure(14, Ident("KEY_STORE_IO"), ID, 1.5)),
        grpc_status.pack_failure(grpc_status.Failure(14, Ident("SNP_TCB"), ID, None, denial)),
    ]


def _sign(payload: bytes) -> str:
    header = jose.pack_b64url(b'{"alg":"ES256","typ":"JWT"}')
    text = f"{header}.{jose.pack_b64url(payload)}"
    r, s = decode_dss_signature(AUTHORITY.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{jose.pack_b64url(r.to_bytes(32) + s.to_bytes(32))}"


RCAR_STATE = Ident("AWAIT_VERDICT")
PUBLIC = TeePublicKey(b"x" * 32, b"y" * 32)


def relay_session(data: bytes) -> None:
    cookies = parse_session(data)
    text = "; ".join(f"{name}={value}" for name, value in cookies.items())
    assert len(cookies) <= 16 and not set(text) - set(map(chr, range(0x21, 0x7F))) - {" "}, "it goes into a header"
    assert parse_session(pack_session(cookies)) == (cookies if len(text) <= MAX_SESSION_BYTES else {})


def relay_session_seeds() -> list[bytes]:
    return [b"", b"kbs-session-id=" + b"0" * 32, b"AWSALB=a+b/c=; kbs-session-id=" + b"0" * 32, b"a=b\r\nX-Evil: 1; c=d"]


def rcar_challenge(data: bytes) -> None:
    offer = rcar.parse_challenge(data, RCAR_STATE)
    body = rcar.pack_attestation(offer.nonce, PUBLIC, CompositeEvidence(Evidence(Tee.SAMPLE, bytes(48)), ""), None)
    assert json.loads(body)["runtime-data"]["nonce"] == offer.nonce.decode()
    binding.report_data(RuntimeData(offer.nonce, PUBLIC.x, PUBLIC.y, offer.hash), "")


def rcar_challenge_seeds() -> list[bytes]:
    return [
        b'{"nonce":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","extra-params":""}',
        b'{"nonce":"{\\"x\\":1}","extra-params":{"selected-hash-algorithm":"SHA512"},"x":1.5}',
    ]


def rcar_token(data: bytes) -> None:
    assert rcar.parse_token(data, RCAR_STATE).count(".") == 2


def rcar_token_seeds() -> list[bytes]:
    return [b'{"token":"aa.bb.c-_"}', b'{"token":"a.b.c","expires":3.5}']


def rcar_failure(data: bytes) -> None:
    """A status, and what came with it."""
    status, _, body = data.partition(b" ")
    answer = rcar.Answer(int(status), body, retry_after=body[:20].decode("latin-1"))
    for exchange in rcar.Exchange:
        error, wait_s = rcar.failure_of(exchange, answer, RCAR_STATE, body.decode("latin-1"))
        assert isinstance(error, AgentError)
        assert 0 <= wait_s <= 3600


def rcar_failure_seeds() -> list[bytes]:
    types = b"https://github.com/confidential-containers/kbs/errors/"
    mismatch = b"KBS Client Protocol Version Mismatch: expect =0.1.1 while the request is 0.4.0"
    bodies = [
        b'{"type":"' + types + b'AttestationError","detail":"' + mismatch + b'"}',
        b'{"type":"' + types + b'PolicyDeny","detail":"Access denied by policy"}',
        b'{"type":"' + types + b'PluginNotFound","detail":"Plugin x not found"}',
    ]
    return [b"401 " + bodies[0], b"401 " + bodies[1], b"404 " + bodies[2], b"503 120", b"413 payload reached size limit"]


def rcar_headers(data: bytes) -> None:
    """Cookies, a line each, and a date."""
    lines = tuple(data.decode("latin-1").split("\n"))
    cookies = rcar.merge_cookies({"kept": "1"}, lines)
    assert "kept" in cookies
    assert len(cookies) <= 16
    for name, value in cookies.items():
        assert not set(name + value) & set(" ;,\r\n\t")
    rcar.clock_ahead_s(rcar.Answer(200, b"", date=lines[0]), NOW)


def rcar_headers_seeds() -> list[bytes]:
    return [
        b"kbs-session-id=0123456789abcdef; Expires=Thu, 01 Jan 1970 00:05:00 GMT\nlb=a+b/c=; Path=/",
        b"Tue, 15 Nov 1994 08:12:31 GMT\nkept=2",
    ]


def token(data: bytes) -> None:
    read_token(data.decode("utf-8", "surrogatepass"), (AUTHORITY.public_key(),), NOW)


def token_claims(data: bytes) -> None:
    """The payload alone, signed by the authority whatever it says."""
    read_token(_sign(data), (AUTHORITY.public_key(),), NOW)


def token_claims_seeds() -> list[bytes]:
    members: dict[str, object] = {
        "iss": "keyturn-broker",
        "iat": NOW - 5,
        "exp": NOW + 300,
        "nonce": jose.pack_b64(NONCE),
        "tee-pubkey": jose.pack_jwk(POINT),
        "key_uri": KEY_URI,
        "policy_version": "p-7",
        "min_model_version": 4,
        "simulated": False,
    }
    return [json.dumps(each).encode() for each in (members, members | {"nbf": NOW, "lease_s": 60})]


def sealed_key(data: bytes) -> None:
    out = bytearray(keys.KEY_BYTES)
    keys.open_jwe(data, keys.EphemeralKey(GUEST), memoryview(out))


def ear(data: bytes) -> None:
    """A Trustee token; what its pinned keys signed is what a diagnosis reads."""
    text = data.decode("utf-8", "surrogatepass")
    decoded = decode_unverified_ear(text)
    assert verify_ear(text, (AUTHORITY.public_key(),), NOW) == decoded


def ear_claims(data: bytes) -> None:
    """The payload alone; whatever is accepted has findings in words."""
    for finding in findings(verify_ear(_sign(data), (AUTHORITY.public_key(),), NOW)):
        assert str(finding).isprintable()


def ear_claims_seeds() -> list[bytes]:
    """SNP with a GPU that nothing affirms, TDX, and sample evidence without an issuer."""
    runtime = {"nonce": jose.pack_b64(NONCE), "tee-pubkey": jose.pack_jwk(POINT), "additional-evidence": ""}

    def submod(kind: str, claims: dict[str, object], init_data: str | None, **vector: int) -> dict[str, object]:
        evidence = {kind: claims, "init_data": init_data, "runtime_data_claims": runtime}
        return {
            "ear.status": "contraindicated" if 97 in vector.values() else "affirming",
            "ear.trustworthiness-vector": vector,
            "ear.veraison.annotated-evidence": evidence,
        }

    gpu = submod("nvidia", {}, None, executables=33, hardware=97, configuration=36)
    snp = submod("snp", {"measurement": "ab" * 48}, "cd" * 32, executables=3, hardware=2, configuration=2)
    tdx = submod(
        "tdx", {"quote": {"body": {"mr_td": "ab" * 48}}, "tcb_status": "OutOfDate", "advisory_ids": ["A-1"]}, "cd" * 48
    )
    sample = submod("sample", {"launch_digest": "abcde"}, "q80=")
    times: dict[str, object] = {"iat": NOW - 5, "exp": NOW + 300}
    bodies = [
        times | {"iss": "CoCo-Attestation-Service", "submods": {"cpu0": snp, "gpu0": gpu}},
        times | {"iss": "x", "nbf": NOW, "submods": {"cpu0": tdx}},
        times | {"submods": {"cpu0": sample}},
    ]
    return [json.dumps(body).encode() for body in bodies]


def given_to_explain(data: bytes) -> None:
    """Whatever is explained is printed from closed values."""
    said = diagnose(data.decode("utf-8", "replace"), NOW)
    assert json.dumps(said.record).isprintable()
    assert all(text.isprintable() for problem in said.problems for text in problem.said)
    assert all(text.isprintable() for fact in said.facts for text in fact)


def given_to_explain_seeds() -> list[bytes]:
    """A failure, a log, a status document, the answer of an attestation."""
    failed = ConfigError(ConfigProblem.BAD_VALUE, Ident("broker.url"))
    report = BootReport("1", "run")
    report.apply(failed)
    line = json.dumps(message_to_record(failed) | {"at": "x", "t_ms": 1})
    log = f"x\n{line}\n{json.dumps(message_to_record(StageEnded(Stage.LOAD, 5, 1)))}"
    answer = json.dumps({"token": (CORPUS / "ear" / "made-0").read_text()})
    return [text.encode() for text in (line, log, json.dumps(report.status()), answer)]


def policy_values(data: bytes) -> None:
    """An image or a GPU; a policy file made of it has the one row, and the Rego nothing that ends a line or a string early."""
    image = parse_image(policy_values_seeds()[0])
    known = Approved(image, bytes(48), 1, False, (), (), 0, KEY_URI, "tiny", 1, DIGEST, DIGEST)
    try:
        approved = replace(known, image=parse_image(data))
    except AgentError:
        device = parse_gpu(data)
        known = replace(known, switch_count=4 * isinstance(device, SwitchVersions))
        approved = replace(known, **{"switches" if known.switch_count else "gpus": (device,)})  # type: ignore[arg-type]
    assert list(parse_policy(broker_policy(approved, None).encode()).rows) == [KEY_URI]
    assert len(resource_policy(approved).splitlines()) == len(resource_policy(known).splitlines())


def policy_values_seeds() -> list[bytes]:
    """SEV-SNP, Turin, TDX by hand, a GPU, and an NVSwitch."""
    levels = {"boot_loader": 9, "tee": 1, "snp": 23, "microcode": 71}
    snp: dict[str, object] = {"measurement": "11" * 48, "product": "Genoa", "reported_tcb": levels}
    turin = snp | {"product": "Turin", "reported_tcb": levels | {"fmc": 2}}
    tdx = "".join(f'{name} = "{"41" * 48}"\n' for name in ("mr_td", "rtmr_1", "rtmr_2", "mr_seam")) + 'xfam = "0x602e7"\n'
    gpu = {"driver_version": "580.95.05", "vbios_version": "96.00.74.00.1A", "feature_flag": 2}
    switch = {"arch": "LS10", "vbios_version": "96.10.55.00.01"}
    return [
        json.dumps(snp).encode(),
        json.dumps(turin).encode(),
        tdx.encode(),
        *(json.dumps(x).encode() for x in (gpu, switch)),
    ]


def credentials(data: bytes) -> None:
    found = store_credentials.parse_credentials(memoryview(data))
    assert found.user and found.secret and found.session_token != ""
    f"{found.user}{found.session_token}".encode("ascii")  # into a header
    found.secret.encode()
    assert not re.search(r"[\x00-\x1f\x7f]", found.user + found.secret + (found.session_token or ""))


def credentials_seeds() -> list[bytes]:
    return [b'{"user": "guest", "secret": "correct horse"}', b'{"user":"A","secret":"b\\u00fc","session_token":"c/+="}']


def keyset(data: bytes) -> None:
    assert len(tink_keyset.parse_keyset(data)) == keys.KEY_BYTES


def keyset_seeds() -> list[bytes]:
    value = jose.pack_b64(bytes.fromhex("120808808040102018031a20") + bytes(range(32)))
    about = f'"typeUrl": "{tink_keyset.TYPE}", "value": "{value}", "keyMaterialType": "SYMMETRIC"'
    key = f'{{"keyData": {{{about}}}, "status": "ENABLED", "keyId": 7, "outputPrefixType": "RAW"}}'
    return [f'{{"primaryKeyId": 7, "key": [{key}]}}'.encode()]


def openssf_bundle(data: bytes) -> None:
    """The statement in it, signed anew, so that what lies behind the signature is met; then the bundle itself."""
    key = AUTHORITY.public_key()
    payload = f"DSSEv1 28 application/vnd.in-toto+json {len(data)} ".encode() + data
    signature = jose.pack_b64(AUTHORITY.sign(payload, ec.ECDSA(hashes.SHA256())))
    envelope = {
        "payload": jose.pack_b64(data),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": signature}],
    }
    signed = {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope}
    for bundle in (data, json.dumps(signed).encode()):
        with suppress(ModelSignatureError):
            openssf.check_files(bundle, [key], {})


def openssf_bundle_seeds() -> list[bytes]:
    bundle = (Path(__file__).parents[1] / "vectors" / "openssf" / "bundle.json").read_bytes()
    return [bundle, base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])]


def kserve_jwe(data: bytes) -> None:
    """A whole file; what is left after its parts were taken is the ciphertext, and that opens under nobody's key."""
    head, tail = data[: compact_jwe.MAX_HEAD_BYTES], data[-compact_jwe.TAIL_BYTES :]
    jwe = compact_jwe.parse_compact(head, tail, len(data))
    text = memoryview(data)[jwe.start : jwe.start + jwe.text_bytes]
    assert len(text) == jwe.text_bytes
    out = bytearray(jwe.plaintext_bytes)
    with suppress(ValueError, AgentError):
        opener = compact_jwe.JweOpener(jwe, memoryview(bytes(32)))
        opener.update(compact_jwe.decode(text), memoryview(out))
        opener.finish()


def kserve_jwe_seeds() -> list[bytes]:
    sealed = [jwe_of_kserve({"alg": alg, "enc": "A256GCM"}, b"plain" * 20) for alg in ("A256KW", "dir")]
    return [*sealed, sealed[0] + b"\n"]


def jwe_of_kserve(header: dict[str, str], plaintext: bytes, key: bytes = bytes(32)) -> bytes:
    """As jwcrypto writes it, with nothing drawn at random."""
    content_key = key if header["alg"] == "dir" else bytes(range(32))
    wrapped = b"" if header["alg"] == "dir" else aes_key_wrap(key, content_key)
    protected = jose.pack_b64url(json.dumps(header).encode())
    sealed = AESGCM(content_key).encrypt(bytes(12), plaintext, protected.encode())
    parts = (wrapped, bytes(12), sealed[:-16], sealed[-16:])
    return ".".join((protected, *map(jose.pack_b64url, parts))).encode()


def json_object(data: bytes) -> None:
    members = jose.parse_object(data, 16 << 10)
    assert jose.parse_object(json.dumps(members).encode(), 1 << 20) == members


def json_object_seeds() -> list[bytes]:
    return [b'{"a":{"b":[1,-2,true,null]},"c":"\\u00e9"}']


def base64_text(data: bytes) -> None:
    text = data.decode("utf-8", "surrogatepass")
    try:
        assert jose.pack_b64(jose.parse_b64(text)) == text
    except ValueError:
        assert jose.pack_b64url(jose.parse_b64url(text)) == text


def base64_text_seeds() -> list[bytes]:
    return [jose.pack_b64(b"\xfb\xff").encode(), jose.pack_b64url(b"\xfb\xff").encode()]


# --- artifact ---------------------------------------------------------------------------------------------------------


def _sealed(path: str, size: int, version: int) -> m.SealedFile:
    return m.SealedFile(path, size, m.digest_of(path.encode()), version, b"\x28" + bytes(39))


MODEL = m.ModelConfig(
    Ident("llama"), 3, KEY_URI, bytes(range(32)), (_sealed("config.json", 0, 2), _sealed("w/\u00e9.gguf", 1 << 40, 1))
)


def manifest(data: bytes) -> None:
    """Under its own digest, as if somebody had sealed it so."""
    m.parse_manifest(data, m.digest_of(data))


def manifest_seeds() -> list[bytes]:
    return [m.pack_manifest(MODEL)]


def model_config(data: bytes) -> None:
    """With a manifest that names it, and whose layers are what it says itself as far as it can be read."""
    listed = m.parse_manifest(m.pack_manifest(MODEL), m.digest_of(m.pack_manifest(MODEL)))
    layers = listed.layers
    with suppress(ValueError, LookupError, TypeError, RuntimeError, RecursionError):
        layers = tuple(
            m.Layer(file["path"], file["blob_digest"], StreamLayout(file["size"]).ciphertext_bytes)
            for file in json.loads(data)["files"]
        )
    listed = replace(listed, config_digest=m.digest_of(data), config_bytes=len(data), layers=layers)
    assert m.pack_config(m.parse_config(data, listed)) == data


def model_config_seeds() -> list[bytes]:
    return [m.pack_config(MODEL)]


VOLUME = volume_config.VolumeConfig(
    model_name=Ident("llama"),
    version=3,
    key_uri=KEY_URI,
    key_commitment=bytes(32),
    uuid="11111111-2222-4333-8444-555555555555",
    data_offset=1 << 20,
    sector_size=4096,
    data_blocks=300,
    hash_block=300,
    root_hash=bytes(32),
    salt=bytes(32),
)


def volume_manifest(data: bytes) -> None:
    """Under its own digest, of either kind."""
    m.parse_manifest(data, m.digest_of(data), m.CONFIG_TYPES)


def volume_manifest_seeds() -> list[bytes]:
    return [volume_config.pack_manifest(VOLUME), m.pack_manifest(MODEL)]


def volume_configuration(data: bytes) -> None:
    """With a manifest that names it. What is accepted makes tables that the kernel's parsers can only read one way."""
    listed = m.Manifest("", m.VOLUME_CONFIG_TYPE, m.digest_of(data), len(data), ())
    config = volume_config.parse_volume(data, listed)
    assert volume_config.pack_config(config) == data
    for sectors, parameters in (volume_config.crypt_table(config, "254:0"), volume_config.verity_table(config, "253:0")):
        assert 0 < sectors < 1 << 40
        assert re.fullmatch(r"[a-z0-9{}:_ -]+", parameters)
        assert len(parameters) < 256


def volume_configuration_seeds() -> list[bytes]:
    return [volume_config.pack_config(VOLUME)]


def luks2_header(data: bytes) -> None:
    """With the checksum that a host would give it; a whole header, and JSON that stands in a good one."""
    luks2.look(data[: luks2.BINARY_BYTES])
    good = luks2_header_seeds()[0]
    text = data[: len(good) - luks2.BINARY_BYTES].ljust(len(good) - luks2.BINARY_BYTES, b"\0")
    for header in (luks2.with_checksum(data), luks2.with_checksum(good[: luks2.BINARY_BYTES] + text)):
        with suppress(VolumeHeaderError):
            found = luks2.parse_luks2(header)
            assert found.sector_size in (512, 4096)
    luks2.parse_luks2(data)


def luks2_header_seeds() -> list[bytes]:
    header = pack_luks2(VOLUME, bytes(64), bytes)[:HEADER_BYTES]
    return [header, header[luks2.BINARY_BYTES :].rstrip(b"\0")]


FOREIGN_SIGNER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1").public_key()


def signature_of_manifest(data: bytes) -> None:
    """Under no key: what is read of it means what its bytes say, and nothing verifies."""
    found = signature.parse_signature(data)
    if found is not None:
        assert len(data) <= signature.MAX_SIGNATURE_BYTES
        assert found.protected in data
        assert found.payload in data
    with suppress(ManifestSignatureError):
        signature.verify_signatures([data], m.digest_of(b""), [FOREIGN_SIGNER])
        raise AssertionError("a signature of nobody")


def signature_of_manifest_seeds() -> list[bytes]:
    return [signature.sign_manifest(m.digest_of(b""), ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))]


RECEIPT_KEY = ec.derive_private_key(1, ec.SECP256R1())


def receipt(data: bytes) -> None:
    """As a payload that its key signed, which is behind the check that most bytes end at; and as the whole."""
    with suppress(ReceiptError):
        parse_receipt(data)
        raise AssertionError("a receipt of nobody")
    found = parse_receipt(cose.sign(data, RECEIPT_KEY))
    assert found.pack() == data
    with suppress(ReceiptError, MalformedEvidenceError):
        check_binding(found)
        raise AssertionError("evidence of nobody")


def receipt_seeds() -> list[bytes]:
    return [replace(RECEIPT, key=cose.spki(RECEIPT_KEY.public_key())).pack()]


def signature_manifest(data: bytes) -> None:
    digest = signature.parse_signature_manifest(data, m.digest_of(b""))
    assert digest is None or m.is_digest(digest)


def signature_manifest_seeds() -> list[bytes]:
    return [signature.pack_signature_manifest(b"", b"cose")]


def index(data: bytes) -> None:
    entries = m.parse_index(data)
    assert m.parse_index(m.add_to_index(data, b"{}", "new"))[:-1] == entries


def index_seeds() -> list[bytes]:
    return [m.add_to_index(None, m.pack_manifest(MODEL), "llama-3"), b'{"schemaVersion":2,"manifests":[]}']


def stream_header(data: bytes) -> None:
    assert pack_header(parse_header(data, 0)) == data


def stream_header_seeds() -> list[bytes]:
    return [b"\x28" + bytes(range(39))]


def redirect(data: bytes) -> None:
    """The Location header of a store, down to what is asked of it next."""
    target = http_policy.redirect_target("https://store.test:8443/models/blobs/sha256/ab", data.decode("latin-1"), 0)
    with suppress(urllib3.exceptions.HTTPError):  # `sources/http.py` translates it
        assert urllib3.util.parse_url(target).host == "store.test"


def redirect_seeds() -> list[bytes]:
    return [b"/other", b"https://store.test:8443/x?y=z", b"../up", b"//store.test:8443/x", b"https://[::1]:8443/"]


def proxy_answer(data: bytes) -> None:
    """However a proxy's answer is cut into pieces, it comes to the same."""
    try:
        status = parse_connect_answer(data)
    except ValueError:
        return
    if status is None:
        assert len(data) <= MAX_ANSWER_BYTES
        return
    assert 200 <= status <= 999
    head = data[: data.index(b"\r\n\r\n") + 4]
    assert parse_connect_answer(head) == status
    assert parse_connect_answer(head[:-4]) is None


def proxy_answer_seeds() -> list[bytes]:
    return [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n<html>",
        b"HTTP/1.1 502\r\nContent-Length: 0\r\n\r\n",
    ]


def proxy_url(data: bytes) -> None:
    with suppress(ValueError):
        proxy = parse_proxy(data.decode("latin-1"))
        assert 0 < proxy.port < 65536
        pack_connect(proxy.host, proxy.port)


def proxy_url_seeds() -> list[bytes]:
    return [b"http://proxy.test:3128", b"http://10.0.0.1:1/", b"http://[fd00::1]:65535"]


def store_answer(data: bytes) -> None:
    """What a store answers to a range and to a whole blob, from a real socket."""
    server = _answering()
    server.answer = data
    # Each from a source of its own: whether a kept connection is known to have ended is a matter of time.
    for read in (_read_range, _read_blob):
        with closing(http.HttpSource(f"http://127.0.0.1:{server.port}/layout", None, 5.0)) as source:
            read(source)


def _read_range(source: http.HttpSource) -> None:
    with suppress(AgentError):
        assert 0 <= source.read_range(DIGEST, 4, memoryview(bytearray(8))) <= 8


def _read_blob(source: http.HttpSource) -> None:
    assert len(source.read_blob(DIGEST, 64)) <= 64


def store_answer_seeds() -> list[bytes]:
    return [
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 4-11/20\r\nContent-Length: 8\r\n\r\n12345678",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 4-6/7\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Encoding: identity\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */20\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ]


def challenges(data: bytes) -> None:
    """WWW-Authenticate of a registry."""
    for challenge in registry_auth.parse_challenges(data.decode("latin-1")):
        assert challenge.scheme == challenge.scheme.lower()
        assert all("\n" not in value and "\r" not in value for value in challenge.parameters.values())


def challenges_seeds() -> list[bytes]:
    return [
        b'Bearer realm="https://auth.test/token",service="registry.test",scope="repository:a/b:pull"',
        b'Negotiate YQ==, Basic realm="a\\"b", charset=UTF-8',
        b"Basic",
    ]


def registry_token(data: bytes) -> None:
    """What a token service answers, as it then stands in a header."""
    token, life_s = registry_auth.parse_token_answer(data)
    assert token.isascii() and token.isprintable() and " " not in token
    assert 0 <= life_s <= 3600


def registry_token_seeds() -> list[bytes]:
    return [b'{"token": "a.b-c", "expires_in": 300}', b'{"access_token": "a", "issued_at": "2026-01-01T00:00:00Z"}']


def registry_answer(data: bytes) -> None:
    """What a registry answers to everything it is asked for, from a real socket: manifests, referrers, tags, blobs.

    No seed leads to another host, because a mutation of it would be asked for.
    """
    server = _answering()
    server.answer = data
    location, access = f"oci+http://127.0.0.1:{server.port}/a", Access("user", "secret")
    reads: tuple[Callable[[LayoutSource], object], ...] = (
        lambda source: source.read_manifest("latest", 4096),
        lambda source: source.referrers(DIGEST),
        lambda source: source.read_index(4096),
        lambda source: source.read_range(DIGEST, 4, memoryview(bytearray(8))),
    )
    for read in reads:
        with closing(open_source(location, None, 5.0, access)) as source, suppress(AgentError):
            read(source)


def registry_answer_seeds() -> list[bytes]:
    index = m.add_to_index(None, b"{}", None, m.SIGNATURE_TYPE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
    return [
        head % (m.INDEX_TYPE.encode(), len(index), index),
        head % (m.MANIFEST_TYPE.encode(), 2, b"{}"),
        head % (b"application/json", 18, b'{"tags":["a-b.c"]}'),
        b'HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n',
        *store_answer_seeds(),
    ]


def store_location(data: bytes) -> None:
    """`artifact.source` and `artifact.endpoint`: nothing is asked of anybody yet."""
    location, _, endpoint = data.decode("utf-8", "replace").partition("\n")
    open_source(location, None, 5.0, Access(endpoint=endpoint or None)).close()


def store_location_seeds() -> list[bytes]:
    return [
        b"oci+http://host:5000/a/b",
        b"s3://bucket/a/b\nhttp://{bucket}.s3.test",
        b"http://host/a",
        b"s3://bucket\nhttp://[::1]:9",
    ]


# --- CoCo's api-server-rest -------------------------------------------------------------------------------------------


def guest_api_answer(data: bytes) -> None:
    """What answers in the guest's own API, to every request there is, from a real socket."""
    server = _answering()
    server.answer = data
    api = ApiServer(f"http://127.0.0.1:{server.port}", timeout_s=5.0)
    key = memoryview(bytearray(tink_keyset.MAX_KEYSET_BYTES))
    asks: tuple[Callable[[], object], ...] = (
        api.info,
        api.token,
        lambda: api.evidence(bytes(48)),
        lambda: api.additional_evidence(bytes(32)),
        lambda: api.resource(KEY_URI, key, keys.is_key_length),
        lambda: api.measure("keyturn", "op", "content"),
    )
    for ask in asks:
        with suppress(GuestApiError):
            ask()


def guest_api_answer_seeds() -> list[bytes]:
    bodies = (
        b'{"version":"v0","tee":"snp","additional_tees":["nvidia"],"feature":"all"}',
        b'{"token":"a.b.c","tee_keypair":"-----BEGIN PRIVATE KEY-----"}',
        b'{"success":"false","message": "The platform does not support runtime measurement"}',
        bytes(range(32)),
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\ndate: x\r\n\r\n"
    return [head % len(body) + body for body in bodies] + [b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 1\r\n\r\nx"]


def coco_devices(data: bytes) -> None:
    for evidence in coco._parse_devices(jose.parse_object(data, 1 << 20)):
        assert len(evidence.report) + len(evidence.certificate_chain) < len(data)


def coco_devices_seeds() -> list[bytes]:
    evidence, _, _ = _gpu()
    entry = {
        "arch": "HOPPER",
        "uuid": "unknown",
        "evidence": jose.pack_b64(evidence.report),
        "certificate": jose.pack_b64(evidence.certificate_chain),
    }
    small = entry | {"evidence": "AA==", "certificate": "AA=="}
    lists: list[list[dict[str, str]]] = [[entry], [small, small | {"arch": "Blackwell"}], []]
    return [json.dumps({"nvidia": {"device_evidence_list": each}}).encode() for each in lists] + [b'{"sampledevice":{}}']


# --- guest, configuration, worker and server --------------------------------------------------------------------------

CONFIG = measured.EXAMPLE.encode()
SIMULATED = CONFIG.replace(b'"snp" ', b'"simulated-snp" ') + b'[simulation]\nmachine = "/machine"\n'


def config(data: bytes) -> None:
    for allowed in measured.parse(data).allowed:
        assert allowed.artifact.uri


def config_seeds() -> list[bytes]:
    artifact, server = CONFIG.index(b"[artifact]"), CONFIG.index(b"[server]")
    common = CONFIG[:artifact] + b'[artifact]\ndestination = "directory"\ndirectory = "/m"\n'
    entries = [CONFIG[artifact:server].replace(b"[artifact]", b'[[artifact.allowed]]\nuri = "x://%d"' % i) for i in range(2)]
    entries = [entry.replace(b"destination =", b'key_uri = "kbs:///a/b/c"  # ') for entry in entries]
    return [CONFIG, SIMULATED, common + b"".join(entries)]


def initdata(data: bytes) -> None:
    document = parse_initdata(data, STATE)
    assert len(document.digest) in (32, 48, 64)
    assert parse_initdata(pack_document(document.entries, "sha256"), STATE).entries == document.entries


def initdata_seeds() -> list[bytes]:
    heads = [f'version = "0.1.0"\nalgorithm = "{name}"\n[data]\n' for name in ("sha256", "sha384", "sha512")]
    return [(head + '"keyturn.toml" = \'\'\'\nschema = "keyturn/v1"\n\'\'\'\n"aa.toml" = ""\n').encode() for head in heads]


def pod_manifest(data: bytes) -> None:
    documents = parse_documents(data)
    for pod in pods(documents):
        findings, _ = lint_pod(pod, documents, None)
        assert all(finding.line().isprintable() for finding in findings)


def pod_manifest_seeds() -> list[bytes]:
    return [(RENDERED / f"{name}.yaml").read_bytes() for name in ("entrypoint-nvidia-gpu-snp", "load-tdx", "broker")]


def _as_disk(data: bytes) -> bytes | None:
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        return read_device(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def initdata_disk(data: bytes) -> None:
    document = _as_disk(data)
    if document is not None:
        assert _as_disk(pack_device(document)) == document


def initdata_disk_seeds() -> list[bytes]:
    return [pack_device(document) for document in (b"", *initdata_seeds())]


def ip_parameter(data: bytes) -> None:
    static = parse_ip_parameter(data.decode("utf-8", "surrogateescape"))  # as sys.argv and /proc/cmdline are read
    assert resolv_conf(static).count("\n") == len(static.nameservers)


def ip_parameter_seeds() -> list[bytes]:
    return [
        b"10.9.0.2::10.9.0.1:255.255.255.0::v0:off",
        b"10.9.0.2:10.9.0.9:10.9.0.1:255.255.255.0:host:eth0:none:1.1.1.1:9.9.9.9:10.0.0.1",
        b"10.9.0.2:::255.255.255.255",
    ]


def routes(data: bytes) -> None:
    parse_routes(data)


def routes_seeds() -> list[bytes]:
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def message(kind: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 4321) + body

    over_2 = attribute(4, struct.pack("=i", 2))
    hops = attribute(9, struct.pack("=HBBi", 8, 0, 0, 2) + struct.pack("=HBBi", 16, 0, 0, 3) + attribute(5, b"gate"))
    bodies = [
        struct.pack("=8BI", socket.AF_INET, 0, 0, 0, 254, 3, 0, 1, 0) + over_2 + attribute(15, struct.pack("=I", 254)),
        struct.pack("=8BI", socket.AF_INET6, 64, 0, 0, 254, 3, 0, 1, 0) + over_2 + attribute(1, bytes(16)),
        struct.pack("=8BI", socket.AF_INET, 16, 0, 0, 254, 3, 0, 1, 0) + hops + attribute(1, b"\xa9\xfe\0\0"),
    ]
    ends = [message(3, struct.pack("=i", 0)), message(2, struct.pack("=i", -1) + bytes(16))]
    return [message(24, body) + end for body in bodies for end in ends]


def worker_record(data: bytes) -> None:
    """A packet on the channel to the supervisor, and the message it stands for."""
    if not 0 < len(data) <= MAX_RECORD_BYTES:
        return
    raw, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with raw, end:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_RECORD_BYTES)
        raw.send(data)
        packet = Channel(end).receive()
    assert packet is not None
    message = message_from_record(packet.record)
    assert message_from_record(message_to_record(message)) == message or isinstance(message, AgentError)


def worker_record_seeds() -> list[bytes]:
    messages = (
        BootStarted(Ident("0.1.0"), Ident("guest")),
        StageEnded(Stage.LOAD, 12, 34),
        VerdictAccepted(ID, KEY_URI, Ident("p1"), True, None),
        LeaseRenewed(60, Ident("2026-11-26T12:01:00Z")),
        ConfigError(ConfigProblem.NOT_TOML, None, 3),
        MalformedEvidenceError(EvidenceFormat.SNP_REPORT, Ident("length"), 1, 1184),
    )
    return [json.dumps(message_to_record(each)).encode() for each in messages]


PLAN = ServerPlan(
    argv=("/bin/server", "{model}", "{model_id}"),
    environment=(("HOME", "{scratch}"),),
    host="127.0.0.1",
    port=8080,
    uid=65534,
    gid=65534,
    health_path="/health",
    health_codes=frozenset({200}),
    models_path="/v1/models",
    model_id="tiny",
    probe=ProbeRequest("/completion", "{}", frozenset({200})),
    authorization=None,
    ready_timeout_s=60,
    stop_timeout_s=30,
    max_restarts=3,
    restart_window_s=600,
    output=Output.COUNT,
    scratch_max_bytes=1 << 20,
    egress=(443,),
)


def handed_model(data: bytes) -> None:
    model = HandedModel.of(json.loads(data), (7,))
    assert HandedModel.of(model.record(), (7,)) == model


def handed_model_seeds() -> list[bytes]:
    models = (
        HandedModel(
            PLAN,
            DestinationKind.TMPFS,
            None,
            "model.gguf",
            (7,),
            ServedModel("sha256:" + "5a" * 32, 3),
            Lease(60, 12.5),
            True,
            "/machine",
        ),
        HandedModel(
            PLAN, DestinationKind.DIRECTORY, "/mnt/model", None, (7,), ServedModel("sha256:" + "5a" * 32, 0), None, False, None
        ),
    )
    return [json.dumps(each.record()).encode() for each in models]


def server_plan(data: bytes) -> None:
    plan = ServerPlan.from_json(json.loads(data))
    assert ServerPlan.from_json(plan.to_json()) == plan


def server_plan_seeds() -> list[bytes]:
    return [json.dumps(PLAN.to_json()).encode()]


def model_list(data: bytes) -> None:
    for listed in probe._named_models(data):
        assert PLAN.model_id != listed or listed == "tiny"


def model_list_seeds() -> list[bytes]:
    return [b'{"data": [{"id": "other"}, {"id": "tiny"}]}', b'{"name": "tiny", "versions": ["1"]}']


def server_answer(data: bytes) -> None:
    """What a model server answers to a question, from a real socket."""
    server = _answering()
    server.answer = data
    answer = probe._ask(replace(PLAN, port=server.port), "/health", None, 5.0)
    assert answer is None or len(answer[1]) <= probe.MAX_BODY_BYTES


def server_answer_seeds() -> list[bytes]:
    return [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: y\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.0 503 Loading\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ]


def policy(data: bytes) -> None:
    parse_policy(data)


def policy_seeds() -> list[bytes]:
    """The broker's example, as it is, with its row for SNP, and with the one for TDX."""
    text = bootstrap.EXAMPLE_POLICY
    head, _, row = text.partition("#[[row]]")
    lines = [line.removeprefix("#") for line in ("#[[row]]" + row).splitlines()]
    snp, tdx = lines.index("[row.snp]"), lines.index("#[row.tdx]")
    of_td = [*lines[:snp], *(line.removeprefix("#") if line[:2] != "# " else line for line in lines[tdx:])]
    seeds = [head + "\n".join(each) for each in (lines, of_td)]
    assert all(parse_policy(seed.encode()).rows for seed in seeds)
    return [text.encode(), *(seed.encode() for seed in seeds)]


class _AnsweringServer:
    """Answers every connection with `answer`, whatever it is asked, and ends it."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection, suppress(OSError):
                connection.settimeout(5.0)
                connection.recv(64 << 10)
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(64 << 10):  # a close with something unread would take the answer back
                    pass


@cache
def _answering() -> _AnsweringServer:
    return _AnsweringServer()


# --- the table --------------------------------------------------------------------------------------------------------


def _none() -> Sequence[bytes]:
    return ()


TARGETS = {
    target.name: target
    for target in (
        Target("snp_report", snp_report, snp_report_seeds),
        Target("snp_evidence", snp_evidence, _none),
        Target("snp_certificate", snp_certificate, _none),
        Target("amd_crl", amd_crl, _none),
        Target("certificate_table", certificate_table, _none),
        Target("trustee_evidence", trustee_evidence, trustee_evidence_seeds, (ValueError,)),  # another TEE's name
        Target("tdx_quote", tdx_quote, tdx_quote_seeds),
        Target("tdx_evidence", tdx_evidence, _none),
        Target("tdx_tdreport", tdx_tdreport, _none),
        Target("ccel", event_log, _none),
        Target("ccel_joined", event_log_joined, event_log_seeds),
        Target("pck_chain", pck_chain, _none),
        Target("pck_extension", pck_extension, pck_extension_seeds),
        Target("sev_guest_answers", sev_guest_answers, sev_guest_answers_seeds),
        Target("tdx_blob", tdx_blob, tdx_blob_seeds),
        Target("qgs_answer", qgs_answer, qgs_answer_seeds),
        Target("tdx_attest_conf", tdx_attest_conf, tdx_attest_conf_seeds),
        Target("gpu_driver", gpu_driver, gpu_driver_seeds),
        Target("gpu_report", gpu_report, gpu_report_seeds),
        Target("gpu_opaque", gpu_opaque, gpu_opaque_seeds),
        Target("gpu_topology", gpu_topology, gpu_topology_seeds),
        Target("gpu_evidence", gpu_evidence, _none),
        Target("gpu_chain", gpu_chain, _none),
        Target("gpu_certificate", gpu_certificate, _none),
        Target("nscq_answers", nscq_answers, nscq_answers_seeds),
        Target("additional_evidence", additional_evidence, additional_evidence_seeds, (UnicodeDecodeError,)),
        Target("attest_request", attest_request, attest_request_seeds),
        Target("attest_response", attest_response, attest_response_seeds),
        Target("key_request", key_request, key_request_seeds),
        Target("key_response", key_response, key_response_seeds),
        Target("credentials_request", credentials_request, credentials_request_seeds),
        Target("credentials_response", credentials_response, credentials_response_seeds),
        Target("grpc_failure", grpc_failure, grpc_failure_seeds),
        Target("relay_session", relay_session, relay_session_seeds),
        Target("rcar_challenge", rcar_challenge, rcar_challenge_seeds),
        Target("rcar_token", rcar_token, rcar_token_seeds),
        Target("rcar_failure", rcar_failure, rcar_failure_seeds, (ValueError,)),  # no number
        Target("rcar_headers", rcar_headers, rcar_headers_seeds),
        Target("token", token, _none, (UnicodeDecodeError,)),
        Target("token_claims", token_claims, token_claims_seeds),
        Target("ear", ear, _none, (UnicodeDecodeError,)),
        Target("ear_claims", ear_claims, ear_claims_seeds),
        Target("policy_values", policy_values, policy_values_seeds),
        Target("given_to_explain", given_to_explain, given_to_explain_seeds, (ValueError,)),
        Target("sealed_key", sealed_key, _none),
        Target("keyset", keyset, keyset_seeds, (ValueError,)),
        Target("credentials", credentials, credentials_seeds, (ValueError,)),
        Target("json_object", json_object, json_object_seeds, (ValueError,)),
        Target("base64_text", base64_text, base64_text_seeds, (ValueError,)),
        Target("manifest", manifest, manifest_seeds),
        Target("model_config", model_config, model_config_seeds),
        Target("volume_manifest", volume_manifest, volume_manifest_seeds),
        Target("volume_configuration", volume_configuration, volume_configuration_seeds),
        Target("luks2_header", luks2_header, luks2_header_seeds),
        Target("openssf_bundle", openssf_bundle, openssf_bundle_seeds),
        Target("kserve_jwe", kserve_jwe, kserve_jwe_seeds, (ValueError,)),
        Target("index", index, index_seeds),
        Target("receipt", receipt, receipt_seeds),
        Target("signature_of_manifest", signature_of_manifest, signature_of_manifest_seeds),
        Target("signature_manifest", signature_manifest, signature_manifest_seeds),
        Target("stream_header", stream_header, stream_header_seeds),
        Target("redirect", redirect, redirect_seeds),
        Target("proxy_answer", proxy_answer, proxy_answer_seeds),
        Target("proxy_url", proxy_url, proxy_url_seeds),
        Target("challenges", challenges, challenges_seeds),
        Target("registry_token", registry_token, registry_token_seeds),
        Target("registry_answer", registry_answer, registry_answer_seeds),
        Target("store_location", store_location, store_location_seeds),
        Target("store_answer", store_answer, store_answer_seeds),
        Target("guest_api_answer", guest_api_answer, guest_api_answer_seeds),
        Target("coco_devices", coco_devices, coco_devices_seeds, (ValueError,)),
        Target("config", config, config_seeds),
        Target("initdata", initdata, initdata_seeds),
        Target("initdata_disk", initdata_disk, initdata_disk_seeds),
        Target("pod_manifest", pod_manifest, pod_manifest_seeds, (MalformedYamlError,)),
        Target("ip_parameter", ip_parameter, ip_parameter_seeds),
        Target("routes", routes, routes_seeds, (OSError,)),
        Target("worker_record", worker_record, worker_record_seeds, (ValueError,)),
        Target(
            "handed_model", handed_model, handed_model_seeds, (ValueError, KeyError, TypeError, OverflowError, RecursionError)
        ),
        Target("server_plan", server_plan, server_plan_seeds, (ValueError, RecursionError)),  # RecursionError: json.loads here
        Target("model_list", model_list, model_list_seeds),
        Target("server_answer", server_answer, server_answer_seeds),
        Target("policy", policy, policy_seeds),
    )
}


def corpus(target: Target) -> dict[str, bytes]:
    """The committed inputs of a target by file name, and its seeds."""
    files = sorted((CORPUS / target.name).glob("*"))
    return {path.name: path.read_bytes() for path in files} | {f"seed-{n}": data for n, data in enumerate(target.seeds())}


def renew() -> None:
    """Make simulated silicon again, and the seeds that have its keys in them."""
    with TemporaryDirectory() as folder:
        machine = SimulatedMachine.create(Path(folder) / "machine", gpus=1)
        evidence = machine.attester().collect(REPORT_DATA)
        quote = SimulatedTdx(machine).collect(REPORT_DATA).report
        tdreport = tdx_abi.pack_tdreport(make_td_report(machine, REPORT_DATA))
        measured = ccel.pack_runtime_event(ccel.RuntimeEvent("keyturn", "release-key", "{}"), 3)
        log = ccel.join_event_log(ccel.pack_event_log(make_event_log(machine)), ccel.pack_event(measured))
        amd_list = (machine.silicon / CRL_FILE).read_bytes()
        (gpu,) = machine.gpu_system().collect(GPU_NONCE)
        SILICON.mkdir(exist_ok=True)
        for root in machine.roots_dir.iterdir():
            (SILICON / root.name).write_bytes(root.read_bytes())
    (SILICON / CRL_FILE).write_bytes(amd_list)
    (SILICON / "snp-report.bin").write_bytes(evidence.report)
    for number, der in enumerate(evidence.cert_chain):
        (SILICON / f"snp-{number}.der").write_bytes(der)
    (SILICON / "tdx-quote.bin").write_bytes(quote)
    (SILICON / "gpu-report.bin").write_bytes(gpu.report)
    (SILICON / "gpu-chain.pem").write_bytes(gpu.certificate_chain)
    other = SimulatedSet()
    chains = [gpu.certificate_chain, other.blackwell.chain, other.switches[0].chain]
    gpu_certificates = x509.load_pem_x509_certificates(gpu.certificate_chain)[:2]
    gpu_certificates += [x509.load_pem_x509_certificate(chain) for chain in chains[1:]]
    numbers = GUEST.public_key().public_numbers()
    made = {
        "snp_report": [evidence.report],
        "snp_evidence": [evidence.report],
        "snp_certificate": list(evidence.cert_chain),
        "amd_crl": [amd_list],
        "certificate_table": [_table(evidence.cert_chain)],
        "tdx_quote": [quote],
        "tdx_evidence": [quote],
        "tdx_tdreport": [tdreport],
        "ccel": [log, log + b"\xff" * 64],
        "pck_chain": [tdx_abi.parse_quote(quote).pck_chain],
        "gpu_report": [gpu.report],
        "gpu_evidence": [gpu.report],
        "gpu_chain": chains,
        "gpu_certificate": [certificate.public_bytes(Encoding.DER) for certificate in gpu_certificates],
        "token": [_sign(token_claims_seeds()[0]).encode()],
        "ear": [_sign(ear_claims_seeds()[0]).encode()],
        "sealed_key": [jwe.seal(bytes(range(32)), TeePublicKey(numbers.x.to_bytes(32), numbers.y.to_bytes(32)))],
    }
    for name, inputs in made.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (CORPUS / name / f"made-{number}").write_bytes(data)
