"""`keyturn lint` as people and programs see it."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.cli import main

RENDERED = Path(__file__).resolve().parents[1] / "deploy" / "rendered"


def linted(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    status = main(["lint", *map(str, words), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert isinstance(record, dict)
    assert record["exit_status"] == status
    return status, record


def test_a_clean_pod_is_0_and_its_digests_are_those_of_initdata(capsys: pytest.CaptureFixture[str]) -> None:
    status, record = linted(capsys, RENDERED / "entrypoint-snp.yaml")
    assert (status, record["findings"]) == (0, [])
    assert main(["initdata", str(RENDERED.parent / "base" / "entrypoint" / "initdata.toml"), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    (launch,) = record["initdata"]
    assert {key: launch[key] for key in ("digest", "host_data", "mr_config_id")} == {
        key: expected[key] for key in ("digest", "host_data", "mr_config_id")
    }
    assert main(["lint", str(RENDERED / "entrypoint-snp.yaml")]) == 0
    assert capsys.readouterr().out.split() == [
        "Deployment/model-server", "initdata:", "HOST_DATA", expected["host_data"], "MRCONFIGID", expected["mr_config_id"],
    ]  # fmt: skip


def test_a_finding_is_one_line_with_path_class_owner_and_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(
        (RENDERED / "load-snp.yaml").read_text().replace("Seconds: 90", "Seconds: 30").replace("medium: Memory", "")
    )
    status, record = linted(capsys, file)
    assert status == 10
    grace, volume = record["findings"]
    assert (grace["class"], grace["path"], grace["owner"], grace["object"]) == (
        "grace-period", "spec.template.spec.terminationGracePeriodSeconds", "operator", "Deployment/model-server",
    )  # fmt: skip
    assert volume["class"] == "memory-volume"
    assert main(["lint", str(file)]) == 10
    first, second, _ = capsys.readouterr().out.splitlines()
    for line, finding in ((first, grace), (second, volume)):
        assert line.startswith(f"Deployment/model-server {finding['path']}: {finding['class']}: ")
        assert line.endswith(f"(operator); next step: {finding['next_step']}")


def test_what_is_no_yaml_is_a_finding_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pod.yaml"
    for content, path in ((b"a: 1\nb: &x 1\n", "line 2"), (b"\xff", "$")):
        file.write_bytes(content)
        status, record = linted(capsys, file)
        assert (status, [(finding["path"], finding["class"]) for finding in record["findings"]]) == (10, [(path, "yaml")])


def test_a_file_without_a_pod_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none.yaml"
    file.write_text("kind: Service\n")
    status, record = linted(capsys, file)
    assert (status, [finding["class"] for finding in record["findings"]]) == (10, ["no-pod"])
    assert main(["lint", str(file)]) == 10
    assert capsys.readouterr().out.startswith("$: no-pod: ")


def test_the_error_of_a_boot_goes_with_its_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pod.yaml"
    text = (RENDERED / "entrypoint-snp.yaml").read_text()
    file.write_text(text.replace("cc_init_data: H4sI", "cc_init_data: H4sJ"))
    status, record = linted(capsys, file)
    (finding,) = record["findings"]
    assert (status, finding["class"], finding["error"]["class"], record["initdata"]) == (10, "initdata", "InitdataError", [])


def test_the_size_of_the_model_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert linted(capsys, RENDERED / "load-snp.yaml", "--model-bytes", 1 << 30)[0] == 0
    assert linted(capsys, RENDERED / "load-snp.yaml", "--model-bytes", 1 << 36)[1]["findings"][0]["class"] == "memory"
    for bad in ("0", "-1", "x", str(1 << 63)):
        with pytest.raises(SystemExit) as caught:
            main(["lint", "x", "--model-bytes", bad])
        assert caught.value.code == 2


def test_standard_input_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((RENDERED / "broker.yaml").read_bytes())))
    assert linted(capsys, "-") == (0, {"exit_status": 0, "findings": [], "initdata": []})


def test_a_missing_or_endless_file_is_an_error_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for file in (tmp_path / "missing", large):
        assert main(["lint", str(file)]) == 10
        assert json.loads(capsys.readouterr().err)["class"] == "ConfigError"
