"""`scripts/fuzz`: fuzz one parser of outside bytes, or all of them one after the other."""

import argparse
import base64
import hashlib
import random
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fuzz.engine import INPUT_LIMIT_S, Failure, Run, Target, fuzz
from tests.fuzz.targets import TARGETS, corpus, renew

_SHOWN_BYTES = 256

_HELP = """\
An exception that the parser does not document, an accepted input that does not survive the round trip, or more than one
second of processor time for one input is a failure. It is printed and saved in FAILURES/TARGET/; move it to
tests/fuzz/corpus/TARGET/ together with the fix, and every test run replays it.

`.ci/run` gives all targets 36 seconds together. For a longer run: `scripts/fuzz --all 3600`, or one target and another
seed for as long as you like: `scripts/fuzz snp_certificate 600 --seed 7`. A failure comes back with the seed that was printed.
"""


def main(arguments: Sequence[str] | None = None, targets: Mapping[str, Target] = TARGETS) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", epilog=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=sorted(targets), metavar="TARGET", help="see --list")
    parser.add_argument("seconds", nargs="?", type=float, metavar="SECONDS", help="how long to go on")
    parser.add_argument("--all", type=float, metavar="SECONDS", help="every target, in equal shares of SECONDS together")
    parser.add_argument("--list", action="store_true", help="the targets")
    parser.add_argument("--seed", type=int, help="of the mutations; default: a new one, which is printed")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--renew", action="store_true", help="make silicon and the corpus files named made-* again")
    given = parser.parse_args(arguments)
    if given.list:
        for name, target in targets.items():
            print(f"{name:20} {len(corpus(target)):3} inputs")
        return 0
    if given.renew:
        renew()
        return 0
    if (given.all is None) == (given.seconds is None):
        parser.error("TARGET SECONDS, --all SECONDS or --list")
    names = list(targets) if given.target is None else [given.target]
    seconds = given.seconds if given.all is None else given.all / len(names)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    # Libraries warn about certificates that nobody has seen before; in our tests a warning is an error, in a guest it is none.
    warnings.simplefilter("ignore")
    failed = False
    for name in names:
        run = fuzz_for(targets[name], seed, seconds)
        print(f"{name:20} {run.executions:8} inputs {run.executions / max(run.seconds, 1e-9):8.0f}/s", flush=True)
        for failure in run.failures:
            failed = True
            report(failure, given.failures)
    return int(failed)


def fuzz_for(target: Target, seed: int, seconds: float) -> Run:
    """Fuzz one target for so long."""
    inputs = list(corpus(target).values())
    end = time.monotonic() + seconds
    return fuzz(target, inputs, seed, lambda _: time.monotonic() < end, INPUT_LIMIT_S)


def report(failure: Failure, folder: Path) -> None:
    """Print a failure, and save its input."""
    path = folder / failure.target / hashlib.sha256(failure.data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(failure.data)
    print(f"FAILED {failure.target}: {len(failure.data)} bytes, saved as {path}")
    short = len(failure.data) <= _SHOWN_BYTES
    print(f"  hex    {failure.data[:_SHOWN_BYTES].hex()}{'' if short else '…'}")
    print(f"  base64 {base64.b64encode(failure.data[:_SHOWN_BYTES]).decode()}{'' if short else '…'}")
    print("".join(traceback.format_exception(failure.reason)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
