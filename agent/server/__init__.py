"""The model server as a value: what to run, as whom, and when to call it ready.

Owns `ServerPlan`, which the worker makes from the measured configuration (`presets.py`) and hands to the supervisor.
Starts nothing and asks nobody. Standard library only, because the supervisor imports it.
"""

import dataclasses
import enum
import re
from typing import Any

LOOPBACK_OF = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::1": "::1", "::": "::1"}  # noqa: S104 - servers are there to be reached
"""Addresses a server may listen on, and where the probe finds it: it speaks plain HTTP, so never beyond the loopback."""

MAX_TEXT_BYTES = 64 << 10
"""All arguments and variables together, UTF-8: a plan has to fit into one record of the channel."""

_PLACEHOLDER = re.compile(r"\{(model|model_dir|model_id|host|port|scratch)\}")
_HTTP_PATH = re.compile(r"/[!-~]*")
_PRINTABLE = re.compile(r"[ -~]+")


class Output(enum.Enum):
    """What becomes of the server's stdout and stderr."""

    COUNT = "count"  # read into guest memory, only the number of bytes is told
    INHERIT = "inherit"  # the agent's own: whoever reads the agent's output reads the server's text


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where this boot put things: what the placeholders of a plan stand for.

    Attributes:
        model: path of the model file, or of the directory when there are several.
        model_dir: path of the directory; None when the model is a memfd.
        scratch: a writable, executable directory for caches, owned by the server's user.
        descriptors: kept open across exec under the same numbers, all above 2 (the memfd behind `/proc/self/fd/N`).
        private_mounts: we may mount, so each start of the server gets a /tmp and a /dev/shm that nobody else sees.
    """

    model: str
    model_dir: str | None
    scratch: str
    descriptors: tuple[int, ...] = ()
    private_mounts: bool = False

    def __post_init__(self) -> None:
        if any(descriptor <= 2 for descriptor in self.descriptors):
            raise RuntimeError("a named descriptor would be replaced by stdin, stdout or stderr")


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeRequest:
    """One request that a server must answer before it counts as ready.

    Attributes:
        body: sent as JSON by POST; None means GET.
        codes: statuses that are an answer.
    """

    path: str
    body: str | None
    codes: frozenset[int]

    def __post_init__(self) -> None:
        if not (_HTTP_PATH.fullmatch(self.path) and _are_codes(self.codes)):
            raise ValueError("probe")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ServerPlan:
    """Everything the supervisor has to know to run the server. May hold secrets of the configuration: never shown.

    Attributes:
        argv: command with placeholders `{model}` `{model_dir}` `{model_id}` `{host}` `{port}` `{scratch}`.
        environment: the whole environment as (name, value), the same placeholders in values.
        host: one of `LOOPBACK_OF`.
        uid, gid: who the server runs as, without supplementary groups. None = whoever the agent is, which then must not
            be root; 0 = root on purpose, without capabilities.
        health_codes: statuses of GET `health_path` that mean healthy.
        models_path: must answer a health code too and, with a `model_id`, name it: `data[].id` or `name`. None = not asked.
        probe: the first request, or None.
        authorization: value of the Authorization header of every question, or None.
        ready_timeout_s: from each start to ready.
        stop_timeout_s: from SIGTERM to SIGKILL.
        max_restarts: within any `restart_window_s`.
        scratch_max_bytes: size of the scratch tmpfs.
        egress: TCP ports it may connect to, on any address, the loopback included; 0 for all that the kernel gives out.
    """

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    host: str
    port: int
    uid: int | None
    gid: int | None
    health_path: str
    health_codes: frozenset[int]
    models_path: str | None
    model_id: str | None
    probe: ProbeRequest | None
    authorization: str | None
    ready_timeout_s: int
    stop_timeout_s: int
    max_restarts: int
    restart_window_s: int
    output: Output
    scratch_max_bytes: int
    egress: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ValueError whose only argument is the name of the first bad field."""
        names = [name for name, _ in self.environment]
        checks = {
            "argv": bool(self.argv) and self.argv[0] != "" and _are_texts(self.argv),
            "environment": len(set(names)) == len(names)
            and all(name and "=" not in name for name in names)
            and _are_texts((*self.argv, *(text for pair in self.environment for text in pair))),
            "host": self.host in LOOPBACK_OF,
            "port": 1 <= self.port <= 65535,
            # 2**32 - 1 means "unchanged" to the kernel
            "uid": self.uid is None or 0 <= self.uid < (1 << 32) - 1,
            "gid": (self.gid is None) == (self.uid is None) and (self.gid is None or 0 <= self.gid < (1 << 32) - 1),
            "health_path": bool(_HTTP_PATH.fullmatch(self.health_path)),
            "health_codes": _are_codes(self.health_codes),
            "models_path": self.models_path is None or bool(_HTTP_PATH.fullmatch(self.models_path)),
            "model_id": not self.uses("model_id")
            if self.model_id is None
            else self.models_path is not None and _are_texts((self.model_id,)),
            "authorization": self.authorization is None or bool(_PRINTABLE.fullmatch(self.authorization)),
            "ready_timeout_s": self.ready_timeout_s >= 1,
            "stop_timeout_s": self.stop_timeout_s >= 1,
            "max_restarts": self.max_restarts >= 0,
            "restart_window_s": self.restart_window_s >= 1,
            "scratch_max_bytes": self.scratch_max_bytes >= 1,
            "egress": all(0 <= port <= 65535 for port in self.egress),
        }
        for field, good in checks.items():
            if not good:
                raise ValueError(field)

    def __repr__(self) -> str:
        return f"<server plan, {len(self.argv)} arguments, {len(self.environment)} variables>"

    def uses(self, placeholder: str) -> bool:
        """Does `{placeholder}` occur? A plan that uses `model_dir` cannot have its model in a memfd."""
        return any(placeholder in _PLACEHOLDER.findall(text) for text in (*self.argv, *dict(self.environment).values()))

    def command(self, place: Placement) -> list[str]:
        """The arguments, every placeholder filled in."""
        return [self._fill(argument, place) for argument in self.argv]

    def variables(self, place: Placement) -> dict[str, str]:
        """The environment likewise."""
        return {name: self._fill(value, place) for name, value in self.environment}

    def _fill(self, text: str, place: Placement) -> str:
        values = {
            "model": place.model,
            "model_dir": place.model_dir,
            "model_id": self.model_id,
            "host": self.host,
            "port": str(self.port),
            "scratch": place.scratch,
        }

        def value_of(found: re.Match[str]) -> str:
            value = values[found[1]]
            if value is None:
                raise RuntimeError(f"nothing to put in the place of {found[0]}")
            return value

        return _PLACEHOLDER.sub(value_of, text)  # one pass: what was filled in is never read again

    def to_json(self) -> dict[str, object]:
        """A JSON object, for `from_json` in the supervisor and for nobody else."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return record | {
            "environment": [list(pair) for pair in self.environment],
            "health_codes": sorted(self.health_codes),
            "output": self.output.value,
            "probe": self.probe and {"path": self.probe.path, "body": self.probe.body, "codes": sorted(self.probe.codes)},
        }

    @classmethod
    def from_json(cls, record: object) -> "ServerPlan":
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown, or not of its type or range.
        """
        fields = _members(record, cls)
        fields["argv"] = tuple(_items(fields["argv"], str))
        fields["environment"] = tuple(_pair(item) for item in _items(fields["environment"], list, tuple))
        fields["egress"] = tuple(_items(fields["egress"], int))
        fields["health_codes"] = frozenset(_items(fields["health_codes"], int))
        fields["output"] = Output(fields["output"])
        if fields["probe"] is not None:
            probe = _members(fields["probe"], ProbeRequest)
            probe["codes"] = frozenset(_items(probe["codes"], int))
            fields["probe"] = ProbeRequest(**probe)
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that was alive and had answered everything its plan asks. Only `Probe.finish` makes one."""

    pid: int
    ready_after_ms: int


def _are_codes(codes: frozenset[int]) -> bool:
    return bool(codes) and all(100 <= code <= 599 for code in codes)


def _are_texts(texts: tuple[str, ...]) -> bool:
    """Can they be given to execve together?"""
    try:
        return "\0" not in "".join(texts) and sum(len(text.encode()) for text in texts) <= MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


_SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), int | None: (int, type(None)), str | None: (str, type(None))}


def _members(record: object, cls: type) -> dict[str, Any]:
    """The members of a JSON object that has exactly the fields of `cls`, scalars of exactly their type."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if not isinstance(record, dict) or set(record) != set(fields):
        raise ValueError("unexpected fields")
    for name, declared in fields.items():
        if declared in _SCALARS and type(record[name]) not in _SCALARS[declared]:
            raise ValueError(name)
    return dict(record)


def _items(value: object, *kinds: type) -> list[Any]:
    if not isinstance(value, (list, tuple)) or any(type(item) not in kinds for item in value):
        raise ValueError("unexpected list")
    return list(value)


def _pair(value: list[object]) -> tuple[str, str]:
    name, text = _items(value, str)  # a wrong number of items is a ValueError as well
    return name, text
