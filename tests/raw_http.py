"""A peer that answers with given bytes, whatever was asked."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat


@contextmanager
def answers(*data: bytes, drip_s: float | None = None, stays: bool = False) -> Iterator[str]:
    """Gives its URL.

    Args:
        data: one for each connection in turn, the last for all that follow.
        drip_s: seconds between two bytes; None: at once.
        stays: it does not close the connection afterwards.
    """
    ended = threading.Event()

    def serve(listener: socket.socket) -> None:
        for said in chain(data, repeat(data[-1])):
            if ended.is_set():
                return
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    if drip_s is None:
                        connection.sendall(said)
                    else:
                        for byte in said:
                            connection.send(bytes([byte]))
                            if ended.wait(drip_s):
                                break
                    if stays:
                        ended.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
