"""Faults of the key broker: every status it can answer with, and every way to answer wrongly.

Rows that are about the answer alone run the real client against `tests/hostile_broker.py`, with a certificate and a token key
that this world's guest believes. Rows about the broker's files boot a guest against the real one.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerUnreachableError,
    DenialReason,
    KeyReleaseDeniedError,
    ProtocolProblem,
    RemoteProtocolError,
    SimulationRefusal,
    SimulationRefusedError,
    TokenCheck,
    TokenError,
    Unreachable,
)
from agent.evidence import CompositeEvidence, Evidence, Nonce, RuntimeData, Tee
from agent.handshake import Accepted, Attestation, Challenge, Denied, Hello
from agent.handshake import grpc_wire as wire
from agent.handshake.broker import Collect
from agent.handshake.grpc_client import GrpcBroker
from agent.handshake.grpc_status import Denial, Failure, pack_failure
from agent.handshake.machine import Trust
from agent.handshake.pb import kbs_pb2 as pb
from agent.handshake.token import parse_token_key
from tests.faults.canaries import PEER_TEXT
from tests.faults.table import ATTESTED, Attempts, Fault, FaultWorld
from tests.hostile_broker import (
    SERVER,
    Answer,
    Attest,
    Broker,
    Release,
    answers_key,
    challenge,
    fails,
    falls_silent,
    keeps_key,
    refuses_key,
    says,
    served,
)
from tests.hostile_transport import closed_port
from tests.world import KEY_URI

SHORT_S = 1.0
"""For what is retried until the deadline."""
EVIDENCE = CompositeEvidence(Evidence(Tee.SNP, b"r" * 1184), "")
Code = grpc.StatusCode
FOREVER = 99
ENDED = ProtocolProblem.CLOSED


# --- driving the client alone -------------------------------------------------------------------------------------------


def tls_pair(world: FaultWorld) -> tuple[bytes, bytes]:
    """The broker's own TLS key and certificate, which a load balancer may hold."""
    made = world.broker.directory
    return (made / "tls.key").read_bytes(), (made / "tls.pem").read_bytes()


def authority(world: FaultWorld) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((world.broker.directory / "token.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def good_broker(world: FaultWorld) -> Broker:
    return Broker(authority=authority(world), key_uri=Ident(KEY_URI), key=world.canaries.key, simulated=True)


async def _at_once(_: RuntimeData) -> CompositeEvidence:
    return EVIDENCE


async def handshake(world: FaultWorld, *endpoints: str, collect: Collect = _at_once) -> None:
    """One handshake as a guest of this world has it, by the real client."""
    at = world.broker_config
    trust = Trust((parse_token_key(world.broker.token_key_pem),), at["allow_simulated"])
    async with GrpcBroker(endpoints, at["ca_pem"], at["server_name"], trust, at["timeout_s"]) as broker:
        verdict, _ = await broker.attest(Ident(KEY_URI), Tee.SNP, collect)
        await broker.release_key(verdict)


def against(change: Callable[[Broker], object], timeout_s: float = 20) -> Callable[[FaultWorld], object]:
    """A handshake with a good broker after this change."""

    def drive(world: FaultWorld) -> None:
        async def run() -> None:
            broker = good_broker(world)
            change(broker)
            async with served(broker, tls_pair(world)) as endpoint:
                await handshake(world, endpoint)

        world.broker_config["timeout_s"] = timeout_s
        asyncio.run(run())

    return drive


@functools.cache
def _grpc_is_up() -> grpc.Channel:
    """gRPC opens descriptors of its own when it is first used and closes them at some later time: here it stays up."""

    async def begin() -> None:  # in a loop: a test before this one may have left none
        grpc.aio.init_grpc_aio()  # type: ignore[attr-defined]  # the stubs do not know it

    asyncio.run(begin())
    return grpc.insecure_channel(closed_port())


def alone(
    name: str,
    error: type[AgentError],
    drive: Callable[[FaultWorld], object],
    fields: Mapping[str, object],
    arrange: Callable[[FaultWorld], object] = lambda _: None,
) -> Fault:
    """A row that drives the client alone."""

    def arranged(world: FaultWorld) -> None:
        _grpc_is_up()
        arrange(world)

    return Fault(name, error, arranged, fields=fields, drive=drive)


def slower_than_every_challenge(world: FaultWorld) -> None:
    """Devices that answer when the Challenge is over, each time: the broker has a new one on the same stream."""

    class Clock(asyncio.SelectorEventLoop):
        ahead_s = 0.0

        def time(self) -> float:
            return super().time() + self.ahead_s

    clock = Clock()

    async def collect(_: RuntimeData) -> CompositeEvidence:
        clock.ahead_s += 180.0
        return EVIDENCE

    async def run() -> None:
        async with served(good_broker(world), tls_pair(world)) as endpoint:
            await handshake(world, endpoint, collect=collect)

    world.broker_config["timeout_s"] = 180 * FOREVER
    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        runner.run(run())


def attests(*behaviours: Attest, timeout_s: float = 20) -> Callable[[FaultWorld], object]:
    return against(lambda broker: broker.attests.extend(behaviours), timeout_s)


def releases(*behaviours: Release, timeout_s: float = 20) -> Callable[[FaultWorld], object]:
    return against(lambda broker: broker.releases.extend(behaviours), timeout_s)


# --- statuses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meaning:
    """What a status comes to, without and with the word of the broker."""

    bare: tuple[type[AgentError], object]
    worded: tuple[type[AgentError], object]


FAILED: tuple[type[AgentError], object] = (BrokerFailureError, None)
RESET: tuple[type[AgentError], object] = (BrokerUnreachableError, Unreachable.RESET.value)
TIMEOUT: tuple[type[AgentError], object] = (BrokerUnreachableError, Unreachable.TIMEOUT.value)
DENIED: tuple[type[AgentError], object] = (KeyReleaseDeniedError, DenialReason.UNSPECIFIED.value)
OTHERS = {
    Code.CANCELLED: Meaning(RESET, RESET),
    Code.DEADLINE_EXCEEDED: Meaning(TIMEOUT, TIMEOUT),
    Code.UNAVAILABLE: Meaning(RESET, FAILED),
    Code.PERMISSION_DENIED: Meaning(DENIED, DENIED),
    Code.RESOURCE_EXHAUSTED: Meaning((RemoteProtocolError, ProtocolProblem.OVERSIZED.value), FAILED),
    Code.UNIMPLEMENTED: Meaning((RemoteProtocolError, ProtocolProblem.VERSION.value), FAILED),
}
_RETRIED = (Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)


def number(code: grpc.StatusCode) -> int:
    value: int = code.value[0]
    return value


def status_row(code: grpc.StatusCode, step: str, worded: bool) -> Fault:
    meaning = OTHERS.get(code, Meaning(FAILED, FAILED))
    error, told = meaning.worded if worded else meaning.bare
    failure = Failure(number(code), Ident("WORD")) if worded else None
    word = "WORD" if worded else "unspecified"
    fields: dict[str, object] = {"problem" if error is RemoteProtocolError else "reason": told}
    if error is BrokerFailureError:
        fields = {"status": number(code), "reason": word}
    elif error is KeyReleaseDeniedError:
        fields |= {"claim": word, "policy_version": "unspecified"}
    timeout_s = SHORT_S if code in _RETRIED else 20
    drive = (
        attests(*[fails(code, failure)] * FOREVER, timeout_s=timeout_s)
        if step == "Attest"
        else releases(*[refuses_key(code, failure)] * FOREVER, timeout_s=timeout_s)
    )
    return alone(f"{code.name} at {step}, {'with a word' if worded else 'bare'}", error, drive, fields)


STATUSES = [
    status_row(code, step, worded)
    for code in grpc.StatusCode
    if code is not Code.OK
    for step, worded in (("Attest", False), ("Attest", True), ("ReleaseKey", False), ("ReleaseKey", True))
]


# --- what accompanies a status ------------------------------------------------------------------------------------------

BUSY = Failure(14, Ident("OVERLOADED"), None, 0.1)
NEXT_WEEK = Failure(14, Ident("OVERLOADED"), None, 600_000.0)
REVOKED = Failure(7, Ident("POLICY_REVOKED"), denial=Denial(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("8")))
SENTENCE = pack_failure(Failure(13, Ident(f"{PEER_TEXT}_"))).replace(f"{PEER_TEXT}_".encode(), f"{PEER_TEXT} ".encode())
HALF_A_DENIAL = pack_failure(REVOKED).replace(b"policy_version", b"policy_versioo")
OVERLOADED = {"reason": Unreachable.OVERLOADED.value}

DETAILS = [
    alone(
        "broker that is always busy at Attest",
        BrokerUnreachableError,
        attests(*[fails(Code.UNAVAILABLE, BUSY)] * FOREVER, timeout_s=SHORT_S),
        OVERLOADED,
    ),
    alone(
        "broker that is always busy at ReleaseKey",
        BrokerUnreachableError,
        releases(*[refuses_key(Code.UNAVAILABLE, BUSY)] * FOREVER, timeout_s=SHORT_S),
        OVERLOADED,
    ),
    alone(
        "broker that says to come back next week",
        BrokerUnreachableError,
        attests(fails(Code.UNAVAILABLE, NEXT_WEEK)),
        OVERLOADED | {"attempts": 1},
    ),
    alone(
        "key revoked between verdict and release",
        KeyReleaseDeniedError,
        releases(refuses_key(Code.PERMISSION_DENIED, REVOKED)),
        {"reason": "policy", "claim": "policy.revoked", "policy_version": "8"},
    ),
    alone(
        "denied key that says half of why",
        KeyReleaseDeniedError,
        releases(refuses_key(Code.PERMISSION_DENIED, HALF_A_DENIAL)),
        {"reason": "unspecified", "claim": "POLICY_REVOKED", "policy_version": "unspecified"},
    ),
    alone(
        "details that are not protobuf",
        BrokerFailureError,
        attests(fails(Code.INTERNAL, PEER_TEXT.encode())),
        {"status": 13, "reason": "unspecified"},
    ),
    alone(
        "details with a sentence for a reason",
        BrokerFailureError,
        attests(fails(Code.INTERNAL, SENTENCE)),
        {"status": 13, "reason": "unprintable"},
    ),
    alone(
        "details of another status",
        BrokerFailureError,
        attests(fails(Code.INTERNAL, BUSY)),
        {"status": 13, "reason": "unspecified"},
    ),
    alone(
        "broker that refuses its own verdict at another replica",
        BrokerFailureError,
        against(lambda broker: broker.releases.append(Broker(authority=ec.generate_private_key(ec.SECP256R1())).release)),
        {"status": 16, "reason": "TOKEN_SIGNATURE"},
    ),
]


# --- answers ------------------------------------------------------------------------------------------------------------

Sent = Hello | Attestation


def response(**members: object) -> Answer:
    """An answer with these members of the proto and the right request id."""

    def answer(request: Sent) -> bytes:
        data: bytes = pb.AttestResponse(request_id=request.request_id, **members).SerializeToString()  # type: ignore[arg-type]
        return data

    return answer


def challenged(nonce: bytes = b"n" * 32, life_s: int = 180) -> Answer:
    return response(challenge=pb.Challenge(nonce=nonce, expires_in_s=life_s))


def accepted(token: str = "a.b.c", values: int = 0) -> Answer:
    return response(verdict=pb.Verdict(accepted=pb.Accepted(token=token, reference_value_ids=["v"] * values)))


def denied(reason: int, claim: str = "snp.tcb") -> Answer:
    return response(verdict=pb.Verdict(denied=pb.Denied(reason=reason, claim=claim, policy_version="7")))  # type: ignore[arg-type]


def to_another_request(message: Challenge | Accepted | Denied) -> Answer:
    return lambda _: wire.pack_attest_response(message)


OTHER = Ident("another-request")


def odd(name: str, problem: ProtocolProblem, state: str, *answers: Answer) -> Fault:
    return alone(name, RemoteProtocolError, attests(says(*answers)), {"problem": problem.value, "state": state})


def odd_key(name: str, problem: ProtocolProblem, **changes: object) -> Fault:
    """A key response that is right but for `changes`."""

    def answer(data: bytes) -> bytes:
        request_id = wire.parse_key_request(data, SERVER).request_id
        members = {"request_id": request_id, "jwe": b"{}", "key_id": KEY_URI, "key_version": 1} | changes
        key: bytes = pb.ReleaseKeyResponse(**members).SerializeToString()  # type: ignore[arg-type]
        return key

    return alone(name, RemoteProtocolError, releases(answers_key(answer)), {"problem": problem.value, "state": "AWAIT_KEY"})


MALFORMED, OVERSIZED = ProtocolProblem.MALFORMED, ProtocolProblem.OVERSIZED
UNEXPECTED, REQUEST_ID = ProtocolProblem.UNEXPECTED_MESSAGE, ProtocolProblem.REQUEST_ID
ANSWERS = [
    odd("nonce of 31 bytes", MALFORMED, "AWAIT_CHALLENGE", challenged(b"n" * 31)),
    odd("nonce of 33 bytes", MALFORMED, "AWAIT_CHALLENGE", challenged(b"n" * 33)),
    odd("no nonce", MALFORMED, "AWAIT_CHALLENGE", challenged(b"")),
    odd("challenge that has expired", MALFORMED, "AWAIT_CHALLENGE", challenged(life_s=0)),
    odd("challenge that lives too short", MALFORMED, "AWAIT_CHALLENGE", challenged(life_s=179)),
    odd("challenge that lives for ever", MALFORMED, "AWAIT_CHALLENGE", challenged(life_s=(1 << 32) - 1)),
    odd("challenge sent twice", UNEXPECTED, "AWAIT_VERDICT", challenged(), challenged()),
    odd("verdict before the challenge", UNEXPECTED, "AWAIT_CHALLENGE", accepted()),
    odd("denial before the challenge", UNEXPECTED, "AWAIT_CHALLENGE", denied(1)),
    odd("answer without a message", MALFORMED, "AWAIT_CHALLENGE", response()),
    odd("answer with a message of the future", MALFORMED, "AWAIT_CHALLENGE", lambda q: response()(q) + b"\x7a\x02hi"),
    odd("answer that is not protobuf", MALFORMED, "AWAIT_CHALLENGE", lambda _: PEER_TEXT.encode()),
    odd("empty answer", MALFORMED, "AWAIT_CHALLENGE", lambda _: b""),
    odd(
        "answer of two MiB", OVERSIZED, "AWAIT_CHALLENGE", lambda q: challenge(q) + b"\x9a\x06\x80\x80\x80\x01" + bytes(2 << 20)
    ),
    odd("answer without a request id", MALFORMED, "AWAIT_CHALLENGE", lambda _: pb.AttestResponse().SerializeToString()),
    odd(
        "challenge for another request",
        REQUEST_ID,
        "AWAIT_CHALLENGE",
        to_another_request(Challenge(OTHER, Nonce(b"n" * 32), 180)),
    ),
    odd(
        "verdict for another request",
        REQUEST_ID,
        "AWAIT_VERDICT",
        challenge,
        to_another_request(Accepted(OTHER, "a.b.c", Ident("p1"), ())),
    ),
    odd(
        "denial for another request",
        REQUEST_ID,
        "AWAIT_VERDICT",
        challenge,
        to_another_request(Denied(OTHER, DenialReason.POLICY, Ident("policy.row"), None, Ident("7"))),
    ),
    odd("stream closed instead of a challenge", ENDED, "AWAIT_CHALLENGE"),
    odd("stream closed instead of a verdict", ENDED, "AWAIT_VERDICT", challenge),
    odd("verdict without a decision", MALFORMED, "AWAIT_VERDICT", challenge, response(verdict=pb.Verdict())),
    odd("denial without a reason", MALFORMED, "AWAIT_VERDICT", challenge, denied(0)),
    odd("denial with a reason of the future", MALFORMED, "AWAIT_VERDICT", challenge, denied(6)),
    odd("verdict with an empty token", MALFORMED, "AWAIT_VERDICT", challenge, accepted("")),
    odd("verdict with a token that is not ASCII", MALFORMED, "AWAIT_VERDICT", challenge, accepted("ä.ö.ü")),
    odd("verdict with a token of 17 KiB", OVERSIZED, "AWAIT_VERDICT", challenge, accepted("a" * (17 << 10))),
    odd("verdict with 65 reference values", OVERSIZED, "AWAIT_VERDICT", challenge, accepted(values=65)),
    odd_key("key for another request", REQUEST_ID, request_id=OTHER),
    odd_key("key response without a key", MALFORMED, jwe=b""),
    odd_key("key response of nine KiB", OVERSIZED, jwe=b" " * (9 << 10)),
    odd_key("key of version 0", MALFORMED, key_version=0),
    odd_key("key with a sentence for an id", MALFORMED, key_id=f"{PEER_TEXT} !"),
    alone(
        "key response that is not protobuf",
        RemoteProtocolError,
        releases(answers_key(lambda _: PEER_TEXT.encode())),
        {"problem": MALFORMED.value, "state": "AWAIT_KEY"},
    ),
    alone(
        "challenges that run out before the devices answer, again and again",
        RemoteProtocolError,
        slower_than_every_challenge,
        {"problem": ProtocolProblem.TOO_MANY_CHALLENGES.value, "state": "AWAIT_CHALLENGE"},
    ),
    alone(
        "broker that does not speak our version",
        BrokerFailureError,
        attests(fails(Code.INVALID_ARGUMENT, Failure(3, Ident("PROTOCOL_VERSION")))),
        {"status": 3, "reason": "PROTOCOL_VERSION"},
    ),
    alone(
        "denial whose claim is a sentence",
        KeyReleaseDeniedError,
        attests(says(challenge, denied(1, f"{PEER_TEXT} !"))),
        {"reason": "claim", "claim": "unprintable", "policy_version": "7"},
    ),
    *(
        alone(
            f"silence {where}",
            BrokerUnreachableError,
            drive,
            {"reason": Unreachable.TIMEOUT.value, "attempts": 1},
        )
        for where, drive in (
            ("after Hello", attests(falls_silent(), timeout_s=SHORT_S)),
            ("after the attestation", attests(falls_silent(challenge), timeout_s=SHORT_S)),
            ("after the key request", releases(keeps_key, timeout_s=SHORT_S)),
        )
    ),
]


# --- tokens that the authority signed -------------------------------------------------------------------------------------


def minted(**changes: object) -> Callable[[Broker], object]:
    """The broker signs tokens that say this instead."""

    def change(broker: Broker) -> None:
        sign = broker.token
        broker.token = lambda nonce, key, **_: sign(nonce, key, changes)  # type: ignore[method-assign]

    return change


def token_row(name: str, check: TokenCheck, **changes: object) -> Fault:
    return alone(name, TokenError, against(minted(**changes)), {"check": check.value})


TOKENS = [
    token_row("token that has expired", TokenCheck.EXPIRED, iat=1_500_000_000, exp=1_500_000_300),
    token_row("token of a broker ten years ahead", TokenCheck.NOT_YET_VALID, iat=4_000_000_000, exp=4_000_000_300),
    token_row("token for later", TokenCheck.NOT_YET_VALID, nbf=4_000_000_000),
    token_row("token for another key", TokenCheck.KEY_URI, key_uri="kbs:///models/other/1"),
    token_row("token for another nonce", TokenCheck.NONCE, nonce="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
    token_row("token of another issuer", TokenCheck.CLAIMS, iss="somebody"),
    token_row("token with a restriction we do not know", TokenCheck.CLAIMS, only_on_tuesdays=True),
    token_row("token with a lease of no time", TokenCheck.CLAIMS, lease_s=0),
    token_row("token with a floor that is no number", TokenCheck.CLAIMS, min_model_version="1"),
    token_row("token with a sentence for a policy version", TokenCheck.CLAIMS, policy_version=f"{PEER_TEXT} !"),
    alone(
        "simulated verdict where none may count",
        SimulationRefusedError,
        against(lambda _: None),
        {"reason": SimulationRefusal.NOT_ALLOWED.value},
        lambda world: world.broker_config.update(allow_simulated=False),
    ),
]


# --- the real broker's own trouble ------------------------------------------------------------------------------------------


def key_missing(world: FaultWorld) -> None:
    world.key_file.unlink()


def key_for_everybody(world: FaultWorld) -> None:
    world.key_file.chmod(0o644)


def key_cut(world: FaultWorld) -> None:
    world.key_file.write_bytes(world.canaries.key[:31])


def key_store_down(world: FaultWorld) -> None:
    world.key_file.unlink()
    world.key_file.symlink_to(world.key_file)
    world.broker_config["timeout_s"] = 3


def audit_disk_full(world: FaultWorld) -> None:
    world.broker_flags += ["--audit", "/dev/full"]


def credentials_absent(world: FaultWorld) -> None:
    world.keep_credentials()
    world.credentials_file.unlink()


def credentials_with_another_member(world: FaultWorld) -> None:
    world.keep_credentials(world.canaries.config_secret, realm="models")


def credentials_of_no_row(world: FaultWorld) -> None:
    world.keep_credentials(world.canaries.config_secret)
    del world.row["credentials_uri"]


def without_credentials(name: str, arrange: Callable[[FaultWorld], object], status: int, reason: str) -> Fault:
    fields = {"status": status, "reason": reason}
    audit = [ATTESTED, ("credentials", "failed", reason)]
    return Fault(name, BrokerFailureError, arrange, fields=fields, audit=audit, attempts=Attempts.ONCE)


def trouble(name: str, arrange: Callable[[FaultWorld], object], status: int, reason: str) -> Fault:
    fields = {"status": status, "reason": reason}
    audit = [ATTESTED, ("release", "failed", reason)]
    return Fault(name, BrokerFailureError, arrange, fields=fields, audit=audit, attempts=Attempts.ONCE)


TROUBLE = [
    trouble("key that is not in the store", key_missing, 5, "KEY_NOT_FOUND"),
    trouble("key file that everybody may read", key_for_everybody, 9, "KEY_FILE_MODE"),
    trouble("key file cut short", key_cut, 9, "KEY_FILE_LENGTH"),
    Fault(
        "key store that cannot be read",
        BrokerFailureError,
        key_store_down,
        fields={"status": 14, "reason": "KEY_STORE_IO"},
        attempts=Attempts.ONCE,  # one attestation; the key alone is asked for again
    ),
    without_credentials("credentials that are not in the store", credentials_absent, 5, "CREDENTIALS_NOT_FOUND"),
    without_credentials("credentials that are none", credentials_with_another_member, 9, "CREDENTIALS_FILE"),
    Fault(
        "credentials that the row does not name",
        KeyReleaseDeniedError,
        credentials_of_no_row,
        fields={"reason": "reference-value", "claim": "policy.credentials_uri"},
        audit=[ATTESTED, ("credentials", "denied", "policy.credentials_uri")],
        attempts=Attempts.ONCE,
    ),
    Fault(
        "audit log on a full disk",
        BrokerFailureError,
        audit_disk_full,
        fields={"status": 9, "reason": "AUDIT_LOG"},
        audit=[],
        attempts=Attempts.ONCE,
    ),
]

ROWS = [*STATUSES, *DETAILS, *ANSWERS, *TOKENS, *TROUBLE]
