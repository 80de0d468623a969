"""Trustee around the demo's guest: the test KBS in this process, behind a relay or not, or one that runs somewhere with an open
admin API.

Both are set up as an administrator sets up a real one, by its admin endpoints, each call told. Owns what is registered and the
guest's `[broker]` section. A foreign KBS is trusted on first use (its certificate, the key that signs its tokens): it gets a
key that opens a public model, for evidence that proves nothing.
Follows confidential-containers/trustee 78962cd, `kbs/docs`: admin endpoints, RCAR.
"""

import base64
import hashlib
import json
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rfc8785
import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.broker import bootstrap
from agent.demo.site import CREDENTIALS_URI, KEY_URI, SealedModel, await_event, start_keyturn
from agent.evidence import Tee
from agent.sim import trustee
from agent.sim.machine import SimulatedMachine

TIMEOUT_S = 30
PREFIX = "/kbs/v0"
ALLOW_SAMPLE = "package policy\n\ndefault allow = true\n"
"""Trustee's own policy denies sample evidence, which is what everybody should do."""
Called = Callable[[str, str, int], None]
"""Told method, path and status of each call."""


class KbsRefusedError(Exception):
    """The KBS does not let itself be set up, or does not attest sample evidence; the text names the call."""


@dataclass(frozen=True, slots=True)
class Kbs:
    """A KBS that runs, and how it is reached.

    Attributes:
        section: the guest's `[broker]` section.
    """

    url: str
    section: str
    _http: urllib3.PoolManager
    _called: Called

    def approve(self, machine: SimulatedMachine, tee: Tee, model: SealedModel, credentials: bytes | None = None) -> None:
        """Store key and credentials, register what is known of this guest, and let sample evidence have them if it is to.

        Raises:
            KbsRefusedError: administration is not open.
        """
        for uri, secret in ((KEY_URI, model.key), (CREDENTIALS_URI, credentials)):
            if secret is not None:
                self._call("POST", f"/resource/{uri.removeprefix('kbs:///')}", secret)
        payload = base64.b64encode(json.dumps(_reference_values(machine, tee)).encode()).decode()
        self._call("POST", "/reference-value", {"version": "0.1.0", "type": "sample", "payload": payload})
        if tee is Tee.SAMPLE:
            self._call("POST", "/resource-policy", {"policy": _b64url(ALLOW_SAMPLE.encode())})

    def _call(self, method: str, path: str, body: bytes | Mapping[str, str]) -> None:
        status = _ask(self._http, method, self.url + PREFIX + path, body)[0]
        self._called(method, PREFIX + path, status)
        if status != 200:
            raise KbsRefusedError(f"{method} {PREFIX}{path} answered {status}: this demo needs a KBS with an open admin API")


@contextmanager
def run_test_kbs(folder: Path, machine: SimulatedMachine, called: Called) -> Iterator[Kbs]:
    """The test KBS, with TLS, in threads of this process; it trusts this machine's silicon."""
    files = bootstrap.create(folder / "kbs", "localhost", datetime.now(UTC))
    tls = tuple((files.directory / name).read_bytes() for name in ("tls.pem", "tls.key"))
    token_key = (files.directory / "token.key").read_bytes()
    with trustee.serve(tls=(tls[0], tls[1]), roots=machine.roots_dir, token_key_pem=token_key) as kbs:
        http = urllib3.PoolManager(ca_cert_data=files.ca_pem, server_hostname="localhost", assert_hostname="localhost")
        identity = f'server_name = "localhost"\nca_pem = {json.dumps(files.ca_pem)}\n'
        yield Kbs(kbs.url, _section(kbs.url, identity, files.token_key_pem), http, called)


@contextmanager
def run_relay(folder: Path, machine: SimulatedMachine, called: Called) -> Iterator[Kbs]:
    """The test KBS, and `keyturn broker --upstream` before it as a process of its own: guests know the relay alone."""
    files = bootstrap.create(folder / "relay", "localhost", datetime.now(UTC))
    home = files.directory
    with run_test_kbs(folder, machine, called) as kbs:
        arguments = {
            "listen": "127.0.0.1:0",
            "tls-cert": home / "tls.pem",
            "tls-key": home / "tls.key",
            "audit": home / "audit.jsonl",
            "upstream": kbs.url,
            "upstream-ca": folder / "kbs" / "ca.pem",
            "upstream-server-name": "localhost",
        }
        command = [argument for name, value in arguments.items() for argument in (f"--{name}", str(value))]
        with start_keyturn("broker", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            port = str(await_event(process, "listening")["address"]).rpartition(":")[2]
            await_event(process, "upstream")
            token_keys = kbs.section.partition("token_keys")[2]
            section = (
                f'endpoints = ["127.0.0.1:{port}"]\nserver_name = "localhost"\n'
                f'ca_pem = {json.dumps(files.ca_pem)}\ntokens = "trustee"\ntoken_keys{token_keys}'
            )
            yield replace(kbs, section=section)


@contextmanager
def use_kbs(url: str, called: Called) -> Iterator[Kbs]:
    """A KBS that runs already, `http[s]://host[:port]`.

    Raises:
        KbsRefusedError: it does not attest sample evidence.
    """
    url = url.rstrip("/")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError as error:
        raise KbsRefusedError(f"{url} is no address") from error
    identity = ""
    http = urllib3.PoolManager()
    if parts.scheme == "https":
        try:
            certificate = ssl.get_server_certificate((host, port), timeout=TIMEOUT_S)
        except OSError as error:  # ssl's are of this kind too
            raise KbsRefusedError(f"{url}: {type(error).__name__}") from error
        identity = f'server_name = "{host}"\nca_pem = {json.dumps(certificate)}\n'
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is what is trusted
        context.load_verify_locations(cadata=certificate)
        http = urllib3.PoolManager(ssl_context=context)
    yield Kbs(url, _section(url, identity, _token_key(http, url, called)), http, called)


def _section(url: str, identity: str, token_key_pem: str) -> str:
    return f'url = "{url}"\n{identity}token_keys = [{json.dumps(token_key_pem)}]\n'


def _reference_values(machine: SimulatedMachine, tee: Tee) -> dict[str, list[object]]:
    """By the names that Trustee's default policy asks for."""
    if tee is not Tee.SNP:
        return {"launch_digest": ["abcde"], "svn": ["1"]}
    tcb = machine.tcb
    return {
        "snp_launch_measurement": [machine.measurement.hex()],
        "snp_bootloader": [tcb.bootloader],
        "snp_microcode": [tcb.microcode],
        "snp_snp_svn": [tcb.snp],
        "snp_tee_svn": [tcb.tee],
    }


def _token_key(http: urllib3.PoolManager, url: str, called: Called) -> str:
    """The key that signs its tokens, out of the header of one that it gives for sample evidence."""
    # 1. A challenge.
    status, challenge, cookie = _ask(
        http, "POST", f"{url}{PREFIX}/auth", {"version": "0.4.0", "tee": "sample", "extra-params": ""}
    )
    called("POST", f"{PREFIX}/auth", status)
    if status != 200 or not isinstance(challenge.get("nonce"), str):
        raise KbsRefusedError(f"POST {PREFIX}/auth answered {status}: this demo needs a KBS that takes sample evidence")

    # 2. Sample evidence over it.
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    point = {name: _b64url(value.to_bytes(32)) for name, value in (("x", numbers.x), ("y", numbers.y))}
    runtime_data = {
        "nonce": challenge["nonce"],
        "tee-pubkey": {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", **point},
    }
    digest = hashlib.sha384(rfc8785.dumps({**runtime_data, "additional-evidence": ""})).digest()
    evidence = {"svn": "1", "report_data": base64.b64encode(digest).decode()}
    attestation = {
        "init-data": None,
        "runtime-data": runtime_data,
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }
    status, answer, _ = _ask(http, "POST", f"{url}{PREFIX}/attest", attestation, cookie)
    called("POST", f"{PREFIX}/attest", status)
    if status != 200:
        raise KbsRefusedError(f"POST {PREFIX}/attest answered {status}: this demo needs a KBS that takes sample evidence")

    # 3. The token's header carries the key. Trustee writes a coordinate without its leading zeros.
    try:
        header = json.loads(_parse_b64url(answer["token"].partition(".")[0]))
        x, y = (int.from_bytes(_parse_b64url(header["jwk"][name])) for name in ("x", "y"))
        key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise KbsRefusedError(f"POST {PREFIX}/attest gave no token with an ES256 key in its header") from error
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def _ask(
    http: urllib3.PoolManager, method: str, url: str, body: bytes | Mapping[str, Any], cookie: str = ""
) -> tuple[int, dict[str, Any], str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Cookie": cookie} if cookie else {})}
    try:
        answer = http.request(method, url, body=data, headers=headers, redirect=False, retries=False, timeout=TIMEOUT_S)
    except urllib3.exceptions.HTTPError as error:
        raise KbsRefusedError(f"{method} {url}: {type(error).__name__}") from error
    try:
        members = json.loads(answer.data) if answer.status == 200 and answer.data else {}
    except ValueError:  # somebody else's web page
        members = {}
    return (
        answer.status,
        members if isinstance(members, dict) else {},
        (answer.headers.get("Set-Cookie") or "").partition(";")[0],
    )


def _parse_b64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
