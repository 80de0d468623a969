"""Failures of a call: `google.rpc.Status` with ErrorInfo, RequestInfo and RetryInfo, both directions.

Also how a denied key looks: after the Verdict there is no message left to deny with, so ErrorInfo's metadata carries it.

Carried in the trailing metadata `grpc-status-details-bin` (gRPC, "Richer error model"; AIP-193). What a peer says here
can only make us wait or stop. Not part of `grpc_wire`, because a boot that succeeds never imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no types

from agent.closed import Ident
from agent.errors import DenialReason, TrusteeRefusal

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "keyturn.kbs.v1"
OVERLOADED = Ident("OVERLOADED")
"""The one reason that is about the number of guests and not about a part of the broker."""
MAX_DETAILS_BYTES = 8 << 10
MAX_RETRY_AFTER_S = 86_400.0
_TRUSTEE = "TRUSTEE_"


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a key was denied, as in a denied Verdict."""

    reason: DenialReason
    claim: Ident
    reference_value_id: Ident | None
    policy_version: Ident


@dataclass(frozen=True, slots=True)
class Failure:
    """Attributes:
    code: the gRPC status code, repeated in the details.
    reason: one word of the broker's closed set, e.g. `KEY_STORE_IO`.
    request_id: of the request that failed, if it was readable.
    retry_after_s: the broker asks to come back after this many seconds; None: it says nothing about coming back.
    denial: of a refused key, if this is one and its broker says why in our words.
    """

    code: int
    reason: Ident
    request_id: Ident | None = None
    retry_after_s: float | None = None
    denial: Denial | None = None


def reason_of(refusal: TrusteeRefusal) -> Ident:
    """The reason by which a relay tells what the Trustee behind it refused: `TRUSTEE_ATTESTATION` and the like."""
    return Ident(_TRUSTEE + refusal.name)


def refusal_of(reason: Ident) -> TrusteeRefusal | None:
    """The inverse of `reason_of`; None for a reason that is about something else."""
    word = reason.removeprefix(_TRUSTEE)
    return TrusteeRefusal.__members__.get(word) if word != reason else None


def pack_failure(failure: Failure) -> bytes:
    """The value of `DETAILS_KEY`."""
    status = status_pb2.Status(code=failure.code, message=failure.reason)
    info = error_details_pb2.ErrorInfo(reason=failure.reason, domain=ERROR_DOMAIN)
    if denial := failure.denial:
        info.metadata.update(reason=denial.reason.value, claim=denial.claim, policy_version=denial.policy_version)
        if denial.reference_value_id is not None:
            info.metadata["reference_value_id"] = denial.reference_value_id
    status.details.add().Pack(info)
    if failure.request_id is not None:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=failure.request_id))
    if failure.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(failure.retry_after_s * 1000))
        status.details.add().Pack(retry)
    return bytes(status.SerializeToString())


def parse_failure(data: bytes, code: int) -> Failure | None:
    """What a peer said, or None when it is oversized, malformed, for another status code, or has no ErrorInfo.

    Texts that are no identifiers become `unprintable`; a delay is kept within 0 s and one day; a denial that is not whole, or
    in another domain's words, is None.
    """
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    request, retry = error_details_pb2.RequestInfo(), error_details_pb2.RetryInfo()
    try:
        if len(data) > MAX_DETAILS_BYTES:
            return None
        status.ParseFromString(data)
        for detail in status.details:
            for message in (info, request, retry):
                detail.Unpack(message)  # fills `message` when it is of that type
    except DecodeError:
        return None
    if status.code != code or not info.reason:
        return None
    delay = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return Failure(
        code=code,
        reason=Ident.of_peer(info.reason),
        request_id=Ident.of_peer(request.request_id) if request.request_id else None,
        retry_after_s=min(max(delay, 0.0), MAX_RETRY_AFTER_S) if retry.HasField("retry_delay") else None,
        denial=_denial(dict(info.metadata)) if info.domain == ERROR_DOMAIN else None,
    )


def _denial(metadata: Mapping[str, str]) -> Denial | None:
    try:
        value = metadata.get("reference_value_id")
        return Denial(
            DenialReason(metadata["reason"]),
            Ident(metadata["claim"]),
            Ident(value) if value is not None else None,
            Ident(metadata["policy_version"]),
        )
    except (KeyError, ValueError):
        return None
