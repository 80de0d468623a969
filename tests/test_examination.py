"""The rules of an examination, whatever its checks."""

from pathlib import Path

from agent.commands.run import open_gpus, open_tee
from agent.config_source import FoundConfig
from agent.doctor import CHECKS
from agent.errors import GpuCountError, InternalError, NoAttesterError, VmRestartRequiredError
from agent.examination import Finding, Guest, Skip, examine, exit_status
from tests.children import in_child


def test_the_status_is_that_of_the_first_failure_in_boot_order() -> None:
    ok, skipped = Finding("hardening"), Finding("gpu", skipped=Skip.NO_GPU)
    assert exit_status([]) == exit_status([ok, skipped]) == 0
    failed = [Finding("gpu-inventory", error=GpuCountError(2, 1)), Finding("gpu-faults", error=VmRestartRequiredError())]
    assert exit_status([ok, *failed]) == 13
    assert exit_status([skipped, *reversed(failed)]) == 31


def test_a_bug_in_one_check_is_told_by_its_place_and_hides_no_other_finding(tmp_path: Path) -> None:
    def broken() -> FoundConfig:
        raise ZeroDivisionError("secret")

    def findings() -> list[dict[str, object]]:
        return [finding.to_record() for finding in examine(Guest(broken, open_tee, open_gpus, offline=True), CHECKS)]

    found = in_child(findings)
    assert [finding["check"] for finding in found] == list(CHECKS)
    errors = {finding["check"]: finding["error"] for finding in found if "error" in finding}
    assert {name: error["class"] for name, error in errors.items()} == {  # type: ignore[index]
        "configuration": InternalError.__name__,
        "tee": NoAttesterError.__name__,
    }
    assert "secret" not in str(errors)
