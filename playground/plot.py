"""A small line plot as SVG: one number a denoiser call, with the warm-up shaded.

Colours come from the page's style sheet by class, so that one drawing serves light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

WIDTH, HEIGHT = 320, 176
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 12, 30
_ids = count()


@dataclass(frozen=True)
class Line:
    """One level's numbers. `key` is `a` or `b`: its colour and dashes in the style sheet."""

    key: str
    name: str
    calls: Sequence[int]
    values: Sequence[float]
    warmup: int
    """The first denoiser calls, in which the guidance was left alone."""


def plot(title: str, lines: Sequence[Line], calls: int) -> str:
    """An <svg> of all lines over denoiser calls 0 to `calls` - 1, with a title and description."""
    values = [value for line in lines for value in line.values]
    ticks = _ticks(min([0.0, *values]), max([0.0, *values]))
    low, high = ticks[0], ticks[-1]
    last = max(calls - 1, 1)

    def x(call: float) -> float:
        return LEFT + call / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for line in lines:
        if line.warmup:
            end = x(min(line.warmup, last)) - LEFT
            drawn.append(
                f'<rect class="warmup {line.key}" x="{LEFT}" y="{TOP}" width="{end:.1f}" '
                f'height="{HEIGHT - TOP - BOTTOM}"/>'
            )
    for tick in ticks:
        drawn.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    if low < 0:
        drawn.append(
            f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>'
        )
    for place, anchor in ((0, "start"), (last, "end")):
        drawn.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{place}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">denoiser call</text>')
    for line in lines:
        points = " ".join(
            f"{x(call):.1f},{y(value):.1f}"
            for call, value in zip(line.calls, line.values, strict=True)
        )
        drawn.append(f'<polyline class="line {line.key}" points="{points}"/>')

    id = f"plot-{next(_ids)}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{id}-t {id}-d"><title id="{id}-t">{escape(title)}</title>'
        f'<desc id="{id}-d">{escape(" ".join(map(_told, lines)))}</desc>{"".join(drawn)}</svg>'
    )


def _told(line: Line) -> str:
    """The line in words, for who does not see it."""
    peak = max(range(len(line.values)), key=lambda place: line.values[place])
    warm = f"warm-up until call {line.warmup}" if line.warmup else "no warm-up"
    return (
        f"Level {line.name}: {line.values[0]:.2f} at call {line.calls[0]}, highest "
        f"{line.values[peak]:.2f} at call {line.calls[peak]}, {line.values[-1]:.2f} at call "
        f"{line.calls[-1]}; {warm}."
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, two to six of them."""
    span = max(high - low, 0.01)
    step = next(s * 10.0**e for e in range(-3, 9) for s in (1, 2, 5) if span <= 4 * s * 10.0**e)
    first, last = math.floor(low / step), math.ceil(max(high, low + 0.01) / step)
    return [round(place * step, 6) for place in range(first, last + 1)]
