"""Boots from an encrypted disk: served from it, while its header is another by then; and what must not be served.

The disk is a file of this machine, which QEMU reads and we write as a host would.
"""

from dataclasses import replace
from pathlib import Path

from agent.artifact import luks2
from agent.artifact import manifest as m
from agent.artifact import volume_config as v
from agent.artifact.seal_volume import HEADER_BYTES, seal_volume
from tests.world import KEY_URI, World

VERSION = 4


def attach(world: World) -> None:
    """The world's model on a disk, and a configuration that wants it from there."""
    key = world.key_file.read_bytes()
    disk = disk_of(world)
    digest = seal_volume(world.folder / "source", disk, world.layout, key, KEY_URI, "tiny", VERSION, lambda *_: None)
    world.artifact |= {"format": "volume", "manifest_digest": digest, "min_version": VERSION}


def disk_of(world: World) -> Path:
    return world.folder / "volume.img"


def configured(world: World) -> v.VolumeConfig:
    """What the world's manifest says."""
    blobs, digest = world.layout / "blobs/sha256", world.artifact["manifest_digest"]
    data = (blobs / digest.removeprefix("sha256:")).read_bytes()
    manifest = m.parse_manifest(data, digest, (m.VOLUME_CONFIG_TYPE,))
    return v.parse_volume((blobs / manifest.config_digest.removeprefix("sha256:")).read_bytes(), manifest)


def null_cipher(world: World) -> None:
    """As a host would: the same header with another cipher, both copies, checksums and all."""
    disk = disk_of(world)
    with disk.open("r+b") as stream:
        for offset in (0, HEADER_BYTES):
            stream.seek(offset)
            header = stream.read(HEADER_BYTES)
            changed = header.replace(b'"encryption":"aes-xts-plain64"', b'"encryption":"cipher_null-ecb"')
            assert changed != header, "there is a cipher to change"
            stream.seek(offset)
            stream.write(luks2.with_checksum(changed))


def other_root(world: World) -> None:
    """A manifest, as authentic as any, of other contents."""
    config = configured(world)
    config = replace(config, root_hash=bytes(byte ^ 1 for byte in config.root_hash))
    blobs = world.layout / "blobs/sha256"
    packed = v.pack_manifest(config)
    for blob in (v.pack_config(config), packed):
        (blobs / m.digest_of(blob).removeprefix("sha256:")).write_bytes(blob)
    world.artifact["manifest_digest"] = m.digest_of(packed)


def volume_key(world: World) -> bytes:
    """What the disk is encrypted with."""
    key = bytearray(luks2.KEY_BYTES)
    v.derive_key(world.key_file.read_bytes(), KEY_URI, configured(world).uuid, key)
    return bytes(key)


def damage(world: World) -> None:
    """One bit in every block of the files: the first blocks, which are the file system's own, stay as they are."""
    _damage(world, range(3, configured(world).data_blocks))


def damage_folders(world: World) -> None:
    """One bit in every block but the first, which has superblock and inodes: it can be mounted."""
    _damage(world, range(1, configured(world).data_blocks))


def _damage(world: World, blocks: range) -> None:
    config = configured(world)
    with disk_of(world).open("r+b") as stream:
        for block in blocks:
            stream.seek(config.data_offset + block * v.BLOCK_BYTES)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 1]))
