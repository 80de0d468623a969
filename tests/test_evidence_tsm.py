import datetime
import errno
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import (
    AgentError,
    DeviceError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.snp_abi import REPORT_BYTES, CertificateKind, parse_report
from agent.evidence.tsm import MAX_BLOB_BYTES, MAX_TRIES, REPORT_ROOT, TsmSnp, certificate_chain
from agent.sim.machine import SimulatedMachine
from agent.verify.snp import verify_snp
from tests.fake_configfs import FakeConfigfs, Faults, fake_configfs
from tests.shared import shared_data

DATA = ReportData(bytes(range(64)))
OTHER = bytes(reversed(DATA))


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


def opened(fake: FakeConfigfs, faults: Faults) -> TsmSnp:
    """A device that fails from its first request on, and not before."""
    device = TsmSnp(fake.root)
    fake.set(faults)
    fake.calls()
    return device


def refused(kind: type[AgentError], device: TsmSnp) -> AgentError:
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


def table(*entries: tuple[CertificateKind, bytes]) -> bytes:
    offset = 24 * (len(entries) + 1)
    head = b""
    for kind, data in entries:
        head += kind.value.bytes + struct.pack("<II", offset, len(data))
        offset += len(data)
    return head + bytes(24) + b"".join(data for _, data in entries)


def pem(*chain: bytes) -> bytes:
    with warnings.catch_warnings():  # AMD's serial number 0
        warnings.simplefilter("ignore")
        return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in chain)


# --- a request --------------------------------------------------------------------------------------------------------


def test_evidence_verifies_and_took_one_request_in_the_safe_order(fake: FakeConfigfs, machine: SimulatedMachine) -> None:
    device = opened(fake, Faults())
    check_evidence(device.collect(DATA), machine)
    assert fake.calls() == [
        "mkdir", "provider", "generation", "privlevel_floor", "inblob 64",
        "outblob", "firmware", "auxblob", "generation", "rmdir",
    ]  # fmt: skip


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
    assert error.got == MAX_BLOB_BYTES + 1


def test_a_blob_that_the_kernel_refuses_is_a_device_error(fake: FakeConfigfs) -> None:
    error = refused(DeviceError, opened(fake, Faults(report=bytes(40_000))))
    check_device_error(error, "outblob", errno.EFBIG)


@pytest.mark.parametrize("name", ["generation", "privlevel_floor"])
@pytest.mark.parametrize("text", [b"", b"\n", b"-1\n", b"0x1\n", b"1" * 21 + b"\n", b"1 \n", b"1" * 5000])
def test_a_number_that_is_none_is_refused(fake: FakeConfigfs, name: str, text: bytes) -> None:
    error = refused(MalformedEvidenceError, opened(fake, Faults(texts=((name, text),))))
    assert isinstance(error, MalformedEvidenceError)
    assert error.field == name


@pytest.mark.parametrize(
    "code",
    [
        errno.EINVAL,
        errno.EIO,
        errno.ENOTTY,
        errno.EBADMSG,
        errno.ETIMEDOUT,
        errno.ENXIO,
        errno.EFBIG,
        errno.ENOMEM,
        errno.EPERM,
    ],
)
def test_a_firmware_that_failed_is_never_asked_again(fake: FakeConfigfs, code: int) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(errors=(("firmware", code),)))), "outblob", code)
    assert fake.requests() == 1


@pytest.mark.parametrize("call", ["mkdir", "provider", "generation", "privlevel_floor", "outblob", "auxblob"])
def test_every_call_that_fails_is_named(fake: FakeConfigfs, call: str) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(errors=((call, errno.EIO),)))), call, errno.EIO)


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
    device = opened(fake, Faults(errors=((call, code),) * (MAX_TRIES - 1)))
    check_evidence(device.collect(DATA), machine)
    assert fake.calls().count("mkdir") == MAX_TRIES


@pytest.mark.parametrize(("call", "code"), INTERFERENCE)
def test_starting_over_ends(fake: FakeConfigfs, call: str, code: int) -> None:
    check_device_error(refused(DeviceError, opened(fake, Faults(errors=((call, code),) * MAX_TRIES))), call, code)
    assert fake.calls().count("mkdir") == MAX_TRIES


@pytest.mark.parametrize("inblob", [pytest.param(bytes(DATA), id="the-same-data"), pytest.param(OTHER, id="other-data")])
def test_a_report_after_somebody_elses_write_is_not_taken(fake: FakeConfigfs, machine: SimulatedMachine, inblob: bytes) -> None:
    device = opened(fake, Faults(intruders=(inblob,)))
    check_evidence(device.collect(DATA), machine)
    assert fake.requests() == 2


def test_somebody_else_who_always_writes_is_told_as_a_stale_generation(fake: FakeConfigfs) -> None:
    error = refused(DeviceError, opened(fake, Faults(intruders=(OTHER,) * 2 * MAX_TRIES)))
    check_device_error(error, "generation", errno.EWOULDBLOCK)


# --- which devices there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [None, "tdx_guest", "arm_cca_guest", "sev_guest2"])
def test_another_provider_or_none_is_no_attester(fake: FakeConfigfs, provider: str | None) -> None:
    fake.set(Faults(provider=provider))
    with pytest.raises(NoAttesterError) as caught:
        TsmSnp(fake.root)
    assert caught.value.attester == "snp"


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


# --- certificates of the host -----------------------------------------------------------------------------------------


def test_certificates_are_der_and_leaf_first_whatever_the_host_chose(machine: SimulatedMachine) -> None:
    vcek, ask, ark = machine.attester().collect(DATA).cert_chain
    for encode in (bytes, pem):
        entries = (CertificateKind.ASK, encode(ask)), (CertificateKind.ARK, encode(ark)), (CertificateKind.VCEK, encode(vcek))
        assert certificate_chain(table(*entries)) == (vcek, ask, ark)
    assert certificate_chain(table((CertificateKind.ASK, pem(ask, ark)), (CertificateKind.VLEK, vcek))) == (vcek, ask, ark)


def test_a_revocation_list_is_not_a_certificate(machine: SimulatedMachine) -> None:
    vcek = machine.attester().collect(DATA).cert_chain[0]
    assert certificate_chain(table((CertificateKind.CRL, b"whatever"), (CertificateKind.VCEK, vcek))) == (vcek,)


def test_the_recorded_table_and_report_verify_together() -> None:
    chain = certificate_chain(shared_data("snp/genoa-v3-vcek-configfs/auxblob.bin").read_bytes())
    report = shared_data("snp/genoa-v3-vcek-configfs/report.bin").read_bytes()
    assert len(chain) == 3
    assert not verify_snp(
        Evidence(Tee.SNP, report, chain), [], [], datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ).simulated


def test_a_host_without_certificates_has_an_empty_chain() -> None:
    assert certificate_chain(b"") == certificate_chain(table()) == ()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda der: der[:-1],
    "padded": lambda der: der + b"\0",
    "text": lambda _: b"certificate",
    "pem-without-end": lambda der: pem(der).replace(b"-----END", b"-----ENX"),
    "pem-of-a-key": lambda der: pem(der).replace(b"CERTIFICATE", b"PRIVATE KEY"),
    "pem-with-bad-base64": lambda der: pem(der).replace(b"\n-----END", b"A\n-----END"),
    "pem-with-a-tail": lambda der: pem(der) + b"\0",
    "pem-of-something-else": lambda _: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_certificate_that_is_none_is_refused(machine: SimulatedMachine, defect: str) -> None:
    broken = BROKEN[defect](machine.attester().collect(DATA).cert_chain[0])
    with pytest.raises(MalformedEvidenceError) as caught:
        certificate_chain(table((CertificateKind.VCEK, broken)))
    assert caught.value.format is EvidenceFormat.SNP_CHAIN


@given(st.lists(st.sampled_from([b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"\n", b"AAA=", b"-", b"\0"])))
def test_no_certificate_ends_in_a_foreign_exception(parts: list[bytes]) -> None:
    with pytest.raises(MalformedEvidenceError):
        certificate_chain(table((CertificateKind.VCEK, b"".join(parts))))


# --- the fake against the kernel --------------------------------------------------------------------------------------


class Probe:
    """The steps of the recorded run that the fake models, in its order; each gives the text the record has for it."""

    def __init__(self, fake: FakeConfigfs) -> None:
        self.fake = fake
        self.entry = fake.root / "entry"

    def read(self, name: str) -> bytes:
        return (self.entry / name).read_bytes()

    def write(self, name: str, *parts: bytes) -> int:
        descriptor = os.open(self.entry / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            return sum(os.write(descriptor, part) for part in parts)
        finally:
            os.close(descriptor)

    def attributes(self) -> list[tuple[str, str, int]]:
        found = ((name, (self.entry / name).stat()) for name in sorted(os.listdir(self.entry)))
        return [(name, oct(status.st_mode), status.st_size) for name, status in found]

    def blob(self) -> tuple[int, bytes]:
        return len(self.read("outblob")), self.read("outblob")[:4]

    def twice(self) -> tuple[int, int, int, None]:
        descriptor = os.open(self.entry / "outblob", os.O_RDONLY)
        try:
            first, second, third = (len(os.read(descriptor, size)) for size in (64, 4096, 4096))
            return first, second, third, None
        finally:
            os.close(descriptor)

    def seek(self) -> None:
        descriptor = os.open(self.entry / "outblob", os.O_RDONLY)
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
        finally:
            os.close(descriptor)

    def failing(self, code: int) -> bytes:
        self.fake.set(Faults(report=b"A" * 600, errors=(("firmware", code),)))
        return self.read("outblob")

    def answering(self, size: int) -> bytes:
        self.fake.set(Faults(report=b"A" * size))
        self.write("inblob", bytes(64))
        return self.read("outblob")

    def remove_below_an_open_file(self) -> None:
        self.open = os.open(self.entry / "generation", os.O_RDONLY)
        self.entry.rmdir()

    def read_the_removed(self) -> None:
        try:
            os.read(self.open, 64)
        finally:
            os.close(self.open)

    def mkdir_without_a_provider(self) -> None:
        self.fake.set(Faults(provider=None))
        self.entry.mkdir()

    def mkdir(self) -> None:
        self.fake.set(Faults(report=b"A" * 600))
        self.entry.mkdir()

    def provider_gone(self) -> bytes:
        self.fake.set(Faults())
        self.entry.mkdir()
        self.fake.set(Faults(provider=None))
        return self.read("provider")

    def steps(self) -> list[tuple[str, Callable[[], object]]]:
        def written(data: bytes) -> Callable[[], object]:
            return lambda: self.write("inblob", data)

        def level(data: bytes) -> tuple[str, Callable[[], object]]:
            return f"write privlevel {data!r}", lambda: self.write("privlevel", data)

        def failing(code: int) -> tuple[str, Callable[[], object]]:
            return f"outblob, provider returns {errno.errorcode[code]}", lambda: self.failing(code)

        def generation() -> object:
            return self.read("generation")

        def outblob() -> object:
            return self.read("outblob")

        return [
            ("mkdir without provider", self.mkdir_without_a_provider),
            ("mkdir", self.mkdir),
            ("mkdir again", self.entry.mkdir),
            ("provider", lambda: self.read("provider")),
            ("generation", generation),
            ("outblob before inblob", outblob),
            ("inblob 64 via open(wb)", lambda: (self.entry / "inblob").write_bytes(bytes(64))),
            ("generation", generation),
            ("outblob", self.blob),
            ("inblob 65", written(bytes(65))),
            ("generation after 65", generation),
            ("outblob after 65", outblob),
            ("inblob 10", written(bytes(10))),
            ("generation", generation),
            ("outblob after short inblob", outblob),
            ("inblob empty (open/close no write)", lambda: self.write("inblob")),
            ("generation", generation),
            ("inblob 64", written(bytes(64))),
            ("4x16 writes, one close", lambda: ("gen before close", generation(), self.write("inblob", *[bytes(16)] * 4))[:2]),
            ("O_RDONLY inblob", lambda: self.read("inblob")),
            ("O_WRONLY outblob", lambda: self.write("outblob")),
            ("read outblob twice same fd", self.twice),
            ("lseek outblob", self.seek),
            *map(level, (b"0", b"3\n", b"4", b"\0", b"x")),
            *map(failing, (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTTY)),
            ("outblob again same generation after failure", lambda: len(self.read("outblob"))),
            ("outblob, provider ok with 0 bytes", lambda: self.answering(0)),
            ("auxblob (none)", lambda: self.read("auxblob")),
            ("outblob 40000 bytes", lambda: self.answering(40_000)),
            ("rmdir with open fd", self.remove_below_an_open_file),
            ("read after rmdir", self.read_the_removed),
            ("provider after rmmod", self.provider_gone),
            ("outblob after rmmod", outblob),
            ("generation after rmmod", generation),
            ("rmdir", self.entry.rmdir),
        ]


def test_the_fake_behaves_like_the_recorded_kernel(fake: FakeConfigfs) -> None:
    record = iter(shared_data("configfs-tsm-linux6.12-behaviour.txt").read_text().splitlines())
    for step, act in Probe(fake).steps():
        try:
            outcome = str(act())
        except OSError as exc:
            outcome = f"errno {errno.errorcode[exc.errno or 0]}"
        recorded = next(match[1] for line in record if (match := re.match(rf"{re.escape(step)}\s\s+(.*)  \(\d", line)))
        if outcome.startswith("("):  # of a tuple the record may say more
            assert recorded.startswith(outcome.rstrip(")")), step
        else:
            assert outcome == recorded, step


def test_the_fakes_attributes_are_a_kernels_without_svsm(fake: FakeConfigfs) -> None:
    record = shared_data("configfs-tsm-linux6.12-behaviour.txt").read_text()
    recorded = next(line for line in record.splitlines() if line.startswith("[("))
    probe = Probe(fake)
    probe.mkdir()
    attributes = probe.attributes()
    assert len(attributes) == 7
    assert all(str(attribute) in recorded for attribute in attributes)
    with pytest.raises(PermissionError):
        (probe.entry / "outblob").unlink()
    probe.entry.rmdir()
