"""`keyturn lint`: what is wrong with the manifest of a pod, before a guest is started from it. Offline.

An operator's tool: it is not in a guest's image.
"""

import argparse
import json
from typing import Any

from agent.commands.initdata import HOST_DATA_BYTES, MR_CONFIG_ID_BYTES
from agent.commands.lint_findings import Finding, Rule
from agent.commands.lint_rules import Launch, lint_pod
from agent.commands.manifests import MalformedYamlError, parse_documents, pods
from agent.config_source import read_bounded
from agent.errors import EXIT_SERVED, EXIT_STATUS, Owner, Step
from agent.guest.initdata import fit

EXIT_FOUND = EXIT_STATUS[Owner.OPERATOR, Step.CONFIG]


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "lint",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. One finding a line: object, path of the setting, class, what is "
        "wrong, who must act, next step. The digest of the initdata document is printed too: the broker's policy must name it.",
        epilog=f"Exit status: 0 when nothing was found, else {EXIT_FOUND}.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="POD.yaml", help="rendered manifests, of a pod or of brokers; - for standard input")
    parser.add_argument(
        "--model-bytes", metavar="N", type=_size, help="size of the model, as `keyturn inspect` prints it; default: sizeLimit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: exit_status, findings and initdata")


def run(args: argparse.Namespace) -> int:
    findings, launches = _lint(read_bounded(args.file), args.model_bytes)
    status = EXIT_FOUND if findings else EXIT_SERVED
    if args.json:
        found = {
            "findings": [finding.to_record() for finding in findings],
            "initdata": [_record(launch) for launch in launches],
        }
        print(json.dumps({"exit_status": status, **found}))
        return status
    for finding in findings:
        print(finding.line())
    for launch in launches:
        record = _record(launch)
        print(f"{launch.subject} initdata: HOST_DATA {record['host_data']} MRCONFIGID {record['mr_config_id']}")
    return status


def _lint(data: bytes, model_bytes: int | None) -> tuple[list[Finding], list[Launch]]:
    try:
        documents = parse_documents(data)
    except MalformedYamlError as error:
        return [Finding(None, "$" if error.line is None else f"line {error.line}", Rule.YAML)], []
    findings: list[Finding] = []
    launches: list[Launch] = []
    found = list(pods(documents))
    if not found:
        return [Finding(None, "$", Rule.NO_POD)], []
    for pod in found:
        wrong, launch = lint_pod(pod, documents, model_bytes)
        findings += wrong
        launches += [launch] if launch else []
    return findings, launches


def _record(launch: Launch) -> dict[str, str]:
    digest = launch.initdata.digest
    return {
        "object": launch.subject,
        "path": launch.path,
        "digest": digest.hex(),
        "host_data": fit(digest, HOST_DATA_BYTES).hex(),
        "mr_config_id": fit(digest, MR_CONFIG_ID_BYTES).hex(),
    }


def _size(text: str) -> int:
    number = int(text)
    if not 0 < number < 1 << 63:
        raise ValueError
    return number
