"""GPU evidence against the pinned root, and every way it can fail to be genuine or fresh."""

import base64
import datetime
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import GpuEvidence, GpuNonce
from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, GpuReport, parse_report
from agent.sim.gpu_silicon import BLACKWELL, FWID, HOPPER, LS10, Chip, issue, issue_authority, issue_device
from agent.verify.nvidia import (
    COMPOSITE_DEVICE_ID,
    DICE_TCB_INFO,
    CompositeDeviceId,
    DiceTcbInfo,
    Fwid,
    GpuClaims,
    IntegrityRegister,
    SwitchClaims,
    parse_chain,
    verify_fsp,
    verify_gpu,
    verify_switch,
)
from agent.verify.roots import NVIDIA_DEVICE_ROOT_SHA256, fingerprint
from tests.gpus import (
    GENUINE_GPUS,
    GPU_NAMES,
    JSON_RECORDS,
    NONCE,
    RECORDED,
    SWITCH_NAMES,
    TEXT_RECORDS,
    Device,
    SimulatedSet,
    gpu_machine,
    listed,
    recorded,
    signed_by,
    simulated_root,
)
from tests.shared import shared_data

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
END_LINE = b"-----END CERTIFICATE-----\n"


def check_that_fails(
    evidence: GpuEvidence, nonce: GpuNonce, roots: list[x509.Certificate], now: datetime.datetime = NOW
) -> EvidenceCheck:
    with pytest.raises(EvidenceVerificationError) as caught:
        verify_gpu(evidence, nonce, roots, now)
    return caught.value.check


def field_of_error(evidence: GpuEvidence, nonce: GpuNonce, roots: list[x509.Certificate]) -> tuple[EvidenceFormat, str]:
    with pytest.raises(MalformedEvidenceError) as caught:
        verify_gpu(evidence, nonce, roots, NOW)
    return caught.value.format, caught.value.field


def certificates(chain: bytes) -> list[bytes]:
    return [part + END_LINE for part in chain.split(END_LINE) if part]


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + END_LINE


def with_version_4(certificate: bytes) -> bytes:
    der = x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)
    return pem(der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020103"), 1))


class Silicon:
    """Two simulated GPUs, their evidence, and their signatures over any report."""

    def __init__(self, directory: Path) -> None:
        self.machine = gpu_machine(directory)
        self.root = simulated_root(self.machine)
        self.first, self.second = self.machine.gpu_system().collect(NONCE)
        self.report = parse_report(self.first.report)

    def verify(self, evidence: GpuEvidence) -> GpuClaims:
        return verify_gpu(evidence, NONCE, [self.root], NOW)

    def saying(self, report: GpuReport) -> GpuEvidence:
        return replace(self.first, report=signed_by(self.machine.silicon, 0, report))

    def without(self, kind: int) -> GpuReport:
        return replace(self.report, opaque=tuple(field for field in self.report.opaque if field[0] != kind))

    def with_field(self, kind: int, value: bytes, report: GpuReport | None = None) -> GpuReport:
        report = report or self.report
        return replace(report, opaque=tuple((found, value if found == kind else old) for found, old in report.opaque))


@pytest.fixture(scope="module")
def devices() -> SimulatedSet:
    return SimulatedSet()


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Silicon:
    return Silicon(tmp_path_factory.mktemp("gpu") / "machine")


@pytest.mark.parametrize("name", GENUINE_GPUS)
def test_recorded_gpus_verify_under_the_pinned_root_alone(name: str) -> None:
    sample = recorded(name)
    claims = verify_gpu(sample.evidence, sample.nonce, (), NOW)
    expected = sample.expected
    assert (claims.driver_version, claims.vbios_version) == (expected["driver"], expected["vbios"])
    assert (claims.ueid, claims.hwmodel) == (expected["ueid"], expected["hwmodel"])
    assert claims.feature_flag == expected["feature_flag"]
    assert claims.arch == sample.evidence.arch
    assert not claims.simulated


def nvidia_data(relative: str) -> bytes:
    return shared_data(f"nvidia/{relative}").read_bytes()


def verify(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate] = ()) -> GpuClaims | SwitchClaims:
    return (verify_switch if evidence.arch == "LS10" else verify_gpu)(evidence, nonce, roots, NOW)


@pytest.mark.parametrize(("report", "chain", "arch", "asked", "expected"), TEXT_RECORDS)
def test_every_recorded_report_verifies_or_is_refused_for_what_is_wrong_with_it(
    report: str, chain: str, arch: str, asked: str, expected: EvidenceCheck | str | None
) -> None:
    evidence = GpuEvidence(arch, "GPU-recorded", bytes.fromhex(nvidia_data(report).decode()), nvidia_data(chain))
    nonce = GpuNonce(bytes.fromhex(asked))
    if expected is None:
        assert not verify(evidence, nonce).simulated
        with pytest.raises(EvidenceVerificationError) as caught:
            verify(evidence, GpuNonce(bytes(32)))
        assert caught.value.check is EvidenceCheck.NONCE
    elif isinstance(expected, EvidenceCheck):
        with pytest.raises(EvidenceVerificationError) as caught:
            verify(evidence, nonce)
        assert caught.value.check is expected
    else:
        with pytest.raises(MalformedEvidenceError) as malformed:
            verify(evidence, nonce)
        assert (malformed.value.format, malformed.value.field) == (EvidenceFormat.NVIDIA_CHAIN, expected)


@pytest.mark.parametrize(("file", "count"), JSON_RECORDS.items())
def test_every_recorded_list_of_devices_verifies(file: str, count: int) -> None:
    entries = json.loads(nvidia_data(file))
    assert len(entries) == count
    for entry in entries:
        report, chain = base64.b64decode(entry["evidence"]), base64.b64decode(entry["certificate"])
        claims = verify(GpuEvidence(entry["arch"], "GPU-recorded", report, chain), GpuNonce(bytes.fromhex(entry["nonce"])))
        assert not claims.simulated


@pytest.mark.parametrize("role", ["gpu", "blackwell", "switch"])
def test_a_verification_takes_less_than_ten_milliseconds(devices: SimulatedSet, role: str) -> None:
    device = {"gpu": devices.gpus[0], "blackwell": devices.blackwell, "switch": devices.switches[0]}[role]
    evidence, times = device.evidence, []
    for _ in range(20):
        started = time.thread_time()
        verify(evidence, NONCE, [devices.root])
        times.append(time.thread_time() - started)
    assert min(times) < 0.010


def test_the_extracted_reports_are_among_those_that_were_recorded() -> None:
    """So the two tables above have every report that is shared, however it is written."""
    recorded_reports = {bytes.fromhex(nvidia_data(record[0]).decode()) for record in TEXT_RECORDS}
    recorded_reports |= {
        base64.b64decode(entry["evidence"]) for file in JSON_RECORDS for entry in json.loads(nvidia_data(file))
    }
    extracted = {(name, recorded(name).report) for name in RECORDED}
    assert {name for name, report in extracted if report not in recorded_reports} == set()


def test_every_certificate_that_the_driver_carries_descends_from_the_pinned_root() -> None:
    folder = shared_data("nvidia/open-gpu-kernel-modules/spdm_certs")
    carried = [x509.load_pem_x509_certificate(path.read_bytes()) for path in folder.rglob("*.pem")]
    by_name = {certificate.subject: certificate for certificate in carried}
    assert len(by_name) == len(carried) == 14
    for certificate in carried:
        certificate.verify_directly_issued_by(by_name[certificate.issuer])
    assert [fingerprint(each) for each in carried if each.subject == each.issuer] == [NVIDIA_DEVICE_ROOT_SHA256]


def flipped_bytes_are_refused(evidence: GpuEvidence, nonce: GpuNonce, roots: Sequence[x509.Certificate] = ()) -> None:
    """250 places of the signed part, and every byte of the signature."""
    verify(evidence, nonce, roots)
    signed = len(parse_report(evidence.report).signed_bytes)
    sampled = random.Random(1).sample(range(signed), min(250, signed))
    for place in (*sampled, *range(signed, signed + 96)):
        report = bytearray(evidence.report)
        report[place] ^= 1 << place % 8
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            verify(replace(evidence, report=bytes(report)), nonce, roots)


@pytest.mark.parametrize("name", ["hopper_590.12_ppcie_0", "blackwell_575.32", "ls10_96.10.55"])
def test_no_byte_of_a_recorded_report_can_be_another(name: str) -> None:
    sample = recorded(name)
    flipped_bytes_are_refused(sample.evidence, sample.nonce)


@pytest.mark.parametrize("role", ["gpu", "blackwell", "switch"])
def test_no_byte_of_a_report_can_be_another(devices: SimulatedSet, role: str) -> None:
    device = {"gpu": devices.gpus[0], "blackwell": devices.blackwell, "switch": devices.switches[0]}[role]
    flipped_bytes_are_refused(device.evidence, NONCE, [devices.root])


def test_a_genuine_switch_or_security_processor_is_no_gpu(devices: SimulatedSet) -> None:
    switch = devices.switches[0]
    for arch in ("LS10", "HOPPER"):
        evidence = replace(switch.saying({3: b"590.12\0"}), arch=arch)
        assert check_that_fails(evidence, NONCE, [devices.root]) is EvidenceCheck.CERTIFICATE_CHIP_ID
    for evidence in (devices.fsp.evidence, devices.fsp.fsp_evidence):  # though it says all that a GPU must say
        assert check_that_fails(evidence, NONCE, [devices.root]) is EvidenceCheck.CERTIFICATE_CHIP_ID
    root, chip = issue("SIMULATED Device Identity CA", None), replace(LS10, unit="GSP")
    other = Device(chip.arch, *issue_device(chip, issue_authority(chip, root)), devices.gpus[0].opaque)
    assert check_that_fails(other.evidence, NONCE, [root[1]]) is EvidenceCheck.CERTIFICATE_CHIP_ID


def test_a_security_processor_is_told_from_a_gpu_and_a_switch(devices: SimulatedSet) -> None:
    claims = verify_fsp(devices.fsp.fsp_evidence, NONCE, [devices.root], NOW)
    assert (claims.hwmodel, claims.arch, claims.fwid) == ("GB100 SIMULATED FSP BROM", "BLACKWELL", FWID)
    assert claims.simulated
    for other in (devices.blackwell, devices.switches[0]):
        with pytest.raises(EvidenceVerificationError) as caught:
            verify_fsp(other.evidence, NONCE, [devices.root], NOW)
        assert caught.value.check is EvidenceCheck.CERTIFICATE_CHIP_ID
    with pytest.raises(EvidenceVerificationError) as caught:
        verify_fsp(devices.fsp.fsp_evidence, GpuNonce(bytes(32)), [devices.root], NOW)
    assert caught.value.check is EvidenceCheck.NONCE


def test_no_byte_of_a_security_processors_report_can_be_another(devices: SimulatedSet) -> None:
    evidence = devices.fsp.fsp_evidence
    for position in range(len(evidence.report)):
        changed = bytearray(evidence.report)
        changed[position] ^= 0x41
        with pytest.raises(AgentError):
            verify_fsp(replace(evidence, report=bytes(changed)), NONCE, [devices.root], NOW)


def test_reports_of_the_newest_drivers_verify(devices: SimulatedSet) -> None:
    """With the header of their opaque data, a manifest among the measurements, and of the newest architecture."""
    for device, arch in ((devices.gpus[0], "HOPPER"), (devices.blackwell, "BLACKWELL"), (devices.rubin, "RUBIN")):
        claims = verify_gpu(device.with_opaque_header, NONCE, [devices.root], NOW)
        assert claims == verify_gpu(device.evidence, NONCE, [devices.root], NOW)
        assert claims.arch == arch


def test_a_leaf_may_say_all_that_dice_knows(devices: SimulatedSet) -> None:
    """Flags mask and integrity registers came with DICE 1.2: a leaf that has them is read like one without."""
    algorithm = x509.ObjectIdentifier("2.16.840.1.101.3.4.2.2")
    info = DiceTcbInfo(
        vendor="SIMULATED",
        model="GB100",
        version="1",
        svn=1,
        layer=0,
        index=0,
        fwids=[Fwid(algorithm=algorithm, digest=FWID)],
        flags=asn1.BitString(b"\x80\0\0\1", 0),
        vendor_info=b"\xc0",
        type=b"\0",
        flags_mask=asn1.BitString(b"\xfe", 1),
        integrity_registers=[
            IntegrityRegister(name=asn1.IA5String("r0"), number=None, digests=[Fwid(algorithm=algorithm, digest=bytes(48))]),
            IntegrityRegister(name=None, number=1, digests=None),
        ],
    )
    root = issue("SIMULATED Device Identity CA", None)
    extension = x509.UnrecognizedExtension(DICE_TCB_INFO, asn1.encode_der(info))
    chip = replace(BLACKWELL, extension=lambda _: extension)
    device = issue_device(chip, issue_authority(chip, root))
    evidence = Device(chip.arch, *device, devices.blackwell.opaque).evidence
    assert verify_gpu(evidence, NONCE, [root[1]], NOW).arch == "BLACKWELL"


def test_a_genuine_gpu_is_no_switch(devices: SimulatedSet) -> None:
    gpu = devices.gpus[0]
    for arch in ("LS10", "HOPPER"):
        evidence = replace(gpu.saying({22: SWITCH_NAMES[0], 26: listed(GPU_NAMES)}), arch=arch)
        with pytest.raises(EvidenceVerificationError) as caught:
            verify_switch(evidence, NONCE, [devices.root], NOW)
        assert caught.value.check is EvidenceCheck.CERTIFICATE_CHIP_ID


@pytest.mark.parametrize(("kind", "field"), [(6, "vbios-version"), (22, "pdi"), (26, "gpu-pdis")])
def test_a_switch_without_its_names_is_malformed(devices: SimulatedSet, kind: int, field: str) -> None:
    with pytest.raises(MalformedEvidenceError) as caught:
        verify_switch(devices.switches[0].saying({kind: None}), NONCE, [devices.root], NOW)
    assert caught.value.field == field


def test_a_simulated_switch_verifies_under_its_root_and_says_so(devices: SimulatedSet) -> None:
    claims = verify_switch(devices.switches[2].evidence, NONCE, [devices.root], NOW)
    assert claims.simulated
    assert (claims.hwmodel, claims.vbios_version) == ("LS_10 SIMULATED FSP BROM", "96.10.55.00.01")
    assert (claims.pdi, claims.gpu_pdis) == (SWITCH_NAMES[2], GPU_NAMES)


def test_a_simulated_blackwell_verifies_under_its_root(devices: SimulatedSet) -> None:
    claims = verify_gpu(devices.blackwell.evidence, NONCE, [devices.root], NOW)
    assert (claims.arch, claims.hwmodel) == ("BLACKWELL", "GB100 SIMULATED GSP BROM")
    assert (claims.protected_pcie, claims.switch_pdis, claims.feature_flag) == (None, (), None)


def test_the_same_claims_tell_devices_apart_by_their_key() -> None:
    claims = [verify_gpu(sample.evidence, sample.nonce, (), NOW) for sample in map(recorded, GENUINE_GPUS)]
    assert len({claim.leaf_key_sha256 for claim in claims}) == len(GENUINE_GPUS) - 1  # one device was recorded twice
    assert len({claim.ueid for claim in claims}) == len(GENUINE_GPUS) - 1


def test_a_vendor_chain_is_not_simulated_even_when_its_root_is_passed_in() -> None:
    sample = recorded("hopper_550.90.07")
    root = parse_chain(sample.chain).certificates[-1]
    assert not verify_gpu(sample.evidence, sample.nonce, [root], NOW).simulated


def test_an_extra_root_does_not_replace_the_pinned_one(gpus: Silicon) -> None:
    sample = recorded("hopper_550.90.07")
    verify_gpu(sample.evidence, sample.nonce, [gpus.root], NOW)


def test_a_simulated_gpu_verifies_under_its_root_and_says_so(gpus: Silicon) -> None:
    claims = gpus.verify(gpus.first)
    assert claims.simulated
    assert claims.hwmodel == "GH100 SIMULATED GSP BROM"
    assert claims.leaf_key_sha256 != gpus.verify(gpus.second).leaf_key_sha256


def test_a_simulated_gpu_is_nothing_to_production(gpus: Silicon) -> None:
    assert check_that_fails(gpus.first, NONCE, []) is EvidenceCheck.CERTIFICATE_CHAIN


def test_a_root_of_the_same_name_with_another_key_is_not_trusted(gpus: Silicon, tmp_path: Path) -> None:
    other = simulated_root(gpu_machine(tmp_path / "other"))
    assert other.subject == gpus.root.subject
    assert check_that_fails(gpus.first, NONCE, [other]) is EvidenceCheck.CERTIFICATE_CHAIN
    root = issue("NVIDIA Device Identity CA", None)
    device = issue_device(HOPPER, issue_authority(HOPPER, root))
    evidence = Device(HOPPER.arch, *device, ((6, bytes(8)), (3, b"590.12\0"), (20, FWID))).evidence
    assert check_that_fails(evidence, NONCE, []) is EvidenceCheck.CERTIFICATE_CHAIN
    verify_gpu(evidence, NONCE, [root[1]], NOW)


def test_another_nonce_does_not_verify(gpus: Silicon) -> None:
    assert check_that_fails(gpus.first, GpuNonce(bytes(32)), [gpus.root]) is EvidenceCheck.NONCE


def test_the_chain_of_another_gpu_does_not_verify_the_report(gpus: Silicon) -> None:
    stolen = replace(gpus.first, certificate_chain=gpus.second.certificate_chain)
    assert check_that_fails(stolen, NONCE, [gpus.root]) is EvidenceCheck.REPORT_SIGNATURE


@pytest.mark.parametrize("position", [45 + 20, -200, -1, -96])
def test_one_flipped_bit_breaks_the_signature(gpus: Silicon, position: int) -> None:
    report = bytearray(gpus.first.report)
    report[position] ^= 1
    assert check_that_fails(replace(gpus.first, report=bytes(report)), NONCE, [gpus.root]) is EvidenceCheck.REPORT_SIGNATURE


def test_trailing_bytes_do_not_disturb_the_signature(gpus: Silicon) -> None:
    gpus.verify(replace(gpus.first, report=gpus.first.report + b"\0"))


def test_a_signature_of_zeros_does_not_verify(gpus: Silicon) -> None:
    report = gpus.first.report[:-96] + bytes(96)
    assert check_that_fails(replace(gpus.first, report=report), NONCE, [gpus.root]) is EvidenceCheck.REPORT_SIGNATURE


def test_a_report_of_other_firmware_than_the_key_was_made_for_does_not_verify(devices: SimulatedSet) -> None:
    for device in (devices.gpus[0], devices.blackwell, devices.switches[0]):
        verify = verify_switch if device.arch == "LS10" else verify_gpu
        almost = (bytes((FWID[0] ^ 1,)) + FWID[1:], FWID[:-1] + bytes((FWID[-1] ^ 1,)))
        for other in (bytes(48), b"\1" * 48, *almost):  # zeros are the second of the two that a Blackwell leaf lists
            with pytest.raises(EvidenceVerificationError) as caught:
                verify(device.saying({20: other}), NONCE, [devices.root], NOW)
            assert caught.value.check is EvidenceCheck.FWID


@pytest.mark.parametrize(("chip", "extension"), [(HOPPER, BLACKWELL), (BLACKWELL, HOPPER), (LS10, BLACKWELL)])
def test_the_firmware_identity_of_another_architecture_is_none(chip: Chip, extension: Chip) -> None:
    root = issue("SIMULATED Device Identity CA", None)
    device = issue_device(replace(chip, extension=extension.extension), issue_authority(chip, root))
    evidence = Device(chip.arch, *device, ((6, b"96.10.55.00.01"), (3, b"590.12\0"), (20, FWID))).evidence
    assert field_of_error(evidence, NONCE, [root[1]]) == (EvidenceFormat.NVIDIA_CHAIN, "fwid-extension")


@pytest.mark.parametrize("driver", ["550.01", "580.95.05", "1000.1"])
def test_a_driver_that_must_report_its_firmware_and_does_not_fails(gpus: Silicon, driver: str) -> None:
    report = gpus.with_field(3, driver.encode(), gpus.without(20))
    assert check_that_fails(gpus.saying(report), NONCE, [gpus.root]) is EvidenceCheck.FWID


def test_an_old_driver_does_not_report_its_firmware(gpus: Silicon) -> None:
    report = gpus.with_field(3, b"535.86.09\0", gpus.without(20))
    assert gpus.verify(gpus.saying(report)).driver_version == "535.86.09"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda gpus: gpus.without(3), "driver-version"),
        (lambda gpus: gpus.without(6), "vbios-version"),
        (lambda gpus: gpus.with_field(3, b"newest", gpus.without(20)), "driver-version"),
        (lambda gpus: gpus.with_field(3, b"9" * 60 + b".1", gpus.without(20)), "driver-version"),
    ],
)
def test_a_report_without_its_versions_is_malformed(gpus: Silicon, change: Callable[[Silicon], GpuReport], field: str) -> None:
    assert field_of_error(gpus.saying(change(gpus)), NONCE, [gpus.root]) == (EvidenceFormat.NVIDIA_REPORT, field)


@pytest.mark.parametrize("arch", ["BLACKWELL", "LS10", "hopper", ""])
def test_the_architecture_is_the_one_of_the_certificate(gpus: Silicon, arch: str) -> None:
    assert check_that_fails(replace(gpus.first, arch=arch), NONCE, [gpus.root]) is EvidenceCheck.CERTIFICATE_CHIP_ID


@pytest.mark.parametrize("year", [2010, 2023])
def test_certificates_are_checked_at_the_given_time(gpus: Silicon, year: int) -> None:
    then = datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)
    assert check_that_fails(gpus.first, NONCE, [gpus.root], then) is EvidenceCheck.CERTIFICATE_VALIDITY


def test_a_recorded_chain_is_checked_at_the_given_time() -> None:
    sample = recorded("hopper_550.90.07")
    then = datetime.datetime(2019, 1, 1, tzinfo=datetime.UTC)
    assert check_that_fails(sample.evidence, sample.nonce, [], then) is EvidenceCheck.CERTIFICATE_VALIDITY


@pytest.mark.parametrize("order", [(0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 1, 1, 3, 4), (0, 2, 2, 3, 4), (1, 1, 2, 3, 4)])
def test_certificates_out_of_order_or_repeated_are_no_chain(gpus: Silicon, order: tuple[int, ...]) -> None:
    parts = certificates(gpus.first.certificate_chain)
    evidence = replace(gpus.first, certificate_chain=b"".join(parts[index] for index in order))
    assert check_that_fails(evidence, NONCE, [gpus.root]) is EvidenceCheck.CERTIFICATE_CHAIN


@pytest.mark.parametrize("foreign", [0, 1, 2, 3, 4])
def test_one_certificate_of_another_vendor_breaks_the_chain(gpus: Silicon, tmp_path: Path, foreign: int) -> None:
    parts = certificates(gpus.first.certificate_chain)
    others = certificates(gpu_machine(tmp_path / "other").gpu_system().collect(NONCE)[0].certificate_chain)
    parts[foreign] = others[foreign]
    evidence = replace(gpus.first, certificate_chain=b"".join(parts))
    assert check_that_fails(evidence, NONCE, [gpus.root]) is EvidenceCheck.CERTIFICATE_CHAIN


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda chain: b"", "certificate"),
        (lambda chain: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate"),
        (lambda chain: with_version_4(certificates(chain)[0]) + b"".join(certificates(chain)[1:]), "certificate"),
        (lambda chain: b"".join(certificates(chain)[:4]), "number-of-certificates"),
        (lambda chain: chain + certificates(chain)[4], "number-of-certificates"),
        (lambda chain: chain + b"#" * MAX_CHAIN_BYTES, "length"),
    ],
)
def test_a_chain_is_five_certificates(gpus: Silicon, change: Callable[[bytes], bytes], field: str) -> None:
    evidence = replace(gpus.first, certificate_chain=change(gpus.first.certificate_chain))
    assert field_of_error(evidence, NONCE, [gpus.root]) == (EvidenceFormat.NVIDIA_CHAIN, field)


def test_every_key_is_on_p384(gpus: Silicon) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "SIMULATED P-256")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW)
    weak = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
    for position in range(5):
        parts = certificates(gpus.first.certificate_chain)
        parts[position] = weak
        evidence = replace(gpus.first, certificate_chain=b"".join(parts))
        assert field_of_error(evidence, NONCE, [gpus.root]) == (EvidenceFormat.NVIDIA_CHAIN, "public-key")


def issued_evidence(gpus: Silicon, issued: list[tuple[ec.EllipticCurvePrivateKey, x509.Certificate]]) -> GpuEvidence:
    """The report, signed with the last of a chain of certificates that begins with its root."""
    chain = b"".join(certificate.public_bytes(Encoding.PEM) for _, certificate in reversed(issued))
    r, s = decode_dss_signature(issued[-1][0].sign(gpus.report.signed_bytes, ec.ECDSA(SHA384())))
    report = gpus.report.signed_bytes + r.to_bytes(48, "big") + s.to_bytes(48, "big")
    return replace(gpus.first, report=report, certificate_chain=chain)


@pytest.mark.parametrize(("oid", "count"), [(x509.NameOID.COMMON_NAME, 2), (x509.NameOID.ORGANIZATION_NAME, 1)])
def test_a_boot_rom_that_does_not_have_exactly_one_name_is_malformed(
    gpus: Silicon, oid: x509.ObjectIdentifier, count: int
) -> None:
    issued = [issue("SIMULATED root", None)]
    for name in ("SIMULATED identity", "SIMULATED provisioner"):
        issued.append(issue(name, issued[-1]))
    key, brom = issue("GH100 SIMULATED BROM", issued[-1])
    subject = x509.Name([x509.NameAttribute(oid, f"GH100 SIMULATED BROM {number}") for number in range(count)])
    days = brom.not_valid_before_utc, brom.not_valid_after_utc
    renamed = x509.CertificateBuilder(brom.issuer, subject, key.public_key(), 1, *days, list(brom.extensions))
    issued.append((key, renamed.sign(issued[-1][0], SHA384())))
    leaf = x509.load_pem_x509_certificate(certificates(gpus.first.certificate_chain)[0])
    fwid = leaf.extensions.get_extension_for_oid(COMPOSITE_DEVICE_ID).value
    assert isinstance(fwid, x509.UnrecognizedExtension)
    issued.append(issue("GH100 SIMULATED leaf", issued[-1], (fwid,)))
    evidence = issued_evidence(gpus, issued)
    assert field_of_error(evidence, NONCE, [issued[0][1]]) == (EvidenceFormat.NVIDIA_CHAIN, "subject")


SHORT_FWID = asn1.encode_der(
    CompositeDeviceId(
        version=1,
        device_key=asn1.decode_der(asn1.TLV, b"\x05\0"),
        fwid=Fwid(algorithm=x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1"), digest=bytes(32)),
    )
)


def fwid_extension(value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(COMPOSITE_DEVICE_ID, value)


@pytest.mark.parametrize(
    "extensions",
    [(), (fwid_extension(b""),), (fwid_extension(b"\x30\x00"),), (fwid_extension(FWID),), (fwid_extension(SHORT_FWID),)],
    ids=["none", "empty", "empty sequence", "bare digest", "shorter digest"],
)
def test_a_leaf_without_a_readable_firmware_identity_is_malformed(
    gpus: Silicon, extensions: tuple[x509.UnrecognizedExtension, ...]
) -> None:
    issued = [issue("SIMULATED root", None)]
    for name in ("SIMULATED identity", "SIMULATED provisioner", "GH100 SIMULATED BROM"):
        issued.append(issue(name, issued[-1]))
    issued.append(issue("GH100 SIMULATED leaf", issued[-1], extensions))
    evidence = issued_evidence(gpus, issued)
    assert field_of_error(evidence, NONCE, [issued[0][1]]) == (EvidenceFormat.NVIDIA_CHAIN, "fwid-extension")


@pytest.mark.parametrize("tag", [0x00, 0x03])  # for the common name: no type at all, and a BIT STRING
@pytest.mark.parametrize("extension", ["551d23", "551d11"])  # authority key identifier, subject alternative name
def test_a_name_that_the_library_chokes_on_is_no_chain(gpus: Silicon, tag: int, extension: str) -> None:
    leaf_pem, *issuers = certificates(gpus.first.certificate_chain)
    leaf = bytearray(x509.load_pem_x509_certificate(leaf_pem).public_bytes(Encoding.DER))
    common_name = bytes.fromhex("0603550403")
    leaf[leaf.index(common_name, leaf.index(common_name) + 1) + 5] = tag  # the subject's, after the issuer's
    leaf[leaf.index(bytes.fromhex("0603" + extension)) + 4] ^= 0x40  # so that the library looks at the name for its message
    evidence = replace(gpus.first, certificate_chain=pem(bytes(leaf)) + b"".join(issuers))
    assert check_that_fails(evidence, NONCE, [gpus.root]) is EvidenceCheck.CERTIFICATE_CHAIN


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_chain_fails_within_the_error_tree(gpus: Silicon, position: int, byte: int) -> None:
    chain = bytearray(gpus.first.certificate_chain)
    changed = chain[position] != byte
    chain[position] = byte
    try:
        gpus.verify(replace(gpus.first, certificate_chain=bytes(chain)))
    except AgentError:
        assert changed


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 850), st.integers(0, 255))
def test_damaged_certificate_der_fails_within_the_error_tree(position: int, byte: int) -> None:
    """In PEM most damage is caught by base64; this reaches the structure of a vendor's leaf."""
    sample = recorded("blackwell_575.32")
    leaf = bytearray(parse_chain(sample.chain).certificates[0].public_bytes(Encoding.DER))
    changed = leaf[position] != byte
    leaf[position] = byte
    chain = pem(bytes(leaf)) + b"".join(certificates(sample.chain)[1:])
    try:
        verify_gpu(replace(sample.evidence, certificate_chain=chain), sample.nonce, (), NOW)
    except AgentError:
        assert changed
