"""The TDX verifier against Intel's recorded silicon, simulated silicon, and quotes that are wrong in exactly one way."""

import base64
import dataclasses
import datetime
import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.ccel import EV_EVENT_TAG, SHA384, Event, pack_event_log, parse_event_log
from agent.evidence.tdx_abi import (
    TdAttributes,
    TdExtension,
    TdxQuote,
    pack_qe_report,
    pack_quote,
    parse_quote,
    quote_length,
    signed_part,
)
from agent.sim.machine import SimulatedMachine
from agent.sim.tdx import SimulatedTdx, make_event_log, make_quote, make_td_report, raw_signature, sign_quote
from agent.verify.tdx import TcbStatus, check_event_log, verify_tdx
from tests.shared import shared_data

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
REPORT_DATA = ReportData(bytes(range(64)))
FLIPS = 200
"""Sampled positions of the signed part, besides its ends."""

GENUINE = (
    "v4-uptodate",
    "v4-mrconfigid",
    "v4-spr-e4",
    "v4-gcp-8000",
    "v4-live-with-ccel",
    "v4-azure",
    "v5-uptodate",
    "v5-tcb-unknown",
)
REFUSED = {"v4-debug-td": EvidenceCheck.TD_DEBUG, "v4-preproduction-root": EvidenceCheck.CERTIFICATE_CHAIN}


def refuse(
    evidence: Evidence,
    check: EvidenceCheck,
    roots: Sequence[x509.Certificate] = (),
    now: datetime.datetime = NOW,
    crls: Sequence[x509.CertificateRevocationList] = (),
) -> EvidenceVerificationError:
    with pytest.raises(EvidenceVerificationError) as refused:
        verify_tdx(evidence, roots, now, crls)
    assert refused.value.check is check
    return refused.value


def first_day(quote: TdxQuote) -> datetime.datetime:
    """A day on which its certificates are valid."""
    pck = x509.load_pem_x509_certificates(quote.pck_chain.removesuffix(b"\0"))[0]
    return pck.not_valid_before_utc + DAY


def flips(quote: TdxQuote, data: bytes) -> list[bytes]:
    """`data` with one bit of one byte of the signed part changed, at the same positions in every run."""
    draw = random.Random(quote.version)
    size = len(signed_part(quote))
    changed = []
    for position in {0, size - 1, *draw.sample(range(size), FLIPS)}:
        copy = bytearray(data)
        copy[position] ^= 1 << draw.randrange(8)
        changed.append(bytes(copy))
    return changed


# --- Intel's silicon --------------------------------------------------------------------------------------------------


def recorded(name: str) -> tuple[Evidence, datetime.datetime, dict[str, object]]:
    """The quote without what follows it, a day on which its certificates are valid, and the row of the index."""
    row = next(row for row in json.loads(shared_data("tdx/index.json").read_text()) if row["name"] == name)
    data = shared_data(f"tdx/{row['quote']}").read_bytes()
    data = data[: quote_length(data)]
    return Evidence(Tee.TDX, data), first_day(parse_quote(data)), row


def test_every_recorded_quote_has_a_verdict_here() -> None:
    rows = json.loads(shared_data("tdx/index.json").read_text())
    assert {row["name"] for row in rows if "quote" in row} == {*GENUINE, *REFUSED}


@pytest.mark.parametrize("name", GENUINE)
def test_a_recorded_quote_verifies_under_the_pinned_root(name: str) -> None:
    evidence, day, row = recorded(name)
    claims = verify_tdx(evidence, [], day)
    fields = row["fields"]
    assert isinstance(fields, dict)
    assert claims.quote_version == row["version"]
    assert claims.td.mr_td.hex() == fields["mrtd"]
    assert [rtmr.hex() for rtmr in claims.td.rtmrs] == [fields[f"rtmr{number}"] for number in range(4)]
    assert claims.td.report_data.hex() == fields["reportdata"]
    assert claims.platform.fmspc.hex() == row["fmspc"]
    assert (claims.simulated, claims.revocation_checked, claims.tcb_status) == (False, False, TcbStatus.NOT_EVALUATED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recorded_quote_that_must_not_be_believed_is_refused_for_its_own_reason(name: str) -> None:
    evidence, day, _ = recorded(name)
    refuse(evidence, REFUSED[name], now=day)


@pytest.mark.parametrize("name", ["v4-uptodate", "v4-spr-e4", "v5-uptodate"])
def test_a_recorded_quote_with_one_flipped_bit_does_not_verify(name: str) -> None:
    evidence, day, _ = recorded(name)
    quote = parse_quote(evidence.report)
    for data in flips(quote, evidence.report):
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            verify_tdx(Evidence(Tee.TDX, data), [], day)


@pytest.mark.parametrize("name", GENUINE)
def test_a_recorded_quote_is_refused_outside_the_validity_of_its_certificates(name: str) -> None:
    evidence, day, row = recorded(name)
    refuse(evidence, EvidenceCheck.CERTIFICATE_VALIDITY, now=day - 2 * DAY)
    after = datetime.datetime.fromisoformat(str(row["pck_not_after"])).replace(tzinfo=datetime.UTC) + 2 * DAY
    refuse(evidence, EvidenceCheck.CERTIFICATE_VALIDITY, now=after)


def test_zeros_after_a_recorded_quote_are_the_clouds_and_text_is_nobodys() -> None:
    for name in ("v4-gcp-8000", "v4-spr-e4"):
        _, day, row = recorded(name)
        evidence = Evidence(Tee.TDX, shared_data(f"tdx/{row['quote']}").read_bytes())
        if row["trailing_all_zero"]:
            verify_tdx(evidence, [], day)
        else:
            with pytest.raises(MalformedEvidenceError) as refused:
                verify_tdx(evidence, [], day)
            assert refused.value.field == "trailing"


def test_the_quotes_in_recorded_azure_evidence_verify() -> None:
    for name in ("live-evidence.json", "trustee-az-tdx-evidence-v1.json"):
        text = json.loads(shared_data(f"tdx/azure/{name}").read_text())["td_quote"]
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        data = data[: quote_length(data)]
        verify_tdx(Evidence(Tee.TDX, data), [], first_day(parse_quote(data)))


@pytest.mark.parametrize(("name", "log"), [("v4-gcp-8000", "gcp-cos113"), ("v4-live-with-ccel", "live2")])
def test_a_recorded_event_log_is_that_of_its_quote_and_no_other(name: str, log: str) -> None:
    evidence, day, _ = recorded(name)
    td = verify_tdx(evidence, [], day).td
    check_event_log(parse_event_log(shared_data(f"tdx/ccel/{log}.bin").read_bytes()), td)
    with pytest.raises(EvidenceVerificationError) as refused:
        check_event_log(parse_event_log(shared_data("tdx/ccel/dstack.bin").read_bytes()), td)
    assert (refused.value.format, refused.value.check) == (EvidenceFormat.EVENT_LOG, EvidenceCheck.RTMR)


def test_intels_recorded_revocation_lists_take_nothing_back_and_expire() -> None:
    evidence, _, _ = recorded("v5-uptodate")
    folder = shared_data("tdx/collateral/raw-2026-03")
    crls = [x509.load_der_x509_crl((folder / f"{name}.der").read_bytes()) for name in ("root_ca_crl", "pck_crl_platform")]
    valid = max(crl.last_update_utc for crl in crls) + DAY
    assert verify_tdx(evidence, [], valid, crls).revocation_checked
    refuse(evidence, EvidenceCheck.REVOCATION_LIST, now=valid, crls=crls[:1])
    refuse(evidence, EvidenceCheck.REVOCATION_LIST, now=valid, crls=crls[1:])
    refuse(evidence, EvidenceCheck.REVOCATION_LIST, now=valid + 60 * DAY, crls=crls)


# --- simulated silicon ------------------------------------------------------------------------------------------------


def roots_of(machine: SimulatedMachine) -> list[x509.Certificate]:
    return [x509.load_pem_x509_certificate((machine.roots_dir / "sgx-root.pem").read_bytes())]


def collect(machine: SimulatedMachine, version: int = 4) -> Evidence:
    return SimulatedTdx(machine, version).collect(REPORT_DATA)


@pytest.mark.parametrize("version", [4, 5])
def test_a_simulated_quote_verifies_under_its_own_root_and_says_so(machine: SimulatedMachine, version: int) -> None:
    claims = verify_tdx(collect(machine, version), roots_of(machine), NOW)
    assert claims.simulated
    assert claims.quote_version == version
    assert claims.td.report_data == REPORT_DATA
    assert claims.td.mr_td == machine.measurement
    assert claims.ppid_hash == hashlib.sha256(machine.chip_id[:16]).hexdigest()
    check_event_log(make_event_log(machine), claims.td)


def test_a_simulated_quote_does_not_verify_under_the_pinned_root(machine: SimulatedMachine) -> None:
    refuse(collect(machine), EvidenceCheck.CERTIFICATE_CHAIN)


@pytest.mark.parametrize("version", [4, 5])
def test_a_simulated_quote_with_one_flipped_bit_does_not_verify(machine: SimulatedMachine, version: int) -> None:
    evidence = collect(machine, version)
    for data in flips(parse_quote(evidence.report), evidence.report):
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            verify_tdx(Evidence(Tee.TDX, data), roots_of(machine), NOW)


def test_a_flipped_signature_bit_is_refused(machine: SimulatedMachine) -> None:
    machine.flip_signature_bit = True
    refuse(collect(machine), EvidenceCheck.REPORT_SIGNATURE, roots_of(machine))


def test_a_debug_td_is_refused_though_everything_else_is_genuine(machine: SimulatedMachine) -> None:
    machine.policy |= 1 << 19
    error = refuse(collect(machine), EvidenceCheck.TD_DEBUG, roots_of(machine))
    assert (error.got, error.expected) == (1, 0)


@pytest.mark.parametrize("number", range(4))
def test_a_log_must_have_made_every_register(machine: SimulatedMachine, number: int) -> None:
    td, log = verify_tdx(collect(machine), roots_of(machine), NOW).td, make_event_log(machine)
    more = Event(number + 1, EV_EVENT_TAG, ((SHA384, bytes(48)),), b"")
    with pytest.raises(EvidenceVerificationError) as refused:
        check_event_log(dataclasses.replace(log, events=(*log.events, more)), td)
    assert (refused.value.check, refused.value.got) == (EvidenceCheck.RTMR, number)


def test_an_event_log_with_one_event_more_or_less_is_refused(machine: SimulatedMachine) -> None:
    td, log = verify_tdx(collect(machine), roots_of(machine), NOW).td, make_event_log(machine)
    for events in (log.events[:-1], (*log.events, log.events[0]), log.events[1:]):
        with pytest.raises(EvidenceVerificationError) as refused:
            check_event_log(dataclasses.replace(log, events=events), td)
        assert refused.value.check is EvidenceCheck.RTMR


def test_a_log_that_comes_with_a_quote_must_have_made_its_registers(machine: SimulatedMachine) -> None:
    evidence, log = collect(machine), make_event_log(machine)
    assert not verify_tdx(evidence, roots_of(machine), NOW).event_log
    with_log = dataclasses.replace(evidence, event_log=pack_event_log(log))
    assert verify_tdx(with_log, roots_of(machine), NOW).event_log
    shorter = dataclasses.replace(evidence, event_log=pack_event_log(dataclasses.replace(log, events=log.events[:-1])))
    assert refuse(shorter, EvidenceCheck.RTMR, roots_of(machine)).got == 2
    with pytest.raises(MalformedEvidenceError):
        verify_tdx(dataclasses.replace(evidence, event_log=with_log.event_log[:-1]), roots_of(machine), NOW)


def test_a_recorded_log_made_the_registers_of_the_recorded_quote_beside_it() -> None:
    evidence, day, _ = recorded("v4-live-with-ccel")
    log = pack_event_log(parse_event_log(shared_data("tdx/ccel/live2.bin").read_bytes()))
    assert verify_tdx(dataclasses.replace(evidence, event_log=log), [], day).event_log
    other, day, _ = recorded("v4-uptodate")
    refuse(dataclasses.replace(other, event_log=log), EvidenceCheck.RTMR, now=day)


@pytest.mark.parametrize("version", [4, 5])
def test_a_quote_is_verified_in_less_than_ten_milliseconds(machine: SimulatedMachine, version: int) -> None:
    evidence, roots = collect(machine, version), roots_of(machine)
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        verify_tdx(evidence, roots, NOW)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.010  # the others share the machine with other tests


# --- a quoting enclave that gets one thing wrong ----------------------------------------------------------------------


def quote_of(machine: SimulatedMachine, **body: object) -> TdxQuote:
    td = dataclasses.replace(make_td_report(machine, REPORT_DATA).body, **body)  # type: ignore[arg-type]
    chain = parse_quote(collect(machine).report).pck_chain
    return make_quote(5, td, chain)


def pck_key(machine: SimulatedMachine) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key((machine.directory / "pck.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def signed(machine: SimulatedMachine, quote: TdxQuote) -> Evidence:
    return Evidence(Tee.TDX, pack_quote(sign_quote(quote, ec.generate_private_key(ec.SECP256R1()), pck_key(machine))))


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"td_attributes": TdAttributes(1 << 5)}, EvidenceCheck.TD_DEBUG),
        ({"mr_signer_seam": bytes(47) + b"\1"}, EvidenceCheck.TDX_MODULE),
        ({"seam_attributes": 1}, EvidenceCheck.TDX_MODULE),
    ],
)
def test_a_td_whose_module_or_attributes_cannot_be_relied_on_is_refused(
    machine: SimulatedMachine, changes: dict[str, object], check: EvidenceCheck
) -> None:
    refuse(signed(machine, quote_of(machine, **changes)), check, roots_of(machine))


def test_a_quote_of_a_newer_module_says_more_of_the_td(machine: SimulatedMachine) -> None:
    extension = TdExtension(
        vm_id=0,
        td_id=b"\1" * 32,
        device_info=bytes(48),
        init_service_td_hash=b"\2" * 48,
        init_service_td_attributes=3,
        init_cpu_svn=b"\4" * 16,
        init_tee_tcb_svn=b"\5" * 16,
        init_tee_fmspc=b"\6" * 12,
        service_td_hash=b"\7" * 48,
        service_td_attributes=8,
    )
    evidence = signed(machine, quote_of(machine, extension=extension))
    assert verify_tdx(evidence, roots_of(machine), NOW).td.extension == extension
    for position in range(48, 54 + 885):  # all of it is signed
        changed = bytearray(evidence.report)
        changed[position] ^= 1
        with pytest.raises(AgentError):
            verify_tdx(dataclasses.replace(evidence, report=bytes(changed)), roots_of(machine), NOW)


def test_attributes_that_are_policys_to_judge_are_claims(machine: SimulatedMachine) -> None:
    quote = quote_of(machine, td_attributes=TdAttributes(1 << 63 | 0xF << 28), mr_service_td=b"\1" * 48)
    claims = verify_tdx(signed(machine, quote), roots_of(machine), NOW)
    assert claims.td.td_attributes.migratable
    assert claims.td.mr_service_td == b"\1" * 48


@pytest.mark.parametrize(
    "changes",
    [
        {"mr_signer": bytes(32)},
        {"isv_prod_id": 1},
        {"attributes": (0x11 | 4 | 2).to_bytes(16, "little")},  # DEBUG
        {"attributes": (0x01 | 4).to_bytes(16, "little")},  # without PROVISION_KEY
        {"attributes": (0x11 | 0x80).to_bytes(16, "little")},
    ],
)
def test_an_enclave_that_is_not_intels_for_tds_is_refused_though_the_platform_certified_it(
    machine: SimulatedMachine, changes: dict[str, object]
) -> None:
    quote = quote_of(machine)
    quote = dataclasses.replace(quote, qe_report=dataclasses.replace(quote.qe_report, **changes))  # type: ignore[arg-type]
    refuse(signed(machine, quote), EvidenceCheck.QE_IDENTITY, roots_of(machine))


def test_an_enclave_with_32_bit_code_is_still_intels(machine: SimulatedMachine) -> None:
    quote = quote_of(machine)
    attributes = (0x11).to_bytes(16, "little")
    quote = dataclasses.replace(quote, qe_report=dataclasses.replace(quote.qe_report, attributes=attributes))
    verify_tdx(signed(machine, quote), roots_of(machine), NOW)


def test_another_vendors_enclave_is_refused(machine: SimulatedMachine) -> None:
    quote = dataclasses.replace(quote_of(machine), qe_vendor_id=bytes(16))
    refuse(signed(machine, quote), EvidenceCheck.QE_VENDOR, roots_of(machine))


def test_a_report_of_the_enclave_that_another_platform_signed_is_refused(machine: SimulatedMachine) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    quote = sign_quote(quote_of(machine), key, key)
    refuse(Evidence(Tee.TDX, pack_quote(quote)), EvidenceCheck.QE_REPORT_SIGNATURE, roots_of(machine))


Spoil = Callable[[TdxQuote, ec.EllipticCurvePrivateKey], TdxQuote]


def swap_key(quote: TdxQuote, key: ec.EllipticCurvePrivateKey) -> TdxQuote:
    """A host's own attestation key in the place of the enclave's, and a signature that fits."""
    point = key.public_key().public_numbers()
    own = dataclasses.replace(quote, attestation_key=point.x.to_bytes(32) + point.y.to_bytes(32))
    return dataclasses.replace(own, signature=raw_signature(key, signed_part(own)))


def swap_auth_data(quote: TdxQuote, _key: ec.EllipticCurvePrivateKey) -> TdxQuote:
    return dataclasses.replace(quote, qe_auth_data=b"other")


def swap_signature(quote: TdxQuote, key: ec.EllipticCurvePrivateKey) -> TdxQuote:
    return dataclasses.replace(quote, signature=raw_signature(key, signed_part(quote)))


def no_signature(quote: TdxQuote, _key: ec.EllipticCurvePrivateKey) -> TdxQuote:
    return dataclasses.replace(quote, signature=bytes(64))


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (swap_key, EvidenceCheck.ATTESTATION_KEY),
        (swap_auth_data, EvidenceCheck.ATTESTATION_KEY),
        (swap_signature, EvidenceCheck.REPORT_SIGNATURE),
        (no_signature, EvidenceCheck.REPORT_SIGNATURE),
    ],
)
def test_a_spoiled_quote_is_refused(machine: SimulatedMachine, spoil: Spoil, check: EvidenceCheck) -> None:
    quote = spoil(parse_quote(collect(machine).report), ec.generate_private_key(ec.SECP256R1()))
    refuse(Evidence(Tee.TDX, pack_quote(quote)), check, roots_of(machine))


def test_the_second_half_of_the_enclaves_report_data_must_be_zero(machine: SimulatedMachine) -> None:
    quote = parse_quote(collect(machine).report)
    report_data = quote.qe_report.report_data[:32] + b"\1" * 32
    qe_report = dataclasses.replace(quote.qe_report, report_data=report_data)
    quote = dataclasses.replace(
        quote, qe_report=qe_report, qe_report_signature=raw_signature(pck_key(machine), pack_qe_report(qe_report))
    )
    refuse(Evidence(Tee.TDX, pack_quote(quote)), EvidenceCheck.ATTESTATION_KEY, roots_of(machine))


def test_an_attestation_key_that_is_no_point_is_malformed(machine: SimulatedMachine) -> None:
    quote = parse_quote(collect(machine).report)
    key = b"\1" * 64
    binding = hashlib.sha256(key + quote.qe_auth_data).digest() + bytes(32)
    qe_report = dataclasses.replace(quote.qe_report, report_data=binding)
    quote = dataclasses.replace(
        quote,
        attestation_key=key,
        qe_report=qe_report,
        qe_report_signature=raw_signature(pck_key(machine), pack_qe_report(qe_report)),
    )
    with pytest.raises(MalformedEvidenceError) as refused:
        verify_tdx(Evidence(Tee.TDX, pack_quote(quote)), roots_of(machine), NOW)
    assert refused.value.field == "attestation_key"


def test_only_numbers_that_say_something_are_in_the_text(machine: SimulatedMachine) -> None:
    machine.policy |= 1 << 19
    assert str(refuse(collect(machine), EvidenceCheck.TD_DEBUG, roots_of(machine))) == (
        "tdx-quote: td-debug does not verify: got 1, expected 0 (host)"
    )


# --- anything at all --------------------------------------------------------------------------------------------------


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_change_up_to_the_certificates_verifies_or_ends_in_a_foreign_exception(
    machine: SimulatedMachine, data: st.DataObject
) -> None:
    evidence = collect(machine)
    last = evidence.report.index(b"-----BEGIN") - 1
    changed = bytearray(evidence.report)
    for position in data.draw(st.sets(st.integers(0, last), min_size=1, max_size=3)):
        changed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AgentError):
        verify_tdx(Evidence(Tee.TDX, bytes(changed)), roots_of(machine), NOW)
