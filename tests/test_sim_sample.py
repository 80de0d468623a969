"""Sample evidence: it carries what it is asked to and nothing else."""

from pathlib import Path

import pytest

from agent.errors import DeviceError
from agent.evidence import ReportData, Tee
from agent.sim.machine import SimulatedMachine
from agent.sim.sample import Sample


def test_sample_evidence_is_the_digest_and_the_machine_knows_its_configuration(tmp_path: Path) -> None:
    machine = SimulatedMachine.create(tmp_path / "m", gpus=0, host_data=bytes(range(32)))
    attester = machine.attester(Tee.SAMPLE)
    assert isinstance(attester, Sample)
    evidence = attester.collect(ReportData(bytes(range(64))))
    assert (evidence.tee, evidence.report, evidence.cert_chain) == (Tee.SAMPLE, bytes(range(48)), ())
    assert attester.launch_digest() == bytes(range(32))

    machine.errno = 5
    with pytest.raises(DeviceError):
        attester.collect(ReportData(bytes(64)))
