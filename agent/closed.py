"""Closed values: the only things that may leave this process in text.

Owns `Ident`, and the rule that an event or an error is a dataclass whose fields are integers, finite floats, booleans,
enums, identifiers or None. There is no free text: what cannot be said with these types is not said.
Does not know which events and errors exist. Standard library only, because the supervisor imports it.
"""

import dataclasses
import enum
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Self

MAX_IDENT_CHARS = 128
_IDENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+\-\[\]]*")

type_of_scalar = int | float | bool | str | None


class Ident(str):
    """A bounded identifier: at most 128 characters of `A-Z a-z 0-9 _ . : / @ + - [ ]`.

    Wide enough for request ids, key URIs, policy versions and configuration keys; too narrow for a sentence.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Raises ValueError when the text is not an identifier."""
        # refusal: test_a_sentence_is_no_identifier
        if len(text) > MAX_IDENT_CHARS or not _IDENT.fullmatch(text):
            raise ValueError("not an identifier")
        return super().__new__(cls, text)

    @classmethod
    def of_peer(cls, text: str) -> "Ident":
        """The identifier a peer sent, or `unprintable`: a peer's text is never repeated as it came."""
        try:
            return cls(text)
        except ValueError:
            return cls("unprintable")


class ClosedRecord:
    """Base of events and errors: checks at construction that every field is a closed value."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if value is None or isinstance(value, (bool, int, enum.Enum, Ident)):
                continue
            if isinstance(value, float) and math.isfinite(value):
                continue
            raise TypeError(f"{type(self).__name__}.{field.name} is not a closed value")


def to_record(value: ClosedRecord) -> dict[str, type_of_scalar]:
    """The fields as JSON scalars, enums by their value."""
    record: dict[str, type_of_scalar] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        record[field.name] = item.value if isinstance(item, enum.Enum) else item
    return record


def from_record(cls: type[Any], record: Mapping[str, object]) -> Any:
    """The inverse of `to_record`.

    Raises:
        ValueError: a field is missing, unknown, or not of its declared type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if set(record) != set(fields):
        raise ValueError("unexpected fields")
    return cls(**{name: _restore(field.type, record[name]) for name, field in fields.items()})


def _restore(declared: Any, value: object) -> object:
    options = declared.__args__ if isinstance(declared, types.UnionType) else (declared,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError("unexpected null")
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return option(value)
        if option is Ident and isinstance(value, str):
            return Ident(value)
        if type(value) is option or (option is float and type(value) is int):
            return value
    raise ValueError("unexpected type")
