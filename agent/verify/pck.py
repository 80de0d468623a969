"""PCK certificates: what Intel certifies of a platform, and the chain from a quote to Intel's root.

Owns the chain, its revocation lists and the SGX extension of the PCK certificate. Does not judge TCB levels: that needs
Intel's TCB information (`tdx_collateral.py`).

Spec: Intel "SGX PCK Certificate and Certificate Revocation List Profile Specification" 1.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtensionOID, NameOID

from agent.closed import Ident
from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.verify.roots import INTEL_SGX_ROOT_SHA256, SIMULATED_MARK, UNREADABLE, fingerprint

SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
CHAIN_CERTIFICATES = 3  # PCK certificate, Platform or Processor CA, root
MAX_CHAIN_BYTES = 16 << 10
TCB_COMPONENTS = 16
_UNDERSTOOD_CRITICAL = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}


@dataclass(frozen=True, slots=True)
class PckConfiguration:
    """How the platform is set up; None where the certificate does not say."""

    dynamic_platform: bool | None = None
    cached_keys: bool | None = None
    smt_enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class PckExtension:
    """The SGX extension of a PCK certificate.

    Attributes:
        ppid: identifies the platform.
        tcb: security version of each of the 16 components, 0 to 255.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
        platform_instance_id: None, like `configuration`, from the Processor CA.
    """

    ppid: bytes  # 16
    tcb: tuple[int, ...]
    pce_svn: int  # 0 to 65535
    cpu_svn: bytes  # 16
    pce_id: bytes  # 2
    fmspc: bytes  # 6
    sgx_type: int
    platform_instance_id: bytes | None = None  # 16
    configuration: PckConfiguration | None = None


@dataclass(frozen=True, slots=True)
class VerifiedPck:
    """A platform's certified key. Only `verify_pck_chain` makes one.

    Attributes:
        revocation_checked: lists were given, and neither certificate is on them.
        simulated: the root is a simulated one; always False under Intel's own.
    """

    key: ec.EllipticCurvePublicKey
    extension: PckExtension
    revocation_checked: bool
    simulated: bool


def verify_pck_chain(
    pem: bytes,
    roots: Sequence[x509.Certificate],
    now: datetime,
    crls: Sequence[x509.CertificateRevocationList] = (),
) -> VerifiedPck:
    """The key of the first certificate in `pem`, verified up to a root.

    Args:
        pem: PCK certificate, its issuer and the root, as a quote has them: a zero byte may follow.
        roots: root certificates trusted beside Intel's pinned one.
        now: the moment certificates and lists must be valid at, with time zone.
        crls: Intel's revocation lists. Without any, revocation is not looked at; with one, root and issuer need theirs.

    Raises:
        MalformedEvidenceError: a certificate, list or extension does not parse.
        EvidenceVerificationError: a check failed; `check` says which.
    """
    # 1. Three certificates, in the order of the specification. The root is one of ours, by its fingerprint.
    leaf, intermediate, root = _parse_chain(pem)
    trusted = {INTEL_SGX_ROOT_SHA256} | {fingerprint(each) for each in roots}
    # refusal: test_a_root_of_the_same_name_with_another_key_is_not_trusted
    if root.fingerprint not in trusted:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)

    # 2. Root and intermediate may issue certificates, and the leaf may sign and not issue. None says something critical that
    #    we do not understand. One intermediate is what a root at least allows: its path length may be 1 or unlimited.
    # refusal: test_a_spoiled_chain_is_refused
    if not (root.may_issue and intermediate.may_issue and leaf.may_sign) or leaf.may_issue or root.path_length == 0:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    # refusal: test_a_spoiled_chain_is_refused
    if not root.critical | intermediate.critical | leaf.critical <= _UNDERSTOOD_CRITICAL:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)

    # 3. Each is signed by the next, ECDSA P-256 with SHA-256 whatever it declares. The root's signature of itself would
    #    prove nothing: it is trusted by its fingerprint.
    # refusal: test_a_spoiled_chain_is_refused
    _check_issued(intermediate, by=root)
    # refusal: test_a_spoiled_chain_is_refused
    _check_issued(leaf, by=intermediate)

    # 4. All three are valid now.
    for certificate in (leaf, intermediate, root):
        # refusal: test_every_certificate_must_be_valid_and_the_text_says_since_when_it_is_not
        if not certificate.not_before <= now <= certificate.not_after:
            limit = certificate.not_after if now > certificate.not_after else certificate.not_before
            raise _failed(EvidenceCheck.CERTIFICATE_VALIDITY, int(now.timestamp()), int(limit.timestamp()))

    # 5. Their issuers have not taken them back, as far as lists were given.
    if crls:
        # refusal: test_a_certificate_that_was_taken_back_is_refused
        _check_revocation(intermediate, root, crls, now)
        # refusal: test_a_certificate_that_was_taken_back_is_refused
        _check_revocation(leaf, intermediate, crls, now)

    # 6. The leaf says which platform it is for.
    # refusal: test_a_leaf_outside_intels_profile_is_malformed
    if leaf.sgx_extension is None:
        raise _malformed("sgx_extension")
    return VerifiedPck(
        key=leaf.key,
        extension=parse_pck_extension(leaf.sgx_extension),
        revocation_checked=bool(crls),
        simulated=root.fingerprint != INTEL_SGX_ROOT_SHA256 and SIMULATED_MARK in root.common_name,
    )


@dataclass(frozen=True, slots=True)
class _Certificate:
    """What we use of a certificate, read at once: `cryptography` parses lazily and would raise in the middle of a check."""

    certificate: x509.Certificate
    fingerprint: bytes
    subject: x509.Name
    issuer: x509.Name
    common_name: str
    not_before: datetime
    not_after: datetime
    key: ec.EllipticCurvePublicKey
    may_issue: bool
    may_sign: bool
    path_length: int | None
    critical: set[x509.ObjectIdentifier]
    sgx_extension: bytes | None


def _parse_chain(pem: bytes) -> tuple[_Certificate, ...]:
    # refusal: test_a_chain_that_is_not_three_certificates_is_malformed
    if len(pem) > MAX_CHAIN_BYTES:
        raise _malformed("length", len(pem), MAX_CHAIN_BYTES)
    try:
        certificates = x509.load_pem_x509_certificates(pem.removesuffix(b"\0"))
    except UNREADABLE as exc:
        raise _malformed("certificate") from exc
    # refusal: test_a_chain_that_is_not_three_certificates_is_malformed
    if len(certificates) != CHAIN_CERTIFICATES:
        raise _malformed("number_of_certificates", len(certificates), CHAIN_CERTIFICATES)
    return tuple(map(_read, certificates))


def _read(certificate: x509.Certificate) -> _Certificate:
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = certificate.public_key()
        sgx = [
            extension.value.value
            for extension in extensions
            if extension.oid == SGX_EXTENSION and isinstance(extension.value, x509.UnrecognizedExtension)
        ]
        # refusal: test_a_leaf_outside_intels_profile_is_malformed
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise _malformed("public_key")
        return _Certificate(
            certificate=certificate,
            fingerprint=fingerprint(certificate),
            subject=certificate.subject,
            issuer=certificate.issuer,
            common_name=str(names[0].value) if names else "",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            key=key,
            may_issue=constraints.ca and usage.key_cert_sign,
            may_sign=usage.digital_signature,
            path_length=constraints.path_length,
            critical={extension.oid for extension in extensions if extension.critical},
            sgx_extension=sgx[0] if sgx else None,
        )
    except (*UNREADABLE, x509.ExtensionNotFound) as exc:  # the profile has both extensions in all three certificates
        raise _malformed("certificate") from exc


def _check_issued(certificate: _Certificate, by: _Certificate) -> None:
    signed = certificate.certificate
    # refusal: test_a_spoiled_chain_is_refused
    if certificate.issuer != by.subject:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN)
    try:
        by.key.verify(signed.signature, signed.tbs_certificate_bytes, ec.ECDSA(SHA256()))
    except InvalidSignature as exc:
        raise _failed(EvidenceCheck.CERTIFICATE_CHAIN) from exc


def _check_revocation(
    certificate: _Certificate, issuer: _Certificate, crls: Sequence[x509.CertificateRevocationList], now: datetime
) -> None:
    """A list by the issuer that is valid now must be there, and none may name the certificate."""
    current = False
    try:
        for crl in crls:
            if crl.issuer != issuer.subject or not crl.is_signature_valid(issuer.key):
                continue
            # refusal: test_a_certificate_that_was_taken_back_is_refused
            if crl.get_revoked_certificate_by_serial_number(certificate.certificate.serial_number) is not None:
                raise _failed(EvidenceCheck.REVOCATION)
            until = crl.next_update_utc
            current |= crl.last_update_utc <= now and until is not None and now <= until
    except UNREADABLE as exc:
        raise _malformed("revocation_list") from exc
    # refusal: test_with_lists_each_issuer_needs_one_that_is_its_own_and_current
    if not current:
        raise _failed(EvidenceCheck.REVOCATION_LIST)


def _failed(check: EvidenceCheck, got: int | None = None, expected: int | None = None) -> EvidenceVerificationError:
    return EvidenceVerificationError(EvidenceFormat.TDX_CHAIN, check, got, expected)


def _malformed(field: str, got: int | None = None, expected: int | None = None) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.TDX_CHAIN, Ident(field), got, expected)


# --- the SGX extension ------------------------------------------------------------------------------------------------

# A SEQUENCE of SEQUENCE {OID, value}, in two places nested once more. Every OID begins with the extension's own; what
# follows is one byte a level.
_ARC = bytes.fromhex("2a864886f84d010d01")
_BOOLEAN, _INTEGER, _OCTETS, _OID, _ENUMERATED, _SEQUENCE = 0x01, 0x02, 0x04, 0x06, 0x0A, 0x30
_PPID, _TCB, _PCE_ID, _FMSPC, _SGX_TYPE, _PLATFORM_INSTANCE_ID, _CONFIGURATION = range(1, 8)
_PCE_SVN, _CPU_SVN = TCB_COMPONENTS + 1, TCB_COMPONENTS + 2


def parse_pck_extension(der: bytes) -> PckExtension:
    """The SGX extension in `der`, which must be encoded exactly as `pack_pck_extension` would.

    Raises:
        MalformedEvidenceError: an entry is missing, doubled, unknown, in the wrong place or out of range.
    """
    entries = _entries(_whole(_SEQUENCE, der), b"")
    tcb = _entries(_value(entries, _TCB, _SEQUENCE), bytes((_TCB,)))
    configuration = None
    if _CONFIGURATION in entries:
        flags = _entries(_value(entries, _CONFIGURATION, _SEQUENCE), bytes((_CONFIGURATION,)))
        configuration = PckConfiguration(
            *(_value(flags, number, _BOOLEAN) == b"\xff" if number in flags else None for number in range(1, 4))
        )
    extension = PckExtension(
        ppid=_value(entries, _PPID, _OCTETS, 16),
        tcb=tuple(_number(tcb, number, 0xFF) for number in range(1, TCB_COMPONENTS + 1)),
        pce_svn=_number(tcb, _PCE_SVN, 0xFFFF),
        cpu_svn=_value(tcb, _CPU_SVN, _OCTETS, 16),
        pce_id=_value(entries, _PCE_ID, _OCTETS, 2),
        fmspc=_value(entries, _FMSPC, _OCTETS, 6),
        sgx_type=int.from_bytes(_value(entries, _SGX_TYPE, _ENUMERATED, 1)),
        platform_instance_id=(
            _value(entries, _PLATFORM_INSTANCE_ID, _OCTETS, 16) if _PLATFORM_INSTANCE_ID in entries else None
        ),
        configuration=configuration,
    )
    # refusal: test_an_extension_cut_short_or_longer_is_malformed test_values_outside_the_profile_are_malformed
    if extension.sgx_type > 2 or pack_pck_extension(extension) != der:  # also what was not asked for, and its order
        raise _malformed("sgx_extension")
    return extension


def pack_pck_extension(extension: PckExtension) -> bytes:
    """The DER of `extension`; the inverse of `parse_pck_extension`. The fields are not checked."""
    numbers = {index: _der_integer(value) for index, value in enumerate((*extension.tcb, extension.pce_svn), start=1)}
    tcb = _sequence(bytes((_TCB,)), numbers | {_CPU_SVN: _der(_OCTETS, extension.cpu_svn)})
    entries = {
        _PPID: _der(_OCTETS, extension.ppid),
        _TCB: tcb,
        _PCE_ID: _der(_OCTETS, extension.pce_id),
        _FMSPC: _der(_OCTETS, extension.fmspc),
        _SGX_TYPE: _der(_ENUMERATED, bytes((extension.sgx_type,))),
    }
    if extension.platform_instance_id is not None:
        entries[_PLATFORM_INSTANCE_ID] = _der(_OCTETS, extension.platform_instance_id)
    if (flags := extension.configuration) is not None:
        values = enumerate((flags.dynamic_platform, flags.cached_keys, flags.smt_enabled), start=1)
        packed = {index: _der(_BOOLEAN, b"\xff" if value else b"\0") for index, value in values if value is not None}
        entries[_CONFIGURATION] = _sequence(bytes((_CONFIGURATION,)), packed)
    return _sequence(b"", entries)


def _sequence(prefix: bytes, entries: dict[int, bytes]) -> bytes:
    return _der(
        _SEQUENCE,
        b"".join(_der(_SEQUENCE, _der(_OID, _ARC + prefix + bytes((number,))) + value) for number, value in entries.items()),
    )


def _der(tag: int, value: bytes) -> bytes:
    length = len(value)
    if length < 0x80:
        return bytes((tag, length)) + value
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size) + value


def _der_integer(value: int) -> bytes:
    return _der(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def _take(data: bytes) -> tuple[int, bytes, bytes]:
    """Tag and value of the first element, and what follows it."""
    if len(data) < 2:
        raise _malformed("sgx_extension")
    tag, length, start = data[0], data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        if start > 4:  # longer than 65535
            raise _malformed("sgx_extension")
        length = int.from_bytes(data[2:start])
    if start + length > len(data):
        raise _malformed("sgx_extension")
    return tag, data[start : start + length], data[start + length :]


def _whole(tag: int, data: bytes) -> bytes:
    got, value, rest = _take(data)
    if got != tag or rest:
        raise _malformed("sgx_extension")
    return value


def _entries(data: bytes, prefix: bytes) -> dict[int, bytes]:
    """Last part of each OID, and the DER of its value."""
    found: dict[int, bytes] = {}
    while data:
        tag, entry, data = _take(data)
        oid_tag, oid, value = _take(entry)
        if tag != _SEQUENCE or oid_tag != _OID or len(oid) != len(_ARC) + len(prefix) + 1:
            raise _malformed("sgx_extension")
        found[oid[-1]] = value
    return found


def _value(entries: dict[int, bytes], number: int, tag: int, size: int | None = None) -> bytes:
    if number not in entries:
        raise _malformed("sgx_extension")
    value = _whole(tag, entries[number])
    if size is not None and len(value) != size:
        raise _malformed("sgx_extension", len(value), size)
    return value


def _number(entries: dict[int, bytes], number: int, maximum: int) -> int:
    value = int.from_bytes(_value(entries, number, _INTEGER), signed=True)
    if not 0 <= value <= maximum:
        raise _malformed("tcb_component", value)
    return value
