"""Signatures over manifests: bytes as RFC 9052 wants them, and every defect refused for what it is."""

import hashlib
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import cbor2
import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent import cose
from agent.artifact import manifest as m
from agent.artifact import signature as s
from agent.artifact.identify import find_manifest, signatures_of
from agent.artifact.seal import seal_model
from agent.artifact.sources import open_source
from agent.artifact.sources.directory import DirectorySource
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, ConfigError, ManifestSignatureError, SignatureCheck, StoreProblem

KEYS: dict[str, cose.PrivateKey] = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
DIGEST = "sha256:" + "5a" * 32
OTHER = "sha256:" + "a5" * 32
KEY_URI = "kbs:///models/tiny/1"


@pytest.mark.parametrize("name", KEYS)
def test_a_signature_verifies_under_its_key_alone(name: str) -> None:
    cose = s.sign_manifest(DIGEST, KEYS[name])
    assert len(cose) < s.MAX_SIGNATURE_BYTES
    every = [key.public_key() for key in KEYS.values()]
    s.verify_signatures([cose], DIGEST, every)
    with pytest.raises(ManifestSignatureError) as caught:
        s.verify_signatures([cose], DIGEST, [key for key in every if key != KEYS[name].public_key()])
    assert caught.value.check is SignatureCheck.KEY
    with pytest.raises(ManifestSignatureError) as caught:
        s.verify_signatures([cose], OTHER, every)
    assert caught.value.check is SignatureCheck.MANIFEST


@pytest.mark.parametrize("name", KEYS)
def test_the_bytes_are_those_of_rfc_9052(name: str) -> None:
    """Put together by hand from the RFC and FORMAT.md, with no CBOR library in between."""
    key = KEYS[name]
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    algorithm, length = {"ES256": (b"\x26", 64), "ES384": (b"\x38\x22", 96), "EdDSA": (b"\x27", 64)}[name]
    protected = b"\xa2\x01" + algorithm + b"\x04\x58\x20" + hashlib.sha256(spki).digest()
    payload = b"\x82\x73keyturn/v1/manifest\x58\x20" + b"\x5a" * 32
    assert len(payload) == 55
    bstr_protected = b"\x58" + bytes([len(protected)]) + protected
    cose = s.sign_manifest(DIGEST, key)
    assert cose[:-length] == b"\xd2\x84" + bstr_protected + b"\xa0\x58\x37" + payload + b"\x58" + bytes([length])

    signed = b"\x84\x6aSignature1" + bstr_protected + b"\x40\x58\x37" + payload
    raw = cose[-length:]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        key.public_key().verify(raw, signed)
    else:
        r, t = int.from_bytes(raw[: length // 2]), int.from_bytes(raw[length // 2 :])
        digest = hashes.SHA256() if name == "ES256" else hashes.SHA384()
        key.public_key().verify(encode_dss_signature(r, t), signed, ec.ECDSA(digest))


def _changed(**changes: Any) -> bytes:
    """A signature of the ES256 key with one part exchanged, signed again where that is possible."""
    key = KEYS["ES256"]
    protected, unprotected, payload, signature = cbor2.loads(s.sign_manifest(DIGEST, key)).value
    header = cbor2.loads(protected) | changes.pop("header", {})
    for name in changes.pop("without", ()):
        del header[name]
    parts = [changes.pop("protected", cbor2.dumps(header, canonical=True)), unprotected, payload, signature]
    if changes.pop("zero", False):  # the same two numbers
        parts[3] = signature[:32] + b"\0" + signature[32:]
    for index, value in changes.pop("parts", {}).items():
        parts[index] = value
    return cbor2.dumps(cbor2.CBORTag(changes.pop("tag", 18), parts), canonical=True)


def _longer(protected: bytes) -> bytes:
    """The same map, with the number 1 in two bytes."""
    assert protected[:2] == b"\xa2\x01"
    return b"\xa2\x18\x01" + protected[2:]


GOOD = s.sign_manifest(DIGEST, KEYS["ES256"])
DEFECTS = {
    "empty": (b"", SignatureCheck.MALFORMED),
    "not CBOR": (b"\xff", SignatureCheck.MALFORMED),
    "deeply nested": (b"\x81" * 900, SignatureCheck.MALFORMED),
    "a number": (b"\x01", SignatureCheck.MALFORMED),
    "too long": (_changed(parts={3: bytes(2000)}), SignatureCheck.MALFORMED),
    "bytes after it": (GOOD + b"\0", SignatureCheck.MALFORMED),
    "another tag": (_changed(tag=98), SignatureCheck.MALFORMED),
    "no tag": (GOOD[1:], SignatureCheck.MALFORMED),
    "a longer way to say so": (GOOD.replace(b"\xa0\x58\x37", b"\xb8\0\x58\x37"), SignatureCheck.MALFORMED),
    "a header in a longer way": (_changed(protected=_longer(cbor2.loads(GOOD).value[0])), SignatureCheck.MALFORMED),
    "an unprotected header": (_changed(parts={1: {1: -7}}), SignatureCheck.MALFORMED),
    "a critical header": (_changed(header={2: [99], 99: 1}), SignatureCheck.MALFORMED),
    "no algorithm": (_changed(without=(1,)), SignatureCheck.MALFORMED),
    "no key id": (_changed(without=(4,)), SignatureCheck.MALFORMED),
    "a detached payload": (_changed(parts={2: None}), SignatureCheck.MALFORMED),
    "a signature of another type": (_changed(parts={3: "text"}), SignatureCheck.MALFORMED),
    "another key's id": (_changed(header={4: cose.key_id(KEYS["ES384"].public_key())}), SignatureCheck.KEY),
    "algorithm none": (_changed(header={1: 0}), SignatureCheck.ALGORITHM),
    "another algorithm": (_changed(header={1: -35}), SignatureCheck.ALGORITHM),
    "an HMAC": (_changed(header={1: 5}), SignatureCheck.ALGORITHM),
    "another payload": (_changed(parts={2: cbor2.dumps(["keyturn/v2/manifest", b"\x5a" * 32])}), SignatureCheck.MANIFEST),
    "a signature that is cut": (_changed(parts={3: bytes(63)}), SignatureCheck.SIGNATURE),
    "a good signature with a zero more": (_changed(zero=True), SignatureCheck.SIGNATURE),
    "a signature of zeros": (_changed(parts={3: bytes(64)}), SignatureCheck.SIGNATURE),
    "one bit": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), SignatureCheck.SIGNATURE),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_signature_with_one_defect_is_refused_for_it(defect: str) -> None:
    cose, check = DEFECTS[defect]
    keys = [KEYS["ES256"].public_key()] if check is not SignatureCheck.KEY else [KEYS["EdDSA"].public_key()]
    with pytest.raises(ManifestSignatureError) as caught:
        s.verify_signatures([cose], DIGEST, keys)
    assert caught.value.check is check


def test_no_byte_of_a_signature_can_be_another() -> None:
    for key in KEYS.values():
        cose = s.sign_manifest(DIGEST, key)
        for at in range(len(cose)):
            with pytest.raises(ManifestSignatureError):
                s.verify_signatures([cose[:at] + bytes([cose[at] ^ 1]) + cose[at + 1 :]], DIGEST, [key.public_key()])


def test_one_good_signature_is_enough_and_the_best_bad_one_is_told() -> None:
    keys = [KEYS["ES256"].public_key()]
    bad = [cose for cose, _ in DEFECTS.values()]
    s.verify_signatures([*bad, GOOD], DIGEST, keys)
    with pytest.raises(ManifestSignatureError) as caught:
        s.verify_signatures(bad, DIGEST, keys)
    assert caught.value.check is SignatureCheck.SIGNATURE
    with pytest.raises(ManifestSignatureError) as caught:
        s.verify_signatures([], DIGEST, keys)
    assert caught.value.check is SignatureCheck.MISSING


def test_only_keys_of_three_kinds_can_be_pinned() -> None:
    for key in KEYS.values():
        assert cose.key_id(s.parse_provider_key(s.public_pem(key))) == cose.key_id(key.public_key())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        assert s.public_pem(s.parse_signing_key(pem)) == s.public_pem(key)
    foreign: list[Any] = [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP521R1())]
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    texts = [key.public_key().public_bytes(serialization.Encoding.PEM, spki).decode() for key in foreign]
    for text in [*texts, "", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]:
        with pytest.raises(ValueError, match="key"):
            s.parse_provider_key(text)
    secret = KEYS["ES256"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"p")
    )
    for pem in (secret, b"", s.public_pem(KEYS["ES256"]).encode()):
        with pytest.raises(ValueError, match="private key"):
            s.parse_signing_key(pem)


def test_a_candidate_that_is_no_signature_of_this_manifest_is_passed_over() -> None:
    good = s.pack_signature_manifest(b"manifest", GOOD)
    subject = m.digest_of(b"manifest")
    assert s.parse_signature_manifest(good, subject) == m.digest_of(GOOD)
    document = msgspec.json.decode(good)
    descriptor = document["layers"][0]
    for other in (
        b"",
        b"[" * 5000,
        b"{}",
        msgspec.json.encode(document | {"artifactType": "application/x"}),
        msgspec.json.encode({name: value for name, value in document.items() if name != "subject"}),
        msgspec.json.encode(document | {"layers": []}),
        msgspec.json.encode(document | {"layers": [descriptor, descriptor]}),
        msgspec.json.encode(document | {"layers": [descriptor | {"mediaType": "text/plain"}]}),
        msgspec.json.encode(document | {"layers": [descriptor | {"digest": "sha256:../../x"}]}),
    ):
        assert s.parse_signature_manifest(other, subject) is None
    assert s.parse_signature_manifest(good, OTHER) is None


# --- from seal to boot ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"weights")
    return tmp_path / "model"


def seal(model: Path, out: Path, version: int, *names: str) -> str:
    keys = [KEYS[name] for name in names]
    return seal_model(model, out, bytes(32), KEY_URI, "tiny", version, lambda _, __: None, keys)


def config(layout: Path, tag: str, *names: str) -> ArtifactConfig:
    pems = tuple(s.public_pem(KEYS[name]) for name in names)
    return ArtifactConfig(source=str(layout), provider_keys=pems, tag=tag, name="tiny", timeout_s=5)


def identified(artifact: ArtifactConfig) -> str:
    source = open_source(artifact.source, None, 5)
    try:
        return find_manifest(source, artifact, Event()).digest
    finally:
        source.close()


def test_a_tag_stands_for_what_a_pinned_key_signed(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    first = seal(model, layout, 1, "ES256")
    second = seal(model, layout, 2, "ES256", "EdDSA")  # while the key is replaced
    third = seal(model, layout, 3, "EdDSA")
    unsigned = seal(model, layout, 4)
    assert identified(config(layout, "tiny-v1", "ES256")) == first
    assert identified(config(layout, "tiny-v2", "ES256")) == second
    assert identified(config(layout, "tiny-v2", "EdDSA")) == second
    assert identified(config(layout, "tiny-v3", "ES256", "EdDSA")) == third
    for tag, key, check in (("tiny-v3", "ES256", SignatureCheck.KEY), ("tiny-v4", "EdDSA", SignatureCheck.MISSING)):
        with pytest.raises(ManifestSignatureError) as caught:
            identified(config(layout, tag, key))
        assert caught.value.check is check
    pinned = ArtifactConfig(source=str(layout), manifest_digest=unsigned)
    assert identified(pinned) == unsigned


def test_a_signature_that_is_lost_hides_no_other(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    digest = seal(model, layout, 1, "ES256", "EdDSA", "ES384")
    blobs = layout / "blobs/sha256"
    signatures = [path for path in blobs.iterdir() if path.read_bytes()[:2] == b"\xd2\x84"]
    assert len(signatures) == 3
    artifact = config(layout, "tiny-v1", "ES256", "EdDSA", "ES384")
    for path in signatures[:2]:
        path.unlink()
        assert identified(artifact) == digest
    signatures[2].unlink()
    with pytest.raises(ManifestSignatureError) as caught:
        identified(artifact)
    assert caught.value.check is SignatureCheck.MALFORMED


def test_a_store_that_does_not_answer_for_a_signature_is_not_one_without(model: Path, tmp_path: Path) -> None:
    """It may come back: that nobody signed would be final."""
    digest = seal(model, tmp_path / "layout", 1, "ES256")

    class Away(DirectorySource):
        def read_blob(self, digest: str, max_bytes: int) -> bytes:
            if max_bytes <= s.MAX_SIGNATURE_MANIFEST_BYTES:
                raise ArtifactUnavailableError(StoreProblem.UNREACHABLE)
            return super().read_blob(digest, max_bytes)

    with closing(Away(str(tmp_path / "layout"))) as source, pytest.raises(ArtifactUnavailableError):
        list(signatures_of(source, digest))


def test_of_the_signatures_that_a_store_adds_16_are_looked_at(model: Path, tmp_path: Path) -> None:
    digest = seal(model, tmp_path / "layout", 1, *["ES256"] * 20)
    with closing(DirectorySource(str(tmp_path / "layout"))) as source:
        assert len(source.referrers(digest)) == 20
        assert len(list(signatures_of(source, digest))) == s.MAX_SIGNATURES


def test_of_what_lies_beside_the_models_of_a_layout_the_newest_64_count(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    digest = seal(model, layout, 1)
    index = msgspec.json.decode((layout / "index.json").read_bytes())
    named = index["manifests"][0]
    unsaid = {name: named[name] for name in ("mediaType", "size")}
    others = [unsaid | {"digest": f"sha256:{number:064x}"} for number in range(70)]
    index["manifests"] = [
        unsaid | {"digest": digest},
        *others,
        {**unsaid, "digest": OTHER, "annotations": named["annotations"]},
    ]
    (layout / "index.json").write_bytes(msgspec.json.encode(index))
    with closing(DirectorySource(str(layout))) as source:
        assert source.referrers(digest) == tuple(f"sha256:{number:064x}" for number in range(6, 70))
        index["manifests"] = index["manifests"][:1]
        (layout / "index.json").write_bytes(msgspec.json.encode(index))
        assert source.referrers(digest) == ()


def test_a_name_that_stands_for_two_manifests_stands_for_none(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    seal(model, layout, 1, "ES256")
    index = msgspec.json.decode((layout / "index.json").read_bytes())
    index["manifests"].append(index["manifests"][0])
    (layout / "index.json").write_bytes(msgspec.json.encode(index))
    for tag, problem in (("tiny-v1", StoreProblem.BAD_ANSWER), ("tiny-v9", StoreProblem.NOT_FOUND)):
        with pytest.raises(ArtifactUnavailableError) as caught:
            identified(config(layout, tag, "ES256"))
        assert caught.value.problem is problem


def test_a_provider_key_that_is_none_is_the_configurations_mistake(model: Path, tmp_path: Path) -> None:
    seal(model, tmp_path / "layout", 1)
    artifact = config(tmp_path / "layout", "tiny-v1", "ES256")
    broken = msgspec.structs.replace(artifact, provider_keys=(*artifact.provider_keys, "-----BEGIN PUBLIC KEY-----"))
    with pytest.raises(ConfigError) as caught:
        identified(broken)
    assert caught.value.key == "artifact.provider_keys[1]"
