"""Targets of gRPC: ``host:port``, ``dns:///host:port``, ``ipv4:address:port,address:port``, ``unix:path``."""

import ipaddress
from dataclasses import dataclass

# Other words before a colon are names of hosts.
SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p")
SOCKETS = ("unix", "unix-abstract")


@dataclass(frozen=True)
class Target:
    """Holds the parts of a target. `authority` is the server that is asked for a name, "" for that of this machine."""

    scheme: str
    hosts: tuple[str, ...]
    authority: str = ""

    @classmethod
    def parse(cls, address: str) -> "Target":
        scheme, colon, rest = address.partition(":")
        if not colon or scheme not in SCHEMES:
            return cls("dns", (_host(address),))
        if scheme in SOCKETS:
            return cls(scheme, (rest,))
        authority = ""
        if rest.startswith("//"):
            authority, _, rest = rest.removeprefix("//").partition("/")
        return cls(scheme, tuple(map(_host, rest.lstrip("/").split(","))), authority)

    @property
    def is_here(self) -> bool:
        """Tells whether what is sent there stays on this machine."""
        if self.scheme in SOCKETS:
            return True
        return self.scheme in ("dns", "ipv4", "ipv6") and not self.authority and all(map(_is_loopback, self.hosts))

    @property
    def may_be_several(self) -> bool:
        """Tells whether more than one server can be behind it: several addresses, or a name, which may have several."""
        if self.scheme == "dns":
            return self.hosts[0] != "localhost" and _ip(self.hosts[0]) is None
        return len(self.hosts) > 1


def _host(address: str) -> str:
    """Returns "::1" for "[::1]:50051"; a port need not be there."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # More than one colon and no brackets: an address of IPv6 alone.
    return address.rpartition(":")[0] if address.count(":") == 1 else address


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    ip = _ip(host)
    return host == "localhost" if ip is None else ip.is_loopback
