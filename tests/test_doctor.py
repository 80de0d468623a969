"""The rules of the examination; what each check finds is `test_commands_doctor.py`."""

from pathlib import Path

from agent.closed import Ident
from agent.commands.run import open_gpus, open_runtime, open_tee
from agent.config import EXAMPLE, MeasuredConfig
from agent.config_source import FoundConfig
from agent.doctor import CHECKS, Finding, Guest, Skip, examine, exit_status
from agent.errors import GpuCountError, InternalError, NoAttesterError, VmRestartRequiredError
from agent.evidence import Attester, Evidence, ReportData
from agent.sim.machine import SimulatedMachine
from tests.children import in_child


class Counting(Attester):
    """The real one, and how often it was asked."""

    def __init__(self, real: Attester) -> None:
        self._real = real
        self.tee, self.interface = real.tee, real.interface
        self.asked = 0

    def collect(self, report_data: ReportData) -> Evidence:
        self.asked += 1
        return self._real.collect(report_data)

    def launch_digest(self) -> bytes:
        self.asked += 1
        return self._real.launch_digest()


def configured(machine: SimulatedMachine) -> FoundConfig:
    text = EXAMPLE.replace('"snp"', '"simulated-snp"') + f'[simulation]\nmachine = "{machine.directory}"\n'
    return FoundConfig(text.encode(), bytes(32), Ident("file"))


def test_the_status_is_that_of_the_first_failure_in_boot_order() -> None:
    ok, skipped = Finding("hardening"), Finding("gpu", skipped=Skip.NO_GPU)
    assert exit_status([]) == exit_status([ok, skipped]) == 0
    failed = [Finding("gpu-inventory", error=GpuCountError(2, 1)), Finding("gpu-faults", error=VmRestartRequiredError())]
    assert exit_status([ok, *failed]) == 13
    assert exit_status([skipped, *reversed(failed)]) == 31


def test_the_cpu_is_asked_for_one_report(machine: SimulatedMachine) -> None:
    opened: list[Counting] = []

    def open_counting(cfg: MeasuredConfig) -> Attester:
        opened.append(Counting(open_tee(cfg)))
        return opened[-1]

    def asked() -> int:
        findings = list(examine(Guest(lambda: configured(machine), open_counting, open_gpus, open_runtime, offline=True)))
        assert next(finding for finding in findings if finding.check == "host-data") == Finding("host-data")
        return sum(attester.asked for attester in opened)

    assert in_child(asked) == 1


def test_a_bug_in_one_check_is_told_by_its_place_and_hides_no_other_finding(tmp_path: Path) -> None:
    def broken() -> FoundConfig:
        raise ZeroDivisionError("secret")

    def findings() -> list[dict[str, object]]:
        return [finding.to_record() for finding in examine(Guest(broken, open_tee, open_gpus, open_runtime, offline=True))]

    found = in_child(findings)
    assert [finding["check"] for finding in found] == list(CHECKS)
    errors = {finding["check"]: finding["error"] for finding in found if "error" in finding}
    assert {name: error["class"] for name, error in errors.items()} == {  # type: ignore[index]
        "configuration": InternalError.__name__,
        "tee": NoAttesterError.__name__,
    }
    assert "secret" not in str(errors)
