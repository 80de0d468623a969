"""The binding against Trustee's vectors, and the strictness of the device Evidence text."""

import dataclasses
import doctest
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence import GpuEvidence, Nonce, RuntimeData, binding
from agent.evidence.binding import (
    MAX_GPUS,
    MAX_SWITCHES,
    KeyturnClaims,
    additional_evidence,
    device_nonce,
    parse_additional_evidence,
    report_data,
    split,
)
from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, MAX_REPORT_BYTES
from agent.handshake import MAX_ADDITIONAL_EVIDENCE_BYTES, MAX_MESSAGE_BYTES
from agent.jose import pack_b64, parse_b64, parse_b64url
from tests.gpus import recorded
from tests.shared import shared_data

DIGEST = "sha256:" + "ab" * 32
CLAIMS = KeyturnClaims(1, 2, 0, 0, False, False, "580.65.06", DIGEST, DIGEST)
GPU = GpuEvidence("HOPPER", "GPU-12345678-1234-1234-1234-123456789abc", b"\x11\xe0report", b"-----BEGIN CERTIFICATE-----\n")
DATA = RuntimeData(
    Nonce(bytes(range(32))),
    parse_b64url("0zatRESlJ3iMt2PGOfkYbVHL6QsCcu-DWrRVyey8w7M"),
    parse_b64url("JCyYqjwxEvbb_Yylz5dvtSlF6BKjy2TRHlcfsdvCESk"),
)


def refused(text: str) -> str:
    with pytest.raises(MalformedEvidenceError) as raised:
        parse_additional_evidence(text)
    assert raised.value.format is EvidenceFormat.ADDITIONAL
    return str(raised.value.field)


def changed(change: object) -> str:
    value = json.loads(additional_evidence((GPU,), CLAIMS))
    change(value["nvidia"])  # type: ignore[operator]
    return json.dumps(value)


def listed(architectures: list[str]) -> list[dict[str, str]]:
    """Devices of these architectures, in Trustee's JSON."""
    devices = tuple(device_of(arch, number) for number, arch in enumerate(architectures))
    return [
        {
            "arch": each.arch,
            "uuid": each.uuid,
            "evidence": pack_b64(each.report),
            "certificate": pack_b64(each.certificate_chain),
        }
        for each in devices
    ]


def device_of(arch: str, number: int, report_bytes: int = 1, chain_bytes: int = 1) -> GpuEvidence:
    return GpuEvidence(arch, f"{'SWX' if arch == 'LS10' else 'GPU'}-{number}", bytes(report_bytes), bytes(chain_bytes))


def test_the_docstring_example_runs() -> None:
    assert doctest.testmod(binding).failed == 0


def test_the_worked_example_of_handshake_md_holds() -> None:
    assert report_data(DATA, "").hex() == (
        "553ff08ac566624014ea20e36edecfb3a9e0b79a3e5f3f2e6fa3416fc177be9db529020d968bbcd8dc38219439048a2b" + "00" * 16
    )
    assert device_nonce(DATA).hex() == "eb7a099de7825807e562c58a74a87f197fa03810c74f13f14f3792f0f4725d02"


def test_trustees_vectors_hold() -> None:
    cases = json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_text())["report_data"]
    assert cases
    for case in cases:
        wire, key = case["runtime_data"], case["runtime_data"]["tee-pubkey"]
        data = RuntimeData(Nonce(parse_b64(wire["nonce"])), parse_b64url(key["x"]), parse_b64url(key["y"]))
        additional = wire["additional-evidence"]
        assert binding.canonical_runtime_data(data, additional) == case["canonical"].encode()
        assert binding.canonical_runtime_data(data, None) == case["canonical_device"].encode()
        assert report_data(data, additional).hex() == case["report_data_64_hex"]
        assert device_nonce(data).hex() == case["nvidia_nonce_32_hex"]


@given(st.text(max_size=200).filter(lambda text: text.isprintable()))
def test_report_data_is_the_hash_of_plain_sorted_compact_json(additional: str) -> None:
    members = {"additional-evidence": additional, **json.loads(binding.canonical_runtime_data(DATA, None))}
    plain = json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert report_data(DATA, additional)[:48] == hashlib.sha384(plain).digest()


def test_every_input_changes_the_report_data() -> None:
    others = [
        report_data(dataclasses.replace(DATA, nonce=Nonce(b"n" * 32)), ""),
        report_data(dataclasses.replace(DATA, public_key_x=b"x" * 32), ""),
        report_data(dataclasses.replace(DATA, public_key_y=b"y" * 32), ""),
        report_data(DATA, " "),
    ]
    assert len({report_data(DATA, ""), *others}) == 5


def test_without_gpus_the_text_is_empty_and_carries_no_claims() -> None:
    assert additional_evidence((), CLAIMS) == ""
    assert parse_additional_evidence("") == ((), None)


def test_device_evidence_comes_back_as_it_was() -> None:
    other = dataclasses.replace(GPU, arch="BLACKWELL", uuid="GPU-2")
    text = additional_evidence((GPU, other), CLAIMS)
    assert parse_additional_evidence(text) == ((GPU, other), CLAIMS)
    assert list(json.loads(text)["nvidia"]) == ["device_evidence_list", "keyturn"]


def test_as_many_devices_as_are_allowed_fit_however_long_their_drivers_buffers_are() -> None:
    gpus = tuple(device_of("HOPPER", number, MAX_REPORT_BYTES, MAX_CHAIN_BYTES) for number in range(MAX_GPUS))
    switches = tuple(device_of("LS10", number, MAX_REPORT_BYTES, MAX_CHAIN_BYTES) for number in range(MAX_SWITCHES))
    text = additional_evidence((*gpus, *switches), CLAIMS)
    assert 340 << 10 < len(text) < MAX_ADDITIONAL_EVIDENCE_BYTES < MAX_MESSAGE_BYTES
    devices, _ = parse_additional_evidence(text)
    assert split(devices) == (gpus, switches)


def test_the_recorded_sizes_of_eight_gpus_and_four_switches_are_a_quarter_of_that() -> None:
    gpu, switch = recorded("hopper_590.12_ppcie_0").evidence, recorded("ls10_96.10.55").evidence
    switch = dataclasses.replace(switch, uuid="SWX-recorded")
    text = additional_evidence((gpu,) * 8 + (switch,) * 4, CLAIMS)
    assert 120 << 10 < len(text) < 150 << 10
    assert parse_additional_evidence(text)[0] == (gpu,) * 8 + (switch,) * 4


def test_trustees_own_text_has_no_claims() -> None:
    text = changed(lambda nvidia: nvidia.pop("keyturn"))
    assert parse_additional_evidence(text) == ((GPU,), None)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("size", '{"nvidia":"' + "a" * (512 << 10) + '"}'),
        ("json", "[]"),
        ("json", "{"),
        ("json", "[" * 100_000),
        ("json", '{"nvidia":NaN}'),
        ("json", '{"nvidia":1,"nvidia":2}'),
        ("json", '{"nvidia":{},"amd":{}}'),
        ("nvidia", '{"nvidia":[]}'),
        ("nvidia", '{"nvidia":{}}'),
        ("nvidia", changed(lambda n: n.update(other=1))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=[]))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list={}))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=n["device_evidence_list"] * 17))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=listed(["LS10"])))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=listed(["HOPPER"] * 8 + ["LS10"] * 5)))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=listed(["HOPPER"] * 17 + ["LS10"] * 3)))),
        ("device_evidence_list", changed(lambda n: n.update(device_evidence_list=listed(["HOPPER"] * 16 + ["LS10"] * 5)))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(arch="LS10"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(uuid="SWX-1"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(arch="VOLTA"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(uuid="GPU 1"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(uuid="GPU-1 1"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(uuid="GPU-1\n"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(evidence="AA"))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(evidence="AB=="))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(evidence=""))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(certificate=1))),
        ("device_evidence_list", changed(lambda n: n["device_evidence_list"][0].update(extra=""))),
        ("keyturn", changed(lambda n: n.update(keyturn=None))),
        ("keyturn", changed(lambda n: n["keyturn"].pop("ready"))),
        ("keyturn", changed(lambda n: n["keyturn"].update(ready=1))),
        ("keyturn", changed(lambda n: n["keyturn"].pop("renewal"))),
        ("keyturn", changed(lambda n: n["keyturn"].update(renewal=1))),
        ("keyturn", changed(lambda n: n["keyturn"].update(devtools=False))),
        ("keyturn", changed(lambda n: n["keyturn"].update(devtools=-1))),
        ("keyturn", changed(lambda n: n["keyturn"].update(manifest_digest="sha256:AB"))),
        ("keyturn", changed(lambda n: n["keyturn"].update(driver_version="580\n"))),
        ("keyturn", changed(lambda n: n["keyturn"].update(more=1))),
    ],
)
def test_text_that_is_not_exactly_ours_is_malformed(field: str, text: str) -> None:
    assert refused(text) == field


def test_what_the_driver_says_must_fit_before_the_cpu_report_is_asked_for() -> None:
    with pytest.raises(MalformedEvidenceError):
        additional_evidence((GPU,), dataclasses.replace(CLAIMS, driver_version=""))
    with pytest.raises(MalformedEvidenceError):
        additional_evidence((dataclasses.replace(GPU, report=b"r" * (512 << 10)),), CLAIMS)


@given(st.text(max_size=300) | st.builds(lambda a, b: changed(lambda n: n.update({a: b})), st.text(), st.text()))
def test_any_text_is_parsed_or_malformed(text: str) -> None:
    try:
        parse_additional_evidence(text)
    except MalformedEvidenceError as error:
        assert error.format is EvidenceFormat.ADDITIONAL
