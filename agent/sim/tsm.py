"""The rules of the kernel's configfs-tsm, without a kernel and without a TEE: entries, attributes, generations, errnos.

Behaves as Linux 6.12 was seen to; a test holds the same table of steps against this, and the boot test against the kernel's own
module. `configfs.py` makes files of it. Does not know the kernel's lock: whoever calls does so one call at a time, as long as
the firmware may take, and that is what the lock comes to.
Source: Linux 6.12, drivers/virt/coco/tsm.c, fs/configfs/file.c; Documentation/ABI/testing/configfs-tsm.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

MAX_INBLOB_BYTES = 64
MAX_PRIVLEVEL = 3
PAGE_BYTES = 4096

Firmware = Callable[[bytes, int], tuple[bytes, bytes]]
"""Report and certificates, to 64 bytes and a privilege level. Raises OSError."""

_MODES = {
    "auxblob": (0o444, 0),
    "generation": (0o444, PAGE_BYTES),
    "inblob": (0o200, 0),
    "manifestblob": (0o444, 0),
    "outblob": (0o444, 0),
    "privlevel": (0o200, PAGE_BYTES),
    "privlevel_floor": (0o444, PAGE_BYTES),
    "provider": (0o444, PAGE_BYTES),
    "service_guid": (0o200, PAGE_BYTES),
    "service_manifest_version": (0o200, PAGE_BYTES),
    "service_provider": (0o200, PAGE_BYTES),
}
_OF_ALL = ("generation", "inblob", "outblob", "provider")
_OF_SNP = (*_OF_ALL, "auxblob", "privlevel", "privlevel_floor")
_NUMBER = re.compile(rb"\+?(?:0[xX]([0-9a-fA-F]+)|0([0-7]+)|(0|[1-9][0-9]*))\n?")
_GUID = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ULONG = 1 << 64
_UINT_MAX = (1 << 32) - 1


@dataclass(frozen=True)
class Faults:
    """What is wrong from now on. Tuples are used up from the front, one item per call.

    Attributes:
        provider: None for none.
        svsm: the guest runs under one, so that entries have its attributes too.
        max_blob_bytes: the kernel's limit; 16 MiB in kernels of 2026.
        errors: the named call (`mkdir`, or an attribute, or `firmware`) fails with this errno.
        texts: content of text attributes.
        report: given out instead of the firmware's.
        auxblob: the same.
        intruders: somebody else writes this inblob into the entry, between our writes and the next report.
        flip_report_data: the firmware signs other data than it was asked to.
        lose_inblob: the kernel does not take over what was written, and says nothing.
        delay_s: how long the firmware takes. Everybody else's calls wait too, as they do behind the kernel's lock.
    """

    provider: str | None = "sev_guest"
    svsm: bool = False
    privlevel_floor: int = 0
    errors: tuple[tuple[str, int], ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    report: bytes | None = None
    auxblob: bytes | None = None
    max_blob_bytes: int = 32 << 10
    intruders: tuple[bytes, ...] = ()
    flip_report_data: bool = False
    lose_inblob: bool = False
    delay_s: float = 0.0


@dataclass(eq=False)
class Entry:
    """One request's directory."""

    attributes: tuple[str, ...]
    inblob: bytes = b""
    privlevel: int = 0
    write_generation: int = 0
    read_generation: int = 0
    outblob: bytes | None = None
    auxblob: bytes = b""
    removed: bool = False

    def advance(self) -> None:
        """Before a value is taken over. EBUSY: after so many writes without a report an old one would count as new."""
        if self.write_generation == (self.read_generation - 1) % _ULONG:
            raise OSError(errno.EBUSY, "")
        self.write_generation = (self.write_generation + 1) % _ULONG


def mode_and_size(attribute: str) -> tuple[int, int]:
    """What stat(2) says of an attribute: permissions, bytes."""
    return _MODES[attribute]


def is_binary(attribute: str) -> bool:
    """Read once per open, written once at the end of the open file, and never at a place of the caller's choice."""
    return attribute.endswith("blob")


@dataclass
class Tsm:
    """Every method raises OSError as the kernel does.

    Attributes:
        calls: what was asked, `firmware` for each request to the firmware, `inblob N` for each value taken over.
    """

    firmware: Firmware
    faults: Faults = field(default_factory=Faults)
    entries: dict[str, Entry] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def mkdir(self, name: str) -> None:
        self._begin("mkdir")
        if self.faults.provider is None:
            raise OSError(errno.ENXIO, "")
        if name in self.entries:
            raise OSError(errno.EEXIST, "")
        visible = _OF_SNP if self.faults.provider == "sev_guest" else _OF_ALL
        self.entries[name] = Entry(tuple(_MODES) if self.faults.svsm else visible)

    def rmdir(self, name: str) -> None:
        self._begin("rmdir")
        if name not in self.entries:
            raise OSError(errno.ENOENT, "")
        self.entries.pop(name).removed = True

    def open(self, attribute: str, access: int) -> None:
        """Modes bind root too, because configfs has no method for the other direction."""
        if access != (os.O_RDONLY if _MODES[attribute][0] & 0o400 else os.O_WRONLY):
            raise OSError(errno.EACCES, "")

    def read(self, entry: Entry, attribute: str) -> bytes:
        """The whole attribute; of a blob, after the report was made."""
        self._begin(attribute, entry)
        if attribute in dict(self.faults.texts):
            return dict(self.faults.texts)[attribute]
        if attribute == "generation":
            return b"%d\n" % entry.write_generation
        if is_binary(attribute):
            self._generate(entry)
            blob = {"outblob": entry.outblob, "auxblob": entry.auxblob, "manifestblob": b""}[attribute]
            assert blob is not None
            if len(blob) > self.faults.max_blob_bytes:
                raise OSError(errno.EFBIG, "")
            return blob
        provider = self._provider()
        return b"%d\n" % self.faults.privlevel_floor if attribute == "privlevel_floor" else provider.encode() + b"\n"

    def write_text(self, entry: Entry, attribute: str, data: bytes) -> None:
        """One write(2), which is one value."""
        self._begin(attribute, entry)
        match attribute:
            case "privlevel":
                level = _parse_number(data)
                self._provider()
                if not self.faults.privlevel_floor <= level <= MAX_PRIVLEVEL:
                    raise OSError(errno.EINVAL, "")
                entry.advance()
                entry.privlevel = level
            case "service_manifest_version":
                _parse_number(data)
                entry.advance()
            case "service_guid":
                entry.advance()  # also when it is none
                if not _GUID.match(data):
                    raise OSError(errno.EINVAL, "")
            case _:
                entry.advance()

    def release(self, entry: Entry, written: bytes) -> None:
        """An `inblob` that was written to has no user any more. Whatever goes wrong here nobody hears of."""
        self.calls.append(f"inblob {len(written)}")
        if not self.faults.lose_inblob and not entry.removed:
            try:
                entry.advance()
            except OSError:
                return
            entry.inblob = written

    def _begin(self, call: str, entry: Entry | None = None) -> None:
        self.calls.append(call)
        if entry and entry.removed:
            raise OSError(errno.ENOENT, "")
        for index, (name, code) in enumerate(self.faults.errors):
            if name == call:
                self.faults = replace(self.faults, errors=self.faults.errors[:index] + self.faults.errors[index + 1 :])
                raise OSError(code, "")

    def _provider(self) -> str:
        if self.faults.provider is None:
            raise OSError(errno.ENXIO, "")
        return self.faults.provider

    def _generate(self, entry: Entry) -> None:
        if self.faults.intruders:
            entry.inblob = self.faults.intruders[0]
            entry.advance()
            self.faults = replace(self.faults, intruders=self.faults.intruders[1:])
        if not entry.inblob:
            raise OSError(errno.EINVAL, "")
        if entry.outblob is not None and entry.read_generation == entry.write_generation:
            return
        self._provider()
        entry.outblob = None
        if len(entry.inblob) != MAX_INBLOB_BYTES:  # both providers' own check
            raise OSError(errno.EINVAL, "")
        time.sleep(self.faults.delay_s)
        self._begin("firmware", entry)
        data = bytes((entry.inblob[0] ^ self.faults.flip_report_data,)) + entry.inblob[1:]
        report, auxblob = self.firmware(data, entry.privlevel) if self.faults.report is None else (self.faults.report, b"")
        entry.outblob = report
        entry.auxblob = auxblob if self.faults.auxblob is None else self.faults.auxblob
        entry.read_generation = entry.write_generation


def _parse_number(text: bytes) -> int:
    """As `kstrtouint` with base 0 does: hexadecimal after 0x, octal after 0, one newline at the end."""
    match = _NUMBER.fullmatch(text)
    if not match:
        raise OSError(errno.EINVAL, "")
    hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    if value > _UINT_MAX:
        raise OSError(errno.ERANGE, "")
    return value
