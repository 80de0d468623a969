"""A test KBS: Trustee's Key Broker Service, protocol 0.4.0, with the attestation service built in, ugly parts included.

It follows `confidential-containers/trustee` 78962cd (0.21) as far as a client can see it, and was written apart from our own
client: what the two agree on has been read twice. It is a simulation, for `keyturn demo --broker rcar` and tests, in no image.

    with serve(roots=machine_roots) as kbs:
        kbs.register_resource("demo/model/1", key)
        kbs.set_resource_policy("allow_all")
        kbs.register_reference_values({"snp_launch_measurement": [...]})
        ... kbs.url ...
        kbs.knobs = replace(kbs.knobs, faults={"attest": Fault.SLOW_DRIP})
        assert [entry.path for entry in kbs.log] == [...]

Implemented: POST /kbs/v0/auth and /attest; GET, POST, DELETE /resource/<repository>/<type>/<tag>; further plugins (`plugins`);
POST /attestation-policy, /resource-policy, /reference-value and their GETs; /metrics, /healthz. Sessions by a cookie without
path, five minutes from /auth on, that a second /attest answers with the old token; bearer tokens; EAR tokens (ES256, the key
in the header); evidence of `sample`, `snp`, `tdx`, `nvidia` (local verifier, Hopper), `sampledevice`; init-data; the policies
that Trustee ships; encrypted answers for RSA, P-256, P-521. Every refusal is 401, a plugin that is not there 404, with
upstream's texts and no content type. What a real server never does, `Knobs` do.

Not implemented: Rego (a posted policy is recognised as a shipped one or is broken, `trustee_policies.py`); administrators (all
or nobody, no tokens); fetching AMD's or Intel's collateral; NVIDIA's remote service; other TEEs; AKP keys; swid and corim
reference values; the external AS. Made up, because the facts do not say: the tails of admin and policy-engine texts, names of
metrics, and that a query is malformed where a percent sign or its bytes are.
"""

import base64
import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent.sim.trustee_as import TEES, AttestationService, parse_attestation, parse_json, parse_tee_pubkey, tee_pubkey_of
from agent.sim.trustee_evidence import EvidenceRefused, Fields
from agent.sim.trustee_faults import replaced, send_broken
from agent.sim.trustee_http import HttpServer, Request, Response, parse_query
from agent.sim.trustee_jose import BadTokenError, TokenSigner, UnsupportedKeyError, encrypt, unb64url
from agent.sim.trustee_knobs import AUTH_FAILED, ERROR_TYPE, REFUSALS, Knobs, LogEntry, Refusal
from agent.sim.trustee_policies import RESOURCE_POLICIES, PolicyError, allowed, resource_policy
from agent.sim.trustee_sessions import SessionTable

PREFIX = "/kbs/v0/"
Plugin = Callable[[str, Mapping[str, str]], bytes]
"""Path below the plugin and query to the answer's plaintext; KeyError: there is no such thing."""
_SEMVER = re.compile(r"(\d+\.\d+\.\d+)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_RESOURCE = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/){2}[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_JSON, _XML = "application/json", "text/xml"


class _Refused(Exception):
    def __init__(self, refusal: Refusal, reason: str | None = None) -> None:
        super().__init__(refusal.detail)
        self.refusal, self.reason = refusal, reason


class Trustee:
    """A running test KBS. Only `serve` makes one.

    Attributes:
        url: without the prefix.
        ca_pem: what a client must trust; None over plain HTTP.
        plugins: further ones by name; their answers are encrypted, as resources are.
        admin_allowed: whether administration is open to everybody (InsecureAllowAll) or closed (DenyAll).
        resource_plugin: whether the `resource` plugin is configured.
    """

    def __init__(self, service: AttestationService, address: tuple[str, int], tls: tuple[bytes, bytes] | None) -> None:
        self.service = service
        self.plugins: dict[str, Plugin] = {}
        self.admin_allowed = True
        self.resource_plugin = True
        self.ca_pem = None if tls is None else tls[0]
        self._lock = threading.Lock()
        self._knobs = Knobs()
        self._fault_counts: Counter[str] = Counter()
        self._sessions = SessionTable(self._now)
        self._resources: dict[str, bytes] = {}
        self._resource_policy = "default"
        self._log: list[LogEntry] = []
        self._http = HttpServer(address, tls, self._answer, send_broken)
        self.url = self._http.url

    @property
    def knobs(self) -> Knobs:
        """As they are now; a new setting counts its faults from none."""
        with self._lock:
            return self._knobs

    @knobs.setter
    def knobs(self, knobs: Knobs) -> None:
        with self._lock:
            self._knobs = knobs
            self._fault_counts.clear()

    @property
    def log(self) -> tuple[LogEntry, ...]:
        """Every request so far, in the order of the answers."""
        with self._lock:
            return tuple(self._log)

    @property
    def token_key_pem(self) -> str:
        """The public half of what tokens are signed with: a guest's `broker.token_keys`."""
        return self.service.signer.public_pem

    def register_resource(self, path: str, data: bytes) -> None:
        """Set `<repository>/<type>/<tag>`."""
        if not _RESOURCE.fullmatch(path):
            raise ValueError("not a resource path")
        with self._lock:
            self._resources[path] = data

    def set_resource_policy(self, name: str) -> None:
        """`default`, `allow_all`, `deny_all`, `affirming`, `broken`."""
        if name not in RESOURCE_POLICIES:
            raise ValueError("not the name of a policy")
        with self._lock:
            self._resource_policy = name

    def register_reference_values(self, values: Mapping[str, object]) -> None:
        """By id: lists where the default policy looks something up, single values where it compares."""
        self.service.register(values)

    def set_attestation_policy(self, policy_id: str, vector: Mapping[str, int]) -> None:
        """What every device gets under `default_cpu` or `default_gpu`, whatever its claims."""
        self.service.set_policy(policy_id, dict(vector))

    def forget_sessions(self) -> None:
        """As a restart does, where sessions are kept in memory. Tokens stay good."""
        self._sessions.clear()

    def start(self) -> None:
        self._http.start()

    def stop(self) -> None:
        self._http.stop()

    def _now(self) -> float:
        return time.time() + self.knobs.clock_offset_s

    # --- one request --------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Response:
        knobs = self.knobs
        stage = request.path.removeprefix(PREFIX).split("/")[0] if request.path.startswith(PREFIX) else ""
        refusal: Refusal | None = None
        reason: str | None = None
        self._http.stopping.wait(knobs.delays_s.get(stage, 0))
        try:
            if stage in knobs.refusals:
                raise _Refused(knobs.refusals[stage])
            response = self._dispatch(request, knobs)
        except _Refused as exc:
            refusal, reason = exc.refusal, exc.reason
            body = json.dumps({"type": ERROR_TYPE + refusal.variant, "detail": refusal.detail}, separators=(",", ":"))
            response = Response(refusal.status, body.encode())
        if self._takes_fault(stage, knobs):
            fault = knobs.faults[stage]
            response = replaced(fault, response, request, knobs) or replace(response, fault=fault)
            refusal = None
        entry = LogEntry(
            connection=request.connection,
            method=request.method,
            path=request.path,
            query=request.query,
            status=0 if response.fault else response.status,
            variant=refusal.variant if refusal else None,
            cookie="cookie" in request.headers,
            bearer="authorization" in request.headers,
            content_type=request.headers.get("content-type"),
            user_agent=request.headers.get("user-agent"),
            body_bytes=len(request.body),
            members=_member_names(request.body),
            reason=reason,
        )
        with self._lock:
            self._log.append(entry)
        return response

    def _takes_fault(self, stage: str, knobs: Knobs) -> bool:
        if stage not in knobs.faults:
            return False
        with self._lock:
            self._fault_counts[stage] += 1
            return knobs.fault_times is None or self._fault_counts[stage] <= knobs.fault_times

    def _dispatch(self, request: Request, knobs: Knobs) -> Response:
        if not request.path.startswith(PREFIX):
            return self._outside(request)
        if request.method not in ("GET", "POST", "PUT", "DELETE"):
            return Response(405)
        query = parse_query(request.query)
        if query is None:
            return Response(400, b"Query deserialize failed: malformed query", "text/plain; charset=utf-8")
        plugin, _, path = request.path.removeprefix(PREFIX).partition("/")
        match request.method, plugin:
            case "POST", "auth":
                return self._auth(request.body, knobs)
            case "POST", "attest":
                return self._attest(request, knobs)
            case "POST", "attestation-policy":
                return self._set_attestation_policy(request.body)
            case "POST", "resource-policy":
                return self._set_resource_policy(request.body)
            case "GET", "resource-policy":
                self._administrator(plugin)
                return Response(200, b'["default"]', _JSON)
            case "POST", "reference-value":
                return self._register_reference_value(request.body)
            case "GET", "reference-value":
                self._administrator(plugin)
                return Response(200, json.dumps(self.service.value(path)).encode(), _JSON)
            case method, "resource" if self.resource_plugin:
                if method == "GET":
                    return self._release(request, knobs, plugin, path, lambda: self._resource(path))
                return self._administer_resource(method, path, request.body)
            case _, name if name in self.plugins:
                return self._release(request, knobs, name, path, lambda: self.plugins[name](path, query))
            case _:
                raise _Refused(Refusal("PluginNotFound", f"Plugin {plugin} not found", 404))

    def _outside(self, request: Request) -> Response:
        match request.method, request.path:
            case "GET", "/healthz":
                return Response()
            case "GET", "/metrics":
                lines = Counter((entry.path.split("/")[3], entry.status) for entry in self.log if entry.path.startswith(PREFIX))
                text = "# TYPE kbs_requests_total counter\n"
                text += "".join(
                    f'kbs_requests_total{{path="{path}",status="{status}"}} {n}\n' for (path, status), n in lines.items()
                )
                return Response(200, text.encode(), "text/plain; charset=utf-8")
            case _, ("/healthz" | "/metrics"):
                return Response(405)
            case _:
                return Response(404)

    # --- the handshake ------------------------------------------------------------------------------------------------

    def _auth(self, body: bytes, knobs: Knobs) -> Response:
        try:
            message = Fields(parse_json(body), "Request")
            version, tee = message.text("version"), message.text("tee")
            message.value("extra-params")
            if tee not in TEES:
                raise EvidenceRefused("Request.tee: unknown variant")
        except EvidenceRefused as exc:
            raise _Refused(REFUSALS["bad-request"], str(exc)) from exc
        semver = _SEMVER.fullmatch(version)
        if semver is None:
            raise _Refused(REFUSALS["bad-version"])
        if semver[1] != knobs.protocol or semver[2]:
            mismatch = f"KBS Client Protocol Version Mismatch: expect ={knobs.protocol} while the request is {version}"
            raise _Refused(Refusal("AttestationError", AUTH_FAILED + mismatch))
        nonce = base64.b64encode(secrets.token_bytes(32)).decode() if knobs.nonce is None else knobs.nonce
        parameters: object = "" if knobs.selected_hash is None else {"selected-hash-algorithm": knobs.selected_hash}
        session = self._sessions.open(tee, nonce, knobs.session_life_s)
        challenge = json.dumps({"nonce": nonce, "extra-params": parameters}, separators=(",", ":"))
        return Response(200, challenge.encode(), _JSON, session.set_cookie(knobs.cookie_fault))

    def _attest(self, request: Request, knobs: Knobs) -> Response:
        try:
            attestation = parse_attestation(request.body)
            session = self._sessions.find(request.headers)
            if session is None:
                raise EvidenceRefused("no session, or it expired")
            if session.token is None:
                if attestation.nonce != session.nonce:
                    raise EvidenceRefused("the nonce is not the session's")
                session.token = self.service.token(session.tee, attestation, session.nonce, self._now(), knobs)
            answer = json.dumps({"token": session.token}, separators=(",", ":"))
        except EvidenceRefused as exc:
            raise _Refused(REFUSALS["attest-failed"], str(exc)) from exc
        return Response(200, answer.encode(), _JSON, session.set_cookie())

    # --- what is let out ----------------------------------------------------------------------------------------------

    def _release(self, request: Request, knobs: Knobs, plugin: str, path: str, read: Callable[[], bytes]) -> Response:
        """Token, its signature, policy, the object, the key to encrypt to: in this order, whichever fails first is told."""
        session = self._sessions.find(request.headers)
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        token = session.token if session is not None else None
        token = token or (credentials.strip() if scheme == "Bearer" else "")
        if not token:
            raise _Refused(REFUSALS["token-not-found"])
        try:
            claims = self.service.signer.verify(token, self._now())
        except BadTokenError as exc:
            raise _Refused(REFUSALS["token-verifier"]) from exc
        with self._lock:
            policy = self._resource_policy
        try:
            if not allowed(policy, claims, plugin):
                raise _Refused(REFUSALS["policy-deny"])
        except PolicyError as exc:
            raise _Refused(REFUSALS["policy-broken"]) from exc
        try:
            plaintext = read()
        except KeyError as exc:
            raise _Refused(REFUSALS["plugin-internal"]) from exc
        try:
            tee_pubkey = parse_tee_pubkey(tee_pubkey_of(claims))
        except EvidenceRefused as exc:
            raise _Refused(REFUSALS["token-verifier"]) from exc
        try:
            return Response(200, encrypt(plaintext, tee_pubkey, knobs.jwe_fault), _JSON)
        except UnsupportedKeyError as exc:
            raise _Refused(REFUSALS["jwe"]) from exc

    def _resource(self, path: str) -> bytes:
        with self._lock:
            return self._resources[path]

    # --- administration -----------------------------------------------------------------------------------------------

    def _administrator(self, endpoint: str) -> None:
        if not self.admin_allowed:
            detail = f"admin access denied for endpoint {endpoint}: Admin access denied: administration is off"
            raise _Refused(Refusal("AdminAuthAccess", detail))

    def _administer_resource(self, method: str, path: str, body: bytes) -> Response:
        if not self.admin_allowed:
            raise _Refused(REFUSALS["admin-plugin"])
        with self._lock:
            if not _RESOURCE.fullmatch(path) or (method == "DELETE" and path not in self._resources) or method == "PUT":
                raise _Refused(REFUSALS["plugin-internal"])
            if method == "POST":
                self._resources[path] = body
            else:
                del self._resources[path]
        return Response(200, b"", _XML)

    def _set_attestation_policy(self, body: bytes) -> Response:
        self._administrator("attestation-policy")
        try:
            message = Fields(parse_json(body), "policy")
            self.service.set_policy_text(message.text("policy_id"), unb64url(message.text("policy")).decode())
        except (EvidenceRefused, ValueError) as exc:
            raise _Refused(Refusal("AttestationError", "Attestation error: Set Attestation Policy failed")) from exc
        return Response()

    def _set_resource_policy(self, body: bytes) -> Response:
        self._administrator("resource-policy")
        try:
            text = unb64url(Fields(parse_json(body), "policy").text("policy")).decode()
        except (EvidenceRefused, ValueError) as exc:
            raise _Refused(Refusal("ParsePolicyError", "Failed to parse policy: malformed request")) from exc
        self.set_resource_policy(resource_policy(text))
        return Response()

    def _register_reference_value(self, body: bytes) -> Response:
        self._administrator("reference-value")
        try:
            self.service.register_message(body)
        except EvidenceRefused as exc:
            detail = f"RVPS configuration failed: Failed to register reference value: {exc}"
            raise _Refused(Refusal("RvpsError", detail)) from exc
        return Response()


@contextmanager
def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    tls: tuple[bytes, bytes] | None = None,
    *,
    roots: Path | Sequence[x509.Certificate] = (),
    endorsements: Sequence[x509.Certificate] = (),
    token_key_pem: bytes | None = None,
    token_certificates: tuple[bytes, ...] = (),
) -> Iterator[Trustee]:
    """A test KBS that runs in threads of this process.

    Args:
        host: an address of this machine.
        port: 0 for any.
        tls: certificate chain and key, PEM; None for plain HTTP. The first certificate is what clients are told to trust.
        roots: trusted beside the vendors' own, or the folder of such PEM files (`SimulatedMachine.roots_dir`).
        endorsements: AMD's ASK and ARK for evidence with a VCEK alone, and VCEKs for evidence with none.
        token_key_pem: P-256 private key tokens are signed with; made up if None.
        token_certificates: DER, leaf first, of that key, for the tokens' `x5c`.
    """
    if isinstance(roots, Path):
        roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in sorted(roots.glob("*.pem"))]
    key = ec.generate_private_key(ec.SECP256R1()) if token_key_pem is None else load_pem_private_key(token_key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    service = AttestationService(TokenSigner(key, token_certificates), roots, endorsements)
    kbs = Trustee(service, (host, port), tls)
    kbs.start()
    try:
        yield kbs
    finally:
        kbs.stop()


def _member_names(body: bytes) -> tuple[str, ...]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    return tuple(sorted(value)) if isinstance(value, dict) else ()
