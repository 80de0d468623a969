"""Finding and checking the disk of an encrypted volume; what needs a device mapper is `scripts/boot-test --volume`'s."""

import asyncio
import dataclasses
import errno
import json
import os
import resource
import shutil
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.artifact import DestinationKind, LoadedArtifact, LoadedFile, load, luks2
from agent.artifact import manifest as m
from agent.artifact import volume_config as v
from agent.artifact.identify import identify
from agent.artifact.seal import seal_model
from agent.artifact.seal_volume import DATA_OFFSET, HEADER_BYTES, seal_volume
from agent.artifact.sources.directory import DirectorySource
from agent.artifact.volume import PreparedVolume, find_disk, list_files, look_for_volume, prepare
from agent.artifact.volume import load as load_volume
from agent.closed import Ident
from agent.config import ArtifactConfig
from agent.errors import (
    AgentError,
    ConfigError,
    KeyMismatchError,
    MalformedManifestError,
    ManifestDigestError,
    RollbackError,
    SwapActiveError,
    VolumeHeaderError,
    VolumeProblem,
    VolumeUnavailableError,
)
from agent.guest.memory_info import MACHINE, MemoryInfo
from agent.keys import ReleasedKey, SecretBuffer
from agent.sim.fuse import FOPEN_DIRECT_IO, IN_HEADER, NO_REPLY, ROOT_NODE, Op, pack_attributes, pack_init, reply, serve
from tests.fuse import served
from tests.test_artifact_load import machine_with
from tests.test_artifact_seal_volume import KEY, URI, nothing, read_config
from tests.test_guest_device_mapper import there_is_one


class Guest:
    """A guest's files: disks below `dev`, their names below `sys`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "model").mkdir(parents=True)
        (root / "model" / "a.gguf").write_bytes(os.urandom(50_000))
        (root / "dev").mkdir()
        self.image = root / "image"
        self.digest = seal_volume(root / "model", self.image, root / "layout", KEY, URI, "llama", 2, nothing)
        self.volume = read_config(root / "layout", self.digest)

    def attach(self, name: str, image: Path | None = None) -> Path:
        (self.root / "sys/class/block" / name).mkdir(parents=True)
        return Path(shutil.copy(image or self.image, self.root / "dev" / name))

    def config(self, **more: Any) -> ArtifactConfig:
        members = {"source": str(self.root / "layout"), "format": "volume", "manifest_digest": self.digest, "timeout_s": 5}
        return msgspec.convert(members | more, ArtifactConfig)

    def prepare(self, undo: ExitStack, memory: MemoryInfo = MACHINE, **more: Any) -> PreparedVolume:
        return prepare(
            self.volume,
            self.config(**more),
            undo,
            threading.Event(),
            allow_swap=memory is MACHINE,
            memory=memory,
            wait_s=0,
            root=self.root,
        )


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def released(key: bytes = KEY, *, locked: bool = True) -> ReleasedKey:
    secret = SecretBuffer(32)
    secret.view()[:] = key
    secret.locked = locked
    return ReleasedKey(secret, Ident("k"), 1)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vda", "sdb", "xvdc", "nvme0n1", "vdb2", "nvme10n1p3"])
def test_the_disk_is_found_by_its_uuid_among_others(guest: Guest, name: str) -> None:
    guest.attach("vdz").write_bytes(b"another disk")
    (guest.root / "sys/class/block/vdy").mkdir()  # without a node
    guest.attach("vdx").unlink()
    os.mkfifo(guest.root / "dev/vdx")  # nobody waits for its writer
    guest.attach(name)
    with ExitStack() as undo:
        prepared = guest.prepare(undo)
        assert os.readlink(f"/proc/self/fd/{prepared.disk}") == str(guest.root / "dev" / name)
        assert (prepared.destination.kind, prepared.destination.noswap) == (DestinationKind.VOLUME, True)
        assert prepared.total_plaintext_bytes == guest.volume.data_bytes
        prepared.close()


@pytest.mark.parametrize("name", ["loop0", "dm-0", "zram0", "vda1x", "vd"])
def test_what_is_no_disk_of_the_guest_is_not_looked_at(guest: Guest, name: str) -> None:
    guest.attach(name)
    assert find_disk(guest.volume.uuid, None, guest.root) is None


def test_without_its_disk_a_volume_is_not_prepared(guest: Guest, tmp_path: Path) -> None:
    with ExitStack() as undo, pytest.raises(VolumeUnavailableError) as caught:
        guest.prepare(undo)
    assert caught.value.problem is VolumeProblem.NOT_FOUND
    assert find_disk(guest.volume.uuid, None, tmp_path / "nowhere") is None
    assert find_disk(guest.volume.uuid, tmp_path / "dev", guest.root) is None, "a folder"


def test_a_disk_that_comes_late_is_waited_for(guest: Guest) -> None:
    timer = threading.Timer(0.3, guest.attach, ["vda"])
    timer.start()
    with ExitStack() as undo:
        prepare(
            guest.volume, guest.config(), undo, threading.Event(), allow_swap=True, memory=MACHINE, wait_s=20, root=guest.root
        )
    timer.join()


def test_who_is_told_to_stop_waits_no_longer(guest: Guest) -> None:
    stop = threading.Event()
    stop.set()
    with ExitStack() as undo, pytest.raises(CancelledError):
        prepare(guest.volume, guest.config(), undo, stop, allow_swap=True, memory=MACHINE, wait_s=20, root=guest.root)


def test_two_disks_with_one_uuid_are_refused(guest: Guest) -> None:
    guest.attach("vda")
    guest.attach("vdb")
    with ExitStack() as undo, pytest.raises(VolumeUnavailableError) as caught:
        guest.prepare(undo)
    assert caught.value.problem is VolumeProblem.SEVERAL


def test_a_named_device_is_the_only_one_that_is_looked_at(guest: Guest) -> None:
    guest.attach("vda")
    named = guest.attach("model")
    for path, found in ((named, True), (guest.root / "dev" / "other", False)):
        disk = find_disk(guest.volume.uuid, path, guest.root)
        assert (disk is not None) is found
        if disk is not None:
            os.close(disk)


def test_a_disk_that_ends_before_its_volume_is_refused(guest: Guest) -> None:
    disk = guest.attach("vda")
    end = DATA_OFFSET + guest.volume.segment_bytes
    os.truncate(disk, end)
    with ExitStack() as undo:
        guest.prepare(undo)
    os.truncate(disk, end - 1)
    with ExitStack() as undo, pytest.raises(VolumeUnavailableError) as caught:
        guest.prepare(undo)
    assert caught.value.problem is VolumeProblem.TOO_SMALL


@pytest.mark.parametrize("told_to_stop", [False, True])
def test_a_disk_that_does_not_answer_is_not_waited_for_without_end(guest: Guest, tmp_path: Path, told_to_stop: bool) -> None:
    node, stop = tmp_path / "stalled", threading.Event()
    node.touch()
    timer = threading.Timer(0.5, stop.set if told_to_stop else lambda: None)
    with served(node, serve_without_an_answer) as (disk, _), ExitStack() as undo:
        guest.attach("vda").unlink()
        (guest.root / "dev" / "vda").symlink_to(disk)
        timer.start()
        config = guest.config(timeout_s=3600 if told_to_stop else 1)
        with pytest.raises(CancelledError if told_to_stop else VolumeUnavailableError) as caught:
            prepare(guest.volume, config, undo, stop, allow_swap=True, memory=MACHINE, wait_s=0, root=guest.root)
        if isinstance(caught.value, VolumeUnavailableError):
            assert caught.value.problem is VolumeProblem.STALLED
    for thread in (timer, *(thread for thread in threading.enumerate() if thread.name == "volume")):
        thread.join(20)


def serve_without_an_answer(device: int, control: socket.socket) -> None:
    """A file that can be opened, and whose bytes never come."""

    def answer(request: bytes) -> None:
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        match opcode:
            case Op.INIT:
                reply(device, unique, pack_init())
            case Op.GETATTR:
                reply(device, unique, bytes(16) + pack_attributes(ROOT_NODE, 1 << 20, stat.S_IFREG | 0o444))
            case Op.OPEN:
                reply(device, unique, struct.pack("<QII", 0, FOPEN_DIRECT_IO, 0))
            case _ if opcode not in NO_REPLY and opcode != Op.READ:
                reply(device, unique, b"", errno.ENOSYS)

    serve(device, answer, control.fileno(), lambda: bool(control.recv(1)))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (b'"aes-xts-plain64"', b'"cipher_null-ecb"', "segments[].encryption"),
        (b'"sector_size":4096', b'"sector_size": 512', "segments[].sector_size"),
        (b'"offset":"1048576"', b'"offset":"2097152"', "segments[].offset"),
        (b'"size":"dynamic"', b'"size":"4096"   ', "segments[].size"),
        (b'"tokens":{}', b'"tokens":[]', "tokens"),
    ],
)
def test_a_header_that_a_host_changed_is_refused_before_a_key_is_asked_for(
    guest: Guest, old: bytes, new: bytes, field: str
) -> None:
    disk = guest.attach("vda")
    data = disk.read_bytes()
    assert old in data[:HEADER_BYTES]
    disk.write_bytes(luks2.with_checksum(data[:HEADER_BYTES].replace(old, new)) + data[HEADER_BYTES:])
    with ExitStack() as undo, pytest.raises(VolumeHeaderError) as caught:
        guest.prepare(undo)
    assert caught.value.field == field


def test_only_the_first_copy_counts(guest: Guest) -> None:
    """cryptsetup would repair the first from the second; who could write one could write both."""
    disk = guest.attach("vda")
    data = disk.read_bytes()
    disk.write_bytes(data[:HEADER_BYTES] + bytes(HEADER_BYTES) + data[2 * HEADER_BYTES :])
    with ExitStack() as undo:
        guest.prepare(undo)
    disk.write_bytes(data[:5000] + b"!" + data[5001:])
    with ExitStack() as undo, pytest.raises(VolumeHeaderError):
        guest.prepare(undo)


def test_only_regular_files_of_the_file_system_itself_are_the_model(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights").write_bytes(b"0123")
    (tmp_path / "a").write_bytes(b"01")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").symlink_to("/etc")
    os.mkfifo(tmp_path / "fifo")
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert list(list_files(root)) == [LoadedFile("a", 2), LoadedFile("b/weights", 4)]
    finally:
        os.close(root)


# --- the key ----------------------------------------------------------------------------------------------------------


def refused(
    guest: Guest, error: type[AgentError], key: ReleasedKey, floor: int = 0, memory: MemoryInfo = MACHINE
) -> AgentError:
    with ExitStack() as undo, key:
        prepared = guest.prepare(undo, memory)
        prepared.check()
        with pytest.raises(error) as caught:
            load_volume(prepared, key, floor, threading.Event())
        assert prepared.mount is None
    return caught.value


def test_a_wrong_key_opens_no_volume(guest: Guest) -> None:
    guest.attach("vda")
    refused(guest, KeyMismatchError, released(bytes(32)))


def test_a_volume_below_the_floor_is_not_opened(guest: Guest) -> None:
    guest.attach("vda")
    refused(guest, RollbackError, released(), floor=3)


def test_with_swap_the_key_of_a_volume_needs_a_lock(guest: Guest, tmp_path: Path) -> None:
    guest.attach("vda")
    swapping = machine_with(tmp_path / "machine", 1 << 30, "/dev/sda2 partition 1 0 -2\n")
    refused(guest, SwapActiveError, released(locked=False), memory=swapping)


def test_with_swap_the_key_of_the_disk_itself_needs_a_lock_too(guest: Guest, tmp_path: Path) -> None:
    guest.attach("vda")
    swapping = machine_with(tmp_path / "machine", 1 << 30, "/dev/sda2 partition 1 0 -2\n")
    with ExitStack() as undo:
        prepared = guest.prepare(undo, swapping)
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
                if os.geteuid() == 0:
                    os.setuid(65534)  # root locks what it likes
                load_volume(prepared, released(), 0, threading.Event())
            except SwapActiveError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_kernel_without_a_device_mapper_is_told(guest: Guest) -> None:
    if there_is_one():
        pytest.skip("this kernel has one")
    guest.attach("vda")
    error = refused(guest, VolumeUnavailableError, released())
    assert isinstance(error, VolumeUnavailableError)
    assert (error.problem, error.code in (errno.ENOENT, errno.ENODEV)) == (VolumeProblem.KERNEL, True)
    with pytest.raises(VolumeUnavailableError) as caught:
        look_for_volume(guest.volume, guest.config())
    assert caught.value.code == error.code


# --- as a boot does it ------------------------------------------------------------------------------------------------


def boot(guest: Guest, uri: str = URI, **more: Any) -> LoadedArtifact:
    async def run() -> LoadedArtifact:
        config = await identify(source, guest.config(**more))
        prepared = await load.prepare(source, config, uri, undo, allow_swap=True)
        return await load.load(prepared, key, 0, lambda *_: None)

    source = DirectorySource(str(guest.root / "layout"))
    try:
        with ExitStack() as undo, released() as key:
            return asyncio.run(run())
    finally:
        source.close()


def test_the_manifest_must_be_the_one_the_configuration_means(guest: Guest) -> None:
    for changes, error in (
        ({"name": "other"}, ConfigError),
        ({"min_version": 3}, RollbackError),
        ({"manifest_digest": "sha256:" + "0" * 64}, AgentError),
    ):
        with pytest.raises(error):
            boot(guest, **changes)
    with pytest.raises(ConfigError):
        boot(guest, uri="kbs:///default/model/other")


def test_the_configuration_says_what_is_opened_and_not_the_store(guest: Guest) -> None:
    with pytest.raises(MalformedManifestError) as caught:
        boot(guest, format="keyturn")
    assert caught.value.field == "config.mediaType"
    files = seal_model(guest.root / "model", guest.root / "layout", KEY, URI, "llama", 3, nothing)
    with pytest.raises(MalformedManifestError) as caught:
        boot(guest, manifest_digest=files)
    assert caught.value.field == "config.mediaType"


def test_a_manifest_of_other_bytes_is_no_volume(guest: Guest) -> None:
    path = guest.root / "layout/blobs/sha256" / guest.digest.removeprefix("sha256:")
    document = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(document).encode())
    with pytest.raises(ManifestDigestError):
        boot(guest)


def test_another_root_hash_is_another_manifest(guest: Guest) -> None:
    """It cannot come from the disk or a command line: there is no other place for it."""
    other = dataclasses.replace(guest.volume, root_hash=bytes(32))
    assert m.digest_of(v.pack_manifest(other)) != guest.digest
    path = guest.root / "layout/blobs/sha256" / m.digest_of(v.pack_config(guest.volume)).removeprefix("sha256:")
    path.write_bytes(v.pack_config(other))
    with pytest.raises(MalformedManifestError) as caught:
        boot(guest)
    assert caught.value.field == "config.digest"
