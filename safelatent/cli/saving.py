"""Where the pictures of a generation go."""

import re
import sys
from pathlib import Path

from safelatent import Generation, Image

SUFFIXES = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpg"}


def save(generation: Generation, output: str | None) -> list[Path]:
    """Write every image that is not blocked, and say where.

    `output` is a file (with several images its name gets their index), a folder, `-` for stdout,
    or None for a free name in this folder, made of the prompt, the level and the seed.
    """
    saved = []
    for image in generation.images:
        if image.blocked:
            continue
        if output == "-":
            sys.stdout.buffer.write(image.bytes())
            sys.stdout.buffer.flush()
        else:
            saved.append(image.save(_path(generation, image, output)))
    return saved


def _path(generation: Generation, image: Image, output: str | None) -> Path:
    if output is not None and not (output.endswith("/") or Path(output).is_dir()):
        path = Path(output)
        if len(generation.images) > 1:
            path = path.with_stem(f"{path.stem}-{image.index}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    folder = Path(output or ".")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{slug(generation.request.prompt)}-{generation.request.safety.level}-{image.seed}"
    return free(folder / f"{stem}.{SUFFIXES.get(image.media_type or '', 'png')}")


def free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that is not taken."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
