"""PCK chains that are wrong in exactly one way, revocation lists, and the SGX extension byte for byte."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import AgentError, EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.evidence.tdx_abi import parse_quote
from agent.sim.tdx import make_pck_extension
from agent.verify.pck import (
    MAX_CHAIN_BYTES,
    SGX_EXTENSION,
    PckConfiguration,
    PckExtension,
    VerifiedPck,
    pack_pck_extension,
    parse_pck_extension,
    verify_pck_chain,
)
from tests.shared import shared_data

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
EXTENSION = make_pck_extension(bytes(range(64)))
PROCESSOR = dataclasses.replace(EXTENSION, platform_instance_id=None, configuration=None)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclasses.dataclass
class Vendor:
    """A chain of which every part can be spoiled."""

    root_key: ec.EllipticCurvePrivateKey = dataclasses.field(default_factory=p256)
    ca_key: ec.EllipticCurvePrivateKey = dataclasses.field(default_factory=p256)
    leaf_key: Key = dataclasses.field(default_factory=p256)
    root_name: str = "SIMULATED root"
    leaf_issuer: str = "CA"
    root_is_ca: bool = True
    ca_is_ca: bool = True
    ca_issues: bool = True
    leaf_is_ca: bool = False
    leaf_issues: bool = False
    leaf_signs: bool = True
    root_path_length: int | None = 1
    ca_signer: ec.EllipticCurvePrivateKey | None = None
    leaf_signer: ec.EllipticCurvePrivateKey | None = None
    leaf_hash: SHA256 | SHA384 = dataclasses.field(default_factory=SHA256)
    leaf_critical: bool = False
    leaf_usage: bool = True
    root_days: int = 10
    ca_days: int = 10
    leaf_days: int = 10
    extension: bytes | None = dataclasses.field(default_factory=lambda: pack_pck_extension(EXTENSION))

    def chain(self) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
        root = self._builder(self.root_name, self.root_name, self.root_key, self.root_days, 1)
        root = self._profile(root, self.root_is_ca, True, False, self.root_path_length)
        ca = self._builder("CA", self.root_name, self.ca_key, self.ca_days, 2)
        ca = self._profile(ca, self.ca_is_ca, self.ca_issues, False, 0)
        leaf = self._builder("PCK", self.leaf_issuer, self.leaf_key, self.leaf_days, 3)
        if self.leaf_usage:
            leaf = self._profile(leaf, self.leaf_is_ca, self.leaf_issues, self.leaf_signs, None)
        if self.extension is not None:
            leaf = leaf.add_extension(x509.UnrecognizedExtension(SGX_EXTENSION, self.extension), critical=self.leaf_critical)
        return (
            leaf.sign(self.leaf_signer or self.ca_key, self.leaf_hash),
            ca.sign(self.ca_signer or self.root_key, SHA256()),
            root.sign(self.root_key, SHA256()),
        )

    def _builder(self, subject: str, issuer: str, key: Key, days: int, serial: int) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
        return builder.serial_number(serial).not_valid_before(NOW - 20 * DAY).not_valid_after(NOW + days * DAY)

    @staticmethod
    def _profile(
        builder: x509.CertificateBuilder, ca: bool, issues: bool, signs: bool, path_length: int | None
    ) -> x509.CertificateBuilder:
        usage = x509.KeyUsage(signs, False, False, False, False, issues, issues, False, False)
        constraints = x509.BasicConstraints(ca, path_length if ca else None)
        return builder.add_extension(usage, critical=True).add_extension(constraints, critical=True)

    def crl(
        self, issuer: str, key: ec.EllipticCurvePrivateKey, revoked: Sequence[int] = (), days: int = 5, since: int = -10
    ) -> x509.CertificateRevocationList:
        builder = x509.CertificateRevocationListBuilder().issuer_name(name(issuer))
        builder = builder.last_update(NOW + since * DAY).next_update(NOW + days * DAY)
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - 11 * DAY).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key, SHA256())

    def verify(self, crls: Sequence[x509.CertificateRevocationList] = ()) -> VerifiedPck:
        chain = self.chain()
        return verify_pck_chain(pem(chain), [chain[2]], NOW, crls)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def pem(chain: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)


def spoil(**fields: object) -> Callable[[Vendor], None]:
    def apply(vendor: Vendor) -> None:
        for field, value in fields.items():
            setattr(vendor, field, value)

    return apply


@pytest.mark.parametrize("path_length", [1, 2, None])
def test_an_unspoiled_chain_verifies(path_length: int | None) -> None:
    pck = Vendor(root_path_length=path_length).verify()
    assert pck.extension == EXTENSION
    assert (pck.simulated, pck.revocation_checked) == (True, False)


def test_a_root_passed_in_without_the_simulated_mark_is_not_called_simulated() -> None:
    assert not Vendor(root_name="Intel SGX Root CA").verify().simulated


SPOILED: dict[str, Callable[[Vendor], None]] = {
    "root is no CA": spoil(root_is_ca=False),
    "root allows no intermediate": spoil(root_path_length=0),
    "intermediate is no CA": spoil(ca_is_ca=False),
    "intermediate may not sign certificates": spoil(ca_issues=False),
    "intermediate signed by somebody else": lambda v: setattr(v, "ca_signer", v.ca_key),
    "leaf signed by the root": lambda v: setattr(v, "leaf_signer", v.root_key),
    "leaf signed with another hash": spoil(leaf_hash=SHA384()),
    "leaf of another issuer": spoil(leaf_issuer="SIMULATED root"),
    "leaf that is a CA": spoil(leaf_is_ca=True, leaf_issues=True),
    "leaf that may not sign": spoil(leaf_signs=False),
    "leaf with a critical extension": spoil(leaf_critical=True),
}


@pytest.mark.parametrize("defect", SPOILED)
def test_a_spoiled_chain_is_refused(defect: str) -> None:
    vendor = Vendor()
    SPOILED[defect](vendor)
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert (refused.value.format, refused.value.check) == (EvidenceFormat.TDX_CHAIN, EvidenceCheck.CERTIFICATE_CHAIN)


@pytest.mark.parametrize("field", ["root_days", "ca_days", "leaf_days"])
def test_every_certificate_must_be_valid_and_the_text_says_since_when_it_is_not(field: str) -> None:
    vendor = Vendor()
    setattr(vendor, field, -1)
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify()
    assert refused.value.check is EvidenceCheck.CERTIFICATE_VALIDITY
    assert (refused.value.got, refused.value.expected) == (int(NOW.timestamp()), int((NOW - DAY).timestamp()))


def test_a_root_of_the_same_name_with_another_key_is_not_trusted() -> None:
    vendor = Vendor()
    other = dataclasses.replace(vendor, root_key=p256()).chain()[2]
    with pytest.raises(EvidenceVerificationError) as refused:
        verify_pck_chain(pem(vendor.chain()), [other], NOW)
    assert refused.value.check is EvidenceCheck.CERTIFICATE_CHAIN


def test_the_order_is_leaf_issuer_root() -> None:
    leaf, ca, root = Vendor().chain()
    for order in ((ca, leaf, root), (root, ca, leaf), (leaf, root, ca)):
        with pytest.raises(EvidenceVerificationError):
            verify_pck_chain(pem(order), [root], NOW)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda chain: b"", "certificate"),
        (lambda chain: pem(chain[:2]), "number_of_certificates"),
        (lambda chain: pem((*chain, chain[2])), "number_of_certificates"),
        (lambda chain: pem(chain)[:-40], "number_of_certificates"),
        (lambda chain: pem(chain).replace(b"MII", b"AAA", 1), "certificate"),
        (lambda chain: pem(chain).ljust(MAX_CHAIN_BYTES + 1, b"\n"), "length"),
    ],
)
def test_a_chain_that_is_not_three_certificates_is_malformed(change: Callable[..., bytes], field: str) -> None:
    chain = Vendor().chain()
    with pytest.raises(MalformedEvidenceError) as refused:
        verify_pck_chain(change(chain), [chain[2]], NOW)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("vendor", "field"),
    [
        (Vendor(leaf_key=ec.generate_private_key(ec.SECP384R1())), "public_key"),
        (Vendor(leaf_key=rsa.generate_private_key(65537, 2048)), "public_key"),
        (Vendor(leaf_usage=False), "certificate"),
        (Vendor(extension=None), "sgx_extension"),
        (Vendor(extension=b""), "sgx_extension"),
    ],
)
def test_a_leaf_outside_intels_profile_is_malformed(vendor: Vendor, field: str) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        vendor.verify()
    assert refused.value.field == field


# --- revocation -------------------------------------------------------------------------------------------------------


def test_lists_that_do_not_name_the_chain_take_nothing_back() -> None:
    vendor = Vendor()
    lists = [vendor.crl("SIMULATED root", vendor.root_key, [3]), vendor.crl("CA", vendor.ca_key, [2, 77])]
    assert vendor.verify(lists).revocation_checked
    assert vendor.verify([vendor.crl("another CA", vendor.ca_key), *lists]).revocation_checked


@pytest.mark.parametrize(("root_revokes", "ca_revokes"), [([2], []), ([], [3])])
def test_a_certificate_that_was_taken_back_is_refused(root_revokes: list[int], ca_revokes: list[int]) -> None:
    vendor = Vendor()
    lists = [vendor.crl("SIMULATED root", vendor.root_key, root_revokes), vendor.crl("CA", vendor.ca_key, ca_revokes)]
    with pytest.raises(EvidenceVerificationError) as refused:
        vendor.verify(lists)
    assert refused.value.check is EvidenceCheck.REVOCATION


def test_with_lists_each_issuer_needs_one_that_is_its_own_and_current() -> None:
    vendor = Vendor()
    root, ca = vendor.crl("SIMULATED root", vendor.root_key), vendor.crl("CA", vendor.ca_key)
    for lists in (
        [root],
        [ca],
        [root, vendor.crl("CA", p256())],
        [root, vendor.crl("CA", vendor.ca_key, days=-1)],
        [vendor.crl("SIMULATED root", vendor.root_key, days=-1), ca],
        [root, vendor.crl("CA", vendor.ca_key, since=1)],
        [vendor.crl("SIMULATED root", vendor.root_key, since=1), ca],
    ):
        with pytest.raises(EvidenceVerificationError) as refused:
            vendor.verify(lists)
        assert refused.value.check is EvidenceCheck.REVOCATION_LIST


# --- the SGX extension ------------------------------------------------------------------------------------------------

EXTENSIONS: dict[str, PckExtension] = {
    "platform": EXTENSION,
    "processor": PROCESSOR,
    "large numbers": dataclasses.replace(EXTENSION, tcb=(255, 128, 127, *[0] * 13), pce_svn=65535),
    "configuration says little": dataclasses.replace(EXTENSION, configuration=PckConfiguration(cached_keys=True)),
    "configuration says nothing": dataclasses.replace(EXTENSION, configuration=PckConfiguration()),
}


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_an_extension_is_what_was_packed(kind: str) -> None:
    assert parse_pck_extension(pack_pck_extension(EXTENSIONS[kind])) == EXTENSIONS[kind]


def test_every_recorded_extension_round_trips() -> None:
    for row in json.loads(shared_data("tdx/index.json").read_text()):
        if "quote" not in row:
            continue
        quote = parse_quote(shared_data(f"tdx/{row['quote']}").read_bytes(), ignore_trailing=True)
        pck = x509.load_pem_x509_certificates(quote.pck_chain.removesuffix(b"\0"))[0]
        (der,) = (
            extension.value.value
            for extension in pck.extensions
            if isinstance(extension.value, x509.UnrecognizedExtension) and extension.oid == SGX_EXTENSION
        )
        extension = parse_pck_extension(der)
        assert pack_pck_extension(extension) == der, row["name"]
        assert extension.fmspc.hex() == row["fmspc"], row["name"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ppid": bytes(15)},
        {"cpu_svn": bytes(17)},
        {"pce_id": b""},
        {"fmspc": bytes(7)},
        {"sgx_type": 3},
        {"tcb": EXTENSION.tcb[:15]},
        {"tcb": (256, *EXTENSION.tcb[1:])},
        {"pce_svn": 65536},
        {"platform_instance_id": bytes(8)},
    ],
)
def test_values_outside_the_profile_are_malformed(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidenceError) as refused:
        parse_pck_extension(pack_pck_extension(dataclasses.replace(EXTENSION, **changes)))  # type: ignore[arg-type]
    assert refused.value.format is EvidenceFormat.TDX_CHAIN


def test_an_extension_cut_short_or_longer_is_malformed() -> None:
    der = pack_pck_extension(EXTENSION)
    for changed in (*(der[:size] for size in range(len(der))), der + b"\0", der.replace(b"\x01\x01\xff", b"\x01\x01\x01")):
        with pytest.raises(MalformedEvidenceError):
            parse_pck_extension(changed)


@given(st.lists(st.tuples(st.integers(0, 553), st.integers(0, 255)), max_size=4))
def test_whatever_is_accepted_packs_to_the_same_bytes(changes: list[tuple[int, int]]) -> None:
    der = bytearray(pack_pck_extension(EXTENSION))
    for position, value in changes:
        der[position % len(der)] = value
    try:
        assert pack_pck_extension(parse_pck_extension(bytes(der))) == der
    except MalformedEvidenceError:
        return


@given(st.binary(max_size=600))
def test_no_bytes_verify_or_end_in_a_foreign_exception(data: bytes) -> None:
    with pytest.raises(AgentError):
        verify_pck_chain(data, [], NOW)
    with pytest.raises(AgentError):
        parse_pck_extension(data)
