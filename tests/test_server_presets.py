"""From the `[server]` section to a plan."""

import json
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from agent.errors import ConfigError, ConfigProblem
from agent.server import ProbeRequest, ServerPlan
from agent.server.presets import PRESETS, ProbeKind, command_digest, server_plan

ROOT = Path(__file__).resolve().parents[1]


def planned(preset: str, **keys: Any) -> ServerPlan:
    section: dict[str, Any] = {
        "environment": {},
        "port": 8080,
        "uid": 65532,
        "gid": 65532,
        "ready_timeout_s": 600,
        "stop_timeout_s": 30,
        "max_restarts": 3,
    }
    return server_plan(preset, **section | keys)


def test_llama_cpp_needs_no_more_than_a_model_id() -> None:
    plan = planned("llama-cpp", model_id="tiny")
    assert " ".join(plan.argv) == "llama-server -m {model} --host {host} --port {port} --alias {model_id}"
    assert (plan.health_path, plan.health_codes, plan.models_path) == ("/health", frozenset({200}), "/v1/models")
    assert plan.probe == ProbeRequest("/completion", '{"prompt": "ready", "n_predict": 1, "model": "tiny"}', frozenset({200}))
    assert plan.host == "127.0.0.1"


def test_vllm_needs_no_more_than_a_model_id() -> None:
    plan = planned("vllm", model_id="tiny")
    assert " ".join(plan.argv) == "vllm serve {model_dir} --host {host} --port {port} --served-model-name {model_id}"
    assert (plan.health_path, plan.health_codes, plan.models_path) == ("/health", frozenset({200}), "/v1/models")
    assert plan.probe == ProbeRequest(
        "/v1/completions", '{"prompt": "ready", "max_tokens": 1, "model": "tiny"}', frozenset({200})
    )
    assert plan.egress == ()


def test_triton_is_asked_for_one_model_of_its_repository() -> None:
    plan = planned("triton", model_id="tiny")
    assert plan.argv[:3] == ("tritonserver", "--model-repository", "{model_dir}")
    assert (plan.health_path, plan.health_codes, plan.models_path) == ("/v2/health/ready", frozenset({200}), "/v2/models/tiny")
    body = '{"text_input": "ready", "max_tokens": 1}'
    assert plan.probe == ProbeRequest("/v2/models/tiny/generate", body, frozenset({200}))


def test_triton_listens_on_one_port_only() -> None:
    command = " ".join(planned("triton", model_id="tiny").argv)
    assert "--http-address {host} --http-port {port} --allow-grpc false --allow-metrics false" in command


def test_a_model_id_in_a_path_stays_one_segment_of_it() -> None:
    plan = planned("triton", model_id="../a b/ß?{port}")
    assert plan.models_path == "/v2/models/..%2Fa%20b%2F%C3%9F%3F%7Bport%7D"


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"custom", "llama-cpp"}))  # llama.cpp serves in every demo and boot test
def test_a_preset_has_a_transcript_with_the_pinned_version_and_our_whole_command(preset: str) -> None:
    (transcript,) = (
        text
        for path in (ROOT / "tests" / "transcripts").iterdir()
        if (text := path.read_text()).startswith(f"preset {preset}:")
    )
    lock = (ROOT / "locks" / f"heavy-{preset}.txt").read_text()
    versions = [line for line in transcript.splitlines() if "==" in line]
    assert versions and all(f"{version} \\\n" in lock for version in versions)
    assert json.dumps(PRESETS[preset].command[1:])[1:-1] in transcript
    assert '"event": "server_ready"' in transcript and '"exit_status": 0' in transcript


def test_configured_command_replaces_the_presets_whole_command() -> None:
    command = ("/opt/llama-server", "-m", "{model}", "--port", "{port}")
    assert planned("llama-cpp", command=command).argv == command


def test_embedding_model_is_started_and_probed_as_one() -> None:
    plan = planned("llama-cpp", model_id="minilm", probe=ProbeKind.EMBEDDING)
    assert plan.argv[-1] == "--embeddings"
    assert plan.probe is not None and plan.probe.path == "/v1/embeddings"
    assert json.loads(plan.probe.body or "") == {"input": "ready", "model": "minilm"}
    assert planned("vllm", model_id="minilm", probe=ProbeKind.EMBEDDING).argv[-2:] == ("--runner", "pooling")


def test_probe_can_be_left_out_by_name() -> None:
    assert planned("llama-cpp", model_id="tiny", probe=ProbeKind.NONE).probe is None


def test_custom_server_is_asked_in_the_openai_way() -> None:
    plan = planned("custom", command=("/bin/x",), health_path="/ping", model_id="m", probe=ProbeKind.COMPLETION)
    assert (plan.health_path, plan.models_path) == ("/ping", "/v1/models")
    assert plan.probe == ProbeRequest("/v1/completions", '{"prompt": "ready", "max_tokens": 1, "model": "m"}', frozenset({200}))


def test_without_a_model_id_no_model_list_is_asked_for() -> None:
    plan = planned("custom", command=("/bin/x",), health_path="/ping")
    assert (plan.models_path, plan.model_id, plan.probe) == (None, None, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_servers_are_offline_quiet_and_cache_in_scratch(preset: str) -> None:
    plan = planned(preset, command=("/bin/x",), health_path="/ping", model_id="m")
    environment = dict(plan.environment)
    assert environment["HF_HUB_OFFLINE"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["HOME"] == environment["TMPDIR"] == environment["XDG_CACHE_HOME"] == "{scratch}"
    assert environment.get("LLAMA_CACHE", "{scratch}") == "{scratch}"


def test_prompts_of_other_users_are_not_shown_by_llama_cpp() -> None:
    assert dict(planned("llama-cpp", model_id="m").environment)["LLAMA_ARG_ENDPOINT_SLOTS"] == "0"


def test_processes_of_vllm_meet_on_the_loopback() -> None:
    environment = dict(planned("vllm", model_id="m").environment)
    assert (environment["VLLM_HOST_IP"], environment["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_configured_environment_wins() -> None:
    environment = dict(planned("llama-cpp", model_id="m", environment={"HOME": "/x", "LD_LIBRARY_PATH": "/opt"}).environment)
    assert (environment["HOME"], environment["LD_LIBRARY_PATH"]) == ("/x", "/opt")


def test_probe_shows_the_api_key_that_the_server_was_given() -> None:
    assert planned("llama-cpp", model_id="m", environment={"LLAMA_API_KEY": "one,two"}).authorization == "Bearer one"
    assert planned("vllm", model_id="m", environment={"VLLM_API_KEY": "one"}).authorization == "Bearer one"
    assert planned("llama-cpp", model_id="m").authorization is None


@pytest.mark.parametrize(
    ("preset", "keys", "problem", "key"),
    [
        ("sglang", {}, ConfigProblem.BAD_VALUE, "server.preset"),
        ("vllm", {}, ConfigProblem.BAD_VALUE, "server.model_id"),
        ("triton", {}, ConfigProblem.MISSING_KEY, "server.model_id"),
        ("triton", {"model_id": "m", "probe": ProbeKind.EMBEDDING}, ConfigProblem.BAD_VALUE, "server.probe"),
        ("custom", {"health_path": "/x"}, ConfigProblem.MISSING_KEY, "server.command"),
        ("custom", {"command": ("/bin/x",)}, ConfigProblem.MISSING_KEY, "server.health_path"),
        ("llama-cpp", {}, ConfigProblem.BAD_VALUE, "server.model_id"),
        ("llama-cpp", {"model_id": "m", "command": ("",)}, ConfigProblem.BAD_VALUE, "server.command"),
        ("llama-cpp", {"model_id": "m", "port": 0}, ConfigProblem.BAD_VALUE, "server.port"),
        ("llama-cpp", {"model_id": "m", "host": "192.0.2.7"}, ConfigProblem.BAD_VALUE, "server.host"),
        ("llama-cpp", {"model_id": "m", "environment": {"": "x"}}, ConfigProblem.BAD_VALUE, "server.environment"),
        ("llama-cpp", {"model_id": "m", "environment": {"LLAMA_API_KEY": "\n"}}, ConfigProblem.BAD_VALUE, "server.environment"),
    ],
)
def test_section_that_makes_no_plan_names_its_key(preset: str, keys: dict[str, Any], problem: ConfigProblem, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(preset, **keys)
    assert (caught.value.problem, caught.value.key) == (problem, key)


def test_command_digest_is_that_of_canonical_json() -> None:
    import hashlib

    argv = ("/bin/ß", '"\\\n\x1f\x7f/', "{model}", "€😀")
    assert command_digest(argv) == "sha256:" + hashlib.sha256(rfc8785.dumps(list(argv))).hexdigest()
    assert command_digest(("a", "b")) != command_digest(("a b",))
