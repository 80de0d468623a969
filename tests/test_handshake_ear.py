"""Trustee's tokens: believed only under pinned keys, now, for this handshake; and what is not affirmed is said in words."""

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.closed import Ident, to_record
from agent.errors import TokenCheck, TokenError
from agent.handshake import TeePublicKey
from agent.handshake.ar4si import Meaning, Tier, TrustClaim
from agent.handshake.ear import (
    MAX_EAR_BYTES,
    Ear,
    EvidenceKind,
    FindingKind,
    check_binding,
    decode_unverified_ear,
    findings,
    verify_ear,
)
from agent.jose import pack_b64url, pack_jwk
from tests.shared import shared_data

NOW = 1_800_000_000
NONCE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
TEE = TeePublicKey(b"x" * 32, b"y" * 32)
SERVICE = ec.derive_private_key(0xEA, ec.SECP256R1())
STRANGER = ec.derive_private_key(0xB0, ec.SECP256R1())
ZEROS = {"instance-identity": 0, "file-system": 0, "runtime-opaque": 0, "storage-opaque": 0, "sourced-data": 0}
GOOD = ZEROS | {"configuration": 2, "executables": 3, "hardware": 2}
BAD = ZEROS | {"configuration": 36, "executables": 33, "hardware": 97}
Members = dict[str, Any]


def submod(kind: str, claims: Members, vector: Members = GOOD, status: str = "affirming", **evidence: object) -> Members:
    """One submodule as facts give it."""
    return {
        "ear.status": status,
        "ear.trustworthiness-vector": vector,
        "ear.appraisal-policy-id": "default",
        "ear.veraison.annotated-evidence": {
            kind: claims,
            "report_data": "00" * 64,
            "init_data": None,
            "init_data_claims": None,
            "runtime_data_claims": {"nonce": NONCE, "tee-pubkey": pack_jwk(TEE), "additional-evidence": ""},
            **evidence,
        },
    }


def payload(**submods: Members) -> Members:
    return {
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iat": NOW - 5,
        "exp": NOW + 295,
        "iss": "CoCo-Attestation-Service",
        "ear.verifier-id": {"developer": "https://confidentialcontainers.org", "build": "attestation-service 0.1.0"},
        "submods": submods or {"cpu0": submod("sample", {"svn": "1", "launch_digest": "abcde", "debug": False})},
    }


def jwk_of(key: ec.EllipticCurvePrivateKey) -> Members:
    numbers = key.public_key().public_numbers()
    point = pack_jwk(TeePublicKey(numbers.x.to_bytes(32), numbers.y.to_bytes(32)))
    return point | {"alg": "ES256"}


HEADER: Members = {"alg": "ES256", "typ": "JWT", "jwk": jwk_of(SERVICE)}


def signed(body: bytes | Members, header: bytes | Members = HEADER, key: ec.EllipticCurvePrivateKey = SERVICE) -> str:
    parts = [pack_b64url(each if isinstance(each, bytes) else json.dumps(each).encode()) for each in (header, body)]
    text = ".".join(parts)
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{pack_b64url(r.to_bytes(32) + s.to_bytes(32))}"


def verified(token: str, now: int = NOW) -> Ear:
    return verify_ear(token, (STRANGER.public_key(), SERVICE.public_key()), now)


def refused(token: str, now: int = NOW) -> TokenCheck:
    with pytest.raises(TokenError) as raised:
        verify_ear(token, (SERVICE.public_key(),), now)
    assert raised.value.__cause__ is None
    return raised.value.check


def test_the_minimal_example_says_what_it_says() -> None:
    ear = verified(signed(payload()))
    assert (ear.issuer, ear.issued_at, ear.expires_at) == ("CoCo-Attestation-Service", NOW - 5, NOW + 295)
    assert ear.cpu is not None
    assert (ear.cpu.name, ear.cpu.status, ear.cpu.kind) == ("cpu0", Tier.AFFIRMING, EvidenceKind.SAMPLE)
    assert (ear.cpu.measurement, ear.cpu.init_data, ear.cpu.nonce, ear.cpu.tee_pubkey) == ("abcde", None, NONCE, TEE)
    assert ear.cpu.vector[TrustClaim.EXECUTABLES] == 3
    assert ear.simulated
    assert [str(finding) for finding in findings(ear)] == ["cpu0 sample evidence: anybody can make it"]
    check_binding(ear, NONCE, TEE)


def test_a_recorded_payload_without_an_issuer_is_read() -> None:
    body = shared_data("trustee/trustee/attestation-service/docs/example.token.json").read_bytes()
    ear = verified(signed(body), 1760426134)
    assert ear == decode_unverified_ear(signed(body, key=STRANGER))
    assert (ear.issuer, ear.issued_at, ear.expires_at, ear.simulated) == (None, 1760426134, 1760426434, False)
    assert ear.cpu is not None
    assert (ear.cpu.kind, ear.cpu.tcb_status, ear.cpu.nonce) == (EvidenceKind.SGX, "OutOfDate", None)
    assert ear.cpu.measurement == "8f173e4613ff05c52aaf04162d234edae8c9977eae47eb2299ae16a553011c68"
    assert ear.cpu.init_data == bytes(64)
    said = [str(finding) for finding in findings(ear)]
    assert said[:4] == [
        "cpu0 hardware 97 (contraindicated): unrecognised hardware or firmware: its version matches no reference value",
        "cpu0 configuration 36 (warning): configuration unavailable to the verifier, or it matches no reference value",
        "cpu0 executables 33 (warning): unrecognised executables: a measurement matches no reference value",
        "cpu0 TCB status OutOfDate",
    ]
    assert "cpu0 security advisory INTEL-SA-00586" in said
    assert len(said) == 4 + 10


def test_snp_and_tdx_say_measurement_and_init_data() -> None:
    snp = submod("snp", {"measurement": "ab" * 48}, init_data="cd" * 32)
    tdx = submod("tdx", {"quote": {"body": {"mr_td": "12" * 48}}, "tcb_status": "UpToDate"}, init_data="34" * 48)
    earlier = submod("snp", {"measurement": "q" * 64}, init_data=base64.b64encode(b"\xcd" * 32).decode())
    later = submod("snp", {"evidence": {"measurement": "ab" * 48}}, init_data="cd" * 32)
    for claims, measurement, init_data in (
        (snp, "ab" * 48, b"\xcd" * 32),
        (earlier, "q" * 64, b"\xcd" * 32),
        (later, "ab" * 48, b"\xcd" * 32),
        (tdx, "12" * 48, b"\x34" * 48),
    ):
        ear = verified(signed(payload(cpu0=claims)))
        assert ear.cpu is not None
        assert (ear.cpu.measurement, ear.cpu.init_data, ear.simulated) == (measurement, init_data, False)
        assert findings(ear) == ()


def test_a_gpu_that_was_verified_locally_is_named_with_its_three_claims() -> None:
    cpu = submod("snp", {"measurement": "ab" * 48})
    ear = verified(signed(payload(cpu0=cpu, gpu0=submod("nvidia", {}, BAD, "contraindicated"))))
    got = findings(ear)
    assert [(each.submod, each.claim, each.value) for each in got] == [
        ("gpu0", TrustClaim.HARDWARE, 97),
        ("gpu0", TrustClaim.CONFIGURATION, 36),
        ("gpu0", TrustClaim.EXECUTABLES, 33),
    ]
    assert got[2].meaning is Meaning.EXECUTABLES_UNRECOGNISED
    assert to_record(got[2])["tier"] == "warning"


def test_zeros_are_no_findings_but_a_malfunction_is() -> None:
    vector = GOOD | {"file-system": -1, "sourced-data": 1}
    said = [str(finding) for finding in findings(verified(signed(payload(cpu0=submod("snp", {}, vector)))))]
    assert said == [
        "cpu0 file-system -1 (none): the verifier itself failed while it appraised",
        "cpu0 sourced-data 1 (none): the evidence holds elements that the verifier cannot evaluate",
    ]


def test_a_status_that_no_claim_explains_is_a_finding() -> None:
    bodies = [submod("snp", {}, GOOD, "contraindicated"), submod("snp", {}, {}, "none"), submod("snp", {}, BAD, "warning")]
    kinds = [[finding.kind for finding in findings(verified(signed(payload(cpu0=body))))] for body in bodies]
    assert kinds == [[FindingKind.STATUS], [FindingKind.STATUS], [FindingKind.CLAIM] * 3]


def test_old_collateral_is_a_finding() -> None:
    claims = {"tcb_status": "UpToDate", "collateral_expiration_status": "1"}
    (finding,) = findings(verified(signed(payload(cpu0=submod("tdx", claims)))))
    assert str(finding) == "cpu0 collateral: out of date when the service appraised"


def test_eight_gpus_with_their_switches_verbose_fit_and_more_than_the_bound_does_not() -> None:
    device = submod("nvidia", {"x": "e" * 15_000})
    names = [*(f"gpu{number}" for number in range(8)), *(f"switch{number}" for number in range(4)), "ppcie0"]
    body = payload(cpu0=submod("tdx", {"uefi_event_logs": ["e" * 60_000]}), **dict.fromkeys(names, device))
    token = signed(body)
    assert 256 << 10 < len(token) < MAX_EAR_BYTES
    assert len(verified(token).submods) == 14
    assert refused(signed(body | {"x": "e" * (3 * MAX_EAR_BYTES // 4)})) is TokenCheck.FORMAT


def test_other_peoples_fractions_are_nobodys_error() -> None:
    assert verified(signed(payload(cpu0=submod("snp", {"x": 1.5}, init_data_claims={"aa.toml": {"timeout": 0.5}}))))


@pytest.mark.parametrize("token", ["", "..", "a.b.c", signed(payload()) + "=", "ö.ö.ö", "A" * (MAX_EAR_BYTES + 1)])
def test_what_is_no_token_is_a_format_error(token: str) -> None:
    assert refused(token) is TokenCheck.FORMAT
    with pytest.raises(TokenError) as raised:
        decode_unverified_ear(token)
    assert raised.value.check is TokenCheck.FORMAT


@pytest.mark.parametrize(
    "change",
    [
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "ES384"},
        {"alg": None},
        {"typ": "JWE"},
        {"crit": ["exp"]},
        {"b64": False},
        {"zip": "DEF"},
        {"cty": "JWT"},
    ],
)
def test_another_algorithm_or_a_header_that_changes_the_meaning_is_refused(change: Members) -> None:
    assert refused(signed(payload(), HEADER | change)) is TokenCheck.ALGORITHM


def test_alg_none_without_a_signature_is_refused() -> None:
    unsigned = signed(payload(), {"alg": "none"}).rpartition(".")[0] + "."
    assert refused(unsigned) is TokenCheck.ALGORITHM


def test_a_stranger_signs_in_vain_even_with_the_key_in_the_header() -> None:
    header = HEADER | {"jwk": jwk_of(STRANGER), "kid": "1", "x5c": ["AAAA"]}
    assert refused(signed(payload(), header, STRANGER)) is TokenCheck.SIGNATURE
    assert verified(signed(payload(), {"alg": "ES256"}))  # typ and jwk are nobody's need


def test_nothing_is_read_before_the_signature_holds() -> None:
    assert refused(signed(b"no JSON", key=STRANGER)) is TokenCheck.SIGNATURE
    assert refused(signed(b"no JSON")) is TokenCheck.CLAIMS


def test_no_keys_at_all_is_our_bug_and_never_an_acceptance() -> None:
    with pytest.raises(RuntimeError):
        verify_ear(signed(payload()), (), NOW)


def test_times_have_sixty_seconds_of_leeway() -> None:
    token = signed(payload())
    assert verified(token, NOW + 295 + 59)
    assert refused(token, NOW + 295 + 60) is TokenCheck.EXPIRED
    assert verified(token, NOW - 65)
    assert refused(token, NOW - 66) is TokenCheck.NOT_YET_VALID
    assert refused(signed(payload() | {"nbf": NOW + 61})) is TokenCheck.NOT_YET_VALID
    assert refused(signed(payload() | {"nbf": "1"})) is TokenCheck.CLAIMS
    ten_years = 10 * 365 * 86400
    assert refused(token, NOW + ten_years) is TokenCheck.EXPIRED
    assert refused(token, NOW - ten_years) is TokenCheck.NOT_YET_VALID


def changed(change: Callable[[Members], object]) -> bytes:
    body = payload(cpu0=submod("snp", {}))
    change(body)
    return json.dumps(body).encode()


def cpu_of(body: Members) -> Members:
    found: Members = body["submods"]["cpu0"]
    return found


def evidence_of(body: Members) -> Members:
    found: Members = cpu_of(body)["ear.veraison.annotated-evidence"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"exp":NaN}',
        b"[" * 6000,
        b'{"iat":1,' + json.dumps(payload()).encode()[1:],
        changed(lambda b: b.pop("iat")),
        changed(lambda b: b.pop("exp")),
        changed(lambda b: b.update(exp=str(NOW))),
        changed(lambda b: b.update(exp=NOW + 0.5)),
        changed(lambda b: b.update(iat=True)),
        changed(lambda b: b.update(iat=-1)),
        changed(lambda b: b.pop("submods")),
        changed(lambda b: b.update(submods={})),
        changed(lambda b: b.update(submods=[])),
        changed(lambda b: b.update(submods={f"cpu{n}": cpu_of(b) for n in range(65)})),
        changed(lambda b: b.update(submods={"a name": cpu_of(b)})),
        changed(lambda b: b["submods"].update(cpu0=None)),
        changed(lambda b: cpu_of(b).pop("ear.status")),
        changed(lambda b: cpu_of(b).update({"ear.status": "good"})),
        changed(lambda b: cpu_of(b).update({"ear.status": 2})),
        changed(lambda b: cpu_of(b).update({"ear.trustworthiness-vector": [2]})),
        changed(lambda b: cpu_of(b).update({"ear.trustworthiness-vector": {"hardware": 128}})),
        changed(lambda b: cpu_of(b).update({"ear.trustworthiness-vector": {"hardware": 2.0}})),
        changed(lambda b: cpu_of(b).update({"ear.trustworthiness-vector": {"hardware": "2"}})),
        changed(lambda b: cpu_of(b).update({"ear.trustworthiness-vector": {"software": 2}})),
        changed(lambda b: cpu_of(b).update({"ear.veraison.annotated-evidence": "snp"})),
        changed(lambda b: evidence_of(b).update(snp=None)),
        changed(lambda b: evidence_of(b).update(sample={})),
        changed(lambda b: evidence_of(b).update(runtime_data_claims="x")),
        changed(lambda b: evidence_of(b)["runtime_data_claims"].update(nonce=1)),
        changed(lambda b: evidence_of(b)["runtime_data_claims"].update(nonce="n" * 1025)),
    ],
)
def test_a_claim_that_decides_is_read_strictly(body: bytes) -> None:
    assert refused(signed(body)) is TokenCheck.CLAIMS
    with pytest.raises(TokenError) as raised:
        decode_unverified_ear(signed(body))
    assert raised.value.check is TokenCheck.CLAIMS


def test_what_is_only_shown_is_none_in_another_form() -> None:
    claims = {"measurement": ["x"], "tcb_status": 1, "advisory_ids": "INTEL-SA-1"}
    body = payload(cpu0=submod("snp", claims, init_data="no hex")) | {"iss": 5}
    ear = verified(signed(body))
    assert ear.issuer is None
    assert ear.cpu is not None
    assert (ear.cpu.measurement, ear.cpu.tcb_status, ear.cpu.advisories, ear.cpu.init_data) == (None, None, (), None)
    odd = payload(cpu0=submod("snp", {"measurement": "<b>x</b>", "advisory_ids": [1, "\x1b[2J"]}))
    ear = verified(signed(odd))
    assert ear.cpu is not None
    assert (ear.cpu.measurement, ear.cpu.advisories) == ("unprintable", ("unprintable",))


@pytest.mark.parametrize("name", ["az-snp-vtpm", "az_snp_vtpm"])
def test_both_spellings_of_a_kind_are_known(name: str) -> None:
    ear = verified(signed(payload(cpu0=submod(name, {"measurement": "ab"}))))
    assert ear.cpu is not None
    assert (ear.cpu.kind, ear.cpu.measurement) == (EvidenceKind.AZ_SNP_VTPM, "ab")
    assert refused(signed(payload(cpu0=submod(name, {}, sample={})))) is TokenCheck.CLAIMS


def test_an_unknown_kind_of_evidence_has_no_kind() -> None:
    ear = verified(signed(payload(cpu0=submod("tee-of-tomorrow", {}))))
    assert ear.cpu is not None
    assert ear.cpu.kind is None
    bare = verified(signed(payload(cpu0={"ear.status": "none"})))
    assert bare.cpu is not None
    assert (bare.cpu.kind, dict(bare.cpu.vector), bare.cpu.nonce) == (None, {}, None)


def test_sample_evidence_gives_its_init_data_as_base64() -> None:
    ear = verified(signed(payload(cpu0=submod("sample", {}, init_data="//79"))))
    assert ear.cpu is not None
    assert ear.cpu.init_data == b"\xff\xfe\xfd"


def test_a_token_without_a_cpu_binds_nothing() -> None:
    with pytest.raises(TokenError) as raised:
        check_binding(verified(signed(payload(gpu0=submod("nvidia", {})))), NONCE, TEE)
    assert raised.value.check is TokenCheck.CLAIMS


def binding_refused(nonce: str = NONCE, key: TeePublicKey = TEE, **submods: Members) -> TokenCheck:
    with pytest.raises(TokenError) as raised:
        check_binding(verified(signed(payload(**submods))), nonce, key)
    return raised.value.check


def test_a_token_of_another_handshake_is_refused() -> None:
    runtime = {"nonce": NONCE, "tee-pubkey": pack_jwk(TEE)}
    other_key = TeePublicKey(TEE.x, TEE.x)
    assert binding_refused(nonce=NONCE + "=") is TokenCheck.NONCE
    assert binding_refused(key=other_key) is TokenCheck.TEE_PUBKEY
    assert binding_refused(cpu0=submod("snp", {}, runtime_data_claims=None)) is TokenCheck.NONCE
    assert binding_refused(cpu0=submod("snp", {}, runtime_data_claims={"nonce": NONCE})) is TokenCheck.TEE_PUBKEY
    for jwk in ({"kty": "RSA"}, pack_jwk(TEE) | {"kid": "1"}, pack_jwk(TEE) | {"alg": "RSA-OAEP-256"}, "x"):
        assert (
            binding_refused(cpu0=submod("snp", {}, runtime_data_claims=runtime | {"tee-pubkey": jwk})) is TokenCheck.TEE_PUBKEY
        )
    cpu = submod("snp", {})
    old = submod("nvidia", {}, runtime_data_claims=runtime | {"nonce": "old"})
    stolen = submod("nvidia", {}, runtime_data_claims=runtime | {"tee-pubkey": pack_jwk(other_key)})
    assert binding_refused(cpu0=cpu, gpu0=old) is TokenCheck.NONCE
    assert binding_refused(cpu0=cpu, gpu0=stolen) is TokenCheck.TEE_PUBKEY
    check_binding(verified(signed(payload(cpu0=cpu, gpu0=submod("nvidia", {}, runtime_data_claims=None)))), NONCE, TEE)


def test_neither_nonce_nor_key_is_printed() -> None:
    assert NONCE not in repr(verified(signed(payload())))
    assert Ident("cpu0") in repr(verified(signed(payload())))


@settings(max_examples=100)
@given(st.data())
def test_a_mutilated_token_never_says_anything_else(data: st.DataObject) -> None:
    good = signed(payload())
    text = list(good)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.characters())
    with contextlib.suppress(TokenError):
        assert verified("".join(text)) == verified(good)
