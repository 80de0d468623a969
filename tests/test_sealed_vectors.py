"""The tamper matrix: every file in `vectors/sealed/` on the readers of a boot. What is refused leaves nothing."""

import asyncio
import enum
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.artifact.identify import identify
from agent.artifact.load import load, prepare
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import AgentError, ArtifactError
from agent.keys import ReleasedKey, SecretBuffer
from tests import sealed_vectors as v
from tests.appearances import appearing

FILES = sorted(path.name for path in v.FOLDER.glob("*.txt") if path.name != "good.txt")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, v.Model]:
    return v.make_models(tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def given() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    path.rmdir()  # fails unless it is empty


def read(case: v.Case, given: Path) -> str:
    """SHA-256 of all plaintext that a boot would hand to a server."""
    reader = case.reader
    pinned = {"manifest_digest": reader["digest"]}
    if "tag" in reader:
        pinned = {"provider_keys": (reader["provider_key"],), "tag": reader["tag"]}
    config = ArtifactConfig(
        source="/vectors",
        name=reader.get("name"),
        min_version=reader["min_version"],
        destination="directory",
        directory=str(given),
        **pinned,
    )

    async def boot() -> str:
        secret = SecretBuffer(32)
        with secret.view() as view:
            view[:] = reader["key"]
        with ExitStack() as undo, ReleasedKey(secret, Ident("vectors"), 1) as key:
            identified = await identify(case, config)
            prepared = await prepare(case, identified, reader["key_uri"], undo, allow_swap=True)
            assert os.listdir(given) == [".keyturn"]
            loaded = await load(prepared, key, reader["floor"], lambda _, __: None)
            assert loaded.directory is not None
            whole = b"".join(Path(loaded.directory, file.path).read_bytes() for file in loaded.files)
            return hashlib.sha256(whole).hexdigest()

    return asyncio.run(boot())


@pytest.mark.parametrize("name", FILES)
def test_a_reader_gives_a_vector_its_verdict(name: str, models: dict[str, v.Model], given: Path) -> None:
    vector, released = v.parse_vector((v.FOLDER / name).read_text())
    case = v.apply(vector.edits, models)
    if vector.expect == "loads":
        with appearing(given) as names:
            assert read(case, given) == released == v.released_digest()
        assert names == {".keyturn", "model"}
        return
    with appearing(given) as names, pytest.raises(AgentError) as caught:
        read(case, given)
    assert released == "nothing"
    assert os.listdir(given) == []
    assert names <= {".keyturn"}, "and never had a name"
    said = {field: getattr(caught.value, field) for field in vector.fields}
    assert {field: value.name if isinstance(value, enum.Enum) else value for field, value in said.items()} == vector.fields
    if vector.expect == "error":  # several segments are damaged, and threads meet them in any order
        assert isinstance(caught.value, ArtifactError)
    else:
        assert type(caught.value).__name__ == vector.expect


def test_every_vector_changes_something(models: dict[str, v.Model]) -> None:
    seen = {}
    for name in FILES:
        vector, _ = v.parse_vector((v.FOLDER / name).read_text())
        case = v.apply(vector.edits, models)
        blobs = hashlib.sha256(b"".join(digest.encode() + data for digest, data in sorted(case.blobs.items()))).digest()
        seen[name] = (blobs, case.index, str(case.reader))
    assert len(set(seen.values())) == len(seen)


def test_the_files_are_those_that_gen_vectors_writes() -> None:
    ended = subprocess.run([sys.executable, v.ROOT / "scripts/gen-vectors", "--check"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
