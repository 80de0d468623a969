"""What others need to open the same bytes: Tink for Python, KServe's way with jwcrypto, Debian's age."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_artifact import KEY, KEY_URI, MODEL_BYTES, Model, decrypt_vs, destination_kind

from agent.artifact.manifest import parse_config, parse_manifest
from agent.artifact.memory import choose_destination, demand_of
from agent.artifact.sources import open_source
from agent.artifact.stream import SEGMENT_BYTES, associated_data
from agent.guest.memory_info import MACHINE


@contextmanager
def fresh_file() -> Iterator[int]:
    """A new file of the model's size in memory of a destination's kind, mapped nowhere."""
    destination = choose_destination(
        destination_kind(), None, demand_of({"weights": MODEL_BYTES}), None, allow_swap=True, memory=MACHINE
    )
    try:
        destination.create("weights", MODEL_BYTES)
        root = destination.hand_over()[0]
        if destination_kind() == "memfd":
            yield root
        else:
            descriptor = os.open("weights", os.O_RDWR, dir_fd=root)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
    finally:
        destination.close()


def tink_once(model: Model) -> float:
    """Seconds that Tink takes for the same blob, read straight into fresh memory of the same kind."""
    import tink
    from tink import secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

    streaming_aead.register()
    parameters = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=SEGMENT_BYTES, derived_key_size=len(KEY), hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(params=parameters, key_value=KEY)
    data = tink_pb2.KeyData(
        type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
        value=key.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    entry = tink_pb2.Keyset.Key(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry])
    primitive = tink.proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN).primitive(
        streaming_aead.StreamingAead
    )
    store = open_source(str(model.layout), None, 30)
    manifest = parse_manifest(store.read_blob(model.digest, 1 << 20), model.digest)
    (file,) = parse_config(store.read_blob(manifest.config_digest, manifest.config_bytes), manifest).files
    store.close()
    bound_to = associated_data("bench", file.path, file.size, KEY_URI, file.sealed_version)
    destination = choose_destination(
        destination_kind(), None, demand_of({"weights": MODEL_BYTES}), None, allow_swap=True, memory=MACHINE
    )
    destination.create("weights", MODEL_BYTES)
    began = time.perf_counter()
    with destination.window("weights", 0, MODEL_BYTES) as window, window.view(0, MODEL_BYTES) as view:
        with open(model.layout / "blobs" / file.blob_digest.replace(":", "/"), "rb") as blob:
            stream = primitive.new_decrypting_stream(blob, bound_to)
            done = 0
            while got := stream.readinto(view[done : done + SEGMENT_BYTES]):
                done += got
        assert done == MODEL_BYTES
    seconds = time.perf_counter() - began
    destination.close()
    return seconds


def kserve_once(sealed: Path) -> float:
    """Seconds that KServe's storage initializer takes: the whole JWE read, opened by jwcrypto, and written."""
    from jwcrypto import jwe, jwk

    key = jwk.JWK(kty="oct", k=jwk.base64url_encode(KEY))
    with fresh_file() as out:
        began = time.perf_counter()
        token = jwe.JWE()
        token.deserialize(sealed.read_text(), key)
        view = memoryview(token.payload)
        done = 0
        while done < len(view):
            done += os.write(out, view[done:])
        return time.perf_counter() - began


def age_once(sealed: Path, identity: Path) -> float:
    """Seconds that age takes, process start included, into fresh memory of the same kind."""
    with fresh_file() as out:
        began = time.perf_counter()
        subprocess.run(["age", "--decrypt", "--identity", identity, sealed], stdout=out, check=True)
        return time.perf_counter() - began


def decrypt_vs_tink(model: Model, repeat: int) -> dict[str, float]:
    return decrypt_vs("tink", model, repeat, lambda: tink_once(model))


def decrypt_vs_kserve(model: Model, repeat: int) -> dict[str, float]:
    from jwcrypto import jwe, jwk

    key = jwk.JWK(kty="oct", k=jwk.base64url_encode(KEY))
    sealed = model.layout.parent / "weights.jwe"
    token = jwe.JWE(model.plaintext.read_bytes(), '{"alg":"A256KW","enc":"A256GCM"}')
    token.add_recipient(key)
    sealed.write_text(token.serialize(compact=True))
    try:
        return decrypt_vs("kserve", model, min(repeat, 3), lambda: kserve_once(sealed))
    finally:
        sealed.unlink()


def decrypt_vs_age(model: Model, repeat: int) -> dict[str, float]:
    if not shutil.which("age"):
        raise SystemExit("decrypt_vs_age needs age: apt-get install age")
    identity, sealed = model.layout.parent / "identity", model.layout.parent / "weights.age"
    subprocess.run(["age-keygen", "-o", identity], stderr=subprocess.DEVNULL, check=True)
    recipient = subprocess.run(["age-keygen", "-y", identity], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["age", "--recipient", recipient, "--output", sealed, model.plaintext], check=True)
    try:
        return decrypt_vs("age", model, repeat, lambda: age_once(sealed, identity))
    finally:
        sealed.unlink()
        identity.unlink()
