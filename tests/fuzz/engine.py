"""Mutations of seeds, and what counts as a failure. Knows no parser (`targets.py`) and writes no file (`__main__.py`).

A run is decided by target, corpus and seed: the n-th input is the same on every machine, only their number varies with time.
There is no instrumentation. Instead an input whose outcome is new (another exception, or raised on another line of ours)
becomes a seed, which is how a run gets behind the first check of a parser.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from agent.errors import AgentError

MAX_INPUT_BYTES = 64 << 10
MAX_LEARNED = 500
INPUT_LIMIT_S = 1.0
"""Processor time for one input: another program on the same machine makes none of them slow."""

_BITS = (7, 8, 15, 16, 31, 32, 63, 64)
_NUMBERS = (0, 1, *((1 << bits) - 1 for bits in _BITS), *(1 << bits for bits in _BITS))
_WORDS = (
    *(str(number).encode() for number in (-1, *_NUMBERS, 1 << 64, -(1 << 63) - 1)),
    *b'null true false [] {} "" NaN Infinity -Infinity 1e400 0.5 nan inf 1979-05-27'.split(),
    *b"1979-05-27T07:32:00Z ../ .. \\ \" ' = , : -----".split(),
    b'"\\ud800"', b"\\u0000", b"\x00", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\r\n",
    b"9" * 5000, b"[" * 2000, b'{"a":' * 2000,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: of the target and of its corpus folder.
        run: feeds one input to the parser and asserts what must hold for an accepted one.
        seeds: inputs that it accepts, beside those of the corpus.
        documented: what it may raise beside an AgentError.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    documented: tuple[type[Exception], ...] = ()


@dataclass(frozen=True)
class Failure:
    """An input and what went wrong with it: an exception that nobody documented, or too much time."""

    target: str
    data: bytes
    reason: BaseException


class SlowInputError(BaseException):
    """No Exception, so that no parser takes it for one of its own."""


@dataclass
class Outcome:
    """How an input ended. Equal keys: by the same exception, raised on the same line of ours."""

    key: tuple[object, ...] = ()
    reason: BaseException | None = None


@dataclass
class Run:
    """What a run of one target did."""

    executions: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def fuzz(target: Target, corpus: Sequence[bytes], seed: int, go_on: Callable[[int], bool], limit_s: float | None) -> Run:
    """Every input of the corpus, then mutations for as long as `go_on(executions)`. One failure of each kind is kept.

    Args:
        target: the parser.
        corpus: at least one input.
        seed: of the mutations.
        go_on: asked before each mutation.
        limit_s: processor time for one input, None for no limit.
    """
    draw = random.Random(f"{target.name} {seed}")  # never the hash of a tuple, which differs from process to process
    pool, learned = list(dict.fromkeys(corpus)), 0
    seen: set[tuple[object, ...]] = set()
    failed: set[tuple[object, ...]] = set()
    run = Run()
    started = time.monotonic()

    def execute(data: bytes) -> bool:
        """Was the outcome a new one?"""
        outcome = try_input(target, data, limit_s)
        run.executions += 1
        if outcome.reason is not None and outcome.key not in failed:
            failed.add(outcome.key)
            run.failures.append(Failure(target.name, data, outcome.reason))
        new = outcome.key not in seen
        seen.add(outcome.key)
        return new and outcome.reason is None

    for data in pool[:]:
        execute(data)
    while go_on(run.executions):
        data = mutate(draw, pool)
        if execute(data) and learned < MAX_LEARNED:
            pool.append(data)
            learned += 1
    run.seconds = time.monotonic() - started
    return run


def try_input(target: Target, data: bytes, limit_s: float | None) -> Outcome:
    """Feed one input."""
    expected: tuple[type[Exception], ...] = (AgentError, *target.documented)
    try:
        with _limited(limit_s):
            target.run(data)
    except expected as error:
        return Outcome((*_place(error), *_fields(error)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # SlowInputError, and the panic of a library in Rust, are no Exception
        return Outcome(_place(error), error)
    return Outcome()


def _place(error: BaseException) -> tuple[object, ...]:
    """The exception's class and the innermost line of `agent`."""
    line: object = None
    trace = error.__traceback__
    while trace is not None:
        if "/agent/" in trace.tb_frame.f_code.co_filename:
            line = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return type(error), line


def _fields(error: BaseException) -> tuple[object, ...]:
    """Which field or check it names: one helper often raises for all of them."""
    return tuple(getattr(error, name, None) for name in ("field", "check", "problem", "key"))


@contextmanager
def _limited(limit_s: float | None) -> Iterator[None]:
    """Ends the block with SlowInputError. Code that never comes back from C is not ended, but counts when it does."""
    if limit_s is None:
        yield
        return

    def too_slow(_number: int, _frame: FrameType | None) -> None:
        raise SlowInputError(f"more than {limit_s} s of processor time")

    before = signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- mutations --------------------------------------------------------------------------------------------------------


def mutate(draw: random.Random, pool: Sequence[bytes]) -> bytes:
    """One to eight changes, mostly few, of an input of the pool."""
    data = draw.choice(pool)
    for _ in range(min(1 + int(draw.expovariate(0.7)), 8)):
        data = draw.choice(_MUTATIONS)(draw, data, pool)
    return data[:MAX_INPUT_BYTES]


def _part(draw: random.Random, data: bytes) -> tuple[int, int]:
    """A slice of `data`, mostly short."""
    start = draw.randrange(len(data) + 1)
    return start, min(start + int(draw.expovariate(0.05)), len(data))


def _flip_bit(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = draw.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1 << draw.randrange(8),)) + data[at + 1 :]


def _set_byte(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(1) + data[at + 1 :]


def _truncate(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _delete(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _part(draw, data)
    return data[:start] + data[end:]


def _double(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _part(draw, data)
    return data[:start] + data[start:end] * draw.choice((2, 2, 3, 100)) + data[end:]


def _splice(draw: random.Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    other = draw.choice(pool)
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


def _transplant(draw: random.Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    other = draw.choice(pool)
    (start, end), (from_, to) = _part(draw, data), _part(draw, other)
    return data[:start] + other[from_:to] + data[end:]


def _number(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A whole number at a boundary, or a little beside what stands there: what length fields dislike."""
    width, order = draw.choice((1, 2, 3, 4, 8)), draw.choice(("little", "big"))
    if len(data) < width:
        return data
    at = draw.randrange(len(data) - width + 1)
    if draw.random() < 0.5:
        value = draw.choice((*_NUMBERS, len(data), len(data) - at))
    else:
        value = int.from_bytes(data[at : at + width], order) + draw.randint(-4, 4)  # type: ignore[arg-type]  # a literal
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, order) + data[at + width :]  # type: ignore[arg-type]


def _word(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _part(draw, data)
    return data[:start] + draw.choice(_WORDS) + data[draw.choice((start, end)) :]


def _value(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Another value in the place of one of a text: what stands between two of its marks."""
    marks = [at for at, byte in enumerate(data) if byte in b" \",:=[]{}.\r\n/'"]
    if len(marks) < 2:
        return data
    first = draw.randrange(len(marks) - 1)
    start, end = marks[first] + 1, marks[min(first + draw.choice((1, 1, 1, 2, 3)), len(marks) - 1)]
    return data[:start] + draw.choice(_WORDS) + data[max(start, end) :]


def _random(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _part(draw, data)
    return data[:start] + draw.randbytes(end - start) + data[end:]


_Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
_MUTATIONS: tuple[_Mutation, ...] = (
    _flip_bit, _set_byte, _truncate, _delete, _double, _splice, _transplant, _number, _number, _word, _value, _value, _random,
)  # fmt: skip
