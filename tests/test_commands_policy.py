"""`keyturn policy`: the broker's own parser and appraisal take the printed row, and what no guest would boot is refused."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.artifact.kserve import list_digest
from agent.artifact.seal import seal_model
from agent.artifact.seal_volume import seal_volume
from agent.broker.policy import Claim, parse_policy
from agent.cli import main
from agent.closed import Ident
from agent.config import EXAMPLE, parse
from agent.config_source import from_file, from_initdata_file
from agent.errors import KeyReleaseDeniedError
from agent.guest.initdata import fit, pack_document
from agent.server.presets import command_digest
from tests import test_broker_policy as broker
from tests.test_commands_policy_values import GPU, SNP, TDX

URI = "kbs:///models/my-model/1"
DIGEST = 'manifest_digest = "sha256:' + "0" * 64


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("sealed")
    (root / "model").mkdir()
    (root / "model" / "a.gguf").write_bytes(b"weights")
    return root / "layout", seal_model(root / "model", root / "layout", bytes(32), URI, "my-model", 4, lambda done, total: None)


PPCIE = ("count = 1 ", "count = 8\nswitches = 4 ")


class Site:
    """The files of one release, in a folder."""

    def __init__(self, folder: Path, sealed: tuple[Path, str]) -> None:
        self.folder, self.layout = folder, sealed[0]
        self.text = EXAMPLE.replace(DIGEST, DIGEST[:-64] + sealed[1].removeprefix("sha256:"))
        assert self.text != EXAMPLE
        self.write(SNP, GPU)

    def write(self, image: dict[str, Any], gpu: dict[str, Any], change: tuple[str, str] = ("", "")) -> None:
        assert change[0] in self.text
        text = self.text.replace(*change) if change[0] else self.text
        self.file("image").write_text(json.dumps(image))
        self.file("gpu").write_text(json.dumps(gpu))
        self.file("keyturn.toml").write_text(text)
        self.file("initdata").write_bytes(pack_document({"keyturn.toml": text}, "sha384"))

    def file(self, name: str) -> Path:
        return self.folder / name

    def words(self, *more: str) -> list[str]:
        files = [f"--{name}={self.file(name)}" for name in ("image", "initdata", "gpu")]
        return ["policy", *files, f"--model={self.layout}", *more]


@pytest.fixture
def site(tmp_path: Path, sealed: tuple[Path, str]) -> Site:
    return Site(tmp_path, sealed)


ON_TDX = ('attester = "snp"', 'attester = "tdx"')
END = "--not-after=2026-12-31T00:00:00Z"


def printed(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def digests(site: Site) -> tuple[str, str]:
    config = parse(site.file("keyturn.toml").read_bytes()).config
    assert config.server
    return config.artifact.digest, command_digest(config.server.command)


def test_the_broker_releases_the_key_under_the_printed_row(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, site.words(END)).encode()
    (row,) = parse_policy(text).rows.values()
    assert (row.key_uri, row.min_model_version, row.gpu.count) == (URI, 4, 1)
    manifest, command = digests(site)
    keyturn = replace(broker.KEYTURN, manifest_digest=manifest, server_command_digest=command)
    host_data = fit(from_initdata_file(str(site.file("initdata"))).digest, 32)
    report = replace(broker.REPORT, host_data=host_data)
    case: dict[str, Any] = {"gpus": (broker.GPU,), "keyturn": keyturn, "key_uri": Ident(URI)}
    appraisal = broker.judge(text, report=report, **case)
    assert appraisal.reference_value_ids == (
        "image", "configuration", "firmware", "driver-1", "vbios-1", "model-v4", "server-command",
    )  # fmt: skip
    with pytest.raises(KeyReleaseDeniedError) as denied:
        broker.judge(text, report=broker.REPORT, **case)
    assert denied.value.claim == Claim.HOST_DATA.value


def test_the_row_and_trustees_policy_name_the_credentials_of_the_store(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = parse_policy(printed(capsys, site.words(END)).encode()).rows.values()
    assert row.credentials_uri is None
    site.text = site.text.replace("manifest_digest =", 'credentials_uri = "kbs:///models/store/1"\nmanifest_digest =')
    site.text = site.text.replace("https://models.example.com/my-model", "s3://models/tiny")
    site.write(SNP, GPU)
    (row,) = parse_policy(printed(capsys, site.words(END)).encode()).rows.values()
    assert row.credentials_uri == "kbs:///models/store/1"
    assert '[["resource"], ["models", "store", "1"]],' in printed(capsys, site.words("--for=trustee"))


def test_the_row_for_a_td_releases_the_key_too(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(TDX, GPU, ON_TDX)
    text = printed(capsys, site.words(END)).encode()
    manifest, command = digests(site)
    keyturn = replace(broker.KEYTURN, manifest_digest=manifest, server_command_digest=command)
    mr_config_id = fit(from_initdata_file(str(site.file("initdata"))).digest, 48)
    td = broker.td(mr_config_id=mr_config_id)
    broker.judge(text, td=td, gpus=(broker.GPU,), keyturn=keyturn, key_uri=Ident(URI))


def test_a_model_of_kserve_is_pinned_by_its_list(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    listed = 'format = "kserve-jwe"\nname = "my-model"\njwe_files = ["a.gguf.jwe"]\n#'
    site.text = site.text.replace("manifest_digest = ", listed).replace("min_version = 1 ", "#")
    site.write(SNP, GPU)
    (row,) = parse_policy(printed(capsys, site.words(END)).encode()).rows.values()
    artifact = parse(site.file("keyturn.toml").read_bytes()).config.artifact
    assert ([each.value for each in row.manifest_digests], row.min_model_version) == ([list_digest(artifact)], 0)


def test_of_several_allowed_models_one_is_asked_for(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = site.text[site.text.index("[artifact]") : site.text.index("[server]")].replace("destination =", "#")
    entry = artifact.replace("[artifact]", '[[artifact.allowed]]\nuri = "keyturn://a"')
    other = entry.replace("//a", "//b") + 'key_uri = "kbs:///models/other/1"\n'
    shared = '[artifact]\ndestination = "directory"\ndirectory = "/mnt/models"\n'
    site.text = site.text[: site.text.index("[artifact]")] + shared + other + entry
    site.write(SNP, GPU)
    (row,) = parse_policy(printed(capsys, site.words(END, "--uri=keyturn://a")).encode()).rows.values()
    assert row.key_uri == URI
    for more in ((), ("--uri=keyturn://b",), ("--uri=keyturn://c",)):
        assert main(site.words(END, *more)) == 10


def test_a_volume_is_pinned_by_its_manifest(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "model").mkdir()
    (site.folder / "model" / "a.gguf").write_bytes(b"weights")
    image, layout = site.folder / "model.img", site.folder / "layout"
    digest = seal_volume(site.folder / "model", image, layout, bytes(32), URI, "my-model", 4, lambda *_: None)
    site.layout = layout
    volume = f'format = "volume"\nmanifest_digest = "{digest}" #'
    site.text = re.sub('manifest_digest = "[^"]*"', volume, site.text)
    site.write(SNP, GPU)
    (row,) = parse_policy(printed(capsys, site.words(END)).encode()).rows.values()
    assert ([each.value for each in row.manifest_digests], row.min_model_version) == ([digest], 4)


def test_a_configuration_without_initdata_is_pinned_by_its_own_digest(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("--initdata=", "--config=").replace("/initdata", "/keyturn.toml") for word in site.words(END)]
    (row,) = parse_policy(printed(capsys, words).encode()).rows.values()
    assert row.snp is not None
    assert row.snp.host_data[0].value == from_file(str(site.file("keyturn.toml"))).digest.hex()


def test_what_is_not_known_is_a_comment_and_matches_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for image, change in ((SNP, ("", "")), (TDX, ON_TDX)):
        bare = {name: value for name, value in image.items() if name in ("measurement", "mr_td", "rtmr_1", "rtmr_2")}
        site.write(bare, GPU, change)
        words = [word for word in site.words() if not word.startswith("--gpu")]
        text = printed(capsys, words)
        (row,) = parse_policy(text.encode()).rows.values()
        assert (row.not_after, row.lease_s, row.gpu.driver_versions, row.gpu.modes) == (None, None, (), ())
        assert row.snp is None or row.snp.minimum_tcb == ()
        assert row.tdx is None or row.tdx.minimum_tee_tcb_svn is None
        for remark in ("# not_after", "# lease_s", "# driver_versions", "# minimum_t"):
            assert remark in text


@pytest.mark.parametrize(
    ("flag", "change", "mode", "ready"),
    [
        (1, ("", ""), "cc", False),
        (2, PPCIE, "ppcie", False),
        (0, ('ready_state = "own"', 'ready_state = "preset"'), "cc", True),
    ],
)
def test_modes_and_ready_state_follow_report_and_configuration(
    flag: int, change: tuple[str, str], mode: str, ready: bool, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write(SNP, GPU | {"feature_flag": flag}, change)
    (row,) = parse_policy(printed(capsys, site.words()).encode()).rows.values()
    assert ([each.value for each in row.gpu.modes], row.gpu.ready) == ([mode], ready)


def test_switches_are_listed_by_their_vbios(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(SNP, GPU | {"feature_flag": 2}, PPCIE)
    assert "# switch_vbios_versions" in printed(capsys, site.words())
    site.file("switch").write_text('arch = "LS10"\nvbios_version = "96.10.55.00.01"\n')
    (row,) = parse_policy(printed(capsys, site.words(f"--gpu={site.file('switch')}")).encode()).rows.values()
    assert row.gpu.count == 8
    assert [version.value for version in row.gpu.switch_vbios_versions] == ["96.10.55.00.01"]
    text = printed(capsys, site.words("--for=trustee", "--json"))
    record = json.loads(text)
    assert '"gpu7", "switch0", "switch1", "switch2", "switch3", "ppcie0"]' in record["resource_policy"]
    assert any("default_ppcie" in hint for hint in record["hints"])


@pytest.mark.parametrize(("flag", "change"), [(2, ("", "")), (0, PPCIE)])
def test_gpus_in_another_mode_than_the_configuration_wants_are_refused(
    flag: int, change: tuple[str, str], site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write(SNP, GPU | {"feature_flag": flag}, change)
    assert failed(capsys, site.words())["fields"]["key"] == "gpu.switches"


def test_a_guest_without_gpus_needs_no_more(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(SNP | {"product": "Turin", "reported_tcb": SNP["reported_tcb"] | {"fmc": 2}}, GPU, ("count = 1", "count = 0"))
    (row,) = parse_policy(printed(capsys, site.words(END)).encode()).rows.values()
    assert row.gpu.count == 0
    assert row.snp is not None
    assert (row.snp.minimum_tcb[0].product, row.snp.minimum_tcb[0].fmc) == ("Turin", 2)


def test_for_trustee_the_calls_are_printed_for_a_shell_and_for_programs(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, site.words("--for=trustee"))
    assert text.startswith("#!/bin/sh\n")
    record = json.loads(printed(capsys, site.words("--for=trustee", "--json")))
    assert [(call["method"], call["path"]) for call in record["calls"]] == [
        ("POST", "/kbs/v0/reference-value"),
        ("POST", "/kbs/v0/resource-policy"),
    ]
    assert record["resource_policy"] in text
    remarks = " ".join(text.replace("\n#", " ").split())
    assert all(hint in remarks for hint in record["hints"])
    assert all(len(line) <= 128 for line in text.splitlines() if line.startswith("#"))
    assert record["reference_values"]["snp_launch_measurement"] == [SNP["measurement"]]
    host_data = fit(from_initdata_file(str(site.file("initdata"))).digest, 32)
    assert f'evidence.init_data in ["{host_data.hex()}", ' in record["resource_policy"]


def test_trustees_policy_is_for_the_place_that_the_configuration_names(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    endpoints = 'endpoints = ["kbs.example.com:8443"]'
    elsewhere = 'url = "https://kbs.example.com:8080"\nresource_uri = "kbs:///site/keys/7"'
    site.write(SNP, GPU, (endpoints, elsewhere))
    text = printed(capsys, site.words("--for=trustee"))
    assert '[["resource"], ["site", "keys", "7"]],' in text
    assert f"Trustee, for {URI}." in text
    assert "# /kbs/v0/resource/site/keys/7." in text


def test_sample_evidence_is_for_a_test_with_trustee(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in site.words("--for=trustee", "--json", "--unsafe-sample") if "--image" not in word]
    record = json.loads(printed(capsys, words))
    assert record["reference_values"]["svn"] == ["1"]
    assert "UNSAFE" in record["resource_policy"]


def test_standard_input_is_read(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = printed(capsys, site.words())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(site.file("image").read_bytes())))
    words = ["--image=-" if word.startswith("--image") else word for word in site.words()]
    assert printed(capsys, words) == expected


def failed(capsys: pytest.CaptureFixture[str], words: list[str], status: int = 10) -> dict[str, Any]:
    assert main(words) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    error = json.loads(shown.err)
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(("image", "change"), [(TDX, ("", "")), (SNP, ON_TDX)])
def test_a_configuration_for_the_other_tee_is_refused(
    image: dict[str, Any], change: tuple[str, str], site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write(image, GPU, change)
    assert failed(capsys, site.words())["fields"]["key"] == "tee.attester"


@pytest.mark.parametrize(
    ("change", "key"),
    [(("my-model/1", "my-model/2"), "broker.key_uri"), (("min_version = 1", "min_version = 5"), "artifact.min_version")],
)
def test_a_model_that_no_guest_would_open_is_refused(
    change: tuple[str, str], key: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write(SNP, GPU, change)
    assert failed(capsys, site.words())["fields"]["key"] == key


def test_a_model_that_is_not_in_the_layout_is_the_stores_error(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(SNP, GPU, ("manifest_digest = ", "manifest_digest = " + '"sha256:' + "1" * 64 + '" #'))
    assert failed(capsys, site.words(), 18)["class"] == "ArtifactUnavailableError"


def test_wrong_files_are_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("image", "gpu"):
        kept = site.file(name).read_bytes()
        site.file(name).write_text("{}")
        assert failed(capsys, site.words())["fields"]["key"].startswith(f"{name}.")
        site.file(name).unlink()
        assert failed(capsys, site.words())["fields"] == {
            "problem": "file not found or not readable",
            "key": name,
            "line": None,
        }
        site.file(name).write_bytes(kept)
    site.file("initdata").write_text("")
    assert failed(capsys, site.words())["class"] == "InitdataError"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--json"], "--for trustee"),
        (["--for=trustee", END], "--not-after is for"),
        (["--not-after=2027-01-01"], "with its zone"),
        (["--not-after=soon"], "with its zone"),
        (["--gpu=-", "--gpu=-"], "only one file"),
        (["--unsafe-sample"], "not allowed with"),
        (["--config=x"], "not allowed with"),
        (["--for=nobody"], "invalid choice"),
    ],
)
def test_a_wrong_use_is_a_usage_error(more: list[str], said: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(site.words(*more))
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
