"""The directory store gives out exactly 32 bytes of a file that is its own, or credentials, and nothing else."""

import os
from pathlib import Path

import pytest

from agent.broker.keystore import DirectoryKeyStore, KeyStore
from agent.closed import Ident
from agent.errors import BrokerFailureError
from tests.fuzz.targets import keyset_seeds

KEY = bytes(range(32))
URI = Ident("kbs:///models/tiny/1")


def put(path: Path, data: bytes = KEY, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def reason(store: KeyStore, uri: Ident = URI) -> str:
    with pytest.raises(BrokerFailureError) as caught:
        store.fetch(uri)
    return caught.value.reason


def test_a_key_comes_with_its_id_and_version_one(tmp_path: Path) -> None:
    put(tmp_path / "models/tiny/1")
    stored = DirectoryKeyStore(tmp_path).fetch(URI)
    assert (stored.key, stored.key_id, stored.version) == (KEY, URI, 1)


def test_a_key_does_not_show_in_its_text(tmp_path: Path) -> None:
    put(tmp_path / "models/tiny/1", b"K" * 32)
    assert "KK" not in repr(DirectoryKeyStore(tmp_path).fetch(URI))


def test_the_version_stands_in_a_sibling_that_no_key_uri_can_name(tmp_path: Path) -> None:
    put(tmp_path / "models/tiny/1")
    put(tmp_path / "models/tiny/.1.version", b"7\n")
    assert DirectoryKeyStore(tmp_path).fetch(URI).version == 7
    assert reason(DirectoryKeyStore(tmp_path), Ident("kbs:///models/tiny/.1.version")) == "KEY_NOT_FOUND"


@pytest.mark.parametrize("text", [b"", b"0", b"-1", b"1.5", b"7 7", b"9999999999"])
def test_a_version_that_is_no_positive_number_is_refused(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "models/tiny/1")
    put(tmp_path / "models/tiny/.1.version", text)
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_VERSION_FILE"


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_file_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    put(tmp_path / "models/tiny/1", bytes(size))
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_FILE_LENGTH"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    put(tmp_path / "models/tiny/1", mode=mode)
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_FILE_MODE"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["1", ".1.version"])
def test_a_file_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "models/tiny/1")
    put(tmp_path / "models/tiny/.1.version", b"7")
    os.chown(tmp_path / "models/tiny" / name, 1234, 1234)
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_FILE_OWNER"


@pytest.mark.parametrize(
    "uri",
    [
        "kbs:///models/tiny/2",
        "kbs:///models/../1",
        "kbs:///../../etc",
        "kbs:///models/tiny",
        "kbs:///models/tiny/1/x",
        "kbs:////models/tiny",
        "kbs://host/models/tiny",
        "models/tiny/1",
    ],
)
def test_what_is_not_there_or_no_key_uri_is_not_found(tmp_path: Path, uri: str) -> None:
    store = put(tmp_path / "store/models/tiny/1").parents[2]
    put(tmp_path / "etc")
    assert reason(DirectoryKeyStore(store), Ident(uri)) == "KEY_NOT_FOUND"


def test_a_link_out_of_the_store_is_refused(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside")
    (tmp_path / "store/models/tiny").mkdir(parents=True)
    (tmp_path / "store/models/tiny/1").symlink_to(outside)
    assert reason(DirectoryKeyStore(tmp_path / "store")) == "KEY_FILE_OUTSIDE_STORE"


def test_a_linked_folder_out_of_the_store_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "outside/tiny/1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/models").symlink_to(tmp_path / "outside")
    assert reason(DirectoryKeyStore(tmp_path / "store")) == "KEY_FILE_OUTSIDE_STORE"


def test_links_inside_the_store_work_as_in_a_mounted_kubernetes_secret(tmp_path: Path) -> None:
    put(tmp_path / "..2026_11_22/models/tiny/1")
    (tmp_path / "..data").symlink_to("..2026_11_22")
    (tmp_path / "models").symlink_to("..data/models")
    assert DirectoryKeyStore(tmp_path).fetch(URI).key == KEY


def test_a_loop_of_links_is_a_typed_failure(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to("models")
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_STORE_IO"


def test_a_fifo_neither_hangs_nor_counts_as_a_key(tmp_path: Path) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    os.mkfifo(tmp_path / "models/tiny/1", 0o600)
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_FILE_TYPE"


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "models/tiny/1").mkdir(parents=True, mode=0o700)
    assert reason(DirectoryKeyStore(tmp_path)) == "KEY_FILE_TYPE"


def test_a_store_that_is_not_there_has_no_keys(tmp_path: Path) -> None:
    assert reason(DirectoryKeyStore(tmp_path / "missing")) == "KEY_NOT_FOUND"


CREDENTIALS = b'{"user": "guest", "secret": "correct horse"}'


def credentials_reason(store: KeyStore, uri: Ident = URI) -> str:
    with pytest.raises(BrokerFailureError) as caught:
        store.fetch_credentials(uri)
    assert "horse" not in f"{caught.value}"
    return caught.value.reason


def test_credentials_come_as_they_lie_there_and_are_no_key(tmp_path: Path) -> None:
    put(tmp_path / "models/tiny/1", CREDENTIALS)
    store = DirectoryKeyStore(tmp_path)
    assert store.fetch_credentials(URI) == CREDENTIALS
    assert reason(store) == "KEY_FILE_LENGTH"


@pytest.mark.parametrize("data", [KEY, b"", b"{}", keyset_seeds()[0], CREDENTIALS.ljust(4097), b"guest:correct horse"])
def test_what_is_no_credentials_is_not_given_as_such(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / "models/tiny/1", data)
    assert credentials_reason(DirectoryKeyStore(tmp_path)) == "CREDENTIALS_FILE"


def test_credentials_that_are_not_there_or_not_ours_alone_are_not_given(tmp_path: Path) -> None:
    store = DirectoryKeyStore(tmp_path)
    assert credentials_reason(store) == "CREDENTIALS_NOT_FOUND"
    assert credentials_reason(store, Ident("kbs:///models/../1")) == "CREDENTIALS_NOT_FOUND"
    put(tmp_path / "models/tiny/1", CREDENTIALS, 0o640)
    assert credentials_reason(store) == "KEY_FILE_MODE"
