"""COSE_Sign1 as our formats have it: one algorithm a key, nothing unprotected, and one way only to write it.

Owns bytes and signatures; what is signed, and whose keys count, is said by whoever calls: manifests
(`artifact/signature.py`), receipts (`receipt.py`).
RFC 9052 §4.2 and §4.4, RFC 9053 §2, RFC 9864 on why `alg` and key must agree.
"""

import hashlib
from dataclasses import dataclass

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

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


def is_ours(key: object) -> bool:
    """Is it a public key of P-256, P-384 or Ed25519?"""
    return isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    )


def spki(key: PublicKey) -> bytes:
    """The DER SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: PublicKey) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo, 32 bytes."""
    return hashlib.sha256(spki(key)).digest()


def algorithm_of(key: PublicKey) -> int:
    """The one that this key signs with, by COSE's number."""
    return _EDDSA if isinstance(key, ed25519.Ed25519PublicKey) else _CURVES[key.curve.name][0]


def sign(payload: bytes, key: PrivateKey) -> bytes:
    """The COSE_Sign1 of `payload`, which is in it."""
    public = key.public_key()
    protected = cbor2.dumps({_ALG: algorithm_of(public), _KID: key_id(public)}, canonical=True)
    signed = _signed(protected, payload)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(signed)
    else:
        _, length, digest = _CURVES[key.curve.name]
        r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(digest())))
        signature = r.to_bytes(length) + s.to_bytes(length)
    return cbor2.dumps(cbor2.CBORTag(_COSE_SIGN1, [protected, {}, payload, signature]), canonical=True)


def parse(cose: bytes, max_bytes: int) -> Signature | None:
    """A COSE_Sign1 as our formats have it, unverified; None: it is none, or longer."""
    try:
        if len(cose) > max_bytes:
            return None
        tag = cbor2.loads(cose)
        protected, _, payload, signature = tag.value
        header = cbor2.loads(protected)
        algorithm, key_id = header[_ALG], header[_KID]
        # Written by us these parts are the same bytes. Python takes a set for an array, and `true` for 1.
        # refusal: test_receipt.py::test_what_python_takes_for_the_same_is_malformed
        if cbor2.dumps({_ALG: algorithm, _KID: key_id}, canonical=True) != protected:
            return None
        # refusal: test_receipt.py::test_what_python_takes_for_the_same_is_malformed
        if cbor2.dumps(cbor2.CBORTag(_COSE_SIGN1, [protected, {}, payload, signature]), canonical=True) != cose:
            return None
    except Exception:  # noqa: BLE001  # cbor2 lets through what its constructors and the bytes provoke
        return None
    if type(algorithm) is not int or not all(isinstance(part, bytes) for part in (key_id, payload, signature)):
        return None
    return Signature(algorithm, key_id, protected, payload, signature)


def verify(found: Signature, key: PublicKey) -> None:
    """`key` signed it. That key, algorithm and payload are the right ones is for the caller.

    Raises:
        InvalidSignature: it did not.
    """
    signed = _signed(found.protected, found.payload)
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(found.signature, signed)
        return
    _, length, digest = _CURVES[key.curve.name]
    # refusal: test_artifact_signature.py::test_a_signature_with_one_defect_is_refused_for_it
    if len(found.signature) != 2 * length:
        raise InvalidSignature
    r, s = int.from_bytes(found.signature[:length]), int.from_bytes(found.signature[length:])
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(digest()))


def _signed(protected: bytes, payload: bytes) -> bytes:
    """Sig_structure of RFC 9052 §4.4."""
    return cbor2.dumps(["Signature1", protected, b"", payload], canonical=True)
