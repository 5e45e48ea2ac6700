"""The engine against diffusers' pipeline on the same checkpoint, in one process, side by side.

Every ratio is the median of pairs measured in turn, ours / theirs: a machine that slows down
slows both.
"""

import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from safelatent.safety import CONCEPT, LEVELS
from worker.engine import Engine, ImageSpec
from worker.families.stable_diffusion import SCHEDULERS, StableDiffusion
from worker.report import observe

Row = dict[str, Any]


def run(model: str, repeats: int) -> list[Row]:
    family = load(model)
    pipeline = reference(model)
    spec = ImageSpec("a cat", 1, *size(family), "ddim", 25)
    alone = replace(spec, safety=LEVELS["medium"], concepts=(CONCEPT,))
    crowd = mixed(*size(family))

    def against_theirs(specs: list[ImageSpec]) -> float:
        return median(ratio(lambda: ours(family, specs), lambda: theirs(pipeline, specs), repeats))

    ours_mib, theirs_mib = peak("ours", model), peak("theirs", model)
    rows = [
        row("a  one image alone, ours / theirs", against_theirs([alone])),
        row("b  16 mixed, theirs one by one / ours together", 1 / against_theirs(crowd)),
        row("c  engine / the model calls it made (16 mixed)", overhead(family, crowd, repeats)),
        row("c  engine / the model calls it made (alone)", overhead(family, [alone], repeats)),
        row("e  peak memory of a process, ours / theirs", ours_mib / theirs_mib),
        row("g  telemetry / the denoiser call of three rows", telemetry(family)),
    ]
    for threads in sorted({1, torch.get_num_threads()}):
        seconds = on_threads(threads, lambda: ours(family, [alone]), repeats)
        rows.append(row(f"   one image alone with SLD, 25 steps, {threads} threads", seconds, "s"))
    for count in (1, 2, 3, 6, 9, 12, 18, 24):
        rows.append(row(f"f  denoiser call of {count} rows", 1000 * call(family, count), "ms"))
    return rows


def row(what: str, value: float, unit: str = "") -> Row:
    return {"what": what, "value": value, "unit": unit}


def load(model: str) -> StableDiffusion:
    return StableDiffusion(model, "bench", torch.device("cpu"), torch.float32)


def reference(model: str) -> Any:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from diffusers import StableDiffusionPipelineSafe

    pipeline = StableDiffusionPipelineSafe.from_pretrained(
        model, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline._safety_text_concept = CONCEPT
    return pipeline


def mixed(width: int, height: int) -> list[ImageSpec]:
    """16 requests: every level, 15 to 50 steps, guidance 3 to 12, three schedulers."""
    levels = ["off", "weak", "medium", "strong", "max"]
    schedulers = ["ddim", "pndm", "euler"]
    return [
        ImageSpec(
            prompt=f"a cat number {i}",
            seed=i,
            width=width,
            height=height,
            scheduler=schedulers[i % 3],
            steps=max(16, 15 + 35 * i // 15),
            guidance_scale=3 + 9 * ((7 * i) % 16) / 15,
            safety=LEVELS.get(levels[i % 5]),
            concepts=(CONCEPT,),
        )
        for i in range(16)
    ]


def ours(family: StableDiffusion, specs: list[ImageSpec]) -> None:
    engine = Engine(family)
    images = [engine.submit(spec) for spec in specs]
    while not all(image.future.done() for image in images):
        engine.step()
    for image in images:
        image.future.result()


def theirs(pipeline: Any, specs: list[ImageSpec]) -> None:
    for spec in specs:
        kind, options = SCHEDULERS[spec.scheduler]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
        level = spec.safety
        pipeline(
            spec.prompt,
            height=spec.height,
            width=spec.width,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance_scale,
            generator=torch.Generator().manual_seed(spec.seed),
            sld_guidance_scale=level.guidance_scale if level else 0,
            sld_warmup_steps=level.warmup_steps if level else 0,
            sld_threshold=level.threshold if level else 0,
            sld_momentum_scale=level.momentum_scale if level else 0,
            sld_mom_beta=level.mom_beta if level else 0,
        )


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def on_threads(threads: int, action: Callable[[], object], repeats: int) -> float:
    """Median seconds of an action on so many of torch's threads, after one warm-up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        action()
        return median(timed(action) for _ in range(repeats))
    finally:
        torch.set_num_threads(before)


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> list[float]:
    """Time of a / time of b, pair by pair, after one warm-up of each."""
    a(), b()
    return [timed(a) / timed(b) for _ in range(repeats)]


def overhead(family: StableDiffusion, specs: list[ImageSpec], repeats: int) -> float:
    """Time of the engine / time spent inside the model's own calls, in the same run."""
    return median(_overhead(family, specs) for _ in range(repeats))


def _overhead(family: StableDiffusion, specs: list[ImageSpec]) -> float:
    meter = Meter(family)
    whole = timed(lambda: ours(meter, specs))  # type: ignore[arg-type]
    return whole / meter.seconds


class Meter:
    """A family that counts the seconds spent in encode, predict and decode."""

    def __init__(self, family: StableDiffusion):
        self.family = family
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.family, name)
        if name not in ("encode", "predict", "decode"):
            return found

        def metered(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return metered


@torch.inference_mode()
def call(family: StableDiffusion, rows: int) -> float:
    """Median seconds of one denoiser call."""
    noise = family.noise(torch.Generator().manual_seed(0), *size(family))
    text = family.encode(["a cat"])
    arguments = noise.repeat(rows, 1, 1, 1), torch.full((rows,), 500.0), text.repeat(rows, 1, 1)
    family.predict(*arguments)
    return median(timed(lambda: family.predict(*arguments)) for _ in range(7))


@torch.inference_mode()
def telemetry(family: StableDiffusion) -> float:
    """Time of `observe` for one image / time of the denoiser call that it observes."""
    e = torch.randn(8, *family.noise(torch.Generator(), *size(family)).shape)
    lam = torch.zeros(1, 1, 1, 1)
    seconds = median(
        timed(lambda: observe(e[0], e[1], e[2], e[3], lam, e[5], e[6], e[7])) for _ in range(50)
    )
    return seconds / call(family, 3)


def size(family: StableDiffusion) -> tuple[int, int]:
    return family.model.width, family.model.height


def peak(side: str, model: str) -> float:
    """Peak resident memory, MiB, of a fresh process that makes one image."""
    code = f"from benchmarks import engine; print(engine.peak_here({side!r}, {model!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(said.stdout.split()[-1])


def peak_here(side: str, model: str) -> float:
    spec = ImageSpec("a cat", 1, 64, 64, "ddim", 12, safety=LEVELS["medium"], concepts=(CONCEPT,))
    if side == "ours":
        ours(load(model), [spec])
    else:
        theirs(reference(model), [spec])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
