"""The messages of the handshake, as values. The order is `machine.py`'s, the bytes are `grpc_wire.py`'s.

Sizes are checked where a value is built from the wire. See `protos/HANDSHAKE.md`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.closed import Ident
from agent.errors import DenialReason
from agent.evidence import BindingHash, CompositeEvidence, Nonce, Tee

MAX_MESSAGE_BYTES = 1 << 20
MAX_ADDITIONAL_EVIDENCE_BYTES = 512 << 10
MAX_CERTIFICATES = 8
MAX_CERTIFICATE_BYTES = 8 << 10
MAX_TOKEN_BYTES = 16 << 10
MAX_TRUSTEE_TOKEN_BYTES = 768 << 10
"""Such a token repeats the evidence, about 20 KiB for each device (`ear.py` has the same bound and says more)."""
MAX_JWE_BYTES = 8 << 10
MAX_SESSION_BYTES = 4 << 10
MAX_INIT_DATA_BYTES = 256 << 10
MAX_QUOTE_BYTES = 128 << 10
MAX_EVENT_LOG_BYTES = 256 << 10
MIN_CHALLENGE_LIFE_S = 180
PROTOCOL_VERSION = "1"


class TokenKind(enum.Enum):
    """Whose Verdict tokens a broker hands out. The measured configuration says which this guest believes."""

    KEYTURN = "keyturn"
    """Our broker's own (`token.py`)."""
    TRUSTEE = "trustee"
    """Those of the attestation service behind a relay (`ear.py`)."""


@dataclass(frozen=True, slots=True)
class TeePublicKey:
    """The guest's ephemeral EC P-256 key; x and y are 32 bytes each, big endian."""

    x: bytes
    y: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    request_id: Ident
    key_uri: Ident
    tee: Tee


@dataclass(frozen=True, slots=True)
class Challenge:
    request_id: Ident
    nonce: Nonce
    expires_in_s: int
    hash: BindingHash = BindingHash.SHA384


@dataclass(frozen=True, slots=True)
class Attestation:
    """`init_data` is the whole initdata document of this guest, for a Trustee behind a relay; `""` where there is none."""

    request_id: Ident
    tee_pubkey: TeePublicKey
    evidence: CompositeEvidence
    init_data: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Everything but the token is for display: only the token's signed claims decide.

    Attributes:
        session: of a relay, opaque: it goes back with the key request, to whichever replica serves that.
    """

    request_id: Ident
    token: str
    policy_version: Ident
    reference_value_ids: tuple[Ident, ...]
    session: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Denied:
    request_id: Ident
    reason: DenialReason
    claim: Ident
    reference_value_id: Ident | None
    policy_version: Ident


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """`session` is what came with the Verdict."""

    request_id: Ident
    token: str
    key_uri: Ident
    session: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class KeyResponse:
    """`jwe` is the flattened JSON serialisation, UTF-8."""

    request_id: Ident
    jwe: bytes
    key_id: Ident
    key_version: int


@dataclass(frozen=True, slots=True)
class CredentialsRequest:
    """For the credentials of the model's store, between the Verdict and the key. `session` is what came with the Verdict."""

    request_id: Ident
    token: str
    credentials_uri: Ident
    session: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class CredentialsResponse:
    """`jwe` as a key's."""

    request_id: Ident
    jwe: bytes


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """The signed claims of a Verdict token (ES256 JWT). Times are Unix seconds.

    `lease_s` is None when the key comes without a lease; `min_model_version` is the rollback floor. Trustee's tokens know
    neither of them, nor the key that will be asked for (`rcar_token.py`).
    """

    nonce: Nonce
    tee_pubkey: TeePublicKey
    key_uri: Ident
    policy_version: Ident
    min_model_version: int
    lease_s: int | None
    simulated: bool
    issued_at: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """An accepted Verdict whose token verified under the pinned authority keys. Only `token.verify` makes one."""

    request_id: Ident
    token: str
    claims: TokenClaims
    reference_value_ids: tuple[Ident, ...]


@dataclass(frozen=True, slots=True)
class SealedKey:
    """The model key as JWE to our ephemeral key; nothing can open it before the gate (`keys.unwrap`)."""

    jwe: bytes
    key_id: Ident
    key_version: int


@dataclass(frozen=True, slots=True)
class SealedCredentials:
    """The credentials of the model's store as JWE to our ephemeral key (`keys.open_credentials`)."""

    jwe: bytes


@dataclass(frozen=True, slots=True)
class KeptCredentials:
    """The credentials of the model's store where this guest's own confidential-data-hub has them for us.

    Attributes:
        fetch: as `KeptKey.fetch`.
    """

    fetch: Callable[[memoryview], int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeptKey:
    """The model key where this guest's own confidential-data-hub has it for us. Nothing of it is here, and nothing is asked
    for before the gate (`keys.unwrap`).

    Attributes:
        fetch: writes the key, as it is or as a Tink keyset, to the front of what it is given, and returns its length; or
            raises an AgentError. Blocking.
    """

    fetch: Callable[[memoryview], int] = field(repr=False)
    key_id: Ident
    key_version: int
