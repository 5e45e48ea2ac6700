"""How much a tenant may ask for, and when it is told to wait: rates, and bounds of the queue.

Rates are by GCRA in Redis, so all frontends share them: each request moves on the time at which
the tenant's quota is whole again, and what would move it further than a minute from now is
refused. All of a tenant's rates are tried in one script, and none is charged unless all have room.

The answers say how things stand by the RateLimit fields (draft-ietf-httpapi-ratelimit-headers-10).
"""

import math
from typing import Any

from safelatent import errors
from safelatent.forecast import throughput
from safelatent.jobs import Jobs, redis_errors
from safelatent.schema import GenerationRequest
from service.auth import Caller
from service.policy import Tenant

WINDOW_S = 60
RATE = "safelatent:rate:{}:{}"
UNMEASURED_S = 5.0
"""What a caller is told to wait before any worker has been measured."""
LONGEST_S = 300.0

TAKE = """
-- KEYS: one for each rate. ARGV: the window in seconds; then quota and cost of each rate.
-- Returns seconds to wait, or 0 when all are charged; then for each how long until it is whole.
local seconds, micros = unpack(redis.call('TIME'))
local now, window = seconds + micros / 1e6, tonumber(ARGV[1])
local wait, whole, after = 0, {}, {}
for i, key in ipairs(KEYS) do
  local quota, cost = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  whole[i] = math.max(now, tonumber(redis.call('GET', key) or now))
  after[i] = whole[i] + window * cost / quota
  wait = math.max(wait, after[i] - now - window)
end
local answer = {}
for i, key in ipairs(KEYS) do
  if wait <= 0 then
    whole[i] = after[i]
    redis.call('SET', key, string.format('%.6f', after[i]), 'EX', math.ceil(window) + 1)
  end
  answer[i] = string.format('%.6f', whole[i] - now)
end
return {string.format('%.6f', wait), unpack(answer)}
"""


class Limits:
    """Of one frontend; what they count is in Redis."""

    def __init__(self, jobs: Jobs, max_queued: int):
        """`max_queued` bounds the queued generations of each model, of all tenants."""
        self.jobs = jobs
        self.max_queued = max_queued
        self._take = jobs.connection.register_script(TAKE)

    def admit(self, caller: Caller, request: GenerationRequest) -> dict[str, str]:
        """Let a request pass and charge the tenant's rates; returns the headers that say so.

        Raises QueueFull, TooManyQueued, RateLimited, and Forbidden for one that is more than a
        whole minute's quota. The bounds are looked up and not locked: frontends that accept at
        the same moment can pass them by as many requests as they hold at once.
        """
        assert request.model is not None
        with redis_errors():
            self._bound(caller, request.model)
            return self._charge(caller, request.megapixel_steps)

    def _bound(self, caller: Caller, model: str) -> None:
        turns, most = self.jobs.turns, caller.rights.max_queued
        if most is not None and turns.queued(model, caller.tenant) >= most:
            raise errors.TooManyQueued(
                f"{most} of your generations are queued for {model}, and your policy allows no "
                "more: let some of them end",
                retry_after_s=self._one_less_s(model, caller.tenant),
            )
        if turns.queued(model) >= self.max_queued:
            raise errors.QueueFull(
                f"{self.max_queued} generations are queued for {model}, and no more are taken",
                retry_after_s=self._one_less_s(model),
            )

    def _charge(self, caller: Caller, megapixel_steps: float) -> dict[str, str]:
        costs = {"requests": 1.0, "megapixel-steps": megapixel_steps}
        quotas = {name: quota for name, quota in _rates(caller.rights).items() if quota}
        if not quotas:
            return {}
        for name, quota in quotas.items():
            if costs[name] > quota:
                raise errors.Forbidden(
                    f"n x megapixels x steps is {costs[name]:.3g}, and your policy allows {quota} "
                    "a minute"
                )
        numbers = [each for name, quota in quotas.items() for each in (quota, costs[name])]
        keys = [RATE.format(caller.tenant, name) for name in quotas]
        answer: Any = self._take(keys, [WINDOW_S, *numbers])
        wait_s, *whole_s = map(float, answer)
        headers = _headers(quotas, whole_s)
        if wait_s > 0:
            words = " and ".join(f"{quota} {name}" for name, quota in quotas.items())
            raise errors.RateLimited(
                f"your policy allows {words} a minute", retry_after_s=wait_s, headers=headers
            )
        return headers

    def _one_less_s(self, model: str, tenant: str | None = None) -> float:
        """Seconds until a queued generation, or one of a tenant's, has likely been started."""
        picture = self.jobs.turns.picture(model)
        lines = picture.lines
        rate = throughput(picture.paces)
        if not rate or not lines:
            return UNMEASURED_S
        if tenant in lines:
            rate *= lines[tenant].weight / sum(line.weight for line in lines.values())
            cost = lines[tenant].cost
        else:
            cost = sum(line.cost * line.queued for line in lines.values()) / picture.queued
        return min(max(cost / rate, 1.0), LONGEST_S)


def _rates(rights: Tenant) -> dict[str, int | None]:
    return {
        "requests": rights.requests_per_minute,
        "megapixel-steps": rights.megapixel_steps_per_minute,
    }


def _headers(quotas: dict[str, int], whole_s: list[float]) -> dict[str, str]:
    """`r` is what is left of a quota, `t` the seconds until it is whole again."""
    policies, states = [], []
    for (name, quota), seconds in zip(quotas.items(), whole_s, strict=True):
        left = max(0, math.floor(quota * (1 - seconds / WINDOW_S) + 1e-3))
        policies.append(f'"{name}";q={quota};w={WINDOW_S}')
        states.append(f'"{name}";r={left};t={math.ceil(seconds)}')
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}
