"""The site of a demo: what it writes is read by the real readers."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import config
from agent.broker.policy import parse_policy
from agent.demo import site
from agent.evidence import Tee
from agent.sim.machine import SimulatedMachine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> site.SealedModel:
    return site.seal_minilm(tmp_path_factory.mktemp("sealed"), lambda done, total: None)


def test_the_plaintext_is_gone_when_the_model_is_sealed(model: site.SealedModel) -> None:
    files = [path for path in model.layout.parent.rglob("*") if path.is_file()]
    assert model.plaintext_bytes > 40_000_000
    assert all(b"GGUF" not in path.read_bytes()[:1024] for path in files)
    assert all(path.is_relative_to(model.layout) for path in files)
    assert model.key.hex() not in repr(model)


def test_the_plaintext_is_gone_when_sealing_fails(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.seal_minilm(tmp_path, stop)
    assert not (tmp_path / "plain").exists()


def test_one_bit_of_the_largest_blob_is_flipped(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (blobs / "small").write_bytes(bytes(10))
    (blobs / "large").write_bytes(bytes(1000))
    site.flip_byte(tmp_path)
    assert (blobs / "small").read_bytes() == bytes(10)
    assert (blobs / "large").read_bytes() == bytes(500) + b"\x01" + bytes(499)


@pytest.mark.parametrize(
    ("user", "tee"),
    [(None, Tee.SNP), (None, Tee.TDX), (site.ServerUser(0, 0), Tee.SNP), (site.ServerUser(1000, 100), Tee.SNP)],
)
def test_the_guest_can_read_its_configuration_and_the_broker_its_policy(
    tmp_path: Path, machine: SimulatedMachine, model: site.SealedModel, user: site.ServerUser | None, tee: Tee
) -> None:
    with site.run_broker(tmp_path, machine, model.key) as broker:
        text = site.configuration_text(machine, tee, model, broker.section, {"source": "http://127.0.0.1:1/"}, 8080, user)
        measured = config.parse(text.encode())
        machine.host_data = measured.digest
        broker.load_policy(site.policy_text(machine, tee, model))
    assert measured.config.broker.endpoints == (f"127.0.0.1:{broker.port}",)
    assert measured.config.server
    assert measured.config.server.unsafe_run_as_root == (user == site.ServerUser(0, 0))
    assert measured.config.server.uid == (1000 if user and user.uid == 1000 else site.SERVER_UID)
    row = parse_policy(site.policy_text(machine, tee, model).encode()).rows[site.KEY_URI]
    digest = hashlib.sha256(text.encode()).hexdigest()
    if tee is Tee.TDX:
        assert row.snp is None and row.tdx and row.tdx.mr_config_id[0].value == digest + "00" * 16
    else:
        assert row.tdx is None and row.snp and row.snp.host_data[0].value == digest
    assert measured.config.tee.attester == f"simulated-{tee.value}"
    assert row.manifest_digests[0].value == model.manifest_digest


def test_a_machine_with_switches_is_configured_and_wanted_as_one(
    tmp_path: Path, silicon: Path, model: site.SealedModel
) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=8, switches=4, silicon=silicon)
    with site.run_broker(tmp_path, machine, model.key) as broker:
        text = site.configuration_text(machine, Tee.SNP, model, broker.section, {"source": "http://127.0.0.1:1/"}, 8080, None)
    gpu = config.parse(text.encode()).config.gpu
    assert (gpu.count, gpu.switches) == (8, 4)
    row = parse_policy(site.policy_text(machine, Tee.SNP, model).encode()).rows[site.KEY_URI].gpu
    assert (row.count, [mode.value for mode in row.modes]) == (8, ["ppcie"])
    assert [version.value for version in row.switch_vbios_versions] == ["96.10.55.00.01"]


def test_the_server_gets_a_user_of_its_own_only_from_root() -> None:
    user = site.choose_server_user()
    assert (user is None) == (os.geteuid() != 0)


def test_a_process_that_says_nothing_is_killed() -> None:
    began = time.monotonic()
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(silent, text=True) as process, site.killed_after(0.05, process):
        assert process.wait() == -9
    assert time.monotonic() - began < 30
