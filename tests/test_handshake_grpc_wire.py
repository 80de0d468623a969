"""The gRPC wire: what is packed parses to the same, and nothing else than the documented form is accepted."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import AgentError, DenialReason, MalformedEvidenceError, ProtocolProblem, RemoteProtocolError
from agent.evidence import CompositeEvidence, Evidence, Nonce, Tee, tdx_abi
from agent.evidence.binding import KeyturnClaims, additional_evidence
from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, MAX_REPORT_BYTES
from agent.handshake import (
    MAX_MESSAGE_BYTES,
    MAX_QUOTE_BYTES,
    Accepted,
    Attestation,
    Challenge,
    CredentialsRequest,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TeePublicKey,
    TokenKind,
)
from agent.handshake import grpc_wire as wire
from agent.handshake.pb import kbs_pb2 as pb
from agent.sim.machine import SimulatedMachine
from tests.gpus import NONCE, gpu_system_of

STATE = Ident("AWAIT_X")
ID = Ident("request-1")
URI = Ident("kbs:///models/demo/key.v1")
KEY = TeePublicKey(b"x" * 32, b"y" * 32)
EVIDENCE = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184, (b"leaf", b"ask")), '{"nvidia":"ü"}')
HELLO, ATTESTATION = Hello(ID, URI, Tee.SNP), Attestation(ID, KEY, EVIDENCE)
OF_A_TD = Attestation(ID, KEY, CompositeEvidence(Evidence(Tee.TDX, b"q" * (128 << 10), event_log=b"l" * (256 << 10)), ""))
CHALLENGE = Challenge(ID, Nonce(b"n" * 32), 180)
ACCEPTED = Accepted(ID, "a.b.c", Ident("p1"), (Ident("rv-1"), Ident("rv-2")))
DENIALS = [
    Denied(ID, reason, Ident("snp.measurement"), Ident("rv-1"), Ident("p1"))
    for reason in DenialReason
    if reason.name != "UNSPECIFIED"
]
RESPONSES: list[Challenge | Accepted | Denied] = [CHALLENGE, ACCEPTED, *DENIALS]
CREDENTIALS_REQUEST, CREDENTIALS_RESPONSE = CredentialsRequest(ID, "a.b.c", URI, b"s"), CredentialsResponse(ID, b"{}")
KEY_REQUEST, KEY_RESPONSE = KeyRequest(ID, "a.b.c", URI), KeyResponse(ID, b"{}", Ident("id-1"), 1)


def problem(parse: Any, data: bytes) -> ProtocolProblem:
    with pytest.raises(RemoteProtocolError) as raised:
        parse(data, STATE)
    assert raised.value.state == STATE
    assert raised.value.__cause__ is None
    return raised.value.problem


def hello(**fields: str) -> bytes:
    members = {"protocol_version": "1", "key_uri": URI, "tee": "snp"} | fields
    return pb.AttestRequest(request_id=ID, hello=pb.Hello(**members)).SerializeToString()


def attestation(**fields: object) -> bytes:
    members = {"tee_pubkey": pb.TeePublicKey(x=KEY.x, y=KEY.y), "snp": pb.SnpEvidence(report=b"r" * 1184)} | fields
    return pb.AttestRequest(request_id=ID, attestation=pb.Attestation(**members)).SerializeToString()  # type: ignore[arg-type]


def challenge(**fields: object) -> bytes:
    members = {"nonce": b"n" * 32, "expires_in_s": 180} | fields
    return pb.AttestResponse(request_id=ID, challenge=pb.Challenge(**members)).SerializeToString()  # type: ignore[arg-type]


def verdict(**decision: object) -> bytes:
    return pb.AttestResponse(request_id=ID, verdict=pb.Verdict(**decision)).SerializeToString()  # type: ignore[arg-type]


def key_response(**fields: object) -> bytes:
    members = {"request_id": ID, "jwe": b"{}", "key_id": "id", "key_version": 1} | fields
    return pb.ReleaseKeyResponse(**members).SerializeToString()  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [HELLO, Hello(ID, URI, Tee.TDX), ATTESTATION, OF_A_TD])
def test_requests_come_back(message: Hello | Attestation) -> None:
    assert wire.parse_attest_request(wire.pack_attest_request(message), STATE) == message


@pytest.mark.parametrize(
    "message", [CHALLENGE, ACCEPTED, *DENIALS, Denied(ID, DenialReason.POLICY, Ident("c"), None, Ident("p"))]
)
def test_responses_come_back(message: Challenge | Accepted | Denied) -> None:
    assert wire.parse_attest_response(wire.pack_attest_response(message), STATE) == message


def test_a_quote_that_a_device_gives_fits_into_an_attestation() -> None:
    assert MAX_QUOTE_BYTES == tdx_abi.MAX_QUOTE_BYTES


def test_eight_gpus_and_four_switches_fit_into_an_attestation(silicon: Path, tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "machine", gpus=8, switches=4, silicon=silicon)
    devices = gpu_system_of(machine).collect(NONCE)
    longest = [replace(each, report=bytes(MAX_REPORT_BYTES), certificate_chain=bytes(MAX_CHAIN_BYTES)) for each in devices]
    claims = KeyturnClaims(0, 2, 0, 1, False, False, "580.95.05", *["sha256:" + "0" * 64] * 2)
    for sent in (devices, tuple(longest)):
        evidence = replace(ATTESTATION.evidence, additional_evidence=additional_evidence(sent, claims))
        data = wire.pack_attest_request(replace(ATTESTATION, evidence=evidence))
        assert len(data) < MAX_MESSAGE_BYTES / 4
        assert wire.parse_attest_request(data, STATE) == replace(ATTESTATION, evidence=evidence)


def test_key_request_and_response_come_back() -> None:
    assert wire.parse_key_request(wire.pack_key_request(KEY_REQUEST), STATE) == KEY_REQUEST
    assert wire.parse_key_response(wire.pack_key_response(KEY_RESPONSE), STATE) == KEY_RESPONSE


def test_credentials_request_and_response_come_back() -> None:
    assert wire.parse_credentials_request(wire.pack_credentials_request(CREDENTIALS_REQUEST), STATE) == CREDENTIALS_REQUEST
    assert wire.parse_credentials_response(wire.pack_credentials_response(CREDENTIALS_RESPONSE), STATE) == CREDENTIALS_RESPONSE


def test_credentials_out_of_form_are_refused() -> None:
    for fields in ({"token": ""}, {"credentials_uri": "x"}, {"credentials_uri": ""}, {"request_id": ""}):
        sent: dict[str, Any] = {"request_id": ID, "token": "t", "credentials_uri": URI} | fields
        data = pb.ReleaseCredentialsRequest(**sent).SerializeToString()
        assert problem(wire.parse_credentials_request, data) is ProtocolProblem.MALFORMED
    data = pb.ReleaseCredentialsRequest(request_id=ID, token="t", credentials_uri=URI, session=b"s" * 4097).SerializeToString()
    assert problem(wire.parse_credentials_request, data) is ProtocolProblem.OVERSIZED
    for expected, jwe in ((ProtocolProblem.MALFORMED, b""), (ProtocolProblem.OVERSIZED, b"j" * ((8 << 10) + 1))):
        data = pb.ReleaseCredentialsResponse(request_id=ID, jwe=jwe).SerializeToString()
        assert problem(wire.parse_credentials_response, data) is expected


def test_every_denial_reason_of_the_proto_is_ours() -> None:
    wire_names = pb.DESCRIPTOR.enum_types_by_name["DenialReason"].values_by_name
    names = {name.removeprefix("DENIAL_REASON_") for name in wire_names}
    assert names == {reason.name for reason in DenialReason}


def test_the_method_names_are_the_protos() -> None:
    service = pb.DESCRIPTOR.services_by_name["KeyBroker"]
    paths = {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert paths == {wire.ATTEST_METHOD, wire.RELEASE_KEY_METHOD, wire.RELEASE_CREDENTIALS_METHOD}


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        (ProtocolProblem.MALFORMED, b""),
        (ProtocolProblem.MALFORMED, b"\xff\xff"),
        (ProtocolProblem.OVERSIZED, b"\0" * ((1 << 20) + 1)),
        (ProtocolProblem.MALFORMED, pb.AttestRequest(request_id=ID).SerializeToString()),
        (ProtocolProblem.MALFORMED, hello().replace(b"request-1", b"request 1")),
        (ProtocolProblem.MALFORMED, hello().replace(b"request-1", b".equest-1")),
        (ProtocolProblem.VERSION, hello(protocol_version="2")),
        (ProtocolProblem.VERSION, hello(protocol_version="")),
        (ProtocolProblem.MALFORMED, hello(tee="sgx")),
        (ProtocolProblem.MALFORMED, hello(tee="sample")),
        (ProtocolProblem.MALFORMED, hello(key_uri="kbs:///a/b")),
        (ProtocolProblem.MALFORMED, hello(key_uri="kbs:///a/../c")),
        (ProtocolProblem.MALFORMED, hello(key_uri="kbs:///a/b/c/d")),
        (ProtocolProblem.MALFORMED, hello(key_uri="kbs:///a/b/" + "c" * 128)),
        (ProtocolProblem.MALFORMED, hello(key_uri="https:///a/b/c")),
        (ProtocolProblem.MALFORMED, attestation(tee_pubkey=pb.TeePublicKey(x=KEY.x, y=KEY.y[1:]))),
        (ProtocolProblem.MALFORMED, attestation(tee_pubkey=pb.TeePublicKey(x=KEY.x + b"\0", y=KEY.y))),
        (ProtocolProblem.MALFORMED, attestation(tee_pubkey=None)),
        (ProtocolProblem.MALFORMED, attestation(snp=None)),
        (ProtocolProblem.MALFORMED, attestation(snp=pb.SnpEvidence(report=b"r" * 1183))),
        (ProtocolProblem.MALFORMED, attestation(snp=pb.SnpEvidence(report=b"r" * 1184, cert_chain=[b"c"] * 9))),
        (ProtocolProblem.MALFORMED, attestation(snp=pb.SnpEvidence(report=b"r" * 1184, cert_chain=[b"c" * 8193]))),
        (ProtocolProblem.MALFORMED, attestation(snp=pb.SnpEvidence(report=b"r" * 1184, cert_chain=[b""]))),
        (ProtocolProblem.MALFORMED, attestation(snp=None, tdx=pb.TdxEvidence())),
        (ProtocolProblem.MALFORMED, attestation(snp=None, tdx=pb.TdxEvidence(quote=b"q" * ((128 << 10) + 1)))),
        (
            ProtocolProblem.OVERSIZED,
            attestation(snp=None, tdx=pb.TdxEvidence(quote=b"q", event_log=b"l" * ((256 << 10) + 1))),
        ),
        (ProtocolProblem.MALFORMED, attestation(additional_evidence=b"\xff")),
        (ProtocolProblem.OVERSIZED, attestation(additional_evidence=b"a" * ((512 << 10) + 1))),
    ],
)
def test_a_request_out_of_form_is_refused(expected: ProtocolProblem, data: bytes) -> None:
    assert problem(wire.parse_attest_request, data) is expected


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        (ProtocolProblem.MALFORMED, b""),
        (ProtocolProblem.OVERSIZED, b"\0" * ((1 << 20) + 1)),
        (ProtocolProblem.MALFORMED, challenge(nonce=b"n" * 31)),
        (ProtocolProblem.MALFORMED, challenge(nonce=b"n" * 33)),
        (ProtocolProblem.MALFORMED, challenge(expires_in_s=179)),
        (ProtocolProblem.MALFORMED, challenge(expires_in_s=86_401)),
        (ProtocolProblem.MALFORMED, verdict()),
        (ProtocolProblem.MALFORMED, verdict(accepted=pb.Accepted())),
        (ProtocolProblem.MALFORMED, verdict(accepted=pb.Accepted(token="ü"))),
        (ProtocolProblem.OVERSIZED, verdict(accepted=pb.Accepted(token="t" * ((16 << 10) + 1)))),
        (ProtocolProblem.OVERSIZED, verdict(accepted=pb.Accepted(token="t", reference_value_ids=["i"] * 65))),
        (ProtocolProblem.MALFORMED, verdict(denied=pb.Denied())),
        (ProtocolProblem.MALFORMED, verdict(denied=pb.Denied(reason=99))),  # type: ignore[arg-type]
    ],
)
def test_a_response_out_of_form_is_refused(expected: ProtocolProblem, data: bytes) -> None:
    assert problem(wire.parse_attest_response, data) is expected


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        (ProtocolProblem.MALFORMED, key_response(jwe=b"")),
        (ProtocolProblem.OVERSIZED, key_response(jwe=b"j" * ((8 << 10) + 1))),
        (ProtocolProblem.MALFORMED, key_response(key_id="")),
        (ProtocolProblem.MALFORMED, key_response(key_id="a b")),
        (ProtocolProblem.MALFORMED, key_response(key_version=0)),
        (ProtocolProblem.MALFORMED, key_response(key_version=1 << 31)),
        (ProtocolProblem.MALFORMED, key_response(request_id="")),
    ],
)
def test_a_key_response_out_of_form_is_refused(expected: ProtocolProblem, data: bytes) -> None:
    assert problem(wire.parse_key_response, data) is expected


def test_a_key_request_out_of_form_is_refused() -> None:
    for fields in ({"token": ""}, {"key_uri": "x"}, {"request_id": "r" * 65}):
        sent: dict[str, Any] = {"request_id": ID, "token": "t", "key_uri": URI} | fields
        assert problem(wire.parse_key_request, pb.ReleaseKeyRequest(**sent).SerializeToString()) is ProtocolProblem.MALFORMED


def test_a_token_has_the_bound_of_its_kind_and_a_key_without_version_is_a_relays() -> None:
    long = "a" * (16384 + 1)
    accepted, key = verdict(accepted=pb.Accepted(token=long, policy_version="p")), key_response(key_version=0)
    request = pb.ReleaseKeyRequest(request_id=ID, token=long, key_uri=URI).SerializeToString()
    assert problem(wire.parse_attest_response, accepted) is ProtocolProblem.OVERSIZED
    assert problem(wire.parse_key_request, request) is ProtocolProblem.OVERSIZED
    assert problem(wire.parse_key_response, key) is ProtocolProblem.MALFORMED
    heard = wire.parse_attest_response(accepted, STATE, TokenKind.TRUSTEE)
    assert isinstance(heard, Accepted) and heard.token == long
    assert wire.parse_key_request(request, STATE, TokenKind.TRUSTEE).token == long
    assert wire.parse_key_response(key, STATE, TokenKind.TRUSTEE).key_version == 0

    longer = verdict(accepted=pb.Accepted(token="a" * (786432 + 1), policy_version="p"))
    with pytest.raises(RemoteProtocolError) as raised:
        wire.parse_attest_response(longer, STATE, TokenKind.TRUSTEE)
    assert raised.value.problem is ProtocolProblem.OVERSIZED


def test_initdata_comes_as_it_was_sent_and_is_bounded() -> None:
    sent = Attestation(ID, KEY, EVIDENCE, 'version = "0.1.0" # ü')
    assert wire.parse_attest_request(wire.pack_attest_request(sent), STATE) == sent
    assert problem(wire.parse_attest_request, attestation(init_data=b"i" * 262145)) is ProtocolProblem.OVERSIZED
    assert problem(wire.parse_attest_request, attestation(init_data=b"\xff")) is ProtocolProblem.MALFORMED


def test_a_relays_session_goes_back_as_it_came_and_is_bounded() -> None:
    accepted = Accepted(ID, "a.b.c", Ident("p1"), (), b"\0 any bytes" * 100)
    assert wire.parse_attest_response(wire.pack_attest_response(accepted), STATE) == accepted
    request = KeyRequest(ID, "a.b.c", URI, accepted.session)
    assert wire.parse_key_request(wire.pack_key_request(request), STATE) == request
    long = b"s" * 4097
    assert (
        problem(wire.parse_attest_response, verdict(accepted=pb.Accepted(token="t", session=long))) is ProtocolProblem.OVERSIZED
    )
    sent = pb.ReleaseKeyRequest(request_id=ID, token="t", key_uri=URI, session=long).SerializeToString()
    assert problem(wire.parse_key_request, sent) is ProtocolProblem.OVERSIZED
    assert "any bytes" not in repr(accepted) + repr(request)


def test_a_denial_is_heard_even_when_its_texts_are_not_printable() -> None:
    sent = pb.Denied(reason=pb.DENIAL_REASON_CLAIM, claim="a sentence,\nnot an id", reference_value_id="ü", policy_version="")
    unprintable = Ident("unprintable")
    expected = Denied(ID, DenialReason.CLAIM, unprintable, unprintable, unprintable)
    assert wire.parse_attest_response(verdict(denied=sent), STATE) == expected


def test_unknown_fields_are_ignored_and_an_unknown_oneof_member_is_malformed() -> None:
    unknown_field_99 = b"\x9a\x06\x03new"
    assert wire.parse_attest_response(challenge() + unknown_field_99, STATE) == CHALLENGE
    assert wire.parse_key_response(key_response() + unknown_field_99, STATE).key_id == "id"
    only_unknown = pb.AttestResponse(request_id=ID).SerializeToString() + unknown_field_99
    assert problem(wire.parse_attest_response, only_unknown) is ProtocolProblem.MALFORMED


def test_host_certificates_that_do_not_fit_are_the_hosts_error() -> None:
    for chain in ((b"c",) * 9, (b"c" * 8193,), (b"",)):
        evidence = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184, chain), "")
        with pytest.raises(MalformedEvidenceError):
            wire.pack_attest_request(Attestation(ID, KEY, evidence))


PARSERS: list[tuple[Any, Any, list[bytes]]] = [
    (wire.parse_attest_request, wire.pack_attest_request, [wire.pack_attest_request(m) for m in (HELLO, ATTESTATION)]),
    (wire.parse_attest_response, wire.pack_attest_response, [wire.pack_attest_response(m) for m in RESPONSES]),
    (wire.parse_key_request, wire.pack_key_request, [wire.pack_key_request(KEY_REQUEST)]),
    (wire.parse_credentials_request, wire.pack_credentials_request, [wire.pack_credentials_request(CREDENTIALS_REQUEST)]),
    (wire.parse_credentials_response, wire.pack_credentials_response, [wire.pack_credentials_response(CREDENTIALS_RESPONSE)]),
    (wire.parse_key_response, wire.pack_key_response, [wire.pack_key_response(KEY_RESPONSE)]),
]


@pytest.mark.parametrize(("parse", "pack", "seeds"), PARSERS)
@settings(max_examples=150)
@given(st.data())
def test_any_bytes_parse_and_pack_to_the_same_or_are_refused(
    parse: Any, pack: Any, seeds: list[bytes], data: st.DataObject
) -> None:
    seed = bytearray(data.draw(st.sampled_from([*seeds, b""])))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(seed)))
        seed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        message = parse(bytes(seed), STATE)
    except AgentError:
        return
    assert parse(pack(message), STATE) == message


def test_handshake_md_names_every_limit_as_it_is() -> None:
    text = (Path(__file__).resolve().parents[1] / "protos" / "HANDSHAKE.md").read_text()
    limits = {name: value for name, value in vars(wire).items() if re.fullmatch(r"M(AX|IN)_[A-Z_]+|SNP_REPORT_BYTES", name)}
    stated = {name: int(value.replace(" ", "")) for name, value in re.findall(r"\| `([A-Z_]+)` \| ([0-9 ]+) \|", text)}
    assert stated == {name: value for name, value in limits.items() if name != "MAX_IDENT_CHARS"}
