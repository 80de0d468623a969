"""AWS Signature Version 4 for a GET of one object: the Authorization header, and nothing else of AWS.

Ours because it is fifty lines that AWS publishes test vectors for, and botocore, which could do it, is 14 MB in a guest image.
Pure: the clock is an argument. Spec: Amazon S3 API Reference, "Authenticating Requests: Using the Authorization Header".
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"


def encode_path(path: str) -> str:
    """A path as it must stand in the request for the signature to hold: every byte but the unreserved ones and `/` as %XX."""
    return quote(path, safe="/-_.~")


def sign_get(
    host: str,
    path: str,
    headers: Mapping[str, str],
    when: datetime,
    region: str,
    key_id: str,
    secret: str,
    session_token: str | None = None,
) -> dict[str, str]:
    """The headers to send with a GET beside those given.

    Args:
        host: as the Host header will have it, with the port where it is not the scheme's.
        path: encoded, without a query.
        headers: to be sent and signed; names in any case, values without leading or doubled spaces.
        when: now, UTC; services accept 15 minutes of difference.
        region: of the bucket.
        key_id: of the access key.
        secret: of the access key.
        session_token: of temporary credentials.
    """
    stamp = when.strftime("%Y%m%dT%H%M%SZ")
    sent = {"Host": host, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    if session_token is not None:
        sent["x-amz-security-token"] = session_token
    signed = sorted((name.lower(), value) for name, value in {**headers, **sent}.items())
    names = ";".join(name for name, _ in signed)
    lines = "".join(f"{name}:{value}\n" for name, value in signed)
    # 1. The request in canonical form: method, path, query, headers, their names, hash of the body.
    request = f"GET\n{path}\n\n{lines}\n{names}\n{EMPTY_SHA256}"
    # 2. What is signed: the hash of it, for one day, region and service.
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    # 3. The key for these.
    key = b"AWS4" + secret.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    return {**sent, "Authorization": f"{_ALGORITHM} Credential={key_id}/{scope},SignedHeaders={names},Signature={signature}"}
