"""AMD's revocation lists: X.509 CRLs in which the root of a processor generation (ARK) names intermediates it has taken back.

Reads a list and checks a chain against it; where lists come from, and how old they may become, is the caller's. A list says
nothing of a VCEK or VLEK: all of them have the serial number 0, and AMD ends them by a higher TCB.

Spec: AMD 57230 "VCEK Certificate and KDS Interface", 4 (`/vcek/v1/<product>/crl`, `/vlek/v1/<product>/crl`); RFC 5280, 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384

from agent.closed import Ident
from agent.errors import EvidenceCheck, EvidenceFormat, EvidenceVerificationError, MalformedEvidenceError
from agent.verify.roots import UNREADABLE

MAX_CRL_BYTES = 64 << 10
"""AMD's have less than 2 KiB."""
_PSS = padding.PSS(padding.MGF1(SHA384()), salt_length=48)


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What we use of a list, read at once. Nobody has verified it.

    Attributes:
        signed, signature: what the issuer signed, and how.
        since, until: when the list counts; a list without an end is none that can be current.
        understood: no extension of the list changes what its entries mean (RFC 5280, 5.2: a critical one would).
        revoked: serial numbers.
    """

    issuer: x509.Name
    signed: bytes
    signature: bytes
    since: datetime
    until: datetime | None
    understood: bool
    revoked: frozenset[int]


def parse_crl(data: bytes) -> RevocationList:
    """The one list in `data`, DER or PEM, at most 64 KiB.

    Raises:
        MalformedEvidenceError: it is none, or longer.
    """
    # refusal: test_a_list_that_is_none_is_malformed
    if len(data) > MAX_CRL_BYTES:
        raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("revocation_list"), len(data), MAX_CRL_BYTES)
    load = x509.load_pem_x509_crl if data.startswith(b"-----") else x509.load_der_x509_crl
    try:
        crl = load(data)
        entries = list(crl)
        extensions = [*crl.extensions, *(extension for entry in entries for extension in entry.extensions)]
        return RevocationList(
            issuer=crl.issuer,
            signed=crl.tbs_certlist_bytes,
            signature=crl.signature,
            since=crl.last_update_utc,
            until=crl.next_update_utc,
            understood=not any(extension.critical for extension in extensions),
            revoked=frozenset(entry.serial_number for entry in entries),
        )
    except UNREADABLE as exc:
        raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("revocation_list")) from exc


def check_not_revoked(
    serials: Sequence[int], issuer: x509.Name, key: rsa.RSAPublicKey, lists: Sequence[RevocationList], now: datetime
) -> None:
    """None of the certificates with these serial numbers, all issued under `issuer`, has been taken back.

    Args:
        key: of the issuer.
        lists: of any issuer; of this one there must be at least one, and one that is current.
        now: with time zone.

    Raises:
        EvidenceVerificationError: REVOCATION_LIST, there is none of this issuer, or one that we do not understand;
            REVOCATION_LIST_SIGNATURE, one in its name is not its own; REVOCATION, a certificate is on one (got: how many);
            REVOCATION_LIST_VALIDITY, none counts now (got: the end of the latest, expected: now, Unix seconds).
    """
    own = [each for each in lists if each.issuer == issuer]
    # refusal: test_with_lists_there_must_be_one_of_this_root
    if not own:
        raise _failed(EvidenceCheck.REVOCATION_LIST)
    for each in own:
        # refusal: test_a_list_that_says_more_than_we_understand_is_refused
        if not each.understood:
            raise _failed(EvidenceCheck.REVOCATION_LIST)
        try:
            # refusal: test_a_list_in_the_name_of_the_root_must_be_signed_by_it
            key.verify(each.signature, each.signed, _PSS, SHA384())
        except InvalidSignature as exc:
            raise _failed(EvidenceCheck.REVOCATION_LIST_SIGNATURE) from exc
    # Also on one that is over: what was taken back stays so.
    revoked = sum(any(serial in each.revoked for each in own) for serial in serials)
    # refusal: test_a_chain_that_was_taken_back_is_refused
    if revoked:
        raise _failed(EvidenceCheck.REVOCATION, revoked, 0)
    # refusal: test_a_list_counts_only_in_its_time
    if not any(each.until is not None and each.since <= now <= each.until for each in own):
        ends = max(int((each.until or each.since).timestamp()) for each in own)
        raise _failed(EvidenceCheck.REVOCATION_LIST_VALIDITY, ends, int(now.timestamp()))


def _failed(check: EvidenceCheck, got: int | None = None, expected: int | None = None) -> EvidenceVerificationError:
    return EvidenceVerificationError(EvidenceFormat.SNP_CHAIN, check, got, expected)
