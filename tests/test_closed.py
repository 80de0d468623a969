import dataclasses
import enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import MAX_IDENT_CHARS, ClosedRecord, Ident, from_record, to_record


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Sample(ClosedRecord):
    name: Ident
    colour: Colour
    count: int
    maybe: int | None = None
    ratio: float = 0.5


@pytest.mark.parametrize("text", ["", "two words", "line\n", "ü", "{json}", "-flag", "a" * (MAX_IDENT_CHARS + 1), "a\0"])
def test_a_sentence_is_no_identifier(text: str) -> None:
    with pytest.raises(ValueError, match="not an identifier"):
        Ident(text)


@pytest.mark.parametrize("text", ["kbs:///models/tiny/1", "broker.endpoints[0]", "image-2026.11", "a" * MAX_IDENT_CHARS])
def test_ids_and_keys_are_identifiers(text: str) -> None:
    assert Ident(text) == text


@given(st.text())
def test_what_a_peer_wrote_is_an_identifier_or_nothing(text: str) -> None:
    assert Ident.of_peer(text) in (text, "unprintable")


def test_a_record_has_no_room_for_free_text() -> None:
    with pytest.raises(TypeError, match=r"Sample\.name is not a closed value"):
        Sample("a plain string", Colour.RED, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Sample(Ident("a"), Colour.RED, 1, ratio=float("nan"))


def test_a_record_survives_the_way_through_json() -> None:
    sample = Sample(Ident("a"), Colour.RED, 3, None)
    assert from_record(Sample, to_record(sample)) == sample


@pytest.mark.parametrize(
    "change",
    [{"count": "3"}, {"count": None}, {"count": True}, {"colour": "blue"}, {"name": "two words"}, {"name": 1}, {"extra": 1}],
)
def test_a_record_of_other_shape_is_refused(change: dict[str, object]) -> None:
    record = dict(to_record(Sample(Ident("a"), Colour.RED, 3))) | change
    with pytest.raises(ValueError):
        from_record(Sample, record)
