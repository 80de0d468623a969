"""Where the broker finds model keys, and credentials of models' stores: the `KeyStore` Protocol and one that is a directory.

Does not decide who may have a key, and does not encrypt it: `policy.py` and `jwe.py` do.
"""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.closed import Ident
from agent.errors import BrokerFailureError
from agent.store_credentials import MAX_CREDENTIALS_BYTES, parse_credentials
from agent.tink_keyset import MAX_KEYSET_BYTES, parse_keyset

KEY_BYTES = 32
MAX_VERSION_BYTES = 10
_KEY_URI = re.compile(r"kbs:///([A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*){2})")
_VERSION = re.compile(rb"[1-9][0-9]{0,8}\n?")

# gRPC status codes: what the guest is told beside the reason.
_NOT_FOUND, _FAILED_PRECONDITION, _UNAVAILABLE = 5, 9, 14


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A model key: 32 bytes, its id (the key URI) and its version, from 1."""

    key: bytes = field(repr=False)
    key_id: Ident
    version: int


class KeyStore(Protocol):
    """Finds keys. Blocking; called in a worker thread, after every check of the request has passed."""

    def fetch(self, key_uri: Ident) -> StoredKey:
        """The key of `kbs:///repository/type/tag`.

        Raises:
            BrokerFailureError: there is no such key (reason KEY_NOT_FOUND), or the store cannot or must not be used.
        """

    def fetch_credentials(self, uri: Ident) -> bytes:
        """The credentials of `kbs:///repository/type/tag`, JSON of at most 4 KiB. Never what is something else, such as a key.

        Raises:
            BrokerFailureError: there are none (reason CREDENTIALS_NOT_FOUND), they are not credentials (CREDENTIALS_FILE), or
                the store cannot or must not be used.
        """


class DirectoryKeyStore:
    """`<directory>/<repository>/<type>/<tag>`: files of 32 bytes, a Tink keyset or credentials, of root or the broker, only for
    their owner.

    A key's version stands in a sibling `.<tag>.version` (a decimal number from 1); without one it is 1. The name cannot clash
    with a key, since no part of a key URI begins with a dot. Symbolic links are followed inside the directory only, so that
    a mounted Kubernetes secret works and a link to elsewhere does not.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def fetch(self, key_uri: Ident) -> StoredKey:
        path, key = self._find(key_uri, MAX_KEYSET_BYTES, "KEY_NOT_FOUND")
        # refusal: test_a_file_of_another_length_is_refused
        if len(key) != KEY_BYTES:
            try:
                key = parse_keyset(key)
            except ValueError:
                raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_FILE_LENGTH")) from None
        version = self._read(path.with_name(f".{path.name}.version"), MAX_VERSION_BYTES)
        # refusal: test_a_version_that_is_no_positive_number_is_refused
        if version is not None and not _VERSION.fullmatch(version):
            raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_VERSION_FILE"))
        return StoredKey(key, key_uri, int(version or 1))

    def fetch_credentials(self, uri: Ident) -> bytes:
        _, credentials = self._find(uri, MAX_CREDENTIALS_BYTES, "CREDENTIALS_NOT_FOUND")
        try:
            # refusal: test_what_is_no_credentials_is_not_given_as_such
            parse_credentials(memoryview(credentials))
        except ValueError:
            raise BrokerFailureError(_FAILED_PRECONDITION, Ident("CREDENTIALS_FILE")) from None
        return credentials

    def _find(self, uri: Ident, limit: int, absent: str) -> tuple[Path, bytes]:
        match = _KEY_URI.fullmatch(uri)
        # refusal: test_the_version_stands_in_a_sibling_that_no_key_uri_can_name
        if match is None:
            raise BrokerFailureError(_NOT_FOUND, Ident(absent))
        path = self._directory / match[1]
        found = self._read(path, limit)
        # refusal: test_a_store_that_is_not_there_has_no_keys
        if found is None:
            raise BrokerFailureError(_NOT_FOUND, Ident(absent))
        return path, found

    def _read(self, path: Path, limit: int) -> bytes | None:
        """At most `limit` + 1 bytes of a file that is ours alone; None when there is none."""
        try:
            real = path.resolve(strict=True)
            # refusal: test_a_link_out_of_the_store_is_refused
            if not real.is_relative_to(self._directory.resolve(strict=True)):
                raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_FILE_OUTSIDE_STORE"))
            # The resolved path has no links left; O_NONBLOCK, because a FIFO must not hang the broker.
            descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                # refusal: test_a_folder_is_no_key
                if not stat.S_ISREG(status.st_mode):
                    raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_FILE_TYPE"))
                # refusal: test_a_file_of_another_user_is_refused
                if status.st_uid not in (0, os.geteuid()):  # whoever owns it can change it, and the mode
                    raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_FILE_OWNER"))
                # refusal: test_a_file_that_others_may_use_is_refused
                if status.st_mode & 0o077:
                    raise BrokerFailureError(_FAILED_PRECONDITION, Ident("KEY_FILE_MODE"))
                return os.read(descriptor, limit + 1)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's word for a loop of links
            raise BrokerFailureError(_UNAVAILABLE, Ident("KEY_STORE_IO")) from error
