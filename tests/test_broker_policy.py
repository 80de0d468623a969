"""Each rule of the policy: a row that allows, and one change each that denies and names its claim."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent.broker.policy import Appraisal, Claim, appraise, parse_policy
from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem, DenialReason, KeyReleaseDeniedError
from agent.evidence.binding import KeyturnClaims
from agent.evidence.gpu_abi import Pdi
from agent.evidence.snp_abi import FirmwareVersion, GuestPolicy, Product, SigningKey, SnpReport, TcbVersion
from agent.evidence.tdx_abi import TdAttributes, TdBody
from agent.verify.nvidia import GpuClaims, SwitchClaims
from agent.verify.pck import PckExtension
from agent.verify.snp import SnpClaims
from agent.verify.tdx import TcbStatus, TdxClaims

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
URI = Ident("kbs:///models/tiny/1")

ROW = {
    "key_uri": f'"{URI}"',
    "release_channel": '"stable"',
    "min_model_version": "3",
    "lease_s": "3600",
    "revoked": "false",
    "not_after": "2026-12-31T00:00:00Z",
    "manifest_digests": f'[{{ id = "model-3", value = "sha256:{"a" * 64}" }}]',
    "server_command_digests": f'[{{ id = "server-1", value = "sha256:{"b" * 64}" }}]',
    "snp.measurements": f'[{{ id = "image-2", value = "{"12" * 48}" }}, {{ id = "image-1", value = "{"11" * 48}" }}]',
    "snp.host_data": f'[{{ id = "config-1", value = "{"22" * 32}" }}]',
    "snp.minimum_tcb": '[{ id = "tcb-1", product = "Genoa", bootloader = 9, tee = 1, snp = 23, microcode = 71 }]',
    "snp.debug": "false",
    "snp.vmpl": "0",
    "gpu.count": "2",
    "gpu.driver_versions": '[{ id = "driver-1", value = "580.95.05" }]',
    "gpu.vbios_versions": '[{ id = "vbios-1", value = "96.00.74.00.1A" }]',
    "gpu.modes": '["cc"]',
    "gpu.ready": "false",
}
MATCHED = ("image-1", "config-1", "tcb-1", "driver-1", "vbios-1", "model-3", "server-1")

TCB = TcbVersion(bootloader=9, tee=1, snp=23, microcode=71)
FIRMWARE = FirmwareVersion(1, 55, 29)
REPORT = SnpReport(
    version=3,
    guest_svn=0,
    policy=GuestPolicy(0x30000),
    family_id=bytes(16),
    image_id=bytes(16),
    vmpl=0,
    signature_algorithm=1,
    current_tcb=TCB,
    platform_info=1,
    author_key_enabled=False,
    mask_chip_key=False,
    signing_key=SigningKey.VCEK,
    report_data=bytes(64),
    measurement=b"\x11" * 48,
    host_data=b"\x22" * 32,
    id_key_digest=bytes(48),
    author_key_digest=bytes(48),
    report_id=bytes(32),
    report_id_ma=bytes(32),
    reported_tcb=TCB,
    cpuid_family=0x19,
    cpuid_model=0x11,
    cpuid_stepping=1,
    chip_id=b"\x33" * 64,
    committed_tcb=TCB,
    current_firmware=FIRMWARE,
    committed_firmware=FIRMWARE,
    launch_tcb=TCB,
    launch_mitigations=None,
    current_mitigations=None,
    signature_r=1,
    signature_s=1,
)
SNP_FIELDS = [name.replace(".", "__") for name in ROW if name.startswith("snp.")]
TDX_ROW = {
    "tdx__mr_td": f'[{{ id = "firmware-2", value = "{"42" * 48}" }}, {{ id = "firmware-1", value = "{"41" * 48}" }}]',
    "tdx__mr_config_id": f'[{{ id = "config-1", value = "{"22" * 32 + "00" * 16}" }}]',
    "tdx__rtmr_1": f'[{{ id = "loader-1", value = "{"51" * 48}" }}]',
    "tdx__rtmr_2": f'[{{ id = "kernel-1", value = "{"52" * 48}" }}]',
    "tdx__minimum_tee_tcb_svn": f'{{ id = "module-1", value = "060103{"00" * 13}" }}',
    "tdx__tcb": '["UpToDate", "SWHardeningNeeded"]',
}
TDX_MATCHED = ("firmware-1", "config-1", "loader-1", "kernel-1", "module-1")
TD = TdBody(
    tee_tcb_svn=bytes((6, 1, 3)).ljust(16, b"\0"),
    mr_seam=bytes(48),
    mr_signer_seam=bytes(48),
    seam_attributes=0,
    td_attributes=TdAttributes(1 << 28),
    xfam=3,
    mr_td=b"\x41" * 48,
    mr_config_id=b"\x22" * 32 + bytes(16),
    mr_owner=bytes(48),
    mr_owner_config=bytes(48),
    rtmr_0=b"\x50" * 48,
    rtmr_1=b"\x51" * 48,
    rtmr_2=b"\x52" * 48,
    rtmr_3=b"\x53" * 48,
    report_data=bytes(64),
)
PLATFORM = PckExtension(
    ppid=bytes(16), tcb=(0,) * 16, pce_svn=0, cpu_svn=bytes(16), pce_id=bytes(2), fmspc=bytes(6), sgx_type=0
)


def td(status: TcbStatus = TcbStatus.UP_TO_DATE, **changes: object) -> TdxClaims:
    return TdxClaims(
        quote_version=4,
        td=replace(TD, **changes),  # type: ignore[arg-type]
        qe_isv_svn=7,
        platform=PLATFORM,
        ppid_hash="00" * 32,
        revocation_checked=False,
        simulated=False,
        tcb_status=status,
    )


GPU = GpuClaims(
    driver_version="580.95.05",
    vbios_version="96.00.74.00.1A",
    leaf_key_sha256="01" * 32,
    ueid="1",
    hwmodel="GH100 A01 GSP BROM",
    arch="HOPPER",
    feature_flag=0,
    simulated=False,
)
OTHER_GPU = replace(GPU, leaf_key_sha256="02" * 32, ueid="2")
PPCIE_GPUS = tuple(replace(gpu, feature_flag=2, protected_pcie=True) for gpu in (GPU, OTHER_GPU))
SWITCH = SwitchClaims(
    vbios_version="96.10.55.00.01",
    leaf_key_sha256="03" * 32,
    ueid="3",
    hwmodel="LS_10 A01 FSP BROM",
    simulated=False,
    pdi=Pdi(bytes(8)),
    gpu_pdis=(),
)
SWITCH_ROW = '[{ id = "switch-1", value = "96.10.55.00.01" }]'
KEYTURN = KeyturnClaims(
    cc_feature=1,
    environment=2,
    devtools=0,
    multi_gpu_mode=0,
    ready=False,
    renewal=False,
    driver_version="580.95.05",
    manifest_digest="sha256:" + "a" * 64,
    server_command_digest="sha256:" + "b" * 64,
)


def policy(**changes: str | None) -> bytes:
    """A policy file with the one row, in which `__` stands for a dot; None leaves the field out."""
    fields = ROW | {name.replace("__", "."): value for name, value in changes.items()}
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    return "\n".join(['schema = "keyturn-policy/v1"', 'version = "2026-11-22"', "[[row]]", *lines, ""]).encode()


def judge(
    data: bytes | None = None,
    *,
    report: SnpReport = REPORT,
    product: Product = Product.GENOA,
    td: TdxClaims | None = None,
    gpus: tuple[GpuClaims, ...] = (GPU, OTHER_GPU),
    switches: tuple[SwitchClaims, ...] = (),
    keyturn: KeyturnClaims | None = KEYTURN,
    key_uri: Ident = URI,
    now: datetime = NOW,
) -> Appraisal:
    cpu = td or SnpClaims(report=report, product=product, chip_id_hash="00" * 32, simulated=False, revocation_checked=False)
    table = parse_policy(data or policy())
    return appraise(table, key_uri, cpu=cpu, gpus=gpus, switches=switches, keyturn=keyturn, now=now)


def tdx_policy(**changes: str | None) -> bytes:
    """The same for guests on TDX."""
    return policy(**dict.fromkeys(SNP_FIELDS), **(TDX_ROW | changes))


def denied(**case: object) -> KeyReleaseDeniedError:
    with pytest.raises(KeyReleaseDeniedError) as caught:
        judge(**case)  # type: ignore[arg-type]
    assert caught.value.policy_version == "2026-11-22"
    return caught.value


def test_a_complete_row_allows_and_names_what_matched() -> None:
    appraisal = judge()
    assert appraisal.reference_value_ids == MATCHED
    assert (appraisal.row.release_channel, appraisal.row.min_model_version, appraisal.row.lease_s) == ("stable", 3, 3600)


def test_a_row_for_tds_allows_and_names_what_matched() -> None:
    assert judge(tdx_policy(), td=td()).reference_value_ids == TDX_MATCHED + MATCHED[3:]


def tcb(**changes: int) -> SnpReport:
    return replace(REPORT, reported_tcb=replace(TCB, **changes))


def ppcie(**changes: object) -> dict[str, object]:
    """A case in protected-PCIe mode, whose topology is not this module's business."""
    data = policy(gpu__modes='["ppcie"]', gpu__switch_vbios_versions=SWITCH_ROW)
    keyturn = replace(KEYTURN, cc_feature=0, multi_gpu_mode=1)
    return {"data": data, "gpus": PPCIE_GPUS, "switches": (SWITCH,), "keyturn": keyturn} | changes


TURIN = replace(TCB, fmc=2)
TURIN_ROW = '[{ id = "tcb-2", product = "Turin", bootloader = 9, tee = 1, snp = 23, microcode = 71, fmc = 2 }]'
TURIN_ROW_WITHOUT_FMC = TURIN_ROW.replace(", fmc = 2", "")

# (what differs from the accepted case, claim, reference value) — the reason is CLAIM.
WRONG_CLAIMS = [
    ({"report": replace(REPORT, measurement=b"\x10" * 48)}, Claim.MEASUREMENT, "image-2"),
    ({"report": replace(REPORT, host_data=bytes(32))}, Claim.HOST_DATA, "config-1"),
    ({"report": replace(REPORT, policy=GuestPolicy(0xB0000))}, Claim.DEBUG, None),
    ({"report": replace(REPORT, policy=GuestPolicy(0x70000))}, Claim.MIGRATION, None),
    ({"report": replace(REPORT, vmpl=1)}, Claim.VMPL, None),
    ({"report": tcb(bootloader=8)}, Claim.TCB_BOOTLOADER, "tcb-1"),
    ({"report": tcb(tee=0)}, Claim.TCB_TEE, "tcb-1"),
    ({"report": tcb(snp=22)}, Claim.TCB_SNP, "tcb-1"),
    ({"report": tcb(microcode=70)}, Claim.TCB_MICROCODE, "tcb-1"),
    ({"report": replace(REPORT, launch_tcb=replace(TCB, snp=22))}, Claim.TCB_SNP, "tcb-1"),
    (
        {
            "data": policy(snp__minimum_tcb=TURIN_ROW),
            "product": Product.TURIN,
            "report": replace(REPORT, reported_tcb=replace(TURIN, fmc=1), launch_tcb=TURIN),
        },
        Claim.TCB_FMC,
        "tcb-2",
    ),
    (
        {"data": policy(snp__minimum_tcb=ROW["snp.minimum_tcb"].replace(" }", ", fmc = 2 }"))},
        Claim.TCB_FMC,
        "tcb-1",
    ),  # it has none
    ({"td": td()}, Claim.TEE, None),
    ({"data": tdx_policy()}, Claim.TEE, None),
    *(
        ({"data": tdx_policy(**row), "td": td(**changes)}, claim, value)
        for row, changes, claim, value in (
            ({}, {"mr_td": bytes(48)}, Claim.MR_TD, "firmware-2"),
            ({}, {"mr_config_id": b"\x22" * 32 + bytes(15) + b"\1"}, Claim.MR_CONFIG_ID, "config-1"),
            ({"tdx__rtmr_0": f'[{{ id = "rtmr", value = "{"00" * 48}" }}]'}, {}, Claim.RTMR_0, "rtmr"),
            ({}, {"rtmr_1": bytes(48)}, Claim.RTMR_1, "loader-1"),
            ({}, {"rtmr_2": bytes(48)}, Claim.RTMR_2, "kernel-1"),
            ({"tdx__rtmr_3": f'[{{ id = "rtmr", value = "{"00" * 48}" }}]'}, {}, Claim.RTMR_3, "rtmr"),
            ({"tdx__event_log": '"required"'}, {}, Claim.EVENT_LOG, None),
            ({}, {"td_attributes": TdAttributes(1 << 28 | 1 << 29)}, Claim.TD_MIGRATABLE, None),
            ({}, {"td_attributes": TdAttributes(1 << 28 | 1 << 17)}, Claim.TD_MIGRATABLE, None),
            ({}, {"td_attributes": TdAttributes(0)}, Claim.TD_SEPT_VE, None),
            ({}, {"tee_tcb_svn": bytes((5, 1, 3)).ljust(16, b"\0")}, Claim.TEE_TCB_SVN, "module-1"),
            ({}, {"tee_tcb_svn": bytes((9, 0, 9)).ljust(16, b"\xff")}, Claim.TEE_TCB_SVN, "module-1"),
            ({}, {"tee_tcb_svn_2": bytes((6, 1, 2)).ljust(16, b"\0")}, Claim.TEE_TCB_SVN, "module-1"),
            ({}, {"status": TcbStatus.NOT_EVALUATED}, Claim.TCB_STATUS, None),
            ({}, {"status": TcbStatus.OUT_OF_DATE}, Claim.TCB_STATUS, None),
            ({"tdx__tcb": '["not_evaluated"]'}, {}, Claim.TCB_STATUS, None),
        )
    ),
    ({"gpus": (GPU,)}, Claim.GPU_COUNT, None),
    ({"gpus": (GPU, OTHER_GPU, replace(GPU, leaf_key_sha256="03" * 32))}, Claim.GPU_COUNT, None),
    ({"gpus": ()}, Claim.GPU_COUNT, None),
    ({"gpus": (GPU, replace(OTHER_GPU, driver_version="580.95.06"))}, Claim.DRIVER_VERSION, "driver-1"),
    ({"gpus": (GPU, replace(OTHER_GPU, driver_version=""))}, Claim.DRIVER_VERSION, "driver-1"),
    ({"gpus": (GPU, replace(OTHER_GPU, vbios_version="96.00.74.00.1B"))}, Claim.VBIOS_VERSION, "vbios-1"),
    ({"keyturn": replace(KEYTURN, environment=1)}, Claim.ENVIRONMENT, None),
    ({"keyturn": replace(KEYTURN, devtools=1)}, Claim.DEVTOOLS, None),
    ({"keyturn": replace(KEYTURN, cc_feature=0)}, Claim.MODES, None),
    ({"keyturn": replace(KEYTURN, cc_feature=0, multi_gpu_mode=1)}, Claim.MODES, None),
    ({"keyturn": replace(KEYTURN, multi_gpu_mode=2)}, Claim.MODES, None),
    ({"gpus": (GPU, replace(OTHER_GPU, feature_flag=2))}, Claim.MODES, None),
    ({"gpus": (GPU, replace(OTHER_GPU, feature_flag=3))}, Claim.MODES, None),
    ({"gpus": (GPU, replace(OTHER_GPU, protected_pcie=True))}, Claim.MODES, None),
    (ppcie(gpus=(PPCIE_GPUS[0], replace(PPCIE_GPUS[1], protected_pcie=False))), Claim.MODES, None),
    (ppcie(gpus=(PPCIE_GPUS[0], replace(PPCIE_GPUS[1], feature_flag=0))), Claim.MODES, None),
    (ppcie(switches=()), Claim.MODES, None),
    (ppcie(keyturn=KEYTURN), Claim.MODES, None),
    ({"switches": (SWITCH,), "data": policy(gpu__switch_vbios_versions=SWITCH_ROW)}, Claim.MODES, None),
    (ppcie(switches=(SWITCH, replace(SWITCH, vbios_version="96.10.55.00.02"))), Claim.SWITCH_VBIOS_VERSION, "switch-1"),
    ({"keyturn": replace(KEYTURN, ready=True)}, Claim.READY, None),
    ({"data": policy(gpu__ready="true")}, Claim.READY, None),
    ({"keyturn": replace(KEYTURN, renewal=True)}, Claim.READY, None),
    ({"data": policy(gpu__ready="true"), "keyturn": replace(KEYTURN, renewal=True)}, Claim.READY, None),
    ({"keyturn": replace(KEYTURN, manifest_digest="sha256:" + "0" * 64)}, Claim.MANIFEST, "model-3"),
    ({"keyturn": replace(KEYTURN, server_command_digest="sha256:" + "0" * 64)}, Claim.COMMAND, "server-1"),
]


@pytest.mark.parametrize(("case", "claim", "value"), WRONG_CLAIMS)
def test_one_wrong_claim_is_denied_by_its_name(case: dict[str, object], claim: Claim, value: str | None) -> None:
    error = denied(**case)
    assert (error.reason, error.claim, error.reference_value_id) == (DenialReason.CLAIM, claim.value, value)


EMPTY = {
    "manifest_digests": Claim.MANIFEST,
    "server_command_digests": Claim.COMMAND,
    "snp.measurements": Claim.MEASUREMENT,
    "snp.host_data": Claim.HOST_DATA,
    "snp.minimum_tcb": Claim.TCB_PRODUCT,
    "gpu.driver_versions": Claim.DRIVER_VERSION,
    "gpu.vbios_versions": Claim.VBIOS_VERSION,
    "gpu.modes": Claim.MODES,
}
MISSING = EMPTY | {
    "revoked": Claim.REVOKED,
    "not_after": Claim.NOT_AFTER,
    "snp.debug": Claim.DEBUG,
    "snp.vmpl": Claim.VMPL,
    "gpu.count": Claim.GPU_COUNT,
    "gpu.ready": Claim.READY,
}


TDX_EMPTY = {
    "tdx__mr_td": Claim.MR_TD,
    "tdx__mr_config_id": Claim.MR_CONFIG_ID,
    "tdx__rtmr_1": Claim.RTMR_1,
    "tdx__rtmr_2": Claim.RTMR_2,
    "tdx__tcb": Claim.TCB_STATUS,
}
TDX_MISSING = TDX_EMPTY | {"tdx__minimum_tee_tcb_svn": Claim.TEE_TCB_SVN}


@pytest.mark.parametrize(("field", "claim"), [*MISSING.items(), *TDX_MISSING.items()])
def test_a_missing_field_matches_nothing(field: str, claim: Claim) -> None:
    case = {"data": tdx_policy(**{field: None}), "td": td()} if field in TDX_ROW else {"data": policy(**{field: None})}
    error = denied(**case)
    assert (error.reason, error.claim, error.reference_value_id) == (DenialReason.REFERENCE_VALUE, claim.value, None)


@pytest.mark.parametrize(
    ("field", "claim"),
    [*EMPTY.items(), *TDX_EMPTY.items(), ("tdx__rtmr_0", Claim.RTMR_0), ("tdx__rtmr_3", Claim.RTMR_3)],
)
def test_an_empty_list_matches_nothing(field: str, claim: Claim) -> None:
    error = denied(
        **({"data": tdx_policy(**{field: "[]"}), "td": td()} if "tdx" in field else {"data": policy(**{field: "[]"})})
    )
    assert (error.reason, error.claim) == (DenialReason.REFERENCE_VALUE, claim.value)


STORE = Ident("kbs:///models/store/1")


def denied_credentials(data: bytes, uri: Ident = STORE) -> KeyReleaseDeniedError:
    table = parse_policy(data)
    with pytest.raises(KeyReleaseDeniedError) as caught:
        table.check_credentials(table.live_row(URI, NOW), uri)
    assert caught.value.claim == Claim.CREDENTIALS_URI.value
    return caught.value


def test_a_row_that_names_no_credentials_gives_none() -> None:
    assert denied_credentials(policy()).reason is DenialReason.REFERENCE_VALUE


def test_other_credentials_than_the_rows_are_denied() -> None:
    data = policy(credentials_uri=f'"{STORE}"')
    table = parse_policy(data)
    table.check_credentials(table.live_row(URI, NOW), STORE)
    assert denied_credentials(data, Ident("kbs:///models/store/2")).reason is DenialReason.CLAIM
    assert denied_credentials(data, URI).reason is DenialReason.CLAIM


def test_every_field_of_a_row_is_required_by_the_schema_or_matches_nothing_without() -> None:
    for field in ROW.keys() - {"lease_s"}:
        with pytest.raises((KeyReleaseDeniedError, ConfigError)):
            judge(policy(**{field: None}))


OTHER_DENIALS = [
    ({"key_uri": Ident("kbs:///models/tiny/2")}, DenialReason.POLICY, Claim.ROW),
    ({"data": b'schema = "keyturn-policy/v1"\nversion = "2026-11-22"\n'}, DenialReason.POLICY, Claim.ROW),
    ({"data": policy(revoked="true")}, DenialReason.POLICY, Claim.REVOKED),
    ({"now": datetime(2026, 12, 31, 0, 0, 1, tzinfo=UTC)}, DenialReason.POLICY, Claim.NOT_AFTER),
    ({"data": policy(**dict.fromkeys(SNP_FIELDS))}, DenialReason.REFERENCE_VALUE, Claim.TEE),
    ({"data": policy(**dict.fromkeys(SNP_FIELDS)), "td": td()}, DenialReason.REFERENCE_VALUE, Claim.TEE),
    ({"product": Product.MILAN}, DenialReason.REFERENCE_VALUE, Claim.TCB_PRODUCT),
    (
        {
            "data": policy(snp__minimum_tcb=TURIN_ROW_WITHOUT_FMC),
            "product": Product.TURIN,
            "report": replace(REPORT, reported_tcb=TURIN, launch_tcb=TURIN),
        },
        DenialReason.REFERENCE_VALUE,
        Claim.TCB_FMC,
    ),
    ({"gpus": (GPU, GPU)}, DenialReason.DEVICE, Claim.GPU_DUPLICATE),
    ({"gpus": (GPU, replace(OTHER_GPU, leaf_key_sha256=GPU.leaf_key_sha256))}, DenialReason.DEVICE, Claim.GPU_DUPLICATE),
    ({"gpus": (GPU, GPU, OTHER_GPU)}, DenialReason.DEVICE, Claim.GPU_DUPLICATE),
    ({"keyturn": None}, DenialReason.DEVICE, Claim.KEYTURN),
]


@pytest.mark.parametrize(("case", "reason", "claim"), OTHER_DENIALS)
def test_what_no_reference_value_can_allow_is_denied_by_its_name(
    case: dict[str, object], reason: DenialReason, claim: Claim
) -> None:
    error = denied(**case)
    assert (error.reason, error.claim) == (reason, claim.value)


def test_the_tables_above_reach_every_claim() -> None:
    reached = {claim for _, claim, _ in WRONG_CLAIMS} | set(MISSING.values()) | {claim for _, _, claim in OTHER_DENIALS}
    reached |= set(TDX_MISSING.values()) | {Claim.CREDENTIALS_URI}  # that one is asked for after the Verdict, above
    assert reached == set(Claim)


def test_every_status_can_be_allowed_by_its_name_and_there_is_none_for_revoked() -> None:
    for status in TcbStatus:
        assert judge(tdx_policy(tdx__tcb=f'["{status.value}"]'), td=td(status))
    with pytest.raises(ConfigError):
        parse_policy(tdx_policy(tdx__tcb='["Revoked"]'))


def test_an_event_log_may_be_required_and_may_always_come() -> None:
    with_log = replace(td(), event_log=True)
    for row in (tdx_policy(), tdx_policy(tdx__event_log='"required"')):
        assert judge(row, td=with_log)


def test_a_module_that_is_newer_in_every_component_is_accepted() -> None:
    newer = bytes((7, 1, 4)).ljust(16, b"\0")
    assert judge(tdx_policy(), td=td(tee_tcb_svn=newer, tee_tcb_svn_2=newer, mr_service_td=bytes(48)))


def test_the_registers_of_hardware_and_run_time_are_looked_at_where_they_are_listed() -> None:
    listed = {f"tdx__rtmr_{n}": f'[{{ id = "rtmr-{n}", value = "{f"5{n}" * 48}" }}]' for n in (0, 3)}
    matched = judge(tdx_policy(**listed), td=td()).reference_value_ids
    assert {"rtmr-0", "rtmr-3"} <= set(matched)
    assert judge(tdx_policy(), td=td(rtmr_0=bytes(48), rtmr_3=bytes(48)))


def test_the_last_moment_of_a_row_still_counts() -> None:
    assert judge(now=datetime(2026, 12, 31, tzinfo=UTC))


def test_a_higher_tcb_than_the_minimum_is_accepted() -> None:
    higher = TcbVersion(bootloader=10, tee=2, snp=24, microcode=72)
    assert judge(report=replace(REPORT, reported_tcb=higher))


def test_a_turin_guest_is_held_against_the_turin_minimum() -> None:
    both = ROW["snp.minimum_tcb"][:-1] + ", " + TURIN_ROW[1:]
    appraisal = judge(
        policy(snp__minimum_tcb=both), product=Product.TURIN, report=replace(REPORT, reported_tcb=TURIN, launch_tcb=TURIN)
    )
    assert "tcb-2" in appraisal.reference_value_ids and "tcb-1" not in appraisal.reference_value_ids


def test_protected_pcie_is_allowed_where_the_row_says_so() -> None:
    assert "switch-1" in judge(**ppcie()).reference_value_ids  # type: ignore[arg-type]
    older = tuple(replace(gpu, feature_flag=None) for gpu in PPCIE_GPUS)
    assert judge(**ppcie(gpus=older))  # type: ignore[arg-type]


@pytest.mark.parametrize("versions", [None, "[]"])
def test_switches_without_a_reference_value_match_nothing(versions: str | None) -> None:
    error = denied(**ppcie(data=policy(gpu__modes='["ppcie"]', gpu__switch_vbios_versions=versions)))
    assert (error.reason, error.claim) == (DenialReason.REFERENCE_VALUE, Claim.SWITCH_VBIOS_VERSION.value)


@pytest.mark.parametrize("ready", ["false", "true"])
def test_at_a_renewal_the_ready_state_is_set_whoever_had_to_set_it(ready: str) -> None:
    renewing = replace(KEYTURN, ready=True, renewal=True)
    assert judge(policy(gpu__ready=ready), keyturn=renewing)
    error = denied(data=policy(gpu__ready=None), keyturn=renewing)
    assert (error.reason, error.claim) == (DenialReason.REFERENCE_VALUE, Claim.READY.value)


def test_a_driver_that_reports_no_feature_flag_is_not_held_against_it() -> None:
    assert judge(gpus=(replace(GPU, feature_flag=None), OTHER_GPU))


def test_a_row_for_guests_without_gpus_needs_no_gpu_values() -> None:
    gpu_fields = [name for name in ROW if name.startswith("gpu.") and name != "gpu.count"]
    data = policy(**dict.fromkeys(gpu_fields), gpu__count="0")
    assert judge(data, gpus=(), keyturn=None).reference_value_ids == MATCHED[:3]
    assert denied(data=data).claim == Claim.GPU_COUNT.value


BROKEN = [
    (policy().replace(b"keyturn-policy/v1", b"keyturn-policy/v2"), ConfigProblem.WRONG_SCHEMA, "schema"),
    (policy() + b"measurments = []\n", ConfigProblem.UNKNOWN_KEY, "row[0].measurments"),
    (policy() + b"snp.svn = 1\n", ConfigProblem.UNKNOWN_KEY, "row[0].snp.svn"),
    (policy(key_uri=None), ConfigProblem.MISSING_KEY, "row[0].key_uri"),
    (policy(min_model_version=None), ConfigProblem.MISSING_KEY, "row[0].min_model_version"),
    (policy(release_channel=None), ConfigProblem.MISSING_KEY, "row[0].release_channel"),
    (policy(revoked='"no"'), ConfigProblem.WRONG_TYPE, "row[0].revoked"),
    (policy(not_after="2026-12-31T00:00:00"), ConfigProblem.BAD_VALUE, "row[0].not_after"),
    (policy(key_uri='"kbs:///models/../1"'), ConfigProblem.BAD_VALUE, "row[0].key_uri"),
    (policy(snp__measurements='[{ id = "m", value = "" }]'), ConfigProblem.BAD_VALUE, "row[0].snp.measurements[0].value"),
    (policy(snp__host_data='[{ id = "m", value = "" }]'), ConfigProblem.BAD_VALUE, "row[0].snp.host_data[0].value"),
    (policy(gpu__driver_versions='[{ id = "m", value = "" }]'), ConfigProblem.BAD_VALUE, "row[0].gpu.driver_versions[0].value"),
    (policy(gpu__driver_versions='[{ id = "", value = "1" }]'), ConfigProblem.BAD_VALUE, "row[0].gpu.driver_versions[0].id"),
    (policy(gpu__driver_versions='[{ id = "config-1", value = "1" }]'), ConfigProblem.BAD_VALUE, "row[0].gpu.driver_versions"),
    (policy(snp__minimum_tcb=TURIN_ROW[:-1] + "," + TURIN_ROW[1:].replace("-2", "-3")), ConfigProblem.BAD_VALUE,
     "row[0].snp.minimum_tcb"),
    (policy(tdx__mr_td=TDX_ROW["tdx__mr_td"]), ConfigProblem.BAD_VALUE, "row[0].tdx"),
    (tdx_policy(tdx__tcb='["Revoked"]'), ConfigProblem.BAD_VALUE, "row[0].tdx.tcb[0]"),
    (tdx_policy(tdx__rtmr_0=TDX_ROW["tdx__rtmr_1"]), ConfigProblem.BAD_VALUE, "row[0].tdx.rtmr_1"),
    (tdx_policy(tdx__debug="false"), ConfigProblem.UNKNOWN_KEY, "row[0].tdx.debug"),
    (policy() + policy().split(b"\n", 2)[2], ConfigProblem.BAD_VALUE, "row[1].key_uri"),
    (policy(credentials_uri='"kbs:///models/store"'), ConfigProblem.BAD_VALUE, "row[0].credentials_uri"),
    (policy(credentials_uri=f'"{URI}"'), ConfigProblem.BAD_VALUE, "row[0].credentials_uri"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "problem", "key"), BROKEN)
def test_a_broken_policy_is_refused_with_its_place(data: bytes, problem: ConfigProblem, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(data)
    assert (caught.value.problem, caught.value.key) == (problem, key)
