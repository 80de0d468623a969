"""What a boot would meet in this guest, asked check by check, without a boot.

Owns the checks, their order, and what each of them needs of the ones before. A check is one function here and one line in
`CHECKS`: see `examination.Check`. It asks through the boot's own code where there is
some, so that the two cannot come to different results.

Changes nothing outside this process: asks for no key, sets no ready state, takes no memory, wipes no folder. The CPU TEE is
asked for one report, and a GPU is opened only where that costs nothing. Prints nothing.
"""

import asyncio
import errno
import os
import shutil
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from agent import fitness
from agent.closed import Ident
from agent.config import parse
from agent.errors import (
    Absence,
    BrokerIdentityError,
    BrokerUnreachableError,
    ConfigError,
    ConfigProblem,
    DeviceError,
    EvidenceFormat,
    IdentityProblem,
    MalformedEvidenceError,
    NoAttesterError,
    ServerStartError,
    SimulationRefusal,
    SimulationRefusedError,
)
from agent.evidence import GpuSystem, Tee
from agent.examination import Check, Guest, Skip, SkippedError, needed
from agent.fitness import Seen
from agent.guest import hardening, landlock
from agent.guest.memory_info import MACHINE
from agent.guest.network import wait_for_route
from agent.threads import signals_wait
from agent.worker import endpoint_of, plan_of, stays_inside, token_keys

if TYPE_CHECKING:
    from agent.handshake.kbs_http import KbsHttp

LOOK_S = 10
"""For one answer over a network. Nothing is tried again: a retry would hide what is looked for."""


# --- the process and its configuration --------------------------------------------------------------------------------


def _hardening(guest: Guest) -> None:
    """On ourselves: what the supervisor does first."""
    hardening.harden_agent()
    hardening.become_subreaper()


def _landlock(guest: Guest) -> None:
    abi = landlock.abi_version()
    if abi < landlock.ABI_NETWORK:
        raise SkippedError(Skip.NO_LANDLOCK_PORTS if abi else Skip.NO_LANDLOCK)


def _configuration(guest: Guest) -> None:
    found = guest.find_config()
    if found is None:
        raise ConfigError(ConfigProblem.NOT_FOUND)
    guest.measured = parse(found.data, found.digest).select(guest.asked)
    guest.plan = plan_of(guest.config)
    token_keys(guest.config.broker.token_keys or ())
    if guest.proxy is not None:
        guest.proxy.check_use(guest.config)


# --- devices ----------------------------------------------------------------------------------------------------------


def _kernel(guest: Guest) -> Seen:
    from agent.evidence.detect import hinted

    simulated = guest.measured is not None and guest.config.simulation is not None
    if guest.measured is None or simulated:
        return fitness.check_kernel(None if simulated else hinted(), guest.places)
    return fitness.check_kernel(Tee(guest.config.tee.attester), guest.places)


def _tee(guest: Guest) -> Seen:
    from agent.evidence.detect import hinted, open_interface

    with signals_wait():
        if guest.measured is None:  # of which TEE nobody says: look for the one it seems to be
            guest.tee = open_interface(hinted() or Tee.SNP)
        else:
            guest.tee = guest.open_tee(guest.config)
    return {"tee": Ident(guest.tee.tee.value), "interface": guest.tee.interface}


def _host_data(guest: Guest) -> None:
    from agent.evidence.collect import check_measured

    measured = needed(guest.measured, Skip.NO_CONFIGURATION)
    tee = needed(guest.tee, Skip.NO_TEE)
    with signals_wait():
        check_measured(tee, measured.digest)


def _tdx(guest: Guest) -> Seen:
    """What a TDX guest has beside its quotes. What is not there is told, and fails only where it is required; so does what is
    broken.
    """
    from agent.evidence.ccel import MAX_LOG_BYTES, pack_event_log, parse_event_log
    from agent.evidence.rtmr import INTERFACE, REGISTER
    from agent.evidence.tdx_guest import read_port
    from agent.handshake import MAX_EVENT_LOG_BYTES

    required = guest.measured is not None and guest.config.tee.runtime_measurement == "required"
    if needed(guest.tee, Skip.NO_TEE).tee is not Tee.TDX:
        if required:
            raise NoAttesterError(INTERFACE, Absence.NO_RUNTIME_REGISTER)
        raise SkippedError(Skip.NO_TDX)
    if guest.config.tee.through_coco:
        raise SkippedError(Skip.FOREIGN_REGISTER)
    at = guest.places
    try:
        quote_service = f"vsock:{read_port(at.attest_conf)}"
    except NoAttesterError:  # fatal only without configfs-tsm, as `tee` says
        quote_service = "none-named"
    try:
        with at.event_log.open("rb") as file:
            log = parse_event_log(file.read(MAX_LOG_BYTES + 1))
        events, size = f"{len(log.events)}-events", len(pack_event_log(log))
        # refusal: test_an_event_log_that_no_boot_could_send_is_a_failure
        if size > MAX_EVENT_LOG_BYTES:
            raise MalformedEvidenceError(EvidenceFormat.EVENT_LOG, Ident("length"), size, MAX_EVENT_LOG_BYTES)
    except (FileNotFoundError, PermissionError) as error:
        events = f"errno-{error.errno}"
    except OSError as error:
        raise DeviceError(Ident("event-log"), Ident("read"), error.errno or 0) from error
    register = "present" if (at.measurements / REGISTER).exists() else "absent"
    if required and register == "absent" and guest.config.simulation is None:
        raise NoAttesterError(INTERFACE, Absence.NO_RUNTIME_REGISTER)
    return {"quote-service": Ident(quote_service), "event-log": Ident(events), "rtmr3": Ident(register)}


def _gpu_driver(guest: Guest) -> Seen:
    _real_gpus(guest)
    return fitness.check_gpu_driver(guest.places)


def _gpu_parameters(guest: Guest) -> None:
    """Without a GPU opened, so that it is told also where none may be. Of a driver that is not loaded there are none."""
    from agent.evidence.gpu import check_registry_keys

    _real_gpus(guest)
    check_registry_keys(path for path in guest.places.gpu_parameters if path.exists())


def _real_gpus(guest: Guest) -> None:
    if not guest.config.gpu.count:
        raise SkippedError(Skip.NO_GPU)
    if guest.config.simulation is not None:  # their parameters are looked at with their inventory
        raise SkippedError(Skip.SIMULATED)


def _gpu(guest: Guest) -> None:
    from agent.evidence.gpu import is_held
    from agent.evidence.gpu_watch import open_nvml

    if not guest.config.gpu.count:
        raise SkippedError(Skip.NO_GPU)
    if guest.config.simulation is None:
        open_nvml()  # touches no GPU
        if not is_held():
            raise SkippedError(Skip.GPU_NOT_HELD)
    with signals_wait():
        guest.gpus = guest.open_gpus(guest.config)


def _gpu_inventory(guest: Guest) -> Seen:
    from agent.evidence.gate import ExpectedReady, check_gpus, check_ready

    gpus, config = _opened_gpus(guest), guest.config.gpu
    expected = ExpectedReady.PRESET if config.ready_state == "preset" else ExpectedReady.UNSET
    with signals_wait():
        inventory = guest.inventory = gpus.inspect()
    check_gpus(inventory, config.count, config.architecture and config.architecture.upper())
    check_ready(inventory, expected)
    first, modes = inventory.gpus[0], inventory.modes
    mode = f"multi-gpu-{modes.multi_gpu_mode}" if modes.multi_gpu_mode else "cc"
    said = {"driver": inventory.driver_version, "vbios": first.vbios_version, "architecture": first.arch, "mode": mode}
    return {name: Ident.of_peer(text) for name, text in said.items()} | {"ready": Ident(str(int(inventory.ready)))}


def _gpu_switches(guest: Guest) -> Seen:
    """Also that GPUs in protected-PCIe mode are not used without them."""
    from agent.evidence.gate import check_switches

    _opened_gpus(guest)
    inventory, count = needed(guest.inventory, Skip.NO_INVENTORY), guest.config.gpu.switches
    check_switches(inventory, count)
    if not count:
        raise SkippedError(Skip.NO_SWITCH)
    return {"count": Ident(str(count)), "architecture": Ident(inventory.switches[0].arch), "mode": Ident("locked")}


def _gpu_faults(guest: Guest) -> None:
    _opened_gpus(guest).check_faults()


def _opened_gpus(guest: Guest) -> GpuSystem:
    return needed(guest.gpus, Skip.GPU_NOT_OPEN if guest.config.gpu.count else Skip.NO_GPU)


# --- broker and store -------------------------------------------------------------------------------------------------


def _clock(guest: Guest) -> Seen:
    """Outside the life of the measured CA no handshake succeeds; found before anybody is asked, and without a network."""
    from cryptography import x509

    from agent.verify.roots import UNREADABLE

    now = datetime.now(UTC)
    seen = fitness.check_clock(now)
    if guest.config.broker.cdh:  # the connection is between the guest's own components
        return seen
    ca_pem = needed(guest.config.broker.ca_pem, Skip.NO_TLS)
    try:
        authorities = x509.load_pem_x509_certificates(ca_pem.encode())
    except UNREADABLE:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("broker.ca_pem")) from None
    if not any(authority.not_valid_before_utc <= now <= authority.not_valid_after_utc for authority in authorities):
        ahead = any(now < authority.not_valid_before_utc for authority in authorities)
        raise BrokerIdentityError(IdentityProblem.NOT_YET_VALID if ahead else IdentityProblem.EXPIRED)
    return seen


def _route(guest: Guest) -> Seen:
    """With a proxy also who is reached through it: not everybody is."""
    _stay_offline(guest)
    config = guest.config
    if not stays_inside(config.broker):
        asyncio.run(wait_for_route(0))
    if guest.proxy is None:
        return {}
    through = zip(("broker", "store"), guest.proxy.check_use(config), strict=True)
    return {name: Ident("through-the-proxy" if used else "without-the-proxy") for name, used in through}


def _broker(guest: Guest) -> None:
    """As the boot does: the first address that answers is the broker, or an impostor."""
    from agent.handshake.grpc_failure import Peer, check_peer
    from agent.handshake.kbs_http import KbsHttp

    at = guest.config.broker
    endpoints = needed(at.endpoints or ((endpoint_of(at.url),) if at.url else None), Skip.OWN_COMPONENTS)
    ca_pem, server_name = needed(at.ca_pem, Skip.NO_TLS), needed(at.server_name, Skip.NO_TLS)
    _stay_offline(guest)
    if at.url and guest.proxy is not None:
        asyncio.run(_ask(KbsHttp(at.url, ca_pem, server_name, guest.proxy)))
        return
    for number, endpoint in enumerate(endpoints, 1):
        try:
            asyncio.run(check_peer(Peer(endpoint, ca_pem, server_name), LOOK_S))
        except BrokerUnreachableError as error:
            error.attempts = number
            if number == len(endpoints):
                raise
        else:
            return


async def _ask(kbs: "KbsHttp") -> None:
    """Any answer will do: the identity is proven before one comes."""
    from agent.handshake.kbs_http import Question

    try:
        await kbs.ask(Question("/", {}, None), LOOK_S, Ident("START"))
    finally:
        kbs.close()


def _simulation(guest: Guest) -> None:
    if guest.config.simulation is not None and not guest.config.broker.allow_simulated:
        raise SimulationRefusedError(SimulationRefusal.NOT_ALLOWED)  # as the boot says of the verdict


def _store(guest: Guest) -> Seen | None:
    """Of KServe's files all but the ciphertext is looked at: whether a key opens them, nothing tells without it."""
    import threading

    from agent.artifact import kserve
    from agent.artifact.identify import find_manifest
    from agent.artifact.load import read_model
    from agent.artifact.sources import open_configured
    from agent.artifact.volume_config import VolumeConfig

    config = guest.config
    if config.artifact.credentials_uri is not None:
        raise SkippedError(Skip.NO_CREDENTIALS)
    if not config.artifact.source.startswith("/"):
        _stay_offline(guest)
    store = open_configured(config.artifact, LOOK_S, guest.proxy)
    try:
        if config.artifact.format == "kserve-jwe":
            plain = kserve.read_plain(store, config.artifact)
            files = kserve.find(store, config.artifact.jwe_files, threading.Event())
            guest.sizes = {file.path: file.jwe.plaintext_bytes for file in files}
            guest.sizes |= {path: len(content) for path, content in plain.items()}
            return {"jwe": Ident(f"{len(files)}-files"), "plain": Ident(f"{len(plain)}-files")}
        artifact = find_manifest(store, config.artifact, threading.Event())
        model = read_model(store, artifact, config.broker.key_uri)
        if isinstance(model, VolumeConfig):
            guest.sizes, guest.volume = {}, model  # nothing of it goes into memory
        else:
            guest.sizes = {file.path: file.size for file in model.files}
        return None
    finally:
        store.close()


def _stay_offline(guest: Guest) -> None:
    if guest.offline:
        raise SkippedError(Skip.OFFLINE)


# --- memory and server ------------------------------------------------------------------------------------------------


def _memory(guest: Guest) -> None:
    from agent.artifact.memory import check_memory, demand_of

    headroom_bytes = guest.config.artifact.headroom_mib << 20
    check_memory(demand_of(needed(guest.sizes, Skip.NO_MANIFEST)), headroom_bytes, MACHINE)


def _destination(guest: Guest) -> None:
    """Swap included. Without the manifest for one empty file, without a configuration for its default."""
    from agent.artifact.memory import check_destination, demand_of
    from agent.artifact.volume import look_for_volume

    nothing = demand_of({"model": 0})
    if guest.measured is None:
        check_destination("auto", None, nothing, None, allow_swap=False, memory=MACHINE)
        return
    config, gid = guest.config.artifact, guest.plan.gid if guest.plan else None
    if guest.volume is not None:
        look_for_volume(guest.volume, config)
        return
    demand = nothing if guest.sizes is None else demand_of(guest.sizes)
    allow_swap = config.unsafe_allow_swap
    check_destination(config.destination, config.directory, demand, gid, allow_swap=allow_swap, memory=MACHINE)


def _server_program(guest: Guest) -> None:
    """With our own rights: whether `server.uid` may execute it shows at its start."""
    plan = needed(guest.plan, Skip.NO_SERVER if guest.measured else Skip.NO_CONFIGURATION)
    program = plan.argv[0]
    if "/" in program:
        program = os.path.join("/", program)  # where the server starts
    if shutil.which(program, path=dict(plan.environment)["PATH"]) is None:
        raise ServerStartError(errno.EACCES if "/" in program and os.path.exists(program) else errno.ENOENT)


def _server_address(guest: Guest) -> None:
    plan = needed(guest.plan, Skip.NO_SERVER if guest.measured else Skip.NO_CONFIGURATION)
    with socket.socket(socket.AF_INET6 if ":" in plan.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers of old connections is no obstacle
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise ConfigError(ConfigProblem.ADDRESS, Ident("server.port")) from error


# --- the list ---------------------------------------------------------------------------------------------------------

CHECKS: Mapping[str, Check] = {
    "hardening": _hardening,
    "landlock": _landlock,
    "configuration": _configuration,
    "kernel": _kernel,
    "tee": _tee,
    "host-data": _host_data,
    "tdx": _tdx,
    "gpu-driver": _gpu_driver,
    "gpu-parameters": _gpu_parameters,
    "gpu": _gpu,
    "gpu-inventory": _gpu_inventory,
    "gpu-switches": _gpu_switches,
    "gpu-faults": _gpu_faults,
    "clock": _clock,
    "route": _route,
    "broker": _broker,
    "simulation": _simulation,
    "store": _store,
    "memory": _memory,
    "destination": _destination,
    "server-program": _server_program,
    "server-address": _server_address,
}
"""In boot order."""
