import asyncio
import os

import pytest

from agent.config import EXAMPLE, Selection, parse
from agent.errors import Asked, ConfigError, ConfigNotMeasuredError, ConfigProblem, GpuCountError, InternalError
from agent.server import ServerPlan
from agent.worker import as_agent_error, check_command, check_out, plan_of


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # that is what it is for
        return caught


def test_our_own_error_is_reported_before_anything_foreign_in_the_same_group() -> None:
    group = ExceptionGroup("text", [raised(KeyError("secret")), GpuCountError(2, 1)])
    assert isinstance(as_agent_error(group), GpuCountError)
    nested = ExceptionGroup("text", [ExceptionGroup("text", [GpuCountError(2, 1)])])
    assert isinstance(as_agent_error(nested), GpuCountError)


def test_cancellation_is_no_failure_of_its_own() -> None:
    assert as_agent_error(asyncio.CancelledError()) is None
    assert as_agent_error(BaseExceptionGroup("text", [asyncio.CancelledError()])) is None


def test_a_foreign_exception_is_told_by_its_place_never_by_its_text() -> None:
    try:
        parse(None)  # type: ignore[arg-type]  # a bug of ours
    except TypeError as error:
        internal = as_agent_error(error)
    assert isinstance(internal, InternalError)
    assert internal.place.startswith("agent/config:")
    assert internal.place.endswith(":TypeError")
    assert "secret" not in str(as_agent_error(raised(KeyError("secret"))))


def planned(text: str) -> ServerPlan:
    plan = plan_of(parse(text.encode()).config)
    assert plan is not None
    return plan


def test_the_server_runs_under_its_own_user_only_where_we_can_change_users() -> None:
    plan = planned(EXAMPLE)
    assert plan.uid == (65532 if os.geteuid() == 0 else None)
    assert plan.argv[0] == "/usr/bin/llama-server"


def test_the_server_may_connect_nowhere_unless_the_configuration_names_the_port() -> None:
    assert planned(EXAMPLE).egress == ()
    text = EXAMPLE.replace("port = 8080", "port = 8080\negress = [443, 0]")
    assert planned(text).egress == (443, 0)
    for wrong in ("[-1]", "[65536]", "443", '["443"]', "[true]"):
        with pytest.raises(ConfigError):
            parse(EXAMPLE.replace("port = 8080", f"port = 8080\negress = {wrong}").encode())


def test_a_server_that_cannot_be_planned_is_a_config_error() -> None:
    text = EXAMPLE.replace('preset = "llama-cpp"', 'preset = "custom"')
    with pytest.raises(ConfigError) as caught:
        planned(text)
    assert (caught.value.problem, caught.value.key) == (ConfigProblem.MISSING_KEY, "server.health_path")


LOADED = EXAMPLE[: EXAMPLE.index("[server]")].replace('destination = "auto"', 'destination = "directory"\ndirectory = "/out"')


@pytest.mark.parametrize(
    ("text", "out", "key"),
    [
        (EXAMPLE, None, None),
        (LOADED, "/out", None),
        (LOADED, "/out/", None),
        (LOADED, None, "server"),
        (EXAMPLE, "/out", "server"),
        (LOADED, "/elsewhere", "artifact.directory"),
        (LOADED, "out", "artifact.directory"),
        (EXAMPLE[: EXAMPLE.index("[server]")], "/out", "artifact.directory"),
    ],
)
def test_what_becomes_of_the_model_is_said_by_the_configuration(text: str, out: str | None, key: str | None) -> None:
    config = parse(text.encode()).config
    if key is None:
        check_out(config, out)
        return
    with pytest.raises(ConfigError) as caught:
        check_out(config, out)
    assert caught.value.key == key


def test_nothing_of_ours_runs_without_a_server_section() -> None:
    assert plan_of(parse(LOADED.encode()).config) is None


def test_the_words_after_the_dashes_are_the_measured_command_or_the_boot_ends() -> None:
    plan = planned(EXAMPLE)
    for same in ((), plan.argv):
        check_command(plan, Selection(command=same))
    check_command(plan, None)
    for other in (
        plan.argv[:-1],
        (*plan.argv, "--verbose"),
        ("/bin/sh", *plan.argv[1:]),
        (plan.argv[0].upper(), *plan.argv[1:]),
    ):
        with pytest.raises(ConfigNotMeasuredError) as caught:
            check_command(plan, Selection(command=other))
        assert caught.value.asked is Asked.COMMAND
    with pytest.raises(ConfigNotMeasuredError):
        check_command(None, Selection(command=("vllm",)))
