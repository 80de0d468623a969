"""AMD's revocation lists: lists of a root made here, right, and wrong in one way each."""

import dataclasses
import datetime
from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.sim.snp import make_crl
from agent.verify.crl import MAX_CRL_BYTES, check_not_revoked, parse_crl
from tests.shared import shared_data

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
KEY, OTHER_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))
ASK, ARK = 0x20002, 0x20000


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


ROOT, OTHER_ROOT = name("ARK-Genoa"), name("ARK-Milan")


def crl(revoked: Sequence[int] = (), days: tuple[int, int] = (-1, 1), key: rsa.RSAPrivateKey = KEY) -> bytes:
    return make_crl(ROOT, key, revoked, days)


def built(
    extension: x509.ExtensionType | None = None, critical: bool = True, entry: x509.ExtensionType | None = None
) -> x509.CertificateRevocationListBuilder:
    builder = x509.CertificateRevocationListBuilder().issuer_name(ROOT).last_update(NOW - DAY).next_update(NOW + DAY)
    if extension is not None:
        builder = builder.add_extension(extension, critical)
    if entry is not None:
        revoked = x509.RevokedCertificateBuilder().serial_number(7).revocation_date(NOW - DAY)
        builder = builder.add_revoked_certificate(revoked.add_extension(entry, critical=True).build())
    return builder


def der(builder: x509.CertificateRevocationListBuilder) -> bytes:
    pss = padding.PSS(padding.MGF1(SHA384()), salt_length=48)
    return builder.sign(KEY, SHA384(), rsa_padding=pss).public_bytes(Encoding.DER)


def check(*lists: bytes, serials: Sequence[int] = (ASK, ARK), now: datetime.datetime = NOW) -> None:
    check_not_revoked(serials, ROOT, KEY.public_key(), [parse_crl(each) for each in lists], now)


def refused(wanted: EvidenceCheck, *lists: bytes, now: datetime.datetime = NOW) -> EvidenceVerificationError:
    with pytest.raises(EvidenceVerificationError) as caught:
        check(*lists, now=now)
    assert (caught.value.format, caught.value.check) == (EvidenceFormat.SNP_CHAIN, wanted)
    return caught.value


def test_a_chain_on_no_list_passes_whatever_else_was_taken_back() -> None:
    pem = x509.load_der_x509_crl(crl()).public_bytes(Encoding.PEM)
    for lists in ([crl()], [pem], [crl([1, 2, 0x10001])], [make_crl(OTHER_ROOT, OTHER_KEY, [ASK]), crl()]):
        check(*lists)


def test_a_chain_that_was_taken_back_is_refused() -> None:
    error = refused(EvidenceCheck.REVOCATION, crl([5, ASK]))
    assert (error.got, error.expected) == (1, 0)
    assert refused(EvidenceCheck.REVOCATION, crl(), crl([ARK])).got == 1
    assert refused(EvidenceCheck.REVOCATION, crl([ARK]), crl([ASK])).got == 2


def test_what_was_taken_back_stays_so_when_the_list_is_over() -> None:
    refused(EvidenceCheck.REVOCATION, crl([ASK], days=(-20, -10)), crl())


def test_with_lists_there_must_be_one_of_this_root() -> None:
    refused(EvidenceCheck.REVOCATION_LIST)
    refused(EvidenceCheck.REVOCATION_LIST, make_crl(OTHER_ROOT, KEY, []))


def test_a_list_in_the_name_of_the_root_must_be_signed_by_it() -> None:
    refused(EvidenceCheck.REVOCATION_LIST_SIGNATURE, crl(key=OTHER_KEY))
    refused(EvidenceCheck.REVOCATION_LIST_SIGNATURE, crl(), crl(key=OTHER_KEY))
    for signed in (
        built().sign(KEY, SHA384()),  # PKCS #1 v1.5, as a KDS list never is
        built().sign(KEY, SHA256(), rsa_padding=padding.PSS(padding.MGF1(SHA256()), salt_length=32)),
        built().sign(ec.generate_private_key(ec.SECP384R1()), SHA384()),
    ):
        refused(EvidenceCheck.REVOCATION_LIST_SIGNATURE, signed.public_bytes(Encoding.DER))


def test_no_byte_of_the_signed_part_can_be_another() -> None:
    good = crl([1, 2, 3])
    start = good.index(parse_crl(good).signed)
    for place in range(start, start + len(parse_crl(good).signed)):
        changed = bytearray(good)
        changed[place] ^= 1 << place % 8
        with pytest.raises((EvidenceVerificationError, MalformedEvidenceError)):
            check(bytes(changed))


def test_a_list_counts_only_in_its_time() -> None:
    error = refused(EvidenceCheck.REVOCATION_LIST_VALIDITY, crl(), now=NOW + 2 * DAY)
    assert error.got is not None
    assert error.expected == int((NOW + 2 * DAY).timestamp())
    assert abs(error.expected - error.got - DAY.total_seconds()) < DAY.total_seconds() / 2  # made some time ago
    refused(EvidenceCheck.REVOCATION_LIST_VALIDITY, crl(), now=NOW - 2 * DAY)
    refused(EvidenceCheck.REVOCATION_LIST_VALIDITY, crl(days=(-9, -8)), crl(days=(8, 9)))
    check(crl(days=(-9, -8)), crl())


def test_a_list_without_an_end_is_never_current() -> None:
    endless = dataclasses.replace(parse_crl(crl()), until=None)  # RFC 5280 wants one, the encoding does not
    with pytest.raises(EvidenceVerificationError) as caught:
        check_not_revoked([ASK], ROOT, KEY.public_key(), [endless], NOW)
    assert caught.value.check is EvidenceCheck.REVOCATION_LIST_VALIDITY


@pytest.mark.parametrize(
    "builder",
    [
        built(x509.IssuingDistributionPoint(None, None, True, False, None, False, False)),
        built(x509.DeltaCRLIndicator(1)),
        built(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\5\0")),
        built(entry=x509.CertificateIssuer([x509.DirectoryName(OTHER_ROOT)])),
    ],
)
def test_a_list_that_says_more_than_we_understand_is_refused(builder: x509.CertificateRevocationListBuilder) -> None:
    refused(EvidenceCheck.REVOCATION_LIST, der(builder))


def test_what_a_list_says_beside_it_changes_nothing() -> None:
    check(der(built(x509.CRLNumber(4), critical=False)))


@pytest.mark.parametrize(
    "data", [b"", b"junk", b"-----BEGIN X509 CRL-----\n", crl()[:-1], crl() + b"\0", crl(range(1, MAX_CRL_BYTES // 20))]
)
def test_a_list_that_is_none_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedEvidenceError) as caught:
        parse_crl(data)
    assert (caught.value.format, caught.value.field) == (EvidenceFormat.SNP_CHAIN, "revocation_list")


def test_lists_of_another_vendor_parse_and_are_of_no_root_of_amds() -> None:
    intels = shared_data("tdx/collateral/raw-2026-03/root_ca_crl.der").read_bytes()
    refused(EvidenceCheck.REVOCATION_LIST, intels)
    check(intels, crl())


@given(st.binary(max_size=300))
def test_no_bytes_end_in_a_foreign_exception(data: bytes) -> None:
    with pytest.raises(MalformedEvidenceError):
        parse_crl(data)
