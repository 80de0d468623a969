"""An examination of this guest: checks in boot order, one finding each, and what they share.

Owns no check: those are `doctor.py`'s.
"""

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from agent.config import Measured, MeasuredConfig, Selection
from agent.config_source import FoundConfig
from agent.errors import EXIT_SERVED, AgentError, InternalError, error_to_record
from agent.evidence import Attester, GpuInventory, GpuSystem
from agent.fitness import Places, Seen
from agent.proxy import Proxy
from agent.server import ServerPlan

if TYPE_CHECKING:
    from agent.artifact.volume_config import VolumeConfig

_T = TypeVar("_T")


class Skip(enum.Enum):
    """Why a check was not made."""

    NO_CONFIGURATION = "there is no usable configuration"
    OFFLINE = "it needs the network, and --offline was given"
    NO_TEE = "the CPU TEE did not open"
    NO_TDX = "this is no TDX guest"
    SIMULATED = "the GPUs are simulated"
    NO_GPU = "the configuration asks for no GPU"
    NO_SWITCH = "the configuration asks for no NVSwitch"
    GPU_NOT_OPEN = "the GPUs were not opened"
    NO_INVENTORY = "the GPUs did not say what there is"
    GPU_NOT_HELD = (
        "no other process is seen to hold the GPUs open, and a confidential GPU that its last user closes is lost until its "
        "reset: start nvidia-persistenced first"
    )
    FOREIGN_REGISTER = "runtime register and event log are the attestation agent's, which says nothing of them beforehand"
    OWN_COMPONENTS = "the guest's own components ask for the key, and its attester has shown that they serve it"
    NO_TLS = "the connection to the broker is not encrypted"
    NO_MANIFEST = "the size of the model is not known without its manifest"
    NO_CREDENTIALS = "the store's credentials come with a verdict, for which nobody is asked here"
    NO_SERVER = "another container serves the model"
    NO_LANDLOCK = "this kernel has no Landlock: the server's writes and connections are not restricted"
    NO_LANDLOCK_PORTS = "this kernel's Landlock knows no ports: server.egress restricts nothing"


class SkippedError(Exception):
    """Raised by a check that is not made."""

    def __init__(self, reason: Skip) -> None:
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: nothing amiss and perhaps what there is, a reason not to look, or what is wrong."""

    check: str
    skipped: Skip | None = None
    error: AgentError | None = None
    seen: Seen = field(default_factory=dict)

    def to_record(self) -> dict[str, object]:
        """`{"check", "outcome"}`, with "reason" when skipped, "error" when failed, and "seen" where there is any."""
        if self.error is not None:
            return {"check": self.check, "outcome": "failed", "error": error_to_record(self.error)}
        if self.skipped is not None:
            return {"check": self.check, "outcome": "skipped", "reason": self.skipped.value}
        return {"check": self.check, "outcome": "ok"} | ({"seen": dict(self.seen)} if self.seen else {})


@dataclass(slots=True)
class Guest:
    """Where to look, and what the checks so far have found.

    Attributes:
        find_config: looks for the one configuration; None while there is none.
        open_tee: opens the CPU TEE that a configuration names.
        open_gpus: likewise the GPUs.
        offline: nothing is sent to anybody.
        proxy: through which https servers are reached.
        asked: which of the allowed models is looked at.
        places: where the kernel has what is looked at without a device.
        measured: the configuration, once it parses.
        inventory: what the GPUs and NVSwitches say of themselves.
        sizes: of the model's files in bytes, by path, once they are known; none of a volume's, which takes no memory.
        volume: the encrypted volume that the model is, once its manifest is authenticated.
    """

    find_config: Callable[[], FoundConfig | None]
    open_tee: Callable[[MeasuredConfig], Attester]
    open_gpus: Callable[[MeasuredConfig], GpuSystem | None]
    offline: bool
    proxy: Proxy | None = None
    asked: Selection | None = None
    places: Places = field(default_factory=Places)
    measured: Measured | None = None
    plan: ServerPlan | None = None
    tee: Attester | None = None
    gpus: GpuSystem | None = None
    inventory: GpuInventory | None = None
    sizes: dict[str, int] | None = None
    volume: "VolumeConfig | None" = None

    @property
    def config(self) -> MeasuredConfig:
        return needed(self.measured, Skip.NO_CONFIGURATION).config


Check = Callable[[Guest], Seen | None]
"""Returns what there is to tell, or raises the AgentError that names what is wrong, or `SkippedError`."""


def needed(value: _T | None, otherwise: Skip) -> _T:
    """What an earlier check has found, or the reason why this one is not made."""
    if value is None:
        raise SkippedError(otherwise)
    return value


def examine(guest: Guest, checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Every check in their order, whatever the ones before it found."""
    for name, check in checks.items():
        skipped: Skip | None = None
        error: AgentError | None = None
        seen: Seen = {}
        try:
            seen = check(guest) or {}
        except SkippedError as reason:
            skipped = reason.reason
        except AgentError as found:
            error = found
        except Exception as bug:  # noqa: BLE001  # as in a boot; here it must not hide what the other checks find
            error = InternalError.of(bug)
        yield Finding(name, skipped, error, seen)


def exit_status(findings: list[Finding]) -> int:
    """Of the first failure in boot order, which is where a boot would end."""
    return next((finding.error.exit_status for finding in findings if finding.error is not None), EXIT_SERVED)
