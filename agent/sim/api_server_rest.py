"""A stand-in for CoCo's api-server-rest and what is behind it, on a simulated machine: attestation-agent and CDH in one.

It answers as the real one does, down to its texts, its 404 for a feature that is off and its silence when `/info` fails, and
like it one request at a time. Evidence is the simulated machine's, so the real parsers and verifiers run on it. Token and
resources are what its maker gives it. Speaks to everybody on its port, as the real one does: put no key into it that counts.

Follows confidential-containers/guest-components 8246e5e: api-server-rest/src/router.rs, client/aa.rs, client/cdh.rs; the
attester's rule that what is longer than 64 bytes is an error.
"""

import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from agent.errors import AgentError
from agent.evidence import REPORT_DATA_BYTES, Attester, Evidence, GpuNonce, GpuSystem, ReportData, Tee
from agent.evidence.ccel import RuntimeEvent
from agent.evidence.nscq import GpusAndSwitches
from agent.evidence.runtime import Runtime
from agent.evidence.trustee_json import pack_evidence
from agent.jose import pack_b64, parse_b64url
from agent.sim.machine import SimulatedMachine

VERSION = "Guest Components Version: v0.21.0-121-g8246e5e"
_NONCE_BYTES = 32
_MAX_BODY_BYTES = 1 << 20
_MEASURED = {
    "extended": '{"success":"true"}',
    "not-supported": '{"success":"false","message": "The platform does not support runtime measurement"}',
    "not-enabled": '{"success":"false","message": "Attestation Agent does not enable eventlog recording"}',
}
_CDH_FAILED = "[CDH] [ERROR]: Get Resource failed"
_AA_FAILED = "[ERROR:attestation-agent] AA {} failed"


@dataclass
class Components:
    """What is behind the server. Change the fields whenever you like.

    Attributes:
        attester: the CPU TEE; None gives sample evidence.
        gpus: None without any.
        runtime: the runtime register of a TDX guest, and its log; None without.
        token: makes the key broker service's; None, or an AgentError of it: there is none to be had.
        resources: by `repository/type/tag`; a KeyError says as little as CDH.
        feature: `resource`, `attestation` or `all`.
        knows_base64: false: of the time before `encoding=base64`.
        names_gpus: false: as NVAT, which gives no UUID.
        dead: the attestation-agent does not answer: `/info` then ends without one.
        enables_log: false: as the attestation-agent is configured by default.
        asked: the path of every request so far.
        entries: of the runtime event log: domain, operation, content.
    """

    attester: Attester | None
    gpus: GpuSystem | None = None
    runtime: Runtime | None = None
    token: Callable[[], str] | None = None
    resources: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    feature: str = "all"
    knows_base64: bool = True
    names_gpus: bool = True
    dead: bool = False
    enables_log: bool = True
    asked: list[str] = field(default_factory=list)
    entries: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, machine: SimulatedMachine, tee: Tee) -> Self:
        """The components of a machine's guest, without a key broker service."""
        gpus = machine.gpu_system() if machine.gpu.count else None
        if gpus and machine.gpu.switches:
            gpus = GpusAndSwitches(gpus, machine.switch_system())
        return cls(machine.attester(tee), gpus, machine.runtime(tee))


@contextmanager
def serve(components: Components, port: int = 0) -> Iterator[str]:
    """Serve on the loopback; gives the URL, and stops at the end."""

    class Handler(_Handler):
        behind = components
        turn = threading.Lock()

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    """An answer that is not 200: status and text."""


class _Handler(http.server.BaseHTTPRequestHandler):
    behind: Components
    turn: threading.Lock
    protocol_version = "HTTP/1.1"
    timeout = 60

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        with self.turn:
            path, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
            self.behind.asked.append(path)
            try:
                kind, body = self._route(method, path, query)
            except _Refused as refused:
                status, text = refused.args
                self._send(status, None, text.encode())
                return
            except ConnectionAbortedError:
                self.close_connection = True
                return
            self._send(HTTPStatus.OK, kind, body)

    def _route(self, method: str, path: str, query: dict[str, str]) -> tuple[str, bytes]:
        if path == "/info":
            if method != "GET":
                raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Method Not Allowed")
            return "application/json", self._info().encode()
        root, _, rest = path[1:].partition("/")
        if root == "aa":
            if self.behind.feature == "resource":
                raise _Refused(HTTPStatus.NOT_FOUND, "Attestation Feature Not Enabled")
            return self._attestation(method, rest, query)
        if root == "cdh":
            if self.behind.feature == "attestation":
                raise _Refused(HTTPStatus.NOT_FOUND, "Resource Feature Not Enabled")
            api, _, resource = rest.partition("/")
            if api == "resource":
                try:
                    return "application/octet-stream", self.behind.resources[resource]
                except KeyError:
                    raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, _CDH_FAILED) from None
        raise _Refused(HTTPStatus.NOT_FOUND, "URL NOT FOUND")

    def _attestation(self, method: str, path: str, query: dict[str, str]) -> tuple[str, bytes]:
        match method, path:
            case "GET", "token":
                if "token_type" not in query:
                    raise _Refused(HTTPStatus.BAD_REQUEST, "BAD REQUEST")
                return "application/octet-stream", self._token()
            case "GET", "evidence":
                return "application/octet-stream", self._evidence(self._runtime_data(query))
            case "GET", "additional-evidence":
                return "application/octet-stream", self._additional_evidence(self._runtime_data(query))
            case "POST", "aael":
                return "application/json", self._extend()
        raise _Refused(HTTPStatus.NOT_FOUND, "URL NOT FOUND")

    def _info(self) -> str:
        if self.behind.dead:
            raise ConnectionAbortedError
        members: dict[str, object] = {"version": VERSION}
        if self.behind.feature != "resource":
            members["tee"] = self.behind.attester.tee.value if self.behind.attester else Tee.SAMPLE.value
            if self.behind.gpus:
                members["additional_tees"] = ["nvidia"]
        return json.dumps(members | {"feature": self.behind.feature}, separators=(",", ":"))

    def _runtime_data(self, query: dict[str, str]) -> bytes:
        try:
            text = query["runtime_data"]
            if not self.behind.knows_base64 or "encoding" not in query:
                return text.encode()
            if query["encoding"] != "base64":
                raise ValueError
            return parse_b64url(text)
        except (KeyError, ValueError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "BAD REQUEST") from None

    def _evidence(self, data: bytes) -> bytes:
        attester = self.behind.attester
        if attester is None:
            return pack_evidence(Evidence(Tee.SAMPLE, data)).encode()
        if len(data) > REPORT_DATA_BYTES:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, _AA_FAILED.format("getting evidence"))
        try:
            evidence = attester.collect(ReportData(data.ljust(REPORT_DATA_BYTES, b"\0")))
            log = self.behind.runtime.event_log() if self.behind.runtime else b""
            return pack_evidence(replace(evidence, event_log=log)).encode()
        except AgentError:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, _AA_FAILED.format("getting evidence")) from None

    def _additional_evidence(self, data: bytes) -> bytes:
        if self.behind.gpus is None:
            return b""
        nonce = GpuNonce(data[:_NONCE_BYTES].ljust(_NONCE_BYTES, b"\0"))
        try:
            gpus = self.behind.gpus.collect(nonce)
        except AgentError:
            gpus = ()  # what gives no evidence is left out, with a warning in the agent's log
        entries = [
            {
                "arch": gpu.arch,
                "uuid": gpu.uuid if self.behind.names_gpus else "unknown",
                "evidence": pack_b64(gpu.report),
                "certificate": pack_b64(gpu.certificate_chain),
            }
            for gpu in gpus
        ]
        return json.dumps({"nvidia": {"device_evidence_list": entries}}, separators=(",", ":")).encode()

    def _token(self) -> bytes:
        try:
            token = self.behind.token() if self.behind.token else None
        except AgentError:
            token = None
        if token is None:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, _AA_FAILED.format("getting token"))
        return json.dumps({"token": token, "tee_keypair": "-----BEGIN PRIVATE KEY-----\nSIMULATED\n"}).encode()

    def _extend(self) -> bytes:
        length = int(self.headers.get("Content-Length", "0"))
        try:
            entry = json.loads(self.rfile.read(min(length, _MAX_BODY_BYTES)))
            event = (str(entry["domain"]), str(entry["operation"]), str(entry["content"]))
        except (ValueError, KeyError, TypeError):
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "Illegal AAEL eventry format") from None
        if not self.behind.enables_log:
            return _MEASURED["not-enabled"].encode()
        runtime = self.behind.runtime
        if runtime is None or runtime.measure(RuntimeEvent(*event)).unsupported:
            return _MEASURED["not-supported"].encode()
        self.behind.entries.append(event)
        return _MEASURED["extended"].encode()

    def _send(self, status: int, kind: str | None, body: bytes) -> None:
        self.send_response_only(status)
        if kind:
            self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("date", self.date_time_string())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr belongs to whoever runs it."""
