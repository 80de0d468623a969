"""An OCI image layout below an http(s) URL, by range requests."""

from agent.artifact.sources.directory import blob_path
from agent.artifact.sources.layout import NamedByIndex
from agent.artifact.sources.web import Ask, WebClient, range_header, read_part, read_whole
from agent.proxy import Proxy


class HttpSource(NamedByIndex):
    """Sends no credentials but the query of its URL, and follows redirects within the URL's origin only.

    The query goes with every request as it is (a shared access signature, a signed prefix), and along no redirect.

    Compares no ETag, unlike `s3.py`: behind one name are several servers with copies of one file, and each has its own tag for
    it. An object that changes midway does not authenticate.
    """

    def __init__(self, url: str, ca_pem: str | None, timeout_s: float, proxy: Proxy | None = None, query: str = "") -> None:
        """`query`: without its question mark, or empty."""
        self._url = url.rstrip("/")
        self._query = f"?{query}" if query else ""
        self._web = WebClient(ca_pem, timeout_s, proxy)
        self._web.open_pool(url)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._read_all(blob_path(digest), max_bytes)

    def read_index(self, max_bytes: int) -> bytes:
        return self._read_all("index.json", max_bytes)

    def read_range(self, digest: str, offset: int, out: memoryview) -> int:
        ask = Ask(self._at(blob_path(digest)), headers=range_header(offset, out))
        with self._web.request(ask) as response:
            return read_part(response, offset, out)

    def close(self) -> None:
        self._web.close()

    def _read_all(self, path: str, max_bytes: int) -> bytes:
        with self._web.request(Ask(self._at(path))) as response:
            return read_whole(response, max_bytes)

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}{self._query}"
