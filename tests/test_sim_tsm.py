"""Rules of the simulated configfs-tsm that no kernel can be brought to show in a test; the others are `tsm_steps.py`."""

import errno
from collections.abc import Callable

import pytest

from agent.sim.tsm import Entry, Tsm

INBLOB = bytes(64)
LAST = (1 << 64) - 1


@pytest.fixture
def tsm() -> Tsm:
    tsm = Tsm(lambda data, privlevel: (data, b""))
    tsm.mkdir("entry")
    return tsm


def refused(act: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        act()
    return caught.value.errno


def at(entry: Entry, generation: int) -> Entry:
    entry.write_generation = generation
    return entry


def test_so_many_writes_that_an_old_report_would_count_as_new_are_refused_until_a_report_is_made(tsm: Tsm) -> None:
    entry = at(tsm.entries["entry"], LAST - 1)
    tsm.release(entry, INBLOB)
    assert tsm.read(entry, "generation") == b"%d\n" % LAST
    for option, value in (("privlevel", b"0"), ("service_provider", b"svsm"), ("service_guid", b"x")):
        assert refused(lambda option=option, value=value: tsm.write_text(entry, option, value)) == errno.EBUSY  # type: ignore[misc]
    tsm.release(entry, b"lost")
    assert tsm.read(entry, "outblob") == INBLOB
    tsm.write_text(entry, "privlevel", b"1")
    assert tsm.read(entry, "generation") == b"0\n"


def test_a_generation_that_goes_round_is_another_one_all_the_same(tsm: Tsm) -> None:
    entry = at(tsm.entries["entry"], LAST - 1)
    tsm.release(entry, INBLOB)
    tsm.read(entry, "outblob")
    tsm.release(entry, b"1" * 64)
    assert entry.write_generation == 0
    assert tsm.read(entry, "outblob") == b"1" * 64


def test_a_value_of_a_removed_entry_is_nobodys(tsm: Tsm) -> None:
    entry = tsm.entries["entry"]
    tsm.rmdir("entry")
    tsm.release(entry, INBLOB)
    assert entry.inblob == b""
    assert refused(lambda: tsm.rmdir("entry")) == errno.ENOENT
