"""A guest as the KBS facts have it, by http.client and json alone: the test KBS has a reader that is not our client."""

import base64
import hashlib
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwcrypto import jwe, jwk

from agent.evidence import ReportData
from agent.sim.machine import SimulatedMachine
from agent.sim.trustee import Trustee

REQUEST = {
    "version": "0.4.0",
    "tee": "sample",
    "extra-params": {"supported-hash-algorithms": ["sha256", "sha384", "sha512", "sm3"]},
}
SAMPLE_VALUES = {"launch_digest": ["abcde"], "svn": ["1"], "major_version": 1, "minimum_minor_version": 4}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str]:
        """Status, variant, detail."""
        prefix = "https://github.com/confidential-containers/kbs/errors/"
        assert self.json.keys() == {"type", "detail"}
        assert self.json["type"].startswith(prefix)
        return self.status, self.json["type"].removeprefix(prefix), self.json["detail"]

    @property
    def cookie(self) -> str:
        """The session's, name and value."""
        return self.headers["set-cookie"].split(";")[0]


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha384(value: object) -> bytes:
    return hashlib.sha384(canonical(value)).digest()


class RawGuest:
    """One connection, one key pair, and what the last answers said."""

    def __init__(self, kbs: Trustee, curve: ec.EllipticCurve | None = None) -> None:
        url = urllib.parse.urlsplit(kbs.url)
        assert url.hostname
        assert url.port
        self.connection: http.client.HTTPConnection
        if url.scheme == "https":
            assert kbs.ca_pem
            context = ssl.create_default_context(cadata=kbs.ca_pem.decode())
            self.connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=10, context=context)
        else:
            self.connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
        self.key = ec.generate_private_key(curve or ec.SECP256R1())
        self.cookie = ""
        self.nonce = ""
        self.token = ""

    def call(self, method: str, path: str, body: bytes = b"", /, prefix: str = "/kbs/v0", **headers: str) -> Answer:
        """`headers` by name, underscores for hyphens; the cookie goes along if there is one."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie and "cookie" not in sent:
            sent["cookie"] = self.cookie
        try:
            self.connection.request(method, prefix + path, body or None, sent)
            response = self.connection.getresponse()
            return Answer(response.status, {name.lower(): text for name, text in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise

    def close(self) -> None:
        self.connection.close()

    def auth(self, **changes: object) -> Answer:
        answer = self.call("POST", "/auth", json.dumps(REQUEST | changes).encode(), content_type="application/json")
        if answer.status == 200:
            self.cookie, self.nonce = answer.cookie, answer.json["nonce"]
        return answer

    @property
    def tee_pubkey(self) -> dict[str, str]:
        numbers = self.key.public_key().public_numbers()
        size = (self.key.curve.key_size + 7) // 8
        x, y = (b64url(number.to_bytes(size)) for number in (numbers.x, numbers.y))
        names = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
        return {"kty": "EC", "crv": names[self.key.curve.name], "alg": "ECDH-ES+A256KW", "x": x, "y": y}

    def device_digest(self) -> bytes:
        return sha384({"nonce": self.nonce, "tee-pubkey": self.tee_pubkey})

    def digest(self, additional: str = "") -> bytes:
        return sha384({"additional-evidence": additional, "nonce": self.nonce, "tee-pubkey": self.tee_pubkey})

    def message(self, primary: object, additional: str = "", init_data: str | None = None) -> dict[str, Any]:
        return {
            "init-data": None if init_data is None else {"format": "toml", "body": init_data},
            "runtime-data": {"nonce": self.nonce, "tee-pubkey": self.tee_pubkey},
            "tee-evidence": {"primary_evidence": primary, "additional_evidence": additional},
        }

    def sample(self, additional: str = "") -> dict[str, str]:
        return {"svn": "1", "report_data": base64.b64encode(self.digest(additional)).decode()}

    def attest(self, message: object = None) -> Answer:
        """With `sample` evidence unless there is a message."""
        body = json.dumps(self.message(self.sample()) if message is None else message).encode()
        answer = self.call("POST", "/attest", body, content_type="application/json")
        if answer.status == 200:
            self.token = answer.json["token"]
        return answer

    def handshake(self, **changes: object) -> Answer:
        assert self.auth(**changes).status == 200
        return self.attest()

    def get(self, path: str = "/resource/demo/model/1", **headers: str) -> Answer:
        return self.call("GET", path, b"", **headers)

    def opened(self, answer: Answer) -> bytes:
        """The plaintext of an answer, by jwcrypto."""
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        sealed = jwe.JWE()
        sealed.deserialize(answer.body.decode(), jwk.JWK.from_pem(pem))
        plaintext: bytes = sealed.payload
        return plaintext

    @property
    def claims(self) -> dict[str, Any]:
        return decoded(self.token)[1]


def decoded(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims, nothing verified."""
    header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in token.split(".")[:2])
    return header, claims


def snp_json(report: bytes, certificates: Mapping[str, bytes] | None) -> dict[str, Any]:
    """The evidence JSON of a binary report, cut out by the offsets of the facts."""
    version = int.from_bytes(report[:4], "little")
    turin = version >= 3 and report[0x188] >= 0x1A

    def u(offset: int, size: int) -> int:
        return int.from_bytes(report[offset : offset + size], "little")

    def octets(offset: int, size: int) -> list[int]:
        return list(report[offset : offset + size])

    def tcb(offset: int) -> dict[str, int | None]:
        b = report[offset : offset + 8]
        if turin:
            return {"fmc": b[0], "bootloader": b[1], "tee": b[2], "snp": b[3], "microcode": b[7]}
        return {"fmc": None, "bootloader": b[0], "tee": b[1], "snp": b[6], "microcode": b[7]}

    def firmware(offset: int) -> dict[str, int]:
        return {"build": report[offset], "minor": report[offset + 1], "major": report[offset + 2]}

    chain = None
    if certificates is not None:
        chain = [{"cert_type": kind, "data": list(der)} for kind, der in certificates.items()]
    return {
        "attestation_report": {
            "version": version, "guest_svn": u(4, 4), "policy": u(8, 8), "family_id": octets(0x10, 16),
            "image_id": octets(0x20, 16), "vmpl": u(0x30, 4), "sig_algo": u(0x34, 4), "current_tcb": tcb(0x38),
            "plat_info": u(0x40, 8), "key_info": u(0x48, 4), "report_data": octets(0x50, 64),
            "measurement": octets(0x90, 48), "host_data": octets(0xC0, 32), "id_key_digest": octets(0xE0, 48),
            "author_key_digest": octets(0x110, 48), "report_id": octets(0x140, 32), "report_id_ma": octets(0x160, 32),
            "reported_tcb": tcb(0x180),
            "cpuid_fam_id": report[0x188] if version >= 3 else None,
            "cpuid_mod_id": report[0x189] if version >= 3 else None,
            "cpuid_step": report[0x18A] if version >= 3 else None,
            "chip_id": octets(0x1A0, 64), "committed_tcb": tcb(0x1E0), "current": firmware(0x1E8),
            "committed": firmware(0x1EC), "launch_tcb": tcb(0x1F0),
            "launch_mit_vector": u(0x1F8, 8) if version >= 5 else None,
            "current_mit_vector": u(0x200, 8) if version >= 5 else None,
            "signature": {"r": octets(0x2A0, 72), "s": octets(0x2E8, 72)},
        },
        "cert_chain": chain,
    }  # fmt: skip


def simulated_snp(machine: SimulatedMachine, digest: bytes) -> dict[str, Any]:
    """Evidence of a simulated machine over a digest, its whole chain with it."""
    evidence = machine.attester().collect(ReportData(digest.ljust(64, b"\0")))
    return snp_json(evidence.report, dict(zip(("VCEK", "ASK", "ARK"), evidence.cert_chain, strict=True)))


def pem_certificates(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)
