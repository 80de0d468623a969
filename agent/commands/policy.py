"""`keyturn policy`: from an image, a configuration and a sealed model, what a key broker must be told to release the key.

Prints a row for the reference broker, or what an operator tells a Trustee key broker service (`trustee_policy.py`). Writes
nothing and connects to nobody but the model's store. What is not known is left out, and what is left out matches nothing.
An operator's tool: it is not in a guest's image.
"""

import argparse
import contextlib
import json
import sys
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

from agent import config
from agent.artifact import manifest as m
from agent.artifact.identify import find_manifest
from agent.artifact.kserve import list_digest
from agent.artifact.sources import open_source
from agent.artifact.volume_config import parse_model
from agent.broker.policy import SCHEMA
from agent.closed import Ident
from agent.commands import trustee_policy
from agent.commands.policy_values import (
    MAX_FILE_BYTES,
    Approved,
    GpuVersions,
    Image,
    SnpImage,
    SwitchVersions,
    TdxImage,
    parse_gpu,
    parse_image,
)
from agent.commands.seal import add_access, read_access, read_ca
from agent.config_source import FoundConfig, from_file, from_initdata_file
from agent.errors import ConfigError, ConfigProblem
from agent.guest.initdata import fit

_TIMEOUT_S = 30.0


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "policy",
        help=summary,
        description=(
            f"{summary[0].upper()}{summary[1:]}. The measurements are approved as they are: take them from a guest that you "
            "trust, or from the build."
        ),
        allow_abbrev=False,
    )
    image = parser.add_mutually_exclusive_group(required=True)
    image.add_argument(
        "--image",
        metavar="FILE",
        help="measurements, JSON or TOML: what `keyturn verify snp|tdx … --json` prints, or by hand measurement (SEV-SNP), or "
        "mr_td, rtmr_1 and rtmr_2 (TDX); - is standard input",
    )
    image.add_argument(
        "--unsafe-sample", action="store_true", help="for a test with Trustee's sample evidence, which proves nothing"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--initdata", metavar="FILE", help="initdata document that guests are launched with")
    source.add_argument("--config", metavar="FILE", help="configuration that guests are launched with, without initdata")
    parser.add_argument("--uri", metavar="URI", help="which entry of artifact.allowed, where there are several")
    parser.add_argument("--model", metavar="LAYOUT", required=True, help="folder, URL, oci:// or s3:// of the sealed model")
    parser.add_argument(
        "--gpu",
        metavar="FILE",
        action="append",
        default=[],
        help="versions of a GPU or NVSwitch: what `keyturn verify nvidia … --json` prints",
    )
    parser.add_argument("--for", dest="broker", choices=("broker", "trustee"), default="broker", help="default: broker")
    parser.add_argument(
        "--not-after", metavar="TIME", type=_moment, help="end of the broker's row, such as 2027-12-31T00:00:00Z"
    )
    add_access(parser)
    parser.add_argument("--json", action="store_true", help="with --for trustee: print the calls as one JSON object")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if args.broker == "broker" and (args.json or args.unsafe_sample):
        args.usage_error("--json and --unsafe-sample are for Trustee: --for trustee")
    if args.broker == "trustee" and args.not_after:
        args.usage_error("--not-after is for the reference broker's row")
    if [args.image, args.initdata, args.config, *args.gpu].count("-") > 1:
        args.usage_error("only one file can be standard input")
    approved = _approved(args)
    if args.broker == "broker":
        print(broker_policy(approved, args.not_after), end="")
    elif args.json:
        print(json.dumps(_record(approved)))
    else:
        print(trustee_policy.script(approved), end="")
    return 0


def broker_policy(approved: Approved, not_after: datetime | None) -> str:
    """A policy file with one row, for an image that is measured. What is not known stands there as a comment.

    Args:
        approved: what the row allows.
        not_after: with a time zone; None leaves the decision to whoever reads the file.
    """
    end = (
        f"not_after = {not_after.isoformat()}"
        if not_after
        else "# not_after = 2027-12-31T00:00:00Z  # decide: without it nothing is released"
    )
    credentials = f'credentials_uri = "{approved.credentials_uri}"\n' if approved.credentials_uri else ""
    return f"""\
# Whatever a row leaves out matches nothing. Raise `version` with every change; see the example of `keyturn broker init`.
schema = "{SCHEMA}"
version = "1"

[[row]]
key_uri = "{approved.key_uri}"
release_channel = "stable"
revoked = false
{end}
min_model_version = {approved.model_version}
{credentials}# lease_s = 86400  # the guest asks again from half of it on, and stops at its end
manifest_digests = [{{ id = "model-v{approved.model_version}", value = "{approved.manifest_digest}" }}]
server_command_digests = [{{ id = "server-command", value = "{approved.server_command_digest}" }}]

{_tdx_section(approved.image, approved.init_data) if isinstance(approved.image, TdxImage) else _snp_section(approved)}
{_gpu_section(approved)}"""


def _snp_section(approved: Approved) -> str:
    assert isinstance(approved.image, SnpImage)
    tcb = approved.image.tcb
    minimum = "# minimum_tcb: `keyturn verify snp --json` prints product and reported_tcb"
    if tcb is not None:
        fmc = "" if tcb.fmc is None else f", fmc = {tcb.fmc}"
        minimum = (
            f'minimum_tcb = [{{ id = "firmware", product = "{tcb.product}", bootloader = {tcb.bootloader}, tee = {tcb.tee}, '
            f"snp = {tcb.snp}, microcode = {tcb.microcode}{fmc} }}]"
        )
    return f"""\
[row.snp]
measurements = [{{ id = "image", value = "{approved.image.measurement}" }}]
host_data = [{{ id = "configuration", value = "{fit(approved.init_data, 32).hex()}" }}]
{minimum}
debug = false
vmpl = 0
"""


def _tdx_section(image: TdxImage, init_data: bytes) -> str:
    module = "# minimum_tee_tcb_svn: `keyturn verify tdx --json` prints tee_tcb_svn"
    if image.tee_tcb_svn is not None:
        module = f'minimum_tee_tcb_svn = {{ id = "module", value = "{image.tee_tcb_svn}" }}'
    return f"""\
[row.tdx]
mr_td = [{{ id = "firmware", value = "{image.mr_td}" }}]
mr_config_id = [{{ id = "configuration", value = "{fit(init_data, 48).hex()}" }}]
rtmr_1 = [{{ id = "loader", value = "{image.rtmr_1}" }}]
rtmr_2 = [{{ id = "kernel", value = "{image.rtmr_2}" }}]
{module}
tcb = ["UpToDate"]  # a broker without --tdx-collateral says "not_evaluated"
"""


def _gpu_section(approved: Approved) -> str:
    if not approved.gpu_count:
        return "[row.gpu]\ncount = 0\n"
    versions = ["# driver_versions, vbios_versions and modes: `keyturn verify nvidia --json` prints what they come from"]
    if approved.gpus:
        drivers, firmware = (
            sorted({getattr(gpu, name) for gpu in approved.gpus}) for name in ("driver_version", "vbios_version")
        )
        versions = [f"driver_versions = {_listed('driver', drivers)}", f"vbios_versions = {_listed('vbios', firmware)}"]
        # "nvle" (several Blackwell GPUs) neither report nor configuration tells from "cc".
        versions.append(f'modes = ["{"ppcie" if approved.switch_count else "cc"}"]')
    if approved.switches:
        firmware = sorted({switch.vbios_version for switch in approved.switches})
        versions.append(f"switch_vbios_versions = {_listed('switch-vbios', firmware)}")
    elif approved.switch_count:
        versions.append("# switch_vbios_versions: `keyturn verify nvidia --json` prints an NVSwitch's vbios_version")
    lines = ["[row.gpu]", f"count = {approved.gpu_count}", *versions, f"ready = {str(approved.gpu_ready_preset).lower()}"]
    return "\n".join([*lines, ""])


def _listed(name: str, values: list[str]) -> str:
    return "[" + ", ".join(f'{{ id = "{name}-{number}", value = "{value}" }}' for number, value in enumerate(values, 1)) + "]"


def _record(approved: Approved) -> dict[str, object]:
    return {
        "resource_policy": trustee_policy.resource_policy(approved),
        "reference_values": trustee_policy.reference_values(approved),
        "calls": [
            {"method": "POST", "path": f"/kbs/v0/{call.path}", "body": call.body} for call in trustee_policy.calls(approved)
        ],
        "hints": list(trustee_policy.hints(approved)),
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def _approved(args: argparse.Namespace) -> Approved:
    from agent.server.presets import command_digest
    from agent.worker import plan_of

    image = None if args.unsafe_sample else parse_image(_read(args.image, "image"))
    devices = [parse_gpu(_read(file, "gpu")) for file in args.gpu]
    gpus = tuple(device for device in devices if isinstance(device, GpuVersions))
    found: FoundConfig = from_file(args.config) if args.initdata is None else from_initdata_file(args.initdata)
    measured = config.parse(found.data).select(config.Selection(args.uri) if args.uri else None).config
    _check_tee(image, measured)
    # refusal: test_gpus_in_another_mode_than_the_configuration_wants_are_refused
    if any(gpu.protected_pcie not in (None, bool(measured.gpu.switches)) for gpu in gpus):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("gpu.switches"))
    manifest_digest, model_name, model_version = _read_model(args, measured)
    plan = plan_of(measured)
    return Approved(
        image=image,
        init_data=found.digest,
        gpu_count=measured.gpu.count,
        gpu_ready_preset=measured.gpu.ready_state == "preset",
        gpus=gpus,
        switches=tuple(device for device in devices if isinstance(device, SwitchVersions)),
        switch_count=measured.gpu.switches,
        key_uri=measured.broker.key_uri,
        model_name=model_name,
        model_version=model_version,
        manifest_digest=manifest_digest,
        server_command_digest=command_digest(plan.argv if plan else ()),
        resource_uri=measured.broker.resource_uri,
        credentials_uri=measured.artifact.credentials_uri,
    )


def _check_tee(image: Image | None, measured: config.MeasuredConfig) -> None:
    """A guest that is configured for the other TEE would never boot on this image."""
    attester = measured.tee.attester
    # refusal: test_a_configuration_for_the_other_tee_is_refused
    if (isinstance(image, SnpImage) and attester.endswith("tdx")) or (isinstance(image, TdxImage) and attester.endswith("snp")):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("tee.attester"))


def _read_model(args: argparse.Namespace, measured: config.MeasuredConfig) -> tuple[str, Ident, int]:
    """Digest of the manifest, name and version of the model that the configuration names, by digest or by who signed it."""
    if measured.artifact.format == "kserve-jwe":  # its list stands in the configuration; there is no manifest to read
        return list_digest(measured.artifact), Ident(measured.artifact.name or ""), 0
    with contextlib.closing(open_source(args.model, read_ca(args), _TIMEOUT_S, read_access(args))) as source:
        digest = find_manifest(source, measured.artifact, Event()).digest
        kind = m.VOLUME_CONFIG_TYPE if measured.artifact.format == "volume" else m.CONFIG_TYPE
        manifest = m.parse_manifest(source.read_manifest(digest, m.MAX_MANIFEST_BYTES), digest, (kind,))
        model = parse_model(source.read_blob(manifest.config_digest, manifest.config_bytes), manifest)
    # refusal: test_a_model_that_no_guest_would_open_is_refused
    if model.key_uri != measured.broker.key_uri:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("broker.key_uri"))
    # refusal: test_a_model_that_no_guest_would_open_is_refused
    if model.version < measured.artifact.min_version:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.min_version"))
    return digest, model.model_name, model.version


def _read(file: str, name: str) -> bytes:
    """At most one byte more than a parser takes."""
    try:
        if file == "-":
            return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        with Path(file).open("rb") as stream:
            return stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident(name)) from error


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("a date and time with its zone is wanted") from None
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError("a date and time with its zone is wanted")
    return moment
