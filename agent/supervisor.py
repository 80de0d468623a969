"""The supervisor: forks the worker, takes the open model from it, runs the model server, and tells the world.

Small and single-threaded, standard library only; it never holds a key. Owns the process tree, signals, the private mount
namespace and the four faces of `report.py`. What happens after key release ends with this process: the kernel kills worker and
server with it (PDEATHSIG), and the model's mount goes with its namespace. The lease is obeyed through `renewal.py`, whatever
the server does meanwhile. There is never more than one worker, beside the watch over the GPUs (`gpu_watch.py`).
"""

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

from agent import __version__, unhandled
from agent.artifact import ServedModel, given
from agent.channel import Channel, Packet
from agent.closed import Ident
from agent.errors import (
    EXIT_SERVED,
    AgentError,
    BootInterruptedError,
    ConfigError,
    ConfigProblem,
    DestinationError,
    DestinationProblem,
    InternalError,
    VolumeAuthenticationError,
    WorkerLostError,
)
from agent.events import (
    BootStarted,
    ExceptionUnhandled,
    Hook,
    LocalChecksPassed,
    Message,
    ModelLeft,
    ModelReleased,
    ServerEnded,
    ServerOutputInherited,
    ServerReady,
    ServerRestarting,
    ServerStarted,
    Stage,
    StageEnded,
    StageFailed,
    StageStarted,
    Stopped,
    Stopping,
    Wiped,
    WorkerEnded,
    message_from_record,
)
from agent.gpu_watch import GpuWatch, WatchMain
from agent.guest import hardening, mounts, systemd
from agent.health import HealthPort, WaitSocket, listen
from agent.loop import Loop
from agent.publish import RUN_DIRECTORY, HandedModel, is_damaged, make_mount_points, publish, release, take_over
from agent.renewal import Renewal
from agent.report import MAX_RECEIPT_BYTES, BootReport
from agent.server import Output, Placement, policy
from agent.server.probe import Probe, start_probe
from agent.server.process import ServerProcess, reap_orphans, spawn
from agent.stages import stage
from agent.telling import Teller, start_of
from agent.worker_process import WorkerProcess

DEFAULT_STATUS_FILE = f"{RUN_DIRECTORY}/status.json"
DEFAULT_TERMINATION_LOG = "/dev/termination-log"
ASK_AGAIN_S = 0.5
MAX_UNHANDLED = 16

WorkerMain = Callable[[Channel, ServedModel | None], int]
"""Runs in the forked worker and returns its exit status: a boot, or a renewal for the model that is served."""


@dataclass(frozen=True, slots=True)
class HostHints:
    """What whoever starts the agent may choose. Nothing here decides anything."""

    status_file: str | None
    termination_log: str | None
    health_address: tuple[str, int] | None
    wait_socket: str | None = None
    """An absolute path that appears, as a socket, when the local checks have passed."""


class Supervisor:
    """One boot from fork to wipe. `run` may be called once."""

    def __init__(self, mode: str, hints: HostHints, worker: WorkerMain, watch: WatchMain) -> None:
        """Nothing is started yet."""
        self._worker_main = worker
        self._teller = Teller(
            BootReport(__version__, mode, os.getpid(), start_of(os.getpid()) or 0),
            hints.status_file,
            hints.termination_log,
            systemd.from_environment(),
        )
        self._hints = hints
        self._loop = Loop()
        self._private_mounts = False
        self._worker: WorkerProcess | None = None
        self._handed: HandedModel | None = None
        self._given: str | None = None  # where plaintext outlives a killed worker
        self._left: ModelLeft | None = None  # there, and it shall stay
        self._model: HandedModel | None = None
        self._renewal = Renewal(self._loop, self._in_renewal, self._tell, self._fail)
        self._gpu_watch = GpuWatch(self._loop, watch, self._tell, self._fail)
        self._undo = ExitStack()  # compensations of publishing
        self._wait_socket: WaitSocket | None = None
        self._placement: Placement | None = None
        self._policy: policy.RestartPolicy | None = None
        self._server: ServerProcess | None = None
        self._probe: Probe | None = None
        self._stop_signal = 0
        self._asked_to_stop = False
        self._serving_since = 0.0
        self._error: AgentError | None = None
        self._unhandled: deque[ExceptionUnhandled] = deque(maxlen=MAX_UNHANDLED)

    @property
    def report(self) -> BootReport:
        return self._teller.report

    def run(self) -> int:
        """Boot, serve, wipe. The value is the exit status."""
        unhandled.install(self._on_unhandled)
        try:
            self._loop.watch_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._stop)
            self._prepare()
            self._loop.run(self._after_turn)
        except AgentError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  # a bug must not leave a server running unwatched
            self._fail(InternalError.of(error))
        return self._wipe()

    def _prepare(self) -> None:
        """What can fail without a key being asked for fails here. Then the worker is on its way."""
        # refusal: test_the_supervisor_is_not_dumpable_and_holds_no_library
        hardening.harden_agent()
        hardening.become_subreaper()
        try:
            with suppress(PermissionError):  # not root: no mounts of our own, the destination will be another
                mounts.enter_private_mount_namespace()
                self._private_mounts = True
            if self._private_mounts:
                make_mount_points()
        except OSError as error:  # root without a root mount (chroot), or without /run: nothing is mounted where others see it
            raise DestinationError(DestinationProblem.MOUNT_POINT, error.errno or 0) from error
        self._teller.keep_receipt(None)
        self._tell(BootStarted(Ident(__version__), Ident(self._teller.report.mode)))
        if self._hints.health_address:
            try:
                HealthPort(listen(self._hints.health_address), self._loop.selector, self._teller.report)
            except (OSError, UnicodeError) as error:
                raise ConfigError(ConfigProblem.ADDRESS, Ident("health")) from error
        if self._hints.wait_socket:
            try:
                self._wait_socket = WaitSocket(self._hints.wait_socket)
            except OSError as error:
                raise ConfigError(ConfigProblem.ADDRESS, Ident("wait-socket")) from error
            self._undo.callback(self._wait_socket.remove)
            HealthPort(self._wait_socket.listener, self._loop.selector, self._teller.report)
        self._worker = WorkerProcess(
            self._loop, lambda channel: self._worker_main(channel, None), self._on_packet, self._on_worker_end
        )

    def _tell(self, message: Message) -> None:
        self._teller.tell(message)

    def _stop(self, number: int) -> None:
        """A signal asks for the end."""
        again, self._stop_signal = self._stop_signal != 0, number
        self._renewal.stop()
        self._gpu_watch.stop()
        if self._worker:
            # Its device thread is joined, never killed: that can take a minute, and the status says so.
            self._tell(Stopping(number, Ident("worker")))
            if not again:  # the second would find it without a handler, in the middle of its own wipe
                self._worker.ask_to_stop()
        elif self._policy and not again:
            self._tell(Stopping(number, Ident("server") if self._server else None))
            if not self._policy.served and self._error is None:
                self._error = BootInterruptedError(number)
            self._obey(self._policy.decide(policy.StopRequested(), time.monotonic()))
        elif again:
            self._loop.ended = True  # asked twice: do not wait for the server

    # --- worker -------------------------------------------------------------------------------------------------------

    def _in_renewal(self, channel: Channel) -> int:
        assert self._model
        return self._worker_main(channel, self._model.served)

    def _on_packet(self, packet: Packet) -> None:
        if "loaded" in packet.record:
            self._handed = HandedModel.of(packet.record["loaded"], packet.descriptors)
            take_over(self._handed, self._undo)
            return
        if "receipt" in packet.record:
            (descriptor,) = packet.descriptors
            with open(descriptor, "rb") as file:
                self._teller.keep_receipt(file.read(MAX_RECEIPT_BYTES))
            return
        if isinstance(directory := packet.record.get("given"), str):
            self._given = directory
            return
        if isinstance(version := packet.record.get("left"), int):
            self._left = ModelLeft(version)
            return
        message = message_from_record(packet.record)
        if isinstance(message, AgentError):
            if self._stop_signal:
                return  # it was told to stop: what it met on the way out is not why it ended
            self._error = message
        self._tell(message)
        if isinstance(message, LocalChecksPassed) and self._wait_socket:
            try:
                self._wait_socket.show()
            except OSError as error:
                raise ConfigError(ConfigProblem.ADDRESS, Ident("wait-socket")) from error

    def _on_worker_end(self, lost: WorkerLostError, peak_kib: int) -> None:
        self._worker = None
        self._tell(WorkerEnded(peak_kib))
        if self._error:  # told already
            self._loop.ended = True
        elif self._stop_signal:
            self._fail(BootInterruptedError(self._stop_signal))
        elif self._left is not None:
            self._given = None
            self._tell(self._left)
            self._loop.ended = True
        elif self._handed is None:
            self._fail(lost)
        else:
            self._serve(self._handed)

    # --- model and server ---------------------------------------------------------------------------------------------

    def _serve(self, model: HandedModel) -> None:
        self._model, plan = model, model.plan
        if model.lease:
            self._renewal.obey(model.lease)
        if self._error:
            return
        if model.watch_gpus:
            self._gpu_watch.begin(model.simulated_machine)
        try:
            with stage(Stage.PUBLISH, self._tell):
                self._placement = publish(model, self._private_mounts, self._undo)
        except AgentError as error:
            self._fail(error)
            return
        if plan.output is Output.INHERIT:
            self._tell(ServerOutputInherited())
        self._policy = policy.RestartPolicy(
            ready_timeout_s=plan.ready_timeout_s,
            max_restarts=0 if model.release else plan.max_restarts,  # there will be nothing to start it with
            restart_window_s=plan.restart_window_s,
        )
        self._tell(StageStarted(Stage.SERVER))
        self._serving_since = time.monotonic()
        self._obey(self._policy.decide(policy.Begin(), time.monotonic()))

    def _obey(self, action: policy.Action) -> None:
        match action:
            case policy.Start():
                self._start_server()
            case policy.Wait(seconds):
                self._loop.wake("policy", seconds, self._tick)
            case policy.Stop():
                self._ask_server_to_stop()
            case policy.GiveUp(error):
                self._look_for_damage()  # a server may wait for ever for a block that it cannot have
                self._fail(error)

    def _tick(self) -> None:
        assert self._policy
        self._obey(self._policy.decide(policy.Tick(), time.monotonic()))

    def _start_server(self) -> None:
        assert self._model and self._placement and self._policy
        plan = self._model.plan
        try:
            self._server = server = spawn(plan, self._placement)
        except AgentError as error:
            self._fail(error)
            return
        self._tell(ServerStarted(server.pid, self._policy.starts, own_uid=bool(plan.uid), landlock=server.landlock))
        self._loop.watch(server.pidfd, self._on_server_end)
        if server.output_fd is not None:
            output = server.output_fd
            self._loop.watch(output, lambda: None if server.drain() else self._loop.unwatch(output))
        self._ask_ready()
        self._obey(self._policy.decide(policy.Tick(), time.monotonic()))

    def _ask_ready(self) -> None:
        assert self._model
        assert self._probe is None
        try:
            self._probe = probe = start_probe(self._model.plan)
        except AgentError as error:
            self._fail(error)
            return
        self._loop.watch(probe.fd, lambda: self._on_probe(probe))

    def _on_probe(self, probe: Probe) -> None:
        assert self._policy and self._server
        now = time.monotonic()
        if probe.read():
            self._obey(self._policy.decide(policy.NotReady(probe.last_reason), now))
            return
        self._loop.unwatch(probe.fd)
        self._probe = None
        running = probe.finish(self._server)
        if running is None:
            self._loop.wake("probe", ASK_AGAIN_S, self._ask_ready)  # the server has ended, or something killed the probe
            return
        if Stage.SERVER in self._teller.report.running():
            self._tell(StageEnded(Stage.SERVER, running.ready_after_ms))
        self._tell(ServerReady(running.ready_after_ms, self._policy.starts))
        self._obey(self._policy.decide(policy.Ready(), now))
        self._release_model()

    def _release_model(self) -> None:
        assert self._model
        if self._model.release:
            try:
                self._tell(ModelReleased(release(self._model)))
            except AgentError as error:
                self._fail(error)

    def _on_server_end(self) -> None:
        try:
            ended = self._destroy_server()
        except AgentError as error:
            self._fail(error)
            return
        self._look_for_damage()
        if self._error or self._stop_signal:
            self._loop.ended = True
            return
        assert self._policy
        action = self._policy.decide(ended, time.monotonic())
        if isinstance(action, policy.Wait):
            self._tell(ServerRestarting(round((action.seconds or 0) * 1000), self._policy.starts + 1))
        self._obey(action)

    def _look_for_damage(self) -> None:
        """A server that met a damaged block of its volume did not fail by itself, and would meet it again."""
        assert self._model
        try:
            if is_damaged(self._model):
                self._fail(VolumeAuthenticationError())
        except OSError as error:
            self._fail(DestinationError(DestinationProblem.KERNEL, error.errno or 0))

    def _destroy_server(self) -> policy.Exited:
        assert self._server
        server, self._server = self._server, None
        self._stop_probe()
        self._loop.unwatch(server.pidfd)
        if server.output_fd is not None:
            self._loop.unwatch(server.output_fd)
        ended = server.destroy(self._children())
        self._tell(ServerEnded(ended.status, ended.signal, server.output.total_bytes))
        return ended

    def _stop_probe(self) -> None:
        self._loop.wake("probe", None, self._ask_ready)
        if self._probe:
            self._loop.unwatch(self._probe.fd)
            self._probe.stop()
            self._probe = None

    def _ask_server_to_stop(self) -> None:
        """Once: many servers take a second SIGTERM as an order to die at once."""
        self._loop.wake("policy", None, self._tick)
        self._stop_probe()
        if Stage.SERVER in self._teller.report.running():
            self._tell(StageFailed(Stage.SERVER, round((time.monotonic() - self._serving_since) * 1000)))
        if self._server is None:
            self._loop.ended = True
        elif not self._asked_to_stop:
            assert self._model
            self._asked_to_stop = True
            self._server.ask_to_stop()
            self._loop.wake("kill", self._model.plan.stop_timeout_s, self._loop.end)

    def _on_unhandled(self, event: ExceptionUnhandled) -> None:
        """Kept for the end of this turn: a finalizer may raise in the middle of telling something else."""
        self._unhandled.append(event)
        if event.hook is Hook.MAIN:  # there is no other turn
            self._tell_unhandled()

    def _tell_unhandled(self) -> None:
        while self._unhandled:
            self._tell(self._unhandled.popleft())

    def _after_turn(self) -> None:
        self._tell_unhandled()
        self._reap()

    def _reap(self) -> None:
        reap_orphans((*self._children(), *([self._server.pid] if self._server else [])))

    def _children(self) -> tuple[int, ...]:
        """Our own children that are not the server's."""
        children = (self._worker, self._renewal.worker, self._gpu_watch.worker, self._probe)
        return tuple(child.pid for child in children if child)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, error: AgentError) -> None:
        """Tell the failure at once, then bring everything to an end."""
        if self._error is not None:
            return
        self._error = error
        self._renewal.stop()
        self._gpu_watch.stop()
        self._ask_server_to_stop()
        self._tell(error)

    def _removed(self, remove: Callable[[], None]) -> bool:
        try:
            remove()
        except OSError as error:  # of our own mounts the kernel takes the rest with the process
            self._error = self._error or DestinationError(DestinationProblem.KERNEL, error.errno or 0)
            return False
        return True

    def _wipe(self) -> int:
        """Run every compensation, whatever happened; then the last word."""
        wiped = True
        if self._server:
            try:
                self._destroy_server()
            except AgentError as error:
                wiped = False
                self._error = self._error or error
                self._tell(error)
        wiped &= self._removed(self._undo.close)
        self._gpu_watch.destroy()
        if worker := self._worker or self._renewal.worker:  # last: server and model wait for nobody's device request
            if worker.is_alive():
                self._tell(Stopping(self._stop_signal, Ident("worker")))
            worker.destroy()
        if self._given is not None:  # what the worker had not handed over
            wiped &= self._removed(partial(given.wipe, self._given))
        if wiped and (self._left is None or self._error):
            self._tell(Wiped())
        if self._error and self._teller.report.error is None:
            self._tell(self._error)
        self._tell_unhandled()
        status = self._error.exit_status if self._error else EXIT_SERVED
        self._tell(Stopped(status))
        self._teller.last_word()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # or one that comes while the interpreter ends would change the status
        return status
