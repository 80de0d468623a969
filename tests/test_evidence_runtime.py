"""The measurement of a release, and the event log as evidence, on a simulated TD."""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.closed import Ident
from agent.errors import Absence, DeviceError, MalformedEvidenceError, NoAttesterError
from agent.evidence import CompositeEvidence, Evidence, Nonce, ReportData, RuntimeRegister, Tee, Unsupported
from agent.evidence.ccel import (
    RuntimeEvent,
    pack_event,
    pack_event_log,
    pack_runtime_event,
    parse_event_log,
    parse_runtime_event,
    replay,
)
from agent.evidence.rtmr import Rtmr
from agent.evidence.runtime import (
    FIRMWARE_LOG,
    FOLDER,
    FOREIGN_LOG,
    LOG_FILE,
    PENDING_FILE,
    MeasuredRelease,
    NoRegister,
    RuntimeMeasurement,
    release_event,
)
from agent.evidence.tdx_abi import parse_quote
from agent.handshake import MAX_EVENT_LOG_BYTES, SealedKey, TeePublicKey, TokenClaims, Verdict
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import CCEL_FILE, FOREIGN_LOG_FILE, SimulatedRegister, make_event_log, read_rtmr_3
from tests.shared import shared_data

EVENT = RuntimeEvent("keyturn", "release-key", "{}")
OTHER = RuntimeEvent("keyturn", "release-key", '{"a":1}')


@pytest.fixture
def td(machine: SimulatedMachine) -> RuntimeMeasurement:
    return machine.runtime(Tee.TDX)


def quoted(machine: SimulatedMachine) -> tuple[bytes, ...]:
    """The four RTMRs that a quote shows now."""
    return parse_quote(machine.attester(Tee.TDX).collect(ReportData(bytes(64))).report).body.rtmrs


def extended(value: bytes, event: RuntimeEvent) -> bytes:
    return hashlib.sha384(value + pack_runtime_event(event, 3).digests[0][1]).digest()


def part(machine: SimulatedMachine, name: str) -> Path:
    return machine.directory / "run" / name


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_release_is_in_the_register_in_the_next_quote_and_in_the_log(
    machine: SimulatedMachine, td: RuntimeMeasurement
) -> None:
    before = quoted(machine)
    measured = td.measure(EVENT)
    assert measured.unsupported is None
    assert measured.rtmr_3 == read_rtmr_3(machine) == extended(bytes(48), EVENT)
    assert quoted(machine) == (*before[:3], measured.rtmr_3)
    log = parse_event_log(td.event_log())
    assert log.events[:-1] == make_event_log(machine).events
    assert parse_runtime_event(log.events[-1]) == EVENT
    assert replay(log) == quoted(machine)


def test_every_release_of_a_machine_is_kept(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    for event in (EVENT, OTHER, EVENT):
        td.measure(event)
    again = SimulatedMachine.load(machine.directory).runtime(Tee.TDX)
    log = parse_event_log(again.event_log())
    assert [parse_runtime_event(event) for event in log.events[-3:]] == [EVENT, OTHER, EVENT]
    assert replay(log) == quoted(machine)
    assert not part(machine, PENDING_FILE).exists()


def test_our_part_of_the_log_is_what_the_attestation_agent_writes(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    td.measure(EVENT)
    text = b"keyturn release-key {}"
    data = b"LEAA" + len(text).to_bytes(4, "little") + text
    head = b"".join(number.to_bytes(4, "little") for number in (4, 6, 1)) + b"\x0c\0" + hashlib.sha384(data).digest()
    assert part(machine, LOG_FILE).read_bytes() == head + len(data).to_bytes(4, "little") + data
    assert part(machine, LOG_FILE).stat().st_mode & 0o777 == 0o600


def test_an_snp_guest_measures_nothing_and_has_no_log(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    assert td.event_log()
    for runtime in (machine.runtime(Tee.SNP), RuntimeMeasurement(NoRegister(), firmware_log=machine.directory / CCEL_FILE)):
        assert runtime.measure(EVENT).unsupported is Unsupported.NO_REGISTER
        assert runtime.event_log() == b"", "some firmware leaves a table on SNP too"
    assert not (machine.directory / "run").exists()
    with pytest.raises(RuntimeError):
        NoRegister().extend(bytes(48))


def test_a_kernel_without_the_file_measures_nothing_and_still_has_the_firmwares_log(machine: SimulatedMachine) -> None:
    machine.register_errno = errno.ENOENT
    runtime = machine.runtime(Tee.TDX)
    measured = runtime.measure(EVENT)
    assert (measured.rtmr_3, measured.unsupported) == (None, Unsupported.NO_DRIVER)
    assert replay(parse_event_log(runtime.event_log())) == quoted(machine)


def test_the_log_of_the_attestation_agent_is_left_alone_and_is_the_evidence(
    machine: SimulatedMachine, td: RuntimeMeasurement
) -> None:
    SimulatedRegister(machine).extend(pack_runtime_event(OTHER, 3).digests[0][1])
    foreign = machine.directory / FOREIGN_LOG_FILE
    foreign.write_bytes(pack_event(pack_runtime_event(OTHER, 3)))
    assert td.measure(EVENT).unsupported is Unsupported.FOREIGN_LOG
    assert foreign.read_bytes() == pack_event(pack_runtime_event(OTHER, 3))
    assert replay(parse_event_log(td.event_log())) == quoted(machine)


@pytest.mark.parametrize("unsupported", ["snp", "no-driver", "foreign-log"])
def test_a_guest_that_must_measure_and_cannot_is_told_before_anything_is_asked_for(
    machine: SimulatedMachine, unsupported: str
) -> None:
    if unsupported == "no-driver":
        machine.register_errno = errno.ENOENT
    if unsupported == "foreign-log":
        (machine.directory / FOREIGN_LOG_FILE).touch()
    with pytest.raises(NoAttesterError) as caught:
        machine.runtime(Tee.SNP if unsupported == "snp" else Tee.TDX).require()
    assert (caught.value.attester, caught.value.reason) == ("rtmr", Absence.NO_RUNTIME_REGISTER)


def test_a_guest_that_must_measure_and_can_is_not_stopped(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    td.require()
    assert read_rtmr_3(machine) == bytes(48)


def test_nobody_else_makes_a_measured_release() -> None:
    with pytest.raises(RuntimeError):
        MeasuredRelease(bytes(48), None, made_by=object())


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EBUSY, errno.ENXIO])
def test_an_extension_that_the_kernel_refuses_is_an_error_and_not_in_the_log(machine: SimulatedMachine, code: int) -> None:
    machine.register_errno = code
    runtime = machine.runtime(Tee.TDX)
    with pytest.raises(DeviceError) as caught:
        runtime.measure(EVENT)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("rtmr", "extend", code)
    assert replay(parse_event_log(runtime.event_log())) == quoted(machine)


def test_an_extension_that_is_lost_is_found(machine: SimulatedMachine) -> None:
    machine.lose_extension = True
    runtime = machine.runtime(Tee.TDX)
    with pytest.raises(DeviceError) as caught:
        runtime.measure(EVENT)
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("rtmr", "read-back", errno.EIO)
    assert replay(parse_event_log(runtime.event_log())) == quoted(machine)


def test_a_log_that_cannot_be_written_is_found_before_the_register_is_extended(
    machine: SimulatedMachine, td: RuntimeMeasurement
) -> None:
    (machine.directory / "run" / "eventlog.new").mkdir(parents=True)
    with pytest.raises(DeviceError) as caught:
        td.measure(EVENT)
    assert (caught.value.interface, caught.value.call) == ("event-log", "write")
    assert read_rtmr_3(machine) == bytes(48)


class Dying:
    """A register whose process dies with the call: before the extension, or after it."""

    def __init__(self, register: RuntimeRegister, *, extends: bool) -> None:
        self._register = register
        self._extends = extends

    def read(self) -> bytes | Unsupported:
        return self._register.read()

    def extend(self, digest: bytes) -> None:
        if self._extends:
            self._register.extend(digest)
        raise KeyboardInterrupt


@pytest.mark.parametrize("extends", [False, True])
def test_a_death_between_register_and_log_leaves_a_log_that_replays(machine: SimulatedMachine, extends: bool) -> None:
    runtime = machine.runtime(Tee.TDX)
    runtime.measure(OTHER)
    dying = RuntimeMeasurement(
        Dying(SimulatedRegister(machine), extends=extends),
        firmware_log=machine.directory / CCEL_FILE,
        folder=machine.directory / "run",
        foreign_log=machine.directory / FOREIGN_LOG_FILE,
    )
    with pytest.raises(KeyboardInterrupt):
        dying.measure(EVENT)
    assert part(machine, PENDING_FILE).exists()
    assert replay(parse_event_log(runtime.event_log())) == quoted(machine)
    runtime.measure(OTHER)
    assert replay(parse_event_log(runtime.event_log())) == quoted(machine)
    found = [parse_runtime_event(event) for event in parse_event_log(runtime.event_log()).events[3:]]
    assert found[-2 - extends :] == [OTHER, *([EVENT] if extends else []), OTHER]


def test_a_death_between_log_and_the_pending_events_end_counts_it_once(
    machine: SimulatedMachine, td: RuntimeMeasurement
) -> None:
    td.measure(EVENT)
    part(machine, PENDING_FILE).write_bytes(read_rtmr_3(machine) + part(machine, LOG_FILE).read_bytes())
    assert replay(parse_event_log(td.event_log())) == quoted(machine)


# --- the log as evidence ----------------------------------------------------------------------------------------------


def test_padding_is_not_sent(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    assert (machine.directory / CCEL_FILE).stat().st_size == 64 << 10
    assert td.event_log() == pack_event_log(make_event_log(machine))


@pytest.mark.parametrize("name", ["live", "live2", "gcp-cos113", "grub-gke", "ovmf", "dstack"])
def test_a_real_log_is_trimmed_at_its_last_event(tmp_path: Path, name: str) -> None:
    path = shared_data(f"tdx/ccel/{name}.bin")
    old_kernel = Rtmr(tmp_path)
    log = RuntimeMeasurement(old_kernel, firmware_log=path, folder=tmp_path, foreign_log=tmp_path / "none").event_log()
    data = path.read_bytes()
    assert data.startswith(log)
    assert set(data[len(log) :]) <= {0xFF}
    assert replay(parse_event_log(log)) == replay(parse_event_log(data))
    assert len(log) < 64 << 10


def test_a_guest_whose_firmware_left_no_log_sends_none(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    (machine.directory / CCEL_FILE).unlink()
    td.measure(EVENT)
    assert td.event_log() == b"", "what the firmware measured is not in ours, so it could not replay"


def cut(data: bytes) -> bytes:
    return data.rstrip(b"\xff")[:-7]


def grown(data: bytes) -> bytes:
    log = parse_event_log(data)
    return pack_event_log(dataclasses.replace(log, events=log.events * 800))


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (cut, "event_data"),
        (lambda data: data + bytes(4 << 20), "length"),
        (grown, "length"),
        (lambda _: bytes(64 << 10), "spec_id_type"),
        (lambda _: b"log", "spec_id_event"),
    ],
)
def test_a_log_that_is_too_long_or_none_is_malformed(
    machine: SimulatedMachine, td: RuntimeMeasurement, spoil: Callable[[bytes], bytes], field: str
) -> None:
    path = machine.directory / CCEL_FILE
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(MalformedEvidenceError) as caught:
        td.event_log()
    assert (caught.value.format.value, caught.value.field) == ("cc-event-log", field)


def test_our_part_of_the_log_is_bounded_too(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    td.measure(EVENT)
    part(machine, LOG_FILE).write_bytes(pack_event(pack_runtime_event(EVENT, 3)) * 3000)
    with pytest.raises(MalformedEvidenceError):
        td.event_log()


def test_a_log_that_cannot_be_read_is_a_device_error(machine: SimulatedMachine, td: RuntimeMeasurement) -> None:
    (machine.directory / CCEL_FILE).unlink()
    (machine.directory / CCEL_FILE).mkdir()
    with pytest.raises(DeviceError) as caught:
        td.event_log()
    assert (caught.value.interface, caught.value.call, caught.value.code) == ("event-log", "read", errno.EISDIR)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_event_names_key_model_command_policy_and_evidence_in_canonical_json() -> None:
    claims = TokenClaims(
        nonce=Nonce(bytes(32)),
        tee_pubkey=TeePublicKey(bytes(32), bytes(32)),
        key_uri=Ident("kbs:///a/b/c"),
        policy_version=Ident("7"),
        min_model_version=0,
        lease_s=None,
        simulated=False,
        issued_at=0,
        expires_at=1,
    )
    verdict = Verdict(Ident("r1"), "token-text", claims, ())
    evidence = CompositeEvidence(Evidence(Tee.TDX, b"quote"), "devices")
    sealed = SealedKey(b"jwe-text", Ident("c"), 2)
    event = release_event(verdict, sealed, evidence, "sha256:" + "0" * 64, "sha256:" + "1" * 64, bytes(48))
    assert (event.domain, event.operation) == ("keyturn", "release-key")
    content = json.loads(event.content)
    assert content == {
        "evidence_digest": "sha384:" + hashlib.sha384(b"quote").hexdigest(),
        "key_id": "c",
        "key_uri": "kbs:///a/b/c",
        "key_version": 2,
        "manifest_digest": "sha256:" + "0" * 64,
        "policy_version": "7",
        "server_command_digest": "sha256:" + "1" * 64,
        "statement_digest": "sha384:" + "00" * 48,
    }
    assert event.content == json.dumps(content, separators=(",", ":"), sort_keys=True)
    assert parse_runtime_event(pack_runtime_event(event, 3)) == event


def test_everything_lies_where_the_kernel_and_the_attestation_agent_have_it() -> None:
    assert Path("/sys/firmware/acpi/tables/data/CCEL") == FIRMWARE_LOG
    assert Path("/run/attestation-agent/eventlog") == FOREIGN_LOG
    assert Path("/run/keyturn") == FOLDER
    assert MAX_EVENT_LOG_BYTES == 256 << 10
    snp = RuntimeMeasurement.of(Tee.SNP)
    assert snp.measure(EVENT).unsupported is Unsupported.NO_REGISTER
    if not os.path.exists("/dev/tdx_guest"):
        assert RuntimeMeasurement.of(Tee.TDX).measure(EVENT).unsupported is Unsupported.NO_DRIVER
