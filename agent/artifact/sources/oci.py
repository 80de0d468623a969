"""A repository of an OCI registry: manifests by tag or digest, blobs by ranges, signatures as referrers.

`oci://host[:port]/repository` is https. `oci+http://` is the same without TLS, for a registry on this machine or behind one
that ends TLS: whoever is on the way then sees names and sizes, and no credentials go there. Does not push (`../push.py`).
Spec: OCI distribution-spec 1.1.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import msgspec
import urllib3

from agent.artifact import manifest as m
from agent.artifact.sources.access import Access
from agent.artifact.sources.layout import MAX_REFERRERS
from agent.artifact.sources.registry_auth import RegistryAuth
from agent.artifact.sources.web import ANSWERS, Ask, Upload, WebClient, range_header, read_part, read_whole
from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.proxy import Proxy

MAX_TAGS = 64
_MAX_TAG_LIST_BYTES = 1 << 20
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LOCATION = re.compile(
    rf"oci(\+http)?://((?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?)/({_PART}(?:/{_PART})*)/?", re.ASCII
)
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SIGNATURE_TAG = re.compile(r"sha256-[0-9a-f]{64}")
_MAX_REPOSITORY = 255


@dataclass(frozen=True, slots=True)
class Repository:
    """Where it is: `url` of the registry, `https://host[:port]`, and the name in it."""

    url: str
    name: str

    @classmethod
    def parse(cls, location: str) -> Self:
        """`oci://…` as a repository. Raises ValueError: it is none."""
        match = _LOCATION.fullmatch(location)
        if match is None or len(match[3]) > _MAX_REPOSITORY:
            raise ValueError("not a repository")
        url = f"{'http' if match[1] else 'https'}://{match[2].lower()}"
        if urlsplit(url).port == 0:
            raise ValueError("not a port")
        return cls(url, match[3])


class Registry:
    """One repository over HTTP: requests with whatever authentication it asks for."""

    def __init__(
        self,
        repository: Repository,
        actions: str,
        ca_pem: str | None,
        access: Access,
        timeout_s: float,
        proxy: Proxy | None = None,
    ) -> None:
        """As `RegistryAuth` and `WebClient` say."""
        self.timeout_s = timeout_s
        self._web = WebClient(ca_pem, timeout_s, proxy)
        self._web.open_pool(repository.url)
        self.url = f"{repository.url}/v2/{repository.name}"
        self._auth = RegistryAuth(self._web, repository.url, repository.name, actions, access)

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        answers: frozenset[int],
        *,
        elsewhere: bool = False,
        body: Upload | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """As `WebClient.request`. What the registry does not know us for is asked a second time, and no third."""
        authorization = self._auth.header()
        for first in (True, False):
            private = {} if authorization is None else {"Authorization": authorization}
            ask = Ask(url, method, headers, private, elsewhere, body, timeout_s)
            with self._web.request(ask, answers | {401}) as response:
                if response.status != 401:
                    yield response
                    return
                # refusal: test_a_registry_that_goes_on_asking_is_asked_twice
                if not first:
                    raise ArtifactUnavailableError(StoreProblem.REFUSED, 401)
                challenges = response.headers.getlist("WWW-Authenticate")
            authorization = self._auth.answer(challenges, authorization)

    def close(self) -> None:
        self._web.close()


class OciSource:
    """A `LayoutSource`: in place of an index it has tags."""

    def __init__(
        self, repository: Repository, ca_pem: str | None, access: Access, timeout_s: float, proxy: Proxy | None = None
    ) -> None:
        self._registry = Registry(repository, "pull", ca_pem, access, timeout_s, proxy)

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        data, kind = self._read_manifest(reference, max_bytes)
        # Whoever names a digest gets it as it is. A tag may stand for an index, of which one manifest is meant.
        if m.is_digest(reference) or kind != m.INDEX_TYPE:
            return data
        chosen = m.choose_model(data)
        # refusal: test_an_index_under_a_tag_stands_for_its_one_model
        if chosen is None:
            raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
        return self._read_manifest(chosen, max_bytes)[0]

    def referrers(self, digest: str) -> tuple[str, ...]:
        # The registry may filter by type (it says so in OCI-Filters-Applied) or not: we do in any case. Where it gives them in
        # pages, the first one counts: a model has a few signatures.
        query = f"?artifactType={m.SIGNATURE_TYPE}"
        try:
            index = self._read(f"referrers/{digest}{query}", m.MAX_INDEX_BYTES, m.INDEX_TYPE)[0]
        except ArtifactUnavailableError as error:
            if error.problem is not StoreProblem.NOT_FOUND:
                raise
            # A registry without that interface has an index of them under a tag.
            try:
                index = self._read_manifest(referrers_tag(digest), m.MAX_INDEX_BYTES)[0]
            except ArtifactUnavailableError as without:
                if without.problem is not StoreProblem.NOT_FOUND:
                    raise
                return ()
        entries = m.parse_index(index, m.SIGNATURE_TYPE)
        return tuple(entry.digest for entry in entries if entry.digest != digest)[-MAX_REFERRERS:]

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        with self._get(f"blobs/{digest}", {}, elsewhere=True) as response:
            return read_whole(response, max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        with self._get(f"blobs/{digest}", range_header(offset, out), elsewhere=True) as response:
            return read_part(response, offset, out)

    def read_index(self, max_bytes: int) -> bytes:
        """The sealed models under the first 64 tags, as a layout's index would name them."""
        index = None
        for tag in self._tags():
            data, kind = self._read_manifest(tag, m.REGISTRY_MANIFEST_BYTES)
            # refusal: test_artifact_sources_oci.py::test_manifests_of_other_kinds_under_the_tags_take_no_memory
            if kind == m.MANIFEST_TYPE and m.artifact_type(data) == m.ARTIFACT_TYPE:
                index = m.add_to_index(index, data, tag)
        if index is None:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        return index

    def close(self) -> None:
        self._registry.close()

    def _tags(self) -> list[str]:
        data, _ = self._read(f"tags/list?n={2 * MAX_TAGS}", _MAX_TAG_LIST_BYTES, "application/json")
        try:
            tags = msgspec.json.decode(data, type=_Tags).tags or ()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER) from None
        return [tag for tag in tags if TAG.fullmatch(tag) and not _SIGNATURE_TAG.fullmatch(tag)][:MAX_TAGS]

    def _read_manifest(self, reference: str, max_bytes: int) -> tuple[bytes, str]:
        return self._read(f"manifests/{reference}", max_bytes, f"{m.MANIFEST_TYPE}, {m.INDEX_TYPE}")

    def _read(self, path: str, max_bytes: int, accept: str) -> tuple[bytes, str]:
        """A small document and its media type. No digest the registry says it has is believed: whoever parses compares."""
        with self._get(path, {"Accept": accept}, elsewhere=False) as response:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            return read_whole(response, max_bytes), kind

    def _get(
        self, path: str, headers: Mapping[str, str], *, elsewhere: bool
    ) -> AbstractContextManager[urllib3.BaseHTTPResponse]:
        return self._registry.request("GET", f"{self._registry.url}/{path}", headers, ANSWERS, elsewhere=elsewhere)


def referrers_tag(digest: str) -> str:
    """The tag under which a registry without the referrers interface has the index of them."""
    return digest.replace(":", "-")


class _Tags(msgspec.Struct, frozen=True):
    tags: tuple[str, ...] | None = None
