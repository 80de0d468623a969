"""One JSON object a line, whole or not at all, and nothing in it but closed values."""

import json
import os
import resource
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.broker.audit import AuditLog, AuditRecord, AuditStep, Decision, timestamp
from agent.closed import Ident
from agent.errors import BrokerFailureError

RECORD = AuditRecord(
    time=timestamp(datetime(2026, 11, 22, 12, 0, 0, 5999, tzinfo=UTC)),
    step=AuditStep.ATTEST,
    decision=Decision.DENIED,
    request_id=Ident("boot-1"),
    key_id=Ident("models/tiny/1"),
    policy_version=Ident("2026-11-22"),
    reference_value_ids=(Ident("image-1"), Ident("config-1")),
    simulated=True,
)


def test_a_line_holds_every_field_with_its_plain_value() -> None:
    line = RECORD.line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {
        "time": "2026-11-22T12:00:00.005Z",
        "step": "attest",
        "decision": "denied",
        "request_id": "boot-1",
        "key_id": "models/tiny/1",
        "policy_version": "2026-11-22",
        "release_channel": None,
        "tee": None,
        "measurement": None,
        "host_data": None,
        "chip_id_hash": None,
        "reference_value_ids": ["image-1", "config-1"],
        "reason": None,
        "claim": None,
        "reference_value_id": None,
        "key_version": None,
        "nonce": None,
        "simulated": True,
    }


@pytest.mark.parametrize("field", ["request_id", "reason", "reference_value_ids"])
def test_free_text_cannot_get_into_a_record(field: str) -> None:
    text = "a plain string"
    values = {name: getattr(RECORD, name) for name in RECORD.__dataclass_fields__}
    with pytest.raises(TypeError):
        AuditRecord(**values | {field: (text,) if field.endswith("ids") else text})


def test_the_file_is_its_owners_alone_and_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    for _ in range(2):
        log = AuditLog(path)
        log.append(RECORD)
        log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == RECORD.line() * 2


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")

    def append_ten() -> None:
        for _ in range(10):
            log.append(RECORD)

    threads = [threading.Thread(target=append_ten) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "audit").read_bytes() == RECORD.line() * 40


def test_a_pipe_can_take_the_lines_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    AuditLog(tmp_path / "pipe").append(RECORD)
    assert os.read(reader, 1 << 16) == RECORD.line()


def test_after_a_rotation_the_next_line_is_in_the_new_file(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append(RECORD)
    (tmp_path / "audit").rename(tmp_path / "audit.1")
    log.reopen()
    log.append(RECORD)
    assert (tmp_path / "audit.1").read_bytes() == (tmp_path / "audit").read_bytes() == RECORD.line()


def test_a_line_that_cannot_be_written_is_a_failure() -> None:
    with pytest.raises(BrokerFailureError) as caught:
        AuditLog(Path("/dev/full")).append(RECORD)
    assert caught.value.reason == "AUDIT_LOG"


def test_a_torn_line_is_a_failure_and_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(BrokerFailureError):
            log.append(RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append(RECORD)
    assert (tmp_path / "audit").read_bytes() == RECORD.line()[:100] + b"\n" + RECORD.line()
