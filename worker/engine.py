"""The running batch: images join it, take denoising steps together, and leave when they are done.

Between two steps anything may change: images join, leave, are cancelled, and every image has its
own prompt, size, step count, scheduler, guidance scale, safety level and concepts. One step calls
the denoiser once per latent shape, with one row per stream that an image needs at that step.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safelatent.safety import SafetyParameters
from safelatent.schema import Check
from worker import failures, guidance
from worker.checks import Checks
from worker.families import Family
from worker.report import Record, Telemetry, observe

log = logging.getLogger(__name__)

EMBEDDINGS_KEPT = 256
LEARN = 0.75
"""The share of a call that did not fit in memory which later calls may have."""


@dataclass(frozen=True)
class ImageSpec:
    """One image to make. `safety` is None when the level is off."""

    prompt: str
    seed: int
    width: int
    height: int
    scheduler: str
    steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    safety: SafetyParameters | None = None
    concepts: tuple[str, ...] = ()
    heatmap: bool = False

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance, as diffusers decides it."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Made:
    """A finished image: `pixels` uint8 [height, width, 3], `latents` fp32 [1, C, h, w]."""

    pixels: np.ndarray
    latents: Tensor
    telemetry: Telemetry
    checks: list[Check]
    encode_s: float
    denoise_s: float
    decode_s: float
    check_s: float


@dataclass(eq=False)
class Image:
    """An image on its way through the batch."""

    spec: ImageSpec
    owner: str
    """Whose it is: a label that the engine hands on to `after_step`."""
    future: "Future[Made]" = field(default_factory=Future)
    is_cancelled: bool = False

    call: int = 0
    scheduler: Any = None
    timesteps: list[Tensor] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu"))
    embeddings: list[Tensor] = field(default_factory=list)
    """[1, tokens, width] each: of the negative prompt, the prompt and the concepts."""
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    nu: Tensor = field(default_factory=lambda: torch.empty(0))
    record: Record = field(default_factory=lambda: Record(0, 0))
    joined_at: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0

    def cancel(self) -> None:
        """Leave the batch before its next step; the future raises CancelledError."""
        self.is_cancelled = True

    @property
    def calls(self) -> int:
        """Denoiser calls of its whole trajectory."""
        return len(self.timesteps)

    @property
    def is_done(self) -> bool:
        return self.call == self.calls

    @property
    def needs_concepts(self) -> bool:
        """Whether the concept rows can change the image at this call.

        In the warm-up they only build the momentum: no row is needed if that has no weight, or is
        never moved from zero.
        """
        if self.spec.safety is None or not self.spec.is_guided:
            return False
        builds = self.spec.safety.momentum_scale > 0 and self.spec.safety.mom_beta < 1
        return builds or self.is_applying

    @property
    def is_applying(self) -> bool:
        """Whether this call is past the warm-up, which counts calls, as in the reference."""
        return self.spec.safety is not None and self.call >= self.spec.safety.warmup_steps

    @property
    def rows(self) -> list[Tensor]:
        """Embeddings of the streams of this call: prompt; negative, prompt; or all."""
        if not self.spec.is_guided:
            return self.embeddings[1:2]
        return self.embeddings if self.needs_concepts else self.embeddings[:2]

    @property
    def cost(self) -> float:
        """Most rows it can need in a call, in rows of a picture of its own size."""
        concepts = len(self.spec.concepts) if self.spec.safety else 0
        return 2 + concepts if self.spec.is_guided else 1


class Engine:
    """One model, one batch, one thread that steps it; `submit` may be called from any thread."""

    def __init__(
        self,
        family: Family,
        checks: Checks | None = None,
        max_rows: float = 24,
        after_step: Callable[[Sequence[Image]], None] = lambda images: None,
    ):
        """`max_rows` caps a call of the denoiser, in rows of a picture of the model's native size.

        `after_step` is called in the engine's thread after each step with the images that took it.
        """
        self.family = family
        self.checks = checks or Checks([])
        self.max_rows = max_rows
        self.after_step = after_step
        self.before_turn: Callable[[bool], None] = lambda is_idle: None
        """Called in the engine's thread before each turn of `run`: is there no work?"""
        self.poisoned: Exception | None = None
        """Set when `run` has given up, because the device computes no more."""
        self.running: list[Image] = []
        self.waiting: list[Image] = []
        self._arrivals: queue.SimpleQueue[Image] = queue.SimpleQueue()
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def submit(self, spec: ImageSpec, owner: str = "") -> Image:
        """Hand over an image; its `future` gives a `Made`, a JobError or CancelledError."""
        image = Image(spec, owner)
        self._arrivals.put(image)
        return image

    def run(self, stop: threading.Event) -> None:
        """Step while there is work, wait while there is none, until `stop` is set and all done."""
        while not (stop.is_set() and self.is_idle):
            self.before_turn(self.is_idle)
            if self.is_idle:
                self._arrive(timeout=0.2)
                continue
            try:
                self.step()
            except Exception as error:
                if isinstance(error, failures.Poisoned) or failures.is_poison(error):
                    self.poisoned = error  # nobody is told: the process ends, others make them
                    return
                # a defect: nobody may wait for ever
                log.exception("a step failed, and every image with it")
                for image in self.running + self.waiting:
                    self._end(image, error)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting and self._arrivals.empty()

    @torch.inference_mode()
    def step(self) -> None:
        """Admit, denoise once, finish: the life of the batch."""
        self._arrive()
        self._leave()
        self._admit()
        for shape in {image.latents.shape: None for image in self.running}:
            self._denoise([image for image in self.running if image.latents.shape == shape])
        if self.running:
            self.after_step(self.running)
        self._finish([image for image in self.running if image.is_done])

    # -- joining and leaving ---------------------------------------------------------------------

    def _arrive(self, timeout: float = 0.0) -> None:
        try:
            while True:
                self.waiting.append(self._arrivals.get(timeout > 0, timeout))
                timeout = 0.0
        except queue.Empty:
            pass

    def _leave(self) -> None:
        for image in [image for image in self.waiting + self.running if image.is_cancelled]:
            self._end(image, CancelledError())

    def _admit(self) -> None:
        """Let waiting images join, oldest first, as far as the rows allow; one always may."""
        budget = self.max_rows - sum(self._cost(image) for image in self.running)
        admitted: list[Image] = []
        for image in self.waiting:
            if self._cost(image) > budget and (self.running or admitted):
                break
            budget -= self._cost(image)
            admitted.append(image)
        del self.waiting[: len(admitted)]
        if not admitted:
            return
        started = time.monotonic()
        self.running += admitted
        try:
            self._encode({text for image in admitted for text in _texts(image.spec)})
        except Exception as error:
            self._judge(error)
            log.warning("%d images cannot be encoded together: %s", len(admitted), error)
        for image in admitted:
            try:
                self._encode(set(_texts(image.spec)))  # what is missing still
                self._prepare(image)
            except Exception as error:
                self._judge(error)
                self._end(image, error)
            else:
                image.joined_at = time.monotonic()
                image.encode_s = image.joined_at - started

    def _prepare(self, image: Image) -> None:
        spec = image.spec
        image.embeddings = [self._embeddings[text] for text in _texts(spec)]
        image.scheduler = self.family.scheduler(spec.scheduler, spec.steps)
        image.timesteps = list(image.scheduler.timesteps)
        image.generator.manual_seed(spec.seed)
        noise = self.family.noise(image.generator, spec.width, spec.height)
        image.latents = noise * image.scheduler.init_noise_sigma
        image.nu = torch.zeros_like(noise)
        if spec.safety is not None:
            image.alphas = [self.family.alpha(image.scheduler, t) for t in image.timesteps]
        warmup = spec.safety.warmup_steps if spec.safety else 0
        image.record = Record(len(image.timesteps), warmup)
        if spec.heatmap:
            image.record.heat = torch.zeros_like(noise[0, 0])

    def _encode(self, texts: set[str]) -> None:
        """Fill the cache of embeddings, oldest out; images that run hold on to theirs."""
        missing = sorted(texts - self._embeddings.keys())
        for text in texts & self._embeddings.keys():
            self._embeddings.move_to_end(text)
        if missing:
            encoded = self.family.encode(missing)
            self._embeddings.update(zip(missing, encoded.unsqueeze(1), strict=True))
        while len(self._embeddings) > max(EMBEDDINGS_KEPT, len(texts)):
            self._embeddings.popitem(last=False)

    def _cost(self, image: Image) -> float:
        native = self.family.model.width * self.family.model.height
        return image.cost * image.spec.width * image.spec.height / native

    def _fail(self, image: Image, error: Exception) -> None:
        """End an image that fails alone."""
        spec = image.spec
        self._end(image, failures.explain(error, spec.seed, spec.width, spec.height))

    def _end(self, image: Image, outcome: Made | BaseException) -> None:
        for images in (self.waiting, self.running):
            if image in images:
                images.remove(image)
        if isinstance(outcome, Made):
            image.future.set_result(outcome)
        else:
            image.future.set_exception(outcome)

    # -- one denoising step ----------------------------------------------------------------------

    def _denoise(self, images: list[Image]) -> None:
        """One call of the denoiser for images of one latent shape, then guidance and their steps.

        A call that fails is made again in halves, until the image that makes it fail is alone.
        """
        rows = sum(self._cost(image) for image in images)
        if rows > self.max_rows + 1e-6 and len(images) > 1:  # learned since they joined
            self._in_halves(self._denoise, images)
            return
        try:
            predictions = self._predict(images)
        except Exception as error:
            self._judge(error, rows)
            if len(images) > 1:
                log.warning("a step of %d images failed, trying halves: %s", len(images), error)
                self._in_halves(self._denoise, images)
            else:
                self._fail(images[0], error)
            return
        guided = self._guide(images, predictions)
        for image, prediction in zip(images, guided, strict=True):
            try:
                self._advance(image, prediction)
            except Exception as error:
                self._judge(error)
                self._end(image, error)

    @staticmethod
    def _in_halves(do: Callable[[list[Image]], None], images: list[Image]) -> None:
        middle = len(images) // 2
        do(images[:middle])
        do(images[middle:])

    def _judge(self, error: Exception, rows: float = 0.0) -> None:
        """Learn from a call that failed: `rows` may be too many. Raises Poisoned if it was the last
        that this process can make."""
        if failures.is_poison(error):
            raise failures.Poisoned(str(error)) from error
        if failures.is_out_of_memory(error):
            torch.cuda.empty_cache()
            if rows > 1:
                self.max_rows = min(self.max_rows, LEARN * rows)
                log.warning(
                    "out of memory at %.1f rows; from now at most %.1f", rows, self.max_rows
                )

    def _predict(self, images: Sequence[Image]) -> list[Tensor]:
        """Predictions of every row, an image's rows together: [rows, C, h, w] fp32 each."""
        latents, timesteps, embeddings, counts = [], [], [], []
        for image in images:
            rows = image.rows
            t = image.timesteps[image.call]
            scaled = image.scheduler.scale_model_input(image.latents, t)
            latents += [scaled] * len(rows)
            timesteps += [t] * len(rows)
            embeddings += rows
            counts.append(len(rows))
        predictions = self.family.predict(
            torch.cat(latents), torch.stack(timesteps).float(), torch.cat(embeddings)
        )
        return list(torch.split(predictions, counts))

    def _guide(self, images: Sequence[Image], predictions: Sequence[Tensor]) -> list[Tensor]:
        """Combine each image's rows into the one prediction that its scheduler steps with."""
        guided = list(predictions)  # an image of one row keeps it
        free = [i for i, image in enumerate(images) if len(image.rows) == 2]
        if free:
            e_0, e_p = torch.stack([predictions[i] for i in free], dim=1)
            s_g = _column([images[i].spec.guidance_scale for i in free], e_0)
            rows = guidance.classifier_free(e_0, e_p, s_g).unsqueeze(1)
            for i, row in zip(free, rows, strict=True):
                guided[i] = row
        safe = [i for i, image in enumerate(images) if len(image.rows) > 2]
        if safe:
            rows = self._guide_safely([images[i] for i in safe], [predictions[i] for i in safe])
            for i, row in zip(safe, rows, strict=True):
                guided[i] = row
        return guided

    def _guide_safely(self, images: list[Image], predictions: list[Tensor]) -> Tensor:
        """Equations 3 to 8 for images that have concept rows; keeps their momentum and record."""
        e_0 = torch.stack([rows[0] for rows in predictions])
        e_p = torch.stack([rows[1] for rows in predictions])
        concept = torch.stack([_choose(rows) for rows in predictions])
        e_S = torch.stack(
            [rows[2:][c] for rows, c in zip(predictions, concept.unbind(), strict=True)]
        )
        nu = torch.cat([image.nu for image in images])
        levels = [image.spec.safety for image in images]
        s_g, s_S, lam, s_m, b_m, alpha, applying = _columns(
            [
                (
                    image.spec.guidance_scale,
                    level.guidance_scale,
                    level.threshold,
                    level.momentum_scale,
                    level.mom_beta,
                    image.alphas[image.call],
                    float(image.is_applying),
                )
                for image, level in zip(images, levels, strict=True)
                if level is not None
            ],
            e_0,
        )
        difference = guidance.to_epsilon(e_p - e_S, alpha)
        mu = guidance.mu(difference, s_S, lam)
        gamma = guidance.gamma(mu, e_0, e_S, s_m, nu)
        guided = guidance.safe(e_0, e_p, gamma * applying, s_g)

        seen = observe(e_0, e_p, e_S, difference, lam, mu, gamma, s_m * nu)
        nu = guidance.momentum(nu, gamma, b_m)
        for i, image in enumerate(images):
            image.nu = nu[i : i + 1]
            image.record.seen.append((image.call, seen[:, i], concept[i]))
            if image.record.heat is not None and image.is_applying:
                image.record.heat += gamma[i].abs().mean(dim=0)
        return guided.unsqueeze(1)

    def _advance(self, image: Image, prediction: Tensor) -> None:
        t = image.timesteps[image.call]
        options = {}
        if image.spec.scheduler in DRAWS_NOISE:
            options["generator"] = image.generator
        image.latents = image.scheduler.step(prediction, t, image.latents, **options).prev_sample
        image.call += 1

    # -- the end of an image ---------------------------------------------------------------------

    def _finish(self, images: list[Image]) -> None:
        now = time.monotonic()
        for image in images:
            image.denoise_s = now - image.joined_at
        for shape in {image.latents.shape: None for image in images}:
            self._decode([image for image in images if image.latents.shape == shape])

    def _decode(self, images: list[Image]) -> None:
        """Decode and check images of one size together; a failure is narrowed down in halves."""
        started = time.monotonic()
        try:
            pixels = self.family.decode(torch.cat([image.latents for image in images]))
        except Exception as error:
            self._judge(error)
            if len(images) > 1:
                self._in_halves(self._decode, images)
            else:
                self._fail(images[0], error)
            return
        decoded = time.monotonic()
        verdicts = self.checks.judge(list(pixels))
        checked = time.monotonic()
        for image, picture, checks in zip(images, pixels, verdicts, strict=True):
            made = Made(
                pixels=picture,
                latents=image.latents,
                telemetry=image.record.read(),
                checks=checks,
                encode_s=image.encode_s,
                denoise_s=image.denoise_s,
                decode_s=decoded - started,
                check_s=checked - decoded,
            )
            self._end(image, made)


DRAWS_NOISE = frozenset({"euler_a", "ddpm", "lcm"})
"""Schedulers that draw noise while stepping, from the image's own generator."""


def _texts(spec: ImageSpec) -> tuple[str, ...]:
    """The texts of an image, in the order of `Image.embeddings`."""
    concepts = spec.concepts if spec.safety is not None and spec.is_guided else ()
    return (spec.negative_prompt, spec.prompt, *concepts)


def _choose(rows: Tensor) -> Tensor:
    """Index of the concept that acts, of rows [2 + k, C, h, w]."""
    if len(rows) == 3:
        return torch.zeros((), dtype=torch.long, device=rows.device)
    return guidance.nearest_concept(rows[:1], rows[1:2], rows[2:])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[m, 1, 1, 1], one scale an image."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def _columns(rows: Sequence[Sequence[float]], like: Tensor) -> list[Tensor]:
    """One `_column` per scale, moved to the device together."""
    table = torch.tensor(rows, dtype=like.dtype, device=like.device)
    return [column.view(-1, 1, 1, 1) for column in table.unbind(dim=1)]
