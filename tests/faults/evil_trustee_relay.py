"""An evil relay before a Trustee KBS: whoever has the certificate of `keyturn broker --upstream`, and an honest one behind.

Whole boots, with a test KBS. What it says is an EAR, so everything rests on the attestation service's key, on nonce and public
key in the token, and on the key's commitment in the manifest. It can stop a boot and nothing else. The last rows are about what
the honest one says when the KBS does not do its part.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from agent.broker.jwe import seal
from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerUnreachableError,
    DenialReason,
    KeyMismatchError,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    ProtocolProblem,
    RemoteProtocolError,
    TokenCheck,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
    UnwrapCheck,
)
from agent.handshake import Accepted, KeyResponse, TeePublicKey
from agent.handshake import grpc_wire as wire
from agent.handshake.grpc_status import Denial, Failure, reason_of
from agent.handshake.pb import kbs_pb2 as pb
from agent.jose import pack_b64, pack_b64url, pack_jwk
from agent.sim.trustee import Trustee
from agent.sim.trustee_jose import TokenSigner
from agent.sim.trustee_knobs import REFUSALS, Knobs
from agent.sim.trustee_knobs import Fault as KbsFault
from tests.faults.broker import tls_pair
from tests.faults.canaries import PEER_TEXT
from tests.faults.evil_relay import RELAY, RELAY_KEY, RELAY_PAIR, other_nonce, verdict_of_another_guest, without_gpus
from tests.faults.table import Attempts, Audit, Fault, FaultWorld
from tests.hostile_broker import Reads, Relay, Release, Stream, claims_of, edited, in_thread, refuses_key, served
from tests.test_handshake_ear import payload, signed, submod

RELAYED: Audit = ("attest", "relayed", None)
ALLOWED: Audit = ("release", "allowed", None)
OTHER_URI = "kbs:///models/other/1"


@dataclass
class TrusteeRelay(Relay):
    """The evil one, and the KBS far behind it.

    Attributes:
        accepts: what it says where the honest relay has a failure instead of a verdict.
    """

    kbs: Trustee | None = field(default=None)
    accepts: Callable[["TrusteeRelay"], str] | None = None

    @property
    def signer(self) -> TokenSigner:
        """The attestation service's key, which the relay does not have: rows replay what it has signed."""
        assert self.kbs
        return self.kbs.service.signer

    def nonce(self) -> str:
        """Of this guest's Challenge, in the KBS's form."""
        return pack_b64(next(each.challenge.nonce for each in reversed(self.answers) if each.HasField("challenge")))

    async def attest(self, requests: Reads, context: Stream) -> AsyncIterator[bytes]:
        if self.accepts is None:
            async for answer in super().attest(requests, context):
                yield answer
            return
        async with self.channel() as channel:
            call = channel.stream_stream(wire.ATTEST_METHOD)()
            async for data in requests:
                self.requests.append(pb.AttestRequest.FromString(data))
                await call.write(data)
                try:
                    answer = await call.read()
                except grpc.aio.AioRpcError:
                    accepted = Accepted(Ident(self.requests[-1].request_id), self.accepts(self), Ident("p1"), ())
                    yield wire.pack_attest_response(accepted)
                    return
                self.answers.append(pb.AttestResponse.FromString(answer))
                yield answer


Change = Callable[[FaultWorld, TrusteeRelay], None]


def arranged(change: Change) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        kbs = world.behind_a_relay()
        kbs.register_resource(OTHER_URI.removeprefix("kbs:///"), RELAY_KEY)
        relay = TrusteeRelay(f"127.0.0.1:{world.broker_port}", world.broker.ca_pem, world.broker_config["server_name"], kbs=kbs)
        change(world, relay)
        world.broker_config["endpoints"] = [world.undo.enter_context(in_thread(served(relay, tls_pair(world))))]

    return arrange


def row(
    name: str,
    error: type[AgentError],
    change: Change,
    fields: Mapping[str, object],
    audit: list[Audit] | None,
    attempts: Attempts = Attempts.ONCE,
) -> Fault:
    arrange = arranged(change)
    return Fault(f"Trustee relay: {name}", error, arrange, fields, audit, attempts, may_stay=frozenset({"upstream.pem"}))


# --- the sealed key -----------------------------------------------------------------------------------------------------


def on_jwe(change: Callable[[TrusteeRelay], bytes]) -> Change:
    def apply(_: FaultWorld, relay: TrusteeRelay) -> None:
        def on_key(key: pb.ReleaseKeyResponse) -> None:
            key.jwe = change(relay)

        relay.on_key = on_key

    return apply


def key_for_another_model(_: FaultWorld, relay: TrusteeRelay) -> None:
    """Trustee's token names no key, so the KBS gives the guest another one that it may have, sealed to it in good order."""

    def on_key_request(request: pb.ReleaseKeyRequest) -> None:
        request.key_uri = OTHER_URI

    relay.on_key_request = on_key_request


def own_key_for_a_denial(_: FaultWorld, relay: TrusteeRelay) -> None:
    assert relay.kbs
    relay.kbs.set_resource_policy("deny_all")
    relay.releases = gives(lambda: seal(RELAY_KEY, relay.guest_key()))


def gives(jwe: Callable[[], bytes]) -> Release:
    async def release(data: bytes, _: Stream) -> bytes:
        request = pb.ReleaseKeyRequest.FromString(data)
        return wire.pack_key_response(KeyResponse(Ident(request.request_id), jwe(), Ident("id"), 0))

    return release


KEYS = [
    row(
        "its own key sealed to the guest",
        KeyMismatchError,
        on_jwe(lambda relay: seal(RELAY_KEY, relay.guest_key())),
        {},
        [RELAYED, ALLOWED],
    ),
    row(
        "a key sealed to somebody else",
        KeyUnwrapError,
        on_jwe(lambda _: seal(RELAY_KEY, RELAY_PAIR.public)),
        {"check": UnwrapCheck.KEY_WRAP.value},
        [RELAYED, ALLOWED],
    ),
    row("the key of another model", KeyMismatchError, key_for_another_model, {}, [RELAYED, ALLOWED]),
    row("its own key for a denial", KeyMismatchError, own_key_for_a_denial, {}, [RELAYED]),
]


# --- the token ----------------------------------------------------------------------------------------------------------


def on_token(change: Callable[[TrusteeRelay, str], str]) -> Change:
    def apply(_: FaultWorld, relay: TrusteeRelay) -> None:
        def on_answer(answer: pb.AttestResponse) -> None:
            if answer.verdict.HasField("accepted"):
                answer.verdict.accepted.token = change(relay, answer.verdict.accepted.token)

        relay.on_answer = on_answer

    return apply


def of(relay: TrusteeRelay, nonce: str, key: TeePublicKey) -> dict[str, Any]:
    """The best that an attestation service can say of a guest with this nonce and key, dated now."""
    now = int(time.time())
    cpu = submod("snp", {}, runtime_data_claims={"nonce": nonce, "tee-pubkey": pack_jwk(key), "additional-evidence": ""})
    return payload(cpu0=cpu) | {"iat": now, "exp": now + 300}


def own_token(relay: TrusteeRelay) -> str:
    """Every claim right, and signed by the relay, whose key stands in the header as Trustee's does."""
    public = RELAY.public_key().public_numbers()
    point = TeePublicKey(public.x.to_bytes(32), public.y.to_bytes(32))
    header = {"alg": "ES256", "typ": "JWT", "jwk": pack_jwk(point) | {"alg": "ES256"}}
    return signed(of(relay, relay.nonce(), relay.guest_key()), header, RELAY)


def of_another_guest(relay: TrusteeRelay, _: str) -> str:
    """The service did sign it: another guest's, with another nonce and key."""
    return relay.signer.sign(of(relay, pack_b64(b"o" * 32), RELAY_PAIR.public))


def of_an_earlier_boot(relay: TrusteeRelay, _: str) -> str:
    """The same, with this guest's key: whatever it attested before is not this challenge's."""
    return relay.signer.sign(of(relay, pack_b64(b"o" * 32), relay.guest_key()))


def promoted(_: TrusteeRelay, token: str) -> str:
    """The token of a guest that was not affirmed, which says now that it was."""
    submods = claims_of(token)["submods"]
    submods["cpu0"]["ear.status"] = "affirming"
    return edited(token, submods=submods)


def without_signature(_: TrusteeRelay, token: str) -> str:
    header = pack_b64url(json.dumps({"alg": "none", "typ": "JWT"}).encode())
    return f"{header}.{token.split('.')[1]}."


def of_our_broker(relay: TrusteeRelay, _: str) -> str:
    """A verdict as `token.py` reads them: this guest's configuration says that it believes Trustee's."""
    return signed({"iss": "keyturn-broker", "nonce": relay.nonce()}, {"alg": "ES256", "typ": "JWT"}, RELAY)


def acceptance_for_a_refusal(_: FaultWorld, relay: TrusteeRelay) -> None:
    assert relay.kbs
    relay.kbs.knobs = Knobs(refusals={"attest": REFUSALS["attest-failed"]})
    relay.accepts = own_token


def token_row(name: str, check: TokenCheck, change: Callable[[TrusteeRelay, str], str]) -> Fault:
    return row(name, TokenError, on_token(change), {"check": check.value}, [RELAYED])


TOKENS = [
    row(
        "an acceptance of its own for a refusal",
        TokenError,
        acceptance_for_a_refusal,
        {"check": TokenCheck.SIGNATURE.value},
        [("attest", "failed", "TRUSTEE_ATTESTATION")],
    ),
    token_row("a token that it signed itself", TokenCheck.SIGNATURE, lambda relay, _: own_token(relay)),
    token_row("the token of another guest", TokenCheck.NONCE, of_another_guest),
    token_row("the token of an earlier boot", TokenCheck.NONCE, of_an_earlier_boot),
    row(
        "the token of another guest over this one's nonce",
        TokenError,
        verdict_of_another_guest,
        {"check": TokenCheck.TEE_PUBKEY.value},
        [RELAYED],
    ),
    token_row("a token with another status", TokenCheck.SIGNATURE, promoted),
    token_row("a token without a signature", TokenCheck.ALGORITHM, without_signature),
    token_row("a token of our own broker's form", TokenCheck.SIGNATURE, of_our_broker),
    token_row("a token that is text", TokenCheck.FORMAT, lambda _, __: PEER_TEXT),
    row(
        "a token above the bound",
        RemoteProtocolError,
        on_token(lambda _, __: "a" * ((768 << 10) + 1)),
        {"problem": ProtocolProblem.OVERSIZED.value},
        [RELAYED],
    ),
]


# --- evidence and words -------------------------------------------------------------------------------------------------


def denial_for_a_key(_: FaultWorld, relay: TrusteeRelay) -> None:
    denial = Denial(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("8"))
    relay.releases = refuses_key(grpc.StatusCode.PERMISSION_DENIED, Failure(7, Ident("POLICY_REVOKED"), denial=denial))


def invented_refusal(_: FaultWorld, relay: TrusteeRelay) -> None:
    relay.releases = refuses_key(grpc.StatusCode.FAILED_PRECONDITION, Failure(9, reason_of(TrusteeRefusal.KEY_TYPE)))


def session_of_its_own(_: FaultWorld, relay: TrusteeRelay) -> None:
    """More than cookies: what comes after a line feed would be a header of its own."""

    def on_key_request(request: pb.ReleaseKeyRequest) -> None:
        request.session = b"kbs-session-id=0\r\nAuthorization: Bearer x"
        request.token = request.token + "\r\nX-Evil: 1"

    relay.on_key_request = on_key_request


REFUSED = {"refusal": TrusteeRefusal.ATTESTATION.value}
THREE_TIMES: list[Audit] = [("attest", "failed", "TRUSTEE_ATTESTATION")] * 3
OTHERS = [
    row("another nonce for the guest", TrusteeRefusedError, other_nonce, REFUSED, THREE_TIMES, Attempts.AGAIN),
    row("the evidence without the GPUs", TrusteeRefusedError, without_gpus, REFUSED, THREE_TIMES, Attempts.AGAIN),
    # Whatever it says of the reason, the guest tells what its own token says.
    row("a denial of the key", KeyReleaseDeniedError, denial_for_a_key, {"policy_version": "unversioned"}, [RELAYED]),
    row(
        "a refusal that it invents",
        TrusteeRefusedError,
        invented_refusal,
        {"refusal": TrusteeRefusal.KEY_TYPE.value},
        [RELAYED],
    ),
    row(
        "headers in the key request",
        BrokerFailureError,
        session_of_its_own,
        {"status": 3, "reason": "PROTOCOL_MALFORMED"},
        [RELAYED, ("release", "failed", "PROTOCOL_MALFORMED")],
    ),
]

# --- the KBS behind it --------------------------------------------------------------------------------------------------


def kbs_row(
    name: str,
    error: type[AgentError],
    change: Callable[[Trustee], None],
    fields: Mapping[str, object],
    audit: list[Audit] | None,
    attempts: Attempts = Attempts.ONCE,
) -> Fault:
    def arrange(world: FaultWorld) -> None:
        world.broker_config["timeout_s"] = 12
        change(world.behind_a_relay())

    return Fault(f"behind a relay: {name}", error, arrange, fields, audit, attempts, may_stay=frozenset({"upstream.pem"}))


def knobs(**changes: Any) -> Callable[[Trustee], None]:
    def change(kbs: Trustee) -> None:
        kbs.knobs = Knobs(**changes)

    return change


UNVERSIONED = {"policy_version": "unversioned", "reference_value_id": None}
BEHIND = [
    kbs_row(
        "a policy that denies",
        KeyReleaseDeniedError,
        lambda kbs: kbs.set_resource_policy("deny_all"),
        UNVERSIONED | {"reason": DenialReason.CLAIM.value},
        [RELAYED, ("release", "denied", "resource-policy")],
    ),
    kbs_row(
        "a key that is not there",
        TrusteeRefusedError,
        knobs(refusals={"resource": REFUSALS["plugin-internal"]}),
        {"refusal": TrusteeRefusal.RESOURCE.value},
        None,
    ),
    kbs_row(
        "a KBS that takes no token of its own",
        TrusteeRefusedError,
        knobs(refusals={"resource": REFUSALS["token-verifier"]}),
        {"refusal": TrusteeRefusal.VERIFICATION.value, "attempts": 1},
        [RELAYED, ("release", "failed", "TRUSTEE_VERIFICATION")],
    ),
    kbs_row(
        "a KBS of another protocol",
        BrokerFailureError,
        knobs(protocol="0.5.0"),
        {"status": 9, "reason": "UPSTREAM_VERSION"},
        [("attest", "failed", "UPSTREAM_VERSION")],
    ),
    kbs_row(
        "a nonce that our wire does not carry",
        BrokerFailureError,
        knobs(nonce='{"host_key":1}'),
        {"status": 9, "reason": "UPSTREAM_NONCE"},
        [("attest", "failed", "UPSTREAM_NONCE")],
    ),
    kbs_row(
        "a redirect",
        BrokerFailureError,
        knobs(faults={"attest": KbsFault.REDIRECT}),
        {"status": 9, "reason": "UPSTREAM_REDIRECT"},
        [("attest", "failed", "UPSTREAM_REDIRECT")],
    ),
    kbs_row(
        "a KBS that is down",
        BrokerFailureError,
        knobs(faults={"auth": KbsFault.RESET}),
        {"status": 14, "reason": "UPSTREAM_RESET"},
        None,
        Attempts.AGAIN,
    ),
    kbs_row(
        "a KBS with too many guests",
        BrokerUnreachableError,
        knobs(faults={"auth": KbsFault.TOO_MANY_REQUESTS}, retry_after="3"),
        {"reason": Unreachable.OVERLOADED.value},
        None,
        Attempts.AGAIN,
    ),
]

ROWS = [*KEYS, *TOKENS, *OTHERS, *BEHIND]
