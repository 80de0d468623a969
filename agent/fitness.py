"""Kernel, drivers and clock: is this guest one that a boot can use?

Owns the oldest versions we can work with and where this guest's own are read. For `doctor`: a boot meets the same as a device
that does not open. Asks no device, changes nothing. What is read is the kernel's and the driver's word; it explains, and proves
nothing. Standard library only.
Source: Linux, drivers/virt/coco (sev-guest 5.19, tdx-guest 6.2, configfs-tsm 6.7, RTMR in sysfs 6.16); NVIDIA
open-gpu-kernel-modules 595.45.04, `/proc/driver/nvidia/version`.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.closed import Ident
from agent.errors import GuestUnfitError, Unfit
from agent.evidence import Tee

OLDEST_KERNEL = {Tee.SNP: (5, 19), Tee.TDX: (6, 2)}
"""With `/dev/sev-guest` and `/dev/tdx_guest`. configfs-tsm came with 6.7; whether one of them opens is `tee`'s to find."""
OLDEST_GPU_DRIVER = 550
"""Which tells all of the modes (`nvmlSystemGetConfComputeSettings`) and puts the FWID into reports."""
MADE = datetime(2026, 1, 1, tzinfo=UTC)
"""The beginning of the year in which this program was: none of its copies can run before."""
MAX_VERSION_BYTES = 4096

Seen = Mapping[str, Ident]
"""What a check found, by name."""

_RELEASE = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})([.-].*)?")
_DRIVER = re.compile(
    rb"NVRM version: NVIDIA UNIX (Open Kernel Module for x86_64|x86_64 Kernel Module) {1,4}([0-9]{3,4}(?:\.[0-9]{1,4}){1,3}) "
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where this guest's kernel has what is looked at; a test has its own."""

    release: Callable[[], str] = lambda: os.uname().release
    configfs_tsm: Path = Path("/sys/kernel/config/tsm/report")
    sev_guest: Path = Path("/dev/sev-guest")
    tdx_guest: Path = Path("/dev/tdx_guest")
    gpu_driver: Path = Path("/proc/driver/nvidia/version")
    gpu_parameters: tuple[Path, ...] = (Path("/proc/cmdline"), Path("/proc/driver/nvidia/params"))
    measurements: Path = Path("/sys/class/misc/tdx_guest/measurements")
    event_log: Path = Path("/sys/firmware/acpi/tables/data/CCEL")
    attest_conf: Path = Path("/etc/tdx-attest.conf")


def check_kernel(tee: Tee | None, at: Places) -> Seen:
    """The kernel's version, and which interfaces to a TEE it has.

    Args:
        tee: whose guest this is; None when nobody says.
        at: where to look.

    Raises:
        GuestUnfitError: the kernel is older than every interface to this TEE.
    """
    release = at.release()
    match = _RELEASE.fullmatch(release)
    if tee is not None and match and (int(match[1]), int(match[2])) < (oldest := OLDEST_KERNEL[tee]):
        raise GuestUnfitError(Unfit.KERNEL, Ident.of_peer(release), Ident("{}.{}".format(*oldest)))
    found = {"configfs-tsm": at.configfs_tsm, "sev-guest": at.sev_guest, "tdx-guest": at.tdx_guest}
    return {"release": Ident.of_peer(release)} | {name: _presence(path) for name, path in found.items()}


def check_gpu_driver(at: Places) -> Seen:
    """The version of the NVIDIA driver that is loaded.

    Raises:
        GuestUnfitError: there is none, it is not of the open kernel modules, or too old.
    """
    try:
        with at.gpu_driver.open("rb") as file:
            text = file.read(MAX_VERSION_BYTES)
    except OSError as error:
        raise GuestUnfitError(Unfit.GPU_DRIVER_ABSENT) from error
    return {"driver": parse_gpu_driver(text)}


def parse_gpu_driver(text: bytes) -> Ident:
    """The version in `/proc/driver/nvidia/version`, of a driver that will do. Raises GuestUnfitError."""
    match = _DRIVER.search(text)
    if match is None:
        raise GuestUnfitError(Unfit.GPU_DRIVER_UNKNOWN)
    version = match[2].decode()
    if not match[1].startswith(b"Open"):
        raise GuestUnfitError(Unfit.GPU_DRIVER_CLOSED, Ident(version))
    if int(version.partition(".")[0]) < OLDEST_GPU_DRIVER:
        raise GuestUnfitError(Unfit.GPU_DRIVER_OLD, Ident(version), Ident(str(OLDEST_GPU_DRIVER)))
    return Ident(version)


def check_clock(now: datetime) -> Seen:
    """The time of day, to the second.

    Raises:
        GuestUnfitError: it is before this program was made, so nothing that has an end can be judged.
    """
    if now < MADE:
        raise GuestUnfitError(Unfit.CLOCK, _day(now), _day(MADE))
    return {"now": Ident(now.strftime("%Y-%m-%dT%H:%M:%SZ"))}


def _presence(path: Path) -> Ident:
    return Ident("present" if os.path.exists(path) else "absent")


def _day(moment: datetime) -> Ident:
    return Ident(moment.strftime("%Y-%m-%d"))
