"""Every parser of outside bytes as a target, and the inputs it starts from. Run by `engine.py`.

A target lets through what its parser documents (an AgentError, mostly) and asserts what must hold for an accepted input: the
round trip where there is an inverse. Seeds come from our own generators. What they draw at random (keys, so certificates and
signatures) lies in the corpus, with its roots in `silicon/`; `scripts/fuzz --renew` makes both again. Nothing recorded from
real devices is here.
"""

import base64
import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from agent import config as measured
from agent import http_policy, jose, keys
from agent.artifact import DestinationKind
from agent.artifact import manifest as m
from agent.artifact.sources import http
from agent.artifact.stream import StreamLayout, pack_header, parse_header
from agent.broker import bootstrap, jwe
from agent.broker.policy import parse_policy
from agent.channel import MAX_RECORD_BYTES, Channel
from agent.closed import Ident
from agent.errors import (
    AgentError,
    ConfigError,
    ConfigProblem,
    DenialReason,
    EvidenceFormat,
    MalformedEvidenceError,
)
from agent.events import BootStarted, LeaseRenewed, Stage, StageEnded, VerdictAccepted, message_from_record, message_to_record
from agent.evidence import CompositeEvidence, Evidence, GpuEvidence, GpuNonce, Nonce, ReportData, Tee, binding, gpu_abi, snp_abi
from agent.evidence.tsm import certificate_chain
from agent.guest.initdata import pack_device, parse_initdata, read_device
from agent.guest.network import parse_ip_parameter, parse_routes, resolv_conf
from agent.handshake import (
    Accepted,
    Attestation,
    Challenge,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TeePublicKey,
    grpc_status,
    grpc_wire,
)
from agent.handshake.token import read_token
from agent.lease import Lease
from agent.publish import HandedModel
from agent.server import Output, ProbeRequest, ServerPlan, probe
from agent.sim.machine import SimulatedMachine
from agent.verify import nvidia, snp
from tests.fuzz.engine import Target

HERE = Path(__file__).parent
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


def certificate_table(data: bytes) -> None:
    for der in certificate_chain(data):
        assert snp.load_certificate(der)


def gpu_report(data: bytes) -> None:
    assert gpu_abi.pack_report(gpu_abi.parse_report(data)) == data


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
    chain = nvidia.parse_chain(b"".join((_pem(data), *certificates[1:])))
    for read in (nvidia._fwid_of_certificate, nvidia._common_name):
        with suppress(AgentError):
            read(chain.certificates[0])
    for place in (0, 1):
        changed = b"".join((*certificates[:place], _pem(data), *certificates[place + 1 :]))
        with suppress(AgentError):
            nvidia.verify_gpu(replace(evidence, certificate_chain=changed), GPU_NONCE, [root], now)


CLAIMS = binding.KeyturnClaims(1, 2, 0, 0, False, False, "580.65.06", DIGEST, DIGEST)


def additional_evidence(data: bytes) -> None:
    gpus, claims = binding.parse_additional_evidence(data.decode("utf-8", "surrogatepass"))
    if claims is not None:
        assert binding.parse_additional_evidence(binding.additional_evidence(gpus, claims)) == (gpus, claims)


def additional_evidence_seeds() -> list[bytes]:
    gpus = (GpuEvidence("HOPPER", "GPU-a", b"r", b"c"), GpuEvidence("BLACKWELL", "GPU-b", b"rr", b"cc"))
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
    return [grpc_wire.pack_attest_request(each) for each in (Hello(ID, KEY_URI, Tee.SNP), Attestation(ID, POINT, evidence))]


def attest_response(data: bytes) -> None:
    message = grpc_wire.parse_attest_response(data, STATE)
    assert grpc_wire.parse_attest_response(grpc_wire.pack_attest_response(message), STATE) == message


def attest_response_seeds() -> list[bytes]:
    messages = (
        Challenge(ID, NONCE, 180),
        Accepted(ID, "a.b.c", Ident("p1"), (Ident("rv-1"), Ident("rv-2"))),
        Denied(ID, DenialReason.CLAIM, Ident("snp.measurement"), Ident("rv-1"), Ident("p1")),
    )
    return [grpc_wire.pack_attest_response(each) for each in messages]


def key_request(data: bytes) -> None:
    message = grpc_wire.parse_key_request(data, STATE)
    assert grpc_wire.parse_key_request(grpc_wire.pack_key_request(message), STATE) == message


def key_request_seeds() -> list[bytes]:
    return [grpc_wire.pack_key_request(KeyRequest(ID, "a.b.c", KEY_URI))]


def key_response(data: bytes) -> None:
    message = grpc_wire.parse_key_response(data, STATE)
    assert grpc_wire.parse_key_response(grpc_wire.pack_key_response(message), STATE) == message


def key_response_seeds() -> list[bytes]:
    return [grpc_wire.pack_key_response(KeyResponse(ID, b"{}", Ident("id-1"), 1))]


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


# --- guest, configuration, worker and server --------------------------------------------------------------------------

CONFIG = measured.EXAMPLE.encode()
SIMULATED = CONFIG.replace(b'"snp" ', b'"simulated-snp" ') + b'[simulation]\nmachine = "/machine"\n'


def config(data: bytes) -> None:
    measured.parse(data)


def config_seeds() -> list[bytes]:
    return [CONFIG, SIMULATED]


def initdata(data: bytes) -> None:
    document = parse_initdata(data, STATE)
    assert document.entry("keyturn.toml") is None or len(document.digest) in (32, 48, 64)


def initdata_seeds() -> list[bytes]:
    heads = [f'version = "0.1.0"\nalgorithm = "{name}"\n[data]\n' for name in ("sha256", "sha384", "sha512")]
    return [(head + '"keyturn.toml" = \'\'\'\nschema = "keyturn/v1"\n\'\'\'\n"aa.toml" = ""\n').encode() for head in heads]


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
        HandedModel(PLAN, DestinationKind.TMPFS, None, "model.gguf", (7,), 3, Lease(60, 12.5), True, "/machine"),
        HandedModel(PLAN, DestinationKind.DIRECTORY, "/mnt/model", None, (7,), 0, None, False, None),
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
    """The broker's example, as it is and with its row."""
    text = bootstrap.EXAMPLE_POLICY
    row = "\n".join(line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in text.splitlines())
    return [text.encode(), row.replace("\n# ", "\n## ").encode()]


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
        Target("certificate_table", certificate_table, _none),
        Target("gpu_report", gpu_report, _none),
        Target("gpu_evidence", gpu_evidence, _none),
        Target("gpu_chain", gpu_chain, _none),
        Target("gpu_certificate", gpu_certificate, _none),
        Target("additional_evidence", additional_evidence, additional_evidence_seeds, (UnicodeDecodeError,)),
        Target("attest_request", attest_request, attest_request_seeds),
        Target("attest_response", attest_response, attest_response_seeds),
        Target("key_request", key_request, key_request_seeds),
        Target("key_response", key_response, key_response_seeds),
        Target("grpc_failure", grpc_failure, grpc_failure_seeds),
        Target("token", token, _none, (UnicodeDecodeError,)),
        Target("token_claims", token_claims, token_claims_seeds),
        Target("sealed_key", sealed_key, _none),
        Target("json_object", json_object, json_object_seeds, (ValueError,)),
        Target("base64_text", base64_text, base64_text_seeds, (ValueError,)),
        Target("manifest", manifest, manifest_seeds),
        Target("model_config", model_config, model_config_seeds),
        Target("index", index, index_seeds),
        Target("stream_header", stream_header, stream_header_seeds),
        Target("redirect", redirect, redirect_seeds),
        Target("store_answer", store_answer, store_answer_seeds),
        Target("config", config, config_seeds),
        Target("initdata", initdata, initdata_seeds),
        Target("initdata_disk", initdata_disk, initdata_disk_seeds),
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
        (gpu,) = machine.gpu_system().collect(GPU_NONCE)
        SILICON.mkdir(exist_ok=True)
        for root in machine.roots_dir.iterdir():
            (SILICON / root.name).write_bytes(root.read_bytes())
    (SILICON / "snp-report.bin").write_bytes(evidence.report)
    for number, der in enumerate(evidence.cert_chain):
        (SILICON / f"snp-{number}.der").write_bytes(der)
    (SILICON / "gpu-report.bin").write_bytes(gpu.report)
    (SILICON / "gpu-chain.pem").write_bytes(gpu.certificate_chain)
    gpu_certificates = x509.load_pem_x509_certificates(gpu.certificate_chain)
    numbers = GUEST.public_key().public_numbers()
    made = {
        "snp_report": [evidence.report],
        "snp_evidence": [evidence.report],
        "snp_certificate": list(evidence.cert_chain),
        "certificate_table": [_table(evidence.cert_chain)],
        "gpu_report": [gpu.report],
        "gpu_evidence": [gpu.report],
        "gpu_chain": [gpu.certificate_chain],
        "gpu_certificate": [certificate.public_bytes(Encoding.DER) for certificate in gpu_certificates[:2]],
        "token": [_sign(token_claims_seeds()[0]).encode()],
        "sealed_key": [jwe.seal(bytes(range(32)), TeePublicKey(numbers.x.to_bytes(32), numbers.y.to_bytes(32)))],
    }
    for name, inputs in made.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (CORPUS / name / f"made-{number}").write_bytes(data)
