"""Which manifest the configuration means: the one whose digest it pins, or the one under a tag that a pinned key signed.

From here on a signed model is as pinned as any other: by digest. Needs no key, and comes before the evidence, which says
what will be loaded.
"""

import threading
from collections.abc import Iterator

import msgspec

from agent.artifact import kserve, signature
from agent.artifact.manifest import MAX_MANIFEST_BYTES, digest_of
from agent.artifact.sources import BlobSource
from agent.artifact.sources.patient import PatientSource
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.cose import PublicKey
from agent.errors import ArtifactUnavailableError, ConfigError, ConfigProblem
from agent.threads import in_thread


async def identify(source: BlobSource, config: ArtifactConfig) -> ArtifactConfig:
    """`find_manifest` in a thread, which ends when the caller is cancelled."""
    stop = threading.Event()
    return await in_thread(lambda: find_manifest(source, config, stop), on_cancel=stop.set)


def find_manifest(source: BlobSource, config: ArtifactConfig, stop: threading.Event) -> ArtifactConfig:
    """The configuration with `manifest_digest` in it. Blocking; asks the store only where a tag stands for the digest.

    Args:
        source: where the blobs lie.
        config: the measured configuration of the artifact.
        stop: ends waiting and reading, as `PatientSource` says.

    Raises:
        ArtifactUnavailableError: the store does not deliver, within `config.timeout_s`.
        MalformedManifestError: the index of a layout is not one.
        ManifestSignatureError: no pinned key signed this manifest.
        ConfigError: a provider key is none.
    """
    if config.manifest_digest is not None:
        return config
    if config.format == "kserve-jwe":
        return msgspec.structs.replace(config, manifest_digest=kserve.list_digest(config))
    assert config.tag is not None, "the schema asks for it"
    keys = provider_keys(config)
    patient = PatientSource(source, config.timeout_s, stop)
    digest = digest_of(patient.read_manifest(config.tag, MAX_MANIFEST_BYTES))
    signature.verify_signatures(signatures_of(patient, digest), digest, keys)
    return msgspec.structs.replace(config, manifest_digest=digest)


def provider_keys(config: ArtifactConfig) -> tuple[PublicKey, ...]:
    """The pinned keys. Raises ConfigError."""
    keys = []
    for index, pem in enumerate(config.provider_keys):
        try:
            keys.append(signature.parse_provider_key(pem))
        except ValueError:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"artifact.provider_keys[{index}]")) from None
    return tuple(keys)


def signatures_of(source: BlobSource | PatientSource, digest: str) -> Iterator[bytes]:
    """The COSE_Sign1 candidates beside a manifest, unverified; empty bytes for one that cannot be read.

    Raises:
        ArtifactUnavailableError: the store does not answer at all.
        MalformedManifestError: the index of a layout is not one.
    """
    seen = 0
    for candidate in reversed(source.referrers(digest)):  # the newest first
        if seen == signature.MAX_SIGNATURES:
            return
        try:
            manifest = source.read_manifest(candidate, signature.MAX_SIGNATURE_MANIFEST_BYTES)
            cose_digest = signature.parse_signature_manifest(manifest, digest)
            if cose_digest is None:
                continue
            seen += 1
            yield source.read_blob(cose_digest, signature.MAX_SIGNATURE_BYTES)
        except ArtifactUnavailableError as error:
            if error.retryable:
                raise
            yield b""  # one that is lost or too large must not hide a good one
