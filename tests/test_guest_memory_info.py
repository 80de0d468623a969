from pathlib import Path

import pytest

from agent.guest.memory_info import MACHINE, MemoryInfo

MIB = 1 << 20


@pytest.fixture
def guest(tmp_path: Path) -> MemoryInfo:
    """A machine with 1000 MiB available, cgroup version 2 without limits and no swap."""
    info = MemoryInfo(tmp_path / "proc", tmp_path / "sys")
    write(info.proc / "meminfo", "MemTotal: 2048000 kB\nMemFree: 1 kB\nMemAvailable: 1024000 kB\n")
    write(info.proc / "self/cgroup", "0::/pod/agent\n")
    write(info.proc / "swaps", "Filename\tType\tSize\tUsed\tPriority\n")
    for group in ("pod", "pod/agent"):
        limit_v2(info, group, "max", used=0)
    return info


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit_v2(info: MemoryInfo, group: str, limit: int | str, used: int, inactive_file: int = 0) -> None:
    folder = info.sys / "fs/cgroup" / group
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\nfile 2\ninactive_file {inactive_file}\n")


def limit_v1(info: MemoryInfo, group: str, limit: int, used: int, inactive_file: int = 0) -> None:
    folder = info.sys / "fs/cgroup/memory" / group
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def swap_on(info: MemoryInfo, device: str) -> None:
    with (info.proc / "swaps").open("a") as swaps:
        swaps.write(f"{device}\tpartition\t1048572\t0\t-2\n")


def test_this_machine_answers_every_question() -> None:
    assert MACHINE.available_bytes() > MIB
    assert MACHINE.cgroup_available_bytes() is None or MACHINE.cgroup_available_bytes() != 0
    assert MACHINE.swap_is_active() in (True, False)


def test_available_memory_is_told_in_bytes(guest: MemoryInfo) -> None:
    assert guest.available_bytes() == 1000 * MIB


def test_a_kernel_that_does_not_tell_is_an_error_not_a_zero(guest: MemoryInfo) -> None:
    write(guest.proc / "meminfo", "MemTotal: 2048000 kB\n")
    with pytest.raises(ValueError, match="MemAvailable"):
        guest.available_bytes()


def test_no_limit_is_none(guest: MemoryInfo) -> None:
    assert guest.cgroup_available_bytes() is None


def test_the_tightest_limit_of_the_group_and_its_parents_counts(guest: MemoryInfo) -> None:
    limit_v2(guest, "pod/agent", 900 * MIB, used=100 * MIB)
    assert guest.cgroup_available_bytes() == 800 * MIB
    limit_v2(guest, "pod", 900 * MIB, used=400 * MIB)
    assert guest.cgroup_available_bytes() == 500 * MIB


def test_page_cache_that_nobody_uses_counts_as_free(guest: MemoryInfo) -> None:
    limit_v2(guest, "pod/agent", 900 * MIB, used=850 * MIB, inactive_file=600 * MIB)
    assert guest.cgroup_available_bytes() == 650 * MIB


def test_more_use_than_the_limit_leaves_nothing(guest: MemoryInfo) -> None:
    limit_v2(guest, "pod/agent", 10 * MIB, used=11 * MIB)
    assert guest.cgroup_available_bytes() == 0


def test_a_container_sees_its_own_group_as_the_root(guest: MemoryInfo) -> None:
    write(guest.proc / "self/cgroup", "0::/\n")
    limit_v2(guest, "", 300 * MIB, used=100 * MIB)
    assert guest.cgroup_available_bytes() == 200 * MIB


def test_a_path_of_the_host_that_is_not_visible_here_is_passed_over(guest: MemoryInfo) -> None:
    write(guest.proc / "self/cgroup", "0::/kubepods.slice/burst/cri-1\n")
    limit_v2(guest, "", 300 * MIB, used=100 * MIB)
    assert guest.cgroup_available_bytes() == 200 * MIB


def test_version_1_is_read_too(guest: MemoryInfo) -> None:
    write(guest.proc / "self/cgroup", "9:name=systemd:/\n4:cpu,memory:/pod/agent\n0::/\n")
    limit_v1(guest, "", 9223372036854771712, used=5)
    limit_v1(guest, "pod/agent", 700 * MIB, used=300 * MIB, inactive_file=100 * MIB)
    assert guest.cgroup_available_bytes() == 500 * MIB


def test_no_swap_is_no_swap(guest: MemoryInfo) -> None:
    assert not guest.swap_is_active()
    (guest.proc / "swaps").unlink()
    assert not guest.swap_is_active()


@pytest.mark.parametrize("device", ["/dev/vda2", "/swapfile", "/dev/dm-0", "/dev/zram", "/dev/zramX", "/tmp/zram0"])
def test_a_device_or_file_leaves_memory(guest: MemoryInfo, device: str) -> None:
    swap_on(guest, device)
    assert guest.swap_is_active()


def test_zram_stays_in_memory(guest: MemoryInfo) -> None:
    swap_on(guest, "/dev/zram0")
    (guest.sys / "block/zram0").mkdir(parents=True)
    assert not guest.swap_is_active()
    write(guest.sys / "block/zram0/backing_dev", "none\n")
    assert not guest.swap_is_active()


def test_zram_with_a_device_behind_it_does_not(guest: MemoryInfo) -> None:
    swap_on(guest, "/dev/zram0")
    write(guest.sys / "block/zram0/backing_dev", "/dev/vdb\n")
    assert guest.swap_is_active()


def test_zram_that_the_kernel_does_not_know_is_not_believed(guest: MemoryInfo) -> None:
    swap_on(guest, "/dev/zram0")
    assert guest.swap_is_active()


def test_a_disk_beside_zram_is_found(guest: MemoryInfo) -> None:
    write(guest.sys / "block/zram0/backing_dev", "none\n")
    swap_on(guest, "/dev/zram0")
    swap_on(guest, "/dev/vda2")
    assert guest.swap_is_active()
