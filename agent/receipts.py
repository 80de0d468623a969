"""The notary of a boot: gathers what its receipt says, has the TEE vouch for it, and signs.

Owns the key pair, which is made with the statement and gone with the signature, and the reading of the clock. The format is
`receipt.py`'s. Where a receipt is put is for whoever asked: beside the model, or on the supervisor's faces.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from agent import __version__, cose
from agent.artifact import DestinationKind
from agent.artifact.load import AnyPrepared
from agent.closed import Ident
from agent.config import MeasuredConfig
from agent.events import ReceiptSigned, Stage
from agent.evidence import CompositeEvidence, Evidence
from agent.evidence.collect import Devices
from agent.evidence.gate import ExpectedReady
from agent.evidence.runtime import MeasuredRelease
from agent.handshake import MAX_CERTIFICATE_BYTES, MAX_CERTIFICATES, KeptKey, SealedKey, Verdict
from agent.modes import Mode
from agent.receipt import (
    NotHeld,
    ReadyState,
    Receipt,
    Statement,
    digest_of_files,
    not_held_by,
    report_data,
    sign_receipt,
)
from agent.stages import Notify


class Notary:
    """Makes one receipt: `state`, then `vouch`, then `sign`."""

    def __init__(self, mode: Mode, config_digest: bytes, stages_ms: Mapping[Stage, int], notify: Notify) -> None:
        """Nothing is made yet.

        Args:
            mode: which command boots.
            config_digest: what the guest was launched with, as `check_measured` has it.
            stages_ms: how long each stage took, read when the receipt is signed.
            notify: told of the receipt.
        """
        self._mode = mode
        self._config_digest = config_digest
        self._stages_ms = stages_ms
        self._notify = notify
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._statement: Statement | None = None

    def state(
        self,
        cfg: MeasuredConfig,
        devices: Devices,
        prepared: AnyPrepared,
        verdict: Verdict,
        sealed: SealedKey | KeptKey,
        evidence: CompositeEvidence | None,
    ) -> Statement:
        """What is known once the key is here and sealed; the key pair is made for it."""
        claims, model = verdict.claims, prepared.described
        not_held = not_held_by(self._mode, cfg)
        if prepared.swap_active and not prepared.destination.noswap:
            not_held.add(NotHeld.SWAP)
        if prepared.destination.kind is DestinationKind.TMPFS:  # made with the capability that scratch needs
            not_held.discard(NotHeld.SCRATCH)
        inventory = devices.inventory
        ready = ReadyState.PRESET if devices.expected_ready is ExpectedReady.PRESET else ReadyState.OWN
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._statement = Statement(
            agent=Ident(__version__),
            mode=self._mode,
            not_held=tuple(item for item in NotHeld if item in not_held),
            simulated=claims.simulated or cfg.tee.simulated,
            tee=devices.attester.tee,
            interface=devices.attester.interface,
            config_digest=self._config_digest,
            request_id=verdict.request_id,
            policy_version=claims.policy_version,
            evidence_digest=None if evidence is None else hashlib.sha384(evidence.primary.report).digest(),
            token_digest=hashlib.sha384(verdict.token.encode()).digest(),
            key_uri=claims.key_uri,
            key_id=sealed.key_id,
            key_version=sealed.key_version,
            lease_s=claims.lease_s,
            model_name=model.name,
            model_version=model.version,
            manifest_digest=model.manifest_digest,
            files=len(model.files),
            total_bytes=prepared.total_plaintext_bytes,
            files_digest=digest_of_files(model.files),
            destination=prepared.destination.kind,
            folder_digest=prepared.destination.folder_digest,
            server_command_digest=devices.server_command_digest,
            gpus=len(inventory.gpus) if inventory else 0,
            switches=len(inventory.switches) if inventory else 0,
            gpu_ready=ready if inventory else None,
        )
        return self._statement

    def vouch(self, devices: Devices) -> Evidence:
        """Evidence over key and statement. Blocking, as `Devices.vouch`."""
        assert self._key and self._statement
        evidence = devices.vouch(report_data(cose.spki(self._key.public_key()), self._statement.digest()))
        # The host's, and only a help: a receipt is not refused because they are too many.
        sizes = [len(certificate) for certificate in evidence.cert_chain]
        fit = len(sizes) <= MAX_CERTIFICATES and max(sizes, default=0) <= MAX_CERTIFICATE_BYTES
        return evidence if fit else replace(evidence, cert_chain=())

    def sign(self, evidence: Evidence, measured: MeasuredRelease) -> bytes:
        """The receipt, once the model is open. The key pair is gone afterwards."""
        assert self._key and self._statement
        key, self._key = self._key, None
        receipt = Receipt(
            statement=self._statement,
            key=cose.spki(key.public_key()),
            evidence=evidence,
            rtmr_3=measured.rtmr_3,
            unmeasured=measured.unsupported,
            stages=tuple((stage, self._stages_ms[stage]) for stage in Stage if stage in self._stages_ms),
            made_at=int(time.time()),
        )
        signed = sign_receipt(receipt, key)
        sha256, key_sha256 = hashlib.sha256(signed).hexdigest(), cose.key_id(key.public_key()).hex()
        self._notify(ReceiptSigned(Ident(sha256), Ident(key_sha256), len(signed)))
        return signed
