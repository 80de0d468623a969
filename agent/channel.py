"""The one wire between worker and supervisor: JSON records with descriptors, over a SOCK_SEQPACKET socketpair.

Owns framing and bounds; does not know what the records mean. One record is one packet, so a worker that is killed in the
middle of a sentence leaves no half record. Standard library only, because the supervisor imports it.
"""

import array
import json
import os
import socket
import threading
from dataclasses import dataclass
from typing import Self

MAX_RECORD_BYTES = 96 << 10
MAX_DESCRIPTORS = 8


@dataclass(frozen=True, slots=True)
class Packet:
    """One record and the descriptors that came with it; whoever receives a packet owns its descriptors."""

    record: dict[str, object]
    descriptors: tuple[int, ...]


class Channel:
    """One end. Sending is thread-safe and blocks; receiving is the supervisor's and does not."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.RLock()  # a finalizer that raises in the middle of `send` is told from there

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_RECORD_BYTES)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, record: dict[str, object], descriptors: tuple[int, ...] = ()) -> None:
        """Send one record. A record above the bound is a bug of ours, not of the world.

        Raises:
            BrokenPipeError: the other side is gone.
        """
        data = json.dumps(record, separators=(",", ":")).encode()
        # refusal: test_the_largest_record_passes_and_a_larger_one_is_our_bug
        if len(data) > MAX_RECORD_BYTES or len(descriptors) > MAX_DESCRIPTORS:
            raise RuntimeError("record or descriptor list above its bound")
        with self._lock:
            socket.send_fds(self._socket, [data], descriptors)

    def receive(self) -> Packet | None:
        """The next record, None at the end of the stream.

        Raises:
            BlockingIOError: nothing is there yet.
            ValueError: the packet is not a record.
        """
        # Not socket.recv_fds: it drops its flags (CPython 3.11), and would block and leak descriptors to children.
        data, ancillary, flags, _ = self._socket.recvmsg(
            MAX_RECORD_BYTES + 1, socket.CMSG_SPACE(MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        if not data:
            return None
        try:
            try:
                record = json.loads(data)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            # refusal: test_what_is_no_record_is_refused_and_its_descriptors_are_closed
            # refusal: test_what_does_not_arrive_whole_is_refused
            if not isinstance(record, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("not a whole record")
        except ValueError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Packet(record, tuple(descriptors))
