"""The provider's side of an encrypted volume: a model folder becomes one disk image, and a manifest in an OCI image layout.

Without root, loop devices or tools: the file system, its hash tree, LUKS2's header and AES-XTS are written here, in one pass
and constant memory, and no plaintext reaches the disk. What kernel, cryptsetup and veritysetup make of them the tests ask them.
"""

import base64
import contextlib
import hashlib
import hmac
import io
import json
import os
import uuid as uuids
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

from agent.artifact import erofs, luks2, seal
from agent.artifact import manifest as m
from agent.artifact import volume_config as v
from agent.artifact.blobs import open_inside
from agent.artifact.stream import key_commitment
from agent.closed import Ident
from agent.cose import PrivateKey
from agent.errors import (
    KeyMismatchError,
    MalformedManifestError,
    SealError,
    SealProblem,
    VolumeAuthenticationError,
)

DATA_OFFSET = 1 << 20
HEADER_BYTES = luks2.HEADER_SIZES[0]
_SECOND_MAGIC = b"SKUL\xba\xbe"
_DIGEST_ITERATIONS = 1000  # cryptsetup's least: it protects a passphrase, and this key is random
_CHUNK_BYTES = 1 << 20


def seal_volume(
    model_dir: Path,
    image: Path,
    out_dir: Path,
    key: bytes,
    key_uri: str,
    name: str,
    version: int,
    progress: Callable[[int, int], None],
    signing_keys: Sequence[PrivateKey] = (),
) -> str:
    """Seal the files of a folder into one disk image, and name its manifest `<name>-v<version>` in an OCI image layout.

    Args:
        model_dir: as `seal.seal_model`, and so `out_dir`, `key`, `key_uri`, `name`, `version`, `signing_keys`.
        image: a new file, to be written to a disk as it is.
        out_dir: see there.
        key: see there.
        key_uri: see there.
        name: see there.
        version: see there.
        progress: called with the bytes of the file system that are done and in all.
        signing_keys: see there.

    Returns:
        The manifest digest, `sha256:…`.

    Raises:
        SealError: as `seal.seal_model`; nothing was left behind.
    """
    model, out = seal.check_places(model_dir, out_dir, name, version, key_uri)
    target = Path(os.path.realpath(image))
    if target.is_relative_to(model) or target.is_relative_to(out):
        raise SealError(SealProblem.INSIDE)
    try:
        sizes = seal.list_model(model)
        with contextlib.ExitStack() as lock, contextlib.ExitStack() as undo:
            blobs = seal.open_layout(out, lock, undo)
            index = seal.read_index(out, f"{name}-v{version}")
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            undo.callback(target.unlink, missing_ok=True)
            with open(descriptor, "r+b", buffering=0) as stream:
                writing = _Writing(stream.fileno(), model, sizes, key, key_uri, progress)
                config = writing.run(name, version)
                os.fsync(descriptor)
            config_bytes, manifest_bytes = v.pack_config(config), v.pack_manifest(config)
            _check(config, config_bytes, manifest_bytes)
            for blob in (m.EMPTY, config_bytes):
                seal.write_blob(blobs, blob, undo)
            digest = seal.publish(out, blobs, index, manifest_bytes, f"{name}-v{version}", signing_keys, undo)
            undo.pop_all()
    except FileExistsError as error:
        raise SealError(SealProblem.SEALED_BEFORE) from error
    except OSError as error:
        raise SealError(SealProblem.IO, code=error.errno or 0) from error
    return digest


def check_volume(image: Path, config: v.VolumeConfig, key: bytes, progress: Callable[[int, int], None]) -> None:
    """Read a whole image as the kernel would: every block authenticates, and the tree is there.

    Args:
        image: the file, or a disk.
        config: of the authenticated manifest.
        key: 32 bytes.
        progress: called with the bytes of the file system that are done and in all.

    Raises:
        KeyMismatchError, VolumeHeaderError, VolumeAuthenticationError: not what was sealed.
        SealError: it cannot be read.
    """
    if not hmac.compare_digest(key_commitment(key, config.key_uri), config.key_commitment):
        raise KeyMismatchError()
    volume_key = bytearray(luks2.KEY_BYTES)
    v.derive_key(key, config.key_uri, config.uuid, volume_key)
    try:
        with image.open("rb", buffering=0) as stream:
            header = _read(stream, luks2.BINARY_BYTES)
            found = luks2.look(header)
            header += _read(stream, found[1] - luks2.BINARY_BYTES if found else 0)
            v.check_header(luks2.parse_luks2(header), config)

            def compare(block: int, expected: bytes) -> None:
                if crypt_block(volume_key, block, _read_block(stream, config, block), encrypt=False) != expected:
                    raise VolumeAuthenticationError()

            tree = HashTree(config.data_blocks, config.hash_block, config.salt, compare)
            for block in range(config.data_blocks):
                tree.add(crypt_block(volume_key, block, _read_block(stream, config, block), encrypt=False))
                progress((block + 1) * v.BLOCK_BYTES, config.data_bytes)
            if tree.finish() != config.root_hash:
                raise VolumeAuthenticationError()
    except OSError as error:
        raise SealError(SealProblem.IO, code=error.errno or 0) from error


def _read_block(stream: io.FileIO, config: v.VolumeConfig, block: int) -> bytes:
    data = os.pread(stream.fileno(), v.BLOCK_BYTES, config.data_offset + block * v.BLOCK_BYTES)
    if len(data) != v.BLOCK_BYTES:
        raise VolumeAuthenticationError()
    return data


def _check(config: v.VolumeConfig, config_bytes: bytes, manifest_bytes: bytes) -> None:
    """Our own reader accepts it: what breaks a limit is not published."""
    try:
        manifest = m.parse_manifest(manifest_bytes, m.digest_of(manifest_bytes), (m.VOLUME_CONFIG_TYPE,))
        if v.parse_volume(config_bytes, manifest) != config:
            raise RuntimeError("a volume must read back as it was written")
    except MalformedManifestError as error:
        raise SealError(SealProblem.BAD_VALUE, error.field) from error


class _Writing:
    """One image on its way: blocks in, ciphertext and hashes out."""

    def __init__(
        self,
        target: int,
        model: Path,
        sizes: dict[str, int],
        key: bytes,
        key_uri: str,
        progress: Callable[[int, int], None],
    ) -> None:
        self._target, self._model, self._sizes = target, model, sizes
        self._key, self._key_uri, self._progress = key, key_uri, progress
        self._uuid = str(uuids.UUID(bytes=os.urandom(16), version=4))
        self._volume_key = bytearray(luks2.KEY_BYTES)
        v.derive_key(key, key_uri, self._uuid, self._volume_key)
        try:
            self._image = erofs.plan(sizes, os.urandom(16))
        except ValueError:
            raise SealError(SealProblem.BAD_VALUE, Ident("size")) from None
        self._tree = HashTree(self._image.blocks, self._image.blocks, os.urandom(v.SALT_BYTES), self._write)

    def run(self, name: str, version: int) -> v.VolumeConfig:
        """Write everything. Raises OSError, SealError."""
        self._put(0, self._image.head)
        for path, size in self._sizes.items():
            self._put_file(path, size)
        config = v.VolumeConfig(
            model_name=Ident(name),
            version=version,
            key_uri=Ident(self._key_uri),
            key_commitment=key_commitment(self._key, self._key_uri),
            uuid=self._uuid,
            data_offset=DATA_OFFSET,
            sector_size=v.BLOCK_BYTES,
            data_blocks=self._image.blocks,
            hash_block=self._image.blocks,
            root_hash=self._tree.finish(),
            salt=self._tree.salt,
        )
        os.truncate(self._target, -(-(DATA_OFFSET + config.segment_bytes) // _CHUNK_BYTES) * _CHUNK_BYTES)
        os.pwrite(self._target, pack_luks2(config, bytes(self._volume_key), os.urandom), 0)
        return config

    def _put_file(self, path: str, size: int) -> None:
        with open(open_inside(self._model, path), "rb", buffering=0) as stream:
            for done in range(0, size, _CHUNK_BYTES):
                wanted = min(_CHUNK_BYTES, size - done)
                chunk = _read(stream, wanted)
                if len(chunk) != wanted:
                    raise SealError(SealProblem.CHANGED, Ident.of_peer(path))
                self._put(self._image.starts[path] + done // v.BLOCK_BYTES, chunk)
            if stream.read(1):
                raise SealError(SealProblem.CHANGED, Ident.of_peer(path))

    def _put(self, block: int, data: bytes) -> None:
        """Blocks of the file system, in order; the last of them may be cut short."""
        data = data.ljust(-(-len(data) // v.BLOCK_BYTES) * v.BLOCK_BYTES, b"\0")
        for at in range(0, len(data), v.BLOCK_BYTES):
            self._tree.add(data[at : at + v.BLOCK_BYTES])
        self._write(block, data)
        self._progress(block * v.BLOCK_BYTES + len(data), self._image.blocks * v.BLOCK_BYTES)

    def _write(self, block: int, data: bytes) -> None:
        """Encrypt whole blocks and write them to their place in the segment."""
        sealed = bytearray()
        for at in range(0, len(data), v.BLOCK_BYTES):
            piece = data[at : at + v.BLOCK_BYTES]
            sealed += crypt_block(self._volume_key, block + at // v.BLOCK_BYTES, piece, encrypt=True)
        view, offset = memoryview(sealed), DATA_OFFSET + block * v.BLOCK_BYTES
        while view:
            done = os.pwrite(self._target, view, offset)
            view, offset = view[done:], offset + done


def _read(stream: io.FileIO, size: int) -> bytes:
    """Up to the end of the file: one read(2) may give less."""
    data = bytearray()
    while len(data) < size and (piece := stream.read(size - len(data))):
        data += piece
    return bytes(data)


class HashTree:
    """dm-verity's hash tree, format 1 with SHA-256: the root's block first, each level behind the one above it."""

    def __init__(self, data_blocks: int, hash_block: int, salt: bytes, write: Callable[[int, bytes], None]) -> None:
        """`write` gets the number of a block and the block, for each of the tree, in constant memory."""
        self.salt = salt
        self._write = write
        self._salted = hashlib.sha256(salt)
        lengths, blocks = [], data_blocks
        while blocks > 1:
            blocks = -(-blocks // v.HASHES_PER_BLOCK)
            lengths.append(blocks)
        self._next = [hash_block + sum(lengths[level + 1 :]) for level in range(len(lengths))]  # level 0 hashes data
        self._hashes = [bytearray() for _ in lengths]
        self._root = b""

    def add(self, block: bytes, level: int = 0) -> None:
        """Take the next block below `level`."""
        self._hashes[level] += self._hash(block)
        if len(self._hashes[level]) == v.BLOCK_BYTES:
            self._flush(level)

    def finish(self) -> bytes:
        """The root hash, once every block was added."""
        for level, hashes in enumerate(self._hashes):
            if hashes:
                self._flush(level)
        return self._root

    def _flush(self, level: int) -> None:
        block = bytes(self._hashes[level]).ljust(v.BLOCK_BYTES, b"\0")
        self._hashes[level].clear()
        self._write(self._next[level], block)
        self._next[level] += 1
        if level + 1 < len(self._hashes):
            self.add(block, level + 1)
        else:
            self._root = self._hash(block)

    def _hash(self, block: bytes) -> bytes:
        salted = self._salted.copy()
        salted.update(block)
        return salted.digest()


def crypt_block(key: bytes | bytearray, block: int, data: bytes, *, encrypt: bool) -> bytes:
    """4096 bytes as dm-crypt has them with `sector_size:4096` and `plain64`: the tweak counts sectors of 512 bytes."""
    tweak = (block * v.BLOCK_BYTES // v.SECTOR_BYTES).to_bytes(16, "little")
    cipher = Cipher(AES(key), XTS(tweak))
    return (cipher.encryptor() if encrypt else cipher.decryptor()).update(data)


def pack_luks2(config: v.VolumeConfig, volume_key: bytes, random: Callable[[int], bytes]) -> bytes:
    """Both copies of a header without keyslots, as `cryptsetup luksErase` leaves one: it is opened with the key itself."""
    salt = random(32)
    digest = hashlib.pbkdf2_hmac("sha256", volume_key, salt, _DIGEST_ITERATIONS)
    segment = {
        "type": "crypt",
        "offset": str(config.data_offset),
        "size": "dynamic",
        "iv_tweak": "0",
        "encryption": luks2.CIPHER,
        "sector_size": config.sector_size,
    }
    checked = {
        "type": "pbkdf2",
        "keyslots": [],
        "segments": ["0"],
        "hash": "sha256",
        "iterations": _DIGEST_ITERATIONS,
        "salt": base64.b64encode(salt).decode(),
        "digest": base64.b64encode(digest).decode(),
    }
    sizes = {
        "json_size": str(HEADER_BYTES - luks2.BINARY_BYTES),
        "keyslots_size": str(config.data_offset - 2 * HEADER_BYTES),
    }
    metadata = {"keyslots": {}, "tokens": {}, "segments": {"0": segment}, "digests": {"0": checked}, "config": sizes}
    text = json.dumps(metadata, separators=(",", ":")).encode().ljust(HEADER_BYTES - luks2.BINARY_BYTES, b"\0")
    copies = b""
    for magic, offset in ((luks2.MAGIC, 0), (_SECOND_MAGIC, HEADER_BYTES)):
        fields = (
            magic,
            luks2.VERSION,
            HEADER_BYTES,
            1,
            b"",
            b"sha256",
            random(64),
            config.uuid.encode(),
            b"",
            offset,
            b"",
            b"",
        )
        copies += luks2.with_checksum(luks2.BINARY.pack(*fields).ljust(luks2.BINARY_BYTES, b"\0") + text)
    return copies
