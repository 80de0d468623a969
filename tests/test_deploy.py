"""The manifests of deploy/ as a whole; `scripts/validate` renders them and holds them against the schemas of Kubernetes."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.cli import main
from agent.closed import Ident
from agent.commands.initdata import ANNOTATION
from agent.commands.lint_findings import Finding
from agent.commands.lint_rules import lint_pod
from agent.commands.manifests import Setting, parse_documents, pods
from agent.config_source import from_initdata_file
from agent.guest.initdata import parse_initdata, unpack_gzip
from tests.kserve_pod import make_pod, objects_in

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
BASES = ("base/entrypoint", "base/entrypoint-gpu", "base/load", "base/load-gpu", "kserve")
RENDERED = sorted((DEPLOY / "rendered").glob("*.yaml"))


@pytest.mark.parametrize("base", BASES)
def test_document_and_annotation_are_made_from_the_configuration(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DEPLOY / base
    out = tmp_path / "initdata.toml"
    assert main(["initdata", "--config", str(folder / "keyturn.toml"), "--out", str(out), "--json"]) == 0
    annotation = json.loads(capsys.readouterr().out)["annotation"]
    assert out.read_bytes() == (folder / "initdata.toml").read_bytes()
    (patch,) = parse_documents((folder / "annotation.yaml").read_bytes())
    at = ("predictor",) if base == "kserve" else ("template", "metadata")
    assert patch.at("spec", *at, "annotations").value == {annotation["name"]: annotation["value"]}
    cfg = config.parse(from_initdata_file(str(out)).data).config
    assert (cfg.tee.attester, cfg.gpu.count > 0, cfg.server is None) == (
        "coco",
        base.endswith("-gpu"),
        "entrypoint" not in base,
    )


def configure(folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    return subprocess.run([DEPLOY / "configure", folder], env=environment, capture_output=True, text=True)


def test_configure_takes_what_lies_beside_the_configuration(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "base" / "load" / "keyturn.toml", tmp_path)
    assert configure(tmp_path).returncode == 0
    for name in ("annotation.yaml", "initdata.toml"):
        assert (tmp_path / name).read_bytes() == (DEPLOY / "base" / "load" / name).read_bytes()
    (tmp_path / "policy.rego").write_text("package agent_policy\n")
    assert configure(tmp_path).returncode == 0
    (patch,) = parse_documents((tmp_path / "annotation.yaml").read_bytes())
    annotation = patch.at("spec", "template", "metadata", "annotations", ANNOTATION).text or ""
    document = unpack_gzip(base64.b64decode(annotation))
    assert document == (tmp_path / "initdata.toml").read_bytes()
    assert list(parse_initdata(document, Ident("x")).entries) == ["keyturn.toml", "policy.rego"]


def test_configure_stops_at_a_configuration_that_no_guest_takes(tmp_path: Path) -> None:
    (tmp_path / "keyturn.toml").write_text("[")
    done = configure(tmp_path)
    assert (done.returncode, (tmp_path / "annotation.yaml").exists()) == (10, False)


def test_there_is_a_rendering_of_every_overlay() -> None:
    overlays = {path.name for path in (DEPLOY / "overlays").iterdir()} | {"broker", "broker-relay"}
    assert {path.stem for path in RENDERED} == overlays | {"kserve"}
    classes = {"snp", "tdx", "coco-dev", "nvidia-gpu-snp", "nvidia-gpu-tdx"}
    assert overlays == {f"{mode}-{name}" for mode in ("entrypoint", "load") for name in classes} | {"broker", "broker-relay"}


@pytest.mark.parametrize("file", RENDERED, ids=lambda path: path.stem)
def test_the_rendering_brings_the_guest_the_document_of_its_annotation(file: Path) -> None:
    documents = parse_documents(file.read_bytes())
    (pod,) = pods([Setting(make_pod(objects_in(file)))] if file.stem == "kserve" else documents)
    name = pod.spec.at("runtimeClassName").text
    if name is None:
        assert file.stem.startswith("broker")
        return
    assert file.stem.endswith(("kserve", name.removeprefix("kata-qemu-")))
    (config_map,) = [document for document in documents if document.at("kind").text == "ConfigMap"]
    annotation = pod.metadata.at("annotations", ANNOTATION).text or ""
    assert unpack_gzip(base64.b64decode(annotation)).decode() == config_map.at("data", "initdata.toml").text


type_of_row = tuple[str, str, str]


def rows(readme: str) -> list[type_of_row]:
    """The table of promises: manifest (or, of KServe's, kind), setting, value."""
    text = (DEPLOY / readme).read_text()
    return re.findall(r"^\| [^|]+ \| `([A-Za-z-]+)` `([^`]+)` = `([^`]+)` \|", text, re.MULTILINE)


PODS, KSERVE = rows("README.md"), rows("kserve/README.md")


def words_of(path: str) -> list[str | int]:
    found = re.findall(r'\["([^"]+)"\]|\[([0-9]+)\]|([A-Za-z]+)', path)
    return [int(index) if index else key or name for key, index, name in found]


def without(tree: Any, path: str, value: str) -> None:
    """Take a setting away that has this value."""
    *way, last = words_of(path)
    for word in way:
        tree = tree[word]
    said = tree[last] if isinstance(tree[last], str) else json.dumps(tree[last])
    assert re.fullmatch(re.escape(value).replace("…", ".*"), said), path
    del tree[last]


def findings(objects: list[Any]) -> list[Finding]:
    documents = [Setting(item) for item in objects]
    (pod,) = pods(documents)
    return lint_pod(pod, documents, None)[0]


def test_the_tables_of_promises_are_there() -> None:
    assert (len(PODS), len(KSERVE)) >= (25, 15)
    assert {manifest for manifest, _, _ in KSERVE} == {"InferenceService", "ClusterStorageContainer", "ServingRuntime"}


UNSEEN = ("spec.containers[0].command[7]", "spec.automountServiceAccountToken")
"""A broker does not start without the first; the pod's ServiceAccount says the second as well."""


@pytest.mark.parametrize("row", PODS, ids=" ".join)
def test_each_promise_rests_on_a_setting_that_is_there_and_that_lint_misses(row: type_of_row) -> None:
    manifest, path, value = row
    objects = objects_in(DEPLOY / "rendered" / f"{manifest}.yaml")
    (deployment,) = [item for item in objects if item["kind"] == "Deployment"]
    without(deployment["spec"]["template"], path, value)
    if path.endswith("runAsUser"):  # says it as well
        del deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["runAsNonRoot"]
    assert findings(objects) or path in UNSEEN


@pytest.mark.parametrize("row", KSERVE, ids=" ".join)
def test_so_does_each_of_kserves(row: type_of_row) -> None:
    kind, path, value = row
    objects = objects_in(DEPLOY / "rendered" / "kserve.yaml")
    (item,) = [item for item in objects if item["kind"] == kind]
    without(item, path, value)
    if path.endswith("runAsUser"):
        del item["spec"]["containers"][0]["securityContext"]["runAsNonRoot"]
    if path.endswith("storageUri"):
        item["spec"]["predictor"]["model"]["storageUri"] = "keyturn://another"
    beside = [item for item in objects if item["apiVersion"] == "v1"]
    assert findings([make_pod(objects), *beside])
