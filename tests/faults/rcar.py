"""Faults of a Trustee KBS and of everything before it: the real client against a server that says whatever a row wants.

Each row counts what was asked (a terminal error is asked for once), and is bounded in time and in memory.
"""

import asyncio
import json
import time
import tracemalloc
from asyncio import StreamWriter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agent.closed import Ident
from agent.errors import (
    AgentError,
    BrokerIdentityError,
    BrokerUnreachableError,
    ClockSkewError,
    ConfigNotMeasuredError,
    DenialReason,
    EvidencePrecheckError,
    IdentityProblem,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    Precheck,
    ProtocolProblem,
    RemoteProtocolError,
    SimulationRefusedError,
    TokenCheck,
    TokenError,
    TrusteeRefusal,
    TrusteeRefusedError,
    Unreachable,
    UnwrapCheck,
)
from agent.evidence import CompositeEvidence, RuntimeData, Tee, binding
from agent.evidence.snp_abi import SnpReport, pack_report, parse_report
from agent.handshake import rcar
from agent.handshake.machine import Trust
from agent.handshake.rcar_client import RcarBroker, Site
from agent.jose import pack_b64url, parse_b64url
from agent.keys import open_jwe
from agent.proxy import Proxy
from tests.connect_proxy import Behaviour, ConnectProxy, answers
from tests.connect_proxy import drips as proxy_drips
from tests.faults.canaries import PEER_TEXT
from tests.faults.table import Fault, FaultWorld
from tests.hostile_kbs import (
    AUTHORITY,
    CA,
    NAME,
    RESOURCE,
    SESSION,
    Asked,
    Kbs,
    Say,
    answer,
    ear,
    hangs_up,
    is_silent,
    raw,
    refuses,
    sample,
    says,
    served,
    signed,
)
from tests.tls import Signer, certificate, pem

DECADE_S = 10 * 365 * 86400
MAX_PEAK_BYTES = 8 << 20
MAX_S = 10.0
SHORT_S = 1.0
Change = Callable[[Kbs], object]
Collect = Callable[[FaultWorld, RuntimeData], CompositeEvidence]


def row(
    name: str,
    error: type[AgentError],
    fields: dict[str, object],
    change: Change = lambda _: None,
    *,
    asked: dict[str, int] | None = None,
    timeout_s: float = 20,
    site: Site | None = None,
    leaf: Signer | None = None,
    collect: Collect | None = None,
    allow_simulation: bool = True,
) -> Fault:
    """One handshake with a KBS after `change`. `asked`: how often each of its paths was; None where time decides."""

    async def boot(world: FaultWorld, url: str) -> None:
        async def collected(data: RuntimeData) -> CompositeEvidence:
            return collect(world, data) if collect else await sample(data)

        at = replace(site or Site(url, pem(CA).decode(), NAME, RESOURCE, simulated=True), url=url)
        trust = Trust((AUTHORITY.public_key(),), allow_simulation)
        async with RcarBroker(at, trust, timeout_s) as broker:
            verdict, key = await broker.attest(Ident(RESOURCE), Tee.SNP if collect else Tee.SAMPLE, collected)
            sealed = await broker.release_key(verdict)
            open_jwe(sealed.jwe, key, memoryview(bytearray(32)))

    def drive(world: FaultWorld) -> None:
        kbs = Kbs(key=world.canaries.key)
        change(kbs)

        async def run() -> None:
            async with served(kbs, *((leaf,) if leaf else ())) as url:
                await boot(world, url)

        began = time.monotonic()
        tracemalloc.start()
        try:
            asyncio.run(run())
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert time.monotonic() - began < MAX_S
            assert peak < MAX_PEAK_BYTES, f"{peak} bytes"
            if asked is not None:
                assert {what: kbs.times(what) for what in asked} == asked

    return Fault(f"RCAR: {name}", error, fields=fields, drive=drive)


def on(what: str, *behaviours: Say) -> Change:
    return lambda kbs: kbs.on(what, *behaviours)


def refusal(name: str, expected: TrusteeRefusal, what: str, word: str, asked: dict[str, int], status: int = 401) -> Fault:
    change = on(what, *[refuses(word, PEER_TEXT, status)] * 5)
    return row(name, TrusteeRefusedError, {"refusal": expected.value}, change, asked=asked)


def denied(claim: str, value: int) -> Change:
    """The attestation service says this, and the policy no."""

    def change(kbs: Kbs) -> None:
        kbs.claims[claim] = value
        kbs.on("resource", refuses("PolicyDeny"))

    return change


# --- the table of refusals ----------------------------------------------------------------------------------------------

ONCE = {"auth": 1, "attest": 1, "resource": 1}
AUTH_FAILED = "Attestation error: RCAR handshake Auth failed: "
WRONG_VERSION = AUTH_FAILED + "KBS Client Protocol Version Mismatch: expect ={} while the request is X"
REFUSALS = [
    *(
        row(
            f"KBS of protocol {version}",
            RemoteProtocolError,
            {"problem": ProtocolProblem.VERSION, "version": version},
            on("auth", refuses("AttestationError", WRONG_VERSION.format(version))),
            asked={"auth": 1, "attest": 0},
        )
        for version in ("0.1.1", "0.5.0")
    ),
    row(
        "request that it cannot read",
        TrusteeRefusedError,
        {"refusal": TrusteeRefusal.REQUEST},
        on("auth", refuses("AttestationError", AUTH_FAILED + "deserialize Request")),
        asked={"auth": 1, "attest": 0},
    ),
    refusal("no challenge", TrusteeRefusal.CHALLENGE, "auth", "AttestationError", {"auth": 3, "attest": 0}),
    refusal("attestation refused", TrusteeRefusal.ATTESTATION, "attest", "AttestationError", {"attest": 3, "resource": 0}),
    refusal("session lost for good", TrusteeRefusal.NO_SESSION, "resource", "TokenNotFound", {"attest": 2, "resource": 2}),
    refusal("token not taken", TrusteeRefusal.VERIFICATION, "resource", "TokenVerifierError", {"attest": 2, "resource": 2}),
    refusal("policy broken", TrusteeRefusal.POLICY_ENGINE, "resource", "PolicyEngineError", ONCE),
    refusal("policy that does not parse", TrusteeRefusal.POLICY_ENGINE, "resource", "ParsePolicyError", ONCE),
    refusal("no key", TrusteeRefusal.RESOURCE, "resource", "PluginInternalError", {"attest": 1, "resource": 3}),
    refusal("key type", TrusteeRefusal.KEY_TYPE, "resource", "JweError", ONCE),
    refusal("no such plugin", TrusteeRefusal.NO_PLUGIN, "resource", "PluginNotFound", ONCE, 404),
    refusal("no such path", TrusteeRefusal.PATH, "resource", "InvalidRequestPath", ONCE, 404),
    refusal("administrator wanted", TrusteeRefusal.ADMIN, "resource", "AdminAuthAccess", ONCE),
    refusal("administrator wanted by a plugin", TrusteeRefusal.ADMIN, "resource", "AdminAuthInitialization", ONCE),
    refusal("storage broken", TrusteeRefusal.INTERNAL, "auth", "StorageBackendInitialization", {"auth": 1}),
    refusal("word of another release", TrusteeRefusal.UNKNOWN, "resource", PEER_TEXT, ONCE),
    row(
        "policy denies an affirmed guest",
        KeyReleaseDeniedError,
        {"reason": DenialReason.CLAIM, "claim": "cpu0:sample-evidence:affirming", "policy_version": "unversioned"},
        on("resource", refuses("PolicyDeny", PEER_TEXT)),
        asked=ONCE,
    ),
    *(
        row(
            f"policy denies {claim} {value}",
            KeyReleaseDeniedError,
            {"reason": DenialReason.CLAIM, "claim": f"cpu0:{claim}:{words}:{value}"},
            denied(claim, value),
            asked=ONCE,
        )
        for claim, value, words in (
            ("executables", 33, "executables-unrecognised"),
            ("hardware", 97, "hardware-unrecognised"),
            ("configuration", 36, "configuration-unavailable"),
        )
    ),
]


# --- HTTP ---------------------------------------------------------------------------------------------------------------


def protocol(name: str, problem: ProtocolProblem, what: str, say: Say, asked: dict[str, int] | None = None) -> Fault:
    return row(name, RemoteProtocolError, {"problem": problem}, on(what, say), asked=asked or {what: 1})


def unreachable(name: str, reason: Unreachable, what: str, say: Say) -> Fault:
    return row(name, BrokerUnreachableError, {"reason": reason}, on(what, *[say] * 99), timeout_s=SHORT_S)


def drips(data: bytes) -> Say:
    async def say(_: Asked, writer: StreamWriter) -> None:
        for byte in data:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.02)

    return say


async def half_closes(_: Asked, writer: StreamWriter) -> None:
    writer.write(answer(200, b"x" * 100)[:-90])
    await writer.drain()
    raise ConnectionResetError


HTML = b"<html>" + PEER_TEXT.encode() + b"</html>"
CHUNK = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK * 3
HEADERS = b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, PEER_TEXT.encode()) for n in range(1000)) + b"\r\n"


def behind_a_proxy(name: str, status: int, behaviour: Behaviour | None, reason: Unreachable = Unreachable.PROXY) -> Fault:
    """It knows no server."""

    async def boot(proxy: Proxy) -> None:
        site = Site("https://kbs.invalid", pem(CA).decode(), NAME, RESOURCE, simulated=True, proxy=proxy)
        async with RcarBroker(site, Trust((AUTHORITY.public_key(),), True), SHORT_S) as broker:
            await broker.attest(Ident(RESOURCE), Tee.SAMPLE, sample)

    def drive(_: FaultWorld) -> None:
        with ConnectProxy({}, behaviour) as there:
            asyncio.run(boot(there.proxy))

    fields: dict[str, object] = {"reason": reason, "status": status}
    return Fault(f"RCAR: proxy that {name}", BrokerUnreachableError, fields=fields, drive=drive)


FROM_A_PROXY = [
    behind_a_proxy("refuses", 403, None),
    behind_a_proxy("wants a password", 407, answers(b"HTTP/1.1 407 Who?\r\n\r\n")),
    behind_a_proxy("does not reach the KBS", 502, answers(b"HTTP/1.1 502 Gone\r\n\r\n")),
    behind_a_proxy("drips before it connects", 0, proxy_drips(b"HTTP/1.1 200 OK\r\n" * 100), Unreachable.TIMEOUT),
    behind_a_proxy("is none", 0, answers(b"SSH-2.0-x\r\n\r\n")),
    *(
        protocol(
            f"{status} from {what}", ProtocolProblem.REDIRECT, what, says(status, HTML, "Location: https://elsewhere.test/")
        )
        for status in (301, 302, 303, 307, 308)
        for what in ("auth", "resource")
    ),
    *(
        protocol(f"{status} in HTML from {what}", ProtocolProblem.FOREIGN, what, says(status, HTML))
        for status in (400, 401, 403, 404, 418, 431)
        for what in ("auth", "attest", "resource")
    ),
    row(
        "413 in text",
        TrusteeRefusedError,
        {"refusal": TrusteeRefusal.TOO_LARGE},
        on("attest", says(413, b"payload reached size limit")),
        asked={"attest": 1, "resource": 0},
    ),
    *(
        unreachable(f"{status} from {what}", Unreachable.SERVER_ERROR, what, says(status, HTML))
        for status in (500, 502, 504)
        for what in ("auth", "resource")
    ),
    unreachable("503 without end", Unreachable.OVERLOADED, "auth", says(503, HTML)),
    row(
        "429 until tomorrow",
        BrokerUnreachableError,
        {"reason": Unreachable.OVERLOADED},
        on("auth", says(429, b"", "Retry-After: 86400")),
        asked={"auth": 1},
    ),
    protocol("answer above the bound", ProtocolProblem.OVERSIZED, "auth", raw(answer(200, b"x" * (rcar.MAX_ANSWER_BYTES + 1)))),
    protocol("chunks without end", ProtocolProblem.OVERSIZED, "attest", raw(ENDLESS)),
    protocol("a thousand headers", ProtocolProblem.MALFORMED, "auth", raw(HEADERS)),
    protocol("header of 65 KiB", ProtocolProblem.MALFORMED, "auth", says(200, b"", "X: " + "y" * (65 << 10))),
    protocol("no HTTP", ProtocolProblem.MALFORMED, "auth", raw(b"SSH-2.0-" + PEER_TEXT.encode() + b"\r\n\r\n")),
    unreachable("connection lost", Unreachable.RESET, "auth", hangs_up),
    unreachable("answer cut short", Unreachable.RESET, "attest", half_closes),
    unreachable("silence", Unreachable.TIMEOUT, "resource", is_silent),
    unreachable("answer that drips", Unreachable.TIMEOUT, "auth", drips(answer(200, b"x" * 10_000))),
    unreachable("100 Continue without end", Unreachable.TIMEOUT, "auth", drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)),
    *(
        row(f"TLS: {name}", BrokerIdentityError, {"problem": problem}, leaf=leaf, site=site, asked={"auth": 0})
        for name, problem, leaf, site in (
            ("certificate of another CA", IdentityProblem.CHAIN, certificate(NAME), None),
            ("certificate of another name", IdentityProblem.NAME, certificate("other.test", signer=CA), None),
            ("expired certificate", IdentityProblem.EXPIRED, certificate(NAME, (-3, -2), CA), None),
            ("certificate of tomorrow", IdentityProblem.NOT_YET_VALID, certificate(NAME, (2, 3), CA), None),
        )
    ),
]


# --- messages -----------------------------------------------------------------------------------------------------------

SET_COOKIE = f"Set-Cookie: kbs-session-id={SESSION}"


def challenge(body: bytes, *headers: str) -> Say:
    return says(200, body, *(headers or (SET_COOKIE,)))


MALFORMED = [
    *(
        protocol(f"challenge: {name}", ProtocolProblem.MALFORMED, "auth", challenge(body))
        for name, body in (
            ("empty", b""),
            ("a list", b"[]"),
            ("HTML", HTML),
            ("nonce is a number", b'{"nonce":1,"extra-params":""}'),
            ("nonce is null", b'{"nonce":null,"extra-params":""}'),
            ("no nonce", b'{"extra-params":""}'),
            ("empty nonce", b'{"nonce":"","extra-params":""}'),
            ("nonce of 1025 characters", b'{"nonce":"' + b"n" * 1025 + b'","extra-params":""}'),
            ("nonce that no text has", b'{"nonce":"\\udc00","extra-params":""}'),
            ("nonce twice", b'{"nonce":"a","nonce":"b","extra-params":""}'),
            ("nested too deeply", b'{"nonce":' + b"[" * 50_000),
            ("unknown hash", b'{"nonce":"n","extra-params":{"selected-hash-algorithm":"md5"}}'),
            ("hash is a list", b'{"nonce":"n","extra-params":{"selected-hash-algorithm":["sha384"]}}'),
        )
    ),
    protocol("challenge: no session", ProtocolProblem.MALFORMED, "auth", challenge(b'{"nonce":"n"}', "X: y")),
    protocol(
        "challenge: empty session",
        ProtocolProblem.MALFORMED,
        "auth",
        challenge(b'{"nonce":"n"}', "Set-Cookie: kbs-session-id="),
    ),
    *(
        protocol(f"token: {name}", ProtocolProblem.MALFORMED, "attest", says(200, body), {"attest": 1, "resource": 0})
        for name, body in (
            ("empty answer", b""),
            ("missing", b"{}"),
            ("a number", b'{"token":1}'),
            ("two parts", b'{"token":"a.b"}'),
            ("with a line end", b'{"token":"a.b.c\\r\\nX: y"}'),
            ("of 1.1 MiB", b'{"token":"a.b.' + b"c" * (1100 << 10) + b'"}'),
        )
    ),
]


# --- the token ----------------------------------------------------------------------------------------------------------


def issues(make: Callable[[dict[str, Any]], str]) -> Change:
    """The attestation service gives this token for the runtime data."""

    def change(kbs: Kbs) -> None:
        async def say(asked: Asked, writer: StreamWriter) -> None:
            kbs.runtime_data = asked.json()["runtime-data"]
            writer.write(answer(200, {"token": make(kbs.runtime_data)}))
            await writer.drain()

        kbs.on("attest", say)

    return change


def with_header(header: dict[str, Any], signature: bytes = bytes(64)) -> Callable[[dict[str, Any]], str]:
    def make(runtime_data: dict[str, Any]) -> str:
        parts = (pack_b64url(json.dumps(part).encode()) for part in (header, ear(runtime_data)))
        return ".".join((*parts, pack_b64url(signature)))

    return make


def dated(ahead_s: int) -> Callable[[dict[str, Any]], str]:
    issued = int(time.time()) - ahead_s
    return lambda runtime_data: signed(ear(runtime_data, iat=issued, exp=issued + 300), AUTHORITY)


def about(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], str]:
    def make(runtime_data: dict[str, Any]) -> str:
        claims = ear(runtime_data)
        change(claims)
        return signed(claims, AUTHORITY)

    return make


def runtime(claims: dict[str, Any]) -> dict[str, Any]:
    data = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    data["runtime_data_claims"] = dict(data["runtime_data_claims"])
    found: dict[str, Any] = data["runtime_data_claims"]
    return found


def token(name: str, check: TokenCheck, make: Callable[[dict[str, Any]], str]) -> Fault:
    return row(f"token {name}", TokenError, {"check": check}, issues(make), asked={"attest": 1, "resource": 0})


STRANGER = certificate("stranger")[0]
TOKENS = [
    token("with alg none", TokenCheck.ALGORITHM, with_header({"alg": "none"}, b"x")),
    token("with alg HS256", TokenCheck.ALGORITHM, with_header({"alg": "HS256", "typ": "JWT"})),
    token("with crit", TokenCheck.ALGORITHM, with_header({"alg": "ES256", "crit": ["b64"], "b64": False})),
    token("unsigned", TokenCheck.SIGNATURE, with_header({"alg": "ES256", "typ": "JWT"})),
    token("signed by a stranger", TokenCheck.SIGNATURE, lambda data: signed(ear(data), STRANGER)),
    token("for another nonce", TokenCheck.NONCE, about(lambda claims: runtime(claims).update(nonce="another"))),
    token("for another key", TokenCheck.TEE_PUBKEY, about(lambda claims: runtime(claims).pop("tee-pubkey"))),
    token(
        "without a CPU", TokenCheck.CLAIMS, about(lambda claims: claims["submods"].update(gpu0=claims["submods"].pop("cpu0")))
    ),
    token("about nothing", TokenCheck.CLAIMS, about(lambda claims: claims.update(submods={}))),
    token("that expired when it was issued", TokenCheck.EXPIRED, about(lambda claims: claims.update(exp=claims["iat"] - 61))),
    *(
        row(f"clock {name}", ClockSkewError, {}, issues(dated(ahead_s)), asked={"attest": 1, "resource": 0})
        for name, ahead_s in (("ten years ahead", DECADE_S), ("ten years behind", -DECADE_S), ("ten minutes ahead", 600))
    ),
    row(
        "clock of which the challenge tells",
        ClockSkewError,
        {},
        on("auth", challenge(b'{"nonce":"n","extra-params":""}', SET_COOKIE, "Date: Thu, 01 Jan 2015 00:00:00 GMT")),
        asked={"auth": 1, "attest": 0},
    ),
    row(
        "sample evidence where it is not allowed",
        SimulationRefusedError,
        {},
        allow_simulation=False,
        asked={"attest": 1, "resource": 0},
    ),
]


# --- the sealed key -----------------------------------------------------------------------------------------------------


def sealed(change: Callable[[dict[str, Any]], object]) -> Change:
    """The KBS gives what it sealed after this change."""

    def apply(kbs: Kbs) -> None:
        async def say(asked: Asked, writer: StreamWriter) -> None:
            from agent.broker.jwe import seal
            from agent.jose import parse_point

            members = json.loads(seal(kbs.key, parse_point(kbs.runtime_data["tee-pubkey"])))
            change(members)
            writer.write(answer(200, members))
            await writer.drain()

        kbs.on("resource", say)

    return apply


def header(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        protected = json.loads(parse_b64url(members["protected"])) | changes
        protected = {name: value for name, value in protected.items() if value is not None}
        members["protected"] = pack_b64url(json.dumps(protected).encode())

    return change


def flipped(name: str) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        data = bytearray(parse_b64url(members[name]))
        data[0] ^= 1
        members[name] = pack_b64url(bytes(data))

    return change


def key(name: str, check: UnwrapCheck, change: Callable[[dict[str, Any]], object]) -> Fault:
    return row(f"sealed key: {name}", KeyUnwrapError, {"check": check}, sealed(change), asked={"resource": 1})


OFF_CURVE = {"kty": "EC", "crv": "P-256", "x": pack_b64url(b"\x01" * 32), "y": pack_b64url(b"\x01" * 32)}
KEYS = [
    key("no alg", UnwrapCheck.FORMAT, header(alg=None)),
    key("other alg", UnwrapCheck.ALGORITHM, header(alg="ECDH-ES")),
    key("other enc", UnwrapCheck.ALGORITHM, header(enc="A128GCM")),
    key("zip", UnwrapCheck.FORMAT, header(zip="DEF")),
    key("spaces in the header", UnwrapCheck.CONTENT, header()),
    key("epk off the curve", UnwrapCheck.EPHEMERAL_KEY, header(epk=OFF_CURVE)),
    key("epk on another curve", UnwrapCheck.EPHEMERAL_KEY, header(epk=OFF_CURVE | {"crv": "P-384"})),
    key("iv", UnwrapCheck.CONTENT, flipped("iv")),
    key("tag", UnwrapCheck.CONTENT, flipped("tag")),
    key("ciphertext", UnwrapCheck.CONTENT, flipped("ciphertext")),
    key("encrypted key", UnwrapCheck.KEY_WRAP, flipped("encrypted_key")),
    key("short iv", UnwrapCheck.FORMAT, lambda members: members.update(iv="AAAA")),
    key("one member less", UnwrapCheck.FORMAT, lambda members: members.pop("tag")),
    key("one member more", UnwrapCheck.FORMAT, lambda members: members.update(aad="AAAA")),
    key("a number", UnwrapCheck.FORMAT, lambda members: members.update(tag=1)),
    key("longer than a keyset", UnwrapCheck.LENGTH, lambda members: members.update(ciphertext=pack_b64url(bytes(2049)))),
    row(
        "sealed key: in clear",
        KeyUnwrapError,
        {"check": UnwrapCheck.FORMAT},
        lambda kbs: kbs.on("resource", says(200, kbs.key)),
        asked={"resource": 1},
    ),
]


# --- evidence that would be refused ---------------------------------------------------------------------------------------


def launched(change: Callable[[SnpReport], SnpReport]) -> Collect:
    def collect(world: FaultWorld, data: RuntimeData) -> CompositeEvidence:
        evidence = world.machine.attester().collect(binding.report_data(data, ""))
        return CompositeEvidence(replace(evidence, report=pack_report(change(parse_report(evidence.report)))), "")

    return collect


def unsent(name: str, check: Precheck, change: Callable[[SnpReport], SnpReport]) -> Fault:
    asked = {"auth": 1, "attest": 0}
    return row(f"evidence {name}", EvidencePrecheckError, {"check": check}, asked=asked, collect=launched(change))


WITH_INITDATA = Site(
    "https://unset.test", pem(CA).decode(), NAME, RESOURCE, init_data="x", init_data_digest=bytes(48), simulated=True
)
EVIDENCE = [
    unsent(
        "of report version 2",
        Precheck.REPORT_VERSION,
        lambda report: replace(report, version=2, cpuid_family=None, cpuid_model=None, cpuid_stepping=None),
    ),
    unsent("of VMPL 2", Precheck.VMPL, lambda report: replace(report, vmpl=2)),
    unsent(
        "of a guest in debugging",
        Precheck.DEBUG,
        lambda report: replace(report, policy=type(report.policy)(report.policy | 1 << 19)),
    ),
    row(
        "initdata that HOST_DATA is not the digest of",
        ConfigNotMeasuredError,
        {},
        site=replace(WITH_INITDATA, init_data_digest=b"\x11" * 48),
        collect=launched(lambda report: report),
        asked={"auth": 1, "attest": 0},
    ),
    row(
        "initdata above 2 MiB",
        TrusteeRefusedError,
        {"refusal": TrusteeRefusal.TOO_LARGE},
        site=replace(WITH_INITDATA, init_data="x" * rcar.MAX_REQUEST_BYTES),
        collect=launched(lambda report: replace(report, host_data=bytes(32))),
        asked={"auth": 1, "attest": 0},
    ),
]

ROWS = [*REFUSALS, *FROM_A_PROXY, *MALFORMED, *TOKENS, *KEYS, *EVIDENCE]
