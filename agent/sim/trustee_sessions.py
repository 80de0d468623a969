"""Sessions of the test KBS, and the cookie that names them."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate

from agent.sim.trustee_knobs import CookieFault

COOKIE = "kbs-session-id"


@dataclass(slots=True)
class Session:
    """From /auth on; attested once it has a token.

    Attributes:
        session_id: 32 hex digits.
        expires_at: Unix seconds, on the server's clock; nothing extends it.
    """

    session_id: str
    tee: str
    nonce: str
    expires_at: float
    token: str | None = None

    def set_cookie(self, fault: CookieFault | None = None) -> tuple[tuple[str, str], ...]:
        """The header: a name, a value, Expires, and nothing else."""
        value = self.session_id
        match fault:
            case CookieFault.MISSING:
                return ()
            case CookieFault.EMPTY:
                value = ""
            case CookieFault.OVERSIZED:
                value = "0" * (32 << 10)
            case CookieFault.INJECTING:
                value += " ; evil=1\tx"
        return (("set-cookie", f"{COOKIE}={value}; Expires={formatdate(self.expires_at, usegmt=True)}"),)


class SessionTable:
    """In memory, as with one replica.

    Args:
        now: the server's clock, Unix seconds.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def open(self, tee: str, nonce: str, life_s: float) -> Session:
        session = Session(secrets.token_hex(16), tee, nonce, self._now() + life_s)
        with self._lock:
            self._sessions[session.session_id] = session
        return session

    def find(self, headers: Mapping[str, str]) -> Session | None:
        """The session that a request's cookie names; None: it names none, or one that expired and is gone now."""
        pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
        session_id = next((value for name, _, value in pairs if name == COOKIE), "")
        now = self._now()
        with self._lock:
            session = self._sessions.get(session_id)
            if session is not None and session.expires_at < now:
                del self._sessions[session_id]
                return None
        return session

    def clear(self) -> None:
        with self._lock:
            self._sessions.clear()
