"""What REDIS_URL names: one Redis, or the master of several that Redis Sentinel watches.

An address of one is redis-py's own. That of a watched group has the form that others have given it
(Redis-Sentinel-Url, LangChain, Prefect):

    redis+sentinel://user:password@host:26379,host:26379/master/0?sentinel_password=...

User and password are those of Redis, `sentinel_username` and `sentinel_password` the sentinels'.
Every other option is redis-py's, as in `redis://`. `rediss` is TLS, to Redis and to the sentinels.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import ConnectionError
from redis.retry import Retry

GROUP = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?P<user>[^/?]*@)?(?P<sentinels>[^/?@]+)"
    r"/(?P<master>[\w.-]+)(?:/(?P<db>\d*))?(?P<options>\?.*)?"
)
SENTINEL = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?")
SENTINEL_PORT = 26379
CONNECT_S = 2


def connect(url: str, **options: Any) -> Redis:
    """A client, which connects when it is used. What the URL says goes before redis-py's `options`.

    Raises ValueError, without the password, for a URL that cannot be read.
    """
    client: Redis = _client(url, options, Redis, _Sentinel, Retry(NoBackoff(), 0))
    return client


def connect_async(url: str, **options: Any) -> redis.asyncio.Redis:
    """The same for asyncio, and for one task."""
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    client: redis.asyncio.Redis = _client(url, options, redis.asyncio.Redis, _AsyncSentinel, retry)
    return client


def readable(url: str) -> str:
    """The URL if `connect` takes it, else ValueError."""
    connect(url)
    return url


def _client(url: str, options: dict[str, Any], one: Any, group: Any, no_retry: object) -> Any:
    try:
        if (found := GROUP.fullmatch(url)) is None:
            client = one.from_url(url, **options)
        else:
            client = _master(found, options, group, no_retry)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # as the first request would
    except (TypeError, ValueError) as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        raise ValueError(
            f"{_shown(url)!r} {f'has no option {option[1]}' if option else 'cannot be read'}: an "
            "address is redis://user:password@host:6379/0, rediss://..., unix:///path, or "
            "redis+sentinel://user:password@host:26379,host:26379/master/0, and %40 is an @ in a "
            "password"
        ) from None
    return client


def _master(found: re.Match[str], options: dict[str, Any], group: Any, no_retry: object) -> Any:
    scheme, user, sentinels, master, db, query = found.groups("")
    addresses = []
    for each in sentinels.split(","):
        if (address := SENTINEL.fullmatch(each)) is None:
            raise ValueError
        addresses.append((address[1].strip("[]"), int(address[2] or SENTINEL_PORT)))
    parsed: dict[str, Any] = parse_url(f"{scheme}://{user}localhost/{db}{query}")  # type: ignore[no-untyped-call]
    given = options | parsed
    given["ssl"] = given.pop("connection_class", None) is not None
    del given["host"]
    theirs = {
        name.removeprefix("sentinel_"): given.pop(name)
        for name in list(given)
        if name.startswith("sentinel_")
    }
    theirs |= {name: value for name, value in given.items() if name.startswith("ssl")}
    # Sentinels that hang must leave time for one that answers, and 503 comes at once.
    wait_s = given.get("socket_connect_timeout", CONNECT_S) / len(addresses)
    theirs |= {"socket_timeout": wait_s, "socket_connect_timeout": wait_s, "retry": no_retry}
    return group(addresses, sentinel_kwargs=theirs).master_for(master, **given)


def _shown(url: str) -> str:
    """A URL without what may be a password in it."""
    place = re.sub(r"^([\w+]*://)?.*@", r"\1...@", url.partition("?")[0])
    return re.sub(r":(?!//|\d{1,5}(?:[,/]|$))[^,/]*", ":...", place)


class _Sentinel(redis.sentinel.Sentinel):
    def discover_master(self, service_name: str) -> tuple[str, int]:
        """As redis-py does it, but on a list of one's own: it moves the sentinel that answers to
        the front, and two threads that do so at once lose another for ever."""
        asked = copy(self)
        asked.sentinels = list(self.sentinels)
        with _briefly():
            host, port = redis.sentinel.Sentinel.discover_master(asked, service_name)  # type: ignore[no-untyped-call]
        self.sentinels = asked.sentinels
        return host, port


class _AsyncSentinel(redis.asyncio.sentinel.Sentinel):
    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """As redis-py does it, and then hang up: nobody else would."""
        try:
            with _briefly():
                host, port = await super().discover_master(service_name)
                return host, port
        finally:
            await self.aclose()


@contextmanager
def _briefly() -> Iterator[None]:
    """Of a sentinel that does not help, say where it is and why, and not its client's options."""
    try:
        yield
    except ConnectionError as error:
        said = re.sub(r"<.*?host=([^,]*),port=(\d+).*?> - ", r"\1:\2 ", str(error))
        raise type(error)(said) from None
