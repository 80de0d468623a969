"""`keyturn initdata`: what a guest with this initdata document is launched with, and the document made from a configuration.

An operator's tool: it is not in a guest's image.
"""

import argparse
import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

from agent import config
from agent.closed import Ident
from agent.config_source import ENTRY, INITDATA_FILE, read_bounded, read_document
from agent.errors import ConfigError, ConfigProblem, InitdataError
from agent.guest.initdata import ALGORITHMS, Initdata, fit, pack_document, pack_gzip, parse_initdata

ANNOTATION = "io.katacontainers.config.hypervisor.cc_init_data"
HOST_DATA_BYTES = 32
MR_CONFIG_ID_BYTES = 48

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_NAME_OF = {32: "sha256", 48: "sha384", 64: "sha512"}


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "initdata",
        help=summary,
        description=(
            f"{summary[0].upper()}{summary[1:]}: digest, HOST_DATA (SEV-SNP), MRCONFIGID (TDX) and Kata annotation of a "
            "document; with --config the document is made first."
        ),
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", metavar="FILE", nargs="?", help="initdata document, - for standard input")
    which.add_argument("--config", metavar="TOML", help="configuration to put into a new document, as its entry keyturn.toml")
    parser.add_argument("--out", metavar="FILE", type=Path, help="with --config: where to write the document; a new file")
    parser.add_argument(
        "--add",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="with --config: another entry, such as aa.toml, cdh.toml or policy.rego",
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, help="with --config: of the digest, default sha384")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if args.config is None:
        if args.add or args.algorithm or args.out:
            args.usage_error("--add, --algorithm and --out belong to --config")
        document = read_document(args.file)
    else:
        if args.out is None:
            args.usage_error("--config needs --out: where to write the document")
        document = _make(args)
    initdata = parse_initdata(document, INITDATA_FILE)
    configuration = initdata.entry(ENTRY)
    if configuration is not None:
        config.parse(configuration)  # what no guest would accept is told before one is launched with it
    record = _record(document, initdata)
    if args.out is not None:
        _write(args, document)
    print(json.dumps(record) if args.json else _for_people(record))
    if configuration is None:
        print(
            f"keyturn: hint: no entry {ENTRY}: a guest with this document takes its configuration from its image",
            file=sys.stderr,
        )
    return 0


def _make(args: argparse.Namespace) -> bytes:
    files = {ENTRY: args.config}
    for word in args.add:
        name, _, file = word.partition("=")
        if not _NAME.fullmatch(name) or not file or name in files:
            args.usage_error("--add is NAME=FILE, once for each NAME, and keyturn.toml is what --config names")
        files[name] = file
    if list(files.values()).count("-") > 1:
        args.usage_error("only one file can be standard input")
    return pack_document({name: _text(name, file) for name, file in files.items()}, args.algorithm or "sha384")


def _text(name: str, file: str) -> str:
    try:
        return (read_bounded(file) if name == ENTRY else read_document(file)).decode()
    except UnicodeDecodeError:
        raise ConfigError(ConfigProblem.NOT_UTF8, Ident(name)) from None


def _record(document: bytes, initdata: Initdata) -> dict[str, object]:
    host_data, mr_config_id = (fit(initdata.digest, length) for length in (HOST_DATA_BYTES, MR_CONFIG_ID_BYTES))
    try:
        annotation = _base64(pack_gzip(document))
    except InitdataError as error:  # of a document that is no disk yet
        raise InitdataError(INITDATA_FILE, error.problem) from None
    return {
        "algorithm": _NAME_OF[len(initdata.digest)],
        "digest": initdata.digest.hex(),
        "host_data": host_data.hex(),
        "host_data_base64": _base64(host_data),
        "mr_config_id": mr_config_id.hex(),
        "mr_config_id_base64": _base64(mr_config_id),
        "entries": list(initdata.entries),
        "annotation": {"name": ANNOTATION, "value": annotation},
    }


def _for_people(record: dict[str, Any]) -> str:
    return f"""\
{record["algorithm"]:<12}{record["digest"]}
HOST_DATA   {record["host_data"]}
            {record["host_data_base64"]}
MRCONFIGID  {record["mr_config_id"]}
            {record["mr_config_id_base64"]}
entries     {", ".join(json.dumps(name)[1:-1] for name in record["entries"])}
annotation  {record["annotation"]["name"]}
            {record["annotation"]["value"]}"""


def _write(args: argparse.Namespace, document: bytes) -> None:
    try:
        with args.out.open("xb") as stream:
            stream.write(document)
    except OSError as error:
        args.usage_error(f"the document cannot be written to the file of --out: {error.strerror}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
