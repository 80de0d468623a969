"""The JSON of a sealed model: OCI manifest, config blob with the file table, and the index of an OCI image layout.

Owns every rule about names, sizes and versions; `FORMAT.md` states them. Does not fetch anything and does not know the
key. The manifest is compared with its digest before it is parsed, the config blob with the manifest's.
"""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import msgspec

from agent.artifact.stream import HEADER_BYTES, MAX_PLAINTEXT_BYTES, StreamLayout, parse_header
from agent.closed import MAX_IDENT_CHARS, Ident
from agent.errors import MalformedManifestError, ManifestDigestError, ManifestTooLargeError

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.keyturn.model.v1"
CONFIG_TYPE = "application/vnd.keyturn.model.config.v1+json"
VOLUME_CONFIG_TYPE = "application/vnd.keyturn.volume.config.v1+json"
CONFIG_TYPES = (CONFIG_TYPE, VOLUME_CONFIG_TYPE)
SIGNATURE_TYPE = "application/vnd.keyturn.signature.v1"
FILE_TYPE = "application/vnd.keyturn.model.file.v1+aes256-gcm-hkdf-1mb"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
TITLE = "org.opencontainers.image.title"
REF_NAME = "org.opencontainers.image.ref.name"

MAX_MANIFEST_BYTES = 128 << 20
MAX_CONFIG_BYTES = 128 << 20
"""The most files with the longest paths, every character of which JSON writes as two: at most 1274 bytes a row in either."""
REGISTRY_MANIFEST_BYTES = 4 << 20
"""What registries take (distribution-spec 1.1, "Pushing Manifests"); most take no more."""
MAX_INDEX_BYTES = 4 << 20
MAX_FILES = 100_000
MAX_FOLDERS = 100_000
"""Those above all files. Each costs memory in the guest, and a path can name 255 of them."""
MAX_PATH_BYTES = 512
MAX_SEGMENT_BYTES = 255
MAX_VERSION = (1 << 53) - 1

_T = TypeVar("_T")
_SCHEMA = "keyturn/v1/model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Each part as Trustee's KBS accepts it (resource path), and never ".." since no part starts with a dot.
_KEY_URI = re.compile(r"kbs://(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){3}")


@dataclass(frozen=True, slots=True)
class Layer:
    path: str
    blob_digest: str
    ciphertext_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """An authenticated manifest. Only `parse_manifest` makes one."""

    digest: str
    config_type: str
    config_digest: str
    config_bytes: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class SealedFile:
    """One row of the file table.

    Attributes:
        path: relative, clean, bounded.
        size: plaintext bytes.
        blob_digest: `sha256:…` of the blob, its address in every store.
        sealed_version: the model version in which this blob was made.
        header: the first 40 bytes of the blob.
    """

    path: str
    size: int
    blob_digest: str
    sealed_version: int
    header: bytes

    @property
    def layout(self) -> StreamLayout:
        return StreamLayout(self.size)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a sealed model says of itself."""

    model_name: Ident
    version: int
    key_uri: Ident
    key_commitment: bytes
    files: tuple[SealedFile, ...]

    @property
    def total_plaintext_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One manifest named in `index.json`. Nothing authenticates it."""

    digest: str
    ref_name: str | None


# --- the documents as they lie in JSON --------------------------------------------------------------------------------


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    platform: dict[str, Any] | None = None


class _OciManifest(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int
    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[msgspec.Raw, ...]  # each decoded by itself: 100,000 of them at a time would take twice the memory
    annotations: dict[str, str] = {}


class _OciIndex(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int
    manifests: tuple[Descriptor, ...]


class _Typed(msgspec.Struct, frozen=True, rename="camel"):
    artifact_type: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    size: int
    blob_digest: str
    sealed_version: int
    header: str


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: str
    model_name: str
    version: int
    key_uri: str
    key_commitment: str
    files: tuple[msgspec.Raw, ...]  # `_File`s, for the same reason


def digest_of(data: bytes) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: str) -> bool:
    """Is it a digest as every document here writes them?"""
    return _DIGEST.fullmatch(text) is not None


# --- manifest ---------------------------------------------------------------------------------------------------------


def parse_manifest(manifest_bytes: bytes, expected_digest: str, config_types: Collection[str] = (CONFIG_TYPE,)) -> Manifest:
    """Authenticate, then parse a manifest.

    Args:
        manifest_bytes: the bytes as they came from a store.
        expected_digest: `sha256:…` from the measured configuration.
        config_types: media types of the config blob that will do: files in blobs, an encrypted volume.

    Raises:
        ManifestDigestError: these are not the expected bytes. Nothing was parsed.
        MalformedManifestError: they are, and break a rule of `FORMAT.md`; `field` says where.
    """
    # 1. The right bytes.
    # refusal: test_bytes_with_another_digest_are_not_parsed
    if digest_of(manifest_bytes) != expected_digest:
        raise ManifestDigestError()
    # 2. Bounded and well formed.
    # refusal: test_a_manifest_above_128_mib_is_refused
    if len(manifest_bytes) > MAX_MANIFEST_BYTES:
        raise _malformed("manifest.bytes")
    oci = decode(manifest_bytes, _OciManifest, "manifest")
    # 3. A sealed model of this format.
    # refusal: test_a_manifest_with_one_defect_is_refused_at_that_field
    require(oci.schema_version == 2, "schemaVersion")
    require(oci.media_type == MANIFEST_TYPE, "mediaType")
    require(oci.artifact_type == ARTIFACT_TYPE, "artifactType")
    require(oci.config.media_type in config_types, "config.mediaType")
    require(is_digest(oci.config.digest), "config.digest")
    require(0 < oci.config.size <= MAX_CONFIG_BYTES, "config.size")
    # 4. Its blobs. A volume has none, and so OCI's empty one. That they are the ones of the file table is checked there.
    if oci.config.media_type == VOLUME_CONFIG_TYPE:
        # refusal: test_artifact_volume_config.py::test_a_manifest_with_one_defect_is_refused_at_that_field
        require(len(oci.layers) == 1 and decode(oci.layers[0], Descriptor, "manifest").digest == digest_of(EMPTY), "layers")
        none = Layer("", digest_of(EMPTY), len(EMPTY))
        return Manifest(expected_digest, VOLUME_CONFIG_TYPE, oci.config.digest, oci.config.size, (none,))
    # refusal: test_a_manifest_with_one_defect_is_refused_at_that_field
    require(0 < len(oci.layers) <= MAX_FILES, "layers")
    layers = []
    for i, row in enumerate(oci.layers):
        layer = decode(row, Descriptor, "manifest")
        # refusal: test_a_manifest_with_one_defect_is_refused_at_that_field
        require(layer.media_type == FILE_TYPE, f"layers[{i}].mediaType")
        require(is_digest(layer.digest), f"layers[{i}].digest")
        require(TITLE in layer.annotations, f"layers[{i}].annotations")
        layers.append(Layer(layer.annotations[TITLE], layer.digest, layer.size))
    return Manifest(expected_digest, CONFIG_TYPE, oci.config.digest, oci.config.size, tuple(layers))


def pack_oci(config_type: str, config_bytes: bytes, layers: Iterable[Descriptor], model_name: Ident, version: int) -> bytes:
    """A manifest in canonical JSON, over a config blob of this media type."""
    return canonical(
        _OciManifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(config_type, digest_of(config_bytes), len(config_bytes)),
            layers=tuple(_row(layer) for layer in layers),
            annotations={TITLE: str(model_name), "org.opencontainers.image.version": str(version)},
        )
    )


def check_for_registry(manifest_bytes: int, files: int) -> None:
    """Check that registries take a manifest of this size. Raises ManifestTooLargeError."""
    # refusal: test_a_manifest_that_no_registry_takes_is_refused
    if manifest_bytes > REGISTRY_MANIFEST_BYTES:
        raise ManifestTooLargeError(files, manifest_bytes, REGISTRY_MANIFEST_BYTES)


def pack_manifest(config: ModelConfig) -> bytes:
    """The manifest of a model, in canonical JSON."""
    layers = (
        Descriptor(FILE_TYPE, file.blob_digest, file.layout.ciphertext_bytes, annotations={TITLE: file.path})
        for file in config.files
    )
    return pack_oci(CONFIG_TYPE, pack_config(config), layers, config.model_name, config.version)


# --- config blob ------------------------------------------------------------------------------------------------------


def parse_config(config_bytes: bytes, manifest: Manifest) -> ModelConfig:
    """Parse the config blob of an authenticated manifest.

    Args:
        config_bytes: the bytes as they came from a store.
        manifest: what `parse_manifest` returned.

    Raises:
        MalformedManifestError: not the manifest's config blob, or it breaks a rule of `FORMAT.md`; `field` says where.
        MalformedHeaderError: a stream header in the file table is not one.
    """
    # 1. The right bytes; their number was bounded with the manifest.
    # refusal: test_a_config_blob_with_another_size_is_refused test_a_config_blob_with_another_digest_is_refused
    require(len(config_bytes) == manifest.config_bytes, "config.size")
    require(digest_of(config_bytes) == manifest.config_digest, "config.digest")
    # 2. One way only to write it: no doubled members, no other spelling of a number or a string.
    raw = decode(config_bytes, _Config, "config")
    # refusal: test_a_config_blob_in_any_other_spelling_is_refused test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(canonical(raw) == config_bytes, "config.canonical")  # of the rows, each below
    # 3. Single values.
    require(raw.schema == _SCHEMA, "schema")
    check_identity(raw.model_name, raw.version, raw.key_uri)
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(0 < len(raw.files) <= MAX_FILES, "files")
    files = tuple(_parse_file(i, row, raw.version) for i, row in enumerate(raw.files))
    # 4. Paths among themselves.
    check_paths([file.path for file in files])
    # 5. File table and layers say the same.
    # refusal: test_a_file_dropped_from_the_layers_is_found
    require(len(files) == len(manifest.layers), "layers")
    for i, (file, layer) in enumerate(zip(files, manifest.layers, strict=True)):
        # refusal: test_a_size_that_differs_between_layer_and_table_is_found
        require(layer == Layer(file.path, file.blob_digest, file.layout.ciphertext_bytes), f"layers[{i}]")
    return ModelConfig(
        model_name=Ident(raw.model_name),
        version=raw.version,
        key_uri=Ident(raw.key_uri),
        key_commitment=unhex(raw.key_commitment, 32, "key_commitment"),
        files=files,
    )


def pack_config(config: ModelConfig) -> bytes:
    """The config blob of a model: for every accepted input the inverse of `parse_config`."""
    return canonical(
        _Config(
            schema=_SCHEMA,
            model_name=str(config.model_name),
            version=config.version,
            key_uri=str(config.key_uri),
            key_commitment=config.key_commitment.hex(),
            files=tuple(
                _row(_File(file.path, file.size, file.blob_digest, file.sealed_version, file.header.hex()))
                for file in config.files
            ),
        )
    )


def _parse_file(i: int, row: msgspec.Raw, version: int) -> SealedFile:
    raw = decode(row, _File, "config")
    # refusal: test_a_config_blob_in_any_other_spelling_is_refused test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(canonical(raw) == bytes(row), "config.canonical")
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(0 <= raw.size <= MAX_PLAINTEXT_BYTES, f"files[{i}].size")
    require(is_digest(raw.blob_digest), f"files[{i}].blob_digest")
    require(1 <= raw.sealed_version <= version, f"files[{i}].sealed_version")
    header = unhex(raw.header, HEADER_BYTES, f"files[{i}].header")
    parse_header(header, i)
    return SealedFile(raw.path, raw.size, raw.blob_digest, raw.sealed_version, header)


def check_identity(model_name: str, version: int, key_uri: str) -> None:
    """Check the three values that a sealer chooses.

    Raises:
        MalformedManifestError: `field` is `model_name`, `version` or `key_uri`.
    """
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(_NAME.fullmatch(model_name) is not None, "model_name")
    require(1 <= version <= MAX_VERSION, "version")
    require(len(key_uri) <= MAX_IDENT_CHARS and _KEY_URI.fullmatch(key_uri) is not None, "key_uri")


def check_paths(paths: Sequence[str]) -> None:
    """Check every path, and that all of them can lie in one folder on any file system.

    Args:
        paths: in the order of the file table.

    Raises:
        MalformedManifestError: `field` is `files[i].path` of the first offending path, `folders` where there are too many.
    """
    seen: set[str] = set()  # files and folders, in one letter case
    previous = b""
    before: list[str] = []  # folders of the path before
    folders = 0
    for i, path in enumerate(paths):
        field = f"files[{i}].path"
        # isprintable refuses the Unicode categories C and Z but for the space, and with them lone surrogates.
        # refusal: test_a_path_that_is_not_clean_is_refused
        require(path.isprintable() and "\\" not in path and unicodedata.is_normalized("NFC", path), field)
        encoded = path.encode()
        # refusal: test_paths_that_cannot_lie_side_by_side_are_refused test_a_path_that_is_not_clean_is_refused
        require(len(encoded) <= MAX_PATH_BYTES and encoded > previous, field)
        previous = encoded
        segments = path.split("/")
        # In this order the files of a folder follow each other, so that each name comes up once.
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, segments[:-1], strict=False)))
        before = segments[:-1]
        folders += len(before) - known
        # refusal: test_folders_are_counted
        require(folders <= MAX_FOLDERS, "folders")
        for depth, segment in enumerate(segments[known:], start=known + 1):
            # refusal: test_a_path_that_is_not_clean_is_refused
            require(segment not in ("", ".", "..") and len(segment.encode()) <= MAX_SEGMENT_BYTES, field)
            folded = unicodedata.normalize("NFC", "/".join(segments[:depth]).casefold())
            # refusal: test_paths_that_cannot_lie_side_by_side_are_refused
            require(folded not in seen, field)
            seen.add(folded)


# --- index ------------------------------------------------------------------------------------------------------------


def parse_index(index_bytes: bytes, artifact_type: str = ARTIFACT_TYPE) -> tuple[IndexEntry, ...]:
    """What an image index names of one artifact type (sealed models, signatures); everything else is passed over.

    Raises:
        MalformedManifestError: not an OCI image index, or above 4 MiB.
    """
    # refusal: test_an_index_with_a_defect_is_refused
    require(len(index_bytes) <= MAX_INDEX_BYTES, "index.bytes")
    decode(index_bytes, dict[str, Any], "index")  # `add_to_index` keeps what the next line skips without a look
    index = decode(index_bytes, _OciIndex, "index")
    # refusal: test_an_index_with_a_defect_is_refused
    require(index.schema_version == 2, "index.schemaVersion")
    entries = []
    for descriptor in index.manifests:
        # Copying tools may drop artifactType from the index: absent means perhaps, other means no.
        if descriptor.media_type == MANIFEST_TYPE and descriptor.artifact_type in (None, artifact_type):
            # refusal: test_an_index_with_a_defect_is_refused
            require(is_digest(descriptor.digest), "index.digest")
            entries.append(IndexEntry(descriptor.digest, descriptor.annotations.get(REF_NAME)))
    return tuple(entries)


def artifact_type(manifest_bytes: bytes) -> str:
    """What a manifest that nobody has authenticated says it is; empty: nothing, or it is no JSON object."""
    try:
        return msgspec.json.decode(manifest_bytes, type=_Typed).artifact_type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def choose_model(index_bytes: bytes) -> str | None:
    """The one sealed model that an image index stands for; None: it has none, or several.

    An entry that says it is a sealed model comes before those that do not say what they are; such a one counts if it is for no
    platform, because an image for one is no model.

    Raises:
        MalformedManifestError: as `parse_index`.
    """
    parse_index(index_bytes)
    found = [entry for entry in decode(index_bytes, _OciIndex, "index").manifests if entry.media_type == MANIFEST_TYPE]
    ours = {entry.digest for entry in found if entry.artifact_type == ARTIFACT_TYPE}
    unsaid = {entry.digest for entry in found if entry.artifact_type is None and entry.platform is None}
    chosen = ours or unsaid
    return chosen.pop() if len(chosen) == 1 else None


def add_to_index(
    index_bytes: bytes | None, manifest_bytes: bytes, ref_name: str | None, artifact_type: str = ARTIFACT_TYPE
) -> bytes:
    """The index with one manifest more; everything else in it stays as it is.

    Args:
        index_bytes: the index so far, accepted by `parse_index`, or None.
        manifest_bytes: the manifest to name.
        ref_name: its name, not yet in the index; None: it has none, as what is about another manifest.
        artifact_type: the manifest's.
    """
    index: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
    if index_bytes is not None:
        index = msgspec.json.decode(index_bytes)
    annotations = {} if ref_name is None else {REF_NAME: ref_name}
    descriptor = Descriptor(
        MANIFEST_TYPE, digest_of(manifest_bytes), len(manifest_bytes), artifact_type, annotations=annotations
    )
    index["manifests"] = [*index["manifests"], msgspec.to_builtins(descriptor)]
    return canonical(index)


# --- rules ------------------------------------------------------------------------------------------------------------


def decode(data: bytes | msgspec.Raw, kind: type[_T], what: str) -> _T:
    """JSON as this type. Raises MalformedManifestError: `field` is `what`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _malformed(what) from None  # msgspec quotes what it read


def canonical(value: object) -> bytes:
    """The one spelling of a document."""
    # RFC 8785 for what stands here: sorted ASCII member names, integers below 2^53, no control characters in strings.
    return msgspec.json.encode(value, order="sorted")


def _row(value: object) -> msgspec.Raw:
    return msgspec.Raw(canonical(value))


def unhex(text: str, length: int, field: str) -> bytes:
    """Exactly `length` bytes in lower-case hexadecimal digits. Raises MalformedManifestError."""
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(re.fullmatch(f"[0-9a-f]{{{2 * length}}}", text) is not None, field)
    return bytes.fromhex(text)


def require(holds: bool, field: str) -> None:
    """Raises MalformedManifestError with `field` unless it holds."""
    # refusal: test_a_file_dropped_from_the_layers_is_found
    if not holds:
        raise _malformed(field)


def _malformed(field: str) -> MalformedManifestError:
    return MalformedManifestError(field=Ident(field))
