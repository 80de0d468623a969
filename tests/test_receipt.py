"""Receipts: bytes as RFC 9052 and RECEIPT.md want them, and every defect refused for what it is."""

import dataclasses
import enum
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from agent import cose, receipt
from agent.artifact import DestinationKind, LoadedFile
from agent.closed import Ident
from agent.errors import ReceiptError, ReceiptProblem
from agent.events import Stage
from agent.evidence import Evidence, Tee, Unsupported
from agent.modes import Mode, Unheld
from agent.receipt import (
    NotHeld,
    ReadyState,
    Receipt,
    Statement,
    digest_of_files,
    parse_receipt,
    report_data,
    sign_receipt,
)
from agent.report import MAX_RECEIPT_BYTES

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
FILES = (LoadedFile("b/weights", 3), LoadedFile("a", 1))
STATEMENT = Statement(
    agent=Ident("0.1.0"),
    mode=Mode.LOAD,
    not_held=(NotHeld.GATE, NotHeld.SERVER),
    simulated=False,
    tee=Tee.SNP,
    interface=Ident("api-server-rest"),
    config_digest=b"c" * 32,
    request_id=Ident("r1"),
    policy_version=Ident("7"),
    evidence_digest=b"e" * 48,
    token_digest=b"t" * 48,
    key_uri=Ident("kbs:///models/tiny/1"),
    key_id=Ident("k1"),
    key_version=2,
    lease_s=None,
    model_name=Ident("tiny"),
    model_version=3,
    manifest_digest="sha256:" + "5a" * 32,
    files=2,
    total_bytes=4,
    files_digest=digest_of_files(FILES),
    destination=DestinationKind.DIRECTORY,
    folder_digest=b"f" * 32,
    server_command_digest="sha256:" + "a5" * 32,
    gpus=1,
    switches=0,
    gpu_ready=ReadyState.PRESET,
)
RECEIPT = Receipt(
    statement=STATEMENT,
    key=cose.spki(KEY.public_key()),
    evidence=Evidence(Tee.SNP, b"r" * 1184, (b"leaf", b"root")),
    rtmr_3=None,
    unmeasured=Unsupported.NO_REGISTER,
    stages=((Stage.CONFIG, 1), (Stage.LOAD, 200)),
    made_at=1_800_000_000,
)


def test_what_is_signed_is_read_again() -> None:
    signed = sign_receipt(RECEIPT, KEY)
    assert parse_receipt(signed) == RECEIPT
    assert len(signed) < 4 << 10


def test_no_byte_of_a_receipt_can_be_another() -> None:
    signed = sign_receipt(RECEIPT, KEY)
    for at in range(len(signed)):
        with pytest.raises(ReceiptError):
            parse_receipt(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :])


def test_the_signature_is_that_of_rfc_9052() -> None:
    """Sig_structure put together by hand, with no COSE library of ours in between."""
    signed = sign_receipt(RECEIPT, KEY)
    protected = b"\xa2\x01\x26\x04\x58\x20" + hashlib.sha256(RECEIPT.key).digest()
    assert signed.startswith(b"\xd2\x84\x58\x26" + protected + b"\xa0\x59")
    payload_bytes = int.from_bytes(signed[2 + 2 + 38 + 2 : 2 + 2 + 38 + 4])
    start = 2 + 2 + 38 + 4
    payload, rest = signed[start : start + payload_bytes], signed[start + payload_bytes :]
    assert rest[:2] == b"\x58\x40"
    r, s = int.from_bytes(rest[2:34]), int.from_bytes(rest[34:])
    structure = b"\x84\x6aSignature1\x58\x26" + protected + b"\x40\x59" + payload_bytes.to_bytes(2) + payload
    KEY.public_key().verify(encode_dss_signature(r, s), structure, ec.ECDSA(hashes.SHA256()))


def test_the_statement_is_a_map_of_sorted_text_keys() -> None:
    packed = STATEMENT.pack()
    members = cbor2.loads(packed)
    assert list(members) == sorted(members, key=lambda key: (len(key), key))
    assert packed.startswith(b"\xb8\x1b\x63tee\x63snp")
    assert members["not_held"] == ["gate", "server"]
    assert STATEMENT.digest() == hashlib.sha384(packed).digest()


def test_report_data_covers_key_and_statement_and_begins_with_a_label() -> None:
    preimage = b"\x83\x76keyturn/v1/receipt-key\x58\x5b" + RECEIPT.key + b"\x58\x30" + STATEMENT.digest()
    assert RECEIPT.report_data() == hashlib.sha384(preimage).digest() + bytes(16)
    assert report_data(RECEIPT.key, bytes(48)) != RECEIPT.report_data()


def test_the_files_digest_is_over_paths_and_sizes_in_the_order_of_utf_8() -> None:
    assert digest_of_files(FILES) == digest_of_files(FILES[::-1])
    assert digest_of_files(FILES) == hashlib.sha256(b"\x82\x82\x61a\x01\x82\x69b/weights\x03").digest()
    assert digest_of_files([LoadedFile("a", 2)]) != digest_of_files([LoadedFile("a", 1)])


def test_what_a_mode_does_not_hold_has_its_word_in_receipts() -> None:
    assert [item.value for item in NotHeld][: len(Unheld)] == [promise.label for promise in Unheld]


def test_the_document_names_every_member_and_every_word() -> None:
    text = (Path(__file__).resolve().parents[1] / "protos" / "RECEIPT.md").read_text()
    _, payload, statement = re.split(r"^\| member \| type \| \|$", text, flags=re.MULTILINE)
    members = payload_of(sign_receipt(RECEIPT, KEY))

    def named(table: str) -> list[str]:
        rows = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
        return [name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)]

    assert set(named(payload)) == members.keys()
    assert named(statement) == [field.name for field in dataclasses.fields(Statement)]
    (row,) = [row for row in statement.splitlines() if row.startswith("| `not_held`")]
    assert re.findall(r"`([a-z-]+)`", row) == [item.value for item in NotHeld]
    (row,) = [row for row in payload.splitlines() if row.startswith("| `unmeasured`")]
    assert set(re.findall(r"`([a-z-]+)`", row)) - {"unmeasured"} == {item.value for item in Unsupported}
    assert "keyturn/v1/receipt-key" in text


# --- defects ----------------------------------------------------------------------------------------------------------


def signed_payload(payload: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    return cose.sign(payload, key)


def payload_of(signed: bytes) -> dict[str, Any]:
    found = cbor2.loads(cbor2.loads(signed).value[2])
    assert isinstance(found, dict)
    return found


def with_member(name: str, value: object) -> bytes:
    """A receipt, signed by its key, with another value for one member; `statement.x` is one of the statement."""
    payload = payload_of(sign_receipt(RECEIPT, KEY))
    outer, _, inner = name.partition(".")
    if outer == "statement" and inner:
        members = cbor2.loads(payload["statement"])
        members[inner] = value
        payload["statement"] = cbor2.dumps(members, canonical=True)
    elif inner:
        payload[outer][inner] = value
    else:
        payload[outer] = value
    return signed_payload(cbor2.dumps(payload, canonical=True))


def raw_ecdsa(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    r, s = decode_dss_signature(key.sign(payload, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


class Odd(enum.Enum):
    """Values that no member has."""

    NOTHING = None
    TEXT = "a sentence with spaces"
    NUMBER = -1
    BYTES = b"\0"
    LIST = ("x",)
    TOO_MUCH = 1 << 60
    TRUE = True


MEMBERS = [
    *(f"statement.{field.name}" for field in dataclasses.fields(Statement)),
    *("schema", "statement", "key", "evidence", "rtmr_3", "unmeasured", "stages", "made_at"),
    *("evidence.report", "evidence.certificates", "evidence.event_log"),
]
ALLOWED = {
    *((f"statement.{name}", Odd.NOTHING) for name in ("evidence_digest", "lease_s", "folder_digest", "gpu_ready")),
    *((name, Odd.NOTHING) for name in ("rtmr_3", "unmeasured")),
    ("statement.simulated", Odd.TRUE),
    ("evidence.report", Odd.BYTES),
    ("evidence.event_log", Odd.BYTES),
}


@pytest.mark.parametrize("odd", Odd)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_of_another_type_is_malformed(member: str, odd: Odd) -> None:
    value = list(odd.value) if isinstance(odd.value, tuple) else odd.value
    data = with_member(member, value)
    if (member, odd) in ALLOWED:
        assert parse_receipt(data)
        return
    with pytest.raises(ReceiptError) as caught:
        parse_receipt(data)
    assert caught.value.problem is ReceiptProblem.MALFORMED


def one_more(members: dict[str, Any]) -> dict[str, Any]:
    return members | {"more": 1}


def one_less(members: dict[str, Any]) -> dict[str, Any]:
    return {name: members[name] for name in sorted(members)[1:]}


@pytest.mark.parametrize("change", [one_more, one_less])
@pytest.mark.parametrize("where", ["", "statement", "evidence"])
def test_a_member_more_or_less_is_malformed(where: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    payload = payload_of(sign_receipt(RECEIPT, KEY))
    match where:
        case "statement":
            payload["statement"] = cbor2.dumps(change(cbor2.loads(payload["statement"])), canonical=True)
        case "evidence":
            payload["evidence"] = change(payload["evidence"])
        case _:
            payload = change(payload)
    with pytest.raises(ReceiptError) as caught:
        parse_receipt(signed_payload(cbor2.dumps(payload, canonical=True)))
    assert caught.value.problem is ReceiptProblem.MALFORMED


def _swapped_key() -> bytes:
    """Another key's signature over a receipt that names the first one."""
    return signed_payload(cbor2.loads(sign_receipt(RECEIPT, KEY)).value[2], OTHER)


def _parts(**changes: Any) -> bytes:
    protected, unprotected, payload, signature = cbor2.loads(sign_receipt(RECEIPT, KEY)).value
    parts = {"protected": protected, "unprotected": unprotected, "payload": payload, "signature": signature} | changes
    return cbor2.dumps(cbor2.CBORTag(18, list(parts.values())), canonical=True)


def _headed(header: dict[Any, Any]) -> bytes:
    """Another header, and the key's signature over it."""
    protected, payload = cbor2.dumps(header, canonical=True), RECEIPT.pack()
    structure = cbor2.dumps(["Signature1", protected, b"", payload], canonical=True)
    return _parts(protected=protected, payload=payload, signature=raw_ecdsa(structure, KEY))


def _of_key(key: cose.PrivateKey) -> bytes:
    return cose.sign(dataclasses.replace(RECEIPT, key=cose.spki(key.public_key())).pack(), key)


def _compressed() -> bytes:
    """The same key, in the shorter of its two encodings."""
    numbers = KEY.public_key()
    short = numbers.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    return b"\x30\x39\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x22\x00" + short


DEFECTS: dict[str, tuple[Callable[[], bytes], ReceiptProblem]] = {
    "another key's signature": (_swapped_key, ReceiptProblem.SIGNATURE),
    "a key id of another key": (lambda: _headed({1: -7, 4: cose.key_id(OTHER.public_key())}), ReceiptProblem.SIGNATURE),
    "another algorithm": (lambda: _headed({1: -35, 4: cose.key_id(KEY.public_key())}), ReceiptProblem.SIGNATURE),
    "a signature of zeros": (lambda: _parts(signature=bytes(64)), ReceiptProblem.SIGNATURE),
    "a signature without its structure": (
        lambda: _parts(signature=raw_ecdsa(cbor2.loads(sign_receipt(RECEIPT, KEY)).value[2], KEY)),
        ReceiptProblem.SIGNATURE,
    ),
    "an unprotected header": (lambda: _parts(unprotected={1: -7}), ReceiptProblem.MALFORMED),
    "a key of another curve": (lambda: _of_key(ec.generate_private_key(ec.SECP384R1())), ReceiptProblem.MALFORMED),
    "a key of another kind": (lambda: _of_key(ed25519.Ed25519PrivateKey.generate()), ReceiptProblem.MALFORMED),
    "a key in another form": (lambda: with_member("key", _compressed()), ReceiptProblem.MALFORMED),
    "another schema": (lambda: with_member("schema", "keyturn/v2/receipt"), ReceiptProblem.MALFORMED),
    "no files": (lambda: with_member("statement.files", 0), ReceiptProblem.MALFORMED),
    "not held in another order": (
        lambda: with_member("statement.not_held", ["server", "gate"]),
        ReceiptProblem.MALFORMED,
    ),
    "not held twice": (lambda: with_member("statement.not_held", ["gate"] * 2), ReceiptProblem.MALFORMED),
    "measured and not measured": (lambda: with_member("rtmr_3", bytes(48)), ReceiptProblem.MALFORMED),
    "a longer way to say so": (
        lambda: signed_payload(b"\xb8\x08" + cbor2.loads(sign_receipt(RECEIPT, KEY)).value[2][1:]),
        ReceiptProblem.MALFORMED,
    ),
    "a longer way to state so": (
        lambda: with_member("statement", STATEMENT.pack().replace(b"\x65files\x02", b"\x65files\x18\x02")),
        ReceiptProblem.MALFORMED,
    ),
    "sample evidence that calls itself genuine": (lambda: with_member("statement.tee", "sample"), ReceiptProblem.MALFORMED),
    "a stage that is none": (lambda: with_member("stages", {"lunch": 1}), ReceiptProblem.MALFORMED),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_receipt_with_one_defect_is_refused_for_it(defect: str) -> None:
    make, problem = DEFECTS[defect]
    with pytest.raises(ReceiptError) as caught:
        parse_receipt(make())
    assert caught.value.problem is problem


def _as_a_set() -> bytes:
    """The same four parts, which Python unpacks from a set in any order."""
    parts = [cbor2.dumps(part, canonical=True) for part in cbor2.loads(sign_receipt(RECEIPT, KEY)).value]
    return b"\xd2\xd9\x01\x02\x84" + b"".join(sorted(parts, key=lambda part: (len(bytes(part)), bytes(part))))


@pytest.mark.parametrize("key", [True, 1.0])
def test_what_python_takes_for_the_same_is_malformed(key: object) -> None:
    """True, 1.0 and 1 are one key of a Python map; a set may unpack as an array does. The key signed all of it."""
    for data in (*(_as_a_set() for _ in range(64)), _headed({key: -7, 4: cose.key_id(KEY.public_key())})):
        with pytest.raises(ReceiptError) as caught:
            parse_receipt(data)
        assert caught.value.problem is ReceiptProblem.MALFORMED


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xd2\x84", b"\x81" * 900, bytes(MAX_RECEIPT_BYTES + 1)])
def test_what_is_no_receipt_is_malformed(data: bytes) -> None:
    with pytest.raises(ReceiptError) as caught:
        parse_receipt(data)
    assert caught.value.problem is ReceiptProblem.MALFORMED


def test_a_receipt_that_nobody_could_read_is_our_bug() -> None:
    with pytest.raises((RuntimeError, ReceiptError)):
        sign_receipt(RECEIPT, OTHER)
    assert receipt.SCHEMA == "keyturn/v1/receipt"
