from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenialReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DENIAL_REASON_UNSPECIFIED: _ClassVar[DenialReason]
    DENIAL_REASON_CLAIM: _ClassVar[DenialReason]
    DENIAL_REASON_DEVICE: _ClassVar[DenialReason]
    DENIAL_REASON_COLLATERAL: _ClassVar[DenialReason]
    DENIAL_REASON_REFERENCE_VALUE: _ClassVar[DenialReason]
    DENIAL_REASON_POLICY: _ClassVar[DenialReason]
DENIAL_REASON_UNSPECIFIED: DenialReason
DENIAL_REASON_CLAIM: DenialReason
DENIAL_REASON_DEVICE: DenialReason
DENIAL_REASON_COLLATERAL: DenialReason
DENIAL_REASON_REFERENCE_VALUE: DenialReason
DENIAL_REASON_POLICY: DenialReason

class AttestRequest(_message.Message):
    __slots__ = ("request_id", "hello", "attestation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    hello: Hello
    attestation: Attestation
    def __init__(self, request_id: _Optional[str] = ..., hello: _Optional[_Union[Hello, _Mapping[str, object]]] = ..., attestation: _Optional[_Union[Attestation, _Mapping[str, object]]] = ...) -> None: ...

class AttestResponse(_message.Message):
    __slots__ = ("request_id", "challenge", "verdict")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    challenge: Challenge
    verdict: Verdict
    def __init__(self, request_id: _Optional[str] = ..., challenge: _Optional[_Union[Challenge, _Mapping[str, object]]] = ..., verdict: _Optional[_Union[Verdict, _Mapping[str, object]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "key_uri", "tee")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_URI_FIELD_NUMBER: _ClassVar[int]
    TEE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: str
    key_uri: str
    tee: str
    def __init__(self, protocol_version: _Optional[str] = ..., key_uri: _Optional[str] = ..., tee: _Optional[str] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce", "expires_in_s")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    expires_in_s: int
    def __init__(self, nonce: _Optional[bytes] = ..., expires_in_s: _Optional[int] = ...) -> None: ...

class TeePublicKey(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: bytes
    y: bytes
    def __init__(self, x: _Optional[bytes] = ..., y: _Optional[bytes] = ...) -> None: ...

class Attestation(_message.Message):
    __slots__ = ("tee_pubkey", "snp", "tdx", "additional_evidence", "init_data")
    TEE_PUBKEY_FIELD_NUMBER: _ClassVar[int]
    SNP_FIELD_NUMBER: _ClassVar[int]
    TDX_FIELD_NUMBER: _ClassVar[int]
    ADDITIONAL_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    INIT_DATA_FIELD_NUMBER: _ClassVar[int]
    tee_pubkey: TeePublicKey
    snp: SnpEvidence
    tdx: TdxEvidence
    additional_evidence: bytes
    init_data: bytes
    def __init__(self, tee_pubkey: _Optional[_Union[TeePublicKey, _Mapping[str, object]]] = ..., snp: _Optional[_Union[SnpEvidence, _Mapping[str, object]]] = ..., tdx: _Optional[_Union[TdxEvidence, _Mapping[str, object]]] = ..., additional_evidence: _Optional[bytes] = ..., init_data: _Optional[bytes] = ...) -> None: ...

class SnpEvidence(_message.Message):
    __slots__ = ("report", "cert_chain")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CERT_CHAIN_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    cert_chain: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, report: _Optional[bytes] = ..., cert_chain: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TdxEvidence(_message.Message):
    __slots__ = ("quote", "event_log")
    QUOTE_FIELD_NUMBER: _ClassVar[int]
    EVENT_LOG_FIELD_NUMBER: _ClassVar[int]
    quote: bytes
    event_log: bytes
    def __init__(self, quote: _Optional[bytes] = ..., event_log: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("accepted", "denied")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    denied: Denied
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping[str, object]]] = ..., denied: _Optional[_Union[Denied, _Mapping[str, object]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("token", "policy_version", "reference_value_ids", "session")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_VALUE_IDS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    token: str
    policy_version: str
    reference_value_ids: _containers.RepeatedScalarFieldContainer[str]
    session: bytes
    def __init__(self, token: _Optional[str] = ..., policy_version: _Optional[str] = ..., reference_value_ids: _Optional[_Iterable[str]] = ..., session: _Optional[bytes] = ...) -> None: ...

class Denied(_message.Message):
    __slots__ = ("reason", "claim", "reference_value_id", "policy_version")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_VALUE_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    reason: DenialReason
    claim: str
    reference_value_id: str
    policy_version: str
    def __init__(self, reason: _Optional[_Union[DenialReason, str]] = ..., claim: _Optional[str] = ..., reference_value_id: _Optional[str] = ..., policy_version: _Optional[str] = ...) -> None: ...

class ReleaseKeyRequest(_message.Message):
    __slots__ = ("request_id", "token", "key_uri", "session")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEY_URI_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token: str
    key_uri: str
    session: bytes
    def __init__(self, request_id: _Optional[str] = ..., token: _Optional[str] = ..., key_uri: _Optional[str] = ..., session: _Optional[bytes] = ...) -> None: ...

class ReleaseKeyResponse(_message.Message):
    __slots__ = ("request_id", "jwe", "key_id", "key_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    JWE_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    jwe: bytes
    key_id: str
    key_version: int
    def __init__(self, request_id: _Optional[str] = ..., jwe: _Optional[bytes] = ..., key_id: _Optional[str] = ..., key_version: _Optional[int] = ...) -> None: ...

class ReleaseCredentialsRequest(_message.Message):
    __slots__ = ("request_id", "token", "credentials_uri", "session")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_URI_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token: str
    credentials_uri: str
    session: bytes
    def __init__(self, request_id: _Optional[str] = ..., token: _Optional[str] = ..., credentials_uri: _Optional[str] = ..., session: _Optional[bytes] = ...) -> None: ...

class ReleaseCredentialsResponse(_message.Message):
    __slots__ = ("request_id", "jwe")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    JWE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    jwe: bytes
    def __init__(self, request_id: _Optional[str] = ..., jwe: _Optional[bytes] = ...) -> None: ...
