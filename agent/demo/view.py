"""What people and programs see of a demo: live stages and then a timeline, or one JSON line per event.

Owns presentation alone; every number comes from the agent's events or the result.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.demo import site
from agent.demo.run import TEXTS, Result, Told
from agent.events import (
    DestinationChosen,
    GatePassed,
    Message,
    Progress,
    ReleaseMeasured,
    ServerStarted,
    StageEnded,
    StageFailed,
    StageStarted,
    VerdictAccepted,
)

TIMELINE_COLUMNS = 60
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

# What each stage of the boot is for, in the words of whoever watches for the first time.
_MEANING = {
    "config": "read the configuration, take its digest",
    "devices": "open CPU TEE and GPU, check their modes",
    "identify": "find the manifest that the provider signed",
    "prepare": "authenticate the manifest, reserve guest memory",
    "attest": "broker's nonce → GPU evidence → CPU evidence → verdict",
    "release-credentials": "get the store's credentials, now that the guest is known",
    "release-key": "get the model key, still sealed to this guest",
    "measure": "note the release in the TEE's runtime register, where it has one",
    "secure": "set the GPU ready, once",
    "unwrap": "open the key, in locked memory",
    "load": "fetch and open every segment",
    "receipt": "sign what was opened, with a key that the TEE vouches for",
    "publish": "make the weights read-only, mount them for the server",
    "server": "start the model server, ask it once",
}


class JsonView:
    """For programs: our own steps and the agent's events as JSON lines on stderr."""

    @contextmanager
    def preparing(self, step: str) -> Iterator[Callable[[int, int], None]]:
        began = time.monotonic()
        yield lambda done_bytes, total_bytes: None
        _say({"event": "prepared", "step": step, "ms": _ms_since(began)})

    def told(self, told: Told) -> None:
        sys.stderr.write(told.line)
        sys.stderr.flush()

    def called(self, method: str, path: str, status: int) -> None:
        _say({"event": "kbs_called", "method": method, "path": path, "status": status})

    def serving(self, result: Result, port: int) -> None:
        _say({"event": "serving", "port": port})


def _say(record: dict[str, object]) -> None:
    sys.stderr.write(json.dumps(record) + "\n")
    sys.stderr.flush()


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


@dataclass(slots=True)
class _Row:
    """One line of the live view, and one bar of the timeline. Times are milliseconds on the clock of its table."""

    name: str
    began_ms: int
    ended_ms: int | None = None
    bytes: int | None = None
    total_bytes: int | None = None
    failed: bool = False


class HumanView:
    """For people: live tables while it runs, then the answers, and a timeline at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._began = self._agent_began = time.monotonic()
        self._preparation: list[_Row] = []
        self._boot: dict[str, _Row] = {}
        self._notes: list[str] = []
        self._live = Live(console=self._console, get_renderable=self._tables, refresh_per_second=12)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    @contextmanager
    def preparing(self, step: str) -> Iterator[Callable[[int, int], None]]:
        row = _Row(step, _ms_since(self._began))
        self._preparation.append(row)

        def count(done_bytes: int, total_bytes: int) -> None:
            row.bytes, row.total_bytes = done_bytes, total_bytes

        yield count
        row.ended_ms = _ms_since(self._began)
        self._agent_began = time.monotonic()

    def told(self, told: Told) -> None:
        match told.message:
            case StageStarted(stage):
                self._boot[stage.value] = _Row(stage.value, told.t_ms)
            case Progress(stage, done_bytes, total_bytes):
                self._boot[stage.value].bytes, self._boot[stage.value].total_bytes = done_bytes, total_bytes
            case StageEnded(stage, ms, done_bytes):
                row = self._boot[stage.value]
                row.ended_ms, row.bytes = row.began_ms + ms, done_bytes
            case StageFailed(stage):
                self._boot[stage.value].ended_ms, self._boot[stage.value].failed = told.t_ms, True
            case message:
                self._notes += _notes(message)

    def called(self, method: str, path: str, status: int) -> None:
        self._notes.append(f"KBS: {method} {path} → {status}")

    def serving(self, result: Result, port: int) -> None:
        self._show_answers(result)
        body = json.dumps({"model": site.MODEL_ID, "input": TEXTS[0]})
        curl = f"curl -s http://127.0.0.1:{port}/v1/embeddings -H 'Content-Type: application/json' -d '{body}'"
        self._console.print("\nThe model serves until you press Ctrl-C. Ask it yourself:\n")
        self._console.print(f"  {curl}\n", markup=False, soft_wrap=True)

    def ended(self, result: Result) -> None:
        """How it ended, and what happened when."""
        self._show_answers(result)
        self._console.print(self._timeline())
        if result.ok:
            self._console.print(
                "ok: the server had exactly the bytes that were sealed, and nothing of the boot is left", style="green"
            )
        elif result.error:
            text = f"stopped with status {result.status}: {result.error}\nnext step: {result.error.next_step}"
            self._console.print(text, style="red", markup=False)
        else:
            self._console.print(f"not as promised: {json.dumps(result.to_json())}", style="red", markup=False)

    def _show_answers(self, result: Result) -> None:
        if not self._live.is_started:
            return
        self._live.stop()  # its last picture stays
        if result.similarity:
            for text, value in zip(TEXTS[1:], result.similarity, strict=True):
                self._console.print(f"  “{TEXTS[0]}” and “{text}”: {value:.2f}", markup=False)
        if result.weights:
            same = "as before sealing" if result.weights.sha256 == result.sealed_sha256 else "NOT what was sealed"
            self._console.print(
                f"  the server's weights: {result.weights.filesystem}, sha256 {result.weights.sha256[:16]}…, {same}"
            )

    def _tables(self) -> RenderableType:
        """The live picture."""
        now, agent_now = _ms_since(self._began), _ms_since(self._agent_began)
        boot = [_cells(row, agent_now, _MEANING[row.name]) for row in self._boot.values()]
        parts: list[RenderableType] = [_table("around the guest", [_cells(row, now, "") for row in self._preparation])]
        if boot:
            parts.append(_table("in the guest", boot))
        return Group(*parts, *(Text(f"  {note}", style="dim") for note in self._notes))

    def _timeline(self) -> RenderableType:
        rows = [row for row in self._boot.values() if row.ended_ms is not None]
        table = Table(title="the boot, in milliseconds", title_justify="left", box=None, padding=(0, 1))
        for justify in ("left", "right", "left"):
            table.add_column(justify=justify)
        total = max((row.ended_ms or 0 for row in rows), default=0) or 1
        for row in rows:
            start = row.began_ms * TIMELINE_COLUMNS // total
            width = max(1, -(-(row.ended_ms or 0) * TIMELINE_COLUMNS // total) - start)
            table.add_row(row.name, str(row.began_ms), Text(" " * start + "█" * width, style="red" if row.failed else "cyan"))
        table.add_row("", str(total), "")
        return table


def _table(title: str, rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    for justify in ("left", "left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _cells(row: _Row, now_ms: int, meaning: str) -> tuple[str, ...]:
    icon = _SPINNER[now_ms // 80 % len(_SPINNER)] if row.ended_ms is None else "[red]✗[/]" if row.failed else "[green]✓[/]"
    size = "" if row.bytes is None else f"{row.bytes / 1e6:.1f} MB"
    if row.total_bytes and row.ended_ms is None:
        size = f"{size} of {row.total_bytes / 1e6:.1f}"
    return icon, row.name, f"{(now_ms if row.ended_ms is None else row.ended_ms) - row.began_ms} ms", size, f"[dim]{meaning}[/]"


def _notes(message: Message) -> list[str]:
    match message:
        case DestinationChosen(kind, _, noswap, swap_active):
            swapped = swap_active and not noswap
            return [
                f"the weights go to {kind}, in guest memory" + (" that can be swapped: a real guest refuses" if swapped else "")
            ]
        case VerdictAccepted(request_id, _, policy_version, simulated):
            evidence = "simulated evidence" if simulated else "evidence"
            return [f"{evidence} accepted under policy {policy_version}, request {request_id}"]
        case ReleaseMeasured(rtmr_3=str()):
            return ["that the key was released stands in RTMR 3 from here on"]
        case GatePassed(gpus, switches=switches):
            return [f"{gpus} GPU ready" + (f", {switches} NVSwitch locked" if switches else "")]
        case ServerStarted(own_uid=False) if os.geteuid() == 0:
            return ["the model server runs as root: no other user can execute the interpreter from here"]
        case _:
            return []
