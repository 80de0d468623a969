"""A model server small enough for tests: health, model list, embeddings, and the SHA-256 of the file it was given.

Run as its own process with the path of the model (or of a folder with one file), a port and a behaviour of `BEHAVIOURS`.
It writes to its output whatever it knows, as a careless server does: its environment and every prompt.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL_ID = "tiny"
BEHAVIOURS = {
    "serve": "as it should be",
    "die": "ends at once with status 3",
    "segfault": "is killed by a signal at once",
    "die-on-request": "ends when it gets its first request",
    "never-ready": "its health check says 503",
    "deaf-to-one-signal": "takes the first SIGTERM for nothing, and is ready only then",
    "hang": "takes connections and never answers",
    "silent": "never listens",
    "wrong-model": "lists another model",
    "fail-requests": "is healthy, and answers every request with 500",
    "flood": "writes 64 MiB of output and ends",
    "fork": "leaves a process in a session of its own, and ends",
    "endless-answer": "its health check answers without end",
    "not-http": "answers with bytes that are no HTTP",
}


def main(model: str, port: int, behaviour: str) -> int:
    secrets = " ".join(f"{name}={value}" for name, value in os.environ.items())
    sys.stdout.write(f"a secret nobody may see: hunter2-canary {secrets}\n")
    sys.stdout.flush()
    if behaviour == "die":
        return 3
    if behaviour == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "flood":
        for _ in range(64):
            os.write(1, secrets.encode().ljust(1 << 20, b"-"))
        return 4
    if behaviour == "fork":
        if os.fork() == 0:
            os.setsid()
            time.sleep(3600)
        return 5
    if behaviour == "silent":
        time.sleep(3600)
    if behaviour in ("hang", "endless-answer", "not-http"):
        return answer_strangely(port, behaviour)
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(7)

    if behaviour == "deaf-to-one-signal":
        signal.signal(signal.SIGTERM, on_signal)
    path = Path(model)
    digest = hashlib.sha256((next(path.iterdir()) if path.is_dir() else path).read_bytes()).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                unready = behaviour == "never-ready" or (behaviour == "deaf-to-one-signal" and not signals)
                self.answer(503 if unready else 200, {"status": "ok"})
            elif self.path == "/v1/models":
                self.answer(200, {"data": [{"id": "another" if behaviour == "wrong-model" else MODEL_ID}]})
            elif self.path == "/about":
                self.answer(
                    200,
                    {
                        "sha256": digest,
                        "uid": os.getuid(),
                        "environment": sorted(os.environ),
                        "model": model,
                    },
                )
            elif self.path == "/crash":
                os._exit(9)

        def do_POST(self) -> None:
            prompt = self.rfile.read(int(self.headers["Content-Length"]))
            sys.stdout.buffer.write(prompt)
            sys.stdout.flush()
            if behaviour == "die-on-request":
                os._exit(9)
            self.answer(500 if behaviour == "fail-requests" else 200, {"data": [{"embedding": [1.0]}]})

        def answer(self, status: int, body: object) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    return 0


def answer_strangely(port: int, behaviour: str) -> int:
    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(4096)
            if behaviour == "hang":
                time.sleep(3600)
            connection.sendall(b"\0\0not HTTP\r\n\r\n" if behaviour == "not-http" else b"HTTP/1.1 200 OK\r\n")
            while behaviour == "endless-answer":
                connection.sendall(b"X-More: " + b"-" * 1024 + b"\r\n")

    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
