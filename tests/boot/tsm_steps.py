"""What the kernel's configfs-tsm does, as one table: each step with what must come of it.

`test_sim_configfs.py` holds it against the simulated one and against the record of a kernel, the boot test against the kernel's
own module in a guest, where this file is a program (standard library only):

    python3 tsm_steps.py ROOT INSMOD-COMMAND RMMOD-COMMAND

The provider behind it is the test's: it answers every inblob with the same bytes and zeros, and does what `told` wrote into it.
"""

import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DELAY_S = 1.0
REPORT_BYTES = 600
INBLOB_BYTES = 64
GUID = b"63da758d-e664-4564-adc5-f4b93be8accd"


# --- the provider -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """How the provider answers.

    Attributes:
        code: the errno it fails with, 0 for none.
        seconds: it takes before.
        report: otherwise.
    """

    code: int
    seconds: float
    report: bytes


def told(size: int = REPORT_BYTES, seconds: float = 0, codes: tuple[int, ...] = ()) -> bytes:
    """An inblob for a report of `size` bytes after so many seconds; the first requests fail with these errnos."""
    return f"told {size} {seconds} {' '.join(map(str, codes))}".encode().ljust(INBLOB_BYTES)


class Provider:
    def __init__(self) -> None:
        self._asked: dict[bytes, int] = {}

    def answer(self, inblob: bytes) -> Told:
        number = self._asked[inblob] = self._asked.get(inblob, 0) + 1
        if not inblob.startswith(b"told "):
            return Told(0, 0, inblob.ljust(REPORT_BYTES, b"\0"))
        size, seconds, *codes = inblob.split()[1:]
        code = int(codes[number - 1]) if number <= len(codes) else 0
        return Told(code, float(seconds), inblob.ljust(int(size), b"\0")[: int(size)])


# --- what is done -----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A configfs-tsm, and whoever loads and unloads its provider."""

    root: Path
    load: Callable[[], object]
    unload: Callable[[], object]
    descriptors: dict[str, int] = field(default_factory=dict)
    other_waited: tuple[bool, bool] = (False, False)

    @property
    def entry(self) -> Path:
        return self.root / "entry"

    def read(self, name: str) -> bytes:
        return (self.entry / name).read_bytes()

    def write(self, name: str, *parts: bytes) -> int:
        descriptor = os.open(self.entry / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            return sum(os.write(descriptor, part) for part in parts)
        finally:
            os.close(descriptor)

    def attributes(self) -> list[tuple[str, str, int]]:
        found = ((name, (self.entry / name).stat()) for name in sorted(os.listdir(self.entry)))
        return [(name, oct(status.st_mode), status.st_size) for name, status in found]

    def outblob(self) -> tuple[int, bytes]:
        return len(self.read("outblob")), self.read("outblob")[:4]

    def in_four_parts(self) -> tuple[object, ...]:
        descriptor = os.open(self.entry / "inblob", os.O_WRONLY)
        for part in range(4):
            os.write(descriptor, bytes((part,)) * 16)
        before = self.read("generation")
        os.close(descriptor)
        return "gen before close", before, "after", self.read("generation"), self.read("outblob")[:20]

    def twice(self) -> tuple[int, int, int, None]:
        descriptor = os.open(self.entry / "outblob", os.O_RDONLY)
        try:
            first, second, third = (len(os.read(descriptor, size)) for size in (64, 4096, 4096))
            return first, second, third, None
        finally:
            os.close(descriptor)

    def at_an_offset(self, name: str, use: Callable[[int], object]) -> object:
        descriptor = os.open(self.entry / name, os.O_RDONLY)
        try:
            return use(descriptor)
        finally:
            os.close(descriptor)

    def answered(self, inblob: bytes) -> bytes:
        self.write("inblob", inblob)
        return self.read("outblob")

    def fail(self, *codes: int) -> bytes:
        """The first of the codes; the others come with the next reads."""
        return self.answered(told(codes=codes))

    def behind_a_slow_reader(self) -> int:
        """Somebody else's entry meanwhile. What the reader got."""
        other, size = self.root / "other", [0]
        other.mkdir()
        self.write("inblob", told(8000, DELAY_S))
        (other / "inblob").write_bytes(told(8001, DELAY_S))
        reader = threading.Thread(target=lambda: size.insert(0, len(self.read("outblob"))))
        reader.start()
        time.sleep(DELAY_S / 5)
        began = time.monotonic()
        (other / "generation").read_bytes()
        generation_s = time.monotonic() - began
        (other / "outblob").read_bytes()
        self.other_waited = generation_s > DELAY_S / 2, time.monotonic() - began > 1.5 * DELAY_S
        reader.join()
        other.rmdir()
        return size[0]

    def slow_with_a_signal(self) -> int:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, DELAY_S / 5)
        try:
            return len(self.answered(told(8000, DELAY_S)))
        finally:
            signal.signal(signal.SIGALRM, before)

    def rmdir_below_an_open_file(self) -> None:
        self.descriptors["open"] = os.open(self.entry / "generation", os.O_RDONLY)
        self.entry.rmdir()

    def read_the_removed(self) -> bytes:
        descriptor = self.descriptors.pop("open")
        try:
            return os.read(descriptor, 64)
        finally:
            os.close(descriptor)

    def lose_the_provider(self) -> None:
        self.entry.mkdir()
        self.unload()

    def through_a_duplicate(self) -> tuple[bytes, bytes]:
        """The generation before and after the last close of one open file."""
        descriptor = os.open(self.entry / "inblob", os.O_WRONLY)
        os.write(descriptor, bytes(INBLOB_BYTES))
        last = os.dup(descriptor)
        os.close(descriptor)
        before = self.read("generation")
        os.close(last)
        return before, self.read("generation")

    def lose_the_provider_with_a_report(self) -> bytes:
        report = self.answered(bytes(INBLOB_BYTES))
        self.unload()
        return report[:4]

    def create_a_file(self) -> None:
        os.close(os.open(self.entry / "new", os.O_WRONLY | os.O_CREAT))

    def long_name(self) -> None:
        path = self.root / ("n" * 200)
        path.mkdir()
        path.rmdir()


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: as in the record.
        act: what is done.
        expected: what comes of it; of a failure the name of its errno.
        at_least_s, at_most_s: how long it takes.
        recorded: what the record says, where it is not the text of `expected`.
        fuse: where a FUSE file system cannot do as the kernel does.
    """

    name: str
    act: Callable[[Bench], object]
    expected: object
    at_least_s: float = 0
    at_most_s: float = 60
    recorded: str | None = None
    fuse: object = None


def _write(name: str, data: bytes, expected: object) -> Step:
    return Step(f"write {name} {data!r}", lambda bench: bench.write(name, data), expected)


def _generation(number: int, name: str = "generation") -> Step:
    return Step(name, lambda bench: bench.read("generation"), b"%d\n" % number)


def _outblob(name: str, expected: object) -> Step:
    return Step(name, lambda bench: bench.read("outblob"), expected)


_OPTION = ("0o100200", 4096)
ATTRIBUTES = [
    ("auxblob", "0o100444", 0),
    ("generation", "0o100444", 4096),
    ("inblob", "0o100200", 0),
    ("manifestblob", "0o100444", 0),
    ("outblob", "0o100444", 0),
    ("privlevel", *_OPTION),
    ("privlevel_floor", "0o100444", 4096),
    ("provider", "0o100444", 4096),
    ("service_guid", *_OPTION),
    ("service_manifest_version", *_OPTION),
    ("service_provider", *_OPTION),
]
RECORDED = [
    Step("mkdir without provider", lambda bench: bench.entry.mkdir(), "ENXIO"),
    Step("insmod fake provider ok", lambda bench: bench.load(), None, recorded=""),
    Step("mkdir", lambda bench: bench.entry.mkdir(), None),
    Step("mkdir again", lambda bench: bench.entry.mkdir(), "EEXIST"),
    Step("", lambda bench: bench.attributes(), ATTRIBUTES),
    Step("provider", lambda bench: bench.read("provider"), b"sev_guest\n"),
    _generation(0),
    _outblob("outblob before inblob", "EINVAL"),
    Step("inblob 64 via open(wb)", lambda bench: (bench.entry / "inblob").write_bytes(b"A" * 64), 64),
    _generation(1),
    Step("outblob", Bench.outblob, (600, b"AAAA")),
    Step("inblob 65", lambda bench: bench.write("inblob", bytes(65)), "EFBIG"),
    _generation(2, "generation after 65"),
    _outblob("outblob after 65", "EINVAL"),
    Step("inblob 10", lambda bench: bench.write("inblob", bytes(10)), 10),
    _generation(3),
    _outblob("outblob after short inblob", "EINVAL"),
    Step("inblob empty (open/close no write)", lambda bench: bench.write("inblob"), 0),
    _generation(3),
    Step("inblob 64", lambda bench: bench.write("inblob", bytes(64)), 64),
    Step("4x16 writes, one close", Bench.in_four_parts, ("gen before close", b"4\n", "after", b"5\n", bytes(16) + b"\1" * 4)),
    Step("O_RDONLY inblob", lambda bench: bench.read("inblob"), "EACCES"),
    Step("O_WRONLY outblob", lambda bench: bench.write("outblob"), "EACCES"),
    Step("read outblob twice same fd", Bench.twice, (64, 536, 0, None)),
    Step("lseek outblob", lambda bench: bench.at_an_offset("outblob", lambda file: os.lseek(file, 0, os.SEEK_SET)), "ESPIPE"),
    Step("pread", lambda bench: bench.at_an_offset("outblob", lambda file: len(os.pread(file, 64, 8))), 64, fuse="ESPIPE"),
    _write("privlevel", b"0", 1),
    _write("privlevel", b"3\n", 2),
    _write("privlevel", b"4", "EINVAL"),
    _write("privlevel", b"\x00", "EINVAL"),
    _write("privlevel", b"x", "EINVAL"),
    _write("service_guid", b"zzz", "EINVAL"),
    _write("service_provider", b"svsm", 4),
    _generation(9),  # a guid that is none counts
    Step("outblob, provider returns EIO", lambda bench: bench.fail(5, 16, 110, 25), "EIO"),
    _outblob("outblob, provider returns EBUSY", "EBUSY"),
    _outblob("outblob, provider returns ETIMEDOUT", "ETIMEDOUT"),
    _outblob("outblob, provider returns ENOTTY", "ENOTTY"),
    Step("outblob again same generation after failure", lambda bench: len(bench.read("outblob")), 600),
    Step("outblob, provider ok with 0 bytes", lambda bench: bench.answered(told(0)), b""),
    Step("auxblob (none)", lambda bench: bench.read("auxblob"), b""),
    Step("outblob 40000 bytes", lambda bench: bench.answered(told(40_000)), "EFBIG"),
    Step("outblob slow", lambda bench: len(bench.answered(told(8000, DELAY_S))), 8000, at_least_s=DELAY_S),
    Step("outblob cached", lambda bench: len(bench.read("outblob")), 8000, at_most_s=0.9 * DELAY_S),
    Step("  slow reader a", Bench.behind_a_slow_reader, 8000, at_least_s=2 * DELAY_S),
    Step(
        "concurrency across entries",
        lambda bench: bench.other_waited,
        (True, True),
        recorded=r"other entry: generation read took 1\.\d+, outblob 1\.\d+",
    ),
    Step("signal during slow read (python retries EINTR)", Bench.slow_with_a_signal, 8000, at_least_s=DELAY_S),
    Step("rmdir with open fd", Bench.rmdir_below_an_open_file, None),
    Step("read after rmdir", Bench.read_the_removed, "ENOENT"),
    Step("rmmod with item present ", Bench.lose_the_provider, None, recorded=""),
    Step("provider after rmmod", lambda bench: bench.read("provider"), "ENXIO"),
    _outblob("outblob after rmmod", "EINVAL"),
    _generation(0, "generation after rmmod"),
    Step("rmdir", lambda bench: bench.entry.rmdir(), None),
    Step("insmod fake provider ok", lambda bench: bench.load(), None, recorded=""),
    Step("name with slash-less long", Bench.long_name, None),
]
FURTHER = [
    Step("mkdir", lambda bench: bench.entry.mkdir(), None),
    _write("privlevel", b"0x2\n", 4),
    _write("privlevel", b"+03", 3),
    _write("privlevel", b"08", "EINVAL"),
    _write("privlevel", b" 1", "EINVAL"),
    _write("privlevel", b"1\n\n", "EINVAL"),
    _write("privlevel", b"4294967296", "ERANGE"),
    _generation(2),
    _write("service_guid", GUID, len(GUID)),
    _write("service_manifest_version", b"1", 1),
    _write("service_manifest_version", b"x", "EINVAL"),
    _generation(4),
    Step("pread generation", lambda bench: bench.at_an_offset("generation", lambda file: os.pread(file, 8, 1)), b"\n"),
    Step("the last close counts", Bench.through_a_duplicate, (b"4\n", b"5\n")),
    Step("outblob of zeros", Bench.outblob, (600, bytes(4))),
    Step("manifestblob (none)", lambda bench: bench.read("manifestblob"), b""),
    Step("mkdir in an entry", lambda bench: (bench.entry / "inner").mkdir(), "EPERM"),
    Step("create a file in an entry", Bench.create_a_file, "EACCES"),
    Step("unlink an attribute", lambda bench: (bench.entry / "outblob").unlink(), "EPERM"),
    Step("rmmod after a report", Bench.lose_the_provider_with_a_report, bytes(4)),
    Step("the report after rmmod", Bench.outblob, (600, bytes(4))),
    Step("privlevel_floor after rmmod", lambda bench: bench.read("privlevel_floor"), "ENXIO"),
    Step("privlevel after rmmod", lambda bench: bench.write("privlevel", b"0"), "ENXIO"),
    Step("inblob after rmmod", lambda bench: bench.write("inblob", b"B" * 64), 64),
    _outblob("outblob of an inblob after rmmod", "ENXIO"),
    Step("rmdir", lambda bench: bench.entry.rmdir(), None),
]


@dataclass(frozen=True)
class Outcome:
    step: Step
    got: object
    seconds: float
    fuse: bool

    @property
    def as_expected(self) -> bool:
        expected = self.step.fuse if self.fuse and self.step.fuse is not None else self.step.expected
        return self.got == expected and self.step.at_least_s <= self.seconds <= self.step.at_most_s


def outcomes(bench: Bench, *, fuse: bool) -> Iterator[Outcome]:
    """Every step done, in order."""
    for step in (*RECORDED, *FURTHER):
        began = time.monotonic()
        try:
            got = step.act(bench)
        except OSError as error:
            got = errno.errorcode[error.errno or 0]
        yield Outcome(step, got, time.monotonic() - began, fuse)


def main() -> int:
    root, load, unload = sys.argv[1:]
    bench = Bench(
        Path(root),
        lambda: subprocess.run(shlex.split(load), check=True) and None,
        lambda: subprocess.run(shlex.split(unload), check=True) and None,
    )
    done = list(outcomes(bench, fuse=False))
    for outcome in done:
        if not outcome.as_expected:
            print(f"{outcome.step.name}: {outcome.got!r} in {outcome.seconds:.2f} s, expected {outcome.step.expected!r}")
    good = sum(outcome.as_expected for outcome in done)
    print(f"{good} of {len(done)} steps as expected")
    return 0 if good == len(done) else 1


if __name__ == "__main__":
    sys.exit(main())
