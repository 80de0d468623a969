"""Mutations of the manifests that we ship: each is found, at its path and nowhere else; as they are they are clean."""

import base64
import copy
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agent.closed import Ident
from agent.commands.initdata import ANNOTATION
from agent.commands.lint_findings import OWNER, Finding, Rule
from agent.commands.lint_rules import KERNEL_PARAMETERS, lint_pod
from agent.commands.manifests import Setting, parse_documents, pods
from agent.errors import ConfigProblem, InitdataProblem, Owner
from agent.guest.initdata import pack_document, pack_gzip, parse_initdata, unpack_gzip

RENDERED = Path(__file__).resolve().parents[1] / "deploy" / "rendered"
POD = "spec.template.spec"
RUN = LOADED = f"{POD}.containers[0]"
LOAD = f"{POD}.initContainers[0]"
ANNOTATED = f'spec.template.metadata.annotations["{ANNOTATION}"]'
PARAMETERS = f'spec.template.metadata.annotations["{KERNEL_PARAMETERS}"]'
TILDE = KERNEL_PARAMETERS.replace(".", "~")
"""A key with dots, for `change`."""
GIB = 1 << 30
GONE = object()

type_of_objects = dict[str, Any]


@cache
def parsed(name: str) -> list[Setting]:
    return parse_documents((RENDERED / f"{name}.yaml").read_bytes())


def load(name: str) -> type_of_objects:
    """The objects of a rendered file by kind."""
    return {str(document.at("kind").text): copy.deepcopy(document.value) for document in parsed(name)}


def lint(objects: type_of_objects, model_bytes: int | None = None) -> set[tuple[str, str]]:
    documents = [Setting(value) for value in objects.values()]
    return {(finding.path, finding.rule.id) for pod in pods(documents) for finding in lint_pod(pod, documents, model_bytes)[0]}


def change(objects: type_of_objects, path: str, value: object) -> None:
    """Set, or with GONE remove, a setting of the Deployment (or of `Kind:path`)."""
    kind, _, path = path.rpartition(":")
    here: Any = objects[kind or "Deployment"]
    *way, last = [int(word) if word.isdigit() else word for word in path.replace("[", ".").replace("]", "").split(".")]
    for word in way:
        here = here[word]
    last = str(last).replace("~", ".") if isinstance(last, str) else last
    if value is GONE:
        del here[last]
    elif isinstance(here, list) and last == len(here):
        here.append(value)
    else:
        here[last] = value


def reconfigure(objects: type_of_objects, *changes: tuple[str, str]) -> None:
    """Another configuration, in annotation and ConfigMap alike."""
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    text = parse_initdata(unpack_gzip(base64.b64decode(annotations[ANNOTATION])), Ident("x")).entries["keyturn.toml"]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    launch(objects, pack_document({"keyturn.toml": text}, "sha384"))


def launch(objects: type_of_objects, document: bytes) -> None:
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    annotations[ANNOTATION] = base64.b64encode(pack_gzip(document)).decode()
    objects["ConfigMap"]["data"]["initdata.toml"] = document.decode()


@pytest.mark.parametrize("file", sorted(RENDERED.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_we_ship_is_clean(file: Path) -> None:
    no_tee = {(f"{POD}.runtimeClassName", "no-tee")} if "coco-dev" in file.name else set()
    assert lint(load(file.stem)) == no_tee


ENTRYPOINT, GPU, LOADER, LOADER_GPU, BROKER = (
    "entrypoint-snp", "entrypoint-nvidia-gpu-tdx", "load-tdx", "load-nvidia-gpu-snp", "broker",
)  # fmt: skip

EXEC = {"exec": {"command": ["true"]}}
# manifest, path of the setting, its new value, class; the path of the finding where it is another
MUTATIONS: list[tuple[Any, ...]] = [
    *(
        (name, *row)
        for name in (ENTRYPOINT, LOADER)
        for row in (
            (f"{POD}.runtimeClassName", GONE, "runtime-class"),
            (f"{POD}.runtimeClassName", "runc", "runtime-class"),
            (f"{POD}.runtimeClassName", "kata-qemu-snp-debug", "runtime-class"),
            (f"{POD}.runtimeClassName", "kata-qemu-snp-devkit", "runtime-class"),
            (f"{POD}.runtimeClassName", 1, "runtime-class"),
            (f"{POD}.runtimeClassName", "kata-qemu-coco-dev-runtime-rs", "no-tee"),
            (f"spec.template.metadata.annotations.{TILDE}", GONE, "rest-api", PARAMETERS),
            (f"spec.template.metadata.annotations.{TILDE}", "agent.log=debug", "rest-api", PARAMETERS),
            (f"{POD}.containers[0].image", "registry.example.com/vllm:latest", "image-digest"),
            (f"{POD}.containers[0].image", "vllm@sha256:00", "image-digest"),
            (f"{POD}.containers[0].image", GONE, "image-digest"),
            (f"{POD}.automountServiceAccountToken", True, "service-account-token"),
            (f"{POD}.terminationGracePeriodSeconds", 89, "grace-period"),
            (f"{POD}.terminationGracePeriodSeconds", GONE, "grace-period"),
            (f"{POD}.containers[0].resources.limits.memory", GONE, "memory-limit"),
            (f"{POD}.containers[0].resources.limits.memory", "lots", "memory-limit"),
            (f"{POD}.containers[0].startupProbe", GONE, "probe"),
            (f"{POD}.containers[0].readinessProbe", GONE, "probe"),
            (f"{POD}.containers[0].livenessProbe", GONE, "probe"),
            (f"{POD}.containers[0].livenessProbe", EXEC, "probe-exec", f"{POD}.containers[0].livenessProbe.exec"),
            (f"{POD}.containers[0].resources.limits.nvidia~com/gpu", "1", "gpu-resource"),
            (f"{POD}.containers[0].resources.limits.nvidia~com/pgpu", "1", "gpu-limit"),
            ("ConfigMap:data.initdata~toml", "another", "other-document", 'data["initdata.toml"]'),
        )
    ),
    (ENTRYPOINT, f"{RUN}.command", ["sh", "-c", "keyturn run"], "no-keyturn", f"{POD}.containers"),
    (ENTRYPOINT, f"{RUN}.command[2]", "--config=/etc/keyturn/initdata.toml", "config-source", f"{RUN}.command"),
    (ENTRYPOINT, f"{RUN}.command[2]", "--guest", "config-source", f"{RUN}.command"),
    (ENTRYPOINT, f"{RUN}.command[2]", "--initdata=/initdata.toml", "config-mount", f"{RUN}.volumeMounts"),
    (ENTRYPOINT, f"{RUN}.volumeMounts[0].mountPath", "/etc/other", "config-mount", f"{RUN}.volumeMounts"),
    (ENTRYPOINT, f"{RUN}.command[3]", "--quiet", "health-port", f"{RUN}.command"),
    (ENTRYPOINT, f"{RUN}.command[3]", "--health=127.0.0.1:8081", "health-port"),
    (ENTRYPOINT, f"{RUN}.command[3]", "--health=[::1]:8081", "health-port"),
    (ENTRYPOINT, f"{RUN}.command[3]", "--health=8081", "health-port"),
    (ENTRYPOINT, f"{RUN}.startupProbe.httpGet.path", "/livez", "probe-target"),
    (ENTRYPOINT, f"{RUN}.readinessProbe.httpGet.path", "/health", "probe-target"),
    (ENTRYPOINT, f"{RUN}.livenessProbe.httpGet.path", "/readyz", "probe-target"),
    (ENTRYPOINT, f"{RUN}.livenessProbe.httpGet.port", "http", "probe-target"),
    (ENTRYPOINT, f"{RUN}.livenessProbe.httpGet.port", 8000, "probe-target"),
    (ENTRYPOINT, f"{RUN}.livenessProbe", {"tcpSocket": {"port": 8081}}, "probe-target", f"{RUN}.livenessProbe.httpGet.path"),
    (ENTRYPOINT, f"{RUN}.startupProbe.failureThreshold", 149, "startup-window"),
    (ENTRYPOINT, f"{RUN}.startupProbe.failureThreshold", GONE, "startup-window"),
    (ENTRYPOINT, f"{RUN}.startupProbe.periodSeconds", 1, "startup-window", f"{RUN}.startupProbe.failureThreshold"),
    (GPU, f"spec.template.metadata.annotations.{TILDE}", "x", "kernel-parameters", PARAMETERS),
    (GPU, f"{POD}.runtimeClassName", "kata-qemu-nvidia-gpu", "runtime-class"),
    (GPU, f"{RUN}.resources.limits.nvidia~com/pgpu", GONE, "gpu-limit"),
    (GPU, f"{RUN}.resources.limits.nvidia~com/pgpu", "2", "gpu-limit"),
    (GPU, f"{RUN}.volumeMounts[0]", GONE, "kernel-log", f"{RUN}.volumeMounts"),
    (GPU, f"{POD}.volumes[0].hostPath.path", "/dev/log", "kernel-log"),
    *(
        (name, f"{POD}.{setting}", True, "shared-namespace")
        for name in (ENTRYPOINT, LOADER)
        for setting in ("shareProcessNamespace", "hostPID", "hostIPC", "hostNetwork")
    ),
    (ENTRYPOINT, f"{RUN}.securityContext.privileged", True, "privileged"),
    (LOADER, f"{LOADED}.securityContext.privileged", True, "privileged"),
    (LOADER, f"{LOAD}.securityContext.privileged", True, "privileged"),
    *(
        (name, f"{POD}.volumes[{count}]", {"name": "host", "hostPath": {"path": path}}, "host-path", found)
        for name, count in ((ENTRYPOINT, 1), (LOADER, 2))
        for path in ("/opt/models", "/dev")
        for found in (f"{POD}.volumes[{count}].hostPath.path",)
    ),
    (ENTRYPOINT, f"{RUN}.lifecycle", {"preStop": EXEC}, "probe-exec", f"{RUN}.lifecycle.preStop.exec"),
    (LOADER, f"{LOADED}.lifecycle", {"postStart": EXEC}, "probe-exec", f"{LOADED}.lifecycle.postStart.exec"),
    (ENTRYPOINT, f"{RUN}.securityContext.runAsUser", 65532, "user"),
    (ENTRYPOINT, f"{RUN}.securityContext.runAsNonRoot", True, "user"),
    (LOADER, f"{LOAD}.securityContext.runAsUser", 1000, "user"),
    (LOADER, f"{POD}.securityContext.runAsNonRoot", True, "user"),
    *(
        (name, f"{at}.securityContext.capabilities.{what}", value, "capabilities", f"{at}.securityContext.capabilities.add")
        for name, at, what, value in (
            (ENTRYPOINT, RUN, "add", GONE),
            (ENTRYPOINT, RUN, "add", ["SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL", "IPC_LOCK"]),
            (ENTRYPOINT, RUN, "add", ["SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL"]),
            (ENTRYPOINT, RUN, "add", ["SYS_ADMIN", "SETGID", "SETPCAP", "CHOWN", "KILL", "IPC_LOCK"]),
            (LOADER, LOAD, "add", ["IPC_LOCK"]),
            (LOADER, LOAD, "add", ["CHOWN"]),
            (LOADER_GPU, LOAD, "add", ["CHOWN", "IPC_LOCK"]),
        )
    ),
    (ENTRYPOINT, f"{RUN}.securityContext.readOnlyRootFilesystem", True, "read-only-root"),
    (ENTRYPOINT, f"{RUN}.env", [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {}}}], "environment"),
    (ENTRYPOINT, f"{RUN}.envFrom", [{"secretRef": {"name": "x"}}], "environment"),
    (ENTRYPOINT, f"{RUN}.livenessProbe.httpGet.scheme", "HTTPS", "probe-target"),
    (ENTRYPOINT, f"{RUN}.readinessProbe.httpGet.host", "127.0.0.1", "probe-target"),
    (ENTRYPOINT, f"{POD}.volumes[0]", {"name": "initdata", "emptyDir": {}}, "config-mount", f"{POD}.volumes[0].emptyDir"),
    (ENTRYPOINT, f"{POD}.volumes[0].configMap.items", [{"key": "initdata.toml", "path": "x"}], "config-mount"),
    (
        ENTRYPOINT,
        f"{POD}.volumes[0].configMap.items",
        [{"key": "x", "path": "initdata.toml"}],
        "other-document",
        "data.x",
    ),
    (ENTRYPOINT, f"{RUN}.volumeMounts[0].subPath", "other", "other-document", 'data["other/initdata.toml"]'),
    (ENTRYPOINT, f"{RUN}.command[2]", "--initdata=/etc/keyturn/a/initdata.toml", "other-document", 'data["a/initdata.toml"]'),
    (LOADER, f"{LOAD}.restartPolicy", "Always", "mode", LOAD),
    (LOADER, f"{LOAD}.volumeMounts[1].subPath", "a", "memory-volume"),
    (LOADER, f"{LOADED}.volumeMounts[0].subPath", "model", "memory-volume"),
    (LOADER, f"{LOADED}.volumeMounts[0].subPathExpr", "$(A)", "memory-volume"),
    (LOADER, f"{POD}.securityContext", GONE, "fs-group", f"{POD}.securityContext.fsGroup"),
    (LOADER, f"{LOADED}.securityContext.runAsUser", 0, "root"),
    (LOADER, f"{LOADED}.securityContext", {}, "root", f"{LOADED}.securityContext.runAsUser"),
    (GPU, f"{POD}.volumes[0]", {"name": "kmsg", "emptyDir": {}}, "kernel-log", f"{POD}.volumes[0].hostPath.path"),
    (
        GPU,
        f"{POD}.containers[1]",
        {
            "name": "x",
            "image": "x@sha256:" + "0" * 64,
            "resources": {"limits": {"memory": "1Gi", "nvidia.com/pgpu": 1}},
        },
        "gpu-limit",
        f'{POD}.containers[1].resources.limits["nvidia.com/pgpu"]',
    ),
    (LOADER, f"{LOAD}.image", "keyturn", "image-digest"),
    (LOADER, f"{LOAD}.command[0]", "true", "no-keyturn", f"{POD}.containers"),
    (LOADER, f"{LOAD}.command[2]", "--config=x", "config-source", f"{LOAD}.command"),
    (LOADER, f"{LOAD}.resources.limits.memory", GONE, "memory-limit"),
    (LOADER, f"{LOAD}.resources.limits.memory", "27Gi", "memory"),
    (LOADER, f"{LOADED}.resources.limits.memory", "27Gi", "memory"),
    (LOADER, f"{POD}.volumes[1].emptyDir.medium", GONE, "memory-volume"),
    (LOADER, f"{POD}.volumes[1].emptyDir.medium", "HugePages", "memory-volume"),
    (LOADER, f"{POD}.volumes[1].emptyDir", {}, "memory-volume", f"{POD}.volumes[1].emptyDir.medium"),
    (LOADER, f"{POD}.volumes[1]", GONE, "memory-volume", f"{POD}.volumes.emptyDir.medium"),
    (LOADER, f"{LOAD}.volumeMounts[1]", GONE, "memory-volume", f"{LOAD}.volumeMounts"),
    (LOADER, f"{LOADED}.volumeMounts[0]", GONE, "not-shared", f"{POD}.containers"),
    (LOADER, f"{LOADED}.volumeMounts[0].readOnly", GONE, "read-only"),
    (LOADER, f"{LOADED}.volumeMounts[0].readOnly", "true", "read-only"),
    (LOADER, f"{LOADED}.command", ["vllm", "serve"], "receipt"),
    (LOADER, f"{LOADED}.command[2]", "--config=x", "config-source", f"{LOADED}.command"),
    (LOADER, f"{LOADED}.command[2]", "--initdata=/initdata.toml", "config-mount", f"{LOADED}.volumeMounts"),
    (LOADER, f"{LOADED}.volumeMounts[0].mountPath", "/models", "dir", f"{LOADED}.command"),
    (LOADER, f"{LOADED}.command[3]", "--dir=/models", "dir"),
    (LOADER, f"{POD}.volumes[1].emptyDir.sizeLimit", GONE, "size-limit"),
    (LOADER_GPU, f"{LOAD}.resources.limits.nvidia~com/pgpu", GONE, "gpu-limit"),
    (LOADER_GPU, f"{LOADED}.resources.limits.nvidia~com/pgpu", GONE, "gpu-limit"),
    (LOADER_GPU, f"{LOAD}.volumeMounts[0]", GONE, "kernel-log", f"{LOAD}.volumeMounts"),
    (BROKER, f"{RUN}.image", "keyturn-broker:1", "image-digest"),
    (BROKER, f"{RUN}.readinessProbe", GONE, "probe"),
    (BROKER, f"{RUN}.livenessProbe", {"grpc": {"port": 8443}}, "probe-grpc", f"{RUN}.livenessProbe.grpc"),
    (BROKER, f"{RUN}.resources.limits", GONE, "memory-limit", f"{RUN}.resources.limits.memory"),
    (BROKER, f"{POD}.volumes[0].secret.defaultMode", GONE, "secret-mode"),
    (BROKER, f"{POD}.volumes[2].secret.defaultMode", 0o440, "secret-mode"),
    (BROKER, f"{POD}.securityContext", {"fsGroup": 1}, "secret-mode", f"{POD}.securityContext.fsGroup"),
    (BROKER, f"{POD}.terminationGracePeriodSeconds", 30, "grace-period"),
    (BROKER, f"{POD}.automountServiceAccountToken", True, "service-account-token"),
]


def shown(path: str) -> str:
    """A path as findings have it."""
    for key in ("nvidia.com/gpu", "nvidia.com/pgpu"):
        path = path.replace("." + key.replace(".", "~"), f'["{key}"]')
    return path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda row: f"{row[0]}-{row[3]}-{row[1]}")
def test_every_mutation_is_found_where_it_is(mutation: tuple[Any, ...]) -> None:
    name, path, value, rule, *at = mutation
    objects = load(name)
    change(objects, path, value)
    assert lint(objects) == {(shown(at[0] if at else path), rule)}


# --- initdata and the configuration in it -----------------------------------------------------------------------------

RECONFIGURED: list[tuple[str, tuple[tuple[str, str], ...], set[tuple[str, str]]]] = [
    (ENTRYPOINT, (('attester = "coco"', 'attester = "tdx"'),), {(ANNOTATED, "attester")}),
    (ENTRYPOINT, (('attester = "coco"', 'attester = "snp"'),), set()),
    (ENTRYPOINT, (("schema", "scheme"),), {(ANNOTATED, "configuration")}),
    (ENTRYPOINT, (("ready_timeout_s = 1500", "ready_timeout_s = 1801"),), {
        (f"{RUN}.startupProbe.failureThreshold", "startup-window"),
    }),
    (ENTRYPOINT, (("count = 0", "count = 1"),), {
        (f"{POD}.runtimeClassName", "gpu-class"), (f'{RUN}.resources.limits["nvidia.com/pgpu"]', "gpu-limit"),
        (f"{RUN}.volumeMounts", "kernel-log"), (f"{RUN}.securityContext.capabilities.add", "capabilities"),
    }),
    (GPU, (("count = 1", "count = 0"),), {(f'{RUN}.resources.limits["nvidia.com/pgpu"]', "gpu-limit")}),
    (LOADER, (('directory = "/run/model"', 'directory = "/run/models"'),), {(f"{LOAD}.command[3]", "out")}),
    (LOADER, (('directory = "/run/model"', ""), ('"directory"', '"tmpfs"')), {(LOAD, "mode")}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "expected"), RECONFIGURED)
def test_manifest_and_configuration_must_agree(
    name: str, changes: tuple[tuple[str, str], ...], expected: set[tuple[str, str]]
) -> None:
    objects = load(name)
    reconfigure(objects, *changes)
    assert lint(objects) == expected


def test_a_mode_in_the_place_of_the_other_is_found() -> None:
    entrypoint, loader = load(ENTRYPOINT), load(LOADER)
    pod = entrypoint["Deployment"]["spec"]["template"]["spec"]
    pod["initContainers"] = [pod["containers"][0]]
    assert (f"{LOAD}", "mode") in lint(entrypoint)
    pod = loader["Deployment"]["spec"]["template"]["spec"]
    pod["containers"].append(pod.pop("initContainers")[0])
    assert (f"{POD}.containers[1]", "mode") in lint(loader)
    served_by_another = load(ENTRYPOINT)
    launch(served_by_another, unpack_gzip(base64.b64decode(annotation_of(load(LOADER)))))
    assert lint(served_by_another) == {(RUN, "mode")}


def annotation_of(objects: type_of_objects) -> str:
    text = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"][ANNOTATION]
    assert isinstance(text, str)
    return text


def broken(name: str, value: object) -> list[Finding]:
    objects = load(name)
    del objects["ConfigMap"]
    change(objects, "spec.template.metadata.annotations", {} if value is GONE else {ANNOTATION: value})
    documents = [Setting(each) for each in objects.values()]
    (pod,) = pods(documents)
    findings, launched = lint_pod(pod, documents, None)
    assert launched is None
    return findings


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (GONE, InitdataProblem.GZIP),
        ("", InitdataProblem.GZIP),
        ("not base64!", None),
        (7, InitdataProblem.GZIP),
        (base64.b64encode(b"version").decode(), InitdataProblem.GZIP),
        (base64.b64encode(gzip.compress(b"[", mtime=0)).decode(), InitdataProblem.NOT_TOML),
        (base64.b64encode(gzip.compress(b"a", mtime=0) + gzip.compress(b"b", mtime=0)).decode(), InitdataProblem.GZIP),
        (base64.b64encode(gzip.compress(bytes(5 << 20), mtime=0)).decode(), InitdataProblem.TOO_LARGE),
        (base64.b64encode(bytes(2 << 20)).decode(), InitdataProblem.LENGTH),
        (
            base64.b64encode(gzip.compress(b'version = "0.1.0"\nalgorithm = "md5"\n[data]', mtime=0)).decode(),
            InitdataProblem.ALGORITHM,
        ),
    ],
)
def test_an_annotation_that_no_guest_reads_is_found_with_its_reason(value: object, problem: InitdataProblem | None) -> None:
    (finding,) = broken(ENTRYPOINT, value)
    assert (finding.path, finding.rule) == (ANNOTATED, Rule.INITDATA)
    assert getattr(finding.error, "problem", None) is problem


def test_a_document_without_our_entry_is_no_configuration() -> None:
    objects = load(ENTRYPOINT)
    launch(objects, pack_document({"aa.toml": ""}, "sha256"))
    assert lint(objects) == {(ANNOTATED, "configuration")}


def test_what_is_wrong_with_a_configuration_is_said_without_its_values() -> None:
    objects = load(ENTRYPOINT)
    reconfigure(objects, ("port = 8000", 'port = "hunter2"'))
    documents = [Setting(value) for value in objects.values()]
    (pod,) = pods(documents)
    (finding,) = lint_pod(pod, documents, None)[0]
    assert getattr(finding.error, "problem", None) is ConfigProblem.WRONG_TYPE
    assert "server.port" in finding.line()
    assert "hunter2" not in finding.line() + str(finding.to_record())


# --- rules with a choice ----------------------------------------------------------------------------------------------


def test_a_token_is_shut_out_by_the_account_too_and_let_in_by_a_projection() -> None:
    objects = load(ENTRYPOINT)
    change(objects, f"{POD}.automountServiceAccountToken", GONE)
    assert lint(objects) == set()
    change(objects, "ServiceAccount:automountServiceAccountToken", GONE)
    assert lint(objects) == {(f"{POD}.automountServiceAccountToken", "service-account-token")}
    objects = load(ENTRYPOINT)
    change(objects, f"{POD}.volumes[1]", {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}})
    assert lint(objects) == {(f"{POD}.volumes[1].projected.sources[0].serviceAccountToken", "service-account-token")}


def test_a_model_of_known_size_must_fit_beside_scratch_and_headroom() -> None:
    scratch_and_headroom = (4096 + 64) << 20
    assert lint(load(ENTRYPOINT), 48 * GIB - scratch_and_headroom) == set()
    assert lint(load(ENTRYPOINT), 48 * GIB - scratch_and_headroom + 1) == {(f"{RUN}.resources.limits.memory", "memory")}


def test_a_given_folder_has_half_of_the_guest() -> None:
    assert lint(load(LOADER), 32 * GIB) == set()
    assert lint(load(LOADER), 32 * GIB + 1) == {(f"{LOADED}.resources.limits.memory", "memory")}
    objects = load(LOADER)
    change(objects, f"{LOADED}.resources.limits.memory", "30Gi")  # the guest is as large as its init container needs
    assert lint(objects) == set()
    change(objects, f"{LOAD}.resources.limits.memory", "30Gi")
    assert lint(objects) == {(f"{LOADED}.resources.limits.memory", "memory")}


def test_capabilities_in_their_other_spellings_and_where_nothing_is_dropped() -> None:
    objects = load(ENTRYPOINT)
    at = f"{RUN}.securityContext.capabilities"
    for value in (
        {"add": ["ALL"], "drop": ["ALL"]},
        {"add": ["CAP_SYS_ADMIN", "ipc_lock"]},  # a runtime gives the others
        {"add": ["SYS_ADMIN", "IPC_LOCK"], "drop": ["NET_RAW"]},
    ):
        change(objects, at, value)
        assert lint(objects) == set()
    change(objects, at, {"add": ["SYS_ADMIN", "IPC_LOCK"], "drop": ["SETUID"]})
    assert lint(objects) == {(f"{at}.add", "capabilities")}
    reconfigure(objects, ('destination = "tmpfs"', 'destination = "memfd"'))
    change(objects, at, {"add": ["IPC_LOCK"]})
    assert lint(objects) == set()


def test_a_root_for_reading_only_is_enough_where_run_is_another_file_system() -> None:
    objects = load(ENTRYPOINT)
    change(objects, f"{RUN}.securityContext.readOnlyRootFilesystem", True)
    change(objects, f"{RUN}.volumeMounts[1]", {"name": "run", "mountPath": "/run"})
    assert lint(objects) == set()
    objects = load(LOADER)
    change(objects, f"{LOAD}.securityContext.readOnlyRootFilesystem", True)
    change(objects, f"{LOADED}.securityContext.readOnlyRootFilesystem", True)
    assert lint(objects) == set()


def test_the_user_of_the_pod_stands_in_for_that_of_a_container() -> None:
    objects = load(LOADER)
    change(objects, f"{LOADED}.securityContext.runAsUser", GONE)
    assert lint(objects) == set()  # runAsNonRoot is its own
    change(objects, f"{LOADED}.securityContext.runAsNonRoot", GONE)
    assert lint(objects) == {(f"{LOADED}.securityContext.runAsUser", "root")}
    change(objects, f"{POD}.securityContext.runAsUser", 1000)
    assert lint(objects) == set()  # and the agent's own is 0


def test_words_after_the_dashes_are_the_servers() -> None:
    objects = load(LOADER)
    command = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["command"]
    command.append("--dir=/elsewhere")
    assert lint(objects) == set()
    command.remove("--initdata=/etc/keyturn/initdata.toml")
    command.append("--initdata=/etc/keyturn/initdata.toml")
    assert lint(objects) == {(f"{LOADED}.command", "config-source")}


def test_a_runtime_class_or_annotation_that_the_pod_itself_does_not_have_is_none() -> None:
    objects = load(ENTRYPOINT)
    deployment = objects["Deployment"]
    deployment["spec"]["runtimeClassName"] = deployment["spec"]["template"]["spec"].pop("runtimeClassName")
    assert lint(objects) == {(f"{POD}.runtimeClassName", "runtime-class")}
    objects = load(ENTRYPOINT)
    deployment = objects["Deployment"]
    deployment["metadata"]["annotations"] = deployment["spec"]["template"]["metadata"].pop("annotations")
    assert lint(objects) == {(ANNOTATED, "initdata")}  # which says whether CoCo is asked at all


def test_an_annotation_that_was_wrapped_is_found() -> None:
    text = annotation_of(load(ENTRYPOINT))
    assert broken(ENTRYPOINT, text[:76] + "\n" + text[76:])[0].rule is Rule.INITDATA


def test_a_document_with_other_line_ends_is_another() -> None:
    objects = load(ENTRYPOINT)
    data = objects["ConfigMap"]["data"]
    data["initdata.toml"] = data["initdata.toml"].replace("\n", "\r\n")
    assert lint(objects) == {('data["initdata.toml"]', "other-document")}


def test_the_classes_of_both_runtimes_are_known() -> None:
    for manifest, names in (
        (ENTRYPOINT, ("kata-qemu-tdx", "kata-qemu-snp-runtime-rs", "kata-qemu-tdx-runtime-rs")),
        (GPU, ("kata-qemu-nvidia-gpu-snp", "kata-qemu-nvidia-gpu-snp-runtime-rs", "kata-qemu-nvidia-gpu-tdx-runtime-rs")),
    ):
        for name in names:
            objects = load(manifest)
            change(objects, f"{POD}.runtimeClassName", name)
            assert lint(objects) == set()


def test_a_class_without_gpus_has_none_and_takes_parameters() -> None:
    objects = load(LOADER_GPU)
    change(objects, f"{POD}.runtimeClassName", "kata-qemu-snp")
    assert lint(objects) == {(f"{POD}.runtimeClassName", "gpu-class"), (PARAMETERS, "rest-api")}


def test_every_rule_is_reached_by_a_test_here_or_of_the_command_or_of_kserves_pods() -> None:
    reached = {row[3] for row in MUTATIONS} | {rule for row in RECONFIGURED for _, rule in row[2]}
    assert {rule.id for rule in Rule} - reached == {"yaml", "no-pod", "initdata", "asked"}
    assert len({rule.id for rule in Rule}) == len(Rule)
    assert OWNER is Owner.OPERATOR


def maps_in(value: object) -> list[tuple[type_of_objects, str]]:
    """Every setting below `value`: the map that it stands in, and its key."""
    found = [(value, key) for key in value] if isinstance(value, dict) else []
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += maps_in(child)
    return found


@pytest.mark.parametrize("name", [ENTRYPOINT, LOADER_GPU, BROKER])
def test_no_hole_in_a_manifest_makes_the_check_fail(name: str) -> None:
    for index in range(len(maps_in(load(name)))):
        holes: tuple[object, ...] = (None, [], {}, "", -1)
        for hole in holes:
            objects = load(name)
            holder, key = maps_in(objects)[index]
            holder[key] = hole
            lint(objects)
