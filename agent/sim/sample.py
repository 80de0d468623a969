"""Trustee's sample evidence: what anybody can write, for a first try against a KBS that accepts it.

Carries the report data and nothing else: no measurement, no signature, no secret. Trustee's default policy denies it.
"""

from agent.closed import Ident
from agent.errors import DeviceError
from agent.evidence import Evidence, ReportData, Tee
from agent.sim.machine import SimulatedMachine

DIGEST_BYTES = 48
"""Of SHA-384; Trustee's sample verifier compares it without the padding of other TEEs."""


class Sample:
    """The `Attester` of a simulated machine without a TEE."""

    tee = Tee.SAMPLE
    interface = Ident("sample")

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def collect(self, report_data: ReportData) -> Evidence:
        """See `Attester.collect`."""
        if self._machine.errno is not None:
            raise DeviceError(self.interface, Ident("collect"), self._machine.errno)
        return Evidence(Tee.SAMPLE, report_data[:DIGEST_BYTES])

    def launch_digest(self) -> bytes:
        """See `Attester.launch_digest`."""
        return self._machine.host_data
