"""One JWE in compact serialisation that may be larger than memory: what stands before its ciphertext, and opening that in turn.

This is how KServe's confidential models lie in a store: `A256KW` or `dir`, with `A256GCM`; nothing else is read. Its plaintext
comes out before its tag was checked, since one tag covers the whole: whoever takes it must let nobody see it until `finish`
has returned. Does not know files, threads or sources. RFC 7516 §7.1, RFC 7518 §4.4, §4.5, §5.3.
"""

import binascii
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from agent.errors import KeyMismatchError
from agent.jose import parse_b64url, parse_object, string

MAX_HEAD_BYTES = 4 << 10
"""Header, wrapped key and IV; KServe's are below 200."""
TAIL_BYTES = 25
"""The tag with its dot, and a line end that an editor or a shell may have left."""
CHUNK_BYTES = 1 << 20
"""Of base64url, a multiple of 4: these come out as 768 KiB."""
MAX_PLAINTEXT_BYTES = (1 << 36) - 32
"""NIST SP 800-38D §5.2.1.1: more is not to be sealed under one nonce."""

_IV_BYTES = 12
_TAG_BYTES = 16
_WRAPPED_KEY_BYTES = 40
_ABOUT = {"kid", "typ", "cty"}  # what may stand in a header and means nothing here
_TO_BASE64 = bytes.maketrans(b"-_+/=", b"+/\0\0\0")  # the other alphabet's own digits must not pass as ours


@dataclass(frozen=True, slots=True)
class CompactJwe:
    """Everything but the ciphertext.

    Attributes:
        protected: as received: it is what the tag covers.
        wrapped_key: 40 bytes; empty for `dir`.
        start: of the ciphertext, bytes from the start of the file.
        text_bytes: of the ciphertext, base64url without padding.
    """

    protected: bytes
    wrapped_key: bytes = field(repr=False)
    iv: bytes
    tag: bytes
    start: int
    text_bytes: int

    @property
    def algorithm(self) -> str:
        """How the content key comes: `A256KW` or `dir`."""
        return "A256KW" if self.wrapped_key else "dir"

    @property
    def plaintext_bytes(self) -> int:
        return self.text_bytes * 3 // 4


def parse_compact(head: bytes, tail: bytes, size: int) -> CompactJwe:
    """Take a JWE apart without its ciphertext.

    Args:
        head: the first 4 KiB of the file, or all of it.
        tail: the last 25 bytes of the file, or all of it.
        size: of the file.

    Raises:
        ValueError: not such a JWE, or one of another algorithm. Says nothing about it.
    """
    try:
        protected, wrapped, iv, _ = head.split(b".", 3)
        # refusal: test_what_is_no_jwe_of_kserves_kind_is_refused
        members = parse_object(parse_b64url(protected.decode("ascii")), MAX_HEAD_BYTES)
        wrapped_key, nonce = parse_b64url(wrapped.decode("ascii")), parse_b64url(iv.decode("ascii"))
        end = tail.rstrip(b"\r\n")
        before, dot, tag_text = end.rpartition(b".")
        tag = parse_b64url(tag_text.decode("ascii"))
    except ValueError:
        raise ValueError("not a compact JWE") from None
    # refusal: test_what_is_no_jwe_of_kserves_kind_is_refused
    if string(members, "enc") != "A256GCM" or not members.keys() <= _ABOUT | {"alg", "enc"}:
        raise ValueError("algorithm")
    # refusal: test_what_is_no_jwe_of_kserves_kind_is_refused
    if {"A256KW": _WRAPPED_KEY_BYTES, "dir": 0}.get(string(members, "alg")) != len(wrapped_key):
        raise ValueError("algorithm")
    start = len(protected) + len(wrapped) + len(iv) + 3
    text_bytes = size - (len(tail) - len(before)) - start
    # refusal: test_what_is_no_jwe_of_kserves_kind_is_refused
    if not dot or (len(nonce), len(tag)) != (_IV_BYTES, _TAG_BYTES) or text_bytes < 0 or text_bytes % 4 == 1:
        raise ValueError("lengths")
    jwe = CompactJwe(protected, wrapped_key, nonce, tag, start, text_bytes)
    # refusal: test_a_jwe_of_more_than_one_nonce_may_seal_is_refused
    if jwe.plaintext_bytes > MAX_PLAINTEXT_BYTES:
        raise ValueError("size")
    return jwe


def decode(text: memoryview) -> bytes:
    """A piece of the ciphertext; needs no key.

    Args:
        text: base64url; a multiple of 4 bytes, except for the last.

    Raises:
        ValueError: not base64url.
    """
    base64 = text.tobytes().translate(_TO_BASE64) + b"=" * (-len(text) % 4)
    # refusal: test_damage_and_foreign_digits_do_not_authenticate
    return binascii.a2b_base64(base64, strict_mode=True)


class JweOpener:
    """Opens the ciphertext of one JWE from its start to its end."""

    def __init__(self, jwe: CompactJwe, key: memoryview) -> None:
        """Take the content key out of its wrapping.

        Args:
            jwe: as parsed.
            key: the model key, 32 bytes. With `A256KW` the content key passes through a bytes object, which Python cannot wipe.

        Raises:
            KeyMismatchError: the content key was not wrapped with it. For `dir`, nothing tells before the tag.
        """
        try:
            # aes_key_unwrap asks for bytes but takes whatever AES takes: no copy of the model key is made.
            content_key = aes_key_unwrap(key, jwe.wrapped_key) if jwe.wrapped_key else key
        except InvalidUnwrap:
            # refusal: test_a_key_that_did_not_wrap_it_is_told_apart_from_damage
            raise KeyMismatchError() from None
        self._decryptor = Cipher(algorithms.AES256(content_key), modes.GCM(jwe.iv, jwe.tag)).decryptor()
        self._decryptor.authenticate_additional_data(jwe.protected)

    def update(self, ciphertext: bytes | memoryview, out: memoryview) -> None:
        """The next of the ciphertext, decoded; `out` is of the same length."""
        self._decryptor.update_into(ciphertext, out)

    def finish(self) -> None:
        """Check the tag. Raises ValueError: what came out so far is not what was sealed."""
        try:
            # refusal: test_damage_and_foreign_digits_do_not_authenticate
            self._decryptor.finalize()
        except InvalidTag:
            raise ValueError("does not authenticate") from None
