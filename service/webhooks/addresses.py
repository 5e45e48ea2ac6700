"""Where a webhook may go: https, and public addresses only, but for an operator's allow-list.

A URL is judged twice by the same rules: by its text when it is submitted, and by every address that
its name has when it is called. The name is resolved once, and the connection goes to an address
that was judged, so an answer that changes in between (DNS rebinding) changes nothing.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import httpcore
import httpx

from safelatent import webhooks

log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.ASCII | re.IGNORECASE)
PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa")
UNICAST = ipaddress.IPv6Network("2000::/3")
EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""NAT64 (RFC 6052) and IPv4-compatible: the IPv4 address is the last 32 bits."""


class Refused(Exception):
    """A webhook may not go there. The message is for the tenant, and names no address of ours."""


@dataclass(frozen=True)
class Allowed:
    """Hosts and networks that may be private, and called by http: for development, or inside."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """`localhost, 10.0.0.0/8`: names and networks with commas between; ValueError names one."""
        hosts, networks = set(), []
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or not NAME.fullmatch(entry):
                    raise ValueError(f"{entry!r} is no host name and no network") from None
                hosts.add(entry)
        return cls(frozenset(hosts), tuple(networks))

    def host(self, host: str) -> bool:
        literal = _literal(host)
        return host.lower() in self.hosts or (literal is not None and self.address(literal))

    def address(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, also the IPv4 address inside an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if (inner := _embedded(address)) is not None:
            return is_public(inner)
        if address not in UNICAST:
            return False
    return address.is_global and not address.is_multicast


def checked(text: str, allowed: Allowed) -> httpx.URL:
    """A webhook's URL, if its text is in order; Refused says what is not."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise Refused("is no URL") from error
    host = url.raw_host.decode()
    literal = _literal(host)
    if url.scheme not in ("https", "http") or not host:
        raise Refused("should be an https URL, like https://example.com/hook")
    if url.userinfo:
        raise Refused("should carry no user and password: its signature proves who calls")
    if url.fragment:
        raise Refused("should have no #fragment, which is never sent")
    if literal is None and (not NAME.fullmatch(host) or len(host) > 253):
        raise Refused("has no host name that can be")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise Refused(f"has the port {url.port}: it should be 1 to 65535")
    if allowed.host(host):
        return url
    name = host.lower().rstrip(".")
    if (
        not is_public(literal)
        if literal is not None
        else "." not in name or name.endswith(PRIVATE_NAMES)
    ):
        raise Refused("should go to a public address; the operator can allow a private one")
    if url.scheme != "https":
        raise Refused("should be an https URL")
    return url


def sealed(url: str, secret: str) -> str:
    """What the frontend notes with a URL that it has let pass. Who can write to Redis, and so forge
    a job, cannot make it, and has nobody called."""
    return hmac.new(webhooks.key_of(secret), b"accepted " + url.encode(), "sha256").hexdigest()


class PublicOnly(httpcore.AsyncNetworkBackend):
    """Connections of httpcore to addresses that were judged, and no others."""

    def __init__(self, allowed: Allowed, resolve: Resolve | None = None):
        self.allowed = allowed
        self.resolve = resolve or _resolve
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = [ipaddress.ip_address(each) for each in await self.resolve(host, port)]
        for address in addresses:
            if not (self.allowed.host(host) or self.allowed.address(address) or is_public(address)):
                log.warning("webhook refused: %s resolves to %s", host, address)
                raise Refused("has a host whose address is not public")
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:  # an address needs no second look-up
                return await self._backend.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(f"{host} cannot be resolved") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _literal(host: str) -> Address | None:
    """The address that a host is, in any spelling that a resolver takes: 127.1 is 127.0.0.1."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return None


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.teredo:
        return address.teredo[1]
    if any(address in network for network in EMBEDDING):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
