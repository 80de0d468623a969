"""Who sealed it: a COSE_Sign1 over the manifest's digest, believed under the provider's keys of the measured configuration.

A signature takes the place of a pinned digest: the provider can release without a new configuration, and old releases are
refused by version alone (`artifact.min_version`, the verdict's floor). It lies beside the manifest as an OCI artifact whose
`subject` is the manifest, so that copying tools carry both. Only a digest that a pinned key has signed is ever parsed.
Does not fetch. `FORMAT.md`, "Signature"; RFC 9052 §4.2 and §4.4, RFC 9053 §2, RFC 9864 on why `alg` and key must agree.
"""

from collections.abc import Iterable, Sequence

import cbor2
import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from agent import cose as c
from agent.artifact import manifest as m
from agent.cose import PrivateKey, PublicKey, Signature, key_id
from agent.errors import ManifestSignatureError, SignatureCheck

COSE_TYPE = 'application/cose; cose-type="cose-sign1"'
MAX_SIGNATURE_BYTES = 1 << 10
MAX_SIGNATURE_MANIFEST_BYTES = 16 << 10
MAX_SIGNATURES = 16
"""Of one manifest that are looked at: several keys while one is replaced, and whatever a store adds."""

_LABEL = "keyturn/v1/manifest"


def parse_provider_key(pem: str) -> PublicKey:
    """One pinned key: PEM SubjectPublicKeyInfo of P-256, P-384 or Ed25519. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("not a PEM public key") from error
    # refusal: test_only_keys_of_three_kinds_can_be_pinned
    if not c.is_ours(key):
        raise ValueError("not a P-256, P-384 or Ed25519 key")
    assert isinstance(key, PublicKey)
    return key


def parse_signing_key(pem: bytes) -> PrivateKey:
    """The provider's own key: unencrypted PKCS#8 PEM of the same three kinds. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it wants a password
        raise ValueError("not an unencrypted PEM private key") from None
    if not isinstance(key, PrivateKey) or not c.is_ours(key.public_key()):
        raise ValueError("not a P-256, P-384 or Ed25519 key")
    return key


def public_pem(key: PrivateKey) -> str:
    """What belongs into `artifact.provider_keys`."""
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def sign_manifest(manifest_digest: str, key: PrivateKey) -> bytes:
    """The COSE_Sign1 of a manifest, at most 1 KiB.

    Args:
        manifest_digest: `sha256:` and 64 hexadecimal digits.
        key: the provider's.
    """
    return c.sign(_payload(manifest_digest), key)


def verify_signatures(candidates: Iterable[bytes], manifest_digest: str, keys: Sequence[PublicKey]) -> None:
    """Return when one of the candidates is a pinned key's signature over this manifest.

    A bad one beside a good one is no harm: a store can add what it likes, and could as well leave the good one out.

    Args:
        candidates: COSE_Sign1 bytes as a store has them, read one after the other.
        manifest_digest: `sha256:` and 64 hexadecimal digits, of the bytes that are about to be parsed.
        keys: `artifact.provider_keys`.

    Raises:
        ManifestSignatureError: the check that the best candidate failed; MISSING without one.
    """
    best = SignatureCheck.MISSING
    order = list(SignatureCheck)
    for candidate in candidates:
        failed = _check(candidate, manifest_digest, keys)
        if failed is None:
            return
        best = max(best, failed, key=order.index)
    # refusal: test_a_signature_with_one_defect_is_refused_for_it
    raise ManifestSignatureError(best)


def parse_signature(cose: bytes) -> Signature | None:
    """A COSE_Sign1 as this format has it, unverified; None: it is none. There is one way only to write it."""
    return c.parse(cose, MAX_SIGNATURE_BYTES)


def _check(cose: bytes, manifest_digest: str, keys: Sequence[PublicKey]) -> SignatureCheck | None:
    """What is wrong with one signature; None: nothing."""
    found = parse_signature(cose)
    if found is None:
        return SignatureCheck.MALFORMED
    key = next((key for key in keys if key_id(key) == found.key_id), None)
    if key is None:
        return SignatureCheck.KEY
    if found.algorithm != c.algorithm_of(key):  # a key signs with one algorithm
        return SignatureCheck.ALGORITHM
    if found.payload != _payload(manifest_digest):
        return SignatureCheck.MANIFEST
    try:
        c.verify(found, key)
    except InvalidSignature:
        return SignatureCheck.SIGNATURE
    return None


def _payload(manifest_digest: str) -> bytes:
    return cbor2.dumps([_LABEL, bytes.fromhex(manifest_digest.removeprefix("sha256:"))], canonical=True)


# --- the OCI artifact around it ---------------------------------------------------------------------------------------


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: int


class _SignatureManifest(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int
    media_type: str
    artifact_type: str
    config: _Descriptor
    layers: tuple[_Descriptor, ...]
    subject: _Descriptor


def pack_signature_manifest(manifest_bytes: bytes, cose: bytes) -> bytes:
    """The manifest that says: this blob signs that manifest. Canonical JSON; the blobs are `cose` and `EMPTY`."""
    return msgspec.json.encode(
        _SignatureManifest(
            schema_version=2,
            media_type=m.MANIFEST_TYPE,
            artifact_type=m.SIGNATURE_TYPE,
            config=_Descriptor(m.EMPTY_TYPE, m.digest_of(m.EMPTY), len(m.EMPTY)),
            layers=(_Descriptor(COSE_TYPE, m.digest_of(cose), len(cose)),),
            subject=_Descriptor(m.MANIFEST_TYPE, m.digest_of(manifest_bytes), len(manifest_bytes)),
        ),
        order="sorted",
    )


def parse_signature_manifest(data: bytes, manifest_digest: str) -> str | None:
    """The digest of the COSE_Sign1 that a candidate manifest names for `manifest_digest`; None: it is another's, or no such
    thing. Nothing authenticates it, and nothing has to: the signature does that for itself.
    """
    try:
        found = msgspec.json.decode(data, type=_SignatureManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if found.artifact_type != m.SIGNATURE_TYPE or found.subject.digest != manifest_digest or len(found.layers) != 1:
        return None
    (layer,) = found.layers
    return layer.digest if layer.media_type == COSE_TYPE and m.is_digest(layer.digest) else None
