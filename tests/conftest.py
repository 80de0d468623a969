"""Simulated silicon for every test, so that a plain clone without recorded evidence tests the same verifiers."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.sim.machine import SimulatedMachine, create_silicon
from tests import nscq_emulation, nvml_emulation
from tests.gpus import gpu_machine
from tests.products import build

# gRPC restarts its poller in whatever a test forks. Between fork and exec that thread meets closed descriptors, and says so on
# what is already the child's stderr, among its JSON lines. Nothing of ours uses gRPC on both sides of a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("emulation", "hardware"), default="emulation", help="what tests/test_devices.py drives"
    )
    parser.addoption("--kills", type=int, default=20, help="random kills in the kill matrix")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))  # every process of one run draws the same
    parser.addoption("--kill-seed", default=run, help="what they are drawn from")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On hardware only what is marked for it runs. Simulated machines are refused there anyway."""
    if config.getoption("--device") == "hardware":
        for item in items:
            if item.get_closest_marker("hardware") is None:
                item.add_marker(pytest.mark.skip(reason="needs an emulation's knobs: hardware has none"))


@pytest.fixture(scope="session")
def hardware(request: pytest.FixtureRequest) -> bool:
    """Is it this guest's own devices that are to be tested?"""
    return bool(request.config.getoption("--device") == "hardware")


@pytest.fixture(scope="session")
def silicon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and roots of simulated vendors, eight GPUs and four NVSwitches. Once per session: two RSA-4096 keys take seconds."""
    directory = tmp_path_factory.mktemp("silicon")
    create_silicon(directory, gpus=8, switches=4)
    return directory


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with everything that is shipped, built quickly, and once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "products"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "SHA256SUMS").exists():  # written last
            build(out)
    return out


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that stands for the driver's, compiled; a skip without a compiler."""
    return nvml_emulation.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(params=["in this process", "as a library"])
def gpus(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SimulatedMachine]:
    """Two GPUs and no CPU TEE; pynvml drives the simulator itself, or a `libnvidia-ml.so.1` before it."""
    machine = gpu_machine(tmp_path / "machine")
    if request.param == "in this process":
        yield machine
    else:
        with nvml_emulation.answered(machine, request.getfixturevalue("nvml_library")) as reached:
            yield reached


@pytest.fixture(scope="session")
def nscq_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise for the NVSwitches."""
    return nscq_emulation.build(tmp_path_factory.mktemp("nscq"))


@pytest.fixture(params=["in this process", "as a library"])
def switched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SimulatedMachine]:
    """Eight GPUs and four NVSwitches, no CPU TEE; the NVSwitches as `gpus` has the GPUs."""
    machine = gpu_machine(tmp_path / "machine", 8, switches=4)
    if request.param == "in this process":
        yield machine
    else:
        with nscq_emulation.answered(machine, request.getfixturevalue("nscq_library")) as reached:
            yield reached


@pytest.fixture
def machine(silicon: Path, tmp_path: Path) -> SimulatedMachine:
    """A fresh simulated machine with one GPU."""
    return SimulatedMachine.create(tmp_path / "machine", silicon=silicon)
