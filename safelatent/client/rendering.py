"""How a generation looks: in one line, as a table of facts, and in a notebook. No I/O but Pillow's
lazy import; what both clients' nouns have in common."""

import base64
import html
import inspect
import io
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, PrivateAttr

from safelatent import errors, schema
from safelatent.schema import Status

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


class Picture(schema.Image):
    """An image that remembers its bytes."""

    model_config = ConfigDict(defer_build=True)

    _content: bytes | None = PrivateAttr(None)

    @property
    def why_blocked(self) -> str:
        """`sd_checker flagged nudity: 0.91 > 0.50`."""
        return why_blocked(self)

    def _opened(self, content: bytes) -> "PillowImage":
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("pil() needs Pillow: pip install pillow") from error
        return Image.open(io.BytesIO(content))


class Shown(schema.Generation):
    """A generation that says in one line how it stands, and shows itself in a notebook."""

    model_config = ConfigDict(defer_build=True)

    def __repr__(self) -> str:
        words = [repr(self.id), self.status.value]
        if self.status is Status.QUEUED and self.position is not None:
            words.append(f"position {self.position}")
        if self.status is Status.RUNNING and self.progress:
            words.append(f"step {self.progress.step} of {self.progress.steps}")
        if self.images:
            words.append(f"{len(self.images)} image{'s'[: len(self.images) > 1]}")
        if blocked := sum(image.blocked is not None for image in self.images):
            words.append(f"{blocked} blocked")
        return f"{type(self).__name__}({', '.join(words)})"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return page(self, [_content(image) for image in self.images])


def _content(image: Any) -> bytes | None:
    """An image's bytes; of one that must be awaited, those that were already."""
    if image.blocked or image._content is not None or inspect.iscoroutinefunction(image.bytes):
        return image._content  # type: ignore[no-any-return]
    try:
        return image.bytes()  # type: ignore[no-any-return]
    except (errors.SafelatentError, RuntimeError):  # the latter of a client that was closed
        return None


def why_blocked(image: schema.Image) -> str:
    blocked = image.blocked
    if blocked is None:
        return "it has no url" if image.url is None else "it is not"
    said = f"{blocked.check} flagged {blocked.category}"
    if blocked.score is not None and blocked.threshold is not None:
        said += f": {blocked.score:.3g} > {blocked.threshold:.3g}"
    return said


def facts(generation: schema.Generation, image: schema.Image) -> dict[str, str]:
    """What the safety report says of one image, in words and figures for people."""
    found = {"image": f"{image.index}, seed {image.seed}, {image.width} x {image.height}"}
    if safety := generation.safety:
        asked, done = safety.requested.level, safety.effective.level
        found["level"] = done if done == asked else f"{done} (asked for: {asked})"
        applied = "yes" if image.safety.applied else "no"
        reason = safety.effective.reason
        found["applied"] = f"no: {reason}" if applied == "no" and reason else applied
    if summary := image.safety.summary:
        found["undone"] = f"{summary.undone:.1%} of the guidance, mean over the calls it acted on"
        found["cosine"] = f"{summary.cosine:.3f} between prompt and concept"
        found["acted in"] = f"{summary.applied_calls} of {summary.calls} calls"
        if summary.peak_call is not None:
            found["acted in"] += f", most in call {summary.peak_call}"
    for check in image.safety.checks:
        found[check.check] = _verdict(check)
    if image.blocked:
        found["blocked"] = f"{why_blocked(image)} (policy {image.blocked.policy})"
    return found


def _verdict(check: schema.Check) -> str:
    if check.error:
        return f"could not judge: {check.error}"
    word = "flagged" if check.flagged else "passed"
    limits = {
        name: score - check.thresholds[name]
        for name, score in check.scores.items()
        if name in check.thresholds
    }
    if not limits:
        return word
    worst = max(limits, key=lambda name: limits[name])
    return (
        f"{word}; nearest: {worst} {check.scores[worst]:.3g}, limit {check.thresholds[worst]:.3g}"
    )


def page(generation: schema.Generation, contents: list[bytes | None]) -> str:
    """HTML: each image beside its facts. A blocked one is a box that says so."""
    escape = html.escape
    parts = [
        f"<p><strong>{escape(generation.request.prompt)}</strong><br>"
        f"<small>{escape(generation.status)} · <code>{escape(generation.id)}</code></small></p>"
    ]
    if generation.error:
        parts.append(f"<p>{escape(generation.error.title)}: {escape(generation.error.detail)}</p>")
    for image, content in zip(generation.images, contents, strict=True):
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(said)}</td></tr>'
            for name, said in facts(generation, image).items()
        )
        parts.append(
            '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start;'
            f'margin-bottom:1em">{_figure(generation, image, content)}<table>{rows}</table></div>'
        )
    return "".join(parts)


def _figure(generation: schema.Generation, image: schema.Image, content: bytes | None) -> str:
    size = max(image.width, 192)
    if content is not None:
        source = base64.b64encode(content).decode()
        return (
            f'<img width="{size}" alt="{html.escape(generation.request.prompt, quote=True)}" '
            f'src="data:{html.escape(image.media_type or "image/png")};base64,{source}">'
        )
    title, why = "Not loaded", "its bytes() were not fetched"
    if image.blocked:
        title, why = "Blocked", why_blocked(image)
    return (
        f'<div role="img" aria-label="{title}: {html.escape(why)}" style="box-sizing:border-box;'
        f"width:{size}px;min-height:{size * image.height // max(image.width, 1)}px;padding:1em;"
        "border:2px dashed currentColor;display:flex;flex-direction:column;align-items:center;"
        f'justify-content:center;text-align:center"><strong>{title}</strong>'
        f"<small>{html.escape(why)}</small></div>"
    )
