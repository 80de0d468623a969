"""`keyturn push`: a layout's sealed models into a registry; also the end of a `keyturn seal --to oci://…` that broke off."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.artifact.push import Pushed, push_layout
from agent.commands.seal import (
    REGISTRY_TIMEOUT_S,
    add_access,
    parse_repository,
    progress_line,
    read_access,
    read_ca,
    size_text,
)


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser("push", help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("layout", metavar="LAYOUT", type=Path, help="OCI image layout, as `keyturn seal --to DIR` makes one")
    parser.add_argument("to", metavar="REPOSITORY", help="oci://host[:port]/name; oci+http:// without TLS")
    add_access(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a model")


def run(args: argparse.Namespace) -> int:
    access = read_access(args)
    repository = parse_repository(args.to, access)
    with progress_line("pushing") as progress:
        pushed = push_layout(args.layout, repository, read_ca(args), access, REGISTRY_TIMEOUT_S, progress)
    print(_records(pushed) if args.json else _lines(args.to, pushed))
    return 0


def _records(pushed: Sequence[Pushed]) -> str:
    return "\n".join(
        json.dumps({"manifest_digest": one.manifest_digest, "tag": one.tag, "sent_bytes": one.sent_bytes}) for one in pushed
    )


def _lines(to: str, pushed: Sequence[Pushed]) -> str:
    return "\n".join(f"{to}:{one.tag} is {one.manifest_digest}, {size_text(one.sent_bytes)} sent" for one in pushed)
