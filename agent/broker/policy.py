"""The broker's policy: one row per key URI, and the appraisal of verified claims against it.

Pure. Takes claims whose signatures `agent/verify` has checked and either returns the row with the ids of the reference
values that matched, or raises the denial with the first claim that failed. No row is a denial; an empty or missing field
matches nothing; a device that says nothing matches nothing.

The lists of a row are alternatives, each on its own: any listed measurement goes with any listed HOST_DATA. What belongs
together only as a pair needs two key URIs. So do guests of both TEEs: a row has the section of one, as the weaker would decide.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from agent.closed import Ident
from agent.config import parse_toml
from agent.errors import ConfigError, ConfigProblem, DenialReason, KeyReleaseDeniedError
from agent.evidence.binding import KeyturnClaims
from agent.evidence.snp_abi import TcbVersion
from agent.verify.nvidia import GpuClaims, SwitchClaims
from agent.verify.snp import SnpClaims
from agent.verify.tdx import TdxClaims

SCHEMA = "keyturn-policy/v1"
PRODUCTION_ENVIRONMENT = 2
PROTECTED_PCIE = 1  # NVML's `multiGpuMode`

_IDENT = r"^[A-Za-z0-9_][A-Za-z0-9_.:/@+\[\]-]{0,127}\Z"
_Name = Annotated[str, msgspec.Meta(pattern=_IDENT)]
_Level = Annotated[int, msgspec.Meta(ge=0, le=255)]
_KeyUri = Annotated[
    str, msgspec.Meta(pattern=r"^kbs:///[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){2}\Z", max_length=128)
]


_TcbStatus = Literal[
    "not_evaluated",
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]


class Claim(enum.Enum):
    """Every claim a denial can name here, in the order of the checks."""

    ROW = "policy.row"
    REVOKED = "policy.revoked"
    NOT_AFTER = "policy.not_after"
    CREDENTIALS_URI = "policy.credentials_uri"
    TEE = "policy.tee"
    MEASUREMENT = "snp.measurement"
    HOST_DATA = "snp.host_data"
    DEBUG = "snp.policy.debug"
    MIGRATION = "snp.policy.migrate_ma"
    VMPL = "snp.vmpl"
    TCB_PRODUCT = "snp.tcb.product"
    TCB_BOOTLOADER = "snp.tcb.bootloader"
    TCB_TEE = "snp.tcb.tee"
    TCB_SNP = "snp.tcb.snp"
    TCB_MICROCODE = "snp.tcb.microcode"
    TCB_FMC = "snp.tcb.fmc"
    MR_TD = "tdx.mr_td"
    MR_CONFIG_ID = "tdx.mr_config_id"
    RTMR_0 = "tdx.rtmr_0"
    RTMR_1 = "tdx.rtmr_1"
    RTMR_2 = "tdx.rtmr_2"
    RTMR_3 = "tdx.rtmr_3"
    EVENT_LOG = "tdx.event_log"
    TD_MIGRATABLE = "tdx.attributes.migratable"
    TD_SEPT_VE = "tdx.attributes.sept_ve_disable"
    TEE_TCB_SVN = "tdx.tee_tcb_svn"
    TCB_STATUS = "tdx.tcb"
    GPU_DUPLICATE = "gpu.duplicate"
    GPU_COUNT = "gpu.count"
    DRIVER_VERSION = "gpu.driver_version"
    VBIOS_VERSION = "gpu.vbios_version"
    SWITCH_VBIOS_VERSION = "gpu.switch_vbios_version"
    KEYTURN = "keyturn.claims"
    ENVIRONMENT = "gpu.environment"
    DEVTOOLS = "gpu.devtools"
    MODES = "gpu.modes"
    READY = "gpu.ready"
    MANIFEST = "keyturn.manifest_digest"
    COMMAND = "keyturn.server_command_digest"


class GpuMode(enum.Enum):
    """The confidential-computing modes a row can allow: NVML's `ccFeature` and `multiGpuMode`."""

    CC = "cc"
    PROTECTED_PCIE = "ppcie"
    NVLE = "nvle"


# FEATURE_FLAG of the GPU's own report: 0 one GPU, 1 several, 2 protected PCIe; what another value means we do not know.
_FLAGS: dict[GpuMode | None, tuple[int, ...]] = {GpuMode.CC: (0, 1), GpuMode.PROTECTED_PCIE: (2,), GpuMode.NVLE: (0, 1)}
_MODES = {(1, 0): GpuMode.CC, (0, PROTECTED_PCIE): GpuMode.PROTECTED_PCIE, (1, 2): GpuMode.NVLE}


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unknown keys are errors in every section."""


class _Measurement(_Section, frozen=True):
    id: _Name
    value: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{96}\Z")]


class _HostData(_Section, frozen=True):
    id: _Name
    value: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Version(_Section, frozen=True):
    id: _Name
    value: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]


class _Digest(_Section, frozen=True):
    id: _Name
    value: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]


class MinimumTcb(_Section, frozen=True):
    """The lowest patch levels of one processor generation. `fmc` is required where the generation has one."""

    id: _Name
    product: Literal["Milan", "Genoa", "Turin", "Venice"]
    bootloader: _Level
    tee: _Level
    snp: _Level
    microcode: _Level
    fmc: _Level | None = None


class SnpRow(_Section, frozen=True):
    """Reference values of the CPU TEE. `debug` is the guest policy bit, `vmpl` the privilege level of the report."""

    measurements: tuple[_Measurement, ...] = ()
    host_data: tuple[_HostData, ...] = ()
    minimum_tcb: tuple[MinimumTcb, ...] = ()
    debug: bool | None = None
    vmpl: Annotated[int, msgspec.Meta(ge=0, le=3)] | None = None


class TcbSvn(_Section, frozen=True):
    """The lowest security version of each component of TEE_TCB_SVN: the TDX module's minor and major one, then microcode."""

    id: _Name
    value: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class TdxRow(_Section, frozen=True):
    """Reference values of a TD. MRTD measures the firmware alone, so boot loader and kernel (RTMR 1 and 2) must be listed too.

    Attributes:
        rtmr_0: of the virtual hardware, as the firmware found it, and rtmr_3, extended at run time: None does not look at
            them; an empty list still matches nothing. A guest that measures the release of the key has another rtmr_3 in every
            boot from then on: where it is listed, no lease is renewed.
        event_log: `required`: a log must come with the quote; None: it may. One that comes must replay to the quote's RTMRs.
        tcb: Intel's words for TCB levels that are good enough; `not_evaluated` for platforms of which the broker has no
            collateral. A revoked platform is never good enough, nor is a debug TD: `verify_tdx` refuses that one.
    """

    mr_td: tuple[_Measurement, ...] = ()
    mr_config_id: tuple[_Measurement, ...] = ()
    rtmr_0: tuple[_Measurement, ...] | None = None
    rtmr_1: tuple[_Measurement, ...] = ()
    rtmr_2: tuple[_Measurement, ...] = ()
    rtmr_3: tuple[_Measurement, ...] | None = None
    event_log: Literal["required"] | None = None
    minimum_tee_tcb_svn: TcbSvn | None = None
    tcb: tuple[_TcbStatus, ...] = ()


class GpuRow(_Section, frozen=True):
    """Reference values of the GPUs.

    Attributes:
        modes: `ppcie` demands the whole set: eight GPUs and four NVSwitches that name each other.
        switch_vbios_versions: for that mode.
        ready: the ready state when a boot attests first, true where its init sets it.
    """

    count: Annotated[int, msgspec.Meta(ge=0, le=16)] | None = None
    driver_versions: tuple[_Version, ...] = ()
    vbios_versions: tuple[_Version, ...] = ()
    switch_vbios_versions: tuple[_Version, ...] = ()
    modes: tuple[GpuMode, ...] = ()
    ready: bool | None = None


class Row(_Section, frozen=True):
    """Who may have one key, and what goes into the token with it.

    Attributes:
        not_after: the last moment of the row, with a time zone.
        credentials_uri: the credentials of the model's store that go with the key; None: none do.
        min_model_version: the rollback floor, 0 for none.
        lease_s: seconds the key may be used; None for without end.
        snp, tdx: one of the two: the TEE that the guest must have.
    """

    key_uri: _KeyUri
    release_channel: _Name
    min_model_version: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    lease_s: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    revoked: bool | None = None
    not_after: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    credentials_uri: _KeyUri | None = None
    manifest_digests: tuple[_Digest, ...] = ()
    server_command_digests: tuple[_Digest, ...] = ()
    snp: SnpRow | None = None
    tdx: TdxRow | None = None
    gpu: GpuRow = GpuRow()


class _PolicyFile(_Section, frozen=True):
    schema: Literal["keyturn-policy/v1"]
    version: _Name
    row: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """A whole policy file. Replaced as one value, so a decision never sees two versions."""

    version: Ident
    rows: Mapping[str, Row]

    def live_row(self, key_uri: Ident, now: datetime) -> Row:
        """The row of a key URI, if it is there, not revoked and not expired. `now` has a time zone.

        Raises:
            KeyReleaseDeniedError: otherwise.
        """
        row = self.rows.get(key_uri)
        # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
        if row is None:
            raise self.denial(DenialReason.POLICY, Claim.ROW)
        # refusal: test_a_missing_field_matches_nothing
        if row.revoked is None:
            raise self.denial(DenialReason.REFERENCE_VALUE, Claim.REVOKED)
        # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
        if row.revoked:
            raise self.denial(DenialReason.POLICY, Claim.REVOKED)
        # refusal: test_a_missing_field_matches_nothing
        if row.not_after is None:
            raise self.denial(DenialReason.REFERENCE_VALUE, Claim.NOT_AFTER)
        # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
        if now > row.not_after:
            raise self.denial(DenialReason.POLICY, Claim.NOT_AFTER)
        return row

    def check_credentials(self, row: Row, uri: Ident) -> None:
        """Do these credentials go with the key of this row?

        Raises:
            KeyReleaseDeniedError: no.
        """
        # refusal: test_a_row_that_names_no_credentials_gives_none
        if row.credentials_uri is None:
            raise self.denial(DenialReason.REFERENCE_VALUE, Claim.CREDENTIALS_URI)
        # refusal: test_other_credentials_than_the_rows_are_denied
        if row.credentials_uri != uri:
            raise self.denial(DenialReason.CLAIM, Claim.CREDENTIALS_URI)

    def denial(self, reason: DenialReason, claim: Claim, reference_value_id: str | None = None) -> KeyReleaseDeniedError:
        """A denial under this version of the policy."""
        value = Ident(reference_value_id) if reference_value_id is not None else None
        return KeyReleaseDeniedError(reason, Ident(claim.value), value, self.version)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """Every check passed: the row and the ids of the reference values that matched, in the order of the checks."""

    row: Row
    reference_value_ids: tuple[Ident, ...]


def appraise(
    table: PolicyTable,
    key_uri: Ident,
    *,
    cpu: SnpClaims | TdxClaims,
    gpus: Sequence[GpuClaims],
    switches: Sequence[SwitchClaims] = (),
    keyturn: KeyturnClaims | None,
    now: datetime,
) -> Appraisal:
    """Hold verified claims against the row of the key they ask for.

    Args:
        table: the policy.
        key_uri: the key that is asked for.
        cpu: what the CPU said.
        gpus: what each GPU said, in any order.
        switches: what each NVSwitch said; if there is one, `check_topology` holds of these and the GPUs.
        keyturn: what the agent in the measured image says of itself, covered by the report; None when there are no GPUs.
        now: with a time zone.
    Raises:
        KeyReleaseDeniedError: with the first claim that failed. The reference value it names is the only candidate, or
            the first of the list.
    """
    judge = _Judge(table)
    one_of, equal, require = judge.one_of, judge.equal, judge.require

    # 1. The row.
    row = table.live_row(key_uri, now)

    # 2. The CPU TEE. A section is for its own TEE alone.
    # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
    if row.snp is None and row.tdx is None:
        raise table.denial(DenialReason.REFERENCE_VALUE, Claim.TEE)
    match cpu, row.snp, row.tdx:
        case SnpClaims(), SnpRow() as snp, _:
            _appraise_snp(judge, snp, cpu)
        case TdxClaims(), _, TdxRow() as tdx:
            _appraise_tdx(judge, tdx, cpu)
        case _:
            # refusal: test_one_wrong_claim_is_denied_by_its_name
            raise table.denial(DenialReason.CLAIM, Claim.TEE)

    # 3. The GPUs: first that they are different ones, so that a doubled one is not taken for a wrong number.
    # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
    if len({gpu.leaf_key_sha256 for gpu in gpus}) != len(gpus):
        raise table.denial(DenialReason.DEVICE, Claim.GPU_DUPLICATE)
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    equal(Claim.GPU_COUNT, row.gpu.count, len(gpus))
    for gpu in gpus:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.DRIVER_VERSION, row.gpu.driver_versions, gpu.driver_version)
        one_of(Claim.VBIOS_VERSION, row.gpu.vbios_versions, gpu.vbios_version)
    for switch in switches:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.SWITCH_VBIOS_VERSION, row.gpu.switch_vbios_versions, switch.vbios_version)

    # 4. What the agent says of itself. Without GPUs there is no place for it; the configuration is covered by step 2.
    # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
    if gpus and keyturn is None:
        raise table.denial(DenialReason.DEVICE, Claim.KEYTURN)
    if keyturn is not None:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        require(Claim.ENVIRONMENT, keyturn.environment == PRODUCTION_ENVIRONMENT)
        require(Claim.DEVTOOLS, keyturn.devtools == 0)
        # refusal: test_an_empty_list_matches_nothing
        if not row.gpu.modes:
            raise table.denial(DenialReason.REFERENCE_VALUE, Claim.MODES)
        mode = _MODES.get((keyturn.cc_feature, keyturn.multi_gpu_mode))
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        require(Claim.MODES, mode in row.gpu.modes)
        # What the GPUs themselves sign of it; drivers before 580 leave the flag out, those before 550 both.
        flags = {gpu.feature_flag for gpu in gpus} - {None}
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        require(Claim.MODES, all(flag in _FLAGS.get(mode, ()) for flag in flags))
        protected = {gpu.protected_pcie for gpu in gpus} - {None}
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        require(Claim.MODES, protected <= {mode is GpuMode.PROTECTED_PCIE})
        # Evidence of the NVSwitches goes with that mode, and with no other.
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        require(Claim.MODES, bool(switches) == (mode is GpuMode.PROTECTED_PCIE))
        # Whoever renews a lease has passed the gate, and the state is never set back.
        ready = True if keyturn.renewal and row.gpu.ready is not None else row.gpu.ready
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        equal(Claim.READY, ready, keyturn.ready)
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.MANIFEST, row.manifest_digests, keyturn.manifest_digest)
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.COMMAND, row.server_command_digests, keyturn.server_command_digest)
    return Appraisal(row, tuple(Ident(name) for name in dict.fromkeys(judge.matched)))


class _Judge:
    """Single claims against values of a row, and the ids of those that matched, in the order of the checks."""

    def __init__(self, table: PolicyTable) -> None:
        self.table = table
        self.matched: list[str] = []

    def one_of(self, claim: Claim, values: Sequence[_Measurement | _HostData | _Version | _Digest], got: str) -> None:
        # refusal: test_an_empty_list_matches_nothing
        if not values:
            raise self.table.denial(DenialReason.REFERENCE_VALUE, claim)
        for value in values:
            if value.value == got:
                self.matched.append(value.id)
                return
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        raise self.table.denial(DenialReason.CLAIM, claim, values[0].id)

    def equal(self, claim: Claim, value: int | None, got: int) -> None:
        # refusal: test_a_missing_field_matches_nothing
        if value is None:
            raise self.table.denial(DenialReason.REFERENCE_VALUE, claim)
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        self.require(claim, value == got)

    def require(self, claim: Claim, holds: bool) -> None:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        if not holds:
            raise self.table.denial(DenialReason.CLAIM, claim)


def _appraise_snp(judge: _Judge, row: SnpRow, claims: SnpClaims) -> None:
    one_of, equal, require = judge.one_of, judge.equal, judge.require
    report = claims.report

    # 1. The guest: what was launched, with which configuration, and who else may look into it.
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    one_of(Claim.MEASUREMENT, row.measurements, report.measurement.hex())
    one_of(Claim.HOST_DATA, row.host_data, report.host_data.hex())
    equal(Claim.DEBUG, row.debug, report.policy.debug)
    require(Claim.MIGRATION, not report.policy.migrate_ma)  # a migration agent holds the guest's memory: no row can allow it
    equal(Claim.VMPL, row.vmpl, report.vmpl)

    # 2. The firmware: the one that signed, and the one under which the guest was launched, which may be older.
    minimum = next((entry for entry in row.minimum_tcb if entry.product == claims.product.value), None)
    # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
    if minimum is None:
        raise judge.table.denial(DenialReason.REFERENCE_VALUE, Claim.TCB_PRODUCT)
    for tcb in (report.reported_tcb, report.launch_tcb):
        _appraise_tcb(judge.table, minimum, tcb)
    judge.matched.append(minimum.id)


def _appraise_tdx(judge: _Judge, row: TdxRow, claims: TdxClaims) -> None:
    one_of, require = judge.one_of, judge.require
    td = claims.td

    # 1. The TD: what was launched, with which configuration, and what its firmware and boot loader started.
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    one_of(Claim.MR_TD, row.mr_td, td.mr_td.hex())
    one_of(Claim.MR_CONFIG_ID, row.mr_config_id, td.mr_config_id.hex())
    one_of(Claim.RTMR_1, row.rtmr_1, td.rtmr_1.hex())
    one_of(Claim.RTMR_2, row.rtmr_2, td.rtmr_2.hex())
    if row.rtmr_0 is not None:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.RTMR_0, row.rtmr_0, td.rtmr_0.hex())
    if row.rtmr_3 is not None:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        one_of(Claim.RTMR_3, row.rtmr_3, td.rtmr_3.hex())
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    require(Claim.EVENT_LOG, claims.event_log or row.event_log is None)

    # 2. Nobody else holds its memory or can come to, and no page is taken from it unnoticed. No row can allow either.
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    require(Claim.TD_MIGRATABLE, not td.td_attributes.migratable and not td.td_attributes.service_td_extensions)
    require(Claim.TD_SEPT_VE, td.td_attributes.sept_ve_disable)

    # 3. The TDX module: the one under which the TD was launched and, where the quote says so, the one that runs.
    minimum = row.minimum_tee_tcb_svn
    # refusal: test_a_missing_field_matches_nothing
    if minimum is None:
        raise judge.table.denial(DenialReason.REFERENCE_VALUE, Claim.TEE_TCB_SVN)
    lowest = bytes.fromhex(minimum.value)
    for levels in (td.tee_tcb_svn, td.tee_tcb_svn_2):
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        if levels is not None and any(got < least for got, least in zip(levels, lowest, strict=True)):
            raise judge.table.denial(DenialReason.CLAIM, Claim.TEE_TCB_SVN, minimum.id)
    judge.matched.append(minimum.id)

    # 4. What Intel says of the platform, or that nobody asked.
    # refusal: test_an_empty_list_matches_nothing
    if not row.tcb:
        raise judge.table.denial(DenialReason.REFERENCE_VALUE, Claim.TCB_STATUS)
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    require(Claim.TCB_STATUS, claims.tcb_status.value in row.tcb)


def _appraise_tcb(table: PolicyTable, minimum: MinimumTcb, got: TcbVersion) -> None:
    levels = (
        (Claim.TCB_BOOTLOADER, minimum.bootloader, got.bootloader),
        (Claim.TCB_TEE, minimum.tee, got.tee),
        (Claim.TCB_SNP, minimum.snp, got.snp),
        (Claim.TCB_MICROCODE, minimum.microcode, got.microcode),
    )
    for claim, lowest, level in levels:
        # refusal: test_one_wrong_claim_is_denied_by_its_name
        if level < lowest:
            raise table.denial(DenialReason.CLAIM, claim, minimum.id)
    # refusal: test_what_no_reference_value_can_allow_is_denied_by_its_name
    if got.fmc is not None and minimum.fmc is None:
        raise table.denial(DenialReason.REFERENCE_VALUE, Claim.TCB_FMC, minimum.id)
    # refusal: test_one_wrong_claim_is_denied_by_its_name
    if minimum.fmc is not None and (got.fmc is None or got.fmc < minimum.fmc):
        raise table.denial(DenialReason.CLAIM, Claim.TCB_FMC, minimum.id)


def parse_policy(data: bytes) -> PolicyTable:
    """Parse a policy file: UTF-8 TOML, at most 1 MiB.

    Raises:
        ConfigError: with the place concerned; never with a value.
    """
    file = parse_toml(data, _PolicyFile, SCHEMA)
    rows: dict[str, Row] = {}
    for index, row in enumerate(file.row):
        # refusal: test_a_broken_policy_is_refused_with_its_place
        if row.key_uri in rows:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"row[{index}].key_uri"))
        # refusal: test_a_broken_policy_is_refused_with_its_place
        if row.snp is not None and row.tdx is not None:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"row[{index}].tdx"))
        _check_unique(f"row[{index}]", row)
        rows[row.key_uri] = row
    for index, row in enumerate(file.row):
        # A guest opens credentials before its GPU gate, and a key after it.
        # refusal: test_a_broken_policy_is_refused_with_its_place
        if row.credentials_uri in rows:
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"row[{index}].credentials_uri"))
    return PolicyTable(Ident(file.version), rows)


def _check_unique(where: str, row: Row) -> None:
    """One id names one value in a row, and a processor generation has one minimum: a record must not be ambiguous."""
    snp, tdx = row.snp or SnpRow(), row.tdx or TdxRow()
    lists: dict[str, Sequence[_Measurement | _HostData | _Version | _Digest | MinimumTcb | TcbSvn]] = {
        "manifest_digests": row.manifest_digests,
        "server_command_digests": row.server_command_digests,
        "snp.measurements": snp.measurements,
        "snp.host_data": snp.host_data,
        "snp.minimum_tcb": snp.minimum_tcb,
        "tdx.mr_td": tdx.mr_td,
        "tdx.mr_config_id": tdx.mr_config_id,
        "tdx.rtmr_0": tdx.rtmr_0 or (),
        "tdx.rtmr_1": tdx.rtmr_1,
        "tdx.rtmr_2": tdx.rtmr_2,
        "tdx.rtmr_3": tdx.rtmr_3 or (),
        "tdx.minimum_tee_tcb_svn": (tdx.minimum_tee_tcb_svn,) if tdx.minimum_tee_tcb_svn else (),
        "gpu.driver_versions": row.gpu.driver_versions,
        "gpu.vbios_versions": row.gpu.vbios_versions,
        "gpu.switch_vbios_versions": row.gpu.switch_vbios_versions,
    }
    seen: set[str] = set()
    for name, values in lists.items():
        for value in values:
            # refusal: test_a_broken_policy_is_refused_with_its_place
            if value.id in seen:
                raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"{where}.{name}"))
            seen.add(value.id)
    # refusal: test_a_broken_policy_is_refused_with_its_place
    if len({entry.product for entry in snp.minimum_tcb}) != len(snp.minimum_tcb):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident(f"{where}.snp.minimum_tcb"))
