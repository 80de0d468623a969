"""Trustee's policies as functions: how the attestation service fills the trust vector, and what the KBS lets out.

There is no Rego here. The policies Trustee ships are written out below (facts of confidential-containers/trustee 78962cd). A
policy that is posted as text is recognised where it is one of them, comments and white space aside, or, for the attestation
service, where it only assigns numbers; any other text is kept and is a *broken* policy: evaluating it is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Values = Callable[[str], object]
"""Reference values by id; None where there is none."""
Vector = dict[str, int]

TRUST_CLAIMS = (
    *("instance-identity", "configuration", "executables", "file-system"),
    *("hardware", "runtime-opaque", "storage-opaque", "sourced-data"),
)
_UNRECOGNISED = {"executables": 33, "hardware": 97, "configuration": 36}


class PolicyError(Exception):
    """The policy cannot be evaluated."""


# --- the attestation service's ----------------------------------------------------------------------------------------


def default_cpu(claims: Mapping[str, Any], values: Values) -> Vector:
    """`default_cpu`: contraindicated, unless reference values say better."""
    for tee, appraise in (("sample", _sample), ("snp", _snp), ("tdx", _tdx)):
        if tee in claims:
            return _UNRECOGNISED | appraise(claims[tee], values)
    return dict(_UNRECOGNISED)


def default_gpu(claims: Mapping[str, Any], values: Values) -> Vector:
    """`default_gpu`: it knows the claims of NVIDIA's remote service, and locally verified GPUs have none of them."""
    device = claims.get("sampledevice", {})
    return _UNRECOGNISED | ({"hardware": 2} if _in(device.get("svn"), values("device_svn")) else {})


def _sample(claims: Mapping[str, Any], values: Values) -> Vector:
    vector = {}
    if _in(claims["launch_digest"], values("launch_digest")):
        vector["executables"] = 3
    version, minimum = claims["platform_version"], values("minimum_minor_version")
    known = _in(claims["svn"], values("svn")) and _same(version["major"], values("major_version"))
    if known and isinstance(minimum, int) and version["minor"] >= minimum:
        vector["hardware"] = 2
    if claims["debug"] is False:
        vector["configuration"] = 2
    return vector


def _snp(claims: Mapping[str, Any], values: Values) -> Vector:
    vector = {}
    if _in(claims["measurement"], values("snp_launch_measurement")):
        vector["executables"] = 3
    parts = {"bootloader": "snp_bootloader", "microcode": "snp_microcode", "snp": "snp_snp_svn", "tee": "snp_tee_svn"}
    if all(_in(claims[f"reported_tcb_{part}"], values(name)) for part, name in parts.items()):
        vector["hardware"] = 2
    if not claims["policy_debug_allowed"] and not claims["policy_migrate_ma"]:
        settings = {
            "platform_smt_enabled": "snp_smt_enabled",
            "platform_tsme_enabled": "snp_tsme_enabled",
            "policy_abi_major": "snp_guest_abi_major",
            "policy_abi_minor": "snp_guest_abi_minor",
            "policy_single_socket": "snp_single_socket",
            "policy_smt_allowed": "snp_smt_allowed",
        }
        approved = all(_same(claims[claim], values(name)) for claim, name in settings.items())
        vector["configuration"] = 2 if approved else 3
    return vector


def _tdx(claims: Mapping[str, Any], values: Values) -> Vector:
    vector = {}
    header, body = claims["quote"]["header"], claims["quote"]["body"]
    if _in(body["rtmr_1"], values("rtmr_1")) and _in(body["rtmr_2"], values("rtmr_2")):
        vector["executables"] = 4  # 3 needs details of UEFI events, which are not made here
    genuine = header["tee_type"] == "81000000" and header["vendor_id"] == "939a7233f79c4ca9940a0db3957f0607"
    current = claims["tcb_status"] == "UpToDate" and claims["collateral_expiration_status"] == "0"
    if genuine and current and _in(body["mr_td"], values("mr_td")):
        vector["hardware"] = 2
    if not claims["td_attributes"]["debug"] and _in(body["xfam"], values("xfam")):
        vector["configuration"] = 2
    return vector


def _in(value: object, known: object) -> bool:
    return isinstance(known, list) and any(_same(value, one) for one in known)


def _same(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # True is not 1


def status_of(vector: Mapping[str, int]) -> str:
    """EAR status: the worst tier (AR4SI, 2.3.2) in the vector."""
    return max((_tier(value) for value in vector.values()), default=(0, "none"))[1]


def _tier(value: int) -> tuple[int, str]:
    if -1 <= value <= 1:
        return 0, "none"
    if -32 <= value <= 31:
        return 1, "affirming"
    return (2, "warning") if -96 <= value <= 95 else (3, "contraindicated")


_STATEMENT = re.compile(
    r"\s*(?:package policy|import rego\.v1|(?:default )?(?P<name>[a-z_]+) :?= (?P<number>-?[0-9]+)"
    r"|trust_claims :?= \{(?P<claims>[^{}]*)\})(?=\s|$)"
)
_CLAIM = re.compile(r'\s*"(?P<claim>[a-z-]+)": ?(?:(?P<name>[a-z_]+)|(?P<number>-?[0-9]+))\s*')


def constant_policy(text: str) -> Vector | None:
    """The claims of a Rego text that does nothing but assign numbers; None: it does something else."""
    rest, numbers, claims = _normalised(text), dict[str, int](), None
    while rest:
        statement = _STATEMENT.match(rest)
        if statement is None:
            return None
        if statement["name"]:
            numbers[statement["name"]] = int(statement["number"])
        claims = statement["claims"] if statement["claims"] is not None else claims
        rest = rest[statement.end() :].strip()
    vector = {}
    for part in filter(str.strip, (claims or "").split(",")):
        claim = _CLAIM.fullmatch(part)
        if claim is None or (claim["name"] and claim["name"] not in numbers):
            return None
        vector[claim["claim"]] = numbers[claim["name"]] if claim["name"] else int(claim["number"])
    return vector or None


# --- the KBS's --------------------------------------------------------------------------------------------------------


def allowed(policy: str, claims: Mapping[str, Any], plugin: str) -> bool:
    """What a resource policy says.

    Args:
        policy: `default`, `allow_all`, `deny_all`, `affirming`; anything else is broken.
        claims: of a verified token.
        plugin: the one asked for.

    Raises:
        PolicyError: a broken policy.
    """
    submods = claims.get("submods", {})
    match policy:
        case "allow_all":
            return True
        case "deny_all":
            return False
        case "default":
            evidence = submods.get("cpu0", {}).get("ear.veraison.annotated-evidence", {})
            return plugin == "resource" and evidence.get("sample", False) is False  # only these two are "not" in Rego
        case "affirming":  # a submod without a status is not "not affirming", as in Rego
            return len(submods) > 0 and all(submod.get("ear.status", "affirming") == "affirming" for submod in submods.values())
        case _:
            raise PolicyError(policy)


BROKEN = "broken"
RESOURCE_POLICIES = ("default", "allow_all", "deny_all", "affirming", BROKEN)
REGO: Mapping[str, str] = {
    "allow_all": "package policy\n\ndefault allow = true\n",
    "deny_all": "package policy\n\ndefault allow = false\n",
    "affirming": (
        "package policy\n\nimport rego.v1\n\ndefault allow = false\n\n"
        "allow if {\n\tcount(input.submods) > 0\n\tevery submod in input.submods {\n"
        '\t\tsubmod["ear.status"] == "affirming"\n\t}\n}\n'
    ),
}
"""For a KBS that has Rego: the same in our words."""
_SHIPPED = {
    "31937b0caea4cd8c30c67d22f04582f0b40ef5b23dffa75fbbe4fc2fe216e0f3": "default",
    "1305ac6ce22b73422d47cce887ea614eb39db7540415e7ef54d6ffd0c809bd7f": "affirming",
}
"""SHA-256 of upstream's files `kbs/sample_policies` and the built-in default, normalised."""


def resource_policy(text: str) -> str:
    """The name of the policy that this text is; `BROKEN`: none that we know."""
    normalised = _normalised(text)
    for name, rego in REGO.items():
        if normalised == _normalised(rego):
            return name
    return _SHIPPED.get(hashlib.sha256(normalised.encode()).hexdigest(), BROKEN)


def _normalised(text: str) -> str:
    """Without comments, with one space for any white space. No policy we know has a `#` in a string."""
    return " ".join(re.sub(r"#[^\n]*", "", text).split())
