"""What a Verifier's trustworthiness claims mean, in words: the claims, their tiers, and every defined value.

Owns the table of draft-ietf-rats-ar4si-09, section 2.3, and the one value Trustee adds. Does not read tokens (`ear.py`) and
decides nothing: which tier is good enough is the Relying Party's policy.
"""

import enum


class Tier(enum.Enum):
    """Section 2.3.2; by its name in `ear.status`, in the order from good to bad that Trustee's worst-of follows."""

    NONE = "none"
    AFFIRMING = "affirming"
    WARNING = "warning"
    CONTRAINDICATED = "contraindicated"


class TrustClaim(enum.Enum):
    """The eight claims of a trustworthiness vector, by their names in JSON."""

    INSTANCE_IDENTITY = "instance-identity"
    CONFIGURATION = "configuration"
    EXECUTABLES = "executables"
    FILE_SYSTEM = "file-system"
    HARDWARE = "hardware"
    RUNTIME_OPAQUE = "runtime-opaque"
    STORAGE_OPAQUE = "storage-opaque"
    SOURCED_DATA = "sourced-data"


class Meaning(enum.Enum):
    """What one value of one claim says."""

    NO_CLAIM = "nothing is claimed"
    UNKNOWN_ELEMENTS = "the evidence holds elements that the verifier cannot evaluate"
    VERIFIER_MALFUNCTION = "the verifier itself failed while it appraised"
    CRYPTO_FAILED = "the evidence did not verify cryptographically"

    INSTANCE_TRUSTED = "a known instance, not known to be compromised"
    INSTANCE_UNTRUSTED = "a known instance that is not trusted"
    INSTANCE_UNRECOGNISED = "an instance that should be known and is not"

    CONFIGURATION_APPROVED = "a known and approved configuration"
    CONFIGURATION_SAFE = "a configuration without known vulnerabilities"
    CONFIGURATION_UNSAFE = "a configuration with known vulnerabilities"
    CONFIGURATION_UNAVAILABLE = "configuration unavailable to the verifier, or it matches no reference value"
    CONFIGURATION_UNSUPPORTABLE = "a configuration with unacceptable vulnerabilities"

    EXECUTABLES_APPROVED = "only approved code, at boot and since"
    EXECUTABLES_APPROVED_BOOT = "only approved code at boot"
    EXECUTABLES_APPROVED_REGISTERS = "approved measurement registers; the event log was not compared"
    EXECUTABLES_UNSAFE = "approved code, part of which has known vulnerabilities"
    EXECUTABLES_UNRECOGNISED = "unrecognised executables: a measurement matches no reference value"
    EXECUTABLES_CONTRAINDICATED = "code that must not run"

    FILES_APPROVED = "only approved files"
    FILES_UNRECOGNISED = "unrecognised files"
    FILES_CONTRAINDICATED = "files that must not be there"

    HARDWARE_GENUINE = "genuine hardware and firmware"
    HARDWARE_UNSAFE = "genuine hardware or firmware with known vulnerabilities"
    HARDWARE_CONTRAINDICATED = "known hardware or firmware that is not trusted"
    HARDWARE_UNRECOGNISED = "unrecognised hardware or firmware: its version matches no reference value"

    MEMORY_ENCRYPTED = "memory that only the TEE can read"
    MEMORY_ISOLATED = "memory that other guests cannot read, and the host can"
    MEMORY_VISIBLE = "memory that is visible on the host"

    SECRETS_IN_HARDWARE = "stored secrets encrypted under keys that stay in hardware"
    SECRETS_IN_SOFTWARE = "stored secrets encrypted under keys that do not stay in hardware"
    SECRETS_IN_CLEAR = "stored secrets in the clear"

    SOURCES_TRUSTED = "data from affirmed sources only"
    SOURCES_UNTRUSTED = "data from sources that are not attested, or with a warning"
    SOURCES_CONTRAINDICATED = "data from sources that must not be trusted"

    UNDEFINED = "a value that the draft does not define"


_EVERY_CLAIM = {
    -1: Meaning.VERIFIER_MALFUNCTION,
    0: Meaning.NO_CLAIM,
    1: Meaning.UNKNOWN_ELEMENTS,
    99: Meaning.CRYPTO_FAILED,
}
MEANINGS = {  # section 2.3.4
    TrustClaim.INSTANCE_IDENTITY: {
        2: Meaning.INSTANCE_TRUSTED,
        96: Meaning.INSTANCE_UNTRUSTED,
        97: Meaning.INSTANCE_UNRECOGNISED,
    },
    TrustClaim.CONFIGURATION: {
        2: Meaning.CONFIGURATION_APPROVED,
        3: Meaning.CONFIGURATION_SAFE,
        32: Meaning.CONFIGURATION_UNSAFE,
        36: Meaning.CONFIGURATION_UNAVAILABLE,
        96: Meaning.CONFIGURATION_UNSUPPORTABLE,
    },
    TrustClaim.EXECUTABLES: {
        2: Meaning.EXECUTABLES_APPROVED,
        3: Meaning.EXECUTABLES_APPROVED_BOOT,
        4: Meaning.EXECUTABLES_APPROVED_REGISTERS,  # Trustee's default_cpu policy for TDX; not in the draft
        32: Meaning.EXECUTABLES_UNSAFE,
        33: Meaning.EXECUTABLES_UNRECOGNISED,
        96: Meaning.EXECUTABLES_CONTRAINDICATED,
    },
    TrustClaim.FILE_SYSTEM: {
        2: Meaning.FILES_APPROVED,
        32: Meaning.FILES_UNRECOGNISED,
        96: Meaning.FILES_CONTRAINDICATED,
    },
    TrustClaim.HARDWARE: {
        2: Meaning.HARDWARE_GENUINE,
        32: Meaning.HARDWARE_UNSAFE,
        96: Meaning.HARDWARE_CONTRAINDICATED,
        97: Meaning.HARDWARE_UNRECOGNISED,
    },
    TrustClaim.RUNTIME_OPAQUE: {
        2: Meaning.MEMORY_ENCRYPTED,
        32: Meaning.MEMORY_ISOLATED,
        96: Meaning.MEMORY_VISIBLE,
    },
    TrustClaim.STORAGE_OPAQUE: {
        2: Meaning.SECRETS_IN_HARDWARE,
        32: Meaning.SECRETS_IN_SOFTWARE,
        96: Meaning.SECRETS_IN_CLEAR,
    },
    TrustClaim.SOURCED_DATA: {
        2: Meaning.SOURCES_TRUSTED,
        32: Meaning.SOURCES_UNTRUSTED,
        96: Meaning.SOURCES_CONTRAINDICATED,
    },
}


def tier_of(value: int) -> Tier:
    """The tier of a claim's value, -128 to 127 (section 2.3.2)."""
    if -1 <= value <= 1:
        return Tier.NONE
    if -32 <= value <= 31:
        return Tier.AFFIRMING
    if -96 <= value <= 95:
        return Tier.WARNING
    return Tier.CONTRAINDICATED


def meaning_of(claim: TrustClaim, value: int) -> Meaning:
    """What the value says of the claim, -128 to 127."""
    return _EVERY_CLAIM.get(value) or MEANINGS[claim].get(value, Meaning.UNDEFINED)
