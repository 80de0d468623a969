"""Faults of configuration, initdata and the guest itself: found before anything is asked for."""

import os
from pathlib import Path

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.commands.run import open_hardware, watch_gpus
from agent.config_source import FoundConfig, find_in_guest
from agent.errors import (
    ConfigConflictError,
    ConfigError,
    ConfigNotMeasuredError,
    ConfigProblem,
    GuestInitError,
    GuestPart,
    InitdataError,
    InitdataProblem,
    InternalError,
    NoAttesterError,
    SimulationRefusal,
    SimulationRefusedError,
    SupervisorLostError,
)
from agent.guest import pid1
from agent.report import BootReport
from agent.server.process import fork
from agent.supervisor import HostHints, Supervisor
from agent.worker import work
from tests.children import in_child
from tests.faults.table import ATTESTED, Attempts, Fault, FaultWorld

NEVER = Attempts.NEVER


def _config(name: str, problem: ConfigProblem, arrange: object, key: str | None = None) -> Fault:
    fields = {"problem": problem} | ({"key": key} if key else {})
    return Fault(name, ConfigError, arrange, fields, [], NEVER)  # type: ignore[arg-type]  # a row's own function


def _written(text: bytes) -> object:
    """A configuration of exactly these bytes, with the digest of which the guest is launched."""

    def arrange(world: FaultWorld) -> None:
        path = world.folder / "keyturn.toml"

        def write() -> Path:
            path.write_bytes(text)
            return path

        world.write_config = write  # type: ignore[method-assign]  # the world's, not the product's

    return arrange


def unknown_key(world: FaultWorld) -> None:
    world.server["prot"] = 1


def missing_key(world: FaultWorld) -> None:
    del world.broker_config["key_uri"]


def wrong_type(world: FaultWorld) -> None:
    world.server["port"] = "eighty"


def bad_value(world: FaultWorld) -> None:
    world.gpu["count"] = 17


def bad_endpoint(world: FaultWorld) -> None:
    world.broker_config["endpoints"] = ["kbs.test:70000"]


def directory_without_destination(world: FaultWorld) -> None:
    world.artifact["directory"] = "/dev/shm/elsewhere"


def ca_that_is_none(world: FaultWorld) -> None:
    world.broker_config["token_keys"] = ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]


def two_configurations(world: FaultWorld) -> None:
    """Initdata with the entry, in an image that has a file of its own."""
    config = world.write_config()
    for path, source in {
        "run/confidential-containers/initdata/initdata.toml": world.write_initdata(config, "sha256"),
        "etc/keyturn/keyturn.toml": config,
    }.items():
        copy = world.folder / "root" / path
        copy.parent.mkdir(parents=True)
        copy.write_bytes(source.read_bytes())


def _initdata(name: str, problem: InitdataProblem, text: bytes) -> Fault:
    def arrange(world: FaultWorld) -> None:
        def write(_config: Path, _algorithm: str) -> Path:
            path = world.folder / "initdata.toml"
            path.write_bytes(text)
            return path

        world.write_initdata = write  # type: ignore[method-assign,assignment]  # the world's, not the product's

    return Fault(name, InitdataError, arrange, {"problem": problem}, [], NEVER, initdata="sha256")


def launched_with_other_configuration(world: FaultWorld) -> None:
    world.host_data = bytes(32)


def no_tee(world: FaultWorld) -> None:
    world.tee = {"attester": "snp", "wait_s": 0}


def simulation_not_allowed(world: FaultWorld) -> None:
    world.broker_config["allow_simulated"] = False


def unknown_file_system(_: FaultWorld) -> None:
    pid1._mount("keyturn-none", "/tmp", 0, "")


def supervisor_killed(_: FaultWorld) -> str:
    def supervise() -> BootReport:
        os.kill(os.getpid(), 9)
        return BootReport("not reached", "init")

    return in_child(lambda: pid1._watch(supervise, fork)[0])


def bug_in_the_worker(world: FaultWorld) -> str:
    """An exception outside the tree, with a secret in its text."""

    def find_config() -> FoundConfig | None:
        raise ZeroDivisionError(world.canaries.config_secret)

    def worker(channel: Channel, _: ServedModel | None) -> int:
        return work(channel, find_config, open_hardware)

    def boot() -> str:
        hints = HostHints(str(world.folder / "status" / "status.json"), str(world.folder / "termination"), None)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        supervisor = Supervisor("run", hints, worker, watch_gpus)
        supervisor.run()
        return supervisor.report.last_line()

    return in_child(boot)


ROWS = [
    _config("unknown key in the configuration", ConfigProblem.UNKNOWN_KEY, unknown_key, "server.prot"),
    _config("missing key in the configuration", ConfigProblem.MISSING_KEY, missing_key, "broker.key_uri"),
    _config("wrong type in the configuration", ConfigProblem.WRONG_TYPE, wrong_type, "server.port"),
    _config("value out of range in the configuration", ConfigProblem.BAD_VALUE, bad_value, "gpu.count"),
    _config("port out of range in an endpoint", ConfigProblem.BAD_VALUE, bad_endpoint, "broker.endpoints[0]"),
    _config("two keys that exclude one another", ConfigProblem.NEEDS_OTHER_KEY, directory_without_destination),
    _config("token key that is no key", ConfigProblem.BAD_VALUE, ca_that_is_none, "broker.token_keys[0]"),
    _config("empty configuration", ConfigProblem.WRONG_SCHEMA, _written(b"")),
    _config("configuration of another schema", ConfigProblem.WRONG_SCHEMA, _written(b'schema = "keyturn/v9"\n')),
    _config("configuration that is no TOML", ConfigProblem.NOT_TOML, _written(b"canary = = 1\n")),
    _config("configuration that is no UTF-8", ConfigProblem.NOT_UTF8, _written(b'schema = "\xff"\n')),
    _config("configuration of more than 1 MiB", ConfigProblem.TOO_LARGE, _written(b"#" * ((1 << 20) + 1))),
    _initdata("initdata that is no TOML", InitdataProblem.NOT_TOML, b"version = \n"),
    _initdata("initdata of another version", InitdataProblem.VERSION, b"version = '9'\nalgorithm = 'sha256'\n[data]\n"),
    _initdata("initdata with a weak digest", InitdataProblem.ALGORITHM, b"version = '0.1.0'\nalgorithm = 'md5'\n[data]\n"),
    _initdata(
        "initdata without our entry", InitdataProblem.NO_ENTRY, b"version = '0.1.0'\nalgorithm = 'sha256'\n[data]\na = ''\n"
    ),
    _initdata("initdata whose data is no table", InitdataProblem.DATA, b"version = '0.1.0'\nalgorithm = 'sha256'\ndata = 1\n"),
    Fault(
        "two configurations in one guest",
        ConfigConflictError,
        two_configurations,
        drive=lambda world: find_in_guest(world.folder / "root"),
    ),
    Fault(
        "guest launched with another configuration",
        ConfigNotMeasuredError,
        launched_with_other_configuration,
        audit=[],
        attempts=NEVER,
    ),
    Fault(
        "guest launched with another initdata",
        ConfigNotMeasuredError,
        launched_with_other_configuration,
        audit=[],
        attempts=NEVER,
        initdata="sha384",
    ),
    Fault("no TEE device", NoAttesterError, no_tee, {"attester": "snp"}, [], NEVER),
    Fault(
        "simulation not allowed by the guest",
        SimulationRefusedError,
        simulation_not_allowed,
        {"reason": SimulationRefusal.NOT_ALLOWED},
        [ATTESTED],
        Attempts.ONCE,
    ),
    Fault(
        "mount that the kernel refuses to the guest's init",
        GuestInitError,
        fields={"part": GuestPart.MOUNT, "name": "tmp"},
        drive=unknown_file_system,
    ),
    Fault("supervisor killed under the guest's init", SupervisorLostError, drive=supervisor_killed),
    Fault(
        "exception outside the tree in the worker",
        InternalError,
        drive=bug_in_the_worker,
        may_stay=frozenset({"status/status.json", "termination"}),
    ),
]
