"""Where the bytes of a configuration come from, before anybody knows whether they may decide.

Owns the bound on their size, and the rule that one source decides: two are an error, never an order of preference. Does not
parse the configuration (`config.py`) and does not compare digests (`evidence/collect.py`). Standard library only, because
the supervisor imports it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from agent.closed import Ident
from agent.errors import ConfigConflictError, ConfigError, ConfigProblem, InitdataError, InitdataProblem
from agent.guest.initdata import DEVICE, MAX_DOCUMENT_BYTES, Initdata, find_device, parse_initdata

MAX_CONFIG_BYTES = 1 << 20
ENTRY = "keyturn.toml"
INITDATA_FILE = Ident("initdata-file")

FILE = Ident("file")
_KATA = Ident("kata-initdata")
_IMAGE = Ident("image")
_KATA_PATH = "run/confidential-containers/initdata/initdata.toml"
_IMAGE_PATH = "etc/keyturn/keyturn.toml"


@dataclass(frozen=True, slots=True)
class FoundConfig:
    """A configuration that may decide once the TEE's field holds `fit(digest, …)`.

    Attributes:
        data: at most 1 MiB. Not printed: a configuration may hold secrets.
        digest: SHA-256 of a plain file; the digest of the initdata document at hand, 32, 48 or 64 bytes; empty without one,
            when the launch measurement covers the file: the field must then be zero, for initdata whose bytes nobody has
            must stop the boot.
        source: `file`, `initdata-file`, `kata-initdata`, `initdata-device` or `image`.
        initdata: the document at hand, of at most 4 MiB; None without one.
    """

    data: bytes = field(repr=False)
    digest: bytes
    source: Ident
    initdata: bytes | None = field(default=None, repr=False)


def read_bounded(file: str) -> bytes:
    """The bytes of a configuration file, `-` for standard input.

    Raises:
        ConfigError: not readable, or above 1 MiB.
    """
    return _check_size(_read(file, MAX_CONFIG_BYTES))


def from_file(file: str) -> FoundConfig:
    """A configuration file, `-` for standard input; its SHA-256 is what the guest is launched with.

    Raises:
        ConfigError: not readable, or above 1 MiB.
    """
    import hashlib  # not every source needs it

    data = read_bounded(file)
    return FoundConfig(data, hashlib.sha256(data).digest(), FILE)


def read_document(file: str) -> bytes:
    """The bytes of an initdata document, `-` for standard input: at most one byte more than `parse_initdata` takes.

    Raises:
        ConfigError: not readable.
    """
    return _read(file, MAX_DOCUMENT_BYTES)


def from_initdata_file(file: str) -> FoundConfig:
    """The entry `keyturn.toml` of an initdata document, `-` for standard input.

    Raises:
        ConfigError: not readable, or the entry is above 1 MiB.
        InitdataError: not an initdata document of at most 4 MiB, or it has no such entry.
    """
    document = read_document(file)
    return _found_in(parse_initdata(document, INITDATA_FILE), INITDATA_FILE, document)


def find_in_guest(root: Path = Path("/")) -> FoundConfig | None:
    """The one configuration of this guest: the initdata's entry, or the image's file; None when there is neither.

    Only for an agent that is part of the measured guest image. In a container `/etc` is whatever the host had pulled, and the
    launch measurement knows nothing of it.

    Args:
        root: the guest's file system.

    Raises:
        ConfigConflictError: two configurations, or two initdata documents.
        ConfigError: there but not readable, or above 1 MiB.
        InitdataError: not a usable document, or without the entry in an image without the file.
    """
    # Links are followed, and nothing is checked before it is opened: whoever can change a path of this root can change this
    # program. What the host can change is the disk, each time it is read; a document is hashed in the bytes it is parsed in.
    # 1. Kata's initdata. kata-agent writes the file from the disk, so the same bytes in both are one source.
    kata, device = _read_if_there(root / _KATA_PATH, MAX_DOCUMENT_BYTES), find_device(root)
    # refusal: test_two_sources_are_a_conflict_even_when_they_agree
    if kata is not None and device is not None and kata != device:
        raise ConfigConflictError(_KATA, DEVICE)
    document, source = (device, DEVICE) if kata is None else (kata, _KATA)

    # 2. The image's file.
    image = _read_if_there(root / _IMAGE_PATH, MAX_CONFIG_BYTES)
    if document is None:
        return None if image is None else FoundConfig(_check_size(image), b"", _IMAGE)

    # 3. Which of them decides. Initdata about other things leaves it to the image, and is compared all the same.
    initdata = parse_initdata(document, source)
    if image is None:
        return _found_in(initdata, source, document)
    # refusal: test_two_sources_are_a_conflict_even_when_they_agree
    if ENTRY in initdata.entries:
        raise ConfigConflictError(source, _IMAGE)
    return FoundConfig(_check_size(image), initdata.digest, _IMAGE, document)


def _found_in(initdata: Initdata, source: Ident, document: bytes) -> FoundConfig:
    data = initdata.entry(ENTRY)
    # refusal: test_an_initdata_file_without_the_entry_is_no_configuration
    if data is None:
        raise InitdataError(source, InitdataProblem.NO_ENTRY)
    return FoundConfig(_check_size(data), initdata.digest, source, document)


def _check_size(data: bytes) -> bytes:
    # refusal: test_every_source_has_its_bound
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(ConfigProblem.TOO_LARGE)
    return data


def _read(file: str, max_bytes: int) -> bytes:
    """At most one byte more than `max_bytes`."""
    try:
        if file == "-":
            return sys.stdin.buffer.read(max_bytes + 1)
        with Path(file).open("rb") as stream:
            return stream.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND) from error


def _read_if_there(file: Path, max_bytes: int) -> bytes | None:
    """At most one byte more than `max_bytes`; what is there and cannot be read is an error, not an absence."""
    try:
        with file.open("rb") as stream:
            return stream.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND) from error
