"""What a Trustee attestation token says: an EAR (EAT Attestation Result) as a signed JWT, and what in it is not affirmed.

The counterpart of `token.py` for a Trustee attestation service. What decides is read strictly: algorithm, signature, times,
submodules, trust vectors, nonce and key. What is only shown (measurement, TCB status, advisories) is None where it is
missing or in a form of another release. Does not decide whether the result is good enough: that is the policy of the key
broker service; and not what the words mean (`ar4si.py`).

Follows the `ear` crate 0.5 as confidential-containers/trustee 78962cd fills it, draft-fv-rats-ear (profile of RFC 9711),
RFC 7515 and RFC 8725.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from agent.closed import ClosedRecord, Ident
from agent.errors import TokenCheck, TokenError
from agent.handshake import TeePublicKey
from agent.handshake.ar4si import Meaning, Tier, TrustClaim, meaning_of, tier_of
from agent.handshake.jws import parse_jws, signed_by
from agent.jose import integer, pack_jwk, parse_b64, parse_object, parse_point, string

MAX_EAR_BYTES = 768 << 10
"""A verbose token repeats the evidence of devices (512 KiB before base64 at most), about 20 KiB for each: 170 KiB for eight
GPUs, more than 256 with their NVSwitches and the events of a TD."""
LEEWAY_S = 60
"""How far the service's clock and ours may differ; the key broker service gives a token's `exp` as much."""
CPU = Ident("cpu0")

_MAX_SUBMODS = 64
_MAX_NONCE_CHARS = 1024
_MAX_TIME = 1 << 40
_MAX_INIT_DATA_BYTES = 64
_HOST_DATA_BASE64 = 44  # characters of 32 bytes; no field has this many in hexadecimal
_VECTOR, _EVIDENCE = "ear.trustworthiness-vector", "ear.veraison.annotated-evidence"
# What a header may hold beside the algorithm. Keys and names of keys are read by nobody: only pinned keys count. `crit`,
# `b64`, `zip` or `cty` would change what the rest means.
_HEADER = {"alg", "typ", "jwk", "jku", "kid", "x5c", "x5t", "x5t#S256", "x5u"}


class EvidenceKind(Enum):
    """Whose claims a submodule holds, by Trustee's name of the TEE."""

    SNP = "snp"
    TDX = "tdx"
    AZ_SNP_VTPM = "az-snp-vtpm"
    AZ_TDX_VTPM = "az-tdx-vtpm"
    SGX = "sgx"
    CCA = "cca"
    CSV = "csv"
    SE = "se"
    TPM = "tpm"
    NVIDIA = "nvidia"
    NVIDIA_DPU = "nvidia-dpu"
    HYGON_DCU = "hygondcu"
    SAMPLE = "sample"
    SAMPLE_DEVICE = "sampledevice"


_BADNESS = {Tier.AFFIRMING: 0, Tier.NONE: 1, Tier.WARNING: 2, Tier.CONTRAINDICATED: 3}
_KINDS = {kind.value: kind for kind in EvidenceKind}
_SIMULATED = {EvidenceKind.SAMPLE, EvidenceKind.SAMPLE_DEVICE}
_MEASUREMENT = {  # where the claims of a kind say what was launched
    EvidenceKind.SNP: (("measurement",), ("evidence", "measurement")),  # the second in releases after v0.21
    EvidenceKind.AZ_SNP_VTPM: (("measurement",),),
    EvidenceKind.TDX: (("quote", "body", "mr_td"),),
    EvidenceKind.AZ_TDX_VTPM: (("quote", "body", "mr_td"),),
    EvidenceKind.SGX: (("body", "mr_enclave"),),
    EvidenceKind.SAMPLE: (("launch_digest",),),
}


@dataclass(frozen=True, slots=True)
class Submod:
    """The appraisal of one device.

    Attributes:
        name: `cpu0`, `gpu0`, `switch0`, `ppcie0` and so on.
        status: the worst tier of the vector, as the service wrote it.
        vector: the claims it made; one that is missing is a 0.
        kind: whose claims these are; None for a kind that we do not know.
        measurement: of what was launched: SNP's measurement, TDX's MRTD; None where the kind has none.
        init_data: the TEE's field: HOST_DATA (32 bytes), MRCONFIGID (48 bytes).
        tcb_status: in Intel's words.
        advisories: ids of the vendor's security advisories that apply.
        collateral_expired: the vendor's collateral was out of date when the service appraised.
        nonce: the challenge, as it was sent. At most 1024 characters.
        tee_pubkey: the attested key. None where there is none, or another kind of key than ours.
    """

    name: Ident
    status: Tier
    vector: Mapping[TrustClaim, int]
    kind: EvidenceKind | None
    measurement: Ident | None
    init_data: bytes | None
    tcb_status: Ident | None
    advisories: tuple[Ident, ...]
    collateral_expired: bool
    nonce: str | None = field(repr=False)
    tee_pubkey: TeePublicKey | None = field(repr=False)

    @property
    def simulated(self) -> bool:
        """Whether anybody could have made this evidence."""
        return self.kind in _SIMULATED


@dataclass(frozen=True, slots=True)
class Ear:
    """One token. Times are Unix seconds.

    Attributes:
        issuer: the service's name for itself; older ones give none.
        submods: in the order of the token, the CPU among them as `cpu0`.
    """

    issuer: Ident | None
    issued_at: int
    expires_at: int
    submods: tuple[Submod, ...]

    @property
    def cpu(self) -> Submod | None:
        """The TEE that this guest runs in."""
        return next((submod for submod in self.submods if submod.name == CPU), None)

    @property
    def simulated(self) -> bool:
        """Whether any of the evidence was sample evidence. Evidence of an unknown kind is not: compare `kind` with yours."""
        return any(submod.simulated for submod in self.submods)


class FindingKind(Enum):
    CLAIM = "trust claim"
    STATUS = "status"
    TCB_STATUS = "TCB status"
    ADVISORY = "security advisory"
    COLLATERAL = "collateral"
    SIMULATED = "sample evidence"


@dataclass(frozen=True)
class Finding(ClosedRecord):
    """One thing that keeps a submodule from being affirmed.

    Attributes:
        tier: of the claim, or of the submodule where no claim is concerned.
        value: of the claim, -128 to 127.
        detail: the TCB status, or the id of the advisory.
    """

    submod: Ident
    kind: FindingKind
    tier: Tier
    claim: TrustClaim | None = None
    value: int | None = None
    meaning: Meaning | None = None
    detail: Ident | None = None

    def __str__(self) -> str:
        """One line."""
        match self.kind:
            case FindingKind.CLAIM if self.claim and self.meaning:
                return f"{self.submod} {self.claim.value} {self.value} ({self.tier.value}): {self.meaning.value}"
            case FindingKind.TCB_STATUS | FindingKind.ADVISORY:
                return f"{self.submod} {self.kind.value} {self.detail}"
            case FindingKind.COLLATERAL:
                return f"{self.submod} collateral: out of date when the service appraised"
            case FindingKind.SIMULATED:
                return f"{self.submod} sample evidence: anybody can make it"
        return f"{self.submod} status {self.tier.value}, and no claim says why"


def verify_ear(token: str, keys: Sequence[EllipticCurvePublicKey], now: int) -> Ear:
    """What a token says that one of the pinned keys signed and that is valid now.

    Args:
        token: compact JWS, at most 768 KiB.
        keys: of the attestation services that count, P-256; one of them must have signed. A key in the token is nobody's.
        now: Unix seconds; 60 of them are leeway, on both sides.

    Raises:
        TokenError: names the check that does not hold.
    """
    # 1. Three canonical base64url parts of bounded size.
    try:
        jws = parse_jws(token, MAX_EAR_BYTES)
    except ValueError:
        raise TokenError(TokenCheck.FORMAT) from None

    # 2. One algorithm, and nothing that changes what the rest means.
    # refusal: test_another_algorithm_or_a_header_that_changes_the_meaning_is_refused
    if jws.header.get("alg") != "ES256" or jws.header.get("typ", "JWT") != "JWT" or not jws.header.keys() <= _HEADER:
        raise TokenError(TokenCheck.ALGORITHM)

    # 3. Signed by a pinned key. Nothing in the payload is read before this.
    # refusal: test_a_stranger_signs_in_vain_even_with_the_key_in_the_header
    if not signed_by(keys, jws):
        raise TokenError(TokenCheck.SIGNATURE)

    # 4. What it says, and of now.
    members = _members(jws.payload)
    ear = _parse(members)
    # refusal: test_times_have_sixty_seconds_of_leeway
    if now >= ear.expires_at + LEEWAY_S:
        raise TokenError(TokenCheck.EXPIRED)
    # refusal: test_times_have_sixty_seconds_of_leeway
    if max(ear.issued_at, _not_before(members)) > now + LEEWAY_S:
        raise TokenError(TokenCheck.NOT_YET_VALID)
    return ear


def check_binding(ear: Ear, nonce: str, tee_pubkey: TeePublicKey) -> None:
    """Whether the token is of this handshake: the CPU's runtime data, and that of every device that has any.

    Args:
        ear: of `verify_ear`.
        nonce: of the Challenge, the string as it came.
        tee_pubkey: our ephemeral key.

    Raises:
        TokenError: names the check that does not hold; CLAIMS where the token has no CPU.
    """
    # refusal: test_a_token_without_a_cpu_binds_nothing
    if ear.cpu is None:
        raise TokenError(TokenCheck.CLAIMS)
    bound = [submod for submod in ear.submods if submod is ear.cpu or submod.nonce is not None]
    # refusal: test_a_token_of_another_handshake_is_refused
    if any(submod.nonce != nonce for submod in bound):
        raise TokenError(TokenCheck.NONCE)
    # refusal: test_a_token_of_another_handshake_is_refused
    if any(submod.tee_pubkey != tee_pubkey for submod in bound):
        raise TokenError(TokenCheck.TEE_PUBKEY)


def decode_unverified_ear(token: str) -> Ear:
    """What a token says, whoever wrote it: for a diagnosis that says so, and for nothing else.

    Raises:
        TokenError: FORMAT or CLAIMS.
    """
    try:
        return _parse(_members(parse_jws(token, MAX_EAR_BYTES).payload))
    except ValueError:
        raise TokenError(TokenCheck.FORMAT) from None


def findings(ear: Ear) -> tuple[Finding, ...]:
    """Everything that is not affirmed, by submodule, the worst first. Empty for a token that affirms everything.

    A claim of 0 is no finding: the default policies make no claim about most of the vector (draft, section 2.3.2).
    """
    return tuple(finding for submod in ear.submods for finding in _findings(submod))


def _findings(submod: Submod) -> Iterator[Finding]:
    claims = [
        Finding(submod.name, FindingKind.CLAIM, tier_of(value), claim, value, meaning_of(claim, value))
        for claim, value in submod.vector.items()
        if value and tier_of(value) is not Tier.AFFIRMING
    ]
    yield from sorted(claims, key=lambda finding: -_BADNESS[finding.tier])
    worst = max((_BADNESS[finding.tier] for finding in claims), default=_BADNESS[Tier.AFFIRMING])
    if _BADNESS[submod.status] > worst or (submod.status is Tier.NONE and not claims):
        yield Finding(submod.name, FindingKind.STATUS, submod.status)
    if submod.tcb_status is not None and submod.tcb_status != "UpToDate":
        yield Finding(submod.name, FindingKind.TCB_STATUS, submod.status, detail=submod.tcb_status)
    if submod.collateral_expired:
        yield Finding(submod.name, FindingKind.COLLATERAL, submod.status)
    for advisory in submod.advisories:
        yield Finding(submod.name, FindingKind.ADVISORY, submod.status, detail=advisory)
    if submod.simulated:
        yield Finding(submod.name, FindingKind.SIMULATED, submod.status)


def _members(payload: bytes) -> dict[str, object]:
    try:
        return parse_object(payload, MAX_EAR_BYTES, fractions_become_none=True)  # initdata entries are repeated as they are
    except ValueError:
        raise TokenError(TokenCheck.CLAIMS) from None


def _not_before(members: dict[str, object]) -> int:
    try:
        return integer(members, "nbf", 0, _MAX_TIME) if "nbf" in members else 0
    except ValueError:
        raise TokenError(TokenCheck.CLAIMS) from None


def _parse(members: dict[str, object]) -> Ear:
    try:
        submods = _object(members, "submods")
        # refusal: test_a_claim_that_decides_is_read_strictly
        if not 1 <= len(submods) <= _MAX_SUBMODS:
            raise ValueError
        return Ear(
            issuer=_shown(members.get("iss")),
            issued_at=integer(members, "iat", 0, _MAX_TIME),
            expires_at=integer(members, "exp", 0, _MAX_TIME),
            submods=tuple(_parse_submod(Ident(name), _object(submods, name)) for name in submods),
        )
    except ValueError:
        raise TokenError(TokenCheck.CLAIMS) from None


def _parse_submod(name: Ident, members: dict[str, object]) -> Submod:
    vector = _object(members, _VECTOR) if _VECTOR in members else {}
    evidence = _object(members, _EVIDENCE) if _EVIDENCE in members else {}
    named = [name for name in evidence if name.replace("_", "-") in _KINDS]  # the service's own policies write az_snp_vtpm
    # refusal: test_a_claim_that_decides_is_read_strictly
    if len(named) > 1:
        raise ValueError
    kind = _KINDS[named[0].replace("_", "-")] if named else None
    claims = _object(evidence, named[0]) if named else {}
    nonce, tee_pubkey = _runtime_data(evidence)
    advisories = claims.get("advisory_ids")
    return Submod(
        name=name,
        status=Tier(string(members, "ear.status")),
        vector={TrustClaim(claim): integer(vector, claim, -128, 127) for claim in vector},
        kind=kind,
        measurement=_measurement(kind, claims),
        init_data=_init_data(kind, evidence.get("init_data")),
        tcb_status=_shown(claims.get("tcb_status")),
        advisories=tuple(Ident.of_peer(each) for each in advisories if isinstance(each, str))
        if isinstance(advisories, list)
        else (),
        collateral_expired=claims.get("collateral_expiration_status", "0") != "0",
        nonce=nonce,
        tee_pubkey=tee_pubkey,
    )


def _runtime_data(evidence: dict[str, object]) -> tuple[str | None, TeePublicKey | None]:
    if evidence.get("runtime_data_claims") is None:
        return None, None
    claims = _object(evidence, "runtime_data_claims")
    if "nonce" not in claims:  # runtime data of somebody else's making: a direct user of the attestation service
        return None, None
    nonce = string(claims, "nonce")
    # refusal: test_a_claim_that_decides_is_read_strictly
    if len(nonce) > _MAX_NONCE_CHARS:
        raise ValueError
    jwk = claims.get("tee-pubkey")
    try:
        key = parse_point(jwk) if isinstance(jwk, dict) else None
    except ValueError:  # RSA, P-521: somebody's key, never ours
        return nonce, None
    return nonce, key if key is not None and jwk == pack_jwk(key) else None


def _object(members: dict[str, object], name: str) -> dict[str, object]:
    value = members.get(name)
    # refusal: test_a_claim_that_decides_is_read_strictly
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _shown(value: object) -> Ident | None:
    return Ident.of_peer(value) if isinstance(value, str) else None


def _measurement(kind: EvidenceKind | None, claims: dict[str, object]) -> Ident | None:
    for path in _MEASUREMENT.get(kind, ()) if kind else ():
        value: object = claims
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str):
            return Ident.of_peer(value)
    return None


def _init_data(kind: EvidenceKind | None, value: object) -> bytes | None:
    """Hexadecimal; base64 in sample evidence, and of SEV-SNP in earlier releases (trustee issue 372)."""
    if not isinstance(value, str):
        return None
    try:
        data = parse_b64(value) if kind in _SIMULATED or len(value) == _HOST_DATA_BASE64 else bytes.fromhex(value)
    except ValueError:
        return None
    return data if 0 < len(data) <= _MAX_INIT_DATA_BYTES else None
