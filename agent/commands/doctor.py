"""`keyturn doctor`: what a boot would meet in this guest, for people or for programs."""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from agent import unhandled
from agent.commands.run import add_proxy, open_gpus, open_tee
from agent.config import Selection
from agent.config_source import FoundConfig, find_in_guest, from_file, from_initdata_file
from agent.doctor import CHECKS
from agent.examination import Finding, Guest, examine, exit_status


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "doctor",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Every check is made, whatever the others find: `ok`, with what was "
        "seen, `skipped` with the reason, or `FAILED` with the error, who must act, and the next step. Nothing is changed: no "
        "key is asked for, no GPU ready state is set, and no driver or route is waited for.",
        epilog=f"Checks, in the order of a boot: {', '.join(CHECKS)}. Exit status: 0 when none failed, else that of the first "
        "failure, at length with `keyturn explain EXIT_STATUS`. In a guest whose agent serves, what that agent holds is found "
        "taken: the GPU ready state, a given folder, the server's address.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        metavar="FILE",
        help="configuration, - for standard input; default: what this guest was launched with, as `keyturn run --guest` finds "
        "it",
    )
    source.add_argument("--initdata", metavar="FILE", help="initdata document with an entry keyturn.toml")
    parser.add_argument("--uri", metavar="URI", help="which entry of artifact.allowed, where there are several")
    parser.add_argument(
        "--offline", action="store_true", help="leave out what needs the network: route, broker, a store by URL"
    )
    add_proxy(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: exit_status and the list of checks")


def run(args: argparse.Namespace) -> int:
    # stderr is JSON lines, and not for libraries to write; `cryptography` warns about oddities of a host's certificates.
    unhandled.silence_libraries()
    warnings.simplefilter("ignore")
    find: Callable[[], FoundConfig | None] = find_in_guest
    if args.config is not None:
        find = partial(from_file, args.config)
    elif args.initdata is not None:
        find = partial(from_initdata_file, args.initdata)
    asked = Selection(args.uri) if args.uri else None
    guest = Guest(find, open_tee, open_gpus, args.offline, args.proxy, asked=asked)

    findings = []
    for finding in examine(guest, CHECKS):
        findings.append(finding)
        if not args.json:
            print(_line(finding), flush=True)
    status = exit_status(findings)
    if args.json:
        print(json.dumps({"exit_status": status, "checks": [finding.to_record() for finding in findings]}))
    return status


def _line(finding: Finding) -> str:
    if finding.error is not None:
        error = finding.error
        return f"FAILED   {finding.check}: {type(error).__name__}: {error}; next step: {error.next_step}"
    if finding.skipped is not None:
        return f"skipped  {finding.check}: {finding.skipped.value}"
    seen = ", ".join(f"{name} {value}" for name, value in finding.seen.items())
    return f"ok       {finding.check}" + (f": {seen}" if seen else "")
