"""The pinned roots are the vendors' and no others."""

from cryptography import x509

from agent.verify.roots import AMD_ARK_SHA256, INTEL_SGX_ROOT_SHA256, NVIDIA_DEVICE_ROOT_SHA256, fingerprint
from tests.shared import shared_data


def test_the_pinned_amd_roots_are_exactly_the_recorded_ones() -> None:
    names = ("milan", "genoa", "turin")
    roots = [x509.load_der_x509_certificate(shared_data(f"snp/certs/{name}-ark.der").read_bytes()) for name in names]
    assert {fingerprint(root) for root in roots} == AMD_ARK_SHA256


def test_amds_intermediates_are_not_pinned() -> None:
    for name in ("milan-ask", "milan-asvk", "genoa-ask", "genoa-asvk", "turin-ask", "turin-asvk"):
        certificate = x509.load_der_x509_certificate(shared_data(f"snp/certs/{name}.der").read_bytes())
        assert fingerprint(certificate) not in AMD_ARK_SHA256


def test_the_pinned_nvidia_root_ends_the_recorded_chains() -> None:
    folder = "nvidia/attestation-sdk/testdata/sample_attestation_data/gpu"
    for name in ("hopperCertChain.txt", "blackwellCertChain.txt"):
        chain = x509.load_pem_x509_certificates(shared_data(f"{folder}/{name}").read_bytes())
        assert [fingerprint(certificate) == NVIDIA_DEVICE_ROOT_SHA256 for certificate in chain] == [False] * 4 + [True]


def test_the_pinned_intel_root_is_the_recorded_one() -> None:
    root = x509.load_der_x509_certificate(shared_data("tdx/collateral/intel-sgx-root-ca.der").read_bytes())
    assert fingerprint(root) == INTEL_SGX_ROOT_SHA256


def test_the_pinned_roots_are_frozen() -> None:
    """A change of this list is a change of whom every guest and broker believes."""
    assert sorted(value.hex() for value in AMD_ARK_SHA256) == [
        "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
        "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    ]
    assert NVIDIA_DEVICE_ROOT_SHA256.hex() == "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
    assert INTEL_SGX_ROOT_SHA256.hex() == "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
