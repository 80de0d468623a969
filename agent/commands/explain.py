"""`keyturn explain`: what failed, who must act and what to check, from whatever is at hand.

The long form of an error, found by its name or an exit status; or what a token, an event or a status file says
(`diagnosis.py`).
"""

import argparse
import difflib
import json
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.closed import Ident
from agent.errors import (
    EXIT_SERVED,
    EXIT_STATUS,
    EXIT_USAGE,
    AgentError,
    ConfigError,
    ConfigProblem,
    TokenError,
    all_errors,
)
from agent.explanations import EXPLANATIONS, ROLES

if TYPE_CHECKING:
    from agent.commands.diagnosis import Diagnosis

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
        "what",
        metavar="CODE|TOKEN|EVENT|FILE",
        nargs="?",
        help=(
            "CODE: name of an error, with or without Error, or an exit status: every error behind it. TOKEN: of a broker or of "
            "Trustee; EVENT: a line of a boot's output; both as they are, or in a FILE, as may be a whole log or a status; "
            "- is standard input. Nothing is verified"
        ),
    )
    which.add_argument("--list", action="store_true", help="every error with its exit status; with --json every explanation")
    parser.add_argument("--json", action="store_true", help="print JSON: one object an error, or one for what was given")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    by_status = sorted(all_errors().values(), key=lambda cls: (_status(cls), cls.__name__))
    found = by_status if args.list else [cls for cls in by_status if _is_meant(cls, args.what)]
    if not found:
        return _explain_input(args, by_status)
    if args.json:
        for cls in found:
            print(json.dumps(_record(cls)))
    elif args.list:
        print("\n".join(f"{_status(cls)}  {cls.__name__:<26}  {cls.owner.value:<9}  {cls.step.value}" for cls in found))
    else:
        print("\n\n".join(_for_people(cls) for cls in found))
    return 0


def _explain_input(args: argparse.Namespace, by_status: list[type[AgentError]]) -> int:
    from agent.commands.diagnosis import diagnose  # the formats of the handshake; an error's name needs none of them

    try:
        if (text := _read(args.what)) is None:
            raise ValueError(_unknown(args.what, by_status))
        diagnosis = diagnose(text, int(time.time()))
    except TokenError as error:
        args.usage_error(f"this is no token that can be read: its {error.check.value} does not hold")
    except ValueError as error:
        args.usage_error(str(error))
    print(json.dumps(diagnosis.record) if args.json else _told(diagnosis))
    return 0


def _read(what: str) -> str | None:
    """Standard input, a file, or the argument itself where it has the form of a token or of JSON."""
    from agent.commands.diagnosis import MAX_INPUT_BYTES

    try:
        if what == "-":
            data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with Path(what).open("rb") as stream:
                data = stream.read(MAX_INPUT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or a surrogate
        if what.lstrip().startswith("{") or what.count(".") == 2:
            return what
        if "/" in what:
            raise ConfigError(ConfigProblem.NOT_FOUND, Ident("FILE")) from error
        return None
    if len(data) > MAX_INPUT_BYTES:
        raise ConfigError(ConfigProblem.TOO_LARGE, Ident("FILE"))
    return data.decode("utf-8", "replace")


def _told(diagnosis: "Diagnosis") -> str:
    lines = [_wrapped(diagnosis.headline, "")]
    width = max((len(name) for name, _ in diagnosis.facts), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in diagnosis.facts]
    lines += ["", "What failed"]
    if not diagnosis.problems:
        lines.append(_wrapped(diagnosis.without_problems, "  "))
    for number, problem in enumerate(diagnosis.problems, 1):
        first = f"  {number}. "
        for said in problem.said:
            lines.append(_wrapped(said, first))
            first = " " * len(first)
        lines.append(_wrapped(f"who must act: {problem.owner.value}: {ROLES[problem.owner]}", " " * 8))
        lines.append(_wrapped(f"next step: {problem.next_step}", " " * 8))
        if problem.error:
            lines.append(f"        more: `keyturn explain {problem.error.__name__}`")
    return "\n".join(lines)


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
