"""`keyturn config check|explain|example`."""

import argparse
import json
from typing import Any

from agent import config
from agent.closed import Ident
from agent.config_source import read_bounded
from agent.errors import ConfigError, ConfigProblem
from agent.guest.initdata import fit
from agent.modes import Mode, Unheld, unheld


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser("config", help=summary, description=summary, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|explain|example")
    check = actions.add_parser("check", help="parse a configuration and print its digest (the guest's HOST_DATA or MRCONFIGID)")
    check.add_argument("file", metavar="FILE", help="configuration file, - for standard input")
    check.add_argument(
        "--mode",
        choices=[mode.value for mode in Mode],
        help="also: is it a configuration for `keyturn run --guest` (guest), for `keyturn run` in the server's container "
        "(entrypoint) or for `keyturn load`, and which promises does that not hold?",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    explain = actions.add_parser("explain", help="what a key means; without KEY, all of them")
    explain.add_argument("key", metavar="KEY", nargs="?", help="dotted path, e.g. broker.key_uri")
    actions.add_parser("example", help="print a commented configuration to start from")


def run(args: argparse.Namespace) -> int:
    match args.action:
        case "check":
            return _check(args.file, Mode(args.mode) if args.mode else None, args.json)
        case "explain":
            return _explain(args.key)
        case _:
            print(config.EXAMPLE, end="")
            return 0


def _check(file: str, mode: Mode | None, as_json: bool) -> int:
    measured = config.parse(read_bounded(file))
    promises: tuple[Unheld, ...] = ()
    if mode:
        from agent.worker import check_out

        check_out(measured.config, (measured.config.artifact.directory or "") if mode is Mode.LOAD else None)
        promises = unheld(mode, measured.config)
    if measured.config.tee.attester.endswith("tdx"):
        key, name, digest = "mr_config_id", "MRCONFIGID (SHA-256 of the file, zero-padded)", fit(measured.digest, 48)
    else:
        key, name, digest = "host_data", "HOST_DATA (SHA-256 of the file)", measured.digest
    if as_json:
        not_held = {"mode": mode.value, "not_held": [promise.label for promise in promises]} if mode else {}
        print(json.dumps({"ok": True, "schema": config.SCHEMA, key: digest.hex(), **not_held}))
    else:
        print(f"ok: {config.SCHEMA}\n{name}: {digest.hex()}")
        if mode and not promises:
            print(f"{mode.value}: every promise is held")
        for promise in promises:
            print(f"{mode} does not hold {promise.label}: {promise.text}")
    return 0


def _explain(key: str | None) -> int:
    if key is None:
        for name, text in config.EXPLAIN.items():
            print(f"{name}\n    {text}")
        return 0
    if key not in config.EXPLAIN:
        raise ConfigError(ConfigProblem.UNKNOWN_KEY, Ident.of_peer(key))
    print(config.EXPLAIN[key])
    return 0
