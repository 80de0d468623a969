"""What systemd is told when it has started us as a unit with `Type=notify`: sd_notify(3), one datagram for each news.

READY is said when the local checks have passed, not when the model is served: in a Kata guest the network comes after what
waits for us, so a unit that became ready only with its model would never become ready. Standard library only.
"""

import os
import socket
from contextlib import suppress

MAX_STATUS_BYTES = 512  # one line of `systemctl status`


class ServiceManager:
    """Who started us, or nobody. A message that cannot be sent is lost: the next one says it all."""

    def __init__(self, address: str | None) -> None:
        """`address`: $NOTIFY_SOCKET, a path or `@abstract`."""
        self._address: str | None = None
        if address and address[0] in "/@":
            self._address = f"\0{address[1:]}" if address[0] == "@" else address

    def tell(self, *, ready: bool, stopping: bool, status: str | None) -> None:
        """The whole state, so that no single datagram matters: READY and STOPPING may be repeated."""
        if self._address is None:
            return
        lines = ["READY=1"] * ready + ["STOPPING=1"] * stopping
        if status:
            lines.append("STATUS=" + status.splitlines()[0].encode()[:MAX_STATUS_BYTES].decode(errors="ignore"))
        if lines:
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            # Gone, or it does not read: it has its own deadline for us.
            with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as end:
                end.sendto("\n".join(lines).encode(), self._address)


def from_environment() -> ServiceManager:
    """The manager that started this process. The variable is taken away: what we start is not its service."""
    return ServiceManager(os.environ.pop("NOTIFY_SOCKET", None))
