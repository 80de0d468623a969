"""The pod that KServe makes of an InferenceService and a ClusterStorageContainer: a stand-in, after its public code.

Follows KServe of June 2026 (0217bdab): `CommonStorageInitialization` with one URI and `mergeContainerSpecs` in
`pkg/webhook/admission/pod/storage_initializer_injector.go`; `AddModelMount`, `CreateInitContainerWithConfig` and
`AddDefaultHuggingFaceEnvVars` in `pkg/utils/storage.go`; `pkg/utils/confidential.go`; and
`pkg/apis/serving/v1alpha1/storage_container_types.go`. Keys that it does not know are errors, in place of the
schemas of KServe's CRDs: that of the InferenceService has megabytes.

    python -m tests.kserve_pod RENDERED.yaml     # prints the pod, and the ConfigMaps beside it
"""

import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from agent.commands.manifests import parse_documents

MODELS = "/mnt/models"
VOLUME = "kserve-provision-location"
INITIALIZER = "storage-initializer"
SERVER = "kserve-container"
_MERGED_BY = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort", "volumeDevices": "devicePath"}
"""Lists of a container whose elements a strategic merge patch merges; the others it replaces (core/v1 `patchMergeKey`)."""
_EXTENSION = {"minReplicas", "maxReplicas", "annotations", "labels", "deploymentStrategy"}
"""Of a predictor, what is neither model nor PodSpec; those that are used here."""
_MODEL = {"runtime", "modelFormat", "storageUri", "confidential"}
"""Of a model, what is no field of a container; those that are used here."""
_HUGGING_FACE = {"HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_XET_HIGH_PERFORMANCE": "1", "HF_XET_NUM_CONCURRENT_RANGE_GETS": "8"}

Object = dict[str, Any]


def make_pod(objects: list[Object], *, configured: Object | None = None, models: str = MODELS) -> Object:
    """What the webhook lets through.

    Args:
        objects: one InferenceService, one ServingRuntime, and the ClusterStorageContainers of the cluster.
        configured: `storageInitializer` of KServe's ConfigMap, as far as it is not the default.
        models: where the model goes; KServe has no other path for one URI.

    Raises:
        ValueError: KServe, or its API server, would refuse it.
    """
    (service,) = [item for item in objects if item["kind"] == "InferenceService"]
    (runtime,) = [item for item in objects if item["kind"] == "ServingRuntime"]
    _known(service, {"apiVersion", "kind", "metadata", "spec"}, "serving.kserve.io/v1beta1")
    _known(runtime, {"apiVersion", "kind", "metadata", "spec"}, "serving.kserve.io/v1alpha1")
    _only(runtime["spec"], {"supportedModelFormats", "containers"})
    _only(service["spec"], {"predictor"})
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    _only(model.get("confidential", {}), {"enabled", "resourceId"})
    formats = [entry["name"] for entry in runtime["spec"]["supportedModelFormats"]]
    if model["runtime"] != runtime["metadata"]["name"] or model["modelFormat"]["name"] not in formats:
        raise ValueError("no runtime for this model")

    (container,) = runtime["spec"]["containers"]
    server = merged(container, {key: value for key, value in model.items() if key not in _MODEL})
    own = {key: value for key, value in predictor.items() if key not in _EXTENSION | {"model"}}
    spec: Object = deepcopy(own) | {"containers": [server]}
    annotations = service["metadata"].get("annotations", {}) | predictor.get("annotations", {})
    _inject(spec, annotations, model, objects, configured or {}, models)
    name = service["metadata"]["name"]
    labels = predictor.get("labels", {}) | {"serving.kserve.io/inferenceservice": name}
    metadata = {"name": f"{name}-predictor-0", "labels": labels, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def initializer(pod: Object) -> Object:
    """The container that is to bring the model."""
    (found,) = [container for container in pod["spec"]["initContainers"] if container["name"] == INITIALIZER]
    return dict(found)


def supports(container: Object, uri: str) -> bool:
    """`IsStorageUriSupported`, of one that is asked for init containers at all."""
    _known(container, {"apiVersion", "kind", "metadata", "spec", "disabled"}, "serving.kserve.io/v1alpha1")
    spec = container["spec"]
    _only(spec, {"container", "supportedUriFormats", "workloadType", "supportsMultiModelDownload"})
    if container.get("disabled") or spec.get("workloadType", "initContainer") != "initContainer":
        return False
    for accepted in spec["supportedUriFormats"]:
        _only(accepted, {"prefix", "regex"})
        if uri.startswith(accepted["prefix"]) if accepted.get("prefix") else re.search(accepted["regex"], uri):
            return True
    return False


def merged(base: Object, patch: Object) -> Object:
    """A container with a strategic merge patch over it."""
    result = deepcopy(base)
    for key, value in patch.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value)
        elif isinstance(old, list) and key in _MERGED_BY:
            name = _MERGED_BY[key]
            result[key] = [merged(item, next((new for new in value if new[name] == item[name]), {})) for item in old]
            result[key] += [deepcopy(new) for new in value if all(new[name] != item[name] for item in old)]
        else:
            result[key] = deepcopy(value)
    return result


def _inject(spec: Object, annotations: Object, model: Object, objects: list[Object], configured: Object, models: str) -> None:
    uri = model["storageUri"]
    found = [item for item in objects if item["kind"] == "ClusterStorageContainer" and supports(item, uri)]
    if len(found) != 1:
        raise ValueError("which ClusterStorageContainer is taken is anybody's guess")
    limits = {"cpu": configured.get("cpuLimit", "1"), "memory": configured.get("memoryLimit", "1Gi")}
    requests = {"cpu": configured.get("cpuRequest", "100m"), "memory": configured.get("memoryRequest", "100Mi")}
    container: Object = {
        "name": INITIALIZER,
        "image": configured.get("image", "kserve/storage-initializer:latest"),
        "args": [uri, models],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {"limits": limits, "requests": requests},
        "volumeMounts": [{"name": VOLUME, "mountPath": models}],
    }
    read_only = annotations.get("storage.kserve.io/readonly") != "false"
    for server in spec["containers"]:
        if server["name"] == SERVER:
            mounts = server.setdefault("volumeMounts", [])
            if all(mount["name"] != VOLUME for mount in mounts):
                mounts.append({"name": VOLUME, "mountPath": models, "readOnly": read_only})
    volumes = spec.setdefault("volumes", [])
    if all(volume["name"] != VOLUME for volume in volumes):
        volumes.append({"name": VOLUME, "emptyDir": {}})
    container = merged(container, found[0]["spec"]["container"])
    environment = container.setdefault("env", [])
    for name, value in _HUGGING_FACE.items():
        if all(item["name"] != name for item in environment):
            environment.append({"name": name, "value": value})
    confidential = model.get("confidential", {})
    if confidential.get("enabled"):
        wanted = {"CONFIDENTIAL_ENABLED": "true"}
        if confidential.get("resourceId"):
            wanted["CONFIDENTIAL_RESOURCE_ID"] = confidential["resourceId"]
        kept = [item for item in environment if item["name"] not in wanted]
        container["env"] = kept + [{"name": name, "value": value} for name, value in wanted.items()]
    spec.setdefault("initContainers", []).append(container)


def _known(item: Object, keys: set[str], version: str) -> None:
    _only(item, keys)
    if item["apiVersion"] != version:
        raise ValueError(item["apiVersion"])


def _only(item: Object, keys: set[str]) -> None:
    if unknown := item.keys() - keys:
        raise ValueError(f"unknown: {sorted(unknown)}")


def objects_in(file: Path) -> list[Object]:
    """The objects of a rendered file."""
    return [dict(document.value) for document in parse_documents(file.read_bytes()) if isinstance(document.value, dict)]


if __name__ == "__main__":
    objects = objects_in(Path(sys.argv[1]))
    beside = [item for item in objects if item["apiVersion"] == "v1"]
    sys.stdout.write("\n---\n".join(json.dumps(item) for item in [make_pod(objects), *beside]))
