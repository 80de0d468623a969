"""Faults of the store and of the sealed model, and an evil store: it drops, mixes, cuts and keeps old files."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from agent.artifact import luks2
from agent.artifact.kserve import list_digest
from agent.artifact.load import read_model
from agent.artifact.manifest import SIGNATURE_TYPE, add_to_index, digest_of
from agent.artifact.seal import SealPlan, check_for_registry, seal_model
from agent.artifact.seal_volume import DATA_OFFSET, HEADER_BYTES, check_volume, seal_volume
from agent.artifact.signature import public_pem
from agent.artifact.sources import open_source
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.volume import check_disk
from agent.artifact.volume_config import VolumeConfig
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.cose import PrivateKey
from agent.errors import (
    AgentError,
    ArtifactUnavailableError,
    BundleCheck,
    ConfigError,
    ConfigProblem,
    KeyMismatchError,
    MalformedHeaderError,
    MalformedManifestError,
    ManifestDigestError,
    ManifestSignatureError,
    ManifestTooLargeError,
    ModelSignatureError,
    RollbackError,
    SealError,
    SealProblem,
    SegmentAuthenticationError,
    SignatureCheck,
    StoreProblem,
    TruncatedArtifactError,
    VolumeAuthenticationError,
    VolumeHeaderError,
    VolumeProblem,
    VolumeUnavailableError,
)
from tests import bucket
from tests.connect_proxy import Behaviour, ConnectProxy, answers, drips
from tests.faults.table import SERVED, Attempts, Fault, FaultWorld
from tests.fuzz.targets import jwe_of_kserve
from tests.range_server import Fault as Store
from tests.range_server import RangeServer, make_certificate
from tests.script_server import Reply, ScriptServer
from tests.test_artifact_openssf import SIGNER, bundle, statement
from tests.world import KEY_URI, World, free_port

ONCE = Attempts.ONCE


def blob(world: World, digest: str) -> Path:
    return world.layout / "blobs" / digest.replace(":", "/")


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(path.read_bytes())
    path.chmod(0o600)
    path.write_bytes(data)


def weights(world: World, index: int = 0) -> Path:
    manifest = json.loads(blob(world, world.manifest_digest).read_bytes())
    return blob(world, manifest["layers"][index]["digest"])


def _weights(change: Callable[[bytes], bytes]) -> Callable[[FaultWorld], None]:
    return lambda world: rewrite(weights(world), change)


def manifest_replaced(world: FaultWorld) -> None:
    name = world.canaries.file_name.encode()
    rewrite(
        blob(world, world.manifest_digest), lambda data: data.replace(b"sealed", b"saeled").replace(name, name[::-1]) + b" "
    )


def manifest_not_in_store(world: FaultWorld) -> None:
    world.artifact["manifest_digest"] = "sha256:" + "33" * 32
    world.row["manifest_digests"] = [{"id": "none", "value": world.artifact["manifest_digest"]}]


def _measured_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[FaultWorld], None]:
    """A manifest that is malformed and yet the one the configuration names: the provider's fault, not the store's."""

    def arrange(world: FaultWorld) -> None:
        manifest = json.loads(blob(world, world.manifest_digest).read_bytes())
        change(manifest)
        data = json.dumps(manifest).encode()
        world.artifact["manifest_digest"] = "sha256:" + hashlib.sha256(data).hexdigest()
        world.row["manifest_digests"] = [{"id": "changed", "value": world.artifact["manifest_digest"]}]
        blob(world, world.artifact["manifest_digest"]).write_bytes(data)

    return arrange


def header_of_another_format(world: FaultWorld) -> None:
    """In the config blob, which the manifest names by its digest."""

    def change(manifest: dict[str, Any]) -> None:
        data = blob(world, manifest["config"]["digest"]).read_bytes()
        model = json.loads(data)
        model["files"][0]["header"] = "29" + model["files"][0]["header"][2:]
        data = rfc8785.dumps(model)
        digest = hashlib.sha256(data).hexdigest()
        manifest["config"] |= {"digest": f"sha256:{digest}", "size": len(data)}
        blob(world, manifest["config"]["digest"]).write_bytes(data)

    _measured_manifest(change)(world)


def wrong_key(world: FaultWorld) -> None:
    world.key_file.write_bytes(bytes(32))


def below_the_signed_floor(world: FaultWorld) -> None:
    world.row["min_model_version"] = 4


def below_the_measured_floor(world: FaultWorld) -> None:
    world.artifact["min_version"] = 9


def other_key_uri(world: FaultWorld) -> None:
    world.broker_config["key_uri"] = "kbs:///models/other/1"
    world.row["key_uri"] = "kbs:///models/other/1"
    other = world.key_file.parent.parent / "other" / "1"
    other.parent.mkdir(parents=True)
    shutil.copy(world.key_file, other)


def two_files_mixed(world: FaultWorld) -> None:
    shutil.copy(weights(world, 1), weights(world, 0))


def old_file(world: FaultWorld) -> None:
    """The same file of an older release, sealed with the same key under the same name."""
    old = world.folder / "old"
    seal_model(world.folder / "source", old, world.canaries.key, KEY_URI, "tiny", 2, lambda *_: None)
    manifest = json.loads((old / "index.json").read_bytes())["manifests"][0]["digest"]
    layer = json.loads((old / "blobs" / manifest.replace(":", "/")).read_bytes())["layers"][0]["digest"]
    shutil.copy(old / "blobs" / layer.replace(":", "/"), weights(world))


def old_manifest(world: FaultWorld) -> None:
    """The store answers with the older release's manifest where the newer one was asked for."""
    old = world.folder / "old"
    digest = seal_model(world.folder / "source", old, world.canaries.key, KEY_URI, "tiny", 2, lambda *_: None)
    shutil.copy(old / "blobs" / digest.replace(":", "/"), blob(world, world.manifest_digest))


def _signed(sign: Callable[[FaultWorld, PrivateKey], object]) -> Callable[[FaultWorld], None]:
    """A configuration that believes one key, and a store in which `sign` has done something with it."""

    def arrange(world: FaultWorld) -> None:
        key = ed25519.Ed25519PrivateKey.generate()
        del world.artifact["manifest_digest"]
        world.artifact |= {"provider_keys": [public_pem(key)], "tag": "tiny-v4", "name": "tiny"}
        sign(world, key)

    return arrange


def _seal_signed(world: FaultWorld, version: int, *keys: PrivateKey) -> str:
    source = world.folder / "source"
    return seal_model(source, world.layout, world.canaries.key, KEY_URI, "tiny", version, lambda *_: None, keys)


def signature_of_another_release(world: FaultWorld, key: PrivateKey) -> None:
    """The store moves a good signature to a manifest that it was not made for."""
    old, new = _seal_signed(world, 5, key), _seal_signed(world, 4)
    for path in (world.layout / "blobs/sha256").iterdir():
        data = path.read_bytes()
        if b'"subject"' in data:
            moved = data.replace(old.encode(), new.encode())
            place_manifest(world, moved)


def place_manifest(world: FaultWorld, data: bytes) -> None:
    index = world.layout / "index.json"
    blob(world, digest_of(data)).write_bytes(data)
    index.write_bytes(add_to_index(index.read_bytes(), data, None, SIGNATURE_TYPE))


def old_release_under_a_new_tag(world: FaultWorld, key: PrivateKey) -> None:
    """Signed for ever: only the floor stands against it."""
    _seal_signed(world, 2, key)
    world.artifact |= {"tag": "tiny-v2", "min_version": 3}


def another_model_under_the_tag(world: FaultWorld, key: PrivateKey) -> None:
    _seal_signed(world, 4, key)
    world.artifact["name"] = "another"


def nobody_listens(world: FaultWorld) -> None:
    world.artifact |= {"source": f"http://127.0.0.1:{free_port()}", "timeout_s": 2}


def foreign_store_certificate(world: FaultWorld) -> None:
    _, other = make_certificate(world.folder)
    certificate, _ = make_certificate(world.folder / "machine")
    server = world.undo.enter_context(RangeServer(world.layout, certificate=certificate))
    world.artifact |= {"source": server.url, "ca_pem": other}


def _store(fault: Store) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.artifact |= {"source": world.undo.enter_context(RangeServer(world.layout, fault)).url, "timeout_s": 2}

    return arrange


def store_far_away(world: FaultWorld) -> None:
    world.artifact |= {"source": "https://store.invalid/models/tiny", "timeout_s": 2}


def _proxy(behaviour: Behaviour | None) -> Callable[[FaultWorld], object]:
    """It knows no server."""

    def drive(world: FaultWorld) -> None:
        with (
            ConnectProxy({}, behaviour) as there,
            closing(open_source("https://store.invalid/models/tiny", None, 1, proxy=there.proxy)) as source,
        ):
            source.read_blob(world.manifest_digest, 1 << 20)

    return drive


def _registry(*challenges: str) -> Callable[[FaultWorld], None]:
    """A registry that asks for more than it can get."""

    def arrange(world: FaultWorld) -> None:
        headers = [("WWW-Authenticate", challenge) for challenge in challenges]
        server = world.undo.enter_context(ScriptServer(lambda _: Reply(401, headers)))
        login = {"user": "guest", "secret": world.canaries.config_secret}
        world.artifact |= {"source": f"oci+http://{server.host}/models/tiny", **login}

    return arrange


def _bucket(changes_after: int | None, secret: str) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        server = world.undo.enter_context(bucket.Bucket(world.layout, changes_after=changes_after))
        login = {"user": bucket.KEY_ID, "secret": secret, "session_token": bucket.TOKEN}
        where = {"source": f"s3://models/{bucket.PREFIX}", "endpoint": server.url, "region": bucket.REGION}
        world.artifact |= {**where, **login}

    return arrange


def credentials_that_do_not_open_it(world: FaultWorld) -> None:
    world.keep_credentials(world.canaries.config_secret)


def _bundle(folder: Path, key: ec.EllipticCurvePrivateKey) -> bytes:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "model.sig")
    return bundle(statement({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}), key)


def _openssf(name: str, check: BundleCheck, breaks: Callable[[Path], object], *, at_once: bool = False) -> Fault:
    """A model that was signed, then broken, then sealed: to the sealing all is well."""

    def arrange(world: FaultWorld) -> None:
        folder = world.folder / "source"
        (folder / "model.sig").write_bytes(_bundle(folder, SIGNER))
        breaks(folder)
        digest = seal_model(folder, world.layout, world.canaries.key, KEY_URI, "tiny", 4, lambda *_: None)
        world.artifact |= {"manifest_digest": digest, "model_signature": "model.sig"}
        world.artifact["model_signature_keys"] = [public_pem(SIGNER)]
        world.row["manifest_digests"] = [{"id": "signed", "value": digest}]

    audit = None if at_once else SERVED
    attempts = Attempts.EITHER if at_once else ONCE
    return Fault(f"signed model: {name}", ModelSignatureError, arrange, {"check": check}, audit, attempts, needs_root=True)


PLAIN = b'{"hidden_size": 256}'


def kserve_model(world: World, key: bytes) -> Path:
    """This world's model as KServe keeps it, in a folder, in the place of the sealed one."""
    folder = world.folder / "kserve"
    folder.mkdir()
    for name, content in world.model.items():
        header = {"alg": "A256KW", "enc": "A256GCM"}
        (folder / f"{name}.jwe").write_bytes(jwe_of_kserve(header, content, key))
    (folder / "config.json").write_bytes(PLAIN)
    listed = {"config.json": f"sha256:{hashlib.sha256(PLAIN).hexdigest()}"}
    jwe_files = [f"{name}.jwe" for name in world.model]
    world.artifact = {"source": str(folder), "format": "kserve-jwe", "name": "tiny", "jwe_files": jwe_files}
    world.artifact["plain_files"] = listed
    digest = list_digest(msgspec.convert(world.artifact, ArtifactConfig))
    world.row |= {"manifest_digests": [{"id": "kserve", "value": digest}], "min_model_version": 0}
    return folder


def _kserve(name: str, error: type[AgentError], breaks: Callable[[FaultWorld, Path], object], **more: Any) -> Fault:
    """A model as KServe keeps it, before `breaks` gets at its folder."""
    return Fault(
        f"KServe: {name}",
        error,
        lambda world: breaks(world, kserve_model(world, world.canaries.key)),
        needs_root=True,  # more than one file
        **more,
    )


def _jwe(change: Callable[[bytes], bytes]) -> Callable[[FaultWorld, Path], object]:
    return lambda _, folder: rewrite(next(folder.rglob("*.jwe")), change)


def _unavailable(fault: Store, problem: StoreProblem, status: int | None = None) -> Fault:
    fields: dict[str, object] = {"problem": problem}
    if status is not None:
        fields["status"] = status
    return Fault(f"store that answers {fault.name.lower().replace('_', ' ')}", ArtifactUnavailableError, _store(fault), fields)


def _seal(name: str, problem: SealProblem, folder: Callable[[FaultWorld], Path], out: str = "sealed") -> Fault:
    def drive(world: FaultWorld) -> object:
        at = folder(world)
        return seal_model(at, world.folder / out, world.canaries.key, KEY_URI, "tiny", 3, lambda *_: None)

    return Fault(name, SealError, fields={"problem": problem}, drive=drive)


def _volume(name: str, error: type[AgentError], change: Callable[[bytes], bytes], **more: Any) -> Fault:
    """A disk that somebody has changed. Without a device mapper: the boot test has the whole of it."""

    def drive(world: FaultWorld) -> object:
        key = world.canaries.key
        with tempfile.TemporaryDirectory() as folder:
            image, layout = Path(folder, "model.img"), Path(folder, "layout")
            digest = seal_volume(world.folder / "source", image, layout, key, KEY_URI, "tiny", 3, lambda *_: None)
            with closing(DirectorySource(str(layout))) as source:
                config = ArtifactConfig(source=str(layout), manifest_digest=digest, format="volume")
                model = read_model(source, config, KEY_URI)
            assert isinstance(model, VolumeConfig)
            rewrite(image, change)
            with image.open("rb") as disk:
                check_disk(disk.fileno(), model)
            check_volume(image, model, key, lambda *_: None)
        return None

    return Fault(f"volume {name}", error, drive=drive, **more)


def null_cipher(disk: bytes) -> bytes:
    header = disk[:HEADER_BYTES].replace(b'"aes-xts-plain64"', b'"cipher_null-ecb"')
    return luks2.with_checksum(header) + disk[HEADER_BYTES:]


def bit_flipped(disk: bytes) -> bytes:
    return disk[:DATA_OFFSET] + bytes([disk[DATA_OFFSET] ^ 1]) + disk[DATA_OFFSET + 1 :]


def more_than_a_registry_takes(_: FaultWorld) -> object:
    plan = SealPlan({f"{i:0100}": 1 for i in range(20_000)}, {})
    check_for_registry(plan, KEY_URI, "tiny", 3)
    return None


ROWS = [
    # --- the store ----------------------------------------------------------------------------------------------------
    Fault("store where nobody listens", ArtifactUnavailableError, nobody_listens, {"problem": StoreProblem.UNREACHABLE}),
    Fault(
        "store behind a proxy that is not there",
        ArtifactUnavailableError,
        store_far_away,
        {"problem": StoreProblem.PROXY, "status": 0},
        flags=("--proxy", "http://127.0.0.1:1"),
    ),
    Fault(
        "proxy that nothing goes through",
        ConfigError,
        fields={"problem": ConfigProblem.NEEDS_OTHER_KEY, "key": "proxy"},
        audit=[],
        attempts=Attempts.NEVER,
        flags=("--proxy", "http://127.0.0.1:1"),
    ),
    *(
        Fault(
            f"store behind a proxy that {name}",
            ArtifactUnavailableError,
            fields={"problem": StoreProblem.PROXY, "status": status},
            drive=_proxy(behaviour),
        )
        for name, status, behaviour in (
            ("refuses", 403, None),
            ("wants a password", 407, answers(b"HTTP/1.1 407 Who?\r\n\r\n")),
            ("does not reach it", 502, answers(b"HTTP/1.1 502 Gone\r\n\r\n")),
            ("drips", 0, drips(b"HTTP/1.1 200 OK\r\n" * 100)),
            ("is none", 0, answers(b"SSH-2.0-x\r\n\r\n")),
        )
    ),
    Fault(
        "store behind a foreign certificate", ArtifactUnavailableError, foreign_store_certificate, {"problem": StoreProblem.TLS}
    ),
    Fault("manifest not in the store", ArtifactUnavailableError, manifest_not_in_store, {"problem": StoreProblem.NOT_FOUND}),
    _unavailable(Store.NOT_FOUND, StoreProblem.NOT_FOUND, 404),
    _unavailable(Store.FORBIDDEN, StoreProblem.REFUSED, 403),
    _unavailable(Store.BROKEN, StoreProblem.SERVER_ERROR, 500),
    _unavailable(Store.TEAPOT, StoreProblem.BAD_ANSWER, 418),
    _unavailable(Store.REDIRECT_LOOP, StoreProblem.BAD_ANSWER),
    _unavailable(Store.REDIRECT_AWAY, StoreProblem.BAD_ANSWER),
    _unavailable(Store.REDIRECT_NOWHERE, StoreProblem.BAD_ANSWER),
    _unavailable(Store.GARBAGE, StoreProblem.UNREACHABLE),
    _unavailable(Store.GZIP, StoreProblem.BAD_ANSWER),
    _unavailable(Store.DRIP_HEAD, StoreProblem.TIMEOUT),
    _unavailable(Store.NO_RANGES, StoreProblem.BAD_ANSWER),
    _unavailable(Store.WRONG_START, StoreProblem.BAD_ANSWER),
    _unavailable(Store.NO_CONTENT_RANGE, StoreProblem.BAD_ANSWER),
    Fault(
        "registry that does not know the guest",
        ArtifactUnavailableError,
        _registry('Basic realm="models"'),
        {"problem": StoreProblem.REFUSED, "status": 401},
    ),
    Fault(
        "registry that wants the password elsewhere in the open",
        ArtifactUnavailableError,
        _registry('Bearer realm="http://tokens.example/",service="x"'),
        {"problem": StoreProblem.BAD_ANSWER, "status": 401},
    ),
    Fault(
        "registry whose challenge is none",
        ArtifactUnavailableError,
        _registry('Basic realm="models'),
        {"problem": StoreProblem.BAD_ANSWER, "status": 401},
    ),
    Fault(
        "bucket that finds the signature wrong",
        ArtifactUnavailableError,
        _bucket(None, "another-secret"),
        {"problem": StoreProblem.REFUSED, "status": 403},
    ),
    Fault(
        "bucket that refuses the broker's credentials",
        ArtifactUnavailableError,
        credentials_that_do_not_open_it,
        {"problem": StoreProblem.REFUSED, "status": 403},
        attempts=ONCE,
    ),
    Fault(
        "object that is replaced under the reader",
        ArtifactUnavailableError,
        _bucket(2, bucket.SECRET),
        {"problem": StoreProblem.CHANGED},
        SERVED,
        ONCE,
    ),
    # --- the sealed model ---------------------------------------------------------------------------------------------
    Fault("manifest replaced", ManifestDigestError, manifest_replaced),
    Fault("manifest of the older release", ManifestDigestError, old_manifest),
    *(
        Fault(name, ManifestSignatureError, _signed(sign), {"check": check})
        for name, sign, check in (
            ("manifest that nobody signed", lambda world, _: _seal_signed(world, 4), SignatureCheck.MISSING),
            (
                "manifest that somebody else signed",
                lambda world, _: _seal_signed(world, 4, ed25519.Ed25519PrivateKey.generate()),
                SignatureCheck.KEY,
            ),
            ("signature of another release", signature_of_another_release, SignatureCheck.MANIFEST),
        )
    ),
    Fault("signed release below the floor", RollbackError, _signed(old_release_under_a_new_tag), {"version": 2, "floor": 3}),
    Fault("another signed model", ConfigError, _signed(another_model_under_the_tag), {"key": "artifact.name"}),
    Fault("file dropped from the manifest", MalformedManifestError, _measured_manifest(lambda m: m["layers"].pop()), files=2),
    Fault("manifest without files", MalformedManifestError, _measured_manifest(lambda m: m.update(layers=[]))),
    Fault(
        "manifest of another kind",
        MalformedManifestError,
        _measured_manifest(lambda m: m.update(artifactType="a/b")),
        {"field": "artifactType"},
    ),
    Fault("manifest for another key", ConfigError, other_key_uri, {"key": "broker.key_uri"}),
    Fault(
        "segment flipped",
        SegmentAuthenticationError,
        _weights(lambda data: data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:]),
        {"file": 0, "segment": 1},
        SERVED,
        ONCE,
    ),
    Fault(
        "two segments that changed places",
        SegmentAuthenticationError,
        _weights(lambda data: data[: 1 << 20] + data[2 << 20 : 3 << 20] + data[1 << 20 : 2 << 20] + data[3 << 20 :]),
        {"file": 0},
        SERVED,
        ONCE,
    ),
    Fault("two files mixed", SegmentAuthenticationError, two_files_mixed, {"file": 0}, SERVED, ONCE, files=2, needs_root=True),
    Fault("file of an older release", SegmentAuthenticationError, old_file, {"file": 0}, SERVED, ONCE),
    Fault("blob one byte short", TruncatedArtifactError, _weights(lambda data: data[:-1]), {"file": 0}, SERVED, ONCE),
    Fault("blob that is empty", TruncatedArtifactError, _weights(lambda data: b""), {"file": 0}, SERVED, ONCE),
    Fault(
        "blob dropped from the store",
        ArtifactUnavailableError,
        lambda world: weights(world).unlink(),
        {"problem": StoreProblem.NOT_FOUND},
        SERVED,
        ONCE,
    ),
    Fault(
        "plain weights in the place of sealed ones",
        SegmentAuthenticationError,
        lambda world: rewrite(weights(world), lambda data: world.canaries.model(len(data))),
        {"file": 0, "segment": 0},
        SERVED,
        ONCE,
    ),
    Fault("stream header of another format", MalformedHeaderError, header_of_another_format, {"file": 0}),
    Fault("wrong key", KeyMismatchError, wrong_key, audit=SERVED, attempts=ONCE),
    Fault("model below the signed floor", RollbackError, below_the_signed_floor, {"version": 3, "floor": 4}, SERVED, ONCE),
    Fault("model below the measured floor", RollbackError, below_the_measured_floor, {"version": 3, "floor": 9}),
    # --- a model that was signed before it was sealed -----------------------------------------------------------------
    _openssf("without its bundle", BundleCheck.MISSING, lambda folder: (folder / "model.sig").unlink(), at_once=True),
    _openssf("bundle that is none", BundleCheck.FORMAT, lambda folder: (folder / "model.sig").write_bytes(b"{}")),
    _openssf("a file more", BundleCheck.FILES, lambda folder: (folder / "backdoor.py").write_bytes(b"import os")),
    _openssf(
        "another file of the same name",
        BundleCheck.DIGEST,
        lambda folder: rewrite(next(folder.rglob("*.gguf")), lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ),
    _openssf(
        "signed by somebody else",
        BundleCheck.SIGNATURE,
        lambda folder: (folder / "model.sig").write_bytes(_bundle(folder, ec.derive_private_key(8, ec.SECP256R1()))),
    ),
    # --- a model of KServe --------------------------------------------------------------------------------------------
    _kserve(
        "plain weights in the place of sealed ones",
        MalformedHeaderError,
        lambda world, folder: rewrite(next(folder.rglob("*.jwe")), lambda data: world.canaries.model(len(data))),
        fields={"file": 0},
    ),
    _kserve(
        "file flipped",
        SegmentAuthenticationError,
        _jwe(lambda data: data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:]),
        fields={"file": 0},
        audit=SERVED,
        attempts=ONCE,
    ),
    _kserve(
        "file cut short", SegmentAuthenticationError, _jwe(lambda data: data[:-4023] + data[-23:]), audit=SERVED, attempts=ONCE
    ),
    _kserve("wrong key", KeyMismatchError, lambda world, _: wrong_key(world), audit=SERVED, attempts=ONCE),
    _kserve(
        "plain file that is not the listed one",
        ManifestDigestError,
        lambda _, folder: rewrite(folder / "config.json", lambda data: data.replace(b"256", b"255")),
    ),
    _kserve(
        "sealed file that is not there",
        ArtifactUnavailableError,
        lambda _, folder: next(folder.rglob("*.jwe")).unlink(),
        fields={"problem": StoreProblem.NOT_FOUND},
    ),
    _kserve(
        "verdict with a floor",
        RollbackError,
        lambda world, _: world.row.update(min_model_version=1),
        fields={"version": 0, "floor": 1},
        audit=SERVED,
        attempts=ONCE,
    ),
    # --- encrypted volumes --------------------------------------------------------------------------------------------
    _volume("cut", VolumeUnavailableError, lambda disk: disk[:DATA_OFFSET], fields={"problem": VolumeProblem.TOO_SMALL}),
    _volume("with a null cipher", VolumeHeaderError, null_cipher, fields={"field": Ident("segments[].encryption")}),
    _volume("with a bit flipped", VolumeAuthenticationError, bit_flipped),
    # --- sealing ------------------------------------------------------------------------------------------------------
    _seal("model folder that is not there", SealProblem.MODEL_MISSING, lambda world: world.folder / "absent"),
    _seal("model folder without files", SealProblem.EMPTY, lambda world: world.cwd or world.folder),
    _seal("output inside the model", SealProblem.INSIDE, lambda world: world.folder / "source", "source/sealed"),
    _seal("output that is no layout", SealProblem.NOT_A_LAYOUT, lambda world: world.folder / "source", "broker"),
    Fault("more files than a registry takes", ManifestTooLargeError, drive=more_than_a_registry_takes),
]
