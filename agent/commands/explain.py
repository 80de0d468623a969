"""`keyturn explain`: the long form of an error, found by its name or by an exit status."""

import argparse
import difflib
import json
import re
import textwrap
from typing import Any

from agent.errors import EXIT_SERVED, EXIT_STATUS, EXIT_USAGE, AgentError, all_errors
from agent.explanations import EXPLANATIONS, ROLES

_WIDTH = 80
_KEPT_TOGETHER = re.compile(r"`[^`]{1,70}`")  # what can be typed is not broken over two lines
_NO_BREAK = "\N{NO-BREAK SPACE}"
_NO_FAILURE = {EXIT_SERVED: "served, and stopped on request", EXIT_USAGE: "a usage error; the line above it says which"}


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "explain",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "code",
        metavar="CODE",
        nargs="?",
        help="name of an error, with or without Error, or an exit status: every error behind it",
    )
    which.add_argument("--list", action="store_true", help="every error with its exit status; with --json every explanation")
    parser.add_argument("--json", action="store_true", help="print one JSON object an error")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    by_status = sorted(all_errors().values(), key=lambda cls: (_status(cls), cls.__name__))
    found = by_status if args.list else [cls for cls in by_status if _is_meant(cls, args.code)]
    if not found:
        args.usage_error(_unknown(args.code, by_status))
    if args.json:
        for cls in found:
            print(json.dumps(_record(cls)))
    elif args.list:
        print("\n".join(f"{_status(cls)}  {cls.__name__:<26}  {cls.owner.value:<9}  {cls.step.value}" for cls in found))
    else:
        print("\n\n".join(_for_people(cls) for cls in found))
    return 0


def _status(cls: type[AgentError]) -> int:
    return EXIT_STATUS[cls.owner, cls.step]


def _short(name: str) -> str:
    return name.strip().lower().removesuffix("error")


def _is_meant(cls: type[AgentError], code: str) -> bool:
    return code == str(_status(cls)) or _short(code) == _short(cls.__name__)


def _unknown(code: str, classes: list[type[AgentError]]) -> str:
    """What is wrong with the word, and what may have been meant."""
    if code.isascii() and code.isdigit():
        for status, meaning in _NO_FAILURE.items():
            if code == str(status):
                return f"exit status {status} is no error of the boot: {meaning}"
        statuses = sorted({_status(cls) for cls in classes})
        return f"no error ends with exit status {code}; there are {', '.join(map(str, statuses))}"
    names = {_short(cls.__name__): cls.__name__ for cls in classes}
    word = _short(code)
    near = [name for name in names if len(word) > 2 and word in name]
    near += [name for name in difflib.get_close_matches(word, names, n=3, cutoff=0.5) if name not in near]
    hint = f"did you mean {', '.join(names[name] for name in near[:4])}?" if near else "`keyturn explain --list` shows them all"
    return f"no error of this name; {hint}"


def _record(cls: type[AgentError]) -> dict[str, object]:
    text = EXPLANATIONS[cls]
    return {
        "class": cls.__name__,
        "owner": cls.owner.value,
        "step": cls.step.value,
        "exit_status": _status(cls),
        "next_step": cls.next_step,
        "happened": text.happened,
        "check": text.check,
        "withheld": text.withheld,
    }


def _for_people(cls: type[AgentError]) -> str:
    text = EXPLANATIONS[cls]
    lines = [
        cls.__name__,
        f"exit status {_status(cls)}, step {cls.step.value}",
        "",
        "What happened",
        _wrapped(text.happened, "  "),
        "",
        "Who must act",
        _wrapped(f"{cls.owner.value}: {ROLES[cls.owner]}", "  "),
        "",
        "What to check",
        *(_wrapped(step, f"  {number}. ") for number, step in enumerate(text.check, 1)),
        "",
        "What is not told, and why",
        _wrapped(text.withheld, "  "),
    ]
    return "\n".join(lines)


def _wrapped(text: str, first: str) -> str:
    kept = _KEPT_TOGETHER.sub(lambda match: match[0].replace(" ", _NO_BREAK), text)
    filled = textwrap.fill(
        kept,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(_NO_BREAK, " ")
