import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import Absence, DeviceError, NoAttesterError, Owner
from agent.evidence import Tee
from agent.evidence.detect import CPUID_DEVICE, Places, below_paravisor, hinted, open_interface, read_cpuid
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs
from tests.quotes import quote

PATHS = [name for name in Places.__dataclass_fields__ if name != "cpuid"]
FLAGS = "processor\t: 0\nflags\t\t: fpu vme {}\nprocessor\t: 1\nflags\t\t: tdx_guest\n"
HYPERV = b"Microsoft Hv"
TPM_RC_HANDLE = 0x18B
COMMAND_BYTES = 14
COMMAND = bytes.fromhex("8001 0000000e 00000169 01400001")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A guest that has nothing."""
    (tmp_path / "cpuinfo").write_text(FLAGS.format("sev_snp"))
    return Places(**{name: tmp_path / name for name in PATHS}, cpuid=lambda _: b"")


@pytest.fixture
def configfs(places: Places) -> Iterator[FakeConfigfs]:
    places.report_root.mkdir()
    with fake_configfs(places.report_root, lambda data, _: quote(data)) as fake:
        yield fake
        assert os.listdir(fake.root) == []


def absence(tee: Tee, places: Places) -> Absence:
    with pytest.raises(NoAttesterError) as caught:
        open_interface(tee, places)
    assert caught.value.attester == tee.value
    assert (caught.value.owner, caught.value.exit_status) == (Owner.OPERATOR, 11)
    assert caught.value.reason.value in str(caught.value)
    return caught.value.reason


# --- which interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tee", "provider"), [(Tee.SNP, "sev_guest"), (Tee.TDX, "tdx_guest")])
def test_configfs_comes_before_the_device_node(places: Places, configfs: FakeConfigfs, tee: Tee, provider: str) -> None:
    configfs.set(Faults(provider=provider))
    for node in (places.sev_guest, places.tdx_guest):
        node.touch()
    places.attest_conf.write_text("port = 4050\n")
    attester = open_interface(tee, replace(places, report_root=configfs.root))
    assert (attester.tee, attester.interface) == (tee, "configfs-tsm")


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_without_a_provider_the_device_node_is_taken(places: Places, configfs: FakeConfigfs, tee: Tee) -> None:
    configfs.set(Faults(provider=None))
    for node in (places.sev_guest, places.tdx_guest):
        node.touch()
    places.attest_conf.write_text("port = 4050\n")
    attester = open_interface(tee, replace(places, report_root=configfs.root))
    assert (attester.tee, attester.interface) == (tee, {Tee.SNP: "sev-guest", Tee.TDX: "tdx-guest"}[tee])


def test_an_interface_that_is_there_and_refuses_is_not_passed_over(places: Places) -> None:
    places.report_root.touch()
    places.sev_guest.touch()
    with pytest.raises(DeviceError) as caught:
        open_interface(Tee.SNP, places)
    assert caught.value.code == errno.ENOTDIR


# --- why there is none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
def test_a_guest_that_has_nothing_has_no_attester(places: Places, tee: Tee) -> None:
    assert absence(tee, places) is Absence.NO_INTERFACE


@pytest.mark.parametrize(("tee", "provider"), [(Tee.SNP, "tdx_guest"), (Tee.TDX, "sev_guest")])
def test_another_tees_provider_is_never_taken_in_its_place(
    places: Places, configfs: FakeConfigfs, tee: Tee, provider: str
) -> None:
    configfs.set(Faults(provider=provider))
    assert absence(tee, replace(places, report_root=configfs.root)) is Absence.OTHER_TEE


@pytest.mark.parametrize(("tee", "node"), [(Tee.SNP, "tdx_guest"), (Tee.TDX, "sev_guest")])
def test_another_tees_node_is_never_taken_in_its_place(places: Places, tee: Tee, node: str) -> None:
    getattr(places, node).touch()
    assert absence(tee, places) is Absence.OTHER_TEE


def test_a_processor_without_a_driver_is_told_from_another_one(places: Places) -> None:
    places.cpuinfo.write_text(FLAGS.format("tdx_guest"))
    assert (absence(Tee.TDX, places), absence(Tee.SNP, places)) == (Absence.NO_DRIVER, Absence.OTHER_TEE)
    places.cpuinfo.unlink()
    places.vmpl_file.write_text("0\n")
    assert (absence(Tee.TDX, places), absence(Tee.SNP, places)) == (Absence.OTHER_TEE, Absence.NO_DRIVER)


def test_a_tdx_node_without_a_quote_service_is_told(places: Places) -> None:
    places.tdx_guest.touch()
    assert absence(Tee.TDX, places) is Absence.NO_QUOTE_SERVICE


def test_the_processors_flag_of_a_host_is_no_hint(places: Places) -> None:
    """`sev_snp` is set on hosts too, and the flags of another processor are not looked at."""
    assert hinted(places) is None


# --- Azure ------------------------------------------------------------------------------------------------------------


def cpuid(vendor: bytes, features_ebx: int, isolation_eax: int, isolation_ebx: int) -> Callable[[int], bytes]:
    leaves = {
        0x4000_0000: struct.pack("<I12s", 0x4000_000C, vendor),
        0x4000_0003: struct.pack("<4I", 0, features_ebx, 0, 0),
        0x4000_000C: struct.pack("<4I", isolation_eax, isolation_ebx, 0, 0),
    }
    return leaves.__getitem__


def tpm(path: Path, code: int) -> None:
    """A file that is read where a command has been written: what comes behind it is the answer."""
    path.write_bytes(bytes(COMMAND_BYTES) + struct.pack(">HII", 0x8001, 10, code))


@pytest.mark.parametrize("tee", [Tee.SNP, Tee.TDX])
@pytest.mark.parametrize("kind", [2, 3])
def test_a_guest_below_a_paravisor_is_refused_whatever_else_it_has(
    places: Places, configfs: FakeConfigfs, tee: Tee, kind: int
) -> None:
    configfs.set(Faults(provider="sev_guest"))
    isolated = cpuid(HYPERV, 1 << 22, 1, kind | 1 << 5)
    assert absence(tee, replace(places, report_root=configfs.root, cpuid=isolated)) is Absence.PARAVISOR
    assert configfs.calls() == []


@pytest.mark.parametrize(
    ("vendor", "features_ebx", "isolation_eax", "isolation_ebx"),
    [
        (b"KVMKVMKVM\0\0\0", 1 << 22, 1, 2),  # its leaves mean something else
        (HYPERV, 0, 1, 2),  # not isolated
        (HYPERV, 1 << 22, 1, 1),  # isolated by software
        (HYPERV, 1 << 22, 0, 2),  # SNP without a paravisor: its device is its own
    ],
)
def test_other_guests_of_hypervisors_are_not_below_a_paravisor(
    places: Places, vendor: bytes, features_ebx: int, isolation_eax: int, isolation_ebx: int
) -> None:
    assert not below_paravisor(replace(places, cpuid=cpuid(vendor, features_ebx, isolation_eax, isolation_ebx)))


def test_a_vtpm_with_the_paravisors_report_tells_it_too(places: Places) -> None:
    places.system_vendor.write_text("Microsoft Corporation\n")
    tpm(places.tpm, 0)
    assert below_paravisor(places)
    assert places.tpm.read_bytes()[:COMMAND_BYTES] == COMMAND
    assert absence(Tee.SNP, places) is Absence.PARAVISOR


def test_a_vtpm_without_it_tells_nothing_and_another_machines_is_not_asked(places: Places) -> None:
    places.system_vendor.write_text("Microsoft Corporation\n")
    assert not below_paravisor(places), "no TPM"
    tpm(places.tpm, TPM_RC_HANDLE)
    assert not below_paravisor(places)
    places.tpm.write_bytes(bytes(COMMAND_BYTES + 3))
    assert not below_paravisor(places), "cut short"
    places.system_vendor.write_text("Google\n")
    tpm(places.tpm, 0)
    assert not below_paravisor(places)
    assert places.tpm.read_bytes()[:COMMAND_BYTES] == bytes(COMMAND_BYTES)


def test_the_cpuid_device_is_read_at_the_leaf_and_its_absence_tells_nothing(tmp_path: Path) -> None:
    device = tmp_path / "cpuid"
    device.write_bytes(bytes(range(64)))
    assert read_cpuid(20, device) == bytes(range(20, 36))
    assert read_cpuid(20, tmp_path / "none") == read_cpuid(20, tmp_path) == b""


def test_the_places_are_the_kernels() -> None:
    assert [str(getattr(Places(), name)) for name in PATHS] + [str(CPUID_DEVICE)] == [
        "/sys/kernel/config/tsm/report",
        "/dev/sev-guest",
        "/sys/devices/system/cpu/sev/vmpl",
        "/dev/tdx_guest",
        "/etc/tdx-attest.conf",
        "/proc/cpuinfo",
        "/sys/class/dmi/id/sys_vendor",
        "/dev/tpmrm0",
        "/dev/cpu/0/cpuid",
    ]
