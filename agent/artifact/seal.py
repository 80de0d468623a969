"""The provider's side: a model folder becomes a sealed model in an OCI image layout.

Works in constant memory. A layout is changed by one rename, that of its index, after everything it names is on disk;
whatever stops us before that takes back what was written. Does not make or store keys.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.artifact import manifest as m
from agent.artifact import signature
from agent.artifact.blobs import TEMPORARY, Sealing, UnsafeFixedSalt, seal_files, unchanged_files
from agent.artifact.stream import HEADER_BYTES, KEY_BYTES, key_commitment
from agent.closed import Ident
from agent.cose import PrivateKey
from agent.errors import ArtifactError, MalformedManifestError, SealError, SealProblem

_LAYOUT_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class SealPlan:
    """What a seal would do.

    Attributes:
        sizes: path -> size in bytes, in the order of the file table.
        kept: those of them whose blobs of an earlier version still hold them.
    """

    sizes: dict[str, int]
    kept: dict[str, m.SealedFile]

    @property
    def changed(self) -> dict[str, int]:
        return {path: size for path, size in self.sizes.items() if path not in self.kept}


def seal_model(
    model_dir: Path,
    out_dir: Path,
    key: bytes,
    key_uri: str,
    name: str,
    version: int,
    progress: Callable[[int, int], None],
    signing_keys: Sequence[PrivateKey] = (),
    unsafe_salt: UnsafeFixedSalt | None = None,
) -> str:
    """Seal the files of a folder, and name the result `<name>-v<version>` in an OCI image layout.

    A file that an earlier version in this layout holds, sealed with the same key, keeps its blob: to know that, the blob is
    opened and compared, which takes as long as reading both, and less than half as long as sealing.

    Args:
        model_dir: links to files inside it are followed, empty folders are not kept.
        out_dir: new, empty, or an OCI image layout, to which the model is added.
        key: 32 bytes.
        key_uri: `kbs:///repository/type/tag` under which the broker will hold the key.
        name: model name.
        version: greater than that of every release before.
        progress: called after each segment with the plaintext bytes done and in all, from any thread, one at a time.
        signing_keys: the provider's: each signs the manifest.
        unsafe_salt: None: salts come from the operating system. Else the result is for test vectors only.

    Returns:
        The manifest digest, `sha256:…`.

    Raises:
        SealError: the folder cannot be sealed under these names, or the output cannot be written; nothing was left behind.
    """
    model, out = check_places(model_dir, out_dir, name, version, key_uri)
    try:
        sizes = list_model(model)
        advance = _counter(sizes, progress)
        # Two stacks: the lock is held until what was written has been taken back.
        with contextlib.ExitStack() as lock, contextlib.ExitStack() as undo:
            blobs = open_layout(out, lock, undo)
            index = read_index(out, f"{name}-v{version}")
            sealing = Sealing(model, blobs, key, key_uri, name, version, unsafe_salt)
            plan = SealPlan(sizes, _unchanged(sealing, sizes, index, advance))
            rows = plan.kept | {file.path: file for file in seal_files(sealing, plan.changed, undo, advance)}
            files = tuple(rows[path] for path in sizes)
            config = m.ModelConfig(Ident(name), version, Ident(key_uri), key_commitment(key, key_uri), files)
            manifest_bytes = _pack_and_check(config)
            write_blob(blobs, m.pack_config(config), undo)
            digest = publish(out, blobs, index, manifest_bytes, f"{name}-v{version}", signing_keys, undo)
            undo.pop_all()
    except OSError as error:
        raise SealError(SealProblem.IO, code=error.errno or 0) from error
    return digest


def plan_seal(
    model_dir: Path,
    out_dir: Path,
    key: bytes | None,
    key_uri: str,
    name: str,
    version: int,
    progress: Callable[[int, int], None],
) -> SealPlan:
    """What `seal_model` would do. Writes nothing.

    Args:
        model_dir: as for `seal_model`, and so the others.
        key: None: a new one, with which no earlier version was sealed.

    Raises:
        SealError: as `seal_model` would, before the first segment.
    """
    model, out = check_places(model_dir, out_dir, name, version, key_uri)
    try:
        sizes = list_model(model)
        kept: dict[str, m.SealedFile] = {}
        if out.exists() and any(out.iterdir()):
            _check_mark(out / "oci-layout")
            index = read_index(out, f"{name}-v{version}")
            if key is not None:
                sealing = Sealing(model, out / "blobs" / "sha256", key, key_uri, name, version)
                kept = _unchanged(sealing, sizes, index, _counter(sizes, progress))
    except OSError as error:
        raise SealError(SealProblem.IO, code=error.errno or 0) from error
    return SealPlan(sizes, kept)


def check_for_registry(plan: SealPlan, key_uri: str, name: str, version: int) -> None:
    """Check before hours of sealing that registries would take the manifest. Raises ManifestTooLargeError."""
    digest, header = m.digest_of(b""), bytes(HEADER_BYTES)  # of the size of any other
    files = tuple(m.SealedFile(path, size, digest, version, header) for path, size in plan.sizes.items())
    config = m.ModelConfig(Ident(name), version, Ident(key_uri), bytes(KEY_BYTES), files)
    m.check_for_registry(len(m.pack_manifest(config)), len(files))


def check_places(model_dir: Path, out_dir: Path, name: str, version: int, key_uri: str) -> tuple[Path, Path]:
    """The two folders, resolved."""
    check_identity(name, version, key_uri)
    model, out = Path(os.path.realpath(model_dir)), Path(os.path.realpath(out_dir))  # resolve() fails on a loop of links
    if model.is_relative_to(out) or out.is_relative_to(model):
        raise SealError(SealProblem.INSIDE)
    return model, out


def _counter(sizes: dict[str, int], progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Counts bytes that are done with."""
    total, done = sum(sizes.values()), 0

    def advance(length: int) -> None:
        nonlocal done
        done += length
        progress(done, total)

    return advance


def _unchanged(
    sealing: Sealing, sizes: dict[str, int], index: bytes | None, advance: Callable[[int], None]
) -> dict[str, m.SealedFile]:
    """The rows of the newest earlier version with this key that can stay as they are."""
    previous = _newest_before(sealing, index)
    if previous is None:
        return {}
    kept = unchanged_files(sealing, sizes, previous)
    for file in kept.values():
        advance(file.size)
    return kept


def _newest_before(sealing: Sealing, index: bytes | None) -> m.ModelConfig | None:
    """Nothing authenticates an index, and nothing has to: what is kept was opened with the key and compared."""
    found = []
    for entry in m.parse_index(index) if index else ():
        name, _, version = (entry.ref_name or "").rpartition("-v")
        if name == sealing.name and version.isdecimal() and len(version) <= 16 and int(version) < sealing.version:
            found.append((int(version), entry.digest))
    if not found:
        return None
    try:
        digest = max(found)[1]
        manifest = m.parse_manifest(_read_blob(sealing.blobs, digest, m.MAX_MANIFEST_BYTES), digest)
        config = m.parse_config(_read_blob(sealing.blobs, manifest.config_digest, manifest.config_bytes), manifest)
    except (FileNotFoundError, ArtifactError):
        return None
    same_key = config.key_commitment == key_commitment(sealing.key, sealing.key_uri)
    earlier = config.version < sealing.version
    return config if same_key and earlier and (config.model_name, config.key_uri) == (sealing.name, sealing.key_uri) else None


def _read_blob(blobs: Path, digest: str, max_bytes: int) -> bytes:
    with (blobs / digest.removeprefix("sha256:")).open("rb") as stream:
        return stream.read(max_bytes + 1)


def check_identity(name: str, version: int, key_uri: str) -> None:
    """Check what the provider chose. Raises SealError; `where` is `model_name`, `version` or `key_uri`."""
    try:
        m.check_identity(name, version, key_uri)
    except MalformedManifestError as error:
        raise SealError(SealProblem.BAD_VALUE, error.field) from error


def _pack_and_check(config: m.ModelConfig) -> bytes:
    """The manifest, once our own reader has accepted it: what breaks a limit is not published."""
    manifest_bytes = m.pack_manifest(config)
    try:
        manifest = m.parse_manifest(manifest_bytes, m.digest_of(manifest_bytes))
        if m.parse_config(m.pack_config(config), manifest) != config:
            raise RuntimeError("a sealed model must read back as it was written")
    except MalformedManifestError as error:
        raise SealError(SealProblem.BAD_VALUE, error.field) from error
    return manifest_bytes


def publish(
    out: Path,
    blobs: Path,
    index: bytes | None,
    manifest_bytes: bytes,
    ref_name: str,
    signing_keys: Sequence[PrivateKey],
    undo: contextlib.ExitStack,
) -> str:
    """Write the manifest and its signatures, and name it in the layout whose blobs are complete. The value is its digest."""
    digest = write_blob(blobs, manifest_bytes, undo)
    named = m.add_to_index(index, manifest_bytes, ref_name)
    for signing_key in signing_keys:
        named = _add_signature(blobs, named, manifest_bytes, signing_key, undo)
    _sync_folder(blobs)
    undo.callback(_restore_index, out, index)
    _write_small(out / "index.json", named)
    return digest


def _add_signature(blobs: Path, index: bytes, manifest_bytes: bytes, key: PrivateKey, undo: contextlib.ExitStack) -> bytes:
    """The index with one signature more; its blobs are written."""
    cose = signature.sign_manifest(m.digest_of(manifest_bytes), key)
    about = signature.pack_signature_manifest(manifest_bytes, cose)
    for blob in (m.EMPTY, cose, about):
        write_blob(blobs, blob, undo)
    return m.add_to_index(index, about, None, m.SIGNATURE_TYPE)


# --- the model folder -------------------------------------------------------------------------------------------------


def list_model(root: Path) -> dict[str, int]:
    """Path -> size in bytes of every file below a resolved folder, in the order of the file table."""
    if not root.is_dir():
        raise SealError(SealProblem.MODEL_MISSING)
    sizes = {}
    for folder, folders, names in os.walk(root, onerror=_stop_walking):
        for name in (*names, *folders):
            entry = Path(folder, name)
            linked = entry.is_symlink()
            if entry.is_dir() and not linked:
                continue
            path = entry.relative_to(root).as_posix()
            target = Path(os.path.realpath(entry)) if linked else entry
            if not target.is_relative_to(root) or not target.is_file():
                raise SealError(SealProblem.NOT_A_FILE, Ident.of_peer(path))
            sizes[path] = target.stat().st_size
    if not sizes:
        raise SealError(SealProblem.EMPTY)
    return _in_order(sizes)


def _in_order(sizes: dict[str, int]) -> dict[str, int]:
    """As the file table has them, once they are known to fit into one."""
    if len(sizes) > m.MAX_FILES:
        raise SealError(SealProblem.BAD_VALUE, Ident("files"))
    paths = sorted(sizes, key=os.fsencode)
    try:
        m.check_paths(paths)
    except MalformedManifestError as error:
        if error.field == "folders":
            raise SealError(SealProblem.BAD_VALUE, error.field) from error
        index = int(error.field.removeprefix("files[").partition("]")[0])
        raise SealError(SealProblem.BAD_PATH, Ident.of_peer(paths[index])) from error
    return {path: sizes[path] for path in paths}


def _stop_walking(error: OSError) -> None:
    raise error  # os.walk passes over a folder that it cannot read


# --- the layout -------------------------------------------------------------------------------------------------------


def open_layout(out: Path, lock: contextlib.ExitStack, undo: contextlib.ExitStack) -> Path:
    """The folder of blobs of a new or existing layout, which is ours alone until `lock` is closed."""
    _make_folders(out, undo)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    lock.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SealError(SealProblem.BUSY) from error
    mark = out / "oci-layout"
    if not mark.exists():
        if any(not entry.name.startswith(TEMPORARY) for entry in out.iterdir()):
            raise SealError(SealProblem.NOT_A_LAYOUT)
        undo.callback(mark.unlink, missing_ok=True)
        _write_small(mark, msgspec.json.encode({"imageLayoutVersion": _LAYOUT_VERSION}))
    _check_mark(mark)
    blobs = out / "blobs" / "sha256"
    _make_folders(blobs, undo)
    for leftover in blobs.glob(f"{TEMPORARY}*"):  # of a seal that was killed; nobody writes it, since the lock is ours
        leftover.unlink()
    return blobs


def _check_mark(mark: Path) -> None:
    try:
        content = msgspec.json.decode(_read_small(mark), type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise SealError(SealProblem.NOT_A_LAYOUT) from None
    if content.get("imageLayoutVersion") != _LAYOUT_VERSION:
        raise SealError(SealProblem.NOT_A_LAYOUT)


def read_index(out: Path, ref_name: str) -> bytes | None:
    """The index of a layout, None without one. Raises SealError: it has this name."""
    try:
        index = _read_small(out / "index.json")
        entries = m.parse_index(index)
    except FileNotFoundError:
        return None
    except MalformedManifestError as error:
        raise SealError(SealProblem.NOT_A_LAYOUT) from error
    if any(entry.ref_name == ref_name for entry in entries):
        raise SealError(SealProblem.SEALED_BEFORE)
    return index


def _restore_index(out: Path, index: bytes | None) -> None:
    if index is None:
        (out / "index.json").unlink(missing_ok=True)
    else:
        _write_small(out / "index.json", index)


def write_blob(blobs: Path, data: bytes, undo: contextlib.ExitStack) -> str:
    """Write a small blob under a temporary name, then give it the name of its digest, which is returned."""
    temporary = blobs / f"{TEMPORARY}{os.urandom(8).hex()}"
    undo.callback(temporary.unlink, missing_ok=True)
    with temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    digest = m.digest_of(data)
    final = blobs / digest.removeprefix("sha256:")
    if not final.exists():  # another model's may have the same contents
        undo.callback(final.unlink, missing_ok=True)
    temporary.rename(final)
    return digest


def _write_small(path: Path, data: bytes) -> None:
    """Replace a file in one step, durably."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _read_small(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(m.MAX_INDEX_BYTES + 1)


def _make_folders(path: Path, undo: contextlib.ExitStack) -> None:
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            undo.callback(_remove_folder, folder)
            folder.mkdir()


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: then it is not ours alone
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
