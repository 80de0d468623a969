"""CoCo's api-server-rest: how a container in a Kata guest reaches the guest's attestation-agent and confidential-data-hub.

Plain HTTP/1.1 on the guest's loopback, one connection a request. Owns the requests, the bounds on every answer and the one
meaning of every failure; a failure's text is never read, because the components write what they like in it. Every call blocks,
for 60 s at most: behind the server each of its own calls ends after 50 s. Nothing is asked twice: the attestation-agent makes
five attempts at the key broker service by itself. Does not know what evidence, token or key say.

The server is the guest image's, and measured with it; whoever else sits in the pod shares its loopback but not its port.
A key is read from the socket straight into the caller's memory: no object of ours ever holds it.

Follows confidential-containers/guest-components 8246e5e, api-server-rest. Standard library only.
"""

import enum
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from agent.closed import Ident
from agent.errors import GuestApiError, GuestApiProblem, KeyNotDeliveredError
from agent.jose import pack_b64url, parse_object, string

TIMEOUT_S = 60
MAX_HEAD_BYTES = 8 << 10
MAX_INFO_BYTES = 4 << 10
MAX_EVIDENCE_BYTES = 3 << 19
"""1.5 MiB: a quote, and an event log of firmware's largest reserve; or sixteen GPUs, 20 KiB each."""
MAX_TOKEN_ANSWER_BYTES = 1 << 20
"""An EAR repeats the evidence of every GPU, 20 KiB each, and has a private key beside it."""
MAX_MEASUREMENT_ANSWER_BYTES = 1 << 10

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [ -~]*)?")
_LENGTH = re.compile(rb"[0-9]{1,9}")
_PROBLEMS = {
    403: GuestApiProblem.FORBIDDEN,
    404: GuestApiProblem.NOT_SERVED,
    405: GuestApiProblem.NOT_SERVED,
    500: GuestApiProblem.FAILED,
}
_KBS = "kbs://"


@dataclass(frozen=True, slots=True)
class Info:
    """What the server says of itself.

    Attributes:
        tee: the kind of TEE in Trustee's words; None from a server that was started without the attestation feature.
        feature: `resource`, `attestation` or `all`; None from an older server, which does not say.
    """

    tee: str | None
    feature: str | None

    def lacks(self, feature: str) -> bool:
        """Does it say that it does not serve `feature`?"""
        return self.feature not in (None, "all", feature)


class Measured(enum.Enum):
    """What became of an entry for the runtime event log."""

    EXTENDED = "extended"
    NOT_SUPPORTED = "not-supported"  # this kind of TEE has no runtime register
    NOT_ENABLED = "not-enabled"  # eventlog_config.enable_eventlog of the attestation-agent is off, as it is by default


class ApiServer:
    """One api-server-rest. Opens nothing before it is asked for something."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        """`url` is `http://` with an address of the loopback and a port; the schema lets no other through."""
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._address = (parts.hostname, parts.port)
        self._host = parts.netloc
        self._timeout_s = timeout_s

    def info(self) -> Info:
        """What this server is.

        Raises:
            GuestApiError: REFUSED while it has not started; whatever else went wrong.
        """
        call = _Call(Ident("info"), MAX_INFO_BYTES)
        members = self._ask_object("GET", "/info", call)
        try:
            return Info(*(string(members, name) if members.get(name) is not None else None for name in ("tee", "feature")))
        except ValueError:
            raise call.error(GuestApiProblem.MALFORMED) from None

    def evidence(self, runtime_data: bytes) -> bytes:
        """Evidence of the CPU TEE over `runtime_data`, at most 64 bytes, which go into it as they are: Trustee's JSON text.

        Raises:
            GuestApiError: FAILED, because the attestation-agent got no evidence; whatever else went wrong.
        """
        return bytes(self._ask("GET", _over("/aa/evidence", runtime_data), _Call(Ident("evidence"), MAX_EVIDENCE_BYTES)))

    def additional_evidence(self, runtime_data: bytes) -> dict[str, object] | None:
        """Evidence of the devices over `runtime_data`: an object with a member for each kind of them, None without any.

        Raises:
            GuestApiError: as `evidence`.
        """
        call = _Call(Ident("additional-evidence"), MAX_EVIDENCE_BYTES)
        answer = self._ask("GET", _over("/aa/additional-evidence", runtime_data), call)
        return call.object_in(answer) if answer else None

    def token(self) -> str:
        """The key broker service's token for this guest, freshly made: a compact JWS.

        The private key that comes with it is the attestation-agent's and is kept by nobody here. Its text stays in this
        process's memory until the worker exits, which Python cannot help.

        Raises:
            GuestApiError: FAILED, because the attestation-agent got none in five attempts; whatever else went wrong.
        """
        call = _Call(Ident("token"), MAX_TOKEN_ANSWER_BYTES)
        members = self._ask_object("GET", "/aa/token?token_type=kbs", call)
        try:
            return string(members, "token")
        except ValueError:
            raise call.error(GuestApiProblem.MALFORMED) from None

    def resource(self, uri: str, into: memoryview, is_length: Callable[[int], bool]) -> int:
        """Fill the front of `into` with the resource of that name.

        Args:
            uri: `kbs:///repository/type/tag`.
            into: holds nothing to be used when this raises.
            is_length: which lengths the resource may have.

        Returns:
            Its length.

        Raises:
            KeyNotDeliveredError: the confidential-data-hub gave none, or one of another length.
            GuestApiError: the server did not get as far as asking it.
        """
        call = _Call(Ident("resource"), len(into), KeyNotDeliveredError)
        with self._answered("GET", f"/cdh/resource{uri.removeprefix(_KBS)}", b"", call) as (connection, length):
            # refusal: test_a_resource_of_another_length_is_no_key
            if not is_length(length):
                raise call.error(GuestApiProblem.MALFORMED)
            with into[:length] as front:
                self._fill(connection, front)
            return length

    def measure(self, domain: str, operation: str, content: str) -> Measured:
        """Extend the runtime register by one entry, and write it to the event log of the evidence.

        Args:
            domain, operation: without spaces.
            content: without line ends.

        Raises:
            GuestApiError: the entry was not taken, for none of the reasons of `Measured`.
        """
        assert not re.search(r"\s", domain + operation) and "\n" not in content
        call = _Call(Ident("aael"), MAX_MEASUREMENT_ANSWER_BYTES)
        entry = json.dumps({"domain": domain, "operation": operation, "content": content}).encode()
        members = self._ask_object("POST", "/aa/aael", call, entry)
        # The only place where two outcomes differ in their text alone.
        match members.get("success"), members.get("message"):
            case "true", None:
                return Measured.EXTENDED
            case "false", str(message) if "not support" in message:
                return Measured.NOT_SUPPORTED
            case "false", str(message) if "not enable" in message:
                return Measured.NOT_ENABLED
        # refusal: test_an_outcome_of_a_measurement_that_is_none_of_three_is_an_error
        raise call.error(GuestApiProblem.MALFORMED)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _ask_object(self, method: str, target: str, call: "_Call", body: bytes = b"") -> dict[str, object]:
        return call.object_in(self._ask(method, target, call, body))

    def _ask(self, method: str, target: str, call: "_Call", body: bytes = b"") -> bytearray:
        with self._answered(method, target, body, call) as (connection, length):
            answer = bytearray(length)
            self._fill(connection, memoryview(answer))
            return answer

    @contextmanager
    def _answered(self, method: str, target: str, body: bytes, call: "_Call") -> Iterator[tuple["_Connection", int]]:
        """A connection with nothing but the body of a good answer left to read, and its length."""
        head = f"{method} {target} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            with _Connection(self._address, time.monotonic() + self._timeout_s) as connection:
                connection.send(f"{head}\r\n".encode("ascii") + body)
                yield connection, _parse_head(connection.read_head(), call)
        except ConnectionRefusedError:
            raise GuestApiError(call.name, GuestApiProblem.REFUSED) from None
        except TimeoutError:
            raise GuestApiError(call.name, GuestApiProblem.TIMEOUT) from None
        except OSError:
            raise GuestApiError(call.name, GuestApiProblem.LOST) from None
        except _BadHeadError:
            raise GuestApiError(call.name, GuestApiProblem.MALFORMED) from None

    @staticmethod
    def _fill(connection: "_Connection", into: memoryview) -> None:
        filled = 0
        while filled < len(into):
            filled += connection.receive(into[filled:])


@dataclass(frozen=True, slots=True)
class _Call:
    """A kind of request: its name, the bound on its answer, and the error of an answer that is none."""

    name: Ident
    max_bytes: int
    failure: type[GuestApiError] = GuestApiError

    def error(self, problem: GuestApiProblem, status: int = 0) -> GuestApiError:
        return self.failure(self.name, problem, status)

    def object_in(self, answer: bytearray) -> dict[str, object]:
        try:
            return parse_object(bytes(answer), self.max_bytes)
        except ValueError:
            raise self.error(GuestApiProblem.MALFORMED) from None


class _BadHeadError(Exception):
    """Not the head of an HTTP/1.1 answer of known length."""


class _Connection:
    """One connection that ends at a moment of the monotonic clock, whatever the peer does."""

    def __init__(self, address: tuple[str, int], deadline: float) -> None:
        self._deadline = deadline
        self._socket = socket.create_connection(address, timeout=self._left())

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def read_head(self) -> bytes:
        """To its empty line and not one byte further: what follows may be a key, and is not ours to hold."""
        head, byte = bytearray(), bytearray(1)
        while not head.endswith(b"\r\n\r\n"):
            # refusal: test_a_bad_answer_is_one_typed_error
            if len(head) >= MAX_HEAD_BYTES:
                raise _BadHeadError
            self.receive(memoryview(byte))
            head += byte
        return bytes(head)

    def receive(self, into: memoryview) -> int:
        """At least one byte."""
        self._socket.settimeout(self._left())
        got = self._socket.recv_into(into)
        # refusal: test_a_bad_answer_is_one_typed_error
        if not got:
            raise ConnectionResetError("ended early")
        return got

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        # refusal: test_no_time_is_no_request
        if left <= 0:
            raise TimeoutError
        return left


def _parse_head(head: bytes, call: _Call) -> int:
    """The length of the body of a 200. Raises _BadHeadError, or the error that the status means."""
    status_line, *lines = head[:-4].split(b"\r\n")
    status = _STATUS.fullmatch(status_line)
    fields = [line.partition(b":") for line in lines]
    # refusal: test_a_bad_answer_is_one_typed_error
    if status is None or not all(colon and name == name.strip() for name, colon, _ in fields):
        raise _BadHeadError
    number = int(status[1])
    # refusal: test_a_bad_answer_is_one_typed_error
    if number != 200:
        problem = _PROBLEMS.get(number, GuestApiProblem.STATUS)
        # What the server itself refuses says nothing of what is behind it.
        # refusal: test_a_bad_answer_is_one_typed_error
        raise (call.failure if problem is GuestApiProblem.FAILED else GuestApiError)(call.name, problem, number)
    values = {name.lower(): value.strip() for name, _, value in fields}
    length = values.get(b"content-length", b"")
    # One length and no other way to say where the body ends, or two readers could disagree about it.
    # refusal: test_a_bad_answer_is_one_typed_error
    if len(values) != len(fields) or b"transfer-encoding" in values or not _LENGTH.fullmatch(length):
        raise _BadHeadError
    # refusal: test_a_bad_answer_is_one_typed_error
    if int(length) > call.max_bytes:
        raise call.error(GuestApiProblem.TOO_LARGE)
    return int(length)


def _over(path: str, runtime_data: bytes) -> str:
    return f"{path}?runtime_data={pack_b64url(runtime_data)}&encoding=base64"
