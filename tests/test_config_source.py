import hashlib
import io
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.closed import Ident
from agent.config_source import MAX_CONFIG_BYTES, FoundConfig, find_in_guest, from_file, from_initdata_file, read_bounded
from agent.errors import AgentError, ConfigConflictError, ConfigError, ConfigProblem, InitdataError, InitdataProblem
from agent.guest.initdata import MAX_DOCUMENT_BYTES, fit, pack_device

IMAGE = b'schema = "keyturn/v1" # of the image\n'
ENTRY = b'schema = "keyturn/v1" # of the initdata\n'
OTHERS = b'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"aa.toml" = "x = 1"\n'
INITDATA = OTHERS + b"\"keyturn.toml\" = '''\n" + ENTRY + b"'''\n"
ALGORITHMS = "sha256", "sha384", "sha512"


def sha384(document: bytes) -> bytes:
    return hashlib.sha384(document).digest()


# --- files somebody names ---------------------------------------------------------------------------------------------


def test_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyturn.toml").write_bytes(b"x" * MAX_CONFIG_BYTES)
    assert len(read_bounded(str(tmp_path / "keyturn.toml"))) == MAX_CONFIG_BYTES
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(IMAGE)))
    assert from_file("-").data == IMAGE
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(INITDATA)))
    assert from_initdata_file("-").data == ENTRY


@pytest.mark.parametrize("name", ["none", "."])
def test_what_cannot_be_read_is_not_there(tmp_path: Path, name: str) -> None:
    for read in (read_bounded, from_file, from_initdata_file):
        with pytest.raises(ConfigError) as caught:
            read(str(tmp_path / name))
        assert caught.value.problem is ConfigProblem.NOT_FOUND


def test_an_endless_file_is_read_no_further_than_the_bound() -> None:
    for read in (read_bounded, from_file):
        with pytest.raises(ConfigError) as caught:
            read("/dev/zero")
        assert caught.value.problem is ConfigProblem.TOO_LARGE
    with pytest.raises(InitdataError) as initdata:
        from_initdata_file("/dev/zero")
    assert (initdata.value.source, initdata.value.problem) == ("initdata-file", InitdataProblem.TOO_LARGE)


def test_a_plain_file_is_what_the_guest_is_launched_with(tmp_path: Path) -> None:
    (tmp_path / "keyturn.toml").write_bytes(IMAGE)
    assert from_file(str(tmp_path / "keyturn.toml")) == FoundConfig(IMAGE, hashlib.sha256(IMAGE).digest(), Ident("file"))


def test_the_entry_of_an_initdata_file_comes_with_the_documents_digest(tmp_path: Path) -> None:
    (tmp_path / "initdata.toml").write_bytes(INITDATA)
    assert from_initdata_file(str(tmp_path / "initdata.toml")) == FoundConfig(
        ENTRY, sha384(INITDATA), Ident("initdata-file"), INITDATA
    )


def test_an_initdata_file_without_the_entry_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "initdata.toml").write_bytes(OTHERS)
    with pytest.raises(InitdataError) as caught:
        from_initdata_file(str(tmp_path / "initdata.toml"))
    assert (caught.value.source, caught.value.problem) == ("initdata-file", InitdataProblem.NO_ENTRY)


def test_an_entry_has_the_bound_of_a_configuration(tmp_path: Path) -> None:
    for size, fits in ((MAX_CONFIG_BYTES, True), (MAX_CONFIG_BYTES + 1, False)):
        (tmp_path / "initdata.toml").write_bytes(OTHERS + b'"keyturn.toml" = "' + b"#" * size + b'"\n')
        if fits:
            assert len(from_initdata_file(str(tmp_path / "initdata.toml")).data) == size
            continue
        with pytest.raises(ConfigError) as caught:
            from_initdata_file(str(tmp_path / "initdata.toml"))
        assert caught.value.problem is ConfigProblem.TOO_LARGE


def test_a_found_configuration_is_not_printed() -> None:
    assert "keyturn/v1" not in repr(FoundConfig(ENTRY, b"", Ident("image")))


# --- what a guest finds -----------------------------------------------------------------------------------------------


def guest(root: Path, *, image: bytes | None = None, kata: bytes | None = None, device: bytes | None = None) -> Path:
    """The file system of a guest with these sources; `device` is the document on its initdata disk."""
    for path, content in (
        ("etc/keyturn/keyturn.toml", image),
        ("run/confidential-containers/initdata/initdata.toml", kata),
        ("dev/vdb", None if device is None else pack_device(device)),
    ):
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    for name in ("vda", "vdb"):
        (root / "sys/class/block" / name).mkdir(parents=True)
    return root


def found(data: bytes, digest: bytes, source: str, document: bytes | None = None) -> FoundConfig:
    return FoundConfig(data, digest, Ident(source), document)


def test_a_guest_without_any_source_has_none(tmp_path: Path) -> None:
    assert find_in_guest(guest(tmp_path)) is None
    assert find_in_guest(tmp_path / "empty") is None


def test_the_images_file_wants_a_guest_launched_without_initdata(tmp_path: Path) -> None:
    config = find_in_guest(guest(tmp_path, image=IMAGE))
    assert config == found(IMAGE, b"", "image")
    assert fit(config.digest, 32) == bytes(32)


@pytest.mark.parametrize(
    ("kata", "device", "source"),
    [(INITDATA, None, "kata-initdata"), (None, INITDATA, "initdata-device"), (INITDATA, INITDATA, "kata-initdata")],
    ids=["kata", "device", "both"],
)
def test_the_entry_comes_with_the_documents_digest(
    tmp_path: Path, kata: bytes | None, device: bytes | None, source: str
) -> None:
    assert find_in_guest(guest(tmp_path, kata=kata, device=device)) == found(ENTRY, sha384(INITDATA), source, INITDATA)


def test_an_empty_entry_is_an_entry(tmp_path: Path) -> None:
    document = OTHERS + b'"keyturn.toml" = ""\n'
    assert find_in_guest(guest(tmp_path, kata=document)) == found(b"", sha384(document), "kata-initdata", document)


def test_initdata_about_other_things_leaves_it_to_the_image_and_is_still_compared(tmp_path: Path) -> None:
    assert find_in_guest(guest(tmp_path, device=OTHERS, image=IMAGE)) == found(IMAGE, sha384(OTHERS), "image", OTHERS)


@pytest.mark.parametrize(
    ("kata", "device", "image", "conflict"),
    [
        (INITDATA, OTHERS, None, ("kata-initdata", "initdata-device")),
        (INITDATA, INITDATA + b"\n", None, ("kata-initdata", "initdata-device")),
        (INITDATA, OTHERS, IMAGE, ("kata-initdata", "initdata-device")),
        (INITDATA, None, IMAGE, ("kata-initdata", "image")),
        (None, INITDATA, IMAGE, ("initdata-device", "image")),
        (None, INITDATA, ENTRY, ("initdata-device", "image")),
        (INITDATA, INITDATA, IMAGE, ("kata-initdata", "image")),
        (None, OTHERS + b'"keyturn.toml" = ""\n', IMAGE, ("initdata-device", "image")),
    ],
)
def test_two_sources_are_a_conflict_even_when_they_agree(
    tmp_path: Path, kata: bytes | None, device: bytes | None, image: bytes | None, conflict: tuple[str, str]
) -> None:
    with pytest.raises(ConfigConflictError) as caught:
        find_in_guest(guest(tmp_path, kata=kata, device=device, image=image))
    assert (caught.value.first, caught.value.second) == conflict


@pytest.mark.parametrize(("kata", "device"), [(OTHERS, None), (None, OTHERS)])
def test_initdata_without_the_entry_and_no_file_is_told_as_such(
    tmp_path: Path, kata: bytes | None, device: bytes | None
) -> None:
    with pytest.raises(InitdataError) as caught:
        find_in_guest(guest(tmp_path, kata=kata, device=device))
    assert caught.value.problem is InitdataProblem.NO_ENTRY


@pytest.mark.parametrize("image", [None, IMAGE])
def test_broken_initdata_is_never_passed_over_for_the_images_file(tmp_path: Path, image: bytes | None) -> None:
    with pytest.raises(InitdataError) as caught:
        find_in_guest(guest(tmp_path, kata=b"version", image=image))
    assert (caught.value.source, caught.value.problem) == ("kata-initdata", InitdataProblem.NOT_TOML)


def test_every_source_has_its_bound(tmp_path: Path) -> None:
    large = b"#" * (MAX_CONFIG_BYTES + 1)
    for name, sources in (
        ("image", {"image": large}),
        ("initdata beside it", {"image": large, "device": OTHERS}),
        ("entry", {"device": OTHERS + b'"keyturn.toml" = "' + large + b'"\n'}),
    ):
        with pytest.raises(ConfigError) as caught:
            find_in_guest(guest(tmp_path / name, **sources))
        assert caught.value.problem is ConfigProblem.TOO_LARGE
    with pytest.raises(InitdataError) as initdata:
        find_in_guest(guest(tmp_path / "kata", kata=INITDATA.ljust(MAX_DOCUMENT_BYTES + 1, b"\n")))
    assert (initdata.value.source, initdata.value.problem) == ("kata-initdata", InitdataProblem.TOO_LARGE)


@pytest.mark.parametrize("path", ["etc/keyturn/keyturn.toml", "run/confidential-containers/initdata/initdata.toml"])
def test_a_source_that_is_there_and_cannot_be_read_is_not_absent(tmp_path: Path, path: str) -> None:
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        find_in_guest(tmp_path)
    assert caught.value.problem is ConfigProblem.NOT_FOUND


def test_a_linked_file_of_the_image_is_read_as_it_is(tmp_path: Path) -> None:
    guest(tmp_path, image=IMAGE)
    path = tmp_path / "etc/keyturn/keyturn.toml"
    path.rename(tmp_path / "elsewhere.toml")
    path.symlink_to(tmp_path / "elsewhere.toml")
    assert find_in_guest(tmp_path) == found(IMAGE, b"", "image")


@settings(max_examples=50)
@given(st.none() | st.binary(max_size=100), st.none() | st.binary(max_size=100), st.integers(0, len(INITDATA)))
def test_any_bytes_in_any_place_are_found_or_an_error_of_ours(kata: bytes | None, image: bytes | None, cut: int) -> None:
    for document in (kata, INITDATA[:cut]):
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = find_in_guest(guest(Path(folder), kata=document, image=image))
            except AgentError:
                continue
            assert config is None or config.digest in (
                b"",
                *(hashlib.new(name, document or b"").digest() for name in ALGORITHMS),
            )
