"""Where sealed models lie: byte ranges of blobs, into buffers of the caller.

A source is untrusted and checks nothing about contents: manifest and config are compared with their digests where they
are parsed, segments authenticate themselves. It neither retries nor caches; it says whether trying again could help.
"""

import re
from typing import Protocol
from urllib.parse import urlsplit

from agent.artifact.sources.access import ANONYMOUS, Access
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ConfigError, ConfigProblem, CredentialsProblem, StoreCredentialsError
from agent.proxy import Proxy, is_loopback
from agent.store_credentials import StoreCredentials

_QUERY = re.compile(r"[!$-;=?-Z_a-z~]{1,1024}")  # RFC 3986: no fragment, no brackets, nothing that is no text
_HEADER_TEXT = re.compile(r"[ -~]+")  # as `store_credentials.py` has it of what the broker gives


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
    """A store that can tell what it has, as the index of an OCI image layout does."""

    def read_index(self, max_bytes: int) -> bytes:
        """`index.json`, which nothing authenticates: for people, never for a boot. Raises as `read_blob`."""


def open_source(
    location: str, ca_pem: str | None, timeout_s: float, access: Access = ANONYMOUS, proxy: Proxy | None = None
) -> LayoutSource:
    """The source at a location.

    Args:
        location: a path, `dir:///path`, `file:///path` (neither percent-encoded), an http(s) URL of a layout's root,
            with the query that signs its requests, if they have one; `oci://host[:port]/repository` (`oci+http://` without
            TLS), or `s3://bucket[/prefix]` of a layout's root.
        ca_pem: the only CAs to trust for https, PEM; None: the system's.
        timeout_s: seconds for one request over a network, from connecting to the last byte, redirects included.
        access: credentials, for registries and S3 only.
        proxy: on the way to https servers.

    Raises:
        ConfigError: the location cannot be one (`artifact.source`), credentials would be sent in the open
            (`artifact.secret`, and `artifact.source` where a query is one), or fit into no header (`artifact.user`,
            `artifact.session_token`).
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
        if scheme in ("oci", "oci+http"):
            from agent.artifact.sources.oci import OciSource, Repository

            repository = Repository.parse(location)
            check_secrecy(repository.url, access)
            return OciSource(repository, ca_pem, access, timeout_s, proxy)
        if scheme == "s3":
            from agent.artifact.sources.s3 import Bucket, S3Source

            bucket = Bucket.parse(location, access)
            check_secrecy(bucket.url, access)
            for key, text in (("user", access.user), ("session_token", access.session_token)):
                # refusal: test_artifact_sources_s3.py::test_what_fits_into_no_header_is_a_configuration_error
                if text is not None and not _HEADER_TEXT.fullmatch(text):
                    raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"artifact.{key}"))
            return S3Source(bucket, ca_pem, access, timeout_s, proxy)
        url, mark, query = location.partition("?")
        parts = urlsplit(url)
        # Credentials before the host would end up in places that show the source.
        clean = url.isascii() and "@" not in url and "#" not in url and bool(mark) == bool(_QUERY.fullmatch(query))
        if clean and scheme in ("http", "https") and parts.hostname and parts.port != 0:
            # refusal: test_artifact_sources.py::test_a_signed_query_goes_over_tls_only
            if query and scheme == "http" and not is_loopback(parts.hostname):
                raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.source"))
            return HttpSource(url, ca_pem, timeout_s, proxy, query)
    except ValueError:  # urllib3's LocationValueError is one
        pass
    raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.source"))


def open_configured(
    config: ArtifactConfig, timeout_s: float, proxy: Proxy | None = None, released: StoreCredentials | None = None
) -> LayoutSource:
    """The source that the measured configuration names.

    Args:
        config: of the artifact.
        timeout_s: as `open_source`.
        proxy: as `open_source`.
        released: what the broker gave for `artifact.credentials_uri`, and only for that.

    Raises:
        StoreCredentialsError: they are not for this kind of store.
        AgentError: as `open_source`.
    """
    if (config.credentials_uri is None) != (released is None):
        raise RuntimeError("credentials come from where the configuration says")
    mine = released or config
    # refusal: test_artifact_sources_mirrors.py::test_a_session_token_from_the_broker_is_for_a_bucket
    if released is not None and released.session_token is not None and not config.source.startswith("s3://"):
        raise StoreCredentialsError(CredentialsProblem.NOT_A_BUCKET)
    access = Access(mine.user, mine.secret, mine.session_token, config.endpoint, config.region or ANONYMOUS.region)
    return open_source(config.source, config.ca_pem, timeout_s, access, proxy)


def check_secrecy(url: str, access: Access) -> None:
    """Credentials go over TLS, or stay inside this guest. Raises ConfigError: `artifact.secret`."""
    parts = urlsplit(url)
    # refusal: test_artifact_sources_oci.py::test_credentials_in_the_open_are_a_configuration_error
    if access.secret is not None and parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.secret"))
