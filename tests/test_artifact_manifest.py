"""Manifest, config blob and index: what is accepted, and that everything else is one named error."""

import dataclasses
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from agent.artifact import manifest as m
from agent.artifact.stream import MAX_PLAINTEXT_BYTES
from agent.closed import Ident
from agent.errors import ArtifactError, MalformedHeaderError, MalformedManifestError, ManifestDigestError, ManifestTooLargeError

HEADER = b"\x28" + bytes(39)


def sealed(path: str, size: int = 10, version: int = 1) -> m.SealedFile:
    return m.SealedFile(path, size, m.digest_of(path.encode()), version, HEADER)


CONFIG = m.ModelConfig(
    Ident("llama"),
    3,
    Ident("kbs:///default/model/llama"),
    bytes(range(32)),
    (sealed("config.json", 0, 2), sealed("w/é.gguf", 1 << 40)),
)
CONFIG_BYTES = m.pack_config(CONFIG)
MANIFEST_BYTES = m.pack_manifest(CONFIG)
MANIFEST = m.parse_manifest(MANIFEST_BYTES, m.digest_of(MANIFEST_BYTES))


def manifest_for(config_bytes: bytes) -> m.Manifest:
    """The manifest, pointing at another config blob."""
    return dataclasses.replace(MANIFEST, config_digest=m.digest_of(config_bytes), config_bytes=len(config_bytes))


def parse_changed_manifest(change: Any) -> m.Manifest:
    document = json.loads(MANIFEST_BYTES)
    change(document)
    data = json.dumps(document).encode()
    return m.parse_manifest(data, m.digest_of(data))


def parse_changed_config(change: Any) -> m.ModelConfig:
    document = json.loads(CONFIG_BYTES)
    change(document)
    data = rfc8785.dumps(document)
    return m.parse_config(data, manifest_for(data))


def field_of(error: pytest.ExceptionInfo[MalformedManifestError]) -> str:
    return error.value.field


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_model_reads_back_as_it_was_written() -> None:
    assert m.parse_config(CONFIG_BYTES, MANIFEST) == CONFIG
    assert CONFIG.total_plaintext_bytes == 1 << 40


def test_the_documents_are_canonical_json() -> None:
    assert rfc8785.dumps(json.loads(CONFIG_BYTES)) == CONFIG_BYTES
    assert rfc8785.dumps(json.loads(MANIFEST_BYTES)) == MANIFEST_BYTES


def test_the_manifest_is_the_one_image_spec_describes() -> None:
    document = json.loads(MANIFEST_BYTES)
    assert document["schemaVersion"] == 2
    assert document["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert document["artifactType"] == "application/vnd.keyturn.model.v1"
    assert document["config"] == {"mediaType": m.CONFIG_TYPE, "digest": m.digest_of(CONFIG_BYTES), "size": len(CONFIG_BYTES)}
    assert document["layers"][0] == {
        "mediaType": "application/vnd.keyturn.model.file.v1+aes256-gcm-hkdf-1mb",
        "digest": m.digest_of(b"config.json"),
        "size": 56,
        "annotations": {"org.opencontainers.image.title": "config.json"},
    }


def test_what_image_spec_allows_beside_is_tolerated() -> None:
    def add(document: dict[str, Any]) -> None:
        document["annotations"]["org.example"] = "x"
        document["subject"] = {"mediaType": "a/b", "digest": "sha256:" + "0" * 64, "size": 1}
        document["layers"][0]["annotations"]["org.example"] = "y"
        document["layers"][1]["urls"] = ["https://example.com"]
        document["x-unknown"] = [1, {"a": None}]

    assert parse_changed_manifest(add).layers == MANIFEST.layers


def test_the_most_files_with_the_longest_rows_fit_into_both_documents() -> None:
    longest = m.SealedFile('"' * m.MAX_PATH_BYTES, MAX_PLAINTEXT_BYTES, m.digest_of(b""), m.MAX_VERSION, HEADER)
    sizes = []
    for files in (1, 2):
        uri = Ident("kbs:///" + "u" * (128 - len("kbs:///")))
        model = m.ModelConfig(Ident("m" * 64), m.MAX_VERSION, uri, bytes(32), (longest,) * files)
        sizes.append((len(m.pack_config(model)), len(m.pack_manifest(model))))
    for one, two, bound in zip(*sizes, (m.MAX_CONFIG_BYTES, m.MAX_MANIFEST_BYTES), strict=True):
        row = two - one
        assert one + row * (m.MAX_FILES - 1) <= bound
    assert sizes[0][0] + (sizes[1][0] - sizes[0][0]) * (m.MAX_FILES - 1) == 127_400_371, "FORMAT.md says this number"


def test_a_manifest_that_no_registry_takes_is_refused() -> None:
    m.check_for_registry(4 << 20, 15_000)
    with pytest.raises(ManifestTooLargeError) as caught:
        m.check_for_registry((4 << 20) + 1, 15_000)
    assert "about 14999 files" in str(caught.value)


# --- the manifest is authenticated before it is parsed ----------------------------------------------------------------


@pytest.mark.parametrize("data", [MANIFEST_BYTES + b" ", b"", b"{", b"[" * 100_000])
def test_bytes_with_another_digest_are_not_parsed(data: bytes) -> None:
    with pytest.raises(ManifestDigestError):
        m.parse_manifest(data, MANIFEST.digest)


@pytest.mark.parametrize(
    "expected", ["", MANIFEST.digest.upper(), MANIFEST.digest.removeprefix("sha256:"), MANIFEST.digest[:-1]]
)
def test_an_expected_digest_in_any_other_form_never_matches(expected: str) -> None:
    with pytest.raises(ManifestDigestError):
        m.parse_manifest(MANIFEST_BYTES, expected)


def test_a_manifest_above_128_mib_is_refused() -> None:
    data = MANIFEST_BYTES + b" " * (128 << 20)
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_manifest(data, m.digest_of(data))
    assert field_of(caught) == "manifest.bytes"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b'{"x":' + b"[" * 100_000, b'"' + b"a" * 1000])
def test_bytes_that_are_no_manifest_are_malformed_though_their_digest_is_right(data: bytes) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_manifest(data, m.digest_of(data))
    assert field_of(caught) == "manifest"


MANIFEST_DEFECTS: list[tuple[str, Any]] = [
    ("schemaVersion", lambda d: d.update(schemaVersion=1)),
    ("mediaType", lambda d: d.update(mediaType="application/vnd.oci.image.index.v1+json")),
    ("manifest", lambda d: d.pop("mediaType")),
    ("artifactType", lambda d: d.update(artifactType="application/vnd.keyturn.model.v2")),
    ("manifest", lambda d: d.pop("artifactType")),
    ("manifest", lambda d: d.pop("config")),
    ("config.mediaType", lambda d: d["config"].update(mediaType="application/vnd.oci.empty.v1+json")),
    ("config.digest", lambda d: d["config"].update(digest="sha256:../../../etc/shadow")),
    ("config.digest", lambda d: d["config"].update(digest="sha512:" + "0" * 128)),
    ("config.digest", lambda d: d["config"].update(digest=d["config"]["digest"] + "\n")),
    ("config.size", lambda d: d["config"].update(size=(128 << 20) + 1)),
    ("config.size", lambda d: d["config"].update(size=0)),
    ("config.size", lambda d: d["config"].update(size=-1)),
    ("manifest", lambda d: d["config"].update(size="1")),
    ("layers", lambda d: d.update(layers=[])),
    ("layers", lambda d: d.update(layers=[d["layers"][0]] * 100_001)),
    ("layers[1].mediaType", lambda d: d["layers"][1].update(mediaType="application/octet-stream")),
    ("layers[0].digest", lambda d: d["layers"][0].update(digest="sha256:" + "A" * 64)),
    ("layers[0].annotations", lambda d: d["layers"][0].pop("annotations")),
    ("manifest", lambda d: d["layers"][0].update(annotations={m.TITLE: 1})),
]


@pytest.mark.parametrize(("field", "change"), MANIFEST_DEFECTS)
def test_a_manifest_with_one_defect_is_refused_at_that_field(field: str, change: Any) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        parse_changed_manifest(change)
    assert field_of(caught) == field


# --- the config blob --------------------------------------------------------------------------------------------------


def test_a_config_blob_with_another_digest_is_refused() -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_config(CONFIG_BYTES.replace(b"llama", b"LLAMA"), MANIFEST)
    assert field_of(caught) == "config.digest"


def test_a_config_blob_with_another_size_is_refused() -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_config(CONFIG_BYTES, dataclasses.replace(MANIFEST, config_bytes=len(CONFIG_BYTES) - 1))
    assert field_of(caught) == "config.size"


@pytest.mark.parametrize(
    "data",
    [
        CONFIG_BYTES + b"\n",
        CONFIG_BYTES.replace(b'"version":3', b'"version":3.0'),
        CONFIG_BYTES.replace(b'"version":3', b'"version":2,"version":3'),
        CONFIG_BYTES.replace("é".encode(), b"\\u00e9"),
        json.dumps(json.loads(CONFIG_BYTES)).encode(),
    ],
)
def test_a_config_blob_in_any_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_config(data, manifest_for(data))
    assert field_of(caught) in ("config.canonical", "config")


def first_file(**changes: object) -> Any:
    return lambda d: d["files"][0].update(changes)


CONFIG_DEFECTS: list[tuple[str, Any]] = [
    ("schema", lambda d: d.update(schema="keyturn/v2/model")),
    ("config", lambda d: d.update(extra=1)),
    ("config", lambda d: d.pop("key_commitment")),
    ("model_name", lambda d: d.update(model_name="")),
    ("model_name", lambda d: d.update(model_name="a/b")),
    ("model_name", lambda d: d.update(model_name="-a")),
    ("model_name", lambda d: d.update(model_name="a" * 65)),
    ("model_name", lambda d: d.update(model_name="a\n")),
    ("version", lambda d: d.update(version=0)),
    ("version", lambda d: d.update(version=-1)),
    ("config", lambda d: d.update(version="3")),
    ("key_uri", lambda d: d.update(key_uri="kbs://host/default/model/llama")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model/../llama")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model/.llama")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model/llama?x")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model/llama\n")),
    ("key_uri", lambda d: d.update(key_uri="https:///default/model/llama")),
    ("key_uri", lambda d: d.update(key_uri="kbs:///default/model/" + "a" * 128)),
    ("key_commitment", lambda d: d.update(key_commitment="00" * 31)),
    ("key_commitment", lambda d: d.update(key_commitment="AA" * 32)),
    ("files", lambda d: d.update(files=[])),
    ("files", lambda d: d.update(files=[d["files"][0]] * 100_001)),
    ("config", first_file(extra=1)),
    ("files[0].size", first_file(size=-1)),
    ("files[0].size", first_file(size=MAX_PLAINTEXT_BYTES + 1)),
    ("files[0].blob_digest", first_file(blob_digest="sha256:00")),
    ("files[0].sealed_version", first_file(sealed_version=0)),
    ("files[0].sealed_version", first_file(sealed_version=4)),
    ("files[0].header", first_file(header="28" + "00" * 38)),
    ("files[0].header", first_file(header="28" + "0G" * 39)),
    ("layers", lambda d: d["files"].pop()),
    ("layers[0]", first_file(path="a.json")),
    ("layers[0]", first_file(size=1)),
    ("layers[0]", first_file(blob_digest=m.digest_of(b"other"))),
    ("files[1].path", lambda d: d["files"].reverse()),
    ("files[0].path", first_file(path="../config.json")),
]


@pytest.mark.parametrize(("field", "change"), CONFIG_DEFECTS)
def test_a_config_blob_with_one_defect_is_refused_at_that_field(field: str, change: Any) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        parse_changed_config(change)
    assert field_of(caught) == field


def test_a_foreign_stream_header_in_the_file_table_is_refused() -> None:
    with pytest.raises(MalformedHeaderError) as caught:
        parse_changed_config(lambda d: d["files"][1].update(header="29" + "00" * 39))
    assert caught.value.file == 1


def test_a_file_dropped_from_the_layers_is_found() -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_config(CONFIG_BYTES, dataclasses.replace(MANIFEST, layers=MANIFEST.layers[:1]))
    assert field_of(caught) == "layers"


def test_a_size_that_differs_between_layer_and_table_is_found() -> None:
    first, second = MANIFEST.layers
    shorter = dataclasses.replace(second, ciphertext_bytes=second.ciphertext_bytes - 1)
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_config(CONFIG_BYTES, dataclasses.replace(MANIFEST, layers=(first, shorter)))
    assert field_of(caught) == "layers[1]"


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "a b.gguf",
        ".gitattributes",
        "...",
        "a/b/c",
        "é",
        "模型/权重.safetensors",
        "-",
        "a" * 255,
        "/".join(["a" * 127] * 4),
    ],
)
def test_a_clean_path_is_accepted(path: str) -> None:
    m.check_paths([path])


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/./b",
        "a/../b",
        "../a",
        "a\\b",
        "a\x00",
        "a\nb",
        "a\x7f",
        "a\x85",
        "a\u00a0b",
        "a\u200bb",
        "a\u202eb",
        "a\u2028b",
        "\ud800",
        "\ufeffa",
        "\ue000",
        "e\u0301",
        "a" * 256,
        "é" * 128,
        "/".join(["a" * 128] * 4),
    ],
)
def test_a_path_that_is_not_clean_is_refused(path: str) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.check_paths([path])
    assert field_of(caught) == "files[0].path"


def test_folders_are_counted() -> None:
    """Each once, however many files are in it; 250 above every file here."""
    paths = [f"{i:03}{'/b' * 249}/{name}" for i in range(m.MAX_FOLDERS // 250) for name in "fg"]
    m.check_paths(paths)
    m.check_paths([*paths, "file"])
    with pytest.raises(MalformedManifestError) as caught:
        m.check_paths([*paths, "one/more"])
    assert field_of(caught) == "folders"


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"],
        ["b", "a"],
        ["A", "a"],
        ["a", "a/b"],
        ["A", "a/b"],
        ["A/x", "a/y"],
        ["A/x", "a"],
        ["stra\u00dfe", "strasse"][::-1],
        ["\u00c9", "\u00e9"],
    ],
)
def test_paths_that_cannot_lie_side_by_side_are_refused(paths: list[str]) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.check_paths(paths)
    assert field_of(caught) == "files[1].path"


def test_files_of_one_folder_are_no_collision() -> None:
    m.check_paths(["a.b", "a/b", "a/c/d", "a/c/e", "ab"])


# --- index ------------------------------------------------------------------------------------------------------------


def test_an_index_grows_by_one_and_keeps_what_it_held() -> None:
    foreign = {
        "mediaType": m.MANIFEST_TYPE,
        "digest": "sha256:" + "0" * 64,
        "size": 1,
        "artifactType": "x/y",
        "platform": {"os": "linux"},
    }
    before = json.dumps({"schemaVersion": 2, "manifests": [foreign], "annotations": {"a": "b"}}).encode()
    after = m.add_to_index(before, MANIFEST_BYTES, "llama-v3")
    assert m.parse_index(before) == ()
    assert m.parse_index(after) == (m.IndexEntry(MANIFEST.digest, "llama-v3"),)
    assert json.loads(after)["manifests"][0] == foreign
    assert json.loads(after)["annotations"] == {"a": "b"}


def test_a_new_index_names_its_manifest() -> None:
    index = json.loads(m.add_to_index(None, MANIFEST_BYTES, "llama-v3"))
    assert index == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": m.MANIFEST_TYPE,
                "digest": MANIFEST.digest,
                "size": len(MANIFEST_BYTES),
                "artifactType": m.ARTIFACT_TYPE,
                "annotations": {"org.opencontainers.image.ref.name": "llama-v3"},
            }
        ],
    }


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("index", b""),
        ("index", b'{"schemaVersion":2}'),
        ("index.schemaVersion", b'{"schemaVersion":1,"manifests":[]}'),
        ("index.bytes", b" " * ((4 << 20) + 1)),
        ("index", b'{"schemaVersion":2,"manifests":[],"foreign":"\xff"}'),
        ("index", b'{"schemaVersion":2,"manifests":[],"foreign":1e999}'),
        (
            "index.digest",
            b'{"schemaVersion":2,"manifests":[{"mediaType":"%b","digest":"../x","size":1}]}' % m.MANIFEST_TYPE.encode(),
        ),
    ],
)
def test_an_index_with_a_defect_is_refused(field: str, data: bytes) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        m.parse_index(data)
    assert field_of(caught) == field


# --- fuzz -------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=8,
)


def paths_into(document: object) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = [()]
    if isinstance(document, dict):
        found += [(key, *rest) for key, value in document.items() for rest in paths_into(value)]
    if isinstance(document, list):
        found += [(i, *rest) for i, value in enumerate(document) for rest in paths_into(value)]
    return found


def replaced(document: bytes, where: int, value: object) -> bytes:
    """The document with one of its values, whichever `where` picks, replaced."""
    parsed = json.loads(document)
    paths = paths_into(parsed)
    path = paths[where % len(paths)]
    if not path:
        return json.dumps(value).encode()
    target = parsed
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return json.dumps(parsed, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(st.integers(0, 1000), json_values)
def test_a_manifest_with_any_value_replaced_parses_or_is_our_error(where: int, value: object) -> None:
    data = replaced(MANIFEST_BYTES, where, value)
    try:
        m.parse_config(CONFIG_BYTES, m.parse_manifest(data, m.digest_of(data)))
    except ArtifactError as error:
        str(error)


@given(st.integers(0, 1000), json_values)
@example(4, "\ud800")
def test_a_config_with_any_value_replaced_packs_back_or_is_our_error(where: int, value: object) -> None:
    data = replaced(CONFIG_BYTES, where, value)
    try:
        config = m.parse_config(data, manifest_for(data))
    except ArtifactError as error:
        str(error)
    else:
        assert m.pack_config(config) == data


@given(st.binary(max_size=300) | st.integers(0, len(CONFIG_BYTES)).map(lambda n: CONFIG_BYTES[:n]))
def test_any_bytes_are_our_error_in_every_parser(data: bytes) -> None:
    for parse in (
        lambda: m.parse_manifest(data, m.digest_of(data)),
        lambda: m.parse_index(data),
        lambda: m.parse_config(data, manifest_for(data)),
    ):
        try:
            parse()
        except ArtifactError as error:
            str(error)


@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_paths_are_accepted_or_our_error(paths: list[str]) -> None:
    try:
        m.check_paths(paths)
    except MalformedManifestError as error:
        assert error.field.startswith("files[")
    else:
        assert len({path.casefold() for path in paths}) == len(paths)
        assert all(not path.startswith("/") and ".." not in path.split("/") for path in paths)


@given(st.text(max_size=40), st.integers(-5, 1 << 60), st.text(max_size=60))
def test_any_identity_is_accepted_or_our_error(name: str, version: int, key_uri: str) -> None:
    try:
        m.check_identity(name, version, key_uri)
    except MalformedManifestError as error:
        assert error.field in ("model_name", "version", "key_uri")
    else:
        Ident(name), Ident(key_uri)
