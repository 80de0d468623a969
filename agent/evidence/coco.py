"""Evidence of a guest whose TEE is not ours to open: what CoCo's attestation-agent gives, through api-server-rest.

`CocoAttester` is the CPU's, `CocoGpus` that of the GPUs. Both give what an interface of our own would: the bytes that the
device signed, over our data, or an error. Owns what must hold of the agent's answers; requests, bounds and failures are
`guest/api_server.py`'s, the JSON is `trustee_json.py`'s. The attestation-agent is part of the guest's measured image, as the
kernel is, and is trusted as much.

It takes at most 64 bytes, pads what is shorter with zeros, and puts them into the report as they are. We send the 48 that our
report data has before its own zeros (SHA-384). Their base64url text has exactly 64 characters, so a server that is too old
to know `encoding=base64` makes a report over that text, and is told by it; with more it would fail as anything else fails.
"""

from agent.closed import Ident
from agent.errors import (
    Absence,
    CountedDevice,
    DeviceError,
    EvidenceBindingError,
    EvidenceFormat,
    GpuCountError,
    GuestApiError,
    GuestApiProblem,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import (
    NO_REPORT_DATA,
    REPORT_DATA_BYTES,
    Evidence,
    GpuEvidence,
    GpuInventory,
    GpuNonce,
    GpuSystem,
    ReportData,
    Tee,
)
from agent.evidence.binding import split
from agent.evidence.gpu_abi import parse_report as parse_gpu_report
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_abi import parse_quote, quote_report_data
from agent.evidence.trustee_json import parse_evidence
from agent.guest.api_server import ApiServer
from agent.jose import pack_b64url, parse_b64, string
from agent.verify.nvidia import parse_chain, verify_report_signature

RUNTIME_DATA_BYTES = 48

_API = Ident("api-server-rest")
_COCO = Ident("coco")
_FORMATS = {Tee.SNP: EvidenceFormat.SNP_REPORT, Tee.TDX: EvidenceFormat.TDX_QUOTE, Tee.SAMPLE: EvidenceFormat.SAMPLE}
_UNNAMED = "unknown"


class CocoAttester:
    """The `Attester` of a container in a CoCo guest.

    Attributes:
        tee: what the attestation-agent says this guest is.
    """

    interface = _API

    def __init__(self, api: ApiServer, *, needs_resources: bool, sample_digest: bytes | None = None) -> None:
        """Ask the server what it is and what it serves.

        Args:
            api: of this guest.
            needs_resources: the model key is to come from it as well.
            sample_digest: what stands for HOST_DATA where the guest gives sample evidence, which has no such field; None, as
                on any real guest: then sample evidence is refused.

        Raises:
            NoAttesterError: it has not started yet, or its TEE is none that we know.
            GuestApiError: it does not serve what is needed, or misbehaved.
        """
        try:
            info = api.info()
        except GuestApiError as error:
            if error.problem is GuestApiProblem.REFUSED:
                raise NoAttesterError(_COCO, Absence.NO_GUEST_API) from None
            raise
        # refusal: test_a_server_without_a_needed_feature_is_told_by_what_it_says
        if info.lacks("attestation") or (needs_resources and info.lacks("resource")):
            raise GuestApiError(Ident("info"), GuestApiProblem.FEATURES)
        self.tee = _tee_of(info.tee, sample_allowed=sample_digest is not None)
        self._api = api
        self._sample_digest = sample_digest

    def collect(self, report_data: ReportData) -> Evidence:
        """See `Attester.collect`. Report data made with SHA-512 goes whole, and no old server is told apart by it.

        Raises:
            GuestApiError: the server misbehaved, or is too old.
            DeviceError: the attestation-agent got no evidence. Asked once: it says neither why, nor whether it may be again.
            MalformedEvidenceError, EvidenceBindingError: see `Attester.collect`.
        """
        assert len(report_data) == REPORT_DATA_BYTES
        data = report_data if any(report_data[RUNTIME_DATA_BYTES:]) else report_data[:RUNTIME_DATA_BYTES]
        try:
            text = self._api.evidence(data)
        except GuestApiError as error:
            raise _of_device(error) from None
        evidence = parse_evidence(self.tee, text)
        signed = _report_data_of(evidence)
        padded = data if self.tee is Tee.SAMPLE else report_data
        # refusal: test_a_server_too_old_for_base64_is_told_by_its_report_data
        if signed == pack_b64url(data).encode():
            raise GuestApiError(Ident("evidence"), GuestApiProblem.ENCODING)
        # refusal: test_evidence_over_other_data_is_refused
        if signed != padded:
            raise EvidenceBindingError(_FORMATS[self.tee])
        return evidence

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""
        evidence = self.collect(NO_REPORT_DATA)
        match self.tee:
            case Tee.SNP:
                return parse_report(evidence.report).host_data
            case Tee.TDX:
                return parse_quote(evidence.report).body.mr_config_id
            case Tee.SAMPLE:
                assert self._sample_digest is not None
                return self._sample_digest


class CocoGpus:
    """The `GpuSystem` of such a container: Evidence comes from the attestation-agent, everything else from NVML.

    A container that has the GPUs has NVML too, because Kata's device interface brings both; one that has neither, an init
    container without the GPU among its limits, can hold no gate: modes and ready state stand in no report. So it is no
    `GpuSystem`, and the boot ends where NVML is opened. The kernel log must be there as well, as `/dev/kmsg` of the guest.

    In a Kata guest the image's init has set the ready state before any of this (`gpu.ready_state = "preset"`). With "own" an
    attestation-agent before NVAT fails the gate: it sets the ready state itself when it is asked for evidence.
    """

    def __init__(self, api: ApiServer, nvml: GpuSystem) -> None:
        """`nvml` is the container's own view of the same GPUs, and of the NVSwitches where the configuration names any."""
        self._api = api
        self._nvml = nvml

    def inspect(self) -> GpuInventory:
        return self._nvml.inspect()

    def check_faults(self) -> None:
        self._nvml.check_faults()

    def set_ready(self) -> None:
        self._nvml.set_ready()

    def collect(self, nonce: GpuNonce) -> tuple[GpuEvidence, ...]:
        """Fresh Evidence of every GPU over `nonce` (32 bytes), in the order of NVML, then of every NVSwitch in that of NSCQ.

        The attestation-agent reads both too. NVAT does not tell the UUIDs: a device without one has the name that it has here
        at its place. It proves nothing, and two names that were exchanged would change nothing either: every report is signed
        by a key of its own.

        Raises:
            GuestApiError: the server misbehaved, or is too old.
            DeviceError: the attestation-agent got no evidence.
            GpuCountError: of more or fewer devices than are seen here; an agent that got none from a device leaves it out.
            MalformedEvidenceError: text, report or chain does not parse.
            EvidenceBindingError: a report carries another nonce.
            EvidenceVerificationError: a report is not signed by the key whose certificate came with it.
        """
        inventory = self._nvml.inspect()
        try:
            members = self._api.additional_evidence(nonce)
        except GuestApiError as error:
            raise _of_device(error) from None
        gpus, switches = split(_parse_devices(members))
        # refusal: test_a_gpu_that_gives_no_evidence_is_never_a_shorter_list
        if len(gpus) != len(inventory.gpus):
            raise GpuCountError(len(inventory.gpus), len(gpus))
        # refusal: test_a_switch_that_gives_no_evidence_is_never_a_shorter_list
        if len(switches) != len(inventory.switches):
            raise GpuCountError(len(inventory.switches), len(switches), CountedDevice.NVSWITCH)
        uuids = [gpu.uuid for gpu in inventory.gpus] + [switch.uuid for switch in inventory.switches]
        named = tuple(_named(evidence, uuid) for evidence, uuid in zip((*gpus, *switches), uuids, strict=True))
        for evidence in named:
            _check(evidence, nonce)
        return named


def _tee_of(name: str | None, *, sample_allowed: bool) -> Tee:
    if name == Tee.SAMPLE.value:
        # refusal: test_sample_evidence_is_a_simulation
        if not sample_allowed:
            raise NoAttesterError(_COCO, Absence.SAMPLE)
        return Tee.SAMPLE
    # refusal: test_a_guest_of_another_tee_has_no_attester_here
    if name in ("az-snp-vtpm", "az-tdx-vtpm"):
        raise NoAttesterError(_COCO, Absence.PARAVISOR)
    try:
        return Tee(name)
    except ValueError:
        raise NoAttesterError(_COCO, Absence.OTHER_TEE) from None


def _of_device(error: GuestApiError) -> GuestApiError | DeviceError:
    """What failed behind the server was a device; that is the host's."""
    return DeviceError(_API, error.call, error.status) if error.problem is GuestApiProblem.FAILED else error


def _report_data_of(evidence: Evidence) -> bytes:
    match evidence.tee:
        case Tee.SNP:
            return parse_report(evidence.report).report_data
        case Tee.TDX:
            return quote_report_data(evidence.report)
        case Tee.SAMPLE:
            return evidence.report


def _parse_devices(members: dict[str, object] | None) -> list[GpuEvidence]:
    """What the map has for NVIDIA; other kinds of devices are somebody else's."""
    nvidia = {} if members is None else members.get("nvidia", {})
    entries = nvidia.get("device_evidence_list") if isinstance(nvidia, dict) else None
    if members is None or nvidia == {}:
        return []
    try:
        # refusal: test_malformed_gpu_evidence_is_one_typed_error
        if not isinstance(entries, list):
            raise ValueError
        return [_parse_device(entry) for entry in entries]
    except ValueError:
        raise MalformedEvidenceError(EvidenceFormat.ADDITIONAL, Ident("device_evidence_list")) from None


def _parse_device(entry: object) -> GpuEvidence:
    # refusal: test_malformed_gpu_evidence_is_one_typed_error
    if not isinstance(entry, dict):
        raise ValueError
    uuid = string(entry, "uuid") if "uuid" in entry else _UNNAMED
    report, chain = parse_b64(string(entry, "evidence")), parse_b64(string(entry, "certificate"))
    return GpuEvidence(string(entry, "arch").upper(), uuid, report, chain)


def _named(evidence: GpuEvidence, uuid: str) -> GpuEvidence:
    if evidence.uuid != _UNNAMED:
        return evidence
    return GpuEvidence(evidence.arch, uuid, evidence.report, evidence.certificate_chain)


def _check(evidence: GpuEvidence, nonce: GpuNonce) -> None:
    """As `gpu.py` does it: it parses, carries our nonce, and its leaf key signed it."""
    report = parse_gpu_report(evidence.report)
    text = pack_b64url(nonce).encode()[: len(nonce)]
    # refusal: test_a_server_too_old_for_base64_is_told_by_its_gpu_nonce
    if report.requester_nonce == text:
        raise GuestApiError(Ident("additional-evidence"), GuestApiProblem.ENCODING)
    # refusal: test_a_gpu_report_over_another_nonce_is_refused
    if report.requester_nonce != nonce:
        raise EvidenceBindingError(EvidenceFormat.NVIDIA_REPORT)
    # refusal: test_a_gpu_report_that_its_key_did_not_sign_is_refused
    verify_report_signature(report, parse_chain(evidence.certificate_chain))
