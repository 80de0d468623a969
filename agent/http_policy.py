"""The one TLS context, the one redirect rule and the one mapping of answers for every HTTP client of the agent.

Nothing here reads the environment: no proxies, no SSL_CERT_FILE, no SSLKEYLOGFILE. Does not send requests.
"""

import ssl
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from agent.errors import ArtifactUnavailableError, StoreProblem

MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
# Where distributions keep their bundle, for an interpreter that was built elsewhere.
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def tls_context(ca_pem: str | None) -> ssl.SSLContext:
    """TLS 1.2 or newer, host name and chain checked.

    Args:
        ca_pem: the only CAs to trust, PEM; None: the system's.

    Raises:
        ArtifactUnavailableError: there is no CA to trust (TLS).
    """
    # Not ssl.create_default_context: that one turns SSLKEYLOGFILE and SSL_CERT_FILE of the environment into settings.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # refusal: test_a_context_checks_chain_and_name_and_speaks_tls_1_2_or_newer
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if ca_pem is not None:
            context.load_verify_locations(cadata=ca_pem)
        else:
            context.load_verify_locations(cafile=_system_bundle())
    except (ssl.SSLError, OSError, ValueError, TypeError) as error:  # TypeError: not ASCII
        raise ArtifactUnavailableError(StoreProblem.TLS) from error
    return context


def _system_bundle() -> str:
    built_in = ssl.get_default_verify_paths().openssl_cafile
    for path in (built_in, *_BUNDLES):
        if Path(path).is_file():
            return path
    raise ArtifactUnavailableError(StoreProblem.TLS)


Origin = tuple[str, str | None, str | None, int | None]


def redirect_target(url: str, location: str | None, followed: int, *, elsewhere: bool = False) -> str:
    """The URL a redirect leads to: same scheme, host and port, at most three in a row.

    The store is as untrusted as the network, but what it may name is up to the measured configuration, not to it. A registry
    is the exception: its blobs lie in an object store whose name nobody can know before. What comes from there is ciphertext
    like any other, over https only, and no credentials go there (the caller compares `origin`).

    Args:
        url: the URL that was asked for.
        location: the answer's Location header, absolute or relative.
        followed: how many redirects this request has followed already.
        elsewhere: any https origin will do.

    Raises:
        ArtifactUnavailableError: any other redirect (BAD_ANSWER).
    """
    # refusal: test_a_redirect_to_anywhere_else_is_refused test_a_fourth_redirect_is_refused
    if location is None or followed >= MAX_REDIRECTS:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
    try:
        target = urljoin(url, location)
        there = origin(target)
        same = there == origin(url)
    except ValueError as error:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER) from error
    away = elsewhere and there[0] == "https" and there[1] is None and there[2] is not None
    # refusal: test_a_redirect_to_anywhere_else_is_refused test_a_redirect_of_a_registry_may_leave_it_over_https_only
    if not same and not away:
        raise ArtifactUnavailableError(StoreProblem.BAD_ANSWER)
    return target


def origin(url: str) -> Origin:
    """Scheme, user, host and port: who gets what is meant for this URL. Raises ValueError: it is none."""
    parts = urlsplit(url)
    return parts.scheme, parts.username, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def problem_of_status(status: int) -> StoreProblem:
    """What an HTTP status that is neither success nor redirect means for the boot."""
    if status in (404, 410):
        return StoreProblem.NOT_FOUND
    if status in (401, 403, 407):
        return StoreProblem.REFUSED
    if status in (408, 429) or status >= 500:
        return StoreProblem.SERVER_ERROR
    return StoreProblem.BAD_ANSWER
