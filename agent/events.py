"""Everything a boot can say: a closed set of events, built from closed values.

An event is one JSON object on one line of stderr: `event` (the name), `at` (UTC), `t_ms` (since the agent started), then
its fields. Names and fields are an interface; a test freezes them. There is no event for free text, and none will come.
Standard library only, because the supervisor imports it.
"""

import dataclasses
import enum
import re

from agent.closed import ClosedRecord, Ident, from_record, to_record
from agent.errors import AgentError, error_from_record, error_to_record


class Stage(enum.Enum):
    """The declared stages of a boot, in the order in which they usually end."""

    CONFIG = "config"  # parse, digest
    DEVICES = "devices"  # open the TEE and the GPUs, read modes
    NETWORK = "network"  # a route out of the guest is there
    IDENTIFY = "identify"  # which manifest the provider signed
    PREPARE = "prepare"  # manifest authenticated, memory reserved and populated
    ATTEST = "attest"  # Hello … Verdict, token verified
    RELEASE_CREDENTIALS = "release-credentials"  # of the model's store, where the broker has them
    RELEASE_KEY = "release-key"  # the JWE arrives, still sealed
    MEASURE = "measure"  # the release goes into the runtime register
    SECURE = "secure"  # the GPU gate
    UNWRAP = "unwrap"  # the key is opened
    LOAD = "load"  # segments opened into guest memory
    RECEIPT = "receipt"  # what was opened here is signed, by a key that the TEE vouches for
    PUBLISH = "publish"  # read-only, mounted for the server
    SERVER = "server"  # first start until ready


@dataclasses.dataclass(frozen=True)
class Event(ClosedRecord):
    """Base of all events; subclasses are frozen dataclasses of closed values."""


@dataclasses.dataclass(frozen=True)
class BootStarted(Event):
    version: Ident
    mode: Ident


@dataclasses.dataclass(frozen=True)
class ConfigFound(Event):
    """Where the deciding bytes came from: `file`, `initdata-file`, `initdata-device`, `kata-initdata` or `image`."""

    source: Ident


@dataclasses.dataclass(frozen=True)
class WaitingFor(Event):
    """Nothing goes on before `what` is there: `config`, `tee` or `route`. Over when the running stage ends."""

    what: Ident
    at_most_s: int


@dataclasses.dataclass(frozen=True)
class AttesterOpened(Event):
    """The CPU TEE that gives evidence, and through which of its interfaces."""

    tee: Ident
    interface: Ident


@dataclasses.dataclass(frozen=True)
class LocalChecksPassed(Event):
    """Phase 1 is over: configuration measured, devices good. From here on the boot needs the network."""


@dataclasses.dataclass(frozen=True)
class WorkerEnded(Event):
    """The boot's worker is gone, and with it every key. `peak_kib`: the most memory it had resident.

    The workers of renewals, which never have a key, are not told.
    """

    peak_kib: int


@dataclasses.dataclass(frozen=True)
class StageStarted(Event):
    stage: Stage


@dataclasses.dataclass(frozen=True)
class StageEnded(Event):
    stage: Stage
    ms: int
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class StageFailed(Event):
    stage: Stage
    ms: int


@dataclasses.dataclass(frozen=True)
class Progress(Event):
    """At most a few per second and stage.

    `bytes_per_s`: of the last ten seconds. `eta_s`: how long it will take at this rate. None: not known yet.
    """

    stage: Stage
    done_bytes: int
    total_bytes: int
    bytes_per_s: int | None = None
    eta_s: int | None = None


@dataclasses.dataclass(frozen=True)
class Requested(Event):
    """A handshake attempt began under this request id: the one to quote to the authority."""

    request_id: Ident
    attempt: int


@dataclasses.dataclass(frozen=True)
class Retrying(Event):
    """Attempt `attempt` at the broker failed with this class of error; the next one begins after `wait_ms`."""

    attempt: int
    wait_ms: int
    error: Ident


@dataclasses.dataclass(frozen=True)
class VerdictAccepted(Event):
    request_id: Ident
    key_uri: Ident
    policy_version: Ident
    simulated: bool
    lease_s: int | None


@dataclasses.dataclass(frozen=True)
class NotAffirmed(Event):
    """After a denial by Trustee's policy, or where the guest's own components gave no key: each thing that the attestation
    service does not affirm, `device:what:value`.
    """

    finding: Ident


@dataclasses.dataclass(frozen=True)
class LeaseStarted(Event):
    """The key of the open model may be used for so long, counted from before it was asked for.

    `ends_at` is UTC by this guest's clock, for display: the end is counted on a clock that nobody sets.
    """

    lease_s: int
    ends_at: Ident


@dataclasses.dataclass(frozen=True)
class LeaseRenewalStarted(Event):
    """A worker attests again, in another handshake under another request id."""


@dataclasses.dataclass(frozen=True)
class LeaseRenewed(Event):
    """A new lease in place of the old one; both None: the key may be used without end."""

    lease_s: int | None
    ends_at: Ident | None


@dataclasses.dataclass(frozen=True)
class LeaseRenewalFailed(Event):
    """No answer: this class of error. `retry_in_ms` is None when the lease ends before another attempt would begin."""

    error: Ident
    retry_in_ms: int | None


@dataclasses.dataclass(frozen=True)
class ReleaseMeasured(Event):
    """That this key was released stands in the runtime register from here on; this is the value of it.

    Or it stands nowhere, and `unsupported` says why: `no-register` (SEV-SNP), `no-driver`, `read-only` or `foreign-log`.
    """

    rtmr_3: Ident | None
    unsupported: Ident | None


@dataclasses.dataclass(frozen=True)
class GatePassed(Event):
    """`preset`: the ready state had been set by this guest's image before the verdict, as its configuration says.

    `switches`: NVSwitches that were looked at with the GPUs; they have no ready state.
    """

    gpus: int
    preset: bool
    switches: int = 0


@dataclasses.dataclass(frozen=True)
class GpuWatchLost(Event):
    """The process that watches the GPUs while the server serves was killed or broke; another one takes its place."""

    status: int
    signal: int


@dataclasses.dataclass(frozen=True)
class ReceiptSigned(Event):
    """The receipt of this boot: its SHA-256, and that of the key which signed it (SubjectPublicKeyInfo), both in hex."""

    sha256: Ident
    key_sha256: Ident
    bytes: int


@dataclasses.dataclass(frozen=True)
class DestinationChosen(Event):
    """`noswap`: the kernel never swaps this memory. `swap_active`: the guest has swap, and the configuration allows it."""

    kind: Ident
    bytes: int
    noswap: bool
    swap_active: bool


@dataclasses.dataclass(frozen=True)
class ServerStarted(Event):
    """`landlock`: the ABI version of the domain that confines it, 0 where the kernel has no Landlock; egress needs 4."""

    pid: int
    start: int
    own_uid: bool
    landlock: int


@dataclasses.dataclass(frozen=True)
class ServerOutputInherited(Event):
    """The measured configuration lets the model server write to the agent's own output."""


@dataclasses.dataclass(frozen=True)
class ServerReady(Event):
    ms: int
    start: int


@dataclasses.dataclass(frozen=True)
class ModelReleased(Event):
    """The model's files are unlinked, as the configuration says: from here on this server is the only one there can be."""

    files: int


@dataclasses.dataclass(frozen=True)
class ServerEnded(Event):
    status: int
    signal: int
    output_bytes: int


@dataclasses.dataclass(frozen=True)
class ServerRestarting(Event):
    wait_ms: int
    start: int


@dataclasses.dataclass(frozen=True)
class ModelLeft(Event):
    """The open model lies in the given folder, for whoever serves it. Nobody of ours watches over it from now on."""

    version: int


@dataclasses.dataclass(frozen=True)
class ReceiptChecked(Event):
    """By `keyturn exec`: what lies in the folder is what the receipt says, and this process becomes the server.

    `same_guest`: this guest's own components confirmed that it is theirs; else the vendors' roots did that it is genuine.
    """

    sha256: Ident
    version: int
    files: int
    same_guest: bool
    simulated: bool


@dataclasses.dataclass(frozen=True)
class Stopping(Event):
    """`waiting_for` names what must end by itself first; a device request is never abandoned. `signal`: 0 without one."""

    signal: int
    waiting_for: Ident | None


@dataclasses.dataclass(frozen=True)
class StatusUnwritable(Event):
    code: int


@dataclasses.dataclass(frozen=True)
class LinesLost(Event):
    """So many lines of this output were dropped, because nobody read it. The status file and the health port had them."""

    lines: int


@dataclasses.dataclass(frozen=True)
class Wiped(Event):
    """Server, mount and descriptors of this boot are gone."""


@dataclasses.dataclass(frozen=True)
class Stopped(Event):
    exit_status: int


class Hook(enum.Enum):
    """Where an exception came to light that nobody had caught."""

    MAIN = "main"
    THREAD = "thread"
    UNRAISABLE = "unraisable"  # in a finalizer, mostly
    LOOP = "loop"  # asyncio: a callback, or a task that nobody waits for


@dataclasses.dataclass(frozen=True)
class ExceptionUnhandled(Event):
    """A bug that may not matter: it ends nothing by itself. `place` as in InternalError: file, line and class."""

    hook: Hook
    place: Ident


_EVENTS = {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in Event.__subclasses__()}
_NAMES = {cls: name for name, cls in _EVENTS.items()}

Message = Event | AgentError


def message_to_record(message: Message) -> dict[str, object]:
    """`{"event": name, …fields}`; an error becomes the event `failed` with the fields of `error_to_record`."""
    if isinstance(message, AgentError):
        return {"event": "failed", **error_to_record(message)}
    return {"event": _NAMES[type(message)], **to_record(message)}


def message_from_record(record: dict[str, object]) -> Message:
    """The inverse.

    Raises:
        ValueError: not a record of `message_to_record`.
    """
    fields = {key: value for key, value in record.items() if key != "event"}
    name = record.get("event")
    if name == "failed":
        return error_from_record(fields)
    if not isinstance(name, str) or name not in _EVENTS:
        raise ValueError("unknown event")
    event = from_record(_EVENTS[name], fields)
    assert isinstance(event, Event)
    return event


def all_events() -> dict[str, type[Event]]:
    """Every event class by its name on the wire."""
    return dict(_EVENTS)
