"""The fuzzer's corpus and a few mutations of it in every test run, and that the fuzzer tells what it finds."""

from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem
from tests.fuzz.__main__ import main
from tests.fuzz.engine import SlowInputError, Target, fuzz, try_input
from tests.fuzz.targets import CORPUS, TARGETS, corpus

MUTATIONS = 200
MAX_CORPUS_BYTES = 300 << 10

# A certificate that nobody has seen before may be worth a warning to a library; what it does then is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_corpus_and_a_few_mutations_raise_only_what_is_documented(target: Target) -> None:
    inputs = list(corpus(target).values())
    run = fuzz(target, inputs, 0, lambda done: done < len(inputs) + MUTATIONS, None)
    assert [(failure.data, failure.reason) for failure in run.failures] == []
    assert run.executions >= MUTATIONS


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_every_target_starts_from_something_its_parser_accepts(target: Target) -> None:
    assert any(try_input(target, data, None).key == () for data in corpus(target).values())


def test_the_corpus_belongs_to_targets_and_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= MAX_CORPUS_BYTES


def broken(data: bytes) -> None:
    if b"b" in data:
        raise KeyError("nobody documented this")
    if b"c" in data:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("c"))


BROKEN = Target("broken", broken, lambda: [b"a", b"c", b"a-b"])


def test_a_foreign_exception_is_printed_and_saved_and_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["broken", "0", "--seed", "5", "--failures", str(tmp_path)], {"broken": BROKEN}) == 1
    printed = capsys.readouterr().out
    for part in ("seed 5", "FAILED broken", b"a-b".hex(), "YS1i", "KeyError"):
        assert part in printed
    (saved,) = (tmp_path / "broken").iterdir()
    assert saved.read_bytes() == b"a-b"


def test_documented_exceptions_are_no_failure(tmp_path: Path) -> None:
    documented = Target("broken", broken, BROKEN.seeds, (KeyError,))
    assert main(["--all", "0.1", "--failures", str(tmp_path)], {"broken": documented}) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_accepted_input_that_does_not_survive_the_round_trip_is_a_failure() -> None:
    def run(data: bytes) -> None:
        assert data.strip() == data

    found = fuzz(Target("strip", run, list), [b"x", b" x"], 0, lambda done: done < 2, None)
    assert [failure.data for failure in found.failures] == [b" x"]


def test_an_input_that_takes_too_long_is_ended_and_is_a_failure() -> None:
    def run(_: bytes) -> None:
        while True:
            pass

    (failure,) = fuzz(Target("slow", run, list), [b""], 0, lambda done: done < 1, 0.05).failures
    assert isinstance(failure.reason, SlowInputError)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_the_same_seed_gives_the_same_inputs_and_another_seed_others(length: int) -> None:
    def inputs(seed: int) -> list[bytes]:
        tried: list[bytes] = []
        fuzz(Target("any", tried.append, list), [bytes(length)], seed, lambda done: done < 200, None)
        return tried

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)
