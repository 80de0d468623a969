"""Secrets of this boot: locked memory, our ephemeral key, the released model key and its unwrapping.

The model key comes as JWE (RFC 7516, flattened JSON) to our ephemeral P-256 key: `ECDH-ES+A256KW`, `A256GCM`, nothing
else. It is opened by primitives straight into locked memory, so no Python string or bytes object ever holds it. The
intermediate keys (ECDH secret, key-encryption key, content key) do pass through bytes objects, which Python cannot wipe:
they live in guest memory until the worker exits, and open only what was sealed to this boot. Or the guest's own
confidential-data-hub has the key, and it is read from a socket of the loopback straight into locked memory.

Does not decide when the key may be opened: `unwrap` takes a `SecuredDevices`, which only the gate makes. The credentials of
the model's store come sealed in the same way, before the key, and need no gate: what they open is ciphertext, worth nothing
without the key, and what the store says to them must show before the gate, as a VM passes that once.
"""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from agent.closed import Ident
from agent.errors import CredentialsProblem, KeyUnwrapError, StoreCredentialsError, UnwrapCheck
from agent.evidence.gate import SecuredDevices
from agent.handshake import MAX_JWE_BYTES, KeptCredentials, KeptKey, SealedCredentials, SealedKey, TeePublicKey
from agent.jose import COORDINATE_BYTES, parse_b64url, parse_object, parse_point, string
from agent.store_credentials import MAX_CREDENTIALS_BYTES, StoreCredentials, is_credentials_length, parse_credentials
from agent.tink_keyset import MAX_KEYSET_BYTES, copy_key

KEY_BYTES = 32
ALGORITHM = "ECDH-ES+A256KW"
ENCRYPTION = "A256GCM"

_IV_BYTES = 12
_TAG_BYTES = 16
_WRAPPED_KEY_BYTES = KEY_BYTES + 8  # RFC 3394: one block of integrity check
_MADV_WIPEONFORK = 18  # linux/mman.h; the mmap module has no name for it


class SecretBuffer:
    """Memory for one secret: anonymous, not in core files, not in a forked child, locked against swap where allowed.

    Attributes:
        locked: mlock(2) succeeded; false where RLIMIT_MEMLOCK forbids it.
    """

    __slots__ = ("_map", "_size", "locked")

    def __init__(self, size: int) -> None:
        """Zeroed memory of `size` bytes, on pages of its own."""
        self._map: mmap.mmap | None = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._size = size
        # refusal: test_secret_memory_is_locked_and_in_no_core_and_in_no_child
        self._map.madvise(mmap.MADV_DONTDUMP)
        # refusal: test_a_forked_child_sees_zeros
        self._map.madvise(_MADV_WIPEONFORK)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.locked = ctypes.CDLL(None).mlock(ctypes.c_void_p(start), ctypes.c_size_t(size)) == 0

    def __len__(self) -> int:
        return self._size

    def view(self) -> memoryview:
        """The secret itself, to be handed to a primitive and released; RuntimeError after `wipe`."""
        if self._map is None:
            raise RuntimeError("secret was wiped")
        return memoryview(self._map)

    def wipe(self) -> None:
        """Overwrite with zeros, for views still held elsewhere too, and let the pages go. May be called again."""
        if self._map is not None:
            # refusal: test_wiping_zeroes_the_memory_under_every_view
            self._map[:] = bytes(self._size)
            self._map = None

    def __repr__(self) -> str:
        return f"<secret, {self._size} bytes>"

    def __reduce__(self) -> NoReturn:
        # refusal: test_secrets_print_as_their_size_and_are_neither_copied_nor_pickled
        raise TypeError("a secret is not copied or pickled")


class EphemeralKey:
    """Our EC P-256 key pair of one handshake. Destroyed by `unwrap`, whatever its outcome; before that by what fails."""

    __slots__ = ("_private", "public")

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        """Take over a P-256 private key; a boot calls `generate`."""
        numbers = private.public_key().public_numbers()
        self._private: ec.EllipticCurvePrivateKey | None = private
        self.public = TeePublicKey(numbers.x.to_bytes(COORDINATE_BYTES), numbers.y.to_bytes(COORDINATE_BYTES))

    @classmethod
    def generate(cls) -> Self:
        """A new key pair from the operating system's randomness."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def exchange(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """The ECDH shared secret, 32 bytes; RuntimeError once destroyed."""
        if self._private is None:
            raise RuntimeError("ephemeral key was destroyed")
        return self._private.exchange(ec.ECDH(), peer)

    def destroy(self) -> None:
        """Drop the private key; OpenSSL clears it when it frees it."""
        self._private = None

    def __repr__(self) -> str:
        return "<ephemeral key>"

    def __reduce__(self) -> NoReturn:
        # refusal: test_secrets_print_as_their_size_and_are_neither_copied_nor_pickled
        raise TypeError("a secret is not copied or pickled")


class ReleasedKey:
    """The model key, 32 bytes, for as long as its `with` block lasts."""

    __slots__ = ("key_id", "key_version", "secret")

    def __init__(self, secret: SecretBuffer, key_id: Ident, key_version: int) -> None:
        self.secret = secret
        self.key_id = key_id
        self.key_version = key_version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        # refusal: test_unwrap_releases_the_key_and_destroys_the_ephemeral_key
        self.secret.wipe()


def unwrap(sealed: SealedKey | KeptKey, key: EphemeralKey, secured: SecuredDevices) -> ReleasedKey:
    """Open the sealed model key, or fetch the kept one. The ephemeral key is destroyed, also on failure.

    Args:
        sealed: what the broker released.
        key: the key pair of the same handshake.
        secured: the proof that the GPU gate was passed.

    Raises:
        KeyUnwrapError: the JWE is malformed, not for us, not of the one allowed algorithm, or holds no model key.
        AgentError: whatever the fetch of a kept key raised.
    """
    # refusal: test_nothing_is_unwrapped_before_the_gate
    if not isinstance(secured, SecuredDevices):
        raise RuntimeError("the gate comes before the key")
    secret = SecretBuffer(KEY_BYTES)
    try:
        if isinstance(sealed, KeptKey):
            _fetch(sealed, secret.view())
        else:
            open_jwe(sealed.jwe, key, secret.view())
    except BaseException:
        secret.wipe()  # some of it may be there
        raise
    finally:
        # refusal: test_the_ephemeral_key_is_destroyed_when_unwrap_fails
        key.destroy()
    return ReleasedKey(secret, sealed.key_id, sealed.key_version)


def open_credentials(sealed: SealedCredentials | KeptCredentials, key: EphemeralKey) -> StoreCredentials:
    """Open the credentials of the store, or fetch the kept ones. The ephemeral key is left for the model key; not on failure.

    Args:
        sealed: what the broker released.
        key: the key pair of the same handshake.

    Raises:
        StoreCredentialsError: the JWE does not open, or what it holds is not credentials.
        AgentError: whatever the fetch of kept credentials raised.
    """
    content = SecretBuffer(MAX_CREDENTIALS_BYTES)
    credentials = None
    try:
        with content.view() as whole:
            if isinstance(sealed, KeptCredentials):
                length = sealed.fetch(whole)
            else:
                length = _decrypt(parse_jwe(sealed.jwe, is_credentials_length), key, whole)
            with whole[:length] as resource:
                credentials = parse_credentials(resource)
        return credentials
    except KeyUnwrapError as error:
        if error.check is UnwrapCheck.LENGTH:
            raise StoreCredentialsError(CredentialsProblem.LENGTH) from None
        raise StoreCredentialsError(CredentialsProblem.SEALED, error.check) from None
    except ValueError:
        raise StoreCredentialsError(CredentialsProblem.FORM) from None
    finally:
        # refusal: test_credentials_leave_nothing_in_the_memory_they_were_opened_in
        content.wipe()
        # refusal: test_the_ephemeral_key_is_destroyed_when_credentials_do_not_open
        if credentials is None:
            key.destroy()


def _fetch(kept: KeptKey, out: memoryview) -> None:
    """The key from where it is kept, by way of locked memory."""
    content = SecretBuffer(MAX_KEYSET_BYTES)
    try:
        with content.view() as resource:
            copy_model_key(resource[: kept.fetch(resource)], out)
    finally:
        # refusal: test_nothing_of_what_was_fetched_stays_beside_the_key
        content.wipe()


@dataclass(frozen=True, slots=True)
class Jwe:
    """A sealed key taken apart: every length is right and the sender's key is a point of our curve.

    Attributes:
        protected: as received, base64url: it is what the tag covers.
    """

    protected: bytes
    sender: ec.EllipticCurvePublicKey = field(repr=False)
    wrapped_key: bytes = field(repr=False)
    iv: bytes = field(repr=False)
    sealed: bytes = field(repr=False)  # ciphertext and tag


def open_jwe(jwe: bytes, key: EphemeralKey, out: memoryview) -> None:
    """Decrypt a flattened JWE of at most 8 KiB into `out` (32 bytes), which holds nothing to be used on failure.

    Raises:
        KeyUnwrapError: as `unwrap`; one check is named, never a value.
    Spec: RFC 7516 §5.2, RFC 7518 §4.6 and §5.3.
    """
    parts = parse_jwe(jwe)
    content = SecretBuffer(len(parts.sealed) - _TAG_BYTES)
    try:
        with content.view() as opened:
            _decrypt(parts, key, opened)
            copy_model_key(opened, out)
    finally:
        content.wipe()


def _decrypt(parts: Jwe, key: EphemeralKey, into: memoryview) -> int:
    """Decrypt to the front of `into`, which is long enough and holds nothing to be used on failure. Gives the length."""
    # 1. ECDH, Concat KDF (RFC 7518 §4.6.2, empty party info), AES key wrap.
    other_info = _length_prefixed(ALGORITHM.encode()) + _length_prefixed(b"") * 2 + (KEY_BYTES * 8).to_bytes(4)
    key_encryption_key = ConcatKDFHash(hashes.SHA256(), KEY_BYTES, other_info).derive(key.exchange(parts.sender))
    try:
        content_key = aes_key_unwrap(key_encryption_key, parts.wrapped_key)
    except InvalidUnwrap:
        raise KeyUnwrapError(UnwrapCheck.KEY_WRAP) from None

    # 2. AES-GCM into locked memory; the header is authenticated as it was received.
    length = len(parts.sealed) - _TAG_BYTES
    try:
        with into[:length] as opened:
            AESGCM(content_key).decrypt_into(parts.iv, parts.sealed, parts.protected, opened)
    except InvalidTag:
        raise KeyUnwrapError(UnwrapCheck.CONTENT) from None
    return length


def is_key_length(length: int) -> bool:
    """Can a KBS resource of so many bytes be a model key, as it is or as a Tink keyset?"""
    return KEY_BYTES <= length <= MAX_KEYSET_BYTES


def parse_jwe(jwe: bytes, is_length: Callable[[int], bool] = is_key_length) -> Jwe:
    """All of a sealed key that can be checked without our private key: so nobody passes the gate for what opens never.

    Args:
        jwe: flattened JSON, at most 8 KiB.
        is_length: of what is sealed.

    Raises:
        KeyUnwrapError: as `unwrap`; one check is named, never a value.
    Spec: RFC 7516, RFC 7518 §4.6; Trustee's form of them: exactly these members, no apu, apv, zip, crit.
    """
    # 1. Exactly the five members, each canonical base64url and of its one possible length.
    try:
        members = parse_object(jwe, MAX_JWE_BYTES)
        # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
        if set(members) != {"protected", "encrypted_key", "iv", "ciphertext", "tag"}:
            raise ValueError
        protected = string(members, "protected")
        header = parse_object(parse_b64url(protected), MAX_JWE_BYTES)
        wrapped, iv, ciphertext, tag = (
            parse_b64url(string(members, name)) for name in ("encrypted_key", "iv", "ciphertext", "tag")
        )
        # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
        if (len(wrapped), len(iv), len(tag)) != (_WRAPPED_KEY_BYTES, _IV_BYTES, _TAG_BYTES):
            raise ValueError
        # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
        if set(header) != {"alg", "enc", "epk"}:
            raise ValueError
    except ValueError:
        raise KeyUnwrapError(UnwrapCheck.FORMAT) from None

    # 2. One algorithm; nothing is negotiated.
    # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
    if header["alg"] != ALGORITHM or header["enc"] != ENCRYPTION:
        raise KeyUnwrapError(UnwrapCheck.ALGORITHM)

    # 3. The sender's ephemeral key is a point of our curve (an invalid point would leak our private key bit by bit).
    try:
        epk = header["epk"]
        # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
        if not isinstance(epk, dict) or set(epk) != {"kty", "crv", "x", "y"}:
            raise ValueError
        point = parse_point(epk)
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(point.x), int.from_bytes(point.y), ec.SECP256R1())
        # refusal: test_what_joserfc_seals_opens
        sender = numbers.public_key()
    except ValueError:
        raise KeyUnwrapError(UnwrapCheck.EPHEMERAL_KEY) from None

    # 4. Only contents that can be what was asked for, a model key's bytes or its Tink keyset; GCM keeps lengths.
    # refusal: test_a_sealed_key_that_is_not_exactly_ours_is_refused
    if not is_length(len(ciphertext)):
        raise KeyUnwrapError(UnwrapCheck.LENGTH)

    return Jwe(protected.encode("ascii"), sender, wrapped, iv, ciphertext + tag)


def copy_model_key(resource: memoryview, out: memoryview) -> None:
    """Write the model key of a KBS resource into `out`.

    Args:
        resource: 32 bytes, or a Tink JSON keyset.
        out: 32 bytes; after an error it holds nothing to be used.

    Raises:
        KeyUnwrapError: it is neither.
    """
    if len(resource) == KEY_BYTES:
        out[:] = resource
        return
    try:
        # refusal: test_tink_keyset.py::test_a_keyset_that_is_not_exactly_ours_is_refused
        copy_key(resource, out)
    except ValueError:
        raise KeyUnwrapError(UnwrapCheck.KEYSET) from None


def _length_prefixed(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data
