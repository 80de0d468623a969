"""`keyturn status`: what a running agent says of itself."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from agent.errors import EXIT_USAGE
from agent.report import STATUS_SCHEMA
from agent.supervisor import DEFAULT_STATUS_FILE
from agent.telling import start_of

MAX_STATUS_BYTES = 64 << 10
EXIT_NOT_SERVING = 1


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "status",
        help=summary,
        description=f"{summary}. Exit status: 0 serving, 1 not (yet, or any more), 2 no agent has written a status.",
        allow_abbrev=False,
    )
    parser.add_argument("--status-file", default=DEFAULT_STATUS_FILE, metavar="FILE", help=f"default {DEFAULT_STATUS_FILE}")
    parser.add_argument("--json", action="store_true", help="print the status document as it is")


def run(args: argparse.Namespace) -> int:
    try:
        with Path(args.status_file).open("rb") as stream:
            status = json.loads(stream.read(MAX_STATUS_BYTES))
        if status["schema"] != STATUS_SCHEMA:
            raise ValueError("another schema")
        text = json.dumps(status) if args.json else _for_people(status)
        alive = start_of(status["agent"]["pid"]) == status["agent"]["started"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"keyturn: no status of an agent in {args.status_file} ({type(error).__name__})", file=sys.stderr)
        return EXIT_USAGE
    print(text)
    if not alive and status["exit_status"] is None:
        print("keyturn: the agent that wrote this is gone, without a last word", file=sys.stderr)
    return 0 if alive and status["phase"] == "serving" else EXIT_NOT_SERVING


def _for_people(status: dict[str, Any]) -> str:
    lines = [
        f"{status['phase']} ({status['mode']}, keyturn {status['version']})",
        f"request id: {status['request_id'] or 'none'}",
    ]
    lines += [
        f"  {stage['name']:<12} {stage['state']:<8} {'' if stage['ms'] is None else stage['ms']} ms"
        for stage in status["stages"]
    ]
    if lease := status["lease"]:
        until = f", until {lease['ends_at']}" if lease["ends_at"] else ""
        lines.append(f"lease: {lease['s']} s{until}, renewals: {lease['renewals']}")
    if status["waiting_for"]:
        lines.append(f"waiting for: {status['waiting_for']}")
    if error := status["error"]:
        lines += [f"{error['class']}: {error['text']}", f"who must act: {error['owner']}", f"next step: {error['next_step']}"]
    return "\n".join(lines)
