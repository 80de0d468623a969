"""Kubernetes manifests as `keyturn lint` reads them: strict YAML, the pods in it, and where each setting stands.

Owns what of YAML is read: plain data in the core types, bounded in size and depth; anchors, aliases, tags and doubled keys are
refused, because two readers could differ about them. Knows no rule (`lint_rules.py`). What Kubernetes itself refuses (unknown
fields, wrong types) is its schemas' business; here a setting of a wrong type is one that is not there.
Follows the Kubernetes API reference 1.37 (PodSpec, workload templates, resource.Quantity).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import yaml

MAX_DEPTH = 64
MAX_DOCUMENTS = 256
MAX_EVENTS = 20_000
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(Ki|Mi|Gi|Ti|Pi|Ei|m|k|M|G|T|P|E)?")
_UNITS = {"m": Decimal("0.001")} | {
    **{name: Decimal(1024**power) for power, name in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
    **{name: Decimal(1000**power) for power, name in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
}
_TEMPLATES = {
    "Pod": (),
    **dict.fromkeys(
        ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job"), ("spec", "template")
    ),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}


class MalformedYamlError(ValueError):
    """Not what is read here; `line` counts from 1, None where it is not known."""

    def __init__(self, line: int | None) -> None:
        super().__init__("malformed YAML")
        self.line = line


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it stands; one that is not there has the value None and the path at which it belongs."""

    value: object
    path: str = ""

    def at(self, *keys: str) -> "Setting":
        """Below this, by keys."""
        here = self
        for key in keys:
            value = here.value.get(key) if isinstance(here.value, dict) else None
            here = Setting(value, _join(here.path, key))
        return here

    def items(self) -> "list[Setting]":
        """Of a list, in order."""
        values = self.value if isinstance(self.value, list) else []
        return [Setting(value, f"{self.path}[{index}]") for index, value in enumerate(values)]

    def entries(self) -> "list[tuple[str, Setting]]":
        """Of a map, in order."""
        return [(key, self.at(key)) for key in self.value] if isinstance(self.value, dict) else []

    @property
    def text(self) -> str | None:
        return self.value if isinstance(self.value, str) else None

    @property
    def number(self) -> int | None:
        return self.value if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    @property
    def quantity(self) -> int | None:
        """A resource quantity, rounded down to whole units: bytes, devices."""
        match = _QUANTITY.fullmatch(str(self.value)) if isinstance(self.value, (str, int)) else None
        return int(Decimal(match[1]) * _UNITS.get(match[2], 1)) if match else None


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod.

    Attributes:
        setting: its entry in the pod.
        init: it runs before the others, to its end. An init container with restartPolicy Always (a sidecar) does not.
    """

    setting: Setting
    init: bool

    @property
    def arguments(self) -> list[Setting]:
        """What is executed: command, then args."""
        return [*self.setting.at("command").items(), *self.setting.at("args").items()]

    @property
    def verb(self) -> str | None:
        """`run` of `keyturn run …`; None where something else is executed."""
        words = [word.text or "" for word in self.arguments[:2]]
        return words[1] if len(words) == 2 and words[0].rpartition("/")[2] == "keyturn" else None

    def option(self, name: str) -> Setting | None:
        """The value of `--name VALUE` or `--name=VALUE`, at its path; None where it is not given."""
        words = self.arguments
        texts = [word.text for word in words]
        words = words[: texts.index("--")] if "--" in texts else words  # after it they are the server's
        for index, word in enumerate(words):
            text = word.text or ""
            if text == name:
                return words[index + 1] if index + 1 < len(words) else Setting("", word.path)
            if text.startswith(f"{name}="):
                return Setting(text.removeprefix(f"{name}="), word.path)
        return None

    def mount(self, path: str) -> Setting | None:
        """The volume mount at or above `path`, the nearest one."""
        found: Setting | None = None
        longest = -1
        for mount in self.setting.at("volumeMounts").items():
            place = (mount.at("mountPath").text or "").rstrip("/")
            if place and (path == place or path.startswith(f"{place}/")) and len(place) > longest:
                found, longest = mount, len(place)
        return found


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod, or the template of one.

    Attributes:
        name: `Deployment/model-server`, for people.
        metadata: of the pod itself.
        spec: the PodSpec.
        containers: init containers first, as they run.
    """

    name: str
    metadata: Setting
    spec: Setting
    containers: tuple[Container, ...]

    def volume(self, mount: Setting) -> Setting:
        """The volume that a mount names; the list of volumes where there is none."""
        volumes = self.spec.at("volumes")
        name = mount.at("name").text
        return next(
            (volume for volume in volumes.items() if name and volume.at("name").text == name), Setting(None, volumes.path)
        )


def parse_documents(data: bytes) -> list[Setting]:
    """The documents of a YAML file of at most 1 MiB, empty ones left out; the items of a List stand for it.

    Raises:
        MalformedYamlError: not UTF-8 YAML, or more of it than is read.
    """
    try:
        text = data.decode("utf-8")
        _check_events(text)
        loaded = [value for value in yaml.load_all(text, _Loader) if value is not None]
    except yaml.MarkedYAMLError as error:
        raise MalformedYamlError(None if error.problem_mark is None else error.problem_mark.line + 1) from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # ValueError: an integer of thousands of digits
        raise MalformedYamlError(error.line if isinstance(error, MalformedYamlError) else None) from None
    return [item for value in loaded for item in _items_of_list(Setting(value))]


def pods(documents: list[Setting]) -> Iterator[Pod]:
    """Every pod and every template of one."""
    for document in documents:
        kind = document.at("kind").text or ""
        if kind not in _TEMPLATES:
            continue
        pod = document.at(*_TEMPLATES[kind])
        spec = pod.at("spec")
        first = spec.at("initContainers").items()
        containers = [Container(setting, setting.at("restartPolicy").value != "Always") for setting in first]
        containers += [Container(setting, False) for setting in spec.at("containers").items()]
        name = document.at("metadata", "name").text or ""
        yield Pod(f"{kind}/{_printable(name)}", pod.at("metadata"), spec, tuple(containers))


def find(documents: list[Setting], kind: str, name: str | None) -> Setting | None:
    """The document of this kind and name."""
    for document in documents:
        if document.at("kind").text == kind and name is not None and document.at("metadata", "name").text == name:
            return document
    return None


def _items_of_list(document: Setting) -> list[Setting]:
    """As `kubectl get` prints several objects: List, PodList …"""
    if (document.at("kind").text or "").endswith("List"):
        return document.at("items").items()
    return [document]


def _check_events(text: str) -> None:
    """What would grow or differ between readers is refused before anything is built of it."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        foreign = isinstance(event, yaml.NodeEvent) and (event.anchor is not None or getattr(event, "tag", None) is not None)
        # refusal: test_what_two_readers_could_read_differently_is_refused
        if foreign or depth > MAX_DEPTH or documents > MAX_DOCUMENTS or count > MAX_EVENTS:
            raise MalformedYamlError(event.start_mark.line + 1)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it carries no types
    """Scalars are null, booleans, numbers and texts; a key is a text and stands once."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "bool", "int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag.endswith(":str")]
        # refusal: test_what_two_readers_could_read_differently_is_refused
        if len(set(keys)) != len(node.value):
            raise MalformedYamlError(node.start_mark.line + 1)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _join(path: str, key: str) -> str:
    if _PLAIN_KEY.fullmatch(key):
        return f"{path}.{key}" if path else key
    return f"{path}[{json.dumps(key[:128])}]"


def _printable(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9.-]{1,253}", name) else "?"
