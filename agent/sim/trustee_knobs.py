"""What a test may turn on a test KBS: its numbers, its refusals, and every way it can be broken or hostile.

Values only. `trustee.py` obeys those about meaning, `trustee_http.py` those about bytes on a connection.
Refusals are the rows of Trustee's error table (confidential-containers/trustee 78962cd, `kbs/src/error.rs`), texts included.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ERROR_TYPE = "https://github.com/confidential-containers/kbs/errors/"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One KBS error: `{"type": ERROR_TYPE + variant, "detail": detail}`, without a content type."""

    variant: str
    detail: str
    status: int = 401


AUTH_FAILED = "Attestation error: RCAR handshake Auth failed: "
REFUSALS: Mapping[str, Refusal] = MappingProxyType(
    {
        "version-mismatch": Refusal(
            "AttestationError",
            AUTH_FAILED + "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is 0.1.1",
        ),
        "bad-version": Refusal("AttestationError", AUTH_FAILED + "failed to parse KBS version"),
        "bad-request": Refusal("AttestationError", AUTH_FAILED + "deserialize Request"),
        "attest-failed": Refusal("AttestationError", "Attestation error: RCAR handshake Attest failed"),
        "token-not-found": Refusal("TokenNotFound", "Attestation Token not found"),
        "token-verifier": Refusal("TokenVerifierError", "Token Verifier error"),
        "policy-deny": Refusal("PolicyDeny", "Access denied by policy"),
        "policy-broken": Refusal("PolicyEngineError", "Policy engine error: Failed to load policy"),
        "plugin-internal": Refusal("PluginInternalError", "Plugin internal error"),
        "jwe": Refusal("JweError", "JWE failed"),
        "plugin-not-found": Refusal("PluginNotFound", "Plugin resource not found", 404),
        "admin-access": Refusal(
            "AdminAuthAccess", "admin access denied for endpoint resource-policy: Admin access denied: administration is off"
        ),
        "admin-plugin": Refusal(
            "AdminAuthInitialization",
            "failed to initialize [admin] configuration: Admin access denied: administration is off",
        ),
    }
)
"""Every row of the refusal table by a name of ours. The real server makes most of them by itself; a knob makes any of them."""


class Fault(enum.Enum):
    """How an answer goes wrong on its way, or never was one."""

    OVERSIZED_BODY = "a content length of 64 MiB, and that many bytes"
    ENDLESS_BODY = "chunks without an end"
    OVERSIZED_HEAD = "one header of 1 MiB"
    MANY_HEADERS = "ten thousand headers"
    SLOW_DRIP = "the right answer, a byte at a time, 20 a second"
    SILENT = "no byte, and an open connection"
    HALF_CLOSED = "half of the body, then the end of the stream"
    RESET = "the connection is reset before a byte"
    NOT_HTTP = "bytes that are no HTTP"
    TWO_LENGTHS = "two content lengths that differ"
    GZIP_BODY = "a body that says gzip and unpacks to 64 MiB"
    REDIRECT = "307 to `redirect_to`"
    HTML_502 = "502 with the HTML page of a proxy"
    SERVER_ERROR = "500 with text"
    UNAVAILABLE = "503 with Retry-After"
    TOO_MANY_REQUESTS = "429 with Retry-After"
    EMPTY = "200 without a body"
    NOT_JSON = "200 with text"
    JSON_ARRAY = "200 with the right answer in a list"
    WRONG_TYPES = "200 with a number for every string"
    DUPLICATE_MEMBERS = "200 with every member twice, another value first"
    DEEP_JSON = "200 with a hundred thousand open brackets"


class TokenFault(enum.Enum):
    """What is wrong with the tokens that are handed out. This KBS itself takes none of those whose signature is bad."""

    ALG_NONE = "alg none and no signature"
    UNKNOWN_ALG = "an alg that nobody knows"
    HS256 = "an HMAC keyed with the public key's PEM"
    BAD_SIGNATURE = "one bit of the signature"
    OTHER_KEY = "signed by another key, which the header carries"
    NOT_A_JWT = "no dots"
    HEADER_ZIP = "a header with zip: DEF"
    OTHER_NONCE = "good, but of another handshake's nonce"
    OTHER_TEE_PUBKEY = "good, but for somebody else's key"
    WITHOUT_RUNTIME_DATA = "good, but says nothing of nonce and key"
    WITHOUT_SUBMODS = "good, and empty"
    WITHOUT_EXPIRY = "good, without exp"


class JweFault(enum.Enum):
    """What is wrong with encrypted answers."""

    HEADER = "the protected header is not the authenticated one"
    ENCRYPTED_KEY = "one bit of the wrapped key"
    IV = "one bit of the nonce"
    CIPHERTEXT = "one bit of the ciphertext"
    TAG = "one bit of the tag"
    SHORT_TAG = "the first 12 bytes of the tag"
    EPK_OFF_CURVE = "an ephemeral key that is no point of the curve"
    EPK_OTHER_CURVE = "an ephemeral key on P-384"
    EPK_MISSING = "no ephemeral key"
    HEADER_ZIP = "a header with zip: DEF, authenticated"
    HEADER_CRIT = "a header with a critical extension, authenticated"
    UNKNOWN_ALG = "another alg in the header, authenticated"
    UNKNOWN_ENC = "another enc in the header, authenticated"
    OTHER_RECIPIENT = "encrypted to somebody else's key"
    COMPACT = "the compact serialisation"
    EMPTY_PLAINTEXT = "nothing inside"


class CookieFault(enum.Enum):
    """What is wrong with the session cookie of /auth."""

    MISSING = "no Set-Cookie"
    EMPTY = "an empty value"
    OVERSIZED = "a value of 32 KiB"
    INJECTING = "a value with a semicolon, a space and a second cookie"


@dataclass(frozen=True, slots=True)
class Knobs:
    """One setting of a test KBS; change it with `dataclasses.replace`. The defaults are an unmodified server.

    Attributes:
        protocol: the one version that /auth takes: `0.1.1` and `0.5.0` are servers of other times.
        session_life_s: from /auth on; /attest does not extend it. Negative: expired at once.
        token_life_s: of tokens, counted apart; taken for `LEEWAY_S` longer.
        clock_offset_s: how far the server's clock is off: Expires, iat, exp, and what it takes for expired.
        nonce: the challenge's, instead of 32 random bytes in base64.
        selected_hash: `sha512` and the like: the challenge names it, as with Intel Trust Authority, and evidence is held to it.
        verbose_token: the token repeats the text of the device evidence.
        tcb_status: what TDX claims say of the platform's patch level, as nothing here asks Intel.
        delays_s: how long an answer takes to begin, by the first path segment (`auth`, `attest`, `resource`, …).
        faults: by the first path segment.
        fault_times: how often such a fault happens before answers are right; None for always.
        refusals: answered instead of anything else, by the first path segment.
        retry_after: of 429 and 503; None for no such header.
        redirect_to: a base URL to which the path is appended.
    """

    protocol: str = "0.4.0"
    session_life_s: float = 300
    token_life_s: float = 300
    clock_offset_s: float = 0
    nonce: str | None = None
    selected_hash: str | None = None
    verbose_token: bool = True
    tcb_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()
    delays_s: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, Fault] = field(default_factory=dict)
    fault_times: int | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    token_fault: TokenFault | None = None
    jwe_fault: JweFault | None = None
    cookie_fault: CookieFault | None = None
    retry_after: str | None = "1"
    redirect_to: str = "https://redirected.invalid"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One answered request: what a test may ask about. No token, key or evidence.

    Attributes:
        connection: counts from 1; equal for requests over one connection.
        status: 0 where a fault left no answer.
        variant: of the KBS error, if it was one.
        cookie, bearer: whether the request carried one.
        members: names of the members of a JSON object in the body, sorted.
        reason: why /attest failed, which a real server tells nobody but its own log.
    """

    connection: int
    method: str
    path: str
    query: str
    status: int
    variant: str | None = None
    cookie: bool = False
    bearer: bool = False
    content_type: str | None = None
    user_agent: str | None = None
    body_bytes: int = 0
    members: tuple[str, ...] = ()
    reason: str | None = None
