"""What came of a comparison, as HTML: the pictures, the numbers, the verdicts, the report."""

import json
from collections.abc import Sequence
from html import escape

from playground import snippets
from playground.plot import Line, plot
from playground.stage import KEYS, stage, tag
from playground.talk import Side
from playground.words import Said, said
from safelatent.safety import SafetyParameters
from safelatent.schema import Check, Status, TelemetrySummary

PANELS = (
    ("cosine", "Cosine", "how far the prompt's direction is the concept's, -1 to 1"),
    ("undone", "Share undone", "of the guidance, taken back; above 1 it was reversed"),
    ("momentum", "Momentum", "share of the past in the push, 0 to 1"),
)


def results(sides: Sequence[Side], url: str, shown_url: str, has_key: bool) -> str:
    """All of it. An error that both sides share is said once, in the place of everything."""
    errors = [said(side.error, url, has_key) if side.error else None for side in sides]
    if errors[0] and errors[0] == errors[1]:
        return alert(errors[0])
    parts = [
        _alert(error, tag(key, side))
        for key, side, error in zip(KEYS, sides, errors, strict=True)
        if error
    ]
    if not all(errors):
        parts += [stage(sides), _facts(sides), _telemetry(sides), _checks(sides)]
    parts.append(_reports(sides, shown_url, has_key))
    return f'<div class="sheet">{"".join(parts)}</div>'


def alert(error: Said) -> str:
    """An error, in the place of everything."""
    return f'<div class="sheet">{_alert(error)}</div>'


def _alert(error: Said, whose: str = "") -> str:
    items = "".join(f"<li>{escape(item)}</li>" for item in error.items)
    return (
        f'<div class="alert" role="alert">{whose}<h2>{escape(error.title)}</h2>'
        + (f"<p>{escape(error.text)}</p>" if error.text else "")
        + (f"<p>{escape(error.cure)}</p>" if error.cure else "")
        + (f"<ul>{items}</ul>" if items else "")
        + "</div>"
    )


def empty() -> str:
    """Before the first picture: what will be here."""
    return (
        '<div class="sheet"><section class="stage empty" aria-label="No pictures yet">'
        '<div class="frame"><div class="layer a"></div><div class="layer b"></div>'
        '<span class="seam"></span></div>'
        "<p><strong>One seed, two levels.</strong> Choose a prompt and press Draw. The same noise "
        "becomes two pictures, and a slider goes between them. Then: where safety acted, what "
        "it took back at each step, and what the checks said.</p></section></div>"
    )


def progress(sides: Sequence[Side]) -> str:
    """A bar for each side that is under way."""
    return "".join(
        _bar(key, side) for key, side in zip(KEYS, sides, strict=True) if not side.is_over
    )


def told(sides: Sequence[Side]) -> str:
    """How all stands, in one sentence; it changes seldom, because screen readers say it aloud."""
    if any(side.away for side in sides):
        return "The service does not answer; asking again …"
    if not all(side.is_over for side in sides):
        queued = all(
            side.generation and side.generation.status is Status.QUEUED
            for side in sides
            if not side.is_over
        )
        return "Waiting for a worker …" if queued else "Drawing …"
    images = [image for side in sides if side.generation for image in side.generation.images]
    if len(images) < len(sides):
        return ""
    withheld = [side.level for side, image in zip(sides, images, strict=True) if image.blocked]
    return f"Drawn. Withheld by a check: {' and '.join(withheld)}." if withheld else "Drawn."


def _bar(key: str, side: Side) -> str:
    generation = side.generation
    done = generation.progress if generation else None
    share = 100 * done.step / max(done.steps, 1) if done else 0
    text = f"step {done.step} of {done.steps}" if done else "waiting"
    if generation and generation.position:
        text = f"{generation.position} before it in the queue"
    return (
        f'<div class="bar {key}"><span>{key.upper()} · {escape(side.level)}</span>'
        f'<span class="text">{text}</span><div role="progressbar" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share:.0f}" aria-label="Level {escape(side.level)}">'
        f'<i style="width:{share:.0f}%"></i></div></div>'
    )


def _facts(sides: Sequence[Side]) -> str:
    rows = [
        ("Guidance acted", [_acted(side) for side in sides]),
        ("Denoiser calls changed", [_changed(side) for side in sides]),
        ("Warm-up", [_warmup(side) for side in sides]),
        ("Cosine, mean", [_mean(side, "cosine") for side in sides]),
        ("Share undone, mean", [_mean(side, "undone") for side in sides]),
        ("Momentum, mean", [_mean(side, "momentum") for side in sides]),
        ("Checks", [_verdict(side) for side in sides]),
        ("Raised by the policy", [_raised(side) for side in sides]),
        ("Seconds", [_seconds(side) for side in sides]),
    ]
    body = "".join(
        f'<tr><th scope="row">{title}</th>'
        + "".join(f"<td>{cell or '–'}</td>" for cell in cells)
        + "</tr>"
        for title, cells in rows
        if any(cells)
    )
    heads = "".join(
        f'<th scope="col">{tag(key, side)}</th>' for key, side in zip(KEYS, sides, strict=True)
    )
    return (
        '<section class="facts" aria-labelledby="facts"><h2 id="facts">What was done</h2>'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _acted(side: Side) -> str:
    if side.generation is None or side.generation.safety is None:
        return ""
    effective = side.generation.safety.effective
    if effective.applied:
        return "yes"
    return f"no<small>{escape(effective.reason or '')}</small>"


def _summary(side: Side) -> TelemetrySummary | None:
    images = side.generation.images if side.generation else []
    return images[0].safety.summary if images else None


def _changed(side: Side) -> str:
    summary = _summary(side)
    return f"{summary.applied_calls} of {summary.calls}" if summary else ""


def _warmup(side: Side) -> str:
    parameters = _parameters(side)
    return f"{parameters.warmup_steps} calls" if parameters else ""


def _mean(side: Side, name: str) -> str:
    summary = _summary(side)
    return _signed(getattr(summary, name)) if summary else ""


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "\N{MINUS SIGN}")


def _seconds(side: Side) -> str:
    timings = side.generation.timings if side.generation else None
    return f"{timings.total_s:.1f}" if timings else ""


def _parameters(side: Side) -> SafetyParameters | None:
    safety = side.generation.safety if side.generation else None
    return safety.effective.parameters if safety else None


def _verdict(side: Side) -> str:
    checks = _judged(side)
    if not checks:
        return ""
    if any(check.error for check in checks):
        return '<span class="flagged">could not judge</span>'
    flagged = [name for check in checks for name in _flags(check)]
    return f'<span class="flagged">{escape(", ".join(flagged))}</span>' if flagged else "clear"


def _raised(side: Side) -> str:
    policy = side.generation.policy if side.generation else None
    return escape(", ".join(policy.raised)) if policy else ""


def _judged(side: Side) -> list[Check]:
    images = side.generation.images if side.generation else []
    return images[0].safety.checks if images else []


def _flags(check: Check) -> list[str]:
    return [name for name, score in check.scores.items() if score > check.thresholds[name]]


def _telemetry(sides: Sequence[Side]) -> str:
    """One plot for each number, both levels in it."""
    plots = []
    for name, title, reading in PANELS:
        lines, calls = [], 1
        for key, side in zip(KEYS, sides, strict=True):
            images = side.generation.images if side.generation else []
            if not images or images[0].safety.steps is None or _summary(side) is None:
                continue
            steps, summary = images[0].safety.steps, _summary(side)
            assert summary is not None
            parameters = _parameters(side)
            warmup = parameters.warmup_steps if parameters else 0
            lines.append(Line(key, side.level, steps.call, getattr(steps, name), warmup))
            calls = max(calls, summary.calls)
        if lines:
            drawn = plot(f"{title} a denoiser call", lines, calls)
            caption = f"<figcaption><b>{title}</b> {reading}</figcaption>"
            plots.append(f"<figure>{caption}{drawn}</figure>")
    if not plots:
        return ""
    legend = "".join(
        f'<span class="legend {key}"><i></i>{key.upper()} · {escape(side.level)}</span>'
        for key, side in zip(KEYS, sides, strict=True)
        if _summary(side)
    )
    return (
        '<section class="telemetry" aria-labelledby="steps"><h2 id="steps">Step by step</h2>'
        f'<p class="legends">{legend}<span class="legend warm"><i></i>warm-up: measured, '
        f'not applied</span></p><div class="plots">{"".join(plots)}</div></section>'
    )


def _checks(sides: Sequence[Side]) -> str:
    """Every score against its threshold, one row a category."""
    keyed = zip(KEYS, sides, strict=True)
    judged = [(key, side, check) for key, side in keyed for check in _judged(side)]
    tables = []
    for name in dict.fromkeys(check.check for _, _, check in judged):
        mine = [(key, side, check) for key, side, check in judged if check.check == name]
        heads = "".join(f'<th scope="col">{tag(key, side)}</th>' for key, side, _ in mine)
        rows = "".join(
            f'<tr><th scope="row">{escape(category)}</th>'
            + "".join(f"<td>{_score(check, category)}</td>" for _, _, check in mine)
            + "</tr>"
            for category in mine[0][2].scores
        )
        failed = "".join(f'<p class="note">{escape(c.error)}</p>' for _, _, c in mine if c.error)
        tables.append(
            f"<table><caption>{escape(name)}</caption><thead><tr><td></td>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table>{failed}"
        )
    if not tables:
        return ""
    return (
        '<section class="checks" aria-labelledby="checks"><h2 id="checks">What the checks saw</h2>'
        '<p class="legends">Raw scores; flagged above the threshold, the mark on the line.</p>'
        f"{''.join(tables)}</section>"
    )


def _score(check: Check, category: str) -> str:
    score, threshold = check.scores.get(category), check.thresholds.get(category)
    if score is None or threshold is None:
        return "–"
    flagged = " flagged" if score > threshold else ""
    place, mark = (100 * min(max(value, 0), 1) for value in (score, threshold))
    return (
        f'<span class="score{flagged}"><span class="number">{_signed(score)}'
        f"<small>{'above' if flagged else 'below'} {threshold:.2f}</small></span>"
        f'<span class="meter" aria-hidden="true"><i style="width:{place:.1f}%"></i>'
        f'<b style="left:{mark:.1f}%"></b></span></span>'
    )


def _reports(sides: Sequence[Side], shown_url: str, has_key: bool) -> str:
    columns = []
    for key, side in zip(KEYS, sides, strict=True):
        body = side.body
        parts = [
            ("cURL", snippets.curl(body, shown_url, has_key)),
            ("Python", snippets.python(body, shown_url, has_key)),
        ]
        if side.generation:
            report = side.generation.model_dump(mode="json")
            parts.append(("Report as JSON", json.dumps(report, indent=2, ensure_ascii=False)))
        folds = "".join(_fold(f"{name}, {key.upper()}", name, text) for name, text in parts)
        columns.append(f"<div><p>{tag(key, side)}</p>{folds}</div>")
    return (
        '<section class="reports" aria-labelledby="reports"><h2 id="reports">Take it with you</h2>'
        f'<div class="columns">{"".join(columns)}</div></section>'
    )


def _fold(label: str, name: str, text: str) -> str:
    return (
        f"<details><summary>{name}</summary><div>"
        f'<button type="button" class="copy" aria-label="Copy {label}">Copy</button>'
        f'<pre tabindex="0" aria-label="{label}">{escape(text)}</pre></div></details>'
    )
