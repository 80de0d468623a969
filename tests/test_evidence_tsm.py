import asyncio
import datetime
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from agent.errors import (
    Absence,
    AgentError,
    AttestationKeyLostError,
    DeviceError,
    DeviceUnavailableError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
    Owner,
)
from agent.evidence import NO_REPORT_DATA, Evidence, ReportData, Tee
from agent.evidence.cpu import REQUEST_DISTANCE_S, SNP_PATIENCE, TDX_PATIENCE, Distance, Patience
from agent.evidence.snp_abi import REPORT_BYTES, CertificateKind, parse_report
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES, pack_tdreport
from agent.evidence.tsm import MAX_SNP_BLOB_BYTES, REPORT_ROOT, TsmSnp, TsmTdx
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import make_td_report
from agent.threads import in_thread, pause
from agent.verify.snp import verify_snp
from tests.certificates import pem, table
from tests.children import in_child
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs
from tests.fake_nodes import FakeTdxGuest
from tests.quotes import quote
from tests.shared import shared_data

DATA = ReportData(bytes(range(64)))
OTHER = bytes(reversed(DATA))
SNP_REQUESTS = len(SNP_PATIENCE.pauses_s) + 1
TDX_REQUESTS = len(TDX_PATIENCE.pauses_s) + 1
TDX = Faults(provider="tdx_guest")


@pytest.fixture
def fake(machine: SimulatedMachine, tmp_path: Path) -> Iterator[FakeConfigfs]:
    """A configfs-tsm whose firmware is the simulated machine's. No test leaves a directory in it."""

    def firmware(data: bytes, privlevel: int) -> bytes:
        machine.vmpl = privlevel
        return machine.attester().collect(ReportData(data)).report

    mountpoint = tmp_path / "report"
    mountpoint.mkdir()
    with fake_configfs(mountpoint, firmware) as fake:
        yield fake
        assert os.listdir(fake.root) == []


@pytest.fixture
def fake_tdx(tmp_path: Path) -> Iterator[FakeConfigfs]:
    """The same with a TDX guest's provider, whose quotes nobody signed."""
    mountpoint = tmp_path / "report"
    mountpoint.mkdir()
    with fake_configfs(mountpoint, lambda data, _: quote(data).ljust(8000, b"\0")) as fake:
        fake.set(TDX)
        yield fake
        assert os.listdir(fake.root) == []


def impatient(patience: Patience) -> Patience:
    """As many requests, without the pauses."""
    return replace(patience, pause=lambda _: True)


def opened(fake: FakeConfigfs, faults: Faults) -> TsmSnp:
    """A device that fails from its first request on, and not before."""
    device = TsmSnp(fake.root, impatient(SNP_PATIENCE), Distance(pause=lambda _: True))
    fake.set(faults)
    fake.calls()
    return device


def opened_tdx(fake: FakeConfigfs, faults: Faults = TDX) -> TsmTdx:
    device = TsmTdx(fake.root, impatient(TDX_PATIENCE))
    fake.set(faults)
    fake.calls()
    return device


def refused(kind: type[AgentError], device: TsmSnp | TsmTdx) -> AgentError:
    with pytest.raises(kind) as caught:
        device.collect(DATA)
    assert type(caught.value) is kind
    assert not caught.value.retryable
    return caught.value


def check_device_error(error: AgentError, call: str, code: int) -> None:
    assert isinstance(error, DeviceError)
    assert (error.interface, error.call, error.code) == ("configfs-tsm", call, code)


def check_evidence(evidence: Evidence, machine: SimulatedMachine) -> None:
    """The production verifier takes it, with the chip's certificates of its own."""
    assert evidence.tee is Tee.SNP
    own = machine.attester().collect(DATA).cert_chain
    roots = [x509.load_pem_x509_certificate((machine.roots_dir / "ark.pem").read_bytes())]
    claims = verify_snp(
        Evidence(Tee.SNP, evidence.report, evidence.cert_chain or own), roots, [], datetime.datetime.now(datetime.UTC)
    )
    assert claims.report.report_data == DATA


# --- a request --------------------------------------------------------------------------------------------------------


def test_evidence_verifies_and_took_one_request_in_the_safe_order(fake: FakeConfigfs, machine: SimulatedMachine) -> None:
    device = opened(fake, Faults())
    check_evidence(device.collect(DATA), machine)
    assert fake.calls() == [
        "mkdir", "provider", "generation", "privlevel_floor", "inblob 64",
        "outblob", "firmware", "auxblob", "generation", "rmdir",
    ]  # fmt: skip


def test_host_data_is_a_reports(fake: FakeConfigfs, machine: SimulatedMachine) -> None:
    machine.host_data = bytes(range(32))
    report = machine.attester().collect(NO_REPORT_DATA).report
    assert opened(fake, Faults(report=report)).launch_digest() == machine.host_data
    assert fake.requests() == 1


def test_each_collect_is_a_request_of_its_own(fake: FakeConfigfs) -> None:
    device = opened(fake, Faults())
    first, second = device.collect(DATA), device.collect(ReportData(OTHER))
    assert (parse_report(first.report).report_data, parse_report(second.report).report_data) == (DATA, OTHER)
    assert fake.requests() == 2


def test_the_hosts_certificates_come_with_the_report_leaf_first(fake: FakeConfigfs, machine: SimulatedMachine) -> None:
    vcek, ask, ark = machine.attester().collect(DATA).cert_chain
    auxblob = table((CertificateKind.ARK, ark), (CertificateKind.ASK, pem(ask)), (CertificateKind.VCEK, vcek))
    evidence = opened(fake, Faults(auxblob=auxblob)).collect(DATA)
    assert evidence.cert_chain == (vcek, ask, ark)
    check_evidence(evidence, machine)


def test_a_host_without_certificates_is_no_error(fake: FakeConfigfs) -> None:
    assert opened(fake, Faults()).collect(DATA).cert_chain == ()


def test_a_recorded_certificate_table_is_taken_over(fake: FakeConfigfs) -> None:
    auxblob = shared_data("snp/genoa-v3-vcek-configfs/auxblob.bin").read_bytes()
    vcek = shared_data("snp/genoa-v3-vcek-configfs/vcek.der").read_bytes()
    assert opened(fake, Faults(auxblob=auxblob)).collect(DATA).cert_chain[0] == vcek


def test_a_malformed_certificate_table_stops_although_the_broker_might_do_without(fake: FakeConfigfs) -> None:
    error = refused(MalformedEvidenceError, opened(fake, Faults(auxblob=b"x" * 23)))
    assert isinstance(error, MalformedEvidenceError)
    assert error.format is EvidenceFormat.SNP_CHAIN
    assert fake.requests() == 1


def test_a_guest_below_an_svsm_asks_for_the_lowest_level_it_may(fake: FakeConfigfs) -> None:
    evidence = opened(fake, Faults(privlevel_floor=2)).collect(DATA)
    assert parse_report(evidence.report).vmpl == 2
    assert "privlevel" in fake.calls()


# --- what a device can do wrong ---------------------------------------------------------------------------------------


def test_a_report_over_other_data_is_refused_at_once(fake: FakeConfigfs) -> None:
    refused(EvidenceBindingError, opened(fake, Faults(flip_report_data=True)))
    assert fake.requests() == 1


@pytest.mark.parametrize("size", [0, REPORT_BYTES - 1, REPORT_BYTES + 1, 8000])
def test_what_is_not_a_report_is_refused_at_once(fake: FakeConfigfs, size: int) -> None:
    error = refused(MalformedEvidenceError, opened(fake, Faults(report=bytes(size))))
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.got, error.expected) == (EvidenceFormat.SNP_REPORT, size, REPORT_BYTES)
    assert fake.requests() == 1


@pytest.mark.parametrize("blob", ["report", "auxblob"])
def test_a_blob_of_any_size_is_read_to_a_bound(fake: FakeConfigfs, blob: str) -> None:
    device = opened(fake, Faults(max_blob_bytes=16 << 20, **{blob: bytes(100_000)}))  # type: ignore[arg-type]
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert error.got == MAX_SNP_BLOB_BYTES + 1


def test_a_blob_that_the_kernel_refuses_is_a_device_error(fake: FakeConfigfs) -> None:
    error = refused(DeviceError, opened(fake, Faults(report=bytes(40_000))))
    check_device_error(error, "outblob", errno.EFBIG)


@pytest.mark.parametrize("name", ["generation", "privlevel_floor"])
@pytest.mark.parametrize("text", [b"", b"\n", b"-1\n", b"0x1\n", b"1" * 21 + b"\n", b"1 \n", b"1" * 5000])
def test_a_number_that_is_none_is_refused(fake: FakeConfigfs, name: str, text: bytes) -> None:
    error = refused(MalformedEvidenceError, opened(fake, Faults(texts=((name, text),))))
    assert isinstance(error, MalformedEvidenceError)
    assert error.field == name


ALWAYS = 9
"""More often than anybody asks."""


@dataclass(frozen=True)
class Row:
    """What one errno of a blob's read means: the error, and after how many requests."""

    code: int
    kind: type[AgentError]
    requests: int


SNP_ROWS = [
    Row(errno.EINVAL, DeviceError, 1),
    Row(errno.EBUSY, DeviceUnavailableError, SNP_REQUESTS),
    Row(errno.EWOULDBLOCK, DeviceUnavailableError, SNP_REQUESTS),
    Row(errno.ENXIO, DeviceError, 1),
    Row(errno.ENOENT, DeviceUnavailableError, SNP_REQUESTS),
    Row(errno.EIO, AttestationKeyLostError, 1),
    Row(errno.ETIMEDOUT, AttestationKeyLostError, 1),
    Row(errno.ENOTTY, AttestationKeyLostError, 1),
    Row(errno.EBADMSG, AttestationKeyLostError, 1),
    Row(errno.EFBIG, DeviceError, 1),
    Row(errno.ENOMEM, DeviceUnavailableError, SNP_REQUESTS),
    Row(errno.EPERM, DeviceError, 1),
]
TDX_ROWS = [
    Row(errno.EINVAL, DeviceError, 1),
    Row(errno.EBUSY, DeviceUnavailableError, TDX_REQUESTS),
    Row(errno.EWOULDBLOCK, DeviceUnavailableError, TDX_REQUESTS),
    Row(errno.ENXIO, DeviceError, 1),
    Row(errno.ENOENT, DeviceUnavailableError, TDX_REQUESTS),
    Row(errno.EIO, DeviceUnavailableError, TDX_REQUESTS),
    Row(errno.ETIMEDOUT, DeviceUnavailableError, TDX_REQUESTS),
    Row(errno.ENOTTY, DeviceError, 1),
    Row(errno.EBADMSG, DeviceError, 1),
    Row(errno.EFBIG, DeviceError, 1),
    Row(errno.ENOMEM, DeviceUnavailableError, TDX_REQUESTS),
]


def row_id(row: Row) -> str:
    return errno.errorcode[row.code]


@pytest.mark.parametrize("row", SNP_ROWS, ids=row_id)
@pytest.mark.parametrize("call", ["outblob", "auxblob"])
def test_what_an_errno_of_snp_means(fake: FakeConfigfs, call: str, row: Row) -> None:
    error = refused(row.kind, opened(fake, Faults(errors=((call, row.code),) * ALWAYS)))
    check_device_error(error, call, row.code)
    assert (error.owner, error.exit_status) == (Owner.HOST, 12)
    assert fake.calls().count("mkdir") == row.requests


@pytest.mark.parametrize("row", TDX_ROWS, ids=row_id)
def test_what_an_errno_of_tdx_means(fake_tdx: FakeConfigfs, row: Row) -> None:
    error = refused(row.kind, opened_tdx(fake_tdx, replace(TDX, errors=(("outblob", row.code),) * ALWAYS)))
    check_device_error(error, "outblob", row.code)
    assert (error.owner, error.exit_status) == (Owner.HOST, 12)
    assert fake_tdx.calls().count("mkdir") == row.requests


@pytest.mark.parametrize("row", [row for row in SNP_ROWS if row.requests == 1], ids=row_id)
def test_a_firmware_that_failed_is_never_asked_again(fake: FakeConfigfs, row: Row) -> None:
    refused(row.kind, opened(fake, Faults(errors=(("firmware", row.code),))))
    assert fake.requests() == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTTY, errno.EBADMSG, errno.ETIMEDOUT])
def test_the_key_is_not_lost_where_no_firmware_was_asked(fake: FakeConfigfs, code: int) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(errors=(("generation", code),)))), "generation", code)


@pytest.mark.parametrize("call", ["mkdir", "provider", "generation", "privlevel_floor", "outblob", "auxblob"])
def test_every_call_that_fails_is_named(fake: FakeConfigfs, call: str) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(errors=((call, errno.EPERM),)))), call, errno.EPERM)


def test_a_privilege_level_that_the_kernel_refuses_is_final(fake: FakeConfigfs) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(privlevel_floor=4))), "privlevel", errno.EINVAL)
    assert fake.requests() == 0


def test_data_the_kernel_silently_does_not_take_over_gives_no_evidence(fake: FakeConfigfs) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(lose_inblob=True))), "outblob", errno.EINVAL)
    assert fake.requests() == 0


# --- starting over ----------------------------------------------------------------------------------------------------

INTERFERENCE = [
    ("mkdir", errno.EEXIST),
    ("provider", errno.ENOENT),
    ("generation", errno.ENOENT),
    ("outblob", errno.ENOENT),
    ("outblob", errno.EBUSY),
    ("outblob", errno.EWOULDBLOCK),
    ("auxblob", errno.EWOULDBLOCK),
]


@pytest.mark.parametrize(("call", "code"), INTERFERENCE)
def test_a_request_that_was_interfered_with_starts_over(
    fake: FakeConfigfs, machine: SimulatedMachine, call: str, code: int
) -> None:
    device = opened(fake, Faults(errors=((call, code),) * (SNP_REQUESTS - 1)))
    check_evidence(device.collect(DATA), machine)
    assert fake.calls().count("mkdir") == SNP_REQUESTS


@pytest.mark.parametrize(("call", "code"), INTERFERENCE)
def test_starting_over_ends(fake: FakeConfigfs, call: str, code: int) -> None:
    device = opened(fake, Faults(errors=((call, code),) * ALWAYS))
    check_device_error(refused(DeviceUnavailableError, device), call, code)
    assert fake.calls().count("mkdir") == SNP_REQUESTS


@pytest.mark.parametrize("inblob", [pytest.param(bytes(DATA), id="the-same-data"), pytest.param(OTHER, id="other-data")])
def test_a_report_after_somebody_elses_write_is_not_taken(fake: FakeConfigfs, machine: SimulatedMachine, inblob: bytes) -> None:
    device = opened(fake, Faults(intruders=(inblob,)))
    check_evidence(device.collect(DATA), machine)
    assert fake.requests() == 2


def test_somebody_else_who_always_writes_is_told_as_a_stale_generation(fake: FakeConfigfs) -> None:
    error = refused(DeviceUnavailableError, opened(fake, Faults(intruders=(OTHER,) * ALWAYS)))
    check_device_error(error, "generation", errno.EWOULDBLOCK)


# --- distance ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only in pauses."""

    def __init__(self) -> None:
        self.time = 50.0
        self.pauses: list[float] = []
        self.wanted = True

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.time += seconds
        return self.wanted


def test_requests_keep_their_distance_whatever_came_of_the_one_before(fake: FakeConfigfs) -> None:
    clock = Clock()
    patience = replace(SNP_PATIENCE, now=clock.now, pause=clock.pause)
    device = TsmSnp(fake.root, patience, Distance(clock.now, clock.pause))
    fake.calls()
    device.launch_digest()  # as a boot does first of all
    clock.time += 0.5
    device.collect(DATA)
    assert clock.pauses == [REQUEST_DISTANCE_S - 0.5]
    fake.set(Faults(errors=(("outblob", errno.EINVAL),)))
    refused(DeviceError, device)
    device.collect(DATA)
    assert clock.pauses[1:] == [REQUEST_DISTANCE_S] * 2
    clock.time += REQUEST_DISTANCE_S
    device.collect(DATA)
    assert len(clock.pauses) == 3


def test_a_request_that_is_made_again_keeps_it_too(fake: FakeConfigfs) -> None:
    clock = Clock()
    device = TsmSnp(fake.root, replace(SNP_PATIENCE, now=clock.now, pause=clock.pause), Distance(clock.now, clock.pause))
    fake.set(Faults(errors=(("outblob", errno.EBUSY),)))
    device.collect(DATA)
    assert clock.pauses == [REQUEST_DISTANCE_S]


def test_nothing_more_is_asked_when_nobody_wants_the_answer(fake: FakeConfigfs) -> None:
    clock = Clock()
    device = TsmSnp(fake.root, SNP_PATIENCE, Distance(clock.now, clock.pause))
    device.collect(DATA)
    clock.wanted = False
    fake.calls()
    check_device_error(refused(DeviceError, device), "outblob", errno.ECANCELED)
    assert fake.calls() == []


# --- TDX --------------------------------------------------------------------------------------------------------------


def test_a_tdx_quote_took_one_request_in_the_safe_order_and_lost_its_padding(fake_tdx: FakeConfigfs) -> None:
    evidence = opened_tdx(fake_tdx).collect(DATA)
    assert evidence == Evidence(Tee.TDX, quote(DATA))
    assert fake_tdx.calls() == [
        "mkdir", "provider", "generation", "inblob 64", "outblob", "firmware", "generation", "rmdir",
    ]  # fmt: skip


def test_mrconfigid_is_the_modules_word_and_no_quote_is_made(
    fake_tdx: FakeConfigfs, tmp_path: Path, machine: SimulatedMachine
) -> None:
    (tmp_path / "tdx_guest").touch()
    module = FakeTdxGuest()
    machine.host_data = bytes(range(48))
    module.report = pack_tdreport(make_td_report(machine, NO_REPORT_DATA))
    device = TsmTdx(fake_tdx.root, device=tmp_path / "tdx_guest", ioctl=module.ioctl)
    assert device.launch_digest() == bytes(range(48))
    assert fake_tdx.requests() == 0


def test_without_the_device_node_nobody_says_mrconfigid(fake_tdx: FakeConfigfs, tmp_path: Path) -> None:
    with pytest.raises(NoAttesterError):
        TsmTdx(fake_tdx.root, device=tmp_path / "tdx_guest").launch_digest()


def test_a_quote_service_that_comes_back_gives_a_quote(fake_tdx: FakeConfigfs) -> None:
    codes = (errno.EIO, errno.ETIMEDOUT, errno.EBUSY)
    device = opened_tdx(fake_tdx, replace(TDX, errors=tuple(("firmware", code) for code in codes)))
    assert device.collect(DATA).report == quote(DATA)
    assert fake_tdx.calls().count("mkdir") == TDX_REQUESTS


def test_an_empty_quote_is_a_failure_of_the_host(fake_tdx: FakeConfigfs) -> None:
    """Kernels before January 2026 say nothing else when the quote service fails."""
    error = refused(DeviceUnavailableError, opened_tdx(fake_tdx, replace(TDX, report=b"")))
    check_device_error(error, "outblob", errno.ENODATA)
    assert fake_tdx.requests() == TDX_REQUESTS


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("mkdir", errno.EEXIST),
        ("provider", errno.ENOENT),
        ("generation", errno.ENOENT),
        ("outblob", errno.ENOENT),
        ("outblob", errno.EWOULDBLOCK),
        ("outblob", errno.ENOMEM),
    ],
)
def test_a_quote_that_was_interfered_with_starts_over_and_that_ends(fake_tdx: FakeConfigfs, call: str, code: int) -> None:
    device = opened_tdx(fake_tdx, replace(TDX, errors=((call, code),) * (TDX_REQUESTS - 1)))
    assert device.collect(DATA).report == quote(DATA)
    assert fake_tdx.calls().count("mkdir") == TDX_REQUESTS
    fake_tdx.set(replace(TDX, errors=((call, code),) * ALWAYS))
    check_device_error(refused(DeviceUnavailableError, device), call, code)
    assert fake_tdx.calls().count("mkdir") == TDX_REQUESTS


@pytest.mark.parametrize("call", ["mkdir", "provider", "generation", "outblob"])
def test_every_call_of_a_tdx_guest_that_fails_is_named_and_final(fake_tdx: FakeConfigfs, call: str) -> None:
    device = opened_tdx(fake_tdx, replace(TDX, errors=((call, errno.EPERM),)))
    check_device_error(refused(DeviceError, device), call, errno.EPERM)
    assert fake_tdx.calls().count("mkdir") == 1


def test_an_interrupted_read_is_repeated_by_the_interpreter(fake_tdx: FakeConfigfs) -> None:
    device = opened_tdx(fake_tdx, replace(TDX, errors=(("firmware", errno.EINTR),)))
    assert device.collect(DATA).report == quote(DATA)
    calls = fake_tdx.calls()
    assert (calls.count("mkdir"), calls.count("firmware")) == (1, 2)


def test_a_quote_over_other_data_is_refused_at_once(fake_tdx: FakeConfigfs) -> None:
    refused(EvidenceBindingError, opened_tdx(fake_tdx, replace(TDX, flip_report_data=True)))
    assert fake_tdx.requests() == 1


def test_a_quote_after_somebody_elses_write_is_not_taken(fake_tdx: FakeConfigfs) -> None:
    assert opened_tdx(fake_tdx, replace(TDX, intruders=(bytes(DATA),))).collect(DATA).report == quote(DATA)
    assert fake_tdx.requests() == 2


def test_a_quote_of_any_size_is_read_to_a_bound(fake_tdx: FakeConfigfs) -> None:
    large = quote(DATA, signature=b"s" * 100_000)
    device = opened_tdx(fake_tdx, replace(TDX, report=large, max_blob_bytes=16 << 20))
    assert device.collect(DATA).report == large
    fake_tdx.set(replace(TDX, report=bytes(200_000), max_blob_bytes=16 << 20))
    error = refused(MalformedEvidenceError, device)
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.got) == (EvidenceFormat.TDX_QUOTE, MAX_QUOTE_BYTES + 1)


def test_a_generation_that_is_no_number_is_named_as_the_quotes(fake_tdx: FakeConfigfs) -> None:
    error = refused(MalformedEvidenceError, opened_tdx(fake_tdx, replace(TDX, texts=(("generation", b"-1\n"),))))
    assert isinstance(error, MalformedEvidenceError)
    assert (error.format, error.field) == (EvidenceFormat.TDX_QUOTE, "generation")


# --- an end in the middle of it ---------------------------------------------------------------------------------------


def sigterm_in_the_middle(device: TsmSnp | TsmTdx) -> tuple[str, float]:
    """What a worker does that gets SIGTERM 0.3 s after it asked: how its request ended, and when."""

    async def story() -> str:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            await in_thread(lambda: device.collect(DATA))
        except asyncio.CancelledError:
            return "cancelled"
        return "collected"

    began = time.monotonic()
    return asyncio.run(story()), time.monotonic() - began


def test_sigterm_in_mid_request_waits_for_the_firmware_and_cuts_nothing_short(fake: FakeConfigfs) -> None:
    device = opened(fake, Faults(delay_s=1.5))
    how, seconds = in_child(lambda: sigterm_in_the_middle(device))
    assert how == "cancelled"
    assert 1.4 < seconds < 20
    assert fake.calls()[-4:] == ["firmware", "auxblob", "generation", "rmdir"], "the request was followed to its end"


def test_sigterm_between_two_requests_begins_no_other(fake_tdx: FakeConfigfs) -> None:
    device = TsmTdx(fake_tdx.root, replace(TDX_PATIENCE, pauses_s=(30.0,), pause=pause))
    fake_tdx.set(replace(TDX, errors=(("firmware", errno.EIO),)))
    fake_tdx.calls()
    how, seconds = in_child(lambda: sigterm_in_the_middle(device))
    assert how == "cancelled"
    assert seconds < 20
    assert fake_tdx.calls().count("mkdir") == 1


# --- which devices there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [None, "tdx_guest", "arm_cca_guest", "sev_guest2"])
def test_another_provider_or_none_is_no_attester(fake: FakeConfigfs, provider: str | None) -> None:
    fake.set(Faults(provider=provider))
    with pytest.raises(NoAttesterError) as caught:
        TsmSnp(fake.root)
    assert caught.value.attester == "snp"
    assert (caught.value.reason is Absence.OTHER_TEE) == (provider == "tdx_guest")
    assert (caught.value.owner, caught.value.exit_status) == (Owner.OPERATOR, 11)


@pytest.mark.parametrize("provider", [None, "sev_guest", "tdx_guest2"])
def test_another_provider_or_none_is_no_tdx_attester(fake_tdx: FakeConfigfs, provider: str | None) -> None:
    fake_tdx.set(Faults(provider=provider))
    with pytest.raises(NoAttesterError) as caught:
        TsmTdx(fake_tdx.root)
    assert caught.value.attester == "tdx"


def test_a_provider_that_goes_away_later_is_no_attester(fake: FakeConfigfs) -> None:
    refused(NoAttesterError, opened(fake, Faults(provider=None)))
    assert fake.requests() == 0


def test_opening_asks_the_firmware_nothing(fake: FakeConfigfs) -> None:
    TsmSnp(fake.root)
    assert fake.calls() == ["mkdir", "provider", "rmdir"]


def test_the_interface_is_where_the_kernel_has_it() -> None:
    assert Path("/sys/kernel/config/tsm/report") == REPORT_ROOT


def test_a_guest_without_configfs_tsm_has_no_attester(tmp_path: Path) -> None:
    with pytest.raises(NoAttesterError) as caught:
        TsmSnp(tmp_path / "report")
    assert caught.value.attester == "snp"


def test_a_folder_that_is_no_configfs_is_a_device_error_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        TsmSnp(tmp_path)
    check_device_error(caught.value, "provider", errno.ENOENT)
    assert os.listdir(tmp_path) == []


def test_a_root_that_is_no_folder_is_a_device_error(tmp_path: Path) -> None:
    (tmp_path / "report").touch()
    with pytest.raises(DeviceError) as caught:
        TsmSnp(tmp_path / "report")
    check_device_error(caught.value, "mkdir", errno.ENOTDIR)
