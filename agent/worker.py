"""The worker process: everything that needs threads, gRPC and cryptography, for the length of one boot or one renewal.

Forked by the supervisor, it runs `boot.py`, hands descriptors and outcome over the channel and exits: the exit of a process
is the only real wipe Python has. Every renewal is another worker. Owns the translation of whatever went wrong into one
AgentError. Its stdout and stderr lead nowhere, so that no library can say anything.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent import unhandled
from agent.artifact import ServedModel
from agent.channel import Channel
from agent.closed import Ident
from agent.config import ArtifactConfig, BrokerConfig, Measured, MeasuredConfig, Selection, ServerConfig, parse
from agent.config_source import FILE, INITDATA_FILE, FoundConfig
from agent.errors import (
    AgentError,
    Asked,
    ConfigError,
    ConfigNotMeasuredError,
    ConfigProblem,
    InternalError,
    NoAttesterError,
)
from agent.events import (
    AttesterOpened,
    ConfigFound,
    Event,
    LocalChecksPassed,
    NotAffirmed,
    Retrying,
    Stage,
    WaitingFor,
    message_to_record,
)
from agent.evidence import Attester, GpuSystem
from agent.evidence.gate import ExpectedReady
from agent.guest import hardening
from agent.guest.network import has_route, wait_for_route
from agent.guest.uevents import appears
from agent.lease import Lease
from agent.proxy import Proxy
from agent.publish import HandedModel
from agent.server import Output, ServerPlan
from agent.server.presets import ProbeKind, command_digest, server_plan
from agent.stages import Durations, Notify, stage
from agent.threads import in_thread

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from agent.artifact import LoadedArtifact
    from agent.artifact.sources import BlobSource
    from agent.artifact.sources.mirrors import LockedStore
    from agent.evidence.collect import Devices
    from agent.evidence.runtime import Runtime
    from agent.handshake.broker import Broker
    from agent.modes import Mode
    from agent.store_credentials import StoreCredentials

STORE_TIMEOUT_S = 60
CONFIG_WAIT_S = 10
"""For the disk with the initdata to appear: nothing that is measured can say how long, before it is read."""
API_SERVER_LOOK_S = 0.5
"""No uevent tells that a server has started."""
FindConfig = Callable[[], FoundConfig | None]
"""Looks for the one configuration; None while there is none."""
OpenHardware = Callable[[MeasuredConfig], "tuple[Attester, GpuSystem | None, Runtime]"]
"""Opens the devices the configuration names; the command line chooses between silicon and simulators."""


def work(
    channel: Channel,
    find_config: FindConfig,
    open_hardware: OpenHardware,
    served: ServedModel | None = None,
    out: str | None = None,
    proxy: Proxy | None = None,
    asked: Selection | None = None,
) -> int:
    """Run one boot or one renewal and report it over `channel`.

    Args:
        channel: to the supervisor.
        find_config: as above.
        open_hardware: as above.
        served: the model whose lease is to be renewed; None boots.
        out: the folder in which the open model is left, for somebody else to serve; None: it is handed to the supervisor.
        proxy: a hint of the command line, on the way to https servers.
        asked: which of the allowed models, and for which server; None: there must be one only.

    Returns:
        This process's exit status: 0 when the outcome was told.
    """
    hardening.lead_standard_descriptors_nowhere()

    def notify(event: Event) -> None:
        channel.send(message_to_record(event))

    unhandled.install(notify)
    unhandled.silence_libraries()
    with ExitStack() as undo:
        try:
            if served is None:
                announce = partial(_announce, channel)
                give_receipt = partial(_give_receipt, channel)
                record, descriptors = asyncio.run(
                    _boot(find_config, open_hardware, undo, notify, announce, give_receipt, out, proxy, asked)
                )
                channel.send(record, descriptors)
                undo.pop_all()  # it is somebody else's now: nothing here may take it back
            else:
                asyncio.run(_renew(find_config, open_hardware, served, notify, proxy))
        except BaseException as error:  # noqa: BLE001  # the one place where foreign exceptions become ours
            failure = as_agent_error(error)
            undo.close()  # first: when the supervisor hears of the failure, nothing is left here
            if failure is not None:
                channel.send(message_to_record(failure))
    channel.close()
    return 0


def _announce(channel: Channel, directory: str) -> None:
    """Plaintext will lie in somebody else's tmpfs: should we be killed, the supervisor removes it."""
    channel.send({"given": directory})


def _give_receipt(channel: Channel, receipt: bytes) -> None:
    """To the supervisor, which shows it: longer than a record may be."""
    with open(os.memfd_create("receipt"), "w+b") as file:
        file.write(receipt)
        file.flush()
        file.seek(0)
        channel.send({"receipt": len(receipt)}, (file.fileno(),))


def mode_of(source: Ident, plan: ServerPlan | None) -> "Mode":
    """How the agent was started: only one that is part of a measured image looks for its configuration by itself."""
    from agent.modes import Mode

    if plan is None:
        return Mode.LOAD
    return Mode.ENTRYPOINT if source in (FILE, INITDATA_FILE) else Mode.GUEST


def _leave_receipt(loaded: "LoadedArtifact", receipt: bytes) -> None:
    """Beside the model that is left to another container. Raises DestinationError."""
    from agent.artifact import given
    from agent.artifact.window import translated

    assert loaded.directory is not None, "check_out"
    with translated():
        folder = os.open(os.path.dirname(loaded.directory), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            given.leave_receipt(folder, loaded.descriptors[0], receipt)
        finally:
            os.close(folder)


async def _boot(
    find_config: FindConfig,
    open_hardware: OpenHardware,
    undo: ExitStack,
    notify: Notify,
    announce: Callable[[str], None],
    give_receipt: Callable[[bytes], None],
    out: str | None,
    proxy: Proxy | None,
    asked: Selection | None,
) -> tuple[dict[str, object], tuple[int, ...]]:
    _watch_loop(notify)
    notify = durations = Durations(notify)
    with stage(Stage.CONFIG, notify):
        found = await _find(find_config, notify)
        notify(ConfigFound(found.source))
        measured = parse(found.data, found.digest, found.initdata).select(asked)
        check_out(measured.config, out)
        if proxy is not None:
            proxy.check_use(measured.config)
        plan = plan_of(measured.config)
        check_command(plan, asked)

    # First of all that is slow: the connection is made while the rest is imported and the devices are read.
    cfg, at = measured.config, measured.config.broker
    async with _broker(measured, notify, proxy) as broker:
        local = stays_inside(at)
        with suppress(OSError):  # told below, where the route is needed
            if local or has_route():
                broker.connect()

        with stage(Stage.DEVICES, notify):
            expected = ExpectedReady.PRESET if cfg.gpu.ready_state == "preset" else ExpectedReady.UNSET
            devices = await _open(measured, plan, open_hardware, expected, notify)
        notify(LocalChecksPassed())
        if cfg.artifact.directory is not None:
            announce(cfg.artifact.directory)

        if not local:
            with stage(Stage.NETWORK, notify):
                waiting = WaitingFor(Ident("route"), at.route_timeout_s)
                await wait_for_route(at.route_timeout_s, lambda: notify(waiting))
            broker.connect()

        from agent.boot import boot
        from agent.receipts import Notary

        notary = Notary(mode_of(found.source, plan), measured.digest, durations.ms, notify)
        store = _store(cfg.artifact, undo, proxy)
        # From before the request: a slow answer costs the lease, not the authority.
        lease_from = time.clock_gettime(time.CLOCK_BOOTTIME)
        gid = plan.gid if plan else None
        loaded, lease_s, receipt = await boot(
            cfg, devices, broker, store, undo, notify, gid, notary, supervised=plan is not None
        )
    give_receipt(receipt)
    if plan is None:
        if cfg.artifact.uri is None:  # a server that is given a spread model may take any file for one of it
            _leave_receipt(loaded, receipt)
        return {"left": loaded.version}, ()
    handed = HandedModel(
        plan=plan,
        destination=loaded.destination,
        directory=loaded.directory,
        single_file=loaded.files[0].path if len(loaded.files) == 1 else None,
        descriptors=loaded.descriptors,
        served=ServedModel(loaded.manifest_digest, loaded.version),
        lease=None if lease_s is None else Lease(lease_s, lease_from),
        watch_gpus=cfg.gpu.count > 0,
        simulated_machine=cfg.simulation.machine if cfg.simulation else None,
        release=cfg.artifact.after_ready == "release",
    )
    return {"loaded": handed.record()}, handed.descriptors


async def _renew(
    find_config: FindConfig, open_hardware: OpenHardware, served: ServedModel, notify: Notify, proxy: Proxy | None
) -> None:
    """What a boot does up to the Verdict, without its stages: those have their figures.

    A route is not waited for: without one the broker cannot be reached, and that may be tried again.
    """
    _watch_loop(notify)
    found = await _find(find_config, _unheard)
    measured = parse(found.data, found.digest, found.initdata)
    plan = plan_of(measured.config)

    from agent.boot import renew

    async with _broker(measured, notify, proxy) as broker:
        devices = await _open(measured, plan, open_hardware, ExpectedReady.OURS, _unheard)
        await renew(measured.config, devices.to_load(served.manifest_digest), broker, served.version, notify)


def _store(cfg: ArtifactConfig, undo: ExitStack, proxy: Proxy | None) -> "BlobSource | LockedStore":
    from agent.artifact.sources.mirrors import LockedStore, open_mirrored

    def opened(credentials: "StoreCredentials | None" = None) -> "BlobSource":
        store = open_mirrored(cfg, STORE_TIMEOUT_S, proxy, credentials)
        undo.callback(store.close)
        return store

    return opened() if cfg.credentials_uri is None else LockedStore(Ident(cfg.credentials_uri), opened)


def _unheard(_: Event) -> None:
    """For what a renewal does as a boot does it, and the status shows of the boot."""


def _watch_loop(notify: Notify) -> None:
    """SIGTERM cancels the running task; what nobody caught is told."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    unhandled.watch_loop(loop, notify)


async def _find(find_config: FindConfig, notify: Notify) -> FoundConfig:
    found = await appears(find_config, CONFIG_WAIT_S, lambda: notify(WaitingFor(Ident("config"), CONFIG_WAIT_S)))
    if found is None:
        raise ConfigError(ConfigProblem.NOT_FOUND)
    return found


def _broker(measured: Measured, notify: Notify, proxy: Proxy | None) -> "Broker":
    from agent.handshake.machine import Trust

    cfg, at = measured.config, measured.config.broker
    trust = Trust(token_keys(at.token_keys or ()), at.allow_simulated)

    def on_unaffirmed(finding: Ident) -> None:
        notify(NotAffirmed(finding))

    if at.cdh:
        from agent.guest.api_server import TIMEOUT_S, ApiServer
        from agent.handshake.cdh import CdhBroker

        api = ApiServer(cfg.tee.coco_url, min(at.timeout_s, TIMEOUT_S))
        return CdhBroker(api, trust, measured.digest, cfg.gpu.count, on_unaffirmed, simulated=cfg.tee.simulated)

    def on_retry(error: AgentError, attempt: int, wait_s: float) -> None:
        notify(Retrying(attempt, round(wait_s * 1000), Ident(type(error).__name__)))

    if at.url is not None:
        from agent.handshake.rcar import PROTOCOL_VERSION
        from agent.handshake.rcar_client import RcarBroker, Site

        site = Site(
            at.url,
            at.ca_pem,
            at.server_name,
            at.resource_uri or at.key_uri,
            at.protocol_version or PROTOCOL_VERSION,
            measured.initdata.decode() if measured.initdata is not None else None,
            measured.digest,
            simulated=cfg.tee.simulated,
            proxy=proxy,
        )
        return RcarBroker(site, trust, at.timeout_s, on_retry, on_unaffirmed)
    from agent.handshake import TokenKind
    from agent.handshake.grpc_client import GrpcBroker, InitData

    assert at.endpoints and at.ca_pem and at.server_name, "the schema asks for them"
    return GrpcBroker(
        at.endpoints,
        at.ca_pem,
        at.server_name,
        trust,
        at.timeout_s,
        on_retry,
        TokenKind(at.tokens),
        on_unaffirmed,
        InitData(measured.initdata, measured.digest) if measured.initdata is not None else None,
        simulated=cfg.tee.simulated,
    )


async def _open(
    measured: Measured, plan: ServerPlan | None, open_hardware: OpenHardware, expected_ready: ExpectedReady, notify: Notify
) -> "Devices":
    from agent.artifact import given
    from agent.artifact.window import translated
    from agent.evidence.collect import check_measured, open_devices

    cfg = measured.config
    absent: list[NoAttesterError] = []

    def look() -> "tuple[Attester, GpuSystem | None, Runtime] | None":
        try:
            return open_hardware(cfg)
        except NoAttesterError as error:
            absent.append(error)
            return None

    waiting = WaitingFor(Ident("tee"), cfg.tee.wait_s)
    every_s = API_SERVER_LOOK_S if cfg.tee.through_coco else None
    hardware = await appears(look, cfg.tee.wait_s, lambda: notify(waiting), every_s)
    if hardware is None:
        raise absent[-1]
    attester, gpus, runtime = hardware
    notify(AttesterOpened(Ident(attester.tee.value), attester.interface))

    def look_at_them() -> "Devices":
        guest = check_measured(attester, measured.digest)
        if cfg.tee.runtime_measurement == "required" and expected_ready is not ExpectedReady.OURS:  # a renewal measures nothing
            runtime.require()
        if cfg.artifact.directory is not None and expected_ready is not ExpectedReady.OURS:
            with translated():  # now, because a boot after a dead agent's ends at the gate
                given.wipe(cfg.artifact.directory)
        return open_devices(
            guest,
            gpus,
            runtime,
            gpu_count=cfg.gpu.count,
            switch_count=cfg.gpu.switches,
            architecture=cfg.gpu.architecture and cfg.gpu.architecture.upper(),
            expected_ready=expected_ready,
            manifest_digest=cfg.artifact.manifest_digest,
            server_command_digest=command_digest(plan.argv if plan else ()),
        )

    return await in_thread(look_at_them)


def stays_inside(broker: BrokerConfig) -> bool:
    """Is a boot without a route out of this guest worth while? What the guest's own components need is their affair."""
    return all(is_loopback(endpoint) for endpoint in broker.endpoints or ([endpoint_of(broker.url)] if broker.url else ()))


def endpoint_of(url: str) -> str:
    """`broker.url` as `host:port`."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}[parts.scheme]
    return parts.netloc if parts.port else f"{parts.netloc}:{default}"


def is_loopback(endpoint: str) -> bool:
    """Does this `host:port` stay inside the guest?"""
    host = endpoint.rpartition(":")[0]
    return host in ("localhost", "[::1]") or host.startswith("127.")


def token_keys(pems: tuple[str, ...]) -> "tuple[EllipticCurvePublicKey, ...]":
    """The authority's keys. Raises ConfigError."""
    from agent.handshake.token import parse_token_key

    keys = []
    for index, pem in enumerate(pems):
        try:
            keys.append(parse_token_key(pem))
        except ValueError:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"broker.token_keys[{index}]")) from None
    return tuple(keys)


def check_out(config: MeasuredConfig, out: str | None) -> None:
    """What becomes of the open model is said by the measured configuration; whoever starts the agent can only ask for the same.

    Raises:
        ConfigError: it says something else than the command line.
    """
    # refusal: test_what_becomes_of_the_model_is_said_by_the_configuration
    if out is None and config.server is None:
        raise ConfigError(ConfigProblem.MISSING_KEY, Ident("server"))
    # refusal: test_what_becomes_of_the_model_is_said_by_the_configuration
    if out is not None and config.server is not None:
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("server"))
    directory = config.artifact.directory
    # refusal: test_what_becomes_of_the_model_is_said_by_the_configuration
    if out is not None and (directory is None or os.path.normpath(out) != os.path.normpath(directory)):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.directory"))


def plan_of(config: MeasuredConfig) -> ServerPlan | None:
    """The plan of the server that we run; None when another container does. Raises ConfigError."""
    return plan_server(config.server) if config.server else None


def check_command(plan: ServerPlan | None, asked: Selection | None) -> None:
    """Check that the server somebody asks for is the one we run, placeholders as they are. Raises ConfigNotMeasuredError."""
    # refusal: test_the_words_after_the_dashes_are_the_measured_command_or_the_boot_ends
    if asked is not None and asked.command and (plan is None or asked.command != plan.argv):
        raise ConfigNotMeasuredError(Asked.COMMAND)


def plan_server(server: ServerConfig) -> ServerPlan:
    """The plan of the `[server]` section. Raises ConfigError."""
    as_root = os.geteuid() == 0
    keep_root = as_root and server.unsafe_run_as_root
    return server_plan(
        server.preset,
        host=server.host,
        port=server.port,
        command=server.command,
        environment=server.environment,
        uid=(0 if keep_root else server.uid) if as_root else None,
        gid=(0 if keep_root else server.gid) if as_root else None,
        model_id=server.model_id,
        health_path=server.health_path,
        probe=ProbeKind(server.probe) if server.probe else None,
        ready_timeout_s=server.ready_timeout_s,
        stop_timeout_s=server.stop_timeout_s,
        max_restarts=server.max_restarts,
        output=Output(server.output),
        scratch_max_bytes=server.scratch_mib << 20,
        egress=server.egress,
    )


def as_agent_error(error: BaseException) -> AgentError | None:
    """The one AgentError to report: the first in a group; None for cancellation; InternalError for anything foreign."""
    if isinstance(error, AgentError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [as_agent_error(inner) for inner in error.exceptions]
        ours = [inner for inner in found if inner is not None]
        return next((inner for inner in ours if not isinstance(inner, InternalError)), ours[0] if ours else None)
    if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
        return None
    return InternalError.of(error)
