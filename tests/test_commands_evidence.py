"""`keyturn evidence`: what it prints is what the broker accepts, for that nonce and key alone, and nothing is changed."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent.broker.anchors import TrustAnchors, load_simulation_roots
from agent.broker.audit import AuditLog
from agent.broker.authority import Authority
from agent.broker.keystore import DirectoryKeyStore
from agent.broker.policy import parse_policy
from agent.broker.token import TokenKey
from agent.cli import main
from agent.closed import Ident
from agent.commands.evidence import MAX_RUNTIME_DATA_BYTES, check_held
from agent.errors import Absence, DenialReason, NoAttesterError
from agent.evidence import CompositeEvidence, Evidence, Nonce, Tee
from agent.evidence.binding import parse_additional_evidence
from agent.evidence.ccel import RuntimeEvent
from agent.handshake import Accepted, Attestation, Denied, Hello, TeePublicKey
from agent.jose import pack_b64, pack_jwk, parse_point
from agent.keys import EphemeralKey
from agent.sim.machine import MACHINE_FILE, SimulatedMachine
from agent.sim.nvml import CALL_LOG
from agent.sim.tdx import CCEL_FILE
from tests.world import DEADLINE_S, KEY_URI, World

NONCE = Nonce(bytes(range(32)))


@pytest.fixture
def world(tmp_path: Path, silicon: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(tmp_path, silicon, undo, gpus=2)


def launched(world: World) -> list[str]:
    """The flags that name the configuration of a guest which is launched with it."""
    config = world.write_config()
    world.launch(hashlib.sha256(config.read_bytes()).digest())
    return ["--config", str(config)]


def evidence(*flags: str, nonce: bytes = NONCE) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "agent", "evidence", "--nonce", nonce.hex(), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


def printed(*flags: str) -> dict[str, Any]:
    done = evidence(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def appraise(world: World, found: dict[str, Any], nonce: Nonce) -> Accepted | Denied:
    """What the broker of this world says of printed evidence."""
    primary = found["primary_evidence"]
    chain = tuple(map(base64.b64decode, primary["cert_chain"]))
    composite = CompositeEvidence(
        Evidence(Tee(found["tee"]), base64.b64decode(primary["report"]), chain), found["additional_evidence"]
    )
    made = world.folder / "broker"
    authority = Authority(
        parse_policy(world.write_policy().read_bytes()),
        TrustAnchors(load_simulation_roots(world.machine.roots_dir)),
        TokenKey((made / "token.key").read_bytes()),
        DirectoryKeyStore(made / "keys"),
        AuditLog(world.folder / "audit.jsonl"),
        now=lambda: datetime.now(UTC),
    )
    hello = Hello(Ident("asked-1"), Ident(KEY_URI), Tee.SNP)
    public = parse_point(found["runtime_data"]["tee-pubkey"])
    return authority.attest(hello, Attestation(hello.request_id, public, composite), nonce)


def ready(machine: SimulatedMachine) -> int:
    state: int = json.loads((machine.directory / MACHINE_FILE).read_bytes())["gpu"]["ready"]
    return state


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_broker_accepts_what_is_printed_for_this_nonce_and_for_no_other(world: World) -> None:
    found = printed(*launched(world))
    assert set(found) == {"tee", "interface", "runtime_data", "primary_evidence", "additional_evidence"}
    assert (found["tee"], found["interface"]) == ("snp", "simulated-snp")
    assert found["runtime_data"]["nonce"] == pack_b64(NONCE)
    verdict = appraise(world, found, NONCE)
    assert isinstance(verdict, Accepted), verdict
    other = appraise(world, found, Nonce(bytes(32)))
    assert isinstance(other, Denied)
    assert (other.reason, other.claim) == (DenialReason.DEVICE, "snp.report-data")


def test_no_ready_state_is_set_and_nothing_else_changes(world: World) -> None:
    flags = launched(world)
    before = (world.machine.directory / MACHINE_FILE).read_bytes()
    found = printed(*flags)
    assert (world.machine.directory / MACHINE_FILE).read_bytes() == before
    assert "nvmlSystemSet" not in (world.machine.directory / CALL_LOG).read_text()
    gpus, claims = parse_additional_evidence(found["additional_evidence"])
    assert claims is not None
    assert (len(gpus), claims.ready, claims.renewal) == (2, False, False)
    assert claims.manifest_digest == world.manifest_digest


def test_a_guest_that_has_passed_its_gate_gives_what_it_renews_with(world: World) -> None:
    world.machine.gpu.ready = 1
    found = printed(*launched(world))
    _, claims = parse_additional_evidence(found["additional_evidence"])
    assert claims is not None
    assert (claims.ready, claims.renewal, ready(world.machine)) == (True, True, 1)
    assert isinstance(appraise(world, found, NONCE), Accepted)


def test_a_ready_state_that_the_image_sets_is_no_renewal(world: World) -> None:
    world.gpu["ready_state"], world.row_gpu["ready"] = "preset", True
    world.machine.gpu.ready = 1
    found = printed(*launched(world))
    _, claims = parse_additional_evidence(found["additional_evidence"])
    assert claims is not None
    assert (claims.ready, claims.renewal) == (True, False)
    assert isinstance(appraise(world, found, NONCE), Accepted)


def test_without_gpus_there_is_no_additional_evidence(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0)
        found = printed(*launched(world))
        assert found["additional_evidence"] == ""
        assert isinstance(appraise(world, found, NONCE), Accepted)


def test_a_td_shows_its_log_which_explains_its_quote_before_and_after_a_release(
    tmp_path: Path, silicon: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=0, tee=Tee.TDX)
        config = world.prepare()
        for text in (None, '{"key_uri":"kbs:///a/b/c"}'):
            if text:
                world.machine.runtime(Tee.TDX).measure(RuntimeEvent("keyturn", "release-key", text))
            primary = printed("--config", str(config))["primary_evidence"]
            assert set(primary) == {"quote", "event_log"}
            for name in primary:
                (tmp_path / name).write_bytes(base64.b64decode(primary[name]))
            against = ["--against", str(tmp_path / "quote"), "--unsafe-simulation-roots", str(world.machine.roots_dir)]
            assert main(["verify", "event-log", str(tmp_path / "event_log"), *against, "--json"]) == 0
            said = json.loads(capsys.readouterr().out)
            runtime = said["events"][-1]["runtime_event"]
            assert runtime == (text and {"domain": "keyturn", "operation": "release-key", "content": text})
        (world.machine.directory / CCEL_FILE).write_bytes(b"")
        assert printed("--config", str(config))["primary_evidence"]["event_log"] is None


def test_a_machine_with_switches_gives_their_evidence_too(tmp_path: Path, silicon: Path) -> None:
    with ExitStack() as undo:
        world = World(tmp_path, silicon, undo, gpus=8, switches=4)
        found = printed(*launched(world))
        devices, claims = parse_additional_evidence(found["additional_evidence"])
        assert [device.arch for device in devices] == ["HOPPER"] * 8 + ["LS10"] * 4
        assert claims is not None
        assert (claims.multi_gpu_mode, claims.cc_feature) == (1, 0)
        assert isinstance(appraise(world, found, NONCE), Accepted)


def test_every_call_has_a_key_of_its_own_unless_one_is_given(world: World, tmp_path: Path) -> None:
    flags = launched(world)
    first, second = (printed(*flags)["runtime_data"]["tee-pubkey"] for _ in range(2))
    assert first != second
    given = tmp_path / "runtime-data.json"
    for runtime_data in ({"tee-pubkey": first}, {"nonce": pack_b64(NONCE), "tee-pubkey": first}):
        given.write_text(json.dumps(runtime_data))
        found = printed(*flags, "--runtime-data", str(given))
        assert found["runtime_data"]["tee-pubkey"] == first
        assert isinstance(appraise(world, found, NONCE), Accepted)


def test_the_report_in_it_is_what_verify_takes(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    primary = printed(*launched(world))["primary_evidence"]
    (tmp_path / "report").write_bytes(base64.b64decode(primary["report"]))
    flags = ["--json", "--unsafe-simulation-roots", str(world.machine.roots_dir)]
    for number, der in enumerate(primary["cert_chain"]):
        (tmp_path / f"{number}.der").write_bytes(base64.b64decode(der))
        flags += ["--endorsement", str(tmp_path / f"{number}.der")]
    assert main(["verify", "snp", str(tmp_path / "report"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["host_data"] == world.machine.host_data.hex()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonce", ["", "00", "00" * 31, "00" * 33, "0x" + "00" * 31, "00 " * 32, "é" * 64])
def test_a_nonce_is_32_bytes_in_hexadecimal(nonce: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evidence", "--nonce", nonce])
    assert caught.value.code == 2


@pytest.mark.parametrize("words", [[], ["--nonce", "00" * 32, "--config", "-", "--runtime-data", "-"]])
def test_wrong_words_are_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evidence", *words])
    assert caught.value.code == 2


PUBLIC = EphemeralKey.generate().public
JWK = pack_jwk(TeePublicKey(PUBLIC.x, PUBLIC.y))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"tee-pubkey": "key"}),
        json.dumps({"tee-pubkey": JWK | {"kid": "1"}}),
        json.dumps({"tee-pubkey": JWK | {"crv": "P-384"}}),
        json.dumps({"tee-pubkey": {name: value for name, value in JWK.items() if name != "alg"}}),
        json.dumps({"tee-pubkey": JWK, "nonce": pack_b64(bytes(32))}),
        json.dumps({"tee-pubkey": JWK, "more": "hashed by others"}),
        json.dumps({"tee-pubkey": JWK}) + " " * MAX_RUNTIME_DATA_BYTES,
    ],
)
def test_runtime_data_that_would_not_be_hashed_as_it_stands_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").write_text(text)
    assert main(["evidence", "--nonce", NONCE.hex(), "--runtime-data", str(tmp_path / "data"), "--config", "/absent"]) == 10
    error = json.loads(capsys.readouterr().err)
    assert (error["class"], error["fields"]["key"]) == ("ConfigError", "runtime-data")


def test_a_configuration_the_guest_was_not_launched_with_makes_no_evidence(world: World) -> None:
    flags = launched(world)
    world.machine.host_data = bytes(32)
    world.machine.save()
    done = evidence(*flags)
    assert (done.returncode, done.stdout) == (10, "")
    assert json.loads(done.stderr)["class"] == "ConfigNotMeasuredError"


def test_gpus_in_a_mode_that_protects_nothing_make_no_evidence(world: World) -> None:
    world.machine.gpu.devtools = 1
    done = evidence(*launched(world))
    assert (done.returncode, done.stdout) == (13, "")
    assert json.loads(done.stderr)["class"] == "GpuModeError"


def test_gpus_of_another_architecture_than_a_boot_takes_make_no_evidence(world: World) -> None:
    world.gpu["architecture"] = "blackwell"
    done = evidence(*launched(world))
    assert (done.returncode, done.stdout) == (13, "")
    assert json.loads(done.stderr)["class"] == "GpuCountError"
    world.gpu["architecture"] = "hopper"
    assert printed(*launched(world))["additional_evidence"]


def test_without_a_configuration_there_is_nothing_to_collect(tmp_path: Path) -> None:
    done = evidence("--config", str(tmp_path / "absent"))
    assert (done.returncode, done.stdout, json.loads(done.stderr)["class"]) == (10, "", "ConfigError")


def test_gpus_that_nobody_else_holds_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(NoAttesterError) as refused:
        check_held(tmp_path)
    assert refused.value.reason is Absence.GPU_NOT_HELD
    (tmp_path / "7" / "fd").mkdir(parents=True)
    (tmp_path / "7" / "fd" / "3").symlink_to("/dev/nvidia0")
    check_held(tmp_path)


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evidence", "--help"])
    assert "keyturn evidence --nonce $(openssl rand -hex 32)" in " ".join(capsys.readouterr().out.split())
