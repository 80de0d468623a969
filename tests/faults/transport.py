"""Faults of everything between guest and broker that is not a message: addresses, TCP, TLS, HTTP/2, certificates, clocks.

A guest whose clock is ten years off sees what a guest with a good clock sees of a certificate whose dates are.
"""

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable

from agent.errors import (
    AgentError,
    BrokerFailureError,
    BrokerIdentityError,
    BrokerUnreachableError,
    DenialReason,
    IdentityProblem,
    KeyReleaseDeniedError,
    NoRouteError,
    ProtocolProblem,
    RemoteProtocolError,
    Unreachable,
)
from tests.faults.broker import SHORT_S, alone, good_broker, handshake, tls_pair
from tests.faults.canaries import PEER_TEXT
from tests.faults.table import Attempts, Fault, FaultWorld
from tests.hostile_broker import in_thread, served
from tests.hostile_transport import Stranger, Wire, closed_port, never_accepted, proxy, reset_at_once, stranger, tls_server
from tests.tls import Signer, certificate, key_pem, pem

NAME = "kbs.test"
DECADE = 3650
Endpoint = contextlib.AbstractAsyncContextManager[str]


# --- addresses and TCP --------------------------------------------------------------------------------------------------


def at(*endpoints: str) -> Callable[[FaultWorld], object]:
    """A handshake with whatever is at these addresses."""

    def drive(world: FaultWorld) -> None:
        world.broker_config["timeout_s"] = SHORT_S
        asyncio.run(handshake(world, *endpoints))

    return drive


def against(server: Callable[[FaultWorld], Endpoint], timeout_s: float = SHORT_S) -> Callable[[FaultWorld], object]:
    """A handshake with this server."""

    def drive(world: FaultWorld) -> None:
        async def run() -> None:
            async with server(world) as endpoint:
                await handshake(world, endpoint)

        world.broker_config["timeout_s"] = timeout_s
        asyncio.run(run())

    return drive


def behind(wire: Wire, after: int) -> Callable[[FaultWorld], Endpoint]:
    """A good broker behind a bad line."""

    @contextlib.asynccontextmanager
    async def server(world: FaultWorld) -> AsyncIterator[str]:
        async with served(good_broker(world), tls_pair(world)) as broker, proxy(broker, wire, after) as endpoint:
            yield endpoint

    return server


def full_queue(world: FaultWorld) -> None:
    with never_accepted() as endpoint:
        at(endpoint)(world)


def unreachable(name: str, reason: Unreachable, drive: Callable[[FaultWorld], object]) -> Fault:
    return alone(name, BrokerUnreachableError, drive, {"reason": reason.value})


def not_the_broker(name: str, problem: IdentityProblem, drive: Callable[[FaultWorld], object]) -> Fault:
    return alone(name, BrokerIdentityError, drive, {"problem": problem.value})


LINES = [
    unreachable("port that nobody listens on", Unreachable.REFUSED, at(closed_port())),
    unreachable("three addresses and nobody at any", Unreachable.REFUSED, at(closed_port(), closed_port(), closed_port())),
    unreachable("name that does not resolve", Unreachable.NAME, at("nowhere.invalid:8443")),
    unreachable("address that drops packets", Unreachable.TIMEOUT, full_queue),
    unreachable("port that accepts and is silent", Unreachable.TIMEOUT, against(lambda _: stranger(Stranger.SILENCE))),
    unreachable("port that resets at once", Unreachable.RESET, against(lambda _: reset_at_once())),
    not_the_broker("HTTP server without TLS", IdentityProblem.TLS, against(lambda _: stranger(Stranger.HTTP))),
    not_the_broker("SSH server", IdentityProblem.TLS, against(lambda _: stranger(Stranger.SSH))),
    not_the_broker("server that answers zeros", IdentityProblem.TLS, against(lambda _: stranger(Stranger.ZEROS))),
    not_the_broker("TLS server that declines", IdentityProblem.TLS, against(lambda _: stranger(Stranger.TLS_ALERT))),
    unreachable("TLS record that never ends", Unreachable.TIMEOUT, against(lambda _: stranger(Stranger.TLS_ENDLESS_RECORD))),
    *(
        unreachable(f"line that {what} after {after} bytes", reason, against(behind(wire, after)))
        for wire, what, reason in (
            (Wire.RESET, "is reset", Unreachable.RESET),
            (Wire.CLOSE, "is closed", Unreachable.RESET),
            (Wire.FREEZE, "freezes", Unreachable.TIMEOUT),
            (Wire.DRIP, "drips", Unreachable.TIMEOUT),
        )
        for after in (0, 100, 1200, 1500)  # before and during TLS, in the middle of the handshake, and late in it
    ),
    not_the_broker("line that alters TLS", IdentityProblem.TLS, against(behind(Wire.FLIP, 100))),
    unreachable("line that alters what TLS carries", Unreachable.RESET, against(behind(Wire.FLIP, 1200))),
]


# --- who answers --------------------------------------------------------------------------------------------------------


def ca(world: FaultWorld) -> Signer:
    """The measured CA, for what its owner could have signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key((world.broker.directory / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(world.broker.ca_pem.encode())


def own_ca(days: tuple[int, int]) -> Callable[[FaultWorld], Signer]:
    """A certificate of a CA with these dates, and the guest's configuration with that CA in it."""

    def made(world: FaultWorld) -> Signer:
        signer = certificate("a CA of that time", days)
        world.broker_config["ca_pem"] = pem(signer).decode()
        return certificate(NAME, days, signer)

    return made


def with_certificate(made: Callable[[FaultWorld], Signer | tuple[bytes, bytes]]) -> Callable[[FaultWorld], object]:
    """A good broker with another certificate."""
    return against(lambda world: served(good_broker(world), made(world)))


def chained(world: FaultWorld) -> tuple[bytes, bytes]:
    """A certificate that another server of the same CA has signed."""
    server = certificate("other.test", signer=ca(world))
    leaf = certificate(NAME, signer=server)
    return key_pem(leaf), pem(leaf) + pem(server)


IDENTITIES = [
    not_the_broker(
        "certificate for another name",
        IdentityProblem.NAME,
        with_certificate(lambda world: certificate("other.test", signer=ca(world))),
    ),
    not_the_broker(
        "certificate for a name below ours",
        IdentityProblem.NAME,
        with_certificate(lambda world: certificate(f"evil.{NAME}", signer=ca(world))),
    ),
    not_the_broker(
        "certificate of a foreign CA",
        IdentityProblem.CHAIN,
        with_certificate(lambda _: certificate(NAME, signer=certificate("foreign CA"))),
    ),
    not_the_broker(
        "certificate of a CA with our CA's name",
        IdentityProblem.CHAIN,
        with_certificate(lambda _: certificate(NAME, signer=certificate("keyturn broker CA"))),
    ),
    not_the_broker("self-signed certificate", IdentityProblem.CHAIN, with_certificate(lambda _: certificate(NAME))),
    not_the_broker("certificate signed by another server", IdentityProblem.CHAIN, with_certificate(chained)),
    not_the_broker(
        "certificate from yesterday",
        IdentityProblem.EXPIRED,
        with_certificate(lambda world: certificate(NAME, (-3, -1), ca(world))),
    ),
    not_the_broker(
        "certificate from tomorrow",
        IdentityProblem.NOT_YET_VALID,
        with_certificate(lambda world: certificate(NAME, (1, 3), ca(world))),
    ),
    not_the_broker("clock ten years ahead", IdentityProblem.EXPIRED, with_certificate(own_ca((-DECADE - 365, -DECADE + 365)))),
    not_the_broker(
        "clock ten years behind", IdentityProblem.NOT_YET_VALID, with_certificate(own_ca((DECADE - 365, DECADE + 365)))
    ),
]


# --- a web server behind the right name -----------------------------------------------------------------------------------

PREFACE_BYTES = 24
STATUS_INDEX = {200: 8, 204: 9, 304: 11, 400: 12, 404: 13, 500: 14}  # RFC 7541, appendix A
END_HEADERS, END_STREAM = 4, 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def web_answer(status: int) -> bytes:
    """An HTTP/2 answer to the first request, with text in it."""
    indexed = STATUS_INDEX.get(status)
    field = bytes([0x80 | indexed]) if indexed else b"\x08\x03" + str(status).encode()
    content_type = b"\x0f\x10\x09text/html"
    headers = frame(1, END_HEADERS, 1, field + content_type)
    return headers + frame(0, END_STREAM, 1, f"<p>{PEER_TEXT}</p>".encode())


def web_server(world: FaultWorld, *answers: bytes, protocols: tuple[str, ...] = ("h2",)) -> Endpoint:
    """Speaks just enough HTTP/2 to answer one call, under the broker's own certificate."""

    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(PREFACE_BYTES)
        writer.write(frame(4, 0, 0, b""))
        said = False
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            if head[3] == 4 and not head[4] & 1:
                writer.write(frame(4, 1, 0, b""))
            elif head[3] == 6 and not head[4] & 1:
                writer.write(frame(6, 1, 0, payload))
            elif head[3] == 0 and not said:  # the Hello: an answer before it would race with it
                said = True
                writer.write(b"".join(answers))

    return tls_server(tls_pair(world), answer, *protocols)


def web(status: int, error: type[AgentError], field: str, told: object) -> Fault:
    drive = against(lambda world: web_server(world, web_answer(status)))
    return alone(f"web server that says {status}", error, drive, {field: told})


def after_settings(name: str, error: type[AgentError], field: str, told: object, data: bytes) -> Fault:
    return alone(name, error, against(lambda world: web_server(world, data)), {field: told})


WEB = [
    web(200, RemoteProtocolError, "problem", ProtocolProblem.MALFORMED.value),
    web(400, BrokerFailureError, "status", 13),
    web(401, BrokerFailureError, "status", 16),
    web(403, KeyReleaseDeniedError, "reason", DenialReason.UNSPECIFIED.value),
    web(404, RemoteProtocolError, "problem", ProtocolProblem.VERSION.value),
    web(429, BrokerUnreachableError, "reason", Unreachable.RESET.value),
    web(502, BrokerUnreachableError, "reason", Unreachable.RESET.value),
    web(503, BrokerUnreachableError, "reason", Unreachable.RESET.value),
    after_settings(
        "HTTP/2 stream that is reset", BrokerUnreachableError, "reason", Unreachable.RESET.value, frame(3, 0, 1, b"\0\0\0\x08")
    ),
    after_settings(
        "HTTP/2 connection that is sent away",
        BrokerUnreachableError,
        "reason",
        Unreachable.RESET.value,
        frame(7, 0, 0, bytes(4) + b"\0\0\0\x0b" + PEER_TEXT.encode()),
    ),
    after_settings(
        "HTTP/2 with broken header compression",
        BrokerFailureError,
        "reason",
        "unspecified",
        frame(1, END_HEADERS, 1, b"\xff" * 4),
    ),
    after_settings("HTTP/2 that turns into noise", BrokerFailureError, "reason", "unspecified", b"\xff" * 4096),
    unreachable(
        "TLS server of the right name without HTTP/2",
        Unreachable.RESET,
        against(lambda world: web_server(world, protocols=("http/1.1",))),
    ),
]


# --- whole boots --------------------------------------------------------------------------------------------------------


def before_boot(server: Callable[[FaultWorld], Endpoint], timeout_s: int = 2) -> Callable[[FaultWorld], object]:
    """This server at the only address there is."""

    def arrange(world: FaultWorld) -> None:
        endpoint = world.undo.enter_context(in_thread(server(world)))
        world.broker_config |= {"endpoints": [endpoint], "timeout_s": timeout_s}

    return arrange


def boot(
    name: str, error: type[AgentError], field: str, told: object, server: Callable[[FaultWorld], Endpoint], attempts: Attempts
) -> Fault:
    return Fault(f"boot: {name}", error, before_boot(server), fields={field: told}, audit=[], attempts=attempts, broker=False)


def with_dates(days: tuple[int, int]) -> Callable[[FaultWorld], Endpoint]:
    return lambda world: served(good_broker(world), own_ca(days)(world))


def no_route(world: FaultWorld) -> None:
    world.broker_config |= {"endpoints": ["192.0.2.1:8443"], "route_timeout_s": 1}


BOOTS = [
    Fault(
        "boot: no route out of the guest",
        NoRouteError,
        no_route,
        fields={"waited_s": 1, "interfaces": 0},
        audit=[],
        attempts=Attempts.NEVER,
        broker=False,
        wrapper=("unshare", "--net"),
        needs_root=True,
    ),
    boot(
        "clock ten years ahead",
        BrokerIdentityError,
        "problem",
        IdentityProblem.EXPIRED.value,
        with_dates((-DECADE - 365, -DECADE + 365)),
        Attempts.ONCE,
    ),
    boot(
        "clock ten years behind",
        BrokerIdentityError,
        "problem",
        IdentityProblem.NOT_YET_VALID.value,
        with_dates((DECADE - 365, DECADE + 365)),
        Attempts.ONCE,
    ),
    boot(
        "port that accepts and is silent",
        BrokerUnreachableError,
        "reason",
        Unreachable.TIMEOUT.value,
        lambda _: stranger(Stranger.SILENCE),
        Attempts.ONCE,
    ),
    boot(
        "HTTP server without TLS",
        BrokerIdentityError,
        "problem",
        IdentityProblem.TLS.value,
        lambda _: stranger(Stranger.HTTP),
        Attempts.ONCE,
    ),
    boot(
        "line that is reset during TLS",
        BrokerUnreachableError,
        "reason",
        Unreachable.RESET.value,
        behind(Wire.RESET, 100),
        Attempts.AGAIN,
    ),
    boot(
        "line that freezes during TLS",
        BrokerUnreachableError,
        "reason",
        Unreachable.TIMEOUT.value,
        behind(Wire.FREEZE, 100),
        Attempts.ONCE,
    ),
    boot(
        "web server that says 403",
        KeyReleaseDeniedError,
        "reason",
        DenialReason.UNSPECIFIED.value,
        lambda world: web_server(world, web_answer(403)),
        Attempts.ONCE,
    ),
]

ROWS = [*LINES, *IDENTITIES, *WEB, *BOOTS]
