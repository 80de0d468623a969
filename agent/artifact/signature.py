"""Who sealed it: a COSE_Sign1 over the manifest's digest, believed under the provider's keys of the measured configuration.

A signature takes the place of a pinned digest: the provider can release without a new configuration, and old releases are
refused by version alone (`artifact.min_version`, the verdict's floor). It lies beside the manifest as an OCI artifact whose
`subject` is the manifest, so that copying tools carry both. Only a digest that a pinned key has signed is ever parsed.
Does not fetch. `FORMAT.md`, "Signature"; RFC 9052 §4.2 and §4.4, RFC 9053 §2, RFC 9864 on why `alg` and key must agree.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cbor2
import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from agent.artifact import manifest as m
from agent.errors import ManifestSignatureError, SignatureCheck

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

COSE_TYPE = 'application/cose; cose-type="cose-sign1"'
MAX_SIGNATURE_BYTES = 1 << 10
MAX_SIGNATURE_MANIFEST_BYTES = 16 << 10
MAX_SIGNATURES = 16
"""Of one manifest that are looked at: several keys while one is replaced, and whatever a store adds."""

_LABEL = "keyturn/v1/manifest"
_COSE_SIGN1 = 18
_ALG, _KID = 1, 4
_ES256, _ES384, _EDDSA = -7, -35, -8
_CURVES: dict[str, tuple[int, int, type[hashes.SHA256] | type[hashes.SHA384]]] = {
    "secp256r1": (_ES256, 32, hashes.SHA256),
    "secp384r1": (_ES384, 48, hashes.SHA384),
}


@dataclass(frozen=True, slots=True)
class Signature:
    """A COSE_Sign1 that nobody has verified.

    Attributes:
        algorithm: COSE's number: -7 ES256, -35 ES384, -8 EdDSA.
        key_id: SHA-256 of the signer's SubjectPublicKeyInfo, so they say.
        protected: the encoded header.
        payload: what they say they signed.
        signature: r ‖ s, or Ed25519's 64 bytes.
    """

    algorithm: int
    key_id: bytes
    protected: bytes
    payload: bytes
    signature: bytes


def parse_provider_key(pem: str) -> PublicKey:
    """One pinned key: PEM SubjectPublicKeyInfo of P-256, P-384 or Ed25519. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("not a PEM public key") from error
    # refusal: test_only_keys_of_three_kinds_can_be_pinned
    if not _is_ours(key):
        raise ValueError("not a P-256, P-384 or Ed25519 key")
    assert isinstance(key, PublicKey)
    return key


def parse_signing_key(pem: bytes) -> PrivateKey:
    """The provider's own key: unencrypted PKCS#8 PEM of the same three kinds. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it wants a password
        raise ValueError("not an unencrypted PEM private key") from None
    if not isinstance(key, PrivateKey) or not _is_ours(key.public_key()):
        raise ValueError("not a P-256, P-384 or Ed25519 key")
    return key


def public_pem(key: PrivateKey) -> str:
    """What belongs into `artifact.provider_keys`."""
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def key_id(key: PublicKey) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo, 32 bytes."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()


def sign_manifest(manifest_digest: str, key: PrivateKey) -> bytes:
    """The COSE_Sign1 of a manifest, at most 1 KiB.

    Args:
        manifest_digest: `sha256:` and 64 hexadecimal digits.
        key: the provider's.
    """
    public = key.public_key()
    protected = cbor2.dumps({_ALG: _algorithm(public), _KID: key_id(public)}, canonical=True)
    signed = _signed(protected, manifest_digest)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(signed)
    else:
        _, length, digest = _CURVES[key.curve.name]
        r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(digest())))
        signature = r.to_bytes(length) + s.to_bytes(length)
    return cbor2.dumps(cbor2.CBORTag(_COSE_SIGN1, [protected, {}, _payload(manifest_digest), signature]), canonical=True)


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
    try:
        if len(cose) > MAX_SIGNATURE_BYTES:
            return None
        tag = cbor2.loads(cose)
        protected, unprotected, payload, signature = tag.value
        header = cbor2.loads(protected)
        canonical = cbor2.dumps(tag, canonical=True) == cose and cbor2.dumps(header, canonical=True) == protected
    except Exception:  # noqa: BLE001  # cbor2 lets through what its constructors and the bytes provoke
        return None
    # Nothing unprotected, and nothing that we do not understand.
    if not canonical or not isinstance(tag, cbor2.CBORTag) or tag.tag != _COSE_SIGN1 or unprotected != {}:
        return None
    if not isinstance(header, dict):
        return None
    if header.keys() != {_ALG, _KID} or not isinstance(header[_ALG], int) or not isinstance(header[_KID], bytes):
        return None
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        return None
    return Signature(header[_ALG], header[_KID], protected, payload, signature)


def _check(cose: bytes, manifest_digest: str, keys: Sequence[PublicKey]) -> SignatureCheck | None:
    """What is wrong with one signature; None: nothing."""
    found = parse_signature(cose)
    if found is None:
        return SignatureCheck.MALFORMED
    key = next((key for key in keys if key_id(key) == found.key_id), None)
    if key is None:
        return SignatureCheck.KEY
    if found.algorithm != _algorithm(key):  # a key signs with one algorithm
        return SignatureCheck.ALGORITHM
    if found.payload != _payload(manifest_digest):
        return SignatureCheck.MANIFEST
    try:
        _verify(key, found.signature, _signed(found.protected, manifest_digest))
    except InvalidSignature:
        return SignatureCheck.SIGNATURE
    return None


def _verify(key: PublicKey, signature: bytes, signed: bytes) -> None:
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, signed)
        return
    _, length, digest = _CURVES[key.curve.name]
    if len(signature) != 2 * length:
        raise InvalidSignature
    r, s = int.from_bytes(signature[:length]), int.from_bytes(signature[length:])
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(digest()))


def _is_ours(key: object) -> bool:
    return isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    )


def _algorithm(key: PublicKey) -> int:
    return _EDDSA if isinstance(key, ed25519.Ed25519PublicKey) else _CURVES[key.curve.name][0]


def _payload(manifest_digest: str) -> bytes:
    return cbor2.dumps([_LABEL, bytes.fromhex(manifest_digest.removeprefix("sha256:"))], canonical=True)


def _signed(protected: bytes, manifest_digest: str) -> bytes:
    """Sig_structure of RFC 9052 §4.4."""
    return cbor2.dumps(["Signature1", protected, b"", _payload(manifest_digest)], canonical=True)


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
