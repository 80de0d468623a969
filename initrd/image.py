"""The container image as an OCI image layout, made without a daemon: layers, config, manifest, and the SBOM that refers to it.

Owns the JSON and the tar of the image; does not know what lies in a layer or who compresses it. Every list is sorted and every
time is one constant, so the same folders give the same bytes. Follows the OCI image-spec 1.1: image-layout.md, config.md,
manifest.md ("Guidelines for Artifact Usage" for the SBOM).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"  # not zstd: containerd before 1.5 and registries' scanners lack it
_EMPTY = "application/vnd.oci.empty.v1+json"
_SBOM = "application/vnd.cyclonedx+json"
_LABELS = "org.opencontainers.image."


@dataclass(frozen=True, slots=True)
class Image:
    """What was written.

    Attributes:
        digest: of the manifest, `sha256:…`: what a Dockerfile or a pod names.
        layer_bytes: of all layers, compressed.
    """

    digest: str
    layer_bytes: int


def write_layout(
    out: Path,
    layers: Sequence[tuple[str, Path]],
    *,
    entrypoint: Sequence[str],
    path: str,
    labels: Mapping[str, str],
    sbom: bytes,
    epoch: int,
    compress: Callable[[bytes], bytes],
) -> Image:
    """Write the layout.

    Args:
        out: the folder, which is not there yet.
        layers: of each, from the lowest, what it is and the folder whose content is its root.
        entrypoint: the program and its first words.
        path: PATH, the only variable.
        labels: without `org.opencontainers.image.`; `version` names the image in the index.
        sbom: CycloneDX, JSON.
        epoch: the time of everything, in Unix seconds.
        compress: gzip that gives the same bytes everywhere.
    """
    blobs = out / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(media_type: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    created = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    names = {_LABELS + name: text for name, text in labels.items()}
    tars = [tar_of(folder, epoch) for _, folder in layers]
    packed = [compress(tar) for tar in tars]
    config = {
        "created": created,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": "0:0",  # a tmpfs of its own, the server's user, the ready state of GPUs; the server gets another
            "Env": [f"PATH={path}"],
            "Entrypoint": list(entrypoint),
            "WorkingDir": "/",
            "Labels": names,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]},
        "history": [{"created": created, "created_by": what} for what, _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": put(_CONFIG, _json(config)),
        "layers": [put(_LAYER, layer) for layer in packed],
        "annotations": names | {f"{_LABELS}created": created},
    }
    described = put(_MANIFEST, _json(manifest))
    about = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _SBOM,
        "config": put(_EMPTY, b"{}"),
        "layers": [put(_SBOM, sbom)],
        "subject": described,
        "annotations": {f"{_LABELS}created": created},
    }
    index = {
        "schemaVersion": 2,
        "mediaType": _INDEX,
        "manifests": [
            described
            | {
                "annotations": {f"{_LABELS}ref.name": labels["version"]},
                "platform": {"architecture": "amd64", "os": "linux"},
            },
            put(_MANIFEST, _json(about)) | {"artifactType": _SBOM},
        ],
    }
    (out / "index.json").write_bytes(_json(index))
    (out / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return Image(str(described["digest"]), sum(map(len, packed)))


def tar_of(folder: Path, epoch: int) -> bytes:
    """The content of `folder`, everybody's root; modes are the files' own."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):  # by its parts: a folder's content follows it
            entry = tar.gettarinfo(path, str(path.relative_to(folder)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = epoch
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    return stream.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
