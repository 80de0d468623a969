"""The first files of a broker: token key, a small certificate authority, TLS key and certificate, an example policy.

Does not make model keys: whoever seals a model does (`keyturn seal`).
"""

import datetime
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem

CA_YEARS, SERVER_YEARS = 10, 1
_CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "keyturn broker CA")])
_TLS_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "keyturn broker")])
_SERVER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")

EXAMPLE_POLICY = """\
# Who may have which key. One [[row]] per key URI; a key without a row is denied, and so is whatever a row leaves out.
# SIGHUP makes the broker read this file again; a broken file changes nothing. Raise `version` with every change: verdicts,
# tokens and the audit log carry it, and a token of another version opens nothing: give all replicas the new file together.
# Lists are alternatives; put the current value first, denials name that one.
schema = "keyturn-policy/v1"
version = "1"

#[[row]]
#key_uri = "kbs:///models/my-model/1"
#release_channel = "stable"            # for the audit log
#revoked = false
#not_after = 2027-12-31T00:00:00Z
#min_model_version = 1                 # older models are refused by the guest
#credentials_uri = "kbs:///models/store/1"   # of the model's store: a file {"user": …, "secret": …} in place of a key
#lease_s = 86400                       # the guest asks again from half of it on, and stops at its end; leave it out for no end
## `keyturn seal` prints the digest of the manifest
#manifest_digests = [{ id = "my-model-v1", value = "sha256:0000000000000000000000000000000000000000000000000000000000000000" }]
#server_command_digests = [{ id = "argv-1", value = "sha256:0000000000000000000000000000000000000000000000000000000000000000" }]
#
#[row.snp]
#measurements = [{ id = "image-1", value = "{zeros96}" }]
## `keyturn config check` prints the digest of the configuration
#host_data = [{ id = "config-1", value = "0000000000000000000000000000000000000000000000000000000000000000" }]
#minimum_tcb = [{ id = "genoa-1", product = "Genoa", bootloader = 9, tee = 0, snp = 23, microcode = 72 }]
#debug = false
#vmpl = 0
#
## For guests on Intel TDX, instead of [row.snp]: a row has one of the two. MRTD measures the firmware alone, RTMR 1 and 2 boot
## loader and kernel; RTMR 0 (virtual hardware) and 3 (extended at run time) are looked at where they are listed.
##[row.tdx]
##mr_td = [{ id = "firmware-1", value = "{zeros96}" }]
##mr_config_id = [{ id = "config-1", value = "{zeros96}" }]
##rtmr_0 = [{ id = "hardware-1", value = "{zeros96}" }]
##rtmr_1 = [{ id = "loader-1", value = "{zeros96}" }]
##rtmr_2 = [{ id = "kernel-1", value = "{zeros96}" }]
##rtmr_3 = [{ id = "run-time-1", value = "{zeros96}" }]  # not with a lease: the release of the key is measured into it
##event_log = "required"  # one that comes must fit the registers in any case
##minimum_tee_tcb_svn = { id = "module-1", value = "06010300000000000000000000000000" }
##tcb = ["UpToDate"]                   # Intel's words; without --tdx-collateral only "not_evaluated", on purpose, matches
#
#[row.gpu]
#count = 1                             # 0 for guests without GPUs, which need none of the following
#driver_versions = [{ id = "driver-1", value = "580.95.05" }]
#vbios_versions = [{ id = "vbios-1", value = "96.00.74.00.1A" }]
#modes = ["cc"]                        # "nvle" for several Blackwell GPUs, "ppcie" for eight Hopper GPUs with four NVSwitches
#switch_vbios_versions = [{ id = "switch-1", value = "96.10.55.00.01" }]   # only for "ppcie"
#ready = false                         # true where the image's init sets the ready state (stock Kata)
""".replace("{zeros96}", "0" * 96)


@dataclass(frozen=True, slots=True)
class Broker:
    """The files of one broker, and what a guest's measured configuration must say about it (PEM)."""

    directory: Path
    server_name: str
    ca_pem: str
    token_key_pem: str


def create(directory: Path, server_name: str, now: datetime.datetime) -> Broker:
    """Make a broker's files in a folder that is empty or not there yet.

    Args:
        directory: becomes the owner's alone when it is made here.
        server_name: DNS name or IPv4 address for the certificate; what the guest pins as `broker.server_name`.
        now: with a time zone; certificates are valid from a day before.
    Raises:
        ConfigError: the name is none, or the folder is not empty or cannot be made.
    """
    if not _SERVER_NAME.fullmatch(server_name):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("server-name"))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident("directory"))
        (directory / "keys").mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("directory")) from error

    token_key, ca_key, tls_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    ca = _certificate(ca_key.public_key(), ca_key, now, None)
    tls = _certificate(tls_key.public_key(), ca_key, now, server_name)
    ca_pem = ca.public_bytes(serialization.Encoding.PEM)
    token_pem = token_key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write(directory / "token.key", _private_pem(token_key))
    _write(directory / "token.pub", token_pem)
    _write(directory / "ca.key", _private_pem(ca_key))
    _write(directory / "ca.pem", ca_pem)
    _write(directory / "tls.key", _private_pem(tls_key))
    _write(directory / "tls.pem", tls.public_bytes(serialization.Encoding.PEM))
    _write(directory / "policy.toml", EXAMPLE_POLICY.encode())
    return Broker(directory, server_name, ca_pem.decode(), token_pem.decode())


def _certificate(
    key: ec.EllipticCurvePublicKey, ca_key: ec.EllipticCurvePrivateKey, now: datetime.datetime, server_name: str | None
) -> x509.Certificate:
    """The CA's own certificate, or a server's when there is a name. With the extensions that strict verifiers ask for."""
    ca = server_name is None
    day = datetime.timedelta(days=1)
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
    builder = (
        x509.CertificateBuilder()
        .subject_name(_CA_NAME if ca else _TLS_NAME)
        .issuer_name(_CA_NAME)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 365 * (CA_YEARS if ca else SERVER_YEARS) * day)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **dict.fromkeys(unused, False)),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if server_name is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(server_name)]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _general_name(server_name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(server_name))
    except ValueError:
        return x509.DNSName(server_name)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(path: Path, data: bytes) -> None:
    """A new file for its owner alone; the public ones too: copying them out is a deliberate act."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as stream:
        stream.write(data)
