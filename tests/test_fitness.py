"""Kernels, drivers and clocks with which a boot could not succeed, and those with which it can."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import AgentError, GuestUnfitError, Owner, Unfit
from agent.evidence import Tee
from agent.fitness import MADE, MAX_VERSION_BYTES, OLDEST_KERNEL, Places, check_clock, check_gpu_driver, check_kernel

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22-I3-B13-2-3)  Tue\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jun  1 21:37:53 UTC 2023\n"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    names = ("configfs_tsm", "sev_guest", "tdx_guest", "gpu_driver")
    return replace(Places(), **{name: tmp_path / name for name in names})  # type: ignore[arg-type]


def unfit(check: Callable[[], object]) -> tuple[Unfit, str | None, str | None]:
    with pytest.raises(GuestUnfitError) as caught:
        check()
    error: AgentError = caught.value
    assert (error.owner, error.exit_status, error.retryable) == (Owner.OPERATOR, 23, False)
    return caught.value.problem, caught.value.got, caught.value.expected


# --- kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tee", "release", "oldest"),
    [
        (Tee.SNP, "5.18.19", "5.19"),
        (Tee.SNP, "4.19.0-27-amd64", "5.19"),
        (Tee.TDX, "6.1.0-40-cloud-amd64", "6.2"),
        (Tee.TDX, "5.19.0", "6.2"),
    ],
)
def test_a_kernel_older_than_every_interface_to_the_tee_is_unfit(places: Places, tee: Tee, release: str, oldest: str) -> None:
    at = replace(places, release=lambda: release)
    assert unfit(lambda: check_kernel(tee, at)) == (Unfit.KERNEL, release, oldest)
    assert check_kernel(None, at)["release"] == release, "of no TEE nothing is wanted"


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
@pytest.mark.parametrize("release", ["6.2.0", "6.12.117+deb12-amd64", "6.18.35", "7.0-rc1", "10.0.0"])
def test_a_newer_one_will_do(places: Places, tee: Tee, release: str) -> None:
    assert check_kernel(tee, replace(places, release=lambda: release))["release"] == release


def test_a_release_that_is_no_version_is_told_and_decides_nothing(places: Places) -> None:
    assert check_kernel(Tee.SNP, replace(places, release=lambda: "my own kernel"))["release"] == "unprintable"


def test_the_oldest_kernels_are_those_that_brought_the_device_nodes() -> None:
    assert OLDEST_KERNEL == {Tee.SNP: (5, 19), Tee.TDX: (6, 2)}


def test_what_the_kernel_has_is_told(places: Places) -> None:
    places.configfs_tsm.mkdir()
    places.tdx_guest.touch()
    seen = dict(check_kernel(Tee.TDX, replace(places, release=lambda: "6.12.9")))
    assert seen == {"release": "6.12.9", "configfs-tsm": "present", "sev-guest": "absent", "tdx-guest": "present"}


# --- GPU driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["550.90.07", "580.95.05", "590.12", "595.58.03", "610.10"])
def test_an_open_driver_that_knows_the_modes_will_do(places: Places, version: str) -> None:
    places.gpu_driver.write_text(OPEN.format(version) + "GCC version:  gcc version 13.3.0\n")
    assert check_gpu_driver(places) == {"driver": version}


@pytest.mark.parametrize(
    ("text", "problem", "got"),
    [
        (None, Unfit.GPU_DRIVER_ABSENT, None),
        ("", Unfit.GPU_DRIVER_UNKNOWN, None),
        ("NVRM version: somebody's\n", Unfit.GPU_DRIVER_UNKNOWN, None),
        (" " * MAX_VERSION_BYTES + OPEN.format("590.12"), Unfit.GPU_DRIVER_UNKNOWN, None),
        (OPEN.format("590"), Unfit.GPU_DRIVER_UNKNOWN, None),
        (CLOSED.format("580.95.05"), Unfit.GPU_DRIVER_CLOSED, "580.95.05"),
        (OPEN.format("535.86.09"), Unfit.GPU_DRIVER_OLD, "535.86.09"),
    ],
)
def test_another_driver_or_none_is_unfit(places: Places, text: str | None, problem: Unfit, got: str | None) -> None:
    if text is not None:
        places.gpu_driver.write_text(text)
    assert unfit(lambda: check_gpu_driver(places)) == (problem, got, "550" if problem is Unfit.GPU_DRIVER_OLD else None)


# --- clock ------------------------------------------------------------------------------------------------------------


def test_a_clock_before_this_program_was_made_is_unfit() -> None:
    assert unfit(lambda: check_clock(datetime(1970, 1, 1, tzinfo=UTC))) == (Unfit.CLOCK, "1970-01-01", "2026-01-01")
    assert check_clock(MADE) == {"now": "2026-01-01T00:00:00Z"}


def test_the_places_are_the_kernels() -> None:
    at = Places()
    assert at.configfs_tsm == Path("/sys/kernel/config/tsm/report")
    assert (at.sev_guest, at.tdx_guest) == (Path("/dev/sev-guest"), Path("/dev/tdx_guest"))
    assert at.gpu_driver == Path("/proc/driver/nvidia/version")
    assert at.gpu_parameters == (Path("/proc/cmdline"), Path("/proc/driver/nvidia/params"))
    assert at.measurements == Path("/sys/class/misc/tdx_guest/measurements")
    assert at.event_log == Path("/sys/firmware/acpi/tables/data/CCEL")
    assert Ident.of_peer(at.release()) != "unprintable"
