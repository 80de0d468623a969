"""Debian's docker-registry on a loopback port, with TLS, passwords or tokens; and the token server it sends clients to.

with DockerRegistry(folder, users=True) as registry:
    open_source(f"oci://{registry.host}/models/tiny", registry.ca_pem, 10, LOGIN)
"""

import base64
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_pem_x509_certificate
from joserfc import jwt
from joserfc.jwk import ECKey

from agent.artifact.sources.access import Access
from tests.range_server import make_certificate
from tests.script_server import QuietServer
from tests.world import free_port

USER, SECRET = "guest", "correct horse"
LOGIN = Access(USER, SECRET)
# htpasswd -Bbn -C 5 guest 'correct horse': what it is of is no secret.
_HTPASSWD = "guest:$2y$05$Wh0vA2cTaio0hitYhqHRLu.l41BUl6aIjMrrYgApPmVeZheiHfJPa"
START_S = 20


class DockerRegistry:
    """Started by `with`; a skip where it is not installed.

    Args:
        folder: for its files.
        users: it asks for USER and SECRET.
        token_server: or it sends clients there.
    """

    def __init__(self, folder: Path, *, users: bool = False, token_server: "TokenServer | None" = None) -> None:
        self._folder = folder / f"registry-{os.urandom(4).hex()}"
        self._users = users
        self._token_server = token_server
        self.host = f"127.0.0.1:{free_port()}"
        self.ca_pem = ""
        self.cert_dir = self._folder / "certs"  # as skopeo wants it

    def __enter__(self) -> Self:
        program = shutil.which("docker-registry")
        if program is None:
            pytest.skip("docker-registry is not installed")
        self._folder.mkdir()
        pem, self.ca_pem = self._token_server.certificate if self._token_server else make_certificate(self._folder)
        self.cert_dir.mkdir()
        (self.cert_dir / "ca.crt").write_text(self.ca_pem)
        auth: dict[str, object] = {}
        if self._users:
            (self._folder / "htpasswd").write_text(_HTPASSWD + "\n")
            auth = {"auth": {"htpasswd": {"realm": "tests", "path": str(self._folder / "htpasswd")}}}
        if self._token_server is not None:
            auth = {"auth": {"token": self._token_server.registry_options(self._folder)}}
        options = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "data")}, "redirect": {"disable": True}},
            "http": {"addr": self.host, "tls": {"certificate": str(pem), "key": str(pem)}},
            **auth,
        }
        (self._folder / "config.yml").write_text(json.dumps(options))  # YAML has all of JSON
        self._program = program
        self._start()
        return self

    def _start(self) -> None:
        with (self._folder / "log").open("wb") as log:
            command = [self._program, "serve", str(self._folder / "config.yml")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={})
        host, port = self.host.split(":")
        end = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((host, int(port)), 1).close()
                return
            except OSError:
                if time.monotonic() > end or self._process.poll() is not None:
                    self._process.kill()
                    raise RuntimeError((self._folder / "log").read_text()) from None
                time.sleep(0.05)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


class TokenServer:
    """Gives tokens over TLS to whoever knows USER and SECRET, or to everybody.

    Attributes:
        asked: query and Authorization of every request.
        life_s: what it says of its tokens.
    """

    def __init__(self, folder: Path, *, anonymous: bool = False) -> None:
        folder = folder / f"tokens-{os.urandom(4).hex()}"
        folder.mkdir()
        self.certificate = make_certificate(folder)  # the registry has the same: one CA is all that a client knows
        self.asked: list[tuple[dict[str, list[str]], str | None]] = []
        self.life_s = 300
        self._key = ECKey.import_key(self.certificate[0].read_bytes())
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                authorization = self.headers["Authorization"]
                outer.asked.append((query, authorization))
                expected = "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
                known = anonymous or authorization == expected
                body = json.dumps({"token": outer._token(query), "expires_in": outer.life_s}).encode() if known else b"{}"
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate[0])
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}/token"
        self._undo = ExitStack()

    def registry_options(self, folder: Path) -> dict[str, str]:
        """The section of a registry's configuration that names this server."""
        bundle = folder / "token-ca.pem"
        bundle.write_text(self.certificate[1])
        return {"realm": self.url, "service": "tests", "issuer": "tests", "rootcertbundle": str(bundle)}

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(self._server.shutdown)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()
        self._server.server_close()

    def _token(self, query: dict[str, list[str]]) -> str:
        kind, name, actions = query["scope"][0].split(":")
        now = int(time.time())
        certificate = load_pem_x509_certificate(self.certificate[1].encode()).public_bytes(serialization.Encoding.DER)
        return jwt.encode(
            {"alg": "ES256", "typ": "JWT", "x5c": [base64.b64encode(certificate).decode()]},
            {
                "iss": "tests",
                "aud": "tests",
                "sub": USER,
                "nbf": now - 10,
                "iat": now,
                "exp": now + max(self.life_s, 1),
                "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
            },
            self._key,
        )
