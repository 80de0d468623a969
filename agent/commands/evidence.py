"""`keyturn evidence`: the composite Evidence of this guest over a nonce, as a boot sends it to the broker.

For whoever wants to appraise a guest before it has a broker, or to see why a broker denies. Passes no gate: the GPU ready
state is read and never set, and no key is asked for.
"""

import argparse
import json
import re
import sys
import warnings
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from agent import unhandled
from agent.closed import Ident
from agent.commands.run import open_gpus, open_runtime, open_tee
from agent.config_source import FoundConfig, find_in_guest, from_file, from_initdata_file
from agent.errors import Absence, ConfigError, ConfigProblem, NoAttesterError
from agent.evidence import Evidence, Nonce, RuntimeData, Tee
from agent.handshake import TeePublicKey
from agent.jose import pack_b64, pack_jwk, parse_object, parse_point
from agent.threads import signals_wait

if TYPE_CHECKING:
    from agent.config import Measured, MeasuredConfig
    from agent.evidence.collect import Devices

MAX_RUNTIME_DATA_BYTES = 4 << 10
_STORE_TIMEOUT_S = 30.0
_NONCE = re.compile(r"[0-9A-Fa-f]{64}")


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "evidence",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: one JSON object: runtime_data, primary_evidence (binary as base64) "
        "and additional_evidence, the exact text that the CPU's report covers. The GPU ready state is never set. Evidence "
        "tells which machine this is: give it to whom that may be told.",
        epilog="Example, and what the report in it says: keyturn evidence --nonce $(openssl rand -hex 32) | jq -r "
        ".primary_evidence.report | base64 -d | keyturn verify snp - --endorsement chain.pem",
        allow_abbrev=False,
    )
    parser.add_argument("--nonce", metavar="HEX", type=nonce_argument, required=True, help="the appraiser's 32 bytes")
    parser.add_argument(
        "--runtime-data",
        metavar="FILE",
        help='whose public key the evidence is for: JSON {"tee-pubkey": JWK}, as runtime_data is printed. Who has its private '
        "key can attest as this guest with it. Default: a new key, forgotten at once",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        metavar="FILE",
        help="configuration, - for standard input; default: what this guest was launched with, as `keyturn run --guest` finds "
        "it",
    )
    source.add_argument("--initdata", metavar="FILE", help="initdata document with an entry keyturn.toml")
    parser.set_defaults(usage_error=parser.error)


def nonce_argument(text: str) -> bytes:
    """32 bytes in hexadecimal."""
    if not _NONCE.fullmatch(text):
        raise argparse.ArgumentTypeError("64 hexadecimal digits are wanted")
    return bytes.fromhex(text)


def run(args: argparse.Namespace) -> int:
    unhandled.silence_libraries()  # as in `doctor`: stderr is not theirs to write
    warnings.simplefilter("ignore")
    if args.config == args.runtime_data == "-":
        args.usage_error("only one file can be standard input")
    from agent.config import parse

    data = _runtime_data(args.nonce, args.runtime_data)
    found = _find(args)
    if found is None:
        raise ConfigError(ConfigProblem.NOT_FOUND)
    measured = parse(found.data, found.digest)
    with signals_wait():
        devices = _open(measured)
        evidence = devices.collect(data)
    print(
        json.dumps(
            {
                "tee": devices.attester.tee.value,
                "interface": devices.attester.interface,
                "runtime_data": {
                    "nonce": pack_b64(data.nonce),
                    "tee-pubkey": pack_jwk(TeePublicKey(data.public_key_x, data.public_key_y)),
                },
                "primary_evidence": _primary(evidence.primary),
                "additional_evidence": evidence.additional_evidence,
            }
        )
    )
    return 0


def _find(args: argparse.Namespace) -> FoundConfig | None:
    if args.config is not None:
        return from_file(args.config)
    return find_in_guest() if args.initdata is None else from_initdata_file(args.initdata)


def _open(measured: "Measured") -> "Devices":
    """The devices as a boot opens them, whatever is left of this guest's boot."""
    from agent.evidence.collect import check_measured, open_devices
    from agent.evidence.gate import ExpectedReady
    from agent.server.presets import command_digest
    from agent.worker import plan_of

    config = measured.config
    plan = plan_of(config)
    guest = check_measured(open_tee(config), measured.digest)
    if config.gpu.count and config.simulation is None:
        check_held()
    gpus = open_gpus(config)
    expected = ExpectedReady.PRESET if config.gpu.ready_state == "preset" else ExpectedReady.UNSET
    if expected is ExpectedReady.UNSET and gpus and gpus.inspect().ready:
        expected = ExpectedReady.OURS  # the gate lies behind this guest: what the broker sees now is a renewal's evidence
    return open_devices(
        guest,
        gpus,
        open_runtime(config),
        gpu_count=config.gpu.count,
        switch_count=config.gpu.switches,
        architecture=config.gpu.architecture and config.gpu.architecture.upper(),
        expected_ready=expected,
        manifest_digest=_manifest_digest(config),
        server_command_digest=command_digest(plan.argv if plan else ()),
    )


def _manifest_digest(config: "MeasuredConfig") -> str:
    if config.artifact.manifest_digest is not None:
        return config.artifact.manifest_digest
    from agent.artifact.identify import find_manifest
    from agent.artifact.sources import open_configured

    with closing(open_configured(config.artifact, _STORE_TIMEOUT_S)) as store:
        return find_manifest(store, config.artifact, Event()).digest


def check_held(proc: Path = Path("/proc")) -> None:
    """Raises NoAttesterError when this process would be the GPUs' last user."""
    from agent.evidence.gpu import is_held

    # refusal: test_gpus_that_nobody_else_holds_are_not_opened
    if not is_held(proc):
        raise NoAttesterError(Ident("nvml"), Absence.GPU_NOT_HELD)


def _primary(evidence: Evidence) -> dict[str, object]:
    report = pack_b64(evidence.report)
    if evidence.tee is Tee.TDX:
        return {"quote": report, "event_log": pack_b64(evidence.event_log) or None}
    return {"report": report, "cert_chain": [pack_b64(der) for der in evidence.cert_chain]}


def _runtime_data(nonce: bytes, file: str | None) -> RuntimeData:
    """The nonce, and the public key in `file` or a new one.

    Raises:
        ConfigError: the file cannot be read, or is not the JSON of one P-256 key, with no nonce or with this one.
    """
    from agent.keys import EphemeralKey

    if file is None:
        ephemeral = EphemeralKey.generate()
        ephemeral.destroy()
        return RuntimeData(Nonce(nonce), ephemeral.public.x, ephemeral.public.y)
    key = Ident("runtime-data")
    try:
        if file == "-":
            text = sys.stdin.buffer.read(MAX_RUNTIME_DATA_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                text = stream.read(MAX_RUNTIME_DATA_BYTES + 1)
        members = parse_object(text, MAX_RUNTIME_DATA_BYTES)
        jwk = members.pop("tee-pubkey")
        if not isinstance(jwk, dict):
            raise ValueError
        point = parse_point(jwk)
        # Any other member would be hashed by whoever sent the file, and not by us.
        if jwk != pack_jwk(point) or members not in ({}, {"nonce": pack_b64(nonce)}):
            raise ValueError
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, key) from error
    except (ValueError, KeyError):
        raise ConfigError(ConfigProblem.BAD_VALUE, key) from None
    return RuntimeData(Nonce(nonce), point.x, point.y)
