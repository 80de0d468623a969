"""The receipt of a boot: what was opened here, for whom, in which mode, signed by a key that the TEE vouches for.

A COSE_Sign1 over a closed CBOR map. The *statement* in it is everything that is known before the key is opened; its digest
goes into the runtime register where there is one, and with the key that signs into the report data of fresh CPU Evidence,
which the receipt carries. The key pair is made for one receipt and dies with it. So the Evidence alone says that this guest
made the statement, and the signature that the guest added the rest: stages, and how the measurement went.

Owns the format, its bounds, the signature, and the closed list of what a boot does not hold. Whether the Evidence is genuine
and covers the receipt is `verify/receipt.py`'s; `receipts.py` makes them. `protos/RECEIPT.md`.
"""

import enum
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import cbor2
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent import cose
from agent.artifact import DestinationKind, LoadedFile
from agent.closed import Ident
from agent.config import MeasuredConfig
from agent.errors import ReceiptError, ReceiptProblem
from agent.events import Stage
from agent.evidence import REPORT_DATA_BYTES, Evidence, ReportData, Tee, Unsupported
from agent.handshake import (
    MAX_CERTIFICATE_BYTES,
    MAX_CERTIFICATES,
    MAX_EVENT_LOG_BYTES,
    MAX_QUOTE_BYTES,
)
from agent.modes import Mode, unheld
from agent.report import MAX_RECEIPT_BYTES

SCHEMA = "keyturn/v1/receipt"
DIGEST_BYTES = 48
"""SHA-384: of statements, and of what Evidence and tokens are named by."""

_KEY_LABEL = "keyturn/v1/receipt-key"
_FILES_BYTES = 32
_FOLDER_BYTES = 32
_MAX_KEY_BYTES = 128
_MAX_INTEGER = 1 << 53
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")

_T = TypeVar("_T")
_E = TypeVar("_E", bound=enum.Enum)


class ReadyState(enum.Enum):
    """Whose work the GPU ready state was: `gpu.ready_state`."""

    OWN = "own"
    PRESET = "preset"


class NotHeld(enum.Enum):
    """What this boot does not promise, and another one would: `modes.Unheld`, and what is no mode's."""

    GATE = "gate"
    PLACE = "place"
    SEAL = "seal"
    KILL = "kill"
    WIPE = "wipe"
    SERVER = "server"
    LEASE = "lease"
    SCRATCH = "scratch"
    GUEST_ATTESTED = "guest-attested"  # the verdict covers neither GPU modes nor server command
    POD_EVIDENCE = "pod-evidence"  # any container of the pod can ask the guest's components for such evidence
    SERVER_OUTPUT = "server-output"  # what the server prints leaves the guest with the agent's output
    SERVER_ROOT = "server-root"  # the server runs as root, without capabilities
    SWAP = "swap"  # the model's memory may be swapped


@dataclass(frozen=True, slots=True)
class Statement:
    """What is known before the key is opened.

    Attributes:
        agent: version of this program.
        not_held: in the order of `NotHeld`.
        simulated: the silicon is, or the verdict says so.
        interface: what stood between the agent and its TEE.
        config_digest: what the guest was launched with, before it is fitted to the TEE's field: 32, 48 or 64 bytes; empty
            where the launch measurement covers the configuration.
        evidence_digest: SHA-384 of the quote or report that the verdict is about; None where the guest's components gave it.
        token_digest: SHA-384 of the verdict's token.
        lease_s: None: the key may be used without end.
        model_version: 0 of a model without versions.
        manifest_digest: `sha256:` and 64 hexadecimal digits.
        files: how many; 0 of a volume, whose files are known when it is open.
        total_bytes: in all of them.
        files_digest: `digest_of_files`.
        folder_digest: of a given directory, as `artifact.given.folder_digest`; else None.
        server_command_digest: `sha256:…`, of no words where another container serves.
        gpu_ready: None without GPUs.
    """

    agent: Ident
    mode: Mode
    not_held: tuple[NotHeld, ...]
    simulated: bool
    tee: Tee
    interface: Ident
    config_digest: bytes
    request_id: Ident
    policy_version: Ident
    evidence_digest: bytes | None
    token_digest: bytes
    key_uri: Ident
    key_id: Ident
    key_version: int
    lease_s: int | None
    model_name: Ident
    model_version: int
    manifest_digest: str
    files: int
    total_bytes: int
    files_digest: bytes
    destination: DestinationKind
    folder_digest: bytes | None
    server_command_digest: str
    gpus: int
    switches: int
    gpu_ready: ReadyState | None

    def pack(self) -> bytes:
        """Deterministic CBOR (RFC 8949 §4.2.1): a map of text keys."""
        return _pack({field.name: _plain(getattr(self, field.name)) for field in fields(self)})

    def digest(self) -> bytes:
        """SHA-384 of `pack`, 48 bytes: what is measured."""
        return hashlib.sha384(self.pack()).digest()


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt whose key signed it. Only `parse_receipt` makes one; nothing says yet whose key that is.

    Attributes:
        key: DER SubjectPublicKeyInfo of P-256.
        evidence: over `report_data(key, statement.digest())`, so it says.
        rtmr_3: the register after the release was measured; None: not told, or not measured.
        unmeasured: why it was not.
        stages: those that had ended, and how long each took, in ms.
        made_at: Unix seconds, by the guest's clock, which its host sets.
    """

    statement: Statement
    key: bytes
    evidence: Evidence
    rtmr_3: bytes | None
    unmeasured: Unsupported | None
    stages: tuple[tuple[Stage, int], ...]
    made_at: int

    def pack(self) -> bytes:
        """What is signed: deterministic CBOR."""
        return _pack(
            {
                "schema": SCHEMA,
                "statement": self.statement.pack(),
                "key": self.key,
                "evidence": {
                    "report": self.evidence.report,
                    "certificates": list(self.evidence.cert_chain),
                    "event_log": self.evidence.event_log,
                },
                "rtmr_3": self.rtmr_3,
                "unmeasured": _plain(self.unmeasured),
                "stages": {stage.value: ms for stage, ms in self.stages},
                "made_at": self.made_at,
            }
        )

    def report_data(self) -> ReportData:
        """What its Evidence has to be over."""
        return report_data(self.key, self.statement.digest())


def digest_of_files(files: Iterable[LoadedFile]) -> bytes:
    """SHA-256 over path and size of every file, in the order of the paths' UTF-8: whatever order they come in."""
    table = sorted(([file.path, file.size] for file in files), key=lambda row: str(row[0]).encode())
    return hashlib.sha256(_pack(table)).digest()


def report_data(key: bytes, statement_digest: bytes) -> ReportData:
    """What the CPU Evidence of a receipt covers: which key signs, and what.

    Its preimage is CBOR and begins with a label: it can be no broker's, whose preimage is JSON (`evidence/binding.py`).

    Args:
        key: DER SubjectPublicKeyInfo.
        statement_digest: 48 bytes.

    Returns:
        64 bytes: SHA-384, zero-padded on the right.
    """
    digest = hashlib.sha384(_pack([_KEY_LABEL, key, statement_digest])).digest()
    return ReportData(digest.ljust(REPORT_DATA_BYTES, b"\0"))


def not_held_by(mode: Mode, config: MeasuredConfig) -> set[NotHeld]:
    """What a boot of this configuration does not hold wherever it runs. `receipts.py` adds what shows only there."""
    found = {
        NotHeld.GUEST_ATTESTED: config.broker.cdh,
        NotHeld.POD_EVIDENCE: config.tee.through_coco,
        NotHeld.SERVER_OUTPUT: config.server is not None and config.server.output == "inherit",
        NotHeld.SERVER_ROOT: config.server is not None and config.server.unsafe_run_as_root,
    }
    return {NotHeld(promise.label) for promise in unheld(mode, config)} | {item for item, so in found.items() if so}


def sign_receipt(receipt: Receipt, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The receipt as it is given away, at most 512 KiB.

    Args:
        receipt: its `key` is the public half of `key`.
        key: of P-256, for this one signature.
    """
    signed = cose.sign(receipt.pack(), key)
    if parse_receipt(signed) != receipt:
        raise RuntimeError("a receipt that nobody could read")
    return signed


def parse_receipt(data: bytes) -> Receipt:
    """A receipt, once the key in it has signed it.

    Raises:
        ReceiptError: MALFORMED or SIGNATURE.
    """
    found = cose.parse(data, MAX_RECEIPT_BYTES)
    # refusal: test_what_is_no_receipt_is_malformed
    if found is None:
        raise ReceiptError(ReceiptProblem.MALFORMED)
    try:
        receipt = _receipt_of(found.payload)
        key = _load_key(receipt.key)
    except ValueError:
        raise ReceiptError(ReceiptProblem.MALFORMED) from None
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if found.key_id != cose.key_id(key) or found.algorithm != cose.algorithm_of(key):
        raise ReceiptError(ReceiptProblem.SIGNATURE)
    try:
        # refusal: test_a_receipt_with_one_defect_is_refused_for_it
        cose.verify(found, key)
    except InvalidSignature:
        raise ReceiptError(ReceiptProblem.SIGNATURE) from None
    return receipt


# --- reading ----------------------------------------------------------------------------------------------------------


def _receipt_of(payload: bytes) -> Receipt:
    members = _map(_unpack(payload), _RECEIPT)
    statement = Statement(**_map(_unpack(members["statement"]), _STATEMENT))
    evidence = Evidence(
        statement.tee,
        members["evidence"]["report"],
        members["evidence"]["certificates"],
        members["evidence"]["event_log"],
    )
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if (statement.files == 0) != (statement.destination is DestinationKind.VOLUME):
        raise ValueError("files")
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if statement.tee is Tee.SAMPLE and not statement.simulated:  # anybody makes such evidence
        raise ValueError("simulated")
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if list(statement.not_held) != [item for item in NotHeld if item in statement.not_held]:
        raise ValueError("statement")
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if members["rtmr_3"] is not None and members["unmeasured"] is not None:
        raise ValueError("measured and not measured")
    return Receipt(
        statement,
        members["key"],
        evidence,
        members["rtmr_3"],
        members["unmeasured"],
        members["stages"],
        members["made_at"],
    )


def _load_key(der: bytes) -> ec.EllipticCurvePublicKey:
    """Raises ValueError: not the one DER form of a P-256 key."""
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("key") from None
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or cose.spki(key) != der:
        raise ValueError("key")
    return key


def _plain(value: object) -> object:
    """A closed value as CBOR has it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _pack(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)


def _unpack(data: bytes) -> object:
    """Raises ValueError: not CBOR, or there is another way to write it."""
    try:
        value = cbor2.loads(data)
        canonical = _pack(value) == data
    except Exception:  # noqa: BLE001  # as in `cose.parse`
        raise ValueError("cbor") from None
    # refusal: test_a_receipt_with_one_defect_is_refused_for_it
    if not canonical:
        raise ValueError("cbor")
    return value


_Read = Callable[[object], Any]


def _map(value: object, table: Mapping[str, _Read]) -> dict[str, Any]:
    # refusal: test_a_member_more_or_less_is_malformed test_a_member_of_another_type_is_malformed
    if not isinstance(value, dict) or value.keys() != table.keys():
        raise ValueError("members")
    return {name: read(value[name]) for name, read in table.items()}


def _ident(value: object) -> Ident:
    if type(value) is not str:
        raise ValueError("text")
    return Ident(value)


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("flag")
    return value


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise ValueError("integer")
    return value


def _one_of(kind: type[_E]) -> Callable[[object], _E]:
    def read(value: object) -> _E:
        if type(value) is not str:
            raise ValueError("word")
        return kind(value)

    return read


def _bytes(*sizes: int, at_most: int = 0) -> Callable[[object], bytes]:
    def read(value: object) -> bytes:
        if type(value) is not bytes or not (len(value) in sizes or (not sizes and len(value) <= at_most)):
            raise ValueError("bytes")
        return value

    return read


def _sha256(value: object) -> str:
    if type(value) is not str or not _SHA256.fullmatch(value):
        raise ValueError("digest")
    return value


def _optional(read: Callable[[object], _T]) -> Callable[[object], _T | None]:
    return lambda value: None if value is None else read(value)


def _list(read: Callable[[object], _T], at_most: int) -> Callable[[object], tuple[_T, ...]]:
    def read_all(value: object) -> tuple[_T, ...]:
        if not isinstance(value, list) or len(value) > at_most:
            raise ValueError("list")
        return tuple(read(item) for item in value)

    return read_all


def _stages(value: object) -> tuple[tuple[Stage, int], ...]:
    if not isinstance(value, dict) or not value.keys() <= {stage.value for stage in Stage}:
        raise ValueError("stages")
    return tuple((stage, _integer(value[stage.value])) for stage in Stage if stage.value in value)


def _evidence(value: object) -> dict[str, Any]:
    return _map(value, _EVIDENCE)


_STATEMENT: Mapping[str, _Read] = {
    "agent": _ident,
    "mode": _one_of(Mode),
    "not_held": _list(_one_of(NotHeld), len(NotHeld)),
    "simulated": _flag,
    "tee": _one_of(Tee),
    "interface": _ident,
    "config_digest": _bytes(0, 32, 48, 64),
    "request_id": _ident,
    "policy_version": _ident,
    "evidence_digest": _optional(_bytes(DIGEST_BYTES)),
    "token_digest": _bytes(DIGEST_BYTES),
    "key_uri": _ident,
    "key_id": _ident,
    "key_version": _integer,
    "lease_s": _optional(_integer),
    "model_name": _ident,
    "model_version": _integer,
    "manifest_digest": _sha256,
    "files": _integer,
    "total_bytes": _integer,
    "files_digest": _bytes(_FILES_BYTES),
    "destination": _one_of(DestinationKind),
    "folder_digest": _optional(_bytes(_FOLDER_BYTES)),
    "server_command_digest": _sha256,
    "gpus": _integer,
    "switches": _integer,
    "gpu_ready": _optional(_one_of(ReadyState)),
}
_RECEIPT: Mapping[str, _Read] = {
    "schema": lambda value: _same(value, SCHEMA),
    "statement": _bytes(at_most=MAX_RECEIPT_BYTES),
    "key": _bytes(at_most=_MAX_KEY_BYTES),
    "evidence": _evidence,
    "rtmr_3": _optional(_bytes(DIGEST_BYTES)),
    "unmeasured": _optional(_one_of(Unsupported)),
    "stages": _stages,
    "made_at": _integer,
}
_EVIDENCE: Mapping[str, _Read] = {
    "report": _bytes(at_most=MAX_QUOTE_BYTES),
    "certificates": _list(_bytes(at_most=MAX_CERTIFICATE_BYTES), MAX_CERTIFICATES),
    "event_log": _bytes(at_most=MAX_EVENT_LOG_BYTES),
}


def _same(value: object, expected: str) -> str:
    if value != expected:
        raise ValueError("schema")
    return expected
