"""`keyturn load`: the boot of an init container. The open model is left in a folder of guest memory for another container.

It is also KServe's storage initializer: called with pairs of a storage URI and a folder, as the container of a
ClusterStorageContainer is, and with the variables that KServe sets for a confidential model. All of these are the host's
words: they choose among the entries of `artifact.allowed`. Follows KServe of June 2026 (0217bdab),
`pkg/webhook/admission/pod` and `python/storage-initializer/scripts`.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.commands.run import add_faces, add_proxy, add_source, config_finder, host_hints, open_hardware, watch_gpus
from agent.supervisor import Supervisor

if TYPE_CHECKING:
    from agent.config import Selection


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "load",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. For an init container: the folder is a memory emptyDir of the pod. "
        "What is done stands in the configuration, which evidence covers: it has artifact.destination = directory and no "
        "[server].",
        epilog="Ends with status 0 when every file lies in DIR/model, whole and for reading only; a failure leaves nothing "
        "there. The files get the group of DIR where it has the set-group-ID bit, as fsGroup of a pod sets it. What an earlier "
        "`load` left in DIR is removed first. As KServe's storage initializer it is given URI and DIR instead of --out, and "
        "CONFIDENTIAL_ENABLED and CONFIDENTIAL_RESOURCE_ID where KServe sets them: each must be what an entry of "
        "artifact.allowed says. The files of that model then lie in DIR itself. For failures: `keyturn --help`.",
        allow_abbrev=False,
    )
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument("pair", metavar="URI DIR", nargs="*", help="what KServe asks for; one model a guest")
    parser.add_argument("--out", metavar="DIR", help="folder on tmpfs; must be artifact.directory")
    add_source(parser)
    add_faces(parser)
    add_proxy(parser)


def run(args: argparse.Namespace) -> int:
    if (args.out is None) == (not args.pair):
        args.usage_error("either --out DIR or URI DIR")
    # refusal: test_kserve_initializer.py::test_several_models_are_refused_as_are_words_that_are_no_pair
    if len(args.pair) not in (0, 2):
        args.usage_error("one URI and one DIR: a guest asks for one key")
    uri, out = args.pair or (None, args.out)
    find = config_finder(args)

    def worker(channel: Channel, served: ServedModel | None) -> int:
        from agent.worker import work

        return work(channel, find, open_hardware, served, out, args.proxy, _selection(uri))

    return Supervisor("load", host_hints(args), worker, watch_gpus).run()


def _selection(uri: str | None) -> "Selection | None":
    """What KServe asks for. Its resolver of keys has the same two variables."""
    from agent.config import Selection

    if uri is None:
        return None
    return Selection(uri, os.environ.get("CONFIDENTIAL_RESOURCE_ID"), os.environ.get("CONFIDENTIAL_ENABLED"))
