import errno
import mmap
import os
from pathlib import Path

import pytest

from agent.artifact.memory import DetachedTmpfs, SealedMemfd, demand_of
from agent.errors import DestinationError, DestinationProblem

PAGE = mmap.PAGESIZE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making mounts needs root")


def test_windows_of_one_file_overlap_in_a_page_and_write_the_same_bytes() -> None:
    destination = SealedMemfd(None)
    data = os.urandom(3 * PAGE)
    destination.create("w", len(data))
    for start, end in ((0, 10), (10, PAGE + 1), (PAGE + 1, len(data))):
        with destination.window("w", start, end - start) as window:
            window.populate(start, end - start)
            with window.view(start, end - start) as view:
                view[:] = data[start:end]
    with destination.window("w", 5, len(data) - 5) as window, window.view(7, 2 * PAGE) as view:
        assert bytes(view) == data[7 : 7 + 2 * PAGE]
    destination.close()


def test_bytes_copied_in_are_those_of_the_view_and_come_out_again() -> None:
    destination = SealedMemfd(None)
    destination.create("w", PAGE)
    out = bytearray(5)
    with destination.window("w", 0, PAGE) as window:
        window.copy_in(100, memoryview(b"12345"))
        window.copy_out(100, memoryview(out))
        with window.view(100, 5) as view:
            assert bytes(view) == bytes(out) == b"12345"
        with pytest.raises(DestinationError):
            window.copy_out(PAGE - 4, memoryview(out))
    destination.close()


def test_a_window_on_nothing_is_empty() -> None:
    destination = SealedMemfd(None)
    destination.create("w", 0)
    with destination.window("w", 0, 0) as window:
        window.populate(0, 0)
        with window.view(0, 0) as view:
            assert len(view) == 0
    destination.close()


def test_a_window_through_which_bytes_are_only_copied_maps_nothing() -> None:
    destination = SealedMemfd(None)
    destination.create("w", PAGE)
    with destination.window("w", 0, PAGE) as window:
        window.copy_in(0, memoryview(b"12345"))
        assert "memfd:keyturn" not in Path("/proc/self/maps").read_text()
    destination.close()


def test_a_window_is_kept_out_of_core_files() -> None:
    destination = SealedMemfd(None)
    destination.create("w", PAGE)
    with destination.window("w", 0, PAGE) as window:
        window.populate(0, PAGE)
        smaps = Path("/proc/self/smaps").read_text()
    mapping = smaps[smaps.index("memfd:keyturn") :]
    flags = mapping[mapping.index("VmFlags:") :].splitlines()[0].split()
    assert "dd" in flags  # "do not include area into core dump", proc(5)
    destination.close()


@needs_root
def test_memory_that_is_not_there_is_an_error_not_a_signal() -> None:
    destination = DetachedTmpfs(demand_of({"w": PAGE}), None)
    destination.create("w", 2 * PAGE)
    with destination.window("w", 0, 2 * PAGE) as window:
        with pytest.raises(DestinationError) as caught:
            window.populate(0, 2 * PAGE)
        with pytest.raises(DestinationError) as caught_copy:
            window.copy_in(0, memoryview(bytes(2 * PAGE)))
    destination.close()
    assert caught.value.problem is DestinationProblem.KERNEL
    assert caught_copy.value.code == errno.ENOSPC
