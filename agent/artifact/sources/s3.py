"""An OCI image layout below a prefix of an S3 bucket: objects by ranged GET, signed where there are credentials.

An object that changes while it is read is refused: its first answer's ETag stands for it, later reads ask with If-Match and
compare what comes, since not every service obeys If-Match. Follows redirects within the endpoint only; does not list.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self
from urllib.parse import urlsplit

import urllib3

from agent.artifact.sources import sigv4
from agent.artifact.sources.access import Access
from agent.artifact.sources.directory import blob_path
from agent.artifact.sources.layout import NamedByIndex
from agent.artifact.sources.web import ANSWERS, Ask, WebClient, range_header, read_part, read_whole
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.proxy import Proxy

_AWS = "https://{bucket}.s3.{region}.amazonaws.com"
_LOCATION = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[^/?#\x00-\x20\x7f]+)*)/?")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.{}\[\]:-]+")
_REGION = re.compile(r"[a-z0-9-]{1,63}")
_ETAG = re.compile(r'"[!#-~]{1,256}"')
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where the layout is: the service's `url` with the bucket in its name or not, and the `path` of the layout, encoded."""

    url: str
    path: str

    @classmethod
    def parse(cls, location: str, access: Access) -> Self:
        """`s3://bucket[/prefix]` at the endpoint of `access`. Raises ValueError: one of them is none."""
        match = _LOCATION.fullmatch(location)
        endpoint = (_AWS if access.endpoint is None else access.endpoint).rstrip("/")
        if match is None or not _ENDPOINT.fullmatch(endpoint) or not _REGION.fullmatch(access.region):
            raise ValueError("not a bucket")
        bucket, prefix = match.groups()
        if any(part in (".", "..") for part in prefix.split("/")):  # on its way it would become another path
            raise ValueError("not a prefix")
        url = endpoint.replace("{region}", access.region)
        path = sigv4.encode_path(prefix) if "{bucket}" in url else f"/{bucket}{sigv4.encode_path(prefix)}"
        url = url.replace("{bucket}", bucket)
        parts = urlsplit(url)
        if "{" in url or not parts.hostname or parts.port == 0:
            raise ValueError("not an endpoint")
        return cls(url, path)


class S3Source(NamedByIndex):
    """Requests are signed anew each, so that a read later than a signature's life is none."""

    def __init__(
        self, bucket: Bucket, ca_pem: str | None, access: Access, timeout_s: float, proxy: Proxy | None = None
    ) -> None:
        self._bucket = bucket
        self._access = access
        self._web = WebClient(ca_pem, timeout_s, proxy)
        self._web.open_pool(bucket.url)
        parts = urlsplit(bucket.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self._host = f"{host}:{parts.port}" if parts.port not in (None, _PORTS[parts.scheme]) else str(host)
        self._lock = threading.Lock()
        self._etags: dict[str, str] = {}  # of blobs, of which a model has at most 100,000: 200 bytes each

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._read_all(blob_path(digest), max_bytes)

    def read_index(self, max_bytes: int) -> bytes:
        return self._read_all("index.json", max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        known = self._etags.get(digest)
        headers = range_header(offset, out) | ({} if known is None else {"If-Match": known})
        with self._get(blob_path(digest), headers) as response:
            # refusal: test_an_object_that_changes_between_two_reads_is_refused
            if response.status == 412:
                raise ArtifactUnavailableError(StoreProblem.CHANGED, response.status)
            if response.status != 416:
                self._check_same(digest, response.headers.get("ETag", ""))
            return read_part(response, offset, out)

    def close(self) -> None:
        self._web.close()

    def _check_same(self, digest: str, etag: str) -> None:
        if not _ETAG.fullmatch(etag):  # none, or a weak one, which says nothing of bytes
            return
        with self._lock:
            # refusal: test_an_object_that_changes_between_two_reads_is_refused
            if self._etags.setdefault(digest, etag) != etag:
                raise ArtifactUnavailableError(StoreProblem.CHANGED)

    def _read_all(self, name: str, max_bytes: int) -> bytes:
        with self._get(name, {}) as response:
            return read_whole(response, max_bytes)

    @contextmanager
    def _get(self, name: str, headers: Mapping[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        path = f"{self._bucket.path}/{name}"
        private: dict[str, str] = {}
        access = self._access
        if access.user is not None and access.secret is not None:
            private = sigv4.sign_get(
                self._host, path, headers, datetime.now(UTC), access.region, access.user, access.secret, access.session_token
            )
        ask = Ask(f"{self._bucket.url}{path}", headers=headers, private=private)
        with self._web.request(ask, ANSWERS | {412}) as response:
            yield response
