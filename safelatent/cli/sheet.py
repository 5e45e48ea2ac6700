"""The contact sheet of `safelatent compare`: one seed, several levels, the numbers under each."""

from contextlib import suppress
from pathlib import Path
from textwrap import wrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from safelatent import Client, Generation, errors
from safelatent.cli.saving import free, slug
from safelatent.cli.speaking import err
from safelatent.client.rendering import why_blocked

CELL, GAP, LINE = 256, 24, 20
PAPER, INK, FAINT, ALARM = "#ffffff", "#16181d", "#646a76", "#b3261e"


def draw_all(
    client: Client, prompt: str, safeties: list[dict[str, Any]], **fields: Any
) -> list[Generation]:
    """One generation for each level, all at once. They are cancelled when the caller leaves."""
    submitted: list[Generation] = []
    try:
        with err.status(f"drawing {len(safeties)} levels"):
            for safety in safeties:
                submitted.append(client.submit(prompt, **fields | {"safety": safety}))
            return [each.wait().raise_for_status() for each in submitted]
    except BaseException:
        for each in submitted:
            with suppress(errors.SafelatentError):
                each.cancel()
        raise


def numbers(generation: Generation) -> list[str]:
    """The figures of a generation's first image."""
    image = generation.images[0]
    said = []
    if summary := image.safety.summary:
        said += [f"undone {summary.undone:.1%}", f"cosine {summary.cosine:.2f}"]
    else:
        said.append("safety did not act")
    said += [
        f"{check.check}: {'flagged' if check.flagged else 'passed'}"
        for check in image.safety.checks
    ]
    return said


def save(generations: list[Generation], output: str | None) -> Path:
    """Write the sheet as PNG (or what the file's name says)."""
    request = generations[0].request
    path = (
        Path(output) if output else free(Path(f"{slug(request.prompt)}-{request.seed}-levels.png"))
    )
    lines = max(len(numbers(each)) for each in generations)
    titles = wrap(request.prompt, max(20, len(generations) * CELL // 9))[:3]
    top = GAP + LINE * (len(titles) + 1) + GAP // 2
    width = GAP + len(generations) * (CELL + GAP)
    height = top + CELL + GAP // 2 + LINE * (lines + 1) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(17), ImageFont.load_default(14)
    for row, line in enumerate(titles):
        draw.text((GAP, GAP + row * LINE), line, INK, title)
    said = f"seed {request.seed}, {request.steps} steps, {request.model}"
    draw.text((GAP, GAP + len(titles) * LINE), said, FAINT, text)
    for column, each in enumerate(generations):
        left = GAP + column * (CELL + GAP)
        _paste(sheet, each, left, top)
        below = top + CELL + GAP // 2
        draw.text((left, below), each.request.safety.level, INK, title)
        for row, line in enumerate(numbers(each), 1):
            colour = ALARM if line.endswith("flagged") else FAINT
            draw.text((left, below + row * LINE), line, colour, text)
    sheet.save(path)
    return path


def _paste(sheet: Image.Image, generation: Generation, left: int, top: int) -> None:
    image = generation.images[0]
    if image.blocked:
        draw = ImageDraw.Draw(sheet)
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=ALARM, width=2)
        words = ["Blocked", *wrap(why_blocked(image), 30)]
        for row, line in enumerate(words):
            draw.text((left + 14, top + 14 + row * LINE), line, ALARM, ImageFont.load_default(14))
        return
    picture = image.pil().convert("RGB")
    scale = min(CELL / picture.width, CELL / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    fitted = picture.resize(size, Image.Resampling.BICUBIC)
    sheet.paste(fitted, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
