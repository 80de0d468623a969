"""How the agent can be started, and which promises a way of starting it does not hold.

A promise that is not listed is held. What is listed is a fact, and a test of the built image shows it (`tests/test_image.py`);
`deploy/README.md` has the same list for people.
"""

from enum import Enum, StrEnum

from agent.config import MeasuredConfig


class Mode(StrEnum):
    """Who starts the agent."""

    GUEST = "guest"
    """`keyturn run --guest`, as PID 1 or a unit of a measured image."""
    ENTRYPOINT = "entrypoint"
    """`keyturn run` in the server's container."""
    LOAD = "load"
    """`keyturn load` in an init container; another container serves."""


class Unheld(Enum):
    """A promise that is not held, by its name in reports, and what is so instead."""

    GATE = "gate", "the image's init makes the GPUs ready before anybody attests them: gpu.ready_state is preset"
    PLACE = "place", "the model lies at a path in somebody else's tmpfs: whoever mounts that too reads it"
    SEAL = "seal", "only file modes forbid writing there: mount it readOnly wherever it is used, and run nothing there as root"
    KILL = "kill", "when the agent is killed, plaintext stays there until it is started again or the pod ends"
    WIPE = "wipe", "the model stays when the agent has ended, and ends with the pod"
    SERVER = "server", "nobody of ours starts, confines, watches or stops the server, and the host can start it without this"
    LEASE = "lease", "nobody would obey a lease, so a key that comes with one is refused (exit 22)"
    SCRATCH = (
        "scratch",
        "without CAP_SYS_ADMIN the server's scratch folder lies in the pod's /dev/shm, and its /tmp is the image's",
    )

    def __init__(self, label: str, text: str) -> None:
        self.label = label
        self.text = text


def unheld(mode: Mode, config: MeasuredConfig) -> tuple[Unheld, ...]:
    """The promises that are not held when the agent is started so with this configuration, in the order of `Unheld`."""
    given = config.artifact.destination == "directory"
    loads = mode is Mode.LOAD
    so = {
        Unheld.GATE: config.gpu.count > 0 and config.gpu.ready_state == "preset",
        Unheld.PLACE: given,
        Unheld.SEAL: given,
        Unheld.KILL: given,
        Unheld.WIPE: loads,
        Unheld.SERVER: loads,
        Unheld.LEASE: loads,
        # A tmpfs of its own needs the same capability, so there it has it or stops.
        Unheld.SCRATCH: mode is Mode.ENTRYPOINT and config.artifact.destination != "tmpfs",
    }
    return tuple(promise for promise in Unheld if so[promise])
