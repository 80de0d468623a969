"""The files `keyturn broker init` makes: a TLS identity that strict clients accept, and a policy that allows nobody."""

import ssl
import stat
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from agent.broker.bootstrap import EXAMPLE_POLICY, create
from agent.broker.policy import parse_policy
from agent.broker.token import TokenKey
from agent.errors import ConfigError

NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "subject"),
    [("kbs.example.com", x509.DNSName("kbs.example.com")), ("10.0.0.1", None)],
)
def test_the_certificate_is_for_the_name_and_leads_to_the_ca(tmp_path: Path, name: str, subject: x509.DNSName | None) -> None:
    made = create(tmp_path / "broker", name, NOW)
    ca = x509.load_pem_x509_certificate(made.ca_pem.encode())
    leaf = x509.load_pem_x509_certificate((tmp_path / "broker/tls.pem").read_bytes())
    wanted = subject or x509.IPAddress(ip_address(name))
    PolicyBuilder().store(Store([ca])).time(NOW).build_server_verifier(wanted).verify(leaf, [])
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "broker/tls.pem", tmp_path / "broker/tls.key")


def test_the_token_key_fits_its_public_half(tmp_path: Path) -> None:
    made = create(tmp_path / "broker", "localhost", NOW)
    assert TokenKey((tmp_path / "broker/token.key").read_bytes()).public_pem == made.token_key_pem
    assert (tmp_path / "broker/token.pub").read_text() == made.token_key_pem


def test_every_file_is_its_owners_alone(tmp_path: Path) -> None:
    create(tmp_path / "broker", "localhost", NOW)
    paths = [tmp_path / "broker", *(tmp_path / "broker").iterdir()]
    assert len(paths) > 7 and not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths)


def test_the_example_policy_allows_nobody_and_is_valid_when_uncommented() -> None:
    assert parse_policy(EXAMPLE_POLICY.encode()).rows == {}
    head, _, example = EXAMPLE_POLICY.partition("#[[row]]")
    lines = [line.removeprefix("#") for line in ("#[[row]]" + example).splitlines()]
    text = "\n".join([head, *lines])
    (row,) = parse_policy(text.encode()).rows.values()
    snp = text[text.index("[row.snp]") : text.index("# For guests on Intel TDX")]
    tdx = [line.removeprefix("#") for line in text.replace(snp, "").splitlines() if not line.startswith("# ")]
    (other,) = parse_policy("\n".join(tdx).encode()).rows.values()
    # Nothing that a row can say is missing from the example.
    assert row.snp and other.tdx
    parts = (row, row.snp, row.gpu, other.tdx)
    said = [(part, field) for part in parts for field in part.__struct_fields__ if (part, field) != (row, "tdx")]
    assert all(getattr(part, field) not in (None, ()) for part, field in said)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        create(tmp_path, "localhost", NOW)


@pytest.mark.parametrize("name", ["", "two words", "-flag", 'a"b'])
def test_what_is_no_server_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        create(tmp_path / "broker", name, NOW)
