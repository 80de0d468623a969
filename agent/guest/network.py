"""Has this guest a way out yet, and, for PID 1, making one from the kernel parameter `ip=`.

Owns the question to the kernel's routing tables and the wait for it, the loopback, and one static IPv4 address. Knows no
DHCP, writes no file, and does not judge whether a route leads to the broker: that shows when it is called.
In a Kata guest kata-agent sets the routes, long after we started. Follows rtnetlink(7), netlink(7), netdevice(7) and the
kernel's `admin-guide/nfs/nfsroot.rst`. Standard library only: the supervisor imports it.
"""

import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from agent.closed import Ident
from agent.errors import GuestInitError, GuestPart, NoRouteError

ANSWER_TIMEOUT_S = 1.0  # for each read; the kernel answers before send() returns
MAX_DUMPS = 8  # of one family, while others change it
MAX_DATAGRAMS = 1024  # at most 32 KiB each
_DATAGRAM_BYTES = 64 << 10  # af_netlink.c never fills more than 32 KiB, so none is cut

_LOOPBACK = 1  # drivers/net/loopback.c: BUG_ON(dev->ifindex != LOOPBACK_IFINDEX), in every namespace
# include/uapi/linux/netlink.h, rtnetlink.h
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_RTM_NEWROUTE = 24
_RTM_GETROUTE = 26
_NLM_F_REQUEST = 0x1
_NLM_F_DUMP_INTR = 0x10
_NLM_F_DUMP = 0x300
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_ROUTE = 0x40
_RTMGRP_IPV6_ROUTE = 0x400
_RTN_UNICAST = 1
_RT_TABLE_MAIN = 254
_RTM_F_CLONED = 0x200
_RTA_DST = 1
_RTA_OIF = 4
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_NLA_TYPE_MASK = 0x3FFF  # the two bits above say "nested" and "byte order"
_RTNH_F_DEAD = 0x1
_RTNH_F_LINKDOWN = 0x10
_SEQUENCE = 1
# In the byte order of the machine.
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_NEXT_HOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, ifindex
_INT = struct.Struct("=i")
_UNSIGNED = struct.Struct("=I")

_MAX_ERRNO = 4095
_ADDRESS_BYTES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
# RFC 3927, RFC 4291 2.5.6: prefix and its bits. IPv6's comes by itself with every interface.
_LINK_LOCAL: dict[int, tuple[int, int]] = {
    socket.AF_INET: (0xA9FE, 16),
    socket.AF_INET6: (0x3FA, 10),
}

# include/uapi/linux/sockios.h, if.h, route.h
_SIOCADDRT = 0x890B
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP = 0x1
_RTF_UP_GATEWAY = 0x1 | 0x2
_SOCKADDR_IN = struct.Struct("=HH4s8x")
_IFREQ_FLAGS = struct.Struct("=16sH22x")
_IFREQ_ADDRESS = struct.Struct("=16s16s8x")
_RTENTRY = struct.Struct("@L16s16s16sHhLPhPLLH0L")

_MIN_FIELDS = 4  # up to the netmask
_MAX_FIELDS = 10
_DEVICE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,14}")  # IFNAMSIZ, and an Ident
_HOSTNAME = re.compile(r"[A-Za-z0-9.-]{0,64}")
_ALL_ONES = 0xFFFFFFFF


# --- routes -----------------------------------------------------------------------------------------------------------


class RouteWatch:
    """Readable when a route or an interface changed since the last `drain`. Open it, then ask: so nothing is missed.

    Interfaces too, because a carrier that comes back makes its routes usable again and the kernel says nothing of them.
    """

    def __init__(self) -> None:
        """Raises OSError: this kernel or a seccomp filter has no netlink."""
        self._socket = _netlink()
        try:
            self._socket.setblocking(False)
            self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Forget what was told; what comes in the meantime may stay for the next call.

        Raises:
            OSError: not for lost messages (ENOBUFS): whoever asks afterwards sees what they would have told.
        """
        for _ in range(MAX_DATAGRAMS):
            try:
                self._socket.recv(1)  # the rest of the datagram goes with its first byte
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


@dataclass(frozen=True, slots=True)
class RouteAnswer:
    """What one datagram of a dump says.

    Attributes:
        leads_out: one of its routes counts, see `has_route`.
        done: no more datagrams follow.
        interrupted: the table changed under the dump, which may lack a route.
    """

    leads_out: bool
    done: bool
    interrupted: bool


def has_route() -> bool:
    """Is there a route out of this guest?

    One counts when it is unicast, in the main table, to more than link-local addresses, over an interface that is not the
    loopback and whose link is up. Does not wait: a dump is made while it is asked for.

    Returns:
        False also when each of `MAX_DUMPS` dumps was interrupted and showed none: the change that did it tells a `RouteWatch`.

    Raises:
        OSError: no netlink here; the kernel's own errno; EBADMSG, an answer that is none; EMSGSIZE, a longer one than we read.
    """
    # Family by family, because in a dump of all the kernel can forget at the next that one was interrupted (netdev,
    # 2022-06-23, on rtnl_dump_all). A kernel without IPv6 dumps all in its place, and the answer is the same.
    for family in _ADDRESS_BYTES:
        for _ in range(MAX_DUMPS):
            answer = _dump(family)
            if answer.leads_out:
                return True
            if not answer.interrupted:
                break
    return False


async def wait_for_route(timeout_s: float, tell_waiting: Callable[[], None] = lambda: None) -> None:
    """Wait in the running asyncio loop until `has_route`; 0 = look once.

    Args:
        timeout_s: from now.
        tell_waiting: called once, when there is no route at the first look and the wait begins.

    Raises:
        NoRouteError: at the deadline.
        GuestInitError: the kernel does not say which routes there are.
    """
    try:
        await _wait_for_route(timeout_s, tell_waiting)
    except OSError as error:
        raise GuestInitError(GuestPart.INTERFACE, Ident("netlink"), error.errno or 0) from error


async def _wait_for_route(timeout_s: float, tell_waiting: Callable[[], None]) -> None:
    import asyncio  # 0.08 s, and most who import this never wait

    loop = asyncio.get_running_loop()
    started = loop.time()
    changed = asyncio.Event()
    told = False
    with RouteWatch() as watch:
        loop.add_reader(watch, changed.set)
        try:
            while not has_route():
                left_s = started + timeout_s - loop.time()
                if left_s <= 0:
                    raise NoRouteError(round(loop.time() - started), interfaces())
                if not told:
                    told = True
                    tell_waiting()
                with suppress(TimeoutError):  # then a last look
                    await asyncio.wait_for(changed.wait(), left_s)
                changed.clear()
                watch.drain()
        finally:
            loop.remove_reader(watch)


def interfaces() -> int:
    """How many network interfaces there are beside the loopback.

    Raises:
        OSError: no netlink here.
    """
    return len(_interface_names())


def parse_routes(datagram: bytes) -> RouteAnswer:
    """Parse one datagram of the answer to a route dump, as `has_route` counts.

    Raises:
        OSError: the errno the kernel answered with; EBADMSG, it is not such a datagram.
    """
    leads_out = done = interrupted = False
    offset = 0
    while offset < len(datagram):
        length, kind, flags, sequence, _ = _unpack(_HEADER, datagram, offset)
        if done or not _HEADER.size <= length <= len(datagram) - offset or sequence != _SEQUENCE:
            raise _malformed()
        interrupted |= bool(flags & _NLM_F_DUMP_INTR)
        body = datagram[offset + _HEADER.size : offset + length]
        if kind == _RTM_NEWROUTE:
            leads_out |= _leads_out(body)
        else:
            _check_done(kind, body)
            done = True
        offset += _aligned(length)
    if not datagram:
        raise _malformed()
    return RouteAnswer(leads_out, done, interrupted)


def _dump(family: int) -> RouteAnswer:
    with _netlink() as kernel:
        kernel.settimeout(ANSWER_TIMEOUT_S)
        kernel.connect((0, 0))  # from now on the kernel refuses what others send to this socket: netlink_getsockbyportid
        request = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        length = _HEADER.size + len(request)
        kernel.send(_HEADER.pack(length, _RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP, _SEQUENCE, 0) + request)
        interrupted = False
        for _ in range(MAX_DATAGRAMS):
            answer = parse_routes(kernel.recv(_DATAGRAM_BYTES))
            interrupted |= answer.interrupted
            if answer.leads_out or answer.done:
                return RouteAnswer(answer.leads_out, True, interrupted)
    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))


def _check_done(kind: int, body: bytes) -> None:
    (code,) = _unpack(_INT, body, 0)  # NLMSG_DONE carries one too, for a dump that failed half-way
    if kind in (_NLMSG_DONE, _NLMSG_ERROR) and -_MAX_ERRNO <= code < 0:
        raise OSError(-code, os.strerror(-code))
    if kind != _NLMSG_DONE or code != 0:
        raise _malformed()


def _leads_out(message: bytes) -> bool:
    family, dst_len, _, _, table, _, _, kind, flags = _unpack(_ROUTE, message, 0)
    if family not in _ADDRESS_BYTES:  # MPLS, multicast routing
        return False
    attributes = _attributes(message, _ROUTE.size)
    if _RTA_TABLE in attributes:  # numbers above 255 do not fit the byte
        table = _number(_UNSIGNED, attributes[_RTA_TABLE])
    destination = attributes.get(_RTA_DST, bytes(_ADDRESS_BYTES[family]))
    if len(destination) != _ADDRESS_BYTES[family] or dst_len > 8 * len(destination):
        raise _malformed()
    if _RTA_MULTIPATH in attributes:
        reachable = _any_hop_leads_out(attributes[_RTA_MULTIPATH])
    else:
        # Without RTA_OIF it goes nowhere, or by a next-hop object whose interface is not told (nexthop_compat_mode = 0).
        interface = _number(_INT, attributes[_RTA_OIF]) if _RTA_OIF in attributes else _LOOPBACK
        reachable = interface != _LOOPBACK and not flags & (_RTNH_F_DEAD | _RTNH_F_LINKDOWN)
    prefix, bits = _LINK_LOCAL[family]
    link_local = dst_len >= bits and int.from_bytes(destination, "big") >> (8 * len(destination) - bits) == prefix
    in_main = kind == _RTN_UNICAST and table == _RT_TABLE_MAIN and not flags & _RTM_F_CLONED
    return in_main and reachable and not link_local


def _any_hop_leads_out(hops: bytes) -> bool:
    found = False
    offset = 0
    while offset < len(hops):
        length, flags, _, interface = _unpack(_NEXT_HOP, hops, offset)
        if not _NEXT_HOP.size <= length <= len(hops) - offset:
            raise _malformed()
        found |= interface != _LOOPBACK and not flags & (_RTNH_F_DEAD | _RTNH_F_LINKDOWN)
        offset += _aligned(length)
    return found


def _attributes(message: bytes, offset: int) -> dict[int, bytes]:
    """Of two of one type the last, like the kernel's nla_parse."""
    found = {}
    while offset < len(message):
        length, kind = _unpack(_ATTRIBUTE, message, offset)
        if not _ATTRIBUTE.size <= length <= len(message) - offset:
            raise _malformed()
        found[kind & _NLA_TYPE_MASK] = message[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)
    return found


def _unpack(layout: struct.Struct, data: bytes, offset: int) -> tuple[int, ...]:
    if offset + layout.size > len(data):
        raise _malformed()
    return layout.unpack_from(data, offset)


def _number(layout: struct.Struct, data: bytes) -> int:
    if len(data) != layout.size:
        raise _malformed()
    return _unpack(layout, data, 0)[0]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _malformed() -> OSError:
    return OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)  # close-on-exec: PEP 446


def _interface_names() -> list[str]:
    """All but the loopback, by index."""
    return [name for index, name in sorted(socket.if_nameindex()) if index != _LOOPBACK]


# --- what PID 1 does --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StaticAddress:
    """One IPv4 address as the kernel command line gives it: the host's word, and only connectivity hangs on it.

    Attributes:
        address: dotted quad, like the next two.
        netmask: contiguous, never 0.0.0.0.
        gateway: in the same net; None = no default route.
        device: name of the interface; None = the first one that is not the loopback.
        nameservers: at most two dotted quads.
    """

    address: str
    netmask: str
    gateway: str | None
    device: str | None
    nameservers: tuple[str, ...]


def parse_ip_parameter(value: str) -> StaticAddress:
    """Parse the value of `ip=`, in the kernel's own syntax.

    `<client-ip>:<server-ip>:<gw-ip>:<netmask>:<hostname>:<device>:<autoconf>:<dns0-ip>:<dns1-ip>:<ntp0-ip>`; fields at the
    end may be left out. Client address and netmask are required, and autoconf is empty, `off` or `none`: there is no DHCP
    client here. The addresses of NFS and NTP servers and the host name must be well-formed, and nothing follows from them.

    Raises:
        GuestInitError: it cannot be used; never with a part of it.
    Spec: nfsroot.rst, "ip="; stricter than net/ipv4/ipconfig.c, which falls back to autoconfiguration.
    """
    try:
        return _parse(value.split(":", _MAX_FIELDS))
    except ValueError:
        raise GuestInitError(GuestPart.PARAMETER, Ident("ip")) from None  # the exception holds the value


def resolv_conf(static: StaticAddress) -> str:
    """The text of a resolv.conf(5) with its name servers, empty without any."""
    return "".join(f"nameserver {server}\n" for server in static.nameservers)


def bring_up_loopback() -> None:
    """Set the loopback interface up; the kernel then gives it 127.0.0.1 and ::1 by itself.

    Raises:
        GuestInitError: the kernel refused.
    """
    with _errors_of("lo"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _bring_up(control, socket.if_indextoname(_LOOPBACK))


def configure(static: StaticAddress) -> bool:
    """Give an interface its address, set it up, and add the default route. A second time changes nothing.

    Returns:
        False: the interface is not there (yet).

    Raises:
        GuestInitError: the kernel refused.
    """
    with _errors_of(static.device or "any"):
        present = _interface_names()
    device = present[0] if present and static.device is None else static.device
    if device is None or device not in present:
        return False
    with _errors_of(device), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = os.fsencode(device)
        # The address brings a mask by its class: the right one has to follow before the interface is up.
        fcntl.ioctl(control, _SIOCSIFADDR, _IFREQ_ADDRESS.pack(name, _sockaddr(static.address)))
        fcntl.ioctl(control, _SIOCSIFNETMASK, _IFREQ_ADDRESS.pack(name, _sockaddr(static.netmask)))
        _bring_up(control, device)
        if static.gateway is not None:
            # Without a device: the gateway is in the net that was just connected.
            everywhere, gateway = _sockaddr("0.0.0.0"), _sockaddr(static.gateway)  # noqa: S104  # a destination
            route = _RTENTRY.pack(0, everywhere, gateway, everywhere, _RTF_UP_GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0)
            with suppress(FileExistsError):  # the very same route: a kernel with CONFIG_IP_PNP was here before us
                fcntl.ioctl(control, _SIOCADDRT, route)
    return True


def _parse(given: list[str]) -> StaticAddress:
    if not _MIN_FIELDS <= len(given) <= _MAX_FIELDS:
        raise ValueError("number of fields")
    fields = given + [""] * (_MAX_FIELDS - len(given))
    address, server, gateway, netmask, hostname, device, autoconf, dns0, dns1, ntp0 = fields
    if autoconf not in ("", "off", "none"):
        raise ValueError("autoconf")
    if not _HOSTNAME.fullmatch(hostname) or (device and not _DEVICE.fullmatch(device)):
        raise ValueError("name")
    host_bits = _ALL_ONES ^ _ipv4(netmask)
    if host_bits == _ALL_ONES or host_bits & (host_bits + 1):
        raise ValueError("netmask")
    _check_host(_ipv4(address), host_bits)
    if gateway:
        _check_host(_ipv4(gateway), host_bits)
        if not 0 < _ipv4(gateway) ^ _ipv4(address) <= host_bits:
            raise ValueError("the gateway is we, or lies in another net")
    for other in filter(None, (server, dns0, dns1, ntp0)):
        _ipv4(other)
    return StaticAddress(address, netmask, gateway or None, device or None, tuple(filter(None, (dns0, dns1))))


def _check_host(number: int, host_bits: int) -> None:
    """A unicast address, and neither the net's own nor its broadcast address; nets of two (RFC 3021) and one have none."""
    first = number >> 24
    if first in (0, 127) or first >= 224 or (host_bits > 1 and number & host_bits in (0, host_bits)):
        raise ValueError("not the address of a host")


def _ipv4(text: str) -> int:
    try:
        return int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")  # four decimal numbers, no leading zeros
    except OSError as error:
        raise ValueError("not an IPv4 address") from error


def _bring_up(control: socket.socket, device: str) -> None:
    name = os.fsencode(device)
    _, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0)))
    fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name, flags | _IFF_UP))


def _sockaddr(address: str) -> bytes:
    return _SOCKADDR_IN.pack(socket.AF_INET, 0, socket.inet_aton(address))


@contextmanager
def _errors_of(interface: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GuestInitError(GuestPart.INTERFACE, Ident.of_peer(interface), error.errno or 0) from error
