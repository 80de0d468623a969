"""Files with reference values: what `verify` prints is read, and everything else refused by its name."""

import json
from typing import Any

import pytest

from agent.cli import main
from agent.commands.policy_values import (
    MAX_FILE_BYTES,
    GpuVersions,
    SnpImage,
    SnpTcb,
    SwitchVersions,
    TdxImage,
    parse_gpu,
    parse_image,
)
from agent.errors import ConfigError, ConfigProblem
from tests.shared import shared_data
from tests.test_commands_verify import snp_row, valid_day

Members = dict[str, Any]
TCB: Members = {"boot_loader": 9, "tee": 1, "snp": 23, "microcode": 71}
SNP: Members = {"tee": "snp", "product": "Genoa", "measurement": "11" * 48, "reported_tcb": TCB, "policy": {"smt": True}}
TDX: Members = {
    "tee": "tdx", "mr_td": "41" * 48, "rtmr_0": "50" * 48, "rtmr_1": "51" * 48, "rtmr_2": "52" * 48, "rtmr_3": "00" * 48,
    "mr_seam": "53" * 48, "tee_tcb_svn": "060103" + "00" * 13, "xfam": "0x602e7",
}  # fmt: skip
GPU: Members = {"driver_version": "580.95.05", "vbios_version": "96.00.74.00.1A", "feature_flag": 0}


def test_what_verify_prints_of_snp_is_read() -> None:
    assert parse_image(json.dumps(SNP).encode()) == SnpImage("11" * 48, SnpTcb("Genoa", 9, 1, 23, 71, None))
    turin = SNP | {"product": "Turin", "reported_tcb": TCB | {"fmc": 2}}
    image = parse_image(json.dumps(turin).encode())
    assert isinstance(image, SnpImage)
    assert image.tcb == SnpTcb("Turin", 9, 1, 23, 71, 2)


def test_what_verify_prints_of_tdx_is_read() -> None:
    assert parse_image(json.dumps(TDX).encode()) == TdxImage(
        mr_td="41" * 48, rtmr_1="51" * 48, rtmr_2="52" * 48, mr_seam="53" * 48,
        tee_tcb_svn="060103" + "00" * 13, xfam="e702060000000000",
    )  # fmt: skip


def test_a_measurement_by_hand_is_enough() -> None:
    assert parse_image(f'measurement = "{"11" * 48}"'.encode()) == SnpImage("11" * 48, None)
    by_hand = f'mr_td = "{"1" * 96}"\nrtmr_1 = "{"2" * 96}"\nrtmr_2 = "{"3" * 96}"\n'
    assert parse_image(by_hand.encode()) == TdxImage("1" * 96, "2" * 96, "3" * 96, None, None, None)


def test_versions_of_a_gpu_are_read() -> None:
    for flag, pcie in ((0, False), (1, False), (2, True), (None, None)):
        assert parse_gpu(json.dumps(GPU | {"feature_flag": flag}).encode()) == GpuVersions("580.95.05", "96.00.74.00.1A", pcie)


def test_an_nvswitch_has_its_vbios_alone() -> None:
    assert parse_gpu(b'arch = "LS10"\nvbios_version = "96.10.55.00.01"\n') == SwitchVersions("96.10.55.00.01")
    assert refused(parse_gpu, b'arch = "LS10"\n') == (ConfigProblem.MISSING_KEY, "gpu.vbios_version")


def refused(parse: Any, data: bytes) -> tuple[ConfigProblem, str | None]:
    with pytest.raises(ConfigError) as raised:
        parse(data)
    assert raised.value.__cause__ is None
    return raised.value.problem, raised.value.key


@pytest.mark.parametrize("members", [{}, {"rtmr_1": "51" * 48}, SNP | TDX])
def test_an_image_of_no_tee_or_of_two_is_refused(members: Members) -> None:
    assert refused(parse_image, json.dumps(members).encode()) == (ConfigProblem.MISSING_KEY, "image.measurement")


@pytest.mark.parametrize(
    ("members", "problem", "key"),
    [
        (SNP | {"measurement": "11" * 47}, ConfigProblem.BAD_VALUE, "image.measurement"),
        (SNP | {"measurement": "AB" * 48}, ConfigProblem.BAD_VALUE, "image.measurement"),
        (SNP | {"measurement": "11" * 48 + "\n"}, ConfigProblem.BAD_VALUE, "image.measurement"),
        (SNP | {"measurement": 11}, ConfigProblem.WRONG_TYPE, "image.measurement"),
        (SNP | {"product": "Naples"}, ConfigProblem.BAD_VALUE, "image.product"),
        (SNP | {"product": ["Genoa"]}, ConfigProblem.WRONG_TYPE, "image.product"),
        ({"measurement": "11" * 48, "reported_tcb": TCB}, ConfigProblem.MISSING_KEY, "image.product"),
        (SNP | {"reported_tcb": None}, ConfigProblem.BAD_VALUE, "image.reported_tcb"),
        (SNP | {"reported_tcb": TCB | {"snp": 256}}, ConfigProblem.BAD_VALUE, "image.reported_tcb.snp"),
        (SNP | {"reported_tcb": TCB | {"snp": -1}}, ConfigProblem.BAD_VALUE, "image.reported_tcb.snp"),
        (SNP | {"reported_tcb": TCB | {"snp": True}}, ConfigProblem.BAD_VALUE, "image.reported_tcb.snp"),
        (SNP | {"reported_tcb": TCB | {"snp": "1"}}, ConfigProblem.BAD_VALUE, "image.reported_tcb.snp"),
        (SNP | {"reported_tcb": TCB | {"fmc": None}}, ConfigProblem.BAD_VALUE, "image.reported_tcb.fmc"),
        (SNP | {"reported_tcb": {}}, ConfigProblem.MISSING_KEY, "image.reported_tcb.boot_loader"),
        (TDX | {"rtmr_2": ""}, ConfigProblem.BAD_VALUE, "image.rtmr_2"),
        (TDX | {"rtmr_1": None}, ConfigProblem.WRONG_TYPE, "image.rtmr_1"),
        (TDX | {"tee_tcb_svn": "06"}, ConfigProblem.BAD_VALUE, "image.tee_tcb_svn"),
        (TDX | {"xfam": 5}, ConfigProblem.BAD_VALUE, "image.xfam"),
        (TDX | {"xfam": "0x" + "1" * 17}, ConfigProblem.BAD_VALUE, "image.xfam"),
        ({"mr_td": "41" * 48}, ConfigProblem.MISSING_KEY, "image.rtmr_1"),
    ],
)
def test_a_value_of_another_form_is_refused_by_its_name(members: Members, problem: ConfigProblem, key: str) -> None:
    assert refused(parse_image, json.dumps(members).encode()) == (problem, key)
    wrong = json.dumps(GPU | {"vbios_version": '"] #'}).encode()
    assert refused(parse_gpu, wrong) == (ConfigProblem.BAD_VALUE, "gpu.vbios_version")


@pytest.mark.parametrize("parse", [parse_image, parse_gpu])
def test_what_is_no_object_is_refused(parse: Any) -> None:
    for data in (b"{", b"x", b'{"a":' * 50_000, b"a = " + b"[" * 50_000, b'{"a": ' + b"9" * 10_000 + b"}"):
        assert refused(parse, data)[0] is ConfigProblem.NOT_TOML
    assert refused(parse, b"\xff")[0] is ConfigProblem.NOT_UTF8
    assert refused(parse, b" " * (MAX_FILE_BYTES + 1))[0] is ConfigProblem.TOO_LARGE


def verified(capsys: pytest.CaptureFixture[str], *words: object) -> bytes:
    assert main(["verify", *map(str, words), "--json"]) == 0
    return capsys.readouterr().out.encode()


def test_a_recorded_quote_gives_the_values_as_trustee_spells_them(capsys: pytest.CaptureFixture[str]) -> None:
    quote = shared_data("tdx/quotes/v4-uptodate.bin")
    body = quote.read_bytes()[48:]  # Trustee prints fields as they lie there
    image = parse_image(verified(capsys, "tdx", quote, "--no-collateral", "--at", valid_day(quote.read_bytes())))
    assert image == TdxImage(
        mr_td=body[136:184].hex(),
        rtmr_1=body[376:424].hex(),
        rtmr_2=body[424:472].hex(),
        mr_seam=body[16:64].hex(),
        tee_tcb_svn=body[:16].hex(),
        xfam=body[128:136].hex(),
    )


def test_a_recorded_report_gives_measurement_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    _, report, flags = snp_row("genoa-v3-vcek-configfs")
    image = parse_image(verified(capsys, "snp", report, *flags))
    assert isinstance(image, SnpImage)
    assert image.measurement == report.read_bytes()[0x90:0xC0].hex()
    assert image.tcb is not None
    raw = report.read_bytes()[0x180:0x188]
    assert (image.tcb.bootloader, image.tcb.tee, image.tcb.snp, image.tcb.microcode) == (raw[0], raw[1], raw[6], raw[7])
