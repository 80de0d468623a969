"""An HTTP proxy on the way to https servers, and the few bytes that are said to it (RFC 9110, section 9.3.6, CONNECT).

Who starts the agent names it: a hint that decides nothing, because TLS goes through it unopened and ends at the measured
identity. So only https goes there. Plain http a proxy would read, and what stays inside the guest is not its affair; both
are connected as without one. Does not connect (`http_limited.py`).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem

if TYPE_CHECKING:
    from agent.config import MeasuredConfig

PROXY = Ident("proxy")
MAX_ANSWER_BYTES = 16 << 10
"""Of the proxy's answer, which is a status line and headers that mean nothing to us."""

_URL = re.compile(r"http://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})/?")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]{1,3}){3}")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([2-9][0-9]{2})(?: [^\r\n]*)?\r\n")


@dataclass(frozen=True, slots=True)
class Proxy:
    """`host`: name or address, IPv6 without brackets; `port`: 1 to 65535."""

    host: str
    port: int

    def for_server(self, scheme: str, host: str | None) -> bool:
        """Is this server reached through it?"""
        return scheme == "https" and not is_loopback(host)

    def check_use(self, cfg: "MeasuredConfig") -> tuple[bool, bool]:
        """Are the broker, and the store or a mirror, reached through it?

        gRPC (`broker.endpoints`) is not: it would read the proxy's answer without our bounds, and tell every failure alike.

        Raises:
            ConfigError: neither is; a hint without effect is a mistake of whoever gave it.
        """
        at = cfg.artifact
        stores = [_url_of(at.source, at.endpoint), *(_url_of(mirror, None) for mirror in at.mirrors)]
        broker, store = self._is_for(cfg.broker.url or ""), any(map(self._is_for, stores))
        # refusal: test_a_proxy_that_nothing_goes_through_is_refused
        if not broker and not store:
            raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, PROXY)
        return broker, store

    def _is_for(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
        except ValueError:  # told where it is opened
            return False
        return self.for_server(parts.scheme, parts.hostname)


def _url_of(location: str, endpoint: str | None) -> str:
    """Where a store's location (`sources.open_source`) leads."""
    scheme, _, rest = location.partition("://")
    if scheme == "s3":
        return endpoint or "https://s3"
    return f"https://{rest}" if scheme == "oci" else location


def is_loopback(host: str | None) -> bool:
    """Does this host, IPv6 without brackets, stay inside the guest?"""
    return _LOOPBACK.fullmatch(host or "") is not None


def parse_proxy(url: str) -> Proxy:
    """`http://HOST:PORT` and nothing else: no user, no password, no path.

    Raises:
        ValueError: it is none.
    """
    found = _URL.fullmatch(url)
    # refusal: test_a_proxy_is_http_host_and_port_and_nothing_else
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError("not http://HOST:PORT")
    return Proxy(found[1].strip("[]"), int(found[2]))


def pack_connect(host: str, port: int) -> bytes:
    """What asks a proxy for a connection.

    Raises:
        ValueError: a host that a request cannot name; a redirect can lead to one.
    """
    # refusal: test_a_host_that_would_be_more_than_a_host_is_not_asked_for
    if not _HOST.fullmatch(host):
        raise ValueError("not a host")
    to = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n".encode()


def parse_connect_answer(data: bytes) -> int | None:
    """The HTTP status of a proxy's answer so far; None: more of it must come.

    Args:
        data: everything that came.

    Raises:
        ValueError: it is no such answer, it is longer than 16 KiB, or a server spoke that had not been spoken to.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    # refusal: test_an_answer_that_is_none_is_refused
    if len(head) > MAX_ANSWER_BYTES:
        raise ValueError("too long")
    if not end:
        return None
    line = _STATUS_LINE.match(head + b"\r\n")
    # refusal: test_an_answer_that_is_none_is_refused
    if line is None:
        raise ValueError("not HTTP")
    status = int(line[1])
    # A TLS server waits for its client: these bytes would be the proxy's own.
    # refusal: test_an_answer_that_is_none_is_refused
    if status < 300 and rest:
        raise ValueError("more than an answer")
    return status
