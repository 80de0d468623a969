"""A configfs-tsm like the kernel's as a FUSE file system, whose reports a simulated machine signs.

Owns the files; what happens behind them is `tsm.py`'s. As a program it serves one machine, until its standard input ends, and
says first on standard output whether it could:

    python -m agent.sim.configfs MACHINE snp|tdx MOUNTPOINT

One difference to the kernel's stays, because FUSE has one switch for both: pread(2) of a blob is refused, where the kernel
refuses lseek(2) alone.
"""

import errno
import os
import stat
import struct
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.errors import AgentError, DeviceError, SimulationRefusedError
from agent.evidence import ReportData, Tee
from agent.sim.fuse import (
    FOPEN_DIRECT_IO,
    FOPEN_NONSEEKABLE,
    IN_HEADER,
    NO_REPLY,
    ROOT_NODE,
    Op,
    mount,
    pack_attributes,
    pack_init,
    reply,
    serve,
)
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import pack_certificate_table
from agent.sim.tsm import MAX_INBLOB_BYTES, Entry, Firmware, Tsm, is_binary, mode_and_size

MOUNTED = "mounted\n"
REFUSED = "refused\n"
PROVIDERS = {Tee.SNP: "sev_guest", Tee.TDX: "tdx_guest"}

_TRANSFER_BYTES = 40  # fuse_read_in and fuse_write_in; both begin with handle, offset, size


@dataclass
class _Open:
    """One open file: configfs reads an attribute once per open, and takes over a blob when the file has no user any more."""

    content: bytes | None = None
    written: bytes | None = None


@dataclass
class ConfigfsServer:
    """The files of one configfs-tsm; its root is the folder in which entries are made."""

    tsm: Tsm
    device: int
    _nodes: list[tuple[Entry | None, str]] = field(default_factory=lambda: [(None, "")])  # the root, then as looked up
    _files: dict[int, _Open] = field(default_factory=dict)
    _next_file: int = 0

    def answer(self, request: bytes) -> None:
        """One request of the kernel."""
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode == Op.INTERRUPT:
            self.tsm.calls.append("interrupt")  # a signal met somebody who waits, and goes on waiting
        if opcode in NO_REPLY:
            return
        try:
            reply(self.device, unique, self._do(opcode, node, request[IN_HEADER.size :]))
        except OSError as exc:
            reply(self.device, unique, b"", exc.errno or errno.EIO)

    def _do(self, opcode: int, node: int, body: bytes) -> bytes:
        entry, attribute = self._nodes[node - ROOT_NODE] if node else (None, "")
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
            case Op.CREATE | Op.MKNOD:
                raise OSError(errno.EACCES, "")
            case Op.OPENDIR:
                return bytes(16)
            case Op.READDIR:
                return self._listing(entry) if struct.unpack_from("<QQ", body)[1] == 0 else b""
            case Op.OPEN:
                return self._open(attribute, body)
            case Op.READ | Op.WRITE | Op.RELEASE:
                assert entry is not None
                return self._transfer(opcode, entry, attribute, body)
            case Op.FLUSH | Op.RELEASEDIR:
                return b""
        raise OSError(errno.ENOSYS, "")

    def _open(self, attribute: str, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        self.tsm.open(attribute, flags & os.O_ACCMODE)
        self._next_file += 1
        self._files[self._next_file] = _Open()
        return struct.pack("<QII", self._next_file, FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE * is_binary(attribute), 0)

    def _transfer(self, opcode: int, entry: Entry, attribute: str, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        file = self._files[handle]
        if opcode == Op.READ:
            if file.content is None:
                file.content = self.tsm.read(entry, attribute)
            return bytes(file.content[offset : offset + size])
        if opcode == Op.WRITE:
            data = body[_TRANSFER_BYTES:]
            if attribute == "inblob":
                file.written = file.written or b""  # from here on the release has something to take over
                if len(file.written + data) > MAX_INBLOB_BYTES:
                    raise OSError(errno.EFBIG, "")
                file.written += data
            else:
                self.tsm.write_text(entry, attribute, data)
            return struct.pack("<II", len(data), 0)
        # The last close(2) does not wait for this answer, but whatever is asked after it comes after it.
        del self._files[handle]
        if file.written is not None:
            self.tsm.release(entry, file.written)
        return b""

    def _lookup(self, entry: Entry | None, name: str) -> bytes:
        found = (self.tsm.entries.get(name), "") if entry is None else (entry, name)
        if found[0] is None or (entry is not None and (entry.removed or name not in entry.attributes)):
            raise OSError(errno.ENOENT, "")
        if found not in self._nodes:
            self._nodes.append(found)
        node = ROOT_NODE + self._nodes.index(found)
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self._attributes_of(node)  # nothing may be cached

    def _attributes_of(self, node: int) -> bytes:
        attribute = self._nodes[node - ROOT_NODE][1]
        mode, size = mode_and_size(attribute) if attribute else (0o755, 0)
        return pack_attributes(node, size, (stat.S_IFREG if attribute else stat.S_IFDIR) | mode)

    def _listing(self, entry: Entry | None) -> bytes:
        names = tuple(self.tsm.entries) if entry is None else entry.attributes
        listing = b""
        for index, name in enumerate(map(str.encode, names)):
            record = struct.pack("<QQII", index + 2, index + 1, len(name), 0) + name
            listing += record.ljust(-len(record) // 8 * -8, b"\0")
        return listing


def _text(name: bytes) -> str:
    return name.removesuffix(b"\0").decode()


def machine_firmware(directory: Path, tee: Tee) -> Firmware:
    """The TEE of the machine in `directory`, as it was saved last."""

    def firmware(data: bytes, privlevel: int) -> tuple[bytes, bytes]:
        try:
            machine = replace(SimulatedMachine.load(directory), vmpl=privlevel)
            evidence = machine.attester(tee).collect(ReportData(data))
        except DeviceError as error:
            raise OSError(error.code, "") from error
        except AgentError as error:
            raise OSError(errno.EIO, "") from error
        return evidence.report, pack_certificate_table(evidence) if tee is Tee.SNP else b""

    return firmware


def main() -> int:
    """Mount and serve; the exit status is 0 at the end of standard input, 1 where there is no FUSE."""
    directory, tee, mountpoint = Path(sys.argv[1]), Tee(sys.argv[2]), Path(sys.argv[3])
    tsm = Tsm(machine_firmware(directory, tee))
    tsm.faults = replace(tsm.faults, provider=PROVIDERS[tee])
    try:
        device = mount(mountpoint)
    except SimulationRefusedError:
        sys.stdout.write(REFUSED)
        return 1
    sys.stdout.write(MOUNTED)
    sys.stdout.flush()
    serve(device, ConfigfsServer(tsm, device).answer, sys.stdin.fileno(), lambda: False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
