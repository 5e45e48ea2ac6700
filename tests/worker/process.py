"""Worker processes for tests, forked from one that has imported torch already.

Each runs `worker.process.main`, as the supervisor has it done, with what a test needs bent first.
"""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["worker.process"])


def start(environment: dict[str, str], log: Path, **bent: Any) -> BaseProcess:
    """A worker whose stdout and stderr go to `log`; it dies with the test run."""
    process = FORKS.Process(target=_main, args=(environment, log), kwargs=bent, daemon=True)
    process.start()
    return process


def _main(
    environment: dict[str, str],
    log: Path,
    lease_s: int | None = None,
    step_s: float = 0.0,
    poison_seed: int | None = None,
    says: str | None = None,
) -> None:
    """`lease_s` makes leases shorter, `step_s` steps longer; an image of `poison_seed` kills, or
    makes the device say something."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(environment)

    import torch

    from worker import leases, slots
    from worker import process as worker_process
    from worker.families.stable_diffusion import StableDiffusion

    torch.set_num_threads(1)
    if lease_s is not None:
        leases.LEASE_S, slots.BEAT_S = lease_s, 1
    noise, predict = StableDiffusion.noise, StableDiffusion.predict
    poison = torch.empty(0)

    def watch(self: StableDiffusion, generator: torch.Generator, *size: int) -> torch.Tensor:
        nonlocal poison
        made = noise(self, generator, *size)
        if generator.initial_seed() == poison_seed:
            poison = made
        return made

    def slow_or_deadly(self: StableDiffusion, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if poison.numel() and (latents == poison).flatten(1).all(dim=1).any():
            if says is not None:
                raise RuntimeError(says)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(step_s)
        return predict(self, latents, *rest)

    StableDiffusion.noise = watch  # type: ignore[method-assign]
    StableDiffusion.predict = slow_or_deadly  # type: ignore[method-assign]
    sys.exit(worker_process.main())


def trace(*anything: Any) -> None:
    """What a forged job wants a worker to run: it leaves a file behind."""
    Path(os.environ["TRACE"]).touch()
