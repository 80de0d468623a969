"""What we know of model servers: their readiness contract, their quiet environment, their usual command.

Owns the table of presets and the one way from configuration to `ServerPlan`. A preset is listed only after it ran against
the real server; everything else is `custom`, which assumes the OpenAI paths. Runs nothing.
Contracts measured with llama-server (llama.cpp, 2026-10): refused, then 503 while loading, then 200 on `/health`;
`/v1/models` lists the alias; with an API key `/health` and `/v1/models` stay open and everything else answers 401.
vLLM 0.32 and Triton 2.51: `tests/test_heavy_servers.py` boots both, `tests/transcripts/` has what they answered. Both refuse
until the model is loaded. `/health` of vLLM answers 200 over an engine that dies on its first request, and so do
`/v2/health/ready` and `/v2/models/M/ready` of Triton over a backend process: the one request finds it. A Triton that is not
ready answers 400, and `/v2/models/M` 404 until a version of M is ready, also with `--strict-readiness=false`.
"""

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem
from agent.server import Output, ProbeRequest, ServerPlan


class ProbeKind(enum.Enum):
    """The one request that must be answered before the server counts as ready."""

    COMPLETION = "completion"  # one token
    EMBEDDING = "embedding"  # one vector
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Preset:
    """One server program.

    Attributes:
        command: used when the configuration has none; empty = it must have one.
        embedding_arguments: added to `command` for a model that is probed with an embedding.
        environment: beside `_ENVIRONMENT`.
        api_key_variable: the variable in which the server takes an API key; the probe then shows that key.
        models_path: names the models that are served; `{model_id}` in this and the other paths is the configured id.
        embedding_path: None: the server has no request for embeddings that fits every model.
        probe: used when the configuration names none.
    """

    command: tuple[str, ...]
    embedding_arguments: tuple[str, ...]
    environment: Mapping[str, str]
    api_key_variable: str | None
    health_path: str | None
    models_path: str
    completion_path: str
    completion: Mapping[str, object]
    embedding_path: str | None
    probe: ProbeKind


QUIET: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Nothing is fetched, nothing is told: for any server, where its container says nothing else."""

# Nothing of the agent's environment is inherited, so what a server cannot do without is here too.
_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "{scratch}",
    "TMPDIR": "{scratch}",
    "XDG_CACHE_HOME": "{scratch}",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
}

PRESETS: Mapping[str, Preset] = {
    "llama-cpp": Preset(
        command=("llama-server", "-m", "{model}", "--host", "{host}", "--port", "{port}", "--alias", "{model_id}"),
        embedding_arguments=("--embeddings",),
        environment={
            "LLAMA_CACHE": "{scratch}",
            "LLAMA_ARG_OFFLINE": "1",
            "LLAMA_ARG_ENDPOINT_SLOTS": "0",  # shows the prompts of other users; open by default
            "LLAMA_ARG_UI": "0",
        },
        api_key_variable="LLAMA_API_KEY",
        health_path="/health",
        models_path="/v1/models",
        completion_path="/completion",
        completion={"prompt": "ready", "n_predict": 1},
        embedding_path="/v1/embeddings",
        probe=ProbeKind.COMPLETION,
    ),
    "vllm": Preset(
        command=("vllm", "serve", "{model_dir}", "--host", "{host}", "--port", "{port}", "--served-model-name", "{model_id}"),
        embedding_arguments=("--runner", "pooling"),
        environment={
            "VLLM_NO_USAGE_STATS": "1",
            # Processes of one server meet on the loopback, not on an address that the network can reach.
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        api_key_variable="VLLM_API_KEY",
        health_path="/health",
        models_path="/v1/models",
        completion_path="/v1/completions",
        completion={"prompt": "ready", "max_tokens": 1},
        embedding_path="/v1/embeddings",
        probe=ProbeKind.COMPLETION,
    ),
    "triton": Preset(
        # One port: gRPC would listen on every address, whatever the host.
        command=(
            *("tritonserver", "--model-repository", "{model_dir}", "--http-address", "{host}", "--http-port", "{port}"),
            *("--allow-grpc", "false", "--allow-metrics", "false"),
        ),
        embedding_arguments=(),
        environment={},
        api_key_variable=None,
        health_path="/v2/health/ready",
        models_path="/v2/models/{model_id}",
        completion_path="/v2/models/{model_id}/generate",
        completion={"text_input": "ready", "max_tokens": 1},
        embedding_path=None,
        probe=ProbeKind.COMPLETION,
    ),
    "custom": Preset(
        command=(),
        embedding_arguments=(),
        environment={},
        api_key_variable=None,
        health_path=None,
        models_path="/v1/models",
        completion_path="/v1/completions",
        completion={"prompt": "ready", "max_tokens": 1},
        embedding_path="/v1/embeddings",
        probe=ProbeKind.NONE,
    ),
}


def server_plan(
    preset_name: str,
    *,
    port: int,
    command: tuple[str, ...] | None = None,
    environment: Mapping[str, str],
    host: str = "127.0.0.1",
    uid: int | None,
    gid: int | None,
    model_id: str | None = None,
    health_path: str | None = None,
    probe: ProbeKind | None = None,
    ready_timeout_s: int,
    stop_timeout_s: int,
    max_restarts: int,
    restart_window_s: int = 600,
    output: Output = Output.COUNT,
    scratch_max_bytes: int = 1 << 30,
    egress: tuple[int, ...] = (),
) -> ServerPlan:
    """The plan that the `[server]` section of a configuration stands for; names are its keys.

    Raises:
        ConfigError: with the key concerned, never its value.
    """
    if preset_name not in PRESETS:
        raise _error(ConfigProblem.BAD_VALUE, "preset")
    preset = PRESETS[preset_name]
    kind = preset.probe if probe is None else probe
    argv = command or preset.command + (preset.embedding_arguments if kind is ProbeKind.EMBEDDING else ())
    if not argv:
        raise _error(ConfigProblem.MISSING_KEY, "command")
    path = health_path or preset.health_path
    if path is None:
        raise _error(ConfigProblem.MISSING_KEY, "health_path")
    api_key = environment.get(preset.api_key_variable) if preset.api_key_variable else None
    try:
        return ServerPlan(
            argv=argv,
            environment=tuple(({**_ENVIRONMENT, **preset.environment, **environment}).items()),
            host=host,
            port=port,
            uid=uid,
            gid=gid,
            health_path=path,
            health_codes=frozenset({200}),
            models_path=None if model_id is None else _path(preset.models_path, model_id),
            model_id=model_id,
            probe=_probe_request(preset, kind, model_id),
            # llama-server takes several keys, separated by commas; any of them will do.
            authorization=f"Bearer {api_key.split(',')[0]}" if api_key else None,
            ready_timeout_s=ready_timeout_s,
            stop_timeout_s=stop_timeout_s,
            max_restarts=max_restarts,
            restart_window_s=restart_window_s,
            output=output,
            scratch_max_bytes=scratch_max_bytes,
            egress=egress,
        )
    except ValueError as error:
        field = error.args[0]
        raise _error(ConfigProblem.BAD_VALUE, {"argv": "command", "authorization": "environment"}.get(field, field)) from None


def command_digest(argv: tuple[str, ...]) -> str:
    """SHA-256 of the command before placeholders are filled in, `sha256:` and 64 hex digits.

    Over the JSON array without spaces, UTF-8; for strings this is the canonical JSON of RFC 8785.
    """
    text = json.dumps(argv, ensure_ascii=False, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _probe_request(preset: Preset, kind: ProbeKind, model_id: str | None) -> ProbeRequest | None:
    if kind is ProbeKind.NONE:
        return None
    body: Mapping[str, object] = {"input": "ready"}
    path = preset.embedding_path
    if kind is ProbeKind.COMPLETION:
        path, body = preset.completion_path, preset.completion
    if path is None:
        raise _error(ConfigProblem.BAD_VALUE, "probe")
    if "{model_id}" not in path and model_id is not None:
        body = {**body, "model": model_id}
    return ProbeRequest(_path(path, model_id), json.dumps(body), frozenset({200}))


def _path(path: str, model_id: str | None) -> str:
    if "{model_id}" not in path:
        return path
    if model_id is None:
        raise _error(ConfigProblem.MISSING_KEY, "model_id")
    return path.replace("{model_id}", quote(model_id, safe=""))


def _error(problem: ConfigProblem, key: str) -> ConfigError:
    return ConfigError(problem, Ident(f"server.{key}"))
