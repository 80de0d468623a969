"""`keyturn exec`: in the container of the server, check what `keyturn load` left, then become the server.

The order: configuration, folder, receipt, its evidence, its statement, that it is of this folder, the files. Nothing is fetched
and nothing is decrypted. This process becomes the server, so nothing of ours stays: who watches, restarts or wipes is the
pod's affair.

What the receipt's evidence is worth depends on who asks. With tee.attester = coco the guest's own components give fresh
evidence: this guest is the one that the configuration was launched with, and the receipt's. Anywhere else the evidence of the
receipt has to be genuine under the vendors' roots.
"""

import argparse
import errno
import json
import os
import secrets
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agent.closed import Ident
from agent.commands.run import add_source, config_finder
from agent.errors import (
    ConfigError,
    ConfigNotMeasuredError,
    ConfigProblem,
    ReceiptError,
    ReceiptProblem,
    ServerStartError,
)
from agent.events import ReceiptChecked, message_to_record
from agent.report import console_line

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from agent.artifact import LoadedFile
    from agent.config import Measured, MeasuredConfig
    from agent.evidence import Evidence
    from agent.receipt import Receipt

MAX_ENVIRONMENT_BYTES = 2 << 20
"""What execve takes of arguments and environment on most machines."""
NOT_HANDED_ON = ("SSLKEYLOGFILE", "LD_AUDIT", "LD_DEBUG", "LD_DEBUG_OUTPUT", "LD_PROFILE", "LD_PROFILE_OUTPUT")
"""They serve to look into a process. What else a container is given is as measured as its command."""


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "exec",
        help=summary,
        usage="keyturn exec (--config FILE | --initdata FILE) [--dir DIR] -- SERVER [ARGUMENT ...]",
        description=f"{summary[0].upper()}{summary[1:]}. For the container whose pod has `keyturn load` as init container, "
        "with the same configuration: the folder is memory and mounted readOnly, its receipt was signed in this guest for this "
        "configuration and this model, and exactly the receipt's files lie there.",
        epilog="The server keeps the container's environment, but for variables that serve to look into a process; those that "
        "keep model servers offline and quiet are added where they are not set. Exit status 24: the receipt, or what lies "
        "beside it, is not as it must be.",
        allow_abbrev=False,
    )
    add_source(parser)
    parser.add_argument("--dir", metavar="DIR", help="where this container has the folder; default: artifact.directory")
    parser.add_argument("command", nargs="+", metavar="SERVER", help="the server and its arguments, after --")


def run(args: argparse.Namespace) -> int:
    from agent.artifact import left
    from agent.config import parse
    from agent.receipt import parse_receipt

    # 1. The configuration, which must be one that leaves its model to somebody.
    found = config_finder(args)()
    if found is None:
        raise ConfigError(ConfigProblem.NOT_FOUND)
    measured = parse(found.data, found.digest, found.initdata).select(None)
    config = measured.config
    # refusal: test_a_configuration_that_leaves_nothing_to_others_is_refused
    if config.server is not None:
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("server"))
    # refusal: test_a_configuration_that_leaves_nothing_to_others_is_refused
    if config.artifact.directory is None:
        raise ConfigError(ConfigProblem.MISSING_KEY, Ident("artifact.directory"))

    # 2. The folder; what is in it does not change any more: who could write has ended.
    with left.opened(args.dir or config.artifact.directory) as folder:
        data = left.read_receipt(folder)
        receipt = parse_receipt(data)
        same_guest = _believe(receipt, measured)
        check_statement(receipt, measured)
        check_folder(receipt, folder)
        check_files(receipt, left.list_files(folder))

    # 3. Nothing of ours is left but the last word.
    statement = receipt.statement
    _tell(ReceiptChecked(_sha256(data), statement.model_version, statement.files, same_guest, statement.simulated))
    environment = environment_of_server()
    from agent.guest import hardening

    try:
        hardening.harden_successor()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and an ignored signal stays so
            # refusal: test_the_server_ignores_no_signal
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(args.command[0], args.command, environment)  # the server
    except OSError as error:
        raise ServerStartError(error.errno or 0) from error


def check_statement(receipt: "Receipt", measured: "Measured") -> None:
    """The receipt is of a boot of this configuration that left the model which the configuration names.

    Raises:
        ReceiptError: what it is not.
    """
    from agent.modes import Mode

    statement, config = receipt.statement, measured.config
    artifact = config.artifact
    # refusal: test_a_statement_about_something_else_is_refused
    if statement.simulated and not (config.tee.simulated or config.broker.allow_simulated):
        raise ReceiptError(ReceiptProblem.SIMULATED)
    # refusal: test_a_statement_about_something_else_is_refused
    if statement.mode is not Mode.LOAD:
        raise ReceiptError(ReceiptProblem.MODE)
    # refusal: test_a_statement_about_something_else_is_refused
    if statement.config_digest != measured.digest:
        raise ReceiptError(ReceiptProblem.CONFIG)
    # The manifest of a signed model is in no configuration; its name and lowest version are.
    pinned = _pinned_digest(config)
    # refusal: test_a_statement_about_something_else_is_refused
    if pinned is not None and statement.manifest_digest != pinned:
        raise ReceiptError(ReceiptProblem.MODEL)
    # refusal: test_a_statement_about_something_else_is_refused
    if artifact.name is not None and statement.model_name != artifact.name:
        raise ReceiptError(ReceiptProblem.MODEL)
    # refusal: test_a_statement_about_something_else_is_refused
    if statement.key_uri != config.broker.key_uri:
        raise ReceiptError(ReceiptProblem.MODEL)
    # refusal: test_a_statement_about_something_else_is_refused
    if statement.model_version < artifact.min_version:
        raise ReceiptError(ReceiptProblem.VERSION)


def check_folder(receipt: "Receipt", folder: int) -> None:
    """The receipt was left in this very folder: a copy may hold other bytes in files of the same names and sizes.

    Raises:
        ReceiptError: FOLDER.
        DestinationError: the kernel refused.
    """
    from agent.artifact import given
    from agent.artifact.window import translated

    with translated():
        here = given.folder_digest(folder)
    # refusal: test_a_copy_of_the_folder_is_refused
    if receipt.statement.folder_digest != here:
        raise ReceiptError(ReceiptProblem.FOLDER)


def check_files(receipt: "Receipt", files: "Iterable[LoadedFile]") -> None:
    """Exactly these files were opened. Raises ReceiptError: FILES."""
    from agent.receipt import digest_of_files

    # refusal: test_a_file_more_or_less_or_of_another_size_is_refused
    if digest_of_files(files) != receipt.statement.files_digest:
        raise ReceiptError(ReceiptProblem.FILES)


def environment_of_server(environ: "Mapping[str, str] | None" = None) -> dict[str, str]:
    """What the container was given, without what serves to look into a process, and with what keeps servers quiet.

    Raises:
        ServerStartError: it is longer than what a program can be given.
    """
    from agent.server.presets import QUIET

    given = dict(os.environ if environ is None else environ)
    descriptor = given.pop("KEYTURN_GIVEN", None)
    if descriptor is not None and environ is None:
        with open(int(descriptor), "rb") as file:
            file.seek(0)
            data = file.read(MAX_ENVIRONMENT_BYTES + 1)
        # refusal: test_an_environment_that_is_too_long_is_refused_and_not_cut
        if len(data) > MAX_ENVIRONMENT_BYTES:
            raise ServerStartError(errno.E2BIG)
        items = data.split(b"\0")[:-1]
        given = dict(os.fsdecode(item).split("=", 1) for item in items)
    return {**QUIET, **{name: value for name, value in given.items() if name not in NOT_HANDED_ON}}


def _pinned_digest(config: "MeasuredConfig") -> str | None:
    if config.artifact.format == "kserve-jwe":
        from agent.artifact.kserve import list_digest

        return list_digest(config.artifact)
    return config.artifact.manifest_digest


def _believe(receipt: "Receipt", measured: "Measured") -> bool:
    """The receipt's evidence is of this guest (True), or genuine; either way of one launched with this configuration."""
    from agent.verify.receipt import check_binding, check_same_guest, launch_digest, verify_receipt

    config = measured.config
    if config.tee.through_coco:
        check_binding(receipt)
        here = _fresh_evidence(config)
        check_same_guest(receipt, here)
        _check_launch(launch_digest(here), measured)
        return True
    verify_receipt(receipt, _simulated_roots(config), (), datetime.now(UTC))
    return False  # of a guest launched with the statement's configuration, which `check_statement` compares


def _check_launch(field: bytes | None, measured: "Measured") -> None:
    from agent.guest.initdata import fit

    # refusal: test_a_guest_that_was_launched_with_another_configuration_is_refused
    if field is not None and field != fit(measured.digest, len(field)):
        raise ConfigNotMeasuredError


def _fresh_evidence(config: "MeasuredConfig") -> "Evidence":
    """Evidence of this guest over a nonce of ours, from its own components."""
    from agent.commands.run import open_tee
    from agent.evidence import REPORT_DATA_BYTES, ReportData
    from agent.evidence.coco import RUNTIME_DATA_BYTES

    nonce = secrets.token_bytes(RUNTIME_DATA_BYTES)
    return open_tee(config).collect(ReportData(nonce.ljust(REPORT_DATA_BYTES, b"\0")))


def _simulated_roots(config: "MeasuredConfig") -> "Sequence[Certificate]":
    if config.simulation is None:
        return ()
    from agent.commands.run import simulated_machine

    machine = simulated_machine(config.simulation.machine)
    from agent.broker.anchors import load_simulation_roots

    return load_simulation_roots(machine.roots_dir)


def _sha256(data: bytes) -> Ident:
    import hashlib

    return Ident(hashlib.sha256(data).hexdigest())


def _tell(event: ReceiptChecked) -> None:
    text = f"keyturn: {console_line(event)}" if sys.stderr.isatty() else json.dumps(message_to_record(event))
    print(text, file=sys.stderr, flush=True)
