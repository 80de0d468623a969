"""What Trustee is told: a policy that a Rego engine runs, the default policies' names of values, calls that a shell makes."""

import base64
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from regopy import Interpreter

from agent.commands.policy_values import Approved, GpuVersions, SnpImage, SnpTcb, TdxImage
from agent.commands.trustee_policy import calls, hints, reference_values, resource_policy, script

Members = dict[str, Any]
SNP = SnpImage("11" * 48, SnpTcb("Genoa", 9, 1, 23, 71, None))
TDX = TdxImage("41" * 48, "51" * 48, "52" * 48, "53" * 48, "060103" + "00" * 13, "e702060000000000")
APPROVED = Approved(
    image=SNP,
    init_data=b"\x22" * 32 + b"\x33" * 16,
    gpu_count=2,
    gpu_ready_preset=False,
    gpus=(GpuVersions("580.95.05", "96.00.74.00.1A", False),) * 2,
    switches=(),
    switch_count=0,
    key_uri="kbs:///models/tiny/1",
    model_name="tiny",
    model_version=3,
    manifest_digest="sha256:" + "a" * 64,
    server_command_digest="sha256:" + "b" * 64,
)
ON_TDX = replace(APPROVED, image=TDX)
SAMPLE = replace(APPROVED, image=None, gpu_count=0, gpus=())
REQUEST: Members = {"plugin": "resource", "resource-path": ["models", "tiny", "1"], "query": {}}


def token(kind: str, init_data: str | None, gpus: int) -> Members:
    cpu = {"ear.status": "affirming", "ear.veraison.annotated-evidence": {kind: {"x": 1}, "init_data": init_data}}
    devices = {f"gpu{n}": {"ear.status": "affirming", "ear.veraison.annotated-evidence": {"nvidia": {}}} for n in range(gpus)}
    return {"iss": "CoCo-Attestation-Service", "submods": {"cpu0": cpu, **devices}}


def allows(approved: Approved, claims: Members, request: Members = REQUEST) -> bool:
    engine = Interpreter()
    engine.add_module("policy", resource_policy(approved))
    engine.add_data(request)
    engine.set_input(claims)
    answer = json.loads(str(engine.query("x = data.policy.allow")))["bindings"]["x"]
    assert isinstance(answer, bool)
    return answer


GOOD = token("snp", "22" * 32, 2)


def test_the_policy_allows_what_it_was_made_for() -> None:
    assert allows(APPROVED, GOOD)
    assert allows(APPROVED, token("snp", base64.b64encode(b"\x22" * 32).decode(), 2))  # of an earlier release
    assert allows(ON_TDX, token("tdx", "22" * 32 + "33" * 16, 2))
    assert allows(replace(APPROVED, gpu_count=0), token("snp", "22" * 32, 0))
    assert allows(SAMPLE, token("sample", "anything", 0))


@pytest.mark.parametrize(
    "request_",
    [
        {"plugin": "resource", "resource-path": "/models/tiny/1", "query": {}},
        {"resource-path": "resource/models/tiny/1"},  # v0.14 to v0.16: trustee issue 1097
    ],
)
def test_the_policy_knows_the_request_of_every_release_of_the_protocol(request_: Members) -> None:
    assert allows(APPROVED, GOOD, request_)
    assert not allows(APPROVED, token("snp", "22" * 31 + "23", 2), request_)


def test_the_policy_is_for_the_place_where_the_guest_asks_for_its_key() -> None:
    elsewhere = replace(APPROVED, resource_uri="kbs:///site/keys/7?version=2")
    asked = REQUEST | {"resource-path": ["site", "keys", "7"], "query": {"version": "2"}}
    assert allows(elsewhere, GOOD, asked)
    assert not allows(elsewhere, GOOD)
    assert "# /kbs/v0/resource/site/keys/7." in script(elsewhere)
    plugin = replace(APPROVED, resource_uri="kbs+vault:///site/keys/7/a")
    asked = {"plugin": "vault", "resource-path": ["site", "keys", "7", "a"], "query": {}}
    assert allows(plugin, GOOD, asked)
    assert not allows(plugin, GOOD, asked | {"plugin": "resource"})
    assert "POST its 32 bytes" not in script(plugin)


def test_the_policy_allows_the_credentials_that_the_guest_asks_for_and_no_others() -> None:
    approved = replace(APPROVED, credentials_uri="kbs:///models/store/1")
    request = REQUEST | {"resource-path": ["models", "store", "1"]}
    assert allows(approved, GOOD)
    for asked in (request, request | {"resource-path": "/models/store/1"}, {"resource-path": "resource/models/store/1"}):
        assert allows(approved, GOOD, asked)
        assert not allows(APPROVED, GOOD, asked)
        assert not allows(approved, token("snp", "22" * 31 + "23", 2), asked)
    assert not allows(approved, GOOD, REQUEST | {"resource-path": ["models", "store", "2"]})
    assert not allows(approved, GOOD, request | {"plugin": "vault"})
    elsewhere = replace(approved, resource_uri="kbs+vault:///site/keys/7")
    assert allows(elsewhere, GOOD, {"plugin": "vault", "resource-path": ["site", "keys", "7"], "query": {}})
    assert allows(elsewhere, GOOD, request)
    assert not allows(elsewhere, GOOD, request | {"plugin": "vault"})
    assert any("/kbs/v0/resource/models/store/1" in hint for hint in hints(approved))


def changed(change: Callable[[Members], object]) -> Members:
    claims: Members = json.loads(json.dumps(GOOD))
    change(claims["submods"])
    return claims


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"submods": {}},
        changed(lambda s: s.pop("cpu0")),
        changed(lambda s: s.pop("gpu1")),
        changed(lambda s: s["cpu0"].update({"ear.status": "warning"})),
        changed(lambda s: s["gpu1"].update({"ear.status": "contraindicated"})),
        changed(lambda s: s["gpu1"].update({"ear.status": "none"})),
        changed(lambda s: s["gpu1"].pop("ear.status")),
        changed(lambda s: s.update(switch0={"ear.status": "warning"})),
        token("sample", "22" * 32, 2),
        token("tdx", "22" * 32, 2),
        token("snp", "22" * 31 + "23", 2),
        token("snp", "22" * 32 + "33" * 16, 2),
        token("snp", None, 2),
    ],
)
def test_the_policy_denies_everything_else(claims: Members) -> None:
    assert not allows(APPROVED, claims)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        REQUEST | {"plugin": "sample"},
        REQUEST | {"resource-path": ["models", "tiny", "2"]},
        REQUEST | {"resource-path": ["models", "tiny"]},
        REQUEST | {"resource-path": "models/tiny/1"},
        REQUEST | {"resource-path": "resource/models/tiny/1"},
        REQUEST | {"resource-path": "/models/tiny/2"},
        {"plugin": "sample", "resource-path": "/models/tiny/1"},
        {"resource-path": "/models/tiny/1"},
        {"resource-path": ["models", "tiny", "1"]},
        {"resource-path": "sample/models/tiny/1"},
    ],
)
def test_the_policy_is_for_one_resource(request_: Members) -> None:
    assert not allows(APPROVED, GOOD, request_)


def test_values_have_the_names_that_the_default_policies_ask_for() -> None:
    assert reference_values(APPROVED) == {
        "snp_launch_measurement": ["11" * 48],
        "snp_bootloader": [9],
        "snp_tee_svn": [1],
        "snp_snp_svn": [23],
        "snp_microcode": [71],
        "allowed_driver_versions": ["580.95.05"],
        "allowed_vbios_versions": ["96.00.74.00.1A"],
    }
    assert reference_values(replace(ON_TDX, gpus=())) == {
        "mr_td": ["41" * 48],
        "rtmr_1": ["51" * 48],
        "rtmr_2": ["52" * 48],
        "mr_seam": ["53" * 48],
        "tcb_svn": ["060103" + "00" * 13],
        "xfam": ["e702060000000000"],
    }
    assert reference_values(SAMPLE) == {
        "launch_digest": ["abcde"],
        "svn": ["1"],
        "major_version": 1,
        "minimum_minor_version": 4,
    }


def test_what_is_missing_is_left_out_and_hinted_at() -> None:
    bare = replace(APPROVED, image=SnpImage("11" * 48, None), gpus=())
    assert reference_values(bare) == {"snp_launch_measurement": ["11" * 48]}
    assert any("patch levels are missing" in hint for hint in hints(bare))
    assert any("GPUs' versions are missing" in hint for hint in hints(bare))
    bare_td = replace(ON_TDX, image=TdxImage("4" * 96, "5" * 96, "6" * 96, None, None, None))
    assert set(reference_values(bare_td)) & {"mr_seam", "tcb_svn", "xfam"} == set()
    assert any("xfam is missing" in hint for hint in hints(bare_td))
    assert not any("missing" in hint for approved in (APPROVED, ON_TDX, SAMPLE) for hint in hints(approved))


def test_who_has_gpus_is_told_of_local_verification_and_who_tests_that_it_is_unsafe() -> None:
    assert any("`default_gpu`" in hint for hint in hints(APPROVED))
    assert not any("`default_gpu`" in hint for hint in hints(SAMPLE))
    assert any("UNSAFE" in hint for hint in hints(SAMPLE))
    assert "UNSAFE" in resource_policy(SAMPLE)


def decoded(call_body: Members) -> object:
    if "payload" in call_body:
        assert (call_body["version"], call_body["type"]) == ("0.1.0", "sample")
        return json.loads(base64.b64decode(call_body["payload"], validate=True))
    padded = call_body["policy"] + "=" * (-len(call_body["policy"]) % 4)
    return base64.b64decode(padded, altchars=b"-_", validate=True).decode()


def test_the_calls_carry_values_and_policy_as_the_endpoints_want_them() -> None:
    values, policy = calls(APPROVED)
    assert (values.path, policy.path) == ("reference-value", "resource-policy")
    assert decoded(values.body) == reference_values(APPROVED)
    assert decoded(policy.body) == resource_policy(APPROVED)
    assert "=" not in str(policy.body)


CURL = """#!/bin/sh
n=$(ls "$CALLS" | wc -l)
printf '%s\\n' "$@" >"$CALLS/$n.words"
cat >"$CALLS/$n.body"
"""


@pytest.mark.parametrize("approved", [APPROVED, ON_TDX, SAMPLE], ids=["snp", "tdx", "sample"])
def test_a_shell_makes_the_same_calls(approved: Approved, tmp_path: Path) -> None:
    made, tools = tmp_path / "calls", tmp_path / "bin"
    made.mkdir()
    tools.mkdir()
    (tools / "curl").write_text(CURL)
    (tools / "curl").chmod(0o755)
    header = tmp_path / "header"
    header.write_text("Authorization: Bearer hunter2\n")
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(made),
        "KBS_URL": "https://kbs.example.com:8080/",
        "KBS_CA": "/ca file.pem",
        "KBS_ADMIN": str(header),
    }
    done = subprocess.run(["sh", "-c", script(approved)], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    bodies = [json.loads(path.read_text()) for path in sorted(made.glob("*.body"))]
    assert [decoded(body) for body in bodies] == [reference_values(approved), resource_policy(approved)]
    words = [path.read_text().splitlines() for path in sorted(made.glob("*.words"))]
    assert [each[-1] for each in words] == [f"https://kbs.example.com:8080/kbs/v0/{call.path}" for call in calls(approved)]
    assert all("--cacert" in each and "/ca file.pem" in each and f"@{header}" in each for each in words)
    assert not any("hunter2" in word for each in words for word in each)


def test_the_script_says_where_the_key_goes_and_stops_without_a_service() -> None:
    assert "# /kbs/v0/resource/models/tiny/1." in script(APPROVED)
    done = subprocess.run(["sh", "-c", script(APPROVED)], env={"PATH": os.environ["PATH"]}, capture_output=True, timeout=30)
    assert done.returncode != 0
