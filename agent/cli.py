"""The command line: finds the verb, imports only what that verb needs, turns an AgentError into an exit status.

Results go to stdout. Errors go to stderr, as one JSON line, or as `keyturn: …` lines when stderr is a terminal.
"""

import argparse
import importlib
import importlib.util
import json
import sys

from agent import __version__
from agent.errors import EXIT_USAGE, AgentError, InternalError
from agent.events import message_to_record
from agent.report import console_line

# verb -> one line of help; the module is agent.commands.<verb>
VERBS = {
    "run": "boot: attest, get the key, open the model, start and supervise the model server",
    "load": "boot of an init container: open the model into a given folder of guest memory, for another container to serve",
    "exec": "check the receipt of what `load` left, and the folder itself; then become the model server",
    "init": "the first program of a guest: started by the kernel as /init",
    "doctor": "check this guest: everything that a boot needs, one finding each",
    "evidence": "print this guest's evidence over a nonce, as the broker sees it",
    "verify": "check a report, quote, event log or receipt offline, and print what it says",
    "status": "show the status of a running agent",
    "explain": "what failed, who must act and what to check: of an error, an exit status, a token, an event, a status",
    "config": "check, explain or print an example of the configuration",
    "initdata": "what a guest with an initdata document is launched with, and the document itself",
    "lint": "check the manifests of a pod: what a boot in a Kata guest needs of them, one finding each",
    "seal": "encrypt a model folder into a sealed model (OCI image layout, or a registry)",
    "push": "copy sealed models and their signatures from an OCI image layout to a registry",
    "policy": "what a broker or Trustee must be told to release a key to an image, a configuration and a model",
    "inspect": "show a sealed model, and with a key check every byte of it",
    "broker": "the reference key broker",
    "demo": "a whole boot on simulated silicon with a real model and a real server",
}
INTERFACES = {
    "config": "keyturn/v1",
    "protocol": "1",
    "format": "1",
    "receipt": "1",
    "status": "keyturn.status/v1",
    "events": "1",
    "exit_table": "1",
}

_EPILOG = """exit status, at length with `keyturn explain EXIT_STATUS`:
  0 served and stopped on request · 2 usage
  10 configuration · 11 no device · 12 evidence · 13 GPU · 14 broker not reachable · 15 broker protocol
  16 denied · 17 key · 18 artifact store · 19 artifact · 20 memory · 21 interrupted · 22 lease ended · 23 guest init
  24 receipt · 29 bug in keyturn · 30 model server failed · 31 guest must be restarted

`keyturn config example` prints a configuration to start from.
"""
_DEMO = "`keyturn demo` shows the whole story on any machine.\n"


def main(argv: list[str]) -> int:
    """Run one command; the value is the exit status. Usage errors leave by SystemExit(2), as argparse does."""
    here = {verb for verb in VERBS if importlib.util.find_spec(f"agent.commands.{verb}")}  # a guest's bundle has not all
    parser = argparse.ArgumentParser(
        prog="keyturn",
        description="Boot agent of a confidential inference guest.",
        epilog=_EPILOG + (_DEMO if "demo" in here else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version (with --json: of every interface)")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    module = None
    for verb, summary in VERBS.items():
        if verb != chosen:
            if verb in here:
                verbs.add_parser(verb, help=summary, add_help=False)
            continue
        try:
            module = importlib.import_module(f"agent.commands.{verb}")
        except ModuleNotFoundError as error:
            parser.exit(EXIT_USAGE, f"keyturn: `{verb}` is not part of this installation ({error.name} is missing)\n")
        module.add_parser(verbs, summary)
    args = parser.parse_args(argv)
    if args.version:
        print(json.dumps({"version": __version__, "interfaces": INTERFACES}) if args.json else f"keyturn {__version__}")
        return 0
    if module is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        status = module.run(args)
    except AgentError as error:
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  # a bug: the place is told, the text may hold what nobody may see
        bug = InternalError.of(error)
        print_error(bug)
        return bug.exit_status
    assert isinstance(status, int)
    return status


def print_error(error: AgentError) -> None:
    """One error on stderr, for whoever reads it."""
    if sys.stderr.isatty():
        print(f"keyturn: {console_line(error)}", file=sys.stderr)
    else:
        print(json.dumps(message_to_record(error)), file=sys.stderr)
