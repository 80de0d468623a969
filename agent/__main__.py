"""Entry point: replace this process by an isolated interpreter with an allow-listed environment, then the command line.

Whoever starts the agent may have set variables that steer an interpreter, a loader or a library (`PYTHONPATH`,
`SSLKEYLOGFILE`, `GRPC_TRACE`, proxies …). `-I` ignores Python's own; everything else is dropped here, before any module
that could read it is imported. That no loader variable (`LD_PRELOAD`) acted before this line rests on whoever starts us.
"""

import os
import sys

# What may pass: the terminal and the search path of people, not of programs. Nothing here is read by the boot itself.
_ALLOWED = ("TERM", "COLUMNS", "LINES", "NO_COLOR")
_FIXED = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "GRPC_VERBOSITY": "NONE"}


def main() -> int:
    """Run the command line; the value is the exit status."""
    for descriptor in (0, 1, 2):  # PID 1 may be started without: then a file of ours would get the number of stderr
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
    clean = {name: os.environ[name] for name in _ALLOWED if name in os.environ} | _FIXED
    if not sys.flags.isolated or dict(os.environ) != clean:
        os.execve(sys.executable, [sys.executable, "-I", "-m", "agent", *sys.argv[1:]], clean)  # ourselves
    from agent.cli import main as cli_main

    return cli_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
