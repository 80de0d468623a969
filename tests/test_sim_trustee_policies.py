"""Policies of the test KBS: the table of the facts, row by row, and which texts it knows."""

from collections.abc import Mapping
from typing import Any

import pytest

from agent.sim.trustee_policies import (
    BROKEN,
    REGO,
    PolicyError,
    allowed,
    constant_policy,
    default_cpu,
    default_gpu,
    resource_policy,
    status_of,
)

SAMPLE: dict[str, Any] = {"svn": "1", "launch_digest": "abcde", "platform_version": {"major": 1, "minor": 4}, "debug": False}
SAMPLE_VALUES: dict[str, object] = {"launch_digest": ["abcde"], "svn": ["1"], "major_version": 1, "minimum_minor_version": 4}
SNP: dict[str, Any] = {
    **{f"reported_tcb_{part}": level for part, level in {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 4}.items()},
    "policy_debug_allowed": False,
    "policy_migrate_ma": False,
    "policy_abi_major": 0,
    "policy_abi_minor": 31,
    "policy_single_socket": False,
    "policy_smt_allowed": True,
    "platform_smt_enabled": True,
    "platform_tsme_enabled": False,
    "measurement": "aa",
}
SNP_VALUES: dict[str, object] = {
    "snp_launch_measurement": ["aa", "bb"],
    "snp_bootloader": [1],
    "snp_tee_svn": [2],
    "snp_snp_svn": [3],
    "snp_microcode": [4],
    "snp_smt_enabled": True,
    "snp_tsme_enabled": False,
    "snp_guest_abi_major": 0,
    "snp_guest_abi_minor": 31,
    "snp_single_socket": False,
    "snp_smt_allowed": True,
}
TDX: dict[str, Any] = {
    "quote": {
        "header": {"tee_type": "81000000", "vendor_id": "939a7233f79c4ca9940a0db3957f0607"},
        "body": {"rtmr_1": "11", "rtmr_2": "22", "mr_td": "dd", "xfam": "e7"},
    },
    "td_attributes": {"debug": False},
    "tcb_status": "UpToDate",
    "collateral_expiration_status": "0",
}
TDX_VALUES: dict[str, object] = {"rtmr_1": ["11"], "rtmr_2": ["22"], "mr_td": ["dd"], "xfam": ["e7"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "sample": (SAMPLE, SAMPLE_VALUES),
    "snp": (SNP, SNP_VALUES),
    "tdx": (TDX, TDX_VALUES),
}
BEST = {"sample": (3, 2, 2), "snp": (3, 2, 2), "tdx": (4, 2, 2)}


def appraised(tee: str, claims: Mapping[str, Any], values: Mapping[str, object]) -> tuple[int, int, int]:
    vector = default_cpu({tee: claims}, values.get)
    return vector["executables"], vector["hardware"], vector["configuration"]


@pytest.mark.parametrize("tee", CASES)
def test_every_reference_value_is_needed(tee: str) -> None:
    claims, values = CASES[tee]
    assert appraised(tee, claims, values) == BEST[tee]
    assert status_of(default_cpu({tee: claims}, values.get)) == "affirming"
    for name in values:
        less = {other: value for other, value in values.items() if other != name}
        assert appraised(tee, claims, less) != BEST[tee], name


@pytest.mark.parametrize(
    ("tee", "least"), [("sample", (33, 97, 2)), ("snp", (33, 97, 3)), ("tdx", (33, 97, 36)), ("tpm", (33, 97, 36))]
)
def test_without_reference_values_everything_is_unrecognised(tee: str, least: tuple[int, int, int]) -> None:
    assert appraised(tee, CASES.get(tee, ({}, {}))[0], {}) == least


def test_values_are_lists_to_look_in_and_single_ones_to_compare() -> None:
    assert appraised("sample", SAMPLE, SAMPLE_VALUES | {"svn": "1"})[1] == 97
    assert appraised("sample", SAMPLE, SAMPLE_VALUES | {"major_version": [1]})[1] == 97
    assert appraised("sample", SAMPLE, SAMPLE_VALUES | {"major_version": True})[1] == 97
    assert appraised("sample", SAMPLE, SAMPLE_VALUES | {"minimum_minor_version": 5})[1] == 97
    assert appraised("snp", SNP, SNP_VALUES | {"snp_bootloader": ["1"]})[1] == 97


def test_debugging_costs_the_configuration() -> None:
    assert appraised("snp", SNP | {"policy_debug_allowed": True}, SNP_VALUES)[2] == 36
    assert appraised("snp", SNP | {"policy_migrate_ma": True}, SNP_VALUES)[2] == 36
    assert appraised("snp", SNP, SNP_VALUES | {"snp_smt_enabled": False})[2] == 3
    assert appraised("tdx", TDX | {"td_attributes": {"debug": True}}, TDX_VALUES)[2] == 36
    assert appraised("tdx", TDX | {"tcb_status": "OutOfDate"}, TDX_VALUES)[1] == 97
    assert appraised("sample", SAMPLE | {"debug": True}, SAMPLE_VALUES)[2] == 36


def test_gpus_are_unrecognised_but_for_the_sample_device() -> None:
    values = {"device_svn": ["2"]}
    assert default_gpu({"nvidia": {"arch": "Hopper"}}, values.get) == {"executables": 33, "hardware": 97, "configuration": 36}
    assert default_gpu({"sampledevice": {"svn": "2"}}, values.get)["hardware"] == 2


@pytest.mark.parametrize(
    ("vector", "status"),
    [
        ([0, 1, -1], "none"),
        ([], "none"),
        ([2, 0], "affirming"),
        ([31, -32], "affirming"),
        ([2, 32], "warning"),
        ([-33, 95], "warning"),
        ([-96], "warning"),
        ([2, 32, 96], "contraindicated"),
        ([-97], "contraindicated"),
        ([33, 97, 36], "contraindicated"),
    ],
)
def test_the_status_is_the_worst_tier(vector: list[int], status: str) -> None:
    assert status_of({str(place): value for place, value in enumerate(vector)}) == status


# --- resource policies ------------------------------------------------------------------------------------------------


def token(*statuses: str, tee: str = "snp") -> dict[str, Any]:
    return {
        "submods": {
            f"cpu{number}": {"ear.status": status, "ear.veraison.annotated-evidence": {tee: {"debug": False}}}
            for number, status in enumerate(statuses)
        }
    }


def test_what_the_shipped_policies_say() -> None:
    for policy, claims, plugin, expected in (
        ("default", token("contraindicated"), "resource", True),
        ("default", token("affirming", tee="sample"), "resource", False),
        ("default", token("affirming"), "pkcs11", False),
        ("affirming", token("affirming", "affirming"), "resource", True),
        ("affirming", token("affirming", "warning"), "resource", False),
        ("affirming", token(), "resource", False),
        ("allow_all", token(), "resource", True),
        ("deny_all", token("affirming"), "resource", False),
    ):
        assert allowed(policy, claims, plugin) is expected, (policy, claims)
    with pytest.raises(PolicyError):
        allowed(BROKEN, token("affirming"), "resource")


def test_texts_are_known_whatever_their_comments_and_spaces() -> None:
    for name, rego in REGO.items():
        assert resource_policy("# of ours\n" + rego.replace("\n", "  # here\n\n").replace(" ", "\t")) == name
        assert resource_policy(rego.replace("allow", "deny")) == BROKEN
    assert resource_policy("") == BROKEN


def test_a_policy_of_numbers_is_one_and_nothing_else_is() -> None:
    text = """
    package policy
    import rego.v1
    # our judgement
    default hardware := 97
    hardware := 2
    executables = 3
    trust_claims := {"hardware": hardware, "executables": executables, "configuration": 2, }
    """
    assert constant_policy(text) == {"hardware": 2, "executables": 3, "configuration": 2}
    for other in (
        "",
        "package policy",
        text + "x if { true }",
        text.replace("= 3", "= input.x"),
        text.replace("executables =", "exec ="),
    ):
        assert constant_policy(other) is None
