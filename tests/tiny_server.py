"""A model server small enough for tests: health, model list, embeddings, and the SHA-256 of the file it was given.

Run as its own process with the path of the model, a port and a behaviour: `serve`, `die`, `die-on-request`, `never-ready`,
`deaf-to-one-signal`.
"""

import hashlib
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL_ID = "tiny"


def main(model: str, port: int, behaviour: str) -> int:
    if behaviour == "die":
        sys.stdout.write("a secret nobody may see: hunter2-canary\n")
        return 3
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(7)

    if behaviour == "deaf-to-one-signal":
        signal.signal(signal.SIGTERM, on_signal)
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                unready = behaviour == "never-ready" or (behaviour == "deaf-to-one-signal" and not signals)
                self.answer(503 if unready else 200, {"status": "ok"})
            elif self.path == "/v1/models":
                self.answer(200, {"data": [{"id": MODEL_ID}]})
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
            self.rfile.read(int(self.headers["Content-Length"]))
            if behaviour == "die-on-request":
                os._exit(9)
            self.answer(200, {"data": [{"embedding": [1.0]}]})

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
