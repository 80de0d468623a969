"""The worker's story: one boot, step by step, and the renewal of its lease. This is the page to read first.

Evidence of CPU and GPUs goes to the key broker; its signed Verdict comes back, then the model key, still sealed; its
release is measured and the GPU gate passed; only then is the key opened and the sealed model with it, into guest memory.
Nothing that does not need the key waits for it: the manifest is authenticated and memory is made present while attestation
is under way. Only a store whose credentials the broker has is opened after the Verdict. Those are opened before the gate,
as the key never is: all they give is ciphertext, and what the store says to them must not cost the VM its one gate.

The order is enforced by types, each step returning what the next one asks for:
`Devices` → `Verdict` (→ `SealedCredentials` → `StoreCredentials` → `BlobSource`) → `SealedKey` → `MeasuredRelease` →
`SecuredDevices` → `ReleasedKey` → `LoadedArtifact`; the supervisor makes the `RunningServer` of it. Whatever fails cancels
the rest, and `undo` takes back what was done, in reverse order; two steps cannot be taken back: the gate, and before it the
measurement, after which the register says for good that a key was released. Blocking work runs in threads that are always
joined, because a device request that is abandoned half-way can cost the guest its attestation key.

A renewal is the first step once more, in another worker: a Verdict, and neither gate nor key.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from msgspec.structs import replace

from agent import keys
from agent.artifact import LoadedArtifact, load
from agent.artifact.identify import identify
from agent.artifact.sources import BlobSource
from agent.artifact.sources.mirrors import LockedStore
from agent.closed import Ident
from agent.config import MeasuredConfig
from agent.errors import LeaseEndedError, LeaseUnsupervisedError, RollbackError
from agent.events import DestinationChosen, GatePassed, ReleaseMeasured, Requested, Stage, VerdictAccepted
from agent.evidence import CompositeEvidence, RuntimeData
from agent.evidence.collect import Devices
from agent.evidence.gate import ReadyState
from agent.evidence.runtime import MeasuredRelease
from agent.handshake import Verdict
from agent.handshake.broker import Broker
from agent.receipts import Notary
from agent.stages import Notify, stage
from agent.threads import in_thread


async def boot(
    cfg: MeasuredConfig,
    devices: Devices,
    broker: Broker,
    store: BlobSource | LockedStore,
    undo: ExitStack,
    notify: Notify,
    gid: int | None,
    notary: Notary,
    *,
    supervised: bool = True,
) -> tuple[LoadedArtifact, int | None, bytes]:
    """Attest, secure the devices, open the model.

    Args:
        cfg: the measured configuration.
        devices: open, and good enough to be attested.
        broker: its connection may still be under way.
        store: where the sealed model lies; a locked one, where the broker has its credentials.
        notify: told every event.
        undo: takes the compensations; what it holds must be handed on before it is unwound.
        gid: group that may read the open model; None: our own.
        notary: makes the receipt.
        supervised: somebody of ours will see to the end of a lease.

    Returns:
        The model; the lease of its key in seconds, None without one; the receipt of both.

    Raises:
        AgentError: whatever step failed, possibly inside an ExceptionGroup.
    """
    if cfg.artifact.manifest_digest is None:  # the evidence says what will be loaded, so that comes first
        assert not isinstance(store, LockedStore), "the schema pins the manifest of a locked store"
        with stage(Stage.IDENTIFY, notify):
            cfg = replace(cfg, artifact=await identify(store, cfg.artifact))
            devices = devices.to_load(cfg.artifact.digest)

    async with asyncio.TaskGroup() as work:  # any failure cancels the rest

        def prepare(opened: BlobSource) -> asyncio.Task[load.AnyPrepared]:  # no key needed
            return work.create_task(_prepare(cfg, opened, undo, notify, gid))

        if not isinstance(store, LockedStore):
            prepared = prepare(store)

        with stage(Stage.ATTEST, notify):
            verdict, ephemeral, evidence = await _attest(cfg, devices, broker, notify)
            claims = verdict.claims
            notify(_accepted(verdict))
            # refusal: test_commands_load.py::test_a_key_with_a_lease_is_not_left_to_nobody
            if claims.lease_s is not None and not supervised:
                raise LeaseUnsupervisedError(claims.lease_s)

        async with _lease(claims.lease_s):
            if isinstance(store, LockedStore):
                with stage(Stage.RELEASE_CREDENTIALS, notify):
                    sealed_credentials = await broker.release_credentials(verdict, store.credentials_uri)
                    credentials = await in_thread(lambda: keys.open_credentials(sealed_credentials, ephemeral))
                prepared = prepare(store.unlock(credentials))

            with stage(Stage.RELEASE_KEY, notify):
                sealed = await broker.release_key(verdict)

            # refusal: test_what_the_store_lacks_ends_the_boot_before_the_gate
            (await prepared).check()  # what can fail without costing the VM fails before the gate
            statement = notary.state(cfg, devices, prepared.result(), verdict, sealed, evidence)
            with stage(Stage.MEASURE, notify):
                measured = await in_thread(lambda: devices.measure(verdict, sealed, evidence, statement.digest()))
                notify(_measured(measured))

            with stage(Stage.SECURE, notify):  # the gate: ready state 0 -> 1, once
                secured = await in_thread(lambda: devices.secure(verdict, measured))
                if secured.inventory:
                    now = secured.inventory
                    notify(GatePassed(len(now.gpus), secured.ready_state is ReadyState.PRESET, len(now.switches)))

            with stage(Stage.UNWRAP, notify):
                key = await in_thread(lambda: keys.unwrap(sealed, ephemeral, secured))

            vouched = work.create_task(in_thread(lambda: notary.vouch(devices)))  # while the model is opened
            with key, stage(Stage.LOAD, notify) as progress:
                floor = max(cfg.artifact.min_version, claims.min_model_version)
                loaded = await load.load(prepared.result(), key, floor, progress.count)

            with stage(Stage.RECEIPT, notify):
                receipt = notary.sign(await vouched, measured)
    return loaded, claims.lease_s, receipt


async def renew(cfg: MeasuredConfig, devices: Devices, broker: Broker, served_version: int, notify: Notify) -> None:
    """Attest again, for another lease: another nonce, another key pair, and no key.

    Args:
        cfg: the measured configuration, the same as at boot.
        devices: opened with `ExpectedReady.OURS`.
        broker: not connected yet.
        served_version: of the model that is open.
        notify: told every event, at last `VerdictAccepted`, which is the outcome.

    Raises:
        RollbackError: the authority wants a newer model by now.
        AgentError: whatever else failed.
    """
    verdict, ephemeral, _ = await _attest(cfg, devices, broker, notify)
    ephemeral.destroy()
    if served_version < verdict.claims.min_model_version:
        raise RollbackError(served_version, verdict.claims.min_model_version)
    notify(_accepted(verdict))


async def _attest(
    cfg: MeasuredConfig, devices: Devices, broker: Broker, notify: Notify
) -> tuple[Verdict, keys.EphemeralKey, CompositeEvidence | None]:
    evidence: CompositeEvidence | None = None

    async def collect(data: RuntimeData) -> CompositeEvidence:
        nonlocal evidence
        evidence = await in_thread(lambda: devices.collect(data))
        return evidence

    verdict, ephemeral = await broker.attest(
        Ident(cfg.broker.key_uri),
        devices.attester.tee,
        collect,
        lambda request_id, attempt: notify(Requested(request_id, attempt)),
    )
    return verdict, ephemeral, evidence  # None of a guest whose own components attested


def _measured(measured: MeasuredRelease) -> ReleaseMeasured:
    value, unsupported = measured.rtmr_3, measured.unsupported
    return ReleaseMeasured(Ident(value.hex()) if value else None, Ident(unsupported.value) if unsupported else None)


def _accepted(verdict: Verdict) -> VerdictAccepted:
    claims = verdict.claims
    return VerdictAccepted(verdict.request_id, claims.key_uri, claims.policy_version, claims.simulated, claims.lease_s)


@asynccontextmanager
async def _lease(lease_s: int | None) -> AsyncIterator[None]:
    """No step goes on longer than the key may be used. Raises LeaseEndedError."""
    try:
        async with asyncio.timeout(lease_s) as limit:
            yield
    except TimeoutError:
        if lease_s is None or not limit.expired():
            raise
        raise LeaseEndedError(lease_s) from None


async def _prepare(
    cfg: MeasuredConfig, store: BlobSource, undo: ExitStack, notify: Notify, gid: int | None
) -> load.AnyPrepared:
    with stage(Stage.PREPARE, notify):
        artifact = cfg.artifact
        prepared = await load.prepare(store, artifact, cfg.broker.key_uri, undo, gid=gid, allow_swap=artifact.unsafe_allow_swap)
        destination = prepared.destination
        notify(
            DestinationChosen(
                Ident(destination.kind.value), prepared.total_plaintext_bytes, destination.noswap, prepared.swap_active
            )
        )
        return prepared
