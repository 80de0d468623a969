"""Where sealed models lie: byte ranges of blobs, into buffers of the caller.

A source is untrusted and checks nothing about contents: manifest and config are compared with their digests where they
are parsed, segments authenticate themselves. It neither retries nor caches; it says whether trying again could help.
"""

from typing import Protocol
from urllib.parse import urlsplit

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem


class BlobSource(Protocol):
    """Manifests by name or digest, blobs by digest. Safe for any number of threads; close it when none of them is inside.

    A network read also ends, as a timeout, at the limits of the reading thread (`http_limited.py`).
    """

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        """A manifest as the store has it: whoever parses it authenticates it first.

        Args:
            reference: `sha256:` and 64 hexadecimal digits, or a tag.
            max_bytes: a longer manifest is not read.

        Raises:
            ArtifactUnavailableError: as `read_blob`.
            MalformedManifestError: the index of a layout is not one.
        """

    def referrers(self, digest: str) -> tuple[str, ...]:
        """Digests of the manifests that may be signatures of the manifest `digest`, at most 64, the newest last.

        Raises:
            ArtifactUnavailableError, MalformedManifestError: as `read_manifest`.
        """

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        """A small blob as a whole, as the store has it: whoever parses it compares the digest first.

        Args:
            digest: `sha256:` and 64 hexadecimal digits.
            max_bytes: a longer blob is not read.

        Raises:
            ArtifactUnavailableError: not there, not readable, too long; `retryable` says whether to try again.
        """

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        """Fill `out` from `offset` of a blob.

        Args:
            digest: `sha256:` and 64 hexadecimal digits.
            offset: bytes from the start of the blob.
            out: the caller's buffer; at least one byte.

        Returns:
            Bytes written to the front of `out`; fewer than its length only where the blob ends.

        Raises:
            ArtifactUnavailableError: no answer, or one that does not fit; `retryable` says whether to try again.
        """

    def close(self) -> None:
        """Give descriptors and connections back."""


class LayoutSource(BlobSource, Protocol):
    """An OCI image layout as a folder or below a URL."""

    def read_index(self, max_bytes: int) -> bytes:
        """`index.json`, which nothing authenticates: for people, never for a boot. Raises as `read_blob`."""


def open_source(location: str, ca_pem: str | None, timeout_s: float) -> LayoutSource:
    """The source at a location.

    Args:
        location: a path, `dir:///path`, `file:///path` (neither percent-encoded), or an http(s) URL of the layout's root.
        ca_pem: the only CAs to trust for https, PEM; None: the system's.
        timeout_s: seconds for one request over a network, from connecting to the last byte, redirects included.

    Raises:
        ConfigError: the location cannot be one (`artifact.source`).
        ArtifactUnavailableError: there is no such folder, or no CA to trust.
    """
    from agent.artifact.sources.directory import DirectorySource
    from agent.artifact.sources.http import HttpSource

    scheme, colon, rest = location.partition("://")
    if not colon:
        return DirectorySource(location)
    if scheme in ("dir", "file") and rest.startswith("/"):
        return DirectorySource(rest)
    try:
        parts = urlsplit(location)
        # Credentials would end up in places that show the source; a query cannot be joined with a blob's path.
        clean = location.isascii() and not any(character in location for character in "@?#")
        if clean and scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return HttpSource(location, ca_pem, timeout_s)
    except ValueError:  # urllib3's LocationValueError is one
        pass
    raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.source"))
