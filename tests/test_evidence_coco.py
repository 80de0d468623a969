import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from agent.errors import (
    Absence,
    AgentError,
    CountedDevice,
    DeviceError,
    EvidenceBindingError,
    EvidenceVerificationError,
    GpuCountError,
    GuestApiError,
    GuestApiProblem,
    MalformedEvidenceError,
    NoAttesterError,
    Owner,
)
from agent.evidence import Evidence, GpuNonce, GpuSystem, ReportData, Tee
from agent.evidence.coco import CocoAttester, CocoGpus
from agent.evidence.nscq import GpusAndSwitches
from agent.evidence.snp_abi import parse_report
from agent.evidence.trustee_json import parse_evidence
from agent.guest.api_server import ApiServer
from agent.sim.api_server_rest import Components, serve
from agent.sim.machine import SimulatedMachine
from agent.verify.snp import verify_snp
from tests.raw_http import answers
from tests.world import free_port

DATA = ReportData(bytes(range(1, 49)) + bytes(16))
NONCE = GpuNonce(bytes(range(32)))
DIGEST = bytes(range(32))


@contextmanager
def attester(components: Components, **arguments: bytes | None) -> Iterator[CocoAttester]:
    with serve(components) as url:
        yield CocoAttester(ApiServer(url), needs_resources=False, **arguments)


def say(body: object) -> bytes:
    """A good answer."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_evidence_is_what_an_interface_of_our_own_would_have_given(machine: SimulatedMachine, tee: Tee) -> None:
    machine.host_data = DIGEST
    with attester(Components(machine.attester(tee))) as coco:
        assert (coco.tee, coco.interface) == (tee, "api-server-rest")
        found = coco.collect(DATA)
        assert coco.launch_digest()[:32] == DIGEST
    assert found.tee is tee
    if tee is Tee.SNP:
        own = machine.attester().collect(DATA)
        assert found.cert_chain == own.cert_chain
        assert found.report[:0x2A0] == own.report[:0x2A0], "all but the signature, which is never the same"
        root = x509.load_pem_x509_certificate((machine.roots_dir / "ark.pem").read_bytes())
        assert verify_snp(found, [root], [], datetime.now(UTC)).report.host_data == DIGEST


def test_report_data_without_zeros_at_its_end_goes_whole(machine: SimulatedMachine) -> None:
    whole = ReportData(bytes(range(64)))
    with attester(Components(machine.attester())) as coco:
        assert parse_report(coco.collect(whole).report).report_data == whole


def test_sample_evidence_is_a_simulation() -> None:
    with attester(Components(None), sample_digest=DIGEST) as coco:
        assert coco.collect(DATA) == Evidence(Tee.SAMPLE, DATA[:48])
        assert coco.launch_digest() == DIGEST
    with pytest.raises(NoAttesterError) as caught, attester(Components(None)):
        pass
    assert caught.value.reason is Absence.SAMPLE


@pytest.mark.parametrize(
    ("tee", "reason"),
    [
        ("az-snp-vtpm", Absence.PARAVISOR),
        ("az-tdx-vtpm", Absence.PARAVISOR),
        ("sgx", Absence.OTHER_TEE),
        (None, Absence.OTHER_TEE),
    ],
)
def test_a_guest_of_another_tee_has_no_attester_here(tee: str | None, reason: Absence) -> None:
    with answers(say({"tee": tee, "feature": "all"})) as url, pytest.raises(NoAttesterError) as caught:
        CocoAttester(ApiServer(url), needs_resources=False)
    assert caught.value.reason is reason


def test_a_server_that_has_not_started_is_no_attester_yet() -> None:
    with pytest.raises(NoAttesterError) as caught:
        CocoAttester(ApiServer(f"http://127.0.0.1:{free_port()}"), needs_resources=False)
    assert caught.value.reason is Absence.NO_GUEST_API


@pytest.mark.parametrize(
    ("feature", "needs_resources", "refused"),
    [
        ("all", True, False),
        ("attestation", False, False),
        ("attestation", True, True),
        ("resource", False, True),
        ("resource", True, True),
    ],
)
def test_a_server_without_a_needed_feature_is_told_by_what_it_says(
    machine: SimulatedMachine, feature: str, needs_resources: bool, refused: bool
) -> None:
    with serve(Components(machine.attester(), feature=feature)) as url:
        if not refused:
            CocoAttester(ApiServer(url), needs_resources=needs_resources)
            return
        with pytest.raises(GuestApiError) as caught:
            CocoAttester(ApiServer(url), needs_resources=needs_resources)
    assert caught.value.problem is GuestApiProblem.FEATURES


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX, Tee.SAMPLE])
def test_a_server_too_old_for_base64_is_told_by_its_report_data(machine: SimulatedMachine, tee: Tee) -> None:
    simulated = None if tee is Tee.SAMPLE else machine.attester(tee)
    with (
        attester(Components(simulated, knows_base64=False), sample_digest=DIGEST) as coco,
        pytest.raises(GuestApiError) as caught,
    ):
        coco.collect(DATA)
    assert caught.value.problem is GuestApiProblem.ENCODING
    assert caught.value.owner is Owner.OPERATOR


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_evidence_over_other_data_is_refused(machine: SimulatedMachine, tee: Tee) -> None:
    with serve(Components(machine.attester(tee))) as url:
        text = json.loads(ApiServer(url).evidence(bytes(48)))
    evidence = parse_evidence(tee, json.dumps(text).encode())
    assert evidence.tee is tee
    with answers(say({"tee": tee.value, "feature": "all"}), say(text)) as url:
        coco = CocoAttester(ApiServer(url), needs_resources=False)
        with pytest.raises(EvidenceBindingError):
            coco.collect(DATA)


BAD_EVIDENCE: list[tuple[str, object, type[AgentError]]] = [
    ("not JSON", b"canary-peer-text", MalformedEvidenceError),
    ("no report", {"cert_chain": None}, MalformedEvidenceError),
    ("another kind's", {"svn": "1", "report_data": ""}, MalformedEvidenceError),
    ("a list", [], MalformedEvidenceError),
    ("too large", b" " * ((3 << 19) + 1), GuestApiError),
]


@pytest.mark.parametrize(("body", "error"), [row[1:] for row in BAD_EVIDENCE], ids=[row[0] for row in BAD_EVIDENCE])
def test_bad_evidence_is_one_typed_error(body: object, error: type[AgentError]) -> None:
    with answers(say({"tee": "snp", "feature": "all"}), say(body)) as url:
        coco = CocoAttester(ApiServer(url), needs_resources=False)
        with pytest.raises(error) as caught:
            coco.collect(DATA)
    assert "canary" not in str(caught.value)


def test_an_agent_that_gets_no_evidence_is_a_device_that_failed_and_is_asked_once(machine: SimulatedMachine) -> None:
    components = Components(machine.attester())
    with attester(components) as coco:
        machine.errno = 5
        with pytest.raises(DeviceError) as caught:
            coco.collect(DATA)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("api-server-rest", "evidence", 500)
    assert components.asked == ["/info", "/aa/evidence"]


# --- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(silicon: Path, tmp_path: Path) -> SimulatedMachine:
    return SimulatedMachine.create(tmp_path / "machine", gpus=2, silicon=silicon)


@contextmanager
def gpus_of(machine: SimulatedMachine, **knobs: bool) -> Iterator[CocoGpus]:
    with serve(Components(machine.attester(), machine.gpu_system(), **knobs)) as url:  # type: ignore[arg-type]
        yield CocoGpus(ApiServer(url), machine.gpu_system())


@pytest.mark.parametrize("names_gpus", [True, False])
def test_gpu_evidence_is_what_nvml_would_have_given(two_gpus: SimulatedMachine, names_gpus: bool) -> None:
    with gpus_of(two_gpus, names_gpus=names_gpus) as gpus:
        found = gpus.collect(NONCE)
        assert gpus.inspect() == two_gpus.gpu_system().inspect()
        gpus.check_faults()
    own = two_gpus.gpu_system().collect(NONCE)
    assert [(gpu.arch, gpu.uuid, gpu.certificate_chain) for gpu in found] == [
        (gpu.arch, gpu.uuid, gpu.certificate_chain) for gpu in own
    ]


def test_the_ready_state_is_set_through_nvml(two_gpus: SimulatedMachine) -> None:
    with gpus_of(two_gpus) as gpus:
        gpus.set_ready()
        assert gpus.inspect().ready


def test_a_gpu_that_gives_no_evidence_is_never_a_shorter_list(two_gpus: SimulatedMachine) -> None:
    two_gpus.gpu.fail_calls = {"nvmlDeviceGetConfComputeGpuAttestationReport": 999}
    two_gpus.save()
    with gpus_of(two_gpus) as gpus, pytest.raises(GpuCountError) as caught:
        gpus.collect(NONCE)
    assert (caught.value.expected, caught.value.got) == (2, 0)


@pytest.fixture
def ppcie(silicon: Path, tmp_path: Path) -> SimulatedMachine:
    return SimulatedMachine.create(tmp_path / "machine", gpus=8, switches=4, silicon=silicon)


def all_of(machine: SimulatedMachine) -> GpuSystem:
    return GpusAndSwitches(machine.gpu_system(), machine.switch_system())


@pytest.mark.parametrize("names_gpus", [True, False])
def test_switches_come_after_the_gpus(ppcie: SimulatedMachine, names_gpus: bool) -> None:
    components = Components.of(ppcie, Tee.SNP)
    components.names_gpus = names_gpus
    with serve(components) as url:
        found = CocoGpus(ApiServer(url), all_of(ppcie)).collect(NONCE)
    own = all_of(ppcie).collect(NONCE)
    assert [(device.arch, device.uuid) for device in found] == [(device.arch, device.uuid) for device in own]
    assert len(found) == 12


def test_a_switch_that_gives_no_evidence_is_never_a_shorter_list(ppcie: SimulatedMachine) -> None:
    with serve(Components(ppcie.attester(), ppcie.gpu_system())) as url, pytest.raises(GpuCountError) as caught:
        CocoGpus(ApiServer(url), all_of(ppcie)).collect(NONCE)
    assert (caught.value.expected, caught.value.got, caught.value.device) == (4, 0, CountedDevice.NVSWITCH)


def test_a_server_too_old_for_base64_is_told_by_its_gpu_nonce(two_gpus: SimulatedMachine) -> None:
    with gpus_of(two_gpus, knows_base64=False) as gpus, pytest.raises(GuestApiError) as caught:
        gpus.collect(NONCE)
    assert caught.value.problem is GuestApiProblem.ENCODING


def gpu_text(machine: SimulatedMachine, nonce: GpuNonce = NONCE) -> dict[str, object]:
    with serve(Components(None, machine.gpu_system())) as url:
        text = ApiServer(url).additional_evidence(nonce)
    assert text is not None
    return text


def collect_from(machine: SimulatedMachine, text: object) -> None:
    with answers(say(text)) as url:
        CocoGpus(ApiServer(url), machine.gpu_system()).collect(NONCE)


def test_a_gpu_report_over_another_nonce_is_refused(two_gpus: SimulatedMachine) -> None:
    with pytest.raises(EvidenceBindingError):
        collect_from(two_gpus, gpu_text(two_gpus, GpuNonce(bytes(32))))


def test_a_gpu_report_that_its_key_did_not_sign_is_refused(two_gpus: SimulatedMachine) -> None:
    text = json.loads(json.dumps(gpu_text(two_gpus)))
    first, second = text["nvidia"]["device_evidence_list"]
    first["certificate"], second["certificate"] = second["certificate"], first["certificate"]
    with pytest.raises(EvidenceVerificationError):
        collect_from(two_gpus, text)


@pytest.mark.parametrize(
    "text", [b"", {}, {"sampledevice": {"svn": "2"}}, {"nvidia": {}}, {"nvidia": {"device_evidence_list": []}}]
)
def test_no_gpu_evidence_is_none_of_the_gpus(two_gpus: SimulatedMachine, text: object) -> None:
    with pytest.raises(GpuCountError):
        collect_from(two_gpus, text)


ENTRY: dict[str, object] = {"arch": "HOPPER", "uuid": "GPU-1", "evidence": "AA==", "certificate": "AA=="}


VALUES: tuple[object, ...] = (1, None, [])
WRONG = [(name, value) for name in ENTRY for value in VALUES] + [("evidence", "*"), ("certificate", "AA")]
BAD_GPU_EVIDENCE: list[object] = [
    [],
    b"canary-peer-text",
    {"nvidia": []},
    {"nvidia": {"device_evidence_list": {}}},
    {"nvidia": {"device_evidence_list": [1, 2]}},
    {"nvidia": {"device_evidence_list": [{"arch": "HOPPER"}] * 2}},
    {"nvidia": {"device_evidence_list": [ENTRY] * 2}},
    {"nvidia": {"device_evidence_list": [ENTRY | {"evidence": "A" * 4 * 4096}] * 2}},
    *({"nvidia": {"device_evidence_list": [ENTRY | {name: value}] * 2}} for name, value in WRONG),
]


@pytest.mark.parametrize("text", BAD_GPU_EVIDENCE)
def test_malformed_gpu_evidence_is_one_typed_error(two_gpus: SimulatedMachine, text: object) -> None:
    with pytest.raises((MalformedEvidenceError, GuestApiError)) as caught:
        collect_from(two_gpus, text)
    assert "canary" not in str(caught.value)
