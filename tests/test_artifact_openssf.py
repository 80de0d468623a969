"""A bundle that model-signing 1.1.1 wrote, bundles of our own, and everything that is nearly one."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from agent.artifact.openssf import MAX_BUNDLE_BYTES, check_files, parse_key, what_is_signed
from agent.artifact.signature import public_pem
from agent.config import ArtifactConfig
from agent.errors import BundleCheck, ConfigError, ModelSignatureError
from tests.test_artifact_load import FILES, Sealed, boot, contents, seal
from tests.test_artifact_load import config as load_config
from tests.test_artifact_load import given as given  # noqa: PLC0414  a fixture
from tests.test_artifact_load import nothing_is_left as nothing_is_left  # noqa: PLC0414  a fixture

VECTORS = Path(__file__).parent / "vectors" / "openssf"
SIGNER = ec.derive_private_key(7, ec.SECP256R1())
SIGNED = {"config.json": b"{}", "empty": b"", "sub/w.bin": b"weights"}


def digests(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: hashlib.sha256(content).digest() for path, content in files.items()}


def statement(files: dict[str, bytes]) -> dict[str, Any]:
    """As model-signing 1.1.1 writes it."""
    listed = sorted(digests(files).items())
    root = hashlib.sha256(b"".join(digest for _, digest in listed)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest.hex()} for path, digest in listed],
        },
    }


def bundle(about: object, key: ec.EllipticCurvePrivateKey = SIGNER, **more: object) -> bytes:
    payload = json.dumps(about).encode()
    kind = "application/vnd.in-toto+json"
    algorithm = ec.ECDSA(hashes.SHA384() if key.key_size == 384 else hashes.SHA256())
    signature = key.sign(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload, algorithm)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    members = {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope}
    return json.dumps(members | {"verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []}} | more).encode()


def check(data: bytes, files: dict[str, bytes] = SIGNED, *keys: ec.EllipticCurvePrivateKey) -> None:
    check_files(data, [key.public_key() for key in keys or (SIGNER,)], digests(files))


def refused(data: bytes, files: dict[str, bytes] = SIGNED, *keys: ec.EllipticCurvePrivateKey) -> BundleCheck:
    with pytest.raises(ModelSignatureError) as caught:
        check(data, files, *keys)
    return caught.value.check


def test_what_model_signing_wrote_verifies() -> None:
    key = parse_key((VECTORS / "key.pem").read_text())
    data = (VECTORS / "bundle.json").read_bytes()
    check_files(data, [SIGNER.public_key(), key], digests(SIGNED))
    with pytest.raises(ModelSignatureError):
        check_files(data, [key], digests(SIGNED | {"sub/w.bin": b"Weights"}))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_ours_verifies_too(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    check(bundle(statement(SIGNED), key), SIGNED, SIGNER, key)


def test_a_bundle_of_another_key_is_refused() -> None:
    other = ec.derive_private_key(8, ec.SECP256R1())
    assert refused(bundle(statement(SIGNED), other)) is BundleCheck.SIGNATURE
    assert refused(bundle("not even a statement", other)) is BundleCheck.SIGNATURE


@pytest.mark.parametrize(
    "files",
    [
        {},
        SIGNED | {"backdoor.py": b"import os"},
        {path: content for path, content in SIGNED.items() if path != "empty"},
        {path.replace("sub/", ""): content for path, content in SIGNED.items()},
    ],
)
def test_every_file_must_be_in_the_bundle_and_the_other_way_round(files: dict[str, bytes]) -> None:
    assert refused(bundle(statement(SIGNED)), files) is BundleCheck.FILES


def test_a_file_that_is_not_the_signed_one_is_refused() -> None:
    assert refused(bundle(statement(SIGNED)), SIGNED | {"empty": b"\n"}) is BundleCheck.DIGEST


def with_statement(change: Callable[[dict[str, Any]], object]) -> bytes:
    about = statement(SIGNED)
    change(about)
    return bundle(about)


def with_envelope(change: Callable[[dict[str, Any]], object]) -> bytes:
    members = json.loads(bundle(statement(SIGNED)))
    change(members["dsseEnvelope"])
    return json.dumps(members).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b" " * (MAX_BUNDLE_BYTES + 1),
        bundle(statement(SIGNED), mediaType="application/vnd.dev.sigstore.bundle.v0.2+json"),
        bundle(statement(SIGNED), dsseEnvelope=[]),
        with_envelope(lambda e: e.update(payloadType="application/json")),
        with_envelope(lambda e: e.update(payload="?")),
        with_envelope(lambda e: e.update(signatures={})),
        with_envelope(lambda e: e.update(signatures=[])),
        with_envelope(lambda e: e.update(signatures=e["signatures"] * 2)),
        with_envelope(lambda e: e.update(signatures=["x"])),
        with_envelope(lambda e: e["signatures"][0].pop("sig")),
        bundle([]),
        with_statement(lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
        with_statement(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),
        with_statement(lambda s: s.update(predicate=[])),
        with_statement(lambda s: s["predicate"].pop("serialization")),
        with_statement(lambda s: s["predicate"]["serialization"].update(method="shards")),
        with_statement(lambda s: s["predicate"]["serialization"].update(hash_type="blake3")),
        with_statement(lambda s: s["predicate"].update(resources={})),
        with_statement(lambda s: s["predicate"].update(resources=["x"])),
        with_statement(lambda s: s["predicate"]["resources"][0].update(algorithm="blake2b")),
        with_statement(lambda s: s["predicate"]["resources"][0].update(digest="AA" * 32)),
        with_statement(lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0])),
    ],
)
def test_what_is_no_bundle_of_this_kind_is_refused(data: bytes) -> None:
    assert refused(data) is BundleCheck.FORMAT


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), None])
def test_a_pinned_key_that_is_none_is_the_configurations_mistake(tmp_path: Path, key: ed25519.Ed25519PrivateKey | None) -> None:
    pem = public_pem(key) if key else "-----BEGIN PUBLIC KEY-----"
    sealed = seal(tmp_path, {"model.sig": b"", "a": b""})
    with pytest.raises(ConfigError) as caught:
        what_is_signed(asked(sealed, Path("/"), keys=[pem]), sealed.model)
    assert caught.value.key == "artifact.model_signature_keys[0]"


# --- a whole model ----------------------------------------------------------------------------------------------------


def asked(sealed: Sealed, given: Path, keys: list[str] | None = None) -> ArtifactConfig:
    plain = load_config(sealed, "directory", given)
    return msgspec.structs.replace(plain, model_signature="model.sig", model_signature_keys=tuple(keys or [public_pem(SIGNER)]))


def test_a_signed_model_of_many_segments_loads(tmp_path: Path, given: Path) -> None:
    sealed = seal(tmp_path, FILES | {"model.sig": bundle(statement(FILES))})
    seen: list[dict[str, bytes]] = []
    boot(asked(sealed, given), lambda loaded: seen.append(contents(loaded)))
    assert seen[0].keys() == FILES.keys() | {"model.sig"}


def test_a_model_that_was_changed_between_signing_and_sealing_is_handed_to_nobody(tmp_path: Path, given: Path) -> None:
    big = bytearray(FILES["weights/big.bin"])
    big[5 << 20] ^= 1
    sealed = seal(tmp_path, FILES | {"weights/big.bin": bytes(big), "model.sig": bundle(statement(FILES))})
    with pytest.raises(ModelSignatureError) as caught:
        boot(asked(sealed, given))
    assert caught.value.check is BundleCheck.DIGEST
    assert not (given / "model").exists()


def test_a_model_without_its_bundle_is_refused_before_any_memory_is_taken(tmp_path: Path, given: Path) -> None:
    sealed = seal(tmp_path, {"a": b"a"})
    with pytest.raises(ModelSignatureError) as caught:
        boot(asked(sealed, given))
    assert caught.value.check is BundleCheck.MISSING


def test_a_bundle_that_is_too_large_is_refused_before_any_memory_is_taken(tmp_path: Path) -> None:
    sealed = seal(tmp_path, {"model.sig": bytes(MAX_BUNDLE_BYTES + 1)})
    with pytest.raises(ModelSignatureError) as caught:
        what_is_signed(asked(sealed, Path("/")), sealed.model)
    assert caught.value.check is BundleCheck.FORMAT
