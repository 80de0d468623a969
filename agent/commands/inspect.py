"""`keyturn inspect`: what a sealed model says of itself, and with its key, whether every byte of it opens."""

import argparse
import contextlib
import hmac
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.artifact import kserve
from agent.artifact import manifest as m
from agent.artifact.compact_jwe import CHUNK_BYTES, JweOpener, decode
from agent.artifact.identify import signatures_of
from agent.artifact.seal_volume import check_volume
from agent.artifact.signature import parse_provider_key, parse_signature, verify_signatures
from agent.artifact.sources import LayoutSource, open_source
from agent.artifact.stream import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    SegmentOpener,
    associated_data,
    key_commitment,
    parse_header,
)
from agent.artifact.volume_config import AnyModel, VolumeConfig, parse_model
from agent.closed import Ident
from agent.commands.seal import add_access, hint, progress_line, read_access, read_ca, read_key_file, read_pem, size_text
from agent.cose import PublicKey
from agent.errors import (
    ArtifactUnavailableError,
    ConfigError,
    ConfigProblem,
    KeyMismatchError,
    MalformedHeaderError,
    SegmentAuthenticationError,
    StoreProblem,
    TruncatedArtifactError,
)

_TIMEOUT_S = 30.0
_MAX_WORKERS = 8
_REFERENCE = re.compile(
    r"(oci(?:\+http)?://[^/]+/[^:@]+|.+?)(?::([A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?"
)


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser("inspect", help=summary, description=summary, allow_abbrev=False)
    parser.add_argument(
        "ref",
        metavar="REF",
        help="folder, http(s) URL or s3://bucket/prefix of an OCI image layout, or oci://host/repository of a registry, with "
        "or without @sha256:… of a manifest; a registry's also with :tag",
    )
    parser.add_argument(
        "--jwe-file",
        metavar="NAME",
        action="append",
        help="REF is no layout but a folder of files as KServe's confidential serving keeps them, of which this is one "
        "(artifact.jwe_files); may be repeated. Without a key it tells the algorithm and the size: nothing says which files "
        "belong together, in which version, or which of two is which",
    )
    parser.add_argument("--check", action="store_true", help="open every segment of every file; writes nothing")
    parser.add_argument("--key-file", metavar="K", type=Path, help="the model key, as `seal` takes it; for --check")
    parser.add_argument(
        "--volume", metavar="IMAGE", type=Path, help="the disk of an encrypted volume or its image; for --check"
    )
    add_access(parser)
    parser.add_argument(
        "--signed-by", metavar="PEM", type=Path, help="fail unless this public key has signed the manifest (`seal --sign`)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a manifest")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if args.check != (args.key_file is not None):
        args.usage_error("--check and --key-file belong together")
    key = read_key_file(args.key_file) if args.check else None
    signer = _read_signer(args.signed_by) if args.signed_by else None
    if args.jwe_file:
        if signer is not None:
            args.usage_error("--signed-by is about a manifest, and --jwe-file has none")
        return _inspect_jwe(args, key)
    match = _REFERENCE.fullmatch(args.ref)
    if match is None:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("REF"))
    location, tag, digest = match.groups()
    if tag is not None and not location.startswith("oci"):  # elsewhere a colon is a part of the name
        location, tag = f"{location}:{tag}", None
    with contextlib.closing(open_source(location, read_ca(args), _TIMEOUT_S, read_access(args))) as source:
        for wanted in [digest] if digest else _digests(source, tag):
            manifest = m.parse_manifest(source.read_manifest(wanted, m.MAX_MANIFEST_BYTES), wanted, m.CONFIG_TYPES)
            config = parse_model(source.read_blob(manifest.config_digest, manifest.config_bytes), manifest)
            if key is not None:
                with progress_line("checking") as progress:
                    if isinstance(config, m.ModelConfig):
                        check_model(source, config, key, progress)
                    elif args.volume is None:
                        args.usage_error("--check of an encrypted volume needs --volume")
                    else:
                        check_volume(args.volume, config, key, progress)
            # Whoever has a digest needs neither index nor signature.
            signatures = [] if digest and signer is None else [*signatures_of(source, wanted)]
            if signer is not None:
                verify_signatures(signatures, wanted, [signer])
            signers = [found.key_id.hex() for cose in signatures if (found := parse_signature(cose))]
            print(_record(manifest, config, signers, args) if args.json else _table(manifest, config, signers, args))
    return 0


def _digests(source: LayoutSource, tag: str | None) -> list[str]:
    if tag is not None:
        digests = [m.digest_of(source.read_manifest(tag, m.MAX_MANIFEST_BYTES))]
    else:
        # An index need not say what its entries are.
        digests = [
            entry.digest
            for entry in m.parse_index(source.read_index(m.MAX_INDEX_BYTES))
            if m.artifact_type(source.read_manifest(entry.digest, m.MAX_MANIFEST_BYTES)) in ("", m.ARTIFACT_TYPE)
        ]
    if not digests:
        raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
    hint("digests come from the store, and nothing authenticates them: compare them with what `keyturn seal` printed")
    return digests


def _read_signer(path: Path) -> PublicKey:
    try:
        return parse_provider_key(read_pem(path, "signed-by"))
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("signed-by")) from None


# --- check ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Segment:
    index: int  # of the file in the file table
    file: m.SealedFile
    opener: SegmentOpener
    segment: int


def check_model(source: LayoutSource, config: m.ModelConfig, key: bytes, progress: Callable[[int, int], None]) -> None:
    """Open every segment of every file, on all processors, and keep nothing.

    Raises:
        KeyMismatchError: the model was sealed with another key.
        ArtifactError: a blob is not what was sealed; the first one found.
        ArtifactUnavailableError: the store did not deliver.
    """
    if not hmac.compare_digest(key_commitment(key, config.key_uri), config.key_commitment):
        raise KeyMismatchError()
    segments = _segments(config, key)
    lock = threading.Lock()
    stop = threading.Event()
    done, total = 0, config.total_plaintext_bytes

    def work() -> None:
        nonlocal done
        buffers = memoryview(bytearray(SEGMENT_BYTES + 1)), memoryview(bytearray(SEGMENT_BYTES))
        while not stop.is_set():
            with lock:  # a generator runs in one thread at a time
                item = next(segments, None)
            if item is None:
                return
            _check_segment(source, item, *buffers)
            with lock:
                done += item.file.layout.plaintext_range(item.segment)[1]
                progress(done, total)

    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for finished in as_completed([pool.submit(work) for _ in range(workers)]):
                finished.result()
        finally:
            stop.set()


def _segments(config: m.ModelConfig, key: bytes) -> Iterator[_Segment]:
    for i, file in enumerate(config.files):
        bound = associated_data(config.model_name, file.path, file.size, config.key_uri, file.sealed_version)
        opener = SegmentOpener(key, parse_header(file.header, i), bound, file.layout, i)
        for segment in range(file.layout.segments):
            yield _Segment(i, file, opener, segment)


def _check_segment(source: LayoutSource, item: _Segment, ciphertext: memoryview, plaintext: memoryview) -> None:
    file, layout = item.file, item.file.layout
    start, length = layout.ciphertext_range(item.segment)
    lead = HEADER_BYTES if item.segment == 0 else 0  # segment 0 is read with the header before it
    # Nothing would read a byte after the last segment; that it is there says that the copy is not the original.
    beyond = 1 if item.segment == layout.segments - 1 else 0
    got = source.read_range(file.blob_digest, start - lead, ciphertext[: lead + length + beyond])
    if got != lead + length:
        raise TruncatedArtifactError(item.index, start - lead + got, layout.ciphertext_bytes)
    if ciphertext[:lead] != file.header[:lead]:
        raise MalformedHeaderError(item.index)
    item.opener.open(item.segment, ciphertext[lead : lead + length], plaintext[: length - TAG_BYTES])


# --- files of KServe's ------------------------------------------------------------------------------------------------


def _inspect_jwe(args: argparse.Namespace, key: bytes | None) -> int:
    with contextlib.closing(open_source(args.ref, read_ca(args), _TIMEOUT_S, read_access(args))) as source:
        files = kserve.find(source, args.jwe_file, threading.Event())
        if key is not None:
            with progress_line("checking") as progress:
                check_jwe(source, files, key, progress)
    if args.json:
        found = [{"path": file.path, "algorithm": file.jwe.algorithm, "size": file.jwe.plaintext_bytes} for file in files]
        print(json.dumps({"format": "kserve-jwe", "checked": args.check, "files": found}))
        return 0
    print(f"{'SIZE':>10}  {'ALGORITHM':<9}  PATH")
    for file in files:
        print(f"{size_text(file.jwe.plaintext_bytes):>10}  {file.jwe.algorithm:<9}  {file.path}")
    if args.check:
        print("\nchecked   every file opens with this key")
    return 0


def check_jwe(source: LayoutSource, files: list[kserve.JweFile], key: bytes, progress: Callable[[int, int], None]) -> None:
    """Open every file, and keep nothing. Raises as `check_model`."""
    total, done = sum(file.jwe.plaintext_bytes for file in files), 0
    text, plaintext = (memoryview(bytearray(CHUNK_BYTES)) for _ in range(2))
    for file in files:
        opener = JweOpener(file.jwe, memoryview(key))
        try:
            for chunk in range(file.chunks):
                ciphertext = decode(file.read(chunk, source, text))
                opener.update(ciphertext, plaintext[: len(ciphertext)])
                done += len(ciphertext)
                progress(done, total)
            opener.finish()
        except ValueError:
            raise SegmentAuthenticationError(file.index, 0) from None


# --- output -----------------------------------------------------------------------------------------------------------


def _record(manifest: m.Manifest, config: AnyModel, signers: list[str], args: argparse.Namespace) -> str:
    record = {
        "manifest_digest": manifest.digest,
        "model_name": config.model_name,
        "version": config.version,
        "key_uri": config.key_uri,
    }
    record |= _contents(config)
    record |= {"checked": args.check, "key_ids": signers, "signature_verified": args.signed_by is not None}
    return json.dumps(record)


def _contents(config: AnyModel) -> dict[str, Any]:
    if isinstance(config, VolumeConfig):
        disk_bytes = config.data_offset + config.segment_bytes
        return {"plaintext_bytes": config.data_bytes, "volume": {"uuid": config.uuid, "disk_bytes": disk_bytes}}
    return {
        "plaintext_bytes": config.total_plaintext_bytes,
        "ciphertext_bytes": sum(file.layout.ciphertext_bytes for file in config.files),
        "files": [
            {
                "path": file.path,
                "size": file.size,
                "segments": file.layout.segments,
                "sealed_version": file.sealed_version,
                "blob_digest": file.blob_digest,
            }
            for file in config.files
        ],
    }


def _table(manifest: m.Manifest, config: AnyModel, signers: list[str], args: argparse.Namespace) -> str:
    lines = [
        f"model     {config.model_name}, version {config.version}",
        f"key       {config.key_uri}",
        f"manifest  {manifest.digest}",
    ]
    if isinstance(config, VolumeConfig):
        size = config.data_offset + config.segment_bytes
        lines += [f"volume    {config.uuid}, {size_text(config.data_bytes)} of files on a disk of {size} bytes or more"]
    else:
        lines += _files(config)
    lines += ["", *(f"signed    by key {signer}, so it says" for signer in signers)] if signers else []
    if args.signed_by:
        lines += ["verified  the key of --signed-by signed this manifest"]
    if args.check:
        every = "block of the disk authenticates" if isinstance(config, VolumeConfig) else "segment of every file opens"
        lines += ["", f"checked   every {every} with this key"]
    return "\n".join(lines)


def _files(config: m.ModelConfig) -> list[str]:
    return [
        f"contents  {len(config.files)} files, {size_text(config.total_plaintext_bytes)}",
        "",
        f"{'SIZE':>10}  {'SEALED IN':>9}  {'BLOB':<19}  PATH",
        *(
            f"{size_text(file.size):>10}  {file.sealed_version:>9}  {file.blob_digest[:19]}  {file.path}"
            for file in config.files
        ),
    ]
