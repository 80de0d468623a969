"""The vendors' root certificates we trust, by SHA-256 over their DER, and what the verifiers must know of `cryptography`.

Constants: no file, variable or option changes them. Other roots (simulated silicon) are arguments of the verifiers.
"""

import hashlib

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

AMD_ARK_SHA256 = frozenset(
    bytes.fromhex(text)
    for text in (
        "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",  # ARK-Milan
        "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",  # ARK-Genoa
        "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",  # ARK-Turin
    )
)
"""AMD root keys, as `https://kdsintf.amd.com/vcek/v1/<Product>/cert_chain` serves them."""

NVIDIA_DEVICE_ROOT_SHA256 = bytes.fromhex("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48")
"""NVIDIA Device Identity CA, as the GPU driver, nvtrust and Trustee carry it."""

INTEL_SGX_ROOT_SHA256 = bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")
"""Intel SGX Root CA, as `https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.cer`
serves it. TDX quotes are certified under it too."""

SIMULATED_MARK = "SIMULATED"
"""Stands in the common name of every root of simulated silicon."""

UNREADABLE = (
    ValueError,
    TypeError,  # a common name that is a BIT STRING
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` 50 raises for a certificate it cannot read: at once, at an attribute, or in the middle of a path."""


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 over the certificate's DER, 32 bytes."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
