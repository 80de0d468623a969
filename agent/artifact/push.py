"""A layout's sealed models into a registry, with their signatures; the provider's side of `sources/oci.py`.

Blobs that are there already are not sent again, so a push that broke off goes on where it was. A model gets its name last:
when a tag points at it, everything below it and every signature of it is there. Changes nothing in the layout.
Spec: OCI distribution-spec 1.1, "Pushing blobs" (POST then PUT), "Pushing manifests with subject".
"""

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from agent import http_policy
from agent.artifact import manifest as m
from agent.artifact import signature
from agent.artifact.sources.access import Access
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.sources.oci import TAG, Registry, Repository, referrers_tag
from agent.artifact.sources.web import Upload, read_whole
from agent.closed import Ident
from agent.errors import ArtifactUnavailableError, MalformedManifestError, StoreProblem

_PIECE_BYTES = 1 << 20
_MIN_BYTES_PER_S = 256 << 10
"""A blob is one request: it has the time of a request, and more for its size."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Pushed:
    """One model that is in the registry: its digest, its tag, and how many of its bytes had to be sent."""

    manifest_digest: str
    tag: str
    sent_bytes: int


def push_layout(
    layout: Path, repository: Repository, ca_pem: str | None, access: Access, timeout_s: float, progress: Progress
) -> tuple[Pushed, ...]:
    """Push every named sealed model of a layout, with its signatures.

    Args:
        layout: an OCI image layout, as `seal_model` makes one.
        repository: where to.
        ca_pem: the only CAs to trust, PEM; None: the system's.
        access: credentials, or none.
        timeout_s: seconds for one request, beside the time for the bytes of a blob.
        progress: called with the ciphertext bytes done and in all.

    Raises:
        ArtifactUnavailableError: layout or registry do not deliver; what was finished is there, without the name.
        MalformedManifestError, ManifestDigestError: the layout holds no sound sealed model.
        ManifestTooLargeError: no registry takes one of its manifests; nothing was sent.
    """
    with (
        closing(DirectorySource(str(layout))) as source,
        closing(Registry(repository, "pull,push", ca_pem, access, timeout_s)) as registry,
    ):
        named = [entry for entry in m.parse_index(source.read_index(m.MAX_INDEX_BYTES)) if entry.ref_name is not None]
        if not named:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        # It goes into a URL, and "../../other/manifests/latest" would be another repository's.
        # refusal: test_artifact_push.py::test_a_name_that_is_no_tag_goes_into_no_url
        if not all(TAG.fullmatch(entry.ref_name or "") for entry in named):
            raise MalformedManifestError(Ident("index.annotations"))
        # refusal: test_artifact_push.py::test_a_name_that_stands_for_two_models_stands_for_none
        if len({entry.ref_name for entry in named}) < len(named):
            raise MalformedManifestError(Ident("index.annotations"))
        pusher = _Pusher(source, registry, progress)
        models = [(entry, _read_manifest(source, entry.digest)) for entry in named]
        pusher.total = sum(layer.ciphertext_bytes for _, manifest in models for layer in manifest.layers)
        return tuple(pusher.push(manifest, str(entry.ref_name)) for entry, manifest in models)


def _read_manifest(source: DirectorySource, digest: str) -> m.Manifest:
    data = source.read_manifest(digest, m.MAX_MANIFEST_BYTES)
    manifest = m.parse_manifest(data, digest, m.CONFIG_TYPES)
    m.check_for_registry(len(data), len(manifest.layers))
    return manifest


def check_repository(repository: Repository, ca_pem: str | None, access: Access, timeout_s: float) -> None:
    """Ask whether this is a registry that knows us, before hours of sealing. Raises ArtifactUnavailableError."""
    with closing(Registry(repository, "pull,push", ca_pem, access, timeout_s)) as registry:
        _has_blob(registry, m.digest_of(m.EMPTY))


def _has_blob(registry: Registry, digest: str) -> bool:
    # A redirect leads to where it is.
    answers = frozenset((200, 301, 302, 303, 307, 308, 404))
    with registry.request("HEAD", f"{registry.url}/blobs/{digest}", {}, answers) as response:
        return response.status != 404


class _Pusher:
    def __init__(self, source: DirectorySource, registry: Registry, progress: Progress) -> None:
        self._source = source
        self._registry = registry
        self._progress = progress
        self._done = 0
        self.total = 0

    def push(self, manifest: m.Manifest, tag: str) -> Pushed:
        # 1. The blobs.
        sent = 0
        for digest, length in [(layer.blob_digest, layer.ciphertext_bytes) for layer in manifest.layers]:
            sent += self._push_blob(digest, length, self._advance)
        self._push_blob(manifest.config_digest, manifest.config_bytes, None)
        # 2. The manifest, under its digest.
        data = self._source.read_manifest(manifest.digest, m.MAX_MANIFEST_BYTES)
        self._push_manifest(manifest.digest, data)
        # 3. Its signatures.
        for candidate in self._source.referrers(manifest.digest):
            about = self._source.read_manifest(candidate, m.MAX_MANIFEST_BYTES)
            cose_digest = signature.parse_signature_manifest(about, manifest.digest)
            if cose_digest is not None:
                self._push_signature(manifest.digest, about, cose_digest)
        # 4. Its name.
        self._push_manifest(tag, data)
        return Pushed(manifest.digest, tag, sent)

    def _advance(self, length: int) -> None:
        self._done += length
        self._progress(self._done, self.total)

    def _push_signature(self, subject: str, about: bytes, cose_digest: str) -> None:
        for digest in (cose_digest, m.digest_of(m.EMPTY)):
            self._push_blob(digest, len(self._source.read_blob(digest, signature.MAX_SIGNATURE_BYTES)), None)
        if self._push_manifest(m.digest_of(about), about):
            return
        # A registry without the referrers interface: the index of them is ours to write.
        tag = referrers_tag(subject)
        url = f"{self._registry.url}/manifests/{tag}"
        with self._registry.request("GET", url, {"Accept": m.INDEX_TYPE}, frozenset((200, 404))) as response:
            index = read_whole(response, m.MAX_INDEX_BYTES) if response.status == 200 else None
        known = m.parse_index(index, m.SIGNATURE_TYPE) if index is not None else ()
        if m.digest_of(about) not in {entry.digest for entry in known}:
            self._push_manifest(tag, m.add_to_index(index, about, None, m.SIGNATURE_TYPE), m.INDEX_TYPE)

    def _push_manifest(self, reference: str, data: bytes, kind: str = m.MANIFEST_TYPE) -> bool:
        """Put it; gives whether the registry keeps the referrers of its subject itself."""
        url = f"{self._registry.url}/manifests/{reference}"
        upload = Upload(lambda: io.BytesIO(data), len(data))
        with self._registry.request("PUT", url, {"Content-Type": kind}, frozenset((201,)), body=upload) as response:
            return "OCI-Subject" in response.headers

    def _push_blob(self, digest: str, length: int, advance: Callable[[int], None] | None) -> int:
        """Send it if it is not there; gives how many bytes were sent."""
        if _has_blob(self._registry, digest):
            if advance is not None:
                advance(length)
            return 0
        start = f"{self._registry.url}/blobs/uploads/"
        with self._registry.request("POST", start, {}, frozenset((202,)), body=_NOTHING) as response:
            # Within the registry: credentials go with it.
            session = http_policy.redirect_target(start, response.headers.get("Location"), 0)
        url = f"{session}{'&' if '?' in session else '?'}digest={quote(digest, safe='')}"
        upload = Upload(lambda: _Blob(self._source, digest, length, advance), length)
        self._finish(url, upload)
        return length

    def _finish(self, url: str, upload: Upload) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        timeout_s = self._registry.timeout_s + upload.length / _MIN_BYTES_PER_S
        with self._registry.request("PUT", url, headers, frozenset((201,)), body=upload, timeout_s=timeout_s):
            pass


_NOTHING = Upload(io.BytesIO, 0)


class _Blob:
    """A blob of the layout as a body; tells how much of it was read."""

    def __init__(self, source: DirectorySource, digest: str, length: int, advance: Callable[[int], None] | None) -> None:
        self._source = source
        self._digest = digest
        self._length = length
        self._advance = advance
        self._offset = 0
        self._buffer = bytearray(_PIECE_BYTES)
        self._piece = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        if not self._piece and self._offset < self._length:
            wanted = memoryview(self._buffer)[: self._length - self._offset]
            got = self._source.read_range(self._digest, self._offset, wanted)
            # refusal: test_artifact_push.py::test_a_blob_that_is_too_short_is_not_waited_for
            if got < len(wanted):
                raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
            self._piece = wanted
            self._offset += got
            if self._advance is not None:
                self._advance(got)
        taken, self._piece = self._piece[:size], self._piece[size:]
        return bytes(taken)

    def close(self) -> None:
        """Nothing stays open between two reads."""
