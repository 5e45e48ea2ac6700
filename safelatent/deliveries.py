"""Webhooks that are owed, in Redis: written when a generation is accepted, so no crash loses one.

`safelatent:webhooks:due` holds a generation's id and when to look at it, in microseconds of Redis'
clock. Who looks takes it by moving that time into the future: the new time is its lease, and what
it does later counts only while the lease is still there. A deliverer that dies leaves an id that
comes due again.
"""

from typing import Any

from redis import Redis
from redis.client import Pipeline

from safelatent.schema import Delivery

DUE = "safelatent:webhooks:due"
STATE = "safelatent:webhook:{}"
"""A hash: how far the delivery of a generation has come."""
OUTCOMES = "safelatent:webhooks:outcomes"
"""A hash that counts attempts, by their outcome."""
ATTEMPT_OUTCOMES = ("delivered", "retried", "failed")

LOOK_S = 30
"""How often what is owed is looked at although nobody said that it has ended."""
KEPT_S = 2 * 24 * 3600
"""How long the state of a delivery is kept; longer than the generation itself."""

TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now),
                       'LIMIT', 0, ARGV[1])
local lease = string.format('%.0f', now + ARGV[2])
for _, id in ipairs(ids) do redis.call('ZADD', KEYS[1], lease, id) end
return {lease, ids}
"""
ENDED = """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('HSETNX', KEYS[2], 'ended', 1) == 1 then
  redis.call('EXPIRE', KEYS[2], ARGV[2])
  redis.call('ZADD', KEYS[1], 0, ARGV[1])
end
"""
MOVE = """
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or tonumber(score) ~= tonumber(ARGV[2]) then return false end
if #ARGV > 4 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 5))
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
if ARGV[3] == '' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return ''
end
local time = redis.call('TIME')
local next = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[3])
redis.call('ZADD', KEYS[1], next, ARGV[1])
return next
"""


def owe(pipeline: Pipeline, id: str, accepted_us: int) -> None:
    """Note that a generation will have a delivery, in the transaction that accepts it."""
    pipeline.zadd(DUE, {id: accepted_us + LOOK_S * 1_000_000})


def forget(connection: Redis, id: str) -> None:
    """Nothing is owed for a generation any more."""
    connection.zrem(DUE, id)
    connection.delete(STATE.format(id))


def delivery(connection: Redis, id: str, url: str) -> Delivery:
    """How far the delivery of a generation has come."""
    state: Any = connection.hgetall(STATE.format(id))
    fields = {name.decode(): value.decode() for name, value in state.items() if value}
    return Delivery.model_validate({**fields, "url": url})


class Owed:
    """What deliverers do with all that is owed. Any number of them may share one Redis."""

    def __init__(self, connection: Redis):
        self.connection = connection
        self._take = connection.register_script(TAKE)
        self._ended = connection.register_script(ENDED)
        self._move = connection.register_script(MOVE)

    def take(self, most: int, lease_s: float) -> tuple[str, list[str]]:
        """Ids that are due, and the lease under which the caller holds them now."""
        lease, ids = self._take([DUE], [most, int(lease_s * 1e6)])
        return lease.decode(), [id.decode() for id in ids]

    def ended(self, id: str) -> None:
        """Make an id due at once, if it is owed and nobody has begun with it."""
        self._ended([DUE, STATE.format(id)], [id, KEPT_S])

    def move(self, id: str, lease: str, in_s: float | None, **state: str | int) -> str | None:
        """Under a lease: note the state, and look again after so many seconds, or never (None).

        Returns the new time, which is a lease itself; None if the lease was another's meanwhile.
        """
        wait = "" if in_s is None else int(in_s * 1e6)
        noted = [part for pair in state.items() for part in pair]
        new = self._move([DUE, STATE.format(id)], [id, lease, wait, KEPT_S, *noted])
        return None if new is None else new.decode()

    def count(self, outcome: str) -> None:
        self.connection.hincrby(OUTCOMES, outcome, 1)
