"""A guest in QEMU, without acceleration: what it is given, and what is read at its console, with the host's clock."""

import json
import re
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LAST_LINE = re.compile(r"keyturn: end: exit status ([0-9]+)(?:, ([A-Za-z]+Error))?")


@dataclass(frozen=True)
class Image:
    """What is booted."""

    kernel: Path
    initrd: Path
    """Product, or a base without the agent, and overlay, one after the other."""
    command_line: str


@dataclass
class Guest:
    """A running machine; at the end of the `with` block it is gone."""

    image: Image
    folder: Path
    firmware: Path
    initdata: Path | None
    forwarded: dict[int, int]
    memory_mib: int = 1024
    network: bool = True
    parameters: str = ""
    extension: Path | None = None
    """A guest extension image, plugged as Kata plugs the one named `keyturn`."""
    volume: Path | None = None
    """A disk with an encrypted volume."""
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.console_log = self.folder / "console.log"
        qmp = self.folder / "qmp"
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in self.forwarded.items())
        # One processor: with two, QEMU's emulation now and then runs into code that the kernel is just patching (an int3 oops).
        command = [
            *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"),
            *("-m", str(self.memory_mib), "-display", "none", "-no-reboot", "-nodefaults", "-no-user-config"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=hand,path={self.folder / 'hand'},server=on,wait=off", "-serial", "chardev:hand"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=tsm,path={self.firmware}"),
            *("-device", "virtserialport,chardev=tsm,name=keyturn.boot-test.tsm"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", f"{self.image.command_line} loglevel=6 {self.parameters}"),
        ]
        if self.initdata:
            command += ["-drive", f"file={self.initdata},format=raw,if=none,id=initdata,readonly=on"]
            command += ["-device", "virtio-blk-pci,drive=initdata"]
        if self.extension:
            command += ["-drive", f"file={self.extension},format=raw,if=none,id=extension,readonly=on"]
            command += ["-device", "virtio-blk-pci,drive=extension,serial=extension-keyturn"]
        if self.volume:
            command += ["-drive", f"file={self.volume},format=raw,if=none,id=volume,readonly=on"]
            command += ["-device", "virtio-blk-pci,drive=volume"]
        if self.network:
            command += ["-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="]
        self._began = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._qmp_path = qmp
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        with self.console_log.open("wb") as log:
            for raw in self.process.stdout:
                log.write(raw)
                log.flush()
                line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode(errors="replace")).strip()
                with self._news:
                    self.lines.append((time.monotonic() - self._began, line))
                    self._news.notify_all()

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """The first console line with this pattern, from the beginning. Raises TimeoutError with the console's end."""
        deadline, seen = time.monotonic() + timeout_s, 0
        with self._news:
            while True:
                for _, line in self.lines[seen:]:
                    if re.search(pattern, line):
                        return line
                seen = len(self.lines)
                if self.process.poll() is not None and not self._reader.is_alive():
                    break
                if not self._news.wait(min(1.0, max(0.0, deadline - time.monotonic()))) and time.monotonic() >= deadline:
                    break
        raise TimeoutError(f"no {pattern!r} on the console:\n" + "\n".join(line for _, line in self.lines[-25:]))

    def wait_for_end(self, timeout_s: float) -> tuple[int, str | None]:
        """Exit status and error class of the agent's last line, once the machine is off. A panic has no such line."""
        self.process.wait(timeout_s)
        self._reader.join()
        for _, line in reversed(self.lines):
            if match := LAST_LINE.search(line):
                return int(match[1]), match[2]
        raise AssertionError("the machine ended without a last line:\n" + "\n".join(line for _, line in self.lines[-25:]))

    def seconds(self, pattern: str) -> float | None:
        """When the first line with this pattern came."""
        return next((at for at, line in self.lines if re.search(pattern, line)), None)

    def hand(self, command: str) -> str:
        """What a root shell inside the guest answers; only where the first program leaves one."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(30)
            end.connect(str(self.folder / "hand"))
            end.sendall(f"{command}; echo 'the'-end\n".encode())
            answer = b""
            while b"the-end\n" not in answer:
                chunk = end.recv(4096)
                assert chunk, "the machine is gone"
                answer += chunk
        return answer.decode(errors="replace").replace("the-end\n", "")

    def qmp(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One command to the machine itself."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(60)
            end.connect(str(self._qmp_path))
            with end.makefile("rwb") as stream:
                json.loads(stream.readline())
                for name, body in (("qmp_capabilities", {}), (command, arguments)):
                    stream.write(json.dumps({"execute": name, "arguments": body}).encode() + b"\n")
                    stream.flush()
                    while "event" in (answer := json.loads(stream.readline())):
                        pass
        if "error" in answer:
            raise RuntimeError(f"{command} was refused")
        with suppress(KeyError):
            return dict(answer["return"])
        return {}
