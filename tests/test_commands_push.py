"""`keyturn seal --to oci://…`, `keyturn push` and `keyturn inspect oci://…` as people run them, before a real registry."""

import json
import os
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.artifact.signature import public_pem
from agent.cli import main
from agent.config import EXAMPLE, parse
from tests.bucket import PREFIX, SECRET, Bucket, access
from tests.registry import SECRET as PASSWORD
from tests.registry import USER, DockerRegistry

URI = "kbs:///default/model/llama"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(os.urandom(2_500_000))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def reach(folder: Path, registry: DockerRegistry, password: str = PASSWORD) -> list[str]:
    (folder / "login.toml").write_text(f'user = "{USER}"\nsecret = "{password}"\n')
    return ["--credentials", str(folder / "login.toml"), "--ca-file", str(registry.cert_dir / "ca.crt")]


def new_signing_key(folder: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path = folder / "signing.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path.with_suffix(".pub").write_text(public_pem(key))
    return path


def seal(model: Path, to: str, *more: str, version: int = 1) -> list[str]:
    return ["seal", str(model), "--to", to, "--key-uri", URI, "--name", "llama", "--version", str(version), *more]


def test_a_model_is_sealed_into_a_registry_and_every_byte_of_it_opens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        to, how = f"oci://{registry.host}/models/llama", reach(tmp_path, registry)
        signing = new_signing_key(tmp_path)
        assert main(seal(model, to, "--sign", str(signing), *how)) == 0
        said = capsys.readouterr().out
        assert os.listdir() == ["llama-v1.key"]  # the ciphertext is in the registry now
        artifact = tomllib.loads(said[said.index("[artifact]") : said.index("   or, so that")])["artifact"]
        assert artifact["source"] == to
        for reference in (to, f"{to}:llama-v1", f"{to}@{artifact['manifest_digest']}", f"{to}:x@{artifact['manifest_digest']}"):
            checked = ["--check", "--key-file", "llama-v1.key", "--signed-by", str(signing.with_suffix(".pub"))]
            assert main(["inspect", reference, *how, *checked, "--json"]) == 0
            record = json.loads(capsys.readouterr().out)
            assert (record["manifest_digest"], record["checked"]) == (artifact["manifest_digest"], True)
            assert len(record["key_ids"]) == 1


def test_a_push_that_cannot_be_is_known_before_anything_is_sealed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        to = f"oci://{registry.host}/models/llama"
        assert main(seal(model, to, *reach(tmp_path, registry, "wrong"))) == 18
        error = capsys.readouterr().err
        assert json.loads(error)["class"] == "ArtifactUnavailableError"
        assert "wrong" not in error
        assert os.listdir() == []
        (tmp_path / "here" / "llama-v1.layout").mkdir()
        assert main(seal(model, to, *reach(tmp_path, registry))) == 19
        assert os.listdir() == ["llama-v1.layout"]


def test_a_layout_is_pushed_and_what_is_there_is_not_sent_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DockerRegistry(tmp_path, users=True) as registry:
        to, how = f"oci://{registry.host}/models/llama", reach(tmp_path, registry)
        assert main(seal(model, str(tmp_path / "layout"))) == 0
        (model / "second").write_bytes(b"x")
        assert main(["push", str(tmp_path / "layout"), to, *how]) == 0
        assert main(seal(model, str(tmp_path / "layout"), version=2)) == 0
        capsys.readouterr()
        assert main(["push", str(tmp_path / "layout"), to, *how, "--json"]) == 0
        first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert (first["tag"], first["sent_bytes"], second["tag"]) == ("llama-v1", 0, "llama-v2")
        assert second["sent_bytes"] > 2_500_000
        assert main(["inspect", to, *how, "--json"]) == 0
        assert {json.loads(line)["version"] for line in capsys.readouterr().out.splitlines()} == {1, 2}


def test_a_layout_in_a_bucket_is_inspected(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(seal(model, str(tmp_path / "layout"))) == 0
    with Bucket(tmp_path / "layout") as bucket:
        known = access(bucket.url)
        (tmp_path / "login.toml").write_text(
            f'user = "{known.user}"\nsecret = "{SECRET}"\nsession_token = "{known.session_token}"\n'
            f'endpoint = "{bucket.url}"\nregion = "{known.region}"\n'
        )
        how = ["--credentials", str(tmp_path / "login.toml"), "--check", "--key-file", str(tmp_path / "llama-v1.key")]
        capsys.readouterr()
        assert main(["inspect", f"s3://models/{PREFIX}", *how, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checked"] is True


@pytest.mark.parametrize(
    ("to", "credentials", "key"),
    [
        ("oci://host/UPPER", "", "repository"),
        ("oci+http://registry.example/a", 'user = "u"\nsecret = "hunter2"\n', "artifact.secret"),
        ("oci://registry.example/a", 'user = "u"\nsecret = hunter2\n', "credentials"),
        ("oci://registry.example/a", 'user = "u"\npassword = "hunter2"\n', "credentials"),
        ("oci://registry.example/a", None, "credentials"),
    ],
)
def test_arguments_that_cannot_be_are_named_without_their_contents(
    tmp_path: Path, to: str, credentials: str | None, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "login.toml"
    if credentials is not None:
        file.write_text(credentials)
    assert main(["push", str(tmp_path), to, "--credentials", str(file)]) == 10
    error = capsys.readouterr().err
    assert key in error
    assert "hunter2" not in error


def test_what_seal_prints_is_what_a_configuration_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DockerRegistry(tmp_path) as registry:
        to = f"oci://{registry.host}/models/llama"
        assert main(seal(model, to, "--ca-file", str(registry.cert_dir / "ca.crt"))) == 0
    said = capsys.readouterr().out
    artifact = tomllib.loads(said[said.index("[artifact]") :])["artifact"]
    text = EXAMPLE.replace("https://models.example.com/my-model", artifact["source"])
    assert parse(text.encode()).config.artifact.source == to
