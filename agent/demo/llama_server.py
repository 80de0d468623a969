"""llama.cpp's own HTTP server as a program, out of the `xllamacpp` wheel, which has the server but no command.

Owns nothing but the translation of arguments. Runs under the model server's uid: imports nothing else of ours.
"""

import argparse
import os
import signal

import xllamacpp


def main() -> None:
    """Serve until SIGTERM or SIGINT; status 0 then, 1 if the model cannot be loaded."""
    parser = argparse.ArgumentParser(prog="llama_server", description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    parser.add_argument("--port", required=True, type=int, help="port on it")
    parser.add_argument("--alias", required=True, help="model id to serve it under")
    parser.add_argument("--embedding", action="store_true", help="serve embeddings, not completions")
    arguments = parser.parse_args()

    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.hostnames = [arguments.host]
    parameters.port = arguments.port
    parameters.model_alias = {arguments.alias}
    parameters.embedding = arguments.embedding

    # Before the server's threads exist, so that they inherit the mask and the signal waits for sigwait.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    _server = xllamacpp.Server(parameters)  # lives as long as its name
    signal.sigwait(stop)
    # Not the destructor: it waits for ever when it asks the main loop to end before that loop began (seen when a
    # SIGTERM followed the first healthy answer at once).
    os._exit(0)


if __name__ == "__main__":
    main()
