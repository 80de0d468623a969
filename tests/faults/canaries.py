"""Marks that stand for every kind of secret, new for each world, and the search for them.

What holds a canary by design is not searched: the sealed model, the key store, the configuration, and the memory of the
model server, whose environment the configuration makes.
"""

import base64
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

PEER_TEXT = "canary-peer-text"
"""What hostile peers of the tests write wherever a peer can write text."""
CONFIG_SECRET = "CANARY_SECRET"
"""The variable of the model server that carries the configuration's canary."""
MAX_SEARCHED_BYTES = 64 << 20


class Canaries:
    """The canaries of one world."""

    def __init__(self) -> None:
        mark = secrets.token_hex(8)
        self.key = os.urandom(32)
        self.weights = f"canary-weights-{mark}"
        self.file_name = f"canary-name-{mark}"
        self.prompt = f"canary-prompt-{mark}"
        self.config_secret = f"canary-config-{mark}"
        self.server_output = f"canary-output-{mark}"
        self._needles: list[tuple[str, bytes]] = [
            (what, text.encode())
            for what, text in {
                "weights": self.weights,
                "file name": self.file_name,
                "prompt": self.prompt,
                "configuration secret": self.config_secret,
                "server output": self.server_output,
                "peer text": PEER_TEXT,
            }.items()
        ]
        standard, urlsafe = base64.b64encode(self.key).rstrip(b"="), base64.urlsafe_b64encode(self.key).rstrip(b"=")
        self._needles += [("key", form) for form in (self.key, self.key.hex().encode(), standard, urlsafe)]

    def model(self, size: int) -> bytes:
        """Weights in which every 64 bytes hold the canary."""
        line = self.weights.encode().ljust(64, b"-")
        return (line * (size // len(line) + 1))[:size]

    def found_in(self, data: bytes, but: Iterable[str] = ()) -> set[str]:
        """The kinds of canary that these bytes hold."""
        low = data.lower()  # names of HTTP headers and hexadecimal digits come in both cases
        return {what for what, needle in self._needles if needle in data or needle.lower() in low} - set(but)

    def found_in_file(self, path: Path) -> set[str]:
        """The same for a file; one that is gone, or is no file, holds nothing."""
        try:
            if not path.is_file() or path.stat().st_size > MAX_SEARCHED_BYTES:
                return set()
            return self.found_in(path.read_bytes())
        except OSError:
            return set()
