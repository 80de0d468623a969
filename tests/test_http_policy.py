"""One TLS context, one redirect rule, and no environment in either."""

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ArtifactUnavailableError, StoreProblem
from agent.http_policy import problem_of_status, redirect_target, tls_context
from tests.range_server import make_certificate

URL = "https://store.example:8443/models/blobs/sha256/00"


def test_a_context_checks_chain_and_name_and_speaks_tls_1_2_or_newer(tmp_path: Path) -> None:
    context = tls_context(make_certificate(tmp_path)[1])
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_given_ca_is_the_only_one(tmp_path: Path) -> None:
    assert len(tls_context(make_certificate(tmp_path)[1]).get_ca_certs()) == 1


def test_without_a_ca_the_systems_are_trusted() -> None:
    assert tls_context(None).cert_store_stats()["x509_ca"] > 1


def test_the_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = make_certificate(tmp_path)
    before = tls_context(None).cert_store_stats()
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = tls_context(None)
    assert context.cert_store_stats() == before
    assert context.keylog_filename is None


@pytest.mark.parametrize("ca_pem", ["", "not PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "é"])
def test_a_ca_that_is_none_is_an_error_and_not_the_systems(ca_pem: str) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        tls_context(ca_pem)
    assert caught.value.problem is StoreProblem.TLS


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/other", "https://store.example:8443/other"),
        ("01", "https://store.example:8443/models/blobs/sha256/01"),
        ("https://store.example:8443/x?y=z", "https://store.example:8443/x?y=z"),
        ("https://STORE.example:8443/x", "https://STORE.example:8443/x"),
    ],
)
def test_a_redirect_within_the_origin_is_followed(location: str, target: str) -> None:
    assert redirect_target(URL, location, 0) == target
    assert redirect_target(URL, location, 2) == target


@pytest.mark.parametrize(
    "location",
    [
        None,
        "http://store.example:8443/x",
        "https://other.example:8443/x",
        "https://store.example/x",
        "https://store.example:8444/x",
        "https://user:password@store.example:8443/x",
        "//other.example:8443/x",
        "file:///etc/passwd",
        "https://[",
        "https://store.example:port/x",
    ],
)
def test_a_redirect_to_anywhere_else_is_refused(location: str | None) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        redirect_target(URL, location, 0)
    assert caught.value.problem is StoreProblem.BAD_ANSWER
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("location", "leaves"),
    [
        ("https://storage.example/x?signature=y", True),
        ("//storage.example/x", True),
        ("/other", True),
        ("http://storage.example/x", False),
        ("http://store.example:8443/x", False),
        ("https://user@storage.example/x", False),
        ("https://:password@storage.example/x", False),
        ("https:///x", True),  # to urljoin this is the same host
        ("https://[", False),
        ("ftp://storage.example/x", False),
        (None, False),
    ],
)
def test_a_redirect_of_a_registry_may_leave_it_over_https_only(location: str | None, *, leaves: bool) -> None:
    if leaves:
        assert redirect_target(URL, location, 0, elsewhere=True).startswith("https://")
        return
    with pytest.raises(ArtifactUnavailableError):
        redirect_target(URL, location, 0, elsewhere=True)
    with pytest.raises(ArtifactUnavailableError):
        redirect_target(URL, "https://storage.example/x", 3, elsewhere=True)


def test_the_default_port_is_the_same_origin_as_its_number() -> None:
    assert redirect_target("http://a/x", "http://a:80/y", 0) == "http://a:80/y"


def test_a_fourth_redirect_is_refused() -> None:
    with pytest.raises(ArtifactUnavailableError):
        redirect_target(URL, "/other", 3)


@given(st.text(max_size=60))
def test_any_location_is_followed_within_the_origin_or_our_error(location: str) -> None:
    try:
        target = redirect_target(URL, location, 0)
    except ArtifactUnavailableError:
        return
    assert target.lower().startswith("https://store.example:8443")


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (404, StoreProblem.NOT_FOUND),
        (410, StoreProblem.NOT_FOUND),
        (401, StoreProblem.REFUSED),
        (403, StoreProblem.REFUSED),
        (408, StoreProblem.SERVER_ERROR),
        (429, StoreProblem.SERVER_ERROR),
        (500, StoreProblem.SERVER_ERROR),
        (503, StoreProblem.SERVER_ERROR),
        (400, StoreProblem.BAD_ANSWER),
        (418, StoreProblem.BAD_ANSWER),
        (204, StoreProblem.BAD_ANSWER),
    ],
)
def test_a_status_means_one_problem(status: int, problem: StoreProblem) -> None:
    assert problem_of_status(status) is problem
