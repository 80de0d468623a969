"""The model key from CoCo's confidential-data-hub: for a container whose guest attests by itself, with keys of its own.

The guest's attestation-agent does the handshake with the key broker service, over evidence of its own making. We see the
result, its token, which is the Verdict here; and the key comes in clear over the guest's loopback. So what is bound to whom is
the guest image's work. What is left to us, and is owned here: to believe a token only under pinned keys where there are any; to
hold against it what we know of this guest; and to name the key without asking for it, which `keys.unwrap` does after the gate.
That the key is the right one the manifest's key commitment says, as always.

Collects nothing, so no evidence of ours is covered by this Verdict: neither the GPU modes nor the server's command. Nothing is
tried twice (`guest/api_server.py`). There is no lease, and no rollback floor but the configuration's.

Follows Trustee's token, `ear.py`.
"""

import secrets
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from agent.closed import Ident
from agent.errors import GpuCountError, KeyNotDeliveredError, SimulationRefusal, SimulationRefusedError, TokenCheck, TokenError
from agent.evidence import Nonce, Tee
from agent.guest.api_server import ApiServer
from agent.guest.initdata import fit
from agent.handshake import KeptCredentials, KeptKey, TokenClaims, Verdict
from agent.handshake.broker import Collect, OnAttempt
from agent.handshake.ear import Ear, decode_unverified_ear, verify_ear
from agent.handshake.machine import Trust
from agent.handshake.rcar import UNVERSIONED, not_affirmed
from agent.keys import EphemeralKey, is_key_length
from agent.store_credentials import is_credentials_length
from agent.threads import in_thread

_GPU = "gpu"
_FIELD_BYTES = {Tee.SNP: 32, Tee.TDX: 48}
"""HOST_DATA, MRCONFIGID. Of sample evidence the field is whatever the guest says."""


class CdhBroker:
    """The `Broker` of a guest whose own components ask for its keys."""

    def __init__(
        self,
        api: ApiServer,
        trust: Trust,
        config_digest: bytes,
        gpu_count: int,
        on_unaffirmed: Callable[[Ident], None] = lambda _: None,
        *,
        simulated: bool = False,
    ) -> None:
        """Nothing is asked yet.

        Args:
            api: of this guest.
            trust: where it has no token keys, the token is not verified: then only the guest's own components vouch for it.
            config_digest: what the guest was launched with, as `check_measured` has it; the token must say the same.
            gpu_count: configured number of GPUs; the token must be about as many.
            on_unaffirmed: told, when no key comes, what the token does not affirm: the likeliest reason, and the only one that
                can be known here.
            simulated: the silicon is, which a token does not tell of any but sample evidence.
        """
        self._api = api
        self._trust = trust
        self._config_digest = config_digest
        self._gpu_count = gpu_count
        self._on_unaffirmed = on_unaffirmed
        self._simulated = simulated

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        """There is nothing to close."""

    def connect(self) -> None:
        """As `Broker.connect`; every request has its own connection."""

    async def attest(
        self, key_uri: Ident, tee: Tee, collect: Collect, on_attempt: OnAttempt = lambda *_: None
    ) -> tuple[Verdict, EphemeralKey]:
        """Have the attestation-agent attest, and read what came of it. `collect` is not called; the key pair is for nothing.

        Raises:
            GuestApiError: there was no token to be had, for a reason the components do not tell.
            TokenError: it is not signed by a pinned key, not of now, or not about this guest.
            GpuCountError: it is about more or fewer GPUs.
            SimulationRefusedError: it is over sample evidence, and that is not allowed.
        """
        request_id = Ident(secrets.token_hex(16))
        on_attempt(request_id, 1)
        token = await in_thread(self._api.token)
        ear = self._read(token)
        self._check(ear, tee)
        claims = _claims(ear, key_uri, simulated=ear.simulated or self._simulated)
        return Verdict(request_id, token, claims, ()), EphemeralKey.generate()

    async def release_credentials(self, verdict: Verdict, uri: Ident) -> KeptCredentials:
        """Where they are."""
        return KeptCredentials(partial(self._fetch, verdict, uri, is_credentials_length))

    async def release_key(self, verdict: Verdict) -> KeptKey:
        """Where the key is. Nothing is asked for: in clear it may come only after the gate."""
        uri = verdict.claims.key_uri
        return KeptKey(partial(self._fetch, verdict, uri, is_key_length), uri, 0)

    def _fetch(self, verdict: Verdict, uri: Ident, is_length: Callable[[int], bool], into: memoryview) -> int:
        try:
            return self._api.resource(uri, into, is_length)
        except KeyNotDeliveredError:
            for finding in not_affirmed(verdict.token):
                self._on_unaffirmed(finding)
            raise

    def _read(self, token: str) -> Ear:
        if self._trust.token_keys:
            return verify_ear(token, self._trust.token_keys, int(time.time()))
        return decode_unverified_ear(token)

    def _check(self, ear: Ear, tee: Tee) -> None:
        """The token is about this guest as it was launched. What fails here is the components' fault, or a relay's."""
        cpu = ear.cpu
        # refusal: test_a_token_about_another_guest_is_refused
        if cpu is None or cpu.kind is None or cpu.kind.value != tee.value:
            raise TokenError(TokenCheck.CLAIMS)
        # refusal: test_a_token_about_another_guest_is_refused
        if tee in _FIELD_BYTES and cpu.init_data != fit(self._config_digest, _FIELD_BYTES[tee]):
            raise TokenError(TokenCheck.LAUNCH)
        gpus = sum(submod.name.startswith(_GPU) for submod in ear.submods)
        # refusal: test_a_token_about_fewer_gpus_is_refused
        if gpus != self._gpu_count:
            raise GpuCountError(self._gpu_count, gpus)
        # refusal: test_a_simulation_counts_only_where_it_is_allowed test_simulated_silicon_is_one_whatever_its_token_says
        if (ear.simulated or self._simulated) and not self._trust.allow_simulation:
            raise SimulationRefusedError(SimulationRefusal.NOT_ALLOWED)


def _claims(ear: Ear, key_uri: Ident, *, simulated: bool) -> TokenClaims:
    """Nonce and key are of the attestation-agent's handshake; that they fit is between it and its service."""
    cpu = ear.cpu
    assert cpu is not None
    # refusal: test_a_token_about_another_guest_is_refused
    if cpu.tee_pubkey is None:
        raise TokenError(TokenCheck.TEE_PUBKEY)
    return TokenClaims(
        nonce=Nonce((cpu.nonce or "").encode()),
        tee_pubkey=cpu.tee_pubkey,
        key_uri=key_uri,
        policy_version=UNVERSIONED,
        min_model_version=0,
        lease_s=None,
        simulated=simulated,
        issued_at=ear.issued_at,
        expires_at=ear.expires_at,
    )
