"""Faults of the CPU's evidence, of the GPUs, their modes and their latch."""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.errors import (
    AgentError,
    AttestationKeyLostError,
    CountedDevice,
    DeviceError,
    DeviceUnavailableError,
    EvidenceBindingError,
    EvidenceCheck,
    EvidenceFormat,
    EvidenceVerificationError,
    GpuCountError,
    GpuFault,
    GpuFaultError,
    GpuMode,
    GpuModeError,
    GuestUnfitError,
    KeyReleaseDeniedError,
    MalformedEvidenceError,
    Unfit,
    VmRestartRequiredError,
    WorkerLostError,
)
from agent.evidence import ReportData, Tee
from agent.evidence.cpu import TDX_PATIENCE
from agent.evidence.sev_guest import SevGuest
from agent.evidence.snp_abi import parse_report
from agent.evidence.tdx_guest import TdxGuest
from agent.fitness import Places, check_gpu_driver, check_kernel
from agent.gpu_watch import MAX_REPLACED
from agent.sim.gpu_silicon import create_gpu_silicon
from agent.sim.nvml import KERNEL_LOG
from agent.sim.snp import CRL_FILE, make_crl
from tests.fake_nodes import FakeSevGuest, FakeTdxGuest
from tests.fake_nodes import Fault as DriverFault
from tests.faults.table import SERVED, Attempts, Audit, Fault, FaultWorld
from tests.faults.watch import descendants
from tests.world import Agent, Outcome

NEVER, ONCE = Attempts.NEVER, Attempts.ONCE


def _gpu(**knobs: object) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        for name, value in knobs.items():
            assert hasattr(world.machine.gpu, name)
            setattr(world.machine.gpu, name, value)

    return arrange


def _cpu(**knobs: object) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        for name, value in knobs.items():
            assert hasattr(world.machine, name)
            setattr(world.machine, name, value)

    return arrange


def _row(part: str, **values: object) -> Callable[[FaultWorld], None]:
    """Another policy at the broker than this guest fulfils."""

    def arrange(world: FaultWorld) -> None:
        table = {"row": world.row, "snp": world.row_snp, "gpu": world.row_gpu}[part]
        table.update(values)

    return arrange


def _denied(name: str, arrange: Callable[[FaultWorld], object], claim: str) -> Fault:
    audit: list[Audit] = [("attest", "denied", claim)]
    return Fault(name, KeyReleaseDeniedError, arrange, {"claim": claim}, audit, ONCE)


def no_row(world: FaultWorld) -> None:
    world.row = {}


def amd_lists(*lists: bytes) -> Callable[[FaultWorld], None]:
    """The broker has these revocation lists of AMD's."""

    def arrange(world: FaultWorld) -> None:
        folder = world.folder / "amd"
        folder.mkdir()
        for number, data in enumerate(lists):
            (folder / f"{number}.crl").write_bytes(data)
        world.broker_flags += ["--amd-crls", str(folder)]

    return arrange


def forged_amd_list(world: FaultWorld) -> None:
    genuine = x509.load_der_x509_crl((world.machine.silicon / CRL_FILE).read_bytes())
    amd_lists(make_crl(genuine.issuer, rsa.generate_private_key(65537, 2048), []))(world)


def one_gpu_twice(world: FaultWorld) -> None:
    world.machine.gpu.count = world.gpu["count"] = world.row_gpu["count"] = 2
    world.machine.gpu.repeat_first_gpu = True


def _switched(name: str, arrange: Callable[[FaultWorld], None], claim: str) -> Fault:
    """A denial of a machine with NVSwitches."""
    return replace(_denied(name, arrange, claim), gpus=8, switches=4)


def not_in_protected_pcie(world: FaultWorld) -> None:
    """Eight GPUs in single-GPU mode, in a guest that is configured for them; the row still wants protected PCIe."""
    world.machine.gpu.switches = world.gpu["switches"] = 0
    world.machine.gpu.multi_gpu_mode, world.machine.gpu.cc_feature = 0, 1


def registry_key(world: FaultWorld) -> None:
    text = 'RegistryDwords: "RmConfidentialCompute=0x1"\n'
    (world.machine.directory / "nvidia-params").write_text(text)


def architecture_is_blackwell(world: FaultWorld) -> None:
    world.gpu["architecture"] = "blackwell"


def ready_is_preset(world: FaultWorld) -> None:
    world.gpu["ready_state"] = "preset"


def _nvml(call: str, code: int = 999, *, name: str, attempts: Attempts = NEVER, audit: list[Audit] | None = None) -> Fault:
    fields = {"call": call, "code": code}
    return Fault(name, DeviceError, _gpu(fail_calls={call: code}), fields, audit if attempts is not NEVER else [], attempts)


XID = "4,812,5123456,-;NVRM: Xid (PCI:0000:06:00): {}, pid='<unknown>', name=<unknown>, a description\n"


def _logged(text: str) -> Callable[[FaultWorld], None]:
    """It stands in the guest's kernel log before the agent starts."""

    def arrange(world: FaultWorld) -> None:
        (world.machine.directory / KERNEL_LOG).write_text(text)

    return arrange


def _fatal_xid(xid: int, what: str) -> Fault:
    fields = {"fault": GpuFault.FATAL_XID, "code": xid}
    return Fault(f"XID {xid} before the boot: {what}", GpuFaultError, _logged(XID.format(xid)), fields, [], NEVER)


def _driver_refuses(name: str, text: str, code: int) -> Fault:
    """The driver gives up on the GPU and says why in the kernel log; NVML then has nothing to open."""

    def arrange(world: FaultWorld) -> None:
        _logged(f"3,1,1,-;NVRM: {text}\n")(world)
        world.machine.gpu.fail_calls = {"nvmlInitWithFlags": code}

    return Fault(name, DeviceError, arrange, {"call": "nvmlInit", "code": code}, [], NEVER)


def _served(name: str, happens: Callable[[FaultWorld], object], error: type[AgentError], **fields: object) -> Fault:
    def during(world: FaultWorld, agent: Agent) -> Outcome:
        agent.wait_for("server_ready")
        happens(world)
        return agent.wait()

    return Fault(name, error, fields=fields, audit=SERVED, attempts=ONCE, during=during, while_serving=True)


def xid_79(world: FaultWorld) -> None:
    with (world.machine.directory / KERNEL_LOG).open("a") as log:
        log.write(XID.format(79))


def cc_fatal(world: FaultWorld) -> None:
    with (world.machine.directory / KERNEL_LOG).open("a") as log:
        log.write("3,9,9,-;NVRM: ConfCompute: Fatal error hit!\n")


def ready_falls_back(world: FaultWorld) -> None:
    world.machine.reread()
    world.machine.gpu.ready = 0
    world.machine.save()


def gpu_is_lost(world: FaultWorld) -> None:
    world.machine.reread()
    world.machine.gpu.fail_calls = {"nvmlSystemGetConfComputeGpusReadyState": 15}
    world.machine.save()


def watch_killed_for_good(world: FaultWorld, agent: Agent) -> Outcome:
    """Whatever kills it does so again and again: every watch is told and replaced, and then the guest stops."""
    agent.wait_for("server_ready")
    killed = 0
    while agent.process.poll() is None and killed <= MAX_REPLACED:
        for child in descendants(agent.process.pid):
            with suppress(OSError):
                if os.getsid(child) == os.getsid(agent.process.pid):  # the server has a session of its own
                    os.kill(child, signal.SIGKILL)
                    killed += 1
                    while Path(f"/proc/{child}").exists():
                        time.sleep(0.01)
    outcome = agent.wait()
    assert outcome.names().count("gpu_watch_lost") == MAX_REPLACED
    return outcome


def another_maker(world: FaultWorld) -> None:
    """A GPU whose keys lead to a root that only calls itself NVIDIA's."""
    silicon = world.folder / "machine" / "silicon"
    shutil.copytree(world.silicon, silicon)
    create_gpu_silicon(silicon, 1)
    world.machine.silicon = silicon


def started_again(world: FaultWorld, agent: Agent) -> Outcome:
    """The agent serves, is stopped, and is started again in the same machine."""
    agent.wait_for("server_ready")
    assert agent.stop().status == 0
    again = world.start_agent(world.folder / "keyturn.toml")
    return again.wait()


def short_report(world: FaultWorld) -> object:
    return parse_report(world.machine.attester().collect(ReportData(bytes(64))).report[:-1])


def sev_guest_without_its_key(world: FaultWorld) -> object:
    """The firmware's answer was lost on the way: the driver has wiped the key, and every later request would fail."""
    firmware = world.machine.attester()
    fake = FakeSevGuest(lambda data, _: firmware.collect(ReportData(data)).report, faults=[DriverFault(errno.EIO)])
    device = SevGuest(Path(os.devnull), Path("/nonexistent"), fake.ioctl, lambda: 0.0, lambda _: True)
    return device.collect(ReportData(bytes(64)))


def closed_gpu_driver(world: FaultWorld) -> object:
    version = world.folder / "nvidia-version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  590.12  Thu Jun  1 21:37:53 UTC 2023\n")
    return check_gpu_driver(Places(gpu_driver=version))


def tdx_module_that_stays_busy(world: FaultWorld) -> object:
    fake = FakeTdxGuest()
    fake.errors = [errno.EBUSY] * 99
    conf = world.folder / "tdx-attest.conf"
    conf.write_text("port = 4050\n")
    patience = replace(TDX_PATIENCE, pause=lambda _: True)
    return TdxGuest(Path(os.devnull), conf, fake.ioctl, patience=patience).collect(ReportData(bytes(64)))


ROWS = [
    # --- the CPU ------------------------------------------------------------------------------------------------------
    Fault(
        "foreign nonce in the CPU report",
        EvidenceBindingError,
        _cpu(wrong_report_data=True),
        {"format": EvidenceFormat.SNP_REPORT},
        audit=[],
        attempts=NEVER,
    ),
    Fault("device that fails with EIO", DeviceError, _cpu(errno=5), {"code": 5}, [], NEVER),
    Fault("device that says EBUSY", DeviceError, _cpu(errno=16), {"code": 16}, [], NEVER),
    Fault("device that is gone", DeviceError, _cpu(errno=6), {"code": 6}, [], NEVER),
    _denied("CPU report with a wrong signature", _cpu(flip_signature_bit=True), "snp.report-signature"),
    _denied("chip id that is not the certificate's", _cpu(chip_id=b"\x11" * 64), "snp.certificate-chip-id"),
    _denied("debug policy", _cpu(policy=0x30000 | 1 << 19), "snp.policy.debug"),
    _denied("evidence asked for from another VMPL", _cpu(vmpl=2), "snp.vmpl"),
    _denied("wrong measurement", _row("snp", measurements=[{"id": "image-0", "value": "11" * 48}]), "snp.measurement"),
    _denied("wrong HOST_DATA", _row("snp", host_data=[{"id": "config-0", "value": "22" * 32}]), "snp.host_data"),
    _denied(
        "TCB below the minimum",
        _row(
            "snp",
            minimum_tcb=[{"id": "tcb-2", "product": "Genoa", "bootloader": 200, "tee": 0, "snp": 0, "microcode": 0}],
        ),
        "snp.tcb.bootloader",
    ),
    _denied("broker without the revocation list of this processor's root", amd_lists(), "snp.revocation-list"),
    _denied("revocation list that the root did not sign", forged_amd_list, "snp.revocation-list-signature"),
    _denied("revocation list that is none", amd_lists(b"junk"), "snp.malformed.revocation_list"),
    _denied("key URI without a row", no_row, "policy.row"),
    _denied("revoked row", _row("row", revoked=True), "policy.revoked"),
    Fault("SNP key that is wiped", AttestationKeyLostError, fields={"code": errno.EIO}, drive=sev_guest_without_its_key),
    Fault(
        "TDX module that stays busy",
        DeviceUnavailableError,
        fields={"code": errno.EBUSY},
        drive=tdx_module_that_stays_busy,
        may_stay=frozenset({"tdx-attest.conf"}),
    ),
    Fault("CPU report one byte short", MalformedEvidenceError, fields={"got": 1183, "expected": 1184}, drive=short_report),
    Fault(
        "kernel without any interface to the TEE, found by doctor",
        GuestUnfitError,
        fields={"problem": Unfit.KERNEL, "got": "5.15.0", "expected": "5.19"},
        drive=lambda _: check_kernel(Tee.SNP, Places(release=lambda: "5.15.0")),
    ),
    Fault(
        "NVIDIA driver of the closed modules, found by doctor",
        GuestUnfitError,
        fields={"problem": Unfit.GPU_DRIVER_CLOSED, "got": "590.12"},
        drive=closed_gpu_driver,
        may_stay=frozenset({"nvidia-version"}),
    ),
    # --- the GPUs -----------------------------------------------------------------------------------------------------
    Fault(
        "foreign nonce in the GPU report",
        EvidenceBindingError,
        _gpu(wrong_nonce=True),
        {"format": EvidenceFormat.NVIDIA_REPORT},
    ),
    Fault(
        "GPU report with a wrong signature",
        EvidenceVerificationError,
        _gpu(flip_signature_bit=True),
        {"format": EvidenceFormat.NVIDIA_REPORT, "check": EvidenceCheck.REPORT_SIGNATURE},
    ),
    Fault("missing GPU", GpuCountError, _gpu(count=0), {"got": 0, "expected": 1}, [], NEVER),
    Fault("extra GPU", GpuCountError, _gpu(count=2), {"got": 2, "expected": 1}, [], NEVER),
    Fault("one GPU sent twice", GpuCountError, one_gpu_twice, {"got": 1, "expected": 2}, gpus=2),
    _denied("policy that wants two GPUs", _row("gpu", count=2), "gpu.count"),
    _denied(
        "policy that wants another driver", _row("gpu", driver_versions=[{"id": "d", "value": "1.2.3"}]), "gpu.driver_version"
    ),
    _denied(
        "policy that wants another VBIOS", _row("gpu", vbios_versions=[{"id": "v", "value": "1.2.3"}]), "gpu.vbios_version"
    ),
    _denied("GPU of another maker", another_maker, "gpu.certificate-chain"),
    Fault("ready already 1", VmRestartRequiredError, _gpu(ready=1), audit=[], attempts=NEVER),
    Fault("ready preset and not set", GpuFaultError, ready_is_preset, {"fault": GpuFault.READY_NOT_SET}, [], NEVER),
    Fault("devtools mode", GpuModeError, _gpu(devtools=1), {"mode": GpuMode.DEVTOOLS, "got": 1}, [], NEVER),
    Fault("simulation environment of the GPU", GpuModeError, _gpu(environment=1), {"mode": GpuMode.ENVIRONMENT}, [], NEVER),
    Fault("confidential computing off", GpuModeError, _gpu(cc_feature=0), {"mode": GpuMode.CC_FEATURE}, [], NEVER),
    Fault("persistence mode off", GpuModeError, _gpu(persistent=False), {"mode": GpuMode.PERSISTENCE, "got": 0}, [], NEVER),
    Fault("registry key in the driver's parameters", GpuModeError, registry_key, {"mode": GpuMode.REGISTRY_KEYS}, [], NEVER),
    Fault("GPU of another architecture", GpuCountError, architecture_is_blackwell, {"got": 0, "expected": 1}, [], NEVER),
    Fault("unknown multi-GPU mode", GpuModeError, _gpu(multi_gpu_mode=9), {"mode": GpuMode.MULTI_GPU}, [], NEVER),
    Fault("GPU with a fatal error latched", DeviceError, _gpu(fatal_latched=True), {"code": 27}),
    Fault(
        "ready that does not stay",
        GpuFaultError,
        _gpu(ready_falls_back_after=0),
        {"fault": GpuFault.READY_NOT_SET},
        audit=SERVED,
        attempts=ONCE,
    ),
    Fault("agent that starts again", VmRestartRequiredError, audit=SERVED, attempts=NEVER, during=started_again),
    _driver_refuses(
        "confidential computing off in a confidential VM", "GPU confidential compute capability is not enabled.", 9
    ),
    _driver_refuses(
        "kernel without the driver's crypto", "libspdm_check_crypto_backend: Error - libspdm expects LKCA but found stubs!", 9
    ),
    _driver_refuses("session with the GPU that fails", "SPDM: Session establishment failed", 999),
    _driver_refuses("GPU that is initialised twice", "GPU0 RmInitAdapter failed! (0x22:0x56:894)", 9),
    # --- the NVSwitches -----------------------------------------------------------------------------------------------
    Fault(
        "missing NVSwitch",
        GpuCountError,
        _gpu(switches=3),
        {"got": 3, "expected": 4, "device": CountedDevice.NVSWITCH},
        [],
        NEVER,
        gpus=8,
        switches=4,
    ),
    Fault(
        "one NVSwitch sent twice",
        GpuCountError,
        _gpu(repeat_first_switch=True),
        {"got": 1, "expected": 4, "device": CountedDevice.NVSWITCH},
        gpus=8,
        switches=4,
    ),
    Fault(
        "NVSwitch that is not locked",
        GpuModeError,
        _gpu(switch_mode=1),
        {"mode": GpuMode.SWITCH, "got": 1, "expected": 3},
        [],
        NEVER,
        gpus=8,
        switches=4,
    ),
    Fault(
        "NVSwitches between GPUs that do not know of them",
        GpuModeError,
        _gpu(multi_gpu_mode=0, cc_feature=1),
        {"mode": GpuMode.MULTI_GPU, "got": 0, "expected": 1},
        [],
        NEVER,
        gpus=8,
        switches=4,
    ),
    Fault(
        "protected PCIe without configured NVSwitches",
        GpuModeError,
        _gpu(multi_gpu_mode=1, cc_feature=0),
        {"mode": GpuMode.MULTI_GPU, "got": 1, "expected": 0},
        [],
        NEVER,
    ),
    Fault(
        "NVSwitch report with a wrong signature",
        EvidenceVerificationError,
        _gpu(flip_switch_signature_bit=True),
        {"format": EvidenceFormat.SWITCH_REPORT, "check": EvidenceCheck.REPORT_SIGNATURE},
        gpus=8,
        switches=4,
    ),
    Fault(
        "foreign nonce in the NVSwitch report",
        EvidenceBindingError,
        _gpu(wrong_switch_nonce=True),
        {"format": EvidenceFormat.SWITCH_REPORT},
        gpus=8,
        switches=4,
    ),
    Fault(
        "NSCQ of another version than the driver",
        DeviceError,
        _gpu(fail_calls={"nscq_session_create": 1}),
        {"interface": "nscq", "call": "nscq_session_create", "code": 1},
        [],
        NEVER,
        gpus=8,
        switches=4,
    ),
    Fault(
        "NVSwitch without a report",
        DeviceError,
        _gpu(fail_calls={"config/attestation_report": -7}),
        {"interface": "nscq", "call": "config/attestation_report", "code": -7},
        gpus=8,
        switches=4,
    ),
    _switched("GPU linked to an NVSwitch of another set", _gpu(stray_switch=True), "ppcie.gpu-links"),
    _switched("NVSwitch that lists a GPU of another set", _gpu(stray_gpu=True), "ppcie.common-gpus"),
    _switched("policy that wants protected PCIe, GPUs in another mode", not_in_protected_pcie, "gpu.modes"),
    _switched(
        "policy that wants another NVSwitch VBIOS",
        _row("gpu", switch_vbios_versions=[{"id": "s", "value": "1.2.3"}]),
        "gpu.switch_vbios_version",
    ),
    _switched("policy without an NVSwitch VBIOS", _row("gpu", switch_vbios_versions=[]), "gpu.switch_vbios_version"),
    _nvml("nvmlDeviceGetUUID", 15, name="GPU that is lost before attestation"),
    _nvml("nvmlDeviceGetConfComputeGpuAttestationReport", 15, name="GPU that is lost in its report", attempts=Attempts.EITHER),
    _fatal_xid(48, "uncorrected memory error"),
    _fatal_xid(79, "off the bus"),
    _fatal_xid(94, "contained memory error"),
    _fatal_xid(95, "uncontained memory error"),
    _fatal_xid(151, "rotation of a key failed"),
    Fault(
        "confidential computing fault before the boot",
        GpuFaultError,
        _logged("3,9,9,-;NVRM: ConfCompute: Fatal error hit!\n"),
        {"fault": GpuFault.CC_FATAL},
        [],
        NEVER,
    ),
    _served("XID while serving", xid_79, GpuFaultError, fault=GpuFault.FATAL_XID, code=79),
    _served("confidential computing fault while serving", cc_fatal, GpuFaultError, fault=GpuFault.CC_FATAL),
    _served("ready that falls back while serving", ready_falls_back, GpuFaultError, fault=GpuFault.READY_LOST),
    _served("GPU that is lost while serving", gpu_is_lost, DeviceError, code=15),
    Fault(
        "watch over the GPUs that is killed again and again",
        WorkerLostError,
        fields={"signal": 9},
        audit=SERVED,
        attempts=ONCE,
        during=watch_killed_for_good,
        while_serving=True,
    ),
    _nvml("nvmlSystemGetDriverVersion", name="driver that does not tell its version"),
    _nvml("nvmlSystemGetConfComputeSettings", name="driver without confidential computing"),
    _nvml("nvmlDeviceGetConfComputeGpuCertificate", name="GPU without a certificate", attempts=Attempts.EITHER),
    _nvml("nvmlDeviceGetConfComputeGpuAttestationReport", name="GPU without a report", attempts=Attempts.EITHER),
    _nvml("nvmlSystemSetConfComputeGpusReadyState", name="ready state that is refused", attempts=ONCE, audit=SERVED),
]
