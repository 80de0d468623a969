"""The manifest of an encrypted volume: what is accepted, the key and the tables that follow from it."""

import dataclasses
import json
import os
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from agent.artifact import manifest as m
from agent.artifact import volume_config as v
from agent.artifact.luks2 import Luks2Header
from agent.artifact.manifest import pack_config as pack_model
from agent.closed import Ident
from agent.errors import MalformedManifestError, ManifestDigestError, VolumeHeaderError
from tests.test_artifact_manifest import CONFIG as MODEL

UUID = "11111111-2222-4333-8444-555555555555"
CONFIG = v.VolumeConfig(
    model_name=Ident("llama"),
    version=3,
    key_uri=Ident("kbs:///default/model/llama"),
    key_commitment=bytes(range(32)),
    uuid=UUID,
    data_offset=1 << 20,
    sector_size=4096,
    data_blocks=300,
    hash_block=300,
    root_hash=bytes(range(32, 64)),
    salt=bytes(range(64, 96)),
)
CONFIG_BYTES = v.pack_config(CONFIG)
MANIFEST_BYTES = v.pack_manifest(CONFIG)
VOLUME = (m.VOLUME_CONFIG_TYPE,)
MANIFEST = m.parse_manifest(MANIFEST_BYTES, m.digest_of(MANIFEST_BYTES), VOLUME)


def field_of(change: Any, *, config: bool) -> str:
    """Where one changed document is refused; its digest is right."""
    document = json.loads(CONFIG_BYTES if config else MANIFEST_BYTES)
    change(document)
    data = rfc8785.dumps(document)
    with pytest.raises(MalformedManifestError) as caught:
        if config:
            v.parse_volume(data, dataclasses.replace(MANIFEST, config_digest=m.digest_of(data), config_bytes=len(data)))
        else:
            m.parse_manifest(data, m.digest_of(data), VOLUME)
    return caught.value.field


def test_a_volume_reads_back_as_it_was_written() -> None:
    assert v.parse_volume(CONFIG_BYTES, MANIFEST) == CONFIG
    assert v.parse_model(CONFIG_BYTES, MANIFEST) == CONFIG
    assert rfc8785.dumps(json.loads(CONFIG_BYTES)) == CONFIG_BYTES
    assert rfc8785.dumps(json.loads(MANIFEST_BYTES)) == MANIFEST_BYTES
    assert MANIFEST.layers == (m.Layer("", m.digest_of(b"{}"), 2),)


def test_a_model_in_blobs_is_still_one() -> None:
    packed = m.pack_manifest(MODEL)
    manifest = m.parse_manifest(packed, m.digest_of(packed), m.CONFIG_TYPES)
    assert v.parse_model(pack_model(MODEL), manifest) == MODEL


def test_neither_kind_passes_for_the_other() -> None:
    """What a store has does not decide what is opened."""
    packed = m.pack_manifest(MODEL)
    for data, kinds in ((MANIFEST_BYTES, (m.CONFIG_TYPE,)), (packed, VOLUME)):
        with pytest.raises(MalformedManifestError) as caught:
            m.parse_manifest(data, m.digest_of(data), kinds)
        assert caught.value.field == "config.mediaType"
    with pytest.raises(ManifestDigestError):
        m.parse_manifest(MANIFEST_BYTES, m.digest_of(packed), VOLUME)


MANIFEST_DEFECTS: list[tuple[str, Any]] = [
    ("layers", lambda d: d.update(layers=[])),
    ("layers", lambda d: d.update(layers=d["layers"] * 2)),
    ("layers", lambda d: d["layers"][0].update(digest="sha256:" + "0" * 64)),
    ("config.mediaType", lambda d: d["config"].update(mediaType="application/vnd.oci.empty.v1+json")),
    ("artifactType", lambda d: d.update(artifactType="application/vnd.keyturn.volume.v1")),
]


@pytest.mark.parametrize(("field", "change"), MANIFEST_DEFECTS)
def test_a_manifest_with_one_defect_is_refused_at_that_field(field: str, change: Any) -> None:
    assert field_of(change, config=False) == field


CONFIG_DEFECTS: list[tuple[str, Any]] = [
    ("config", lambda d: d.update(schema="keyturn/v1/model")),
    ("config", lambda d: d.pop("salt")),
    ("config", lambda d: d.update(cipher="aes-xts-plain64")),
    ("config", lambda d: d.update(data_blocks="300")),
    ("config", lambda d: d.update(data_blocks=300.5)),
    ("model_name", lambda d: d.update(model_name="../x")),
    ("version", lambda d: d.update(version=0)),
    ("key_uri", lambda d: d.update(key_uri="kbs:///a/b")),
    ("key_commitment", lambda d: d.update(key_commitment="00" * 31)),
    ("uuid", lambda d: d.update(uuid=UUID.upper().replace("1", "A"))),
    ("uuid", lambda d: d.update(uuid=UUID + "\n")),
    ("uuid", lambda d: d.update(uuid="")),
    ("data_offset", lambda d: d.update(data_offset=0)),
    ("data_offset", lambda d: d.update(data_offset=(1 << 20) + 512)),
    ("data_offset", lambda d: d.update(data_offset=28672)),
    ("data_offset", lambda d: d.update(data_offset=-4096)),
    ("data_offset", lambda d: d.update(data_offset=(1 << 40) + 4096)),
    ("sector_size", lambda d: d.update(sector_size=1024)),
    ("data_blocks", lambda d: d.update(data_blocks=1)),
    ("data_blocks", lambda d: d.update(data_blocks=(1 << 32) + 1, hash_block=1 << 33)),
    ("hash_block", lambda d: d.update(hash_block=299)),
    ("hash_block", lambda d: d.update(hash_block=(1 << 33) + 1)),
    ("root_hash", lambda d: d.update(root_hash="00" * 33)),
    ("root_hash", lambda d: d.update(root_hash="AA" * 32)),
    ("root_hash", lambda d: d.update(root_hash="00" * 31 + "0 ")),
    ("salt", lambda d: d.update(salt="-")),
    ("salt", lambda d: d.update(salt="")),
]


@pytest.mark.parametrize(("field", "change"), CONFIG_DEFECTS)
def test_a_config_blob_with_one_defect_is_refused_at_that_field(field: str, change: Any) -> None:
    assert field_of(change, config=True) == field
    for data, at in ((CONFIG_BYTES + b" ", "config.size"), (CONFIG_BYTES.replace(b"llama", b"lLama"), "config.digest")):
        with pytest.raises(MalformedManifestError) as caught:
            v.parse_volume(data, MANIFEST)
        assert caught.value.field == at
    spelled = CONFIG_BYTES.replace(b":", b": ", 1)
    with pytest.raises(MalformedManifestError) as caught:
        v.parse_volume(spelled, dataclasses.replace(MANIFEST, config_digest=m.digest_of(spelled), config_bytes=len(spelled)))
    assert caught.value.field == "config.canonical"


# --- the header -------------------------------------------------------------------------------------------------------

HEADER = Luks2Header(UUID, 1 << 20, None, 4096)


@pytest.mark.parametrize("size", [None, CONFIG.segment_bytes, 1 << 60])
def test_a_header_that_says_the_same_passes(size: int | None) -> None:
    v.check_header(dataclasses.replace(HEADER, size=size), CONFIG)


@pytest.mark.parametrize(
    ("field", "header"),
    [
        ("uuid", dataclasses.replace(HEADER, uuid=UUID.replace("1", "0"))),
        ("segments[].offset", dataclasses.replace(HEADER, offset=(1 << 20) + 4096)),
        ("segments[].sector_size", dataclasses.replace(HEADER, sector_size=512)),
        ("segments[].size", dataclasses.replace(HEADER, size=CONFIG.segment_bytes - 1)),
    ],
)
def test_a_header_that_is_not_the_manifests_is_refused(field: str, header: Luks2Header) -> None:
    with pytest.raises(VolumeHeaderError) as caught:
        v.check_header(header, CONFIG)
    assert caught.value.field == field


# --- key and tables ---------------------------------------------------------------------------------------------------


def test_the_key_of_the_disk_is_the_one_that_format_md_describes() -> None:
    out = bytearray(64)
    v.derive_key(bytes(range(32)), CONFIG.key_uri, UUID, out)
    # From RFC 5869 with hashlib alone, by another program.
    assert out.hex() == hkdf(bytes(range(32)), b"keyturn/v1/volume-key\0" + CONFIG.key_uri.encode() + b"\0" + UUID.encode())
    assert out[:32] != out[32:]


def hkdf(ikm: bytes, info: bytes) -> str:
    import hmac

    prk = hmac.digest(bytes(32), ikm, "sha256")
    first = hmac.digest(prk, info + b"\1", "sha256")
    return (first + hmac.digest(prk, first + info + b"\2", "sha256")).hex()


def test_every_volume_has_a_key_of_its_own() -> None:
    key, keys = os.urandom(32), set()
    for uri, uuid in ((CONFIG.key_uri, UUID), (CONFIG.key_uri, UUID.replace("1", "0")), ("kbs:///default/model/other", UUID)):
        out = bytearray(64)
        v.derive_key(key, uri, uuid, out)
        keys.add(bytes(out))
    assert len(keys) == 3


def test_the_tables_are_the_kernels() -> None:
    assert v.crypt_table(CONFIG, "254:16") == ((300 + 4) * 8, "aes-xts-plain64 {key} 0 254:16 2048 1 sector_size:4096")
    small = dataclasses.replace(CONFIG, sector_size=512, data_offset=16 << 20)
    assert v.crypt_table(small, "8:0")[1] == "aes-xts-plain64 {key} 0 8:0 32768"
    root, salt = bytes(range(32, 64)).hex(), bytes(range(64, 96)).hex()
    assert v.verity_table(CONFIG, "253:0") == (2400, f"1 253:0 253:0 4096 4096 300 300 sha256 {root} {salt}")
    gap = dataclasses.replace(CONFIG, hash_block=310)
    assert v.verity_table(gap, "253:0") == (2400, f"1 253:0 253:0 4096 4096 300 310 sha256 {root} {salt}")
    assert v.crypt_table(gap, "254:16")[0] == (310 + 4) * 8


@pytest.mark.parametrize(
    ("data", "tree"), [(2, 1), (128, 1), (129, 3), (128 * 128, 129), (128 * 128 + 1, 132), (1 << 32, 33818641)]
)
def test_a_hash_tree_has_as_many_blocks_as_the_kernel_reads(data: int, tree: int) -> None:
    assert v.tree_blocks(data) == tree


@given(st.binary(max_size=600))
def test_nothing_but_our_own_error_comes_out(data: bytes) -> None:
    with pytest.raises(MalformedManifestError):
        v.parse_volume(data, dataclasses.replace(MANIFEST, config_digest=m.digest_of(data), config_bytes=len(data)))
