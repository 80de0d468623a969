"""Which certificates a broker takes as roots of simulated silicon, and which as mere endorsements."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from agent.broker.anchors import load_endorsements, load_simulation_roots
from agent.broker.bootstrap import create
from agent.errors import ConfigError, ConfigProblem
from tests.shared import shared_data


def test_the_two_roots_of_simulated_silicon_are_read_and_nothing_else(silicon: Path) -> None:
    roots = load_simulation_roots(silicon)
    assert len(roots) == 2
    assert all("SIMULATED" in root.subject.rfc4514_string() and root.subject == root.issuer for root in roots)


def test_a_root_that_does_not_say_simulated_is_refused(tmp_path: Path) -> None:
    real = load_endorsements(shared_data("snp/certs/milan-ark.der").parent)[0]
    (tmp_path / "ark.pem").write_bytes(real.public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError) as caught:
        load_simulation_roots(tmp_path)
    assert caught.value.problem is ConfigProblem.BAD_VALUE


def test_a_private_root_that_does_not_say_simulated_is_refused(tmp_path: Path) -> None:
    made = create(tmp_path / "broker", "localhost", datetime.now(UTC))
    (tmp_path / "ark.pem").write_text(made.ca_pem)
    with pytest.raises(ConfigError):
        load_simulation_roots(tmp_path)


@pytest.mark.parametrize("names", [[], ["SIMULATED root", "ARK-Milan"]])
def test_a_root_that_does_not_have_exactly_one_name_is_refused(tmp_path: Path, names: list[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    now = datetime.now(UTC)
    root = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    (tmp_path / "ark.pem").write_bytes(root)
    with pytest.raises(ConfigError) as caught:
        load_simulation_roots(tmp_path)
    assert caught.value.problem is ConfigProblem.BAD_VALUE


def test_a_folder_without_roots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_simulation_roots(tmp_path)


def test_endorsements_are_read_from_pem_and_der_files(silicon: Path, tmp_path: Path) -> None:
    shutil.copy(silicon / "ark.pem", tmp_path)
    shutil.copy(silicon / "ask.der", tmp_path)
    (tmp_path / "README").write_text("not a certificate, and not looked at")
    assert len(load_endorsements(tmp_path)) == 2


@pytest.mark.parametrize("name", ["broken.pem", "broken.der"])
def test_a_file_that_is_no_certificate_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no certificate")
    with pytest.raises(ConfigError) as caught:
        load_endorsements(tmp_path)
    assert caught.value.problem is ConfigProblem.BAD_VALUE


def test_a_folder_without_certificates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_endorsements(tmp_path)


def test_amd_certificates_with_serial_number_zero_are_read() -> None:
    assert load_endorsements(shared_data("snp/genoa-v3-vcek-configfs"))
