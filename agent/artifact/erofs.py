"""A file system image of plain files, for whoever seals a volume: EROFS, nothing compressed, everything read by everybody.

Owns where every byte of the image lies. Reads no file: contents are the caller's, at the blocks that are said here. Not
mkfs.erofs, because that keeps modes and links of the provider's machine, and needs the image once in clear on a disk.

Follows the kernel's `filesystems/erofs.rst` and fs/erofs/erofs_fs.h (Linux 5.10 and newer read it): extended inodes, flat data.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

BLOCK_BYTES = 4096
MAX_BLOCKS = (1 << 32) - 1

# magic, checksum, compat, blkszbits, extslots, root_nid, inos, build_time, its ns, blocks, meta and xattr blkaddr, uuid, name
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_MAGIC, _SUPERBLOCK_AT = 0xE0F5E1E2, 1024
# format, xattr_icount, mode, reserved, size, raw_blkaddr, ino, uid, gid, mtime and _nsec, nlink, reserved
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_EXTENDED_FLAT = 1
_ENTRY = struct.Struct("<QHBx")  # nid, nameoff, file_type
_FILE, _FOLDER = 1, 2
_INODES_AT = _SUPERBLOCK_AT + _SUPERBLOCK.size  # 1152, a multiple of an inode's 64 bytes
_SLOT_BYTES = 32


@dataclass(frozen=True, slots=True)
class Image:
    """An image whose files are still to be filled in.

    Attributes:
        head: its first blocks: superblock, inodes, folders.
        starts: path -> block at which that file's bytes begin; the rest of its last block is zeros.
        blocks: of the whole.
    """

    head: bytes
    starts: Mapping[str, int]
    blocks: int


def plan(sizes: Mapping[str, int], uuid: bytes) -> Image:
    """Lay out an image; the same arguments give the same bytes.

    Args:
        sizes: path -> bytes. Paths as `manifest.check_paths` wants them.
        uuid: 16 bytes.

    Raises:
        ValueError: more than 16 TiB.
    """
    folders: dict[str, dict[str, str]] = {"": {}}  # path -> name -> path
    for path in sizes:
        parent = ""
        *above, name = path.split("/")
        for part in above:
            inner = f"{parent}/{part}".lstrip("/")
            folders[parent][part] = inner
            folders.setdefault(inner, {})
            parent = inner
        folders[parent][name] = path
    nodes = [*folders, *sizes]  # the root is the first
    nids = {path: (_INODES_AT + _INODE.size * i) // _SLOT_BYTES for i, path in enumerate(nodes)}
    next_block = _blocks(_INODES_AT + _INODE.size * len(nodes))
    inodes, listings, starts = [], [], {}
    for i, path in enumerate(nodes):
        if path in folders:
            entries = {".": (nids[path], _FOLDER), "..": (nids[path.rpartition("/")[0]], _FOLDER)}
            entries |= {name: (nids[inner], _FOLDER if inner in folders else _FILE) for name, inner in folders[path].items()}
            listing = _listing(entries)
            listings.append(listing)
            size, mode, links = len(listing), 0o040555, 2 + sum(inner in folders for inner in folders[path].values())
        else:
            size, mode, links = sizes[path], 0o100444, 1
            starts[path] = next_block
        inodes.append(_INODE.pack(_EXTENDED_FLAT, 0, mode, 0, size, next_block, i + 1, 0, 0, 0, 0, links))
        next_block += _blocks(size)
        if next_block > MAX_BLOCKS:
            raise ValueError("more than 16 TiB")
    superblock = _SUPERBLOCK.pack(
        _MAGIC, 0, 0, BLOCK_BYTES.bit_length() - 1, 0, nids[""], len(nodes), 0, 0, next_block, 0, 0, uuid, b"", 0
    )
    head = _padded(bytes(_SUPERBLOCK_AT) + superblock + b"".join(inodes))
    return Image(head + b"".join(listings), starts, next_block)


def _listing(entries: Mapping[str, tuple[int, int]]) -> bytes:
    """The blocks of one folder: entries sorted by their bytes, each block with its own names."""
    listing, block, used = [], list[tuple[bytes, int, int]](), 0
    for encoded, nid, kind in sorted((name.encode(), *node) for name, node in entries.items()):
        if used + _ENTRY.size + len(encoded) > BLOCK_BYTES:
            listing.append(_pack_block(block))
            block, used = [], 0
        block.append((encoded, nid, kind))
        used += _ENTRY.size + len(encoded)
    return b"".join([*listing, _pack_block(block)])


def _pack_block(block: list[tuple[bytes, int, int]]) -> bytes:
    at, entries = _ENTRY.size * len(block), b""
    for name, nid, kind in block:
        entries += _ENTRY.pack(nid, at, kind)
        at += len(name)
    return _padded(entries + b"".join(name for name, _, _ in block))


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _padded(data: bytes) -> bytes:
    return data.ljust(_blocks(len(data)) * BLOCK_BYTES, b"\0")
