"""A bucket that checks signatures by what AWS publishes, and answers ranges, ETag and If-Match as S3 does.

with Bucket(layout, KEY_ID, SECRET) as bucket:
    open_source("s3://models/tiny", None, 10, Access(KEY_ID, SECRET, endpoint=bucket.url))
"""

import hashlib
import hmac
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from agent.artifact.sources.access import Access
from tests.script_server import Reply, ScriptServer, Seen

KEY_ID, SECRET, TOKEN, REGION = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "session/token+x==", "eu-test-1"
PREFIX = "models/tiny+v1=ü"


def access(endpoint: str, secret: str = SECRET, token: str | None = TOKEN, region: str = REGION) -> Access:
    return Access(KEY_ID, secret, token, endpoint, region)


class Bucket:
    """Serves `root` as the bucket `models`, below PREFIX.

    Args:
        root: folder.
        signed: it asks for signatures.
        obeys_if_match: some services do not.
        weak: its ETags are.
        virtual: the bucket is in its name, not in the path.
        changes_after: it is `changed` after so many parts of objects.

    Attributes:
        changed: from now on every object is another one.
    """

    def __init__(
        self,
        root: Path,
        *,
        signed: bool = True,
        obeys_if_match: bool = True,
        weak: bool = False,
        virtual: bool = False,
        changes_after: int | None = None,
    ) -> None:
        self._root = root
        self._signed = signed
        self._obeys = obeys_if_match
        self._weak = weak
        self._virtual = virtual
        self._parts_left = changes_after
        self._lock = threading.Lock()
        self.changed = False
        self.server = ScriptServer(self._answer)
        self.url = self.server.url

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.__exit__(kind, error, trace)

    def _answer(self, request: Seen) -> Reply:
        if self._signed and not _is_signed(request):
            return Reply(403, (("Content-Type", "application/xml"),), b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        path = unquote(request.path)
        head = f"/{PREFIX}/" if self._virtual else f"/models/{PREFIX}/"
        file = self._root / path.removeprefix(head)
        if not path.startswith(head) or not file.is_file():
            return Reply(404)
        data = file.read_bytes()
        etag = f'{"W/" if self._weak else ""}"{hashlib.md5(data).hexdigest()}{"-2" if self.changed else ""}"'
        if self._obeys and request.headers.get("if-match", etag) != etag:
            return Reply(412)
        if (asked := request.headers.get("range")) is None:
            return Reply(200, (("ETag", etag),), data)
        start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        if start >= len(data):
            return Reply(416)
        with self._lock:
            if self._parts_left is not None:
                self._parts_left -= 1
                self.changed = self._parts_left <= 0
        body = data[start : end + 1]
        return Reply(206, (("ETag", etag), ("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")), body)


def _is_signed(request: Seen) -> bool:
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8}/([a-z0-9-]+)/s3/aws4_request),"
        r"SignedHeaders=([a-z0-9;-]+),Signature=([0-9a-f]{64})",
        request.headers.get("authorization", ""),
    )
    if match is None:
        return False
    key_id, scope, region, names, signature = match.groups()
    stamp = request.headers["x-amz-date"]
    age = datetime.now(UTC) - datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    canonical = "\n".join(
        [
            request.method,
            request.path,
            "",
            *(f"{name}:{request.headers[name]}" for name in names.split(";")),
            "",
            names,
            request.headers["x-amz-content-sha256"],
        ]
    )
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = ("AWS4" + SECRET).encode()
    for part in (stamp[:8], region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return (
        hmac.digest(key, text.encode(), "sha256").hex() == signature
        and abs(age) < timedelta(minutes=15)
        and (key_id, region) == (KEY_ID, REGION)
        and {"host", "x-amz-content-sha256", "x-amz-date"} <= set(names.split(";"))
        and request.headers.get("x-amz-security-token", TOKEN) == TOKEN
    )
