"""Position and ETA of a queued generation, from what each tenant has queued. Pure arithmetic.

Costs are megapixel-steps (`GenerationRequest.megapixel_steps`), rates megapixel-steps a second.
A tenant's queued jobs are taken to cost what its jobs cost on average.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """What a tenant has queued for a model."""

    may_start: float
    """Virtual time at which its next job may start."""
    weight: float
    max_running: int | None
    cost: float
    """Mean of one of its jobs."""
    queued: int
    """Its jobs."""


class Pace(NamedTuple):
    """How fast a worker was lately, while it had work."""

    throughput: float
    """Megapixel-steps a second of the whole batch."""
    each: float
    """The same of one generation in it."""
    slots: int
    """Generations that it can have in hand."""


def ahead(lines: Mapping[str, Line], tenant: str, own: int) -> tuple[int, float]:
    """How many jobs, of what cost, start before a tenant's job that has `own` of them before it.

    Exact, but for ties, when a tenant's jobs cost the same and no `max_running` holds any back.
    """
    mine = lines[tenant]
    jobs, cost = own, own * mine.cost
    start = mine.may_start + own * mine.cost / mine.weight
    for name, other in lines.items():
        if name == tenant:
            continue
        turns = round((start - other.may_start) * other.weight / other.cost, 6)
        before = math.ceil(turns)
        if turns == before and name < tenant:  # both at once: the names decide, as in Redis
            before += 1
        before = min(max(before, 0), other.queued)
        jobs += before
        cost += before * other.cost
    return jobs, cost


def until_start_s(
    paces: Sequence[Pace], running: int, jobs: int, cost: float, own_cost: float
) -> float | None:
    """Seconds until a job starts that has so many of such a cost before it; None if not measured.

    Slots that are free take the first of them. After that a job starts when one ends, so the work
    until then is that of the jobs before it and of one more, which takes its own as the measure.
    """
    free = max(0, sum(pace.slots for pace in paces) - running)
    if not (total := throughput(paces)):
        return None
    if jobs < free:
        return 0.0
    return (cost + own_cost) * (jobs + 1 - free) / (jobs + 1) / total


def run_s(paces: Sequence[Pace], cost: float) -> float | None:
    """Seconds from start to end of a job of such a cost; None if not measured."""
    measured = [pace.each for pace in paces if pace.each]
    return cost * len(measured) / sum(measured) if measured else None


def left_s(spent_s: float, share: float, expected_s: float | None) -> float:
    """Seconds to the end of a job that has made such a share, more than none, in such a time.

    Its own first steps tell little: they stand beside its start, and share a batch that still
    changes. So at first it goes by what is expected of all, from a quarter on by its own rate,
    and in between by both.
    """
    own_s = spent_s / share
    trust = 1 if expected_s is None else min(1, 4 * share)
    return (1 - share) * (trust * own_s + (1 - trust) * (expected_s or 0))


def throughput(paces: Sequence[Pace]) -> float:
    """Of all workers; who has not been measured counts like the mean of those who have."""
    measured = [pace.throughput for pace in paces if pace.throughput]
    return len(paces) * sum(measured) / len(measured) if measured else 0.0
