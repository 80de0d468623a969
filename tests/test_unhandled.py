"""What nobody catches, in real processes: nothing on stderr, one closed event, and the text nowhere."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.artifact import ServedModel
from agent.channel import Channel
from agent.config_source import FoundConfig
from agent.errors import ConfigError, ConfigProblem
from agent.supervisor import HostHints, Supervisor
from agent.worker import work
from tests.children import in_child, readable

ROOT = Path(__file__).resolve().parents[1]
SECRET = "a prompt or a key"

PROGRAM = """
import json, os, sys, threading
from agent import unhandled
from agent.events import message_to_record
unhandled.install(lambda event: os.write(1, json.dumps(message_to_record(event)).encode() + b'\\n'))
class Finalized:
    def __del__(self): raise KeyError('a prompt or a key')
def fail(): raise LookupError('a prompt or a key')
"""


def run(program: str) -> tuple[int, list[dict[str, str]]]:
    """Exit status and events; whatever there is on stderr is a failure."""
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stderr == b""
    assert SECRET.encode() not in done.stdout
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("program", "status", "hook", "kind"),
    [
        ("fail()", 1, "main", "LookupError"),
        ("thread = threading.Thread(target=fail); thread.start(); thread.join()", 0, "thread", "LookupError"),
        ("Finalized()", 0, "unraisable", "KeyError"),
        ("class Odd(Exception): __name__ = 'x'\nraise Odd('a prompt or a key')", 1, "main", "Odd"),
    ],
)
def test_an_exception_nobody_caught_is_one_event_with_its_class(program: str, status: int, hook: str, kind: str) -> None:
    found, events = run(program)
    assert (found, len(events)) == (status, 1)
    assert (events[0]["event"], events[0]["hook"]) == ("exception_unhandled", hook)
    assert events[0]["place"].endswith(f":{kind}")


def test_a_thread_that_ends_by_system_exit_is_no_event() -> None:
    assert run("thread = threading.Thread(target=sys.exit); thread.start(); thread.join()") == (0, [])


def test_a_callback_of_the_loop_and_a_task_nobody_waits_for_are_events() -> None:
    program = """
import asyncio, gc
async def failing(): fail()
async def main():
    loop = asyncio.get_running_loop()
    unhandled.watch_loop(loop, lambda event: os.write(1, json.dumps(message_to_record(event)).encode() + b'\\n'))
    loop.call_soon(fail)
    task = loop.create_task(failing())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
    loop.call_exception_handler({'message': 'a prompt or a key'})
asyncio.run(main())
"""
    status, events = run(program)
    assert (status, [event["hook"] for event in events]) == (0, ["loop"] * 3)
    assert [event["place"].rsplit(":", 1)[1] for event in events] == ["LookupError", "LookupError", "unknown"]


def test_hooks_that_cannot_tell_stay_silent() -> None:
    assert run("def broken(event): raise OSError('a prompt or a key')\nunhandled.install(broken)\nFinalized()\nfail()") == (
        1,
        [],
    )


def test_silenced_libraries_log_nothing_at_any_level() -> None:
    program = """
import logging
logger = logging.getLogger('library')
logger.addHandler(logging.StreamHandler())
unhandled.silence_libraries()
for level in (logging.WARNING, logging.CRITICAL, 1000):
    logger.log(level, 'a prompt or a key')
    logging.getLogger('other').log(level, 'a prompt or a key')
logger.critical('%d', 'a prompt or a key')
"""
    assert run(program) == (0, [])


class Finalized:
    """Raises when it is thrown away."""

    def __del__(self) -> None:
        raise KeyError(SECRET)


def fail() -> None:
    raise LookupError(SECRET)


def throw_away_and_fail() -> None:
    Finalized()
    fail()


def test_the_worker_sends_its_events_before_its_outcome() -> None:
    def find() -> FoundConfig | None:
        """In a thread of the loop's, while the loop runs."""
        thread = threading.Thread(target=throw_away_and_fail)
        thread.start()
        thread.join()
        loops[0].call_soon_threadsafe(fail)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loops[0]).result(30)  # after it
        raise ConfigError(ConfigProblem.NOT_FOUND)

    loops: list[asyncio.AbstractEventLoop] = []

    class Policy(asyncio.DefaultEventLoopPolicy):
        """Only so that the test knows the loop, which `work` makes."""

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            loops.append(super().new_event_loop())
            return loops[-1]

    def scenario() -> tuple[list[dict[str, object]], bytes]:
        errors, errors_end = os.pipe()
        os.dup2(errors_end, 2)
        os.close(errors_end)
        asyncio.set_event_loop_policy(Policy())
        ours, theirs = Channel.pair()
        assert work(theirs, find, lambda _: pytest.fail("not reached")) == 0
        records = []
        while packet := ours.receive():
            records.append(packet.record)
        return records, os.read(errors, 1000)  # `work` has closed the other end: it says nothing and cannot

    records, stderr = in_child(scenario)
    assert stderr == b""
    assert SECRET not in json.dumps(records)
    seen = [(record["hook"], str(record["place"]).rsplit(":", 1)[1]) for record in records if "hook" in record]
    assert seen == [("unraisable", "KeyError"), ("thread", "LookupError"), ("loop", "LookupError")]
    assert (records[-1]["event"], records[-1]["class"]) == ("failed", "ConfigError")


def test_the_supervisor_tells_them_at_the_end_of_its_turn_and_goes_on() -> None:
    def scenario() -> bytes:
        lines, lines_end = os.pipe()
        os.dup2(lines_end, 2)
        os.close(lines_end)

        def raise_when_running() -> None:
            while not Path(f"/proc/self/task/{os.getpid()}/children").read_text():
                time.sleep(0.01)  # once the worker is there, the hooks are in place
            throw_away_and_fail()

        def worker(channel: Channel, _: ServedModel | None) -> int:
            while len(os.listdir(f"/proc/{os.getppid()}/task")) > 1:  # until the thread has raised
                time.sleep(0.01)
            return 3

        thread = threading.Thread(target=raise_when_running)
        thread.start()
        status = Supervisor("run", HostHints(None, None, None), worker, lambda *_: 0).run()
        thread.join()
        assert status == 21
        found = b""
        while readable(lines, 0):
            found += os.read(lines, 1 << 16)
        return found

    told = in_child(scenario)
    assert SECRET.encode() not in told
    events = [json.loads(line) for line in told.splitlines()]
    seen = [(event["hook"], event["place"].rsplit(":", 1)[1]) for event in events if event["event"] == "exception_unhandled"]
    assert seen == [("unraisable", "KeyError"), ("thread", "LookupError")]
    assert [event["event"] for event in events][-1] == "stopped"
    assert next(event for event in events if event["event"] == "failed")["class"] == "WorkerLostError"
