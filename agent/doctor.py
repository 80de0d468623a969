"""What a boot would meet in this guest, asked check by check, without a boot.

Owns the checks, their order, and what each of them needs of the ones before. A check is one function here and one line in
`CHECKS`: it returns, or raises the AgentError that names what is wrong. It asks through the boot's own code where there is
some, so that the two cannot come to different results.

Changes nothing outside this process: asks for no key, sets no ready state, takes no memory, wipes no folder. The CPU TEE is
asked for one report, and a GPU is opened only where that costs nothing. Prints nothing.
"""

import asyncio
import enum
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from agent.closed import Ident
from agent.config import Measured, MeasuredConfig, parse
from agent.config_source import FoundConfig
from agent.errors import (
    EXIT_SERVED,
    AgentError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ConfigError,
    ConfigProblem,
    IdentityProblem,
    InternalError,
    ServerStartError,
    SimulationRefusal,
    SimulationRefusedError,
    error_to_record,
)
from agent.evidence import Attester, GpuSystem
from agent.guest import hardening, landlock
from agent.guest.memory_info import MACHINE
from agent.guest.network import wait_for_route
from agent.server import ServerPlan
from agent.threads import signals_wait
from agent.worker import is_loopback, plan_server, token_keys

if TYPE_CHECKING:
    from agent.artifact.manifest import ModelConfig

LOOK_S = 10
"""For one answer over a network. Nothing is tried again: a retry would hide what is looked for."""

_T = TypeVar("_T")


class Skip(enum.Enum):
    """Why a check was not made."""

    NO_CONFIGURATION = "there is no usable configuration"
    OFFLINE = "it needs the network, and --offline was given"
    NO_TEE = "the CPU TEE did not open"
    NO_GPU = "the configuration asks for no GPU"
    GPU_NOT_OPEN = "the GPUs were not opened"
    GPU_NOT_HELD = (
        "no other process is seen to hold the GPUs open, and a confidential GPU that its last user closes is lost until its "
        "reset: start nvidia-persistenced first"
    )
    NO_MANIFEST = "the size of the model is not known without its manifest"
    NO_LANDLOCK = "this kernel has no Landlock: the server's writes and connections are not restricted"
    NO_LANDLOCK_PORTS = "this kernel's Landlock knows no ports: server.egress restricts nothing"


class _SkippedError(Exception):
    def __init__(self, reason: Skip) -> None:
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: nothing amiss, a reason not to look, or what is wrong."""

    check: str
    skipped: Skip | None = None
    error: AgentError | None = None

    def to_record(self) -> dict[str, object]:
        """`{"check", "outcome"}`, with "reason" when it is skipped and "error" when it is failed."""
        if self.error is not None:
            return {"check": self.check, "outcome": "failed", "error": error_to_record(self.error)}
        if self.skipped is not None:
            return {"check": self.check, "outcome": "skipped", "reason": self.skipped.value}
        return {"check": self.check, "outcome": "ok"}


@dataclass(slots=True)
class Guest:
    """Where to look, and what the checks so far have found.

    Attributes:
        find_config: looks for the one configuration; None while there is none.
        open_tee: opens the CPU TEE that a configuration names.
        open_gpus: likewise the GPUs.
        offline: nothing is sent to anybody.
        measured: the configuration, once it parses.
        model: the model, once its manifest is authenticated.
    """

    find_config: Callable[[], FoundConfig | None]
    open_tee: Callable[[MeasuredConfig], Attester]
    open_gpus: Callable[[MeasuredConfig], GpuSystem | None]
    offline: bool
    measured: Measured | None = None
    plan: ServerPlan | None = None
    tee: Attester | None = None
    gpus: GpuSystem | None = None
    model: "ModelConfig | None" = None

    @property
    def config(self) -> MeasuredConfig:
        return _needed(self.measured, Skip.NO_CONFIGURATION).config


def _needed(value: _T | None, otherwise: Skip) -> _T:
    """What an earlier check has found, or the reason why this one is not made."""
    if value is None:
        raise _SkippedError(otherwise)
    return value


def examine(guest: Guest) -> Iterator[Finding]:
    """Every check in boot order, whatever the ones before it found."""
    for name, check in CHECKS.items():
        skipped: Skip | None = None
        error: AgentError | None = None
        try:
            check(guest)
        except _SkippedError as reason:
            skipped = reason.reason
        except AgentError as found:
            error = found
        except Exception as bug:  # noqa: BLE001  # as in a boot; here it must not hide what the other checks find
            error = InternalError.of(bug)
        yield Finding(name, skipped, error)


def exit_status(findings: list[Finding]) -> int:
    """Of the first failure in boot order, which is where a boot would end."""
    return next((finding.error.exit_status for finding in findings if finding.error is not None), EXIT_SERVED)


# --- the process and its configuration --------------------------------------------------------------------------------


def _hardening(guest: Guest) -> None:
    """On ourselves: what the supervisor does first."""
    hardening.harden_agent()
    hardening.become_subreaper()


def _landlock(guest: Guest) -> None:
    abi = landlock.abi_version()
    if abi < landlock.ABI_NETWORK:
        raise _SkippedError(Skip.NO_LANDLOCK_PORTS if abi else Skip.NO_LANDLOCK)


def _configuration(guest: Guest) -> None:
    found = guest.find_config()
    if found is None:
        raise ConfigError(ConfigProblem.NOT_FOUND)
    guest.measured = parse(found.data, found.digest)
    guest.plan = plan_server(guest.config.server)
    token_keys(guest.config.broker.token_keys)


# --- devices ----------------------------------------------------------------------------------------------------------


def _tee(guest: Guest) -> None:
    from agent.evidence import Tee
    from agent.evidence.detect import hinted, open_interface

    with signals_wait():
        if guest.measured is None:  # of which TEE nobody says: look for the one it seems to be
            guest.tee = open_interface(hinted() or Tee.SNP)
        else:
            guest.tee = guest.open_tee(guest.config)


def _host_data(guest: Guest) -> None:
    from agent.evidence.collect import check_measured

    measured = _needed(guest.measured, Skip.NO_CONFIGURATION)
    tee = _needed(guest.tee, Skip.NO_TEE)
    with signals_wait():
        check_measured(tee, measured.digest)


def _gpu(guest: Guest) -> None:
    from agent.evidence.gpu import is_held
    from agent.evidence.gpu_watch import open_nvml

    if not guest.config.gpu.count:
        raise _SkippedError(Skip.NO_GPU)
    if guest.config.simulation is None:
        open_nvml()  # touches no GPU
        if not is_held():
            raise _SkippedError(Skip.GPU_NOT_HELD)
    with signals_wait():
        guest.gpus = guest.open_gpus(guest.config)


def _gpu_inventory(guest: Guest) -> None:
    from agent.evidence.gate import ExpectedReady, check_inventory

    gpus, config = _opened_gpus(guest), guest.config.gpu
    expected = ExpectedReady.PRESET if config.ready_state == "preset" else ExpectedReady.UNSET
    with signals_wait():
        check_inventory(gpus.inspect(), config.count, expected, config.architecture and config.architecture.upper())


def _gpu_faults(guest: Guest) -> None:
    _opened_gpus(guest).check_faults()


def _opened_gpus(guest: Guest) -> GpuSystem:
    return _needed(guest.gpus, Skip.GPU_NOT_OPEN if guest.config.gpu.count else Skip.NO_GPU)


# --- broker and store -------------------------------------------------------------------------------------------------


def _clock(guest: Guest) -> None:
    """Outside the life of the measured CA no handshake succeeds; found before anybody is asked, and without a network."""
    from cryptography import x509

    from agent.verify.roots import UNREADABLE

    try:
        authorities = x509.load_pem_x509_certificates(guest.config.broker.ca_pem.encode())
    except UNREADABLE:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("broker.ca_pem")) from None
    now = datetime.now(UTC)
    if not any(authority.not_valid_before_utc <= now <= authority.not_valid_after_utc for authority in authorities):
        ahead = any(now < authority.not_valid_before_utc for authority in authorities)
        raise BrokerIdentityError(IdentityProblem.NOT_YET_VALID if ahead else IdentityProblem.EXPIRED)


def _route(guest: Guest) -> None:
    endpoints = guest.config.broker.endpoints
    _stay_offline(guest)
    if not all(is_loopback(endpoint) for endpoint in endpoints):
        asyncio.run(wait_for_route(0))


def _broker(guest: Guest) -> None:
    """As the boot does: the first address that answers is the broker, or an impostor."""
    from agent.handshake.grpc_failure import Peer, check_peer

    at = guest.config.broker
    _stay_offline(guest)
    for number, endpoint in enumerate(at.endpoints, 1):
        try:
            asyncio.run(check_peer(Peer(endpoint, at.ca_pem, at.server_name), LOOK_S))
        except BrokerUnreachableError as error:
            error.attempts = number
            if number == len(at.endpoints):
                raise
        else:
            return


def _simulation(guest: Guest) -> None:
    if guest.config.simulation is not None and not guest.config.broker.allow_simulated:
        raise SimulationRefusedError(SimulationRefusal.NOT_ALLOWED)  # as the boot says of the verdict


def _store(guest: Guest) -> None:
    import threading

    from agent.artifact.identify import identify
    from agent.artifact.load import read_model
    from agent.artifact.sources import open_source

    config = guest.config
    if not config.artifact.source.startswith("/"):
        _stay_offline(guest)
    store = open_source(config.artifact.source, config.artifact.ca_pem, timeout_s=LOOK_S)
    try:
        artifact = identify(store, config.artifact, threading.Event())
        guest.model = read_model(store, artifact, config.broker.key_uri)
    finally:
        store.close()


def _stay_offline(guest: Guest) -> None:
    if guest.offline:
        raise _SkippedError(Skip.OFFLINE)


# --- memory and server ------------------------------------------------------------------------------------------------


def _memory(guest: Guest) -> None:
    from agent.artifact.memory import check_memory

    headroom_bytes = guest.config.artifact.headroom_mib << 20
    model = _needed(guest.model, Skip.NO_MANIFEST)
    check_memory([file.size for file in model.files], headroom_bytes, MACHINE)


def _destination(guest: Guest) -> None:
    """Swap included. Without the manifest for one empty file, without a configuration for its default."""
    from agent.artifact.memory import check_destination

    if guest.measured is None:
        check_destination("auto", None, [0], None, allow_swap=False, memory=MACHINE)
        return
    config, plan = guest.config.artifact, _needed(guest.plan, Skip.NO_CONFIGURATION)
    sizes = [file.size for file in guest.model.files] if guest.model else [0]
    allow_swap = config.unsafe_allow_swap
    check_destination(config.destination, config.directory, sizes, plan.gid, allow_swap=allow_swap, memory=MACHINE)


def _server_program(guest: Guest) -> None:
    """With our own rights: whether `server.uid` may execute it shows at its start."""
    plan = _needed(guest.plan, Skip.NO_CONFIGURATION)
    program = plan.argv[0]
    if "/" in program:
        program = os.path.join("/", program)  # where the server starts
    if shutil.which(program, path=dict(plan.environment)["PATH"]) is None:
        raise ServerStartError(errno.EACCES if "/" in program and os.path.exists(program) else errno.ENOENT)


def _server_address(guest: Guest) -> None:
    plan = _needed(guest.plan, Skip.NO_CONFIGURATION)
    with socket.socket(socket.AF_INET6 if ":" in plan.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers of old connections is no obstacle
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise ConfigError(ConfigProblem.ADDRESS, Ident("server.port")) from error


# --- the list ---------------------------------------------------------------------------------------------------------

CHECKS: Mapping[str, Callable[[Guest], None]] = {
    "hardening": _hardening,
    "landlock": _landlock,
    "configuration": _configuration,
    "tee": _tee,
    "host-data": _host_data,
    "gpu": _gpu,
    "gpu-inventory": _gpu_inventory,
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
