"""A plan is whole or it is none, survives the way to the supervisor, and shows nothing."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.server import MAX_TEXT_BYTES, Output, Placement, ProbeRequest, ServerPlan

PLAN = ServerPlan(
    argv=("/usr/bin/llama-server", "-m", "{model}", "--api-key", "SECRET-1"),
    environment=(("HF_TOKEN", "SECRET-2"), ("HOME", "{scratch}")),
    host="127.0.0.1",
    port=8080,
    uid=65532,
    gid=65532,
    health_path="/health",
    health_codes=frozenset({200, 204}),
    models_path="/v1/models",
    model_id="my model",
    probe=ProbeRequest("/completion", '{"prompt": "ready"}', frozenset({200})),
    authorization="Bearer SECRET-3",
    ready_timeout_s=600,
    stop_timeout_s=30,
    max_restarts=3,
    restart_window_s=600,
    output=Output.COUNT,
    scratch_max_bytes=1 << 30,
    egress=(443, 8443),
)
PLACE = Placement(model="/m/w.gguf", model_dir="/m", scratch="/s")


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        dataclasses.replace(PLAN, uid=None, gid=None, probe=None, authorization=None, output=Output.INHERIT),
        dataclasses.replace(PLAN, models_path=None, model_id=None, environment=(), health_codes=frozenset({400})),
    ],
)
def test_plan_survives_json(plan: ServerPlan) -> None:
    assert ServerPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plan_shows_nothing_of_what_it_holds() -> None:
    for text in (repr(PLAN), str(PLAN), f"{[PLAN]}"):
        assert "SECRET" not in text


WRONG: list[tuple[str, object]] = [
    ("argv", []),
    ("argv", [""]),
    ("argv", ["/bin/x", "nul\0"]),
    ("argv", ["/bin/x", 1]),
    ("argv", ["/bin/x", "\ud800"]),
    ("argv", "/bin/x"),
    ("argv", ["x" * (MAX_TEXT_BYTES + 1)]),
    ("environment", [["A", "1"], ["A", "2"]]),
    ("environment", [["", "1"]]),
    ("environment", [["A=B", "1"]]),
    ("environment", [["A", "nul\0"]]),
    ("environment", [["A", "1", "2"]]),
    ("environment", [["A", None]]),
    ("environment", [["A", "x" * MAX_TEXT_BYTES]]),
    ("environment", {"A": "1"}),
    ("host", "192.0.2.1"),
    ("host", "localhost"),
    ("port", 0),
    ("port", 65536),
    ("port", "8080"),
    ("port", True),
    ("port", None),
    ("uid", -1),
    ("uid", 2**32 - 1),
    ("uid", None),
    ("gid", -1),
    ("gid", 2**32 - 1),
    ("gid", 1.0),
    ("health_path", "health"),
    ("health_path", "/a b"),
    ("health_path", "/a\r\nX: y"),
    ("health_codes", []),
    ("health_codes", [99]),
    ("health_codes", [600]),
    ("health_codes", ["200"]),
    ("models_path", "models"),
    ("models_path", None),
    ("model_id", "nul\0"),
    ("model_id", 7),
    ("probe", {"path": "/x", "body": None}),
    ("probe", {"path": "x", "body": None, "codes": [200]}),
    ("probe", {"path": "/x", "body": None, "codes": []}),
    ("probe", {"path": "/x", "body": 1, "codes": [200]}),
    ("authorization", "a\nb"),
    ("authorization", ""),
    ("ready_timeout_s", 0),
    ("stop_timeout_s", 0),
    ("max_restarts", -1),
    ("restart_window_s", 0),
    ("output", "log"),
    ("scratch_max_bytes", 0),
    ("egress", [-1]),
    ("egress", [65536]),
    ("egress", ["443"]),
    ("egress", [True]),
    ("egress", 443),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_plan_with_a_wrong_field_is_none(field: str, value: object) -> None:
    with pytest.raises(ValueError):
        ServerPlan.from_json(PLAN.to_json() | {field: value})


def test_plan_with_a_missing_or_unknown_field_is_none() -> None:
    record = PLAN.to_json()
    wrong: list[object] = [record | {"shell": True}, {name: record[name] for name in record if name != "uid"}, [], None]
    for item in wrong:
        with pytest.raises(ValueError):
            ServerPlan.from_json(item)


def test_plan_that_uses_a_model_id_has_one() -> None:
    with pytest.raises(ValueError, match=r"^model_id$"):
        dataclasses.replace(PLAN, model_id=None, argv=("/bin/x", "--alias={model_id}"))


def test_every_placeholder_is_filled_in_and_other_braces_stay() -> None:
    texts = ("{model}", "{model_dir}/mmproj.gguf", "{model_id}", "{host}:{port}", "{scratch}", '{"a": {}}', "{unknown}")
    plan = dataclasses.replace(PLAN, argv=texts, environment=(("{port}", "{port}"),))
    filled = ["/m/w.gguf", "/m/mmproj.gguf", "my model", "127.0.0.1:8080", "/s", '{"a": {}}', "{unknown}"]
    assert plan.command(PLACE) == filled
    assert plan.variables(PLACE) == {"{port}": "8080"}


def test_what_was_filled_in_is_not_filled_in_again() -> None:
    assert dataclasses.replace(PLAN, argv=("{model}",)).command(dataclasses.replace(PLACE, model="{scratch}")) == ["{scratch}"]


def test_plan_says_that_it_needs_a_directory_and_a_memfd_has_none() -> None:
    plan = dataclasses.replace(PLAN, environment=(("NIM_MODEL_PATH", "{model_dir}"),))
    assert plan.uses("model_dir") and not PLAN.uses("model_dir")
    with pytest.raises(RuntimeError):
        plan.variables(dataclasses.replace(PLACE, model_dir=None))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_other_json_in_any_field_is_a_value_error_or_a_plan(value: object) -> None:
    for field in PLAN.to_json():
        with contextlib.suppress(ValueError):
            plan = ServerPlan.from_json(PLAN.to_json() | {field: value})
            assert ServerPlan.from_json(plan.to_json()) == plan
