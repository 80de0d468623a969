"""`keyturn run`: the boot. Imports nothing heavy: this process becomes the supervisor."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.config_source import FoundConfig, find_in_guest, from_file, from_initdata_file
from agent.proxy import Proxy, parse_proxy
from agent.report import BootReport
from agent.server.process import fork
from agent.supervisor import DEFAULT_STATUS_FILE, DEFAULT_TERMINATION_LOG, HostHints, Supervisor

if TYPE_CHECKING:
    from agent.config import MeasuredConfig
    from agent.evidence import Attester, GpuSystem
    from agent.evidence.runtime import Runtime
    from agent.guest.api_server import ApiServer
    from agent.sim.machine import SimulatedMachine


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "run",
        help=summary,
        usage="keyturn run (--config FILE | --initdata FILE | --guest) [options] [-- SERVER [ARGUMENT ...]]",
        description=f"{summary[0].upper()}{summary[1:]}. Everything that decides stands in the configuration, which evidence "
        "covers; the flags below only choose where the agent talks.",
        epilog="SIGTERM, SIGINT or SIGHUP stops the server, frees guest memory and ends with status 0. "
        "For failures: `keyturn --help`.",
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    source = add_source(parser)
    source.add_argument(
        "--guest",
        action="store_true",
        help="what this guest was launched with: Kata's initdata, the initdata disk, or /etc/keyturn/keyturn.toml of the "
        "measured image. Only for an agent that is part of that image, never in a container",
    )
    add_faces(parser)
    add_proxy(parser)
    parser.add_argument(
        "server",
        nargs="*",
        metavar="SERVER",
        help="the server's command, after --, so that a pod says what runs in it. It has to be server.command of the "
        "configuration word by word, placeholders as they stand there, or the preset's: it cannot be another",
    )
    parser.add_argument("--health", metavar="HOST:PORT", help="answer /livez, /readyz and /status here; default: nowhere")
    parser.add_argument(
        "--wait-socket",
        metavar="PATH",
        help="a unix socket that is not there before the local checks have passed, for a launcher that waits for one, as "
        "kata-agent does; then it answers as --health does, and is removed at the end",
    )
    parser.add_argument(
        "--power-off-on-failure",
        action="store_true",
        help="with --guest, in a guest that Kata has put together from extension images: a boot that fails, or is killed, ends "
        "this guest. For a launcher that does not look after what it has started",
    )


def add_source(parser: argparse.ArgumentParser) -> Any:
    """Where the configuration comes from; one of them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config",
        metavar="FILE",
        help="configuration, - for standard input; HOST_DATA or MRCONFIGID is its SHA-256. Keep the file: a lease is "
        "renewed with it",
    )
    source.add_argument(
        "--initdata",
        metavar="FILE",
        help="initdata document with an entry keyturn.toml; HOST_DATA or MRCONFIGID is the document's digest",
    )
    return source


def add_faces(parser: argparse.ArgumentParser) -> None:
    """Where the agent talks."""
    parser.add_argument(
        "--status-file", metavar="FILE", help=f"status document, '' for none; default {DEFAULT_STATUS_FILE} as root"
    )
    parser.add_argument(
        "--termination-log", metavar="FILE", help=f"last message; default {DEFAULT_TERMINATION_LOG} where it exists"
    )


def add_proxy(parser: argparse.ArgumentParser) -> None:
    """Through what the agent talks."""
    parser.add_argument(
        "--proxy",
        type=_proxy,
        metavar="http://HOST:PORT",
        help="HTTP proxy (CONNECT) on the way to https servers: broker.url, stores and mirrors; it sees their names and no "
        "content. Connected without it: broker.endpoints (gRPC), plain http, what stays inside the guest. An error where "
        "nothing goes through it. Default: none, whatever the environment says",
    )


def _proxy(url: str) -> Proxy:
    try:
        return parse_proxy(url)
    except ValueError:  # argparse would repeat the value, which may have a password
        raise argparse.ArgumentTypeError("takes http://HOST:PORT") from None


def run(args: argparse.Namespace) -> int:
    address = health_address(args.health) if args.health else None
    if args.health and address is None:
        args.parser.error("--health takes HOST:PORT")
    if args.wait_socket is not None and not os.path.isabs(args.wait_socket):
        args.parser.error("--wait-socket takes an absolute path")
    # refusal: test_only_an_agent_of_the_guest_image_powers_its_machine_off
    if args.power_off_on_failure and not args.guest:
        args.parser.error("--power-off-on-failure is for --guest alone")
    # refusal: test_a_machine_that_is_no_guest_of_kata_is_not_powered_off
    if args.power_off_on_failure and not _in_guest_of_kata():
        args.parser.error("--power-off-on-failure is for a guest of Kata: the kernel's command line has no kata.extension.NAME")
    find: Callable[[], FoundConfig | None] = find_in_guest if args.guest else config_finder(args)

    def worker(channel: Channel, served: ServedModel | None) -> int:
        from agent.config import Selection
        from agent.worker import work

        return work(channel, find, open_hardware, served, proxy=args.proxy, asked=Selection(command=tuple(args.server)))

    def supervise() -> BootReport:
        supervisor = Supervisor("run", host_hints(args, address, args.wait_socket), worker, watch_gpus)
        supervisor.run()
        return supervisor.report

    if args.power_off_on_failure:
        from agent.guest.pid1 import run_or_power_off

        return run_or_power_off(supervise, fork)
    return supervise().exit_status or 0


def _in_guest_of_kata() -> bool:
    from agent.guest.pid1 import is_guest_of_kata

    with open("/proc/cmdline") as file:
        return is_guest_of_kata(file.read())


def host_hints(args: argparse.Namespace, health: tuple[str, int] | None = None, wait_socket: str | None = None) -> HostHints:
    """What `add_faces` asked for."""
    status_file = args.status_file if args.status_file is not None else (DEFAULT_STATUS_FILE if os.geteuid() == 0 else None)
    termination_log = args.termination_log or (DEFAULT_TERMINATION_LOG if os.path.exists(DEFAULT_TERMINATION_LOG) else None)
    return HostHints(status_file or None, termination_log, health, wait_socket)


def config_finder(args: argparse.Namespace) -> "Callable[[], FoundConfig | None]":
    """Where the worker looks. Standard input is read now, while a signal still ends it as it ends anything."""
    read, file = (from_file, args.config) if args.config is not None else (from_initdata_file, args.initdata)
    if file == "-":
        found = read(file)
        return lambda: found
    return lambda: read(file)


def health_address(text: str) -> tuple[str, int] | None:
    """HOST:PORT; None when it is not."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        return None
    return host.strip("[]"), int(port)


def open_hardware(cfg: "MeasuredConfig") -> "tuple[Attester, GpuSystem | None, Runtime]":
    """The devices the configuration names. Simulators are imported here and only when asked for by name."""
    return open_tee(cfg), open_gpus(cfg), open_runtime(cfg)


def open_tee(cfg: "MeasuredConfig") -> "Attester":
    """The CPU TEE."""
    from agent.evidence import Tee

    if cfg.tee.through_coco:
        from agent.evidence.coco import CocoAttester

        sample_digest = simulated_machine(cfg.simulation.machine).host_data if cfg.simulation else None
        return CocoAttester(_api_server(cfg), needs_resources=cfg.broker.cdh, sample_digest=sample_digest)
    if cfg.simulation is not None:
        machine, tee = simulated_machine(cfg.simulation.machine), Tee(cfg.tee.attester.removeprefix("simulated-"))
        return machine.attester(tee) if cfg.simulation.report_root is None else machine.tsm(tee, cfg.simulation.report_root)
    from agent.evidence.detect import open_interface

    return open_interface(Tee(cfg.tee.attester))


def open_runtime(cfg: "MeasuredConfig") -> "Runtime":
    """The runtime register of the TEE, and the event log."""
    from agent.evidence import Tee
    from agent.evidence.runtime import ComponentsMeasurement, RuntimeMeasurement

    if cfg.tee.through_coco:
        return ComponentsMeasurement(_api_server(cfg))
    tee = Tee(cfg.tee.attester.removeprefix("simulated-"))
    if cfg.simulation is not None:
        return simulated_machine(cfg.simulation.machine).runtime(tee)
    return RuntimeMeasurement.of(tee)


def open_gpus(cfg: "MeasuredConfig") -> "GpuSystem | None":
    """The GPUs, and with them the NVSwitches if there shall be any; None when there shall be no GPU."""
    if not cfg.gpu.count:
        return None
    machine = simulated_machine(cfg.simulation.machine) if cfg.simulation else None
    gpus: GpuSystem
    if machine:
        gpus = machine.gpu_system()
    else:
        from agent.evidence.gpu import NvmlGpuSystem

        gpus = NvmlGpuSystem()
    if cfg.gpu.switches:
        from agent.evidence.nscq import GpusAndSwitches, NscqSwitches

        gpus = GpusAndSwitches(gpus, machine.switch_system() if machine else NscqSwitches())
    if not cfg.tee.through_coco:
        return gpus
    from agent.evidence.coco import CocoGpus

    return CocoGpus(_api_server(cfg), gpus)


def _api_server(cfg: "MeasuredConfig") -> "ApiServer":
    from agent.guest.api_server import ApiServer

    return ApiServer(cfg.tee.coco_url)


def watch_gpus(channel: Channel, folder: str | None) -> int:
    """In the watch process: see `evidence/gpu_watch.py`."""
    from agent.evidence.gpu_watch import watch

    if folder is None:
        return watch(channel)
    machine = simulated_machine(folder)
    from agent.sim.nvml import KERNEL_LOG, SimulatedNvml

    return watch(channel, SimulatedNvml(machine), machine.directory / KERNEL_LOG)


def simulated_machine(directory: str) -> "SimulatedMachine":
    """The machine in this folder. Raises SimulationRefusedError."""
    from pathlib import Path

    from agent.errors import SimulationRefusal, SimulationRefusedError

    try:
        from agent.sim.machine import SimulatedMachine
    except ModuleNotFoundError:
        raise SimulationRefusedError(SimulationRefusal.NOT_INSTALLED) from None
    return SimulatedMachine.load(Path(directory))
