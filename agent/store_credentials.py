"""Credentials for the model's store as a KBS resource, where the key broker has them and not the configuration.

One strict JSON object, `{"user": …, "secret": …}` and perhaps `"session_token"`, with the meaning that `[artifact]` gives
these names. Python strings cannot be wiped: the end of the worker does it. Until then they are in no repr and in no error.
"""

import re
from dataclasses import dataclass, field

from agent.jose import parse_object, string

MAX_CREDENTIALS_BYTES = 4 << 10

_MODEL_KEY_BYTES = 32
_MEMBERS = {
    "user": re.compile(r"[ -~]+"),  # of a bucket it goes into a header as it is, as the token does
    "secret": re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+"),  # as the configuration's; JSON can write half a character
    "session_token": re.compile(r"[ -~]+"),
}


@dataclass(frozen=True, slots=True)
class StoreCredentials:
    """What opens the store, and nothing that lies in it.

    Attributes:
        user: of a registry, or an S3 access key id; printable ASCII.
        secret: the password, or the S3 secret access key; without control characters.
        session_token: of temporary S3 credentials; printable ASCII.
    """

    user: str = field(repr=False)
    secret: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


def is_credentials_length(length: int) -> bool:
    """Can a KBS resource of so many bytes be credentials? One as long as a model key stays sealed: it may be one."""
    return 0 < length <= MAX_CREDENTIALS_BYTES and length != _MODEL_KEY_BYTES


def parse_credentials(resource: memoryview) -> StoreCredentials:
    """The credentials that a resource is. Raises ValueError, which says nothing about it."""
    # refusal: test_what_is_not_exactly_credentials_is_refused
    if not is_credentials_length(len(resource)):
        raise ValueError("not credentials")
    members = parse_object(bytes(resource), MAX_CREDENTIALS_BYTES)
    # refusal: test_what_is_not_exactly_credentials_is_refused
    if not members.keys() <= _MEMBERS.keys():
        raise ValueError("not credentials")
    texts = {name: string(members, name) for name in {"user", "secret", *members}}
    # refusal: test_what_is_not_exactly_credentials_is_refused
    if not all(_MEMBERS[name].fullmatch(text) for name, text in texts.items()):
        raise ValueError("not credentials")
    return StoreCredentials(**texts)
