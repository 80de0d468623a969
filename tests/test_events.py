import dataclasses
import json

import pytest

from agent.closed import Ident
from agent.errors import GpuCountError
from agent.events import Stage, StageEnded, VerdictAccepted, all_events, message_from_record, message_to_record


def test_names_and_fields_of_events_are_frozen() -> None:
    assert {name: [field.name for field in dataclasses.fields(event)] for name, event in all_events().items()} == {
        "boot_started": ["version", "mode"],
        "config_found": ["source"],
        "waiting_for": ["what", "at_most_s"],
        "attester_opened": ["tee", "interface"],
        "local_checks_passed": [],
        "worker_ended": ["peak_kib"],
        "stage_started": ["stage"],
        "stage_ended": ["stage", "ms", "bytes"],
        "stage_failed": ["stage", "ms"],
        "progress": ["stage", "done_bytes", "total_bytes", "bytes_per_s", "eta_s"],
        "requested": ["request_id", "attempt"],
        "retrying": ["attempt", "wait_ms", "error"],
        "verdict_accepted": ["request_id", "key_uri", "policy_version", "simulated", "lease_s"],
        "not_affirmed": ["finding"],
        "lease_started": ["lease_s", "ends_at"],
        "lease_renewal_started": [],
        "lease_renewed": ["lease_s", "ends_at"],
        "lease_renewal_failed": ["error", "retry_in_ms"],
        "release_measured": ["rtmr_3", "unsupported"],
        "gate_passed": ["gpus", "preset", "switches"],
        "gpu_watch_lost": ["status", "signal"],
        "receipt_signed": ["sha256", "key_sha256", "bytes"],
        "destination_chosen": ["kind", "bytes", "noswap", "swap_active"],
        "server_started": ["pid", "start", "own_uid", "landlock"],
        "server_output_inherited": [],
        "server_ready": ["ms", "start"],
        "model_released": ["files"],
        "server_ended": ["status", "signal", "output_bytes"],
        "server_restarting": ["wait_ms", "start"],
        "model_left": ["version"],
        "receipt_checked": ["sha256", "version", "files", "same_guest", "simulated"],
        "stopping": ["signal", "waiting_for"],
        "status_unwritable": ["code"],
        "lines_lost": ["lines"],
        "wiped": [],
        "stopped": ["exit_status"],
        "exception_unhandled": ["hook", "place"],
    }


def test_the_stages_are_frozen() -> None:
    stages = "config devices network identify prepare attest release-credentials release-key measure secure unwrap load"
    assert [stage.value for stage in Stage] == [*stages.split(), "receipt", "publish", "server"]


@pytest.mark.parametrize(
    "message",
    [
        StageEnded(Stage.LOAD, 12, 1 << 30),
        VerdictAccepted(Ident("r1"), Ident("kbs:///a/b/c"), Ident("7"), True, None),
    ],
)
def test_an_event_survives_the_way_through_json(message: StageEnded | VerdictAccepted) -> None:
    assert message_from_record(json.loads(json.dumps(message_to_record(message)))) == message


def test_an_error_is_the_event_failed() -> None:
    record = message_to_record(GpuCountError(2, 1))
    assert (record["event"], record["class"], record["exit_status"]) == ("failed", "GpuCountError", 13)
    assert str(message_from_record(record)) == str(GpuCountError(2, 1))


@pytest.mark.parametrize(
    "record", [{}, {"event": []}, {"event": "shouted"}, {"event": "wiped", "text": "free"}, {"event": "failed"}]
)
def test_what_is_no_message_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        message_from_record(record)
