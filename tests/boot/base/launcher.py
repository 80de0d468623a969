"""Stands in for kata-agent 4.x: launches the processes of an extension's manifest, waits for their sockets, makes the network.

As `launch_process` there: it looks for the socket once a second, and never again at the process. An error ends the machine.
"""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any


def main(root: Path) -> None:
    """`root`: where the extension is mounted."""
    manifest = tomllib.loads((root / "etc/kata-extensions/components.toml").read_text())
    assert manifest["schema_version"] == 1
    for process in manifest["process"]:
        launch(root, process)
    for command in (
        "addr add 10.0.2.15/24 dev eth0",
        "link set eth0 up",
        "route add default via 10.0.2.2",
    ):
        subprocess.run(["/opt/hand/busybox", "ip", *command.split()], check=True)
    print("base: the network is up", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


def launch(root: Path, process: dict[str, Any]) -> None:
    """Start one process, and wait for its socket."""
    assert process["level"] in (1, 2, 3), "another level is never launched"
    path, socket = root / process["path"], Path(process["wait_socket"])
    assert not socket.exists()
    # The last two words are the test's: it looks at the status from outside.
    subprocess.Popen([path, *process["args"], "--health", "0.0.0.0:8081"], env={"PATH": "/bin:/sbin:/usr/bin:/usr/sbin"})
    for _ in range(int(process["timeout_secs"]) + 1):
        time.sleep(1)
        if socket.is_socket():
            print(f"base: {process['id']} is ready for the network", flush=True)
            return
    raise TimeoutError(f"{process['id']} is not ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
