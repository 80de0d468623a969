"""`keyturn inspect`: what it shows, and that `--check` finds every damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.artifact.seal import seal_model
from agent.artifact.signature import public_pem
from agent.artifact.stream import SEGMENT_BYTES
from agent.cli import main
from tests.range_server import Fault, RangeServer, make_certificate
from tests.test_artifact_compact_jwe import sealed as jwe_of

KEY = bytes(range(32))
URI = "kbs:///default/model/llama"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A layout with one model of three files, and its manifest digest."""
    root = tmp_path_factory.mktemp("sealed")
    (root / "model").mkdir()
    (root / "model" / "a.gguf").write_bytes(os.urandom(3 * SEGMENT_BYTES + 5))
    (root / "model" / "b.json").write_bytes(b"{}")
    (root / "model" / "empty").touch()
    digest = seal_model(root / "model", root / "layout", KEY, URI, "llama", 2, lambda done, total: None)
    (root / "k").write_bytes(KEY)
    return root / "layout", digest


@pytest.fixture
def layout(sealed: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(sealed[0], tmp_path / "layout")
    return tmp_path / "layout"


def check(ref: str, key_file: Path, *more: str) -> int:
    return main(["inspect", ref, "--check", "--key-file", str(key_file), *more])


@pytest.fixture
def key_file(sealed: tuple[Path, str]) -> Path:
    return sealed[0].parent / "k"


def blob_of(layout: Path, path: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["inspect", str(layout), "--json"]) == 0
    digests = {file["path"]: str(file["blob_digest"]) for file in json.loads(capsys.readouterr().out)["files"]}
    return layout / "blobs" / "sha256" / digests[path].removeprefix("sha256:")


# --- files of KServe's ------------------------------------------------------------------------------------------------


@pytest.fixture
def jwes(tmp_path: Path) -> Path:
    folder = tmp_path / "kserve"
    (folder / "w").mkdir(parents=True)
    (folder / "w" / "a.gguf.jwe").write_bytes(jwe_of(os.urandom(2_000_000)))
    (folder / "b.json.jwe").write_bytes(jwe_of(b"{}", "dir"))
    return folder


NAMES = ("--jwe-file", "w/a.gguf.jwe", "--jwe-file", "b.json.jwe")


def test_of_kserves_files_algorithm_and_size_can_be_seen(
    jwes: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(jwes), *NAMES]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [["A256KW", "w/a.gguf"], ["dir", "b.json"]]
    with RangeServer(jwes) as server:
        assert check(server.url, key_file, "--json", *NAMES) == 0
    assert json.loads(capsys.readouterr().out) == {
        "format": "kserve-jwe",
        "checked": True,
        "files": [
            {"path": "w/a.gguf", "algorithm": "A256KW", "size": 2_000_000},
            {"path": "b.json", "algorithm": "dir", "size": 2},
        ],
    }


def test_a_file_of_kserves_that_does_not_open_is_told(jwes: Path, key_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(bytes(32))
    assert check(str(jwes), wrong, *NAMES) == 17
    content = bytearray((jwes / "w" / "a.gguf.jwe").read_bytes())
    content[1_000_000] ^= 1
    (jwes / "w" / "a.gguf.jwe").write_bytes(content)
    assert check(str(jwes), key_file, *NAMES) == 19
    (jwes / "b.json.jwe").write_bytes(b"{}")
    assert main(["inspect", str(jwes), *NAMES]) == 19


def test_what_is_about_a_manifest_does_not_go_with_files_of_kserves(jwes: Path, tmp_path: Path) -> None:
    signer = tmp_path / "signer.pem"
    signer.write_text(public_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(jwes), *NAMES, "--signed-by", str(signer)])
    assert ended.value.code == 2


# --- showing ----------------------------------------------------------------------------------------------------------


def test_a_table_shows_what_anybody_may_see(sealed: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sealed[0])]) == 0
    out = capsys.readouterr().out
    for text in ("llama, version 2", URI, sealed[1], "3 files, 3.0 MiB", "a.gguf", "b.json"):
        assert text in out
    assert "checked" not in out


def test_json_shows_the_same_to_programs(sealed: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sealed[0]), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["manifest_digest"] == sealed[1]
    assert (record["model_name"], record["version"], record["key_uri"], record["checked"]) == ("llama", 2, URI, False)
    assert [(file["path"], file["size"], file["segments"]) for file in record["files"]] == [
        ("a.gguf", 3 * SEGMENT_BYTES + 5, 4),
        ("b.json", 2, 1),
        ("empty", 0, 1),
    ]


@pytest.mark.parametrize("tls", [False, True])
def test_a_layout_below_a_url_is_checked_over_the_network(
    sealed: tuple[Path, str], key_file: Path, tmp_path: Path, tls: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pem, ca = make_certificate(tmp_path) if tls else (None, "")
    (tmp_path / "ca.pem").write_text(ca)
    more = ["--ca-file", str(tmp_path / "ca.pem")] if tls else []
    with RangeServer(sealed[0], certificate=pem) as server:
        assert check(f"{server.url}@{sealed[1]}", key_file, *more) == 0
        assert not any(path == "/index.json" for path, _ in server.requests)
    assert "every segment of every file opens" in capsys.readouterr().out


def test_every_model_of_a_layout_is_shown(sealed: tuple[Path, str], layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = seal_model(sealed[0].parent / "model", layout, KEY, URI, "llama", 3, lambda done, total: None)
    assert main(["inspect", str(layout), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["manifest_digest"] for record in records] == [sealed[1], other]
    assert main(["inspect", f"{layout}@{other}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 3


def test_signatures_in_an_index_that_does_not_say_what_they_are_are_passed_over(
    sealed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`artifactType` may stand in a descriptor; who writes a layout by FORMAT.md, or copies one, need not put it there."""
    signer = Ed25519PrivateKey.generate()
    out = tmp_path / "signed"
    seal_model(sealed[0].parent / "model", out, KEY, URI, "llama", 2, lambda done, total: None, [signer])
    index = json.loads((out / "index.json").read_bytes())
    for descriptor in index["manifests"]:
        del descriptor["artifactType"]
    (out / "index.json").write_text(json.dumps(index))
    (tmp_path / "pem").write_text(public_pem(signer))
    assert main(["inspect", str(out), "--json", "--signed-by", str(tmp_path / "pem")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["signature_verified"]


def test_inspect_writes_nothing(layout: Path, key_file: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in layout.rglob("*")}
    assert check(str(layout), key_file) == 0
    assert {path: path.stat().st_mtime_ns for path in layout.rglob("*")} == before


# --- failing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--check"], ["--key-file", "k"]])
def test_check_and_key_belong_together(layout: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(layout), *arguments])
    assert caught.value.code == 2


def test_another_key_is_told_from_damage(layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_bytes(bytes(32))
    assert check(str(layout), tmp_path / "other") == 17
    assert json.loads(capsys.readouterr().err)["class"] == "KeyMismatchError"


def flip(offset: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[offset] ^= 0x80
        return bytes(changed)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "fields"),
    [
        (flip(0), "MalformedHeaderError", {"file": 0}),
        (flip(1), "MalformedHeaderError", {"file": 0}),
        (flip(39), "MalformedHeaderError", {"file": 0}),
        (flip(40), "SegmentAuthenticationError", {"file": 0, "segment": 0}),
        (flip(2 * SEGMENT_BYTES), "SegmentAuthenticationError", {"file": 0, "segment": 2}),
        (flip(-1), "SegmentAuthenticationError", {"file": 0, "segment": 3}),
        (lambda data: data[:-1], "TruncatedArtifactError", {"file": 0}),
        (lambda data: data[:SEGMENT_BYTES], "TruncatedArtifactError", {"file": 0}),
        (lambda data: b"", "TruncatedArtifactError", {"file": 0}),
        (lambda data: data + b"\0", "TruncatedArtifactError", {"file": 0}),
    ],
)
def test_every_damage_to_a_blob_is_found(
    layout: Path,
    key_file: Path,
    *,
    damage: Callable[[bytes], bytes],
    error: str,
    fields: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    blob = blob_of(layout, "a.gguf", capsys)
    blob.write_bytes(damage(blob.read_bytes()))
    assert check(str(layout), key_file) == 19
    record = json.loads(capsys.readouterr().err)
    assert record["class"] == error
    assert fields.items() <= record["fields"].items()


def test_a_blob_in_the_place_of_another_is_found(layout: Path, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(blob_of(layout, "a.gguf", capsys), blob_of(layout, "b.json", capsys))
    assert check(str(layout), key_file) == 19
    assert json.loads(capsys.readouterr().err)["fields"]["file"] == 1


def test_an_older_sealing_of_the_same_file_and_version_is_found(
    sealed: tuple[Path, str], layout: Path, tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seal_model(sealed[0].parent / "model", tmp_path / "again", KEY, URI, "llama", 2, lambda done, total: None)
    shutil.copy(blob_of(tmp_path / "again", "b.json", capsys), blob_of(layout, "b.json", capsys))
    assert check(str(layout), key_file) == 19
    assert json.loads(capsys.readouterr().err)["class"] == "MalformedHeaderError"


def test_a_missing_blob_is_the_stores_fault(layout: Path, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blob_of(layout, "empty", capsys).unlink()
    assert check(str(layout), key_file) == 18
    assert json.loads(capsys.readouterr().err)["class"] == "ArtifactUnavailableError"


def test_a_changed_manifest_is_not_parsed(layout: Path, sealed: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = layout / "blobs" / "sha256" / sealed[1].removeprefix("sha256:")
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert main(["inspect", f"{layout}@{sealed[1]}"]) == 19
    assert json.loads(capsys.readouterr().err)["class"] == "ManifestDigestError"


def test_a_layout_without_models_says_so(layout: Path) -> None:
    (layout / "index.json").write_bytes(b'{"schemaVersion":2,"manifests":[]}')
    assert main(["inspect", str(layout)]) == 18


@pytest.mark.parametrize("ref", ["", "/absent", "ftp://x", "/absent@sha256:" + "0" * 64])
def test_a_reference_to_nothing_is_our_error(ref: str) -> None:
    assert main(["inspect", ref]) in (10, 18)


@pytest.mark.parametrize("content", [None, b"\xff", b"no certificate"])
def test_a_ca_file_that_is_none_is_our_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    assert main(["inspect", "https://127.0.0.1:1", "--ca-file", str(tmp_path / "ca.pem")]) in (10, 18)


def test_a_broken_store_ends_the_check(sealed: tuple[Path, str], key_file: Path) -> None:
    with RangeServer(sealed[0], Fault.NO_RANGES) as server:
        assert check(f"{server.url}@{sealed[1]}", key_file) == 18
