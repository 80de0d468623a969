"""Faults of a container in a CoCo guest: of the guest's own API, of what is behind it, and of `keyturn load`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from agent.artifact import left
from agent.errors import (
    Absence,
    AgentError,
    ConfigError,
    ConfigNotMeasuredError,
    ConfigProblem,
    CredentialsProblem,
    DeviceError,
    GpuCountError,
    GuestApiError,
    GuestApiProblem,
    KeyMismatchError,
    KeyNotDeliveredError,
    KeyReleaseDeniedError,
    KeyUnwrapError,
    LeaseUnsupervisedError,
    NoAttesterError,
    ReceiptError,
    ReceiptProblem,
    SimulationRefusedError,
    StoreCredentialsError,
    TokenCheck,
    TokenError,
    UnwrapCheck,
)
from agent.sim.api_server_rest import Components
from tests.faults.table import Attempts, Audit, Fault, FaultWorld
from tests.fuzz.targets import keyset_seeds
from tests.test_handshake_ear import SERVICE, STRANGER, payload, signed, submod
from tests.world import CREDENTIALS_URI, DEADLINE_S, KEY_URI, free_port

NEVER, ONCE = Attempts.NEVER, Attempts.ONCE
_NAME = KEY_URI.removeprefix("kbs:///")
Break = Callable[[FaultWorld, Components], object]


def _evidence(
    name: str,
    error: type[AgentError],
    breaks: Break,
    fields: dict[str, object] | None = None,
    audit: list[Audit] | None = None,
    attempts: Attempts = NEVER,
) -> Fault:
    """Evidence through the API, the key from our broker. A fault of the local checks comes before anything is asked for."""
    audit = audit if audit is not None or attempts is ONCE else []
    return Fault(name, error, lambda world: breaks(world, world.through_coco()), fields or {}, audit, attempts)


def _key(name: str, error: type[AgentError], breaks: Break, fields: dict[str, object] | None = None) -> Fault:
    """Evidence and key through the API."""
    return Fault(name, error, lambda world: breaks(world, world.key_from_cdh()), fields or {}, [], ONCE, broker=False)


def _set(**knobs: object) -> Break:
    def change(_: FaultWorld, components: Components) -> None:
        for name, value in knobs.items():
            assert hasattr(components, name)
            setattr(components, name, value)

    return change


def _machine(**knobs: object) -> Break:
    def change(world: FaultWorld, _: Components) -> None:
        for name, value in knobs.items():
            assert hasattr(world.machine, name)
            setattr(world.machine, name, value)

    return change


def _token(
    *, stranger: bool = False, age_s: int = 0, init_data: bytes | None = None, kind: str = "snp", gpus: int | None = None
) -> Break:
    """Another token than the one that fits."""

    def change(world: FaultWorld, components: Components) -> None:
        def make() -> str:
            made = int(time.time()) - age_s
            launched = world.machine.host_data if init_data is None else init_data
            devices = {f"gpu{n}": submod("nvidia", {}) for n in range(world.machine.gpu.count if gpus is None else gpus)}
            body = payload(cpu0=submod(kind, {}, init_data=launched.hex()), **devices) | {"iat": made, "exp": made + 300}
            return signed(body, key=STRANGER if stranger else SERVICE)

        components.token = make

    return change


def nobody_listens(world: FaultWorld, _: Components) -> None:
    world.tee |= {"coco_url": f"http://127.0.0.1:{free_port()}", "wait_s": 0}


def not_simulated(world: FaultWorld, components: Components) -> None:
    """As on a guest without a TEE: its attestation-agent falls back to sample evidence."""
    components.attester = None
    world.tee |= {"attester": "coco", "wait_s": 0}


def other_launch(world: FaultWorld, _: Components) -> None:
    world.host_data = b"\x11" * 32


def gpu_without_evidence(world: FaultWorld, _: Components) -> None:
    world.machine.gpu.fail_calls = {"nvmlDeviceGetConfComputeGpuAttestationReport": 999}


def simulation_not_allowed(world: FaultWorld, _: Components) -> None:
    del world.broker_config["allow_simulated"]


def broker_and_cdh(world: FaultWorld, _: Components) -> None:
    world.broker_config["cdh"] = True


def elsewhere(world: FaultWorld, _: Components) -> None:
    world.tee["coco_url"] = "http://192.0.2.1:8006"


def lease_without_a_server(world: FaultWorld) -> None:
    out = world.undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
    world.server = {}
    world.artifact |= {"destination": "directory", "directory": out, "unsafe_allow_swap": True}
    world.row["lease_s"] = 3600
    world.prepare()
    world.start_broker()


def load(world: FaultWorld) -> str:
    """`keyturn load`, and its last word, which is what Kubernetes shows."""
    flags = {
        "out": world.artifact["directory"],
        "config": world.folder / "keyturn.toml",
        "status-file": "",
        "termination-log": world.folder / "termination",
    }
    command = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "agent", "load", *command], capture_output=True, timeout=DEADLINE_S)
    assert os.listdir(world.artifact["directory"]) == []
    text = (world.folder / "termination").read_text()
    assert f"exit status: {LeaseUnsupervisedError(1).exit_status}" in text
    return text.replace("step: ", "step ", 1)  # as on a console's last line


def nothing_left(world: FaultWorld) -> None:
    """What `keyturn exec` finds where the host has left the init container out."""
    out = world.undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        left.read_receipt(folder)
    finally:
        os.close(folder)


def credentials_absent(world: FaultWorld, _: Components) -> None:
    world.keep_credentials(world.canaries.config_secret)


def credentials_of_another_form(world: FaultWorld, components: Components) -> None:
    resource = world.keep_credentials(world.canaries.config_secret, realm="models")
    components.resources = {**components.resources, CREDENTIALS_URI.removeprefix("kbs:///"): resource}


ROWS = [
    # Before anything is asked for.
    _evidence("nobody at tee.coco_url", NoAttesterError, nobody_listens, {"reason": Absence.NO_GUEST_API}),
    _evidence("sample evidence on a real guest", NoAttesterError, not_simulated, {"reason": Absence.SAMPLE}),
    _evidence(
        "api-server-rest with resources alone",
        GuestApiError,
        _set(feature="resource"),
        {"call": "info", "problem": GuestApiProblem.FEATURES},
    ),
    _evidence(
        "attestation-agent that does not answer",
        GuestApiError,
        _set(dead=True),
        {"call": "info", "problem": GuestApiProblem.LOST},
    ),
    _evidence(
        "guest-components before encoding=base64",
        GuestApiError,
        _set(knows_base64=False),
        {"call": "evidence", "problem": GuestApiProblem.ENCODING},
    ),
    _evidence(
        "attestation-agent whose device fails",
        DeviceError,
        _machine(errno=5),
        {"interface": "api-server-rest", "call": "evidence", "code": 500},
    ),
    _evidence("container in a guest of another launch", ConfigNotMeasuredError, other_launch),
    _evidence(
        "two ways to the key", ConfigError, broker_and_cdh, {"problem": ConfigProblem.NEEDS_OTHER_KEY, "key": "broker.cdh"}
    ),
    _evidence(
        "api-server-rest that is not on the loopback",
        ConfigError,
        elsewhere,
        {"problem": ConfigProblem.BAD_VALUE, "key": "tee.coco_url"},
    ),
    Fault("server without its init container", ReceiptError, fields={"problem": ReceiptProblem.MISSING}, drive=nothing_left),
    # In the handshake.
    _evidence("GPU left out by the attestation-agent", GpuCountError, gpu_without_evidence, {"got": 0}, attempts=ONCE),
    _evidence(
        "evidence through the API that does not verify",
        KeyReleaseDeniedError,
        _machine(flip_signature_bit=True),
        {"claim": "snp.report-signature"},
        [("attest", "denied", "snp.report-signature")],
        ONCE,
    ),
    # A key from the confidential-data-hub.
    Fault(
        "api-server-rest with attestation alone, and the key to come from it",
        GuestApiError,
        lambda world: setattr(world.key_from_cdh(), "feature", "attestation"),
        {"problem": GuestApiProblem.FEATURES},
        [],
        NEVER,
        broker=False,
    ),
    _key(
        "no credentials of the store to be had",
        KeyNotDeliveredError,
        credentials_absent,
        {"call": "resource", "problem": GuestApiProblem.FAILED, "status": 500},
    ),
    _key(
        "credentials of the store that are none",
        StoreCredentialsError,
        credentials_of_another_form,
        {"problem": CredentialsProblem.FORM},
    ),
    _key("no token to be had", GuestApiError, _set(token=None), {"call": "token", "problem": GuestApiProblem.FAILED}),
    _key("guest's token of a stranger", TokenError, _token(stranger=True), {"check": TokenCheck.SIGNATURE}),
    _key("guest's token of yesterday", TokenError, _token(age_s=86400), {"check": TokenCheck.EXPIRED}),
    _key("guest's token of tomorrow", TokenError, _token(age_s=-86400), {"check": TokenCheck.NOT_YET_VALID}),
    _key("token about a guest of another launch", TokenError, _token(init_data=bytes(32)), {"check": TokenCheck.LAUNCH}),
    _key("token about a guest of another TEE", TokenError, _token(kind="sgx"), {"check": TokenCheck.CLAIMS}),
    _key("token about no GPU", GpuCountError, _token(gpus=0), {"expected": 1, "got": 0}),
    _key("token about a GPU more", GpuCountError, _token(gpus=2), {"expected": 1, "got": 2}),
    _key("guest's token over simulated silicon", SimulationRefusedError, simulation_not_allowed),
    _key("no resource of the key's name", KeyNotDeliveredError, _set(resources={}), {"problem": GuestApiProblem.FAILED}),
    _key(
        "resource shorter than a key",
        KeyNotDeliveredError,
        _set(resources={_NAME: bytes(31)}),
        {"problem": GuestApiProblem.MALFORMED},
    ),
    _key(
        "resource longer than a key",
        KeyUnwrapError,
        _set(resources={_NAME: bytes(33)}),
        {"check": UnwrapCheck.KEYSET.value},
    ),
    _key(
        "resource longer than a keyset",
        KeyNotDeliveredError,
        _set(resources={_NAME: bytes((2 << 10) + 1)}),
        {"problem": GuestApiProblem.TOO_LARGE},
    ),
    _key("keyset that holds another key", KeyMismatchError, _set(resources={_NAME: keyset_seeds()[0]})),
    _key("resource that is another key", KeyMismatchError, _set(resources={_NAME: bytes(32)})),
    # An init container.
    Fault(
        "lease for a model that nobody of ours serves",
        LeaseUnsupervisedError,
        lease_without_a_server,
        drive=load,
        may_stay=frozenset({"termination", "audit.jsonl"}),
    ),
]
