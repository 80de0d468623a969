"""The interface to the TEE that the configuration names, out of those this guest has, and why there is none.

The configuration says which TEE; no other one is ever taken in its place, and no simulator. Which interface is a matter of
kernel and image, so the first that is there is opened, in this order: configfs-tsm, the device node. Waits for nothing and
loads nothing: the caller looks again when the kernel says that something has changed.
What processor and host say of themselves is believed only where it makes us stop: proof is evidence that verified.
"""

import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.closed import Ident
from agent.errors import Absence, NoAttesterError
from agent.evidence import Attester, Tee
from agent.evidence.sev_guest import DEVICE as SEV_GUEST
from agent.evidence.sev_guest import VMPL_FILE, SevGuest
from agent.evidence.tdx_guest import ATTEST_CONF, TdxGuest
from agent.evidence.tdx_guest import DEVICE as TDX_GUEST
from agent.evidence.tsm import REPORT_ROOT, TsmSnp, TsmTdx

CPUID_DEVICE = Path("/dev/cpu/0/cpuid")
MAX_CPUINFO_BYTES = 64 << 10
"""The flags stand in the first processor's part."""
TPM_DEADLINE_S = 5.0


def read_cpuid(leaf: int, device: Path = CPUID_DEVICE) -> bytes:
    """EAX, EBX, ECX, EDX of a leaf; nothing where the kernel does not let us ask."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, 16, leaf)  # the offset is the leaf
        finally:
            os.close(descriptor)
    except OSError:
        return b""


@dataclass(frozen=True, slots=True)
class Places:
    """Where this guest's kernel has what is looked at; a test has its own."""

    report_root: Path = REPORT_ROOT
    sev_guest: Path = SEV_GUEST
    vmpl_file: Path = VMPL_FILE
    tdx_guest: Path = TDX_GUEST
    attest_conf: Path = ATTEST_CONF
    cpuinfo: Path = Path("/proc/cpuinfo")
    cpuid: Callable[[int], bytes] = read_cpuid
    system_vendor: Path = Path("/sys/class/dmi/id/sys_vendor")
    tpm: Path = Path("/dev/tpmrm0")


def open_interface(tee: Tee, places: Places | None = None) -> Attester:
    """The attester for this TEE.

    Raises:
        NoAttesterError: no interface of this TEE, with the reason as far as it can be seen.
        DeviceError: an interface is there, and the kernel refused it.
    """
    at = places or Places()
    # 1. Below a paravisor the processor is a confidential one, and neither its device nor its report is ours.
    # refusal: test_a_guest_below_a_paravisor_is_refused_whatever_else_it_has
    if below_paravisor(at):
        raise NoAttesterError(Ident(tee.value), Absence.PARAVISOR)

    # 2. The interfaces, each opened as it will be used: a driver's folder without its device proves nothing.
    absences: list[Absence] = []
    for opened in _interfaces(at)[tee]:
        try:
            return opened()
        except NoAttesterError as error:
            absences.append(error.reason)

    # 3. None. Hints of the hardware decide nothing, they explain.
    reason = next((absence for absence in absences if absence is not Absence.NO_INTERFACE), Absence.NO_INTERFACE)
    if reason is Absence.NO_INTERFACE and (found := hinted(at)):
        reason = Absence.NO_DRIVER if found is tee else Absence.OTHER_TEE
    raise NoAttesterError(Ident(tee.value), reason)


def _interfaces(at: Places) -> dict[Tee, tuple[Callable[[], Attester], ...]]:
    return {
        Tee.SNP: (lambda: TsmSnp(at.report_root), lambda: SevGuest(at.sev_guest, at.vmpl_file)),
        Tee.TDX: (lambda: TsmTdx(at.report_root, device=at.tdx_guest), lambda: TdxGuest(at.tdx_guest, at.attest_conf)),
    }


def hinted(places: Places | None = None) -> Tee | None:
    """Which TEE's guest this seems to be, by its device nodes and by what the kernel says of the processor."""
    at = places or Places()
    flags = _flags(at.cpuinfo)
    if at.tdx_guest.exists() or b"tdx_guest" in flags:
        return Tee.TDX
    if at.sev_guest.exists() or at.vmpl_file.exists():  # the flag sev_snp is the host's too
        return Tee.SNP
    return None


def _flags(cpuinfo: Path) -> list[bytes]:
    try:
        with cpuinfo.open("rb") as file:
            lines = file.read(MAX_CPUINFO_BYTES).splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith(b"flags")), [])


# --- Azure ------------------------------------------------------------------------------------------------------------

_HYPERVISOR_LEAF = 0x4000_0000
_FEATURES_LEAF = 0x4000_0003
_ISOLATION_LEAF = 0x4000_000C
_REGISTERS = struct.Struct("<4I")  # EAX, EBX, ECX, EDX
_ISOLATION_BIT = 1 << 22
_PARAVISOR_BIT = 1
_HARDWARE_ISOLATION = (2, 3)  # SNP, TDX; 1 is of software
_HCL_REPORT_INDEX = 0x0140_0001
_NV_READ_PUBLIC = struct.Struct(">HIII")  # TPM_ST_NO_SESSIONS, size, TPM_CC_NV_ReadPublic, index
_TPM_ANSWER = struct.Struct(">HII")
_MAX_TPM_ANSWER_BYTES = 4096


def below_paravisor(at: Places) -> bool:
    """Is this a confidential guest of Hyper-V, whose reports its paravisor keeps behind a vTPM?

    The processor says so where the kernel lets us ask it. Else the vTPM does, which is asked in guests of Hyper-V only: it
    has an index for the paravisor's report.
    """
    return _isolated_by_hyperv(at.cpuid) or (
        _read_start(at.system_vendor).startswith(b"Microsoft Corporation") and _has_hcl_report(at.tpm)
    )


def _isolated_by_hyperv(cpuid: Callable[[int], bytes]) -> bool:
    leaves = [cpuid(leaf) for leaf in (_HYPERVISOR_LEAF, _FEATURES_LEAF, _ISOLATION_LEAF)]
    if any(len(registers) != _REGISTERS.size for registers in leaves) or leaves[0][4:] != b"Microsoft Hv":
        return False
    _, features_ebx, _, _ = _REGISTERS.unpack(leaves[1])
    isolation_eax, isolation_ebx, _, _ = _REGISTERS.unpack(leaves[2])
    # Hyper-V also runs confidential guests without a paravisor, whose devices are as anywhere else.
    paravisor = isolation_eax & _PARAVISOR_BIT and isolation_ebx & 0xF in _HARDWARE_ISOLATION
    return bool(features_ebx & _ISOLATION_BIT and paravisor)


def _has_hcl_report(tpm: Path) -> bool:
    """Does this TPM have the index? Asked for its public part, which needs no authorization."""
    command = _NV_READ_PUBLIC.pack(0x8001, _NV_READ_PUBLIC.size, 0x169, _HCL_REPORT_INDEX)
    try:
        descriptor = os.open(tpm, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.write(descriptor, command)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(TPM_DEADLINE_S * 1000):
            return False
        answer = os.read(descriptor, _MAX_TPM_ANSWER_BYTES)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return len(answer) >= _TPM_ANSWER.size and _TPM_ANSWER.unpack_from(answer)[2] == 0


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""
