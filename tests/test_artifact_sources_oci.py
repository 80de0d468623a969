"""Registries: a real one over TLS with passwords and tokens, and ones that misbehave."""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.artifact import manifest as m
from agent.artifact import push, signature
from agent.artifact.identify import identify
from agent.artifact.load import read_model
from agent.artifact.seal import seal_model
from agent.artifact.sources import BlobSource, LayoutSource, open_source
from agent.artifact.sources.access import ANONYMOUS, Access
from agent.artifact.sources.oci import Repository
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import ArtifactUnavailableError, ConfigError, ManifestSignatureError, StoreProblem
from tests.range_server import make_certificate
from tests.registry import LOGIN, SECRET, USER, DockerRegistry, TokenServer
from tests.script_server import Reply, ScriptServer, Seen

TIMEOUT_S = 10.0
KEY, KEY_URI, NAME = bytes(range(32)), "kbs:///models/tiny/1", "tiny"
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
BLOB = "sha256:" + "ab" * 32
NOWHERE = "127.0.0.1:1"


@dataclass(frozen=True)
class Sealed:
    layout: Path
    digest: str

    def pinned(self) -> ArtifactConfig:
        return ArtifactConfig(source="/", manifest_digest=self.digest, name=NAME)

    def signed(self, tag: str = f"{NAME}-v3") -> ArtifactConfig:
        return ArtifactConfig(source="/", provider_keys=(signature.public_pem(SIGNER),), tag=tag, name=NAME)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(os.urandom(3 << 20))
    (folder / "model" / "config.json").write_bytes(b"{}")
    digest = seal_model(folder / "model", folder / "layout", KEY, KEY_URI, NAME, 3, lambda *_: None, [SIGNER])
    return Sealed(folder / "layout", digest)


def push_to(registry: DockerRegistry, sealed: Sealed, access: Access) -> tuple[push.Pushed, ...]:
    repository = Repository.parse(f"oci://{registry.host}/models/tiny")
    return push.push_layout(sealed.layout, repository, registry.ca_pem, access, TIMEOUT_S, lambda *_: None)


def open_oci(registry: DockerRegistry, access: Access = ANONYMOUS) -> LayoutSource:
    return open_source(f"oci://{registry.host}/models/tiny", registry.ca_pem, TIMEOUT_S, access)


def check_all(source: BlobSource, sealed: Sealed) -> None:
    """By digest, by signature, and every byte, as the layout has them."""
    model = read_model(source, sealed.pinned(), KEY_URI)
    assert identify(source, sealed.signed(), threading.Event()).digest == sealed.digest
    for file in model.files:
        expected = (sealed.layout / "blobs" / file.blob_digest.replace(":", "/")).read_bytes()
        out = memoryview(bytearray(1 << 20))
        got = b""
        while length := source.read_range(file.blob_digest, len(got), out):
            got += out[:length]
        assert got == expected


# --- a real registry --------------------------------------------------------------------------------------------------


def test_a_registry_with_passwords_gives_back_what_was_pushed(sealed: Sealed, tmp_path: Path) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        (pushed,) = push_to(registry, sealed, LOGIN)
        assert (pushed.manifest_digest, pushed.tag) == (sealed.digest, f"{NAME}-v3")
        assert pushed.sent_bytes > 3 << 20
        with closing(open_oci(registry, LOGIN)) as source:
            check_all(source, sealed)
            (entry,) = m.parse_index(source.read_index(m.MAX_INDEX_BYTES))
            assert entry == m.IndexEntry(sealed.digest, f"{NAME}-v3")
        for access in (ANONYMOUS, Access(USER, "wrong")):
            with closing(open_oci(registry, access)) as source, pytest.raises(ArtifactUnavailableError) as caught:
                source.read_manifest(sealed.digest, 1 << 20)
            assert (caught.value.problem, caught.value.status) == (StoreProblem.REFUSED, 401)


def test_a_second_push_sends_nothing_and_adds_no_second_signature(sealed: Sealed, tmp_path: Path) -> None:
    with DockerRegistry(tmp_path) as registry:
        (first,) = push_to(registry, sealed, ANONYMOUS)
        (second,) = push_to(registry, sealed, ANONYMOUS)
        assert first.sent_bytes > second.sent_bytes == 0
        with closing(open_oci(registry)) as source:
            assert len(source.referrers(sealed.digest)) == 1
            check_all(source, sealed)


def test_a_push_that_broke_off_goes_on_where_it_was_and_has_no_name_before(sealed: Sealed, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sealed.layout, broken)
    largest = max((broken / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.rename(tmp_path / "away")
    with DockerRegistry(tmp_path) as registry:
        with pytest.raises(FileNotFoundError):
            push_to(registry, Sealed(broken, sealed.digest), ANONYMOUS)
        with closing(open_oci(registry)) as source, pytest.raises(ArtifactUnavailableError) as caught:
            source.read_manifest(f"{NAME}-v3", 1 << 20)
        assert caught.value.problem is StoreProblem.NOT_FOUND
        (tmp_path / "away").rename(largest)
        (pushed,) = push_to(registry, Sealed(broken, sealed.digest), ANONYMOUS)
        assert pushed.sent_bytes == largest.stat().st_size


@pytest.mark.parametrize("anonymous", [False, True])
def test_a_token_is_asked_for_once_and_used_until_it_ends(sealed: Sealed, tmp_path: Path, *, anonymous: bool) -> None:
    access = ANONYMOUS if anonymous else LOGIN
    with TokenServer(tmp_path, anonymous=anonymous) as tokens, DockerRegistry(tmp_path, token_server=tokens) as registry:
        push_to(registry, sealed, access)
        (asked,) = tokens.asked
        assert asked[0] == {"scope": ["repository:models/tiny:pull,push"], "service": ["tests"]}
        basic = "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
        assert asked[1] == (None if anonymous else basic)
        tokens.asked.clear()
        with closing(open_oci(registry, access)) as source:
            check_all(source, sealed)
            assert [query["scope"] for query, _ in tokens.asked] == [["repository:models/tiny:pull"]]
        tokens.asked.clear()
        tokens.life_s = 0  # it is used once, for the request that asked for it
        with closing(open_oci(registry, access)) as source:
            check_all(source, sealed)
            assert len(tokens.asked) > 5


def test_a_wrong_password_at_the_token_server_is_refused(sealed: Sealed, tmp_path: Path) -> None:
    with TokenServer(tmp_path) as tokens, DockerRegistry(tmp_path, token_server=tokens) as registry:
        with closing(open_oci(registry, Access(USER, "wrong"))) as source:
            with pytest.raises(ArtifactUnavailableError) as caught:
                source.read_manifest(sealed.digest, 1 << 20)
            assert caught.value.problem is StoreProblem.REFUSED


def skopeo(*arguments: str) -> None:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed")
    ended = subprocess.run([program, "--insecure-policy", *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_skopeo_carries_it_from_layout_to_registry_to_registry(sealed: Sealed, tmp_path: Path) -> None:
    """The signature too: under the tag that stands for what lies beside a manifest, it is one image more."""
    tag = f"{NAME}-v3"
    with DockerRegistry(tmp_path, users=True) as first, DockerRegistry(tmp_path) as second:
        into, out_of = f"--dest-cert-dir={first.cert_dir}", f"--src-cert-dir={first.cert_dir}"
        login = f"{USER}:{SECRET}"
        skopeo("copy", into, f"--dest-creds={login}", f"oci:{sealed.layout}:{tag}", f"docker://{first.host}/models/tiny:{tag}")
        with closing(open_oci(first, LOGIN)) as source:
            assert read_model(source, sealed.pinned(), KEY_URI).version == 3
            with pytest.raises(ManifestSignatureError):  # skopeo takes what a name stands for, and nothing beside it
                identify(source, sealed.signed(), threading.Event())
        push_to(first, sealed, LOGIN)
        beside = sealed.digest.replace(":", "-")
        for name in (tag, beside):
            where = f"docker://{second.host}/models/tiny:{name}"
            creds = (out_of, f"--src-creds={login}", f"--dest-cert-dir={second.cert_dir}")
            skopeo("copy", "--all", *creds, f"docker://{first.host}/models/tiny:{name}", where)
        with closing(open_oci(second)) as source:
            check_all(source, sealed)
