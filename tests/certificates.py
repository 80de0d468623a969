"""A host's certificates as it may hand them out: DER or PEM, in a table."""

import struct
import warnings

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.evidence.snp_abi import CertificateKind


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
