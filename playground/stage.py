"""The two pictures in one frame, or what stands in the place of one; heat maps over them."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from playground.talk import Side
from safelatent.schema import Blocked

KEYS = ("a", "b")
"""Of the two sides: letters on the page, classes in the style sheet."""
HEAT = ((0, (255, 214, 120, 0)), (110, (249, 142, 60, 165)), (255, (196, 30, 20, 225)))
"""Colour and opacity of the heat map at grey 0, 110 and 255."""
SCALE = ", ".join(
    f"rgb({red} {green} {blue} / {alpha / 255:.2f}) {value / 2.55:.0f}%"
    for value, (red, green, blue, alpha) in HEAT
)
EYE = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M3 3l18 18M10.6 10.7a2 2 0 0 0 2.8 2.8'
    "M9.4 5.3A9.6 9.6 0 0 1 12 5c5 0 8.5 4 9.5 7a12 12 0 0 1-2.4 3.9"
    'M6.3 6.6A12.3 12.3 0 0 0 2.5 12c1 3 4.5 7 9.5 7a9.5 9.5 0 0 0 4.3-1"/></svg>'
)
"""An eye that is struck through."""


def tag(key: str, side: Side) -> str:
    """A side's letter and level."""
    return f'<span class="tag {key}"><b>{key.upper()}</b> {escape(side.level)}</span>'


def stage(sides: Sequence[Side]) -> str:
    """The two pictures in one frame, a range input between them, and the heat maps over them."""
    layers = "".join(
        f'<div class="layer {key}">{_picture(key, side)}</div>'
        for key, side in zip(KEYS, sides, strict=True)
    )
    tags = "".join(tag(key, side) for key, side in zip(KEYS, sides, strict=True))
    a, b = (escape(side.level) for side in sides)
    some_heat = any(side.heat and side.picture for side in sides)
    heat = (
        '<label class="switch"><input type="checkbox" class="show-heat">'
        "<span>Heat map</span></label>"
        f'<div class="scale"><span>untouched</span><i style="background:linear-gradient(90deg, '
        f'{SCALE})"></i><span>most, in this picture</span></div>'
        if some_heat
        else '<p class="note">No heat map: safety acted on no picture that is shown.</p>'
    )
    return (
        '<section class="stage" aria-label="The two pictures">'
        f'<div class="frame" style="--ratio:{_ratio(sides)}">{layers}{tags}'
        f'<input class="cut" type="range" min="0" max="100" value="50" '
        f'aria-label="Boundary between A, {a}, on the left and B, {b}, on the right">'
        '<span class="seam" aria-hidden="true"></span></div>'
        f'<div class="tools"><fieldset class="view"><legend>View</legend>'
        '<label><input type="radio" name="view" checked><span>Slider</span></label>'
        '<label><input type="radio" name="view" class="as-pair"><span>Side by side</span></label>'
        f"</fieldset>{heat}</div></section>"
    )


def _ratio(sides: Sequence[Side]) -> str:
    """Width to height of the pictures; both were asked for in the same size."""
    images = [image for side in sides if side.generation for image in side.generation.images]
    return f"{images[0].width} / {images[0].height}" if images else "1"


def _picture(key: str, side: Side) -> str:
    if side.error:
        return (
            '<div class="withheld"><div><p><strong>Not drawn</strong></p>'
            f'<p class="why">{escape(side.error.problem.title)}</p></div></div>'
        )
    assert side.generation is not None
    [image] = side.generation.images
    size = f'width="{image.width}" height="{image.height}"'
    small = " small" if image.width <= 128 else ""
    heat = ""
    if side.heat:
        heat = (
            f'<img class="heat" src="{_data(heated(side.heat))}" '
            f'alt="Heat map of {key.upper()}: where safety acted, relative to its own maximum">'
        )
    if image.blocked:
        return _withheld(image.blocked)
    alt = f"{key.upper()}: {side.body['prompt']}, level {side.level}, seed {image.seed}"
    assert side.picture is not None
    return (
        f'<img class="picture{small}" {size} src="{_data(side.picture, image.media_type)}" '
        f'alt="{escape(alt, quote=True)}">{heat}'
    )


def _withheld(blocked: Blocked) -> str:
    """What stands in the place of a picture that a check withholds."""
    if blocked.score is None or blocked.threshold is None:
        why = "could not judge it, so nobody sees it"
    else:
        why = f"score {blocked.score:.2f}<br>threshold {blocked.threshold:.2f}"
    return (
        f'<div class="withheld"><div>{EYE}'
        "<p><strong>Picture withheld</strong></p>"
        f'<p class="category">{escape(blocked.category)}</p>'
        f'<p class="why">{escape(blocked.check)}<br>{why}</p></div></div>'
    )


def heated(grey: bytes) -> bytes:
    """The service's grey heat map in the colours of `HEAT`, as a PNG."""
    heat = Image.open(io.BytesIO(grey)).convert("L")
    palette = [_colour(value) for value in range(256)]
    bands = [heat.point([colour[band] for colour in palette]) for band in range(4)]
    file = io.BytesIO()
    Image.merge("RGBA", bands).save(file, "png")
    return file.getvalue()


def _colour(value: int) -> list[int]:
    (low, before), (high, after) = next(
        (left, right) for left, right in zip(HEAT, HEAT[1:], strict=False) if value <= right[0]
    )
    share = (value - low) / (high - low)
    return [round(x + share * (y - x)) for x, y in zip(before, after, strict=True)]


def _data(content: bytes, media_type: str | None = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
