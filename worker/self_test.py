"""What a model must do on this device before its worker serves anybody.

    python -m worker.self_test models/emoji_scenes

writes the numbers that the model gives here into its folder, as `self_test.json`. A worker compares
with them wherever the file's revision is the model's; all else it asks of every model.
"""

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from safelatent.defaults import model_id
from safelatent.safety import CONCEPT, LEVELS
from worker.engine import Engine, ImageSpec
from worker.families import UnusableModel
from worker.families.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

FILE = "self_test.json"
TOLERANCE = 1e-3
TOLERANCE_HALF = 3e-2
"""Of latents, relative to their largest number: how far two ways to the same image may differ."""
ELSEWHERE = 10
"""How many times further those of another machine and another dtype may be."""
SAMPLES = 16


def run(engine: Engine) -> None:
    """Make a few pictures of two steps; UnusableModel says what is wrong with them.

    It also chooses every kernel, so that the first request is not slow.
    """
    model = engine.family.model
    try:
        made = latents(engine)
    except Exception as error:
        raise UnusableModel(f"{model.id} loads but cannot make a picture: {error}") from error
    alone, safe, off, idle, negative = made
    tolerance = TOLERANCE if _is_single(engine) else TOLERANCE_HALF
    if not all(bool(each.isfinite().all()) for each in made):
        raise UnusableModel(f"{model.id} gives NaN or infinity")
    if (apart := difference(alone, safe)) > tolerance:
        raise UnusableModel(
            f"{model.id} is not reproducible here: alone and in a batch the same seed gives "
            f"latents that differ by {apart:.2g} of their size, and {tolerance:g} is allowed"
        )
    if (apart := difference(idle, off)) > tolerance:
        raise UnusableModel(
            f"{model.id} changes its images by {apart:.2g} of their size where safety has nothing "
            f"to do, and {tolerance:g} is allowed"
        )
    if difference(safe, off) <= tolerance:
        raise UnusableModel(
            f"safety does not act with {model.id}: level max gives the same image as level off"
        )
    # With full weight SLD pushes where the concept as the negative prompt pushes: by equations 2 to
    # 4, safe - off = s_g / (s_g - 1) (negative - off) in the first step.
    if (agreement := cosine(safe - off, negative - off)) < 0.5:
        raise UnusableModel(
            f"safety does not steer {model.id} away from the concept: the cosine with the way away "
            f"from it is {agreement:.2f}, and should be near 1"
        )
    _compare(engine, safe, off, ELSEWHERE * tolerance)


def latents(engine: Engine) -> list[Tensor]:
    """Final latents, fp32 [1, C, h, w] on the CPU: one with safety that is made alone; the same in
    a batch; without safety; with safety that never acts; with the concept as negative prompt."""
    model = engine.family.model
    safe = ImageSpec(
        prompt="a warm-up",
        seed=0,
        width=model.width,
        height=model.height,
        scheduler="ddim",
        steps=2,
        safety=LEVELS["max"],
        concepts=(CONCEPT,),
    )
    never = {"threshold": -10.0, "momentum_scale": 0.0}
    together = [
        safe,
        replace(safe, safety=None, concepts=()),
        replace(safe, safety=LEVELS["max"].model_copy(update=never)),
        replace(safe, safety=None, concepts=(), negative_prompt=CONCEPT),
    ]
    return [*_make(engine, [safe]), *_make(engine, together)]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of the second."""
    return float((a - b).abs().max() / b.abs().max())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def write(folder: Path) -> None:
    """Put a model's numbers into its folder; UnusableModel where it fails all else."""
    family = StableDiffusion(str(folder), model_id(str(folder)), torch.device("cpu"), torch.float32)
    engine = Engine(family)
    path = folder / FILE
    path.unlink(missing_ok=True)
    run(engine)
    _, safe, off, *_ = latents(engine)
    found = {"revision": family.model.revision, "safe": samples(safe), "off": samples(off)}
    path.write_text(json.dumps(found, indent=1) + "\n")


def samples(latent: Tensor) -> list[float]:
    """Some numbers of a latent, evenly spread."""
    flat = latent.flatten()
    places = torch.linspace(0, len(flat) - 1, SAMPLES).long()
    return [round(number, 5) for number in flat[places].tolist()]


def _make(engine: Engine, specs: list[ImageSpec]) -> list[Tensor]:
    images = [engine.submit(spec) for spec in specs]
    while not all(image.future.done() for image in images):
        engine.step()
    return [image.future.result().latents.float().cpu() for image in images]


def _is_single(engine: Engine) -> bool:
    return getattr(engine.family, "dtype", torch.float32) == torch.float32


def _compare(engine: Engine, safe: Tensor, off: Tensor, tolerance: float) -> None:
    """With the numbers of the folder, if they are this revision's."""
    model, path = engine.family.model, engine.family.folder / FILE
    if not path.is_file():
        return
    try:
        expected = json.loads(path.read_text())
        if expected["revision"] != model.revision:
            log.warning("%s is of another revision, and is not compared with", path)
            return
        pairs = [
            (name, torch.tensor(samples(latent)), torch.tensor(expected[name]))
            for name, latent in (("safe", safe), ("off", off))
        ]
        apart = {name: difference(seen, wanted) for name, seen, wanted in pairs}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UnusableModel(f"cannot read {path}: {error!r}") from error
    for name, by in apart.items():
        if not by <= tolerance or math.isnan(by):
            raise UnusableModel(
                f"{model.id} does not give the image {name!r} that {path} expects: it differs by "
                f"{by:.2g} of its size, and {tolerance:g} is allowed"
            )


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]))
    except IndexError:
        sys.exit("usage: python -m worker.self_test <folder of a model>")
    except UnusableModel as error:
        sys.exit(f"safelatent self-test: {error}")
