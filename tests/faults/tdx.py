"""Faults of a TDX guest's evidence, and of rows that are not for it."""

import errno
from collections.abc import Callable
from dataclasses import replace

from agent.errors import (
    Absence,
    ConfigNotMeasuredError,
    DeviceError,
    EvidenceBindingError,
    EvidenceFormat,
    KeyReleaseDeniedError,
    MalformedEvidenceError,
    NoAttesterError,
)
from agent.evidence import Tee
from agent.evidence.ccel import EventLog, pack_event_log
from agent.sim.tdx import CCEL_FILE, make_event_log
from tests.faults.table import ATTESTED, RELEASED, Attempts, Audit, Fault, FaultWorld

NEVER, ONCE = Attempts.NEVER, Attempts.ONCE


def _td(arrange: Callable[[FaultWorld], object]) -> Callable[[FaultWorld], None]:
    """A world whose guest and row are a TD's."""

    def whole(world: FaultWorld) -> None:
        world.tee["attester"] = "simulated-tdx"
        world.row_tee = Tee.TDX
        arrange(world)

    return whole


def _machine(**knobs: object) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        for name, value in knobs.items():
            assert hasattr(world.machine, name)
            setattr(world.machine, name, value)

    return _td(arrange)


def _row(**values: object) -> Callable[[FaultWorld], None]:
    return _td(lambda world: world.row_tdx.update(values))


def _listed(value: str) -> list[dict[str, str]]:
    return [{"id": "other-1", "value": value}]


def _denied(name: str, arrange: Callable[[FaultWorld], object], claim: str) -> Fault:
    audit: list[Audit] = [("attest", "denied", claim)]
    return Fault(name, KeyReleaseDeniedError, arrange, {"claim": claim}, audit, ONCE)


def launched_with(digest: bytes) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.host_data = digest

    return _td(arrange)


def row_without_tcb(world: FaultWorld) -> None:
    del world.row_tdx["tcb"]


def row_without_kernel(world: FaultWorld) -> None:
    del world.row_tdx["rtmr_2"]


def row_of_snp(world: FaultWorld) -> None:
    world.row_tee = Tee.SNP


def row_of_tdx(world: FaultWorld) -> None:
    world.row_tee = Tee.TDX


def no_simulation_roots(world: FaultWorld) -> None:
    world.broker_flags = []


def no_platform_key(world: FaultWorld) -> None:
    (world.machine.directory / "pck.key").unlink()


def _ccel(spoil: Callable[[EventLog], bytes]) -> Callable[[FaultWorld], None]:
    """A guest whose firmware left this table instead of the log of what it measured."""

    def arrange(world: FaultWorld) -> None:
        (world.machine.directory / CCEL_FILE).write_bytes(spoil(make_event_log(world.machine)))

    return _td(arrange)


def one_event_less(log: EventLog) -> bytes:
    return pack_event_log(replace(log, events=log.events[:-1])).ljust(64 << 10, b"\xff")


def cut_in_an_event(log: EventLog) -> bytes:
    return pack_event_log(log)[:-7]


def longer_than_may_be_sent(log: EventLog) -> bytes:
    return pack_event_log(replace(log, events=log.events * 800))


def without_log(world: FaultWorld) -> None:
    """Firmware that left an empty table, at a broker that wants a log."""
    (world.machine.directory / CCEL_FILE).touch()
    world.row_tdx["event_log"] = "required"


def must_measure(**knobs: object) -> Callable[[FaultWorld], None]:
    def arrange(world: FaultWorld) -> None:
        world.tee["runtime_measurement"] = "required"
        _machine(**knobs)(world)

    return arrange


def snp_that_must_measure(world: FaultWorld) -> None:
    world.tee["runtime_measurement"] = "required"


def _unmeasured(name: str, call: str, code: int, **knobs: object) -> Fault:
    """The key is at hand, sealed, and nothing opens it."""
    fields = {"interface": "rtmr", "call": call, "code": code}
    return Fault(name, DeviceError, _machine(**knobs), fields, [ATTESTED, RELEASED], ONCE)


_NOT_MEASURABLE = {"attester": "rtmr", "reason": Absence.NO_RUNTIME_REGISTER}


ROWS = [
    Fault("wrong MRCONFIGID", ConfigNotMeasuredError, launched_with(b"\x11" * 48), audit=[], attempts=NEVER),
    Fault("MRCONFIGID of zeros", ConfigNotMeasuredError, launched_with(bytes(48)), audit=[], attempts=NEVER),
    Fault("foreign report data in the quote", EvidenceBindingError, _machine(wrong_report_data=True), attempts=ONCE),
    Fault(
        "TDX device that fails with EIO", DeviceError, _machine(errno=5), {"interface": "simulated-tdx", "code": 5}, [], NEVER
    ),
    Fault(
        "platform whose key is gone",
        DeviceError,
        _td(no_platform_key),
        {"interface": "simulated-tdx", "call": "open", "code": 2},
        attempts=ONCE,
    ),
    _denied("debug TD", _machine(policy=0x30000 | 1 << 19), "tdx.td-debug"),
    _denied("quote with a wrong signature", _machine(flip_signature_bit=True), "tdx.report-signature"),
    _denied("quote of simulated silicon at a broker that trusts none", _td(no_simulation_roots), "tdx.certificate-chain"),
    _denied("wrong MRTD", _row(mr_td=_listed("11" * 48)), "tdx.mr_td"),
    _denied("policy that wants another MRCONFIGID", _row(mr_config_id=_listed("11" * 48)), "tdx.mr_config_id"),
    _denied("policy that wants another boot loader", _row(rtmr_1=_listed("11" * 48)), "tdx.rtmr_1"),
    _denied("policy that wants another kernel", _row(rtmr_2=_listed("11" * 48)), "tdx.rtmr_2"),
    _denied("policy that does not say which kernel", _td(row_without_kernel), "tdx.rtmr_2"),
    _denied("policy that wants other virtual hardware", _row(rtmr_0=_listed("11" * 48)), "tdx.rtmr_0"),
    _denied("policy that wants other events at run time", _row(rtmr_3=_listed("11" * 48)), "tdx.rtmr_3"),
    _denied("event log with one event less than the registers have", _ccel(one_event_less), "event-log.rtmr"),
    _denied("no event log for a row that requires one", _td(without_log), "tdx.event_log"),
    Fault(
        "event log that ends inside an event",
        MalformedEvidenceError,
        _ccel(cut_in_an_event),
        {"format": EvidenceFormat.EVENT_LOG, "field": "event_data"},
        attempts=ONCE,
    ),
    Fault(
        "event log of more than may be sent",
        MalformedEvidenceError,
        _ccel(longer_than_may_be_sent),
        {"format": EvidenceFormat.EVENT_LOG, "field": "length"},
        attempts=ONCE,
    ),
    _unmeasured("register that refuses the release with EIO", "extend", errno.EIO, register_errno=errno.EIO),
    _unmeasured("register that refuses the release with EINVAL", "extend", errno.EINVAL, register_errno=errno.EINVAL),
    _unmeasured("register that the TDX module does not know", "extend", errno.ENXIO, register_errno=errno.ENXIO),
    _unmeasured("register that another call keeps busy", "extend", errno.EBUSY, register_errno=errno.EBUSY),
    _unmeasured("register that loses the release", "read-back", errno.EIO, lose_extension=True),
    Fault(
        "kernel without a register for a guest that must measure",
        NoAttesterError,
        must_measure(register_errno=errno.ENOENT),
        _NOT_MEASURABLE,
        [],
        NEVER,
    ),
    Fault("SNP guest that must measure", NoAttesterError, snp_that_must_measure, _NOT_MEASURABLE, [], NEVER),
    _denied(
        "TDX module below the minimum",
        _row(minimum_tee_tcb_svn={"id": "module-2", "value": "07" + "00" * 15}),
        "tdx.tee_tcb_svn",
    ),
    _denied("TCB that nobody evaluated and the row does not allow", _row(tcb=["UpToDate"]), "tdx.tcb"),
    _denied("row that says nothing of the TCB", _td(row_without_tcb), "tdx.tcb"),
    _denied("TDX evidence for a row that wants SNP", _td(row_of_snp), "policy.tee"),
    _denied("SNP evidence for a row that wants TDX", row_of_tdx, "policy.tee"),
]
