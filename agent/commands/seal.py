"""`keyturn seal`: encrypt a model folder into a sealed model."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.artifact.push import check_repository, push_layout
from agent.artifact.seal import check_for_registry, check_identity, plan_seal, seal_model
from agent.artifact.seal_volume import seal_volume
from agent.artifact.signature import parse_signing_key, public_pem
from agent.artifact.sources import check_secrecy
from agent.artifact.sources.access import ANONYMOUS, Access, parse_access
from agent.artifact.sources.oci import Repository
from agent.artifact.stream import KEY_BYTES, StreamLayout
from agent.closed import Ident
from agent.cose import PrivateKey, key_id
from agent.errors import ConfigError, ConfigProblem, SealError, SealProblem
from agent.tink_keyset import MAX_KEYSET_BYTES, parse_keyset

REGISTRY_TIMEOUT_S = 60.0
_MAX_PEM_BYTES = 1 << 20
_MAX_ACCESS_BYTES = 64 << 10


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser("seal", help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder with the model's files")
    parser.add_argument(
        "--to",
        metavar="DIR|REPOSITORY",
        required=True,
        help="OCI image layout: new, or to add this version to; or oci://host[:port]/name of a registry: sealed into the "
        "folder NAME-vN.layout here, pushed, and removed; what broke off is finished by `keyturn push`",
    )
    parser.add_argument(
        "--key-uri", metavar="URI", required=True, help="where the broker holds the key: kbs:///repository/type/tag"
    )
    parser.add_argument("--name", required=True, help="model name: letters, digits, . _ -")
    parser.add_argument("--version", metavar="N", dest="model_version", type=int, required=True, help="1 or more, rising")
    parser.add_argument(
        "--key-file",
        metavar="K",
        type=Path,
        help="32 raw bytes, or a Tink JSON keyset of one AES256_GCM_HKDF_1MB key. With the key of an earlier version in the "
        "layout, files that did not change keep their blobs. Default: a new key in NAME-vN.key beside the output folder",
    )
    parser.add_argument(
        "--sign",
        metavar="PEM",
        type=Path,
        action="append",
        default=[],
        help="sign the manifest with this private key (unencrypted PKCS#8; P-256, P-384 or Ed25519, as `openssl genpkey "
        "-algorithm ed25519` makes one); give it twice while a key is replaced",
    )
    parser.add_argument(
        "--volume",
        metavar="IMAGE",
        type=Path,
        help="seal into one disk image, to be written to a disk of the guest, in place of blobs: --to gets the manifest only",
    )
    add_access(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be sealed and what is unchanged, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    check_identity(args.name, args.model_version, args.key_uri)  # before the name becomes a file name
    access, ca_pem, repository = read_access(args), read_ca(args), None
    if args.to.startswith(("oci://", "oci+http://")):
        repository = parse_repository(args.to, access)
        check_repository(repository, ca_pem, access, REGISTRY_TIMEOUT_S)
    out = Path(f"{args.name}-v{args.model_version}.layout" if repository else args.to).resolve()
    if repository and out.exists():  # it is ours to remove only if it is ours
        raise SealError(SealProblem.SEALED_BEFORE)
    key_file = args.key_file or out.parent / f"{args.name}-v{args.model_version}.key"
    # What lies in the layout gets uploaded, what lies in the model folder gets sealed.
    if key_file.resolve().is_relative_to(out) or key_file.resolve().is_relative_to(args.model.resolve()):
        raise SealError(SealProblem.INSIDE)
    signing_keys = [_read_signing_key(path) for path in args.sign]
    if repository is not None and args.volume is None:
        plan = plan_seal(args.model, out, None, args.key_uri, args.name, args.model_version, lambda _, __: None)
        check_for_registry(plan, args.key_uri, args.name, args.model_version)
    if args.dry_run:
        if args.volume is not None:
            args.usage_error("--dry-run says nothing of an encrypted volume")
        return _plan(args, out)
    with _termination_unwinds(), contextlib.ExitStack() as undo:
        key = read_key_file(key_file) if args.key_file else _create_key_file(key_file, undo)
        with progress_line("sealing") as progress:
            if args.volume is None:
                digest = seal_model(args.model, out, key, args.key_uri, args.name, args.model_version, progress, signing_keys)
            else:
                digest = seal_volume(
                    args.model, args.volume, out, key, args.key_uri, args.name, args.model_version, progress, signing_keys
                )
        undo.pop_all()
    source = str(out)
    if repository is not None:
        source = args.to
        hint(f"should this break off, `keyturn push {shlex.quote(str(out))} {args.to}` goes on with it")
        with progress_line("pushing") as progress:
            push_layout(out, repository, ca_pem, access, REGISTRY_TIMEOUT_S, progress)
        shutil.rmtree(out)
    if args.json:
        place = "layout" if repository is None else "repository"
        record = {"manifest_digest": digest, place: source, "key_file": str(key_file), "key_uri": args.key_uri}
        if args.volume is not None:
            record["volume"] = str(args.volume)
        if signing_keys:
            record["signed_by"] = [key_id(key.public_key()).hex() for key in signing_keys]
        print(json.dumps(record))
    else:
        print(_summary(args, source, key_file, digest, signing_keys))
    return 0


def _plan(args: argparse.Namespace, out: Path) -> int:
    key = read_key_file(args.key_file) if args.key_file else None
    with progress_line("comparing") as progress:
        plan = plan_seal(args.model, out, key, args.key_uri, args.name, args.model_version, progress)
    sealed_bytes = sum(StreamLayout(size).ciphertext_bytes for size in plan.changed.values())
    if args.json:
        record = {"files": len(plan.sizes), "unchanged": sorted(plan.kept), "new_blobs": len(plan.changed)}
        print(json.dumps(record | {"plaintext_bytes": sum(plan.sizes.values()), "new_blob_bytes": sealed_bytes}))
    else:
        print(
            f"would seal {args.name} version {args.model_version} into {args.to}: {len(plan.sizes)} files, "
            f"{size_text(sum(plan.sizes.values()))}\n{len(plan.changed)} new blobs, {size_text(sealed_bytes)}; "
            f"{len(plan.kept)} files are unchanged and keep theirs"
        )
    return 0


def _summary(args: argparse.Namespace, source: str, key_file: Path, digest: str, signing_keys: Sequence[PrivateKey]) -> str:
    signed = "".join(f"\nsigned with key {key_id(key.public_key()).hex()}" for key in signing_keys)
    local = "://" not in source
    copy, their = (f"Copy {source} to where guests can read it, and p", "their") if local else ("P", "the guests'")
    or_copy = "  # or the https, oci or s3 URL of the copy" if local else ""
    as_volume = "" if args.volume is None else '\n     format = "volume"'
    write = "" if args.volume is None else f"\n   Write {args.volume} to a disk of the guests, which they only read.\n"
    return f"""\
sealed {args.name} version {args.model_version} into {source}{signed}

1. Give the key to the broker. With the directory key store of `keyturn broker`:
     install -D -m 0600 {shlex.quote(str(key_file))} STORE/{args.key_uri.removeprefix("kbs:///")}
{write}
2. {copy}ut into {their} configuration:
     [broker]
     key_uri = "{args.key_uri}"

     [artifact]
     source = {json.dumps(source)}{or_copy}{as_volume}
     manifest_digest = "{digest}"
     min_version = {args.model_version}""" + (_by_signature(args, signing_keys) if signing_keys else "")


def _by_signature(args: argparse.Namespace, signing_keys: Sequence[PrivateKey]) -> str:
    pems = ",\n".join(f'"""\n{public_pem(key)}"""' for key in signing_keys)
    return f"""

   or, so that later releases need no new configuration, in place of manifest_digest:
     name = "{args.name}"
     tag = "{args.name}-v{args.model_version}"  # or a name that you move
     provider_keys = [{pems}]"""


def _read_signing_key(path: Path) -> PrivateKey:
    try:
        with path.open("rb") as stream:
            return parse_signing_key(stream.read(_MAX_PEM_BYTES))
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("sign")) from error
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("sign")) from None


def _create_key_file(path: Path, undo: contextlib.ExitStack) -> bytes:
    """32 new random bytes in a file that nobody else can read; taken back with `undo`."""
    key = os.urandom(KEY_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(path.unlink, missing_ok=True)
        with open(descriptor, "wb") as stream:
            stream.write(key)
            stream.flush()
            os.fsync(descriptor)
    except FileExistsError as error:
        raise SealError(SealProblem.KEY_EXISTS) from error
    except OSError as error:
        raise SealError(SealProblem.IO, code=error.errno or 0) from error
    return key


def read_key_file(path: Path) -> bytes:
    """The 32 bytes of a key file, or of the Tink JSON keyset in it.

    Raises:
        ConfigError: not readable, or neither.
    """
    try:
        with path.open("rb") as stream:
            key = stream.read(MAX_KEYSET_BYTES + 1)
            if os.fstat(stream.fileno()).st_mode & 0o077:
                hint("others can read the key file, chmod 600 it")
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("key-file")) from error
    try:
        return key if len(key) == KEY_BYTES else parse_keyset(key)
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("key-file")) from None


def add_access(parser: argparse.ArgumentParser) -> None:
    """The arguments that reach a store."""
    parser.add_argument("--ca-file", metavar="PEM", type=Path, help="the only CA to trust for https; default: the system's")
    parser.add_argument(
        "--credentials",
        metavar="TOML",
        type=Path,
        help="for a registry or an S3 bucket: a file with user and secret, for a bucket also session_token, endpoint and "
        "region, as they stand in [artifact]; never on the command line, where every process could read them",
    )


def read_access(args: argparse.Namespace) -> Access:
    """What `--credentials` holds. Raises ConfigError."""
    if args.credentials is None:
        return ANONYMOUS
    try:
        with args.credentials.open("rb") as stream:
            return parse_access(stream.read(_MAX_ACCESS_BYTES))
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("credentials")) from error
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("credentials")) from None


def read_ca(args: argparse.Namespace) -> str | None:
    """What `--ca-file` holds. Raises ConfigError."""
    return read_pem(args.ca_file, "ca-file") if args.ca_file else None


def parse_repository(location: str, access: Access) -> Repository:
    """Raises ConfigError."""
    try:
        repository = Repository.parse(location)
    except ValueError:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("repository")) from None
    check_secrecy(repository.url, access)
    return repository


def read_pem(path: Path, argument: str) -> str:
    """A text of at most 1 MiB. Raises ConfigError."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_PEM_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident(argument)) from error


def hint(text: str) -> None:
    """A line for people on stderr; programs read events there."""
    if sys.stderr.isatty():
        print(f"keyturn: hint: {text}", file=sys.stderr)


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, so that what was written is taken back."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_line(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A line on stderr that counts bytes done of bytes in all; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            print(f"\r{verb} {percent:3d} % of {size_text(total)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown >= 0:
            print(file=sys.stderr)


def size_text(size: int) -> str:
    """Bytes for people: `640 B`, `1.5 MiB`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
