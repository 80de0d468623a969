"""Keys and whole models of Tink: what a provider with Tink alone makes loads, and what we seal opens with Tink."""

import base64
import hashlib
import hmac
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest
import rfc8785
import tink
from cryptography.hazmat.primitives.asymmetric import ec
from tink import secret_key_access, streaming_aead

from agent.artifact.seal import seal_model
from agent.artifact.sources import open_source
from agent.artifact.stream import StreamLayout
from agent.errors import KeyUnwrapError, UnwrapCheck
from agent.keys import EphemeralKey, copy_model_key, open_jwe
from agent.tink_keyset import MAX_KEYSET_BYTES, copy_key, parse_keyset
from tests.test_artifact_load import KEY_URI, boot, config, contents
from tests.test_artifact_load import Sealed as Layout
from tests.test_artifact_load import given as given  # noqa: PLC0414  a fixture
from tests.test_keys import PRIVATE, sealed_by_jwcrypto

streaming_aead.register()


def new_keyset() -> tuple[tink.KeysetHandle, str]:
    handle = tink.new_keyset_handle(streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB)
    return handle, tink.json_proto_keyset_format.serialize(handle, secret_key_access.TOKEN)


def key_of(keyset: str) -> bytes:
    """By the last 32 bytes of the message, which is all there is behind the parameters."""
    return base64.b64decode(json.loads(keyset)["key"][0]["keyData"]["value"])[-32:]


def test_a_keyset_that_tink_makes_is_its_32_bytes() -> None:
    for _ in range(20):
        _, keyset = new_keyset()
        out = bytearray(32)
        copy_key(memoryview(keyset.encode()), memoryview(out))
        assert bytes(out) == key_of(keyset) == parse_keyset(json.dumps(json.loads(keyset)).encode())


def test_a_broker_may_release_a_keyset() -> None:
    _, keyset = new_keyset()
    out = bytearray(32)
    open_jwe(sealed_by_jwcrypto(keyset.encode()), EphemeralKey(PRIVATE), memoryview(out))
    assert bytes(out) == key_of(keyset)
    assert isinstance(PRIVATE, ec.EllipticCurvePrivateKey)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(new_keyset()[1])
    change(document)
    return json.dumps(document).encode()


def value(change: Callable[[bytearray], object]) -> bytes:
    def rewrite(document: dict[str, Any]) -> None:
        data = document["key"][0]["keyData"]
        message = bytearray(base64.b64decode(data["value"]))
        change(message)
        data["value"] = base64.b64encode(message).decode()

    return changed(rewrite)


def with_a_bit_that_fills_no_byte() -> bytes:
    def rewrite(document: dict[str, Any]) -> None:
        text = document["key"][0]["keyData"]["value"]
        document["key"][0]["keyData"]["value"] = text[:-2] + chr(ord(text[-2]) + 1) + "="

    return changed(rewrite)


def without_padding() -> bytes:
    def rewrite(document: dict[str, Any]) -> None:
        document["key"][0]["keyData"]["value"] = document["key"][0]["keyData"]["value"].rstrip("=")

    return changed(rewrite)


def data(**changes: object) -> bytes:
    return changed(lambda document: document["key"][0]["keyData"].update(changes))


def key(**changes: object) -> bytes:
    return changed(lambda document: document["key"][0].update(changes))


REFUSED = [
    b"",
    b"{",
    b"k" * 33,
    b"\xff" * 40,
    b'{"value": "AAAA"}',
    b'{"primaryKeyId": 1, "key": {"value": "AAAA"}}',
    b'{"primaryKeyId": 1, "key": [["value": "AAAA"]]}',
    b'{"primaryKeyId": 1, "key": [{"keyId": 1, "x": {"value": "AAAA"}}]}',
    changed(lambda document: document.pop("primaryKeyId")),
    changed(lambda document: document.update(primaryKeyId=7)),
    changed(lambda document: document.update(more=1)),
    changed(lambda document: document.update(key=[])),
    changed(lambda document: document.update(key=document["key"] * 2)),  # two keys
    changed(lambda document: document.update(key=[*document["key"], {"status": "DISABLED"}])),
    key(status="DISABLED"),
    key(status="DESTROYED"),
    key(keyId=1.0),
    key(outputPrefixType="TINK"),
    key(more=1),
    data(typeUrl="type.googleapis.com/google.crypto.tink.AesGcmKey"),
    data(keyMaterialType="REMOTE"),
    data(more=1),
    data(value=""),
    data(value=7),
    data(value="&" * 56),
    value(lambda message: message.__setitem__(2, 0x10)),  # another parameter
    value(lambda message: message.__setitem__(slice(3, 6), b"\x80\x20\x00")),  # segments of 4 KiB
    value(lambda message: message.__setitem__(9, 4)),  # SHA-512
    value(lambda message: message.pop()),  # 31 bytes
    value(lambda message: message.append(0)),
    value(lambda message: message.extend(bytes(3))),
    value(lambda message: message.__delitem__(slice(-3, None))),
    with_a_bit_that_fills_no_byte(),
    without_padding(),
    changed(lambda document: None).replace(b'"value": "', b'"value": "A', 1),
    changed(lambda document: None) + b" " * MAX_KEYSET_BYTES,
    changed(lambda document: None).replace(b'{"keyData"', b'{"keyId": 1, "keyData"'),  # a member twice
]


@pytest.mark.parametrize("number", range(len(REFUSED)))  # not the keys: each process has its own
def test_a_keyset_that_is_not_exactly_ours_is_refused(number: int) -> None:
    keyset = REFUSED[number]
    with pytest.raises(ValueError, match=r"^[^{]*$"):
        copy_key(memoryview(keyset), memoryview(bytearray(32)))
    if len(keyset) != 32:
        with pytest.raises(KeyUnwrapError) as caught:
            copy_model_key(memoryview(keyset), memoryview(bytearray(32)))
        assert caught.value.check is UnwrapCheck.KEYSET


# --- whole models -----------------------------------------------------------------------------------------------------


class Kept(io.BytesIO):
    def close(self) -> None:  # Tink closes what it writes to
        pass


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_model_written_with_tink_and_the_format_alone_loads(tmp_path: Path, given: Path) -> None:
    """Nothing of ours takes part in writing it: FORMAT.md, section by section."""
    handle, keyset = new_keyset()
    raw_key = key_of(keyset)
    primitive = handle.primitive(streaming_aead.StreamingAead)
    files = {"config.json": b"{}", "empty": b"", "weights/w.bin": os.urandom((2 << 20) + 5)}
    blobs: dict[str, bytes] = {}
    table = []
    for path, plaintext in sorted(files.items()):
        sealed = Kept()
        bound = cbor2.dumps(["keyturn/v1/file", "tinker", path, len(plaintext), KEY_URI, 5], canonical=True)
        with primitive.new_encrypting_stream(sealed, bound) as stream:
            stream.write(plaintext)
        blob = sealed.getvalue()
        blobs[sha256(blob)] = blob
        row = {"path": path, "size": len(plaintext), "blob_digest": sha256(blob), "sealed_version": 5}
        table.append(row | {"header": blob[:40].hex()})
    commitment = hmac.digest(
        hmac.digest(b"\0" * 32, raw_key, "sha256"), b"keyturn/v1/key-commitment\0" + KEY_URI.encode() + b"\x01", "sha256"
    )
    document: dict[str, Any] = {
        "schema": "keyturn/v1/model",
        "model_name": "tinker",
        "version": 5,
        "key_uri": KEY_URI,
        "files": table,
    }
    config_blob = rfc8785.dumps(document | {"key_commitment": commitment.hex()})
    layers = [
        {
            "mediaType": "application/vnd.keyturn.model.file.v1+aes256-gcm-hkdf-1mb",
            "digest": row["blob_digest"],
            "size": len(blobs[str(row["blob_digest"])]),
            "annotations": {"org.opencontainers.image.title": row["path"]},
        }
        for row in table
    ]
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.keyturn.model.v1",
            "config": {
                "mediaType": "application/vnd.keyturn.model.config.v1+json",
                "digest": sha256(config_blob),
                "size": len(config_blob),
            },
            "layers": layers,
        }
    ).encode()
    for blob in (*blobs.values(), config_blob, manifest):
        target = tmp_path / "blobs" / sha256(blob).replace(":", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(blob)

    def check(loaded: Any) -> None:
        assert contents(loaded) == files

    boot(config(Layout(tmp_path, sha256(manifest)), "directory", given), check, key=parse_keyset(keyset.encode()))


def test_a_model_of_ours_opens_with_tink(tmp_path: Path) -> None:
    handle, keyset = new_keyset()
    (tmp_path / "model").mkdir()
    plaintext = os.urandom((2 << 20) + 5)
    (tmp_path / "model" / "w.bin").write_bytes(plaintext)
    digest = seal_model(
        tmp_path / "model", tmp_path / "out", parse_keyset(keyset.encode()), KEY_URI, "tinker", 5, lambda _, __: None
    )
    source = open_source(str(tmp_path / "out"), None, 5)
    (layer,) = json.loads(source.read_blob(digest, 1 << 20))["layers"]
    blob = source.read_blob(layer["digest"], 4 << 20)
    source.close()
    assert len(blob) == layer["size"] == StreamLayout(len(plaintext)).ciphertext_bytes
    bound = cbor2.dumps(["keyturn/v1/file", "tinker", "w.bin", len(plaintext), KEY_URI, 5], canonical=True)
    with handle.primitive(streaming_aead.StreamingAead).new_decrypting_stream(io.BytesIO(blob), bound) as stream:
        assert stream.read() == plaintext
