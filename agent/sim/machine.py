"""One simulated confidential VM: a directory with its keys, its fields and its faults, from launch to end of life.

    machine.json    everything a caller may set, and the GPU state that outlives the agent
    vcek.key        the key its report is signed with, for the chip id and TCB version it was created with
    vcek.der
    pck.key         the same for its quotes, should it be asked as a TDX platform
    pck.pem
    rtmr3:sha384    its runtime register, once it was extended
    CCEL            what its firmware measured, as a table padded to its size
    run/            its agent's part of the event log
    silicon/        the vendors' keys, unless the machine shares another one's (`create_silicon`)
    silicon/roots/  the vendors' root certificates, and nothing else

Sharing silicon saves the generation of two RSA-4096 keys, and lets one broker trust many machines.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from agent.closed import Ident
from agent.errors import NoAttesterError, SimulationRefusal, SimulationRefusedError
from agent.evidence import Attester, GpuSystem, SwitchSystem, Tee
from agent.evidence.runtime import NoRegister, RuntimeMeasurement
from agent.evidence.snp_abi import TcbVersion

MACHINE_FILE = "machine.json"
REAL_TEE_PATHS = ("dev/sev-guest", "dev/tdx_guest", "sys/kernel/config/tsm/report")
GUEST_POLICY = 0x30000
"""SMT allowed, no debugging, no migration."""
TCB_VERSION = TcbVersion(bootloader=10, tee=0, snp=23, microcode=84)
MEASUREMENT = hashlib.sha384(b"keyturn simulated guest").digest()
_BYTES_FIELDS = ("chip_id", "measurement", "host_data")


@dataclass
class GpuKnobs:
    """State and faults of the simulated GPUs; what the integers mean is NVML's (`agent/evidence/__init__.py`, GpuModes).

    Attributes:
        ready: the system-wide ready state, 0 or 1; survives the agent, ends with the machine.
        fatal_latched: the driver met a fatal error: ready stays 0 and setting it fails.
        fail_calls: NVML return code by function name; such a call does nothing else.
        repeat_first_gpu: every GPU answers with the first one's evidence.
        ready_falls_back_after: number of reads that see ready 1 before it falls back to 0; None for never.
        delay_calls: seconds by function name that such a call takes longer.
        architecture: NVML's number of it, the same for every GPU.
        persistent: persistence mode is on, as nvidia-persistenced sets it.
        switches: number of NVSwitches, which go with protected PCIe.
        switch_mode: trusted NVLink of all of them (`evidence.Switch`).
        repeat_first_switch, wrong_switch_nonce, flip_switch_signature_bit: of NVSwitches, as without `switch`.
        stray_switch: the last GPU is linked to an NVSwitch of another machine, instead of to the last one here.
        stray_gpu: the last NVSwitch lists a GPU of another machine, instead of the last one here.
    """

    count: int = 1
    cc_feature: int = 1
    environment: int = 2
    devtools: int = 0
    multi_gpu_mode: int = 0
    ready: int = 0
    fatal_latched: bool = False
    fail_calls: dict[str, int] = field(default_factory=dict)
    wrong_nonce: bool = False
    flip_signature_bit: bool = False
    trailing_byte: bool = False
    repeat_first_gpu: bool = False
    ready_falls_back_after: int | None = None
    delay_calls: dict[str, float] = field(default_factory=dict)
    architecture: int = 9
    persistent: bool = True
    driver_version: str = "580.95.05"
    vbios_version: str = "96.00.74.00.1A"
    switches: int = 0
    switch_mode: int = 3
    switch_vbios_version: str = "96.10.55.00.01"
    repeat_first_switch: bool = False
    wrong_switch_nonce: bool = False
    flip_switch_signature_bit: bool = False
    stray_switch: bool = False
    stray_gpu: bool = False


@dataclass
class SimulatedMachine:
    """Set fields, then `save()` if another process is to see them.

    Attributes:
        silicon: folder of the vendors' keys and roots.
        chip_id: 64 bytes; set to another value it no longer fits the machine's certificate.
        measurement: 48 bytes.
        host_data: 32 bytes, the digest of the configuration the guest was launched with; MRCONFIGID of a TD, there up to 48.
        tcb: the reported TCB version; set to another value it no longer fits the machine's certificate.
        wrong_report_data: the device signs other data than it was asked to.
        flip_signature_bit: the report's signature is wrong by one bit.
        errno: the device fails with it instead of answering.
        register_errno: the runtime register cannot be extended, and fails with this; ENOENT: the kernel has no file for it.
        lose_extension: the runtime register says that it was extended, and was not.
    """

    directory: Path
    silicon: Path
    chip_id: bytes
    measurement: bytes = MEASUREMENT
    host_data: bytes = bytes(32)
    policy: int = GUEST_POLICY
    vmpl: int = 0
    guest_svn: int = 0
    tcb: TcbVersion = TCB_VERSION
    wrong_report_data: bool = False
    flip_signature_bit: bool = False
    errno: int | None = None
    register_errno: int | None = None
    lose_extension: bool = False
    gpu: GpuKnobs = field(default_factory=GpuKnobs)
    _on_disk: bytes = field(default=b"", init=False, repr=False, compare=False)

    @classmethod
    def create(  # one keyword per field that is fixed at launch
        cls,
        directory: Path,
        *,
        gpus: int = 1,
        switches: int = 0,
        silicon: Path | None = None,
        measurement: bytes = MEASUREMENT,
        host_data: bytes = bytes(32),
        policy: int = GUEST_POLICY,
        tcb: TcbVersion = TCB_VERSION,
        root: Path = Path("/"),
    ) -> Self:
        """A new machine on a chip of its own, saved.

        Args:
            directory: empty or not there yet.
            gpus, switches: at most as many as the silicon has; with NVSwitches it is in protected-PCIe mode.
            silicon: the folder of `create_silicon`; a new one in `directory` if None, which takes seconds.
            measurement: 48 bytes.
            host_data: 32 bytes.
            policy: the guest policy it is launched with.
            tcb: the TCB version its certificate is for.
            root: where to look for real TEE devices.

        Raises:
            SimulationRefusedError: a real TEE device exists.
        """
        from agent.sim import snp, tdx  # they import this module

        refuse_on_real_tee(root)
        directory.mkdir(parents=True, exist_ok=True)
        if silicon is None:
            silicon = directory / "silicon"
            create_silicon(silicon, gpus, switches)
        machine = cls(
            directory=directory,
            silicon=silicon,
            chip_id=secrets.token_bytes(64),
            measurement=measurement,
            host_data=host_data,
            policy=policy,
            tcb=tcb,
            gpu=GpuKnobs(count=gpus, switches=switches, cc_feature=int(not switches), multi_gpu_mode=int(bool(switches))),
        )
        snp.create_chip_key(machine)
        tdx.create_platform_key(machine)
        machine.save()
        return machine

    @classmethod
    def load(cls, directory: Path, root: Path = Path("/")) -> Self:
        """The machine in `directory`, as it was saved last.

        Raises:
            SimulationRefusedError: a real TEE device exists below `root`.
            NoAttesterError: there is no machine.
        """
        refuse_on_real_tee(root)
        try:
            on_disk = (directory / MACHINE_FILE).read_bytes()
            fields = json.loads(on_disk)
            fields |= {name: bytes.fromhex(fields[name]) for name in _BYTES_FIELDS}
            fields |= {"silicon": directory / fields["silicon"]}  # an absolute path stays what it is
            fields |= {"tcb": TcbVersion(**fields["tcb"]), "gpu": GpuKnobs(**fields["gpu"])}
            machine = cls(directory=directory, **fields)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise NoAttesterError(Ident("simulated-machine")) from exc
        machine._on_disk = on_disk
        return machine

    def save(self) -> None:
        """Write every field, atomically.

        Raises:
            RuntimeError: another process saved the machine since it was loaded; its changes would be lost.
        """
        fields = dataclasses.asdict(self)
        del fields["directory"], fields["_on_disk"]
        fields |= {name: fields[name].hex() for name in _BYTES_FIELDS}
        fields["silicon"] = str(
            self.silicon.relative_to(self.directory) if self.silicon.is_relative_to(self.directory) else self.silicon.absolute()
        )
        new = json.dumps(fields, indent=2).encode()
        path = self.directory / MACHINE_FILE
        with _locked(self.directory):
            if (path.read_bytes() if path.exists() else b"") != self._on_disk:
                raise RuntimeError("the machine was saved by somebody else since it was loaded: load it again")
            write_file(path, new, mode=0o644)
        self._on_disk = new

    def reread(self) -> None:
        """Take in what another process saved of the GPUs: they belong to the machine, not to who opened them."""
        on_disk = (self.directory / MACHINE_FILE).read_bytes()
        if on_disk != self._on_disk:
            self.gpu, self._on_disk = GpuKnobs(**json.loads(on_disk)["gpu"]), on_disk

    def attester(self, tee: Tee = Tee.SNP) -> Attester:
        """Its CPU TEE."""
        from agent.sim import sample, snp, tdx

        match tee:
            case Tee.SNP:
                return snp.SimulatedSnp(self)
            case Tee.TDX:
                return tdx.SimulatedTdx(self)
            case Tee.SAMPLE:
                return sample.Sample(self)

    def tsm(self, tee: Tee, report_root: str) -> Attester:
        """Its CPU TEE through the agent's own code for configfs-tsm.

        Args:
            tee: which.
            report_root: where a `configfs.py` for this machine is mounted.

        Raises:
            NoAttesterError: none is.
            DeviceError: it refused.
        """
        from agent.evidence.tsm import TsmSnp, TsmTdx
        from agent.sim import tdx

        if tee is Tee.SNP:
            return TsmSnp(Path(report_root))
        # The node beside configfs is only asked for a TDREPORT: any file will do, for the ioctl is the machine's.
        return TsmTdx(Path(report_root), device=self.directory / MACHINE_FILE, ioctl=tdx.SimulatedNode(self).ioctl)

    def runtime(self, tee: Tee = Tee.SNP) -> RuntimeMeasurement:
        """Its runtime register and event log."""
        from agent.sim import tdx

        if tee is not Tee.TDX:
            return RuntimeMeasurement(NoRegister())
        tdx.write_ccel(self)
        return RuntimeMeasurement(
            tdx.SimulatedRegister(self),
            firmware_log=self.directory / tdx.CCEL_FILE,
            folder=self.directory / "run",
            foreign_log=self.directory / tdx.FOREIGN_LOG_FILE,
        )

    def gpu_system(self) -> GpuSystem:
        """Its GPUs, through the real NVML binding."""
        from agent.sim import nvml  # needs ctypes and pynvml, which a machine without GPUs does not

        return nvml.open_gpu_system(self)

    def switch_system(self) -> SwitchSystem:
        """Its NVSwitches, through the real NSCQ binding."""
        from agent.sim import nscq

        return nscq.open_switch_system(self)

    @property
    def roots_dir(self) -> Path:
        """Folder of `ark.pem`, `sgx-root.pem` and `nvidia-root.pem`: what a broker must trust to accept this machine."""
        return self.silicon / "roots"


def create_silicon(directory: Path, gpus: int = 8, switches: int = 4) -> None:
    """Vendors' keys and roots for any number of machines: AMD's, Intel's and NVIDIA's part, so many GPUs and NVSwitches."""
    from agent.sim import snp, tdx

    roots = directory / "roots"
    roots.mkdir(parents=True, exist_ok=True)
    snp.create_snp_silicon(directory)
    tdx.create_tdx_silicon(directory)
    for name in (snp.ROOT_FILE, tdx.ROOT_FILE):
        write_file(roots / name, (directory / name).read_bytes(), mode=0o644)
    if gpus:
        from agent.sim import gpu_silicon

        gpu_silicon.create_gpu_silicon(directory, gpus, switches)
        write_file(roots / "nvidia-root.pem", (directory / "nvidia-root.pem").read_bytes(), mode=0o644)


def refuse_on_real_tee(root: Path = Path("/")) -> None:
    """Raises SimulationRefusedError when a TEE device of the real kind exists below `root`."""
    # refusal: test_simulation_is_refused_where_a_real_tee_exists
    if any((root / path).exists() for path in REAL_TEE_PATHS):
        raise SimulationRefusedError(SimulationRefusal.REAL_TEE_PRESENT)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write `data` so that a reader sees the old file or the new one, with exactly `mode`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(descriptor, "wb") as file:
        file.write(data)
        os.fchmod(descriptor, mode)
    os.replace(temporary, path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # The folder itself is the lock: a lock file made by root could not be opened by the next user.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
