import datetime
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import (
    DeviceError,
    DeviceUnavailableError,
    EvidenceBindingError,
    EvidenceFormat,
    MalformedEvidenceError,
)
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.cpu import (
    SNP_PATIENCE,
    TDX_PATIENCE,
    Patience,
    certificate_chain,
    snp_evidence,
    tdx_evidence,
)
from agent.evidence.snp_abi import CertificateKind
from agent.evidence.tdx_abi import MAX_QUOTE_BYTES
from agent.sim.machine import SimulatedMachine
from agent.verify.snp import verify_snp
from tests.certificates import pem, table
from tests.quotes import BODY_1_0_BYTES, HEADER_BYTES, quote
from tests.shared import shared_data

DATA = ReportData(bytes(range(64)))
OTHER = ReportData(bytes(reversed(DATA)))

# --- asking -----------------------------------------------------------------------------------------------------------


class Device:
    """Answers what it is told to, each answer after some seconds of a clock of its own."""

    def __init__(self, *answers: object, takes_s: float = 0.0, wanted: bool = True) -> None:
        self.answers = list(answers)
        self.takes_s = takes_s
        self.wanted = wanted
        self.time = 1000.0
        self.pauses: list[float] = []

    def request(self) -> object:
        self.time += self.takes_s
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.time += seconds
        return self.wanted

    def ask(self, patience: Patience) -> object:
        return Patience(patience.pauses_s, patience.within_s, lambda: self.time, self.pause).ask(self.request)


def unavailable(code: int) -> DeviceUnavailableError:
    return DeviceUnavailableError(Ident("device"), Ident("call"), code)


def test_a_first_answer_needs_no_patience() -> None:
    device = Device(b"report")
    assert device.ask(SNP_PATIENCE) == b"report"
    assert device.pauses == []


@pytest.mark.parametrize(("patience", "pauses"), [(SNP_PATIENCE, [2, 2]), (TDX_PATIENCE, [2, 5, 10])])
def test_a_device_that_cannot_answer_now_is_asked_again_after_growing_pauses(patience: Patience, pauses: list[float]) -> None:
    device = Device(*map(unavailable, range(len(pauses))), b"report")
    assert device.ask(patience) == b"report"
    assert device.pauses == pauses


@pytest.mark.parametrize("patience", [SNP_PATIENCE, TDX_PATIENCE])
def test_patience_ends_with_the_last_answer(patience: Patience) -> None:
    requests = len(patience.pauses_s) + 1
    device = Device(*map(unavailable, range(requests)), b"too late")
    with pytest.raises(DeviceUnavailableError) as caught:
        device.ask(patience)
    assert caught.value.code == requests - 1
    assert device.answers == [b"too late"]


def test_a_refusal_is_final() -> None:
    device = Device(DeviceError(Ident("device"), Ident("call"), 22), b"never asked for")
    with pytest.raises(DeviceError):
        device.ask(TDX_PATIENCE)
    assert len(device.answers) == 1


@pytest.mark.parametrize(("takes_s", "requests"), [(30.0, 3), (34.0, 3), (106.0, 1)])
def test_no_request_is_begun_after_the_deadline_and_none_is_cut_short(takes_s: float, requests: int) -> None:
    device = Device(*map(unavailable, range(9)), takes_s=takes_s)
    with pytest.raises(DeviceUnavailableError):
        device.ask(TDX_PATIENCE)
    assert 9 - len(device.answers) == requests
    assert device.time >= 1000 + requests * takes_s


def test_nothing_more_is_begun_when_nobody_wants_the_answer() -> None:
    device = Device(unavailable(16), b"never asked for", wanted=False)
    with pytest.raises(DeviceUnavailableError):
        device.ask(TDX_PATIENCE)
    assert device.answers == [b"never asked for"]


# --- TDX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("tail", [b"", bytes(3000), b"memory of somebody else"])
def test_a_quote_is_cut_where_it_ends(version: int, tail: bytes) -> None:
    whole = quote(DATA, version)
    assert tdx_evidence(whole + tail, DATA) == Evidence(Tee.TDX, whole)


@pytest.mark.parametrize("version", [4, 5])
def test_a_quote_over_other_data_is_refused(version: int) -> None:
    with pytest.raises(EvidenceBindingError) as caught:
        tdx_evidence(quote(OTHER, version), DATA)
    assert caught.value.format is EvidenceFormat.TDX_QUOTE


@pytest.mark.parametrize("version", [4, 5])
def test_a_quote_cut_anywhere_is_refused(version: int) -> None:
    whole = quote(DATA, version, b"signature")
    for length in range(len(whole)):
        with pytest.raises(MalformedEvidenceError) as caught:
            tdx_evidence(whole[:length], DATA)
        assert caught.value.format is EvidenceFormat.TDX_QUOTE


@pytest.mark.parametrize("size", [0, 7, MAX_QUOTE_BYTES + 1])
def test_a_blob_of_a_length_no_quote_has_is_refused(size: int) -> None:
    with pytest.raises(MalformedEvidenceError):
        tdx_evidence(quote(DATA).ljust(size, b"\0")[:size], DATA)


@pytest.mark.parametrize("version", [0, 1, 3, 6, 0xFFFF])
def test_a_quote_of_another_version_is_refused(version: int) -> None:
    with pytest.raises(MalformedEvidenceError) as caught:
        tdx_evidence(struct.pack("<H", version) + quote(DATA)[2:], DATA)
    assert (caught.value.field, caught.value.got) == ("version", version)


@pytest.mark.parametrize("size", [0, BODY_1_0_BYTES - 1, 0xFFFF_FFFF])
def test_the_body_size_of_version_5_cannot_lead_elsewhere(size: int) -> None:
    whole = quote(DATA, 5)
    with pytest.raises((MalformedEvidenceError, EvidenceBindingError)):
        tdx_evidence(whole[: HEADER_BYTES + 2] + struct.pack("<I", size) + whole[HEADER_BYTES + 6 :], DATA)


@pytest.mark.parametrize("size", [0, 100, 583])
def test_data_behind_the_end_of_a_quote_is_not_in_it(size: int) -> None:
    header = struct.pack("<HHI", 5, 2, 0x81).ljust(HEADER_BYTES, b"h") + struct.pack("<HI", 3, size)
    with pytest.raises(MalformedEvidenceError):
        tdx_evidence(header + bytes(520) + bytes(DATA) + bytes(100), ReportData(bytes(DATA)))


@pytest.mark.parametrize(
    ("name", "trailing_bytes"),
    [("v4-gcp-8000", 3065), ("v4-uptodate", None), ("v5-uptodate", None), ("v4-live-with-ccel", None)],
)
def test_recorded_quotes_end_where_they_say(name: str, trailing_bytes: int | None) -> None:
    blob = shared_data(f"tdx/quotes/{name}.bin").read_bytes()
    start = 48 if blob[0] == 4 else 54
    evidence = tdx_evidence(blob, ReportData(blob[start + 520 : start + 584]))
    assert not any(blob[len(evidence.report) :])
    if trailing_bytes is not None:
        assert len(blob) - len(evidence.report) == trailing_bytes


# --- SNP --------------------------------------------------------------------------------------------------------------


def test_a_report_over_other_data_is_refused(machine: SimulatedMachine) -> None:
    report = machine.attester().collect(DATA).report
    assert snp_evidence(report, b"", DATA) == Evidence(Tee.SNP, report)
    with pytest.raises(EvidenceBindingError) as caught:
        snp_evidence(report, b"", OTHER)
    assert caught.value.format is EvidenceFormat.SNP_REPORT


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
    assert certificate_chain(b"") == certificate_chain(table()) == certificate_chain(table((CertificateKind.VCEK, b""))) == ()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
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


@given(
    st.lists(
        st.sampled_from([b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"\n", b"AAA=", b"-", b"\0"]), min_size=1
    )
)
def test_no_certificate_ends_in_a_foreign_exception(parts: list[bytes]) -> None:
    with pytest.raises(MalformedEvidenceError):
        certificate_chain(table((CertificateKind.VCEK, b"".join(parts))))
