"""S3 services and clients by other hands. `scripts/stores` installs them, sets KEYTURN_STORES to their folder and runs this.

SeaweedFS checks signatures, moto does not; boto3 puts the objects where both want them. oras pushes as another tool would.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent.artifact import manifest as m
from agent.artifact.load import read_model
from agent.artifact.seal import seal_model
from agent.artifact.sources import LayoutSource, open_source
from agent.artifact.sources.access import Access
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, StoreProblem
from tests.registry import LOGIN, SECRET, USER, DockerRegistry
from tests.test_demo_run import TIMEOUT_S as DEMO_TIMEOUT_S
from tests.world import free_port

STORES = Path(os.environ.get("KEYTURN_STORES", ""))
KEY_URI = "kbs:///models/tiny/1"
READER, ADMIN = ("reader", "reader-secret"), ("admin", "admin-secret")
START_S = 30

pytestmark = [
    pytest.mark.xdist_group("stores"),
    pytest.mark.skipif("KEYTURN_STORES" not in os.environ, reason="needs real S3 services: scripts/stores installs them"),
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(os.urandom(3_000_000))
    seal_model(folder / "model", folder / "layout", bytes(32), KEY_URI, "tiny", 1, lambda *_: None)
    return folder / "layout"


@contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    """A service, its URL."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + START_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < end
                    assert process.poll() is None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextmanager
def moto(_: Path) -> Iterator[str]:
    port = free_port()
    with running([str(STORES / "bin" / "python"), str(STORES / "bin" / "moto_server"), "-p", str(port)], port) as url:
        yield url


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
        for (name, secret), actions in ((READER, ["Read"]), (ADMIN, ["Admin"]))
    ]
    (folder / "ids.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    port = free_port()
    names = (
        *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
        *("s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "admin.port", "admin.port.grpc"),
    )
    ports = [f"-{name}={free_port()}" for name in names]
    command = [str(STORES / "bin" / "weed"), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    options = [f"-s3.port={port}", f"-s3.config={folder / 'ids.json'}", "-webdav=false", "-admin.ui=false"]
    with running([*command, *options, *ports], port) as url:
        yield url


BOTO3 = """
import sys, time, pathlib, boto3, botocore.config
url, user, secret, root, bucket = sys.argv[1:]
config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 20, "mode": "adaptive"})
login = {"aws_access_key_id": user, "aws_secret_access_key": secret, "region_name": "us-east-1"}
s3 = boto3.client("s3", endpoint_url=url, config=config, **login)
if bucket not in [known["Name"] for known in s3.list_buckets()["Buckets"]]:
    s3.create_bucket(Bucket=bucket)
for path in pathlib.Path(root).rglob("*"):
    if path.is_file():
        s3.upload_file(str(path), bucket, "models/" + str(path.relative_to(root)))
"""


def upload(url: str, root: Path) -> None:
    subprocess.run([STORES / "bin" / "python", "-c", BOTO3, url, *ADMIN, root, "store"], check=True, timeout=120)


def check_all(source: LayoutSource, layout: Path) -> m.ModelConfig:
    """Every byte, as the layout has them."""
    (entry,) = m.parse_index(source.read_index(m.MAX_INDEX_BYTES))
    model = read_model(source, ArtifactConfig(source="/", manifest_digest=entry.digest), KEY_URI)
    assert isinstance(model, m.ModelConfig)
    for file in model.files:
        out = memoryview(bytearray(1 << 20))
        got = b""
        while length := source.read_range(file.blob_digest, len(got), out):
            got += out[:length]
        assert got == (layout / "blobs" / file.blob_digest.replace(":", "/")).read_bytes()
    return model


@pytest.mark.parametrize("service", [seaweedfs, moto], ids=lambda service: service.__name__)
def test_a_layout_in_a_bucket_is_read_and_one_that_changes_is_refused(service, layout: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with service(tmp_path) as url:
        upload(url, layout)
        with closing(open_source("s3://store/models", None, 10, Access(*READER, endpoint=url))) as source:
            model = check_all(source, layout)
            digest = model.files[0].blob_digest
            other = tmp_path / "other" / "blobs" / digest.replace(":", "/")
            other.parent.mkdir(parents=True)
            other.write_bytes(os.urandom(3_000_000))
            upload(url, tmp_path / "other")
            with pytest.raises(ArtifactUnavailableError) as caught:
                source.read_range(digest, 0, memoryview(bytearray(100)))
            assert (caught.value.problem, caught.value.status) == (StoreProblem.CHANGED, 412)


def test_credentials_that_are_wrong_are_refused_by_who_checks_them(layout: Path, tmp_path: Path) -> None:
    with seaweedfs(tmp_path) as url:
        upload(url, layout)
        for access in (
            Access(READER[0], "wrong", endpoint=url),
            Access("nobody", READER[1], endpoint=url),
            Access(endpoint=url),
        ):
            with (
                closing(open_source("s3://store/models", None, 10, access)) as source,
                pytest.raises(ArtifactUnavailableError) as caught,
            ):
                source.read_index(m.MAX_INDEX_BYTES)
            assert (caught.value.problem, caught.value.status) == (StoreProblem.REFUSED, 403)


ORAS = """
import json, pathlib, sys, oras.client, oras.container
host, user, secret, root = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, auth_backend="basic")
client.auth.set_basic_auth(user, secret)
client.session.headers.update(client.auth.get_auth_header())
container = oras.container.Container(host + "/models/tiny:stable")
blobs = pathlib.Path(root, "blobs", "sha256")
entry = json.loads(pathlib.Path(root, "index.json").read_bytes())["manifests"][0]
manifest = (blobs / entry["digest"].removeprefix("sha256:")).read_bytes()
parsed = json.loads(manifest)
for blob in [*parsed["layers"], parsed["config"]]:
    path = blobs / blob["digest"].removeprefix("sha256:")
    assert client.upload_blob(str(path), container, blob).status_code in (200, 201, 202), path
url = "https://" + container.manifest_url()
answer = client.do_request(url, "PUT", headers={"Content-Type": entry["mediaType"]}, data=manifest)
assert answer.status_code == 201, answer.text
"""


def test_what_oras_pushed_is_loaded(layout: Path, tmp_path: Path) -> None:
    """Its blobs; the manifest as bytes, because its own way of writing one would have another digest."""
    with DockerRegistry(tmp_path, users=True) as registry:
        certificate = registry.cert_dir / "ca.crt"
        command = [str(STORES / "bin" / "python"), "-c", ORAS, registry.host, USER, SECRET, str(layout)]
        subprocess.run(command, env={"REQUESTS_CA_BUNDLE": str(certificate)}, check=True, timeout=60)
        with closing(open_source(f"oci://{registry.host}/models/tiny", registry.ca_pem, 10, LOGIN)) as source:
            check_all(source, layout)
            (entry,) = m.parse_index(source.read_index(m.MAX_INDEX_BYTES))
            assert entry.ref_name == "stable"


def test_a_whole_boot_from_a_bucket_of_seaweedfs_is_good(tmp_path: Path) -> None:
    """The agent's environment carries no PATH of ours, so the program lies where the demo looks first."""
    script = "import sys; from agent.commands import demo; from agent.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run(
        [sys.executable, "-c", script, "demo", "--json", "--once", "--source", "s3"],
        env={"PATH": f"{STORES / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        timeout=DEMO_TIMEOUT_S,
        text=True,
    )
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (ended.returncode, result["ok"], result["left_behind"]) == (0, True, [])
