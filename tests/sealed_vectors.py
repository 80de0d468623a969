"""The vectors in `vectors/sealed/`: sealed models with one defect each, as edits of good ones that anybody can make.

Owns the recipe of the good models and what a vector file says; `vectors/sealed/README.md` describes both for strangers. Does
not know the readers under test.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.artifact import manifest as m
from agent.artifact.blobs import UnsafeFixedSalt
from agent.artifact.seal import seal_model
from agent.artifact.signature import parse_signature_manifest, public_pem
from agent.artifact.stream import SEGMENT_BYTES, TAG_BYTES
from agent.errors import ArtifactUnavailableError, StoreProblem

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("vectors") / "sealed"
KEY = hashlib.sha256(b"key of the vectors").digest()
KEY_URI = "kbs:///vectors/model/1"
SIGNER = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"signer of the vectors").digest())
STRANGER = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"another signer").digest())
SIZES = {"config.json": 2, "empty": 0, "weights/full.bin": SEGMENT_BYTES - 56, "weights/three.bin": 2 * SEGMENT_BYTES + 28}
"""`full` fills its only segment, `three` two and 100 bytes of a third. Sizes are chosen, contents are SHAKE128 of the path."""
MODELS = {"good": ("vectors", 3, SIGNER), "older": ("vectors", 2, SIGNER), "other": ("others", 3, STRANGER)}
"""Name, version and signer; all of them have the same files and the same key."""


def plaintext(path: str) -> bytes:
    return b"{}" if path == "config.json" else hashlib.shake_128(path.encode()).digest(SIZES[path])


@dataclass
class Model:
    """A sealed model as a store holds it."""

    digest: str
    blobs: dict[str, bytes]
    index: bytes

    @property
    def manifest(self) -> Any:
        return json.loads(self.blobs[self.digest])

    def config_digest(self) -> str:
        return str(self.manifest["config"]["digest"])

    def blob_digest(self, path: str) -> str:
        found = (layer["digest"] for layer in self.manifest["layers"] if layer["annotations"][m.TITLE] == path)
        return str(next(found))

    def signature_digest(self) -> str:
        for entry in m.parse_index(self.index, m.SIGNATURE_TYPE):
            if cose := parse_signature_manifest(self.blobs[entry.digest], self.digest):
                return cose
        raise RuntimeError("it is not signed")


def make_models(folder: Path) -> dict[str, Model]:
    """Every good model, sealed into folders of its own."""
    source = folder / "source"
    for path in SIZES:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(plaintext(path))
    made = {}
    for which, (name, version, signer) in MODELS.items():
        out = folder / which
        salt = UnsafeFixedSalt(which.encode())
        digest = seal_model(source, out, KEY, KEY_URI, name, version, lambda _, __: None, [signer], salt)
        blobs = {f"sha256:{path.name}": path.read_bytes() for path in (out / "blobs" / "sha256").iterdir()}
        made[which] = Model(digest, blobs, (out / "index.json").read_bytes())
    return made


# --- a vector ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vector:
    """One file.

    Attributes:
        title: one sentence.
        source: the section of FORMAT.md that decides.
        expect: `loads`, or the class of the error; `fields` what it must say.
        edits: lines of the form `TARGET: OPERATION ARGUMENTS…`, applied in this order.
    """

    title: str
    source: str
    expect: str
    edits: tuple[str, ...]
    fields: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        fields = "".join(f" {name}={json.dumps(value)}" for name, value in self.fields.items())
        released = released_digest() if self.expect == "loads" else "nothing"
        head = [f"title: {self.title}", f"source: FORMAT.md, {self.source}", f"expect: {self.expect}{fields}"]
        return "\n".join([*head, f"released: {released}", "", *self.edits, ""])


def released_digest() -> str:
    """SHA-256 of all plaintext, in the order of the file table."""
    return hashlib.sha256(b"".join(plaintext(path) for path in SIZES)).hexdigest()


def parse_vector(text: str) -> tuple[Vector, str]:
    """A vector, and the digest of what may be released or `nothing`."""
    head, _, body = text.partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    expect, *about = fields["expect"].split(" ")
    pairs = (item.split("=", 1) for item in about)
    edits = tuple(body.splitlines())
    vector = Vector(
        fields["title"],
        fields["source"].removeprefix("FORMAT.md, "),
        expect,
        edits,
        {name: json.loads(value) for name, value in pairs},
    )
    return vector, fields["released"]


@dataclass
class Case:
    """What a reader under test is given: a store, and what its configuration and its broker say."""

    blobs: dict[str, bytes]
    index: bytes
    reader: dict[str, Any]

    # A BlobSource over memory, as a store without any honesty has it.

    def read_manifest(self, reference: str, max_bytes: int) -> bytes:
        if m.is_digest(reference):
            return self.read_blob(reference, max_bytes)
        found = [entry.digest for entry in m.parse_index(self.index) if entry.ref_name == reference]
        return self.read_blob(found[0] if found else "", max_bytes)

    def referrers(self, digest: str) -> tuple[str, ...]:
        return tuple(entry.digest for entry in m.parse_index(self.index, m.SIGNATURE_TYPE) if entry.ref_name is None)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        data = self.blobs.get(digest)
        if data is None:
            raise ArtifactUnavailableError(StoreProblem.NOT_FOUND)
        if len(data) > max_bytes:
            raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
        return data

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        data = self.read_blob(digest, 1 << 40)[offset : offset + len(out)]
        out[: len(data)] = data
        return len(data)

    def close(self) -> None:
        pass


def apply(edits: tuple[str, ...], models: dict[str, Model]) -> Case:
    """The good model with the edits of a vector. Raises ValueError: an edit is none."""
    good = models["good"]
    case = Case(
        dict(good.blobs), good.index, {"digest": good.digest, "key": KEY, "key_uri": KEY_URI, "min_version": 0, "floor": 0}
    )
    config, manifest = good.blobs[good.config_digest()], good.blobs[good.digest]
    provider = "pin: provider" in edits
    for line in edits:
        target, _, operation = line.partition(": ")
        kind, _, path = target.partition(" ")
        if kind == "reader":
            name, value = operation.split(" ", 1)
            case.reader[name] = _read(name, value)
        elif kind == "blob":
            digest = good.blob_digest(path)
            case.blobs[digest] = _edit(case.blobs.get(digest, b""), operation, models, path)
            if operation == "absent":
                del case.blobs[digest]
        elif kind == "config":
            config = _edit(config, operation, models, None)
        elif kind == "manifest":
            manifest = _edit(manifest, operation, models, None)
        elif kind == "signature":
            digest = good.signature_digest()
            case.blobs[digest] = _edit(case.blobs[digest], operation, models, None)
        elif kind == "index":
            case.index = _edit(case.index, operation, models, None)
        elif kind != "pin":
            raise ValueError(line)
    _store(case, good, config, manifest, provider)
    return case


def _read(name: str, value: str) -> Any:
    """What the reader is configured with."""
    if name == "provider_key":
        return public_pem({"signer": SIGNER, "stranger": STRANGER}[value])
    if name == "key":
        return bytes.fromhex(value)
    return int(value) if name in ("min_version", "floor") else value


def _store(case: Case, good: Model, config: bytes, manifest: bytes, provider: bool) -> None:
    """Put config and manifest where the reader looks. A provider's defect is pinned; a store's is not."""
    if not provider:
        case.blobs[good.config_digest()] = config
        case.blobs[good.digest] = manifest
        return
    if config != good.blobs[good.config_digest()]:
        document = json.loads(manifest)
        described = {"digest": m.digest_of(config), "size": len(config)}
        # What a vector says of the descriptor itself stays as it says.
        before = good.manifest["config"]
        document["config"] |= {k: v for k, v in described.items() if document["config"].get(k) == before[k]}
        manifest = rfc8785.dumps(document)
        case.blobs[m.digest_of(config)] = config
    case.blobs[m.digest_of(manifest)] = manifest
    case.reader["digest"] = m.digest_of(manifest)


def _edit(data: bytes, operation: str, models: dict[str, Model], path: str | None) -> bytes:
    name, _, rest = operation.partition(" ")
    arguments = rest.split(" ") if rest else []
    edited: bytes = _OPERATIONS[name](data, *arguments) if name in _OPERATIONS else b""
    if name == "take":
        model = models[arguments[0]]
        wanted = {"config": model.config_digest(), "manifest": model.digest, "signature": model.signature_digest()}
        return model.blobs[wanted.get(arguments[1]) or model.blob_digest(arguments[1])]
    if name == "plaintext":
        assert path is not None
        return plaintext(path)
    return edited


def _flip(data: bytes, at: str) -> bytes:
    i = int(at)
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


def _segments(data: bytes, *order: str) -> bytes:
    pieces = [data[i : i + SEGMENT_BYTES] for i in range(0, len(data), SEGMENT_BYTES)]
    return b"".join(pieces[int(i)] for i in order)


def _put(data: bytes, pointer: str, value: str) -> bytes:
    document = json.loads(data)
    parent, last = _parent(document, pointer)
    parent[last] = json.loads(value)
    return rfc8785.dumps(document)


def _delete(data: bytes, pointer: str) -> bytes:
    document = json.loads(data)
    parent, last = _parent(document, pointer)
    del parent[last]
    return rfc8785.dumps(document)


def _swap(data: bytes, pointer: str, other: str) -> bytes:
    document = json.loads(data)
    (a, i), (b, j) = _parent(document, pointer), _parent(document, other)
    a[i], b[j] = b[j], a[i]
    return rfc8785.dumps(document)


def _repeat(data: bytes, pointer: str, times: str) -> bytes:
    document = json.loads(data)
    parent, last = _parent(document, pointer)
    parent[last] = parent[last] * int(times)
    return rfc8785.dumps(document)


def _parent(document: Any, pointer: str) -> tuple[Any, Any]:
    *way, last = (part.replace("~1", "/") for part in pointer.removeprefix("/").split("/"))
    for part in way:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document, int(last) if isinstance(document, list) else last


def _indent(data: bytes) -> bytes:
    return msgspec.json.format(data, indent=1)


_OPERATIONS: dict[str, Callable[..., bytes]] = {
    "flip": _flip,  # the lowest bit of the byte at an offset
    "cut": lambda data, length: data[: int(length)],
    "append": lambda data, extra: data + bytes.fromhex(extra),
    "segments": _segments,  # put 1 MiB pieces of the blob into this order
    "set": _put,  # JSON pointer and JSON value without spaces
    "delete": _delete,
    "swap": _swap,
    "repeat": _repeat,
    "replace": lambda data, old, new: data.replace(bytes.fromhex(old), bytes.fromhex(new)),
    "indent": _indent,
    "raw": lambda data, text: bytes.fromhex(text),
    "absent": lambda data: b"",
}


# --- the good models, written down --------------------------------------------------------------------------------------


def good_text(models: dict[str, Model]) -> str:
    """`good.txt`: the digests that a stranger's sealer must come to."""
    lines = [f"key: {KEY.hex()}", f"key_uri: {KEY_URI}", f"signer: {SIGNER.private_bytes_raw().hex()}"]
    for which, model in models.items():
        name, version, _ = MODELS[which]
        lines += ["", f"model: {which}", f"name: {name}", f"version: {version}", f"manifest: {model.digest}"]
        lines += [f"config: {model.config_digest()}"]
        for path, size in SIZES.items():
            blob = model.blobs[model.blob_digest(path)]
            lines += [f"blob: {path} {size} {blob[:40].hex()} {model.blob_digest(path)}"]
    return "\n".join([*lines, ""])


def boundaries(path: str) -> list[int]:
    """Every place in a blob where something begins or ends."""
    size = SIZES[path]
    segments = -(-(size + 40) // (SEGMENT_BYTES - TAG_BYTES))
    end = 40 + size + segments * TAG_BYTES
    return [0, 1, 33, 40, *(i * SEGMENT_BYTES for i in range(1, segments)), end - TAG_BYTES, end]
