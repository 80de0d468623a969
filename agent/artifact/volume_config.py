"""The manifest of an encrypted volume: what the disk must be, and the two tables that the kernel gets for it.

Owns the JSON (`FORMAT.md`, "Encrypted volume"), the derivation of the disk's key and the strings of dm-crypt and dm-verity.
Does not fetch, and opens nothing. Everything in a table comes from the authenticated manifest; the disk's own header can only
differ from it, and then nothing is opened. Tables follow the kernel's `device-mapper/dm-crypt.rst` and `verity.rst`.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.artifact import manifest as m
from agent.artifact.luks2 import CIPHER, HEADER_SIZES, KEY_BYTES, UUID, Luks2Header
from agent.artifact.manifest import require
from agent.closed import Ident
from agent.errors import VolumeHeaderError

BLOCK_BYTES = 4096
"""Of data and of the hash tree."""
SECTOR_BYTES = 512
"""The device mapper's unit, whatever the disk's is."""
SECTOR_SIZES = (512, 4096)
"""Of one encryption."""
HASH_BYTES = 32
SALT_BYTES = 32
HASHES_PER_BLOCK = BLOCK_BYTES // HASH_BYTES
MAX_OFFSET = 1 << 40
MAX_BLOCKS = 1 << 32
"""16 TiB: what EROFS can address."""

_KEY_INFO = b"keyturn/v1/volume-key\x00"


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """What an encrypted volume says of itself.

    Attributes:
        uuid: of the LUKS2 header.
        data_offset: where the encrypted segment begins on the disk, bytes.
        sector_size: of one encryption, bytes.
        data_blocks: of the file system, at the start of the segment.
        hash_block: where the hash tree begins, in blocks from the start of the segment.
        root_hash: of the tree, and `salt` before every block of it.
        salt: see `root_hash`.
    """

    model_name: Ident
    version: int
    key_uri: Ident
    key_commitment: bytes
    uuid: str
    data_offset: int
    sector_size: int
    data_blocks: int
    hash_block: int
    root_hash: bytes
    salt: bytes

    @property
    def data_bytes(self) -> int:
        """Of the file system."""
        return self.data_blocks * BLOCK_BYTES

    @property
    def segment_bytes(self) -> int:
        """Of what is encrypted: the file system, perhaps a gap, the hash tree."""
        return (self.hash_block + tree_blocks(self.data_blocks)) * BLOCK_BYTES


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal["keyturn/v1/volume"]
    model_name: str
    version: int
    key_uri: str
    key_commitment: str
    uuid: str
    data_offset: int
    sector_size: int
    data_blocks: int
    hash_block: int
    root_hash: str
    salt: str


AnyModel = m.ModelConfig | VolumeConfig


def parse_model(config_bytes: bytes, manifest: m.Manifest) -> AnyModel:
    """The config blob of a manifest of either kind. Raises as `manifest.parse_config`."""
    return (parse_volume if manifest.config_type == m.VOLUME_CONFIG_TYPE else m.parse_config)(config_bytes, manifest)


def parse_volume(config_bytes: bytes, manifest: m.Manifest) -> VolumeConfig:
    """Parse the config blob of an authenticated manifest.

    Args:
        config_bytes: the bytes as they came from a store.
        manifest: what `parse_manifest` returned.

    Raises:
        MalformedManifestError: not the manifest's config blob, or it breaks a rule of `FORMAT.md`; `field` says where.
    """
    # 1. The right bytes, in their one spelling.
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(len(config_bytes) == manifest.config_bytes, "config.size")
    require(m.digest_of(config_bytes) == manifest.config_digest, "config.digest")
    raw = m.decode(config_bytes, _Config, "config")
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(m.canonical(raw) == config_bytes, "config.canonical")
    # 2. Names and numbers.
    m.check_identity(raw.model_name, raw.version, raw.key_uri)
    # refusal: test_a_config_blob_with_one_defect_is_refused_at_that_field
    require(UUID.fullmatch(raw.uuid) is not None, "uuid")
    require(2 * HEADER_SIZES[0] <= raw.data_offset <= MAX_OFFSET and raw.data_offset % BLOCK_BYTES == 0, "data_offset")
    require(raw.sector_size in SECTOR_SIZES, "sector_size")
    require(2 <= raw.data_blocks <= MAX_BLOCKS, "data_blocks")  # the tree of one block has no block
    require(raw.data_blocks <= raw.hash_block <= 2 * MAX_BLOCKS, "hash_block")
    return VolumeConfig(
        model_name=Ident(raw.model_name),
        version=raw.version,
        key_uri=Ident(raw.key_uri),
        key_commitment=m.unhex(raw.key_commitment, 32, "key_commitment"),
        uuid=raw.uuid,
        data_offset=raw.data_offset,
        sector_size=raw.sector_size,
        data_blocks=raw.data_blocks,
        hash_block=raw.hash_block,
        root_hash=m.unhex(raw.root_hash, HASH_BYTES, "root_hash"),
        salt=m.unhex(raw.salt, SALT_BYTES, "salt"),
    )


def pack_config(config: VolumeConfig) -> bytes:
    """The config blob of a volume: for every accepted input the inverse of `parse_volume`."""
    return m.canonical(
        _Config(
            schema="keyturn/v1/volume",
            model_name=str(config.model_name),
            version=config.version,
            key_uri=str(config.key_uri),
            key_commitment=config.key_commitment.hex(),
            uuid=config.uuid,
            data_offset=config.data_offset,
            sector_size=config.sector_size,
            data_blocks=config.data_blocks,
            hash_block=config.hash_block,
            root_hash=config.root_hash.hex(),
            salt=config.salt.hex(),
        )
    )


def pack_manifest(config: VolumeConfig) -> bytes:
    """The manifest of a volume, in canonical JSON."""
    layer = m.Descriptor(m.EMPTY_TYPE, m.digest_of(m.EMPTY), len(m.EMPTY))
    return m.pack_oci(m.VOLUME_CONFIG_TYPE, pack_config(config), (layer,), config.model_name, config.version)


def check_header(header: Luks2Header, config: VolumeConfig) -> None:
    """The disk's header says what the manifest says. Raises VolumeHeaderError, with what it does not."""
    size = header.size is None or header.size >= config.segment_bytes
    same = {
        "uuid": header.uuid == config.uuid,
        "segments[].offset": header.offset == config.data_offset,
        "segments[].sector_size": header.sector_size == config.sector_size,
        "segments[].size": size,
    }
    for field, holds in same.items():
        # refusal: test_a_header_that_is_not_the_manifests_is_refused
        if not holds:
            raise VolumeHeaderError(Ident(field))


def derive_key(key: memoryview | bytes, config_uri: str, uuid: str, out: memoryview | bytearray) -> None:
    """The disk's own key, 64 bytes, into `out`: another for every volume, so that no two share a key and a tweak.

    Args:
        key: the model key, 32 bytes.
        config_uri: the key's URI.
        uuid: of the volume.
        out: 64 bytes of the caller's.
    """
    info = _KEY_INFO + config_uri.encode() + b"\x00" + uuid.encode()
    HKDF(SHA256(), KEY_BYTES, salt=b"", info=info).derive_into(key, out)


def tree_blocks(data_blocks: int) -> int:
    """Blocks of the hash tree over at least two blocks of data, its root block included."""
    total = 0
    while data_blocks > 1:
        data_blocks = -(-data_blocks // HASHES_PER_BLOCK)
        total += data_blocks
    return total


def crypt_table(config: VolumeConfig, disk: str) -> tuple[int, str]:
    """Sectors and parameters of dm-crypt; `{key}` stands for the key in hexadecimal digits.

    Args:
        config: of the authenticated manifest.
        disk: `major:minor`.
    """
    options = "" if config.sector_size == SECTOR_BYTES else f" 1 sector_size:{config.sector_size}"
    parameters = f"{CIPHER} {{key}} 0 {disk} {config.data_offset // SECTOR_BYTES}{options}"
    return config.segment_bytes // SECTOR_BYTES, parameters


def verity_table(config: VolumeConfig, segment: str) -> tuple[int, str]:
    """Sectors and parameters of dm-verity over the decrypted segment, `major:minor`.

    A block that does not authenticate is an I/O error, never data: the reader fails, and the agent, which is alive to see it,
    says why. `panic_on_corruption` would lose that, `restart_on_corruption` too.
    """
    parameters = (
        f"1 {segment} {segment} {BLOCK_BYTES} {BLOCK_BYTES} {config.data_blocks} {config.hash_block} "
        f"sha256 {config.root_hash.hex()} {config.salt.hex()}"
    )
    return config.data_bytes // SECTOR_BYTES, parameters
