import dataclasses
import enum
import json
import types
from typing import Any

import pytest

from agent import errors
from agent.closed import Ident
from agent.errors import EXIT_STATUS, AgentError, Owner, Step, all_errors, error_from_record, error_to_record


def sample(cls: type[AgentError]) -> AgentError:
    """An instance with some value in every field."""

    def value(declared: Any) -> object:
        if isinstance(declared, types.UnionType):
            declared = declared.__args__[0]
        if isinstance(declared, type) and issubclass(declared, enum.Enum):
            return next(iter(declared))
        return Ident("sample") if declared is Ident else 7

    return cls(**{field.name: value(field.type) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


ALL = sorted(all_errors().values(), key=lambda cls: cls.__name__)


def test_the_exit_table_is_frozen() -> None:
    assert {f"{owner.value} × {step.value}": status for (owner, step), status in EXIT_STATUS.items()} == {
        "operator × config": 10,
        "operator × devices": 11,
        "host × evidence": 12,
        "host × gpu": 13,
        "operator × broker": 14,
        "authority × broker": 15,
        "authority × verdict": 16,
        "authority × key": 17,
        "operator × artifact": 18,
        "provider × artifact": 19,
        "operator × memory": 20,
        "operator × agent": 21,
        "authority × lease": 22,
        "operator × guest": 23,
        "operator × receipt": 24,
        "keyturn × agent": 29,
        "developer × server": 30,
        "operator × gate": 31,
    }


def test_every_row_of_the_exit_table_is_used_and_every_class_has_one() -> None:
    assert {(cls.owner, cls.step) for cls in ALL} == set(EXIT_STATUS)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_says_who_must_act_and_what_comes_next(cls: type[AgentError]) -> None:
    error = sample(cls)
    assert cls.__name__.endswith("Error")
    assert str(error).endswith(f"({error.owner.value})")
    assert not error.what().endswith(".")
    assert "\n" not in error.what()
    assert len(error.next_step) > 10
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__, "the tree at the top of errors.py is complete"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_way_from_worker_to_supervisor(cls: type[AgentError]) -> None:
    error = sample(cls)
    again = error_from_record(json.loads(json.dumps(error_to_record(error))))
    assert type(again) is cls
    assert str(again) == str(error)


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    retryable = {cls.__name__ for cls in ALL if sample(cls).retryable}
    assert "KeyReleaseDeniedError" not in retryable
    assert retryable <= {"BrokerUnreachableError", "BrokerFailureError", "ArtifactUnavailableError"}


@pytest.mark.parametrize(
    "record", [{}, {"class": "AgentError", "fields": {}}, {"class": "GpuCountError", "fields": {"got": 1}}]
)
def test_what_is_no_error_record_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        error_from_record(record)


def test_owners_and_steps_are_words_of_their_own() -> None:
    assert len({owner.value for owner in Owner}) == len(Owner)
    assert len({step.value for step in Step}) == len(Step)
