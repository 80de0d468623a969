"""The attestation service inside the test KBS: from an Attestation message to an EAR token.

Reads the message as kbs-types 0.18 does, rebuilds what the evidence must be bound to, has it verified, appraises each device
under `default_<class>`, and signs. Not here: gRPC and REST services, other policy ids than `default`, corim and swid
reference values, and the verifiers of other TEEs, which refuse.
"""

import base64
import hashlib
import json
import re
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.sim.trustee_evidence import Claims, EvidenceRefused, Fields, decode_b64, verify_sample, verify_snp_evidence
from agent.sim.trustee_gpus import verify_devices, verify_sample_device
from agent.sim.trustee_jose import TokenSigner, jwk_of
from agent.sim.trustee_knobs import Knobs, TokenFault
from agent.sim.trustee_policies import TRUST_CLAIMS, Vector, constant_policy, default_cpu, default_gpu, status_of
from agent.sim.trustee_quotes import verify_tdx_evidence

TEES = (
    *("az-snp-vtpm", "az-tdx-vtpm", "nvidia", "sgx", "snp", "tdx", "cca", "csv", "se", "hygondcu", "tpm"),
    *("sample", "sampledevice"),
)
"""What /auth takes for a TEE. Evidence is verified of `sample`, `snp`, `tdx`, `nvidia` and `sampledevice`."""
DEFAULT_HASH = "sha384"
_HASHES = ("sha256", "sha384", "sha512", "sm3")
_KEY_MEMBERS = {"RSA": ("alg", "n", "e"), "EC": ("crv", "alg", "x", "y"), "AKP": ("alg", "pub")}
_TEE_PUBKEY_POINTERS = (
    ("tdx", "attester_runtime_data", "tee-pubkey"),
    ("tdx", "attester_user_data", "tee-pubkey"),
    ("customized_claims", "runtime_data", "tee-pubkey"),
    ("submods", "cpu0", "ear.veraison.annotated-evidence", "runtime_data_claims", "tee-pubkey"),
    ("tee-pubkey",),
)
_PROFILE = "tag:github.com,2024:confidential-containers/Trustee"
_ISSUER = "CoCo-Attestation-Service"
_VERIFIER = {"developer": "https://confidentialcontainers.org", "build": "attestation-service 0.1.0"}


@dataclass(frozen=True, slots=True)
class Attestation:
    """The message of /attest.

    Attributes:
        nonce: as the guest sent it back.
        tee_pubkey: exactly the members of its kind; others are dropped, as upstream drops them before it hashes.
        init_data: the text of an initdata document.
    """

    nonce: str
    tee_pubkey: dict[str, str]
    primary_evidence: object
    additional_evidence: str
    init_data: str | None


def parse_attestation(body: bytes) -> Attestation:
    """The message in a body of JSON. Raises EvidenceRefused."""
    message = Fields(parse_json(body), "Attestation")
    runtime_data, evidence = message.fields("runtime-data"), message.fields("tee-evidence")
    init_data = message.optional("init-data")
    text = None
    if init_data is not None:
        document = Fields(init_data, "init-data")
        if document.text("format") != "toml":
            raise EvidenceRefused("init-data: unsupported format")
        text = document.text("body")
    return Attestation(
        nonce=runtime_data.text("nonce"),
        tee_pubkey=parse_tee_pubkey(runtime_data.value("tee-pubkey")),
        primary_evidence=evidence.value("primary_evidence"),
        additional_evidence=evidence.text("additional_evidence"),
        init_data=text,
    )


def parse_tee_pubkey(value: object) -> dict[str, str]:
    """The exact members of a tee-pubkey. Raises EvidenceRefused."""
    key = Fields(value, "tee-pubkey")
    kind = key.text("kty")
    if kind not in _KEY_MEMBERS:
        raise EvidenceRefused("tee-pubkey: unknown variant")
    return {"kty": kind, **{name: key.text(name) for name in _KEY_MEMBERS[kind]}}


def tee_pubkey_of(claims: Mapping[str, Any]) -> object:
    """The first hit of the pointers KBS tries. Raises EvidenceRefused."""
    for pointer in _TEE_PUBKEY_POINTERS:
        value: object = claims
        for step in pointer:
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            return value
    raise EvidenceRefused("no tee-pubkey")


def parse_json(body: bytes | str) -> object:
    """JSON without NaN, Infinity and half surrogate pairs, as serde has it. Raises EvidenceRefused."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        value: object = json.loads(body, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise EvidenceRefused("not JSON") from exc
    return value


def runtime_digest(runtime_data: Mapping[str, object], algorithm: str = DEFAULT_HASH) -> bytes:
    """Hash of the canonical JSON (RFC 8785): of three members for the CPU, without `additional-evidence` for devices.

    Raises EvidenceRefused for an algorithm that nobody has.
    """
    return _hashed(algorithm, rfc8785.dumps(dict(runtime_data)))  # type: ignore[arg-type] # strings and objects


def _hashed(algorithm: str, data: bytes) -> bytes:
    try:
        return hashlib.new(algorithm, data).digest()
    except ValueError as exc:  # sm3 is not in every OpenSSL
        raise EvidenceRefused(f"no hash {algorithm}") from exc


@dataclass(frozen=True, slots=True)
class InitData:
    digest: bytes
    claims: dict[str, Any]


def parse_init_data(body: str) -> InitData:
    """Digest and claims of an initdata document. Raises EvidenceRefused."""
    try:
        document = tomllib.loads(body)
    except (ValueError, RecursionError) as exc:
        raise EvidenceRefused("init-data: not TOML") from exc
    algorithm, data = document.get("algorithm"), document.get("data")
    if document.get("version") != "0.1.0" or algorithm not in _HASHES:
        raise EvidenceRefused("init-data: version or algorithm")
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        raise EvidenceRefused("init-data: data")
    claims: dict[str, Any] = {}
    for name, text in data.items():
        if name in ("aa.toml", "cdh.toml"):
            try:
                claims[name] = tomllib.loads(text)
            except ValueError as exc:
                raise EvidenceRefused(f"init-data: {name}") from exc
        elif name == "policy.rego":
            if policy_data := re.search(r"^policy_data\s*:=\s*(?=\{)", text, re.MULTILINE):
                try:
                    claims["agent_policy_claims"], _ = json.JSONDecoder().raw_decode(text, policy_data.end())
                except ValueError as exc:
                    raise EvidenceRefused("init-data: policy_data") from exc
        else:
            claims[name] = text
    return InitData(_hashed(algorithm, body.encode()), claims)


@dataclass
class AttestationService:
    """Everything it trusts, knows and signs with; safe to use from many threads.

    Attributes:
        roots: trusted beside the vendors' own.
        endorsements: AMD's intermediates, and VCEKs for evidence that brings none: what upstream has built in or fetches.
    """

    signer: TokenSigner
    roots: Sequence[x509.Certificate]
    endorsements: Sequence[x509.Certificate]
    _values: dict[str, object] = field(default_factory=dict, init=False)
    _policies: dict[str, Vector | None] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def register(self, values: Mapping[str, object]) -> None:
        """Reference values by id: lists where the policy looks something up in them, single values where it compares."""
        with self._lock:
            self._values |= values

    def register_message(self, body: bytes) -> None:
        """A body of POST /reference-value. Raises EvidenceRefused."""
        message = Fields(parse_json(body), "reference value")
        if message.text("version") != "0.1.0" or message.text("type") != "sample":
            raise EvidenceRefused("no extractor for this message")
        values = parse_json(decode_b64(message.text("payload"), "payload"))
        if not isinstance(values, dict):
            raise EvidenceRefused("payload: not an object")
        self.register(values)

    def value(self, name: str) -> object:
        with self._lock:
            return self._values.get(name)

    def set_policy(self, policy_id: str, vector: Vector | None) -> None:
        """From now on every device under this id (`default_gpu`, …) gets these claims; None: the policy is broken."""
        with self._lock:
            self._policies[policy_id] = vector

    def set_policy_text(self, policy_id: str, rego: str) -> None:
        self.set_policy(policy_id, constant_policy(rego))

    def token(self, tee: str, attestation: Attestation, nonce: str, now: float, knobs: Knobs) -> str:
        """The token for evidence that is genuine and bound to `nonce` and key. Raises EvidenceRefused."""
        algorithm = knobs.selected_hash or DEFAULT_HASH
        bound = {"nonce": nonce, "tee-pubkey": attestation.tee_pubkey}
        devices_digest = runtime_digest(bound, algorithm)
        bound_all = {**bound, "additional-evidence": attestation.additional_evidence}
        init_data = None if attestation.init_data is None else parse_init_data(attestation.init_data)
        claims = self._verify_primary(tee, attestation, runtime_digest(bound_all, algorithm), init_data, knobs)
        shown = bound_all if knobs.verbose_token else bound
        submods = {"cpu0": self._submod("cpu", tee, claims, shown, init_data, knobs)}
        for number, (kind, device) in enumerate(self._verify_devices(attestation.additional_evidence, devices_digest)):
            submods[f"gpu{number}"] = self._submod("gpu", kind, device, bound, None, knobs)
        issued_at = int(now)
        ear = {
            "eat_profile": _PROFILE,
            "iat": issued_at,
            "exp": issued_at + int(knobs.token_life_s),
            "iss": _ISSUER,
            "ear.verifier-id": _VERIFIER,
            "submods": {} if knobs.token_fault is TokenFault.WITHOUT_SUBMODS else submods,
        }
        if knobs.token_fault is TokenFault.WITHOUT_EXPIRY:
            del ear["exp"]
        return self.signer.sign(ear, knobs.token_fault)

    def _verify_primary(
        self, tee: str, attestation: Attestation, expected: bytes, init_data: InitData | None, knobs: Knobs
    ) -> Claims:
        evidence, digest = attestation.primary_evidence, None if init_data is None else init_data.digest
        match tee:
            case "sample":
                return verify_sample(evidence, expected, digest)
            case "snp":
                return verify_snp_evidence(evidence, expected, digest, self.roots, self.endorsements)
            case "tdx":
                tcb = (knobs.tcb_status, knobs.advisory_ids)
                return verify_tdx_evidence(evidence, expected, digest, self.roots, tcb)
            case _:
                raise EvidenceRefused(f"no verifier for {tee}")

    def _verify_devices(self, text: str, expected: bytes) -> list[tuple[str, Claims]]:
        if not text:
            return []
        evidence = parse_json(text)
        if not isinstance(evidence, dict) or not evidence.keys() <= set(TEES):
            raise EvidenceRefused("additional_evidence: not a map of TEEs")
        found: list[tuple[str, Claims]] = []
        for tee, value in evidence.items():
            match tee:
                case "nvidia":
                    found += [(tee, claims) for claims in verify_devices(value, expected, self.roots)]
                case "sampledevice":
                    found.append((tee, verify_sample_device(value, expected)))
                case _:
                    raise EvidenceRefused(f"no verifier for {tee}")
        return found

    def _submod(
        self, kind: str, tee: str, claims: Claims, runtime_data: Mapping[str, Any], init_data: InitData | None, knobs: Knobs
    ) -> dict[str, Any]:
        tee_claims = {name: value for name, value in claims.items() if name not in ("report_data", "init_data")}
        evidence: dict[str, Any] = {
            tee: tee_claims,
            "report_data": claims.get("report_data"),
            "init_data": claims.get("init_data"),
            "init_data_claims": None if init_data is None else init_data.claims,
            "runtime_data_claims": _told(runtime_data, knobs.token_fault),
        }
        vector = self._appraise(f"default_{kind}", evidence)
        submod = {
            "ear.status": status_of(vector),
            "ear.trustworthiness-vector": {name: vector.get(name, 0) for name in TRUST_CLAIMS},
            "ear.appraisal-policy-id": "default",
            "ear.veraison.annotated-evidence": evidence,
        }
        if init_data is not None and (identifiers := _identifiers(init_data.claims)):
            submod["ear.trustee.identifiers"] = {"validated": identifiers}
        return submod

    def _appraise(self, policy_id: str, evidence: Mapping[str, Any]) -> Vector:
        with self._lock:
            posted = policy_id in self._policies
            vector = self._policies.get(policy_id)
        if not posted:
            return (default_cpu if policy_id == "default_cpu" else default_gpu)(evidence, self.value)
        if vector is None or not vector.keys() <= set(TRUST_CLAIMS):
            raise EvidenceRefused(f"policy {policy_id} cannot be evaluated")
        return vector


def _told(runtime_data: Mapping[str, Any], fault: TokenFault | None) -> dict[str, Any] | None:
    match fault:
        case TokenFault.WITHOUT_RUNTIME_DATA:
            return None
        case TokenFault.OTHER_NONCE:
            return {**runtime_data, "nonce": base64.b64encode(bytes(32)).decode()}
        case TokenFault.OTHER_TEE_PUBKEY:
            other = ec.generate_private_key(ec.SECP256R1()).public_key()
            return {**runtime_data, "tee-pubkey": jwk_of(other, "ECDH-ES+A256KW")}
        case _:
            return dict(runtime_data)


def _identifiers(claims: Mapping[str, Any]) -> dict[str, list[object]]:
    """Images and users of the containers that a Kata agent policy names."""
    policy = claims.get("agent_policy_claims")
    containers = policy.get("containers") if isinstance(policy, dict) else None
    found: dict[str, list[object]] = {"container_images": [], "container_uids": []}
    for container in containers if isinstance(containers, list) else ():
        for name, path in (
            ("container_images", ("OCI", "Annotations", "io.kubernetes.cri.image-name")),
            ("container_uids", ("OCI", "Process", "User", "UID")),
        ):
            value: object = container
            for step in path:
                value = value.get(step) if isinstance(value, dict) else None
            if value is not None:
                found[name].append(value)
    return {name: values for name, values in found.items() if values}
