"""Finds out where others can reach this machine, and where others can be reached.

A machine of a cluster has several networks, and nobody here knows which of them the other machine shares. So every
address that may work is offered, and whoever connects finds out (`transports.dealer.Dealer`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import ipaddress
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

LOOPBACK = "127.0.0.1"

# The kernel's limit for the path of a Unix socket (sun_path, which also holds a zero byte). TMPDIR may be longer.
_MOST_PATH_BYTES = 107 if sys.platform.startswith("linux") else 103
# Directories with short paths.
_SHORT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")

# net/if.h, the same on Linux, macOS and the BSDs.
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8

# Reserved for documentation (RFC 5737, RFC 3849), so nobody is there. Connecting by UDP only looks up the route.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))

# Finding the fully qualified name may involve a name server that does not answer.
_NAME_SECONDS = 1.0


class _Interface(ctypes.Structure):
    """`struct ifaddrs` of getifaddrs(3)."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("destination", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


def addresses() -> list[str]:
    """Return the addresses at which others may reach this machine.

    Returns:
        IPv4 addresses, then IPv6 addresses, as numbers, of each kind that of the default route first. Addresses of
        the loopback interface, and those that are valid on one link only, are left out.
    """
    found = _preferred()
    with contextlib.suppress(OSError, AttributeError):  # the C library has no getifaddrs
        found += _of_interfaces()
    unique = [each for each in dict.fromkeys(found) if not (each.is_loopback or each.is_link_local)]
    return [str(each) for each in sorted(unique, key=lambda each: each.version)]


def socket_directory(name: str) -> str:
    """Make a directory for a Unix socket that only this user can access and whose path is short enough.

    Args:
        name: The name of the socket.

    Returns:
        A directory among those for temporary files if that path is short enough, otherwise one elsewhere. The caller
        removes it.

    Raises:
        OSError: There is no such place.
    """
    failures = []
    for parent in (None, *_SHORT_DIRECTORIES):
        try:
            directory = tempfile.mkdtemp(prefix="executorlib-", dir=parent)
        except OSError as error:
            failures.append(f"{parent}: {error.strerror}")
            continue
        if len(os.fsencode(os.path.join(directory, name))) <= _MOST_PATH_BYTES:
            return directory
        os.rmdir(directory)
        failures.append(f"{parent or tempfile.gettempdir()}: its path is too long")
    raise OSError(
        errno.ENAMETOOLONG,
        f"no Unix socket can be created; its path may have at most {_MOST_PATH_BYTES} bytes ({'; '.join(failures)}). "
        "Set TMPDIR to a short path to a writable folder",
    )


_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def _preferred() -> list[_IPAddress]:
    found: list[_IPAddress] = []
    for family, elsewhere in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((elsewhere, 9))
                found.append(ipaddress.ip_address(probe.getsockname()[0]))
        except OSError:  # there is no such network, or no route
            continue
    return found


def _of_interfaces() -> list[_IPAddress]:
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found: list[_IPAddress] = []
    try:
        entry = first
        while entry:
            interface = entry.contents
            if interface.address and interface.flags & _IFF_UP and not interface.flags & _IFF_LOOPBACK:
                found += _in_socket_address(interface.address)
            entry = interface.next
        return found
    finally:
        libc.freeifaddrs(first)


def _in_socket_address(location: int) -> Iterator[_IPAddress]:
    # The BSDs and macOS have one byte of length and one of family; Linux has two bytes of family.
    head = ctypes.string_at(location, 2)
    family = int.from_bytes(head, sys.byteorder) if sys.platform.startswith("linux") else head[1]
    if family == socket.AF_INET:
        yield ipaddress.IPv4Address(ctypes.string_at(location + 4, 4))
    elif family == socket.AF_INET6:
        yield ipaddress.IPv6Address(ctypes.string_at(location + 8, 16))


@functools.lru_cache
def names() -> tuple[str, ...]:
    """Return this machine's host name and fully qualified name, unless they only say ``localhost``.

    This may wait for a name server, but no longer than a second. The answer is kept.
    """
    found = [socket.gethostname()]
    asking = threading.Thread(target=lambda: found.append(socket.getfqdn()), daemon=True)
    asking.start()
    asking.join(_NAME_SECONDS)
    return tuple(name for name in dict.fromkeys(found) if name and not name.startswith("localhost"))


def endpoints(port: int, hosts: Sequence[str] = ()) -> list[str]:
    """Return the ZeroMQ endpoints at which a port of this machine may be reached.

    Args:
        port: The TCP port.
        hosts: Addresses or names. By default all of this machine, addresses first, or that of the loopback interface if
            there are no others.
    """
    if not hosts:
        hosts = [*addresses(), *names()] or [LOOPBACK]
    return [f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}" for host in hosts]


def split(endpoint: str) -> tuple[str, int]:
    """Split a TCP endpoint into host and port."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def is_numeric(host: str) -> bool:
    """Return True if this is an address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def resolve(host: str) -> list[str]:
    """Return the addresses of a host, as numbers.

    Raises:
        OSError: The name cannot be resolved.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
