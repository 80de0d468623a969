"""An evil relay: whoever ends TLS with the broker's own certificate, and so reads and writes all that guest and broker say.

Whole boots, with the real broker behind the relay. It can stop a boot. It cannot read a key, lend its own, or change what the
authority decided.
"""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from agent.broker.jwe import seal
from agent.closed import Ident
from agent.errors import (
    AgentError,
    ArtifactUnavailableError,
    BrokerFailureError,
    BrokerUnreachableError,
    CredentialsProblem,
    DenialReason,
    KeyMismatchError,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    LeaseEndedError,
    ProtocolProblem,
    RemoteProtocolError,
    StoreCredentialsError,
    StoreProblem,
    TokenCheck,
    TokenError,
    Unreachable,
    UnwrapCheck,
)
from agent.evidence import Nonce, RuntimeData
from agent.evidence.collect import check_measured, open_devices
from agent.evidence.gate import ExpectedReady
from agent.handshake import Attestation
from agent.handshake import grpc_wire as wire
from agent.handshake.grpc_status import Denial, Failure
from agent.handshake.pb import kbs_pb2 as pb
from agent.jose import pack_b64, pack_b64url, pack_jwk, parse_b64url
from agent.keys import EphemeralKey
from agent.server.presets import command_digest
from tests.faults.broker import good_broker, tls_pair
from tests.faults.canaries import PEER_TEXT
from tests.faults.table import ATTESTED, GIVEN, RELEASED, SERVED, Attempts, Audit, Fault, FaultWorld
from tests.hostile_broker import Cut, Relay, claims_of, edited, in_thread, refuses_key, served, signed
from tests.world import KEY_URI

RELAY = ec.derive_private_key(0xE1, ec.SECP256R1())
"""The relay's own signing key."""
RELAY_PAIR = EphemeralKey(ec.derive_private_key(0xE2, ec.SECP256R1()))
"""A key pair of its own, to have keys sealed to."""
RELAY_KEY = b"\xee" * 32
RELOAD_S = 0.5
"""For the broker to read its policy again; the request waits for it."""
Change = Callable[[FaultWorld, Relay], None]


def relayed(world: FaultWorld, change: Change) -> Relay:
    """Put a relay between this world's guest and its broker."""
    relay = Relay(f"127.0.0.1:{world.broker_port}", world.broker.ca_pem, world.broker_config["server_name"])
    change(world, relay)
    world.broker_config["endpoints"] = [world.undo.enter_context(in_thread(served(relay, tls_pair(world))))]
    return relay


# --- the sealed key -----------------------------------------------------------------------------------------------------


def on_jwe(change: Callable[[Relay, bytes], bytes]) -> Change:
    """Whatever the broker sealed, this goes to the guest."""

    def apply(_: FaultWorld, relay: Relay) -> None:
        def on_key(key: pb.ReleaseKeyResponse) -> None:
            key.jwe = change(relay, key.jwe)

        relay.on_key = on_key

    return apply


def member(name: str, change: Callable[[bytes], bytes]) -> Callable[[Relay, bytes], bytes]:
    """The broker's JWE with another value of one member."""

    def apply(_: Relay, jwe: bytes) -> bytes:
        members = json.loads(jwe)
        return json.dumps(members | {name: pack_b64url(change(parse_b64url(members[name])))}).encode()

    return apply


def header(**changes: object) -> Callable[[Relay, bytes], bytes]:
    return member("protected", lambda text: json.dumps(json.loads(text) | changes).encode())


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def wrong_curve() -> dict[str, str]:
    return {"crv": "P-256", "kty": "EC", "x": pack_b64url(b"\1" * 32), "y": pack_b64url(b"\2" * 32)}


def key_row(name: str, check: UnwrapCheck, change: Callable[[Relay, bytes], bytes]) -> Fault:
    return evil(name, KeyUnwrapError, on_jwe(change), {"check": check.value}, SERVED)


def evil(
    name: str,
    error: type[AgentError],
    change: Change,
    fields: Mapping[str, object],
    audit: list[Audit] | None,
    attempts: Attempts = Attempts.ONCE,
) -> Fault:
    return Fault(f"relay: {name}", error, lambda world: relayed(world, change), fields=fields, audit=audit, attempts=attempts)


KEYS = [
    evil(
        "its own key sealed to the guest",
        KeyMismatchError,
        on_jwe(lambda relay, _: seal(RELAY_KEY, relay.guest_key())),
        {},
        SERVED,
    ),
    key_row("a key sealed to somebody else", UnwrapCheck.KEY_WRAP, lambda _, __: seal(RELAY_KEY, RELAY_PAIR.public)),
    key_row("a key of 16 bytes", UnwrapCheck.LENGTH, lambda relay, _: seal(RELAY_KEY[:16], relay.guest_key())),
    key_row("a keyset that is none", UnwrapCheck.KEYSET, lambda relay, _: seal(bytes(300), relay.guest_key())),
    key_row("another wrapped key", UnwrapCheck.KEY_WRAP, member("encrypted_key", flip)),
    key_row("another ciphertext", UnwrapCheck.CONTENT, member("ciphertext", flip)),
    key_row("another tag", UnwrapCheck.CONTENT, member("tag", flip)),
    key_row("another nonce", UnwrapCheck.CONTENT, member("iv", flip)),
    key_row("a key in no encryption", UnwrapCheck.ALGORITHM, header(enc="none")),
    key_row("a key under a direct agreement", UnwrapCheck.ALGORITHM, header(alg="ECDH-ES")),
    key_row("a key with a critical extension", UnwrapCheck.FORMAT, header(crit=["exp"])),
    key_row("an ephemeral key off the curve", UnwrapCheck.EPHEMERAL_KEY, header(epk=wrong_curve())),
    key_row("a key that is text", UnwrapCheck.FORMAT, lambda _, __: PEER_TEXT.encode()),
]


# --- the verdict --------------------------------------------------------------------------------------------------------


def on_token(change: Callable[[str], str]) -> Change:
    """Whatever the authority signed, this goes to the guest."""

    def apply(_: FaultWorld, relay: Relay) -> None:
        def on_answer(answer: pb.AttestResponse) -> None:
            if answer.verdict.HasField("accepted"):
                answer.verdict.accepted.token = change(answer.verdict.accepted.token)

        relay.on_answer = on_answer

    return apply


def with_header(header: dict[str, object], signature: bytes | None = None) -> Callable[[str], str]:
    def change(token: str) -> str:
        _, claims, theirs = token.split(".")
        return f"{pack_b64url(json.dumps(header).encode())}.{claims}.{theirs if signature is None else pack_b64url(signature)}"

    return change


def other_measurement(world: FaultWorld) -> None:
    world.row_snp["measurements"] = [{"id": "image-1", "value": "00" * 48}]


def acceptance_for_a_denial(world: FaultWorld, relay: Relay) -> None:
    """The best that can be said without the authority's key: every claim right, and signed by the relay."""
    other_measurement(world)

    def on_answer(answer: pb.AttestResponse) -> None:
        if answer.verdict.HasField("denied"):
            nonce = Nonce(relay.answers[0].challenge.nonce)
            now = int(time.time())
            claims = {
                "iss": "keyturn-broker",
                "iat": now,
                "exp": now + 300,
                "nonce": pack_b64(nonce),
                "tee-pubkey": pack_jwk(relay.guest_key()),
                "key_uri": KEY_URI,
                "policy_version": "7",
                "min_model_version": 0,
                "simulated": True,
            }
            answer.verdict.accepted.token = signed(claims, RELAY)

    relay.on_answer = on_answer


def old_acceptance_for_a_denial(world: FaultWorld, relay: Relay) -> None:
    """A token that the authority did sign, for the guest's last boot, when its image was still allowed."""
    other_measurement(world)
    old = good_broker(world).token(Nonce(b"o" * 32), RELAY_PAIR.public)

    def on_answer(answer: pb.AttestResponse) -> None:
        if answer.verdict.HasField("denied"):
            answer.verdict.accepted.token = old

    relay.on_answer = on_answer


def verdict_of_the_attempt_before(_: FaultWorld, relay: Relay) -> None:
    def on_answer(answer: pb.AttestResponse) -> None:
        if not answer.HasField("verdict"):
            return
        tokens = [kept.verdict.accepted.token for kept in relay.answers if kept.HasField("verdict")]
        if len(tokens) == 1:
            raise Cut
        answer.verdict.accepted.token = tokens[0]

    relay.on_answer = on_answer


def verdict_of_another_guest(world: FaultWorld, relay: Relay) -> None:
    """A genuine guest of the attacker's attests with the nonce that the victim was given."""

    def on_request(request: pb.AttestRequest) -> None:
        if not request.HasField("attestation"):
            return
        devices = open_devices(
            check_measured(world.machine.attester(), world.machine.host_data),
            world.machine.gpu_system(),
            world.machine.runtime(),
            gpu_count=1,
            expected_ready=ExpectedReady.UNSET,
            manifest_digest=world.manifest_digest,
            server_command_digest=command_digest(tuple(world.server["command"])),
        )
        public = RELAY_PAIR.public
        evidence = devices.collect(RuntimeData(Nonce(relay.answers[-1].challenge.nonce), public.x, public.y))
        attestation = Attestation(Ident(request.request_id), public, evidence)
        request.CopyFrom(pb.AttestRequest.FromString(wire.pack_attest_request(attestation)))

    relay.on_request = on_request


def denial_for_an_acceptance(_: FaultWorld, relay: Relay) -> None:
    def on_answer(answer: pb.AttestResponse) -> None:
        if answer.HasField("verdict"):
            answer.verdict.denied.reason = pb.DENIAL_REASON_POLICY
            answer.verdict.denied.claim = "policy.revoked"
            answer.verdict.denied.policy_version = f"{PEER_TEXT} !"

    relay.on_answer = on_answer


def signature_row(name: str, change: Callable[[str], str], check: TokenCheck = TokenCheck.SIGNATURE) -> Fault:
    return evil(name, TokenError, on_token(change), {"check": check.value}, [ATTESTED])


DENIED_BY_BROKER: Audit = ("attest", "denied", "snp.measurement")
VERDICTS = [
    evil(
        "an acceptance of its own for a denial",
        TokenError,
        acceptance_for_a_denial,
        {"check": TokenCheck.SIGNATURE.value},
        [DENIED_BY_BROKER],
    ),
    evil(
        "the acceptance of an earlier boot for a denial",
        TokenError,
        old_acceptance_for_a_denial,
        {"check": TokenCheck.NONCE.value},
        [DENIED_BY_BROKER],
    ),
    evil(
        "the verdict of the attempt before",
        TokenError,
        verdict_of_the_attempt_before,
        {"check": TokenCheck.NONCE.value},
        [ATTESTED, ATTESTED],
        Attempts.AGAIN,
    ),
    evil(
        "the verdict of another genuine guest",
        TokenError,
        verdict_of_another_guest,
        {"check": TokenCheck.TEE_PUBKEY.value},
        [ATTESTED],
    ),
    evil(
        "a denial for an acceptance",
        KeyReleaseDeniedError,
        denial_for_an_acceptance,
        {"claim": "policy.revoked", "policy_version": "unprintable"},
        [ATTESTED],
    ),
    signature_row("a lower floor", lambda token: edited(token, min_model_version=0)),
    signature_row("a longer lease", lambda token: edited(token, lease_s=1 << 30)),
    signature_row("another key", lambda token: edited(token, key_uri="kbs:///models/other/1")),
    signature_row("a later end", lambda token: edited(token, exp=claims_of(token)["exp"] + 1)),
    signature_row("evidence that is not simulated", lambda token: edited(token, simulated=False)),
    signature_row("the same claims under its own key", lambda token: signed(claims_of(token), RELAY)),
    signature_row("no signature", with_header({"alg": "ES256", "typ": "JWT"}, b"")),
    signature_row("an algorithm that signs nothing", with_header({"alg": "none", "typ": "JWT"}, b""), TokenCheck.ALGORITHM),
    signature_row(
        "a header that brings its own key",
        with_header({"alg": "ES256", "typ": "JWT", "jwk": {"kty": "EC"}}),
        TokenCheck.ALGORITHM,
    ),
    signature_row("a token that is text", lambda _: PEER_TEXT, TokenCheck.FORMAT),
]


# --- a policy that changes while a guest is between verdict and key, which a relay can bring about by holding the request ---


def meanwhile(change: Callable[[FaultWorld], None]) -> Change:
    """The authority changes its policy while the key request is under way."""

    def apply(world: FaultWorld, relay: Relay) -> None:
        async def on_key_request(_: pb.ReleaseKeyRequest) -> None:
            change(world)
            assert world.broker_process
            world.broker_process.send_signal(signal.SIGHUP)
            await asyncio.sleep(RELOAD_S)

        relay.on_key_request = on_key_request

    return apply


def revoke(world: FaultWorld) -> None:
    world.row["revoked"] = True
    world.write_policy()


def next_version(world: FaultWorld) -> None:
    path = world.write_policy()
    path.write_text(path.read_text().replace('version = "7"', 'version = "8"'))


def denied_after_the_verdict(name: str, change: Callable[[FaultWorld], None], claim: str, version: str) -> Fault:
    fields = {"reason": "policy", "claim": claim, "policy_version": version}
    row = evil(name, KeyReleaseDeniedError, meanwhile(change), fields, [ATTESTED, ("release", "denied", claim)])
    return replace(row, may_stay=frozenset({"policy.toml"}))


POLICY = [
    denied_after_the_verdict("a key that is revoked meanwhile", revoke, "policy.revoked", "7"),
    denied_after_the_verdict("a policy that is replaced meanwhile", next_version, "token.policy_version", "8"),
]


# --- order, time and evidence -------------------------------------------------------------------------------------------


def other_nonce(_: FaultWorld, relay: Relay) -> None:
    def on_answer(answer: pb.AttestResponse) -> None:
        if answer.HasField("challenge"):
            answer.challenge.nonce = b"e" * 32

    relay.on_answer = on_answer


def own_public_key(_: FaultWorld, relay: Relay) -> None:
    def on_request(request: pb.AttestRequest) -> None:
        if request.HasField("attestation"):
            request.attestation.tee_pubkey.x = RELAY_PAIR.public.x
            request.attestation.tee_pubkey.y = RELAY_PAIR.public.y

    relay.on_request = on_request


def without_gpus(_: FaultWorld, relay: Relay) -> None:
    def on_request(request: pb.AttestRequest) -> None:
        if request.HasField("attestation"):
            request.attestation.additional_evidence = b""

    relay.on_request = on_request


def for_another_key(_: FaultWorld, relay: Relay) -> None:
    def on_request(request: pb.AttestRequest) -> None:
        if request.HasField("hello"):
            request.hello.key_uri = "kbs:///models/other/1"

    relay.on_request = on_request


def key_request_for_another_key(_: FaultWorld, relay: Relay) -> None:
    def on_key_request(request: pb.ReleaseKeyRequest) -> None:
        request.key_uri = "kbs:///models/other/1"

    relay.on_key_request = on_key_request


def edited_key_request(_: FaultWorld, relay: Relay) -> None:
    def on_key_request(request: pb.ReleaseKeyRequest) -> None:
        request.token = edited(request.token, lease_s=1 << 30)

    relay.on_key_request = on_key_request


def other_request_id(_: FaultWorld, relay: Relay) -> None:
    def on_answer(answer: pb.AttestResponse) -> None:
        answer.request_id = "another-request"

    relay.on_answer = on_answer


def verdict_at_once(_: FaultWorld, relay: Relay) -> None:
    def on_answer(answer: pb.AttestResponse) -> None:
        answer.verdict.accepted.token = "a.b.c"

    relay.on_answer = on_answer


def held(part: str) -> Change:
    """This part is read and never passed on."""

    def apply(world: FaultWorld, relay: Relay) -> None:
        async def hold(message: pb.AttestResponse | pb.ReleaseKeyResponse) -> None:
            if isinstance(message, pb.ReleaseKeyResponse) or message.HasField("verdict"):
                await asyncio.Event().wait()

        setattr(relay, part, hold)
        world.broker_config["timeout_s"] = 2

    return apply


def key_after_its_lease(world: FaultWorld, relay: Relay) -> None:
    world.row["lease_s"] = 1

    async def late(_: pb.ReleaseKeyResponse) -> None:
        await asyncio.sleep(1.5)

    relay.on_key = late


def forged_denial_of_the_key(_: FaultWorld, relay: Relay) -> None:
    denial = Denial(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("8"))
    relay.releases = refuses_key(grpc.StatusCode.PERMISSION_DENIED, Failure(7, Ident("POLICY_REVOKED"), denial=denial))


def replica_with_another_token_key(world: FaultWorld, relay: Relay) -> None:
    replica = good_broker(world)
    replica.authority = RELAY
    relay.releases = replica.release


OTHER_REPORT_DATA: Audit = ("attest", "denied", "snp.report-data")
TIMEOUT = {"reason": Unreachable.TIMEOUT.value}
REFUSED = {"claim": "snp.report-data"}
ORDER = [
    evil("another nonce for the guest", KeyReleaseDeniedError, other_nonce, REFUSED, [OTHER_REPORT_DATA]),
    evil("its own public key in the evidence", KeyReleaseDeniedError, own_public_key, REFUSED, [OTHER_REPORT_DATA]),
    evil("the evidence without the GPUs", KeyReleaseDeniedError, without_gpus, REFUSED, [OTHER_REPORT_DATA]),
    evil(
        "a Hello for another key",
        KeyReleaseDeniedError,
        for_another_key,
        {"claim": "policy.row"},
        [("attest", "denied", "policy.row")],
    ),
    evil(
        "a key request for another key",
        KeyReleaseDeniedError,
        key_request_for_another_key,
        {"reason": "policy", "claim": "token.key_uri", "policy_version": "7"},
        [ATTESTED, ("release", "denied", "token.key_uri")],
    ),
    evil(
        "a key request with an edited token",
        BrokerFailureError,
        edited_key_request,
        {"status": 16, "reason": "TOKEN_SIGNATURE"},
        [ATTESTED, ("release", "failed", "TOKEN_SIGNATURE")],
    ),
    evil(
        "answers to another request",
        RemoteProtocolError,
        other_request_id,
        {"problem": ProtocolProblem.REQUEST_ID.value},
        None,
    ),
    evil(
        "a verdict instead of the challenge",
        RemoteProtocolError,
        verdict_at_once,
        {"problem": ProtocolProblem.UNEXPECTED_MESSAGE.value},
        None,
    ),
    evil("a verdict that it keeps", BrokerUnreachableError, held("on_answer"), TIMEOUT, [ATTESTED]),
    evil("a key that it keeps", BrokerUnreachableError, held("on_key"), TIMEOUT, SERVED),
    evil("a key after its lease", LeaseEndedError, key_after_its_lease, {"lease_s": 1}, SERVED),
    evil(
        "a denial of the key",
        KeyReleaseDeniedError,
        forged_denial_of_the_key,
        {"claim": "policy.revoked", "policy_version": "8"},
        [ATTESTED],
    ),
    evil(
        "a replica with another token key",
        BrokerFailureError,
        replica_with_another_token_key,
        {"status": 16, "reason": "TOKEN_SIGNATURE"},
        [ATTESTED],
    ),
]

# --- credentials of the store -------------------------------------------------------------------------------------------


def own_credentials(_: FaultWorld, relay: Relay) -> None:
    def on_credentials(credentials: pb.ReleaseCredentialsResponse) -> None:
        credentials.jwe = seal(b'{"user": "relay", "secret": "relay"}', relay.guest_key())

    relay.on_credentials = on_credentials


def the_key_in_their_place(_: FaultWorld, relay: Relay) -> None:
    """Sealed to the same key pair, and asked for with the same token."""

    async def on_credentials(credentials: pb.ReleaseCredentialsResponse) -> None:
        token = relay.answers[-1].verdict.accepted.token
        request = pb.ReleaseKeyRequest(request_id="relay", token=token, key_uri=KEY_URI).SerializeToString()
        async with relay.channel() as channel:
            answer = await channel.unary_unary(wire.RELEASE_KEY_METHOD)(request)
        credentials.jwe = pb.ReleaseKeyResponse.FromString(answer).jwe

    relay.on_credentials = on_credentials


def credentials_row(
    name: str, error: type[AgentError], change: Change, fields: Mapping[str, object], audit: list[Audit] | None
) -> Fault:
    def arrange(world: FaultWorld) -> None:
        world.keep_credentials()
        relayed(world, change)

    return Fault(f"relay: {name}", error, arrange, fields=fields, audit=audit, attempts=Attempts.ONCE)


CREDENTIALS = [
    credentials_row(
        "credentials of its own",
        ArtifactUnavailableError,
        own_credentials,
        {"problem": StoreProblem.REFUSED},
        None,  # the key may have been asked for by then
    ),
    credentials_row(
        "the model key in the place of credentials",
        StoreCredentialsError,
        the_key_in_their_place,
        {"problem": CredentialsProblem.LENGTH},
        [ATTESTED, GIVEN, RELEASED],
    ),
]

ROWS = [*KEYS, *VERDICTS, *POLICY, *ORDER, *CREDENTIALS]
