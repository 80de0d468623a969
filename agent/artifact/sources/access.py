"""What a store wants to know of whoever reads it: credentials, and where an S3 bucket is.

They come from the measured configuration, from the key broker (`agent/store_credentials.py`) or from a file of the provider's,
never from a location: locations are shown.
"""

from dataclasses import dataclass, field
from typing import Annotated

import msgspec


@dataclass(frozen=True, slots=True)
class Access:
    """Credentials, or none; their texts are in no repr. Python strings cannot be wiped: the end of the worker does it.

    Attributes:
        user: of a registry, or an S3 access key id.
        secret: the password, or the S3 secret access key; there if `user` is.
        session_token: of temporary S3 credentials.
        endpoint: URL of an S3 service; `{bucket}` in it stands for the bucket (virtual-hosted style), else the bucket is the
            first part of the path. None: AWS.
        region: of the S3 bucket.
    """

    user: str | None = None
    secret: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    region: str = "us-east-1"


ANONYMOUS = Access()


_Credential = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=8 << 10)]  # as `config.py` has it


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user: _Credential | None = None
    secret: _Credential | None = None
    session_token: _Credential | None = None
    endpoint: str | None = None
    region: str = ANONYMOUS.region


def parse_access(data: bytes) -> Access:
    """A provider's file: TOML with the keys that `[artifact]` has for a store. Raises ValueError: it is none."""
    try:
        found = msgspec.toml.decode(data, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ValueError("not credentials") from None  # their texts can quote values
    if (found.user is None) != (found.secret is None):
        raise ValueError("not credentials")
    return Access(found.user, found.secret, found.session_token, found.endpoint, found.region)
