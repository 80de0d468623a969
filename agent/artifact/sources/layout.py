"""What every OCI image layout has: `index.json` answers for names and for what lies beside a manifest.

Nothing authenticates an index; whoever asks checks what it is led to.
"""

from typing import Protocol

from agent.artifact import manifest as m
from agent.errors import ArtifactUnavailableError, StoreProblem

MAX_REFERRERS = 64


class _Layout(Protocol):
    def read_blob(self, digest: str, max_bytes: int) -> bytes: ...

    def read_index(self, max_bytes: int) -> bytes: ...


class NamedByIndex:
    """The half of a `LayoutSource` that is the same for folders and URLs."""

    def read_manifest(self: _Layout, reference: str, max_bytes: int) -> bytes:
        if m.is_digest(reference):
            return self.read_blob(reference, max_bytes)
        found = [entry.digest for entry in m.parse_index(self.read_index(m.MAX_INDEX_BYTES)) if entry.ref_name == reference]
        if not found:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        # refusal: test_artifact_signature.py::test_a_name_that_stands_for_two_manifests_stands_for_none
        if len(found) > 1:
            raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
        return self.read_blob(found[0], max_bytes)

    def referrers(self: _Layout, digest: str) -> tuple[str, ...]:
        # An index does not tell what its entries are about: whoever reads them does.
        entries = m.parse_index(self.read_index(m.MAX_INDEX_BYTES), m.SIGNATURE_TYPE)
        return tuple(entry.digest for entry in entries if entry.ref_name is None and entry.digest != digest)[-MAX_REFERRERS:]
