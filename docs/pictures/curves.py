"""The telemetry of one picture as an SVG: three curves over the denoiser's calls."""

from collections.abc import Sequence

from safelatent.schema import TelemetrySteps

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 110, 90, 28, 26
CURVES = {
    "cosine": "cosine to the concept",
    "undone": "share undone",
    "momentum": "share of momentum",
}
INK, FAINT, LINE = "#333333", "#dddddd", "#b3261e"


def svg(steps: TelemetrySteps, warmup: int, calls: int) -> str:
    """One plot a curve, one under the other; the warm-up's calls are shaded."""
    height = TOP + (HEIGHT + GAP) * len(CURVES) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (name, title) in enumerate(CURVES.items()):
        top = TOP + place * (HEIGHT + GAP)
        parts += _plot(top, title, steps.call, getattr(steps, name), warmup, calls)
    bottom = TOP + len(CURVES) * (HEIGHT + GAP) - 6
    parts.append(f'<text x="{LEFT + WIDTH}" y="{bottom}" text-anchor="end">denoiser call</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _plot(
    top: int,
    title: str,
    call: Sequence[int],
    values: Sequence[float],
    warmup: int,
    calls: int,
) -> list[str]:
    low, high = min(0.0, *values), max(0.0, *values)
    spread = (high - low) or 1.0

    def x(at: float) -> float:
        return round(LEFT + WIDTH * at / (calls - 1), 1)

    def y(value: float) -> float:
        return round(top + HEIGHT * (high - value) / spread, 1)

    points = " ".join(f"{x(at)},{y(value)}" for at, value in zip(call, values, strict=True))
    parts = [f'<text x="{LEFT}" y="{top - 8}">{title}</text>']
    if warmup:
        shade = f'x="{LEFT}" y="{top}" width="{x(warmup) - LEFT:.1f}" height="{HEIGHT}"'
        parts.append(f'<rect {shade} fill="#eeeeee"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{top + 16}" fill="#777777">warm-up</text>')
    for value in sorted({low, 0.0, high}):
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(value)}" y2="{y(value)}" '
            f'stroke="{FAINT}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    parts.append(f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.8"/>')
    return parts
