"""`keyturn load` as KServe's storage initializer: called as the pod that KServe makes calls it, and what comes of it."""

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from agent.artifact.given import SPREAD_NAME
from agent.commands.initdata import ANNOTATION
from agent.commands.lint_findings import Finding
from agent.commands.lint_rules import lint_pod
from agent.commands.manifests import Setting, pods
from agent.errors import ConfigError, DestinationProblem
from agent.guest.initdata import pack_gzip, unpack_gzip
from tests.kserve_pod import INITIALIZER, SERVER, VOLUME, Object, initializer, make_pod, objects_in, supports
from tests.test_commands_load import loads
from tests.test_commands_load import out as out  # noqa: PLC0414  a fixture
from tests.world import DEADLINE_S, KEY_URI, World

RENDERED = Path(__file__).resolve().parents[1] / "deploy" / "rendered" / "kserve.yaml"
URI = "keyturn://my-model"


def cluster() -> list[Object]:
    return objects_in(RENDERED)


def of(objects: list[Object], kind: str) -> Any:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def predictor(objects: list[Object]) -> Any:
    return of(objects, "InferenceService")["spec"]["predictor"]


def linted(pod: Object, objects: list[Object]) -> list[Finding]:
    documents = [Setting(pod), *(Setting(item) for item in objects if item["apiVersion"] == "v1")]
    (found,) = pods(documents)
    return lint_pod(found, documents, None)[0]


# --- the manifests ----------------------------------------------------------------------------------------------------


def test_of_our_manifests_kserve_makes_a_pod_in_which_nothing_is_wrong() -> None:
    objects = cluster()
    pod = make_pod(objects)
    assert linted(pod, objects) == []
    container = initializer(pod)
    assert container["command"] == ["/opt/keyturn/keyturn", "load", "--initdata=/etc/keyturn/initdata.toml"]
    assert container["args"] == [URI, "/mnt/models"]
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
        "/mnt/models": VOLUME,
        "/etc/keyturn": "keyturn-initdata",
    }
    (server,) = pod["spec"]["containers"]
    assert (server["name"], server["volumeMounts"]) == (
        SERVER,
        [{"name": VOLUME, "mountPath": "/mnt/models", "readOnly": True}],
    )


def test_without_the_volume_of_the_inference_service_kserve_gives_a_disk() -> None:
    """The medium is the InferenceService's to say: the ClusterStorageContainer has no volumes."""
    objects = cluster()
    predictor(objects)["volumes"] = [item for item in predictor(objects)["volumes"] if item["name"] != VOLUME]
    pod = make_pod(objects)
    assert {"name": VOLUME, "emptyDir": {}} in pod["spec"]["volumes"]
    assert [finding.rule.id for finding in linted(pod, objects)] == ["memory-volume"]


def test_without_limits_of_its_own_the_container_has_kserves_which_hold_no_model() -> None:
    objects = cluster()
    del of(objects, "ClusterStorageContainer")["spec"]["container"]["resources"]
    pod = make_pod(objects)
    assert initializer(pod)["resources"]["limits"]["memory"] == "1Gi"
    assert [finding.rule.id for finding in linted(pod, objects)] == ["memory"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"storageUri": "keyturn://another-model"}, ["asked"]),
        ({"confidential": {"enabled": True, "resourceId": "kbs:///models/another/1"}}, ["asked"]),
        ({"confidential": {"enabled": True, "resourceId": "kbs:///models/my-model/1"}}, []),
        ({"confidential": {"enabled": True}}, []),
    ],
)
def test_what_a_pod_asks_for_is_linted_against_its_configuration(change: Object, expected: list[str]) -> None:
    objects = cluster()
    predictor(objects)["model"] |= change
    assert [finding.rule.id for finding in linted(make_pod(objects), objects)] == expected


def test_a_pod_that_asks_for_nothing_must_have_nothing_to_choose() -> None:
    objects = cluster()
    pod = make_pod(objects)
    container = initializer(pod)
    container["command"].append(f"--out={container['args'].pop()}")
    container["args"].clear()
    assert linted(pod, objects) == []
    annotations = pod["metadata"]["annotations"]
    document = unpack_gzip(base64.b64decode(annotations[ANNOTATION])).replace(
        b"[[artifact.allowed]]",
        b'[[artifact.allowed]]\nuri = "x://y"\nsource = "/y"\nmanifest_digest = "sha256:%s"\n' % (b"0" * 64)
        + b"[[artifact.allowed]]",
    )
    annotations[ANNOTATION] = base64.b64encode(pack_gzip(document)).decode()
    of(objects, "ConfigMap")["data"]["initdata.toml"] = document.decode()
    (finding,) = linted(pod, objects)
    assert (finding.rule.id, isinstance(finding.error, ConfigError)) == ("asked", True)


def test_kserve_takes_the_container_for_its_scheme_alone_and_for_one_model() -> None:
    container = of(cluster(), "ClusterStorageContainer")
    assert supports(container, "keyturn://x")
    assert not any(supports(container, uri) for uri in ("s3://a/keyturn://x", "oci://a/b", "https://a/b", "pvc://a"))
    assert not supports(container | {"disabled": True}, URI)
    assert container["spec"]["supportsMultiModelDownload"] is False
    assert (container["spec"]["container"]["name"], "args" in container["spec"]["container"]) == (INITIALIZER, False)


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, silicon: Path, out: Path) -> Iterator[World]:
    """The key comes from the confidential-data-hub. Some of the files lie in a folder."""
    files = {"config.json": b"{}", "model.safetensors": os.urandom(3 << 20), "tokenizer/vocab.txt": b"a b c"}
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, given=files)
        world.key_from_cdh()
        loads(world, out)
        selection = {key: world.artifact.pop(key) for key in ("source", "manifest_digest")}
        world.artifact["allowed"] = [
            {"uri": "keyturn://another", **selection, "key_uri": "kbs:///a/b/c"},
            {"uri": URI, **selection},
        ]
        yield world


def run(world: World, out: Path, **model: Any) -> "subprocess.CompletedProcess[bytes]":
    """The init container of the pod, without its image: command, arguments and variables are KServe's."""
    objects = cluster()
    predictor(objects)["model"] |= model
    container = initializer(make_pod(objects, models=str(out)))
    _, *words = container["command"]
    command = [f"--config={world.prepare()}" if word.startswith("--initdata=") else word for word in words]
    environment = {item["name"]: item["value"] for item in container["env"]} | {"PATH": os.environ["PATH"]}
    faces = ["--status-file=", f"--termination-log={world.folder / 'termination'}"]
    return subprocess.run(
        [sys.executable, "-m", "agent", *command, *faces, *container["args"]],
        env=environment,
        capture_output=True,
        timeout=DEADLINE_S,
        cwd=Path(__file__).parents[1],
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != SPREAD_NAME
    }


@pytest.mark.parametrize("confidential", [{}, {"enabled": True}, {"enabled": True, "resourceId": KEY_URI}])
def test_the_models_files_lie_where_kserves_server_looks(world: World, out: Path, confidential: Object) -> None:
    done = run(world, out, confidential=confidential)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert files_in(out) == world.model
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in world.model} == {0o440}
    assert sorted(os.listdir(out)) == [SPREAD_NAME, "config.json", "model.safetensors", "tokenizer"]
    # KServe shows this text in the status of the InferenceService.
    assert (world.folder / "termination").read_text().startswith("keyturn: stopped")


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ({"storageUri": "keyturn://my-mode"}, "storage URI"),
        ({"storageUri": "keyturn://my-model/"}, "storage URI"),
        (
            {"storageUri": "keyturn://another", "confidential": {"enabled": True, "resourceId": KEY_URI}},
            "CONFIDENTIAL_RESOURCE_ID",
        ),
        ({"confidential": {"enabled": True, "resourceId": "kbs:///a/b/c"}}, "CONFIDENTIAL_RESOURCE_ID"),
    ],
)
def test_what_the_configuration_does_not_allow_is_refused_and_nothing_is_left(
    world: World, out: Path, model: Object, asked: str
) -> None:
    done = run(world, out, **model)
    assert done.returncode == 10
    (failed,) = [event for line in done.stderr.splitlines() if (event := json.loads(line))["event"] == "failed"]
    assert (failed["class"], failed["fields"]) == ("ConfigNotMeasuredError", {"asked": asked})
    assert os.listdir(out) == []
    assert "ConfigNotMeasuredError" in (world.folder / "termination").read_text()


def test_of_two_allowed_models_the_one_asked_for_is_loaded(world: World, out: Path) -> None:
    """The other entry's key URI is not what the model was sealed for: had it been taken, this would be seen."""
    done = run(world, out, storageUri="keyturn://another")
    assert done.returncode == 10
    assert b"ConfigNotMeasuredError" not in done.stderr
    assert b"broker.key_uri" in done.stderr
    assert run(world, out).returncode == 0
    assert files_in(out) == world.model


def test_a_container_that_is_started_again_replaces_what_it_left(world: World, out: Path) -> None:
    assert run(world, out).returncode == 0
    (out / "config.json").chmod(0o600)
    (out / "stale").write_bytes(b"of another version")
    assert run(world, out).returncode == 0
    assert files_in(out) == world.model


def test_a_model_that_does_not_open_leaves_nothing(world: World, out: Path) -> None:
    blob = max((world.layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    assert run(world, out).returncode == 19
    assert os.listdir(out) == []


def test_a_disk_in_place_of_memory_is_refused(world: World) -> None:
    """KServe's own emptyDir, where the InferenceService names no volume."""
    disk = Path("/proc")  # of no file system that is memory, on whatever the tests run
    world.artifact["directory"] = str(disk)
    done = run(world, disk)
    assert done.returncode == 20
    (failed,) = [event for line in done.stderr.splitlines() if (event := json.loads(line))["event"] == "failed"]
    assert (failed["class"], failed["fields"]["problem"]) == ("DestinationError", DestinationProblem.NOT_MEMORY.value)


def test_several_models_are_refused_as_are_words_that_are_no_pair(out: Path) -> None:
    for words in ([], [URI], [URI, str(out), "keyturn://b", str(out)], ["--out", str(out), URI, str(out)]):
        command = [sys.executable, "-m", "agent", "load", "--config=/x", *words]
        assert subprocess.run(command, capture_output=True, timeout=DEADLINE_S).returncode == 2


def test_a_pod_is_made_of_known_keys_only() -> None:
    for kind, path in (("ClusterStorageContainer", ("spec",)), ("InferenceService", ("spec",)), ("ServingRuntime", ("spec",))):
        objects = deepcopy(cluster())
        here = of(objects, kind)
        for word in path:
            here = here[word]
        here["unknown"] = 1
        with pytest.raises(ValueError, match="unknown"):
            make_pod(objects)
