"""The SNP verifier against AMD's recorded silicon, simulated silicon, and chains that are wrong in exactly one way."""

import dataclasses
import datetime
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence import Evidence, ReportData, Tee
from agent.evidence.snp_abi import (
    PARSED_VERSIONS,
    REPORT_BYTES,
    SIGNED_BYTES,
    Product,
    SigningKey,
    SnpReport,
    TcbVersion,
    pack_report,
    parse_certificate_table,
)
from agent.sim.machine import SimulatedMachine
from agent.sim.snp import issue_leaf, make_crl, make_report, sign_report
from agent.verify.crl import RevocationList, parse_crl
from agent.verify.snp import ACCEPTED_VERSIONS, AMD_EXTENSIONS, SnpClaims, load_certificate, verify_snp
from tests.shared import shared_data

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
REPORT_DATA = ReportData(bytes(range(64)))
PSS = padding.PSS(padding.MGF1(SHA384()), salt_length=48)


# --- AMD's silicon ----------------------------------------------------------------------------------------------------

VERIFIABLE = (
    "milan-v3-vlek-aws",
    "milan-v3-vcek",
    "milan-v3-vcek-oak-release",
    "milan-v3-vcek-azure",
    "genoa-v3-vcek-configfs",
    "genoa-v3-vcek-azure",
    "genoa-v5-vcek",
)


def recorded(name: str) -> tuple[Evidence, datetime.datetime, dict[str, object]]:
    """The evidence, a day on which its certificates are valid, and the row of the index."""
    row = next(row for row in json.loads(shared_data("snp/index.json").read_text()) if row["name"] == name)
    report, *chain = (
        shared_data(f"snp/{row[key]}").read_bytes() for key in ("report", "endorsement_cert", "intermediate", "root")
    )
    return Evidence(Tee.SNP, report, tuple(chain)), load_certificate(chain[0]).not_valid_before_utc + DAY, row


@pytest.mark.parametrize("name", VERIFIABLE)
def test_a_recorded_report_verifies_under_the_pinned_roots(name: str) -> None:
    evidence, day, row = recorded(name)
    claims = verify_snp(evidence, [], [], day)
    assert claims.product.value == row["product"]
    assert claims.report.measurement.hex() == row["measurement"]
    assert claims.chip_id_hash == hashlib.sha256(bytes.fromhex(str(row["chip_id"]))).hexdigest()
    assert not claims.simulated


@pytest.mark.parametrize("name", VERIFIABLE)
def test_a_recorded_report_with_one_flipped_bit_does_not_verify(name: str) -> None:
    evidence, day, _ = recorded(name)
    for position in (0x004, 0x050, 0x0C0, 0x29F - 0x1A0, SIGNED_BYTES, SIGNED_BYTES + 72):
        changed = bytearray(evidence.report)
        changed[position] ^= 1
        refuse(dataclasses.replace(evidence, report=bytes(changed)), EvidenceCheck.REPORT_SIGNATURE, now=day)


def flipped_bytes_are_refused(evidence: Evidence, day: datetime.datetime, roots: Sequence[x509.Certificate] = ()) -> None:
    """250 places of the signed part and its ends, and every byte behind it, of which no other parser may make anything."""
    verify_snp(evidence, roots, [], day)
    sampled = random.Random(1).sample(range(SIGNED_BYTES), 250)
    for place in {0, SIGNED_BYTES - 1, *sampled, *range(SIGNED_BYTES, REPORT_BYTES)}:
        report = bytearray(evidence.report)
        report[place] ^= 1 << place % 8
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            verify_snp(dataclasses.replace(evidence, report=bytes(report)), roots, [], day)


@pytest.mark.parametrize("name", ["milan-v3-vcek", "milan-v3-vlek-aws", "genoa-v3-vcek-configfs", "genoa-v5-vcek"])
def test_no_byte_of_a_recorded_report_can_be_another(name: str) -> None:
    evidence, day, _ = recorded(name)
    flipped_bytes_are_refused(evidence, day)


@pytest.mark.parametrize(
    "name", ["milan-v2-vcek", "milan-v2-vcek-azure", "milan-v2-vcek-debug-policy", "milan-v2-vcek-reported-older"]
)
def test_a_genuine_version_2_report_is_refused(name: str) -> None:
    evidence, day, _ = recorded(name)
    refuse(evidence, EvidenceCheck.REPORT_VERSION, now=day)


@pytest.mark.parametrize(
    "name", ["milan-v2-vcek", "milan-v2-vcek-azure", "milan-v2-vcek-debug-policy", "milan-v2-vcek-reported-older"]
)
def test_a_genuine_version_2_report_verifies_for_who_asks_for_it(name: str) -> None:
    evidence, day, row = recorded(name)
    claims = verify_snp(evidence, [], [], day, versions=PARSED_VERSIONS)
    assert (claims.report.version, claims.product.value) == (2, row["product"])
    changed = bytearray(evidence.report)
    changed[0x050] ^= 1
    with pytest.raises(EvidenceVerificationError) as refused:
        verify_snp(dataclasses.replace(evidence, report=bytes(changed)), [], [], day, versions=PARSED_VERSIONS)
    assert refused.value.check is EvidenceCheck.REPORT_SIGNATURE


def test_a_recorded_report_does_not_verify_with_the_certificate_of_another_chip() -> None:
    evidence, day, _ = recorded("milan-v3-vcek-azure")
    (other, *_), ask_and_ark = recorded("milan-v3-vcek-oak-release")[0].cert_chain, evidence.cert_chain[1:]
    refuse(dataclasses.replace(evidence, cert_chain=(other, *ask_and_ark)), EvidenceCheck.CERTIFICATE_CHIP_ID, now=day)


def test_a_recorded_report_does_not_verify_with_the_same_chips_invented_certificate() -> None:
    evidence, day, _ = recorded("genoa-v3-vcek-configfs")
    for name in ("vcek-invalid-legacy.der", "vcek-invalid-new.der", "vcek-turin-preprod-unmatched.der"):
        wrong = shared_data(f"snp/certs/{name}").read_bytes()
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            verify_snp(dataclasses.replace(evidence, cert_chain=(wrong, *evidence.cert_chain[1:])), [], [], day)


def test_a_recorded_report_does_not_verify_under_the_intermediate_for_the_other_kind_of_key() -> None:
    evidence, day, _ = recorded("milan-v3-vcek")
    asvk = shared_data("snp/certs/milan-asvk.der").read_bytes()
    chain = (evidence.cert_chain[0], asvk, evidence.cert_chain[2])
    refuse(dataclasses.replace(evidence, cert_chain=chain), EvidenceCheck.CERTIFICATE_CHAIN, now=day)


def test_the_recorded_certificate_table_is_a_complete_chain() -> None:
    evidence, day, _ = recorded("genoa-v3-vcek-configfs")
    entries = parse_certificate_table(shared_data("snp/genoa-v3-vcek-configfs/auxblob.bin").read_bytes())
    with warnings.catch_warnings():  # the serial number 0 of `load_certificate`, here in PEM
        warnings.simplefilter("ignore")
        chain = tuple(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER) for _, pem in entries)
    verify_snp(dataclasses.replace(evidence, cert_chain=chain), [], [], day)


# --- simulated silicon ------------------------------------------------------------------------------------------------


def roots_of(machine: SimulatedMachine) -> list[x509.Certificate]:
    return [x509.load_pem_x509_certificate((machine.roots_dir / "ark.pem").read_bytes())]


def refuse(
    evidence: Evidence,
    check: EvidenceCheck,
    roots: Sequence[x509.Certificate] = (),
    endorsements: Sequence[x509.Certificate] = (),
    now: datetime.datetime = NOW,
) -> None:
    with pytest.raises(EvidenceVerificationError) as refused:
        verify_snp(evidence, roots, endorsements, now)
    assert refused.value.check is check
    about_report = (EvidenceCheck.REPORT_VERSION, EvidenceCheck.REPORT_SIGNATURE, EvidenceCheck.SIGNING_KEY)
    assert refused.value.format is (EvidenceFormat.SNP_REPORT if check in about_report else EvidenceFormat.SNP_CHAIN)


def test_a_simulated_report_verifies_under_its_own_root_and_says_so(machine: SimulatedMachine) -> None:
    claims = verify_snp(machine.attester().collect(REPORT_DATA), roots_of(machine), [], NOW)
    assert claims.simulated
    assert claims.product is Product.GENOA
    assert claims.report.report_data == REPORT_DATA
    assert claims.chip_id_hash == hashlib.sha256(machine.chip_id).hexdigest()


def test_the_serial_number_0_of_leafs_raises_no_warning_here_and_is_loud_elsewhere(machine: SimulatedMachine) -> None:
    leaf = machine.attester().collect(REPORT_DATA).cert_chain[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_certificate(leaf)
        with pytest.raises(CryptographyDeprecationWarning, match="serial number"):
            x509.load_der_x509_certificate(leaf)


def test_a_simulated_report_does_not_verify_under_the_pinned_roots(machine: SimulatedMachine) -> None:
    refuse(machine.attester().collect(REPORT_DATA), EvidenceCheck.CERTIFICATE_CHAIN)


def test_a_debuggable_guest_verifies_and_its_policy_can_be_read(machine: SimulatedMachine) -> None:
    machine.policy |= 1 << 19
    assert verify_snp(machine.attester().collect(REPORT_DATA), roots_of(machine), [], NOW).report.policy.debug


@pytest.mark.parametrize("version", [3, 4, 5])
def test_no_byte_of_a_simulated_report_can_be_another(vendor: "Vendor", version: int) -> None:
    mitigations = 1 if version == 5 else None
    vendor.report = dataclasses.replace(
        vendor.report, version=version, launch_mitigations=mitigations, current_mitigations=mitigations
    )
    evidence = vendor.evidence()
    flipped_bytes_are_refused(evidence, NOW, [load_certificate(evidence.cert_chain[2])])


def test_a_flipped_signature_bit_is_refused(machine: SimulatedMachine) -> None:
    machine.flip_signature_bit = True
    refuse(machine.attester().collect(REPORT_DATA), EvidenceCheck.REPORT_SIGNATURE, roots_of(machine))


def test_a_report_for_another_tcb_than_the_certificate_is_refused(machine: SimulatedMachine) -> None:
    for part in ("bootloader", "tee", "snp", "microcode"):
        machine.tcb = dataclasses.replace(machine.tcb, **{part: 99})
        refuse(machine.attester().collect(REPORT_DATA), EvidenceCheck.CERTIFICATE_TCB, roots_of(machine))


def test_a_report_of_another_chip_than_the_certificate_is_refused(machine: SimulatedMachine) -> None:
    masked = bytes(64)  # what a host that masks the chip id gives
    for other in (masked, machine.chip_id[:8] + bytes(56), machine.chip_id[:-1] + bytes((machine.chip_id[-1] ^ 1,))):
        machine.chip_id = other
        refuse(machine.attester().collect(REPORT_DATA), EvidenceCheck.CERTIFICATE_CHIP_ID, roots_of(machine))


def test_certificates_are_valid_only_in_their_time(machine: SimulatedMachine) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    refuse(evidence, EvidenceCheck.CERTIFICATE_VALIDITY, roots_of(machine), now=NOW - 30 * DAY)
    refuse(evidence, EvidenceCheck.CERTIFICATE_VALIDITY, roots_of(machine), now=NOW + 10 * 365 * DAY)


def test_certificates_may_come_from_the_verifier_alone_in_any_order_among_others(
    machine: SimulatedMachine, silicon: Path, tmp_path: Path
) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    other = SimulatedMachine.create(tmp_path / "other", silicon=silicon).attester().collect(REPORT_DATA)
    endorsements = [load_certificate(der) for der in (*other.cert_chain, *reversed(evidence.cert_chain))]
    bare = dataclasses.replace(evidence, cert_chain=())
    assert verify_snp(bare, roots_of(machine), endorsements, NOW).report.chip_id == machine.chip_id
    refuse(bare, EvidenceCheck.CERTIFICATE_CHAIN, roots_of(machine))
    refuse(bare, EvidenceCheck.CERTIFICATE_CHIP_ID, roots_of(machine), endorsements[:3])


def test_the_hosts_chain_needs_no_root_when_the_verifier_has_it(machine: SimulatedMachine) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    verify_snp(dataclasses.replace(evidence, cert_chain=evidence.cert_chain[:2]), roots_of(machine), [], NOW)


def test_a_certificate_that_is_none_is_malformed(machine: SimulatedMachine) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    for junk in (b"", b"junk", evidence.cert_chain[0][:-1], evidence.cert_chain[0] + b"\0"):
        with pytest.raises(MalformedEvidenceError):
            verify_snp(dataclasses.replace(evidence, cert_chain=(*evidence.cert_chain, junk)), roots_of(machine), [], NOW)


COMMON_NAME = b"\x06\x03\x55\x04\x03"


@pytest.mark.parametrize("root", ["trusted", "unknown"])
@pytest.mark.parametrize(
    "value", [b"\x03\x08\x00EV-VCEK", b"\x03\x08\xffEV-VCEK", b"\x1e\x08\xd8\x00V-VCEK", b"\x00\x08SEV-VCEK"]
)
def test_a_name_that_the_library_chokes_on_is_malformed(machine: SimulatedMachine, value: bytes, root: str) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    leaf, *issuers = evidence.cert_chain
    hostile = leaf.replace(COMMON_NAME + b"\x0c\x08SEV-VCEK", COMMON_NAME + value)
    assert hostile != leaf
    with pytest.raises(MalformedEvidenceError) as refused:
        verify_snp(
            dataclasses.replace(evidence, cert_chain=(hostile, *issuers)),
            roots_of(machine) if root == "trusted" else (),
            [],
            NOW,
        )
    assert refused.value.field == "certificate"


# --- a vendor that gets one thing wrong -------------------------------------------------------------------------------


@dataclasses.dataclass
class Vendor:
    """A chain of which every part can be spoiled. RSA-2048, because the key size is not what these tests are about."""

    ark_key: rsa.RSAPrivateKey
    ask_key: rsa.RSAPrivateKey
    leaf_key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    report: SnpReport
    ark_name: str = "ARK-SIMULATED-Genoa"
    leaf_name: str = "SEV-VCEK"
    ark_is_ca: bool = True
    ask_is_ca: bool = True
    ask_usage: bool | None = True
    ask_certifies: ec.EllipticCurvePrivateKey | None = None
    ask_signer: rsa.RSAPrivateKey | None = None
    leaf_signer: rsa.RSAPrivateKey | None = None
    leaf_padding: padding.PSS | padding.PKCS1v15 = dataclasses.field(default_factory=lambda: PSS)
    leaf_critical: bool = False
    ask_days: int = 10
    ark_days: int = 10
    changes: dict[str, bytes | None] = dataclasses.field(default_factory=dict)

    def certificate(
        self, subject: str, issuer: str, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, days: int
    ) -> x509.CertificateBuilder:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
        return builder.serial_number(1).not_valid_before(NOW - 20 * DAY).not_valid_after(NOW + days * DAY)

    def chain(self) -> tuple[bytes, bytes, bytes]:
        def issuer(builder: x509.CertificateBuilder, ca: bool, usage: bool | None) -> x509.CertificateBuilder:
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            if usage is None:
                return builder
            flags = x509.KeyUsage(False, False, False, False, False, usage, True, False, False)
            return builder.add_extension(flags, critical=True)

        ark = issuer(self.certificate(self.ark_name, self.ark_name, self.ark_key, self.ark_days), self.ark_is_ca, True)
        ask = issuer(
            self.certificate("ASK", self.ark_name, self.ask_certifies or self.ask_key, self.ask_days),
            self.ask_is_ca,
            self.ask_usage,
        )
        leaf = self.certificate(self.leaf_name, "ASK", self.leaf_key, 10)
        extensions: dict[str, bytes | None] = {"3.1": b"\2\1\x0a", "3.2": b"\2\1\0", "3.3": b"\2\1\x17", "3.8": b"\2\1\x54"}
        extensions |= {"4": self.report.chip_id} | self.changes
        for suffix, value in extensions.items():
            if value is not None:
                extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(AMD_EXTENSIONS + suffix), value)
                leaf = leaf.add_extension(extension, critical=self.leaf_critical)
        return (
            leaf.sign(self.leaf_signer or self.ask_key, SHA384(), rsa_padding=self.leaf_padding).public_bytes(Encoding.DER),
            ask.sign(self.ask_signer or self.ark_key, SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER),
            ark.sign(self.ark_key, SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER),
        )

    def evidence(self) -> Evidence:
        signer = (
            self.leaf_key if isinstance(self.leaf_key, ec.EllipticCurvePrivateKey) else ec.generate_private_key(ec.SECP384R1())
        )
        return Evidence(Tee.SNP, sign_report(self.report, signer), self.chain())

    def verify(self, root: bytes | None = None, versions: range = ACCEPTED_VERSIONS) -> SnpClaims:
        evidence = self.evidence()
        return verify_snp(evidence, [load_certificate(root or evidence.cert_chain[2])], [], NOW, versions=versions)


@pytest.fixture(scope="module")
def rsa_keys() -> tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey]:
    return rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)


@pytest.fixture
def vendor(rsa_keys: tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey], machine: SimulatedMachine) -> Vendor:
    return Vendor(*rsa_keys, ec.generate_private_key(ec.SECP384R1()), make_report(machine, REPORT_DATA))


def test_an_unspoiled_vendor_verifies(vendor: Vendor) -> None:
    assert vendor.verify().simulated


def test_a_root_passed_in_without_the_simulated_mark_is_not_called_simulated(vendor: Vendor) -> None:
    vendor.ark_name = "ARK-Genoa"
    assert not vendor.verify().simulated


def spoil(**fields: object) -> Callable[[Vendor], None]:
    def apply(vendor: Vendor) -> None:
        for name, value in fields.items():
            setattr(vendor, name, value)

    return apply


SPOILED_CHAINS: dict[str, Callable[[Vendor], None]] = {
    "root of another processor generation": spoil(ark_name="ARK-SIMULATED-Milan"),
    "root is no CA": spoil(ark_is_ca=False),
    "intermediate is no CA": spoil(ask_is_ca=False),
    "intermediate may not sign certificates": spoil(ask_usage=False),
    "intermediate has no key usage": spoil(ask_usage=None),
    "intermediate with a key that is not RSA": lambda v: setattr(v, "ask_certifies", v.leaf_key),
    "intermediate signed by somebody else": lambda v: setattr(v, "ask_signer", v.ask_key),
    "leaf signed by the root": lambda v: setattr(v, "leaf_signer", v.ark_key),
    "leaf signed with PKCS#1 v1.5": spoil(leaf_padding=padding.PKCS1v15()),
    "leaf signed with a salt of another length": spoil(leaf_padding=padding.PSS(padding.MGF1(SHA384()), salt_length=32)),
    "leaf with critical extensions": spoil(leaf_critical=True),
    "leaf with a P-256 key": lambda v: setattr(v, "leaf_key", ec.generate_private_key(ec.SECP256R1())),
    "leaf with an RSA key": lambda v: setattr(v, "leaf_key", v.ask_key),
    "leaf with another name": spoil(leaf_name="SEV-VLEK"),
}


@pytest.mark.parametrize("name", SPOILED_CHAINS)
def test_a_spoiled_chain_is_refused(vendor: Vendor, name: str) -> None:
    SPOILED_CHAINS[name](vendor)
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert (refused.value.format, refused.value.check) == (EvidenceFormat.SNP_CHAIN, EvidenceCheck.CERTIFICATE_CHAIN)


@pytest.mark.parametrize("field", ["ask_days", "ark_days"])
def test_intermediate_and_root_must_be_valid_too(vendor: Vendor, field: str) -> None:
    setattr(vendor, field, -1)
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert refused.value.check is EvidenceCheck.CERTIFICATE_VALIDITY


def test_a_root_of_the_same_name_with_another_key_is_not_trusted(vendor: Vendor) -> None:
    other = dataclasses.replace(vendor, ark_key=vendor.ask_key)
    refuse(vendor.evidence(), EvidenceCheck.CERTIFICATE_CHAIN, [load_certificate(other.chain()[2])])


def test_the_verifiers_own_intermediate_comes_before_the_hosts(vendor: Vendor) -> None:
    evidence = vendor.evidence()
    expired = dataclasses.replace(vendor, ask_days=-1).chain()[1]
    leaf, ask, ark = evidence.cert_chain
    hostile = dataclasses.replace(evidence, cert_chain=(leaf, expired, ark))
    verify_snp(hostile, [load_certificate(ark)], [load_certificate(ask)], NOW)
    refuse(hostile, EvidenceCheck.CERTIFICATE_VALIDITY, [load_certificate(ark)])


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("3.1", None), ("3.2", None), ("3.3", None), ("3.8", None), ("3.8", b""), ("3.8", b"\x54"), ("3.8", b"\2\1\x54\0"),
        ("3.8", b"\2\2\0\x54"), ("3.8", b"\2\1\x80"), ("3.8", b"\2\2\1\x80"), ("3.8", b"\4\1\x54"), ("3.9", b"\2\1"),
        ("4", None), ("4", b""), ("4", bytes(63)), ("4", bytes(65)), ("4", b"\4\x3f" + bytes(64)),
    ],
)  # fmt: skip
def test_a_malformed_leaf_extension_is_named(vendor: Vendor, suffix: str, value: bytes | None) -> None:
    vendor.changes = {suffix: value}
    with pytest.raises(MalformedEvidenceError) as refused:
        vendor.verify()
    assert refused.value.field == ("hwid_extension" if suffix == "4" else "tcb_extension")


def test_a_level_above_127_has_a_leading_zero_in_the_certificate(vendor: Vendor) -> None:
    vendor.report = dataclasses.replace(
        vendor.report, reported_tcb=dataclasses.replace(vendor.report.reported_tcb, microcode=219)
    )
    vendor.changes = {"3.8": b"\2\2\0\xdb"}
    assert vendor.verify().report.reported_tcb.microcode == 219


def test_the_chip_id_may_be_wrapped_in_an_octet_string(vendor: Vendor) -> None:
    vendor.changes = {"4": b"\4\x40" + vendor.report.chip_id}
    vendor.verify()


def test_a_bare_chip_id_is_not_taken_for_a_wrapped_one(vendor: Vendor) -> None:
    vendor.report = dataclasses.replace(vendor.report, chip_id=b"\4\x40" + bytes(range(62)))
    assert vendor.verify().report.chip_id[:2] == b"\4\x40"


def turin(vendor: Vendor) -> None:
    tcb = TcbVersion(fmc=1, bootloader=10, tee=0, snp=23, microcode=84)
    vendor.report = dataclasses.replace(
        vendor.report, current_tcb=tcb, reported_tcb=tcb, committed_tcb=tcb, launch_tcb=tcb,
        cpuid_family=0x1A, cpuid_model=0x02, chip_id=b"\x04\x06chipid" + bytes(56),
    )  # fmt: skip
    vendor.ark_name = "ARK-SIMULATED-Turin"
    vendor.changes = {"3.9": b"\2\1\1", "4": vendor.report.chip_id[:8]}


def test_a_turin_chip_has_a_short_id_and_an_fmc_level(vendor: Vendor) -> None:
    turin(vendor)
    assert vendor.verify().product is Product.TURIN
    vendor.changes["4"] = b"\4\x08" + vendor.report.chip_id[:8]
    vendor.verify()


@pytest.mark.parametrize("fmc", [None, b"\2\1\2"])
def test_a_turin_chip_needs_a_certificate_for_its_fmc_level(vendor: Vendor, fmc: bytes | None) -> None:
    turin(vendor)
    vendor.changes["3.9"] = fmc
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert refused.value.check is EvidenceCheck.CERTIFICATE_TCB


# --- revocation -------------------------------------------------------------------------------------------------------

ASK_SERIAL = 1


def listed(vendor: Vendor, revoked: Sequence[int], **changes: object) -> RevocationList:
    """The list of the vendor's ARK."""
    issuer = load_certificate(vendor.chain()[2]).subject
    return parse_crl(make_crl(issuer, vendor.ark_key, revoked, **changes))  # type: ignore[arg-type]


def test_a_chain_is_held_against_lists_where_there_are_any(vendor: Vendor) -> None:
    evidence = vendor.evidence()
    roots = [load_certificate(evidence.cert_chain[2])]
    assert not verify_snp(evidence, roots, [], NOW).revocation_checked
    assert verify_snp(evidence, roots, [], NOW, [listed(vendor, [2, 3])]).revocation_checked
    for lists, check in (
        ([listed(vendor, [ASK_SERIAL])], EvidenceCheck.REVOCATION),
        ([listed(vendor, [roots[0].serial_number])], EvidenceCheck.REVOCATION),
        ([], EvidenceCheck.REVOCATION_LIST),
        ([listed(vendor, [], days=(-9, -8))], EvidenceCheck.REVOCATION_LIST_VALIDITY),
        (
            [dataclasses.replace(listed(vendor, []), signature=bytes(256))],
            EvidenceCheck.REVOCATION_LIST_SIGNATURE,
        ),
    ):
        with pytest.raises(EvidenceVerificationError) as refused:
            verify_snp(evidence, roots, [], NOW, lists)
        assert (refused.value.check, refused.value.format) == (check, EvidenceFormat.SNP_CHAIN)


def test_no_chain_of_silicon_passes_a_list_in_its_roots_name_that_is_not_amds(vendor: Vendor) -> None:
    evidence, day, _ = recorded("milan-v3-vcek")
    forged = parse_crl(make_crl(load_certificate(evidence.cert_chain[2]).subject, vendor.ark_key, []))
    with pytest.raises(EvidenceVerificationError) as refused:
        verify_snp(evidence, [], [], day, [forged])
    assert refused.value.check is EvidenceCheck.REVOCATION_LIST_SIGNATURE


# --- signing keys -----------------------------------------------------------------------------------------------------


def vlek_evidence(
    machine: SimulatedMachine, signing_key: SigningKey, name: str, chip_id: bytes | None, mask_chip_key: bool = False
) -> Evidence:
    key = ec.generate_private_key(ec.SECP384R1())
    report = dataclasses.replace(
        make_report(machine, REPORT_DATA), signing_key=signing_key, chip_id=bytes(64), mask_chip_key=mask_chip_key
    )
    leaf = issue_leaf(machine.silicon, key.public_key(), name, machine.tcb, chip_id)
    return Evidence(Tee.SNP, sign_report(report, key), (leaf, *machine.attester().collect(REPORT_DATA).cert_chain[1:]))


def test_a_vlek_signs_for_a_fleet_and_names_no_chip(machine: SimulatedMachine) -> None:
    evidence = vlek_evidence(machine, SigningKey.VLEK, "SEV-VLEK", None)
    claims = verify_snp(evidence, roots_of(machine), [], NOW)
    assert claims.report.signing_key is SigningKey.VLEK
    assert claims.chip_id_hash == hashlib.sha256(bytes(64)).hexdigest()


def test_a_vlek_signs_though_the_key_of_the_chip_is_masked(machine: SimulatedMachine) -> None:
    evidence = vlek_evidence(machine, SigningKey.VLEK, "SEV-VLEK", None, mask_chip_key=True)
    assert verify_snp(evidence, roots_of(machine), [], NOW).report.mask_chip_key
    unsigned = evidence.report[:SIGNED_BYTES].ljust(REPORT_BYTES, b"\0")
    refuse(dataclasses.replace(evidence, report=unsigned), EvidenceCheck.REPORT_SIGNATURE, roots_of(machine))


def test_what_newer_firmware_says_of_the_platform_is_a_claim(vendor: Vendor) -> None:
    vendor.report = dataclasses.replace(vendor.report, platform_info=1 << 63 | 1 << 6 | 0x25)
    assert vendor.verify().report.platform_info == 1 << 63 | 1 << 6 | 0x25


def test_the_certificate_must_be_of_the_kind_the_report_names(machine: SimulatedMachine) -> None:
    for signing_key, name in ((SigningKey.VCEK, "SEV-VLEK"), (SigningKey.VLEK, "SEV-VCEK")):
        evidence = vlek_evidence(machine, signing_key, name, bytes(64))
        refuse(evidence, EvidenceCheck.CERTIFICATE_CHAIN, roots_of(machine))


@pytest.mark.parametrize("changes", [{"mask_chip_key": True}, {"signing_key": SigningKey.NONE}])
def test_an_unsigned_report_is_refused_before_its_signature_is_looked_at(
    machine: SimulatedMachine, changes: dict[str, object]
) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    report = pack_report(dataclasses.replace(make_report(machine, REPORT_DATA), **changes))  # type: ignore[arg-type]
    refuse(dataclasses.replace(evidence, report=report), EvidenceCheck.SIGNING_KEY, roots_of(machine))


def test_a_simulated_version_2_report_is_refused_and_versions_4_and_5_are_not(vendor: Vendor) -> None:
    v3 = vendor.report
    vendor.report = dataclasses.replace(v3, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None)
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert refused.value.check is EvidenceCheck.REPORT_VERSION
    assert vendor.verify(versions=PARSED_VERSIONS).product is Product.GENOA  # which the root says
    vendor.report = dataclasses.replace(v3, version=4)
    vendor.verify()
    vendor.report = dataclasses.replace(v3, version=5, launch_mitigations=1, current_mitigations=1)
    vendor.verify()


def test_a_report_of_an_unknown_processor_is_refused(vendor: Vendor) -> None:
    vendor.report = dataclasses.replace(vendor.report, cpuid_model=0x20)
    with pytest.raises(MalformedEvidenceError):
        vendor.verify()


# --- anything at all --------------------------------------------------------------------------------------------------


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_change_of_evidence_verifies_or_ends_in_a_foreign_exception(machine: SimulatedMachine, data: st.DataObject) -> None:
    evidence = machine.attester().collect(REPORT_DATA)
    parts = [evidence.report, *evidence.cert_chain]
    which = data.draw(st.integers(0, 2))  # the ARK in the chain is not used: the verifier has its own
    part = bytearray(parts[which])
    last = len(part) - 1
    if which:  # a certificate says its signature algorithm a second time outside the signed part: we read neither
        last = 4 + len(load_certificate(parts[which]).tbs_certificate_bytes) - 1
    for position in data.draw(st.sets(st.integers(0, last), min_size=1, max_size=3)):
        part[position] ^= data.draw(st.integers(1, 255))
    parts[which] = bytes(part)
    with pytest.raises(AgentError):
        verify_snp(Evidence(Tee.SNP, parts[0], tuple(parts[1:])), roots_of(machine), [], NOW)


@given(st.binary(max_size=1200), st.lists(st.binary(max_size=100), max_size=3))
def test_no_bytes_verify_or_end_in_a_foreign_exception(report: bytes, chain: list[bytes]) -> None:
    with pytest.raises(AgentError):
        verify_snp(Evidence(Tee.SNP, report, tuple(chain)), [], [], NOW)
