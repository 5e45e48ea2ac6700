"""What every stage shares: where work is kept, and a training loop that survives being killed."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from training.corpus import Scene, make_corpus

WORK = Path(".safelatent/training")
MODEL = Path("models/emoji_scenes")
TRAIN_COUNT, TRAIN_SEED = 24_000, 1
HELD_OUT_COUNT, HELD_OUT_SEED = 2_000, 2
SAVE_EVERY_S = 180


def corpus(held_out: bool = False) -> tuple[list[Scene], Tensor]:
    """The scenes and their pictures as uint8 (n, 3, 64, 64); the held-out ones come from another
    seed.
    """
    seed = (HELD_OUT_COUNT, HELD_OUT_SEED) if held_out else (TRAIN_COUNT, TRAIN_SEED)
    scenes, pictures = make_corpus(*seed)
    return scenes, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 pictures as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def save_atomically(value: object, path: Path) -> None:
    """Write beside the file and rename, so that a kill leaves the old file or the new one and never
    half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def record(stage: str, **numbers: object) -> None:
    """Add the numbers to the metrics file beside the weights."""
    path = MODEL / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    metrics.setdefault(stage, {}).update(numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=1) + "\n")


def cosine_rate(progress: float, warm_up: float = 0.02, decay_from: float = 0.3) -> float:
    """The factor of the learning rate at a progress from 0 to 1: it rises, so that the first steps
    of an untrained network break nothing; stays; and falls along a cosine, to settle.
    """
    if progress < warm_up:
        return max(progress, 1e-4) / warm_up
    fall = max(0.0, (progress - decay_from) / (1 - decay_from))
    return 0.02 + 0.98 * (0.5 + 0.5 * float(torch.cos(torch.tensor(fall * torch.pi))))


class Training:
    """A loop that can be killed: `for step in training.steps(): ...`, with a checkpoint every few
    minutes.

    The state is the modules, the optimizer, the step and the seconds spent; starting again goes on
    from there. The random numbers of a step depend on the step alone.
    """

    def __init__(
        self, stage: str, modules: dict[str, nn.Module], rate: float, steps: int, **adam: object
    ) -> None:
        self.stage, self.modules, self.rate, self.total = stage, modules, rate, steps
        parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, **adam)  # type: ignore[arg-type]
        self.step, self.seconds, self.path = 0, 0.0, WORK / f"{stage}.pt"
        self.loss = 0.0
        """The recent mean of the loss."""
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.loss = state.get("loss", 0.0)
            print(f"{stage}: going on from step {self.step}", flush=True)

    def save(self) -> None:
        """Write a checkpoint."""
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        state = {"modules": modules, "optimizer": self.optimizer.state_dict()}
        where = {"step": self.step, "seconds": self.seconds, "loss": self.loss}
        save_atomically(state | where, self.path)

    def steps(self) -> Iterator[int]:
        """Yield the steps that remain, save now and then, and say how long is left."""
        saved = spoke = time.monotonic()
        while self.step < self.total:
            start = time.monotonic()
            torch.manual_seed(1_000_003 * (self.step + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * cosine_rate(self.step / self.total)
            yield self.step
            now = time.monotonic()
            self.step, self.seconds = self.step + 1, self.seconds + now - start
            if now - spoke > 20 or self.step == self.total:
                spoke, left = now, (self.total - self.step) * self.seconds / self.step / 60
                done = f"{self.stage}: step {self.step} of {self.total}, loss {self.loss:.4f}"
                print(f"{done}, {left:.1f} minutes left", flush=True)
            if now - saved > SAVE_EVERY_S or self.step == self.total:
                self.save()
                saved = now

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer down the loss's gradient, which is clipped to length 1."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.loss += (0.02 if self.loss else 1.0) * (loss.item() - self.loss)
