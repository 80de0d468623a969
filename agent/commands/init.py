"""`/init` of a stand-alone guest: the boot with the guest as its own source, and the end of the machine as its end."""

import argparse
import os
from typing import Any, NoReturn

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.closed import Ident
from agent.commands.run import health_address, open_hardware, watch_gpus
from agent.config_source import find_in_guest
from agent.errors import ConfigError, ConfigProblem
from agent.proxy import Proxy, parse_proxy
from agent.report import BootReport
from agent.server.process import fork
from agent.supervisor import DEFAULT_STATUS_FILE, HostHints, Supervisor


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "init",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Mounts, modules, interfaces, then what `keyturn run --guest` does, "
        "then one last line in the kernel log and power-off.",
        epilog="Kernel parameters that are read, all of them hints: keyturn.health=HOST:PORT (default: nowhere), "
        "keyturn.proxy=http://HOST:PORT (as `keyturn run --proxy`; default: none), "
        "ip=ADDRESS::GATEWAY:NETMASK::DEVICE:off:DNS (the kernel's own syntax; static addresses only).",
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> NoReturn:
    if os.getpid() != 1:
        args.parser.error("only the kernel starts this, as PID 1 of a guest")
    from agent.guest.pid1 import run_guest

    run_guest(_supervise, fork)


def _supervise(hints: dict[str, str]) -> BootReport:
    proxy = _proxy(hints.get("keyturn.proxy"))

    def worker(channel: Channel, served: ServedModel | None) -> int:
        from agent.worker import work

        return work(channel, find_in_guest, open_hardware, served, proxy=proxy)

    asked = hints.get("keyturn.health")
    address = None if asked is None else health_address(asked)
    if asked is not None and address is None:
        raise ConfigError(ConfigProblem.ADDRESS, Ident("keyturn.health"))
    supervisor = Supervisor("init", HostHints(DEFAULT_STATUS_FILE, None, address), worker, watch_gpus)
    supervisor.run()
    return supervisor.report


def _proxy(url: str | None) -> Proxy | None:
    try:
        return None if url is None else parse_proxy(url)
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("keyturn.proxy")) from None
