"""The decisions of the broker: is this guest what the policy wants, and may this token have its key, and before it the
credentials that the key's row names.

Verifies through `agent/verify`, appraises through `policy.py`, and writes one audit line for every decision before anybody
learns of it. Blocking: the service calls it in worker threads. Knows no wire and keeps no nonce.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from agent.broker.anchors import TrustAnchors
from agent.broker.audit import AuditLog, AuditRecord, AuditStep, Decision, timestamp
from agent.broker.jwe import seal
from agent.broker.keystore import KeyStore
from agent.broker.policy import PROTECTED_PCIE, PolicyTable, Row, appraise
from agent.broker.token import TOKEN_LIFE_S, TokenKey
from agent.closed import Ident
from agent.errors import (
    BrokerFailureError,
    DenialReason,
    EvidenceCheck,
    EvidenceFormat,
    EvidenceVerificationError,
    KeyReleaseDeniedError,
    MalformedEvidenceError,
    RemoteProtocolError,
    TokenError,
)
from agent.evidence import Evidence, GpuEvidence, GpuNonce, Nonce, RuntimeData, Tee
from agent.evidence.binding import KeyturnClaims, device_nonce, parse_additional_evidence, report_data, split
from agent.handshake import (
    Accepted,
    Attestation,
    CredentialsRequest,
    CredentialsResponse,
    Denied,
    Hello,
    KeyRequest,
    KeyResponse,
    TokenClaims,
)
from agent.verify.nvidia import GpuClaims, SwitchClaims, verify_gpu
from agent.verify.ppcie import verify_ppcie
from agent.verify.snp import SnpClaims, verify_snp
from agent.verify.tdx import TdxClaims, verify_tdx
from agent.verify.tdx_collateral import evaluate_tcb

_CERTIFICATE_CHECKS = (
    EvidenceCheck.CERTIFICATE_CHAIN,
    EvidenceCheck.CERTIFICATE_VALIDITY,
    EvidenceCheck.CERTIFICATE_TCB,
    EvidenceCheck.CERTIFICATE_CHIP_ID,
    EvidenceCheck.REVOCATION,
    EvidenceCheck.REVOCATION_LIST,
    EvidenceCheck.REVOCATION_LIST_SIGNATURE,
    EvidenceCheck.REVOCATION_LIST_VALIDITY,
    EvidenceCheck.TCB_COLLATERAL,
)
_CHAINS = (EvidenceFormat.SNP_CHAIN, EvidenceFormat.NVIDIA_CHAIN, EvidenceFormat.SWITCH_CHAIN, EvidenceFormat.TDX_CHAIN)
_PREFIX = {
    EvidenceFormat.SNP_REPORT: "snp",
    EvidenceFormat.SNP_CHAIN: "snp",
    EvidenceFormat.NVIDIA_REPORT: "gpu",
    EvidenceFormat.NVIDIA_CHAIN: "gpu",
    EvidenceFormat.SWITCH_REPORT: "switch",
    EvidenceFormat.SWITCH_CHAIN: "switch",
    EvidenceFormat.TDX_REPORT: "tdx",
    EvidenceFormat.TDX_QUOTE: "tdx",
    EvidenceFormat.TDX_CHAIN: "tdx",
    EvidenceFormat.EVENT_LOG: "event-log",
    EvidenceFormat.NVIDIA_TOPOLOGY: "ppcie",
    EvidenceFormat.ADDITIONAL: "evidence",
}


Asked = Hello | KeyRequest | CredentialsRequest
"""What a call of the service is about."""


def uri_of(asked: Asked) -> Ident:
    """What it asks for."""
    return asked.credentials_uri if isinstance(asked, CredentialsRequest) else asked.key_uri


class Authority:
    """Decides under one policy, which may be replaced at any time: a decision sees one version of it.

    Args:
        now: the time of day, with a time zone.
    """

    def __init__(
        self,
        policy: PolicyTable,
        anchors: TrustAnchors,
        token_key: TokenKey,
        keys: KeyStore,
        audit: AuditLog,
        *,
        now: Callable[[], datetime],
    ) -> None:
        self.policy = policy
        self._anchors = anchors
        self._token_key = token_key
        self._keys = keys
        self._audit = audit
        self._now = now

    def attest(self, hello: Hello, attestation: Attestation, nonce: Nonce) -> Accepted | Denied:
        """Verify and appraise the Evidence of one handshake.

        Args:
            hello: what the stream began with.
            attestation: Evidence and public key of the guest.
            nonce: the 32 bytes that this stream's last Challenge carried.
        Raises:
            BrokerFailureError: the decision could not be recorded, and so does not count; or there is collateral that cannot
                be read.
        """
        policy, now = self.policy, self._now()
        record = replace(
            self._record(AuditStep.ATTEST, hello.request_id, hello.key_uri, policy, now),
            nonce=Ident(nonce.hex()),
            tee=Ident(hello.tee.value),
        )
        try:
            # 1. A genuine chip signed the report, or a genuine platform the quote.
            evidence = attestation.evidence
            cpu = self._verify_cpu(evidence.primary, now)
            said = _said(cpu)
            record = replace(
                record,
                measurement=Ident(said.measurement.hex()),
                host_data=Ident(said.launch_digest.hex()),
                chip_id_hash=Ident(said.chip_id_hash),
                simulated=cpu.simulated,
            )

            # 2. For this handshake: it covers our nonce, the guest's key and all that was sent about devices.
            runtime = RuntimeData(nonce, attestation.tee_pubkey.x, attestation.tee_pubkey.y)
            # refusal: test_broker_service.py::test_a_second_hello_voids_the_first_nonce
            if said.report_data != report_data(runtime, evidence.additional_evidence):
                raise EvidenceVerificationError(said.format, EvidenceCheck.REPORT_DATA)

            # 3. So did every GPU and NVSwitch, and NVSwitches are those between these GPUs.
            sent, keyturn = parse_additional_evidence(evidence.additional_evidence)
            gpus, switches = self._verify_devices(sent, keyturn, device_nonce(runtime), now)
            simulated = cpu.simulated or any(gpu.simulated for gpu in gpus) or any(switch.simulated for switch in switches)
            record = replace(record, simulated=simulated)

            # 4. What they say is what the row wants.
            appraisal = appraise(policy, hello.key_uri, cpu=cpu, gpus=gpus, switches=switches, keyturn=keyturn, now=now)
        except (MalformedEvidenceError, EvidenceVerificationError, KeyReleaseDeniedError) as error:
            denial = error if isinstance(error, KeyReleaseDeniedError) else _denial_of(error, policy)
            self._record_denial(record, denial)
            return Denied(hello.request_id, denial.reason, denial.claim, denial.reference_value_id, denial.policy_version)

        row, matched = appraisal.row, appraisal.reference_value_ids
        issued_at = int(now.timestamp())
        claims = TokenClaims(
            nonce=nonce,
            tee_pubkey=attestation.tee_pubkey,
            key_uri=hello.key_uri,
            policy_version=policy.version,
            min_model_version=row.min_model_version,
            lease_s=row.lease_s,
            simulated=simulated,
            issued_at=issued_at,
            expires_at=issued_at + TOKEN_LIFE_S,
        )
        token = self._token_key.mint(claims)
        self._audit.append(
            replace(
                record,
                decision=Decision.ALLOWED,
                release_channel=Ident(row.release_channel),
                reference_value_ids=matched,
            )
        )
        return Accepted(hello.request_id, token, policy.version, matched)

    def release(self, request: KeyRequest) -> KeyResponse:
        """The key that the token names, sealed to the key pair that the token names.

        Raises:
            TokenError: the token is not one of ours, or no longer.
            KeyReleaseDeniedError: it is for another key, or the policy does not want it any more.
            RemoteProtocolError: the token's public key is no point on P-256.
            BrokerFailureError: the key is not there, or the decision could not be recorded.
        """
        policy, now = self.policy, self._now()
        record = self._record(AuditStep.RELEASE, request.request_id, request.key_uri, policy, now)
        with self._recorded(record) as attempt:
            claims, _ = self._live(attempt, request.token, policy, now)
            # refusal: test_broker_service.py::test_the_token_of_one_key_does_not_open_another
            if claims.key_uri != request.key_uri:
                raise KeyReleaseDeniedError(DenialReason.POLICY, Ident("token.key_uri"), None, policy.version)

            # Only now is the key touched.
            stored = self._keys.fetch(claims.key_uri)
            sealed = seal(stored.key, claims.tee_pubkey)
            attempt.record = replace(attempt.record, key_version=stored.version)
        return KeyResponse(request.request_id, sealed, stored.key_id, stored.version)

    def release_credentials(self, request: CredentialsRequest) -> CredentialsResponse:
        """The credentials that go with the key that the token names, sealed to the key pair that the token names.

        Raises:
            KeyReleaseDeniedError: the row of that key does not name them, or as `release`.
            AgentError: as `release`.
        """
        policy, now = self.policy, self._now()
        record = self._record(AuditStep.CREDENTIALS, request.request_id, request.credentials_uri, policy, now)
        with self._recorded(record) as attempt:
            claims, row = self._live(attempt, request.token, policy, now)
            # refusal: test_broker_service.py::test_only_the_credentials_of_the_keys_row_are_given
            policy.check_credentials(row, request.credentials_uri)
            sealed = seal(self._keys.fetch_credentials(request.credentials_uri), claims.tee_pubkey)
        return CredentialsResponse(request.request_id, sealed)

    def _live(self, attempt: "_Attempt", token: str, policy: PolicyTable, now: datetime) -> tuple[TokenClaims, Row]:
        """What a token says, and the row that it still holds under."""
        # 1. We signed the token, and it has not expired.
        claims = self._token_key.read(token, int(now.timestamp()))
        attempt.record = replace(attempt.record, nonce=Ident(claims.nonce.hex()), simulated=claims.simulated)

        # 2. A replica that shares our token key may accept simulated evidence; we do not.
        # refusal: test_broker_service.py::test_a_broker_without_simulation_roots_releases_nothing_for_a_simulated_token
        if claims.simulated and not self._anchors.simulation_roots:
            raise KeyReleaseDeniedError(DenialReason.COLLATERAL, Ident("token.simulated"), None, policy.version)

        # 3. The row is still there: it may have been revoked since the Verdict.
        row = policy.live_row(claims.key_uri, now)
        attempt.record = replace(attempt.record, release_channel=Ident(row.release_channel))

        # 4. So are its values: the Verdict was reached under this version of the policy, and its floor and lease stand in
        #    the token. Evidence is not kept, so after any change the guest must attest again.
        # refusal: test_broker_service.py::test_a_token_of_an_earlier_policy_is_refused_and_a_new_one_counts
        if claims.policy_version != policy.version:
            raise KeyReleaseDeniedError(DenialReason.POLICY, Ident("token.policy_version"), None, policy.version)
        return claims, row

    @contextmanager
    def _recorded(self, record: AuditRecord) -> Iterator["_Attempt"]:
        """One audit line for what is released in the block, or refused."""
        attempt = _Attempt(record)
        try:
            yield attempt
        except KeyReleaseDeniedError as error:
            self._record_denial(attempt.record, error)
            raise
        except (TokenError, RemoteProtocolError, BrokerFailureError) as error:
            self._audit.append(replace(attempt.record, decision=Decision.FAILED, reason=failure_reason(error)))
            raise
        self._audit.append(replace(attempt.record, decision=Decision.ALLOWED))

    def record_failure(self, step: AuditStep, asked: Asked | None, reason: Ident) -> None:
        """The audit line of what ended before there was anything to decide.

        Args:
            step: of which.
            asked: what the attestation began with, or the request; None: one that does not parse.
            reason: why it ended.
        Raises:
            BrokerFailureError: the line could not be written.
        """
        request_id, uri = (asked.request_id, uri_of(asked)) if asked else (None, None)
        record = self._record(step, request_id, uri, self.policy, self._now())
        tee = Ident(asked.tee.value) if isinstance(asked, Hello) else None
        self._audit.append(replace(record, decision=Decision.FAILED, reason=reason, tee=tee))

    def _verify_cpu(self, evidence: Evidence, now: datetime) -> SnpClaims | TdxClaims:
        anchors = self._anchors
        match evidence.tee:
            case Tee.SNP:
                lists = anchors.amd_crls.read() if anchors.amd_crls else None
                return verify_snp(evidence, anchors.simulation_roots, anchors.endorsements, now, lists)
            case Tee.TDX:
                claims = verify_tdx(evidence, anchors.simulation_roots, now)
                collateral = anchors.tdx_collateral.find(claims.platform.fmspc) if anchors.tdx_collateral else None
                return evaluate_tcb(claims, evidence, collateral, now)
            case Tee.SAMPLE:
                raise RuntimeError("our wire does not carry it")

    def _verify_devices(
        self, sent: Sequence[GpuEvidence], keyturn: KeyturnClaims | None, nonce: GpuNonce, now: datetime
    ) -> tuple[tuple[GpuClaims, ...], tuple[SwitchClaims, ...]]:
        """Each GPU by itself, or the whole set where there is an NVSwitch or should be one."""
        roots = self._anchors.simulation_roots
        gpus, switches = split(sent)
        # refusal: test_protected_pcie_without_switches_is_denied test_switches_beside_gpus_in_another_mode_are_not_passed_over
        if switches or (keyturn is not None and keyturn.multi_gpu_mode == PROTECTED_PCIE):
            claims = verify_ppcie(gpus, switches, nonce, roots, now)
            return claims.gpus, claims.switches
        return tuple(verify_gpu(gpu, nonce, roots, now) for gpu in gpus), ()

    def _record(
        self, step: AuditStep, request_id: Ident | None, key_uri: Ident | None, policy: PolicyTable, now: datetime
    ) -> AuditRecord:
        return AuditRecord(
            time=timestamp(now),
            step=step,
            decision=Decision.DENIED,
            request_id=request_id,
            key_id=key_uri,
            policy_version=policy.version,
        )

    def _record_denial(self, record: AuditRecord, denial: KeyReleaseDeniedError) -> None:
        reason, value = Ident(denial.reason.value), denial.reference_value_id
        self._audit.append(replace(record, reason=reason, claim=denial.claim, reference_value_id=value))


@dataclass(slots=True)
class _Attempt:
    """A release under way, and what is known of it so far."""

    record: AuditRecord


@dataclass(frozen=True, slots=True)
class _Said:
    """What both TEEs say, under one name each; the rest is the policy's."""

    format: EvidenceFormat
    report_data: bytes
    measurement: bytes
    launch_digest: bytes
    chip_id_hash: str


def _said(claims: SnpClaims | TdxClaims) -> _Said:
    match claims:
        case SnpClaims(report=report):
            return _Said(
                EvidenceFormat.SNP_REPORT, report.report_data, report.measurement, report.host_data, claims.chip_id_hash
            )
        case TdxClaims(td=td):
            return _Said(EvidenceFormat.TDX_QUOTE, td.report_data, td.mr_td, td.mr_config_id, claims.ppid_hash)


def failure_reason(error: TokenError | RemoteProtocolError | BrokerFailureError) -> Ident:
    """The word for a failure in ErrorInfo and audit log: upper case, as google.rpc wants it."""
    match error:
        case TokenError():
            return Ident(f"TOKEN_{error.check.name}")
        case RemoteProtocolError():
            return Ident(f"PROTOCOL_{error.problem.name}")
        case BrokerFailureError():
            return error.reason


def _denial_of(error: MalformedEvidenceError | EvidenceVerificationError, policy: PolicyTable) -> KeyReleaseDeniedError:
    """Evidence that is not genuine, not fresh or not readable, in the words of a denial."""
    prefix = _PREFIX[error.format]
    if isinstance(error, EvidenceVerificationError):
        claim, collateral = f"{prefix}.{error.check.value}", error.check in _CERTIFICATE_CHECKS
    else:
        claim = f"{prefix}.malformed.{error.field}"
        collateral = error.format in _CHAINS
    reason = DenialReason.COLLATERAL if collateral else DenialReason.DEVICE
    return KeyReleaseDeniedError(reason, Ident(claim), None, policy.version)
