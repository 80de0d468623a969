"""A model folder on an encrypted disk: what our reader, cryptsetup and veritysetup find there."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from agent.artifact import luks2
from agent.artifact import manifest as m
from agent.artifact import volume_config as v
from agent.artifact.seal_volume import DATA_OFFSET, HashTree, check_volume, crypt_block, seal_volume
from agent.cli import main
from agent.errors import KeyMismatchError, SealError, SealProblem, VolumeAuthenticationError, VolumeHeaderError
from tests.test_artifact_erofs import found_by_fsck

KEY = bytes(range(32))
URI = "kbs:///default/model/llama"
FILES = {"a/config.json": b"{}", "empty": b"", "model.gguf": os.urandom((2 << 20) + 12345)}


def nothing(_: int, __: int) -> None:
    pass


class Sealed:
    """One volume, its parts by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.image, self.layout = root, root / "model.img", root / "layout"
        for path, data in FILES.items():
            (root / "model" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "model" / path).write_bytes(data)
        (root / "key").write_bytes(KEY)
        self.digest = seal_volume(root / "model", self.image, self.layout, KEY, URI, "llama", 2, nothing)
        self.config = read_config(self.layout, self.digest)


def read_config(layout: Path, digest: str) -> v.VolumeConfig:
    blobs = layout / "blobs" / "sha256"
    manifest = m.parse_manifest((blobs / digest.removeprefix("sha256:")).read_bytes(), digest, (m.VOLUME_CONFIG_TYPE,))
    return v.parse_volume((blobs / manifest.config_digest.removeprefix("sha256:")).read_bytes(), manifest)


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed(tmp_path)


def volume_key(config: v.VolumeConfig) -> bytes:
    key = bytearray(luks2.KEY_BYTES)
    v.derive_key(KEY, config.key_uri, config.uuid, key)
    return bytes(key)


def opened(sealed: Sealed) -> bytes:
    """The decrypted segment."""
    data, key = sealed.image.read_bytes()[DATA_OFFSET:], volume_key(sealed.config)
    blocks = range(sealed.config.segment_bytes // v.BLOCK_BYTES)
    return b"".join(crypt_block(key, i, data[i * 4096 : (i + 1) * 4096], encrypt=False) for i in blocks)


def test_what_was_sealed_is_there(sealed: Sealed, tmp_path: Path) -> None:
    check_volume(sealed.image, sealed.config, KEY, nothing)
    assert found_by_fsck(opened(sealed)[: sealed.config.data_bytes], tmp_path) == FILES


def test_no_plaintext_is_on_the_disk(sealed: Sealed) -> None:
    data = sealed.image.read_bytes()
    assert FILES["model.gguf"][:4096] not in data
    assert b"config.json" not in data[luks2.HEADER_SIZES[0] * 2 :]
    assert KEY not in data
    assert volume_key(sealed.config)[:32] not in data


def test_two_seals_of_one_model_have_nothing_in_common(sealed: Sealed) -> None:
    again = read_config(
        sealed.layout, seal_volume(sealed.root / "model", sealed.root / "2.img", sealed.layout, KEY, URI, "llama", 3, nothing)
    )
    assert (again.uuid, again.salt) != (sealed.config.uuid, sealed.config.salt)
    first, second = ((sealed.root / name).read_bytes()[DATA_OFFSET:] for name in ("model.img", "2.img"))
    assert not any(first[i : i + 4096] == second[i : i + 4096] for i in range(0, sealed.config.segment_bytes, 4096))


@pytest.mark.parametrize("blocks", [2, 127, 128, 129, 130, 128 * 128, 128 * 128 + 1])
def test_the_hash_tree_is_that_of_veritysetup(tmp_path: Path, blocks: int) -> None:
    if shutil.which("veritysetup") is None:
        pytest.skip("no veritysetup here")
    data, salt = os.urandom(4096) * blocks, os.urandom(32)
    written: dict[int, bytes] = {}
    tree = HashTree(blocks, blocks, salt, written.__setitem__)
    for i in range(blocks):
        tree.add(data[i * 4096 : (i + 1) * 4096])
    (tmp_path / "data").write_bytes(data)
    command = [
        "veritysetup",
        "format",
        "--no-superblock",
        f"--salt={salt.hex()}",
        str(tmp_path / "data"),
        str(tmp_path / "tree"),
    ]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"Root hash:      \t{tree.finish().hex()}" in told
    ours = b"".join(written[block] for block in sorted(written))
    assert sorted(written) == [*range(blocks, blocks + v.tree_blocks(blocks))]
    assert ours == (tmp_path / "tree").read_bytes()


def test_cryptsetup_opens_the_disk_with_the_derived_key(sealed: Sealed, tmp_path: Path) -> None:
    if shutil.which("cryptsetup") is None:
        pytest.skip("no cryptsetup here")
    (tmp_path / "v").write_bytes(volume_key(sealed.config))
    command = [
        "cryptsetup",
        "open",
        "--test-passphrase",
        "--key-size",
        "512",
        "--volume-key-file",
        str(tmp_path / "v"),
        str(sealed.image),
    ]
    subprocess.run(command, check=True)
    (tmp_path / "v").write_bytes(bytes(64))
    assert subprocess.run(command, check=False, capture_output=True).returncode


def test_a_disk_that_cryptsetup_made_passes(sealed: Sealed, tmp_path: Path) -> None:
    """With its own offset and keyslot; the segment is what dm-crypt would have written there."""
    if shutil.which("cryptsetup") is None:
        pytest.skip("no cryptsetup here")
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        stream.truncate((16 << 20) + sealed.config.segment_bytes)
    (tmp_path / "v").write_bytes(volume_key(sealed.config))
    (tmp_path / "p").write_bytes(b"p")
    make = ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", sealed.config.uuid, "--key-size", "512"]
    make += ["--pbkdf-memory", "32", "--iter-time", "1", "--sector-size", "4096", "--volume-key-file", str(tmp_path / "v")]
    subprocess.run([*make, "--key-file", str(tmp_path / "p"), str(disk)], check=True)
    with disk.open("r+b") as stream:
        stream.seek(16 << 20)
        stream.write(sealed.image.read_bytes()[DATA_OFFSET : DATA_OFFSET + sealed.config.segment_bytes])
    config = v.parse_volume(*packed(sealed.config, data_offset=16 << 20))
    check_volume(disk, config, KEY, nothing)


def packed(config: v.VolumeConfig, **changes: int) -> tuple[bytes, m.Manifest]:
    data = v.pack_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]  # names of its members
    return data, m.Manifest("", m.VOLUME_CONFIG_TYPE, m.digest_of(data), len(data), ())


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(sealed: Sealed, at: int) -> None:
    with sealed.image.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def test_every_block_of_data_and_tree_is_checked(sealed: Sealed) -> None:
    end = sealed.config.segment_bytes // v.BLOCK_BYTES
    for block in (0, 1, 2, end // 2, sealed.config.data_blocks - 1, sealed.config.data_blocks, end - 1):
        at = DATA_OFFSET + block * v.BLOCK_BYTES + 77
        flip(sealed, at)
        with pytest.raises(VolumeAuthenticationError):
            check_volume(sealed.image, sealed.config, KEY, nothing)
        flip(sealed, at)
    check_volume(sealed.image, sealed.config, KEY, nothing)


def test_a_cut_disk_another_header_and_another_key_are_told_apart(sealed: Sealed) -> None:
    with pytest.raises(KeyMismatchError):
        check_volume(sealed.image, sealed.config, bytes(32), nothing)
    os.truncate(sealed.image, DATA_OFFSET + sealed.config.segment_bytes - 1)
    with pytest.raises(VolumeAuthenticationError):
        check_volume(sealed.image, sealed.config, KEY, nothing)
    flip(sealed, 5000)
    with pytest.raises(VolumeHeaderError):
        check_volume(sealed.image, sealed.config, KEY, nothing)
    sealed.image.write_bytes(b"x")
    with pytest.raises(VolumeHeaderError):
        check_volume(sealed.image, sealed.config, KEY, nothing)
    sealed.image.unlink()
    with pytest.raises(SealError):
        check_volume(sealed.image, sealed.config, KEY, nothing)


# --- a seal that fails ------------------------------------------------------------------------------------------------


def test_a_seal_that_fails_leaves_nothing(sealed: Sealed) -> None:
    before, weights = sorted(sealed.root.rglob("*")), sealed.root / "model" / "model.gguf"

    def seal(image: Path, version: int, layout: Path = sealed.layout) -> SealProblem:
        with pytest.raises(SealError) as caught:
            seal_volume(sealed.root / "model", image, layout, KEY, URI, "llama", version, shrink)
        return caught.value.problem

    def shrink(done: int, _: int) -> None:
        if done < 1 << 20:
            os.truncate(weights, weights.stat().st_size // 2)

    assert seal(sealed.image, 3) is SealProblem.SEALED_BEFORE, "an image is not written over"
    assert seal(sealed.root / "new.img", 2) is SealProblem.SEALED_BEFORE
    assert seal(sealed.root / "model" / "new.img", 3) is SealProblem.INSIDE
    assert seal(sealed.layout / "new.img", 3) is SealProblem.INSIDE
    assert seal(sealed.root / "none" / "new.img", 3) is SealProblem.IO
    assert seal(sealed.root / "new.img", 3) is SealProblem.CHANGED
    assert seal(sealed.root / "new.img", 1, sealed.root / "other") is SealProblem.CHANGED
    assert sorted(sealed.root.rglob("*")) == before


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("becomes", ["link", "folder that is a link", "fifo"])
def test_a_file_that_leads_out_of_the_folder_by_its_turn_is_in_no_volume(sealed: Sealed, becomes: str) -> None:
    """Whoever can write there is not to choose a file that only we can read."""
    folder, outside = sealed.root / "model" / "z", sealed.root / "outside"
    for place in (folder, outside):
        place.mkdir()
        (place / "last").write_bytes(b"0123")

    def turn(done: int, total: int) -> None:
        if folder.is_symlink() or not (folder / "last").is_file() or (folder / "last").is_symlink():
            return
        if becomes == "folder that is a link":
            folder.rename(sealed.root / "away")
            folder.symlink_to(outside)
            return
        (folder / "last").unlink()
        if becomes == "link":
            (folder / "last").symlink_to(outside / "last")
        else:
            os.mkfifo(folder / "last")

    with pytest.raises(SealError) as caught:
        seal_volume(sealed.root / "model", sealed.root / "new.img", sealed.layout, KEY, URI, "llama", 3, turn)
    assert (caught.value.problem, caught.value.where) == (SealProblem.CHANGED, "z/last")
    assert not (sealed.root / "new.img").exists()


def test_seal_and_inspect_know_volumes(sealed: Sealed, capsys: pytest.CaptureFixture[str]) -> None:
    root, image = sealed.root, sealed.root / "second.img"
    command = ["seal", str(root / "model"), "--to", str(sealed.layout), "--key-uri", URI, "--name", "llama", "--version", "3"]
    assert main([*command, "--key-file", str(root / "key"), "--volume", str(image), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    config = read_config(sealed.layout, record["manifest_digest"])
    check_volume(image, config, KEY, nothing)
    assert (record["volume"], stat.S_IMODE(image.stat().st_mode) & 0o222) == (str(image), 0o200)
    ref = f"{sealed.layout}@{record['manifest_digest']}"
    assert main(["inspect", ref, "--check", "--key-file", str(root / "key"), "--volume", str(image), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model_name"], shown["version"], shown["volume"]["uuid"]) == ("llama", 3, config.uuid)
    assert main(["inspect", ref, "--check", "--key-file", str(root / "key"), "--volume", str(image)]) == 0
    assert "every block of the disk authenticates" in capsys.readouterr().out
    assert main(["inspect", ref, "--check", "--key-file", str(root / "key"), "--volume", str(sealed.image)]) == 19
    with pytest.raises(SystemExit):
        main(["inspect", ref, "--check", "--key-file", str(root / "key")])
    with pytest.raises(SystemExit):
        main([*command, "--volume", str(image), "--dry-run"])


def test_seal_says_what_the_guests_need(sealed: Sealed, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["seal", str(sealed.root / "model"), "--to", str(sealed.root / "new"), "--key-uri", URI, "--name", "llama"]
    assert (
        main([*command, "--version", "3", "--key-file", str(sealed.root / "key"), "--volume", str(sealed.root / "3.img")]) == 0
    )
    told = capsys.readouterr().out
    assert 'format = "volume"' in told
    assert f"Write {sealed.root / '3.img'} to a disk" in told
