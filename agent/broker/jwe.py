"""Seals a model key, or credentials, to the guest's ephemeral key, as Trustee's KBS does: JWE, flattened JSON, RFC 7516.

`ECDH-ES+A256KW` with P-256 and `A256GCM`, nothing else. Upstream's client serialises the header again and uses that as
associated data, so the header is written exactly as it would: `alg`, `enc`, `epk` with sorted members, no spaces.
"""

import json
from typing import Any

from joserfc import jwe
from joserfc.jwk import ECKey

from agent.closed import Ident
from agent.errors import ProtocolProblem, RemoteProtocolError
from agent.handshake import TeePublicKey
from agent.jose import pack_jwk

ALG, ENC = "ECDH-ES+A256KW", "A256GCM"


class _GuestKey(ECKey):
    """joserfc derives the ephemeral key from the recipient's class; here its members come out sorted."""

    def as_dict(self, private: bool = False, **params: Any) -> dict[str, Any]:
        members = super().as_dict(private, **params)
        return {name: members[name] for name in sorted(members)}


def seal(secret: bytes, tee_pubkey: TeePublicKey) -> bytes:
    """The secret as JWE to `tee_pubkey`, UTF-8.

    Args:
        secret: the model key, 32 bytes, or credentials, at most 4 KiB.
        tee_pubkey: the ephemeral key out of a verified token, never out of an unsigned field.
    Raises:
        RemoteProtocolError: `tee_pubkey` is not a point on P-256.
    """
    try:
        recipient = _GuestKey.import_key({**pack_jwk(tee_pubkey)})
    except ValueError:
        raise RemoteProtocolError(ProtocolProblem.MALFORMED, Ident("tee_pubkey")) from None
    compact = jwe.encrypt_compact({"alg": ALG, "enc": ENC}, secret, recipient, algorithms=[ALG, ENC])
    # The five parts of both serialisations are the same strings (RFC 7516, 7.1 and 7.2.2).
    members = dict(zip(("protected", "encrypted_key", "iv", "ciphertext", "tag"), compact.split("."), strict=True))
    return json.dumps(members, separators=(",", ":")).encode()
