"""`keyturn load`: the boot of an init container. The open model is left in a folder of guest memory for another container.

What `run` promises after the key is not promised here: nobody of ours watches the server, wipes the model, or obeys a lease,
so a key that comes with one is refused. The model ends with the pod. Imports nothing heavy: this process becomes the
supervisor.
"""

import argparse
from typing import Any

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.commands.run import add_faces, add_proxy, add_source, config_finder, host_hints, open_hardware, watch_gpus
from agent.supervisor import Supervisor


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "load",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. For an init container: the folder is a memory emptyDir of the pod. "
        "What is done stands in the configuration, which evidence covers: it has artifact.destination = directory and no "
        "[server].",
        epilog="Ends with status 0 when every file lies in DIR/model, whole and for reading only; a failure leaves nothing "
        "there. The files get the group of DIR where it has the set-group-ID bit, as fsGroup of a pod sets it. What an earlier "
        "`load` left in DIR is removed first. For failures: `keyturn --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder on tmpfs; must be artifact.directory")
    add_source(parser)
    add_faces(parser)
    add_proxy(parser)


def run(args: argparse.Namespace) -> int:
    find = config_finder(args)

    def worker(channel: Channel, served: ServedModel | None) -> int:
        from agent.worker import work

        return work(channel, find, open_hardware, served, args.out, args.proxy)

    return Supervisor("load", host_hints(args), worker, watch_gpus).run()
