"""The figures of evidence: what it costs to collect on the emulated kernel and drivers, and to verify."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench_artifact import Model

if TYPE_CHECKING:
    from agent.sim.machine import SimulatedMachine

EVIDENCE_RUNS = 50


def collect_snp_gpu_ms(_: Model, __: int) -> dict[str, float]:
    """Of what a boot does between Challenge and Attestation; the emulation's own signatures are in it."""
    import pytest

    from agent.evidence import Nonce, ReportData, RuntimeData
    from agent.evidence.collect import check_measured, open_devices
    from agent.evidence.cpu import Distance
    from agent.evidence.gate import ExpectedReady
    from agent.evidence.tsm import TsmSnp

    with silicon_machine() as machine, tempfile.TemporaryDirectory() as folder, ExitStack() as undo:
        from tests import nvml_emulation
        from tests.fake_configfs import fake_configfs

        firmware = machine.attester()
        try:
            fake = undo.enter_context(fake_configfs(Path(folder), lambda data, _: firmware.collect(ReportData(data)).report))
            driver = undo.enter_context(nvml_emulation.answered(machine, nvml_emulation.build(machine.directory)))
        except pytest.skip.Exception as reason:
            print(f"skipped: {reason}")
            return {}
        attester = TsmSnp(fake.root, distance=Distance(pause=lambda _: True))
        devices = open_devices(
            check_measured(attester, machine.host_data),
            driver.gpu_system(),
            machine.runtime(),
            gpu_count=1,
            expected_ready=ExpectedReady.UNSET,
            manifest_digest="sha256:" + "0" * 64,
            server_command_digest="sha256:" + "0" * 64,
        )
        data = RuntimeData(Nonce(bytes(32)), bytes(32), bytes(32))
        return {"collect_snp_gpu_ms": median_ms(lambda: devices.collect(data))}


def verify_ms(_: Model, __: int) -> dict[str, float]:
    from cryptography import x509

    from agent.evidence import GpuNonce, ReportData, Tee
    from agent.verify.nvidia import verify_gpu
    from agent.verify.snp import verify_snp
    from agent.verify.tdx import verify_tdx

    now, nonce = datetime.now(UTC), GpuNonce(bytes(32))
    with silicon_machine() as machine:
        roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.iterdir()]
        snp, tdx = (machine.attester(tee).collect(ReportData(bytes(64))) for tee in (Tee.SNP, Tee.TDX))
        (gpu,) = machine.gpu_system().collect(nonce)
        return {
            "verify_snp_ms": median_ms(lambda: verify_snp(snp, roots, [], now), time.thread_time),
            "verify_tdx_ms": median_ms(lambda: verify_tdx(tdx, roots, now), time.thread_time),
            "verify_gpu_ms": median_ms(lambda: verify_gpu(gpu, nonce, roots, now), time.thread_time),
        }


def ppcie_ms(_: Model, __: int) -> dict[str, float]:
    import pytest
    from cryptography import x509

    from agent.evidence import GpuNonce
    from agent.evidence.binding import split
    from agent.evidence.nscq import GpusAndSwitches
    from agent.verify.ppcie import verify_ppcie

    now, nonce = datetime.now(UTC), GpuNonce(bytes(32))
    with silicon_machine(gpus=8, switches=4) as machine, ExitStack() as undo:
        from tests import nscq_emulation, nvml_emulation

        try:
            nvml = undo.enter_context(nvml_emulation.answered(machine, nvml_emulation.build(machine.directory)))
            nscq = undo.enter_context(nscq_emulation.answered(machine, nscq_emulation.build(machine.directory)))
        except pytest.skip.Exception as reason:
            print(f"skipped: {reason}")
            return {}
        system = GpusAndSwitches(nvml.gpu_system(), nscq.switch_system())
        roots = [x509.load_pem_x509_certificate(path.read_bytes()) for path in machine.roots_dir.iterdir()]
        gpus, switches = split(system.collect(nonce))
        return {
            "collect_ppcie_ms": median_ms(lambda: system.collect(nonce)),
            "verify_ppcie_ms": median_ms(lambda: verify_ppcie(gpus, switches, nonce, roots, now), time.thread_time),
        }


@contextmanager
def silicon_machine(gpus: int = 1, switches: int = 0) -> Iterator["SimulatedMachine"]:
    from agent.sim.machine import SimulatedMachine

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        yield SimulatedMachine.create(Path(folder, "machine"), gpus=gpus, switches=switches)


def median_ms(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    times = []
    for _ in range(EVIDENCE_RUNS):
        began = clock()
        work()
        times.append((clock() - began) * 1000)
    return statistics.median(times)
