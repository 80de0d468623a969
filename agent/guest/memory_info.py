"""How much memory this guest can still give, and whether any of it could be written to a disk.

Reads the kernel's own figures and judges nothing: what must fit is decided in `artifact/memory.py`. Paths are arguments
with the real default. Follows proc(5), the kernel's `cgroup-v2.rst` and `cgroup-v1/memory.rst`. Standard library only.
"""

from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 says "none" with a number just below 2^63, rounded to pages."""


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Where the kernel's figures lie.

    Attributes:
        proc: usually `/proc`.
        sys: usually `/sys`.
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    def available_bytes(self) -> int:
        """MemAvailable: what can be taken without swapping, page cache given back.

        Raises:
            OSError: not readable.
            ValueError: this kernel says nothing of the kind.
        """
        for line in (self.proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
        raise ValueError("no MemAvailable")

    def cgroup_available_bytes(self) -> int | None:
        """What the tightest memory limit of our cgroup and its parents leaves, None without any limit.

        Raises:
            OSError: not readable.
            ValueError: not numbers.
        """
        found: list[int] = []
        for line in (self.proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found += _left(self.sys / "fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                found += _left(self.sys / "fs/cgroup/memory", path, *names)
        return min(found, default=None)

    def swap_is_active(self) -> bool:
        """Is there a swap device whose pages leave memory? zram stays in memory, unless it has a device behind it.

        Raises:
            OSError: not readable. A kernel without swap has no such file, and the answer is no.
        """
        try:
            lines = (self.proc / "swaps").read_text().splitlines()[1:]
        except FileNotFoundError:
            return False
        return any(not self._stays_in_memory(line.split()[0]) for line in lines if line.strip())

    def _stays_in_memory(self, device: str) -> bool:
        folder, _, name = device.rpartition("/")
        if folder != "/dev" or not (name.startswith("zram") and name[4:].isdecimal()):
            return False
        try:
            # Kernels without CONFIG_ZRAM_WRITEBACK have no such file.
            return (self.sys / "block" / name / "backing_dev").read_text().strip() == "none"
        except FileNotFoundError:
            return (self.sys / "block" / name).is_dir()


MACHINE = MemoryInfo()
"""This machine's own figures."""


def _left(mount: Path, group: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """What each limit leaves, from our own group up to the root that is visible here.

    A container sees its own group as the root of the mount, under whatever path the host knows it: folders that are not
    there are passed over.
    """
    found = []
    names = [name for name in group.split("/") if name]
    for depth in range(len(names), -1, -1):
        folder = mount.joinpath(*names[:depth])
        try:
            text = (folder / limit).read_text().strip()
        except (FileNotFoundError, NotADirectoryError):  # no such folder here, or the root of version 2, which has no limit
            continue
        if text == "max" or int(text) >= _NO_LIMIT:
            continue
        # Like MemAvailable, and like the kubelet's working set: page cache nobody used lately is given back under pressure.
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(statistics[reclaimable])
        found.append(max(0, int(text) - used))
    return found
