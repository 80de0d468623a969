"""Simulated silicon of NVIDIA's: names that nobody can mistake, private keys, and devices that differ."""

import dataclasses
import stat
from pathlib import Path

import pytest
from cryptography import x509

from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, GpuReport, firmware_digests, parse_report
from agent.sim.gpu_silicon import create_gpu_silicon, hand_out, read_chain, read_pdi
from agent.verify.nvidia import parse_chain, verify_report_signature
from tests.gpus import NONCE

DEVICES = ("gpu-0", "gpu-1", "gpu-2", "switch-0", "switch-1")
REPORT = GpuReport(NONCE, firmware_digests([bytes(48)]), bytes(32), (), bytes(96))


@pytest.fixture
def silicon(tmp_path: Path) -> Path:
    create_gpu_silicon(tmp_path, 3, switches=2)
    return tmp_path


def test_every_name_in_the_chain_says_simulated(silicon: Path) -> None:
    for device in DEVICES:
        chain = read_chain(silicon, device)
        names = [each.subject.rfc4514_string() for each in x509.load_pem_x509_certificates(chain)]
        assert len(names) == 5
        assert all("SIMULATED" in name for name in names)
        assert len(chain) <= MAX_CHAIN_BYTES


def test_keys_are_private_and_the_root_is_where_a_broker_looks_for_it(silicon: Path) -> None:
    root = x509.load_pem_x509_certificate((silicon / "nvidia-root.pem").read_bytes())
    for device in DEVICES:
        assert stat.S_IMODE((silicon / f"{device}.key").stat().st_mode) == 0o600
        assert x509.load_pem_x509_certificates(read_chain(silicon, device))[-1] == root


def test_no_two_devices_share_a_key_or_a_name(silicon: Path) -> None:
    assert len({parse_chain(read_chain(silicon, device)).leaf_key_sha256 for device in DEVICES}) == len(DEVICES)
    assert len({read_pdi(silicon, device) for device in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("device", ["gpu-1", "switch-1"])
def test_what_a_device_hands_out_is_signed_by_its_key_unless_spoilt(silicon: Path, device: str) -> None:
    chain = parse_chain(read_chain(silicon, device))
    good = hand_out(silicon, device, lambda: REPORT, flip=False, trailing=True)
    verify_report_signature(parse_report(good), chain)
    assert dataclasses.replace(parse_report(good), signature=bytes(96)) == dataclasses.replace(REPORT, trailing_bytes=1)
    flipped = parse_report(hand_out(silicon, device, lambda: REPORT, flip=True, trailing=False))
    with pytest.raises(Exception, match="report-signature"):
        verify_report_signature(flipped, chain)


def test_a_recorded_report_is_handed_out_as_it_is(silicon: Path) -> None:
    (silicon / "switch-0.report").write_bytes(b"recorded")
    assert hand_out(silicon, "switch-0", lambda: REPORT, flip=True, trailing=True) == b"recorded"
