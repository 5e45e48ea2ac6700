"""Draws the docs' pictures: `make docs-pictures`, whenever the embedded model has changed.

`docs/levels.png` has every biased caption at every level. The others show one caption at two
levels: the heat map and the curves are the telemetry of the second picture.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from docs.pictures import curves
from safelatent.safety import CONCEPT, LEVELS
from worker import pictures
from worker.engine import Engine, ImageSpec, Made
from worker.families.stable_diffusion import StableDiffusion

FOLDER = Path(__file__).parent
MODEL = Path("models/emoji_scenes")
ROWS = ("off", *LEVELS)
CAPTION, LEVEL = "a gangster", "strong"
SEED, STEPS = 1, 50
SIDE, LABEL = 128, 70


def draw() -> None:
    family = StableDiffusion(str(MODEL), "emoji_scenes", torch.device("cpu"), torch.float32)
    prompts = json.loads((MODEL / "prompts.json").read_text())["context"]
    save(levels(family, [each["prompt"] for each in prompts]), FOLDER.parent / "levels.png")

    plain, safe = make(family, [spec(family, CAPTION, "off"), spec(family, CAPTION, LEVEL)])
    panels = [Image.fromarray(plain.pixels), Image.fromarray(safe.pixels), overlay(safe)]
    sheet = Image.new("RGB", (SIDE * 3 + 16, SIDE), "white")
    for place, panel in enumerate(panels):
        sheet.paste(enlarged(panel), (place * (SIDE + 8), 0))
    save(sheet, FOLDER / "heatmap.png")
    steps = safe.telemetry.steps()
    svg = curves.svg(steps, LEVELS[LEVEL].warmup_steps, safe.telemetry.calls)
    (FOLDER / "telemetry.svg").write_text(svg)


def levels(family: StableDiffusion, captions: Sequence[str]) -> Image.Image:
    """A row for each level, a column for each caption, the same seed in all."""
    specs = [spec(family, caption, level) for level in ROWS for caption in captions]
    sheet = Image.new("RGB", (LABEL + SIDE * len(captions), SIDE * len(ROWS)), "white")
    for place, made in enumerate(make(family, specs)):
        row, column = divmod(place, len(captions))
        picture = enlarged(Image.fromarray(made.pixels))
        sheet.paste(picture, (LABEL + column * SIDE, row * SIDE))
    pen = ImageDraw.Draw(sheet)
    for row, level in enumerate(ROWS):
        pen.text((4, row * SIDE + SIDE // 2), level, "black", ImageFont.load_default(16))
    return sheet


def spec(family: StableDiffusion, caption: str, level: str) -> ImageSpec:
    return ImageSpec(
        prompt=caption,
        seed=SEED,
        width=family.model.width,
        height=family.model.height,
        scheduler="ddim",
        steps=STEPS,
        safety=LEVELS.get(level),
        concepts=(CONCEPT,),
        heatmap=True,
    )


def make(family: StableDiffusion, specs: Sequence[ImageSpec]) -> list[Made]:
    engine = Engine(family)
    images = [engine.submit(each) for each in specs]
    while not engine.is_idle:
        engine.step()
    return [image.future.result() for image in images]


def overlay(made: Made) -> Image.Image:
    """The heat map in red over the picture in grey."""
    assert made.telemetry.heat is not None
    picture = Image.fromarray(made.pixels).convert("L")
    heat = Image.open(io.BytesIO(pictures.heatmap(made.telemetry.heat))).convert("L")
    heat = heat.resize(picture.size, Image.Resampling.BILINEAR)
    grey = np.asarray(picture, dtype=float)[..., None]
    share = np.asarray(heat, dtype=float)[..., None] / 255
    red = np.array([200.0, 30.0, 30.0])
    return Image.fromarray(((0.75 * grey + 50) * (1 - share) + red * share).astype(np.uint8))


def enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def save(picture: Image.Image, path: Path) -> None:
    """As a small PNG, of 256 colours."""
    picture.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    draw()
