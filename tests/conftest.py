"""Simulated silicon for every test, so that a plain clone without recorded evidence tests the same verifiers."""

import os
from pathlib import Path

import pytest

from agent.sim.machine import SimulatedMachine, create_silicon

# gRPC restarts its poller in whatever a test forks. Between fork and exec that thread meets closed descriptors, and says so on
# what is already the child's stderr, among its JSON lines. Nothing of ours uses gRPC on both sides of a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="random kills in the kill matrix")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))  # every process of one run draws the same
    parser.addoption("--kill-seed", default=run, help="what they are drawn from")


@pytest.fixture(scope="session")
def silicon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and roots of simulated vendors, with eight GPUs. Once per session: two RSA-4096 keys take seconds."""
    directory = tmp_path_factory.mktemp("silicon")
    create_silicon(directory, gpus=8)
    return directory


@pytest.fixture
def machine(silicon: Path, tmp_path: Path) -> SimulatedMachine:
    """A fresh simulated machine with one GPU."""
    return SimulatedMachine.create(tmp_path / "machine", silicon=silicon)
