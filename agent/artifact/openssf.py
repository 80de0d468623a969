"""OpenSSF model signing: whether the files of a model are those that a pinned key signed, before anybody sealed them.

A provider who signs models anyway needs no second signature: the bundle lies in the sealed model as one of its files, and is
held against the plaintext. It says who made the weights; who sealed them, the manifest's digest or signature says. Read is what
`model_signing sign key` of model-signing 1.1 writes: a Sigstore bundle v0.3 with a DSSE envelope around an in-toto Statement
v1, an ECDSA signature of a key pair, one SHA-256 for each whole file. Not read: certificates, transparency logs, other hashes,
files in shards.

Does not read files or compute digests (`digests.py`).
Spec: model_signing/signature/v1.0; secure-systems-lab/dsse `protocol.md`; in-toto Statement v1; sigstore_bundle.proto.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.artifact.manifest import ModelConfig
from agent.artifact.signature import parse_provider_key
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import BundleCheck, ConfigError, ConfigProblem, ModelSignatureError
from agent.jose import parse_b64, parse_object, string

MAX_BUNDLE_BYTES = 8 << 20
"""10 000 files with long names, 40 000 with names of 40 characters."""

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_HASHES: dict[str, type[hashes.SHA256] | type[hashes.SHA384]] = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384}
_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Signed:
    """That a model must be signed, and how one finds out.

    Attributes:
        bundle: index of the bundle in the file table.
        keys: one of them must have signed.
    """

    bundle: int
    keys: tuple[ec.EllipticCurvePublicKey, ...]


def parse_key(pem: str) -> ec.EllipticCurvePublicKey:
    """One pinned key: PEM SubjectPublicKeyInfo of P-256 or P-384. Raises ValueError for anything else."""
    key = parse_provider_key(pem)
    # refusal: test_a_pinned_key_that_is_none_is_the_configurations_mistake
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not an EC key")
    return key


def what_is_signed(config: ArtifactConfig, model: ModelConfig) -> Signed | None:
    """What a configuration asks of a model; None: nothing.

    Raises:
        ConfigError: a key is none.
        ModelSignatureError: the model has no such file, or it is too large for a bundle.
    """
    if config.model_signature is None:
        return None
    keys = []
    for index, pem in enumerate(config.model_signature_keys):
        try:
            keys.append(parse_key(pem))
        except ValueError:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"artifact.model_signature_keys[{index}]")) from None
    paths = [file.path for file in model.files]
    # refusal: test_a_model_without_its_bundle_is_refused_before_any_memory_is_taken
    if config.model_signature not in paths:
        raise ModelSignatureError(BundleCheck.MISSING)
    bundle = paths.index(config.model_signature)
    # refusal: test_a_bundle_that_is_too_large_is_refused_before_any_memory_is_taken
    if model.files[bundle].size > MAX_BUNDLE_BYTES:
        raise ModelSignatureError(BundleCheck.FORMAT)
    return Signed(bundle, tuple(keys))


def check_files(bundle: bytes, keys: Sequence[ec.EllipticCurvePublicKey], digests: Mapping[str, bytes]) -> None:
    """Hold a bundle against a model.

    Args:
        bundle: at most 8 MiB.
        keys: one of them must have signed it.
        digests: SHA-256 of every file of the model but the bundle, by path.

    Raises:
        ModelSignatureError: the bundle is none, nobody pinned signed it, or it is about other files.
    """
    # 1. Signed, before anything in it is believed or even parsed.
    payload, signature = _open_bundle(bundle)
    pae = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
    # refusal: test_a_bundle_of_another_key_is_refused
    if not any(_verifies(key, signature, pae) for key in keys):
        raise ModelSignatureError(BundleCheck.SIGNATURE)
    # 2. About exactly these files: one more would be code that nobody vouches for, one fewer is not the model.
    signed = _parse_statement(payload)
    # refusal: test_every_file_must_be_in_the_bundle_and_the_other_way_round
    if signed.keys() != digests.keys():
        raise ModelSignatureError(BundleCheck.FILES)
    # 3. Byte for byte.
    # refusal: test_a_file_that_is_not_the_signed_one_is_refused
    if any(signed[path] != digest for path, digest in digests.items()):
        raise ModelSignatureError(BundleCheck.DIGEST)


def _verifies(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> bool:
    """The one place where a signature is a flag: another key may have made it."""
    try:
        key.verify(signature, data, ec.ECDSA(_HASHES[key.curve.name]()))
    except InvalidSignature:
        return False
    return True


def _open_bundle(bundle: bytes) -> tuple[bytes, bytes]:
    """Payload and signature; what else stands in a bundle helps others to find keys, and ours are pinned."""
    try:
        members = parse_object(bundle, MAX_BUNDLE_BYTES)
        envelope = _object(members, "dsseEnvelope")
        (entry,) = _list(envelope, "signatures")
        # refusal: test_what_is_no_bundle_of_this_kind_is_refused
        if (
            string(members, "mediaType") != _BUNDLE
            or string(envelope, "payloadType") != _PAYLOAD
            or not isinstance(entry, dict)
        ):
            raise ValueError
        return parse_b64(string(envelope, "payload")), parse_b64(string(entry, "sig"))
    except ValueError:
        raise ModelSignatureError(BundleCheck.FORMAT) from None


def _parse_statement(payload: bytes) -> dict[str, bytes]:
    """SHA-256 by path."""
    try:
        statement = parse_object(payload, MAX_BUNDLE_BYTES)
        predicate = _object(statement, "predicate")
        how = _object(predicate, "serialization")
        # refusal: test_what_is_no_bundle_of_this_kind_is_refused
        if string(statement, "_type") != _STATEMENT or string(statement, "predicateType") != _PREDICATE:
            raise ValueError
        # refusal: test_what_is_no_bundle_of_this_kind_is_refused
        if string(how, "method") != "files" or string(how, "hash_type") != "sha256":
            raise ValueError
        # The subject is a digest over these digests: it says nothing that they do not, under the same signature.
        resources = _list(predicate, "resources")
        found = {}
        for resource in resources:
            # refusal: test_what_is_no_bundle_of_this_kind_is_refused
            if not isinstance(resource, dict) or string(resource, "algorithm") != "sha256":
                raise ValueError
            digest = string(resource, "digest")
            # refusal: test_what_is_no_bundle_of_this_kind_is_refused
            if not _HEX.fullmatch(digest):
                raise ValueError
            found[string(resource, "name")] = bytes.fromhex(digest)
        # refusal: test_what_is_no_bundle_of_this_kind_is_refused
        if len(found) != len(resources):
            raise ValueError
    except ValueError:
        raise ModelSignatureError(BundleCheck.FORMAT) from None
    return found


def _object(members: dict[str, object], name: str) -> dict[str, object]:
    value = members.get(name)
    # refusal: test_what_is_no_bundle_of_this_kind_is_refused
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _list(members: dict[str, object], name: str) -> list[object]:
    value = members.get(name)
    # refusal: test_what_is_no_bundle_of_this_kind_is_refused
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value
