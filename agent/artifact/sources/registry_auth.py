"""Who a registry takes us for: WWW-Authenticate challenges, and what answers them (nothing, Basic, a bearer token).

A challenge is parsed as RFC 9110 section 11.6.1 writes it and nothing else. Of its words only `realm` and `service` are
used: what a token is for (the repository, and whether to pull or push) is said by us, never by the registry.

Where a token comes from is the registry's word, and it gets our credentials: any https host, as every registry client has
it (Docker Hub: auth.docker.io, GitLab: gitlab.com), or the registry's own origin. A registry that wanted them elsewhere
could as well ask for them itself, with Basic; TLS and the measured name are what it is believed for. The token goes to the
registry alone. Spec: distribution/docs/spec/auth/token.md; RFC 7617; RFC 6750.
"""

import base64
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from agent import http_policy
from agent.artifact.sources.access import Access
from agent.artifact.sources.web import Ask, WebClient, read_whole
from agent.errors import ArtifactUnavailableError, StoreProblem

MAX_CHALLENGE_BYTES = 8 << 10
_MAX_CHALLENGES = 8
_MAX_ANSWER_BYTES = 64 << 10
_LIFE_S = 60
"""Of a token that does not say; and what is left of one that does is not used in its last tenth."""
_MAX_LIFE_S = 3600

_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SCHEME = re.compile(rf"({_WORD})(?: +|(?=\s*(?:,|\Z)))")
_PARAMETER = re.compile(
    rf'({_WORD})[ \t]*=[ \t]*(?:"((?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*)"|({_WORD}))'
)
_BLOB68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*(?=[ \t]*(?:,|\Z))")
_COMMA = re.compile(r"[ \t]*(?:,[ \t]*)+")
_BEARER = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate: a scheme in lower case, parameters with names in lower case."""

    scheme: str
    parameters: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Held:
    """What is sent now. `until`: on the monotonic clock."""

    header: str = field(repr=False)
    until: float


def parse_challenges(value: str) -> tuple[Challenge, ...]:
    """The challenges of a WWW-Authenticate field, several field lines joined by commas.

    Raises:
        ArtifactUnavailableError: not one or more challenges, a doubled parameter, above 8 KiB (BAD_ANSWER).
    """
    # refusal: test_a_challenge_that_is_none_is_refused
    if len(value) > MAX_CHALLENGE_BYTES:
        raise _bad()
    found: list[Challenge] = []
    at = _skip(value, 0, _COMMA)
    while at < len(value):
        match = _SCHEME.match(value, at)
        # refusal: test_a_challenge_that_is_none_is_refused
        if match is None or len(found) == _MAX_CHALLENGES:
            raise _bad()
        challenge = Challenge(match[1].lower(), {})
        at = match.end()
        if (blob := _BLOB68.match(value, at)) and not _PARAMETER.match(value, at):  # token68: nothing that we could answer
            at = blob.end()
        else:
            at = _parse_parameters(value, at, challenge.parameters)
        found.append(challenge)
        end = _skip(value, at, _COMMA)
        # refusal: test_a_challenge_that_is_none_is_refused
        if end == at and value[at:].strip(" \t"):
            raise _bad()
        at = end if end != at else len(value)
    # refusal: test_a_challenge_that_is_none_is_refused
    if not found:
        raise _bad()
    return tuple(found)


def _parse_parameters(value: str, at: int, into: dict[str, str]) -> int:
    """Read `name=value, …` from `at`; gives where they end, before the comma of the next challenge."""
    end = at
    while match := _PARAMETER.match(value, at):
        name = match[1].lower()
        # refusal: test_a_challenge_that_is_none_is_refused
        if name in into:
            raise _bad()
        into[name] = match[3] if match[3] is not None else re.sub(r"\\(.)", r"\1", match[2])
        end = match.end()
        at = _skip(value, end, _COMMA)
        if at == end:
            break
    return end


def _skip(value: str, at: int, what: re.Pattern[str]) -> int:
    match = what.match(value, at)
    return match.end() if match else at


class RegistryAuth:
    """What to send to one repository of one registry. Safe for any number of threads: one of them asks for all."""

    def __init__(self, web: WebClient, url: str, repository: str, actions: str, access: Access) -> None:
        """Before it was asked for anything, nothing is sent.

        Args:
            web: the client that also asks the registry.
            url: of the registry, `https://host[:port]`.
            repository: its name.
            actions: `pull` or `pull,push`.
            access: credentials, or none.
        """
        self._web = web
        self._url = url
        self._scope = f"repository:{repository}:{actions}"
        self._access = access
        self._lock = threading.Lock()
        self._held: _Held | None = None

    def header(self) -> str | None:
        """The Authorization to send now; None: none, and a challenge may come."""
        held = self._held
        return held.header if held is not None and time.monotonic() < held.until else None

    def answer(self, challenges: Sequence[str], refused: str | None) -> str:
        """The Authorization to send instead of what was refused.

        Args:
            challenges: the WWW-Authenticate field lines of the 401.
            refused: what was sent with the request that got it.

        Raises:
            ArtifactUnavailableError: nothing can be answered (REFUSED), or the token's server does not deliver.
        """
        with self._lock:
            now = self.header()
            if now is not None and now != refused:  # another thread was here
                return now
            self._held = None
            offered = {challenge.scheme: challenge for challenge in parse_challenges(", ".join(challenges))}
            if (bearer := offered.get("bearer")) is not None:
                self._held = self._fetch_token(bearer)
            elif "basic" in offered and self._access.secret is not None:
                self._held = _Held(self._basic(), float("inf"))
            else:
                raise ArtifactUnavailableError(StoreProblem.REFUSED, 401)
            return self._held.header

    def _basic(self) -> str:
        pair = f"{self._access.user}:{self._access.secret}".encode()
        return "Basic " + base64.b64encode(pair).decode()

    def _fetch_token(self, challenge: Challenge) -> _Held:
        realm = challenge.parameters.get("realm", "")
        try:
            scheme, user, host, _ = there = http_policy.origin(realm)
            # refusal: test_artifact_sources_oci.py::test_a_realm_that_no_credentials_may_go_to_is_refused
            if user is not None or host is None or "#" in realm or not realm.isascii() or not realm.isprintable():
                raise _bad()
            # refusal: test_artifact_sources_oci.py::test_a_realm_that_no_credentials_may_go_to_is_refused
            if scheme != "https" and there != http_policy.origin(self._url):
                raise _bad()
            # A second scope beside ours would be one that the registry chooses.
            # refusal: test_artifact_sources_oci.py::test_a_realm_that_no_credentials_may_go_to_is_refused
            if "scope" in parse_qs(urlsplit(realm).query, keep_blank_values=True):
                raise _bad()
        except ValueError:
            raise _bad() from None
        query = {"scope": self._scope}
        if "service" in challenge.parameters:
            query["service"] = challenge.parameters["service"]
        url = realm + ("&" if "?" in realm else "?") + urlencode(query)
        private = {} if self._access.secret is None else {"Authorization": self._basic()}
        started = time.monotonic()
        with self._web.request(Ask(url, private=private), (200,)) as response:
            token, life_s = parse_token_answer(read_whole(response, _MAX_ANSWER_BYTES))
        return _Held(f"Bearer {token}", started + 0.9 * life_s)


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: int | None = None


def parse_token_answer(data: bytes) -> tuple[str, int]:
    """The token of a token server's answer, and how many seconds it lives.

    Raises:
        ArtifactUnavailableError: there is none, or none that may stand in a header (BAD_ANSWER).
    """
    try:
        answer = msgspec.json.decode(data, type=_TokenAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _bad() from None
    token = answer.token or answer.access_token or ""
    # refusal: test_artifact_sources_oci.py::test_a_token_that_is_none_is_refused
    if _BEARER.fullmatch(token) is None:
        raise _bad()
    life_s = _LIFE_S if answer.expires_in is None else answer.expires_in
    return token, max(0, min(life_s, _MAX_LIFE_S))


def _bad() -> ArtifactUnavailableError:
    return ArtifactUnavailableError(StoreProblem.BAD_ANSWER, 401)
