"""The devices of this guest, and the composite Evidence they give: GPUs first, the CPU last and over everything.

Owns the order of collection, and the check that the configuration which decides here is the one this guest was launched
with. Device calls run in the calling thread; the caller never abandons them (`worker.in_thread`).
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace

from agent.errors import ConfigNotMeasuredError, CountedDevice, GpuCountError
from agent.evidence import (
    Attester,
    CompositeEvidence,
    Evidence,
    GpuEvidence,
    GpuInventory,
    GpuSystem,
    ReportData,
    RuntimeData,
)
from agent.evidence.binding import KeyturnClaims, additional_evidence, device_nonce, report_data, split
from agent.evidence.gate import ExpectedReady, SecuredDevices, check_inventory, secure
from agent.evidence.runtime import MeasuredRelease, Runtime, release_event
from agent.guest.initdata import fit
from agent.handshake import KeptKey, SealedKey, Verdict
from agent.verify.nvidia import parse_chain

_ONLY_CHECK_MEASURED = object()


@dataclass(frozen=True, slots=True)
class Devices:
    """Open devices whose GPUs passed the rules that hold before attestation. Only `open_devices` makes one.

    Attributes:
        runtime: what this guest measures while it runs, and its event log.
        inventory: the GPUs as they were before attestation; None without GPUs.
        expected_ready: their ready state, and whose work it is.
    """

    attester: Attester
    runtime: Runtime
    gpus: GpuSystem | None
    inventory: GpuInventory | None
    expected_ready: ExpectedReady
    manifest_digest: str | None
    server_command_digest: str

    def to_load(self, manifest_digest: str) -> "Devices":
        """The same devices; their evidence says that this is what will be loaded."""
        return replace(self, manifest_digest=manifest_digest)

    @property
    def _manifest_digest(self) -> str:
        if self.manifest_digest is None:
            raise RuntimeError("evidence is about a model: it is identified first")
        return self.manifest_digest

    def collect(self, data: RuntimeData) -> CompositeEvidence:
        """Fresh Evidence over `data`. Blocking: seconds for GPUs, up to 65 s for a throttled SNP device, two minutes for a
        TDX host that fails and is asked again.

        Raises:
            DeviceError, MalformedEvidenceError, EvidenceBindingError, EvidenceVerificationError: a device misbehaved.
            GpuCountError: a GPU or NVSwitch gave no evidence, or two sign with one key.
        """
        # 1. Every GPU and NVSwitch, over the broker's nonce and our public key.
        text = ""
        if self.gpus and self.inventory:
            evidence = self.gpus.collect(device_nonce(data))
            gpus, switches = split(evidence)
            # refusal: test_a_missing_gpu_is_never_a_shorter_list
            if len(gpus) != len(self.inventory.gpus):
                raise GpuCountError(len(self.inventory.gpus), len(gpus))
            # refusal: test_a_missing_switch_is_never_a_shorter_list
            if len(switches) != len(self.inventory.switches):
                raise GpuCountError(len(self.inventory.switches), len(switches), CountedDevice.NVSWITCH)
            # refusal: test_no_evidence_is_made_of_one_gpu_that_answers_for_two
            check_distinct(gpus)
            # refusal: test_no_evidence_is_made_of_one_switch_that_answers_for_two
            check_distinct(switches, CountedDevice.NVSWITCH)
            modes = self.inventory.modes
            claims = KeyturnClaims(
                cc_feature=modes.cc_feature,
                environment=modes.environment,
                devtools=modes.devtools,
                multi_gpu_mode=modes.multi_gpu_mode,
                ready=self.inventory.ready,
                renewal=self.expected_ready is ExpectedReady.OURS,
                driver_version=self.inventory.driver_version,
                manifest_digest=self._manifest_digest,
                server_command_digest=self.server_command_digest,
            )
            text = additional_evidence(evidence, claims)

        # 2. The event log. Nothing covers it: it is believed when it replays to the registers that step 3 signs.
        event_log = self.runtime.event_log()

        # 3. The CPU, over the same as the GPUs and over the text of step 1.
        primary = self.attester.collect(report_data(data, text))
        return CompositeEvidence(replace(primary, event_log=event_log or primary.event_log), text)

    def measure(
        self,
        verdict: Verdict,
        sealed: SealedKey | KeptKey,
        evidence: CompositeEvidence | None,
        statement_digest: bytes,
    ) -> MeasuredRelease:
        """Measure that this key was released: see `runtime.release_event` and `Runtime.measure`.

        Args:
            verdict: accepted.
            sealed: the key, which nobody has opened yet.
            evidence: what the Verdict is about; None where the guest's own components gave it.
            statement_digest: of the receipt's statement, 48 bytes.
        """
        digests = self._manifest_digest, self.server_command_digest, statement_digest
        return self.runtime.measure(release_event(verdict, sealed, evidence, *digests))

    def vouch(self, data: ReportData) -> Evidence:
        """Fresh CPU Evidence for a receipt, over `data` (64 bytes), with the event log as it is now. Blocking, as `collect`.

        Raises:
            AgentError: as `collect`.
        """
        event_log = self.runtime.event_log()
        primary = self.attester.collect(data)
        return replace(primary, event_log=event_log or primary.event_log)

    def secure(self, verdict: Verdict, measured: MeasuredRelease) -> SecuredDevices:
        """The GPU gate, once, after the Verdict and after the release of the key was measured: see `gate.secure`."""
        # refusal: test_the_gate_comes_after_the_measurement
        if not isinstance(measured, MeasuredRelease):
            raise RuntimeError("the measurement comes before the gate")
        return secure(verdict, self.gpus, self.inventory, self.expected_ready)


@dataclass(frozen=True, slots=True)
class MeasuredGuest:
    """Proof that the configuration is the one this guest was launched with; only `check_measured` makes one."""

    attester: Attester
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _ONLY_CHECK_MEASURED:
            raise RuntimeError("only check_measured() makes a MeasuredGuest")


def check_measured(attester: Attester, config_digest: bytes) -> MeasuredGuest:
    """Ask the TEE what this guest was launched with: HOST_DATA of SNP, MRCONFIGID of TDX.

    Before, nothing the configuration says is acted upon but the opening of a connection.

    Args:
        attester: the CPU TEE.
        config_digest: over the measured configuration, or over the initdata document that came with it, 32, 48 or 64 bytes;
            the field must equal it, cut or zero-padded. Empty when the launch measurement covers the configuration and there
            is no initdata: the field must be zero.

    Raises:
        ConfigNotMeasuredError: the field is not the digest of our configuration, or stands for initdata we do not have.
        DeviceError, MalformedEvidenceError, EvidenceBindingError: the device misbehaved.
    """
    launched_with = attester.launch_digest()
    # refusal: test_a_longer_digest_is_compared_as_the_field_of_the_tee_holds_it
    if launched_with != fit(config_digest, len(launched_with)):
        raise ConfigNotMeasuredError
    return MeasuredGuest(attester, made_by=_ONLY_CHECK_MEASURED)


def open_devices(
    guest: MeasuredGuest,
    gpus: GpuSystem | None,
    runtime: Runtime,
    *,
    gpu_count: int,
    switch_count: int = 0,
    architecture: str | None = None,
    expected_ready: ExpectedReady,
    manifest_digest: str | None,
    server_command_digest: str,
) -> Devices:
    """Check what must hold of the GPUs before attestation.

    Args:
        guest: whose configuration may decide.
        gpus: None exactly when `gpu_count` is 0.
        runtime: of this guest.
        gpu_count: configured number of GPUs.
        switch_count: configured number of NVSwitches.
        architecture: configured one of every GPU; None for any.
        expected_ready: the ready state of the GPUs, and whose work it is.
        manifest_digest: what the evidence says will be loaded; None: `to_load` comes later.
        server_command_digest: what the evidence says will be run.

    Raises:
        DeviceError: a device misbehaved.
        GpuCountError, GpuModeError, GpuFaultError, VmRestartRequiredError: as `gate.check_inventory`.
    """
    inventory = None
    if gpus:
        inventory = gpus.inspect()
        # refusal: test_ready_before_the_boot_is_found_when_devices_are_opened
        check_inventory(inventory, gpu_count, expected_ready, architecture, switches=switch_count)
        # refusal: test_a_fault_before_the_boot_is_found_when_devices_are_opened
        gpus.check_faults()
    return Devices(guest.attester, runtime, gpus, inventory, expected_ready, manifest_digest, server_command_digest)


def check_distinct(evidence: Sequence[GpuEvidence], device: CountedDevice = CountedDevice.GPU) -> None:
    """Every device signs with its own key: one cannot stand for two.

    Args:
        evidence: of devices of one kind.
        device: which.

    Raises:
        GpuCountError: two chains have the same leaf key.
        MalformedEvidenceError: a chain does not parse.
    """
    keys = {parse_chain(each.certificate_chain).leaf_key_sha256 for each in evidence}
    # refusal: test_one_gpu_answering_for_two_is_refused
    if len(keys) != len(evidence):
        raise GpuCountError(len(evidence), len(keys), device)
