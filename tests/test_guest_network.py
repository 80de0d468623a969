import asyncio
import ctypes
import errno
import functools
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import AgentError, GuestInitError, NoRouteError
from agent.guest.network import (
    RouteAnswer,
    RouteWatch,
    StaticAddress,
    bring_up_loopback,
    configure,
    has_route,
    interfaces,
    parse_ip_parameter,
    parse_routes,
    resolv_conf,
    wait_for_route,
)
from tests.children import IS_ROOT, in_child, readable

CLONE_NEWNET = 0x40000000
SOON_S = 20.0
PARAMETER = "10.9.0.2::10.9.0.1:255.255.255.0::v0:off"
CABLE = "link add v0 type veth peer name v1", "link set v1 up"
UP = *CABLE, "addr add 10.9.0.2/24 dev v0", "link set v0 up"

_Result = TypeVar("_Result")


def ip(*commands: str) -> None:
    """iproute2 in the caller's namespace, one process for all commands."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def in_namespace(scenario: Callable[[], _Result]) -> _Result:
    """What `scenario` returns in a process with a network namespace of its own: a loopback that is down, nothing else."""

    def enter_and_run() -> _Result:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        return scenario()

    return in_child(enter_and_run)


@functools.cache
def why_no_namespaces() -> str | None:
    if not IS_ROOT:
        return "network namespaces need CAP_SYS_ADMIN"
    if shutil.which("ip") is None:
        return "interfaces are made by iproute2, which is not installed"
    return in_namespace(lambda: None if subprocess.run(["ip", *CABLE[0].split()]).returncode == 0 else "no veth in this kernel")


@pytest.fixture
def _namespaces() -> None:
    if (reason := why_no_namespaces()) is not None:
        pytest.skip(reason)


needs_namespaces = pytest.mark.usefixtures("_namespaces")


# --- the kernel's tables ----------------------------------------------------------------------------------------------


@needs_namespaces
def test_a_new_guest_has_a_loopback_that_is_no_way_out() -> None:
    def scenario() -> None:
        assert (has_route(), interfaces()) == (False, 0)
        bring_up_loopback()
        bring_up_loopback()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            pass
        assert (has_route(), interfaces()) == (False, 0)

    in_namespace(scenario)


@needs_namespaces
@pytest.mark.parametrize(
    "commands",
    [
        UP,
        (*CABLE, "link set v0 up", "route add 10.0.0.0/8 dev v0"),
        (*CABLE, "link set v0 up", "route add default dev v0"),
        (*CABLE, "link set v0 up", "route add ::/0 dev v0"),
        (*CABLE, "link set v0 up", "route add fd00::/8 dev v0"),
        (*CABLE, "link set v0 up", "link set lo up", "route add 10.0.0.0/8 nexthop dev lo nexthop dev v0"),
        (*UP, "route flush dev v0", "nexthop add id 7 dev v0", "route add 10.0.0.0/8 nhid 7"),
        (*CABLE, "link set v0 up", "route add 169.0.0.0/8 dev v0"),
        (*CABLE, "link set v0 up", "route add fe00::/8 dev v0"),
    ],
    ids="; ".join,
)
def test_these_routes_count(commands: tuple[str, ...]) -> None:
    def scenario() -> bool:
        ip(*commands)
        return has_route()

    assert in_namespace(scenario)


@needs_namespaces
@pytest.mark.parametrize(
    "commands",
    [
        (*CABLE, "link set v0 up"),  # the kernel adds fe80::/64 by itself
        (*CABLE, "addr add 10.9.0.2/24 dev v0"),
        (*CABLE, "link set v0 up", "addr add 169.254.3.4/16 dev v0"),
        (*CABLE, "link set v0 up", "route add 169.254.169.254 dev v0"),
        (*CABLE, "link set v0 up", "route add fe80::/10 dev v0"),
        (*CABLE, "link set v0 up", "addr add 10.9.0.2/32 dev v0"),
        (*CABLE, "link set v0 up", "route add 10.0.0.0/8 dev v0 table 100"),
        (*CABLE, "link set v0 up", "route add 10.0.0.0/8 dev v0 table 510"),  # 254 in the low byte
        ("link set lo up", "route add 10.0.0.0/8 dev lo"),
        ("link set lo up", "addr add 10.9.0.2/24 dev lo"),
        ("link set lo up", "route add fd00::/8 dev lo"),
        ("link set lo up", "route add 10.0.0.0/8 nexthop dev lo nexthop dev lo weight 2"),
        ("link set lo name bond0", "link set bond0 up", "route add 10.0.0.0/8 dev bond0"),
        ("route add blackhole 10.0.0.0/8",),
        ("route add unreachable default",),
        ("route add prohibit default",),
        ("route add blackhole ::/0",),
        ("link set lo up", "route add local 10.0.0.0/8 dev lo table main"),
        ("link add v0 type veth peer name v1", "link set v0 up", "route add default dev v0"),  # no carrier
    ],
    ids="; ".join,
)
def test_these_routes_do_not_count(commands: tuple[str, ...]) -> None:
    def scenario() -> bool:
        ip(*commands)
        return has_route()

    assert not in_namespace(scenario)


@needs_namespaces
def test_a_table_of_many_datagrams_is_read_to_its_end() -> None:
    def scenario() -> list[bool]:
        ip(*(f"route add blackhole 10.{high}.{low}.0/24" for high in range(8) for low in range(256)))
        before = has_route()
        ip(*CABLE, "link set v0 up", "route add fd00::/8 dev v0")
        return [before, has_route()]

    assert in_namespace(scenario) == [False, True]


# --- the wait ---------------------------------------------------------------------------------------------------------


async def waits_until(change: Callable[[], None], timeout_s: float = SOON_S) -> None:
    waiting = asyncio.create_task(wait_for_route(timeout_s))
    await asyncio.sleep(0)  # one step of it: it has looked, and waits
    assert not waiting.done()
    started = time.monotonic()
    change()
    await waiting
    assert time.monotonic() - started < timeout_s / 2, "it was the last look at the deadline that saw the change"


@needs_namespaces
def test_the_wait_ends_when_another_process_adds_a_route() -> None:
    def scenario() -> None:
        ip(*CABLE, "link set v0 up")
        asyncio.run(waits_until(lambda: ip("route add default dev v0")))
        assert has_route()

    in_namespace(scenario)


@needs_namespaces
def test_the_wait_ends_when_the_carrier_of_a_route_comes_up() -> None:
    def scenario() -> None:
        without_ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")  # whose own routes come with the carrier
        if without_ipv6.exists():
            without_ipv6.write_text("1")
        ip(CABLE[0], "link set v0 up", "route add default dev v0")
        asyncio.run(waits_until(lambda: ip("link set v1 up")))
        assert has_route()

    in_namespace(scenario)


@needs_namespaces
def test_changes_that_bring_no_route_do_not_end_the_wait_and_are_looked_at_once() -> None:
    def scenario() -> str:
        ip(*CABLE)
        busy_s = time.process_time()
        with pytest.raises(NoRouteError) as caught:
            asyncio.run(waits_until(lambda: ip("route add blackhole 10.0.0.0/8", "link set v0 up"), timeout_s=0.4))
        assert time.process_time() - busy_s < 0.2
        return str(caught.value)

    assert in_namespace(scenario) == "no route out of this guest after 0 s, 2 network interfaces (operator)"


@needs_namespaces
def test_a_wait_of_no_time_looks_once() -> None:
    def scenario() -> tuple[int, int]:
        with pytest.raises(NoRouteError) as caught:
            asyncio.run(wait_for_route(0))
        ip(*CABLE, "link set v0 up", "route add ::/0 dev v0")
        asyncio.run(wait_for_route(0))
        return caught.value.waited_s, caught.value.interfaces

    assert in_namespace(scenario) == (0, 0)


@needs_namespaces
def test_a_wait_that_is_cancelled_leaves_nothing_behind() -> None:
    async def cancelled() -> None:
        before = os.listdir("/proc/self/fd")
        waiting = asyncio.create_task(wait_for_route(SOON_S))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert os.listdir("/proc/self/fd") == before
        ip(*CABLE, "link set v0 up")
        await waits_until(lambda: ip("route add default dev v0"))  # a new watch under the same number

    in_namespace(lambda: asyncio.run(cancelled()))


@needs_namespaces
def test_a_watch_tells_changes_until_it_is_drained_and_is_not_inherited() -> None:
    def scenario() -> None:
        with RouteWatch() as watch:
            assert not os.get_inheritable(watch.fileno())
            watch.drain()
            for change in (CABLE[0], "route add blackhole 10.0.0.0/8", "route add blackhole fd00::/8"):
                assert not readable(watch.fileno(), 0)
                ip(change)
                assert readable(watch.fileno(), 0)
                watch.drain()

    in_namespace(scenario)


@needs_namespaces
def test_messages_that_were_lost_are_no_error() -> None:
    def scenario() -> bool:
        with RouteWatch() as watch:
            ip(*(f"route add blackhole 10.{high}.{low}.0/24" for high in range(8) for low in range(256)))
            sockets = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()]
            assert any(int(columns[8]) for columns in sockets[1:] if int(columns[3], 16)), "nothing was dropped"
            watch.drain()
            return readable(watch.fileno(), 0)

    assert not in_namespace(scenario)


# --- the answer as bytes ----------------------------------------------------------------------------------------------


def message(kind: int, body: bytes, flags: int = 2, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 4321) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def route(
    *attributes: bytes, family: int = socket.AF_INET, bits: int = 0, table: int = 254, kind: int = 1, flags: int = 0
) -> bytes:
    head = struct.pack("=8BI", family, bits, 0, 0, table, 3, 0, kind, flags)
    return message(24, head + b"".join(attributes))


def hop(interface: int, flags: int = 0, more: bytes = b"") -> bytes:
    return struct.pack("=HBBi", 8 + len(more), flags, 0, interface) + more


OVER_2 = attribute(4, struct.pack("=i", 2))
OVER_LOOPBACK = attribute(4, struct.pack("=i", 1))
GATEWAY = attribute(5, bytes([10, 0, 2, 2]))
DONE = message(3, bytes(4))
WAY_OUT = RouteAnswer(leads_out=True, done=False, interrupted=False)
NO_WAY_OUT = RouteAnswer(leads_out=False, done=False, interrupted=False)


@pytest.mark.parametrize(
    ("datagram", "answer"),
    [
        (route(OVER_2, GATEWAY), WAY_OUT),
        (route(OVER_2, family=socket.AF_INET6), WAY_OUT),
        (route(OVER_LOOPBACK) + route(OVER_2), WAY_OUT),
        (route(OVER_2, attribute(15, struct.pack("=I", 254)), table=252), WAY_OUT),
        (route(OVER_2, attribute(15 | 0x8000, struct.pack("=I", 510))), NO_WAY_OUT),
        (route(OVER_2, attribute(1, bytes([169, 254, 0, 0])), bits=16), NO_WAY_OUT),
        (route(OVER_2, attribute(1, bytes([169, 254, 0, 0])), bits=15), WAY_OUT),
        (route(OVER_2, attribute(1, b"\xfe\xbf" + bytes(14)), bits=128, family=socket.AF_INET6), NO_WAY_OUT),
        (route(OVER_2, attribute(1, b"\xfe\xc0" + bytes(14)), bits=10, family=socket.AF_INET6), WAY_OUT),
        (route(OVER_2, flags=0x1), NO_WAY_OUT),
        (route(OVER_2, flags=0x10), NO_WAY_OUT),
        (route(OVER_2, flags=0x200), NO_WAY_OUT),
        (route(OVER_2, kind=6), NO_WAY_OUT),
        (route(OVER_2, table=255), NO_WAY_OUT),
        (route(OVER_2, family=128, bits=255), NO_WAY_OUT),
        (route(GATEWAY), NO_WAY_OUT),
        (route(attribute(9, b"")), NO_WAY_OUT),
        (route(attribute(9, hop(1) + hop(2, more=GATEWAY))), WAY_OUT),
        (route(attribute(9, hop(1) + hop(2, flags=1) + hop(3, flags=16))), NO_WAY_OUT),
        (DONE, RouteAnswer(leads_out=False, done=True, interrupted=False)),
        (route(OVER_2) + DONE, RouteAnswer(leads_out=True, done=True, interrupted=False)),
        (message(24, route(GATEWAY)[16:], flags=0x12) + DONE, RouteAnswer(leads_out=False, done=True, interrupted=True)),
        (message(3, bytes(4), flags=0x12), RouteAnswer(leads_out=False, done=True, interrupted=True)),
    ],
)
def test_a_datagram_says_whether_a_route_leads_out(datagram: bytes, answer: RouteAnswer) -> None:
    assert parse_routes(datagram) == answer


@pytest.mark.parametrize(
    ("datagram", "code"),
    [
        (message(2, struct.pack("=i", -errno.EPERM) + bytes(16)), errno.EPERM),
        (message(3, struct.pack("=i", -errno.ENOMEM)), errno.ENOMEM),
        (message(2, bytes(20)), errno.EBADMSG),  # an acknowledgement, which nobody asked for
        (message(2, struct.pack("=i", 1)), errno.EBADMSG),
        (message(2, struct.pack("=i", -(1 << 31))), errno.EBADMSG),
        (message(3, struct.pack("=i", 1)), errno.EBADMSG),
        (message(3, b""), errno.EBADMSG),
        (message(4, bytes(4)), errno.EBADMSG),
        (message(20, bytes(24)), errno.EBADMSG),
        (b"", errno.EBADMSG),
        (DONE[:-1], errno.EBADMSG),
        (DONE + DONE, errno.EBADMSG),
        (DONE + b"\0", errno.EBADMSG),
        (message(3, bytes(4), sequence=2), errno.EBADMSG),
        (struct.pack("=IHHII", 0, 24, 2, 1, 0), errno.EBADMSG),
        (struct.pack("=IHHII", 0xFFFFFFFF, 24, 2, 1, 0), errno.EBADMSG),
        (message(24, bytes(11)), errno.EBADMSG),
        (route(attribute(4, bytes(3))), errno.EBADMSG),
        (route(attribute(15, bytes(8))), errno.EBADMSG),
        (route(OVER_2, attribute(1, bytes(16))), errno.EBADMSG),
        (route(OVER_2, attribute(1, bytes(4)), bits=33), errno.EBADMSG),
        (route(OVER_2, b"\0\0\0"), errno.EBADMSG),
        (route(OVER_2, struct.pack("=HH", 3, 1)), errno.EBADMSG),
        (route(OVER_2, struct.pack("=HH", 9, 1) + bytes(4)), errno.EBADMSG),
        (route(attribute(9, hop(2) + bytes(4))), errno.EBADMSG),
        (route(attribute(9, struct.pack("=HBBi", 0, 0, 0, 2))), errno.EBADMSG),
        (route(attribute(9, struct.pack("=HBBi", 12, 0, 0, 2))), errno.EBADMSG),
    ],
)
def test_an_answer_that_is_an_error_or_none_is_refused_with_its_errno(datagram: bytes, code: int) -> None:
    with pytest.raises(OSError) as caught:
        parse_routes(datagram)
    assert caught.value.errno == code


@given(st.binary(max_size=128))
@example(b"\xff" * 64)
def test_whatever_bytes_come_they_are_an_answer_or_an_oserror(noise: bytes) -> None:
    whole = route(OVER_2, attribute(9, hop(1) + hop(2)), attribute(1, bytes(4)))
    datagrams = [noise, message(24, noise), message(2, noise), message(3, noise), route(noise), route(attribute(9, noise))]
    datagrams += [whole[:cut] + noise for cut in range(0, len(whole), 7)]
    for datagram in datagrams:
        try:
            parse_routes(datagram)
        except OSError:
            continue


# --- the address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "static"),
    [
        (PARAMETER, StaticAddress("10.9.0.2", "255.255.255.0", "10.9.0.1", "v0", ())),
        ("10.0.2.15:::255.0.0.0", StaticAddress("10.0.2.15", "255.0.0.0", None, None, ())),
        ("192.0.2.1::192.0.2.0:255.255.255.254", StaticAddress("192.0.2.1", "255.255.255.254", "192.0.2.0", None, ())),
        ("192.0.2.1:::255.255.255.255::eth0:none", StaticAddress("192.0.2.1", "255.255.255.255", None, "eth0", ())),
        (
            "10.0.2.15:10.0.2.9:10.0.2.2:255.255.255.0:guest-1.test:enp0s1.7:off:10.0.2.3:9.9.9.9:10.0.2.4",
            StaticAddress("10.0.2.15", "255.255.255.0", "10.0.2.2", "enp0s1.7", ("10.0.2.3", "9.9.9.9")),
        ),
        ("10.0.2.15:::255.255.255.0:::::9.9.9.9:", StaticAddress("10.0.2.15", "255.255.255.0", None, None, ("9.9.9.9",))),
    ],
)
def test_an_ip_parameter_is_read_as_the_kernel_writes_it(value: str, static: StaticAddress) -> None:
    assert parse_ip_parameter(value) == static


@pytest.mark.parametrize(
    "value",
    [
        "",
        "off",
        "none",
        "dhcp",
        ":::::eth0:dhcp",
        "10.0.2.15",
        "10.0.2.15::10.0.2.2",
        "10.0.2.15::10.0.2.2:255.255.255.0:::dhcp",
        "10.0.2.15::10.0.2.2:255.255.255.0:::OFF",
        "10.0.2.15::10.0.2.2:255.255.255.0::eth0:on",
        "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off::::",
        ":::255.255.255.0",
        "10.0.2.15:::",
        "::10.0.2.2:255.255.255.0",
        "10.0.2:::255.255.255.0",
        "10.0.2.015:::255.255.255.0",
        "10.0.2.256:::255.255.255.0",
        "0x0a00020f:::255.255.255.0",
        " 10.0.2.15:::255.255.255.0",
        "10.0.2.15\0:::255.255.255.0",
        "10.0.2.15\n:::255.255.255.0",
        "١٠.0.2.15:::255.255.255.0",
        "\udcff:::255.255.255.0",
        "[fd00::1]:::64",
        "10.0.2.15:::24",
        "10.0.2.15:::0.0.0.0",
        "10.0.2.15:::255.0.255.0",
        "10.0.2.15:::0.0.0.255",
        "0.0.0.0:::255.255.255.0",
        "127.0.0.2:::255.255.255.0",
        "224.0.0.1:::255.255.255.0",
        "255.255.255.255:::255.255.255.0",
        "10.0.2.0:::255.255.255.0",
        "10.0.2.255:::255.255.255.0",
        "10.0.2.15::10.0.2.15:255.255.255.0",
        "10.0.2.15::10.0.3.1:255.255.255.0",
        "10.0.2.15::10.0.2.255:255.255.255.0",
        "10.0.2.15::10.0.2.2:255.255.255.255",
        "10.0.2.15:nfs:10.0.2.2:255.255.255.0",
        "10.0.2.15::10.0.2.2:255.255.255.0:a b",
        "10.0.2.15::10.0.2.2:255.255.255.0::../eth0",
        "10.0.2.15::10.0.2.2:255.255.255.0::..",
        "10.0.2.15::10.0.2.2:255.255.255.0::sixteen-letters_",
        "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:dns",
        "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off::9.9.9",
        "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:::ntp",
    ],
)
def test_an_ip_parameter_that_leaves_anything_open_is_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(GuestInitError) as caught:
        parse_ip_parameter(value)
    assert str(caught.value) == "guest init: kernel parameter ip failed (operator)"
    assert caught.value.__cause__ is None


_FIELD = st.sampled_from(["", "10.0.2.15", "10.0.2.2", "255.255.255.0", "255.255.255.254", "eth0", "off"]) | st.text(
    max_size=20
)


@given(st.lists(_FIELD, max_size=12))
def test_whatever_an_ip_parameter_says_it_is_an_address_or_an_error_of_ours(fields: list[str]) -> None:
    try:
        static = parse_ip_parameter(":".join(fields))
    except AgentError:
        return
    again = (
        f"{static.address}::{static.gateway or ''}:{static.netmask}::{static.device or ''}:off:{':'.join(static.nameservers)}"
    )
    assert parse_ip_parameter(again) == static


def test_name_servers_make_a_resolv_conf() -> None:
    assert resolv_conf(StaticAddress("10.0.2.15", "255.255.255.0", None, None, ())) == ""
    static = StaticAddress("10.0.2.15", "255.255.255.0", None, None, ("10.0.2.3", "9.9.9.9"))
    assert resolv_conf(static) == "nameserver 10.0.2.3\nnameserver 9.9.9.9\n"


@needs_namespaces
def test_a_configured_interface_is_a_way_out_and_stays_so_the_second_time() -> None:
    def scenario() -> list[str]:
        ip(*CABLE)
        for _ in range(2):
            assert configure(parse_ip_parameter(PARAMETER))
            asyncio.run(wait_for_route(SOON_S))
        shown = [["ip", "-4", "-br", "addr", "show", "v0"], ["ip", "route", "show"]]
        return [" ".join(subprocess.check_output(command, text=True).split()) for command in shown]

    address, routes = in_namespace(scenario)
    assert address.replace("v0@v1 UP ", "") == "10.9.0.2/24"
    assert routes == "default via 10.9.0.1 dev v0 10.9.0.0/24 dev v0 proto kernel scope link src 10.9.0.2"


@needs_namespaces
def test_without_a_device_it_is_the_first_that_is_not_the_loopback() -> None:
    def scenario() -> str:
        ip("link add z0 index 7 type veth peer name a0 index 9", "link set a0 up")
        assert configure(parse_ip_parameter(PARAMETER.replace("v0", "")))
        return subprocess.check_output(["ip", "-o", "-4", "addr"], text=True).split()[1]

    assert in_namespace(scenario) == "z0"


@needs_namespaces
@pytest.mark.parametrize("device", ["", "eth0", "lo"])
def test_an_interface_that_is_not_there_can_be_waited_for(device: str) -> None:
    assert in_namespace(lambda: configure(parse_ip_parameter(PARAMETER.replace("v0", device)))) is False


@needs_namespaces
def test_a_kernel_that_refuses_is_an_error_with_the_interface_and_its_errno() -> None:
    def scenario() -> str:
        ip(*CABLE)
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(GuestInitError) as caught:
            configure(parse_ip_parameter(PARAMETER))
        return str(caught.value)

    assert in_namespace(scenario) == f"guest init: network interface v0 failed (errno {errno.EPERM}) (operator)"


@needs_namespaces
def test_an_interface_up_wakes_a_watch_so_that_pid_1_can_wait_for_it() -> None:
    def scenario() -> bool:
        static = parse_ip_parameter(PARAMETER)
        with RouteWatch() as watch:
            assert not configure(static)
            ip(*CABLE)
            assert readable(watch.fileno(), 0)
            return configure(static)

    assert in_namespace(scenario)
