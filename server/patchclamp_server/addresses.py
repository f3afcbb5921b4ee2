"""A server listens at host:port, with an IPv6 host in brackets or bare, or at unix:path, a socket of this machine."""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

MAX_PORT = 65535
EXPECTED = "expected host:port, [IPv6 address]:port or unix:path"


@dataclass(frozen=True)
class Address:
    """A host (without brackets) and a port, where 0 takes a free one, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses an address. Raises ValueError for other texts, and says what is accepted."""
        if text.startswith("unix:"):
            # gRPC takes unix:path and unix:///absolute/path.
            path = text.removeprefix("unix:").removeprefix("//")
            if not path:
                raise ValueError(f"{EXPECTED}, got {text!r}")
            return cls(path=path)
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not _is_ipv6(host):
                raise ValueError(f"{EXPECTED}, got {text!r}: {host!r} is no IPv6 address")
        elif ":" in host and not _is_ipv6(host):
            raise ValueError(f"{EXPECTED}, got {text!r}")
        if not host or not (port.isascii() and port.isdecimal()) or int(port) > MAX_PORT:
            raise ValueError(f"{EXPECTED}, got {text!r}")
        return cls(host, int(port))

    def with_port(self, port: int) -> "Address":
        return self if self.path else Address(self.host, port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        """Returns the address as gRPC takes it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Reservation:
    """Holds ports while a model loads, so that a taken one is known at once and not minutes later.

    A held port is bound and does not listen: whoever connects is refused, as before.
    """

    def __init__(self, addresses: Mapping[str, Address]) -> None:
        """`addresses` go by the option that names them. Raises OSError, which names option, address and reason."""
        self._held: list[socket.socket] = []
        try:
            for option, address in addresses.items():
                with naming(option, address):
                    self._hold(address)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Frees the ports for those who serve on them."""
        while self._held:
            self._held.pop().close()

    def _hold(self, address: Address) -> None:
        if address.path:
            _check_socket(address.path)
        elif address.port:
            for family, place in _places(address):
                if (held := _bound(family, place)) is not None:
                    self._held.append(held)


@contextmanager
def naming(option: str, address: Address) -> Iterator[None]:
    """Turns what its block raises for an unusable address into an OSError that names the option too.

    gRPC raises RuntimeError there.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{option} {address}: {reason[0].lower()}{reason[1:]}") from error


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _check_socket(path: str) -> None:
    """Raises OSError where another server listens at the socket, or where it cannot be made.

    A socket that a killed server left does not matter: gRPC replaces it. But it would replace one in use as well.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            directory = os.path.dirname(path) or "."
            if not os.path.isdir(directory):
                raise OSError(errno.ENOENT, f"there is no directory {directory}") from None
            return
        except ConnectionRefusedError:
            if not os.path.exists(path):
                raise
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.ENOTSOCK, f"{path} is there and is no socket") from None
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _places(address: Address) -> Iterable[tuple[int, tuple[object, ...]]]:
    """Returns (family, sockaddr) of all that the host means."""
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return dict.fromkeys((family, place) for family, _, _, _, place in found)


def _bound(family: int, place: tuple[object, ...]) -> socket.socket | None:
    """Returns a socket that holds the place; None where connections of a server that has ended still linger there, or
    where this machine lacks one of several addresses that a name means."""
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.bind(place)
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        # SO_REUSEADDR ignores lingering connections, but not a socket that listens.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
        return None
    return held
