"""The sealed model: what the other steps know of it once it lies open in guest memory.

Formats are `stream.py` and `manifest.py`, bytes come from `sources/`, memory is `memory.py`, and `load.py` joins them.
Standard library only, because the supervisor imports it.
"""

import enum
from dataclasses import dataclass

from agent.closed import Ident


class DestinationKind(enum.Enum):
    """Where plaintext may lie."""

    TMPFS = "tmpfs"  # our own, attached nowhere until it is complete
    MEMFD = "memfd"  # one sealed memory file
    VOLUME = "volume"  # no memory of ours: a verified file system over an encrypted disk, detached until it is published
    DIRECTORY = "directory"  # somebody else's tmpfs: plaintext there survives our death


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """One plaintext file: its path below the model's root and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A model as its authenticated manifest has it, before anything of it is open.

    Attributes:
        version: 0 of a model without versions.
        files: in any order; none of a volume, whose files are known when it is open.
    """

    name: Ident
    version: int
    manifest_digest: str
    files: tuple[LoadedFile, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Which sealed model it is: the digest of its manifest, `sha256:…`, and its version."""

    manifest_digest: str
    version: int


@dataclass(frozen=True, slots=True)
class LoadedArtifact:
    """A model whose every byte was authenticated, closed for writing. Only `load.load` makes one.

    Attributes:
        files: in the order of the file table.
        destination: what `descriptors` and `directory` mean.
        descriptors: TMPFS, VOLUME: one detached read-only mount, to be attached. MEMFD: one sealed file. DIRECTORY: the mark,
            with its lock. They belong to the undo stack of the boot: send them on before it is unwound.
        directory: DIRECTORY: the published folder. Else None.
        noswap: the kernel never swaps this memory.
    """

    model_name: Ident
    manifest_digest: str
    version: int
    files: tuple[LoadedFile, ...]
    destination: DestinationKind
    descriptors: tuple[int, ...]
    directory: str | None
    noswap: bool

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)
