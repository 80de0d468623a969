"""A configfs-tsm like the kernel's, without a TEE, behind /dev/fuse (`fuse.py`).

What it knows of the kernel stands in the recorded behaviour of Linux 6.12, and a test compares both. It does not know SVSM
(`service_*`, `manifestblob`) and `pread`. A closed inblob is taken over at FUSE's
flush, which comes with every close: FUSE's release, where the kernel does it, is not waited for.
"""

import contextlib
import errno
import os
import pickle
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.children import readable
from tests.fuse import (
    FOPEN_DIRECT_IO,
    FOPEN_NONSEEKABLE,
    IN_HEADER,
    MAX_WRITE_BYTES,
    NO_REPLY,
    PAGE_BYTES,
    ROOT_NODE,
    Op,
    pack_attributes,
    pack_init,
    reply,
    served,
)

MAX_INBLOB_BYTES = 64
MAX_PRIVLEVEL = 3

MakeReport = Callable[[bytes, int], bytes]
"""What the firmware answers to 64 bytes and a privilege level."""


@dataclass(frozen=True)
class Faults:
    """What is wrong from now on. Tuples are used up from the front, one item per call.

    Attributes:
        provider: None for none.
        max_blob_bytes: the kernel's limit; 16 MiB in kernels of 2026.
        errors: the named call (`mkdir`, or an attribute) fails with this errno.
        texts: content of text attributes.
        report: given out instead of the firmware's.
        intruders: somebody else writes this inblob into the entry, between our writes and the next report.
        flip_report_data: the firmware signs other data than it was asked to.
        lose_inblob: the kernel does not take over what was written, and says nothing.
        delay_s: how long the firmware takes. Everybody else's calls wait too, as they do behind the kernel's lock.
    """

    provider: str | None = "sev_guest"
    privlevel_floor: int = 0
    errors: tuple[tuple[str, int], ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    report: bytes | None = None
    auxblob: bytes = b""
    max_blob_bytes: int = 32 << 10
    intruders: tuple[bytes, ...] = ()
    flip_report_data: bool = False
    lose_inblob: bool = False
    delay_s: float = 0.0


@dataclass
class _Entry:
    name: str
    inblob: bytes = b""
    privlevel: int = 0
    write_generation: int = 0
    read_generation: int = 0
    outblob: bytes | None = None
    auxblob: bytes = b""
    removed: bool = False


@dataclass
class _Open:
    """One open file: configfs reads a binary attribute once per open, and writes it once, at the close."""

    content: bytes | None = None
    written: bytes | None = None


_MODES = {
    "auxblob": (0o444, 0),
    "generation": (0o444, PAGE_BYTES),
    "inblob": (0o200, 0),
    "outblob": (0o444, 0),
    "privlevel": (0o200, PAGE_BYTES),
    "privlevel_floor": (0o444, PAGE_BYTES),
    "provider": (0o444, PAGE_BYTES),
}
_SNP_ONLY = {"auxblob", "privlevel", "privlevel_floor"}


@dataclass
class _Tsm:
    """The kernel's rules. Every method raises OSError as the kernel does."""

    make: MakeReport
    faults: Faults = field(default_factory=Faults)
    entries: dict[str, _Entry] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def attributes(self) -> list[str]:
        return [name for name in _MODES if name not in _SNP_ONLY or self.faults.provider == "sev_guest"]

    def mkdir(self, name: str) -> None:
        self._begin("mkdir")
        if self.faults.provider is None:
            raise OSError(errno.ENXIO, "")
        if name in self.entries:
            raise OSError(errno.EEXIST, "")
        self.entries[name] = _Entry(name)

    def rmdir(self, name: str) -> None:
        self._begin("rmdir")
        self.entries.pop(name).removed = True

    def open(self, attribute: str, access: int) -> None:
        """Modes bind root too, because configfs has no method for the other direction."""
        if access != (os.O_RDONLY if _MODES[attribute][0] & 0o400 else os.O_WRONLY):
            raise OSError(errno.EACCES, "")

    def read(self, entry: _Entry, attribute: str) -> bytes:
        self._begin(attribute, entry)
        match attribute:
            case _ if attribute in dict(self.faults.texts):
                return dict(self.faults.texts)[attribute]
            case "generation":
                return b"%d\n" % entry.write_generation
            case "provider":
                if self.faults.provider is None:
                    raise OSError(errno.ENXIO, "")
                return self.faults.provider.encode() + b"\n"
            case "privlevel_floor":
                return b"%d\n" % self.faults.privlevel_floor
            case _:
                self._generate(entry)
                blob = entry.outblob if attribute == "outblob" else entry.auxblob
                assert blob is not None
                if len(blob) > self.faults.max_blob_bytes:
                    raise OSError(errno.EFBIG, "")
                return blob

    def write_text(self, entry: _Entry, data: bytes) -> None:
        """Only `privlevel` is one."""
        self._begin("privlevel", entry)
        text = data.removesuffix(b"\n")
        level = int(text) if text.isdigit() else -1
        if not self.faults.privlevel_floor <= level <= MAX_PRIVLEVEL:
            raise OSError(errno.EINVAL, "")
        entry.privlevel = level
        entry.write_generation += 1

    def close(self, entry: _Entry, written: bytes) -> None:
        """A closed `inblob`; whatever goes wrong here nobody hears of."""
        self.calls.append(f"inblob {len(written)}")
        if not self.faults.lose_inblob:
            entry.inblob = written
            entry.write_generation += 1

    def _begin(self, call: str, entry: _Entry | None = None) -> None:
        self.calls.append(call)
        if entry and entry.removed:
            raise OSError(errno.ENOENT, "")
        for index, (name, code) in enumerate(self.faults.errors):
            if name == call:
                self.faults = replace(self.faults, errors=self.faults.errors[:index] + self.faults.errors[index + 1 :])
                raise OSError(code, "")

    def _generate(self, entry: _Entry) -> None:
        if self.faults.intruders:
            entry.inblob = self.faults.intruders[0]
            entry.write_generation += 1
            self.faults = replace(self.faults, intruders=self.faults.intruders[1:])
        if not entry.inblob:
            raise OSError(errno.EINVAL, "")
        if entry.outblob is not None and entry.read_generation == entry.write_generation:
            return
        entry.outblob = None
        if len(entry.inblob) != MAX_INBLOB_BYTES:
            raise OSError(errno.EINVAL, "")
        time.sleep(self.faults.delay_s)
        self._begin("firmware", entry)
        data = bytes((entry.inblob[0] ^ self.faults.flip_report_data,)) + entry.inblob[1:]
        entry.outblob = self.make(data, entry.privlevel) if self.faults.report is None else self.faults.report
        entry.auxblob = self.faults.auxblob
        entry.read_generation = entry.write_generation


class FakeConfigfs:
    """The parent's hand on the server."""

    def __init__(self, root: Path, control: socket.socket) -> None:
        self.root = root
        self._control = control

    def set(self, faults: Faults) -> None:
        self._control.send(pickle.dumps(faults))

    def calls(self) -> list[str]:
        """What was asked since the last time, `firmware` for each request to the firmware, `inblob N` for each value closed,
        `interrupt` for each signal that met somebody who waits."""
        self._control.send(pickle.dumps(None))
        assert readable(self._control.fileno())
        calls: list[str] = pickle.loads(self._control.recv(1 << 20))
        return calls

    def requests(self) -> int:
        """How many times the firmware was asked since the last call."""
        return self.calls().count("firmware")


@contextlib.contextmanager
def fake_configfs(mountpoint: Path, make: MakeReport) -> Iterator[FakeConfigfs]:
    """A mounted fake at a path of this process, or a skip."""
    with served(mountpoint, lambda device, control: _FuseServer(_Tsm(make), device, control).serve()) as (root, control):
        yield FakeConfigfs(root, control)


# --- FUSE -------------------------------------------------------------------------------------------------------------

_TRANSFER_BYTES = 40  # fuse_read_in and fuse_write_in; both begin with handle, offset, size


@dataclass
class _FuseServer:
    tsm: _Tsm
    device: int
    control: socket.socket
    nodes: list[tuple[_Entry | None, str]] = field(default_factory=lambda: [(None, "")])  # the root, then as looked up
    files: list[_Open] = field(default_factory=list)

    def serve(self) -> None:
        """Until the parent lets go or kills us."""
        poll = select.poll()
        poll.register(self.device, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self.control.fileno() in ready:  # first: what the parent set counts for what it asks next
                message = self.control.recv(1 << 20)
                if not message:
                    return
                faults = pickle.loads(message)
                if faults is None:
                    self.control.send(pickle.dumps(self.tsm.calls))
                    self.tsm.calls = []
                else:
                    self.tsm.faults = faults
            else:
                self._answer(os.read(self.device, MAX_WRITE_BYTES + PAGE_BYTES))

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode == Op.INTERRUPT:
            self.tsm.calls.append("interrupt")
        if opcode in NO_REPLY:
            return
        try:
            reply(self.device, unique, self._do(opcode, node, request[IN_HEADER.size :]))
        except OSError as exc:
            reply(self.device, unique, b"", exc.errno or errno.EIO)

    def _do(self, opcode: int, node: int, body: bytes) -> bytes:
        entry, attribute = self.nodes[node - ROOT_NODE] if node else (None, "")
        match opcode:
            case Op.INIT:
                return pack_init()
            case Op.LOOKUP:
                return self._lookup(entry, _text(body))
            case Op.GETATTR | Op.SETATTR:
                return bytes(16) + self._attributes_of(node)
            case Op.MKDIR if entry is None:
                self.tsm.mkdir(_text(body[8:]))
                return self._lookup(None, _text(body[8:]))
            case Op.RMDIR if entry is None:
                self.tsm.rmdir(_text(body))
                return b""
            case Op.MKDIR | Op.RMDIR | Op.UNLINK:
                raise OSError(errno.EPERM, "")
            case Op.OPENDIR:
                return bytes(16)
            case Op.READDIR:
                return self._listing(entry) if struct.unpack_from("<QQ", body)[1] == 0 else b""
            case Op.OPEN:
                (flags,) = struct.unpack_from("<I", body)
                self.tsm.open(attribute, flags & os.O_ACCMODE)
                self.files.append(_Open())
                return struct.pack("<QII", len(self.files) - 1, FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE, 0)
            case Op.READ | Op.WRITE | Op.FLUSH:
                assert entry is not None
                return self._transfer(opcode, entry, attribute, body)
            case Op.RELEASE | Op.RELEASEDIR:
                return b""
        raise OSError(errno.ENOSYS, "")

    def _transfer(self, opcode: int, entry: _Entry, attribute: str, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        file = self.files[handle]
        if opcode == Op.READ:
            if file.content is None:
                file.content = self.tsm.read(entry, attribute)
            return bytes(file.content[offset : offset + size])
        if opcode == Op.WRITE:
            data = body[_TRANSFER_BYTES:]
            if attribute == "inblob":
                file.written = file.written or b""  # from here on the close has something to take over
                if len(file.written + data) > MAX_INBLOB_BYTES:
                    raise OSError(errno.EFBIG, "")
                file.written += data
            else:
                self.tsm.write_text(entry, data)
            return struct.pack("<II", len(data), 0)
        if file.written is not None:
            self.tsm.close(entry, file.written)
            file.written = None
        return b""

    def _lookup(self, entry: _Entry | None, name: str) -> bytes:
        found = (self.tsm.entries.get(name), "") if entry is None else (entry, name)
        if found[0] is None or (entry is not None and (entry.removed or name not in self.tsm.attributes())):
            raise OSError(errno.ENOENT, "")
        self.nodes.append(found)
        node = ROOT_NODE + len(self.nodes) - 1
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self._attributes_of(node)  # nothing may be cached

    def _attributes_of(self, node: int) -> bytes:
        attribute = self.nodes[node - ROOT_NODE][1]
        mode, size = _MODES.get(attribute, (0, 0))
        mode = stat.S_IFREG | mode if attribute else stat.S_IFDIR | 0o755
        return pack_attributes(node, size, mode)

    def _listing(self, entry: _Entry | None) -> bytes:
        names = list(self.tsm.entries) if entry is None else self.tsm.attributes()
        listing = b""
        for index, name in enumerate(map(str.encode, names)):
            record = struct.pack("<QQII", index + 2, index + 1, len(name), 0) + name
            listing += record.ljust(-len(record) // 8 * -8, b"\0")
        return listing


def _text(name: bytes) -> str:
    return name.removesuffix(b"\0").decode()
